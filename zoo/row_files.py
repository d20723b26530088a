"""Files of rows in a folder, written as a whole or not at all: JSON Lines, Parquet, or tars with the pictures."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from .files import replacing
from .shards import IMAGE_SUFFIXES, Picture


FORMATS = ("jsonl", "parquet", "tar")
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}  # by Pillow's names of formats


class RowFiles:
    """Files of rows in a folder: `part-000000.jsonl` and so on. There are only whole ones.

    Args:
        folder: Where they are; it need not exist.
        file_format: `jsonl`; `parquet`; or `tar`: a shard of WebDataset with the pictures, each with its text and row.
    """

    def __init__(self, folder: str | os.PathLike, file_format: str = "jsonl"):
        if file_format not in FORMATS:
            raise ValueError(f"format is {file_format!r}; expected one of {', '.join(FORMATS)}")
        self.folder, self.format = Path(folder), file_format

    def path(self, number: int) -> Path:
        """The file of a range."""
        return self.folder / f"part-{number:06d}.{self.format}"

    def done(self) -> set[int]:
        """Numbers of the ranges whose file is there."""
        if not self.folder.is_dir():
            return set()
        numbers = (path.name[5 : -len(self.format) - 1] for path in self.folder.glob(f"part-*.{self.format}"))
        return {int(number) for number in numbers if number.isdecimal()}

    def write(self, number: int, rows: Sequence[dict], pictures: Sequence[Picture] = ()) -> None:
        """Write a range's file, as a whole.

        Args:
            number: The range.
            rows: Its rows.
            pictures: Their pictures, which tars hold.

        Raises:
            OSError: It can't be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.path(number)) as temporary:
            if self.format == "jsonl":
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(lines)
            elif self.format == "parquet":
                _write_parquet(temporary, rows)
            else:
                _write_tar(temporary, number, rows, pictures)

    def rows(self) -> Iterator[dict]:
        """All rows, in order.

        Raises:
            OSError: A file can't be read.
        """
        for number in sorted(self.done()):
            yield from self.read(number)

    def read(self, number: int) -> list[dict]:
        """Rows of a range.

        Raises:
            OSError: The file can't be read.
        """
        if self.format == "parquet":
            from pyarrow import parquet

            return parquet.read_table(self.path(number)).to_pylist()
        if self.format == "jsonl":
            with open(self.path(number), encoding="utf-8") as file:
                return [json.loads(line) for line in file]
        with tarfile.open(self.path(number), "r:") as archive:
            return [json.loads(archive.extractfile(info).read()) for info in archive if info.name.endswith(".json")]


def _write_parquet(path: Path, rows: Sequence[dict]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError('Parquet files need pyarrow: pip install "vlbridge[ray]" or pyarrow alone.') from error
    # a range without errors has the same types as one with them
    schema = pyarrow.schema([(name, pyarrow.string()) for name in rows[0]])
    texts = [
        {name: value and value.encode("utf-8", "backslashreplace").decode() for name, value in row.items()}
        for row in rows
    ]
    parquet.write_table(pyarrow.Table.from_pylist(texts, schema=schema), path)


def _write_tar(path: Path, number: int, rows: Sequence[dict], pictures: Sequence[Picture]) -> None:
    """A sample per row: the picture as it was, `txt` (its text), `json` (the row). Failed ones are a `json` alone."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        for k, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
            key = f"{number:06d}-{k:06d}"
            if row["error"] is None:
                content = picture.content()
                with Image.open(io.BytesIO(content)) as opened:
                    kind = _SUFFIXES.get(opened.format or "", (opened.format or "").lower())
                if kind not in IMAGE_SUFFIXES:  # readers would not take it for a picture
                    kind, file = "png", io.BytesIO()
                    picture.image().save(file, "png")
                    content = file.getvalue()
                add(f"{key}.{kind}", content)
                text = row["answer"] if "answer" in row else row["caption"]
                add(f"{key}.txt", text.encode("utf-8", "backslashreplace"))
            add(f"{key}.json", json.dumps(row).encode())


__all__ = ["FORMATS", "RowFiles"]
