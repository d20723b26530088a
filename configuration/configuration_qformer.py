"""Configuration of Q-Former BLIP-2.

Source: BLIP-2 (arXiv 2301.12597, section 3.1); `lavis/models/blip2_models/{blip2,Qformer}.py` of the official code.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_bridged import BridgedConfig


@strict
class QFormerConfig(PreTrainedConfig):
    """The Querying Transformer: a BERT encoder whose query tokens read the image by cross-attention.

    Args:
        hidden_size: Width of the query tokens.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads of self- and cross-attention.
        intermediate_size: Width of the feed-forward layers.
        hidden_act: Activation of the feed-forward layers.
        hidden_dropout_prob: Dropout after every sub-layer.
        attention_probs_dropout_prob: Dropout on attention weights.
        layer_norm_eps: Epsilon of the layer norms.
        cross_attention_frequency: Every n-th block has cross-attention, beginning with the first.
        num_query_tokens: Learned queries, which is also the number of visual tokens per image.
        use_text: The Q-Former reads text too, with word and position embeddings and a second feed-forward per block.
            Stage 1 and instruction-aware models need it.
        vocab_size: BERT's 30,522 tokens and `[DEC]`, which begins captions.
        max_position_embeddings: Longest text, in tokens.
        pad_token_id: Id of the padding token.
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
    use_text: bool = False
    vocab_size: int = 30523
    max_position_embeddings: int = 512
    pad_token_id: int | None = 0

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

    The other fields are those of `BridgedConfig`. The Q-Former reads the CLS token too
    (`vision_feature_select_strategy="full"`).
    """

    model_type = "qformer_blip2"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig, "qformer_config": QFormerConfig}
    default_model_types: ClassVar[dict[str, str]] = {"vision_config": "clip_vision_model", "text_config": "opt"}

    qformer_config: dict | PreTrainedConfig | None = None
    vision_layer_norm_eps: float = 1e-5
    vision_feature_select_strategy: str = "full"

    def num_image_tokens(self, height: int, width: int) -> int:
        """Visual tokens that one image becomes, whatever its size."""
        return self.qformer_config.num_query_tokens


@strict
class QFormerBlip2PreTrainingConfig(BridgedConfig):
    """Stage 1 of Q-Former BLIP-2, and retrieval: vision encoder and Q-Former with its text side, no language model.

    Args:
        qformer_config: Configuration of the Q-Former, or its dict; `use_text` is always true here.
        vision_layer_norm_eps: Epsilon of the layer norm on the patch features (`ln_vision`).
        embed_dim: Width of the space in which images and texts are compared.
        itc_temperature: Initial value of the learned temperature.
        itc_weight: Weight of the image-text contrastive loss; a loss with weight 0 is not computed.
        itm_weight: Weight of the image-text matching loss.
        itg_weight: Weight of the image-grounded text generation loss.
        label_smoothing: Label smoothing of the contrastive and the generation loss.
        negatives_floor: Added to every negative's probability of being drawn for matching (LAVIS 1.0.2: 1e-4; its main
            branch: 0).
        bos_token_id: Id of `[DEC]`, with which captions begin.
        eos_token_id: Id of `[SEP]`, with which captions end.
        pad_token_id: Id of the padding token, the same as the Q-Former's.

    The other fields are those of `BridgedConfig`; those about a language model are ignored.
    """

    model_type = "qformer_blip2_pretraining"
    sub_configs = {"vision_config": AutoConfig, "qformer_config": QFormerConfig}
    visual_tokens_in_prompt: ClassVar[bool] = False
    # What is left are the scores of the captions' tokens and the features of images and texts: a row of each per pair
    keys_to_ignore_at_inference = [
        *BridgedConfig.keys_to_ignore_at_inference, "loss_itc", "loss_itm", "loss_itg", "similarities", "itc_scores",
        "itm_logits", "image_negatives", "text_negatives",
    ]  # fmt: skip

    qformer_config: dict | PreTrainedConfig | None = None
    vision_layer_norm_eps: float = 1e-5
    vision_feature_select_strategy: str = "full"
    embed_dim: int = 256
    itc_temperature: float = 0.07
    itc_weight: float = 1.0
    itm_weight: float = 1.0
    itg_weight: float = 1.0
    label_smoothing: float = 0.1
    negatives_floor: float = 0.0
    bos_token_id: int | None = 30522
    eos_token_id: int | None = 102
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.text_config is not None:
            raise ValueError("Stage 1 has no language model: text_config must be None.")
        self.qformer_config.use_text = True
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token_id, size = getattr(self, name), self.qformer_config.vocab_size
            if token_id is None or not 0 <= token_id < size:
                raise ValueError(f"{name} is {token_id}; expected an id within the Q-Former's {size} tokens.")
        if self.pad_token_id != self.qformer_config.pad_token_id:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}, but the Q-Former's is {self.qformer_config.pad_token_id}."
            )
        weights = {name: getattr(self, name) for name in ("itc_weight", "itm_weight", "itg_weight")}
        if min(weights.values()) < 0:
            raise ValueError(f"Weights of losses can't be negative: {weights}.")

    def num_image_tokens(self, height: int, width: int) -> int:
        """Visual tokens that one image becomes, whatever its size."""
        return self.qformer_config.num_query_tokens


__all__ = ["QFormerBlip2Config", "QFormerBlip2PreTrainingConfig", "QFormerConfig"]
