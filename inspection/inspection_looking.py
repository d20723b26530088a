"""Whether an answer depends on the picture, word by word, and on which part of it.

Source: occlusion as in Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (arXiv 1311.2901,
section 4.2), of the answer's log-likelihood instead of a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..inference import question_inputs
from ..modeling import BridgedModel
from .inspection_attention import check_prompts, in_eval_mode, on_device
from .inspection_geometry import Box, Grid, token_grids


GREY = (128, 128, 128)
MOST_CELLS = 8  # cells per side of an occlusion map, unless asked otherwise


# ---------------------------------------------------------------------- answers


def answer_of(
    model: BridgedModel, processor, picture: Image.Image, question: str, max_new_tokens: int = 40
) -> torch.Tensor:
    """What the model answers, greedily.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        picture: The picture.
        question: What is asked about it.
        max_new_tokens: Maximum length of the answer, in tokens.

    Returns:
        `(1, answer_tokens)`, without special tokens at its end.

    Raises:
        ValueError: The answer is empty.
    """
    inputs = on_device(question_inputs(processor, [picture], question), model)
    with in_eval_mode(model):
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    ids = ids[0, 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1] :].tolist()
    special = set(processor.tokenizer.all_special_ids)
    while ids and ids[-1] in special:
        ids.pop()
    if not ids:
        raise ValueError(f"The model answers {question!r} with nothing; give an answer to look into.")
    return torch.tensor([ids])


def ids_of(model: BridgedModel, processor, answer: str) -> torch.Tensor:
    """An answer as the model would write it behind its prompt, `(1, answer_tokens)`.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        answer: The answer.

    Raises:
        ValueError: The answer is empty.
    """
    if not answer.strip():
        raise ValueError("The answer is empty; expected at least one word.")
    tokenize = processor.tokenizer
    if model.config.is_encoder_decoder:
        return torch.tensor([tokenize(answer.strip(), add_special_tokens=False)["input_ids"]])
    asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    said = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template(said, tokenize=False)
    # the template may put a space, or empty thoughts, between the two
    gap = whole[len(prompt) : whole.rindex(answer.strip())] if whole.startswith(prompt) else ""
    before, after = (
        tokenize(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + gap + answer.strip())
    )
    shared = after[: len(before)] == before
    ids = after[len(before) :] if shared else tokenize(gap + answer.strip(), add_special_tokens=False)["input_ids"]
    return torch.tensor([ids])


def words_of(processor, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of an answer, and which of its tokens each is made of.

    Args:
        processor: The model's processor.
        ids: The answer's tokens.

    Returns:
        Words without whitespace around them, and numbers of tokens; all tokens occur once.
    """
    words: list[tuple[str, list[int]]] = []
    before = ""
    for number in range(len(ids)):
        text = processor.tokenizer.decode(list(ids[: number + 1]))
        added = text[len(before) :] if text.startswith(before) else text
        begins = not words or added[:1].isspace() or before[-1:].isspace()
        if begins and not (words and not words[-1][0].strip()):
            words.append((added, [number]))
        else:
            words[-1] = (words[-1][0] + added, [*words[-1][1], number])
        before = text
    return [(word.strip(), tokens) for word, tokens in words]


# ---------------------------------------------------------------------- likelihoods


