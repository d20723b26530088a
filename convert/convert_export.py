"""Export of models of vlbridge to transformers' own classes and to the official layouts.

The tables are those of the import, inverted.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..configuration.configuration_classification import ClassificationConfigMixin
from ..configuration.configuration_flamingo import PerceiverFlamingoConfig
from ..configuration.configuration_llava import MLPLlavaConfig
from .convert_assembly import Conversion
from .convert_blip2_transformers import plan_port, run_port
from .convert_llava_transformers import plan_llava
from .convert_official import write_official, write_official_blip
from .convert_runs import run_llava
from .convert_saved import Saved, model_type_of, open_saved
from .convert_tables import ConversionError


TARGETS = ("transformers", "official")


def export(
    model: str | os.PathLike, output: str | os.PathLike, to: str = "transformers", verify: bool = True
) -> Conversion:
    """Write a model of vlbridge in a layout that does not need vlbridge.

    Args:
        model: Folder or Hub id of a full model, or of a bridge that names its frozen parts.
        output: The folder to write: a new one, or an empty one.
        to: `"transformers"` writes a folder of transformers' own class, with processor, tokenizer and generation
            defaults; `"official"` writes the layout of the family's own code.
        verify: Whether to check what was written; see `certify`.

    Returns:
        The conversion; its `notes` say what differs.

    Raises:
        ConversionError: The target can't express the model, or its outputs differ; nothing is written.
    """
    if to not in TARGETS:
        raise ConversionError(f"to is {to!r}; expected one of {', '.join(TARGETS)}.")
    if to == "official" and model_type_of(model) == "blip":
        return write_official_blip(model, output, verify)
    saved = open_saved(model)
    config = saved.config
    if isinstance(config, ClassificationConfigMixin):
        raise ConversionError(
            f"{model} is a classifier, for which there is no other layout. `vlbridge push` publishes it as it is, and "
            "pipeline('image-classification') loads it where vlbridge is installed."
        )
    if to == "official":
        return write_official(saved, output, verify)
    if isinstance(config, PerceiverFlamingoConfig):
        raise ConversionError(
            "Transformers has no class for Perceiver-Flamingo. What can be done: --to official writes OpenFlamingo's "
            "layout; save_pretrained(bridge_only=True) makes a repository that AutoModel loads where vlbridge is "
            "installed."
        )
    if isinstance(config, MLPLlavaConfig):
        conversion, processor = plan_llava(saved)
        model_class = type(conversion.model)
        conversion.run = lambda folder: run_llava(saved.place, folder, model_class)
    else:
        conversion, processor = plan_port(saved.conversion, saved.tensors, saved.processor, saved.generation)
        conversion.run = lambda folder: run_port(saved.place, folder, config)
    conversion.direction = ("vlbridge", f"transformers' {type(conversion.model).__name__}")
    conversion.write(output, saved.generation, processor, verify, card=_card(saved, type(conversion.model).__name__))
    return conversion


def _card(saved: Saved, name: str) -> str:
    """The beginning of the exported folder's README.md."""
    task = "AutoModel" if "Retrieval" in name else "AutoModelForImageTextToText"
    label = saved.place if not os.path.exists(saved.place) else Path(saved.place).resolve().name
    head = "---\nlibrary_name: transformers\n" + ("pipeline_tag: image-text-to-text\n" if task != "AutoModel" else "")
    return (
        f"{head}---\n\n# {label}\n\nA {saved.config.model_type} model, exported to transformers' own `{name}`: it "
        "loads with "
        f"`{name if task == 'AutoModel' else task}` and `AutoProcessor`.\n"
    )


__all__ = ["TARGETS", "export"]
