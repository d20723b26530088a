"""TRL's trainers on tiny models of every family: their losses and log-probabilities are those of our own forward."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig
from tiny import QFORMER, tiny_image, tiny_model
from transformers import AutoModel

from vlbridge.training.training_peft import lora_config


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# TRL's own: it passes names on that newer releases of transformers have replaced
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # fmt: skip
FAMILIES = ["mlp", "qformer", "perceiver"]
ANSWERS = ["yes", "no, two", "a red one", "7"]
ATOL = 2e-5  # log-probabilities in chunks, and hidden states of batches that are padded in another way


def model_of(family):
    """A tiny model and its processor, without dropout: twice the same loss in training."""
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny_model(family, **({"qformer_config": {**QFORMER, **without}} if family == "qformer" else {}))


def turns(number: int, answer: str) -> tuple[list, list]:
    return [{"role": "user", "content": f"what is {number}?"}], [{"role": "assistant", "content": answer}]


def data(kind: str, answers=ANSWERS) -> datasets.Dataset:
    """Conversations about one picture each, in the columns of a kind of data set of TRL."""
    rows = []
    for number, answer in enumerate(answers):
        prompt, completion = turns(number, answer)
        row = {"messages": {"messages": prompt + completion}, "prompt-completion": {"prompt": prompt,
               "completion": completion}, "preference": {"prompt": prompt, "chosen": completion,
               "rejected": turns(number, "none")[1]}, "prompt": {"prompt": prompt}}[kind]  # fmt: skip
        rows.append({"images": [tiny_image(number)], **row})
    return datasets.Dataset.from_list(rows)


def options(folder, **more) -> dict:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 1e-3,
        "use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1, "save_strategy": "no", "seed": 3,
        "disable_tqdm": True, "gradient_checkpointing": False, "dataloader_pin_memory": False, **more,
    }  # fmt: skip


def sft(model, processor, folder, kind="prompt-completion", peft_config=None, **more) -> trl.SFTTrainer:
    return trl.SFTTrainer(
        model, args=trl.SFTConfig(**options(folder, **more)), train_dataset=data(kind), processing_class=processor,
        peft_config=peft_config,
    )  # fmt: skip


def ours(model, batch) -> torch.Tensor:
    """Log-probabilities `(batch, tokens - 1)` of the labels by our own forward, 0 where there is none."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = vlbridge_forward(model)(**inputs).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    found = logits.log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(labels == -100, 0.0)


def vlbridge_forward(model):
    """A forward without TRL's head; with adapters if there are any."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return lambda **inputs: type(bare).forward(bare, **inputs)


@pytest.mark.parametrize("kind", ["prompt-completion", "messages"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sft(family, kind, tmp_path):
    model, processor = model_of(family)
    before = copy.deepcopy(model.state_dict())
    trainer = sft(model, processor, tmp_path, kind, assistant_only_loss=kind == "messages")
    batch = next(iter(trainer.get_train_dataloader()))
    learned = processor.tokenizer.batch_decode([row[row != -100] for row in batch["labels"]])
    assert all(any(answer in text for answer in ANSWERS) for text in learned)
    assert not any("what is" in text for text in learned)
    expected = model(**batch).loss
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("bridge.") for name in changed)
    assert any("token_rows" in name for name in changed) == (family == "perceiver")


@pytest.mark.parametrize("family", ["mlp", "perceiver"])
def test_sft_in_mixed_precision(family, tmp_path):
    """Accelerate puts its autocast around TRL's head."""
    model, processor = model_of(family)
    trainer = sft(model, processor, tmp_path, bf16=True)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = model(**batch).loss
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=0.02)


