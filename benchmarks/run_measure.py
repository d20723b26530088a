"""Measuring two sides in turn, for `run.py`: times, memory, what hardware allows at best, and a folder of pictures."""

from __future__ import annotations

import copy
import gc
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from gpu_smoke import TOLERANCES, picture
from PIL import Image
from run_models import Side, asked
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig, LogitsProcessor

from vlbridge.bulk import answer_batches
from vlbridge.images import read_image


REPEATS = 5
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


# ---------------------------------------------------------------------- one run


class Clock(LogitsProcessor):
    """Notes when each token is chosen; scores stay as they are."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.mark()
        return scores

    def mark(self) -> None:
        if self.on_gpu:  # an event, not the clock: nothing waits for it
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between neighbouring marks."""
        if self.on_gpu:
            torch.cuda.synchronize()
        pairs = itertools.pairwise(self.marks)
        return [a.elapsed_time(b) if self.on_gpu else 1000 * (b - a) for a, b in pairs]


def timed_generation(side: Side, inputs: dict, new_tokens: int, **options) -> dict[str, float]:
    """Milliseconds to the first token (encoder, bridge and prompt), and per token behind it (their median)."""
    clock = Clock(side.device)
    clock.mark()
    side.generate(inputs, new_tokens, logits_processor=[clock], **options)
    first, *later = clock.milliseconds()[:new_tokens]
    return {"first_token_ms": first, "token_ms": statistics.median(later)}


def timed_features(side: Side, inputs: dict) -> dict[str, float]:
    """Milliseconds in the vision encoder and in the bridge behind it."""
    clock = Clock(side.device)
    handles = [
        side.vision.register_forward_pre_hook(lambda *_: clock.mark()),
        side.vision.register_forward_hook(lambda *_: clock.mark()),
    ]
    try:
        side.features(inputs)
        clock.mark()
    finally:
        for handle in handles:
            handle.remove()
    encode, bridge = clock.milliseconds()
    return {"encode_ms": encode, "bridge_ms": bridge}


def timed_prefill(side: Side, inputs: dict) -> dict[str, float]:
    """Milliseconds to the first token when the images are encoded already; ours alone can do that."""
    images = side.features(inputs)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    clock = Clock(side.device)
    clock.mark()
    side.generate(text, 1, logits_processor=[clock], mm_encoder_outputs={"image": images})
    return {"prefill_ms": clock.milliseconds()[0]}


def alternating(sides: Sequence[Side], run: Callable[[Side], dict], repeats: int = REPEATS) -> dict[str, dict]:
    """Run all sides in turn, in the opposite order every second time.

    Returns:
        By side, by figure: the values of all repetitions.
    """
    found: dict[str, dict] = {side.name: {} for side in sides}
    for number in range(repeats):
        for side in reversed(sides) if number % 2 else sides:
            for name, value in run(side).items():
                found[side.name].setdefault(name, []).append(value)
    return found


def summary(found: dict[str, dict]) -> dict:
    """Medians of every side, and how many times as long the peer took: median, least and most of the pairs."""
    ours, *peers = found
    row = {name: {key: round(statistics.median(values), 4) for key, values in found[name].items()} for name in found}
    for peer in peers:
        ratios = {}
        for key in found[ours].keys() & found[peer].keys():
            pairs = sorted(theirs / max(own, 1e-9) for own, theirs in zip(found[ours][key], found[peer][key]))
            ratios[key] = [round(value, 3) for value in (statistics.median(pairs), pairs[0], pairs[-1])]
        row["ratio"] = dict(sorted(ratios.items()))
    return row


# ---------------------------------------------------------------------- the same tokens


