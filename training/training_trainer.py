"""Training: `vlbridge train`, on transformers' `Trainer` and accelerate.

`BridgeTrainer` adds what a bridge needs: checkpoints of what is trained alone, written beside the last one and renamed
when they are complete; runs that go on bit by bit where they were stopped; learning rates by part; data sets whose losses
count differently; and a report of the first module whose output is not finite.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..compat import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    SCHEDULER_NAME,
    DataLoaderShard,
    TrainerHooks,
    forget_loader_workers,
    get_last_checkpoint,
    layers_not_to_split,
    load_to_numbered_cpus,
    save_fsdp_optimizer,
    set_hf_deepspeed_config,
    sort_checkpoints,
    take,
    unset_hf_deepspeed_config,
)
from ..extensions import where_to_load
from ..hub import push_folder
from ..images import ImageError
from ..modeling.modeling_bridge import TokenRows
from ..modeling.modeling_flamingo import GatedCrossAttentionLayer
from ..modeling.modeling_pins import FROZEN_PARTS, frozen_parts_of
from ..processing.processing_qformer import bert_tokenizer
from .training_encoding import IGNORED, Encoder, SampleError, Stage1Encoder, encoder_for
from .training_features import FeatureCache, FlushFeatures, PreparedEncoder
from .training_packing import PackedEncoder
from .training_recipes import DataRecipe, Recipe, RecipeError


logger = logging.get_logger(__name__)

SAVING, DELETING = ".saving", ".deleting"  # beginnings of names of folders that are no checkpoints (yet, any more)
STATE_FILE = "bridge_trainer.json"
EXTRA_KEYS = ("ids", "sources", "skipped")  # what batches have beside model inputs


class TrainingError(RuntimeError):
    """Training can't go on."""


class NonFiniteError(TrainingError, FloatingPointError):
    """The loss or a gradient is NaN or infinite.

    Args:
        report: What was found out: `step`, `what`, `ids` of the batch, `module`, `details`.
    """

    def __init__(self, report: dict):
        super().__init__(
            f"step {report['step']}: {report['what']} is not finite; first: {report['details']}; records {', '.join(report['ids'][:20])}"
        )
        self.report = report


# ---------------------------------------------------------------------- data sets


class _Encoded:
    """What both kinds of data sets share: records that can't be used leave a gap, which is reported.

    A gap is filled with a sample without labels: batches stay full, nothing is learned from it.

    Args:
        records: A sequence, or something that can be iterated over again and again.
        encoder: Makes samples of records.
    """

    def __init__(self, records, encoder: Encoder):
        self.records, self.encoder = records, encoder
        self._blank: dict | None = None

    def sample(self, record: dict) -> dict:
        """A record's sample, with `id`, `source`, and `skipped`: the record and why, where it could not be used."""
        about = {"id": str(record.get("id")), "source": record.get("source"), "skipped": None}
        try:
            return {**self.encoder.encode(record), **about}
        except (SampleError, ImageError) as error:
            return {**self._gap(), **about, "skipped": str(error)}

    def _gap(self) -> dict:
        if self._blank is None:
            for _, record in zip(range(100), self.records):
                with suppress(SampleError, ImageError):
                    blank = self.encoder.encode(record)
                    if "labels" in blank:
                        blank["labels"] = torch.full_like(blank["labels"], IGNORED)
                    self._blank = blank
                    break
            else:
                raise TrainingError("none of the first 100 records can be used: run `vlbridge data check` on the data")
        return self._blank


class Samples(_Encoded, Dataset):
    """Records by number, encoded when they are asked for.

    Args:
        records: A sequence of records.
        encoder: Makes samples of them.
    """

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.sample(self.records[index])


class SampleStream(_Encoded, IterableDataset):
    """Records one after the other, for ever, encoded as they come.

    Every process and every worker takes its own batches of one common order. Where the records lie in enough files
    (`num_shards`), each has files of its own; else all read everything and encode what is theirs.

    Args:
        records: Gives the same records each time that it is iterated over; with `set_epoch` where their order changes from
            pass to pass.
        encoder: Makes samples of them.
        batch_size: Of one process.
        rank: Number of this process.
        world_size: Processes.
    """

    def __init__(self, records, encoder: Encoder, batch_size: int, rank: int = 0, world_size: int = 1):
        super().__init__(records, encoder)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.skip_batches = 0  # of this process: they pass without being encoded when training goes on

    @staticmethod
    def _passes(records) -> Iterator[dict]:
        for epoch in itertools.count():
            if hasattr(records, "set_epoch"):
                records.set_epoch(epoch)
            record = None
            for record in records:
                yield record
            if record is None:
                raise TrainingError("the streamed data has no records")

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            # `datasets` would share files out among workers by itself, and leave some without any
            forget_loader_workers()
        part, parts = self.rank * num_workers + worker, self.world_size * num_workers
        records = self.records
        if parts > 1 and getattr(records, "num_shards", 1) >= parts:
            records, part, parts = records.shard(num_shards=parts, index=part), 0, 1
        mine = 0
        for count, record in enumerate(self._passes(records)):
            if count // self.batch_size % parts != part:
                continue
            # the loader asks its workers in turn: this one's batches are number `worker`, `worker + num_workers`, ...
            batch = worker + mine // self.batch_size * num_workers
            mine += 1
            yield {"skip": True} if batch < self.skip_batches else self.sample(record)


class Collator:
    """Samples to a batch, with what the trainer wants to know about them beside the model's inputs.

    Args:
        encoder: The samples' encoder.
    """

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, samples: list[dict]) -> dict:
        if "skip" in samples[0]:
            return {}
        usable = [sample for sample in samples if sample["skipped"] is None]
        chosen = usable or samples[:1]
        if not usable and "labels" not in samples[0]:
            raise TrainingError(f"a batch without a usable record: {samples[0]['skipped']}")
        about = ("id", "source", "skipped")
        batch = self.encoder.collate([{k: v for k, v in sample.items() if k not in about} for sample in chosen])
        batch["ids"] = [sample["id"] for sample in usable]
        batch["sources"] = [sample["source"] for sample in chosen]
        batch["skipped"] = [(s["id"], s["skipped"]) for s in samples if s["skipped"] is not None]
        return batch


