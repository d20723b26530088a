"""The benchmarks' official files as samples; what is wrong with them is named with its file and row."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_layouts as layouts
import pytest

from vlbridge.evaluation.evaluation_samples import read_samples
from vlbridge.evaluation.evaluation_tasks import load_task


def read(folder: Path, task: str, split: str | None = None):
    chosen = load_task(task)
    return read_samples(chosen.reader, folder, split or chosen.split)


def change(path: Path, **fields) -> None:
    """Change fields of the first row of a file."""
    content = json.loads(path.read_text())
    rows = next((content[key] for key in ("questions", "images", "data", "annotations") if key in content), content) \
        if isinstance(content, dict) else content  # fmt: skip
    row = rows[0] if isinstance(rows, list) else next(iter(rows.values()))
    for name, value in fields.items():
        row.pop(name, None)
        if value is not None:
            row[name] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("task", "write"), [("vqav2", layouts.write_vqav2), ("okvqa", layouts.write_okvqa)])
def test_vqa(tmp_path, task, write):
    write(tmp_path)
    first, second, _ = read(tmp_path, task)
    assert (first.id, first.question, first.said) == ("10", "what is 0?", "0")
    assert first.references == ("0",) * 6 + ("x",) * 4
    assert second.kind == ("number" if task == "vqav2" else "what is")
    assert first.image["path"] == str(tmp_path / "val2014" / "COCO_val2014_000000000000.jpg")
    assert first.open().mode == "RGB"


def test_textvqa(tmp_path):
    layouts.write_textvqa(tmp_path)
    first, _ = read(tmp_path, "textvqa")
    assert (first.id, first.question, first.said) == ("0", "what brand?", "dakota digital")
    assert len(first.references) == 10 and first.open().mode == "RGB"


def test_vizwiz(tmp_path):
    layouts.write_vizwiz(tmp_path)
    first, second = read(tmp_path, "vizwiz")
    assert (first.id, first.kind, second.kind) == ("VizWiz_val_00000000.jpg", "other", "yes/no")
    assert first.references == ("unanswerable",) * 10 and first.open().mode == "RGB"


def test_vizwiz_in_the_files_of_openflamingo(tmp_path):
    layouts.write_vizwiz_of_openflamingo(tmp_path)
    (only,) = read(tmp_path, "vizwiz")
    assert (only.id, only.references, only.kind) == ("0", ("no", "yes", "yes"), "other")
    assert only.said == "yes"  # not the first one, which these files take
    assert only.open().mode == "RGB"


def test_gqa(tmp_path):
    layouts.write_gqa(tmp_path)
    (only,) = read(tmp_path, "gqa")
    assert (only.id, only.question, only.references, only.kind) == ("201", "Is it red?", ("no",), "verify")
    assert only.open().mode == "RGB"


def test_pope(tmp_path):
    layouts.write_pope(tmp_path)
    samples = read(tmp_path, "pope")
    assert [sample.kind for sample in samples] == ["random"] * 2 + ["popular"] * 2 + ["adversarial"] * 2
    assert [sample.references[0] for sample in samples] == ["yes", "no"] * 3
    assert len(read(tmp_path, "pope", "popular")) == 2
    assert samples[0].open().mode == "RGB"


def test_scienceqa_with_pictures(tmp_path):
    layouts.write_scienceqa(tmp_path)
    first, second = read(tmp_path, "scienceqa_img")
    assert (first.id, first.references, first.choices) == ("1", ("B",), ("dog", "cat", "fish"))
    assert (first.context, second.context) == ("", "Look.")
    assert first.open().mode == "RGB"


def test_easy_vqa(tmp_path):
    layouts.write_easy_vqa(tmp_path)
    samples = read(tmp_path, "easy_vqa")
    assert [sample.kind for sample in samples[:3]] == ["color", "yes/no, shown", "yes/no, absent"]
    assert [sample.image_key for sample in samples[:3]] == [str(tmp_path / "test" / "images" / "0.png")] * 3
    assert len({sample.id for sample in samples}) == 12


@pytest.mark.parametrize(("task", "name"), [("coco_karpathy", "coco"), ("flickr30k", "flickr30k")])
def test_karpathy(tmp_path, task, name):
    layouts.write_karpathy(tmp_path, name)
    samples = read(tmp_path, task)
    assert [sample.id for sample in samples] == [str(n + (100 if name == "coco" else 0)) for n in range(4)]
    assert samples[1].references == ("a picture of number 1", "w1 w21") and samples[1].said == samples[1].references[0]
    assert len(read(tmp_path, task, "train")) == 2  # restval too
    assert samples[0].open().mode == "RGB"


def test_nocaps(tmp_path):
    layouts.write_nocaps(tmp_path)
    samples = read(tmp_path, "nocaps")
    assert [(sample.id, sample.kind) for sample in samples[:2]] == [("n0.jpg", "in-domain"), ("n1.jpg", "out-domain")]
    assert samples[0].references == ("a thing 0 0", "a thing 0 1")


def test_classes(tmp_path):
    layouts.write_classes(tmp_path)
    samples = read(tmp_path, "classification")
    assert sorted(sample.references[0] for sample in samples) == ["cat", "cat", "hot dog", "hot dog"]
    assert samples[0].choices == ("cat", "hot dog")
    assert samples[0].open().mode == "RGB"
    assert len(read(tmp_path / "test", "classification", "anything")) == 4


def test_classes_in_metadata(tmp_path):
    rows = [{"file_name": f"{n}_val_.png", "label": ("b_c", "a")[n % 2]} for n in range(3)]
    for row in rows:
        layouts.write_picture(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read(tmp_path, "classification", tmp_path.name)
    assert [sample.references[0] for sample in samples] == ["b c", "a", "b c"]
    assert [sample.id for sample in samples] == ["0_val_.png", "1_val_.png", "2_val_.png"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0_val_.png"}')
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 1 has file_name; expected 'label'"):
        read(tmp_path, "classification", "test")
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="the pictures have 0 classes; expected a subfolder per class"):
        read(tmp_path, "classification", "test")


@pytest.mark.parametrize(
    ("task", "write", "file", "wrong", "message"),
    [
        ("vqav2", layouts.write_vqav2, "v2_OpenEnded_mscoco_val2014_questions.json", {"question": 3},
         r"questions.json, question 0: question is a int; expected a text"),
        ("vqav2", layouts.write_vqav2, "v2_mscoco_val2014_annotations.json", {"answers": []},
         r"annotations.json: question 10 has no answers"),
        ("textvqa", layouts.write_textvqa, "TextVQA_0.5.1_val.json", {"answers": "dakota"},
         r"val.json, data 0: answers is a str; expected a list"),
        ("textvqa", layouts.write_textvqa, "TextVQA_0.5.1_val.json", {"answers": []},
         r"val.json, data 0 has no answers: there is nothing"),
        ("vizwiz", layouts.write_vizwiz, "Annotations/val.json", {"answers": [{}]},
         r"val.json, row 0, answers has nothing; expected 'answer'"),
        ("gqa", layouts.write_gqa, "questions/testdev_balanced_questions.json", {"imageId": None},
         r"questions.json, 201 has .*expected 'imageId' among them"),
        ("scienceqa_img", layouts.write_scienceqa, "pid_splits.json", None, r"pid_splits.json has .*expected 'test'"),
        ("coco_karpathy", layouts.write_karpathy, "dataset_coco.json", {"sentences": [{"raw": 1}]},
         r"dataset_coco.json, image 0: raw is a int; expected a text"),
        ("coco_karpathy", layouts.write_karpathy, "dataset_coco.json", {"sentences": []},
         r"dataset_coco.json, image 0 has no sentences"),
        ("nocaps", layouts.write_nocaps, "nocaps_val_4500_captions.json", {"file_name": None},
         r"captions.json, image 0 has id, domain; expected 'file_name' among them"),
    ],
)  # fmt: skip
def test_wrong_rows_are_named(tmp_path, task, write, file, wrong, message):
    write(tmp_path)
    if wrong is None:
        (tmp_path / file).write_text('{"val": []}')
    else:
        change(tmp_path / file, **wrong)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, task)


def test_a_wrong_label_of_pope_is_named(tmp_path):
    layouts.write_pope(tmp_path)
    path = tmp_path / "coco_pope_random.json"
    path.write_text(path.read_text().replace('"no"', '"maybe"'))
    with pytest.raises(ValueError, match=r"coco_pope_random.json, line 2: label is 'maybe'; expected 'yes' or 'no'"):
        read(tmp_path, "pope")


def test_a_wrong_answer_of_scienceqa_is_named(tmp_path):
    layouts.write_scienceqa(tmp_path)
    path = tmp_path / "problems.json"
    path.write_text(path.read_text().replace('"answer": 2', '"answer": 3'))
    with pytest.raises(ValueError, match=r"problems.json, 2: answer is 3; expected the number of one of 3 choices"):
        read(tmp_path, "scienceqa_img")


def test_a_wrong_row_of_easy_vqa_is_named(tmp_path):
    layouts.write_easy_vqa(tmp_path)
    path = tmp_path / "test" / "questions.json"
    path.write_text(path.read_text().replace('"yes", 0]', '"yes"]'))
    with pytest.raises(
        ValueError, match=r"questions.json, row 1 is \['is there a red shape\?', 'yes'\]; expected a question"
    ):
        read(tmp_path, "easy_vqa")


def test_missing_files_and_folders_are_named(tmp_path):
    for task in ("vqav2", "gqa", "pope", "textvqa", "vizwiz", "scienceqa_img", "coco_karpathy", "easy_vqa", "nocaps"):
        with pytest.raises(ValueError, match=r"has no .*see the task's layout"):
            read(tmp_path, task)
    with pytest.raises(ValueError, match=r"nowhere is no folder"):
        read(tmp_path / "nowhere", "vqav2")
    layouts.write_vqav2(tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(ValueError, match=r"has no v2_mscoco_val2014_annotations.json: without people's answers"):
        read(tmp_path, "vqav2")


def test_ids_that_occur_twice_are_named(tmp_path):
    layouts.write_karpathy(tmp_path)
    change(tmp_path / "dataset_coco.json", cocoid=101)
    with pytest.raises(ValueError, match=r"split 'test' has '101' twice"):
        read(tmp_path, "coco_karpathy")
