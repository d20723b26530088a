"""Annotation files beside folders of images: LLaVA's conversations, COCO's captions and VQAv2."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets import Value

from .training_rows import as_object, read_json, read_rows
from .training_sources_common import (
    absolute_folder,
    build_dataset,
    content_of_text,
    field_value,
    find_files,
    id_value,
    key_value,
    list_value,
    record_or_reason,
    text_message,
    text_value,
)


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def load_llava(path, split=None, streaming=False, images=None, image_first=False, source="llava"):
    """LLaVA's conversations: `[{"id", "image", "conversations": [{"from", "value"}, ...]}, ...]` in JSON or JSON Lines.

    Samples without `image` are text only; `image` may be a list. What the assistant says before the first question is
    left out, as in the official code.

    Args:
        path: The file, or a folder of such files.
        split: In a folder: take the files whose names begin with this.
        streaming: Read the files while the data set is used.
        images: Folder that `image` is relative to; by default the file's own.
        image_first: Put a message's images before its text, as the official training code does. By default they stay
            where the file has `<image>`, without the line break beside it: the chat template writes its own.
        source: What the records' column `source` says.

    Raises:
        ValueError: The files are not as expected.
        OSError: They can't be read.

    Source: `docs/Finetune_Custom_Data.md`, `preprocess_multimodal` and `preprocess_v1` in `llava/train/train.py`.
    """
    files = find_files(path, split, (".json", ".jsonl"))
    return build_dataset(
        _llava, files, "messages", streaming, images=absolute_folder(images), image_first=image_first, source=source
    )


def _llava(files, images, image_first, source) -> Iterator[dict]:
    for file in files:
        root = images or os.path.dirname(file)

        def record(row, number, place, root=root) -> dict:
            conversations = field_value(row, "conversations", place)
            names = row.get("image")
            names = [] if names in (None, "") else [names] if isinstance(names, str) else names
            names = [text_value(name, place, "image") for name in list_value(names, place, "image")]
            return {
                "id": id_value(row, number, place),
                "source": source,
                "images": [os.path.join(root, name) for name in names],
                "messages": llava_messages(conversations, place, image_first),
            }

        for number, (place, row) in enumerate(read_rows(Path(file), checked=False)):
            yield record_or_reason(record, row, number, place, number=number, source=source)


def llava_messages(conversations, place: str, image_first: bool) -> list[dict]:
    """LLaVA's conversation as messages.

    Args:
        conversations: List of `{"from", "value"}`.
        place: Where it is, for errors.
        image_first: Put a message's images before its text.

    Raises:
        ValueError: A turn is not as expected.
    """
    messages = []
    for turn in list_value(conversations, place, "conversations"):
        sender = as_object(turn, f"{place}, conversations").get("from")
        if not isinstance(sender, str) or sender not in _ROLES:
            raise ValueError(f"{place}: 'from' is {sender!r}; expected one of {', '.join(_ROLES)}.")
        role = _ROLES[sender]
        if role == "assistant" and all(message["role"] == "system" for message in messages):
            continue
        content = content_of_text(text_value(field_value(turn, "value", place), place, "value"))
        if image_first:
            content.sort(key=lambda item: item["type"] != "image")
        messages.append({"role": role, "content": content})
    return messages


def load_coco_captions(path, split=None, streaming=False, images=None, source="coco_captions"):
    """COCO's captions, one record per caption, in the order of the annotations.

    Args:
        path: `captions_*.json`; or the folder that holds `annotations/captions_{split}.json` and the images in
            `{split}`.
        split: With a folder, such as `"train2017"`.
        streaming: Read the file while the data set is used.
        images: Folder of the images; by default `{split}` in the folder, or the file's own folder.
        source: What the records' column `source` says.

    Raises:
        ValueError: The file is not as expected.
        OSError: It can't be read.

    Source: "Data format" on cocodataset.org; `PythonAPI/pycocotools/coco.py`.
    """
    if path is not None and os.path.isdir(os.path.expanduser(path)):
        if split is None:
            raise ValueError(f"{path} is a folder: say which split, such as 'train2017'.")
        folder = os.path.expanduser(path)
        images = images or os.path.join(folder, split)
        path, split = os.path.join(folder, "annotations", f"captions_{split}.json"), None
    files = find_files(path, split, (".json",))
    return build_dataset(_coco_captions, files, "caption", streaming, images=absolute_folder(images), source=source)


def _coco_captions(files, images, source) -> Iterator[dict]:
    for file in files:
        content = as_object(read_json(Path(file)), file)
        root = images or os.path.dirname(file)
        names, wrong = {}, {}  # of files by the images' ids, and what is wrong with others
        for number, row in enumerate(list_value(field_value(content, "images", file), file, "images")):
            _add_row(row, "id", f"{file}, image {number}", names, wrong, "file_name")

        def record(row, number, place, root=root, names=names, wrong=wrong) -> dict:
            image = key_value(field_value(row, "image_id", place), place, "image_id")
            if image not in names:
                raise ValueError(wrong.get(image) or f"{place} is of image {image}, which is not among the images.")
            return {
                "id": id_value(row, number, place),
                "source": source,
                "images": [os.path.join(root, names[image])],
                "caption": text_value(field_value(row, "caption", place), place, "caption"),
            }

        for number, row in enumerate(list_value(field_value(content, "annotations", file), file, "annotations")):
            place = f"{file}, annotation {number}"
            yield record_or_reason(record, row, number, place, number=number, source=source)


def _add_row(row, key: str, place: str, found: dict, wrong: dict, text: str | None = None) -> None:
    """Note a row, or one of its texts, under its key; rows without a usable key are missed where they are asked for."""
    try:
        name = key_value(field_value(row, key, place), place, key)
    except ValueError:
        return
    try:
        found[name] = row if text is None else text_value(field_value(row, text, place), place, text)
    except ValueError as error:
        wrong[name] = str(error)


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
    r"""VQAv2: a record per question. The answer is the most frequent of the ten; the column `answers` has all of them.

    Args:
        path: The questions' file; or the folder with `v2_OpenEnded_mscoco_{split}_questions.json`,
            `v2_mscoco_{split}_annotations.json` and images in `train2014`, `val2014` or `test2015`.
        split: With a folder: `"train2014"`, `"val2014"`, `"test2015"` or `"test-dev2015"`. Tests have no answers: their
            records end with the question.
        streaming: Read the files while the data set is used.
        annotations: The annotations' file.
        images: Folder of the images.
        image_name: Name of an image's file, with `{image_id}`; by default `COCO_{split}_{image_id:012d}.jpg`.
        prompt: What is asked, with `{question}`; LLaVA-1.5 adds
            `"\nAnswer the question using a single word or phrase."`.
        source: What the records' column `source` says.

    Raises:
        ValueError: The files are not as expected.
        OSError: They can't be read.

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
    files = find_files(path, split, (".json",))
    if annotations is not None:
        files += find_files(annotations, None, (".json",))
    extra = {"answers": [Value("string")]}
    # one shard: the second file belongs to the first
    return build_dataset(
        _vqav2,
        files[:1],
        "messages",
        streaming,
        extra,
        answers=tuple(files[1:]),
        images=absolute_folder(images),
        source=source,
        image_name=image_name,
        prompt=prompt,
    )


