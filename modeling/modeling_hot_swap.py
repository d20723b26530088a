"""Hot-swapping of several bridges between one vision encoder and one language model."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..compat import (
    apply_to,
    arguments_that_stay,
    attention_of,
    carries_adapters,
    is_dispatched,
    lacking_peft,
    set_attention,
)
from ..extensions import where_to_load
from .modeling_bridge import fill_vision_geometry
from .modeling_changes import has_adapters
from .modeling_checkpoint import load_bridge_weights, overlay_of
from .modeling_pins import FROZEN_PARTS, FrozenPartError, accepted_hashes, frozen_parts_of, weights_sha256


logger = logging.get_logger(__name__)

# Configuration fields that belong to the model in memory, whichever bridge is active
_MODEL_FIELDS = {"vision_config", "text_config", "freeze_vision_model", "freeze_language_model", "bridge_only"}


@dataclass
class ResidentBridge:
    """A bridge that is in memory but not active.

    Args:
        bridge: The module.
        settings: Configuration fields that belong to the bridge.
        generation_config: Generation defaults of the bridge.
        name_or_path: Hub id or folder of the bridge.
    """

    bridge: nn.Module
    settings: dict[str, Any]
    generation_config: GenerationConfig
    name_or_path: str


def bridge_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Configuration fields that belong to the bridge."""
    common = {field.name for field in fields(PreTrainedConfig)}
    names = [field.name for field in fields(config)]
    return {name: getattr(config, name) for name in names if name not in common | _MODEL_FIELDS}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold bitwise equal tensors; false if some are offloaded and can't be compared."""
    ours, theirs = one.state_dict(), other.state_dict()
    if any(tensor.is_meta for tensor in (*ours.values(), *theirs.values())):
        return False
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name].to(tensor.device))
        for name, tensor in ours.items()
    )


