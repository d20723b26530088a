"""transformers' own `Trainer` with bridged models, without anything of this package around it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import (
    BRIDGE_OPTIONS,
    IMAGE_SIZE,
    LANGUAGE,
    QFORMER,
    VISION,
    bert_like_tokenizer,
    clip_image_processor,
    spread_weights,
    tiny_image,
    tiny_model,
    tiny_stage1,
)
from toy_records import IMAGE, TEXT, image, talk
from transformers import Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlbridge import FAMILIES
from vlbridge.compat_hooks import NEXT_TOKEN_CLASS
from vlbridge.modeling.modeling_bridged import BridgedOutput
from vlbridge.modeling.modeling_mpt import MosaicGPTForCausalLM
from vlbridge.training.training_encoding import encoder_for
from vlbridge.training.training_packing import PackedEncoder


IGNORED = -100


def arguments(folder, **more) -> TrainingArguments:
    given = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 1, "max_steps": 1, "learning_rate": 0.0,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "log_level": "error", "seed": 3,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**given, **more})


def quiet(model):
    """A model without dropout, also while it is trained: the same logits twice."""
    model.eval().train = lambda mode=True: model
    return model


def talks(count: int = 4) -> list[dict]:
    """Conversations about no, one and two images, with answers of other lengths."""
    records = []
    for number in range(count):
        record = talk("what?", "yes " * number + f"w{number}", seed=number)
        images = number % 3
        record["images"] = [image(number + more) for more in range(images)]
        record["messages"][0]["content"] = [*[IMAGE] * images, TEXT("what?")]
        records.append(record)
    return records


class Rows(torch.utils.data.Dataset):
    """Records that are encoded when they are asked for."""

    def __init__(self, encoder, records):
        self.encoder, self.records = encoder, records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.encoder.encode(self.records[index])


def smoothed_loss(logits, labels, epsilon: float, shift: bool) -> tuple[float, int]:
    """The sum of all tokens' losses, one by one, and their number."""
    total, count = 0.0, 0
    for scores, row in zip(logits.double(), labels.tolist()):
        for place, label in enumerate(row):
            if label == IGNORED or (shift and place == 0):
                continue
            logs = scores[place - int(shift)].log_softmax(0)
            total -= float((1 - epsilon) * logs[label] + epsilon * logs.mean())
            count += 1
    return total, count


# ---------------------------------------------------------------------- smoothed labels


@pytest.mark.parametrize(
    ("bridge", "language", "adapter", "accumulate"),
    [("mlp", "llama", False, 2), ("qformer", "opt", True, 1), ("perceiver", "llama", False, 1),
     ("perceiver", "llama", True, 2), ("qformer", "t5", False, 2), ("mlp", "t5", True, 1)],
)  # fmt: skip
def test_smoothed_labels_are_those_of_the_next_token(bridge, language, adapter, accumulate, tmp_path):
    model, processor = tiny_model(bridge, language)
    encoder, shift = encoder_for(model, processor), language != "t5"
    if adapter:
        targets = r"language_model\..*\.(q_proj|v_proj|q|v)"
        model = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=["bridge"]))
    model, batches = quiet(model), []

    def collate(samples):
        batch = encoder.collate(samples)
        if not shift:
            batch["decoder_input_ids"] = encoder_inputs(batch["labels"])
        batches.append(batch)
        return batch

    def encoder_inputs(labels):
        bare = model.get_base_model() if adapter else model
        return bare.language_model.prepare_decoder_input_ids_from_labels(labels)

    args = arguments(tmp_path, label_smoothing_factor=0.3, remove_unused_columns=False,
                     gradient_accumulation_steps=accumulate)  # fmt: skip
    data = Rows(encoder, talks())
    trainer = Trainer(model, args, data_collator=collate, train_dataset=data, eval_dataset=data)
    loss = trainer.train().training_loss
    totals, counts = [], []
    for batch in batches[:accumulate]:
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        total, count = smoothed_loss(logits, batch["labels"], 0.3, shift)
        totals.append(total)
        counts.append(count)
    assert sum(counts) > accumulate
    assert loss == pytest.approx(sum(totals) / sum(counts), rel=1e-5)
    batches.clear()
    found = trainer.evaluate()["eval_loss"]
    rows = []
    for batch in batches:
        with torch.no_grad():
            total, count = smoothed_loss(model.eval()(**batch).logits, batch["labels"], 0.3, shift)
        rows.append(total / count)
    assert found == pytest.approx(sum(rows) / len(rows), rel=1e-5)


