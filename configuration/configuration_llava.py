"""Configuration of MLP-LLaVA: the bridge is a linear layer or a small MLP; an image is one tile or several.

Source: LLaVA (arXiv 2304.08485, section 4.1), LLaVA-1.5 (arXiv 2310.03744, sections 3.2 and 3.4) and LLaVA-NeXT (the
authors' article of January 2024); `llava/model/multimodal_projector/builder.py`, `llava/mm_utils.py` and `llava/model/
llava_arch.py` of the official code.
"""

import re
from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_bridged import BridgedConfig, patch_grid


# ---------------------------------------------------------------------- geometry


def best_resolution(height: int, width: int, image_grid_pinpoints: list[list[int]]) -> tuple[int, int]:
    """Choose the resolution that keeps most of an image's pixels and, among those, pads least.

    Args:
        height: Height of the original image, in pixels.
        width: Width of the original image, in pixels.
        image_grid_pinpoints: Resolutions to choose from, `(height, width)` in pixels.

    Returns:
        The chosen `(height, width)`; the earlier one if two are equally good.

    Raises:
        ValueError: The image has no pixels.

    Source: `select_best_resolution` in `llava/mm_utils.py`.
    """
    if height < 1 or width < 1:
        raise ValueError(f"The image has {height}x{width} pixels; expected at least 1x1.")

    def kept_and_wasted(resolution: list[int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), height * width)
        return kept, kept - resolution[0] * resolution[1]

    return tuple(max(image_grid_pinpoints, key=kept_and_wasted))


