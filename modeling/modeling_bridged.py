"""The one shape of every family: `vision_model` -> `bridge` -> `language_model`.

Everything that the families share is here: freezing, placeholder filling, generation, loading and saving. A family adds
a configuration, a bridge module and, where its visual tokens do not enter through placeholders, its own conditioning.
"""

from __future__ import annotations

import copy
import inspect
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    GradientCheckpointingLayer,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)

from ..compat import (
    ModelHooks,
    accepts_cache,
    cache_argument,
    cache_of,
    can_return_tuple,
    field_of,
    mark_initialized,
    torch_compilable_check,
)
from ..compat import initialization as init
from ..configuration.configuration_bridged import BridgedConfig
from .modeling_checkpoint import BridgeCheckpointMixin, build_part
from .modeling_generation import BridgeGenerationMixin, VisualTokens, pad_logits
from .modeling_hot_swap import HotSwapMixin


# What an encoder-decoder language model's output has beside loss, logits and cache
ENCODER_DECODER_FIELDS = ("decoder_hidden_states", "decoder_attentions", "cross_attentions", "encoder_last_hidden_state",
                          "encoder_hidden_states", "encoder_attentions")  # fmt: skip
_running = threading.local()  # `model`: on whose behalf this thread runs a language model, which several may share


@dataclass
class BridgedOutput(CausalLMOutputWithPast):
    """Output of a bridged model.

    The first five fields are those of transformers' `CausalLMOutputWithPast`: `loss`, `logits` `(batch, tokens, vocabulary)`,
    the language model's cache (`cache` from transformers 5.24 on, before it `past_key_values`), and `hidden_states` and
    `attentions` of a decoder-only language model.

    Args:
        decoder_hidden_states: Of an encoder-decoder language model: `generate` looks for them here.
        decoder_attentions: Likewise.
        cross_attentions: Of an encoder-decoder language model.
        encoder_last_hidden_state: Of an encoder-decoder language model.
        encoder_hidden_states: Of an encoder-decoder language model.
        encoder_attentions: Of an encoder-decoder language model.
        image_hidden_states: What the bridge made of the images, `(num_images, num_image_tokens, text_dim)`; a list of
            `(num_image_tokens, text_dim)` where images differ in their number of tokens.
        visual_states: Conditioning to carry along with the cache (families that condition decoder layers).
    """

    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    visual_states: ModelOutput | None = None


