"""Transplanted bridges: exact where the new language model is a change of basis, runnable wherever it can be done."""

from __future__ import annotations

import json
import math
import string

import pytest
import torch
from tiny import BRIDGE_OPTIONS, LANGUAGE, SMALL, TOKENS, tiny_bridge_folder, tiny_image, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import vlbridge
from vlbridge.cli import app
from vlbridge.transplant import _cross_attention_interval, fit_embedding_map, token_strings, transplant


IN_TOKENS = ["mlp", "qformer"]
KEPT = 70  # characters that both vocabularies have


def wordlevel(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def other_tokenizer() -> PreTrainedTokenizerFast:
    """`KEPT` of the tiny tokenizer's characters in another order, among Greek letters."""
    kept = [
        string.printable[:96][index] for index in torch.randperm(96, generator=torch.Generator().manual_seed(3))[:KEPT]
    ]
    greek = [chr(0x391 + index) for index in range(96 - KEPT)]
    mixed = [letter for pair in zip(kept, greek) for letter in pair] + kept[len(greek) :]
    return wordlevel(["<pad>", "<s>", "</s>", "<unk>", *mixed])


def in_another_basis(old: LlamaForCausalLM, width: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The same function of the same strings, in a rotated residual stream that may be wider, with other token ids.

    An RMS norm is the same in every orthonormal basis once its gain is moved into what reads it, and a wider stream
    takes a factor for the zeros in it.
    """
    config = LlamaConfig(
        **{**SMALL, "hidden_size": width}, **TOKENS, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        rms_norm_eps=old.config.rms_norm_eps,
    )  # fmt: skip
    new = LlamaForCausalLM(config).eval()
    narrow = old.config.hidden_size
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:, :narrow]  # (width, narrow)
    before = tiny_tokenizer().get_vocab()
    rows = torch.tensor(
        [before.get(token, -1) for token in tokenizer.convert_ids_to_tokens(range(TOKENS["vocab_size"]))]
    )
    weights = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            gain = weights[f"{layer}{norm}.weight"]
            for reader in readers:
                weights[f"{layer}{reader}.weight"] = weights[f"{layer}{reader}.weight"] * gain @ basis.T
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"{layer}{writer}.weight"] = basis @ weights[f"{layer}{writer}.weight"]
    tables = {
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"] @ basis.T,
        "lm_head.weight": weights["lm_head.weight"] * weights["model.norm.weight"] @ basis.T,
    }
    for name, table in tables.items():
        strange = torch.randn(table.shape, generator=generator)  # of tokens that the old model does not have
        weights[name] = torch.where((rows >= 0)[:, None], table[rows.clamp(min=0)], strange)
    for name in weights:
        if "norm" in name:
            weights[name] = torch.full((width,), math.sqrt(narrow / width))
    new.load_state_dict(weights)
    return new


def logits_of(model, processor, text: str = "<image>what is it") -> dict[str, torch.Tensor]:
    """Scores of every ordinary token at every place, by the token's string."""
    inputs = processor(images=[tiny_image()], text=[text], return_tensors="pt")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    rows = model.get_input_embeddings().num_embeddings
    return {text: logits[:, index] for text, index in token_strings(processor.tokenizer, rows).items()}


@pytest.mark.core
@pytest.mark.parametrize("width", [32, 48])
@pytest.mark.parametrize("bridge", IN_TOKENS)
def test_a_change_of_basis_is_exact(bridge, width):
    """Another basis, another width, other ids, a vocabulary that is shared in part: the logits stay."""
    old = tiny_model(bridge)
    tokenizer = other_tokenizer()
    done = transplant(old, in_another_basis(old[0].language_model, width, tokenizer), tokenizer=tokenizer)
    assert done.report["shared_tokens"] == KEPT
    assert done.report["explained_variance"] > 1 - 1e-6 and done.report["ridge"] == 0.0
    text = "<image>" + "".join(token for token in tokenizer.get_vocab() if token in string.ascii_lowercase)
    before, after = logits_of(*old, text), logits_of(done.model, done.processor, text)
    shared = before.keys() & after.keys()
    assert len(shared) == KEPT
    for token in shared:
        torch.testing.assert_close(after[token], before[token], atol=2e-4, rtol=1e-4)  # fp32, through two layers


@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_onto_the_same_model_nothing_changes(bridge):
    model, processor = tiny_model(bridge)
    same = LlamaForCausalLM(model.language_model.config)
    same.load_state_dict(model.language_model.state_dict())
    done = transplant((model, processor), same.eval(), tokenizer=tiny_tokenizer())
    before, after = logits_of(model, processor), logits_of(done.model, done.processor)
    for token in before:
        torch.testing.assert_close(after[token], before[token], atol=1e-4, rtol=1e-4)
    assert done.processor.caption_prompt == processor.caption_prompt
    assert {name for name, each in done.model.named_parameters() if each.requires_grad} == {
        f"bridge.{name}" for name, _ in done.model.bridge.named_parameters()
    }


@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_the_image_still_counts_for_more_than_chance(bridge):
    """A fresh bridge on the new model knows nothing; a transplanted one gives what the old one gives, mapped."""
    model, processor = tiny_model(bridge)
    tokenizer = other_tokenizer()
    new = in_another_basis(model.language_model, 48, tokenizer)
    done = transplant((model, processor), new, tokenizer=tokenizer)
    fresh, _ = vlbridge.compose(model.vision_model, new, bridge, tokenizer=tokenizer, **BRIDGE_OPTIONS[bridge])
    before = logits_of(model, processor)

    def distance(other) -> float:
        after = logits_of(other, done.processor)
        return sum((after[token] - before[token]).square().sum().item() for token in before.keys() & after.keys())

    assert distance(done.model) < 0.5 * distance(fresh)


@pytest.mark.parametrize("width, depth", [(24, 4), (48, 1)])
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_saved_and_loaded_by_auto_model(bridge, width, depth, tmp_path):
    tiny_bridge_folder(tmp_path, bridge)
    torch.manual_seed(5)
    config = LlamaConfig(
        **{**SMALL, "hidden_size": width, "num_hidden_layers": depth}, **TOKENS, max_position_embeddings=512
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "new")
    other_tokenizer().save_pretrained(tmp_path / "new")
    command = ["transplant", str(tmp_path / "bridge"), "--language", str(tmp_path / "new")]
    output = tmp_path / "moved"
    ran = CliRunner().invoke(app, [*command, "--output", str(output)])
    assert ran.exit_code == 0, ran.output
    assert f"{KEPT} tokens" in ran.output
    done = transplant(tmp_path / "bridge", tmp_path / "new")
    moved, its_processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    assert moved.config.text_config.hidden_size == width
    assert moved.config.frozen_parts["language_model"]["source"] == str(tmp_path / "new")
    assert moved.config.frozen_parts["vision_model"]["sha256"]
    expected, given = logits_of(done.model, done.processor), logits_of(moved, its_processor)
    for token in expected:
        assert expected[token].isfinite().all()
        torch.testing.assert_close(given[token], expected[token])
    assert its_processor.tokenizer.get_vocab() == done.processor.tokenizer.get_vocab()
    summary = json.loads((output / "training_summary.json").read_text())
    assert summary["transplant"] == done.report and str(tmp_path) not in json.dumps(summary)
    card = (output / "README.md").read_text()
    assert "# moved\n" in card and "| language model | new |" in card
    assert f"{done.report['explained_variance']:.1%} of the variance" in card
    again = CliRunner().invoke(app, [*command, "--output", str(output)])
    assert again.exit_code == 1 and "exists already" in again.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bridge", "eye", "moved", "new", "old"]


@pytest.mark.parametrize("there, back", [("llama", "t5"), ("t5", "opt"), ("opt", "llama_tied")])
@pytest.mark.parametrize("bridge", IN_TOKENS)
def test_encoder_decoders_and_decoders_follow_each_other(bridge, there, back):
    torch.manual_seed(0)
    done = transplant(tiny_model(bridge, there), LANGUAGE[back](), tokenizer=tiny_tokenizer())
    assert done.model.config.is_encoder_decoder == (back == "t5")
    assert all(score.isfinite().all() for score in logits_of(done.model, done.processor).values())


def test_what_a_perceiver_can_not_be_moved_to():
    with pytest.raises(ValueError, match="can't be conditioned by a perceiver bridge|decoder"):
        transplant(tiny_model("perceiver"), LANGUAGE["t5"](), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="embeddings of 24 and hidden states of 32"):
        transplant(tiny_model("perceiver"), LANGUAGE["opt"](), tokenizer=tiny_tokenizer())


def test_what_can_not_be_moved_at_all(tmp_path):
    with pytest.raises(ValueError, match="projector_type='identity'"):
        transplant(tiny_model("mlp", projector_type="identity"), LANGUAGE["llama"](), tokenizer=tiny_tokenizer())
    greek = wordlevel(["<pad>", "<s>", "</s>", "<unk>", *(chr(0x391 + index) for index in range(24)), *string.digits])
    with pytest.raises(ValueError, match="share 10 tokens, too few for a map from 32 dimensions"):
        transplant(tiny_model("mlp"), LANGUAGE["llama"](), tokenizer=greek)
    done = transplant(tiny_model("mlp"), LANGUAGE["llama"](), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="needs to know where the vision_model comes from"):
        done.save(tmp_path / "moved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [
    {"image_aspect_ratio": "anyres", "vision_feature_layer": -2},
    {"projector_type": "linear", "projector_bias": False},
    {"projector_type": "mlp3x_gelu", "projector_hidden_size": 20},
])  # fmt: skip
def test_every_mlp_keeps_its_settings(options):
    old = tiny_model("mlp", **options)
    tokenizer = other_tokenizer()
    done = transplant(old, in_another_basis(old[0].language_model, 48, tokenizer), tokenizer=tokenizer)
    for name in ("image_grid_pinpoints", "vision_feature_layer", "projector_type", "projector_bias"):
        assert getattr(done.model.config, name) == getattr(old[0].config, name)
    assert done.processor.image_aspect_ratio == old[1].image_aspect_ratio
    before, after = logits_of(*old), logits_of(done.model, done.processor)
    for token in before.keys() & after.keys():
        assert before[token].shape == after[token].shape
        # characters that the new vocabulary does not have are unknown to it: compared where the image is seen alone
        torch.testing.assert_close(after[token][:20], before[token][:20], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("old_layers, every, new_layers, expected", [
    (32, 4, 32, 4), (24, 1, 24, 1), (30, 10, 30, 10), (24, 4, 48, 8), (32, 4, 16, 2), (24, 2, 6, 1),
])  # fmt: skip
def test_blocks_are_spread_as_before(old_layers, every, new_layers, expected):
    old = vlbridge.PerceiverFlamingoConfig(
        text_config=LlamaConfig(num_hidden_layers=old_layers), cross_attention_every_n_layers=every
    )
    assert _cross_attention_interval(old, LlamaConfig(num_hidden_layers=new_layers)) == expected


def test_the_map():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(200, 12, generator=generator)
    matrix, offset = torch.randn(7, 12, generator=generator), torch.randn(7, generator=generator)
    found = fit_embedding_map(old, old @ matrix.T + offset)
    torch.testing.assert_close(found.matrix.float(), matrix)
    torch.testing.assert_close(found.offset.float(), offset)
    assert found.explained_variance > 1 - 1e-9 and found.num_tokens == 200
    without = fit_embedding_map(old, old @ matrix.T, intercept=False)
    torch.testing.assert_close(without(old), old @ matrix.T)
    assert not without.offset.any()
    unrelated = fit_embedding_map(old, torch.randn(200, 7, generator=generator))
    assert unrelated.explained_variance < 0.1 and unrelated.ridge > 0
    noisy = fit_embedding_map(old, old @ matrix.T + torch.randn(200, 7, generator=generator))
    assert 0.7 < noisy.explained_variance < 0.99


def test_tokens_are_the_same_however_they_are_written():
    letters = {"Ġthe": 0, "the": 1, "Ã©": 2, "Ċ": 3, "Ġ": 4}
    of_bytes = Tokenizer(models.BPE(vocab=letters, merges=[]))
    of_bytes.decoder = decoders.ByteLevel()
    pieces = {"<unk>": 0, "▁the": 1, "é": 2, "<0x0A>": 3, "▁": 4, "the": 5, "</s>": 6}
    of_pieces = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    of_pieces.decoder = decoders.Replace("▁", " ")
    one = token_strings(PreTrainedTokenizerFast(tokenizer_object=of_bytes), 5)
    other = token_strings(
        PreTrainedTokenizerFast(tokenizer_object=of_pieces, unk_token="<unk>", eos_token="</s>"), num_rows=7
    )
    assert one == {b" the": 0, b"the": 1, "é".encode(): 2, b"\n": 3, b" ": 4}
    assert other == {b" the": 1, "é".encode(): 2, b"\n": 3, b" ": 4, b"the": 5}
    assert b"the" not in token_strings(PreTrainedTokenizerFast(tokenizer_object=of_pieces), num_rows=5)
