"""Kill a bake-off at several places, and let it go on; and one that nobody kills.

    python killed_bakeoffs.py RECIPES FOLDER

Each try is a fork of this process. What they leave, in `whole` and `killed` of the folder, is compared by the test.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

from killed_runs import forked  # noqa: E402

from vlbridge.evaluation import bakeoff, evaluation_bakeoff  # noqa: E402
from vlbridge.evaluation.evaluation_answers import Answerer  # noqa: E402
from vlbridge.evaluation.evaluation_jobs import work  # noqa: E402
from vlbridge.training.training_resumable import ResumableTrainer  # noqa: E402


def killed_in(stage: str, number: int, recipes: Path, output: Path) -> None:
    """Run until the last step before a stage's job ends (or, of a training, its first checkpoint), then be killed."""
    left = [number]

    def dying(method):
        def wrapped(self, *args, **kwargs):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return method(self, *args, **kwargs)

        return wrapped

    if stage == "training":  # after so many checkpoints
        ResumableTrainer.save_checkpoint = dying(ResumableTrainer.save_checkpoint)
    elif stage == "answering":  # after so many batches
        Answerer.__call__ = dying(Answerer.__call__)
    else:
        evaluation_bakeoff.draw = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    whole(recipes, output)


def whole(recipes: Path, output: Path) -> None:
    bakeoff(
        [recipes / "mlp.yaml", recipes / "qformer.yaml"], output_dir=output, seeds=1, shuffled=True, limit=6,
        batch_size=3, device="cpu",
    )  # fmt: skip


def main(recipes: Path, root: Path) -> None:
    def ended(work) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])

    evaluation_bakeoff.in_own_process = work  # a new process takes seconds to import everything
    assert ended(lambda: whole(recipes, root / "whole")) == 0
    killed = root / "killed"
    for stage, number in (("training", 1), ("answering", 1), ("answering", 4), ("report", 0)):
        assert ended(lambda stage=stage, number=number: killed_in(stage, number, recipes, killed)) == -signal.SIGKILL
        assert not list(killed.glob("bakeoff.*"))
    assert ended(lambda: whole(recipes, killed)) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
