"""Stage 1 from scratch on drawn scenes, with one objective left out at a time; and stage 2 with and without stage 1.

    python benchmarks/qformer_stages.py --output benchmarks/results/qformer_stages.json

A scene shows two coloured shapes side by side or one above the other, and its caption says so ("red circle left of blue
square"): 264 different ones, of which 64 are kept out of training altogether. The encoder is the embedded default's,
and frozen: it sees every scene once. Two things are measured after stage 1, each among 200 scenes with 200 different
captions (64 for captions that training has not seen), so that guessing finds the right one once in 200 (64):

- recall@1, scene to caption and caption to scene, by similarity alone and after matching (all pairs, not the top k);
- scenes whose greedy caption is right word for word.

Stage 2 then gives the Q-Former's tokens to SmolLM2-135M-Instruct, which is frozen, and trains for captions: once from
the stage-1 Q-Former that all three objectives trained, once from a fresh one, for the same number of steps on the same
scenes in the same order. Source of the claim: BLIP-2 (arXiv 2301.12597), section 4.4 and figure 5.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import platform
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from gpu_smoke import versions
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoModel, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed

import vlbridge
from vlbridge import demo
from vlbridge.modeling.modeling_contrastive import similarities_of
from vlbridge.modeling.modeling_qformer import QFormerBlip2ForConditionalGeneration
from vlbridge.modeling.modeling_qformer_pretraining import QFormerBlip2ForPreTraining
from vlbridge.modeling.modeling_qformer_retrieval import QFormerBlip2ForImageTextRetrieval


COLORS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 200), "yellow": (240, 210, 40),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "above")
OBJECTS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
CAPTIONS = tuple(
    f"{first} {relation} {second}"
    for (first, second), relation in itertools.product(itertools.permutations(OBJECTS, 2), RELATIONS)
)
QFORMER = {
    "num_query_tokens": 8, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 512, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
OBJECTIVES = ("itc", "itm", "itg")


# ---------------------------------------------------------------------- data


def scene(caption: str, rng: random.Random, side: int = 224) -> Image.Image:
    """What a caption says, at places and in sizes that vary."""
    grey = rng.randint(200, 255)
    image = Image.new("RGB", (side, side), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    relation = next(relation for relation in RELATIONS if relation in caption)
    for index, thing in enumerate(caption.split(f" {relation} ")):
        color, shape = thing.split()
        radius = rng.uniform(0.13, 0.2) * side
        along, across = (0.27 + 0.46 * index + rng.uniform(-0.05, 0.05)) * side, rng.uniform(0.3, 0.7) * side
        x, y = (along, across) if relation == "left of" else (across, along)
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, fill=COLORS[color])
        elif shape == "square":
            draw.rectangle(box, fill=COLORS[color])
        else:
            draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=COLORS[color])
    return image


def word_tokenizer(captions: Iterable[str] = CAPTIONS) -> PreTrainedTokenizerFast:
    """BERT's special tokens and the captions' words, one token each."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = sorted({word for caption in captions for word in caption.split()})
    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in special[:-1]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[DEC]", **names)


def draw_captions(seed: int, num_scenes: int, num_tested: int) -> dict[str, list[str]]:
    """Captions of the scenes to train on, of new scenes, and of new scenes whose captions training has not seen."""
    rng = random.Random(seed)
    shuffled = rng.sample(CAPTIONS, len(CAPTIONS))
    kept_out, known = shuffled[:64], shuffled[64:]
    return {
        "train": [known[index % len(known)] for index in range(num_scenes)],
        "new scenes": rng.sample(known, min(num_tested, len(known))),
        "new captions": kept_out[:num_tested],
    }


@torch.no_grad()
def encode(model, processor, captions: list[str], seed: int, batch_size: int = 16) -> torch.Tensor:
    """Patch features of a scene per caption, `(scenes, num_patches, vision_dim)`."""
    rng = random.Random(seed)
    features = []
    for start in tqdm(range(0, len(captions), batch_size), desc="encoding", unit="batch"):
        images = [scene(caption, rng) for caption in captions[start : start + batch_size]]
        pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        features.append(model.get_patch_features(pixel_values.to(model.device)).cpu())
    return torch.cat(features)


