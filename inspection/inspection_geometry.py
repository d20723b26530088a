"""Where visual tokens and patches lie on a picture: the image processor's resizing, cropping and padding, backwards.

What an image processor does to positions is measured: it processes a picture whose colours are the positions. So any
image processor is read backwards, also one that crops, pads or cuts into tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..configuration.configuration_bridged import BridgedConfig, patch_grid
from ..configuration.configuration_llava import anyres_layout, pooled_grid


Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class Grid:
    """Places of visual tokens or patches on a picture.

    Args:
        box: Left, top, right and bottom of the whole grid, in pixels of the picture; it may reach beyond the picture,
            where the image processor pads it, or leave out its borders, where it crops it.
        tokens: `(rows, columns)`: number of the token in each cell.
    """

    box: Box
    tokens: torch.Tensor

    def cell(self, row: int, column: int) -> Box:
        """Left, top, right and bottom of one cell, in pixels of the picture."""
        left, top, right, bottom = self.box
        rows, columns = self.tokens.shape
        width, height = (right - left) / columns, (bottom - top) / rows
        return left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height


# ---------------------------------------------------------------------- what the encoder sees


def _processed(processor, picture: np.ndarray) -> torch.Tensor:
    """The encoder's input, `(1 or tiles, channels, height, width)`, for a picture `(height, width, 3)` of 0 to 255."""
    image = Image.fromarray(picture.astype(np.uint8))
    return processor(images=[image], text=processor.image_token, return_tensors="pt")["pixel_values"].float()


def _joined(pixels: torch.Tensor, tiles: tuple[int, int]) -> torch.Tensor:
    """Tiles, `(rows * columns, channels, height, width)`, as one picture."""
    rows, columns = tiles
    return pixels.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def _span(positions: torch.Tensor, shown: torch.Tensor, length: int) -> tuple[float, float]:
    """First and last position that an axis shows, in pixels of the picture.

    Args:
        positions: `(pixels,)`: position from 0 to 1 that each pixel shows.
        shown: `(pixels,)`: false for padding.
        length: Length of the axis in the picture, in pixels.

    Raises:
        ValueError: The axis shows too little of the picture.
    """
    # Near its borders a resized picture is no longer a straight line.
    margin = min(2.5 / max(length - 1, 1), 0.3)
    inside = shown & (positions > margin) & (positions < 1 - margin)
    if int(inside.sum()) < 2:
        raise ValueError(
            f"Of {length} pixels the image processor keeps too few to find out where they go; give a larger picture."
        )
    place = torch.arange(len(positions), dtype=torch.float64)[inside] + 0.5
    source = positions.double()[inside] * (length - 1) + 0.5
    slope = ((place - place.mean()) * (source - source.mean())).sum() / ((place - place.mean()) ** 2).sum()
    start = source.mean() - slope * place.mean()
    return float(start), float(start + slope * len(positions))


def _box(across: torch.Tensor, black: torch.Tensor, white: torch.Tensor, size: tuple[int, int]) -> Box:
    """The part of the picture that a processed image shows; all are `(channels, height, width)`."""
    extent = white - black
    shown = extent > 0.5 * extent.amax()
    position = (across - black) / torch.where(shown, extent, 1)
    spans = []
    for channel, axis in ((0, 0), (1, 1)):  # red runs from left to right, green from top to bottom
        here = shown[channel]
        count = here.sum(dim=axis)
        mean = (position[channel] * here).sum(dim=axis) / count.clamp(min=1)
        spans.append(_span(mean, count > 0.5 * count.amax(), size[channel]))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def views(processor, size: tuple[int, int], tiles: tuple[int, int] | None = None) -> list[tuple[Box, tuple[int, int]]]:
    """Which part of a picture the vision encoder sees.

    Args:
        processor: The model's processor.
        size: Width and height of the picture, in pixels.
        tiles: Rows and columns of tiles that it is cut into, if it is.

    Returns:
        Left, top, right and bottom in pixels of the picture, and height and width in pixels of the encoder's input: of
        the image; with tiles of the base image and of all tiles together.

    Raises:
        ValueError: The picture is too small for it.
    """
    width, height = size
    picture = np.zeros((height, width, 3))
    picture[..., 0] = np.linspace(0, 255, width).round()[None]
    picture[..., 1] = np.linspace(0, 255, height).round()[:, None]
    processed = [_processed(processor, image) for image in (picture, 0 * picture, 0 * picture + 255)]
    parts = [[pixels[0] for pixels in processed]]
    if tiles is not None:
        parts.append([_joined(pixels[1:], tiles) for pixels in processed])
    return [(_box(*part, size), tuple(part[0].shape[-2:])) for part in parts]


# ---------------------------------------------------------------------- tokens


def _grid(view: tuple[Box, tuple[int, int]], covered: tuple[int, int], tokens: torch.Tensor) -> Grid:
    """A grid that covers `(height, width)` pixels of the encoder's input, from its upper left corner."""
    (left, top, right, bottom), (height, width) = view
    across, down = (right - left) / width, (bottom - top) / height
    return Grid((left, top, left + across * covered[1], top + down * covered[0]), tokens)


def _numbers(rows: int, columns: int, first: int) -> torch.Tensor:
    return torch.arange(rows * columns).unflatten(0, (rows, columns)) + first


