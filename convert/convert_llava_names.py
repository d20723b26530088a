"""Names of the tensors in LLaVA's checkpoints: the official layout, that of transformers, and the spellings of both."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..configuration.configuration_llava import MLPLlavaConfig
from .convert_files import layer_numbers
from .convert_language import language_table
from .convert_tables import BUFFER, ConversionError, Drop, Rename, Rule, Shapes


# from the names that different ways of saving give a tensor to the usual ones: those of the official class, and those
# of the repositories `llava-hf/*`
SPELLINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "official": (
        (r"(module\.|_forward_module\.|base_model\.model\.)+", ""),  # distributed training, PEFT
        (r"mm_projector\.", "model.mm_projector."),
        # since transformers 5, CLIP's names lack this level
        (r"model\.vision_tower\.vision_tower\.(?!vision_model\.)", "model.vision_tower.vision_tower.vision_model."),
    ),
    "transformers": (
        (r"(module\.|base_model\.model\.)+", ""),
        (r"model\.language_model\.", "language_model.model."),  # from transformers 4.52 on
        (r"lm_head\.", "language_model.lm_head."),
        (r"model\.(multi_modal_projector|vision_tower|image_newline)", r"\1"),
        (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    ),
}
# where each layout keeps the language model, the vision tower and the end of a line of tiles
PREFIXES = {
    "official": ("", "model.vision_tower.vision_tower.vision_model.", "model.image_newline"),
    "transformers": ("language_model.", "vision_tower.vision_model.", "image_newline"),
}
LLAVA_LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
IMAGE_BORDERS = ("<im_start>", "<im_end>")
EMBEDDING = "model.embed_tokens.weight"


def layout_of(keys: Iterable[str]) -> str:
    """The layout that keys belong to: `"official"` or `"transformers"`."""
    theirs = re.compile(r"(.*\.)?(multi_modal_projector|language_model)\..*")
    return "transformers" if any(theirs.fullmatch(key) for key in keys) else "official"


def usual_names(keys: Iterable[str], layout: str) -> dict[str, str]:
    """Map a checkpoint's keys to the usual names of its layout; see `SPELLINGS`.

    Args:
        keys: The keys.
        layout: See `layout_of`.

    Raises:
        ConversionError: Two keys stand for one tensor.
    """
    names: dict[str, str] = {}
    for key in keys:
        name = key
        for spelling, usual in SPELLINGS[layout]:
            name = re.sub(f"^{spelling}", usual, name)
        if name in names:
            raise ConversionError(f"{names[name]} and {key} are two names of {name}.")
        names[name] = key
    return {key: name for name, key in names.items()}


def projector_layers(shapes: Shapes, layout: str) -> list[str]:
    """Names of the projector's linear layers, in order.

    Args:
        shapes: The checkpoint's shapes, by the usual names of its layout.
        layout: See `layout_of`.

    Raises:
        ConversionError: The projector is neither linear nor an MLP.
    """
    if layout == "transformers":
        start, first, step = "multi_modal_projector.linear_", 1, 1
    elif "model.mm_projector.weight" in shapes:
        return ["model.mm_projector"]
    else:
        start, first, step = "model.mm_projector.", 0, 2  # every other one is a GELU, which has no tensors
    numbers = layer_numbers(shapes, rf"{re.escape(start)}(\d+)\.(?:weight|bias)$")
    layers = [f"{start}{first + step * index}" for index in range(len(numbers))]
    known = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    if other := {key for key in shapes if re.match(r"(model\.mm|multi_modal)_projector\.", key)} - known:
        raise ConversionError(
            f"The projector has {min(other)}: it is neither linear nor an MLP of linear layers with GELU between them."
        )
    return layers


def projector_table(config: MLPLlavaConfig, layout: str) -> list[Rule]:
    """The conversion table of the projector.

    Args:
        config: The converted model's configuration.
        layout: See `layout_of`.
    """
    table: list[Rule] = []
    for number in range(1, config.projector_depth + 1):
        if layout == "transformers":
            official = f"multi_modal_projector.linear_{number}"
        elif config.projector_type == "linear":
            official = "model.mm_projector"
        else:
            official = f"model.mm_projector.{2 * (number - 1)}"
        kinds = ("weight", "bias") if config.projector_bias else ("weight",)
        table += [Rename(f"{official}.{kind}", f"bridge.linear_{number}.{kind}") for kind in kinds]
    return table


def checkpoint_table(config: MLPLlavaConfig, tensors: Iterable[str], layout: str = "official") -> list[Rule]:
    """The conversion table of a whole checkpoint of LLaVA.

    Args:
        config: The converted model's configuration.
        tensors: Names of the converted model's tensors.
        layout: See `layout_of`.
    """
    language, vision, newline = PREFIXES[layout]
    tensors = list(tensors)
    table = projector_table(config, layout)
    if config.has_image_newline:
        table.append(Rename(newline, "bridge.image_newline"))
    else:
        table.append(Drop(newline, "nothing ends with it at one resolution"))
    for name in tensors:
        if name.startswith("vision_model."):
            table.append(Rename(vision + re.sub(r"^vision_model\.(vision_model\.)?", "", name), name))
    table.append(Drop(f"{vision}embeddings.position_ids", BUFFER))
    table += language_table(config.text_config, tensors, source=language)
    return table


__all__ = [
    "EMBEDDING",
    "IMAGE_BORDERS",
    "LLAVA_LANGUAGE_MODELS",
    "PREFIXES",
    "checkpoint_table",
    "layout_of",
    "projector_layers",
    "usual_names",
]
