"""Losses and gradients that are NaN or infinite: which module they come from first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import nn

from .training_failures import TrainingError


class NonFiniteError(TrainingError, FloatingPointError):
    """The loss or a gradient is NaN or infinite.

    Args:
        report: What was found out: `step`, `what`, `ids` of the batch, `module`, `details`.
    """

    def __init__(self, report: dict):
        super().__init__(
            f"step {report['step']}: {report['what']} is not finite; first: {report['details']}; "
            f"records {', '.join(report['ids'][:20])}"
        )
        self.report = report


def is_finite(value) -> bool:
    """Whether all tensors in a value, lists and dictionaries included, are finite."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return all(map(is_finite, value)) if isinstance(value, (list, tuple)) else True


class _FoundModule(Exception):
    """Ends a run of the model as soon as the first bad module is known.

    Args:
        name: The module's name.
        module: The module.
        value: Which of its values is not finite, in words.
    """

    def __init__(self, name: str, module: nn.Module, value: str):
        details = f"{value} of {name or 'the whole model'} ({type(module).__name__})"
        self.found = {"module": name, "details": details}


@contextmanager
def _hooks(model: nn.Module, register) -> Iterator[None]:
    handles = [handle for name, module in model.named_modules() for handle in register(name, module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_hooks(name: str, module: nn.Module) -> Iterator:
    def before(_, args, kwargs):
        if not is_finite(args) or not is_finite(kwargs):
            raise _FoundModule(name, module, "the input")

    def after(_, args, kwargs, output):
        if not is_finite(output):
            raise _FoundModule(name, module, "the output")

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after, with_kwargs=True)


def _backward_hooks(name: str, module: nn.Module) -> Iterator:
    if any(True for _ in module.children()):
        return

    def after(_, grad_input, grad_output):
        if not is_finite(grad_output):
            raise _FoundModule(name, module, "the gradient of the output")
        if not is_finite(grad_input):
            raise _FoundModule(name, module, "the gradient of the input")

    yield module.register_full_backward_hook(after)


def _bad_value_at_rest(model: nn.Module, inputs: dict) -> dict[str, str] | None:
    """A batch's input or a parameter that is not finite before anything is computed."""
    for name, value in inputs.items():
        if not is_finite(value):
            return {"module": "", "details": f"the batch's {name}"}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if not is_finite(tensor.to_local() if hasattr(tensor, "to_local") else tensor):
            return {"module": name.rpartition(".")[0], "details": f"the parameter {name}"}
    return None


def first_bad_module(model: nn.Module, inputs: dict, loss_of: Callable | None = None) -> dict[str, str]:
    """Find where the first value comes from that is not finite.

    Args:
        model: The model, its random state as before the batch.
        inputs: The batch.
        loss_of: `loss_of(model, inputs)` computes the loss. Without it only the batch and the parameters are looked at.

    Returns:
        `module`: its name, `""` if no module is to blame; and `details` in words.
    """
    if found := _bad_value_at_rest(model, inputs):
        return found
    if loss_of is None:
        details = "not found in batch and parameters; the modules can't be run by one process alone"
        return {"module": "", "details": details}
    try:
        with _hooks(model, _forward_hooks), torch.no_grad():
            loss = loss_of(model, inputs)
        if not is_finite(loss):
            return {"module": "", "details": "the loss itself, of finite logits"}
        model.zero_grad()
        with _hooks(model, _backward_hooks):
            loss_of(model, inputs).backward()
    except _FoundModule as error:
        return error.found
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not is_finite(parameter.grad):
            return {"module": name.rpartition(".")[0], "details": f"the gradient of the parameter {name}"}
    return {"module": "", "details": "nothing: run again, the batch gives finite values"}


def look_into_batches(
    model: nn.Module, batches: list[tuple], loss_of: Callable | None, prepare: Callable[[dict], dict]
) -> dict:
    """Run one process' batches again, with the random numbers that they had, until a bad module is found.

    Args:
        model: The model.
        batches: Inputs, number of items and random states (CPU, CUDA or `None`) of each.
        loss_of: `loss_of(model, inputs, num_items)` computes the loss; `None` if this process can't run the model
            alone.
        prepare: Gives a batch as the model takes it.

    Returns:
        `module`, `details`, whether it was `found`, and `ids` of the bad batch, or of all if none was found.
    """
    found = {"module": "", "details": "nothing"}
    for inputs, num_items, (cpu, cuda) in batches:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        run = None if loss_of is None else lambda model, inputs, n=num_items: loss_of(model, inputs, n)
        found = first_bad_module(model, prepare(inputs), run)
        if not found["details"].startswith(("nothing", "not found")):
            return {**found, "found": True, "ids": list(inputs.get("ids", ()))}
    ids = [name for inputs, *_ in batches for name in inputs.get("ids", ())]
    return {**found, "found": False, "ids": ids}


def common_report(own: dict) -> dict:
    """One report for all processes: that of the first process that found a module, or all ids if none did.

    Args:
        own: What `look_into_batches` returned in this process.

    Returns:
        `module`, `details` and `ids`.
    """
    reports = gather_object([own])  # one per process
    for rank, report in enumerate(reports):
        if report["found"]:
            process = f" of process {rank}" if len(reports) > 1 else ""
            return {"module": report["module"], "details": report["details"] + process, "ids": report["ids"]}
    looked = [report for report in reports if report["ids"]] or reports
    ids = [name for report in looked for name in report["ids"]]
    return {"module": looked[0]["module"], "details": looked[0]["details"], "ids": ids}


__all__ = ["NonFiniteError", "common_report", "first_bad_module", "is_finite", "look_into_batches"]
