"""MLP-LLaVA: every patch feature becomes a visual token through a linear layer or a small MLP.

Source: LLaVA (arXiv 2304.08485, section 4.1), LLaVA-1.5 (arXiv 2310.03744, section 3.2), LLaVA-NeXT; `llava/model/
multimodal_projector/builder.py` and `llava/model/llava_arch.py` of the official code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

from ..compat import initialization as init
from ..configuration.configuration_bridged import patch_grid
from ..configuration.configuration_llava import AnyresLayout, MLPLlavaConfig, anyres_layout
from .modeling_bridge import Bridge, patch_features_of, with_image_arguments
from .modeling_bridged import BridgedModel
from .modeling_class_head import (
    ClassHead,
    begin_as_classifier,
    class_tokens,
    class_words,
    complete_for_classifier,
    load_classifier,
    read_class_head,
)


def pool_patches(patch_features: torch.Tensor, rows: int, columns: int, pooling: str, factor: int) -> torch.Tensor:
    """Reduce `factor` x `factor` neighbouring features to one.

    Args:
        patch_features: `(num_images, rows * columns, channels)`.
        rows: Rows of patches.
        columns: Columns of patches.
        pooling: `"average"`, or `"pixel_shuffle"`, which concatenates their channels row by row.
        factor: Side of the neighbourhood, in patches; it may be incomplete at the lower and right border.

    Returns:
        `(num_images, ceil(rows / factor) * ceil(columns / factor), channels)`; with pixel shuffle the channels are
        `channels * factor**2`.
    """
    grid = patch_features.unflatten(1, (rows, columns)).movedim(-1, 1)  # (num_images, channels, rows, columns)
    if pooling == "average":
        grid = nn.functional.avg_pool2d(grid, factor, ceil_mode=True, count_include_pad=False)
        return grid.flatten(2).transpose(1, 2)
    grid = nn.functional.pad(grid, (0, -columns % factor, 0, -rows % factor))
    grid = grid.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # (..., rows, factor, columns, factor)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class MLPBridge(Bridge):
    """`linear_1`, GELU, `linear_2`, ... as deep as `projector_type` says, and `image_newline` if lines end with one."""

    def __init__(self, config: MLPLlavaConfig, language_model: PreTrainedModel):
        super().__init__(config, language_model)
        self.config = config
        self.depth = config.projector_depth
        if self.depth == 0 and config.vision_feature_size != self.text_dim:
            raise ValueError(
                f"projector_type='identity' needs features of the language model's width, {self.text_dim}, but the "
                f"vision encoder's have {config.vision_feature_size}. Use 'linear'."
            )
        widths = [config.projector_hidden_size or self.text_dim] * (self.depth - 1)
        widths = [config.vision_feature_size * (2 if config.global_context else 1), *widths, self.text_dim]
        for index, (width_in, width_out) in enumerate(zip(widths[: self.depth], widths[1:]), start=1):
            self.add_module(f"linear_{index}", nn.Linear(width_in, width_out, bias=config.projector_bias))
        self.image_newline = nn.Parameter(torch.empty(self.text_dim)) if config.has_image_newline else None

    def init_parameters(self, config: MLPLlavaConfig) -> None:
        """Initialise `image_newline`, if there is one."""
        if self.image_newline is not None:
            init.normal_(self.image_newline, mean=0.0, std=self.text_dim**-0.5)  # as in the official code

    def project(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Map `(..., num_patches, vision_dim)` to `(..., num_patches, text_dim)`."""
        hidden = patch_features
        if self.config.projector_norm_eps is not None:
            hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=self.config.projector_norm_eps)
        if self.config.global_context:
            hidden = torch.cat([hidden, hidden.mean(dim=-2, keepdim=True).expand_as(hidden)], dim=-1)
        for index in range(1, self.depth + 1):
            hidden = getattr(self, f"linear_{index}")(hidden if index == 1 else nn.functional.gelu(hidden))
        return hidden

    def forward(
        self, patch_features: torch.Tensor, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Turn patch features into visual tokens.

        Args:
            patch_features: `(num_images, num_patches, vision_dim)`; if images are cut into tiles, `(num_tiles,
                num_patches, vision_dim)`, with the base image and then the tiles, row by row, of every image.
            image_sizes: `(num_images, 2)`, height and width of the original images in pixels; only if images are cut
                into tiles.

        Returns:
            `(num_images, num_patches, text_dim)`; if images are cut into tiles, a list with `(num_image_tokens,
            text_dim)` for every image.

        Raises:
            ValueError: `image_sizes` is missing, or does not match the number of tiles.
        """
        image_features = self.project(patch_features)
        if self.config.image_grid_pinpoints is None:
            return image_features
        if image_sizes is None:
            raise ValueError("Images at any resolution need image_sizes, (num_images, 2): the processor gives them.")
        layouts = [anyres_layout(self.config, *size) for size in torch.as_tensor(image_sizes).tolist()]
        counts = [layout.num_tiles for layout in layouts]
        if sum(counts) != len(image_features):
            raise ValueError(
                f"image_sizes asks for {counts} tiles, {sum(counts)} together, but there are {len(image_features)}. "
                "Use the processor that belongs to this model."
            )
        return [self._merge(tiles, layout) for tiles, layout in zip(image_features.split(counts), layouts)]

    def _merge(self, tiles: torch.Tensor, layout: AnyresLayout) -> torch.Tensor:
        """Merge base image and tiles, `(num_tiles, num_patches, text_dim)`, to `(num_image_tokens, text_dim)`."""
        if self.config.patch_merge_type == "flat":
            return tiles.flatten(0, 1)
        picture = tiles[1:].unflatten(1, layout.grid).unflatten(0, layout.tiles)
        picture = picture.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows, columns, text_dim) of all tiles
        picture = picture[layout.rows, layout.columns]
        if self.image_newline is not None:
            line_ends = self.image_newline.to(picture.dtype).expand(picture.shape[0], 1, -1)
            picture = torch.cat([picture, line_ends], dim=1)
        return torch.cat([tiles[0], picture.flatten(0, 1)])


class PooledPatchesMixin:
    """Pools neighbouring patch features, or keeps the CLS feature, if the configuration's `pooling` is set."""

    def _patch_features_of(self, vision_outputs: ModelOutput, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.config.pooling == "cls":
            return patch_features_of(vision_outputs, self.config.vision_feature_layer)[:, :1]
        patch_features = super()._patch_features_of(vision_outputs, pixel_values)
        if self.config.pooling is None:
            return patch_features
        rows, columns = patch_grid(self.config, *pixel_values.shape[-2:])
        return pool_patches(patch_features, rows, columns, self.config.pooling, self.config.pooling_factor)


class MLPLlavaForConditionalGeneration(PooledPatchesMixin, BridgedModel):
    """MLP-LLaVA: visual tokens replace the placeholders in the prompt. For the arguments see `BridgedModel`."""

    config_class = MLPLlavaConfig
    config: MLPLlavaConfig
    bridge_class = MLPBridge
    image_arguments = (*BridgedModel.image_arguments, "image_sizes")
    forward = with_image_arguments(BridgedModel.forward, image_arguments)
    compose_options = (
        "projector_init_from", "class_names", "class_threshold", "class_name_scale", "free_units",
    )  # fmt: skip

    @classmethod
    def prepare_init(
        cls,
        config: MLPLlavaConfig,
        vision_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        projector_init_from: str | os.PathLike | PreTrainedModel | None = None,
        class_names: Sequence[str] | Mapping[int | str, str] | str | None = None,
        free_units: int = 0,
        class_threshold: float | None = None,
        class_name_scale: float | None = None,
        **hub_kwargs,
    ) -> dict:
        """Read a classifier, and make room for its classes in the configuration.

        Args:
            config: The new model's configuration.
            vision_model: Its encoder.
            tokenizer: The language model's tokenizer.
            projector_init_from: The image classifier that the encoder belongs to: Hub id, folder or loaded model.
            class_names: Words for the classes, see `class_words`.
            free_units: Hidden units beside those of the classes.
            class_threshold: See `begin_as_classifier`.
            class_name_scale: See `begin_as_classifier`.
            hub_kwargs: `token` and other arguments of `from_pretrained`; `revision` if the classifier has the encoder's
                name.

        Returns:
            Arguments of `init_bridge`.

        Raises:
            ValueError: `projector_init_from` is missing, or the classifier does not fit; the message says why.
        """
        if projector_init_from is None:
            raise ValueError(
                "class_names, class_threshold, class_name_scale and free_units go with projector_init_from, the image "
                "classifier that the bridge begins as; it is missing."
            )
        if projector_init_from != config.frozen_parts["vision_model"]["source"]:
            hub_kwargs.pop("revision", None)  # it is the parts'
        classifier = load_classifier(projector_init_from, dtype=vision_model.dtype, **hub_kwargs)
        head = read_class_head(classifier, vision_model, config)
        complete_for_classifier(config, head, free_units)
        given = {"threshold": class_threshold, "scale": class_name_scale}
        return {
            "head": head,
            "tokens": class_tokens(tokenizer, class_words(head.names, class_names)),
            **{name: value for name, value in given.items() if value is not None},
        }

    def init_bridge(self, head: ClassHead, tokens: list[list[int]], **options) -> None:
        """Begin as a classifier that names what it sees.

        Args:
            head: The classifier's last layer.
            tokens: Token ids of each class's name.
            options: `threshold` and `scale`, see `begin_as_classifier`.

        Raises:
            ValueError: The sizes do not fit.
        """
        begin_as_classifier(self.bridge, self.get_input_embeddings(), head, tokens, **options)


__all__ = ["MLPBridge", "MLPLlavaForConditionalGeneration", "PooledPatchesMixin", "pool_patches"]
