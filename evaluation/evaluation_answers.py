"""Answers about samples: generated, ranked or classified; with demonstrations, without pictures or with wrong ones."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from PIL import Image

from ..few_shot import FewShotAnswerer, answer_with, draw, rank_answers
from ..files import cache_dir
from ..images import ImageError
from ..prompts import ImageCache
from ..retrieval import ImageIndex, encoder_pin
from .evaluation_metrics import LETTERS
from .evaluation_models import Subject, in_chat_form
from .evaluation_samples import Sample
from .evaluation_tasks import Asking, Task, TaskError


DEMONSTRATIONS = ("random", "rices")
RANKED = 5  # choices that a row of predictions names
GREY = (128, 128, 128)
_KEPT_PICTURES = 512  # of demonstrations, which RICES takes again and again


def open_picture(sample: Sample) -> Image.Image:
    """A sample's picture.

    Raises:
        ValueError: It is missing or broken; the error names the sample.
    """
    try:
        return sample.open()
    except ImageError as error:
        raise ValueError(f"{sample.id}: {error}") from error


# ---------------------------------------------------------------------- demonstrations


@dataclass
class Shown:
    """Demonstrations.

    Args:
        pool: Samples to take them from.
        shots: How many there are per query.
        how: One of `DEMONSTRATIONS`.
        seed: Of the draw.
        text_only: Show them without their pictures.
        shared: Those that all queries are shown, where they are drawn at random.
        index: Of the pool's pictures, for RICES.
    """

    pool: Sequence[Sample] = ()
    shots: int = 0
    how: str = "random"
    seed: int = 0
    text_only: bool = False
    shared: list[Sample] = field(default_factory=list)
    index: ImageIndex | None = None

    def __post_init__(self):
        if self.how not in DEMONSTRATIONS:
            raise TaskError(f"demonstrations are {self.how!r}; expected one of {', '.join(DEMONSTRATIONS)}.")
        if self.shots < 0:
            raise TaskError(f"shots is {self.shots}; expected 0 or more.")
        if self.shots > len(self.pool):
            raise TaskError(f"shots is {self.shots}, but there are only {len(self.pool)} samples to show.")
        if self.shots:
            self.shared = [self.pool[number] for number in draw(len(self.pool), self.shots, self.seed)]

    @property
    def retrieves(self) -> bool:
        """Whether demonstrations are chosen by the query's picture."""
        return self.shots > 0 and self.how == "rices"

    def prepare(self, subject: Subject) -> None:
        """Make the index of the pool's pictures by the model's own frozen encoder, or read it from vlbridge's cache."""
        if not self.retrieves or self.index is not None:
            return
        keys = [sample.image_key for sample in self.pool]
        about = json.dumps([encoder_pin(subject.model, subject.processor), keys])
        path = cache_dir() / "rices" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.safetensors"
        self.index = ImageIndex.build(subject.model, subject.processor, keys, path, ids=keys)

    def describe(self) -> dict | None:
        """What results say about them."""
        if not self.shots:
            return None
        ids = [sample.id for sample in self.shared] if self.how == "random" else None
        return {
            "how": self.how,
            "text_only": self.text_only,
            "pool": len(self.pool),
            "seed": self.seed,
            "ids": ids,
        }


# ---------------------------------------------------------------------- answers


