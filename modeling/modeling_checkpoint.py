"""Bridge checkpoints: `bridge.*` alone on disk, with both frozen parts pinned by source and hash of their weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file, logging

from .modeling_mpt import MptForCausalLM


logger = logging.get_logger(__name__)

FROZEN_PARTS = ("vision_model", "language_model")
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class FrozenPartError(OSError, ValueError):
    """A frozen part that a bridge was trained with is missing, or is not the one it was trained with."""


# ---------------------------------------------------------------------- hashes of weights


def checkpoint_files(source: str, **hub_kwargs) -> list[Path]:
    """Local paths of the weight files of a Hub repository or folder; they are downloaded where necessary.

    Raises:
        FrozenPartError: There are none.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = cached_file(source, f"{name}.index.json", **hub_kwargs, **quiet)
        if index is not None:
            shards = _shard_names(Path(index))
            return [Path(cached_file(source, shard, **hub_kwargs)) for shard in shards]
        single = cached_file(source, name, **hub_kwargs, **quiet)
        if single is not None:
            return [Path(single)]
    raise FrozenPartError(f"No weights (model.safetensors or pytorch_model.bin, whole or sharded) in {source!r}.")


def _shard_names(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        FrozenPartError: It is no index, or names files outside its folder.
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
    """Hash of the tensors in a checkpoint, the same whatever the sharding and the order in the files.

    Files that were hashed before and have neither changed size nor time are not read again.

    Args:
        source: Hub id or folder.
        hub_kwargs: `revision`, `cache_dir` and the like.

    Returns:
        Hexadecimal SHA-256.
    """
    from ..demo import cache_dir

    files = [path.resolve() for path in checkpoint_files(source, **hub_kwargs)]
    stamp = json.dumps([[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files])
    known_path = cache_dir() / "hashes.json"
    try:
        known = json.loads(known_path.read_text())
    except (OSError, ValueError):
        known = {}
    if stamp in known:
        return known[stamp]
    digests: dict[str, bytes] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                digests.update((name, tensor_digest(name, tensors.get_tensor(name))) for name in tensors.keys())
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            digests.update((name, tensor_digest(name, tensor)) for name, tensor in tensors.items())
    total = hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()
    known[stamp] = total
    try:  # a cache: never in the way
        known_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = known_path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known, indent=0))
        os.replace(temporary, known_path)
    except OSError:
        pass
    return total


def commit_of(source: str, **hub_kwargs) -> str | None:
    """Commit of a Hub repository in the local cache; `None` for a folder."""
    if os.path.isdir(source):
        return None
    path = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    parts = Path(path).parts if path is not None else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


# ---------------------------------------------------------------------- frozen parts


def auto_class_for(part: str, config: PreTrainedConfig):
    """The Auto class that loads a frozen part, or our own class where there is one for it."""
    if part == "vision_model":
        return AutoModel
    if isinstance(config, MptConfig):
        return MptForCausalLM
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def build_part(part: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A frozen part with random weights."""
    built_by = auto_class_for(part, config)
    # Auto classes have `from_config`, models `_from_config`
    return (built_by._from_config if issubclass(built_by, PreTrainedModel) else built_by.from_config)(config)


def where_to_load(source: str) -> str:
    """Folder or Hub id to load a part from: parts of the embedded default need no Hub."""
    from ..demo import resolve

    return resolve(source)


def frozen_parts_of(config: PreTrainedConfig) -> list[str]:
    """Names of the frozen parts that a model has: stage 1 of BLIP-2 has no language model."""
    return [part for part in FROZEN_PARTS if part == "vision_model" or config.text_config is not None]


def find_frozen_part(part: str, pin: dict, **hub_kwargs) -> tuple[str, dict]:
    """Where a frozen part lies, once it is sure that it is the right one.

    Args:
        part: `"vision_model"` or `"language_model"`.
        pin: `{"source", "revision", "sha256"}`, and perhaps `"alternatives"`: a list of `{"source", "sha256"}` of other
            copies that are as good.
        hub_kwargs: `token`, `cache_dir` and the like.

    Returns:
        Folder or Hub id, and `hub_kwargs` with the revision where there is one.

    Raises:
        FrozenPartError: The part can't be had, or its weights are not those that were pinned.
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
            + f", which can't be loaded: {str(error).splitlines()[0]} Make it available, or pass {part}=<a loaded model>."
        ) from error
    accepted = {pin.get("sha256"), *(other["sha256"] for other in pin.get("alternatives", []))} - {None}
    if found not in accepted:
        if pin.get("sha256") is not None or place != source:
            raise FrozenPartError(
                f"The {part} in {place!r} is not the one that this bridge was trained with: its weights hash to "
                f"{found}, expected {' or '.join(sorted(accepted))}. Restore the original, or pass {part}=<a loaded "
                "model> if you mean to use this one."
            )
        logger.warning_once(f"The {part} {source!r} is pinned by name only: its weights were not verified.")
    return place, hub_kwargs


