"""The way out: models of ours as transformers' own classes have them, and in the official layouts.

The tables are those of the way in, read backwards.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    GenerationConfig,
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

from ..compat import WeightRenaming, get_model_conversion_mapping, renamed
from ..configuration.configuration_bridged import BridgedConfig
from ..configuration.configuration_flamingo import PerceiverFlamingoConfig
from ..configuration.configuration_llava import MLPLlavaConfig
from ..modeling.modeling_pins import find_frozen_part, frozen_parts_of
from .convert_blip import CAPTION_TABLE, MATCHING_TABLE
from .convert_blip2 import LANGUAGE_MODELS as LAVIS_LANGUAGE_MODELS
from .convert_blip2 import checkpoint_table as lavis_table
from .convert_certificate import Checks, certify, read_certificate
from .convert_files import Stored, TensorFiles, write_tensors, written_whole
from .convert_llava import LANGUAGE_MODELS as LLAVA_LANGUAGE_MODELS
from .convert_llava import checkpoint_table as llava_checkpoint_table
from .convert_openflamingo import checkpoint_table as flamingo_table
from .convert_parts import (
    EVA_TABLE,
    OFFICIAL,
    OPEN_CLIP_TABLE,
    Conversion,
    Renamed,
    assemble,
    expected_tensors,
    language_table,
    resized,
    vision_pieces,
)
from .convert_tables import Again, ConversionError, Drop, Rename, Rule, Twin, dropped, invert, plan
from .convert_transformers import plan_port, run_llava, run_port


TARGETS = ("transformers", "official")
LAVIS = "LAVIS's layout"
LAVIS_EPSILON = 1e-5  # torch's default, which the official code leaves as it is
FROZEN = "frozen: official checkpoints have it elsewhere"


# ---------------------------------------------------------------------- our models, as checkpoints


class Tensors:
    """The tensors of a conversion as a checkpoint, under their names in the converted model.

    Args:
        conversion: The conversion.
    """

    def __init__(self, conversion: Conversion, path: str):
        self.conversion, self.path = conversion, path
        self.shapes = {name: conversion.shape(name) for name in conversion.pieces}
        self.dtypes = {name: conversion.dtype(name) for name in conversion.pieces}

    def stored(self, name: str) -> Stored | torch.Tensor:
        files, piece, change = self.conversion.pieces[name]
        return files.stored(piece.sources[0]) if piece.whole and change is None else self.read(name)

    def read(self, name: str) -> torch.Tensor:
        return self.conversion.load(name)

    def origin(self, name: str):
        files, piece, _ = self.conversion.pieces[name]
        return files.origin(piece.sources[0])


@dataclass
class Saved:
    """A model of ours on disk or on the Hub, with what lies beside it.

    Args:
        place: Folder or Hub id.
        conversion: Where its tensors lie.
        tensors: Its tensors, as a checkpoint.
        processor: Its processor.
        generation: Its generation defaults.
        certificate: What it was converted from, see `certify`; empty where that is not known.
    """

    place: str
    conversion: Conversion
    tensors: Tensors
    processor: ProcessorMixin
    generation: GenerationConfig | None
    certificate: dict

    @property
    def config(self) -> BridgedConfig:
        return self.conversion.config

    @property
    def released(self) -> set[str]:
        """Names of the tensors that the official checkpoint gave which it was converted from; empty where there was none."""
        if self.certificate.get("from") != OFFICIAL:
            return set()
        files = set(self.certificate["checkpoint"])
        return {name for name, about in self.certificate["tensors"].items() if about["from"] in files}


def _model_type(place: str | os.PathLike) -> str | None:
    """What kind of model a folder or Hub id holds.

    Raises:
        ConversionError: There is none.
    """
    try:
        return PreTrainedConfig.get_config_dict(place)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{place} can't be exported: {str(error).splitlines()[0]}") from error


def todays_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """From names in files to a model's own: transformers goes on saving some models under the names that they once had.

    Args:
        model: On the meta device.
        keys: Of its files.
    """
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    own = set(model.state_dict())
    return {key: key if key in own else renamed(key, renamings) for key in keys}


def open_saved(place: str | os.PathLike) -> Saved:
    """Open a model of ours: whole, or a bridge whose frozen parts are fetched from where it names them.

    Args:
        place: Folder or Hub id.

    Raises:
        ConversionError: It is no model of ours, or its tensors are not those of its configuration.
        FrozenPartError: A frozen part is missing or changed.
    """
    place, kind = os.fspath(place), _model_type(place)
    config = AutoConfig.from_pretrained(place)
    if not isinstance(config, BridgedConfig):
        raise ConversionError(f"{place} holds a {kind}; expected a model of vlbridge.")
    files = TensorFiles(place)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    expected = expected_tensors(model, files.shapes)
    tied = [name for name in model.all_tied_weights_keys if name not in expected]
    bridge = [name for name in files.shapes if name.startswith("bridge.")]
    sources = [(files, plan([Rename(name, name) for name in bridge], bridge), {})]
    for part in frozen_parts_of(config):
        prefix = f"{part}."
        if config.bridge_only:
            where, hub_kwargs = find_frozen_part(part, (config.frozen_parts or {}).get(part) or {})
            inside = TensorFiles(where, **hub_kwargs)
        else:
            inside = Renamed(files, {key: key.removeprefix(prefix) for key in files.shapes if key.startswith(prefix)})
        inside = Renamed(inside, todays_names(getattr(model, part), inside.shapes))
        names = [name for name in expected if name.startswith(prefix)]
        if part == "vision_model":
            pieces = vision_pieces(inside, names)
        else:
            of_part = [name.removeprefix(prefix) for name in names]
            table = language_table(config.text_config, of_part, [name.removeprefix(prefix) for name in tied])
            pieces = {prefix + name: piece for name, piece in plan(table, inside.shapes).items()}
        sources.append((inside, pieces, {}))
    conversion = assemble(config, model, expected, sources, place)
    try:
        generation = GenerationConfig.from_pretrained(place)
    except OSError:
        generation = None
    return Saved(
        place, conversion, Tensors(conversion, place), AutoProcessor.from_pretrained(place), generation,
        read_certificate(place) if os.path.isdir(place) else {},
    )  # fmt: skip


# ---------------------------------------------------------------------- LLaVA in transformers' classes

# language models whose logits are more than their last hidden state times one matrix: transformers' LLaVA has that only
HEAD_FIELDS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}
# encoders whose files have one level more than their classes, as they had it until transformers 5
NESTED = ("clip_vision_model", "siglip_vision_model")
# encoders whose last hidden state is `hidden_states[-1]` too
ENDS_BARE = ("clip_vision_model",)


def refuse_llava(config: MLPLlavaConfig, language_model: PreTrainedModel) -> None:
    """Say what transformers' classes for LLaVA can't express.

    Args:
        config: Our model's configuration.
        language_model: Its language model, on the meta device.

    Raises:
        ConversionError: There is something.
    """
    problems = []
    if config.vision_layout == "grid":
        problems.append("they take encoders that give a sequence of tokens, this one is a CNN, which gives a grid")
    if config.vision_feature_layer is None and config.vision_config.model_type not in ENDS_BARE:
        problems.append(
            "they read one of the encoder's hidden_states, this model what comes behind its last norm "
            "(vision_feature_layer=None)"
        )
    if config.vision_feature_select_strategy == "patch" and (config.num_prefix_tokens or 0) > 1:
        problems.append(f"they drop one prefix token, this encoder has {config.num_prefix_tokens}")
    if config.projector_type != "mlp2x_gelu":
        problems.append(f"their projector is mlp2x_gelu, this one is {config.projector_type}")
    if config.projector_hidden_size not in (None, config.text_config.hidden_size):
        problems.append(
            f"their projector is as wide as the language model between its layers, this one {config.projector_hidden_size}"
        )
    if config.pooling is not None:
        problems.append(f"they don't pool, this model has pooling={config.pooling!r}")
    if config.image_grid_pinpoints is not None and config.patch_merge_type != "spatial_unpad":
        problems.append(f"they merge tiles as 'spatial_unpad', this model as {config.patch_merge_type!r}")
    if config.is_encoder_decoder:
        problems.append(f"their language model is a decoder, this one is a {config.text_config.model_type}")
    elif language_model.get_input_embeddings() is not getattr(
        getattr(language_model, "model", None), "embed_tokens", None
    ):
        problems.append(
            f"they look for the language model's table at model.embed_tokens, where a {config.text_config.model_type} has none"
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
            f"{name} can't express this model: {'; '.join(problems)}. What can be done: --to official writes LLaVA's own "
            "layout, where that has it; save_pretrained(bridge_only=True) makes a repository that AutoModel loads where "
            "vlbridge is installed."
        )


def plan_llava(saved: Saved) -> tuple[Conversion, ProcessorMixin]:
    """Work out what becomes of an MLP-LLaVA in transformers' class; nothing is read yet.

    Args:
        saved: The model.

    Raises:
        ConversionError: Transformers' class can't express it.
    """
    config, tensors = saved.config, saved.tensors
    language_model = saved.conversion.model.language_model
    refuse_llava(config, language_model)
    tiled = config.image_grid_pinpoints is not None
    rows = max(config.text_config.vocab_size, config.image_token_id + 1)
    text_config = copy.deepcopy(config.text_config)
    text_config.vocab_size, text_config.dtype = rows, None  # the dtype is the whole model's affair
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
            "placeholder can be looked up. New rows are the mean of the others: greedily they are never chosen, and all "
            "together they take less probability than one average token."
        )
    if config.image_grid_pinpoints is not None:
        yield (
            "Transformers rounds where the official code truncates: for some sizes of pictures there is one row or column of "
            "visual tokens more."
        )
    if processor.space_after_image:
        yield (
            "The original tokenises the text behind an image like the beginning of a text. The chat template does so too; in "
            "prompts written by hand, put a space behind <image>."
        )


def _llava_processor(config: MLPLlavaConfig, processor: ProcessorMixin, select: str) -> ProcessorMixin:
    """The processor of transformers' class."""
    ours = processor.image_processor
    names = ("size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize",
             "image_mean", "image_std")  # fmt: skip
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


