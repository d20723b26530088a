"""Configuration of Q-Former BLIP-2.

Source: BLIP-2 (arXiv 2301.12597, section 3.1); `lavis/models/blip2_models/{blip2,Qformer}.py` of the official code.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_bridged import BridgedConfig


@strict
class QFormerConfig(PreTrainedConfig):
    """The Querying Transformer: a BERT encoder whose query tokens read the image by cross-attention.

    Args:
        hidden_size: Width of the query tokens.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads of self- and cross-attention.
        intermediate_size: Width of the feed-forward layers.
        hidden_act: Activation of the feed-forward layers.
        hidden_dropout_prob: Dropout after every sub-layer.
        attention_probs_dropout_prob: Dropout on attention weights.
        layer_norm_eps: Epsilon of the layer norms.
        cross_attention_frequency: Every how many blocks one has cross-attention, counted from the first.
        num_query_tokens: Learned queries, and so visual tokens per image.
    """

    model_type = "vlbridge_qformer"
    base_config_key: ClassVar[str] = "qformer_config"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2
    num_query_tokens: int = 32

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"The Q-Former's hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )


@strict
class QFormerBlip2Config(BridgedConfig):
    """Q-Former BLIP-2: a fixed number of query tokens per image, whatever the number of patches.

    Args:
        qformer_config: Configuration of the Q-Former, or its dict.
        vision_layer_norm_eps: Epsilon of the layer norm on the patch features (`ln_vision`).

    For the rest see `BridgedConfig`. The Q-Former reads the CLS token too (`vision_feature_select_strategy="full"`).
    """

    model_type = "qformer_blip2"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt"),
        "qformer_config": SubConfigSpec(config_class=QFormerConfig),
    }

    qformer_config: dict | PreTrainedConfig | None = None
    vision_layer_norm_eps: float = 1e-5
    vision_feature_select_strategy: str = "full"

    def num_image_tokens(self, height: int, width: int) -> int:
        return self.qformer_config.num_query_tokens


__all__ = ["QFormerBlip2Config", "QFormerConfig"]
