"""`bakeoff`: what it trains and takes, its arithmetic, what it refuses, and that a kill changes nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import benchmark_layouts as layouts
import numpy as np
import pytest
import yaml
from killed_runs import forked
from PIL import Image
from safetensors import safe_open
from tiny import BRIDGE_OPTIONS
from toy_runs import save_parts
from typer.testing import CliRunner

from vlbridge.evaluation import (
    BakeoffError,
    TaskError,
    bakeoff,
    evaluation_bakeoff,
    evaluation_bakeoff_report,
    evaluation_captions,
    evaluation_jobs,
)
from vlbridge.evaluation.evaluation_answers import Answerer
from vlbridge.evaluation.evaluation_bakeoff import seeds_of
from vlbridge.evaluation.evaluation_bakeoff_entrants import read_entrant
from vlbridge.evaluation.evaluation_bakeoff_report import costs_of, figures_of, mean_and_spread, table
from vlbridge.evaluation.evaluation_jobs import JobError, child, end_with_parent, in_own_process, work
from vlbridge.training.training_recipes import RecipeError, read_recipe
from vlbridge.training.training_run import peak_memory
from vlbridge_cli.cli_app import app


pytestmark = pytest.mark.filterwarnings("ignore:.*no_split_modules")
FILES = ("bakeoff.json", "bakeoff.md", "bakeoff.png")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """A new process takes seconds to import everything; one test starts some."""
    monkeypatch.setattr(evaluation_bakeoff, "in_own_process", work)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Recipes of tiny parts, `mlp.yaml` and so on, and easy-VQA's layout in `easy`."""
    folder = tmp_path_factory.mktemp("toys")
    parts = save_parts(folder / "parts")
    (folder / "easy").mkdir()
    layouts.write_easy_vqa(folder / "easy", {"test": 4, "train": 2})
    data = {"source": "easy_vqa", "path": str(folder / "easy")}
    for bridge in ("mlp", "qformer", "perceiver"):
        recipe = {
            "vision": parts["vision"], "language": parts["language"], "bridge": bridge, "dtype": "float32",
            "bridge_options": BRIDGE_OPTIONS[bridge], "data": [{**data, "split": "train"}],
            "evaluation": [{**data, "split": "test", "generate": -1}],
            "arguments": {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "save_steps": 1,
                          "disable_tqdm": True, "log_level": "error"},
        }  # fmt: skip
        (folder / f"{bridge}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def done(toys, tmp_path_factory):
    """A bake-off of two recipes with two seeds, and what it gave.

    Tiny models never give a right answer: some of theirs are replaced by the right one, other ones in each run.
    """
    output = tmp_path_factory.mktemp("done") / "out"
    call = Answerer.__call__

    def sometimes_right(self, samples, numbers):
        rows, about = call(self, samples, numbers), "/".join(Path(self.subject.name).parts[-2:])
        for row, sample in zip(rows, samples):
            if zlib.crc32(f"{about} {self.blind} {sample.id}".encode()) % 2:
                row["prediction"] = sample.references[0]
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "__call__", sometimes_right)
        patch.setattr(evaluation_bakeoff, "in_own_process", work)
        report = bakeoff(
            [toys / "mlp.yaml", toys / "perceiver.yaml"], output_dir=output, seeds=2, blind=True, shuffled=True,
            device="cpu",
        )  # fmt: skip
    return output, report


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts_that_repeat(report: dict) -> str:
    return json.dumps({key: value for key, value in report.items() if key not in ("measured", "command")})


# ---------------------------------------------------------------------- what it does


