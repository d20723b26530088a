"""What the loaders of all layouts share: finding files, building data sets and reading fields.

Fields are checked where they are read: `text_value`, `list_value`, `key_value`, `field_value`. A record with a wrong
one is not an error but a record with `why_broken`, see `record_or_reason`; `skip_broken` counts and names it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datasets import Dataset, Features, IterableDataset

from .. import shards
from .training_records import FEATURES, IMAGE_TOKEN


def _hash_of_code() -> str:
    folder = Path(__file__).parent
    modules = [
        *sorted(folder.glob("training_sources*.py")),
        folder / "training_records.py",
        folder / "training_rows.py",
        Path(shards.__file__),
    ]
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()


#: Part of every cached data set's fingerprint: records that other code has made are not reused.
CODE = _hash_of_code()


def build_dataset(
    generate: Callable, files: list[str], kind: str | None, streaming: bool, extra: dict | None = None, **arguments
) -> Dataset | IterableDataset:
    """Make a data set from a generator; it is cached as long as neither the files nor this code change.

    Args:
        generate: Yields records without the columns of other kinds; its first argument is a list of files.
        files: The files that it reads; workers of a stream share them out.
        kind: One of `KINDS`; `None` for records of no kind, which have a class alone.
        streaming: Read the files while the data set is used, instead of once into the cache of `datasets`.
        extra: Further columns.
        arguments: Further arguments of `generate`; no lists, which `datasets` would share out like files.

    Raises:
        ValueError: The files hold no records.
    """
    columns = [name for name in ("id", "source", "images", kind, "why_broken") if name is not None]
    features = Features({name: FEATURES[name] for name in columns} | (extra or {}))
    kwargs = {"files": files, "generate": generate, "columns": tuple(features), **arguments}
    if streaming:
        return IterableDataset.from_generator(_whole_records, features=features, gen_kwargs=kwargs)
    stamps = [(os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    key = json.dumps([generate.__name__, stamps, arguments, repr(features), CODE], sort_keys=True, default=str)
    try:
        return Dataset.from_generator(
            _whole_records,
            features=features,
            gen_kwargs=kwargs,
            fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
        )
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"{', '.join(files)}: there are no records.") from error


def _whole_records(files, generate, columns, **arguments) -> Iterator[dict]:
    """Records with all columns."""
    for record in generate(files, **arguments):
        yield {name: record.get(name) for name in columns}


def record_or_reason(make: Callable[..., dict], *arguments, number: int | str, source: str) -> dict:
    """A record, or one that says why it is broken.

    Args:
        make: Makes the record; its errors say where it is and what is wrong.
        arguments: Of `make`.
        number: The broken record's `id`.
        source: The broken record's `source`.
    """
    try:
        return make(*arguments)
    except ValueError as error:
        return {"id": str(number), "source": source, "images": [], "why_broken": " ".join(str(error).split())}


def find_files(path: str | os.PathLike | Sequence | None, split: str | None, suffixes: tuple[str, ...]) -> list[str]:
    """Absolute paths of the files that a path, a glob or a list of them names.

    Args:
        path: A file, a folder of files, a glob, or a list of these.
        split: In a folder: take the files whose names begin with this, or those in the subfolder of this name.
        suffixes: Endings of the files that are taken from a folder.

    Raises:
        ValueError: `path` is missing, a folder has no such files, or `split` is given for a file.
        FileNotFoundError: There is no such file or folder.
    """
    if path is None:
        raise ValueError("path is missing: say where the data is.")
    if not isinstance(path, (str, os.PathLike)):
        return [file for part in path for file in find_files(part, split, suffixes)]
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        folder, begin = path, split or ""
        if split and os.path.isdir(os.path.join(path, split)):
            folder, begin = os.path.join(path, split), ""
        names = sorted(
            name for name in os.listdir(folder) if name.startswith(begin) and name.lower().endswith(suffixes)
        )
        if not names:
            of_split = f" of split {split!r}" if split else ""
            raise ValueError(f"{path} has no file{of_split} that ends in {', '.join(suffixes)}.")
        return [os.path.abspath(os.path.join(folder, name)) for name in names]
    if split is not None:
        raise ValueError(f"split is {split!r}, but {path} is no folder: give the file of that split as path.")
    if os.path.exists(path):
        return [os.path.abspath(path)]
    if glob.has_magic(path) and (found := sorted(glob.glob(path, recursive=True))):
        return [os.path.abspath(file) for file in found]
    raise FileNotFoundError(f"{path}: no such file or folder.")


def absolute_folder(folder: str | os.PathLike | None) -> str | None:
    """The absolute path of a folder, with `~` expanded; `None` stays `None`."""
    return None if folder is None else os.path.abspath(os.path.expanduser(folder))


def text_value(value, place: str, what: str) -> str:
    """A field that has to be text; halves of surrogate pairs, which UTF-8 can't encode, become U+FFFD.

    Args:
        value: The field's value.
        place: Where it is, for the error.
        what: The field's name, for the error.

    Raises:
        ValueError: It is not text.
    """
    if not isinstance(value, str):
        raise ValueError(f"{place}: {what} is a {type(value).__name__}; expected a text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def field_value(row: dict, key: str, place: str):
    """A field that a row must have.

    Args:
        row: The row.
        key: The field's name.
        place: Where the row is, for the error.

    Raises:
        ValueError: The row is no object or does not have it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a {type(row).__name__}; expected an object with {key!r}.")
    if key not in row:
        raise ValueError(f"{place} has {', '.join(map(str, row)) or 'nothing'}; expected {key!r} among them.")
    return row[key]


def list_value(value, place: str, what: str) -> list:
    """A field that has to be a list.

    Args:
        value: The field's value.
        place: Where it is, for the error.
        what: The field's name, for the error.

    Raises:
        ValueError: It is not a list.
    """
    if not isinstance(value, list):
        raise ValueError(f"{place}: {what} is a {type(value).__name__}; expected a list.")
    return value


def key_value(value, place: str, what: str) -> str | int:
    """A field that names something: a text or a whole number.

    Args:
        value: The field's value.
        place: Where it is, for the error.
        what: The field's name, for the error.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{place}: {what} is a {type(value).__name__}; expected a text or a whole number.")
    return text_value(value, place, what)


def id_value(row: dict, number: int, place: str) -> str:
    """A record's `id`, or its number if it has none."""
    value = row.get("id")
    return str(number if value is None else key_value(value, place, "id"))


def content_of_text(text: str) -> list[dict]:
    """A message's content from a text with `<image>` in it.

    The line break between an image and the text beside it is left out: the chat template writes its own.
    """
    content = []
    pieces = text.split(IMAGE_TOKEN)
    for number, piece in enumerate(pieces):
        if number:
            content.append({"type": "image", "text": None})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece or len(pieces) == 1:
            content.append({"type": "text", "text": piece})
    return content


def text_message(role: str, text: str, num_images: int = 0) -> dict:
    """A message of so many images, followed by a text."""
    images = [{"type": "image", "text": None}] * num_images
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


__all__ = [
    "CODE",
    "absolute_folder",
    "build_dataset",
    "content_of_text",
    "field_value",
    "find_files",
    "id_value",
    "key_value",
    "list_value",
    "record_or_reason",
    "text_message",
    "text_value",
]
