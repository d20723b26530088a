"""Ten bridges of three families on one vision encoder and one language model: memory, and how long a swap takes.

    python benchmarks/hot_swap.py --output benchmarks/results/hot_swap.json

EfficientNet-Lite0 and SmolLM2-135M-Instruct are loaded once. Three models (one per family) share them, and each has
several bridges, which are first written as bridge checkpoints by another process. Tensor bytes are counted once per
storage; resident memory is what the operating system reports for the process, less what it reported before anything was
loaded. A swap is `set_bridge`, without the forward pass that follows.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

import vlbridge
from vlbridge import demo


QFORMER = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 6}
BRIDGES = {
    "mlp": {
        "mlp2x": {},
        "linear": {"projector_type": "linear"},
        "mlp3x": {"projector_type": "mlp3x_gelu", "projector_hidden_size": 2048},
        "pooled": {"pooling": "pixel_shuffle", "pooling_factor": 2},
    },
    "qformer": {
        "32 queries": {"qformer_config": {**QFORMER, "num_query_tokens": 32}},
        "16 queries": {"qformer_config": {**QFORMER, "num_query_tokens": 16}},
        "12 layers": {"qformer_config": {**QFORMER, "num_query_tokens": 32, "num_hidden_layers": 12}},
    },
    "perceiver": {
        "every layer": {"resampler_depth": 1},
        "every 3rd": {"resampler_depth": 2, "cross_attention_every_n_layers": 3},
        "every 6th": {"resampler_depth": 2, "cross_attention_every_n_layers": 6},
    },
}


def write_bridges(folder: Path) -> None:
    for family, variants in BRIDGES.items():
        for name, options in variants.items():
            model, processor = vlbridge.compose(demo.VISION, demo.LANGUAGE, family, **options)
            model.save_pretrained(folder / family / name, bridge_only=True)
            processor.save_pretrained(folder / family / name)


def resident_bytes() -> int:
    """Resident memory of this process, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def tensor_bytes(modules) -> int:
    storages = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def file_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file."""
    with safe_open(path, framework="pt") as tensors:
        return sum(tensors.get_tensor(name).nbytes for name in tensors.keys())


def bridges_of(model) -> list:
    return [model.bridge, *(resident.bridge for resident in model._residents.values() if resident is not None)]


def measure(folder: Path, swaps: int) -> dict:
    """Load, swap and count, in a process that has done nothing else."""

    warm = AutoModel.from_pretrained(folder / "mlp" / "linear")  # libraries' own one-time memory
    del warm
    before = resident_bytes()
    models, sizes, steps = {}, {}, []
    parts = {}
    for family, variants in BRIDGES.items():
        for name in variants:
            path = folder / family / name
            if family not in models:
                models[family] = AutoModel.from_pretrained(path, **parts)
                parts = {part: getattr(models[family], part) for part in ("vision_model", "language_model")}
            else:
                models[family].add_bridge(name, path)
            sizes[f"{family}: {name}"] = file_bytes(path / "model.safetensors")
            steps.append({"bridges": len(sizes), "resident_bytes": resident_bytes() - before})
    part_bytes = {part: tensor_bytes([module]) for part, module in parts.items()}
    expected = sum(part_bytes.values()) + sum(sizes.values())
    modules = [*parts.values(), *(bridge for model in models.values() for bridge in bridges_of(model))]
    resident = resident_bytes() - before
    times = {}
    for family, model in models.items():
        taken = []
        for index in range(swaps):
            name = model.bridges[(index + 1) % len(model.bridges)]
            started = time.perf_counter()
            model.set_bridge(name)
            taken.append((time.perf_counter() - started) * 1e6)
        model.set_bridge("default")
        times[family] = {"median": round(statistics.median(taken), 1), "max": round(max(taken), 1), "swaps": swaps}
    picture = vlbridge.example_picture()
    forwards = {}
    with torch.no_grad():
        for family, model in models.items():
            processor = AutoProcessor.from_pretrained(folder / family / next(iter(BRIDGES[family])))
            inputs = processor(images=[picture], text=["<image>what is it?"], return_tensors="pt")
            started = time.perf_counter()
            model(**inputs)
            forwards[family] = round((time.perf_counter() - started) * 1e6)
    return {
        "part_bytes": part_bytes,
        "bridge_bytes": sizes,
        "expected_bytes": expected,
        "tensor_bytes": tensor_bytes(modules),
        "resident_bytes": resident,
        "resident_over_expected": round(resident / expected, 4),
        "steps": steps,
        "swap_microseconds": times,
        "forward_microseconds": forwards,
    }


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file to write the result to.")] = None,
    swaps: Annotated[int, typer.Option(min=1, help="Swaps per family to time.")] = 300,
    folder: Annotated[
        Path | None, typer.Option(help="Where the bridges are written; by default a temporary folder.")
    ] = None,
    stage: Annotated[str, typer.Option(hidden=True)] = "all",
) -> None:
    """Measure, and print or write the result."""
    if stage == "write":
        return write_bridges(folder)
    if stage == "measure":
        return print(json.dumps(measure(folder, swaps)))
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        command = [sys.executable, __file__, "--folder", str(place), "--swaps", str(swaps), "--stage"]
        if not (place / "perceiver" / "every 6th" / "config.json").exists():
            subprocess.run([*command, "write"], check=True)
        done = subprocess.run([*command, "measure"], check=True, stdout=subprocess.PIPE, text=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"CPU: {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": "python benchmarks/hot_swap.py --output benchmarks/results/hot_swap.json",
        **json.loads(done.stdout.splitlines()[-1]),
    }
    text = json.dumps(result, indent=2) + "\n"
    if output is None:
        print(text)
    else:
        output.write_text(text)


if __name__ == "__main__":
    typer.run(main)
