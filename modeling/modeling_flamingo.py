"""Perceiver-Flamingo: a Perceiver Resampler, and gated cross-attention before frozen decoder layers.

Source: Flamingo (arXiv 2204.14198, sections 2.2-2.4); `open_flamingo/src/{helpers,flamingo,flamingo_lm}.py` of
OpenFlamingo 2.0.1 for the details that the paper leaves open.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import GradientCheckpointingLayer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from ..compat import build_from_config, torch_compilable_check
from ..compat import initialization as init
from ..compat_hooks import HOOKS_ARE_RECOMPUTED
from ..configuration.configuration_flamingo import PerceiverFlamingoConfig
from .modeling_bridge import Bridge, with_image_arguments
from .modeling_bridged import BridgedModel
from .modeling_generation import GenerationStates
from .modeling_hooks import attach
from .modeling_mpt import as_conditionable


logger = logging.get_logger(__name__)

CONDITIONING = "cross_attention_conditioning"  # keyword argument that the language model passes on to its layers


def split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reshape `(batch, tokens, heads * head_dim)` to `(batch, heads, tokens, head_dim)`."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Layer norm, linear, GELU, linear; no biases."""

    def __init__(self, dim: int, multiplier: int, linear_out: type[nn.Linear] = nn.Linear):
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.linear_in = nn.Linear(dim, dim * multiplier, bias=False)
        self.linear_out = linear_out(dim * multiplier, dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(..., dim)` to `(..., dim)`."""
        return self.linear_out(nn.functional.gelu(self.linear_in(self.layer_norm(hidden_states))))


class PerceiverAttention(nn.Module):
    """Latents attend to patches and to themselves. Source: Flamingo, figure 5."""

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * num_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(
        self, patch_features: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Update `(num_images, num_latents, dim)`; `mask` is `(num_images, 1, 1, num_patches + num_latents)`."""
        latents = self.norm_latents(latents)
        key, value = self.key_value(torch.cat((self.norm_media(patch_features), latents), dim=1)).chunk(2, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(
            *(split_heads(states, self.num_heads) for states in (self.query(latents), key, value)), attn_mask=mask
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class PerceiverLayer(GradientCheckpointingLayer):
    """A block of the Perceiver Resampler: attention and feed-forward, both with a residual connection."""

    def __init__(self, dim: int, config: PerceiverFlamingoConfig):
        super().__init__()
        self.attention = PerceiverAttention(dim, config.resampler_num_heads, config.resampler_head_dim)
        self.feed_forward = FeedForward(dim, config.feed_forward_multiplier)

    def forward(
        self, latents: torch.Tensor, patch_features: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Update the latents; for the shapes see `PerceiverAttention`."""
        latents = latents + self.attention(patch_features, latents, mask)
        return latents + self.feed_forward(latents)


class PerceiverResampler(nn.Module):
    """Compress any number of patches, of one frame or several, to `num_latents` visual tokens per image.

    Source: Flamingo, section 2.2; embeddings of an image's position in its document are from OpenFlamingo.
    """

    def __init__(self, dim: int, config: PerceiverFlamingoConfig):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(config.num_latents, dim))
        frames, media = config.max_num_frames, config.max_num_media
        self.frame_embeddings = None if frames is None else nn.Parameter(torch.zeros(frames, dim))
        # (max_num_media, 1, dim): the official layout
        self.media_time_embeddings = None if media is None else nn.Parameter(torch.zeros(media, 1, dim))
        self.layers = nn.ModuleList(PerceiverLayer(dim, config) for _ in range(config.resampler_depth))
        self.layer_norm = nn.LayerNorm(dim)

    def init_parameters(self, config: PerceiverFlamingoConfig) -> None:
        """Initialise the latents and the embeddings of positions."""
        init.normal_(self.latents, std=config.latents_init_std)
        for parameter in (self.frame_embeddings, self.media_time_embeddings):
            if parameter is not None:
                init.normal_(parameter)  # unit variance, as in the official code

    def forward(
        self,
        patch_features: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        media_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map patches to visual tokens.

        Args:
            patch_features: `(num_images, num_patches, dim)`, or `(num_images, num_frames, num_patches, dim)` for
                videos.
            patch_mask: True (or 1) for patches, false for padding, in the shape of `patch_features` without its last
                dimension, or `(num_images, num_frames)` for whole frames.
            media_index: Position of each image in its document, from 0: `(num_images,)`. Only read if the model has
                embeddings for it.

        Returns:
            `(num_images, num_latents, dim)`.

        Raises:
            ValueError: There are more frames, or images in a document, than the model has embeddings for,
                `media_index` is missing, or the mask has another shape.
        """
        if patch_features.ndim == 3:
            patch_features = patch_features[:, None]
            patch_mask = patch_mask if patch_mask is None else patch_mask[:, None]
        num_images, num_frames, num_patches, _ = patch_features.shape
        if self.frame_embeddings is not None:
            if num_frames > len(self.frame_embeddings):
                raise ValueError(f"{num_frames} frames, but there are embeddings for {len(self.frame_embeddings)}.")
            patch_features = patch_features + self.frame_embeddings[:num_frames, None]
        patch_features = patch_features.flatten(1, 2)  # (num_images, num_frames * num_patches, dim)
        if self.media_time_embeddings is not None:
            if media_index is None:
                raise ValueError("This model has embeddings for images' places in their documents: give media_index.")
            if not torch.compiler.is_compiling() and int(media_index.max()) >= len(self.media_time_embeddings):
                raise ValueError(
                    f"A document has {int(media_index.max()) + 1} images, but there are embeddings for "
                    f"{len(self.media_time_embeddings)}."
                )
            patch_features = patch_features + self.media_time_embeddings[media_index]
        mask = None
        if patch_mask is not None:
            if patch_mask.ndim == 2:  # whole frames
                patch_mask = patch_mask[..., None].expand(-1, -1, num_patches)
            if patch_mask.shape != (num_images, num_frames, num_patches):
                raise ValueError(
                    f"patch_mask has shape {tuple(patch_mask.shape)}; expected {(num_images, num_frames, num_patches)}."
                )
            # Latents always attend to themselves.
            mask = nn.functional.pad(patch_mask.flatten(1).bool(), (0, len(self.latents)), value=True)[:, None, None]
        latents = self.latents.expand(num_images, -1, -1)
        for layer in self.layers:
            latents = layer(latents, patch_features, mask)
        return self.layer_norm(latents)


class TanhGate(nn.Module):
    """Multiply by the tanh of a learned number; with 0 the gate is closed.

    It is a module, not a bare parameter, so that PEFT can train it (`modules_to_save`).
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def init_parameters(self, config: PerceiverFlamingoConfig) -> None:
        """Set the gate to the configuration's `gate_init`."""
        init.constant_(self.weight, config.gate_init)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scale `(..., dim)` by the gate."""
        return self.weight.tanh() * hidden_states


class GatedLinear(nn.Linear):
    """A projection before a tanh gate; one of the two is initialised with zero."""

    def init_parameters(self, config: PerceiverFlamingoConfig) -> None:
        """Set the projection to zero if the gate is open from the start."""
        if config.gate_init:
            init.zeros_(self.weight)


class GatedCrossAttentionLayer(GradientCheckpointingLayer):
    """Text attends to visual tokens through two tanh gates; an untrained block changes nothing.

    Source: Flamingo, figure 4.
    """

    def __init__(self, dim: int, vision_dim: int, config: PerceiverFlamingoConfig):
        super().__init__()
        self.num_heads = config.cross_attention_num_heads
        inner = self.num_heads * config.cross_attention_head_dim
        self.layer_norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, inner, bias=False)
        self.key_value = nn.Linear(vision_dim, 2 * inner, bias=False)
        self.out = GatedLinear(inner, dim, bias=False)
        self.attn_gate = TanhGate()
        self.feed_forward = FeedForward(dim, config.feed_forward_multiplier, GatedLinear)
        self.ff_gate = TanhGate()

    def project(self, visual_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `(batch, visual_tokens, vision_dim)`, each `(batch, heads, visual_tokens, head_dim)`."""
        key, value = self.key_value(visual_tokens).chunk(2, dim=-1)
        return split_heads(key, self.num_heads), split_heads(value, self.num_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        mask: torch.Tensor | None,
        sees_image: torch.Tensor | None,
    ) -> torch.Tensor:
        """Condition hidden states on images.

        Args:
            hidden_states: `(rows, tokens, dim)`; `rows` is a multiple of `batch`, because the beams of one sample share
                its keys and values.
            key: `(batch, heads, visual_tokens, head_dim)`, or `None` without images.
            value: `(batch, heads, visual_tokens, head_dim)`, or `None` without images.
            mask: `(rows, tokens, visual_tokens)`, true where attention is allowed.
            sees_image: `(rows, tokens)`, false for text before any image.
        """
        dtype = hidden_states.dtype
        states = hidden_states.to(self.attn_gate.weight.dtype)
        if key is not None:
            rows, tokens = states.shape[:2]
            batch = key.shape[0]
            query = split_heads(self.query(self.layer_norm(states)), self.num_heads)  # (rows, heads, tokens, head_dim)
            # The beams of one sample are neighbouring rows, which attend as one long row.
            query = query.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
            attended = nn.functional.scaled_dot_product_attention(
                query, key, value, mask.unflatten(0, (batch, -1)).flatten(1, 2)[:, None]
            )
            attended = attended.unflatten(2, (rows // batch, tokens)).transpose(1, 2).flatten(0, 1)
            attended = self.out(attended.transpose(1, 2).flatten(2))  # (rows, tokens, dim)
            states = states + self.attn_gate(attended) * sees_image[..., None].to(states.dtype)
        states = states + self.ff_gate(self.feed_forward(states))
        return states.to(dtype)


@dataclass
class VisualStates(ModelOutput):
    """Keys and values of the images, passed on together with the language model's cache.

    Args:
        key_states: Keys of every cross-attention layer, each `(batch, heads, max_images * num_latents, head_dim)`.
        value_states: Values of every cross-attention layer, in the same shape.
        num_images: Number of images of each sample, `(batch,)`.
        text_time: Number of images before the next token of each row, `(rows,)`.
        num_forgotten: Number of first images of each sample that were dropped because no later token can see them,
            `(batch,)`.
    """

    # Not `keys` and `values`, which are methods of ModelOutput
    key_states: tuple[torch.Tensor, ...] | None = None
    value_states: tuple[torch.Tensor, ...] | None = None
    num_images: torch.Tensor | None = None
    text_time: torch.Tensor | None = None
    num_forgotten: torch.Tensor | None = None

    def latest(self, num_latents: int) -> VisualStates:
        """Keep only the last image of each sample.

        Args:
            num_latents: Visual tokens per image.
        """
        last = (self.num_images - 1).clamp(min=0)  # (batch,)
        slot = (last - self.num_forgotten)[:, None, None, None, None]

        def of_last(states: torch.Tensor) -> torch.Tensor:
            images = states.unflatten(2, (-1, num_latents))  # (batch, heads, max_images, num_latents, head_dim)
            index = slot.to(states.device).expand(-1, images.shape[1], -1, num_latents, images.shape[-1])
            return images.gather(2, index)[:, :, 0]

        return VisualStates(
            key_states=tuple(map(of_last, self.key_states)),
            value_states=tuple(map(of_last, self.value_states)),
            num_images=self.num_images,
            text_time=self.text_time,
            num_forgotten=last,
        )

    def repeat_to(self, batch: int) -> VisualStates:
        """Repeat every sample, so that its copies are neighbouring rows.

        Args:
            batch: Number of rows wanted, a multiple of the present one.

        Raises:
            ValueError: `batch` is not a multiple of the present number of rows.
        """
        times, rest = divmod(batch, len(self.num_images))
        if rest:
            raise ValueError(f"visual_states of {len(self.num_images)} rows can't be continued by {batch} rows.")
        if times == 1 and len(self.text_time) == batch:
            return self
        return VisualStates(
            key_states=tuple(key.repeat_interleave(times, dim=0) for key in self.key_states),
            value_states=tuple(value.repeat_interleave(times, dim=0) for value in self.value_states),
            num_images=self.num_images.repeat_interleave(times),
            text_time=self.text_time.repeat_interleave(batch // len(self.text_time)),
            num_forgotten=self.num_forgotten.repeat_interleave(times),
        )


@dataclass
class Conditioning:
    """Conditioning that one forward pass hands to its hooks, so that the model keeps no state between calls.

    It holds the cross-attention layers too: another bridge may be active when a backward pass recomputes this one.
    """

    model: PreTrainedModel
    blocks: nn.ModuleList
    every_n_layers: int
    key_states: tuple[torch.Tensor, ...] | None
    value_states: tuple[torch.Tensor, ...] | None
    mask: torch.Tensor | None
    sees_image: torch.Tensor | None


class PerceiverBridge(Bridge):
    """Perceiver Resampler and the gated cross-attention layers."""

    def __init__(self, config: PerceiverFlamingoConfig, language_model: PreTrainedModel):
        super().__init__(config, language_model)
        text_config = config.text_config.get_text_config()
        self.resampler = PerceiverResampler(config.vision_feature_size, config)
        self.cross_attention_layers = nn.ModuleList(
            GatedCrossAttentionLayer(text_config.hidden_size, config.vision_feature_size, config)
            for _ in range(text_config.num_hidden_layers // config.cross_attention_every_n_layers)
        )
        if not self.cross_attention_layers:
            raise ValueError(
                f"cross_attention_every_n_layers={config.cross_attention_every_n_layers} leaves no cross-attention: "
                f"the language model has {text_config.num_hidden_layers} layers."
            )

    def forward(self, patch_features: torch.Tensor, **kwargs) -> torch.Tensor:
        """Map patch features to visual tokens, see `PerceiverResampler.forward`."""
        return self.resampler(patch_features, **kwargs)


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """Find the decoder's layers.

    Args:
        language_model: A decoder-only language model.

    Raises:
        ValueError: The model has no list of layers of the configured length.
    """
    wanted = language_model.config.get_text_config().num_hidden_layers
    for module in language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ValueError(
        f"{type(language_model).__name__} has no list of {wanted} decoder layers to put cross-attention in."
    )


def _refuse_encoder_decoder(config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ValueError(
            f"The perceiver bridge conditions the layers of a decoder-only language model; {config.model_type} is an "
            "encoder-decoder. Use bridge='qformer' or 'mlp'."
        )


class _ConditioningReached(Exception):
    """Raised by a probe when the conditioning arrives at a decoder layer."""


class PerceiverFlamingoForConditionalGeneration(BridgedModel):
    """Perceiver-Flamingo: visual tokens condition the decoder's layers. For the arguments see `BridgedModel`."""

    config_class = PerceiverFlamingoConfig
    config: PerceiverFlamingoConfig
    bridge_class = PerceiverBridge
    image_arguments = (*BridgedModel.image_arguments, "patch_mask", "media_index")
    forward = with_image_arguments(BridgedModel.forward, image_arguments)
    special_tokens = ("<image>", "<|endofchunk|>")
    takes_frames = True
    _no_split_modules = ["PerceiverLayer", "GatedCrossAttentionLayer"]

    def __init__(self, config: PerceiverFlamingoConfig, vision_model=None, language_model=None):
        _refuse_encoder_decoder(config.text_config)
        if language_model is not None:
            language_model = as_conditionable(language_model)
        super().__init__(config, vision_model, language_model)
        for index, layer in enumerate(decoder_layers(self.language_model)):
            attach(layer.register_forward_pre_hook, self, "_condition_layer", index, with_kwargs=True)

    @classmethod
    def check_language_model(cls, language_model: PreTrainedModel) -> None:
        """Check that a language model passes keyword arguments on to its decoder layers.

        Raises:
            ValueError: The conditioning would not reach the decoder layers.
        """
        name = type(language_model).__name__
        _refuse_encoder_decoder(language_model.config)

        def reached(module, args, kwargs):
            if CONDITIONING in kwargs:
                raise _ConditioningReached

        with torch.device("meta"):
            probe = build_from_config(type(language_model), copy.deepcopy(language_model.config)).eval()
            decoder_layers(probe)[0].register_forward_pre_hook(reached, with_kwargs=True)
            ids = torch.zeros(1, 1, dtype=torch.long)
            # A prepared mask and positions leave nothing to compute, but not every model accepts them.
            prepared = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "position_ids": ids}
            known = inspect.signature(probe.forward).parameters
            for extra in ({key: tensor for key, tensor in prepared.items() if key in known}, {}):
                try:
                    probe(input_ids=ids, use_cache=False, **extra, **{CONDITIONING: object()})
                except _ConditioningReached:
                    return
                except (TypeError, ValueError, RuntimeError) as error:
                    logger.debug(f"{name} with {sorted(extra)}: {error}")
        raise ValueError(
            f"{name} can't be conditioned by a perceiver bridge: it does not hand keyword arguments on to its decoder "
            "layers. Use bridge='mlp' or 'qformer', or another language model."
        )

    def check_checkpointing(self, reentrant: bool) -> None:
        """Raise a `ValueError` if reentrant checkpointing does not work with this release of transformers."""
        if reentrant and HOOKS_ARE_RECOMPUTED:
            raise ValueError(
                "use_reentrant=True can't checkpoint layers that are conditioned by a perceiver bridge before "
                "transformers 5.23. Leave it out: False is the default."
            )

    def _condition_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict):
        conditioning = kwargs.get(CONDITIONING)
        if conditioning is None or conditioning.model is not self:
            return None  # the language model runs alone, or for another model that shares it
        kwargs = {name: value for name, value in kwargs.items() if name != CONDITIONING}
        number, rest = divmod(index + 1, conditioning.every_n_layers)
        if rest == 0:
            keys, values = conditioning.key_states, conditioning.value_states
            hidden_states = conditioning.blocks[number - 1](
                args[0] if args else kwargs["hidden_states"],
                None if keys is None else keys[number - 1],
                None if values is None else values[number - 1],
                conditioning.mask,
                conditioning.sees_image,
            )
            if args:
                args = (hidden_states, *args[1:])
            else:
                kwargs["hidden_states"] = hidden_states
        return args, kwargs

    def make_visual_states(
        self, input_ids: torch.LongTensor, image_features: torch.Tensor, before: VisualStates | None = None
    ) -> VisualStates:
        """Assign the images to their rows and compute the keys and values of every cross-attention layer.

        Args:
            input_ids: `(batch, tokens)`, one `<image>` per image.
            image_features: `(num_images, num_latents, vision_dim)`, the images of all rows, concatenated.
            before: State of a prefix that `input_ids` continue; its images come first. A prefix of one row is repeated.

        Raises:
            ValueError: The numbers of `<image>` tokens and images differ.
        """
        num_images = (input_ids == self.config.image_token_id).sum(dim=-1)  # (batch,)
        total = image_features.shape[0]
        torch_compilable_check(
            num_images.sum() == total,
            lambda: (
                f"Image features and image tokens do not match: {int(num_images.sum())} image tokens in input_ids, but "
                f"features of {total} images: every image needs one <image> where it belongs in the text."
            ),
        )
        num_images = num_images.to(image_features.device)
        taken = torch.zeros_like(num_images)  # slots of the prefix's images
        if before is not None and before.key_states is not None:
            before = before.repeat_to(len(num_images))
            taken = before.num_images - before.num_forgotten
        else:
            before = None
        if torch.compiler.is_compiling():  # any row may have all images; slots that stay empty are never seen
            slots = total if before is None else total + before.key_states[0].shape[2] // self.config.num_latents
        else:
            slots = int((taken + num_images).max())
        slot = torch.arange(max(slots, 1), device=image_features.device)
        new = (slot >= taken[:, None]) & (slot < (taken + num_images)[:, None])  # (batch, max_images)
        padded = image_features.new_zeros(*new.shape, *image_features.shape[1:])
        padded = padded.masked_scatter(new[..., None, None], image_features)  # (batch, slots, num_latents, vision_dim)
        visual_tokens = padded.flatten(1, 2)
        keys, values = [], []
        for number, layer in enumerate(self.bridge.cross_attention_layers):
            key, value = layer.project(visual_tokens)
            if before is not None:
                is_new = new.repeat_interleave(self.config.num_latents, dim=1)[:, None, :, None]
                missing = key.shape[2] - before.key_states[number].shape[2]
                key = torch.where(is_new, key, nn.functional.pad(before.key_states[number], (0, 0, 0, missing)))
                value = torch.where(is_new, value, nn.functional.pad(before.value_states[number], (0, 0, 0, missing)))
            keys.append(key)
            values.append(value)
        return VisualStates(
            key_states=tuple(keys),
            value_states=tuple(values),
            num_images=num_images if before is None else before.num_images + num_images,
            text_time=torch.zeros_like(num_images) if before is None else before.text_time,
            num_forgotten=torch.zeros_like(num_images) if before is None else before.num_forgotten,
        )

    def _visual_conditioning(self, input_ids, image_features, visual_states, segment_ids=None):
        # Read at every call: PEFT may have replaced the bridge by a copy, or another bridge may have been activated.
        bridge = self, self.bridge.cross_attention_layers, self.config.cross_attention_every_n_layers
        if image_features is not None:
            if input_ids is None:
                raise ValueError("Images need input_ids: <image> can't be found in inputs_embeds.")
            visual_states = self.make_visual_states(input_ids, image_features, before=visual_states)
        if visual_states is None or visual_states.key_states is None:
            if input_ids is not None and not torch.compiler.is_compiling() and input_ids.shape[1] > 1:
                if bool((input_ids == self.config.image_token_id).any()):
                    raise ValueError("There are <image> tokens in input_ids, but no images were given.")
            return {CONDITIONING: Conditioning(*bridge, None, None, None, None)}, None
        if input_ids is None:
            raise ValueError("visual_states need input_ids: <image> can't be found in inputs_embeds.")
        # Rows are the samples' beams. A generated <image> has no image, so the count stops at the sample's images.
        rows = input_ids.shape[0]
        beams = rows // len(visual_states.num_images)
        limit = visual_states.num_images.repeat_interleave(beams)[:, None]
        before = visual_states.text_time.repeat_interleave(rows // len(visual_states.text_time))[:, None]
        is_image = (input_ids == self.config.image_token_id).to(limit.device)
        text_time = torch.minimum(before + is_image.cumsum(dim=-1), limit)  # (rows, tokens)
        max_images = visual_states.key_states[0].shape[2] // self.config.num_latents
        media_time = torch.arange(1, max_images + 1, device=limit.device).repeat_interleave(self.config.num_latents)
        media_time = media_time + visual_states.num_forgotten.repeat_interleave(beams)[:, None, None]
        if self.config.only_attend_immediate_media:
            mask = text_time[..., None] == media_time
        else:
            mask = text_time[..., None] >= media_time
        if segment_ids is None:
            sees_image = text_time > 0
        else:
            earlier = self._images_of_earlier_segments(is_image, segment_ids.to(limit.device))
            mask = mask & (media_time > earlier[..., None])
            sees_image = text_time > earlier
        mask = mask | ~sees_image[..., None]  # a fully masked row would give NaN; its result is discarded
        conditioning = Conditioning(*bridge, visual_states.key_states, visual_states.value_states, mask, sees_image)
        return {CONDITIONING: conditioning}, VisualStates(
            key_states=visual_states.key_states,
            value_states=visual_states.value_states,
            num_images=visual_states.num_images,
            text_time=text_time[:, -1].contiguous(),
            num_forgotten=visual_states.num_forgotten,
        )

    @staticmethod
    def _images_of_earlier_segments(is_image: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        """Number of images of a packed row before the sample that a token belongs to; all are `(rows, tokens)`."""
        before = is_image.cumsum(dim=-1) - is_image.long()
        begins = nn.functional.pad(segment_ids.diff(dim=-1) != 0, (1, 0), value=True)
        return torch.where(begins, before, 0).cummax(dim=-1).values

    def visual_states_for_generation(
        self, input_ids: torch.LongTensor | None, image_features: torch.Tensor | None, before: VisualStates | None
    ) -> GenerationStates:
        """See `BridgeGenerationMixin`; the states are made before samples are expanded to beams, which share them."""
        states = before
        if image_features is not None:
            states = self.make_visual_states(input_ids, image_features, before)
        if states is None or states.key_states is None:
            return GenerationStates(states, states)
        # Generated tokens come after all images of their sample.
        decoding = replace(states, text_time=states.num_images)
        several = states.key_states[0].shape[2] > self.config.num_latents
        if several and self.config.only_attend_immediate_media:
            decoding = decoding.latest(self.config.num_latents)
        return GenerationStates(states, decoding)


__all__ = ["PerceiverFlamingoForConditionalGeneration", "PerceiverResampler", "VisualStates", "decoder_layers"]
