"""Memory and time of a full-size conversion: LLaVA-1.5-7B's own layout, of random numbers, against copying its files.

    python benchmarks/convert_streaming.py --output benchmarks/results/convert_streaming.json
    python benchmarks/convert_streaming.py --gigabytes 1   # to try it

The checkpoint has the names and shapes of `tests/convert/manifests`, with the vision tower inside, in bfloat16 or
float16, in shards; `--gigabytes` takes fewer of the language model's layers. It is converted in a separate process,
with and without `--verify`. Memory is the process's largest resident set (`VmHWM`, elsewhere `ru_maxrss`), and the part
of it that is not pages of files (`RssAnon`, sampled). If the system allows it, files are dropped from its cache before
every measurement. A run that is killed after 60 % of its bytes and then resumed is measured too.
"""

from __future__ import annotations

import datetime
import gzip
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from tokenizers import Tokenizer, models
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

import vlbridge
from vlbridge.convert.convert_writing import write_tensors


MANIFESTS = Path(__file__).resolve().parents[1] / "tests" / "convert" / "manifests"
LAYERS = 32
GIB = 1024**3
SAMPLES_PER_SECOND = 20


def manifest(name: str) -> dict[str, list]:
    return json.loads(gzip.decompress((MANIFESTS / f"llava_v1.5_7b.{name}.json.gz").read_bytes()))


def shapes_of(gigabytes: float | None) -> tuple[dict[str, tuple[int, ...]], int]:
    """Names and shapes, and the number of the language model's layers that fit into so many gigabytes; at least one."""
    whole = {
        name: tuple(shape)
        for part in ("checkpoint", "vision_tower_if_present")
        for name, (shape, _) in manifest(part).items()
    }
    layer_bytes = 2 * sum(math.prod(shape) for name, shape in whole.items() if name.startswith("model.layers.0."))
    total = 2 * sum(math.prod(shape) for shape in whole.values())
    layers = LAYERS
    if gigabytes is not None:
        layers = min(LAYERS, max(1, LAYERS - math.ceil((total - gigabytes * 1e9) / layer_bytes)))
    left_out = tuple(f"model.layers.{number}." for number in range(layers, LAYERS))
    return {name: shape for name, shape in whole.items() if not name.startswith(left_out)}, layers


def generate(folder: Path, gigabytes: float | None, dtype: torch.dtype, layout: str) -> None:
    """Write the checkpoint.

    Args:
        folder: Where to.
        gigabytes: About how large; `None` takes all.
        dtype: Of its tensors.
        layout: `"safetensors"`, or `"bin"`: `pytorch_model-*.bin`, as LLaVA-1.5's releases.
    """
    shapes, layers = shapes_of(gigabytes)
    generator = torch.Generator().manual_seed(0)
    block = 2**22
    noise = torch.randn(2 * block, generator=generator).mul_(0.02).to(dtype)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        """The same numbers again and again, from another place on."""
        start = int(torch.randint(block, (1,), generator=generator))
        data = torch.empty(math.prod(shape), dtype=dtype)
        for part in data.split(block):
            part.copy_(noise[start : start + len(part)])
        return data.reshape(shape)

    folder.mkdir(parents=True)
    if layout == "safetensors":
        entries = [(name, shape, dtype, lambda shape=shape: random(shape)) for name, shape in shapes.items()]
        write_tensors(folder, entries, shard_bytes=5 * 10**9)
        (folder / ".finished.json").unlink()
    else:
        names = list(shapes)
        number = math.ceil(2 * sum(map(math.prod, shapes.values())) / 2e9)
        where = {}
        for index in range(number):
            shard = f"pytorch_model-{index + 1:05}-of-{number:05}.bin"
            of_shard = names[index * len(names) // number : (index + 1) * len(names) // number]
            torch.save({name: random(shapes[name]) for name in of_shard}, folder / shard)
            where.update(dict.fromkeys(of_shard, shard))
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        image_size=336,
    )  # fmt: skip
    vision.save_pretrained(folder / "vision")
    fields = {
        "model_type": "llava_llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_hidden_layers": layers, "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_use_im_patch_token": False, "mm_vision_tower": str(folder / "vision"),
        "image_aspect_ratio": "pad",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    words = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *(f"w{k}" for k in range(31997))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)


