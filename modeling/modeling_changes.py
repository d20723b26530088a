"""Detect whether a frozen part has changed since it was loaded: its bridge must then not be saved alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def has_adapters(module: nn.Module | None) -> bool:
    """Whether PEFT has added layers to a module, or replaced it by a copy."""
    layers = module.modules() if module is not None else ()
    return any(name in ("base_layer", "modules_to_save") for layer in layers for name, _ in layer.named_children())


def _name_without_adapters(name: str) -> str:
    """A parameter's name without the components that PEFT inserts."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    """Sample one number of every row, on the CPU; the column differs from row to row. Vectors are kept whole."""
    if tensor.element_size() == 1:
        tensor = tensor.view(torch.uint8)  # 8-bit floats can't be gathered
    if tensor.ndim < 2:
        sample = tensor
    elif (rows := tensor.flatten(1)).shape[1] == 1:  # packed 4-bit weights have no rows
        sample = rows[:: max(1, len(rows) // 4096), 0]
    else:
        column = torch.arange(len(rows), device=rows.device) % rows.shape[1]
        sample = rows.gather(1, column[:, None])[:, 0]
    return sample.to("cpu", copy=True)


@torch.no_grad()
def samples_of(module: nn.Module | None) -> dict[str, torch.Tensor]:
    """Sample every row of every parameter, which detects training, merged adapters and single trained tokens.

    Training changes tensors densely, or (tokens of an embedding table) row by row. Parameters without data in this
    process, offloaded or sharded, are left out.

    Args:
        module: A module, which may be quantised.

    Returns:
        Samples by parameter name, on the CPU and in the parameter's own precision.
    """
    samples = {}
    for name, parameter in module.named_parameters() if module is not None else ():
        name, tensor = _name_without_adapters(name), parameter.detach()
        if tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "to_local"):
            continue
        samples[name] = sample_of(tensor)
    return samples


def _equal_up_to_precision(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether two samples are equal, possibly after rounding to a lower precision."""
    precisions = (new.dtype, torch.bfloat16, torch.float16) if new.is_floating_point() else (new.dtype,)
    return old.shape == new.shape and any(torch.equal(old.to(dtype).to(new.dtype), new) for dtype in precisions)


def changed_since(model: nn.Module, saved: Iterable[tuple[str, torch.Tensor]]) -> tuple[list[str], int]:
    """Names of a model's parameters that differ from its files.

    Quantised parameters can't be compared, nor can those that have another name in the files.

    Args:
        model: A loaded model.
        saved: Names and tensors of its files, with or without the model's `base_model_prefix`.

    Returns:
        The names, and how many parameters were compared.
    """
    now = {name: sample for name, sample in samples_of(model).items() if sample.is_floating_point()}
    prefix, changed, compared = f"{model.base_model_prefix}.", [], 0
    for name, tensor in saved:
        known = next((each for each in (name, name.removeprefix(prefix), prefix + name) if each in now), None)
        if known is not None:
            compared += 1
            if not _equal_up_to_precision(sample_of(tensor), now[known]):
                changed.append(known)
    return sorted(changed), compared


def changed_tensors(module: nn.Module | None, before: dict[str, torch.Tensor]) -> list[str]:
    """Names of parameters that have changed. Neither another precision nor unmerged adapters count as a change.

    Args:
        module: The module.
        before: Earlier result of `samples_of`.
    """
    now = samples_of(module)
    present = {_name_without_adapters(name) for name, _ in module.named_parameters()} if module is not None else set()
    gone = before.keys() - present
    new = set() if has_adapters(module) else now.keys() - before.keys()
    differ = {name for name in before.keys() & now.keys() if not _equal_up_to_precision(before[name], now[name])}
    return sorted(gone | new | differ)


__all__ = ["changed_since", "changed_tensors", "has_adapters", "samples_of"]