class Answerer:
    """Answers about batches of samples.

    Args:
        subject: The model.
        task: What is asked.
        asking: How it is asked.
        shown: Demonstrations.
        blind: Ask without pictures, in demonstrations too.
        grey: Show a grey picture instead of every picture, in demonstrations too.
        pictures: Whose picture each sample is shown with, by number; by default its own.
        first: The first of all samples. What demonstrations share is found with it, in all processes and after a
            restart alike, so that answers don't depend on either.
    """

    def __init__(
        self,
        subject: Subject,
        task: Task,
        asking: Asking,
        shown: Shown,
        blind: bool = False,
        grey: bool = False,
        pictures: Sequence[Sample] | None = None,
        first: Sample | None = None,
    ):
        self.subject, self.task, self.asking = subject, task, asking
        self.shown, self.blind, self.grey, self.pictures, self.first = shown, blind, grey, pictures, first
        self.processor = in_chat_form(subject.processor) if asking.form == "chat" else subject.processor
        self.ranks = asking.method == "rank" and not subject.is_classifier
        # what a picture is like must not be told by its neighbours
        self.retrieves = shown.retrieves and not (blind or grey)
        self._engine: FewShotAnswerer | None = None
        self._images: ImageCache | None = None
        self._picture_of = lru_cache(_KEPT_PICTURES)(lambda number: open_picture(shown.pool[number]))

    def __call__(self, samples: Sequence[Sample], numbers: Sequence[int]) -> list[dict]:
        """Rows of predictions for a batch."""
        shown = samples if self.pictures is None else [self.pictures[number] for number in numbers]
        images = [self._look_at(sample) for sample in shown]
        if self.subject.is_classifier:
            return self._classes(samples, images)
        queries = [self._turn(sample, image) for sample, image in zip(samples, images)]
        rows = self._ranked(samples, queries, images) if self.ranks else self._generated(queries, images)
        return [{**row, **_about(sample)} for row, sample in zip(rows, samples)]

    def _look_at(self, sample: Sample) -> Image.Image | None:
        """What a sample's picture is shown as."""
        if self.blind:
            return None
        picture = open_picture(sample)
        return Image.new("RGB", picture.size, GREY) if self.grey else picture

    def _turn(self, sample: Sample, image, said: str | None = None) -> dict:
        turn = {} if image is None else {"image": image}
        question = self.asking.question_of(sample)
        if question is not None:
            turn["question"] = question
        if said is not None:
            turn["caption" if question is None else "answer"] = said
        return turn

    def _shared(self) -> list[dict]:
        """Demonstrations that all queries share."""
        text_only = self.shown.text_only
        return [
            self._turn(sample, None if text_only else self._look_at(sample), sample.said)
            for sample in self.shown.shared
        ]

    def _nearest(self, images: Sequence) -> list[list[dict]]:
        """Per query the demonstrations whose pictures are most like its own, the most alike last.

        Source: `open_flamingo/eval/rices.py`.
        """
        self.shown.prepare(self.subject)
        pool, index, text_only = self.shown.pool, self.shown.index, self.shown.text_only

        def turn(number: int) -> dict:
            return self._turn(pool[number], None if text_only else self._picture_of(number), pool[number].said)

        return [
            [turn(number) for number in reversed(nearest)] for nearest in index.nearest(list(images), self.shown.shots)
        ]

    # ------------------------------------------------------------------ generating

    def _generated(self, queries: list[dict], images: Sequence) -> list[dict]:
        if self.retrieves:
            texts = answer_with(
                self.subject.model, self.processor, self._nearest(images), queries, batch_size=len(queries),
                image_cache=self._image_cache(), **self.asking.generation,
            )  # fmt: skip
        else:  # without demonstrations too: all questions about a picture share its features
            texts = self._shared_engine().answer(queries, batch_size=len(queries))
        return [{"prediction": self.asking.cut(text)} for text in texts]

    def _shared_engine(self) -> FewShotAnswerer:
        if self._engine is None:
            self._engine = FewShotAnswerer(
                self.subject.model, self.processor, self._shared(), image_cache=self._image_cache(),
                **self.asking.generation,
            )  # fmt: skip
            if self.first is not None:
                query = self._turn(self.first, self._look_at(self.first))
                if self.ranks:
                    self._engine.rank([query], [list(self.first.choices or ())])
                else:
                    self._engine.answer([query])
        return self._engine

    def _image_cache(self) -> ImageCache:
        if self._images is None:
            # one by one: else a picture's features would depend, in their last digits, on which ones came with it, and
            # so on where a run was interrupted and on the number of processes
            self._images = ImageCache(self.subject.model, self.processor, batch_size=1)
        return self._images

    # ------------------------------------------------------------------ ranking and classifying

    def _ranked(self, samples: Sequence[Sample], queries: list[dict], images: Sequence) -> list[dict]:
        choices = []
        for sample in samples:
            if not sample.choices:
                raise ValueError(f"{sample.id} has no choices to rank.")
            choices.append(list(sample.choices))
        if self.retrieves:
            scores = rank_answers(
                self.subject.model, self.processor, self._nearest(images), queries, choices,
                image_cache=self._image_cache(),
            )  # fmt: skip
        else:
            scores = self._shared_engine().rank(queries, choices)
        return [self._row_of(choices_of, values) for choices_of, values in zip(choices, scores)]

    def _row_of(self, choices: Sequence[str], scores: Sequence[float]) -> dict:
        order = sorted(range(len(choices)), key=lambda number: -scores[number])
        names = LETTERS if self.task.kind == "choice" else choices
        ranked = [names[number] for number in order[:RANKED]]
        return {
            "prediction": ranked[0],
            "ranked": ranked,
            "scores": [round(float(scores[number]), 6) for number in order[:RANKED]],
        }

    @torch.no_grad()
    def _classes(self, samples: Sequence[Sample], images: Sequence) -> list[dict]:
        model, processor = self.subject.model, self.subject.processor
        names = [str(model.config.id2label[number]).replace("_", " ") for number in range(model.config.num_labels)]
        unknown = sorted(set(samples[0].choices or ()) - set(names))
        if unknown:
            raise ValueError(
                f"the data have the class {unknown[0]!r}, which the model does not know; it has {', '.join(names[:20])}"
            )
        inputs = processor(images=list(images), return_tensors="pt")
        logits = model(pixel_values=inputs["pixel_values"].to(model.device, model.dtype)).logits.float().cpu()
        rows = [self._row_of(names, values) for values in logits.log_softmax(dim=-1).tolist()]
        return [{**row, **_about(sample)} for row, sample in zip(rows, samples)]


