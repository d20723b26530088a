"""Data for training: published layouts in, records of one form out.

A record is a row of a `datasets.Dataset`, or of an `IterableDataset` if data is streamed. Its columns (`FEATURES`):

- `id`: text, not always unique: LLaVA's mixtures have several conversations under one.
- `source`: text, where the record is from.
- `images`: list of `{"path", "bytes"}`, not decoded; `open_image` turns one into an RGB picture. May be empty.
- exactly one of
  - `messages`: a conversation in transformers' chat format, `[{"role", "content": [{"type", "text"}, ...]}, ...]`;
  - `caption`: text about the one image;
  - `document`: images and text as they alternate, `[{"type", "text"}, ...]`;
  or none of them in image folders that have classes only.
- `why_broken`: text, if a field of the record is wrong; it is counted and left out then.
- more if a source has it: `answers` (VQAv2), `label` and `notes` (image folders).

Items of `content` and `document` have both keys: `{"type": "image", "text": None}` stands for the next of `images`,
`{"type": "text", "text": "..."}` is text. A data set has the column of its own kind only; a mixture of kinds has
several, of which all but one are `None` in each record, so ask with `kind_of(record)`.

    load(source, path, split=None, streaming=False, **options) -> Dataset | IterableDataset  # source: a key of SOURCES
    mix(datasets, weights=None, seed=0, stopping="all_exhausted") -> Dataset | IterableDataset
    hold_out(dataset, every, held_out) -> Dataset | IterableDataset  # a part of the pictures, or all others
    skip_broken(dataset, max_broken=0.01, num_proc=None, log=None) -> (dataset, BrokenReport)
        # report.num_records, .num_broken, .entries(), .check(), str(report)
    open_image(value) -> PIL.Image.Image
    kind_of(record) -> "messages" | "caption" | "document" | None
    problem_of(record) -> (file, reason) | None

Needs the extra `train`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import torch
from datasets import Dataset, Features, IterableDataset, Value, interleave_datasets
from torch.utils.data import get_worker_info

from .training_records import (
    FEATURES,
    KINDS,
    image_problem,
    items_of,
    kind_of,
    open_image,
    problem_of,
    structure_problem,
)
from .training_sources import SOURCES, load
from .training_sources_common import CODE


STOPPING = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")


# ---------------------------------------------------------------------- mixtures


def mix(
    datasets: Sequence[Dataset | IterableDataset],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    stopping: str = "all_exhausted",
) -> Dataset | IterableDataset:
    """Draw from several data sets, with the same draws for the same seed.

    Args:
        datasets: Data sets of records. If one is streamed, so is the mixture; its `state_dict()` and
            `load_state_dict()` continue it at the next record (not exactly after `shuffle(buffer_size=...)`: `datasets`
            does not save what the buffer holds).
        weights: How often to draw from each, relative to each other; by default in turn.
        seed: Seed of the draws.
        stopping: One of `STOPPING`: end with the first data set that ends, or start those that end again until each has
            ended once, or continue without them.

    Returns:
        The mixture.

    Raises:
        ValueError: Weights or `stopping` are not as expected, or a column has different types.
    """
    datasets = list(datasets)
    if not datasets:
        raise ValueError("no data sets to mix.")
    if stopping not in STOPPING:
        raise ValueError(f"stopping is {stopping!r}; expected one of {', '.join(STOPPING)}.")
    if weights is not None and (
        len(weights) != len(datasets) or not all(0 < weight < float("inf") for weight in weights)
    ):
        raise ValueError(
            f"weights are {list(weights)}; expected a positive number for each of {len(datasets)} data sets."
        )
    types: dict = {}
    for dataset in datasets:
        for name, feature in (dataset.features or {}).items():
            if types.setdefault(name, feature) != feature:
                raise ValueError(f"column {name!r} is {types[name]} in one data set and {feature} in another.")
    if len(datasets) == 1:
        return datasets[0]
    if not all(isinstance(dataset, Dataset) for dataset in datasets):
        datasets = [dataset.to_iterable_dataset() if isinstance(dataset, Dataset) else dataset for dataset in datasets]
    total = None if weights is None else sum(weights)
    probabilities = None if weights is None else [weight / total for weight in weights]
    return interleave_datasets(datasets, probabilities=probabilities, seed=seed, stopping_strategy=stopping)


# ---------------------------------------------------------------------- pictures to evaluate on


def hold_out(dataset: Dataset | IterableDataset, every: int, held_out: bool) -> Dataset | IterableDataset:
    """A part of the pictures, chosen by their names alone, or all others.

    All records of a picture are on the same side, and a picture stays where it is when others are added.

    Args:
        dataset: Records.
        every: One picture in so many is held out.
        held_out: Give these pictures; by `False`, the others.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.filter(partial(_is_on_side, every=every, held_out=held_out))
    names = dataset.select_columns(["id", "images"])
    return dataset.select([number for number, row in enumerate(names) if _is_on_side(row, every, held_out)])


