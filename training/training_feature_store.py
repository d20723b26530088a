"""Patch features on disk, in shards that several processes share: see `training_features`."""

from __future__ import annotations

import json
import os
import time
import uuid
import zlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from ..files import replacing, write_json
from .training_images import PreparedImage


logger = logging.get_logger(__name__)

SHARD_BYTES = 64 * 2**20
OPEN_SHARDS = 64  # kept open at a time
SAME_TIME_NS = 2 * 10**9  # file systems count time in steps of up to two seconds


class FeatureStore:
    """Features by image, in shards of one folder. Many processes may read and add at the same time.

    The folder is listed again only when it has changed.

    Args:
        folder: The folder.
        dtype: The dtype that features are kept in.
        max_bytes: Largest size of all shards together, in bytes. Once it is reached nothing is added: deleting the
            oldest would be worse, as every epoch reads all images in turn.
        shard_bytes: Size of a shard, in bytes.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        dtype: torch.dtype,
        max_bytes: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.folder, self.dtype, self.max_bytes, self.shard_bytes = Path(folder), dtype, max_bytes, shard_bytes
        self.full = False  # nothing is added any more
        self._shards: dict[str, dict[str, dict]] = {}  # what a shard says of its images
        self._shard_of: dict[str, str] = {}
        self._bad: set[str] = set()  # shards that are not read
        self._listed: int | None = None  # time of the folder's last change when it was listed, in nanoseconds
        self._open: OrderedDict[str, object] = OrderedDict()
        self._pending: dict[str, PreparedImage] = {}
        self._pending_bytes = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": OrderedDict()}

    def __len__(self) -> int:
        return len(self._shard_of) + len(self._pending)

    def __contains__(self, key: str) -> bool:
        if key not in self._pending and key not in self._shard_of:
            self.refresh()
        return key in self._pending or key in self._shard_of

    def write_about(self, about: dict) -> None:
        """Write what the features depend on beside them, in `about.json`, if it is not there yet."""
        path = self.folder / "about.json"
        if not path.exists():
            with FileLock(self.folder / ".lock"):  # `flush` deletes temporary files of others
                write_json(path, about, indent=1)

    def num_bytes(self) -> int:
        """Size of all shards, in bytes."""
        total = 0
        for path in self.folder.glob("shard-*.safetensors"):
            with suppress(OSError):
                total += path.stat().st_size
        return total

    def refresh(self) -> None:
        """See what other processes have added or deleted since the folder was listed last."""
        changed = os.stat(self.folder).st_mtime_ns
        if changed == self._listed:
            return
        # a change right after this one might get the same time
        self._listed = changed if time.time_ns() - changed > SAME_TIME_NS else None
        names = {
            name for name in os.listdir(self.folder) if name.startswith("shard-") and name.endswith(".safetensors")
        }
        for name in self._shards.keys() - names:
            self._forget(name)
        for name in sorted(names - self._shards.keys() - self._bad):
            try:
                with safe_open(self.folder / name, framework="pt") as file:
                    about = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
                    known = set(file.keys())
                about = {key: about[key] for key in known}
            except FileNotFoundError:  # gone meanwhile; or too many files are open, which safetensors calls the same
                self._listed = None
                continue
            except OSError as error:
                self._leave_out(name, error)
                continue
            except (SafetensorError, ValueError, KeyError) as error:
                self._delete(name, error)
                continue
            self._shards[name] = about
            self._shard_of.update(dict.fromkeys(about, name))

    def read(self, key: str) -> PreparedImage | None:
        """An image and its features; `None` if they are not there (any more)."""
        if key in self._pending:
            return self._pending[key]
        while key in self:
            name = self._shard_of[key]
            about = self._shards[name][key]
            try:
                tensor = self._opened(name).get_tensor(key)
                if tensor.dtype != self.dtype or _checksum(tensor) != about["crc32"]:
                    raise ValueError(f"the checksum of {key} is wrong")
            except FileNotFoundError:
                self._forget(name)
            except OSError as error:
                self._leave_out(name, error)
            except (SafetensorError, ValueError, KeyError) as error:
                self._delete(name, error)
            else:
                shape, size = tuple(about["pixel_shape"]), tuple(about["size"])
                return PreparedImage(shape, size, len(tensor), key, patch_features=tensor)
        return None

    def add(self, image: PreparedImage) -> None:
        """Keep an image's features; they are on disk when the shard is full, or after `flush`."""
        if self.full or image.key is None or image.key in self:
            return
        features = image.patch_features.to("cpu", self.dtype).clone(memory_format=torch.contiguous_format)
        self._pending[image.key] = replace(image, patch_features=features, pixel_values=None)
        self._pending_bytes += features.nbytes
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added to disk."""
        if not self._pending:
            return
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        name = f"shard-{uuid.uuid4().hex}.safetensors"
        try:
            with FileLock(self.folder / ".lock"):
                for leftover in self.folder.glob("*.tmp"):  # of a process that was killed: writers hold the lock
                    leftover.unlink()
                pending = self._that_fit(pending)
                if not pending:
                    return
                about = {
                    key: {"crc32": _checksum(i.patch_features), "pixel_shape": i.pixel_shape, "size": i.size}
                    for key, i in pending.items()
                }
                tensors = {key: image.patch_features for key, image in pending.items()}
                with replacing(self.folder / name) as temporary:
                    save_file(tensors, temporary, metadata={key: json.dumps(value) for key, value in about.items()})
        except (OSError, SafetensorError) as error:
            self._stop(f"{self.folder} can't be written to: {error}")
            return
        self._shards[name] = about
        self._shard_of.update(dict.fromkeys(about, name))

    def _that_fit(self, pending: dict[str, PreparedImage]) -> dict[str, PreparedImage]:
        if self.max_bytes is None:
            return pending
        room, fitting = self.max_bytes - self.num_bytes(), {}
        for key, image in pending.items():
            room -= image.patch_features.nbytes + 512  # of the shard's header
            if room < 0:
                self._stop(
                    f"{self.folder} has reached max_bytes={self.max_bytes} with "
                    f"{len(self._shard_of) + len(fitting)} images"
                )
                break
            fitting[key] = image
        return fitting

    def _stop(self, why: str) -> None:
        self.full = True
        logger.warning(f"{why}: images that are not in the cache are encoded each time that they are shown.")

    def _opened(self, name: str):
        if name not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[name] = safe_open(self.folder / name, framework="pt")
        self._open.move_to_end(name)
        return self._open[name]

    def _forget(self, name: str) -> None:
        self._listed = None
        self._open.pop(name, None)
        self._shards.pop(name, None)
        self._shard_of = {key: other for other, keys in self._shards.items() for key in keys}  # some may be there twice

    def _leave_out(self, name: str, error: OSError) -> None:
        logger.warning(f"{self.folder / name} can't be read ({error}): its images are encoded again.")
        self._forget(name)
        self._bad.add(name)

    def _delete(self, name: str, error: Exception) -> None:
        logger.warning(f"{self.folder / name} is damaged ({error}): it is deleted, and its images are encoded again.")
        self._forget(name)
        self._bad.add(name)
        with suppress(OSError):
            (self.folder / name).unlink()


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


__all__ = ["FeatureStore"]
