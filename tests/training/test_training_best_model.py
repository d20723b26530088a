"""Loading the best checkpoint, as `load_best_model_at_end` does: whatever is trained and frozen, it is what was saved.

A run that ends so: `test_training_losses.py`.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toy_runs import save_parts, toy_records, toy_trainer

from vlbridge.training.training_datasets import Samples
from vlbridge.training.training_failures import TrainingError


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    return folder


def with_checkpoint(parts, folder, bridge, trained="bridge"):
    """A trainer, a checkpoint of its model, and the weights that the model then had."""
    wrap = None
    if trained == "adapter":
        settings = LoraConfig(target_modules=r"language_model\..*q_proj", modules_to_save=["bridge"])
        wrap = lambda model: get_peft_model(model, settings)  # noqa: E731
    held_out = Samples(toy_records(4), None)
    trainer = toy_trainer(parts, bridge, dropout=0.0)(
        folder, freeze={"language_model": trained != "language model"}, wrap=wrap,
        keywords={"eval_dataset": held_out}, eval_strategy="steps", eval_steps=100, load_best_model_at_end=True,
    )  # fmt: skip
    held_out.encoder = trainer.encoder
    checkpoint = folder / "checkpoint-2"
    trainer.save_model(str(checkpoint))
    (checkpoint / "trainer_state.json").write_text("{}")
    trainer.state.best_model_checkpoint = str(checkpoint)
    return trainer, checkpoint, {name: tensor.clone() for name, tensor in trainer.bare_model.named_parameters()}


def train_on(trainer) -> None:
    """Change everything that is trained."""
    with torch.no_grad():
        for parameter in trainer.bare_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize(
    ("bridge", "trained"),
    [("mlp", "bridge"), ("qformer", "bridge"), ("perceiver", "bridge"), ("perceiver", "language model"),
     ("mlp", "adapter")],
)  # fmt: skip
def test_the_best_model_is_the_one_that_was_saved(bridge, trained, parts, tmp_path):
    trainer, _, saved = with_checkpoint(parts, tmp_path, bridge, trained)
    loss = trainer.evaluate()["eval_loss"]
    train_on(trainer)
    assert trainer.evaluate()["eval_loss"] != loss
    trainer._load_best_model()  # what `Trainer` calls
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.bare_model.named_parameters())
    assert trainer.evaluate()["eval_loss"] == loss


def test_a_best_checkpoint_of_another_model_is_refused(parts, tmp_path):
    trainer, _, _ = with_checkpoint(parts, tmp_path / "a", "mlp")
    _, other, _ = with_checkpoint(parts, tmp_path / "b", "perceiver")
    trainer.state.best_model_checkpoint = str(other)
    with pytest.raises(TrainingError, match="is of another model: missing bridge"):
        trainer._load_best_model()


def test_when_the_best_checkpoint_is_gone_the_last_model_stays(parts, tmp_path):
    trainer, checkpoint, _ = with_checkpoint(parts, tmp_path, "mlp")
    train_on(trainer)
    last = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    (checkpoint / "trainer_state.json").unlink()  # it could not be written whole
    trainer._load_best_model()
    assert all(torch.equal(tensor, last[name]) for name, tensor in trainer.model.state_dict().items())
