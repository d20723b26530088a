"""LLaVA's checkpoints: v1, v1.5 and v1.6 (NeXT) of the official code, and `llava-hf/*` of transformers.

These are whole models, with or without the vision tower; projectors alone (`mm_projector.bin`); and LoRA fine-tunes
(`adapter_model` and `non_lora_trainables.bin`), which are merged into the language model.

Source: `llava/model/{builder,llava_arch}.py`, `llava/model/multimodal_projector/builder.py`, `llava/model/
multimodal_encoder/clip_encoder.py`, `llava/train/train.py` and `llava/mm_utils.py` of llava-torch 1.2.2.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from ..configuration.configuration_llava import MLPLlavaConfig
from ..modeling.modeling_bridge import fill_vision_geometry
from ..modeling.modeling_llava import MLPLlavaForConditionalGeneration
from .convert_assembly import Conversion, assemble, expected_tensors
from .convert_files import TensorFiles, dimensions
from .convert_llava_checkpoint import (
    Checkpoint,
    Settings,
    find_file,
    infer_projector,
    open_checkpoint,
    read_settings,
    transformers_config,
)
from .convert_llava_names import EMBEDDING, checkpoint_table, projector_layers
from .convert_llava_processor import (
    TOKENIZER_FILES,
    build_processor,
    end_tokens,
    load_image_processor,
    load_tokenizer,
)
from .convert_runs import run_llava
from .convert_sources import Change, Renamed, resized, with_rows
from .convert_tables import ConversionError, dropped, plan
from .convert_vision import read_vision_config, vision_pieces


def new_rows(files, key: str, rows: int, num_tokens: int) -> Change:
    """The change that puts rows trained with the projector at the end of an embedding table.

    Args:
        files: The projector's checkpoint.
        key: Its table: a whole one, of which the last rows are taken, or these rows alone.
        rows: Rows of the resulting table.
        num_tokens: Number of tokens that were added.

    Source: `initialize_vision_tokenizer` in `llava/model/llava_arch.py`.
    """

    def apply(table: torch.Tensor) -> torch.Tensor:
        trained = files.read(key)[-num_tokens:].to(table.dtype)
        return torch.cat([with_rows(table, rows)[:-num_tokens], trained])

    return Change(apply, lambda shape: (rows, *shape[1:]), (files,))


def plan_conversion(
    checkpoint: Checkpoint, vision, base: Checkpoint | None, config: MLPLlavaConfig, num_new_tokens: int = 0
) -> Conversion:
    """Find where every tensor of the converted model comes from; no tensor is read yet.

    Args:
        checkpoint: LLaVA's checkpoint.
        vision: `TensorFiles` of the vision encoder; `None` if the checkpoint holds it.
        base: The language model that the checkpoint belongs to; `None` if it holds its own.
        config: The converted model's configuration.
        num_new_tokens: Number of tokens whose rows were trained with a projector: `<im_start>` and `<im_end>`.

    Raises:
        ConversionError: A key is unknown, a tensor missing or left over, or a shape wrong.
    """
    fill_vision_geometry(config)
    _check_widths(checkpoint if checkpoint.has("projector") or base is None else base, config)
    with torch.device("meta"):
        model = MLPLlavaForConditionalGeneration(config)
    expected = expected_tensors(model)
    rows = config.text_config.vocab_size
    changes = {
        name: resized(rows)
        for name in expected
        if base is not None and re.fullmatch(r"language_model\..*(embed_tokens|lm_head)\.weight", name)
    }
    own = checkpoint.files
    if EMBEDDING in own.shapes and not checkpoint.has("language") and not checkpoint.lora:
        changes[f"language_model.{EMBEDDING}"] = new_rows(own, EMBEDDING, rows, num_new_tokens)
        own = Renamed(own, {name: name for name in own.shapes if name != EMBEDDING})
    table = checkpoint_table(config, expected, checkpoint.layout)
    for weight, change in checkpoint.lora.items():
        for target in plan(table, [weight]):
            changes[target] = change
    sources = [(own, plan(table, own.shapes), changes if base is None else {})]
    if base is not None:
        sources.append((base.files, plan(checkpoint_table(config, expected, base.layout), base.files.shapes), changes))
    if not any(name.startswith("vision_model.") for _, pieces, _ in sources for name in pieces):
        if vision is None:
            raise ConversionError(
                "The checkpoint has no vision tower: give the vision encoder's own folder (--vision)."
            )
        of_vision = [name for name in expected if name.startswith("vision_model.")]
        sources.append((vision, vision_pieces(vision, of_vision), {}))
    if config.has_image_newline and not any("bridge.image_newline" in pieces for _, pieces, _ in sources):
        raise ConversionError(
            "The configuration asks for lines of tiles that end with image_newline, which is not in the checkpoint: "
            "mm_projector.bin never holds it. Give the whole checkpoint, or patch_merge_type 'flat' or 'spatial' in "
            "--config."
        )
    conversion = assemble(config, model, expected, sources, getattr(checkpoint.files, "path", "the checkpoint"))
    conversion.left_out = dropped(table, own.shapes)
    return conversion


def _check_widths(checkpoint: Checkpoint, config: MLPLlavaConfig) -> None:
    """Check that the projector fits the vision encoder and the language model."""
    shapes = checkpoint.files.shapes
    layers = projector_layers(shapes, checkpoint.layout)
    given, made = config.vision_feature_size, config.text_config.hidden_size
    taken, gives = made, given
    if layers:
        taken = dimensions(shapes, f"{layers[0]}.weight", 2)[1]
        gives = dimensions(shapes, f"{layers[-1]}.weight", 2)[0]
    if taken != given:
        raise ConversionError(
            f"The projector takes features of width {taken}, but the vision encoder gives {given}: it was trained with "
            "another one (--vision)."
        )
    if gives != made:
        raise ConversionError(
            f"The projector gives features of width {gives}, but the language model's is {made}: it was trained with "
            "another one (--language)."
        )


def convert_llava(
    checkpoint: str | os.PathLike,
    vision: str | os.PathLike | None = None,
    language: str | os.PathLike | None = None,
    *,
    output: str | os.PathLike,
    conversation: str | None = None,
    config: Mapping | None = None,
    verify: bool = True,
) -> Conversion:
    """Convert a checkpoint of LLaVA into a folder that `AutoModel.from_pretrained` loads.

    Args:
        checkpoint: A folder or Hub id of a release, a LoRA fine-tune or a `llava-hf/*` repository; or a file such as
            `mm_projector.bin`, with a `config.json` beside it or not.
        vision: The vision encoder: a folder or Hub id, or a file in open_clip's layout; `None` takes the one that the
            checkpoint names. A vision tower in the checkpoint is used in any case.
        language: The language model that a projector or a LoRA fine-tune belongs to: a folder or Hub id; `None` takes
            the one that the adapter names.
        output: Folder to write to.
        conversation: Name of the conversation format; `None` takes the one that the checkpoint was trained with.
        config: Fields of `MLPLlavaConfig` that the checkpoint doesn't tell, or that should differ; `vision_config` is a
            dict of its own.
        verify: Whether to check what was written; see `certify`.

    Returns:
        The conversion; its `notes` say what was not used.

    Raises:
        ConversionError: The parts don't fit together; nothing is written.
    """
    overrides = dict(config or {})
    vision_overrides = overrides.pop("vision_config", {})
    release = open_checkpoint(checkpoint)
    if release.has("language"):
        _refuse_delta(checkpoint)
        base = None
    else:
        base = _open_base(release, language)
    settings = read_settings(release, base)
    vision_place, vision_files, vision_config = _choose_vision(release, base, settings, vision, vision_overrides)
    tokenizer = _load_tokenizer(release, base, settings)
    projector = release if release.has("projector") or base is None else base
    declared = None if settings.native else settings.fields.get("mm_projector_type")
    model_config = MLPLlavaConfig(
        vision_config=vision_config,
        text_config=settings.text_config,
        **{
            **settings.options,
            **infer_projector(projector.files.shapes, projector.layout, declared),
            "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
            **overrides,
        },
    )
    conversion = plan_conversion(release, vision_files, base, model_config, len(settings.borders))
    if base is None and language is not None:
        conversion.notes.append(f"{language} is not used: the checkpoint holds its language model.")
    if vision is not None and any(part.has("vision") for part in (release, base) if part is not None):
        conversion.notes.append(f"The vision tower is the checkpoint's own: the weights in {vision} are not used.")
    if settings.native:
        conversion.direction = ("transformers", "vlbridge")
        tiled = model_config.image_grid_pinpoints is not None
        their_class = LlavaNextForConditionalGeneration if tiled else LlavaForConditionalGeneration
        conversion.run = lambda folder: run_llava(folder, settings.place, their_class)
    files, piece, _ = conversion.pieces[f"language_model.{EMBEDDING}"]
    model_config.dtype = files.dtypes[piece.sources[0]]  # the official code runs all parts in the language model's

    if "image_grid_pinpoints" in overrides:
        settings.image_aspect_ratio = "anyres" if overrides["image_grid_pinpoints"] else "pad"
    image_processor = load_image_processor(vision_place, model_config.image_size)
    name = f"{checkpoint} {settings.fields.get('_name_or_path', '')}"
    processor = build_processor(model_config, settings, image_processor, tokenizer, conversation, name)
    generation = GenerationConfig(
        bos_token_id=settings.text_config.bos_token_id,
        eos_token_id=end_tokens(settings.text_config, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=512,
    )
    conversion.write(output, generation, processor, verify)
    return conversion


def _refuse_delta(checkpoint: str | os.PathLike) -> None:
    """Refuse the releases that hold differences from LLaMA's weights, which only their names tell."""
    if "delta" in os.path.basename(os.path.abspath(checkpoint)).lower():
        raise ConversionError(
            f"{checkpoint} holds differences from LLaMA's weights, by its name. Add them up first, with the official "
            "llava.model.apply_delta."
        )


