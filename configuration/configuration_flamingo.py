"""Configuration of Perceiver-Flamingo.

Source: Flamingo (arXiv 2204.14198, sections 2.2-2.3) and OpenFlamingo (arXiv 2308.01390); `open_flamingo/src/
{helpers,flamingo,factory}.py` of the official code.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_bridged import BridgedConfig


@strict
class PerceiverFlamingoConfig(BridgedConfig):
    """Perceiver-Flamingo: a Perceiver Resampler, and gated cross-attention before decoder layers.

    Args:
        num_latents: Learned latents, which is also the number of visual tokens per image.
        resampler_depth: Blocks of the Perceiver Resampler.
        resampler_num_heads: Attention heads of the resampler.
        resampler_head_dim: Channels of one attention head of the resampler.
        cross_attention_every_n_layers: A gated cross-attention block is put before every n-th decoder layer.
        cross_attention_num_heads: Heads of the gated cross-attention.
        cross_attention_head_dim: Channels of one head of the gated cross-attention.
        feed_forward_multiplier: Width of the feed-forward layers, as a multiple of their input width.
        max_num_frames: Number of learned embeddings of a frame's position in a video; `None` uses none.
        max_num_media: Number of learned embeddings of an image's position in a document; `None` uses none.
        latents_init_std: Standard deviation of the latents at initialization. With 1, the value of the official code,
            nine tenths of the variance of an untrained resampler's output come from the latents themselves and one
            hundredth from differences between images; with 0.1 each of the two gives a fifth (measured with
            EfficientNet-Lite0 and two blocks).
        gate_init: Value of the tanh gates at initialization. With 0, the value of the paper, the blocks are closed and
            open as their gates are learned. With another value the gates are open and the output projections begin
            at zero instead, so that an untrained model still equals the language model alone; the projections are
            then learned first.
        only_attend_immediate_media: A text token attends to the latest image before it, not to all earlier ones.

    The other fields are those of `BridgedConfig`.
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
        """Visual tokens that one image becomes, whatever its size; the prompt holds one `<image>` for them."""
        return self.num_latents


__all__ = ["PerceiverFlamingoConfig"]
