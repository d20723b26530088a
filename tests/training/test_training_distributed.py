"""Two processes, with DDP, with FSDP2 and (`make zero3`) with ZeRO-3, do what one does.

That is: losses, weights, checkpoints, broken records, values that are not finite, saves that fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import toy_trainer
from train_of_two import CASES, FSDP2_ON_CPUS, SAVED_AT, STEPS, WORLDS
from transformers import AutoModel, AutoProcessor

from vlbridge.training.training_failures import TrainingError
from vlbridge.training.training_weights import save_weights


TWO = ("ddp", "fsdp2", *(["zero3"] if "zero3" in WORLDS else []))


@pytest.fixture(autouse=True)
def world_that_runs(request):
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and parameters.params.get("world") == "fsdp2" and not FSDP2_ON_CPUS:
        pytest.skip("torch 2.6 has FSDP2 for GPUs alone")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).parent.parent / "train_of_two.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, timeout=900, env=environment
    )
    logs = "".join(f"\n{log.name}:\n{log.read_text()[-2000:]}" for log in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    return folder


def found(root: Path, world: str, rank: int = 0) -> dict:
    return json.loads((root / f"{world}_{rank}.json").read_text())


def losses(root: Path, world: str, job: str) -> torch.Tensor:
    steps, values = zip(*found(root, world)[job])
    assert steps == tuple(range(1, STEPS + 1))
    return torch.tensor(values)


@pytest.mark.parametrize("world", TWO)
@pytest.mark.parametrize("bridge", CASES)
def test_two_processes_learn_what_one_does(root, bridge, world):
    """In float32, whose sums are made in another order: 5e-7 of a loss of 4.6 at a time, a little more added up."""
    torch.testing.assert_close(losses(root, world, bridge), losses(root, "one", bridge), atol=1e-5, rtol=0)
    one, two = (load_file(root / name / bridge / "model.safetensors") for name in ("one", world))
    assert two.keys() == one.keys() and all(name.startswith("bridge.") for name in two)
    start = load_file(root / "one" / bridge / f"checkpoint-{SAVED_AT}" / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert any(not torch.allclose(start[name], tensor, atol=1e-3) for name, tensor in one.items())


@pytest.mark.parametrize("world", TWO)
@pytest.mark.parametrize("bridge", CASES)
def test_checkpoints_are_whole_and_hold_what_is_trained_alone(root, bridge, world):
    run, checkpoint = root / world / bridge, root / world / bridge / f"checkpoint-{SAVED_AT}"
    model = AutoModel.from_pretrained(run)
    assert model.config.bridge_only
    saved = load_file(checkpoint / "model.safetensors")
    shapes = {f"bridge.{name}": parameter.shape for name, parameter in model.bridge.named_parameters()}
    assert {name: saved[name].shape for name in shapes if name in saved} == {n: shapes[n] for n in shapes if n in saved}
    assert set(saved) <= set(model.state_dict()) and set(shapes) <= set(saved) | set(model.all_tied_weights_keys)
    assert set(load_file(run / "model.safetensors")) == set(saved)
    names = {path.name for path in checkpoint.iterdir()}
    optimizer = {"ddp": "optimizer.pt", "fsdp2": "optimizer.bin", "zero3": f"global_step{SAVED_AT}"}[world]
    assert {optimizer, "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert not any(name.startswith("pytorch_model") for name in names)  # the frozen parts too
    assert not list(run.glob(".saving*")) and (run / "note.txt").read_text() == "whole"


@pytest.mark.parametrize("world", TWO)
@pytest.mark.parametrize("bridge", ["mlp", "perceiver"])
def test_two_processes_go_on(root, bridge, world):
    assert found(root, world)[f"{bridge}_again"] == found(root, world)[bridge]
    whole, again = (load_file(root / world / job / "model.safetensors") for job in (bridge, f"{bridge}_again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("world", [world for world in TWO if world != "ddp"])
def test_a_checkpoint_of_another_launch_is_refused(root, world, rank):
    needed = {"fsdp2": "optimizer.bin", "zero3": "global_step"}[world]
    assert f"has optimizer.pt, but this run needs {needed}" in found(root, world, rank)["other_launch"]


@pytest.mark.parametrize("world", TWO)
def test_a_whole_model_with_tied_embeddings_is_saved_whole(root, world):
    one, two = (AutoModel.from_pretrained(root / name / "whole") for name in ("one", world))
    assert not two.config.bridge_only and AutoProcessor.from_pretrained(root / world / "whole") is not None
    table = two.language_model.get_input_embeddings().weight
    assert two.language_model.get_output_embeddings().weight is table
    untouched = AutoModel.from_pretrained(root / "one" / "mlp").language_model.get_input_embeddings().weight
    assert not torch.equal(table, untouched)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world", TWO)
def test_broken_records_are_counted_over_processes(root, world):
    for job in ("mlp_broken", "stage1_broken"):
        total, _, seen = found(root, "one")[job]
        both = [found(root, world, rank)[job] for rank in (0, 1)]
        assert [(b[0], b[2]) for b in both] == [(total, seen)] * 2 and sum(b[1] for b in both) == total > 0
    for rank in (0, 1):
        assert "3 of 8 records can't be used, more than max_broken=1" in found(root, world, rank)["too_broken"]


@pytest.mark.parametrize(
    ("world", "job", "what", "module", "num_ids"),
    [
        ("ddp", "loss", "the loss", "bridge.linear_1", 2),  # the batch of one process
        ("ddp", "gradient", "a gradient", "bridge.linear_1", 2),
        # processes wait for each other in the middle of the model, none can run it alone
        ("ddp", "stage1_loss", "the loss", None, 4),  # one's features are in both losses
        ("fsdp2", "loss", "the loss", None, 2),
        ("fsdp2", "gradient", "a gradient", None, 8),  # two batches of each process
        *[("zero3", "loss", "the loss", None, 2), ("zero3", "gradient", "a gradient", None, 8)][: 2 * ("zero3" in TWO)],
    ],
)
def test_all_stop_where_one_is_not_finite(root, world, job, what, module, num_ids):
    told = {found(root, world, rank)[f"bad_{job}"] for rank in (0, 1)}
    assert len(told) == 1 and f"NonFiniteError: step 2: {what} is not finite" in told.pop()
    report = json.loads((root / world / f"bad_{job}" / "not_finite_step_2.json").read_text())
    assert report["module"] == (module or "") and len(report["ids"]) == num_ids
    assert ("of process 1" if module else "can't be run by one process alone") in report["details"]


@pytest.mark.parametrize("world", TWO)
def test_all_fail_where_the_first_fails_in_a_save(root, world):
    """Or else the second would wait for it, in a collective, until a watchdog ends the run."""
    first, second = (found(root, world, rank) for rank in (0, 1))
    assert first["failing_bug"] == ["RuntimeError: a bug", []]
    assert second["failing_bug"] == ["OtherProcessError: process 0: a bug", []]
    assert first["failing_begin"] == ["PermissionError: [Errno 13] Permission denied", []]
    assert second["failing_begin"] == ["OtherProcessError: process 0: [Errno 13] Permission denied", []]
    for rank in (first, second):  # a full disk: training goes on
        error, failed_saves = rank["failing_full"]
        assert not error and [failed.partition(":")[0] for failed in failed_saves] == ["step 1", "step 2"]
        assert all("No space left on device" in failed for failed in failed_saves)
    assert not list((root / world / "failing_full").glob("*"))
    assert first["failing_push"] == "OSError: the Hub does not answer"
    assert second["failing_push"] == "OtherProcessError: process 0: the Hub does not answer"
    run = root / world / "failing_begin"  # what was trained is not lost
    assert (run / "note.txt").read_text() == "there" and load_file(run / "model.safetensors")


@pytest.mark.parametrize("world", TWO)
def test_a_recipe_runs_in_two_processes(root, world):
    summaries = [found(root, world, rank)["recipe"] for rank in (0, 1)]
    assert summaries[0] == summaries[1]
    loss, match = summaries[0]["evaluation"]
    assert loss["metric"] == "loss" and match["value"] == 0.6 and match["records"] == 5
    asked = [found(root, world, rank)["asked"] for rank in (0, 1)]
    every = [str(number) for number in range(5)]
    if world == "ddp":
        assert [a[-1] for a in asked] == [every[::2], every[1::2]]  # shared out
    else:
        assert [a[-1] for a in asked] == [every, every]  # in step
    run = root / world / "recipe"
    tables = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["id"]) for row in tables] == [(step, str(n)) for step in (1, 2) for n in range(3)]
    assert json.loads((run / "training_summary.json").read_text())["hardware"].startswith("2 x ")
    assert AutoModel.from_pretrained(run).config.bridge_only


def test_tensors_that_are_not_whole_are_refused(tmp_path):
    """As DeepSpeed ZeRO-3 leaves them where nothing gathers them: of size 0."""
    trainer = toy_trainer(tmp_path / "parts", "mlp")(tmp_path / "run")
    state = {name: torch.empty(0) for name in trainer.model.state_dict()}
    with pytest.raises(
        TrainingError, match="4 of the bridge's 4 tensors are missing or empty, such as bridge.linear_1"
    ):
        save_weights(trainer.model, trainer.processor, tmp_path / "out", state)
    with pytest.raises(TrainingError, match="missing or empty"):
        save_weights(trainer.model, trainer.processor, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
