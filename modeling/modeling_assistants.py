"""Assistants that draft tokens for a bridged model (`assistant_model` of `generate`)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..compat import CACHE
from ..compat_hooks import AssistantHooks
from .modeling_bridge import num_embeddings
from .modeling_logits import pad_logits


class Assistant(AssistantHooks):
    """Stands in for an assistant: gives it arguments that it understands, and scores the width of the assisted model's.

    transformers hands an assistant the arguments of the model that it assists. An assistant with a bridge needs visual
    tokens of its own instead. Any other reads the text alone: tokens that it does not know are hidden from it.

    Args:
        model: The assistant.
        num_logits: Number of columns of the assisted model's scores.
        image_token_id: Id of the placeholder, for an assistant without a bridge.
        prompt: Arguments for the prompt.
        later: Arguments for the later rounds, when the prompt is in the assistant's cache.
        translated: Whether the prompt reaches the assistant in the ids of another tokenizer, which has no placeholders.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_logits: int,
        image_token_id: int | None = None,
        prompt: dict | None = None,
        later: dict | None = None,
        translated: bool = False,
    ):
        self.model = model
        self.num_logits = num_logits
        self.image_token_id = image_token_id
        self.prompt = prompt or {}
        self.later = later or {}
        self.translated = translated

    def __getattr__(self, name: str):
        if name == "model":  # not set yet
            raise AttributeError(name)
        return getattr(self.model, name)

    def hidden(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """True for tokens that the assistant does not know, in the shape of `input_ids`."""
        if self.image_token_id is None or self.translated:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        beyond = input_ids >= num_embeddings(self.model.get_input_embeddings())
        return beyond | (input_ids == self.image_token_id)

    def text_arguments(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> dict:
        """Arguments for a prompt whose unknown tokens are masked; the last token is always seen.

        Args:
            input_ids: `(batch, tokens)`.
            attention_mask: `(batch, tokens)`, or `None` if there is no padding.
        """
        hidden = self.hidden(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        mask = mask * ~hidden
        mask[:, -1] = 1
        return {"input_ids": input_ids.masked_fill(hidden, 0), "attention_mask": mask}

    def needs_images(self, input_ids: torch.LongTensor) -> bool:
        """Whether there are placeholders among tokens `(batch, tokens)`, in whose places visual tokens belong."""
        config = self.model.config
        return bool(
            getattr(config, "visual_tokens_in_prompt", False)
            and not config.is_encoder_decoder
            and (input_ids == config.image_token_id).any()
        )

    def encode_text(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> None:
        """Run the encoder of an encoder-decoder assistant without a bridge, once."""
        arguments = self.text_arguments(input_ids.to(self.model.device), attention_mask)
        outputs = self.model.get_encoder()(**arguments, return_dict=True)
        self.prompt = self.later = {"encoder_outputs": outputs, "attention_mask": arguments["attention_mask"]}

    def generate(self, **kwargs) -> ModelOutput:
        """Draft tokens.

        Args:
            kwargs: Arguments of `GenerationMixin.generate`, those of the assisted model among them.
        """
        kwargs.pop("visual_states", None)  # of the assisted model
        name = "decoder_input_ids" if self.model.config.is_encoder_decoder else "input_ids"
        input_ids = kwargs[name]
        if kwargs.get(CACHE) is not None and self.needs_images(input_ids[:, kwargs[CACHE].get_seq_length() :]):
            del kwargs[CACHE]  # a rejected draft took back the prompt's last token too: begin with the prompt again
        kwargs.update(self.prompt if kwargs.get(CACHE) is None else self.later)
        if name == "input_ids" and bool(self.hidden(input_ids).any()):
            kwargs.update(self.text_arguments(input_ids, kwargs.get("attention_mask")))
            kwargs.pop("position_ids", None)  # `generate` counts them from the mask
        outputs = self.model.generate(**kwargs)
        outputs.sequences = torch.cat([input_ids, outputs.sequences[:, input_ids.shape[1] :]], dim=1)
        if not self.translated:
            outputs.scores = tuple(
                pad_logits(self.num_logits, scores)[:, : self.num_logits] for scores in outputs.scores
            )
        return outputs


__all__ = ["Assistant"]
