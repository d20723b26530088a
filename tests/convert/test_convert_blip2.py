"""BLIP's and BLIP-2's layouts: full-size manifests map completely, tables lead back, changed checkpoints are refused.

The numbers of converted models are compared with the official ones in tests/parity.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    OPTConfig,
    T5Config,
)
from typer.testing import CliRunner

from vlbridge.cli import app
from vlbridge.convert import ConversionError, convert_blip, convert_blip2
from vlbridge.convert.convert_blip import CAPTION_TABLE, MATCHING_TABLE
from vlbridge.convert.convert_blip2 import infer_config, language_of, lavis_depth, plan_conversion, usual_vision
from vlbridge.convert.convert_files import TensorFiles
from vlbridge.convert.convert_lavis_names import BRIDGE_TABLE, EVA_TABLE
from vlbridge.convert.convert_sources import Renamed
from vlbridge.convert.convert_tables import invert, plan, twins
from vlbridge.convert.convert_vision import interpolated, read_vision_config


MANIFESTS = Path(__file__).parent / "manifests"
CASES = Path(__file__).parents[1] / "parity" / "cases"


class Manifest:
    """A checkpoint with names, shapes and dtypes, but no data; `prefix` takes a part of it."""

    def __init__(self, name: str, prefix: str = "", **more):
        content = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
        content = {**{key: value for key, value in content.items() if key.startswith(prefix)}, **more}
        self.path = name
        self.shapes = {key.removeprefix(prefix): tuple(shape) for key, (shape, _) in content.items()}
        self.dtypes = {key.removeprefix(prefix): getattr(torch, dtype) for key, (_, dtype) in content.items()}


def opt(width, layers, heads):
    return OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=50272,
    )  # fmt: skip


def t5(width, inner, heads):
    return T5Config(
        d_model=width, d_ff=inner, d_kv=64, num_layers=24, num_heads=heads, vocab_size=32128,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


def vicuna(width, inner, layers):
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=layers,
        vocab_size=32001,
    )  # fmt: skip


LANGUAGE = {
    "opt2.7b": lambda: opt(2560, 32, 32),
    "opt6.7b": lambda: opt(4096, 32, 32),
    "flant5xl": lambda: t5(2048, 5120, 32),
    "flant5xxl": lambda: t5(4096, 10240, 64),
    "vicuna7b": lambda: vicuna(4096, 11008, 32),
    "vicuna13b": lambda: vicuna(5120, 13824, 40),
}
RELEASES = sorted(path.name.split(".checkpoint_model")[0] for path in MANIFESTS.glob("blip2_*.checkpoint_model.*"))


@pytest.mark.parametrize("whole", [False, True], ids=["released", "whole"])
@pytest.mark.parametrize("release", RELEASES)
def test_full_size_manifests_map_completely(release, whole):
    """As released, with ViT and language model from their own files, and as a checkpoint that holds all parts."""
    full = f"{release}.full_model"
    checkpoint = Manifest(full if whole else f"{release}.checkpoint_model")
    name = language_of(checkpoint.shapes)
    language = Manifest(full, f"{name}_model.") if name else None
    vision = None if whole else Manifest(full, "visual_encoder.")
    inside = {key: key.removeprefix("visual_encoder.") for key in checkpoint.shapes if key.startswith("visual_encoder")}
    encoder = usual_vision(vision, Renamed(checkpoint, inside) if inside else None)
    vision_config = lavis_depth(read_vision_config(encoder, None, {}), {})
    text_config = LANGUAGE[release.rpartition("_")[2]]() if name else None
    config = infer_config(checkpoint.shapes, vision_config, text_config)

    expected = (23, 1024) if release.endswith("vitL") else (39, 1408)
    assert (vision_config.num_hidden_layers, vision_config.hidden_size) == expected
    assert (vision_config.num_attention_heads, vision_config.image_size) == (16, 224)
    qformer = config.qformer_config
    assert (qformer.num_query_tokens, qformer.num_attention_heads, qformer.num_hidden_layers) == (32, 12, 12)
    assert qformer.use_text == (name is None or "instruct" in release) and qformer.cross_attention_frequency == 2

    done = plan_conversion(checkpoint, vision, language, config)
    # not converted: buffers, and second names of one tensor
    used = {source for _, piece, _ in done.pieces.values() for source in piece.sources}
    used |= {f"{part}.{key.removeprefix('visual.')}" for key in used for part in ("visual_encoder", f"{name}_model")}
    left = checkpoint.shapes.keys() - used
    ends = ("position_ids", "inv_freq", "decoder.bias", "decoder.weight", "embed_tokens.weight", "lm_head.weight")
    assert all(key.endswith(ends) for key in left), sorted(left)
    # the bridge has as many elements as the release says
    bridge = sum(tensor.numel() for key, tensor in done.model.named_parameters() if key.startswith("bridge."))
    assert bridge == sum(
        math.prod(shape)
        for key, shape in checkpoint.shapes.items()
        if not key.startswith(("visual_encoder.", f"{name}_model."))
        and not key.endswith(("position_ids", "predictions.decoder.weight", "predictions.decoder.bias"))
    )
    if not whole and name:
        index = json.loads((MANIFESTS / "index_blip2.json").read_text())[checkpoint.path]
        assert len(checkpoint.shapes) == index["n_keys"]


def test_the_encoders_own_file_may_hold_more_than_lavis_uses():
    more = {f"blocks.39.{name}": [[1], "float32"] for name in ("norm1.weight", "attn.q_bias", "attn.v_bias")}
    more.update({f"{name}.{kind}": [[1], "float32"] for name in ("norm", "head") for kind in ("weight", "bias")})
    shapes = Manifest("blip2_pretrain.full_model", "visual_encoder.")
    for key, (shape, dtype) in more.items():
        shapes.shapes[key], shapes.dtypes[key] = tuple(shape), getattr(torch, dtype)
    config = lavis_depth(read_vision_config(shapes, None, {}), {})
    assert config.num_hidden_layers == 39
    checkpoint = Manifest("blip2_pretrain.checkpoint_model")
    plan_conversion(checkpoint, shapes, None, infer_config(checkpoint.shapes, config, None))


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize("release", RELEASES)
def test_the_bridges_table_leads_back(release):
    checkpoint = Manifest(f"{release}.checkpoint_model")
    name = language_of(checkpoint.shapes)
    keys = [key for key in checkpoint.shapes if not key.startswith(f"{name}_model.")]
    there = plan(BRIDGE_TABLE, keys)
    # the projection to the language model has three names; this checkpoint has one of them
    others = tuple(f"{other}_proj." for other in ("opt", "t5", "llm") if other != name)
    others += ("Qformer.cls.",) if name else ()  # a head that stage 1 alone has
    table = [rule for rule in BRIDGE_TABLE if not rule.source.startswith(others)]
    back = plan(invert(table), there)
    sources = {key: piece.sources[0] for key, piece in back.items()}
    assert sources.keys() == {key for key in keys if not key.endswith("position_ids")}
    second = twins(table, keys)
    assert {key: sources.pop(key) for key in second} == second
    assert sources == {piece.sources[0]: key for key, piece in there.items()}


def test_the_vits_table_leads_back_with_its_missing_bias():
    official = torch.load(CASES / "blip2" / "stage1_qformer" / "vit.pth")
    there = {key: piece.load(official.__getitem__) for key, piece in plan(EVA_TABLE, official).items()}
    width = official["cls_token"].shape[-1]
    bias = there["vision_model.encoder.layers.1.self_attn.qkv.bias"]
    assert torch.equal(bias[:width], official["blocks.1.attn.q_bias"])
    assert torch.equal(bias[2 * width :], official["blocks.1.attn.v_bias"])
    assert not bias[width : 2 * width].any()
    pieces = plan(invert(EVA_TABLE), there)
    back = {key: piece.load(there.__getitem__) for key, piece in pieces.items()}
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)
    shapes = {key: tuple(tensor.shape) for key, tensor in there.items()}
    assert all(piece.shape(shapes) == tuple(official[key].shape) for key, piece in pieces.items())
    # a fine-tuned model may have a bias that the official layout has no place for
    bias[width] = 1.0
    with pytest.raises(ConversionError, match="bias for keys that is not zero"):
        pieces["blocks.1.attn.q_bias"].load(there.__getitem__)


@pytest.mark.parametrize("name, table", [("caption", CAPTION_TABLE), ("itm", MATCHING_TABLE)])
def test_blips_tables_lead_back(name, table):
    keys = torch.load(CASES / "blip" / "blip_caption_itm" / f"{name}.pth")["model"].keys()
    there = plan(table, keys)
    back = plan(invert(table), there)
    assert back.keys() == {key for key in keys if not key.endswith("position_ids")}


def test_positions_for_another_size():
    table = torch.randn(1, 1 + 4 * 4, 8)
    torch.testing.assert_close(interpolated(table, 4), table)
    larger = interpolated(table, 6)
    assert larger.shape == (1, 37, 8) and torch.equal(larger[:, 0], table[:, 0])
    # equal embeddings stay equal
    flat = torch.cat((table[:, :1], torch.ones(1, 16, 8)), dim=1)
    torch.testing.assert_close(interpolated(flat[0], 6)[1:], torch.ones(36, 8))


# ---------------------------------------------------------------------- from end to end

HEADS = {"vision_config": {"num_attention_heads": 4}, "qformer_config": {"num_attention_heads": 4}}
CAPTIONER, STAGE1 = CASES / "blip2" / "caption_coco_opt_vitunfrozen", CASES / "blip2" / "stage1_qformer"


def convert(case: Path, output: Path, config: dict | None = None, **parts):
    """A shipped case; `parts` replaces some of its files."""
    language = case / "llm" if (case / "llm").is_dir() else None
    parts = {"checkpoint": case / "checkpoint.pth", "vision": case / "vit.pth", "language": language, **parts}
    return convert_blip2(
        **parts, output=output, qformer_tokenizer=case / "bert-base-uncased", config=HEADS if config is None else config
    )


def features(folder: Path, case: Path = CAPTIONER) -> torch.Tensor:
    pixel_values = TensorFiles(case / "inputs.safetensors").read("pixel_values")
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        return model.bridge.vision_layer_norm(model.get_patch_features(pixel_values))


def test_a_trained_vit_in_the_checkpoint_is_used(tmp_path):
    official = TensorFiles(CAPTIONER / "outputs.safetensors").read("ln_vision_out")
    frozen = {key: torch.randn_like(tensor) for key, tensor in torch.load(CAPTIONER / "vit.pth").items()}
    torch.save(frozen, tmp_path / "vit.pth")
    convert(CAPTIONER, tmp_path / "with", vision=tmp_path / "vit.pth")
    convert(CAPTIONER, tmp_path / "without", vision=None)
    for name in ("with", "without"):
        torch.testing.assert_close(features(tmp_path / name), official, atol=1e-5, rtol=0)


@pytest.mark.core
def test_it_is_an_ordinary_model(tmp_path):
    """It is saved and loaded again, and so is the encoder alone, from which the next conversion starts."""
    convert(STAGE1, tmp_path / "one")
    model = AutoModel.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    again = AutoModel.from_pretrained(tmp_path / "two").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
    model.vision_model.save_pretrained(tmp_path / "vit")
    convert(STAGE1, tmp_path / "three", vision=tmp_path / "vit", config={"qformer_config": HEADS["qformer_config"]})
    torch.testing.assert_close(features(tmp_path / "three", STAGE1), features(tmp_path / "one", STAGE1))


def test_a_clip_folder_as_vision_encoder(tmp_path):
    """In transformers' layout, text tower and all; what LAVIS's encoder does not reach is not read."""
    official = torch.load(STAGE1 / "vit.pth")
    width = official["cls_token"].shape[-1]
    sizes = {"hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    clip = CLIPModel(
        CLIPConfig(vision_config={**sizes, "image_size": 28, "patch_size": 14}, text_config={**sizes, "vocab_size": 99})
    ).eval()
    clip.save_pretrained(tmp_path / "clip")
    config = {"qformer_config": HEADS["qformer_config"], "vision_config": {"num_hidden_layers": 2}}
    convert(STAGE1, tmp_path / "out", vision=tmp_path / "clip", config=config)
    model = AutoModel.from_pretrained(tmp_path / "out")
    pixel_values = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = clip.vision_model(pixel_values, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(model.get_patch_features(pixel_values), expected, atol=1e-5, rtol=0)


def test_another_image_size(tmp_path):
    config = {**HEADS, "vision_config": {"num_attention_heads": 4, "image_size": 56}}
    convert(STAGE1, tmp_path / "out", config=config)
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert model.vision_model.embeddings.position_embedding.shape == (1, 17, 32)
    assert processor.image_processor.size == {"height": 56, "width": 56}
    assert model.get_patch_features(torch.randn(1, 3, 56, 56)).shape == (1, 17, 32)


@pytest.mark.parametrize(
    "case, change, message",
    [
        (CAPTIONER, lambda tensors: tensors.pop("ln_vision.bias"), "missing: bridge.vision_layer_norm.bias"),
        (
            CAPTIONER,
            lambda tensors: tensors.update({"Qformer.extra": torch.ones(1)}),
            "conversion table: Qformer.extra",
        ),
        (
            CAPTIONER,
            lambda tensors: tensors.update({"opt_proj.bias": torch.ones(3)}),
            r"bias is \[3\], expected \[32\]",
        ),
        (
            CAPTIONER,
            lambda tensors: tensors["opt_model.lm_head.weight"].add_(1),
            "opt_model.lm_head.weight is a second",
        ),
        (CAPTIONER, lambda tensors: tensors.pop("visual_encoder.blocks.0.attn.q_bias"), "Parts are missing"),
        (CAPTIONER, lambda tensors: tensors.pop("query_tokens"), "not one of BLIP-2's"),
        (CAPTIONER, lambda tensors: tensors.pop("opt_proj.weight"), "not a checkpoint of BLIP-2"),
        (STAGE1, lambda tensors: tensors["Qformer.cls.predictions.decoder.weight"].add_(1), "is a second copy"),
        (STAGE1, lambda tensors: tensors.pop("temp"), "missing: bridge.temperature"),
        (STAGE1, lambda tensors: tensors.update({"vision_queue": torch.ones(1)}), "conversion table: vision_queue"),
    ],
)
def test_a_changed_checkpoint_is_refused(case, change, message, tmp_path):
    tensors = torch.load(case / "checkpoint.pth")["model"]
    change(tensors)
    torch.save({"model": tensors}, tmp_path / "changed.pth")
    with pytest.raises(ConversionError, match=message):
        convert(
            case,
            tmp_path / "out",
            checkpoint=tmp_path / "changed.pth",
            vision=None if case is CAPTIONER else case / "vit.pth",
        )
    assert not (tmp_path / "out").exists()


def test_wrong_parts_are_named(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConversionError, match="needs its language model"):
        convert(CAPTIONER, out, language=None)
    with pytest.raises(ConversionError, match="stage 1, which has no language model"):
        convert(STAGE1, out, language=CAPTIONER / "llm")
    with pytest.raises(ConversionError, match="give the vision encoder's own file"):
        convert(STAGE1, out, vision=None)
    with pytest.raises(ConversionError, match="vision encoder of width 32"):
        convert(STAGE1, out, config={})
    with pytest.raises(ConversionError, match="Q-Former of width 32"):
        convert(STAGE1, out, config={"vision_config": HEADS["vision_config"]})
    other = shutil.copytree(CAPTIONER / "llm", tmp_path / "llm")
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**fields, "model_type": "gpt2"}))
    with pytest.raises(ConversionError, match="for a language model of type opt; this one is a gpt2"):
        convert(CAPTIONER, out, language=other)
    words = shutil.copytree(STAGE1 / "bert-base-uncased", tmp_path / "bert")
    (words / "vocab.txt").write_text((words / "vocab.txt").read_text() + "more\n")
    with pytest.raises(ConversionError, match=r"knows 170 tokens, but the tokenizer in .* has 171"):
        convert_blip2(STAGE1 / "checkpoint.pth", STAGE1 / "vit.pth", output=out, qformer_tokenizer=words, config=HEADS)
    assert not out.exists()


# ---------------------------------------------------------------------- BLIP (2022)

BLIP = CASES / "blip" / "blip_caption_itm"
BLIP_HEADS = {"vision_config": {"num_attention_heads": 4}, "text_config": {"num_attention_heads": 4}}


@pytest.mark.core
def test_retrieval_checkpoints_of_blip(tmp_path):
    """They hold momentum copies and queues beside the matcher."""
    tensors = torch.load(BLIP / "itm.pth")["model"]
    towers = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")
    momentum = {key.replace(".", "_m.", 1): tensor for key, tensor in tensors.items() if key.startswith(towers)}
    queues = {name: torch.ones(1) for name in ("image_queue", "text_queue", "idx_queue", "ptr_queue", "temp")}
    torch.save({"model": {**tensors, **momentum, **queues}}, tmp_path / "retrieval.pth")
    convert_blip(tmp_path / "retrieval.pth", tmp_path / "out", BLIP / "bert-base-uncased", BLIP_HEADS)
    model, info = BlipForImageTextRetrieval.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model.itm_head.weight, tensors["itm_head.weight"])


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "caption",
            lambda tensors: tensors.pop("visual_encoder.norm.bias"),
            "missing: vision_model.post_layernorm.bias",
        ),
        ("caption", lambda tensors: tensors.update({"extra": torch.ones(1)}), "conversion table: extra"),
        ("caption", lambda tensors: tensors["text_decoder.cls.predictions.decoder.weight"].add_(1), "is a second copy"),
        ("itm", lambda tensors: tensors.update({"itm_head.bias": torch.ones(3)}), r"bias is \[3\], expected \[2\]"),
        ("itm", lambda tensors: tensors.pop("visual_encoder.patch_embed.proj.weight"), "not one of BLIP's"),
    ],
)
def test_a_changed_checkpoint_of_blip_is_refused(name, change, message, tmp_path):
    tensors = torch.load(BLIP / f"{name}.pth")["model"]
    change(tensors)
    torch.save({"model": tensors}, tmp_path / "changed.pth")
    with pytest.raises(ConversionError, match=message):
        convert_blip(tmp_path / "changed.pth", tmp_path / "out", BLIP / "bert-base-uncased", BLIP_HEADS)
    assert not (tmp_path / "out").exists()


def test_blip_names_what_is_missing(tmp_path):
    with pytest.raises(ConversionError, match="a vision model of width 32"):
        convert_blip(BLIP / "itm.pth", tmp_path / "out", BLIP / "bert-base-uncased")
    with pytest.raises(ConversionError, match="has 171 tokens|knows 171 tokens"):
        bert = shutil.copytree(BLIP / "bert-base-uncased", tmp_path / "bert")
        (bert / "vocab.txt").write_text((bert / "vocab.txt").read_text() + "more\n")
        convert_blip(BLIP / "itm.pth", tmp_path / "out", bert, BLIP_HEADS)


# ---------------------------------------------------------------------- command line


def run(*arguments) -> str:
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_command_line(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(HEADS))
    bert = ("--qformer-tokenizer", STAGE1 / "bert-base-uncased", "--config", config)
    output = run("blip2", "--checkpoint", STAGE1 / "checkpoint.pth", "--vision", STAGE1 / "vit.pth",
                 "--output", tmp_path / "stage1", *bert)  # fmt: skip
    assert "qformer_blip2_pretraining" in output
    run("blip2", "--checkpoint", CAPTIONER / "checkpoint.pth", "--language", CAPTIONER / "llm",
        "--output", tmp_path / "captioner", *bert)  # fmt: skip
    assert AutoModel.from_pretrained(tmp_path / "captioner").config.model_type == "qformer_blip2"
    config.write_text(json.dumps(BLIP_HEADS))
    run("blip", "--checkpoint", BLIP / "itm.pth", "--tokenizer", BLIP / "bert-base-uncased", "--config", config,
        "--output", tmp_path / "itm")  # fmt: skip
    BlipForImageTextRetrieval.from_pretrained(tmp_path / "itm")
    for wrong in ("blip", "blip2"):
        done = CliRunner().invoke(app, ["convert", wrong, "--checkpoint", "none.pth", "--output", str(tmp_path / "x")])
        assert done.exit_code and "none.pth" in done.output
