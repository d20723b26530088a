"""Data sets that `datasets` reads itself: image folders, folders of `save_to_disk`, and repositories of the Hub."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from ..compat import resolve_features
from .training_records import FEATURES, KINDS
from .training_rows import as_object, read_rows
from .training_sources_common import (
    CODE,
    build_dataset,
    content_of_text,
    field_value,
    key_value,
    list_value,
    record_or_reason,
    text_message,
    text_value,
)


CAPTION_KEYS = ("caption", "text")


def load_imagefolder(path, split=None, streaming=False, caption=None, source="imagefolder"):
    """A folder of images with `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, or with a subfolder per class.

    Metadata name the image in `file_name` (several in `file_names`). A record is made of the columns `messages` or
    `document` in the record's own form, of `question` and `answer`, or of a caption. `label` (a number, or a text: then
    a class) and `notes` (text) stay columns; with `label` alone the record is of no kind. A wrong row of
    `metadata.jsonl` makes a record that says why it is broken; the other two have one type per column, and `datasets`
    refuses them as a whole.

    Args:
        path: The folder.
        split: A split of the folder, as `datasets` finds it; by default `"train"`, which is everything if there are no
            splits.
        streaming: Read the folder while the data set is used.
        caption: Column of the metadata that is the caption; by default the first of `CAPTION_KEYS` that there is.
        source: What the records' column `source` says.

    Raises:
        ValueError: It is not a folder, or the metadata have none of these columns.

    Source: "imagefolder" in the documentation of `datasets`.
    """
    if path is None or not os.path.isdir(os.path.expanduser(path)):
        raise ValueError(f"path is {path!r}; expected a folder of images.")
    folder = os.path.abspath(os.path.expanduser(path))
    if files := _lines_of_folder(folder, split or "train"):
        return _load_lines(files, folder, streaming, caption, source)
    loaded = _without_decoding(
        load_dataset("imagefolder", data_dir=folder, split=split or "train", streaming=streaming)
    )
    columns = loaded.features
    caption = _caption_column(columns, caption, folder)
    if "label" in columns and not isinstance(columns["label"], (Value, ClassLabel)):
        raise ValueError(f"{folder}: label is {columns['label']}; expected a text or a whole number per row.")
    form = _form_of(columns, caption, folder)
    extra, classes = {}, None
    if "label" in columns:
        extra["label"] = columns["label"]
        if getattr(columns["label"], "dtype", None) in ("string", "large_string"):
            labels = loaded["label"] if isinstance(loaded, Dataset) else (row["label"] for row in loaded)
            classes = sorted({label for label in labels if label is not None})
            extra["label"] = ClassLabel(names=classes)
    if "notes" in columns:
        extra["notes"] = Value("string")
    convert = partial(_folder_record, folder=folder, form=form, caption=caption, classes=classes, source=source)
    return _converted(loaded, convert, _kind_of_form(form), extra)


def _form_of(columns, caption: str | None, folder: str) -> str | None:
    """What records are made of: messages, a document, a question and its answer, a caption, or nothing but a class.

    Raises:
        ValueError: There are no columns for any of these.
    """
    form = next((name for name in ("messages", "document") if name in columns), None)
    form = form or ("question" if {"question", "answer"} <= columns.keys() else "caption" if caption else None)
    if form is None and "label" not in columns:
        raise ValueError(
            f"{folder}: the metadata have {', '.join(columns)}; expected a caption ({', '.join(CAPTION_KEYS)}, or the "
            "option caption=COLUMN), question and answer, messages, document, or classes."
        )
    return form


def _kind_of_form(form: str | None) -> str | None:
    return "messages" if form == "question" else form


def _lines_of_folder(folder: str, split: str) -> list[str]:
    """The files `metadata.jsonl` of a split; none if `datasets` has to read the folder."""
    if not any(Path(folder).rglob("metadata.jsonl")):
        return []
    files = (load_dataset_builder("imagefolder", data_dir=folder).config.data_files or {}).get(split, [])
    others = [file for file in files if str(file).lower().endswith((".zip", "metadata.csv", "metadata.parquet"))]
    return [] if others else [str(file) for file in files if os.path.basename(file) == "metadata.jsonl"]


def _load_lines(files: list[str], folder: str, streaming: bool, caption: str | None, source: str):
    """Records of `metadata.jsonl`: `datasets` would refuse all rows for one of another type, without naming it."""
    columns: dict[str, None] = {}
    labels: Counter = Counter()
    for file in files:
        for _, row in read_rows(Path(file), checked=False):
            if isinstance(row, dict):
                columns.update(dict.fromkeys(row))
                labels.update([row["label"]] if isinstance(row.get("label"), (str, int, float)) else [])
    if not columns:
        raise ValueError(f"{', '.join(files)}: there are no records.")
    caption = _caption_column(columns, caption, folder)
    form, extra, classes = _form_of(columns, caption, folder), {}, None
    if "label" in columns:
        names = {label: count for label, count in labels.items() if isinstance(label, str)}
        if 2 * sum(names.values()) > labels.total():  # wrong ones among numbers don't make classes of them
            classes = tuple(sorted({text_value(name, folder, "label") for name in names}))
        extra["label"] = Value("int64") if classes is None else ClassLabel(names=list(classes))
    if "notes" in columns:
        extra["notes"] = Value("string")
    return build_dataset(
        _folder_lines, files, _kind_of_form(form), streaming, extra, folder=folder, form=form, caption=caption,
        classes=classes, source=source,
    )  # fmt: skip


def _folder_lines(files, folder, form, caption, classes, source) -> Iterator[dict]:
    number = 0
    for file in files:
        for place, row in read_rows(Path(file), checked=False):
            yield record_or_reason(
                _record_of_line, row, place, number, os.path.dirname(file), folder, form, caption, classes, source,
                number=f"{os.path.relpath(file, folder)}, {place.rpartition(', ')[2]}", source=source,
            )  # fmt: skip
            number += 1


def _record_of_line(row, place, number, beside, folder, form, caption, classes, source) -> dict:
    images = [os.path.join(beside, name) for name in _image_names(row, place)]
    name = os.path.relpath(images[0], folder) if images else number
    record = _folder_texts(row, images, name, form, caption, source, place)
    if row.get("label") is not None:
        record["label"] = _label_of(row["label"], classes, place)
    if row.get("notes") is not None:
        record["notes"] = _plain_text(row["notes"], place, "notes")
    return record


def _image_names(row, place: str) -> list[str]:
    """Paths of a row's images, below the folder of its metadata."""
    keys = as_object(row, place).keys()
    named = [key for key in keys if key in ("file_name", "file_names") or key.endswith(("_file_name", "_file_names"))]
    if not named:
        raise ValueError(f"{place} has {', '.join(row) or 'nothing'}; expected 'file_name' among them.")
    key = "file_names" if row.get("file_names") is not None else "file_name"
    values = list_value(row[key], place, key) if key == "file_names" else [row[key]] if key in row else []
    names = [os.path.normpath(text_value(value, place, key) or ".") for value in values]
    for name, value in zip(names, values):
        if os.path.isabs(name) or name.split(os.sep)[0] in ("..", ".") or "://" in value or "\0" in value:
            raise ValueError(f"{place}: {key} is {value!r}; expected the path of a file below the metadata's folder.")
    return names


def _label_of(value, classes: tuple[str, ...] | None, place: str) -> int:
    if classes is not None:
        return classes.index(text_value(value, place, "label"))
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{place}: label is {value!r}; expected a whole number of 64 bits.")
    return int(value)


def _folder_record(row, index, folder, form, caption, classes, source, code) -> dict:
    images = _images_of(row)
    name = images[0].get("path") if images else None
    place = f"{folder}, {os.path.relpath(name, folder) if name and '://' not in name else f'row {index}'}"
    number = os.path.relpath(name, folder) if name and "://" not in name else index
    extra = {name: row[name] for name in ("label", "notes") if name in row}
    if classes is not None and extra["label"] is not None:
        extra["label"] = classes.index(extra["label"])  # a stream does not encode what is given back here
    if isinstance(extra.get("notes"), (list, dict)):
        extra["notes"], row = None, {**row, "notes_are_no_text": True}
    made = record_or_reason(
        _folder_texts, row, images, number, form, caption, source, place, number=number, source=source
    )
    return {**({} if form is None else {_kind_of_form(form): None}), "why_broken": None, **made, **extra}


def _folder_texts(row, images, number, form, caption, source, place) -> dict:
    """A record without its further columns."""
    if "notes_are_no_text" in row:
        raise ValueError(f"{place}: notes are no text.")
    record = {
        "id": str(key_value(row["id"], place, "id") if row.get("id") else number), "source": source, "images": images,
    }  # fmt: skip
    if form == "question":
        asked, answer = (_plain_text(row.get(key), place, key) for key in ("question", "answer"))
        record["messages"] = [text_message("user", asked, len(images)), text_message("assistant", answer)]
    elif form == "messages":
        record["messages"] = _normal_messages(row.get("messages"), place)
    elif form == "document":
        record["document"] = _normal_content(row.get("document"), place)
    elif form == "caption":
        record["caption"] = _plain_text(row.get(caption), place, caption)
    return record


def _plain_text(value, place: str, what: str) -> str:
    """A column as text: numbers are written out, and nothing is an empty text."""
    if value is None or isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return text_value(value, place, what)


def load_hub(path, split=None, streaming=False, name=None, caption=None, source=None):
    """A data set whose columns are a record's already: on the Hub, or saved by `datasets`.

    `image` may stand for `images`; the content of messages may be a text with `<image>` in it. All further columns
    stay.

    Args:
        path: Its name on the Hub, or a folder: one of `save_to_disk`, or of files that `load_dataset` knows.
        split: By default `"train"`.
        streaming: Read it while it is used.
        name: Name of a configuration on the Hub.
        caption: Column that is the caption.
        source: What the column `source` says if the data set has none; by default `path`.

    Raises:
        ValueError: It has no such split, or none of a record's columns.
    """
    if path is None:
        raise ValueError("path is missing: say where the data is.")
    place = os.path.expanduser(path)
    if os.path.isdir(place) and {"state.json", "dataset_dict.json"} & set(os.listdir(place)):
        loaded = load_from_disk(place)
        if isinstance(loaded, (DatasetDict, IterableDatasetDict)):
            if (split or "train") not in loaded:
                raise ValueError(f"{path} has no split {split or 'train'!r}; expected one of {', '.join(loaded)}.")
            loaded = loaded[split or "train"]
        elif split not in (None, str(loaded.split)):
            raise ValueError(f"{path} has no splits, but split is {split!r}.")
        loaded = loaded.to_iterable_dataset() if streaming else loaded
    else:
        loaded = load_dataset(
            place if os.path.isdir(place) else path, name, split=split or "train", streaming=streaming
        )
    loaded = _without_decoding(resolve_features(loaded))
    columns = loaded.features
    kind = next((kind for kind in KINDS if kind in columns and caption is None), None)
    caption = caption if kind else _caption_column(columns, caption, str(path))
    kind = kind or ("caption" if caption else None)
    if not {"image", "images"} & columns.keys() or (kind is None and "label" not in columns):
        raise ValueError(
            f"{path} has {', '.join(columns)}; expected images (or image), and one of {', '.join(KINDS)} (or label)."
        )
    extra = {key: value for key, value in columns.items() if key not in (*FEATURES, "image", caption)}
    convert = partial(_saved_record, kind=kind, caption=caption, source=source or str(path))
    return _converted(loaded, convert, kind, extra)


def _saved_record(row, index, kind, caption, source, code) -> dict:
    made = record_or_reason(_saved_texts, row, index, kind, caption, source, number=index, source=source)
    record = {**row, **({} if kind is None else {kind: None}), "why_broken": row.get("why_broken"), **made}
    return {key: value for key, value in record.items() if key not in ("image", caption) or key == kind}


def _saved_texts(row, index, kind, caption, source) -> dict:
    """A record without its further columns."""
    place = f"{source}, row {index}"
    key = index if row.get("id") is None else key_value(row["id"], place, "id")
    record = {"id": str(key), "images": _images_of(row)}
    record["source"] = text_value(row.get("source") or source, place, "source")
    broken = row.get("why_broken") is not None
    if kind == "messages":
        record["messages"] = None if broken else _normal_messages(row["messages"], place)
    elif kind == "document":
        record["document"] = None if broken else _normal_content(row["document"], place)
    elif kind == "caption":
        record["caption"] = _plain_text(row[caption or "caption"], place, caption or "caption")
    return record


def _caption_column(columns, wanted: str | None, place: str) -> str | None:
    if wanted is not None and wanted not in columns:
        raise ValueError(f"{place}: caption is {wanted!r}; expected one of {', '.join(columns)}.")
    return wanted or next((key for key in CAPTION_KEYS if key in columns), None)


def _without_decoding(loaded):
    """Leave images as `{"path", "bytes"}`."""
    if "image" in loaded.features:
        loaded = loaded.cast_column("image", Image(decode=False))
    if "images" in loaded.features:
        loaded = loaded.cast_column("images", FEATURES["images"])
    return loaded


def _converted(loaded, convert, kind: str | None, extra: dict):
    """Records made of rows."""
    names = ("id", "source", "images", *([kind] if kind else []), "why_broken")
    features = Features({name: FEATURES[name] for name in names} | extra)
    options = {"with_indices": True, "features": features, "fn_kwargs": {"code": CODE}}
    if isinstance(loaded, Dataset):
        options["desc"] = "reading records"
    return loaded.map(convert, remove_columns=[name for name in loaded.features if name not in features], **options)


def _images_of(row: dict) -> list[dict]:
    images = row["images"] if row.get("images") is not None else [row.get("image")]
    return [image for image in images if image is not None]


def _normal_messages(messages, place: str) -> list[dict]:
    return [
        {
            "role": text_value(field_value(message, "role", place), place, "role"),
            "content": _normal_content(field_value(message, "content", place), place),
        }
        for message in list_value(messages, place, "messages")
    ]


def _normal_content(content, place: str) -> list[dict]:
    """Content with both keys in every item; a text alone may have `<image>` in it."""
    if isinstance(content, str):
        return content_of_text(content)
    items = []
    for item in list_value(content, place, "content"):
        kind, text = text_value(field_value(item, "type", place), place, "type"), item.get("text")
        items.append({"type": kind, "text": None if text is None else text_value(text, place, "text")})
    return items


__all__ = ["CAPTION_KEYS", "load_hub", "load_imagefolder"]
