"""convert_assembly"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..version import __version__
from .convert_certificate import Checks, certify
from .convert_files import TensorFiles
from .convert_sources import Change
from .convert_tables import ConversionError, Piece, Rule, check, twins
from .convert_writing import Entry, output_folder, write_tensors


WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OFFICIAL = "the official layout"


@dataclass
class Conversion:
    """A conversion that has been worked out, and can be written.

    Args:
        config: Of the converted model.
        pieces: For each of its tensors: the files it comes from, how, and what is changed (`None`: nothing).
        model: The converted model on the meta device.
        notes: What the user should know about it.
        left_out: Tensors of the checkpoint that were not taken over, and why.
        direction: Whose layout it was and is.
        checkpoint: The files that count most: what was trained, beside frozen parts from elsewhere.
        run: Lets both sides answer fixed inputs, given the folder that was written; `None` where one of them can't run here.
    """

    config: PreTrainedConfig
    pieces: dict[str, tuple[TensorFiles, Piece, Change | None]]
    model: PreTrainedModel = field(repr=False)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    direction: tuple[str, str] = (OFFICIAL, "vlbridge")
    checkpoint: TensorFiles | None = None
    run: Callable[[Path], list[dict]] | None = field(default=None, repr=False)

    def load(self, name: str) -> torch.Tensor:
        """One tensor of the converted model.

        Raises:
            ConversionError: There is NaN or infinity in it or in what it is made from.
        """
        files, piece, change = self.pieces[name]
        tensor = piece.load(files.read)
        require_finite(tensor, " and ".join(piece.sources))
        if change is not None:
            tensor = change.apply(tensor)
            require_finite(tensor, name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape in the written file."""
        files, piece, change = self.pieces[name]
        shape = piece.shape(files.shapes)
        return shape if change is None else change.shape(shape)

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, likewise."""
        files, piece, _ = self.pieces[name]
        return files.dtypes[piece.sources[0]]

    def entries(self) -> Iterator[Entry]:
        """What `write_tensors` takes."""
        for name in self.pieces:
            yield name, self.shape(name), self.dtype(name), partial(self.load, name)

    def leaves(self) -> list[TensorFiles]:
        """Everything that something is read from."""
        found = {}
        for files, piece, change in self.pieces.values():
            read = [(files, piece.sources), *((other, other.shapes) for other in (change.reads if change else ()))]
            found.update((id(leaf), leaf) for files, names in read for leaf in map(files.origin, names))
        return list(found.values())

    def fingerprint(self) -> str:
        """SHA-256 of what goes in, as far as names, sizes and times of files tell, and of what is done with it."""
        files = {path.resolve() for leaf in self.leaves() for path in leaf.files.values()}
        # what says how they are to be read: settings of adapters, for one
        files |= {path.resolve() for file in files for path in file.parent.glob("*.json")}
        about = {
            "version": __version__,
            "config": self.config.to_dict(),
            "files": sorted([str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files),
            "tensors": [
                [name, repr(piece), list(self.shape(name)), str(self.dtype(name)), change is not None]
                for name, (_, piece, change) in self.pieces.items()
            ],
        }
        return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()

    def write(
        self,
        output: str | os.PathLike,
        generation: GenerationConfig | None,
        processor: ProcessorMixin,
        verify: bool = True,
        card: str | None = None,
    ) -> None:
        """Write the model with its processor and a certificate, all of it or nothing.

        After an interruption the same call goes on where the last one stopped, see `output_folder`.

        Args:
            output: Empty folder, or one that is made.
            generation: Generation defaults.
            processor: Processor that belongs to the model.
            verify: Check what was written, see `certify`.
            card: What its README.md begins with; `None` writes none.

        Raises:
            ConversionError: The folder is not empty, or a tensor is not what it should be.
        """
        self.config.architectures = [type(self.model).__name__]
        with output_folder(output, self.fingerprint()) as folder, Checks(self, verify) as checks:
            write_tensors(folder, self.entries(), when_written=checks.file)
            self.config.save_pretrained(folder)
            if generation is not None:
                generation.save_pretrained(folder)
            processor.save_pretrained(folder)
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")
            certify(self, folder, checks)


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Refuse tensors with NaN or infinity, which training that diverged or a damaged file leaves behind.

    Args:
        tensor: A tensor of any shape; only floats are checked.
        name: Its name, for the error.

    Raises:
        ConversionError: It holds NaN or infinity.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = tensor.aminmax()  # NaN comes through
    if not (torch.isfinite(low) and torch.isfinite(high)):
        count = int((~torch.isfinite(tensor)).sum())
        raise ConversionError(
            f"{name} holds NaN or infinity in {count} of {tensor.numel()} places: the file is damaged, or its training "
            "diverged."
        )


def expected_tensors(model: PreTrainedModel, separate: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a model's files hold: second names of one tensor are left out.

    Args:
        model: On the meta device.
        separate: Names that the class ties, although this model's weights differ.
    """
    tied = model.all_tied_weights_keys.keys() - set(separate)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def assemble(
    config: PreTrainedConfig,
    model: PreTrainedModel,
    expected: Mapping[str, tuple[int, ...]],
    sources: Iterable[tuple[TensorFiles, Mapping[str, Piece], Mapping[str, Change]]],
    what: str,
) -> Conversion:
    """Put a conversion together.

    Args:
        config: Of the converted model.
        model: On the meta device.
        expected: What it consists of.
        sources: Files, where their tensors go, and what is changed; the first that gives a tensor counts.
        what: Names the checkpoint in errors.

    Raises:
        ConversionError: A tensor is missing or left over, has another shape, or is none of floats.
    """
    pieces: dict[str, tuple] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    sources = list(sources)
    wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for files, found, changes in sources:
        for target, piece in found.items():
            if target in pieces:
                continue
            pieces[target] = (files, piece, changes.get(target))
            shape = piece.shape(files.shapes)
            shapes[target] = changes[target].shape(shape) if target in changes else shape
    check(shapes, expected, what)
    for name in expected:
        files, piece, _ = pieces[name]
        _check_dtypes(files, piece, wanted.get(name))
    return Conversion(config, {name: pieces[name] for name in expected}, model, checkpoint=sources[0][0])


def _check_dtypes(files: TensorFiles, piece: Piece, wanted: torch.dtype | None) -> None:
    """Weights are floats that can be calculated with: integers and 8-bit floats need scales, which are not known here."""
    for source in piece.sources:
        dtype = files.dtypes[source]
        if wanted is not None and wanted.is_floating_point and dtype not in WEIGHT_DTYPES:
            raise ConversionError(
                f"{source} is {dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}: quantised weights are not "
                "converted, give the original ones."
            )
        if dtype != files.dtypes[piece.sources[0]]:
            raise ConversionError(f"{source} is {dtype}, but {piece.sources[0]} is {files.dtypes[piece.sources[0]]}.")


def compare_twins(files, table: Iterable[Rule], conversion: Conversion) -> None:
    """Second copies of tensors must be what they are copies of: else they belong to another language model.

    Args:
        files: The checkpoint.
        table: Its table.
        conversion: What it becomes.

    Raises:
        ConversionError: They differ by more than a rounding to half precision.
    """
    for key, of in twins(table, files.shapes).items():
        one, other = files.read(key), conversion.load(of)
        if one.shape != other.shape or not torch.allclose(one.float(), other.float(), rtol=2**-7, atol=1e-4):
            raise ConversionError(
                f"{key} is a second copy of {of}, but differs from it: the parts are not those that the checkpoint was "
                "trained with."
            )
