"""Losses of the trainer against the slow obvious computation, and what evaluations give and call it."""

from __future__ import annotations

import io
import json

import pytest
import torch
from tiny import BRIDGE_OPTIONS, VISION, clip_image_processor, tiny_image
from toy_records import talk
from toy_runs import save_data, save_parts, toy_records, toy_trainer
from transformers import EarlyStoppingCallback, TrainingArguments

from vlbridge import FAMILIES
from vlbridge.modeling import modeling_losses
from vlbridge.training.training_datasets import Samples
from vlbridge.training.training_encoding import IGNORED, encoder_for
from vlbridge.training.training_failures import TrainingError
from vlbridge.training.training_packing import PackedEncoder
from vlbridge.training.training_recipes import RecipeError, read_recipe
from vlbridge.training.training_run import build_trainer, train
from vlbridge.training.training_trainer import BridgeTrainer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for language in ("llama", "t5"):
        save_parts(folder, language)
    return folder


def row_losses(logits, targets, epsilon: float) -> list[torch.Tensor]:
    """Sums of rows' losses, token by token: (1 - epsilon) of the label's, epsilon of all words'."""
    rows = []
    for row, labels in zip(logits.double(), targets):
        total = torch.zeros((), dtype=torch.float64)
        for scores, label in zip(row.reshape(-1, row.shape[-1]), labels.reshape(-1).tolist()):
            if label != IGNORED:
                logs = scores - scores.logsumexp(0)
                total = total - (1 - epsilon) * logs[label] - epsilon * logs.mean()
        rows.append(total)
    return rows


def step_of(trainer) -> tuple[list[dict], torch.Tensor | None, float]:
    """The first step's batches, the number of their tokens, and the loss of the step as it is trained."""
    trainer.create_optimizer_and_scheduler(1)
    trainer.state.max_steps = 1
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    loader = iter(trainer.get_train_dataloader())
    batches, count = trainer.get_batch_samples(loader, trainer.args.gradient_accumulation_steps, trainer.args.device)
    kept = [dict(batch) for batch in batches]
    trainer.model.eval()
    trainer.model.train = lambda mode=True: trainer.model  # no dropout: the same logits twice
    return kept, count, float(sum(trainer.training_step(trainer.model, dict(batch), count) for batch in batches))


def logits_of(trainer, batch) -> torch.Tensor:
    inputs = {k: v for k, v in trainer._model_inputs(batch).items() if k != "token_weights"}
    with torch.no_grad():
        return trainer.model(**inputs).logits


# ---------------------------------------------------------------------- smoothed labels


@pytest.mark.parametrize(
    ("bridge", "language"), [("mlp", "llama"), ("qformer", "llama"), ("perceiver", "llama"), ("qformer", "t5")]
)
def test_smoothed_labels_are_those_of_the_next_token(bridge, language, parts, tmp_path):
    build = toy_trainer(parts, bridge, language, dropout=0.0)
    trainer = build(tmp_path, label_smoothing_factor=0.3, gradient_accumulation_steps=2)
    batches, count, loss = step_of(trainer)
    total, tokens = 0.0, 0
    for batch in batches:
        logits, labels = logits_of(trainer, batch), batch["labels"]
        if language != "t5":
            logits, labels = logits[:, :-1], labels[:, 1:]
        total += float(sum(row_losses(logits, labels, 0.3)))
        tokens += int((labels != IGNORED).sum())
    assert tokens == int(count) > 0
    assert loss == pytest.approx(total / tokens, rel=1e-5)
    # and in evaluations, with the rows' own number of tokens
    inputs = {k: v for k, v in batches[0].items() if k not in ("ids", "sources")}
    found, logits, labels = trainer.prediction_step(trainer.model, dict(inputs), False)
    shift = int(language != "t5")
    expected = sum(row_losses(logits[:, : logits.shape[1] - shift], labels[:, shift:], 0.3))
    assert float(found) == pytest.approx(float(expected) / int((labels[:, shift:] != IGNORED).sum()), rel=1e-5)


