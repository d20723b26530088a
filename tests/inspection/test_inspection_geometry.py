"""Patches are found on the picture again, whatever the image processor does to it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import clip_image_processor, tiny_model
from transformers import BlipImageProcessor

from vlbridge.inspection.inspection_geometry import Grid, heat, patch_grids, seen, share_on, token_grids, views


def close(found, expected, atol=0.35):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=atol, rtol=0)


@pytest.mark.core
def test_a_crop_is_read_backwards():
    """30 pixels of the shorter side, then the middle 30 x 30: of 120 x 60 pixels the middle 60 x 60."""
    _, processor = tiny_model("qformer", image_processor=clip_image_processor())
    ((box, size),) = views(processor, (120, 60))
    assert size == (30, 30)
    close(box, (30.0, 0.0, 90.0, 60.0))
    ((box, _),) = views(processor, (60, 200))
    close(box, (0.0, 70.0, 60.0, 130.0))


def test_a_crop_of_the_middle_of_a_square():
    _, processor = tiny_model("qformer", image_processor=clip_image_processor())
    processor.image_processor.size = {"shortest_edge": 40}
    ((box, _),) = views(processor, (80, 80))
    close(box, (10.0, 10.0, 70.0, 70.0))


def test_squeezed_pictures():
    options = {"image_processor": BlipImageProcessor(size={"height": 30, "width": 30})}
    _, processor = tiny_model("mlp", **options)
    ((box, _),) = views(processor, (100, 47))
    close(box, (0.0, 0.0, 100.0, 47.0))


def test_padded_pictures():
    _, processor = tiny_model("mlp", image_aspect_ratio="pad", image_processor=clip_image_processor())
    ((box, _),) = views(processor, (100, 60))
    close(box, (0.0, -20.0, 100.0, 80.0))


@pytest.mark.parametrize("size", [(120, 60), (60, 120), (90, 90), (200, 61)])
@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_tiles(size, merge):
    model, processor = tiny_model("mlp", image_aspect_ratio="anyres", patch_merge_type=merge)
    grids = token_grids(model.config, processor, size)
    close(grids[0].box, (0.0, 0.0, float(size[0]), float(size[1])), atol=0.02 * max(size))  # the base is squeezed
    numbers = torch.cat([grid.tokens.flatten() for grid in grids])
    count = processor.num_image_tokens(size[1], size[0])
    assert len(set(numbers.tolist())) == len(numbers) and int(numbers.max()) < count
    if merge != "spatial_unpad":
        assert sorted(numbers.tolist()) == list(range(count))
    else:  # each line ends with a token that has no place
        assert count - len(numbers) == len(grids[-1].tokens)
        left, top, right, bottom = grids[-1].box
        assert left > -13 and top > -13 and right < size[0] + 13 and bottom < size[1] + 13
    boxes = [grid.box for grid in grids[1:]]
    assert min(box[0] for box in boxes) <= 7 and max(box[2] for box in boxes) >= size[0] - 7


@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
def test_the_token_of_a_place_changes_with_it(merge):
    """A white dot in a black picture changes the token whose cell it is in most."""
    model, processor = tiny_model("mlp", image_aspect_ratio="anyres", patch_merge_type=merge)
    size = (120, 60)
    grids = token_grids(model.config, processor, size)
    plain = Image.new("RGB", size)
    x, y = 87, 21
    dotted = plain.copy()
    dotted.paste((255, 255, 255), (x - 3, y - 3, x + 3, y + 3))
    # one patch is one token: the encoder is left out, and the mean of a patch is its feature
    pixels = [
        processor(images=[image], text="<image>", return_tensors="pt")["pixel_values"] for image in (plain, dotted)
    ]
    changed = (pixels[1] - pixels[0]).mean(dim=1).unfold(1, 6, 6).unfold(2, 6, 6).mean(dim=(-1, -2)).flatten(1)
    features = changed[..., None]  # (tiles, patches, 1)
    bridge = model.bridge
    bridge.project = lambda states: states
    bridge.image_newline = None if bridge.image_newline is None else torch.nn.Parameter(torch.zeros(1))
    (tokens,) = bridge(features, image_sizes=torch.tensor([[size[1], size[0]]]))
    spread = heat(tokens[:, 0], grids, size)
    peak = int(spread.argmax())
    row, column = divmod(peak, size[0])
    assert abs(row - y) <= 12 and abs(column - x) <= 12
    spread = heat(tokens[:, 0], grids[1:], size)  # tiles have smaller cells
    row, column = divmod(int(spread.argmax()), size[0])
    assert abs(row - y) <= 12 and abs(column - x) <= 12


def test_pooled_tokens_cover_what_patches_cover():
    model, processor = tiny_model("mlp", pooling="average", pooling_factor=2)
    (patches,), (pooled,) = (of(model.config, processor, (50, 50)) for of in (patch_grids, token_grids))
    assert patches.tokens.shape == (5, 5) and pooled.tokens.shape == (3, 3)
    close(pooled.cell(1, 1), (20.0, 20.0, 40.0, 40.0))
    close(patches.cell(2, 3), (30.0, 20.0, 40.0, 30.0))
    model, processor = tiny_model("mlp", pooling="cls")
    (whole,) = token_grids(model.config, processor, (50, 50))
    assert whole.tokens.tolist() == [[0]]
    close(whole.box, (0.0, 0.0, 50.0, 50.0))


def test_prefix_tokens_have_no_place():
    model, processor = tiny_model("qformer")
    (grid,) = patch_grids(model.config, processor, (40, 40))
    assert grid.tokens.flatten().tolist() == list(range(1, 26))


def test_grids_of_a_cnn():
    model, processor = tiny_model("perceiver", vision="resnet")
    (grid,) = patch_grids(model.config, processor, (128, 128))
    assert grid.tokens.shape == (8, 8)
    assert all(-10 < value < 140 for value in grid.box)


def test_heat_keeps_the_weights():
    grids = [Grid((0.0, 0.0, 8.0, 8.0), torch.arange(4).unflatten(0, (2, 2)))]
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0])  # the last one has no place
    spread = heat(weights, grids, (8, 8))
    assert float(spread.sum()) == pytest.approx(1.0)
    assert float(spread[:4, :4].sum()) == pytest.approx(0.1) and float(spread[4:, 4:].sum()) == pytest.approx(0.4)
    outside = heat(weights, [Grid((-8.0, 0.0, 8.0, 8.0), grids[0].tokens)], (8, 8))
    assert float(outside.sum()) == pytest.approx(0.6)  # the left half lies in the padding
    cropped = [Grid((2.0, 2.0, 6.0, 6.0), grids[0].tokens)]
    assert int(seen(cropped, (8, 8)).sum()) == 16
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :4] = True
    assert share_on(weights, cropped, mask) == pytest.approx((0.1, 0.25))


def test_a_picture_that_is_too_small_is_refused():
    _, processor = tiny_model("mlp")
    with pytest.raises(ValueError, match="too few to find out where they go"):
        views(processor, (1, 1))
