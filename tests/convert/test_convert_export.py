"""The way out: official and native layouts come back bit by bit, and the exported models speak without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_image, tiny_model, tiny_stage1
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import vlbridge
from vlbridge.cli import app
from vlbridge.convert import (
    ConversionError,
    convert_blip,
    convert_blip2,
    convert_llava,
    convert_openflamingo,
    export,
)
from vlbridge.convert.convert_certificate import CERTIFICATE, card_section, file_sha256
from vlbridge.convert.convert_files import TensorFiles
from vlbridge.convert.convert_llava import open_checkpoint
from vlbridge.convert.convert_openflamingo import usual_names
from vlbridge.convert.convert_parts import Renamed


CASES = Path(__file__).parents[1] / "parity" / "cases"
NEW_TOKENS = 6


def pytest_generate_tests(metafunc):
    """Every official case; those of the tests below that go by `native_case` need a class of transformers for it."""
    root = Path(metafunc.config.getoption("--parity-root") or CASES)
    found = [path.parent for path in sorted(root.glob("*/*/meta.json"))]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", found, ids=lambda path: f"{path.parent.name}-{path.name}", scope="module")


def convert(case: Path, output: Path) -> None:
    """The case's checkpoint as a model of ours."""
    meta = json.loads((case / "meta.json").read_text())
    sizes = meta["config"] if isinstance(meta.get("config"), dict) else {}
    family = case.parent.name
    if family == "openflamingo":
        clip = sizes["clip"]
        vision = {
            "num_attention_heads": clip["vision_cfg"]["width"] // clip["vision_cfg"]["head_width"],
            "hidden_act": "quick_gelu" if clip["quick_gelu"] else "gelu",
        }
        convert_openflamingo(
            case / "checkpoint.pt", case / "clip_open_clip.pt", case / "base_lm", output,
            tokenizer=case / "tokenizer_base", config={"vision_config": vision},
        )  # fmt: skip
    elif family == "blip2":
        convert_blip2(
            case / "checkpoint.pth", case / "vit.pth", case / "llm" if (case / "llm").is_dir() else None,
            output=output, qformer_tokenizer=case / "bert-base-uncased",
            config={"vision_config": {"num_attention_heads": sizes["vit_heads"]},
                    "qformer_config": {"num_attention_heads": sizes["q_heads"]}},
        )  # fmt: skip
    elif family == "llava":
        language = case / "base_llm" if meta["checkpoint_layout"] == "lora" else None
        convert_llava(case / "checkpoint", case / "clip_vision_tower", language, output=output)
    else:
        heads = {"vision_config": {"num_attention_heads": sizes["vit_heads"]},
                 "text_config": {"num_attention_heads": sizes["q_heads"]}}  # fmt: skip
        convert_blip(case / "caption.pth", output, tokenizer=case / "bert-base-uncased", config=heads)


@pytest.fixture(scope="module")
def ours(case, tmp_path_factory) -> Path:
    if list(case.rglob("*.model")):
        pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece files by it")
    output = tmp_path_factory.mktemp("ours") / case.name
    convert(case, output)
    return output


def same_tensors(one, other) -> None:
    assert one.shapes.keys() == other.shapes.keys()
    for name in one.shapes:
        assert one.dtypes[name] == other.dtypes[name], name
        assert torch.equal(one.read(name), other.read(name)), name


# ---------------------------------------------------------------------- there and back


def official_of(case: Path):
    """The official tensors under the names that today's releases have, and what does not come back, with the reason."""
    family = case.parent.name
    if family == "llava":
        return open_checkpoint(case / "checkpoint").files
    files = TensorFiles(
        case / {"openflamingo": "checkpoint.pt", "blip2": "checkpoint.pth", "blip": "caption.pth"}[family]
    )
    if family == "openflamingo":  # training writes `module.` in front
        return Renamed(files, usual_names(files.shapes, "transformer.blocks"))
    return files


def test_official_layouts_come_back(case, ours, tmp_path):
    """Bit by bit, names and dtypes included, but for buffers, which models compute by themselves."""
    done = export(ours, tmp_path / "official", to="official")
    back = TensorFiles(tmp_path / "official" / "checkpoint.pt" if (tmp_path / "official" / "checkpoint.pt").exists()
                       else tmp_path / "official" / "checkpoint.pth" if case.parent.name != "llava"
                       else tmp_path / "official")  # fmt: skip
    if case.name == "v15_lora":  # merged into its language model, it is a whole checkpoint
        convert_llava(tmp_path / "official", case / "clip_vision_tower", output=tmp_path / "again")
        same_tensors(TensorFiles(ours), TensorFiles(tmp_path / "again"))
        return
    official = official_of(case)
    gone = official.shapes.keys() - back.shapes.keys()
    reasons = {} if case.parent.name == "blip" else json.loads((ours / CERTIFICATE).read_text())["left_out"]
    if case.parent.name == "blip":
        reasons = dict.fromkeys(
            ["text_decoder.bert.embeddings.position_ids"], "a buffer that the model computes by itself"
        )
    assert {reasons[name] for name in gone} <= {"a buffer that the model computes by itself"}
    same_tensors(Renamed(official, {name: name for name in official.shapes if name not in gone}), back)
    check = json.loads((tmp_path / "official" / CERTIFICATE).read_text())["checks"][0]
    assert check["largest_difference"] == 0.0 and done.pieces


