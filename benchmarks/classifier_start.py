"""A bridge that begins as a classifier against a fresh one: steps to the same loss, on the same pictures.

    python benchmarks/classifier_start.py --output benchmarks/results/classifier_start.json
    python benchmarks/classifier_start.py --steps 4 --classifier-steps 40    # to try it

Two small classifiers, a ResNet and a ViT, learn to tell the colour of squares on grey noise. Their encoders are then
frozen, and a bridge is trained between each of them and a frozen language model, which is asked for the colour. There
are two language models: SmolLM2-135M-Instruct, and a Llama of four layers that is trained here on sentences about
squares, with the same tokenizer.

Both bridges have one visual token and the same number of hidden units, and see the same pictures in the same order,
with the same learning rate. They differ by where they begin: at random, or at the classifier's head and the embeddings
of its classes' names.
"""

from __future__ import annotations

import datetime
import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ViTConfig,
    set_seed,
)

import vlbridge
from vlbridge import demo


SIDE = 64
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.1),
    "blue": (0.1, 0.1, 0.9),
    "yellow": (0.9, 0.9, 0.1),
    "purple": (0.6, 0.1, 0.7),
    "orange": (1.0, 0.5, 0.0),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
}
WORDS = list(COLOURS)
LABELS = {"id2label": dict(enumerate(WORDS)), "label2id": {word: index for index, word in enumerate(WORDS)}}
ENCODERS = {
    "resnet": lambda: ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", image_size=SIDE, **LABELS
    ),
    "vit": lambda: ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=SIDE,
        patch_size=16, **LABELS,
    ),
}  # fmt: skip
ARMS = ("fresh", "classifier")
PROMPT = "A<image> square. The color of the square is"
WINDOW = 3  # steps that a loss is the mean of


def draw(classes: torch.Tensor, seed: int) -> torch.Tensor:
    """Squares of 32 pixels at random places on grey noise, `(num_images, 3, SIDE, SIDE)`, normalised."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.5 + 0.1 * torch.randn(len(classes), 3, SIDE, SIDE, generator=generator)
    corners = torch.randint(0, SIDE - 31, (len(classes), 2), generator=generator).tolist()
    for image, (top, left), index in zip(pixels, corners, classes.tolist()):
        image[:, top : top + 32, left : left + 32] = torch.tensor(COLOURS[WORDS[index]])[:, None, None]
    return (pixels - 0.5) / 0.5


def train_classifier(kind: str, steps: int):
    """A small classifier, trained from random weights."""
    model = AutoModelForImageClassification.from_config(ENCODERS[kind]()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for step in range(steps):
        classes = torch.randint(0, len(WORDS), (32,))
        loss = model(pixel_values=draw(classes, step), labels=classes).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def train_language(tokenizer, steps: int) -> LlamaForCausalLM:
    """A small language model that has read about squares: it repeats the colour that stands before "square"."""
    config = LlamaConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, vocab_size=len(tokenizer),
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    before, after = PROMPT.split("<image>")
    ids = torch.tensor(
        [tokenizer(f"{before} {word}{after} {word}", add_special_tokens=False)["input_ids"] for word in WORDS]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = model(input_ids=ids).logits[:, -2].argmax(dim=-1) == ids[:, -1]
    if not right.all():
        raise SystemExit(
            f"The small language model repeats {int(right.sum())} of {len(WORDS)} colours: train it longer."
        )
    return model.eval()


def batch_of(processor, classes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prompt and answer of pictures of some classes; the loss is the answer's alone. All answers have one token."""
    prompt = processor.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    answers = [processor.tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in WORDS]
    ids = torch.tensor([prompt + answers[index] for index in classes.tolist()])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@torch.no_grad()
def measure(model, processor, features: torch.Tensor, classes: torch.Tensor) -> dict[str, float]:
    """Loss of the right words, and how often the right one is the likeliest of the words, and of all tokens."""
    batch = batch_of(processor, classes)
    outputs = model(**batch, patch_features=features)
    logits, right = outputs.logits[:, -2], batch["labels"][:, -1]
    words = batch_of(processor, torch.arange(len(WORDS)))["labels"][:, -1]
    return {
        "loss": round(outputs.loss.item(), 4),
        "accuracy": round((words[logits[:, words].argmax(dim=-1)] == right).float().mean().item(), 4),
        "accuracy_of_all_tokens": round((logits.argmax(dim=-1) == right).float().mean().item(), 4),
    }