# ---------------------------------------------------------------------- the first bad module


def _finite(value) -> bool:
    """Whether all tensors in a value are finite."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, (list, tuple)) else True


class _Found(Exception):
    """The first bad module was found: there is no need to go on."""


@contextmanager
def _hooks(model: nn.Module, register) -> Iterator[None]:
    handles = [handle for name, module in model.named_modules() for handle in register(name, module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_bad_module(model: nn.Module, inputs: dict, loss_of=None) -> dict[str, str]:
    """Where the first value comes from that is not finite.

    Args:
        model: The model, its random state as before the batch.
        inputs: The batch.
        loss_of: `loss_of(model, inputs)` runs it. Without it only the batch and the parameters are looked at.

    Returns:
        `module`: its name, `""` where it is none's; and `details` in words.
    """
    for name, value in inputs.items():
        if not _finite(value):
            return {"module": "", "details": f"the batch's {name}"}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if not _finite(tensor.to_local() if hasattr(tensor, "to_local") else tensor):
            return {"module": name.rpartition(".")[0], "details": f"the parameter {name}"}
    if loss_of is None:
        return {
            "module": "",
            "details": "not found in batch and parameters; the modules can't be run by one process alone",
        }
    found: dict[str, str] = {}

    def say(name: str, module: nn.Module, what: str):
        found.update(module=name, details=f"{what} of {name or 'the whole model'} ({type(module).__name__})")
        raise _Found

    def forward_hooks(name: str, module: nn.Module):
        def before(_, args, kwargs):
            if not _finite(args) or not _finite(kwargs):
                say(name, module, "the input")

        def after(_, args, kwargs, output):
            if not _finite(output):
                say(name, module, "the output")

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after, with_kwargs=True)

    def backward_hooks(name: str, module: nn.Module):
        if any(True for _ in module.children()):
            return

        def after(_, grad_input, grad_output):
            if not _finite(grad_output):
                say(name, module, "the gradient of the output")
            if not _finite(grad_input):
                say(name, module, "the gradient of the input")

        yield module.register_full_backward_hook(after)

    with suppress(_Found), _hooks(model, forward_hooks), torch.no_grad():
        loss = loss_of(model, inputs)
        if not _finite(loss):
            return {"module": "", "details": "the loss itself, of finite logits"}
    if not found:
        model.zero_grad()
        with suppress(_Found), _hooks(model, backward_hooks):
            loss_of(model, inputs).backward()
        for name, parameter in model.named_parameters() if not found else ():
            if parameter.grad is not None and not _finite(parameter.grad):
                return {"module": name.rpartition(".")[0], "details": f"the gradient of the parameter {name}"}
    return found or {"module": "", "details": "nothing: run again, the batch gives finite values"}


# ---------------------------------------------------------------------- trainer


def group_of(name: str) -> str:
    """Which group of learning rates a parameter belongs to, by its name."""
    if "lora_" in name:
        return "lora"
    if ".attn_gate." in name or ".ff_gate." in name:
        return "gates"
    if ".resampler." in name:
        return "resampler"
    return next((part for part in FROZEN_PARTS if f".{part}." in f".{name}"), "bridge")


def decays(model: nn.Module, exempt: tuple[str, ...] = ()) -> set[str]:
    """Names of parameters with weight decay: matrices that are no embeddings.

    Args:
        model: The model.
        exempt: Beginnings of names of further parameters without.
    """
    embeddings = (nn.Embedding, TokenRows)
    tables = {
        f"{name}.{own}" for name, module in model.named_modules() if isinstance(module, embeddings)
        for own, _ in module.named_parameters(recurse=False)
    }  # fmt: skip
    words = ("latents", "query_tokens", "_embeddings")
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in tables and not name.endswith(words) and not name.startswith(exempt)
    }


class BridgeTrainer(TrainerHooks, Trainer):
    """`Trainer` for what is trained of a bridged model.

    Args:
        encoder: Makes samples of records; batches are put together with it.
        processor: Saved with every checkpoint.
        learning_rates: By group of parameters, see `group_of`, where they differ from `args.learning_rate`.
        no_weight_decay: Beginnings of names of parameters without weight decay, beside the usual ones.
        loss_weights: Of data sets by name, where they count differently.
        max_broken: Share (of at least 1,000) or number of records that may be left out because they can't be used.
        feature_cache: Where `encoder` takes patch features from.
        kwargs: Of `Trainer`.
    """

    def __init__(
        self, model, args, *, encoder: Encoder, processor, learning_rates: dict[str, float] | None = None,
        no_weight_decay: tuple[str, ...] = (), loss_weights: dict[str, float] | None = None, max_broken: float = 0.01,
        feature_cache: FeatureCache | None = None, **kwargs,
    ):  # fmt: skip
        self.encoder, self.processor = encoder, processor
        self.learning_rates, self.no_weight_decay = dict(learning_rates or {}), tuple(no_weight_decay)
        self.loss_weights = loss_weights if loss_weights and len(set(loss_weights.values())) > 1 else None
        self.skipped, self.num_skipped, self.num_seen, self.max_broken = Counter(), 0, 0, max_broken
        self.failed_saves: list[str] = []
        self.feature_cache = feature_cache
        self._step_batches: list[tuple] = []
        self._started = time.time()
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, data_collator=Collator(encoder), **kwargs)
        if use_cache is not None:
            model.config.use_cache = use_cache  # it is saved with the model
        if self.is_fsdp_enabled:
            self._set_up_fsdp()

    def _set_up_fsdp(self) -> None:
        """Name the layers that are sharded one by one: accelerate refuses names that no layer has, and CLIP's encoder
        brings those of its text side.

        Raises:
            TrainingError: It is FSDP 1.
        """
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise TrainingError(
                f"fsdp_version is {plugin.fsdp_version}; expected 2: set it in accelerate's configuration."
            )
        if not plugin.transformer_cls_names_to_wrap:
            present = {type(module).__name__ for module in self.model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(present & set(layers_not_to_split(self.model)))

    def prepare_for_training(self, default, resume_from_checkpoint):
        if resume_from_checkpoint is not None:
            self._check_launch(resume_from_checkpoint)
            self._started -= _note_of(resume_from_checkpoint).get("seconds", 0)
        prepared = default()
        for module in self.model.modules() if self.is_fsdp_enabled else ():
            if isinstance(module, GatedCrossAttentionLayer):  # keys and values are made before the layer's turn comes
                register_fsdp_forward_method(module, "project")
        return prepared

    @property
    def is_spread(self) -> bool:
        """Whether no process has the whole model: all must then run it at the same time."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _of_all(self, *values: float) -> torch.Tensor:
        """Numbers of all processes: `(processes, len(values))`."""
        mine = torch.tensor([values], dtype=torch.float64, device=self.args.device)
        return self.accelerator.gather(mine) if self.args.world_size > 1 else mine

    @property
    def seconds(self) -> float:
        """How long this run has taken, earlier parts included."""
        return time.time() - self._started

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, SampleStream):
            return super().get_train_dataloader()
        # not through accelerate.prepare: the stream shares itself out, and rows can't be cut apart (images of all rows
        # stand one after the other)
        args = self.args
        workers = {}
        if args.dataloader_num_workers:
            workers = {"prefetch_factor": args.dataloader_prefetch_factor}
        return DataLoaderShard(
            self.train_dataset,
            device=args.device,
            batch_size=self.rows_per_batch,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            **workers,
        )

    def run_epoch(
        self, default, *, epoch, epochs_trained, steps_trained_in_current_epoch, resume_from_checkpoint, **kwargs
    ):
        first = resume_from_checkpoint is not None and epoch == epochs_trained
        if isinstance(self.train_dataset, SampleStream):
            self.train_dataset.skip_batches = steps_trained_in_current_epoch if first else 0
        if first:
            self._load_loss(resume_from_checkpoint)
        if self.state.global_step >= self.state.max_steps:  # transformers would take one more step
            self.control.should_training_stop = True
            return None
        return default()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        skipped = [about for batch in batches for about in batch.pop("skipped")]
        self._count_skipped(skipped, len(skipped) + sum(len(batch["ids"]) for batch in batches))
        if self.args.world_size > 1 and isinstance(self.encoder, Stage1Encoder):
            batches = [self._as_long_as_all(batch) for batch in batches]
        self._step_batches = []
        if self.loss_weights is not None and num_items is not None:
            self._weigh(batches, device)
        return batches, num_items if num_items is None else num_items.clamp(min=1)

    def _count_skipped(self, skipped: list[tuple[str, str]], seen: int) -> None:
        for record, reason in skipped:
            self.skipped[reason] += 1
            if self.skipped.total() <= 10:
                logger.warning(f"Record {record} is skipped: {reason}")
        now = self._of_all(len(skipped), seen).sum(dim=0)  # all processes stop, or none
        self.num_skipped += int(now[0])
        self.num_seen += int(now[1])
        limit = self.max_broken
        if limit < 1:
            limit *= max(self.num_seen, 1000)
        if self.num_skipped > limit:
            most = "; ".join(f"{reason} ({count})" for reason, count in self.skipped.most_common(3))
            raise TrainingError(
                f"{self.num_skipped} of {self.num_seen} records can't be used, more than max_broken={self.max_broken} "
                f"allows: {most or 'for reasons that other processes tell'}"
            )

    def _as_long_as_all(self, batch: dict) -> dict:
        """A batch of stage 1, where all processes' pairs are compared, with as many as the process has that lacks most."""
        rows = int(self._of_all(len(batch["sources"])).min())
        return {name: value[:rows] for name, value in batch.items()}

    def prepare_inputs(self, default, inputs):
        inputs = {name: value for name, value in inputs.items() if name not in EXTRA_KEYS}
        if "uncached" in inputs:
            if self.is_spread:
                raise TrainingError(
                    f"features of some images are not in {self.feature_cache.store.folder}: where the model is spread over "
                    "processes, all have to be there before training. Raise cache_features.max_bytes, or leave cache_features out."
                )
            inputs = self.feature_cache.complete(inputs)
        return default(inputs)

    # ------------------------------------------------------------------ loss

    def _weigh(self, batches: list[dict], device) -> None:
        """Give every row the weight of each of its tokens, so that the loss is the data sets' means, weighted.

        Source: OpenFlamingo's `train_utils.py`: `loss_multiplier_laion * mean + loss_multiplier_mmc4 * mean`.
        """
        names = sorted(self.loss_weights)
        counts = torch.zeros(len(names), device=device)
        for batch in batches:
            shift = 1 if self.shifts_labels else 0
            rows = (batch["labels"][:, shift:] != IGNORED).sum(dim=1).to(device)
            index = torch.tensor([names.index(source) for source in batch["sources"]], device=device)
            counts.index_add_(0, index, rows.to(counts))
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            counts = self.accelerator.gather(counts[None]).sum(dim=0)
        weights = torch.tensor([self.loss_weights[name] for name in names], device=device) / counts.clamp(min=1)
        for batch in batches:
            index = torch.tensor([names.index(source) for source in batch["sources"]], device=device)
            batch["token_weights"] = weights[index]  # (batch,)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = inputs.pop("token_weights", None)
        if weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        logits, labels = outputs.logits, inputs["labels"]
        if self.shifts_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, reduction="none"
        )  # (batch, tokens)
        loss = (losses.sum(dim=1) * weights).sum()
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        randomness = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._step_batches.append((inputs, num_items_in_batch, randomness))
        loss = super().training_step(model, inputs, num_items_in_batch)
        bad = not torch.isfinite(loss).all()
        if self._of_all(bad).any():
            self._stop("the loss", self._step_batches[-1:] if bad else [])
        return loss

    def check_grad_norm(self, grad_norm) -> None:
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16: the scaler skips such steps
        if grad_norm is not None and not scaled and not math.isfinite(float(grad_norm)):
            self._stop("a gradient", self._step_batches)

    def _stop(self, what: str, batches: list[tuple]) -> None:
        """Find the first bad module, write it down and stop: all processes at once, with the report of the first that found it.

        Args:
            what: What is not finite.
            batches: This process' part in it.

        Raises:
            NonFiniteError: Always.
        """
        reports = gather_object([self._look_for_bad_module(batches)])  # one per process
        report = {"step": self.state.global_step + 1, "what": what}
        for rank, found in enumerate(reports):
            if found["found"]:
                report |= found
                report["details"] += f" of process {rank}" if self.args.world_size > 1 else ""
                break
        else:
            looked = [found for found in reports if found["ids"]] or reports
            report |= {**looked[0], "ids": [name for found in looked for name in found["ids"]]}
        del report["found"]
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / f"not_finite_step_{report['step']}.json"
            with suppress(OSError):
                path.write_text(json.dumps(report, indent=1) + "\n")
        self.accelerator.wait_for_everyone()  # the first to leave ends the others
        raise NonFiniteError(report)

    def _look_for_bad_module(self, batches: list[tuple]) -> dict:
        """`module`, `details`, whether it was `found`, and then the batch's `ids`."""
        # where processes wait for each other in the middle of a model, none can look alone
        alone = not self.is_spread and (self.args.world_size == 1 or not isinstance(self.encoder, Stage1Encoder))
        model, found = self.accelerator.unwrap_model(self.model_wrapped), {"module": "", "details": "nothing"}
        for inputs, num_items, (cpu, cuda) in batches:
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)

            def loss_of(model, inputs, num_items=num_items):
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    return self.compute_loss(model, dict(inputs), num_items_in_batch=num_items)

            found = first_bad_module(model, self.ready_inputs(inputs), loss_of if alone else None)
            if not found["details"].startswith(("nothing", "not found")):
                return {**found, "found": True, "ids": list(inputs.get("ids", ()))}
        ids = [name for inputs, *_ in batches for name in inputs.get("ids", ())]
        return {**found, "found": False, "ids": ids}

    # ------------------------------------------------------------------ optimizer

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            opt_model = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            if not {"params", "model", "optimizer_dict"} & kwargs.keys():
                self.optimizer_cls_and_kwargs = optimizer_class, {**kwargs, "params": self.parameter_groups(opt_model)}
        return super().create_optimizer(model)

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        """What is trained, by learning rate and weight decay; nothing of what is frozen.

        Raises:
            TrainingError: Nothing is trained, or a learning rate is for parameters that don't exist.
        """
        decaying, groups = decays(model, self.no_weight_decay), {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((group_of(name), name in decaying), []).append(parameter)
        trained = {group for group, _ in groups}
        if not trained:
            raise TrainingError("nothing is trained: every part is frozen, and the bridge has no parameters.")
        if unknown := sorted(self.learning_rates.keys() - trained):
            raise TrainingError(
                f"learning_rates has {', '.join(unknown)}, but trained is {', '.join(sorted(trained))} only: see freeze and lora."
            )
        rates = {"bridge": self.args.learning_rate, **self.learning_rates}
        for part in ("gates", "resampler"):
            rates.setdefault(part, rates["bridge"])
        return [
            {
                "params": parameters,
                "weight_decay": self.args.weight_decay if decay else 0.0,
                "lr": rates.get(group, self.args.learning_rate),
            }
            for (group, decay), parameters in groups.items()
        ]

    # ------------------------------------------------------------------ checkpoints

    @property
    def _bare_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def saves_bridge_only(self) -> bool:
        """Whether a checkpoint is the bridge alone: both parts are frozen and have a source to come back from."""
        model = self._bare_model
        if hasattr(model, "peft_config") or not hasattr(model, "pin_frozen_parts"):
            return False
        config = model.config
        return all(
            getattr(config, f"freeze_{part}") and ((config.frozen_parts or {}).get(part) or {}).get("source")
            for part in frozen_parts_of(config)
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained; of a model that is spread over processes all must call this, and the first one writes."""
        state = self._gathered() if self.is_spread else None
        if state:
            for name, source in getattr(self._bare_model, "all_tied_weights_keys", {}).items():
                if source in state:
                    state.pop(name, None)  # by now a copy of the tensor that it was
        self.write_model(output_dir, state)

    def _gathered(self) -> dict[str, torch.Tensor]:
        """Whole tensors of a model that is spread over processes, those of its bridge alone where these are saved.

        Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html (`get_model_state_dict`);
        https://deepspeed.readthedocs.io/en/latest/zero3.html (`GatheredParameters`).

        Returns:
            On the CPU of the first process; what others get is not meant to be used.
        """
        model = self._bare_model
        bridge_alone = self.saves_bridge_only and not model.config.trained_tensors
        peft = hasattr(model, "peft_config")
        if self.is_fsdp_enabled:
            options = StateDictOptions(
                full_state_dict=True, cpu_offload=True, ignore_frozen_params=bridge_alone or peft
            )
            return get_model_state_dict(self.model, options=options)
        if self.accelerator.deepspeed_config["zero_optimization"]["stage"] != 3:
            return model.state_dict()
        import deepspeed

        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not bridge_alone or name.startswith("bridge.")
        }
        for name, parameter in model.named_parameters():  # one after the other: no more has to be in memory at a time
            if name in state and (parameter.requires_grad or not peft):
                with deepspeed.zero.GatheredParameters([parameter]):
                    if self.is_world_process_zero():
                        state[name] = parameter.detach().cpu().clone()
        return state

    def write_model(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        model = self._bare_model
        if state_dict is not None and not hasattr(model, "peft_config"):
            trained = [name for name in model.state_dict() if name.startswith("bridge.")]
            tied = model.all_tied_weights_keys
            trained = [name for name in trained if tied.get(name) not in state_dict]
            if lost := [name for name in trained if name not in state_dict or state_dict[name].numel() == 0]:
                raise TrainingError(
                    f"{len(lost)} of the bridge's {len(trained)} tensors are missing or empty, such as {lost[0]}: they are "
                    "spread over the processes. Save with `trainer.save_model()`, in all of them: it gathers whole tensors."
                )
        os.makedirs(output_dir, exist_ok=True)
        if hasattr(model, "peft_config"):
            model.save_pretrained(output_dir, state_dict=state_dict)
            self.processor.save_pretrained(output_dir)
        else:
            options = {"bridge_only": self.saves_bridge_only, "processor": self.processor}
            model.save_pretrained(output_dir, state_dict=state_dict, **options)

    def save_result(self, files: dict[str, str], push_to: str | None = None, private: bool = False) -> None:
        """Save what was trained, in the run's folder; what was there before is replaced when the new is complete.

        Args:
            files: Texts to save beside it, by file name.
            push_to: Hub repository to push it to.
            private: Whether a new one is private.
        """
        output = Path(self.args.output_dir)
        staging = output / SAVING / output.name
        if self.is_world_process_zero():
            shutil.rmtree(output / SAVING, ignore_errors=True)
            staging.mkdir(parents=True)
            for name, text in files.items():  # before the model: its card is made of them
                (staging / name).write_text(text, encoding="utf-8")
        self.accelerator.wait_for_everyone()
        self.save_model(str(staging))
        if self.is_world_process_zero():
            if push_to is not None:
                push_folder(staging, push_to, private=private, keep=["README.md"], commit_message="Upload model")
            for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
                if (output / path.name).is_dir():
                    shutil.rmtree(output / path.name)
                os.replace(path, output / path.name)
            shutil.rmtree(output / SAVING, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def checkpoint_folder(self, default: str) -> str:
        return str(Path(default) / self._staging) if self._staging else default

    _staging = ""

    def save_checkpoint(self, default, output_dir: str) -> None:
        """Write a checkpoint beside the last one, and rename it when it is complete: what has its name is whole.

        When the disk is full the last checkpoint stays, what was written goes, and training goes on.
        """
        folder, step = Path(output_dir), self.state.global_step
        staging, final = folder / SAVING, folder / f"checkpoint-{step}"
        if self.is_world_process_zero():
            for leftover in (*folder.glob(f"{SAVING}*"), *folder.glob(f"{DELETING}*")):
                shutil.rmtree(leftover, ignore_errors=True)
            (staging / final.name).mkdir(parents=True)
            (staging / final.name / "README.md").touch()  # no card is made where there is one
        self.accelerator.wait_for_everyone()
        problem, self._staging = None, SAVING
        try:
            default()
            if self.args.should_save:
                self._complete(staging / final.name, folder, final)
        except Exception as error:
            if not _is_disk_problem(error):
                raise
            problem = " ".join(str(error).split())[:300]
        finally:
            self._staging = ""
        failed = torch.tensor([problem is not None], device=self.args.device)
        if self.args.world_size > 1:
            failed = self.accelerator.gather(failed)
        if bool(failed.any()):
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            last = get_last_checkpoint(folder)
            self.failed_saves.append(f"step {step}: {problem}")
            logger.error(
                f"The checkpoint of step {step} could not be written: {problem}. "
                + (f"The last one is {last}. " if last else "There is none before it. ")
                + "Training goes on; free space before the next save."
            )
            return
        if self.args.should_save:
            if final.exists():
                _delete(final)
            os.rename(staging / final.name, final)
            _sync(folder)
            shutil.rmtree(staging, ignore_errors=True)
            self._rotate(folder)
        self.accelerator.wait_for_everyone()

    def _complete(self, staged: Path, folder: Path, final: Path) -> None:
        """What else a checkpoint has, and everything on disk before it gets its name."""
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")
        self.state.save_to_json(str(staged / "trainer_state.json"))
        (staged / "README.md").unlink()
        # what the next log averages over; floats of JSON are exact
        noted = {**self.running_loss, "seconds": self.seconds}
        (staged / STATE_FILE).write_text(json.dumps(noted) + "\n")
        for path in staged.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(staged)

    def _rotate(self, folder: Path) -> None:
        limit = self.args.save_total_limit
        if not limit or limit < 1:
            return
        best = self.state.best_model_checkpoint
        kept = sort_checkpoints(str(folder), best_model_checkpoint=best)
        for path in kept[: max(0, len(kept) - max(limit, 2 if best and best != kept[-1] else 1))]:
            _delete(Path(path))

    def _load_loss(self, checkpoint: str) -> None:
        if noted := _note_of(checkpoint):
            self.restore_running_loss(noted)

    def save_optimizer(self, default, output_dir):
        if not self.is_fsdp_enabled or hasattr(self._bare_model, "peft_config"):
            return default(output_dir)
        # transformers would write the frozen parts too; what is trained is in the model's file
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _check_launch(self, checkpoint: str) -> None:
        """Refuse a checkpoint whose optimizer's state this process would not find: some would look for it while others wait
        for them, or it would begin anew.

        Raises:
            TrainingError: It is of another launch.
        """
        needed = "optimizer.pt"
        if self.is_deepspeed_enabled:
            needed = "global_step*"
        elif self.is_fsdp_enabled:
            full = "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
            needed = "optimizer.bin" if full else "optimizer_0"
        found = sorted(path.name for kind in ("optimizer*", "global_step*") for path in Path(checkpoint).glob(kind))
        if found and not any(Path(checkpoint).glob(needed)):
            raise TrainingError(
                f"{checkpoint} has {', '.join(found)}, but this run needs {needed}: it was launched in another way. Go on "
                "with the accelerate configuration that the run began with."
            )

    def load_optimizer(self, default, checkpoint):
        load_to_numbered_cpus()
        try:
            default(checkpoint)
        except ValueError as error:
            raise TrainingError(
                f"The optimizer's state in {checkpoint} is of other parameters ({error}): go on with the recipe that the run "
                "began with."
            ) from error

    def load_trained(self, default, resume_from_checkpoint):
        """Load the trained weights; the frozen ones are in memory already.

        Raises:
            TrainingError: They are not those of this model.
        """
        bare = self._bare_model
        weights = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        if hasattr(bare, "peft_config") or not weights.exists():
            if not weights.exists() and not (Path(resume_from_checkpoint) / SAFE_WEIGHTS_INDEX_NAME).exists():
                if not hasattr(bare, "peft_config"):
                    raise TrainingError(f"{resume_from_checkpoint} has no {SAFE_WEIGHTS_NAME}: it is no checkpoint.")
            return default()
        loaded = load_file(weights)
        if self.is_fsdp_enabled:
            options = StateDictOptions(full_state_dict=True, strict=False)
            result = set_model_state_dict(bare, dict(loaded), options=options)
        else:
            result = bare.load_state_dict(loaded, strict=False)
        tied = bare.all_tied_weights_keys
        trained = {name for name, parameter in bare.named_parameters() if parameter.requires_grad}
        missing = sorted(name for name in set(result.missing_keys) & trained if tied.get(name) not in loaded)
        if missing or result.unexpected_keys:
            wrong = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in result.unexpected_keys]
            raise TrainingError(
                f"{resume_from_checkpoint} is of another model: {'; '.join(wrong[:5])}. Use the recipe that it was made with."
            )


def _note_of(checkpoint: str) -> dict:
    """What this trainer noted in a checkpoint; nothing in one of transformers' own."""
    path = Path(checkpoint) / STATE_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _is_disk_problem(error: BaseException) -> bool:
    if isinstance(error, (OSError, SafetensorError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("PytorchStreamWriter", "file write failed", "No space left", "unexpected pos")
    )


def _sync(path: Path) -> None:
    """Make sure that a file or folder is on disk."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(folder: Path) -> None:
    """Delete a folder, under another name, so that nothing half deleted passes for a checkpoint."""
    doomed = folder.with_name(f"{DELETING}-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# ---------------------------------------------------------------------- what the model says


class SampleTable(TrainerCallback):
    """Every so many steps: what the model generates for a few fixed records, in the log, in `samples.jsonl` and
    `samples.md`, and in the loggers that take text.

    Args:
        encoder: Makes prompts of records.
        records: The records.
        every: Steps between two tables.
        max_new_tokens: Longest text, in tokens.
    """

    def __init__(self, encoder: Encoder, records: list[dict], every: int, max_new_tokens: int):
        self.encoder, self.records, self.every, self.max_new_tokens = encoder, records, every, max_new_tokens

    def on_train_begin(self, args, state, control, **kwargs):
        file = Path(args.output_dir) / "samples.jsonl"
        if state.is_world_process_zero and file.exists():  # training goes on from here: later tables are made again
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            _write(file, "".join(f"{line}\n" for line in kept if state.global_step))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        said = generate(model, self.encoder, self.records, self.max_new_tokens)
        if not state.is_world_process_zero:
            return
        rows = [{"step": state.global_step, **row} for row in _rows(self.records, said)]
        folder = Path(args.output_dir)
        with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        table = _table(rows)
        _write(folder / "samples.md", f"Step {state.global_step}\n\n{table}\n")
        logger.info(f"Samples at step {state.global_step}:\n{table}")
        for callback in getattr(self, "trainer_callbacks", ()):
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                writer.add_text("samples", table, state.global_step)
        wandb = sys.modules.get("wandb")  # Trainer has imported it where it logs there
        if wandb is not None and wandb.run is not None:
            data = [list(row.values()) for row in rows]
            wandb.log({"samples": wandb.Table(columns=list(rows[0]), data=data)}, commit=False)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _rows(records, said: list[tuple[str, str]]) -> list[dict]:
    """What was generated for records, beside what they say."""
    return [
        {"id": str(record.get("id")), "wanted": wanted, "generated": text}
        for record, (text, wanted) in zip(records, said)
    ]


def _table(rows: list[dict]) -> str:
    def cell(value) -> str:
        return " ".join(str(value).split()).replace("|", "\\|")

    lines = ["| record | wanted | generated |", "|---|---|---|"]
    return "\n".join(lines + [f"| {cell(r['id'])} | {cell(r['wanted'])} | {cell(r['generated'])} |" for r in rows])


@torch.no_grad()
def generate(
    model: PreTrainedModel, encoder: Encoder, records, max_new_tokens: int, batch_size: int = 8
) -> list[tuple[str, str]]:
    """Greedy generations for records.

    Args:
        model: The model; afterwards it is in the mode that it was in.
        encoder: Makes prompts of records.
        records: A sequence of them.
        max_new_tokens: Longest text, in tokens.
        batch_size: Records at a time.

    Returns:
        Per record: what the model says, and what the record says.
    """
    was_training, found = model.training, []
    model.eval()
    try:
        for start in range(0, len(records), batch_size):
            batch = [records[index] for index in range(start, min(start + batch_size, len(records)))]
            inputs, wanted = encoder.prompts(batch)
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            found += zip(encoder.answers(model, inputs, max_new_tokens), wanted)
    finally:
        model.train(was_training)
    return found


# ---------------------------------------------------------------------- a run


@contextmanager
def built_whole(args: TrainingArguments) -> Iterator[None]:
    """Models that are built here are whole in every process, also where DeepSpeed's ZeRO-3 will spread them afterwards.

    transformers spreads each part while it is loaded, as soon as there are such `TrainingArguments`: all tensors are empty
    then, but a bridge's own begin as what those of the parts are.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    config = getattr(args, "hf_deepspeed_config", None) or plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def build_model(recipe: Recipe):
    """The model that a recipe trains, and its processor: parts loaded, the right ones frozen, LoRA added.

    Raises:
        RecipeError: `from` is none of what it may be.
        ValueError: Parts do not fit together.
        OSError: They can't be had.
    """
    from .. import QFormerBlip2ForConditionalGeneration, QFormerBlip2ForPreTraining, compose
    from ..modeling.modeling_qformer_pretraining import QFormerBlip2Stage1Model

    given = {"tokenizer": recipe.tokenizer, "image_processor": recipe.image_processor, "dtype": recipe.dtype}
    options = {**{name: value for name, value in given.items() if value is not None}, **recipe.bridge_options}
    if recipe.stage == "classification":
        model, processor = build_classifier(recipe, options)
    elif recipe.from_ is not None:
        source = os.path.expanduser(recipe.from_)
        if recipe.language is not None:
            model, processor = QFormerBlip2ForConditionalGeneration.from_stage1(source, recipe.language, **options)
        else:
            if options.keys() - {"dtype"}:
                raise RecipeError(f"from brings its own bridge and processor: leave {', '.join(sorted(options))} out.")
            model = AutoModel.from_pretrained(source, dtype=recipe.dtype or "auto")
            processor = AutoProcessor.from_pretrained(source)
    elif recipe.stage == "stage1":
        tokenizer = framing_tokenizer(options.pop("tokenizer"))
        model, processor = QFormerBlip2ForPreTraining.from_vision(recipe.vision, tokenizer, **options)
    else:
        model, processor = compose(recipe.vision, recipe.language, recipe.bridge, **options)
    if isinstance(model, QFormerBlip2Stage1Model) != (recipe.stage == "stage1"):
        raise RecipeError(f"stage is {recipe.stage!r}, but {recipe.from_} is a {type(model).__name__}.")
    model.freeze(**{part: part in recipe.freeze for part in FROZEN_PARTS})
    if recipe.arguments.get("bf16") or recipe.arguments.get("fp16"):
        for parameter in model.parameters():
            if parameter.requires_grad:  # updates are too small for half precision; computing is autocast's affair
                parameter.data = parameter.data.float()
    if recipe.lora is not None:
        from peft import get_peft_model

        from .training_peft import lora_config

        model = get_peft_model(model, lora_config(model, **recipe.lora))
    return model, processor


def framing_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A tokenizer for stage 1, whose texts begin and end with a token of their own, as BERT's do."""
    tokenizer = bert_tokenizer(where_to_load(source))
    begin, end = tokenizer.cls_token or tokenizer.bos_token, tokenizer.sep_token or tokenizer.eos_token
    ids = tokenizer("a")["input_ids"]
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (begin, end)]
    if [ids[0], ids[-1]] != ends:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A {end}", special_tokens=list(zip((begin, end), ends))
        )
    return tokenizer


def build_classifier(recipe: Recipe, options: dict):
    """A classifier: fresh, from a bridge that was trained for something else, or one that goes on."""
    from ..families import FAMILIES

    if recipe.from_ is None:
        return FAMILIES[recipe.bridge].classifier_class.from_vision(recipe.vision, **options)
    source = os.path.expanduser(recipe.from_)
    kind = AutoConfig.from_pretrained(source).model_type
    for classifier in (family.classifier_class for family in FAMILIES.values()):
        if kind == classifier.config_class.model_type:
            if options.keys() - {"dtype"}:
                raise RecipeError(f"{recipe.from_} has its classes already: leave {', '.join(sorted(options))} out.")
            return classifier.from_pretrained(source, **options), AutoImageProcessor.from_pretrained(source)
        if kind in [model.config_class.model_type for model in classifier.begins_as]:
            return classifier.from_bridge(source, **options)
    raise RecipeError(f"{recipe.from_} holds a {kind!r} model, which has no bridge to classify with.")


def load_data(data: DataRecipe, max_broken: float = 0.01):
    """A recipe's data set as records, each with the data set's name as `source`.

    Broken records are left out: here, or of a stream as it flows.

    Raises:
        ValueError: The data is not as expected, or too much of it is broken.
        OSError: It can't be read.
    """
    from .training_data import load, skip_broken

    records = load(data.source, data.path, split=data.split, streaming=data.streaming, **data.options)
    if data.limit is not None:
        records = take(records, data.limit)
    if not data.streaming:
        records, report = skip_broken(records, max_broken)
        if report.num_broken:
            logger.warning(f"{data.name or data.source}: {report}")
    if data.name is not None:
        records = records.map(_named, fn_kwargs={"name": data.name}, features=records.features)
    return records


def _named(record: dict, name: str) -> dict:
    return {"source": name}


def load_mixture(recipe: Recipe, seed: int):
    """All that a recipe trains on, as one data set of records."""
    from .training_data import mix

    loaded = [load_data(data, recipe.max_broken) for data in recipe.data]
    weights = [data.weight for data in recipe.data]
    records = mix(loaded, weights=weights if len(set(weights)) > 1 else None, seed=seed, stopping=recipe.stopping)
    if recipe.data[0].streaming and recipe.shuffle_buffer > 1:
        records = records.shuffle(seed=seed, buffer_size=recipe.shuffle_buffer)
    return records


def build_trainer(recipe: Recipe, output: str | os.PathLike) -> BridgeTrainer:
    """Everything that a recipe names, put together.

    Args:
        recipe: The recipe.
        output: Folder for checkpoints and results.

    Raises:
        RecipeError: Something can't be run as it stands.
        ValueError: Parts or data are not as expected.
        OSError: They can't be had.
    """
    if missing := recipe.missing_paths():
        raise RecipeError(
            f"{', '.join(missing)} missing: say where the data is, such as --set {missing[0]}=FOLDER, or in a copy of the recipe."
        )
    args = recipe.training_arguments(output)
    set_seed(args.seed)
    seed = args.seed if args.data_seed is None else args.data_seed
    with built_whole(args):
        model, processor = build_model(recipe)
    encoder = encoder_for(model, processor, seed=seed, **vars(recipe.text))
    cache = store = None
    if recipe.cache_features is not None:
        cache = FeatureCache(model, processor, device=args.device, **vars(recipe.cache_features))
        store = cache.store
    if recipe.packing is not None:
        encoder = PackedEncoder(encoder, model, **vars(recipe.packing), store=store)
    elif cache is not None:
        encoder = PreparedEncoder(encoder, store)
    records = load_mixture(recipe, seed)
    encoder.check_records(records)
    if recipe.data[0].streaming:
        data = SampleStream(records, encoder, args.per_device_train_batch_size, args.process_index, args.world_size)
    else:
        data = Samples(records, encoder)
    held_out = {
        f"{number}_{evaluation.name or evaluation.source}": load_data(evaluation, recipe.max_broken)
        for number, evaluation in enumerate(recipe.evaluation)
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
    names = {data.name or data.source: data.loss_weight for data in recipe.data}
    if len(names) < len(recipe.data) and len({data.loss_weight for data in recipe.data}) > 1:
        raise RecipeError("data sets with loss weights of their own need names of their own: set data.*.name.")
    trainer = BridgeTrainer(
        model,
        args,
        encoder=encoder,
        processor=processor,
        learning_rates=recipe.learning_rates,
        no_weight_decay=recipe.no_weight_decay,
        loss_weights=names,
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
    return trainer


def train(recipe: Recipe, output: str | os.PathLike, resume: bool = False) -> dict:
    """Run a recipe: `output` then holds what was trained, `training_summary.json` and the recipe.

    Args:
        recipe: The recipe.
        output: Folder for checkpoints and results.
        resume: Go on from the last checkpoint in `output`; from the start where there is none.

    Returns:
        What `training_summary.json` holds.

    Raises:
        RecipeError: Something can't be run as it stands, or `output` holds a run already.
        TrainingError: Training can't go on.
    """
    output = Path(output)
    if output.is_file():
        raise RecipeError(f"{output} is a file; expected a folder to write to.")
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if last is not None and not resume:
        raise RecipeError(
            f"{output} holds a run already, up to {Path(last).name}: go on with --resume, or give another --output."
        )
    trainer = build_trainer(recipe, output)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        _note_recipe(recipe, output / "recipe.yaml", last is not None)
    trainer.train(resume_from_checkpoint=last)
    return finish(trainer, recipe)


def _note_recipe(recipe: Recipe, path: Path, going_on: bool) -> None:
    if going_on and path.exists():
        from .training_recipes import read_recipe

        before, now = read_recipe(path).to_dict(), recipe.to_dict()
        if changed := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            logger.warning(f"The run goes on with another {', '.join(changed)} than it began with.")
    _write(path, recipe.to_yaml())


def finish(trainer: BridgeTrainer, recipe: Recipe) -> dict:
    """Evaluate, save what was trained, write the summary, and push where the recipe says so."""
    seconds, evaluation, files = trainer.seconds, [], {}
    for number, (data, (key, samples)) in enumerate(zip(recipe.evaluation, (trainer.eval_dataset or {}).items())):
        name, about = data.name or data.source, {"split": data.split or "train"}
        metrics = trainer.evaluate(samples, metric_key_prefix=f"eval_{key}")
        if (loss := metrics.get(f"eval_{key}_loss")) is not None:  # stage 1 drops batches that are not full
            evaluation.append({"dataset": name, **about, "metric": "loss", "value": loss})
        if data.generate:
            count = len(samples) if data.generate < 0 else min(data.generate, len(samples))
            chosen = samples.records.select(range(count))
            shared = trainer.args.world_size > 1 and not trainer.is_spread
            if shared:  # each process has the whole model
                chosen = chosen.select(range(trainer.args.process_index, count, trainer.args.world_size))
            said = generate(trainer.model, trainer.encoder, chosen, data.max_new_tokens, trainer.args.eval_batch_size)
            rows = gather_object(_rows(chosen, said)) if shared else _rows(chosen, said)
            right = sum(row["generated"].strip().lower() == row["wanted"].strip().lower() for row in rows)
            right /= max(count, 1)
            file = f"predictions_{number}.jsonl"
            files[file] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            found = {"metric": "exact_match", "value": right, "records": count, "predictions": file}
            evaluation.append({"dataset": name, **about, **found})
    summary = {
        "description": recipe.description,
        "recipe": "recipe.yaml",
        "datasets": list(dict.fromkeys(data.name or data.source for data in recipe.data)),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "hardware": hardware(trainer.args.world_size),
        "arguments": {**recipe.arguments, **{f"learning_rate of {k}": v for k, v in recipe.learning_rates.items()}},
        "evaluation": evaluation,
        "skipped_records": trainer.num_skipped,
        "failed_saves": trainer.failed_saves,
    }
    if isinstance(trainer.encoder, PackedEncoder):
        summary["packing"] = trainer.encoder.packer.savings()
    if trainer.encoder.caption_end_stops and trainer.encoder.end_token_id is not None:
        options = trainer.encoder.generation_options(trainer._bare_model, 1)
        trainer._bare_model.generation_config.eos_token_id = options["eos_token_id"]
    files["training_summary.json"] = json.dumps(summary, indent=1) + "\n"
    trainer.save_result(files, recipe.push_to, recipe.private)
    return summary


def hardware(num_processes: int) -> str:
    """What a run was on, in words."""
    if torch.cuda.is_available():
        return f"{num_processes} x {torch.cuda.get_device_name()}"
    return f"{num_processes} x CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


__all__ = [
    "BridgeTrainer",
    "Collator",
    "NonFiniteError",
    "SampleStream",
    "SampleTable",
    "Samples",
    "TrainingError",
    "build_model",
    "build_trainer",
    "first_bad_module",
    "generate",
    "train",
]
