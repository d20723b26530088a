"""Documents in which images and text alternate: OBELICS and MMC4."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator
from pathlib import Path

from .training_rows import as_object, read_json, read_rows
from .training_sources_common import absolute_folder, build_dataset, field_value, find_files, text_value


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

        def located(value, root=root):
            if isinstance(value, dict):
                return value
            value = place_of.get(value, value)
            return {"path": value if "://" in value else os.path.join(root, value), "bytes": None}

        for number, (place, row) in enumerate(read_rows(Path(file))):
            if "text_list" in row:
                parts = _mmc4_parts(row, place, min_similarity)
            elif {"images", "texts"} <= row.keys():
                parts = _obelics_parts(row, place)
            else:
                raise ValueError(
                    f"{place} has {', '.join(row)}; expected images and texts (OBELICS) or text_list and image_info "
                    "(MMC4)."
                )
            values, document = [], []
            for image, text in parts:
                if image is not None:
                    values.append(located(image))
                    document.append({"type": "image", "text": None})
                elif document and document[-1]["type"] == "text":
                    document[-1]["text"] += f" {text}"
                else:
                    document.append({"type": "text", "text": text})
            yield {"id": str(row.get("id", number)), "source": source, "images": values, "document": document}


def _obelics_parts(row: dict, place: str) -> Iterator[tuple]:
    images, texts = row["images"], row["texts"]
    if len(images) != len(texts):
        raise ValueError(f"{place} has {len(images)} images and {len(texts)} texts; expected lists of one length.")
    for number, (image, text) in enumerate(zip(images, texts)):
        if (image is None) == (text is None):
            raise ValueError(f"{place}: place {number} has {'nothing' if image is None else 'an image and a text'}.")
        yield image, None if text is None else text_value(text, place, "text")


def _mmc4_parts(row: dict, place: str, min_similarity: float | None) -> Iterator[tuple]:
    sentences = row["text_list"]
    before: dict[int, list] = {}
    for image in field_value(row, "image_info", place):
        index = field_value(image, "matched_text_index", place)
        if not 0 <= index < len(sentences):
            raise ValueError(f"{place}: matched_text_index is {index}; expected 0 to {len(sentences) - 1}.")
        if min_similarity is not None and field_value(image, "matched_sim", place) < min_similarity:
            continue
        if image.get("image_base64"):
            value = {"path": None, "bytes": _base64_bytes(image["image_base64"], place)}
        else:
            value = image.get("image_name") or field_value(image, "raw_url", place)
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
