"""Conversion of official releases by their name in the catalogue."""

from __future__ import annotations

import os
from pathlib import Path

from ..catalogue import Release, fetch, needs_language
from ..certificate import CERTIFICATE, read_certificate
from ..files import write_json
from .convert_assembly import Conversion
from .convert_blip2 import convert_blip2
from .convert_llava import convert_llava
from .convert_openflamingo import convert_openflamingo


CONVERTERS = {"blip2": convert_blip2, "llava": convert_llava, "openflamingo": convert_openflamingo}


def convert_release(release: Release, output: str | os.PathLike, **given) -> Conversion:
    """Convert an official release, fetching the parts that belong to it.

    Args:
        release: An entry of the catalogue.
        output: Folder to write to.
        given: Parts to use instead of those that the catalogue names, and further arguments of the converter.

    Returns:
        The conversion that was done.

    Raises:
        ValueError: A part has to be given by the caller, or the parts don't fit together.
        OSError: A part can't be fetched.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if release.checkpoint is None:
        raise ValueError(f"{release.name} can't be converted as it is. {release.note}")
    if needs_language(release) and "language" not in given:
        raise ValueError(f"{release.name} needs its language model. {release.note}")
    options = {"config": dict(release.config)} if release.config else {}
    for name, part in (("vision", release.vision), ("language", release.language), ("tokenizer", release.tokenizer)):
        if part is not None and name not in given:
            options[name] = fetch(part)
    converter = CONVERTERS[release.family]
    conversion = converter(fetch(release.checkpoint), output=output, **{**options, **given})
    # the model's card tells what was published about the release
    path = Path(output) / CERTIFICATE
    write_json(path, {"release": release.name, **read_certificate(output)}, indent=1, ensure_ascii=False)
    return conversion


__all__ = ["convert_release"]
