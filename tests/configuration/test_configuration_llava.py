"""MLP-LLaVA's geometry: tiles and tokens of official counts, from the image's size alone; bad fields are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from vlbridge.configuration import MLPLlavaConfig
from vlbridge.configuration.configuration_llava import (
    anyres_layout,
    best_resolution,
    default_grid_pinpoints,
    unpadded_span,
)


# Counted by the official code for 1,200 sizes, 1x1 and 2000x10 among them
OFFICIAL = json.loads((Path(__file__).parent / "anyres_geometry_336.json").read_text())
PINPOINTS = [[height, width] for width, height in OFFICIAL["image_grid_pinpoints_width_height"]]
SIDES = st.integers(1, 3000)


def config_of(image_size=336, patch_size=14, num_prefix_tokens=1, vision_layout="sequence", **options):
    return MLPLlavaConfig(
        image_size=image_size, patch_size=patch_size, num_prefix_tokens=num_prefix_tokens, vision_hidden_size=8,
        vision_layout=vision_layout, **options,
    )  # fmt: skip


def test_official_layouts():
    config = config_of(image_grid_pinpoints=PINPOINTS)
    assert len(OFFICIAL["rows"]) == 1200
    for width, height, across, down, kept_rows, kept_columns, tokens in OFFICIAL["rows"]:
        layout = anyres_layout(config, height, width)
        found = (layout.tiles, layout.rows.stop - layout.rows.start, layout.columns.stop - layout.columns.start)
        assert found == ((down, across), kept_rows, kept_columns), (width, height)
        assert config.num_image_tokens(height, width) == tokens, (width, height)
    fewest, most = config.image_token_range()
    counts = [row[-1] for row in OFFICIAL["rows"]]
    assert (fewest, most) == (min(counts), max(counts)) == (576, 2928)


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, image_size=st.sampled_from([30, 224, 336, 384]))
def test_best_resolution_is_transformers(height, width, image_size):
    pinpoints = default_grid_pinpoints(image_size)
    assert best_resolution(height, width, pinpoints) == select_best_resolution((height, width), pinpoints)


def test_unpadding_truncates_as_the_official_code_does():
    """47/1128 of 72 columns are 3 rows, but 47 * (72 / 1128) is 2.9999999999999996 in floats.

    The official code truncates it to 2 and so cuts off 11 rows on each side, transformers rounds to 3 and cuts off 10.
    One size in 40,000 is concerned; releases were trained with the official code's.
    """
    assert 47 * (72 / 1128) < 3
    assert unpadded_span((47, 1128), (24, 72)) == (slice(11, 13), slice(0, 72))
    assert unpad_image(torch.zeros(1, 24, 72), (47, 1128)).shape == (1, 4, 72)
    assert config_of(image_grid_pinpoints=PINPOINTS).num_image_tokens(47, 1128) == 576 + 2 * 73


def slow_count(rows, columns, height, width):
    """Features of a `rows` x `columns` grid that show the image and not its padding, counted one by one."""
    scale = min(columns / width, rows / height)
    if width / height > columns / rows:
        covered, along, across = int(height * scale), columns, rows
    else:
        covered, along, across = int(width * scale), rows, columns
    border = (across - covered) // 2
    return sum(border <= index < across - border for index in range(across)), along


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, rows=st.integers(1, 60), columns=st.integers(1, 60))
def test_unpadding_keeps_the_middle(height, width, rows, columns):
    kept_rows, kept_columns = unpadded_span((height, width), (rows, columns))
    assert 0 <= kept_rows.start <= kept_rows.stop <= rows and 0 <= kept_columns.start <= kept_columns.stop <= columns
    assert kept_rows.start == rows - kept_rows.stop and kept_columns.start == columns - kept_columns.stop
    counts = kept_rows.stop - kept_rows.start, kept_columns.stop - kept_columns.start
    across, along = slow_count(rows, columns, height, width)
    assert counts == ((across, along) if width / height > columns / rows else (along, across))


@pytest.mark.parametrize(
    ("options", "size", "tokens"),
    [
        ({}, (336, 336), 576),
        ({"vision_feature_select_strategy": "full"}, (336, 336), 577),
        ({"pooling": "average", "pooling_factor": 5}, (336, 336), 25),  # ceil(24 / 5) per side
        ({"pooling": "cls"}, (336, 336), 1),
        ({"image_grid_pinpoints": PINPOINTS, "patch_merge_type": "flat"}, (672, 672), 5 * 576),
        ({"image_grid_pinpoints": PINPOINTS, "patch_merge_type": "spatial"}, (10, 2000), 4 * 576),
        ({"image_grid_pinpoints": PINPOINTS, "patch_merge_type": "flat", "vision_feature_select_strategy": "full"},
         (336, 672), 3 * 577),
        ({"image_grid_pinpoints": PINPOINTS, "pooling": "pixel_shuffle", "pooling_factor": 2}, (672, 672),
         144 + 24 * 25),
    ],
)  # fmt: skip
def test_counts_of_other_settings(options, size, tokens):
    assert config_of(**options).num_image_tokens(*size) == tokens


def test_siglip_has_no_cls_and_cnns_round_up():
    siglip = config_of(384, 14, 0, image_grid_pinpoints=default_grid_pinpoints(384))
    assert siglip.num_image_tokens(768, 768) == 27 * 27 + 54 * 55
    # half of 54 columns show the picture; 27 // 2 are cut off on each side, so one column of padding stays
    assert siglip.num_image_tokens(384, 384) == 27 * 27 + 27 * (28 + 1)
    cnn = config_of(100, 32, 0, "grid", image_grid_pinpoints=default_grid_pinpoints(100))
    assert cnn.num_image_tokens(200, 200) == 4 * 4 + 8 * 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_type": "resampler"}, "'identity', 'linear' or 'mlpNx_gelu'"),
        ({"pooling_factor": 2}, "pooling_factor is 2 with pooling=None"),
        ({"pooling": "average", "pooling_factor": 0}, "pooling_factor is 0"),
        ({"pooling": "cls", "pooling_factor": 2}, "pooling_factor is 2 with pooling='cls'"),
        ({"pooling": "cls", "image_grid_pinpoints": PINPOINTS}, "images can't be cut into tiles"),
        ({"image_grid_pinpoints": []}, "expected a list of"),
        ({"image_grid_pinpoints": [[336]]}, "expected a list of"),
        ({"image_grid_pinpoints": [[336, 0]]}, "expected a list of"),
    ],
)
def test_bad_fields_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MLPLlavaConfig(**options)


def test_what_has_no_place_in_a_grid_is_refused():
    for options in (
        {"image_grid_pinpoints": PINPOINTS},
        {"pooling": "average", "pooling_factor": 2},
        {"image_grid_pinpoints": PINPOINTS, "patch_merge_type": "flat", "pooling": "average"},
    ):
        config = config_of(vision_feature_select_strategy="full", **options)
        with pytest.raises(ValueError, match="keeps 1 prefix tokens"):
            config.num_image_tokens(336, 336)
        assert config_of(num_prefix_tokens=0, vision_feature_select_strategy="full", **options).num_image_tokens(
            336, 336
        )
    with pytest.raises(ValueError, match="this vision encoder has none"):
        config_of(num_prefix_tokens=0, pooling="cls").num_image_tokens(336, 336)
    with pytest.raises(ValueError, match=r"has \[400, 336\]; height and width must be multiples"):
        config_of(image_grid_pinpoints=[[400, 336]]).num_image_tokens(10, 10)
    with pytest.raises(ValueError, match="0x5 pixels"):
        config_of(image_grid_pinpoints=PINPOINTS).num_image_tokens(0, 5)