@pytest.mark.parametrize(("bridge", "language"), [("mlp", "llama"), ("perceiver", "llama"), ("qformer", "t5")])
def test_logits_are_made_only_for_who_reads_them(bridge, language, parts, tmp_path, monkeypatch):
    monkeypatch.setitem(modeling_losses.BLOCK_LOGITS, "cpu", 2 * 110)  # of two tokens of the toy vocabulary
    trainer = toy_trainer(parts, bridge, language, dropout=0.0)(tmp_path)
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {name: value for name, value in batch.items() if name not in ("ids", "sources", "skipped")}
    scored = []
    trainer.model.language_model.get_output_embeddings().register_forward_hook(
        lambda layer, args, logits: scored.append(logits.shape[:-1].numel())
    )
    loss, logits, labels = trainer.prediction_step(trainer.model, dict(batch), False)
    assert logits.shape[:2] == labels.shape and scored == [labels.numel()]
    scored.clear()
    alone, logits, _ = trainer.prediction_step(trainer.model, dict(batch), True)
    assert logits is None and max(scored) <= 2 and len(scored) > 2
    assert float(alone) == pytest.approx(float(loss), rel=1e-5)
    scored.clear()
    trained = trainer.compute_loss(trainer.model, dict(batch))
    assert max(scored) <= 2 and float(trained.detach()) == pytest.approx(float(loss), rel=1e-5)
    monkeypatch.setattr(trainer.model, "loss_function", lambda logits, **kwargs: logits.sum(), raising=False)
    if language != "t5":  # whose forward has its own loss
        scored.clear()
        trainer.compute_loss(trainer.model, dict(batch))
        assert len(scored) == 1


def test_packed_rows_are_smoothed_as_their_samples(parts, tmp_path):
    build = toy_trainer(parts, "mlp", dropout=0.0)
    records = [talk("what?", f"w{number} w{number + 9}", seed=number) for number in range(4)]
    model, processor = build.compose()
    losses = []
    for packed in (False, True):
        trainer = build(tmp_path, records=records, composed=(model, processor), label_smoothing_factor=0.3,
                        per_device_train_batch_size=4)  # fmt: skip
        if packed:
            encoder = PackedEncoder(encoder_for(model, processor), model, max_tokens=200)
            args = trainer.args
            trainer = BridgeTrainer(
                model, args, encoder=encoder, processor=processor, train_dataset=Samples(records, encoder)
            )
        losses.append(step_of(trainer)[2])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_stage_1_has_nothing_to_smooth_or_weigh(parts, tmp_path):
    build = toy_trainer(parts, "stage1")
    with pytest.raises(ValueError, match="no labels to smooth"):
        build(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="no tokens to weigh"):
        build(tmp_path, keywords={"loss_weights": {"a": 1.0, "b": 2.0}})
    with pytest.raises(RecipeError, match="no labels to smooth"):
        read_recipe("blip2_stage1", ["arguments.label_smoothing_factor=0.1"])


# ---------------------------------------------------------------------- classes


def classes(family: str, output, **arguments) -> tuple[BridgeTrainer, dict]:
    torch.manual_seed(0)
    options = {**BRIDGE_OPTIONS, "mlp": {"hidden_size": 16}}[family]
    model, processor = FAMILIES[family].classifier_class.from_vision(
        VISION["clip"](), image_processor=clip_image_processor(), num_labels=3, **options
    )
    records = []
    for number in range(6):
        file = io.BytesIO()
        tiny_image(number).save(file, "PNG")
        images = [{"path": None, "bytes": file.getvalue()}]
        records.append({"id": str(number), "source": "ab"[number % 3 > 0], "images": images, "label": number % 3})
    encoder = encoder_for(model, processor)
    weights = arguments.pop("loss_weights", None)
    given = {"max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "report_to": "none",
             "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True, "learning_rate": 1e-3,
             "save_strategy": "no"}  # fmt: skip
    args = TrainingArguments(output_dir=str(output), **{**given, **arguments})
    data = Samples(records, encoder)
    trainer = BridgeTrainer(
        model, args, encoder=encoder, processor=processor, loss_weights=weights, train_dataset=data, eval_dataset=data
    )
    return trainer, {record["id"]: record for record in records}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
