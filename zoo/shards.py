"""Pictures where large data sets keep them: as files, in tar shards (WebDataset), in Parquet shards."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from PIL import Image

from .images import ImageError, decode_image, expand_paths, load_image


TAR, PARQUET = ".tar", ".parquet"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "ppm", "pgm")  # in a tar


class CheckedHeader(tarfile.TarInfo):
    """Header of a tar's member; a broken one is an error, where `tarfile` takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """The next header, as `tarfile` reads it.

        Args:
            archive: The tar.

        Raises:
            tarfile.ReadError: It is broken.
        """
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset:,}") from error


# ---------------------------------------------------------------------- pictures


class Picture:
    """A picture that has not been read yet.

    Args:
        name: What it is called in results: its path, or the shard's path with the member's name or the row's number.
        path: The file that it is, or is in; `None` if `data` has it.
        place: First byte and number of bytes in that file; `None`: the whole file.
        data: The content of its file, if that is in memory.
    """

    def __init__(self, name: str, path: str | None, place: tuple[int, int] | None = None, data: bytes | None = None):
        self.name, self.path, self.place, self.data = name, path, place, data

    def content(self) -> bytes:
        """The content of its file.

        Raises:
            OSError: It can't be read.
        """
        if self.path is None:
            return self.data or b""
        with open(self.path, "rb") as file:
            if self.place is None:
                return file.read()
            file.seek(self.place[0])
            return file.read(self.place[1])

    def image(self) -> Image.Image:
        """The picture in mode `"RGB"`, as `vlbridge.images.load_image` reads it.

        Raises:
            ImageError: It can't be read as a picture.
        """
        if self.path is not None and self.place is None:
            return load_image(self.path)
        try:
            content = self.content()
        except OSError as error:
            raise ImageError(self.name, error.strerror or str(error)) from error
        return decode_image(content, self.name)

    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels, from the file's header; `None` if that can't be read."""
        try:
            with Image.open(self.path if self.path and self.place is None else io.BytesIO(self.content())) as image:
                return image.height, image.width
        except Exception:  # what is wrong is said where the picture is decoded
            return None


class Files:
    """Picture files, in order.

    Args:
        paths: Absolute paths.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def described(self) -> dict:
        """What tells these files from others: their number, and a hash of their paths."""
        digest = hashlib.sha256("\0".join(self.paths).encode("utf-8", "surrogateescape"))
        return {"files": len(self), "sha256": digest.hexdigest()}

    def pictures(self, start: int, stop: int) -> list[Picture]:
        """Those from one position up to another."""
        return [Picture(path, path) for path in self.paths[start:stop]]


class _Shard:
    """A file with many pictures; how many is counted once, and known when the job goes on."""

    def __init__(self, path: str, known: dict | None = None):
        self.path = path
        size = os.path.getsize(path)
        count = known["pictures"] if known and known["bytes"] == size else self.count()
        self._described = {"shard": path, "bytes": size, "pictures": count}

    def __len__(self) -> int:
        return self._described["pictures"]

    def described(self) -> dict:
        """What tells this shard from others: its path, its size in bytes, and how many pictures it has."""
        return self._described


class TarShard(_Shard):
    """A tar, of WebDataset or any other; each member with the ending of an image format is a picture.

    Args:
        path: Absolute path.
        known: What an earlier run's `described()` has given.

    Raises:
        ValueError: The tar is damaged, or cut off.
        OSError: It can't be read.
    """

    _members: list[tuple[str, int, int]] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_members": None}  # other processes look for themselves

    def members(self) -> list[tuple[str, int, int]]:
        """Names of the pictures, and where their content is: first byte, number of bytes."""
        if self._members is None:
            found: list[tuple[str, int, int]] = []
            try:
                with tarfile.open(self.path, "r:", tarinfo=CheckedHeader) as archive:
                    for info in archive:
                        if info.isreg() and info.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                            found.append((info.name, info.offset_data, info.size))
            except (tarfile.TarError, EOFError) as error:
                raise ValueError(
                    f"{self.path} is damaged or cut off after {len(found)} pictures: {error}. Fetch it again, or leave "
                    "it out."
                ) from error
            self._members = found
        return self._members

    def count(self) -> int:
        """How many pictures there are; reads every header."""
        return len(self.members())

    def pictures(self, start: int, stop: int) -> list[Picture]:
        """Those from one position up to another."""
        return [
            Picture(f"{self.path}/{name}", self.path, (offset, size))
            for name, offset, size in self.members()[start:stop]
        ]


class ParquetShard(_Shard):
    """A Parquet file; each row is a picture, in a column of files' contents, of `{"bytes", "path"}`, or of paths.

    Args:
        path: Absolute path.
        known: What an earlier run's `described()` has given.
        column: The column of the pictures. Paths are relative to the file's folder.

    Raises:
        ValueError: The file is damaged, or has no such column.
        OSError: It can't be read.
        ImportError: pyarrow is not installed.
    """

    def __init__(self, path: str, known: dict | None = None, column: str = "image"):
        self.column = column
        self._group: tuple[int, list] = (-1, [])  # the row group that was read last
        super().__init__(path, known)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_group": (-1, [])}

    def _open(self):
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError('Parquet files need pyarrow: pip install "vlbridge[ray]" or pyarrow alone.') from error
        try:
            return parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"{self.path} is damaged, cut off or not Parquet: {error} Fetch it again, or leave it out."
            ) from error

    def count(self) -> int:
        """How many rows there are; reads the file's end alone."""
        from pyarrow import types

        with self._open() as file:
            schema = file.schema_arrow
            if self.column not in schema.names:
                raise ValueError(
                    f"{self.path} has no column {self.column!r}; it has {', '.join(schema.names)}. Name the column of "
                    "the pictures: --image-column, image_column=."
                )
            kind = schema.field(self.column).type
            texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
            holds = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            if not holds and not any(check(kind) for check in texts):
                raise ValueError(
                    f"{self.path}: column {self.column!r} is {kind}; expected the content of files (binary, or a "
                    "struct with bytes) or their paths (string)."
                )
            return file.metadata.num_rows

    def pictures(self, start: int, stop: int) -> list[Picture]:
        """Those from one row up to another, counted from 0."""
        found = []
        with self._open() as file:
            ends = list(accumulate(file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)))
            for row in range(start, min(stop, len(self))):
                group = bisect_right(ends, row)
                if self._group[0] != group:
                    self._group = group, file.read_row_group(group, columns=[self.column])[self.column]
                value = self._group[1][row - (ends[group - 1] if group else 0)].as_py()
                found.append(self._picture(f"{self.path}/{row}", value))
        return found

    def _picture(self, name: str, value) -> Picture:
        if isinstance(value, dict):
            value = value.get("path") if value["bytes"] is None else value["bytes"]
        if isinstance(value, str):
            return Picture(name, os.path.join(os.path.dirname(self.path), value))
        return Picture(name, None, data=value or b"")


