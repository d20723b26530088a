"""Base of the three families' configurations: two frozen parts, one placeholder token, one token count."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ..compat import as_wide_as_logits, attention_of, set_attention
from .configuration_mpt import MosaicGPTConfig  # noqa: F401 (registers a model type for text_config)


def patch_grid(source, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the patches that the vision model makes of one image.

    Args:
        source: A configuration or a processor, with `patch_size`, `num_prefix_tokens` and `vision_layout`.
        height: Height of the image as the vision model receives it, in pixels.
        width: Width of the same image, in pixels.

    Returns:
        `(rows, columns)`.

    Raises:
        ValueError: The geometry of the vision model is not known yet.
    """
    if source.patch_size is None or source.num_prefix_tokens is None:
        raise ValueError(
            f"{type(source).__name__} does not know its vision model's geometry (patch_size={source.patch_size}, "
            f"num_prefix_tokens={source.num_prefix_tokens}). Building the model fills both in; or pass them."
        )
    # Convolutional encoders pad at their borders (ceil); patch embeddings drop incomplete patches (floor).
    round_up = source.num_prefix_tokens == 0 and source.vision_layout == "grid"
    rows, columns = ((side + (source.patch_size - 1) * round_up) // source.patch_size for side in (height, width))
    return rows, columns


def num_patches(source, height: int, width: int) -> int:
    """Number of patch features the vision model gives for one image.

    Args:
        source: As for `patch_grid`, and with `vision_feature_select_strategy`.
        height: Height of the image as the vision model receives it, in pixels.
        width: Width of the same image, in pixels.

    Returns:
        The number of patches, plus the prefix tokens (CLS, registers) if the strategy is `"full"`.

    Raises:
        ValueError: The geometry of the vision model is not known yet.
    """
    rows, columns = patch_grid(source, height, width)
    return rows * columns + (source.num_prefix_tokens if source.vision_feature_select_strategy == "full" else 0)


@strict
class BridgedConfig(PreTrainedConfig):
    """Configuration of a vision encoder, a bridge and a language model.

    Args:
        vision_config: Configuration of the vision encoder (any `AutoModel` that takes `pixel_values`), or its dict.
        text_config: Configuration of the language model, or its dict.
        image_token_id: Id of the `<image>` placeholder.
        vision_feature_layer: Hidden state(s) of the vision encoder to read; `None` takes the last one, a list
            concatenates several along the channels.
        vision_feature_select_strategy: `"patch"` drops prefix tokens (CLS, registers), `"full"` keeps them.
        vision_layout: `"sequence"` for encoders that give `(batch, tokens, channels)`, `"grid"` for CNNs' `(batch,
            channels, height, width)`. If it is `None`, it is read from the encoder, as are the next four.
        vision_hidden_size: Channels of one patch feature, before several layers are concatenated.
        patch_size: Side of one patch, in pixels (the total stride of a CNN).
        num_prefix_tokens: Tokens before the patches (CLS, registers).
        image_size: Side of the square images that the encoder was trained on, in pixels.
        special_token_ids: Ids of the tokens whose embedding rows are trained and stored in the bridge.
        freeze_vision_model: Exclude the vision encoder from training (no gradients, always in eval mode).
        freeze_language_model: Exclude the language model from training (no gradients, always in eval mode).
        bridge_only: The checkpoint holds `bridge.*` only; the frozen parts come from `frozen_parts`.
        frozen_parts: Where the frozen parts came from: `{"vision_model": {"source", "revision", "sha256"},
            "language_model": {...}}`.
        trained_tensors: Names of tensors of the frozen parts that were trained and are saved with the bridge.
        initializer_range: Standard deviation of the bridge's initial weights.
    """

    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # Model types used when no configuration was given, or a dict without model_type.
    default_model_types: ClassVar[dict[str, str]] = {"vision_config": "clip_vision_model", "text_config": "llama"}
    # Outputs that are no predictions for `Trainer`: some rows have them and others don't, or they are one per image
    keys_to_ignore_at_inference = [
        "cache", "past_key_values", "hidden_states", "attentions", "decoder_hidden_states", "decoder_attentions",
        "cross_attentions", "encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions",
        "image_hidden_states", "visual_states", "token_losses",
    ]  # fmt: skip
    # Families that put visual tokens into the prompt count them; Flamingo conditions on them instead.
    visual_tokens_in_prompt: ClassVar[bool] = True

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    vision_feature_layer: int | list[int] | None = None
    vision_feature_select_strategy: Literal["patch", "full"] = "patch"
    vision_layout: Literal["sequence", "grid"] | None = None
    vision_hidden_size: int | None = None
    patch_size: int | None = None
    num_prefix_tokens: int | None = None
    image_size: int | None = None
    special_token_ids: list[int] | None = None
    freeze_vision_model: bool = True
    freeze_language_model: bool = True
    bridge_only: bool = False
    frozen_parts: dict | None = None
    trained_tensors: list[str] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # The base class would reset the attention implementation of configurations that come from loaded models.
        parts = [getattr(self, name, None) for name in self.sub_configs]
        given = [part for part in parts if isinstance(part, PreTrainedConfig)]
        attention = [] if kwargs.get("attn_implementation") else [attention_of(part) for part in given]
        for name in self.sub_configs:
            setattr(self, name, self._part_config(name, getattr(self, name)))
        super().__post_init__(**kwargs)
        for part, implementation in zip(given, attention):
            if implementation is not None:
                set_attention(part, implementation)
        if self.text_config is None:  # a family without a language model
            return
        self.is_encoder_decoder = bool(self.text_config.is_encoder_decoder)
        if self.is_encoder_decoder:
            for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
                if getattr(self, name, None) is None:
                    setattr(self, name, getattr(self.text_config, name, None))
        # Only the language model's embeddings can be tied, but saving reads the outermost configuration.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """See `PreTrainedConfig.get_text_config`; inside `logits_of_width` with the logits' width as `vocab_size`."""
        return as_wide_as_logits(super().get_text_config(*args, **kwargs))

    def _part_config(self, name: str, given: dict | PreTrainedConfig | None) -> PreTrainedConfig:
        """Build the configuration of one of `sub_configs` from the value given for it."""
        if isinstance(given, PreTrainedConfig):
            return given
        if given is not None and not isinstance(given, dict):
            raise TypeError(f"{name} is a {type(given).__name__}; expected a configuration, its dict, or None.")
        fields, config_class = dict(given or {}), self.sub_configs[name]
        if config_class is not AutoConfig:
            return config_class(**fields)
        return AutoConfig.for_model(fields.pop("model_type", None) or self.default_model_types[name], **fields)

    @property
    def vision_feature_size(self) -> int:
        """Channels of the features that the bridge receives."""
        layers = self.vision_feature_layer
        return self.vision_hidden_size * (len(layers) if isinstance(layers, list) else 1)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Visual tokens that one image becomes.

        Args:
            height: Height of the image as the vision model receives it, in pixels.
            width: Width of the same image, in pixels.
        """
        return num_patches(self, height, width)

    def image_token_range(self) -> tuple[int, int]:
        """Smallest and largest number of visual tokens that one image can become."""
        tokens = self.num_image_tokens(self.image_size, self.image_size)
        return tokens, tokens


__all__ = ["BridgedConfig", "num_patches", "patch_grid"]
