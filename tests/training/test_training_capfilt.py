"""CapFilt: what is read, drawn, scored and kept; going on after a kill; and the command."""

from __future__ import annotations

import csv
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import SMALL, bert_like_tokenizer, clip_image_processor, spread_weights, tiny_image, tiny_model, tiny_stage1
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
)
from typer.testing import CliRunner

from vlbridge import cli
from vlbridge.row_files import RowFiles
from vlbridge.training import training_capfilt_models
from vlbridge.training.training_capfilt import (
    BlipMatcher,
    Sample,
    SeededSampling,
    Settings,
    capfilt,
    generator_of,
    load_captioner,
    load_matcher,
    load_models,
    read_samples,
    settings_for,
)


CAPTIONS = {
    "one.png": ["w1 w2 w3", "w4 w5"],
    "two.png": ["w6"],
    "more/three.png": ["w7 w8 w9 w10"],
    "four.png": [],
    "five.png": ["w3 w3 w3", "w11"],
}
ROWS = [(image, caption) for image, captions in CAPTIONS.items() for caption in captions or [""]]


def tiny_blip(folder: Path, cls) -> Path:
    """A random BLIP whose tokenizer knows `[DEC]` and `[ENC]`, as converted ones do."""
    tokenizer = bert_like_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"extra_special_tokens": ["[ENC]"]})
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 40}
    text |= {"bos_token_id": tokenizer.bos_token_id, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        vision_config={**SMALL, "image_size": 30, "patch_size": 6}, text_config={**SMALL, **text},
        image_text_hidden_size=16,
    )  # fmt: skip
    model = cls(config)
    spread_weights(model)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 30, "width": 30}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of every kind of captioner and filter."""
    root = tmp_path_factory.mktemp("models")
    for name, (model, processor) in {
        "stage1": tiny_stage1(image_processor=clip_image_processor()),
        "opt": tiny_model("qformer", "opt"),
        "t5": tiny_model("mlp", "t5"),
    }.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    tiny_blip(root / "blip", BlipForConditionalGeneration)
    tiny_blip(root / "blip_itm", BlipForImageTextRetrieval)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture
def data(tmp_path) -> Path:
    """A data set of five pictures, and `pairs.json` beside them."""
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(CAPTIONS):
        tiny_image(seed).save(folder / name)
    rows = [{"image": image, "caption": caption} for image, caption in ROWS]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------- reading


def write_table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("image", "caption"), *ROWS])


def write_lines(path: Path, image: str = "file_name", caption: str = "text") -> None:
    path.write_text("".join(json.dumps({image: name, caption: text}) + "\n\n" for name, text in ROWS))


def write_coco(path: Path) -> None:
    ids = {image: 7 * number for number, image in enumerate(CAPTIONS)}
    annotations = [{"id": k, "image_id": ids[name], "caption": text} for k, (name, text) in enumerate(ROWS) if text]
    images = [{"id": number, "file_name": name} for name, number in ids.items()]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "info": {}}))


WRITERS = {
    "pairs.json": lambda path: path.write_text(json.dumps([{"image": a, "caption": b} for a, b in ROWS])),
    "lists.json": lambda path: path.write_text(json.dumps([{"image": a, "captions": b} for a, b in CAPTIONS.items()])),
    "pairs.jsonl": write_lines,
    "pairs.csv": partial(write_table, delimiter=","),
    "pairs.tsv": partial(write_table, delimiter="\t"),
    "captions_train2017.json": write_coco,
}


@pytest.mark.parametrize("name", WRITERS)
def test_forms_of_data(name, tmp_path):
    WRITERS[name](tmp_path / name)
    expected = [Sample(image, tmp_path / image, captions) for image, captions in CAPTIONS.items()]
    assert read_samples(tmp_path / name) == expected
    elsewhere = read_samples(tmp_path / name, "/pictures")
    assert [sample.path for sample in elsewhere] == [Path("/pictures") / image for image in CAPTIONS]


@pytest.mark.parametrize(("name", "write"), [("metadata.jsonl", write_lines), ("metadata.csv", WRITERS["pairs.csv"])])
def test_folder_with_metadata(name, write, tmp_path):
    write(tmp_path / name)
    assert {sample.image: sample.captions for sample in read_samples(tmp_path)} == CAPTIONS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"image": "a.png"}]', "row 0 has image; expected an image .* and its caption"),
        ("a.json", '[{"caption": "a"}]', "row 0 has caption; expected an image"),
        ("a.json", '[{"image": "a.png", "caption": 3}]', "caption is 3; expected a text"),
        ("a.json", '["a.png"]', "row 0 is a str; expected an object"),
        ("a.json", "[]", "has no image-text pairs"),
        ("a.json", "{]", "a.json is no JSON"),
        ("a.json", '{"data": []}', "expected a list of rows, or COCO's"),
        ("a.json", '{"images": [], "annotations": [{"image_id": 4, "caption": "a"}]}', "annotation 0 is of image 4"),
        ("a.jsonl", '{"image": "a.png", "caption": "a"}\n{"image"', "line 2 is no JSON"),
        ("a.csv", "picture,caption\na.png,b\n", "row 1 has picture, caption; expected an image"),
        ("a.txt", "", "expected .json, .jsonl, .ndjson, .csv, .tsv, .parquet, or a folder"),
    ],
)
def test_what_is_no_data(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / name)


def test_whitespace_and_repeated_captions(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "caption": [" a\n b", "a b", " ", None, "c"]}]))
    assert read_samples(tmp_path / "a.json")[0].captions == ["a b", "c"]


# ---------------------------------------------------------------------- captions


def test_draws_are_from_the_nucleus():
    scores = torch.tensor([2.0, 1.0, 0.5, -1.0, -6.0, -torch.inf])
    probabilities = scores.softmax(dim=0)  # 0.61, 0.23, 0.14, 0.03, 0, 0: the first three reach 0.9
    expected = torch.where(torch.arange(6) < 3, probabilities, 0.0) / probabilities[:3].sum()
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    sampling = SeededSampling(0.9, generators)
    ids = torch.zeros(4, 1, dtype=torch.long)
    drawn = torch.cat([sampling(ids, scores.expand(4, -1)).argmax(dim=-1) for _ in range(1000)])
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    torch.testing.assert_close(shares, expected, atol=0.025, rtol=0)  # three standard deviations of 4000 draws
    assert not shares[3:].any()


@pytest.mark.parametrize("name", ["stage1", "blip", "opt", "t5"])
def test_an_images_caption_is_its_own_affair(models, name):
    """Whatever is in the batch; and another seed, image name or number gives another caption."""
    captioner = load_captioner(models[name], dtype="float32")
    images = [tiny_image(seed) for seed in range(4)]
    samples = [Sample(f"{number}.png", Path(), []) for number in range(4)]

    def captions(rows, seed=0, index=0):
        generators = [generator_of(samples[row], seed, index) for row in rows]
        return captioner([images[row] for row in rows], generators, max_new_tokens=12, top_p=0.9)

    together = captions(range(4))
    assert together == [captions([row])[0] for row in range(4)]
    assert [*captions([3, 1])] == [together[3], together[1]]
    assert len(set(together)) == 4 and all(together)
    for other in (captions(range(4), seed=1), captions(range(4), index=1)):
        assert all(a != b for a, b in zip(together, other))


@torch.no_grad()
@pytest.mark.parametrize("name", ["stage1", "blip"])
def test_captions_are_the_slow_loop(models, name):
    """Token by token, from the model's own logits of the whole text, nothing cached."""
    captioner = load_captioner(models[name], prompt="w1 w2", dtype="float32")
    model, tokenizer, image = captioner.model, captioner.processor.tokenizer, tiny_image(5)
    pixel_values = captioner.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("w1 w2", add_special_tokens=False)["input_ids"]]])
    begun, generator = ids.shape[1], torch.Generator().manual_seed(9)
    for _ in range(6):
        if name == "blip":
            logits = model(pixel_values=pixel_values, input_ids=ids).logits[:, -1]
        else:
            normed = model.bridge.vision_layer_norm(model.get_patch_features(pixel_values))
            logits = model.bridge.lm_head(model.bridge.qformer(normed, ids, None, "itg")[:, -1])
            logits[:, 3] = -torch.inf  # its generation settings: not before the tenth token
        ids = torch.cat((ids, SeededSampling(0.9, [generator])(ids, logits).argmax(dim=-1)[:, None]), dim=1)
        if ids[0, -1] == 3:
            break
    expected = tokenizer.decode(ids[0, begun:], skip_special_tokens=True)
    found = captioner([image], [torch.Generator().manual_seed(9)], max_new_tokens=6, top_p=0.9)
    assert found == [expected] and expected


