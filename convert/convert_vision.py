"""Vision encoders: open_clip's and OpenAI's CLIP, LAVIS' EVA ViT-g and CLIP ViT-L, and any in transformers' layout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from transformers import AutoConfig, Blip2VisionConfig, CLIPVisionConfig, PreTrainedConfig

from .convert_files import dimensions, layer_numbers
from .convert_lavis_names import EVA_TABLE
from .convert_sources import Change
from .convert_tables import ConversionError, Drop, Piece, Rename, Rule, Shapes, Split, plan


_UNKNOWN_HEADS = (
    "Shapes don't tell how many attention heads a vision encoder of width {} has: give it in --config, as "
    '{{"vision_config": {{"num_attention_heads": ...}}}}.'
)
# from open_clip's names of the vision tower to those of transformers' CLIPVisionModel
_CLIP_LAYER = ("visual.transformer.resblocks.{}", "vision_model.encoder.layers.{}")
OPEN_CLIP_TABLE: list[Rule] = [
    Rename("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    Rename("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Rename("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    Drop("visual.proj", "the projection into CLIP's space shared with text is not used"),
    *(
        Rename(f"visual.{official}.{kind}", f"vision_model.{ours}.{kind}")
        for official, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"))
        for kind in ("weight", "bias")
    ),
    *(
        Split(
            f"{_CLIP_LAYER[0]}.attn.in_proj_{kind}",
            tuple(f"{_CLIP_LAYER[1]}.self_attn.{name}_proj.{kind}" for name in "qkv"),
        )
        for kind in ("weight", "bias")
    ),
    *(
        Rename(f"{_CLIP_LAYER[0]}.{official}.{kind}", f"{_CLIP_LAYER[1]}.{ours}.{kind}")
        for official, ours in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        )
        for kind in ("weight", "bias")
    ),
]
# keys of the text tower
CLIP_TEXT = re.compile(r"(transformer|token_embedding|ln_final|text|text_model)\..*|positional_embedding|logit_scale|"
                       r"logit_bias|(text|visual)_projection(\.weight)?|.*\.?position_ids")  # fmt: skip
# what shapes can't tell about LAVIS' encoders, by layout and width; the last block in their files is not used
LAVIS_ENCODERS: dict[tuple[str, int], dict] = {
    ("eva", 1408): {"num_hidden_layers": 39, "num_attention_heads": 16},
    ("clip", 1024): {"num_hidden_layers": 23, "num_attention_heads": 16},
}


def vision_layout(keys: Iterable[str]) -> str:
    """The layout that keys belong to: `"clip"` (open_clip and OpenAI), `"eva"` (LAVIS) or `"transformers"`."""
    keys = set(keys)
    if "visual.conv1.weight" in keys:
        return "clip"
    return "eva" if {"cls_token", "patch_embed.proj.weight"} <= keys else "transformers"


def open_clip_config(shapes: Shapes, **overrides) -> CLIPVisionConfig:
    """Infer the configuration of open_clip's vision tower.

    Args:
        shapes: Shapes of its tensors.
        overrides: Fields that shapes can't tell: `num_attention_heads` (64 channels each in CLIP) and `hidden_act`
            (OpenAI's models have `"quick_gelu"`, the default).

    Raises:
        ConversionError: There is no vision transformer in the checkpoint.
    """
    if "visual.conv1.weight" not in shapes or "visual.class_embedding" not in shapes:
        raise ConversionError(
            "There is no vision transformer of open_clip in the vision checkpoint (visual.conv1.weight)."
        )
    width, channels, patch_size, _ = dimensions(shapes, "visual.conv1.weight", 4)
    patches = dimensions(shapes, "visual.positional_embedding", 2)[0] - 1
    if "num_attention_heads" not in overrides and width % 64:
        raise ConversionError(_UNKNOWN_HEADS.format(width))
    found = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": round(patches**0.5) * patch_size,
        "num_hidden_layers": len(layer_numbers(shapes, r"visual\.transformer\.resblocks\.(\d+)\.")),
        "num_attention_heads": width // 64,
        "intermediate_size": dimensions(shapes, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    return CLIPVisionConfig(**{**found, **overrides})


def eva_config(shapes: Shapes, **overrides) -> Blip2VisionConfig:
    """Infer the configuration of LAVIS' EVA ViT-g.

    Args:
        shapes: Shapes of its tensors.
        overrides: Fields that shapes can't tell: `num_attention_heads`.

    Raises:
        ConversionError: The number of attention heads is not known for an encoder of this width.
    """
    width, _, patch_size, _ = dimensions(shapes, "patch_embed.proj.weight", 4)
    known = LAVIS_ENCODERS.get(("eva", width), {})
    if "num_attention_heads" not in {**known, **overrides}:
        raise ConversionError(_UNKNOWN_HEADS.format(width))
    found = {
        "hidden_size": width,
        "patch_size": patch_size,
        "image_size": round((dimensions(shapes, "pos_embed", 3)[1] - 1) ** 0.5) * patch_size,
        "num_hidden_layers": len(layer_numbers(shapes, r"blocks\.(\d+)\.")),
        "intermediate_size": dimensions(shapes, "blocks.0.mlp.fc1.weight", 2)[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "initializer_range": 0.02,
    }
    return Blip2VisionConfig(**{**found, **known, **overrides})


def read_vision_config(files, vision: str | os.PathLike | None, overrides: Mapping) -> PreTrainedConfig:
    """A vision encoder's configuration, from the shapes of its tensors or from its folder.

    Args:
        files: Its tensors.
        vision: Where they lie: a file, a folder or a Hub id.
        overrides: Fields of the configuration that shapes can't tell.

    Raises:
        ConversionError: The layout is not known, or the number of attention heads is not.
    """
    layout = vision_layout(files.shapes)
    if layout == "eva":
        return eva_config(files.shapes, **overrides)
    if layout == "clip" or vision is None or os.path.isfile(vision):
        return open_clip_config(files.shapes, **overrides)
    config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", None) or config
    if config.model_type == "instructblip_vision_model":  # BLIP-2's, under another name
        fields = config.to_dict()
        config = Blip2VisionConfig(
            **{name: fields[name] for name in Blip2VisionConfig.__dataclass_fields__ if name in fields}
        )
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def vision_pieces(files, expected: Iterable[str], num_layers: int | None = None) -> dict[str, Piece]:
    """Find where the tensors of the vision encoder come from.

    Args:
        files: The encoder's tensors.
        expected: Names of the converted model's tensors that begin with `vision_model.`.
        num_layers: Number of layers to take; `None` takes all.

    Returns:
        From target names to their pieces.

    Raises:
        ConversionError: A key is unknown.
    """
    keys = [key for key in files.shapes if not CLIP_TEXT.fullmatch(key)]
    if num_layers is not None:
        surplus = re.compile(r"(?:.*\.)?(?:blocks|resblocks|layers)\.(\d+)\..*")
        keys = [key for key in keys if not ((match := surplus.fullmatch(key)) and int(match.group(1)) >= num_layers)]
    layout = vision_layout(keys)
    if layout != "transformers":
        return plan(OPEN_CLIP_TABLE if layout == "clip" else EVA_TABLE, keys)
    # of a whole vision-language model, only the vision encoder is taken
    if any(key.startswith(("language_model.", "qformer.")) for key in keys):
        keys = [key for key in keys if key.startswith("vision_model.")]
    # until transformers 5 the names of CLIP's vision tower began with `vision_model.`
    table: list[Rule] = []
    for target in expected:
        name = target.removeprefix("vision_model.")
        table.append(Rename(name if name in files.shapes else f"vision_model.{name}", target))
    return plan(table, keys)


def interpolated(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Interpolate position embeddings to another grid of patches.

    Args:
        positions: `(..., 1 + patches, channels)`, that of CLS first.
        side: Patches per row and column of the new grid.

    Returns:
        `(..., 1 + side * side, channels)`.
    """
    table = positions.reshape(-1, positions.shape[-1]).float()
    old = round((table.shape[0] - 1) ** 0.5)
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    table = torch.cat([table[:1], grid.flatten(2)[0].T])  # (1 + side * side, channels)
    return table.reshape(*positions.shape[:-2], *table.shape).to(positions.dtype)


def for_grid(side: int) -> Change:
    """The change that fits position embeddings to a grid of `side` x `side` patches."""
    return Change(partial(interpolated, side=side), lambda shape: (*shape[:-2], 1 + side * side, shape[-1]))


__all__ = [
    "LAVIS_ENCODERS",
    "OPEN_CLIP_TABLE",
    "eva_config",
    "for_grid",
    "interpolated",
    "open_clip_config",
    "read_vision_config",
    "vision_layout",
    "vision_pieces",
]