# ---------------------------------------------------------------------- official layouts


def official_flamingo(saved: Saved) -> tuple[list[Rule], re.Pattern]:
    """The table from our names to open-flamingo's, and which of its names are in released files."""
    config = saved.config
    names = [
        name.removeprefix("language_model.") for name in saved.tensors.shapes if name.startswith("language_model.")
    ]
    if not config.freeze_vision_model:
        raise ConversionError(
            "This model's vision encoder was trained, which OpenFlamingo's checkpoints have no place for. What can be done: "
            "save_pretrained()."
        )
    rules = flamingo_table(config, names)
    # where two names lead to one tensor, the last is the one of the official code's time
    last = {rule.target: rule for rule in rules if isinstance(rule, Rename)}
    table = invert([rule for rule in rules if not isinstance(rule, Rename) or last[rule.target] is rule])
    table += [Drop(name, FROZEN) for name in saved.tensors.shapes if name.startswith("vision_model.")]
    # the official filter keeps what was trained, and whatever has "embed" in its name; MPT's table is called wte
    return table, re.compile(r"perceiver\..*|.*\.gated_cross_attn_layer\..*|lang_encoder\..*(embed|wte).*")


def official_blip2(saved: Saved) -> tuple[list[Rule], re.Pattern]:
    """Likewise to LAVIS's."""
    config, model = saved.config, saved.conversion.model
    text_config = config.text_config
    language = None
    if text_config is not None:
        language = next(
            (name for name, kinds in LAVIS_LANGUAGE_MODELS.items() if text_config.model_type in kinds), None
        )
        if language is None:
            raise ConversionError(
                f"LAVIS has no BLIP-2 with a {text_config.model_type}; it has OPT, T5 and LLaMA. What can be done: --to "
                "transformers, or save_pretrained(bridge_only=True)."
            )
    tied = {name: of for name, of in model.all_tied_weights_keys.items() if name not in saved.tensors.shapes}
    table = lavis_table(model, language, tied)
    others = tuple(f"{other}_proj." for other in LAVIS_LANGUAGE_MODELS if other != language)
    if language is not None:
        others += ("Qformer.cls.",)
    table = [rule for rule in table if not rule.source.startswith(others)]
    kinds = {"blip_2_vision_model": EVA_TABLE, "clip_vision_model": OPEN_CLIP_TABLE}
    vision = kinds.get(config.vision_config.model_type)
    if vision is None:
        raise ConversionError(
            f"LAVIS's BLIP-2 has EVA ViT-g or CLIP ViT-L; this model's vision encoder is a {config.vision_config.model_type}. "
            "What can be done: save_pretrained(bridge_only=True)."
        )
    back = invert(table)
    back += [_with_prefix(rule, "visual_encoder.", "visual.") for rule in invert(vision)]
    back += [
        Drop(f"vision_model.post_layernorm.{kind}", "the official encoder ends before it")
        for kind in ("weight", "bias")
        if vision is EVA_TABLE
    ]
    # twins of frozen tables survive the official filter
    second = [re.escape(rule.source) for rule in table if isinstance(rule, Twin)]
    trained = r"query_tokens|temp|ln_vision\..*|Qformer\..*|(opt|t5|llm|vision|text)_proj\..*|itm_head\..*"
    return back, re.compile("|".join([trained, *second]))


