"""BLIP-2's and InstructBLIP's checkpoints, as LAVIS writes them: stage 1 (no language model), 2 and 3.

They hold what was trained: query tokens, Q-Former, projections, the layer norm on the patch features, and the ViT if it
was trained too (`caption_coco_*`). The frozen ViT and the language model come from elsewhere.

Source: `lavis/models/blip2_models/*.py`, `eva_vit.py`, `clip_vit.py` and `runners/runner_base.py` of salesforce-lavis
1.0.2 and of its main branch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

import torch
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration.configuration_bridged import BridgedConfig
from ..configuration.configuration_qformer import QFormerBlip2Config, QFormerBlip2PreTrainingConfig, QFormerConfig
from ..modeling.modeling_bridge import fill_vision_geometry
from .convert_assembly import Conversion, assemble, compare_twins, expected_tensors
from .convert_blip2_transformers import convert_port, is_port
from .convert_files import TensorFiles, dimensions, layer_numbers
from .convert_language import language_table, load_language_tokenizer, read_text_config
from .convert_lavis_names import BRIDGE_TABLE, LAVIS_LANGUAGE_MODELS
from .convert_qformer import build_processor, load_qformer_tokenizer, model_class
from .convert_sources import Constants, Merged, Renamed, resized
from .convert_tables import ConversionError, Rename, Rule, Shapes, Twin, dropped, plan
from .convert_vision import LAVIS_ENCODERS, for_grid, read_vision_config, vision_layout, vision_pieces


# BERT-base has 12 heads; shapes don't tell
QFORMER_HEADS = {768: 12}


def language_of(keys: Iterable[str]) -> str | None:
    """LAVIS' name of the language model that a checkpoint belongs to; `None` for stage 1.

    Raises:
        ConversionError: It is not a checkpoint of BLIP-2.
    """
    keys = set(keys)
    if not {"query_tokens", "ln_vision.weight"} <= keys:
        raise ConversionError("There is no query_tokens or no ln_vision in the checkpoint: it is not one of BLIP-2's.")
    found = [name for name in LAVIS_LANGUAGE_MODELS if f"{name}_proj.weight" in keys]
    if not found and "itm_head.weight" not in keys:
        raise ConversionError(
            "The checkpoint has neither a projection to a language model (opt_proj, t5_proj, llm_proj) nor stage 1's "
            "heads (itm_head): it is not a checkpoint of BLIP-2 that is known here."
        )
    return found[0] if found else None


def checkpoint_table(model: PreTrainedModel, language: str | None, tied: Mapping[str, str]) -> list[Rule]:
    """The conversion table of a checkpoint without its ViT.

    Args:
        model: The converted model; only its names are read.
        language: See `language_of`.
        tied: From second names of tensors of the converted model to the first.
    """
    if language is None:
        return list(BRIDGE_TABLE)
    official = f"{language}_model."
    # checkpoints leave frozen language models out, but hold second names of the tensors that were trained
    second = [Twin(official + name.removeprefix("language_model."), of) for name, of in tied.items()]
    names = [name for name in model.state_dict() if name not in tied]
    table = language_table(model.config.text_config, names, source=official)
    known = {rule.source for rule in second}
    return [*BRIDGE_TABLE, *second, *(rule for rule in table if rule.source not in known)]


def infer_qformer_config(shapes: Shapes, **overrides) -> QFormerConfig:
    """Infer the Q-Former's configuration from the shapes of a checkpoint.

    Args:
        shapes: The checkpoint's shapes.
        overrides: Fields that shapes can't tell: `num_attention_heads` (12 at BERT-base's width).

    Raises:
        ConversionError: The number of heads is not known, or cross-attention is not where a Q-Former has it.
    """
    _, num_query_tokens, width = dimensions(shapes, "query_tokens", 3)
    block = r"Qformer\.bert\.encoder\.layer\.(\d+)\."
    layers, crossed = layer_numbers(shapes, block), layer_numbers(shapes, block + "crossattention")
    every = crossed[1] - crossed[0] if len(crossed) > 1 else overrides.get("cross_attention_frequency", 2)
    if not layers or crossed != list(range(0, len(layers), every)):
        raise ConversionError(
            f"The Q-Former has {len(layers)} blocks, and cross-attention in {crossed}; expected it in "
            f"blocks {list(range(0, len(layers), every))}."
        )
    if "num_attention_heads" not in overrides and width not in QFORMER_HEADS:
        raise ConversionError(
            f"Shapes don't tell how many attention heads a Q-Former of width {width} has: give it in --config, as "
            '{"qformer_config": {"num_attention_heads": ...}}.'
        )
    found = {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": QFORMER_HEADS.get(width),
        "intermediate_size": dimensions(shapes, "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight", 2)[0],
        "cross_attention_frequency": every,
        "num_query_tokens": num_query_tokens,
        "use_text": "Qformer.bert.embeddings.word_embeddings.weight" in shapes,
    }
    if found["use_text"]:
        found["vocab_size"] = dimensions(shapes, "Qformer.bert.embeddings.word_embeddings.weight", 2)[0]
        positions = dimensions(shapes, "Qformer.bert.embeddings.position_embeddings.weight", 2)
        found["max_position_embeddings"] = positions[0]
    return QFormerConfig(**{**found, **overrides})


def usual_vision(files, inside=None):
    """A vision encoder's tensors under their usual names: LAVIS leaves out open_clip's `visual.`.

    Args:
        files: The encoder's own checkpoint, or `None`.
        inside: The part of LAVIS' checkpoint that is the encoder, or `None`; its tensors are used first.
    """
    found = []
    for source in (inside, files):
        if source is None:
            continue
        if {"class_embedding", "conv1.weight"} <= source.shapes.keys():
            source = Renamed(source, {key: f"visual.{key}" for key in source.shapes})
        found.append(source)
    if len(found) == 2 and vision_layout(found[0].shapes) != vision_layout(found[1].shapes):
        found.pop()  # the trained encoder is complete
    return Merged(*found) if len(found) == 2 else found[0]


def infer_config(
    shapes: Shapes,
    vision_config: PreTrainedConfig,
    text_config: PreTrainedConfig | None,
    qformer_config: Mapping | None = None,
    **fields,
) -> BridgedConfig:
    """Infer the converted model's configuration.

    Args:
        shapes: The checkpoint's shapes.
        vision_config: The vision encoder's configuration.
        text_config: The language model's configuration; `None` for stage 1.
        qformer_config: Fields that shapes can't tell; see `infer_qformer_config`.
        fields: Further fields of `QFormerBlip2Config`, or for stage 1 of `QFormerBlip2PreTrainingConfig`.

    Raises:
        ConversionError: The checkpoint is not one of BLIP-2, or belongs to another language model.
    """
    language = language_of(shapes)
    # the official encoders end without a norm, transformers' ones with one; CLIP's touches the pooled output only
    fields.setdefault("vision_feature_layer", None if vision_config.model_type == "clip_vision_model" else -1)
    fields["vision_config"] = vision_config
    fields["qformer_config"] = infer_qformer_config(shapes, **(qformer_config or {}))
    if language is None:
        if text_config is not None:
            raise ConversionError("The checkpoint is one of stage 1, which has no language model: leave it out.")
        fields.setdefault("bos_token_id", fields["qformer_config"].vocab_size - 1)  # [DEC], the last of BERT's tokens
        return QFormerBlip2PreTrainingConfig(embed_dim=dimensions(shapes, "vision_proj.weight", 2)[0], **fields)
    if text_config is None:
        raise ConversionError(f"The checkpoint has {language}_proj: it needs its language model.")
    if text_config.model_type not in LAVIS_LANGUAGE_MODELS[language]:
        raise ConversionError(
            f"The checkpoint has {language}_proj, for a language model of type "
            f"{' or '.join(LAVIS_LANGUAGE_MODELS[language])}; this one is a {text_config.model_type}."
        )
    if language == "t5":
        text_config.dense_act_fn = "gelu"  # LAVIS replaces FlanT5's gelu_new
    return QFormerBlip2Config(text_config=text_config, **fields)


def plan_conversion(checkpoint, vision, language, config: BridgedConfig) -> Conversion:
    """Find where every tensor of the converted model comes from; no tensor is read yet.

    Args:
        checkpoint: `TensorFiles` of LAVIS' checkpoint.
        vision: `TensorFiles` of the vision encoder; `None` if the checkpoint holds it.
        language: `TensorFiles` of the language model; `None` for stage 1.
        config: The converted model's configuration.

    Raises:
        ConversionError: A key is unknown, a tensor missing or left over, or a shape wrong.
    """
    fill_vision_geometry(config)
    with torch.device("meta"):
        model = model_class(config)(config)
    tied = dict(model.all_tied_weights_keys)
    if language is not None and not getattr(config.text_config, "scale_decoder_outputs", True):
        # FlanT5 has a separate head. transformers' T5Config ignores the checkpoint's tie_word_embeddings, keeps it as
        # scale_decoder_outputs, and ties the weights; from_pretrained unties those that differ.
        if "lm_head.weight" in language.shapes:
            tied.pop("language_model.lm_head.weight", None)
    expected = expected_tensors(model, model.all_tied_weights_keys.keys() - tied)
    of_vision = [name for name in expected if name.startswith("vision_model.")]
    side = config.image_size // config.patch_size
    sources = []

    # the bridge
    table = checkpoint_table(model, language_of(checkpoint.shapes), tied)
    rest = [key for key in checkpoint.shapes if not key.startswith("visual_encoder.")]
    rows = {}
    if config.text_config is not None:
        rows = {
            name: resized(config.text_config.vocab_size)
            for name in expected
            if re.fullmatch(r"language_model\..*(embed_tokens|shared|lm_head)\.weight", name)
        }
    sources.append((checkpoint, plan(table, rest), rows))
    # the vision encoder
    inside = {key: key.removeprefix("visual_encoder.") for key in checkpoint.shapes if key not in set(rest)}
    if vision is None and not inside:
        raise ConversionError("The checkpoint has no visual_encoder.*: give the vision encoder's own file.")
    vision = usual_vision(vision, Renamed(checkpoint, inside) if inside else None)
    positions = {
        name: for_grid(side) for name in of_vision if re.search(r"embeddings\.position_embedding(\.weight)?$", name)
    }
    found = vision_pieces(vision, of_vision, config.vision_config.num_hidden_layers)
    changes = {
        name: change
        for name, change in positions.items()
        if name in found and found[name].shape(vision.shapes) != expected[name]
    }
    sources.append((vision, found, changes))
    # the norm after the encoder, which the official one does not have: its output is not read
    ends = [name for name in of_vision if name.startswith("vision_model.post_layernorm.")]
    values = {
        name: (expected[name], next(iter(vision.dtypes.values())), float(name.endswith("weight"))) for name in ends
    }
    constants = Constants(values)
    sources.append((constants, plan([Rename(name, name) for name in values], values), {}))
    # the language model
    if language is not None:
        base = language_table(config.text_config, expected, tied)
        sources.append((language, plan(base, language.shapes), rows))
    conversion = assemble(config, model, expected, sources, getattr(checkpoint, "path", "the checkpoint"))
    conversion.left_out = dropped(table, rest)
    return conversion


def load_tokenizer(source: str | os.PathLike, language: str) -> PreTrainedTokenizerBase:
    """Load the language model's tokenizer, with LAVIS' special tokens for Vicuna.

    Args:
        source: Folder or Hub id.
        language: See `language_of`.
    """
    tokenizer = load_language_tokenizer(source)
    if language == "llm":
        tokenizer.add_special_tokens(
            {"pad_token": "[PAD]", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
        )
    return tokenizer


def generation_config(
    language: str, instructed: bool, tokenizer: PreTrainedTokenizerBase, text_config
) -> GenerationConfig:
    """The official generation defaults.

    Args:
        language: See `language_of`.
        instructed: Whether the checkpoint is one of InstructBLIP.
        tokenizer: The language model's tokenizer.
        text_config: The language model's configuration.
    """
    ends = tokenizer.encode("\n", add_special_tokens=False) if language == "opt" else [tokenizer.eos_token_id]
    return GenerationConfig(
        num_beams=5,
        max_new_tokens=256 if instructed else 30,
        repetition_penalty=1.5 if instructed else 1.0,
        bos_token_id=getattr(text_config, "bos_token_id", None),
        eos_token_id=ends[-1],  # OPT was taught to end with a new line
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=getattr(text_config, "decoder_start_token_id", None),
    )


def convert_blip2(
    checkpoint: str | os.PathLike,
    vision: str | os.PathLike | None = None,
    language: str | os.PathLike | None = None,
    *,
    output: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    qformer_tokenizer: str | os.PathLike = "google-bert/bert-base-uncased",
    config: Mapping | None = None,
    verify: bool = True,
) -> Conversion:
    """Convert a checkpoint of BLIP-2 or InstructBLIP into a folder that `from_pretrained` loads.

    Args:
        checkpoint: LAVIS' file; or a folder or Hub id of transformers' own classes, which needs no other parts.
        vision: EVA ViT-g as LAVIS uses it (`eva_vit_g.pth`), CLIP ViT-L as LAVIS or open_clip save it, or a folder or
            Hub id in transformers' layout; `None` if the checkpoint holds the encoder. Those tensors are used in any
            case.
        language: The language model: a folder or a Hub id; `None` for stage 1.
        output: Folder to write to.
        tokenizer: Folder or Hub id of the language model's tokenizer, if it does not lie beside it.
        qformer_tokenizer: Folder or Hub id of BERT's tokenizer, for a Q-Former that reads text.
        config: Fields of the model's configuration that shapes can't tell; `vision_config` and `qformer_config` are
            dicts of their own.
        verify: Whether to check what was written; see `certify`.

    Returns:
        The conversion.

    Raises:
        ConversionError: The parts don't fit together; nothing is written.
    """
    if is_port(checkpoint):
        return convert_port(checkpoint, output, config, verify)
    overrides = dict(config or {})
    vision_overrides = dict(overrides.pop("vision_config", {}))
    files = TensorFiles(checkpoint)
    vision_files = None if vision is None else TensorFiles(vision)
    language_files = None if language is None else TensorFiles(language)
    prefix = language_of(files.shapes)
    inside = {key: key.removeprefix("visual_encoder.") for key in files.shapes if key.startswith("visual_encoder.")}
    if not inside and vision is None:
        raise ConversionError("The checkpoint has no visual_encoder.*: give the vision encoder's own file.")
    encoder = usual_vision(vision_files, Renamed(files, inside) if inside else None)
    vision_config = lavis_depth(
        read_vision_config(encoder, None if inside else vision, vision_overrides), vision_overrides
    )

    text_config = language_tokenizer = None
    if prefix is not None and language is not None:
        text_config = read_text_config(language)
        language_tokenizer = load_tokenizer(tokenizer or language, prefix)
        if prefix == "llm":
            text_config.vocab_size = len(language_tokenizer)  # [PAD] has a row, which is in no official file
        language_tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
        overrides["image_token_id"] = language_tokenizer.convert_tokens_to_ids("<image>")
    elif language is not None:
        text_config = read_text_config(language)
    bert = None
    words = "Qformer.bert.embeddings.word_embeddings.weight"
    if words in files.shapes:
        bert = load_qformer_tokenizer(qformer_tokenizer, dimensions(files.shapes, words, 2)[0], prefix is not None)
    if prefix is None and bert is not None:
        overrides = {"eos_token_id": bert.sep_token_id, "pad_token_id": bert.pad_token_id, **overrides}
    model_config = infer_config(files.shapes, vision_config, text_config, **overrides)
    conversion = plan_conversion(files, vision_files, language_files, model_config)
    tied = {name: of for name, of in conversion.model.all_tied_weights_keys.items() if name not in conversion.pieces}
    compare_twins(files, checkpoint_table(conversion.model, prefix, tied), conversion)

    side = model_config.image_size
    # LAVIS resizes with Pillow, and crops nothing
    image_processor = CLIPImageProcessor(
        size={"height": side, "width": side}, do_center_crop=False, image_backend="pil"
    )
    generation = None
    if prefix is not None:
        generation = generation_config(prefix, bert is not None, language_tokenizer, text_config)
    processor = build_processor(model_config, prefix, image_processor, language_tokenizer, bert)
    conversion.write(output, generation, processor, verify)
    return conversion


def lavis_depth(config: PreTrainedConfig, overrides: Mapping) -> PreTrainedConfig:
    """Leave out the last block of the encoder, which is in its files, but which LAVIS does not use."""
    kind = "clip" if config.model_type == "clip_vision_model" else "eva"
    known = LAVIS_ENCODERS.get((kind, config.hidden_size), {})
    if "num_hidden_layers" not in overrides and known:
        config.num_hidden_layers = min(config.num_hidden_layers, known["num_hidden_layers"])
    return config


__all__ = [
    "checkpoint_table",
    "convert_blip2",
    "infer_config",
    "infer_qformer_config",
    "language_of",
    "plan_conversion",
]
