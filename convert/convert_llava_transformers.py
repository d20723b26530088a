"""MLP-LLaVA models in transformers' own classes for LLaVA and LLaVA-NeXT."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..configuration.configuration_llava import MLPLlavaConfig
from .convert_assembly import Conversion, assemble, expected_tensors
from .convert_llava_names import checkpoint_table as llava_checkpoint_table
from .convert_runs import PILLOW_NOTE
from .convert_saved import Saved
from .convert_sources import resized
from .convert_tables import ConversionError, dropped, invert, plan


# fields of language models that change the logits after the output matrix, which transformers' LLaVA does not do
HEAD_FIELDS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}
# encoders whose files have one level more than their classes, which had it too until transformers 5
NESTED = ("clip_vision_model", "siglip_vision_model")
# encoders whose last hidden state equals `hidden_states[-1]`
ENDS_BARE = ("clip_vision_model",)


def refuse_llava(config: MLPLlavaConfig, language_model: PreTrainedModel) -> None:
    """Refuse a model that transformers' classes for LLaVA can't express.

    Args:
        config: The model's configuration.
        language_model: Its language model, on the meta device.

    Raises:
        ConversionError: They can't; the reasons are named.
    """
    problems = []
    if config.vision_layout == "grid":
        problems.append("they take encoders that give a sequence of tokens, this one is a CNN, which gives a grid")
    if config.vision_feature_layer is None and config.vision_config.model_type not in ENDS_BARE:
        problems.append(
            "they read one of the encoder's hidden_states, this model the output of its last norm "
            "(vision_feature_layer=None)"
        )
    if config.vision_feature_select_strategy == "patch" and (config.num_prefix_tokens or 0) > 1:
        problems.append(f"they drop one prefix token, this encoder has {config.num_prefix_tokens}")
    if config.projector_type != "mlp2x_gelu":
        problems.append(f"their projector is mlp2x_gelu, this one is {config.projector_type}")
    if config.projector_hidden_size not in (None, config.text_config.hidden_size):
        problems.append(
            "their projector is as wide as the language model between its layers, this one "
            f"{config.projector_hidden_size}"
        )
    if config.pooling is not None:
        problems.append(f"they don't pool, this model has pooling={config.pooling!r}")
    if config.global_context:
        problems.append("their projector sees one feature at a time, this one the image's mean too (global_context)")
    if config.projector_norm_eps is not None:
        problems.append("their projector has no layer norm in front")
    if config.image_grid_pinpoints is not None and config.patch_merge_type != "spatial_unpad":
        problems.append(f"they merge tiles as 'spatial_unpad', this model as {config.patch_merge_type!r}")
    if config.is_encoder_decoder:
        problems.append(f"their language model is a decoder, this one is a {config.text_config.model_type}")
    elif language_model.get_input_embeddings() is not getattr(
        getattr(language_model, "model", None), "embed_tokens", None
    ):
        problems.append(
            f"they look for the language model's table at model.embed_tokens, where a {config.text_config.model_type} "
            "has none"
        )
    for name, neutral in HEAD_FIELDS.items():
        if getattr(config.text_config, name, neutral) not in (neutral, None):
            problems.append(f"their logits are one matrix times the last hidden state, this language model has {name}")
    if config.special_token_ids:
        problems.append("they have no rows of special tokens beside the language model's table")
    if problems:
        name = (
            "LlavaForConditionalGeneration"
            if config.image_grid_pinpoints is None
            else "LlavaNextForConditionalGeneration"
        )
        raise ConversionError(
            f"{name} can't express this model: {'; '.join(problems)}. What can be done: --to official writes LLaVA's "
            "own layout, if it can express the model; save_pretrained(bridge_only=True) makes a repository that "
            "AutoModel loads where vlbridge is installed."
        )


def plan_llava(saved: Saved) -> tuple[Conversion, ProcessorMixin]:
    """Plan the conversion of an MLP-LLaVA to transformers' class; no tensor is read yet.

    Args:
        saved: The model.

    Returns:
        The conversion, and the processor of transformers' class.

    Raises:
        ConversionError: Transformers' class can't express it.
    """
    config, tensors = saved.config, saved.tensors
    language_model = saved.conversion.model.language_model
    refuse_llava(config, language_model)
    tiled = config.image_grid_pinpoints is not None
    rows = max(config.text_config.vocab_size, config.image_token_id + 1)
    text_config = copy.deepcopy(config.text_config)
    text_config.vocab_size, text_config.dtype = rows, None  # the dtype stands in the outer configuration
    vision_config = copy.deepcopy(config.vision_config)
    vision_config.dtype = None
    select = "default" if config.vision_feature_select_strategy == "patch" and config.num_prefix_tokens else "full"
    fields = {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.num_image_tokens(config.image_size, config.image_size),
        "vision_feature_layer": -1 if config.vision_feature_layer is None else config.vision_feature_layer,
        "vision_feature_select_strategy": select,
        "multimodal_projector_bias": config.projector_bias,
        "tie_word_embeddings": bool(text_config.tie_word_embeddings),
    }
    if tiled:
        fields["image_grid_pinpoints"] = config.image_grid_pinpoints
    config_class, model_class = (
        (LlavaNextConfig, LlavaNextForConditionalGeneration) if tiled else (LlavaConfig, LlavaForConditionalGeneration)
    )
    new_config: PreTrainedConfig = config_class(**fields)
    with torch.device("meta"):
        model = model_class(new_config)
    table = invert(llava_checkpoint_table(config, tensors.shapes, "transformers"))
    pieces = plan(table, tensors.shapes)
    if config.vision_config.model_type not in NESTED:
        pieces = {
            name.replace("vision_tower.vision_model.", "vision_tower.", 1): piece for name, piece in pieces.items()
        }
    changes = {}
    if rows != config.text_config.vocab_size:
        of_model = {
            id(part.weight) for part in (language_model.get_input_embeddings(), language_model.get_output_embeddings())
        }
        tables = {
            f"language_model.{name}"
            for name, parameter in language_model.named_parameters(remove_duplicate=False)
            if id(parameter) in of_model
        }
        changes = {target: resized(rows) for target, piece in pieces.items() if piece.sources[0] in tables}
    expected = {_file_name(name, pieces): shape for name, shape in expected_tensors(model).items()}
    conversion = assemble(new_config, model, expected, [(tensors, pieces, changes)], tensors.path)
    conversion.left_out = dropped(table, tensors.shapes)
    new_config.dtype = conversion.dtype("multi_modal_projector.linear_1.weight")
    conversion.notes = list(_llava_notes(config, saved.processor, rows))
    return conversion, _llava_processor(config, saved.processor, select)


def _file_name(name: str, known: Mapping) -> str:
    """The name in files of a tensor of transformers' LLaVA classes."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = name.removeprefix("model.")
    inner = re.sub(r"^vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", name)
    return inner if inner in known else name