@torch.no_grad()
def token_log_likelihoods(model: BridgedModel, inputs, answer_ids: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of each token of given answers, in nats.

    Args:
        model: A bridged model with a language model.
        inputs: Model inputs of a batch of prompts, padded on the left; they end with text.
        answer_ids: `(batch, answer_tokens)`, or `(1, answer_tokens)` for the same answer to all.

    Returns:
        `(batch, answer_tokens)`, float32.

    Raises:
        ValueError: A prompt ends with an image, or is padded on the right.
    """
    inputs = on_device(inputs, model)
    ids = inputs["input_ids"]
    answers = answer_ids.to(ids.device).expand(len(ids), -1)
    with in_eval_mode(model):
        if model.config.is_encoder_decoder:
            logits = model(**inputs, labels=answers).logits
        else:
            mask = check_prompts(model, inputs)
            length = answers.shape[1]
            whole = {
                **inputs,
                "input_ids": torch.cat([ids, answers], dim=1),
                "attention_mask": torch.nn.functional.pad(mask, (0, length), value=1),
            }
            logits = model(**whole, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    return logits.float().log_softmax(dim=-1).gather(-1, answers[..., None])[..., 0]


@dataclass
class WordLikelihood:
    """How likely one word of an answer is, in nats.

    Args:
        word: The word.
        picture: Its log-likelihood with the picture.
        blank: With a grey picture instead.
        other: With another picture instead; `None` if there is none.
    """

    word: str
    picture: float
    blank: float
    other: float | None = None

    @property
    def gain(self) -> float:
        """How much likelier the picture makes the word, against a grey one, in nats."""
        return self.picture - self.blank


def did_it_look(
    model: BridgedModel,
    processor,
    picture: Image.Image,
    question: str,
    answer_ids: torch.Tensor,
    other: Image.Image | None = None,
) -> list[WordLikelihood]:
    """How likely each word of an answer is with the picture, with a grey one, and with another picture.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        picture: The picture.
        question: What is asked about it.
        answer_ids: `(1, answer_tokens)`, from `answer_of` or `ids_of`.
        other: Another picture.

    Returns:
        A row per word.
    """
    shown = [picture, Image.new("RGB", picture.size, GREY), *([] if other is None else [other])]
    found = token_log_likelihoods(model, question_inputs(processor, shown, question), answer_ids)
    return [
        WordLikelihood(word, *(float(row[tokens].sum()) for row in found))
        for word, tokens in words_of(processor, answer_ids[0].tolist())
    ]


# ---------------------------------------------------------------------- occlusion


@dataclass(eq=False)
class Occlusion:
    """What an answer loses if a part of the picture is covered.

    Args:
        drop: `(rows, columns)`: by how much covering a cell lowers the answer's log-likelihood, in nats.
        grid: Where the cells lie on the picture.
        log_likelihood: The answer's log-likelihood with the whole picture, in nats.
    """

    drop: torch.Tensor
    grid: Grid
    log_likelihood: float

    @property
    def peak(self) -> tuple[float, float]:
        """Middle of the cell that costs most, from the left and from the top, in pixels of the picture."""
        row, column = divmod(int(self.drop.argmax()), self.drop.shape[1])
        left, top, right, bottom = self.grid.cell(row, column)
        return (left + right) / 2, (top + bottom) / 2


def covered(picture: Image.Image, box: Box, color: tuple[int, int, int]) -> Image.Image:
    """A copy of a picture with a box covered.

    Args:
        picture: The picture.
        box: Left, top, right and bottom, in pixels; fractions are rounded.
        color: Colour of the cover.
    """
    copy = picture.convert("RGB").copy()
    copy.paste(color, tuple(round(edge) for edge in box))
    return copy


def occlusion(
    model: BridgedModel,
    processor,
    picture: Image.Image,
    question: str,
    answer_ids: torch.Tensor,
    cells: int | None = None,
    batch_size: int = 8,
) -> Occlusion:
    """Which parts of a picture an answer depends on: cover each part in turn.

    The cover has the picture's median colour, in each channel. On a plain ground it adds nothing that could be taken
    for an object, as the mean colour would.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        picture: The picture.
        question: What is asked about it.
        answer_ids: `(1, answer_tokens)`, from `answer_of` or `ids_of`.
        cells: Cells per side; by default those of the encoder's patches, but not more than 8.
        batch_size: Number of pictures at a time.

    Raises:
        ValueError: `cells` is not positive.
    """
    if cells is not None and cells < 1:
        raise ValueError(f"cells is {cells}; expected at least 1.")
    (whole, *_) = token_grids(model.config, processor, picture.size)
    rows, columns = (min(side, MOST_CELLS) if cells is None else cells for side in whole.tokens.shape)
    left, top, right, bottom = whole.box
    width, height = picture.size
    box = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))  # without padding
    grid = Grid(box, torch.arange(rows * columns).unflatten(0, (rows, columns)))
    color = tuple(int(value) for value in np.median(np.asarray(picture.convert("RGB")), axis=(0, 1)))
    shown = [picture] + [
        covered(picture, grid.cell(row, column), color) for row in range(rows) for column in range(columns)
    ]
    found = []
    for start in range(0, len(shown), batch_size):
        inputs = question_inputs(processor, shown[start : start + batch_size], question)
        found.append(token_log_likelihoods(model, inputs, answer_ids).sum(dim=-1).cpu())
    found = torch.cat(found)
    return Occlusion((found[0] - found[1:]).unflatten(0, (rows, columns)), grid, float(found[0]))


__all__ = [
    "Occlusion",
    "WordLikelihood",
    "answer_of",
    "covered",
    "did_it_look",
    "ids_of",
    "occlusion",
    "token_log_likelihoods",
    "words_of",
]
