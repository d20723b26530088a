"""Runs of recipes: `vlbridge train`, on `BridgeTrainer`."""

from __future__ import annotations

import json
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import set_seed
from transformers.utils import logging

from ..compat import take
from ..files import write_text
from ..hub import check_pins
from .training_checkpoints import last_checkpoint
from .training_data import hold_out, load, mix, skip_broken
from .training_datasets import Samples, SampleStream
from .training_encoding import encoder_for
from .training_features import FeatureCache, FlushFeatures, PreparedEncoder
from .training_models import build_model, without_zero3_init
from .training_packing import PackedEncoder
from .training_recipes import PARTS, DataRecipe, EvaluationRecipe, Recipe, RecipeError, read_recipe
from .training_samples import SampleTable, generate, rows_of
from .training_trainer import BridgeTrainer
from .training_watch import RunReport


logger = logging.get_logger(__name__)


# ---------------------------------------------------------------------- data


def load_data(data: DataRecipe, max_broken: float = 0.01, source: str | None = None):
    """Load a recipe's data set as records.

    Broken records are left out: here, or of a stream while it is read.

    Args:
        data: The data set.
        max_broken: Share (below 1) or number of records that may be broken.
        source: What its records have as `source`; by default what the layout's loader gives them.

    Raises:
        ValueError: The data is not as expected, or too much of it is broken.
        OSError: It can't be read.
    """
    records = load(data.source, data.path, split=data.split, streaming=data.streaming, **data.options)
    if data.hold_out is not None:
        records = hold_out(records, data.hold_out, held_out=not data.trains)
    if data.limit is not None:
        records = take(records, data.limit)
    if not data.streaming:
        records, report = skip_broken(records, max_broken)
        if report.num_broken:
            logger.warning(f"{data.name or data.source}: {report}")
    if source is not None:
        records = records.map(_with_source, fn_kwargs={"name": source}, features=records.features)
    return records


def _with_source(record: dict, name: str) -> dict:
    return {"source": name}


def load_mixture(recipe: Recipe, seed: int):
    """Load all that a recipe trains on, as one data set of records.

    Args:
        recipe: The recipe.
        seed: Of the draw between data sets and of the shuffling of streams.

    Raises:
        ValueError: The data is not as expected, or too much of it is broken.
        OSError: It can't be read.
    """
    weighed = len({data.loss_weight for data in recipe.data}) > 1
    # losses are weighed by the records' `source`, which for `hub` is the path or what its rows say
    renamed = [data.name is not None or (weighed and data.source == "hub") for data in recipe.data]
    if recipe.data[0].streaming and any(renamed):
        renamed = [True] * len(renamed)  # `datasets` mixes streams wrongly if only some of them are mapped
    loaded = [
        load_data(data, recipe.max_broken, (data.name or data.source) if rename else None)
        for data, rename in zip(recipe.data, renamed)
    ]
    weights = [data.weight for data in recipe.data]
    records = mix(loaded, weights=weights if len(set(weights)) > 1 else None, seed=seed, stopping=recipe.stopping)
    if recipe.data[0].streaming and recipe.shuffle_buffer > 1:
        records = records.shuffle(seed=seed, buffer_size=recipe.shuffle_buffer)
    return records


def _loss_weights(recipe: Recipe) -> dict[str, float]:
    weights = {data.name or data.source: data.loss_weight for data in recipe.data}
    if len(weights) < len(recipe.data) and len({data.loss_weight for data in recipe.data}) > 1:
        raise RecipeError("data sets with loss weights of their own need names of their own: set data.*.name.")
    return weights


# ---------------------------------------------------------------------- putting it together


