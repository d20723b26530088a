"""Gradients of what is trained inside a part that `freeze()` froze: adapters, and weights thawed by hand."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    BRIDGE_OPTIONS,
    COMBINATIONS,
    VISION,
    checkpoint_activations,
    clip_image_processor,
    spread_weights,
    tiny_image,
    tiny_model,
    tiny_stage1,
)

from vlbridge import FAMILIES


IN_ENCODER = r".*vision_model.*(q_proj|v_proj)"


def inputs_of(model, processor) -> dict:
    inputs = processor(images=tiny_image(), text="<image>what is it?", return_tensors="pt")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    if model.config.is_encoder_decoder:
        inputs["labels"] = torch.tensor([[5, 6, 2]])
    return inputs


def open_adapters(model) -> None:
    """LoRA's `B` begins with zero, and then `A` has no gradient."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)


def check_gradients(model, loss_of, wanted: str) -> None:
    """Every trained weight has a gradient; two of them equal the slope of the loss."""
    loss_of().backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    inside = {name: weight for name, weight in trained.items() if wanted in name}
    assert inside
    without = [name for name, weight in inside.items() if weight.grad is None or not weight.grad.abs().sum()]
    assert not without
    for weight in (next(iter(inside.values())), list(inside.values())[-1]):
        index = int(weight.grad.abs().argmax())
        step, losses = 1e-2, []
        for sign in (1, -1):
            with torch.no_grad():
                weight.view(-1)[index] += sign * step
                losses.append(float(loss_of().double()))
                weight.view(-1)[index] -= sign * step
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(float(weight.grad.view(-1)[index]), rel=0.05, abs=2e-4)


@pytest.mark.parametrize("targets", [IN_ENCODER, "all-linear"], ids=["vision only", "all linear"])
@pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)
def test_adapters_on_the_encoder_are_trained(bridge, language, targets):
    model, processor = tiny_model(bridge, language)
    inputs = inputs_of(model, processor)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=0.0))
    open_adapters(adapted)
    check_gradients(adapted, lambda: adapted(**inputs).loss, "vision_model.encoder.layers.0")


def test_adapters_are_trained_under_checkpointing():
    model, processor = tiny_model("mlp")
    inputs = inputs_of(model, processor)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=IN_ENCODER))
    open_adapters(adapted)
    adapted.eval()
    adapted(**inputs).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in adapted.named_parameters() if weight.requires_grad}
    adapted.zero_grad()
    checkpoint_activations(model, use_reentrant=False)
    adapted.train()
    adapted(**inputs).loss.backward()
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, expected[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_the_encoder_of_a_classifier(family):
    torch.manual_seed(0)
    model, _ = FAMILIES[family].classifier_class.from_vision(
        VISION["clip"](), num_labels=3, image_processor=clip_image_processor(), **BRIDGE_OPTIONS[family]
    )
    spread_weights(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=IN_ENCODER))
    open_adapters(adapted)
    inputs = {"pixel_values": torch.rand(3, 3, 30, 30), "labels": torch.tensor([0, 1, 2])}
    check_gradients(adapted, lambda: adapted(**inputs).loss, "vision_model.encoder.layers.0")


def test_adapters_on_the_encoder_in_stage_1():
    model, processor = tiny_stage1()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=IN_ENCODER))
    open_adapters(adapted)
    inputs = processor(images=[tiny_image(0), tiny_image(1)], text=["w1 w2", "w3"], return_tensors="pt", padding=True)

    def loss_of():
        torch.manual_seed(0)  # the negatives are drawn
        return adapted(**inputs).loss

    check_gradients(adapted, loss_of, "vision_model.encoder.layers.0")


@pytest.mark.parametrize("bridge", FAMILIES)
def test_weights_that_were_thawed_by_hand_are_trained(bridge):
    model, processor = tiny_model(bridge)
    model.vision_model.encoder.layers[0].requires_grad_(True)
    inputs = inputs_of(model, processor)
    check_gradients(model, lambda: model(**inputs).loss, "vision_model.encoder.layers.0.mlp")
    features = model.get_patch_features(inputs["pixel_values"])
    assert features.requires_grad


@pytest.mark.core
@pytest.mark.parametrize("bridge", FAMILIES)
def test_a_frozen_encoder_keeps_nothing_for_the_backward_pass(bridge):
    model, processor = tiny_model(bridge)
    model.vision_model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_(output.is_leaf)  # as enable_input_require_grads does
    )
    features = model.get_patch_features(inputs_of(model, processor)["pixel_values"])
    assert not features.requires_grad
