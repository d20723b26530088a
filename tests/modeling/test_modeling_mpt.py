"""MPT and MPT-1B: against transformers' MPT, against the computation done slowly, and as every decoder must be."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import checkpoint_activations, needs_compile
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, MptConfig, StaticCache
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from vlbridge import PerceiverFlamingoForConditionalGeneration
from vlbridge.compat import cache_argument, cache_of
from vlbridge.configuration.configuration_mpt import MosaicGPTConfig
from vlbridge.modeling.modeling_mpt import (
    MosaicGPTForCausalLM,
    MptForCausalLM,
    alibi_mask,
    alibi_slopes,
    as_conditionable,
)


ATOL = 1e-5  # fp32, two layers; logits are of order 1
VOCAB = 60
SIZE = {"d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 32}

# transformers reads neither alibi_bias_max nor logit_scale of an MptConfig; the slow computation below does
MPT = {
    "plain": {},
    "six heads": {"n_heads": 6},
    "five heads": {"n_heads": 5, "d_model": 40},
    "twelve heads": {"n_heads": 12},
    "twenty heads": {"n_heads": 20, "d_model": 80},
    "clipped and scaled": {"attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.5}},
}
MOSAIC = {
    "plain": {},
    "six heads": {"n_heads": 6, "mlp_ratio": 3},
    "five heads": {"n_heads": 5, "d_model": 40},
    "twelve heads": {"n_heads": 12, "alibi_bias_max": 4},
    "twenty heads": {"n_heads": 20, "d_model": 80},
    "no layer norm of queries": {"attn_qk_ln": False, "attn_clip_qkv": 0.4},
    "scaled": {"softmax_scale": 0.5, "alibi_bias_max": 4, "logit_scale": "inv_sqrt_d_model"},
}
# what of the official config.json of MPT-1B changes no computation here
OFFICIAL = {
    "architectures": ["MosaicGPT"],
    "auto_map": {"AutoConfig": "configuration_mosaic_gpt.MosaicGPTConfig"},
    "emb_init_std": None,
    "fan_mode": "fan_in",
    "init_device": "cpu",
    "init_div_is_residual": True,
    "init_gain": 0,
    "low_precision_layernorm": True,
    "model_type": "mosaic_gpt",
    "param_init_fn": "kaiming_normal_",
    "torch_dtype": "float32",
    "verbose": 0,
}


@pytest.fixture(autouse=True, scope="module")
def registered():
    AutoConfig.register("mosaic_gpt", MosaicGPTConfig, exist_ok=True)
    AutoModelForCausalLM.register(MosaicGPTConfig, MosaicGPTForCausalLM, exist_ok=True)


def spread(model):
    """Weights large enough that a wrong mask shows, layer norms' included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.15, generator=generator)
    return model.eval()


def mpt(**options):
    return spread(MptForCausalLM(MptConfig(**{**SIZE, **options})))


def mosaic(**options):
    return spread(MosaicGPTForCausalLM(MosaicGPTConfig(**{**SIZE, **options})))


both = pytest.mark.parametrize("make", [mpt, mosaic])


def ragged():
    """Three rows, padded on the left."""
    ids = torch.randint(1, VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :9] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, **options):
    options = {"max_new_tokens": 9, "do_sample": False, "use_cache": True, "eos_token_id": None, **options}
    return model.generate(**ragged(), pad_token_id=0, **options)


# ---------------------------------------------------------------------- ALiBi


@pytest.mark.parametrize("alibi_bias_max", [8, 4])
@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 7, 12, 16, 33])
def test_slopes_are_those_of_transformers(num_heads, alibi_bias_max):
    expected = build_mpt_alibi_tensor(num_heads, 5, alibi_bias_max)  # (heads, 1, keys)
    torch.testing.assert_close(alibi_slopes(num_heads, alibi_bias_max), expected[:, 0, -1] - expected[:, 0, -2])


