"""Atomic writing, hashing and caching of files; and retries of failed requests to the Hub."""

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
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP status codes after which a retry may succeed
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
        path: The file to write. An existing file is replaced at the end, or kept if writing fails.

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
    """Write a text file in UTF-8 atomically.

    Args:
        path: The file.
        text: The text to write.

    Raises:
        OSError: The file can't be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any, **options) -> None:
    """Write a JSON file atomically.

    Args:
        path: The file.
        content: The content to serialise.
        options: Arguments of `json.dumps`; `indent` defaults to 2.

    Raises:
        OSError: The file can't be written.
        TypeError: The content can't be serialised.
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
    """Create a temporary hidden folder next to `target`, on the same file system, and delete it at the end.

    Args:
        target: The folder that the files will be moved to.

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
    """Move the contents of one folder into another on the same file system, replacing entries of the same name.

    Args:
        source: The folder to empty.
        target: The folder to fill; it is created if it does not exist.
        last: Name of the file to move last: a folder is not seen as a model before it has its configuration.

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
    """Copy the permissions of one file to others: only the owner may read files that safetensors writes."""
    for path in paths:
        shutil.copymode(like, path)


# ---------------------------------------------------------------------- hashing


def sha256_of(path: str | os.PathLike, stop: threading.Event | None = None) -> str:
    """Hexadecimal SHA-256 of a file.

    Args:
        path: The file.
        stop: Setting this event stops the reading early; the result is then meaningless.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while (block := file.read(BLOCK_BYTES)) and not (stop is not None and stop.is_set()):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------- retries


def _transient_error(error: BaseException | None) -> BaseException | None:
    """The HTTP client's error that caused `error`, if a retry may succeed."""
    # The client has retried several times before a LocalEntryNotFoundError.
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        response = getattr(error, "response", None)
        if response is not None and hasattr(response, "status_code"):
            return error if response.status_code in TRANSIENT else None
        # By name: huggingface_hub may replace httpx by another client
        if any(base.__name__ == "TransportError" for base in type(error).__mro__):
            return error
        error = error.__cause__ if isinstance(error, OSError) else None
    return None


def retried(function: Callable, *args, **kwargs) -> Any:
    """Call a function that sends requests to the Hub, and retry it after temporary failures of the Hub or the network.

    The Hub's client itself retries uploads and most downloads of files, but neither the creation of repositories and
    commits nor downloads that are reset or answered with a server error.

    Args:
        function: The function; it must be safe to call it twice.
        args: Positional arguments of the function.
        kwargs: Keyword arguments of the function.

    Returns:
        The function's result.

    Raises:
        Exception: The function's error at the last of `ATTEMPTS` attempts, or at once if it is not temporary.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            transient = _transient_error(error)
            if transient is None or constants.HF_HUB_OFFLINE or attempt == ATTEMPTS:
                raise
            wait = 2.0 ** (attempt - 1)
            asked = getattr(getattr(transient, "response", None), "headers", {}).get("Retry-After", "")
            wait = max(wait, float(asked)) if asked.isdigit() else wait
            cause = str(transient).splitlines()[0] or type(transient).__name__
            logger.warning(f"{cause}: trying again in {wait:.0f} s.")
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