def test_packed_rows_are_smoothed_as_their_samples(tmp_path):
    model, processor = tiny_model("mlp")
    encoder, losses = encoder_for(quiet(model), processor), []
    for put_together in (encoder, PackedEncoder(encoder, model, max_tokens=400)):
        args = arguments(tmp_path, label_smoothing_factor=0.3, remove_unused_columns=False,
                         per_device_train_batch_size=4)  # fmt: skip
        data = Rows(put_together, talks())
        trainer = Trainer(model, args, data_collator=put_together.collate, train_dataset=data)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_are_smoothed_as_they_are(family, tmp_path):
    model, rows = classifier(family)
    args = arguments(tmp_path, label_smoothing_factor=0.3, per_device_train_batch_size=6)
    loss = Trainer(quiet(model), args, train_dataset=rows).train().training_loss
    with torch.no_grad():
        logits = model.eval()(torch.stack([row["pixel_values"] for row in rows])).logits
    labels = torch.tensor([row["labels"] for row in rows])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_only_trainer_takes_the_models_for_those_of_its_table():
    assert NEXT_TOKEN_CLASS in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for bridge, language in (("mlp", "llama"), ("qformer", "t5")):
        model, _ = tiny_model(bridge, language)
        name = type(model).__name__
        assert repr(model).startswith(f"{name}(\n") and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        assert (model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) == (language == "llama")
        assert model._get_name() == name and {model._get_name()} == {name}

    class Mine(FAMILIES["mlp"].model_class):
        """A class of somebody else."""

    own = Mine(tiny_model("mlp")[0].config)
    assert own._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and own._get_name() == "Mine"
    alone = MosaicGPTForCausalLM(LANGUAGE["mosaic_gpt"]())  # a class of ours that reads text alone
    assert alone._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert alone.transformer._get_name() not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    stage1, _ = tiny_stage1()
    assert stage1._get_name() not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert classifier("mlp")[0]._get_name() not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


# ---------------------------------------------------------------------- predictions


def classifier(family: str):
    torch.manual_seed(0)
    options = {**BRIDGE_OPTIONS, "mlp": {"hidden_size": 16}}[family]
    model, processor = FAMILIES[family].classifier_class.from_vision(
        VISION["clip"](), image_processor=clip_image_processor(), num_labels=3, **options
    )
    spread_weights(model)
    pixels = processor(images=[tiny_image(number) for number in range(6)], return_tensors="pt")["pixel_values"]
    return model, [{"pixel_values": row, "labels": number % 3} for number, row in enumerate(pixels)]


def test_the_predictions_of_a_family_are_its_logits():
    fields = {field.name for field in dataclasses.fields(BridgedOutput)}
    for family in FAMILIES.values():
        for config_class in (family.config_class, family.classifier_class.config_class):
            ignored = set(config_class.keys_to_ignore_at_inference)
            assert fields - ignored == {"loss", "logits"} and {"cache", "past_key_values"} <= ignored
    model, _ = tiny_model("mlp")
    assert "keys_to_ignore_at_inference" not in model.config.to_dict()