def test_figures_are_those_of_the_predictions(done):
    output, report = done
    assert json.loads((output / "bakeoff.json").read_text()) == report
    assert [entrant["name"] for entrant in report["entrants"]] == ["mlp", "perceiver"]
    assert (report["task"], report["dataset"], report["split"], report["samples"]) == (
        "easy_vqa", "easy-VQA", "test", 12,
    )  # fmt: skip
    for entrant in report["entrants"]:
        accuracies: list[float] = []
        for run in entrant["runs"]:
            rows = rows_of(output / run["folder"] / "evaluation" / "predictions.jsonl")
            right = {row["id"]: 100.0 * (row["prediction"].lower() == row["references"][0]) for row in rows}
            assert run["figures"]["accuracy"] == pytest.approx(sum(right.values()) / 12, abs=1e-4)
            colors = [right[row["id"]] for row in rows if row["references"] == ["red"]]
            assert run["figures"]["accuracy, color"] == pytest.approx(sum(colors) / 4, abs=1e-4)
            assert {"blind accuracy", "shuffled accuracy", "shuffled accuracy, color"} <= set(run["figures"])
            accuracies.append(run["figures"]["accuracy"])
        first, second = accuracies
        assert 0 < first < 100 and 0 < second < 100
        found = entrant["summary"]["accuracy"]
        assert found["mean"] == pytest.approx((first + second) / 2, abs=1e-5)
        assert found["spread"] == pytest.approx(abs(first - second) / math.sqrt(2), abs=1e-5)  # n - 1
        folder = output / entrant["runs"][0]["folder"]
        with safe_open(folder / "model.safetensors", "pt") as file:
            size = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        assert entrant["bridge_parameters"] == size


def test_seeds_change_the_training_and_nothing_else(done):
    output, report = done
    for entrant in report["entrants"]:
        first, second = (read_recipe(output / run["folder"] / "recipe.yaml") for run in entrant["runs"])
        assert (first.arguments.pop("seed"), second.arguments.pop("seed")) == (0, 1)
        assert first == second and first.evaluation[0].generate == 0
        assert len({run["trained_sha256"] for run in entrant["runs"]}) == 2


def test_time_and_memory_are_measured(done):
    _, report = done
    for name in ("mlp", "perceiver"):
        for run in report["measured"][name]["runs"]:
            assert set(run["figures"]) == {"training seconds", "training memory", "seconds per answer",
                                           "answering memory"}  # fmt: skip
            assert 0 < run["figures"]["seconds per answer"] < 60
            assert 50e6 < run["figures"]["training memory"] <= run["figures"]["answering memory"]  # one process here
            assert "CPU" in run["hardware of training"] and "CPU" in run["hardware of answering"]


def test_table_and_picture(done):
    output, report = done
    text = (output / "bakeoff.md").read_text()
    lines = table(report)
    assert "\n".join(lines) in text and text.startswith("# easy-VQA (test), 12 samples\n")
    headings = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert headings == [
        "bridge", "visual tokens", "bridge parameters", "accuracy", "color", "yes/no, absent", "yes/no, shown",
        "blind", "shuffled", "training (s)", "training memory (GB)", "per answer (ms)", "answering memory (GB)",
    ]  # fmt: skip
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    shown = report["entrants"][1]["summary"]["accuracy"]
    assert (cells[0], cells[3]) == ("perceiver", f"{shown['mean']:.1f} ± {shown['spread']:.1f}")
    assert "mean ± standard deviation of 2 trainings" in text and "data.0.split: train" in text
    assert f"\n{report['command']}\n" in text and "--seeds 0,1 " in report["command"]
    with Image.open(output / "bakeoff.png") as picture:
        assert picture.size[0] > 900 and len(picture.convert("RGB").getcolors(10**6)) > 20


def test_what_is_complete_is_only_read(done, toys, monkeypatch):
    output, report = done
    before = {name: (output / name).read_bytes() for name in FILES}
    monkeypatch.setattr(evaluation_bakeoff, "in_own_process", lambda job: pytest.fail(f"began {job}"))
    again = bakeoff(
        [toys / "mlp.yaml", toys / "perceiver.yaml"], output_dir=output, seeds="0,1", blind=True, shuffled=True,
        device="cpu",
    )  # fmt: skip
    assert again == report and {name: (output / name).read_bytes() for name in FILES} == before
    fewer = bakeoff(toys / "mlp.yaml", output_dir=output, seeds="1,", device="cpu")
    assert fewer["baselines"] == [] and fewer["seeds"] == [1]
    assert fewer["entrants"][0]["summary"]["accuracy"]["spread"] is None
    assert not any("blind" in name for name in fewer["entrants"][0]["summary"])
    assert "One training each, with seed 1" in (output / "bakeoff.md").read_text()
    for name, content in before.items():
        (output / name).write_bytes(content)


