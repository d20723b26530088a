"""The checks of a conversion, whose results are written to `conversion.json` in the converted folder.

There are three: every source tensor is put together again from the written files and compared bit by bit; if both
models can run here, their outputs on fixed inputs are compared; and all files are identified by their SHA-256.
"""

from __future__ import annotations

import math
import platform
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors
import torch
import transformers

from ..certificate import CERTIFICATE, card_section
from ..files import sha256_of, write_json
from ..version import __version__
from .convert_files import BLOCK_BYTES, Stored, TensorFiles
from .convert_tables import ConversionError
from .convert_writing import FINISHED, finished_shards


# both models in float32: larger ones are not run, as they might not fit into a machine that converts shard by shard
RUN_BYTES = 8 * 1024**3


def size_and_sha256(path: Path, stop: threading.Event | None = None) -> dict:
    """Bytes and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path, stop)}


def versions() -> dict[str, str]:
    """Versions of the libraries that take part in a conversion."""
    return {
        "vlbridge": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


class Comparison:
    """Puts every source tensor together again from the written files, and compares it bit by bit.

    Args:
        conversion: The conversion that is being written.
    """

    def __init__(self, conversion):
        self.conversion = conversion
        self.changed = self.equal = 0
        # targets of the same source tensors are compared together
        self.groups: dict[tuple[int, tuple[str, ...]], list[str]] = {}
        self.written: dict[str, TensorFiles] = {}
        self.buffers = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
        for name, (files, piece, change) in conversion.pieces.items():
            if change is None:
                self.groups.setdefault((id(files), piece.sources), []).append(name)

    def add(self, written: TensorFiles) -> None:
        """Compare the tensors of a written file, as far as their sources are complete.

        Args:
            written: One of the files, or all of them.

        Raises:
            ConversionError: A tensor is not the one that was to be written.
        """
        self.written.update(dict.fromkeys(written.shapes, written))
        touched = {}
        for name in written.shapes:
            files, piece, change = self.conversion.pieces[name]
            if change is not None:
                self._compare_changed(name)
            else:
                touched[id(files), piece.sources] = True
        for key in touched:
            if all(name in self.written for name in self.groups[key]):
                self._compare(self.groups[key])
                self.equal += len(key[1])

    def result(self) -> dict:
        """The number of source tensors that were found again, and of tensors that the conversion changes.

        The latter are compared with the change applied a second time.

        Raises:
            ConversionError: A tensor has not been written.
        """
        if missing := [name for name in self.conversion.pieces if name not in self.written]:
            raise ConversionError(f"{len(missing)} tensors were not written, {missing[0]} is one of them.")
        return {
            "what": "every source tensor, put together again from the written files, bit by bit",
            "source_tensors": self.equal,
            "changed_on_purpose": self.changed,
            "largest_difference": 0.0,
        }

    def _compare_changed(self, name: str) -> None:
        files, piece, _ = self.conversion.pieces[name]
        expected = self.conversion.load(name)
        if torch.equal(expected, piece.load(files.read)):  # the change did nothing here
            self.equal += len(piece.sources)
        else:
            self.changed += 1
        _same(self.written[name].read(name), expected, name)

    def _compare(self, names: list[str]) -> None:
        files, piece, _ = self.conversion.pieces[names[0]]
        if piece.whole:
            for name in names:
                self._compare_stored(self.written[name].stored(name), files.stored(piece.sources[0]), name)
            return
        if piece.parts == 1:
            expected = piece.concatenated(map(files.read, piece.sources))
            for name in names:
                _same(self.written[name].read(name).reshape(expected.shape), expected, name)
            return
        parts = {self.conversion.pieces[name][1].part: self.written[name].read(name) for name in names}
        source = piece.sources[0]
        _same(piece.concatenated(parts[number] for number in sorted(parts)), files.read(source), source)

    def _compare_stored(self, given: Stored | torch.Tensor, expected: Stored | torch.Tensor, name: str) -> None:
        """Compare two tensors, block by block if both lie in files."""
        if not (isinstance(given, Stored) and isinstance(expected, Stored) and given.plain and expected.plain):
            given, expected = (each.read(set()) if isinstance(each, Stored) else each for each in (given, expected))
            return _same(given.reshape(expected.shape), expected, name)
        if given.dtype != expected.dtype or math.prod(given.shape) != math.prod(expected.shape):
            raise _differs(name)
        for _ in zip(given.blocks(self.buffers[0]), expected.blocks(self.buffers[1]), strict=True):
            # the whole buffers: after a last, shorter block both hold bytes that have been compared before
            if self.buffers[0] != self.buffers[1]:
                raise _differs(name)


def _differs(name: str) -> ConversionError:
    return ConversionError(f"{name} was read back from the written files, and is not what was written.")


def _same(given: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    if given.dtype != expected.dtype or given.shape != expected.shape:
        raise _differs(name)
    bits = (each.contiguous().reshape(-1).view(torch.uint8).numpy() for each in (given, expected))
    if not np.array_equal(*bits):
        raise _differs(name)


class Checks:
    """Checks that run while a conversion is being written, when its files are in the system's cache.

    Args:
        conversion: The conversion that is being written.
        verify: Whether to check anything.
    """

    def __init__(self, conversion, verify: bool = True):
        self.verify = verify
        self.labels = labels_of(conversion)
        self.inputs: dict[str, dict] = {label: {name: {} for name in sorted(leaf.files)} for label, leaf in self.labels}
        self._comparison = Comparison(conversion) if verify else None
        self._stop = threading.Event()

    def __enter__(self) -> Checks:
        # one thread reads the sources from their beginning, the other follows the writing
        self._pools = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._compared: list[Future] = []
        if self.verify:
            self._hashed = self._pools[0].submit(self._hash_inputs)
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def _hash_inputs(self) -> None:
        for label, leaf in self.labels:
            for name, path in sorted(leaf.files.items()):
                self.inputs[label][name] = size_and_sha256(path, self._stop)

    def file(self, path: Path) -> None:
        """Check a file that has been written.

        Args:
            path: The file.

        Raises:
            ConversionError: An earlier file does not hold what was to be written.
        """
        if not self.verify:
            return
        self._compared.append(self._pools[1].submit(lambda: self._comparison.add(TensorFiles(path))))
        for future in self._compared:
            if future.done():
                future.result()

    def result(self) -> dict:
        """Wait for the checks, and return the result of the comparison; `inputs` is complete then.

        Raises:
            ConversionError: A file does not hold what was to be written.
        """
        for future in (*self._compared, self._hashed):
            future.result()
        return self._comparison.result()


def labels_of(conversion) -> list[tuple[str, TensorFiles]]:
    """The checkpoints that a conversion reads, with their names in the certificate, sorted."""
    found: dict[str, TensorFiles] = {}
    for leaf in conversion.leaves():
        label = leaf.label
        while found.setdefault(label, leaf) is not leaf:  # two folders have the same name
            label += "'"
    return sorted(found.items())


def certify(conversion, folder: Path, checks: Checks) -> dict:
    """Finish the checks of a conversion, and write their results to `conversion.json`.

    Args:
        conversion: The conversion.
        folder: The folder that it was written to.
        checks: Its checks, with all files of tensors added.

    Returns:
        The certificate.

    Raises:
        ConversionError: A check failed.
    """
    tensors, labels = {}, {id(leaf): label for label, leaf in checks.labels}
    for name, (files, piece, change) in conversion.pieces.items():
        about = {"shape": list(conversion.shape(name)), "dtype": str(conversion.dtype(name)).removeprefix("torch."),
                 "from": labels[id(files.origin(piece.sources[0]))]}  # fmt: skip
        if change is not None:
            about["changed"] = True
        tensors[name] = about
    files = conversion.checkpoint
    of_checkpoint = {id(leaf): leaf for leaf in map(files.origin, files.shapes)} if files is not None else {}
    found = []
    if not checks.verify:
        found.append({"what": "nothing", "why": "verification was switched off"})
    else:
        found.append(checks.result())
        size = 2 * 4 * sum(math.prod(about["shape"]) for about in tensors.values())
        if conversion.run is None:
            found.append({"what": "no run", "why": "the code on the other side is not there to be run"})
        elif size > RUN_BYTES:
            found.append(
                {"what": "no run", "why": f"both models in float32 take {size:,} bytes; the limit is {RUN_BYTES:,}"}
            )
        else:
            found += _run(conversion, folder)
    known = finished_shards(folder)
    certificate = {
        "from": conversion.direction[0],
        "to": conversion.direction[1],
        "checkpoint": sorted(labels[id(leaf)] for leaf in of_checkpoint.values() if id(leaf) in labels),
        "inputs": checks.inputs,
        "outputs": {
            str(path.relative_to(folder)): known.get(path.name) or size_and_sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (CERTIFICATE, "README.md", FINISHED)
        }
        if checks.verify
        else {},
        "checks": found,
        "notes": [_without_folders(note) for note in conversion.notes],
        "left_out": dict(conversion.left_out),
        "versions": versions(),
        "tensors": tensors,
    }
    write_json(folder / CERTIFICATE, certificate, indent=1, ensure_ascii=False)
    card = folder / "README.md"
    if card.exists():
        card.write_text(
            card.read_text(encoding="utf-8").rstrip() + "\n\n" + card_section(certificate), encoding="utf-8"
        )
    return certificate


def _run(conversion, folder: Path) -> list[dict]:
    """Compare the outputs of both models. A foreign source may fail to run; an exported model may not."""
    try:
        return conversion.run(folder)
    except ConversionError:
        raise
    except Exception as error:  # foreign files can make transformers raise anything
        why = _without_folders(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        if conversion.direction[0] == "vlbridge":
            raise ConversionError(f"What was exported can't be run, and nothing was written: {why}") from error
        return [{"what": "no run", "why": f"the source can't be run as it is. {why}"}]


def _without_folders(text: str) -> str:
    """Shorten absolute paths, which mean nothing on other machines, to their last part."""
    return re.sub(r"(?<!\S)(?:[A-Za-z]:)?[/\\]\S*[/\\](\S+)", r"\1", text)


__all__ = ["Checks", "Comparison", "certify"]
