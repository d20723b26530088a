"""Every field of every layout of data, one at a time, as something else: the record is named and counted."""

from __future__ import annotations

import base64
import copy
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from toy_records import talk
from toy_runs import save_parts, toy_trainer

from vlbridge.training.training_data import BrokenDataError, load, problem_of, skip_broken
from vlbridge.training.training_data_check import check_data
from vlbridge.training.training_datasets import Samples
from vlbridge.training.training_encoding import SampleError, encoder_for
from vlbridge.training.training_failures import TrainingError


MISSING = object()
WRONG = (MISSING, None, 3, -1.5, True, "", "x", [], {}, [None], [[3]], {"a": None}, "\ud800", "a\0b", 10**30)


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(file, "PNG")
    return file.getvalue()


def llava_rows() -> list:
    said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a red thing"}]
    return [{"id": f"r{number}", "image": ["0.png"], "conversations": copy.deepcopy(said)} for number in range(3)]


def coco() -> dict:
    return {
        "images": [{"id": number, "file_name": "0.png"} for number in range(3)],
        "annotations": [{"id": 10 + number, "image_id": number, "caption": "red"} for number in range(3)],
    }


def questions() -> dict:
    asked = [{"question_id": number, "image_id": 0, "question": "what?"} for number in range(3)]
    answered = [
        {"question_id": number, "answers": [{"answer": "red"}, {"answer": "red"}], "multiple_choice_answer": "red"}
        for number in range(3)
    ]
    return {"q": {"data_subtype": "val2014", "questions": asked}, "a": {"annotations": answered}}


def obelics() -> list:
    return [{"id": f"r{number}", "images": ["0.png", None], "texts": [None, "red"]} for number in range(3)]


def mmc4() -> list:
    info = {"image_name": "0.png", "raw_url": "https://x.org/1", "matched_text_index": 1, "matched_sim": 0.5}
    embedded = {"image_base64": base64.b64encode(png()).decode(), "matched_text_index": 0, "matched_sim": 0.5}
    return [{"text_list": ["One.", "Two."], "image_info": copy.deepcopy([info, embedded])} for _ in range(3)]


def folder_rows() -> list:
    said = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]  # fmt: skip
    rows = [{"file_name": f"{number}.png", "notes": "a note", "label": "red"} for number in range(3)]
    return [{**row, "messages": copy.deepcopy(said)} for row in rows]


def captions_rows() -> list:
    return [{"file_name": f"{number}.png", "text": "red"} for number in range(3)]


def questions_rows() -> list:
    files = [["0.png", "1.png"], ["1.png"], ["2.png"]]
    return [{"file_names": names, "question": "what?", "answer": "red"} for names in files]


def classes_rows() -> list:
    return [{"file_name": f"{number}.png", "label": number} for number in range(3)]


def write_json(folder: Path, name: str, content) -> Path:
    path = folder / name
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in content) if name.endswith("jsonl") else json.dumps(content)
    )
    return path


