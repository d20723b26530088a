"""Export: official and native layouts come back bit by bit, and exported models run without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_image, tiny_model, tiny_stage1
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import vlbridge
from vlbridge.certificate import CERTIFICATE, card_section
from vlbridge.cli import app
from vlbridge.convert import (
    ConversionError,
    convert_blip,
    convert_blip2,
    convert_llava,
    convert_openflamingo,
    export,
)
from vlbridge.convert.convert_files import TensorFiles
from vlbridge.convert.convert_llava_checkpoint import open_checkpoint
from vlbridge.convert.convert_openflamingo import usual_names
from vlbridge.convert.convert_sources import Renamed
from vlbridge.convert.convert_tables import BUFFER
from vlbridge.files import sha256_of


CASES = Path(__file__).parents[1] / "parity" / "cases"
NEW_TOKENS = 6


def has_native_class(case: Path) -> bool:
    """BLIP is in transformers' classes anyway; Flamingo, CLIP with a Q-Former and a linear projector have none."""
    return case.parent.name in ("blip2", "llava") and case.name not in ("stage1_clipL", "v1_linear")


def pytest_generate_tests(metafunc):
    """Each official case that the test applies to."""
    if "case" not in metafunc.fixturenames:
        return
    root = Path(metafunc.config.getoption("--parity-root") or CASES)
    found = [path.parent for path in sorted(root.glob("*/*/meta.json"))]
    assert found, f"no cases in {root}"
    if "native" in metafunc.fixturenames:
        found = [case for case in found if has_native_class(case)]
    if "generates" in metafunc.function.__name__:
        found = [case for case in found if not case.name.startswith("stage1")]
    if "refused" in metafunc.function.__name__:
        found = [case for case in found if case.parent.name != "blip" and not has_native_class(case)]
    metafunc.parametrize("case", found, ids=lambda path: f"{path.parent.name}-{path.name}", scope="module")


def convert(case: Path, output: Path) -> None:
    """The case's checkpoint, converted to a model of vlbridge."""
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


# ---------------------------------------------------------------------- pixels

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
# torchvision's differ on some of them by more than one grey level
SIZES = [(33, 40), (40, 33), (57, 23), (61, 61), (71, 64), (90, 11), (28, 31)]


def reference(image: Image.Image, side: int, family: str) -> np.ndarray:
    """Normalised pixels, `(3, height, width)`.

    open_clip's transforms for OpenFlamingo and CLIP's image processor of transformers 4 for LLaVA: the shortest side,
    and a crop that rounds half a pixel to the even one, or down. LAVIS squeezes the whole picture.
    """
    if family in ("llava", "openflamingo"):
        short = min(image.size)
        image = image.resize(
            [side if length == short else int(side * length / short) for length in image.size],
            Image.Resampling.BICUBIC,
        )
        left, top = (
            int(round((length - side) / 2.0)) if family == "openflamingo" else (length - side) // 2
            for length in image.size
        )
        image = image.crop((left, top, left + side, top + side))
    else:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.core
def test_pixels_of_converted_processors(case, ours):
    """Through the loaded processor, as Pillow resizes; of LLaVA the image processor, tiles are checked elsewhere."""
    family = case.parent.name
    # BLIP is in transformers' own class, which has to be told
    processor = AutoProcessor.from_pretrained(ours, **({"backend": "pil"} if family == "blip" else {}))
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        placeholder = "" if family == "blip" or case.name.startswith("stage1") else "<image>"
        if family == "llava":
            found = processor.image_processor([image], return_tensors="pt")["pixel_values"]
        else:
            found = processor(images=[image], text=[f"{placeholder}a"], return_tensors="pt")["pixel_values"]
        expected = torch.from_numpy(reference(image, found.shape[-1], family))[None]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- there and back


def official_of(case: Path):
    """The official tensors under their current names, and those that do not come back, with the reason."""
    family = case.parent.name
    if family == "llava":
        return open_checkpoint(case / "checkpoint").files
    files = TensorFiles(
        case / {"openflamingo": "checkpoint.pt", "blip2": "checkpoint.pth", "blip": "caption.pth"}[family]
    )
    if family == "openflamingo":  # training writes `module.` in front
        return Renamed(files, usual_names(files.shapes, "transformer.blocks"))
    return files


