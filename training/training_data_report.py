"""What a check of a data set has found, as numbers and as lines to read."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field


EXAMPLES = 5  # kept of every finding


@dataclass
class Finding:
    """Something that was found in records.

    Args:
        count: How often it was found.
        examples: The first `EXAMPLES` of them: where and what.
    """

    count: int = 0
    examples: list[dict] = field(default_factory=list)

    def add(self, record_id, detail: str, file: str | None = None) -> None:
        """Count one more record or image, and keep it as an example if there are few so far.

        Args:
            record_id: The record's `id`.
            detail: What was found.
            file: The image file that it was found in, if it was in one.
        """
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append({"id": record_id, **({} if file is None else {"file": file}), "detail": detail})


@dataclass
class DataReport:
    """What a check of a data set found.

    Args:
        records: Number of records that were checked.
        kinds: Number of records of each kind.
        text_only: Number of records without an image.
        turns: Number of questions with their answers, in conversations.
        images: How often records name an image.
        distinct_images: Number of different files or embedded images.
        findings: By name: `missing` and `broken` images, the problems of `STRUCTURE`, `encoding`, `leaks` (answers that
            the question says), `small` and `long` images, `duplicate_images` (other files with the same content),
            `duplicate_texts`, `duplicate_records` (same images and texts), `too_long` and `no_room` (more tokens than
            fit).
        broken_records: Number of records that training would leave out.
        reasons: Why images are broken or missing, with numbers.
        widths: Smallest, median and largest width of the images, in pixels.
        heights: Smallest, median and largest height of the images, in pixels.
        answer_lengths: Smallest, median, 95th percentile and largest length of the answers, in `answer_unit`.
        answer_unit: `"words"`, or `"tokens"` with a processor.
        tokens: Smallest, median, 95th percentile and largest number of text and image tokens of a record; empty without
            a processor.
        histogram: Number of records by upper bound of their tokens.
        window: Number of tokens that fit.
        errors: What makes the data set unfit for training, one line each.
        warnings: What should be looked at, one line each.
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
        """Whether the data set is fit for training: there are no `errors`."""
        return not self.errors

    def as_dict(self) -> dict:
        """The report as JSON can hold it."""
        return {**asdict(self), "ok": self.ok}

    def lines(self) -> Iterator[str]:
        """The report as lines to read."""
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


def summary(values: list[int], tail: bool = True) -> list[int]:
    """Smallest, median and largest of some numbers.

    Args:
        values: The numbers.
        tail: Give the 95th percentile too, before the largest.
    """
    if not values:
        return []
    values = sorted(values)
    high = [values[min(len(values) - 1, round(0.95 * (len(values) - 1)))]] if tail else []
    return [values[0], round(statistics.median(values)), *high, values[-1]]


def histogram(values: list[int], bins: int = 10) -> dict[int, int]:
    """Number of values by upper bound, in steps of 1, 2 or 5 times a power of ten.

    Args:
        values: The values.
        bins: About how many steps.
    """
    if not values:
        return {}
    wanted = max(values) / bins
    step = next(step for power in itertools.count() for digit in (1, 2, 5) if (step := digit * 10**power) >= wanted)
    counts = Counter(-(-value // step) * step for value in values)
    return {bound: counts[bound] for bound in range(min(counts), max(counts) + 1, step)}


__all__ = ["DataReport", "Finding", "histogram", "summary"]