def _is_on_side(record: dict, every: int, held_out: bool) -> bool:
    first = (record["images"] or [{}])[0]
    name = first.get("path") or first.get("bytes") or str(record["id"])
    if isinstance(name, str):
        name = "/".join(Path(name).parts[-2:]).encode("utf-8", "surrogateescape")
    return (int.from_bytes(hashlib.sha256(name).digest()[:8], "big") % every == 0) == held_out


# ---------------------------------------------------------------------- broken records


class BrokenDataError(ValueError):
    """More of a data set is broken than is allowed."""


class BrokenReport:
    """Broken records: how many, which, why. Shared by all processes that read one data set.

    Each worker counts in its own row of shared memory; names and reasons go to a file that all append to.

    Args:
        max_broken: Largest share (below 1) or number of broken records. The share of a stream is checked once
            `first_records` records were seen, or more than that share of `first_records` are broken: one in the first
            ten says nothing.
        log: JSON Lines file to write, with `id`, `file`, `reason`; by default a temporary one.

    Raises:
        ValueError: `max_broken` is neither a share nor a whole number.
    """

    max_workers = 256
    first_records = 1000

    def __init__(self, max_broken: float = 0.01, log: str | os.PathLike | None = None):
        if isinstance(max_broken, bool) or max_broken < 0 or (max_broken >= 1 and max_broken != int(max_broken)):
            raise ValueError(f"max_broken is {max_broken}; expected a share (0 to below 1) or a whole number.")
        self.max_broken = max_broken
        self.counts = torch.zeros(self.max_workers, 2, dtype=torch.int64).share_memory_()  # seen, broken
        if log is None:
            handle, log = tempfile.mkstemp(prefix="vlbridge-broken-", suffix=".jsonl")
            os.close(handle)
            weakref.finalize(self, _remove_if_empty, log)
        self.log = str(log)

    def __deepcopy__(self, memo):
        return self  # `datasets` copies what it iterates over; counts stay shared

    @property
    def num_records(self) -> int:
        """Number of records that were read, by all workers together."""
        return int(self.counts[:, 0].sum())

    @property
    def num_broken(self) -> int:
        """Number of broken records among them."""
        return int(self.counts[:, 1].sum())

    def entries(self) -> list[dict]:
        """The broken records, each once, in the order in which they were found."""
        found = {}
        if os.path.exists(self.log):
            with open(self.log, encoding="utf-8") as file:
                for line in file:
                    entry = json.loads(line)
                    found.setdefault((entry["id"], entry["file"]), entry)
        return list(found.values())

    def count(self, record_id, problem: tuple[str, str] | None) -> None:
        """Count one record.

        Args:
            record_id: Its `id`.
            problem: The file and the reason, if it is broken.

        Raises:
            BrokenDataError: More records are broken than allowed.
        """
        info = get_worker_info()
        row = self.counts[(0 if info is None else info.id + 1) % self.max_workers]
        row[0] += 1
        if problem is None:
            return
        row[1] += 1
        entry = {"id": record_id, "file": problem[0], "reason": problem[1]}
        with open(self.log, "a", encoding="utf-8") as file:  # one short write in append mode: lines don't mix
            file.write(json.dumps(entry) + "\n")
        self.check(min_records=self.first_records)

    def check(self, min_records: int = 1) -> None:
        """Raise an error if too many records are broken.

        Args:
            min_records: Number of records that a share is taken of if fewer were seen.

        Raises:
            BrokenDataError: More records are broken than allowed.
        """
        if self.max_broken >= 1 or self.max_broken == 0:
            too_many = len(self.entries()) > self.max_broken if self.num_broken > self.max_broken else False
        else:
            too_many = self.num_broken > self.max_broken * max(self.num_records, min_records)
        if too_many:
            raise BrokenDataError(
                f"{self}\nMore than max_broken={self.max_broken} allows; repair or remove them, or raise max_broken."
            )

    def __str__(self) -> str:
        entries = self.entries()
        if not entries:
            return f"{self.num_records:,} records, none broken"
        reasons = Counter(entry["reason"] for entry in entries).most_common(5)
        lines = [f"{self.num_broken:,} of {self.num_records:,} records are broken and left out:"]
        lines += [f"  {number:,} x {reason}" for reason, number in reasons]
        lines += [f"  {entry['file']}: {entry['reason']}" for entry in entries[:5]]
        lines += [f"  ... all in {self.log}"] if len(entries) > 5 else []
        return "\n".join(lines)


