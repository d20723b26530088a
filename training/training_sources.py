"""Published layouts of training data, read as records: see `training_data`."""

from __future__ import annotations

import base64
import glob
import hashlib
import json
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from ..compat import resolve_features
from .training_records import FEATURES, IMAGE_TOKEN, KINDS
from .training_rows import as_object, parse_json, read_json, read_rows


# ---------------------------------------------------------------------- sources


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
        path: Where it is; what it may be, the source says.
        split: Part of it, for sources that have parts.
        streaming: Read it while it is used, instead of once into the cache of `datasets`. Order and content are the same.
        options: Of the source.

    Raises:
        ValueError: There is no such source, option or split, or the files are not as expected.
        OSError: They can't be read.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}; expected one of {', '.join(SOURCES)}.")
    try:
        return SOURCES[source](path, split=split, streaming=streaming, **options)
    except DatasetGenerationError as error:
        # what went wrong in a generator of ours, without the library's wrapping
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"source {source!r}: {error}.") from error


# What another version of the code has cached is not taken
CODE = hashlib.sha256(
    b"".join(Path(__file__).with_name(f"training_{name}.py").read_bytes() for name in ("sources", "records", "rows"))
).hexdigest()


def _build(generate, files: list[str], kind: str, streaming: bool, extra: dict | None = None, **arguments):
    """A data set from a generator, cached as long as neither the files nor this code change.

    Args:
        generate: Yields records without the columns of other kinds; the first argument is a list of files.
        files: Its shards: workers share them out.
        kind: One of `KINDS`.
        extra: Further columns.
        arguments: For `generate`; no lists, which `datasets` would take for shards.
    """
    features = Features({name: FEATURES[name] for name in ("id", "source", "images", kind)} | (extra or {}))
    kwargs = {"files": files, **arguments}
    if streaming:
        return IterableDataset.from_generator(generate, features=features, gen_kwargs=kwargs)
    stamps = [(os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    key = json.dumps([generate.__name__, stamps, arguments, repr(features), CODE], sort_keys=True, default=str)
    try:
        return Dataset.from_generator(
            generate, features=features, gen_kwargs=kwargs, fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32]
        )
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"{', '.join(files)}: there are no records.") from error


def _files(path: str | os.PathLike | Sequence | None, split: str | None, suffixes: tuple[str, ...]) -> list[str]:
    """Files that a path, a glob or a list of them stands for.

    Args:
        path: A file, a folder of files, a glob, or a list of these.
        split: In a folder: files whose names begin so, or those of its subfolder of that name.
        suffixes: Of the files that are taken from a folder.
    """
    if path is None:
        raise ValueError("path is missing: say where the data is.")
    if not isinstance(path, (str, os.PathLike)):
        return [file for part in path for file in _files(part, split, suffixes)]
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


def _text(value, place: str, what: str) -> str:
    """The value, if it is a text; halves of surrogate pairs, which UTF-8 has no bytes for, become U+FFFD."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {what} is a {type(value).__name__}; expected a text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _field(row: dict, key: str, place: str):
    if key not in row:
        raise ValueError(f"{place} has {', '.join(map(str, row)) or 'nothing'}; expected {key!r} among them.")
    return row[key]


def _placed(text: str) -> list[dict]:
    """Content of a text with `<image>` in it; the line break between an image and the text beside it is the template's."""
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


def _turn(role: str, text: str, num_images: int = 0) -> dict:
    images = [{"type": "image", "text": None}] * num_images
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


# ---------------------------------------------------------------------- LLaVA

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def load_llava(path, split=None, streaming=False, images=None, image_first=False, source="llava"):
    """LLaVA's conversations: `[{"id", "image", "conversations": [{"from", "value"}, ...]}, ...]` in JSON or JSON Lines.

    Args:
        path: The file, or a folder of such files.
        images: Folder that `image` is relative to; by default that of the file.
        image_first: Put a message's images in front of its text, as the official training code does; else they stay
            where the file has `<image>`. In a leading line or a closing one the line break goes: the chat template
            writes its own.

    Samples without `image` are text only. What the assistant says before the first question is left out, as in the
    official code; `image` may be a list.

    Source: `docs/Finetune_Custom_Data.md`, `preprocess_multimodal` and `preprocess_v1` in `llava/train/train.py`.
    """
    files = _files(path, split, (".json", ".jsonl"))
    return _build(
        _llava, files, "messages", streaming, images=_absolute(images), image_first=image_first, source=source
    )  # fmt: skip


