"""Conversion tables: what every tensor of an official checkpoint becomes, as data that is read in both directions.

A table is a list of rules. `{}` in a rule's names stands for a number, the same one in all of its names. Names match in full
or not at all; a key that no rule matches, or two, is an error, and so are a target that nothing gives and one that two
keys give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rename:
    """One tensor under another name."""

    source: str
    target: str


@dataclass(frozen=True)
class Split:
    """One tensor cut into equal parts along its first dimension."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Fuse:
    """Tensors put together along their first dimension: `Split`, the other way round."""

    sources: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class Drop:
    """A tensor that is not taken over, and why."""

    source: str
    why: str


@dataclass(frozen=True)
class Twin:
    """A second copy of a target's tensor: it is compared with the first instead of being taken over."""

    source: str
    of: str


@dataclass(frozen=True)
class Again:
    """`Twin`, the other way round: a source's tensor once more, under another name."""

    source: str
    target: str


@dataclass(frozen=True)
class Missing:
    """A target that this layout has no tensor for, and why; `value` is what it is filled with. `Drop`, the other way round."""

    target: str
    why: str
    value: float = 0.0


@dataclass(frozen=True)
class ZeroKeyBias:
    """Biases of query and value as one bias of query, key and value: the key's is zero (EVA and BEiT have none)."""

    sources: tuple[str, str]
    target: str


@dataclass(frozen=True)
class SplitZeroKeyBias:
    """`ZeroKeyBias`, the other way round: the key's bias must be zero."""

    source: str
    targets: tuple[str, str]


@dataclass(frozen=True)
class Reshape:
    """One tensor under another name and in another shape: a scalar here is a vector of one there."""

    source: str
    target: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]


Rule = Rename | Split | Fuse | Drop | Twin | Again | Missing | ZeroKeyBias | SplitZeroKeyBias | Reshape
Shapes = Mapping[str, tuple[int, ...]]


class ConversionError(ValueError):
    """A checkpoint that does not fit its conversion table."""


@dataclass(frozen=True)
class Piece:
    """Where one target tensor comes from.

    Args:
        sources: Keys whose tensors are put together.
        part: Which of `parts` equal parts of the source it is.
        parts: 1 where the whole source is taken.
        zero_part: Of several sources: where zeros are put between them. Of several parts: which must be zero.
        reshaped: The source's shape and the one that it is given, where they differ.
    """

    sources: tuple[str, ...]
    part: int = 0
    parts: int = 1
    zero_part: int | None = None
    reshaped: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def whole(self) -> bool:
        """Is it one source, with nothing but its name (and shape) changed?"""
        return len(self.sources) == self.parts == 1

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape of the target.

        Raises:
            ConversionError: The source can't be cut into that many parts, or has not the shape to begin with.
        """
        shape = tuple(shapes[self.sources[0]])
        if self.reshaped is not None:
            before, after = self.reshaped
            if shape != before:
                raise ConversionError(f"{self.sources[0]} is {list(shape)}, expected {list(before)}.")
            return after
        if not shape:
            return shape
        rows = sum(shapes[source][0] for source in self.sources)
        if self.zero_part is not None and len(self.sources) > 1:
            rows += shape[0]
        if rows % self.parts:
            raise ConversionError(f"{self.sources[0]} has {rows} rows, which can't be cut into {self.parts} parts.")
        return (rows // self.parts, *shape[1:])

    def load(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The target tensor; `read(key)` gives a source tensor.

        Raises:
            ConversionError: A part that must be zero is not.
        """
        if len(self.sources) > 1:
            tensors = [read(source) for source in self.sources]
            if self.zero_part is not None:
                tensors.insert(self.zero_part, torch.zeros_like(tensors[0]))
            return torch.cat(tensors)
        tensor = read(self.sources[0])
        if self.reshaped is not None:
            return tensor.reshape(self.reshaped[1])
        if self.zero_part is not None and tensor.chunk(self.parts)[self.zero_part].any():
            raise ConversionError(f"{self.sources[0]} has a bias for keys that is not zero; this layout has none.")
        return tensor if self.parts == 1 else tensor.chunk(self.parts)[self.part].clone()


def _sources(rule: Rule) -> tuple[str, ...]:
    if isinstance(rule, Missing):
        return ()
    return rule.sources if isinstance(rule, (Fuse, ZeroKeyBias)) else (rule.source,)


def _pattern(name: str) -> re.Pattern:
    """`a.{}.b` as an expression that matches `a.7.b`."""
    return re.compile(r"(\d+)".join(re.escape(part) for part in name.split("{}")))


def _fill(name: str, numbers: Iterable[str]) -> str:
    return name.format(*numbers)


def invert(table: Iterable[Rule]) -> list[Rule]:
    """The table for the way back: second copies are made again, what this layout does not have is dropped; what was dropped
    stays away."""
    back: list[Rule] = []
    for rule in table:
        if isinstance(rule, Rename):
            back.append(Rename(rule.target, rule.source))
        elif isinstance(rule, Split):
            back.append(Fuse(rule.targets, rule.source))
        elif isinstance(rule, Fuse):
            back.append(Split(rule.target, rule.sources))
        elif isinstance(rule, ZeroKeyBias):
            back.append(SplitZeroKeyBias(rule.target, rule.sources))
        elif isinstance(rule, SplitZeroKeyBias):
            back.append(ZeroKeyBias(rule.targets, rule.source))
        elif isinstance(rule, Reshape):
            back.append(Reshape(rule.target, rule.source, rule.target_shape, rule.source_shape))
        elif isinstance(rule, Twin):
            back.append(Again(rule.of, rule.source))
        elif isinstance(rule, Missing):
            back.append(Drop(rule.target, rule.why))
    return back


