"""The trainer: exact continuation, killed runs, full disks, NaN, what is optimised, saved and counted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from killed_runs import check
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from toy_runs import save_parts, toy_records, toy_trainer
from transformers import AutoModel, TrainerCallback

import vlbridge
from vlbridge.compat import training_argument
from vlbridge.modeling import FrozenPartError
from vlbridge.training import training_resumable
from vlbridge.training.training_checkpoints import (
    INCOMPLETE,
    STATE_FILE,
    complete_checkpoint,
    complete_checkpoints,
    last_checkpoint,
    rotate_checkpoints,
)
from vlbridge.training.training_datasets import Samples, SampleStream
from vlbridge.training.training_encoding import IGNORED
from vlbridge.training.training_failures import OtherProcessError, TrainingError, is_storage_error
from vlbridge.training.training_nonfinite import NonFiniteError, first_bad_module
from vlbridge.training.training_samples import SampleTable


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    save_parts(folder, "opt")
    return folder


class Stop(TrainerCallback):
    """End training after some steps, as if the machine had been needed."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def curve(trainer) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return set(tensors.keys())


# ---------------------------------------------------------------------- going on


@pytest.mark.core
@pytest.mark.parametrize(
    ("bridge", "stream", "workers", "saved_at"),
    [
        ("qformer", False, 0, 3),
        ("mlp", False, 2, 2),  # at the end of an epoch
        ("perceiver", True, 0, 3),
        ("qformer", True, 2, 3),
        ("stage1", False, 0, 3),
        ("stage1", True, 2, 2),
    ],
)
def test_a_run_that_goes_on_is_the_uninterrupted_one(parts, tmp_path, bridge, stream, workers, saved_at):
    build = toy_trainer(parts, bridge)
    options = {
        "stream": stream, "dataloader_num_workers": workers, "gradient_accumulation_steps": 2, "logging_steps": 2,
        "max_steps": 6, "warmup_steps": 2, "lr_scheduler_type": "cosine", "save_steps": saved_at,
    }  # fmt: skip
    if bridge == "stage1":
        options["records"] = [{**r, "caption": f"w{n} w{n + 1}"} for n, r in enumerate(toy_records())]
    whole = build(tmp_path / "whole", **options)
    whole.train()
    first = build(tmp_path / "parts", **options)
    first.add_callback(Stop(saved_at + 1))  # what came after the checkpoint is lost
    first.train()
    torch.manual_seed(1234)  # another process
    second = build(tmp_path / "parts", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{saved_at}"))
    assert curve(second) == curve(whole)
    for name, parameter in weights(whole).items():
        assert torch.equal(weights(second)[name], parameter), name


def test_streams_give_the_same_batches_whatever_the_number_of_workers(parts, tmp_path):
    build = toy_trainer(parts, "mlp")
    seen = []
    for workers in (0, 1, 3):
        loader = build(
            tmp_path, stream=True, dataloader_num_workers=workers, per_device_train_batch_size=3
        ).get_train_dataloader()
        seen.append([batch["ids"] for _, batch in zip(range(7), loader)])
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][:3] == [["r0", "r1", "r2"], ["r3", "r4", "r5"], ["r6", "r7", "r0"]]


def test_processes_share_a_stream_out(parts, tmp_path):
    encoder = toy_trainer(parts, "mlp")(tmp_path).encoder
    streams = [SampleStream(toy_records(), encoder, 2, rank, 2) for rank in range(2)]
    seen = [[sample["id"] for _, sample in zip(range(4), stream)] for stream in streams]
    assert seen == [["r0", "r1", "r4", "r5"], ["r2", "r3", "r6", "r7"]]


