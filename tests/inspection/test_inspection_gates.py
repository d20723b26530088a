"""Gates now and over a run, and what pictures change in visual tokens."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_image, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from vlbridge.inspection.inspection_gates import (
    GateLogger,
    gate_history,
    gates,
    image_variance_share,
    share_history,
    visual_tokens,
)


@pytest.mark.core
def test_gates_of_every_layer():
    model, _ = tiny_model("perceiver")
    with torch.no_grad():
        model.bridge.cross_attention_layers[1].ff_gate.weight.fill_(-0.2)
    expected = [(0, math.tanh(0.7), math.tanh(0.7)), (1, math.tanh(0.7), math.tanh(-0.2))]
    assert [(row["layer"], row["attention"], row["feed_forward"]) for row in gates(model)] == [
        (layer, pytest.approx(attention), pytest.approx(forward)) for layer, attention, forward in expected
    ]


def test_layers_are_those_of_the_decoder():
    model, _ = tiny_model("perceiver", cross_attention_every_n_layers=2)
    assert [row["layer"] for row in gates(model)] == [1]  # the second layer is conditioned


def test_other_families_have_none():
    model, _ = tiny_model("qformer")
    with pytest.raises(ValueError, match="'qformer_blip2' model has no gates"):
        gates(model)


def test_variance_between_images():
    generator = torch.Generator().manual_seed(0)
    queries, images = torch.randn(1, 6, 8, generator=generator), torch.randn(5, 1, 8, generator=generator)
    assert image_variance_share(queries.expand(5, 6, 8)) == pytest.approx(0)
    assert image_variance_share(images.expand(5, 6, 8)) == pytest.approx(1)
    mixed = queries + images
    by_hand = sum(float((mixed[:, q, d] - mixed[:, q, d].mean()).square().sum()) for q in range(6) for d in range(8))
    total = sum(float((mixed[..., d] - mixed[..., d].mean()).square().sum()) for d in range(8))
    assert image_variance_share(mixed) == pytest.approx(by_hand / total)
    assert image_variance_share(torch.ones(2, 3, 4)) == 0
    with pytest.raises(ValueError, match="at least two images"):
        image_variance_share(mixed[:1])


@pytest.mark.parametrize("name", ["mlp", "qformer", "perceiver"])
def test_visual_tokens_of_all_families(name):
    model, processor = tiny_model(name)
    inputs = processor(images=[tiny_image(0), tiny_image(1)], text=["<image>a", "<image>b"], return_tensors="pt")
    tokens = visual_tokens(model, inputs)
    assert tokens.shape[0] == 2 and 0 < image_variance_share(tokens) < 1
    with pytest.raises(ValueError, match="no images"):
        visual_tokens(model, {"input_ids": inputs["input_ids"]})


class Elsewhere(TrainerCallback):
    """Stands for a logger that Trainer reports to."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def trainer_of(model, inputs, tmp_path, **options):
    row = {name: tensor[0] for name, tensor in inputs.items()}
    row["labels"] = row["input_ids"].masked_fill(row["input_ids"] == model.config.image_token_id, -100)
    arguments = TrainingArguments(
        tmp_path, max_steps=4, logging_steps=2, learning_rate=0.1, per_device_train_batch_size=1, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=[row] * 4)


@pytest.mark.core
def test_a_run_logs_its_gates(tmp_path):
    model, processor = tiny_model("perceiver")
    probe = processor(images=[tiny_image(0), tiny_image(1)], text=["<image>a", "<image>b"], return_tensors="pt")
    with torch.no_grad():
        for layer in model.bridge.cross_attention_layers:
            layer.attn_gate.weight.zero_()
    one = processor(images=[tiny_image(2)], text="<image>abc", return_tensors="pt")
    trainer, logger = trainer_of(model, one, tmp_path), Elsewhere()
    trainer.add_callback(logger)
    trainer.add_callback(GateLogger(trainer, probe))
    trainer.train()
    rows = gate_history(trainer.state.log_history)
    assert sorted({row["step"] for row in rows}) == [0, 2, 4] and len(rows) == 6
    assert [row["attention"] for row in rows[:2]] == [0, 0]
    assert all(row["attention"] != 0 for row in rows[2:])
    last = {row["layer"]: row for row in rows if row["step"] == 4}
    for row in gates(model):
        assert last[row["layer"]] == {"step": 4, **row}
    shares = share_history(trainer.state.log_history)
    assert [row["step"] for row in shares][:3] == [0, 2, 4] and all(
        0 < row["image_variance_share"] < 1 for row in shares
    )
    steps = [step for step, logs in logger.seen if "gates/attention/layer_0" in logs]
    assert steps[:3] == [0, 2, 4]
    assert sum("loss" in logs for _, logs in logger.seen) == 2  # no log of the loss is lost


def test_a_run_without_gates_is_refused_at_its_start(tmp_path):
    model, processor = tiny_model("mlp")
    one = processor(images=[tiny_image(2)], text="<image>abc", return_tensors="pt")
    trainer = trainer_of(model, one, tmp_path)
    trainer.add_callback(GateLogger(trainer))
    with pytest.raises(ValueError, match="has no gates"):
        trainer.train()


def test_gates_of_the_copy_that_peft_trains():
    peft = pytest.importorskip("peft")
    from vlbridge.training import lora_config

    model, _ = tiny_model("perceiver")
    tuned = peft.get_peft_model(model, lora_config(model, language="attention", r=2))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "modules_to_save" in name and name.endswith("_gate.weight"):
                weight.fill_(0.1)
    assert [(row["layer"], row["attention"]) for row in gates(tuned)] == [
        (layer, pytest.approx(math.tanh(0.1))) for layer in (0, 1)
    ]
