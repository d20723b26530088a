"""Checkpoints under other names, merged checkpoints, constants, and changes to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from .convert_files import ShapeTable, Stored, TensorFiles


def with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Cut an embedding table, or fill it up with the mean of its rows, which is what an unknown token is on average.

    Args:
        table: `(rows, channels)`.
        rows: Rows that it should have.
    """
    if rows == table.shape[0]:
        return table
    if rows < table.shape[0]:
        return table[:rows].clone()
    mean = table.float().mean(dim=0).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])


def resized(rows: int) -> Change:
    """The change that gives an embedding table another number of rows."""
    return Change(partial(with_rows, rows=rows), lambda shape: (rows, *shape[1:]))


@dataclass(frozen=True)
class Change:
    """What a conversion does to a tensor.

    Args:
        apply: Makes the changed tensor from the tensor.
        shape: Computes the changed tensor's shape from the tensor's.
        reads: Other files that `apply` reads.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    reads: tuple[TensorFiles, ...] = ()


class Renamed:
    """A checkpoint under other names.

    Args:
        files: The checkpoint.
        names: From its keys to the new names; other keys are left out.
    """

    def __init__(self, files, names: Mapping[str, str]):
        self.path = getattr(files, "path", "the checkpoint")
        self.files, self.keys = files, {name: key for key, name in names.items()}
        self.shapes = ShapeTable(self.path, {name: tuple(files.shapes[key]) for key, name in names.items()})
        self.dtypes = {name: files.dtypes[key] for key, name in names.items()}

    def stored(self, name: str) -> Stored | torch.Tensor:
        """Where a tensor lies in a file, or the tensor itself if it is in memory."""
        return self.files.stored(self.keys[name])

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor, given its new name."""
        return self.files.read(self.keys[name])

    def origin(self, name: str):
        """The checkpoint that a tensor is read from."""
        return self.files.origin(self.keys[name])


class Merged:
    """Two checkpoints as one; if both have a tensor, that of the first is used."""

    def __init__(self, first, second):
        self.path, self.first, self.second = first.path, first, second
        self.shapes = ShapeTable(self.path, {**second.shapes, **first.shapes})
        self.dtypes = {**second.dtypes, **first.dtypes}

    def _owner(self, name: str):
        return self.first if name in self.first.shapes else self.second

    def stored(self, name: str) -> Stored | torch.Tensor:
        """Where a tensor lies in a file, or the tensor itself if it is in memory."""
        return self._owner(name).stored(name)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor from the first checkpoint that has it."""
        return self._owner(name).read(name)

    def origin(self, name: str):
        """The checkpoint that a tensor is read from."""
        return self._owner(name).origin(name)


class Constants:
    """Tensors that are in no file: norms that the official model does not have, and whose output is not read.

    Args:
        values: From names to shape, dtype and the value of all elements.
    """

    path = label = "constants"
    files: ClassVar[dict] = {}

    def __init__(self, values: Mapping[str, tuple[tuple[int, ...], torch.dtype, float]]):
        self.values = dict(values)
        self.shapes = {name: shape for name, (shape, _, _) in self.values.items()}
        self.dtypes = {name: dtype for name, (_, dtype, _) in self.values.items()}

    def read(self, name: str) -> torch.Tensor:
        """Make a tensor whose elements all have its value."""
        shape, dtype, value = self.values[name]
        return torch.full(shape, value, dtype=dtype)

    stored = read

    def origin(self, name: str) -> Constants:
        """These constants: their tensors are in no checkpoint."""
        return self


__all__ = ["Change", "Constants", "Merged", "Renamed", "resized", "with_rows"]
