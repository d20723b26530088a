"""Run transformers' common test suites against every family of vlbridge and print what became of them.

    python tests/conformance/run_conformance.py [--skips] [pytest's options]

`--skips` lists why the suites themselves skip tests. With options for pytest, such as `-k`, only what was selected is
checked. Exit status 0: every test passed, was skipped by the suite itself, or is excluded (`exclusions.py`) and failed
as expected.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


HERE = Path(__file__).resolve().parent
COLUMNS = ("ran", "passed", "failed", "skipped by the suite", "excluded")


class Tally:
    """A pytest plugin that counts outcomes per family and remembers which exclusions were met."""

    def __init__(self, families: dict[str, str]):
        self.families = families  # start of the test class's name -> family
        self.counts = {family: Counter() for family in families.values()}
        self.met: set[str] = set()
        self.stale: list[str] = []
        self.skip_reasons = Counter()

    def pytest_runtest_logreport(self, report):
        test_class = report.nodeid.split("::")[1]
        family = next(family for start, family in self.families.items() if test_class.startswith(start))
        if report.when != "call" and report.outcome == "passed":
            return
        excluded = getattr(report, "wasxfail", None)
        if excluded is not None:
            self.met.add(excluded.removeprefix("reason: ").removeprefix("[NOTRUN] "))
            self.counts[family]["excluded"] += 1
        elif report.outcome == "skipped":
            self.counts[family]["skipped by the suite"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = re.sub(r"\S*(Test::|ForConditional|Processor\b)\S*", "...", reason.removeprefix("Skipped: "))
            self.skip_reasons[reason] += 1
        else:
            self.counts[family]["ran"] += 1
            self.counts[family][report.outcome] += 1
            if report.outcome == "failed" and "XPASS(strict)" in str(report.longrepr):
                self.stale.append(report.nodeid.split("::", 1)[-1])
                self.met.add(str(report.longrepr).partition("[XPASS(strict)] ")[2].strip())


def table(counts: dict[str, Counter]) -> str:
    """Counts per family, as text."""
    rows = [["family", *COLUMNS]]
    rows += [[family, *(str(count[column]) for column in COLUMNS)] for family, count in counts.items()]
    total = sum(counts.values(), Counter())
    rows.append(["all", *(str(total[column]) for column in COLUMNS)])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def main(arguments: list[str]) -> int:
    """Prepare the suites, run them, print the table.

    Args:
        arguments: Of the command line.

    Returns:
        Exit status.
    """
    options = [argument for argument in arguments if argument != "--skips"]
    os.environ.update(VLBRIDGE_CONFORMANCE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes below share the cores
    sys.path[:0] = [str(HERE), str(HERE.parent)]

    import pytest
    import suites
    import transformers
    from exclusions import EXCLUSIONS

    from vlbridge.families import FAMILIES

    folder = suites.fetch()
    start = time.perf_counter()
    families = {}
    for family in FAMILIES.values():
        families[family.model_class.__name__] = families[family.processor_class.__name__] = family.name
    tally = Tally(families)
    with tempfile.TemporaryDirectory() as tiny_models:
        os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = tiny_models
        suites.save_tiny_models(Path(tiny_models))
        try:
            import xdist  # noqa: F401

            spread = ["-n", str(min(2, os.cpu_count() or 1))]
        except ImportError:
            spread = []
        # FutureWarnings that the suites provoke on purpose are no errors here
        unknown_marks = ["-W", "ignore::pytest.PytestUnknownMarkWarning"]
        quiet = ["-q", "-p", "no:cacheprovider", "-W", "default::FutureWarning", *unknown_marks]
        status = pytest.main([str(HERE), *quiet, *spread, *options], plugins=[tally])

    print(f"\ntransformers {transformers.__version__}, suites in {folder}, {time.perf_counter() - start:.0f} s\n")
    print(table(tally.counts))
    print("\nExcluded, each expected to fail:")
    for exclusion in filter(lambda exclusion: exclusion.applies, EXCLUSIONS):
        print(f"- {exclusion.test} ({exclusion.scope}): {exclusion.reason}")
    if "--skips" in arguments:
        print("\nSkipped by the suite:")
        for reason, count in tally.skip_reasons.most_common():
            print(f"- {count} x {reason}")
    stale = [f"{test}: passes" for test in tally.stale]
    if not options:  # a selection does not meet every exclusion
        stale += [
            f"{one.test}: no such test, or the suite skips it"
            for one in EXCLUSIONS
            if one.applies and one.marker not in tally.met
        ]
    for line in stale:
        print(f"Stale exclusion: {line}. Remove it from exclusions.py.")
    return int(status) or int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
