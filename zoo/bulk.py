"""Bulk work: one question about very many pictures. It goes on after any kill, and several processes may share it.

The pictures are cut into ranges of equal length, in the order of the inputs. A range's rows are one file in the output
folder, written under a temporary name and renamed; what has its file is done, and nothing else is remembered. So each
picture has exactly one row, whatever was killed when, and whoever answered it. `job.json` says which job it is.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import try_to_load_from_cache
from PIL import Image
from transformers import AutoProcessor

from .files import read_json, write_json
from .images import ImageError
from .inference import (
    BATCH_SIZE,
    MAX_NEW_TOKENS,
    answer,
    bridged_config,
    device_and_dtype,
    generate_texts,
    model_source,
    question_inputs,
)
from .row_files import FORMATS, RowFiles
from .shards import Picture, Source, find_sources


JOB = "job.json"
ROWS_PER_FILE = 64
_HEAD_AND_TAIL = 1 << 20  # bytes

Item = TypeVar("Item")
Result = TypeVar("Result")


# ---------------------------------------------------------------------- threads that read ahead


def num_workers() -> int:
    """How many threads prepare pictures if nobody says: one per CPU core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int = 1, depth: int | None = None
) -> Iterator[Result]:
    """`map` whose next results are computed by threads while the caller works on the last one.

    Args:
        function: What to do with each item.
        items: The items; they are taken from the caller's thread.
        workers: Number of threads.
        depth: How many results may be waiting or in work; `None`: one more than threads.

    Yields:
        The results, in order.
    """
    depth = workers + 1 if depth is None else depth
    pending: deque = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def answer_batches(
    batches: Iterable[Sequence[Any]],
    model,
    processor,
    prompt: str,
    *,
    read: Callable[[Any], Image.Image] = Picture.image,
    max_new_tokens: int = MAX_NEW_TOKENS,
    workers: int | None = None,
) -> Iterator[list[str | ValueError]]:
    """Ask the same question about every picture; threads read and prepare the next batches while the model runs.

    Args:
        batches: Pictures, batch by batch; anything that `read` takes.
        model: A bridged model with a language model.
        processor: Its processor; each thread has a copy of it.
        prompt: The question.
        read: Reads a picture, in mode `"RGB"`; raises an `ImageError` if that can't be done.
        max_new_tokens: Maximum length of an answer, in tokens.
        workers: Number of threads; `None` takes `num_workers()`.

    Yields:
        For each batch a text per picture, or what is wrong with it.
    """
    own = threading.local()  # setting the padding of a tokenizer while another thread uses it is an error in tokenizers

    def prepare(batch):
        if not hasattr(own, "processor"):
            own.processor = copy.deepcopy(processor)
        results: list[Any] = [None] * len(batch)
        images = {}
        for k, picture in enumerate(batch):
            try:
                images[k] = read(picture)
            except ImageError as error:
                results[k] = error
        inputs = None
        with suppress(ValueError):  # one of them is refused; which one is found out below
            inputs = question_inputs(own.processor, list(images.values()), prompt) if images else None
        return batch, results, list(images), inputs

    def alone(picture):
        try:
            return answer(model, processor, [read(picture)], prompt, max_new_tokens=max_new_tokens)[0]
        except ValueError as error:
            return error

    workers = num_workers() if workers is None else workers
    for batch, results, asked, inputs in ahead(prepare, batches, workers):
        texts = None
        with suppress(ValueError):
            if inputs is not None:
                texts = generate_texts(model, processor, inputs, max_new_tokens=max_new_tokens)
        for k, text in zip(asked, [alone(batch[k]) for k in asked] if texts is None else texts, strict=True):
            results[k] = text
        yield results


# ---------------------------------------------------------------------- sharing


