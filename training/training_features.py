"""Patch features of the frozen vision encoder, kept on disk, so that it runs once per image.

    cache = FeatureCache(model, processor, "FOLDER", dtype="float16")
    cache.fill(records)                       # with a progress bar; what is there already is not made again
    cache.get(images)                         # patch_features, from disk or made now
    encoder = PreparedEncoder(encoder, cache.store)   # samples have patch_features instead of pixel_values

Features lie in a folder that is named after everything they depend on: the encoder's tensors and configuration, which
of its layers are used, the image processor's settings, what the processor does with sizes (squares, tiles), and the
dtype that they are kept in. Within it, an image's name is the hash of its file (or of its pixels): the same picture is
encoded once however many records show it, and a changed one is encoded again.

Processes share a folder without further coordination: a shard is written under another name and renamed, and is never
changed afterwards. A killed run loses at most the shard that it was filling. Every feature is checked when it is read;
a damaged shard is deleted, and its images are encoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import TrainerCallback

from ..files import cache_dir
from ..images import ImageError
from ..retrieval import encoder_facts
from .training_feature_store import FeatureStore
from .training_images import PreparedImage, image_key, prepare_image
from .training_records import open_image


if TYPE_CHECKING:
    from .training_encoding import Encoder


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def fingerprint(model, processor, dtype: torch.dtype) -> dict:
    """Everything that a feature depends on beside the image, see `encoder_facts`.

    Args:
        model: The model.
        processor: Its processor.
        dtype: The dtype that features are kept in.

    Returns:
        A dictionary that JSON can hold.
    """
    about = {"format": 1, "dtype": str(dtype).removeprefix("torch."), **encoder_facts(model, processor)}
    return json.loads(json.dumps(about, sort_keys=True, default=str))


class PreparedEncoder:
    """An encoder whose images are prepared apart from their text: taken from a cache if they are in it.

    Samples then have `patch_features` instead of `pixel_values`; and `images`, what is known of each of their images. A
    batch with images that are not in the cache (yet) is completed by `FeatureCache.complete`. For generation, images go
    through the vision encoder as usual.

    Args:
        encoder: The model's encoder, from `encoder_for`.
        store: Where the features are; `None` prepares every image.
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
        if record.get("document") is not None:
            record = self.encoder.with_few_images(record)
        keys = [None] * len(record.get("images") or [])
        if self.store is not None:
            keys = [image_key(image) for image in record.get("images") or []]
            found = [self.store.read(key) for key in keys]
            if None not in found:
                return found
        return [prepare_image(self.encoder.processor, *image) for image in zip(self.encoder.images_of(record), keys)]

    def encode_prepared(self, record: dict, prepared: list[PreparedImage]) -> dict:
        """A record's sample, if its images are prepared already.

        Args:
            record: The record.
            prepared: Its images, from `prepare`.

        Raises:
            SampleError: Nothing can be learned from it.
        """
        sample = self.encoder.encode(record, images=prepared)
        num_tiles = len(sample.get("patch_features", sample.get("pixel_values", ())))
        images: list[PreparedImage] = []
        for image in prepared:  # a text that was cut off has its first images only
            if sum(known.num_tiles for known in images) < num_tiles:
                images.append(image.bare)
        return {**sample, "images": images}

    def encode(self, record: dict) -> dict:
        """Model inputs of one record, see `Encoder.encode`."""
        return self.encode_prepared(record, self.prepare(record))

    def collate(self, samples: list[dict]) -> dict:
        """A batch of samples, see `Encoder.collate`.

        If images are not in the cache, `uncached` lists `(image, is_cached)` of all images of the batch.
        """
        batch = self.encoder.collate(samples)
        if self.store is not None and "pixel_values" in batch:
            known = [["patch_features" in sample] * len(sample["images"]) for sample in samples]
            images = [image for sample in samples for image in sample["images"]]
            batch["uncached"] = list(zip(images, [cached for row in known for cached in row]))
        return batch


class FeatureCache:
    """Patch features of images: read from disk if they are there, else made by the vision encoder.

    Args:
        model: A bridged model, stage 1 of Q-Former BLIP-2 or a classifier; it may be wrapped by PEFT.
        processor: Its processor; a classifier's image processor.
        folder: Folder of all caches; by default `features` in vlbridge's own cache.
        dtype: `"float32"` is exact; `"float16"` and `"bfloat16"` take half the space.
        max_bytes: Largest size of this encoder's features on disk, in bytes.
        batch_size: Number of images that the encoder gets at a time.
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
        self.store.write_about(about)

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the vision encoder, `batch_size` images at a time.

        Args:
            pixel_values: `(num_images, channels, height, width)`, normalised as the processor does it.

        Returns:
            Patch features, `(num_images, num_patches, vision_dim)`, in the cache's dtype and on the encoder's device.
        """
        vision_model = self.model.vision_model
        if self.device is not None:
            vision_model.to(self.device)
        device = next(vision_model.parameters()).device
        batches = [self.model.get_patch_features(batch.to(device)) for batch in pixel_values.split(self.batch_size)]
        return torch.cat(batches).to(self.store.dtype)

    def _encode_all(self, images: list[PreparedImage]) -> list[PreparedImage]:
        """Features of images that have pixels; they are added."""
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
        """Patch features of images; those that are not there are made and added.

        Args:
            images: Files, pictures, or records' `{"path", "bytes"}`.

        Returns:
            `(num_images, num_patches, vision_dim)` in the cache's dtype, as the model takes it for `patch_features`; at
            any resolution `(num_tiles, num_patches, vision_dim)`, the tiles of all images one after the other.

        Raises:
            vlbridge.images.ImageError: An image can't be read.
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
            num_workers: Number of processes that open and scale images.
            rank: Number of this process, from 0.
            world_size: Number of processes.

        Returns:
            The number of `images`, of features that were `made`, and of `broken` images: those are left to training,
            which counts and reports them.
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
            batch: The batch; without `uncached` it stays as it is.
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
        """Write the features that are not on disk yet."""
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
