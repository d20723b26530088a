"""The ways of generating that `GenerationMixin` has, for every family, against a plain loop or transformers' LLaVA.

More of them: `test_modeling_families.py` (caches, chunks with images), `test_modeling_placeholders.py`, and drafted and
guided tokens in `test_modeling_drafts_and_guidance.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import pickle
import threading

import pytest
import torch
from generation_loops import FAMILIES, NEW, TEXTS, endless, inputs_of, loop, new_tokens, next_outputs, next_scores
from tiny import LANGUAGE, VISION, needs_compile, spread_weights, tiny_tokenizer
from transformers import (
    CompileConfig,
    GenerationMixin,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkDetector,
    WatermarkingConfig,
)

import vlbridge
from vlbridge.modeling.modeling_bridged import BridgedOutput
from vlbridge.modeling.modeling_logits import NeverGenerated


ATOL = 1e-4  # fp32, two layers; padding and caches change the order of summation


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def composed(request):
    return endless(*request.param)


# ---------------------------------------------------------------------- against a plain loop


@pytest.mark.core
def test_greedy_of_a_ragged_batch(composed):
    model, processor = composed
    inputs = inputs_of(processor)
    assert torch.equal(new_tokens(model, inputs), loop(model, inputs))


@pytest.mark.core
def test_sampling_draws_what_a_loop_draws(composed):
    model, processor = composed
    inputs = inputs_of(processor)

    def draw(scores):
        scores = scores / 0.7
        scores[scores < scores.topk(9).values[:, -1:]] = -torch.inf
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]

    torch.manual_seed(5)
    found = new_tokens(model, inputs, do_sample=True, temperature=0.7, top_k=9)
    torch.manual_seed(5)
    assert torch.equal(found, loop(model, inputs, draw))


def slow_beams(model, inputs, beams: int) -> torch.Tensor:
    """All beams of one row, the best first, without lengths to reward and without an end."""
    written, totals = torch.empty(1, 0, dtype=torch.long), torch.zeros(1)
    for _ in range(NEW):
        scores = torch.cat([next_scores(model, inputs, beam[None]).log_softmax(dim=-1) for beam in written])
        totals, places = (totals[:, None] + scores).flatten().topk(beams)
        rows, tokens = places // scores.shape[1], places % scores.shape[1]
        written = torch.cat([written[rows], tokens[:, None]], dim=1)
    return written


@pytest.mark.core
def test_beams_and_how_many_are_returned(composed):
    model, processor = composed
    found = new_tokens(model, inputs_of(processor), num_beams=3, num_return_sequences=2).unflatten(0, (2, 2))
    for row, images in ((0, slice(0, 1)), (1, slice(1, 3))):
        inputs = inputs_of(processor, TEXTS[row : row + 1])
        inputs["pixel_values"] = inputs_of(processor)["pixel_values"][images]
        assert torch.equal(found[row], slow_beams(model, inputs, 3)[:2])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["sampling", "beam sampling"])
def test_several_samples_are_the_same_without_a_cache(composed, options):
    model, processor = composed
    inputs = inputs_of(processor)
    options = {**options, "do_sample": True, "num_return_sequences": 3}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(2)
        found.append(new_tokens(model, inputs, use_cache=use_cache, **options))
    assert found[0].shape[0] == 6 and torch.equal(*found)


@pytest.mark.core
def test_scores_logits_and_hidden_states(composed):
    model, processor = composed
    inputs = inputs_of(processor)
    out = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True,
        output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    written = out.sequences[:, -3:]
    states = "decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
    for step in range(3):
        slow = next_outputs(model, inputs, written[:, :step], output_hidden_states=True)
        columns = slow.logits.shape[-1]
        torch.testing.assert_close(out.logits[step][:, :columns], slow.logits[:, -1], atol=ATOL, rtol=0)
        torch.testing.assert_close(out.scores[step], next_scores(model, inputs, written[:, :step]), atol=ATOL, rtol=0)
        for one, other in zip(out[states][step], slow[states], strict=True):
            torch.testing.assert_close(one[:, -1], other[:, -1], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("bridge", "language"), FAMILIES)
def test_attention_weights(bridge, language):
    model, processor = endless(bridge, language)
    model.set_attn_implementation("eager")
    inputs = inputs_of(processor)
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    out = model.generate(**inputs, **settings)
    names = ["decoder_attentions", "cross_attentions"] if model.config.is_encoder_decoder else ["attentions"]
    for step in range(3):
        slow = next_outputs(model, inputs, out.sequences[:, -3:][:, :step], output_attentions=True)
        for name in names:
            for one, other in zip(out[name][step], slow[name], strict=True):
                torch.testing.assert_close(one[:, :, -1], other[:, :, -1], atol=ATOL, rtol=0)


def test_embeddings_instead_of_ids(composed):
    model, processor = composed
    inputs = inputs_of(processor)
    expected = new_tokens(model, inputs)
    if not model.config.visual_tokens_in_prompt:
        embeds = model.embed_tokens(inputs.pop("input_ids"))
        with pytest.raises(ValueError, match=r"Images need input_ids: placeholders can't be found in inputs_embeds"):
            model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=2)
        return
    ids, features = inputs.pop("input_ids"), model.get_image_features(inputs.pop("pixel_values")).pooler_output
    embeds = model.fill_placeholders(model.embed_tokens(ids), ids, features)
    found = model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found[:, -NEW:], expected)


def test_embeddings_of_text_alone_where_images_are_not_in_the_prompt():
    model, processor = endless("perceiver", "llama")
    inputs = inputs_of(processor, ["abab ab", "hm"])
    expected = new_tokens(model, inputs)
    embeds = model.embed_tokens(inputs.pop("input_ids"))
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=NEW, do_sample=False), expected)


# ---------------------------------------------------------------------- ends and streams


def test_stop_strings_end_where_they_appear(composed):
    model, processor = composed
    inputs = inputs_of(processor, TEXTS[:1])
    whole = new_tokens(model, inputs, max_new_tokens=12)
    texts = [processor.decode(whole[0, :count]) for count in range(13)]
    stop = texts[-1][len(texts[2]) : len(texts[4])]
    count = next(count for count, text in enumerate(texts) if stop in text)
    found = new_tokens(model, inputs, max_new_tokens=12, stop_strings=[stop], tokenizer=processor.tokenizer)
    assert torch.equal(found, whole[:, :count])


class Heard(TextStreamer):
    """Keeps what it hears."""

    def on_finalized_text(self, text, stream_end=False):
        self.text = getattr(self, "text", "") + text


@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 2}], ids=["one by one", "drafted"])
def test_streams_carry_the_text(composed, drafts):
    model, processor = composed
    inputs = inputs_of(processor, TEXTS[:1])
    expected = processor.decode(new_tokens(model, inputs)[0], skip_special_tokens=True)
    settings = {"max_new_tokens": NEW, "do_sample": False, **drafts}
    streamer = Heard(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, **settings)
    assert streamer.text == expected
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, **settings})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_beams_do_not_stream(composed):
    model, processor = composed
    with pytest.raises(ValueError, match=r"`streamer` cannot be used with beam search"):
        model.generate(**inputs_of(processor), num_beams=2, streamer=Heard(processor.tokenizer))


# ---------------------------------------------------------------------- caches


@pytest.mark.parametrize("kind", ["sliding_window", "dynamic", "offloaded", "offloaded_static"])
def test_every_kind_of_cache(composed, kind):
    model, processor = composed
    inputs = inputs_of(processor)
    try:
        found = new_tokens(model, inputs, cache_implementation=kind, disable_compile=True)
    except (RuntimeError, AssertionError):  # of torch: there is nothing to offload from
        assert kind.startswith("offloaded") and not torch.cuda.is_available()
    else:
        assert torch.equal(found, new_tokens(model, inputs))


@pytest.mark.parametrize("bridge", ["mlp", "qformer", "perceiver"])
def test_windows_shorter_than_the_prompt(bridge):
    """Gemma 2 with layers that see 16 tokens: what slid out of the cache is not seen without a cache either."""
    model, processor = endless(bridge, "gemma2")
    inputs = inputs_of(processor, [TEXTS[0] + 20 * "cd", TEXTS[1]])
    assert torch.equal(new_tokens(model, inputs), loop(model, inputs))
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(new_tokens(model, inputs, **static), new_tokens(model, inputs))


def test_quantised_caches_need_their_library(composed):
    model, processor = composed
    options = {"cache_implementation": "quantized"}
    if model.config.is_encoder_decoder:
        with pytest.raises(ValueError, match="does not support the quantized cache"):
            new_tokens(model, inputs_of(processor), **options)
    elif importlib.util.find_spec("optimum") is None:
        with pytest.raises(ImportError, match="optimum-quanto"):
            new_tokens(model, inputs_of(processor), **options)
    else:
        assert new_tokens(model, inputs_of(processor), **options).shape == (2, NEW)


@needs_compile
@pytest.mark.parametrize(("bridge", "language"), FAMILIES)
def test_generate_compiles_decoding_steps(bridge, language):
    model, processor = endless(bridge, language)
    inputs = inputs_of(processor)
    graphs = []

    def backend(graph, examples, **options):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    config = CompileConfig(backend=backend, fullgraph=True)
    vars(config)["_compile_all_devices"] = True  # by itself, `generate` compiles on a GPU alone
    found = new_tokens(model, inputs, cache_implementation="static", compile_config=config)
    assert graphs and torch.equal(found, new_tokens(model, inputs))


def test_chunks_of_text_alone(composed):
    model, processor = composed
    inputs = inputs_of(processor, ["abababab ab", "hm?"])
    if model.config.is_encoder_decoder:
        with pytest.raises(ValueError, match="prefill_chunk_size can't be used with an encoder-decoder"):
            new_tokens(model, inputs, prefill_chunk_size=4)
    else:
        assert torch.equal(new_tokens(model, inputs, prefill_chunk_size=4), new_tokens(model, inputs))


# ---------------------------------------------------------------------- moved to the Hub, and custom loops


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Contrastive Search", {"penalty_alpha": 0.6, "top_k": 4}),
        ("Group Beam Search", {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}),
        ("Constrained Beam Search", {"num_beams": 2, "force_words_ids": [[7]]}),
        ("Dola Generation", {"dola_layers": "low"}),
    ],
)
def test_ways_that_transformers_moved_to_the_hub(composed, name, options):
    model, processor = composed
    with pytest.raises(ValueError, match=f"{name} requires `trust_remote_code=True`.*transformers-community"):
        new_tokens(model, inputs_of(processor), **options)


def contrastive(model, input_ids, logits_processor, stopping_criteria, generation_config, alpha=0.6, **model_kwargs):
    """Of each row's three best tokens the one that is likely and unlike what stands there. All of them run whole."""
    rows, mask = len(input_ids), model_kwargs.pop("attention_mask")
    is_encoder_decoder = model.config.is_encoder_decoder
    name = "decoder_hidden_states" if is_encoder_decoder else "hidden_states"
    if mask is None:  # since 5.24, if there is no padding
        mask = torch.ones_like(input_ids)
    model_kwargs.update(use_cache=False, output_hidden_states=True, cache=None)
    model_kwargs.pop("past_key_values", None)
    model_kwargs.pop("position_ids", None)

    def run(ids):
        times = len(ids) // rows
        ours = {**model_kwargs, "attention_mask": mask.repeat_interleave(times, dim=0)}
        if is_encoder_decoder:
            states = model_kwargs["encoder_outputs"].last_hidden_state.repeat_interleave(times, dim=0)
            ours["encoder_outputs"] = type(model_kwargs["encoder_outputs"])(last_hidden_state=states)
        else:
            ours["attention_mask"] = torch.nn.functional.pad(
                ours["attention_mask"], (0, ids.shape[1] - mask.shape[1]), value=1
            )
        ours.pop("cache")
        outputs = model(**model.prepare_inputs_for_generation(ids, **ours))
        return outputs.logits[:, -1], outputs[name][-1]

    while not stopping_criteria(input_ids, None).all():
        logits, _ = run(input_ids)
        best = logits_processor(input_ids, logits).softmax(dim=-1).topk(3)
        longer = torch.cat([input_ids.repeat_interleave(3, dim=0), best.indices.flatten()[:, None]], dim=1)
        _, states = run(longer)
        states = torch.nn.functional.normalize(states, dim=-1)
        alike = (states[:, :-1] @ states[:, -1:].transpose(1, 2)).amax(dim=(1, 2)).unflatten(0, (rows, 3))
        chosen = ((1 - alpha) * best.values - alpha * alike).argmax(dim=-1)
        input_ids = longer.unflatten(0, (rows, 3))[torch.arange(rows), chosen]
    return input_ids