def test_sft_of_images_at_any_resolution(tmp_path):
    """Pictures of one batch become different numbers of tiles."""
    model, processor = tiny_model("mlp", image_grid_pinpoints=[[30, 60], [60, 30], [60, 60]])
    rows = data("prompt-completion").to_list()
    sizes = [(90, 30), (30, 90), (40, 33), (64, 64)]
    rows = [{**row, "images": [tiny_image(number, sizes[number])]} for number, row in enumerate(rows)]
    trainer = trl.SFTTrainer(
        model, args=trl.SFTConfig(**options(tmp_path, per_device_train_batch_size=4, max_length=None)),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=processor,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["pixel_values"]) > 4
    expected = model(**batch).loss
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_of_adapters(family, preset, checkpointing, tmp_path):
    model, processor = model_of(family)
    plain = LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=r"vision_model\..*", r=4)
    config = lora_config(model, r=4) if preset else plain
    trainer = sft(model, processor, tmp_path, peft_config=config, gradient_checkpointing=checkpointing)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = model(**batch).loss
    trainable = {name: weight.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert any("bridge" in name for name in trainable) == preset
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)
    now = dict(trainer.model.named_parameters())
    assert any(not torch.equal(now[name], weight) for name, weight in trainable.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_resumed_and_loaded_again(family, tmp_path):
    """Four steps are two and two; what is saved generates the same."""
    final = []
    for part in ("whole", "halves"):
        model, processor = model_of(family)
        args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        if part == "whole":
            trainer = sft(model, processor, tmp_path, **args)
            trainer.train()
        else:
            trainer = sft(model, processor, tmp_path, **args)
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        final.append({name: tensor.clone() for name, tensor in model.bridge.state_dict().items()})
    for name, tensor in final[0].items():
        torch.testing.assert_close(final[1][name], tensor, msg=name)
    again = AutoModel.from_pretrained(tmp_path / "checkpoint-4")
    inputs = processor(images=tiny_image(), text="<image>what?", return_tensors="pt")
    written = [each.eval().generate(**inputs, max_new_tokens=6, do_sample=False) for each in (model, again)]
    assert torch.equal(*written)


@pytest.mark.parametrize("family", ["mlp", "qformer"])  # one token, the first, stands for an image of Perceiver
def test_sft_says_that_images_were_cut_off(family, tmp_path):
    model, processor = model_of(family)
    with pytest.raises(ValueError, match=r"`max_length` \(1\) is too short"):
        sft(model, processor, tmp_path, max_length=1).train()


@pytest.mark.parametrize("family", ["mlp", "qformer"])
def test_sft_of_whole_conversations_is_refused(family, tmp_path):
    model, processor = model_of(family)
    with pytest.raises(ValueError, match="labels are <image> placeholders.*assistant_only_loss=True"):
        sft(model, processor, tmp_path, "messages").train()


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_dpo(family, adapter, tmp_path):
    """The loss begins at ln 2, where the model is its reference; log-probabilities are our own."""
    model, processor = tiny_model(family)
    reference = None if adapter else copy.deepcopy(model)
    trainer = trl.DPOTrainer(
        model, ref_model=reference, args=trl.DPOConfig(**options(tmp_path, max_steps=2)),
        train_dataset=data("preference"), processing_class=processor,
        peft_config=lora_config(model, r=4) if adapter else None,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {name: value for name, value in batch.items()}
    chosen = batch.pop("completion_mask").bool()
    labels = batch["input_ids"].masked_fill(~chosen, -100)
    with torch.no_grad():
        expected = ours(model, {**batch, "labels": labels}).sum(dim=1).chunk(2)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and second["loss"] != first["loss"]
    for name, rows in zip(("logps/chosen", "logps/rejected"), expected):
        assert first[name] == pytest.approx(rows.mean().item(), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo(family, tmp_path):
    model, processor = tiny_model(family)
    seen = []

    def reward(completions, **kwargs):
        words = [each[0]["content"] if isinstance(each, list) else each for each in completions]
        seen.extend(words)
        return [float(len(set(text))) for text in words]

    trainer = trl.GRPOTrainer(
        model, reward_funcs=reward, train_dataset=data("prompt"), processing_class=processor,
        args=trl.GRPOConfig(**options(
            tmp_path, per_device_train_batch_size=4, num_generations=2, max_completion_length=5, temperature=1.0,
            beta=0.0, disable_dropout=True,
        )),
    )  # fmt: skip
    compared = []
    compute = trainer._get_per_token_logps_and_entropies

    def compare(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        found = compute(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-logits_to_keep] = -100
        images = {name: kwargs[name] for name in ("pixel_values", "image_sizes") if kwargs.get(name) is not None}
        with torch.no_grad():
            expected = ours(model, {"input_ids": input_ids, "attention_mask": attention_mask, **images,
                                    "labels": labels})[:, -logits_to_keep:]  # fmt: skip
        torch.testing.assert_close(found[0].detach(), expected, atol=ATOL, rtol=1e-4)
        compared.append(expected)
        return found

    trainer._get_per_token_logps_and_entropies = compare
    before = copy.deepcopy(model.bridge.state_dict())
    trainer.train()
    assert len(seen) >= 4 and compared
    if len({len(set(text)) for text in seen}) > 1:  # otherwise nothing is better than anything else
        assert any(not torch.equal(tensor, before[name]) for name, tensor in model.bridge.state_dict().items())