def test_trained_bridges_take_part(done, toys, tmp_path):
    output, report = done
    folder = output / report["entrants"][0]["runs"][1]["folder"]
    found = bakeoff(
        [f"before={folder}", toys / "mlp.yaml"], output_dir=tmp_path / "out", seeds=1, limit=5, device="cpu"
    )
    before, trained = found["entrants"]
    assert (before["name"], before["trained_before"], len(before["runs"])) == ("before", True, 1)
    assert before["runs"][0]["trained_sha256"] == report["entrants"][0]["runs"][1]["trained_sha256"]
    assert trained["runs"][0]["trained_sha256"] == report["entrants"][0]["runs"][0]["trained_sha256"]
    assert found["in_common"]["steps"] == 2 and found["samples"] == 5
    seconds = found["measured"]["before"]["summary"]["training seconds"]["mean"]
    assert seconds == json.loads((folder / "training_summary.json").read_text())["seconds"]
    assert "Trained before, so that there is one run of each: before." in (tmp_path / "out" / "bakeoff.md").read_text()
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text + "\n")
    with pytest.raises(BakeoffError, match="holds an evaluation of another"):
        bakeoff([f"before={folder}"], "easy_vqa", toys / "easy", tmp_path / "out", limit=5, device="cpu")
    (folder / "config.json").write_text(text)
    (folder / "recipe.yaml").rename(folder / "kept.yaml")
    found = bakeoff([f"before={folder}", toys / "mlp.yaml"], output_dir=tmp_path / "out", limit=5, device="cpu")
    (folder / "kept.yaml").rename(folder / "recipe.yaml")
    assert any("Data and budget of before are not known" in note for note in found["notes"])


def test_captions(done, tmp_path, monkeypatch):
    """By CIDEr; BLEU and the others are in the file alone."""
    monkeypatch.setattr(evaluation_captions, "has_java", lambda: False)
    output, report = done
    layouts.write_karpathy(tmp_path / "coco")
    folder = output / report["entrants"][0]["runs"][0]["folder"]
    found = bakeoff([f"before={folder}"], "coco_karpathy", tmp_path / "coco", tmp_path / "out", shuffled=True)
    result = json.loads((tmp_path / "out" / "before" / "as-it-is" / "evaluation" / "results.json").read_text())
    (name,) = (name for name in result["metrics"] if name.startswith("CIDEr"))
    figures = found["entrants"][0]["runs"][0]["figures"]
    assert found["main_metric"] == name and figures[name] == result["metrics"][name]["value"]
    assert figures[f"shuffled {name}"] == result["baselines"]["shuffled"]["metrics"][name]["value"]
    assert any(other.startswith("BLEU") for other in figures)
    heading = [cell.strip() for cell in table(found)[0].strip("|").split("|")]
    assert heading[3:5] == [name, "shuffled"] and "BLEU" not in "".join(heading)


# ---------------------------------------------------------------------- kills


def test_a_kill_changes_nothing(toys, tmp_path):
    """In a process that can be forked, as this one can't be any more once another test has trained in it."""
    script = Path(__file__).parents[1] / "killed_bakeoffs.py"
    subprocess.run([sys.executable, str(script), str(toys), str(tmp_path)], check=True)
    killed = tmp_path / "killed"
    reports = [json.loads((folder / "bakeoff.json").read_text()) for folder in (tmp_path / "whole", killed)]
    assert parts_that_repeat(reports[0]) == parts_that_repeat(reports[1])
    for name in ("mlp", "qformer"):
        for file in ("model.safetensors", "evaluation/predictions.jsonl", "evaluation/shuffled.jsonl"):
            one, other = (folder / name / "seed-0" / file for folder in (tmp_path / "whole", killed))
            assert one.read_bytes() == other.read_bytes(), (name, file)
    assert not list(killed.glob(".*.tmp"))