@pytest.mark.parametrize("weights", [None, {"a": 1.0, "b": 3.0}])
def test_classes_are_weighed_and_smoothed(family, epsilon, weights, tmp_path):
    trainer, _ = classes(family, tmp_path, loss_weights=weights, label_smoothing_factor=epsilon)
    batches, _, loss = step_of(trainer)
    by_source, all_batches = {"a": [], "b": []}, []
    for batch in batches:
        rows = row_losses(logits_of(trainer, batch), batch["labels"], epsilon)
        all_batches.append(sum(rows) / len(rows))
        for source, row in zip(batch["sources"], rows):
            by_source[source].append(row)
    if weights is None:
        expected = sum(all_batches) / len(all_batches)
    else:
        expected = sum(weight * sum(by_source[name]) / len(by_source[name]) for name, weight in weights.items())
    assert loss == pytest.approx(float(expected), rel=1e-5)
    trainer.train()


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("bridge", FAMILIES)
@pytest.mark.parametrize("kind", ["text first", "one and two images", "text last"])
def test_predictions_are_the_logits_of_every_row(bridge, kind, parts, tmp_path):
    build = toy_trainer(parts, bridge)
    text = {**talk("what?", "w1 w2", seed=1), "images": []}
    text["messages"] = [{**message, "content": message["content"][-1:]} for message in text["messages"]]
    two = talk("what?", "w3", seed=2)
    two["images"] = two["images"] * 2
    two["messages"][0]["content"] = two["messages"][0]["content"][:1] + two["messages"][0]["content"]
    one = talk("which one?", "w4 w5 w6", seed=3)
    records = {"text first": [text, one], "one and two images": [one, two], "text last": [one, text]}[kind]
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    trainer = build(
        tmp_path, per_device_eval_batch_size=1, prediction_loss_only=False,
        keywords={"compute_metrics": compute_metrics},
    )  # fmt: skip
    data = Samples(records, trainer.encoder)
    assert trainer.evaluate(data)["eval_rows"] == 2
    (prediction,) = seen
    for row, record in enumerate(records):
        batch = trainer.encoder.collate([trainer.encoder.encode(record)])
        with torch.no_grad():
            expected = trainer.model.eval()(**batch).logits[0]
        found = torch.as_tensor(prediction.predictions[row][: len(expected)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert prediction.label_ids[row][: len(expected)].tolist() == batch["labels"][0].tolist()


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    return {**save_parts(folder), **save_data(folder / "data")}


def recipe(toys, *settings, evaluation=({"source": "llava"},)):
    sets = [{"path": toys["llava"], "options": {"images": toys["images"]}, **data} for data in evaluation]
    given = {"vision": toys["vision"], "language": toys["language"], "data.0.path": toys["llava"],
             "data.0.options": {"images": toys["images"]}, "evaluation": sets, "cache_features": None}  # fmt: skip
    fast = ["arguments.max_steps=4", "arguments.save_steps=1", "arguments.eval_steps=1", "arguments.use_cpu=true",
            "arguments.eval_strategy=steps", "arguments.save_strategy=steps", "arguments.logging_steps=1",
            "arguments.load_best_model_at_end=true", "arguments.learning_rate=0.1",
            "arguments.per_device_train_batch_size=2", "arguments.per_device_eval_batch_size=2"]  # fmt: skip
    return read_recipe("llava_stage1", [*(f"{k}={json.dumps(v)}" for k, v in given.items()), *fast, *settings])


@pytest.mark.parametrize("sets", [1, 2])
def test_the_best_model_is_loaded_at_the_end(sets, toys, tmp_path):
    asked = recipe(toys, "arguments.save_total_limit=2", evaluation=({"source": "llava"}, {"source": "llava"})[:sets])
    assert asked.evaluation_names() == ["llava", "llava_2"][:sets]
    trainer = build_trainer(asked, tmp_path)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
    trainer.train()
    means = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    alone = {e["step"]: e["eval_llava_loss"] for e in trainer.state.log_history if "eval_llava_loss" in e}
    assert means == pytest.approx(alone) and len(means) >= 3  # both data sets are the same
    best = min(means, key=means.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(means[best], rel=1e-5)


def test_metrics_that_no_evaluation_gives_are_refused_before_training(toys, parts, tmp_path):
    with pytest.raises(RecipeError, match="is 'bleu'; expected one of eval_loss, eval_llava_loss, eval_held out_loss"):
        recipe(toys, "arguments.metric_for_best_model=bleu",
               evaluation=({"source": "llava"}, {"source": "llava", "name": "held out"}))  # fmt: skip
    with pytest.raises(RecipeError, match="name a data set in evaluation"):
        recipe(toys, evaluation=())
    build = toy_trainer(parts, "mlp")
    held_out = {"talks": Samples(toy_records(2), None)}
    settings = {"eval_strategy": "steps", "eval_steps": 100, "load_best_model_at_end": True}
    trainer = build(
        tmp_path, keywords={"eval_dataset": held_out}, metric_for_best_model="eval_0_llava_loss", **settings
    )
    with pytest.raises(TrainingError, match="is 'eval_0_llava_loss'; expected one of eval_loss, eval_talks_loss"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = build(tmp_path, keywords={"eval_dataset": held_out}, dataloader_drop_last=True,
                    per_device_eval_batch_size=4, **settings)  # fmt: skip
    with pytest.raises(TrainingError, match="an evaluation has 2 records, and batches of fewer than 4 are dropped"):
        trainer.train()


def test_the_summary_of_several_evaluations(toys, tmp_path):
    asked = recipe(toys, evaluation=({"source": "llava"}, {"source": "llava", "name": "more"}))
    summary = train(asked, tmp_path / "run")
    assert [row["dataset"] for row in summary["evaluation"]] == ["llava", "more"]
