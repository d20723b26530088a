"""What is trained: groups of parameters with their learning rates and weight decay."""

from __future__ import annotations

import torch
from torch import nn

from ..modeling.modeling_bridge import TokenRows
from ..modeling.modeling_pins import FROZEN_PARTS
from .training_failures import TrainingError


def group_of(name: str) -> str:
    """The group of learning rates that a parameter belongs to.

    Args:
        name: The parameter's name.
    """
    if "lora_" in name:
        return "lora"
    if ".attn_gate." in name or ".ff_gate." in name:
        return "gates"
    if ".resampler." in name:
        return "resampler"
    return next((part for part in FROZEN_PARTS if f".{part}." in f".{name}"), "bridge")


def parameters_with_decay(model: nn.Module, exempt: tuple[str, ...] = ()) -> set[str]:
    """Names of the parameters with weight decay: matrices that are no embeddings.

    Args:
        model: The model.
        exempt: Beginnings of names of further parameters without weight decay.
    """
    embeddings = (nn.Embedding, TokenRows)
    tables = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, embeddings)
        for own, _ in module.named_parameters(recurse=False)
    }
    words = ("latents", "query_tokens", "_embeddings")
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in tables and not name.endswith(words) and not name.startswith(exempt)
    }


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    learning_rates: dict[str, float],
    no_weight_decay: tuple[str, ...] = (),
) -> list[dict]:
    """An optimizer's parameter groups: what is trained, by learning rate and weight decay.

    Args:
        model: The model; its frozen parameters are in no group.
        learning_rate: Of groups that `learning_rates` does not name.
        weight_decay: Of the parameters that have any, see `parameters_with_decay`.
        learning_rates: By name of group, see `group_of`. Gates and resampler have the bridge's unless they are named.
        no_weight_decay: Beginnings of names of parameters without weight decay.

    Returns:
        Groups with `params`, `weight_decay` and `lr`.

    Raises:
        TrainingError: Nothing is trained, or a learning rate is for parameters that don't exist.
    """
    decaying, groups = parameters_with_decay(model, no_weight_decay), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((group_of(name), name in decaying), []).append(parameter)
    trained = {group for group, _ in groups}
    if not trained:
        raise TrainingError("nothing is trained: every part is frozen, and the bridge has no parameters.")
    if unknown := sorted(learning_rates.keys() - trained):
        raise TrainingError(
            f"learning_rates has {', '.join(unknown)}, but trained is {', '.join(sorted(trained))} only: see freeze "
            "and lora."
        )
    rates = {"bridge": learning_rate, **learning_rates}
    for part in ("gates", "resampler"):
        rates.setdefault(part, rates["bridge"])
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decay else 0.0,
            "lr": rates.get(group, learning_rate),
        }
        for (group, decay), parameters in groups.items()
    ]


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Refuse an optimizer's state from a checkpoint if it has other parameters.

    Args:
        optimizer: The optimizer that is to load the state: this is a hook of `register_load_state_dict_pre_hook`.
        state: Its state, as `state_dict()` gives it.

    Raises:
        TrainingError: The numbers of parameters per group differ.
    """
    own = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in state["param_groups"]]
    if own != saved:
        raise TrainingError(
            f"The optimizer's state in the checkpoint is of other parameters (groups of {saved}; expected {own}): "
            "resume with the recipe that the run was started with."
        )


__all__ = ["check_optimizer_state", "group_of", "parameter_groups", "parameters_with_decay"]