class HotSwapMixin:
    """Bridges that take turns between one vision encoder and one language model.

    The model always has three children: `bridge` is the active bridge. The others are kept outside of `state_dict`, so
    only the active bridge is saved, and each additional bridge costs its own memory only. The bridge's configuration
    fields and generation defaults change with it. Results of one bridge (image features, `visual_states`, a cache, an
    optimizer's list of parameters) can't be used with another. A forward pass keeps its bridge until the end of the
    backward pass, even with gradient checkpointing.

    The active bridge is part of the model's state: threads that need different bridges at the same time need one model
    each. Models can share the frozen parts: `from_pretrained(..., vision_model=..., language_model=...)`.
    """

    _active_bridge = "default"  # name of the bridge that the model was created with
    _residents: dict[str, ResidentBridge | None]  # by name, in the order they were added; `None` for the active bridge

    @property
    def active_bridge(self) -> str:
        """Name of the active bridge; `"default"` for the one that the model was created with."""
        return self._active_bridge

    @property
    def bridges(self) -> list[str]:
        """Names of all bridges in memory."""
        return list(self._residents)

    # ------------------------------------------------------------------ adding and removing

    def add_bridge(
        self,
        name: str,
        bridge: str | os.PathLike | PreTrainedModel,
        *,
        allow_mismatch: bool = False,
        dtype: torch.dtype | None = None,
        **hub_kwargs,
    ) -> None:
        """Load another bridge into memory. The active bridge stays active.

        The new bridge must belong to this model's family and have been trained with the same frozen parts. Its own
        settings may differ: projector, number of query tokens or latents, layers with cross-attention, special tokens.

        Args:
            name: Name of the new bridge.
            bridge: Hub id or folder of a bridge checkpoint; or a loaded model, whose bridge is shared, not copied.
            allow_mismatch: Only warn if the bridge was trained with other frozen parts, or if that is unknown.
            dtype: Data type of the bridge; `None` keeps that of its checkpoint.
            hub_kwargs: `revision`, `token`, `cache_dir` and other arguments of `from_pretrained`.

        Raises:
            FrozenPartError: The bridge was trained with another frozen part, or that is unknown.
            ValueError: The name is taken, or the bridge has another family or shape.
        """
        if name in self._residents:
            raise ValueError(
                f"There is a bridge {name!r} already; delete_bridge({name!r}) first, or choose another name."
            )
        if isinstance(bridge, PreTrainedModel):
            resident, config = self._bridge_of_model(bridge, allow_mismatch)
        else:
            resident, config = self._bridge_of_checkpoint(os.fspath(bridge), allow_mismatch, dtype, hub_kwargs)
        if dtype is not None:
            resident.bridge.to(dtype)
        self._place(resident.bridge)
        self._residents[name] = resident

    def delete_bridge(self, name: str) -> None:
        """Delete a bridge and free its memory.

        Args:
            name: One of `bridges`, but not the active one.

        Raises:
            ValueError: There is no bridge of this name, or it is active.
        """
        if self._resident(name) is None:
            raise ValueError(f"The bridge {name!r} is active; set_bridge() another one first.")
        del self._residents[name]

    def _resident(self, name: str) -> ResidentBridge | None:
        if name not in self._residents:
            raise ValueError(f"There is no bridge {name!r}; there are {', '.join(map(repr, self._residents))}.")
        return self._residents[name]

    def _bridge_of_model(self, model: PreTrainedModel, allow_mismatch: bool) -> tuple[ResidentBridge, PreTrainedConfig]:
        where = f"the {type(model).__name__} passed in"
        self._check_family(model.config.model_type, where)
        if has_adapters(model.bridge):
            raise ValueError(f"The bridge of {where} carries adapters; merge_and_unload() them first.")
        different = [
            part
            for part in frozen_parts_of(self.config)
            if getattr(model, part) is not getattr(self, part)
            and not same_weights(getattr(model, part), getattr(self, part))
        ]
        self._refuse_mismatch([f"its {part} holds other weights" for part in different], where, allow_mismatch)
        config = copy.copy(model.config)
        if different:
            self._check_geometry(config, where)
            shapes = {name: tensor.shape for name, tensor in model.bridge.state_dict().items()}
            expected = {name: tensor.shape for name, tensor in self._empty_bridge(config).state_dict().items()}
            if shapes != expected:
                raise ValueError(
                    f"The bridge of {where} does not fit between this model's parts: its tensors have other shapes."
                )
            config.frozen_parts = self.config.frozen_parts
        return ResidentBridge(
            model.bridge, bridge_settings(config), model.generation_config, model.name_or_path
        ), config

    def _bridge_of_checkpoint(
        self, path: str, allow_mismatch: bool, dtype: torch.dtype | None, hub_kwargs: dict
    ) -> tuple[ResidentBridge, PreTrainedConfig]:
        config_dict, _ = PreTrainedConfig.get_config_dict(path, **hub_kwargs)
        self._check_family(config_dict.get("model_type"), path)
        if not config_dict.get("bridge_only"):
            raise ValueError(
                f"{path} holds a whole model; expected a bridge checkpoint. Load it and pass the model, or save it "
                "with bridge_only=True."
            )
        config = self.config_class.from_dict(config_dict)
        problems = [problem for part in frozen_parts_of(self.config) for problem in self._part_mismatches(part, config)]
        self._refuse_mismatch(problems, path, allow_mismatch)
        if problems:
            self._check_geometry(config, path)
            config.frozen_parts = self.config.frozen_parts
        # The bridge runs with the parts in memory, whatever its checkpoint says.
        config.vision_config, config.text_config = self.config.vision_config, self.config.text_config
        bridge = self._empty_bridge(config)
        load_bridge_weights(
            bridge,
            path,
            self.all_tied_weights_keys,
            "auto" if dtype is None else dtype,
            overlay=overlay_of(self, config.trained_tensors or []),
            shared=FROZEN_PARTS,
            **hub_kwargs,
        )
        try:
            generation_config = GenerationConfig.from_pretrained(path, **hub_kwargs)
        except OSError:
            generation_config = copy.deepcopy(self.generation_config)
        return ResidentBridge(bridge, bridge_settings(config), generation_config, path), config

    def _empty_bridge(self, config: PreTrainedConfig) -> nn.Module:
        """Create a bridge for the parts in memory on the meta device, which needs no memory and no random numbers."""
        config = copy.copy(config)
        config.vision_config, config.text_config = self.config.vision_config, self.config.text_config
        with torch.device("meta"):
            return self.bridge_class(config, self.language_model)

    # ------------------------------------------------------------------ checks

    def _check_family(self, model_type: str | None, where: str) -> None:
        if model_type != self.config.model_type:
            raise ValueError(
                f"{where} is a {model_type}, this model a {self.config.model_type}: only bridges of one family can "
                "take turns. Load it as a separate model that shares the frozen parts: from_pretrained(..., "
                "vision_model=..., language_model=...)."
            )

    def _check_geometry(self, config: PreTrainedConfig, where: str) -> None:
        """Check that a bridge trained with another encoder fits the patch features of this model's encoder."""
        found = copy.copy(config)
        found.vision_config = self.config.vision_config
        names = ("vision_layout", "vision_hidden_size", "patch_size", "num_prefix_tokens")
        for name in names:
            setattr(found, name, None)
        fill_vision_geometry(found)
        problems = [
            f"{name} is {getattr(config, name)!r}, this encoder's {getattr(found, name)!r}"
            for name in names
            if getattr(config, name) != getattr(found, name)
        ]
        if problems:
            raise ValueError(f"The bridge in {where} does not fit this vision encoder: {'; '.join(problems)}.")

    def _part_mismatches(self, part: str, config: PreTrainedConfig) -> list[str]:
        """Reasons why a frozen part in memory may not be the one that a bridge was trained with; none if it is."""
        if not getattr(self.config, f"freeze_{part}"):
            return [f"the {part} in memory is being trained"]
        pin = (self.config.frozen_parts or {}).get(part) or {}
        if not pin.get("source"):
            return [f"the {part} in memory has no source to compare it with"]
        if changes := self._changes_of(part, adapters=False):
            return [f"the {part} in memory has changed since it was loaded ({changes[0]}, ...)"]
        trained = [
            {name for name in each.trained_tensors or [] if name.startswith(f"{part}.")}
            for each in (self.config, config)
        ]
        if more := sorted(trained[0] - trained[1]):
            return [f"the {part} in memory has a trained {more[0]}, which came with another bridge"]
        wanted = accepted_hashes((config.frozen_parts or {}).get(part))
        if not wanted:
            return [f"it does not say which {part} it was trained with"]
        found = accepted_hashes(pin)
        if not found:
            place = where_to_load(pin["source"])
            revision = {"revision": pin["revision"]} if pin.get("revision") and place == pin["source"] else {}
            found = {weights_sha256(place, **revision)}
        if wanted & found:
            return []
        theirs = (config.frozen_parts or {})[part].get("source")
        return [
            f"it was trained with the {part} {theirs!r}, whose weights hash to {' or '.join(sorted(wanted))}; those of "
            f"the one in memory, {pin.get('source')!r}, to {' or '.join(sorted(found))}"
        ]

    def _refuse_mismatch(self, problems: list[str], where: str, allow_mismatch: bool) -> None:
        if not problems:
            return
        message = f"The bridge in {where} does not belong to this model's frozen parts: {'; '.join(problems)}."
        if not allow_mismatch:
            raise FrozenPartError(f"{message} Pass allow_mismatch=True to use it anyway.")
        logger.warning(message)

    # ------------------------------------------------------------------ taking turns

    def set_bridge(self, name: str, adapter: str | list[str] | None = None) -> None:
        """Activate another bridge.

        A processor that counts visual tokens or writes special tokens belongs to one bridge: load the one that was
        saved with it, `AutoProcessor.from_pretrained(...)`, or build one with `from_config(model.config,
        image_processor, tokenizer)`. `processor.check(model.config)` tells whether a processor fits.

        Args:
            name: One of `bridges`.
            adapter: Adapters to activate too, out of those that `add_adapter` or `load_adapter` added to this model or
                its language model; `None` does not change the active adapters.

        Raises:
            ValueError: There is no such bridge or adapter, or the active bridge carries adapters itself.
        """
        resident = self._resident(name)
        if resident is not None and has_adapters(self.bridge):
            raise ValueError(
                "The active bridge carries adapters (modules_to_save, or layers of it), which can't take turns; "
                "merge_and_unload() them first, or adapt the language model alone."
            )
        if adapter is not None:
            self._adapter_owner().set_adapter(adapter)
        if resident is None:
            return
        outgoing = ResidentBridge(self.bridge, bridge_settings(self.config), self.generation_config, self.name_or_path)
        self._place(resident.bridge)
        for field, value in resident.settings.items():
            before = getattr(self.config, field)
            if before is not value:
                if isinstance(before, PreTrainedConfig):  # the attention implementation belongs to the model
                    if attention_of(value) != attention_of(before):
                        set_attention(value, attention_of(before))
                setattr(self.config, field, value)
        self.bridge = resident.bridge
        self._follow_output_layer()
        if self.bridge.training != self.training:
            self.bridge.train(self.training)
        self.generation_config = resident.generation_config
        self.name_or_path = self.config.name_or_path = resident.name_or_path
        self._residents[self._active_bridge], self._residents[name] = outgoing, None
        self._active_bridge = name

    @contextmanager
    def using_bridge(self, name: str, adapter: str | list[str] | None = None) -> Iterator[HotSwapMixin]:
        """Activate another bridge temporarily: `with model.using_bridge("medical"): model.generate(...)`.

        Args:
            name: One of `bridges`.
            adapter: Adapters to activate too, as for `set_bridge`. The previous ones are restored afterwards.

        Raises:
            ValueError: There is no such bridge or adapter, or the active bridge carries adapters itself.
        """
        before = self._active_bridge
        adapters = None if adapter is None else self._adapter_owner().active_adapters()
        self.set_bridge(name, adapter)
        try:
            yield self
        finally:
            self.set_bridge(before, adapters)

    def add_adapter(self, *args, **kwargs) -> None:
        """See `PreTrainedModel.add_adapter`.

        Args:
            args: Passed on.
            kwargs: Passed on.

        Raises:
            ValueError: transformers needs a later release of PEFT.
        """
        if lacking := lacking_peft():
            raise ValueError(lacking)
        super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args, **kwargs):
        """See `PreTrainedModel.load_adapter`; missing weights of the adapter are an error.

        Args:
            args: Passed on.
            kwargs: Passed on.

        Returns:
            The loading information.

        Raises:
            ValueError: transformers needs a later release of PEFT, or did not find all of the adapter's weights.
        """
        if lacking := lacking_peft():
            raise ValueError(lacking)
        info = super().load_adapter(*args, **kwargs)
        if missing := sorted(info.missing_keys):
            raise ValueError(
                f"The adapter lacks {len(missing)} weights, {missing[0]} first, or transformers can't read it (DoRA; "
                "modules_to_save before 5.18): the model is unusable now. Load it again, and the adapter with "
                "peft.PeftModel.from_pretrained(model, ...)."
            )
        return info

    def _adapter_owner(self) -> PreTrainedModel:
        for model in (self, self.language_model):
            if carries_adapters(model):
                return model
        raise ValueError(
            "This model has no adapters: load_adapter() or add_adapter() them to the model or its language_model "
            "first. The adapters of a PeftModel are set on the PeftModel."
        )

    def _place(self, bridge: nn.Module) -> None:
        """Move a bridge to the devices of the active one."""
        device_map = getattr(self, "hf_device_map", None) or {}
        if len(set(device_map.values())) > 1:
            if not is_dispatched(bridge):
                from accelerate import dispatch_model

                own = {name: place for name, place in device_map.items() if name.split(".")[0] == "bridge"}
                own = {name.removeprefix("bridge").removeprefix("."): place for name, place in own.items()}
                dispatch_model(bridge, own, skip_keys=arguments_that_stay(self), force_hooks=True)
            return
        parameter = next(self.bridge.parameters(), None)  # `None` for a bridge without parameters
        device = next(self.vision_model.parameters()).device if parameter is None else parameter.device
        if any(parameter.device != device for parameter in bridge.parameters()):
            bridge.to(device)

    def apply_elsewhere(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a function, such as a move to another device, to the tensors of the bridges that are not active."""
        for resident in self.__dict__.get("_residents", {}).values():
            if resident is not None:
                apply_to(resident.bridge, fn)


__all__ = ["HotSwapMixin", "ResidentBridge"]
