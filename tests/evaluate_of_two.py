"""Evaluations that are killed and resumed, and that two processes share; what became of them is written to files.

    python evaluate_of_two.py FOLDER

Everything is imported once; each run is a fork of this process. `FOLDER` then holds a folder per run: `whole`, `killed`
(thrice, then resumed), `two` and `killed_two` (two processes, killed, resumed by one); and what each process of `two`
was given back in `result_RANK.json`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent))

import benchmark_layouts as layouts  # noqa: E402
from killed_runs import forked  # noqa: E402
from tiny import tiny_model  # noqa: E402

from vlbridge.evaluation import evaluate  # noqa: E402
from vlbridge.evaluation.evaluation_answers import Answerer  # noqa: E402


OPTIONS = {"batch_size": 4, "shots": 2, "shuffled": True, "seed": 1, "device": "cpu"}


def run(root: Path, name: str, models) -> dict:
    return evaluate(*models, "easy_vqa", root / "data", root / name, **OPTIONS)


def killed_after(batches: int, root: Path, name: str, models) -> None:
    """Run until so many batches are written; then half a line is, and the process is killed."""
    answer, left = Answerer.__call__, [batches]

    def counted(self, samples, numbers):
        if not left[0]:
            for path in (root / name).glob("*.partial-*.jsonl"):
                with open(path, "a") as file:
                    file.write('{"number": 8, "id": "')
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return answer(self, samples, numbers)

    Answerer.__call__ = counted
    run(root, name, models)


def of_two(rank: int, port: int, work) -> None:
    """Do something as one of two processes."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    work()
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def waited(*children: int) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    (root / "data").mkdir()
    layouts.write_easy_vqa(root / "data", {"test": 7, "train": 4})
    models = tiny_model("mlp")
    assert waited(forked(lambda: run(root, "whole", models))) == [0]
    for batches in (2, 1, 5):  # of six in each of two passes
        assert waited(forked(lambda batches=batches: killed_after(batches, root, "killed", models))) == [
            -signal.SIGKILL
        ]
    (root / "killed_after.json").write_text(
        json.dumps({path.name: len(path.read_text().splitlines()) for path in (root / "killed").glob("*.jsonl")})
    )
    assert waited(forked(lambda: run(root, "killed", models))) == [0]

    def told(rank: int) -> None:
        (root / f"result_{rank}.json").write_text(json.dumps(run(root, "two", models)))

    port = free_port()
    assert waited(*(forked(lambda r=r: of_two(r, port, lambda: told(r))) for r in (0, 1))) == [0, 0]
    port = free_port()
    kill = [forked(lambda r=r: of_two(r, port, lambda: killed_after(2, root, "killed_two", models))) for r in (0, 1)]
    assert set(waited(*kill)) <= {-signal.SIGKILL, 1}
    assert waited(forked(lambda: run(root, "killed_two", models))) == [0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
