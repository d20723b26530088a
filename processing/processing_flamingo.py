"""Processor of Perceiver-Flamingo."""

from ..configuration.configuration_flamingo import PerceiverFlamingoConfig
from .processing_bridged import BridgedProcessor


class PerceiverFlamingoProcessor(BridgedProcessor):
    __doc__ = BridgedProcessor.__doc__

    # Source: OpenFlamingo (arXiv 2308.01390), section 3.3: `<image>Output:{caption}<|endofchunk|>`.
    default_caption_prompt = "Output:"
    plain_chat_template = (
        "{%- for message in messages -%}"
        "{%- if message.role == 'assistant' -%}{% generation %}{{ message.content + '<|endofchunk|>' }}{% endgeneration %}"
        "{%- else -%}{{ message.content }}{%- endif -%}"
        "{%- endfor -%}"
    )

    @staticmethod
    def query_tokens(config: PerceiverFlamingoConfig) -> int:
        return config.num_latents

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token  # one token marks where an image stands; what it shows is conditioning

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if image_sizes is not None:
            data.num_image_tokens = [1] * len(image_sizes)
        return data


__all__ = ["PerceiverFlamingoProcessor"]
