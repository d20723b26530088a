"""Pixels as official code computes them, with Pillow, however the processor was saved and loaded."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import IMAGE_SIZE, bert_like_tokenizer, tiny_model, tiny_stage1
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    BaseImageProcessor,
    BlipImageProcessor,
    CLIPImageProcessor,
    SiglipImageProcessor,
    SiglipImageProcessorPil,
)

import vlbridge
from vlbridge.modeling.modeling_classification import QFormerBlip2ForImageClassification
from vlbridge.processing.processing_backends import EvenCropCLIPImageProcessor, as_described, with_backend
from vlbridge.processing.processing_bridged import BridgedProcessor
from vlbridge.processing.processing_parts import load_image_processor


MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
GREY_LEVEL = 1.01 / 255 / float(STD.min())
# margins of 0 to 5 pixels on either axis, and a picture that is enlarged
SIZES = [(30 + margin, 30) for margin in range(6)] + [(30, 33), (71, 64), (57, 23), (41, 97), (11, 90)]
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
FAMILIES = {"mlp": "down", "qformer": None, "perceiver": "even", "stage 1": None}


def picture(size: tuple[int, int]) -> Image.Image:
    """Noise, in which every difference between two ways of resizing shows."""
    values = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def reference(image: Image.Image, crop: str | None) -> np.ndarray:
    """Bicubic resizing by Pillow and a crop: `(3, height, width)`, normalised.

    Args:
        image: The picture.
        crop: `"even"` as torchvision rounds half a pixel, `"down"` as transformers does; `None` squeezes the picture.
    """
    side = IMAGE_SIZE
    if crop is None:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    else:
        short = min(image.size)
        size = [side if length == short else int(side * length / short) for length in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (
            int(round((length - side) / 2.0)) if crop == "even" else (length - side) // 2 for length in image.size
        )
        image = image.crop((left, top, left + side, top + side))
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


def clip(crop: str | None, backend: str | None = "pil") -> CLIPImageProcessor:
    """As the conversions make it for LLaVA (`"down"`), OpenFlamingo (`"even"`) and LAVIS (`None`)."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    fields = {} if backend is None else {"image_backend": backend}
    if crop is None:
        return CLIPImageProcessor(size=square, do_center_crop=False, **fields)
    rounding = {"crop_rounding": "even"} if crop == "even" else {}
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=square, **rounding, **fields)


def processor_of(family: str, **options):
    crop = FAMILIES[family]
    if family == "stage 1":
        return tiny_stage1(image_processor=clip(crop, **options))[1]
    return tiny_model(family, image_processor=clip(crop, **options))[1]


def pixels(processor, images: list[Image.Image]) -> torch.Tensor:
    if isinstance(processor, BridgedProcessor):
        return processor(images=images, return_tensors="pt")["pixel_values"]
    return processor(images=images, text=["w1"] * len(images), return_tensors="pt")["pixel_values"]


def expected(family: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([reference(picture(size), FAMILIES[family]) for size in SIZES]))


# ---------------------------------------------------------------------- the official pixels


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_those_of_pillow(family, tmp_path):
    """As made, saved, saved again, and as the image processor of another processor."""
    processor = processor_of(family)
    processor.save_pretrained(tmp_path / "one")
    one = AutoProcessor.from_pretrained(tmp_path / "one")
    one.save_pretrained(tmp_path / "two")
    two = AutoProcessor.from_pretrained(tmp_path / "two")
    alone = type(processor).from_pretrained(tmp_path / "two")
    images = [picture(size) for size in SIZES]
    for each in (processor, one, two, alone):
        assert each.image_processor.backend == "pil"
        torch.testing.assert_close(pixels(each, images), expected(family), atol=1e-5, rtol=0)
    fields = json.loads((tmp_path / "two" / "processor_config.json").read_text())["image_processor"]
    assert fields["image_processor_type"] == "CLIPImageProcessor" and fields["image_backend"] == "pil"
    assert one.image_processor.to_dict() == two.image_processor.to_dict() == processor.image_processor.to_dict()
    again = load_image_processor(tmp_path / "two", None, None)
    torch.testing.assert_close(again(images, return_tensors="pt")["pixel_values"], expected(family), atol=1e-5, rtol=0)
    assert pickle.loads(pickle.dumps(again)).to_dict() == again.to_dict()


