"""Models of vlbridge as they were saved, opened for export: only names and shapes are read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..certificate import read_certificate
from ..compat import WeightRenaming, get_model_conversion_mapping, renamed
from ..configuration.configuration_bridged import BridgedConfig
from ..modeling.modeling_pins import find_frozen_part, frozen_parts_of
from .convert_assembly import OFFICIAL, Conversion, assemble, expected_tensors
from .convert_files import Stored, TensorFiles
from .convert_language import language_table
from .convert_sources import Renamed
from .convert_tables import ConversionError, Rename, plan
from .convert_vision import vision_pieces


class Tensors:
    """The tensors of a conversion as a checkpoint, under their names in the converted model.

    Args:
        conversion: The conversion.
        path: Where its model lies, for errors.
    """

    def __init__(self, conversion: Conversion, path: str):
        self.conversion, self.path = conversion, path
        self.shapes = {name: conversion.shape(name) for name in conversion.pieces}
        self.dtypes = {name: conversion.dtype(name) for name in conversion.pieces}

    def stored(self, name: str) -> Stored | torch.Tensor:
        """Where a tensor lies in a file, or the tensor itself if it has to be computed."""
        files, piece, change = self.conversion.pieces[name]
        return files.stored(piece.sources[0]) if piece.whole and change is None else self.read(name)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor, as the converted model has it."""
        return self.conversion.load(name)

    def origin(self, name: str):
        """The checkpoint that a tensor is read from."""
        files, piece, _ = self.conversion.pieces[name]
        return files.origin(piece.sources[0])


@dataclass
class Saved:
    """A saved model of vlbridge, with the files beside its weights.

    Args:
        place: Folder or Hub id.
        conversion: Where its tensors come from.
        tensors: Its tensors, as a checkpoint.
        processor: Its processor.
        generation: Its generation defaults.
        certificate: The certificate of the conversion that made it; empty if there is none.
    """

    place: str
    conversion: Conversion
    tensors: Tensors
    processor: ProcessorMixin
    generation: GenerationConfig | None
    certificate: dict

    @property
    def config(self) -> BridgedConfig:
        """The configuration of the saved model."""
        return self.conversion.config

    @property
    def released(self) -> set[str]:
        """Names of the tensors that came from an official checkpoint; empty if it was not converted from one."""
        if self.certificate.get("from") != OFFICIAL:
            return set()
        files = set(self.certificate["checkpoint"])
        return {name for name, about in self.certificate["tensors"].items() if about["from"] in files}


def model_type_of(place: str | os.PathLike) -> str | None:
    """The `model_type` of the model in a folder or Hub repository.

    Raises:
        ConversionError: There is no model.
    """
    try:
        return PreTrainedConfig.get_config_dict(place)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{place} can't be exported: {str(error).splitlines()[0]}") from error


def current_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Map names in files to a model's own names: transformers saves some models under their former names.

    Args:
        model: The model, on the meta device.
        keys: Names of the tensors in its files.

    Returns:
        From the names in files to the model's.
    """
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    own = set(model.state_dict())
    return {key: key if key in own else renamed(key, renamings) for key in keys}


def open_saved(place: str | os.PathLike) -> Saved:
    """Open a full model of vlbridge, or a bridge with the frozen parts that it names.

    Args:
        place: Folder or Hub id.

    Raises:
        ConversionError: It is not a model of vlbridge, or its tensors do not match its configuration.
        FrozenPartError: A frozen part is missing or changed.
    """
    place, kind = os.fspath(place), model_type_of(place)
    config = AutoConfig.from_pretrained(place)
    if not isinstance(config, BridgedConfig):
        raise ConversionError(f"{place} holds a {kind}; expected a model of vlbridge.")
    files = TensorFiles(place)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    expected = expected_tensors(model, files.shapes)
    tied = [name for name in model.all_tied_weights_keys if name not in expected]
    bridge = [name for name in files.shapes if name.startswith("bridge.")]
    sources = [(files, plan([Rename(name, name) for name in bridge], bridge), {})]
    for part in frozen_parts_of(config):
        prefix = f"{part}."
        if config.bridge_only:
            where, hub_kwargs = find_frozen_part(part, (config.frozen_parts or {}).get(part) or {})
            inside = TensorFiles(where, **hub_kwargs)
        else:
            inside = Renamed(files, {key: key.removeprefix(prefix) for key in files.shapes if key.startswith(prefix)})
        inside = Renamed(inside, current_names(getattr(model, part), inside.shapes))
        names = [name for name in expected if name.startswith(prefix)]
        if part == "vision_model":
            pieces = vision_pieces(inside, names)
        else:
            pieces = plan(language_table(config.text_config, names, tied), inside.shapes)
        sources.append((inside, pieces, {}))
    conversion = assemble(config, model, expected, sources, place)
    try:
        generation = GenerationConfig.from_pretrained(place)
    except OSError:
        generation = None
    return Saved(
        place, conversion, Tensors(conversion, place), AutoProcessor.from_pretrained(place), generation,
        read_certificate(place) if os.path.isdir(place) else {},
    )  # fmt: skip


__all__ = ["Saved", "Tensors", "current_names", "model_type_of", "open_saved"]