def _absolute(folder) -> str | None:
    return None if folder is None else os.path.abspath(os.path.expanduser(folder))


def _llava(files, images, image_first, source) -> Iterator[dict]:
    for file in files:
        root = images or os.path.dirname(file)
        for number, (place, row) in enumerate(read_rows(Path(file))):
            names = row.get("image") or []
            names = [names] if isinstance(names, str) else names
            values = [os.path.join(root, _text(name, place, "image")) for name in names]
            yield {
                "id": str(row.get("id", number)),
                "source": source,
                "images": values,
                "messages": _llava_messages(_field(row, "conversations", place), place, image_first),
            }


def _llava_messages(conversations, place: str, image_first: bool) -> list[dict]:
    messages = []
    for turn in conversations:
        sender = as_object(turn, f"{place}, conversations").get("from")
        if sender not in _ROLES:
            raise ValueError(f"{place}: 'from' is {sender!r}; expected one of {', '.join(_ROLES)}.")
        role = _ROLES[sender]
        if role == "assistant" and all(message["role"] == "system" for message in messages):
            continue
        content = _placed(_text(_field(turn, "value", place), place, "value"))
        if image_first:
            content.sort(key=lambda item: item["type"] != "image")
        messages.append({"role": role, "content": content})
    return messages


# ---------------------------------------------------------------------- COCO captions


def load_coco_captions(path, split=None, streaming=False, images=None, source="coco_captions"):
    """COCO's captions, one record per caption, in the order of the annotations.

    Args:
        path: `captions_*.json`; or the folder that holds `annotations/captions_{split}.json` and the images in `{split}`.
        split: With a folder, such as `"train2017"`.
        images: Folder of the images; by default as above, else that of the file.

    Source: "Data format" on cocodataset.org; `PythonAPI/pycocotools/coco.py`.
    """
    if path is not None and os.path.isdir(os.path.expanduser(path)):
        if split is None:
            raise ValueError(f"{path} is a folder: say which split, such as 'train2017'.")
        folder = os.path.expanduser(path)
        images = images or os.path.join(folder, split)
        path, split = os.path.join(folder, "annotations", f"captions_{split}.json"), None
    files = _files(path, split, (".json",))
    return _build(_coco_captions, files, "caption", streaming, images=_absolute(images), source=source)


def _coco_captions(files, images, source) -> Iterator[dict]:
    for file in files:
        content = as_object(read_json(Path(file)), file)
        root = images or os.path.dirname(file)
        names = {_field(row, "id", file): _field(row, "file_name", file) for row in _field(content, "images", file)}
        for number, row in enumerate(_field(content, "annotations", file)):
            place = f"{file}, annotation {number}"
            image = _field(row, "image_id", place)
            if image not in names:
                raise ValueError(f"{place} is of image {image}, which is not among the images.")
            yield {
                "id": str(row.get("id", number)),
                "source": source,
                "images": [os.path.join(root, names[image])],
                "caption": _text(_field(row, "caption", place), place, "caption"),
            }


# ---------------------------------------------------------------------- VQAv2


def load_vqav2(
    path,
    split=None,
    streaming=False,
    annotations=None,
    images=None,
    image_name=None,
    prompt="{question}",
    source="vqav2",
):
    """VQAv2: a record per question. The target is the most frequent of the ten answers; column `answers` has all.

    Args:
        path: The questions' file; or the folder with `v2_OpenEnded_mscoco_{split}_questions.json`,
            `v2_mscoco_{split}_annotations.json` and images in `train2014`, `val2014` or `test2015`.
        split: With a folder: `"train2014"`, `"val2014"`, `"test2015"` or `"test-dev2015"`. Tests have no answers: their
            records end with the question.
        annotations: The annotations' file.
        images: Folder of the images.
        image_name: Of an image file, with `{image_id}`; by default `COCO_{split}_{image_id:012d}.jpg`.
        prompt: What is asked, with `{question}`; LLaVA-1.5 adds
            `"\\nAnswer the question using a single word or phrase."`.

    Source: visualqa.org/download.html ("Input Questions Format", "Annotation Format").
    """
    if path is not None and os.path.isdir(os.path.expanduser(path)):
        if split is None:
            raise ValueError(f"{path} is a folder: say which split, such as 'train2014'.")
        folder = Path(path).expanduser()
        path = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
        beside = folder / f"v2_mscoco_{split}_annotations.json"
        if annotations is None and (beside.exists() or not split.startswith("test")):
            annotations = beside
        images, split = images or folder / _image_split(split), None
    files = _files(path, split, (".json",))
    if annotations is not None:
        files += _files(annotations, None, (".json",))
    extra = {"answers": [Value("string")]}
    # one shard: the second file belongs to the first
    return _build(
        _vqav2, files[:1], "messages", streaming, extra, answers=tuple(files[1:]), images=_absolute(images), source=source,
        image_name=image_name, prompt=prompt,
    )  # fmt: skip


