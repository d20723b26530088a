"""A training or an evaluation in a process of its own, so that its peak of memory is its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

from ..training.training_failures import TrainingError
from ..training.training_recipes import Recipe
from ..training.training_run import train
from .evaluation_run import evaluate


_CHILD = "from vlbridge.evaluation.evaluation_jobs import child; child()"


class JobError(RuntimeError):
    """A training or an evaluation has failed."""


def work(job: dict) -> None:
    """Do a job in this process. What an earlier process has left of it is gone on with.

    Args:
        job: `recipe` (as a dict) and `output` of a training, or `model`, `task`, `data`, `output` and `options` of an
            evaluation.

    Raises:
        ValueError: Something is not as expected.
        OSError: A file can't be read or written.
        TrainingError: Training can't continue.
    """
    if "recipe" in job:
        train(Recipe.from_dict(job["recipe"]), job["output"], resume=True)
    else:
        evaluate(job["model"], None, job["task"], job["data"], job["output"], **job["options"])


def in_own_process(job: dict) -> None:
    """Do a job in a new process, which ends when this one ends, however that happens.

    Args:
        job: As for `work`; what JSON can hold.

    Raises:
        JobError: The job has failed.
    """
    with subprocess.Popen([sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        with suppress(BrokenPipeError):  # it has ended already, and says why
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        said = process.stdout.read().decode()  # until it ends; its standard input stays open as long
    if process.returncode == 0:
        return
    if said:
        raise JobError(json.loads(said))
    how = f"ended with exit code {process.returncode}"
    if process.returncode < 0:
        how = f"was ended by {signal.Signals(-process.returncode).name}, perhaps because memory ran out"
    raise JobError(f"its process {how}; see what it has printed.")


def end_with_parent(pipe: int) -> None:
    """End this process at once when nobody holds the other end of a pipe any more.

    Args:
        pipe: File descriptor to read from.
    """
    while os.read(pipe, 1):
        pass
    signal.raise_signal(signal.SIGTERM)


def child() -> None:
    """What the new process does: the job that it reads from stdin. What libraries print goes to stderr."""
    reply = os.dup(1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, args=(0,), daemon=True).start()
    try:
        work(job)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, ImportError, TrainingError) as error:
        os.write(reply, json.dumps(str(error) or type(error).__name__).encode())
        sys.exit(1)


__all__ = ["JobError", "child", "end_with_parent", "in_own_process", "work"]