ALONE = """
import importlib.util, json, sys
from pathlib import Path

root, *hidden = sys.argv[1:]
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] in hidden else find(name, *more)
for name in hidden:
    sys.modules[name] = None
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

assert is_torchvision_available() != ("torchvision" in hidden)
if "vlbridge" not in hidden:
    import vlbridge
for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
    images = [Image.open(path) for path in sorted(Path(root).glob("*.png"))]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code="vlbridge" in hidden)
    inputs = processor(images=images, text=["<image>w1"] * len(images), return_tensors="pt")
    torch.save(inputs["pixel_values"], Path(root) / f"{folder.name}.pt")
    processor.save_pretrained(folder / "again")
"""


@pytest.mark.core
@pytest.mark.parametrize("hidden", [("torchvision",), ("vlbridge",), ("vlbridge", "torchvision")], ids=" ".join)
def test_without_torchvision_and_with_the_code_that_travels_along(hidden, tmp_path):
    """Both give the same pixels, and the processors that they save are loaded here as before."""
    for number, size in enumerate(SIZES):
        picture(size).save(tmp_path / f"{number:02}.png")
    families = [family for family in FAMILIES if family != "stage 1"]
    for family in families:
        processor_of(family).save_pretrained(tmp_path / family, with_code=True)
    if not HAS_TORCHVISION:
        hidden = (*hidden, "torchvision")
    (tmp_path / "alone.py").write_text(ALONE)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "alone.py"), str(tmp_path), *hidden],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    images = [picture(size) for size in SIZES]
    for family in families:
        found = torch.load(tmp_path / f"{family}.pt")
        torch.testing.assert_close(found, expected(family), atol=1e-5, rtol=0)
        again = AutoProcessor.from_pretrained(tmp_path / family / "again", trust_remote_code=False)
        torch.testing.assert_close(pixels(again, images), expected(family), atol=1e-5, rtol=0)


