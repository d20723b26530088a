"""What a bake-off has found: figures of runs, mean and spread over seeds, the table and the picture."""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..files import replacing


# Figures of a run that are measured: they differ each time. Name, and divisor and unit for people.
MEASURED = {
    "training seconds": (60, "min"),
    "training memory": (1e9, "GB"),
    "training GPU memory": (1e9, "GB"),
    "seconds per answer": (1e-3, "ms"),
    "answering memory": (1e9, "GB"),
    "answering GPU memory": (1e9, "GB"),
}


# ---------------------------------------------------------------------- figures


def main_metric(result: dict) -> str:
    """The metric that stands for a result: accuracy, CIDEr, or the first one.

    Args:
        result: What `evaluate` gives.
    """
    names = list(result["metrics"])
    return next((name for name in names if name.startswith(("accuracy", "CIDEr"))), names[0])


def figures_of(result: dict, baselines: Sequence[str] = ()) -> dict[str, float]:
    """All figures of an evaluation, in the order of the table's columns.

    Args:
        result: What `evaluate` gives.
        baselines: Those that are wanted, of `"blind"`, `"grey"` and `"shuffled"`.

    Returns:
        By name: the metrics, `METRIC, KIND` for each kind of question, and `BASELINE METRIC`, also by kind; of
        baselines and kinds the main metric alone.
    """
    main = main_metric(result)
    found = {name: metric["value"] for name, metric in result["metrics"].items()}
    found |= {f"{main}, {kind}": part[main] for kind, part in result["breakdown"].items()}
    for name in baselines:
        baseline = result["baselines"][name]
        found[f"{name} {main}"] = baseline["metrics"][main]["value"]
        found |= {f"{name} {main}, {kind}": part[main] for kind, part in baseline["breakdown"].items()}
    return {name: value for name, value in found.items() if value is not None}


def costs_of(summary: dict, timing: dict) -> dict[str, float]:
    """Time and memory of a run, as far as they are known.

    Args:
        summary: `training_summary.json`.
        timing: `timing.json` of its evaluation.

    Returns:
        Some of `MEASURED`: seconds, and bytes.
    """
    found = {"training seconds": summary.get("seconds")}
    runs = timing.get("runs", [])
    peaks = {"training": [summary.get("peak_memory", {})], "answering": [run.get("peak_memory", {}) for run in runs]}
    for what, each in peaks.items():
        for key, name in (("process", f"{what} memory"), ("cuda", f"{what} GPU memory")):
            found[name] = max((peak[key] for peak in each if key in peak), default=None)
    passes = [run.get("answered", {}).get("predictions", {}) for run in runs]
    if answers := sum(one.get("answers", 0) for one in passes):
        found["seconds per answer"] = sum(one.get("seconds", 0) for one in passes) / answers
    return {name: found[name] for name in MEASURED if found.get(name) is not None}


def mean_and_spread(runs: Sequence[dict[str, float]]) -> dict[str, dict]:
    """Mean and sample standard deviation of each figure.

    Args:
        runs: Figures by name; a run may lack some.

    Returns:
        By name `{"mean", "spread", "runs"}`; `spread` is `None` for a single run.
    """
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [run[name] for run in runs if name in run]
        spread = round(statistics.stdev(values), 6) if len(values) > 1 else None
        found[name] = {"mean": round(statistics.fmean(values), 6), "spread": spread, "runs": len(values)}
    return found


# ---------------------------------------------------------------------- table


def _shown(figure: dict | None, digits: int = 1, divisor: float = 1) -> str:
    if figure is None:
        return "-"
    mean = f"{figure['mean'] / divisor:.{digits}f}"
    return mean if figure["spread"] is None else f"{mean} ± {figure['spread'] / divisor:.{digits}f}"


def _columns(report: dict) -> list[tuple[str, str]]:
    """Headings and names of the figures that the table shows."""
    main = report["main_metric"]
    names = list(dict.fromkeys(name for entrant in report["entrants"] for name in entrant["summary"]))
    if report["kind"] == "caption":
        names = [name for name in names if main in name]  # BLEU and the others are in the file
    columns = []
    for name in names:
        baseline, _, rest = name.partition(" ")
        if baseline not in report["baselines"]:
            columns.append((name.removeprefix(f"{main}, "), name))
        elif rest == main:
            columns.append((baseline, name))
    return columns


