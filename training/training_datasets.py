"""Data sets of samples for the trainer: by number or as a stream, and how samples become batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..compat_torch import forget_loader_workers
from ..images import ImageError
from .training_encoding import IGNORED, Encoder, SampleError
from .training_failures import TrainingError


EXTRA_KEYS = ("ids", "sources", "skipped")  # what batches hold besides the model's inputs


class SkippedRecord(NamedTuple):
    """A record that could not be used, and why."""

    id: str
    reason: str


class _EncodedRecords:
    """What both kinds of data sets share: a record that can't be used is replaced by a sample without labels.

    Batches stay full that way, and nothing is learned from the replacement; the trainer counts them.

    Args:
        records: A sequence, or something that can be iterated over again and again.
        encoder: Makes samples of records.
    """

    def __init__(self, records, encoder: Encoder):
        self.records, self.encoder = records, encoder
        self._blank: dict | None = None

    def sample(self, record: dict) -> dict:
        """Encode one record.

        Returns:
            The sample, with the record's `id` and `source`, and `skipped`: why the record could not be used, or `None`.
        """
        about = {"id": str(record.get("id")), "source": record.get("source"), "skipped": None}
        try:
            return {**self.encoder.encode(record), **about}
        except (SampleError, ImageError) as error:
            return {**self._blank_sample(), **about, "skipped": str(error)}

    def _blank_sample(self) -> dict:
        if self._blank is None:
            for _, record in zip(range(100), self.records):
                try:
                    blank = self.encoder.encode(record)
                except (SampleError, ImageError) as error:
                    reason = f"{record.get('id')}: {error}"
                    continue
                if "labels" in blank:
                    blank["labels"] = torch.full_like(blank["labels"], IGNORED)
                self._blank = blank
                break
            else:
                raise TrainingError(
                    "none of the first 100 records can be used: run `vlbridge data check` on the data. The last of "
                    f"them is {reason}"
                )
        return self._blank


class Samples(_EncodedRecords, Dataset):
    """Records by number, encoded when they are asked for.

    Args:
        records: A sequence of records.
        encoder: Makes samples of them.
    """

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.sample(self.records[index])


class SampleStream(_EncodedRecords, IterableDataset):
    """Records one after the other, without end, encoded as they come.

    All processes and workers follow one common order, and each takes its own batches of it. If the records come from
    enough files (`num_shards`), each process and worker reads files of its own; otherwise all of them read everything
    and encode only their own batches.

    Args:
        records: Gives the same records each time that it is iterated over; with `set_epoch` where their order changes
            from pass to pass.
        encoder: Makes samples of them.
        batch_size: Rows per batch of one process.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, records, encoder: Encoder, batch_size: int, rank: int = 0, world_size: int = 1):
        super().__init__(records, encoder)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.skip_batches = 0  # this process' first batches are not encoded: an earlier part of the run has used them

    @staticmethod
    def _passes(records) -> Iterator[dict]:
        for epoch in itertools.count():
            if hasattr(records, "set_epoch"):
                records.set_epoch(epoch)
            record = None
            for record in records:
                yield record
            if record is None:
                raise TrainingError("the streamed data has no records")

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            # `datasets` would share files out among workers by itself, and leave some without any
            forget_loader_workers()
        part, parts = self.rank * num_workers + worker, self.world_size * num_workers
        records = self.records
        if parts > 1 and getattr(records, "num_shards", 1) >= parts:
            records, part, parts = records.shard(num_shards=parts, index=part), 0, 1
        encoded = 0
        for count, record in enumerate(self._passes(records)):
            if count // self.batch_size % parts != part:
                continue
            # the loader asks its workers in turn: this one's batches are number `worker`, `worker + num_workers`, ...
            batch = worker + encoded // self.batch_size * num_workers
            encoded += 1
            yield {"skip": True} if batch < self.skip_batches else self.sample(record)


class Collator:
    """Put samples together to a batch, with what the trainer wants to know about them besides the model's inputs.

    Args:
        encoder: The samples' encoder.
    """

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, samples: list[dict]) -> dict:
        """Collate samples into one batch; a stream that skips batches gives empty ones."""
        if "skip" in samples[0]:
            return {}
        usable = [sample for sample in samples if sample["skipped"] is None]
        chosen = usable or samples[:1]
        if not usable and "labels" not in samples[0]:
            raise TrainingError(f"a batch without a usable record: {samples[0]['skipped']}")
        about = ("id", "source", "skipped")
        batch = self.encoder.collate([{k: v for k, v in sample.items() if k not in about} for sample in chosen])
        batch["ids"] = [sample["id"] for sample in usable]
        batch["sources"] = [sample["source"] for sample in chosen]
        batch["skipped"] = [SkippedRecord(s["id"], s["skipped"]) for s in samples if s["skipped"] is not None]
        return batch


__all__ = ["EXTRA_KEYS", "Collator", "SampleStream", "Samples", "SkippedRecord"]