def unpadded_span(original: tuple[int, int], grid: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a grid of features that show the image, without the padding around it.

    Args:
        original: `(height, width)` of the original image, in pixels.
        grid: `(rows, columns)` of features of the image padded to its best resolution.

    Returns:
        Slices of rows and columns. They are empty if the image is so narrow that it covers less than one feature of
        an even grid.

    Source: `unpad_image` in `llava/model/llava_arch.py`, with its float arithmetic: the scaled side is truncated, so
    that a side that should be a whole number may come out one less. transformers rounds to seven digits first.
    """
    (height, width), (rows, columns) = original, grid
    if width / height > columns / rows:
        padding = (rows - int(height * (columns / width))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(width * (rows / height))) // 2
    return slice(0, rows), slice(padding, columns - padding)


@dataclass(frozen=True)
class AnyresLayout:
    """How one image becomes visual tokens at any resolution.

    Args:
        tiles: Rows and columns of tiles, without the base image.
        grid: Rows and columns of features of one tile, after pooling.
        rows: Rows of the tiles' joint grid that are kept.
        columns: Columns of the tiles' joint grid that are kept.
        num_image_tokens: Visual tokens of the base image, the tiles and the line ends together.
    """

    tiles: tuple[int, int]
    grid: tuple[int, int]
    rows: slice
    columns: slice
    num_image_tokens: int

    @property
    def num_tiles(self) -> int:
        """Number of tiles, including the base image."""
        return self.tiles[0] * self.tiles[1] + 1


def pooled_grid(source, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of features that one image or tile becomes, after pooling.

    Args:
        source: As for `patch_grid`, and with `pooling` and `pooling_factor`.
        height: Height of the image as the vision model receives it, in pixels.
        width: Width of the same image, in pixels.

    Raises:
        ValueError: The CLS feature is asked for, but the vision encoder has none.
    """
    if source.pooling == "cls":
        if not source.num_prefix_tokens:
            raise ValueError("pooling='cls' keeps the CLS feature, but this vision encoder has none. Use 'average'.")
        return 1, 1
    rows, columns = patch_grid(source, height, width)
    return -(-rows // source.pooling_factor), -(-columns // source.pooling_factor)


def anyres_layout(source, height: int, width: int) -> AnyresLayout:
    """Tiles and visual tokens of one image at any resolution. Model and processor both use this function.

    Args:
        source: Configuration or processor with `image_grid_pinpoints`, `image_size`, `patch_merge_type` and the fields
            that `num_patches` and `pooled_grid` need.
        height: Height of the original image, in pixels.
        width: Width of the original image, in pixels.

    Raises:
        ValueError: The image has no pixels, or the resolutions can't be cut into tiles.
    """
    side = source.image_size
    best = best_resolution(height, width, source.image_grid_pinpoints)
    if best[0] % side or best[1] % side:
        raise ValueError(
            f"image_grid_pinpoints has {list(best)}; height and width must be multiples of the vision encoder's "
            f"image_size, {side} pixels."
        )
    tiles = best[0] // side, best[1] // side
    grid = pooled_grid(source, side, side)
    joint = tiles[0] * grid[0], tiles[1] * grid[1]
    rows, columns = slice(0, joint[0]), slice(0, joint[1])
    prefix = _num_prefix_tokens(source)
    line_end = 0
    if source.patch_merge_type == "spatial_unpad":
        rows, columns = unpadded_span((height, width), joint)
        line_end = 1
    merged = (rows.stop - rows.start) * (columns.stop - columns.start + line_end)
    if source.patch_merge_type == "flat":
        merged += tiles[0] * tiles[1] * prefix
    return AnyresLayout(tiles, grid, rows, columns, grid[0] * grid[1] + prefix + merged)


def _num_prefix_tokens(source) -> int:
    """Prefix tokens that are kept among an image's features.

    Raises:
        ValueError: Prefix tokens are kept, but the grid is pooled or merged and has no place for them.
    """
    if source.vision_feature_select_strategy != "full" or not source.num_prefix_tokens:
        return 0
    spatial = source.image_grid_pinpoints is not None and source.patch_merge_type != "flat"
    if source.pooling is not None or spatial:
        what = f"pooling={source.pooling!r}" if source.pooling else f"patch_merge_type={source.patch_merge_type!r}"
        raise ValueError(
            f"{what} needs patches alone, but vision_feature_select_strategy='full' keeps {source.num_prefix_tokens} "
            "prefix tokens (CLS, registers). Use 'patch', or patch_merge_type='flat' without pooling."
        )
    return source.num_prefix_tokens


def num_llava_tokens(source, height: int, width: int) -> int:
    """Visual tokens that one image becomes.

    Args:
        source: Configuration or processor.
        height: Height in pixels: of the original image if it is cut into tiles, else as the vision model receives it.
        width: Width of the same image, in pixels.
    """
    if source.image_grid_pinpoints is not None:
        return anyres_layout(source, height, width).num_image_tokens
    rows, columns = pooled_grid(source, height, width)
    return rows * columns + _num_prefix_tokens(source)


def default_grid_pinpoints(image_size: int) -> list[list[int]]:
    """LLaVA-NeXT's resolutions for an encoder: 1x2, 2x1, 2x2, 3x1 and 1x3 tiles.

    Args:
        image_size: Side of one tile, in pixels.

    Returns:
        A list of `[height, width]`, in pixels.
    """
    return [[rows * image_size, columns * image_size] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


# ---------------------------------------------------------------------- configuration


@strict
class MLPLlavaConfig(BridgedConfig):
    """MLP-LLaVA: every patch feature becomes one visual token.

    Args:
        projector_type: `"linear"` (v1), `"mlp2x_gelu"` (v1.5), `"mlpNx_gelu"` for N layers, or `"identity"` for
            features that already have the language model's width.
        projector_bias: Whether the linear layers have biases.
        projector_hidden_size: Width of the layers between the first and the last; `None` takes the language model's.
        projector_norm_eps: Epsilon of a layer norm, without weights, in front of the first layer; `None` for no norm.
        pooling: How to reduce the number of tokens before the projector: `"average"` averages neighbouring patches,
            `"pixel_shuffle"` concatenates their channels. An incomplete neighbourhood at the border is averaged over
            the patches it has, or filled up with zeros. `"cls"` keeps the encoder's CLS feature alone.
        pooling_factor: Side of the neighbourhood that becomes one token, in patches.
        global_context: Whether each feature is followed by the mean of all features of its image (or tile), so that
            every visual token knows the whole image; the first layer is twice as wide. Source: ParseNet
            (arXiv 1506.04579).
        image_grid_pinpoints: Resolutions to choose from for each image, `(height, width)` in pixels, multiples of the
            encoder's image size (the official configuration lists the width first). If given, images of any resolution
            are cut into tiles, as in LLaVA-NeXT.
        patch_merge_type: How the tiles of an image are put together: `"flat"` concatenates them, `"spatial"` arranges
            them as one picture, `"spatial_unpad"` also cuts off its padding and ends every line with
            `bridge.image_newline`.

    The other fields are those of `BridgedConfig`.
    """

    model_type = "mlp_llava"

    projector_type: str = "mlp2x_gelu"
    projector_bias: bool = True
    projector_hidden_size: int | None = None
    projector_norm_eps: float | None = None
    pooling: Literal["pixel_shuffle", "average", "cls"] | None = None
    pooling_factor: int = 1
    global_context: bool = False
    image_grid_pinpoints: list[list[int]] | None = None
    patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] = "spatial_unpad"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.projector_depth  # noqa: B018  raises if projector_type is unknown
        if self.pooling_factor < 1 or (self.pooling in (None, "cls") and self.pooling_factor != 1):
            raise ValueError(
                f"pooling_factor is {self.pooling_factor} with pooling={self.pooling!r}; expected 1 without pooling "
                "and for 'cls', and at least 1 with pooling='average' or 'pixel_shuffle'."
            )
        if self.pooling == "cls" and self.image_grid_pinpoints is not None:
            raise ValueError("pooling='cls' gives one token per image; images can't be cut into tiles with it.")
        if self.global_context and self.projector_depth == 0:
            raise ValueError("global_context doubles the features' width; projector_type='identity' can't undo that.")
        for pinpoint in self.image_grid_pinpoints or ([] if self.image_grid_pinpoints is None else [[]]):
            if len(pinpoint) != 2 or min(pinpoint) < 1:
                raise ValueError(
                    f"image_grid_pinpoints is {self.image_grid_pinpoints}; expected a list of (height, width) in "
                    "pixels, or None for one tile per image."
                )

    @property
    def projector_depth(self) -> int:
        """Number of linear layers.

        Raises:
            ValueError: `projector_type` is unknown.
        """
        if self.projector_type in ("identity", "linear"):
            return int(self.projector_type == "linear")
        match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.projector_type)
        if match is None:
            raise ValueError(
                f"projector_type is {self.projector_type!r}; expected 'identity', 'linear' or 'mlpNx_gelu' (N >= 1)."
            )
        return int(match.group(1))

    @property
    def has_image_newline(self) -> bool:
        """Whether lines of tiles end with a learned token.

        Source: `initialize_vision_modules` in `llava/model/llava_arch.py`: only if padding is cut off.
        """
        return self.image_grid_pinpoints is not None and self.patch_merge_type == "spatial_unpad"

    @property
    def vision_feature_size(self) -> int:
        """Channels of the features that the bridge receives, after pooling."""
        neighbours = self.pooling_factor**2 if self.pooling == "pixel_shuffle" else 1
        return super().vision_feature_size * neighbours

    def num_image_tokens(self, height: int, width: int) -> int:
        """Visual tokens that one image becomes.

        Args:
            height: Height in pixels: of the original image if it is cut into tiles, else as the vision model
                receives it.
            width: Width of the same image, in pixels.
        """
        return num_llava_tokens(self, height, width)

    def image_token_range(self) -> tuple[int, int]:
        """Smallest and largest number of visual tokens that one image can become.

        If images are cut into tiles, sides from 1 to 65,536 pixels in powers of two are tried, and the resolutions
        themselves, which give the most tokens.
        """
        if self.image_grid_pinpoints is None:
            return super().image_token_range()
        sides = [2**power for power in range(17)]
        sizes = [*self.image_grid_pinpoints, *((height, width) for height in sides for width in sides)]
        counts = [self.num_image_tokens(height, width) for height, width in sizes]
        return min(counts), max(counts)


__all__ = [
    "AnyresLayout",
    "MLPLlavaConfig",
    "anyres_layout",
    "best_resolution",
    "default_grid_pinpoints",
    "num_llava_tokens",
    "pooled_grid",
    "unpadded_span",
]