def _tokens(entrant: dict) -> str:
    fewest, most = entrant["fewest_visual_tokens"], entrant["visual_tokens"]
    return str(most) if fewest == most else f"{fewest} to {most}"


def _parameters(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"


def _units(report: dict) -> dict[str, tuple[str, float, int]]:
    """What was measured of any bridge: heading, what to divide by, and digits to show."""
    summaries = [cost["summary"] for cost in report["measured"].values()]
    longest = max((one["training seconds"]["mean"] for one in summaries if "training seconds" in one), default=0)
    found = {}
    for name, (divisor, unit) in MEASURED.items():
        if any(name in summary for summary in summaries):
            if name == "training seconds" and longest < 120:
                divisor, unit = 1, "s"
            heading = {"training seconds": "training", "seconds per answer": "per answer"}.get(name, name)
            found[name] = (f"{heading} ({unit})", divisor, 2 if unit == "GB" else 1)
    return found


def table(report: dict) -> list[str]:
    """The table, a row per bridge, in Markdown that is also readable on a terminal.

    Args:
        report: What `bakeoff` gives.
    """
    columns, costs = _columns(report), report["measured"]
    units = _units(report)
    rows = [["bridge", "visual tokens", "bridge parameters", *(heading for heading, _ in columns),
             *(heading for heading, _, _ in units.values())]]  # fmt: skip
    for entrant in report["entrants"]:
        cells = [entrant["name"], _tokens(entrant), _parameters(entrant["bridge_parameters"])]
        cells += [_shown(entrant["summary"].get(name)) for _, name in columns]
        measured = costs[entrant["name"]]["summary"]
        for name, (_, divisor, digits) in units.items():
            cells.append(_shown(measured.get(name), digits, divisor))
        rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [lines[0], rule, *lines[1:]]


def title(report: dict) -> str:
    """One line: what was evaluated."""
    count, whole = report["samples"], report["samples_of_split"]
    of = f"{count:,} samples" if count == whole else f"{count:,} of {whole:,} samples"
    shots = f", {report['shots']} shots" if report["shots"] else ""
    return f"{report['dataset']} ({report['split']}), {of}{shots}"


def notes(report: dict) -> list[str]:
    """What one must know to read the table."""
    seeds = report["seeds"]
    trained = [entrant["name"] for entrant in report["entrants"] if entrant["trained_before"]]
    lines = []
    if len(trained) < len(report["entrants"]):
        which = ", ".join(map(str, seeds))
        lines.append(
            f"Seeds {which}: mean ± standard deviation of {len(seeds)} trainings."
            if len(seeds) > 1
            else f"One training each, with seed {which}: how much another seed would change is not known."
        )
    if trained:
        lines.append(f"Trained before, so that there is one run of each: {', '.join(trained)}.")
    common = "; ".join(f"{key}: {value}" for key, value in report["in_common"].items())
    lines += [f"In common: {common}."] if common else []
    lines += [f"Different: {difference}." for difference in report["differences"]]
    lines += report["notes"]
    lines.append("Metrics are in percent" + (", CIDEr times 100." if report["kind"] == "caption" else "."))
    lines.append(
        "Memory: the largest resident set of a process that does this alone, with libraries and mapped files; GPU "
        "memory: the most that PyTorch has allocated."
    )
    machines = dict.fromkeys(
        run[key] for cost in report["measured"].values() for run in cost["runs"] for key in run if "hardware" in key
    )
    lines += [f"Hardware: {'; '.join(machines)}."] if machines else []
    lines.append("Versions: " + ", ".join(f"{name} {value}" for name, value in report["versions"].items()) + ".")
    return lines


def markdown(report: dict) -> str:
    """The file `bakeoff.md`.

    Args:
        report: What `bakeoff` gives.
    """
    parts = [f"# {title(report)}", "\n".join(table(report)), "\n".join(f"- {note}" for note in notes(report))]
    return "\n\n".join([*parts, f"```bash\n{report['command']}\n```"]) + "\n"


# ---------------------------------------------------------------------- picture


def check_packages(kind: str) -> None:
    """Refuse to begin where no picture can be drawn at the end, or nothing be scored.

    Args:
        kind: Of the task.

    Raises:
        ModuleNotFoundError: A package is not installed.
    """
    for what, package in (("the picture needs", "matplotlib"), ("scores of captions need", "pycocoevalcap")):
        if (package == "matplotlib" or kind == "caption") and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f'{what} {package}: pip install "vlbridge[eval]".')