def fit(model, processor, features: torch.Tensor, classes: torch.Tensor, settings: dict, seed: int) -> list[float]:
    """Train a bridge; the loss of every step."""
    optimizer = torch.optim.AdamW(model.bridge.parameters(), lr=settings["learning_rate"], weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(settings["steps"]):
        chosen = torch.randint(0, len(classes), (settings["batch_size"],), generator=generator)
        loss = model(**batch_of(processor, classes[chosen]), patch_features=features[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.bridge.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def reached(losses: list[float], level: float) -> int | None:
    """Steps until the mean of the last `WINDOW` losses is at a level."""
    for step in range(WINDOW, len(losses) + 1):
        if statistics.mean(losses[step - WINDOW : step]) <= level:
            return step
    return None


def compare(kind: str, name: str, language, tokenizer, settings: dict, seed: int) -> list[dict]:
    """Both bridges, between one encoder and one language model."""
    set_seed(seed)
    classifier = train_classifier(kind, settings["classifier_steps"])
    count = {"train": settings["pictures"], "test": settings["test_pictures"]}
    classes = {name: torch.arange(number) % len(WORDS) for name, number in count.items()}
    pixels = {name: draw(classes[name], 10_000 + place) for place, name in enumerate(classes)}
    with torch.no_grad():
        shares = classifier(pixel_values=pixels["test"]).logits.softmax(dim=-1)
        top = classifier(pixel_values=pixels["train"]).logits.max(dim=-1).values.mean().item()
    head_accuracy = (shares.argmax(dim=-1) == classes["test"]).float().mean().item()
    # its logits are smaller than those of ImageNet's classifiers; a typical picture shall give its word once
    heard = {"class_threshold": top / 2, "class_name_scale": 2 / top}
    width, runs, start = language.config.hidden_size, [], None
    image_processor = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    for arm in reversed(ARMS):  # the classifier's first: the fresh one takes the same pooling
        options = {"projector_hidden_size": width}
        if arm == "classifier":
            options = {"projector_init_from": classifier, "free_units": width - len(WORDS), **heard}
        else:
            options |= {name: getattr(start, name) for name in ("pooling", "pooling_factor", "projector_norm_eps")}
        set_seed(seed)
        model, processor = vlbridge.compose(
            classifier.base_model, language, tokenizer=tokenizer, image_processor=image_processor, **options
        )
        start = start or model.config
        with torch.no_grad():
            features = {name: model.get_patch_features(images) for name, images in pixels.items()}
        before = measure(model, processor, features["test"], classes["test"])
        print(
            f"{kind}, {name}, {arm}, top logit {top:.2f}, head {head_accuracy:.2f}, before training: {before}",
            flush=True,
        )
        began = time.time()
        losses = fit(model, processor, features["train"], classes["train"], settings, seed)
        runs.append(
            {
                "encoder": kind,
                "language": name,
                "arm": arm,
                "seed": seed,
                "head_accuracy": round(head_accuracy, 4),
                "top_logit": round(top, 2),
                "parameters": sum(parameter.numel() for parameter in model.bridge.parameters()),
                "before": before,
                "after": measure(model, processor, features["test"], classes["test"]),
                "seconds": round(time.time() - began),
                "losses": [round(loss, 4) for loss in losses],
            }
        )
        print(json.dumps(runs[-1]), flush=True)
    return runs


def steps_saved(runs: list[dict]) -> dict:
    """How much earlier the classifier's bridge is at the loss that the fresh one ends at."""
    fresh, begun = (next(run["losses"] for run in runs if run["arm"] == arm) for arm in ARMS)
    level = statistics.mean(fresh[-WINDOW:])
    return {
        "encoder": runs[0]["encoder"],
        "language": runs[0]["language"],
        "seed": runs[0]["seed"],
        "loss": round(level, 4),
        "fresh_after_steps": reached(fresh, level),
        "classifier_after_steps": reached(begun, level),
    }


def main(
    steps: Annotated[int, typer.Option(min=WINDOW, help="Of each bridge.")] = 24,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of both bridges.")] = 1e-3,
    classifier_steps: Annotated[int, typer.Option(min=1, help="Of the classifiers, 32 pictures each.")] = 100,
    pictures: Annotated[int, typer.Option(min=8, help="To train the bridges on.")] = 256,
    test_pictures: Annotated[int, typer.Option(min=8, help="To test the bridges on.")] = 32,
    language_steps: Annotated[int, typer.Option(min=1, help="Of the small language model, 8 sentences each.")] = 150,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each bridge.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file with the figures.")] = None,
) -> None:
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "classifier_steps": classifier_steps,
        "pictures": pictures,
        "test_pictures": test_pictures,
        "language_steps": language_steps,
    }
    place = demo.resolve(demo.LANGUAGE)
    tokenizer = AutoTokenizer.from_pretrained(place)
    set_seed(0)
    languages = {
        demo.LANGUAGE: AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval(),
        "small Llama": train_language(tokenizer, language_steps),
    }
    runs, saved = [], []
    for seed in range(seeds):
        for (name, language), kind in itertools.product(languages.items(), ENCODERS):
            both = compare(kind, name, language, tokenizer, settings, seed)
            runs += both
            saved.append(steps_saved(both))
            print(json.dumps(saved[-1]), flush=True)
    if output is not None:
        about = {
            "date": datetime.date.today().isoformat(),
            "vlbridge": vlbridge.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "parameters": {name: language.num_parameters() for name, language in languages.items()},
            **settings,
        }
        output.write_text(json.dumps({"about": about, "steps_saved": saved, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
