"""Conversion tables: what every tensor of an official checkpoint becomes, as data that is read in both directions.

A table is a list of rules. `{}` in a rule's names stands for a number, the same one in all of its names. Names match in
full or not at all. Each key must match exactly one rule, and each target must come from exactly one: anything else is
an error. A rule knows its inverse, and which tensors of the target it gives.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


BUFFER = "a buffer that the model computes by itself"
Shapes = Mapping[str, tuple[int, ...]]


class ConversionError(ValueError):
    """A checkpoint that does not fit its conversion table."""


@dataclass(frozen=True)
class Piece:
    """Where one target tensor comes from.

    Args:
        sources: Keys of the tensors that are concatenated.
        part: Which of `parts` equal parts of the source it is.
        parts: The number of parts; 1 takes the whole source.
        zero_part: With several sources, the position where zeros are inserted; with several parts, the one that must be
            zero.
        reshaped: The source's shape and the target's, if they differ.
    """

    sources: tuple[str, ...]
    part: int = 0
    parts: int = 1
    zero_part: int | None = None
    reshaped: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def whole(self) -> bool:
        """Whether it is one whole source, under another name or in another shape."""
        return len(self.sources) == self.parts == 1

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Compute the target's shape.

        Args:
            shapes: Shapes of the source tensors, by key.

        Raises:
            ConversionError: The source can't be cut into that many parts, or has another shape than the rule says.
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

    def concatenated(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Concatenate the sources to the target, or all targets to their source again.

        Args:
            tensors: The tensors in order, without the part that is zero.
        """
        tensors = list(tensors)
        if self.zero_part is not None:
            tensors.insert(self.zero_part, torch.zeros_like(tensors[0]))
        return torch.cat(tensors)

    def load(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Make the target tensor.

        Args:
            read: Reads a source tensor, given its key.

        Raises:
            ConversionError: A part that must be zero isn't.
        """
        if len(self.sources) > 1:
            return self.concatenated(map(read, self.sources))
        tensor = read(self.sources[0])
        if self.reshaped is not None:
            return tensor.reshape(self.reshaped[1])
        if self.zero_part is not None and tensor.chunk(self.parts)[self.zero_part].any():
            raise ConversionError(f"{self.sources[0]} has a bias for keys that is not zero; this layout has none.")
        return tensor if self.parts == 1 else tensor.chunk(self.parts)[self.part].clone()


# ---------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """What becomes of some tensors of a checkpoint.

    Attributes:
        duplicates: Whether the rule copies tensors that another rule has taken already.
    """

    duplicates: ClassVar[bool] = False

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names that the rule takes from the checkpoint, with `{}` for numbers."""
        return (self.source,)

    def inverse(self) -> Rule | None:
        """The rule for the opposite direction; `None` if nothing is to be done there."""
        return None

    def pieces(self, keys: Sequence[str], numbers: Sequence[str]) -> dict[str, Piece]:
        """The target tensors that the rule gives.

        Args:
            keys: The keys that were found, in the order of `source_names`.
            numbers: What `{}` stands for in them.

        Returns:
            From target names to where they come from.
        """
        return {}

    def renamed(self, source: Callable[[str], str] = str, target: Callable[[str], str] = str) -> Rule:
        """The same rule for other names.

        Args:
            source: From the names in the checkpoint to the new ones.
            target: From the names in the target to the new ones.
        """
        functions = {"source": source, "sources": source, "target": target, "targets": target, "of": target}
        changed = {}
        for name in functions.keys() & {field.name for field in dataclasses.fields(self)}:
            names, function = getattr(self, name), functions[name]
            changed[name] = tuple(map(function, names)) if isinstance(names, tuple) else function(names)
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True)
class Rename(Rule):
    """One tensor gets another name."""

    source: str
    target: str

    def inverse(self) -> Rule:
        """Give the tensor its old name again."""
        return Rename(self.target, self.source)

    def pieces(self, keys: Sequence[str], numbers: Sequence[str]) -> dict[str, Piece]:
        """The tensor, unchanged, under its new name."""
        return {self.target.format(*numbers): Piece((keys[0],))}


@dataclass(frozen=True)
class Split(Rule):
    """One tensor is cut into equal parts along its first dimension."""

    source: str
    targets: tuple[str, ...]

    def inverse(self) -> Rule:
        """Concatenate the parts again."""
        return Fuse(self.targets, self.source)

    def pieces(self, keys: Sequence[str], numbers: Sequence[str]) -> dict[str, Piece]:
        """One part of the tensor for each target."""
        names = [target.format(*numbers) for target in self.targets]
        return {name: Piece((keys[0],), part, len(names)) for part, name in enumerate(names)}


