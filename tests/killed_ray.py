"""Kill `vlbridge caption --ray-actors` with everything that it has started, and let it go on.

    python killed_ray.py MODEL PICTURES OUTPUT ACTORS KILLS ROWS_PER_FILE

Prints a line per try, and at last what the folder holds. Needs Ray.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from vlbridge.row_files import RowFiles


def processes_of(session: int) -> list[int]:
    """Processes of a session that have not ended: Ray's daemons are among them, whatever their process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def main(model: str, pictures: str, output: str, actors: str, kills: int, rows: str) -> None:
    rng = random.Random(0)
    command = [
        sys.executable, "-m", "vlbridge_cli", "caption", pictures, "--output", output, "--model", model, "--device",
        "cpu", "--max-new-tokens", "6", "--rows-per-file", rows, "--batch-size", "16", "--ray-actors", actors,
        "--workers", "1",
    ]  # fmt: skip
    files = RowFiles(output)
    for number in range(kills + 1):
        before, begun = files.done(), time.monotonic()
        patient = {**os.environ, "RAY_raylet_start_wait_time_s": "300"}  # a busy machine needs more than Ray's own time
        process = subprocess.Popen(command, start_new_session=True, env=patient)
        wanted = len(before) + rng.randint(2, 5)
        while number < kills and process.poll() is None and len(files.done()) < wanted:
            time.sleep(0.05)
        if number < kills:
            time.sleep(rng.uniform(0, 1))
            assert process.poll() is None, "it has ended before it was killed"
            everything = processes_of(process.pid)
            for one in (process.pid, *everything):  # the driver first, then what it has started
                try:
                    os.kill(one, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.wait()
            while processes_of(process.pid):
                time.sleep(0.1)
        else:
            assert process.wait() == 0
        seconds = round(time.monotonic() - begun)
        done = len(files.done())
        print(json.dumps({"try": number, "files_before": len(before), "files": done, "seconds": seconds}), flush=True)
    names = [row["image"] for row in files.rows()]
    failed = sum(row["error"] is not None for row in files.rows())
    print(json.dumps({"rows": len(names), "different": len(set(names)), "failed": failed}))


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]), sys.argv[6])
