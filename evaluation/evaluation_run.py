"""`evaluate`: from a model and a benchmark's folder to figures, predictions and baselines."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from ..demo import easy_vqa_dir
from ..files import read_json, write_json, write_text
from ..training.training_failures import failing_together
from ..training.training_run import hardware, peak_memory
from .evaluation_answers import Answerer, Shown, described, shuffled_pictures
from .evaluation_models import Subject, load_subject, versions
from .evaluation_predictions import Processes, predict, read_rows
from .evaluation_retrieval import rank_all
from .evaluation_samples import Sample, read_samples
from .evaluation_scores import INTERVALS, score
from .evaluation_tasks import Asking, Task, TaskError, as_json, changed, load_task


RESULTS, SETTINGS, TIMING = "results.json", "settings.json", "timing.json"


@dataclass(frozen=True)
class Options:
    """How `evaluate` goes about it.

    Args:
        split: Split to evaluate; by default the task's.
        shots: Demonstrations per query.
        demonstrations: `"random"`: the same for all queries, drawn with the seed; `"rices"`: for each query those with
            the pictures most like its own.
        text_only: Show demonstrations without their pictures.
        demonstration_split: Split that demonstrations are taken from; by default the task's.
        demonstration_data: Folder of that split; by default the folder that is evaluated.
        seed: Of demonstrations, of `limit`, of shuffled pictures and of the confidence intervals.
        blind: Ask everything without pictures too: what the language model knows by itself.
        grey: Ask everything with a grey picture too: without a picture many models answer in another form.
        shuffled: Ask everything with other samples' pictures too.
        limit: Use so many samples, drawn with the seed.
        batch_size: Samples per batch. Padding may change the last digits of what a model computes, so that a run can
            only continue with the batch size that it began with.
        prompt: Ask this instead of the task's prompt, with `{question}`, `{context}` and `{choices}`.
        form: `"few_shot"` or `"chat"`, see `Asking`.
        method: `"generate"` or `"rank"`, see `Asking`.
        generation: Arguments of `generate` that replace the task's.
        top_k: In retrieval, the number of candidates that are read again together with the query; 0 for none.
        dataset_name: What results call the data; by default the benchmark's name, for folders of pictures the folder's.
        device: Of a model that is loaded here; by default cuda, else mps, else cpu.
        dtype: Of a model that is loaded here; by default float32 on the cpu and bfloat16 on other devices.
        progress: Show progress bars; by default on a terminal.
    """

    split: str | None = None
    shots: int = 0
    demonstrations: str = "random"
    text_only: bool = False
    demonstration_split: str | None = None
    demonstration_data: str | os.PathLike | None = None
    seed: int = 0
    blind: bool = False
    grey: bool = False
    shuffled: bool = False
    limit: int | None = None
    batch_size: int = 8
    prompt: str | None = None
    form: str | None = None
    method: str | None = None
    generation: dict | None = None
    top_k: int | None = None
    dataset_name: str | None = None
    device: str | None = None
    dtype: str | None = None
    progress: bool | None = None


@dataclass
class Questions:
    """What is asked, read from a benchmark's files.

    Args:
        samples: Those that are evaluated.
        samples_of_split: How many the split has.
        shown: Demonstrations.
        split: Name of the split in the files.
        place: The benchmark's folder.
    """

    samples: Sequence[Sample]
    samples_of_split: int
    shown: Shown
    split: str
    place: Path

    @property
    def sha256(self) -> str:
        """Hash of all that is asked, and of the right answers."""
        about = [[s.id, s.question, s.references, s.choices, s.context] for s in self.samples]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


class _Timed:
    """Counts what is answered in this process, and how long that takes.

    Args:
        answer: Answers one batch.
    """

    def __init__(self, answer: Callable[..., list[dict]]):
        self.answer, self.answers, self.seconds = answer, 0, 0.0

    def __call__(self, *args) -> list[dict]:
        began = time.perf_counter()
        rows = self.answer(*args)
        self.seconds += time.perf_counter() - began
        self.answers += len(rows)
        return rows


@dataclass
class _Run:
    """One evaluation, its model loaded and its data read."""

    subject: Subject
    task: Task
    asking: Asking
    questions: Questions
    chosen: Options
    processes: Processes
    folder: Path | None
    answered: dict[str, dict] = field(default_factory=dict)

    @property
    def samples(self) -> Sequence[Sample]:
        return self.questions.samples

    @property
    def shown(self) -> Shown:
        return self.questions.shown

    def rows(
        self, name: str, blind: bool = False, grey: bool = False, pictures: Sequence[Sample] | None = None
    ) -> list[dict]:
        """Predictions of one pass; in the first process, from its file if an earlier run has finished it."""
        if self.task.kind == "retrieval":
            return self._ranked(name, pictures)
        answerer = Answerer(
            self.subject, self.task, self.asking, self.shown, blind, grey, pictures, first=self.samples[0]
        )
        timed = _Timed(answerer)
        rows = predict(
            name, self.samples, timed, self.processes, self.folder, self.chosen.batch_size, self.chosen.progress
        )
        self.answered[name] = {"answers": timed.answers, "seconds": round(timed.seconds, 3)}
        return rows

    def _ranked(self, name: str, pictures) -> list[dict]:
        path = None if self.folder is None else self.folder / f"{name}.jsonl"
        expected = len(self.samples) + sum(len(sample.references) for sample in self.samples)
        if path is not None and len(rows := read_rows(path)) == expected:
            return rows
        timed = _Timed(rank_all)
        rows = timed(self.subject, self.samples, pictures, self.asking.top_k, self.chosen.batch_size)
        self.answered[name] = {"answers": timed.answers, "seconds": round(timed.seconds, 3)}
        if path is not None:
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return rows

    def settings(self, dataset: str) -> dict:
        """All that the predictions depend on."""
        split = self.questions.split
        return {
            "task": self.task.name,
            "kind": self.task.kind,
            "dataset": dataset,
            "split": split,
            "split_name": self.task.split_name(split),
            "samples": len(self.samples),
            "samples_of_split": self.questions.samples_of_split,
            "pictures": len({sample.image_key for sample in self.samples}),
            "samples_sha256": self.questions.sha256,
            "model": self.subject.describe(),
            "shots": self.shown.shots,
            "demonstrations": self.shown.describe(),
            "seed": self.chosen.seed,
            "batch_size": self.chosen.batch_size,
            "asking": as_json(self.asking),
            "caption_prompt": getattr(self.subject.processor, "caption_prompt", None),
        }


def _limited(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """So many samples, drawn with the seed, in the order of the files."""
    if limit is None or limit >= len(samples):
        return samples
    if limit < 1:
        raise TaskError(f"limit is {limit}; expected at least 1.")
    return [samples[number] for number in sorted(random.Random(seed).sample(range(len(samples)), limit))]


def _pool(task: Task, folder, split: str, chosen: Options) -> list[Sample]:
    """Samples to take demonstrations from.

    Raises:
        TaskError: The benchmark has no split for it, or it is the one that is evaluated.
    """
    if not chosen.shots:
        return []
    if task.kind == "retrieval":
        raise TaskError(f"{task.name} has no demonstrations; expected shots=0.")
    shown_split = chosen.demonstration_split or task.demonstration_split
    if shown_split is None:
        raise TaskError(f"{task.name} has no split for demonstrations: name one in demonstration_split.")
    task.check_split(shown_split)
    if shown_split == split:
        raise TaskError(f"demonstrations are from {split!r}, which is evaluated: name another demonstration_split.")
    return read_samples(task.reader, folder, shown_split)


def _split_of(task: Task, folder: Path, split: str | None) -> str:
    """The split to evaluate; for folders of pictures without splits the folder's own name.

    Raises:
        TaskError: There is no such split.
    """
    if split is not None:
        task.check_split(split)
    elif task.splits or (folder / task.split).is_dir():
        split = task.split
    if not task.splits and split is not None and not (folder / split).is_dir():
        raise TaskError(f"{folder} has no folder {split!r}; expected one of its splits, or none for all of it.")
    return split or folder.name


def evaluate(
    model: PreTrainedModel | str | os.PathLike | None = None,
    processor=None,
    task: str | Task = "vqav2",
    data: str | os.PathLike | None = None,
    output_dir: str | os.PathLike | None = None,
    **options,
) -> dict:
    """Evaluate a model on a benchmark that lies in a folder.

    Processes that `accelerate launch` or `torchrun` has started share the samples and agree with one process. With an
    `output_dir` a run that was killed continues where it stopped, and its files get the bytes of a run that was not:
    `results.json`, `settings.json` and the predictions. What differs from run to run is in `timing.json` alone.

    Args:
        model: A loaded model, folder or Hub id; `None` takes the embedded bridge.
        processor: Of a loaded model.
        task: Name of a task (`task_names()`), a YAML file of the same form, or a `Task`.
        data: Folder with the benchmark's official files; the task's `layout` names them. easy-VQA's are fetched.
        output_dir: Folder to write to or to continue in; `None` writes nothing.
        options: Fields of `Options`: `split`, `shots`, `demonstrations`, `seed`, `blind`, `shuffled`, `limit`...

    Returns:
        What `results.json` holds, in all processes.

    Raises:
        TaskError: There is no such task or split, or a setting can't be used.
        ValueError: The data or the model are not as expected, or `output_dir` holds a run with other settings.
        OSError: A file can't be read or written.
        RuntimeError: Another process failed (`OtherProcessError`), or there is no such device.
    """
    began, chosen = time.monotonic(), Options(**options)
    processes = Processes(chosen.device)
    with failing_together():
        task = task if isinstance(task, Task) else load_task(task)
        run = _prepare(task, model, processor, data, output_dir, chosen, processes)
        settings = run.settings(chosen.dataset_name or task.dataset or run.questions.place.name)
        if run.folder is not None and processes.is_main:
            _begin(run.folder, settings)
        passes: dict[str, dict] = {"predictions": {}}
        passes |= {"blind": {"blind": True}} if chosen.blind else {}
        passes |= {"grey": {"grey": True}} if chosen.grey else {}
        passes |= {"shuffled": {"pictures": shuffled_pictures(run.samples, chosen.seed)}} if chosen.shuffled else {}
    if run.shown.retrieves:
        with failing_together():
            if processes.is_main:  # the others read what it has written
                run.shown.prepare(run.subject)
    rows = {name: run.rows(name, **given) for name, given in passes.items()}
    result = None
    with failing_together():
        if processes.is_main:
            result = _result(run, settings, rows)
            if run.folder is not None:
                write_json(run.folder / RESULTS, result, ensure_ascii=False)
                _end(run, time.monotonic() - began)
    return processes.from_main(result)


def read_questions(task: Task, data: str | os.PathLike | None, chosen: Options, num_processes: int = 1) -> Questions:
    """Read what will be asked.

    Args:
        task: The task.
        data: Folder with the benchmark's files.
        chosen: How it will be asked.
        num_processes: How many processes will share it.

    Raises:
        TaskError: A setting can't be used.
        ValueError: The data are not as expected.
        OSError: A file can't be read.
    """
    if data is None:
        if task.reader != "easy_vqa":  # the only one that is small enough to be fetched
            raise TaskError(f"data is missing: name the folder that holds {task.layout}.")
        data = easy_vqa_dir()
    place = Path(os.path.abspath(os.path.expanduser(data)))
    _check(task, chosen, num_processes)
    split = _split_of(task, place, chosen.split)
    whole = read_samples(task.reader, place, split)
    samples = _limited(whole, chosen.limit, chosen.seed)
    pool = _pool(task, chosen.demonstration_data or place, split, chosen)
    shown = Shown(pool, chosen.shots, chosen.demonstrations, chosen.seed, chosen.text_only)
    return Questions(samples, len(whole), shown, split, place)


def _prepare(task: Task, model, processor, data, output_dir, chosen: Options, processes: Processes) -> _Run:
    """Read the data and load the model.

    Raises:
        TaskError: A setting can't be used.
        ValueError: The data or the model are not as expected.
        OSError: A file can't be read.
    """
    questions = read_questions(task, data, chosen, processes.count)
    where = chosen.device or (str(processes.device) if processes.count > 1 else None)
    subject = load_subject(model, processor, task, where, chosen.dtype)
    if subject.is_classifier and chosen.blind:
        raise TaskError(f"{subject.name} is a classifier, which sees nothing but pictures: use grey instead of blind.")
    given = {name: getattr(chosen, name) for name in ("prompt", "form", "method", "generation", "top_k")}
    return _Run(
        subject=subject, task=task, asking=changed(task.asking(subject.family), **given), questions=questions,
        chosen=chosen, processes=processes, folder=None if output_dir is None else Path(output_dir).expanduser(),
    )  # fmt: skip


def _check(task: Task, chosen: Options, num_processes: int) -> None:
    """Refuse what can't be done, before anything is loaded.

    Raises:
        TaskError: It can't be done.
    """
    if chosen.batch_size < 1:
        raise TaskError(f"batch_size is {chosen.batch_size}; expected at least 1.")
    if task.kind == "retrieval" and (chosen.blind or chosen.grey):
        raise TaskError(f"{task.name} has no blind baseline: without pictures there is nothing to rank.")
    if task.kind == "retrieval" and num_processes > 1:
        raise TaskError(f"{task.name} compares everything with everything: run it in one process.")


def _begin(folder: Path, settings: dict) -> None:
    """Begin a run in a folder, or continue one.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = read_json(folder / SETTINGS)
    if before is not None and before != json.loads(json.dumps(settings)):
        differing = [key for key in settings if before.get(key) != json.loads(json.dumps(settings[key]))]
        key = (differing or ["something"])[0]
        raise ValueError(
            f"{folder} holds a run with other settings: {key} was {_short(before.get(key))}, now "
            f"{_short(settings.get(key))}. Choose another folder, or delete this one."
        )
    if before is None:
        write_json(folder / SETTINGS, settings, ensure_ascii=False)


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "..."


