"""Errors of training: which of them a full disk causes, and how processes learn of each other's."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object
from safetensors import SafetensorError


# Errors of a disk that is full, read-only or failing; where a system lacks one, it can't raise it
STORAGE_ERRNOS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "ESTALE")
    if hasattr(errno, name)
}  # fmt: skip
# What torch's RuntimeErrors say when its file writer fails
WRITER_WORDS = ("PytorchStreamWriter", "file write failed", "No space left", "unexpected pos")


class TrainingError(RuntimeError):
    """Training can't continue."""


class OtherProcessError(TrainingError):
    """Another process failed.

    Args:
        message: Its error's message.
        storage: Whether that was a storage error, see `is_storage_error`.
    """

    def __init__(self, message: str, storage: bool):
        super().__init__(message)
        self.storage = storage


def is_storage_error(error: BaseException) -> bool:
    """Whether an error comes from a disk that is full, read-only or failing.

    Args:
        error: What was raised while files were written.
    """
    if isinstance(error, OtherProcessError):
        return error.storage
    if isinstance(error, OSError):
        return error.errno in STORAGE_ERRNOS
    if isinstance(error, SafetensorError):  # its errors have the number in their message only
        return any(int(number) in STORAGE_ERRNOS for number in re.findall(r"(?:os error|code:) (\d+)", str(error)))
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WRITER_WORDS)


@contextmanager
def failing_together() -> Iterator[None]:
    """Let a block fail in all processes if it fails in one, so that none waits for a process that is gone.

    All processes must enter the block, and it must not wait for other processes after something that can fail in one.

    Raises:
        Exception: What the block raised in this process.
        OtherProcessError: The block failed in another process only.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    mine = None if error is None else (" ".join(str(error).split()), is_storage_error(error))
    failures = gather_object([mine])
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            message, storage = failure
            raise OtherProcessError(f"process {rank}: {message}", storage)


__all__ = ["OtherProcessError", "TrainingError", "failing_together", "is_storage_error"]
