"""BLIP-2 and InstructBLIP, all three stages: converted official checkpoints against the official code's outputs."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
)

from vlbridge.convert import convert_blip2
from vlbridge.convert.convert_blip2_transformers import PORTS, port_config, port_of, port_processor, port_table
from vlbridge.convert.convert_tables import invert, plan
from vlbridge.modeling import QFormerBlip2ForConditionalGeneration
from vlbridge.modeling.modeling_contrastive import similarities_of
from vlbridge.modeling.modeling_qformer_pretraining import QFormerBlip2ForPreTraining
from vlbridge.modeling.modeling_qformer_retrieval import QFormerBlip2ForImageTextRetrieval


FAMILY = "blip2"
pytestmark = pytest.mark.core


def has_language_model(case) -> bool:
    return (case.folder / "llm").is_dir()


def applies(case, fixtures) -> bool:
    """Tests are of one stage where they ask for it, and transformers' classes have no vision encoder but EVA ViT-g."""
    if "stage1" in fixtures and has_language_model(case) or "bridged" in fixtures and not has_language_model(case):
        return False
    return not ("port" in fixtures and case.meta["config"].get("vit_model") == "clip_L")


@pytest.fixture(scope="module")
def converted(case, tmp_path_factory):
    """The case's checkpoint, converted, and loaded as users load it."""
    output = tmp_path_factory.mktemp("converted") / "model"
    sizes = case.meta["config"]
    convert_blip2(
        case.folder / "checkpoint.pth",
        case.folder / "vit.pth",
        case.folder / "llm" if has_language_model(case) else None,
        output=output,
        qformer_tokenizer=case.folder / "bert-base-uncased",
        config={
            "vision_config": {"num_attention_heads": sizes["vit_heads"]},
            "qformer_config": {"num_attention_heads": sizes["q_heads"]},
        },
    )
    model = AutoModel.from_pretrained(output)
    assert isinstance(
        model, QFormerBlip2ForConditionalGeneration if has_language_model(case) else QFormerBlip2ForPreTraining
    )
    with torch.no_grad():  # rows of added tokens are in no official file: they were drawn when it was loaded
        for name, table in (
            ("embed_tokens_new_rows", model.get_input_embeddings()),
            ("lm_head_new_rows", model.get_output_embeddings()),
        ):
            if name in case.inputs:
                table.weight[-len(case.inputs[name]) :] = case.inputs[name]
    return model, AutoProcessor.from_pretrained(output), output


@pytest.fixture
def stage1(converted):
    """`converted`, for tests of stage 1 alone."""
    return converted


@pytest.fixture
def bridged(converted):
    """`converted`, for tests of stages 2 and 3."""
    return converted


# ---------------------------------------------------------------------- images


def test_query_output(case, converted):
    model, *_ = converted
    with torch.no_grad():
        patch_features = model.get_patch_features(case.inputs["pixel_values"])
        normed = model.bridge.vision_layer_norm(patch_features)
        queries = model.bridge.qformer(normed)
    for name, given in (("visual_encoder_out", patch_features), ("ln_vision_out", normed), ("query_output", queries)):
        torch.testing.assert_close(given, case.outputs[name], **case.tolerance)
    for name in {"projected", "projected_noinstr"} & case.outputs.keys():
        with torch.no_grad():
            projected = model.get_image_features(case.inputs["pixel_values"]).pooler_output
        torch.testing.assert_close(projected, case.outputs[name], **case.tolerance)


def test_images_through_the_processor(case, converted, tmp_path):
    """From the picture files on, the official pixels: also when saved again, and in transformers' own processor."""
    model, processor, _ = converted
    images = [Image.open(path).convert("RGB") for path in sorted((case.folder / "images").glob("*.png"))]
    processor.save_pretrained(tmp_path / "again")
    processors = [processor, AutoProcessor.from_pretrained(tmp_path / "again")]
    if case.meta["config"].get("vit_model") != "clip_L":
        port_processor(model.config, processor).save_pretrained(tmp_path / "native")
        processors.append(AutoProcessor.from_pretrained(tmp_path / "native", backend="pil"))
    for each in processors:
        given = each.image_processor(images, return_tensors="pt")["pixel_values"]
        assert case.same_pixels(given, case.inputs["pixel_values"])


# ---------------------------------------------------------------------- stages 2 and 3