Source = Files | TarShard | ParquetShard


# ---------------------------------------------------------------------- finding them


def find_sources(
    patterns: Iterable[str | os.PathLike],
    *,
    recursive: bool = False,
    image_column: str = "image",
    known: Iterable[dict] = (),
    leave_out: str | os.PathLike | None = None,
) -> list[Source]:
    """Picture files and shards that files, folders and globs stand for.

    Args:
        patterns: Picture files, tars, Parquet files, folders of these, and globs.
        recursive: Look into subfolders too.
        image_column: The column of Parquet files that has the pictures.
        known: What an earlier run has found, `described()` of each source: shards are not counted again.
        leave_out: A folder in which nothing is looked for.

    Returns:
        All picture files as one source, if there are any, then a source per shard.

    Raises:
        ImageError: A path does not exist, or a folder has neither pictures nor shards.
        ValueError: A shard is damaged, compressed as a whole, or has no such column.
        OSError: A shard can't be read.
        ImportError: There are Parquet files, and pyarrow is not installed.
    """
    counted = {found["shard"]: found for found in known if "shard" in found}
    avoided = None if leave_out is None else os.path.abspath(leave_out) + os.sep
    files, shards = {}, {}
    for pattern in patterns:
        for path in _expanded(os.path.expanduser(pattern), recursive):
            path = os.path.abspath(path)
            if avoided is not None and path.startswith(avoided):
                continue
            if path.lower().endswith(COMPRESSED):
                raise ValueError(
                    f"{path} is compressed as a whole, so that no picture in it can be reached without all before it; "
                    "unpack it to a plain .tar first."
                )
            (shards if path.lower().endswith((TAR, PARQUET)) else files)[path] = None
    sources: list[Source] = [Files(list(files))] if files else []
    for path in shards:
        if path.lower().endswith(TAR):
            sources.append(TarShard(path, counted.get(path)))
        else:
            sources.append(ParquetShard(path, counted.get(path), image_column))
    return sources


def _expanded(pattern: str, recursive: bool) -> list[str]:
    """The files that one pattern stands for; a folder gives its pictures and its shards."""
    if not os.path.isdir(pattern):
        return [os.fspath(path) for path in expand_paths([pattern])]
    looked = Path(pattern).rglob("*") if recursive else Path(pattern).iterdir()
    endings = (TAR, PARQUET, *COMPRESSED)
    shards = sorted(
        str(path)
        for path in looked
        if path.name.lower().endswith(endings)
        and not any(part.startswith(".") for part in path.relative_to(pattern).parts)
    )
    try:
        return [os.fspath(path) for path in expand_paths([pattern], recursive)] + shards
    except ImageError as error:
        if shards:
            return shards
        reason = error.reason.replace("no image files", "no image files, tars or Parquet files")
        raise ImageError(error.path, reason) from error


__all__ = [
    "COMPRESSED",
    "CheckedHeader",
    "Files",
    "IMAGE_SUFFIXES",
    "PARQUET",
    "ParquetShard",
    "Picture",
    "Source",
    "TAR",
    "TarShard",
    "find_sources",
]