@dataclass(frozen=True)
class Fuse(Rule):
    """Tensors are concatenated along their first dimension: the inverse of `Split`."""

    sources: tuple[str, ...]
    target: str

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of all tensors that are concatenated, in order."""
        return self.sources

    def inverse(self) -> Rule:
        """Cut the tensor into its sources again."""
        return Split(self.target, self.sources)

    def pieces(self, keys: Sequence[str], numbers: Sequence[str]) -> dict[str, Piece]:
        """The concatenated tensor."""
        return {self.target.format(*numbers): Piece(tuple(keys))}


@dataclass(frozen=True)
class Drop(Rule):
    """A tensor is left out, and why."""

    source: str
    why: str


@dataclass(frozen=True)
class Missing(Rule):
    """The checkpoint has no tensor for a target, and why; `value` fills it. The inverse of `Drop`."""

    target: str
    why: str
    value: float = 0.0

    @property
    def source_names(self) -> tuple[str, ...]:
        """No names: nothing is taken from the checkpoint."""
        return ()

    def inverse(self) -> Rule:
        """Leave the tensor out."""
        return Drop(self.target, self.why)


@dataclass(frozen=True)
class Twin(Rule):
    """A second copy of the tensor that becomes the target `of`: it is compared with that one, and not taken."""

    source: str
    of: str

    def inverse(self) -> Rule:
        """Write the second copy again."""
        return Duplicate(self.of, self.source)


@dataclass(frozen=True)
class Duplicate(Rule):
    """A tensor is written once more, under a second name: the inverse of `Twin`."""

    source: str
    target: str
    duplicates: ClassVar[bool] = True

    def inverse(self) -> Rule:
        """Compare the second copy with the first and leave it out."""
        return Twin(self.target, self.source)

    def pieces(self, keys: Sequence[str], numbers: Sequence[str]) -> dict[str, Piece]:
        """The tensor, unchanged, under its second name."""
        return {self.target: Piece((keys[0],))}


@dataclass(frozen=True)
class ZeroKeyBias(Rule):
    """The biases of query and value become one bias of query, key and value: EVA and BEiT have none for keys."""

    sources: tuple[str, str]
    target: str

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the biases of query and value."""
        return self.sources

    def inverse(self) -> Rule:
        """Cut the bias into those of query and value again; the bias of keys must be zero."""
        return SplitZeroKeyBias(self.target, self.sources)

    def pieces(self, keys: Sequence[str], numbers: Sequence[str]) -> dict[str, Piece]:
        """The biases of query and value with zeros between them, for keys."""
        return {self.target.format(*numbers): Piece(tuple(keys), zero_part=1)}


@dataclass(frozen=True)
class SplitZeroKeyBias(Rule):
    """The inverse of `ZeroKeyBias`: the bias of keys must be zero."""

    source: str
    targets: tuple[str, str]

    def inverse(self) -> Rule:
        """Join the biases of query and value again, with zeros between them."""
        return ZeroKeyBias(self.targets, self.source)

    def pieces(self, keys: Sequence[str], numbers: Sequence[str]) -> dict[str, Piece]:
        """The first and the last third of the bias, for query and value."""
        names = [target.format(*numbers) for target in self.targets]
        return {name: Piece((keys[0],), part, 3, zero_part=1) for name, part in zip(names, (0, 2))}


@dataclass(frozen=True)
class Reshape(Rule):
    """One tensor gets another name and another shape, such as a scalar that becomes a vector of one."""

    source: str
    target: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]

    def inverse(self) -> Rule:
        """Give the tensor its old name and shape again."""
        return Reshape(self.target, self.source, self.target_shape, self.source_shape)

    def pieces(self, keys: Sequence[str], numbers: Sequence[str]) -> dict[str, Piece]:
        """The tensor under its new name, in its new shape."""
        return {self.target.format(*numbers): Piece((keys[0],), reshaped=(self.source_shape, self.target_shape))}


# ---------------------------------------------------------------------- tables


def invert(table: Iterable[Rule]) -> list[Rule]:
    """The table for the opposite direction: second copies are written again, and what was dropped stays away."""
    return [inverse for rule in table if (inverse := rule.inverse()) is not None]


