"""MPT-7B and MPT-1B (`mosaic_gpt`) with ALiBi, which pass keyword arguments on to every decoder layer.

One implementation serves two sets of parameter names: those of MPT (transformers and mosaicml) and those of MPT-1B
(mosaicml). transformers' own MPT does not pass keyword arguments on, so a bridge can't condition its layers, and it
can't be compiled with a static cache. transformers has no MPT-1B.

Source: mosaicml/llm-foundry / examples mosaic_gpt.py; ALiBi arXiv 2108.12409.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    GradientCheckpointingLayer,
    MptConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..compat import (
    accepts_cache,
    attention_of,
    cache_argument,
    cache_of,
    can_return_tuple,
    capture_outputs,
    create_causal_mask,
    merge_with_config_defaults,
    set_attention,
)
from ..compat_hooks import ModelHooks
from ..configuration.configuration_mpt import MosaicGPTConfig, MptSettings


# ---------------------------------------------------------------------- ALiBi


def alibi_slopes(
    num_heads: int,
    alibi_bias_max: float = 8,
    device: torch.device | str | None = None,
    from_next_power: bool = True,
) -> torch.Tensor:
    """Slopes of ALiBi: how fast each head's attention decreases with distance.

    The slopes fall geometrically to `2 ** -alibi_bias_max`. The two official rules differ if the number of heads is
    not a power of two.

    Args:
        num_heads: Attention heads.
        alibi_bias_max: The flattest slope is `2 ** -alibi_bias_max`.
        device: Device of the result.
        from_next_power: Take the slopes from those of the next power of two, every second one first, then the ones
            between (MPT-7B); else head i of n has `2 ** -(alibi_bias_max * i / n)` for any n (MPT-1B).

    Returns:
        `(num_heads,)` in float32.

    Source: ALiBi, section 3; `gen_slopes` in llm-foundry, and `alibi_bias` in mosaic_gpt's attention.py.
    """
    power = 1 << (num_heads - 1).bit_length() if from_next_power else num_heads
    number = torch.arange(1, power + 1, dtype=torch.float32, device=device)
    if power != num_heads:
        number = torch.cat((number[1::2], number[::2]))[:num_heads]
    return torch.exp2(number * (-alibi_bias_max / power))


def alibi_mask(
    allowed: torch.Tensor | None,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    slopes: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Combine ALiBi and an attention mask into one additive mask.

    Softmax depends only on differences between keys. Distances from the query are small for the keys that matter, so
    half precision is sufficient for any length of context.

    Args:
        allowed: True where attention is allowed, or an additive mask, broadcastable to `(batch, heads, queries, keys)`;
            `None` allows every key up to the query.
        query_positions: `(queries,)` or `(batch, queries)`.
        key_positions: `(keys,)` or `(batch, keys)`.
        slopes: `(heads,)`.
        dtype: Data type of the result.

    Returns:
        `(batch or 1, heads, queries, keys)`, finite everywhere, so that a row without any allowed key gives no NaN.

    Raises:
        ValueError: `allowed` has another number of keys, or holds integers.
    """
    distance = key_positions[..., None, :] - query_positions[..., :, None]  # ([batch,] queries, keys)
    if allowed is None:
        allowed = distance <= 0
    elif allowed.shape[-1] != key_positions.shape[-1]:
        raise ValueError(
            f"The attention mask has {allowed.shape[-1]} keys, but there are {key_positions.shape[-1]}: the cached "
            "ones (all slots of a static cache) and the new ones."
        )
    bias = slopes[:, None, None] * distance.unsqueeze(-3).to(torch.float32)  # ([batch,] heads, queries, keys)
    lowest = torch.finfo(dtype).min
    if allowed.dtype == torch.bool:
        bias = torch.where(allowed, bias.to(dtype), lowest)
    elif allowed.is_floating_point():
        bias = (bias + allowed).clamp(min=lowest).to(dtype)
    else:
        raise ValueError(f"The 4-d attention mask is {allowed.dtype}; expected bool (True: attend) or float (added).")
    return bias if bias.ndim == 4 else bias[None]


# ---------------------------------------------------------------------- layers


