"""Training steps per second and memory: uncached, cached and packed, beside a plain loop on transformers' own LLaVA.

    python benchmarks/training.py --output benchmarks/results/training.json --plot benchmarks/results/training.png
    python benchmarks/training.py --size 7b --device cuda --dtype bfloat16      # LLaVA-7B's stage 1, random weights
    python benchmarks/training.py --size tiny --rounds 2                        # to try the script
    python benchmarks/training.py --recipes small_mlp,small_qformer,small_perceiver --rounds 3 \
        --output benchmarks/results/training_memory.json                        # a step of each small recipe

Encoder and language model are frozen; what learns is the bridge, with AdamW. A step is all that training does: pictures
are opened, scaled and put in a batch with their questions, then forward, backward and the optimizer. Sides:

- transformers: `LlavaForConditionalGeneration` with `LlavaProcessor`, a row per question (MLP-LLaVA only);
- uncached: ours, also with a row per question;
- cached: patch features from `FeatureCache`, filled before;
- packed: `PackedEncoder` with `independent_turns`: the questions about a picture share it, pictures stand in one row;
- cached and packed.

All sides see the same pictures and questions. transformers' model is made of the very same frozen modules, and of a
copy of our projector. Every side's first loss has to equal that of the others: if it does not, the exit code is 1 and
nothing is timed. Then the sides take steps in turn, so that a busy moment of the machine hits all of them; medians are
shown. A sample is a question with its answer. Tokens are the language model's, padding not counted. Memory is the
largest resident set of the process during a side's steps, on a GPU the largest sum of PyTorch's allocations. FLOPs of a
step are counted by PyTorch (`FlopCounterMode`): matrix products that are really run, so none for gradients of frozen
weights.

`--recipes` measures steps of recipes instead, on the first records of their own data, in the ways of `ways_of`. Time is
the process's CPU time, which other work on the machine disturbs less. Memory is what a step needs at its peak above
what was there before it; `saved` is what waits for `backward`, by module.
"""

from __future__ import annotations

import datetime
import gc
import io
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

import psutil
import torch
import transformers
import typer
from gpu_smoke import picture, spread_weights, tokenizer_of_size, versions
from run_measure import peak_memory
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.modeling_outputs import BaseModelOutput

import vlbridge
from vlbridge import demo
from vlbridge.modeling import modeling_bridged
from vlbridge.training.training_encoding import IGNORED, encoder_for
from vlbridge.training.training_features import FeatureCache, PreparedEncoder
from vlbridge.training.training_packing import PackedEncoder, independent
from vlbridge.training.training_recipes import read_recipe
from vlbridge.training.training_run import build_trainer


ASKED = (
    ("what is shown?", "a shape"),
    ("what colour does the shape in the middle of the picture have?", "it is teal"),
    ("is there a circle?", "yes"),
    ("how many corners has it, and why is that?", "none, because a circle is round"),
)
QFORMER = {"num_query_tokens": 32, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
           "intermediate_size": 1536, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
TINY_QFORMER = {**QFORMER, "num_query_tokens": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "intermediate_size": 128}  # fmt: skip

# Parts (`None`: the embedded ones), bridges, pictures in a step, questions about each, and the longest packed row
SIZES = {
    "tiny": {
        "vision": dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, image_size=56,
                       patch_size=14),
        "language": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                         vocab_size=120),
        "bridges": {"mlp": {}, "qformer": {"qformer_config": TINY_QFORMER}, "perceiver": {"num_latents": 8,
                    "resampler_depth": 1}},
        "pictures": 2, "questions": 4, "max_tokens": 512,
    },
    "small": {
        "vision": None,
        "language": None,
        "bridges": {"mlp": {}, "qformer": {"qformer_config": QFORMER}, "perceiver": {"num_latents": 32,
                    "resampler_depth": 2, "cross_attention_every_n_layers": 4}},
        "pictures": 2, "questions": 4, "max_tokens": 512,
    },
    # CLIP ViT-L/14 at 336 pixels, LLaMA-7B, the two-layer MLP of LLaVA-1.5, one caption per picture
    "7b": {
        "vision": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                       image_size=336, patch_size=14),
        "language": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008,
                         vocab_size=32000, max_position_embeddings=4096),
        "bridges": {"mlp": {}},
        "pictures": 16, "questions": 1, "max_tokens": 2560,
    },
}  # fmt: skip
# Dense bfloat16 and float16 products per second, of NVIDIA's data sheets
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A10": 125, "T4": 65}
TOLERANCES = {"float32": 2e-4, "bfloat16": 3e-2, "float16": 5e-3}  # of the first losses, relative


