"""convert_sources"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from .convert_files import ShapeTable, Stored, TensorFiles


def with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Cut an embedding table, or fill it up with its mean: what an unknown token is, on average."""
    if rows == table.shape[0]:
        return table
    if rows < table.shape[0]:
        return table[:rows].clone()
    mean = table.float().mean(dim=0).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])


def resized(rows: int) -> Change:
    """The change to an embedding table that has another number of rows."""
    return Change(partial(with_rows, rows=rows), lambda shape: (rows, *shape[1:]))


@dataclass(frozen=True)
class Change:
    """What is done to a tensor on its way.

    Args:
        apply: From the tensor to the changed one.
        shape: From its shape to the changed one's.
        reads: Other files that it takes something from.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    reads: tuple[TensorFiles, ...] = ()


class Renamed:
    """A checkpoint under other names.

    Args:
        files: The checkpoint.
        names: From its keys to the names; other keys are left out.
    """

    def __init__(self, files, names: Mapping[str, str]):
        self.path = getattr(files, "path", "the checkpoint")
        self.files, self.keys = files, {name: key for key, name in names.items()}
        self.shapes = ShapeTable(self.path, {name: tuple(files.shapes[key]) for key, name in names.items()})
        self.dtypes = {name: files.dtypes[key] for key, name in names.items()}

    def stored(self, name: str) -> Stored | torch.Tensor:
        return self.files.stored(self.keys[name])

    def read(self, name: str) -> torch.Tensor:
        return self.files.read(self.keys[name])

    def origin(self, name: str):
        return self.files.origin(self.keys[name])


class Merged:
    """Two checkpoints as one; where both have a tensor, the first one's counts."""

    def __init__(self, first, second):
        self.path, self.first, self.second = first.path, first, second
        self.shapes = ShapeTable(self.path, {**second.shapes, **first.shapes})
        self.dtypes = {**second.dtypes, **first.dtypes}

    def _has(self, name: str):
        return self.first if name in self.first.shapes else self.second

    def stored(self, name: str) -> Stored | torch.Tensor:
        return self._has(name).stored(name)

    def read(self, name: str) -> torch.Tensor:
        return self._has(name).read(name)

    def origin(self, name: str):
        return self._has(name).origin(name)


class Constants:
    """Tensors that are in no file: norms that the official model does not have and nobody reads.

    Args:
        values: From names to shape, dtype and the value everywhere.
    """

    path = label = "constants"
    files: ClassVar[dict] = {}

    def __init__(self, values: Mapping[str, tuple[tuple[int, ...], torch.dtype, float]]):
        self.values = dict(values)
        self.shapes = {name: shape for name, (shape, _, _) in self.values.items()}
        self.dtypes = {name: dtype for name, (_, dtype, _) in self.values.items()}

    def read(self, name: str) -> torch.Tensor:
        shape, dtype, value = self.values[name]
        return torch.full(shape, value, dtype=dtype)

    stored = read

    def origin(self, name: str) -> Constants:
        return self