def _image_split(subtype: str) -> str:
    return "test2015" if subtype.startswith("test") else subtype


def _vqav2(files, answers, images, image_name, prompt, source) -> Iterator[dict]:
    (file,) = files
    questions = as_object(read_json(Path(file)), file)
    answered = None
    if answers:
        rows = _field(as_object(read_json(Path(answers[0])), answers[0]), "annotations", answers[0])
        answered = {_field(row, "question_id", answers[0]): row for row in rows}
    subtype = _image_split(str(questions.get("data_subtype", "")))
    image_name = image_name or f"COCO_{subtype}_{{image_id:012d}}.jpg"
    root = images or os.path.dirname(file)
    for number, row in enumerate(_field(questions, "questions", file)):
        place = f"{file}, question {number}"
        key, asked = _field(row, "question_id", place), _text(_field(row, "question", place), place, "question")
        messages, given = [_turn("user", prompt.format(question=asked), num_images=1)], []
        if answered is not None:
            if key not in answered:
                raise ValueError(f"{place} ({key}) has no annotation in {answers[0]}.")
            annotation = answered[key]
            given = [_text(_field(one, "answer", place), place, "answer") for one in annotation.get("answers", ())]
            # theirs decides between answers that are equally frequent
            target = annotation.get("multiple_choice_answer") or (Counter(given).most_common(1) or [("", 0)])[0][0]
            messages.append(_turn("assistant", _text(target, place, "answer")))
        name = image_name.format(image_id=_field(row, "image_id", place))
        yield {
            "id": str(key),
            "source": source,
            "images": [os.path.join(root, name)],
            "messages": messages,
            "answers": given,
        }


# ---------------------------------------------------------------------- image folders

CAPTION_KEYS = ("caption", "text")


def load_imagefolder(path, split=None, streaming=False, caption=None, source="imagefolder"):
    """A folder of images with `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, or with a subfolder per class.

    Args:
        path: The folder.
        split: Of the folder, as `datasets` finds it; by default `"train"`, which is everything where there are no splits.
        caption: Column of the metadata that is the caption; by default the first of `CAPTION_KEYS` that there is.

    Metadata name the image in `file_name` (several in `file_names`). What makes the record are the columns `messages` or
    `document` in the record's own form, `question` and `answer`, or a caption. `label` (a number, or a text: then a class)
    and `notes` (text) stay columns; with `label` alone the record is of no kind.

    Source: "imagefolder" in the documentation of `datasets`.
    """
    if path is None or not os.path.isdir(os.path.expanduser(path)):
        raise ValueError(f"path is {path!r}; expected a folder of images.")
    folder = os.path.abspath(os.path.expanduser(path))
    loaded = _without_decoding(
        load_dataset("imagefolder", data_dir=folder, split=split or "train", streaming=streaming)
    )
    columns = loaded.features
    caption = _caption_column(columns, caption, folder)
    kind = next((name for name in ("messages", "document") if name in columns), None)
    kind = kind or ("messages" if {"question", "answer"} <= columns.keys() else "caption" if caption else None)
    if kind is None and "label" not in columns:
        raise ValueError(
            f"{folder}: the metadata have {', '.join(columns)}; expected a caption ({', '.join(CAPTION_KEYS)}, or the option "
            "caption=COLUMN), question and answer, messages, document, or classes."
        )
    extra, classes = {}, None
    if "label" in columns:
        extra["label"] = columns["label"]
        if getattr(columns["label"], "dtype", None) in ("string", "large_string"):
            labels = loaded["label"] if isinstance(loaded, Dataset) else (row["label"] for row in loaded)
            classes = sorted({label for label in labels if label is not None})
            extra["label"] = ClassLabel(names=classes)
    if "notes" in columns:
        extra["notes"] = Value("string")
    convert = partial(_folder_record, folder=folder, kind=kind, caption=caption, classes=classes, source=source)
    return _converted(loaded, convert, kind, extra)


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
    """Rows to records."""
    names = ("id", "source", "images", *([kind] if kind else []))
    features = Features({name: FEATURES[name] for name in names} | extra)
    options = {"with_indices": True, "features": features, "fn_kwargs": {"code": CODE}}
    if isinstance(loaded, Dataset):
        options["desc"] = "reading records"
    return loaded.map(convert, remove_columns=[name for name in loaded.features if name not in features], **options)


