"""What is in a data set, and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

import hashlib
import html
import itertools
import os
import random
import re
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset, IterableDataset
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..compat import take
from ..images import ImageError
from .training_records import STRUCTURE, items_of, kind_of, open_image, structure_problem


EXAMPLES = 5  # of every problem
SMALL, LONG = 32, 10  # pixels of the shorter side; ratio of the sides


# ---------------------------------------------------------------------- texts


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MARKUP = re.compile(
    r"&(?:[a-z]{2,8}|#\d{2,5}|#x[0-9a-f]{2,5});|</?(?:a|b|br|div|i|img|li|p|span|table|td|tr|ul)\b[^<>]*>", re.I
)
_ESCAPED = re.compile(r"\\u[0-9a-fA-F]{4}")
# what the bytes of UTF-8 look like when they are read as Windows-1252: é as Ã©, ' as â€™
_BYTES = "".join(chr(byte) for byte in range(0x80, 0x100)) + bytes(
    byte for byte in range(0x80, 0xA0) if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
).decode("cp1252")
_MISREAD = re.compile(f"[{re.escape(_BYTES)}]{{2,}}")


def suspicious_encoding(text: str) -> str | None:
    """Signs that a text was decoded or cleaned wrongly, in one line; `None` if there are none."""
    if "\ufffd" in text:
        return "replacement characters (U+FFFD): bytes were lost when it was decoded"
    for found in _MISREAD.findall(text):
        try:
            right = b"".join(
                char.encode("latin-1") if ord(char) < 0x100 else char.encode("cp1252") for char in found
            ).decode()
        except UnicodeError:
            continue
        return f"{found!r} seems to be {right!r}, UTF-8 that was read as Windows-1252"
    if found := _CONTROL.search(text):
        return f"control character U+{ord(found[0]):04X}"
    for found in _MARKUP.finditer(text):
        if not found[0].startswith("&") or html.unescape(found[0]) != found[0]:
            return f"markup: {found[0]!r}"
    if found := _ESCAPED.search(text):
        return f"an escape that nobody decoded: {found[0]!r}"
    return None


def _words(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


def answer_in_question(question: str, answer: str) -> bool:
    """Whether the question says the answer, word for word; yes, no and choices ("red or blue?") don't count."""
    asked, said = _words(question), _words(answer)
    return bool(said.strip()) and said.strip() not in ("yes", "no") and " or " not in asked and said in asked


def _text_of(content: list[dict]) -> str:
    return " ".join(item["text"] or "" for item in content if item["type"] == "text").strip()


def turns_of(record: dict) -> list[tuple[str, str]]:
    """Questions and answers of a conversation; a caption or a document is an answer to nothing."""
    if kind_of(record) != "messages":
        text = _text_of(items_of(record))
        return [("", text)] if text else []
    turns, asked = [], ""
    for message in record["messages"]:
        if message["role"] == "user":
            asked = _text_of(message["content"])
        elif message["role"] == "assistant":
            turns.append((asked, _text_of(message["content"])))
    return turns


# ---------------------------------------------------------------------- report


@dataclass
class Finding:
    """Something that was found in records.

    Args:
        count: How often.
        examples: The first of them: where and what.
    """

    count: int = 0
    examples: list[dict] = field(default_factory=list)

    def add(self, record_id, detail: str, file: str | None = None) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append({"id": record_id, **({} if file is None else {"file": file}), "detail": detail})


