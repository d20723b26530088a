"""Configuration of Perceiver-Flamingo.

Source: Flamingo (arXiv 2204.14198, sections 2.2-2.3) and OpenFlamingo (arXiv 2308.01390); `open_flamingo/src/
{helpers,flamingo,factory}.py` of the official code.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_bridged import BridgedConfig


@strict
class PerceiverFlamingoConfig(BridgedConfig):
    """Perceiver-Flamingo: a Perceiver Resampler, and gated cross-attention in front of decoder layers.

    Args:
        num_latents: Learned latents, and so visual tokens per image.
        resampler_depth: Blocks of the Perceiver Resampler.
        resampler_num_heads: Its attention heads.
        resampler_head_dim: Channels of one of its heads.
        cross_attention_every_n_layers: Every n-th decoder layer gets a gated cross-attention block in front.
        cross_attention_num_heads: Heads of the gated cross-attention.
        cross_attention_head_dim: Channels of one of its heads.
        feed_forward_multiplier: Width of the feed-forward layers, in multiples of their input's.
        max_num_frames: Frames of a video that have an embedding for their place; `None`: no such embedding.
        max_num_media: Images of a document that have an embedding for their place; `None`: no such embedding.
        latents_init_std: Standard deviation of fresh latents. With 1, the official code's, nine tenths of the variance that a
            fresh resampler puts out are the latents themselves and a hundredth is between images; with 0.1 it is a fifth each
            (EfficientNet-Lite0, two blocks).
        gate_init: What fresh tanh gates hold. At 0, the paper's, blocks are shut and open as their gates are learned. At
            another value they stand open in front of output projections that begin at zero, so that a fresh model is the
            language model alone here too; what is learned first are then the projections, not the gates.
        only_attend_immediate_media: A text token sees the latest image before it, not all earlier ones.

    For the rest see `BridgedConfig`.
    """

    model_type = "perceiver_flamingo"
    visual_tokens_in_prompt: ClassVar[bool] = False

    num_latents: int = 64
    resampler_depth: int = 6
    resampler_num_heads: int = 8
    resampler_head_dim: int = 64
    cross_attention_every_n_layers: int = 1
    cross_attention_num_heads: int = 8
    cross_attention_head_dim: int = 64
    feed_forward_multiplier: int = 4
    max_num_frames: int | None = None
    max_num_media: int | None = None
    latents_init_std: float = 1.0
    gate_init: float = 0.0
    only_attend_immediate_media: bool = True

    def num_image_tokens(self, height: int, width: int) -> int:
        """Visual tokens that one image becomes; in the prompt it is one `<image>` all the same."""
        return self.num_latents


__all__ = ["PerceiverFlamingoConfig"]