def _images_of(row: dict) -> list[dict]:
    images = row["images"] if row.get("images") is not None else [row.get("image")]
    return [image for image in images if image is not None]


def _folder_record(row, index, folder, kind, caption, classes, source, code) -> dict:
    images = _images_of(row)
    name = images[0].get("path") if images else None
    place = f"{folder}, {os.path.relpath(name, folder) if name and '://' not in name else f'row {index}'}"
    record = {
        "id": str(row.get("id") or (os.path.relpath(name, folder) if name and "://" not in name else index)),
        "source": source,
        "images": images,
    }
    if kind == "messages" and "messages" not in row:
        asked, answer = (str(row[key]) if row[key] is not None else "" for key in ("question", "answer"))
        record["messages"] = [_turn("user", asked, len(images)), _turn("assistant", answer)]
    elif kind == "messages":
        record["messages"] = _normal_messages(row["messages"], place)
    elif kind == "document":
        record["document"] = _normal_content(row["document"], place)
    elif kind == "caption":
        record["caption"] = "" if row[caption] is None else str(row[caption])
    record.update({name: row[name] for name in ("label", "notes") if name in row})
    if classes is not None and record["label"] is not None:
        record["label"] = classes.index(record["label"])  # a stream does not encode what is given back here
    return record


def _normal_messages(messages, place: str) -> list[dict]:
    return [
        {"role": _field(message, "role", place), "content": _normal_content(_field(message, "content", place), place)}
        for message in messages
    ]


def _normal_content(content, place: str) -> list[dict]:
    """Content with both keys in every item; a text alone may have `<image>` in it."""
    if isinstance(content, str):
        return _placed(content)
    return [{"type": _field(item, "type", place), "text": item.get("text")} for item in content]


# ---------------------------------------------------------------------- WebDataset

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "ppm", "pgm")


def load_webdataset(path, split=None, streaming=False, caption=None, image_first=False, source="webdataset"):
    """Tars of WebDataset: files of one sample stand together and have one name up to the first dot.

    Args:
        path: A tar, a folder of tars, a glob or a list of these. With `streaming=False` the images are copied into the
            cache of `datasets`.
        caption: Member that is the caption (`"txt"`, `"caption"`, ...), or a key of the member `json`; by default `txt`,
            else `caption` or `text` in `json`.
        image_first: As for `llava`.

    A `json` with `conversations` (LLaVA's) makes a conversation of the sample. The tars are read here and not by
    `datasets`' own loader, which fixes columns and types by the first five samples and, where the working folder has a
    file of the same name as a member, takes that instead of the member (5.2).

    Source: "The WebDataset Format" in the documentation of webdataset.
    """
    files = _files(path, split, (".tar", ".tar.gz", ".tgz"))
    members = next(_samples(files[0]), None)
    if members is None:
        raise ValueError(f"{files[0]} holds no samples.")
    about = parse_json(members[1]["json"].decode("utf-8", "replace"), files[0]) if "json" in members[1] else {}
    kind = "messages" if isinstance(about, dict) and "conversations" in about and caption is None else "caption"
    return _build(
        _webdataset,
        files,
        kind,
        streaming,
        conversations=kind == "messages",
        caption=caption,
        image_first=image_first,
        source=source,
    )


