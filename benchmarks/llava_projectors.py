"""A linear layer against a two-layer MLP as bridge: same pictures, questions, steps and learning rate, at toy scale.

    python benchmarks/llava_projectors.py --output benchmarks/results/llava_projectors.json
    python benchmarks/llava_projectors.py --steps 3 --warm-up-steps 3 --pictures 32 --test-pictures 4   # to try it

EfficientNet-Lite0 and SmolLM2-135M-Instruct stay frozen; what is trained is `projector_type="linear"` (LLaVA) or
`"mlp2x_gelu"` (LLaVA-1.5). Data: easy-VQA's questions for the colour and the shape of what is shown, in all forms that
the data set asks them in; a step is one picture with several of them, packed into one row. Every bridge first learns to
give the words for what is shown, without the language model (`warm_up`), then the language model's loss. Both get the
same draws, so they differ by the projector alone. Accuracy is that of the test split's own questions for colour and
shape, greedily answered.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

import vlbridge
from vlbridge import demo
from vlbridge.training.training_easy_vqa import COLORS, SHAPES, Example, load_split, properties_of
from vlbridge.training.training_packing import PackedCollator


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from easy_vqa import PackedConversations, Stage, accuracies, answer_all, encode, kind_of, warm_up  # noqa: E402


PROJECTORS = ("linear", "mlp2x_gelu")
LAST = 20  # steps that the final loss is the mean of


def naming_forms(examples: list[Example]) -> dict[str, list[str]]:
    """All questions for a colour and for a shape that give nothing of it away."""
    words = {*COLORS, *SHAPES}
    forms: dict[str, set[str]] = {"color": set(), "shape": set()}
    for example in examples:
        for question, answer in example.questions:
            if not words & set(re.findall(r"\w+", question)):
                forms.get(kind_of(question, answer), set()).add(question)
    return {kind: sorted(questions) for kind, questions in forms.items()}


def naming(examples: list[Example]) -> dict[int, Example]:
    """Every picture whose colour and shape are known, by its place, with every form of the questions for them."""
    forms = naming_forms(examples)
    found = {place: properties_of(example) for place, example in enumerate(examples)}
    return {
        place: Example(examples[place].image, [(question, known[kind]) for kind in forms for question in forms[kind]])
        for place, known in found.items()
        if len(known) == 2
    }


def fit(model, processor, examples: list[Example], patches: torch.Tensor, settings: dict, seed: int) -> list[float]:
    """Train a bridge through its language model; the loss of every step."""
    curriculum = [Stage(settings["steps"])]
    dataset = PackedConversations(examples, patches, processor, settings["num_questions"], curriculum, seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings["steps"],
            per_device_train_batch_size=1,
            learning_rate=settings["learning_rate"],
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, settings["steps"] // 5),
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=seed,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=PackedCollator())
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def ask(model, processor, examples: list[Example], features: torch.Tensor) -> tuple[float, dict[str, float], int]:
    """Ask each picture's own questions for colour and shape, with greedy answers.

    Returns:
        The accuracy, the accuracy of each kind of question, and the number of questions.
    """
    asked = {
        place: [pair for pair in example.questions if kind_of(*pair) in ("color", "shape")]
        for place, example in enumerate(examples)
    }
    places = [place for place, pairs in asked.items() if pairs]
    test = [Example(examples[place].image, asked[place]) for place in places]
    accuracy, by_kind = accuracies(test, answer_all(model.eval(), processor, test, features[places]))
    return accuracy, by_kind, sum(map(len, asked.values()))


def run(projector: str, seed: int, splits: dict[str, list[Example]], settings: dict) -> dict:
    """Train one bridge and ask it."""
    set_seed(seed)
    model, processor = vlbridge.compose(demo.VISION, demo.LANGUAGE, "mlp", projector_type=projector)
    model.language_model.float()  # half precision is slow on many CPUs
    features = {name: encode(model, processor, examples) for name, examples in splits.items()}
    named = naming(splits["train"])
    examples, patches = list(named.values()), features["train"][list(named)]
    set_seed(seed)  # whether features were kept on disk makes no difference to the draws
    started = time.time()
    warm_up(model, processor, examples, patches, settings["warm_up_steps"], settings["learning_rate"])
    losses = fit(model, processor, examples, patches, settings, seed)
    seconds = time.time() - started
    accuracy, by_kind, test_questions = ask(model, processor, splits["test"], features["test"])
    return {
        "projector": projector,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.bridge.parameters()),
        "final_loss": round(statistics.mean(losses[-LAST:]), 4),
        "accuracy": round(accuracy, 4),
        **{kind: round(share, 4) for kind, share in by_kind.items()},
        "test_questions": test_questions,
        "training_seconds": round(seconds),
    }


def table(runs: list[dict]) -> str:
    """The runs, a line each, and the mean of each projector's."""
    columns = ("projector", "seed", "parameters", "final_loss", "accuracy", "color", "shape", "training_seconds")
    rows = list(runs)
    for projector in PROJECTORS:
        of_one = [each for each in runs if each["projector"] == projector]
        if len(of_one) > 1:
            means = {name: round(statistics.mean(each[name] for each in of_one), 4) for name in columns[2:]}
            rows.append({"projector": projector, "seed": "mean", **means})
    cells = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Through the language model, one picture each.")] = 150,
    warm_up_steps: Annotated[int, typer.Option(min=1, help="Without the language model, 48 pictures each.")] = 300,
    num_questions: Annotated[int, typer.Option(min=1, help="Asked about a picture.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of both projectors.")] = 1e-3,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each projector.")] = 2,
    pictures: Annotated[int, typer.Option(min=0, help="Of the training split (0: all).")] = 0,
    test_pictures: Annotated[int, typer.Option(min=0, help="Of the test split (0: all).")] = 200,
    output: Annotated[Path | None, typer.Option(help="JSON file with the figures.")] = None,
) -> None:
    settings = {
        "steps": steps,
        "warm_up_steps": warm_up_steps,
        "num_questions": num_questions,
        "learning_rate": learning_rate,
    }
    data = demo.easy_vqa_dir()
    limits = {"train": pictures, "test": test_pictures}
    splits = {name: load_split(data, name)[: limit or None] for name, limit in limits.items()}
    runs = []
    for seed in range(seeds):
        for projector in PROJECTORS:
            runs.append(run(projector, seed, splits, settings))
            print(json.dumps(runs[-1]), flush=True)
    print(table(runs))
    if output is not None:
        about = {
            "date": datetime.date.today().isoformat(),
            "vlbridge": vlbridge.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "parts": [demo.VISION, demo.LANGUAGE],
            "pictures": {name: len(examples) for name, examples in splits.items()},
            **settings,
        }
        output.write_text(json.dumps({"about": about, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
