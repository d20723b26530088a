"""Kill a training run again and again, at random moments, and check what it leaves; prints a line per kill.

Then the same for files that can't grow.

    python killed_runs.py FOLDER KILLS SEED

Everything is imported and built once; each try is a fork of this process. Checkpoints are written every step, so that
most kills fall into one.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import tqdm.auto
from safetensors import safe_open


sys.path.insert(0, str(Path(__file__).parent))

from toy_runs import toy_trainer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from vlbridge.training.training_checkpoints import INCOMPLETE, last_checkpoint  # noqa: E402


STEPS = 60
FAILED = 10  # exit code of a run without a failed save; those are added


class Tell(TrainerCallback):
    """Write a byte for every step."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def on_step_end(self, args, state, control, **kwargs):
        os.write(self.pipe, b".")


def forked(work) -> int:
    """Run something in a child, whose output is dropped but for an error's; gives its process id."""
    child = os.fork()
    if child == 0:
        told = os.fdopen(os.dup(2), "w")
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            # makes a new thread pool, since a fork has lost its own: two threads that need it at once would both make
            # one, and one of them finds none ("Invalid thread pool!")
            torch.set_num_threads(torch.get_num_threads())
            for bar in (
                tqdm.std.tqdm,
                tqdm.auto.tqdm,
            ):  # all processes would share one lock, and a killed one never frees it
                bar.set_lock(threading.RLock())
            work()
        except BaseException:
            traceback.print_exc(file=told)
            told.flush()
            os._exit(1)
        os._exit(0)
    return child


def losses(folder: Path) -> list[tuple[int, float]]:
    state = json.loads((Path(last_checkpoint(folder)) / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def check(checkpoint: str) -> None:
    """Refuse a checkpoint that lacks something or can't be read."""
    folder = Path(checkpoint)
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        assert all(torch.isfinite(tensors.get_tensor(name)).all() for name in tensors.keys())
    torch.load(folder / "optimizer.pt", weights_only=True)
    torch.load(folder / "scheduler.pt", weights_only=True)
    torch.load(folder / "rng_state.pth", weights_only=False)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == int(folder.name.split("-")[1])
    assert json.loads((folder / "config.json").read_text())["bridge_only"]


class Disk(TrainerCallback):
    """From the second step on no file may become larger than this."""

    def __init__(self, limit: int):
        self.limit = limit

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


def on_a_full_disk(trainer, limit: int) -> None:
    trainer.add_callback(Disk(limit))
    trainer.train()
    os._exit(FAILED + len(trainer.failed_saves))


def main(root: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    build = toy_trainer(root / "parts")
    composed = build.compose()  # every child has a copy of its own
    gc.freeze()  # children don't look through all that was imported
    options = {
        "max_steps": STEPS,
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 3,
        "lr_scheduler_type": "linear",
    }

    def run(name: str, tell: int | None = None, **more) -> None:
        folder = root / name
        last = last_checkpoint(folder)
        trainer = build(folder, composed=composed, **{**options, **more})
        if tell is not None:
            trainer.add_callback(Tell(tell))
        trainer.train(resume_from_checkpoint=last)

    whole = forked(lambda: run("whole", save_strategy="steps", save_steps=STEPS))
    assert os.waitpid(whole, 0)[1] == 0
    for number in range(kills):
        listen, tell = os.pipe()
        child = forked(lambda tell=tell: run("killed", tell))
        os.close(tell)
        os.read(listen, 1)  # a step is done, its checkpoint comes next
        before = time.monotonic()
        os.read(listen, 1)
        time.sleep(rng.uniform(0, time.monotonic() - before))
        os.close(listen)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        folder = root / "killed"
        last = last_checkpoint(folder)
        saving = any(folder.glob(f"checkpoint-*/{INCOMPLETE}"))
        if last is not None:
            check(last)
        print(
            json.dumps({"kill": number, "last": last and Path(last).name, "during_save": saving, "status": status}),
            flush=True,
        )
    rest = forked(lambda: run("killed", save_steps=STEPS))
    assert os.waitpid(rest, 0)[1] == 0
    assert losses(root / "killed") == losses(root / "whole"), "the loss curves differ"
    with (
        safe_open(Path(last_checkpoint(root / "whole")) / "model.safetensors", framework="pt") as whole,
        safe_open(Path(last_checkpoint(root / "killed")) / "model.safetensors", framework="pt") as killed,
    ):
        assert all(torch.equal(whole.get_tensor(name), killed.get_tensor(name)) for name in whole.keys())
    for limit in (500, 10_000):  # bytes: not even JSON files fit, or all but the optimizer's state
        child = forked(
            lambda limit=limit: on_a_full_disk(
                build(root / f"full_{limit}", composed=composed, **{**options, "max_steps": 3}), limit
            )
        )
        _, status = os.waitpid(child, 0)
        left = sorted(path.name for path in (root / f"full_{limit}").iterdir())
        for name in left:
            check(str(root / f"full_{limit}" / name))
        print(json.dumps({"limit": limit, "failed_saves": os.waitstatus_to_exitcode(status) - FAILED, "left": left}))
    gc.unfreeze()
    print(json.dumps({"equal": True, "checkpoints": sorted(p.name for p in (root / "killed").iterdir())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