def official_slopes(num_heads: int, model_type: str, alibi_bias_max: float = 8) -> list[float]:
    """`gen_slopes` of llm-foundry (MPT-7B), and the lines of `alibi_bias` in mosaic_gpt (MPT-1B), as formulas."""
    if model_type == "mosaic_gpt":
        return [1 / 2 ** (head * alibi_bias_max / num_heads) for head in range(1, num_heads + 1)]
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [1 / 2 ** (head * alibi_bias_max / power) for head in range(1, power + 1)]
    return slopes if power == num_heads else (slopes[1::2] + slopes[::2])[:num_heads]


@pytest.mark.parametrize("num_heads", [4, 5, 6, 12, 20])
@both
@torch.no_grad()
def test_each_class_has_the_slopes_of_its_official_code(make, num_heads):
    """The mask that the layers get, and the weights that a query of zeros gives the keys."""
    model = make(n_heads=num_heads, d_model=4 * num_heads)
    slopes = torch.tensor(official_slopes(num_heads, model.config.model_type))
    mask = model.transformer.make_attention_mask(torch.zeros(1, 7, 4 * num_heads), None, None, None)
    distance = torch.arange(-6.0, 1)
    torch.testing.assert_close(mask[0, :, -1], slopes[:, None] * distance, atol=1e-6, rtol=1e-6)
    for block in model.transformer.blocks:
        block.attn.Wqkv.weight.zero_()
    weights = model(torch.ones(1, 7, dtype=torch.long), output_attentions=True).attentions[0][0, :, -1]
    torch.testing.assert_close(weights, (slopes[:, None] * distance).softmax(dim=-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tells_near_keys_apart_in_a_long_context(dtype):
    keys = 8192
    mask = alibi_mask(None, torch.tensor([keys - 2]), torch.arange(keys), alibi_slopes(4), dtype)
    assert mask.shape == (1, 4, 1, keys) and mask.dtype == dtype and mask.isfinite().all()
    near = torch.arange(-15, 1) * alibi_slopes(4)[:, None]  # slopes are powers of two: exact in either
    assert torch.equal(mask[0, :, 0, -17:-1], near.to(dtype))
    assert (mask[..., -1] == torch.finfo(dtype).min).all()


# ---------------------------------------------------------------------- MPT is transformers' MPT


@pytest.fixture(params=MPT.values(), ids=MPT)
def pair(request):
    theirs = spread(transformers.MptForCausalLM(MptConfig(**{**SIZE, **copy.deepcopy(request.param)})))
    return theirs, as_conditionable(theirs)


@pytest.mark.core
@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    theirs, ours = pair
    inputs = ragged()
    assert type(ours) is MptForCausalLM and ours.config._attn_implementation == "sdpa"
    torch.testing.assert_close(ours(inputs["input_ids"]).logits, theirs(inputs["input_ids"]).logits, atol=ATOL, rtol=0)
    seen = inputs["attention_mask"].bool()
    expected = theirs(**inputs, labels=inputs["input_ids"])
    found = ours(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(found.logits[seen], expected.logits[seen], atol=ATOL, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss)
    embeds = ours.get_input_embeddings()(inputs["input_ids"])
    again = ours(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(again, found.logits, atol=0, rtol=0)


@torch.no_grad()
def test_a_cache_filled_in_steps_is_that_of_transformers(pair):
    theirs, ours = pair
    ids, mask = ragged().values()
    for model in pair:  # each from its own cache
        cache, logits = DynamicCache(config=model.config), []
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 11)):
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], **cache_argument(cache), use_cache=True
            )  # fmt: skip
            logits.append(out.logits)
        assert cache_of(out) is cache and cache.get_seq_length() == 11
        whole = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(torch.cat(logits, dim=1)[mask.bool()], whole[mask.bool()], atol=ATOL, rtol=0)


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_transformers(pair):
    theirs, ours = pair
    ids = ragged()["input_ids"]
    expected = theirs(ids, output_hidden_states=True, output_attentions=True)
    found = ours(ids, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == SIZE["n_layers"] + 1 and len(found.attentions) == SIZE["n_layers"]
    for name in ("hidden_states", "attentions"):
        for one, other in zip(found[name], expected[name]):
            torch.testing.assert_close(one, other, atol=ATOL, rtol=1e-5)
    assert ours(ids).attentions is None


@pytest.mark.core
def test_generation_is_that_of_transformers(pair):
    theirs, ours = pair
    for options in ({}, {"num_beams": 3, "length_penalty": 0.0}):
        assert torch.equal(generate(ours, **options), generate(theirs, **options))


# ---------------------------------------------------------------------- MPT-1B is the slow, obvious computation


def slow_layer_norm(states, weight):
    centred = states - states.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight


def slow_mosaic_gpt(weights: dict, config: MosaicGPTConfig, ids: list[int]) -> torch.Tensor:
    """Logits `(tokens, vocab_size)` of one row, token by token and head by head."""
    heads, head_dim = config.n_heads, config.d_model // config.n_heads
    slopes = [1 / 2 ** (number * config.alibi_bias_max / heads) for number in range(1, heads + 1)]  # for any number
    scale = config.softmax_scale or 1 / math.sqrt(head_dim)
    hidden = weights["transformer.wte.weight"][ids]
    for number in range(config.n_layers):
        layer = {
            name.removeprefix(f"transformer.blocks.{number}."): weight
            for name, weight in weights.items()
            if name.startswith(f"transformer.blocks.{number}.")
        }
        fused = slow_layer_norm(hidden, layer["ln_1.weight"]) @ layer["attn.Wqkv.weight"].T
        if config.attn_clip_qkv:
            fused = fused.clamp(min=-config.attn_clip_qkv, max=config.attn_clip_qkv)
        query, key, value = (fused[:, part * config.d_model : (part + 1) * config.d_model] for part in range(3))
        if config.attn_qk_ln:
            query = slow_layer_norm(query, layer["attn.q_ln.weight"])
            key = slow_layer_norm(key, layer["attn.k_ln.weight"])
        attended = torch.zeros_like(hidden)
        for head in range(heads):
            channels = slice(head * head_dim, (head + 1) * head_dim)
            for token in range(len(ids)):
                scores = torch.stack(
                    [
                        query[token, channels] @ key[other, channels] * scale - slopes[head] * (token - other)
                        for other in range(token + 1)
                    ]
                )
                exponentials = (scores - scores.max()).exp()
                attended[token, channels] = exponentials / exponentials.sum() @ value[: token + 1, channels]
        hidden = hidden + attended @ layer["attn.out_proj.weight"].T
        inner = slow_layer_norm(hidden, layer["ln_2.weight"]) @ layer["mlp.mlp_up.weight"].T
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        hidden = hidden + inner @ layer["mlp.mlp_down.weight"].T
    logits = slow_layer_norm(hidden, weights["transformer.ln_f.weight"]) @ weights["transformer.wte.weight"].T
    return logits / math.sqrt(config.d_model) if config.logit_scale else logits


@pytest.mark.parametrize("options", MOSAIC.values(), ids=MOSAIC)
@torch.no_grad()
def test_mosaic_gpt_is_the_slow_obvious_computation(options):
    model = mosaic(**options)
    inputs = ragged()
    logits = model(**inputs).logits
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"])):
        expected = slow_mosaic_gpt(model.state_dict(), model.config, ids[mask.bool()].tolist())
        torch.testing.assert_close(logits[row, mask.bool()], expected, atol=ATOL, rtol=0)


# ---------------------------------------------------------------------- checkpoints


def official_names(config):
    layer = ["ln_1", "attn.Wqkv", "attn.q_ln", "attn.k_ln", "attn.out_proj", "ln_2", "mlp.mlp_up", "mlp.mlp_down"]
    names = {"transformer.wte.weight", "transformer.ln_f.weight"}
    return names | {f"transformer.blocks.{k}.{name}.weight" for k in range(config.n_layers) for name in layer}


def assert_clean(info):
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info


def equal_logits(one, other):
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(**ragged()).logits, other.eval()(**ragged()).logits, atol=0, rtol=0)