class Size(str, Enum):
    tiny = "tiny"
    small = "small"
    large = "7b"


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# ---------------------------------------------------------------------- data


def record(number: int, questions: int) -> dict:
    """A picture, as a file in memory, and a conversation of questions about it."""
    buffer = io.BytesIO()
    picture(number, side=320).save(buffer, "JPEG")
    messages = []
    for turn in range(questions):
        question, answer = ASKED[(number + turn) % len(ASKED)]
        content = [{"type": "image", "text": None}] if turn == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": str(number), "images": [{"path": None, "bytes": buffer.getvalue()}], "messages": messages}


# ---------------------------------------------------------------------- models


def frozen_parts(size: dict, dtype: torch.dtype, device: str) -> dict:
    """Encoder and language model, and their tokenizer and image processor where these are not beside them."""
    if size["vision"] is None:
        return {"vision": demo.VISION, "language": demo.LANGUAGE}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            vision = CLIPVisionModel(CLIPVisionConfig(**size["vision"]))
            config = LlamaConfig(**size["language"], bos_token_id=1, eos_token_id=2, pad_token_id=0)
            language = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    for part in (vision, language):
        spread_weights(part)
    return {"vision": vision, "language": language, "tokenizer": tokenizer_of_size(size["language"]["vocab_size"])}


def our_model(bridge: str, size: dict, dtype: torch.dtype, device: str):
    torch.manual_seed(0)
    options = dict(size["bridges"][bridge])
    if bridge == "mlp" and size["vision"] is not None:
        options["vision_feature_layer"] = -2  # LLaVA's
    model, processor = vlbridge.compose(**frozen_parts(size, dtype, device), bridge=bridge, **options)
    for name, parameter in model.bridge.named_parameters():
        if name.endswith("_gate.weight"):
            nn.init.constant_(parameter, 0.5)  # shut gates would hide the picture
    model.to(device, dtype).train()
    return model, processor


class GridTower(nn.Module):
    """A CNN as transformers' LLaVA takes encoders: its grid as a sequence."""

    def __init__(self, vision_model):
        super().__init__()
        self.vision_model = vision_model

    def forward(self, pixel_values, return_dict=True, **kwargs):
        states = self.vision_model(pixel_values=pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=states, hidden_states=(states,))


def spare_token(model) -> int:
    """The id that stands for images in transformers' model: the last of the table, which has no row for `<image>`."""
    return model.get_input_embeddings().num_embeddings - 1


def native_llava(model, processor) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """transformers' LLaVA of our frozen modules, and of a copy of our projector."""
    config, grid = model.config, model.config.vision_layout == "grid"
    select = "full" if grid else "default"
    vision_config = config.vision_config
    if grid:
        vision_config = CLIPVisionConfig(hidden_size=config.vision_hidden_size, num_attention_heads=1)
    native_config = LlavaConfig(
        vision_config=vision_config, text_config=config.text_config, image_token_index=spare_token(model),
        vision_feature_layer=-1 if grid else config.vision_feature_layer, vision_feature_select_strategy=select,
    )  # fmt: skip
    with torch.device("meta"):
        native = LlavaForConditionalGeneration(native_config)
    native.model.vision_tower = GridTower(model.vision_model) if grid else model.vision_model
    native.model.language_model = model.language_model.model
    native.lm_head = model.language_model.lm_head
    weights = {name: tensor.detach().clone() for name, tensor in model.bridge.state_dict().items()}
    native.model.multi_modal_projector.load_state_dict(weights, assign=True)
    native.requires_grad_(False)
    native.model.multi_modal_projector.requires_grad_(True)
    native_processor = LlavaProcessor(
        processor.image_processor, processor.tokenizer, patch_size=config.patch_size,
        vision_feature_select_strategy=select, image_token=processor.image_token,
        num_additional_image_tokens=config.num_prefix_tokens,
    )  # fmt: skip
    return native.eval(), native_processor  # frozen parts without dropout; the projector has none


# ---------------------------------------------------------------------- sides


