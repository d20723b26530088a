"""Pictures of what the other modules compute: overlays with Pillow, figures with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..drawing import colored, empty_figure
from ..training.training_gates import KINDS, plot_gates
from .inspection_geometry import Grid, heat, seen


def overlay(
    picture: Image.Image, weights: torch.Tensor, grids: list[Grid], strength: float = 0.65, smooth: bool = True
) -> Image.Image:
    """A picture with weights of its tokens over it; what the encoder does not see is dark.

    Args:
        picture: The picture.
        weights: `(tokens,)`; negative ones count as nothing.
        grids: Where they lie, see `inspection_geometry`.
        strength: From 0, the picture alone, to 1, the weights alone.
        smooth: Whether to interpolate between the cells' centres.

    Returns:
        A picture of the same size.
    """
    spread = heat(weights.clamp(min=0), grids, picture.size, smooth).numpy()
    values = spread / max(float(spread.max()), 1e-30)
    base = np.asarray(picture.convert("RGB")).astype(float)
    mixed = (1 - strength) * base + strength * colored(values)
    visible = seen(grids, picture.size).numpy()[..., None]
    return Image.fromarray(np.where(visible, mixed, 0.35 * base).astype(np.uint8))


def matrix(values: torch.Tensor, low: float = 0.0, high: float = 1.0, side: int = 320) -> Image.Image:
    """A heat map of a matrix, such as similarities.

    Args:
        values: `(rows, columns)`.
        low: Value of the darkest colour.
        high: Value of the brightest colour.
        side: Size of the longer side, in pixels, at least.
    """
    shares = ((values.detach().float().cpu().numpy() - low) / max(high - low, 1e-30)).clip(0, 1)
    scale = -(-side // max(shares.shape))
    return Image.fromarray(colored(shares)).resize(
        (shares.shape[1] * scale, shares.shape[0] * scale), Image.Resampling.NEAREST
    )


# ---------------------------------------------------------------------- figures


def draw_gates(history: Sequence[dict], marks: dict[str, int] | None = None):
    """Gates over a training run.

    Args:
        history: From `gate_history`.
        marks: Steps to mark with a line, by what happened there, such as `{"names colours": 400}`.

    Returns:
        A figure of matplotlib, for `savefig`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw.
    """
    if not history:
        raise ValueError("The history has no gates: train with GateLogger, and give gate_history(log_history).")
    figure = empty_figure(8, 3.5)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS):
        plot_gates(axes, history, kind)
        for name, step in (marks or {}).items():
            axes.axvline(step, color="gray", linestyle=":")
            axes.annotate(
                name, (step, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="center", fontsize=8,
                bbox={"boxstyle": "square,pad=0.2", "facecolor": "white", "edgecolor": "none"},
            )  # fmt: skip
    return figure


def draw_similarity(within: torch.Tensor, title: str = "Cosine similarity of query tokens"):
    """A heat map of a similarity matrix, with its scale.

    Args:
        within: `(num_queries, num_queries)`, of one image or a mean of several.
        title: Heading.

    Returns:
        A figure of matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = empty_figure(4.5, 4)
    axes = figure.subplots()
    shown = axes.imshow(within.detach().float().cpu().numpy(), vmin=-1, vmax=1, cmap="coolwarm")
    figure.colorbar(shown, ax=axes)
    axes.set(title=title, xlabel="query", ylabel="query")
    return figure


def draw_maps(picture: Image.Image, maps: torch.Tensor, grids: list[Grid], titles: Sequence[str], columns: int = 8):
    """One overlay per query or word.

    Args:
        picture: The picture.
        maps: `(count, tokens)`.
        grids: Where the tokens lie.
        titles: What stands above each.
        columns: Overlays per line.

    Returns:
        A figure of matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is not one title per map.
    """
    if len(maps) != len(titles) or not len(maps):
        raise ValueError(f"{len(maps)} maps and {len(titles)} titles; expected one title for each of at least one map.")
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    figure = empty_figure(1.4 * columns, 1.6 * rows)
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in places:
        axes.axis("off")
    for axes, weights, title in zip(places, maps, titles):
        axes.imshow(np.asarray(overlay(picture, weights, grids)))
        axes.set_title(title, fontsize=8)
    return figure


def draw_budget(rows: Sequence[dict]):
    """What is left of the context window, turn by turn.

    Args:
        rows: From `token_budget`.

    Returns:
        A figure of matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No row has a limit.
    """
    limited = [row for row in rows if row["left"] is not None]
    if not limited:
        raise ValueError("No row of the budget has a context window: give one, token_budget(..., window=8192).")
    figure = empty_figure(9, 3.5)
    axes = figure.subplots()
    for name in dict.fromkeys(row["model"] for row in limited):
        of_model = [row for row in limited if row["model"] == name]
        axes.plot([row["turn"] for row in of_model], [row["left"] for row in of_model], marker=".", label=name)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="turn", ylabel="tokens left", title="Context left for text")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the lines, which may be anywhere
    return figure


__all__ = ["colored", "draw_budget", "draw_gates", "draw_maps", "draw_similarity", "matrix", "overlay"]
