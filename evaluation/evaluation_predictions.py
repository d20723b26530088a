"""Predictions on disk: written batch by batch, shared by several processes, and resumed after a kill.

While a run is under way each process appends whole lines to a file of its own, `NAME.partial-RANK.jsonl`. A rerun takes
over every batch that is there as a whole and answers the others in the same batches, whatever the number of processes;
so the finished file, `NAME.jsonl`, has the bytes of a run that was never interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from ..files import write_text
from ..training.training_failures import failing_together
from .evaluation_samples import Sample


class Processes:
    """The processes that share an evaluation: one, or those that `accelerate launch` or `torchrun` has started.

    Args:
        device: Where the model will be, if that was said: on CPUs, accelerate must be told to look for other processes.
    """

    def __init__(self, device: str | None = None):
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        on_cpus = device == "cpu" or not torch.accelerator.is_available()
        state = PartialState(cpu=True) if several and on_cpus else PartialState()
        self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def is_main(self) -> bool:
        """Whether this is the first of them, which writes the files."""
        return self.rank == 0

    def from_main(self, value):
        """What the first process has, in all of them."""
        return gather_object([value] if self.is_main else [])[0]


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> list[dict]:
    """Whole rows of a file of predictions; a line that a kill has cut off is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _fitting(rows: Sequence[dict], samples: Sequence[Sample], batch_size: int) -> dict[int, dict]:
    """Rows by number: those of batches that are there as a whole."""
    by_number = {}
    for row in rows:
        number = row.get("number") if isinstance(row, dict) else None
        if isinstance(number, int) and 0 <= number < len(samples) and row.get("id") == samples[number].id:
            by_number[number] = row
    kept = {}
    for start in range(0, len(samples), batch_size):
        numbers = range(start, min(start + batch_size, len(samples)))
        if all(number in by_number for number in numbers):
            kept |= {number: by_number[number] for number in numbers}
    return kept


def _take_over(folder: Path, name: str, samples: Sequence[Sample], batch_size: int) -> dict[int, dict]:
    """What earlier runs have answered, put together in one file."""
    finished = _fitting(read_rows(folder / f"{name}.jsonl"), samples, batch_size)
    if len(finished) == len(samples):
        return finished
    partial = sorted(folder.glob(f"{name}.partial-*.jsonl"))
    kept = _fitting([row for path in partial for row in read_rows(path)], samples, batch_size)
    if partial:
        first = folder / f"{name}.partial-0.jsonl"
        write_text(first, "".join(_line(kept[number]) for number in sorted(kept)))
        for path in set(partial) - {first}:
            path.unlink()
    return kept


def predict(
    name: str,
    samples: Sequence[Sample],
    answer: Callable[[Sequence[Sample], range], list[dict]],
    processes: Processes,
    folder: Path | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> list[dict]:
    """Answer about all samples, of which each process takes every so many batches.

    Args:
        name: Of the file, without `.jsonl`.
        samples: What to ask.
        answer: Answers one batch: of the samples and their numbers it makes a row each.
        processes: Those that share the samples.
        folder: Where to write; `None` keeps the rows in memory alone.
        batch_size: Samples per batch.
        progress: Show a progress bar; `None`: on a terminal.

    Returns:
        A row per sample, in order, in the first process; nothing in the others. A row has `number`, `id`, and what
        `answer` says.

    Raises:
        OSError: A file can't be written.
        Exception: What `answer` raised.
        vlbridge.training.training_failures.OtherProcessError: Another process failed.
    """
    kept: dict[int, dict] = {}
    with failing_together():
        if folder is not None and processes.is_main:
            kept = _take_over(folder, name, samples, batch_size)
    known = processes.from_main(sorted(kept))
    todo = sorted(set(range(0, len(samples), batch_size)) - set(known))
    mine, rows = todo[processes.rank :: processes.count], []
    show = sys.stderr.isatty() if progress is None else progress
    bar = tqdm(total=len(mine), desc=name, unit="batch", file=sys.stderr, disable=not (show and processes.is_main))
    with failing_together(), bar:
        path = None if folder is None or not mine else folder / f"{name}.partial-{processes.rank}.jsonl"
        for start in mine:
            numbers = range(start, min(start + batch_size, len(samples)))
            answered = answer([samples[number] for number in numbers], numbers)
            batch = [{"number": n, "id": samples[n].id, **row} for n, row in zip(numbers, answered, strict=True)]
            if path is not None:
                with open(path, "a", encoding="utf-8") as file:
                    file.write("".join(map(_line, batch)))
            rows += batch
            bar.update()
    rows = gather_object(rows)
    result = []
    with failing_together():
        if processes.is_main:
            by_number = kept | {row["number"]: row for row in rows}
            result = [by_number[number] for number in range(len(samples))]
            if folder is not None:
                write_text(folder / f"{name}.jsonl", "".join(map(_line, result)))
                for path in folder.glob(f"{name}.partial-*.jsonl"):
                    path.unlink()
    return result


__all__ = ["Processes", "predict", "read_rows"]
