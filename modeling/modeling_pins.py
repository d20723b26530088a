"""Pins: the frozen parts that a bridge was trained with, by source, revision and hash of their weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..compat import cached_file, optional_file
from ..extensions import where_to_load
from ..files import cache_dir, read_json, retried, write_json


logger = logging.get_logger(__name__)

FROZEN_PARTS = ("vision_model", "language_model")
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# Files of a checkpoint's weights; those of an earlier checkpoint are deleted
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
# Arguments of `from_pretrained` that change nothing when a bridge checkpoint is loaded, and flags that do so if unset
_WITHOUT_EFFECT = ("low_cpu_mem_usage", "tqdm_class", "weights_only", "offload_state_dict")
_FLAGS = ("use_kernels", "ignore_mismatched_sizes", "from_tf", "from_flax", "load_in_8bit", "load_in_4bit")


class FrozenPartError(OSError, ValueError):
    """A frozen part is missing, or is not the one that the bridge was trained with."""


def frozen_parts_of(config: PreTrainedConfig) -> list[str]:
    """Names of the frozen parts that a model has (stage 1 of BLIP-2 has no language model)."""
    return [part for part in FROZEN_PARTS if part == "vision_model" or config.text_config is not None]


def with_effect(arguments: dict) -> dict:
    """Those arguments of `from_pretrained` that would change a bridge checkpoint: harnesses pass many that do not.

    Args:
        arguments: Keyword arguments that nothing has read yet.
    """
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and name not in _WITHOUT_EFFECT and (value or name not in _FLAGS)
    }


def summary(problems: list[str]) -> str:
    """Join the first five of several problems to one line of an error message."""
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


# ---------------------------------------------------------------------- hashes of weights


def checkpoint_files(source: str, **hub_kwargs) -> list[Path]:
    """Local paths of the weight files of a Hub repository or folder; they are downloaded if necessary.

    Args:
        source: Hub id or folder.
        hub_kwargs: `revision`, `cache_dir` and other arguments of `from_pretrained`.

    Raises:
        FrozenPartError: There are no weights.
        OSError: The Hub can't be reached, or has no such repository.
    """
    unsure = None
    for name in ("model.safetensors", "pytorch_model.bin"):
        for found in (name, f"{name}.index.json"):
            try:
                path = Path(retried(cached_file, source, found, **hub_kwargs))
            except OSError as error:
                # Not in the cache, and the Hub does not answer: the file may exist.
                if isinstance(error.__cause__, LocalEntryNotFoundError):
                    unsure = unsure or error
                    if not is_offline_mode() and not hub_kwargs.get("local_files_only"):
                        raise  # all retries have failed
                elif error.__cause__ is not None:
                    raise
                continue
            if found == name:
                return [path]
            return [Path(retried(cached_file, source, shard, **hub_kwargs)) for shard in _shard_names(path)]
    if unsure is not None:
        raise unsure
    raise FrozenPartError(f"No weights (model.safetensors or pytorch_model.bin, whole or sharded) in {source!r}.")


def _shard_names(index: Path) -> list[str]:
    """Names of the files that an index lists.

    Raises:
        FrozenPartError: The file is not an index, or lists files outside its folder.
    """
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FrozenPartError(f"{index} is no index of weight files: it has no weight_map.") from error
    for shard in shards:
        path = PurePosixPath(str(shard).replace("\\", "/"))
        if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise FrozenPartError(f"{index} names {shard!r}, which is not beside it: such a file is not read.")
    return shards


def tensor_digest(name: str, tensor: torch.Tensor) -> bytes:
    """SHA-256 of one tensor: its name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
    if tensor.numel():
        digest.update(memoryview(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()))
    return digest.digest()


