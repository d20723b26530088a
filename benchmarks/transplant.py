"""The shipped bridge on another language model: does training start ahead of a fresh bridge, and by how many steps?

    python benchmarks/transplant.py --output benchmarks/results/transplant.json
    python benchmarks/transplant.py --steps 10 --warm-up-steps 3 --test-pictures 4    # to try it

The source of the embedded parts has no second small pretrained language model, so one is made: SmolLM2-135M-Instruct in
a randomly rotated residual stream of 648 channels instead of 576 (the same function so far), with noise on every
matrix, embeddings included, of a share of the matrix's standard deviation. It has the same tokenizer; its weights look
like those of another model, and what it knows is much the same: a friendly case for a transplant, not the hardest.

Bridges begin fresh, fresh and warmed up (see `warm_up`, which does not run the language model), or transplanted; they
see the same pictures and questions for colour and shape in the same order.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import vlbridge
from vlbridge import demo
from vlbridge.training.training_easy_vqa import COLORS, SHAPES, Example, load_split, properties_of
from vlbridge.training.training_packing import PackedCollator


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from easy_vqa import PackedConversations, Stage, accuracies, answer_all, encode, kind_of, warm_up  # noqa: E402


ARMS = ("fresh", "transplanted", "fresh, warmed up")
WINDOW = 5  # steps that a loss is the mean of


# ---------------------------------------------------------------------- training and asking


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


# ---------------------------------------------------------------------- the other language model


@torch.no_grad()
def in_another_basis(width: int, noise: float) -> LlamaForCausalLM:
    """SmolLM2 in a wider residual stream, rotated at random, with noise on every matrix.

    RMS norms are the same in any orthonormal basis once their gains are moved into what reads them.

    Args:
        width: Channels, at least as many as before.
        noise: In standard deviations of each matrix.
    """
    old = AutoModelForCausalLM.from_pretrained(demo.resolve(demo.LANGUAGE), dtype=torch.float32).eval()
    narrow = old.config.hidden_size
    basis = torch.linalg.qr(torch.randn(width, width))[0][:narrow]  # (narrow, width), orthonormal rows
    settings = {**old.config.to_dict(), "hidden_size": width, "tie_word_embeddings": False}
    new = LlamaForCausalLM(LlamaConfig(**{name: value for name, value in settings.items() if name != "dtype"})).eval()
    weights = {}
    for index, layer in enumerate(old.model.layers):
        readers = (
            (layer.input_layernorm, "self_attn", ("q_proj", "k_proj", "v_proj")),
            (layer.post_attention_layernorm, "mlp", ("gate_proj", "up_proj")),
        )
        for norm, block, names in readers:
            for name in names:
                weight = getattr(getattr(layer, block), name).weight
                weights[f"model.layers.{index}.{block}.{name}.weight"] = weight * norm.weight @ basis
        for block, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            weights[f"model.layers.{index}.{block}.{name}.weight"] = (
                basis.T @ getattr(getattr(layer, block), name).weight
            )
    table = old.get_input_embeddings().weight
    weights["model.embed_tokens.weight"] = table @ basis
    weights["lm_head.weight"] = table * old.model.norm.weight @ basis
    for name in weights:
        weights[name] = weights[name] + noise * weights[name].std() * torch.randn_like(weights[name])
    gain = (narrow / width) ** 0.5  # the mean square is over more channels
    weights.update((name, torch.full((width,), gain)) for name in new.state_dict() if "norm" in name)
    new.load_state_dict(weights)
    return new


# ---------------------------------------------------------------------- the comparison


def begin(arm: str, language: Path):
    """A bridge on the other language model: model, processor, and the report of a transplant."""
    if arm == "transplanted":
        done = vlbridge.transplant(vlbridge.default_model(), language, dtype=torch.float32)
        return done.model, done.processor, done.report
    model, processor = vlbridge.compose(demo.VISION, language, "mlp", projector_hidden_size=576, dtype=torch.float32)
    return model, processor, None


def smoothed(losses: list[float]) -> list[float]:
    """Mean of the last `WINDOW` losses at every step."""
    return [statistics.mean(losses[max(0, step + 1 - WINDOW) : step + 1]) for step in range(len(losses))]


def reached(losses: list[float], level: float) -> int | None:
    """Steps until the smoothed loss, a full window of it, is at a level."""
    return next((step + 1 for step, loss in enumerate(smoothed(losses)) if step + 1 >= WINDOW and loss <= level), None)


def steps_saved(runs: list[dict], against: str) -> dict:
    """How much earlier a transplanted bridge is where the other ends, by the losses averaged over the seeds."""
    mean = {
        arm: [statistics.mean(step) for step in zip(*(run["losses"] for run in runs if run["arm"] == arm))]
        for arm in ARMS
    }
    level = smoothed(mean[against])[-1]
    there = reached(mean["transplanted"], level)
    steps = len(mean[against])
    return {
        "loss": round(level, 4),
        "after_steps": reached(mean[against], level),
        "transplanted_after_steps": there,
        "steps_saved": None if there is None else max(0, reached(mean[against], level) - there),
        "of": steps,
    }


def compare(language: Path, splits: dict[str, list[Example]], settings: dict, seeds: int) -> dict:
    """Train every arm with every seed."""
    runs, report, features = [], None, {}
    named = naming(splits["train"])
    for seed in range(seeds):
        for arm in ARMS:
            set_seed(seed)
            model, processor, told = begin(arm, language)
            report = told or report
            features = features or {name: encode(model, processor, examples) for name, examples in splits.items()}
            examples, patches = list(named.values()), features["train"][list(named)]
            if arm == "fresh, warmed up":
                warm_up(model, processor, examples, patches, settings["warm_up_steps"], settings["learning_rate"])
            before, _, _ = ask(model, processor, splits["test"], features["test"])
            losses = fit(model, processor, examples, patches, settings, seed)
            accuracy, _, test_questions = ask(model, processor, splits["test"], features["test"])
            figures = {
                "arm": arm,
                "seed": seed,
                "accuracy_before": round(before, 4),
                "accuracy": round(accuracy, 4),
                "first_loss": round(statistics.mean(losses[:WINDOW]), 4),
                "final_loss": round(statistics.mean(losses[-WINDOW:]), 4),
                "test_questions": test_questions,
            }
            print(json.dumps(figures), flush=True)
            runs.append({**figures, "losses": [round(loss, 4) for loss in losses]})
    report = {name: value for name, value in report.items() if name not in ("from", "to")}
    return {
        "transplant": report,
        "steps_saved_against": {against: steps_saved(runs, against) for against in ARMS if against != "transplanted"},
        "runs": runs,
    }


def draw(result: dict, file: Path) -> None:
    """Loss curves, means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for arm in ARMS:
        losses = [
            statistics.mean(step) for step in zip(*(run["losses"] for run in result["runs"] if run["arm"] == arm))
        ]
        axis.plot(range(1, len(losses) + 1), smoothed(losses), label=arm)
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss (mean of the last {WINDOW} steps)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=150)


