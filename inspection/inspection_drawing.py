"""Pictures of what the other modules compute: overlays with Pillow, figures with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .inspection_geometry import Grid, heat, seen


# Colours from nothing to most: black, violet, red, orange, pale yellow
COLORS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def colored(values: np.ndarray) -> np.ndarray:
    """Colours of numbers from 0 to 1, `(..., 3)` of 0 to 255.

    Args:
        values: `(...)`.
    """
    steps = np.linspace(0, 1, len(COLORS))
    channels = [np.interp(values, steps, [color[channel] for color in COLORS]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


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


def _figure(width: float, height: float):
    """An empty figure of matplotlib, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{error}; figures need matplotlib: pip install "vlbridge[inspect]"') from error
    return Figure(figsize=(width, height), layout="constrained")


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
    figure = _figure(8, 3.5)
    layers = sorted({row["layer"] for row in history})
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("attention", "feed_forward")):
        for number, layer in enumerate(layers):
            rows = [row for row in history if row["layer"] == layer]
            color = colored(np.array(0.15 + 0.7 * number / max(len(layers) - 1, 1))) / 255
            label = f"layer {layer}" if number in (0, len(layers) - 1) else None
            axes.plot([row["step"] for row in rows], [row[kind] for row in rows], color=color, label=label)
        for name, step in (marks or {}).items():
            axes.axvline(step, color="gray", linestyle=":")
            axes.annotate(name, (step, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right")
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set(title=f"tanh of the {kind.replace('_', '-')} gates", xlabel="step")
        axes.legend()
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
    figure = _figure(4.5, 4)
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
    figure = _figure(1.4 * columns, 1.6 * rows)
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
    figure = _figure(9, 3.5)
    axes = figure.subplots()
    for name in dict.fromkeys(row["model"] for row in limited):
        of_model = [row for row in limited if row["model"] == name]
        axes.plot([row["turn"] for row in of_model], [row["left"] for row in of_model], marker=".", label=name)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="turn", ylabel="tokens left", title="Context left for text")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the lines, which may be anywhere
    return figure


__all__ = ["colored", "draw_budget", "draw_gates", "draw_maps", "draw_similarity", "matrix", "overlay"]
