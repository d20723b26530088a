"""What the subcommands of `vlbridge` share: errors and exit codes, output, loading, and options."""

# torch, transformers, PIL and tqdm are imported where they are used: --help and --version need none of them.
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from textwrap import shorten
from typing import Annotated

import typer


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model to use: a folder or Hub id.", show_default="the embedded bridge"),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", help="Device to run on, such as cpu, cuda, cuda:1 or mps.", show_default="cuda, else mps, else cpu"
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="One of auto, float32, bfloat16, float16.", show_default="float32 on cpu, else bfloat16"
    ),
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Number of images per batch.")]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="Do the I-th of N parts of the job.", show_default="all, or as torchrun says"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]


# ---------------------------------------------------------------------- errors


class CommandError(Exception):
    """An error that ends the command with one line on stderr.

    Args:
        message: What is wrong; line breaks become spaces.
        exit_code: 1, or 2 if the command line itself is wrong.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors into exit codes, without tracebacks; bugs keep theirs.

    Raises:
        typer.Exit: With the code, after the error was printed.
    """
    try:
        yield
    except CommandError as error:
        print_line(f"vlbridge: error: {error}", sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as interruption:
        if str(interruption):
            print_line(f"vlbridge: interrupted: {interruption}", sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader (`| head`) has closed the pipe
        with suppress(OSError):  # or Python would complain when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def one_line(error: BaseException) -> str:
    """An error's message in one line of at most 1,500 characters; without a message, its type."""
    return shorten(str(error), 1500, placeholder=" ...") or type(error).__name__


@contextmanager
def explaining_out_of_memory(num_images: int) -> Iterator[None]:
    """Say what to do if memory runs out.

    Args:
        num_images: How many images are in a batch.

    Raises:
        CommandError: Memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise CommandError(f"out of memory with {num_images} images at a time; try a smaller --batch-size") from error


# ---------------------------------------------------------------------- output


def print_line(line: str, file) -> None:
    """Write a line at once, without breaking a progress bar.

    Args:
        line: The line; characters that the terminal's encoding lacks are escaped.
        file: `sys.stdout` or `sys.stderr`.
    """
    from tqdm import tqdm

    with tqdm.external_write_mode(file=file) if sys.stderr.isatty() else nullcontext():
        try:
            file.write(f"{line}\n")
        except UnicodeEncodeError:
            encoding = file.encoding or "ascii"
            file.write(line.encode(encoding, errors="backslashreplace").decode(encoding) + "\n")
        file.flush()


def quiet_libraries() -> None:
    """Keep messages of transformers and huggingface_hub off stderr; a terminal still gets their progress bars."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


# ---------------------------------------------------------------------- loading


def device_and_dtype(device: str | None, dtype: str | None):
    """Check `--device` and `--dtype`, and fill in what is not given.

    Returns:
        The `torch.device`, and the name of the dtype.

    Raises:
        CommandError: There is no such device or dtype, or this machine does not have the device.
    """
    from vlbridge import inference

    try:
        return inference.device_and_dtype(device, dtype)
    except ValueError as error:
        raise CommandError(f"--{one_line(error)}", exit_code=2) from error
    except RuntimeError as error:
        raise CommandError(f"--{one_line(error)}") from error


def share_of(shard: str | None) -> tuple[int, int]:
    """Which process this is, of how many that share a job.

    Args:
        shard: `--shard`; `None` takes what `torchrun` and `accelerate launch` say.

    Raises:
        CommandError: It is not of the form `I/N`.
    """
    from vlbridge.bulk import parse_share, share_of_environment

    try:
        return share_of_environment() if shard is None else parse_share(shard)
    except ValueError as error:
        raise CommandError(f"--{error}", exit_code=2) from error


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Check that a model exists, and name it in whatever goes wrong while it is being loaded.

    Args:
        model: Folder or Hub id.

    Raises:
        CommandError: There is no such model, or the body of the `with` statement failed.
    """
    path = Path(model)
    try:
        if path.is_file():
            raise CommandError("it is a file; give the folder that holds config.json")
        if not path.is_dir():
            if model.startswith((".", "/")) or model.count("/") > 1:
                raise CommandError("no such folder")
            look_up(model)
        refuse_adapters(path)
        yield
    except Exception as error:
        raise CommandError(f"cannot load {model!r}: {one_line(error)}") from error


def refuse_adapters(folder: Path) -> None:
    """Refuse a folder that holds an adapter of PEFT and no model.

    Raises:
        CommandError: It does.
    """
    about = folder / "adapter_config.json"
    if about.is_file() and not (folder / "config.json").is_file():
        with suppress(OSError, ValueError):
            base = json.loads(about.read_text(encoding="utf-8")).get("base_model_name_or_path")
            raise CommandError(
                f"{folder} holds an adapter alone, of {base or 'a model that it does not name'}: load that in Python, "
                "then PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(OTHER)"
            )


def look_up(model: str) -> None:
    """Refuse what is not on the Hub, with one request: without an answer, from_pretrained goes on asking for minutes.

    Raises:
        CommandError: The model is not in the cache, and it is not on the Hub or the Hub does not answer.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    neither = "it is not a folder here, and"
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
        HfApi().model_info(model, timeout=10)
    except HFValidationError as error:
        raise CommandError(f"{neither} not a name that the Hub allows") from error
    except RepositoryNotFoundError as error:
        raise CommandError(f"{neither} the Hub has no such model, or it is private") from error
    except Exception as error:  # which ones depends on the HTTP client of this version of huggingface_hub
        raise CommandError(f"{neither} the Hub cannot be reached: {one_line(error)}") from error


__all__ = [
    "BatchSizeOption",
    "CommandError",
    "DeviceOption",
    "DtypeOption",
    "JsonOption",
    "ModelOption",
    "ShardOption",
    "device_and_dtype",
    "exit_codes",
    "explaining_out_of_memory",
    "loading",
    "look_up",
    "one_line",
    "print_line",
    "quiet_libraries",
    "refuse_adapters",
    "share_of",
]
