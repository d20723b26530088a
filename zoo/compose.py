"""`compose`: any vision encoder, any language model, one bridge between them."""

from __future__ import annotations

import copy
import os

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .families import FAMILIES
from .modeling.modeling_bridged import BridgedModel, fill_vision_geometry
from .modeling.modeling_checkpoint import auto_class_for, build_part, commit_of, refuse_zero3, where_to_load
from .modeling.modeling_mpt import as_conditionable
from .processing import BridgedProcessor


logger = logging.get_logger(__name__)

Part = str | os.PathLike | PreTrainedConfig | PreTrainedModel


def _vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision tower's configuration, where a model with two towers (CLIP, SigLIP) was named."""
    return getattr(config, "vision_config", None) or config


def _resolve(part: str, given: Part, dtype, **hub_kwargs) -> tuple[PreTrainedModel, str | None, dict]:
    """Load or build one part.

    Returns:
        The model, where its tokenizer or image processor may be found, and where it came from.
    """
    refuse_zero3()
    if isinstance(given, PreTrainedModel):
        if part == "vision_model" and getattr(given.config, "vision_config", None) is not None:
            given = given.vision_model  # CLIP and SigLIP with both towers
        if part == "language_model":
            given = as_conditionable(given)
        name = given.name_or_path or None
        # its weights may have changed since: they are compared with the source's before a bridge is saved alone
        return given, name, {"source": name, "revision": commit_of(name) if name else None, "unverified": True}
    if isinstance(given, PreTrainedConfig):
        config = _vision_part(given) if part == "vision_model" else given
        model = build_part(part, copy.deepcopy(config))
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model, None, {"source": None, "revision": None}
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(
            f"{part.removesuffix('_model')} is a {type(given).__name__}; expected a Hub id, a folder, a configuration or a "
            "loaded model."
        )
    source = os.fspath(given)
    place = source if hub_kwargs.get("revision") else where_to_load(source)
    config = AutoConfig.from_pretrained(place, **hub_kwargs)
    if part == "vision_model":
        config = _vision_part(config)
    model = auto_class_for(part, config).from_pretrained(place, config=config, dtype=dtype, **hub_kwargs)
    revision = commit_of(place, **hub_kwargs) if place == source else None
    return model, place, {"source": os.path.abspath(source) if os.path.isdir(source) else source, "revision": revision}


