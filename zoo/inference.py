"""Inference: load a bridged model and its processor by name, and answer about batches of images."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor

from .assets import default_model, embedded_models
from .configuration import BridgedConfig
from .configuration.configuration_classification import ClassificationConfigMixin
from .modeling import BridgedModel


DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_NEW_TOKENS = 40
BATCH_SIZE = 8


# ---------------------------------------------------------------------- loading


def device_and_dtype(device: str | None = None, dtype: str | None = None) -> tuple[torch.device, str]:
    """Check where and in which precision to run, and fill in what is not given.

    Args:
        device: Name of a device; `None` takes cuda if there is one, else mps, else cpu.
        dtype: One of `DTYPES`; `None` takes float32 on the cpu and bfloat16 on other devices.

    Returns:
        The device and the name of the dtype.

    Raises:
        ValueError: There is no such device or dtype.
        RuntimeError: This machine does not have the device.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; expected cpu, cuda, cuda:<number>, mps...") from error
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RuntimeError(f"device {device}: {error}") from error
    return chosen, dtype or ("float32" if chosen.type == "cpu" else "bfloat16")


def model_source(model: str | os.PathLike | None = None) -> str:
    """Where a model is loaded from: a folder or Hub id.

    Args:
        model: Folder, which may begin with `~`, or Hub id; `None` and `"embedded"` are the embedded bridge
            (and `"embedded-mlp"` the one of a family), unless a folder has the name.
    """
    if model is None:
        return default_model()
    source = os.path.expanduser(os.fspath(model))
    return source if os.path.isdir(source) else embedded_models().get(source, source)


def bridged_config(source: str, generates: bool = False) -> BridgedConfig:
    """Configuration of a bridged model.

    Args:
        source: Folder or Hub id.
        generates: Accept only models that generate text with a language model.

    Returns:
        The configuration.

    Raises:
        ValueError: The model is not a bridged one, or it has no language model and `generates` is set.
        OSError: There is no configuration.
    """
    config = AutoConfig.from_pretrained(source)
    if not isinstance(config, BridgedConfig):
        raise ValueError(f"it is a {config.model_type!r} model, not a bridged one")
    if generates and config.text_config is None:
        task = "classification" if isinstance(config, ClassificationConfigMixin) else "retrieval_coco"
        raise ValueError(
            f"it is a {config.model_type!r} model, which has no language model to answer with; what it can do: "
            f"vlbridge evaluate --task {task}, and info, push and train (from:)"
        )
    return config


def load(model: str | os.PathLike | None = None, device: str | torch.device | None = None, dtype: str | None = None):
    """Load a bridged model that generates text, and its processor.

    Args:
        model: Folder or Hub id; `None` takes the embedded bridge.
        device: Where to put it; `None` takes cuda if there is one, else mps, else cpu.
        dtype: One of `DTYPES`; `None` takes float32 on the cpu and bfloat16 on other devices.

    Returns:
        The model, in eval mode, and the processor.

    Raises:
        ValueError: There is no such device or dtype, or the model is not a bridged one that generates text.
        RuntimeError: This machine does not have the device.
        OSError: There is no such model.
    """
    chosen, dtype = device_and_dtype(None if device is None else str(device), dtype)
    source = model_source(model)
    bridged_config(source, generates=True)
    processor = AutoProcessor.from_pretrained(source)
    loaded = AutoModel.from_pretrained(source, dtype=dtype)
    return loaded.to(chosen).eval(), processor


# ---------------------------------------------------------------------- answers


def generate_texts(
    model: BridgedModel, processor, inputs, *, max_new_tokens: int = MAX_NEW_TOKENS, **options
) -> list[str]:
    """Generate one text per row, greedily unless `options` say otherwise.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        inputs: What the processor made of a batch of prompts, padded on the left; on any device.
        max_new_tokens: Maximum length of a text, in tokens.
        options: Further arguments of `generate`.

    Returns:
        The generated texts, without the prompts and without surrounding whitespace.
    """
    inputs = inputs.to(model.device)
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **options})
    if not model.config.is_encoder_decoder:  # decoders repeat the prompt
        generated = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(generated, skip_special_tokens=True)]