def _image_split(subtype: str) -> str:
    return "test2015" if subtype.startswith("test") else subtype


def _vqav2(files, answers, images, image_name, prompt, source) -> Iterator[dict]:
    (file,) = files
    questions = as_object(read_json(Path(file)), file)
    answered = None
    if answers:
        answered, rows = {}, field_value(as_object(read_json(Path(answers[0])), answers[0]), "annotations", answers[0])
        for number, row in enumerate(list_value(rows, answers[0], "annotations")):
            _add_row(row, "question_id", f"{answers[0]}, annotation {number}", answered, {})
    subtype = questions.get("data_subtype")
    subtype = _image_split("" if subtype is None else text_value(subtype, file, "data_subtype"))
    image_name = image_name or f"COCO_{subtype}_{{image_id:012d}}.jpg"
    root = images or os.path.dirname(file)

    def record(row, place) -> dict:
        key = key_value(field_value(row, "question_id", place), place, "question_id")
        asked = text_value(field_value(row, "question", place), place, "question")
        messages, given = [text_message("user", prompt.format(question=asked), num_images=1)], []
        if answered is not None:
            if key not in answered:
                raise ValueError(f"{place} ({key}) has no annotation in {answers[0]}.")
            given, target = _vqav2_answers(answered[key], place)
            messages.append(text_message("assistant", target))
        image = key_value(field_value(row, "image_id", place), place, "image_id")
        try:
            name = image_name.format(image_id=image)
        except ValueError as error:
            raise ValueError(f"{place}: image_id is {image!r}, which {image_name!r} can't name: {error}.") from error
        return {
            "id": str(key),
            "source": source,
            "images": [os.path.join(root, name)],
            "messages": messages,
            "answers": given,
        }

    for number, row in enumerate(list_value(field_value(questions, "questions", file), file, "questions")):
        yield record_or_reason(record, row, f"{file}, question {number}", number=number, source=source)


def _vqav2_answers(annotation: dict, place: str) -> tuple[list[str], str]:
    """All answers to a question, and the one to learn."""
    rows = annotation.get("answers")
    rows = [] if rows is None else list_value(rows, place, "answers")
    given = [text_value(field_value(one, "answer", f"{place}, answers"), place, "answer") for one in rows]
    # the official choice, which also decides between equally frequent answers
    target = annotation.get("multiple_choice_answer")
    if target in (None, ""):
        target = (Counter(given).most_common(1) or [("", 0)])[0][0]
    return given, text_value(target, place, "multiple_choice_answer")


__all__ = ["load_coco_captions", "load_llava", "load_vqav2"]