def slow_contrastive(model, inputs, alpha=0.6) -> list[int]:
    """The same for one row, one candidate after another."""
    written = torch.empty(1, 0, dtype=torch.long)
    name = "decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
    for _ in range(NEW):
        best = next_scores(model, inputs, written).softmax(dim=-1)[0].topk(3)
        worth = []
        for probability, token in zip(*best):
            states = next_outputs(
                model, inputs, torch.cat([written, token[None, None]], dim=1), output_hidden_states=True
            )
            states = states[name][-1][0]
            alike = torch.nn.functional.cosine_similarity(states[:-1], states[-1:]).max()
            worth.append((1 - alpha) * probability - alpha * alike)
        written = torch.cat([written, best.indices[torch.stack(worth).argmax()][None, None]], dim=1)
    return written[0].tolist()


@pytest.mark.core
def test_a_custom_loop_sees_the_images(composed):
    """A function as `custom_generate`; it runs three candidates of each row at once."""
    model, processor = composed
    inputs = inputs_of(processor, TEXTS[:1])
    found = new_tokens(model, inputs, custom_generate=contrastive, use_cache=False)
    assert found.tolist() == [slow_contrastive(model, inputs)]
    assert torch.equal(
        new_tokens(model, inputs_of(processor), custom_generate=GenerationMixin._sample),
        new_tokens(model, inputs_of(processor)),
    )


