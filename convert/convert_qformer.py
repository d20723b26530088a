"""What every conversion to a Q-Former BLIP-2 needs: its class, the tokenizer of its Q-Former and its processor."""

from __future__ import annotations

import os

from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration.configuration_bridged import BridgedConfig
from ..configuration.configuration_qformer import QFormerBlip2PreTrainingConfig
from ..modeling.modeling_qformer import QFormerBlip2ForConditionalGeneration
from ..modeling.modeling_qformer_pretraining import QFormerBlip2ForPreTraining
from ..processing.processing_qformer import QFormerBlip2PreTrainingProcessor, QFormerBlip2Processor
from .convert_language import needs_space_after
from .convert_tables import ConversionError


def model_class(config: BridgedConfig) -> type[PreTrainedModel]:
    """The model class that belongs to a configuration."""
    stage1 = isinstance(config, QFormerBlip2PreTrainingConfig)
    return QFormerBlip2ForPreTraining if stage1 else QFormerBlip2ForConditionalGeneration


def load_qformer_tokenizer(
    source: str | os.PathLike, vocab_size: int, instructed: bool = False
) -> PreTrainedTokenizerBase:
    """Load BERT's tokenizer, and add `[DEC]`.

    Args:
        source: Folder or Hub id.
        vocab_size: Number of tokens in the Q-Former's embedding table.
        instructed: Whether it reads instructions, which are truncated at their beginning.

    Raises:
        ConversionError: The tokenizer has another number of tokens.
    """
    tokenizer = BertTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "left" if instructed else "right"
    if len(tokenizer) != vocab_size:
        raise ConversionError(
            f"The Q-Former knows {vocab_size} tokens, but the tokenizer in {source} has {len(tokenizer)}, [DEC] "
            "included."
        )
    return tokenizer


def build_processor(config: BridgedConfig, language: str | None, image_processor, tokenizer, qformer_tokenizer):
    """The converted model's processor.

    Args:
        config: The model's configuration.
        language: LAVIS' name of the language model: `"opt"`, `"t5"` or `"llm"`; `None` for stage 1.
        image_processor: The image processor.
        tokenizer: The language model's tokenizer; `None` for stage 1.
        qformer_tokenizer: The Q-Former's tokenizer; `None` if it reads no text.
    """
    if language is None:
        return QFormerBlip2PreTrainingProcessor.from_config(config, image_processor, qformer_tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right" if language == "t5" else "left"
    options = {"caption_prompt": "A short image description:"} if config.qformer_config.use_text else {}
    if language != "t5":
        # the official order is image, beginning of sequence, text
        tokenizer.add_bos_token = tokenizer.init_kwargs["add_bos_token"] = False
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
        begin = tokenizer.bos_token
        options["text_start"] = begin + (" " if needs_space_after(tokenizer, begin) else "")
    return QFormerBlip2Processor.from_config(
        config, image_processor, tokenizer, qformer_tokenizer=qformer_tokenizer, **options
    )


__all__ = ["build_processor", "load_qformer_tokenizer", "model_class"]