def _open_base(release: Checkpoint, language: str | os.PathLike | None) -> Checkpoint:
    """The language model that a projector or an adapter belongs to."""
    if not (release.has("projector") or release.lora):
        infer_projector(release.files.shapes, release.layout)  # raises an error that says what is missing
    language = language or release.base
    if language is None:
        raise ConversionError("The checkpoint holds no language model: give the one it was trained with (--language).")
    base = open_checkpoint(language)
    if not base.has("language") or not base.fields:
        raise ConversionError(f"There is no language model with its config.json in {language}.")
    return base


def _choose_vision(
    release: Checkpoint,
    base: Checkpoint | None,
    settings: Settings,
    vision: str | os.PathLike | None,
    overrides: Mapping,
) -> tuple:
    """The vision encoder: where it lies, its tensors unless the checkpoint holds them, and its configuration."""
    inside = any(part.has("vision") for part in (release, base) if part is not None)
    if settings.native and inside:
        return settings.place, None, transformers_config(settings.fields, settings.where).vision_config
    named = None if settings.native else settings.fields.get("mm_vision_tower")
    return _open_vision(vision, named, not inside, overrides)


def _open_vision(given, named: str | None, weights: bool, overrides: Mapping) -> tuple:
    """The vision encoder's place, its tensors if `weights` asks for them, and its configuration."""
    place = given or named
    if place is None:
        raise ConversionError(
            "The checkpoint does not name its vision tower: give the vision encoder's folder or Hub id (--vision)."
        )
    try:
        files = TensorFiles(place) if weights or os.path.isfile(place) else None
        if files is not None:
            return place, files if weights else None, read_vision_config(files, place, overrides)
        config = AutoConfig.from_pretrained(place)
        config = getattr(config, "vision_config", None) or config
        for name, value in overrides.items():
            setattr(config, name, value)
        return place, None, config
    except (OSError, ValueError) as error:
        if given is not None:
            raise
        raise ConversionError(
            f"The checkpoint names {named!r} as its vision tower, which can't be read: {str(error).splitlines()[0]} "
            "Give the vision encoder's folder or Hub id (--vision)."
        ) from error