@pytest.mark.core
@both
def test_save_and_load(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")  # tied
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    equal_logits(loaded, model)


@pytest.mark.core
def test_transformers_checkpoints_load_and_ours_load_there(tmp_path):
    theirs = spread(transformers.MptForCausalLM(MptConfig(**SIZE)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = MptForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert_clean(info)
    ours.save_pretrained(tmp_path / "ours")
    back, info = transformers.MptForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert_clean(info)
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_mosaicml_layouts_load(tmp_path):
    """As on the Hub: `pytorch_model.bin` without a head, and a configuration with keys that nobody reads."""
    model = mosaic()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert state.keys() == official_names(model.config)
    torch.save(state, tmp_path / "pytorch_model.bin")
    settings = {
        name: getattr(model.config, name) for name in (*SIZE, "alibi", "attn_qk_ln", "no_bias", "softmax_scale")
    }
    (tmp_path / "config.json").write_text(json.dumps({**OFFICIAL, **settings, "use_cache": False}))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert type(loaded) is MosaicGPTForCausalLM and loaded.config.param_init_fn == "kaiming_normal_"
    equal_logits(loaded, model)

    model = mpt()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    torch.save(state, tmp_path / "pytorch_model.bin")
    settings = {**SIZE, "model_type": "mpt", "architectures": ["MPTForCausalLM"], "init_config": {"init_gain": 0}}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "attn_config": {"attn_pdrop": 0, "alibi": True}}))
    loaded, info = MptForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    equal_logits(loaded, model)