def _with_prefix(rule: Rule, prefix: str, drop: str) -> Rule:
    """A rule of the vision encoder's table, its targets as they are called in the whole checkpoint."""

    def renamed(name):
        return tuple(renamed(one) for one in name) if isinstance(name, tuple) else prefix + name.removeprefix(drop)

    changes = {
        field.name: renamed(getattr(rule, field.name))
        for field in dataclasses.fields(rule)
        if field.name in ("target", "targets")
    }
    return dataclasses.replace(rule, **changes)


def plan_official(saved: Saved) -> tuple[Conversion, dict[str, str]]:
    """Work out the official checkpoint of a Perceiver-Flamingo or a Q-Former BLIP-2; nothing is read yet.

    What is in it: what was in the file that the model was converted from, where that is known, else what the official code
    saves; a part that was trained here is in it too.

    Args:
        saved: The model.

    Returns:
        The conversion, and our names of what is left out, with the reason.

    Raises:
        ConversionError: The official layout can't express it.
    """
    config, tensors = saved.config, saved.tensors
    table, released = (official_flamingo if isinstance(config, PerceiverFlamingoConfig) else official_blip2)(saved)
    if config.special_token_ids:
        raise ConversionError(
            "The rows of this model's special tokens are in its bridge, beside the language model's table; the official "
            "layout has them in the table. Models that were converted from the official layout have them there too."
        )
    pieces = plan(table, tensors.shapes)
    recorded = saved.released
    trained = tuple(f"{part}." for part in ("vision_model", "language_model") if not getattr(config, f"freeze_{part}"))
    kept = {}
    for target, piece in pieces.items():
        source = piece.sources[0]
        second = released.fullmatch(target) and not source.startswith(("bridge.", "vision_model."))
        if source in recorded or source.startswith(("bridge.", *trained)) or (second and not recorded):
            kept[target] = piece
    if recorded:  # second copies of tables that stay away
        again = {rule.target for rule in table if isinstance(rule, Again)}
        kept.update((target, pieces[target]) for target in again & pieces.keys())
    done = Conversion(
        config, {target: (tensors, piece, None) for target, piece in kept.items()}, saved.conversion.model
    )
    used = {source for piece in kept.values() for source in piece.sources}
    left_out = {name: FROZEN for name in tensors.shapes if name not in used}
    left_out.update(dropped(table, left_out))
    return done, left_out


