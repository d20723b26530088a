"""Outputs of bridged models."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput


# Output fields of an encoder-decoder language model besides loss, logits and cache
ENCODER_DECODER_FIELDS = (
    "decoder_hidden_states", "decoder_attentions", "cross_attentions", "encoder_last_hidden_state",
    "encoder_hidden_states", "encoder_attentions",
)  # fmt: skip


@dataclass
class BridgedOutput(CausalLMOutputWithPast):
    """Output of a bridged model.

    The first five fields are those of transformers' `CausalLMOutputWithPast`: `loss`, `logits` `(batch, tokens,
    vocabulary)`, the language model's cache (`cache` since transformers 5.24, `past_key_values` before), and
    `hidden_states` and `attentions` of a decoder-only language model.

    Args:
        decoder_hidden_states: Hidden states of an encoder-decoder language model's decoder.
        decoder_attentions: Self-attention weights of an encoder-decoder language model's decoder.
        cross_attentions: Cross-attention weights of an encoder-decoder language model's decoder.
        encoder_last_hidden_state: Last hidden state of an encoder-decoder language model's encoder.
        encoder_hidden_states: Hidden states of an encoder-decoder language model's encoder.
        encoder_attentions: Attention weights of an encoder-decoder language model's encoder.
        image_hidden_states: The bridge's visual tokens, `(num_images, num_image_tokens, text_dim)`; a list of
            `(num_image_tokens, text_dim)` if images differ in their number of tokens.
        visual_states: Conditioning to pass on together with the cache (families that condition decoder layers).
        token_losses: Loss of each target, 0 where it is ignored, `(batch, tokens)`, if the logits were left out.
    """

    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    visual_states: ModelOutput | None = None
    token_losses: torch.Tensor | None = None

    @classmethod
    def of(cls, **values) -> BridgedOutput:
        """The output `BridgedOutput(**values)`, made faster: generation makes one per token.

        Args:
            values: Fields by name. transformers' checks of the class, which look at all fields for each one that is
                set, are left out.
        """
        if torch.compiler.is_compiling():  # the compiler knows dataclasses
            return cls(**values)
        output = cls.__new__(cls)
        for name in OUTPUT_FIELDS:  # items in the order of the fields; a field that is `None` is no item
            if (value := values.get(name)) is not None:
                OrderedDict.__setitem__(output, name, value)
                output.__dict__[name] = value
        return output


OUTPUT_FIELDS = tuple(field.name for field in fields(BridgedOutput))


@dataclass
class BackboneOutput(BaseModelOutputWithPast):
    """Output of a bridged model without its output layer, `model.base_model(...)`.

    The first fields are those of transformers' `BaseModelOutputWithPast`: `last_hidden_state` `(batch, tokens,
    text_dim)`, which is what the output layer scores; the language model's cache, `hidden_states` and `attentions`.

    Args:
        encoder_last_hidden_state: Last hidden state of an encoder-decoder language model's encoder.
        image_hidden_states: As in `BridgedOutput`.
        visual_states: As in `BridgedOutput`.
    """

    encoder_last_hidden_state: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None
    visual_states: ModelOutput | None = None


__all__ = ["ENCODER_DECODER_FIELDS", "BackboneOutput", "BridgedOutput"]
