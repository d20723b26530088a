"""The names of BLIP's, BLIP-2's and InstructBLIP's tensors in LAVIS, in transformers and in vlbridge.

Source: `lavis/models/eva_vit.py`, `lavis/models/med.py` and `lavis/models/blip2_models/*.py` of salesforce-lavis 1.0.2;
`models/blip`, `models/blip_2` and `models/instructblip` of transformers 5.
"""

from __future__ import annotations

from typing import NamedTuple

from .convert_tables import BUFFER, Drop, Rename, Reshape, Rule, Twin, ZeroKeyBias


KINDS = ("weight", "bias")
# what LAVIS' classes call their language model, and the types of model that it can be
LAVIS_LANGUAGE_MODELS = {"opt": ("opt",), "t5": ("t5",), "llm": ("llama",)}


class Names(NamedTuple):
    """The names of one layer, which has a weight and a bias; `None` if a layout has no such layer."""

    lavis: str
    transformers: str | None
    ours: str


# one block of the Q-Former: BERT's, with feed-forwards of their own for queries; BLIP's BERT has LAVIS' names
BLOCK = (
    *(
        Names(f"{theirs}.{lavis}", f"{theirs}.{transformers}", f"{ours}.{name}")
        for theirs, ours in (("attention", "attention"), ("crossattention", "cross_attention"))
        for lavis, transformers, name in (
            ("self.query", "attention.query", "query"),
            ("self.key", "attention.key", "key"),
            ("self.value", "attention.value", "value"),
            ("output.dense", "output.dense", "dense"),
            ("output.LayerNorm", "output.LayerNorm", "layer_norm"),
        )
    ),
    *(
        Names(name, name, ours)
        for name, ours in (
            ("intermediate_query.dense", "feed_forward_query.intermediate"),
            ("output_query.dense", "feed_forward_query.dense"),
            ("output_query.LayerNorm", "feed_forward_query.layer_norm"),
            ("intermediate.dense", "feed_forward_text.intermediate"),
            ("output.dense", "feed_forward_text.dense"),
            ("output.LayerNorm", "feed_forward_text.layer_norm"),
        )
    ),
)
# all layers of the bridge; transformers' names are those of Blip2ForConditionalGeneration and
# Blip2ForImageTextRetrieval
LAYERS = (
    Names("ln_vision", "vision_model.post_layernorm", "bridge.vision_layer_norm"),
    Names("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm", "bridge.qformer.layer_norm"),
    *(
        Names(
            f"Qformer.bert.encoder.layer.{{}}.{names.lavis}",
            f"qformer.encoder.layer.{{}}.{names.transformers}",
            f"bridge.qformer.layers.{{}}.{names.ours}",
        )
        for names in BLOCK
    ),
    *(Names(f"{name}_proj", "language_projection", "bridge.language_projection") for name in LAVIS_LANGUAGE_MODELS),
    # stage 1
    Names("vision_proj", "vision_projection", "bridge.vision_projection"),
    Names("text_proj", "text_projection", "bridge.text_projection"),
    Names("itm_head", "itm_head", "bridge.itm_head"),
    Names("Qformer.cls.predictions.transform.dense", None, "bridge.lm_head.transform_dense"),
    Names("Qformer.cls.predictions.transform.LayerNorm", None, "bridge.lm_head.transform_layer_norm"),
)
TEXT_EMBEDDINGS = ("word_embeddings", "position_embeddings")

# ---------------------------------------------------------------------- LAVIS -> vlbridge

BRIDGE_TABLE: list[Rule] = [
    Rename("query_tokens", "bridge.qformer.query_tokens"),
    Reshape("temp", "bridge.temperature", (), (1,)),  # FSDP shards no scalars
    Rename("Qformer.cls.predictions.bias", "bridge.lm_head.bias"),
    Twin("Qformer.cls.predictions.decoder.bias", "bridge.lm_head.bias"),
    Twin("Qformer.cls.predictions.decoder.weight", "bridge.qformer.word_embeddings.weight"),
    Drop("Qformer.bert.embeddings.position_ids", BUFFER),
    *(Rename(f"Qformer.bert.embeddings.{name}.weight", f"bridge.qformer.{name}.weight") for name in TEXT_EMBEDDINGS),
    *(Rename(f"{names.lavis}.{kind}", f"{names.ours}.{kind}") for names in LAYERS for kind in KINDS),
]

