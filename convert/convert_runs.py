"""Runs of both models of a conversion on the same inputs, and the comparison of their outputs."""

from __future__ import annotations

import os

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoModel, AutoProcessor, ProcessorMixin

from ..processing.processing_backends import BACKENDS
from .convert_tables import ConversionError


# of the largest logit: beyond this, two models are not the same
LARGEST_RELATIVE_DIFFERENCE = 1e-2
NEW_TOKENS = 8
PILLOW_NOTE = (
    "Pixels: the original resizes pictures with Pillow. Transformers' classes do it with torchvision where it is "
    "installed, and then some pixels differ by a dozen grey levels; AutoProcessor.from_pretrained(..., backend='pil') "
    "gives the original's."
)


def fixed_image(height: int = 64, width: int = 96) -> Image.Image:
    """An image of two gradients, the same on every machine; sizes in pixels."""
    red, green = torch.meshgrid(
        torch.arange(width) * 255 // (width - 1), torch.arange(height) * 255 // (height - 1), indexing="xy"
    )
    return Image.fromarray(torch.stack([red, green, (red + green) // 2], dim=-1).to(torch.uint8).numpy())


def compare_outputs(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> dict:
    """Compare the outputs of two models.

    Args:
        ours: Output of the model of vlbridge, `(..., n)`.
        theirs: Output of the other model, `(..., m)`; if it has more tokens, m > n, the last ones are ignored.
        what: Name of the output.

    Returns:
        The entry of the certificate, with the largest difference.

    Raises:
        ConversionError: They differ by more than rounding explains.
    """
    theirs = theirs[..., : ours.shape[-1]]
    difference, largest = (ours - theirs).abs().max().item(), ours.abs().max().item()
    if not difference <= LARGEST_RELATIVE_DIFFERENCE * largest:  # NaN too
        raise ConversionError(
            f"On the same input {what} differ by {difference:.3g} (the largest is {largest:.3g}): the two models are "
            "not the same, and nothing was written."
        )
    return {"what": what, "shape": list(ours.shape), "largest_difference": difference, "largest_value": largest}


def load_processors(ours: str | os.PathLike, theirs: str | os.PathLike) -> tuple[ProcessorMixin, ProcessorMixin]:
    """Load the processors of both models so that they compute pixels in the same way.

    Args:
        ours: Folder or Hub id of the model of vlbridge.
        theirs: Folder or Hub id of transformers' model.
    """
    processor = AutoProcessor.from_pretrained(ours)
    backend = getattr(processor.image_processor, "backend", None)
    return processor, AutoProcessor.from_pretrained(theirs, **({"backend": backend} if backend in BACKENDS else {}))


def run_generation(model, processor, other, other_processor, prompts: tuple[str, str]) -> list[dict]:
    """Compare two generating models on one image and one prompt.

    Args:
        model: The model of vlbridge.
        processor: Its processor.
        other: The model of transformers.
        other_processor: Its processor.
        prompts: The prompt as each of the two processors takes it.

    Returns:
        What was compared, with the largest differences.

    Raises:
        ConversionError: Their logits differ by more than rounding explains.
    """
    image = fixed_image()
    ours = processor(images=[image], text=[prompts[0]], return_tensors="pt")
    theirs = other_processor(images=[image], text=[prompts[1]], return_tensors="pt")
    found = []
    same_prompt = torch.equal(ours["input_ids"], theirs["input_ids"])
    found.append({"what": "token ids of the prompt", "equal": same_prompt, "shape": list(ours["input_ids"].shape)})
    pixels = ours["pixel_values"], theirs["pixel_values"].reshape(ours["pixel_values"].shape)
    found.append(
        {"what": "pixel_values", "shape": list(pixels[0].shape),
         "largest_difference": (pixels[0] - pixels[1]).abs().max().item()}
    )  # fmt: skip
    ours["pixel_values"] = pixels[1]  # the models are compared on the same pixels
    if not same_prompt:
        theirs["input_ids"], theirs["attention_mask"] = ours["input_ids"], ours["attention_mask"]
    decoder = {}
    if model.config.is_encoder_decoder:
        start = model.config.text_config.decoder_start_token_id
        decoder["decoder_input_ids"] = torch.tensor([[start, *range(3, 3 + NEW_TOKENS)]])
    with torch.no_grad():
        logits = model(**ours, **decoder).logits.float(), other(**theirs, **decoder).logits.float()
        found.append(compare_outputs(*logits, "logits"))
        greedy = {
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "num_beams": 1,
            "do_sample": False,
            "repetition_penalty": 1.0,
        }
        tokens = [
            given.generate(**inputs, **greedy)[
                :, 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1] :
            ]
            for given, inputs in ((model, ours), (other, theirs))
        ]
    found.append(
        {"what": "greedy tokens", "equal": tokens[0].tolist() == tokens[1].tolist(), "shape": list(tokens[0].shape)}
    )
    return found


def run_retrieval(model, processor, other, other_processor, texts: tuple[str, ...]) -> list[dict]:
    """Compare two retrieval models on one image and several texts.

    Args:
        model: The model of vlbridge.
        processor: Its processor.
        other: The model of transformers.
        other_processor: Its processor.
        texts: The texts that the image is compared with.

    Returns:
        What was compared, with the largest differences.

    Raises:
        ConversionError: Their scores differ by more than rounding explains.
    """
    images = [fixed_image()] * len(texts)
    ours = processor(images=images, text=list(texts), return_tensors="pt")
    theirs = other_processor(images=images, text=list(texts), return_tensors="pt", padding=True)
    found = [
        {"what": "token ids of the texts", "equal": torch.equal(ours["input_ids"], theirs["input_ids"]),
         "shape": list(ours["input_ids"].shape)}
    ]  # fmt: skip
    with torch.no_grad():
        found.append(
            compare_outputs(
                model(**ours).itc_scores.float(), other(**ours).logits_per_image.float(), "contrastive scores"
            )
        )
        heads = {"use_image_text_matching_head": True}
        found.append(
            compare_outputs(
                model(**ours, **heads).itm_logits.float(),
                other(**ours, **heads).logits_per_image.float(),
                "matching logits",
            )
        )
    return found


def run_llava(ours: str | os.PathLike, theirs: str | os.PathLike, model_class) -> list[dict]:
    """Compare an MLP-LLaVA with transformers' class on the same input, in float32.

    Args:
        ours: Folder or Hub id of the model of vlbridge.
        theirs: Folder or Hub id of transformers' model.
        model_class: Its class.

    Returns:
        What was compared, with the largest differences.

    Raises:
        ConversionError: Their logits differ by more than rounding explains, or weights are missing.
    """
    other, info = model_class.from_pretrained(theirs, dtype=torch.float32, output_loading_info=True)
    if any(info.values()):
        raise ConversionError(f"Transformers' class does not find all of its tensors: {info}.")
    model = AutoModel.from_pretrained(ours, dtype=torch.float32)
    processors = load_processors(ours, theirs)
    prompts = _llava_prompts(*processors)
    return run_generation(model.eval(), processors[0], other.eval(), processors[1], prompts)


def _llava_prompts(ours: ProcessorMixin, theirs: ProcessorMixin) -> tuple[str, str]:
    """A question as each of the two processors takes it: as a conversation, if both have a template with an image."""
    asked, token = ours.caption_prompt, ours.image_token
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
    try:
        prompts = tuple(
            processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            for processor in (ours, theirs)
        )
        if all(prompt.count(token) == 1 for prompt in prompts):
            return prompts
    except (ValueError, TemplateError):  # no template, or one that needs other messages
        pass
    return f"{token}\n{asked}", f"{token}{' ' if ours.space_after_image else ''}\n{asked}"


__all__ = [
    "PILLOW_NOTE",
    "compare_outputs",
    "fixed_image",
    "load_processors",
    "run_generation",
    "run_llava",
    "run_retrieval",
]
