"""Data sets in published layouts, made here with a few tiny pictures: what becomes of them, and what of broken ones."""

import base64
import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from vlbridge.images import ImageError
from vlbridge.training import training_easy_vqa, training_records, training_sources_webdataset
from vlbridge.training.training_data import (
    FEATURES,
    SOURCES,
    BrokenDataError,
    BrokenReport,
    hold_out,
    kind_of,
    load,
    mix,
    open_image,
    problem_of,
    skip_broken,
    structure_problem,
)
from vlbridge.training.training_sources_common import content_of_text


IMAGE = {"type": "image", "text": None}
COLORS = ("red", "green", "blue", "white")
RGB = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def text(value):
    return {"type": "text", "text": value}


def user(*content):
    return {"role": "user", "content": [text(item) if isinstance(item, str) else item for item in content]}


def assistant(answer):
    return {"role": "assistant", "content": [text(answer)]}


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(file, "PNG")
    return file.getvalue()


def write(path: Path, content) -> Path:
    """A picture of a colour, JSON Lines (tuple), bytes, text or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str) and path.suffix in (".png", ".jpg"):
        Image.new("RGB", (6, 4), content).save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, tuple):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def pictures(folder: Path) -> list[str]:
    """`red.png`, `green.png`, ... in a folder."""
    return [str(write(folder / f"{color}.png", color)) for color in COLORS]


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def both(source, path, **options) -> list[dict]:
    """Records, which are the same map-style and streamed."""
    loaded, streamed = load(source, path, **options), load(source, path, streaming=True, **options)
    assert isinstance(loaded, Dataset) and isinstance(streamed, IterableDataset)
    assert loaded.features == streamed.features
    for name in set(loaded.features) & set(FEATURES):
        assert loaded.features[name] == FEATURES[name], name
    records = list(loaded)
    assert records == list(streamed)
    return records


def colors_of(record) -> list[str]:
    """Which pictures a record has, by their colour."""
    names = {value: name for name, value in RGB.items()}
    return [names[open_image(image).getpixel((0, 0))] for image in record["images"]]


# ---------------------------------------------------------------------- LLaVA


def llava_row(number, question, answer="yes", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"id{number}", "conversations": turns, **more}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llava(suffix, tmp_path):
    pictures(tmp_path / "photos")
    rows = [
        llava_row(0, "<image>\nWhat is it?", "A red thing.", image="red.png"),
        llava_row(1, "What is it?\n<image>", "Green.", image="green.png"),
        llava_row(2, "Who are you?", "An assistant."),  # text only, as in ShareGPT
        llava_row(3, "From <image> to <image>?", "Bluer.", image=["red.png", "blue.png"]),
    ]
    rows[0]["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    rows[2]["conversations"].insert(0, {"from": "gpt", "value": "the end of something else"})
    rows[1]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    path = write(tmp_path / f"data.{suffix}", rows if suffix == "json" else tuple(rows))
    records = both("llava", path, images=tmp_path / "photos")
    assert [record["messages"] for record in records] == [
        [user(IMAGE, "What is it?"), assistant("A red thing."), user("Sure?"), assistant("Yes.")],
        [{"role": "system", "content": [text("Be brief.")]}, user("What is it?", IMAGE), assistant("Green.")],
        [user("Who are you?"), assistant("An assistant.")],
        [user("From ", IMAGE, " to ", IMAGE, "?"), assistant("Bluer.")],
    ]
    assert [colors_of(record) for record in records] == [["red"], ["green"], [], ["red", "blue"]]
    assert [record["id"] for record in records] == ["id0", "id1", "id2", "id3"]
    assert {record["source"] for record in records} == {"llava"}
    assert not any(map(problem_of, records))
    first = both("llava", path, images=tmp_path / "photos", image_first=True)
    assert first[1]["messages"][1] == user(IMAGE, "What is it?")  # what the official training code makes of it
    assert first[3]["messages"][0] == user(IMAGE, IMAGE, "From ", " to ", "?")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab <>\n", max_size=8), min_size=1, max_size=5))
def test_placeholders_become_images_and_no_text_is_lost(pieces):
    whole = "<image>".join(pieces)
    content = content_of_text(whole)
    assert sum(item == IMAGE for item in content) == whole.count("<image>")
    again = "".join("<image>" if item == IMAGE else item["text"] for item in content)
    assert again.replace("\n", "") == whole.replace("\n", "")
    if "<image>" not in whole:
        assert content == [text(whole)]


def test_gzipped_and_marked_files(tmp_path):
    row = llava_row(0, "Who?")
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(row).encode()))  # with a byte order mark
    assert both("llava", path)[0]["messages"] == [user("Who?"), assistant("yes")]


def test_halves_of_surrogate_pairs_are_replaced(tmp_path):
    path = write(tmp_path / "a.json", '[{"conversations": [{"from": "human", "value": "a \\ud83d\\ude00 b \\ud83d"}]}]')
    (record,) = both("llava", path)
    assert record["messages"] == [user("a 😀 b �")]


def test_llava_files_of_a_folder_are_shards(tmp_path):
    for number in range(3):
        write(tmp_path / f"part{number}.jsonl", (llava_row(number, "a"), llava_row(10 + number, "b")))
    records = both("llava", tmp_path)
    assert [record["id"] for record in records] == ["id0", "id10", "id1", "id11", "id2", "id12"]
    assert both("llava", str(tmp_path / "part*.jsonl")) == records
    assert both("llava", [tmp_path / "part0.jsonl", tmp_path / "part1.jsonl"]) == records[:4]
    assert both("llava", tmp_path, split="part2") == records[4:]
    assert load("llava", tmp_path, streaming=True).num_shards == 3


# ---------------------------------------------------------------------- COCO, VQAv2


def coco(folder: Path) -> Path:
    for number, color in enumerate(COLORS[:2]):
        write(folder / "train2017" / f"{number:012d}.jpg", color)
    content = {
        "images": [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(2)],
        "annotations": [
            {"id": 7, "image_id": 1, "caption": "A green wall."},
            {"id": 5, "image_id": 0, "caption": "A red wall."},
            {"id": 9, "image_id": 1, "caption": "Grass."},
        ],
    }
    write(folder / "annotations" / "captions_train2017.json", content)
    return folder


def test_coco_captions(tmp_path):
    records = both("coco_captions", coco(tmp_path), split="train2017")
    assert [(record["id"], record["caption"]) for record in records] == [
        ("7", "A green wall."), ("5", "A red wall."), ("9", "Grass."),
    ]  # fmt: skip
    names = [os.path.relpath(record["images"][0]["path"], tmp_path) for record in records]
    assert names == [f"train2017/{number:012d}.jpg" for number in (1, 0, 1)]
    file = tmp_path / "annotations" / "captions_train2017.json"
    assert both("coco_captions", file, images=tmp_path / "train2017") == records


def vqav2(folder: Path) -> Path:
    for number, color in enumerate(COLORS[:2]):
        write(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", color)
        write(folder / "test2015" / f"COCO_test2015_{number:012d}.jpg", color)
    questions = [
        {"image_id": number % 2, "question": f"What {number}?", "question_id": 100 + number} for number in range(3)
    ]
    for split, subtype in (("val2014", "val2014"), ("test-dev2015", "test-dev2015")):
        write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"data_subtype": subtype, "questions": questions})
    answers = [["net"] * 6 + ["netting"] * 4, ["2"] * 10, ["a", "b"] * 5]
    annotations = [
        {
            "question_id": 100 + number,
            "image_id": number % 2,
            "answers": [{"answer": answer, "answer_id": index} for index, answer in enumerate(answers[number])],
        }
        for number in (2, 0, 1)  # in another order than the questions
    ]
    annotations[0]["multiple_choice_answer"] = "b"  # theirs decides where two are as frequent
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    return folder


def test_vqav2(tmp_path):
    records = both("vqav2", vqav2(tmp_path), split="val2014", prompt="{question}\nOne word.")
    assert [record["messages"] for record in records] == [
        [user(IMAGE, f"What {number}?\nOne word."), assistant(answer)]
        for number, answer in enumerate(("net", "2", "b"))
    ]
    assert Counter(records[0]["answers"]) == {"net": 6, "netting": 4}
    assert [len(record["answers"]) for record in records] == [10, 10, 10]
    assert [record["id"] for record in records] == ["100", "101", "102"]
    assert all(Path(record["images"][0]["path"]).is_file() for record in records)
    renamed = both(
        "vqav2", tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", image_name="{image_id}.jpg",
        annotations=tmp_path / "v2_mscoco_val2014_annotations.json", images="/else",
    )  # fmt: skip
    assert renamed[1]["images"][0]["path"] == "/else/1.jpg" and renamed[1]["answers"] == records[1]["answers"]


def test_vqav2_tests_have_no_answers(tmp_path):
    records = both("vqav2", vqav2(tmp_path), split="test-dev2015")
    assert records[0]["messages"] == [user(IMAGE, "What 0?")] and records[0]["answers"] == []
    assert Path(records[0]["images"][0]["path"]).is_file()
    assert structure_problem(records[0])[0] == "roles"  # nothing to train on


# ---------------------------------------------------------------------- image folders


@pytest.mark.core
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_imagefolder_with_captions(kind, tmp_path):
    pictures(tmp_path)
    rows = [{"file_name": f"{color}.png", "text": f"something {color}"} for color in COLORS]
    if kind == "csv":
        write(tmp_path / "metadata.csv", "file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in rows))
    else:
        write(tmp_path / "metadata.jsonl", tuple(rows))
    records = both("imagefolder", tmp_path)
    assert [record["caption"] for record in records] == [f"something {color}" for color in COLORS]
    assert [colors_of(record) for record in records] == [[color] for color in COLORS]
    assert [record["id"] for record in records] == [f"{color}.png" for color in COLORS]


def test_imagefolder_with_a_folder_per_class(tmp_path):
    for color in COLORS:
        write(tmp_path / ("warm" if color == "red" else "cold") / f"{color}.png", color)
    records = both("imagefolder", tmp_path)
    feature = load("imagefolder", tmp_path).features["label"]
    assert feature == ClassLabel(names=["cold", "warm"])
    assert {colors_of(record)[0]: feature.int2str(record["label"]) for record in records} == {
        "red": "warm", "green": "cold", "blue": "cold", "white": "cold",
    }  # fmt: skip
    assert all(kind_of(record) is None and problem_of(record) is None for record in records)


def test_imagefolder_with_classes_and_notes_in_metadata(tmp_path):
    pictures(tmp_path)
    rows = [
        {"file_name": f"{color}.png", "label": color[0], "notes": f"note on {color}", "age": 3} for color in COLORS[:3]
    ]
    write(tmp_path / "metadata.jsonl", tuple(rows))
    records = both("imagefolder", tmp_path)
    assert load("imagefolder", tmp_path).features["label"] == ClassLabel(names=["b", "g", "r"])
    assert [(record["label"], record["notes"]) for record in records] == [
        (2, "note on red"), (1, "note on green"), (0, "note on blue"),
    ]  # fmt: skip
    assert "age" not in records[0]
    captioned = both("imagefolder", tmp_path, caption="notes")
    assert [record["caption"] for record in captioned] == [record["notes"] for record in records]


def test_imagefolder_with_questions_or_several_images(tmp_path):
    pictures(tmp_path / "a")
    write(tmp_path / "a" / "metadata.csv", "file_name,question,answer\nred.png,How many?,3\n")
    (record,) = both("imagefolder", tmp_path / "a")
    assert record["messages"] == [user(IMAGE, "How many?"), assistant("3")]
    pictures(tmp_path / "b")
    row = {
        "file_names": ["red.png", "blue.png"],
        "messages": [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "no"}],
    }
    write(tmp_path / "b" / "metadata.jsonl", (row,))
    (record,) = both("imagefolder", tmp_path / "b")
    assert record["messages"] == [user(IMAGE, " or ", IMAGE, "?"), assistant("no")]
    assert colors_of(record) == ["red", "blue"]


# ---------------------------------------------------------------------- WebDataset


@pytest.mark.core
def test_webdataset(tmp_path, monkeypatch):
    (tmp_path / "tars").mkdir()
    for number, shard in enumerate((COLORS[:2], COLORS[2:])):
        members = [
            (f"{color}.{kind}", content)
            for color in shard
            for kind, content in (("png", png(color)), ("txt", f" {color} \n".encode()), ("json", b'{"sha256": null}'))
        ]
        tar(tmp_path / "tars" / f"{number:05d}.tar", members)
    # a file that has a member's name and lies in the working folder is another picture
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "red.png", "blue")
    records = both("webdataset", tmp_path / "tars")
    assert [record["caption"] for record in records] == list(COLORS)
    assert [colors_of(record) for record in records] == [[color] for color in COLORS]
    assert [record["id"] for record in records] == list(COLORS)
    assert load("webdataset", tmp_path / "tars", streaming=True).num_shards == 2


def test_webdataset_with_json(tmp_path):
    samples = [llava_row(number, "<image>\nWhat?", color) for number, color in enumerate(COLORS)]
    members = [
        (f"x/{number}.{kind}", content)
        for number, sample in enumerate(samples)
        for kind, content in (("png", png(COLORS[number])), ("json", json.dumps(sample).encode()))
    ]
    path = tar(tmp_path / "a.tar", members)
    records = both("webdataset", path)
    assert [record["messages"] for record in records] == [[user(IMAGE, "What?"), assistant(color)] for color in COLORS]
    captions = [(f"{n}.{k}", c) for n in range(2) for k, c in (("json", b'{"alt": "words"}'), ("png", png("red")))]
    records = both("webdataset", tar(tmp_path / "b.tar", captions), caption="alt")
    assert [record["caption"] for record in records] == ["words", "words"]


def test_webdataset_samples_that_lack_something_are_counted(tmp_path):
    members = [
        ("0.png", png("red")),
        ("0.txt", b"red"),
        ("1.txt", b"no picture"),
        ("2.png", png("blue")),
        ("3.png", b"no"),
        ("3.txt", b"broken"),
    ]
    loaded = load("webdataset", tar(tmp_path / "a.tar", members))
    kept, report = skip_broken(loaded, max_broken=0.9)
    assert list(kept["id"]) == ["0"]
    reasons = {entry["id"]: entry["reason"] for entry in report.entries()}
    assert "places for 1 images, the record has 0" in reasons["1"]
    assert reasons["2"] == "the caption is empty" and "not an image" in reasons["3"]


def test_webdataset_samples_have_a_largest_size(tmp_path):
    """The header alone is enough: 2 GiB are not read to find out."""
    info = tarfile.TarInfo("0.png")
    info.size = 2 << 30
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf() + bytes(1 << 20))
    message = r"a\.tar: sample 0 has 2,147,483,648 bytes up to its member 0\.png; at most 1,073,741,824 are read"
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            list(load("webdataset", path, streaming=streaming))


def test_webdataset_members_of_one_sample_count_together_and_others_not(tmp_path, monkeypatch):
    monkeypatch.setattr(training_sources_webdataset, "MAX_SAMPLE_BYTES", 1000)
    members = [
        ("0.png", png("red")),
        ("0.txt", b"red"),
        ("0.mp4", bytes(9000)),
        ("1.png", png("blue")),
        ("1.txt", b"b"),
    ]
    loaded = load("webdataset", tar(tmp_path / "a.tar", members), streaming=True)
    assert [colors_of(record) for record in loaded] == [["red"], ["blue"]]
    frames = [(f"clip.{number}.png", png("red")) for number in range(40)]  # one sample, as the format has it
    with pytest.raises(ValueError, match="sample clip has 1,.* the same up to the first dot"):
        load("webdataset", tar(tmp_path / "b.tar", frames))


def test_a_broken_header_within_a_tar_is_an_error_not_the_end(tmp_path):
    members = [
        (f"{number}.{kind}", content) for number in range(3) for kind, content in (("png", png("red")), ("txt", b"a"))
    ]
    path = tar(tmp_path / "a.tar", members)
    content = bytearray(path.read_bytes())
    header = content.index(b"1.png")
    content[header : header + 5] = b"?????"
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a\.tar is damaged after 0 samples: bad checksum at byte"):
        list(load("webdataset", path, streaming=True))


# ---------------------------------------------------------------------- interleaved


def test_obelics(tmp_path):
    pictures(tmp_path)
    rows = (
        {"images": ["red.png", None, "blue.png"], "texts": [None, "between", None], "metadata": "[]"},
        {"images": [None, "https://x.org/a.png"], "texts": ["first", None]},
    )
    path = write(tmp_path / "docs.jsonl", rows)
    records = both("interleaved", path)
    assert records[0]["document"] == [IMAGE, text("between"), IMAGE]
    assert colors_of(records[0]) == ["red", "blue"]
    assert problem_of(records[1]) == ("https://x.org/a.png", "is an address, not a file; download the images first")
    downloaded = write(tmp_path / "map.json", {"https://x.org/a.png": "green.png"})
    assert colors_of(both("interleaved", path, downloaded=downloaded)[1]) == ["green"]
    parquet = tmp_path / "docs.parquet"
    embedded = {"images": [[None, {"path": None, "bytes": png("green")}]], "texts": [["a", None]]}
    Dataset.from_dict(embedded).to_parquet(parquet)
    (record,) = both("interleaved", parquet)
    assert record["document"] == [text("a"), IMAGE] and colors_of(record) == ["green"]


def test_mmc4(tmp_path):
    pictures(tmp_path)
    row = {
        "text_list": ["One.", "Two.", "Three."],
        "image_info": [
            {"image_name": "red.png", "raw_url": "https://x.org/1", "matched_text_index": 2, "matched_sim": 0.3},
            {"image_base64": base64.b64encode(png("blue")).decode(), "matched_text_index": 0, "matched_sim": 0.2},
            {"image_name": "green.png", "raw_url": "https://x.org/2", "matched_text_index": 2, "matched_sim": 0.1},
        ],
    }
    path = write(tmp_path / "docs.jsonl", (row,))
    (record,) = both("interleaved", path)
    assert record["document"] == [IMAGE, text("One. Two."), IMAGE, IMAGE, text("Three.")]
    assert colors_of(record) == ["blue", "red", "green"]
    (record,) = both("interleaved", path, min_similarity=0.15)
    assert record["document"] == [IMAGE, text("One. Two."), IMAGE, text("Three.")]
    assert colors_of(record) == ["blue", "red"]


# ---------------------------------------------------------------------- easy-VQA


def easy_vqa(folder: Path) -> Path:
    asked = [
        ["what color is the shape?", "red", 0],
        ["is there a circle?", "yes", 0],
        ["is there not a blue shape?", "yes", 0],
        ["what shape is in the image?", "circle", 0], ["is there a teal shape?", "no", 1],
    ]  # fmt: skip
    write(folder / "train" / "questions.json", asked)
    for number, color in enumerate(COLORS[:2]):
        write(folder / "train" / "images" / f"{number}.png", color)
    return folder


def test_easy_vqa(tmp_path):
    folder = easy_vqa(tmp_path)
    records = both("easy_vqa", folder)
    assert [record["id"] for record in records] == ["0-0", "0-1", "0-2", "0-3", "1-0"]
    assert records[0]["messages"] == [user(IMAGE, "what color is the shape?"), assistant("red")]
    whole = both("easy_vqa", folder, multi_turn=True)
    assert [len(record["messages"]) for record in whole] == [8, 2]
    assert whole[0]["messages"][2:4] == [user("is there a circle?"), assistant("yes")]
    assert not any(map(problem_of, whole))
    assert [record["caption"] for record in both("easy_vqa", folder, captions=True)] == ["a red circle"]
    asked = both("easy_vqa", folder, multi_turn=True, questions_per_image=0, caption_question="what is in the image?")
    # nothing tells what is in the second picture
    assert [record["messages"] for record in asked] == [
        [user(IMAGE, "what is in the image?"), assistant("a red circle")]
    ]


@pytest.mark.parametrize("multi_turn", [False, True])
def test_easy_vqa_pairs_are_matched_and_drawn_anew_with_the_seed(multi_turn, tmp_path):
    folder = easy_vqa(tmp_path)
    options = {"pairs": 2, "questions_per_image": 5, "multi_turn": multi_turn}

    def asked(seed):
        records = both("easy_vqa", folder, seed=seed, **options)
        turns = [turn for record in records for turn in record["messages"] if record["id"].startswith("0")]
        spoken = [turn["content"][-1]["text"] for turn in turns]
        return list(zip(spoken[::2], spoken[1::2]))

    pairs = asked(0)
    own = {(question, answer) for question, answer in asked_of(folder)}
    assert len(pairs) == 5 and len([pair for pair in pairs if pair in own]) >= 1
    answers = Counter(answer for question, answer in pairs if answer in ("yes", "no"))
    assert abs(answers["yes"] - answers["no"]) <= 1  # pairs are balanced; one question is its own
    assert pairs == asked(0) and any(asked(seed) != pairs for seed in (1, 2, 3))


def asked_of(folder):
    return training_easy_vqa.load_split(folder, "train")[0].questions


# ---------------------------------------------------------------------- data sets of records


def test_hub_reads_what_was_saved(tmp_path):
    pictures(tmp_path / "a")
    rows = {
        "image": [str(tmp_path / "a" / "red.png"), str(tmp_path / "a" / "blue.png")],
        "messages": [
            [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": color}]
            for color in ("red", "blue")
        ],
        "score": [0.5, 0.25],
    }
    dataset = Dataset.from_dict(rows).cast_column("image", datasets.Image())
    DatasetDict({"val": dataset}).save_to_disk(tmp_path / "saved")
    records = both("hub", tmp_path / "saved", split="val")
    assert [record["messages"] for record in records] == [
        [user(IMAGE, "What?"), assistant(color)] for color in ("red", "blue")
    ]
    assert [colors_of(record) for record in records] == [["red"], ["blue"]]
    assert [record["score"] for record in records] == [0.5, 0.25] and "image" not in records[0]
    (tmp_path / "files").mkdir()
    dataset.to_parquet(tmp_path / "files" / "train.parquet")
    assert [record["messages"] for record in both("hub", tmp_path / "files")] == [r["messages"] for r in records]


@pytest.mark.core
def test_hub_gives_back_records_as_they_were(tmp_path):
    pictures(tmp_path / "photos")
    rows = [llava_row(0, "<image>\nWhat?", image="red.png"), llava_row(1, "Who?")]
    loaded = load("llava", write(tmp_path / "a.json", rows), images=tmp_path / "photos")
    loaded.save_to_disk(tmp_path / "saved")
    again = both("hub", tmp_path / "saved")
    assert [{**record, "images": colors_of(record)} for record in again] == [
        {**record, "images": colors_of(record)} for record in loaded
    ]


# ---------------------------------------------------------------------- what is refused


COCO_IMAGE = {"id": 0, "file_name": "a.jpg"}
REFUSED = [
    ("llava", "a.json", "[3]", "row 0 is a int; expected an object"),
    ("llava", "a.json", "{", "is no JSON"),
    ("llava", "a.jsonl", '{"id": "a", "conversations": []}\n{"id"', "line 2 is no JSON"),
    ("llava", "a.json", '[{"id": "a", "image": "a.png"}]', "row 0 has id, image; expected 'conversations'"),
    ("llava", "a.json", '[{"conversations": [{"from": "robot", "value": ""}]}]',
     "'from' is 'robot'; expected one of human"),
    ("llava", "a.json", '[{"conversations": [{"from": "human", "value": 3}]}]', "value is a int; expected a text"),
    ("llava", "a.json", '[{"image": [3], "conversations": []}]', "image is a int; expected a text"),
    ("llava", "a.jsonl", b'{"id": "\xff"}', "is not in UTF-8"),
    ("llava", "a.bin", "", "expected .json, .jsonl"),
    ("llava", "a.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:-12], "is damaged: Compressed file ended"),
    ("llava", "a.json.gz", b"no gzip", "is damaged: Not a gzipped file"),
    ("llava", "a.csv", "id,conversations\n0," + "x" * 200_000, "can't be read as a table: field larger"),
    ("interleaved", "a.parquet", b"no table", "is damaged after 0 rows, or not Parquet"),
    ("coco_captions", "a.json", "[]", "is a list; expected an object"),
    ("coco_captions", "a.json", {"images": []}, "has images; expected 'annotations'"),
    ("coco_captions", "a.json", {"images": [COCO_IMAGE], "annotations": [{"image_id": 4, "caption": "a"}]},
     "annotation 0 is of image 4, which is not among the images"),
    ("coco_captions", "a.json", {"images": [COCO_IMAGE], "annotations": [{"image_id": 0}]}, "expected 'caption'"),
    ("vqav2", "a.json", {"questions": [{"question_id": 1, "question": "a"}]}, "expected 'image_id'"),
    ("vqav2", "a.json", {"data_subtype": "val2014"}, "expected 'questions'"),
    ("interleaved", "a.jsonl", '{"images": ["a"], "texts": []}', "1 images and 0 texts"),
    ("interleaved", "a.jsonl", '{"images": ["a"], "texts": ["b"]}', "place 0 has an image and a text"),
    ("interleaved", "a.jsonl", '{"images": [null], "texts": [null]}', "place 0 has nothing"),
    ("interleaved", "a.jsonl", '{"url": "a"}', r"expected images and texts \(OBELICS\)"),
    ("interleaved", "a.jsonl", '{"text_list": ["a"], "image_info": [{"image_name": "a", "matched_text_index": 1}]}',
     "matched_text_index is 1; expected 0 to 0"),
    ("interleaved", "a.jsonl",
     '{"text_list": ["a"], "image_info": [{"image_base64": "aaaaa", "matched_text_index": 0}]}',
     "line 1: image_base64 can't be decoded"),
    ("webdataset", "a.tar", b"", "is damaged after 0 samples|holds no samples"),
    ("webdataset", "a.tar", b"no tar at all" * 100, "is damaged after 0 samples"),
]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("source", "name", "content", "message"), REFUSED)
def test_refused(source, name, content, message, streaming, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as raised:  # the file, or a record that says why it is broken
        records = list(load(source, path, streaming=streaming))
        raise ValueError(next(record["why_broken"] for record in records if structure_problem(record)))
    assert str(path) in str(raised.value)


def test_a_tar_that_ends_early_is_an_error_not_the_end(tmp_path):
    members = [(f"{number}.{kind}", png("red") * 20) for number in range(9) for kind in ("png", "txt")]
    path = tar(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"a.tar is damaged after \d samples"):
        list(load("webdataset", path, streaming=True))


def test_what_load_is_given(tmp_path):
    with pytest.raises(ValueError, match="source is 'laion'; expected one of llava, coco_captions"):
        load("laion", tmp_path)
    with pytest.raises(ValueError, match="source 'llava': .*unexpected keyword argument 'folder'"):
        load("llava", write(tmp_path / "a.json", "[]"), folder="b")
    with pytest.raises(ValueError, match="split is 'val', but .* is no folder"):
        load("llava", tmp_path / "a.json", split="val")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("llava", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no file that ends in .tar"):
        load("webdataset", tmp_path)
    for source in set(SOURCES) - {"easy_vqa"}:
        with pytest.raises(ValueError, match="path is"):
            load(source)
    for source in ("coco_captions", "vqav2"):
        with pytest.raises(ValueError, match="say which split"):
            load(source, tmp_path)
    with pytest.raises(ValueError, match="expected easy-VQA"):
        load("easy_vqa", tmp_path)
    with pytest.raises(FileNotFoundError, match="v2_mscoco_val2014_annotations.json"):
        questions = vqav2(tmp_path / "vqa") / "v2_mscoco_val2014_annotations.json"
        questions.unlink()
        load("vqav2", tmp_path / "vqa", split="val2014")
    write(tmp_path / "x" / "a.png", "red")
    write(tmp_path / "x" / "metadata.csv", "file_name,words\na.png,b\n")
    with pytest.raises(ValueError, match=r"the metadata have image, words; expected a caption \(caption, text"):
        load("imagefolder", tmp_path / "x")
    with pytest.raises(ValueError, match="caption is 'b'; expected one of image, words"):
        load("imagefolder", tmp_path / "x", caption="b")
    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved has a; expected images"):
        load("hub", tmp_path / "saved")
    with pytest.raises(ValueError, match="saved has no splits, but split is 'val'"):
        load("hub", tmp_path / "saved", split="val")


def test_nothing_is_opened_while_loading(tmp_path):
    rows = [llava_row(number, "<image>\nWhat?", image=f"nowhere/{number}.png") for number in range(10)]
    assert len(both("llava", write(tmp_path / "a.json", rows))) == 10


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.json", [llava_row(0, "first")])
    assert load("llava", path)[0]["messages"][0] == user("first")
    write(path, [llava_row(0, "other")])
    os.utime(path, ns=(1, 1))  # of the same size
    assert load("llava", path)[0]["messages"][0] == user("other")


# ---------------------------------------------------------------------- images


def test_open_image_is_upright_rgb(tmp_path):
    image = Image.new("L", (8, 4), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.jpg", exif=exif)
    for value in (
        {"path": str(tmp_path / "a.jpg"), "bytes": None},
        {"path": None, "bytes": (tmp_path / "a.jpg").read_bytes()},
    ):
        assert open_image(value).mode == "RGB" and open_image(value).size == (4, 8)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"path": "nowhere.png", "bytes": None}, "no such file"),
        ({"path": "x.png", "bytes": b""}, r"empty \(0 bytes\)"),
        ({"path": "x.png", "bytes": b"no image"}, "not an image"),
        ({"path": "x.png", "bytes": png("red")[:50]}, "cannot be read as an image"),
        ({"path": None, "bytes": None}, "neither a path nor bytes"),
        ({"path": "https://x.org/a.png", "bytes": None}, "is an address"),
        (None, "neither a path nor bytes"),
    ],
)
def test_images_that_cannot_be_opened(value, reason):
    with pytest.raises(ImageError, match=reason):
        open_image(value)


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="decompression bomb"):
        open_image({"path": "x.png", "bytes": png("red")})


# ---------------------------------------------------------------------- broken records


def broken_set(folder: Path, broken, number: int = 12, shards: int = 1) -> list[Path]:
    """Conversations about pictures, those with the numbers in `broken` missing, cut short or badly built."""
    files = []
    rows = []
    for index in range(number):
        row = llava_row(index, "<image>\nWhat?", image=f"{index}.png")
        if index not in broken:
            write(folder / f"{index}.png", "red")
        elif index % 3 == 1:
            write(folder / f"{index}.png", png("red")[:50])
        elif index % 3 == 2:
            write(folder / f"{index}.png", "red")
            row["conversations"][0]["value"] = "no place for it"
        rows.append(row)
    for shard in range(shards):
        part = rows[shard * number // shards : (shard + 1) * number // shards]
        files.append(write(folder / f"part{shard}.jsonl", tuple(part)))
    return files


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(broken=st.sets(st.integers(0, 11)), shards=st.integers(1, 3))
def test_what_is_whole_stays_in_order(broken, shards, tmp_path_factory):
    files = broken_set(tmp_path_factory.mktemp("set"), broken, shards=shards)
    whole = [f"id{number}" for number in range(12) if number not in broken]
    kept, report = skip_broken(load("llava", files), max_broken=12)
    assert list(kept["id"]) == whole
    assert (report.num_records, report.num_broken) == (12, len(broken))
    assert [entry["id"] for entry in report.entries()] == [f"id{number}" for number in sorted(broken)]
    stream, report = skip_broken(load("llava", files, streaming=True), max_broken=12)
    assert [record["id"] for record in stream] == whole
    assert (report.num_records, report.num_broken) == (12, len(broken))
    assert [entry["id"] for entry in report.entries()] == [f"id{number}" for number in sorted(broken)]


def test_the_report_names_files_and_reasons(tmp_path):
    _, report = skip_broken(
        load("llava", broken_set(tmp_path, {0, 1, 2, 3, 4, 6})), max_broken=0.6, log=tmp_path / "log"
    )
    lines = str(report)
    assert "6 of 12 records are broken and left out" in lines and "3 x no such file" in lines
    assert f"{tmp_path}/0.png: no such file" in lines and "record id2: the text has places for 0 images" in lines
    assert f"all in {tmp_path}/log" in lines
    assert len((tmp_path / "log").read_text().splitlines()) == 6


@pytest.mark.parametrize(("max_broken", "allowed"), [(0.25, 3), (0.24, 2), (3, 3), (2, 2), (0, 0), (0.0, 0)])
@pytest.mark.parametrize("streaming", [False, True])
def test_more_broken_than_allowed(max_broken, allowed, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(BrokenReport, "first_records", 12)
    for count in (allowed, allowed + 1):
        files = broken_set(tmp_path / str(count), set(range(count)))

        def run(files=files):
            kept, report = skip_broken(load("llava", files, streaming=streaming), max_broken=max_broken)
            ids = [record["id"] for record in kept]
            report.check()
            return ids

        if count == allowed:
            assert len(run()) == 12 - count
        else:
            with pytest.raises(
                BrokenDataError, match=f"{count} of .* broken(.|\n)*More than max_broken={max_broken} allows"
            ):
                run()


def test_a_share_of_a_stream_is_judged_late_or_when_asked(tmp_path):
    files = broken_set(tmp_path, {0, 1})
    stream, report = skip_broken(load("llava", files, streaming=True), max_broken=0.01)
    assert len(list(stream)) == 10  # two of the first thousand are less than one per cent
    with pytest.raises(BrokenDataError, match="2 of 12"):
        report.check()


@pytest.mark.parametrize("max_broken", [-0.1, 1.5, True])
def test_limits_that_are_none(max_broken):
    with pytest.raises(ValueError, match="expected a share"):
        BrokenReport(max_broken)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_count_together(num_workers, tmp_path):
    broken = {1, 5, 6, 11}
    stream, report = skip_broken(load("llava", broken_set(tmp_path, broken, shards=3), streaming=True), max_broken=4)
    records = [record["id"] for record in DataLoader(stream, batch_size=None, num_workers=num_workers)]
    assert sorted(records) == sorted(f"id{number}" for number in set(range(12)) - broken)
    assert (report.num_records, report.num_broken) == (12, 4)
    assert {entry["id"] for entry in report.entries()} == {f"id{number}" for number in broken}
    again = [record["id"] for record in DataLoader(stream, batch_size=None, num_workers=num_workers)]
    assert again == records  # the same order every time
    assert len(report.entries()) == 4  # each is named once


def test_one_too_many_in_a_worker_stops_the_loader(tmp_path):
    files = broken_set(tmp_path, {1, 5, 6, 11}, shards=2)
    stream, _ = skip_broken(load("llava", files, streaming=True), max_broken=3)
    with pytest.raises(BrokenDataError, match="max_broken=3"):
        list(DataLoader(stream, batch_size=None, num_workers=2))


def test_images_are_opened_again_when_they_change(tmp_path):
    loaded = load("llava", broken_set(tmp_path, {0}))
    assert len(skip_broken(loaded, max_broken=1)[0]) == 11
    write(tmp_path / "0.png", "red")
    assert len(skip_broken(loaded, max_broken=1)[0]) == 12


def test_an_image_of_many_records_is_opened_once(tmp_path, monkeypatch):
    write(tmp_path / "0.jpg", "red")
    annotations = [{"id": number, "image_id": number % 2, "caption": f"a {number}"} for number in range(10)]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(2)]
    loaded = load("coco_captions", write(tmp_path / "a.json", {"images": images, "annotations": annotations}))
    opened = []
    monkeypatch.setattr(training_records, "open_image", lambda value: opened.append(value["path"]) or open_image(value))
    kept, report = skip_broken(loaded, max_broken=5)
    assert len(opened) == 2 and list(kept["id"]) == ["0", "2", "4", "6", "8"] and report.num_broken == 5


# ---------------------------------------------------------------------- mixtures


def captioned(name: str, number: int, streaming: bool, folder: Path):
    content = {
        "images": [{"id": index, "file_name": f"{index}.jpg"} for index in range(number)],
        "annotations": [{"id": f"{name}{index}", "image_id": index, "caption": "a"} for index in range(number)],
    }
    path = folder / f"{name}.json"
    if not path.exists():
        write(path, content)
    return load("coco_captions", path, streaming=streaming)


def mixed(folder, streaming, weights=(3, 1), seed=0, stopping="all_exhausted"):
    write(folder / "a.json", [llava_row(number, "Who?") for number in range(9)])
    parts = [load("llava", folder / "a.json", streaming=streaming), captioned("c", 5, False, folder)]
    return mix(parts, weights, seed=seed, stopping=stopping)


@pytest.mark.core
@pytest.mark.parametrize("streaming", [False, True])
def test_mix(streaming, tmp_path):
    dataset = mixed(tmp_path, streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    records = list(dataset)
    assert records == list(mixed(tmp_path, streaming))
    assert {kind_of(record) for record in records} == {"messages", "caption"}
    ids = [record["id"] for record in records]
    assert {f"id{number}" for number in range(9)} | {f"c{number}" for number in range(5)} == set(ids)
    assert ids != [record["id"] for record in mixed(tmp_path, streaming, seed=1)]
    once = [record["id"] for record in mixed(tmp_path, streaming, stopping="all_exhausted_without_replacement")]
    assert sorted(once) == sorted(set(ids))
    first = [record["id"] for record in mixed(tmp_path, streaming, stopping="first_exhausted")]
    assert len(first) < len(once) and first == ids[: len(first)]


def test_mix_streams_as_it_draws_in_advance(tmp_path):
    assert [r["id"] for r in mixed(tmp_path, True, stopping="all_exhausted_without_replacement")] == [
        r["id"] for r in mixed(tmp_path, False, stopping="all_exhausted_without_replacement")
    ]


def test_broken_records_of_a_mixture_that_is_no_stream(tmp_path):
    for number in range(0, 5, 2):
        write(tmp_path / f"{number}.jpg", "red")
    kept, report = skip_broken(mixed(tmp_path, False, stopping="all_exhausted_without_replacement"), max_broken=2)
    assert len(kept) == 12 and {entry["id"] for entry in report.entries()} == {"c1", "c3"}
    Path(report.log).unlink()
    _, report = skip_broken(mixed(tmp_path, False).filter(lambda record: record["caption"] is None))
    log = Path(report.log)
    assert log.exists()
    del report
    assert not log.exists()  # nothing was broken, nothing stays behind


def test_weights_are_kept_to(tmp_path):
    parts = [captioned("a", 2000, True, tmp_path), captioned("b", 2000, True, tmp_path)]
    records = mix(parts, [3, 1], stopping="first_exhausted").take(1000)
    share = sum(record["id"].startswith("a") for record in records) / 1000
    assert abs(share - 0.75) < 0.06  # more than four standard deviations


@pytest.mark.core
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mixture_continues_where_it_was(data, tmp_path):
    def make():
        mixture, _ = skip_broken(mixed(tmp_path, True), max_broken=1000)
        return mixture

    for number in range(0, 5, 2):
        write(tmp_path / f"{number}.jpg", "red")  # the other captions are without their image
    whole = [record["id"] for record in make()]
    cut = data.draw(st.integers(0, len(whole) - 1))
    begun = make()
    reader = iter(begun)
    head = [next(reader)["id"] for _ in range(cut)]
    state = json.loads(json.dumps(begun.state_dict()))
    rest = make()
    rest.load_state_dict(state)
    assert head + [record["id"] for record in rest] == whole


def test_what_mix_refuses(tmp_path):
    one = captioned("a", 2, False, tmp_path)
    with pytest.raises(ValueError, match="no data sets"):
        mix([])
    with pytest.raises(ValueError, match="stopping is 'never'; expected one of first_exhausted"):
        mix([one, one], stopping="never")
    for weights in ([1], [1, 0], [1, -1], [1, float("inf")], [1, float("nan")]):
        with pytest.raises(ValueError, match="expected a positive number for each of 2"):
            mix([one, one], weights)
    with pytest.raises(ValueError, match="column 'score' is .* in one data set"):
        mix([one.add_column("score", [1, 2]), one.add_column("score", ["a", "b"])])
    assert mix([one], [2]) is one


# ---------------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"caption": "a", "images": [1]}, None),
        ({"label": 0, "images": [1]}, None),
        ({"images": [1]}, "form"),
        ({"caption": "a", "document": [], "images": [1]}, "form"),
        ({"document": [{"type": "video", "text": None}], "images": []}, "form"),
        ({"caption": "a", "images": []}, "placeholders"),
        ({"caption": "a", "images": [1, 2]}, "placeholders"),
        ({"caption": "an <image>", "images": [1]}, "placeholders"),
        ({"caption": " \n", "images": [1]}, "empty"),
        ({"document": [IMAGE], "images": [1]}, "empty"),
        ({"document": [IMAGE, text("a")], "images": [1]}, None),
        ({"messages": [user(IMAGE), assistant("a")], "images": [1]}, None),
        ({"messages": [], "images": []}, "roles"),
        ({"messages": [user("a")], "images": []}, "roles"),
        ({"messages": [assistant("a"), user("a")], "images": []}, "roles"),
        ({"messages": [user("a"), user("a"), assistant("a")], "images": []}, "roles"),
        ({"messages": [user("a"), assistant("")], "images": []}, "empty"),
        ({"messages": [user(), assistant("a")], "images": []}, "empty"),
    ],
)
def test_structure(record, kind):
    found = structure_problem(record)
    assert (found and found[0]) == kind


def test_features_hold_what_records_have():
    assert FEATURES["images"].feature == datasets.Image(decode=False)
    assert FEATURES["id"] == Value("string")
    record = {
        "id": "a", "source": "b", "images": [{"path": "x", "bytes": None}], "messages": None, "caption": None,
        "document": [IMAGE, text("a")], "why_broken": None,
    }  # fmt: skip
    assert Dataset.from_list([record], features=FEATURES)[0] == record


def test_pictures_are_held_out_with_all_their_records(tmp_path):
    """The two sides share no picture and lose no record; a picture stays on its side when others come."""
    (tmp_path / "pictures").mkdir()
    for count in (60, 80):
        rows = []
        for number in range(count):
            Image.new("RGB", (6, 4)).save(tmp_path / "pictures" / f"{number}.png")
            rows += [{"file_name": f"{number}.png", "caption": f"{word} {number}"} for word in ("one", "two")]
        (tmp_path / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = load("imagefolder", tmp_path / "pictures")
        sides = [{row["caption"] for row in hold_out(records, 5, held_out)} for held_out in (False, True)]
        assert sides[0] | sides[1] == {row["caption"] for row in rows}
        pictures = [{caption.split()[1] for caption in side} for side in sides]
        assert not pictures[0] & pictures[1] and count / 10 < len(pictures[1]) < count / 2.5
        assert len(sides[1]) == 2 * len(pictures[1])
        stream = load("imagefolder", tmp_path / "pictures", streaming=True)
        assert {row["caption"] for row in hold_out(stream, 5, True)} == sides[1]
        if count == 60:
            before = pictures[1]
    assert before == {name for name in pictures[1] if int(name) < 60}
