"""Toy parts and data on disk, for tests of training: what recipes name."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from tiny import (
    BRIDGE_OPTIONS,
    LANGUAGE,
    QFORMER,
    VISION,
    bert_like_tokenizer,
    clip_image_processor,
    spread_weights,
    tiny_image,
    tiny_tokenizer,
)
from transformers import AutoModel, TrainingArguments

import vlbridge
from vlbridge.modeling.modeling_parts import build_part
from vlbridge.training.training_datasets import Samples, SampleStream
from vlbridge.training.training_encoding import encoder_for
from vlbridge.training.training_trainer import BridgeTrainer


CAPTIONS = ("a cat", "two red dogs", "the sea", "a small house", "rain", "blue", "an old tree", "ten fish")


def save_parts(folder: Path, language: str = "llama", vision: str = "clip") -> dict[str, str]:
    """Parts with random weights as `compose` takes them: `vision`, `language` and `tokenizer` (of the Q-Former)."""
    torch.manual_seed(0)
    AutoModel.from_config(VISION[vision]()).save_pretrained(folder / "vision")
    clip_image_processor().save_pretrained(folder / "vision")
    build_part("language_model", LANGUAGE[language]()).save_pretrained(folder / language)
    tiny_tokenizer().save_pretrained(folder / language)
    bert = bert_like_tokenizer()
    bert.add_special_tokens({"bos_token": "[DEC]"})
    bert.save_pretrained(folder / "bert")
    return {
        name: str(folder / place)
        for name, place in (("vision", "vision"), ("language", language), ("tokenizer", "bert"))
    }


def save_data(folder: Path, count: int = 8) -> dict[str, str]:
    """The same pictures as captions (COCO's layout), conversations (LLaVA's) and documents (MMC4's): a file of each."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(count):
        tiny_image(number).save(images / f"{number}.png")
    said = [f"{CAPTIONS[number % len(CAPTIONS)]} {number}" for number in range(count)]
    coco = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(count)],
        "annotations": [{"id": number, "image_id": number, "caption": text} for number, text in enumerate(said)],
    }
    llava = [
        {
            "id": f"talk{number}",
            "image": f"{number}.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": text}],
        }
        for number, text in enumerate(said)
    ]
    documents = [
        {
            "text_list": ["first", said[number], "then", said[number - 1]],
            "image_info": [
                {"image_name": f"{number}.png", "matched_text_index": 1, "matched_sim": 0.5},
                {"image_name": f"{(number - 1) % count}.png", "matched_text_index": 3, "matched_sim": 0.5},
            ],
        }
        for number in range(count)
    ]
    files = {}
    for name, content in (("captions", coco), ("llava", llava), ("documents", documents)):
        files[name] = str(folder / f"{name}.json")
        Path(files[name]).write_text(json.dumps(content))
    return files | {"images": str(images)}


def toy_records(count: int = 8) -> list[dict]:
    """Captions and conversations about pictures, in memory."""
    records = []
    for number in range(count):
        buffer = io.BytesIO()
        tiny_image(number).save(buffer, "PNG")
        record = {"id": f"r{number}", "source": "captions", "images": [{"path": None, "bytes": buffer.getvalue()}]}
        records.append({**record, "caption": f"{CAPTIONS[number % len(CAPTIONS)]} {number}"})
    return records


def toy_trainer(parts: Path, bridge: str = "qformer", language: str = "llama", dropout: float = 0.1):
    """A function that makes a trainer for a folder, always of the same model: a Q-Former with dropout, by default."""
    if not (parts / "vision").exists():
        save_parts(parts, language)
    records = toy_records()

    def compose():
        torch.manual_seed(0)
        qformer = {**QFORMER, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        if bridge == "stage1":
            return vlbridge.QFormerBlip2ForPreTraining.from_vision(
                str(parts / "vision"),
                str(parts / "bert"),
                qformer_config={**qformer, "max_position_embeddings": 40},
                embed_dim=16,
            )
        options = {"qformer_config": qformer} if bridge == "qformer" else BRIDGE_OPTIONS[bridge]
        return vlbridge.compose(str(parts / "vision"), str(parts / language), bridge, **options)

    def build(
        output: Path, *, records=records, stream: bool = False, freeze: dict | None = None, wrap=None, keywords=None,
        composed=None, **arguments,
    ):  # fmt: skip
        model, processor = composed or compose()
        spread_weights(model.bridge)
        model.freeze(**(freeze or {}))
        encoder = encoder_for(model, processor)
        model = model if wrap is None else wrap(model)
        given = {
            "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "steps",
            "save_steps": 100, "learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "log_level": "error", "remove_unused_columns": False, "prediction_loss_only": True,
        }  # fmt: skip
        args = TrainingArguments(output_dir=str(output), **{**given, **arguments})
        data = SampleStream(records, encoder, args.per_device_train_batch_size) if stream else Samples(records, encoder)
        return BridgeTrainer(model, args, encoder=encoder, processor=processor, train_dataset=data, **(keywords or {}))

    build.compose = compose
    return build