@pytest.mark.core
def test_official_layouts_come_back(case, ours, tmp_path):
    """Bit by bit, with names and dtypes, except for buffers that models compute by themselves."""
    done = export(ours, tmp_path / "official", to="official")
    folder = tmp_path / "official"
    back = TensorFiles(next(folder.glob("checkpoint.pt*"), folder))
    if case.name == "v15_lora":  # merged into its language model, it is a whole checkpoint
        convert_llava(tmp_path / "official", case / "clip_vision_tower", output=tmp_path / "again")
        same_tensors(TensorFiles(ours), TensorFiles(tmp_path / "again"))
        return
    official = official_of(case)
    gone = official.shapes.keys() - back.shapes.keys()
    reasons = json.loads((ours / CERTIFICATE).read_text())["left_out"]
    assert {reasons[name] for name in gone} <= {BUFFER}
    same_tensors(Renamed(official, {name: name for name in official.shapes if name not in gone}), back)
    check = json.loads((tmp_path / "official" / CERTIFICATE).read_text())["checks"][0]
    assert check["largest_difference"] == 0.0 and done.pieces


@pytest.fixture(scope="module")
def native(case, ours, tmp_path_factory) -> Path:
    """The case's model in transformers' class."""
    output = tmp_path_factory.mktemp("native") / case.name
    export(ours, output)
    return output