def test_mpt_with_layer_norm_of_queries_has_the_official_names():
    model = mpt(attn_config={"qk_ln": True})
    added = {"transformer.blocks.0.attn.q_ln.weight", "transformer.blocks.1.attn.k_ln.weight"}
    assert added <= model.state_dict().keys()
    # the same computation as MPT-1B's, under other names
    renamed = {
        "norm_1": "ln_1",
        "norm_2": "ln_2",
        "ffn.up_proj": "mlp.mlp_up",
        "ffn.down_proj": "mlp.mlp_down",
        "norm_f": "ln_f",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        state[name] = tensor
    other = mosaic()
    other.load_state_dict(state)
    equal_logits(model, other)


def test_config_has_the_usual_names(tmp_path):
    config = MosaicGPTConfig(**{**SIZE, **OFFICIAL})
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (48, 4, 2)
    assert config.max_position_embeddings == 32
    assert MosaicGPTConfig(hidden_size=32, num_hidden_layers=3).n_layers == 3
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MosaicGPTConfig and loaded.fan_mode == "fan_in"
    loaded.name_or_path = config.name_or_path
    assert loaded.to_dict() == config.to_dict()


# ---------------------------------------------------------------------- as_conditionable


def test_as_conditionable_keeps_parameters_and_the_rest():
    theirs = spread(transformers.MptForCausalLM(MptConfig(**SIZE))).train()
    theirs.transformer.blocks[0].requires_grad_(False)
    theirs.generation_config.max_new_tokens = 17
    theirs.name_or_path = "some/where"
    flags = {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}
    ours = as_conditionable(theirs)
    shared = dict(theirs.named_parameters())
    assert shared.keys() == dict(ours.named_parameters()).keys()
    assert all(parameter is shared[name] for name, parameter in ours.named_parameters())
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert {name: parameter.requires_grad for name, parameter in ours.named_parameters()} == flags
    assert ours.generation_config.max_new_tokens == 17 and ours.name_or_path == "some/where" and ours.training
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert theirs.config._attn_implementation == "eager"  # the original still works
    half = as_conditionable(theirs.eval().to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and not half.training


def test_as_conditionable_gives_other_models_back():
    for model in (
        mpt(),
        mosaic(),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2)),
    ):
        assert as_conditionable(model) is model


