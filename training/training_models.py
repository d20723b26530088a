"""The model that a recipe trains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..compat import attention_of, set_hf_deepspeed_config, unset_hf_deepspeed_config
from ..compose import compose
from ..extensions import where_to_load
from ..families import FAMILIES
from ..modeling import QFormerBlip2ForConditionalGeneration, QFormerBlip2ForPreTraining
from ..modeling.modeling_pins import FROZEN_PARTS
from ..modeling.modeling_qformer_pretraining import QFormerBlip2Stage1Model
from ..processing.processing_backends import as_described
from ..processing.processing_qformer import bert_tokenizer
from .training_recipes import Recipe, RecipeError


@contextmanager
def without_zero3_init(args: TrainingArguments) -> Iterator[None]:
    """Build models with all their tensors in every process, even if DeepSpeed's ZeRO-3 will shard them afterwards.

    As soon as there are `TrainingArguments` with ZeRO-3, transformers shards each part while it is loaded: its tensors
    are empty then, but a bridge's own tensors start with values that depend on those of the parts.

    Args:
        args: The trainer's arguments.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    config = getattr(args, "hf_deepspeed_config", None) or plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def build_model(recipe: Recipe):
    """Build the model that a recipe trains: load its parts, freeze the right ones, add LoRA.

    Args:
        recipe: The recipe.

    Returns:
        The model and its processor.

    Raises:
        RecipeError: `from` names a model of another kind than the recipe needs, or the language model can't compute
            attention as the recipe says.
        ValueError: Parts do not fit together.
        OSError: They can't be loaded.
    """
    given = {"tokenizer": recipe.tokenizer, "image_processor": recipe.image_processor, "dtype": recipe.dtype}
    options = {**{name: value for name, value in given.items() if value is not None}, **recipe.bridge_options}
    if recipe.stage == "classification":
        model, processor = build_classifier(recipe, options)
    elif recipe.from_ is not None:
        source = os.path.expanduser(recipe.from_)
        if recipe.language is not None:
            model, processor = QFormerBlip2ForConditionalGeneration.from_stage1(source, recipe.language, **options)
        else:
            if options.keys() - {"dtype"}:
                raise RecipeError(f"from brings its own bridge and processor: leave {', '.join(sorted(options))} out.")
            model = AutoModel.from_pretrained(source, dtype=recipe.dtype or "auto")
            processor = AutoProcessor.from_pretrained(source)
    elif recipe.stage == "stage1":
        tokenizer = framing_tokenizer(options.pop("tokenizer"))
        model, processor = QFormerBlip2ForPreTraining.from_vision(recipe.vision, tokenizer, **options)
    else:
        model, processor = compose(recipe.vision, recipe.language, recipe.bridge, **options)
    if isinstance(model, QFormerBlip2Stage1Model) != (recipe.stage == "stage1"):
        raise RecipeError(f"stage is {recipe.stage!r}, but {recipe.from_} is a {type(model).__name__}.")
    if recipe.attn_implementation is not None:
        _set_attention(model.language_model, recipe.attn_implementation)
    model.freeze(**{part: part in recipe.freeze for part in FROZEN_PARTS})
    if recipe.arguments.get("bf16") or recipe.arguments.get("fp16"):
        for parameter in model.parameters():
            if parameter.requires_grad:  # updates are too small for half precision; autocast computes in it
                parameter.data = parameter.data.float()
    if recipe.lora is not None:
        from peft import get_peft_model

        from .training_peft import lora_config

        model = get_peft_model(model, lora_config(model, **recipe.lora))
    return model, processor


def _set_attention(language_model: PreTrainedModel, implementation: str) -> None:
    reason: object = "it has one implementation only"
    try:
        language_model.set_attn_implementation(implementation)  # some models only warn
    except (ValueError, ImportError, RuntimeError) as error:
        reason = error
    now = attention_of(language_model.config.get_text_config())
    if now != implementation:
        raise RecipeError(
            f"attn_implementation is {implementation!r}, but {type(language_model).__name__} keeps {now!r}: "
            f"{' '.join(str(reason).split())}. Leave attn_implementation out, or choose another one."
        )


def framing_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A tokenizer for stage 1, whose texts begin and end with a token of their own, as BERT's do.

    Args:
        source: Folder or Hub id of the tokenizer; it gets such tokens if it has none.
    """
    tokenizer = bert_tokenizer(where_to_load(source))
    begin, end = tokenizer.cls_token or tokenizer.bos_token, tokenizer.sep_token or tokenizer.eos_token
    ids = tokenizer("a")["input_ids"]
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (begin, end)]
    if [ids[0], ids[-1]] != ends:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A {end}", special_tokens=list(zip((begin, end), ends))
        )
    return tokenizer


def build_classifier(recipe: Recipe, options: dict):
    """Build a classifier: a fresh one, one on a trained bridge, or one that was trained before.

    Args:
        recipe: The recipe.
        options: Of the parts and the bridge.

    Returns:
        The model and its image processor.

    Raises:
        RecipeError: `from` has no bridge to classify with, or options are given for a classifier that has them already.
    """
    if recipe.from_ is None:
        return FAMILIES[recipe.bridge].classifier_class.from_vision(recipe.vision, **options)
    source = os.path.expanduser(recipe.from_)
    kind = AutoConfig.from_pretrained(source).model_type
    for classifier in (family.classifier_class for family in FAMILIES.values()):
        if kind == classifier.config_class.model_type:
            if options.keys() - {"dtype"}:
                raise RecipeError(f"{recipe.from_} has its classes already: leave {', '.join(sorted(options))} out.")
            image_processor = as_described(AutoImageProcessor.from_pretrained(source))
            return classifier.from_pretrained(source, **options), image_processor
        if kind in [model.config_class.model_type for model in classifier.begins_as]:
            return classifier.from_bridge(source, **options)
    raise RecipeError(f"{recipe.from_} holds a {kind!r} model, which has no bridge to classify with.")


__all__ = ["build_classifier", "build_model", "framing_tokenizer", "without_zero3_init"]
