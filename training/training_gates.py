"""How far the gates of Perceiver-Flamingo are open, now and over a training run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..drawing import colored
from ..modeling import BridgedModel
from ..modeling.modeling_flamingo import GatedCrossAttentionLayer


KINDS = ("attention", "feed_forward")
LOGGED = re.compile(r"gates/(attention|feed_forward)/layer_(\d+)")


def gates(model: BridgedModel) -> list[dict]:
    """How far each gate is open: the tanh of its weight, from -1 to 1, 0 if it is closed.

    Args:
        model: A Perceiver-Flamingo, with adapters of PEFT, too.

    Returns:
        One row per gated layer: `layer`, the number of the decoder layer behind it, and the tanh of its `attention` and
        `feed_forward` gates.

    Raises:
        ValueError: The model has no gates.
    """
    layers = getattr(model.bridge, "cross_attention_layers", None)
    if layers is None:
        raise ValueError(
            f"A {model.config.model_type!r} model has no gates: its visual tokens stand in the prompt. Gates belong to "
            "perceiver bridges."
        )
    every = model.config.cross_attention_every_n_layers
    # gates may be sharded (FSDP2) or stand in wrappers
    layers = [module for layer in layers for module in layer.modules() if isinstance(module, GatedCrossAttentionLayer)]
    return [
        {
            "layer": (number + 1) * every - 1,
            "attention": _opened(layer.attn_gate),
            "feed_forward": _opened(layer.ff_gate),
        }
        for number, layer in enumerate(layers)
    ]


def _opened(gate: torch.nn.Module) -> float:
    weight = gate.weight.detach()
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return float(weight.float().tanh())


def gate_history(log_history: Iterable[dict]) -> list[dict]:
    """The gates over a run.

    Args:
        log_history: `trainer.state.log_history`, also that of a checkpoint's `trainer_state.json`.

    Returns:
        One row per step and gated layer: `step`, `layer`, `attention` and `feed_forward`, as from `gates`.
    """
    rows: dict[tuple[int, int], dict] = {}
    for logged in log_history:
        for name, value in logged.items():
            if match := LOGGED.fullmatch(name):
                step, layer = logged["step"], int(match.group(2))
                row = rows.setdefault((step, layer), {"step": step, "layer": layer})
                row[match.group(1)] = value
    return [rows[key] for key in sorted(rows)]


def plot_gates(axes, history: Sequence[dict], kind: str) -> None:
    """Draw the gates of one kind over a run, a line per layer.

    Args:
        axes: Of matplotlib.
        history: From `gate_history`; at least one row.
        kind: One of `KINDS`.
    """
    layers = sorted({row["layer"] for row in history})
    for number, layer in enumerate(layers):
        rows = [row for row in history if row["layer"] == layer]
        color = colored(np.array(0.15 + 0.7 * number / max(len(layers) - 1, 1))) / 255
        label = f"layer {layer}" if number in (0, len(layers) - 1) else None
        axes.plot([row["step"] for row in rows], [row[kind] for row in rows], color=color, label=label)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(title=f"tanh of the {kind.replace('_', '-')} gates", xlabel="step")
    axes.legend(fontsize=8)


__all__ = ["KINDS", "LOGGED", "gate_history", "gates", "plot_gates"]
