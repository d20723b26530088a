"""What is in a data set, and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from tqdm import tqdm

from ..compat import take
from ..files import sha256_of
from ..images import ImageError
from .training_data_report import DataReport, Finding, histogram, summary
from .training_data_sheet import Cell, contact_sheet
from .training_data_texts import answer_in_question, shortened, suspicious_encoding, turns_of
from .training_records import STRUCTURE, items_of, kind_of, open_image, structure_problem


SMALL = 32  # pixels of the shorter side
LONG = 10  # ratio of the sides


# ---------------------------------------------------------------------- tokens


class TokenCounter:
    """Counts the tokens of records as a model sees them, images included.

    Args:
        processor: The bridged model's processor.
    """

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, processor.tokenizer

    def text_of(self, record: dict) -> str:
        """The record as one text, with one image token per image."""
        if kind_of(record) == "messages":
            return self.processor.apply_chat_template(record["messages"], tokenize=False)
        return "".join(
            self.processor.image_token if item["type"] == "image" else item["text"] for item in items_of(record)
        )

    def text_tokens(self, texts: list[str], whole: bool = True) -> list[int]:
        """Number of tokens of texts, without those of image tokens.

        Args:
            texts: Texts of `text_of`, or parts of them.
            whole: They are complete inputs, in which a begin of sequence is counted, once.

        Returns:
            One number per text.
        """
        counts, begin = [], self.tokenizer.bos_token
        for special in (True, False):
            chosen = [
                number
                for number, text in enumerate(texts)
                if special == (whole and not (begin and text.startswith(begin)))
            ]
            if chosen:
                found = self.tokenizer([texts[number] for number in chosen], add_special_tokens=special)["input_ids"]
                image = self.processor.image_token_id
                counts += [(number, sum(token != image for token in ids)) for number, ids in zip(chosen, found)]
        return [count for _, count in sorted(counts)]

    def image_tokens(self, sizes: list[tuple[int, int]]) -> int:
        """Number of tokens that images take in the prompt.

        Args:
            sizes: Width and height of each, in pixels.
        """
        if not sizes:
            return 0
        heights_first = [(height, width) for width, height in sizes]
        return sum(self.processor.num_multimodal_tokens(heights_first)["num_image_tokens"])


# ---------------------------------------------------------------------- images


@dataclass
class _InspectedImage:
    """An image that was opened: the hash of its content and its size in pixels, or what is wrong with it."""

    file: str
    digest: bytes | None = None
    size: tuple[int, int] | None = None
    reason: str | None = None


def _inspect_image(value: dict) -> _InspectedImage:
    path, data = value.get("path"), value.get("bytes")
    name = path or "an image without a name"
    try:
        size = open_image(value).size
        digest = hashlib.sha256(data).digest() if data is not None else bytes.fromhex(sha256_of(path))
    except ImageError as error:
        return _InspectedImage(name, reason=error.reason)
    except OSError as error:  # it was there a moment ago
        return _InspectedImage(name, reason=error.strerror or str(error))
    # names of embedded images tell nothing: in some data sets all are called the same
    return _InspectedImage(name if data is None else f"{name} ({digest[:4].hex()})", digest, size)


def _with_inspected_images(dataset: Iterable[dict]) -> Iterator[tuple[dict, list[_InspectedImage]]]:
    """Records in their order, with what was found in their images; a file is opened once, several at a time."""
    known: dict[str, object] = {}
    workers = min(16, os.cpu_count() or 1)
    waiting: deque = deque()
    with ThreadPoolExecutor(workers) as pool:

        def submit(value):
            path = value.get("path")
            if value.get("bytes") is not None or not path:
                return pool.submit(_inspect_image, value)
            if path not in known:
                known[path] = pool.submit(_inspect_image, value)
            return known[path]

        def finished(record, images):
            outcomes = []
            for value, image in zip(record["images"], images):
                outcome = image if isinstance(image, _InspectedImage) else image.result()
                if value.get("path") in known:
                    known[value["path"]] = outcome  # without the future around it
                outcomes.append(outcome)
            return record, outcomes

        for record in dataset:
            waiting.append((record, [submit(value) for value in record["images"]]))
            if len(waiting) > 4 * workers:
                yield finished(*waiting.popleft())
        while waiting:
            yield finished(*waiting.popleft())


# ---------------------------------------------------------------------- check


def check_data(
    dataset: Dataset | IterableDataset,
    sample: int | None = None,
    seed: int = 0,
    max_broken: float = 0.01,
    processor=None,
    window: int | None = None,
    num_cells: int = 0,
    progress: bool = True,
) -> tuple[DataReport, list[Cell]]:
    """Go through a data set and open all of its images.

    Args:
        dataset: The records, see `training_data`.
        sample: Go through this many records only: drawn at random; of a stream, the first ones.
        seed: Seed of the draw, and of the choice for the contact sheet.
        max_broken: Largest share (below 1) or number of records that may be broken.
        processor: The bridged model's processor, to count tokens.
        window: Number of tokens that the model can take; `None` for no limit.
        num_cells: Number of records for a contact sheet. Broken ones come first and are a third at most.
        progress: Show a bar on stderr.

    Returns:
        The report, and the cells that `contact_sheet` takes.
    """
    if sample is not None and isinstance(dataset, Dataset) and sample < len(dataset):
        dataset = dataset.select(sorted(random.Random(seed).sample(range(len(dataset)), sample)))
    elif sample is not None:
        dataset = take(dataset, sample)
    total = len(dataset) if isinstance(dataset, Dataset) else sample
    check = _RecordCheck(
        DataReport(window=window), None if processor is None else TokenCounter(processor), num_cells, seed
    )
    with tqdm(total=total, desc="checking", unit="record", disable=not progress) as bar:
        for record, images in _with_inspected_images(dataset):
            check.add(record, images)
            bar.update()
    check.finish(max_broken)
    return check.report, check.cells()


class _RecordCheck:
    """Checks records one by one, and fills a report with what it finds."""

    chunk = 512  # texts that are tokenised at a time

    def __init__(self, report: DataReport, counter: TokenCounter | None, num_cells: int, seed: int):
        self.report, self.counter = report, counter
        self.num_cells, self.random = num_cells, random.Random(seed)
        self.shown: list[tuple[int, dict, str | None]] = []
        self.broken_shown: list[tuple[int, dict, str | None]] = []
        self.found: dict[str, Finding] = {}
        self.sizes: dict[str | bytes, tuple[int, int]] = {}
        self.owners: dict[bytes, str] = {}
        self.names: set = set()
        self.kinds: Counter = Counter()
        self.reasons: Counter = Counter()
        self.texts: Counter = Counter()
        self.contents: Counter = Counter()
        self.lengths: list[int] = []
        self.totals: list[int] = []
        self.waiting: list[tuple] = []

    def note(self, name: str, record: dict, detail: str, file: str | None = None) -> None:
        self.found.setdefault(name, Finding()).add(record["id"], detail, file)

    def add(self, record: dict, images: list[_InspectedImage]) -> None:
        report = self.report
        report.records += 1
        report.images += len(images)
        report.text_only += not images
        wrong = structure_problem(record)
        if wrong is not None:
            self.note(wrong[0], record, wrong[1])
        reason = self.add_images(record, images) or (wrong and wrong[1])
        report.broken_records += reason is not None
        self.choose(record, reason)
        if wrong is not None and wrong[0] == "form":
            return
        kind = kind_of(record) or "label"
        self.kinds[kind] += 1
        turns = turns_of(record)
        report.turns += len(turns) if kind == "messages" else 0
        self.add_texts(record, turns, images)
        if self.counter is not None and reason is None and kind != "label":
            sizes = [image.size for image in images]
            try:
                text = self.counter.text_of(record)
            except TemplateError as error:
                report.broken_records += 1
                return self.note("template", record, f"the chat template refuses the conversation: {error}")
            self.waiting.append((record["id"], text, sizes, [answer for _, answer in turns]))
            if len(self.waiting) >= self.chunk:
                self.count_tokens()

    def add_images(self, record: dict, images: list[_InspectedImage]) -> str | None:
        """Check a record's images; gives what is wrong with the first that is broken, or `None`."""
        reason = None
        for image in images:
            if image.reason is not None:
                self.names.add(image.file)
                missing = image.reason == "no such file" or "is an address" in image.reason
                self.note("missing" if missing else "broken", record, image.reason, image.file)
                self.reasons[image.reason] += 1
                reason = reason or image.reason
                continue
            if image.file in self.names:
                continue
            self.names.add(image.file)
            self.sizes[image.file] = image.size
            owner = self.owners.setdefault(image.digest, image.file)
            if owner != image.file:
                self.note("duplicate_images", record, f"same content as {owner}", image.file)
            if min(image.size) < SMALL:
                self.note("small", record, f"{image.size[0]} x {image.size[1]} pixels", image.file)
            if max(image.size) > LONG * min(image.size):
                self.note("long", record, f"{image.size[0]} x {image.size[1]} pixels", image.file)
        return reason

    def add_texts(self, record: dict, turns: list[tuple[str, str]], images: list[_InspectedImage]) -> None:
        texts = [item["text"] for item in items_of(record) if item["type"] == "text" and item["text"]]
        for text in texts:
            if sign := suspicious_encoding(text):
                self.note("encoding", record, sign)
                break
        for question, answer in turns:
            if question and answer_in_question(question, answer):
                self.note("leaks", record, f"{question!r}: {answer!r}")
        if self.counter is None:
            self.lengths += [len(answer.split()) for _, answer in turns]
        if not texts:
            return
        text = hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).digest()
        self.texts[text] += 1
        if self.texts[text] > 1:
            self.note("duplicate_texts", record, repr(shortened(" ".join(texts), 60)))
        content = hashlib.sha256(text + b"".join(image.digest or image.file.encode() for image in images)).digest()
        self.contents[content] += 1
        if self.contents[content] > 1:
            self.note("duplicate_records", record, repr(shortened(" ".join(texts), 60)))

    def choose(self, record: dict, reason: str | None) -> None:
        """Keep a random choice of the records for the contact sheet, all equally likely, and the first broken ones."""
        number, cells = self.report.records, self.num_cells
        if reason is not None and len(self.broken_shown) < cells // 3:
            self.broken_shown.append((number, record, reason))
        elif len(self.shown) < cells:
            self.shown.append((number, record, reason))
        elif cells and (place := self.random.randrange(number)) < cells:
            self.shown[place] = (number, record, reason)

    def count_tokens(self) -> None:
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        answers = list(itertools.chain.from_iterable(row[3] for row in waiting))
        self.lengths += self.counter.text_tokens(answers, whole=False)
        for (record_id, _, sizes, _), text in zip(waiting, self.counter.text_tokens([row[1] for row in waiting])):
            images = self.counter.image_tokens(sizes)
            self.totals.append(text + images)
            window = self.report.window
            if window is not None and text + images > window:
                name = "no_room" if images >= window else "too_long"
                detail = f"{text:,} tokens of text and {images:,} of images, {window:,} fit"
                self.note(name, {"id": record_id}, detail)

    def finish(self, max_broken: float) -> None:
        self.count_tokens()
        report, found = self.report, self.found
        order = (
            "missing",
            "broken",
            *STRUCTURE,
            "template",
            "no_room",
            "too_long",
            "encoding",
            "leaks",
            "small",
            "long",
        )
        order += ("duplicate_records", "duplicate_images", "duplicate_texts")
        report.findings = {name: found[name] for name in order if name in found}
        report.kinds, report.reasons = dict(self.kinds.most_common()), dict(self.reasons.most_common())
        report.distinct_images = len(self.names)
        report.widths = summary([width for width, _ in self.sizes.values()], tail=False)
        report.heights = summary([height for _, height in self.sizes.values()], tail=False)
        report.answer_lengths = summary(self.lengths)
        report.answer_unit = "words" if self.counter is None else "tokens"
        report.tokens = summary(self.totals)
        report.histogram = histogram(self.totals)
        self.judge(max_broken)

    def judge(self, max_broken: float) -> None:
        report, found = self.report, self.found
        if not report.records:
            report.errors.append("there are no records")
            return
        allowed = max_broken if max_broken >= 1 else max_broken * report.records
        if report.broken_records > allowed:
            report.errors.append(
                f"{report.broken_records:,} of {report.records:,} records are broken, max_broken is {max_broken:g}"
            )
        elif report.broken_records:
            report.warnings.append(f"{report.broken_records:,} broken records will be left out")
        meanings = {
            "form": "are of no kind, or of several",
            "placeholders": "have other numbers of images than of places for them",
            "roles": "have no proper turns",
            "empty": "have empty texts",
            "template": "are refused by the chat template",
            "no_room": "have images that alone fill the context window",
        }
        report.errors += [f"{found[name].count:,} records {what}" for name, what in meanings.items() if name in found]
        hints = {
            "too_long": "records are longer than the context window and would be cut",
            "encoding": "records look wrongly decoded",
            "leaks": "answers stand in their question",
            "small": f"images are smaller than {SMALL} pixels",
            "long": f"images are more than {LONG} times as long as wide",
            "duplicate_records": "records are there several times",
            "duplicate_images": "image files have the content of another",
        }
        for name, what in hints.items():
            if name in found:
                share = found[name].count / max(report.turns if name == "leaks" else report.records, 1)
                report.warnings.append(f"{found[name].count:,} {what} ({share:.1%})")

    def cells(self) -> list[Cell]:
        """Broken records first, then the others in their order."""
        room = min(len(self.shown), self.num_cells - len(self.broken_shown))
        shown = sorted(self.random.sample(self.shown, room), key=lambda item: item[0])
        return [Cell.of(record, reason) for _, record, reason in [*self.broken_shown, *shown]]


__all__ = [
    "Cell",
    "DataReport",
    "Finding",
    "TokenCounter",
    "answer_in_question",
    "check_data",
    "contact_sheet",
    "suspicious_encoding",
    "turns_of",
]