@dataclass
class Side:
    """One way to train.

    Args:
        name: See the module.
        model: What runs.
        trained: What learns.
        prepare: Records to model inputs.
    """

    name: str
    model: nn.Module
    trained: list[nn.Parameter]
    prepare: Callable[[list[dict]], dict]
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    flops: int = 0

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def loss(self, records: list[dict], device: str) -> torch.Tensor:
        inputs = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in self.prepare(records).items()}
        mask = inputs["attention_mask"]
        self.tokens.append(int(mask.sum() if mask.ndim == 2 else (inputs["segment_ids"] >= 0).sum()))
        return self.model(**inputs).loss

    def step(self, records: list[dict], device: str) -> float:
        loss = self.loss(records, device)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def native_side(model, processor, encoder) -> Side:
    native, native_processor = native_llava(model, processor)

    def prepare(records: list[dict]) -> dict:
        parts = [part for record in records for part in independent(record)]
        images = [image for part in parts for image in encoder.images_of(part)]
        texts, spans = zip(*(encoder.answer_spans(part["messages"]) for part in parts))
        inputs = native_processor(
            images=images, text=list(texts), padding=True, padding_side="right", return_tensors="pt",
            add_special_tokens=not texts[0].startswith(processor.tokenizer.bos_token or "\0"),
            return_offsets_mapping=True,
        )  # fmt: skip
        offsets = inputs.pop("offset_mapping")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        for row, text, answers in zip(range(len(texts)), texts, spans):
            # characters of the answer, counted from the end: placeholders of images before it were written out
            grown = int(offsets[row].max()) - len(text)
            (begin, end), *_ = answers
            outside = (offsets[row, :, 0] < begin + grown) | (offsets[row, :, 0] >= end + grown)
            labels[row, outside] = IGNORED
        ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, spare_token(model))
        return {**inputs, "input_ids": ids, "labels": labels}

    return Side("transformers", native, list(native.model.multi_modal_projector.parameters()), prepare)


def sides_of(bridge: str, size: dict, dtype: torch.dtype, device: str, folder: str, records: list[dict], only: set):
    """The sides of one family, and how long it took to fill the cache, in seconds."""
    model, processor = our_model(bridge, size, dtype, device)
    encoder = encoder_for(model, processor)
    cache = FeatureCache(model, processor, folder, dtype=str(dtype).removeprefix("torch."))
    started = time.perf_counter()
    cache.fill(records)
    filled = time.perf_counter() - started
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def ours(name: str, encode, collate, alone: bool) -> Side:
        def prepare(records: list[dict]) -> dict:
            parts = [part for record in records for part in independent(record)] if alone else records
            return collate([encode(part) for part in parts])

        return Side(name, model, trained, prepare)

    cached = PreparedEncoder(encoder, cache.store)
    packed = PackedEncoder(encoder, model, size["max_tokens"], independent_turns=True)
    both = PackedEncoder(encoder, model, size["max_tokens"], independent_turns=True, store=cache.store)
    sides = [
        ours("uncached", encoder.encode, encoder.collate, True),
        ours("cached", cached.encode, cached.collate, True),
        ours("packed", packed.encode, packed.collate, False),
        ours("cached and packed", both.encode, both.collate, False),
    ]
    if bridge == "mlp":
        sides.insert(0, native_side(model, processor, encoder))
    return [side for side in sides if not only or side.name in only], filled


# ---------------------------------------------------------------------- measuring


class PeakMemory:
    """The largest resident set of this process, or the largest sum of allocations on a GPU, in a `with` block."""

    def __init__(self, device: str):
        self.device, self.on_gpu, self.bytes = device, torch.device(device).type == "cuda", 0

    def __enter__(self):
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self._process, self._done = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __exit__(self, *error) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._done.set()
        self._thread.join()


def measure(sides: list[Side], batches: list[list[dict]], rounds: int, device: str) -> None:
    """Let the sides take steps in turn; the first step of each, with FLOPs counted, is not timed."""
    for number in range(rounds + 1):
        for side in sides:
            gc.collect()
            records = batches[number % len(batches)]
            side.tokens.clear() if number == 0 else None
            with PeakMemory(device) as memory:
                started = time.perf_counter()
                if number == 0:
                    with FlopCounterMode(display=False) as counter:
                        side.step(records, device)
                    side.flops = counter.get_total_flops()
                    continue
                side.step(records, device)
            side.seconds.append(time.perf_counter() - started)
            side.peak_bytes = max(side.peak_bytes, memory.bytes)
            print(f"  {side.name}: {side.seconds[-1]:.3g} s", file=sys.stderr, flush=True)


