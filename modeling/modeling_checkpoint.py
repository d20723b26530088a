"""Bridge checkpoints: `bridge.*` alone on disk, with both frozen parts pinned by source and hash of their weights.

Tensors of a frozen part that were trained (OpenFlamingo's embedding tables) are saved next to `bridge.*` under their
own names and listed in the configuration's `trained_tensors`. They replace the part's when the bridge is loaded.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..compat import arguments_that_stay, layers_not_to_split, resolve_revision, set_attention
from ..extensions import publisher, take_push_options, where_to_load, write_card
from ..files import move_into, retried, share_permissions, staging_folder, write_json
from .modeling_changes import changed_since, changed_tensors, has_adapters, samples_of
from .modeling_parts import PART_KEYWORDS, auto_class_for, check_part, load_frozen_part, part_to_quantize
from .modeling_pins import (
    FROZEN_PARTS,
    HUB_KEYWORDS,
    WEIGHTS,
    FrozenPartError,
    checkpoint_files,
    commit_of,
    frozen_parts_of,
    summary,
    tensors_of,
    weights_sha256,
    with_effect,
)
from .modeling_quantization import is_quantized_tensor, unpack, without_bridge


logger = logging.get_logger(__name__)


def overlay_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Look up parameters of the frozen parts by name.

    Args:
        model: The bridged model.
        names: Names of parameters, `vision_model.*` and `language_model.*`.

    Raises:
        ValueError: The frozen parts have no parameter of such a name.
    """
    known = {name: parameter for name, parameter in model.named_parameters() if name.startswith(FROZEN_PARTS)}
    # Second names of the same tensor, such as a tied output layer's
    known.update((name, known[source]) for name, source in model.all_tied_weights_keys.items() if source in known)
    if unknown := sorted(set(names) - known.keys()):
        raise ValueError(
            f"trained_tensors has {summary(unknown)}: neither frozen part has tensors of that name. Names begin with "
            "'vision_model.' or 'language_model.', as in model.state_dict()."
        )
    return {name: known[name] for name in names}


def _replace_local_paths(config_path: Path, pins: dict) -> None:
    """Replace local paths in a saved configuration by the frozen parts' pinned sources."""
    saved = json.loads(config_path.read_text())
    for name, part in (("vision_config", "vision_model"), ("text_config", "language_model")):
        if "_name_or_path" in (saved.get(name) or {}):
            saved[name]["_name_or_path"] = pins[part]["source"]
    saved.pop("_name_or_path", None)
    write_json(config_path, saved, sort_keys=True)


def load_bridge_weights(
    bridge: nn.Module,
    path: str,
    tied: dict[str, str],
    dtype: torch.dtype | str,
    overlay: dict[str, nn.Parameter] | None = None,
    shared: Iterable[str] = (),
    **hub_kwargs,
) -> None:
    """Fill a bridge from a bridge checkpoint.

    Args:
        bridge: The bridge, whose weights may still be on the meta device.
        path: Hub id or folder of the checkpoint.
        tied: The model's tied weights, target to source: the targets are not saved.
        dtype: Data type to cast the bridge to; `"auto"` takes that of the file.
        overlay: Parameters of the frozen parts that the checkpoint replaces, see `overlay_of`.
        shared: Frozen parts that other models use too: they are not changed.
        hub_kwargs: `revision`, `cache_dir` and other arguments of `from_pretrained`.

    Raises:
        ValueError: The tensors of the file do not match the bridge.
        FrozenPartError: The trained tensors of a shared part differ from the checkpoint's.
    """
    weights = dict(tensors_of(checkpoint_files(path, **hub_kwargs)))
    _load_overlay(overlay or {}, weights, shared)
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
        raise ValueError(f"The weights in {path} are not those of its configuration: {summary(problems)}.")
    if not weights:  # an identity bridge has none
        return
    bridge.to(next(iter(weights.values())).dtype if dtype == "auto" else dtype)
    if any(tensor.is_meta for tensor in expected.values()):
        bridge.to_empty(device="cpu")
    bridge.load_state_dict({name.removeprefix("bridge."): tensor for name, tensor in weights.items()})


