"""A conversion as a whole: where each tensor of the converted model comes from, and writing it with its certificate."""

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
    """A planned conversion, ready to be written.

    Args:
        config: The converted model's configuration.
        pieces: For each of its tensors the files it comes from, how, and the change to it (`None` for none).
        model: The converted model on the meta device.
        notes: What the user should know about it.
        left_out: Tensors of the checkpoint that are not used, and why.
        direction: The layout of the source and that of the target.
        checkpoint: The files with the trained weights, as opposed to frozen parts from elsewhere.
        run: Compares the outputs of both models on fixed inputs, given the folder that was written; `None` if one of
            them can't run here.
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
        """Make one tensor of the converted model.

        Raises:
            ConversionError: There is NaN or infinity in it or in its sources.
        """
        files, piece, change = self.pieces[name]
        tensor = piece.load(files.read)
        require_finite(tensor, " and ".join(piece.sources))
        if change is not None:
            tensor = change.apply(tensor)
            require_finite(tensor, name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the written file."""
        files, piece, change = self.pieces[name]
        shape = piece.shape(files.shapes)
        return shape if change is None else change.shape(shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the written file."""
        files, piece, _ = self.pieces[name]
        return files.dtypes[piece.sources[0]]

    def entries(self) -> Iterator[Entry]:
        """The tensors as `write_tensors` takes them."""
        for name in self.pieces:
            yield name, self.shape(name), self.dtype(name), partial(self.load, name)

    def leaves(self) -> list[TensorFiles]:
        """All checkpoints that the conversion reads."""
        found = {}
        for files, piece, change in self.pieces.values():
            read = [(files, piece.sources), *((other, other.shapes) for other in (change.reads if change else ()))]
            found.update((id(leaf), leaf) for files, names in read for leaf in map(files.origin, names))
        return list(found.values())

    def fingerprint(self) -> str:
        """SHA-256 of the conversion: names, sizes and times of the files that it reads, and what it does with them."""
        files = {path.resolve() for leaf in self.leaves() for path in leaf.files.values()}
        # settings beside them, such as those of adapters
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
        """Write the model with its processor and a certificate, whole or not at all.

        After an interruption, the same call continues where the last one stopped; see `output_folder`.

        Args:
            output: The folder to write: a new one, or an empty one.
            generation: Generation defaults; `None` writes none.
            processor: The model's processor.
            verify: Whether to check what was written; see `certify`.
            card: The beginning of its README.md; `None` writes none.

        Raises:
            ConversionError: The folder is not empty, or a check failed.
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
    """Names and shapes of the tensors in a model's files: second names of one tensor are left out.

    Args:
        model: The model, on the meta device.
        separate: Names that the class ties, although the weights differ in this model.
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
    """Put a conversion together from several checkpoints.

    Args:
        config: The converted model's configuration.
        model: The converted model, on the meta device.
        expected: Names and shapes of its tensors.
        sources: Checkpoints, each with the pieces that it gives and the changes to them, by target name. If several
            give a tensor, the first is used.
        what: Name of the checkpoint, for errors.

    Returns:
        The conversion.

    Raises:
        ConversionError: A tensor is missing or left over, or has another shape or a dtype that can't be converted.
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
    """Refuse weights in integers and 8-bit floats: they need scales, which are not known here."""
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
    """Check that second copies of tensors are equal to the first: otherwise the language model is another one.

    Args:
        files: The checkpoint.
        table: Its conversion table.
        conversion: Its conversion.

    Raises:
        ConversionError: A copy differs by more than rounding to half precision explains.
    """
    for key, of in twins(table, files.shapes).items():
        one, other = files.read(key), conversion.load(of)
        if one.shape != other.shape or not torch.allclose(one.float(), other.float(), rtol=2**-7, atol=1e-4):
            raise ConversionError(
                f"{key} is a second copy of {of}, but differs from it: the parts are not those that the checkpoint was "
                "trained with."
            )


__all__ = ["Conversion", "assemble", "compare_twins", "expected_tensors", "require_finite"]
