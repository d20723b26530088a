"""Q-Former BLIP-2: learned queries read the image and hand a fixed number of visual tokens to the language model.

Source: BLIP-2 (arXiv 2301.12597, section 3.1); `lavis/models/blip2_models/{Qformer,blip2}.py` of the official code.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration.configuration_qformer import QFormerBlip2Config, QFormerConfig
from .modeling_bridged import Bridge, BridgedModel


class QFormerAttention(nn.Module):
    """BERT's attention and the residual layer norm behind it.

    Args:
        config: The Q-Former's configuration.
        key_value_size: Width of what is attended to; `None` for self-attention.
    """

    def __init__(self, config: QFormerConfig, key_value_size: int | None = None):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        key_value_size = key_value_size or config.hidden_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_value_size, config.hidden_size)
        self.value = nn.Linear(key_value_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            hidden_states: `(batch, queries, hidden_size)`.
            key_value_states: `(batch, keys, key_value_size)`; `None` for self-attention.
            attention_mask: Bool, broadcastable to `(batch, heads, queries, keys)`, true where attention is allowed.
        """
        key_value_states = hidden_states if key_value_states is None else key_value_states
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (batch, heads, tokens, head_dim)
            for projection, states in (
                (self.query, hidden_states),
                (self.key, key_value_states),
                (self.value, key_value_states),
            )
        )
        dropout = self.dropout_prob if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, dropout)
        attended = attended.transpose(1, 2).flatten(2)  # (batch, queries, hidden_size)
        return self.layer_norm(hidden_states + self.dropout(self.dense(attended)))


class QFormerFeedForward(nn.Module):
    """BERT's feed-forward and the residual layer norm behind it."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = self.dense(self.activation(self.intermediate(hidden_states)))
        return self.layer_norm(hidden_states + self.dropout(hidden))


class QFormerLayer(GradientCheckpointingLayer):
    """Self-attention, in every `cross_attention_frequency`-th block cross-attention to the image, feed-forward.

    Args:
        config: The Q-Former's configuration.
        index: Which block this is.
        vision_dim: Channels of the patch features.
    """

    def __init__(self, config: QFormerConfig, index: int, vision_dim: int):
        super().__init__()
        self.attention = QFormerAttention(config)
        reads_image = index % config.cross_attention_frequency == 0
        self.cross_attention = QFormerAttention(config, vision_dim) if reads_image else None
        self.feed_forward_query = QFormerFeedForward(config)

    def forward(self, hidden_states: torch.Tensor, patch_features: torch.Tensor) -> torch.Tensor:
        hidden_states = self.attention(hidden_states)
        if self.cross_attention is not None:
            hidden_states = self.cross_attention(hidden_states, patch_features)
        return self.feed_forward_query(hidden_states)


class QFormer(nn.Module):
    """The Querying Transformer.

    Args:
        config: Its configuration.
        vision_dim: Channels of the patch features.
    """

    def __init__(self, config: QFormerConfig, vision_dim: int):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            QFormerLayer(config, index, vision_dim) for index in range(config.num_hidden_layers)
        )

    def init_parameters(self, config: QFormerBlip2Config) -> None:
        # Zero in transformers' port; LAVIS draws them, which breaks the symmetry between queries.
        init.normal_(self.query_tokens, mean=0.0, std=config.initializer_range)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Read images.

        Args:
            patch_features: `(num_images, num_patches, vision_dim)`.

        Returns:
            `(num_images, num_query_tokens, hidden_size)`.
        """
        queries = self.query_tokens.expand(patch_features.shape[0], -1, -1)
        hidden_states = self.dropout(self.layer_norm(queries))
        for layer in self.layers:
            hidden_states = layer(hidden_states, patch_features)
        return hidden_states


class QFormerBridge(Bridge):
    """Layer norm on the patch features, Q-Former, linear layer to the language model's width."""

    def __init__(self, config: QFormerBlip2Config, language_model: PreTrainedModel):
        super().__init__(config, language_model)
        self.vision_layer_norm = nn.LayerNorm(config.vision_feature_size, eps=config.vision_layer_norm_eps)
        self.qformer = QFormer(config.qformer_config, config.vision_feature_size)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, self.text_dim)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Map `(num_images, num_patches, vision_dim)` to `(num_images, num_query_tokens, text_dim)`."""
        return self.language_projection(self.qformer(self.vision_layer_norm(patch_features)))


class QFormerBlip2ForConditionalGeneration(BridgedModel):
    config_class = QFormerBlip2Config
    config: QFormerBlip2Config
    bridge_class = QFormerBridge
    _no_split_modules = ["QFormerLayer"]


__all__ = ["QFormer", "QFormerBlip2ForConditionalGeneration", "QFormerBridge"]
