"""Configuration of MPT-1B (`mosaic_gpt`), and settings read from both MPT configurations for one implementation.

MPT-7B is configured by transformers' `MptConfig`. Source: mosaicml/llm-foundry (`configuration_mpt.py`) and its
predecessor in mosaicml/examples (`configuration_mosaic_gpt.py`, `mosaic_gpt.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, MptConfig, PreTrainedConfig


@strict
class MosaicGPTConfig(PreTrainedConfig):
    """MPT-1B; the defaults are those of the released model. Other keys of the official `config.json` are ignored.

    Args:
        d_model: Channels of the hidden states (also `hidden_size`).
        n_heads: Attention heads (also `num_attention_heads`).
        n_layers: Decoder layers (also `num_hidden_layers`).
        mlp_ratio: Width of the feed-forward layers, as a multiple of `d_model`.
        max_seq_len: Length of the training sequences, in tokens (also `max_position_embeddings`); not a limit, thanks
            to ALiBi.
        vocab_size: Rows of the embedding table.
        attn_qk_ln: Layer norm of queries and keys, over all heads together.
        attn_clip_qkv: Clamp queries, keys and values to plus and minus this value.
        softmax_scale: Factor of the attention scores; `None` takes `1 / sqrt(head_dim)`.
        attn_impl: The official code's choice of kernel; ignored.
        alibi: Only `True` is supported.
        alibi_bias_max: The flattest of ALiBi's slopes is `2 ** -alibi_bias_max`.
        no_bias: Only `True` is supported.
        prefix_lm: Only `False` is supported.
        attn_uses_sequence_id: Only `False` is supported.
        embedding_fraction: Only 1 is supported.
        emb_pdrop: Dropout of the embeddings, in training.
        resid_pdrop: Dropout of the outputs of attention and feed-forward, before they are added.
        attn_pdrop: Dropout of the attention weights.
        logit_scale: Factor of the logits, or `"inv_sqrt_d_model"`.
        init_std: Standard deviation of the initial weights (also `initializer_range`).
    """

    model_type = "mosaic_gpt"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
        "initializer_range": "init_std",
    }

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    mlp_ratio: int = 4
    max_seq_len: int = 2048
    vocab_size: int = 50368
    attn_qk_ln: bool = True
    attn_clip_qkv: float | int | None = None
    softmax_scale: float | int | None = None
    attn_impl: str = "torch"
    alibi: bool = True
    alibi_bias_max: float | int = 8
    no_bias: bool = True
    prefix_lm: bool = False
    attn_uses_sequence_id: bool = False
    embedding_fraction: float | int = 1.0
    emb_pdrop: float | int = 0.0
    resid_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    logit_scale: float | int | str | None = None
    init_std: float | int | None = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


def _refuse_unsupported(model_type: str, settings: dict[str, tuple[Any, tuple]]) -> None:
    """Raise a `ValueError` for the first of `settings` (name to value and supported values) that is not supported."""
    for name, (value, supported) in settings.items():
        if value not in supported:
            raise ValueError(
                f"{model_type} with {name}={value!r} is not supported: it changes the computation, and only {name}="
                f"{' or '.join(map(repr, supported))} is implemented."
            )


@dataclass(frozen=True)
class MptSettings:
    """Settings of the computation, under the same names for `MptConfig` and `MosaicGPTConfig`.

    Args:
        hidden_size: Channels of the hidden states.
        num_heads: Attention heads.
        feed_forward_size: Channels between the two feed-forward layers.
        layer_norm_eps: Epsilon of every layer norm, except those of queries and keys.
        qk_layer_norm: Whether queries and keys are normalised.
        clip_qkv: Bound of queries, keys and values; `None` or 0 sets none.
        softmax_scale: Factor of the attention scores.
        alibi_bias_max: The flattest slope is `2 ** -alibi_bias_max`.
        slopes_from_next_power: Which of the two official rules gives ALiBi's slopes, see `alibi_slopes`.
        attention_dropout: Dropout probability of the attention weights.
        residual_dropout: Dropout probability of the outputs of attention and feed-forward.
        embedding_dropout: Dropout probability of the embeddings.
        logit_scale: Factor of the logits, or `None`.

    Raises:
        ValueError: The channels are not a multiple of the heads, or the logit scale is an unknown word.
    """

    hidden_size: int
    num_heads: int
    feed_forward_size: int
    layer_norm_eps: float
    qk_layer_norm: bool
    clip_qkv: float | None
    softmax_scale: float | None
    alibi_bias_max: float
    slopes_from_next_power: bool
    attention_dropout: float
    residual_dropout: float
    embedding_dropout: float
    logit_scale: float | str | None

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"d_model={self.hidden_size} can't be divided among n_heads={self.num_heads}; choose a multiple."
            )
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", (self.hidden_size // self.num_heads) ** -0.5)
        if isinstance(self.logit_scale, str):
            if self.logit_scale != "inv_sqrt_d_model":
                raise ValueError(f"logit_scale={self.logit_scale!r}; expected a number, None or 'inv_sqrt_d_model'.")
            object.__setattr__(self, "logit_scale", self.hidden_size**-0.5)

    @staticmethod
    def _shared(config: MptConfig | MosaicGPTConfig) -> dict:
        """Read the settings that have the same names in both configurations."""
        return {
            "hidden_size": config.d_model,
            "num_heads": config.n_heads,
            "residual_dropout": config.resid_pdrop,
            "embedding_dropout": config.emb_pdrop,
            "logit_scale": config.logit_scale,
        }

    @classmethod
    def of_mpt(cls, config: MptConfig) -> MptSettings:
        """Read an `MptConfig`.

        Raises:
            ValueError: A setting changes the computation in a way that is not implemented.
        """
        attention = config.attn_config
        supported = {
            "attn_config.attn_type": (attention.attn_type, ("multihead_attention",)),
            "attn_config.alibi": (attention.alibi, (True,)),
            "attn_config.prefix_lm": (attention.prefix_lm, (False,)),
            "attn_config.attn_uses_sequence_id": (attention.attn_uses_sequence_id, (False,)),
            "no_bias": (config.no_bias, (True,)),
            "norm_type": (config.norm_type, ("low_precision_layernorm", "layernorm")),
            "embedding_fraction": (config.embedding_fraction, (1.0,)),
        }
        _refuse_unsupported(config.model_type, supported)
        return cls(
            **cls._shared(config),
            feed_forward_size=config.expansion_ratio * config.d_model,
            layer_norm_eps=config.layer_norm_epsilon,
            qk_layer_norm=attention.qk_ln,
            clip_qkv=attention.clip_qkv,
            softmax_scale=attention.softmax_scale,
            alibi_bias_max=attention.alibi_bias_max,
            slopes_from_next_power=True,
            attention_dropout=attention.attn_pdrop,
        )

    @classmethod
    def of_mosaic_gpt(cls, config: MosaicGPTConfig) -> MptSettings:
        """Read a `MosaicGPTConfig`.

        Raises:
            ValueError: A setting changes the computation in a way that is not implemented.
        """
        supported = {
            "alibi": (True,),
            "prefix_lm": (False,),
            "attn_uses_sequence_id": (False,),
            "no_bias": (True,),
            "embedding_fraction": (1.0,),
        }
        found = {name: (getattr(config, name), values) for name, values in supported.items()}
        _refuse_unsupported(config.model_type, found)
        return cls(
            **cls._shared(config),
            feed_forward_size=config.mlp_ratio * config.d_model,
            layer_norm_eps=1e-5,
            qk_layer_norm=config.attn_qk_ln,
            clip_qkv=config.attn_clip_qkv,
            softmax_scale=config.softmax_scale,
            alibi_bias_max=config.alibi_bias_max,
            slopes_from_next_power=False,
            attention_dropout=config.attn_pdrop,
        )


AutoConfig.register(MosaicGPTConfig.model_type, MosaicGPTConfig, exist_ok=True)  # unknown to transformers

__all__ = ["MosaicGPTConfig", "MptSettings"]
