"""`vlbridge inspect`: what a model makes of pictures, as text, JSON or one HTML file."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import (
    CommandError,
    DeviceOption,
    DtypeOption,
    exit_codes,
    one_line,
    print_line,
)
from .cli_run import load_model


EMBEDDED = "embedded"
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help=f"Folder, id on the Hub, or {EMBEDDED!r} for the embedded bridge.")
]
ImagesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGE]...",
        help="Files, folders or quoted globs. Without them, only gates and the token budget are shown.",
    ),
]
QuestionOption = Annotated[
    str | None, typer.Option("--question", "-q", help="What to ask.", show_default="the model's prompt for captions")
]
AnswerOption = Annotated[
    str | None, typer.Option("--answer", help="The answer to examine.", show_default="what the model answers")
]
ReportOption = Annotated[
    Path | None, typer.Option("--report", help="Write an HTML file with all results and pictures; it needs no network.")
]
OcclusionOption = Annotated[
    bool,
    typer.Option(
        "--occlusion/--no-occlusion", help="Cover parts of each picture in turn, and see what that changes. Slow."
    ),
]
MeasureOption = Annotated[bool, typer.Option("--measure", help="Measure time and memory with 0, 1, 2 and 4 images.")]
InspectJsonOption = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@exit_codes()
def inspect(
    model: ModelArgument,
    images: ImagesArgument = None,
    question: QuestionOption = None,
    answer: AnswerOption = None,
    report: ReportOption = None,
    occlusion: OcclusionOption = True,
    measure: MeasureOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: InspectJsonOption = False,
) -> None:
    """Look inside a model, and at what it makes of pictures.

    Shows gates, queries, attention, whether the answer needed the picture, and the token budget.
    """
    for name, text in (("--question", question), ("--answer", answer)):
        if text is not None and not text.strip():
            raise CommandError(f"{name} is empty", exit_code=2)
    if measure and not images:
        raise CommandError("--measure needs a picture", exit_code=2)
    if report is not None and not report.absolute().parent.is_dir():
        raise CommandError(f"--report {report}: there is no such folder", exit_code=2)
    pictures = _pictures(images or [])
    source = None if model == EMBEDDED else model
    loaded, processor = load_model(source, device, dtype)
    options = {"question": question, "answer": answer, "with_occlusion": occlusion, "measure": measure}
    found = _inspect(loaded, processor, model, pictures, options)
    if report is not None:
        from vlbridge.inspection.inspection_report import report_html

        try:
            report.write_text(report_html(found), encoding="utf-8")
        except OSError as error:
            raise CommandError(f"cannot write {report}: {one_line(error)}") from error
        print_line(f"{report}: {len(pictures)} picture{'s' * (len(pictures) != 1)}", sys.stderr)
    _print(found, as_json)


def _pictures(patterns: list[str]) -> dict:
    """Pictures by file name.

    Raises:
        CommandError: One of them can't be read.
    """
    from vlbridge.images import ImageError, expand_paths, load_image

    try:
        return {str(file): load_image(file) for pattern in patterns for file in expand_paths([pattern])}
    except ImageError as error:
        raise CommandError(f"{error.path}: {error.reason}") from error


def _inspect(model, processor, name: str, pictures: dict, options: dict):
    """Look into the model, with a progress bar for several pictures.

    Raises:
        CommandError: The model refuses a picture or has nothing to say, or memory ran out.
    """
    from tqdm import tqdm

    from vlbridge.inspection.inspection_report import inspect_model

    def progress(numbered: list):
        shown = len(numbered) > 1 and sys.stderr.isatty()
        return tqdm(numbered, unit="image", file=sys.stderr, disable=not shown)

    try:
        return inspect_model(model, processor, name, pictures, progress=progress, **options)
    except (ValueError, RuntimeError) as error:
        raise CommandError(one_line(error)) from error


def _print(found, as_json: bool) -> None:
    from vlbridge.inspection.inspection_report import finding_lines

    for line in [json.dumps(found.to_dict())] if as_json else finding_lines(found):
        print_line(line, sys.stdout)


__all__ = ["inspect"]