def check_losses(sides: list[Side], records: list[dict], device: str, tolerance: float) -> dict[str, float]:
    """The losses before any step.

    Raises:
        ValueError: They differ.
    """
    with torch.no_grad():
        losses = {side.name: float(side.loss(records, device)) for side in sides}
    middle = statistics.median(losses.values())
    if any(abs(loss - middle) > tolerance * abs(middle) for loss in losses.values()):
        raise ValueError(f"the sides have different losses: {losses}")
    return losses


def row_of(bridge: str, side: Side, samples: int, loss: float, peak_tflops: float | None) -> dict:
    seconds = statistics.median(side.seconds)
    row = {
        "family": bridge,
        "side": side.name,
        "first_loss": loss,
        "seconds_per_step": seconds,
        "seconds": side.seconds,
        "samples_per_second": samples / seconds,
        "tokens_per_second": statistics.median(side.tokens[-len(side.seconds) :]) / seconds,
        "peak_bytes": side.peak_bytes,
        "flops_per_step": side.flops,
        "tflops_per_second": side.flops / seconds / 1e12,
    }
    if peak_tflops is not None:
        row["flop_utilisation"] = row["tflops_per_second"] / peak_tflops
    return row


def table(rows: list[dict]) -> str:
    lines = [
        "| family | side | samples/s | tokens/s | TFLOP/step | utilisation | peak memory, GB |",
        "|---|---|" + "--:|" * 5,
    ]
    for row in rows:
        used = f"{row['flop_utilisation']:.1%}" if "flop_utilisation" in row else "–"
        lines.append(
            f"| {row['family']} | {row['side']} | {row['samples_per_second']:.3g} | {row['tokens_per_second']:.4g} | "
            f"{row['flops_per_step'] / 1e12:.3g} | {used} | {row['peak_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    """Samples per second and peak memory, a group of bars per family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    names = list(dict.fromkeys(row["side"] for row in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, key, scale, label in (
        (axes[0], "samples_per_second", 1, "samples per second"),
        (axes[1], "peak_bytes", 1e9, "peak memory, GB"),
    ):
        for number, name in enumerate(names):
            found = {row["family"]: row[key] / scale for row in rows if row["side"] == name}
            places = [families.index(family) + (number - (len(names) - 1) / 2) * 0.16 for family in found]
            bars = axis.bar(places, list(found.values()), width=0.15, label=name)
            axis.bar_label(bars, fmt="%.2g", fontsize=7)
        axis.set_xticks(range(len(families)), families)
        axis.set_ylabel(label)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8, frameon=False
    )
    figure.suptitle(f"Training step, {report['size']}, {report['dtype']}, {report['device']}", fontsize=10)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------- recipes


@dataclass
class Way:
    """One way to take a recipe's step.

    Args:
        name: What it is called.
        settings: Changes to the recipe; ways with the same ones share a model and take steps in turn.
        prepare: Changes the trainer until the function that it returns is called.
    """

    name: str
    settings: tuple[str, ...] = ()
    prepare: Callable = lambda trainer: lambda: None


def as_before(trainer) -> Callable:
    """All logits at once, and a boolean mask: what training did before."""
    mask = modeling_bridged.additive_mask
    trainer._without_logits = lambda inputs: inputs
    modeling_bridged.additive_mask = lambda attention_mask, hidden_states: attention_mask

    def undo() -> None:
        del trainer._without_logits
        modeling_bridged.additive_mask = mask

    return undo


def with_frozen_rows(trainer) -> Callable:
    """The special tokens' rows are not trained, so nothing below the first cross-attention is."""
    rows = trainer.bare_model.bridge.token_rows.input_rows
    rows.requires_grad_(False)
    return lambda: rows.requires_grad_(True)


def ways_of(recipe: str) -> list[Way]:
    half = ("dtype=bfloat16", "arguments.bf16=true")
    ways = [
        Way("before", prepare=as_before),
        Way("now"),
        Way("checkpointing", ("arguments.gradient_checkpointing=true",)),
        Way("bfloat16, sdpa", half),
        Way("bfloat16, eager", (*half, "attn_implementation=eager")),
    ]
    if "perceiver" in recipe:
        ways.append(Way("now, input rows frozen", prepare=with_frozen_rows))
    return ways


def take_step(trainer, batch: dict, num_items) -> float:
    loss = trainer.training_step(trainer.model, dict(batch), num_items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer._step_batches.clear()
    return float(loss)


def saved_by_module(trainer, batch: dict, num_items) -> dict[str, float]:
    """MiB that wait for `backward`, by the module that keeps them, the ten largest; layers of a kind are added up."""
    found, seen, running = Counter(), {w.untyped_storage().data_ptr() for w in trainer.model.parameters()}, [""]

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[re.sub(r"\.\d+", "", running[-1]) or "loss"] += storage.nbytes() / 2**20
        return tensor

    handles = []
    for name, module in trainer.model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, args, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda module, args, output: (running.pop(), None)[1]))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        take_step(trainer, batch, num_items)
    for handle in handles:
        handle.remove()
    return {"all": round(sum(found.values()), 1), **{name: round(size, 1) for name, size in found.most_common(10)}}


def seconds_by_operation(trainer, batch: dict, num_items) -> dict[str, float]:
    """CPU seconds of a step by PyTorch's operation, the ten that take longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        take_step(trainer, batch, num_items)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {event.key: round(event.self_cpu_time_total / 1e6, 3) for event in events[:10]}


def measure_recipe(name: str, rounds: int, folder: str, only: set, profile: bool) -> list[dict]:
    """Rows of one recipe: the steps of each way, on the same batches."""
    ways = [way for way in ways_of(name) if not only or way.name in only]
    rows = []
    for number, settings in enumerate(dict.fromkeys(way.settings for way in ways)):
        first = ["data.0.limit=48", "evaluation.0.limit=8", "samples.every=0", "arguments.use_cpu=true"]
        trainer = build_trainer(read_recipe(name, [*first, *settings]), Path(folder) / f"{name}{number}")
        rows += measure_ways(trainer, name, [way for way in ways if way.settings == settings], rounds, profile)
        gc.collect()
    return rows


def measure_ways(trainer, name: str, ways: list[Way], rounds: int, profile: bool) -> list[dict]:
    """Rows of the ways that share a trainer; each step of theirs begins with the same weights and random numbers."""
    trainer.create_optimizer_and_scheduler(rounds)
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = rounds + 1, 1
    if trainer.args.gradient_checkpointing:  # as `Trainer.train` does it
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    taken = list(itertools.islice(trainer.get_train_dataloader(), rounds + 1))
    if len(taken) < rounds + 1:
        raise ValueError(
            f"the first records of {name} make {len(taken)} batches: take at most {len(taken) - 1} --rounds"
        )
    batches = [trainer.get_batch_samples(iter([batch]), 1, trainer.args.device) for batch in taken]
    found = {way.name: {"seconds": [], "losses": [], "peaks_mib": []} for way in ways}
    for number, ((batch,), num_items) in enumerate(batches):
        start = {key: value.clone() for key, value in trainer.model.bridge.state_dict().items()}
        for way in ways:
            trainer.model.bridge.load_state_dict(start)
            torch.manual_seed(number)
            undo, row, began = way.prepare(trainer), found[way.name], time.process_time()

            def step(batch=batch, num_items=num_items, row=row) -> None:
                row["losses"].append(take_step(trainer, batch, num_items))

            if number == 0:  # then the optimizer's state and the C library's arenas are there
                row["saved_mib"] = saved_by_module(trainer, batch, num_items)
                undo()
                continue
            peak = peak_memory(step, torch.device("cpu"))
            took = time.process_time() - began
            undo()
            row["seconds"].append(took)
            row["peaks_mib"].append(peak)
            print(f"  {name}, {way.name}: {took:.3g} s of CPU, {peak} MiB", file=sys.stderr, flush=True)
    (batch,), num_items = batches[0]
    if profile:
        for way in ways:
            undo = way.prepare(trainer)
            found[way.name]["seconds_by_operation"] = seconds_by_operation(trainer, batch, num_items)
            undo()
    return [
        {
            "recipe": name, "way": way.name, "settings": list(way.settings), "places": list(batch["input_ids"].shape),
            "scored": int(batch["shift_labels"].shape[1]),
            "cpu_seconds": statistics.median(found[way.name]["seconds"]),
            "peak_mib": max(found[way.name]["peaks_mib"]), **found[way.name],
        } for way in ways
    ]  # fmt: skip


def recipes_table(rows: list[dict]) -> str:
    lines = ["| recipe | way | CPU seconds | peak of a step, MiB | of it saved for backward |", "|---|---|--:|--:|--:|"]
    lines += [
        f"| {row['recipe']} | {row['way']} | {row['cpu_seconds']:.2f} | {row['peak_mib']:.0f} | "
        f"{row['saved_mib']['all']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def measure_recipes(names: str, rounds: int, only: set, profile: bool, output: Path | None) -> None:
    """Measure the steps of recipes, write the report and print its table; rows of other ways in the file stay there."""
    report = json.loads(output.read_text()) if output is not None and output.exists() else {"rows": []}
    report |= {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "command": command_line(),
        "device": f"CPU {platform.machine()}", "threads": torch.get_num_threads(), "versions": versions(),
    }  # fmt: skip
    for name in names.split(","):
        gc.collect()
        with tempfile.TemporaryDirectory() as folder:
            rows = measure_recipe(name, rounds, folder, only, profile)
        new = {(row["recipe"], row["way"]) for row in rows}
        report["rows"] = [row for row in report["rows"] if (row["recipe"], row["way"]) not in new] + rows
        if output is not None:
            output.write_text(json.dumps(report, indent=2) + "\n")
    print(recipes_table(report["rows"]))


def command_line() -> str:
    """What was typed, without the folders of this machine."""
    arguments = [Path(argument).name if os.path.isabs(argument) else argument for argument in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/training.py", *arguments])


def main(
    size: Annotated[Size, typer.Option(help="Of the models; see SIZES.")] = Size.small,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[DType, typer.Option(help="Of all weights.")] = DType.float32,
    families: Annotated[str, typer.Option(help="By default all that the size has.")] = "",
    sides: Annotated[
        str, typer.Option(help="By default all, such as 'uncached,cached and packed'; of recipes 'before;now'.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Steps that each side is timed for.")] = 5,
    peak_tflops: Annotated[float | None, typer.Option(help="The device's, where it is not known.")] = None,
    recipes: Annotated[str, typer.Option(help="Measure steps of these recipes instead.")] = "",
    profile: Annotated[bool, typer.Option(help="Of recipes: seconds of a step by PyTorch's operation too.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the results; needs matplotlib.")] = None,
) -> None:
    """Measure training steps, ours beside transformers' own LLaVA."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device is {device}, but PyTorch sees no GPU here")
    chosen = SIZES[size.value]
    wanted = families.split(",") if families else list(chosen["bridges"])
    if unknown := sorted(set(wanted) - set(chosen["bridges"])):
        raise typer.BadParameter(
            f"--families has {', '.join(unknown)}; {size.value} has {', '.join(chosen['bridges'])}"
        )
    if rounds < 1:
        raise typer.BadParameter(f"--rounds is {rounds}; expected at least 1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    only = {side.strip() for side in sides.split(";" if recipes else ",")} - {""}
    if recipes:
        measure_recipes(recipes, rounds, only, profile, output)
        return
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}"
    if peak_tflops is None and dtype is not DType.float32:
        peak_tflops = next((peak for kind, peak in PEAK_TFLOPS.items() if kind in name), None)
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(), "device": name, "threads": torch.get_num_threads(), "versions": versions(),
        "size": size.value, "dtype": dtype.value, "pictures": chosen["pictures"], "questions": chosen["questions"],
        "max_tokens": chosen["max_tokens"], "peak_tflops": peak_tflops, "rounds": rounds, "fill_seconds": {},
        "rows": [],
    }  # fmt: skip
    pictures = chosen["pictures"]
    records = [record(number, chosen["questions"]) for number in range(2 * pictures)]
    batches = [records[:pictures], records[pictures:]]
    for bridge in wanted:
        print(f"{bridge} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            running, filled = sides_of(bridge, chosen, getattr(torch, dtype.value), device, folder, records, only)
            report["fill_seconds"][bridge] = filled
            try:
                losses = check_losses(running, batches[0], device, TOLERANCES[dtype.value])
            except ValueError as error:
                print(f"{bridge}: {error}", file=sys.stderr)
                raise typer.Exit(1) from None
            measure(running, batches, rounds, device)
            samples = pictures * chosen["questions"]
            report["rows"] += [row_of(bridge, side, samples, losses[side.name], peak_tflops) for side in running]
        del running
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        if output is not None:  # after each: a run that is cut short leaves them
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report["rows"]))
    print(f"{name}, {size.value}, {dtype.value}, {report['threads']} threads; medians of {rounds} steps")
    if plot is not None:
        draw(report, plot)


if __name__ == "__main__":
    typer.run(main)
