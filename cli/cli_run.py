"""`vlbridge caption` and `vlbridge ask`: texts about image files."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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
    device_and_dtype,
    exit_codes,
    explaining_out_of_memory,
    loading,
    one_line,
    print_line,
    quiet_libraries,
)


IMAGES = typer.Argument(
    metavar="IMAGE...", help="Files, folders, quoted globs, addresses, or - for stdin.", show_default=False
)
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer, in tokens.")
]
RecursiveOption = Annotated[bool, typer.Option("--recursive", "-r", help="Include subfolders.")]


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


def answer_files(run: Run, files: Sequence[Path | str]) -> Iterator[tuple[Path | str, str | None, str | None]]:
    """Answer about images, batch by batch. The model is loaded when the first image has been read.

    Yields:
        The file, address or `-`, and its text or what is wrong with it.
    """
    from vlbridge.images import ImageError
    from vlbridge.inference import answer_each

    model = processor = None
    for start in range(0, len(files), run.batch_size):
        batch = files[start : start + run.batch_size]
        images, texts, errors = {}, {}, {}
        for file in batch:
            try:
                images[file] = _read(file)
            except ImageError as error:
                errors[file] = error.reason
        if images:
            if model is None:
                model, processor = load_model(run.model, run.device, run.dtype)
            prompt = processor.caption_prompt if run.prompt is None else run.prompt
            with explaining_out_of_memory(len(images)):
                answers = answer_each(
                    model, processor, list(images.values()), prompt, max_new_tokens=run.max_new_tokens
                )
            for file, text in zip(images, answers, strict=True):
                if isinstance(text, ValueError):
                    errors[file] = one_line(text)
                else:
                    texts[file] = text
        for file in batch:
            yield file, texts.get(file), errors.get(file)


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
) -> None:
    """Describe images.

    One image gives its caption; several give a line "path<TAB>caption" each. An image that cannot be read is reported,
    the others are still captioned, and the exit code is 1.
    """
    run = Run(images, prompt, model, device, dtype, max_new_tokens, batch_size, recursive, as_json)
    print_answers(run, lambda text: {"caption": text})


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
) -> None:
    """Ask a question about images.

    One image gives its answer; several give a line "path<TAB>answer" each. An image that cannot be read is reported,
    the others are still answered, and the exit code is 1.
    """
    if not images or question is None:  # a single argument is taken for the question
        lacking = "image" if question is None else "question" if os.path.exists(question) else "image"
        raise CommandError(f'the {lacking} is missing; expected IMAGE... and "QUESTION"', exit_code=2)
    if os.path.exists(question):
        raise CommandError(f"the last argument must be the question, but {question!r} is a file or folder", exit_code=2)
    if not question.strip():
        raise CommandError("the question is empty", exit_code=2)
    run = Run(images, question, model, device, dtype, max_new_tokens, batch_size, recursive, as_json)
    print_answers(run, lambda text: {"question": question, "answer": text})


__all__ = ["Run", "answer_files", "ask", "caption", "load_model", "print_answers"]
