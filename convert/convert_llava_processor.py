"""Tokenizer, conversation and image processor of LLaVA's checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..configuration.configuration_llava import MLPLlavaConfig
from ..processing.processing_llava import MLPLlavaProcessor
from .convert_language import load_language_tokenizer, needs_space_after
from .convert_llava_checkpoint import Settings, find_file, image_fields, read_fields
from .convert_llava_names import IMAGE_BORDERS


END_OF_TURN = "<|im_end|>"  # ChatML's
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_tokenizer(
    source: str | os.PathLike, fields: Mapping, text_config: PreTrainedConfig, rows: int
) -> PreTrainedTokenizerBase:
    """Load the language model's tokenizer, and add LLaVA's tokens in the official order and `<image>` after them.

    Args:
        source: Folder or Hub id.
        fields: The fields of LLaVA's configuration.
        text_config: The language model's configuration.
        rows: Rows of the embedding table that was trained with the tokenizer. They tell whether the tokenizer had
            `<im_patch>`, if the configuration does not.

    Source: `load_pretrained_model` in `llava/model/builder.py`.
    """
    if "text_config" in fields:  # one of transformers' own classes, which it knows best
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        tokenizer = load_language_tokenizer(source, text_config)  # LLaVA's own configuration is not transformers'
    borders = bool(fields.get("mm_use_im_start_end", False))
    if fields.get("mm_use_im_patch_token", borders and rows >= len(tokenizer) + 3):
        tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
    if borders:
        tokenizer.add_tokens(list(IMAGE_BORDERS), special_tokens=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if hasattr(tokenizer, "legacy"):  # transformers' class accepts it, but does not save it
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def conversation_of(name: str, config: MLPLlavaConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of the conversation format that a release was trained with.

    Args:
        name: Names of the release, as far as they are known.
        config: The model's configuration.
        tokenizer: Its tokenizer.

    Source: `llava/eval/run_llava.py`, which goes by names, and the releases' model cards.
    """
    name = name.lower()
    if config.text_config.model_type == "mistral":
        return "mistral_instruct"
    if tokenizer.convert_tokens_to_ids(END_OF_TURN) not in (None, tokenizer.unk_token_id):
        return "chatml_direct"
    for pattern, conversation in ((r"llama[-_]?2", "llava_llama_2"), (r"[-_]v0\b", "llava_v0")):
        if re.search(pattern, name):
            return conversation
    return "llava_v1" if config.projector_type == "linear" else "vicuna_v1"


def _chat_template(place: str | os.PathLike) -> str | None:
    """The chat template in a repository of transformers' own classes."""
    if (path := find_file(place, "chat_template.jinja")) is not None:
        return path.read_text(encoding="utf-8")
    given = (read_fields(place, name).get("chat_template") for name in ("chat_template.json", "processor_config.json"))
    return next((template for template in given if isinstance(template, str)), None)


def load_image_processor(place: str | os.PathLike | None, side: int) -> BaseImageProcessor:
    """The vision encoder's image processor. Like the official one it resizes with Pillow.

    Args:
        place: Folder or Hub id; CLIP's defaults are used if it has none.
        side: Height and width of the encoder's images, in pixels.
    """
    fields = {} if place is None or os.path.isfile(place) else image_fields(place)
    kind = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or "CLIP")
    if not fields:
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    if kind.startswith(("CLIP", "Llava")):  # LLaVA's own steps are done by MLPLlavaProcessor
        own = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
        own += tuple(name for name in fields if name.startswith("do_") and name != "do_pad")
        return CLIPImageProcessorPil(**{name: fields[name] for name in own if name in fields})
    return AutoImageProcessor.from_pretrained(place, backend="pil")


def end_tokens(text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | list[int]:
    """Tokens that end an answer: the language model's, and ChatML's end of a turn if the tokenizer knows it."""
    ends = text_config.eos_token_id if text_config.eos_token_id is not None else tokenizer.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if end_of_turn not in (None, tokenizer.unk_token_id, *ends):
        ends.append(end_of_turn)
    return ends if len(ends) > 1 else ends[0]


def build_processor(
    config: MLPLlavaConfig,
    settings: Settings,
    image_processor: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
    conversation: str | None,
    name: str,
) -> MLPLlavaProcessor:
    """The converted model's processor.

    Args:
        config: The model's configuration.
        settings: What the checkpoint's configuration files say.
        image_processor: The vision encoder's image processor.
        tokenizer: The language model's tokenizer.
        conversation: Name of the conversation format; `None` takes the one that the checkpoint was trained with.
        name: Names of the release, as far as they are known.
    """
    chat_template = _chat_template(settings.place) if settings.native and conversation is None else None
    if conversation is None and chat_template is None:
        conversation = "plain" if settings.projector_only else conversation_of(name, config, tokenizer)
    return MLPLlavaProcessor.from_config(
        config,
        image_processor,
        tokenizer,
        chat_template=chat_template,
        image_aspect_ratio=settings.image_aspect_ratio,
        conversation=conversation,
        mm_use_im_start_end=bool(settings.borders),
        space_after_image=not settings.native and needs_space_after(tokenizer, "<image>"),
    )


__all__ = [
    "build_processor",
    "conversation_of",
    "end_tokens",
    "load_image_processor",
    "load_tokenizer",
]
