"""A bridged model without its output layer, and the output layer alone, for losses that never hold all logits.

TRL's fused head and fused cross-entropy kernels run `model.base_model(...)`, and score `last_hidden_state` themselves
with `get_output_embeddings().weight`, chunk by chunk.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compat import accepts_cache, cache_argument, cache_of, can_return_tuple, field_of, torch_compilable_check
from .modeling_bridge import TokenRows
from .modeling_outputs import BackboneOutput


# Its `model` is one whose output layer is scored outside of `forward`, by a fused head that runs in this thread
_fused = threading.local()
# Arguments of `forward` that say what becomes of the logits
_OF_LOGITS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "num_logits")


class Backbone:
    """A bridged model up to the language model's last hidden state. In everything but its call it is the model.

    Args:
        model: The bridged model.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, *args, **kwargs) -> BackboneOutput:
        """See `BackboneMixin.run_backbone`."""
        return self.model.run_backbone(*args, **kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "model":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.model, name)


class OutputHead:
    """The language model's output layer and the bridge's token rows as one linear layer.

    Its columns are those of the logits. Special tokens beyond the language model's table may leave a gap there: its
    columns get a bias that no token overcomes.

    Args:
        layer: The language model's output layer.
        token_rows: Rows of the special tokens, which replace the layer's or lie beyond them.
    """

    def __init__(self, layer: nn.Module, token_rows: TokenRows):
        self.layer = layer
        self.token_rows = token_rows

    def _padded(self, table: torch.Tensor, value: float) -> torch.Tensor:
        missing = max(0, max(self.token_rows.token_ids) + 1 - len(table))
        return torch.cat([table, table.new_full((missing, *table.shape[1:]), value)])

    def _with_rows(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return table.index_copy(0, torch.tensor(self.token_rows.token_ids, device=table.device), rows.to(table))

    @property
    def weight(self) -> torch.Tensor:
        """`(columns, width)`: a new tensor at every call, with a gradient for the token rows.

        Raises:
            ValueError: The layer carries an adapter, whose part of the logits is not in its weight.
        """
        if hasattr(self.layer, "base_layer"):
            raise ValueError(
                "The language model's output layer carries an adapter, which is no part of its weight: leave the layer "
                "out of the adapter's target_modules."
            )
        return self._with_rows(self._padded(self.layer.weight, 0.0), self.token_rows.scored_rows)

    @property
    def bias(self) -> torch.Tensor | None:
        """`(columns,)`, or `None`."""
        bias, weight = getattr(self.layer, "bias", None), self.layer.weight
        gap = max(self.token_rows.token_ids) + 1 - len(weight) > len(self._beyond(len(weight)))
        if bias is None:
            if not gap:
                return None
            bias = weight.new_zeros(len(weight))
        lowest = torch.finfo(bias.dtype).min / 16  # stays finite when a temperature divides it
        return self._with_rows(self._padded(bias, lowest), bias.new_zeros(len(self.token_rows.token_ids)))

    def _beyond(self, length: int) -> list[int]:
        return [token_id for token_id in self.token_rows.token_ids if token_id >= length]

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., columns)` of hidden states `(..., width)`, before the language model caps or scales them."""
        return nn.functional.linear(hidden_states, self.weight, self.bias)


def _is_fused_head(forward: Callable) -> bool:
    """Whether a bound method takes `fused_lm_head`, as TRL's does. Its signature doesn't tell: it has the model's."""
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    return code is not None and "fused_lm_head" in code.co_varnames


def _checked(fused: Callable) -> Callable:
    """A fused head that checks its labels before, and finds `output_head()` where it looks for the output layer."""

    @functools.wraps(fused)
    def forward(model, *args, **kwargs):
        if not kwargs.get("fused_lm_head"):
            return fused(model, *args, **kwargs)
        for name in ("labels", "shift_labels"):
            model.check_fused_labels(kwargs.get(name))
        before, _fused.model = getattr(_fused, "model", None), model
        try:
            return fused(model, *args, **kwargs)
        finally:
            _fused.model = before

    return forward


class BackboneMixin:
    """`base_model` and the output layer of a bridged model."""

    @property
    def base_model(self) -> Backbone | PreTrainedModel:
        """The model without its output layer; the model itself if it has no language model."""
        return self if getattr(self, "language_model", None) is None else Backbone(self)

    def set_encoder(self, encoder: nn.Module, modality: str | None = None) -> None:
        """See `PreTrainedModel.set_encoder`; by default the encoder of an encoder-decoder language model.

        Raises:
            ValueError: The model has no such encoder.
        """
        if modality is None and self.config.is_encoder_decoder:
            self.language_model.set_encoder(encoder)
        elif modality in (None, "audio"):
            raise ValueError(
                f"This model has no {modality or 'text'} encoder; expected modality='image', for the vision_model."
            )
        else:
            super().set_encoder(encoder, modality)

    def get_output_embeddings(self) -> nn.Module | OutputHead | None:
        """Output layer of the language model; for a fused head (`fused_lm_head=True`), `output_head()`."""
        if getattr(_fused, "model", None) is self:
            return self.output_head()
        return self.language_model.get_output_embeddings()

    def output_head(self) -> nn.Module | OutputHead:
        """The layer that turns `base_model`'s `last_hidden_state` into logits.

        Returns:
            The language model's output layer, or an `OutputHead` with the rows of special tokens that are trained with
            the bridge. Both have `weight` and `bias`. Language models that cap or scale their logits do so afterwards.
        """
        layer, token_rows = self.language_model.get_output_embeddings(), self.bridge.token_rows
        return layer if token_rows is None else OutputHead(layer, token_rows)

    def with_gradient(self, result: torch.Tensor | None) -> torch.Tensor | None:
        """A loss or hidden states, with a gradient of zero for the bridge if they depend on nothing that is trained.

        That is so for a batch of text alone while only the bridge is trained; `backward` would raise an error.
        """
        if result is None or result.requires_grad or not torch.is_grad_enabled():
            return result
        nothing = [weight.flatten()[:0].sum() for weight in self.bridge.parameters() if weight.requires_grad]
        return result + sum(nothing).to(result) if nothing else result

    def __setattr__(self, name: str, value) -> None:
        # TRL puts its fused head in the place of `forward`, and PEFT calls that without hooks.
        if name == "forward" and _is_fused_head(value):
            value = types.MethodType(_checked(value.__func__), self)
        super().__setattr__(name, value)

    def check_fused_labels(self, labels: torch.Tensor | None) -> None:
        """Check the labels of a fused head, which nobody can change any more.

        Args:
            labels: `(batch, tokens)`, or `None`.

        Raises:
            ValueError: Labels are placeholders, which nobody predicts, or no columns of the logits.
        """
        if labels is None:
            return
        if self.config.visual_tokens_in_prompt:
            placeholders = labels == self.config.image_token_id
            torch_compilable_check(
                ~placeholders.any(),
                lambda: (
                    f"{int(placeholders.sum())} labels are <image> placeholders, which have no loss, but a fused head "
                    "would count them: train on answers alone (in TRL by prompt-completion data, or by "
                    "assistant_only_loss=True), or set labels[labels == model.config.image_token_id] = -100 in the "
                    "collator."
                ),
            )
        torch_compilable_check(
            (labels < self.num_logits).all(),
            lambda: (
                f"labels go up to {int(labels.max())}; expected at most {self.num_logits - 1}, the last column of the "
                "logits. Use the tokenizer that belongs to this model."
            ),
        )

    @accepts_cache
    @can_return_tuple
    def run_backbone(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """Run the model up to the hidden states that its output layer scores; this is what `base_model` calls.

        Args:
            input_ids: As for `forward`.
            pixel_values: As for `forward`.
            attention_mask: As for `forward`.
            position_ids: As for `forward`.
            cache: As for `forward`.
            inputs_embeds: As for `forward`.
            kwargs: The other arguments of `forward`; those about labels and logits are ignored.

        Returns:
            A `BackboneOutput`. `output_head()(last_hidden_state)` are the logits of `forward`, as long as the language
            model does not cap or scale them. An encoder-decoder computes logits too, and drops them.

        Raises:
            ValueError: As for `forward`; or the language model can't run without its output layer.
        """
        for name in _OF_LOGITS:
            kwargs.pop(name, None)
        images = {"pixel_values": pixel_values}
        images.update((name, kwargs.pop(name)) for name in self.image_arguments if name in kwargs)
        others = {name: kwargs.pop(name, None) for name in ("mm_encoder_outputs", "visual_states", "segment_ids",
                  "encoder_outputs", "decoder_input_ids", "decoder_attention_mask")}  # fmt: skip
        prompt = {"input_ids": input_ids, "images": images, "mm_encoder_outputs": others["mm_encoder_outputs"],
                  "inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "cache": cache}  # fmt: skip
        if self.config.is_encoder_decoder:
            names = ("encoder_outputs", "decoder_input_ids", "decoder_attention_mask")
            return self._encoder_decoder_backbone(prompt, {name: others[name] for name in names}, **kwargs)
        backbone = self.language_model.base_model
        if backbone is self.language_model:
            raise ValueError(
                f"{type(self.language_model).__name__} can't run without its output layer (it has no base_model), so "
                "there is no last hidden state for a fused head: call the model itself."
            )
        outputs, image_features, visual_states = self._run_decoder(
            backbone, inspect.signature(backbone.forward).parameters, **prompt, position_ids=position_ids,
            visual_states=others["visual_states"], segment_ids=others["segment_ids"], **kwargs,
        )  # fmt: skip
        return BackboneOutput(
            last_hidden_state=self.with_gradient(outputs.last_hidden_state),
            **cache_argument(cache_of(outputs)),
            hidden_states=field_of(outputs, "hidden_states", wanted=bool(kwargs.get("output_hidden_states"))),
            attentions=field_of(outputs, "attentions", wanted=bool(kwargs.get("output_attentions"))),
            image_hidden_states=image_features,
            visual_states=visual_states,
        )

    def _encoder_decoder_backbone(self, prompt: dict, others: dict, **kwargs) -> BackboneOutput:
        """Record what reaches the output layer: T5 scales it before, and has no module that ends there."""
        scored = []
        handle = self.language_model.get_output_embeddings().register_forward_pre_hook(
            lambda layer, args: scored.append(args[0])
        )
        try:
            outputs, image_features = self._run_encoder_decoder(**prompt, **others, **kwargs)
        finally:
            handle.remove()
        return BackboneOutput(
            last_hidden_state=scored[-1],
            **cache_argument(cache_of(outputs)),
            hidden_states=field_of(outputs, "decoder_hidden_states"),
            attentions=field_of(outputs, "decoder_attentions"),
            encoder_last_hidden_state=field_of(outputs, "encoder_last_hidden_state"),
            image_hidden_states=image_features,
        )


__all__ = ["Backbone", "BackboneMixin", "OutputHead"]
