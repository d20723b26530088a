"""Milliseconds per generated token at 0 to 32 shots: our Perceiver-Flamingo and open-flamingo's own cross-attention.

    pip install --no-deps --target open_flamingo_201 open-flamingo==2.0.1 einops einops-exts
    python benchmarks/flamingo_decode.py --open-flamingo open_flamingo_201                           # CPU, float32
    python benchmarks/flamingo_decode.py --device cuda --dtype bfloat16 --size 3b --compile          # ours alone
    python benchmarks/flamingo_decode.py --size tiny --steps 4                                       # to try the script

Sides, on the same random weights (not a copy of them) and the same transformers LLaMA:

- LLM: the language model alone, on the same text;
- ours: `generate` of `PerceiverFlamingoForConditionalGeneration`;
- compiled: the same `generate` with a static cache and `torch.compile(fullgraph=True)` (with `--compile`);
- open-flamingo: `FlamingoLMMixin`, `FlamingoLayer` and `GatedCrossAttentionBlock`, imported from the folder given with
  `--open-flamingo`, in transformers' `generate`, conditioned as `Flamingo.generate` does it.

A prompt of n shots has n + 1 images, the last one being the query's: each is one `<image>` and 16 tokens of text.
Images enter as random visual tokens: no side runs a vision encoder or a Perceiver Resampler. Every side has to generate
the same tokens. First the logits of every step are compared: if they differ, the exit code is 1 and nothing is timed.
Then the sides generate in turn, so that a busy moment of the machine hits all of them. A token's time is that from one
choice of a token to the next, so prefill is not in it; medians over the steps of all rounds are shown.
"""

from __future__ import annotations

import copy
import datetime
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from gpu_smoke import TOLERANCES, spread_weights, versions
from transformers import (
    CLIPVisionConfig,
    CompileConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlbridge.configuration.configuration_flamingo import PerceiverFlamingoConfig
from vlbridge.modeling.modeling_flamingo import PerceiverFlamingoForConditionalGeneration


TEXT_PER_IMAGE = 16  # tokens
LEAST_EFFECT = 0.01  # another query image changes logits by this much at least, in their standard deviations
WARM_UP = 2  # steps of every run that don't count

# Language model, and options of the bridge. "3b" and "9b": the widths of OpenFlamingo-3B (MPT-1B) and -9B (here
# LLaMA-7B, as in its first release), with cross-attention before every layer and before every fourth one.
SIZES = {
    "small": (
        dict(hidden_size=1024, num_hidden_layers=16, num_attention_heads=16, intermediate_size=2816, vocab_size=32000),
        dict(vision_dim=1024, num_latents=64, cross_attention_every_n_layers=1),
    ),
    "3b": (
        dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=5504, vocab_size=50432),
        dict(vision_dim=1024, num_latents=64, cross_attention_every_n_layers=1),
    ),
    "9b": (
        dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000),
        dict(vision_dim=1024, num_latents=64, cross_attention_every_n_layers=4),
    ),
    "tiny": (
        dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, vocab_size=128),
        dict(vision_dim=32, num_latents=6, cross_attention_every_n_layers=2),
    ),
}  # fmt: skip

# Of one gated cross-attention layer: open-flamingo's name and ours.
NAMES = {
    "attn.norm.weight": "layer_norm.weight",
    "attn.norm.bias": "layer_norm.bias",
    "attn.to_q.weight": "query.weight",
    "attn.to_kv.weight": "key_value.weight",
    "attn.to_out.weight": "out.weight",
    "attn_gate": "attn_gate.weight",
    "ff.0.weight": "feed_forward.layer_norm.weight",
    "ff.0.bias": "feed_forward.layer_norm.bias",
    "ff.1.weight": "feed_forward.linear_in.weight",
    "ff.3.weight": "feed_forward.linear_out.weight",
    "ff_gate": "ff_gate.weight",
}

# ---------------------------------------------------------------------- models


