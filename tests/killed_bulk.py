"""Kill bulk work of every family again and again, and compare the rows with those of a run that nobody kills.

    python killed_bulk.py FOLDER KILLS SEED

Each try is a fork of this process; the last one of each family is two processes that share what is left.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

from killed_runs import forked  # noqa: E402
from tiny import tiny_image, tiny_model  # noqa: E402

from vlbridge import FAMILIES  # noqa: E402
from vlbridge.bulk import Question, plan, run  # noqa: E402
from vlbridge.inference import load  # noqa: E402


PICTURES = 40


def main(root: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    (root / "pictures").mkdir(parents=True)
    for number in range(PICTURES):
        tiny_image(number).save(root / "pictures" / f"{number:02}.png")
    (root / "pictures" / "07.png").write_bytes(b"no picture")
    for family in FAMILIES:
        model, processor = tiny_model(family)
        model.save_pretrained(root / family)
        processor.save_pretrained(root / family)
        question = Question.of(root / family, max_new_tokens=4, device="cpu")
        model, processor = load(root / family, "cpu")

        def job(name, family=family, question=question):
            return plan([root / "pictures"], root / f"{family}_{name}", question, rows_per_file=2)

        def work(name, number=1, count=1, job=job, model=model, processor=processor):
            todo = job(name).todo(number, count)
            for _ in run(job(name), [k for k, _ in todo], model, processor, batch_size=2, workers=2):
                pass

        assert os.waitpid(forked(lambda work=work: work("whole")), 0)[1] == 0
        before, statuses = [], []
        for _ in range(kills):
            left = len(job("killed").todo())
            child = forked(lambda work=work: work("killed"))
            while len(job("killed").todo()) == left:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            statuses.append(os.waitpid(child, 0)[1])
            before.append(len(job("killed").files.done()))
        children = [forked(lambda work=work, k=k: work("killed", k, 2)) for k in (1, 2)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        rows = [list(job(name).files.rows()) for name in ("whole", "killed")]
        names = {row["image"] for row in rows[1]}
        equal = rows[0] == rows[1] and len(names) == len(rows[1]) == PICTURES
        print(json.dumps({"family": family, "statuses": statuses, "before": before, "equal": equal}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
