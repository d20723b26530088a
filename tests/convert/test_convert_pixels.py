"""Converted processors see pictures as Pillow resizes them, whatever transformers would take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_convert_export import CASES, convert
from transformers import AutoProcessor


MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
SIZES = [(33, 40), (40, 33), (57, 23), (61, 61), (71, 64), (90, 11), (28, 31)]


NAMES = sorted(path.parent.relative_to(CASES).as_posix() for path in CASES.glob("*/*/meta.json"))


def reference(image: Image.Image, side: int, family: str) -> np.ndarray:
    """Normalised pixels, `(3, height, width)`.

    open_clip's transforms for OpenFlamingo and CLIP's image processor of transformers 4 for LLaVA: the shortest side,
    and a crop that rounds half a pixel to the even one, or down. LAVIS squeezes the whole picture.
    """
    if family in ("llava", "openflamingo"):
        short = min(image.size)
        image = image.resize(
            [side if length == short else int(side * length / short) for length in image.size],
            Image.Resampling.BICUBIC,
        )
        left, top = (
            int(round((length - side) / 2.0)) if family == "openflamingo" else (length - side) // 2
            for length in image.size
        )
        image = image.crop((left, top, left + side, top + side))
    else:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_pixels_of_converted_processors(name: str, tmp_path: Path):
    """Through the loaded processor; LLaVA's tiles are checked elsewhere, here it is its image processor."""
    if list((CASES / name).rglob("*.model")):
        pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece files by it")
    convert(CASES / name, tmp_path / "model")
    family = name.partition("/")[0]
    # BLIP is in transformers' own class, which has to be told
    processor = AutoProcessor.from_pretrained(tmp_path / "model", **({"backend": "pil"} if family == "blip" else {}))
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        placeholder = "" if family == "blip" or "stage1" in name else "<image>"
        if family == "llava":
            found = processor.image_processor([image], return_tensors="pt")["pixel_values"]
        else:
            found = processor(images=[image], text=[f"{placeholder}a"], return_tensors="pt")["pixel_values"]
        expected = torch.from_numpy(reference(image, found.shape[-1], family))[None]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
