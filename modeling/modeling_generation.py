"""`generate()` of every family: images are encoded once, before the samples are expanded to beams.

The encoded images go through generation as `visual_states`, one argument of `forward`. They are neither copied per beam
nor read from the outputs: every generated token sees the last image of its sample.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from ..compat import accepts_cache, cache_argument, logits_of_width, masks_for_generate
from ..compat_hooks import GenerationHooks
from .modeling_assistants import Assistant
from .modeling_logits import Guidance, NeverGenerated, pad_logits


# Arguments of `generate` after the first three, which may be given by position
MORE_ARGUMENTS = tuple(inspect.signature(GenerationMixin.generate).parameters)[4:]

# Settings that draft tokens with parts of this model, which it does not have
OWN_DRAFTS = ("assistant_early_exit", "use_mtp", "speculation_type")

# Kinds of caches (`cache_implementation`) for drafted tokens; transformers replaces "hybrid" by the default
TAKE_BACK = (None, "dynamic", "offloaded", "hybrid")


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
        begun: Whether the prompt was run.
    """

    prompt: VisualTokens | ModelOutput | None
    decoding: ModelOutput | None = None
    begun: bool = False

    def after_prompt(self) -> GenerationStates:
        """States for a call of `generate` that begins with the prompt in its cache."""
        return GenerationStates(self.decoding, self.decoding)

    def __deepcopy__(self, memo: dict) -> GenerationStates:
        return self  # transformers copies the arguments for an assistant, which has states of its own


