"""`compose` puts a bridge between any vision encoder and any language model."""

from __future__ import annotations

import os

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase
from transformers.utils import logging

from .families import FAMILIES
from .modeling.modeling_assembly import assemble, options_of
from .modeling.modeling_bridged import BridgedModel
from .modeling.modeling_parts import Part
from .processing.processing_bridged import BridgedProcessor
from .processing.processing_parts import native_image_processor


logger = logging.get_logger(__name__)


def compose(
    vision: Part,
    language: Part,
    bridge: str = "mlp",
    *,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    image_processor: BaseImageProcessor | str | os.PathLike | None = None,
    chat_template: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    **bridge_options,
) -> tuple[BridgedModel, BridgedProcessor]:
    """Put a new bridge between a vision encoder and a language model.

    Both parts are frozen: only `model.bridge` is trainable. Their weights and embedding tables are not changed.

    Args:
        vision: Vision encoder: Hub id, folder, configuration (random weights) or loaded model.
        language: Language model: Hub id, folder, configuration (random weights) or loaded model. Encoder-decoders (T5)
            work with `bridge="mlp"` and `"qformer"`.
        bridge: `"mlp"` (LLaVA), `"qformer"` (BLIP-2) or `"perceiver"` (Flamingo).
        tokenizer: The language model's tokenizer: object, Hub id or folder; by default it is loaded from the language
            model's repository.
        image_processor: The encoder's image processor: object, Hub id or folder; by default it is loaded from the
            encoder's repository.
        chat_template: Jinja template; the default is built from the tokenizer's template.
        dtype: Data type of all parts; `None` keeps the checkpoints' data types and a float32 bridge.
        device_map: `"auto"`, a device or a dict, as in `from_pretrained`.
        revision: Commit or branch of the Hub ids; it applies to both.
        token: Hub token.
        cache_dir: Folder of the Hub's cache.
        local_files_only: Use local files only, without network access.
        bridge_options: Fields of the family's configuration, such as `projector_type="linear"`, `num_latents=32`,
            `vision_feature_layer=-2` or `qformer_config={...}`; and its processor's `compose_options`, such as
            `image_aspect_ratio="anyres"` or `conversation="vicuna_v1"`. `"qformer"` also accepts `qformer_init_from`,
            the BERT or stage-1 checkpoint to initialise the Q-Former with. `"mlp"` accepts `projector_init_from`, an
            image classifier with this encoder: the bridge then begins by naming the classifier's classes. With it go
            `class_names` (words for all classes, a mapping for some, or `"everyday"` for ImageNet's), `free_units`
            (hidden units beside the classes), `class_threshold` (4.5, the logit from which a class is named) and
            `class_name_scale` (0.25, the length of its name's embedding per logit above the threshold).

    Returns:
        Model (in eval mode) and processor.

    Raises:
        ValueError: The bridge or an option is unknown, or the parts do not fit together.
        TypeError: A part has an unsupported type.
    """
    if bridge not in FAMILIES:
        raise ValueError(f"bridge is {bridge!r}; expected one of {', '.join(map(repr, FAMILIES))}.")
    family = FAMILIES[bridge]
    known = options_of(family.model_class, family.processor_class)
    if unknown := sorted(set(bridge_options) - known):
        raise ValueError(f"bridge={bridge!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    model, processor = assemble(
        family.model_class, family.processor_class, vision, language,
        tokenizer=tokenizer, image_processor=image_processor, chat_template=chat_template, dtype=dtype,
        device_map=device_map, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
        **bridge_options,
    )  # fmt: skip
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(f"{bridge} bridge with {trainable:,} trainable parameters; both parts are frozen.")
    return model, processor


__all__ = ["compose", "native_image_processor"]