def question_inputs(processor, images: Sequence[Image.Image], prompt: str):
    """Ask the same question about every image of a batch: what `generate` takes.

    Args:
        processor: The model's processor.
        images: RGB images.
        prompt: The question.

    Returns:
        Model inputs, a row per image, padded on the side that the tokenizer pads on.
    """
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        for image in images
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def answer(
    model: BridgedModel,
    processor,
    images: Sequence[Image.Image],
    prompt: str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    **options,
) -> list[str]:
    """Ask the same question about every image.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        images: RGB images.
        prompt: The question; `processor.caption_prompt` asks for a caption.
        max_new_tokens: Maximum length of an answer, in tokens.
        batch_size: Number of images per batch.
        options: Further arguments of `generate`; it decodes greedily unless they say otherwise.

    Returns:
        One text per image.
    """
    texts = []
    for start in range(0, len(images), batch_size):
        inputs = question_inputs(processor, images[start : start + batch_size], prompt)
        texts += generate_texts(model, processor, inputs, max_new_tokens=max_new_tokens, **options)
    return texts


def answer_each(
    model: BridgedModel, processor, images: Sequence[Image.Image], prompt: str, **options
) -> list[str | ValueError]:
    """Ask the same question about every image of one batch, where the model may refuse some of them.

    A batch that is refused is asked again image by image, so that one image does not cost the others their answers.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        images: RGB images; they are one batch.
        prompt: The question.
        options: Further arguments of `answer` other than `batch_size`.

    Returns:
        For each image its text, or the error that the model raised for it.
    """
    try:
        return list(answer(model, processor, images, prompt, batch_size=max(len(images), 1), **options))
    except ValueError as error:
        if len(images) == 1:
            return [error]
    return [text for image in images for text in answer_each(model, processor, [image], prompt, **options)]


def caption(model: BridgedModel, processor, images: Sequence[Image.Image], **options) -> list[str]:
    """Caption images with the prompt that the processor has for it.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        images: RGB images.
        options: Further arguments of `answer`.

    Returns:
        One caption per image.
    """
    return answer(model, processor, images, processor.caption_prompt, **options)


def answer_few_shot(
    model: BridgedModel,
    processor,
    demonstrations: Sequence[Sequence[dict]],
    queries: Sequence[dict],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    **options,
) -> list[str]:
    """Answer queries after demonstrations, in the family's own few-shot prompt.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        demonstrations: For each query the examples that its prompt shows, in that order: `{"image", "caption"}` or
            `{"image", "question", "answer"}`; see `BridgedProcessor.few_shot`.
        queries: `{"image"}` for a caption, `{"image", "question"}` for an answer.
        max_new_tokens: Maximum length of an answer, in tokens.
        batch_size: Number of queries per batch.
        options: Further arguments of `generate`; it decodes greedily unless they say otherwise.

    Returns:
        One text per query.

    Raises:
        ValueError: There is not one list of demonstrations per query, or one of them can't be read.
    """
    if len(demonstrations) != len(queries):
        raise ValueError(
            f"{len(queries)} queries, but demonstrations for {len(demonstrations)}: give a list per query."
        )
    texts = []
    for start in range(0, len(queries), batch_size):
        batch = slice(start, start + batch_size)
        inputs = processor.few_shot([list(shown) for shown in demonstrations[batch]], list(queries[batch]))
        texts += generate_texts(model, processor, inputs, max_new_tokens=max_new_tokens, **options)
    return texts


__all__ = [
    "BATCH_SIZE",
    "DTYPES",
    "MAX_NEW_TOKENS",
    "answer",
    "answer_each",
    "answer_few_shot",
    "bridged_config",
    "caption",
    "device_and_dtype",
    "generate_texts",
    "load",
    "model_source",
    "question_inputs",
]
