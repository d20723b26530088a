"""Reading checkpoints tensor by tensor: a checkpoint never lies in memory as a whole.

Files are not trusted. Pickles are read with `weights_only=True`; headers and directories are checked before data is
read from where they point; zip records are compared with their CRC-32. Files are read rather than mapped,
so that their pages do not stay in memory.

Source: the safetensors format, https://github.com/huggingface/safetensors#format; `torch/serialization.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..compat_torch import load_without_weights, places_in_file
from ..modeling.modeling_pins import checkpoint_files
from .convert_tables import ConversionError


# where training code keeps the weights in a checkpoint that holds more than weights
WRAPPERS = ("model_state_dict", "state_dict", "model", "module")
BLOCK_BYTES = 2**22
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
          "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class ShapeTable(dict):
    """Shapes by name; a missing name is reported as a fault of the checkpoint."""

    def __init__(self, path: str, shapes: Mapping[str, tuple[int, ...]] = {}):
        super().__init__(shapes)
        self.path = path

    def __missing__(self, name: str):
        raise ConversionError(f"{self.path}: {name} is missing.")


def dimensions(shapes: Mapping[str, tuple[int, ...]], name: str, number: int) -> tuple[int, ...]:
    """The shape of a tensor, which must have a given number of dimensions.

    Args:
        shapes: Shapes by name.
        name: The tensor.
        number: Its dimensions.

    Raises:
        ConversionError: It has another number of dimensions, or there is no such tensor.
    """
    shape = tuple(shapes[name])
    if len(shape) != number:
        raise ConversionError(f"{name} is {list(shape)}, expected a tensor of {number} dimensions.")
    return shape


def layer_numbers(keys: Iterable[str], pattern: str) -> list[int]:
    """The numbers that the first group of a pattern matches at the beginning of keys, sorted."""
    return sorted({int(match.group(1)) for key in keys if (match := re.match(pattern, key))})


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Record:
    """A run of bytes in a file.

    Args:
        file: The file.
        start: Position of the first byte.
        size: Number of bytes.
        crc: Their CRC-32, if the file holds it.
    """

    file: Path
    start: int
    size: int
    crc: int | None = None

    def read(self, start: int, size: int) -> torch.Tensor:
        """Read some of its bytes: `(size,)`, uint8."""
        data = torch.empty(size, dtype=torch.uint8)
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.start + start)
            view = memoryview(data.numpy())
            while len(view):
                count = stream.readinto(view)
                if not count:
                    raise ConversionError(f"{self.file} has become shorter while it was read.")
                view = view[count:]
        return data

    def check(self) -> None:
        """Compare its bytes with the CRC-32.

        Raises:
            ConversionError: They don't match.
        """
        crc, size = 0, 0
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.start)
            while size < self.size and (block := stream.read(min(BLOCK_BYTES, self.size - size))):
                crc, size = zlib.crc32(block, crc), size + len(block)
        self.compare(crc)

    def compare(self, crc: int) -> None:
        if crc != self.crc:
            raise ConversionError(
                f"{self.file} is damaged: a tensor's bytes do not have the checksum that was saved with them. Download "
                "it again."
            )


@dataclass
class Stored:
    """A tensor in a file: its bytes, and how they are interpreted. `offset` and `stride` count elements."""

    record: Record
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def plain(self) -> bool:
        """Whether its elements lie one after the other, without gaps."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride or ())):
            if size > 1 and step != expected:
                return False
            expected *= size
        return True

    def blocks(self, buffer: bytearray) -> Iterator[int]:
        """Read a plain tensor block by block into a buffer; yields the number of bytes in the buffer."""
        view = memoryview(buffer)
        with open(self.record.file, "rb", buffering=0) as stream:
            stream.seek(self.record.start + self.offset * self.dtype.itemsize)
            left = math.prod(self.shape) * self.dtype.itemsize
            while left:
                filled, wanted = 0, min(left, len(buffer))
                while filled < wanted:
                    count = stream.readinto(view[filled:wanted])
                    if not count:
                        raise ConversionError(f"{self.record.file} has become shorter while it was read.")
                    filled += count
                left -= filled
                yield filled

    def read(self, checked: set[Record]) -> torch.Tensor:
        """Read the tensor.

        Args:
            checked: Records whose checksums have been compared already; the tensor's record is added.

        Raises:
            ConversionError: The checksum doesn't match.
        """
        size = self.dtype.itemsize
        if self.stride is None:
            return self.record.read(0, self.record.size).view(self.dtype).reshape(self.shape)
        span = elements_spanned(self.shape, self.stride)
        whole = self.offset == 0 and span * size == self.record.size
        if self.record not in checked and not whole:
            self.record.check()
        data = self.record.read(self.offset * size, span * size)
        if self.record not in checked and whole:
            self.record.compare(zlib.crc32(memoryview(data.numpy())))
        checked.add(self.record)
        return data.view(self.dtype).as_strided(self.shape, self.stride)


