"""OpenFlamingo's layouts: full-size manifests map completely, all spellings of the keys are known, errors are raised.

The numbers of converted models are compared with the official ones in tests/parity.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from tiny import spread_weights, tiny_image, tiny_tokenizer
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
)
from typer.testing import CliRunner

from vlbridge.cli import app
from vlbridge.configuration import MosaicGPTConfig, PerceiverFlamingoConfig
from vlbridge.convert import ConversionError, convert_openflamingo
from vlbridge.convert.convert_openflamingo import (
    checkpoint_table,
    infer_config,
    plan_conversion,
    resized_text_config,
    usual_names,
)
from vlbridge.convert.convert_tables import invert, plan
from vlbridge.convert.convert_vision import open_clip_config
from vlbridge.modeling import PerceiverFlamingoForConditionalGeneration


MANIFESTS = Path(__file__).parent / "manifests"
NUM_TOKENS = 50280


class Manifest:
    """A checkpoint with names, shapes and dtypes, but no data."""

    def __init__(self, name: str, prefix: str = ""):
        content = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
        self.path = name
        self.shapes = {prefix + key: tuple(shape) for key, (shape, _) in content.items()}
        self.dtypes = {prefix + key: getattr(torch, dtype) for key, (_, dtype) in content.items()}


LANGUAGE = {
    "mpt1b": lambda: MosaicGPTConfig(),
    "rpj3b": lambda: GPTNeoXConfig(
        hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, intermediate_size=10240, vocab_size=50432,
        rotary_pct=1.0,
    ),
    "mpt7b": lambda: MptConfig(d_model=4096, n_heads=32, n_layers=32, vocab_size=50432),
}  # fmt: skip


def clip() -> Manifest:
    manifest = Manifest("openai_clip_vit_l_14.visual_open_clip")
    prefix = "" if any(key.startswith("visual.") for key in manifest.shapes) else "visual."
    return Manifest(manifest.path, prefix)


@pytest.mark.parametrize(
    "checkpoint, every",
    [
        ("openflamingo_3b_vitl_mpt1b.checkpoint", 1),
        ("openflamingo_4b_vitl_rpj3b.checkpoint", 2),
        ("openflamingo_9b_vitl_mpt7b.checkpoint", 4),
        ("openflamingo_9b_vitl_mpt7b.checkpoint_frozenemb", 4),
    ],
)
def test_full_size_manifests_map_completely(checkpoint, every):
    manifest, vision = Manifest(checkpoint), clip()
    name = re.search("vitl_(.*?)\\.", checkpoint).group(1)
    text_config = resized_text_config(LANGUAGE[name](), manifest.shapes, NUM_TOKENS)
    config = infer_config(manifest.shapes, open_clip_config(vision.shapes), text_config, every)
    assert (config.vision_config.num_attention_heads, config.vision_config.image_size) == (16, 224)
    assert (config.num_latents, config.resampler_depth, config.resampler_num_heads) == (64, 6, 8)
    assert (config.cross_attention_every_n_layers, config.cross_attention_num_heads) == (every, 8)
    done = plan_conversion(manifest, vision, Manifest(checkpoint.split(".")[0] + ".base_lm"), config)
    # all keys of the checkpoint are used, except for buffers of the language model
    used = {source for files, piece, _ in done.pieces.values() for source in piece.sources if files.path == checkpoint}
    left = {key for key in manifest.shapes if key not in used}
    assert all(re.search(r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$", key) for key in left)
    trained = sum(
        parameter.numel()
        for name, parameter in done.model.named_parameters()
        if done.pieces[name][0].path == checkpoint
    )
    total = json.loads((MANIFESTS / "index_openflamingo.json").read_text())[checkpoint]["n_elements"]
    assert trained == total - sum(math.prod(manifest.shapes[key]) for key in left)


def test_the_table_leads_back():
    manifest = Manifest("openflamingo_3b_vitl_mpt1b.checkpoint")
    config = infer_config(manifest.shapes, CLIPVisionConfig(), resized_text_config(MosaicGPTConfig(), {}, NUM_TOKENS))
    table = checkpoint_table(config, ["language_model.transformer.wte.weight"])
    there = plan(table, manifest.shapes)
    back = plan(invert(table), there)
    assert {name: piece.sources[0] for name, piece in back.items()} == {
        piece.sources[0]: name for name, piece in there.items()
    }
    assert back.keys() == manifest.shapes.keys()


def test_keys_of_the_first_release_and_of_distributed_training():
    keys = [
        "module.perceiver.latents",
        "module.lang_encoder.gated_cross_attn_layers.3.attn_gate",
        "module.lang_encoder.old_decoder_blocks.3.self_attn.rotary_emb.inv_freq",
        "module.lang_encoder.model.layers.3.decoder_layer.self_attn.rotary_emb.inv_freq",
        "module.lang_encoder.model.embed_tokens.weight",
    ]
    names = usual_names(keys, "model.layers")
    assert sorted(names.values()) == [
        "lang_encoder.model.embed_tokens.weight",
        "lang_encoder.model.layers.3.decoder_layer.self_attn.rotary_emb.inv_freq",
        "lang_encoder.model.layers.3.gated_cross_attn_layer.attn_gate",
        "perceiver.latents",
    ]


# ---------------------------------------------------------------------- from end to end, with LLaMA

EVERY, LAYERS, WIDTH = 2, 4, 32


@pytest.fixture(scope="module")
def first_9b(tmp_path_factory):
    """A model of vlbridge, written as the first release was: with the inverted table.

    LLaMA's head is not in such files, as its name lacks "embed": the two new tokens' rows of it are lost.
    """
    folder = tmp_path_factory.mktemp("first9b")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
    language = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, bos_token_id=1, eos_token_id=2))
    language.save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    vision = {**sizes, "num_hidden_layers": 2, "image_size": 30, "patch_size": 6}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config={**sizes, "vocab_size": 99}))
    clip.save_pretrained(folder / "clip")

    config = PerceiverFlamingoConfig(
        vision_config=clip.config.vision_config,
        text_config=LlamaConfig(**sizes, vocab_size=102, bos_token_id=1, eos_token_id=2),
        image_token_id=101,
        num_latents=5,
        resampler_depth=2,
        resampler_num_heads=1,
        cross_attention_num_heads=2,
        cross_attention_every_n_layers=EVERY,
    )
    model = PerceiverFlamingoForConditionalGeneration(config).eval()
    spread_weights(model.bridge)
    torch.nn.init.normal_(model.language_model.model.embed_tokens.weight, std=0.1)
    model.vision_model.load_state_dict(clip.vision_model.state_dict())
    theirs = language.state_dict()
    theirs["lm_head.weight"] = torch.cat([theirs["lm_head.weight"], theirs["lm_head.weight"].mean(0).expand(2, -1)])
    theirs["model.embed_tokens.weight"] = model.language_model.model.embed_tokens.weight.detach().clone()
    model.language_model.load_state_dict(theirs)

    table = checkpoint_table(config, ["language_model.model.embed_tokens.weight"])
    trained = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("bridge.") or name == "language_model.model.embed_tokens.weight"
    }
    official = {name: piece.load(trained.__getitem__) for name, piece in plan(invert(table), trained).items()}
    first = {
        re.sub(r"model\.layers\.(\d+)\.gated_cross_attn_layer", r"gated_cross_attn_layers.\1", f"module.{name}"): tensor
        for name, tensor in official.items()
    }
    assert any("gated_cross_attn_layers.3." in name for name in first)
    buffer = "self_attn.rotary_emb.inv_freq"
    for layer in range(LAYERS):
        first[f"module.lang_encoder.model.layers.{layer}.decoder_layer.{buffer}"] = torch.ones(4)
        first[f"module.lang_encoder.old_decoder_blocks.{layer}.{buffer}"] = torch.ones(4)
    torch.save({"epoch": 3, "model_state_dict": first, "optimizer_state_dict": {"step": 1}}, folder / "checkpoint.pt")
    return folder, model


@pytest.mark.core
def test_the_first_release_comes_back(first_9b, tmp_path):
    folder, model = first_9b
    arguments = ["convert", "openflamingo", "--cross-attn-every-n-layers", str(EVERY)]
    for name, path in (
        ("checkpoint", "checkpoint.pt"),
        ("vision", "clip"),
        ("language", "llama"),
    ):
        arguments += [f"--{name}", str(folder / path)]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    loaded, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    inputs = processor.few_shot([{"image": tiny_image(0), "caption": "ab"}], {"image": tiny_image(1)})
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-6, rtol=0)
    assert loaded.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    # it is an ordinary model, which can be saved and loaded again
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**inputs).logits, loaded(**inputs).logits)


def test_a_config_file_tells_what_shapes_can_not(first_9b, tmp_path):
    folder, _ = first_9b
    settings = {"resampler_head_dim": 32, "cross_attention_head_dim": 16, "only_attend_immediate_media": False}
    done = convert_openflamingo(
        folder / "checkpoint.pt", folder / "clip", folder / "llama", tmp_path / "out", config=settings
    )
    assert (done.config.resampler_num_heads, done.config.cross_attention_num_heads) == (2, 8)
    assert not AutoModel.from_pretrained(tmp_path / "out").config.only_attend_immediate_media


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda first: first.pop("module.perceiver.norm.bias"), "missing: bridge.resampler.layer_norm.bias"),
        (lambda first: first.update({"module.perceiver.extra": torch.ones(1)}), "conversion table: perceiver.extra"),
        (lambda first: first.update({"module.perceiver.norm.bias": torch.ones(3)}), r"bias is \[3\], expected \[32\]"),
        (
            lambda first: first.update({"module.lang_encoder.model.embed_tokens.weight": torch.ones(104, WIDTH)}),
            "104 rows, but the tokenizer has 102 tokens",
        ),
    ],
)
def test_a_changed_checkpoint_is_refused(first_9b, tmp_path, change, message):
    folder, _ = first_9b
    first = torch.load(folder / "checkpoint.pt")["model_state_dict"]
    change(first)
    torch.save(first, tmp_path / "changed.pt")
    with pytest.raises(ConversionError, match=message):
        convert_openflamingo(tmp_path / "changed.pt", folder / "clip", folder / "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_parts_are_named(first_9b, tmp_path):
    folder, _ = first_9b
    with pytest.raises(ConversionError, match=r"before layers \[1, 3\]"):
        convert_openflamingo(
            folder / "checkpoint.pt", folder / "clip", folder / "llama", tmp_path / "out", cross_attn_every_n_layers=1
        )
    with pytest.raises(ConversionError, match="clip"):
        convert_openflamingo(folder / "checkpoint.pt", folder / "clip", folder / "clip", tmp_path / "out")
    for option, path in (("--checkpoint", "none.pt"), ("--config", "none.json")):
        arguments = {"--checkpoint": folder / "checkpoint.pt", "--vision": folder / "clip",
                     "--language": folder / "llama", "--output": tmp_path / "out", option: tmp_path / path}  # fmt: skip
        words = [str(word) for pair in arguments.items() for word in pair]
        done = CliRunner().invoke(app, ["convert", "openflamingo", *words])
        assert done.exit_code and path in done.output


def test_unknown_and_missing_keys_are_named(first_9b, tmp_path):
    folder, _ = first_9b
    torch.save({"perceiver.latents": torch.zeros(4, 32)}, tmp_path / "half.pt")
    with pytest.raises(ConversionError, match="no cross-attention for the layers of a llama"):
        convert_openflamingo(tmp_path / "half.pt", folder / "clip", folder / "llama", tmp_path / "out")
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ConversionError, match="not one of OpenFlamingo's"):
        convert_openflamingo(tmp_path / "other.pt", folder / "clip", folder / "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()
