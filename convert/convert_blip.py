"""BLIP's (2022) captioners and image-text matchers, from LAVIS or the original code to transformers' classes.

Source: `lavis/models/{vit,med}.py` and
`lavis/models/blip_models/{blip_caption,blip_image_text_matching,blip_retrieval}.py` of salesforce-lavis 1.0.2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipProcessor,
    PreTrainedModel,
)

from .convert_assembly import Conversion, assemble, compare_twins, expected_tensors
from .convert_files import TensorFiles, dimensions, layer_numbers
from .convert_lavis_names import BLIP_VISION_TABLE, KINDS, blip_bert_table
from .convert_runs import PILLOW_NOTE
from .convert_tables import ConversionError, Drop, Rename, Rule, Shapes, Twin, dropped, plan
from .convert_vision import for_grid


_HEAD = "text_decoder.cls.predictions"
CAPTION_TABLE: list[Rule] = [
    *BLIP_VISION_TABLE,
    *blip_bert_table("text_decoder.bert"),
    Rename(f"{_HEAD}.bias", f"{_HEAD}.bias"),
    *(
        Rename(f"{_HEAD}.transform.{name}.{kind}", f"{_HEAD}.transform.{name}.{kind}")
        for name in ("dense", "LayerNorm")
        for kind in KINDS
    ),
    Twin(f"{_HEAD}.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"),
    Twin(f"{_HEAD}.decoder.bias", f"{_HEAD}.bias"),
]
_MATCHING: list[Rule] = [
    *BLIP_VISION_TABLE,
    *blip_bert_table("text_encoder"),
    *(Rename(f"{name}.{kind}", f"{name}.{kind}") for name in ("vision_proj", "text_proj") for kind in KINDS),
]
MATCHING_TABLE: list[Rule] = [
    *_MATCHING,
    *(Rename(f"itm_head.{kind}", f"itm_head.{kind}") for kind in KINDS),
    # checkpoints for retrieval also hold what contrastive training needs
    *(
        Drop(rule.source.replace(".", "_m.", 1), "the momentum copy, used in training only")
        for rule in _MATCHING
        if isinstance(rule, (Rename, Drop))
    ),
    *(Drop(name, "used in training only") for name in ("temp", "image_queue", "text_queue", "idx_queue")),
    *(Drop(name, "used in training only") for name in ("queue_ptr", "ptr_queue")),
]
# heads by width, which shapes don't tell: ViT-B, ViT-L and BERT-base
HEADS = {768: 12, 1024: 16}


def infer_config(shapes: Shapes, overrides: Mapping | None = None) -> BlipConfig:
    """Infer the model's configuration from the shapes of a checkpoint.

    Args:
        shapes: The checkpoint's shapes.
        overrides: Fields of the configuration; `vision_config` and `text_config` are dicts of their own. Their
            `num_attention_heads` are needed for other widths than those of ViT-B, ViT-L and BERT-base.

    Raises:
        ConversionError: The checkpoint is neither a captioner nor a matcher, or its numbers of heads are not known.
    """
    overrides = dict(overrides or {})
    text = next(
        (
            prefix
            for prefix in ("text_decoder.bert", "text_encoder")
            if f"{prefix}.embeddings.word_embeddings.weight" in shapes
        ),
        None,
    )
    if text is None or "visual_encoder.patch_embed.proj.weight" not in shapes:
        raise ConversionError(
            "The checkpoint has no visual_encoder, or neither text_decoder (captioners) nor text_encoder (matchers): "
            "it is not one of BLIP's."
        )
    width, _, patch_size, _ = dimensions(shapes, "visual_encoder.patch_embed.proj.weight", 4)
    vocab_size, text_width = dimensions(shapes, f"{text}.embeddings.word_embeddings.weight", 2)
    block = f"{text}.encoder.layer.0"
    found = {
        "vision_config": {
            "hidden_size": width,
            "patch_size": patch_size,
            "image_size": round((dimensions(shapes, "visual_encoder.pos_embed", 3)[1] - 1) ** 0.5) * patch_size,
            "num_hidden_layers": len(layer_numbers(shapes, r"visual_encoder\.blocks\.(\d+)\.")),
            "intermediate_size": dimensions(shapes, "visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
            "layer_norm_eps": 1e-6,  # transformers' default is another
            "initializer_range": 0.02,
            **({"num_attention_heads": HEADS[width]} if width in HEADS else {}),
            **overrides.pop("vision_config", {}),
        },
        "text_config": {
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "encoder_hidden_size": dimensions(shapes, f"{block}.crossattention.self.key.weight", 2)[1],
            "intermediate_size": dimensions(shapes, f"{block}.intermediate.dense.weight", 2)[0],
            "num_hidden_layers": len(layer_numbers(shapes, text.replace(".", r"\.") + r"\.encoder\.layer\.(\d+)\.")),
            "max_position_embeddings": dimensions(shapes, f"{text}.embeddings.position_embeddings.weight", 2)[0],
            "label_smoothing": 0.1,
            **({"num_attention_heads": HEADS[text_width]} if text_width in HEADS else {}),
            **overrides.pop("text_config", {}),
        },
    }
    for part, fields in found.items():
        if "num_attention_heads" not in fields:
            raise ConversionError(
                f"Shapes don't tell how many attention heads a {part.removesuffix('_config')} model of width "
                f"{fields['hidden_size']} has: give it in --config, as "
                f'{{"{part}": {{"num_attention_heads": ...}}}}.'
            )
    if "vision_proj.weight" in shapes:
        found["image_text_hidden_size"] = dimensions(shapes, "vision_proj.weight", 2)[0]
    return BlipConfig(**{**found, **overrides})


def plan_conversion(checkpoint, config: BlipConfig) -> Conversion:
    """Find where every tensor of the converted model comes from; no tensor is read yet.

    Args:
        checkpoint: `TensorFiles` of BLIP's checkpoint.
        config: The converted model's configuration.

    Raises:
        ConversionError: A key is unknown, a tensor missing or left over, or a shape wrong.
    """
    matching = "text_encoder.embeddings.word_embeddings.weight" in checkpoint.shapes
    model_class: type[PreTrainedModel] = BlipForImageTextRetrieval if matching else BlipForConditionalGeneration
    with torch.device("meta"):
        model = model_class(config)
    table = MATCHING_TABLE if matching else CAPTION_TABLE
    found = plan(table, checkpoint.shapes)
    positions, expected = "vision_model.embeddings.position_embedding", expected_tensors(model)
    changes = {}
    if positions in found and found[positions].shape(checkpoint.shapes) != expected[positions]:
        changes[positions] = for_grid(config.vision_config.image_size // config.vision_config.patch_size)
    what = getattr(checkpoint, "path", "the checkpoint")
    conversion = assemble(config, model, expected, [(checkpoint, found, changes)], what)
    conversion.left_out = dropped(table, checkpoint.shapes)
    return conversion


def convert_blip(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer: str | os.PathLike = "google-bert/bert-base-uncased",
    config: Mapping | None = None,
    verify: bool = True,
) -> Conversion:
    """Convert a captioner or an image-text matcher of BLIP into a folder that transformers' own classes load.

    The official captioner begins its texts with "a picture of " and generates with `num_beams=3, min_length=10,
    max_length=30`; transformers' class takes such settings as arguments of `generate` only. For its matching head,
    the official matcher replaces the first token, `[CLS]`, by `[ENC]`; with transformers' class the caller has to do
    it.

    Args:
        checkpoint: A file of LAVIS or of the original code.
        output: Folder to write to.
        tokenizer: BERT's tokenizer: a folder or a Hub id.
        config: What shapes can't tell; see `infer_config`.
        verify: Whether to check what was written; see `certify`.

    Returns:
        The conversion.

    Raises:
        ConversionError: The checkpoint is not one of BLIP, or the tokenizer does not fit it; nothing is written.
    """
    files = TensorFiles(checkpoint)
    bert = BertTokenizer.from_pretrained(tokenizer)
    bert.add_special_tokens({"bos_token": "[DEC]"})
    bert.add_special_tokens({"extra_special_tokens": ["[ENC]"]})
    overrides = dict(config or {})
    overrides["text_config"] = {
        "bos_token_id": bert.bos_token_id,
        "eos_token_id": bert.sep_token_id,
        "sep_token_id": bert.sep_token_id,
        "pad_token_id": bert.pad_token_id,
        **overrides.get("text_config", {}),
    }
    model_config = infer_config(files.shapes, overrides)
    if len(bert) != model_config.text_config.vocab_size:
        raise ConversionError(
            f"The checkpoint knows {model_config.text_config.vocab_size} tokens, but the tokenizer in {tokenizer} has "
            f"{len(bert)}, [DEC] and [ENC] included."
        )
    conversion = plan_conversion(files, model_config)
    table = MATCHING_TABLE if isinstance(conversion.model, BlipForImageTextRetrieval) else CAPTION_TABLE
    compare_twins(files, table, conversion)
    side = model_config.vision_config.image_size
    # CLIP's mean and standard deviation and bicubic resampling are its defaults
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": side, "width": side}), bert)
    conversion.notes.append(PILLOW_NOTE)
    conversion.write(output, None, processor, verify)
    return conversion


__all__ = ["CAPTION_TABLE", "MATCHING_TABLE", "convert_blip", "infer_config", "plan_conversion"]