def text_ids(case, model, tag: str) -> torch.Tensor:
    """The text behind the queries, `(batch, tokens)`; where only its embeddings were recorded they are looked up."""
    for name in (f"{tag}.input_ids", f"{tag}.text_ids"):
        if name in case.inputs:
            return case.inputs[name]
    embeds = case.outputs[f"{tag}.inputs_embeds"][:, model.config.qformer_config.num_query_tokens :]
    table = model.get_input_embeddings().weight.detach()
    differences, ids = (embeds[:, :, None] - table).abs().amax(dim=-1).min(dim=-1)
    assert not differences.any()
    return ids


def instructions(case, processor, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    return [
        processor.tokenizer.decode(row[attended.bool()], skip_special_tokens=True)
        for row, attended in zip(ids, mask[:, -ids.shape[1] :])
    ]


def inputs_of(case, model, processor, tag: str) -> dict[str, torch.Tensor]:
    """The official batch as ours: queries in front, then the text, wherever its padding is."""
    ids, mask = text_ids(case, model, tag), case.inputs[f"{tag}.attention_mask"]
    num_queries = model.config.qformer_config.num_query_tokens
    assert mask.shape[1] == num_queries + ids.shape[1]
    images = torch.full((len(ids), num_queries), model.config.image_token_id)
    given = {
        "input_ids": torch.cat((images, ids), dim=1),
        "attention_mask": mask,
        "pixel_values": case.inputs["pixel_values"],
    }
    if processor.qformer_tokenizer is not None:
        group = tag.split("_")[0]
        if f"{group}.qformer_ids" in case.inputs:
            given["qformer_input_ids"] = case.inputs[f"{group}.qformer_ids"]
            given["qformer_attention_mask"] = case.inputs[f"{group}.qformer_mask"]
        else:
            encoded = processor.qformer_tokenizer(
                instructions(case, processor, ids, mask), padding=True, padding_side="right", return_tensors="pt"
            )
            given["qformer_input_ids"] = encoded["input_ids"]
            given["qformer_attention_mask"] = encoded["attention_mask"]
    return given


def test_logits_and_loss(case, bridged):
    model, processor, _ = bridged
    inputs = inputs_of(case, model, processor, "forward")
    attended = inputs["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        inputs["decoder_attention_mask"] = case.inputs["forward.decoder_attention_mask"]
        attended = inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        outputs = model(**inputs, labels=case.inputs["forward.labels"])
    torch.testing.assert_close(outputs.logits[attended], case.outputs["forward.logits"][attended], **case.tolerance)
    torch.testing.assert_close(outputs.loss, case.outputs["forward.loss"].squeeze(), **case.tolerance)


class OfficialPenalty(LogitsProcessor):
    """Repetition penalty as the official code sees it.

    The prompt is embeddings, so that only generated tokens count, and the placeholder before them.
    """

    def __init__(self, penalty: float, seen: torch.Tensor, prompt_length: int):
        self.penalty, self.seen, self.prompt_length = penalty, seen, prompt_length

    def __call__(self, input_ids, scores):
        beams = input_ids.shape[0] // self.seen.shape[0]
        seen = torch.cat((self.seen.repeat_interleave(beams, 0), input_ids[:, self.prompt_length :]), dim=1)
        chosen = scores.gather(1, seen)
        chosen = torch.where(chosen < 0, chosen * self.penalty, chosen / self.penalty)
        return scores.scatter(1, seen, chosen)


def count_as_transformers_4(model, prompt_length: int) -> None:
    """Make beam search count a hypothesis' length as transformers 4 does: with the prompt (of which the official code
    gives `prompt_length` tokens as ids), without the token that ends it."""

    def update(self, *, topk_running_sequences, topk_log_probs, cur_len, decoder_prompt_len, length_penalty, **kwargs):
        generated = cur_len + 1 - decoder_prompt_len
        ended = topk_running_sequences[:, :, cur_len] == self.generation_config.eos_token_id
        then = prompt_length + generated - ended.long()
        return type(self)._update_finished_beams(
            self,
            topk_running_sequences=topk_running_sequences,
            topk_log_probs=topk_log_probs * (generated / then) ** length_penalty,
            cur_len=cur_len,
            decoder_prompt_len=decoder_prompt_len,
            length_penalty=length_penalty,
            **kwargs,
        )

    def check(*args, **kwargs):
        names = ("satisfied", "running", "scores", "finished", "cur_len", "max_length", "decoder_prompt_len")
        kwargs.update(zip(names, args))
        kwargs["decoder_prompt_len"] -= prompt_length
        return type(model)._check_early_stop_heuristic(*(kwargs.pop(name) for name in names[: len(args)]), **kwargs)

    model._update_finished_beams = MethodType(update, model)
    model._check_early_stop_heuristic = check


def generated(case, model, processor, tag: str) -> tuple[list, list]:
    """Our tokens and the official ones behind the prompt, without what follows the end."""
    settings = dict(case.meta["gen"][tag]["kwargs_passed_to_lm_generate"])
    inputs, official = inputs_of(case, model, processor, tag), case.outputs[f"{tag}.ids"]
    # what the official ids begin with: version 1.0.2's prompt, else a placeholder
    first = case.inputs.get(f"{tag}.input_ids", official[:, :1])
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    if "max_new_tokens" not in settings:
        settings["max_new_tokens"] = settings.pop("max_length") - 1
    if "eos_token_id" in settings:
        assert settings.pop("eos_token_id") == model.generation_config.eos_token_id
    for name in ("top_p", "temperature", "min_length"):  # no sampling; and a placeholder is as long as min_length
        settings.pop(name, None)
    penalty = settings.pop("repetition_penalty", 1.0)
    processors = LogitsProcessorList([OfficialPenalty(penalty, first, start)] if penalty != 1.0 and start else [])
    settings["repetition_penalty"] = 1.0 if start else penalty  # a decoder's ids are all that is counted
    count_as_transformers_4(model, first.shape[1])
    try:
        ids = model.generate(**inputs, **settings, logits_processor=processors)
    finally:
        del model._update_finished_beams, model._check_early_stop_heuristic
    end = model.generation_config.eos_token_id

    def until_end(rows: torch.Tensor) -> list[list[int]]:
        return [row[: row.index(end)] if end in row else row for row in rows.tolist()]

    return until_end(ids[:, start or 1 :]), until_end(official[:, first.shape[1] :])


def test_generated_tokens(case, bridged):
    """Greedy and beam search with the official settings."""
    model, processor, _ = bridged
    for tag in case.meta["gen"]:
        given, expected = generated(case, model, processor, tag)
        assert given == expected, tag


def test_prompts_through_the_processor(case, bridged, tmp_path):
    """A prompt as text becomes the official ids: queries, beginning of sequence, text; and the Q-Former's ids.

    As converted, saved again, and in transformers' own processor, which puts the queries there by itself.
    """
    model, processor, _ = bridged
    processor.save_pretrained(tmp_path / "again")
    port_processor(model.config, processor).save_pretrained(tmp_path / "native")
    processors = {name: AutoProcessor.from_pretrained(tmp_path / name) for name in ("again", "native")}
    image = Image.open(sorted((case.folder / "images").glob("*.png"))[0]).convert("RGB")
    checked = 0
    for tag in case.meta["gen"]:
        official = inputs_of(case, model, processor, tag)
        attended = official["attention_mask"].bool()
        prompts = instructions(case, processor, text_ids(case, model, tag), official["attention_mask"])
        for row, prompt in enumerate(prompts):
            expected = official["input_ids"][row][attended[row]].tolist()
            for name, each in {"converted": processor, **processors}.items():
                placed = prompt if name == "native" else "<image>" + prompt
                given = each(images=image, text=placed, return_tensors="pt")
                assert given["input_ids"][0].tolist() == expected, (tag, name, prompt)
                if processor.qformer_tokenizer is not None:
                    read = official["qformer_attention_mask"][row].bool()
                    assert given["qformer_input_ids"][0].tolist() == official["qformer_input_ids"][row][read].tolist()
            checked += 1
    assert checked


def test_generation_defaults(case, bridged):
    """What `generate` does without settings is what the official code does."""
    model, processor, _ = bridged
    defaults, instructed = model.generation_config, processor.qformer_tokenizer is not None
    assert defaults.num_beams == 5 and not defaults.do_sample and defaults.length_penalty in (None, 1.0)
    assert (defaults.max_new_tokens, defaults.repetition_penalty) == ((256, 1.5) if instructed else (30, 1.0))
    assert defaults.eos_token_id == case.meta.get("eos_token_id_used", model.config.text_config.eos_token_id)
    assert defaults.pad_token_id == processor.tokenizer.pad_token_id
    if "special" in case.meta:  # Vicuna's
        names = ("pad", "bos", "eos", "unk")
        ids = {name: getattr(processor.tokenizer, f"{name}_token_id") for name in names}
        assert ids == {name: case.meta["special"][name] for name in names}
        assert model.get_input_embeddings().num_embeddings == case.meta["special"]["rows_after_resize"]


# ---------------------------------------------------------------------- stage 1


def test_stage1_losses(case, stage1):
    """The three losses, with the negatives that the official code drew."""
    model, *_ = stage1
    ids, mask = case.inputs["text_input_ids"], case.inputs["text_attention_mask"]
    with torch.no_grad():
        outputs = model(
            case.inputs["pixel_values"],
            ids,
            mask,
            image_negatives=case.inputs["neg_image_index_per_text"],
            text_negatives=case.inputs["neg_text_index_per_image"],
        )
    for ours, official in (
        ("loss_itc", "loss_itc"),
        ("loss_itm", "loss_itm"),
        ("loss_itg", "loss_lm"),
        ("loss", "loss"),
    ):
        torch.testing.assert_close(getattr(outputs, ours), case.outputs[official].squeeze(), **case.tolerance)
    scaled = outputs.similarities / model.bridge.temperature
    torch.testing.assert_close(scaled, case.outputs["itc_sim_i2t_scaled"], **case.tolerance)
    attended = mask.bool()
    torch.testing.assert_close(outputs.logits[attended], case.outputs["lm_logits"][attended], **case.tolerance)
    with torch.no_grad():
        logits = model.bridge.itm_head(case.outputs["itm_hidden"][:, : model.config.qformer_config.num_query_tokens])
    torch.testing.assert_close(outputs.itm_logits, logits.mean(dim=1), **case.tolerance)


def test_stage1_features(case, stage1):
    model, *_ = stage1
    ids, mask = case.inputs["features.text_input_ids"], case.inputs["features.text_attention_mask"]
    images = case.inputs["pixel_values"]
    with torch.no_grad():
        image, text = model.get_image_features(images), model.get_text_features(ids, mask)
        multimodal = model.get_multimodal_features(images, ids, mask)
    for given, name in (
        (image.last_hidden_state, "image.image_embeds"),
        (image.pooler_output, "image.image_embeds_proj"),
        (text.pooler_output, "text.text_embeds_proj"),
        (multimodal, "multimodal.multimodal_embeds"),
    ):
        official = case.outputs[f"features.{name}"]
        official = official[:, 0] if given.ndim < official.ndim else official  # of texts, what the first token says
        torch.testing.assert_close(given, official, **case.tolerance)
    attended = mask.bool()
    official = case.outputs["features.text.text_embeds"]
    torch.testing.assert_close(text.last_hidden_state[attended], official[attended], **case.tolerance)


def test_retrieval_scores(case, stage1):
    """Every image with every text, one pair at a time as the official code was asked, in the class for retrieval."""
    *_, folder = stage1
    model = QFormerBlip2ForImageTextRetrieval.from_pretrained(folder)
    images = case.inputs["pixel_values"]
    ids, mask = case.inputs["features.text_input_ids"], case.inputs["features.text_attention_mask"]
    with torch.no_grad():
        together = model(images, ids, mask).itc_scores
        matching = [
            model(image.expand(len(ids), -1, -1, -1), ids, mask, use_image_text_matching_head=True).itm_logits
            for image in images
        ]
    torch.testing.assert_close(together, case.outputs["blip2_itc_scores_ij"], **case.tolerance)
    torch.testing.assert_close(torch.stack(matching), case.outputs["blip2_itm_logits_ij"], **case.tolerance)
    pairs = torch.stack([matching[index][index] for index in range(len(images))])
    torch.testing.assert_close(pairs[:, 1], case.outputs["compute_itm"], **case.tolerance)
    queries = case.outputs["itc_sim_q2t"]  # (images, texts, queries)
    torch.testing.assert_close(queries.amax(dim=-1), together, **case.tolerance)


def rank_as_transformers_4_26(model, monkeypatch) -> None:
    """Make beam search count one token more in captions that `max_length` cuts off than in those that end before."""

    def update(self, *, topk_running_sequences, topk_log_probs, cur_len, length_penalty, **kwargs):
        cut_off = topk_running_sequences[:, :, cur_len] != self.config.eos_token_id
        longer = (cur_len / (cur_len + 1)) ** length_penalty
        return type(self)._update_finished_beams(
            self,
            topk_running_sequences=topk_running_sequences,
            topk_log_probs=torch.where(cut_off, topk_log_probs * longer, topk_log_probs),
            cur_len=cur_len,
            length_penalty=length_penalty,
            **kwargs,
        )

    monkeypatch.setattr(model, "_update_finished_beams", MethodType(update, model), raising=False)


def test_stage1_captions(case, stage1, monkeypatch):
    """The official results come from transformers 4.26."""
    model, *_ = stage1
    rank_as_transformers_4_26(model, monkeypatch)
    for name, settings in case.meta["gen"].items():
        settings = {key: value for key, value in settings.items() if key != "top_p"}
        ids = model.generate(case.inputs["pixel_values"], **settings)
        assert ids.tolist() == case.outputs[f"generate.{name}.ids"].tolist(), name


# ---------------------------------------------------------------------- transformers' own classes


def port_with(model):
    """Transformers' own class with the same weights, by the table that `export` goes by."""
    config, weights = model.config, model.state_dict()
    rows = None if config.text_config is None else config.text_config.vocab_size
    port = PORTS[port_of(config)].model_class(port_config(config, rows, None)).eval()
    if "language_model.lm_head.weight" in weights and config.is_encoder_decoder:
        # transformers ties T5's head by itself, and unties it when it loads a checkpoint where it differs
        head = port.language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    pieces = plan(invert(port_table(config, weights)), weights)
    port.load_state_dict({name: piece.load(weights.__getitem__) for name, piece in pieces.items()})
    return port


@pytest.fixture(scope="module")
def port(case, converted):
    model, *_ = converted
    return port_with(model)


def test_the_port_reads_images_alike(case, converted, port):
    """The port's `ln_vision` has eps 1e-6, LAVIS's 1e-5: small at these scales, and all the difference there is."""
    model, *_ = converted
    images = case.inputs["pixel_values"]
    port.vision_model.post_layernorm.eps = 1e-6  # other tests change it
    with torch.no_grad():
        theirs = port.vision_model(images).last_hidden_state
        port.vision_model.post_layernorm.eps = 1e-5
        adapted = port.vision_model(images).last_hidden_state
    ours = case.outputs["ln_vision_out"]
    torch.testing.assert_close(adapted, ours, atol=1e-5, rtol=0)
    assert 0 < (theirs - adapted).abs().max() < 1e-3


def test_the_port_speaks_alike(case, bridged, port):
    """Logits of the port, with LAVIS's eps; its FlanT5 must have LAVIS's activation, unlike the one on the Hub."""
    model, processor, _ = bridged
    port.vision_model.post_layernorm.eps = 1e-5
    inputs = inputs_of(case, model, processor, "forward")
    attended = inputs["attention_mask"].bool()
    # the port looks placeholders up before it replaces them: it needs a row for them
    placeholder = next(token for token in range(len(processor.tokenizer)) if not (inputs["input_ids"] == token).any())
    port.config.image_token_index = placeholder
    theirs = {
        **inputs,
        "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, placeholder),
    }
    if model.config.is_encoder_decoder:
        assert port.config.text_config.dense_act_fn == "gelu"
        target = model.language_model.prepare_decoder_input_ids_from_labels(case.inputs["forward.labels"])
        mask = case.inputs["forward.decoder_attention_mask"]
        for given in (inputs, theirs):
            given.update(decoder_input_ids=target, decoder_attention_mask=mask)
        attended = mask.bool()
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, port(**theirs).logits
    torch.testing.assert_close(ours[attended], theirs[attended], atol=1e-4, rtol=0)


def test_the_port_scores_alike(case, stage1, port):
    """Retrieval; the port has neither losses nor a temperature nor captions."""
    *_, folder = stage1
    port.vision_model.post_layernorm.eps = 1e-5
    model = QFormerBlip2ForImageTextRetrieval.from_pretrained(folder)
    inputs = {
        "pixel_values": case.inputs["pixel_values"],
        "input_ids": case.inputs["features.text_input_ids"],
        "attention_mask": case.inputs["features.text_attention_mask"],
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).itc_scores, port(**inputs).logits_per_image, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            model(**inputs, use_image_text_matching_head=True).itm_logits,
            port(**inputs, use_image_text_matching_head=True).logits_per_image,
            atol=1e-5,
            rtol=0,
        )


def test_similarity_is_that_of_the_closest_query(case, stage1):
    image, text = case.outputs["features.image.image_embeds_proj"], case.outputs["features.text.text_embeds_proj"][:, 0]
    torch.testing.assert_close(similarities_of(image, text), case.outputs["blip2_itc_scores_ij"], **case.tolerance)
