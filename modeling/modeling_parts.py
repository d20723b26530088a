"""Frozen parts: built from a configuration, loaded from the Hub or a folder, or passed in as loaded models."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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

# Classes that no Auto class returns: BLIP-2's ViT is not registered, and MPT and MPT-1B are implemented here
_CLASSES_WITHOUT_AUTO = {
    "vision_model": (Blip2VisionModel,),
    "language_model": (MptForCausalLM, MosaicGPTForCausalLM),
}
# Arguments of `from_pretrained` that apply to the frozen parts' repositories too
PART_KEYWORDS = ("cache_dir", "local_files_only", "token", "proxies")
# Configuration fields that determine the shape of a part
SHAPE_FIELDS = (
    "architecture",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "image_size",
    "patch_size",
    "num_channels",
)

Part = str | os.PathLike | PreTrainedConfig | PreTrainedModel


def auto_class_for(part: str, config: PreTrainedConfig) -> type:
    """The Auto class that loads a frozen part, or the model's class if no Auto class returns it."""
    # Compared by name: code saved along with models may be loaded in several copies with different classes.
    known = {cls.config_class.model_type: cls for cls in _CLASSES_WITHOUT_AUTO[part]}
    if config.model_type in known:
        return known[config.model_type]
    if part == "vision_model":
        return AutoModel
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def build_part(part: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Build a frozen part with random weights."""
    built_by = auto_class_for(part, config)
    return (
        build_from_config(built_by, config) if issubclass(built_by, PreTrainedModel) else built_by.from_config(config)
    )


def refuse_zero3() -> None:
    """Refuse to load parts while DeepSpeed's ZeRO-3 is enabled.

    transformers would shard each part while loading it, and the bridge, which reads its parts, would find empty
    tensors.

    Raises:
        RuntimeError: `TrainingArguments` with DeepSpeed's ZeRO-3 have been created.
    """
    if is_deepspeed_zero3_enabled():
        raise RuntimeError(
            "TrainingArguments with DeepSpeed's ZeRO-3 exist already, so parts would be loaded empty, sharded over the "
            "processes. Compose or load the model before the arguments are created; the Trainer shards it."
        )


@contextmanager
def quiet_about_unneeded_tensors() -> Iterator[None]:
    """Keep transformers' table of tensors that a part does not need off stderr; what is missing is still told.

    An encoder is often saved with a classifier or with the text side of CLIP, and the table looks like a problem.
    """

    def is_news(record) -> bool:
        text = record.getMessage()
        others = ("MISSING", "MISMATCH", "CONVERSION", "REINIT")
        return "LOAD REPORT" not in text or any(word in text for word in others)

    loader = logging.get_logger("transformers.modeling_utils")
    loader.addFilter(is_news)
    try:
        yield
    finally:
        loader.removeFilter(is_news)


def load_frozen_part(
    part: str, pin: dict, config: PreTrainedConfig, trained: Iterable[str] = (), allow_mismatch: bool = False, **kwargs
) -> PreTrainedModel:
    """Load a frozen part from its pinned source, and verify it.

    Args:
        part: `"vision_model"` or `"language_model"`.
        pin: The part's pin, see `find_frozen_part`.
        config: The part's configuration.
        trained: Names of the part's tensors that are replaced afterwards, so they may be missing or have another shape.
        allow_mismatch: Only warn if the weights differ from the pinned ones. Tensors that are missing or have another
            shape are still an error.
        kwargs: Arguments of the part's `from_pretrained` (`dtype`, `quantization_config`, `token`, ...).

    Raises:
        FrozenPartError: The part is not available, or its weights differ from the pinned ones.
        RuntimeError: DeepSpeed's ZeRO-3 is enabled, see `refuse_zero3`.
    """
    refuse_zero3()
    place, hub_kwargs = find_frozen_part(
        part, pin, allow_mismatch, **{name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    )
    if kwargs.get("local_files_only"):  # transformers before 5.18 asks the Hub whether the part is an adapter
        kwargs["adapter_kwargs"] = {"local_files_only": True}
    with quiet_about_unneeded_tensors():
        model, info = retried(
            auto_class_for(part, config).from_pretrained,
            place, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **{**kwargs, **hub_kwargs},
        )  # fmt: skip
    problems = [
        f"{name} has shape {list(found)}, expected {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
        if name not in trained
    ]
    if allow_mismatch:  # pinned weights may lack the tensors that they lacked when they were pinned
        # Patch features do not depend on poolers.
        problems += [f"missing {name}" for name in sorted(info["missing_keys"]) if "pooler" not in name]
    if problems:
        raise FrozenPartError(f"The {part} in {place!r} does not have the shape that is pinned: {summary(problems)}.")
    return model


def part_to_quantize(parts: list[str], given: dict[str, PreTrainedModel | None]) -> str:
    """The part that `quantization_config` applies to when a bridge checkpoint is loaded.

    That is the language model, or in a model without one the vision encoder.

    Args:
        parts: Names of the model's parts.
        given: Loaded models that are used as parts, by the parts' names.

    Raises:
        ValueError: The part is loaded already.
    """
    part = "language_model" if "language_model" in parts else "vision_model"
    if given[part] is not None:
        raise ValueError(
            f"quantization_config applies to the {part}, which was passed in and is loaded already: load that with "
            "quantization_config, or leave it out here."
        )
    return part


def check_part(part: str, model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Check that a loaded part has the architecture and shape that a bridge was trained with.

    Args:
        part: `"vision_model"` or `"language_model"`.
        model: The loaded part.
        config: The part's configuration in the bridge's checkpoint.

    Raises:
        FrozenPartError: The architecture or the shape differs.
    """
    if model.config.model_type != config.model_type:
        raise FrozenPartError(
            f"The {part} passed in is a {model.config.model_type}; this bridge was trained with a {config.model_type}."
        )
    wrong = []
    for name in SHAPE_FIELDS:
        found, wanted = (getattr(each, name, None) for each in (model.config, config))
        if None not in (found, wanted) and json.dumps(found) != json.dumps(wanted):  # saving turns tuples into lists
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
    """The vision tower's configuration of a model with two towers (CLIP, SigLIP); otherwise `config` itself."""
    return getattr(config, "vision_config", None) or config


def resolve_part(
    part: str, given: Part, dtype: torch.dtype | str | None, **hub_kwargs
) -> tuple[PreTrainedModel, str | None, dict]:
    """Load or build one part.

    Args:
        part: `"vision_model"` or `"language_model"`.
        given: Hub id, folder, configuration (random weights) or loaded model.
        dtype: Data type of the part; `None` keeps that of its checkpoint.
        hub_kwargs: `revision`, `token` and other arguments of `from_pretrained`.

    Returns:
        The model, the Hub id or folder with its tokenizer or image processor, and its pin.

    Raises:
        TypeError: `given` has another type.
        RuntimeError: DeepSpeed's ZeRO-3 is enabled, see `refuse_zero3`.
    """
    refuse_zero3()
    if isinstance(given, PreTrainedModel):
        if part == "vision_model" and getattr(given.config, "vision_config", None) is not None:
            given = given.vision_model  # CLIP and SigLIP with both towers
        if part == "language_model":
            given = as_conditionable(given)
        name = given.name_or_path or None
        # The weights may differ from the source's: the two are compared before a bridge is saved alone.
        return given, name, {"source": name, "revision": commit_of(name) if name else None, "unverified": True}
    if isinstance(given, PreTrainedConfig):
        config = vision_config_of(given) if part == "vision_model" else given
        model = build_part(part, copy.deepcopy(config))
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model, None, {"source": None, "revision": None}
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(
            f"{part.removesuffix('_model')} is a {type(given).__name__}; expected a Hub id, a folder, a configuration "
            "or a loaded model."
        )
    source = os.fspath(given)
    place = source if hub_kwargs.get("revision") else where_to_load(source)
    config = AutoConfig.from_pretrained(place, **hub_kwargs)
    if part == "vision_model":
        config = vision_config_of(config)
    if place != source:
        logger.warning_once(
            f"{source} is not in the Hub's cache: {place} stands in for it, whose weights can differ from the Hub's. A "
            "bridge that is saved alone is pinned to the copy that was used."
        )
    with quiet_about_unneeded_tensors():
        model = auto_class_for(part, config).from_pretrained(place, config=config, dtype=dtype, **hub_kwargs)
    revision = commit_of(place, **hub_kwargs) if place == source else None
    return model, place, {"source": os.path.abspath(source) if os.path.isdir(source) else source, "revision": revision}


__all__ = ["Part", "auto_class_for", "build_part", "check_part", "load_frozen_part", "part_to_quantize",
           "refuse_zero3", "resolve_part"]  # fmt: skip
