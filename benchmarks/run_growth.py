"""How time and memory grow with images per prompt, text, rows, shots and visual tokens: `run.py growth`.

Each curve changes one number and keeps the others. `growth` of a figure is its slope between the last two points, both
axes in logarithms: 1 is in proportion, 2 is by the square. A prompt's self-attention is by the square of its length, so
the first token may come near to 2 at long prompts; a further token, and memory, may not come above 1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from run_measure import flops, peak_memory, timed_generation
from run_models import Side, Spec, our_model, our_side
from transformers import CLIPVisionConfig, LlamaConfig


FIGURES = {"first_token_ms": "first token, ms", "token_ms": "each further token, ms", "memory_mib": "memory, MiB"}
MOST = 1.25  # growth of a further token or of memory above this is a fault
REPEATS = 3

# Per size: vision encoder, language model, values of each curve, and what is kept while another one changes.
SIZES = {
    "cpu": {
        "vision": dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768),
        "language": dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024),
        "patch": 16, "image": 112, "new_tokens": 9, "seconds": 400,
        "values": {
            "images": (1, 4, 16, 64), "text": (64, 256, 1024, 4096), "rows": (1, 4, 16), "shots": (1, 4, 16, 32),
            "visual_tokens": (16, 64, 256, 1024),
        },
    },
    "dry": {
        "vision": dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32),
        "language": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32),
        "patch": 4, "image": 8, "new_tokens": 4, "seconds": 60,
        "values": {"images": (1, 3), "text": (8, 16), "rows": (1, 2), "shots": (1, 2), "visual_tokens": (4, 16)},
    },
}  # fmt: skip
SIZES["gpu"] = {
    **SIZES["cpu"],
    "vision": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "language": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=8192),
    "patch": 14, "image": 224, "new_tokens": 17, "seconds": 240,
}  # fmt: skip
KEPT = {"images": 1, "text": 32, "rows": 1, "shots": 0}


def spec_of(family: str, size: dict, visual_tokens: int | None = None) -> Spec:
    """A model of a family; `visual_tokens` per image, or the family's usual number.

    MLP-LLaVA gets them by the size of its images, Q-Former by its queries, Perceiver by its latents.
    """
    image, options = size["image"], {"mlp": {"vision_feature_layer": -2}, "qformer": {}, "perceiver": {}}[family]
    narrow = {**size["vision"], "num_hidden_layers": 2}
    if family == "qformer":
        options["qformer_config"] = {**narrow, "num_query_tokens": visual_tokens or 32}
    elif family == "perceiver":
        options |= {"num_latents": visual_tokens or 64, "resampler_depth": 2, "cross_attention_every_n_layers": 1}
    elif visual_tokens is not None:
        image = size["patch"] * math.isqrt(visual_tokens)
    vision = {**size["vision"], "image_size": image, "patch_size": size["patch"]}
    language = {**size["language"], "vocab_size": 1024, "max_position_embeddings": 16384}
    return Spec(family, lambda: CLIPVisionConfig(**vision), lambda: LlamaConfig(**language), options)


def prompt(model, images: int, text: int, rows: int, shots: int) -> dict:
    """Random inputs: a text behind `images` images, behind `shots` examples of an image and 16 tokens each."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    side = config.image_size
    shown = [config.image_token_id] * (config.num_image_tokens(side, side) if config.visual_tokens_in_prompt else 1)
    ids = []
    for _ in range(shots):
        ids += [*shown, *torch.randint(3, 100, (16,), generator=generator).tolist()]
    ids += shown * images + torch.randint(3, 100, (text,), generator=generator).tolist()
    ids = torch.tensor([ids] * rows, device=model.device)
    pixels = torch.randn(rows * (images + shots), 3, side, side, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(model.device, model.bridge.dtype),
    }


def point(side: Side, inputs: dict, new_tokens: int) -> dict:
    """Medians of the times, memory and work at one value."""
    timed_generation(side, inputs, new_tokens)
    times = [timed_generation(side, inputs, new_tokens) for _ in range(REPEATS)]
    found = {name: round(statistics.median(each[name] for each in times), 3) for name in times[0]}
    return {
        **found,
        "memory_mib": peak_memory(lambda: side.generate(inputs, new_tokens), side.device),
        "gflop": flops(lambda: side.generate(inputs, 1)),
        "prompt_tokens": inputs["input_ids"].shape[1],
    }


def slope(points: list[dict], axis: str, figure: str) -> float | None:
    """Growth between the last two points; `None` where one of them is nothing."""
    (x0, y0), (x1, y1) = ((each[axis], each[figure] or 0) for each in points[-2:])
    return None if min(y0, y1) <= 0 else round(math.log(y1 / y0) / math.log(x1 / x0), 2)


@torch.no_grad()
def measure_growth(report: dict, size: str, device: str, dtype: torch.dtype, families: list[str], save: Callable):
    """Fill `report["curves"]`: by axis and family the points and the growth. `save` is called after each curve."""
    about, began = SIZES[size], time.monotonic()
    report |= {"curves": {}, "faults": []}
    for family in families:
        model, processor = our_model(spec_of(family, about), dtype, device)
        for axis, values in about["values"].items():
            if time.monotonic() - began > about["seconds"]:
                report["cut_short"] = True
                return
            typer.echo(f"{family} {axis} ...", err=True)
            points = []
            for value in values:
                if axis == "visual_tokens":
                    changed, _ = our_model(spec_of(family, about, value), dtype, device)
                    side, inputs = our_side(changed, None), prompt(changed, **KEPT)
                else:
                    side, inputs = our_side(model, processor), prompt(model, **{**KEPT, axis: value})
                points.append({axis: value, **point(side, inputs, about["new_tokens"])})
            growth = {name: slope(points, axis, name) for name in (*FIGURES, "gflop")}
            report["curves"].setdefault(axis, {})[family] = {"points": points, "growth": growth}
            report["faults"] += [
                f"{family}, {axis}: {FIGURES[name]} grows with the power {growth[name]}"
                for name in ("token_ms", "memory_mib")
                if growth[name] is not None and growth[name] > MOST
            ]
            save()


def draw_growth(report: dict, path: Path) -> None:
    """A row per axis, a column per figure, a line per family."""
    from matplotlib.figure import Figure

    curves = report["curves"]
    figure = Figure(figsize=(10, 2.3 * len(curves)), layout="constrained")
    grid = figure.subplots(len(curves), len(FIGURES), squeeze=False)
    for row, (axis, families) in zip(grid, curves.items()):
        for axes, (name, label) in zip(row, FIGURES.items()):
            for family, curve in families.items():
                points = [each for each in curve["points"] if each[name]]
                axes.plot([each[axis] for each in points], [each[name] for each in points], marker="o", label=family)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel(axis.replace("_", " "), fontsize="small")
            axes.set_title(label, fontsize="small")
            axes.tick_params(labelsize="small")
            axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def growth_table(report: dict) -> str:
    """Growth of each figure, by axis and family, as Markdown."""
    rows = [f"| {' | '.join(['what grows', 'family', *FIGURES.values()])} |", "|" + "---|" * (2 + len(FIGURES))]
    for axis, families in report["curves"].items():
        ends = [each[axis] for each in next(iter(families.values()))["points"][-2:]]
        for family, curve in families.items():
            found = ["-" if curve["growth"][name] is None else f"{curve['growth'][name]:.2f}" for name in FIGURES]
            rows.append(f"| {axis.replace('_', ' ')}, {ends[0]} to {ends[1]} | {family} | {' | '.join(found)} |")
    return "\n".join(rows) + "\n"