def load_frozen_part(part: str, pin: dict, config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
    """Load a frozen part from where its pin says, and make sure that it is the right one.

    Args:
        part: As for `find_frozen_part`.
        pin: Likewise.
        config: The part's configuration.
        kwargs: For the part's `from_pretrained` (`dtype`, `quantization_config`, `token`, ...).

    Raises:
        FrozenPartError: The part can't be had, or its weights are not those that were pinned.
    """
    place, hub_kwargs = find_frozen_part(part, pin, **{name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs})
    return auto_class_for(part, config).from_pretrained(place, config=config, **{**kwargs, **hub_kwargs})


def _name_sources(config_path: Path, pins: dict) -> None:
    """In a saved configuration, call the frozen parts what their pins call them, not where they lay on this machine."""
    saved = json.loads(config_path.read_text())
    for name, part in (("vision_config", "vision_model"), ("text_config", "language_model")):
        if "_name_or_path" in (saved.get(name) or {}):
            saved[name]["_name_or_path"] = pins[part]["source"]
    saved.pop("_name_or_path", None)
    config_path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


def load_bridge_weights(bridge: nn.Module, path: str, tied: dict[str, str], dtype: torch.dtype | str, **hub_kwargs):
    """Fill a bridge from a bridge checkpoint.

    Args:
        bridge: Its weights may be on the meta device still.
        path: Hub id or folder.
        tied: The model's tied tables, target to source: tables that share their storage with another are in no file.
        dtype: To cast the bridge to; `"auto"` takes the file's.
        hub_kwargs: `revision`, `cache_dir` and the like.

    Raises:
        ValueError: The file's tensors are not those of this bridge.
    """
    weights = load_file(cached_file(path, SAFE_WEIGHTS_NAME, **hub_kwargs))
    expected = {f"bridge.{name}": tensor for name, tensor in bridge.state_dict().items()}
    weights.update((name, weights[source]) for name, source in tied.items() if name in expected and source in weights)
    problems = [f"missing {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"unexpected {name}" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"The weights in {path} are not those of its configuration: {shown}.")
    if not weights:  # a bridge may have none
        return
    bridge.to(next(iter(weights.values())).dtype if dtype == "auto" else dtype)
    if any(tensor.is_meta for tensor in expected.values()):
        bridge.to_empty(device="cpu")
    bridge.load_state_dict({name.removeprefix("bridge."): tensor for name, tensor in weights.items()})


class BridgeCheckpointMixin:
    """`save_pretrained(bridge_only=True)`, and `from_pretrained` of what it wrote."""

    def pin_frozen_parts(self) -> dict:
        """Name both frozen parts by source, revision and hash of their weights.

        Raises:
            ValueError: A part has no source to come back from, or has been trained.
        """
        pins = {}
        for part in frozen_parts_of(self.config):
            pin = (self.config.frozen_parts or {}).get(part) or {}
            if not getattr(self.config, f"freeze_{part}"):
                raise ValueError(
                    f"bridge_only=True would lose the training of the {part}, which is not frozen. Save the whole model, "
                    "or freeze() the part first."
                )
            if not pin.get("source"):
                raise ValueError(
                    f"bridge_only=True needs to know where the {part} comes from, but it was made from a configuration or "
                    f"passed in without a path. Save it (`model.{part}.save_pretrained(FOLDER)`) and compose the bridge "
                    "with that folder or with a Hub id."
                )
            if not pin.get("sha256") and not pin.get("alternatives"):
                place = where_to_load(pin["source"])
                revision = {"revision": pin["revision"]} if pin.get("revision") and place == pin["source"] else {}
                sha256 = weights_sha256(place, **revision)
                if place == pin["source"]:
                    pin = {**pin, "revision": pin.get("revision") or commit_of(place), "sha256": sha256}
                else:
                    pin = {**pin, "sha256": None, "alternatives": [{"source": "embedded", "sha256": sha256}]}
            pins[part] = pin
        return pins

    def save_pretrained(
        self, save_directory, *args, bridge_only: bool = False, state_dict: dict | None = None, **kwargs
    ):
        """Save the model, or its bridge alone.

        Args:
            save_directory: Folder to write to.
            bridge_only: Write `bridge.*` and a configuration that pins both frozen parts; nothing of them is copied.
            state_dict: Tensors to save instead of the model's own.

        Raises:
            ValueError: `bridge_only` with a part that has no source or has been trained.
        """
        if not bridge_only:
            was, self.config.bridge_only = self.config.bridge_only, False
            try:
                return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
            finally:
                self.config.bridge_only = was
        pins = self.pin_frozen_parts()
        state_dict = self.state_dict() if state_dict is None else state_dict
        bridge = {name: tensor for name, tensor in state_dict.items() if name.startswith("bridge.")}
        before = self.config.frozen_parts, self.config.bridge_only
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file; expected a folder to save to.")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            self.config.frozen_parts, self.config.bridge_only = pins, True
            super().save_pretrained(temporary, *args, state_dict=bridge, **kwargs)
            _name_sources(temporary / "config.json", pins)
            shutil.copymode(temporary / "config.json", temporary / SAFE_WEIGHTS_NAME)  # or nobody else may read it
            target.mkdir(exist_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, target / path.name)  # the configuration last: without it the folder is no model
        finally:
            self.config.frozen_parts, self.config.bridge_only = before
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a model; a bridge checkpoint fetches and verifies its frozen parts too.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            config: The configuration, where it is loaded already.
            kwargs: As for every transformers model. For a bridge checkpoint also `vision_model=` and
                `language_model=`: loaded models to use (and share) instead of fetching the pinned ones.

        Raises:
            FrozenPartError: A frozen part is missing or changed.
            ValueError: The bridge's weights are not those of this configuration.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_KEYWORDS if kwargs.get(name) is not None}
        bridge_only = getattr(config, "bridge_only", None)
        if bridge_only is None and pretrained_model_name_or_path is not None:
            try:
                config_dict, _ = PreTrainedConfig.get_config_dict(
                    config if isinstance(config, (str, os.PathLike)) else pretrained_model_name_or_path, **hub_kwargs
                )
                bridge_only = config_dict.get("bridge_only", False)
            except OSError:  # an adapter's folder, or a wrong name: the stock loader knows what to say
                bridge_only = False
        # weights handed over directly are not a bridge checkpoint's file
        if not bridge_only or kwargs.get("state_dict") is not None or pretrained_model_name_or_path is None:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            # loading puts new parameters in place, which know nothing of freezing
            model.freeze(model.config.freeze_vision_model, model.config.freeze_language_model)
            return loaded
        return cls._from_bridge_checkpoint(pretrained_model_name_or_path, config, hub_kwargs, **kwargs)

    @classmethod
    def _from_bridge_checkpoint(cls, path, config, hub_kwargs, **kwargs):
        for name in (
            *HUB_KEYWORDS,
            "_from_auto",
            "_commit_hash",
            "trust_remote_code",
            "adapter_kwargs",
            "use_safetensors",
        ):
            kwargs.pop(name, None)
        given = {part: kwargs.pop(part, None) for part in FROZEN_PARTS}
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
        device_map = kwargs.pop("device_map", None)
        placement = {
            name: kwargs.pop(name) for name in ("max_memory", "offload_folder", "offload_buffers") if name in kwargs
        }
        attention = kwargs.pop("attn_implementation", None)
        quantization = kwargs.pop("quantization_config", None)
        generation_config = kwargs.pop("generation_config", None)
        output_loading_info = kwargs.pop("output_loading_info", False)
        if not isinstance(config, PreTrainedConfig):
            config, kwargs = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **hub_kwargs, **kwargs)
        if kwargs:
            raise TypeError(f"A bridge checkpoint is loaded without {', '.join(sorted(kwargs))}: not supported here.")
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        if attention is not None:
            config._attn_implementation = attention

        parts = {}
        for part in frozen_parts_of(config):
            part_config = config.vision_config if part == "vision_model" else config.text_config
            pin = (config.frozen_parts or {}).get(part)
            if given[part] is not None:
                parts[part] = given[part]
                if given[part].config.model_type != part_config.model_type:
                    raise FrozenPartError(
                        f"The {part} passed in is a {given[part].config.model_type}; this bridge was trained with a "
                        f"{part_config.model_type}."
                    )
            elif not pin:
                raise FrozenPartError(
                    f"{path}/config.json is bridge_only but names no {part}; pass {part}=<a loaded model>."
                )
            else:
                extra = {"quantization_config": quantization} if quantization and part == "language_model" else {}
                token = {"token": hub_kwargs["token"]} if "token" in hub_kwargs else {}
                parts[part] = load_frozen_part(part, pin, part_config, dtype=dtype, **extra, **token)

        model = cls(config, **parts)
        load_bridge_weights(model.bridge, path, model.all_tied_weights_keys, dtype, **hub_kwargs)
        model.freeze(config.freeze_vision_model, config.freeze_language_model).eval()
        if generation_config is None:
            try:
                generation_config = GenerationConfig.from_pretrained(path, **hub_kwargs)
            except OSError:
                generation_config = model.generation_config
        model.generation_config = generation_config
        model.name_or_path = config.name_or_path = str(path)
        if device_map is not None:
            model.dispatch(device_map, **placement)
        info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, info) if output_loading_info else model

    def dispatch(self, device_map, max_memory: dict | None = None, **kwargs) -> None:
        """Spread a model that is in memory over devices, as `device_map` does at loading.

        Args:
            device_map: `"auto"` and its like, a device, or a dict from module names to devices.
            max_memory: Bytes (or `"20GiB"`) that may be used per device.
        """
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            no_split = sorted(self._no_split_modules)
            if device_map != "sequential":
                max_memory = get_balanced_memory(
                    self, max_memory, no_split_module_classes=no_split, low_zero=device_map == "balanced_low_0"
                )
            device_map = infer_auto_device_map(self, max_memory=max_memory, no_split_module_classes=no_split)
        elif not isinstance(device_map, dict):
            device_map = {"": device_map}
        if len(set(device_map.values())) == 1 and "disk" not in device_map.values():
            self.to(next(iter(device_map.values())))
            self.hf_device_map = device_map
        else:
            dispatch_model(self, device_map, skip_keys=sorted(self._skip_keys_device_placement), **kwargs)


__all__ = [
    "BridgeCheckpointMixin",
    "FrozenPartError",
    "checkpoint_files",
    "find_frozen_part",
    "load_bridge_weights",
    "load_frozen_part",
    "weights_sha256",
]
