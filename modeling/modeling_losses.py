"""Losses over the vocabulary: checks of labels, and a loss that never holds the logits of all tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..compat import ForCausalLMLoss, torch_compilable_check
from .modeling_outputs import BridgedOutput


IGNORED = -100  # label of tokens without a loss
# Logits that are held at a time, as numbers: a device that is fast at large products gets larger blocks
BLOCK_LOGITS = {"cpu": 2**21}
OTHER_BLOCK_LOGITS = 2**26


def tokens_per_block(num_columns: int, device: torch.device) -> int:
    """Number of tokens whose logits are held at a time.

    Args:
        num_columns: Columns of the logits.
        device: Where they are computed.
    """
    return max(1, BLOCK_LOGITS.get(device.type, OTHER_BLOCK_LOGITS) // num_columns)


def _block_losses(score: Callable, states: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    return nn.functional.cross_entropy(
        score(states).float(), targets, reduction="none", label_smoothing=label_smoothing
    )


def token_losses(
    score: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
    block: int = 1024,
) -> torch.Tensor:
    """Cross-entropy of every token, with the logits of one block of tokens at a time.

    `backward` computes the logits of a block again. Tokens without a label are not scored.

    Args:
        score: The output layer: hidden states `(tokens, width)` to logits `(tokens, vocabulary)`.
        hidden_states: `(batch, tokens, width)`.
        targets: What each of them predicts, `(batch, tokens)`; -100 is ignored.
        label_smoothing: Share of the loss that all words have equally, as for `torch.nn.functional.cross_entropy`.
        block: Tokens in a block.

    Returns:
        `(batch, tokens)` in float32, 0 where the target is ignored.
    """
    targets = targets.to(hidden_states.device)
    learned = targets != IGNORED
    states, wanted = hidden_states[learned], targets[learned]
    again = torch.is_grad_enabled() and len(wanted) > block  # the logits of a single block would be computed twice
    found = []
    for start in range(0, max(len(wanted), 1), block):  # an empty block gives gradients of zero
        part = score, states[start : start + block], wanted[start : start + block], label_smoothing
        found.append(checkpoint(_block_losses, *part, use_reentrant=False) if again else _block_losses(*part))
    losses = torch.zeros(targets.shape, device=targets.device)
    return losses.masked_scatter(learned, torch.cat(found))


def may_leave_out_logits(forward: Callable) -> Callable:
    """Give a model's `forward` the arguments `return_logits` and `label_smoothing`, see `LossMixin.loss_alone`."""
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def with_or_without(self, *args, return_logits: bool = True, label_smoothing: float = 0.0, **kwargs):
        if not return_logits:
            kwargs.update(zip(names, args))
            return self.loss_alone(functools.partial(forward, self), label_smoothing, **kwargs)
        if label_smoothing:
            raise ValueError(
                f"label_smoothing is {label_smoothing}, but forward smooths labels only where it returns no logits: "
                "set return_logits=False, or smooth them in a loss of your own on outputs.logits."
            )
        return forward(self, *args, **kwargs)

    return with_or_without


