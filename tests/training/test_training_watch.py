"""A run that one can watch: what its picture and its page show, what they cost, and that they go on after a resume."""

from __future__ import annotations

import html
import json
import re
import sys

import pytest
import torch
from PIL import Image
from toy_runs import toy_trainer

from vlbridge.inspection import gate_history
from vlbridge.training import training_watch
from vlbridge.training.training_gates import gates
from vlbridge.training.training_samples import SampleTable
from vlbridge.training.training_watch import RunReport, draw_run, points, samples_of


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


def watched(build, output, **arguments):
    trainer = build(output, save_steps=3, **arguments)
    records = [trainer.train_dataset.records[number] for number in range(2)]
    trainer.add_callback(SampleTable(trainer.encoder, records, every=2, max_new_tokens=3))
    trainer.add_callback(RunReport(trainer, "a run & more"))
    return trainer


def test_a_resumed_run_shows_all_of_it(parts, tmp_path):
    """Losses, all learning rates, gates and samples, as in a run that was never stopped; and one mean of the loss."""
    build = toy_trainer(parts, "perceiver", dropout=0.0)
    rates = {"keywords": {"learning_rates": {"resampler": 1e-4}}}
    whole = watched(build, tmp_path / "whole", **rates)
    done = whole.train()
    watched(build, tmp_path / "stopped", **rates).train()
    for name in ("checkpoint-6", "training.html", "training.png"):
        (tmp_path / "stopped" / name).rename(tmp_path / name)
    resumed = watched(build, tmp_path / "stopped", **rates)
    done_again = resumed.train(resume_from_checkpoint=True)

    steps, losses = points(whole.state.log_history, "loss")
    assert steps == [1, 2, 3, 4, 5, 6]
    assert done.training_loss == pytest.approx(sum(losses) / 6, abs=1e-5)
    assert done_again.training_loss == pytest.approx(done.training_loss, abs=1e-5)
    assert points(resumed.state.log_history, "train_loss")[1][-1] == done_again.training_loss
    for name in ("loss", "learning_rates/resampler", "learning_rates/bridge", "gates/attention/layer_0"):
        assert points(resumed.state.log_history, name) == points(whole.state.log_history, name)
    # after the step, of six that fall linearly to zero
    assert points(whole.state.log_history, "learning_rates/resampler")[1][0] == pytest.approx(1e-4 * 5 / 6)
    history = gate_history(whole.state.log_history)
    assert [row for row in history if row["step"] == 6] == [{"step": 6, **row} for row in gates(whole.bare_model)]
    titles = [axes.get_title() for axes in draw_run(whole.state.log_history).axes]
    assert titles == ["loss", "learning rate", "tanh of the attention gates", "tanh of the feed-forward gates"]
    for folder in ("whole", "stopped"):
        page = (tmp_path / folder / "training.html").read_text()
        said = [json.loads(line) for line in (tmp_path / folder / "samples.jsonl").read_text().splitlines()]
        assert {row["step"] for row in said} == {2, 4, 6}
        assert all(html.escape(row["generated"]) in page for row in said)
        assert "a run &amp; more" in page and "Step 6 of 6" in page and "refresh" not in page
        assert not re.search(r"(src|href)=\"(?!data:)", page)  # nothing is fetched
        assert Image.open(tmp_path / folder / "training.png").size == (900, 700)
    assert not [path.name for path in (tmp_path / "whole").iterdir() if path.name.startswith((".", "tmp"))]


def test_drawing_takes_no_more_than_a_hundredth_of_the_run(parts, tmp_path, monkeypatch):
    """A step takes 10 seconds and a picture 2: at step 10 a hundredth is 1 s, the first guess; after it, one in 20."""
    now = [0.0]
    monkeypatch.setattr(training_watch.time, "monotonic", lambda: now[0])
    trainer = toy_trainer(parts, "mlp")(tmp_path)
    report, drawn = RunReport(trainer, "run"), []

    def draw(history):
        drawn.append(trainer.state.global_step)
        now[0] += 2

    monkeypatch.setattr(training_watch, "draw_run", draw)
    for step in range(1, 101):
        now[0] += 10
        trainer.state.global_step = step
        trainer.state.log_history.append({"step": step, "loss": 1.0})
        report.on_log(trainer.args, trainer.state, trainer.control)
    assert drawn[0] == 10 and 4 <= len(drawn) <= 5
    assert report.spent <= 0.0101 * now[0]
    assert 'http-equiv="refresh"' in (tmp_path / "training.html").read_text()


def test_without_matplotlib_the_run_goes_on(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = []
    monkeypatch.setattr(training_watch.logger, "warning", said.append)
    trainer = watched(toy_trainer(parts, "mlp"), tmp_path)
    trainer.train()
    trainer.callback_handler.callbacks[-1].write({"evaluation": [{"dataset": "d", "metric": "loss", "value": 2.5}]})
    assert len(said) == 1 and 'pip install "vlbridge[inspect]"' in said[0] and "\n" not in said[0]
    assert not (tmp_path / "training.png").exists()
    page = (tmp_path / "training.html").read_text()
    assert "2.500" in page and "learning_rate" in page


def test_a_full_disk_stops_nothing(parts, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_watch, "write_text", full)
    said = []
    monkeypatch.setattr(training_watch.logger, "warning", said.append)
    trainer = watched(toy_trainer(parts, "qformer"), tmp_path, max_steps=2)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert said == ["The run's page can't be written: [Errno 28] No space left on device"]


def test_samples_of_many_steps(tmp_path):
    rows = [{"step": step, "id": "r", "wanted": "w", "generated": f"g{step}"} for step in range(10, 80, 10)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 80')
    found, steps = samples_of(tmp_path / "s.jsonl")
    assert steps == [10, 50, 60, 70]
    assert found == [{"record": "r", "wanted": "w", **{f"step {step}": f"g{step}" for step in steps}}]
    assert samples_of(tmp_path / "none.jsonl") == ([], [])