def test_as_conditionable_refuses_what_it_would_lose():
    model = transformers.MptForCausalLM(MptConfig(**SIZE, attn_config={"qk_ln": True}))
    with pytest.raises(ValueError, match="q_ln.*If transformers left some out"):
        as_conditionable(model)
    model = transformers.MptForCausalLM(MptConfig(**SIZE))
    model.hf_device_map = {"transformer": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match="distributed over devices"):
        as_conditionable(model)
    model = transformers.MptForCausalLM(MptConfig(**SIZE))
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantised"):
        as_conditionable(model)
    model = transformers.MptForCausalLM(MptConfig(**SIZE))
    model.transformer.blocks[1].attn.Wqkv.register_parameter("lora", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="lora"):
        as_conditionable(model)


# ---------------------------------------------------------------------- keyword arguments


@both
@pytest.mark.parametrize("checkpointing", [False, True])
def test_keyword_arguments_reach_every_layer(make, checkpointing):
    model = make()
    if checkpointing:
        checkpoint_activations(model)
        model.train()
    marker, seen = object(), []
    for layer in model.transformer.blocks:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module, args[0].shape, kwargs["conditioning"])), with_kwargs=True
        )
    model(**ragged(), labels=ragged()["input_ids"], conditioning=marker)
    assert [module for module, _, _ in seen] == list(model.transformer.blocks)
    assert all(shape == (3, 11, 48) and value is marker for _, shape, value in seen)


def test_the_perceiver_bridge_accepts_mosaic_gpt():
    PerceiverFlamingoForConditionalGeneration.check_language_model(mosaic())


# ---------------------------------------------------------------------- masks


@both
@torch.no_grad()
def test_batch_equals_single(make):
    model = make()
    inputs = ragged()
    together = model(**inputs).logits
    assert together.isfinite().all()  # padding too
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model(inputs["input_ids"][row, mask][None]).logits[0]
        torch.testing.assert_close(together[row, mask], alone, atol=ATOL, rtol=0)


@both
@torch.no_grad()
def test_masks_in_four_dimensions(make):
    model = make()
    ids, mask = ragged().values()
    expected = model(ids, attention_mask=mask).logits
    causal = torch.ones(11, 11, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]  # (batch, 1, queries, keys)
    for implementation, lowest in itertools.product(("eager", "sdpa"), (-torch.inf, torch.finfo().min, -1e9)):
        model.set_attn_implementation(implementation)
        added = torch.zeros(causal.shape).masked_fill(~causal, lowest)
        found = model(ids, attention_mask=added).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=ATOL, rtol=0)
        assert found.isfinite().all()
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match="torch.int64; expected bool"):
        model(ids, attention_mask=causal.long())
    with pytest.raises(ValueError, match="10 keys, but there are 11"):
        model(ids, attention_mask=causal[..., :10])


@both
@torch.no_grad()
def test_packed_branches_are_as_far_from_their_prefix_as_alone(make):
    """Two continuations of one prefix in one row; positions say where a token stands, not its slot."""
    model = make()
    ids = ragged()["input_ids"][0]
    prefix, one, other = ids[:4], ids[4:8], ids[8:]
    branch = torch.tensor([0] * 4 + [1] * 4 + [2] * 3)
    mask = ((branch[:, None] == branch) | (branch == 0)).tril()[None, None]
    positions = torch.cat((torch.arange(8), torch.arange(4, 7)))[None]
    packed = model(ids[None], attention_mask=mask, position_ids=positions).logits[0]
    for tail, found in ((one, packed[4:8]), (other, packed[8:])):
        alone = model(torch.cat((prefix, tail))[None]).logits[0, 4:]
        torch.testing.assert_close(found, alone, atol=ATOL, rtol=0)


