"""Image-text retrieval with a model of stage 1: the place of the right texts and pictures, by ITC and by ITM."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .evaluation_answers import open_picture
from .evaluation_metrics import rank_of_best
from .evaluation_models import Subject
from .evaluation_samples import Sample


SHOWN = 10  # candidates that a row of predictions names


@torch.no_grad()
def rank_all(
    subject: Subject, samples: Sequence[Sample], pictures: Sequence[Sample] | None, top_k: int, batch_size: int = 32
) -> list[dict]:
    """Rank all texts for every picture and all pictures for every text.

    Args:
        subject: A model of stage 1 and its processor.
        samples: A picture with its texts each.
        pictures: Whose picture each sample is shown with; by default its own.
        top_k: Candidates that are read again together with the query (ITM); 0 for none.
        batch_size: Pictures, texts or pairs per forward pass.

    Returns:
        A row per picture (`"direction": "image to text"`) and per text (`"text to image"`), with `rank_itc` and, if
        there is a `top_k`, `rank_itm`: the place of the best right candidate, from 1.

    Raises:
        ValueError: A picture can't be read.
    """
    model, processor = subject.model, subject.processor
    shown = list(samples if pictures is None else pictures)
    patches = []
    for start in range(0, len(shown), batch_size):
        images = [open_picture(sample) for sample in shown[start : start + batch_size]]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        patches.append(model.get_patch_features(pixels.to(model.device, model.dtype)).cpu())
    texts = [text for sample in samples for text in sample.references]
    owner = [number for number, sample in enumerate(samples) for _ in sample.references]
    of_image = [[] for _ in samples]
    for text, number in enumerate(owner):
        of_image[number].append(text)
    encoded = processor(text=texts, return_tensors="pt")
    inputs = {
        "patch_features": torch.cat(patches),
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
    }
    ranked = model.rank(**inputs, top_k=top_k, batch_size=batch_size)
    itc = ranked.itc_scores.float().numpy()
    itm = (ranked.image_to_text.float().numpy(), ranked.text_to_image.float().numpy()) if top_k else (None, None)
    rows = []
    for number, sample in enumerate(samples):
        row = _row(sample.id, "image to text", itc[number], itm[0], number, of_image[number], texts)
        rows.append({**row, "references": list(sample.references)})
    ids = [sample.id for sample in samples]
    for text, number in enumerate(owner):
        row = _row(f"{ids[number]}, text {text - of_image[number][0]}", "text to image", itc[:, text], itm[1], text,
                   [number], ids)  # fmt: skip
        rows.append({**row, "text": texts[text], "references": [ids[number]]})
    return [{"number": number, **row} for number, row in enumerate(rows)]


def _row(name: str, direction: str, itc, itm, number: int, right: list[int], names: Sequence[str]) -> dict:
    row = {"id": name, "direction": direction, "rank_itc": rank_of_best(itc, right)}
    scores = itc
    if itm is not None:
        scores = itm[number]
        row["rank_itm"] = rank_of_best(scores, right)
    order = sorted(range(len(names)), key=lambda candidate: (-scores[candidate], candidate))[:SHOWN]
    return {**row, "prediction": [names[candidate] for candidate in order]}


__all__ = ["rank_all"]