def test_cases_without_a_native_class_are_refused(case, ours, tmp_path):
    with pytest.raises(ConversionError, match="What can be done"):
        export(ours, tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.mark.core
def test_native_layouts_come_back(case, native, tmp_path):
    """Native, ours, native: tensors bit by bit, and configurations."""
    if case.parent.name == "llava":
        convert_llava(native, output=tmp_path / "ours")
    else:
        convert_blip2(native, output=tmp_path / "ours")
    certificate = json.loads((tmp_path / "ours" / CERTIFICATE).read_text())
    assert certificate["from"] == "transformers"
    for check in certificate["checks"]:
        assert check.get("equal", True) and check.get("largest_difference", 0) <= 1e-3, check
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
settings = dict(
    max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0
)
ids = model.generate(**inputs, **settings)
start = 0 if model.config.text_config.is_encoder_decoder else inputs["input_ids"].shape[1]
pipe = pipeline("image-text-to-text", model=folder)
said = pipe(images=image, text=prompt, generate_kwargs=settings, return_full_text=False)
chat = None
if processor.chat_template:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    chat = pipe(text=[{"role": "user", "content": content}], generate_kwargs=settings, return_full_text=False)
    chat = chat[0]["generated_text"]
assert "vlbridge" not in sys.modules
print(json.dumps({"class": type(model).__name__, "ids": ids[0, start:].tolist(), "said": said[0]["generated_text"],
                  "decoded": processor.decode(ids[0, start:], skip_special_tokens=True), "chat": chat}))
"""


def served_chat_is_ours(model, processor, theirs, image) -> None:
    """The chat template writes no placeholder: what a server makes of a conversation has the ids of our processor."""
    turn = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    conversation, chat = [{"role": "user", "content": turn}], {"add_generation_prompt": True}
    inputs = processor.apply_chat_template(conversation, **chat, tokenize=True, return_dict=True, return_tensors="pt")
    written = theirs.tokenizer.apply_chat_template(conversation, **chat, tokenize=False)
    assert "<image>" not in written and "What is it?" in written
    # vLLM tokenises what the template wrote without special tokens, and puts the image's tokens before it
    ids = theirs.tokenizer(written, add_special_tokens=model.config.is_encoder_decoder)["input_ids"]
    placeholders = [model.config.image_token_id] * model.config.qformer_config.num_query_tokens
    assert inputs["input_ids"][0].tolist() == placeholders + ids


@pytest.mark.core
def test_an_exported_model_generates_without_this_package(case, ours, native, tmp_path):
    """The same tokens through the Auto classes, and the same text through the pipeline."""
    image = tiny_image(3, (48, 33))
    image.save(tmp_path / "image.png")
    model, processor = AutoModel.from_pretrained(ours), AutoProcessor.from_pretrained(ours)
    llava = case.parent.name == "llava"
    prompt = "<image>\nWhat is it?" if llava else "a photo of"
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1,
                "repetition_penalty": 1.0}  # fmt: skip
    theirs = AutoProcessor.from_pretrained(native)
    inputs = processor(images=[image], text=[prompt if llava else "<image>" + prompt], return_tensors="pt")
    # transformers' class resizes as the original where it is told to: both models get the pixels that it makes untold
    official = AutoProcessor.from_pretrained(native, backend="pil")(images=[image], text=[prompt], return_tensors="pt")
    torch.testing.assert_close(
        inputs["pixel_values"], official["pixel_values"].reshape(inputs["pixel_values"].shape), atol=1e-5, rtol=0
    )
    other = theirs(images=[image], text=[prompt], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], other["input_ids"])
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
    if not llava:
        served_chat_is_ours(model, processor, theirs, image)
    certificate = json.loads((native / CERTIFICATE).read_text())
    assert certificate["to"].endswith(found["class"])
    tokens = next(check for check in certificate["checks"] if check["what"] == "greedy tokens")
    assert tokens["equal"]
    assert any("backend='pil'" in note for note in certificate["notes"])


@pytest.mark.core
def test_certificates_hold(case, ours, native):
    """The hashes of files are right, and no path of this machine is in them."""
    for folder in (ours, native):
        text = (folder / CERTIFICATE).read_text()
        assert str(folder.parent) not in text and str(case.parent) not in text
        certificate = json.loads(text)
        for name, about in certificate["outputs"].items():
            assert sha256_of(folder / name) == about["sha256"]
        inputs = [about for files in certificate["inputs"].values() for about in files.values()]
        assert inputs and all(len(about["sha256"]) == 64 for about in inputs)
        files = TensorFiles(folder)
        assert {name: tuple(about["shape"]) for name, about in certificate["tensors"].items()} == files.shapes
        assert certificate["versions"]["vlbridge"] == vlbridge.__version__
    assert card_section(json.loads((native / CERTIFICATE).read_text())) in (native / "README.md").read_text()


# ---------------------------------------------------------------------- models that were composed here


def saved(folder: Path, *args, **options) -> Path:
    model, processor = tiny_model(*args, **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def checks_of(folder: Path) -> dict[str, dict]:
    return {check["what"]: check for check in json.loads((folder / CERTIFICATE).read_text())["checks"]}


@pytest.mark.parametrize(
    "language, vision, options",
    [
        *(
            (language, "clip", {})
            for language in ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "phi3", "smollm3")
        ),
        ("llama", "siglip", {"vision_feature_layer": -2}),
        ("llama", "vit", {"vision_feature_layer": -2}),
        ("llama", "dinov2", {"vision_feature_layer": -2}),
        ("llama", "clip", {"vision_feature_layer": [-1, -2]}),
        ("llama", "clip", {"vision_feature_select_strategy": "full", "projector_bias": False}),
        ("llama", "clip", {"image_aspect_ratio": "pad"}),
        ("llama", "clip", {"image_aspect_ratio": "anyres"}),
    ],
)
def test_composed_llavas_give_the_same_outputs(language, vision, options, tmp_path):
    export(saved(tmp_path / "ours", "mlp", language, vision, **options), tmp_path / "native")
    found = checks_of(tmp_path / "native")
    assert found["token ids of the prompt"]["equal"] and found["greedy tokens"]["equal"]
    assert found["logits"]["largest_difference"] < 1e-5
    assert found["pixel_values"]["largest_difference"] < 0.02  # one grey level: transformers resizes with torchvision


@pytest.mark.parametrize(
    "args, options, reason",
    [
        (("mlp", "llama", "resnet"), {}, "this one is a CNN"),
        (("mlp", "llama", "siglip"), {}, "the output of its last norm"),
        (("mlp", "llama", "clip"), {"projector_type": "linear"}, "this one is linear"),
        (("mlp", "llama", "clip"), {"projector_hidden_size": 24}, "this one 24"),
        (("mlp", "llama", "clip"), {"pooling": "average", "pooling_factor": 2}, "don't pool"),
        (("mlp", "llama", "clip"), {"projector_norm_eps": 1e-6}, "no layer norm in front"),
        (("mlp", "llama", "clip"), {"global_context": True}, "sees one feature at a time"),
        (("mlp", "llama", "clip"), {"image_aspect_ratio": "anyres", "patch_merge_type": "flat"}, "'flat'"),
        (("mlp", "t5", "clip"), {}, "this one is a t5"),
        (("mlp", "gpt2", "clip"), {}, "model.embed_tokens"),
        (("mlp", "gemma2", "clip"), {}, "final_logit_softcapping"),
        (("qformer", "opt", "clip"), {}, "this one is a clip_vision_model"),
        (("perceiver", "llama", "clip"), {}, "no class for Perceiver-Flamingo"),
    ],
)
def test_what_native_classes_can_not_express(args, options, reason, tmp_path):
    """The error comes before anything is written, and says what can be done."""
    ours = saved(tmp_path / "ours", *args, **options)
    with pytest.raises(ConversionError, match=reason) as error:
        export(ours, tmp_path / "native")
    assert "What can be done" in str(error.value)
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    "args, reason",
    [(("mlp", "qwen2", "clip"), "this one is a qwen2"), (("mlp", "llama", "siglip"), "vision tower is CLIP's"),
     (("qformer", "gpt2", "clip"), "OPT, T5 and LLaMA"),
     (("perceiver", "llama", "clip"), "rows of this model's special tokens")],
)  # fmt: skip
def test_what_official_layouts_can_not_express(args, reason, tmp_path):
    ours = saved(tmp_path / "ours", *args)
    with pytest.raises(ConversionError, match=reason):
        export(ours, tmp_path / "official", to="official")
    assert not (tmp_path / "official").exists()


def test_retrieval_scores_without_this_package(tmp_path):
    """There is no class for stage 1 on CLIP; on EVA ViT-g's architecture the scores are the same."""
    model, processor = tiny_stage1()
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    with pytest.raises(ConversionError, match="this one is a clip_vision_model"):
        export(tmp_path / "clip", tmp_path / "native")
    case = CASES / "blip2" / "stage1_qformer"
    convert(case, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "native")
    found = checks_of(tmp_path / "native")
    assert found["token ids of the texts"]["equal"]
    assert found["contrastive scores"]["largest_difference"] < 1e-5
    assert found["matching logits"]["largest_difference"] < 1e-4


def test_a_bridge_fetches_its_frozen_parts(tmp_path):
    """Exporting a bridge alone gives the same as exporting the full model."""
    model, processor = tiny_model("mlp")
    parts = {"vision": tmp_path / "clip", "language": tmp_path / "llama"}
    model.vision_model.save_pretrained(parts["vision"])
    model.language_model.save_pretrained(parts["language"])
    composed, processor = vlbridge.compose(
        str(parts["vision"]), str(parts["language"]), "mlp", tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )  # fmt: skip
    for name, bridge_only in (("bridge", True), ("whole", False)):
        composed.save_pretrained(tmp_path / name, bridge_only=bridge_only)
        processor.save_pretrained(tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name}_native")
    same_tensors(TensorFiles(tmp_path / "bridge_native"), TensorFiles(tmp_path / "whole_native"))
    changed = AutoModel.from_pretrained(parts["language"])
    with torch.no_grad():
        changed.embed_tokens.weight[0] += 1
    changed.save_pretrained(parts["language"])
    with pytest.raises(vlbridge.FrozenPartError, match="not the one"):
        export(tmp_path / "bridge", tmp_path / "never")


def test_nothing_is_overwritten(tmp_path):
    ours = saved(tmp_path / "ours", "mlp")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConversionError, match="not empty"):
        export(ours, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "ours"]