def patch_grids(config: BridgedConfig, processor, size: tuple[int, int]) -> list[Grid]:
    """Where the patch features of a picture lie: the keys of a Q-Former or resampler.

    Args:
        config: The model's configuration.
        processor: Its processor.
        size: Width and height of the picture, in pixels.

    Returns:
        One grid.
    """
    (view,) = views(processor, size)
    rows, columns = patch_grid(config, *view[1])
    prefix = config.num_prefix_tokens if config.vision_feature_select_strategy == "full" else 0
    covered = rows * config.patch_size, columns * config.patch_size
    return [_grid(view, covered, _numbers(rows, columns, prefix))]


def token_grids(config: BridgedConfig, processor, size: tuple[int, int]) -> list[Grid]:
    """Where the visual tokens of MLP-LLaVA lie on a picture; for other families, where the patches lie.

    Args:
        config: The model's configuration.
        processor: Its processor.
        size: Width and height of the picture, in pixels.

    Returns:
        A grid; for an image at any resolution one of the base image and one of the tiles, or one per tile
        (`patch_merge_type="flat"`).
    """
    if not hasattr(config, "pooling_factor"):
        return patch_grids(config, processor, size)
    side = config.patch_size * config.pooling_factor
    prefix = config.num_prefix_tokens if config.vision_feature_select_strategy == "full" else 0
    if config.image_grid_pinpoints is None:
        (view,) = views(processor, size)
        rows, columns = pooled_grid(config, *view[1])
        if config.pooling == "cls":  # one token of the whole picture
            return [_grid(view, view[1], _numbers(rows, columns, 0))]
        return [_grid(view, (rows * side, columns * side), _numbers(rows, columns, prefix))]
    layout = anyres_layout(config, size[1], size[0])
    base, joint = views(processor, size, layout.tiles)
    rows, columns = layout.grid
    grids = [Grid(base[0], _numbers(rows, columns, prefix))]
    (left, top, right, bottom), tiles = joint[0], layout.tiles
    down, across = (bottom - top) / (rows * tiles[0]), (right - left) / (columns * tiles[1])
    first = prefix + rows * columns
    if config.patch_merge_type == "flat":
        for number in range(tiles[0] * tiles[1]):
            y, x = divmod(number, tiles[1])
            corner = left + x * columns * across, top + y * rows * down
            box = (*corner, corner[0] + columns * across, corner[1] + rows * down)
            grids.append(Grid(box, _numbers(rows, columns, first + number * first + prefix)))
        return grids
    kept_rows, kept_columns = (part.stop - part.start for part in (layout.rows, layout.columns))
    line_end = int(config.has_image_newline)
    tokens = _numbers(kept_rows, kept_columns + line_end, first)[:, :kept_columns]
    box = (
        left + layout.columns.start * across, top + layout.rows.start * down,
        left + layout.columns.stop * across, top + layout.rows.stop * down,
    )  # fmt: skip
    return [*grids, Grid(box, tokens)] if tokens.numel() else grids


# ---------------------------------------------------------------------- on the picture


def heat(weights: torch.Tensor, grids: list[Grid], size: tuple[int, int], smooth: bool = False) -> torch.Tensor:
    """Spread the weights of tokens over the pixels of a picture.

    Args:
        weights: `(tokens,)`.
        grids: Where they lie.
        size: Width and height of the picture, in pixels.
        smooth: Whether to interpolate between the cells' centres, for drawing; else every cell is even.

    Returns:
        `(height, width)`, weight per pixel: the sum is that of the weights, apart from what lies beyond the picture and
        from tokens without a place.
    """
    width, height = size
    total = torch.zeros(height, width)
    for grid in grids:
        left, top, right, bottom = grid.box
        rows, columns = grid.tokens.shape
        area = (right - left) * (bottom - top) / (rows * columns)
        cells = weights.detach().float().cpu()[grid.tokens] / area
        x, y = (
            (torch.arange(count) + 0.5 - start) / (end - start) * 2 - 1
            for count, start, end in ((width, left, right), (height, top, bottom))
        )
        place = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)[None]
        mode = "bilinear" if smooth else "nearest"
        spread = nn.functional.grid_sample(cells[None, None], place, mode, padding_mode="border", align_corners=False)
        total += spread[0, 0] * (place.abs().amax(dim=-1)[0] <= 1)
    return total


def seen(grids: list[Grid], size: tuple[int, int]) -> torch.Tensor:
    """Which pixels of a picture lie on a grid, `(height, width)`; the others are cropped away."""
    return heat(torch.ones(1 + max(int(grid.tokens.max()) for grid in grids)), grids, size) > 0


def share_on(weights: torch.Tensor, grids: list[Grid], mask: torch.Tensor) -> tuple[float, float]:
    """How much weight lies on a part of a picture, such as an object.

    Args:
        weights: `(tokens,)`.
        grids: Where they lie.
        mask: `(height, width)`, true on that part.

    Returns:
        Its share of the weight, and its share of the area that the encoder sees.
    """
    size = mask.shape[1], mask.shape[0]
    spread, visible = heat(weights, grids, size), seen(grids, size)
    return float((spread * mask).sum() / spread.sum()), float((visible & mask).sum() / visible.sum())


__all__ = ["Box", "Grid", "heat", "patch_grids", "seen", "share_on", "token_grids", "views"]
