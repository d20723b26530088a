"""`vlbridge data check` and `show`: what they find in data that was spoilt on purpose."""

import json
import re
import string
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import BRIDGE_OPTIONS, tiny_image, tiny_model
from typer.testing import CliRunner

import vlbridge
from vlbridge import cli
from vlbridge.training.training_data import FEATURES, load, open_image
from vlbridge.training.training_data_check import (
    Cell,
    TokenCounter,
    answer_in_question,
    check_data,
    contact_sheet,
    suspicious_encoding,
    turns_of,
)
from vlbridge.training.training_data_report import histogram
from vlbridge.training.training_data_sheet import _wrapped


FAMILIES = list(BRIDGE_OPTIONS)


def conversation(number, question="What is it?", answer="A wall.", image="<image>\n", **more):
    turns = [{"from": "human", "value": f"{image}{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"id{number}", "image": f"{number}.png", "conversations": turns, **more}


def paint(path: Path, number: int, size=(64, 48)) -> None:
    Image.new("RGB", size, (number * 20 % 256, number * 7 % 256, 99)).save(path)


@pytest.fixture
def good(tmp_path):
    """Twelve conversations about twelve pictures."""
    rows = [conversation(number, answer=f"Wall number {number}.") for number in range(12)]
    for number in range(12):
        paint(tmp_path / f"{number}.png", number)
    return rows


def saved(rows, folder) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def checked(rows, folder, **options):
    return check_data(load("llava", saved(rows, folder)), progress=False, **options)[0]


@pytest.mark.core
def test_good_data(good, tmp_path):
    report = checked(good, tmp_path)
    assert report.ok and not report.findings and not report.warnings
    assert (report.records, report.turns, report.images, report.distinct_images) == (12, 12, 12, 12)
    assert report.kinds == {"messages": 12} and report.text_only == 0
    assert report.widths == [64, 64, 64] and report.heights == [48, 48, 48]
    assert report.answer_lengths == [3, 3, 3, 3] and report.answer_unit == "words"
    assert list(report.lines())[-1] == "fit for training"
    streamed, _ = check_data(load("llava", saved(good, tmp_path), streaming=True), progress=False)
    assert streamed == report


def spoil_missing(rows, folder):
    (folder / "3.png").unlink()
    return "missing", "id3", "no such file"


def spoil_broken(rows, folder):
    content = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(content[: len(content) // 2])
    return "broken", "id3", "cannot be read as an image"


def spoil_placeholders(rows, folder):
    rows[3]["conversations"][0]["value"] = "no place"
    return "placeholders", "id3", "places for 0 images, the record has 1"


def spoil_empty(rows, folder):
    rows[3]["conversations"][1]["value"] = " \n"
    return "empty", "id3", "an empty assistant message"


def spoil_roles(rows, folder):
    rows[3]["conversations"].pop()
    return "roles", "id3", "the roles are user"


ERRORS = [spoil_missing, spoil_broken, spoil_placeholders, spoil_empty, spoil_roles]


@pytest.mark.parametrize("spoil", ERRORS)
def test_errors(spoil, good, tmp_path):
    name, record, detail = spoil(good, tmp_path)
    report = checked(good, tmp_path)
    assert not report.ok and list(report.findings) == [name]
    (example,) = report.findings[name].examples
    assert report.findings[name].count == 1 and example["id"] == record and detail in example["detail"]
    assert report.errors[0] == "1 of 12 records are broken, max_broken is 0.01" and report.broken_records == 1
    tolerant = checked(good, tmp_path, max_broken=0.2)
    assert tolerant.ok == (name in ("missing", "broken"))  # what is built wrongly is never fit
    assert "1 broken records will be left out" in tolerant.warnings


def spoil_encoding(rows, folder):
    rows[3]["conversations"][1]["value"] = "CafÃ© table"
    return "encoding", "id3", "'CafÃ©' seems to be 'Café'"


def spoil_leak(rows, folder):
    rows[3]["conversations"][0]["value"] = "<image>\nIs the brick wall red?"
    rows[3]["conversations"][1]["value"] = "Brick wall."
    return "leaks", "id3", "'Brick wall.'"


def spoil_small(rows, folder):
    paint(folder / "3.png", 3, size=(31, 40))
    return "small", "id3", "31 x 40 pixels"


def spoil_long(rows, folder):
    paint(folder / "3.png", 3, size=(40, 401))
    return "long", "id3", "40 x 401 pixels"


def spoil_copy(rows, folder):
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes())
    return "duplicate_images", "id3", "same content as"


def spoil_twice(rows, folder):
    rows.append({**rows[3], "id": "again"})
    return "duplicate_records", "again", "Wall number 3."


@pytest.mark.parametrize("spoil", [spoil_encoding, spoil_leak, spoil_small, spoil_long, spoil_copy, spoil_twice])
def test_warnings(spoil, good, tmp_path):
    name, record, detail = spoil(good, tmp_path)
    report = checked(good, tmp_path)
    assert report.ok and len(report.warnings) == 1 and report.broken_records == 0
    (example,) = report.findings[name].examples
    assert example["id"] == record and detail in example["detail"]


def test_data_without_records(tmp_path):
    path = saved([], tmp_path)
    with pytest.raises(ValueError, match="data.json: there are no records"):
        load("llava", path)
    report, cells = check_data(load("llava", path, streaming=True), num_cells=2, progress=False)
    assert report.errors == ["there are no records"] and cells == []


def test_a_sample_is_drawn_from_everywhere(good, tmp_path):
    loaded = load("llava", saved(good, tmp_path))
    reports = [check_data(loaded, sample=4, seed=seed, num_cells=4, progress=False) for seed in (0, 0, 1)]
    assert all(report.records == 4 for report, _ in reports)
    first, again, other = ([cell.text for cell in cells] for _, cells in reports)
    assert first == again != other and len(set(first)) == 4
    streamed, _ = check_data(load("llava", saved(good, tmp_path), streaming=True), sample=4, progress=False)
    assert streamed.records == 4
    assert check_data(loaded, sample=99, progress=False)[0].records == 12


def test_embedded_images_of_one_name_are_told_apart(good, tmp_path):
    values = [{"path": "image.png", "bytes": (tmp_path / f"{number}.png").read_bytes()} for number in (0, 1, 0)]
    rows = [
        {"id": str(number), "source": "a", "images": [value], "caption": f"wall {number}"}
        for number, value in enumerate(values)
    ]
    features = datasets.Features({name: FEATURES[name] for name in rows[0]})
    report, _ = check_data(Dataset.from_list(rows, features=features), progress=False)
    assert (report.images, report.distinct_images) == (3, 2) and report.ok


# ---------------------------------------------------------------------- texts


@given(st.text("äöüßéèçñÄÖÜ ", min_size=1))
def test_text_that_was_read_as_windows_1252_is_found(text):
    assert suspicious_encoding(f"a {text} b") is None
    misread = "".join(
        bytes([byte]).decode("cp1252") if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(byte)
        for byte in text.encode()
    )
    found = suspicious_encoding(f"a {misread} b")
    assert (found is None) == text.isascii() and (found is None or "Windows-1252" in found)


@given(st.text(string.ascii_letters + string.digits + " .,;:!?'\"()-/$%*+=\n\t"))
def test_plain_text_is_not_suspicious(text):
    assert suspicious_encoding(text) is None


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("a \ufffd", "replacement"),
        ("a\x00b", "control character U\\+0000"),
        ("a\x85", "control character U\\+0085"),
        ("salt &amp; pepper", "markup: '&amp;'"),
        ("a<br />b", "markup: '<br />'"),
        ("caf\\u00e9", "nobody decoded"),
        ("日本語 CafÃ© and more", "'CafÃ©' seems to be 'Café', UTF-8 that was read as Windows-1252"),
        ("the cup isnâ€™t red", "'isnâ€™t' seems to be 'isn’t'"),
        ("ÃƒÂ©", "'ÃƒÂ©' seems to be 'Ã©'"),
        ("Æ’ and â‚¬ ßÄ", "'â‚¬' seems to be '€'"),
        ("salt & pepper; 3 < 4 > 2; R&D;", None),
        ("日本語 Ελληνικά 🙂 naïve Ångström", None),
    ],
)
def test_suspicious_encodings(text, sign):
    found = suspicious_encoding(text)
    assert (found is None) if sign is None else re.search(sign, found)


@pytest.mark.parametrize(
    ("question", "answer", "leaks"),
    [
        ("What is the red car doing?", "The red car", True),
        ("What is the red car doing?", "red", True),
        ("What is the redcar doing?", "red", False),
        ("Is there a yes on it?", "Yes", False),
        ("Is it red or blue?", "red", False),
        ("What is it?", "...", False),
    ],
)
def test_answers_in_questions(question, answer, leaks):
    assert answer_in_question(question, answer) == leaks


def test_turns():
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    assert turns_of({"messages": messages, "images": [1]}) == [("q", "a")]
    assert turns_of({"caption": "c", "images": [1]}) == [("", "c")]


@given(st.lists(st.integers(0, 5000), min_size=1))
def test_histograms_hold_everything_once(values):
    counts = histogram(values)
    bounds = list(counts)
    assert sum(counts.values()) == len(values) and len(bounds) <= 11
    step = bounds[1] - bounds[0] if len(bounds) > 1 else 5000
    for bound, count in counts.items():
        assert count == sum(bound - step < value <= bound for value in values) or len(bounds) == 1


# ---------------------------------------------------------------------- tokens


@pytest.mark.parametrize("bridge", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"image_aspect_ratio": "anyres"}])
def test_tokens_are_those_of_the_processor(bridge, options, tmp_path):
    if options and bridge != "mlp":
        options = {}
    _, processor = tiny_model(bridge, **options)
    counter = TokenCounter(processor)
    image = {"type": "image", "text": None}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "one and"}, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    records = [
        {"caption": "a wall", "sizes": [(90, 40)]},
        {
            "document": [{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}, image],
            "sizes": [(40, 90), (50, 50)],
        },
        {"messages": messages, "sizes": [(64, 64), (33, 99)]},
    ]
    for record in records:
        sizes = record.pop("sizes")
        images = [tiny_image(seed, size) for seed, size in enumerate(sizes)]
        text = counter.text_of(record)
        inputs = processor(images=processor.nest([images]), text=[text], return_tensors="pt")
        assert counter.text_tokens([text])[0] + counter.image_tokens(sizes) == inputs["input_ids"].shape[1]


