"""Classes from little data: a Q-Former with a head, with and without a warm-up on notes, beside linear probes.

    python benchmarks/classification.py --output benchmarks/results/classification.json

All read the same features of the same frozen encoder, the embedded default's; each picture is encoded once. Tasks:

- `shapes`: easy-VQA, one coloured shape per picture, 24 classes: its colour and shape. Notes: "a blue circle". They
  say no more than the class does.
- `left`: drawn scenes of two different shapes side by side, 3 classes: which shape is the left one. The mean over
  patches knows places only as far as the encoder's padding gives them away. Notes: "red circle left of blue square".

Of 50, 200 or 1,000 labelled pictures, one fifth is a validation split. Each seed draws its pictures from the same pool;
if the pool is no larger than their number, seeds differ in splits and initial weights only. These are compared on test
pictures that no run has seen:

- `probe, mean`: multinomial logistic regression on mean-pooled, standardised patch features (L-BFGS, up to 200
  iterations per penalty);
- `probe, patches`: the same on all patches side by side, so that places are known;
- `Q-Former`: a fresh Q-Former and head, trained for the classes;
- `Q-Former, warm-up`: the same after stage 1 of BLIP-2, without matching, on pictures and notes of the training split.

The loss on the validation split chooses among eight strengths of the L2 penalty for the probes, and among ten steps at
which to stop training for the Q-Formers. None is trained again with the validation split.
"""

from __future__ import annotations

import copy
import datetime
import json
import platform
import random
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from gpu_smoke import versions
from PIL import Image
from qformer_stages import COLORS, SHAPES, scene, word_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import set_seed

from vlbridge import QFormerBlip2ForImageClassification, QFormerBlip2ForPreTraining, demo
from vlbridge.images import load_image
from vlbridge.training.training_easy_vqa import caption_of, load_split


QFORMER = {
    "num_query_tokens": 8, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 256, "max_position_embeddings": 16,
}  # fmt: skip
METHODS = ("probe, mean", "probe, patches", "Q-Former", "Q-Former, warm-up")
PENALTIES = [10.0**-power for power in range(1, 9)]
LEARNING_RATE = 1e-3
CHECKPOINTS = 10  # at which training may have stopped


# ---------------------------------------------------------------------- data


@dataclass
class Pictures:
    """Pictures with one class and one note each.

    Args:
        features: `(pictures, num_patches, vision_dim)`.
        labels: `(pictures,)`.
        notes: As many texts.
    """

    features: torch.Tensor
    labels: torch.Tensor
    notes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: list[int]) -> Pictures:
        return Pictures(self.features[chosen], self.labels[chosen], [self.notes[index] for index in chosen])


def shapes(count: int, split: str, seed: int) -> tuple[list[Image.Image], list[str], list[str]]:
    """Pictures of easy-VQA, their classes and notes; as many of each class as there are, in turn."""
    by_caption: dict[str, list[Path]] = {}
    for example in load_split(demo.easy_vqa_dir(), split):
        if (caption := caption_of(example)) is not None:
            by_caption.setdefault(caption, []).append(example.image)
    rng, chosen = random.Random(seed), []
    for files in by_caption.values():
        rng.shuffle(files)
    for turn in range(max(map(len, by_caption.values()))):
        chosen += [(files[turn], caption) for caption, files in sorted(by_caption.items()) if turn < len(files)]
    files, captions = zip(*chosen[:count])
    return [load_image(file) for file in files], list(captions), list(captions)


def left(count: int, split: str, seed: int) -> tuple[list[Image.Image], list[str], list[str]]:
    """Scenes of two different shapes, which shape is the left one, and notes."""
    rng = random.Random(f"{seed} {split}")
    pictures, classes, notes = [], [], []
    for index in range(count):
        first = SHAPES[index % len(SHAPES)]
        second = rng.choice([shape for shape in SHAPES if shape != first])
        note = f"{rng.choice(list(COLORS))} {first} left of {rng.choice(list(COLORS))} {second}"
        pictures.append(scene(note, rng))
        classes.append(first)
        notes.append(note)
    return pictures, classes, notes