class TokenRows(nn.Module):
    """Embedding rows of special tokens that are trained while the language model's own tables stay as they are.

    Args:
        token_ids: Ids that the rows stand for; they may lie beyond the language model's tables.
        input_size: Width of the input embeddings.
        output_size: Width of the output layer's input; `None` where it shares its table with the input embeddings.
    """

    def __init__(self, token_ids: list[int], input_size: int, output_size: int | None):
        super().__init__()
        self.token_ids = list(token_ids)
        self.input_rows = nn.Parameter(torch.zeros(len(self.token_ids), input_size))
        self.output_rows = None if output_size is None else nn.Parameter(torch.zeros(len(self.token_ids), output_size))

    def fill(self, inputs_embeds: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Put the rows where their tokens stand: `(batch, tokens, text_dim)` of both."""
        for row, token_id in zip(self.input_rows, self.token_ids):
            inputs_embeds = torch.where((input_ids == token_id)[..., None], row.to(inputs_embeds), inputs_embeds)
        return inputs_embeds

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores of the special tokens, `(..., len(token_ids))`, from the output layer's input."""
        rows = self.input_rows if self.output_rows is None else self.output_rows
        return hidden_states @ rows.to(hidden_states).T


def num_embeddings(embedding: nn.Module) -> int:
    """Rows of a table, where PEFT has put a wrapper around it too."""
    return next(module.num_embeddings for module in embedding.modules() if hasattr(module, "num_embeddings"))


class Bridge(nn.Module):
    """Base of every family's bridge: all that is trained, and nothing else.

    Args:
        config: The family's configuration.
        language_model: Used to read widths only; no reference is kept. `None` for a family that has none.
    """

    adapter_targets: ClassVar[str] = r".*"  # which linear layers adapters reach: a regular expression for their names

    def __init__(self, config: BridgedConfig, language_model: PreTrainedModel | None):
        super().__init__()
        self.token_rows = None
        if language_model is None:
            return
        embedding = language_model.get_input_embeddings()
        self.text_dim = embedding.embedding_dim
        if config.special_token_ids:
            head = language_model.get_output_embeddings()
            tied = bool(getattr(language_model.config, "tie_word_embeddings", False))
            # `in_features` of the head, read off its weight: some heads are not nn.Linear
            self.token_rows = TokenRows(
                config.special_token_ids, self.text_dim, None if tied or head is None else head.weight.shape[-1]
            )

    @property
    def dtype(self) -> torch.dtype:
        parameter = next(self.parameters(), None)  # a bridge may have none
        return torch.get_default_dtype() if parameter is None else parameter.dtype

    def init_parameters(self, config: BridgedConfig) -> None:
        """Fill this module's own fresh parameters (sub-modules are initialised by the model)."""


def patch_features_of(vision_outputs, layer: int | list[int] | None) -> torch.Tensor:
    """The encoder's features as a sequence, prefix tokens included: `(num_images, tokens, channels)`."""
    if layer is None:
        chosen = [vision_outputs.last_hidden_state]
    else:
        chosen = [vision_outputs.hidden_states[index] for index in (layer if isinstance(layer, list) else [layer])]
    # a CNN's (num_images, channels, rows, columns) becomes (num_images, rows * columns, channels)
    sequences = [states.flatten(2).transpose(1, 2) if states.ndim == 4 else states for states in chosen]
    lengths = {states.shape[1] for states in sequences}
    if len(lengths) > 1:
        raise ValueError(
            f"vision_feature_layer={layer} picks layers with {sorted(lengths)} tokens; only layers of one length can "
            "be concatenated."
        )
    return torch.cat(sequences, dim=-1)


def fill_vision_geometry(config: BridgedConfig, vision_model: PreTrainedModel | None = None) -> None:
    """Find out, on the meta device, what the vision encoder gives for an image, and write it into `config`.

    Args:
        config: Its `vision_layout`, `vision_hidden_size`, `patch_size`, `num_prefix_tokens` and `image_size` are filled
            in where they are `None`.
        vision_model: Where it exists already: it is copied to the meta device rather than built again.

    Raises:
        ValueError: The encoder is none that turns `pixel_values` into patch features.
    """
    names = ("vision_layout", "vision_hidden_size", "patch_size", "num_prefix_tokens", "image_size")
    if all(getattr(config, name) is not None for name in names):
        return
    vision_config = config.vision_config
    size = config.image_size or getattr(vision_config, "image_size", None)
    if size is None:  # timm's own description, else what nearly every CNN was trained at
        size = (getattr(vision_config, "pretrained_cfg", None) or {}).get("input_size", [3, 224, 224])[-1]
    if isinstance(size, (list, tuple)):
        if len(set(size)) > 1:
            raise ValueError(f"The vision encoder takes {size} pixels; only square images are supported so far.")
        size = size[0]
    channels = getattr(vision_config, "num_channels", 3)
    kind = type(vision_config).__name__
    try:
        with torch.device("meta"), torch.no_grad():
            probe = build_part("vision_model", copy.deepcopy(vision_config)).eval()
            outputs = probe(
                pixel_values=torch.zeros(1, channels, size, size),
                output_hidden_states=config.vision_feature_layer is not None,
                return_dict=True,
            )
            layer = config.vision_feature_layer
            states = (
                outputs.last_hidden_state
                if layer is None
                else outputs.hidden_states[layer[0] if isinstance(layer, list) else layer]
            )
    except (AttributeError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{kind} can't serve as vision encoder: it does not turn `pixel_values` of {size}x{size} pixels into patch "
            f"features ({error}). Encoders that do: CLIP, SigLIP, ViT, DINOv2, BLIP-2's ViT, ResNet, any timm model."
        ) from error
    if states.ndim == 4:
        found = {"vision_layout": "grid", "vision_hidden_size": states.shape[1], "num_prefix_tokens": 0}
        found["patch_size"] = round(size / states.shape[-1])
    elif states.ndim == 3:
        patch_size = getattr(vision_config, "patch_size", None)
        if patch_size is None:  # the largest square that fits leaves the prefix
            patch_size = size // int(states.shape[1] ** 0.5)
        patch_size = patch_size if isinstance(patch_size, int) else patch_size[0]
        prefix = states.shape[1] - (size // patch_size) ** 2
        if prefix < 0:
            raise ValueError(
                f"{kind} gives {states.shape[1]} tokens for {size}x{size} pixels, fewer than its "
                f"{(size // patch_size) ** 2} patches of {patch_size} pixels: it pools them, and can't serve as is."
            )
        found = {"vision_layout": "sequence", "vision_hidden_size": states.shape[2], "num_prefix_tokens": prefix}
        found["patch_size"] = patch_size
    else:
        raise ValueError(f"{kind} gives features of shape {tuple(states.shape)}; expected 3 or 4 dimensions.")
    found["image_size"] = size
    for name, value in found.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


class BridgedModel(
    HotSwapMixin, BridgeCheckpointMixin, BridgeGenerationMixin, ModelHooks, PreTrainedModel, GenerationMixin
):
    """A frozen vision encoder, a bridge and a frozen language model.

    Args:
        config: The family's configuration.
        vision_model: An encoder that exists already; it is used as it is, not copied and not initialised again.
        language_model: Likewise.
    """

    config_class = BridgedConfig
    bridge_class: ClassVar[type[Bridge]] = Bridge
    # Arguments of `forward` and `generate` that say what the images are: all go to `get_image_features`, once per call
    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "patch_features")
    compose_options: ClassVar[tuple[str, ...]] = ()  # what `compose` hands to `init_bridge`
    takes_frames: ClassVar[bool] = False  # pixel_values may be (num_images, num_frames, channels, height, width)
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {}  # of its own; PEFT asks the parts only where this is a dict
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
                mark_initialized(part)  # or post_init would draw fresh weights
        self.vision_model = build_part("vision_model", config.vision_config) if vision_model is None else vision_model
        if language_model is None and config.text_config is not None:
            language_model = build_part("language_model", config.text_config)
        self.language_model = language_model  # `None` in a family that has none
        self.bridge = self.bridge_class(config, language_model)
        self._can_compile_fullgraph = bool(getattr(language_model, "_can_compile_fullgraph", False))
        self._language_model_arguments = set(
            inspect.signature(language_model.forward).parameters if language_model is not None else ()
        )
        self._watch_output_layer(config)
        self._residents = {self._active_bridge: None}
        given = {"vision_model": vision_model, "language_model": language_model}
        self._remember_parts(*(part for part, model in given.items() if model is not None))
        self.post_init()
        self.generation_config = self._inherit_generation_config()
        self.freeze(config.freeze_vision_model, config.freeze_language_model)

    # ------------------------------------------------------------------ parts

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None):
        if modality is None and self.config.is_encoder_decoder:
            return self.language_model.get_encoder()
        return super().get_encoder(modality)

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
        """Generation defaults are the language model's; the `<image>` placeholder is never written."""
        inherited = getattr(self.language_model, "generation_config", None)
        return copy.deepcopy(inherited) if inherited is not None else GenerationConfig.from_model_config(self.config)

    def _watch_output_layer(self, config: BridgedConfig) -> None:
        """Have special tokens scored, where a bridge brings some."""
        head = self.language_model.get_output_embeddings() if config.special_token_ids else None
        if head is not None and head is not self.__dict__.get("_watched_head"):
            head.register_forward_hook(self._score_special_tokens)
            self.__dict__["_watched_head"] = head  # not as a part of this model, which it is already

    def _score_special_tokens(self, head: nn.Module, args: tuple, logits: torch.Tensor) -> torch.Tensor:
        """Hook of the output layer: it scores the special tokens too.

        A hook, not code behind the layer, because language models may cap or scale their logits afterwards.
        """
        token_rows = self.bridge.token_rows  # looked up now: PEFT may have put a trained copy here
        if token_rows is None or getattr(_running, "model", None) is not self:
            return logits
        scores = token_rows.logits(args[0]).to(logits.dtype)
        missing = max(token_rows.token_ids) + 1 - logits.shape[-1]
        if missing > 0:
            logits = nn.functional.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)
        index = torch.tensor(token_rows.token_ids, device=logits.device)
        return logits.index_copy(-1, index, scores)

    @classmethod
    def check_language_model(cls, language_model: PreTrainedModel) -> None:
        """Refuse language models that the family can't work with; `compose` asks.

        Raises:
            ValueError: It can't, and why.
        """

    def init_bridge(self, **options) -> None:
        """Begin with weights from elsewhere; `compose` asks for it where one of `compose_options` is given."""
        raise NotImplementedError(f"{type(self).__name__} has no options of this kind.")

    # ------------------------------------------------------------------ freezing

    def freeze(self, vision_model: bool = True, language_model: bool = True) -> BridgedModel:
        """Choose what is trained. The bridge always is.

        Args:
            vision_model: Freeze the vision encoder: no gradients, and always in eval mode.
            language_model: Freeze the language model likewise.

        Returns:
            The model itself.
        """
        self.config.freeze_vision_model, self.config.freeze_language_model = vision_model, language_model
        parts = ((vision_model, self.vision_model), (language_model, self.language_model), (False, self.bridge))
        for frozen, part in parts:
            for parameter in part.parameters() if part is not None else ():
                if parameter.is_floating_point():  # quantised weights are integers and never trained
                    parameter.requires_grad_(not frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> BridgedModel:
        """Frozen parts stay in eval mode: no dropout, no running statistics."""
        super().train(mode)
        for frozen, part in (
            (self.config.freeze_vision_model, self.vision_model),
            (self.config.freeze_language_model, self.language_model),
        ):
            if not frozen or part is None:
                continue
            part.eval()
            for layer in part.modules() if mode else ():
                if hasattr(layer, "base_layer"):  # a PEFT adapter around a frozen layer: the adapter is in training
                    layer.training = True
                    for name, child in layer.named_children():
                        if name != "base_layer":
                            child.train()
                # A layer recomputes its activations in train mode only. Its children stay in eval mode, and dropout
                # that the layer applies by itself (OPT) is switched off by value.
                if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                    layer.training = True
                    for name, value in list(vars(layer).items()):
                        if "drop" in name and isinstance(value, float):
                            setattr(layer, name, 0.0)
        return self

    def checkpointing_changed(self) -> None:
        self.train(self.training)

    # ------------------------------------------------------------------ images

    def _run_vision_model(self, pixel_values: torch.Tensor, **kwargs) -> ModelOutput:
        if self.takes_frames and pixel_values.ndim == 5:
            pixel_values = pixel_values.flatten(0, 1)
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (num_images, channels, height, width), "
                "the images of all rows of the batch one after the other"
                + (", or (num_images, num_frames, channels, height, width) for videos." if self.takes_frames else ".")
            )
        vision_dtype = next(self.vision_model.parameters()).dtype
        if self.config.vision_feature_layer is not None:
            kwargs["output_hidden_states"] = True
        frozen = self.config.freeze_vision_model and not pixel_values.requires_grad
        with torch.no_grad() if frozen else nullcontext():
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
            `(num_images, num_patches, vision_dim)`; with a dimension of frames where `pixel_values` has one.

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
            patch_features: `(num_images, num_patches, vision_dim)`, instead of pixels: what `get_patch_features` gave.
            output_hidden_states: Return the vision encoder's hidden states too; `None` asks its configuration.
            output_attentions: Likewise its attention weights.
            kwargs: The family's other `image_arguments`, for the bridge.

        Returns:
            An output whose `pooler_output` holds the visual tokens, `(num_images, num_image_tokens, text_dim)` (a list of
            `(num_image_tokens, text_dim)` where images differ in their number), and whose `last_hidden_state` holds the
            patch features.
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
        """Look tokens up; placeholders beyond the language model's table get some valid row.

        Args:
            input_ids: `(batch, tokens)`.

        Returns:
            `(batch, tokens, text_dim)`.
        """
        embedding = self.get_input_embeddings()
        inputs_embeds = embedding(input_ids.masked_fill(input_ids >= num_embeddings(embedding), 0))
        if self.bridge.token_rows is not None:
            inputs_embeds = self.bridge.token_rows.fill(inputs_embeds, input_ids)
        return inputs_embeds

    def fill_placeholders(
        self, inputs_embeds: torch.Tensor, input_ids: torch.LongTensor | None, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """Put visual tokens where the `<image>` placeholders stand.

        Args:
            inputs_embeds: `(batch, tokens, text_dim)`.
            input_ids: `(batch, tokens)`; where only embeddings were given, they must hold the visual tokens already.
            image_features: `(num_images, num_image_tokens, text_dim)`; a list of `(num_image_tokens, text_dim)` where
                images differ in their number of tokens; or `None` for text alone.

        Raises:
            ValueError: There are not as many placeholders as visual tokens.
        """
        if input_ids is None:
            if image_features is None:
                return inputs_embeds
            raise ValueError("Images need input_ids: placeholders can't be found in inputs_embeds.")
        placeholders = input_ids == self.config.image_token_id  # (batch, tokens)
        if image_features is None:
            # decoding steps have one token: no need to wait for the device there
            if input_ids.shape[1] > 1 and not torch.compiler.is_compiling() and bool(placeholders.any()):
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
        """Refuse prompts with another number of placeholders than there are visual tokens.

        Args:
            count: Placeholders, a number on the device.
            image_features: As for `fill_placeholders`.

        Raises:
            ValueError: They differ.
        """
        lengths = [len(features) for features in image_features]
        torch_compilable_check(
            count == sum(lengths),
            lambda: (
                f"{int(count)} image tokens in input_ids, but the bridge made {sum(lengths)} features for "
                f"{len(lengths)} images ({', '.join(map(str, sorted(set(lengths))))} each). Use the processor that belongs "
                "to this model, and don't truncate."
            ),
        )

    # ------------------------------------------------------------------ forward

    def _visual_conditioning(
        self, input_ids, image_features, visual_states, segment_ids=None
    ) -> tuple[dict, ModelOutput | None]:
        """Keyword arguments for the language model beside the embeddings, and the state to carry along: a family whose
        visual tokens do not stand in the prompt overrides this."""
        return {}, None

    def _run_language_model(self, **kwargs) -> ModelOutput:
        before, _running.model = getattr(_running, "model", None), self
        try:
            return self.language_model(**kwargs)
        finally:
            _running.model = before

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
            input_ids: `(batch, tokens)`, with the `<image>` placeholders that the processor made.
            pixel_values: `(num_images, channels, height, width)`: the images of all rows, one after the other. Families
                that take videos: `(num_images, num_frames, channels, height, width)`.
            attention_mask: `(batch, tokens)`, 1 for tokens and 0 for padding; or a 4-d mask, passed on as it is.
            position_ids: `(batch, tokens)`; counted from the mask where they are not given.
            cache: The language model's cache; `past_key_values` is another name for it.
            inputs_embeds: `(batch, tokens, text_dim)` instead of `input_ids`.
            labels: `(batch, tokens)` as `input_ids`, -100 where no loss is wanted. For an encoder-decoder language
                model the target's ids.
            logits_to_keep: How many last positions (0: all), or which, to compute logits for.
            patch_features: `(num_images, num_patches, vision_dim)` instead of `pixel_values`, from
                `get_patch_features`: the encoder does not run again.
            mm_encoder_outputs: What `get_image_features` gave, under the key `"image"`, instead of `pixel_values`.
            visual_states: State from an earlier output, beside its cache.
            decoder_input_ids: For an encoder-decoder language model.
            decoder_attention_mask: For an encoder-decoder language model.
            encoder_outputs: For an encoder-decoder language model: its encoder need not run again.
            segment_ids: `(batch, tokens)`: which sample of a packed row a token belongs to, rising from left to right.
                Conditioned text sees the images of its own sample only. The mask and the positions that packing needs
                too are `attention_mask` and `position_ids`.
            num_logits: Columns that the logits have at least: tokens beyond the language model's table get minus infinity.
                `generate` asks for it, as its processors look up the prompt's placeholders.
            kwargs: The family's other `image_arguments`; the rest is for the language model. `shift_labels` (beside `labels`): what each position predicts, instead of the
                next position's label.

        Returns:
            A `BridgedOutput`.

        Raises:
            ValueError: Placeholders and visual tokens differ in number, or inputs contradict each other.
        """
        images = {"pixel_values": pixel_values, "patch_features": patch_features}
        images.update((name, kwargs.pop(name)) for name in self.image_arguments if name in kwargs)
        if self.config.is_encoder_decoder:
            return self._forward_encoder_decoder(
                input_ids, images, mm_encoder_outputs, inputs_embeds, attention_mask,
                encoder_outputs, decoder_input_ids, decoder_attention_mask, labels, cache, num_logits, **kwargs,
            )  # fmt: skip
        rows = len(inputs_embeds if input_ids is None else input_ids)
        image_features = self._image_features(images, mm_encoder_outputs, visual_states, rows)
        hidden = self._prompt_embeddings(input_ids, inputs_embeds, image_features)
        conditioning, visual_states = self._visual_conditioning(input_ids, image_features, visual_states, segment_ids)
        arguments = self._language_model_arguments
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -hidden.shape[1] :]
        if "position_ids" in arguments:
            kwargs["position_ids"] = position_ids
        if "logits_to_keep" in arguments:
            kwargs["logits_to_keep"] = logits_to_keep
        num_items_in_batch, shift_labels = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        outputs = self._run_language_model(
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            **cache_argument(cache, arguments),
            **conditioning,
            **{**kwargs, "return_dict": True},
        )
        logits = outputs.logits
        if "logits_to_keep" not in arguments and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = logits[:, keep]
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError(
                    f"{labels.shape[1]} labels per row, but logits for {logits.shape[1]} positions: don't combine labels "
                    "with logits_to_keep, unless shift_labels says what each kept position predicts."
                )
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        return BridgedOutput(
            loss=loss,
            logits=pad_logits(num_logits, logits),
            **cache_argument(cache_of(outputs)),
            hidden_states=field_of(outputs, "hidden_states", wanted=bool(kwargs.get("output_hidden_states"))),
            attentions=field_of(outputs, "attentions", wanted=bool(kwargs.get("output_attentions"))),
            image_hidden_states=image_features,
            visual_states=visual_states,
        )

    def _encode_prompt(self, input_ids, images: dict, mm_encoder_outputs, inputs_embeds, mask, **kwargs):
        """Run the encoder of an encoder-decoder language model over text and visual tokens."""
        image_features = self._image_features(images, mm_encoder_outputs)
        hidden = self._prompt_embeddings(input_ids, inputs_embeds, image_features)
        encoder = self.language_model.get_encoder()
        outputs = encoder(inputs_embeds=hidden, attention_mask=mask, **{**kwargs, "return_dict": True})
        # T5 takes any other class apart by position, and hidden states for attention weights
        return BaseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=field_of(outputs, "hidden_states", wanted=bool(kwargs.get("output_hidden_states"))),
            attentions=field_of(outputs, "attentions", wanted=bool(kwargs.get("output_attentions"))),
        ), image_features

    def _forward_encoder_decoder(
        self, input_ids, images, mm_encoder_outputs, inputs_embeds, attention_mask,
        encoder_outputs, decoder_input_ids, decoder_attention_mask, labels, cache, num_logits=None, **kwargs,
    ) -> BridgedOutput:  # fmt: skip
        image_features = None
        wanted = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
        if encoder_outputs is None:
            encoder_outputs, image_features = self._encode_prompt(
                input_ids, images, mm_encoder_outputs, inputs_embeds, attention_mask, **wanted
            )
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None and decoder_input_ids is None and "decoder_inputs_embeds" not in kwargs:
            decoder_input_ids = self.language_model.prepare_decoder_input_ids_from_labels(labels)
        outputs = self._run_language_model(
            encoder_outputs=encoder_outputs,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            **cache_argument(cache, self._language_model_arguments),
            **{**kwargs, "return_dict": True},
        )
        loss = None
        if labels is not None:
            # Teacher-forced targets stand where they are predicted: no shift.
            sums = "mean" if num_items_in_batch is None else "sum"
            loss = nn.functional.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten(), reduction=sums)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return BridgedOutput(
            loss=loss,
            logits=pad_logits(num_logits, outputs.logits),
            **cache_argument(cache_of(outputs)),
            **{name: field_of(outputs, name) for name in ENCODER_DECODER_FIELDS},
            image_hidden_states=image_features,
        )

    # ------------------------------------------------------------------ generation

    @property
    def num_logits(self) -> int:
        return max([num_embeddings(self.get_input_embeddings()), *(i + 1 for i in self.config.special_token_ids or [])])

    @property
    def num_logits_to_generate(self) -> int:
        return max(self.num_logits, self.config.image_token_id + 1)


__all__ = ["Bridge", "BridgedModel", "BridgedOutput", "TokenRows", "fill_vision_geometry", "patch_features_of"]
