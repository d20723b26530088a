"""Reading checkpoints tensor by tensor, and writing models shard by shard: the whole never lies in memory.

Files are not trusted. Pickles are read with `weights_only=True`; headers and directories are checked before anything is taken
from where they point; zip records are compared with their CRC-32. Nothing is mapped into memory, so that what was read does not
stay there.

Source: the safetensors format, https://github.com/huggingface/safetensors#format; `torch/serialization.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..compat import load_without_weights, places_in_file
from ..modeling.modeling_pins import checkpoint_files
from .convert_tables import ConversionError


# where training code keeps the weights in a checkpoint that holds more than weights
WRAPPERS = ("model_state_dict", "state_dict", "model", "module")
SHARD_BYTES = 2 * 1024**3
BLOCK_BYTES = 2**22
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
          "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FINISHED = ".finished.json"


def file_sha256(path: str | os.PathLike, stop: threading.Event | None = None) -> str:
    """Hexadecimal SHA-256 of a file.

    Args:
        path: The file.
        stop: Once it is set the rest is not read, and the result is of no use.
    """
    digest, buffer = hashlib.sha256(), bytearray(BLOCK_BYTES)
    with open(path, "rb", buffering=0) as stream:
        while (count := stream.readinto(buffer)) and not (stop is not None and stop.is_set()):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class ShapeTable(dict):
    """Shapes by name; to ask for one that is not there is an error of the checkpoint's."""

    def __init__(self, path: str, shapes: Mapping[str, tuple[int, ...]] = {}):
        super().__init__(shapes)
        self.path = path

    def __missing__(self, name: str):
        raise ConversionError(f"{self.path}: {name} is missing.")


