"""Folders of checkpoints: begun, completed, found, rotated and deleted.

While a checkpoint is written its folder holds a file `.incomplete`, which is deleted when everything else is on disk.
A checkpoint without that file is complete: earlier versions, which had no such file, gave a checkpoint its name last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from .training_failures import TrainingError


INCOMPLETE = ".incomplete"
STATE_FILE = "bridge_trainer.json"  # what this trainer notes in a checkpoint, besides transformers' own files
TRAINER_STATE = "trainer_state.json"
# Beginnings of the names of folders that an interrupted save or deletion leaves
SAVING, DELETING = ".saving", ".deleting"


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint with all its files."""
    checkpoint = Path(checkpoint)
    return (checkpoint / TRAINER_STATE).is_file() and not (checkpoint / INCOMPLETE).exists()


def _numbered(folder: str | os.PathLike) -> list[Path]:
    """Folders that are named as checkpoints are, by step."""
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name)):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def complete_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run.

    Args:
        folder: The run's folder; it need not exist.

    Returns:
        Their folders, in the order of their steps.
    """
    return [path for path in _numbered(folder) if is_complete(path)]


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last complete checkpoint of a run; `None` if there is none.

    Args:
        folder: The run's folder; it need not exist.
    """
    complete = complete_checkpoints(folder)
    return str(complete[-1]) if complete else None


def begin_checkpoint(checkpoint: Path) -> None:
    """Make a checkpoint's folder, marked as incomplete; one with the same name is deleted.

    Raises:
        OSError: The folder can't be written to.
    """
    if checkpoint.exists():
        delete_checkpoint(checkpoint)
    checkpoint.mkdir(parents=True)
    (checkpoint / INCOMPLETE).touch()
    (checkpoint / "README.md").touch()  # no model card is made where there is one
    _sync(checkpoint)


def complete_checkpoint(checkpoint: Path, note: dict) -> None:
    """Add what this trainer notes, see that everything is on disk, and remove the mark.

    Args:
        checkpoint: The folder, which holds everything else.
        note: For `note_in`.

    Raises:
        OSError: Something can't be written.
    """
    (checkpoint / "README.md").unlink(missing_ok=True)
    (checkpoint / STATE_FILE).write_text(json.dumps(note) + "\n")
    for path in checkpoint.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(checkpoint)
    (checkpoint / INCOMPLETE).unlink()
    _sync(checkpoint)


def note_in(checkpoint: str | os.PathLike) -> dict:
    """What this trainer noted in a checkpoint; nothing in one of transformers' own.

    Args:
        checkpoint: The folder.

    Returns:
        `loss` and `last_logged`: the sum of losses since the last log, and its step; `seconds`: how long the run took
            so far.
    """
    path = Path(checkpoint) / STATE_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a folder under another name, so that a folder that is half deleted does not pass for a checkpoint."""
    doomed = checkpoint.with_name(f"{DELETING}-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def delete_leftovers(folder: str | os.PathLike) -> None:
    """Delete what interrupted saves and deletions have left in a run's folder.

    Args:
        folder: The run's folder; it need not exist.
    """
    folder = Path(folder)
    for leftover in (*folder.glob(f"{SAVING}*"), *folder.glob(f"{DELETING}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    for checkpoint in _numbered(folder):
        if not is_complete(checkpoint):
            delete_checkpoint(checkpoint)


def rotate_checkpoints(folder: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """Delete the oldest complete checkpoints.

    Args:
        folder: The run's folder.
        limit: How many to keep; all if it is `None` or 0.
        best: The best checkpoint, which stays; so does the last one.
    """
    complete = complete_checkpoints(folder)
    spared = {path for path in complete if best is not None and path.resolve() == Path(best).resolve()}
    spared |= set(complete[-1:])
    excess = len(complete) - limit if limit and limit > 0 else 0
    for path in [path for path in complete if path not in spared][: max(0, excess)]:
        delete_checkpoint(path)


def check_launch(checkpoint: str | os.PathLike, needed: str) -> None:
    """Refuse a checkpoint whose optimizer's state this launch would not find.

    Some processes would look for it while others wait for them, or the optimizer would start without its state.

    Args:
        checkpoint: The folder.
        needed: Pattern of the name of the file or folder that this launch reads the optimizer's state from.

    Raises:
        TrainingError: It was written by another kind of launch.
    """
    checkpoint = Path(checkpoint)
    found = sorted(path.name for kind in ("optimizer*", "global_step*") for path in checkpoint.glob(kind))
    if found and not any(checkpoint.glob(needed)):
        raise TrainingError(
            f"{checkpoint} has {', '.join(found)}, but this run needs {needed}: it was launched in another way. Resume "
            "the run with the accelerate configuration that it was started with."
        )


def _sync(path: Path) -> None:
    """Make sure that a file or folder is on disk."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = [
    "INCOMPLETE",
    "SAVING",
    "STATE_FILE",
    "begin_checkpoint",
    "check_launch",
    "complete_checkpoint",
    "complete_checkpoints",
    "delete_checkpoint",
    "delete_leftovers",
    "is_complete",
    "last_checkpoint",
    "note_in",
    "rotate_checkpoints",
]