class MptAttention(nn.Module):
    """Multi-head self-attention with one fused projection, and optional layer norms of queries and keys."""

    def __init__(self, config: PreTrainedConfig, settings: MptSettings, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = settings.num_heads
        self.scale = settings.softmax_scale
        self.clip_qkv = settings.clip_qkv
        self.attention_dropout = settings.attention_dropout
        size = settings.hidden_size
        self.Wqkv = nn.Linear(size, 3 * size, bias=False)
        self.q_ln = nn.LayerNorm(size, bias=False) if settings.qk_layer_norm else None
        self.k_ln = nn.LayerNorm(size, bias=False) if settings.qk_layer_norm else None
        self.out_proj = nn.Linear(size, size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run self-attention.

        Args:
            hidden_states: `(batch, queries, hidden_size)`.
            attention_mask: `(batch or 1, heads, queries, keys)`, added to the scores.
            cache: Cache, to which this layer's keys and values are added.
            output_attentions: Return the weights too; the attention implementation `"eager"` always does.
            kwargs: Ignored.

        Returns:
            `(batch, queries, hidden_size)`, and the weights `(batch, heads, queries, keys)` or `None`.
        """
        projected = self.Wqkv(hidden_states)
        if self.clip_qkv:
            projected = projected.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = projected.chunk(3, dim=-1)  # each (batch, queries, hidden_size)
        if self.q_ln is not None:
            query, key = self.q_ln(query).to(value.dtype), self.k_ln(key).to(value.dtype)
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for states in (query, key, value)
        )  # each (batch, heads, queries, head_dim)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        weights = None
        if output_attentions or attention_of(self.config) == "eager":
            # Scaled before the product and added in float32: float16 would overflow.
            scores = torch.matmul(query * self.scale, key.transpose(-1, -2)).float() + attention_mask.float()
            weights = nn.functional.dropout(scores.softmax(dim=-1).to(value.dtype), dropout)
            attended = torch.matmul(weights, value)
        else:
            attended = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=self.scale
            )
        return self.out_proj(attended.transpose(1, 2).flatten(2)), weights


class DecoderBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each after a layer norm and with a residual connection."""

    def __init__(self, config: PreTrainedConfig, settings: MptSettings, layer_idx: int):
        super().__init__()
        self.attn = MptAttention(config, settings, layer_idx)
        self.resid_dropout = nn.Dropout(settings.residual_dropout)

    def sublayers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The layer norm before attention, the one before the feed-forward layers, and the feed-forward layers."""
        raise NotImplementedError

    @accepts_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Map `(batch, tokens, hidden_size)` to the same shape.

        Args:
            hidden_states: `(batch, tokens, hidden_size)`.
            attention_mask: `(batch or 1, heads, tokens, keys)`, added to the scores.
            cache: Cache, to which this layer's keys and values are added.
            kwargs: `output_attentions`; other arguments are ignored.
        """
        norm_1, norm_2, feed_forward = self.sublayers()
        attended, _ = self.attn(norm_1(hidden_states), attention_mask, cache, **kwargs)
        hidden_states = hidden_states + self.resid_dropout(attended)
        return hidden_states + self.resid_dropout(feed_forward(norm_2(hidden_states)))


class MptMLP(nn.Module):
    """Feed-forward layers of MPT: linear, GELU, linear."""

    def __init__(self, settings: MptSettings):
        super().__init__()
        self.up_proj = nn.Linear(settings.hidden_size, settings.feed_forward_size, bias=False)
        self.down_proj = nn.Linear(settings.feed_forward_size, settings.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(..., hidden_size)` to `(..., hidden_size)`."""
        return self.down_proj(nn.functional.gelu(self.up_proj(hidden_states)))


class MosaicGPTMLP(nn.Module):
    """Feed-forward layers of MPT-1B: linear, GELU, linear."""

    def __init__(self, settings: MptSettings):
        super().__init__()
        self.mlp_up = nn.Linear(settings.hidden_size, settings.feed_forward_size, bias=False)
        self.mlp_down = nn.Linear(settings.feed_forward_size, settings.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(..., hidden_size)` to `(..., hidden_size)`."""
        return self.mlp_down(nn.functional.gelu(self.mlp_up(hidden_states)))


def _layer_norm(settings: MptSettings) -> nn.LayerNorm:
    return nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps, bias=False)


class MptBlock(DecoderBlock):
    """A decoder layer of MPT, with the parameter names of transformers and llm-foundry."""

    def __init__(self, config: MptConfig, settings: MptSettings, layer_idx: int):
        super().__init__(config, settings, layer_idx)
        self.norm_1 = _layer_norm(settings)
        self.norm_2 = _layer_norm(settings)
        self.ffn = MptMLP(settings)

    def sublayers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """See `DecoderBlock.sublayers`."""
        return self.norm_1, self.norm_2, self.ffn


class MosaicGPTBlock(DecoderBlock):
    """A decoder layer of MPT-1B, with the official parameter names."""

    def __init__(self, config: MosaicGPTConfig, settings: MptSettings, layer_idx: int):
        super().__init__(config, settings, layer_idx)
        self.ln_1 = _layer_norm(settings)
        self.ln_2 = _layer_norm(settings)
        self.mlp = MosaicGPTMLP(settings)

    def sublayers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """See `DecoderBlock.sublayers`."""
        return self.ln_1, self.ln_2, self.mlp


# ---------------------------------------------------------------------- models


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Select the positions to compute logits for.

    Args:
        hidden_states: `(batch, tokens, ...)`.
        logits_to_keep: Number of last positions (0 for all), or the indices of positions.

    Returns:
        `(batch, positions, ...)`.
    """
    return hidden_states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


class AlibiPreTrainedModel(ModelHooks, PreTrainedModel):
    """Base of MPT and MPT-1B. They differ in `block_class`, `final_norm` and `read_settings`."""

    block_class: ClassVar[type[DecoderBlock]]
    final_norm: ClassVar[str]
    read_settings: ClassVar[Callable[[PreTrainedConfig], MptSettings]]

    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DecoderBlock, "attentions": MptAttention}


class AlibiModel(AlibiPreTrainedModel):
    """Embeddings, decoder layers and the last layer norm.

    Args:
        config: The configuration.

    Raises:
        ValueError: A setting changes the computation in a way that is not implemented.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.settings = self.read_settings(config)
        self.wte = nn.Embedding(config.vocab_size, self.settings.hidden_size)
        self.emb_drop = nn.Dropout(self.settings.embedding_dropout)
        self.blocks = nn.ModuleList(
            self.block_class(config, self.settings, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        setattr(self, self.final_norm, _layer_norm(self.settings))
        self.gradient_checkpointing = False
        self.post_init()

    def make_attention_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """Combine ALiBi, causality and padding into one additive mask for all layers.

        A token's position is its index among the keys. For packed sequences, given by a 4-d mask and `position_ids`
        without a cache, positions are taken from `position_ids` instead.

        Args:
            inputs_embeds: `(batch, queries, hidden_size)`.
            attention_mask: `(batch, keys)` or 4-d, see `forward`.
            position_ids: `(batch, queries)`.
            cache: Cache of any kind.

        Returns:
            `(batch or 1, heads, queries, keys)`.
        """
        queries, device = inputs_embeds.shape[1], inputs_embeds.device
        keys, first_key, first_query = queries, 0, 0
        if cache is not None:
            keys, first_key = cache.get_mask_sizes(queries, 0)
            first_query = cache.get_query_offset(0)  # a static cache returns a tensor
            first_query = first_query.to(device) if isinstance(first_query, torch.Tensor) else first_query
        allowed = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        packed = attention_mask is not None and attention_mask.ndim == 4 and cache is None
        if packed and position_ids is not None:
            query_positions = key_positions = position_ids.to(device)
        else:
            query_positions = torch.arange(queries, device=device) + first_query
            key_positions = torch.arange(keys, device=device) + first_key
        dtype = inputs_embeds.dtype
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)  # the lowest float32 number would be -inf in float16
        settings = self.settings
        slopes = alibi_slopes(settings.num_heads, settings.alibi_bias_max, device, settings.slopes_from_next_power)
        return alibi_mask(allowed, query_positions, key_positions, slopes, dtype)

    @accepts_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `(batch, tokens)`.
            attention_mask: `(batch, keys)`, 1 for tokens and 0 for padding; or a 4-d mask, either boolean, true where
                attention is allowed, or additive.
            position_ids: `(batch, tokens)`, read for packed sequences only, see `make_attention_mask`.
            cache: Cache of any kind; `past_key_values` is another name for it.
            inputs_embeds: `(batch, tokens, hidden_size)` instead of `input_ids`.
            use_cache: Create a cache if none is given, and return it.
            kwargs: Passed on to every layer. `output_attentions` and `output_hidden_states` have their usual meaning.

        Raises:
            ValueError: Not exactly one of `input_ids` and `inputs_embeds` is given, or the mask does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        mask = self.make_attention_mask(inputs_embeds, attention_mask, position_ids, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_states = self.emb_drop(inputs_embeds)
        for block in self.blocks:
            hidden_states = block(hidden_states, attention_mask=mask, **cache_argument(cache), **kwargs)
        hidden_states = getattr(self, self.final_norm)(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **cache_argument(cache))


class AlibiForCausalLM(AlibiPreTrainedModel, GenerationMixin):
    """A decoder with an output layer that is tied to the input embeddings.

    Args:
        config: The configuration.

    Raises:
        ValueError: A setting changes the computation in a way that is not implemented.
    """

    model_class: ClassVar[type[AlibiModel]]
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.transformer = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Run the decoder and its output layer.

        Args:
            input_ids: `(batch, tokens)`.
            attention_mask: Mask, see `AlibiModel.forward`.
            position_ids: `(batch, tokens)`, read for packed sequences only.
            cache: Cache of any kind; `past_key_values` is another name for it.
            inputs_embeds: `(batch, tokens, hidden_size)` instead of `input_ids`.
            labels: `(batch, tokens)`, aligned with `input_ids`; -100 is ignored.
            use_cache: Create a cache if none is given, and return it.
            logits_to_keep: Number of last positions to compute logits for (0 for all), or the indices of positions.
            kwargs: Passed on to every decoder layer, and to the loss.

        Returns:
            Logits `(batch, tokens, vocab_size)`, the loss if labels are given, and the cache.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_argument(cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(kept_positions(outputs.last_hidden_state, logits_to_keep))
        if self.transformer.settings.logit_scale is not None:
            logits = logits * self.transformer.settings.logit_scale
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cache_argument(cache_of(outputs)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class _MptNames:
    block_class = MptBlock
    final_norm = "norm_f"
    read_settings = MptSettings.of_mpt
    _no_split_modules = ["MptBlock"]


class _MosaicGPTNames:
    block_class = MosaicGPTBlock
    final_norm = "ln_f"
    read_settings = MptSettings.of_mosaic_gpt
    _no_split_modules = ["MosaicGPTBlock"]


class MptModel(_MptNames, AlibiModel):
    """MPT without its output layer."""

    config_class = MptConfig
    config: MptConfig


class MptForCausalLM(_MptNames, AlibiForCausalLM):
    """MPT. It loads and saves the checkpoints of transformers' class of the same name, and mosaicml's."""

    config_class = MptConfig
    config: MptConfig
    model_class = MptModel


class MosaicGPTModel(_MosaicGPTNames, AlibiModel):
    """MPT-1B without its output layer."""

    config_class = MosaicGPTConfig
    config: MosaicGPTConfig


class MosaicGPTForCausalLM(_MosaicGPTNames, AlibiForCausalLM):
    """MPT-1B, in the layout of its official checkpoints."""

    config_class = MosaicGPTConfig
    config: MosaicGPTConfig
    model_class = MosaicGPTModel


# ---------------------------------------------------------------------- from transformers' class


def as_conditionable(language_model: PreTrainedModel) -> PreTrainedModel:
    """Replace transformers' MPT by this module's MPT, sharing its parameters; other models are returned unchanged.

    Attention uses SDPA, since transformers' MPT only has `"eager"`, which is therefore never a user's choice.

    Args:
        language_model: Any language model.

    Returns:
        The same model, or an `MptForCausalLM` of this module that shares its parameters, `generation_config` and name.

    Raises:
        ValueError: The MPT is quantised, distributed over several devices or carries adapters, or its configuration has
            a setting that transformers' class does not implement.
    """
    if not isinstance(language_model, transformers.MptForCausalLM):
        return language_model
    here = f"{MptForCausalLM.__module__}.{MptForCausalLM.__name__}"
    if getattr(language_model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"transformers' MPT can't be replaced when it is quantised; load it with {here}.from_pretrained."
        )
    device_map = getattr(language_model, "hf_device_map", None)
    if device_map is not None and len(set(map(str, device_map.values()))) > 1:
        raise ValueError(
            f"transformers' MPT can't be replaced when it is distributed over devices (hf_device_map={device_map}); "
            f"load it with {here}.from_pretrained, or on one device, and distribute it afterwards."
        )
    config = copy.deepcopy(language_model.config)
    set_attention(config, "sdpa")
    with torch.device("meta"):
        model = MptForCausalLM(config)
    theirs = language_model.state_dict(keep_vars=True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in theirs:  # load_state_dict would copy this flag to the shared parameter
            parameter.requires_grad_(theirs[name].requires_grad)
    try:
        model.load_state_dict(theirs, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"This MPT's parameters are not those of its configuration: {error} If transformers left some out, load "
            f"it with {here}.from_pretrained."
        ) from error
    model.generation_config = language_model.generation_config
    model.name_or_path = language_model.name_or_path
    if device_map is not None:
        model.hf_device_map = device_map
    return model.train(language_model.training)


AutoModelForCausalLM.register(MosaicGPTConfig, MosaicGPTForCausalLM, exist_ok=True)

__all__ = [
    "MosaicGPTForCausalLM",
    "MosaicGPTModel",
    "MptForCausalLM",
    "MptModel",
    "alibi_mask",
    "alibi_slopes",
    "as_conditionable",
]
