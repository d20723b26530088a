"""Images between a record and a model: named by their content, and processed apart from their text."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ..compat_hooks import process_images
from ..files import sha256_of
from .training_records import open_image


def image_key(image: dict | str | os.PathLike | Image.Image) -> str:
    """Name of an image: the hash of its file, or of its pixels.

    Args:
        image: A record's `{"path", "bytes"}`, a file, or a picture.

    Raises:
        vlbridge.images.ImageError: It can't be read.
    """
    if isinstance(image, Image.Image):
        digest = hashlib.sha256(f"{image.mode}|{image.size}|{image.getpalette()}|".encode())
        digest.update(image.tobytes())
        return digest.hexdigest()
    record = image if isinstance(image, dict) else {"path": os.fspath(image), "bytes": None}
    if (data := record.get("bytes")) is not None:
        return hashlib.sha256(data).hexdigest()
    try:
        if not Path(record["path"]).is_file():  # a device or a pipe might never end
            open_image(record)  # says what is wrong with it
        return sha256_of(record["path"])
    except (OSError, ValueError, TypeError):
        open_image(record)
        raise


@dataclass(frozen=True)
class PreparedImage:
    """One image as a sample needs it.

    Args:
        pixel_shape: `(channels, height, width)` of what the vision encoder gets, in pixels.
        size: Height and width of the picture itself, in pixels.
        num_tiles: Number of inputs of `pixel_shape` that the picture becomes: 1, or more at any resolution.
        key: Its name in the feature cache; `None` if it has none.
        patch_features: `(num_tiles, num_patches, vision_dim)`, if they are known.
        pixel_values: `(num_tiles, channels, height, width)`, if the features are not known.
    """

    pixel_shape: tuple[int, ...]
    size: tuple[int, int]
    num_tiles: int
    key: str | None = None
    patch_features: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None

    @property
    def bare(self) -> PreparedImage:
        """The image without its tensors."""
        return replace(self, patch_features=None, pixel_values=None)


def prepare_image(processor, image: Image.Image, key: str | None = None) -> PreparedImage:
    """Process one picture.

    Args:
        processor: The model's processor, or a classifier's image processor.
        image: The picture.
        key: Its name in the feature cache.

    Returns:
        The image with its `pixel_values`.
    """
    if getattr(processor, "tokenizer", None) is None:  # a classifier's image processor
        inputs = processor(images=[image], return_tensors="pt")
    else:
        inputs, _ = process_images(processor, [image], return_tensors="pt")
    pixel_values = torch.as_tensor(inputs["pixel_values"])
    shape = tuple(pixel_values.shape[1:])
    return PreparedImage(shape, (image.height, image.width), len(pixel_values), key, pixel_values=pixel_values)


def image_inputs(processor, images: list[PreparedImage]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What the processor would make of images that are prepared already.

    Args:
        processor: The model's processor.
        images: At least one image; all with `patch_features`, or all with `pixel_values`.

    Returns:
        Model inputs: `patch_features` or `pixel_values`, `(num_tiles, ...)`, and the family's others. And what stands
        in the text for each image; nothing for a processor whose texts have no images.

    Raises:
        ValueError: The images have different shapes, so that they can't be in one tensor.
    """
    if len(shapes := {image.pixel_shape for image in images}) > 1:
        raise ValueError(
            f"images of one record have {sorted(shapes)} pixels after the image processor; expected one size"
        )
    name = "pixel_values" if images[0].patch_features is None else "patch_features"
    inputs = {name: torch.cat([getattr(image, name) for image in images])}
    if getattr(processor, "image_grid_pinpoints", None) is not None:
        inputs["image_sizes"] = torch.tensor([image.size for image in images])
        return inputs, [processor.image_token * processor.num_image_tokens(*image.size) for image in images]
    if getattr(processor, "image_token", None) is None:
        return inputs, []
    pixels = [torch.empty(image.pixel_shape, device="meta") for image in images]  # only their shapes are read
    return inputs, [processor.replace_image_token({"pixel_values": pixels}, index) for index in range(len(images))]


__all__ = ["PreparedImage", "image_inputs", "image_key", "prepare_image"]