def dropped(table: Iterable[Rule], keys: Iterable[str]) -> dict[str, str]:
    """Which of the keys are not taken over, and why."""
    drops = [(_pattern(rule.source), rule.why) for rule in table if isinstance(rule, Drop)]
    return {key: why for key in keys for pattern, why in drops if pattern.fullmatch(key)}


def twins(table: Iterable[Rule], keys: Iterable[str]) -> dict[str, str]:
    """Which of the keys are second copies, and of which targets."""
    known = {rule.source: rule.of for rule in table if isinstance(rule, Twin)}
    return {key: known[key] for key in keys if key in known}


def _shown(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def plan(table: Iterable[Rule], keys: Iterable[str]) -> dict[str, Piece]:
    """Find where every target comes from.

    Args:
        table: The rules.
        keys: The checkpoint's keys.

    Returns:
        From target names to their pieces.

    Raises:
        ConversionError: A key is matched by no rule or by two, a target is given twice, or a part of a `Fuse` is missing.
    """
    keys, table = list(keys), list(table)
    again = [rule for rule in table if isinstance(rule, Again)]
    rules = [
        (rule, index, _pattern(source))
        for rule in table
        if not isinstance(rule, Again)
        for index, source in enumerate(_sources(rule))
    ]
    # names without slots, which are nearly all where tables are written out, are looked up instead of tried
    exact: dict[str, list] = {}
    for rule, index, pattern in rules:
        if "{}" not in _sources(rule)[index]:
            exact.setdefault(_sources(rule)[index], []).append((rule, index, pattern))
    slotted = [entry for entry in rules if "{}" in _sources(entry[0])[entry[1]]]
    pieces: dict[str, Piece] = {}
    partial: dict[str, dict[int, str]] = {}
    unmapped = []
    for key in keys:
        found = [(rule, index, ()) for rule, index, _ in exact.get(key, [])]
        found += [
            (rule, index, match.groups()) for rule, index, pattern in slotted if (match := pattern.fullmatch(key))
        ]
        if not found:
            unmapped.append(key)
            continue
        if len(found) > 1:
            raise ConversionError(f"{key} is matched by {len(found)} rules: {found[0][0]} and {found[1][0]}.")
        rule, index, numbers = found[0]
        if isinstance(rule, (Drop, Twin)):
            continue
        if isinstance(rule, (Fuse, ZeroKeyBias)):
            parts = partial.setdefault(_fill(rule.target, numbers), {})
            parts[index] = key
            if len(parts) == len(rule.sources):
                zero_part = 1 if isinstance(rule, ZeroKeyBias) else None
                together = tuple(parts[number] for number in sorted(parts))
                given = {_fill(rule.target, numbers): Piece(together, zero_part=zero_part)}
            else:
                continue
        elif isinstance(rule, Split):
            given = {
                _fill(target, numbers): Piece((key,), part, len(rule.targets))
                for part, target in enumerate(rule.targets)
            }
        elif isinstance(rule, SplitZeroKeyBias):
            given = {
                _fill(target, numbers): Piece((key,), part, 3, zero_part=1)
                for target, part in zip(rule.targets, (0, 2))
            }
        elif isinstance(rule, Reshape):
            given = {_fill(rule.target, numbers): Piece((key,), reshaped=(rule.source_shape, rule.target_shape))}
        else:
            given = {_fill(rule.target, numbers): Piece((key,))}
        for target, piece in given.items():
            if target in pieces:
                raise ConversionError(f"{target} is given twice: by {pieces[target].sources[0]} and by {key}.")
            pieces[target] = piece
    if unmapped:
        raise ConversionError(
            f"{len(unmapped)} of {len(keys)} keys are in no conversion table: {_shown(unmapped)}. The checkpoint is not of "
            "this kind, or was written by code that this table does not know."
        )
    if incomplete := partial.keys() - pieces.keys():
        raise ConversionError(f"Parts are missing of {_shown(incomplete)}.")
    present = set(keys)
    pieces.update((rule.target, Piece((rule.source,))) for rule in again if rule.source in present)
    return pieces


def check(pieces: Mapping[str, tuple[int, ...]], expected: Shapes, what: str) -> None:
    """Compare what is given with what a model has.

    Args:
        pieces: Shapes of what is given, by target name.
        expected: Shapes of the model's tensors.
        what: Names the checkpoint in the error.

    Raises:
        ConversionError: Something is missing or left over, or has another shape.
    """
    problems = []
    if missing := expected.keys() - pieces.keys():
        problems.append(f"{len(missing)} tensors are missing: {_shown(missing)}")
    if left_over := pieces.keys() - expected.keys():
        problems.append(f"{len(left_over)} tensors have no place in the model: {_shown(left_over)}")
    wrong = [
        f"{name} is {list(pieces[name])}, expected {list(expected[name])}"
        for name in sorted(pieces.keys() & expected.keys())
        if tuple(pieces[name]) != tuple(expected[name])
    ]
    if wrong:
        problems.append(f"{len(wrong)} tensors have another shape: {'; '.join(wrong[:5])}")
    if problems:
        raise ConversionError(f"{what}: {'. '.join(problems)}.")


__all__ = [
    "Again",
    "ConversionError",
    "Drop",
    "Fuse",
    "Missing",
    "Piece",
    "Rename",
    "Reshape",
    "Split",
    "SplitZeroKeyBias",
    "Twin",
    "ZeroKeyBias",
    "check",
    "dropped",
    "invert",
    "plan",
    "twins",
]