TASKS = {"shapes": shapes, "left": left}


@torch.no_grad()
def encode(model, image_processor, task: str, split: str, count: int, folder: Path, batch_size: int = 16):
    """Run the frozen encoder over a task's pictures; what it gives is kept on disk, in half precision."""
    pictures, classes, notes = TASKS[task](count, split, 0)
    file = folder / f"{task}-{split}-{count}.safetensors"
    if not file.exists():
        found = []
        for start in tqdm(range(0, count, batch_size), desc=f"encoding {task}", unit="batch"):
            pixel_values = image_processor(pictures[start : start + batch_size], return_tensors="pt")["pixel_values"]
            found.append(model.get_patch_features(pixel_values).half())
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"patch_features": torch.cat(found).contiguous()}, file)
    names = sorted(set(classes))
    labels = torch.tensor([names.index(label) for label in classes])
    return Pictures(load_file(file)["patch_features"].float(), labels, notes), names


# ---------------------------------------------------------------------- probes


def fit_linear(layer: nn.Linear, inputs: torch.Tensor, labels: torch.Tensor, penalty: float) -> None:
    """Multinomial logistic regression: the mean loss plus `penalty / 2` times the squared weights."""
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(inputs), labels) + penalty / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def probe(train: Pictures, validation: Pictures, test: Pictures, num_labels: int, pooled: bool) -> dict:
    """The linear probe whose penalty is best on the validation split."""
    rows = [part.features.mean(dim=1) if pooled else part.features.flatten(1) for part in (train, validation, test)]
    mean, std = rows[0].mean(dim=0), rows[0].std(dim=0) + 1e-3
    rows = [(row - mean) / std / row.shape[1] ** 0.5 for row in rows]  # rows have squares that sum up to about 1
    if rows[0].shape[1] > len(train):  # weights lie in the span of the training rows: as many columns say it all
        squares, directions = torch.linalg.eigh(rows[0] @ rows[0].T)
        basis = rows[0].T @ (directions / squares.clamp(min=1e-6).sqrt())
        rows = [row @ basis for row in rows]
    layer, best = nn.Linear(rows[0].shape[1], num_labels), None
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    for penalty in PENALTIES:  # from the strongest on: each begins where the last one ended
        fit_linear(layer, rows[0], train.labels, penalty)
        with torch.no_grad():
            loss = nn.functional.cross_entropy(layer(rows[1]), validation.labels).item()
            if best is None or loss < best["loss"]:
                accuracy = (layer(rows[2]).argmax(dim=1) == test.labels).float().mean().item()
                best = {"loss": loss, "penalty": penalty, "accuracy": accuracy}
    return {"accuracy": best["accuracy"], "chosen": {"penalty": best["penalty"]}}


# ---------------------------------------------------------------------- Q-Formers


def batches(count: int, size: int, steps: int, seed: int):
    """Indices of `steps` batches, passing over the data again and again in new orders."""
    generator, order = torch.Generator().manual_seed(seed), torch.tensor([], dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def descend(model, steps: int, loss_of_step, after_step=None) -> None:
    """AdamW with warm-up and cosine decay over what is trained."""
    matrices = [p for p in model.bridge.parameters() if p.ndim > 1]
    others = [p for p in model.bridge.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.98),
    )  # fmt: skip
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    model.train()
    for step in range(steps):
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.bridge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step(step + 1)
    model.eval()


def warm_up(encoder, tokenizer, train: Pictures, steps: int, batch_size: int, seed: int):
    """Stage 1 of BLIP-2 on pictures and notes; pictures with one note are no negatives of each other.

    Contrast and captions: matching would cost twice as much as both together.
    """
    set_seed(seed)
    model, _ = QFormerBlip2ForPreTraining.from_vision(
        encoder, tokenizer, qformer_config=QFORMER, embed_dim=64, max_length=12, itm_weight=0.0
    )
    text = tokenizer(train.notes, padding=True, return_tensors="pt", return_token_type_ids=False)
    known = sorted(set(train.notes))
    image_ids = torch.tensor([known.index(note) for note in train.notes])
    order = list(batches(len(train), min(batch_size, len(train)), steps, seed))

    def loss_of_step(step: int) -> torch.Tensor:
        rows = order[step]
        return model(
            patch_features=train.features[rows], image_ids=image_ids[rows],
            input_ids=text["input_ids"][rows], attention_mask=text["attention_mask"][rows],
        ).loss  # fmt: skip

    descend(model, steps, loss_of_step)
    return model