def test_videos_have_the_same_frames():
    processor = processor_of("perceiver")
    frames = [picture(size) for size in SIZES[:3]]
    inputs = processor(images=[[frames]], text=["<image>"], return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"][0], expected("perceiver")[:3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("aspect", ["pad", "anyres"])
def test_padded_and_tiled_pictures(aspect):
    """Both are squares when they reach the image processor."""
    _, processor = tiny_model("mlp", image_processor=clip("down"), image_aspect_ratio=aspect)
    image = picture((57, 23))
    found = processor(images=[image], return_tensors="pt")["pixel_values"]
    if aspect == "pad":
        color = tuple(int(channel * 255) for channel in MEAN.tolist())
        square = Image.new("RGB", (57, 57), color)
        square.paste(image, (0, 17))
        torch.testing.assert_close(found[0].numpy(), reference(square, None), atol=1e-5, rtol=0)
    else:  # the first is the whole picture, squeezed
        torch.testing.assert_close(found.flatten(0, -4)[0].numpy(), reference(image, None), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- the choice


@pytest.mark.core
@pytest.mark.skipif(not HAS_TORCHVISION, reason="without torchvision there is one backend")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_backend_is_chosen_when_loading_and_kept(family, tmp_path):
    processor = processor_of(family, backend=None) if family != "perceiver" else processor_of(family)
    if family != "perceiver":
        assert processor.image_processor.backend == "torchvision"
        assert "image_backend" not in processor.image_processor.to_dict()
    processor.save_pretrained(tmp_path / "one")
    for asked, backend in (
        ({"backend": "pil"}, "pil"), ({"use_fast": False}, "pil"), ({"backend": "torchvision"}, "torchvision"),
        ({"use_fast": True}, "torchvision"),
    ):  # fmt: skip
        chosen = AutoProcessor.from_pretrained(tmp_path / "one", **asked)
        assert chosen.image_processor.backend == backend
        chosen.save_pretrained(tmp_path / "two")
        again = AutoProcessor.from_pretrained(tmp_path / "two")
        assert again.image_processor.backend == backend and type(again.image_processor) is type(chosen.image_processor)
        assert again.tokenizer.init_kwargs.get("backend") != backend
        other = {"pil": "torchvision", "torchvision": "pil"}[backend]
        assert AutoProcessor.from_pretrained(tmp_path / "two", backend=other).image_processor.backend == other
        if backend == "pil":
            images = [picture(size) for size in SIZES]
            torch.testing.assert_close(pixels(again, images), expected(family), atol=1e-5, rtol=0)


@pytest.mark.skipif(not HAS_TORCHVISION, reason="without torchvision there is one backend")
def test_the_even_crop_of_both_backends():
    """Resizing is switched off, so that only the crop counts; pictures that are too small get a border."""
    fields = {"crop_size": {"height": 30, "width": 31}, "crop_rounding": "even", "do_resize": False}
    fields.update(do_rescale=False, do_normalize=False)
    processors = [with_backend(CLIPImageProcessor(**fields), backend) for backend in ("pil", "torchvision")]
    assert type(processors[1]) is EvenCropCLIPImageProcessor
    for width in (20, 21, 27, 30, 31, 32, 33, 34, 35, 36):
        for height in (25, 30, 33, 35):
            image = picture((width, height))
            whole = np.zeros((max(height, 30), max(width, 31), 3), np.uint8)
            top, left = max(30 - height, 0) // 2, max(31 - width, 0) // 2
            whole[top : top + height, left : left + width] = np.asarray(image)
            top, left = round((whole.shape[0] - 30) / 2.0), round((whole.shape[1] - 31) / 2.0)
            wanted = whole[top : top + 30, left : left + 31].transpose(2, 0, 1)
            for processor in processors:
                found = processor([image, image], return_tensors="np")["pixel_values"]
                assert np.array_equal(found, np.stack([wanted, wanted])), (width, height, type(processor))


def test_image_processors_without_a_choice_are_left_alone():
    processor = SiglipImageProcessor()
    before = processor.to_dict()
    assert as_described(processor) is processor
    if HAS_TORCHVISION:
        assert processor.to_dict() == before
    pillow = SiglipImageProcessorPil(image_mean=[0.1, 0.2, 0.3])
    assert as_described(pillow) is pillow and pillow.image_backend == "pil"
    assert type(as_described(SiglipImageProcessor.from_dict(pillow.to_dict()))) is SiglipImageProcessorPil
    assert as_described(None) is None


class OfItsOwn(BaseImageProcessor):
    """As remote code has them."""


def test_choices_that_cannot_be_followed_are_refused():
    with pytest.raises(ValueError, match="backend of an image processor is 'cuda'; expected pil or torchvision"):
        as_described(CLIPImageProcessor(image_backend="cuda"))
    with pytest.raises(ValueError, match="no OfItsOwn that computes with pil; use one of its image processors"):
        as_described(OfItsOwn(image_backend="pil"))
    with pytest.raises(ValueError, match="crop_rounding of a CLIPImageProcessor is 'up'; expected 'even'"):
        as_described(CLIPImageProcessor(image_backend="pil", crop_rounding="up"))
    with pytest.raises(ValueError, match="crop_rounding of a BlipImageProcessor is 'even'"):
        as_described(BlipImageProcessor(image_backend="pil", crop_rounding="even"))


def test_classifiers_and_later_stages_take_over_the_backend(tmp_path):
    """From a saved stage 1, whose folder AutoImageProcessor reads."""
    model, processor = tiny_stage1(image_processor=clip(None))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, image_processor = QFormerBlip2ForImageClassification.from_stage1(tmp_path, id2label={0: "a", 1: "b"})
    images = [picture(size) for size in SIZES]
    torch.testing.assert_close(
        image_processor(images, return_tensors="pt")["pixel_values"], expected("stage 1"), atol=1e-5, rtol=0
    )
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    processor = vlbridge.QFormerBlip2PreTrainingProcessor(loaded, bert_like_tokenizer())
    torch.testing.assert_close(pixels(processor, images), expected("stage 1"), atol=1e-5, rtol=0)
