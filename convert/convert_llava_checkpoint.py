"""LLaVA's checkpoints as they are found on disk or on the Hub: weights, adapters and what configuration files say."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from ..compat import optional_file
from .convert_files import TensorFiles, dimensions
from .convert_language import lora_changes, text_config_of
from .convert_llava_names import (
    EMBEDDING,
    IMAGE_BORDERS,
    LLAVA_LANGUAGE_MODELS,
    PREFIXES,
    layout_of,
    projector_layers,
    usual_names,
)
from .convert_sources import Change, Merged, Renamed
from .convert_tables import ConversionError, Shapes


# fields of the official configuration that are not the language model's
LLAVA_FIELDS = re.compile(
    r"(un)?(freeze|tune)_mm_.*|(mm|use_mm|image|tokenizer)_.*|architectures|_name_or_path|transformers_version"
)
WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


def find_file(place: str | os.PathLike, name: str) -> Path | None:
    """A file of a folder or Hub repository; `None` if it does not have it."""
    found = optional_file(place, name, gated_is_missing=True)
    return None if found is None else Path(found)


def read_fields(place: str | os.PathLike, name: str) -> dict:
    """Read a JSON file of a folder or Hub repository; empty if there is none.

    Raises:
        ConversionError: It does not hold a JSON object.
    """
    path = find_file(place, name)
    if path is None:
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{path} holds a {type(fields).__name__}, expected an object.")
    return fields


@dataclass
class Checkpoint:
    """Weights under the usual names of their layout, with the settings beside them.

    Args:
        files: The tensors.
        fields: The fields of `config.json`; empty if there is none.
        place: The folder or Hub id; `None` for a file without a `config.json` beside it.
        lora: Changes that a LoRA adapter makes to the language model's weights, by their usual names.
        base: Name of the model that the adapter was trained on.
        layout: See `layout_of`; `None` detects it.
    """

    files: Renamed
    fields: dict = field(default_factory=dict)
    place: str | None = None
    lora: dict[str, Change] = field(default_factory=dict)
    base: str | None = None
    layout: str | None = None

    def __post_init__(self):
        keys = [*self.files.shapes, *self.lora]
        if self.layout is None:
            self.layout = layout_of(keys)
        self.files = Renamed(self.files, usual_names(self.files.shapes, self.layout))
        names = usual_names(self.lora, self.layout)
        self.lora = {names[key]: change for key, change in self.lora.items()}

    def has(self, part: str) -> bool:
        """Whether the checkpoint holds a part of the model.

        Args:
            part: `"language"`, `"vision"` or `"projector"`.
        """
        start = {
            "language": PREFIXES[self.layout][0] + r"model\.layers\.",
            "vision": PREFIXES[self.layout][1].replace(".", r"\."),
            "projector": r"model\.mm_projector\.|multi_modal_projector\.",
        }[part]
        return any(re.match(start, key) for key in self.files.shapes)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a checkpoint; only names and shapes are read.

    Args:
        path: `mm_projector.bin` or another file of tensors, a folder, or a Hub id.

    Raises:
        ConversionError: There are no weights, or they can't be read.
    """
    path = os.fspath(path)
    try:
        if os.path.isfile(path):
            place = os.path.dirname(path) or "."
            if not os.path.basename(path).startswith(("adapter_model.", "non_lora_trainables.")):
                fields = read_fields(place, "config.json")
                return Checkpoint(TensorFiles(path), fields, place if fields else None)
            path = place
        fields, settings = read_fields(path, "config.json"), read_fields(path, "adapter_config.json")
        if settings:
            return _open_lora(path, fields, settings)
        if not any(find_file(path, name) for name in WEIGHTS) and (projector := find_file(path, "mm_projector.bin")):
            return Checkpoint(TensorFiles(projector), fields, path)
    except OSError as error:
        raise ConversionError(f"{path}: {str(error).splitlines()[0]}") from error
    return Checkpoint(TensorFiles(path), fields, path)