def build_trainer(recipe: Recipe, output: str | os.PathLike) -> BridgeTrainer:
    """Put together everything that a recipe names.

    Args:
        recipe: The recipe.
        output: Folder for checkpoints and results.

    Raises:
        RecipeError: Something can't be run as it stands.
        ValueError: Parts or data are not as expected.
        OSError: They can't be loaded.
    """
    if missing := recipe.missing_paths():
        raise RecipeError(
            f"{', '.join(missing)} missing: say where the data is, such as --set {missing[0]}=FOLDER, or in a copy of "
            "the recipe."
        )
    args, loss_weights = recipe.training_arguments(output), _loss_weights(recipe)
    set_seed(args.seed)
    seed = args.seed if args.data_seed is None else args.data_seed
    with without_zero3_init(args):
        model, processor = build_model(recipe)
    if recipe.push_to is not None and set(PARTS) <= set(recipe.freeze):
        check_pins(model.config.frozen_parts or {})
    encoder, cache = _build_encoder(recipe, model, processor, args.device, seed)
    records = load_mixture(recipe, seed)
    encoder.check_records(records)
    if recipe.data[0].streaming:
        data = SampleStream(records, encoder, args.per_device_train_batch_size, args.process_index, args.world_size)
    else:
        data = Samples(records, encoder)
    held_out = {
        name: load_data(evaluation, recipe.max_broken, evaluation.name)
        for name, evaluation in zip(recipe.evaluation_names(), recipe.evaluation)
    }
    if cache is not None:
        for known in ([] if recipe.data[0].streaming else [records]) + list(held_out.values()):
            cache.fill(known, args.dataloader_num_workers, args.process_index, args.world_size)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
    callbacks = []
    if recipe.samples.every > 0:
        source = next(iter(held_out.values()), records)
        chosen = [record for _, record in zip(range(recipe.samples.count), source)]
        callbacks.append(SampleTable(encoder, chosen, recipe.samples.every, recipe.samples.max_new_tokens))
    trainer = BridgeTrainer(
        model,
        args,
        encoder=encoder,
        processor=processor,
        learning_rates=recipe.learning_rates,
        no_weight_decay=recipe.no_weight_decay,
        loss_weights=loss_weights,
        max_broken=recipe.max_broken,
        train_dataset=data,
        eval_dataset={name: Samples(records, encoder) for name, records in held_out.items()} or None,
        feature_cache=cache,
        callbacks=callbacks,
    )
    for callback in callbacks:
        callback.trainer_callbacks = trainer.callback_handler.callbacks
    if cache is not None:
        trainer.add_callback(FlushFeatures(cache))
    trainer.add_callback(RunReport(trainer, recipe.description or Path(output).name))
    return trainer


def _build_encoder(recipe: Recipe, model, processor, device, seed: int):
    """The encoder of records, with packing and cached features if the recipe wants them; and the cache or `None`."""
    encoder = encoder_for(model, processor, seed=seed, **vars(recipe.text))
    cache = store = None
    if recipe.cache_features is not None:
        cache = FeatureCache(model, processor, device=device, **vars(recipe.cache_features))
        store = cache.store
    if recipe.packing is not None:
        encoder = PackedEncoder(encoder, model, **vars(recipe.packing), store=store)
    elif cache is not None:
        encoder = PreparedEncoder(encoder, store)
    return encoder, cache


# ---------------------------------------------------------------------- running it


def train(recipe: Recipe, output: str | os.PathLike, resume: bool = False) -> dict:
    """Run a recipe: `output` then holds what was trained, `training_summary.json` and the recipe.

    Args:
        recipe: The recipe.
        output: Folder for checkpoints and results.
        resume: Resume from the last complete checkpoint in `output`; start from the beginning if there is none.

    Returns:
        What `training_summary.json` holds.

    Raises:
        RecipeError: Something can't be run as it stands, or `output` holds a run already.
        TrainingError: Training can't continue.
    """
    output = Path(output)
    if output.is_file():
        raise RecipeError(f"{output} is a file; expected a folder to write to.")
    last = last_checkpoint(output)
    if last is not None and not resume:
        raise RecipeError(
            f"{output} holds a run already, up to {Path(last).name}: resume it with --resume, or give another --output."
        )
    goes_on = resume and (output / "recipe.yaml").is_file()  # a run that saves no checkpoints begins again
    if last is None and (output / "config.json").is_file() and not goes_on:
        raise RecipeError(f"{output} holds a saved model, which this run would replace: give another --output.")
    trainer = build_trainer(recipe, output)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        _save_recipe(recipe, output / "recipe.yaml", last is not None)
    trainer.train(resume_from_checkpoint=last)
    return finish(trainer, recipe)