@torch.no_grad()
def scores_of(model, pictures: Pictures, batch_size: int = 100) -> torch.Tensor:
    """Scores of the classes, `(pictures, num_labels)`."""
    return torch.cat([model(patch_features=features).logits for features in pictures.features.split(batch_size)])


def begin_with(stage1, encoder, id2label: dict[int, str], image_processor) -> QFormerBlip2ForImageClassification:
    """A classifier on a stage-1 model's Q-Former, or on a fresh one where there is none."""
    options = {"id2label": id2label, "image_processor": image_processor}
    if stage1 is not None:
        return QFormerBlip2ForImageClassification.from_stage1(stage1, **options)[0]
    return QFormerBlip2ForImageClassification.from_vision(encoder, qformer_config=QFORMER, **options)[0]


def classify(
    model, train: Pictures, validation: Pictures, test: Pictures, steps: int, batch_size: int, seed: int
) -> dict:
    """Train for the classes; what is best on the validation split is tested."""
    best = None
    order = list(batches(len(train), min(batch_size, len(train)), steps, seed))

    def loss_of_step(step: int) -> torch.Tensor:
        rows = order[step]
        return model(patch_features=train.features[rows], labels=train.labels[rows]).loss

    def after_step(step: int) -> None:
        nonlocal best
        if step % (steps // CHECKPOINTS):
            return
        model.eval()
        loss = nn.functional.cross_entropy(scores_of(model, validation), validation.labels).item()
        model.train()
        if best is None or loss < best["loss"]:
            best = {"loss": loss, "step": step, "weights": copy.deepcopy(model.bridge.state_dict())}

    descend(model, steps, loss_of_step, after_step)
    model.bridge.load_state_dict(best["weights"])
    accuracy = (scores_of(model, test).argmax(dim=1) == test.labels).float().mean().item()
    return {"accuracy": accuracy, "chosen": {"step": best["step"]}}


# ---------------------------------------------------------------------- report


def summarise(runs: list[dict]) -> list[dict]:
    """Mean and spread over seeds."""
    rows = []
    for task in TASKS:
        for size in sorted({run["examples"] for run in runs}):
            for method in METHODS:
                found = [
                    run["accuracy"]
                    for run in runs
                    if (run["task"], run["examples"], run["method"]) == (task, size, method)
                ]
                if found:
                    spread = statistics.stdev(found) if len(found) > 1 else 0.0
                    mean = round(statistics.mean(found), 4)
                    rows.append({"task": task, "examples": size, "method": method, "seeds": len(found),
                                 "accuracy": mean, "std": round(spread, 4)})  # fmt: skip
    return rows


def markdown(rows: list[dict]) -> str:
    lines = ["| task | examples | " + " | ".join(METHODS) + " |", "|---" * (2 + len(METHODS)) + "|"]
    for task, size in dict.fromkeys((row["task"], row["examples"]) for row in rows):
        cells = {row["method"]: row for row in rows if (row["task"], row["examples"]) == (task, size)}
        shown = [
            f"{100 * cells[name]['accuracy']:.1f} ± {100 * cells[name]['std']:.1f}" if name in cells else "-"
            for name in METHODS
        ]
        lines.append(f"| {task} | {size} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw(report: dict, file: Path) -> None:
    """Accuracy over the number of labelled pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    for axes, (task, about) in zip(figure.subplots(1, 2), report["tasks"].items()):
        for method in METHODS:
            rows = [row for row in report["summary"] if (row["task"], row["method"]) == (task, method)]
            sizes, means, spreads = zip(*((row["examples"], 100 * row["accuracy"], 100 * row["std"]) for row in rows))
            dashes = "--" if method.startswith("probe") else "-"
            axes.errorbar(sizes, means, spreads, fmt=f"o{dashes}", capsize=3, label=method)
        axes.axhline(100 * about["chance"], color="grey", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        axes.set_xlabel("labelled pictures")
        axes.set_ylabel("test accuracy (%)")
        axes.set_ylim(0, 102)
        axes.set_title(f"{task}: {about['classes']} classes", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(
    sizes: Annotated[str, typer.Option(help="Labelled pictures.")] = "50,200,1000",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    first_seed: int = 0,
    tasks: Annotated[str, typer.Option()] = ",".join(TASKS),
    pool: Annotated[int, typer.Option(help="Pictures that seeds draw from.")] = 1000,
    tested: Annotated[int, typer.Option(min=2)] = 300,
    steps: Annotated[str, typer.Option(help="For the classes, by number of labelled pictures.")] = "60,120,240",
    warm_up_steps: Annotated[str, typer.Option(help="For stage 1, by number of labelled pictures.")] = "60,80,120",
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    features: Annotated[Path, typer.Option(help="Folder for what the encoder gives.")] = Path("features"),
    output: Annotated[Path | None, typer.Option(help="JSON file of the results; a picture goes beside it.")] = None,
) -> None:
    """Train and probe, and say what came of it."""
    transformers.logging.set_verbosity_error()
    report = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/classification.py --sizes {sizes} --seeds {seeds} --first-seed {first_seed} "
        f"--tasks {tasks} --pool {pool} --tested {tested} --steps {steps} --warm-up-steps {warm_up_steps} "
        f"--batch-size {batch_size}",
        "device": f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "versions": versions(),
        "encoder": demo.VISION,
        "qformer": QFORMER,
        "tasks": {},
        "runs": [],
    }
    model, image_processor = QFormerBlip2ForImageClassification.from_vision(
        demo.resolve(demo.VISION), num_labels=2, qformer_config=QFORMER
    )
    encoder = model.vision_model.to(memory_format=torch.channels_last)  # twice as fast for a CNN on a CPU
    data = {}
    for task in tasks.split(","):
        everything, classes = encode(model, image_processor, task, "train", pool, features)
        test, _ = encode(model, image_processor, task, "test", tested, features)
        data[task] = everything, test, dict(enumerate(classes)), word_tokenizer(everything.notes)
        most = test.labels.bincount().max().item() / len(test)
        report["tasks"][task] = {"classes": len(classes), "chance": most, "tested": len(test)}
    for seed in range(first_seed, first_seed + seeds):
        for task, (everything, test, id2label, tokenizer) in data.items():
            for size, size_steps, size_warm_up in zip(*map(numbers, (sizes, steps, warm_up_steps))):
                # classes in turn, as in the pool, beginning somewhere else
                start = random.Random(seed).randrange(len(everything))
                chosen = [(start + index) % len(everything) for index in range(size)]
                train = everything.take([index for number, index in enumerate(chosen) if number % 5 != 4])
                splits = train, everything.take(chosen[4::5]), test
                stage1 = partial(warm_up, encoder, tokenizer, train, size_warm_up, batch_size, seed)
                begin = partial(begin_with, encoder=encoder, id2label=id2label, image_processor=image_processor)
                for method in METHODS:
                    started = time.time()
                    if method.startswith("probe"):
                        found = probe(*splits, len(id2label), pooled=method.endswith("mean"))
                    else:
                        set_seed(seed)
                        model = begin(stage1() if method.endswith("warm-up") else None)
                        found = classify(model, *splits, size_steps, batch_size, seed)
                    run = {"task": task, "examples": size, "seed": seed, "method": method, **found}
                    run["seconds"] = round(time.time() - started, 1)
                    report["runs"].append(run)
                    print(json.dumps(run), flush=True)
                report["summary"] = summarise(report["runs"])
                if output is not None:
                    output.parent.mkdir(parents=True, exist_ok=True)
                    output.write_text(json.dumps(report, indent=1) + "\n")
    if output is not None:
        draw(report, output.with_suffix(".png"))
    print(markdown(report["summary"]))


if __name__ == "__main__":
    typer.run(main)