def _open_lora(path: str, fields: dict, settings: dict) -> Checkpoint:
    adapter = find_file(path, "adapter_model.safetensors") or find_file(path, "adapter_model.bin")
    if adapter is None:
        raise ConversionError(f"{path} has an adapter_config.json, but neither adapter_model.safetensors nor .bin.")
    adapter = TensorFiles(adapter)
    # weights that were trained without LoRA may be in either file
    trained = Renamed(adapter, {key: key for key in adapter.shapes if "lora_" not in key})
    if (rest := find_file(path, "non_lora_trainables.bin")) is not None:
        trained = Merged(TensorFiles(rest), trained)
    base = settings.get("base_model_name_or_path") or fields.get("_name_or_path") or None
    return Checkpoint(trained, fields, path, lora_changes(adapter, settings), base)


def infer_text_config(fields: Mapping, where: str) -> PreTrainedConfig:
    """The language model's configuration.

    Args:
        fields: The fields of `config.json`: LLaVA's, in either layout, or the language model's own.
        where: Name of the file, for errors.

    Raises:
        ConversionError: No release of LLaVA has such a language model.
    """
    if "text_config" in fields:
        return transformers_config(fields, where).text_config
    kind = str(fields.get("model_type"))
    if kind not in LLAVA_LANGUAGE_MODELS:
        if kind.startswith("llava"):
            raise ConversionError(f"{where}: {kind} is not known; expected one of {', '.join(LLAVA_LANGUAGE_MODELS)}.")
        return text_config_of(fields, where)
    own = {name: value for name, value in fields.items() if not LLAVA_FIELDS.fullmatch(name)}
    return text_config_of({**own, "model_type": LLAVA_LANGUAGE_MODELS[kind]}, where)


def transformers_config(fields: Mapping, where: str) -> PreTrainedConfig:
    """The configuration of one of transformers' own LLaVA classes.

    Args:
        fields: The fields of `config.json`.
        where: Name of the file, for errors.

    Raises:
        ConversionError: It is of another class.
    """
    kind = fields.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise ConversionError(f"{where}: the model is a {kind}; expected llava or llava_next.")
    fields = {name: value for name, value in fields.items() if name != "model_type"}
    return AutoConfig.for_model(kind, **fields)


def infer_projector(shapes: Shapes, layout: str, declared: str | None = None) -> dict:
    """The fields of `MLPLlavaConfig` that describe the projector.

    Args:
        shapes: The checkpoint's shapes, by the usual names of its layout.
        layout: See `layout_of`.
        declared: What `config.json` calls the projector; `None` if it does not say.

    Raises:
        ConversionError: There is no projector, or it is of an unknown kind.
    """
    layers = projector_layers(shapes, layout)
    if declared is not None and not re.fullmatch(r"identity|linear|mlp\d+x_gelu", declared):
        raise ConversionError(
            f"The configuration names the projector {declared!r}; expected identity, linear or mlpNx_gelu."
        )
    if not layers:
        if declared == "identity":
            return {"projector_type": "identity"}
        raise ConversionError(
            "There is no projector in the checkpoint (mm_projector or multi_modal_projector): it is not one of "
            "LLaVA's, or only a part of one."
        )
    linear = layers == ["model.mm_projector"]
    found = {
        "projector_type": "linear" if linear else f"mlp{len(layers)}x_gelu",
        "projector_bias": any(f"{layer}.bias" in shapes for layer in layers),
    }
    first, last = (dimensions(shapes, f"{layers[end]}.weight", 2)[0] for end in (0, -1))
    if len(layers) > 1 and first != last:
        found["projector_hidden_size"] = first
    return found


def _official_options(fields: Mapping) -> tuple[dict, str]:
    """Fields of `MLPLlavaConfig` from the official configuration, and the image aspect ratio."""
    ratio = fields.get("image_aspect_ratio") or "square"
    if ratio not in ("square", "pad", "anyres"):
        raise ConversionError(f"config.json has image_aspect_ratio {ratio!r}; expected square, pad or anyres.")
    select = {"patch": "patch", "cls_patch": "full"}.get(fields.get("mm_vision_select_feature", "patch"))
    if select is None:
        raise ConversionError(
            f"config.json has mm_vision_select_feature {fields['mm_vision_select_feature']!r}; expected patch or "
            "cls_patch."
        )
    options = {
        "vision_feature_layer": fields.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": select,
        "patch_merge_type": fields.get("mm_patch_merge_type") or "flat",
    }
    if ratio == "anyres":
        given = fields.get("image_grid_pinpoints")
        try:
            pinpoints = ast.literal_eval(given) if isinstance(given, str) else given
            # the official pairs are (width, height)
            options["image_grid_pinpoints"] = [[int(height), int(width)] for width, height in pinpoints]
        except (SyntaxError, TypeError, ValueError) as error:
            raise ConversionError(
                f"config.json has image_aspect_ratio 'anyres' and image_grid_pinpoints {given!r}; expected a list of "
                "(width, height) in pixels."
            ) from error
    return options, ratio


