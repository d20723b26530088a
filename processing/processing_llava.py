"""Processor of MLP-LLaVA."""

from .processing_bridged import BridgedProcessor


class MLPLlavaProcessor(BridgedProcessor):
    __doc__ = BridgedProcessor.__doc__

    # Source: the official conversations put `<image>\n` in front of the first question (`llava/constants.py`, `llava/
    # train/train.py`), and speak as Vicuna v1 does (`llava/conversation.py`).
    image_separator = "\n"
    plain_chat_template = (
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{{ message.content + ' ' }}"
        "{%- elif message.role == 'user' -%}{{ 'USER: ' + message.content + ' ' }}"
        "{%- else -%}{{ 'ASSISTANT: ' }}{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token or '' }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
    )


__all__ = ["MLPLlavaProcessor"]
