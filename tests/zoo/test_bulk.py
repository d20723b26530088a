"""Bulk work: rows are those of the plain loop, each picture has one, whatever is killed; jobs are not mixed up."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tiny import tiny_image, tiny_model

from vlbridge import FAMILIES, bulk, inference
from vlbridge.bulk import Question, ahead, plan, run, share
from vlbridge.images import load_image


families = pytest.mark.parametrize("family", FAMILIES)
LANGUAGES = {"qformer": "t5"}  # an encoder-decoder among them


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Saved models by family, and `pictures`: seven of different shapes, one of which is none."""
    root = tmp_path_factory.mktemp("bulk")
    for family in FAMILIES:
        model, processor = tiny_model(family, LANGUAGES.get(family, "llama"))
        model.save_pretrained(root / family)
        processor.save_pretrained(root / family)
    (root / "pictures").mkdir()
    for seed in range(7):
        tiny_image(seed, (30 + 7 * seed, 33)).save(root / "pictures" / f"{seed}.png")
    (root / "pictures" / "3.png").write_bytes(b"no picture")
    return {folder.name: folder for folder in root.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir())


def question(folder, **changes) -> Question:
    return Question.of(**{"model": folder, "max_new_tokens": 5, "device": "cpu", **changes})


def finish(job, shard=(1, 1), **options) -> int:
    """Do what is left; gives the number of pictures."""
    model, processor = inference.load(job.question.model, "cpu")
    todo = [number for number, _ in job.todo(*shard)]
    return sum(done.pictures for done in run(job, todo, model, processor, **{"batch_size": 2, **options}))


@families
@pytest.mark.parametrize("file_format", bulk.FORMATS)
def test_rows_are_those_of_the_plain_loop(folders, family, file_format, tmp_path):
    pictures = folders["pictures"]
    job = plan([pictures], tmp_path / "out", question(folders[family], question="What?"), file_format=file_format,
               rows_per_file=3)  # fmt: skip
    assert finish(job, workers=2) == 7
    model, processor = inference.load(folders[family], "cpu")
    expected = []
    for name in names(pictures):
        text = error = None
        try:
            [text] = inference.answer(model, processor, [load_image(name)], "What?", max_new_tokens=5)
        except ValueError:
            error = "not an image, or not in a format that Pillow can read"
        expected.append({"image": name, "question": "What?", "answer": text, "error": error})
    assert list(job.files.rows()) == expected
    assert len({row["answer"] for row in expected}) > 2, "the pictures must matter"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "job.json", *(f"part-00000{k}.{file_format}" for k in range(3))
    ]  # fmt: skip


def test_pictures_of_many_sizes(tmp_path):
    """Images at any resolution: batches go by the number of tokens, rows by the order of the inputs."""
    model, processor = tiny_model(
        "mlp", image_aspect_ratio="anyres", image_grid_pinpoints=[[30, 60], [60, 60], [90, 30]]
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for seed, size in enumerate([(90, 30), (40, 33), (30, 60), (95, 30), (41, 40), (31, 60)]):
        tiny_image(seed, size).save(tmp_path / "pictures" / f"{seed}.png")
    job = plan([tmp_path / "pictures"], tmp_path / "out", question(tmp_path / "model"))
    lengths, generate = [], model.generate

    def counted(**inputs):
        lengths.append(inputs["attention_mask"].sum(dim=1).tolist())
        return generate(**inputs)

    model.generate = counted
    list(run(job, [0], model.eval(), processor, batch_size=2))
    in_order = sum(lengths, [])
    assert in_order == sorted(in_order) and len(set(in_order)) > 2
    sizes = [picture.size() for picture in job.pictures(0)]
    as_given = processor.num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    assert as_given != sorted(as_given), "there is something to sort"
    del model.generate
    for row, name in zip(job.files.rows(), names(tmp_path / "pictures"), strict=True):
        alone = inference.caption(model, processor, [load_image(name)], max_new_tokens=5)
        assert (row["image"], [row["caption"]]) == (name, alone)


def test_only_what_is_missing_is_done(folders, tmp_path, monkeypatch):
    job = plan([folders["pictures"]], tmp_path, question(folders["mlp"]), rows_per_file=2)
    finish(job)
    whole = {path: path.read_bytes() for path in job.files.folder.iterdir()}
    job.files.path(1).unlink()
    (job.files.folder / ".part-000002.jsonl.1-2.tmp").write_text('{"image": "half')  # of a killed one
    job = plan([folders["pictures"]], tmp_path, question(folders["mlp"]), rows_per_file=2)
    assert job.todo() == [(1, 2)] and finish(job) == 2 and not job.todo()
    assert {path: path.read_bytes() for path in whole} == whole


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shares(folders, count, tmp_path):
    items = list(range(11))
    parts = [share(items, number, count) for number in range(1, count + 1)]
    assert sum(parts, []) == items and max(map(len, parts)) - min(map(len, parts)) <= 1
    job = plan([folders["pictures"]], tmp_path, question(folders["mlp"]), rows_per_file=2)
    todo = [part for number in range(1, count + 1) for part in job.todo(number, count)]
    assert todo == job.todo() == [(0, 2), (1, 2), (2, 2), (3, 1)]


def test_shares_of_the_environment(monkeypatch):
    assert bulk.share_of_environment() == (1, 1) and bulk.parse_share("2/8") == (2, 8)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert bulk.share_of_environment() == (4, 4)
    for text in ("0/4", "5/4", "2", "a/b", "1/", "-1/2"):
        with pytest.raises(ValueError, match="expected NUMBER/COUNT"):
            bulk.parse_share(text)


def test_other_jobs_are_refused(folders, tmp_path):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(folders["pictures"], pictures)
    asked = question(folders["mlp"], question="What?")
    assert plan([pictures], out, asked).ranges == plan([f"{pictures}/*"], out, asked).ranges
    for changed, message in {
        question(folders["qformer"], question="What?"): "model .*qformer",
        question(folders["mlp"], question="Who?"): r"prompt 'What\?' \(now 'Who\?'\)",
        question(folders["mlp"]): "captions False",
        question(folders["mlp"], question="What?", dtype="bfloat16"): "dtype 'float32'",
        question(folders["mlp"], question="What?", max_new_tokens=6): "max_new_tokens 5",
    }.items():
        with pytest.raises(ValueError, match=f"holds another job, with .*{message}.*another output folder"):
            plan([pictures], out, changed)
    with pytest.raises(ValueError, match="format 'jsonl'"):
        plan([pictures], out, asked, file_format="tar")
    with pytest.raises(ValueError, match="rows_per_file 64"):
        plan([pictures], out, asked, rows_per_file=65)
    tiny_image().save(pictures / "new.png")
    with pytest.raises(ValueError, match=r"picture files: 7 with names .*\(now 8 with"):
        plan([pictures], out, asked)


def test_other_weights_under_the_same_name(folders, tmp_path):
    shutil.copytree(folders["mlp"], tmp_path / "model")
    plan([folders["pictures"]], tmp_path / "out", question(tmp_path / "model"))
    tiny_model("mlp", seed=1)[0].save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="weights '"):
        plan([folders["pictures"]], tmp_path / "out", question(tmp_path / "model"))


