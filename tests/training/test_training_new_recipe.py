"""Recipes for data of one's own: what is found in it, that they run, and how their sizes follow data and device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import tiny_image
from toy_runs import save_data, save_parts
from typer.testing import CliRunner

from vlbridge.cli import app
from vlbridge.training.training_new_recipe import (
    SIZES,
    Device,
    OwnData,
    SeveralKinds,
    built_without_weights,
    layout_of,
    look_at,
    new_recipe,
    options_for,
    rows_that_fit,
    size_for,
)
from vlbridge.training.training_recipes import read_recipe
from vlbridge.training.training_run import train


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Parts; and pictures with captions, with questions, with both captions and classes, and in folders of classes."""
    folder = tmp_path_factory.mktemp("toys")
    rows = {
        "captions": lambda number: {"caption": f"picture {number}"},
        "questions": lambda number: {"question": "what?", "answer": f"number {number}"},
        "both": lambda number: {"caption": f"picture {number}", "label": ("cat", "dog")[number % 2]},
    }
    for name, row in rows.items():
        (folder / name).mkdir()
        lines = []
        for number in range(40):
            tiny_image(number).save(folder / name / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", **row(number)}) + "\n")
        (folder / name / "metadata.jsonl").write_text("".join(lines))
    for split in ("train", "test"):
        for number in range(12):
            place = folder / "classes" / split / ("cat", "dog", "sea")[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            tiny_image(number).save(place / f"{number}.png")
    return {"folder": folder, "parts": save_parts(folder / "parts"), **save_data(folder / "data", 8)}


@pytest.mark.parametrize(
    ("kind", "bridge"),
    [("captions", "mlp"), ("questions", "qformer"), ("classes", "qformer"), ("interleaved", "perceiver")],
)
def test_what_it_writes_is_sound_and_runs(kind, bridge, toys, tmp_path, monkeypatch):
    monkeypatch.chdir(toys["folder"])
    path = toys["documents"] if kind == "interleaved" else kind
    options = {"images": toys["images"]} if kind == "interleaved" else {}
    found = look_at(path, options=options)
    assert (found.kind, found.records + (found.held_out if kind != "classes" else 0)) == (
        kind, {"classes": 12, "interleaved": 8}.get(kind, 40)
    )  # fmt: skip
    parts = {name: toys["parts"][name] for name in ("vision", "language")}
    text = new_recipe(found, bridge, device=Device("cpu"), **parts)
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    recipe = read_recipe(file)
    assert recipe.bridge == bridge and yaml.safe_load(text)["data"][0]["path"] == path
    layout, place = text.splitlines()[1].split()[-2:]
    settings = ["--set", f"images={toys['images']}"] if options else []
    checked = CliRunner().invoke(app, ["data", "check", layout, place, *settings])
    assert (checked.exit_code, checked.stdout.splitlines()[-1]) == (0, "fit for training"), checked.stdout
    monkeypatch.setenv("VLBRIDGE_CACHE", str(tmp_path / "cache"))
    recipe.arguments |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2}
    summary = train(recipe.smoke_test(), tmp_path / "smoke")
    assert summary["steps"] == 3
    splits = {(row["dataset"], row["split"]) for row in summary["evaluation"]}
    held_out = {"captions": "held-out", "questions": "held-out", "classes": "test"}
    assert splits == ({(kind, held_out[kind])} if kind in held_out else set())


def test_what_is_there(toys, tmp_path):
    folder = toys["folder"]
    assert [layout_of(toys[name]) for name in ("captions", "llava", "documents")] == [
        "coco_captions", "llava", "interleaved"
    ]  # fmt: skip
    with pytest.raises(SeveralKinds, match="captions and classes: say which to train on"):
        look_at(folder / "both")
    assert look_at(folder / "both", "classes").num_labels == 2
    assert look_at(folder / "both", "captions").kind == "captions"
    with pytest.raises(ValueError, match="has no questions; it has captions and classes"):
        look_at(folder / "both", "questions")
    with pytest.raises(ValueError, match="no such file or folder"):
        look_at(tmp_path / "nowhere")
    (tmp_path / "list.json").write_text('[{"picture": 1}]')
    with pytest.raises(ValueError, match="none of the layouts that are known"):
        look_at(tmp_path / "list.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        look_at(tmp_path / "empty")


def test_bridges_grow_with_the_data(toys):
    """No bridge of the papers' size for few pictures: 200 get less than a hundredth of a Q-Former of 104 M."""
    assert [size_for(count) for count in (200, 5_000, 1_000_000)] == list(SIZES)
    parts = (toys["parts"]["vision"], toys["parts"]["language"])
    for bridge in ("mlp", "qformer", "perceiver"):
        for kind in ("captions", "classes"):
            found = OwnData("p", "imagefolder", kind, 200, num_labels=3 if kind == "classes" else None)
            sizes = []
            for size in SIZES:
                model = built_without_weights(
                    found, bridge, *parts, options_for(bridge, size, None if kind == "classes" else 2)
                )
                sizes.append(sum(parameter.numel() for parameter in model.bridge.parameters()))
            assert sizes == sorted(sizes) and sizes[0] < 1_000_000, (bridge, kind, sizes)
            assert bridge != "qformer" or sizes[2] > 80_000_000


def test_batches_fit_the_device(toys, tmp_path):
    """Against the memory that the same sum takes with numbers written out by hand; and more memory, larger batches."""
    found = look_at(toys["folder"] / "captions")
    parts = (toys["parts"]["vision"], toys["parts"]["language"])
    model = built_without_weights(found, "mlp", *parts, {})
    trained = sum(parameter.numel() for parameter in model.bridge.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    row = 34 * 2 * 32 * (25 + 128) + 10 * 100 * 128  # 2 layers of 32, 25 patches, 100 words
    for rows in (1, 3, 20):
        memory = (2 * frozen + 16 * trained + 1e9 + rows * row + 1) / 0.9e9
        assert rows_that_fit(model, Device("cuda", memory)) == {1: 1, 3: 2, 20: 16}[rows]
    assert rows_that_fit(model, Device("cuda", 0.5)) == 0
    assert rows_that_fit(model, Device("cuda", 80.0)) == 64
    given = {"vision": parts[0], "language": parts[1]}
    with pytest.raises(ValueError, match="do not fit into 0.5 GB"):
        new_recipe(found, device=Device("cuda", 0.5), **given)
    for device, expected in ((Device("cuda", 24.0), "bf16"), (Device("cuda", 24.0, bfloat16=False), "fp16")):
        recipe = yaml.safe_load(new_recipe(found, device=device, **given))
        assert recipe["arguments"][expected] is True and recipe["arguments"]["per_device_train_batch_size"] <= 4
    with pytest.raises(ValueError, match="expected one of mlp, qformer, perceiver"):
        new_recipe(found, "mpl", device=Device("cpu"), **given)


def test_the_command(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["new-recipe", str(toys["folder"] / "captions"), "--vision", toys["parts"]["vision"], "--language",
                 toys["parts"]["language"], "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.stdout.startswith("captions.yaml: "), done.stderr
    written = Path("captions.yaml").read_text()
    assert os_listing(tmp_path) == ["captions.yaml"]
    again = CliRunner().invoke(app, [*arguments, "--bridge", "qformer"])
    assert again.exit_code == 2 and "captions.yaml exists" in again.stderr
    assert Path("captions.yaml").read_text() == written
    assert CliRunner().invoke(app, [*arguments, "--bridge", "qformer", "--force"]).exit_code == 0
    assert read_recipe("captions.yaml").bridge == "qformer"
    for more, message in (
        (["--kind", "pictures"], "--kind is 'pictures'; expected one of captions, questions, classes, interleaved"),
        (["--size", "huge"], "--size is 'huge'"),
        (["--set", "caption"], "expected KEY=VALUE"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *more, "-o", "other.yaml"])
        assert refused.exit_code == 2 and message in refused.stderr, refused.stderr
    nothing = CliRunner().invoke(app, ["new-recipe"])
    assert nothing.exit_code == 2 and "name your data" in nothing.stderr
    nowhere = CliRunner().invoke(app, ["new-recipe", "nowhere"])
    assert nowhere.exit_code == 1 and "no such file or folder" in nowhere.stderr
    assert os_listing(tmp_path) == ["captions.yaml"]


def test_it_asks_on_a_terminal(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = [str(toys["folder"] / "both"), "captions", "percever", "perceiver", "", toys["parts"]["vision"],
               toys["parts"]["language"], "cpu"]  # fmt: skip
    runner = CliRunner()
    monkeypatch.setattr("vlbridge_cli.cli_train.on_terminal", lambda: True)
    done = runner.invoke(app, ["new-recipe", "-o", "mine.yaml"], input="\n".join(answers) + "\n")
    assert done.exit_code == 0, done.output
    assert "'percever' is none of mlp, qformer, perceiver" in done.stderr
    assert (read_recipe("mine.yaml").bridge, read_recipe("mine.yaml").text.ask_for_captions) == ("perceiver", True)


def os_listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
