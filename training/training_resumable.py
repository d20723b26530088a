"""A trainer that saves what is trained alone, and resumes runs bit by bit."""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import logging

from ..compat import SCHEDULER_NAME, save_fsdp_optimizer
from ..compat_hooks import TrainerHooks
from ..compat_torch import load_to_numbered_cpus
from ..files import move_into, staging_folder
from ..hub import push_folder
from .training_checkpoints import (
    INCOMPLETE,
    SAVING,
    begin_checkpoint,
    check_launch,
    complete_checkpoint,
    delete_checkpoint,
    delete_leftovers,
    is_complete,
    last_checkpoint,
    note_in,
    rotate_checkpoints,
)
from .training_failures import TrainingError, failing_together, is_storage_error
from .training_parameters import check_optimizer_state
from .training_weights import gathered_by_fsdp, gathered_by_zero3, load_weights, save_weights


logger = logging.get_logger(__name__)


class _OnTrainBegin(TrainerCallback):
    """Calls a function when everything is prepared and training begins."""

    def __init__(self, function):
        self.function = function

    def on_train_begin(self, args, state, control, **kwargs):
        self.function()


class ResumableTrainer(TrainerHooks, Trainer):
    """`Trainer` whose checkpoints hold what is trained of a bridged model, and whose runs can be killed at any moment.

    Args:
        processor: Saved with every checkpoint.
        args: Arguments of `Trainer`.
        kwargs: Arguments of `Trainer`.
    """

    def __init__(self, *args, processor, **kwargs):
        self.processor = processor
        self.failed_saves: list[str] = []
        self._started = time.time()
        self.resumed_from: Path | None = None  # the checkpoint that the run was resumed from
        self._note: dict = {}  # what the checkpoint that the run is resumed from holds besides transformers' own files
        self._loss_sum, self._last_logged = torch.zeros(()), 0  # of the steps since the last log, and its step
        self._loss_total = torch.zeros(())  # of all steps, earlier parts of a resumed run included
        super().__init__(*args, **kwargs)
        self.add_callback(_OnTrainBegin(self.on_train_begin))

    @property
    def bare_model(self) -> PreTrainedModel:
        """The model without the wrappers that training puts around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def is_sharded(self) -> bool:
        """Whether no process has the whole model: all must then run it at the same time."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def seconds(self) -> float:
        """How long this run has taken, earlier parts included."""
        return time.time() - self._started

    # ------------------------------------------------------------------ resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train, see `Trainer.train`.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or `True` for the last complete one in `args.output_dir`.
            args: Further arguments of `Trainer.train`.
            kwargs: Further arguments of `Trainer.train`.

        Raises:
            TrainingError: The checkpoint is incomplete, or of another launch, model or recipe; too many records are
                broken; or a value is not finite.
            ValueError: `True`, but there is no complete checkpoint.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no complete checkpoint to resume from.")
        if checkpoint is not None:
            if (Path(checkpoint) / INCOMPLETE).exists():
                raise TrainingError(f"{checkpoint} is incomplete: it was interrupted while it was saved.")
            check_launch(checkpoint, self._optimizer_file())
            load_to_numbered_cpus()
        self._note = {} if checkpoint is None else note_in(checkpoint)
        self._started -= self._note.get("seconds", 0)
        self.resumed_from = None if checkpoint is None else Path(checkpoint).resolve()
        with failing_together():
            if self.args.should_save:
                delete_leftovers(self.args.output_dir)
        done = super().train(checkpoint, *args, **kwargs)
        return type(done)(done.global_step, done.metrics.get("train_loss", done.training_loss), done.metrics)

    def _optimizer_file(self) -> str:
        """Pattern of the name that this launch gives the optimizer's state in a checkpoint."""
        if self.is_deepspeed_enabled:
            return "global_step*"
        if self.is_fsdp_enabled:
            full = "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
            return "optimizer.bin" if full else "optimizer_0"
        return "optimizer.pt"

    def on_train_begin(self) -> None:
        """Restore what transformers does not, when everything else is restored and prepared."""
        self._loss_sum = torch.tensor(self._note.get("loss", 0.0), device=self.args.device)
        self._last_logged = self._note.get("last_logged", self.state.global_step)
        self._loss_total = torch.tensor(self._note.get("loss_total", math.nan if self._note else 0.0)).to(
            self._loss_sum
        )

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """See `Trainer.training_step`; the loss is added up for the log."""
        loss = super().training_step(*args, **kwargs)
        self._loss_sum += loss
        self._loss_total += loss
        return loss

    def get_batch_samples(self, *args, **kwargs):
        """See `Trainer.get_batch_samples`; a run that was resumed at its end takes no further step."""
        if self.state.global_step >= self.state.max_steps:  # resumed at its end; transformers would take one more step
            logger.info(f"All {self.state.max_steps} steps are done already.")
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def create_optimizer(self, model=None):
        """See `Trainer.create_optimizer`; the state that is loaded later is checked."""
        made_now = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made_now and isinstance(optimizer, torch.optim.Optimizer):
            optimizer.register_load_state_dict_pre_hook(check_optimizer_state)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with means of the loss since the last log and of the whole run, also if it was resumed in between."""
        if "loss" in logs:
            total = self.accelerator.gather(self._loss_sum).mean().item()
            logs["loss"] = total / (self.state.global_step - self._last_logged)
            self._loss_sum.zero_()
            self._last_logged = self.state.global_step
        if "train_loss" in logs:
            total = self.accelerator.gather(self._loss_total).mean().item()
            if math.isfinite(total):  # checkpoints of earlier releases don't tell
                logs["train_loss"] = total / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def load_trained(self, default, checkpoint: str) -> None:
        """Load the trained weights of a checkpoint.

        Args:
            default: transformers' own way, for adapters and weights in several files.
            checkpoint: The checkpoint's folder.

        Raises:
            TrainingError: They are not those of this model.
        """
        if not load_weights(self.bare_model, checkpoint, self.is_fsdp_enabled):
            default()

    def load_best(self, default) -> None:
        """Load the trained weights of the best checkpoint, when training has ended.

        Args:
            default: transformers' own way, which would take a checkpoint of another model.

        Raises:
            TrainingError: The checkpoint is of another model.
        """
        best = self.state.best_model_checkpoint
        if not is_complete(best):  # it could not be written, see `save_checkpoint`
            logger.error(f"The best checkpoint, {best}, is not there any more: the last model stays.")
        elif self.is_deepspeed_enabled:
            default()
        else:
            logger.info(
                f"Loading the best model, of {best} ({self.args.metric_for_best_model}: {self.state.best_metric})."
            )
            self.load_trained(default, best)

    # ------------------------------------------------------------------ saving

    def _gathered(self) -> dict[str, torch.Tensor] | None:
        """The tensors of a sharded model, from all processes, which must all call this; `None` if it is not sharded."""
        model = self.bare_model
        if self.is_fsdp_enabled:
            return gathered_by_fsdp(self.model, model)
        if self.is_deepspeed_enabled and self.accelerator.deepspeed_config["zero_optimization"]["stage"] == 3:
            return gathered_by_zero3(model, self.is_world_process_zero())
        return None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained. All processes must call this; the first one writes.

        Args:
            output_dir: Where to; by default `args.output_dir`.
        """
        state = self._gathered()
        with failing_together():
            if self.args.should_save:
                save_weights(self.bare_model, self.processor, output_dir or self.args.output_dir, state)

    def save_result(self, files: dict[str, str], push_to: str | None = None, private: bool = False) -> None:
        """Save what was trained, in the run's folder, whose files of the same names are replaced once all is written.

        Args:
            files: Texts to save besides it, by file name.
            push_to: Hub repository to push it to.
            private: Whether a new repository is private.

        Raises:
            OSError: Files can't be written, or not be pushed; in the latter case they are in the run's folder.
        """
        output, state = Path(self.args.output_dir), self._gathered()
        with failing_together(), ExitStack() as stack:
            if not self.is_world_process_zero():
                return
            staging = stack.enter_context(staging_folder(output / SAVING.removeprefix("."))) / output.resolve().name
            staging.mkdir()
            for name, text in files.items():  # before the model: its card is made of them
                (staging / name).write_text(text, encoding="utf-8")
            save_weights(self.bare_model, self.processor, staging, state)
            stack.callback(move_into, staging, output)  # also if pushing fails
            if push_to is not None:
                push_folder(staging, push_to, private=private, keep=["README.md"], commit_message="Upload model")

    def save_checkpoint(self, default) -> None:
        """Write a checkpoint. If the disk is full, it is deleted again, and training continues; the last one stays.

        Args:
            default: transformers' own way to write one.

        Raises:
            Exception: Anything but a storage error, in all processes.
        """
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if checkpoint.resolve() == self.resumed_from:
            return  # nothing was trained since
        limit = self.args.save_total_limit
        try:
            with failing_together():
                if self.args.should_save:
                    begin_checkpoint(checkpoint)
            self.args.save_total_limit = None  # older checkpoints stay until this one is complete
            with failing_together():
                default()
            with failing_together():
                if self.args.should_save:
                    note = {"loss": self._loss_sum.item(), "loss_total": self._loss_total.item()}
                    note |= {"last_logged": self._last_logged, "seconds": self.seconds}
                    complete_checkpoint(checkpoint, note)
        except Exception as error:
            if not is_storage_error(error):
                raise
            return self._give_up_checkpoint(checkpoint, error)
        finally:
            self.args.save_total_limit = limit
        with failing_together():
            if self.args.should_save:
                rotate_checkpoints(folder, limit, self.state.best_model_checkpoint)

    def _give_up_checkpoint(self, checkpoint: Path, error: Exception) -> None:
        problem, step = " ".join(str(error).split())[:300], self.state.global_step
        if self.args.should_save:
            with suppress(OSError):
                delete_checkpoint(checkpoint)
        last = last_checkpoint(checkpoint.parent)
        self.failed_saves.append(f"step {step}: {problem}")
        logger.error(
            f"The checkpoint of step {step} could not be written: {problem}. "
            + (f"The last one is {last}. " if last else "There is none before it. ")
            + "Training continues; free space before the next save."
        )

    def save_optimizer(self, default, output_dir: str) -> None:
        """Save the optimizer's and the scheduler's state; with FSDP2 without the frozen parts.

        Args:
            default: transformers' own way, which for FSDP2 writes the whole model once more.
            output_dir: The checkpoint's folder.
        """
        if not self.is_fsdp_enabled or hasattr(self.bare_model, "peft_config"):
            return default()
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))


__all__ = ["ResumableTrainer"]