def test_files_are_shared_out_where_there_are_enough(parts, tmp_path):
    from datasets import IterableDataset

    def rows(names):
        for name in names:
            yield {**toy_records(8)[int(name)], "id": name}

    records = IterableDataset.from_generator(rows, gen_kwargs={"names": [str(k) for k in range(8)]})
    trainer = toy_trainer(parts, "mlp")(tmp_path, records=records, stream=True, dataloader_num_workers=2)
    seen = [batch["ids"] for _, batch in zip(range(6), trainer.get_train_dataloader())]
    assert sorted(sum(seen[:4], [])) == [str(k) for k in range(8)]
    first, second = set(sum(seen[::2], [])), set(sum(seen[1::2], []))
    assert not first & second


@pytest.mark.timeout(300)
def test_killed_runs_leave_a_loadable_checkpoint_20_times_of_20(tmp_path):
    """And so do files that really can't grow."""
    script = Path(__file__).parent.parent / "killed_runs.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, "20", "0"],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kills, full = lines[:20], lines[20:22]
    assert all(kill["status"] == 9 for kill in kills)
    assert any(kill["during_save"] for kill in kills)
    assert [(disk["failed_saves"], disk["left"]) for disk in full] == [(2, ["checkpoint-1"])] * 2
    assert lines[22]["equal"] and len(lines) == 23