@dataclass
class DataReport:
    """What a check found.

    Args:
        records: How many were gone through.
        kinds: How many of each kind.
        text_only: Records without an image.
        turns: Questions with their answers, in conversations.
        images: How often records name one.
        distinct_images: Files or embedded images.
        findings: By name: `missing` and `broken` images, the problems of `STRUCTURE`, `encoding`, `leaks` (answers that the
            question says), `small` and `long` images, `duplicate_images` (other files with the same content),
            `duplicate_texts`, `duplicate_records` (same images and texts), `too_long` and `no_room` (more tokens than fit).
        broken_records: Records that training would leave out.
        reasons: Of broken and missing images.
        widths: Smallest, median and largest, in pixels; likewise the heights.
        answer_lengths: Smallest, median, 95th percentile and largest, in `answer_unit`.
        tokens: Likewise, text and image tokens of a record; empty without a processor.
        histogram: Records by upper bound of their tokens.
        window: Tokens that fit.
        errors: What makes the data set unfit, one line each; `warnings` should be looked at.
    """

    records: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    text_only: int = 0
    turns: int = 0
    images: int = 0
    distinct_images: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    broken_records: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    answer_lengths: list[int] = field(default_factory=list)
    answer_unit: str = "words"
    tokens: list[int] = field(default_factory=list)
    histogram: dict[int, int] = field(default_factory=dict)
    window: int | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors

    def as_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}

    def lines(self) -> Iterator[str]:
        """For people."""
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in self.kinds.items())
        yield f"records: {self.records:,} ({kinds}), {self.text_only:,} without an image; {self.turns:,} turns"
        yield f"images: {self.images:,}, of which {self.distinct_images:,} distinct" + (
            f"; width {_range(self.widths)}, height {_range(self.heights)} pixels" if self.widths else ""
        )
        if self.answer_lengths:
            yield f"answers: {_range(self.answer_lengths)} {self.answer_unit}"
        if self.tokens:
            window = "no limit" if self.window is None else f"{self.window:,} fit"
            yield f"tokens of a record, images included: {_range(self.tokens)}; {window}"
            widest = max(self.histogram.values())
            for bound, number in self.histogram.items():
                yield f"  up to {bound:>7,}  {number:>9,}  {'#' * round(40 * number / widest)}"
        for name, finding in self.findings.items():
            yield f"{name.replace('_', ' ')}: {finding.count:,}"
            for example in finding.examples:
                yield f"  {example.get('file') or example['id']}: {example['detail']}"
        yield from (f"warning: {warning}" for warning in self.warnings)
        yield from (f"error: {error}" for error in self.errors)
        yield "fit for training" if self.ok else "not fit for training"


def _range(values: list[int]) -> str:
    tail = f", 95 % up to {values[2]:,}" if len(values) == 4 else ""
    return f"{values[0]:,} to {values[-1]:,} (median {values[1]:,}{tail})"


def _summary(values: list[int], tail: bool = True) -> list[int]:
    if not values:
        return []
    values = sorted(values)
    high = [values[min(len(values) - 1, round(0.95 * (len(values) - 1)))]] if tail else []
    return [values[0], round(statistics.median(values)), *high, values[-1]]


# ---------------------------------------------------------------------- tokens


