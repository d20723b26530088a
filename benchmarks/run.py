"""How fast we are beside the peers' own classes, on the same weights, in one process, in turn.

    python benchmarks/run.py cpu --output benchmarks/results/run_cpu.json     # 2 CPU cores, float32, about 10 minutes
    python benchmarks/run.py gpu --output benchmarks/results/run_gpu.json     # one H200, bfloat16, at most 8 minutes
    python benchmarks/run.py dry --output dry.json                            # tiny sizes: to try the program
    python benchmarks/run.py growth --size cpu --output benchmarks/results/growth_cpu.json

Peers are transformers' `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration` and
`Blip2ForConditionalGeneration` (OPT and T5), and open-flamingo's `Flamingo`:

    pip install --no-deps --target open_flamingo_201 open-flamingo==2.0.1 einops einops-exts

and `--open-flamingo open_flamingo_201`. Weights are random. A peer gets the same tensors as our model through the
tables of `vlbridge.convert`. First both have to say the same tokens with the same logits; a row whose tokens differ is
reported as failed and not timed. Then the sides take turns, five times, the order reversed every second time. Ratios
are of neighbouring runs: how many times as long the peer took, the median, the least and the most.

Per row: the vision encoder, the bridge, the first token (all of it: encoder, bridge, prompt), each further token, the
peak of memory above the weights, and what the hardware allows at best (`least_ms`): multiplications and additions at
the measured rate of matrix products, and for a further token the bytes of the weights that it reads at the measured
speed of copying memory. Per case a folder of pictures of mixed sizes: the functions under `vlbridge caption` beside the
loop that one writes with transformers. On a GPU also a static cache with compiled steps on both sides, and how often a
step waits for the GPU. vLLM has a comparison of its own, `benchmarks/serving.py speed`.

The file is written after each row, so a run that is cut short keeps what it has. The exit code is 1 if a case failed.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from gpu_smoke import command_line, last_lines, one_line, picture, versions
from memory import clip, eva, flan_t5, llama, opt
from run_growth import SIZES as GROWTH_SIZES
from run_growth import draw_growth, growth_table, measure_growth
from run_measure import (
    REPEATS,
    alternating,
    bytes_per_step,
    compare,
    flops,
    folder_rounds,
    limits,
    peak_memory,
    static_options,
    summary,
    synchronisations,
    timed_features,
    timed_generation,
    timed_prefill,
    with_dtype,
    with_logits,
)
from run_models import (
    Side,
    Spec,
    asked,
    find_open_flamingo,
    flamingo_inputs,
    native_side,
    open_flamingo_side,
    our_model,
    our_side,
    shared_bytes,
)
from run_report import draw, update_readme
from transformers import Blip2VisionConfig, CLIPVisionConfig, LlamaConfig, OPTConfig, T5Config


README = Path(__file__).parent / "README.md"
BLIP2 = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}  # as transformers' class reads patches
LLAVA = {"vision_feature_layer": -2}


def tiles(side: int) -> list[list[int]]:
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]


def sizes(width: int, layers: int, heads: int) -> dict:
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width)


def qformer(width: int, layers: int, heads: int, queries: int) -> dict:
    return {**BLIP2, "qformer_config": {**sizes(width, layers, heads), "num_query_tokens": queries}}


# "cpu": half of a ViT-S (196 patches; for Flamingo, with its many pictures, 49), and language models of that size.
SMALL = sizes(384, 6, 6)
TINY, WORDS = sizes(32, 2, 4), 256


def small_opt(width: int, layers: int, heads: int, words: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * width,
        word_embed_proj_dim=width, vocab_size=words, max_position_embeddings=2048,
    )  # fmt: skip


def small_t5(width: int, layers: int, heads: int, words: int) -> T5Config:
    return T5Config(
        d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=layers, num_heads=heads, vocab_size=words,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


def small_llama(parts: dict, words: int) -> LlamaConfig:
    return LlamaConfig(**parts, vocab_size=words, max_position_embeddings=4096)


SIZES: dict[str, dict[str, Spec]] = {
    "cpu": {
        "LLaVA": Spec(
            "mlp", lambda: CLIPVisionConfig(**SMALL, image_size=224, patch_size=16), lambda: small_llama(SMALL, 8192),
            LLAVA, batches=(1, 8), folder=200, seconds=160,
        ),
        "BLIP-2 OPT": Spec(
            "qformer", lambda: Blip2VisionConfig(**SMALL, image_size=224, patch_size=16),
            lambda: small_opt(384, 6, 6, 8192), qformer(384, 4, 6, 32), batches=(1, 8), folder=200, seconds=115,
        ),
        "Flamingo": Spec(
            "perceiver", lambda: CLIPVisionConfig(**SMALL, image_size=224, patch_size=32),
            lambda: small_llama(SMALL, 8192), {"cross_attention_every_n_layers": 1}, peer="open-flamingo",
            shots=(0, 4, 8, 32), seconds=150,
        ),
        "BLIP-2 T5": Spec(
            "qformer", lambda: Blip2VisionConfig(**SMALL, image_size=224, patch_size=16),
            lambda: small_t5(384, 6, 6, 8192), qformer(384, 4, 6, 32), batches=(1, 8), folder=200, seconds=115,
        ),
        "LLaVA-NeXT": Spec(
            "mlp", lambda: CLIPVisionConfig(**SMALL, image_size=224, patch_size=16), lambda: small_llama(SMALL, 8192),
            {**LLAVA, "image_grid_pinpoints": tiles(224)}, batches=(1, 2), picture=(448, 448), seconds=60,
        ),
    },
    "gpu": {
        "LLaVA 7B": Spec(
            "mlp", lambda: clip(336), lambda: llama(4096, 11008, 32, 32064), LLAVA, batches=(1, 8, 32), new_tokens=32,
            compiled=(1,), folder=100, seconds=170,
        ),
        "Flamingo 3B": Spec(
            "perceiver", lambda: clip(224), lambda: llama(2048, 8192, 24, 50304),
            {"cross_attention_every_n_layers": 1}, peer="open-flamingo", batches=(1, 8), shots=(0, 4, 8, 32),
            new_tokens=32, compiled=(1,), seconds=100,
        ),
        "BLIP-2 OPT-2.7B": Spec(
            "qformer", eva, lambda: opt(2560), BLIP2, batches=(1, 8, 32), new_tokens=32, compiled=(1,), folder=100,
            seconds=90,
        ),
        "BLIP-2 FlanT5-XL": Spec(
            "qformer", eva, lambda: flan_t5(2048, 5120, 32), BLIP2, batches=(1, 8, 32), new_tokens=32, compiled=(1,),
            seconds=60,
        ),
        "Flamingo 9B": Spec(
            "perceiver", lambda: clip(224), lambda: llama(4096, 11008, 32, 32064),
            {"cross_attention_every_n_layers": 4}, peer="open-flamingo", shots=(0, 4, 8, 32), new_tokens=32, seconds=60,
        ),
    },
    "dry": {
        "LLaVA": Spec(
            "mlp", lambda: CLIPVisionConfig(**TINY, image_size=30, patch_size=6), lambda: small_llama(TINY, WORDS),
            LLAVA, batches=(1, 3), new_tokens=6, folder=10, compiled=(1,),
        ),
        "LLaVA-NeXT": Spec(
            "mlp", lambda: CLIPVisionConfig(**TINY, image_size=30, patch_size=6), lambda: small_llama(TINY, WORDS),
            {**LLAVA, "image_grid_pinpoints": tiles(30)}, batches=(2,), new_tokens=6, picture=(60, 60),
        ),
        "BLIP-2 OPT": Spec(
            "qformer", lambda: Blip2VisionConfig(**TINY, image_size=30, patch_size=6),
            lambda: small_opt(32, 2, 4, WORDS), qformer(32, 3, 4, 5), batches=(1, 3), new_tokens=6, folder=10,
        ),
        "BLIP-2 T5": Spec(
            "qformer", lambda: Blip2VisionConfig(**TINY, image_size=30, patch_size=6),
            lambda: small_t5(32, 2, 4, WORDS), qformer(32, 3, 4, 5), batches=(1, 3), new_tokens=6,
        ),
        "Flamingo": Spec(
            "perceiver", lambda: CLIPVisionConfig(**TINY, image_size=30, patch_size=6),
            lambda: small_llama(TINY, WORDS), {"cross_attention_every_n_layers": 1}, peer="open-flamingo",
            batches=(1, 2), shots=(0, 2), new_tokens=6, compiled=(1,),
        ),
    },
}  # fmt: skip
DTYPES = {"cpu": "float32", "gpu": "bfloat16", "dry": "float32"}
SECONDS = {"cpu": 600, "gpu": 440, "dry": 300}


class OutOfTime(Exception):
    """A row would take longer than its case may."""


# ---------------------------------------------------------------------- one case


class Case:
    """A model and its peer.

    Args:
        name: Key in `SIZES`.
        spec: What to compare.
        device: Where.
        dtype: Name of the precision.
        best: From `limits`.
        deadline: When it has to be over, as `time.monotonic` counts.
        peers: Releases of the peers, `None` for one that is not installed.
    """

    def __init__(self, name: str, spec: Spec, device: str, dtype: str, best: dict, deadline: float, peers: dict):
        self.spec, self.dtype, self.best = spec, dtype, best
        self.deadline = min(deadline, time.monotonic() + spec.seconds)
        model, processor = our_model(spec, getattr(torch, dtype), device)
        self.ours = our_side(model, processor)
        self.sides = [self.ours]
        self.entry = {"case": name, "peer": spec.peer, "status": "measured", "rows": []}
        if peers[spec.peer] is None:
            self.entry["without_peer"] = f"{spec.peer} is not installed"
        elif spec.peer == "open-flamingo":
            self.sides.append(open_flamingo_side(model))
        else:
            self.sides.append(native_side(model, processor, getattr(torch, dtype), device))
        for side in self.sides[1:]:
            self.entry["shared_weights"] = round(shared_bytes(model, side.model), 4)
        self.entry["parameters"] = sum(tensor.numel() for tensor in model.parameters())
        self.entry["bytes_per_step"] = bytes_per_step(model)

    def run(self, save: Callable[[dict], None]) -> None:
        """Measure all rows, and the folder; `save` is called after each."""
        wanted = [{"shots": shots, "batch": batch} for shots in self.spec.shots for batch in self.spec.batches]
        for about in wanted or [{"batch": batch} for batch in self.spec.batches]:
            for compiled in (False, True) if about["batch"] in self.spec.compiled else (False,):
                row = {**about, **({"compiled": True} if compiled else {})}
                try:
                    row |= {"status": "measured", **(self.compiled_row(about) if compiled else self.row(about))}
                except OutOfTime as reason:
                    row |= {"status": "not measured", "reason": str(reason)}
                except (ValueError, RuntimeError) as error:  # of this row alone: other tokens, no memory left
                    row |= {"status": "failed", "reason": one_line(error)}
                    self.entry["status"] = "failed"
                    self.entry.setdefault("error", f"a row failed: {one_line(error)}")
                self.entry["rows"].append(row)
                save(self.entry)
        if self.spec.folder and len(self.sides) > 1:
            self.folder(save)

    def inputs(self, about: dict) -> dict[str, dict]:
        """Of each side, by name.

        Raises:
            ValueError: The processors make other inputs.
        """
        if "shots" in about:
            both = flamingo_inputs(self.ours.model, about["shots"], about["batch"])
            return {side.name: inputs for side, inputs in zip(self.sides, both)}
        images = [picture(number).resize(self.spec.picture) for number in range(about["batch"])]
        prompt, found = self.ours.processor.caption_prompt, {}
        for side in self.sides:
            inputs = {name: value.to(side.device) for name, value in asked(side, images, prompt).items()}
            found[side.name] = with_dtype(inputs, side.dtype)
        first = found[self.ours.name]
        for inputs in found.values():
            same = torch.equal(inputs["input_ids"], first["input_ids"])
            pixels = inputs["pixel_values"].reshape(-1), first["pixel_values"].reshape(-1)
            if not (same and pixels[0].shape == pixels[1].shape and torch.allclose(*pixels, atol=0.02)):
                raise ValueError("the two processors make other inputs of the same pictures and words")
        return found

    def check(self, sides: list[Side], inputs: dict, repeats: int = REPEATS) -> dict:
        """Compare tokens and logits, and see whether there is time for the repetitions.

        Raises:
            OutOfTime: There is not.
            ValueError: They differ.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTime("the case's time is over")
        tokens, found = self.spec.new_tokens, {}
        said = [with_logits(side, inputs[side.name], tokens) for side in sides]
        for other in said[1:]:
            found = compare(said[0], other, self.dtype)
        began = time.monotonic()
        for side in sides:
            timed_generation(side, inputs[side.name], tokens)
            timed_features(side, inputs[side.name])
        needed = (time.monotonic() - began) * repeats
        if time.monotonic() + needed > self.deadline:
            raise OutOfTime(f"it needs {needed:.0f} s, more than the case has left")
        return found

    def row(self, about: dict) -> dict:
        """One number of rows (and of shots), measured."""
        inputs, tokens = self.inputs(about), self.spec.new_tokens
        checked = self.check(self.sides, inputs)

        def once(side: Side) -> dict:
            given = inputs[side.name]
            more = timed_prefill(side, given) if "shots" in about and side is self.ours else {}
            return {**timed_generation(side, given, tokens), **timed_features(side, given), **more}

        row = {"check": checked, **summary(alternating(self.sides, once)), "memory_mib": {}, "gflop": {}}
        for side in self.sides:
            given = inputs[side.name]
            row["memory_mib"][side.name] = peak_memory(lambda s=side, g=given: s.generate(g, tokens), side.device)
            row["gflop"][side.name] = {
                "features": flops(lambda s=side, g=given: s.features(g)),
                "first_token": flops(lambda s=side, g=given: s.generate(g, 1)),
            }
        waits = {side.name: synchronisations(side, inputs[side.name], tokens) for side in self.sides}
        row["waits_per_step"] = {name: value for name, value in waits.items() if value is not None}
        row["prompt_tokens"] = inputs[self.ours.name]["input_ids"].shape[1]
        row["least_ms"] = self.least(inputs[self.ours.name], row["gflop"][self.ours.name])
        if "shots" in about:
            ours = row[self.ours.name]
            once_each = ours["encode_ms"] + ours["bridge_ms"] + ours["prefill_ms"]
            row["first_token_over_parts"] = round(ours["first_token_ms"] / once_each, 3)
        return row

    def least(self, inputs: dict, work: dict) -> dict:
        """Milliseconds that the hardware needs at best for ours."""
        pixels = inputs["pixel_values"].flatten(0, -4)
        encode = flops(lambda: self.ours.model.get_patch_features(pixels))
        rate = self.best["matrix_tflop_per_s"]  # 10^12 per second is 10^9 per millisecond
        parts = {"encode_ms": encode, "bridge_ms": work["features"] - encode, "first_token_ms": work["first_token"]}
        least = {name: round(value / rate, 4) for name, value in parts.items()}
        return {**least, "token_ms": round(self.entry["bytes_per_step"] / self.best["copy_gb_per_s"] / 1e6, 4)}

    def compiled_row(self, about: dict) -> dict:
        """The same with a static cache and compiled steps; open-flamingo can't do that."""
        torch.compiler.reset()
        inputs, tokens = self.inputs(about), self.spec.new_tokens
        static = static_options(self.ours.device)
        sides = [
            dataclasses.replace(side, options={**side.options, **static})
            for side in self.sides
            if side.name != "open-flamingo"
        ]
        if time.monotonic() > self.deadline:
            raise OutOfTime("the case's time is over")
        first_call = {}
        for side in sides:
            began = time.perf_counter()
            side.generate(inputs[side.name], tokens)
            first_call[side.name] = round(time.perf_counter() - began, 2)
        eager = with_logits(self.ours, inputs[self.ours.name], tokens)
        against_eager = compare(eager, with_logits(sides[0], inputs[self.ours.name], tokens), self.dtype)
        checked = self.check(sides, inputs)
        times = alternating(sides, lambda side: timed_generation(side, inputs[side.name], tokens))
        waits = {side.name: synchronisations(side, inputs[side.name], tokens) for side in sides}
        least = self.entry["bytes_per_step"] / self.best["copy_gb_per_s"] / 1e6
        return {
            "check": checked, "against_eager": against_eager, "first_call_s": first_call, **summary(times),
            "waits_per_step": {name: value for name, value in waits.items() if value is not None},
            "least_ms": {"token_ms": round(least, 4)},
        }  # fmt: skip

    def folder(self, save: Callable[[dict], None]) -> None:
        """Caption a folder of pictures; what is measured when time is over, stays."""
        with tempfile.TemporaryDirectory() as place:
            prompt = self.ours.processor.caption_prompt
            rounds = folder_rounds(self.sides, Path(place), self.spec.folder, prompt, self.spec.new_tokens)
            for found in rounds:
                self.entry["folder"] = found
                save(self.entry)
                if time.monotonic() > self.deadline:
                    self.entry["folder"]["cut_short"] = found["pictures"] < self.spec.folder
                    break
        if self.dtype == "float32" and self.entry["folder"]["equal_captions"] < 1:
            raise ValueError(f"only {self.entry['folder']['equal_captions']:.1%} of the captions are equal")