def test_captioner_without_a_chat_template(models):
    model, processor = tiny_model("mlp")
    processor.chat_template = None
    with pytest.raises(ValueError, match="can't serve as captioner: its processor has no chat template"):
        training_capfilt_models.Captioner(model, processor)


# ---------------------------------------------------------------------- scores


@torch.no_grad()
@pytest.mark.parametrize("name", ["stage1", "blip_itm"])
def test_scores_are_the_models_own(models, name):
    """Each pair alone, through the model's own `forward`, whatever batch it was scored in."""
    matcher = load_matcher(models[name], dtype="float32")
    images = [tiny_image(seed) for seed in range(3)]
    texts = [["w1 w2 w3", "w4"], [], ["w5 w6 w7 w8 w9", "w1", "w2 w2"]]
    found = matcher(images, texts, batch_size=2)
    assert [len(scores) for scores in found] == [2, 0, 3]
    model, processor = matcher.model, matcher.processor
    for image, own, scores in zip(images, texts, found):
        for text, score in zip(own, scores):
            inputs = processor(images=[image], text=[text], return_tensors="pt")
            inputs.pop("token_type_ids", None)
            if name == "blip_itm":
                inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")
                logits = model(**inputs).itm_score
            else:
                logits = model(**inputs, use_image_text_matching_head=True).itm_logits
            assert score == pytest.approx(float(logits.softmax(dim=-1)[0, 1]), abs=1e-5)
    assert len({round(score, 4) for scores in found for score in scores}) == 5


