"""Unstable names of torch: reading a checkpoint's layout, devices of several CPU processes, and loader workers.

`vlbridge.compat.USED` lists the private names, which the tests check.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterable
from typing import Any

import torch
from packaging.version import Version

from .compat import version_of


# Since torch 2.7, a storage that is loaded without its bytes knows their offset in the file
_OFFSETS_ARE_KNOWN = version_of("torch") >= Version("2.7")


def load_without_weights(file: str | os.PathLike) -> Any:
    """Load a file of `torch.save` (in the zip format) without the bytes of its tensors.

    Args:
        file: Path of the file.

    Raises:
        Exception: Any error of `torch.load(weights_only=True)`.
    """
    if _OFFSETS_ARE_KNOWN:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def places_in_file(tensors: Iterable[torch.Tensor], sizes: dict[int, int]) -> list[int | None]:
    """Offsets in their file, in bytes, of tensors from `load_without_weights`; `None` for those that are unknown.

    Args:
        tensors: All tensors of one file.
        sizes: Sizes of the file's records, in bytes, by their offsets.
    """
    storages = [tensor.untyped_storage() for tensor in tensors]
    if _OFFSETS_ARE_KNOWN:
        return [getattr(storage, "_checkpoint_offset", None) for storage in storages]
    # The file is mapped at the beginning of a page: the only one for which every storage is at the offset of a record.
    begins, bases = {}, None
    for start, size in sizes.items():
        begins.setdefault(size, []).append(start)
    for storage in storages:
        if storage.nbytes():
            found = {storage.data_ptr() - start for start in begins.get(storage.nbytes(), ())}
            bases = {base for base in found if base % mmap.PAGESIZE == 0} if bases is None else bases & found
    base = next(iter(bases)) if bases is not None and len(bases) == 1 else None
    empty = begins.get(0, [None])[0]
    return [
        (None if base is None else storage.data_ptr() - base) if storage.nbytes() else empty for storage in storages
    ]


@functools.cache
def load_to_numbered_cpus() -> None:
    """Let `torch.load` of torch 2.6 map tensors to `cpu:0`, the device of a process in distributed runs on CPUs."""
    if version_of("torch") < Version("2.7"):
        torch.serialization.register_package(
            99, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
        )


def forget_loader_workers() -> None:
    """Make `datasets` ignore that this is one of several workers of a loader: the stream shards itself already."""
    torch.utils.data._utils.worker._worker_info = None


__all__ = ["forget_loader_workers", "load_to_numbered_cpus", "load_without_weights", "places_in_file"]