def _end(run: _Run, seconds: float) -> None:
    """Note how long this run took and what memory; the parts of a run that was killed are not counted.

    `answered` is by pass, of the first process alone, and without loading the model.
    """
    path = run.folder / TIMING
    runs = read_json(path, {}).get("runs", [])
    runs.append({"finished": time.strftime("%Y-%m-%d %H:%M:%S %z"), "seconds": round(seconds, 1),
                 "hardware": hardware(run.processes.count), "answered": run.answered,
                 "peak_memory": peak_memory()})  # fmt: skip
    write_json(path, {"runs": runs}, ensure_ascii=False)


def _result(run: _Run, settings: dict, rows: dict[str, list[dict]]) -> dict:
    """What `results.json` holds."""
    found = {name: score(run.task, run.samples, of_pass, run.chosen.seed) for name, of_pass in rows.items()}
    notes = [*([run.task.notes] if run.task.notes else []), *found["predictions"]["notes"]]
    return {
        **settings,
        "title": run.task.title,
        "metrics": found["predictions"]["metrics"],
        "breakdown": found["predictions"]["breakdown"],
        "baselines": {
            name: {"how": described(name, run.shown), "metrics": part["metrics"], "breakdown": part["breakdown"]}
            for name, part in found.items()
            if name != "predictions"
        },
        "intervals": INTERVALS,
        "notes": notes,
        "versions": versions(),
        "files": {name: f"{name}.jsonl" for name in rows},
    }


__all__ = ["Options", "Questions", "RESULTS", "SETTINGS", "TIMING", "evaluate", "read_questions"]