def test_different_models_are_not_certified(tmp_path, monkeypatch):
    """A class that computes other logits is noticed, and nothing is written."""
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    ours = saved(tmp_path / "ours", "mlp")
    forward = LlavaMultiModalProjector.forward
    monkeypatch.setattr(LlavaMultiModalProjector, "forward", lambda self, features: 2 * forward(self, features))
    with pytest.raises(ConversionError, match="logits differ"):
        export(ours, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_command_line(tmp_path):
    ours = saved(tmp_path / "ours", "mlp")
    done = CliRunner().invoke(app, ["export", str(ours), "--output", str(tmp_path / "native"), "--no-verify"])
    assert done.exit_code == 0, done.output
    certificate = json.loads((tmp_path / "native" / CERTIFICATE).read_text())
    assert certificate["checks"] == [{"what": "nothing", "why": "verification was switched off"}]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    done = CliRunner().invoke(app, ["export", str(ours), "--to", "official", "--output", str(tmp_path / "official")])
    assert done.exit_code == 0, done.output
    for arguments, code in (
        (["export", str(ours), "--to", "elsewhere", "-o", str(tmp_path / "x")], 2),
        (["export", str(tmp_path / "nothing"), "-o", str(tmp_path / "x")], 1),
        (["export", str(tmp_path / "native"), "-o", str(tmp_path / "x")], 1),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
    assert not (tmp_path / "x").exists()