CALLS_AGAIN = """
def generate(model, left_out=None, **kwargs):
    return model.generate(**kwargs)
"""
CALLS_TRANSFORMERS = """
from transformers import GenerationMixin

def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    return GenerationMixin._sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

def generate(model, **kwargs):
    return GenerationMixin.generate(model, custom_generate=loop, **kwargs)
"""


@pytest.mark.core
@pytest.mark.parametrize("code", [CALLS_AGAIN, CALLS_TRANSFORMERS], ids=["generate", "transformers' generate"])
def test_custom_code_in_a_folder_sees_the_images(composed, code, tmp_path):
    model, processor = composed
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(code)
    inputs = inputs_of(processor)
    options = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    for more in ({}, {"num_beams": 2} if code == CALLS_AGAIN else {}):
        assert torch.equal(new_tokens(model, inputs, **options, **more), new_tokens(model, inputs, **more))


# ---------------------------------------------------------------------- what would lose the images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "paged"}, r"'paged' \(continuous batching\) can't be used with images"),
        (
            {"token_healing": True},
            "token_healing can't be used with images: it rewrites the prompt without placeholders",
        ),
        ({"assistant_early_exit": 1}, "assistant_early_exit can't be used with .* knows? nothing of the bridge"),
        ({"use_mtp": True}, "use_mtp can't be used with .* know nothing of the bridge"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ways_that_are_refused(composed, options, message):
    model, processor = composed
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs_of(processor, TEXTS[:1]), max_new_tokens=2, tokenizer=processor.tokenizer, **options)