def same_weights(language_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another language model that shares all parameters and buffers, but no hooks and no list of layers."""
    shared = itertools.chain(language_model.parameters(), language_model.buffers())
    return copy.deepcopy(language_model, {id(tensor): tensor for tensor in shared})


def random_models(size: str, dtype: torch.dtype, device: str):
    """Our model with random weights, made on the device itself.

    Returns:
        The bridged model, and two language models of the same weights that it put no hooks on.
    """
    text_options, options = SIZES[size]
    options = dict(options)
    vision_config = CLIPVisionConfig(
        hidden_size=options.pop("vision_dim"), num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        image_size=28, patch_size=14,
    )  # fmt: skip
    text_config = LlamaConfig(**text_options, max_position_embeddings=2048)
    # <image> and <|endofchunk|>: the last two rows, so that open-flamingo needs no larger tables than the LLM has
    special = [text_config.vocab_size - 2, text_config.vocab_size - 1]
    config = PerceiverFlamingoConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=special[0], special_token_ids=special,
        resampler_depth=1, **options,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            language_model = LlamaForCausalLM(text_config)
            language_model.generation_config = GenerationConfig(pad_token_id=0)  # no end: every run is as long
            unhooked = same_weights(language_model), same_weights(language_model)
            model = PerceiverFlamingoForConditionalGeneration(config, language_model=language_model)
    finally:
        torch.set_default_dtype(before)
    spread_weights(model)
    with torch.no_grad():
        rows = model.bridge.token_rows
        language_model.get_input_embeddings().weight[special] = rows.input_rows
        language_model.get_output_embeddings().weight[special] = rows.output_rows
    return model.eval(), *(part.eval().requires_grad_(False) for part in unhooked)


def import_open_flamingo(folder: Path):
    """Its modules `src.flamingo_lm` and `src.utils`, without its `__init__`, which wants open_clip.

    Args:
        folder: Where the package `open_flamingo` lies, with `einops` and `einops_exts`, unless these are installed.

    Raises:
        typer.BadParameter: It does not lie there.
    """
    if not (folder / "open_flamingo" / "src").is_dir():
        raise typer.BadParameter(f"--open-flamingo is {folder}; expected a folder with open_flamingo in it")
    sys.path.append(str(folder))
    package = sys.modules["open_flamingo"] = types.ModuleType("open_flamingo")
    package.__path__ = [str(folder / "open_flamingo")]
    return tuple(importlib.import_module(f"open_flamingo.src.{name}") for name in ("flamingo_lm", "utils"))


def open_flamingo_model(folder: Path, model: PerceiverFlamingoForConditionalGeneration, language_model):
    """`language_model` with open-flamingo's cross-attention in it, which has the weights of `model`."""
    flamingo_lm, utils = import_open_flamingo(folder)

    class Mixin(flamingo_lm.FlamingoLMMixin):
        def forward(self, input_ids, attention_mask=None, **kwargs):  # transformers 5 drops masks that mask nothing
            return super().forward(input_ids, attention_mask, **kwargs)

    utils.extend_instance(language_model, Mixin)
    language_model.set_decoder_layers_attr_name("model.layers")
    with torch.device("meta"):
        language_model.init_flamingo(
            media_token_id=model.config.image_token_id,
            lang_hidden_size=language_model.config.hidden_size,
            vis_hidden_size=model.config.vision_feature_size,
            cross_attn_every_n_layers=model.config.cross_attention_every_n_layers,
            gradient_checkpointing=False,
        )
    theirs = [block for block in language_model.gated_cross_attn_layers if block is not None]
    for block, layer in zip(theirs, model.bridge.cross_attention_layers, strict=True):
        ours = layer.state_dict()
        block.load_state_dict({name: ours[our_name] for name, our_name in NAMES.items()}, assign=True)
    return language_model.eval().requires_grad_(False)


# ---------------------------------------------------------------------- sides


@dataclass
class Prompt:
    """One row.

    Args:
        input_ids: `(1, tokens)`.
        image_features: `(num_images, num_latents, vision_dim)`.
        answer: Ids of the tokens to say.
    """

    input_ids: torch.Tensor
    image_features: torch.Tensor
    answer: list[int]

    @classmethod
    def of_shots(cls, shots: int, steps: int, model, seed: int = 0) -> Prompt:
        """As many random images as shots, and one; the answer has one token more than there are steps."""
        config, device = model.config, model.bridge.token_rows.input_rows.device
        generator = torch.Generator().manual_seed(seed)
        words = config.text_config.vocab_size - 2  # the last two are special

        def text(tokens: int) -> list[int]:
            return torch.randint(3, words, (tokens,), generator=generator).tolist()

        ids, image, end = [1], *config.special_token_ids
        for _ in range(shots):
            ids += [image, *text(TEXT_PER_IMAGE - 1), end]
        ids += [image, *text(TEXT_PER_IMAGE)]
        features = torch.randn(shots + 1, config.num_latents, config.vision_feature_size, generator=generator)
        return cls(
            torch.tensor([ids], device=device), features.to(device, model.bridge.dtype), text(steps + WARM_UP + 1)
        )


class Dictation(LogitsProcessor):
    """Has `generate` say given tokens; notes the time of each, and the scores it would have been chosen by."""

    def __init__(self, answer: list[int], device: torch.device, keep_logits: bool):
        self.answer = torch.tensor(answer, device=device)
        self.on_gpu, self.keep_logits = device.type == "cuda", keep_logits
        self.marks, self.logits = [], []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        index = len(self.marks)
        if index == len(self.answer):  # on a GPU, `generate` learns a step too late that it has finished
            return scores
        if self.on_gpu:  # an event, not the clock: `generate` need not wait for it
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        if self.keep_logits:
            self.logits.append(scores[0].clone())
        return torch.zeros_like(scores).index_fill_(1, self.answer[index : index + 1], 1.0)

    def milliseconds(self) -> list[float]:
        """Of every step that counts."""
        if self.on_gpu:
            torch.cuda.synchronize()
        pairs = itertools.pairwise(self.marks[WARM_UP:])
        return [a.elapsed_time(b) if self.on_gpu else 1000 * (b - a) for a, b in pairs]


class Side:
    """Something that generates.

    Args:
        generate: Called with a prompt and the arguments of `generate`.
        options: More of these arguments.
    """

    def __init__(self, generate: Callable, **options):
        self.call, self.options = generate, options

    def run(self, prompt: Prompt, keep_logits: bool = False) -> Dictation:
        """Say the prompt's answer."""
        dictation = Dictation(prompt.answer, prompt.input_ids.device, keep_logits)
        self.call(
            prompt,
            input_ids=prompt.input_ids,
            attention_mask=torch.ones_like(prompt.input_ids),
            logits_processor=[dictation],
            do_sample=False,
            max_new_tokens=len(prompt.answer),
            **self.options,
        )
        return dictation

    def logits(self, prompt: Prompt) -> torch.Tensor:
        """`(tokens of the answer, vocabulary)`."""
        return torch.stack(self.run(prompt, keep_logits=True).logits).float()


def sides_of(models, open_flamingo: Path | None, compiled: bool) -> dict[str, Side]:
    """All sides, by name, in the order of the table's columns."""
    model, alone, for_open_flamingo = models

    def generate_alone(prompt: Prompt, **kwargs):
        alone.generate(**kwargs)

    def generate_ours(prompt: Prompt, **kwargs):
        encoded = BaseModelOutputWithPooling(pooler_output=prompt.image_features)
        model.generate(mm_encoder_outputs={"image": encoded}, **kwargs)

    sides = {"LLM": Side(generate_alone), "ours": Side(generate_ours)}
    if compiled:
        config = CompileConfig(fullgraph=True, mode="default")
        config._compile_all_devices = True  # else `generate` compiles on accelerators only
        sides["compiled"] = Side(generate_ours, cache_implementation="static", compile_config=config)
    if open_flamingo is not None:
        theirs = open_flamingo_model(open_flamingo, model, for_open_flamingo)

        def generate_theirs(prompt: Prompt, **kwargs):  # as Flamingo.generate, which would encode pixels first
            theirs._use_cached_vision_x = True
            for layer in theirs._get_decoder_layers():
                layer.condition_vis_x(prompt.image_features[None])
            theirs.generate(**kwargs)
            theirs.clear_conditioned_layers()
            theirs._use_cached_vision_x = False

        sides["open-flamingo"] = Side(generate_theirs)
    return sides


# ---------------------------------------------------------------------- measuring


def check(sides: dict[str, Side], prompt: Prompt, other: Prompt, tolerance: float) -> dict:
    """Compare the logits of all steps with ours.

    Args:
        sides: By name.
        prompt: What to answer.
        other: The same with another query image.
        tolerance: Largest difference, in standard deviations of the logits.

    Returns:
        The logits' standard deviation, the largest difference per side, and how much the other image changes.

    Raises:
        ValueError: They differ, are no numbers, or do not depend on the image.
    """
    ours = sides["ours"].logits(prompt)
    spread = float(ours.std())
    effect = float((sides["ours"].logits(other) - ours).pow(2).mean().sqrt()) / spread
    found = {"logits_std": round(spread, 4), "effect_of_other_image": round(effect, 4), "max_abs_difference": {}}
    for name in sides.keys() - {"LLM", "ours"}:
        found["max_abs_difference"][name] = float((sides[name].logits(prompt) - ours).abs().max())
    sides["LLM"].run(prompt)  # only to have run once
    # "not <=" rather than ">": NaN is wrong
    if wrong := {name for name, value in found["max_abs_difference"].items() if not value <= tolerance * spread}:
        raise ValueError(f"{sorted(wrong)} give other logits than ours (tolerance {tolerance * spread:.2g}): {found}")
    if not effect >= LEAST_EFFECT:
        raise ValueError(f"another query image changes nothing; expected at least {LEAST_EFFECT}: {found}")
    return found


def measure(sides: dict[str, Side], shots: int, steps: int, rounds: int, model, tolerance: float) -> dict:
    """Check and time all sides at one number of shots.

    Returns:
        A row of the results.
    """
    torch.compiler.reset()  # a graph per prompt length, not one for all lengths, which would be slower
    prompt = Prompt.of_shots(shots, steps, model)
    other = copy.copy(prompt)
    other.image_features = prompt.image_features.clone()
    other.image_features[-1] = -other.image_features[-1]
    row = {"shots": shots, "images": shots + 1, "prompt_tokens": prompt.input_ids.shape[1]}
    row["check"] = check(sides, prompt, other, tolerance)
    milliseconds = {name: [] for name in sides}
    for number in range(rounds):
        for name in reversed(sides) if number % 2 else sides:
            milliseconds[name] += sides[name].run(prompt).milliseconds()
    row["ms_per_token"] = {name: round(statistics.median(values), 3) for name, values in milliseconds.items()}
    row["ms_per_token_best"] = {name: round(min(values), 3) for name, values in milliseconds.items()}
    row["ms_per_token_quartiles"] = {
        name: [round(value, 3) for value in statistics.quantiles(values)[::2]] for name, values in milliseconds.items()
    }
    return row


def add_ratios(rows: list[dict]) -> None:
    """Of each row: how many times faster ours is, and what its shots cost each side."""
    for row in rows:
        times, first = row["ms_per_token"], rows[0]["ms_per_token"]
        for name in times.keys() & {"ours", "compiled"}:
            if "open-flamingo" in times:
                row.setdefault("speedup_over_open_flamingo", {})[name] = round(times["open-flamingo"] / times[name], 3)
        row["relative_to_first_row"] = {name: round(value / first[name], 3) for name, value in times.items()}


# ---------------------------------------------------------------------- report


def command_line() -> str:
    """What was typed, without the folders of this machine."""
    arguments = [Path(argument).name if os.path.isabs(argument) else argument for argument in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/flamingo_decode.py", *arguments])


def table(rows: list[dict]) -> str:
    """One line per number of shots: milliseconds per token, and ratios."""
    names = list(rows[0]["ms_per_token"])
    ours = [name for name in names if name in ("ours", "compiled")]
    with_theirs = "open-flamingo" in names
    header = ["shots", "tokens", *(f"{name} ms" for name in names)]
    header += [f"open-flamingo / {name}" for name in ours if with_theirs]
    header += [f"{name}, to {rows[0]['shots']} shots" for name in ours]
    header += ["logits differ by"]
    lines = [header]
    for row in rows:
        line = [str(row["shots"]), str(row["prompt_tokens"]), *(f"{row['ms_per_token'][name]:.1f}" for name in names)]
        line += [f"{row['speedup_over_open_flamingo'][name]:.2f}x" for name in ours if with_theirs]
        line += [f"{row['relative_to_first_row'][name]:.2f}x" for name in ours]
        line += [f"{max(row['check']['max_abs_difference'].values(), default=0.0):.1e}"]
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def draw(report: dict, file: Path) -> None:
    """Milliseconds per token over shots."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in rows[0]["ms_per_token"]:
        shots, times = [row["shots"] for row in rows], [row["ms_per_token"][name] for row in rows]
        axes.plot(shots, times, marker="o", label=name)
        axes.annotate(f"{times[-1]:.3g}", (shots[-1], times[-1]), xytext=(6, -3), textcoords="offset points")
    axes.set_xlabel("shots")
    axes.set_ylabel("milliseconds per generated token")
    axes.set_xticks([row["shots"] for row in rows])
    axes.set_ylim(bottom=0)
    axes.set_title(f"{report['size']}, {report['dtype']}, {report['device']}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


Size = Enum("Size", {name: name for name in SIZES}, type=str)
Dtype = Enum("Dtype", {name: name for name in TOLERANCES}, type=str)


def main(
    open_flamingo: Annotated[
        Path | None, typer.Option(help="Folder with the package open_flamingo in it; without, ours alone is measured.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option()] = Dtype["float32"],
    size: Annotated[Size, typer.Option(help="Of the random models.")] = Size["small"],
    shots: Annotated[str, typer.Option(help="Numbers of shots, with commas.")] = "0,4,8,16,32",
    steps: Annotated[int, typer.Option(min=2, help="Tokens that count, per round.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side has its turn.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch on the CPU.", show_default="its own")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Ours with torch.compile too.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the results; needs matplotlib.")] = None,
) -> None:
    """Measure a decoding step at several numbers of shots, ours beside open-flamingo's."""
    try:
        numbers = sorted({int(number) for number in shots.split(",")})
    except ValueError:
        raise typer.BadParameter(f"--shots is {shots!r}; expected numbers such as 0,4,8") from None
    if numbers[0] < 0:
        raise typer.BadParameter(f"--shots is {shots!r}; expected no negative number")
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device is {device}, but PyTorch sees no GPU here")
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "size": size.value,
        "model": {"language_model": SIZES[size.value][0], "bridge": SIZES[size.value][1]},
        "dtype": dtype.value,
        "steps": steps,
        "rounds": rounds,
        "rows": [],
    }
    if open_flamingo is not None:
        found = importlib.metadata.distributions(name="open-flamingo", path=[str(open_flamingo)])
        report["versions"]["open_flamingo"] = next((package.version for package in found), None)

    models = random_models(size.value, getattr(torch, dtype.value), device)
    sides = sides_of(models, open_flamingo, compile)
    for number in numbers:
        print(f"{number} shots ...", file=sys.stderr, flush=True)
        try:
            row = measure(sides, number, steps, rounds, models[0], TOLERANCES[dtype.value])
        except ValueError as error:
            print(f"{number} shots: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        report["rows"].append(row)
        add_ratios(report["rows"])
        if output is not None:  # after each: a run that is cut short leaves them
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report["rows"]))
    print(
        f"{report['device']}, {size.value}, {dtype.value}, {report['threads']} threads; "
        f"medians of {steps * rounds} steps"
    )
    if plot is not None:
        draw(report, plot)


if __name__ == "__main__":
    typer.run(main)
