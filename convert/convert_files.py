"""Reading checkpoints tensor by tensor, and writing models shard by shard: the whole never lies in memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..modeling.modeling_checkpoint import checkpoint_files
from .convert_tables import ConversionError


# where training code keeps the weights in a checkpoint that holds more than weights
WRAPPERS = ("model_state_dict", "state_dict", "model", "module")
SHARD_BYTES = 2 * 1024**3
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


class TensorFiles:
    """The tensors of a checkpoint, whatever it lies in; they are read when they are asked for.

    Args:
        path: A file (`.safetensors`, or anything of `torch.save`), a folder in transformers' layout, whole or sharded, or
            a Hub id of such a folder.
        hub_kwargs: `revision`, `cache_dir` and the like.

    Raises:
        ConversionError: There are no weights there, or loading them would run code.
    """

    def __init__(self, path: str | os.PathLike, **hub_kwargs):
        self.path = os.fspath(path)
        try:
            files = [Path(path)] if os.path.isfile(path) else checkpoint_files(self.path, **hub_kwargs)
        except OSError as error:
            raise ConversionError(f"{self.path}: {str(error).splitlines()[0]}") from error
        # what certificates call it: a Hub id, or a name without the folders of this machine
        self.label = os.path.basename(os.path.abspath(path)) if os.path.exists(path) else self.path
        self.files = {file.name: file for file in files}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._readers: dict[str, Callable[[], torch.Tensor]] = {}
        for file in files:
            if file.suffix == ".safetensors":
                self._open_safetensors(file)
            else:
                self._open_torch(file)
        if not self.shapes:
            raise ConversionError(f"There are no tensors in {self.path}.")
        if empty := [name for name, shape in self.shapes.items() if 0 in shape]:
            raise ConversionError(
                f"{len(empty)} tensors in {self.path} are empty, {empty[0]} is {list(self.shapes[empty[0]])}: DeepSpeed's "
                "ZeRO-3 saves that where the shards were not gathered. Make a whole file of its checkpoint with its "
                "zero_to_fp32.py."
            )

    def _open_safetensors(self, file: Path) -> None:
        try:
            tensors = safe_open(file, framework="pt")
        except Exception as error:  # safetensors' own class, which is not a ValueError in every version
            raise ConversionError(f"{file} is not a whole safetensors file: {error}") from error
        for name in tensors.keys():
            piece = tensors.get_slice(name)
            self.shapes[name] = tuple(piece.get_shape())
            self.dtypes[name] = DTYPES.get(piece.get_dtype(), torch.float32)
            self._readers[name] = lambda tensors=tensors, name=name: tensors.get_tensor(name)

    def _open_torch(self, file: Path) -> None:
        with open(file, "rb") as stream:
            zipped = stream.read(2) == b"PK"
        try:
            # only the new (zip) format can be mapped into memory; the old one is read whole
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped or None)
        except Exception as error:
            message = str(error).splitlines()[0]
            hint = (
                "It is a TorchScript archive (OpenAI's CLIP files are): give the same model as a folder in "
                "transformers' layout or a Hub id, such as openai/clip-vit-large-patch14."
                if "TorchScript" in str(error)
                else "Only files that hold nothing but tensors and plain containers are read, as anything else could run "
                "code. If you trust it, load it with torch.load(weights_only=False) and save its state dict again."
            )
            raise ConversionError(f"{file} can't be read safely: {message} {hint}") from error
        for wrapper in WRAPPERS:
            if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
                tensors = tensors[wrapper]
        if not isinstance(tensors, Mapping):
            raise ConversionError(f"{file} holds a {type(tensors).__name__}, expected a dict of tensors.")
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise ConversionError(
                    f"{file}: {name!r} is a {type(tensor).__name__}, expected a dict of tensors only."
                )
            self.shapes[name] = tuple(tensor.shape)
            self.dtypes[name] = tensor.dtype
            self._readers[name] = lambda tensor=tensor: tensor

    def read(self, name: str) -> torch.Tensor:
        return self._readers[name]()

    def origin(self, name: str) -> TensorFiles:
        """What a tensor really lies in."""
        return self


@contextmanager
def written_whole(output: str | os.PathLike):
    """A temporary folder whose files move to `output` once all of them are there; nothing is left behind on failure.

    Raises:
        ConversionError: `output` is a file, or holds something already.
    """
    target = Path(output)
    if target.is_file():
        raise ConversionError(f"{target} is a file; expected a folder to write to.")
    if (target / "config.json").exists():
        raise ConversionError(f"{target} holds a model already; choose another folder, or delete it first.")
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(f"{target} is not empty; choose another folder, or empty it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        target.mkdir(exist_ok=True)
        target.chmod(0o777 & ~_umask())
        # the configuration last: without it the folder is no model
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, int, Callable[[], torch.Tensor]]],
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write tensors as `model.safetensors`, or as shards with an index.

    Args:
        folder: Where to.
        tensors: Name, bytes, and a function that gives the tensor; it is called when its shard is written.
        shard_bytes: Largest shard, which is also about what lies in memory; a larger tensor gets a shard of its own.

    Returns:
        Bytes altogether.
    """
    shards: list[list[tuple[str, int, Callable[[], torch.Tensor]]]] = [[]]
    filled = 0
    for entry in tensors:
        if shards[-1] and filled + entry[1] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry[1]
    total = sum(size for shard in shards for _, size, _ in shard)
    weight_map = {}
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, unit_divisor=1024) as progress:
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({key: read().contiguous() for key, _, read in shard}, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(0o666 & ~_umask())
            weight_map.update((key, name) for key, _, _ in shard)
            progress.update(sum(size for _, size, _ in shard))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


__all__ = ["TensorFiles", "write_tensors", "written_whole"]
