"""Where trained bridges look on easy-VQA's test pictures, and whether their answers depend on the object.

    python benchmarks/inspection_easy_vqa.py --runs runs/small_qformer --runs runs/small_perceiver \
        --output benchmarks/results/inspection_easy_vqa.json

Every picture shows one shape on a plain ground. The object is what differs from the ground, which is the colour of the
picture's corners. For Q-Former and Perceiver: how much attention lies on the object, against its share of the area; the
mean over layers, heads and queries, and that of the language model's attention to each answer's first word through the
bridge. For the embedded bridge and all others: whether the occlusion map's highest cell touches the object.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from gpu_smoke import versions
from PIL import Image
from tqdm import tqdm

from vlbridge import demo
from vlbridge.inference import load, question_inputs
from vlbridge.inspection.inspection_attention import answer_attention, bridge_attention, patch_attention
from vlbridge.inspection.inspection_geometry import share_on, token_grids
from vlbridge.inspection.inspection_looking import Occlusion, answer_of, ids_of, occlusion
from vlbridge.inspection.inspection_queries import specialisation
from vlbridge.training.training_easy_vqa import load_split, properties_of


QUESTION = "what color is the shape?"
DIFFERENCE = 24  # grey levels in any channel, from which on a pixel is not ground


def object_mask(picture: Image.Image) -> torch.Tensor:
    """Pixels that are not ground, `(height, width)`."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    ground = np.median(corners, axis=0)
    return torch.from_numpy(np.abs(pixels - ground).max(axis=-1) > DIFFERENCE)


def summary(values: Sequence[float]) -> dict:
    values = list(values)
    return {"mean": round(statistics.fmean(values), 4), "median": round(statistics.median(values), 4)}


def attention_on_object(model, processor, pictures: list[tuple[Image.Image, str]], num_words: int) -> dict:
    """Attention of the bridge on the object; and of the true answer's first word, for the first `num_words` pictures.

    The second goes through the language model: its attention to visual tokens, times what those attend to.
    """
    shares, others, of_words, of_queries, maps = [], [], [], [], []
    for number, (picture, color) in enumerate(tqdm(pictures, desc="attention")):
        inputs = question_inputs(processor, [picture], QUESTION)
        mask, grids = object_mask(picture), token_grids(model.config, processor, picture.size)
        if number < num_words:
            found = answer_attention(model, inputs, ids_of(model, processor, color))
            of_words.append(share_on(found.to_patches()[0], grids, mask))
            queries = found.bridge_to_patches()[0]
        else:
            queries = patch_attention(bridge_attention(model, inputs), grids[0].tokens.numel())[0]
        shares.append(share_on(queries.mean(dim=0), grids, mask))
        elsewhere = object_mask(pictures[(number + 1) % len(pictures)][0])
        others.append(share_on(queries.mean(dim=0), grids, elsewhere))
        of_queries.append([share_on(query, grids, mask)[0] for query in queries])
        maps.append(queries)
    areas = [area for _, area in shares]
    by_query = np.mean(of_queries, axis=0) / np.mean(areas)
    return {
        "pictures": len(pictures),
        "object_area": summary(areas),
        "attention_on_object": summary(share for share, _ in shares),
        "times_area": summary(share / area for share, area in shares),
        # the same attention on the place of the next picture's object: what a preference for the middle gives
        "times_area_of_another_object": summary(share / area for share, area in others),
        "times_area_by_query": {"lowest": round(float(by_query.min()), 4), "highest": round(float(by_query.max()), 4)},
        "pictures_for_words": len(of_words),
        "word_attention_on_object": summary(share for share, _ in of_words),
        "word_times_area": summary(share / area for share, area in of_words),
        "specialisation": {name: round(value, 4) for name, value in vars(specialisation(torch.stack(maps))).items()},
    }


def cells_on_object(mask: torch.Tensor, found: Occlusion) -> torch.Tensor:
    """Which cells of an occlusion map touch the object, in the map's shape."""
    rows, columns = found.drop.shape
    touched = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        for column in range(columns):
            left, top, right, bottom = (round(edge) for edge in found.grid.cell(row, column))
            touched[row, column] = mask[top:bottom, left:right].any()
    return touched


def occlusion_on_object(model, processor, pictures: list[tuple[Image.Image, str]], cells: int) -> Iterator[dict]:
    """How often covering the cell that costs the model's own answer most touches the object, after each picture."""
    peaks, chances, right, start = [], [], [], time.perf_counter()
    for picture, color in tqdm(pictures, desc="occlusion"):
        ids = answer_of(model, processor, picture, QUESTION, max_new_tokens=6)
        right.append(processor.tokenizer.decode(ids[0]).strip().lower() == color)
        found = occlusion(model, processor, picture, QUESTION, ids, cells=cells, batch_size=cells * cells + 1)
        touched = cells_on_object(object_mask(picture), found)
        peaks.append(bool(touched.flatten()[found.drop.argmax()]))
        chances.append(float(touched.float().mean()))
        yield {
            "pictures": len(peaks),
            "cells_per_side": cells,
            "peak_on_object": round(statistics.fmean(peaks), 4),
            "by_chance": round(statistics.fmean(chances), 4),  # share of the cells that touch the object
            "answers_right": round(statistics.fmean(right), 4),
            "peak_on_object_if_right": round(statistics.fmean([p for p, r in zip(peaks, right) if r] or [0]), 4),
            "seconds_per_picture": round((time.perf_counter() - start) / len(peaks), 2),
        }


def main(
    runs: Annotated[list[Path] | None, typer.Option(help="Folders of trained bridges; may be repeated.")] = None,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/inspection_easy_vqa.json"),
    pictures: Annotated[int, typer.Option(help="Pictures for attention.")] = 200,
    words: Annotated[int, typer.Option(help="Of these, pictures for the attention of words.")] = 200,
    occluded: Annotated[int, typer.Option(help="Pictures for occlusion; 0 leaves it out.")] = 200,
    cells: Annotated[int, typer.Option(help="Cells per side of occlusion maps.")] = 7,
    precision: Annotated[str, typer.Option(help="highest, or medium: matrices are multiplied in bf16.")] = "medium",
    embedded: Annotated[bool, typer.Option(help="Measure the embedded bridge's occlusion.")] = True,
) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(precision)
    chosen = []
    for example in load_split(demo.easy_vqa_dir(), "test"):
        if color := properties_of(example).get("color"):
            chosen.append((Image.open(example.image).convert("RGB"), color))
    random.Random(0).shuffle(chosen)  # the same pictures for all models; fewer of them are the first ones
    result = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"models": {}}
    result |= {
        "question": QUESTION,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "float32_matmul_precision": precision,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }

    def keep(name: str, kind: str, figures: dict) -> None:
        result["models"].setdefault(name, {})[kind] = figures
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for folder in runs or []:
        model, processor = load(folder, "cpu")
        name = f"{folder.parent.name}/{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
        if model.config.model_type != "mlp_llava":
            keep(name, "attention", attention_on_object(model, processor, chosen[:pictures], words))
        if occluded:
            for figures in occlusion_on_object(model, processor, chosen[:occluded], cells):
                keep(name, "occlusion", figures)
    if embedded and occluded:
        model, processor = load(None, "cpu")
        for figures in occlusion_on_object(model, processor, chosen[:occluded], cells):
            keep("embedded", "occlusion", figures)


if __name__ == "__main__":
    typer.run(main)