@pytest.mark.parametrize("kind", ["text first", "one and two images", "text last", "all in one batch"])
@pytest.mark.parametrize(
    ("bridge", "language"), [("mlp", "llama"), ("qformer", "llama"), ("perceiver", "llama"), ("qformer", "t5")]
)
def test_predictions_are_the_logits_of_every_row(bridge, language, kind, tmp_path):
    model, processor = tiny_model(bridge, language)
    encoder, (text, one, two, _) = encoder_for(model, processor), talks()
    records = {"text first": [text, one], "one and two images": [one, two], "text last": [one, text],
               "all in one batch": [two, text, one]}[kind]  # fmt: skip
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    args = arguments(tmp_path, remove_unused_columns=False, per_device_eval_batch_size=1 + 2 * ("all" in kind))
    data = Rows(encoder, records)
    trainer = Trainer(model, args, data_collator=encoder.collate, eval_dataset=data, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == len(records)
    predicted = trainer.predict(data)
    singles = []
    for row, record in enumerate(records):
        batch = encoder.collate([encoder.encode(record)])
        with torch.no_grad():
            outputs = model.eval()(**batch)
        singles.append(float(outputs.loss))
        for prediction in (*seen, predicted):
            found = torch.as_tensor(prediction.predictions[row][: len(outputs.logits[0])])
            torch.testing.assert_close(found, outputs.logits[0], atol=1e-5, rtol=1e-5)
            assert prediction.label_ids[row][: len(outputs.logits[0])].tolist() == batch["labels"][0].tolist()
    if "all" not in kind:
        assert metrics["eval_loss"] == pytest.approx(sum(singles) / len(singles), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_of_classes(family, tmp_path):
    model, rows = classifier(family)
    model.config.vision_config.output_hidden_states = True
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = Trainer(
        model, args, eval_dataset=rows, compute_metrics=lambda found: {"right": float(len(found.predictions))}
    )
    assert trainer.evaluate()["eval_right"] == 6.0
    with torch.no_grad():
        expected = model.eval()(torch.stack([row["pixel_values"] for row in rows])).logits
    found = trainer.predict(rows)
    torch.testing.assert_close(torch.as_tensor(found.predictions), expected, atol=1e-5, rtol=1e-5)
    assert found.label_ids.tolist() == [0, 1, 2] * 2


def pairs(count: int = 6):
    """Pairs of stage 1, with texts of other lengths."""
    model, processor = tiny_stage1()
    encoder = encoder_for(model, processor)
    texts = [" ".join(f"w{number + more}" for more in range(1 + number % 3)) for number in range(count)]
    records = [{"id": str(n), "source": "s", "images": [image(n)], "caption": text} for n, text in enumerate(texts)]
    return model, encoder, records


@pytest.mark.parametrize("objectives", ["all", "no generation"])
def test_predictions_of_stage_1_are_a_row_per_pair(objectives, tmp_path):
    model, encoder, records = pairs()
    if objectives != "all":
        model.config.itg_weight = 0.0
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"rows": len(prediction.predictions[-1])}

    args = arguments(tmp_path, remove_unused_columns=False, per_device_eval_batch_size=4)
    trainer = Trainer(
        model, args, data_collator=encoder.collate, eval_dataset=Rows(encoder, records),
        compute_metrics=compute_metrics,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 6 and metrics["eval_loss"] > 0
    (prediction,) = seen
    names = ["logits"] * (objectives == "all") + ["image_features", "text_features"]
    assert len(prediction.predictions) == len(names)
    for row, record in enumerate(records):
        with torch.no_grad():
            outputs = model.eval()(**encoder.collate([encoder.encode(one) for one in (record, records[row - 1])]))
        for name, values in zip(names, prediction.predictions):
            expected = outputs[name][0]
            found = torch.as_tensor(values[row][: len(expected)])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


# ---------------------------------------------------------------------- inputs


def rows_of(kind: str) -> tuple:
    """A model, and rows as a processor gives them, each with images of its own: all that `Trainer` might drop."""
    pictures = [tiny_image(number, size) for number, size in enumerate([(40, 33), (20, 60), (64, 30)])]
    texts = ["<image>what?", "<image>and <image>?", "<image>yes"]
    if kind == "anyres":
        side = IMAGE_SIZE
        grids = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
        model, processor = tiny_model("mlp", image_grid_pinpoints=grids)
    elif kind == "instructions":
        model, processor = tiny_model("qformer", qformer_config={**QFORMER, "use_text": True, "vocab_size": 60})
        processor.qformer_tokenizer = bert_like_tokenizer()
    elif kind == "places":
        model, processor = tiny_model("perceiver", max_num_media=4)
    elif kind == "videos":
        model, processor = tiny_model("perceiver", max_num_frames=4)
    else:
        model, processor = tiny_model(kind)
    rows = []
    for number, text in enumerate(texts):
        images = [pictures[(number + more) % 3] for more in range(text.count("<image>"))]
        given = {"text": text, "images": images}
        if kind == "videos":
            given = {"text": [text], "images": [[pictures[: 1 + more] for more in range(len(images))]]}
        if kind == "instructions":
            given["qformer_text"] = f"w{number} w{number + 1}"
        row = dict(processor(**given, return_tensors="pt"))
        if kind == "places":
            row["media_index"] = torch.arange(len(images))
        labels = row["input_ids"].clone()
        labels[labels == model.config.image_token_id] = IGNORED
        rows.append({**row, "labels": labels})
    return quiet(model), rows


def together(rows: list[dict]) -> dict:
    """One row is a batch as it is; `Trainer` has dropped from it what it drops."""
    (row,) = rows
    return {name: torch.as_tensor(value) for name, value in row.items()}


KINDS = {
    "mlp": set(), "qformer": set(), "perceiver": set(), "anyres": {"image_sizes"},
    "instructions": {"qformer_input_ids"}, "places": {"media_index"}, "videos": {"patch_mask"},
}  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_input_is_dropped(kind, wrapped, tmp_path):
    """With and without an adapter around the model and `datasets` around the rows."""
    model, rows = rows_of(kind)
    assert KINDS[kind] <= rows[1].keys()
    with torch.no_grad():
        expected = [float(model(**row).loss) for row in rows]
        for name in rows[1].keys() - {"input_ids", "labels", "attention_mask", "qformer_attention_mask"}:
            less = {key: value for key, value in rows[1].items() if key != name}
            try:
                assert float(model(**less).loss) != expected[1], name
            except ValueError:
                continue  # refused
    data = [{**row, "notes": "for nobody"} for row in rows]
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        data = Dataset.from_list([{k: v if isinstance(v, str) else v.tolist() for k, v in row.items()} for row in data])
    args = arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    assert args.remove_unused_columns
    trainer = Trainer(model, args, data_collator=together, train_dataset=data, eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    trainer.train()


@pytest.mark.parametrize(("bridge", "workers"), [("mlp", 0), ("qformer", 2), ("perceiver", 2)])
def test_batches_by_length_from_workers(bridge, workers, tmp_path):
    """A collator with the processor in it, as recipes have it: batches of rows of like length, in other processes."""
    model, processor = tiny_model(bridge)
    encoder, seen = encoder_for(quiet(model), processor), []
    data = Dataset.from_list([{"number": number, "length": (number * 5) % 16} for number in range(16)])
    records = [talks(3)[1 + number % 2] for number in range(16)]  # frozen models learn nothing of text alone

    def collate(rows):
        batch = encoder.collate([encoder.encode(records[row["number"]]) for row in rows])
        return {**batch, "numbers": torch.tensor([row["number"] for row in rows])}

    class Watching(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            numbers = inputs.pop("numbers")
            seen.append((numbers.tolist(), float(super().training_step(model, dict(inputs), num_items_in_batch))))
            return torch.tensor(seen[-1][1])

    args = arguments(tmp_path, remove_unused_columns=False, dataloader_num_workers=workers, max_steps=8,
                     train_sampling_strategy="group_by_length")  # fmt: skip
    Watching(model, args, data_collator=collate, train_dataset=data).train()
    assert sorted(number for numbers, _ in seen for number in numbers) == list(range(16))
    for numbers, loss in seen:
        batch = encoder.collate([encoder.encode(records[number]) for number in numbers])
        with torch.no_grad():
            assert loss == pytest.approx(float(model(**batch).loss), rel=1e-5)
    lengths = [[data[number]["length"] for number in numbers] for numbers, _ in seen]
    assert sum(first > second for first, second in lengths) >= 7  # the longest row's place is taken by another


@pytest.mark.parametrize("bridge", ["mlp", "qformer"])
def test_an_encoder_decoder_with_smoothed_labels(bridge, tmp_path):
    """`Trainer` hides the labels from the model, so the collator gives what the decoder reads, as for any T5."""
    model, processor = tiny_model(bridge, "t5")
    quiet(model)
    assert not hasattr(tiny_model(bridge)[0], "prepare_decoder_input_ids_from_labels")
    labels = torch.tensor([[20, 21, 22, 2], [30, 31, 2, IGNORED]])
    batch = {**processor(images=[tiny_image(0), tiny_image(1)], text=["<image>a", "<image>b"], return_tensors="pt")}

    def trained(more: dict) -> float:
        trainer = Trainer(
            model, arguments(tmp_path, label_smoothing_factor=0.3, remove_unused_columns=False),
            train_dataset=[{"row": 0}] * 2, data_collator=lambda rows: {**batch, "labels": labels, **more},
        )  # fmt: skip
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    with pytest.raises(ValueError, match="t5 is an encoder-decoder and needs labels or decoder_input_ids.*smooths"):
        trained({})
    read = model.prepare_decoder_input_ids_from_labels(labels=labels)
    assert read[0].tolist() == [0, 20, 21, 22]
    with torch.no_grad():
        logits = model(**batch, labels=labels).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.3)
    assert trained({"decoder_input_ids": read}) == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.core
@pytest.mark.parametrize("bridge, language", [("mlp", "llama"), ("qformer", "llama"), ("qformer", "t5")])
def test_a_batch_of_text_alone_changes_nothing(bridge, language, tmp_path):
    """Nothing that is trained has a part in it; torch's own error would end the training of a mixture."""
    model, processor = tiny_model(bridge, language)
    batch = {**processor(text=["what is it?", "what is he?"], return_tensors="pt")}
    trainer = Trainer(
        model, arguments(tmp_path, learning_rate=0.1, remove_unused_columns=False), train_dataset=[{"row": 0}] * 2,
        data_collator=lambda rows: {**batch, "labels": batch["input_ids"]},
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**batch, labels=batch["input_ids"]).loss.item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert trainer.state.log_history[0]["grad_norm"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