def parse_share(text: str) -> tuple[int, int]:
    """Which process this is, of how many, from `"2/8"`.

    Raises:
        ValueError: It is no such text.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"shard is {text!r}; expected NUMBER/COUNT with NUMBER from 1 to COUNT, such as 1/4")
    return int(number), int(count)


def share_of_environment() -> tuple[int, int]:
    """Which process this is, of how many, as `torchrun` and `accelerate launch` say it; `(1, 1)` without them."""
    return int(os.environ.get("RANK", "0")) + 1, int(os.environ.get("WORLD_SIZE", "1"))


def share(items: Sequence[Item], number: int, count: int) -> Sequence[Item]:
    """The part of one process: neighbours, so that it opens few shards.

    Args:
        items: What there is to do.
        number: Which process, from 1.
        count: How many processes there are.
    """
    return items[len(items) * (number - 1) // count : len(items) * number // count]


# ---------------------------------------------------------------------- the job


@dataclass(frozen=True)
class Question:
    """What is asked, and by which model: what answers depend on.

    Args:
        model: Folder or Hub id.
        weights: What tells the model's files from others, see `stamp_of`.
        prompt: What is asked about every picture.
        captions: Rows have `caption`; else `question` and `answer`.
        max_new_tokens: Maximum length of an answer, in tokens.
        dtype: Precision of the model.
    """

    model: str
    weights: str
    prompt: str
    captions: bool
    max_new_tokens: int
    dtype: str

    @classmethod
    def of(
        cls,
        model: str | os.PathLike | None = None,
        question: str | None = None,
        prompt: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        device: str | None = None,
        dtype: str | None = None,
    ) -> Question:
        """Look at a model without loading its weights.

        Args:
            model: Folder or Hub id; `None` takes the embedded bridge.
            question: A question; `None` asks for captions.
            prompt: What to ask for captions; `None` takes the processor's `caption_prompt`.
            max_new_tokens: Maximum length of an answer, in tokens.
            device: Where the model will run; see `device_and_dtype`.
            dtype: In which precision; see `device_and_dtype`.

        Returns:
            The question.

        Raises:
            ValueError: There is no such device or dtype, or the model is not a bridged one that generates text.
            RuntimeError: This machine does not have the device.
            OSError: There is no such model.
        """
        source = model_source(model)
        source = os.path.abspath(source) if os.path.isdir(source) else source
        bridged_config(source, generates=True)
        if question is None and prompt is None:
            prompt = AutoProcessor.from_pretrained(source).caption_prompt
        asked = prompt if question is None else question
        precision = device_and_dtype(device, dtype)[1]
        return cls(source, stamp_of(source), str(asked), question is None, max_new_tokens, precision)

    def row(self, image: str, result: str | ValueError) -> dict:
        """The row of a picture: its text or what is wrong with it.

        Args:
            image: The picture's name.
            result: What the model has said, or the error.
        """
        failed = isinstance(result, ValueError)
        error = " ".join(str(getattr(result, "reason", result)).split()) or type(result).__name__ if failed else None
        said: dict[str, Any] = {"caption": None} if self.captions else {"question": self.prompt, "answer": None}
        if not failed:
            said["caption" if self.captions else "answer"] = result
        return {"image": image, **said, "error": error}


def stamp_of(source: str) -> str:
    """What tells a model from others of the same name.

    Args:
        source: Folder or Hub id.

    Returns:
        Of a folder, a hash of its configuration and of the names, sizes, beginnings and ends of its weights; of a
        model on the Hub, the commit that is in the cache.
    """
    if not os.path.isdir(source):
        cached = try_to_load_from_cache(source, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else ""
    digest = hashlib.sha256()
    for path in sorted(Path(source).iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_HEAD_AND_TAIL))
                file.seek(max(size - _HEAD_AND_TAIL, 0))
                digest.update(file.read(_HEAD_AND_TAIL))
    return digest.hexdigest()


@dataclass(frozen=True)
class Job:
    """A question about all pictures of some inputs, and where the rows go; from `plan`.

    Args:
        question: What is asked.
        sources: The pictures.
        files: The files of rows.
        rows_per_file: Rows in a file; the last one of each source may have fewer.
    """

    question: Question
    sources: list[Source]
    files: RowFiles
    rows_per_file: int = ROWS_PER_FILE

    @cached_property
    def ranges(self) -> list[tuple[int, int, int]]:
        """The ranges by number: source, first picture, and the one after the last."""
        return [
            (source, start, min(start + self.rows_per_file, len(pictures)))
            for source, pictures in enumerate(self.sources)
            for start in range(0, len(pictures), self.rows_per_file)
        ]

    def __len__(self) -> int:
        """Number of pictures."""
        return sum(len(source) for source in self.sources)

    def todo(self, number: int = 1, count: int = 1) -> list[tuple[int, int]]:
        """Ranges of one process that have no file yet.

        Args:
            number: Which process, from 1.
            count: How many processes share the job.

        Returns:
            Numbers of ranges, and of their pictures.
        """
        done = self.files.done()
        mine = share(list(enumerate(self.ranges)), number, count)
        return [(k, stop - start) for k, (_, start, stop) in mine if k not in done]

    def pictures(self, number: int) -> list[Picture]:
        """The pictures of a range."""
        source, start, stop = self.ranges[number]
        return self.sources[source].pictures(start, stop)


def plan(
    inputs: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    question: Question,
    *,
    file_format: str = "jsonl",
    rows_per_file: int = ROWS_PER_FILE,
    recursive: bool = False,
    image_column: str = "image",
) -> Job:
    """Begin a job, or go on with it.

    Args:
        inputs: Picture files, tars, Parquet files, folders of these, and globs.
        output: Folder for the rows.
        question: What to ask, from `Question.of`.
        file_format: One of `FORMATS`.
        rows_per_file: Rows in a file: as much is lost in a kill.
        recursive: Look into subfolders of inputs too.
        image_column: The column of Parquet files that has the pictures.

    Returns:
        The job.

    Raises:
        ValueError: `output` has something else in it, inputs can't be used (also as `ImageError`), or there are none.
        OSError: A file can't be read or written.
        ImportError: There are Parquet files, and pyarrow is not installed.
    """
    if rows_per_file < 1:
        raise ValueError(f"rows_per_file is {rows_per_file}; expected at least 1")
    output, files = Path(output), RowFiles(output, file_format)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; expected a folder to write to")
    recorded = _recorded(output)
    settings = {**asdict(question), "format": file_format, "rows_per_file": rows_per_file, "image_column": image_column}
    known = recorded["inputs"] if recorded else ()
    sources = find_sources(inputs, recursive=recursive, image_column=image_column, known=known, leave_out=output)
    if not any(len(source) for source in sources):
        raise ValueError("there are no pictures in the inputs")
    described = [source.described() for source in sources]
    if not recorded:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / JOB, {"settings": settings, "inputs": described}, ensure_ascii=False)
        recorded = _recorded(output)  # of another process, if that was faster
    _check_same(output, recorded or {}, settings, described)
    return Job(question, sources, files, rows_per_file)


def _recorded(output: Path) -> dict | None:
    """What the folder says which job it is of; `None` if it is new.

    Raises:
        ValueError: It is not a job's.
    """
    recorded = read_json(output / JOB)
    if isinstance(recorded, dict) and recorded.keys() == {"settings", "inputs"}:
        return recorded
    if (output / JOB).is_file():
        raise ValueError(f"{output / JOB} is damaged, or of another program; choose another output folder")
    found = sorted(path.name for path in output.iterdir() if path.name[0] != ".") if output.is_dir() else []
    if found and not (output / JOB).is_file():
        raise ValueError(f"{output} holds {found[0]!r} and no {JOB}; expected a new folder, or that of this job")
    return None


def _check_same(output: Path, recorded: dict, settings: dict, inputs: list[dict]) -> None:
    """Refuse to go on with another job.

    Raises:
        ValueError: It is another one.
    """
    before = recorded["settings"]
    other = [
        f"{name} {before.get(name)!r} (now {settings.get(name)!r})"
        for name in {**before, **settings}
        if before.get(name) != settings.get(name)
    ]
    if not other and recorded["inputs"] != inputs:
        now = {found.get("shard", "picture files"): found for found in inputs}
        then = {found.get("shard", "picture files"): found for found in recorded["inputs"]}
        for name in {**then, **now}:
            if now.get(name) != then.get(name):
                other.append(f"{name}: {_described(then.get(name))} (now {_described(now.get(name))})")
        other = other[:3] or ["the same inputs in another order"]
    if other:
        raise ValueError(
            f"{output} holds another job, with {'; '.join(other)}. Go on with what it was started with, or choose "
            "another output folder."
        )


def _described(found: dict | None) -> str:
    if found is None:
        return "none"
    if "files" in found:
        return f"{found['files']:,} with names {found['sha256'][:8]}"
    return f"{found['pictures']:,} in {found['bytes']:,} bytes"


@dataclass(frozen=True)
class Done:
    """A range that has its file now.

    Args:
        number: Which one.
        pictures: How many pictures it has.
        failed: How many of them have an error instead of a text.
    """

    number: int
    pictures: int
    failed: int


def run(
    job: Job,
    numbers: Iterable[int],
    model,
    processor,
    *,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
) -> Iterator[Done]:
    """Answer about the pictures of some ranges, and write their files.

    Pictures of a range that become equally many tokens are asked about together, so that little is padded.

    Args:
        job: The job.
        numbers: The ranges, from `job.todo`.
        model: The job's model.
        processor: Its processor.
        batch_size: Number of pictures per batch.
        workers: Threads that read and prepare pictures while the model runs; `None` takes `num_workers()`.

    Yields:
        Each range, when its file is there.

    Raises:
        OSError: A file can't be read or written.
    """
    begun: deque = deque()
    fewest, most = model.config.image_token_range()

    def opened(number: int):
        pictures = job.pictures(number)
        order = list(range(len(pictures)))
        if fewest != most:
            sizes = [picture.size() or (1, 1) for picture in pictures]
            order.sort(key=processor.num_multimodal_tokens(image_sizes=sizes).num_image_tokens.__getitem__)
        return number, pictures, order

    def batches():
        for number, pictures, order in ahead(opened, numbers, depth=1):
            rows: list = [None] * len(pictures)
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                begun.append((number, pictures, rows, batch, start + batch_size >= len(order)))
                yield [pictures[k] for k in batch]

    question = job.question
    for results in answer_batches(
        batches(), model, processor, question.prompt, max_new_tokens=question.max_new_tokens, workers=workers
    ):
        number, pictures, rows, batch, is_last = begun.popleft()
        for k, result in zip(batch, results, strict=True):
            rows[k] = question.row(pictures[k].name, result)
        if is_last:
            job.files.write(number, rows, pictures)
            yield Done(number, len(rows), sum(row["error"] is not None for row in rows))


__all__ = [
    "Done",
    "FORMATS",
    "JOB",
    "Job",
    "Question",
    "ROWS_PER_FILE",
    "ahead",
    "answer_batches",
    "num_workers",
    "parse_share",
    "plan",
    "run",
    "share",
    "share_of_environment",
    "stamp_of",
]