# ---------------------------------------------------------------------- transformers -> vlbridge


def transformers_bridge_table(instructed: bool) -> list[Rule]:
    """What the tensors of a bridge in transformers' classes become.

    Args:
        instructed: Whether the class is InstructBLIP's, which calls a few tensors otherwise.
    """
    prefix = "qformer.embeddings." if instructed else "embeddings."
    other = {"qformer.layernorm": "qformer.embeddings.layernorm"} if instructed else {}
    # LAVIS' three names of the projection to the language model are one here
    layers = dict.fromkeys((names.transformers, names.ours) for names in LAYERS if names.transformers is not None)
    return [
        Rename("query_tokens", "bridge.qformer.query_tokens"),
        Drop(f"{prefix}position_ids", BUFFER),
        *(Rename(f"{prefix}{name}.weight", f"bridge.qformer.{name}.weight") for name in TEXT_EMBEDDINGS),
        *(Rename(f"{other.get(a, a)}.{kind}", f"{b}.{kind}") for a, b in layers for kind in KINDS),
    ]


# ---------------------------------------------------------------------- LAVIS -> transformers

_VIT_BLOCK = ("blocks.{}", "vision_model.encoder.layers.{}")
_VIT_LAYERS = tuple(
    (f"{_VIT_BLOCK[0]}.{official}", f"{_VIT_BLOCK[1]}.{ours}")
    for official, ours in (
        ("attn.proj", "self_attn.projection"),
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    )
)
# the part that BLIP's ViT and BLIP-2's EVA ViT-g have in common, as transformers' Blip2VisionModel calls it
VIT_TABLE: list[Rule] = [
    Rename("cls_token", "vision_model.embeddings.class_embedding"),
    Rename("pos_embed", "vision_model.embeddings.position_embedding"),
    Rename(f"{_VIT_BLOCK[0]}.attn.qkv.weight", f"{_VIT_BLOCK[1]}.self_attn.qkv.weight"),
    *(
        Rename(f"{official}.{kind}", f"{ours}.{kind}")
        for official, ours in (("patch_embed.proj", "vision_model.embeddings.patch_embedding"), *_VIT_LAYERS)
        for kind in KINDS
    ),
]
EVA_TABLE: list[Rule] = [
    *VIT_TABLE,
    ZeroKeyBias(
        (f"{_VIT_BLOCK[0]}.attn.q_bias", f"{_VIT_BLOCK[0]}.attn.v_bias"), f"{_VIT_BLOCK[1]}.self_attn.qkv.bias"
    ),
    *(
        Drop(f"{name}.{kind}", "the official encoder ends before it")
        for name in ("norm", "fc_norm", "head")
        for kind in KINDS
    ),
    Drop("mask_token", "used in pretraining only"),
]
# BLIP's ViT has one bias for query, key and value, and a norm at its end
BLIP_VISION_TABLE: list[Rule] = [
    *(rule.renamed(source=lambda name: f"visual_encoder.{name}") for rule in VIT_TABLE),
    Rename(f"visual_encoder.{_VIT_BLOCK[0]}.attn.qkv.bias", f"{_VIT_BLOCK[1]}.self_attn.qkv.bias"),
    *(Rename(f"visual_encoder.norm.{kind}", f"vision_model.post_layernorm.{kind}") for kind in KINDS),
]


def blip_bert_table(prefix: str) -> list[Rule]:
    """What BLIP's BERT becomes: it keeps its names in transformers.

    Args:
        prefix: What the names begin with: `text_encoder` or `text_decoder.bert`.
    """
    names = [
        *(f"embeddings.{name}.weight" for name in TEXT_EMBEDDINGS),
        *(f"embeddings.LayerNorm.{kind}" for kind in KINDS),
        *(
            f"encoder.layer.{{}}.{names.lavis}.{kind}"
            for names in BLOCK
            if "_query" not in names.lavis
            for kind in KINDS
        ),
    ]
    return [
        Drop(f"{prefix}.embeddings.position_ids", BUFFER),
        *(Rename(f"{prefix}.{name}", f"{prefix}.{name}") for name in names),
    ]


__all__ = [
    "BLIP_VISION_TABLE",
    "BRIDGE_TABLE",
    "EVA_TABLE",
    "KINDS",
    "LAVIS_LANGUAGE_MODELS",
    "blip_bert_table",
    "transformers_bridge_table",
]
