"""Frozen means free: patch features of the frozen vision encoder, kept on disk, so that it runs once per image.

    cache = FeatureCache(model, processor, "FOLDER", dtype="float16")
    cache.fill(records)                       # with a progress bar; what is there already is not made again
    cache.get(images)                         # patch_features, from disk or made now
    encoder = PreparedEncoder(encoder, cache.store)   # samples have patch_features instead of pixel_values

Features lie in a folder that is named after everything they depend on: the encoder's tensors and configuration, which of
its layers are used, the image processor's settings, what the processor does with sizes (squares, tiles), and the dtype
that they are kept in. Within it, an image's name is the hash of its file (or of its pixels): the same picture is encoded
once however many records show it, and a changed one is encoded again.

Processes share a folder without asking each other: a shard is written under another name and renamed, and is never
changed afterwards. A killed run loses at most the shard that it was filling. Every feature is checked when it is read;
a damaged shard is deleted, and its images are encoded again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import BatchFeature, TrainerCallback
from transformers.utils import logging

from ..compat_hooks import process_images
from ..files import cache_dir
from ..images import ImageError
from ..modeling.modeling_pins import tensor_digest
from .training_records import open_image


if TYPE_CHECKING:
    from .training_encoding import Encoder


logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_BYTES = 64 * 2**20
OPEN_SHARDS = 64  # kept open at a time


# ---------------------------------------------------------------------- what features depend on


def image_key(image: dict | str | os.PathLike | Image.Image) -> str:
    """Name of an image: the hash of its file, or of its pixels.

    Args:
        image: A record's `{"path", "bytes"}`, a file, or a picture.

    Raises:
        vlbridge.images.ImageError: It can't be read.
    """
    if isinstance(image, Image.Image):
        digest = hashlib.sha256(f"{image.mode}|{image.size}|{image.getpalette()}|".encode())
        digest.update(image.tobytes())
        return digest.hexdigest()
    record = image if isinstance(image, dict) else {"path": os.fspath(image), "bytes": None}
    data = record.get("bytes")
    if data is None:
        try:
            data = Path(record["path"]).read_bytes()
        except (OSError, ValueError, TypeError):
            open_image(record)  # says what is wrong with it
            raise
    return hashlib.sha256(data).hexdigest()


def fingerprint(model, processor, dtype: torch.dtype) -> dict:
    """Everything that a feature depends on beside the image.

    The encoder is named by the tensors that are in memory, not by where they came from: what was loaded in another dtype,
    quantised or trained gives other features.

    Args:
        model: The model.
        processor: Its processor.
        dtype: What features are kept in.
    """
    config, ignored = model.config, {"_name_or_path", "transformers_version", "processor_class", "_processor_class"}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.vision_model.state_dict().items()):
        digest.update(tensor_digest(name, tensor))
    vision = {name: value for name, value in config.vision_config.to_dict().items() if name not in ignored}
    pixels = {name: value for name, value in processor.image_processor.to_dict().items() if name not in ignored}
    chosen = ("vision_feature_layer", "vision_feature_select_strategy", "pooling", "pooling_factor")
    cut = ("image_aspect_ratio", "image_grid_pinpoints", "image_size")
    about = {
        "format": 1,
        "dtype": str(dtype).removeprefix("torch."),
        "vision_sha256": digest.hexdigest(),
        "vision_config": vision,
        "features": {name: getattr(config, name, None) for name in chosen},
        "image_processor": pixels,
        "processor": {name: getattr(processor, name, None) for name in cut},
    }
    return json.loads(json.dumps(about, sort_keys=True, default=str))


# ---------------------------------------------------------------------- images between file and model


@dataclass(frozen=True)
class PreparedImage:
    """One image as a sample needs it.

    Args:
        pixel_shape: `(channels, height, width)` of what the encoder gets, in pixels.
        size: Height and width of the picture itself, in pixels.
        num_tiles: How many of `pixel_shape` the picture becomes: 1, or more at any resolution.
        key: Its name in the cache; `None` where there is none.
        patch_features: `(num_tiles, num_patches, vision_dim)`, where they are known.
        pixel_values: `(num_tiles, channels, height, width)`, where they are not.
    """

    pixel_shape: tuple[int, ...]
    size: tuple[int, int]
    num_tiles: int
    key: str | None = None
    patch_features: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None

    @property
    def bare(self) -> PreparedImage:
        """Without tensors."""
        return replace(self, patch_features=None, pixel_values=None)


def prepare_image(processor, image: Image.Image, key: str | None = None) -> PreparedImage:
    """What the processor makes of one picture."""
    inputs, _ = process_images(processor, [image], return_tensors="pt")
    pixel_values = torch.as_tensor(inputs["pixel_values"])
    shape = tuple(pixel_values.shape[1:])
    return PreparedImage(shape, (image.height, image.width), len(pixel_values), key, pixel_values=pixel_values)


def _stand_ins(processor, prepared: list[PreparedImage], default, images, **kwargs):
    """In place of a processor's `process_images`: shapes and placeholders of images that were processed before."""
    if len(shapes := {image.pixel_shape for image in prepared}) > 1:
        raise ValueError(
            f"images of one record have {sorted(shapes)} pixels behind the image processor; expected one size"
        )
    tiles = sum(image.num_tiles for image in prepared)
    # takes the room of one number, and can be cut like the pixels themselves
    inputs = BatchFeature({"pixel_values": torch.zeros(()).expand(tiles, *prepared[0].pixel_shape)})
    if getattr(processor, "image_grid_pinpoints", None) is not None:
        inputs["image_sizes"] = torch.tensor([image.size for image in prepared])
        return inputs, [processor.image_token * processor.num_image_tokens(*image.size) for image in prepared]
    if getattr(processor, "image_token", None) is None:
        return inputs, []
    return inputs, [processor.replace_image_token(inputs, image_idx=index) for index in range(len(prepared))]