# ---------------------------------------------------------------------- the program


def header(size: str, device: str, open_flamingo: Path | None) -> dict:
    """What a report begins with."""
    on_gpu = torch.device(device).type == "cuda"
    try:
        vllm = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        vllm = None
    peers = {
        "transformers": transformers.__version__,
        "open-flamingo": find_open_flamingo(open_flamingo),
        "vllm": vllm,
    }
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line("benchmarks/run.py"),
        "size": size,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "dtype": DTYPES[size],
        "threads": torch.get_num_threads(),
        "load_before": [round(value, 1) for value in os.getloadavg()],  # with other work, only wide differences count
        "versions": versions(),
        "peers": peers,
        "repetitions": REPEATS,
    }


@torch.no_grad()
def measure(
    size: str, names: list[str], output: Path, device: str, open_flamingo: Path | None, seconds: float | None = None
) -> dict:  # fmt: skip
    """Run cases, and write the report after each row. Cases get longer in proportion to `seconds`.

    Returns:
        The report.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    began, seconds = time.monotonic(), seconds or SECONDS[size]
    report = header(size, device, open_flamingo)
    report |= {"limits": limits(torch.device(device), getattr(torch, DTYPES[size])), "seconds": None, "cases": []}
    output.parent.mkdir(parents=True, exist_ok=True)

    def save(entry: dict | None = None) -> None:
        report["seconds"] = round(time.monotonic() - began, 1)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for name in names:
        typer.echo(f"{name} ...", err=True)
        case, spec = None, SIZES[size][name]
        spec = dataclasses.replace(spec, seconds=spec.seconds * seconds / SECONDS[size])
        entry = {"case": name, "peer": spec.peer, "status": "not measured", "rows": []}
        started = time.monotonic()
        try:
            deadline = began + seconds
            if started > deadline:
                raise OutOfTime("the time of the run is over")
            case = Case(name, spec, device, DTYPES[size], report["limits"], deadline, report["peers"])
            entry = case.entry
            report["cases"].append(entry)
            case.run(save)
        except OutOfTime as reason:
            entry["reason"] = str(reason)
        except Exception as error:  # whatever it is: it is the result
            entry |= {"status": "failed", "error": one_line(error), "traceback": last_lines(error)}
        if entry not in report["cases"]:
            report["cases"].append(entry)
        entry["seconds"] = round(time.monotonic() - started, 1)
        save()
        del case
        gc.collect()
        torch.compiler.reset()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    return report


def finish(report: dict, output: Path, readme: Path | None) -> None:
    """Draw the picture, write the table, say what failed."""
    picture_file = None
    if any(row.get("ratio") for entry in report["cases"] for row in entry["rows"]):
        draw(report, output.with_suffix(".png"))
        picture_file = output.with_suffix(".png").name
    if readme is not None:
        update_readme(readme, report, picture_file)
    for entry in report["cases"]:
        typer.echo(f"{entry['case']}: {entry['status']} in {entry['seconds']} s {entry.get('error', '')}")
    if any(entry["status"] == "failed" for entry in report["cases"]):
        raise typer.Exit(1)


app = typer.Typer(add_completion=False, help=__doc__.partition("\n")[0], pretty_exceptions_enable=False)
CasesOption = Annotated[str | None, typer.Option(help="Names of cases, with commas.", show_default="all")]
OutputOption = Annotated[Path, typer.Option(help="JSON file; the picture goes beside it.")]
FlamingoOption = Annotated[Path | None, typer.Option(help="Folder that open-flamingo was installed to.")]
ReadmeOption = Annotated[bool, typer.Option("--readme", help="Write the table into benchmarks/README.md.")]
SecondsOption = Annotated[float, typer.Option(min=1, help="Time for all of it, such as more on a busy machine.")]


def command(size: str):
    """The sub-command of one size."""

    def run(
        output: OutputOption, cases: CasesOption = None, open_flamingo: FlamingoOption = None,
        readme: ReadmeOption = False, seconds: SecondsOption = SECONDS[size],
    ) -> None:  # fmt: skip
        known = list(SIZES[size])
        names = known if cases is None else [name.strip() for name in cases.split(",")]
        if unknown := [name for name in names if name not in known]:
            raise typer.BadParameter(f"--cases has {unknown[0]!r}; expected some of {', '.join(known)}")
        if size == "gpu" and not torch.cuda.is_available():
            raise typer.BadParameter("PyTorch sees no GPU here; try cpu or dry")
        device = "cuda" if size == "gpu" else "cpu"
        report = measure(size, names, output, device, open_flamingo, seconds)
        finish(report, output, README if readme else None)

    run.__doc__ = f"Measure the {size} sizes, in at most {SECONDS[size]} seconds."
    return run


for each in SIZES:
    app.command(each)(command(each))


@app.command()
def growth(
    output: OutputOption,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(GROWTH_SIZES)}.")] = "cpu",
    families: Annotated[str, typer.Option(help="With commas.")] = "mlp,qformer,perceiver",
) -> None:
    """Measure how time and memory grow with images, text, rows, shots and visual tokens."""
    if size not in GROWTH_SIZES:
        raise typer.BadParameter(f"--size is {size!r}; expected one of {', '.join(GROWTH_SIZES)}")
    names = [name.strip() for name in families.split(",")]
    if unknown := [name for name in names if name not in ("mlp", "qformer", "perceiver")]:
        raise typer.BadParameter(f"--families has {unknown[0]!r}; expected some of mlp, qformer, perceiver")
    if size == "gpu" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch sees no GPU here; try --size cpu")
    transformers.logging.set_verbosity_error()
    device = "cuda" if size == "gpu" else "cpu"
    report = header(size, device, None)

    def save() -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    measure_growth(report, size, device, getattr(torch, DTYPES[size]), names, save)
    save()
    draw_growth(report, output.with_suffix(".png"))
    typer.echo(growth_table(report))
    for fault in report["faults"]:
        typer.echo(f"more than in proportion: {fault}")


if __name__ == "__main__":
    app()