def with_logits(side: Side, inputs: dict, new_tokens: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(rows, new_tokens)` and logits `(rows, new_tokens, vocabulary)`, on the CPU."""
    output = side.generate(inputs, new_tokens, output_logits=True, return_dict_in_generate=True, **options)
    return output.sequences[:, -new_tokens:].cpu(), torch.stack(output.logits, dim=1).float().cpu()


def compare(ours: tuple, theirs: tuple, dtype: str) -> dict:
    """Check that two sides say the same.

    Tokens may first differ only where the scores of both are a near tie: within twice the tolerance for logits.

    Args:
        ours: Tokens and logits of the first side.
        theirs: Those of the second.
        dtype: Key of `TOLERANCES`.

    Returns:
        The share of equal tokens, and the largest difference of logits up to a row's first other token, in standard
        deviations of the logits.

    Raises:
        ValueError: They differ.
    """
    (tokens, logits), (their_tokens, their_logits) = ours, theirs
    if tokens.shape != their_tokens.shape:
        raise ValueError(f"tokens of the shapes {tuple(tokens.shape)} and {tuple(their_tokens.shape)}")
    width = min(logits.shape[-1], their_logits.shape[-1])
    logits, their_logits = logits[..., :width], their_logits[..., :width]
    finite = logits > torch.finfo(torch.float16).min
    spread = float(logits[finite].std())
    worst = 0.0
    for row in range(len(tokens)):
        differs = (tokens[row] != their_tokens[row]).nonzero()
        until = int(differs[0]) + 1 if len(differs) else tokens.shape[1]
        gap = (logits[row, :until] - their_logits[row, :until]).abs()
        worst = max(worst, float(gap[finite[row, :until]].max()) / spread)
    share = float((tokens == their_tokens).float().mean())
    if not worst <= TOLERANCES[dtype]:  # NaN is wrong too
        raise ValueError(
            f"logits differ by {worst:.4f} of their standard deviations, tolerance {TOLERANCES[dtype]}; {share:.1%} of "
            "the tokens are equal"
        )
    if share < 1 and dtype == "float32":
        raise ValueError(f"only {share:.1%} of the tokens are equal")
    return {"equal_tokens": round(share, 4), "logits_differ_by": round(worst, 6)}


# ---------------------------------------------------------------------- memory, work and what is possible


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a run needs at its peak above what was there before it; `None` where that can't be read.

    On a GPU as PyTorch counts it; on Linux resident memory, of which a C library keeps some for later.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)

    def resident(name: str) -> int:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    if not STATUS.exists():
        return None
    release_freed_memory()
    try:
        CLEAR.write_text("5")  # sets the peak back
    except OSError:
        return None
    before = resident("VmRSS:")
    run()
    return round((resident("VmHWM:") - before) / 1024, 2)


def release_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can do that."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def flops(run: Callable[[], object]) -> float:
    """Multiplications and additions of a run, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        run()
    return round(counter.get_total_flops() / 1e9, 3)


def limits(device: torch.device, dtype: torch.dtype) -> dict:
    """What this machine does at best: copying memory in GB/s (read and written bytes), products of matrices in 10^12/s.

    Each is the best of several runs.
    """
    on_gpu = device.type == "cuda"
    size, side = (2**30, 8192) if on_gpu else (2**27, 1024)  # bytes; rows and columns
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    seconds = {}
    for name, work in (("copy", lambda: target.copy_(source)), ("product", lambda: matrix @ matrix)):
        values = []
        for _ in range(8):
            clock = Clock(device)
            clock.mark()
            work()
            clock.mark()
            values.append(clock.milliseconds()[0] / 1000)
        seconds[name] = min(values)
    return {
        "copy_gb_per_s": round(2 * size / seconds["copy"] / 1e9, 1),
        "matrix_tflop_per_s": round(2 * side**3 / seconds["product"] / 1e12, 3),
    }


def bytes_per_step(model) -> int:
    """Bytes of weights that a decoding step has to read: without tables that are only looked up, and of an
    encoder-decoder the decoder alone."""
    language_model = model.language_model
    parts = [language_model.get_decoder() if model.config.is_encoder_decoder else language_model]
    parts.append(language_model.get_output_embeddings())
    if not model.config.visual_tokens_in_prompt:
        parts.append(model.bridge.cross_attention_layers)
    tensors = {id(tensor): tensor for part in parts for tensor in part.parameters()}
    head, table = (get().weight for get in (language_model.get_output_embeddings, language_model.get_input_embeddings))
    if head is not table:
        tensors.pop(id(table), None)
    return sum(tensor.nbytes for tensor in tensors.values())


def synchronisations(side: Side, inputs: dict, new_tokens: int, **options) -> float | None:
    """How often a decoding step makes the CPU wait for the GPU; `None` without a GPU."""
    if side.device.type != "cuda":
        return None
    counts = []
    for tokens in (1, new_tokens):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                side.generate(inputs, tokens, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in found))
    return round((counts[1] - counts[0]) / (new_tokens - 1), 2)


def static_options(device: torch.device) -> dict:
    """Arguments of `generate` for a static cache and compiled steps.

    On a GPU as transformers does it by itself; elsewhere the graph is made, but no code of it.
    """
    if device.type == "cuda":
        return {"cache_implementation": "static"}
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


# ---------------------------------------------------------------------- a folder of pictures


def write_pictures(folder: Path, count: int, largest: int = 1024) -> list[Path]:
    """Pictures of mixed sizes and shapes, as JPEG and PNG files."""
    paths = []
    for number in range(count):
        width = 160 + 97 * number * 7 % (largest - 160)
        height = 120 + 61 * number * 11 % (largest * 3 // 4 - 120)
        path = folder / f"{number:04d}.{'png' if number % 5 == 0 else 'jpg'}"
        picture(number, 160).resize((width, height), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def plain_loop(side: Side, paths: Sequence[Path], prompt: str, new_tokens: int) -> list[str]:
    """What a user of transformers writes: open, process, generate and decode, one picture at a time."""
    texts = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        inputs = {name: value.to(side.device) for name, value in asked(side, [image], prompt).items()}
        ids = side.generate(with_dtype(inputs, side.dtype), new_tokens)
        texts.append(side.processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
    return texts


def our_loop(side: Side, paths: Sequence[Path], prompt: str, new_tokens: int, batch_size: int = 8) -> list[str]:
    """The functions under `vlbridge caption FOLDER`, with its defaults."""
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    answered = answer_batches(
        batches, side.model, side.processor, prompt, read=read_image, max_new_tokens=new_tokens
    )  # fmt: skip
    return [text for batch in answered for text in batch]


def with_dtype(inputs: dict, dtype: torch.dtype) -> dict:
    """Pictures in the model's precision."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def folder_rounds(
    sides: Sequence[Side], folder: Path, count: int, prompt: str, new_tokens: int, rounds: int = REPEATS
) -> Iterator[dict]:
    """Caption a folder in as many parts as rounds, each by both sides.

    Yields:
        After each round the figures so far: pictures per second, their ratio and the share of equal captions.
    """
    paths = write_pictures(folder, count)
    ours, theirs = sides
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    equal = done = 0
    for side, loop in ((ours, our_loop), (theirs, plain_loop)):
        loop(side, paths[:2], prompt, 2)
    for number in range(rounds):
        part = paths[len(paths) * number // rounds : len(paths) * (number + 1) // rounds]
        said = {}
        both = [(ours, our_loop), (theirs, plain_loop)]
        for side, loop in reversed(both) if number % 2 else both:
            began = time.perf_counter()
            said[side.name] = loop(side, part, prompt, new_tokens)
            seconds[side.name].append((time.perf_counter() - began) / len(part))
        equal += sum(map(str.__eq__, *said.values()))
        done += len(part)
        row = summary({name: {"picture_s": values} for name, values in copy.deepcopy(seconds).items()})
        rates = {name: round(1 / statistics.median(values), 3) for name, values in seconds.items()}
        yield {
            "pictures": done,
            "pictures_per_s": rates,
            "ratio": {"pictures_per_s": row["ratio"]["picture_s"]},
            "equal_captions": round(equal / done, 4),
        }
