"""The architecture of every family: `vision_model` -> `bridge` -> `language_model`.

`BridgedModel` holds what the families share: freezing, placeholder filling, generation, loading and saving. A family
adds a configuration, a bridge module and, if its visual tokens do not replace placeholders, its own conditioning.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ModelOutput,
)

from ..compat import (
    accepts_cache,
    cache_argument,
    cache_of,
    can_return_tuple,
    field_of,
    mark_initialized,
    torch_compilable_check,
)
from ..compat import initialization as init
from ..compat_hooks import ModelHooks, hidden_states_to_keep
from ..configuration.configuration_bridged import BridgedConfig
from .modeling_backbone import BackboneMixin
from .modeling_bridge import Bridge, TokenRows, additive_mask, fill_vision_geometry, num_embeddings, patch_features_of
from .modeling_checkpoint import BridgeCheckpointMixin
from .modeling_freezing import FreezingMixin
from .modeling_generation import BridgeGenerationMixin, VisualTokens, pad_logits
from .modeling_hot_swap import HotSwapMixin
from .modeling_losses import LossMixin, may_leave_out_logits
from .modeling_output_layer import OutputLayerMixin
from .modeling_outputs import ENCODER_DECODER_FIELDS, BridgedOutput
from .modeling_parts import build_part
from .modeling_quantization import QuantizationMixin


class BridgedModel(
    HotSwapMixin,
    BridgeCheckpointMixin,
    BridgeGenerationMixin,
    FreezingMixin,
    LossMixin,
    BackboneMixin,
    OutputLayerMixin,
    QuantizationMixin,
    ModelHooks,
    PreTrainedModel,
    GenerationMixin,
):
    """A frozen vision encoder, a bridge and a frozen language model.

    Args:
        config: The family's configuration.
        vision_model: A loaded encoder, which is used without a copy; by default it is built from the configuration.
        language_model: A loaded language model, which is used without a copy; by default it is built from the
            configuration.
    """

    config_class = BridgedConfig
    bridge_class: ClassVar[type[Bridge]] = Bridge
    # Arguments of `forward` and `generate` that describe the images; they are passed on to `get_image_features`
    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "patch_features")
    # Tokens that the language model reads or writes: their rows are trained with the bridge
    special_tokens: ClassVar[tuple[str, ...]] = ()
    compose_options: ClassVar[tuple[str, ...]] = ()  # options that `assemble` passes on to `init_bridge`
    takes_frames: ClassVar[bool] = False  # pixel_values may be (num_images, num_frames, channels, height, width)
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {}  # PEFT reads the parts' tied weights only if this is a dict
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["cache", "past_key_values", "visual_states"]

    def __init__(
        self,
        config: BridgedConfig,
        vision_model: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        fill_vision_geometry(config)
        for part in (vision_model, language_model):
            if part is not None:
                mark_initialized(part)  # otherwise post_init would initialise the weights again
        self.vision_model = build_part("vision_model", config.vision_config) if vision_model is None else vision_model
        if language_model is None and config.text_config is not None:
            language_model = build_part("language_model", config.text_config)
        self.language_model = language_model  # `None` in a family without a language model
        self.bridge = self.bridge_class(config, language_model)
        self._can_compile_fullgraph = bool(getattr(language_model, "_can_compile_fullgraph", False))
        self._language_model_arguments = set(
            inspect.signature(language_model.forward).parameters if language_model is not None else ()
        )
        self._follow_output_layer()
        self._residents = {self._active_bridge: None}
        given = {"vision_model": vision_model, "language_model": language_model}
        self._record_parts(*(part for part, model in given.items() if model is not None))
        self.post_init()
        self._exclude_bridge()
        self._mark_quantization()
        self.generation_config = self._inherit_generation_config()
        self._freeze_as_configured()

    # ------------------------------------------------------------------ parts

    def get_input_embeddings(self) -> nn.Module:
        """Input embeddings of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the language model's input embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """See `PreTrainedModel.get_encoder`; by default the encoder of an encoder-decoder language model."""
        if modality is None and self.config.is_encoder_decoder:
            return self.language_model.get_encoder()
        return self if modality in (None, "audio") else super().get_encoder(modality)

    @property
    def prepare_decoder_input_ids_from_labels(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Method of an encoder-decoder language model, for collators; other models don't have it."""
        if not self.config.is_encoder_decoder:
            raise AttributeError("only encoder-decoders have prepare_decoder_input_ids_from_labels")
        return self.language_model.prepare_decoder_input_ids_from_labels

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenRows):
            for rows in (module.input_rows, module.output_rows):
                if rows is not None:
                    init.normal_(rows, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Bridge) or hasattr(module, "init_parameters"):
            module.init_parameters(self.config)

    def _inherit_generation_config(self) -> GenerationConfig:
        """Copy the language model's generation defaults."""
        inherited = getattr(self.language_model, "generation_config", None)
        return copy.deepcopy(inherited) if inherited is not None else GenerationConfig.from_model_config(self.config)

    @classmethod
    def check_language_model(cls, language_model: PreTrainedModel) -> None:
        """Check that the family can work with a language model; `compose` calls this method.

        Raises:
            ValueError: The family can't work with it; the message says why.
        """

    @classmethod
    def prepare_init(cls, config: BridgedConfig, vision_model, tokenizer, revision=None, **options) -> dict:
        """Complete a new model's `config` for `compose_options`, and return the arguments of `init_bridge`."""
        return options

    def init_bridge(self, **options) -> None:
        """Initialise the bridge with other weights; `compose` calls it if one of `compose_options` is given."""
        raise NotImplementedError(f"{type(self).__name__} has no options of this kind.")

    # ------------------------------------------------------------------ images

    def _run_vision_model(self, pixel_values: torch.Tensor, **kwargs) -> ModelOutput:
        if self.takes_frames and pixel_values.ndim == 5:
            pixel_values = pixel_values.flatten(0, 1)
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (num_images, channels, height, width), "
                "the images of all rows of the batch, concatenated"
                + (", or (num_images, num_frames, channels, height, width) for videos." if self.takes_frames else ".")
            )
        vision_dtype = next(weight.dtype for weight in self.vision_model.parameters() if weight.is_floating_point())
        if (layer := self.config.vision_feature_layer) is not None and not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = hidden_states_to_keep(self.vision_model, layer)
        trained = torch.is_grad_enabled() and (
            pixel_values.requires_grad or any(weight.requires_grad for weight in self.vision_model.parameters())
        )
        with nullcontext() if trained else torch.no_grad():  # the weights decide: a frozen part may have adapters
            return self.vision_model(pixel_values=pixel_values.to(vision_dtype), return_dict=True, **kwargs)

    def _select_patch_features(self, vision_outputs: ModelOutput) -> torch.Tensor:
        patch_features = patch_features_of(vision_outputs, self.config.vision_feature_layer)
        if self.config.vision_feature_select_strategy == "patch":
            patch_features = patch_features[:, self.config.num_prefix_tokens :]
        return patch_features

    def get_patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the vision encoder.

        Args:
            pixel_values: `(num_images, channels, height, width)`, normalised as the encoder expects.

        Returns:
            `(num_images, num_patches, vision_dim)`, or `(num_images, num_frames, num_patches, vision_dim)` for videos.

        Raises:
            ValueError: `pixel_values` has another shape.
        """
        return self._patch_features_of(self._run_vision_model(pixel_values), pixel_values)

    def _patch_features_of(self, vision_outputs: ModelOutput, pixel_values: torch.Tensor) -> torch.Tensor:
        patch_features = self._select_patch_features(vision_outputs)
        return patch_features if pixel_values.ndim == 4 else patch_features.unflatten(0, pixel_values.shape[:2])

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Turn images into visual tokens.

        Args:
            pixel_values: `(num_images, channels, height, width)`.
            patch_features: `(num_images, num_patches, vision_dim)`, the result of `get_patch_features`, instead of
                `pixel_values`.
            output_hidden_states: Return the vision encoder's hidden states too; `None` follows its configuration.
            output_attentions: Return the vision encoder's attention weights too.
            kwargs: The family's other `image_arguments`, for the bridge.

        Returns:
            An output whose `pooler_output` holds the visual tokens, `(num_images, num_image_tokens, text_dim)` (a list
            of `(num_image_tokens, text_dim)` if images differ in their number of tokens), and whose `last_hidden_state`
            holds the patch features.
        """
        hidden_states = attentions = None
        if patch_features is None:
            wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            outputs = self._run_vision_model(
                pixel_values, **{name: value for name, value in wanted.items() if value is not None}
            )
            patch_features = self._patch_features_of(outputs, pixel_values)
            if output_hidden_states is None:
                output_hidden_states = self.config.vision_config.output_hidden_states
            hidden_states = field_of(outputs, "hidden_states") if output_hidden_states else None
            attentions = field_of(outputs, "attentions", wanted=bool(output_attentions))
        bridge = self.bridge
        more = {name: kwargs[name] for name in self.image_arguments if kwargs.get(name) is not None}
        return BaseModelOutputWithPooling(
            last_hidden_state=patch_features,
            pooler_output=bridge(patch_features.to(bridge.dtype), **more),
            hidden_states=hidden_states,
            attentions=attentions,
        )

    def embed_tokens(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Look up the tokens' embeddings; placeholders beyond the language model's table get an arbitrary valid row.

        Args:
            input_ids: `(batch, tokens)`.

        Returns:
            `(batch, tokens, text_dim)`.
        """
        embedding = self.get_input_embeddings()
        inputs_embeds = embedding(input_ids.clamp(max=num_embeddings(embedding) - 1))
        if self.bridge.token_rows is not None:
            inputs_embeds = self.bridge.token_rows.fill(inputs_embeds, input_ids)
        return inputs_embeds

    def fill_placeholders(
        self, inputs_embeds: torch.Tensor, input_ids: torch.LongTensor | None, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """Replace the embeddings of the `<image>` placeholders by visual tokens.

        Args:
            inputs_embeds: `(batch, tokens, text_dim)`.
            input_ids: `(batch, tokens)`; `None` if `inputs_embeds` hold the visual tokens already.
            image_features: `(num_images, num_image_tokens, text_dim)`; a list of `(num_image_tokens, text_dim)` if
                images differ in their number of tokens; or `None` for text alone.

        Raises:
            ValueError: The numbers of placeholders and visual tokens differ.
        """
        if input_ids is None:
            if image_features is None:
                return inputs_embeds
            raise ValueError(
                "Images need input_ids: placeholders can't be found in inputs_embeds. Give all that the processor "
                "returned, as in generate(**inputs)."
            )
        # Decoding steps have one token: checking them would only wait for the device.
        if image_features is None and (input_ids.shape[1] == 1 or torch.compiler.is_compiling()):
            return inputs_embeds
        placeholders = input_ids == self.config.image_token_id  # (batch, tokens)
        if image_features is None:
            if bool(placeholders.any()):
                raise ValueError(
                    f"There are {int(placeholders.sum())} image tokens in input_ids, but no images were given."
                )
            return inputs_embeds
        self.check_placeholders(placeholders.sum(), image_features)
        features = image_features if isinstance(image_features, torch.Tensor) else torch.cat(list(image_features))
        return inputs_embeds.masked_scatter(
            placeholders[..., None], features.to(inputs_embeds).reshape(-1, inputs_embeds.shape[-1])
        )

    @staticmethod
    def check_placeholders(count: torch.Tensor, image_features: torch.Tensor | list[torch.Tensor]) -> None:
        """Check that there are as many placeholders as visual tokens.

        Args:
            count: Number of placeholders, a scalar on the device.
            image_features: As for `fill_placeholders`.

        Raises:
            ValueError: The numbers differ.
        """
        lengths = [len(features) for features in image_features]
        torch_compilable_check(
            count == sum(lengths),
            lambda: (
                f"Image features and image tokens do not match: {int(count)} image tokens in input_ids, but the "
                f"bridge made {sum(lengths)} features for "
                f"{len(lengths)} images ({', '.join(map(str, sorted(set(lengths))))} each). Use the processor that "
                "belongs to this model, and don't truncate."
            ),
        )

    # ------------------------------------------------------------------ forward

    def _visual_conditioning(
        self, input_ids, image_features, visual_states, segment_ids=None
    ) -> tuple[dict, ModelOutput | None]:
        """Arguments for the language model, and the visual state; for families that condition decoder layers."""
        return {}, None

    def _prompt_embeddings(self, input_ids, inputs_embeds, image_features):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.visual_tokens_in_prompt:
            inputs_embeds = self.fill_placeholders(inputs_embeds, input_ids, image_features)
        return inputs_embeds

    def _image_features(self, images: dict, mm_encoder_outputs, visual_states=None, rows: int | None = None):
        if isinstance(visual_states, VisualTokens):
            return visual_states.for_rows(rows)
        encoded = (mm_encoder_outputs or {}).get("image")
        if images.get("pixel_values") is None and images.get("patch_features") is None:
            return None if encoded is None else encoded.pooler_output
        if encoded is not None:
            raise ValueError("Give pixel_values (or patch_features) or mm_encoder_outputs, not both.")
        return self.get_image_features(**images, return_dict=True).pooler_output

    @accepts_cache
    @can_return_tuple
    @may_leave_out_logits
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        patch_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        visual_states: ModelOutput | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | None = None,
        segment_ids: torch.LongTensor | None = None,
        num_logits: int | None = None,
        **kwargs,
    ) -> BridgedOutput:
        """Run the model.

        Args:
            input_ids: `(batch, tokens)`, with the `<image>` placeholders that the processor wrote.
            pixel_values: `(num_images, channels, height, width)`: the images of all rows, concatenated. For families
                that take videos also `(num_images, num_frames, channels, height, width)`.
            attention_mask: `(batch, tokens)`, 1 for tokens and 0 for padding; or a 4-d mask: boolean, or one to add.
            position_ids: `(batch, tokens)`; by default they are counted from the mask.
            cache: The language model's cache; `past_key_values` is another name for it.
            inputs_embeds: `(batch, tokens, text_dim)` instead of `input_ids`.
            labels: `(batch, tokens)`, aligned with `input_ids`; -100 is ignored, and so are placeholders that visual
                tokens take the places of. For an encoder-decoder language model, the ids of the target.
            logits_to_keep: Number of last positions to compute logits for (0 for all), or the indices of positions.
            patch_features: `(num_images, num_patches, vision_dim)`, the result of `get_patch_features`, instead of
                `pixel_values`: the encoder does not run again.
            mm_encoder_outputs: The result of `get_image_features` under the key `"image"`, instead of `pixel_values`.
            visual_states: `visual_states` of the earlier output that `cache` comes from.
            decoder_input_ids: `(batch, target_tokens)`, for an encoder-decoder language model.
            decoder_attention_mask: `(batch, target_tokens)`, for an encoder-decoder language model.
            encoder_outputs: Outputs of an encoder-decoder language model's encoder, which then does not run again.
            segment_ids: `(batch, tokens)`: index of the sample of a packed row that a token belongs to, increasing from
                left to right. Conditioned text sees the images of its own sample only. Packing also needs matching
                `attention_mask` and `position_ids`.
            num_logits: Minimum number of columns of the logits: columns beyond the language model's table are minus
                infinity. `generate` sets it, because its logits processors look up the prompt's placeholders.
            kwargs: The family's other `image_arguments`; the rest is passed on to the language model. `shift_labels`
                (together with `labels`) holds the target of each position itself, instead of the next position's label.
                `return_logits=False` (with `labels`) computes the loss from the logits of a few tokens at a time and
                returns no logits; `label_smoothing` smooths the labels then.

        Returns:
            A `BridgedOutput`.

        Raises:
            ValueError: The numbers of placeholders and visual tokens differ, or inputs contradict each other.
        """
        labels = self._without_placeholders(labels, kwargs.get("num_items_in_batch"))
        images = {"pixel_values": pixel_values, "patch_features": patch_features}
        images.update((name, kwargs.pop(name)) for name in self.image_arguments if name in kwargs)
        if self.config.is_encoder_decoder:
            return self._forward_encoder_decoder(
                input_ids, images, mm_encoder_outputs, inputs_embeds, attention_mask, encoder_outputs,
                decoder_input_ids, decoder_attention_mask, labels, cache, logits_to_keep, num_logits, **kwargs,
            )  # fmt: skip
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        shift_labels = self._without_placeholders(kwargs.pop("shift_labels", None), num_items_in_batch)
        outputs, image_features, visual_states = self._run_decoder(
            self._run_language_model, self._language_model_arguments, input_ids, images, mm_encoder_outputs,
            inputs_embeds, attention_mask, position_ids, cache, visual_states, segment_ids,
            **self._logits_to_keep_argument(logits_to_keep), **kwargs,
        )  # fmt: skip
        logits = self._select_kept_logits(outputs.logits, logits_to_keep)
        loss = None
        if labels is not None:
            self._check_labels(labels if shift_labels is None else shift_labels, logits.shape[-1], logits.shape[1])
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        return BridgedOutput.of(
            loss=self.with_gradient(loss),
            logits=pad_logits(num_logits, logits),
            **cache_argument(cache_of(outputs)),
            hidden_states=field_of(outputs, "hidden_states", wanted=bool(kwargs.get("output_hidden_states"))),
            attentions=field_of(outputs, "attentions", wanted=bool(kwargs.get("output_attentions"))),
            image_hidden_states=image_features,
            visual_states=visual_states,
        )

    def _run_decoder(
        self, run, arguments, input_ids, images, mm_encoder_outputs,
        inputs_embeds, attention_mask, position_ids, cache, visual_states, segment_ids, **kwargs,
    ) -> tuple[ModelOutput, torch.Tensor | None, ModelOutput | None]:  # fmt: skip
        """Call `run`, a decoder-only language model or its backbone with these `arguments`, behind visual tokens."""
        rows = len(inputs_embeds if input_ids is None else input_ids)
        image_features = self._image_features(images, mm_encoder_outputs, visual_states, rows)
        hidden = self._prompt_embeddings(input_ids, inputs_embeds, image_features)
        conditioning, visual_states = self._visual_conditioning(input_ids, image_features, visual_states, segment_ids)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -hidden.shape[1] :]
        if "position_ids" in arguments:
            kwargs["position_ids"] = position_ids
        outputs = run(
            inputs_embeds=hidden,
            attention_mask=additive_mask(attention_mask, hidden),
            **cache_argument(cache, arguments),
            **conditioning,
            **{**kwargs, "return_dict": True},
        )
        return outputs, image_features, visual_states

    def _logits_to_keep_argument(self, logits_to_keep: int | torch.Tensor) -> dict:
        """`logits_to_keep` as an argument of the language model, if it accepts it."""
        return {"logits_to_keep": logits_to_keep} if "logits_to_keep" in self._language_model_arguments else {}

    def _select_kept_logits(self, logits: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Select the positions of `logits_to_keep`, if the language model returned the logits of all positions."""
        every = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if every or "logits_to_keep" in self._language_model_arguments:
            return logits
        return logits[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]

    def _encode_prompt(self, input_ids, images: dict, mm_encoder_outputs, inputs_embeds, mask, **kwargs):
        """Run the encoder of an encoder-decoder language model over text and visual tokens."""
        image_features = self._image_features(images, mm_encoder_outputs)
        hidden = self._prompt_embeddings(input_ids, inputs_embeds, image_features)
        encoder = self.language_model.get_encoder()
        outputs = encoder(inputs_embeds=hidden, attention_mask=mask, **{**kwargs, "return_dict": True})
        # T5 unpacks any other class by position, and would take hidden states for attention weights.
        return BaseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=field_of(outputs, "hidden_states", wanted=bool(kwargs.get("output_hidden_states"))),
            attentions=field_of(outputs, "attentions", wanted=bool(kwargs.get("output_attentions"))),
        ), image_features

    def _forward_encoder_decoder(
        self, input_ids, images, mm_encoder_outputs, inputs_embeds, attention_mask,
        encoder_outputs, decoder_input_ids, decoder_attention_mask, labels, cache, logits_to_keep, num_logits, **kwargs,
    ) -> BridgedOutput:  # fmt: skip
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None and decoder_input_ids is None and "decoder_inputs_embeds" not in kwargs:
            decoder_input_ids = self.language_model.prepare_decoder_input_ids_from_labels(labels)
        outputs, image_features = self._run_encoder_decoder(
            input_ids, images, mm_encoder_outputs, inputs_embeds, attention_mask, encoder_outputs,
            decoder_input_ids, decoder_attention_mask, cache, **self._logits_to_keep_argument(logits_to_keep), **kwargs,
        )  # fmt: skip
        logits = self._select_kept_logits(outputs.logits, logits_to_keep)
        loss = None
        if labels is not None:
            self._check_labels(labels, logits.shape[-1], logits.shape[1])
            # The decoder's inputs are shifted already, so the labels are not.
            sums = "mean" if num_items_in_batch is None else "sum"
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction=sums)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return BridgedOutput.of(
            loss=self.with_gradient(loss),
            logits=pad_logits(num_logits, logits),
            **cache_argument(cache_of(outputs)),
            **{name: field_of(outputs, name) for name in ENCODER_DECODER_FIELDS},
            image_hidden_states=image_features,
        )

    def _run_encoder_decoder(
        self, input_ids, images, mm_encoder_outputs, inputs_embeds, attention_mask,
        encoder_outputs, decoder_input_ids, decoder_attention_mask, cache, **kwargs,
    ) -> tuple[ModelOutput, torch.Tensor | None]:  # fmt: skip
        if decoder_input_ids is None and kwargs.get("decoder_inputs_embeds") is None:
            raise ValueError(
                f"{self.config.text_config.model_type} is an encoder-decoder and needs labels or decoder_input_ids. "
                "Trainer hides labels that it smooths: let the collator add decoder_input_ids = "
                "model.prepare_decoder_input_ids_from_labels(labels), or use vlbridge's trainer. TRL's are for "
                "decoder-only models."
            )
        image_features = None
        wanted = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
        if encoder_outputs is None:
            encoder_outputs, image_features = self._encode_prompt(
                input_ids, images, mm_encoder_outputs, inputs_embeds, attention_mask, **wanted
            )
        outputs = self._run_language_model(
            encoder_outputs=encoder_outputs,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            **cache_argument(cache, self._language_model_arguments),
            **{**kwargs, "return_dict": True},
        )
        return outputs, image_features

    # ------------------------------------------------------------------ generation

    @property
    def num_logits(self) -> int:
        """Number of columns of the logits, special tokens included."""
        return max([num_embeddings(self.get_input_embeddings()), *(i + 1 for i in self.config.special_token_ids or [])])

    @property
    def num_logits_to_generate(self) -> int:
        """Number of columns that include every token of a prompt, placeholders too."""
        return max(self.num_logits, self.config.image_token_id + 1)


__all__ = ["Bridge", "BridgedModel", "BridgedOutput", "TokenRows", "fill_vision_geometry", "patch_features_of"]