class LossMixin:
    """Checks of labels, and the loss without logits."""

    # Whether the language model returns what its output layer gives, unchanged; `None` until it was seen
    _returns_scores: bool | None = None

    @property
    def has_usual_loss(self) -> bool:
        """Whether the loss is the mean cross-entropy of the tokens, and not another `loss_function` that was set."""
        return self.config.is_encoder_decoder or self.loss_function is ForCausalLMLoss

    def loss_alone(
        self,
        forward: Callable[..., BridgedOutput],
        label_smoothing: float = 0.0,
        *,
        labels: torch.Tensor | None = None,
        num_items_in_batch=None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> BridgedOutput:
        """The loss with the logits of one block of tokens at a time: what `forward(return_logits=False)` does.

        A language model that changes its logits after the output layer (Gemma 2 caps them) computes all of them.

        Args:
            forward: `forward` with logits.
            label_smoothing: See `token_losses`.
            labels: As for `forward`; required.
            num_items_in_batch: What the sum of the losses is divided by; by default the number of labels.
            logits_to_keep: As for `forward`.
            kwargs: The other arguments of `forward`.

        Returns:
            A `BridgedOutput` without logits, but with `token_losses`.

        Raises:
            ValueError: There are no labels, or the model has a `loss_function` of its own.
        """
        if labels is None:
            raise ValueError(
                "return_logits=False leaves the loss alone, which needs labels: give them, or leave it out."
            )
        if not self.has_usual_loss:
            raise ValueError(
                "The model's loss_function is not the usual one, and needs all logits: leave return_logits=False out."
            )
        labels = self._without_placeholders(labels, num_items_in_batch)
        if self.config.is_encoder_decoder:
            targets = labels
            if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
                kwargs["decoder_input_ids"] = self.language_model.prepare_decoder_input_ids_from_labels(labels)
        else:
            targets = self._without_placeholders(kwargs.pop("shift_labels", None), num_items_in_batch)
            if targets is None:
                targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        outputs, states, score = self._scorable(forward, logits_to_keep, **kwargs)
        self._check_labels(targets, outputs.logits.shape[-1], states.shape[1])
        block = tokens_per_block(outputs.logits.shape[-1], states.device)
        losses = token_losses(score, states, targets, label_smoothing, block)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / (count.to(losses.device) if isinstance(count, torch.Tensor) else count)
        return replace(outputs, loss=self.with_gradient(loss), logits=None, token_losses=losses)

    def _scorable(self, forward: Callable, logits_to_keep, **kwargs) -> tuple[BridgedOutput, torch.Tensor, Callable]:
        """Outputs, what is to be scored, `(batch, tokens, ...)`, and how: hidden states, or the logits themselves."""
        if self._returns_scores is not False:
            with self.unscored() as layer:
                outputs = forward(**self._logits_to_keep_argument(logits_to_keep), **kwargs)
            if self._returns_scores is None:
                scored = layer.hidden_states is not None and layer.logits is not None
                self._returns_scores = scored and torch.equal(layer.logits.float(), outputs.logits.float())
            if self._returns_scores:
                return outputs, self._select_kept_logits(layer.hidden_states, logits_to_keep), self.score
        outputs = forward(logits_to_keep=logits_to_keep, **kwargs)
        return outputs, outputs.logits, lambda logits: logits

    def _without_placeholders(self, labels: torch.Tensor | None, num_items_in_batch) -> torch.Tensor | None:
        """Labels with -100 for the placeholders, where visual tokens take their places: nobody predicts those."""
        if labels is None or not self.config.visual_tokens_in_prompt:
            return labels
        placeholders = labels == self.config.image_token_id
        if num_items_in_batch is not None:
            torch_compilable_check(
                ~placeholders.any(),
                lambda: (
                    f"{int(placeholders.sum())} labels are <image> placeholders, which num_items_in_batch counts, "
                    "but have no loss: set labels[labels == model.config.image_token_id] = -100 in the "
                    "collator."
                ),
            )
        return labels.masked_fill(placeholders, IGNORED)

    @staticmethod
    def _check_labels(labels: torch.Tensor, num_columns: int, num_positions: int) -> None:
        torch_compilable_check(
            ((labels == IGNORED) | (labels >= 0) & (labels < num_columns)).all(),
            lambda: (
                f"labels go from {int(labels.min())} to {int(labels.max())}; expected 0 to {num_columns - 1}, the "
                "columns of the logits, or -100 for tokens to ignore. Use the tokenizer that belongs to this model."
            ),
        )
        if num_positions != labels.shape[1]:
            raise ValueError(
                f"{labels.shape[1]} labels per row, but logits for {num_positions} positions: don't combine labels "
                "with logits_to_keep, unless shift_labels says what each kept position predicts."
            )


__all__ = ["LossMixin", "may_leave_out_logits", "token_losses", "tokens_per_block"]