class PreparedEncoder:
    """An encoder whose images are prepared apart from their text: taken from a cache where they are in it.

    Samples have `patch_features` instead of `pixel_values` then; and `images`, what is known of each of their images.
    Of a batch with images that are not in the cache (yet), `FeatureCache.complete` makes one that has features only.
    For generation, images go through the vision encoder as ever.

    Args:
        encoder: The model's encoder, from `encoder_for`.
        store: Where features are; `None` for none.
    """

    def __init__(self, encoder: Encoder, store: FeatureStore | None = None):
        self.encoder, self.store = encoder, store

    def __getattr__(self, name: str):
        if name == "encoder":  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.encoder, name)

    def prepare(self, record: dict) -> list[PreparedImage]:
        """A record's images: all with features, or all with pixels.

        Raises:
            vlbridge.images.ImageError: One of them can't be read.
        """
        keys = [None] * len(record.get("images") or [])
        if self.store is not None:
            keys = [image_key(image) for image in record.get("images") or []]
            found = [self.store.read(key) for key in keys]
            if None not in found:
                return found
        return [prepare_image(self.encoder.processor, *image) for image in zip(self.encoder.images_of(record), keys)]

    def encode_prepared(self, record: dict, prepared: list[PreparedImage]) -> dict:
        """A record's sample, its images being `prepared` already.

        Raises:
            SampleError: Nothing can be learned from it.
        """
        if not prepared:
            return {**self.encoder.encode(record), "images": []}
        processor, encoder = copy.copy(self.encoder.processor), copy.copy(self.encoder)
        processor.process_images = partial(_stand_ins, processor, prepared)
        encoder.processor = processor
        encoder.images_of = lambda record: [np.zeros((1, 1, 3), dtype=np.uint8)] * len(prepared)
        sample = encoder.encode(record)
        kept = sample.pop("pixel_values", None)
        kept, images = 0 if kept is None else len(kept), []
        for image in prepared:  # a text that was cut off has its first images only
            if sum(known.num_tiles for known in images) < kept:
                images.append(image)
        for name in ("patch_features", "pixel_values"):
            if images and getattr(images[0], name) is not None:
                sample[name] = torch.cat([getattr(image, name) for image in images])
        sample["images"] = [image.bare for image in images]
        return sample

    def encode(self, record: dict) -> dict:
        """Model inputs of one record, see `Encoder.encode`."""
        return self.encode_prepared(record, self.prepare(record))

    def collate(self, samples: list[dict]) -> dict:
        """A batch of samples, see `Encoder.collate`. `uncached`, where images are not in the cache: what they are."""
        batch = self.encoder.collate(samples)
        if self.store is not None and "pixel_values" in batch:
            known = [["patch_features" in sample] * len(sample["images"]) for sample in samples]
            images = [image for sample in samples for image in sample["images"]]
            batch["uncached"] = list(zip(images, [cached for row in known for cached in row]))
        return batch


# ---------------------------------------------------------------------- disk