def _load_tokenizer(release: Checkpoint, base: Checkpoint | None, settings: Settings) -> PreTrainedTokenizerBase:
    """The tokenizer beside the checkpoint or beside its language model, with LLaVA's tokens.

    If `<im_start>` and `<im_end>` were trained with a projector alone, the language model's vocabulary grows by them.
    """
    text_config = settings.text_config
    places = [part.place for part in (release, base) if part is not None and part.place]
    place = next((place for place in places if any(find_file(place, name) for name in TOKENIZER_FILES)), None)
    if place is None:
        raise ConversionError(f"There is no tokenizer in {' or '.join(places)}: put the language model's there.")
    rows = text_config.vocab_size
    if EMBEDDING in release.files.shapes:
        rows = dimensions(release.files.shapes, EMBEDDING, 2)[0]
    tokenizer = load_tokenizer(place, settings.fields, text_config, rows)
    wanted = max((tokenizer.convert_tokens_to_ids(token) + 1 for token in settings.borders), default=0)
    if settings.projector_only:
        text_config.vocab_size = max(text_config.vocab_size, wanted)
    elif wanted > text_config.vocab_size:
        raise ConversionError(
            f"{settings.borders[-1]} is token {wanted - 1}, but the language model has {text_config.vocab_size} rows: "
            "the "
            f"tokenizer in {place} is not the one that the checkpoint was trained with."
        )
    return tokenizer


__all__ = ["convert_llava", "new_rows", "plan_conversion"]