@both
@torch.no_grad()
def test_eager_is_sdpa(make):
    model = make()
    inputs = ragged()
    expected = model(**inputs, output_attentions=True)
    for weights in expected.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 4, 11))
        assert (weights[1, :, 4:, :4] == 0).all()  # padding
    plain = model(**inputs)
    assert plain.attentions is None
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_hidden_states=True)
    assert len(eager.hidden_states) == 3
    for logits in (expected.logits, eager.logits):
        torch.testing.assert_close(logits, plain.logits, atol=ATOL, rtol=0)


# ---------------------------------------------------------------------- generation


@pytest.mark.core
@both
def test_every_cache_gives_the_tokens_of_the_slow_obvious_loop(make):
    model = make()
    ids, mask = ragged().values()
    with torch.no_grad():
        for _ in range(9):
            chosen = model(ids, attention_mask=mask, use_cache=False).logits[:, -1:].argmax(dim=-1)
            ids, mask = torch.cat((ids, chosen), dim=1), torch.nn.functional.pad(mask, (0, 1), value=1)
    assert len(ids[:, -9:].unique()) > 5  # not the same token again and again
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in ({}, {"use_cache": False}, static):
        assert torch.equal(generate(model, **options), ids), options
        model.set_attn_implementation("eager")
        assert torch.equal(generate(model, **options), ids), options
        model.set_attn_implementation("sdpa")


@pytest.mark.core
@both
def test_beams_with_every_cache(make):
    model = make()
    beams = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    expected = generate(model, **beams, use_cache=False)
    assert torch.equal(generate(model, **beams), expected)
    assert torch.equal(generate(model, **beams, cache_implementation="static", disable_compile=True), expected)


@needs_compile
@both
@torch.no_grad()
def test_decoding_with_a_static_cache_compiles_into_one_graph(make):
    torch.compiler.reset()
    model = make()
    ids, mask = ragged().values()
    expected = generate(model)[:, -9:]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=24)
    mask = torch.nn.functional.pad(mask, (0, 13), value=1)  # all slots: its shape does not change
    tokens = [model(ids, attention_mask=mask, **cache_argument(cache)).logits[:, -1:].argmax(dim=-1)]
    for _ in range(8):
        logits = compiled(tokens[-1], attention_mask=mask, **cache_argument(cache), use_cache=True).logits
        tokens.append(logits[:, -1:].argmax(dim=-1))
    assert torch.equal(torch.cat(tokens, dim=1), expected)
    assert len(graphs) == 1


@both
@torch.no_grad()
def test_logits_to_keep(make):
    model = make()
    logits = model(**ragged()).logits
    torch.testing.assert_close(model(**ragged(), logits_to_keep=2).logits, logits[:, -2:], atol=ATOL, rtol=0)
    torch.testing.assert_close(
        model(**ragged(), logits_to_keep=torch.tensor([3, 7])).logits, logits[:, [3, 7]], atol=ATOL, rtol=0
    )


# ---------------------------------------------------------------------- training