def _transformers_options(fields: Mapping, images: Mapping, where: str) -> tuple[dict, str]:
    """Fields of `MLPLlavaConfig` from transformers' configurations of model and images, and the image aspect ratio."""
    config = transformers_config(fields, where)
    if config.projector_hidden_act != "gelu":
        raise ConversionError(f"{where} has projector_hidden_act {config.projector_hidden_act!r}; expected gelu.")
    options = {
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": {"default": "patch"}.get(
            config.vision_feature_select_strategy, config.vision_feature_select_strategy
        ),
    }
    if config.model_type == "llava_next":
        pinpoints = [list(pinpoint) for pinpoint in config.image_grid_pinpoints]  # (height, width) here
        return {**options, "image_grid_pinpoints": pinpoints, "patch_merge_type": "spatial_unpad"}, "anyres"
    padded = "Llava" in images.get("image_processor_type", "") and images.get("do_pad")
    return options, "pad" if padded else "square"


def image_fields(place: str | os.PathLike) -> dict:
    """The fields of an image processor, from its own file or, since transformers 5, from the processor's."""
    own = read_fields(place, "preprocessor_config.json")
    return own or read_fields(place, "processor_config.json").get("image_processor", {})


@dataclass
class Settings:
    """What the configuration files of a checkpoint and its language model say.

    Args:
        place: Folder or Hub id of the `config.json` that tells about the bridge.
        fields: Its fields.
        native: Whether it is one of transformers' own classes.
        options: The fields of `MLPLlavaConfig` that follow from it.
        image_aspect_ratio: How images are fitted to the encoder's square: `"square"`, `"pad"` or `"anyres"`.
        text_config: The language model's configuration.
        projector_only: Whether the checkpoint is a projector, beside a language model that stayed frozen.
    """

    place: str
    fields: dict
    native: bool
    options: dict
    image_aspect_ratio: str
    text_config: PreTrainedConfig
    projector_only: bool

    @property
    def where(self) -> str:
        """Name of the configuration file, for errors."""
        return f"{self.place}/config.json"

    @property
    def borders(self) -> tuple[str, ...]:
        """The tokens around an image: `<im_start>` and `<im_end>`, or none."""
        return IMAGE_BORDERS if self.fields.get("mm_use_im_start_end") else ()


def read_settings(release: Checkpoint, base: Checkpoint | None) -> Settings:
    """Read what the configuration files say.

    Args:
        release: LLaVA's checkpoint.
        base: The language model that it belongs to; `None` if it holds its own.

    Raises:
        ConversionError: There is no configuration, or it has values that are not known.
    """
    source = release if release.fields else base
    if source is None:
        raise ConversionError(f"There is no config.json beside {release.files.path}, which a whole model needs.")
    projector_only = base is not None and not release.lora
    fields, native, where = source.fields, "text_config" in source.fields, f"{source.place}/config.json"
    if native:
        options, ratio = _transformers_options(fields, image_fields(source.place), where)
    else:
        options, ratio = _official_options(fields)
        if projector_only and EMBEDDING in release.files.shapes:
            fields = {**fields, "mm_use_im_start_end": True}  # the table is there because of these tokens' rows
    described = base if projector_only else source
    text_config = infer_text_config(described.fields, f"{described.place}/config.json")
    return Settings(source.place, fields, native, options, ratio, text_config, projector_only)


__all__ = [
    "Checkpoint",
    "Settings",
    "find_file",
    "image_fields",
    "infer_projector",
    "infer_text_config",
    "open_checkpoint",
    "read_fields",
    "read_settings",
    "transformers_config",
]