def _remove_if_empty(path: str) -> None:
    with suppress(OSError):
        if os.path.getsize(path) == 0:
            os.remove(path)


def skip_broken(
    dataset: Dataset | IterableDataset,
    max_broken: float = 0.01,
    num_proc: int | None = None,
    log: str | os.PathLike | None = None,
) -> tuple[Dataset | IterableDataset, BrokenReport]:
    """Leave out records with a missing or broken image, or with a wrong structure.

    Whether a record is left out depends on nothing but the record, so that order and resuming stay exact, whatever the
    number of workers. A map-style data set is checked here, in advance, and what remains keeps its order; `datasets`
    remembers the outcome as long as no image file changes its size or time. A stream is checked while it is read: the
    report counts for all workers of this process, and `report.check()` at the end checks the share once more.

    Args:
        dataset: The records.
        max_broken: Largest share (below 1) or number of broken records, see `BrokenReport`.
        num_proc: Number of processes that open images, for a map-style data set.
        log: JSON Lines file for the broken records, see `BrokenReport`.

    Returns:
        The data set without broken records, and the report, which is complete for a map-style data set.

    Raises:
        BrokenDataError: More records are broken than allowed; of a stream, while it is read.
    """
    report = BrokenReport(max_broken, log)
    if isinstance(dataset, IterableDataset):
        return dataset.filter(partial(_is_usable, report=report)), report
    verdicts = dataset.map(
        _verdict,
        remove_columns=dataset.column_names,
        features=Features({"id": Value("string"), "file": Value("string"), "reason": Value("string")}),
        fn_kwargs={"code": CODE, "images": _images_stamp(dataset)},
        num_proc=num_proc,
        desc="opening images",
    )
    reasons = verdicts["reason"][:]
    broken = [index for index, reason in enumerate(reasons) if reason is not None]
    report.counts[0] = torch.tensor([len(verdicts), len(broken)])
    with open(report.log, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(verdicts[index]) + "\n" for index in broken)
    report.check()
    if not broken:
        return dataset, report
    left_out = set(broken)
    return dataset.select([index for index in range(len(dataset)) if index not in left_out]), report


def _is_usable(record: dict, report: BrokenReport) -> bool:
    problem = problem_of(record)
    report.count(record["id"], problem)
    return problem is None


def _verdict(record: dict, code: str, images: str) -> dict:
    def remembered(value):
        if value.get("bytes") is not None or not value.get("path"):
            return image_problem(value)
        return _file_problem(value["path"], images)

    file, reason = problem_of(record, remembered) or (None, None)
    return {"id": record["id"], "file": file, "reason": reason}


@lru_cache(maxsize=1 << 18)
def _file_problem(path: str, images: str) -> tuple[str, str] | None:
    """The same as `image_problem` for a file, remembered as long as `images` does not change."""
    return image_problem({"path": path, "bytes": None})


def _images_stamp(dataset: Dataset) -> str:
    """A hash of the size and time of every image file."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["images"]).with_format("arrow").iter(batch_size=10_000):
        for path in batch["images"].combine_chunks().flatten().field("path").to_pylist():
            try:
                status = os.stat(path) if path else None
            except (OSError, ValueError):
                status = None
            digest.update(f"{path} {status and (status.st_size, status.st_mtime_ns)}\n".encode("utf-8", "replace"))
    return digest.hexdigest()


__all__ = [
    "FEATURES",
    "KINDS",
    "SOURCES",
    "STOPPING",
    "BrokenDataError",
    "BrokenReport",
    "hold_out",
    "items_of",
    "kind_of",
    "load",
    "mix",
    "open_image",
    "problem_of",
    "skip_broken",
    "structure_problem",
]