@torch.no_grad()
def _load_overlay(parameters: dict[str, nn.Parameter], weights: dict[str, torch.Tensor], shared: Iterable[str]) -> None:
    """Copy trained tensors into the frozen parts, and remove them from `weights`.

    Raises:
        ValueError: A tensor is missing or has another shape.
        FrozenPartError: A tensor differs from that of a shared part, which must not be changed.
    """
    missing = [name for name in parameters if name not in weights]
    if missing:
        raise ValueError(f"The configuration's trained_tensors name {summary(missing)}, but the weights lack them.")
    for name, parameter in parameters.items():
        tensor = weights.pop(name).to(parameter.device)
        if is_quantized_tensor(parameter):
            layer = name.partition(".")[2].removesuffix(".weight")
            raise ValueError(
                f"This bridge brings a trained {name}, which is quantised here. Leave it in full precision: name "
                f"{layer!r} in the quantization_config's list of modules to leave out (llm_int8_skip_modules or "
                "modules_to_not_convert), together with the output layer, which a list of one's own replaces."
            )
        if tensor.shape != parameter.shape:
            shapes = f"shape {list(tensor.shape)}, expected {list(parameter.shape)}"
            raise ValueError(f"The trained tensor {name} has {shapes}.")
        part = name.partition(".")[0]
        if part not in shared:
            parameter.copy_(tensor)
        elif not torch.equal(tensor.to(parameter.dtype), parameter):
            raise FrozenPartError(
                f"This bridge brings a trained {name}, and the {part} passed in has another: it would be changed for "
                f"everything that shares it. Leave {part}= out, or pass one that was loaded with this bridge."
            )


