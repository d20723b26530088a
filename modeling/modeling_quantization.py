"""Quantised frozen parts: the bridge is never quantised, and models answer as transformers' own quantised models do.

A model is quantised as a whole by `from_pretrained(..., quantization_config=...)`, or has parts that are quantised:
passed in, or loaded for a bridge checkpoint.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compat import keep_unquantized
from ..files import write_json
from .modeling_changes import has_adapters
from .modeling_pins import FROZEN_PARTS, summary


# Fields of quantisation configurations that name the modules to leave as they are
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules", "linear_weights_not_to_quantize")
# What transformers writes on a quantised model, and Trainer, PEFT and accelerate read
MARKS = ("quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def is_quantized_tensor(tensor: torch.Tensor) -> bool:
    """Whether a parameter holds quantised weights: integers, 8-bit floats, or 4-bit weights in any storage."""
    return not tensor.is_floating_point() or tensor.element_size() == 1 or hasattr(tensor, "quant_state")


def quantized_layers(module: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over a module's quantised layers, with their names.

    Args:
        module: A part of a model, or `None`.
    """
    for name, layer in module.named_modules() if module is not None else ():
        packed = any(buffer.endswith("qweight") for buffer, _ in layer.named_buffers(recurse=False))  # GPTQ, AWQ
        if packed or any(is_quantized_tensor(parameter) for parameter in layer.parameters(recurse=False)):
            yield name, layer


def is_quantized(part: nn.Module | None) -> bool:
    """Whether a part has quantised layers."""
    return next(quantized_layers(part), None) is not None