def write_tar(folder: Path, rows: list) -> Path:
    path = folder / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows):
            for suffix, data in (("png", png()), ("json", json.dumps(row).encode())):
                info = tarfile.TarInfo(f"s{number}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def easy_rows() -> list:
    return [["what?", "red", number] for number in range(3)]


def easy_vqa(folder: Path, content) -> tuple:
    split = folder / "easy" / "train"
    (split / "images").mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (split / "images" / f"{number}.png").write_bytes(png())
    write_json(split, "questions.json", content)
    return "easy_vqa", folder / "easy", {}


def image_folder(folder: Path, content) -> tuple:
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for number in range(3):
        (pictures / f"{number}.png").write_bytes(png())
    write_json(pictures, "metadata.jsonl", content)
    return "imagefolder", pictures, {}


def vqav2(folder: Path, content) -> tuple:
    options = {"annotations": write_json(folder, "a.json", content["a"]), "image_name": "{image_id}.png"}
    return "vqav2", write_json(folder, "q.json", content["q"]), options


#: Of each layout: what its files hold, and how they are written; `(source, path, options)`.
LAYOUTS = {
    "llava": (llava_rows, lambda folder, content: ("llava", write_json(folder, "a.json", content), {})),
    "llava lines": (llava_rows, lambda folder, content: ("llava", write_json(folder, "a.jsonl", content), {})),
    "coco": (coco, lambda folder, content: ("coco_captions", write_json(folder, "a.json", content), {})),
    "vqav2": (questions, vqav2),
    "obelics": (obelics, lambda folder, content: ("interleaved", write_json(folder, "a.jsonl", content), {})),
    "mmc4": (
        mmc4,
        lambda folder, content: ("interleaved", write_json(folder, "a.jsonl", content), {"min_similarity": 0.1}),
    ),
    "webdataset": (llava_rows, lambda folder, content: ("webdataset", write_tar(folder, content), {})),
    "webdataset captions": (
        lambda: [{"caption": "red"} for _ in range(3)],
        lambda folder, content: ("webdataset", write_tar(folder, content), {}),
    ),
    "easy-VQA": (easy_rows, easy_vqa),
    "folder": (folder_rows, image_folder),
    "folder of captions": (captions_rows, image_folder),
    "folder of questions": (questions_rows, image_folder),
    "folder of classes": (classes_rows, image_folder),
}


def places(content, path=()) -> list[tuple]:
    """The places of all fields and items, at any depth."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for key, value in inner for found in [(*path, key), *places(value, (*path, key))]]


def mutated(content, place: tuple, value):
    content = copy.deepcopy(content)
    owner = content
    for key in place[:-1]:
        owner = owner[key]
    if value is MISSING:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    return content


def outcome(source, path, options, streaming: bool = False) -> tuple[int, list[str]]:
    """Number of usable records and why others are not; a `ValueError` that names a file counts as the latter."""
    try:
        records = load(source, path, streaming=streaming, **options)
        kept, report = skip_broken(records, max_broken=100)
        number = len(list(kept))
        return number, [f"record {entry['id']}: {entry['file']}: {entry['reason']}" for entry in report.entries()]
    except ValueError as error:
        assert str(Path(path).parent) in str(error), f"{type(error).__name__}: {error}"
        return 0, [str(error)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_field_as_something_else(layout, tmp_path):
    make, write = LAYOUTS[layout]
    content = make()
    Image.new("RGB", (6, 4), "red").save(tmp_path / "0.png")
    assert outcome(*write(tmp_path, content))[0] == 3
    lists = 0 if isinstance(content, list) else {"coco": 1, "vqav2": 2}[layout]
    count = 0
    chosen = [place for place in places(content) if place[lists : lists + 1] in ((), (1,))]
    for number, place in enumerate(chosen):
        values = WRONG[number % 3 :: 3] if layout == "folder" else WRONG  # its files are looked for each time
        for wrong in values if place not in (("q",), ("a",)) else ():  # two files
            source, path, options = write(tmp_path, mutated(content, place, wrong))
            usable, problems = outcome(source, path, options, streaming=True)
            count += 1
            about = (place, wrong, usable, problems)
            if len(place) > lists:  # a field of one record, of which the others know nothing
                gone = int(wrong is MISSING and len(place) == lists + 1)
                assert usable >= 2 or (layout == "vqav2" and usable >= 1), about
                assert usable + len(problems) == 3 - gone or len(problems) == 1, about
            assert all(str(tmp_path) in problem or problem.startswith("record ") for problem in problems), about
    assert count >= 2 * len(WRONG)


@pytest.mark.parametrize("layout", ["llava", "coco", "vqav2", "obelics", "mmc4", "webdataset"])
def test_wrong_records_are_the_same_streamed_or_not(layout, tmp_path):
    make, write = LAYOUTS[layout]
    Image.new("RGB", (6, 4), "red").save(tmp_path / "0.png")
    content = make()
    place = next(p for p in places(content) if p[-1] in ("value", "caption", "question", "texts", "text_list"))
    source, path, options = write(tmp_path, mutated(content, place, 3))
    usable, problems = outcome(source, path, options)
    assert usable == 2 and len(problems) == 1 and str(path) in problems[0]
    assert (usable, problems) == outcome(source, path, options, streaming=True)
    broken = [record for record in load(source, path, **options) if problem_of(record)]
    assert len(broken) == 1 and broken[0]["why_broken"] in problems[0]
    with pytest.raises(BrokenDataError, match="1 of 3 records are broken"):
        skip_broken(load(source, path, **options), max_broken=0)
    report, _ = check_data(load(source, path, **options), progress=False)
    assert report.broken_records == 1 and "form" in report.findings


def test_a_wrong_row_of_an_image_folder_is_named(tmp_path):
    rows = [*folder_rows(), *(3 * [None])]
    rows[3:] = [{**folder_rows()[0], "label": 4}, {**folder_rows()[0], "file_name": "../0.png"}, 7]
    Image.new("RGB", (6, 4), "red").save(tmp_path / "0.png")
    source, path, options = image_folder(tmp_path, rows)
    records = load(source, path, **options)
    assert records.features["label"].names == ["red"] and records["label"] == [0, 0, 0, None, None, None]
    assert records["why_broken"] == [
        None, None, None,
        f"{path}/metadata.jsonl, line 4: label is a int; expected a text.",
        f"{path}/metadata.jsonl, line 5: file_name is '../0.png'; expected the path of a file below the metadata's "
        "folder.",
        f"{path}/metadata.jsonl, line 6 is a int; expected an object.",
    ]  # fmt: skip
    with pytest.raises(BrokenDataError, match="3 of 6 records are broken"):
        skip_broken(records, max_broken=2)
    assert records["id"][:4] == ["0.png", "1.png", "2.png", "metadata.jsonl, line 4"]
    assert records["images"][1] == [{"bytes": None, "path": str(path / "1.png")}]


def test_splits_of_an_image_folder_keep_their_metadata(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        image_folder(tmp_path / split, captions_rows())
        (tmp_path / split / "pictures" / "metadata.jsonl").unlink()
        write_json(tmp_path / split, "metadata.jsonl", [{"file_name": "pictures/0.png", "text": f"of {split}"}])
    assert load("imagefolder", tmp_path)["caption"] == ["of train"]
    assert load("imagefolder", tmp_path, split="test")["caption"] == ["of test"]
    assert [record["id"] for record in load("imagefolder", tmp_path, streaming=True)] == ["train/pictures/0.png"]
    with pytest.raises(ValueError, match="nowhere"):
        load("imagefolder", tmp_path, split="nowhere")


# ---------------------------------------------------------------------- chat templates


NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{{ message['role'] }}:"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ANSWERS = NO_SYSTEM.replace("{{ item['text'] }}", "{% generation %}{{ item['text'] }}{% endgeneration %}")


def with_system(record: dict) -> dict:
    system = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    return {**record, "id": "refused", "messages": [system, *record["messages"]]}


@pytest.mark.parametrize("template", [NO_SYSTEM, ANSWERS])
@pytest.mark.parametrize("family", ["mlp", "qformer", "perceiver"])
def test_a_conversation_that_the_template_refuses_is_skipped(family, template, tmp_path):
    save_parts(tmp_path / "parts")
    build = toy_trainer(tmp_path / "parts", family)
    model, processor = build.compose()
    processor.chat_template = template
    good = [talk("what?", f"w{number}", seed=number) for number in range(5)]
    records = [*good[:3], with_system(good[3]), *good[3:]]
    with pytest.raises(SampleError, match="refuses the conversation: System role not supported"):
        encoder_for(model, processor).encode(records[3])
    for stream in (False, True):
        trainer = build(tmp_path / "out", records=records, composed=(model, processor), stream=stream, max_steps=3,
                        keywords={"max_broken": 1})  # fmt: skip
        trainer.train()
        assert trainer.num_skipped == 1
        assert list(trainer.skipped) == ["the chat template refuses the conversation: System role not supported"]
    trainer = build(tmp_path / "out", records=records, composed=(model, processor), max_steps=3,
                    keywords={"max_broken": 0})  # fmt: skip
    with pytest.raises(TrainingError, match="System role not supported"):
        trainer.train()
    report, _ = check_data(records, processor=processor, progress=False)
    assert report.findings["template"].count == 1


def test_when_the_template_refuses_all(tmp_path):
    save_parts(tmp_path / "parts")
    model, processor = toy_trainer(tmp_path / "parts", "mlp").compose()
    processor.chat_template = NO_SYSTEM
    data = Samples([with_system(talk("what?", "w1"))], encoder_for(model, processor))
    with pytest.raises(TrainingError, match="The last of them is refused: the chat template refuses"):
        data[0]