def test_folders_and_numbers_that_are_refused(folders, tmp_path):
    asked, pictures = question(folders["mlp"]), folders["pictures"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds 'thesis.tex' and no job.json"):
        plan([pictures], tmp_path / "mine", asked)
    with pytest.raises(ValueError, match="is a file"):
        plan([pictures], tmp_path / "mine" / "thesis.tex", asked)
    (tmp_path / "mine" / "job.json").write_text("{")
    with pytest.raises(ValueError, match="job.json is damaged"):
        plan([pictures], tmp_path / "mine", asked)
    with pytest.raises(ValueError, match="format is 'xml'; expected one of jsonl"):
        plan([pictures], tmp_path / "out", asked, file_format="xml")
    with pytest.raises(ValueError, match="rows_per_file is 0"):
        plan([pictures], tmp_path / "out", asked, rows_per_file=0)
    with pytest.raises(ValueError, match="no pictures in the inputs"):
        plan([write_empty(tmp_path / "empty.tar")], tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def write_empty(path: Path) -> Path:
    tarfile.open(path, "w").close()
    return path


def test_tars_out_and_in(folders, tmp_path):
    """What is written as tars is read again: as pictures for another job, and as captions for training."""
    from vlbridge.training.training_data import load

    tiny_image(8).save(tmp_path / "icon.ico", sizes=[(40, 33)])  # a format that tars' readers don't know
    inputs = [folders["pictures"], tmp_path / "icon.ico"]
    job = plan(inputs, tmp_path / "out", question(folders["mlp"]), file_format="tar", rows_per_file=4)
    finish(job)
    rows = [row for row in job.files.rows() if row["error"] is None]
    assert len(rows) == 7
    records = load("webdataset", str(tmp_path / "out" / "*.tar"), streaming=True)
    captions = [record["caption"] for record in records if record["images"]]  # a failed one has no picture
    assert captions == [row["caption"] for row in rows]
    again = plan([tmp_path / "out"], tmp_path / "again", question(folders["mlp"]), file_format="parquet")
    finish(again)
    assert [row["caption"] for row in again.files.rows()] == captions


def test_reading_ahead():
    assert list(ahead(lambda k: k * k, range(20), workers=3)) == [k * k for k in range(20)]
    taken = []
    results = ahead(lambda k: 1 / k, (taken.append(k) or k for k in (2, 1, 0, 3, 4, 5)), depth=2)
    assert next(results) == 0.5 and taken == [2, 1, 0]
    next(results)
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_killed(tmp_path):
    """Every family, killed again and again by SIGKILL, alone and with two processes that share a job."""
    script = Path(__file__).parents[1] / "killed_bulk.py"
    output = subprocess.run([sys.executable, script, tmp_path, "3", "0"], stdout=subprocess.PIPE, check=True).stdout
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["family"] for line in lines] == list(FAMILIES)
    for line in lines:
        assert line["statuses"] == [9] * 3 and line["equal"]
        assert line["before"] == sorted(line["before"]) and 0 < line["before"][-1] < 20