class BridgeCheckpointMixin:
    """`save_pretrained(bridge_only=True)`, `push_to_hub(bridge_only=True)`, and `from_pretrained` for their files."""

    # Auto classes that the model's code is registered with when it is saved along with the model
    auto_classes: ClassVar[tuple[str, ...]] = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")

    def set_frozen_parts(self, **sources: str | os.PathLike) -> list[str]:
        """Set where the frozen parts came from, and find the tensors that were trained in them.

        Models that were loaded or converted as a whole can be saved with `bridge_only=True` afterwards.

        Args:
            sources: `vision_model=` and `language_model=`: Hub ids or folders of the original parts, which are loaded
                and compared one at a time.

        Returns:
            Names of the tensors that differ. They become the configuration's `trained_tensors`.

        Raises:
            ValueError: A part is unknown, or most of its tensors differ: the model was not initialised with it.
        """
        if unknown := sorted(set(sources) - set(frozen_parts_of(self.config))):
            raise ValueError(
                f"There is no part {', '.join(unknown)}; expected {', '.join(frozen_parts_of(self.config))}."
            )
        pins = dict(self.config.frozen_parts or {})
        trained = [
            name
            for name in self.config.trained_tensors or []
            if not name.startswith(tuple(f"{part}." for part in sources))
        ]
        for part, source in sources.items():
            source = os.path.abspath(source) if os.path.isdir(source) else os.fspath(source)
            place = where_to_load(source)
            config = copy.deepcopy(self.config.vision_config if part == "vision_model" else self.config.text_config)
            # Built with this model's shapes: tensors that are missing in the source or have another shape differ.
            original, info = auto_class_for(part, config).from_pretrained(
                place, config=config, ignore_mismatched_sizes=True, output_loading_info=True
            )
            fresh = {name for name, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
            theirs = dict(original.named_parameters())
            ours = dict(getattr(self, part).named_parameters())
            ours = {name: tensor for name, tensor in ours.items() if not is_quantized_tensor(tensor)}
            differ = [
                name
                for name, tensor in ours.items()
                if name in fresh or not torch.equal(tensor.detach().cpu(), theirs[name].detach().to(tensor.dtype))
            ]
            if len(differ) > len(ours) / 2:
                raise ValueError(
                    f"The {part} differs from {source!r} in {len(differ)} of {len(ours)} tensors: this model did not "
                    "begin with it, or was trained as a whole. Save it whole (bridge_only=False)."
                )
            trained += [f"{part}.{name}" for name in differ]
            pins[part] = {"source": source, "revision": commit_of(place) if place == source else None}
        self.config.frozen_parts, self.config.trained_tensors = pins, trained or None
        self._record_parts(*sources)  # later changes are relative to the state that was compared here
        return trained

    def _record_parts(self, *parts: str) -> None:
        """Record the current state of frozen parts, so that later changes are noticed when a bridge is saved alone."""
        self._loaded = {**self.__dict__.get("_loaded", {}), **{part: samples_of(getattr(self, part)) for part in parts}}

    def _changes_of(self, part: str, adapters: bool = True) -> list[str]:
        """Differences between a frozen part and its pinned source; unmerged adapters count if `adapters` is true."""
        if adapters and has_adapters(getattr(self, part)):
            return ["it carries adapters"]
        if part not in self._loaded:
            return ["it was built from a configuration, not loaded"]
        unpack(getattr(self, part))
        changed = changed_tensors(getattr(self, part), self._loaded[part])
        return [name for name in changed if f"{part}.{name}" not in (self.config.trained_tensors or [])]

    def pin_frozen_parts(self) -> dict:
        """Identify both frozen parts by source, revision and hash of their weights.

        Returns:
            The configuration's `frozen_parts`.

        Raises:
            ValueError: A part has no source to load it from again, or has been trained.
        """
        pins = {}
        if has_adapters(self.bridge):
            raise ValueError(
                "The bridge carries adapters: merge_and_unload() them first, or save them with PEFT's save_pretrained."
            )
        for part in frozen_parts_of(self.config):
            pin = (self.config.frozen_parts or {}).get(part) or {}
            if not getattr(self.config, f"freeze_{part}"):
                raise ValueError(
                    f"bridge_only=True would lose the training of the {part}, which is not frozen. Save the whole "
                    "model, or freeze() the part first."
                )
            if not pin.get("source"):
                raise ValueError(
                    f"bridge_only=True needs to know where the {part} comes from, but it was made from a configuration "
                    f"or passed in without a path. Save it (`model.{part}.save_pretrained(FOLDER)`) and compose the "
                    "bridge with that folder or with a Hub id."
                )
            if changes := self._changes_of(part):
                raise ValueError(
                    f"bridge_only=True would lose changes of the {part} since it was loaded from {pin['source']!r}: "
                    f"{summary(changes)}. Merged adapters and training change it. Save the whole model; save unmerged "
                    "adapters with PEFT's save_pretrained; or, if few tensors differ, save these with the bridge: "
                    f"model.set_frozen_parts({part}={pin['source']!r})."
                )
            if not pin.get("sha256") and not pin.get("alternatives"):
                place = where_to_load(pin["source"])
                revision = {"revision": pin["revision"]} if pin.get("revision") and place == pin["source"] else {}
                if pin.get("unverified"):
                    self._verify(part, place, **revision)
                    pin = {name: value for name, value in pin.items() if name != "unverified"}
                sha256 = weights_sha256(place, **revision)
                if place == pin["source"]:
                    pin = {**pin, "revision": pin.get("revision") or commit_of(place), "sha256": sha256}
                else:
                    pin = {**pin, "sha256": None, "alternatives": [{"source": "embedded", "sha256": sha256}]}
            pins[part] = pin
        return pins

    def _verify(self, part: str, source: str, **hub_kwargs) -> None:
        """Compare a part that was passed in as a loaded model with the files of its source.

        Raises:
            ValueError: They differ.
        """
        changed, compared = changed_since(getattr(self, part), tensors_of(checkpoint_files(source, **hub_kwargs)))
        if changed:
            raise ValueError(
                f"The {part} was passed in as a loaded model, and differs from {source!r}: {summary(changed)}. A "
                f"bridge that is saved alone would be reloaded with another {part}. Save the part "
                f"(`model.{part}.save_pretrained(FOLDER)`) and compose the bridge with that folder; or save the whole "
                "model."
            )
        if 2 * compared < sum(1 for _ in getattr(self, part).parameters()):
            logger.warning(
                f"Most tensors of the {part} could not be compared with {source!r} (they are quantised, or have other "
                "names there); the two are assumed to be the same."
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args,
        bridge_only: bool = False,
        with_code: bool = False,
        processor=None,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save the model, or its bridge alone.

        Args:
            save_directory: Folder to write to.
            args: Positional arguments of `PreTrainedModel.save_pretrained`.
            bridge_only: Save only `bridge.*`, the configuration's `trained_tensors`, and a configuration that pins both
                frozen parts. A model card is written too, unless the folder has a README.md.
            with_code: Save the code too, so that transformers alone can load the folder with `trust_remote_code=True`.
            processor: The model's processor, to be saved in the same folder.
            state_dict: Tensors to save instead of the model's own.
            push_to_hub: Upload the folder afterwards, see `push_to_hub`; `repo_id` defaults to the folder's name.
            kwargs: Arguments of `PreTrainedModel.save_pretrained` and of `push_folder`.

        Raises:
            ValueError: With `bridge_only=True`, a part has no source or has been trained.
        """
        hub = take_push_options(kwargs)
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        if self._quantized_parts():  # transformers can't undo how it read quantised weights from a checkpoint
            kwargs.setdefault("save_original_format", False)
        if not bridge_only:
            was = self.config.bridge_only, self.config.frozen_parts, getattr(self.config, "quantization_config", None)
            quantization = self._quantization_to_save()
            # The pin of a part that has changed is no longer valid.
            kept = {part: pin for part, pin in (was[1] or {}).items() if not self._changes_of(part)}
            self.config.bridge_only, self.config.frozen_parts = False, kept or None
            self._set_quantization(quantization)
            try:
                super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
            finally:
                self.config.bridge_only, self.config.frozen_parts = was[:2]
                self._set_quantization(was[2])
            if kwargs.get("is_main_process", True):
                self._write_quantization(Path(save_directory) / "config.json", whole=True)
            self._save_beside_weights(Path(save_directory), processor, with_code)
        else:
            self._save_bridge(Path(save_directory), *args, state_dict=state_dict, processor=processor,
                              with_code=with_code, **kwargs)  # fmt: skip
            write_card(Path(save_directory), repo_id if push_to_hub else None)
        if push_to_hub:
            publisher("push_to_hub").upload(Path(save_directory), repo_id, **{"commit_message": "Upload model", **hub})

    def _save_bridge(self, target: Path, *args, state_dict, processor, with_code: bool, **kwargs) -> None:
        """Save the bridge into a folder: all files, or none."""
        pins = self.pin_frozen_parts()
        state_dict = self.bridge.state_dict(prefix="bridge.") if state_dict is None else state_dict
        bridge = {name: tensor for name, tensor in state_dict.items() if name.startswith("bridge.")}
        for name, parameter in overlay_of(self, self.config.trained_tensors or []).items():
            bridge[name] = state_dict.get(name, parameter)
        before = self.config.frozen_parts, self.config.bridge_only
        quantizer = vars(self).pop("hf_quantizer", None)  # it would save all of its model
        with staging_folder(target) as staging:
            try:
                self.config.frozen_parts, self.config.bridge_only = pins, True
                super().save_pretrained(staging, *args, state_dict=bridge, **kwargs)
            finally:
                self.config.frozen_parts, self.config.bridge_only = before
                if quantizer is not None:
                    self.hf_quantizer = quantizer
            _replace_local_paths(staging / "config.json", pins)
            self._write_quantization(staging / "config.json", whole=False)
            share_permissions(staging / "config.json", staging.glob("*.safetensors"))
            self._save_beside_weights(staging, processor, with_code)
            written = move_into(staging, target)
        for path in target.iterdir():
            if WEIGHTS.fullmatch(path.name) and path.name not in written:
                path.unlink()  # left from an earlier model

    def _save_beside_weights(self, folder: Path, processor, with_code: bool) -> None:
        """Save the processor and the code next to the weights."""
        if processor is not None:
            processor.check(self.config)
            processor.save_pretrained(folder)
        if with_code:
            processor_class = None if processor is None else type(processor)
            publisher("with_code").add_code(folder, processor_class, type(self), type(self.config))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        bridge_only: bool = False,
        with_code: bool = False,
        processor=None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        **kwargs,
    ) -> CommitInfo:
        """Upload the model, or its bridge alone, in one commit.

        Args:
            repo_id: `name` or `owner/name`; the repository is created if it does not exist.
            bridge_only: Upload the bridge alone, as for `save_pretrained`. Both frozen parts should have been composed
                from Hub ids, or nobody else can load the bridge.
            with_code: Upload the code too, as for `save_pretrained`.
            processor: The model's processor, to be uploaded in the same commit.
            max_shard_size: Largest size of one file of weights, as for `PreTrainedModel.save_pretrained`.
            tags: Tags of the model card. An existing card of the repository is not changed.
            kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message` and `commit_description`, as for
                `push_folder`.

        Returns:
            The commit.

        Raises:
            TypeError: An argument is unknown.
            ValueError: With `bridge_only=True`, a part has no source or has been trained.
            huggingface_hub.errors.HfHubHTTPError: The Hub refuses the upload.
        """
        hub = take_push_options(kwargs)
        if kwargs:
            raise TypeError(f"push_to_hub has no argument {', '.join(sorted(kwargs))}.")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            self.save_pretrained(
                folder, bridge_only=bridge_only, with_code=with_code, processor=processor, max_shard_size=max_shard_size
            )
            write_card(folder, repo_id, tags)
            return publisher("push_to_hub").upload(
                folder, repo_id, keep=["README.md"], **{"commit_message": "Upload model", **hub}
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        **kwargs,
    ):
        """Load a model. For a bridge checkpoint, the frozen parts are loaded and verified too.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            model_args: Positional arguments of the class.
            config: The configuration, if it is loaded already.
            kwargs: Arguments of `PreTrainedModel.from_pretrained`. For a bridge checkpoint also `vision_model=` and
                `language_model=`, loaded models to use (and share) instead of the pinned ones, and
                `allow_mismatch=True`, which turns the error about a pinned part with changed weights into a warning.
                `AutoModel` copies its arguments temporarily: to save that memory, also pass
                `config=AutoConfig.from_pretrained(...)`.

        Raises:
            FrozenPartError: A frozen part is missing or has changed.
            ValueError: The bridge's weights do not match the configuration.
        """
        # Resolved once, so that all files come from one commit
        revision = resolve_revision(
            pretrained_model_name_or_path,
            kwargs.pop("revision", None),
            token=kwargs.get("token"),
            local_files_only=kwargs.get("local_files_only", False),
            cache_dir=kwargs.get("cache_dir"),
        )
        if revision is not None:
            kwargs["revision"] = revision
        hub_kwargs = {name: kwargs[name] for name in HUB_KEYWORDS if kwargs.get(name) is not None}
        bridge_only = getattr(config, "bridge_only", None)
        if bridge_only is None and pretrained_model_name_or_path is not None:
            try:
                config_dict, _ = PreTrainedConfig.get_config_dict(
                    config if isinstance(config, (str, os.PathLike)) else pretrained_model_name_or_path, **hub_kwargs
                )
                bridge_only = config_dict.get("bridge_only", False)
            except OSError:  # an adapter's folder, or a wrong name: left to the base class
                bridge_only = False
        # A state_dict is loaded as a whole model.
        if not bridge_only or kwargs.get("state_dict") is not None or pretrained_model_name_or_path is None:
            kwargs.pop("allow_mismatch", None)  # nothing is pinned
            if kwargs.get("quantization_config") is not None:
                kwargs["quantization_config"] = without_bridge(kwargs["quantization_config"])
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            # Loading replaces the parameters, and with them `requires_grad`.
            model._finish_quantization()
            model._freeze_as_configured()
            model._record_parts(*frozen_parts_of(model.config))
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
            "code_revision",
        ):
            kwargs.pop(name, None)
        allow_mismatch = kwargs.pop("allow_mismatch", False)
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
        if kwargs := with_effect(kwargs):
            raise TypeError(f"A bridge checkpoint is loaded without {', '.join(sorted(kwargs))}: not supported here.")
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        if attention is not None:
            set_attention(config, attention)

        overlay = config.trained_tensors or []
        quantized = part_to_quantize(frozen_parts_of(config), given) if quantization else None
        parts = {}
        for part in frozen_parts_of(config):
            part_config = config.vision_config if part == "vision_model" else config.text_config
            pin = (config.frozen_parts or {}).get(part)
            if given[part] is not None:
                check_part(part, given[part], part_config)
                parts[part] = given[part]
            elif not pin:
                raise FrozenPartError(
                    f"{path}/config.json is bridge_only but names no {part}; pass {part}=<a loaded model>."
                )
            else:
                extra = {"quantization_config": quantization} if part == quantized else {}
                extra.update((name, hub_kwargs[name]) for name in PART_KEYWORDS if name in hub_kwargs)
                trained = {name.removeprefix(f"{part}.") for name in overlay if name.startswith(f"{part}.")}
                parts[part] = load_frozen_part(part, pin, part_config, trained, allow_mismatch, dtype=dtype, **extra)

        with torch.device("meta"):  # initialising weights takes longer than loading the ones that replace them
            model = cls(config, **parts)
        shared = {part for part in FROZEN_PARTS if given[part] is not None}
        load_bridge_weights(
            model.bridge, path, model.all_tied_weights_keys, dtype, overlay_of(model, overlay), shared, **hub_kwargs
        )
        model.tie_weights()  # moving the bridge off the meta device has broken its ties
        model._freeze_as_configured().eval()
        if generation_config is None:
            try:
                generation_config = retried(GenerationConfig.from_pretrained, path, **hub_kwargs)
            except OSError:
                generation_config = model.generation_config
        model.generation_config = generation_config
        model.name_or_path = config.name_or_path = str(path)
        if device_map is not None:
            model.dispatch(device_map, **placement)
        else:
            model.place_beside_quantized()
        info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, info) if output_loading_info else model

    def dispatch(self, device_map: str | dict | torch.device, max_memory: dict | None = None, **kwargs) -> None:
        """Distribute a model that is in memory over devices, as `device_map` does during loading.

        Args:
            device_map: `"auto"`, `"balanced"`, `"balanced_low_0"` or `"sequential"`, a device, or a dict from module
                names to devices.
            max_memory: Memory that may be used per device, in bytes or as `"20GiB"`.
            kwargs: Passed on to `accelerate.dispatch_model`.
        """
        from accelerate import dispatch_model, infer_auto_device_map

        from ..compat import get_balanced_memory

        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            no_split = layers_not_to_split(self)
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
            dispatch_model(self, device_map, skip_keys=arguments_that_stay(self), **kwargs)


__all__ = ["BridgeCheckpointMixin", "load_bridge_weights", "overlay_of"]
