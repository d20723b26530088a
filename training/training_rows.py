"""Rows of JSON, JSON Lines, CSV, TSV and Parquet files, each with the words to name it by."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


def read_rows(path: Path, checked: bool = True) -> Iterator[tuple[str, dict]]:
    """Rows of a table, in order.

    Args:
        path: A file in one of `FORMATS`; JSON holds a list of objects, or one object. All but Parquet may be gzipped
            (`.jsonl.gz`).
        checked: Refuse rows that are no objects; without, they come as they are, for a caller that names them.

    Yields:
        Where the row is, for errors; and the row.

    Raises:
        ValueError: The file has another format, is damaged or is not in UTF-8, or a row is not an object.
        OSError: The file can't be read.
    """
    name = path.name.lower().removesuffix(".gz")
    kind = Path(name).suffix
    if kind in (".csv", ".tsv"):
        with _open(path, newline="") as file:
            try:
                for number, row in enumerate(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","), 1):
                    yield f"{path}, row {number}", row
            except csv.Error as error:
                raise ValueError(f"{path} can't be read as a table: {error}.") from error
    elif kind in (".jsonl", ".ndjson"):
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    row = parse_json(line, place)
                    yield place, as_object(row, place) if checked else row
    elif kind == ".parquet":
        yield from _parquet_rows(path)
    elif kind == ".json":
        yield from json_rows(read_json(path), path, checked)
    else:
        raise ValueError(f"{path}: expected {', '.join(FORMATS)}.")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged after {number} rows, or not Parquet: {error}") from error


def json_rows(content, path: Path, checked: bool = True) -> Iterator[tuple[str, dict]]:
    """Rows in the content of a JSON file, as `read_rows` gives them.

    Args:
        content: A list of objects, or one object.
        path: The file, for errors.
        checked: Refuse rows that are no objects.

    Raises:
        ValueError: A row is not an object.
    """
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        place = f"{path}, row {number}"
        yield place, as_object(row, place) if checked else row


@contextmanager
def _open(path: Path, **options):
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", **options) as file:  # spreadsheets begin their CSV with a mark
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}. Convert it first.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def read_json(path: Path):
    """Content of a JSON file, which may be gzipped.

    Raises:
        ValueError: It is not JSON, or damaged.
        OSError: It can't be read.
    """
    with _open(path) as file:
        return parse_json(file.read(), str(path))


def parse_json(text: str, place: str):
    """Content of a JSON text.

    Args:
        text: The text.
        place: Where it came from, for the error.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error


def as_object(row, place: str) -> dict:
    """The row itself, which has to be an object.

    Args:
        row: Content of JSON.
        place: Where it came from, for the error.

    Raises:
        ValueError: It is not an object.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a {type(row).__name__}; expected an object.")
    return row


__all__ = ["FORMATS", "as_object", "json_rows", "parse_json", "read_json", "read_rows"]
