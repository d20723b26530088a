"""`generate()` of every family: images are encoded once, before the samples are expanded to beams.

The encoded images go through generation as `visual_states`, one argument of `forward`. They are neither copied per beam
nor read from the outputs: every generated token sees the last image of its sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from ..compat import accepts_cache, cache_argument, logits_of_width, masks_for_generate


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

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return new scores, `(rows, columns)`."""
        columns = torch.arange(scores.shape[-1], device=scores.device)
        return scores.masked_fill(columns == self.token_id, -torch.inf)


@dataclass
class VisualTokens:
    """Visual tokens of the samples' images, for the placeholders in their prompts.

    Args:
        features: The `pooler_output` of `get_image_features`.
        counts: Number of visual tokens of each sample.
    """

    features: torch.Tensor | list[torch.Tensor]
    counts: list[int]

    def for_rows(self, rows: int) -> torch.Tensor | list[torch.Tensor]:
        """Repeat the visual tokens for beams; the beams of one sample are neighbouring rows with the same images.

        Args:
            rows: Number of rows, a multiple of the number of samples.

        Raises:
            ValueError: `rows` is not a multiple of the number of samples.
        """
        times, rest = divmod(rows, len(self.counts))
        if rest:
            raise ValueError(f"visual_states of {len(self.counts)} samples can't be used for {rows} rows.")
        if times == 1:
            return self.features
        samples = torch.cat([features.flatten(0, -2) for features in self.features]).split(self.counts)
        return [tokens for tokens in samples for _ in range(times)]  # each (visual tokens of a sample, text_dim)


@dataclass
class GenerationStates:
    """Values of `visual_states` that `generate` passes to `forward`.

    Args:
        prompt: Value for the prompt; without a cache, for every step.
        decoding: Value for the later steps.
    """

    prompt: VisualTokens | ModelOutput | None
    decoding: ModelOutput | None = None


