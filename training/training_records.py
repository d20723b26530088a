"""Records: one form for all training data. `training_data` says what it is."""

from __future__ import annotations

from datasets import Features, Image, Value
from PIL import Image as PILImage

from ..images import ImageError, decode_image, load_image


_CONTENT = [{"type": Value("string"), "text": Value("string")}]
FEATURES = Features(
    {
        "id": Value("string"),
        "source": Value("string"),
        "images": [Image(decode=False)],
        "messages": [{"role": Value("string"), "content": _CONTENT}],
        "caption": Value("string"),
        "document": _CONTENT,
        "why_broken": Value("string"),
    }
)
KINDS = ("messages", "caption", "document")
STRUCTURE = ("form", "placeholders", "roles", "empty")
IMAGE_TOKEN = "<image>"  # what official files write where an image stands, and what every processor here reads


# ---------------------------------------------------------------------- a record


def open_image(value: dict) -> PILImage.Image:
    """Open one of a record's images.

    Args:
        value: `{"path", "bytes"}`; bytes are used if there are any.

    Returns:
        The image in mode `"RGB"`, upright, see `vlbridge.images.load_image`.

    Raises:
        vlbridge.images.ImageError: It is missing or broken, or the path is a web address.
    """
    path, data = (value or {}).get("path"), (value or {}).get("bytes")
    if data is not None:
        return decode_image(data, path or "an image without a name")
    if not path:
        raise ImageError("an image without a name", "has neither a path nor bytes")
    if "://" in path:
        raise ImageError(path, "is an address, not a file; download the images first")
    return load_image(path)


def kind_of(record: dict) -> str | None:
    """Which of `KINDS` a record is; `None` if it only has a class.

    Raises:
        ValueError: It is several at once, or none.
    """
    kinds = [kind for kind in KINDS if record.get(kind) is not None]
    if len(kinds) > 1 or (not kinds and record.get("label") is None):
        raise ValueError(
            f"the record has {' and '.join(kinds) or 'nothing'}; expected exactly one of {', '.join(KINDS)}"
        )
    return kinds[0] if kinds else None


def items_of(record: dict) -> list[dict]:
    """Images and texts of a record in their order, whatever its kind: `{"type", "text"}` each."""
    kind = kind_of(record)
    if kind == "messages":
        return [item for message in record["messages"] for item in message["content"]]
    if kind == "document":
        return record["document"]
    text = [] if kind is None else [{"type": "text", "text": record["caption"]}]
    return [{"type": "image", "text": None}, *text]


def structure_problem(record: dict) -> tuple[str, str] | None:
    """What is wrong with a record before any image is opened.

    Args:
        record: The record.

    Returns:
        The kind of problem, one of `STRUCTURE`, and the reason in one line; or `None`.
    """
    if record.get("why_broken") is not None:
        return "form", record["why_broken"]
    try:
        kind, items = kind_of(record), items_of(record)
    except ValueError as error:
        return "form", str(error)
    if unknown := {item["type"] for item in items} - {"image", "text"}:
        return "form", f"content of type {', '.join(sorted(map(repr, unknown)))}; expected 'image' or 'text'"
    placeholders, images = sum(item["type"] == "image" for item in items), len(record["images"])
    if placeholders != images:
        return "placeholders", f"the text has places for {placeholders} images, the record has {images}"
    texts = [item["text"] or "" for item in items if item["type"] == "text"]
    if any(IMAGE_TOKEN in text for text in texts):
        return "placeholders", f"the text contains {IMAGE_TOKEN}, which would be taken for an image"
    if kind == "messages":
        return _conversation_problem(record["messages"])
    if kind is not None and not any(text.strip() for text in texts):
        return "empty", f"the {kind} is empty"
    return None


def _conversation_problem(messages: list[dict]) -> tuple[str, str] | None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        return (
            "roles",
            f"the roles are {', '.join(map(str, roles)) or 'none'}; expected user and assistant in turn, answered",
        )
    for message in messages:
        said = any(item["type"] == "image" or (item["text"] or "").strip() for item in message["content"])
        if not said:
            return "empty", f"an empty {message['role']} message"
    return None


def image_problem(value: dict) -> tuple[str, str] | None:
    """What is wrong with one image: the file and the reason; or `None`."""
    try:
        open_image(value)
    except ImageError as error:
        return error.path, error.reason
    return None


def problem_of(record: dict, image_problem=image_problem) -> tuple[str, str] | None:
    """What is wrong with a record, its images opened.

    Args:
        record: The record.
        image_problem: Function that opens an image, and gives what is wrong with it.

    Returns:
        The file (or the record's id) and the reason, or `None`.
    """
    if wrong := structure_problem(record):
        return f"record {record.get('id')}", wrong[1]
    return next(filter(None, map(image_problem, record["images"])), None)


__all__ = [
    "FEATURES",
    "IMAGE_TOKEN",
    "KINDS",
    "STRUCTURE",
    "image_problem",
    "items_of",
    "kind_of",
    "open_image",
    "problem_of",
    "structure_problem",
]