class TokenCounter:
    """Tokens of records as a model sees them, images included.

    Args:
        processor: Of a bridged model.
    """

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, processor.tokenizer

    def text_of(self, record: dict) -> str:
        """The record as one text, with an image token per image."""
        if kind_of(record) == "messages":
            return self.processor.apply_chat_template(record["messages"], tokenize=False)
        return "".join(
            self.processor.image_token if item["type"] == "image" else item["text"] for item in items_of(record)
        )

    def text_tokens(self, texts: list[str], whole: bool = True) -> list[int]:
        """Tokens of texts, without those of image tokens.

        Args:
            texts: From `text_of`, or parts of them.
            whole: They are whole inputs: a begin of sequence is counted, once.
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
        """Places that images take in the prompt.

        Args:
            sizes: Width and height of each, in pixels.
        """
        if not sizes:
            return 0
        heights_first = [(height, width) for width, height in sizes]
        return sum(self.processor.num_multimodal_tokens(heights_first)["num_image_tokens"])


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
    """Go through a data set, all images opened.

    Args:
        dataset: Of records, see `training_data`.
        sample: Go through this many records only: drawn at random, of a stream the first ones.
        seed: Of the draw, and of what the contact sheet shows.
        max_broken: Largest share (below 1) or number of records that may be broken.
        processor: Of the bridged model, to count tokens.
        window: Tokens that it can take; `None`: no limit.
        num_cells: Records for a contact sheet; the broken ones among them come first and are a third at most.
        progress: Show a bar on stderr.

    Returns:
        The report, and what `contact_sheet` takes.
    """
    if sample is not None and isinstance(dataset, Dataset) and sample < len(dataset):
        dataset = dataset.select(sorted(random.Random(seed).sample(range(len(dataset)), sample)))
    elif sample is not None:
        dataset = take(dataset, sample)
    total = len(dataset) if isinstance(dataset, Dataset) else sample
    check = _Check(DataReport(window=window), None if processor is None else TokenCounter(processor), num_cells, seed)
    with tqdm(total=total, desc="checking", unit="record", disable=not progress) as bar:
        for record, images in _with_images(dataset):
            check.add(record, images)
            bar.update()
    check.finish(max_broken)
    return check.report, check.cells()


@dataclass
class _Inspected:
    """An image that was opened: what its content hashes to and its size in pixels, or what is wrong."""

    file: str
    digest: bytes | None = None
    size: tuple[int, int] | None = None
    reason: str | None = None


def _inspect(value: dict) -> _Inspected:
    path, data = value.get("path"), value.get("bytes")
    name = path or "an image without a name"
    try:
        size = open_image(value).size
        content = Path(path).read_bytes() if data is None else data
    except ImageError as error:
        return _Inspected(name, reason=error.reason)
    digest = hashlib.sha256(content).digest()
    # names of embedded images tell nothing: in some data sets all are called the same
    return _Inspected(name if data is None else f"{name} ({digest[:4].hex()})", digest, size)


def _with_images(dataset: Iterable[dict]) -> Iterator[tuple[dict, list[_Inspected]]]:
    """Records in their order, with what became of their images; a file is opened once, several at a time."""
    known: dict[str, object] = {}
    workers = min(16, os.cpu_count() or 1)
    waiting: deque = deque()
    with ThreadPoolExecutor(workers) as pool:

        def submit(value):
            path = value.get("path")
            if value.get("bytes") is not None or not path:
                return pool.submit(_inspect, value)
            if path not in known:
                known[path] = pool.submit(_inspect, value)
            return known[path]

        def finished(record, images):
            outcomes = []
            for value, image in zip(record["images"], images):
                outcome = image if isinstance(image, _Inspected) else image.result()
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


class _Check:
    """Goes through records, one after the other."""

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

    def add(self, record: dict, images: list[_Inspected]) -> None:
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
            self.waiting.append((record["id"], self.counter.text_of(record), sizes, [answer for _, answer in turns]))
            if len(self.waiting) >= self.chunk:
                self.count_tokens()

    def add_images(self, record: dict, images: list[_Inspected]) -> str | None:
        """Take in a record's images; what is wrong with the first that is broken."""
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

    def add_texts(self, record: dict, turns: list[tuple[str, str]], images: list[_Inspected]) -> None:
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
            self.note("duplicate_texts", record, repr(_shortened(" ".join(texts), 60)))
        content = hashlib.sha256(text + b"".join(image.digest or image.file.encode() for image in images)).digest()
        self.contents[content] += 1
        if self.contents[content] > 1:
            self.note("duplicate_records", record, repr(_shortened(" ".join(texts), 60)))

    def choose(self, record: dict, reason: str | None) -> None:
        """Keep a fair draw of the records for the contact sheet, and the first broken ones."""
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
        order = ("missing", "broken", *STRUCTURE, "no_room", "too_long", "encoding", "leaks", "small", "long")
        order += ("duplicate_records", "duplicate_images", "duplicate_texts")
        report.findings = {name: found[name] for name in order if name in found}
        report.kinds, report.reasons = dict(self.kinds.most_common()), dict(self.reasons.most_common())
        report.distinct_images = len(self.names)
        report.widths = _summary([width for width, _ in self.sizes.values()], tail=False)
        report.heights = _summary([height for _, height in self.sizes.values()], tail=False)
        report.answer_lengths = _summary(self.lengths)
        report.answer_unit = "words" if self.counter is None else "tokens"
        report.tokens = _summary(self.totals)
        report.histogram = _histogram(self.totals)
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


