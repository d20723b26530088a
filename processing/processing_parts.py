"""The parts of a processor: a vision encoder's image processor and a language model's tokenizer."""

from __future__ import annotations

import copy
import os

from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .processing_backends import as_described


def native_image_processor(vision_config: PreTrainedConfig) -> CLIPImageProcessor:
    """Build an image processor of transformers for an encoder that comes without one.

    timm describes its preprocessing in `pretrained_cfg`; transformers' wrapper around it can be neither saved with a
    model nor used without torchvision. The preprocessing is a resize, a crop and a normalisation, like CLIP's.

    Args:
        vision_config: The encoder's configuration.

    Returns:
        A `CLIPImageProcessor`, with CLIP's mean and std if the configuration does not give them.

    Raises:
        ValueError: timm's crop mode is not "center" or "squash".
    """
    description = getattr(vision_config, "pretrained_cfg", None) or {}
    side = description.get("input_size", [3, None, None])[-1] or getattr(vision_config, "image_size", None) or 224
    side = side[0] if isinstance(side, (list, tuple)) else side
    scaled = int(side / (description.get("crop_pct") or 1.0))
    mode = description.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ValueError(f"timm's crop_mode {mode!r} has no counterpart in transformers; pass image_processor=.")
    options = {}
    for name in ("mean", "std"):
        if name in description:
            options[f"image_{name}"] = list(description[name])
    resample = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[description.get("interpolation") or "bicubic"]
    return CLIPImageProcessor(
        size={"shortest_edge": scaled} if mode == "center" else {"height": scaled, "width": scaled},
        crop_size={"height": side, "width": side},
        resample=resample,
        **options,
    )


def load_image_processor(
    given: BaseImageProcessor | str | os.PathLike | None,
    name: str | None,
    vision_config: PreTrainedConfig,
    **hub_kwargs,
) -> BaseImageProcessor:
    """Load the image processor of a vision encoder.

    Args:
        given: An image processor, its Hub id or folder, or `None`. One that names its backend computes with it, see
            `processing_backends`.
        name: Hub id or folder of the vision encoder, used if `given` is `None`.
        vision_config: The vision encoder's configuration.
        hub_kwargs: `revision`, `token` and other arguments of `from_pretrained`.

    Raises:
        ValueError: The vision encoder comes without an image processor.
    """
    if given is not None:
        if isinstance(given, (str, os.PathLike)):
            given = AutoImageProcessor.from_pretrained(given, **hub_kwargs)
        return as_described(given)
    if name is None or vision_config.model_type == "timm_wrapper":
        return native_image_processor(vision_config)
    try:
        return as_described(AutoImageProcessor.from_pretrained(name, **hub_kwargs))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No image processor for the vision encoder in {name!r} ({str(error).splitlines()[0]}); pass "
            "image_processor=<an image processor, a Hub id or a folder>."
        ) from error


def load_tokenizer(
    given: PreTrainedTokenizerBase | str | os.PathLike | None, name: str | None, **hub_kwargs
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model.

    Args:
        given: A tokenizer, which is copied, its Hub id or folder, or `None`.
        name: Hub id or folder of the language model, used if `given` is `None`.
        hub_kwargs: `revision`, `token` and other arguments of `from_pretrained`.

    Raises:
        ValueError: There is no tokenizer, or both `given` and `name` are `None`.
    """
    if isinstance(given, PreTrainedTokenizerBase):
        return copy.deepcopy(given)  # tokens are added to the copy
    source = given if given is not None else name
    if source is None:
        raise ValueError(
            "The language model was given without a path, so its tokenizer is not known; pass tokenizer=<a tokenizer, "
            "a Hub id or a folder>."
        )
    try:
        return AutoTokenizer.from_pretrained(source, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer in {source!r} ({str(error).splitlines()[0]}); pass tokenizer=<a tokenizer, a Hub id or a "
            "folder>."
        ) from error


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> list[int]:
    """Add every token as one special token, and return their ids."""
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


__all__ = ["add_tokens", "load_image_processor", "load_tokenizer", "native_image_processor"]