def elements_spanned(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Number of elements in memory from a tensor's first to its last."""
    return sum((size - 1) * step for size, step in zip(shape, stride)) + 1


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def safetensors_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, after its header has been checked in full.

    Args:
        file: The file.

    Returns:
        From names to where the tensors lie.

    Raises:
        ConversionError: It is not a whole safetensors file, or its header contradicts itself.
    """

    def refuse(what: str):
        raise ConversionError(f"{file} is not a whole safetensors file: {what}.")

    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 10 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
            refuse(f"it has {size} bytes, and its header claims {length}" if size >= 8 else f"it has {size} bytes")
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        refuse(f"its header can't be read, {_first_line(error)}")
    if not isinstance(header, dict):
        refuse("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse("its __metadata__ is no table of texts")
    found, spans = {}, []
    for name, about in header.items():
        if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
            refuse(f"{name} has no dtype, shape and data_offsets")
        dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ConversionError(f"{file}: {name} has the dtype {dtype!r}; expected one of {', '.join(DTYPES)}.")
        for values in (shape, offsets):
            if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
                refuse(f"{name} has the shape {shape!r} and the data_offsets {offsets!r}")
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if len(offsets) != 2 or offsets[1] - offsets[0] != expected:
            refuse(f"{name} is {shape} of {dtype}, which is {expected} bytes, and has the data_offsets {offsets}")
        spans.append((*offsets, name))
        record = Record(file, 8 + length + offsets[0], expected)
        found[name] = Stored(record, DTYPES[dtype], tuple(shape))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            refuse(f"{name} begins at byte {start} of the data, where {end} was expected")
        end = stop
    if end != size - 8 - length:
        refuse(f"its header tells of {end} bytes of data, and it has {size - 8 - length}")
    return found


def zip_records(file: Path) -> dict[int, Record]:
    """The storages in a file of `torch.save`, by their first byte; all other records are compared with their checksums.

    Args:
        file: The file.

    Raises:
        ConversionError: The zip's directory contradicts the file, or something is damaged or compressed.
    """
    size, found = file.stat().st_size, {}
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as stream:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
            for info in archive.infolist():
                if "/code/" in info.filename:  # TorchScript's, which is refused anyway
                    continue
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise ValueError(f"{info.filename} is compressed, which torch.save never does")
                stream.seek(info.header_offset)
                local = stream.read(30)
                if len(local) < 30 or local[:4] != b"PK\x03\x04":
                    raise ValueError(f"{info.filename} is not where the directory says")
                start = info.header_offset + 30 + sum(int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
                if start + info.file_size > size:
                    raise ValueError(f"{info.filename} ends after the end of the file")
                if "/data/" in info.filename:
                    found[start] = Record(file, start, info.file_size, info.CRC)
                else:
                    archive.read(info)  # compares its checksum
    except Exception as error:  # zipfile has many, also from struct and codecs
        raise ConversionError(f"{file} can't be read safely: {_first_line(error)}. Download it again.") from error
    return found


class TensorFiles:
    """The tensors of a checkpoint in any format; each is read when it is asked for.

    Args:
        path: A file (`.safetensors`, or one of `torch.save`), a folder in transformers' layout, whole or sharded, or
            the Hub id of such a folder.
        hub_kwargs: Arguments for the Hub's client: `revision`, `cache_dir` and so on.

    Raises:
        ConversionError: There are no weights there, they are damaged, or loading them would run code.
    """

    def __init__(self, path: str | os.PathLike, **hub_kwargs):
        self.path = os.fspath(path)
        try:
            files = [Path(path)] if os.path.isfile(path) else checkpoint_files(self.path, **hub_kwargs)
        except OSError as error:
            raise ConversionError(f"{self.path}: {_first_line(error)}") from error
        # its name in certificates: a Hub id, or a file name without the folders of this machine
        self.label = os.path.basename(os.path.abspath(path)) if os.path.exists(path) else self.path
        self.files = {file.name: file for file in files}
        self.shapes: dict[str, tuple[int, ...]] = ShapeTable(self.path)
        self.dtypes: dict[str, torch.dtype] = {}
        self._tensors: dict[str, Stored | torch.Tensor] = {}
        self._checked: set[Record] = set()
        self._file_of: dict[str, Path] = {}
        for file in files:
            found = safetensors_header(file) if file.suffix == ".safetensors" else self._open_torch(file)
            for name, tensor in found.items():
                if name in self._tensors:
                    raise ConversionError(f"{name} is in {self._file_of[name].name} and in {file.name} of {self.path}.")
                self.shapes[name], self.dtypes[name] = tuple(tensor.shape), tensor.dtype
                self._tensors[name], self._file_of[name] = tensor, file
        if not self.shapes:
            raise ConversionError(f"There are no tensors in {self.path}.")
        if not os.path.isfile(path):
            self._check_index(files[0].parent)
        if empty := [name for name, shape in self.shapes.items() if 0 in shape]:
            raise ConversionError(
                f"{len(empty)} tensors in {self.path} are empty, {empty[0]} is {list(self.shapes[empty[0]])}: "
                "DeepSpeed's ZeRO-3 saves that where the shards were not gathered. Make a whole file of its checkpoint "
                "with its zero_to_fp32.py."
            )

    def _check_index(self, folder: Path) -> None:
        """Check that the tensors are in the files that the index names."""
        indices = (folder / f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin"))
        if (index := next((path for path in indices if path.is_file()), None)) is None:
            return
        for name, shard in json.loads(index.read_text())["weight_map"].items():
            where = self._file_of.get(name)
            if where is None:
                raise ConversionError(f"{index} says that {name} is in {shard}; it is in none of the files.")
            if where.name != Path(shard).name:
                raise ConversionError(f"{index} says that {name} is in {shard}; it is in {where.name}.")

    def _open_torch(self, file: Path) -> dict[str, Stored | torch.Tensor]:
        with open(file, "rb") as stream:
            zipped = stream.read(2) == b"PK"
        if not file.stat().st_size:
            raise ConversionError(f"{file} is empty.")
        records = zip_records(file) if zipped else {}
        try:
            # of the new (zip) format, only names, shapes and positions are read here; a file of the old one is read
            # whole
            if zipped:
                tensors = load_without_weights(file)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            hint = (
                "It is a TorchScript archive (OpenAI's CLIP files are): give the same model as a folder in "
                "transformers' layout or a Hub id, such as openai/clip-vit-large-patch14."
                if "TorchScript" in str(error)
                else "Only files that hold nothing but tensors and plain containers are read, as anything else could "
                "run code. If you trust it, load it with torch.load(weights_only=False) and save its state dict again."
            )
            raise ConversionError(f"{file} can't be read safely: {_first_line(error)} {hint}") from error
        for wrapper in WRAPPERS:
            if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
                tensors = tensors[wrapper]
        if not isinstance(tensors, Mapping):
            raise ConversionError(f"{file} holds a {type(tensors).__name__}, expected a dict of tensors.")
        found = {}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ConversionError(
                    f"{file}: {name!r} is a {type(tensor).__name__}, expected a dict of tensors only."
                )
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in DTYPE_NAMES:
                raise ConversionError(f"{file}: {name} is {tensor.layout} of {tensor.dtype}, expected a plain tensor.")
            storage, stride, offset = tensor.untyped_storage(), tensor.stride(), tensor.storage_offset()
            claimed = (offset + elements_spanned(tensor.shape, stride)) * tensor.dtype.itemsize if tensor.numel() else 0
            # one element seen as many would fill the memory
            if claimed > storage.nbytes() or tensor.numel() * tensor.dtype.itemsize > storage.nbytes():
                raise ConversionError(
                    f"{file}: {name} is {list(tensor.shape)} of {tensor.dtype}, but its storage has {storage.nbytes()} "
                    "bytes."
                )
            found[name] = tensor.detach()
        if not zipped:
            return found
        places = places_in_file(found.values(), {start: record.size for start, record in records.items()})
        for (name, tensor), place in zip(found.items(), places):
            record = records.get(place)
            if record is None or record.size != tensor.untyped_storage().nbytes():
                raise ConversionError(f"{file}: the bytes of {name} are not where its directory says.")
            shape, stride = tuple(tensor.shape), tensor.stride()
            found[name] = Stored(record, tensor.dtype, shape, stride, tensor.storage_offset())
        return found

    def stored(self, name: str) -> Stored | torch.Tensor:
        """Where a tensor lies in a file, or the tensor itself if it is in memory."""
        return self._tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor.

        Raises:
            ConversionError: Its checksum doesn't match.
        """
        tensor = self._tensors[name]
        if isinstance(tensor, torch.Tensor):
            return tensor
        try:
            return tensor.read(self._checked)
        except ConversionError as error:
            raise ConversionError(f"{name}: {error}") from error

    def origin(self, name: str) -> TensorFiles:
        """The checkpoint that a tensor is read from."""
        return self


__all__ = [
    "BLOCK_BYTES",
    "DTYPE_NAMES",
    "ShapeTable",
    "Stored",
    "TensorFiles",
    "dimensions",
    "layer_numbers",
    "safetensors_header",
]
