"""Assemble a model and its processor from a vision encoder, a language model and a new bridge."""

from __future__ import annotations

import os

import torch
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from ..processing.processing_bridged import BridgedProcessor
from ..processing.processing_parts import add_tokens, load_image_processor, load_tokenizer
from .modeling_bridge import fill_vision_geometry
from .modeling_bridged import BridgedModel
from .modeling_parts import Part, resolve_part


# Configuration fields that follow from the parts and can't be chosen
_DERIVED_FIELDS = {"vision_config", "text_config", "image_token_id", "special_token_ids", "frozen_parts", "bridge_only"}


def options_of(model_class: type[BridgedModel], processor_class: type[BridgedProcessor]) -> set[str]:
    """Names of the options of a family's bridge: configuration fields, and options of the model and the processor."""
    fields = set(model_class.config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    return (fields - _DERIVED_FIELDS) | {*processor_class.compose_options, *model_class.compose_options}


def assemble(
    model_class: type[BridgedModel],
    processor_class: type[BridgedProcessor],
    vision: Part,
    language: Part,
    *,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    image_processor: BaseImageProcessor | str | os.PathLike | None = None,
    chat_template: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict | torch.device | None = None,
    **options,
) -> tuple[BridgedModel, BridgedProcessor]:
    """Put a new bridge of one family between a vision encoder and a language model.

    Args:
        model_class: The family's model.
        processor_class: The family's processor.
        vision: Vision encoder: Hub id, folder, configuration (random weights) or loaded model.
        language: Language model: Hub id, folder, configuration (random weights) or loaded model.
        tokenizer: The language model's tokenizer: object, Hub id or folder; by default it is loaded from the language
            model's repository.
        image_processor: The encoder's image processor: object, Hub id or folder; by default it is loaded from the
            encoder's repository.
        chat_template: Jinja template; the default is built from the tokenizer's template.
        dtype: Data type of all parts; `None` keeps the checkpoints' data types and a float32 bridge.
        device_map: `"auto"`, a device or a dict, as in `from_pretrained`.
        options: `revision`, `token`, `cache_dir` and `local_files_only` for the Hub, and the options listed by
            `options_of`.

    Returns:
        Model (in eval mode) and processor.

    Raises:
        ValueError: The parts do not fit together.
        TypeError: A part has an unsupported type.
    """
    hub_names = ("revision", "token", "cache_dir", "local_files_only")
    hub_kwargs = {name: value for name in hub_names if (value := options.pop(name, None))}
    for_processor = {name: options.pop(name) for name in processor_class.compose_options if name in options}
    for_model = {name: options.pop(name) for name in model_class.compose_options if name in options}
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    vision_model, vision_name, vision_source = resolve_part("vision_model", vision, wanted, **hub_kwargs)
    language_model, language_name, language_source = resolve_part("language_model", language, wanted, **hub_kwargs)
    model_class.check_language_model(language_model)

    tokenizer = load_tokenizer(tokenizer, language_name, **hub_kwargs)
    tokens = model_class.special_tokens or ("<image>",)
    token_ids = add_tokens(tokenizer, tokens)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokens[-1]
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only init_kwargs are saved

    config = model_class.config_class(
        vision_config=vision_model.config,
        text_config=language_model.config,
        image_token_id=token_ids[0],
        special_token_ids=token_ids if model_class.special_tokens else None,
        frozen_parts={"vision_model": vision_source, "language_model": language_source},
        **options,
    )
    fill_vision_geometry(config)
    if for_model:
        for_model = model_class.prepare_init(config, vision_model, tokenizer, **for_model, **hub_kwargs)
    processor_class.complete_config(config, **for_processor)
    image_processor = load_image_processor(image_processor, vision_name, config.vision_config, **hub_kwargs)
    options = {"chat_template": chat_template, **for_processor}
    processor = processor_class.from_config(config, image_processor, tokenizer, **options)
    model = model_class(config, vision_model=vision_model, language_model=language_model)
    if for_model:
        model.init_bridge(**for_model)
    if isinstance(wanted, torch.dtype):
        model.bridge.to(wanted)
    _complete(model, tokenizer)
    model.eval()
    if device_map is not None:
        model.dispatch(device_map)
    else:
        model.place_beside_quantized()
    return model, processor


def _complete(model: BridgedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name the model, and set its padding token and the tokens that end generation, where they are left open."""
    # No Hub id has a space: whoever looks for the model's files, such as TRL for its reference, is told this name
    model.name_or_path = model.config.name_or_path = f"composed {model.config.model_type}"
    defaults = model.generation_config
    if defaults.pad_token_id is None:
        defaults.pad_token_id = tokenizer.pad_token_id
    if defaults.eos_token_id is None:
        defaults.eos_token_id = tokenizer.eos_token_id
    if "<|endofchunk|>" in model.special_tokens:
        ends = defaults.eos_token_id if isinstance(defaults.eos_token_id, list) else [defaults.eos_token_id]
        ends = [end for end in ends if end is not None] + [tokenizer.convert_tokens_to_ids("<|endofchunk|>")]
        defaults.eos_token_id = list(dict.fromkeys(ends))


__all__ = ["assemble", "options_of"]