def test_a_process_ends_with_the_one_that_started_it():
    reading, writing = os.pipe()

    def waits():
        os.close(writing)
        end_with_parent(reading)

    child = forked(waits)
    os.close(reading)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_peak_memory_is_that_of_a_process():
    before = peak_memory()["process"]
    reading, writing = os.pipe()

    def takes():
        kept = np.ones(40_000_000)  # 320 MB
        os.write(writing, json.dumps([peak_memory()["process"], float(kept[-1])]).encode())

    os.waitpid(forked(takes), 0)
    found, _ = json.loads(os.read(reading, 1000))
    assert found > 320e6 and peak_memory()["process"] < before + 100e6


def test_a_training_in_a_process_of_its_own(toys, tmp_path):
    in_own_process({"recipe": read_recipe(toys / "mlp.yaml").to_dict(), "output": str(tmp_path / "run")})
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["steps"] == 2 and summary["peak_memory"]["process"] > 50e6


def test_what_a_new_process_says(toys):
    """Its part, in a fork of this process: what is wrong goes to stdout."""
    job = {"model": "none", "task": "easy_vqa", "data": str(toys / "nothing"), "output": None, "options": {}}
    (asked, ask), (heard, say) = os.pipe(), os.pipe()

    def answers():
        for there, here in ((asked, 0), (say, 1)):
            os.dup2(there, here)
        os.close(ask)
        sys.stdin = open(0)  # pytest has put something else there
        try:
            child()
        except SystemExit as end:
            os._exit(end.code)

    process = forked(answers)
    os.write(ask, json.dumps(job).encode() + b"\n")
    os.close(say)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
    assert "nothing is no folder" in json.loads(os.read(heard, 10_000))
    for end in (asked, ask, heard):
        os.close(end)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print(json.dumps('the disk is full'), end=''); sys.exit(1)", "^the disk is full$"),
        ("sys.exit(3)", "its process ended with exit code 3; see what it has printed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL, perhaps because memory ran out"),
    ],
)
def test_what_is_made_of_it(monkeypatch, code, message):
    monkeypatch.setattr(evaluation_jobs, "_CHILD", f"import json, os, signal, sys; {code}")
    with pytest.raises(JobError, match=message):
        in_own_process({})
    monkeypatch.setattr(evaluation_jobs, "_CHILD", "import sys; sys.exit(sys.stdin.readline() != '{}\\n')")
    in_own_process({})


# ---------------------------------------------------------------------- arithmetic


def test_mean_and_spread():
    found = mean_and_spread([{"a": 1.0, "b": 5.0}, {"a": 2.0}, {"a": 6.0}])
    assert found["a"] == {"mean": 3.0, "spread": round(math.sqrt((4 + 1 + 9) / 2), 6), "runs": 3}
    assert found["b"] == {"mean": 5.0, "spread": None, "runs": 1}


def test_costs():
    timing = {"runs": [
        {"answered": {"predictions": {"answers": 8, "seconds": 2.0}}, "peak_memory": {"process": 10, "cuda": 4}},
        {"answered": {"predictions": {"answers": 2, "seconds": 1.0}}, "peak_memory": {"process": 9, "cuda": 5}},
    ]}  # fmt: skip
    assert costs_of({"seconds": 60.0, "peak_memory": {"process": 7}}, timing) == {
        "training seconds": 60.0, "training memory": 7, "seconds per answer": 0.3, "answering memory": 10,
        "answering GPU memory": 5,
    }  # fmt: skip
    assert costs_of({}, {"runs": [{"seconds": 3}]}) == {}


