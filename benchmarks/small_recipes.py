"""Evaluates the bridges of the three small recipes on all of easy-VQA's test split: one table and one picture.

    for recipe in small_mlp small_qformer small_perceiver; do vlbridge train $recipe --output runs/$recipe; done
    python benchmarks/small_recipes.py --runs runs --evaluations evaluations \
        --output benchmarks/results/small_recipes.json --plot benchmarks/results/small_recipes.png

Each evaluation is what `vlbridge evaluate runs/RECIPE --task easy_vqa --shots N --blind --shuffled` does, and an
interrupted one goes on. On two CPU cores all of it takes an hour and a half.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from vlbridge.evaluation import evaluate
from vlbridge.evaluation.evaluation_models import versions
from vlbridge.files import read_json, write_json


RECIPES = ("small_mlp", "small_qformer", "small_perceiver")
SHOTS = (0, 4)
BASELINES = ("blind", "shuffled")
KINDS = {"color": "colours", "shape": "shapes", "yes/no, shown": "yes/no, shown", "yes/no, absent": "yes/no, absent"}


def accuracies(found: dict) -> dict[str, float]:
    """Percent right: over all questions, and by kind."""
    return {"all": found["metrics"]["accuracy"]["value"]} | {
        kind: found["breakdown"][kind]["accuracy"] for kind in KINDS
    }


def measure(run: Path, folder: Path, shots: int) -> dict:
    """Accuracies of one bridge with so many demonstrations, and of its baselines."""
    asked_for = dict.fromkeys(BASELINES, True)
    result = evaluate(
        run, None, "easy_vqa", None, folder, shots=shots, batch_size=64, dtype="bfloat16", device="cpu", **asked_for
    )
    accuracy = result["metrics"]["accuracy"]
    return {
        "recipe": run.name,
        "shots": shots,
        "questions": result["samples"],
        "pictures": result["pictures"],
        "interval": [accuracy["low"], accuracy["high"]],
        "accuracy": accuracies(result),
        "baselines": {name: accuracies(result["baselines"][name]) for name in BASELINES},
    }


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| recipe | shots | all | " + " | ".join(KINDS.values()) + " | " + " | ".join(BASELINES) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for row in rows:
        low, high = row["interval"]
        cells = [f"{row['accuracy'][kind]:.1f}" for kind in KINDS]
        cells += [f"{row['baselines'][name]['all']:.1f}" for name in BASELINES]
        whole = f"{row['accuracy']['all']:.1f} ({low:.1f} to {high:.1f})"
        lines.append(f"| `{row['recipe']}` | {row['shots']} | {whole} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict], file: Path) -> None:
    """Accuracy by kind of question, with a mark for the same bridge that is shown other pictures."""
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(SHOTS), figsize=(12, 4.2), sharey=True, layout="constrained")
    kinds = ["all", *KINDS]
    for place, shots in zip(places, SHOTS):
        for number, row in enumerate(row for row in rows if row["shots"] == shots):
            where = [kind + (number - 1) * 0.27 for kind in range(len(kinds))]
            bars = place.bar(where, [row["accuracy"][kind] for kind in kinds], 0.25, label=row["recipe"])
            place.bar_label(bars, fmt="%.0f", fontsize=8)
            shuffled = [row["baselines"]["shuffled"][kind] for kind in kinds]
            label = "shown other pictures" if number == len(RECIPES) - 1 else None
            place.hlines(shuffled, [x - 0.125 for x in where], [x + 0.125 for x in where], "black", label=label)
        place.set_xticks(range(len(kinds)), [name.replace(", ", ",\n") for name in ["all", *KINDS.values()]])
        place.set_title(f"{shots} shots" if shots else "no examples")
        place.spines[["top", "right"]].set_visible(False)
    places[0].set_ylabel("right answers (%)")
    places[0].set_ylim(0, 108)
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=120)


def main(
    runs: Annotated[Path, typer.Option(help="Folder with the three runs, named like the recipes.")],
    evaluations: Annotated[Path, typer.Option(help="Folder for predictions.")],
    output: Annotated[Path, typer.Option(help="File for results, in JSON.")],
    plot: Annotated[Path | None, typer.Option(help="File for the picture.")] = None,
) -> None:
    trained = {}
    for recipe in RECIPES:
        summary = read_json(runs / recipe / "training_summary.json")
        trained[recipe] = {name: summary[name] for name in ("steps", "seconds", "hardware", "arguments")}
    rows = [measure(runs / recipe, evaluations / f"{recipe}-{shots}", shots) for recipe in RECIPES for shots in SHOTS]
    report = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/small_recipes.py --runs runs --evaluations evaluations --output " + output.name,
        "versions": versions(),
        "training": trained,
        "rows": rows,
    }
    write_json(output, report)
    print(table(rows))
    if plot is not None:
        draw(rows, plot)


if __name__ == "__main__":
    typer.run(main)