def _samples(file: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar: name, and content of the members by what follows their first dot.

    Raises:
        ValueError: The tar is damaged.
    """
    name, members, done = None, {}, 0
    try:
        with tarfile.open(file, "r|*") as archive:
            for info in archive:
                folder, base = os.path.split(info.name)
                stem, dot, suffix = base.partition(".")
                if not info.isreg() or not stem or not dot:
                    continue
                current = os.path.join(folder, stem)
                if current != name and members:
                    yield name, members
                    members, done = {}, done + 1
                name = current
                members[suffix.lower()] = archive.extractfile(info).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{file} is damaged after {done} samples: {error}") from error
    if members:
        yield name, members


def _webdataset(files, conversations, caption, image_first, source) -> Iterator[dict]:
    for file in files:
        for name, members in _samples(file):
            place = f"{file}, sample {name}"
            about = {}
            if "json" in members:
                about = as_object(parse_json(members["json"].decode("utf-8", "replace"), place), place)
            record = {
                "id": name,
                "source": source,
                "images": [
                    {"path": f"{file}/{name}.{suffix}", "bytes": data}
                    for suffix, data in members.items()
                    if suffix.rpartition(".")[2] in _IMAGE_SUFFIXES
                ],
            }
            if conversations:
                record["messages"] = _llava_messages(_field(about, "conversations", place), place, image_first)
            else:
                record["caption"] = _sample_caption(members, about, caption, place)
            yield record


def _sample_caption(members: dict[str, bytes], about: dict, wanted: str | None, place: str) -> str:
    for key in [wanted] if wanted else ["txt", *CAPTION_KEYS]:
        if key in members:
            return members[key].decode("utf-8", "replace").strip()
        if about.get(key) is not None:
            return _text(about[key], place, key)
    return ""  # counted as a broken record


# ---------------------------------------------------------------------- interleaved documents


def load_interleaved(
    path, split=None, streaming=False, images=None, downloaded=None, min_similarity=None, source="interleaved"
):
    """Documents of images and text, in the layout of OBELICS or MMC4, in JSON, JSON Lines or Parquet.

    Args:
        path: The file, or a folder of such files.
        images: Folder that image paths are relative to; by default that of the file.
        downloaded: JSON file with an object: file by address, for images that the data set names by their address.
        min_similarity: MMC4: images that match their sentence less (`matched_sim`) are left out.

    OBELICS has parallel lists `images` and `texts`, one of both `None` at each place; images are addresses, paths or
    `{"path", "bytes"}`. MMC4 has `text_list` and `image_info` (`image_name`, `raw_url`, `matched_text_index`, or the
    image itself in `image_base64`); an image stands in front of its sentence, as in Flamingo's training. Sentences between
    two images are joined by a space.

    Source: the data set card of `HuggingFaceM4/OBELICS`; the README of `allenai/mmc4`; `preprocess_interleaved` in
    `open_flamingo/train/data.py`.
    """
    files = _files(path, split, (".json", ".jsonl", ".jsonl.gz", ".parquet"))
    return _build(
        _interleaved, files, "document", streaming, images=_absolute(images), downloaded=_absolute(downloaded),
        min_similarity=min_similarity, source=source,
    )  # fmt: skip


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
                    f"{place} has {', '.join(row)}; expected images and texts (OBELICS) or text_list and image_info (MMC4)."
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
        yield image, None if text is None else _text(text, place, "text")


def _mmc4_parts(row: dict, place: str, min_similarity: float | None) -> Iterator[tuple]:
    sentences = row["text_list"]
    before: dict[int, list] = {}
    for image in _field(row, "image_info", place):
        index = _field(image, "matched_text_index", place)
        if not 0 <= index < len(sentences):
            raise ValueError(f"{place}: matched_text_index is {index}; expected 0 to {len(sentences) - 1}.")
        if min_similarity is not None and _field(image, "matched_sim", place) < min_similarity:
            continue
        if image.get("image_base64"):
            value = {"path": None, "bytes": base64.b64decode(image["image_base64"])}
        else:
            value = image.get("image_name") or _field(image, "raw_url", place)
        before.setdefault(index, []).append(value)
    for index, sentence in enumerate(sentences):
        yield from ((image, None) for image in before.get(index, ()))
        yield None, _text(sentence, place, "text_list")


# ---------------------------------------------------------------------- easy-VQA


def load_easy_vqa(
    path=None, split=None, streaming=False, pairs=0, questions_per_image=None, multi_turn=False, captions=False,
    caption_question=None, seed=0, source="easy_vqa",
):  # fmt: skip
    """easy-VQA: a record per question, or a conversation per picture.

    Args:
        path: The unpacked folder; by default it is fetched, see `vlbridge.demo.easy_vqa_dir`.
        split: `"train"` or `"test"`; by default `"train"`.
        pairs: Matched pairs per picture, see `training_easy_vqa.matched_pair`, beside its own questions.
        questions_per_image: How many in all, drawn at random; by default every one.
        caption_question: Words that ask for the caption, beside these questions.
        multi_turn: One conversation of all questions per picture, instead of one record per question.
        captions: The captions that the questions tell (`"a blue circle"`) instead, one per picture where they do; not in a
            conversation.
        seed: Of the draw, which depends on nothing else but the picture.
    """
    from .. import demo

    folder = Path(demo.easy_vqa_dir() if path is None else path).expanduser()
    split = split or "train"
    file = folder / split / "questions.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no {split}/questions.json; expected easy-VQA, split 'train' or 'test'.")
    return _build(
        _easy_vqa, [str(file.absolute())], "caption" if captions else "messages", streaming, pairs=pairs, seed=seed,
        questions_per_image=questions_per_image, multi_turn=multi_turn, captions=captions,
        caption_question=caption_question, source=source,
    )  # fmt: skip


def _easy_vqa(
    files, pairs, questions_per_image, multi_turn, captions, caption_question, seed, source
) -> Iterator[dict]:
    from .training_easy_vqa import caption_of, load_split, matched_pair, properties_of, yes_no_templates

    (file,) = map(Path, files)
    examples = load_split(file.parent.parent, file.parent.name)
    templates = yes_no_templates(examples) if pairs else []
    for example in examples:
        record = {"id": example.image.stem, "source": source, "images": [str(example.image)]}
        caption = caption_of(example)
        if captions:
            if caption:
                yield {**record, "caption": caption}
            continue
        draw = random.Random(f"{seed} {example.image.stem}")
        found = properties_of(example)
        asked = [
            pair
            for _ in range(pairs if len(found) == 2 else 0)
            for pair in matched_pair(found, templates, draw.randrange)
        ]
        own = list(example.questions)
        if questions_per_image is not None:
            own = draw.sample(own, min(len(own), max(0, questions_per_image - len(asked))))
        asked = (asked + own)[:questions_per_image]
        if caption_question and caption:
            asked.append((caption_question, caption))
        if pairs or questions_per_image is not None:
            draw.shuffle(asked)  # the first of a pair is not always about what is there
        turns = [[_turn("user", question, 1), _turn("assistant", answer)] for question, answer in asked]
        if not multi_turn:
            yield from (
                {**record, "id": f"{record['id']}-{number}", "messages": turn} for number, turn in enumerate(turns)
            )
        elif turns:
            for turn in turns[1:]:
                turn[0]["content"] = turn[0]["content"][1:]  # the picture is in the first question
            yield {**record, "messages": [message for turn in turns for message in turn]}


# ---------------------------------------------------------------------- data sets of records


def load_hub(path, split=None, streaming=False, name=None, caption=None, source=None):
    """A data set whose columns are the record's already: on the Hub, or saved by `datasets`.

    Args:
        path: Its name on the Hub, or a folder: of `save_to_disk`, or of files that `load_dataset` knows.
        split: By default `"train"`.
        name: Of a configuration on the Hub.
        caption: Column that is the caption.

    `image` may stand for `images`; the content of messages may be a text with `<image>` in it. All further columns stay.
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
    place = f"{source}, row {index}"
    record = {**row, "id": str(row.get("id") if row.get("id") is not None else index), "images": _images_of(row)}
    record["source"] = row.get("source") or source
    if kind == "messages":
        record["messages"] = _normal_messages(row["messages"], place)
    elif kind == "document":
        record["document"] = _normal_content(row["document"], place)
    elif kind == "caption":
        record["caption"] = "" if row[caption or "caption"] is None else str(row[caption or "caption"])
    return {key: value for key, value in record.items() if key not in ("image", caption) or key == kind}


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
