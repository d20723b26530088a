"""Processor of Q-Former BLIP-2."""

from ..configuration.configuration_qformer import QFormerBlip2Config
from .processing_bridged import BridgedProcessor


class QFormerBlip2Processor(BridgedProcessor):
    __doc__ = BridgedProcessor.__doc__

    # Source: BLIP-2, section 4.2 ("Question: {} Answer:") and section 4.1 ("a photo of").
    default_caption_prompt = "a photo of"
    plain_chat_template = (
        "{%- for message in messages -%}"
        "{%- if message.role == 'assistant' -%}{{ ' ' }}{% generation %}{{ message.content }}{% endgeneration %}{{ '\\n' }}"
        "{%- else -%}{{ message.content }}{%- endif -%}"
        "{%- endfor -%}"
    )

    @staticmethod
    def query_tokens(config: QFormerBlip2Config) -> int:
        return config.qformer_config.num_query_tokens


__all__ = ["QFormerBlip2Processor"]