def _save_recipe(recipe: Recipe, path: Path, resumed: bool) -> None:
    if resumed and path.exists():
        before, now = read_recipe(path).to_dict(), recipe.to_dict()
        if changed := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            logger.warning(f"The run is resumed with another {', '.join(changed)} than it was started with.")
    write_text(path, recipe.to_yaml())


def finish(trainer: BridgeTrainer, recipe: Recipe) -> dict:
    """Evaluate, save what was trained, write the summary, and push if the recipe says so.

    Args:
        trainer: The trainer, after training.
        recipe: Its recipe.

    Returns:
        What `training_summary.json` holds.

    Raises:
        OSError: Files can't be written, or not be pushed.
    """
    seconds, evaluation, files = trainer.seconds, [], {}
    for number, (data, (key, samples)) in enumerate(zip(recipe.evaluation, (trainer.eval_dataset or {}).items())):
        about = dict(zip(("dataset", "split"), data.called()))
        metrics = trainer.evaluate(samples, metric_key_prefix=f"eval_{key}")
        if (loss := metrics.get(f"eval_{key}_loss")) is not None:  # stage 1 drops batches that are not full
            evaluation.append({**about, "metric": "loss", "value": loss})
        if data.generate:
            rows = _generated_rows(trainer, samples, data)
            file = f"predictions_{number}.jsonl"
            files[file] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            right = sum(row["generated"].strip().lower() == row["wanted"].strip().lower() for row in rows)
            match = {"metric": "exact_match", "value": right / max(len(rows), 1), "records": len(rows)}
            evaluation.append({**about, **match, "predictions": file})
    summary = {
        "description": recipe.description,
        "recipe": "recipe.yaml",
        "datasets": list(dict.fromkeys(data.called()[0] for data in recipe.data)),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "hardware": hardware(trainer.args.world_size),
        "peak_memory": peak_memory(),
        "arguments": {**recipe.arguments, **{f"learning_rate of {k}": v for k, v in recipe.learning_rates.items()}},
        "evaluation": evaluation,
        "skipped_records": trainer.num_skipped,
        "failed_saves": trainer.failed_saves,
    }
    if isinstance(trainer.encoder, PackedEncoder):
        summary["packing"] = trainer.encoder.packer.savings()
    if trainer.encoder.caption_end_stops and trainer.encoder.end_token_id is not None:
        options = trainer.encoder.generation_options(trainer.bare_model, 1)
        trainer.bare_model.generation_config.eos_token_id = options["eos_token_id"]
    files["training_summary.json"] = json.dumps(summary, indent=1) + "\n"
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RunReport):
            callback.write(summary)
    trainer.save_result(files, recipe.push_to, recipe.private)
    return summary


def _generated_rows(trainer: BridgeTrainer, samples: Samples, data: EvaluationRecipe) -> list[dict]:
    """What the model generates for an evaluation's first records; processes share them if each has the whole model."""
    count = len(samples) if data.generate < 0 else min(data.generate, len(samples))
    chosen, args = samples.records.select(range(count)), trainer.args
    shared = args.world_size > 1 and not trainer.is_sharded
    if shared:
        chosen = chosen.select(range(args.process_index, count, args.world_size))
    texts = generate(trainer.model, trainer.encoder, chosen, data.max_new_tokens, args.eval_batch_size)
    rows = rows_of(chosen, texts)
    return gather_object(rows) if shared else rows


def hardware(num_processes: int) -> str:
    """What a run was on, in words.

    Args:
        num_processes: Number of processes, each with a device of its own.
    """
    if torch.cuda.is_available():
        return f"{num_processes} x {torch.cuda.get_device_name()}"
    return f"{num_processes} x CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory() -> dict[str, int]:
    """The most memory that this process has taken so far.

    Returns:
        Bytes: `process`, its largest resident set, libraries and mapped files included; and `cuda`, where a GPU was
        used, the most that torch has allocated there. What the system doesn't tell is left out.
    """
    found = {}
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with what the process that started this one had
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        found["process"] = int(line.split()[1]) * 1024
    else:
        with suppress(ImportError):  # on Windows
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            found["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        found["cuda"] = allocated
    return found


__all__ = ["build_trainer", "finish", "hardware", "load_data", "load_mixture", "peak_memory", "train"]
