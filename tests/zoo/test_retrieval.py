"""RICES: features, neighbours, and indices on disk that belong to their images and their encoder."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BRIDGE_OPTIONS, clip_image_processor, tiny_image, tiny_model, tiny_stage1, tiny_tokenizer

import vlbridge
from vlbridge import ImageIndex, answer_with
from vlbridge.prompts import image_key


families = pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
PICTURES = [tiny_image(number) for number in range(9)]


def slow_features(model, processor, pictures) -> torch.Tensor:
    """One picture at a time, through the processor."""
    rows = []
    for picture in pictures:
        pixels = processor(images=picture, text=processor.image_token, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            mean = model.get_patch_features(pixels)[0].mean(dim=0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


@pytest.mark.core
@families
def test_neighbours_by_the_models_own_encoder(bridge):
    model, processor = tiny_model(bridge)
    index = ImageIndex.build(model, processor, PICTURES, batch_size=4)
    features = slow_features(model, processor, PICTURES)
    torch.testing.assert_close(index.features, features, atol=1e-6, rtol=0)
    queries = [tiny_image(20), tiny_image(21), PICTURES[4]]
    similarity = slow_features(model, processor, queries) @ features.T
    expected = similarity.argsort(dim=-1, descending=True).tolist()
    assert index.nearest(queries, 9) == expected
    assert index.nearest(queries, 3) == [row[:3] for row in expected]
    assert index.nearest(index.features_of(queries), 3) == [row[:3] for row in expected]
    assert index.nearest(PICTURES, 1) == [[number] for number in range(9)]
    assert index.nearest([], 3) == [] and index.nearest(queries, 0) == [[], [], []]


def test_the_query_itself_is_excluded():
    model, processor = tiny_model("mlp")
    index = ImageIndex.build(model, processor, PICTURES)
    plain = index.nearest(PICTURES[:4], 9)
    found = index.nearest(PICTURES[:4], 3, exclude=[0, None, [2, plain[2][1]], (number for number in (3,))])
    assert found == [plain[0][1:4], plain[1][:3], plain[2][2:5], plain[3][1:4]]
    with pytest.raises(ValueError, match="2 images, but exclude has 1 entries: give one per image"):
        index.nearest(PICTURES[:2], 1, exclude=[0])
    with pytest.raises(ValueError, match="exclude has -1; expected indices from 0 to 8, or None"):
        index.nearest(PICTURES[:1], 1, exclude=[-1])
    with pytest.raises(ValueError, match="9 images are wanted, but the index has 8 beside what is excluded"):
        index.nearest(PICTURES[:1], 9, exclude=[0])


def test_equal_images_come_in_their_order():
    model, processor = tiny_model("mlp")
    pictures = [PICTURES[0], PICTURES[1], PICTURES[0].copy(), PICTURES[0].copy()]
    index = ImageIndex.build(model, processor, pictures, batch_size=1)
    assert index.nearest([PICTURES[0]], 3, exclude=[2]) == [[0, 3, 1]]


@families
def test_the_most_similar_demonstration_is_last(bridge):
    """Next to the query, as OpenFlamingo shows them; and they answer like any others."""
    model, processor = tiny_model(bridge)
    pool = [{"image": picture, "question": "what?", "answer": f"a{number}"} for number, picture in enumerate(PICTURES)]
    index = ImageIndex.build(model, processor, PICTURES)
    chosen = index.demonstrations(pool, PICTURES[:2], 3, exclude=[0, 1])
    nearest = index.nearest(PICTURES[:2], 3, exclude=[0, 1])
    assert [[each["answer"] for each in row] for row in chosen] == [[f"a{n}" for n in row[::-1]] for row in nearest]
    queries = [{"image": picture, "question": "what?"} for picture in PICTURES[:2]]
    found = answer_with(model, processor, chosen, queries, max_new_tokens=6)
    assert found == vlbridge.inference.answer_few_shot(model, processor, chosen, queries, max_new_tokens=6)
    with pytest.raises(ValueError, match="pool has 8 demonstrations, but the index 9 images"):
        index.demonstrations(pool[1:], PICTURES[:1], 1)


def test_tiles_sizes_and_videos():
    """The mean of an image is over all its tiles or frames."""
    model, processor = tiny_model("mlp", image_grid_pinpoints=[[30, 60], [60, 30]])
    pictures = [tiny_image(number, size) for number, size in enumerate([(40, 33), (80, 30), (30, 90)])]
    index = ImageIndex.build(model, processor, pictures)
    for picture, found in zip(pictures, index.features, strict=True):
        pixels = processor(images=picture, text=processor.image_token, return_tensors="pt")["pixel_values"]
        assert len(pixels) > 1
        with torch.no_grad():
            mean = model.get_patch_features(pixels).flatten(0, 1).mean(dim=0)
        torch.testing.assert_close(found, mean / mean.norm(), atol=1e-6, rtol=0)
    model, processor = tiny_model("perceiver", max_num_frames=4)
    index = ImageIndex.build(model, processor, [PICTURES[:2], PICTURES[2]])
    with torch.no_grad():
        pixels = processor(images=PICTURES[:2], text=["<image>"] * 2, return_tensors="pt")["pixel_values"]
        mean = model.get_patch_features(pixels).flatten(0, 1).mean(dim=0)
    torch.testing.assert_close(index.features[0], mean / mean.norm(), atol=1e-6, rtol=0)
    assert index.nearest([PICTURES[2]], 1) == [[1]]


def test_a_model_without_a_language_model():
    model, processor = tiny_stage1(image_processor=clip_image_processor())
    assert ImageIndex.build(model, processor, PICTURES[:3]).nearest(PICTURES[:3], 1) == [[0], [1], [2]]


# ---------------------------------------------------------------------- on disk


@pytest.fixture
def forbidden(monkeypatch):
    """After this is called, the encoder must not run."""

    def forbid(model):
        def refuse(*args, **kwargs):
            raise AssertionError("the encoder ran")

        monkeypatch.setattr(model, "get_patch_features", refuse)

    return forbid


def test_an_index_is_built_once(tmp_path, forbidden):
    model, processor = tiny_model("mlp")
    path = tmp_path / "folder" / "index.safetensors"
    made = ImageIndex.build(model, processor, PICTURES, path)
    assert os.listdir(path.parent) == [path.name], "nothing else is left"
    assert path.stat().st_mode & 0o444 == 0o666 & ~_umask() & 0o444, "as readable as other files"
    forbidden(model)
    read = ImageIndex.build(model, processor, PICTURES, path)
    assert torch.equal(read.features, made.features) and read.ids == made.ids == list(map(image_key, PICTURES))
    assert read.nearest(made.features[:2], 3) == made.nearest(made.features[:2], 3)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_an_index_of_files(tmp_path, forbidden):
    """Files are known by their content: they may move, but not change."""
    model, processor = tiny_model("qformer")
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for number, picture in enumerate(PICTURES):
            picture.save(tmp_path / folder / f"{number}.png")
    here, there = (sorted((tmp_path / folder).iterdir()) for folder in ("here", "there"))
    path = tmp_path / "index.safetensors"
    ImageIndex.build(model, processor, here, path)
    forbidden(model)
    assert len(ImageIndex.build(model, processor, there, path)) == 9
    PICTURES[0].save(there[3])
    with pytest.raises(ValueError, match="holds other images: 9 of them, expected 9; the first difference is image 3"):
        ImageIndex.build(model, processor, there, path)
    with pytest.raises(ValueError, match="9 of them, expected 8; the first difference is image 8"):
        ImageIndex.build(model, processor, here[:8], path)
    with pytest.raises(ValueError, match="the first difference is image 0"):
        ImageIndex.build(model, processor, here[::-1], path)


def test_names_instead_of_contents(tmp_path, forbidden):
    model, processor = tiny_model("mlp")
    path = tmp_path / "index.safetensors"
    names = [f"COCO_{number}" for number in range(9)]
    ImageIndex.build(model, processor, PICTURES, path, ids=names)
    forbidden(model)
    assert ImageIndex.build(model, processor, [None] * 9, path, ids=names).ids == names
    with pytest.raises(ValueError, match="8 ids, but 9 images"):
        ImageIndex.build(model, processor, PICTURES, ids=names[:8])


def test_another_encoder_is_refused(tmp_path):
    model, processor = tiny_model("mlp")
    path = tmp_path / "index.safetensors"
    ImageIndex.build(model, processor, PICTURES, path)
    other, its_processor = tiny_model("mlp", seed=1, vision_feature_layer=-2)
    with pytest.raises(ValueError, match="made by another encoder.* Delete .*index.safetensors, or give another path"):
        ImageIndex.build(other, its_processor, PICTURES, path)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="made by another encoder"):
        ImageIndex.build(model, processor, PICTURES, path)
    model, processor = tiny_model("mlp")
    ImageIndex.build(model, processor, PICTURES, path)
    with torch.no_grad():
        next(model.vision_model.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="made by another encoder"):
        ImageIndex.build(model, processor, PICTURES, path)


def test_another_bridge_on_the_same_encoder_reads_the_same_index(tmp_path, forbidden):
    model, processor = tiny_model("mlp")
    path = tmp_path / "index.safetensors"
    ImageIndex.build(model, processor, PICTURES, path)
    for bridge in ("mlp", "perceiver"):  # the Q-Former reads the CLS token too: its features are others
        other, its_processor = vlbridge.compose(
            model.vision_model,
            model.language_model,
            bridge,
            tokenizer=tiny_tokenizer(),
            image_processor=processor.image_processor,
            **BRIDGE_OPTIONS[bridge],
        )
        forbidden(other)
        assert len(ImageIndex.build(other, its_processor, PICTURES, path)) == 9
    pads, its_processor = tiny_model("mlp", image_aspect_ratio="pad")
    with pytest.raises(ValueError, match="made by another encoder"):
        ImageIndex.build(pads, its_processor, PICTURES, path)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    model, processor = tiny_model("mlp")
    path = tmp_path / "index.safetensors"
    ImageIndex.build(model, processor, PICTURES, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="can't be read as an index of images"):
        ImageIndex.build(model, processor, PICTURES, path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="can't be read as an index of images"):
        ImageIndex.build(model, processor, PICTURES, path)
    save_file({"features": torch.zeros(2, 3)}, path)
    with pytest.raises(ValueError, match="is not an index of images of this release"):
        ImageIndex.build(model, processor, PICTURES, path)
    with pytest.raises(ValueError, match="There are no images to make an index of"):
        ImageIndex.build(model, processor, [])


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    model, processor = tiny_model("mlp")
    index = ImageIndex.build(model, processor, PICTURES)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        index.save(tmp_path / "index.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_the_file_holds(tmp_path):
    model, processor = tiny_model("mlp")
    model.config.frozen_parts = {"vision_model": {"source": "eye", "revision": None, "sha256": "ab"}}
    path = tmp_path / "index.safetensors"
    ImageIndex.build(model, processor, PICTURES, path)
    tensors = load_file(path)
    assert tensors["features"].shape == (9, 32) and tensors["features"].dtype == torch.float32
    assert json.loads(bytes(tensors["ids"].tolist())) == list(map(image_key, PICTURES))
    header = json.loads(path.read_bytes()[8 : 8 + int(np.frombuffer(path.read_bytes()[:8], "<u8")[0])])
    assert json.loads(header["__metadata__"]["vision_model"])["source"] == "eye"
