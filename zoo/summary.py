"""What a bridged model consists of: parts, numbers of parameters and token budget, from its configuration alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from .compat import build_from_config
from .configuration import BridgedConfig
from .families import class_named
from .inference import bridged_config, model_source


PARTS = ("vision_model", "bridge", "language_model")


def summarize(model: str | os.PathLike | None = None) -> dict:
    """Summarize a bridged model. No weights are read.

    Args:
        model: Folder or Hub id of any model that this package registers; `None` takes the embedded bridge.

    Returns:
        A dictionary with `model`, `model_type` and `class`; `parts`, one dictionary each, with `name`, `class`,
            `model_type`, `source`, `trainable_parameters` and `parameters` (classifiers and stage 1 of Q-Former BLIP-2
            have no language model); `trainable_parameters` and `parameters` of all parts together; `image_size` in
            pixels per side; `fewest_image_tokens` and `image_tokens`, the visual tokens of one image, at least and at
            most; `prompt_tokens_per_image`, the positions that they take in the language model's input, at most;
            `context_window` and `context_left` in tokens, `None` if positions have no limit or there is no language
            model.

    Raises:
        ValueError: It is not a bridged model.
        OSError: There is no such model.
    """
    source = model_source(model)
    built = _built_without_weights(bridged_config(source))
    config = built.config
    fewest, image_tokens = config.image_token_range()
    prompt_tokens, window = 0, None
    if config.text_config is not None:
        # families that condition on visual tokens have one <image> in the prompt that stands for them
        prompt_tokens = image_tokens if config.visual_tokens_in_prompt else 1
        window = getattr(config.text_config.get_text_config(), "max_position_embeddings", None)
    return {
        "model": source,
        "model_type": config.model_type,
        "class": type(built).__name__,
        "parts": [
            _part_summary(name, getattr(built, name), config, source)
            for name in PARTS
            if getattr(built, name) is not None
        ],
        **_parameter_counts(built),
        "image_size": config.image_size,
        "fewest_image_tokens": fewest,
        "image_tokens": image_tokens,
        "prompt_tokens_per_image": prompt_tokens,
        "context_window": window,
        "context_left": None if window is None else window - prompt_tokens,
    }


def _built_without_weights(config: BridgedConfig) -> Any:
    """The model on the meta device, as the class that it was saved as."""
    saved_as = class_named((config.architectures or [""])[0])
    with torch.device("meta"):
        if saved_as is not None and saved_as.config_class is type(config):
            return build_from_config(saved_as, config)  # retrieval: its configuration is that of stage 1
        return AutoModel.from_config(config)


def _part_summary(name: str, part: Any, config: Any, source: str) -> dict:
    pin = (config.frozen_parts or {}).get(name) or {}
    origin = pin.get("source")
    if origin and pin.get("revision"):
        origin = f"{origin}@{pin['revision'][:12]}"
    return {
        "name": name,
        "class": type(part).__name__,
        "model_type": config.model_type if name == "bridge" else part.config.model_type,
        "source": source if name == "bridge" or origin is None else origin,
        **_parameter_counts(part),
    }


def _parameter_counts(module: nn.Module) -> dict[str, int]:
    parameters = list(module.parameters())
    return {
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
    }


def summary_lines(summary: dict) -> Iterator[str]:
    """A summary as text.

    Args:
        summary: From `summarize`.

    Yields:
        Its lines: a heading, a table of the parts, and the token budget.
    """
    yield f"{summary['model']}: {summary['model_type']}, {summary['class']}"
    yield ""
    rows = [("part", "class", "model type", "trainable", "parameters", "source")]
    total = {**summary, "name": "total", "class": "", "model_type": "", "source": ""}
    for part in [*summary["parts"], total]:
        counts = (f"{part[key]:,}" for key in ("trainable_parameters", "parameters"))
        rows.append((part["name"], part["class"], part["model_type"], *counts, part["source"]))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        cells = (
            cell.rjust(width) if column in (3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
    yield ""
    yield from _budget_lines(summary)


def _budget_lines(summary: dict) -> Iterator[str]:
    generates = any(part["name"] == "language_model" for part in summary["parts"])
    size, fewest, most = (summary[key] for key in ("image_size", "fewest_image_tokens", "image_tokens"))
    if fewest < most:
        yield f"visual tokens per image: {fewest} to {most} (tiles of {size} x {size} pixels)"
    else:
        in_prompt = f", {summary['prompt_tokens_per_image']} in the prompt" if generates else ""
        yield f"visual tokens per image: {most} ({size} x {size} pixels){in_prompt}"
    window, left = summary["context_window"], summary["context_left"]
    if not generates:
        yield "context window: none, because there is no language model"
    elif window is None:
        yield "context window: the language model's configuration sets no limit"
    elif left < 0:
        yield f"context window: {window:,} tokens; one image does not fit ({-left:,} too many)"
    else:
        yield f"context window: {window:,} tokens; one image leaves {left:,} ({left / window:.1%}) for text"


__all__ = ["summarize", "summary_lines"]