# ---------------------------------------------------------------------- full disks


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("writer", ["weights", "optimizer", "sync"])
def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(parts, tmp_path, writer, monkeypatch):
    def fill(*_):
        if writer == "weights":
            monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", no_space)
        elif writer == "optimizer":
            monkeypatch.setattr(torch, "save", no_space)
        else:
            monkeypatch.setattr(os, "fsync", no_space)

    class Disk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                fill()
            if state.global_step == 5:
                monkeypatch.undo()

    trainer = toy_trainer(parts)(tmp_path / "run", save_steps=1, save_total_limit=1, max_steps=4)
    trainer.add_callback(Disk())
    trainer.train()
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["checkpoint-2"]
    assert [failed.split(":")[0] for failed in trainer.failed_saves] == ["step 3", "step 4"]
    assert "No space left" in trainer.failed_saves[0]
    monkeypatch.undo()
    check(str(tmp_path / "run" / "checkpoint-2"))
    again = toy_trainer(parts)(tmp_path / "run", save_steps=1, save_total_limit=1, max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["checkpoint-4"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        FrozenPartError("a frozen part is gone"),
        OSError("the Hub does not answer"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
)
def test_other_errors_are_not_taken_for_a_full_disk(parts, tmp_path, error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    trainer = toy_trainer(parts)(tmp_path, save_steps=1)
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error), match=error.args[-1]):
        trainer.train()
    assert last_checkpoint(tmp_path) is None and not trainer.failed_saves


@pytest.mark.parametrize(
    ("error", "storage"),
    [
        (OSError(errno.EROFS, "Read-only file system"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error while deserializing header: HeaderTooLarge"), False),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), True),
        (ValueError("No space left"), False),
    ],
)
def test_which_errors_are_the_disks(error, storage):
    assert is_storage_error(error) == storage
    assert is_storage_error(OtherProcessError("process 1: elsewhere", storage)) == storage


# ---------------------------------------------------------------------- checkpoints that are not complete


def test_incomplete_checkpoints_are_ignored_refused_and_deleted(parts, tmp_path):
    build = toy_trainer(parts, "mlp")
    build(tmp_path, max_steps=2, save_steps=1).train()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / INCOMPLETE).touch()
    (tmp_path / "checkpoint-4").mkdir()  # killed before its mark was made
    (tmp_path / ".deleting-checkpoint-0").mkdir()
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-2"
    with pytest.raises(TrainingError, match="checkpoint-3 is incomplete"):
        build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = build(tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert curve(again)[0][0] == 1 and again.state.global_step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "checkpoint-3" / INCOMPLETE).exists()
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        build(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_the_older_checkpoint_stays_until_the_new_one_is_complete(parts, tmp_path, monkeypatch):
    seen = []

    def note(path, content):
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        return complete_checkpoint(path, content)

    monkeypatch.setattr(training_resumable, "complete_checkpoint", note)
    trainer = toy_trainer(parts, "mlp")(tmp_path, max_steps=3, save_steps=1, save_total_limit=1)
    trainer.train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"] and trainer.args.save_total_limit == 1


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, None, [2, 9, 10, 11]), (2, None, [10, 11]), (1, 2, [2, 11]), (3, 2, [2, 10, 11]), (1, 11, [11])],
)
def test_the_last_and_the_best_checkpoint_stay(tmp_path, limit, best, left):
    for step in (9, 10, 2, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    rotate_checkpoints(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert [int(path.name.split("-")[1]) for path in complete_checkpoints(tmp_path)] == left


# ---------------------------------------------------------------------- NaN


def spoil(module, what: str, after: int = 0):
    """Make a module's output, or the gradient that comes back to it, not finite, from some call on."""
    calls = []

    def hook(_, args, output):
        calls.append(1)
        if len(calls) <= after:
            return output
        return output * float("inf") if what == "output" else output + (0 * output**2).sqrt()

    module.register_forward_hook(hook)


@pytest.mark.parametrize("what", ["output", "gradient"])
@pytest.mark.parametrize(("bridge", "name"), [("mlp", "bridge.linear_1"), ("qformer", "bridge.qformer.layers.1")])
def test_a_bad_module_is_named(parts, tmp_path, bridge, name, what):
    trainer = toy_trainer(parts, bridge)(tmp_path, gradient_accumulation_steps=2, save_steps=1, max_steps=4)
    module = trainer.model.get_submodule(name)
    spoil(module, what, after=5)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    report = caught.value.report
    assert report["step"] == 3 and report["what"] == ("the loss" if what == "output" else "a gradient")
    assert report["module"].startswith(name), report
    assert set(report["ids"]) <= {record["id"] for record in toy_records()} and len(report["ids"]) == 2
    assert json.loads((tmp_path / "not_finite_step_3.json").read_text()) == report
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-2"
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_bad_parameters_and_inputs_are_named(parts, tmp_path):
    model = toy_trainer(parts, "mlp")(tmp_path).model
    inputs = {"pixel_values": torch.full((1, 3, 30, 30), float("nan"))}
    assert first_bad_module(model, inputs, None)["details"] == "the batch's pixel_values"
    with torch.no_grad():
        model.bridge.linear_2.weight[0, 0] = float("nan")
    found = first_bad_module(model, {}, None)
    assert found == {"module": "bridge.linear_2", "details": "the parameter bridge.linear_2.weight"}


# ---------------------------------------------------------------------- what is optimised


@pytest.mark.core
@pytest.mark.parametrize("bridge", [*vlbridge.FAMILIES, "stage1"])
def test_frozen_parts_are_in_no_optimizer_and_no_checkpoint(parts, tmp_path, bridge):
    options = {}
    if bridge == "stage1":
        options["records"] = [{**record, "caption": f"w{n}"} for n, record in enumerate(toy_records())]
    trainer = toy_trainer(parts, bridge)(tmp_path, save_steps=2, max_steps=2, weight_decay=0.1, **options)
    trainer.train()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.optimizer.optimizer.param_groups
    optimised = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(optimised) == sorted(f"bridge.{name}" for name, _ in trainer.model.bridge.named_parameters())
    saved = keys(tmp_path / "checkpoint-2")
    assert saved and all(name.startswith("bridge.") for name in saved)
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert len(state["state"]) <= len(optimised)
    again = AutoModel.from_pretrained(tmp_path / "checkpoint-2")
    for name, parameter in trainer.model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], parameter, rtol=0, atol=0)
    free = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    decayed = set(optimised) - free
    assert decayed and all(trainer.model.get_parameter(name).ndim > 1 for name in decayed)
    for name in optimised:
        words = ("bias", "norm", "gate", "embeddings", "latents", "query_tokens", "token_rows", "temperature")
        assert (name in free) == any(word in name for word in words), name


