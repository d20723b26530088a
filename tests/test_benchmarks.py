"""`benchmarks/run.py` on tiny models: peers have our tensors, other tokens are found, and reports say what was seen."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, logging
from typer.testing import CliRunner

from vlbridge.convert import export


ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # behind everything else: its files have plain names

import run  # noqa: E402
import run_growth  # noqa: E402
import run_measure  # noqa: E402
import run_models  # noqa: E402
import run_report  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    before, level = torch.is_grad_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(before)
    logging.set_verbosity(level)


def both(name: str):
    model, processor = run_models.our_model(run.SIZES["dry"][name], torch.float32, "cpu")
    return model, processor, run_models.native_side(model, processor, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["LLaVA", "LLaVA-NeXT", "BLIP-2 OPT", "BLIP-2 T5"])
def test_a_peer_has_the_weights_that_an_export_has(name, tmp_path):
    model, processor, native = both(name)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "native", verify=False)
    expected = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    assert type(native.model) is type(expected)
    found, wanted = native.model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    assert run_models.shared_bytes(model, native.model) == 1.0  # nothing is there twice


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """Run the command line with a README of its own: exit code, report and README."""
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- run.py dry: begin -->\nof the last run\n<!-- run.py dry: end -->\nafter\n")
    monkeypatch.setattr(run, "README", readme)
    monkeypatch.setitem(run.SECONDS, "dry", 3000)
    for spec in run.SIZES["dry"].values():
        monkeypatch.setattr(spec, "seconds", 1000)

    def call(cases: str):
        output = tmp_path / "results" / "dry.json"
        result = CliRunner().invoke(run.app, ["dry", "--cases", cases, "--output", str(output), "--readme"])
        return result, json.loads(output.read_text()), readme.read_text()

    return call


def smaller(monkeypatch, name: str, **changes) -> None:
    monkeypatch.setitem(run.SIZES["dry"], name, dataclasses.replace(run.SIZES["dry"][name], **changes))


def test_dry_run(dry, tmp_path, monkeypatch):
    smaller(monkeypatch, "Flamingo", batches=(2,))
    result, report, readme = dry("LLaVA,BLIP-2 T5,Flamingo")
    assert result.exit_code == 0, result.output
    llava, t5, flamingo = report["cases"]
    assert [(row["batch"], row.get("compiled", False)) for row in llava["rows"]] == [(1, False), (1, True), (3, False)]
    assert len(t5["rows"]) == 2
    for row in llava["rows"] + t5["rows"]:
        assert row["status"] == "measured", row
        assert row["check"] == {"equal_tokens": 1.0, "logits_differ_by": pytest.approx(0, abs=1e-3)}
        assert row["least_ms"]["token_ms"] > 0
        for median, least, most in row["ratio"].values():
            assert 0 < least <= median <= most
    assert llava["rows"][1]["against_eager"]["equal_tokens"] == 1.0
    assert llava["folder"]["pictures"] == 10 and llava["folder"]["equal_captions"] == 1.0
    peer = report["peers"]["open-flamingo"]
    assert len(flamingo["rows"]) == 2 and all(row["status"] == "measured" for row in flamingo["rows"])
    assert ("ratio" in flamingo["rows"][0]) == (peer is not None) == ("without_peer" not in flamingo)
    assert (tmp_path / "results" / "dry.png").stat().st_size > 10_000
    assert readme.startswith("before\n<!-- run.py dry: begin -->\n### dry") and readme.endswith("end -->\nafter\n")
    assert "of the last run" not in readme and readme.count("| LLaVA | batch ") == 3
    rates = map(run_report.number, llava["folder"]["pictures_per_s"].values())
    ratio = llava["folder"]["ratio"]["pictures_per_s"][0]
    assert f"| LLaVA | 10 | {' / '.join(rates)} | **{ratio:.2f}**" in readme


def test_other_tokens_are_not_timed(dry, monkeypatch):
    native_side = run.native_side

    def with_another_weight(*args):
        side = native_side(*args)
        projector = side.model.model.multi_modal_projector.linear_2
        projector.weight = torch.nn.Parameter(projector.weight + 0.5, requires_grad=False)
        return side

    monkeypatch.setattr(run, "native_side", with_another_weight)
    result, report, readme = dry("LLaVA-NeXT")
    assert result.exit_code == 1
    (row,) = report["cases"][0]["rows"]
    assert row["status"] == "failed" and "logits differ" in row["reason"]
    assert "vlbridge" not in row and "| LLaVA-NeXT | batch 2 | failed: ValueError: logits differ" in readme


def test_a_case_that_breaks_does_not_stop_the_others(dry, monkeypatch):
    def broken(*args):
        raise OSError("no such thing")

    monkeypatch.setattr(run, "native_side", broken)
    smaller(monkeypatch, "Flamingo", shots=(0,), batches=(1,), compiled=())
    result, report, _ = dry("LLaVA,Flamingo")
    assert result.exit_code == 1
    assert [case["status"] for case in report["cases"]] == ["failed", "measured"]
    assert report["cases"][0]["error"] == "OSError: no such thing"


def test_ratios_are_those_of_pairs():
    found = {"vlbridge": {"token_ms": [1.0, 2.0, 4.0]}, "transformers": {"token_ms": [3.0, 2.0, 2.0]}}
    row = run_measure.summary(found)
    assert row["vlbridge"]["token_ms"] == 2.0 and row["transformers"]["token_ms"] == statistics.median([3, 2, 2])
    assert row["ratio"]["token_ms"] == [1.0, 0.5, 3.0]


def test_sides_take_turns():
    sides = [run_models.Side(name, None, None, None) for name in "ab"]
    seen = []
    run_measure.alternating(sides, lambda side: seen.append(side.name) or {"x": 1}, repeats=3)
    assert "".join(seen) == "abbaab"


def test_bytes_that_a_step_reads():
    llava, *_ = both("LLaVA")
    weights = {name: tensor.nbytes for name, tensor in llava.language_model.named_parameters()}
    assert run_measure.bytes_per_step(llava) == sum(weights.values()) - weights["model.embed_tokens.weight"]
    t5, *_ = both("BLIP-2 T5")
    layers = {
        name: tensor for name, tensor in t5.language_model.decoder.named_parameters() if "embed_tokens" not in name
    }
    expected = sum(tensor.nbytes for tensor in layers.values()) + t5.language_model.lm_head.weight.nbytes
    assert run_measure.bytes_per_step(t5) == expected
    opt, *_ = both("BLIP-2 OPT")  # whose output layer is the table
    assert run_measure.bytes_per_step(opt) == sum(tensor.nbytes for tensor in opt.language_model.parameters())


@pytest.mark.skipif(not run_measure.CLEAR.exists(), reason="only Linux can set the peak of memory back")
def test_peak_memory_sees_what_is_gone_at_the_end():
    found = run_measure.peak_memory(lambda: torch.ones(16 << 20).max(), torch.device("cpu"))
    assert 60 < found < 100


def test_flops_of_a_product():
    one, other = torch.ones(100, 200), torch.ones(200, 500)
    assert run_measure.flops(lambda: one @ other) == pytest.approx(2 * 100 * 200 * 500 / 1e9)


def test_growth(tmp_path, monkeypatch):
    points = [{"images": 1, "token_ms": 9}, {"images": 4, "token_ms": 1.0}, {"images": 16, "token_ms": 16.0}]
    assert run_growth.slope(points, "images", "token_ms") == 2.0
    size = {**run_growth.SIZES["dry"], "seconds": 1000, "values": {"images": (1, 3), "visual_tokens": (4, 16)}}
    monkeypatch.setitem(run_growth.SIZES, "dry", size)
    output = tmp_path / "growth.json"
    result = CliRunner().invoke(
        run.app, ["growth", "--size", "dry", "--families", "mlp,perceiver", "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    curves = json.loads(output.read_text())["curves"]
    assert [point["prompt_tokens"] for point in curves["images"]["mlp"]["points"]] == [4 + 32, 3 * 4 + 32]
    assert [point["prompt_tokens"] for point in curves["visual_tokens"]["perceiver"]["points"]] == [33, 33]
    for point in curves["images"]["mlp"]["points"]:
        assert point["first_token_ms"] > 0 and point["gflop"] > 0
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_bad_arguments_say_what_was_expected(tmp_path):
    call = CliRunner().invoke
    result = call(run.app, ["dry", "--cases", "LLaVA,other", "--output", str(tmp_path / "x.json")])
    assert result.exit_code == 2 and "'other'; expected some of LLaVA" in " ".join(result.output.split())
    with pytest.raises(ValueError, match="expected the lines"):
        run_report.update_readme(ROOT / "benchmarks" / "run.py", {"size": "nothing"}, None)