class Pairs(Dataset):
    """Patch features and tokens of the captions: rows as the trainer takes them."""

    def __init__(self, features: torch.Tensor, **tokens: torch.Tensor):
        self.rows = {"patch_features": features, **tokens}

    def __len__(self) -> int:
        return len(self.rows["patch_features"])

    def __getitem__(self, index: int) -> dict:
        return {name: tensor[index] for name, tensor in self.rows.items()}


# ---------------------------------------------------------------------- training


class LossCurve(TrainerCallback):
    """Losses as the trainer logs them: `[step, loss]`."""

    def __init__(self):
        self.points: list[list[float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.points.append([state.global_step, round(float(logs["loss"]), 4)])


def fit(model, data: Dataset, steps: int, batch_size: int, learning_rate: float, folder: Path, seed: int) -> dict:
    """Train what is not frozen; the order of the data depends on `seed` alone."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=learning_rate,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), weight_decay=0.05, adam_beta2=0.98,
        dataloader_drop_last=True, logging_steps=max(1, steps // 25), save_strategy="no", report_to="none", seed=seed,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    curve, started = LossCurve(), time.time()
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[curve]).train()
    model.eval()
    return {"loss": curve.points, "seconds": round(time.time() - started)}


# ---------------------------------------------------------------------- measuring


def recall_at_1(scores: torch.Tensor) -> dict[str, float]:
    """Of `(scenes, captions)`, the right ones on the diagonal."""
    right = torch.arange(len(scores))
    return {
        "scene_to_caption": round((scores.argmax(dim=1) == right).float().mean().item(), 4),
        "caption_to_scene": round((scores.argmax(dim=0) == right).float().mean().item(), 4),
    }


@torch.no_grad()
def measure_stage1(model, tokenizer, features, captions: list[str], objectives, batch_size: int = 250) -> dict:
    """Retrieval by what was trained, and captions where they were."""
    text, found = tokenizer(captions, padding=True, return_tensors="pt"), {"captions": len(captions)}
    ids, mask = text["input_ids"].to(model.device), text["attention_mask"].to(model.device)
    features = features.to(model.device)
    if "itc" in objectives:
        images = model.get_image_features(patch_features=features).pooler_output
        similarities = similarities_of(images, model.get_text_features(ids, mask).pooler_output)
        found["similarity"] = recall_at_1(similarities.cpu())
    if "itm" in objectives:
        pairs = torch.cartesian_prod(torch.arange(len(features)), torch.arange(len(ids)))
        logits = [
            model.get_itm_logits(patch_features=features[images], input_ids=ids[texts], attention_mask=mask[texts])
            for images, texts in (part.unbind(1) for part in pairs.split(batch_size))
        ]
        matches = torch.cat(logits).log_softmax(-1)[:, 1].view(len(features), len(ids)).cpu()
        found["matching"] = recall_at_1(matches)
    if "itg" in objectives:
        ids = model.generate(patch_features=features, num_beams=1, max_length=12, min_length=0)
        said = tokenizer.batch_decode(ids, skip_special_tokens=True)
        found["exact_captions"] = sum(a == b for a, b in zip(said, captions)) / len(captions)
    return found


def caption_tokens(processor, captions: list[str]) -> dict[str, torch.Tensor]:
    """Prompt with its image tokens, caption, end: padded on the right, labels on the caption and the end."""
    tokenizer = processor.tokenizer
    prompt = tokenizer(processor.image_token * processor.num_query_tokens, add_special_tokens=False)["input_ids"]
    prompt += tokenizer("a picture of", add_special_tokens=False)["input_ids"]
    said = [tokenizer(f" {caption}", add_special_tokens=False)["input_ids"] for caption in captions]
    said = [ids + [tokenizer.eos_token_id] for ids in said]
    longest = max(map(len, said))
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids in said:
        missing = longest - len(ids)
        rows["input_ids"].append(prompt + ids + [tokenizer.pad_token_id] * missing)
        rows["attention_mask"].append([1] * (len(prompt) + len(ids)) + [0] * missing)
        rows["labels"].append([-100] * len(prompt) + ids + [-100] * missing)
    return {name: torch.tensor(values) for name, values in rows.items()} | {"prompt": torch.tensor([prompt])}


@torch.no_grad()
def measure_stage2(model, processor, features, captions: list[str], batch_size: int = 50) -> dict:
    """Loss of the right captions, and greedy captions that are right word for word."""
    tokens = caption_tokens(processor, captions)
    prompt, losses, right = tokens.pop("prompt").to(model.device), [], 0
    for start in range(0, len(captions), batch_size):
        rows = slice(start, start + batch_size)
        batch = {name: values[rows].to(model.device) for name, values in tokens.items()}
        patches = features[rows].to(model.device)
        losses.append(model(patch_features=patches, **batch).loss.item() * len(patches))
        ids = model.generate(
            prompt.expand(len(patches), -1), patch_features=patches, do_sample=False, max_new_tokens=14
        )[:, prompt.shape[1] :]
        said = processor.batch_decode(ids, skip_special_tokens=True)
        right += sum(a.strip() == b for a, b in zip(said, captions[rows]))
    return {"loss": round(sum(losses) / len(captions), 4), "exact_captions": right / len(captions)}


def markdown(report: dict) -> str:
    """The results as tables."""
    lines = [
        "| stage 1 | new scenes: similarity | matching | captions | new captions: similarity | matching | captions |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for row in report["stage1"]:
        cells = []
        for name in ("new scenes", "new captions"):
            for kind in ("similarity", "matching"):
                found = row[name].get(kind)
                cells.append("-" if found is None else " / ".join(f"{100 * share:.1f}" for share in found.values()))
            exact = row[name].get("exact_captions")
            cells.append("-" if exact is None else f"{100 * exact:.1f}")
        lines.append(f"| {row['objectives']} | " + " | ".join(cells) + " |")
    lines += ["", "| stage 2 | new scenes: loss | captions | new captions: loss | captions |", "|---|---|---|---|---|"]
    for row in report["stage2"]:
        cells = [
            f"{row[name]['loss']:.3f} | {100 * row[name]['exact_captions']:.1f}"
            for name in ("new scenes", "new captions")
        ]
        lines.append(f"| {row['begins_as']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(report: dict, file: Path) -> None:
    """Recall of stage 1 and losses of stage 2."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = report["stage1"]
    for offset, kind in ((-0.2, "similarity"), (0.2, "matching")):
        shares = [100 * row["new scenes"].get(kind, {}).get("scene_to_caption", 0) for row in rows]
        bars = left.bar([index + offset for index in range(len(rows))], shares, 0.38, label=kind)
        left.bar_label(bars, [f"{share:.0f}" if share else "" for share in shares], fontsize="small")
    left.set_xticks(range(len(rows)), [row["objectives"] for row in rows])
    left.set_ylabel("recall@1, new scene to caption (%)")
    left.set_ylim(0, 120)
    left.set_title("stage 1", fontsize="medium")
    left.legend(loc="upper center", ncols=2)
    for row in report["stage2"]:
        right.plot(*zip(*row["loss"]), label=row["begins_as"])
    right.set_xlabel("step of stage 2")
    right.set_ylabel("caption loss")
    right.set_ylim(bottom=0)
    right.set_title("stage 2", fontsize="medium")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(file, dpi=150)


def main(
    scenes: Annotated[int, typer.Option(min=64, help="To train on.")] = 4096,
    tested: Annotated[int, typer.Option(min=2, help="New scenes to retrieve among.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Of stage 1, per row of the table.")] = 500,
    batch_size: Annotated[int, typer.Option(min=2, help="Of stage 1.")] = 64,
    stage2_steps: Annotated[int, typer.Option(min=1)] = 150,
    stage2_batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Annotated[str, typer.Option()] = "cpu",
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results; a picture goes beside it.")] = None,
    folder: Annotated[Path, typer.Option(help="For the stage-1 model.")] = Path("qformer_stages"),
) -> None:
    """Train stage 1 four times and stage 2 twice, and say what came of it."""
    transformers.logging.set_verbosity_error()
    started = time.time()
    set_seed(seed)
    tokenizer = word_tokenizer()
    captions = draw_captions(seed, scenes, tested)
    vision = demo.resolve(demo.VISION)
    encoder, processor = QFormerBlip2ForPreTraining.from_vision(
        vision, tokenizer, qformer_config=QFORMER, embed_dim=64, max_length=12
    )
    encoder.to(device)
    features = {name: encode(encoder, processor, said, seed + k) for k, (name, said) in enumerate(captions.items())}
    text = tokenizer(captions["train"], padding=True, return_tensors="pt", return_token_type_ids=False)
    pictured = {caption: number for number, caption in enumerate(CAPTIONS)}
    data = Pairs(
        features["train"],
        input_ids=text["input_ids"],
        attention_mask=text["attention_mask"],
        # scenes with the same caption are no negatives of each other
        image_ids=torch.tensor([pictured[caption] for caption in captions["train"]]),
    )
    report = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/qformer_stages.py --scenes {scenes} --tested {tested} --steps {steps} "
        f"--batch-size {batch_size} --stage2-steps {stage2_steps} --stage2-batch-size {stage2_batch_size} "
        f"--device {device} --seed {seed}",
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "CPU",
        "versions": versions(),
        "chance": {name: 1 / len(captions[name]) for name in ("new scenes", "new captions")},
        "stage1": [],
        "stage2": [],
    }

    def save() -> None:
        report["minutes"] = round((time.time() - started) / 60, 1)
        if output is not None:
            output.write_text(json.dumps(report, indent=1) + "\n")

    for left_out in (None, *OBJECTIVES):
        trained = [name for name in OBJECTIVES if name != left_out]
        weights = {f"{name}_weight": float(name in trained) for name in OBJECTIVES}
        set_seed(seed)
        model, _ = QFormerBlip2ForPreTraining.from_vision(
            vision, tokenizer, qformer_config=QFORMER, embed_dim=64, max_length=12, **weights
        )
        model.to(device)
        row = {"objectives": "all" if left_out is None else f"without {left_out.upper()}"}
        row |= fit(model, data, steps, batch_size, 2e-3, folder, seed)
        for name in ("new scenes", "new captions"):
            row[name] = measure_stage1(model, tokenizer, features[name], captions[name], trained)
        report["stage1"].append(row)
        if left_out is None:
            model.save_pretrained(folder / "stage1")
            processor.save_pretrained(folder / "stage1")
        print(json.dumps({name: value for name, value in row.items() if name != "loss"}), flush=True)
        save()

    # what was saved is what retrieval and stage 2 load
    retrieval = QFormerBlip2ForImageTextRetrieval.from_pretrained(folder / "stage1")
    again = measure_stage1(
        retrieval.to(device).eval(), tokenizer, features["new scenes"], captions["new scenes"], ["itc"]
    )
    if again["similarity"] != report["stage1"][0]["new scenes"]["similarity"]:
        raise SystemExit(f"the saved model retrieves differently: {again}")

    language = demo.resolve(demo.LANGUAGE)
    for begins_as in ("stage 1", "fresh"):
        set_seed(seed)
        stage1 = AutoModel.from_pretrained(folder / "stage1")
        options = {"image_processor": copy.deepcopy(processor.image_processor), "dtype": torch.float32}
        if begins_as == "stage 1":
            model, bridged = QFormerBlip2ForConditionalGeneration.from_stage1(stage1, language, **options)
        else:
            model, bridged = vlbridge.compose(
                stage1.vision_model, language, "qformer", qformer_config={**QFORMER, "use_text": False}, **options
            )
        model.to(device)
        tokens = caption_tokens(bridged, captions["train"])
        tokens.pop("prompt")
        row = {"begins_as": begins_as}
        row |= fit(model, Pairs(features["train"], **tokens), stage2_steps, stage2_batch_size, 5e-4, folder, seed)
        for name in ("new scenes", "new captions"):
            row[name] = measure_stage2(model, bridged, features[name], captions[name])
        report["stage2"].append(row)
        print(json.dumps({name: value for name, value in row.items() if name != "loss"}), flush=True)
        save()
    if output is not None:
        draw(report, output.with_suffix(".png"))
    print(markdown(report))


if __name__ == "__main__":
    typer.run(main)