def write_official(saved: Saved, output: str | os.PathLike, verify: bool = True) -> Conversion:
    """Write the official checkpoint: `checkpoint.pt` of OpenFlamingo, `checkpoint.pth` of LAVIS, or LLaVA's folder.

    Args:
        saved: The model.
        output: Empty folder, or one that is made.
        verify: Check what was written, see `certify`.
    """
    if isinstance(saved.config, MLPLlavaConfig):
        return write_official_llava(saved, output, verify)
    done, left_out = plan_official(saved)
    flamingo = isinstance(saved.config, PerceiverFlamingoConfig)
    done.direction = ("vlbridge", "OpenFlamingo's layout" if flamingo else LAVIS)
    done.left_out = {name: why for name, why in left_out.items() if why != FROZEN}
    epsilon = getattr(saved.config, "vision_layer_norm_eps", LAVIS_EPSILON)
    if epsilon != LAVIS_EPSILON:
        done.notes.append(
            f"LAVIS's norm on the patch features has epsilon {LAVIS_EPSILON:g}; in this model it is {epsilon:g}."
        )
    if len(left_out) > len(done.left_out):
        done.notes.append(
            f"{len(left_out) - len(done.left_out)} tensors of the frozen vision encoder and language model are left out, as "
            "in the official releases."
        )
    write_torch(done, output, "checkpoint.pt" if flamingo else "checkpoint.pth", None if flamingo else "model", verify)
    return done