def native_image_processor(vision_config: PreTrainedConfig):
    """An image processor of transformers for encoders that have none of their own.

    timm describes its preprocessing in `pretrained_cfg`; transformers' wrapper around it can be neither saved with a
    model nor used without torchvision. What it describes is a resize, a crop and a normalisation: CLIP's processor.

    Args:
        vision_config: The encoder's configuration.

    Returns:
        A `CLIPImageProcessor`; CLIP's mean and std where nothing else is known.

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


def _image_processor(given, name: str | None, vision_config: PreTrainedConfig, **hub_kwargs):
    if given is not None:
        return (
            AutoImageProcessor.from_pretrained(given, **hub_kwargs) if isinstance(given, (str, os.PathLike)) else given
        )
    if name is None or vision_config.model_type == "timm_wrapper":
        return native_image_processor(vision_config)
    try:
        return AutoImageProcessor.from_pretrained(name, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No image processor for the vision encoder in {name!r} ({str(error).splitlines()[0]}); pass image_processor="
            "<an image processor, a Hub id or a folder>."
        ) from error


def _tokenizer(given, name: str | None, **hub_kwargs) -> PreTrainedTokenizerBase:
    if isinstance(given, PreTrainedTokenizerBase):
        return copy.deepcopy(given)  # tokens are added below: the caller's stays as it is
    source = given if given is not None else name
    if source is None:
        raise ValueError(
            "The language model was given without a path, so its tokenizer is not known; pass tokenizer=<a tokenizer, a Hub "
            "id or a folder>."
        )
    try:
        return AutoTokenizer.from_pretrained(source, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer in {source!r} ({str(error).splitlines()[0]}); pass tokenizer=<a tokenizer, a Hub id or a folder>."
        ) from error


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> list[int]:
    """Make every token one special token; returns their ids."""
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def compose(
    vision: Part,
    language: Part,
    bridge: str = "mlp",
    *,
    tokenizer=None,
    image_processor=None,
    chat_template: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map=None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    **bridge_options,
) -> tuple[BridgedModel, BridgedProcessor]:
    """Put a fresh bridge between a vision encoder and a language model.

    Both are frozen: only `model.bridge` is trainable. Their weights and tables are not changed in any way.

    Args:
        vision: Vision encoder: Hub id, folder, configuration (random weights) or loaded model.
        language: Language model, likewise. Encoder-decoders (T5) work with `bridge="mlp"` and `"qformer"`.
        bridge: `"mlp"` (LLaVA), `"qformer"` (BLIP-2) or `"perceiver"` (Flamingo).
        tokenizer: The language model's tokenizer, where it is not found beside it: object, Hub id or folder.
        image_processor: The encoder's image processor, likewise.
        chat_template: Jinja template; the default is made from the tokenizer's own.
        dtype: Of all parts; `None` keeps what the checkpoints have, the bridge being in float32.
        device_map: `"auto"`, a device or a dict, as in `from_pretrained`.
        revision: Commit or branch of Hub ids; applies to both.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Don't ask the Hub.
        bridge_options: Fields of the family's configuration, such as `projector_type="linear"`, `num_latents=32`,
            `vision_feature_layer=-2` or `qformer_config={...}`; and its processor's `compose_options`, such as
            `image_aspect_ratio="anyres"` or `conversation="vicuna_v1"`. Of `"qformer"` also `qformer_init_from`: the BERT or
            the stage-1 checkpoint that the Q-Former begins as.

    Returns:
        Model (in eval mode) and processor.

    Raises:
        ValueError: An unknown bridge or option, or parts that do not fit together.
        TypeError: A part is none of what it may be.
    """
    if bridge not in FAMILIES:
        raise ValueError(f"bridge is {bridge!r}; expected one of {', '.join(map(repr, FAMILIES))}.")
    family = FAMILIES[bridge]
    known = set(family.config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    known -= {"vision_config", "text_config", "image_token_id", "special_token_ids", "frozen_parts", "bridge_only"}
    known |= {*family.processor_class.compose_options, *family.model_class.compose_options}
    if unknown := sorted(set(bridge_options) - known):
        raise ValueError(f"bridge={bridge!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}.")

    processor_options = {
        name: bridge_options.pop(name) for name in family.processor_class.compose_options if name in bridge_options
    }
    model_options = {
        name: bridge_options.pop(name) for name in family.model_class.compose_options if name in bridge_options
    }
    hub_kwargs = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    hub_kwargs = {name: value for name, value in hub_kwargs.items() if value}
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    vision_model, vision_name, vision_source = _resolve("vision_model", vision, wanted, **hub_kwargs)
    language_model, language_name, language_source = _resolve("language_model", language, wanted, **hub_kwargs)

    family.model_class.check_language_model(language_model)

    tokenizer = _tokenizer(tokenizer, language_name, **hub_kwargs)
    tokens = family.special_tokens or ("<image>",)
    token_ids = _add_tokens(tokenizer, tokens)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokens[-1]
    # only what is in init_kwargs is saved with a tokenizer
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"

    config = family.config_class(
        vision_config=vision_model.config,
        text_config=language_model.config,
        image_token_id=token_ids[0],
        special_token_ids=token_ids if family.special_tokens else None,
        frozen_parts={"vision_model": vision_source, "language_model": language_source},
        **bridge_options,
    )
    fill_vision_geometry(config)
    family.processor_class.complete_config(config, **processor_options)
    processor = family.processor_class.from_config(
        config,
        _image_processor(image_processor, vision_name, config.vision_config, **hub_kwargs),
        tokenizer,
        chat_template=chat_template,
        **processor_options,
    )
    model = family.model_class(config, vision_model=vision_model, language_model=language_model)
    if model_options:
        model.init_bridge(**model_options, **{name: value for name, value in hub_kwargs.items() if name != "revision"})
    if isinstance(wanted, torch.dtype):
        model.bridge.to(wanted)
    _set_generation_defaults(model, tokenizer, family.special_tokens)
    model.eval()
    if device_map is not None:
        model.dispatch(device_map)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(f"{bridge} bridge with {trainable:,} trainable parameters; both parts are frozen.")
    return model, processor


def _set_generation_defaults(model: BridgedModel, tokenizer: PreTrainedTokenizerBase, special_tokens) -> None:
    """Padding, and where generation ends."""
    defaults = model.generation_config
    if defaults.pad_token_id is None:
        defaults.pad_token_id = tokenizer.pad_token_id
    if defaults.eos_token_id is None:
        defaults.eos_token_id = tokenizer.eos_token_id
    if "<|endofchunk|>" in special_tokens:
        ends = defaults.eos_token_id if isinstance(defaults.eos_token_id, list) else [defaults.eos_token_id]
        ends = [end for end in ends if end is not None] + [tokenizer.convert_tokens_to_ids("<|endofchunk|>")]
        defaults.eos_token_id = list(dict.fromkeys(ends))


__all__ = ["compose", "native_image_processor"]
