"""Q-Former BLIP-2: masks, text side, the three objectives of stage 1, retrieval, stage 3, and going between stages."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import (
    LANGUAGE,
    QFORMER,
    SMALL,
    VISION,
    bert_like_tokenizer,
    checkpoint_activations,
    clip_image_processor,
    needs_fsdp2,
    tiny_image,
    tiny_model,
    tiny_tokenizer,
)
from tiny import tiny_stage1 as stage1
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoProcessor,
    BertConfig,
    BertForMaskedLM,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vlbridge
from vlbridge.compat import ALL_ATTENTION_FUNCTIONS
from vlbridge.modeling.modeling_contrastive import draw_negatives
from vlbridge.modeling.modeling_qformer_layers import QFormer, joint_attention_mask


ATOL = 2e-5  # fp32, three layers; the order of summation differs
OBJECTIVES = ("itc", "itm", "itg")
VOCAB, DEC, SEP = 50, 49, 3  # [PAD] [UNK] [CLS] [SEP] [MASK], 44 words, [DEC]
QFORMER_TEXT = {**QFORMER, "use_text": True, "vocab_size": VOCAB, "max_position_embeddings": 40}


def pairs(batch: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random patch features and captions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 49, (batch, 9), generator=generator)
    lengths = torch.arange(batch) % 4 + 5  # 5 to 8 tokens
    place = torch.arange(9)[None]
    ids[:, 0] = 2
    ids = torch.where(place == lengths[:, None] - 1, SEP, ids)
    mask = (place < lengths[:, None]).long()
    patches = torch.randn(batch, 26, 32, generator=generator)
    return {"patch_features": patches, "input_ids": ids * mask, "attention_mask": mask}


def pictures_and_captions() -> dict[str, torch.Tensor]:
    """The same captions, of pixels."""
    data = pairs()
    del data["patch_features"]
    return {"pixel_values": torch.randn(4, 3, 30, 30, generator=torch.Generator().manual_seed(1)), **data}


NEGATIVES = {"image_negatives": torch.tensor([1, 2, 3, 0]), "text_negatives": torch.tensor([3, 0, 1, 2])}


@pytest.fixture(scope="module")
def model():
    return stage1()[0]


# ---------------------------------------------------------------------- masks and the text side


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mask_is_the_slow_loop(objective):
    text_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = joint_attention_mask(objective, 3, text_mask)
    assert found.shape == (2, 1, 7, 7)
    for row in range(2):
        for query in range(7):
            for key in range(7):
                query_is_text, key_is_text = query >= 3, key >= 3
                expected = {
                    "itc": query_is_text == key_is_text,
                    "itm": True,
                    "itg": not key_is_text or (query_is_text and key <= query),
                }[objective]
                expected = expected and not (key_is_text and text_mask[row, key - 3] == 0)
                assert bool(found[row, 0, query, key]) == expected, (row, query, key)


def test_unknown_objective():
    with pytest.raises(ValueError, match="objective is 'lm'; expected 'itc', 'itm' or 'itg'"):
        joint_attention_mask("lm", 3, torch.ones(1, 2))


@torch.no_grad()
def test_itc_mask_is_two_separate_passes(model):
    qformer, data = model.bridge.qformer, pairs()
    together = qformer(data["patch_features"], data["input_ids"], data["attention_mask"], "itc")
    torch.testing.assert_close(together[:, :5], qformer(data["patch_features"]), atol=ATOL, rtol=0)
    text = qformer(None, data["input_ids"], data["attention_mask"])
    torch.testing.assert_close(together[:, 5:], text, atol=ATOL, rtol=0)


@torch.no_grad()
def test_cached_queries_are_queries_run_along(model):
    qformer, data = model.bridge.qformer, pairs()
    whole = qformer(data["patch_features"], data["input_ids"], data["attention_mask"], "itg")
    queries, key_values, _ = qformer(data["patch_features"], return_key_values=True)
    torch.testing.assert_close(queries, whole[:, :5], atol=ATOL, rtol=0)
    text = qformer(None, data["input_ids"], data["attention_mask"], "itg", key_values)
    torch.testing.assert_close(text, whole[:, 5:], atol=ATOL, rtol=0)


@torch.no_grad()
def test_text_can_be_read_in_pieces(model):
    qformer, data = model.bridge.qformer, pairs()
    _, past, _ = qformer(data["patch_features"], return_key_values=True)
    whole = qformer(None, data["input_ids"], None, "itg", past)
    pieces = []
    for piece in data["input_ids"].split((4, 1, 4), dim=1):
        hidden, new, _ = qformer(None, piece, None, "itg", past, return_key_values=True)
        past = [tuple(torch.cat(both, dim=2) for both in zip(old, extra)) for old, extra in zip(past, new)]
        pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=ATOL, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_does_not_matter(model, objective):
    qformer, data = model.bridge.qformer, pairs()
    together = qformer(data["patch_features"], data["input_ids"], data["attention_mask"], objective)
    for row, length in enumerate(data["attention_mask"].sum(dim=1)):
        alone = qformer(data["patch_features"][[row]], data["input_ids"][[row], :length], None, objective)
        torch.testing.assert_close(together[[row], : 5 + length], alone, atol=ATOL, rtol=0)


def test_text_that_is_all_padding_is_no_nan(model):
    hidden = model.bridge.qformer(None, torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    assert hidden.isfinite().all()


def test_what_the_text_side_refuses(model):
    qformer = model.bridge.qformer
    with pytest.raises(ValueError, match="takes 40 at most"):
        qformer(None, torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="patch_features, input_ids or both"):
        qformer()
    with pytest.raises(ValueError, match="The text has 4 tokens, but its mask 3"):
        qformer(None, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3))
    images_only, _ = tiny_model("qformer")
    with pytest.raises(ValueError, match="use_text"):
        images_only.bridge.qformer(None, torch.zeros(1, 4, dtype=torch.long))


def test_no_text_side_where_it_is_not_used():
    names = [name for name, _ in tiny_model("qformer")[0].bridge.named_parameters()]
    assert not [name for name in names if "word" in name or "position" in name or "text" in name]


# ---------------------------------------------------------------------- transformers' own classes


def to_transformers(weights: dict[str, torch.Tensor], embeddings: str = "embeddings.", norm: str = "qformer.layernorm"):
    """The Q-Former's weights under the names of transformers' BLIP-2 and InstructBLIP."""
    renamed = {}
    for name, tensor in weights.items():
        if "qformer.layers." in name:
            name = name.replace("qformer.layers.", "qformer.encoder.layer.").replace(
                "cross_attention", "crossattention"
            )
            for part in ("query.", "key.", "value."):
                name = name.replace(f"attention.{part}", f"attention.attention.{part}")
            name = name.replace("attention.dense", "attention.output.dense")
            name = name.replace("attention.layer_norm", "attention.output.LayerNorm")
            for ours, theirs in (("_query", "_query"), ("_text", "")):
                name = name.replace(f"feed_forward{ours}.intermediate", f"intermediate{theirs}.dense")
                name = name.replace(f"feed_forward{ours}.dense", f"output{theirs}.dense")
                name = name.replace(f"feed_forward{ours}.layer_norm", f"output{theirs}.LayerNorm")
        name = name.replace("qformer.query_tokens", "query_tokens").replace("qformer.layer_norm", norm)
        for table in ("word_embeddings", "position_embeddings"):
            name = name.replace(f"qformer.{table}", f"{embeddings}{table}")
        renamed[name] = tensor
    return renamed


class Seen(torch.nn.Module):
    """Stands for transformers' vision model.

    Theirs ends with the layer norm, with an epsilon of 1e-6 where LAVIS has 1e-5: the norm is left out of the
    comparison.
    """

    def __init__(self, normed):
        super().__init__()
        self.normed = normed

    def forward(self, **kwargs):
        return BaseModelOutputWithPooling(last_hidden_state=self.normed)


def their_qformer_config() -> dict:
    return {**QFORMER_TEXT, "encoder_hidden_size": 32, "cross_attention_frequency": 2, "use_qformer_text_input": True}


@pytest.mark.core
@torch.no_grad()
def test_scores_are_those_of_transformers(model):
    data = pairs()
    vision = {**SMALL, "image_size": 30, "patch_size": 6}
    config = Blip2Config(
        vision_config=vision, qformer_config=their_qformer_config(), num_query_tokens=5, image_text_hidden_size=16
    )
    theirs = Blip2ForImageTextRetrieval(config).eval()
    own = {name: t for name, t in model.bridge.state_dict().items() if not name.startswith(("vision_layer", "lm_head"))}
    own.pop("temperature")  # they have none
    loaded = theirs.load_state_dict(to_transformers(own), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("vision_model.") or "position_ids" in name for name in loaded.missing_keys)
    theirs.vision_model = Seen(model.bridge.vision_layer_norm(data["patch_features"]))
    texts = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    outputs = theirs(pixel_values=torch.zeros(4, 3, 30, 30), **texts)
    found = model(**data, return_loss=False)
    torch.testing.assert_close(found.similarities, outputs.logits_per_image, atol=ATOL, rtol=0)
    outputs = theirs(pixel_values=torch.zeros(4, 3, 30, 30), use_image_text_matching_head=True, **texts)
    torch.testing.assert_close(model.get_itm_logits(**data), outputs.logits_per_image, atol=ATOL, rtol=0)


@pytest.mark.core
@torch.no_grad()
def test_instruction_aware_features_are_those_of_transformers():
    model, _ = tiny_model("qformer", "llama", qformer_config=dict(QFORMER_TEXT))
    data = pairs()
    config = InstructBlipConfig(
        vision_config={**SMALL, "image_size": 30, "patch_size": 6},
        qformer_config=their_qformer_config(),
        text_config=LANGUAGE["llama"]().to_dict(),
        num_query_tokens=5,
    )
    theirs = InstructBlipForConditionalGeneration(config).eval()
    own = {name: t for name, t in model.bridge.state_dict().items() if not name.startswith("vision_layer_norm")}
    renamed = to_transformers(own, "qformer.embeddings.", "qformer.embeddings.layernorm")
    loaded = theirs.load_state_dict(renamed, strict=False)
    assert not loaded.unexpected_keys and not [name for name in loaded.missing_keys if "qformer.encoder" in name]
    theirs.vision_model = Seen(model.bridge.vision_layer_norm(data["patch_features"]))
    instruction = {"qformer_input_ids": data["input_ids"], "qformer_attention_mask": data["attention_mask"]}
    expected = theirs.get_image_features(pixel_values=torch.zeros(4, 3, 30, 30), **instruction, return_dict=True)
    found = model.get_image_features(patch_features=data["patch_features"], **instruction).pooler_output
    torch.testing.assert_close(found, expected.pooler_output.view_as(found), atol=ATOL, rtol=0)


@pytest.mark.core
def test_a_training_step_projects_every_image_once():
    """Similarity, matching with negatives and captions read the same keys and values, which are right."""
    model, _ = stage1()
    model.train()
    data, negatives = pairs(), torch.tensor([1, 2, 3, 0])
    projected = []
    for layer in model.bridge.qformer.layers:
        if layer.cross_attention is not None:
            layer.cross_attention.key.register_forward_hook(lambda module, args, output: projected.append(len(output)))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    output = model(**data, image_negatives=negatives, text_negatives=negatives)
    assert projected == [4, 4]  # two layers read four images
    normed = model.bridge.vision_layer_norm(data["patch_features"])
    ids, mask = data["input_ids"], data["attention_mask"]
    anew = model.bridge.itm_logits(
        torch.cat((normed, normed[negatives], normed)),
        torch.cat((ids, ids, ids[negatives])),
        torch.cat((mask, mask, mask[negatives])),
    )
    torch.testing.assert_close(output.itm_logits, anew, atol=ATOL, rtol=0)
    weight = model.bridge.qformer.layers[0].cross_attention.key.weight
    found, expected = (torch.autograd.grad(logits.square().sum(), weight)[0] for logits in (output.itm_logits, anew))
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-4)


# ---------------------------------------------------------------------- BERT


def tiny_bert(**changes) -> BertForMaskedLM:
    torch.manual_seed(3)
    options = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "vocab_size": VOCAB - 1, "max_position_embeddings": 40,
    }  # fmt: skip
    bert = BertForMaskedLM(BertConfig(**{**options, **changes})).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            if parameter.ndim > 1 or parameter.shape[0] == VOCAB - 1:
                parameter.normal_(0, 0.15)
        # LAVIS leaves the embeddings of token types out
        bert.bert.embeddings.token_type_embeddings.weight.zero_()
    return bert


@torch.no_grad()
@pytest.mark.parametrize("source", ["folder", "model"])
def test_text_side_begins_as_bert(source, tmp_path):
    bert, data = tiny_bert(), pairs()
    if source == "folder":
        bert.save_pretrained(tmp_path)
    model, _ = stage1()
    fresh = {name: tensor.clone() for name, tensor in model.bridge.qformer.state_dict().items()}
    model.load_bert(tmp_path if source == "folder" else bert)
    qformer, head = model.bridge.qformer, model.bridge.lm_head
    text = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    hidden = qformer(None, **text)
    expected = bert.bert(**text).last_hidden_state
    attended = text["attention_mask"].bool()
    torch.testing.assert_close(hidden[attended], expected[attended], atol=ATOL, rtol=0)
    logits = bert(**text).logits
    torch.testing.assert_close(head(hidden)[attended][:, :-1], logits[attended], atol=1e-4, rtol=0)
    for layer in qformer.layers:
        for name, tensor in layer.feed_forward_text.state_dict().items():
            assert torch.equal(layer.feed_forward_query.state_dict()[name], tensor), name
    for name, tensor in qformer.state_dict().items():
        if "cross_attention" in name or name == "query_tokens":
            assert torch.equal(tensor, fresh[name]), name
        elif tensor.ndim > 1:
            assert not torch.equal(tensor, fresh[name]), name
    assert torch.equal(qformer.word_embeddings.weight[-1], fresh["word_embeddings.weight"][-1])  # [DEC]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, "has shape"),
        ({"num_hidden_layers": 2}, "nothing for layers.2.attention.dense.bias"),
        ({"num_hidden_layers": 4}, "there is no room for bert.encoder.layer.3"),
        ({"vocab_size": 60}, r"word_embeddings.weight has shape \[60, 32\], expected \[50, 32\]"),
    ],
    ids=str,
)
def test_another_bert_is_refused(changes, message):
    model, _ = stage1()
    before = copy.deepcopy(model.bridge.state_dict())
    with pytest.raises(ValueError, match=message):
        model.load_bert(tiny_bert(**changes))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.bridge.state_dict().items())


def test_bert_without_text_side():
    model, _ = tiny_model("qformer")
    model.bridge.qformer.load_bert(tiny_bert())
    bert = tiny_bert().bert.encoder.layer[1]
    assert torch.equal(model.bridge.qformer.layers[1].feed_forward_query.dense.weight, bert.output.dense.weight)


# ---------------------------------------------------------------------- the three losses


@pytest.mark.core
@torch.no_grad()
def test_losses_are_the_obvious_ones(model):
    data = pairs()
    found = model(**data, **NEGATIVES)
    bridge, images, texts, masks = model.bridge, data["patch_features"], data["input_ids"], data["attention_mask"]
    # contrastive
    image_features = model.get_image_features(patch_features=images).pooler_output
    text_features = model.get_text_features(texts, masks).pooler_output
    scores = torch.zeros(4, 4)
    for image in range(4):
        for text in range(4):
            scores[image, text] = max(query @ text_features[text] for query in image_features[image])
    torch.testing.assert_close(found.similarities, scores, atol=ATOL, rtol=0)
    labels, smooth = torch.arange(4), {"label_smoothing": 0.1}
    cross_entropy = torch.nn.functional.cross_entropy
    itc = [cross_entropy(logits / bridge.temperature, labels, **smooth) for logits in (scores, scores.T)]
    torch.testing.assert_close(found.loss_itc, sum(itc) / 2, atol=1e-4, rtol=0)
    # matching
    rows = [(k, k, 1) for k in range(4)]
    rows += [(int(NEGATIVES["image_negatives"][k]), k, 0) for k in range(4)]
    rows += [(k, int(NEGATIVES["text_negatives"][k]), 0) for k in range(4)]
    itm = [
        cross_entropy(
            model.get_itm_logits(patch_features=images[[i]], input_ids=texts[[t]], attention_mask=masks[[t]]),
            torch.tensor([match]),
        )
        for i, t, match in rows
    ]
    torch.testing.assert_close(found.loss_itm, sum(itm) / 12, atol=1e-4, rtol=0)
    # generation, one pair at a time, nothing cached
    losses, count = 0.0, 0
    for row, length in enumerate(masks.sum(dim=1)):
        ids = texts[[row], :length].clone()
        ids[:, 0] = DEC
        hidden = bridge.qformer(bridge.vision_layer_norm(images[[row]]), ids, None, "itg")[:, 5:]
        losses += cross_entropy(bridge.lm_head(hidden)[0, :-1], ids[0, 1:], reduction="sum", **smooth)
        count += int(length) - 1
    torch.testing.assert_close(found.loss_itg, losses / count, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.loss, found.loss_itc + found.loss_itm + found.loss_itg)


@pytest.mark.parametrize("left_out", OBJECTIVES)
def test_a_loss_left_out_changes_no_other(left_out):
    everything = stage1()[0](**pairs(), **NEGATIVES)
    model, _ = stage1(**{f"{left_out}_weight": 0.0})
    found = model(**pairs(), **NEGATIVES)
    assert getattr(found, f"loss_{left_out}") is None
    others = [name for name in OBJECTIVES if name != left_out]
    for name in others:
        torch.testing.assert_close(found[f"loss_{name}"], everything[f"loss_{name}"])
    torch.testing.assert_close(found.loss, sum(everything[f"loss_{name}"] for name in others))
    found.loss.backward()
    unused = {
        "itc": ("vision_projection.", "text_projection.", "temperature"),
        "itm": ("itm_head.",),
        "itg": ("lm_head.transform", "lm_head.bias"),  # its table is the word embeddings, which are read
    }[left_out]
    for name, parameter in model.bridge.named_parameters():
        assert (parameter.grad is None) == name.startswith(unused), name


def test_weights_weigh():
    model, _ = stage1(itc_weight=0.5, itm_weight=2.0, itg_weight=3.0)
    found = model(**pairs(), **NEGATIVES)
    torch.testing.assert_close(found.loss, 0.5 * found.loss_itc + 2 * found.loss_itm + 3 * found.loss_itg)


def test_losses_do_not_depend_on_how_far_texts_are_padded(model):
    data = pairs()
    longer = {**data, **{name: torch.nn.functional.pad(data[name], (0, 4)) for name in ("input_ids", "attention_mask")}}
    with torch.no_grad():
        for name in ("loss_itc", "loss_itm", "loss_itg"):
            one, other = model(**data, **NEGATIVES)[name], model(**longer, **NEGATIVES)[name]
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@torch.no_grad()
def test_targets_choose_what_is_generated(model):
    data = pairs()
    targets = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    everything = model(**data, **NEGATIVES).loss_itg
    torch.testing.assert_close(model(**data, itg_targets=targets, **NEGATIVES).loss_itg, everything)
    targets[:, :4] = -100
    found = model(**data, itg_targets=targets, **NEGATIVES)
    expected = torch.nn.functional.cross_entropy(
        found.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(found.loss_itg, expected)


@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_negatives_are_never_the_positive(floor):
    torch.manual_seed(0)
    logits = torch.randn(6, 12) + 40 * torch.eye(6, 12)  # the positive is by far the most similar
    positives = torch.eye(6, 12, dtype=torch.bool)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.stack([draw_negatives(logits, positives, floor, generator) for _ in range(200)])
    assert not (drawn == torch.arange(6)).any()
    assert drawn.max() > 6  # those of other processes are candidates
    again = torch.Generator().manual_seed(5)
    assert torch.equal(draw_negatives(logits, positives, floor, again), drawn[0])


def test_negatives_are_hard():
    logits = torch.tensor([[0.0, 3.0, 0.0, -3.0]]).repeat(2000, 1)
    positives = torch.zeros(2000, 4, dtype=torch.bool)
    positives[:, 0] = True
    drawn = draw_negatives(logits, positives, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 2000
    expected = torch.tensor([3.0, 0.0, -3.0]).softmax(dim=0)
    torch.testing.assert_close(shares[1:], expected, atol=0.03, rtol=0)  # three standard deviations of 2000 draws


def test_pairs_of_one_image_are_no_negatives(model):
    data = pairs()
    ids = torch.tensor([7, 7, 8, 9])
    for seed in range(10):
        found = model(**data, image_ids=ids, generator=torch.Generator().manual_seed(seed))
        assert not (ids[found.image_negatives] == ids).any() and not (ids[found.text_negatives] == ids).any()
    with pytest.raises(ValueError, match="at least two pairs"):
        model(**data, image_ids=torch.zeros(4, dtype=torch.long))


def test_draws_are_repeatable(model):
    with torch.no_grad():
        found = [model(**pairs(), generator=torch.Generator().manual_seed(1)) for _ in range(2)]
        torch.manual_seed(2)
        found.append(model(**pairs()))
        torch.manual_seed(2)
        found.append(model(**pairs()))
    assert torch.equal(found[0].loss, found[1].loss) and torch.equal(found[2].loss, found[3].loss)


def test_what_stage1_refuses(model):
    data = pairs()
    with pytest.raises(ValueError, match="input_ids are missing"):
        model(patch_features=data["patch_features"])
    with pytest.raises(ValueError, match="exactly one of pixel_values and patch_features"):
        model(input_ids=data["input_ids"])
    with pytest.raises(ValueError, match="3 images, but 4 texts"):
        model(**{**data, "patch_features": data["patch_features"][:3]})
    with pytest.raises(ValueError, match="at least two pairs"):
        model(**{name: tensor[:1] for name, tensor in data.items()})


# ---------------------------------------------------------------------- training


def test_one_step_leaves_the_vision_model_alone():
    model, _ = stage1()
    data = pairs()
    del data["patch_features"]
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(pixel_values=torch.randn(4, 3, 30, 30), **data).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.startswith("bridge.") for name in changed)
    # a bias of keys shifts all scores of a query alike: it has no gradient but rounding
    still = {f"bridge.{name}" for name, _ in model.bridge.named_parameters() if not name.endswith("key.bias")} - changed
    assert not still


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, _ = stage1()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
        model(**pairs(), **NEGATIVES).loss.backward()
        gradients.append({name: p.grad for name, p in model.bridge.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objectives", [*((name,) for name in OBJECTIVES), OBJECTIVES], ids="+".join)
def test_half_precision_is_no_nan(objectives, dtype):
    """All parts in half precision, from pixels on, dropout included in the backward pass."""
    weights = {f"{name}_weight": float(name in objectives) for name in OBJECTIVES}
    model, _ = stage1(**weights)
    data = pictures_and_captions()
    expected = model(**data, **NEGATIVES).loss
    model.to(dtype)
    loss = model(**data, **NEGATIVES).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.1, rtol=0.05)  # bfloat16 keeps 8 bits
    loss = model.train()(**data, **NEGATIVES).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.bridge.named_parameters() if p.grad is not None}
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["qformer.query_tokens"].any() and gradients["qformer.layers.0.cross_attention.query.weight"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"qformer_config": QFORMER_TEXT}], ids=["stage 2", "stage 3"])
@pytest.mark.parametrize("language", ["opt", "t5", "llama"])
def test_half_precision_of_later_stages_is_no_nan(language, options, dtype):
    model, processor = tiny_model("qformer", language, **options)
    images = [tiny_image(seed) for seed in range(2)]
    text = ["<image>what is it? a red one", "<image>what? blue"]
    inputs = {**processor(images=images, text=text, return_tensors="pt", padding=True)}
    if options:
        inputs |= {"qformer_input_ids": pairs(2)["input_ids"], "qformer_attention_mask": pairs(2)["attention_mask"]}
    padding = inputs["attention_mask"] == 0
    inputs["labels"] = inputs["input_ids"].masked_fill(
        padding | (inputs["input_ids"] == model.config.image_token_id), -100
    )
    expected = model(**inputs).loss
    model.to(dtype)
    torch.testing.assert_close(model(**inputs).loss.float(), expected, atol=0.1, rtol=0.05)
    loss = model.train()(**inputs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.bridge.named_parameters() if p.grad is not None}
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["qformer.query_tokens"].any() and gradients["language_projection.weight"].any()


# ---------------------------------------------------------------------- attention implementations


@pytest.mark.core
def test_eager_attention_is_sdpa():
    model, _ = stage1()
    expected = model(**pairs(), **NEGATIVES)
    model.set_attn_implementation({"qformer_config": "eager"})
    found = model(**pairs(), **NEGATIVES)
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
    joint = (pairs()["patch_features"], pairs()["input_ids"], pairs()["attention_mask"])
    for objective in OBJECTIVES:
        eager = model.bridge.qformer(*joint, objective)
        model.set_attn_implementation({"qformer_config": "sdpa"})
        torch.testing.assert_close(model.bridge.qformer(*joint, objective), eager, atol=ATOL, rtol=0)
        model.set_attn_implementation({"qformer_config": "eager"})


def counted(calls: list):
    """SDPA that remembers whose it was."""

    def attend(module, *args, **kwargs):
        calls.append(type(module).__name__)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    return attend


@pytest.mark.core
@torch.no_grad()
@pytest.mark.parametrize("way", ["set", "load", "load bridge"])
def test_attention_implementation_reaches_the_qformer_alone(way, tmp_path, monkeypatch):
    """Asked for by part: the Q-Former's three self-attentions and two cross-attentions, nobody else's."""
    calls: list[str] = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "counted", counted(calls))
    model, processor = tiny_model("qformer", "llama")
    inputs = processor(images=[tiny_image()], text=["<image>what is it?"], return_tensors="pt")
    expected, wanted = model(**inputs).logits, {"qformer_config": "counted"}
    if way == "set":
        model.set_attn_implementation(wanted)
    else:
        for part in ("vision_model", "language_model"):
            getattr(model, part).save_pretrained(tmp_path / part)
            model.set_frozen_parts(**{part: str(tmp_path / part)})
        model.save_pretrained(tmp_path / "model", bridge_only=way == "load bridge")
        model = AutoModel.from_pretrained(tmp_path / "model", attn_implementation=wanted)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=ATOL, rtol=0)
    assert calls == ["QFormerAttention"] * 5
    assert model.config.qformer_config._attn_implementation == "counted"
    for part in (model.vision_model, model.language_model):
        assert part.config._attn_implementation == "sdpa"


def flash_stand_in(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """What flash attention computes, from what it is given: padding, and whether it is causal, seen from the end."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert attention_mask is None or attention_mask.shape == (len(key), key.shape[2])
    behind = key.shape[2] - query.shape[2]
    allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    allowed = allowed.tril(behind) if is_causal else allowed
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None].bool()
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed, dropout, scale=scaling)
    return attended.transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch):
    """A tiny model of stage 1 in bfloat16, and its Q-Former's configuration, to be set to flash attention."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_stand_in)
    model, _ = stage1()
    return model.to(torch.bfloat16), model.config.qformer_config


@pytest.mark.core
@torch.no_grad()
def test_flash_attention_gives_the_same(flash):
    """All three objectives, features, scores and captions."""
    model, config = flash
    data, found = pairs(), []
    for implementation in ("sdpa", "flash_attention_2"):
        config._attn_implementation = implementation
        outputs = model(**data, **NEGATIVES)
        texts = {name: data[name] for name in ("input_ids", "attention_mask")}
        found.append(
            {
                **{name: outputs[name] for name in ("loss_itc", "loss_itm", "loss_itg", "similarities", "itm_logits")},
                "generation": outputs.logits[data["attention_mask"].bool()].float(),
                "images": model.get_image_features(patch_features=data["patch_features"]).pooler_output,
                "texts": model.get_text_features(**texts).pooler_output,
                "captions": model.generate(patch_features=data["patch_features"], num_beams=1, max_length=12).float(),
            }
        )
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=0.05, rtol=0.02, msg=lambda m, n=name: f"{n}: {m}")


def test_what_flash_attention_cannot_do(flash):
    model, config = flash
    config._attn_implementation = "flash_attention_2"
    data = pairs()
    joint = (data["patch_features"].bfloat16(), data["input_ids"], data["attention_mask"])
    for objective in ("itc", "itg"):
        with pytest.raises(ValueError, match=f"flash_attention_2 has no mask for '{objective}' over queries and text"):
            model.bridge.qformer(*joint, objective)
    model.float()
    with pytest.raises(
        ValueError, match="The Q-Former is in torch.float32; flash_attention_2 needs float16 or bfloat16"
    ):
        model(**data, **NEGATIVES)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**data, **NEGATIVES).loss.isfinite()


@pytest.mark.core
def test_trainer(tmp_path):
    model, _ = stage1()
    data = pairs(8)
    rows = [{name: tensor[row] for name, tensor in data.items()} for row in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=2, seed=1,
        report_to=[], save_strategy="no", use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_two_processes_are_one_with_the_joint_batch(strategy, tmp_path):
    script = Path(__file__).with_name("stage1_of_two.py")
    # `--cpu` starts one process unless there is MPI; this starts two, and `Accelerator(cpu=True)` keeps them on the CPU
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, script, strategy, tmp_path / "found.pt"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    assert (found["processes"], found["backend"]) == (2, "gloo")
    model, _ = stage1()
    outputs = model(**pictures_and_captions(), **NEGATIVES)
    outputs.loss.backward()
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg"):
        torch.testing.assert_close(found[name], outputs[name].detach(), atol=1e-5, rtol=0, msg=name)
    for name, parameter in model.bridge.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert not (found["drawn"] == torch.arange(4)).any()
    assert "batches of [2, 1] pairs" in found["refused"]


# ---------------------------------------------------------------------- captions


@pytest.mark.core
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
def test_greedy_caption_is_the_slow_loop(model, options):
    data = pairs(2)
    normed = model.bridge.vision_layer_norm(data["patch_features"])
    expected = torch.full((2, 1), DEC)
    for _ in range(8):
        hidden = model.bridge.qformer(normed, expected, None, "itg")
        scores = model.bridge.lm_head(hidden[:, -1])
        scores[:, SEP] = -torch.inf  # not before the tenth token
        expected = torch.cat((expected, scores.argmax(dim=-1)[:, None]), dim=1)
    found = model.generate(patch_features=data["patch_features"], num_beams=1, max_length=9, min_length=9, **options)
    assert found.tolist() == expected.tolist()


@pytest.mark.core
@torch.no_grad()
def test_beams_of_a_batch_are_those_of_each_image(model):
    patches = pairs(3)["patch_features"]
    together = model.generate(patch_features=patches)
    assert together.shape[1] <= 30 and (together[:, 0] == DEC).all()
    for row in range(3):
        alone = model.generate(patch_features=patches[[row]])[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
    uncached = model.generate(patch_features=patches, use_cache=False)
    assert together.tolist() == uncached.tolist()


@torch.no_grad()
def test_caption_options(model):
    patches = pairs(2)["patch_features"]
    sampled = [
        (torch.manual_seed(seed), model.generate(patch_features=patches, do_sample=True, num_beams=1, top_p=0.9))[1]
        for seed in (0, 0, 1)
    ]
    assert sampled[0].tolist() == sampled[1].tolist() != sampled[2].tolist()
    several = model.generate(patch_features=patches, num_return_sequences=2, max_new_tokens=4, min_length=0)
    assert len(several) == 4
    prompt = torch.tensor([[DEC, 7, 8], [DEC, 9, 10]])
    begun = model.generate(patch_features=patches, input_ids=prompt, num_beams=1)
    assert begun[:, :3].tolist() == prompt.tolist()
    with pytest.raises(ValueError, match="different lengths"):
        model.generate(patch_features=patches, input_ids=torch.tensor([[DEC, 7, 8], [DEC, 9, 0]]))


# ---------------------------------------------------------------------- retrieval


@pytest.fixture(scope="module")
def retrieval():
    return stage1(cls=vlbridge.QFormerBlip2ForImageTextRetrieval)[0]


@torch.no_grad()
def test_ranking_is_the_slow_loop(retrieval):
    data = pairs(5)
    texts = {name: data[name][:4] for name in ("input_ids", "attention_mask")}
    itc = retrieval(patch_features=data["patch_features"], **texts).itc_scores
    assert itc.shape == (5, 4)
    found = retrieval.rank(patch_features=data["patch_features"], **texts, top_k=2, batch_size=3)
    torch.testing.assert_close(found.itc_scores, itc, atol=ATOL, rtol=0)
    for scores, similar, image_first in (
        (found.image_to_text, itc, True),
        (found.text_to_image, itc.T, False),
    ):
        assert scores.shape == similar.shape and (scores.isfinite().sum(dim=1) == 2).all()
        for row in range(len(similar)):
            for column in similar[row].topk(2).indices.tolist():
                image, text = (row, column) if image_first else (column, row)
                logits = retrieval(
                    patch_features=data["patch_features"][[image]],
                    **{name: tensor[[text]] for name, tensor in texts.items()},
                    use_image_text_matching_head=True,
                ).itm_logits
                expected = similar[row, column] + logits[0, 1]
                torch.testing.assert_close(scores[row, column], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_ranking_by_similarity_alone(retrieval):
    data = pairs(3)
    found = retrieval.rank(**data, top_k=0)
    assert torch.equal(found.image_to_text, found.itc_scores) and torch.equal(found.text_to_image, found.itc_scores.T)
    every = retrieval.rank(**data, top_k=100)
    assert every.image_to_text.isfinite().all()


def test_matching_takes_pairs(retrieval):
    data = pairs(3)
    with pytest.raises(ValueError, match="2 images, but 3 texts"):
        retrieval(**{**data, "patch_features": data["patch_features"][:2]}, use_image_text_matching_head=True)


# ---------------------------------------------------------------------- saving


@pytest.mark.core
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForPreTraining, vlbridge.QFormerBlip2ForImageTextRetrieval])
def test_saved_and_loaded(auto_class, tmp_path):
    model, processor = stage1(negatives_floor=1e-4, image_processor=clip_image_processor())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "bridge.lm_head.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    again, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.bridge.lm_head.decoder.weight is again.bridge.qformer.word_embeddings.weight
    assert again.config.negatives_floor == 1e-4 and again.config.qformer_config.use_text
    assert not any(parameter.requires_grad for parameter in again.vision_model.parameters())
    assert all(parameter.requires_grad for parameter in again.bridge.parameters())
    if auto_class is AutoModel:
        patches = pairs(2)["patch_features"]
        assert again.generation_config.num_beams == 3
        assert again.generate(patch_features=patches).tolist() == model.generate(patch_features=patches).tolist()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor) and loaded.max_length == processor.max_length
    loaded.check(again.config)


@pytest.mark.core
def test_bridge_alone(tmp_path):
    vision = AutoModel.from_config(VISION["clip"]())
    vision.save_pretrained(tmp_path / "vision")
    clip_image_processor().save_pretrained(tmp_path / "vision")
    model, _ = vlbridge.QFormerBlip2ForPreTraining.from_vision(
        tmp_path / "vision", bert_like_tokenizer(), qformer_config=dict(QFORMER), embed_dim=16
    )
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    weights = load_file(tmp_path / "bridge" / "model.safetensors")
    assert all(name.startswith("bridge.") for name in weights)
    again = AutoModel.from_pretrained(tmp_path / "bridge")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.bridge.lm_head.decoder.weight is again.bridge.qformer.word_embeddings.weight


def test_three_children_less_one(model):
    assert [name for name, _ in model.named_children()] == ["vision_model", "bridge"]


# ---------------------------------------------------------------------- from stage to stage


@pytest.mark.core
@torch.no_grad()
@pytest.mark.parametrize("instruction_aware", [False, True])
def test_stage2_begins_with_stage1s_qformer(instruction_aware, tmp_path):
    first, processor = stage1(image_processor=clip_image_processor())
    first.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    second, processor = vlbridge.QFormerBlip2ForConditionalGeneration.from_stage1(
        tmp_path, LANGUAGE["opt"](), tokenizer=tiny_tokenizer(), instruction_aware=instruction_aware
    )
    patches = pairs()["patch_features"]
    expected = first.get_image_features(patch_features=patches).last_hidden_state
    found = second.bridge.qformer(second.bridge.vision_layer_norm(patches))
    assert torch.equal(found, expected)
    assert second.config.qformer_config.use_text == instruction_aware
    assert ("qformer.word_embeddings.weight" in second.bridge.state_dict()) == instruction_aware
    assert (processor.qformer_tokenizer is not None) == instruction_aware
    for name, tensor in first.vision_model.state_dict().items():
        assert torch.equal(second.vision_model.state_dict()[name], tensor)
    assert {name for name, p in second.named_parameters() if p.requires_grad} == {
        f"bridge.{name}" for name, _ in second.bridge.named_parameters()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_tokens": 4}, r"qformer.query_tokens has shape \[1, 5, 32\], expected \[1, 4, 32\]"),
        ({"num_hidden_layers": 4}, "stage 1 has no qformer.layers.3.attention.dense.bias"),
        ({"num_hidden_layers": 2}, "there is no room for qformer.layers.2"),
        ({"num_attention_heads": 2}, "num_attention_heads is 2, but stage 1's 4"),
    ],
    ids=str,
)
def test_another_qformer_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        vlbridge.QFormerBlip2ForConditionalGeneration.from_stage1(
            stage1()[0],
            LANGUAGE["opt"](),
            tokenizer=tiny_tokenizer(),
            image_processor=clip_image_processor(),
            qformer_config={**QFORMER, **changes},
        )


def compose_from(source, **options):
    return tiny_model("qformer", "opt", qformer_init_from=source, **options)[0]


@pytest.mark.parametrize("given", ["folder", "model"])
@pytest.mark.parametrize("kind", ["bert", "stage1"])
def test_compose_begins_with_a_qformer_that_exists(kind, given, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "spread_weights", lambda model: None)
    source = tiny_bert() if kind == "bert" else stage1()[0]
    if given == "folder":
        source.save_pretrained(tmp_path)
    model = compose_from(tmp_path if given == "folder" else source)
    qformer = model.bridge.qformer
    if kind == "bert":
        block, ours = source.bert.encoder.layer[1], qformer.layers[1]
        assert torch.equal(ours.attention.query.weight, block.attention.self.query.weight)
        assert torch.equal(ours.feed_forward_query.dense.weight, block.output.dense.weight)
    else:
        theirs = source.bridge.state_dict()
        for name, tensor in qformer.state_dict().items():
            assert torch.equal(tensor, theirs[f"qformer.{name}"]), name
    assert all(parameter.requires_grad for parameter in model.bridge.parameters())


def test_compose_refuses_what_the_qformer_cannot_begin_as():
    with pytest.raises(
        ValueError, match=r"can't be initialised from the BERT in BertForMaskedLM: .* has shape \[16, 16\]"
    ):
        compose_from(tiny_bert(hidden_size=16))
    with pytest.raises(ValueError, match="Stage 1 does not fit this model: num_attention_heads is 2"):
        compose_from(stage1()[0], qformer_config={**QFORMER, "num_attention_heads": 2})
    with pytest.raises(ValueError, match="initialised from a BertForMaskedLM, not from a OPTForCausalLM"):
        compose_from(AutoModelForCausalLM.from_config(LANGUAGE["opt"]()))
    with pytest.raises(ValueError, match="bridge='mlp' has no option qformer_init_from"):
        tiny_model("mlp", qformer_init_from="somewhere")


def test_stage1_is_no_language_model():
    language = AutoModelForCausalLM.from_config(LANGUAGE["opt"]())
    with pytest.raises(ValueError, match="stage1 is a OPTForCausalLM"):
        vlbridge.QFormerBlip2ForConditionalGeneration.from_stage1(language, LANGUAGE["opt"]())


# ---------------------------------------------------------------------- stage 3


@pytest.fixture(scope="module", params=["llama", "t5"])
def instructed(request):
    return tiny_model("qformer", request.param, qformer_config=dict(QFORMER_TEXT))


def instruction(row: int, length: int) -> torch.Tensor:
    return torch.tensor([[2, *range(5 + 9 * row, 3 + 9 * row + length), SEP]])


@torch.no_grad()
def test_instructions_matter_and_belong_to_their_image(instructed):
    model, _ = instructed
    patches = pairs(2)["patch_features"]
    ids = torch.cat((torch.nn.functional.pad(instruction(0, 4), (0, 3)), instruction(1, 7)))
    mask = (ids != 0).long()
    together = model.get_image_features(patch_features=patches, qformer_input_ids=ids, qformer_attention_mask=mask)
    assert together.pooler_output.shape == (2, 5, 32)
    for row, length in enumerate((4, 7)):
        alone = model.get_image_features(patch_features=patches[[row]], qformer_input_ids=instruction(row, length))
        torch.testing.assert_close(together.pooler_output[[row]], alone.pooler_output, atol=ATOL, rtol=0)
    plain = model.get_image_features(patch_features=patches).pooler_output
    assert (plain - together.pooler_output).abs().max() > 100 * ATOL


@pytest.mark.core
@torch.no_grad()
def test_generation_reads_the_instruction(instructed):
    model, processor = instructed
    patches = pairs(3)["patch_features"]
    rows = [f"{'<image>' * 5}what is it?", f"a{'<image>' * 5} longer b{'<image>' * 5}one"]
    tokens = processor.tokenizer(rows, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = torch.cat((instruction(0, 6), instruction(1, 6), instruction(1, 6)))
    inputs = {**tokens, "patch_features": patches, "qformer_input_ids": ids}
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(**inputs, **options)
    embedded = model.get_image_features(patch_features=patches, qformer_input_ids=ids, return_dict=True)
    given = model.generate(**tokens, mm_encoder_outputs={"image": embedded}, **options)
    assert together.tolist() == given.tolist()
    beams = model.generate(**inputs, **options, num_beams=2)
    assert len(beams) == 2
    extra = {"decoder_input_ids": torch.tensor([[0], [0]])} if model.config.is_encoder_decoder else {}
    with_it = model(**inputs, **extra).logits[:, -1]
    inputs["qformer_input_ids"] = ids + 9 * (ids > 4)
    assert (model(**inputs, **extra).logits[:, -1] - with_it).abs().max() > 100 * ATOL


def test_one_instruction_per_image(instructed):
    model, _ = instructed
    with pytest.raises(ValueError, match="1 instructions in qformer_input_ids, but 2 images"):
        model.get_image_features(patch_features=pairs(2)["patch_features"], qformer_input_ids=instruction(0, 5))


def test_instructions_need_a_text_side():
    model, _ = tiny_model("qformer")
    with pytest.raises(ValueError, match="use_text"):
        model.get_image_features(patch_features=pairs(1)["patch_features"], qformer_input_ids=instruction(0, 5))


def test_gradients_reach_the_text_side(instructed):
    model, _ = instructed
    features = model.get_image_features(
        patch_features=pairs(2)["patch_features"], qformer_input_ids=instruction(0, 5).repeat(2, 1)
    )
    qformer: QFormer = model.bridge.qformer
    gradient = torch.autograd.grad(features.pooler_output.sum(), qformer.word_embeddings.weight)[0]
    assert gradient[instruction(0, 5)[0]].abs().sum() > 0