def _is_linear(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2 and not isinstance(layer, nn.Embedding)


def without_bridge(quantization_config: Any) -> Any:
    """A copy of a quantisation configuration whose list of modules to leave as they are, if it has one, names `bridge`.

    Args:
        quantization_config: A configuration of transformers, or its fields in a dict.
    """
    changed = copy.deepcopy(quantization_config)
    fields = changed if isinstance(changed, dict) else vars(changed)
    for name in SKIP_LISTS:
        if isinstance(fields.get(name), list) and "bridge" not in fields[name]:
            fields[name] = [*fields[name], "bridge"]
    return changed


def _fields_of(quantization_config: Any) -> dict:
    """The fields of a quantisation configuration, as they are saved."""
    to_dict = getattr(quantization_config, "to_dict", None)
    return copy.deepcopy(quantization_config or {}) if to_dict is None else to_dict()


# ---------------------------------------------------------------------- 4 bits on CPUs


def _is_packed(layer: nn.Module) -> bool:
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def _unpack(layer: nn.Module, *_) -> None:
    """Give a layer the layout of its 4-bit weights back, which bitsandbytes changes on CPUs with AVX512-BF16.

    In evaluation, it orders the weights for a faster product, which has no gradients, and which nothing else can read:
    neither dequantisation nor (without double quantisation) a saved file.

    Args:
        layer: A 4-bit layer.

    Raises:
        RuntimeError: The installed bitsandbytes can't undo it.
    """
    if not _is_packed(layer) or layer.__dict__.get("_unpacking"):
        return
    state = layer.weight.quant_state
    nested = getattr(state, "original_nested", False)
    layer.__dict__["_unpacking"] = True
    try:
        layer.state_dict()  # unpacks the weights
    finally:
        del layer.__dict__["_unpacking"]
    if _is_packed(layer):
        raise RuntimeError(
            "4-bit weights have run without gradients on this CPU, and this release of bitsandbytes can't undo its "
            "packing of them: load the model again, or upgrade bitsandbytes."
        )
    if not nested and state.absmax.ndim == 2:  # bitsandbytes 0.50 leaves these transposed and rounded
        state.absmax = state.absmax.T.reshape(-1).float()


def _unpack_for_gradients(layer: nn.Module, args: tuple) -> None:
    """Forward pre-hook: packed weights have no gradients, so they are unpacked for good when gradients are needed."""
    if (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and any(isinstance(states, torch.Tensor) and states.requires_grad for states in args)
    ):
        keep_unpacked(layer)


def keep_unpacked(layer: nn.Module) -> None:
    """Unpack a layer's 4-bit weights, if they are packed, and don't let them be packed again.

    Args:
        layer: A quantised layer.
    """
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False
        _unpack(layer)


def guard_4bit_layers(part: nn.Module) -> None:
    """Let 4-bit layers be packed on a CPU only where that is right: see `_unpack`.

    Layers whose shape can't be packed (SigLIP's with 4,304 channels) compute without, instead of failing.

    Args:
        part: A part with 4-bit layers of bitsandbytes, or others.
    """
    for _, layer in quantized_layers(part):
        if not getattr(layer, "support_avx512bf16_for_cpu", False) or layer.__dict__.get("unpacks"):
            continue
        blocksize = getattr(layer.weight, "blocksize", 64)
        if layer.out_features % 32 or layer.in_features % max(blocksize, 64):
            layer.support_avx512bf16_for_cpu = False
            continue
        layer.__dict__["unpacks"] = True
        layer.register_forward_pre_hook(_unpack_for_gradients)
        layer.register_state_dict_pre_hook(_unpack)


def unpack(part: nn.Module | None) -> None:
    """Give all 4-bit layers of a part the layout back in which their weights can be read."""
    for _, layer in quantized_layers(part):
        if isinstance(getattr(layer, "weight", None), torch.Tensor):
            _unpack(layer)


# ---------------------------------------------------------------------- models


class QuantizationMixin:
    """Quantised parts beside a bridge in full precision."""

    def _exclude_bridge(self) -> None:
        """Keep the bridge from being quantised by the loading that builds this model."""
        if getattr(self.config, "quantization_config", None) is not None:
            keep_unquantized(self, "bridge")

    def _quantized_parts(self) -> dict[str, PreTrainedModel]:
        parts = {name: getattr(self, name) for name in FROZEN_PARTS}
        return {name: part for name, part in parts.items() if is_quantized(part)}

    def _mark_quantization(self) -> None:
        """Mark the model, or its parts if it was loaded as a whole, as transformers marks quantised models."""
        whole = getattr(self, "hf_quantizer", None) is not None
        for part in self._quantized_parts().values():
            given, marked = (self, part) if whole else (part, self)
            for mark in MARKS:
                if getattr(given, mark, None):
                    setattr(marked, mark, getattr(given, mark))
            if whole:
                part.is_quantized = True
            guard_4bit_layers(part)
        if whole:  # Trainer refuses models without anything to train: here the bridge is
            self.is_quantized = not self.hf_quantizer.is_trainable

    def _finish_quantization(self) -> None:
        """Check and complete a model that was quantised as a whole while it was loaded.

        Raises:
            ValueError: The bridge was quantised: this kind of quantisation can't be told to leave it.
        """
        if getattr(self, "hf_quantizer", None) is None:
            return
        changed = {name for name, _ in quantized_layers(self.bridge)}
        if not has_adapters(self.bridge):
            with torch.device("meta"):
                fresh = dict(self.bridge_class(self.config, self.language_model).named_modules())
            layers = self.bridge.named_modules()
            changed.update(name for name, layer in layers if type(layer) is not type(fresh.get(name)))
        if changed := sorted(changed):
            method = self.hf_quantizer.quantization_config.quant_method
            raise ValueError(
                f"{getattr(method, 'value', method)} quantised the bridge ({summary(changed)}), which must stay in "
                "full precision. Save the bridge alone (bridge_only=True) and load that with the same "
                "quantization_config: then the language model alone is quantised. Or name 'bridge' among the modules "
                "that the configuration leaves out."
            )
        if isinstance(self.config.dtype, torch.dtype):  # transformers keeps what it must not quantise in float32
            self.bridge.to(self.config.dtype)
        self._mark_quantization()

    def place_beside_quantized(self) -> None:
        """Move the other parts to the device of the quantised one: transformers puts those on a GPU if there is one."""
        parts = self._quantized_parts()
        devices = {parameter.device for part in parts.values() for parameter in part.parameters()}
        if len(devices) == 1 and not devices & {torch.device("cpu"), torch.device("meta")}:
            for name in ("bridge", *FROZEN_PARTS):
                if name not in parts and getattr(self, name) is not None:
                    getattr(self, name).to(*devices)

    def _quantization_to_save(self) -> Any:
        """The quantisation configuration of a model that was composed of parts, for saving it as a whole.

        Raises:
            ValueError: The parts are quantised in different ways, or can't be told apart in one configuration.
        """
        if getattr(self, "hf_quantizer", None) is not None:
            return self.config.quantization_config
        parts = self._quantized_parts()
        if not parts:
            return None
        fields = [_fields_of(getattr(part.config, "quantization_config", None)) for part in parts.values()]
        field = next((name for name in SKIP_LISTS if name in fields[0]), None)
        bare = [{name: value for name, value in each.items() if name not in SKIP_LISTS} for each in fields]
        if field is None or any(each != bare[0] for each in bare):
            raise ValueError(
                "The parts are quantised in ways that one configuration of the whole model can't describe, so it could "
                "not be loaded again. Save the bridge alone (bridge_only=True), and load it with quantization_config."
            )
        skipped = ["bridge", *(name for name in FROZEN_PARTS if name not in parts)]
        for name, part in parts.items():
            known = {each for each, _ in quantized_layers(part)}
            layers = (each for each, layer in part.named_modules() if each not in known and _is_linear(layer))
            skipped += [f"{name}.{each}" for each in layers]
        return {**fields[0], field: skipped}

    def _set_quantization(self, quantization_config: Any) -> None:
        if quantization_config is not None:
            self.config.quantization_config = quantization_config
        elif hasattr(self.config, "quantization_config"):
            del self.config.quantization_config

    def _write_quantization(self, config_path: Path, whole: bool) -> None:
        """Leave in a saved configuration what describes the saved weights, and the weights of the pinned sources.

        Args:
            config_path: The saved configuration.
            whole: Whether the parts' weights were saved, or the bridge's alone.
        """
        if not config_path.is_file():  # another process saves it
            return
        saved = json.loads(config_path.read_text())
        forgotten = [] if whole or saved.pop("quantization_config", None) is None else ["quantization_config"]
        plain = whole and saved.get("quantization_config") is None
        for name, part in (("vision_config", "vision_model"), ("text_config", "language_model")):
            quantizer = getattr(getattr(self, part), "hf_quantizer", None)
            here = quantizer is not None and not quantizer.pre_quantized  # the source's weights are not quantised
            if (plain or here) and (saved.get(name) or {}).pop("quantization_config", None) is not None:
                forgotten.append(name)
        if forgotten:
            write_json(config_path, saved, sort_keys=True)

    def half(self, *args) -> nn.Module:
        """See `PreTrainedModel.half`; models with quantised parts refuse it."""
        self._refuse_cast("half")
        return super().half(*args)

    def float(self, *args) -> nn.Module:
        """See `PreTrainedModel.float`; models with quantised parts refuse it."""
        self._refuse_cast("float")
        return super().float(*args)

    def _refuse_cast(self, name: str) -> None:
        if getattr(self, "quantization_method", None) is not None:
            raise ValueError(
                f".{name}() is not supported for a quantised model: load it with dtype=..., or cast the bridge alone "
                f"(model.bridge.{name}())."
            )

    def dequantize(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace quantised weights by ordinary ones, see `PreTrainedModel.dequantize`.

        Args:
            dtype: Their data type; by default that of the model.

        Returns:
            The model itself.

        Raises:
            ValueError: Nothing is quantised.
        """
        parts = self._quantized_parts()
        for part in parts.values():
            unpack(part)
        if getattr(self, "hf_quantizer", None) is not None or not parts:
            super().dequantize(dtype)
        else:
            for part in parts.values():
                part.dequantize(dtype)
        for model in (self, *parts.values()):
            model.is_quantized = False
            for mark in MARKS:
                vars(model).pop(mark, None)
        self._freeze_as_configured()
        self._record_parts(*parts)
        return self


__all__ = [
    "QuantizationMixin",
    "guard_4bit_layers",
    "is_quantized",
    "is_quantized_tensor",
    "keep_unpacked",
    "quantized_layers",
    "unpack",
    "without_bridge",
]
