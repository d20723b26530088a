"""Writing models shard by shard, whole or not at all: two tensors lie in memory at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from ..files import move_into, read_json, replacing, sha256_of, write_json
from .convert_files import BLOCK_BYTES, DTYPE_NAMES
from .convert_tables import ConversionError


SHARD_BYTES = 2 * 1024**3
FINISHED = ".finished.json"
# a tensor to be written: its name, its shape, its dtype, and a function that loads it
Entry = tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]


def finished_shards(folder: Path) -> dict[str, dict]:
    """Bytes and SHA-256 of the files that `write_tensors` has written to a folder, by name."""
    found = read_json(folder / FINISHED)
    return found if isinstance(found, dict) else {}


@contextmanager
def output_folder(output: str | os.PathLike, key: str | None = None) -> Iterator[Path]:
    """Write a folder under a temporary name, and rename it once it is complete; on failure nothing stays behind.

    Args:
        output: The folder to write: a new one, or an empty one.
        key: Identifies what is written. If the conversion is interrupted (Ctrl-C, a killed process), its finished
            shards stay in a hidden folder beside `output`, named by the key, and the next run with the same key
            continues there.

    Yields:
        The temporary folder, to write to.

    Raises:
        ConversionError: `output` is a file or a folder that is not empty, or another process is writing the same.
    """
    target = Path(output)
    if target.is_file():
        raise ConversionError(f"{target} is a file; expected a folder to write to.")
    if (target / "config.json").exists():
        raise ConversionError(f"{target} holds a model already; choose another folder, or delete it first.")
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(f"{target} is not empty; choose another folder, or empty it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f"{secrets.token_hex(8)}.tmp" if key is None else f"{key[:16]}.partial"
    temporary = target.parent / f".{target.name}-{name}"
    temporary.mkdir(exist_ok=key is not None)  # with the permissions of any new folder: it becomes the output
    lock = _lock(temporary)
    keep = False
    try:
        finished = finished_shards(temporary)
        for path in temporary.iterdir():
            if path.name != FINISHED and path.name not in finished:
                path.unlink() if not path.is_dir() else shutil.rmtree(path)
        yield temporary
        (temporary / FINISHED).unlink(missing_ok=True)
        try:
            os.replace(temporary, target)
        except OSError:  # there is an empty folder, and this system can't replace it, or it is a link
            move_into(temporary, target)
    except KeyboardInterrupt:
        keep = key is not None and bool(finished := finished_shards(temporary))
        if keep:
            raise KeyboardInterrupt(
                f"{len(finished)} finished files stay in {temporary}: the same command continues from there."
            ) from None
        raise
    finally:
        if lock is not None:
            os.close(lock)
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """Lock a folder for this process, if the system can; closing the lock or ending the process unlocks it."""
    try:
        import fcntl
    except ImportError:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConversionError(f"Another process is writing to {folder}; wait for it.") from None
    except OSError:  # a file system without locks
        pass
    return lock


def _into_shards(tensors: Iterable[Entry], shard_bytes: int) -> list[list[tuple[Entry, int]]]:
    """Distribute tensors over files in order, each with its size in bytes."""
    shards: list[list[tuple[Entry, int]]] = [[]]
    filled = 0
    for entry in tensors:
        size = math.prod(entry[1]) * entry[2].itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((entry, size))
        filled += size
    return shards


def write_tensors(
    folder: Path,
    tensors: Iterable[Entry],
    shard_bytes: int = SHARD_BYTES,
    when_written: Callable[[Path], None] = lambda path: None,
) -> int:
    """Write tensors as `model.safetensors`, or as shards with an index; two tensors lie in memory at a time.

    Shards that are there already, according to `finished_shards` and their SHA-256, are not written again.

    Args:
        folder: The folder to write to.
        tensors: Name, shape, dtype, and a function that loads the tensor; it is called when the tensor is written.
        shard_bytes: Largest size of a shard, in bytes; a larger tensor gets a shard of its own.
        when_written: Called with the path of every shard as soon as it is complete; of those that were there, too.

    Returns:
        Bytes of all tensors together.

    Raises:
        ConversionError: A tensor does not have the shape or dtype that was announced.
    """
    shards = _into_shards(tensors, shard_bytes)
    total = sum(size for shard in shards for _, size in shard)
    weight_map, finished = {}, finished_shards(folder)
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, unit_divisor=1024) as progress:
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map.update((entry[0], name) for entry, _ in shard)
            path = folder / name
            if _is_finished(path, finished.get(name)):
                progress.update(sum(size for _, size in shard))
            else:
                with replacing(path) as temporary:
                    digest = _write_shard(temporary, shard, progress)
                finished[name] = {"bytes": path.stat().st_size, "sha256": digest}
                write_json(folder / FINISHED, finished)
            when_written(path)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return total


def _is_finished(path: Path, known: dict | None) -> bool:
    """Whether a shard is there as an earlier run has written it."""
    if known is None or not path.is_file() or path.stat().st_size != known["bytes"]:
        return False
    return sha256_of(path) == known["sha256"]


def _write_shard(path: Path, shard: list[tuple[Entry, int]], progress) -> str:
    """Write a safetensors file tensor by tensor, and return its SHA-256."""
    shard = sorted(shard, key=lambda each: -each[0][2].itemsize)  # largest items first: all are aligned
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for (name, shape, dtype, _), size in shard:
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    # the next tensor is read while one is written
    with open(path, "wb", buffering=0) as stream, ThreadPoolExecutor(1) as reader:

        def write(data) -> None:
            view = memoryview(data)
            digest.update(view)
            while len(view):
                view = view[stream.write(view) :]

        write(len(raw).to_bytes(8, "little") + raw)
        following = reader.submit(shard[0][0][3])
        for number, ((name, shape, dtype, _), size) in enumerate(shard, start=1):
            tensor = following.result().detach()
            following = reader.submit(shard[number][0][3]) if number < len(shard) else None
            if (tuple(tensor.shape), tensor.dtype) != (tuple(shape), dtype):
                raise ConversionError(
                    f"{name} is {list(tensor.shape)} of {tensor.dtype}, expected {list(shape)} of {dtype}."
                )
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, size, BLOCK_BYTES):
                write(data[start : start + BLOCK_BYTES])
            progress.update(size)
    return digest.hexdigest()


__all__ = ["SHARD_BYTES", "finished_shards", "output_folder", "write_tensors"]
