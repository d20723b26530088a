"""The trainer: transformers' `Trainer` with what a bridge needs.

Beyond saving and resuming (`training_resumable`) it has learning rates by part, weights of data sets' losses and a
count of records that can't be used, and it reports the first module whose output is not finite. `training_run` runs
recipes with it.

Plain `Trainer` works with bridged models too. Where it smooths labels (`label_smoothing_factor`) it does not show them
to the model: the collator then has to set the labels of `<image>` placeholders to -100, and to give an encoder-decoder
its `decoder_input_ids` (`model.language_model.prepare_decoder_input_ids_from_labels(labels)`). `BridgeTrainer` needs
neither.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..compat import DataLoaderShard, layers_not_to_split
from ..configuration.configuration_classification import ClassificationConfigMixin
from ..files import write_json
from ..modeling.modeling_flamingo import GatedCrossAttentionLayer
from .training_datasets import EXTRA_KEYS, Collator, Samples, SampleStream, SkippedRecord
from .training_encoding import IGNORED, Encoder, Stage1Encoder
from .training_failures import TrainingError
from .training_features import FeatureCache
from .training_nonfinite import NonFiniteError, common_report, first_bad_module, look_into_batches
from .training_parameters import parameter_groups
from .training_recipes import best_metrics
from .training_resumable import ResumableTrainer
from .training_samples import SampleTable, generate


logger = logging.get_logger(__name__)


class BridgeTrainer(ResumableTrainer):
    """`Trainer` for what is trained of a bridged model.

    Args:
        encoder: Makes samples of records; batches are put together with it.
        processor: Saved with every checkpoint.
        learning_rates: By group of parameters, see `training_parameters.group_of`, where they differ from
            `args.learning_rate`.
        no_weight_decay: Beginnings of names of parameters without weight decay, besides the usual ones.
        loss_weights: Weights of data sets by name, if their losses count differently.
        max_broken: Share (of at least 1,000) or number of records that may be left out because they can't be used.
        feature_cache: Where `encoder` takes patch features from.
        kwargs: Of `Trainer`. An `eval_dataset` of several names gives `eval_NAME_loss` of each, and `eval_loss`, their
            mean.

    Raises:
        ValueError: Stage 1, which has neither labels nor tokens of its own, with smoothed labels or loss weights.
    """

    def __init__(
        self, model, args, *, encoder: Encoder, processor, learning_rates: dict[str, float] | None = None,
        no_weight_decay: tuple[str, ...] = (), loss_weights: dict[str, float] | None = None, max_broken: float = 0.01,
        feature_cache: FeatureCache | None = None, **kwargs,
    ):  # fmt: skip
        self.encoder = encoder
        self.learning_rates, self.no_weight_decay = dict(learning_rates or {}), tuple(no_weight_decay)
        self.loss_weights = loss_weights if loss_weights and len(set(loss_weights.values())) > 1 else None
        self.skipped, self.num_skipped, self.num_seen, self.max_broken = Counter(), 0, 0, max_broken
        self.feature_cache = feature_cache
        self._step_batches: list[tuple] = []
        self._loss_alone = False  # whether an evaluation drops the model's outputs
        if isinstance(encoder, Stage1Encoder) and (args.label_smoothing_factor or self.loss_weights):
            what = "labels to smooth (label_smoothing_factor)" if args.label_smoothing_factor else "tokens to weigh"
            raise ValueError(f"stage 1 has no {what}: its objectives make their own losses. Leave it out.")
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, processor=processor, data_collator=Collator(encoder), **kwargs)
        if use_cache is not None:
            model.config.use_cache = use_cache  # it is saved with the model
        if self.is_fsdp_enabled:
            self._set_up_fsdp()

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and have it check the norm of the gradients that it computes before every step."""
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def clip_and_check(*args, **kwargs):  # a callback sees no norm, and gradients only after they were clipped
            grad_norm = clip(*args, **kwargs)
            self._check_grad_norm(grad_norm)
            return grad_norm

        self.accelerator.clip_grad_norm_ = clip_and_check

    def _set_up_fsdp(self) -> None:
        """Name the layers that are sharded one by one.

        accelerate refuses names that no layer has, and CLIP's encoder brings those of its text side.

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

    def _gather_counts(self, *counts: int) -> torch.Tensor:
        """Whole numbers of all processes: `(processes, len(counts))`, int64."""
        if self.args.world_size == 1:
            return torch.tensor([counts])
        return self.accelerator.gather(torch.tensor([counts], device=self.args.device))

    def on_train_begin(self) -> None:
        """Put a resumed stream where it was, and prepare FSDP."""
        super().on_train_begin()
        if isinstance(self.train_dataset, SampleStream):
            seen = 0 if self.args.ignore_data_skip or not self.resumed_from else self.state.global_step
            self.train_dataset.skip_batches = seen * self.args.gradient_accumulation_steps
        for module in self.model.modules() if self.is_fsdp_enabled else ():
            if isinstance(module, GatedCrossAttentionLayer):  # keys and values are made before the layer's own forward
                register_fsdp_forward_method(module, "project")

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader:
        """See `Trainer.get_train_dataloader`; streams are shared out among processes by themselves."""
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
            batch_size=self.train_dataset.batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            **workers,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """See `Trainer.get_batch_samples`; skipped records are counted and loss weights added."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        skipped = [record for batch in batches for record in batch.pop("skipped")]
        self._count_skipped(skipped, len(skipped) + sum(len(batch["ids"]) for batch in batches))
        if self.args.world_size > 1 and isinstance(self.encoder, Stage1Encoder):
            batches = [self._cut_to_shortest(batch) for batch in batches]
        self._step_batches = []
        if self.loss_weights is not None and batches and "labels" in batches[0]:
            self._weigh(batches, device)
        return batches, num_items if num_items is None else num_items.clamp(min=1)

    def _count_skipped(self, skipped: list[SkippedRecord], seen: int) -> None:
        for record in skipped:
            self.skipped[record.reason] += 1
            if self.skipped.total() <= 10:
                logger.warning(f"Record {record.id} is skipped: {record.reason}")
        now = self._gather_counts(len(skipped), seen).sum(dim=0)  # all processes stop, or none
        self.num_skipped += int(now[0])
        self.num_seen += int(now[1])
        limit = self.max_broken
        if limit < 1:
            limit *= max(self.num_seen, 1000)
        if self.num_skipped > limit:
            most = "; ".join(f"{reason} ({count})" for reason, count in self.skipped.most_common(3))
            raise TrainingError(
                f"{self.num_skipped} of {self.num_seen} records can't be used, more than max_broken={self.max_broken} "
                f"allows: {most or 'for reasons that other processes log'}"
            )

    def _cut_to_shortest(self, batch: dict) -> dict:
        """A batch of stage 1, cut to as many pairs as the process with the fewest has: all pairs are compared."""
        rows = int(self._gather_counts(len(batch["sources"])).min())
        return {name: value[:rows] for name, value in batch.items()}

    def _model_inputs(self, inputs: dict) -> dict:
        """A batch without what is not for the model, and with the features that it lacks."""
        inputs = {name: value for name, value in inputs.items() if name not in EXTRA_KEYS}
        if "uncached" in inputs:
            if self.is_sharded:
                raise TrainingError(
                    f"features of some images are not in {self.feature_cache.store.folder}: if the model is sharded "
                    "over processes, all have to be there before training. Raise cache_features.max_bytes, or leave "
                    "cache_features out."
                )
            inputs = self.feature_cache.complete(inputs)
        return inputs

    # ------------------------------------------------------------------ loss

    @property
    def _shifts_labels(self) -> bool:
        """Whether the loss compares each position with the next one's label, as decoder-only models do."""
        config = self.bare_model.config
        return not (getattr(config, "is_encoder_decoder", False) or isinstance(config, ClassificationConfigMixin))

    def _targets(self, batch: dict) -> torch.Tensor:
        """What a batch's logits are compared with: `(batch, tokens)`, or `(batch,)` for classes."""
        if batch.get("shift_labels") is not None:  # packed rows
            return batch["shift_labels"]
        return batch["labels"][:, 1:] if self._shifts_labels else batch["labels"]

    def _weigh(self, batches: list[dict], device) -> None:
        """Give every row the weight of each of its tokens, so that the loss is the data sets' means, weighted.

        Source: OpenFlamingo's `train_utils.py`: `loss_multiplier_laion * mean + loss_multiplier_mmc4 * mean`.
        """
        names = sorted(self.loss_weights)
        counts = torch.zeros(len(names), device=device)
        for batch in batches:
            learned = self._targets(batch) != IGNORED
            rows = learned.reshape(len(learned), -1).sum(dim=1).to(device)
            index = torch.tensor([names.index(source) for source in batch["sources"]], device=device)
            counts.index_add_(0, index, rows.to(counts))
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            counts = self.accelerator.gather(counts[None]).sum(dim=0)
        weights = torch.tensor([self.loss_weights[name] for name in names], device=device) / counts.clamp(min=1)
        if not self.model_accepts_loss_kwargs:
            weights *= len(batches)  # `Trainer` divides the loss of such models by the number of batches in a step
        for batch in batches:
            index = torch.tensor([names.index(source) for source in batch["sources"]], device=device)
            batch["token_weights"] = weights[index]  # (batch,)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `Trainer.compute_loss`; tokens are weighted where data sets have loss weights, and labels smoothed.

        `Trainer` itself would hide the labels that it smooths from the model, and encoder-decoders need them.
        """
        weights = inputs.pop("token_weights", None)
        if (self._loss_alone or not return_outputs) and self.compute_loss_func is None:
            inputs = self._without_logits(self._learned_only(inputs))
        smoothed = self.label_smoother is not None and self.compute_loss_func is None and "labels" in inputs
        if weights is None and not smoothed:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)  # with the labels: an encoder-decoder makes its decoder's inputs of them
        losses, targets = self._losses(outputs, inputs)
        if weights is not None:
            loss = (losses.reshape(len(losses), -1).sum(dim=1) * weights).sum()
        elif num_items_in_batch is None:
            loss = losses.sum() / (targets != IGNORED).sum().clamp(min=1)
        else:
            loss = losses.sum() / num_items_in_batch
        if self.args.average_tokens_across_devices and (weights is not None or num_items_in_batch is not None):
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def _learned_only(self, inputs: dict) -> dict:
        """Inputs that ask for logits where something is learned, and nowhere else.

        Few tokens of a prompt are answers, and a vocabulary is wide. Packed rows ask for theirs already.
        """
        if "labels" not in inputs or "shift_labels" in inputs or not self._shifts_labels:
            return inputs
        # compiled models are compiled again for every shape, and DataParallel splits all tensors by rows
        if self.args.torch_compile or self.args.n_gpu > 1:
            return inputs
        targets = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        learned = (targets != IGNORED).any(dim=0)
        learned[-1] |= ~learned.any()  # a batch without anything to learn has a loss too
        kept = learned.nonzero().flatten()
        return {**inputs, "logits_to_keep": kept, "shift_labels": targets[:, kept]}

    def _without_logits(self, inputs: dict) -> dict:
        """Inputs that ask for the loss alone, so that the logits of all tokens are never held at once."""
        model = self.bare_model
        if "labels" not in inputs or not getattr(model, "has_usual_loss", False):
            return inputs
        if self.args.torch_compile or self.args.n_gpu > 1:  # as for `_learned_only`
            return inputs
        smoothing = self.args.label_smoothing_factor
        return {**inputs, "return_logits": False, **({"label_smoothing": smoothing} if smoothing else {})}

    def _losses(self, outputs, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each target, 0 where nothing is learned, and the targets."""
        targets = self._targets(inputs)
        if outputs.get("token_losses") is not None:
            return outputs.token_losses, targets
        logits = outputs.logits.float()
        if self._shifts_labels and inputs.get("shift_labels") is None:
            logits = logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), reduction="none", label_smoothing=self.args.label_smoothing_factor
        )
        return losses.view(targets.shape), targets

    def training_step(self, model, inputs, num_items_in_batch=None):
        """See `Trainer.training_step`; a loss that is not finite stops the run."""
        randomness = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._step_batches.append((inputs, num_items_in_batch, randomness))
        loss = super().training_step(model, self._model_inputs(inputs), num_items_in_batch)
        bad = not torch.isfinite(loss).all()
        if self._gather_counts(int(bad)).any():
            self._stop("the loss", self._step_batches[-1:] if bad else [])
        return loss

    # ------------------------------------------------------------------ evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """See `Trainer.prediction_step`; the model gets its inputs alone."""
        before, self._loss_alone = self._loss_alone, prediction_loss_only
        try:
            return super().prediction_step(model, self._model_inputs(inputs), prediction_loss_only, ignore_keys)
        finally:
            self._loss_alone = before

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """See `Trainer.evaluate`; of several data sets `eval_loss` is the mean of their losses."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        datasets, name = self.eval_dataset if eval_dataset is None else eval_dataset, f"{metric_key_prefix}_loss"
        if isinstance(datasets, dict) and name not in metrics:
            losses = [metrics.get(f"{metric_key_prefix}_{key}_loss") for key in datasets]
            losses = [loss for loss in losses if loss is not None]
            if losses:
                metrics[name] = sum(losses) / len(losses)
                mean = {name: metrics[name]}
                self.log(mean)
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, mean)
        return metrics

    def train(self, *args, **kwargs):
        """See `ResumableTrainer.train`; a metric for the best model that no evaluation gives is refused before it.

        Args:
            args: Of `ResumableTrainer.train`.
            kwargs: Of `ResumableTrainer.train`.

        Raises:
            TrainingError: There is no such metric, or the best model can't be loaded at the end.
        """
        self._check_best_metric()
        return super().train(*args, **kwargs)

    def _check_best_metric(self) -> None:
        args = self.args
        if args.load_best_model_at_end and self.is_fsdp_enabled:
            raise TrainingError(
                "load_best_model_at_end does not work with FSDP, whose checkpoints here hold what is trained alone: "
                "leave it out, and take the best checkpoint afterwards."
            )
        if args.metric_for_best_model is None or args.eval_strategy == "no" or self.compute_metrics is not None:
            return
        wanted, sets = args.metric_for_best_model, self.eval_dataset
        sets = {} if sets is None else sets
        known = best_metrics(list(sets) if isinstance(sets, dict) else [])
        if f"eval_{wanted.removeprefix('eval_')}" not in known:
            raise TrainingError(f"metric_for_best_model is {wanted!r}; expected one of {', '.join(known)}.")
        full = args.eval_batch_size * args.world_size
        for data in sets.values() if isinstance(sets, dict) else [sets]:
            if args.dataloader_drop_last and hasattr(data, "__len__") and len(data) < full:
                raise TrainingError(
                    f"there is no loss for metric_for_best_model: an evaluation has {len(data)} records, and batches "
                    f"of fewer than {full} are dropped. Take a smaller per_device_eval_batch_size."
                )

    def _check_grad_norm(self, grad_norm) -> None:
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16: the scaler skips such steps
        if grad_norm is not None and not scaled and not math.isfinite(float(grad_norm)):
            self._stop("a gradient", self._step_batches)

    def _stop(self, what: str, batches: list[tuple]) -> None:
        """Find the first bad module, write it down and stop: all processes at once, with one report.

        Args:
            what: What is not finite.
            batches: This process' part in it.

        Raises:
            NonFiniteError: Always.
        """

        def loss_of(model, inputs, num_items):
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                return self.compute_loss(model, dict(inputs), num_items_in_batch=num_items)

        # if processes wait for each other in the middle of a model, none can run it alone
        alone = not self.is_sharded and (self.args.world_size == 1 or not isinstance(self.encoder, Stage1Encoder))
        found = look_into_batches(
            self.accelerator.unwrap_model(self.model_wrapped),
            batches,
            loss_of if alone else None,
            lambda inputs: send_to_device(self._model_inputs(inputs), self.args.device),
        )
        report = {"step": self.state.global_step + 1, "what": what, **common_report(found)}
        if self.is_world_process_zero():
            with suppress(OSError):
                write_json(Path(self.args.output_dir) / f"not_finite_step_{report['step']}.json", report, indent=1)
        self.accelerator.wait_for_everyone()  # the first to leave ends the others
        raise NonFiniteError(report)

    # ------------------------------------------------------------------ optimizer

    def create_optimizer(self, model=None):
        """See `Trainer.create_optimizer`; learning rates and weight decay differ by parameter."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            opt_model = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            if not {"params", "model", "optimizer_dict"} & kwargs.keys():
                args = self.args
                kwargs["params"] = parameter_groups(
                    opt_model, args.learning_rate, args.weight_decay, self.learning_rates, self.no_weight_decay
                )
                self.optimizer_cls_and_kwargs = optimizer_class, kwargs
        return super().create_optimizer(model)


__all__ = [
    "BridgeTrainer",
    "Collator",
    "NonFiniteError",
    "SampleStream",
    "SampleTable",
    "Samples",
    "TrainingError",
    "first_bad_module",
    "generate",
]