def test_long_texts_are_cut_off(models):
    for name, longest in (("stage1", 32), ("blip_itm", 35)):
        matcher = load_matcher(models[name], dtype="float32")
        assert matcher.tokenize(["w1 " * 100])["input_ids"].shape == (1, longest)


def test_enc_token_of_checkpoints_from_the_hub():
    """Their tokenizers are BERT's own; the model's last two rows are `[DEC]` and `[ENC]`."""

    def matcher(vocab_size: int) -> BlipMatcher:
        text = {**SMALL, "vocab_size": vocab_size, "encoder_hidden_size": 32, "max_position_embeddings": 40}
        config = BlipConfig(vision_config={**SMALL, "image_size": 30, "patch_size": 6}, text_config=text)
        with torch.device("meta"):
            model = BlipForImageTextRetrieval(config)
        return BlipMatcher(model, BlipProcessor(BlipImageProcessor(), bert_like_tokenizer()))

    known = len(bert_like_tokenizer())
    assert matcher(known + 2).tokenize(["w1"])["input_ids"].tolist()[0][0] == known + 1
    assert matcher(known).tokenize(["w1"])["input_ids"].tolist()[0][0] == 2  # there is no [ENC]
    with pytest.raises(ValueError, match=rf"knows {known + 15} tokens, its tokenizer {known} without \[ENC\]"):
        matcher(known + 15)


def test_what_is_no_filter(models):
    with pytest.raises(ValueError, match="is a 'qformer_blip2' model, which can't serve as filter"):
        load_matcher(models["opt"])
    with pytest.raises(ValueError, match="has no image-text matching head: .* tensors are missing"):
        load_matcher(models["blip"])


def test_scores_that_are_not_finite(models):
    matcher = load_matcher(models["stage1"], dtype="float32")
    matcher.model.bridge.itm_head.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite in torch.float32; try another dtype"):
        matcher([tiny_image()], [["w1"]], 1)


# ---------------------------------------------------------------------- the whole


def settings(models, **changes) -> Settings:
    return Settings(
        **{"captioner": str(models["stage1"]), "filter": str(models["stage1"]), "max_new_tokens": 6, **changes}
    )


def counting(monkeypatch) -> list[int]:
    """Numbers of images that captioners see."""
    seen, call = [], training_capfilt_models.Captioner.__call__

    def counted(self, images, *args, **kwargs):
        seen.append(len(images))
        return call(self, images, *args, **kwargs)

    monkeypatch.setattr(training_capfilt_models.Captioner, "__call__", counted)
    return seen