class BridgeGenerationMixin:
    """`generate()`, as a mixin before transformers' `GenerationMixin`."""

    image_arguments: ClassVar[tuple[str, ...]]

    @property
    def num_logits(self) -> int:
        """Number of columns of the logits."""
        raise NotImplementedError

    @property
    def num_logits_to_generate(self) -> int:
        """Number of columns that logits processors (repetition penalty) need to look up all tokens of a prompt."""
        return self.num_logits

    @accepts_cache
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.LongTensor | ModelOutput:
        """Generate text for a batch of prompts with images.

        Placeholders are never generated if visual tokens take their places (all families but Perceiver-Flamingo, whose
        `<image>` is a token that the model reads; the official code generates it like any other).

        Args:
            inputs: `(batch, tokens)`, the prompts; `input_ids` is another name for them.
            generation_config: Generation settings, as for `GenerationMixin.generate`.
            logits_processor: Further processors of the logits, as for `GenerationMixin.generate`.
            args: Further arguments of `GenerationMixin.generate`.
            cache: Cache of a prefix that was run before; `past_key_values` is another name for it.
            kwargs: Arguments of `GenerationMixin.generate`, and the family's `image_arguments` or `mm_encoder_outputs`
                (the result of `get_image_features` under the key `"image"`). A `cache` needs the prefix's
                `visual_states` too.

        Returns:
            Ids, those of the prompt first (an encoder-decoder gives the answer alone), or an output with more fields,
            as for `GenerationMixin.generate`.

        Raises:
            ValueError: Images and placeholders do not match, or an argument is unknown.
        """
        images = {name: kwargs.pop(name) for name in self.image_arguments if name in kwargs}
        encoded = (kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        if images.get("pixel_values") is not None or images.get("patch_features") is not None:
            if encoded is not None:
                raise ValueError("Give pixel_values (or patch_features) or mm_encoder_outputs, not both.")
            encoded = self.get_image_features(**images, return_dict=True)
        if encoded is not None and self._generation_setting("prefill_chunk_size", generation_config, kwargs):
            raise ValueError(
                "prefill_chunk_size can't be used with images: a chunk does not know which images it shows."
            )
        if cache is not None:
            kwargs.update(cache_argument(cache))
        if self.config.is_encoder_decoder:
            if kwargs.get("encoder_outputs") is None:
                self._encode_for_generation(inputs, encoded, generation_config, kwargs)
        elif encoded is not None or kwargs.get("visual_states") is not None:
            kwargs["visual_states"] = self._states_for_generation(inputs, encoded, cache, kwargs)
        if self.config.visual_tokens_in_prompt:
            own = NeverGenerated(self.config.image_token_id)
            others = [each for each in logits_processor or () if not isinstance(each, NeverGenerated)]
            logits_processor = LogitsProcessorList([*others, own])
        with logits_of_width(self.num_logits_to_generate):
            return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def _encode_for_generation(self, inputs, encoded, generation_config, kwargs: dict) -> None:
        """Run an encoder-decoder's encoder over text and visual tokens, once."""
        prompt = {name: kwargs.get(name) for name in ("input_ids", "inputs_embeds")}
        if inputs is not None:
            prompt["input_ids"] = inputs
        if all(value is None for value in prompt.values()):
            return
        wanted = {
            name: self._generation_setting(name, generation_config, kwargs)
            for name in ("output_attentions", "output_hidden_states")
        }
        kwargs["encoder_outputs"], _ = self._encode_prompt(
            **prompt,
            images={},
            mm_encoder_outputs=None if encoded is None else {"image": encoded},
            mask=kwargs.get("attention_mask"),
            **wanted,
        )

    def _generation_setting(self, name: str, generation_config: GenerationConfig | None, kwargs: dict):
        """Read a setting from the arguments, the given configuration or the model's configuration, in this order."""
        places = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name, None))
        return next((value for value in places if value is not None), None)

    def _states_for_generation(
        self, inputs, encoded: BaseModelOutputWithPooling | None, cache: Cache | None, kwargs: dict
    ) -> GenerationStates:
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is None and encoded is not None:
            raise ValueError("Images need input_ids: placeholders can't be found in inputs_embeds.")
        if input_ids is not None:
            # The images of a prefix that was run before are in its visual_states.
            known = 0 if cache is None else int(cache.get_seq_length())
            mask = kwargs.get("attention_mask")
            if mask is None or mask.shape[-1] == input_ids.shape[1]:  # otherwise only the new tokens were given
                input_ids = input_ids[:, known:]
        features = None if encoded is None else encoded.pooler_output
        return self.visual_states_for_generation(input_ids, features, kwargs.get("visual_states"))

    def visual_states_for_generation(
        self,
        input_ids: torch.LongTensor | None,
        image_features: torch.Tensor | list[torch.Tensor] | None,
        before: ModelOutput | None,
    ) -> GenerationStates:
        """Assign visual tokens to their samples. Families whose visual tokens are not in the prompt override this.

        Args:
            input_ids: `(batch, tokens)`, the tokens that are not in the cache yet.
            image_features: Visual tokens of all samples' images, or `None`.
            before: `visual_states` of a prefix.

        Raises:
            ValueError: The numbers of placeholders and visual tokens differ.
        """
        if image_features is None:
            return GenerationStates(None)
        placeholders = (input_ids == self.config.image_token_id).sum(dim=-1)  # (batch,)
        self.check_placeholders(placeholders.sum(), image_features)
        return GenerationStates(VisualTokens(image_features, placeholders.tolist()))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        visual_states: GenerationStates | None = None,
        **kwargs,
    ) -> dict:
        """See `GenerationMixin.prepare_inputs_for_generation`; adds `visual_states` and `num_logits`."""
        arguments = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if visual_states is not None:
            if is_first_iteration or not kwargs.get("use_cache", True):
                arguments["visual_states"] = visual_states.prompt
            else:
                visual_states.prompt = None  # frees what was made of all images but the last
                arguments["visual_states"] = visual_states.decoding
        if self.num_logits_to_generate > self.num_logits:
            arguments["num_logits"] = self.num_logits_to_generate
        return arguments

    def create_masks_for_generate(self, *args, **kwargs):
        """See `GenerationMixin`; the language model creates its masks (sliding windows, several kinds of layers)."""
        if "config" in kwargs:
            kwargs["config"] = self.language_model.config
        return masks_for_generate(self.language_model, *args, **kwargs)


__all__ = ["BridgeGenerationMixin", "GenerationStates", "VisualTokens", "pad_logits"]