def test_what_does_not_fit(good, tmp_path):
    _, processor = tiny_model("mlp")
    good[3]["conversations"][1]["value"] = "long " * 40
    report = checked(good, tmp_path, processor=processor, window=150)
    assert report.ok and report.findings["too_long"].count == 1
    assert report.findings["too_long"].examples[0]["id"] == "id3"
    assert report.answer_unit == "tokens" and report.answer_lengths[-1] == 199  # one token per character
    assert sum(report.histogram.values()) == 12 and report.window == 150
    cramped = checked(good, tmp_path, processor=processor, window=20)
    assert cramped.findings["no_room"].count == 12
    assert "12 records have images that alone fill the context window" in cramped.errors


# ---------------------------------------------------------------------- contact sheet


def test_contact_sheet(good, tmp_path):
    spoil_missing(good, tmp_path)
    report, cells = check_data(load("llava", saved(good, tmp_path)), num_cells=6, progress=False)
    assert len(cells) == 6 and cells[0].problem == "no such file" and not any(cell.problem for cell in cells[1:])
    numbers = [int(cell.text.split()[0].removeprefix("id")) for cell in cells[1:]]
    assert numbers == sorted(numbers)
    sheet = contact_sheet(cells, columns=3, width=100)
    assert sheet.width == 3 * 108 + 8
    red = [np.all(np.asarray(sheet)[:, left : left + 100] == (255, 0, 0), axis=-1).sum() for left in (8, 116)]
    assert red[0] > 500 and red[1] == 0  # the broken one stands first
    for cell, left in zip(cells[1:3], (116, 224)):
        center = open_image({"path": str(tmp_path / f"{cell.text.split()[0][2:]}.png"), "bytes": None}).getpixel((9, 9))
        assert sheet.getpixel((left + 50, 8 + 50)) == center


