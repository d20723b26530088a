"""OpenFlamingo's checkpoints: the released 3B, 4B and 9B, the first 9B, and what its training code writes.

They hold what was trained: Perceiver Resampler, gated cross-attention and, unless they were frozen, the language
model's embedding tables. CLIP and the language model come from elsewhere.

Source: `open_flamingo/src/{factory,flamingo,flamingo_lm,helpers}.py` and `train/train_utils.py` of open-flamingo 2.0.1.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, GenerationConfig, PreTrainedConfig

from ..compat import optional_file
from ..configuration.configuration_flamingo import PerceiverFlamingoConfig
from ..modeling.modeling_bridge import fill_vision_geometry
from ..modeling.modeling_flamingo import PerceiverFlamingoForConditionalGeneration
from ..processing.processing_flamingo import PerceiverFlamingoProcessor
from .convert_assembly import Conversion, assemble, expected_tensors
from .convert_files import ShapeTable, TensorFiles, dimensions, layer_numbers
from .convert_language import language_table, load_language_tokenizer, read_text_config
from .convert_sources import Renamed, resized
from .convert_tables import ConversionError, Rename, Rule, Shapes, dropped, plan
from .convert_vision import read_vision_config, vision_pieces


# where each language model kept its decoder layers in the transformers of the official code
DECODER_LAYERS = {
    "gpt_neox": "gpt_neox.layers",
    "llama": "model.layers",
    "mosaic_gpt": "transformer.blocks",
    "mpt": "transformer.blocks",
    "opt": "model.decoder.layers",
}
FEED_FORWARD = (
    ("0.weight", "layer_norm.weight"),
    ("0.bias", "layer_norm.bias"),
    ("1.weight", "linear_in.weight"),
    ("3.weight", "linear_out.weight"),
)
ATTENTION = (("to_q.weight", "query.weight"), ("to_kv.weight", "key_value.weight"), ("to_out.weight", "out.weight"))
RESAMPLER_TABLE: list[Rule] = [
    Rename("perceiver.latents", "bridge.resampler.latents"),
    Rename("perceiver.frame_embs", "bridge.resampler.frame_embeddings"),
    Rename("perceiver.media_time_embs", "bridge.resampler.media_time_embeddings"),
    Rename("perceiver.norm.weight", "bridge.resampler.layer_norm.weight"),
    Rename("perceiver.norm.bias", "bridge.resampler.layer_norm.bias"),
    *(
        Rename(f"perceiver.layers.{{}}.0.{norm}.{kind}", f"bridge.resampler.layers.{{}}.attention.{norm}.{kind}")
        for norm in ("norm_media", "norm_latents")
        for kind in ("weight", "bias")
    ),
    *(
        Rename(f"perceiver.layers.{{}}.0.{official}", f"bridge.resampler.layers.{{}}.attention.{ours}")
        for official, ours in ATTENTION
    ),
    *(
        Rename(f"perceiver.layers.{{}}.1.{official}", f"bridge.resampler.layers.{{}}.feed_forward.{ours}")
        for official, ours in FEED_FORWARD
    ),
]
# names in one cross-attention block
BLOCK = (
    ("attn_gate", "attn_gate.weight"),
    ("ff_gate", "ff_gate.weight"),
    ("attn.norm.weight", "layer_norm.weight"),
    ("attn.norm.bias", "layer_norm.bias"),
    *((f"attn.{official}", ours) for official, ours in ATTENTION),
    *((f"ff.{official}", f"feed_forward.{ours}") for official, ours in FEED_FORWARD),
)


def _layers_of(config: PreTrainedConfig) -> str:
    try:
        return DECODER_LAYERS[config.model_type]
    except KeyError:
        raise ConversionError(
            f"OpenFlamingo's checkpoints come with {', '.join(sorted(DECODER_LAYERS))}; the language model is a "
            f"{config.model_type}."
        ) from None


def checkpoint_table(config: PerceiverFlamingoConfig, tensors: Iterable[str]) -> list[Rule]:
    """The conversion table of an OpenFlamingo checkpoint.

    Args:
        config: The converted model's configuration.
        tensors: Names of the converted model's tensors.
    """
    layers, every = _layers_of(config.text_config), config.cross_attention_every_n_layers
    table = list(RESAMPLER_TABLE)
    for number in range(config.text_config.num_hidden_layers // every):
        block = f"lang_encoder.{layers}.{every * (number + 1) - 1}.gated_cross_attn_layer"
        table += [
            Rename(f"{block}.{official}", f"bridge.cross_attention_layers.{number}.{ours}") for official, ours in BLOCK
        ]
    inside = re.compile(re.escape(layers) + r"\.(\d+|\{\})\.")

    # the official code wraps decoder layers: their tensors are in layers.N.decoder_layer
    def wrapped(name: str) -> str:
        return inside.sub(lambda match: f"{match.group()}decoder_layer.", name)

    language = language_table(config.text_config, tensors, source="lang_encoder.")
    return table + [rule.renamed(source=wrapped) for rule in language]


def usual_names(keys: Iterable[str], layers: str) -> dict[str, str]:
    """Map a checkpoint's keys to the names of open-flamingo 2.0.1.

    Distributed training adds `module.` at the beginning. The first release has separate lists of the cross-attention
    blocks and of the plain decoder layers. If a tensor is there under both names, the usual one is kept.

    Args:
        keys: The keys.
        layers: Name of the language model's list of decoder layers.
    """
    keys = list(keys)
    names = {}
    for key in keys:
        name = key.removeprefix("module.")
        name = re.sub(
            r"^lang_encoder\.gated_cross_attn_layers\.(\d+)\.",
            rf"lang_encoder.{layers}.\1.gated_cross_attn_layer.",
            name,
        )
        name = re.sub(r"^lang_encoder\.old_decoder_blocks\.(\d+)\.", rf"lang_encoder.{layers}.\1.decoder_layer.", name)
        names[key] = name
    usual = {name for key, name in names.items() if key.removeprefix("module.") == name}
    return {key: name for key, name in names.items() if key.removeprefix("module.") == name or name not in usual}


def infer_config(
    shapes: Shapes,
    vision_config: PreTrainedConfig,
    text_config: PreTrainedConfig,
    cross_attn_every_n_layers: int | None = None,
    **overrides,
) -> PerceiverFlamingoConfig:
    """Infer the converted model's configuration from the shapes of a checkpoint.

    Args:
        shapes: The checkpoint's shapes, by their usual names; see `usual_names`.
        vision_config: The vision encoder's configuration.
        text_config: The language model's configuration, with the vocabulary of the checkpoint.
        cross_attn_every_n_layers: The value that the checkpoint was trained with; `None` infers it.
        overrides: Fields of the configuration that shapes can't tell: `resampler_head_dim`, `cross_attention_head_dim`
            (64 in all of OpenFlamingo) and `only_attend_immediate_media`.

    Raises:
        ConversionError: The checkpoint is not one of OpenFlamingo, or belongs to another language model.
    """
    layers = _layers_of(text_config)
    if "perceiver.latents" not in shapes:
        raise ConversionError("There is no perceiver.latents in the checkpoint: it is not one of OpenFlamingo's.")
    conditioned = layer_numbers(shapes, rf"lang_encoder\.{re.escape(layers)}\.(\d+)\.gated_cross_attn_layer\.")
    if not conditioned:
        others = [
            name for name in DECODER_LAYERS if any(f"lang_encoder.{DECODER_LAYERS[name]}." in key for key in shapes)
        ]
        raise ConversionError(
            f"There is no cross-attention for the layers of a {text_config.model_type} in the checkpoint"
            + (f"; it looks like one for {' or '.join(others)}." if others else ".")
        )
    every, num_layers = conditioned[0] + 1, text_config.num_hidden_layers
    if conditioned != list(range(every - 1, num_layers, every)) or cross_attn_every_n_layers not in (None, every):
        every = cross_attn_every_n_layers or every
        raise ConversionError(
            f"The checkpoint has cross-attention before layers {conditioned}; cross_attn_every_n_layers={every} and a "
            f"language model of {num_layers} layers want it before {list(range(every - 1, num_layers, every))}."
        )
    num_latents, vision_dim = dimensions(shapes, "perceiver.latents", 2)
    block = f"lang_encoder.{layers}.{conditioned[0]}.gated_cross_attn_layer"
    resampler_inner = dimensions(shapes, "perceiver.layers.0.0.to_q.weight", 2)[0]
    cross_inner = dimensions(shapes, f"{block}.attn.to_q.weight", 2)[0]
    frames, times = "perceiver.frame_embs", "perceiver.media_time_embs"
    found = {
        "num_latents": num_latents,
        "resampler_depth": len(layer_numbers(shapes, r"perceiver\.layers\.(\d+)\.")),
        "resampler_head_dim": 64,
        "cross_attention_head_dim": 64,
        "cross_attention_every_n_layers": every,
        "feed_forward_multiplier": dimensions(shapes, "perceiver.layers.0.1.1.weight", 2)[0] // vision_dim,
        "max_num_frames": dimensions(shapes, frames, 2)[0] if frames in shapes else None,
        "max_num_media": dimensions(shapes, times, 3)[0] if times in shapes else None,
        **overrides,
    }
    found.setdefault("resampler_num_heads", resampler_inner // found["resampler_head_dim"])
    found.setdefault("cross_attention_num_heads", cross_inner // found["cross_attention_head_dim"])
    return PerceiverFlamingoConfig(vision_config=vision_config, text_config=text_config, **found)


def resized_text_config(text_config: PreTrainedConfig, shapes: Shapes, num_tokens: int) -> PreTrainedConfig:
    """The language model's configuration after the official code has resized its tables to the tokenizer.

    Args:
        text_config: The language model's configuration; it is changed in place.
        shapes: The checkpoint's shapes, by their usual names.
        num_tokens: Number of tokens in the tokenizer, special ones included.

    Raises:
        ConversionError: The checkpoint's tables have another number of rows.
    """
    tables = {
        name: dimensions(shapes, name, 2)[0]
        for name in shapes
        if re.fullmatch(r"lang_encoder\..*(embed_in|embed_out|embed_tokens|wte|lm_head)\.weight", name)
    }
    for name, rows in tables.items():
        if rows != num_tokens:
            raise ConversionError(
                f"{name} has {rows} rows, but the tokenizer has {num_tokens} tokens, the special ones included. Give "
                "the tokenizer that the checkpoint was trained with."
            )
    text_config.vocab_size = num_tokens
    return text_config


def plan_conversion(checkpoint, vision, language, config: PerceiverFlamingoConfig) -> Conversion:
    """Find where every tensor of the converted model comes from; no tensor is read yet.

    Args:
        checkpoint: `TensorFiles` of OpenFlamingo's checkpoint.
        vision: `TensorFiles` of the vision encoder, in open_clip's layout or transformers'.
        language: `TensorFiles` of the language model.
        config: The converted model's configuration.

    Raises:
        ConversionError: A key is unknown, a tensor missing or left over, or a shape wrong.
    """
    fill_vision_geometry(config)
    with torch.device("meta"):
        model = PerceiverFlamingoForConditionalGeneration(config)
    expected = expected_tensors(model)
    trained = Renamed(checkpoint, usual_names(checkpoint.shapes, _layers_of(config.text_config)))
    rows = resized(config.text_config.vocab_size)
    tables = {
        name: rows
        for name in expected
        if re.fullmatch(r"language_model\..*(embed_in|embed_tokens|wte|lm_head)\.weight", name)
    }
    table = checkpoint_table(config, expected)
    base = plan(language_table(config.text_config, expected), language.shapes)
    sources = [  # trained tensors come first: they are used instead of the originals
        (trained, plan(table, trained.shapes), {}),
        (vision, vision_pieces(vision, [name for name in expected if name.startswith("vision_model.")]), {}),
        (language, base, tables),
    ]
    conversion = assemble(config, model, expected, sources, getattr(checkpoint, "path", "the checkpoint"))
    conversion.left_out = dropped(table, trained.shapes)
    return conversion


def load_tokenizer(source: str | os.PathLike):
    """Load the language model's tokenizer, and add OpenFlamingo's tokens in their order.

    They are `<|endofchunk|>`, `<image>` and, if the tokenizer's files name no padding token, `<PAD>`.

    Args:
        source: Folder or Hub id.
    """
    tokenizer = load_language_tokenizer(source)
    declared = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = optional_file(source, name)
        declared.update(json.loads(Path(path).read_text()) if path is not None else {})
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|endofchunk|>", "<image>"]})
    # read from the files: since transformers 5 some classes have a default
    if declared.get("pad_token") is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


def convert_openflamingo(
    checkpoint: str | os.PathLike,
    vision: str | os.PathLike,
    language: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    cross_attn_every_n_layers: int | None = None,
    config: Mapping | None = None,
    verify: bool = True,
) -> Conversion:
    """Convert a checkpoint of OpenFlamingo into a folder that `AutoModel.from_pretrained` loads.

    Args:
        checkpoint: `checkpoint.pt` as released, or as written during training.
        vision: CLIP: a file in open_clip's layout, or a folder or Hub id in transformers'.
        language: The language model: a folder or a Hub id.
        output: Folder to write to.
        tokenizer: Folder or Hub id of the language model's tokenizer, if it does not lie beside it.
        cross_attn_every_n_layers: The value that the checkpoint was trained with; it is checked against the checkpoint.
        config: Fields of `PerceiverFlamingoConfig` that shapes can't tell; `vision_config` is a dict of its own.
        verify: Whether to check what was written; see `certify`.

    Returns:
        The conversion.

    Raises:
        ConversionError: The parts don't fit together; nothing is written.
    """
    overrides = dict(config or {})
    vision_overrides = overrides.pop("vision_config", {})
    checkpoint, vision_files, language_files = TensorFiles(checkpoint), TensorFiles(vision), TensorFiles(language)
    language_config = read_text_config(language)
    trained = usual_names(checkpoint.shapes, _layers_of(language_config))
    shapes = ShapeTable(checkpoint.path, {name: checkpoint.shapes[key] for key, name in trained.items()})

    tokenizer = load_tokenizer(tokenizer or language)
    language_config = resized_text_config(language_config, shapes, len(tokenizer))
    model_config = infer_config(
        shapes,
        read_vision_config(vision_files, vision, vision_overrides),
        language_config,
        cross_attn_every_n_layers,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **overrides,
    )
    conversion = plan_conversion(checkpoint, vision_files, language_files, model_config)

    side = model_config.image_size
    # open_clip's transforms; CLIP's mean, standard deviation and bicubic resampling are defaults
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_backend="pil",
        crop_rounding="even",
    )
    processor = PerceiverFlamingoProcessor.from_config(model_config, image_processor, tokenizer)
    end_of_chunk = tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    generation = GenerationConfig(
        bos_token_id=language_config.bos_token_id,
        eos_token_id=end_of_chunk,
        pad_token_id=tokenizer.pad_token_id,
    )
    conversion.write(output, generation, processor, verify)
    return conversion


__all__ = ["checkpoint_table", "convert_openflamingo", "infer_config", "plan_conversion"]