def test_learning_rates_by_part(parts, tmp_path):
    rates = {"bridge": 1e-2, "language_model": 1e-4}
    build = toy_trainer(parts, "mlp")
    trainer = build(
        tmp_path, freeze={"language_model": False}, max_steps=2,
        keywords={"learning_rates": rates, "no_weight_decay": ["bridge.linear_1"]}, weight_decay=0.1, save_steps=2,
    )  # fmt: skip
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["lr"], group["weight_decay"]
    assert seen["bridge.linear_2.weight"] == (1e-2, 0.1) and seen["bridge.linear_1.weight"] == (1e-2, 0.0)
    assert seen["language_model.lm_head.weight"] == (1e-4, 0.1)
    assert seen["language_model.model.embed_tokens.weight"] == (1e-4, 0.0)
    assert not any(name.startswith("vision_model") for name in seen)
    trainer.train()
    saved = keys(tmp_path / "checkpoint-2")  # the language model was trained: the whole model is saved
    assert any(name.startswith("language_model.") for name in saved)
    again = build(tmp_path, freeze={"language_model": False}, keywords={"learning_rates": rates}, max_steps=3)
    with pytest.raises(TrainingError, match="optimizer's state .* is of other parameters"):
        again.train(resume_from_checkpoint=True)
    with pytest.raises(TrainingError, match="learning_rates has lora, but trained is bridge only"):
        build(tmp_path, keywords={"learning_rates": {"lora": 1e-3}}).create_optimizer()