def forget(folder: Path) -> bool:
    """Write a folder's files out and take them from the system's cache, where it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def copy_seconds(source: Path, target: Path) -> float:
    """Copy the weights as `shutil.copyfileobj` does it, and wait until they are on the disk."""
    forget(source)
    target.mkdir()
    start = time.perf_counter()
    for path in sorted(source.iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            with open(path, "rb") as reader, open(target / path.name, "wb") as writer:
                shutil.copyfileobj(reader, writer, 2**24)
                writer.flush()
                os.fsync(writer.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


RUN = """
import json, resource, sys, time

def peak():
    try:  # ru_maxrss begins with what the parent had
        lines = open("/proc/self/status").read().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

start = time.perf_counter()
from vlbridge.convert import convert_llava
imported, before = time.perf_counter(), peak()
convert_llava(sys.argv[1], output=sys.argv[2], verify=sys.argv[3] == "verify")
done = time.perf_counter()
print(json.dumps({"import_seconds": imported - start, "seconds": done - imported, "imported_rss_bytes": before,
                  "peak_rss_bytes": peak()}))
"""


def convert(source: Path, target: Path, verify: bool, kill_at: int | None = None) -> dict:
    """Convert in a process of its own.

    Args:
        source: The checkpoint.
        target: Where to.
        verify: As for `convert_llava`.
        kill_at: Bytes after which it is killed; `None` lets it end.

    Returns:
        Seconds and bytes; empty where it was killed.
    """
    forget(source)
    command = [sys.executable, "-c", RUN, str(source), str(target), "verify" if verify else "no-verify"]
    log = target.parent / f"{target.name}.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)
    anonymous = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
            anonymous = max(anonymous, int(kilobytes) * 1024)
        except (OSError, StopIteration):  # another system, or just ended
            pass
        partial = target.parent.glob(f".{target.name}-*.partial/model*")
        if kill_at is not None and sum(path.stat().st_size for path in partial if path.exists()) > kill_at:
            process.kill()
        time.sleep(1 / SAMPLES_PER_SECOND)
    out = process.stdout.read()
    if kill_at is not None and process.returncode == -signal.SIGKILL:
        return {}
    if process.returncode or kill_at is not None:
        raise RuntimeError(f"The conversion ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    waited = time.perf_counter()
    forget(target)  # until it is on the disk, as for the copy
    found = json.loads(out.splitlines()[-1])
    found["seconds"] += time.perf_counter() - waited
    return {**found, "peak_anonymous_bytes": anonymous or None}


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    gigabytes: Annotated[float | None, typer.Option(help="About how large; the whole without it.")] = None,
    layout: Annotated[str, typer.Option(help="safetensors, or bin.")] = "bin",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "float16",
    folder: Annotated[Path | None, typer.Option(help="Where there is room for three times as much.")] = None,
) -> None:
    work = Path(tempfile.mkdtemp(prefix="convert-streaming-", dir=folder))
    try:
        source = work / "checkpoint"
        generate(source, gigabytes, getattr(torch, dtype), layout)
        size = sum(path.stat().st_size for path in source.iterdir() if path.suffix in (".safetensors", ".bin"))
        print(f"{size:,} bytes of {layout}", file=sys.stderr)
        result = {
            "date": datetime.date.today().isoformat(),
            "checkpoint": {"layout": layout, "dtype": dtype, "bytes": size,
                           "like": "llava_v1.5_7b with its vision tower"},
            "machine": {"system": platform.system(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
            "versions": {"vlbridge": vlbridge.__version__, "torch": torch.__version__,
                         "transformers": transformers.__version__},
            "files_out_of_cache_first": forget(source),
            "copy_seconds": copy_seconds(source, work / "copy"),
        }  # fmt: skip
        for name, verify in (("no_verify", False), ("verify", True)):
            found = convert(source, work / name, verify)
            found["times_copying"] = found["seconds"] / result["copy_seconds"]
            result[name] = found
            shutil.rmtree(work / name)
            print(name, json.dumps(found), file=sys.stderr)
        convert(source, work / "resumed", False, kill_at=int(0.6 * size))
        left = {
            "output_after_kill": (work / "resumed").exists(),
            "finished_shards": len(list(work.glob(".resumed-*/*.safetensors"))),
        }
        result["killed_and_resumed"] = {**left, **convert(source, work / "resumed", False)}
        print(json.dumps(result, indent=1))
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
