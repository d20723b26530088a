"""Documents in which images and text alternate: OBELICS and MMC4."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator
from pathlib import Path

from .training_rows import as_object, read_json, read_rows
from .training_sources_common import (
    absolute_folder,
    build_dataset,
    field_value,
    find_files,
    id_value,
    list_value,
    record_or_reason,
    text_value,
)


def load_interleaved(
    path, split=None, streaming=False, images=None, downloaded=None, min_similarity=None, source="interleaved"
):
    """Documents of images and text, in the layout of OBELICS or MMC4, in JSON, JSON Lines or Parquet.

    OBELICS has parallel lists `images` and `texts`, one of both `None` at each place; images are addresses, paths or
    `{"path", "bytes"}`. MMC4 has `text_list` and `image_info` (`image_name`, `raw_url`, `matched_text_index`, or the
    image itself in `image_base64`); an image stands before its sentence, as in Flamingo's training. Sentences between
    two images are joined by a space.

    Args:
        path: The file, or a folder of such files.
        split: In a folder: take the files whose names begin with this.
        streaming: Read the files while the data set is used.
        images: Folder that image paths are relative to; by default the file's own.
        downloaded: JSON file that holds an object from addresses to files, for images that the data set names by
            address.
        min_similarity: MMC4: images that match their sentence less than this (`matched_sim`) are left out.
        source: What the records' column `source` says.

    Raises:
        ValueError: The files are not as expected.
        OSError: They can't be read.

    Source: the data set card of `HuggingFaceM4/OBELICS`; the README of `allenai/mmc4`; `preprocess_interleaved` in
    `open_flamingo/train/data.py`.
    """
    files = find_files(path, split, (".json", ".jsonl", ".jsonl.gz", ".parquet"))
    return build_dataset(
        _interleaved,
        files,
        "document",
        streaming,
        images=absolute_folder(images),
        downloaded=absolute_folder(downloaded),
        min_similarity=min_similarity,
        source=source,
    )


def _interleaved(files, images, downloaded, min_similarity, source) -> Iterator[dict]:
    place_of = {} if downloaded is None else as_object(read_json(Path(downloaded)), downloaded)
    for file in files:
        root = images or os.path.dirname(file)

        def located(value, place, root=root) -> dict:
            if isinstance(value, dict):
                path, data = value.get("path"), value.get("bytes")
                if data is not None and not isinstance(data, bytes):
                    raise ValueError(f"{place}: bytes of an image are a {type(data).__name__}; expected bytes.")
                return {"path": None if path is None else text_value(path, place, "path"), "bytes": data}
            value = text_value(value, place, "image")
            value = text_value(place_of.get(value, value), place, f"what {downloaded} says of {value}")
            return {"path": value if "://" in value else os.path.join(root, value), "bytes": None}

        def record(row, number, place, located=located) -> dict:
            values, document = [], []
            for image, text in _parts(as_object(row, place), place, min_similarity):
                if image is not None:
                    values.append(located(image, place))
                    document.append({"type": "image", "text": None})
                elif document and document[-1]["type"] == "text":
                    document[-1]["text"] += f" {text}"
                else:
                    document.append({"type": "text", "text": text})
            return {"id": id_value(row, number, place), "source": source, "images": values, "document": document}

        for number, (place, row) in enumerate(read_rows(Path(file), checked=False)):
            yield record_or_reason(record, row, number, place, number=number, source=source)


def _parts(row: dict, place: str, min_similarity: float | None) -> Iterator[tuple]:
    """Images and texts of a document in their order: `(image, None)` or `(None, text)`."""
    if "text_list" in row:
        return _mmc4_parts(row, place, min_similarity)
    if {"images", "texts"} <= row.keys():
        return _obelics_parts(row, place)
    raise ValueError(
        f"{place} has {', '.join(map(str, row))}; expected images and texts (OBELICS) or text_list and image_info "
        "(MMC4)."
    )


def _obelics_parts(row: dict, place: str) -> Iterator[tuple]:
    images, texts = list_value(row["images"], place, "images"), list_value(row["texts"], place, "texts")
    if len(images) != len(texts):
        raise ValueError(f"{place} has {len(images)} images and {len(texts)} texts; expected lists of one length.")
    for number, (image, text) in enumerate(zip(images, texts)):
        if (image is None) == (text is None):
            raise ValueError(f"{place}: place {number} has {'nothing' if image is None else 'an image and a text'}.")
        yield image, None if text is None else text_value(text, place, "text")


def _mmc4_parts(row: dict, place: str, min_similarity: float | None) -> Iterator[tuple]:
    sentences = list_value(row["text_list"], place, "text_list")
    before: dict[int, list] = {}
    for image in list_value(field_value(row, "image_info", place), place, "image_info"):
        index = field_value(image, "matched_text_index", f"{place}, image_info")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(sentences):
            raise ValueError(f"{place}: matched_text_index is {index!r}; expected 0 to {len(sentences) - 1}.")
        if min_similarity is not None:
            similarity = field_value(image, "matched_sim", f"{place}, image_info")
            if not isinstance(similarity, (int, float)):
                raise ValueError(f"{place}: matched_sim is {similarity!r}; expected a number.")
            if similarity < min_similarity:
                continue
        if image.get("image_base64"):
            value = {"path": None, "bytes": _base64_bytes(image["image_base64"], place)}
        else:
            name = image.get("image_name") or field_value(image, "raw_url", f"{place}, image_info")
            value = text_value(name, place, "image_name" if image.get("image_name") else "raw_url")
        before.setdefault(index, []).append(value)
    for index, sentence in enumerate(sentences):
        yield from ((image, None) for image in before.get(index, ()))
        yield None, text_value(sentence, place, "text_list")


def _base64_bytes(text, place: str) -> bytes:
    try:
        return base64.b64decode(text_value(text, place, "image_base64"))
    except binascii.Error as error:
        raise ValueError(f"{place}: image_base64 can't be decoded: {error}.") from error


__all__ = ["load_interleaved"]