@pytest.mark.parametrize("steps", [2, 4])
def test_a_finished_run_is_not_trained_further(parts, tmp_path, steps):
    """Within an epoch, which has four steps, transformers would take one step more."""
    build = toy_trainer(parts, "mlp")
    build(tmp_path, max_steps=steps, save_steps=steps).train()
    checkpoint = tmp_path / f"checkpoint-{steps}"
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps({**state, "seconds": 1e6}))
    again = build(tmp_path, max_steps=steps, save_strategy="epoch")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert json.loads((checkpoint / STATE_FILE).read_text())["seconds"] == 1e6  # nor saved once more
    assert again.state.global_step == steps and not (tmp_path / f"checkpoint-{steps + 1}").exists()
    assert 1e6 < again.seconds < 2e6
    saved = load_file(checkpoint / "model.safetensors")
    assert saved and all(torch.equal(again.model.state_dict()[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("name", ["global_step2", "optimizer_0", "optimizer.bin"])
def test_a_checkpoint_of_another_launch_is_refused(parts, tmp_path, name):
    """The optimizer would begin anew, without a word."""
    build = toy_trainer(parts, "mlp")
    build(tmp_path, max_steps=2, save_steps=2).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").rename(tmp_path / "checkpoint-2" / name)
    with pytest.raises(TrainingError, match=f"has {name}, but this run needs optimizer.pt: it was launched"):
        build(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("part", ("gate", "resampler"))
def test_gates_and_the_resampler_have_learning_rates_of_their_own(part, parts, tmp_path):
    build, group = toy_trainer(parts, "perceiver"), {"gate": "gates"}.get(part, part)
    for rates, expected in (({group: 1e-2}, 1e-2), ({"bridge": 3e-3}, 3e-3), ({}, 1e-3)):
        trainer = build(tmp_path, keywords={"learning_rates": rates}, learning_rate=1e-3)
        trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        for settings in trainer.optimizer.param_groups:
            own = [part in names[id(parameter)] for parameter in settings["params"]]
            assert all(own) or not any(own)
            assert settings["lr"] == (expected if all(own) else rates.get("bridge", 1e-3))
            assert not (all(own) and part == "gate" and settings["weight_decay"])


@pytest.mark.core
def test_lora_beside_the_bridge(parts, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(target_modules=r"language_model\..*(q_proj|v_proj)", modules_to_save=["bridge"])
    build = toy_trainer(parts, "mlp")
    options = {
        "wrap": lambda model: get_peft_model(model, config), "keywords": {"learning_rates": {"lora": 1e-2}},
        "max_steps": 4, "save_steps": 2,
    }  # fmt: skip
    trainer = build(tmp_path / "whole", **options)
    trainer.create_optimizer()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-2, 1e-3}
    trainer.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    again = build(tmp_path / "parts", **options)
    again.train(resume_from_checkpoint=True)
    assert curve(again) == curve(trainer)
    base = build(tmp_path / "other").model
    loaded = PeftModel.from_pretrained(base, tmp_path / "whole" / "checkpoint-4")
    for name, tensor in trainer.model.state_dict().items():
        if "lora_" in name or "modules_to_save" in name:
            torch.testing.assert_close(loaded.state_dict()[name], tensor)


# ---------------------------------------------------------------------- loss


@pytest.mark.core
@pytest.mark.parametrize(("bridge", "language"), [("mlp", "llama"), ("qformer", "opt"), ("perceiver", "llama")])
def test_small_steps_accumulated_are_one_large_step(parts, tmp_path, bridge, language):
    curves, trained = [], []
    for size, accumulated in ((4, 1), (1, 4)):
        trainer = toy_trainer(parts, bridge, language, dropout=0.0)(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=2,
            save_strategy="no", optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        curves.append(curve(trainer))
        trained.append(weights(trainer))
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), atol=1e-5, rtol=1e-4)
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, atol=1e-5, rtol=1e-4)


@pytest.mark.core
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_recomputed_activations_change_nothing(parts, tmp_path, bridge):
    curves = []
    for checkpointing in (False, True):
        trainer = toy_trainer(parts, bridge)(
            tmp_path, max_steps=2, save_strategy="no", **{training_argument("activation_checkpointing"): checkpointing},
            **{training_argument("activation_checkpointing_kwargs"): {"use_reentrant": False}},
        )  # fmt: skip
        trainer.train()
        curves.append(curve(trainer))
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), atol=1e-6, rtol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_logits_are_computed_where_something_is_learned(parts, tmp_path, bridge):
    trainer = toy_trainer(parts, bridge, dropout=0.0)(tmp_path, max_steps=1)
    batch = trainer.encoder.collate([trainer.encoder.encode(record) for record in toy_records(3)])
    batch["labels"][:, :5] = IGNORED
    model, seen = trainer.model.train(), []
    expected = model(**batch).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    targets = trainer._targets(batch)
    learned = int((targets != IGNORED).sum())
    trainer.compute_loss(model, dict(batch))  # the first time, the model looks at how its language model scores
    layer = model.get_output_embeddings()
    hook = layer.register_forward_hook(lambda _, args, scores: seen.append(scores.shape[:-1].numel()))
    loss = trainer.compute_loss(model, dict(batch))
    hook.remove()
    assert seen == [len(targets), learned] and learned < targets.numel()  # the last ones, and what is learned
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)

    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    assert trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(5)) == 0


@pytest.mark.parametrize("accumulated", [1, 2])
def test_data_sets_that_count_differently_each_have_their_own_mean(parts, tmp_path, accumulated):
    records = toy_records()
    records = [{**record, "source": ("pairs", "documents")[number % 2]} for number, record in enumerate(records)]
    factors = {"pairs": 0.2, "documents": 1.0}
    trainer = toy_trainer(parts, "perceiver")(
        tmp_path, records=records, max_steps=1, per_device_train_batch_size=8 // accumulated, save_strategy="no",
        gradient_accumulation_steps=accumulated, optim="sgd", keywords={"loss_weights": factors},
    )  # fmt: skip
    model, encoder = trainer.model.train(), trainer.encoder
    expected = 0
    for name, factor in factors.items():
        batch = encoder.collate([encoder.encode(record) for record in records if record["source"] == name])
        expected += factor * model(**batch).loss
    expected.backward()
    expected = expected.detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    trainer.train()
    _, loss, grad_norm = curve(trainer)[0]
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert grad_norm == pytest.approx(float(norm), rel=1e-4)


