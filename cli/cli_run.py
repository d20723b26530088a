"""`vlbridge caption` and `vlbridge ask`: texts about image files."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import (
    BatchSizeOption,
    CommandError,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    ShardOption,
    device_and_dtype,
    exit_codes,
    explaining_out_of_memory,
    loading,
    one_line,
    print_line,
    quiet_libraries,
    share_of,
)


IMAGES = typer.Argument(
    metavar="IMAGE...", help="Files, folders, quoted globs, addresses, or - for stdin.", show_default=False
)
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer, in tokens.")
]
RecursiveOption = Annotated[bool, typer.Option("--recursive", "-r", help="Include subfolders.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder to write to, or to go on in; IMAGE may also be tars and Parquet files."
    ),
]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="Files in --output: jsonl, parquet or tar.", show_default="jsonl")
]
RowsOption = Annotated[
    int | None, typer.Option("--rows-per-file", min=1, help="Rows of a file in --output.", show_default="64")
]
ImageColumnOption = Annotated[
    str | None,
    typer.Option("--image-column", help="Column of Parquet files with the pictures.", show_default="image"),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Threads that prepare pictures.", show_default="one per core, at most 8"),
]
ActorsOption = Annotated[
    int | None, typer.Option("--ray-actors", min=1, help="Run on Ray Data with this many copies of the model.")
]


@dataclass
class Run:
    """What both commands need to know to answer about image files.

    Args:
        patterns: Files, folders, globs and addresses; `-` is stdin.
        prompt: What to ask; `None` takes the processor's `caption_prompt`.
        model: Folder or Hub id; `None` takes the embedded bridge.
        device: As on the command line.
        dtype: As on the command line.
        max_new_tokens: Maximum length of an answer, in tokens.
        batch_size: Number of images per batch.
        recursive: Look into subfolders.
        as_json: Print a JSON object per image.
        workers: Threads that prepare pictures; `None` takes one per core.
    """

    patterns: list[str]
    prompt: str | None
    model: str | None
    device: str | None
    dtype: str | None
    max_new_tokens: int
    batch_size: int
    recursive: bool
    as_json: bool
    workers: int | None = None


def load_model(model: str | None, device: str | None, dtype: str | None):
    """Load a bridged model and its processor.

    Raises:
        CommandError: There is no such model, device or dtype, or the model generates no text.
    """
    from vlbridge import inference

    device_and_dtype(device, dtype)  # first, because checking the model may take a request to the Hub
    quiet_libraries()
    source = inference.model_source(model)
    with loading(source):
        return inference.load(source, device, dtype)


def _is_elsewhere(pattern: str) -> bool:
    """Whether an argument is an address or stands for stdin."""
    return pattern == "-" or pattern.startswith(("http://", "https://"))


def _read(source: Path | str):
    """An image from a file, an address or stdin.

    Raises:
        ImageError: There is none that can be read.
    """
    from vlbridge.images import decode_image, read_image

    return decode_image(sys.stdin.buffer.read(), "stdin") if source == "-" else read_image(source)


def warn_of_photographs(model: str | None, picture, name: str, of_several: bool = False) -> bool:
    """Say on stderr where the embedded bridge can't know what a picture shows.

    Args:
        model: As on the command line; other models than the embedded bridge may know anything.
        picture: The picture, as Pillow has it.
        name: What the user calls it.
        of_several: Say which model it is about.

    Returns:
        Whether there was something to say.
    """
    from vlbridge import demo, inference

    warning = demo.photograph_warning(picture, name, inference.model_source(model))
    if warning is None:
        return False
    print_line(f"vlbridge: warning: {f'{model}: ' if of_several else ''}{warning}", sys.stderr)
    return True


def answer_files(run: Run, files: Sequence[Path | str]) -> Iterator[tuple[Path | str, str | None, str | None]]:
    """Answer about images, batch by batch. The model is loaded when the first image has been read.

    Yields:
        The file, address or `-`, and its text or what is wrong with it.
    """
    from vlbridge.bulk import answer_batches, num_workers
    from vlbridge.images import ImageError

    known = {}  # stdin can't be read twice
    warned = False

    def read_first(file):
        nonlocal warned
        picture = _read(file)
        warned = warned or warn_of_photographs(run.model, picture, str(file))  # once is enough
        return picture

    def read(file):
        if file not in known:
            return read_first(file)
        if isinstance(known[file], ImageError):
            raise known[file]
        return known[file]

    for file in files:
        try:
            known[file] = read_first(file)
            break
        except ImageError as error:
            known[file] = error
    else:
        yield from ((file, None, error.reason) for file, error in known.items())
        return
    model, processor = load_model(run.model, run.device, run.dtype)
    prompt = processor.caption_prompt if run.prompt is None else run.prompt
    batches = [files[start : start + run.batch_size] for start in range(0, len(files), run.batch_size)]
    workers = min(run.workers or num_workers(), max(len(batches) - 1, 1))
    with explaining_out_of_memory(min(run.batch_size, len(files))):
        answered = answer_batches(
            batches, model, processor, prompt, read=read, max_new_tokens=run.max_new_tokens, workers=workers
        )
        for batch, results in zip(batches, answered, strict=True):
            for file, result in zip(batch, results, strict=True):
                if isinstance(result, ValueError):
                    yield file, None, result.reason if isinstance(result, ImageError) else one_line(result)
                else:
                    yield file, result, None


def print_answers(run: Run, as_row: Callable[[str], dict]) -> None:
    """Answer about every image file that the patterns stand for, and print the answers.

    Args:
        run: What to do.
        as_row: Turns a text into the keys that a line of JSON has besides `image`.

    Raises:
        CommandError: The model, the device or the dtype can't be used.
        typer.Exit: With code 1, if an image failed.
    """
    from tqdm import tqdm

    from vlbridge.images import ImageError, expand_paths

    device_and_dtype(run.device, run.dtype)  # refused before anything is read
    failed = 0

    def report(path, reason: str) -> None:
        nonlocal failed
        failed += 1
        if run.as_json:
            print_line(json.dumps({"image": str(path), "error": reason}), sys.stdout)
        else:
            print_line(f"vlbridge: error: {path}: {reason}", sys.stderr)

    files = {}
    for pattern in run.patterns:
        if _is_elsewhere(pattern):
            files.setdefault(pattern, pattern)
            continue
        try:
            for file in expand_paths([pattern], recursive=run.recursive):
                files.setdefault(os.path.abspath(file), file)
        except ImageError as error:
            report(error.path, error.reason)
    files = list(files.values())
    only_one = len(files) + failed == 1

    on_terminal = sys.stderr.isatty()
    show_bar = len(files) > (1 if on_terminal else run.batch_size)
    interval = 0.1 if on_terminal else 10.0  # seconds; a log file gets a line now and then
    with tqdm(total=len(files), unit="image", file=sys.stderr, mininterval=interval, disable=not show_bar) as bar:
        for file, text, reason in answer_files(run, files):
            if text is None:
                report(file, reason)
            elif run.as_json:
                print_line(json.dumps({"image": str(file), **as_row(text)}), sys.stdout)
            else:
                text = " ".join(text.split())  # one line per image
                print_line(text if only_one else f"{file}\t{text}", sys.stdout)
            bar.update()
    if failed:
        raise typer.Exit(1)


@dataclass
class Writing:
    """Where and how rows are written, instead of lines on stdout.

    Args:
        output: Folder to write to; `None` prints.
        file_format: `jsonl`, `parquet` or `tar`; `None` is `jsonl`.
        rows_per_file: Rows in a file; `None` takes the library's number.
        image_column: Column of Parquet files that has the pictures; `None` is `image`.
        shard: `I/N`; `None` does all of the job, or what torchrun says.
        ray_actors: Run on Ray Data with so many actors.
    """

    output: Path | None
    file_format: str | None
    rows_per_file: int | None
    image_column: str | None
    shard: str | None
    ray_actors: int | None

    def share(self) -> tuple[int, int]:
        """Which process this is, of how many.

        Raises:
            CommandError: Options contradict each other.
        """
        if self.ray_actors and self.shard:
            raise CommandError("--ray-actors shares the job out by itself; leave --shard out", exit_code=2)
        if self.ray_actors:
            return 1, 1
        return share_of(self.shard)


def answer(run: Run, writing: Writing, question: str | None, as_row: Callable[[str], dict]) -> None:
    """Do what a command line asks for: print answers, or write them to a folder.

    Args:
        run: What to do.
        writing: Where to write.
        question: The question of `ask`.
        as_row: See `print_answers`.

    Raises:
        CommandError: An option can't be used.
        typer.Exit: With code 1, if an image failed.
    """
    if writing.output is not None:
        write_answers(run, writing, question)
        return
    for name in ("file_format", "rows_per_file", "image_column", "shard", "ray_actors"):
        if getattr(writing, name) is not None:
            option = "format" if name == "file_format" else name.replace("_", "-")
            raise CommandError(f"--{option} needs --output FOLDER", exit_code=2)
    print_answers(run, as_row)


def write_answers(run: Run, writing: Writing, question: str | None) -> None:
    """Write a row per image into files in a folder; what is there already is not done again.

    Args:
        run: What to do.
        writing: Where to write.
        question: The question of `ask`; `None` captions.

    Raises:
        CommandError: Something can't be used, or went wrong; what was written stays.
        typer.Exit: With code 1, if every image has failed.
    """
    from vlbridge import bulk, inference
    from vlbridge.images import ImageError

    number, count = writing.share()
    if elsewhere := [pattern for pattern in run.patterns if _is_elsewhere(pattern)]:
        raise CommandError(f"{elsewhere[0]}: --output takes files, folders and shards only", exit_code=2)
    device = run.device
    if device is None and writing.shard is None and count > 1 and device_and_dtype(None, None)[0].type == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device_and_dtype(device, run.dtype)
    quiet_libraries()
    source = inference.model_source(run.model)
    with loading(source):
        asked = bulk.Question.of(run.model, question, run.prompt, run.max_new_tokens, device, run.dtype)
    try:
        if writing.ray_actors:
            from vlbridge.bulk_ray import require_ray, run_on_ray

            require_ray()
        job = bulk.plan(
            run.patterns, writing.output, asked, file_format=writing.file_format or "jsonl",
            rows_per_file=writing.rows_per_file or bulk.ROWS_PER_FILE, recursive=run.recursive,
            image_column=writing.image_column or "image",
        )  # fmt: skip
        todo = job.todo(number, count)
        if todo and run.model is None:  # else no picture is opened for it
            with suppress(ImageError):  # which becomes a row
                first = job.pictures(todo[0][0])[0]
                warn_of_photographs(run.model, first.image(), first.name)
        options = {"batch_size": run.batch_size, "workers": run.workers}
        if writing.ray_actors:
            running = run_on_ray(job, writing.ray_actors, device=device, **options)
        elif todo:
            model, processor = load_model(run.model, device, run.dtype)
            running = bulk.run(job, [part for part, _ in todo], model, processor, **options)
        else:
            running = iter(())
        _follow(run, writing, job, sum(pictures for _, pictures in todo), running)
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(one_line(error)) from error


def _follow(run: Run, writing: Writing, job, pictures: int, running: Iterator) -> None:
    """Show how far a job is, and print at its end what it has given."""
    from tqdm import tqdm

    if pictures < len(job):
        print_line(f"{len(job) - pictures:,} of {len(job):,} images are done, or another shard's", sys.stderr)
    done = failed = 0
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=pictures, unit="image", file=sys.stderr, mininterval=interval, disable=not pictures) as bar:
        try:
            with explaining_out_of_memory(run.batch_size):
                for part in running:
                    done, failed = done + part.pictures, failed + part.failed
                    bar.update(part.pictures)
        except RuntimeError as error:
            if not writing.ray_actors:
                raise
            raise CommandError(one_line(error)) from error
    left = sum(count for _, count in job.todo())
    if run.as_json:
        summary = {"output": str(writing.output), "images": len(job), "done": done, "failed": failed, "left": left}
        print_line(json.dumps(summary), sys.stdout)
    else:
        more = f"; {left:,} of {len(job):,} are left to other shards" if left else ""
        print_line(f"{done:,} images done, {failed:,} of them with an error, in {writing.output}{more}", sys.stdout)
    if done and failed == done:
        raise typer.Exit(1)


@exit_codes()
def caption(
    images: Annotated[list[str], IMAGES],
    model: ModelOption = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Prompt to use instead of the model's own.", show_default="the model's own"),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_new_tokens: MaxNewTokensOption = 40,
    batch_size: BatchSizeOption = 8,
    recursive: RecursiveOption = False,
    as_json: JsonOption = False,
    output: OutputOption = None,
    file_format: FormatOption = None,
    rows_per_file: RowsOption = None,
    image_column: ImageColumnOption = None,
    shard: ShardOption = None,
    workers: WorkersOption = None,
    ray_actors: ActorsOption = None,
) -> None:
    """Describe images.

    One image gives its caption; several give a line "path<TAB>caption" each. An image that cannot be read is reported,
    the others are still captioned, and the exit code is 1. With --output, rows are written to files instead, and a run
    that was killed resumes where it stopped.
    """
    run = Run(images, prompt, model, device, dtype, max_new_tokens, batch_size, recursive, as_json, workers)
    writing = Writing(output, file_format, rows_per_file, image_column, shard, ray_actors)
    answer(run, writing, None, lambda text: {"caption": text})


@exit_codes()
def ask(
    images: Annotated[list[str] | None, IMAGES] = None,
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="The question, which is asked about each image.", show_default=False),
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_new_tokens: MaxNewTokensOption = 40,
    batch_size: BatchSizeOption = 8,
    recursive: RecursiveOption = False,
    as_json: JsonOption = False,
    output: OutputOption = None,
    file_format: FormatOption = None,
    rows_per_file: RowsOption = None,
    image_column: ImageColumnOption = None,
    shard: ShardOption = None,
    workers: WorkersOption = None,
    ray_actors: ActorsOption = None,
) -> None:
    """Ask a question about images.

    One image gives its answer; several give a line "path<TAB>answer" each. An image that cannot be read is reported,
    the others are still answered, and the exit code is 1. With --output, rows are written to files instead, and a run
    that was killed resumes where it stopped.
    """
    if not images or question is None:  # a single argument is taken for the question
        lacking = "image" if question is None else "question" if os.path.exists(question) else "image"
        raise CommandError(f'the {lacking} is missing; expected IMAGE... and "QUESTION"', exit_code=2)
    if os.path.exists(question):
        raise CommandError(f"the last argument must be the question, but {question!r} is a file or folder", exit_code=2)
    if not question.strip():
        raise CommandError("the question is empty", exit_code=2)
    run = Run(images, question, model, device, dtype, max_new_tokens, batch_size, recursive, as_json, workers)
    writing = Writing(output, file_format, rows_per_file, image_column, shard, ray_actors)
    answer(run, writing, question, lambda text: {"question": question, "answer": text})


__all__ = ["Run", "Writing", "answer_files", "ask", "caption", "load_model", "print_answers", "write_answers"]