@both
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(make, use_reentrant):
    model = make().train()
    gradients, runs = [], []
    model.transformer.blocks[0].attn.Wqkv.register_forward_hook(lambda *_: runs.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model, use_reentrant=use_reentrant)
        model.zero_grad()
        runs.clear()
        model(**ragged(), labels=ragged()["input_ids"]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert len(runs) == 1 + checkpointing
    for one, other in zip(*gradients):
        assert one.isfinite().all() and one.abs().sum() > 0
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["emb_pdrop", "resid_pdrop", "attn_pdrop"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_dropout_in_training_only(name, implementation):
    model = mosaic(**{name: 0.5})
    model.set_attn_implementation(implementation)
    ids = ragged()["input_ids"]
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)
    if name != "attn_pdrop":  # MptConfig takes whole numbers only for that
        model = mpt(**{name: 0.5}).train()
        assert not torch.allclose(model(ids).logits, model(ids).logits)


@both
@torch.no_grad()
def test_residual_dropout_is_on_attention_and_feed_forward(make):
    model = make(resid_pdrop=1.0).train()  # nothing is added to the embeddings
    embeds = model.transformer.wte(ragged()["input_ids"])
    final_norm = getattr(model.transformer, model.transformer.final_norm)
    torch.testing.assert_close(model(**ragged()).logits, model.lm_head(final_norm(embeds)), atol=0, rtol=0)


@both
def test_resizing_the_table_keeps_the_head_tied(make):
    model = make()
    assert model.get_input_embeddings() is model.transformer.wte and model.get_output_embeddings() is model.lm_head
    before = model(**ragged()).logits
    model.resize_token_embeddings(VOCAB + 3)
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.vocab_size == VOCAB + 3
    out = model(**ragged(), labels=ragged()["input_ids"])
    assert out.logits.shape[-1] == VOCAB + 3 and out.loss.isfinite()
    torch.testing.assert_close(out.logits[..., :VOCAB], before, atol=ATOL, rtol=0)


# ---------------------------------------------------------------------- half precision


@both
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(make, dtype, implementation):
    model = make()
    inputs = ragged()
    inputs["attention_mask"][2] = 0  # a row of padding alone
    seen = inputs["attention_mask"].bool()
    expected = model(**inputs).logits
    model.set_attn_implementation(implementation)
    half = copy.deepcopy(model).to(dtype)
    assert half(**inputs).logits.dtype == dtype
    with torch.autocast("cpu", dtype):
        mixed = model(**inputs).logits
        mask = model.transformer.make_attention_mask(torch.zeros(3, 11, 48), inputs["attention_mask"], None, None)
        assert mask.dtype == dtype and mask.isfinite().all()  # float32's lowest number would become -inf
    for logits in (half(**inputs).logits.float(), mixed.float()):
        assert logits.isfinite().all()
        # bf16 keeps 8 bits: a few per cent of the logits' spread after two layers
        assert (logits - expected)[seen].abs().max() < 0.1 * expected.std()
    cached = half.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0)
    assert cached.shape[1] > inputs["input_ids"].shape[1]


# ---------------------------------------------------------------------- what is not supported


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alibi", False),
        ("prefix_lm", True),
        ("attn_uses_sequence_id", True),
        ("no_bias", False),
        ("embedding_fraction", 0.5),
    ],
)
def test_unsupported_settings_are_refused(name, value):
    supported = {"no_bias": "True", "alibi": "True", "embedding_fraction": "1.0"}.get(name, "False")
    message = rf"mosaic_gpt with {name}={value} is not supported.* only {name}={supported}"
    with pytest.raises(ValueError, match=message):
        MosaicGPTForCausalLM(MosaicGPTConfig(**SIZE, **{name: value}))
    inner = name not in ("no_bias", "embedding_fraction")
    config = MptConfig(**SIZE, **({"attn_config": {name: value}} if inner else {name: value}))
    with pytest.raises(ValueError, match=rf"mpt with (attn_config\.)?{name}={value} is not supported.*={supported}"):
        MptForCausalLM(config)


def test_other_settings_that_are_refused():
    with pytest.raises(ValueError, match="attn_type='multiquery_attention' is not supported"):
        MptForCausalLM(MptConfig(**SIZE, attn_config={"attn_type": "multiquery_attention"}))
    with pytest.raises(ValueError, match="norm_type='rmsnorm' is not supported"):
        MptForCausalLM(MptConfig(**SIZE, norm_type="rmsnorm"))
    with pytest.raises(ValueError, match="d_model=48 can't be divided among n_heads=5"):
        mosaic(n_heads=5)
    with pytest.raises(ValueError, match="logit_scale='sqrt'; expected a number"):
        mosaic(logit_scale="sqrt")
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        mpt()(**ragged(), inputs_embeds=torch.zeros(3, 11, 48))


def test_the_official_choice_of_kernel_is_not_read():
    equal_logits(mosaic(attn_impl="triton"), mosaic())
