"""`generate()` of every family: images are encoded once, before the samples become beams.

What is made of the images travels through generation as one argument of `forward`, `visual_states`. It is neither copied
per beam nor carried back from the outputs: tokens that are written see the last image of their sample, whatever they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import Cache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from ..compat import accepts_cache, cache_argument, logits_of_width, masks_for_generate


def pad_logits(num_logits: int | None, logits: torch.Tensor) -> torch.Tensor:
    """Logits `(..., vocabulary)` with at least so many columns; tokens that can't be said have minus infinity."""
    missing = 0 if num_logits is None else num_logits - logits.shape[-1]
    return nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits


@dataclass
class VisualTokens:
    """Visual tokens of the samples' images, for placeholders in their prompts.

    Args:
        features: What `get_image_features` gave as `pooler_output`.
        counts: How many visual tokens each sample has.
    """

    features: torch.Tensor | list[torch.Tensor]
    counts: list[int]

    def for_rows(self, rows: int) -> torch.Tensor | list[torch.Tensor]:
        """Visual tokens for so many rows: the beams of one sample, one after the other, have the same images.

        Args:
            rows: A multiple of the samples.

        Raises:
            ValueError: It is none.
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
    """What `generate` hands to `forward` as `visual_states`.

    Args:
        prompt: While the prompt is read; in every step where there is no cache.
        decoding: Afterwards.
    """

    prompt: VisualTokens | ModelOutput | None
    decoding: ModelOutput | None = None


class BridgeGenerationMixin:
    """`generate()`, as a mixin before transformers' `GenerationMixin`."""

    image_arguments: ClassVar[tuple[str, ...]]

    @property
    def num_logits(self) -> int:
        """Columns of the logits."""
        raise NotImplementedError

    @property
    def num_logits_to_generate(self) -> int:
        """Columns that logits need so that processors (repetition penalty) can look up all tokens of a prompt."""
        return self.num_logits

    @accepts_cache
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        cache: Cache | None = None,
        **kwargs,
    ):
        """Generate text for a batch of prompts with images.

        Args:
            inputs: `(batch, tokens)`, the prompts; or as `input_ids`.
            generation_config: As for every `generate`, like everything else.
            args: As for every `generate`.
            cache: Of a prefix that was run before; `past_key_values` is another name for it.
            kwargs: As for every `generate`; the family's `image_arguments`; or `mm_encoder_outputs`, what `get_image_features` gave under
                the key `"image"`; and the prefix's `visual_states`, together with its cache.

        Returns:
            As every `generate`: ids, the prompt's first (an encoder-decoder's answer alone), or an output with more.

        Raises:
            ValueError: Images and placeholders do not match, or arguments that nobody reads.
        """
        images = {name: kwargs.pop(name) for name in self.image_arguments if name in kwargs}
        encoded = (kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        if images.get("pixel_values") is not None or images.get("patch_features") is not None:
            if encoded is not None:
                raise ValueError("Give pixel_values (or patch_features) or mm_encoder_outputs, not both.")
            encoded = self.get_image_features(**images, return_dict=True)
        if encoded is not None and self._generation_setting("prefill_chunk_size", generation_config, kwargs):
            raise ValueError("prefill_chunk_size can't be used with images: a chunk does not know which images it shows.")
        if cache is not None:
            kwargs.update(cache_argument(cache))
        if self.config.is_encoder_decoder:
            if kwargs.get("encoder_outputs") is None:
                self._encode_for_generation(inputs, encoded, generation_config, kwargs)
        elif encoded is not None or kwargs.get("visual_states") is not None:
            kwargs["visual_states"] = self._states_for_generation(inputs, encoded, cache, kwargs)
        with logits_of_width(self.num_logits_to_generate):
            return super().generate(inputs, generation_config, *args, **kwargs)

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
        """A setting of `generate`, from where it comes first: arguments, configuration, the model's configuration."""
        places = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name, None))
        return next((value for value in places if value is not None), None)

    def _states_for_generation(
        self, inputs, encoded: BaseModelOutputWithPooling | None, cache: Cache | None, kwargs: dict
    ) -> GenerationStates:
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is None and encoded is not None:
            raise ValueError("Images need input_ids: placeholders can't be found in inputs_embeds.")
        if input_ids is not None:
            # a prefix that was run before has its own images
            known = 0 if cache is None else int(cache.get_seq_length())
            mask = kwargs.get("attention_mask")
            if mask is None or mask.shape[-1] == input_ids.shape[1]:  # else the new tokens alone were given
                input_ids = input_ids[:, known:]
        features = None if encoded is None else encoded.pooler_output
        return self.visual_states_for_generation(input_ids, features, kwargs.get("visual_states"))

    def visual_states_for_generation(
        self, input_ids: torch.LongTensor | None, image_features, before: ModelOutput | None
    ) -> GenerationStates:
        """Sort visual tokens into their samples. Families whose visual tokens are not in the prompt override this.

        Args:
            input_ids: `(batch, tokens)`, what is not in the cache yet.
            image_features: The images of all samples, or `None`.
            before: `visual_states` of a prefix.

        Raises:
            ValueError: There are not as many placeholders as visual tokens.
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
        """The arguments of `forward` for one step, as transformers' `generate` asks for them."""
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
        """Masks are the language model's own affair (sliding windows, several kinds of layers)."""
        if "config" in kwargs:
            kwargs["config"] = self.language_model.config
        return masks_for_generate(self.language_model, *args, **kwargs)


__all__ = ["BridgeGenerationMixin", "GenerationStates", "VisualTokens", "pad_logits"]
