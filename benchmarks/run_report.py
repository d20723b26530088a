"""What `run.py` writes: the table in README.md and the picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


FIGURES = {
    "encode_ms": "encoder",
    "bridge_ms": "bridge",
    "first_token_ms": "first token",
    "token_ms": "each further token",
    "pictures_per_s": "pictures of a folder",
}
BEGIN, END = "<!-- run.py {size}: begin -->", "<!-- run.py {size}: end -->"


def where(row: dict) -> str:
    """Which row of its case it is."""
    shots = f"{row['shots']} shots, " if "shots" in row else ""
    return f"{shots}batch {row['batch']}" + (", compiled" if row.get("compiled") else "")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def faster(row: dict, figure: str) -> str:
    """How many times as fast ours is, and its spread."""
    found = row.get("ratio", {}).get(figure)
    return "-" if found is None else f"**{found[0]:.2f}** ({found[1]:.2f} to {found[2]:.2f})"


def lines(entry: dict) -> Iterator[str]:
    """Lines of the table for one case."""
    peer = entry["peer"]
    for row in entry["rows"]:
        if row["status"] != "measured":
            yield f"| {entry['case']} | {where(row)} | {row['status']}: {row['reason']} |" + " |" * 5
            continue
        ours, theirs = row["vlbridge"], row.get(peer, {})
        both = [
            f"{number(ours.get(figure))} / {number(theirs.get(figure))}" for figure in ("first_token_ms", "token_ms")
        ]
        memory = row.get("memory_mib", {})
        yield (
            f"| {entry['case']} | {where(row)} | {both[0]} | {faster(row, 'first_token_ms')} | {both[1]} "
            f"| {faster(row, 'token_ms')} | {number(memory.get('vlbridge'))} / {number(memory.get(peer))} |"
        )


def folder_lines(cases: list[dict]) -> list[str]:
    found = [(entry, entry["folder"]) for entry in cases if entry.get("folder")]
    if not found:
        return []
    rows = ["", "| a folder of pictures | pictures | pictures per second, ours / theirs | times as fast |",
            "|---|---|---|---|"]  # fmt: skip
    for entry, folder in found:
        rates = [number(folder["pictures_per_s"][name]) for name in ("vlbridge", entry["peer"])]
        rows.append(
            f"| {entry['case']} | {folder['pictures']} | {' / '.join(rates)} | {faster(folder, 'pictures_per_s')} |"
        )
    return rows


def section(report: dict, picture: str | None) -> str:
    """The section of README.md that a run writes, without its markers."""
    versions = report["versions"]
    not_there = [f"{name} is not installed" for name, version in report["peers"].items() if version is None]
    text = [
        f"### {report['size']}: {report['device']}, {report['dtype']}",
        "",
        f"{report['date'][:10]}, `{report['command']}`, {report['threads']} of PyTorch's threads; "
        f"torch {versions['torch']}, "
        f"transformers {versions['transformers']}, open-flamingo {report['peers']['open-flamingo']}"
        + (f"; load average before the run {report['load_before'][0]}" if "load_before" in report else "")
        + (f"; {', '.join(not_there)}." if not_there else "."),
        "",
        "| model | what | first token, ms, ours / theirs | times as fast | further tokens, ms each | times as fast "
        "| memory of a run, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in report["cases"]:
        text += lines(entry)
        if entry["status"] == "failed":
            text.append(f"| {entry['case']} | failed | {entry['error']} |" + " |" * 4)
    text += folder_lines(report["cases"])
    if picture is not None:
        text += ["", f"![Times as fast as the peer](results/{picture})"]
    return "\n".join(text) + "\n"


def update_readme(path: Path, report: dict, picture: str | None) -> None:
    """Put a run's section between its markers.

    Raises:
        ValueError: The file has no such markers.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = (marker.format(size=report["size"]) for marker in (BEGIN, END))
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path.name} has no place for this section; expected the lines {begin!r} and {end!r}")
    path.write_text(f"{head}{begin}\n{section(report, picture)}{end}{tail}", encoding="utf-8")


def ratios(report: dict) -> list[tuple[str, str, list[float]]]:
    """All ratios of a report: where, figure, and median with its spread."""
    found = []
    for entry in report["cases"]:
        rows = [(f"{entry['case']}, {where(row)}", row) for row in entry["rows"]]
        if entry.get("folder"):
            rows.append((f"{entry['case']}, folder", entry["folder"]))
        for name, row in rows:
            found += [(name, figure, values) for figure, values in row.get("ratio", {}).items() if figure in FIGURES]
    return found


def draw(report: dict, path: Path) -> None:
    """Times as fast as the peer, a dot per figure, with the spread of the repetitions."""
    from matplotlib.figure import Figure

    found = ratios(report)
    names = list(dict.fromkeys(name for name, _, _ in found))
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="black", linewidth=1)
    for place, (key, label) in enumerate(FIGURES.items()):
        points = [(names.index(name), values) for name, figure_name, values in found if figure_name == key]
        if not points:
            continue
        middles = [values[0] for _, values in points]
        spread = [[values[0] - values[1] for _, values in points], [values[2] - values[0] for _, values in points]]
        height = [row + (place - 2) * 0.13 for row, _ in points]
        axes.errorbar(middles, height, xerr=spread, fmt="o", markersize=4, linewidth=1, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 0.75, 1, 1.5, 2, 3, 5, 10) if any(values[2] >= tick / 1.5 for *_, values in found)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("times as fast as the peer")
    axes.set_title(f"{report['size']}: {report['device']}, {report['dtype']}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    figure.savefig(path, dpi=130)