@pytest.mark.parametrize("beams", [1, 2])
def test_watermarks_are_those_of_the_language_model(composed, beams):
    """A detector knows the language model's configuration, which has no placeholder."""
    model, processor = composed
    mark = WatermarkingConfig(bias=8.0)
    found = new_tokens(model, inputs_of(processor), num_beams=beams, max_new_tokens=12, watermarking_config=mark)
    detector = WatermarkDetector(model.config.text_config, "cpu", mark)
    assert (detector(found, return_dict=True).green_fraction > 0.9).all()


# ---------------------------------------------------------------------- against transformers' LLaVA


@pytest.fixture(scope="module")
def pair():
    """transformers' LLaVA with random weights, and ours with the same ones."""
    text, image_token = LANGUAGE["llama"](), 100
    text.vocab_size = image_token + 4
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=VISION["clip"](), text_config=text, image_token_index=image_token, image_seq_length=25
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    spread_weights(theirs)
    language = LlamaForCausalLM(text)
    language.model.load_state_dict(theirs.model.language_model.state_dict())
    language.lm_head.load_state_dict(theirs.lm_head.state_dict())
    model, processor = vlbridge.compose(
        theirs.model.vision_tower, language, "mlp", tokenizer=tiny_tokenizer(), vision_feature_layer=-2,
        image_aspect_ratio="pad",
    )  # fmt: skip
    model.bridge.load_state_dict(theirs.model.multi_modal_projector.state_dict())
    for each in (model, theirs):
        each.generation_config.eos_token_id = None
    theirs.generation_config.suppress_tokens = [image_token]
    return theirs, model, processor


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.7},
    "guidance with a penalty": {"guidance_scale": 1.7, "repetition_penalty": 1.4},
    "negative prompt": {"guidance_scale": 1.7, "negative_prompt_ids": torch.tensor([[9, 8, 7]])},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.core