def test_sheets_show_every_kind(tmp_path):
    paint(tmp_path / "a.png", 3)
    image = {"path": str(tmp_path / "a.png"), "bytes": None}
    place = {"type": "image", "text": None}
    records = [
        {"id": "a", "images": [image], "caption": "words"},
        {"id": "b", "images": [image] * 6, "document": [place] * 6 + [{"type": "text", "text": "x" * 300}]},
        {"id": "c", "images": [], "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"id": "d", "images": [image], "label": 3},
        {"id": "e", "images": [image]},
    ]
    cells = [Cell.of(record, None) for record in records]
    assert [cell.more for cell in cells] == [0, 2, 0, 0, 0]
    assert [cell.text for cell in cells][::2] == ["a  words", "c  Q: hi", "e  "] and cells[3].text == "d  label 3"
    assert contact_sheet(cells).width == 4 * 268 + 8
    with pytest.raises(ValueError, match="no records"):
        contact_sheet([])


class Monospaced:
    def getlength(self, text):
        return len(text)


@settings(max_examples=50, deadline=None)
@given(st.text("abc \n", max_size=80), st.integers(4, 12), st.integers(0, 6))
def test_wrapped_lines_fit(text, width, most):
    lines = _wrapped(text, Monospaced(), width, most)
    assert len(lines) <= most and all(len(line) <= width for line in lines)
    if len(lines) < most:
        assert "".join("".join(lines).split()) == "".join(text.split())


# ---------------------------------------------------------------------- command line


def run(*arguments):
    return CliRunner().invoke(cli.app, ["data", *map(str, arguments)])


def test_command_check(good, tmp_path):
    path = saved(good, tmp_path)
    done = run("check", "llava", path, "--sheet", tmp_path / "sheet.png", "--cells", 4)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "fit for training"
    assert Image.open(tmp_path / "sheet.png").width == 4 * 268 + 8
    assert sorted(file.name for file in tmp_path.glob(".*")) == []
    spoil_broken(good, tmp_path)
    done = run("check", "llava", saved(good, tmp_path), "--json", "--streaming")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and not found["ok"] and found["findings"]["broken"]["count"] == 1
    assert found["findings"]["broken"]["examples"][0]["file"].endswith("3.png")
    assert run("check", "llava", path, "--max-broken", 1).exit_code == 0
    assert run("check", "llava", path, "--sample", 1, "--seed", 0).exit_code == 0


def test_command_check_counts_tokens(good, tmp_path):
    model, processor = tiny_model("qformer")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    found = json.loads(run("check", "llava", saved(good, tmp_path), "--model", tmp_path / "model", "--json").stdout)
    assert found["window"] == 512 and found["answer_unit"] == "tokens" and found["tokens"][-1] <= 512
    done = run("check", "llava", saved(good, tmp_path), "--model", tmp_path / "model", "--max-length", 4)
    assert done.exit_code == 1 and "images that alone fill the context window" in done.stdout


def test_command_show(good, tmp_path):
    (tmp_path / "photos").mkdir()
    done = run("show", "llava", saved(good, tmp_path), "-n", 2, "--skip", 1, "--set", f"images={tmp_path}/photos")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["id"] for record in records] == ["id1", "id2"]
    assert records[0]["images"][0]["path"] == f"{tmp_path}/photos/1.png"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["laion", "x"], 2, "SOURCE is 'laion'; expected one of llava"),
        (["llava", "nowhere.json"], 1, "llava: nowhere.json: no such file or folder."),
        (["llava", "x.json", "--set", "images"], 2, "--set images: expected KEY=VALUE"),
        (["llava", "x.json", "--set", "images={"], 2, "--set images={"),
        (["llava", "x.json", "--set", "folder=a"], 1, "unexpected keyword argument 'folder'"),
        (["llava", "x.json", "--sheet", "sheet.doc"], 2, "--sheet sheet.doc: expected a picture's name"),
        (["llava", "good.json", "--model", "./nowhere"], 1, "cannot load './nowhere'"),
    ],
)
def test_command_refuses(arguments, exit_code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text("[3]")
    (tmp_path / "good.json").write_text(json.dumps([conversation(0)]))
    done = run("check", *arguments)
    assert done.exit_code == exit_code and message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_command_names_a_wrong_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text("[3]")
    done = run("check", "llava", "x.json", "--json")
    assert done.exit_code == 1 and "row 0 is a int; expected an object" in done.stdout


def test_families_are_all_here():
    assert set(FAMILIES) == set(vlbridge.FAMILIES)
