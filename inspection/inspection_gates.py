"""How far the gates of Perceiver-Flamingo are open, now and over a training run, and what bridges make of pictures."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import Trainer, TrainerCallback

from ..modeling import BridgedModel
from ..training.training_gates import KINDS, gate_history, gates
from .inspection_attention import in_eval_mode, on_device


SHARE = "gates/image_variance_share"


def image_variance_share(visual_tokens: torch.Tensor) -> float:
    """How much of the variance of visual tokens is due to the pictures.

    The rest lies between the tokens of one picture and is the same for all pictures. 0: all pictures give the same
    tokens, so that nothing can be told about them; 1: the tokens of a picture are all alike.

    Args:
        visual_tokens: `(num_images, num_image_tokens, width)`, of at least two pictures.

    Returns:
        A number from 0 to 1; 0 if there is no variance at all.

    Raises:
        ValueError: There are fewer than two pictures.
    """
    if visual_tokens.ndim != 3 or len(visual_tokens) < 2:
        raise ValueError(
            f"Visual tokens have shape {tuple(visual_tokens.shape)}; expected (num_images, num_image_tokens, width) "
            "with at least two images: variance between images needs several."
        )
    tokens = visual_tokens.detach().double()
    between = (tokens - tokens.mean(dim=0)).square().sum()
    total = (tokens - tokens.mean(dim=(0, 1))).square().sum()
    return float(between / total) if total > 0 else 0.0


@torch.no_grad()
def visual_tokens(model: BridgedModel, inputs) -> torch.Tensor:
    """What the bridge makes of pictures: the queries of a Q-Former, the latents of a resampler, projected patches.

    Args:
        model: A bridged model.
        inputs: Model inputs with images, as its processor gives them; others are not read.

    Returns:
        `(num_images, num_image_tokens, width)`, float32.

    Raises:
        ValueError: There are no images, or their numbers of tokens differ.
    """
    images = {name: inputs[name] for name in model.image_arguments if inputs.get(name) is not None}
    if not images:
        raise ValueError("There are no images in inputs: give what the processor makes of pictures.")
    with in_eval_mode(model):
        tokens = model.get_image_features(**on_device(images, model), return_dict=True).pooler_output
    if isinstance(tokens, torch.Tensor):
        return tokens.float()
    if len(counts := {len(each) for each in tokens}) > 1:
        raise ValueError(f"The pictures have {sorted(counts)} visual tokens; give pictures of one size.")
    return torch.stack(list(tokens)).float()


# ---------------------------------------------------------------------- over a run


class GateLogger(TrainerCallback):
    """Logs the gates whenever the trainer logs, to every logger that it reports to.

    The names are `gates/attention/layer_3`, `gates/feed_forward/layer_3` and, with pictures,
    `gates/image_variance_share`. `gate_history` reads them back.

    Args:
        trainer: The trainer that it is added to: `trainer.add_callback(GateLogger(trainer))`.
        inputs: Model inputs of at least two pictures, for `image_variance_share`; they are encoded at every log.
    """

    def __init__(self, trainer: Trainer, inputs=None):
        self.trainer, self.inputs = trainer, inputs

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Log the gates before the first step; an unsuitable model is refused here."""
        self._log(model)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        """Log the gates beside the loss."""
        if not any(name.startswith("gates/") for name in logs or {}):
            self._log(model)

    def _log(self, model) -> None:
        model = self.trainer.accelerator.unwrap_model(model)
        logs = {f"gates/{kind}/layer_{row['layer']}": row[kind] for row in gates(model) for kind in KINDS}
        if self.inputs is not None:
            logs[SHARE] = image_variance_share(visual_tokens(model, self.inputs))
        self.trainer.log(logs)


def share_history(log_history: Iterable[dict]) -> list[dict]:
    """The visual tokens' variance between images over a run: rows of `step` and `image_variance_share`.

    Args:
        log_history: As for `gate_history`.
    """
    return [{"step": row["step"], "image_variance_share": row[SHARE]} for row in log_history if SHARE in row]


__all__ = ["GateLogger", "gate_history", "gates", "image_variance_share", "share_history", "visual_tokens"]
