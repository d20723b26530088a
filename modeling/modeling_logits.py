"""Logits beyond the language model's table, and the logits processors that `generate` adds."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedModel

from ..compat import cache_of


def pad_logits(num_logits: int | None, logits: torch.Tensor) -> torch.Tensor:
    """Pad logits `(..., vocabulary)` with minus infinity to at least `num_logits` columns, if it is not `None`."""
    missing = 0 if num_logits is None else num_logits - logits.shape[-1]
    return nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits


class NeverGenerated(LogitsProcessor):
    """Give a token the probability 0.

    Args:
        token_id: Id of the token; it may lie beyond the scores' columns.
    """

    def __init__(self, token_id: int):
        self.token_id = token_id
        self.index: torch.Tensor | None = None  # the token's column, on the scores' device

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return new scores, `(rows, columns)`; the given ones if there is no such column."""
        if self.token_id >= scores.shape[-1]:
            return scores
        if self.index is None or self.index.device != scores.device:
            self.index = torch.tensor([self.token_id], device=scores.device)
        return scores.index_fill(-1, self.index, -torch.inf)  # not in place: `generate` may return the given ones

    # `LogitsProcessorList` reads the signature for every token, and `inspect` takes longer for it than the call itself
    __call__.__signature__ = inspect.signature(__call__)


class Guidance(LogitsProcessor):
    """Classifier-free guidance: move the scores away from those that a negative prompt gives.

    The negative prompt is continued with each row's own tokens. Rows that change places (beams), and tokens that are
    taken back (prompt lookup), make it run again from its beginning.

    Args:
        model: The model; it computes the scores of the negative prompt too.
        scale: `guidance_scale`.
        arguments: The negative prompt, as arguments of `forward`, one row per sample: `input_ids`, `attention_mask` and
            `visual_states`; or for an encoder-decoder `encoder_outputs` and `attention_mask`. By default the prompt's
            last token, without images.
        use_cache: Whether to use a cache.

    Source: arXiv 2306.17806; `UnbatchedClassifierFreeGuidanceLogitsProcessor` of transformers.
    """

    def __init__(self, model: PreTrainedModel, scale: float, arguments: dict | None = None, use_cache: bool = True):
        self.model = model
        self.scale = scale
        self.arguments = arguments
        self.use_cache = use_cache
        self.begin()

    def begin(self) -> None:
        """Forget the rows of an earlier call of `generate`."""
        self.prompt_length: int | None = None
        self.tokens = self.cache = self.visual_states = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return new scores, `(rows, columns)`."""
        scores = scores.log_softmax(dim=-1)
        others = self.negative_logits(input_ids).to(scores).log_softmax(dim=-1)
        guided = self.scale * (scores - others) + others
        return torch.where(scores == -torch.inf, scores, guided)  # both are infinite beyond the table

    def negative_logits(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Logits of the next token after the negative prompt and the tokens generated so far, `(rows, columns)`.

        Args:
            input_ids: `(rows, tokens)`; the rows of one sample are neighbours.
        """
        input_ids = input_ids.to(self.model.device)
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        rows = {name: self._for_rows(value, input_ids) for name, value in self._prompt(input_ids).items()}
        if "encoder_outputs" in rows:
            name, tokens = "decoder_input_ids", input_ids
        else:
            name = "input_ids"
            written = input_ids[:, self.prompt_length :]
            tokens = torch.cat([rows[name], written], dim=1)
            rows["attention_mask"] = torch.cat([rows["attention_mask"], torch.ones_like(written)], dim=1)
        if self.cache is not None and torch.equal(self.tokens, tokens[:, :-1]):
            rows.update({name: tokens[:, -1:], "cache": self.cache})
            if "visual_states" in rows:
                rows["visual_states"] = self.visual_states
        else:
            rows[name] = tokens
        outputs = self.model(
            **rows, use_cache=self.use_cache, logits_to_keep=1, num_logits=self.model.num_logits_to_generate
        )
        self.tokens, self.visual_states = tokens, outputs.visual_states
        self.cache = cache_of(outputs) if self.use_cache else None
        return outputs.logits[:, -1]

    def _prompt(self, input_ids: torch.LongTensor) -> dict:
        if self.arguments is not None:
            return self.arguments
        last = input_ids[:, self.prompt_length - 1 : self.prompt_length]
        return {"input_ids": last, "attention_mask": torch.ones_like(last)}

    @staticmethod
    def _for_rows(value, input_ids: torch.LongTensor):
        """Repeat tensors for the rows of a sample; visual states are repeated where they are used."""
        if hasattr(value, "last_hidden_state"):
            states = Guidance._for_rows(value.last_hidden_state, input_ids)
            return type(value)(last_hidden_state=states)
        if isinstance(value, torch.Tensor):
            return value.repeat_interleave(len(input_ids) // len(value), dim=0)
        return value


__all__ = ["Guidance", "NeverGenerated", "pad_logits"]