def test_captions_are_shown_by_cider():
    """BLEU and the others are in the file alone."""
    metrics = {name: {"value": value} for name, value in (("BLEU-4", 30.0), ("CIDEr", 100.0), ("ROUGE-L", 50.0))}
    result = {"metrics": metrics, "breakdown": {}, "baselines": {"blind": {"metrics": metrics, "breakdown": {}}}}
    figures = figures_of(result, ["blind"])
    assert figures == {"BLEU-4": 30.0, "CIDEr": 100.0, "ROUGE-L": 50.0, "blind CIDEr": 100.0}
    entrant = {"name": "a", "fewest_visual_tokens": 4, "visual_tokens": 9, "bridge_parameters": 2_500_000,
               "summary": mean_and_spread([figures])}  # fmt: skip
    report = {"main_metric": "CIDEr", "kind": "caption", "baselines": ["blind"], "entrants": [entrant],
              "measured": {"a": {"summary": mean_and_spread([{"training seconds": 150.0}])}}}  # fmt: skip
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table(report)[::2]] == [
        ["bridge", "visual tokens", "bridge parameters", "CIDEr", "blind", "training (min)"],
        ["a", "4 to 9", "2.50 M", "100.0", "100.0", "2.5"],
    ]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "expected"), [(3, [0, 1, 2]), ("2", [0, 1]), ("0,1,5", [0, 1, 5]), ("7,", [7]), ([4, 2], [4, 2])]
)
def test_seeds(given, expected):
    assert seeds_of(given) == expected


@pytest.mark.parametrize("given", [0, "0", "", ",", "a", "1,1", "1,b", "-1", [], [-1], [0.5]])
def test_wrong_seeds(given):
    with pytest.raises(BakeoffError, match="expected a number of at least 1, or different seeds"):
        seeds_of(given)


def changed(toys: Path, folder: Path, name: str, **more) -> str:
    recipe = yaml.safe_load((toys / "mlp.yaml").read_text())
    for key, value in more.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and key in recipe else value
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / f"{name}.yaml")