def weights_sha256(source: str, **hub_kwargs) -> str:
    """Hash of the tensors in a checkpoint, independent of sharding and of the order in the files.

    Hashes are cached: files whose size and modification time have not changed are not read again.

    Args:
        source: Hub id or folder.
        hub_kwargs: `revision`, `cache_dir` and other arguments of `from_pretrained`.

    Returns:
        Hexadecimal SHA-256.
    """
    files = checkpoint_files(source, **hub_kwargs)
    # Links of the Hub's cache are resolved to the files that they point to.
    stamp = json.dumps([[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files])
    known_path = cache_dir() / "hashes.json"
    known = read_json(known_path, {})
    if stamp in known:
        return known[stamp]
    digests = {name: tensor_digest(name, tensor) for name, tensor in tensors_of(files)}
    total = hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()
    known[stamp] = total
    try:  # the cache is optional
        known_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(known_path, known, indent=0)
    except OSError:
        pass
    return total


def tensors_of(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the names and tensors of weight files."""
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()


def commit_of(source: str, **hub_kwargs) -> str | None:
    """Commit of a Hub repository in the local cache; `None` for a folder."""
    if os.path.isdir(source):
        return None
    path = optional_file(source, "config.json", **hub_kwargs)
    parts = Path(path).parts if path is not None else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


# ---------------------------------------------------------------------- pins


def accepted_hashes(pin: dict | None) -> set[str]:
    """Hashes of the weights that a pin accepts."""
    pin = pin or {}
    return {pin.get("sha256"), *(other["sha256"] for other in pin.get("alternatives") or [])} - {None}


def find_frozen_part(part: str, pin: dict, allow_mismatch: bool = False, **hub_kwargs) -> tuple[str, dict]:
    """Find a frozen part, and verify its weights.

    Args:
        part: `"vision_model"` or `"language_model"`.
        pin: `{"source", "revision", "sha256"}`, and optionally `"alternatives"`: a list of `{"source", "sha256"}` of
            other accepted copies.
        allow_mismatch: Only warn if the weights differ from the pinned ones.
        hub_kwargs: `token`, `cache_dir` and other arguments of `from_pretrained`.

    Returns:
        Folder or Hub id, and `hub_kwargs`, with the revision if the pin has one.

    Raises:
        FrozenPartError: The part is not available, or its weights differ from the pinned ones.
    """
    if not pin.get("source"):
        raise FrozenPartError(f"This bridge does not say where its {part} comes from.")
    source = pin["source"]
    try:
        place = where_to_load(source)
        if place == source and pin.get("revision"):
            hub_kwargs["revision"] = pin["revision"]
        found = weights_sha256(place, **hub_kwargs)
    except OSError as error:
        raise FrozenPartError(
            f"This bridge needs the {part} {source!r}"
            + (f" at revision {pin['revision']}" if pin.get("revision") else "")
            + f", which can't be loaded: {str(error).splitlines()[0]} Make it available, or pass "
            f"{part}=<a loaded model>."
        ) from error
    accepted = {pin.get("sha256"), *(other["sha256"] for other in pin.get("alternatives", []))} - {None}
    if found in accepted:
        return place, hub_kwargs
    if pin.get("sha256") is None and place == source:
        logger.warning_once(f"The {part} {source!r} is pinned by name only: its weights were not verified.")
        return place, hub_kwargs
    wrong = (
        f"The {part} in {place!r} is not the one that this bridge was trained with: its weights hash to {found}, "
        f"expected {' or '.join(sorted(accepted))}."
    )
    if not allow_mismatch:
        raise FrozenPartError(
            f"{wrong} Restore the original; or, if you mean to use this one, pass allow_mismatch=True or "
            f"{part}=<a loaded model>."
        )
    logger.warning(f"{wrong} It is used anyway, because allow_mismatch=True was passed.")
    return place, hub_kwargs


__all__ = [
    "FROZEN_PARTS",
    "FrozenPartError",
    "accepted_hashes",
    "checkpoint_files",
    "commit_of",
    "find_frozen_part",
    "frozen_parts_of",
    "weights_sha256",
    "with_effect",
]
