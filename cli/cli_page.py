"""`vlbridge app`: a page in the browser."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import (
    CommandError,
    DeviceOption,
    DtypeOption,
    device_and_dtype,
    exit_codes,
    loading,
    one_line,
    print_line,
    quiet_libraries,
)
from .cli_inspect import EMBEDDED


ModelsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...",
        help=f"Folders, or ids on the Hub; {EMBEDDED!r} is the embedded bridge.",
        show_default="the embedded bridge",
    ),
]
SpaceOption = Annotated[
    Path | None,
    typer.Option("--write-space", metavar="FOLDER", help="Write the page as a Space of Hugging Face, and end."),
]


@exit_codes()
def page(
    models: ModelsArgument = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Its port.")] = 7860,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_megapixels: Annotated[float, typer.Option("--max-megapixels", min=0.01, help="Size of a picture.")] = 40,
    max_mebibytes: Annotated[float, typer.Option("--max-mebibytes", min=0.01, help="Size of a picture's file.")] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer.")] = 256,
    max_seconds: Annotated[float, typer.Option("--max-seconds", min=0.1, help="Time for an answer.")] = 120,
    max_waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="Questions at a time.")] = 64,
    write_space: SpaceOption = None,
) -> None:
    """Open a page in the browser: show pictures, ask, compare models and look inside them.

    The page loads nothing from other servers, and sends nothing to them.
    """
    sources = [None if model == EMBEDDED else model for model in models or [EMBEDDED]]
    quiet_libraries()
    try:
        from vlbridge.app_page import Page, launch
    except ImportError as error:
        raise CommandError(f"{one_line(error)}: pip install 'vlbridge[app]'") from error
    from vlbridge.app import PAGE_LIMITS, Bridge, names_of
    from vlbridge.inference import model_source

    try:
        names = names_of(sources)
    except ValueError as error:
        raise CommandError(one_line(error), exit_code=2) from error
    if write_space is not None:
        _write_space(write_space, sources)
        return
    device_and_dtype(device, dtype)
    limits = replace(
        PAGE_LIMITS, max_bytes=int(max_mebibytes * 2**20), max_pixels=int(max_megapixels * 1e6),
        max_new_tokens=max_new_tokens, max_seconds=max_seconds, max_waiting=max_waiting,
    )  # fmt: skip
    bridges = []
    for name, source in zip(names, sources):
        with loading(model_source(source)):
            bridges.append(Bridge(name, source, device, dtype, limits))
    shown = Page(bridges, limits)
    try:
        address = launch(shown, host, port, block=False)
    except OSError as error:
        raise CommandError(f"cannot listen at {host}:{port}: {one_line(error)}") from error
    print_line(f"{address} shows {', '.join(names)}; Ctrl+C ends it", sys.stderr)
    shown.blocks.block_thread()


def _write_space(folder: Path, sources: list[str | None]) -> None:
    """Write the files of a Space.

    Raises:
        CommandError: They can't be written.
    """
    from vlbridge.app_space import write_space

    try:
        written = write_space(folder, sources)
    except (ValueError, OSError) as error:
        raise CommandError(one_line(error)) from error
    print_line(f"{', '.join(file.name for file in written)} and the package: {folder}", sys.stdout)
    print_line(f"hf upload --repo-type space NAME {folder} .", sys.stderr)


__all__ = ["page"]