def _histogram(values: list[int], bins: int = 10) -> dict[int, int]:
    """Values by upper bound, in steps of 1, 2 or 5 times a power of ten."""
    if not values:
        return {}
    wanted = max(values) / bins
    step = next(step for power in itertools.count() for digit in (1, 2, 5) if (step := digit * 10**power) >= wanted)
    counts = Counter(-(-value // step) * step for value in values)
    return {bound: counts[bound] for bound in range(min(counts), max(counts) + 1, step)}


def _shortened(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


# ---------------------------------------------------------------------- contact sheet


@dataclass
class Cell:
    """A record on a contact sheet.

    Args:
        images: Its first images, small; `None` where one can't be opened.
        more: How many further ones it has.
        text: What it says.
        problem: What is wrong with it.
    """

    images: list[Image.Image | None]
    more: int
    text: str
    problem: str | None = None

    @classmethod
    def of(cls, record: dict, problem: str | None, side: int = 256, most: int = 4) -> Cell:
        images = []
        for value in record["images"][:most]:
            try:
                image = open_image(value)
                image.thumbnail((side, side))
                images.append(image)
            except ImageError:
                images.append(None)
        try:
            text = _cell_text(record)
        except ValueError:  # of no kind; the problem says so
            text = ""
        return cls(images, max(0, len(record["images"]) - most), f"{record['id']}  {text}", problem)


def _cell_text(record: dict) -> str:
    kind = kind_of(record)
    if kind == "messages":
        names = {"user": "Q", "assistant": "A", "system": "S"}
        return "\n".join(
            f"{names.get(message['role'], message['role'])}: {_with_places(message['content'])}"
            for message in record["messages"]
        )
    if kind is None:
        return f"label {record['label']}"
    return record["caption"] or "" if kind == "caption" else _with_places(record["document"])


def _with_places(content: list[dict]) -> str:
    return " ".join("[image]" if item["type"] == "image" else item["text"] or "" for item in content)


def contact_sheet(cells: list[Cell], columns: int = 4, width: int = 260, text_lines: int = 6) -> Image.Image:
    """Pictures with their texts beneath; broken records are marked in red.

    Args:
        cells: From `check_data`.
        columns: Cells in a row.
        width: Of a cell, in pixels.
        text_lines: Lines of text per cell.

    Raises:
        ValueError: There is nothing to show.
    """
    if not cells:
        raise ValueError("there are no records to show.")
    font = _font(13)
    line, border = 17, 8
    height = width + line * (text_lines + 1)
    rows = -(-len(cells) // columns)
    sheet = Image.new(
        "RGB", (min(columns, len(cells)) * (width + border) + border, rows * (height + border) + border), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        left = border + number % columns * (width + border)
        top = border + number // columns * (height + border)
        _draw_images(sheet, draw, cell, left, top, width)
        if cell.problem is not None:
            draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), outline="red", width=3)
        lines = [("red", text) for text in _wrapped(cell.problem or "", font, width, 2)]
        lines += [("black", text) for text in _wrapped(cell.text, font, width, text_lines + 1 - len(lines))]
        for index, (color, text) in enumerate(lines):
            draw.text((left, top + width + 2 + line * index), text, fill=color, font=font)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    """A font of this machine with many characters, else Pillow's own, which knows little beyond ASCII."""
    for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _draw_images(sheet, draw, cell: Cell, left: int, top: int, width: int) -> None:
    across = 1 if len(cell.images) <= 1 else 2
    side = width // across
    for number, image in enumerate(cell.images):
        x, y = left + number % across * side, top + number // across * side
        if image is None:
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill="mistyrose")
            draw.line((x, y, x + side - 1, y + side - 1), fill="red", width=3)
            draw.line((x, y + side - 1, x + side - 1, y), fill="red", width=3)
        else:
            image = image.copy()
            image.thumbnail((side - 2, side - 2))
            sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
    if not cell.images:
        draw.rectangle((left, top, left + width - 1, top + width - 1), fill="whitesmoke")
        draw.text((left + width // 2, top + width // 2), "no image", fill="gray", anchor="mm")
    if cell.more:
        draw.text((left + width - 4, top + width - 4), f"+ {cell.more}", fill="red", anchor="rs")


def _wrapped(text: str, font, width: int, most: int) -> list[str]:
    """Lines that fit; the last ends in dots where there is more."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        current = ""
        for word in paragraph.split():
            while font.getlength(word) > width:  # longer than a line: cut
                cut = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                lines += [current] if current else []
                lines.append(word[:cut])
                current, word = "", word[cut:]
            longer = f"{current} {word}".strip()
            if font.getlength(longer) <= width:
                current = longer
            else:
                lines.append(current)
                current = word
            if len(lines) > most:
                break
        lines += [current] if current else []
        if len(lines) > most:
            break
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1][:-3]}..."] if most > 0 else []
    return lines


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