def write_torch(done: Conversion, output: str | os.PathLike, name: str, wrapper: str | None, verify: bool) -> None:
    """Write a checkpoint with `torch.save`, and its certificate.

    Args:
        done: What is in it.
        output: Empty folder, or one that is made.
        name: Of the file.
        wrapper: Key that the tensors are under; `None` for none.
        verify: Check what was written, see `certify`.
    """
    with written_whole(output) as folder, Checks(done, verify) as checks:
        state = {key: done.load(key) for key in done.pieces}
        torch.save(state if wrapper is None else {wrapper: state}, folder / name)
        del state
        checks.file(folder / name)
        certify(done, folder, checks)


def write_official_blip(place: str | os.PathLike, output: str | os.PathLike, verify: bool = True) -> Conversion:
    """Write LAVIS's checkpoint of a captioner or an image-text matcher of BLIP, which are in transformers' classes here too.

    Args:
        place: Folder or Hub id.
        output: Empty folder, or one that is made.
        verify: Check what was written, see `certify`.
    """
    files = TensorFiles(place)
    matching = "text_encoder.embeddings.word_embeddings.weight" in files.shapes
    table = MATCHING_TABLE if matching else CAPTION_TABLE
    # transformers' savers may write a tied tensor under both names
    once = Renamed(
        files,
        {key: key for key in files.shapes if key not in {rule.source for rule in table if isinstance(rule, Twin)}},
    )
    table = invert(table)
    pieces = {target: (once, piece, None) for target, piece in plan(table, once.shapes).items()}
    with torch.device("meta"):
        model = (BlipForImageTextRetrieval if matching else BlipForConditionalGeneration)(
            AutoConfig.from_pretrained(place)
        )
    done = Conversion(model.config, pieces, model, direction=("transformers", LAVIS), checkpoint=files)
    write_torch(done, output, "checkpoint.pth", "model", verify)
    return done