class FeatureStore:
    """Features by image, in shards of one folder. Many processes may read and add at the same time.

    Args:
        folder: The folder.
        dtype: What features are kept in.
        max_bytes: Largest size of all shards together, in bytes. Then nothing is added any more: to drop the oldest would
            be worse, as every epoch asks for all images in turn.
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
        self._bad: set[str] = set()
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

    def num_bytes(self) -> int:
        """Size of all shards, in bytes."""
        total = 0
        for path in self.folder.glob("shard-*.safetensors"):
            with suppress(OSError):
                total += path.stat().st_size
        return total

    def refresh(self) -> None:
        """See what other processes have added or deleted."""
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
            except FileNotFoundError:
                continue
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                self._delete(name, error)
                continue
            self._shards[name] = about
            self._shard_of.update(dict.fromkeys(about, name))

    def read(self, key: str) -> PreparedImage | None:
        """An image and its features; `None` where they are not there (any more)."""
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
            except (SafetensorError, OSError, ValueError, KeyError) as error:
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
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
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
                name = f"shard-{temporary.stem}.safetensors"
                tensors = {key: image.patch_features for key, image in pending.items()}
                save_file(tensors, temporary, metadata={key: json.dumps(value) for key, value in about.items()})
                os.replace(temporary, self.folder / name)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
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
                    f"{self.folder} has reached max_bytes={self.max_bytes} with {len(self._shard_of) + len(fitting)} images"
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
        self._open.pop(name, None)
        self._shards.pop(name, None)
        self._shard_of = {key: other for other, keys in self._shards.items() for key in keys}  # some may be there twice

    def _delete(self, name: str, error: Exception) -> None:
        logger.warning(f"{self.folder / name} is damaged ({error}): it is deleted, and its images are encoded again.")
        self._forget(name)
        self._bad.add(name)
        with suppress(OSError):
            (self.folder / name).unlink()


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


# ---------------------------------------------------------------------- cache


class FeatureCache:
    """Patch features of images: from disk where they are there, from the vision encoder where they are not.

    Args:
        model: A bridged model, or stage 1 of Q-Former BLIP-2; it may be wrapped by PEFT.
        processor: Its processor.
        folder: Folder of all caches; by default `features` in vlbridge's own cache.
        dtype: `"float32"` is exact; `"float16"` and `"bfloat16"` take half the room.
        max_bytes: Largest size of this encoder's features on disk, in bytes.
        batch_size: Images that the encoder gets at a time.
        device: Where the encoder runs; by default where it is.

    Raises:
        ValueError: The vision encoder is trained, or `dtype` is none of these.
    """

    def __init__(
        self,
        model,
        processor,
        folder: str | os.PathLike | None = None,
        dtype: str = "float32",
        max_bytes: int | None = None,
        batch_size: int = 16,
        device: torch.device | str | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if any(parameter.requires_grad for parameter in self.model.vision_model.parameters()):
            raise ValueError("The vision encoder is trained: its features change, and can't be cached. Freeze it.")
        self.processor, self.batch_size, self.device = processor, batch_size, device
        about = fingerprint(self.model, processor, DTYPES[dtype])
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        place = (cache_dir() / "features" if folder is None else Path(folder).expanduser()) / name
        self.store = FeatureStore(place, DTYPES[dtype], max_bytes)
        if not (place / "about.json").exists():
            temporary = place / f"about.{uuid.uuid4().hex}"
            temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, place / "about.json")

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the vision encoder, `batch_size` images at a time: features in the cache's dtype, where the encoder is."""
        vision_model = self.model.vision_model
        if self.device is not None:
            vision_model.to(self.device)
        device = next(vision_model.parameters()).device
        batches = [self.model.get_patch_features(batch.to(device)) for batch in pixel_values.split(self.batch_size)]
        return torch.cat(batches).to(self.store.dtype)

    def _encode_all(self, images: list[PreparedImage]) -> list[PreparedImage]:
        """Images with pixels to images with features; these are added."""
        by_shape: dict[tuple, list[PreparedImage]] = {}
        for image in images:
            by_shape.setdefault(image.pixel_shape, []).append(image)
        made = {}
        for group in by_shape.values():
            features = self.encode(torch.cat([image.pixel_values for image in group])).cpu()
            for image, tiles in zip(group, features.split([image.num_tiles for image in group])):
                made[image.key] = replace(image, patch_features=tiles, pixel_values=None)
                self.store.add(made[image.key])
        return [made[image.key] for image in images]

    def get(self, images: Iterable) -> torch.Tensor:
        """Patch features of images, made and added where they are not there.

        Args:
            images: Files, pictures, or records' `{"path", "bytes"}`.

        Returns:
            `(num_images, num_patches, vision_dim)` in the cache's dtype, as the model takes it for `patch_features`; at
            any resolution `(num_tiles, num_patches, vision_dim)`, the tiles of all images one after the other.

        Raises:
            vlbridge.images.ImageError: One can't be read.
        """
        images = list(images)
        found = {}
        missing: dict[str, PreparedImage] = {}
        keys = [image_key(image) for image in images]
        for key, image in zip(keys, images):
            if key in found or key in missing:
                continue
            if (known := self.store.read(key)) is not None:
                found[key] = known
            else:
                missing[key] = prepare_image(self.processor, _opened(image), key)
        found.update((image.key, image) for image in self._encode_all(list(missing.values())))
        self.store.flush()
        return torch.cat([found[key].patch_features for key in keys])

    def fill(self, records, num_workers: int = 0, rank: int = 0, world_size: int = 1) -> dict[str, int]:
        """Make the features of all images of some records, with a progress bar.

        Args:
            records: A sequence of records, see `training_data`; several processes share it out.
            num_workers: Processes that open and scale images.
            rank: Number of this process.
            world_size: Processes.

        Returns:
            How many `images` there were, how many features were `made`, and how many images were `broken`: those are left
            to training, which counts and reports them.
        """
        mine = range(rank, len(records), world_size)
        loader = DataLoader(
            _Missing(records, mine, self.processor, self.store),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_unchanged,
        )
        counts, waiting = {"images": 0, "made": 0, "broken": 0}, {}

        def encode_waiting():
            counts["made"] += len(self._encode_all(list(waiting.values())))
            waiting.clear()

        for images, broken in tqdm(loader, total=len(mine), desc="image features", unit="record", disable=rank > 0):
            counts["images"] += len(images) + broken
            counts["broken"] += broken
            for image in images:
                if image.pixel_values is not None and image.key not in waiting and image.key not in self.store:
                    waiting[image.key] = image
            if sum(image.num_tiles for image in waiting.values()) >= self.batch_size:
                encode_waiting()
            if self.store.full:
                break
        if waiting and not self.store.full:
            encode_waiting()
        self.store.flush()
        return counts

    def complete(self, batch: dict) -> dict:
        """A batch of a `PreparedEncoder` with the features that it lacks; they are made and added.

        Args:
            batch: The batch; where `uncached` is not in it, it stays as it is.
        """
        if "uncached" not in batch:
            return batch
        batch = dict(batch)
        images, pixel_values = batch.pop("uncached"), batch.pop("pixel_values")
        made = self.encode(pixel_values)
        known = batch.get("patch_features", made[:0]).to(made.device)
        pieces = []
        for image, cached in images:
            count = image.num_tiles
            if cached:
                piece, known = known[:count], known[count:]
            else:
                piece, made = made[:count], made[count:]
                self.store.add(replace(image, patch_features=piece))
            pieces.append(piece)
        return {**batch, "patch_features": torch.cat(pieces)}


def _opened(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return open_image(image if isinstance(image, dict) else {"path": os.fspath(image), "bytes": None})


def _unchanged(item):
    return item


class _Missing(Dataset):
    """Per record: its images, prepared where they are not in the store; and how many can't be read."""

    def __init__(self, records, indices: range, processor, store: FeatureStore):
        self.records, self.indices, self.processor, self.store = records, indices, processor, store

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[list[PreparedImage], int]:
        images, broken = [], 0
        for value in self.records[self.indices[index]].get("images") or []:
            try:
                key = image_key(value)
                if key in self.store:
                    images.append(PreparedImage((), (0, 0), 0, key))
                else:
                    images.append(prepare_image(self.processor, open_image(value), key))
            except ImageError:
                broken += 1
        return images, broken


class FlushFeatures(TrainerCallback):
    """Writes to disk what training has added, with every checkpoint and at the end."""

    def __init__(self, cache: FeatureCache):
        self.cache = cache

    def on_save(self, args, state, control, **kwargs):
        self.cache.store.flush()

    on_train_end = on_save


__all__ = [
    "FeatureCache",
    "FeatureStore",
    "FlushFeatures",
    "PreparedEncoder",
    "PreparedImage",
    "fingerprint",
    "image_key",
]
