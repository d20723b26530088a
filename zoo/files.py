"""Files: written whole or not at all, hashed, cached; and requests to the Hub that are repeated when they fail."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.utils import logging


logger = logging.get_logger(__name__)

ATTEMPTS = 4
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP status codes that may be gone at the next attempt
BLOCK_BYTES = 1 << 20


def cache_dir() -> Path:
    """The folder where this package keeps what it has downloaded or computed.

    The environment variable `VLBRIDGE_CACHE` names it; the default is `vlbridge` in the Hugging Face home.
    """
    override = os.environ.get("VLBRIDGE_CACHE")
    return Path(override).expanduser() if override else Path(constants.HF_HOME) / "vlbridge"


# ---------------------------------------------------------------------- writing


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file under a temporary name, and rename it once it is complete.

    Args:
        path: The file to write. An existing file is replaced at the end, or stays as it is if writing fails.

    Yields:
        The temporary path, in the same folder, to write to.

    Raises:
        OSError: The file can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        OSError: The file can't be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any, **options) -> None:
    """Write a JSON file, whole or not at all.

    Args:
        path: The file.
        content: What to write.
        options: For `json.dumps`; `indent` is 2 unless given.

    Raises:
        OSError: The file can't be written.
        TypeError: JSON can't hold the content.
    """
    write_text(path, json.dumps(content, **{"indent": 2, **options}) + "\n")


def read_json(path: str | os.PathLike, default: Any = None) -> Any:
    """Read a JSON file; `default` if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


@contextmanager
def staging_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A hidden folder beside `target` to write in, on the same file system; it is gone at the end.

    Args:
        target: The folder that the files are meant for.

    Raises:
        ValueError: `target` is a file.
    """
    target = Path(target)
    if target.is_file():
        raise ValueError(f"{target} is a file; expected a folder to save to.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into(source: Path, target: Path, last: str = "config.json") -> set[str]:
    """Move everything in one folder into another on the same file system, replacing what has the same name.

    Args:
        source: The folder to empty.
        target: The folder to fill; it is made if it is missing.
        last: The name to move last: a model's folder without its configuration is no model yet.

    Returns:
        The names that were moved.
    """
    target.mkdir(exist_ok=True)
    paths = sorted(source.iterdir(), key=lambda path: path.name == last)
    for path in paths:
        if (target / path.name).is_dir():
            shutil.rmtree(target / path.name)
        os.replace(path, target / path.name)
    return {path.name for path in paths}


def share_permissions(like: Path, paths: Iterable[Path]) -> None:
    """Give files the permissions of another one: safetensors writes files that only their owner may read."""
    for path in paths:
        shutil.copymode(like, path)


# ---------------------------------------------------------------------- hashing


def sha256_of(path: str | os.PathLike, stop: threading.Event | None = None) -> str:
    """Hexadecimal SHA-256 of a file.

    Args:
        path: The file.
        stop: Setting it ends the reading early; the result is then of no use.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while (block := file.read(BLOCK_BYTES)) and not (stop is not None and stop.is_set()):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------- requests that are repeated


def _passing_error(error: BaseException) -> BaseException | None:
    """The HTTP client's error behind `error`, if it may be gone at the next attempt."""
    # LocalEntryNotFoundError: the client has tried several times already
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        response = getattr(error, "response", None)
        if response is not None and hasattr(response, "status_code"):
            return error if response.status_code in TRANSIENT else None
        # httpx, or what has taken its place in later versions of huggingface_hub
        if any(base.__name__ == "TransportError" for base in type(error).__mro__):
            return error
        error = error.__cause__ if isinstance(error, OSError) else None
    return None


def retried(function: Callable, *args, **kwargs) -> Any:
    """Call a function that asks the Hub, and call it again if the Hub or the network failed for the moment.

    The Hub's client repeats uploads and most downloads of files by itself, but neither the creation of repositories
    and commits nor downloads that are reset or answered with a server error.

    Args:
        function: The function; calling it twice must do no harm.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        What the function returns.

    Raises:
        Exception: What the function raised at the last of `ATTEMPTS` attempts, or at once if trying again is useless.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            passing = _passing_error(error)
            if passing is None or constants.HF_HUB_OFFLINE or attempt == ATTEMPTS:
                raise
            wait = 2.0 ** (attempt - 1)
            asked = getattr(getattr(passing, "response", None), "headers", {}).get("Retry-After", "")
            wait = max(wait, float(asked)) if asked.isdigit() else wait
            logger.warning(f"{str(passing).splitlines()[0] or type(passing).__name__}: trying again in {wait:.0f} s.")
            time.sleep(wait)


__all__ = [
    "cache_dir",
    "move_into",
    "read_json",
    "replacing",
    "retried",
    "sha256_of",
    "share_permissions",
    "staging_folder",
    "write_json",
    "write_text",
]