def _pattern(name: str) -> re.Pattern:
    """`a.{}.b` as an expression that matches `a.7.b`."""
    return re.compile(r"(\d+)".join(re.escape(part) for part in name.split("{}")))


def dropped(table: Iterable[Rule], keys: Iterable[str]) -> dict[str, str]:
    """The keys that the table leaves out, and why."""
    drops = [(_pattern(rule.source), rule.why) for rule in table if isinstance(rule, Drop)]
    return {key: why for key in keys for pattern, why in drops if pattern.fullmatch(key)}


def twins(table: Iterable[Rule], keys: Iterable[str]) -> dict[str, str]:
    """The keys that are second copies, and the targets that they are copies of."""
    known = {rule.source: rule.of for rule in table if isinstance(rule, Twin)}
    return {key: known[key] for key in keys if key in known}


def _shown(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class _Matcher:
    """Finds the rules for a key. Names without `{}`, which are nearly all, are looked up; the others are tried in turn.

    Args:
        table: The rules.
    """

    def __init__(self, table: Iterable[Rule]):
        self._exact: dict[str, list[tuple[Rule, int]]] = defaultdict(list)
        self._patterns: list[tuple[Rule, int, re.Pattern]] = []
        for rule in table:
            for index, name in enumerate(rule.source_names):
                if "{}" in name:
                    self._patterns.append((rule, index, _pattern(name)))
                else:
                    self._exact[name].append((rule, index))

    def find(self, key: str) -> list[tuple[Rule, int, tuple[str, ...]]]:
        """The rules that a key matches, which of their sources it is, and what `{}` stands for."""
        found = [(rule, index, ()) for rule, index in self._exact.get(key, [])]
        for rule, index, pattern in self._patterns:
            if match := pattern.fullmatch(key):
                found.append((rule, index, match.groups()))
        return found


def plan(table: Iterable[Rule], keys: Iterable[str]) -> dict[str, Piece]:
    """Find where every target comes from.

    Args:
        table: The rules.
        keys: The checkpoint's keys.

    Returns:
        From target names to their pieces.

    Raises:
        ConversionError: A key matches no rule or two, a target is given twice, or one of several sources is missing.
    """
    keys, table = list(keys), list(table)
    matcher = _Matcher(rule for rule in table if not rule.duplicates)
    pieces: dict[str, Piece] = {}
    incomplete: dict[tuple[Rule, tuple[str, ...]], dict[int, str]] = {}
    unmapped = []
    for key in keys:
        found = matcher.find(key)
        if not found:
            unmapped.append(key)
            continue
        if len(found) > 1:
            raise ConversionError(f"{key} is matched by {len(found)} rules: {found[0][0]} and {found[1][0]}.")
        rule, index, numbers = found[0]
        sources = incomplete.setdefault((rule, numbers), {})
        sources[index] = key
        if len(sources) < len(rule.source_names):
            continue
        del incomplete[rule, numbers]
        for target, piece in rule.pieces([sources[number] for number in sorted(sources)], numbers).items():
            if target in pieces:
                raise ConversionError(f"{target} is given twice: by {pieces[target].sources[0]} and by {key}.")
            pieces[target] = piece
    if unmapped:
        raise ConversionError(
            f"{len(unmapped)} of {len(keys)} keys are in no conversion table: {_shown(unmapped)}. The checkpoint is "
            "not of this kind, or was written by code that this table does not know."
        )
    if incomplete:
        targets = [rule.target.format(*numbers) for rule, numbers in incomplete]
        raise ConversionError(f"Parts are missing of {_shown(targets)}.")
    present = set(keys)
    for rule in table:
        if rule.duplicates and rule.source in present:
            pieces.update(rule.pieces([rule.source], ()))
    return pieces


def check(pieces: Mapping[str, tuple[int, ...]], expected: Shapes, what: str) -> None:
    """Compare the tensors that a conversion gives with those of the model.

    Args:
        pieces: Shapes of the converted tensors, by target name.
        expected: Shapes of the model's tensors, by name.
        what: Name of the checkpoint, for the error.

    Raises:
        ConversionError: A tensor is missing or left over, or has another shape.
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
    "BUFFER",
    "ConversionError",
    "Drop",
    "Duplicate",
    "Fuse",
    "Missing",
    "Piece",
    "Rename",
    "Reshape",
    "Rule",
    "Shapes",
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