@pytest.mark.core
@pytest.mark.parametrize("captioner", ["stage1", "blip", "opt"])
def test_what_is_written(models, data, captioner, tmp_path):
    chosen = settings(models, captioner=str(models[captioner]), filter=str(models["blip_itm"]), num_captions=2)
    samples = read_samples(data)
    summary = capfilt(samples, tmp_path / "out", chosen, batch_size=2)
    scored = lines(tmp_path / "out" / "scores.jsonl")
    assert [record["image"] for record in scored] == list(CAPTIONS)
    for record in scored:
        sources = {
            source: [c["text"] for c in record["captions"] if c["source"] == source] for source in ("web", "synthetic")
        }
        assert sources["web"] == CAPTIONS[record["image"]] and len(sources["synthetic"]) == 2
    every = [(record["image"], c["text"], c["source"], c["itm_score"]) for record in scored for c in record["captions"]]
    threshold = sorted(score for *_, score in every if score is not None)[4]
    summary = capfilt(samples, tmp_path / "out", chosen, threshold=threshold, load=None)
    kept = lines(tmp_path / "out" / "metadata.jsonl")
    expected = [row for row in every if row[3] is not None and row[3] >= threshold]
    assert 0 < len(expected) < len(every)
    assert [(row["file_name"], row["text"], row["source"], row["itm_score"]) for row in kept] == [
        (f"images/{image}", *rest) for image, *rest in expected
    ]
    for source in ("web", "synthetic"):
        counts = {"captions": sum(row[2] == source for row in every), "kept": sum(row[2] == source for row in expected)}
        assert summary[source] == counts
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    for row in kept:
        picture = tmp_path / "out" / row["file_name"]
        assert picture.read_bytes() == (data.parent / row["file_name"].removeprefix("images/")).read_bytes()
    names = {"images", "metadata.jsonl", "options.json", "scores.jsonl", "summary.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names  # nothing temporary is left


def test_result_does_not_depend_on_the_batch(models, data, tmp_path):
    texts, scores = [], []
    for batch_size in (1, 2, 8):
        capfilt(read_samples(data), tmp_path / str(batch_size), settings(models), batch_size=batch_size)
        records = lines(tmp_path / str(batch_size) / "scores.jsonl")
        texts.append([(r["image"], [c["text"] for c in r["captions"]]) for r in records])
        scores.append(torch.tensor([c["itm_score"] for r in records for c in r["captions"]]))
        torch.testing.assert_close(scores[-1], scores[0], atol=1e-5, rtol=0)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("at", [0.0, 0.3, 0.5, 0.8, 1.0], ids=lambda at: f"{at:.0%}")
def test_killed_and_gone_on(models, data, at, tmp_path, monkeypatch):
    """Killed at any byte, a run ends with what it would have ended with, and computes no finished image again."""
    samples, out = read_samples(data), tmp_path / "out"
    capfilt(samples, out, settings(models), batch_size=1)
    whole = {name: (out / name).read_bytes() for name in ("scores.jsonl", "metadata.jsonl", "summary.json")}
    finished = whole["scores.jsonl"][: int(at * len(whole["scores.jsonl"]))]
    (out / "scores.jsonl").write_bytes(finished)
    for name in ("metadata.jsonl", "summary.json"):
        (out / name).unlink()
    seen = counting(monkeypatch)
    capfilt(samples, out, settings(models), batch_size=1)
    assert sum(seen) == len(CAPTIONS) - finished.count(b"\n")
    assert {name: (out / name).read_bytes() for name in whole} == whole


def test_interrupted_between_batches(models, data, tmp_path, monkeypatch):
    samples, out = read_samples(data), tmp_path / "out"
    seen, call = [], training_capfilt_models.Matcher.__call__

    def interrupted(self, images, *args):
        seen.append(len(images))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return call(self, images, *args)

    monkeypatch.setattr(training_capfilt_models.Matcher, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capfilt(samples, out, settings(models), batch_size=2)
    assert len(list(RowFiles(out / "parts").rows())) == 2 and not (out / "metadata.jsonl").exists()
    capfilt(samples, out, settings(models), batch_size=2)
    assert seen == [2, 2, 2, 1]
    assert len(lines(out / "scores.jsonl")) == len(CAPTIONS)


def test_shared_by_processes(models, data, tmp_path, monkeypatch):
    """Two shards of one run, the second while the first has failed on a picture, give what one process gives."""
    samples = read_samples(data)
    samples[0].path.write_bytes(b"no picture")
    whole = capfilt(samples, tmp_path / "whole", settings(models))
    seen = counting(monkeypatch)
    assert capfilt(samples, tmp_path / "out", settings(models), shard=(1, 2)) == {"images": 5, "left": 3}
    assert not (tmp_path / "out" / "metadata.jsonl").exists()
    assert capfilt(samples, tmp_path / "out", settings(models), shard=(2, 2)) == whole
    assert sum(seen) == 4
    for name in ("scores.jsonl", "metadata.jsonl", "summary.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert capfilt(samples, tmp_path / "out", settings(models)) == whole and sum(seen) == 4
    assert not (tmp_path / "out" / "parts").exists()


def test_damaged_scores(models, data, tmp_path):
    capfilt(read_samples(data), tmp_path, settings(models))
    good = (tmp_path / "scores.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scores.jsonl").write_text(good[0] + "{half\n" + good[1])
    with pytest.raises(ValueError, match="scores.jsonl, line 2 is damaged"):
        capfilt(read_samples(data), tmp_path, settings(models))


def test_grown_and_changed_data(models, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    samples = read_samples(data)
    capfilt(samples[:3], out, settings(models))
    samples[1].captions.append("w12")
    seen = counting(monkeypatch)
    summary = capfilt(samples, out, settings(models), threshold=0)
    assert sum(seen) == 3  # the changed one, and two new ones
    assert summary["web"] == {"captions": 7, "kept": 7} and summary["synthetic"] == {"captions": 5, "kept": 5}


def test_files_that_cannot_be_replaced_leave_nothing_temporary(models, data, tmp_path):
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(OSError):
        capfilt(read_samples(data), tmp_path, settings(models, captioner=None, num_captions=0))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_filter_only(models, data, tmp_path):
    chosen = settings(models, captioner=None, num_captions=0)
    summary = capfilt(read_samples(data), tmp_path, chosen, threshold=0)
    assert summary["synthetic"] == {"captions": 0, "kept": 0} and summary["web"]["kept"] == 6


def test_images_that_cannot_be_read(models, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (data.parent / "two.png").unlink()
    (data.parent / "four.png").write_bytes(b"no picture")
    summary = capfilt(read_samples(data), out, settings(models), batch_size=2)
    assert summary["failed"] == {
        "two.png": "no such file",
        "four.png": "not an image, or not in a format that Pillow can read",
    }
    records = {record["image"]: record for record in lines(out / "scores.jsonl")}
    assert records["two.png"] == {"image": "two.png", "error": "no such file"} and len(records) == 5
    shutil.copy(data.parent / "one.png", data.parent / "two.png")
    seen = counting(monkeypatch)
    summary = capfilt(read_samples(data), out, settings(models))
    assert list(summary["failed"]) == ["four.png"] and seen == [1]


def test_an_image_that_a_model_refuses_costs_no_other(models, data, tmp_path):
    def load(chosen, device):
        captioner, matcher = load_models(chosen, device)
        generate = captioner.generate
        refused = tiny_image(1).tobytes()

        def generate_unless(images, **options):
            if any(image.tobytes() == refused for image in images):
                raise ValueError("too  odd")
            return generate(images, **options)

        captioner.generate = generate_unless
        return captioner, matcher

    capfilt(read_samples(data), tmp_path / "plain", settings(models))
    summary = capfilt(read_samples(data), tmp_path / "out", settings(models), load=load)
    assert summary["failed"] == {"two.png": "too odd"}
    plain, found = (lines(tmp_path / name / "scores.jsonl") for name in ("plain", "out"))
    for expected, record in zip(plain, found):
        if record["image"] != "two.png":
            assert [c["text"] for c in record["captions"]] == [c["text"] for c in expected["captions"]]


def test_captioner_that_says_nothing(models, data, tmp_path):
    def load(chosen, device):
        captioner, matcher = load_models(chosen, device)
        captioner.generate = lambda images, **options: ["  "] * len(images)
        return captioner, matcher

    summary = capfilt(read_samples(data), tmp_path, settings(models), threshold=0, load=load)
    assert summary["synthetic"] == {"captions": 5, "kept": 0} and summary["web"]["kept"] == 6
    assert lines(tmp_path / "scores.jsonl")[0]["captions"][-1] == {
        "itm_score": None,
        "text": "",
        "source": "synthetic",
    }


def test_images_inside_the_output_need_no_link(models, data):
    capfilt(read_samples(data), data.parent, settings(models), threshold=0)
    kept = lines(data.parent / "metadata.jsonl")
    assert {row["file_name"] for row in kept} == set(CAPTIONS)
    assert not (data.parent / "images").exists()


def test_copies_where_links_cannot_be_made(models, data, tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    capfilt(read_samples(data), tmp_path / "out", settings(models), threshold=0)
    for name in CAPTIONS:
        copy = tmp_path / "out" / "images" / name
        assert not copy.is_symlink() and copy.read_bytes() == (data.parent / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_captions": -1}, "num_captions is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; expected more than 0"),
        ({"filter": None}, "The filter is missing"),
        ({"captioner": None}, "The captioner is missing"),
    ],
    ids=str,
)
def test_settings_refuse(models, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(models, **changes)


def test_going_on_with_other_settings_is_refused(models, data, tmp_path):
    capfilt(read_samples(data)[:1], tmp_path, settings(models, seed=4))
    assert settings_for(tmp_path) == settings(models, seed=4)  # as it began
    assert settings_for(tmp_path, seed=4, captioner=os.path.relpath(models["stage1"])) == settings(models, seed=4)
    with pytest.raises(ValueError, match=r"was started with seed 4 \(now 0\), num_captions 1 \(now 2\)"):
        settings_for(tmp_path, seed=0, num_captions=2)
    (tmp_path / "options.json").write_text('{"beams": 3}')
    with pytest.raises(ValueError, match="has beams: it was written by another version"):
        settings_for(tmp_path)


# ---------------------------------------------------------------------- the command


def run(*arguments):
    return CliRunner().invoke(cli.app, ["capfilt", *map(str, arguments)])


def test_command(models, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin = (data, "--captioner", models["blip"], "--filter", models["stage1"], "--output", out, "--device", "cpu")
    result = run(*begin, "--max-new-tokens", 5, "--batch-size", 2, "--threshold", 0)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "web: 6 of 6 captions kept\nsynthetic: 5 of 5 captions kept\n"
    assert "5/5" in result.stderr
    assert json.loads((out / "options.json").read_text())["max_new_tokens"] == 5

    monkeypatch.setattr(training_capfilt_models, "load_captioner", None)  # another threshold needs no model
    monkeypatch.setattr(training_capfilt_models, "load_matcher", None)
    result = run(data, "--output", out, "--threshold", 1)
    assert (result.exit_code, result.stdout) == (0, "web: 0 of 6 captions kept\nsynthetic: 0 of 5 captions kept\n")
    assert (out / "metadata.jsonl").read_text() == ""

    result = run(*begin, "--seed", 3, "--max-new-tokens", 7)
    assert result.exit_code == 1
    assert "was started with" in result.stderr and "max_new_tokens 5 (now 7)" in result.stderr


def test_command_reports_images_that_cannot_be_read(models, data, tmp_path):
    (data.parent / "one.png").unlink()
    stage1 = models["stage1"]
    result = run(data, "--captioner", stage1, "--filter", stage1, "--output", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 1
    assert "vlbridge: error: one.png: no such file" in result.stderr
    assert "1 of 5 images could not be read" in result.stderr and "web: " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "{stage1}"], "The captioner is missing"),
        (["--captioner", "{stage1}"], "The filter is missing"),
        (["--captioner", "{stage1}", "--filter", "{opt}"], "which can't serve as filter"),
        (["--captioner", "./nowhere", "--filter", "{stage1}"], "cannot load './nowhere': no such folder"),
        (["--captioner", "{stage1}", "--filter", "{stage1}", "--top-p", "2"], "top_p is 2.0"),
    ],
    ids=str,
)
def test_command_refuses(models, data, arguments, message, tmp_path):
    names = {name: str(folder) for name, folder in models.items()}
    result = run(data, "--output", tmp_path / "out", "--device", "cpu", *(a.format(**names) for a in arguments))
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