# ---------------------------------------------------------------------- records that can't be used


def broken(number: int) -> dict:
    return {
        "id": f"broken{number}",
        "source": "captions",
        "images": [{"path": "/no/such.png", "bytes": None}],
        "caption": "x",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_records_that_can_not_be_used_leave_gaps_that_are_counted(parts, tmp_path, stream, caplog):
    records = [broken(0), *toy_records(), broken(1), broken(2)]
    trainer = toy_trainer(parts, "mlp")(
        tmp_path, records=records, stream=stream, per_device_train_batch_size=1, max_steps=11, save_strategy="no",
        keywords={"max_broken": 3},
    )  # fmt: skip
    trainer.train()  # a batch that is a gap as a whole changes nothing, and is no NaN
    assert trainer.skipped.total() == 3 and trainer.num_seen == 11
    assert all("no such file" in reason.lower() for reason in trainer.skipped)
    trainer = toy_trainer(parts, "mlp")(
        tmp_path, records=records, stream=stream, per_device_train_batch_size=1, max_steps=11, save_strategy="no",
        keywords={"max_broken": 2},
    )  # fmt: skip
    with pytest.raises(TrainingError, match="3 of .* records can't be used, more than max_broken=2 allows"):
        trainer.train()


def test_reasons_are_words(parts, tmp_path):
    samples = Samples(
        [{**toy_records(1)[0], "caption": " "}, *toy_records(2)], toy_trainer(parts, "mlp")(tmp_path).encoder
    )
    assert samples[0]["skipped"] == "the caption is empty"


def test_no_step_needs_float64(parts, tmp_path):
    """Apple's GPUs have none."""

    class No64(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            assert not (isinstance(result, torch.Tensor) and result.dtype == torch.float64), function
            return result

    with No64():
        toy_trainer(parts, "mlp")(tmp_path, max_steps=2).train()


def test_gaps_are_not_learned_from(parts, tmp_path):
    encoder = toy_trainer(parts, "mlp")(tmp_path).encoder
    samples = Samples([broken(0), *toy_records(2)], encoder)
    gap = samples[0]
    assert gap["id"] == "broken0" and gap["skipped"] and (gap["labels"] == IGNORED).all()
    with pytest.raises(TrainingError, match="none of the first 100 records can be used"):
        Samples([broken(0)], encoder)[0]


# ---------------------------------------------------------------------- samples


@pytest.mark.parametrize("bridge", ["mlp", "perceiver", "stage1"])
def test_the_sample_table_shows_fixed_records_every_so_often(parts, tmp_path, bridge):
    records = toy_records(4)
    if bridge == "stage1":
        records = [{**record, "caption": f"w{n}"} for n, record in enumerate(records)]
    build = toy_trainer(parts, bridge)
    options = {"records": records, "save_steps": 2, "max_steps": 4}

    def run(folder, steps=None, resume=None, table=True):
        trainer = build(folder, **options)
        if table:
            trainer.add_callback(SampleTable(trainer.encoder, records[:2], every=1, max_new_tokens=4))
        if steps is not None:
            trainer.add_callback(Stop(steps))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run(tmp_path / "whole")
    text = (tmp_path / "whole" / "samples.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["step"], row["id"]) for row in rows] == [(step, f"r{k}") for step in (1, 2, 3, 4) for k in (0, 1)]
    assert rows[0]["wanted"] == records[0]["caption"]
    table = (tmp_path / "whole" / "samples.md").read_text()
    assert table.startswith("Step 4\n") and table.count("\n| r0 | ") == table.count("\n| r1 | ") == 1
    run(tmp_path / "parts", steps=3)
    run(tmp_path / "parts", resume=True)
    assert (tmp_path / "parts" / "samples.jsonl").read_text() == text
    assert curve(run(tmp_path / "without", table=False)) == curve(trainer)  # generating disturbs nothing
