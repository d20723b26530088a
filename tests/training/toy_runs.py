"""Toy parts and data on disk, for tests of training: what recipes name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny import LANGUAGE, VISION, bert_like_tokenizer, clip_image_processor, tiny_image, tiny_tokenizer
from transformers import AutoModel

from vlbridge.modeling.modeling_checkpoint import build_part


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