def write_official_llava(saved: Saved, output: str | os.PathLike, verify: bool = True) -> Conversion:
    """Write LLaVA's own layout: a folder that the official code loads.

    Args:
        saved: The model.
        output: Empty folder, or one that is made.
        verify: Check what was written, see `certify`.

    Raises:
        ConversionError: The official layout can't express it.
    """
    config, tensors, processor = saved.config, saved.tensors, saved.processor
    fields, problems = llava_fields(saved)
    if problems:
        raise ConversionError(
            f"LLaVA's own layout can't express this model: {'; '.join(problems)}. What can be done: "
            "save_pretrained(bridge_only=True) makes a repository that AutoModel loads where vlbridge is installed."
        )
    table = invert(llava_checkpoint_table(config, tensors.shapes, "official"))
    pieces = plan(table, tensors.shapes)
    inside = not config.freeze_vision_model or any(name.startswith("vision_model.") for name in saved.released)
    kept = {
        target: piece for target, piece in pieces.items() if inside or not piece.sources[0].startswith("vision_model.")
    }
    done = Conversion(
        config, {target: (tensors, piece, None) for target, piece in kept.items()}, saved.conversion.model
    )
    done.direction = ("vlbridge", "LLaVA's layout")
    if not inside:
        done.notes.append(
            f"The vision tower is left out, as in the official releases: config.json names it, {fields['mm_vision_tower']!r}."
        )
    with written_whole(output, done.fingerprint()) as folder, Checks(done, verify) as checks:
        write_tensors(folder, done.entries(), when_written=checks.file)
        (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        if saved.generation is not None:
            saved.generation.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
        certify(done, folder, checks)
    return done


def llava_fields(saved: Saved) -> tuple[dict, list[str]]:
    """LLaVA's `config.json`, and what it has no field for."""
    config, processor = saved.config, saved.processor
    kinds = {kind: name for name, kind in LLAVA_LANGUAGE_MODELS.items() if name != "llava"}
    problems = []
    kind = kinds.get(config.text_config.model_type)
    if kind is None:
        problems.append(f"its language models are {' and '.join(kinds)}, this one is a {config.text_config.model_type}")
    if config.vision_config.model_type != "clip_vision_model":
        problems.append(f"its vision tower is CLIP's, this one is a {config.vision_config.model_type}")
    if config.pooling is not None:
        problems.append("it does not pool")
    if config.projector_hidden_size not in (None, config.text_config.hidden_size) or not config.projector_bias:
        problems.append("its projector has biases and the language model's width between its layers")
    tower = config.vision_config.name_or_path or ((config.frozen_parts or {}).get("vision_model") or {}).get("source")
    if not tower or os.path.isabs(tower):  # a folder of this machine says nothing to others
        tower = "openai/clip-vit-large-patch14" + ("-336" if config.image_size == 336 else "")
    fields = {
        **config.text_config.to_diff_dict(),
        "model_type": kind,
        "architectures": ["LlavaMistralForCausalLM" if kind == "llava_mistral" else "LlavaLlamaForCausalLM"],
        "mm_projector_type": config.projector_type,
        "mm_hidden_size": config.vision_feature_size,
        "mm_vision_tower": tower,
        "mm_vision_select_layer": -1 if config.vision_feature_layer is None else config.vision_feature_layer,
        "mm_vision_select_feature": {"patch": "patch", "full": "cls_patch"}[config.vision_feature_select_strategy],
        "mm_use_im_start_end": processor.mm_use_im_start_end,
        "mm_use_im_patch_token": "<im_patch>" in processor.tokenizer.get_vocab(),
        "image_aspect_ratio": processor.image_aspect_ratio,
        "use_mm_proj": True,
    }
    if config.image_grid_pinpoints is not None:
        fields["mm_patch_merge_type"] = config.patch_merge_type
        # the official pairs are (width, height)
        fields["image_grid_pinpoints"] = [[width, height] for height, width in config.image_grid_pinpoints]
    return fields, problems


# ---------------------------------------------------------------------- the command


def export(
    model: str | os.PathLike, output: str | os.PathLike, to: str = "transformers", verify: bool = True
) -> Conversion:
    """Write a model of ours for those who have no vlbridge.

    Args:
        model: Folder or Hub id: a whole model, or a bridge that names its frozen parts.
        output: Empty folder, or one that is made.
        to: `"transformers"`: a folder of the native class, with processor, tokenizer and generation defaults; or
            `"official"`: the layout of the family's own code.
        verify: Check what was written, see `certify`.

    Returns:
        What was done; its `notes` say what differs.

    Raises:
        ConversionError: The target can't express the model, or says something else; nothing is written.
    """
    if to not in TARGETS:
        raise ConversionError(f"to is {to!r}; expected one of {', '.join(TARGETS)}.")
    if to == "official" and _model_type(model) == "blip":
        return write_official_blip(model, output, verify)
    saved = open_saved(model)
    config = saved.config
    if to == "official":
        return write_official(saved, output, verify)
    if isinstance(config, PerceiverFlamingoConfig):
        raise ConversionError(
            "Transformers has no class for Perceiver-Flamingo. What can be done: --to official writes OpenFlamingo's "
            "layout; save_pretrained(bridge_only=True) makes a repository that AutoModel loads where vlbridge is installed."
        )
    if isinstance(config, MLPLlavaConfig):
        conversion, processor = plan_llava(saved)
        model_class = type(conversion.model)
        conversion.run = lambda folder: run_llava(saved.place, folder, model_class)
    else:
        conversion, processor = plan_port(saved.conversion, saved.tensors, saved.processor, saved.generation)
        conversion.run = lambda folder: run_port(saved.place, folder, config)
    conversion.direction = ("vlbridge", f"transformers' {type(conversion.model).__name__}")
    conversion.write(output, saved.generation, processor, verify, card=_card(saved, type(conversion.model).__name__))
    return conversion


def _card(saved: Saved, name: str) -> str:
    """The beginning of the exported folder's README.md."""
    task = "AutoModel" if "Retrieval" in name else "AutoModelForImageTextToText"
    label = saved.place if not os.path.exists(saved.place) else Path(saved.place).resolve().name
    head = "---\nlibrary_name: transformers\n" + ("pipeline_tag: image-text-to-text\n" if task != "AutoModel" else "")
    return (
        f"{head}---\n\n# {label}\n\nA {saved.config.model_type} model, exported to transformers' own `{name}`: it loads with "
        f"`{name if task == 'AutoModel' else task}` and `AutoProcessor`.\n"
    )


__all__ = ["TARGETS", "export", "open_saved", "plan_llava", "plan_official"]
