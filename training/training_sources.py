"""Published layouts of training data, read as records: see `training_data`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from .training_sources_annotations import load_coco_captions, load_llava, load_vqav2
from .training_sources_datasets import CAPTION_KEYS, load_hub, load_imagefolder
from .training_sources_easy_vqa import load_easy_vqa
from .training_sources_interleaved import load_interleaved
from .training_sources_webdataset import load_webdataset


#: Loaders by name: `loader(path, split=None, streaming=False, **options)`.
SOURCES = {
    "llava": load_llava,
    "coco_captions": load_coco_captions,
    "vqav2": load_vqav2,
    "imagefolder": load_imagefolder,
    "webdataset": load_webdataset,
    "interleaved": load_interleaved,
    "easy_vqa": load_easy_vqa,
    "hub": load_hub,
}


def load(
    source: str,
    path: str | os.PathLike | Sequence | None = None,
    split: str | None = None,
    streaming: bool = False,
    **options,
) -> Dataset | IterableDataset:
    """Load a data set as records.

    Args:
        source: A key of `SOURCES`.
        path: Where it is; the source's loader says what it may be.
        split: A part of it, for sources that have parts.
        streaming: Read it while it is used, instead of once into the cache of `datasets`. Order and content are the
            same.
        options: Further arguments of the source's loader.

    Returns:
        A data set of records, see `training_data`; an `IterableDataset` if it is streamed.

    Raises:
        ValueError: There is no such source, option or split, or the files are not as expected.
        OSError: The files can't be read.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}; expected one of {', '.join(SOURCES)}.")
    try:
        return SOURCES[source](path, split=split, streaming=streaming, **options)
    except DatasetGenerationError as error:
        # the error of a generator of ours, without the library's own around it
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"source {source!r}: {error}.") from error


__all__ = [
    "CAPTION_KEYS",
    "SOURCES",
    "load",
    "load_coco_captions",
    "load_easy_vqa",
    "load_hub",
    "load_imagefolder",
    "load_interleaved",
    "load_llava",
    "load_vqav2",
    "load_webdataset",
]