def test_bridges_that_can_not_be_compared(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_bakeoff, "in_own_process", lambda job: pytest.fail(f"began {job}"))
    data = [{"source": "easy_vqa", "path": str(toys / "easy"), "split": "train", "options": {"pairs": 1}}]
    arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    same = changed(toys, tmp_path, "same", arguments=arguments)  # the same number of records per step
    assert read_entrant(same).training == read_entrant(toys / "mlp.yaml").training
    for name, more, message in (
        ("vision", {"vision": "other/encoder"}, "vision encoder is '/.*' in mlp and 'other/encoder' in vision"),
        ("language", {"language": "other/model"}, "language model is '/.*' in mlp and 'other/model' in language"),
        ("steps", {"arguments": {"max_steps": 3}}, "steps is 2 in mlp and 3 in steps"),
        ("batch", {"arguments": {"per_device_train_batch_size": 4}}, "records per step is 2 in mlp and 4 in batch"),
        ("data", {"data": data}, r"data.0.options is {} in mlp and {'pairs': 1} in data"),
    ):
        with pytest.raises(BakeoffError, match=message + ".*allow_different"):
            bakeoff([toys / "mlp.yaml", changed(toys, tmp_path, name, **more)], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_differences_are_told_where_they_are_allowed(done, toys, tmp_path):
    other = changed(toys, tmp_path, "other", arguments={"max_steps": 3})
    found = bakeoff(
        [toys / "mlp.yaml", other], output_dir=tmp_path / "out", limit=2, allow_different=True, device="cpu"
    )
    assert found["differences"] == ["steps is 2 in mlp and 3 in other"] and "steps" not in found["in_common"]
    assert "- Different: steps is 2 in mlp and 3 in other.\n" in (tmp_path / "out" / "bakeoff.md").read_text()


def test_what_is_refused(done, toys, tmp_path, monkeypatch):
    output, _ = done
    monkeypatch.setattr(evaluation_bakeoff, "in_own_process", lambda job: pytest.fail(f"began {job}"))
    mlp = toys / "mlp.yaml"
    lora = changed(toys, tmp_path, "lora", lora={"language": "attention"})
    bare = changed(toys, tmp_path, "bare", evaluation=[])
    nowhere = changed(toys, tmp_path, "nowhere", data=[{"source": "llava"}])
    for entrants, options, error, message in (
        ([], {}, BakeoffError, "there is nothing to compare"),
        ([mlp, mlp], {}, BakeoffError, "two bridges are called 'mlp': name them, such as first="),
        (["small_mpl"], {}, RecipeError, "small_mpl is neither a file nor a shipped recipe"),
        ([toys / "parts"], {}, BakeoffError, "is neither a recipe nor a trained bridge"),
        ([f"a/b={mlp}"], {}, BakeoffError, "expected NAME=RECIPE, with a name of letters"),
        ([lora], {}, BakeoffError, "trains an adapter"),
        ([nowhere], {}, BakeoffError, "data.0.path missing: say where the data is"),
        ([bare], {}, BakeoffError, r"name a task \(--task\) and the folder"),
        ([bare], {"task": "vqav2"}, BakeoffError, r"name the folder of the files of vqav2 \(--data\)"),
        ([mlp], {"task": "vqa", "data": toys}, TaskError, "task is 'vqa'; expected one of"),
        ([mlp], {"task": "retrieval_coco", "data": toys}, TaskError, "mlp is of stage 'generative'; the task"),
        ([mlp], {"data": toys}, ValueError, "has no test/questions.json"),
        ([mlp], {"prompt": "a"}, BakeoffError, "there is no option 'prompt'; expected some of split, shots"),
        ([mlp], {"limit": 0}, TaskError, "limit is 0"),
        ([mlp], {"device": "cpu", "limit": 3}, BakeoffError, "holds a bake-off with another limit, questions"),
        ([mlp], {"device": "cpu", "settings": ["arguments.learning_rate=1"]}, BakeoffError,
         "seed-0 holds a training with another arguments"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            bakeoff(entrants, **{"output_dir": output, **options})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TaskError, match="starts processes of its own"):
        bakeoff([mlp], output_dir=output)


def test_a_folder_in_use_is_refused(toys, tmp_path):
    lock = evaluation_bakeoff.filelock.FileLock(tmp_path / ".lock")
    with lock, pytest.raises(BakeoffError, match="another bake-off is at work in"):
        bakeoff([toys / "mlp.yaml"], output_dir=tmp_path)


# ---------------------------------------------------------------------- the command


def run(*arguments):
    return CliRunner().invoke(app, ["bakeoff", *map(str, arguments)])


def test_the_command(done, toys, tmp_path, monkeypatch):
    output, report = done
    asked = (toys / "mlp.yaml", toys / "perceiver.yaml", "--seeds", 2, "--blind", "--shuffled", "--device", "cpu")
    result = run(*asked, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[: len(table(report))] == table(report)
    assert result.stderr.endswith(f"{output}: bakeoff.md, bakeoff.png and bakeoff.json\n")
    assert json.loads(run(*asked, "--output", output, "--json").stdout) == report

    def failing(job):
        raise JobError("the disk is full.")

    monkeypatch.setattr(evaluation_bakeoff, "in_own_process", failing)
    for arguments, code, message in (
        ((toys / "mlp.yaml", toys / "mlp.yaml"), 2, "two bridges are called 'mlp'"),
        ((toys / "mlp.yaml", "--seeds", "x"), 2, "seeds is 'x'; expected"),
        ((toys / "mlp.yaml", "--set", "arguments.max_stepps=1"), 2, "did you mean 'max_steps'"),
        ((toys / "mlp.yaml", "--data", tmp_path), 1, "has no test/questions.json"),
        ((toys / "mlp.yaml", "--set", "arguments.max_steps=1"), 1,
         "mlp, seed 0, training: the disk is full. The same command continues from here."),
    ):  # fmt: skip
        result = run(*arguments, "--output", tmp_path / "out")
        lines = [line for line in result.stderr.splitlines() if line.startswith("vlbridge: error: ")]
        assert (result.exit_code, len(lines)) == (code, 1) and message in lines[0], result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize(
    ("package", "task", "message"),
    [
        ("matplotlib", "easy_vqa", "the picture needs matplotlib"),
        ("pycocoevalcap", "nocaps", "scores of captions need pycocoevalcap"),
    ],
)
def test_a_package_that_is_missing(toys, tmp_path, monkeypatch, package, task, message):
    util = evaluation_bakeoff_report.importlib.util
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == package else find(name))
    result = run(toys / "mlp.yaml", "--task", task, "--data", toys / "easy", "--output", tmp_path / "out")
    assert result.exit_code == 1 and f'{message}: pip install "vlbridge[eval]"' in result.stderr
    assert not (tmp_path / "out").exists()