def draw(report: dict, path: str | os.PathLike) -> None:
    """Draw `bakeoff.png`: the figures by kind of question above, what each bridge costs below.

    Args:
        report: What `bakeoff` gives.
        path: The file, which is replaced once it is complete.

    Raises:
        OSError: It can't be written.
    """
    from matplotlib.figure import Figure

    main, entrants = report["main_metric"], report["entrants"]
    columns = [pair for pair in _columns(report) if main in pair[1] and pair[0] not in report["baselines"]]
    costs = _cost_panels(report)
    figure = Figure(figsize=(max(10.0, 1.2 + 1.1 * len(columns)), 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3, 2])
    _draw_figures(above.subplots(), report, columns)
    for axes, (heading, values, spreads) in zip(below.subplots(1, len(costs), squeeze=False)[0], costs):
        places = range(len(entrants))
        axes.bar(places, values, yerr=spreads, color=[f"C{place % 10}" for place in places], capsize=3)
        axes.set_title(heading, fontsize="x-small")
        axes.set_xticks([])
        axes.tick_params(labelsize="x-small")
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format=Path(path).suffix.removeprefix("."))


def _draw_figures(axes, report: dict, columns: list[tuple[str, str]]) -> None:
    """Bars by kind of question, with the spread; a line across a bar is a baseline."""
    main, entrants = report["main_metric"], report["entrants"]
    width = 0.8 / len(entrants)
    styles = dict(zip(report["baselines"], ("-", ":", "--")))
    for number, entrant in enumerate(entrants):
        summary = entrant["summary"]
        places = [place + (number - (len(entrants) - 1) / 2) * width for place in range(len(columns))]
        figures = [summary.get(name, {"mean": 0.0, "spread": None}) for _, name in columns]
        bars = axes.bar(
            places, [figure["mean"] for figure in figures], 0.92 * width, color=f"C{number % 10}",
            yerr=[figure["spread"] or 0.0 for figure in figures] if len(report["seeds"]) > 1 else None, capsize=2,
            label=entrant["name"],
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
        for baseline, style in styles.items():
            for place, (_, name) in zip(places, columns):
                figure = summary.get(f"{baseline} {name}")
                if figure is not None:
                    ends = [place - 0.46 * width, place + 0.46 * width]
                    axes.plot(ends, [figure["mean"]] * 2, style, color="black", linewidth=1.4)
    for baseline, style in styles.items():
        axes.plot([], [], style, color="black", label=baseline)
    axes.set_xticks(range(len(columns)), [heading for heading, _ in columns], fontsize="small")
    axes.set_ylim(0, max(1, axes.get_ylim()[1]))
    axes.set_ylabel(f"{main} (%)")
    axes.set_title(title(report), fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _cost_panels(report: dict) -> list[tuple[str, list[float], list[float] | None]]:
    """Headings, a value per bridge, and spreads: visual tokens, parameters, and what was measured of any of them."""
    entrants = report["entrants"]
    panels: list[tuple[str, list[float], list[float] | None]] = [
        ("visual tokens", [entrant["visual_tokens"] for entrant in entrants], None),
        ("bridge parameters (M)", [entrant["bridge_parameters"] / 1e6 for entrant in entrants], None),
    ]
    for name, (heading, divisor, _) in _units(report).items():
        figures = [report["measured"][entrant["name"]]["summary"].get(name) for entrant in entrants]
        values = [(figure or {"mean": 0})["mean"] / divisor for figure in figures]
        spreads = [((figure or {}).get("spread") or 0.0) / divisor for figure in figures]
        panels.append((heading, values, spreads if any(spreads) else None))
    return panels


__all__ = [
    "MEASURED",
    "check_packages",
    "costs_of",
    "draw",
    "figures_of",
    "main_metric",
    "markdown",
    "mean_and_spread",
    "notes",
    "table",
    "title",
]