@pytest.mark.parametrize("way", WAYS)
def test_transformers_llava_writes_the_same(pair, way):
    theirs, model, processor = pair
    inputs = inputs_of(processor, TEXTS[:1])
    found = []
    for each in (model, theirs):
        torch.manual_seed(3)
        found.append(new_tokens(each, inputs, **WAYS[way]))
    assert torch.equal(*found)


# ---------------------------------------------------------------------- what a step costs


@pytest.mark.core
def test_outputs_are_made_as_transformers_makes_them():
    values = {"logits": torch.ones(1, 2, 3), "loss": None, "visual_states": None, "image_hidden_states": torch.ones(1)}
    quick, plain = BridgedOutput.of(**values), BridgedOutput(**values)
    assert list(quick.keys()) == list(plain.keys()) == ["logits", "image_hidden_states"]
    assert all(one is other for one, other in zip(quick.to_tuple(), plain.to_tuple(), strict=True))
    for field in dataclasses.fields(plain):
        assert getattr(quick, field.name) is getattr(plain, field.name)
    assert quick["logits"] is quick.logits and quick[0] is quick.logits and "loss" not in quick
    quick.loss = torch.zeros(())
    assert "loss" in quick and pickle.loads(pickle.dumps(quick)).loss == 0


@pytest.mark.core
def test_the_processor_that_bars_placeholders():
    scores = torch.randn(2, 5)
    expected = scores.clone()
    expected[:, 3] = -torch.inf
    before = scores.clone()
    processors = LogitsProcessorList([NeverGenerated(3)])
    for _ in range(2):
        assert torch.equal(processors(None, scores), expected) and torch.equal(scores, before)
    assert NeverGenerated(5)(None, scores) is scores
    assert list(inspect.signature(NeverGenerated(3).__call__).parameters) == ["input_ids", "scores"]


@pytest.mark.core
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["full", "ragged"])
def test_an_encoder_mask_that_masks_nothing_is_left_out(texts):
    model, processor = endless("qformer", "t5")
    inputs = inputs_of(processor, texts)
    seen = []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    found = new_tokens(model, inputs)
    hook.remove()
    assert torch.equal(found, loop(model, inputs))
    assert len(seen) == NEW
    assert all((mask is None) == bool(inputs["attention_mask"].all()) for mask in seen)
