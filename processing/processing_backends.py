"""Image processors that compute with Pillow, or with torchvision, also after saving and loading.

transformers has two classes for most image processors. Official code resizes with Pillow, transformers with torchvision
where that is installed: some pixels differ by a dozen grey levels. It saves both classes under the same name, so the
choice stands in two more fields of the image processor:

- `image_backend`: `"pil"`, or `"torchvision"` where it is installed; without it transformers chooses.
- `crop_rounding`: `"even"` crops the centre as torchvision's `CenterCrop` does, which rounds half a pixel to the even
  neighbour. Without it half a pixel is left out, as in transformers.
"""

from __future__ import annotations

import os

import numpy as np
import torch
import transformers
from transformers import BaseImageProcessor, CLIPImageProcessor, CLIPImageProcessorPil


BACKENDS = ("pil", "torchvision")


class EvenCrop:
    """Mixin before an image processor with channels first: crops as torchvision's `CenterCrop`."""

    def center_crop(self, image, size, **kwargs):
        """Crop the centre; pictures that are too small get a black border.

        Args:
            image: Array or tensor, `(..., height, width)`.
            size: Height and width of the result, in pixels.
            kwargs: Ignored.

        Source: `center_crop` in `torchvision/transforms/functional.py`.
        """
        wanted = (size.height, size.width)
        missing = [max(want - have, 0) for want, have in zip(wanted, image.shape[-2:])]
        if any(missing):
            before, after = [some // 2 for some in missing], [(some + 1) // 2 for some in missing]
            if isinstance(image, np.ndarray):
                border = [(0, 0)] * (image.ndim - 2) + list(zip(before, after))
                image = np.pad(image, border)
            else:
                image = torch.nn.functional.pad(image, (before[1], after[1], before[0], after[0]))
        top, left = (round((have - want) / 2.0) for want, have in zip(wanted, image.shape[-2:]))
        return image[..., top : top + wanted[0], left : left + wanted[1]]

    def to_dict(self) -> dict:
        """See `BaseImageProcessor.to_dict`; the class is that of transformers, which can read all fields."""
        return {**super().to_dict(), "image_processor_type": "CLIPImageProcessor"}


class EvenCropCLIPImageProcessor(EvenCrop, CLIPImageProcessor):
    """CLIP's image processor with torchvision's resizing and crop."""


class EvenCropCLIPImageProcessorPil(EvenCrop, CLIPImageProcessorPil):
    """CLIP's image processor as open_clip's transforms for pictures of Pillow."""


EVEN_CROPS = {"torchvision": EvenCropCLIPImageProcessor, "pil": EvenCropCLIPImageProcessorPil}


def with_backend(image_processor: BaseImageProcessor, backend: str) -> BaseImageProcessor:
    """The same image processor with a backend of its own, which it keeps when it is saved with its processor.

    Args:
        image_processor: An image processor.
        backend: `"pil"` or `"torchvision"`. Without torchvision it is always Pillow, as in transformers.

    Returns:
        The image processor itself if it has this backend already, else one of another class.

    Raises:
        ValueError: There is no class of transformers for it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"The backend of an image processor is {backend!r}; expected {' or '.join(BACKENDS)}.")
    rounding = getattr(image_processor, "crop_rounding", None)
    fields = image_processor.to_dict()
    kind = fields.pop("image_processor_type", type(image_processor).__name__).removesuffix("Pil")
    if rounding is not None and (rounding != "even" or kind != "CLIPImageProcessor"):
        raise ValueError(f"crop_rounding of a {kind} is {rounding!r}; expected 'even', in a CLIPImageProcessor.")
    crops_so = rounding is None or isinstance(image_processor, EvenCrop)
    if not crops_so or getattr(image_processor, "backend", None) != backend:
        named = getattr(transformers, kind + ("Pil" if backend == "pil" else ""), None)
        if named is None:
            raise ValueError(
                f"transformers has no {kind} that computes with {backend}; use one of its image processors that does, "
                "such as CLIPImageProcessor, or leave image_backend out."
            )
        image_processor = (named if rounding is None else EVEN_CROPS[backend]).from_dict(fields)
    image_processor.image_backend = backend
    return image_processor


def as_described(image_processor):
    """An image processor in the class that its fields ask for: loading takes the one that transformers prefers.

    Args:
        image_processor: An image processor, also one with neither field, or `None`. One that computes with Pillow
            gets the field, so that it does so after saving too.

    Raises:
        ValueError: There is no class of transformers for its fields.
    """
    backend, current = getattr(image_processor, "image_backend", None), getattr(image_processor, "backend", None)
    if backend is None and current != "pil" and getattr(image_processor, "crop_rounding", None) is None:
        return image_processor
    return with_backend(image_processor, backend or current)


class KeepsBackend:
    """Mixin before `ProcessorMixin`: loading gives the image processor that was saved, or the backend asked for."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """See `ProcessorMixin.from_pretrained`.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            kwargs: Passed on; `backend="pil"` or `backend="torchvision"` is the image processor's, instead of the one
                that was saved.
        """
        use_fast = kwargs.get("use_fast")
        backend = kwargs.get("backend") or {True: "torchvision", False: "pil"}.get(use_fast)
        if backend in BACKENDS:  # tokenizers have backends too
            kwargs.pop("backend", None)
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if backend in BACKENDS:
            processor.image_processor = with_backend(processor.image_processor, backend)
        return processor


__all__ = [
    "BACKENDS",
    "EvenCropCLIPImageProcessor",
    "EvenCropCLIPImageProcessorPil",
    "KeepsBackend",
    "as_described",
    "with_backend",
]
