"""What is trained of a model as files: gathered from all processes, saved, and loaded to resume."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import PreTrainedModel

from ..compat import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from ..modeling.modeling_pins import frozen_parts_of
from .training_failures import TrainingError


def saves_bridge_only(model: PreTrainedModel) -> bool:
    """Whether the bridge alone is saved: all parts are frozen and have a source to come back from.

    Args:
        model: The model, without the wrappers that training puts around it.
    """
    if hasattr(model, "peft_config") or not hasattr(model, "pin_frozen_parts"):
        return False
    config = model.config
    return all(
        getattr(config, f"freeze_{part}") and ((config.frozen_parts or {}).get(part) or {}).get("source")
        for part in frozen_parts_of(config)
    )


def gathered_by_fsdp(wrapped: torch.nn.Module, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Whole tensors of a model that FSDP2 has sharded; all processes must call this.

    Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html (`get_model_state_dict`).

    Args:
        wrapped: The model as it is trained.
        model: The same without wrappers.

    Returns:
        On the CPU of the first process; what others get is not meant to be used.
    """
    frozen_left_out = hasattr(model, "peft_config") or (saves_bridge_only(model) and not model.config.trained_tensors)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=frozen_left_out)
    return _without_tied_copies(model, get_model_state_dict(wrapped, options=options))


def gathered_by_zero3(model: PreTrainedModel, writes: bool) -> dict[str, torch.Tensor]:
    """Whole tensors of a model that DeepSpeed's ZeRO-3 has sharded; all processes must call this.

    Source: https://deepspeed.readthedocs.io/en/latest/zero3.html (`GatheredParameters`).

    Args:
        model: The model without wrappers.
        writes: Whether this process needs the tensors.

    Returns:
        On the CPU, where `writes`; what others get is not meant to be used.
    """
    import deepspeed

    peft = hasattr(model, "peft_config")
    bridge_alone = saves_bridge_only(model) and not model.config.trained_tensors
    state = {
        name: tensor for name, tensor in model.state_dict().items() if not bridge_alone or name.startswith("bridge.")
    }
    for name, parameter in model.named_parameters():  # one after the other: no more has to be in memory at a time
        if name in state and (parameter.requires_grad or not peft):
            with deepspeed.zero.GatheredParameters([parameter]):
                if writes:
                    state[name] = parameter.detach().cpu().clone()
    return _without_tied_copies(model, state)


def _without_tied_copies(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state without tensors that were tied to another one before gathering made copies of them."""
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source in state:
            state.pop(name, None)
    return state


def save_weights(
    model: PreTrainedModel, processor, folder: str | os.PathLike, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Save what is trained, with the processor.

    Args:
        model: The model without wrappers.
        processor: Its processor.
        folder: Where to save it.
        state: Gathered tensors of a sharded model; `None` takes the model's own.

    Raises:
        TrainingError: Tensors of the bridge are missing or empty in `state`.
        OSError: The folder can't be written to.
    """
    peft = hasattr(model, "peft_config")
    if state is not None and not peft:
        tied = model.all_tied_weights_keys
        needed = [name for name in model.state_dict() if name.startswith("bridge.") and tied.get(name) not in state]
        if lost := [name for name in needed if name not in state or state[name].numel() == 0]:
            raise TrainingError(
                f"{len(lost)} of the bridge's {len(needed)} tensors are missing or empty, such as {lost[0]}: they are "
                "sharded over the processes. Call `trainer.save_model()` in all processes: it gathers whole tensors."
            )
    os.makedirs(folder, exist_ok=True)
    if peft:
        model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)
    else:
        options = {"bridge_only": saves_bridge_only(model), "processor": processor}
        model.save_pretrained(folder, state_dict=state, **options)


def load_weights(model: PreTrainedModel, checkpoint: str | os.PathLike, fsdp: bool) -> bool:
    """Load the trained weights of a checkpoint; the frozen ones are in memory already.

    Args:
        model: The model without wrappers.
        checkpoint: The checkpoint's folder.
        fsdp: Whether FSDP2 has sharded the model.

    Returns:
        Whether they were loaded; not if they are an adapter or in several files, which transformers loads.

    Raises:
        TrainingError: They are not those of this model.
    """
    weights, index = Path(checkpoint) / SAFE_WEIGHTS_NAME, Path(checkpoint) / SAFE_WEIGHTS_INDEX_NAME
    if hasattr(model, "peft_config"):
        return False
    if not weights.exists():
        if not index.exists():
            raise TrainingError(f"{checkpoint} has no {SAFE_WEIGHTS_NAME}: it is no checkpoint.")
        return False
    loaded = load_file(weights)
    if fsdp:
        options = StateDictOptions(full_state_dict=True, strict=False)
        result = set_model_state_dict(model, dict(loaded), options=options)
    else:
        result = model.load_state_dict(loaded, strict=False)
    tied = model.all_tied_weights_keys
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = sorted(name for name in set(result.missing_keys) & trained if tied.get(name) not in loaded)
    if missing or result.unexpected_keys:
        wrong = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in result.unexpected_keys]
        raise TrainingError(
            f"{checkpoint} is of another model: {'; '.join(wrong[:5])}. Use the recipe that it was made with."
        )
    return True


__all__ = ["gathered_by_fsdp", "gathered_by_zero3", "load_weights", "save_weights", "saves_bridge_only"]
