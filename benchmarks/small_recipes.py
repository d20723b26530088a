"""The three families on the same data, encoder, language model and budget: `vlbridge train small_mlp` and its like.

    python benchmarks/small_recipes.py --runs runs --output benchmarks/results/small_recipes.json \
        --plot benchmarks/results/small_recipes.png

Every recipe is run with the command that users type; a run that is already in the folder is resumed, or only read if it
is complete. The answers that training saves beside its summary are compared: to one question about every picture of
easy-VQA's test split. The blind baseline gives the training split's most frequent answer to the same question, which
needs no picture. It takes about an hour per recipe on a CPU core.
"""

from __future__ import annotations

import datetime
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from gpu_smoke import versions
from safetensors import safe_open
from transformers import AutoProcessor

from vlbridge import demo
from vlbridge.training.training_checkpoints import last_checkpoint
from vlbridge.training.training_data import load
from vlbridge.training.training_easy_vqa import Example, load_split
from vlbridge.training.training_encoding import text_of
from vlbridge.training.training_recipes import read_recipe


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from easy_vqa import accuracies, blind_baseline, kind_of  # noqa: E402


RECIPES = ("small_mlp", "small_qformer", "small_perceiver")


def parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def report(name: str, run: Path, train: list[Example]) -> dict:
    """What a finished run tells."""
    summary = json.loads((run / "training_summary.json").read_text(encoding="utf-8"))
    (data,) = read_recipe(run / "recipe.yaml").evaluation
    asked = {}
    for record in load(data.source, split=data.split, **data.options):
        question, answer = (text_of(message["content"]) for message in record["messages"])
        asked[str(record["id"])] = Example(Path(record["id"]), ((question, answer),))
    (loss, generated) = summary["evaluation"]
    rows = [json.loads(line) for line in (run / generated["predictions"]).read_text(encoding="utf-8").splitlines()]
    examples = [asked[row["id"]] for row in rows]
    accuracy, by_kind = accuracies(examples, [row["generated"].strip().lower() for row in rows])
    if abs(accuracy - generated["value"]) > 1e-9:
        raise ValueError(
            f"{run}: the predictions are right in {accuracy:.4f}, the summary says {generated['value']:.4f}."
        )
    processor = AutoProcessor.from_pretrained(run)
    state = json.loads((Path(last_checkpoint(run)) / "trainer_state.json").read_text(encoding="utf-8"))
    return {
        "recipe": name,
        "parameters": parameters(run),
        "visual_tokens": processor.num_image_tokens(*processor.output_size()),
        "steps": summary["steps"],
        "records_per_step": summary["arguments"]["per_device_train_batch_size"],
        "training_seconds": summary["seconds"],  # without evaluation
        "hardware": summary["hardware"],
        "test_loss": round(loss["value"], 4),
        "questions": len(rows),
        "accuracy": round(accuracy, 4),
        "by_kind": {kind: round(share, 4) for kind, share in by_kind.items()},
        "questions_by_kind": dict(sorted(Counter(kind_of(*e.questions[0]) for e in examples).items())),
        "blind_baseline": round(blind_baseline(train, examples), 4),
        "losses": [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry],
    }


def table(found: list[dict]) -> str:
    lines = [
        "| recipe | bridge parameters | visual tokens | training | test accuracy | colours | shapes | yes/no, shown | yes/no, absent |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        shares = [f"{100 * row['by_kind'][k]:.1f} %" for k in ("color", "shape", "yes/no, shown", "yes/no, absent")]
        lines.append(
            f"| `{row['recipe']}` | {row['parameters'] / 1e6:.2f} M | {row['visual_tokens']} | "
            f"{row['training_seconds'] / 60:.0f} min | {100 * row['accuracy']:.1f} % | {' | '.join(shares)} |"
        )
    return "\n".join(lines)


def draw(found: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row in found:
        left.plot(*zip(*row["losses"]), label=row["recipe"])
    left.set(xlabel="step", ylabel="training loss (nats per token)", yscale="log")
    left.legend(frameon=False)
    kinds = ["all", *found[0]["by_kind"]]
    for place, row in enumerate(found):
        heights = [row["accuracy"], *row["by_kind"].values()]
        bars = right.bar([i + (place - 1) * 0.27 for i in range(len(kinds))], [100 * h for h in heights], 0.25)
        right.bar_label(bars, fmt="%.0f", fontsize=7)
    blind = 100 * found[0]["blind_baseline"]  # of all questions
    right.hlines(blind, -0.45, 0.45, color="black", linewidth=0.8, linestyle="--")
    right.text(-0.47, blind, "blind ", ha="right", va="center", fontsize=8)
    right.set_xlim(-0.9, len(kinds) - 0.4)
    right.set_xticks(range(len(kinds)), kinds, fontsize=8)
    right.set(ylabel="right answers (%)", ylim=(0, 105))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(
    runs: Annotated[Path, typer.Option(help="Folder of the runs' folders.")] = Path("runs"),
    recipes: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(RECIPES),
    settings: Annotated[list[str] | None, typer.Option("--set", help="As in `vlbridge train`, for all.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of them.")] = None,
) -> None:
    """Train the small recipes and compare them."""
    names = recipes.split(",")
    for name in names:
        if not (runs / name / "training_summary.json").exists():
            command = [sys.executable, "-m", "vlbridge.cli", "train", name, "--output", str(runs / name), "--resume"]
            subprocess.run(command + [part for one in settings or [] for part in ("--set", one)], check=True)
    train = load_split(demo.easy_vqa_dir(), "train")
    found = [report(name, runs / name, train) for name in names]
    print(table(found))
    print(f"blind baseline: {100 * found[0]['blind_baseline']:.1f} %")
    if output is not None:
        about = {"date": datetime.date.today().isoformat(), "command": " ".join(["python", *sys.argv])}
        output.write_text(json.dumps({**about, "versions": versions(), "runs": found}, indent=1) + "\n")
    if plot is not None:
        draw(found, plot)


if __name__ == "__main__":
    typer.run(main)
