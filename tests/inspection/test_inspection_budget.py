"""Token budgets: figures of the documents' exercise, and of real models."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_image, tiny_model

from vlbridge.inspection.inspection_budget import (
    cross_attention_cost,
    example_configs,
    measure_budget,
    token_budget,
)


@pytest.mark.core
def test_the_documents_figures():
    """196, 576, up to 2,880 (and 48 line ends), 64 and 32 tokens per image, in a window of 8K."""
    rows = token_budget(example_configs(), num_images=1, turns=2, tokens_per_turn=150)
    first = {row["model"]: row for row in rows if row["turn"] == 1}
    assert [row["visual_tokens"] for row in first.values()] == [196, 576, 2880 + 48, 64, 32]
    assert [row["prompt_tokens"] for row in first.values()] == [196, 576, 2880 + 48, 1, 32]
    assert [row["left"] for row in first.values()] == [8192 - 150 - tokens for tokens in (196, 576, 2880 + 48, 1, 32)]
    second = [row for row in rows if row["turn"] == 2]
    assert second[0]["left"] == 8192 - 300 - 196 and second[0]["turns_left"] == (8192 - 300 - 196) // 150
    assert second[0]["left_share"] == second[0]["left"] / 8192
    assert [row["cross_attention_bytes"] > 0 for row in second] == [False, False, False, True, False]


def test_tiles_depend_on_the_picture():
    configs = {"tiles": example_configs()["MLP, tiles (LLaVA-1.6)"]}
    (wide,), (square,) = (token_budget(configs, size=size) for size in ((1000, 300), (672, 672)))
    assert wide["visual_tokens"] == configs["tiles"].num_image_tokens(300, 1000) < square["visual_tokens"]
    (several,) = token_budget(configs, num_images=3, size=(672, 672), tokens_per_turn=0)
    assert several["prompt_tokens"] == 3 * square["visual_tokens"] and several["turns_left"] is None
    assert several["left"] < 0


def test_a_window_may_be_given_and_numbers_are_checked():
    (row,) = token_budget({"small": example_configs()["Q-Former (BLIP-2)"]}, window=100, tokens_per_turn=10)
    assert row["left"] == 58 and row["turns_left"] == 5
    with pytest.raises(ValueError, match="turns=0"):
        token_budget(example_configs(), turns=0)


def test_cost_of_cross_attention_is_that_of_its_tensors():
    model, processor = tiny_model("perceiver")
    inputs = processor(images=[tiny_image(0), tiny_image(1)], text="<image>a<image>b", return_tensors="pt")
    with torch.no_grad():
        states = model.to(torch.bfloat16)(**inputs).visual_states
    tensors = [*states.key_states, *states.value_states]
    cost = cross_attention_cost(model.config, 2)
    assert cost["cross_attention_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    layers = model.bridge.cross_attention_layers
    projections = sum(2 * module.weight.numel() for layer in layers for module in (layer.query, layer.out))
    products = len(layers) * 2 * 2 * 6 * 16  # scores and sums over the 6 latents of the last image, 16 channels
    assert cost["cross_attention_flops"] == projections + products
    assert cross_attention_cost(tiny_model("mlp")[0].config) == {"cross_attention_bytes": 0, "cross_attention_flops": 0}


@pytest.mark.parametrize(("bridge", "language"), [("mlp", "llama"), ("qformer", "t5"), ("perceiver", "opt")])
def test_measured_memory_is_that_of_the_cache(bridge, language):
    model, processor = tiny_model(bridge, language)
    rows = measure_budget(model, processor, tiny_image(), counts=(0, 1, 2), text="a b?", repeats=1)
    assert [row["images"] for row in rows] == [0, 1, 2] and all(row["seconds"] > 0 for row in rows)
    assert all(row["peak_bytes"] is None for row in rows)
    sizes = [row["cache_bytes"] for row in rows]
    tokens = [row["prompt_tokens"] for row in rows]
    assert tokens[1] - tokens[0] >= {"mlp": 25, "qformer": 5, "perceiver": 1}[bridge]
    if language == "llama":  # 2 layers, keys and values of 2 heads of 8, 4 bytes
        assert sizes[1] - sizes[0] == (tokens[1] - tokens[0]) * 2 * 2 * 2 * 8 * 4
    if language == "opt":  # its own token in 2 layers, and 6 latents of 16 channels in 2 cross-attention layers
        assert sizes[2] - sizes[1] == (tokens[2] - tokens[1]) * 2 * 2 * 32 * 4 + 2 * 2 * 6 * 16 * 4
    if language == "t5":  # the decoder's one token, and cross-attention to every token of the encoder
        assert sizes[1] - sizes[0] == (tokens[1] - tokens[0]) * 2 * 2 * 32 * 4


def test_loaded_models_and_folders(tmp_path):
    model, processor = tiny_model("qformer")
    model.save_pretrained(tmp_path / "saved")
    rows = token_budget({"loaded": model, "saved": tmp_path / "saved"})
    assert [row["visual_tokens"] for row in rows] == [5, 5] and rows[0]["left"] == rows[1]["left"] == 512 - 5 - 100