def _about(sample: Sample) -> dict:
    """What a row says about its sample."""
    about: dict = {"references": list(sample.references)}
    if sample.question is not None:
        about["question"] = sample.question
    if sample.kind is not None:
        about["kind"] = sample.kind
    return about


# ---------------------------------------------------------------------- baselines


def described(name: str, shown: Shown) -> str:
    """What a model is given for a baseline, as a sentence.

    Args:
        name: `"blind"`, `"grey"` or `"shuffled"`.
        shown: Demonstrations.
    """
    if name == "shuffled":
        return "Every picture is replaced by another one of the same data."
    too = ", in demonstrations too" if shown.shots else ""
    if shown.retrieves:
        too += ", which are drawn at random here: the nearest ones would tell what is in the picture"
    return (
        f"{'The same prompts without pictures' if name == 'blind' else 'A grey picture instead of every picture'}{too}."
    )


def shuffled_pictures(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """For each sample one whose picture it is shown with: all questions about a picture get the same other one.

    Args:
        samples: The samples.
        seed: Of the shuffle.

    Raises:
        TaskError: There is only one picture.
    """
    by_picture = {sample.image_key: sample for sample in samples}
    if len(by_picture) < 2:
        raise TaskError("shuffled pictures need at least two pictures.")
    keys = sorted(by_picture)
    random.Random(seed).shuffle(keys)
    following = {key: by_picture[other] for key, other in zip(keys, [*keys[1:], keys[0]])}
    return [following[sample.image_key] for sample in samples]


__all__ = [
    "DEMONSTRATIONS",
    "Answerer",
    "Shown",
    "described",
    "open_picture",
    "shuffled_pictures",
]