class BridgeGenerationMixin(GenerationHooks):
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

        An `assistant_model` may have a bridge, which gets the same images, or be a plain language model, which reads
        the text alone. With `guidance_scale`, `negative_prompt_ids` may show the images of their prompts, or none;
        without them the negative prompt is the prompt's last token, as in transformers.

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
            ValueError: Images and placeholders do not match, an argument is unknown, or a way of generating can't be
                used with images.
        """
        kwargs.update(zip(MORE_ARGUMENTS, args))
        images = {name: kwargs.pop(name) for name in self.image_arguments if name in kwargs}
        encoded = (kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        if images.get("pixel_values") is not None or images.get("patch_features") is not None:
            if encoded is not None:
                raise ValueError("Give pixel_values (or patch_features) or mm_encoder_outputs, not both.")
            encoded = self.get_image_features(**images, return_dict=True)
        self._check_generation_settings(encoded, cache, generation_config, kwargs)
        processors = [each for each in logits_processor or () if not isinstance(each, NeverGenerated)]
        prompts = kwargs.get("input_ids") if inputs is None else inputs
        if kwargs.get("assistant_model") is not None:
            kwargs["assistant_model"] = self._assistant(prompts, images, encoded, cache, kwargs)
        scale = self._generation_setting("guidance_scale", generation_config, kwargs)
        if scale not in (None, 1) and not any(isinstance(each, Guidance) for each in processors):
            use_cache = self._generation_setting("use_cache", generation_config, kwargs) is not False
            arguments = self._negative_prompt(prompts, encoded, kwargs)
            processors.append(Guidance(self, scale, arguments, use_cache))
        if cache is not None:
            kwargs.update(cache_argument(cache))
        if self.config.is_encoder_decoder:
            if kwargs.get("encoder_outputs") is None:
                self._encode_for_generation(inputs, encoded, generation_config, kwargs)
            self._drop_mask_of_ones(kwargs)
        elif encoded is not None or kwargs.get("visual_states") is not None:
            kwargs["visual_states"] = self._states_for_generation(inputs, encoded, cache, kwargs)
        if self.config.visual_tokens_in_prompt:
            processors.append(NeverGenerated(self.config.image_token_id))
        beams = self._generation_setting("num_beams", generation_config, kwargs) or 1
        with logits_of_width(self.num_logits_to_generate if beams > 1 else None):
            return super().generate(inputs, generation_config, LogitsProcessorList(processors), **kwargs)

    def _check_generation_settings(
        self, encoded, cache: Cache | None, generation_config: GenerationConfig | None, kwargs: dict
    ) -> None:
        """Refuse settings that would lose the images, or that need something that a bridged model lacks."""

        def given(name: str):
            return self._generation_setting(name, generation_config, kwargs)

        for name in OWN_DRAFTS:
            if given(name):
                raise ValueError(
                    f"{name} can't be used with {type(self).__name__}: it drafts tokens with layers that know nothing "
                    "of the bridge. Use prompt_lookup_num_tokens or assistant_model."
                )
        if kwargs.get("assistant_tokenizer") is not None and given("do_sample"):
            raise ValueError(
                "assistant_tokenizer can't be used with do_sample=True: scores in two vocabularies don't compare. Use "
                "do_sample=False, or an assistant with the same tokenizer."
            )
        asked = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if given(name)]
        asked += ["guidance_scale"] if given("guidance_scale") not in (None, 1) else []
        if self.language_model is None and asked:
            raise ValueError(
                f"{type(self).__name__} has no language model, and its captions no prompt: it does not take "
                f"{', '.join(asked)}."
            )
        if {"assistant_model", "guidance_scale"} <= set(asked):
            raise ValueError("guidance_scale and assistant_model can't be combined: drafts are not guided.")
        kind = given("cache_implementation")
        if isinstance(cache, StaticCache):
            kind = "static"
        if asked and asked != ["guidance_scale"] and kind not in TAKE_BACK:
            raise ValueError(
                f"{asked[0]} can't be used with a {kind} cache, which can't take drafted tokens back. Leave "
                "cache_implementation out."
            )
        if encoded is None and self.config.is_encoder_decoder and given("prefill_chunk_size"):
            raise ValueError(
                "prefill_chunk_size can't be used with an encoder-decoder: it would cut the encoder's mask, though "
                "only the decoder's tokens come in chunks. Leave it out."
            )
        if encoded is None:
            return
        if given("prefill_chunk_size"):
            raise ValueError(
                "prefill_chunk_size can't be used with images: a chunk does not know which images it shows."
            )
        if given("cache_implementation") == "paged":
            raise ValueError(
                "cache_implementation='paged' (continuous batching) can't be used with images: it hands on token ids "
                "alone. Leave it out, or use 'static'."
            )
        if given("token_healing"):
            raise ValueError(
                "token_healing can't be used with images: it rewrites the prompt without placeholders. Leave it "
                "out, and end the prompt at the end of a word."
            )

    # ------------------------------------------------------------------ guidance, assistants

    def _negative_prompt(self, prompts: torch.LongTensor | None, encoded, kwargs: dict) -> dict | None:
        """The negative prompt as arguments of `forward`; `None` for the prompt's last token."""
        ids, mask = kwargs.get("negative_prompt_ids"), kwargs.get("negative_prompt_attention_mask")
        image_token_id = self.config.image_token_id
        if ids is None:
            if self.config.is_encoder_decoder or prompts is None:
                reason = "inputs_embeds have" if prompts is None else "an encoder-decoder's prompt has"
                raise ValueError(
                    f"guidance_scale needs negative_prompt_ids here: {reason} no last token to begin with."
                )
            if bool((prompts[:, -1] == image_token_id).any()):
                raise ValueError(
                    "guidance_scale needs negative_prompt_ids here: without them it begins with the prompt's last "
                    "token, which is an image token."
                )
            return None
        rows = kwargs.get("inputs_embeds") if prompts is None else prompts
        if rows is not None and len(ids) != len(rows):
            raise ValueError(f"negative_prompt_ids has {len(ids)} rows; expected {len(rows)}, one for each prompt.")
        ids = ids.to(self.device)
        mask = torch.ones_like(ids) if mask is None else mask.to(self.device)
        images = (ids == image_token_id).sum(dim=-1)  # (batch,)
        shown = bool(images.any())
        if shown:
            ours = None if prompts is None or encoded is None else (prompts == image_token_id).sum(dim=-1)
            if ours is None or not torch.equal(images, ours.to(images)):
                raise ValueError(
                    f"negative_prompt_ids has {images.tolist()} image tokens in its rows, the prompt with images "
                    f"{'none' if ours is None else ours.tolist()}. A negative prompt shows the images of its prompt, "
                    "or none."
                )
        if self.config.is_encoder_decoder:
            features = {"image": encoded} if shown else None
            outputs, _ = self._encode_prompt(ids, {}, features, None, mask)
            return {"encoder_outputs": outputs, "attention_mask": mask}
        arguments = {"input_ids": ids, "attention_mask": mask}
        if shown:
            states = self.visual_states_for_generation(ids, encoded.pooler_output, None)
            arguments["visual_states"] = states.prompt
        return arguments

    def arrange_processors(self, processors: list) -> LogitsProcessorList:
        """Put our guidance where transformers has its own, before all others."""
        ours = [each for each in processors if isinstance(each, Guidance)]
        for each in ours:
            each.begin()
        both = (Guidance, UnbatchedClassifierFreeGuidanceLogitsProcessor) if ours else ()
        return LogitsProcessorList([*ours, *(each for each in processors if not isinstance(each, both))])

    def adapt_candidates(self, generator):
        """Let prompt lookup check all tokens of a prompt, placeholders too."""
        if hasattr(generator, "vocab_size"):
            generator.vocab_size = self.num_logits_to_generate
        return generator

    def _assistant(self, prompts, images: dict, encoded, cache: Cache | None, kwargs: dict) -> Assistant:
        """Prepare `assistant_model` for this call."""
        model = kwargs["assistant_model"]
        if isinstance(model, Assistant):  # prepared by a `generate` that this one runs in
            return model
        both = (self, model)
        if len({bool(each.config.is_encoder_decoder) for each in both}) > 1:
            kinds = ["an encoder-decoder" if each.config.is_encoder_decoder else "decoder-only" for each in both]
            raise ValueError(f"assistant_model is {kinds[1]}, but the model {kinds[0]}: they must be of the same kind.")
        if prompts is None:
            raise ValueError("assistant_model needs input_ids: an assistant can't read another model's inputs_embeds.")
        translated = kwargs.get("assistant_tokenizer") is not None
        bridged = getattr(model, "visual_states_for_generation", None) is not None
        if translated and (bridged or self.config.is_encoder_decoder):
            raise ValueError(
                "assistant_tokenizer can't be used with an encoder-decoder, nor with an assistant that has a bridge: "
                "only plain decoders can have another tokenizer."
            )
        options = {"num_logits": self.num_logits_to_generate, "translated": translated}
        if not bridged:  # it reads the text alone
            assistant = Assistant(model, image_token_id=self.config.image_token_id, **options)
            if self.config.is_encoder_decoder:
                assistant.encode_text(prompts, kwargs.get("attention_mask"))
            return assistant
        if cache is not None or kwargs.get("visual_states") is not None or kwargs.get("encoder_outputs") is not None:
            raise ValueError(
                "An assistant with a bridge can't continue another model's cache, visual_states or encoder_outputs: "
                "give the whole prompt with its images, or use a plain language model as assistant_model."
            )
        arguments = model.arguments_as_assistant(self, prompts, images, encoded, kwargs.get("attention_mask"))
        return Assistant(model, prompt=arguments[0], later=arguments[1], **options)

    def arguments_as_assistant(
        self,
        assisted: PreTrainedModel,
        prompts: torch.LongTensor,
        images: dict,
        encoded: BaseModelOutputWithPooling | None,
        attention_mask: torch.Tensor | None,
    ) -> tuple[dict, dict]:
        """Arguments of `generate` with which this model drafts tokens for another: for the prompt, and for later.

        Args:
            assisted: The other model.
            prompts: `(batch, tokens)`, the prompts with the other model's placeholders.
            images: The other model's `image_arguments`.
            encoded: The other model's result of `get_image_features`, or `None` without images.
            attention_mask: `(batch, tokens)`, or `None`.

        Raises:
            ValueError: This model can't read the prompts or the images.
        """
        if self.config.image_token_id != assisted.config.image_token_id:
            raise ValueError(
                f"The assistant's image token is {self.config.image_token_id}, but the model's "
                f"{assisted.config.image_token_id}: they need the same tokenizer."
            )
        prompts = prompts.to(self.device)
        if self is not assisted and encoded is not None:
            known = {name: value for name, value in images.items() if name in self.image_arguments}
            if all(known.get(name) is None for name in ("pixel_values", "patch_features")):
                raise ValueError(
                    "An assistant with a bridge needs pixel_values: mm_encoder_outputs are visual tokens of the model "
                    "that it assists."
                )
            known = {
                name: value.to(self.device) if isinstance(value, torch.Tensor) else value
                for name, value in known.items()
            }
            encoded = self.get_image_features(**known, return_dict=True)
        try:
            if self.config.is_encoder_decoder:
                arguments = {"input_ids": prompts, "attention_mask": attention_mask}
                self._encode_for_generation(None, encoded, None, arguments)
                arguments = {name: arguments[name] for name in ("encoder_outputs", "attention_mask")}
                return arguments, arguments
            states = self.visual_states_for_generation(prompts, getattr(encoded, "pooler_output", None), None)
        except ValueError as error:
            raise ValueError(
                f"assistant_model can't read this prompt: {error} An assistant with a bridge needs as many "
                "placeholders for an image as the model that it assists; a plain language model reads the text alone."
            ) from error
        return {"visual_states": states}, {"visual_states": states.after_prompt()}

    # ------------------------------------------------------------------ images

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

    @staticmethod
    def _drop_mask_of_ones(kwargs: dict) -> None:
        """Leave out an encoder's mask that masks nothing: else every step makes a mask for the decoder from it."""
        mask = kwargs.get("attention_mask")
        if mask is None or kwargs.get("encoder_outputs") is None or kwargs.get("custom_generate") is not None:
            return  # a custom loop may read it
        if bool(mask.all()):
            del kwargs["attention_mask"]

    def _generation_setting(self, name: str, generation_config: GenerationConfig | None, kwargs: dict):
        """Read a setting from the arguments, the given configuration or the model's configuration, in this order."""
        places = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name, None))
        return next((value for value in places if value is not None), None)

    def _states_for_generation(
        self, inputs, encoded: BaseModelOutputWithPooling | None, cache: Cache | None, kwargs: dict
    ) -> GenerationStates:
        before = kwargs.get("visual_states")
        if isinstance(before, GenerationStates):  # prepared by a `generate` that this one runs in
            return replace(before, begun=False)
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is None and encoded is not None:
            raise ValueError(
                "Images need input_ids: placeholders can't be found in inputs_embeds. Give all that the processor "
                "returned, as in generate(**inputs)."
            )
        if input_ids is not None:
            # The images of a prefix that was run before are in its visual_states.
            known = 0 if cache is None else int(cache.get_seq_length())
            mask = kwargs.get("attention_mask")
            if mask is None or mask.shape[-1] == input_ids.shape[1]:  # otherwise only the new tokens were given
                input_ids = input_ids[:, known:]
        features = None if encoded is None else encoded.pooler_output
        return self.visual_states_for_generation(input_ids, features, before)

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
            # `is_first_iteration` is false in assistants, and in custom loops that don't know it.
            if is_first_iteration or not visual_states.begun or not kwargs.get("use_cache", True):
                arguments["visual_states"] = visual_states.prompt
                visual_states.begun = True
            else:
                visual_states.prompt = None  # frees what was made of all images but the last
                arguments["visual_states"] = visual_states.decoding
        if self.language_model is not None:  # processors look up every token of the prompt, placeholders too
            arguments["num_logits"] = self.config.image_token_id + 1
        return arguments

    def create_masks_for_generate(self, *args, **kwargs):
        """See `GenerationMixin`; the language model creates its masks (sliding windows, several kinds of layers)."""
        if "config" in kwargs:
            kwargs["config"] = self.language_model.config
        return masks_for_generate(self.language_model, *args, **kwargs)


__all__ = ["BridgeGenerationMixin", "GenerationStates", "VisualTokens", "pad_logits"]