def exported(ours: Path, output: Path) -> Path | None:
    """In transformers' class, or `None` where it says that there is none."""
    try:
        export(ours, output)
    except ConversionError as error:
        assert "What can be done" in str(error)
        assert not output.exists()
        return None
    return output


@pytest.fixture(scope="module")
def native(case, ours, tmp_path_factory) -> Path:
    if case.parent.name == "blip":
        pytest.skip("BLIP is converted to transformers' classes to begin with")
    found = exported(ours, tmp_path_factory.mktemp("native") / case.name)
    if found is None:
        assert case.parent.name == "openflamingo" or case.name in ("stage1_clipL", "v1_linear")
        pytest.skip("transformers has no class for it, and export says so")
    return found


def test_native_layouts_come_back(case, native, tmp_path):
    """Native, ours, native: tensors bit by bit, and configurations."""
    if case.parent.name == "llava":
        convert_llava(native, output=tmp_path / "ours")
    else:
        convert_blip2(native, output=tmp_path / "ours")
    certificate = json.loads((tmp_path / "ours" / CERTIFICATE).read_text())
    assert certificate["from"] == "transformers"
    for check in certificate["checks"]:
        assert check.get("equal", True) and check.get("largest_difference", 0) <= 0.02, check
    export(tmp_path / "ours", tmp_path / "native")
    same_tensors(TensorFiles(native), TensorFiles(tmp_path / "native"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (native, tmp_path / "native"))
    assert before == after


# ---------------------------------------------------------------------- without this package

ALONE = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vlbridge":
            raise ImportError("vlbridge is not here")

sys.meta_path.insert(0, Blocker())
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
folder, image, prompt, new_tokens = sys.argv[1], Image.open(sys.argv[2]), sys.argv[3], int(sys.argv[4])
model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(images=image, text=prompt, return_tensors="pt")
settings = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0)
ids = model.generate(**inputs, **settings)
start = 0 if model.config.text_config.is_encoder_decoder else inputs["input_ids"].shape[1]
pipe = pipeline("image-text-to-text", model=folder)
said = pipe(images=image, text=prompt, generate_kwargs=settings, return_full_text=False)
chat = None
if processor.chat_template:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    chat = pipe(text=[{"role": "user", "content": content}], generate_kwargs=settings, return_full_text=False)[0]["generated_text"]
assert "vlbridge" not in sys.modules
print(json.dumps({"class": type(model).__name__, "ids": ids[0, start:].tolist(), "said": said[0]["generated_text"],
                  "decoded": processor.decode(ids[0, start:], skip_special_tokens=True), "chat": chat}))
"""


def test_exported_models_speak_without_this_package(case, ours, native, tmp_path):
    """The same tokens through the Auto classes, and the same text through the pipeline."""
    if case.name.startswith("stage1"):
        pytest.skip("retrieval models write nothing; their scores are compared below")
    image = tiny_image(3, (48, 33))
    image.save(tmp_path / "image.png")
    model, processor = AutoModel.from_pretrained(ours), AutoProcessor.from_pretrained(ours)
    llava = case.parent.name == "llava"
    prompt = "<image>\nWhat is it?" if llava else "a photo of"
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1,
                "repetition_penalty": 1.0}  # fmt: skip
    theirs = AutoProcessor.from_pretrained(native)
    inputs = processor(images=[image], text=[prompt if llava else "<image>" + prompt], return_tensors="pt")
    # pictures are rounded differently, by up to a grey level or two: the same pixels for both
    other = theirs(images=[image], text=[prompt], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], other["input_ids"])
    torch.testing.assert_close(
        inputs["pixel_values"], other["pixel_values"].reshape(inputs["pixel_values"].shape), atol=0.03, rtol=0
    )
    inputs["pixel_values"] = other["pixel_values"].reshape(inputs["pixel_values"].shape)
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, **settings)[0, start:].tolist()
    (tmp_path / "alone.py").write_text(ALONE)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "alone.py"), str(native), str(tmp_path / "image.png"), prompt,
         str(NEW_TOKENS)], capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["ids"] == expected
    assert found["said"].strip() == found["decoded"].strip()
    assert (found["chat"] is not None) == llava
    certificate = json.loads((native / CERTIFICATE).read_text())
    assert certificate["to"].endswith(found["class"])
    tokens = next(check for check in certificate["checks"] if check["what"] == "greedy tokens")
    assert tokens["equal"]


def test_certificates_hold(case, ours, native):
    """What they say of files is true, and nothing of this machine is in them."""
    for folder in (ours, native):
        text = (folder / CERTIFICATE).read_text()
        assert str(folder.parent) not in text and str(case.parent) not in text
        certificate = json.loads(text)
        for name, about in certificate["outputs"].items():
            assert file_sha256(folder / name) == about["sha256"]
        inputs = [about for files in certificate["inputs"].values() for about in files.values()]
        assert inputs and all(len(about["sha256"]) == 64 for about in inputs)
        files = TensorFiles(folder)
        assert {name: tuple(about["shape"]) for name, about in certificate["tensors"].items()} == files.shapes
        assert certificate["versions"]["vlbridge"] == vlbridge.__version__
    assert card_section(json.loads((native / CERTIFICATE).read_text())) in (native / "README.md").read_text()