def main(
    steps: Annotated[int, typer.Option(min=WINDOW, help="Through the language model, one picture each.")] = 150,
    warm_up_steps: Annotated[int, typer.Option(min=1, help="Without the language model, 48 pictures each.")] = 300,
    num_questions: Annotated[int, typer.Option(min=1, help="Asked about a picture.")] = 6,
    learning_rate: Annotated[float, typer.Option(help="Of all bridges.")] = 1e-3,
    width: Annotated[int, typer.Option(min=576, help="Channels of the other language model: a multiple of 9.")] = 648,
    noise: Annotated[float, typer.Option(min=0, help="Of the other language model.")] = 0.06,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 1,
    test_pictures: Annotated[int, typer.Option(min=1, help="Of the test split.")] = 100,
    output: Annotated[Path | None, typer.Option(help="JSON file with the figures; a picture goes beside it.")] = None,
) -> None:
    settings = {
        "steps": steps, "warm_up_steps": warm_up_steps, "num_questions": num_questions, "learning_rate": learning_rate,
    }  # fmt: skip
    data = demo.easy_vqa_dir()
    splits = {"train": load_split(data, "train"), "test": load_split(data, "test")[:test_pictures]}
    with tempfile.TemporaryDirectory() as folder:
        set_seed(0)
        in_another_basis(width, noise).save_pretrained(folder)
        AutoTokenizer.from_pretrained(demo.resolve(demo.LANGUAGE)).save_pretrained(folder)
        result = compare(Path(folder), splits, settings, seeds)
    print(json.dumps(result["steps_saved_against"]))
    if output is not None:
        about = {
            "date": datetime.date.today().isoformat(),
            "vlbridge": vlbridge.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "language_model": f"{demo.LANGUAGE}, rotated into {width} channels, "
            f"with noise of {noise} standard deviations",
            **settings,
        }
        output.write_text(json.dumps({"about": about, **result}, indent=1) + "\n")
        draw(result, output.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
