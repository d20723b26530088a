"""Frozen parts: built from a configuration, loaded from where they lie, or taken as they are passed in."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2VisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ..compat import build_from_config, is_deepspeed_zero3_enabled
from ..extensions import where_to_load
from ..files import retried
from .modeling_mpt import MosaicGPTForCausalLM, MptForCausalLM, as_conditionable
from .modeling_pins import HUB_KEYWORDS, FrozenPartError, commit_of, find_frozen_part, summary


logger = logging.get_logger(__name__)

# transformers has BLIP-2's ViT, but no Auto class lists it; of MPT it has another, and MPT-1B not at all
OF_THEIR_OWN = {"vision_model": (Blip2VisionModel,), "language_model": (MptForCausalLM, MosaicGPTForCausalLM)}
# of these, what holds for the frozen parts' repositories too
PART_KEYWORDS = ("cache_dir", "local_files_only", "token", "proxies")
# fields of configurations that must be the same for a part to have the same shape
SHAPE_FIELDS = ("architecture", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                "intermediate_size", "image_size", "patch_size", "num_channels")  # fmt: skip

Part = str | os.PathLike | PreTrainedConfig | PreTrainedModel


def auto_class_for(part: str, config: PreTrainedConfig):
    """The Auto class that loads a frozen part, or the class itself where Auto classes don't give the right one."""
    # by name: code that travels with a model may be loaded in several copies, each with classes of its own
    known = {cls.config_class.model_type: cls for cls in OF_THEIR_OWN[part]}
    if config.model_type in known:
        return known[config.model_type]
    if part == "vision_model":
        return AutoModel
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def build_part(part: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A frozen part with random weights."""
    built_by = auto_class_for(part, config)
    return (
        build_from_config(built_by, config) if issubclass(built_by, PreTrainedModel) else built_by.from_config(config)
    )


def refuse_zero3() -> None:
    """Refuse to load parts where transformers would spread each one while it is loaded: a bridge begins as what its parts
    hold, and would find empty tensors.

    Raises:
        RuntimeError: There are `TrainingArguments` with DeepSpeed's ZeRO-3.
    """
    if is_deepspeed_zero3_enabled():
        raise RuntimeError(
            "There are TrainingArguments with DeepSpeed's ZeRO-3 already, so that parts would be loaded empty, spread over "
            "the processes. Compose or load the model before they are made; the Trainer spreads it."
        )


def load_frozen_part(
    part: str, pin: dict, config: PreTrainedConfig, trained: Iterable[str] = (), allow_mismatch: bool = False, **kwargs
) -> PreTrainedModel:
    """Load a frozen part from where its pin says, and make sure that it is the right one.

    Args:
        part: As for `find_frozen_part`.
        pin: Likewise.
        config: The part's configuration.
        trained: Names of the part's tensors that are replaced afterwards: they may be missing, or have another shape.
        allow_mismatch: As for `find_frozen_part`. Tensors that are missing or have another shape are still refused.
        kwargs: For the part's `from_pretrained` (`dtype`, `quantization_config`, `token`, ...).

    Raises:
        FrozenPartError: The part can't be had, or its weights are not those that were pinned.
        RuntimeError: See `refuse_zero3`.
    """
    refuse_zero3()
    place, hub_kwargs = find_frozen_part(
        part, pin, allow_mismatch, **{name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    )
    if kwargs.get("local_files_only"):  # or transformers before 5.18 asks the Hub whether the part is an adapter
        kwargs["adapter_kwargs"] = {"local_files_only": True}
    model, info = retried(
        auto_class_for(part, config).from_pretrained,
        place, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **{**kwargs, **hub_kwargs},
    )  # fmt: skip
    problems = [
        f"{name} has shape {list(found)}, expected {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
        if name not in trained
    ]
    if allow_mismatch:  # else the weights are those that were pinned, and lack what they lacked then
        # patch features don't go through poolers
        problems += [f"missing {name}" for name in sorted(info["missing_keys"]) if "pooler" not in name]
    if problems:
        raise FrozenPartError(f"The {part} in {place!r} does not have the shape that is pinned: {summary(problems)}.")
    return model


def check_part(part: str, model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Refuse a loaded part that does not have the architecture and shape that a bridge was trained with.

    Args:
        part: `"vision_model"` or `"language_model"`.
        model: The loaded part.
        config: What the bridge's configuration says about it.

    Raises:
        FrozenPartError: It has another.
    """
    if model.config.model_type != config.model_type:
        raise FrozenPartError(
            f"The {part} passed in is a {model.config.model_type}; this bridge was trained with a {config.model_type}."
        )
    wrong = []
    for name in SHAPE_FIELDS:
        found, wanted = (getattr(each, name, None) for each in (model.config, config))
        if None not in (found, wanted) and json.dumps(found) != json.dumps(wanted):  # a tuple is a list, once saved
            wrong.append(f"{name} is {found}, expected {wanted}")
    if wrong:
        raise FrozenPartError(
            f"The {part} passed in does not have the shape that this bridge was trained with: {'; '.join(wrong)}."
        )
    sizes = [getattr(each, "vocab_size", None) for each in (model.config, config)]
    if sizes[0] != sizes[1]:
        logger.warning(
            f"The {part} passed in has a vocabulary of {sizes[0]}; this bridge was trained with one of {sizes[1]}."
        )


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision tower's configuration, where a model with two towers (CLIP, SigLIP) was named."""
    return getattr(config, "vision_config", None) or config


def resolve_part(part: str, given: Part, dtype, **hub_kwargs) -> tuple[PreTrainedModel, str | None, dict]:
    """Load or build one part.

    Returns:
        The model, where its tokenizer or image processor may be found, and where it came from.
    """
    refuse_zero3()
    if isinstance(given, PreTrainedModel):
        if part == "vision_model" and getattr(given.config, "vision_config", None) is not None:
            given = given.vision_model  # CLIP and SigLIP with both towers
        if part == "language_model":
            given = as_conditionable(given)
        name = given.name_or_path or None
        # its weights may have changed since: they are compared with the source's before a bridge is saved alone
        return given, name, {"source": name, "revision": commit_of(name) if name else None, "unverified": True}
    if isinstance(given, PreTrainedConfig):
        config = vision_config_of(given) if part == "vision_model" else given
        model = build_part(part, copy.deepcopy(config))
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model, None, {"source": None, "revision": None}
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(
            f"{part.removesuffix('_model')} is a {type(given).__name__}; expected a Hub id, a folder, a configuration or a "
            "loaded model."
        )
    source = os.fspath(given)
    place = source if hub_kwargs.get("revision") else where_to_load(source)
    config = AutoConfig.from_pretrained(place, **hub_kwargs)
    if part == "vision_model":
        config = vision_config_of(config)
    if place != source:
        logger.warning_once(
            f"{source} is not in the Hub's cache: {place} stands in for it, whose weights can differ from the Hub's. A bridge "
            "that is saved alone is pinned to the copy that was used."
        )
    model = auto_class_for(part, config).from_pretrained(place, config=config, dtype=dtype, **hub_kwargs)
    revision = commit_of(place, **hub_kwargs) if place == source else None
    return model, place, {"source": os.path.abspath(source) if os.path.isdir(source) else source, "revision": revision}


__all__ = ["Part", "auto_class_for", "build_part", "check_part", "load_frozen_part", "refuse_zero3", "resolve_part"]