def _llava_notes(config: MLPLlavaConfig, processor: ProcessorMixin, rows: int) -> Iterable[str]:
    if rows != config.text_config.vocab_size:
        yield (
            f"The language model's tables have {rows} rows instead of {config.text_config.vocab_size}, so that the "
            "placeholder can be looked up. New rows are the mean of the others: greedily they are never chosen, and "
            "all together they take less probability than one average token."
        )
    if config.image_grid_pinpoints is not None:
        yield (
            "Transformers rounds where the official code truncates: for some image sizes there is one more row or "
            "column of visual tokens."
        )
    if getattr(processor.image_processor, "backend", None) == "pil":
        yield PILLOW_NOTE
    if processor.space_after_image:
        yield (
            "The original tokenises the text after an image like the beginning of a text. The chat template does so "
            "too; in prompts written by hand, put a space after <image>."
        )


def _llava_processor(config: MLPLlavaConfig, processor: ProcessorMixin, select: str) -> ProcessorMixin:
    """The processor of transformers' class."""
    ours = processor.image_processor
    names = ("size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale", "rescale_factor",
             "do_normalize", "image_mean", "image_std")  # fmt: skip
    fields = {name: getattr(ours, name) for name in names if getattr(ours, name, None) is not None}
    tokenizer = copy.deepcopy(processor.tokenizer)
    template = processor.chat_template
    if processor.space_after_image:
        template = re.sub(r"(<image>(?:<im_end>)?)(?=\\n|')", r"\1 ", template, count=1)
    options = {
        "patch_size": config.patch_size,
        "vision_feature_select_strategy": select,
        "num_additional_image_tokens": config.num_prefix_tokens or 0,
        "image_token": processor.image_token,
        "chat_template": template,
    }
    if processor.image_aspect_ratio == "anyres":
        images = LlavaNextImageProcessor(**fields, image_grid_pinpoints=config.image_grid_pinpoints)
        return LlavaNextProcessor(images, tokenizer, **options)
    images = ours if processor.image_aspect_ratio == "square" else LlavaImageProcessor(**fields, do_pad=True)
    return LlavaProcessor(images, tokenizer, **options)


__all__ = ["plan_llava", "refuse_llava"]
