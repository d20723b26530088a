"""Tars of WebDataset: the files of one sample stand together and share their name up to the first dot."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Container, Iterator
from contextlib import suppress
from itertools import islice

from ..shards import IMAGE_SUFFIXES, CheckedHeader
from .training_rows import as_object, parse_json
from .training_sources_annotations import llava_messages
from .training_sources_common import build_dataset, field_value, find_files, record_or_reason, text_value
from .training_sources_datasets import CAPTION_KEYS


#: Largest size of the members of one sample that are read, in bytes; a sample is held in memory.
MAX_SAMPLE_BYTES = 1 << 30


def load_webdataset(path, split=None, streaming=False, caption=None, image_first=False, source="webdataset"):
    """Tars of WebDataset; a member `json` with `conversations` (LLaVA's) makes a conversation of the sample.

    The tars are read here and not by `datasets`' own loader, which fixes columns and types by the first five samples
    and, if the working folder has a file of the same name as a member, takes that instead of the member (5.2).

    Args:
        path: A tar, a folder of tars, a glob or a list of these.
        split: In a folder: take the tars whose names begin with this.
        streaming: Read the tars while the data set is used. By default the images are copied into the cache of
            `datasets`.
        caption: Member that is the caption (`"txt"`, `"caption"`, ...), or a key of the member `json`; by default
            `txt`, else `caption` or `text` in `json`.
        image_first: Put a message's images before its text, as LLaVA's training code does.
        source: What the records' column `source` says.

    Raises:
        ValueError: A tar is damaged, has no samples, or has one that is larger than `MAX_SAMPLE_BYTES`.
        OSError: A tar can't be read.

    Source: "The WebDataset Format" in the documentation of webdataset.
    """
    files = find_files(path, split, (".tar", ".tar.gz", ".tgz"))
    kind = "caption" if caption is not None else _kind_of_tar(files[0])
    return build_dataset(
        _webdataset,
        files,
        kind,
        streaming,
        conversations=kind == "messages",
        caption=caption,
        image_first=image_first,
        source=source,
    )


def _kind_of_tar(file: str, first: int = 10) -> str:
    """What the first samples of a tar are: `"messages"` if one of them is a conversation, since any may be broken."""
    samples = list(islice(_samples(file, {"json"}), first))
    if not samples:
        raise ValueError(f"{file} holds no samples.")
    for name, members in samples:
        with suppress(ValueError):
            if "conversations" in _about(members, name):
                return "messages"
    return "caption"


def _about(members: dict[str, bytes], place: str) -> dict:
    """What the member `json` of a sample holds; nothing if there is none."""
    if "json" not in members:
        return {}
    return as_object(parse_json(members["json"].decode("utf-8", "replace"), place), place)


def _text_members(caption: str | None) -> set[str]:
    return {"json", *([caption] if caption else ["txt", *CAPTION_KEYS])}


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def _samples(file: str, texts: Container[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar: their names, and the content of their images and texts by what follows the first dot.

    Args:
        file: The tar.
        texts: Suffixes of the members that are read beside the images; others are skipped.

    Raises:
        ValueError: The tar is damaged, or a sample is larger than `MAX_SAMPLE_BYTES`.
        OSError: It can't be read.
    """
    name, members, size, done = None, {}, 0, 0
    try:
        with tarfile.open(file, "r|*", tarinfo=CheckedHeader) as archive:
            for info in archive:
                folder, base = os.path.split(info.name)
                stem, dot, suffix = base.partition(".")
                if not info.isreg() or not stem or not dot:
                    continue
                current, suffix = os.path.join(folder, stem), suffix.lower()
                if current != name and name is not None:
                    yield name, members
                    members, size, done = {}, 0, done + 1
                name = current
                if not _is_image(suffix) and suffix not in texts:
                    continue
                size += info.size
                if size > MAX_SAMPLE_BYTES:
                    raise ValueError(
                        f"{file}: sample {name} has {size:,} bytes up to its member {info.name}; at most "
                        f"{MAX_SAMPLE_BYTES:,} are read. Files belong to one sample if their names are the same up to "
                        "the first dot."
                    )
                members[suffix] = archive.extractfile(info).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{file} is damaged after {done} samples: {error}") from error
    if name is not None:
        yield name, members


def _webdataset(files, conversations, caption, image_first, source) -> Iterator[dict]:
    for file in files:

        def record(name, members, place, file=file) -> dict:
            about = _about(members, place)
            images = [
                {"path": f"{file}/{name}.{suffix}", "bytes": data}
                for suffix, data in members.items()
                if _is_image(suffix)
            ]
            made = {"id": name, "source": source, "images": images}
            if conversations:
                messages = llava_messages(field_value(about, "conversations", place), place, image_first)
                return {**made, "messages": messages}
            return {**made, "caption": _sample_caption(members, about, caption, place)}

        for name, members in _samples(file, _text_members(caption)):
            place = f"{file}, sample {name}"
            yield record_or_reason(record, name, members, place, number=name, source=source)


def _sample_caption(members: dict[str, bytes], about: dict, wanted: str | None, place: str) -> str:
    for key in [wanted] if wanted else ["txt", *CAPTION_KEYS]:
        if key in members:
            return members[key].decode("utf-8", "replace").strip()
        if about.get(key) is not None:
            return text_value(about[key], place, key)
    return ""  # counted as a broken record


__all__ = ["MAX_SAMPLE_BYTES", "load_webdataset"]
