"""What a call gets: pictures as 8-bit RGB, which of them belong to which text, and the contents of messages."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image

from ..images import array_to_rgb, read_image, to_rgb


def is_list(value: object) -> bool:
    """Whether a value is a list or a tuple."""
    return isinstance(value, (list, tuple))


# ---------------------------------------------------------------------- pixels


def picture(image, channels_first: bool | None = None, keep_colors: bool = False):
    """Bring one picture to 8-bit RGB.

    Args:
        image: A picture of Pillow, an array or tensor, a file, an address, or base64.
        channels_first: See `vlbridge.images.array_to_rgb`.
        keep_colors: See `vlbridge.images.array_to_rgb`.

    Raises:
        ValueError: It is none of them, or can't be read.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return array_to_rgb(image, channels_first, keep_colors)
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    raise ValueError(
        f"A picture is a {type(image).__name__}; expected one of Pillow, an array or tensor, a file or an address."
    )


def pictures(images, image_processor, options: dict):
    """Bring all pictures of a call to 8-bit RGB; lists keep their form, and batches in one array become lists.

    Args:
        images: A picture, or lists of them.
        image_processor: The image processor that they are for.
        options: Arguments of the call.
    """
    given = {**options, **(options.get("images_kwargs") or {})}
    order = given.get("input_data_format")
    channels_first = None if order is None else "first" in str(getattr(order, "value", order)).lower()
    rescale = given.get("do_rescale")
    rescale = getattr(image_processor, "do_rescale", True) if rescale is None else rescale

    def of(item):
        if is_list(item):
            return [of(each) for each in item]
        if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 4:
            return [of(each) for each in item]
        return picture(item, channels_first, keep_colors=not rescale)

    return of(images)


# ---------------------------------------------------------------------- which pictures belong to which text


def rows_of(images) -> tuple[list, bool]:
    """Bring pictures into one form.

    Args:
        images: A picture, a list of pictures, or a list with one list per text.

    Returns:
        The pictures, or the lists; and whether it is one list per text.

    Raises:
        ValueError: Some elements are lists and others are not.
    """
    if not is_list(images):
        return [images], False
    nested = [is_list(element) for element in images]
    if any(nested) and not all(nested):
        raise ValueError(
            f"images holds pictures and lists of pictures (element {nested.index(True)} is a list, element "
            f"{nested.index(False)} is not); give a flat list, or one list per text."
        )
    return list(images), any(nested)


def pictures_of_texts(images, counts: list[int], token: str, places: bool) -> list[list]:
    """Find the pictures of every text.

    Args:
        images: A picture, a list of the pictures of all texts, or a list with one list per text.
        counts: Number of placeholders in each text.
        token: The placeholder.
        places: Whether texts may leave out all their placeholders.

    Returns:
        The pictures of each text.

    Raises:
        ValueError: The numbers of pictures and placeholders differ.
    """
    rows, nested = rows_of(images)
    how = f"Write one {token} per image" + (", or none at all: they are put in their place then." if places else ".")
    if nested:
        if len(rows) != len(counts):
            raise ValueError(
                f"images holds {len(rows)} lists, but there are {len(counts)} texts; give one list per text, [] for a "
                "text without images."
            )
    elif sum(counts) or not places or not rows:
        if sum(counts) != len(rows):
            given = f"{len(rows)} images were passed" if rows else "no images were passed"
            raise ValueError(f"The number of {token} tokens in the text is {sum(counts)}, but {given}. {how}")
        rest = iter(rows)
        rows = [[next(rest) for _ in range(count)] for count in counts]
    elif len(counts) == 1:
        rows = [rows]
    elif len(counts) == len(rows):
        rows = [[image] for image in rows]
    else:
        raise ValueError(
            f"{len(rows)} images for {len(counts)} texts without {token}: which belong together? Give one image per "
            "text, or one list of images per text."
        )
    for number, (count, row) in enumerate(zip(counts, rows)):
        if count != len(row) and (count or not places):
            given = f"{len(row)} images were passed for it"
            raise ValueError(f"The number of {token} tokens in text {number} is {count}, but {given}. {how}")
    return rows


# ---------------------------------------------------------------------- messages

CONTENTS = {"text": ("text",), "image": (), "image_url": ("image_url",)}


def _value(holder, name: str):
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def check_contents(conversation: Iterable) -> None:
    """Check that everything in a conversation is known: templates leave out silently what they don't know.

    Args:
        conversation: Messages, or a batch of conversations.

    Raises:
        ValueError: A part of a message is neither text nor an image.
    """
    for number, message in enumerate(getattr(conversation, "messages", conversation)):
        if is_list(message) or hasattr(message, "messages"):
            check_contents(message)
            continue
        content = _value(message, "content")
        if content is None or isinstance(content, str):
            continue
        if not is_list(content):
            raise ValueError(
                f"The content of message {number} is a {type(content).__name__}; expected a string, or a list of "
                "{'type': 'text', 'text': ...} and {'type': 'image', 'image': ...}."
            )
        for part in content:
            kind = _value(part, "type")
            if kind not in CONTENTS:
                found = f"of type {kind!r}" if kind is not None else f"without a type ({part!r:.60})"
                raise ValueError(
                    f"Message {number} has content {found}; expected 'text' or 'image': these models read nothing else."
                )
            if missing := [name for name in CONTENTS[kind] if _value(part, name) is None]:
                raise ValueError(f"Message {number} has content of type {kind!r} without {missing[0]!r}.")


__all__ = ["check_contents", "is_list", "picture", "pictures", "pictures_of_texts", "rows_of"]