def dimensions(shapes: Mapping[str, tuple[int, ...]], name: str, number: int) -> tuple[int, ...]:
    """The shape of a tensor that must have so many dimensions.

    Raises:
        ConversionError: It has another number of them, or there is no such tensor.
    """
    shape = tuple(shapes[name])
    if len(shape) != number:
        raise ConversionError(f"{name} is {list(shape)}, expected a tensor of {number} dimensions.")
    return shape


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Record:
    """A run of bytes in a file.

    Args:
        file: The file.
        start: First byte.
        size: Bytes.
        crc: CRC-32 of them, where the file tells.
    """

    file: Path
    start: int
    size: int
    crc: int | None = None

    def read(self, start: int, size: int) -> torch.Tensor:
        """Some of its bytes, `(size,)`."""
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
        """Compare with the CRC-32.

        Raises:
            ConversionError: They differ.
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
                f"{self.file} is damaged: a tensor's bytes do not have the checksum that was saved with them. Fetch it anew."
            )


@dataclass
class Stored:
    """One tensor of a file: which bytes, and how they are to be seen."""

    record: Record
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0  # elements

    @property
    def plain(self) -> bool:
        """Do its elements lie one after the other, and nothing between them?"""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride or ())):
            if size > 1 and step != expected:
                return False
            expected *= size
        return True

    def blocks(self, buffer: bytearray) -> Iterator[int]:
        """Read a plain tensor's bytes block by block into a buffer; yields how many it holds."""
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
        """The tensor.

        Args:
            checked: Records whose checksums were compared before; what is compared now is added.

        Raises:
            ConversionError: The checksum is another.
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
    """From a tensor's first element to its last."""
    return sum((size - 1) * step for size, step in zip(shape, stride)) + 1


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def safetensors_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, after everything that its header says has been checked.

    Args:
        file: The file.

    Raises:
        ConversionError: It is no whole safetensors file, or its header contradicts itself.
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
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
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
    """The storages in a file of `torch.save`, by their first byte; everything else in it is compared with its checksum.

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
                    raise ValueError(f"{info.filename} ends behind the file's end")
                if "/data/" in info.filename:
                    found[start] = Record(file, start, info.file_size, info.CRC)
                else:
                    archive.read(info)  # compares its checksum
    except Exception as error:  # zipfile has many, also from struct and codecs
        raise ConversionError(f"{file} can't be read safely: {_first_line(error)}. Fetch it anew.") from error
    return found


class TensorFiles:
    """The tensors of a checkpoint, whatever it lies in; they are read when they are asked for.

    Args:
        path: A file (`.safetensors`, or anything of `torch.save`), a folder in transformers' layout, whole or sharded, or
            a Hub id of such a folder.
        hub_kwargs: `revision`, `cache_dir` and the like.

    Raises:
        ConversionError: There are no weights there, they are damaged, or loading them would run code.
    """

    def __init__(self, path: str | os.PathLike, **hub_kwargs):
        self.path = os.fspath(path)
        try:
            files = [Path(path)] if os.path.isfile(path) else checkpoint_files(self.path, **hub_kwargs)
        except OSError as error:
            raise ConversionError(f"{self.path}: {_first_line(error)}") from error
        # what certificates call it: a Hub id, or a name without the folders of this machine
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
                f"{len(empty)} tensors in {self.path} are empty, {empty[0]} is {list(self.shapes[empty[0]])}: DeepSpeed's "
                "ZeRO-3 saves that where the shards were not gathered. Make a whole file of its checkpoint with its "
                "zero_to_fp32.py."
            )

    def _check_index(self, folder: Path) -> None:
        """Are tensors where the index says?"""
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
            # of the new (zip) format only names, shapes and places are read here; the old one is read whole
            if zipped:
                tensors = load_without_weights(file)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            hint = (
                "It is a TorchScript archive (OpenAI's CLIP files are): give the same model as a folder in "
                "transformers' layout or a Hub id, such as openai/clip-vit-large-patch14."
                if "TorchScript" in str(error)
                else "Only files that hold nothing but tensors and plain containers are read, as anything else could run "
                "code. If you trust it, load it with torch.load(weights_only=False) and save its state dict again."
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
                    f"{file}: {name} is {list(tensor.shape)} of {tensor.dtype}, but its storage has {storage.nbytes()} bytes."
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
        """Where a tensor lies; the tensor itself, where it is in memory anyway."""
        return self._tensors[name]

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if isinstance(tensor, torch.Tensor):
            return tensor
        try:
            return tensor.read(self._checked)
        except ConversionError as error:
            raise ConversionError(f"{name}: {error}") from error

    def origin(self, name: str) -> TensorFiles:
        """What a tensor really lies in."""
        return self


# ---------------------------------------------------------------------- writing


def finished_shards(folder: Path) -> dict[str, dict]:
    """Bytes and SHA-256 of the files that `write_tensors` has written to a folder, by name."""
    try:
        found = json.loads((folder / FINISHED).read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


@contextmanager
def written_whole(output: str | os.PathLike, key: str | None = None):
    """A temporary folder that becomes `output` once all is there; nothing is left behind on failure.

    Args:
        output: Where to: no folder yet, or an empty one.
        key: Names what is written. After an interruption (Ctrl-C, a killed process) the finished shards stay in a hidden
            folder beside `output` that is called by it, for the next run with the same key to go on with.

    Raises:
        ConversionError: `output` is a file, or holds something already, or another process is writing the same.
    """
    target = Path(output)
    if target.is_file():
        raise ConversionError(f"{target} is a file; expected a folder to write to.")
    if (target / "config.json").exists():
        raise ConversionError(f"{target} holds a model already; choose another folder, or delete it first.")
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(f"{target} is not empty; choose another folder, or empty it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if key is None:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    else:
        temporary = target.parent / f".{target.name}-{key[:16]}.partial"
        temporary.mkdir(mode=0o700, exist_ok=True)
    lock = _locked(temporary)
    keep = False
    try:
        finished = finished_shards(temporary)
        for path in temporary.iterdir():
            if path.name != FINISHED and path.name not in finished:
                path.unlink() if not path.is_dir() else shutil.rmtree(path)
        yield temporary
        (temporary / FINISHED).unlink(missing_ok=True)
        temporary.chmod(0o777 & ~_umask())
        try:
            os.replace(temporary, target)
        except OSError:  # an empty folder is there, and this system or a link doesn't let it be replaced
            target.mkdir(exist_ok=True)
            # the configuration last: without it the folder is no model
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, target / path.name)
    except KeyboardInterrupt:
        keep = key is not None and bool(finished := finished_shards(temporary))
        if keep:
            raise KeyboardInterrupt(
                f"{len(finished)} finished files stay in {temporary}: the same command goes on from there."
            ) from None
        raise
    finally:
        if lock is not None:
            os.close(lock)
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)


def _locked(folder: Path) -> int | None:
    """Lock a folder for this process, where the system can: it is unlocked when it is closed or the process ends."""
    try:
        import fcntl
    except ImportError:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConversionError(f"Another process is writing to {folder}; wait for it.") from None
    except OSError:  # a file system without locks
        pass
    return lock


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Refuse what training that diverged, or a damaged file, leaves behind.

    Args:
        tensor: Floats of any shape; others are not looked at.
        name: Of the tensor.

    Raises:
        ConversionError: There is NaN or infinity in it.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = tensor.aminmax()  # NaN comes through
    if not (torch.isfinite(low) and torch.isfinite(high)):
        count = int((~torch.isfinite(tensor)).sum())
        raise ConversionError(
            f"{name} holds NaN or infinity in {count} of {tensor.numel()} places: the file is damaged, or its training diverged."
        )


Entry = tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]


def write_tensors(
    folder: Path,
    tensors: Iterable[Entry],
    shard_bytes: int = SHARD_BYTES,
    when_written: Callable[[Path], None] = lambda path: None,
) -> int:
    """Write tensors as `model.safetensors`, or as shards with an index; two tensors lie in memory at a time.

    Shards that are there already, by `finished_shards` and their SHA-256, are not written again.

    Args:
        folder: Where to.
        tensors: Name, shape, dtype, and a function that gives the tensor; it is called when it is written.
        shard_bytes: Largest shard; a larger tensor gets a shard of its own.
        when_written: Called with every shard as soon as it is whole, and with those that were there already.

    Returns:
        Bytes altogether.

    Raises:
        ConversionError: A tensor is not what was announced.
    """
    shards: list[list[tuple[Entry, int]]] = [[]]
    filled = 0
    for entry in tensors:
        size = math.prod(entry[1]) * entry[2].itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((entry, size))
        filled += size
    total = sum(size for shard in shards for _, size in shard)
    weight_map, finished = {}, finished_shards(folder)
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, unit_divisor=1024) as progress:
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map.update((entry[0], name) for entry, _ in shard)
            path, known = folder / name, finished.get(name)
            if (
                known
                and path.is_file()
                and path.stat().st_size == known["bytes"]
                and file_sha256(path) == known["sha256"]
            ):
                progress.update(sum(size for _, size in shard))
                when_written(path)
                continue
            part = folder / f"{name}.part"
            digest = _write_shard(part, shard, progress)
            part.chmod(0o666 & ~_umask())
            os.replace(part, path)
            finished[name] = {"bytes": path.stat().st_size, "sha256": digest}
            (folder / f"{FINISHED}.part").write_text(json.dumps(finished))
            os.replace(folder / f"{FINISHED}.part", folder / FINISHED)
            when_written(path)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _write_shard(path: Path, shard: list[tuple[Entry, int]], progress) -> str:
    """Write a safetensors file as its tensors come; its SHA-256."""
    shard = sorted(shard, key=lambda each: -each[0][2].itemsize)  # so that all are aligned
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for (name, shape, dtype, _), size in shard:
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    # the next tensor is read while one is written
    with open(path, "wb", buffering=0) as stream, ThreadPoolExecutor(1) as reader:

        def write(data) -> None:
            view = memoryview(data)
            digest.update(view)
            while len(view):
                view = view[stream.write(view) :]

        write(len(raw).to_bytes(8, "little") + raw)
        following = reader.submit(shard[0][0][3])
        for number, ((name, shape, dtype, _), size) in enumerate(shard, start=1):
            tensor = following.result().detach()
            following = reader.submit(shard[number][0][3]) if number < len(shard) else None
            if (tuple(tensor.shape), tensor.dtype) != (tuple(shape), dtype):
                raise ConversionError(
                    f"{name} is {list(tensor.shape)} of {tensor.dtype}, expected {list(shape)} of {dtype}."
                )
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, size, BLOCK_BYTES):
                write(data[start : start + BLOCK_BYTES])
            progress.update(size)
    return digest.hexdigest()


__all__ = [
    "ShapeTable",
    "TensorFiles",
    "dimensions",
    "file_sha256",
    "finished_shards",
    "require_finite",
    "safetensors_header",
    "write_tensors",
    "written_whole",
]
