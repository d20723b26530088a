"""LLaVA's checkpoints: v1, v1.5 and v1.6 (NeXT) as the official code writes them, and `llava-hf/*` as transformers does.

Whole models, with the vision tower or without; a projector alone (`mm_projector.bin`); LoRA fine-tunes (`adapter_model` and
`non_lora_trainables.bin`), which are merged into the language model.

Source: `llava/model/{builder,llava_arch}.py`, `llava/model/multimodal_projector/builder.py`, `llava/model/
multimodal_encoder/clip_encoder.py`, `llava/train/train.py` and `llava/mm_utils.py` of llava-torch 1.2.2.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..compat import optional_file
from ..configuration.configuration_llava import MLPLlavaConfig
from ..modeling.modeling_bridge import fill_vision_geometry
from ..modeling.modeling_llava import MLPLlavaForConditionalGeneration
from ..processing.processing_llava import MLPLlavaProcessor
from .convert_files import TensorFiles, dimensions
from .convert_parts import (
    BUFFER,
    Change,
    Conversion,
    Merged,
    Renamed,
    assemble,
    expected_tensors,
    language_table,
    layer_numbers,
    lora_changes,
    read_vision_config,
    resized,
    text_config_of,
    vision_pieces,
    with_rows,
)
from .convert_tables import ConversionError, Drop, Rename, Rule, Shapes, dropped, plan
from .convert_transformers import run_llava


# how the same tensor is called by the many ways of saving it, and how by the usual one: the official class's own names, and
# those of the Hub's `llava-hf/*`
SPELLINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "official": (
        (r"(module\.|_forward_module\.|base_model\.model\.)+", ""),  # distributed training, PEFT
        (r"mm_projector\.", "model.mm_projector."),
        # since transformers 5 CLIP's names have no such level
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
# where a layout keeps language model, vision tower and line end
PREFIXES = {
    "official": ("", "model.vision_tower.vision_tower.vision_model.", "model.image_newline"),
    "transformers": ("language_model.", "vision_tower.vision_model.", "image_newline"),
}
LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
# what the official configuration says beside the language model's own fields
LLAVA_FIELDS = re.compile(
    r"(un)?(freeze|tune)_mm_.*|(mm|use_mm|image|tokenizer)_.*|architectures|_name_or_path|transformers_version"
)
END_OF_TURN = "<|im_end|>"  # ChatML's
IMAGE_BORDERS = ("<im_start>", "<im_end>")
EMBEDDING = "model.embed_tokens.weight"
WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


# ---------------------------------------------------------------------- names


def layout_of(keys: Iterable[str]) -> str:
    """Whose names these are: `"official"` or `"transformers"`."""
    theirs = re.compile(r"(.*\.)?(multi_modal_projector|language_model)\..*")
    return "transformers" if any(theirs.fullmatch(key) for key in keys) else "official"


def usual_names(keys: Iterable[str], layout: str) -> dict[str, str]:
    """From a checkpoint's keys to the names that its layout usually has, see `SPELLINGS`.

    Raises:
        ConversionError: A tensor is there under two names.
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
        shapes: Of the checkpoint, under its layout's usual names.
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
    """What the projector becomes.

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
    """What a checkpoint of LLaVA becomes.

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
    names = [name.removeprefix("language_model.") for name in tensors if name.startswith("language_model.")]
    for rule in language_table(config.text_config, names):
        if isinstance(rule, Rename):
            table.append(Rename(language + rule.source, f"language_model.{rule.target}"))
        else:
            table.append(Drop(language + rule.source, rule.why))
    return table


# ---------------------------------------------------------------------- what lies there


def _file(place: str | os.PathLike, name: str) -> Path | None:
    """One file of a folder or Hub repository, `None` where it has none."""
    found = optional_file(place, name, gated_is_missing=True)
    return None if found is None else Path(found)


def _fields(place: str | os.PathLike, name: str) -> dict:
    path = _file(place, name)
    if path is None:
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{path} holds a {type(fields).__name__}, expected an object.")
    return fields


@dataclass
class Checkpoint:
    """Weights under the usual names of their layout, with what lies beside them.

    Args:
        files: The tensors.
        fields: What `config.json` says; empty where there is none.
        place: Folder or Hub id that they lie in; `None` for a file that no `config.json` lies beside.
        lora: Changes to weights that are elsewhere, by the weights' usual names.
        base: Name of the model that LoRA was trained on.
        layout: See `layout_of`; `None` finds out.
    """

    files: Renamed
    fields: dict = field(default_factory=dict)
    place: str | None = None
    lora: dict[str, Change] = field(default_factory=dict)
    base: str | None = None
    layout: str | None = None

    def __post_init__(self):
        keys = [*self.files.shapes, *self.lora]
        if self.layout is None:
            self.layout = layout_of(keys)
        self.files = Renamed(self.files, usual_names(self.files.shapes, self.layout))
        names = usual_names(self.lora, self.layout)
        self.lora = {names[key]: change for key, change in self.lora.items()}

    def has(self, part: str) -> bool:
        """Whether a part of the model is in it.

        Args:
            part: `"language"`, `"vision"` or `"projector"`.
        """
        start = {
            "language": PREFIXES[self.layout][0] + r"model\.layers\.",
            "vision": PREFIXES[self.layout][1].replace(".", r"\."),
            "projector": r"model\.mm_projector\.|multi_modal_projector\.",
        }[part]
        return any(re.match(start, key) for key in self.files.shapes)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Find out what lies somewhere; only names and shapes are read.

    Args:
        path: `mm_projector.bin` or another file of tensors, a folder, or a Hub id.

    Raises:
        ConversionError: There are no weights that can be read.
    """
    path = os.fspath(path)
    try:
        if os.path.isfile(path):
            place = os.path.dirname(path) or "."
            if not os.path.basename(path).startswith(("adapter_model.", "non_lora_trainables.")):
                fields = _fields(place, "config.json")
                return Checkpoint(TensorFiles(path), fields, place if fields else None)
            path = place
        fields, settings = _fields(path, "config.json"), _fields(path, "adapter_config.json")
        if settings:
            return _open_lora(path, fields, settings)
        if not any(_file(path, name) for name in WEIGHTS) and (projector := _file(path, "mm_projector.bin")):
            return Checkpoint(TensorFiles(projector), fields, path)
    except OSError as error:
        raise ConversionError(f"{path}: {str(error).splitlines()[0]}") from error
    return Checkpoint(TensorFiles(path), fields, path)


def _open_lora(path: str, fields: dict, settings: dict) -> Checkpoint:
    adapter = _file(path, "adapter_model.safetensors") or _file(path, "adapter_model.bin")
    if adapter is None:
        raise ConversionError(f"{path} has an adapter_config.json, but neither adapter_model.safetensors nor .bin.")
    adapter = TensorFiles(adapter)
    # weights that were trained as they are may be in either file
    whole = Renamed(adapter, {key: key for key in adapter.shapes if "lora_" not in key})
    if (rest := _file(path, "non_lora_trainables.bin")) is not None:
        whole = Merged(TensorFiles(rest), whole)
    base = settings.get("base_model_name_or_path") or fields.get("_name_or_path") or None
    return Checkpoint(whole, fields, path, lora_changes(adapter, settings), base)


# ---------------------------------------------------------------------- configuration


def infer_text_config(fields: Mapping, where: str) -> PreTrainedConfig:
    """The language model's configuration.

    Args:
        fields: What `config.json` says: LLaVA's, in either layout, or the language model's own.
        where: Names it in errors.

    Raises:
        ConversionError: The language model is of a kind that LLaVA's checkpoints are not known to have.
    """
    if "text_config" in fields:
        return _transformers_config(fields, where).text_config
    kind = str(fields.get("model_type"))
    if kind not in LANGUAGE_MODELS:
        if kind.startswith("llava"):
            raise ConversionError(f"{where}: {kind} is not known; expected one of {', '.join(LANGUAGE_MODELS)}.")
        return text_config_of(fields, where)
    own = {name: value for name, value in fields.items() if not LLAVA_FIELDS.fullmatch(name)}
    return text_config_of({**own, "model_type": LANGUAGE_MODELS[kind]}, where)


def _transformers_config(fields: Mapping, where: str) -> PreTrainedConfig:
    kind = fields.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise ConversionError(f"{where}: the model is a {kind}; expected llava or llava_next.")
    fields = {name: value for name, value in fields.items() if name != "model_type"}
    return AutoConfig.for_model(kind, **fields)


def infer_projector(shapes: Shapes, layout: str, declared: str | None = None) -> dict:
    """The projector's fields of `MLPLlavaConfig`.

    Args:
        shapes: Of the checkpoint, under its layout's usual names.
        layout: See `layout_of`.
        declared: What `config.json` calls the projector; `None` where it doesn't.

    Raises:
        ConversionError: There is none, or it is of another kind.
    """
    layers = projector_layers(shapes, layout)
    if declared is not None and not re.fullmatch(r"identity|linear|mlp\d+x_gelu", declared):
        raise ConversionError(
            f"The configuration names the projector {declared!r}; expected identity, linear or mlpNx_gelu."
        )
    if not layers:
        if declared == "identity":
            return {"projector_type": "identity"}
        raise ConversionError(
            "There is no projector in the checkpoint (mm_projector or multi_modal_projector): it is not one of LLaVA's, or "
            "only a part of one."
        )
    linear = layers == ["model.mm_projector"]
    found = {
        "projector_type": "linear" if linear else f"mlp{len(layers)}x_gelu",
        "projector_bias": any(f"{layer}.bias" in shapes for layer in layers),
    }
    first, last = (dimensions(shapes, f"{layers[end]}.weight", 2)[0] for end in (0, -1))
    if len(layers) > 1 and first != last:
        found["projector_hidden_size"] = first
    return found


def _official_options(fields: Mapping) -> tuple[dict, str]:
    """Fields of `MLPLlavaConfig` from the official configuration, and the image aspect ratio."""
    ratio = fields.get("image_aspect_ratio") or "square"
    if ratio not in ("square", "pad", "anyres"):
        raise ConversionError(f"config.json has image_aspect_ratio {ratio!r}; expected square, pad or anyres.")
    select = {"patch": "patch", "cls_patch": "full"}.get(fields.get("mm_vision_select_feature", "patch"))
    if select is None:
        raise ConversionError(
            f"config.json has mm_vision_select_feature {fields['mm_vision_select_feature']!r}; expected patch or cls_patch."
        )
    options = {
        "vision_feature_layer": fields.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": select,
        "patch_merge_type": fields.get("mm_patch_merge_type") or "flat",
    }
    if ratio == "anyres":
        given = fields.get("image_grid_pinpoints")
        try:
            pinpoints = ast.literal_eval(given) if isinstance(given, str) else given
            # the official pairs are (width, height)
            options["image_grid_pinpoints"] = [[int(height), int(width)] for width, height in pinpoints]
        except (SyntaxError, TypeError, ValueError) as error:
            raise ConversionError(
                f"config.json has image_aspect_ratio 'anyres' and image_grid_pinpoints {given!r}; expected a list of (width, "
                "height) in pixels."
            ) from error
    return options, ratio


def _transformers_options(fields: Mapping, image_fields: Mapping, where: str) -> tuple[dict, str]:
    """Likewise from a configuration of transformers and the image processor's."""
    config = _transformers_config(fields, where)
    if config.projector_hidden_act != "gelu":
        raise ConversionError(f"{where} has projector_hidden_act {config.projector_hidden_act!r}; expected gelu.")
    options = {
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": {"default": "patch"}.get(
            config.vision_feature_select_strategy, config.vision_feature_select_strategy
        ),
    }
    if config.model_type == "llava_next":
        pinpoints = [list(pinpoint) for pinpoint in config.image_grid_pinpoints]  # (height, width) here
        return {**options, "image_grid_pinpoints": pinpoints, "patch_merge_type": "spatial_unpad"}, "anyres"
    padded = "Llava" in image_fields.get("image_processor_type", "") and image_fields.get("do_pad")
    return options, "pad" if padded else "square"


# ---------------------------------------------------------------------- the whole


def new_rows(files, key: str, rows: int, num_tokens: int) -> Change:
    """The change to an embedding table whose last tokens were trained with the projector.

    Args:
        files: The projector's checkpoint.
        key: Its table: a whole one, of which the last rows are taken, or these rows alone.
        rows: Of the table as it will be.
        num_tokens: How many tokens were added.

    Source: `initialize_vision_tokenizer` in `llava/model/llava_arch.py`.
    """

    def apply(table: torch.Tensor) -> torch.Tensor:
        trained = files.read(key)[-num_tokens:].to(table.dtype)
        return torch.cat([with_rows(table, rows)[:-num_tokens], trained])

    return Change(apply, lambda shape: (rows, *shape[1:]), (files,))


def plan_conversion(
    checkpoint: Checkpoint, vision, base: Checkpoint | None, config: MLPLlavaConfig, num_new_tokens: int = 0
) -> Conversion:
    """Find for every tensor of the converted model where it comes from; nothing is read yet.

    Args:
        checkpoint: LLaVA's.
        vision: `TensorFiles` of the vision encoder; `None` where the checkpoint has it.
        base: The language model that the checkpoint belongs to; `None` where it has its own.
        config: Of the converted model.
        num_new_tokens: How many tokens' rows were trained with a projector: `<im_start>` and `<im_end>`.

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
            "mm_projector.bin never holds it. Give the whole checkpoint, or patch_merge_type 'flat' or 'spatial' in --config."
        )
    conversion = assemble(config, model, expected, sources, getattr(checkpoint.files, "path", "the checkpoint"))
    conversion.left_out = dropped(table, own.shapes)
    return conversion


def _check_widths(checkpoint: Checkpoint, config: MLPLlavaConfig) -> None:
    """Does the projector lead from this vision encoder to this language model?"""
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


def load_tokenizer(
    source: str | os.PathLike, fields: Mapping, text_config: PreTrainedConfig, rows: int
) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with LLaVA's tokens, in the official order, and `<image>` behind them.

    Args:
        source: Folder or Hub id.
        fields: LLaVA's configuration.
        text_config: The language model's.
        rows: Of the embedding table that was trained with the tokenizer: it tells whether `<im_patch>` is there, where the
            configuration does not.

    Source: `load_pretrained_model` in `llava/model/builder.py`.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        source, config=text_config
    )  # LLaVA's own configuration is not transformers'
    borders = bool(fields.get("mm_use_im_start_end", False))
    if fields.get("mm_use_im_patch_token", borders and rows >= len(tokenizer) + 3):
        tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
    if borders:
        tokenizer.add_tokens(list(IMAGE_BORDERS), special_tokens=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if hasattr(tokenizer, "legacy"):  # transformers' class takes it, but does not save it
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def conversation_of(name: str, config: MLPLlavaConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation that a release was trained with.

    Args:
        name: Of the release, as far as it is known.
        config: The model's configuration.
        tokenizer: Its tokenizer.

    Source: `llava/eval/run_llava.py`, which goes by names, and the releases' model cards.
    """
    name = name.lower()
    if config.text_config.model_type == "mistral":
        return "mistral_instruct"
    if tokenizer.convert_tokens_to_ids(END_OF_TURN) not in (None, tokenizer.unk_token_id):
        return "chatml_direct"
    for pattern, conversation in ((r"llama[-_]?2", "llava_llama_2"), (r"[-_]v0\b", "llava_v0")):
        if re.search(pattern, name):
            return conversation
    return "llava_v1" if config.projector_type == "linear" else "vicuna_v1"


def starts_anew(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether text behind `<image>` needs a space to be tokenised like a text of its own, as the official code does it.

    Source: `tokenizer_image_token` in `llava/mm_utils.py`.
    """
    alone, behind, spaced = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("\nWhat", "<image>\nWhat", "<image> \nWhat")
    )
    return behind[1:] != alone and spaced[1:] == alone


def _chat_template(place: str | os.PathLike) -> str | None:
    """The conversation that a repository of transformers' brings along."""
    if (path := _file(place, "chat_template.jinja")) is not None:
        return path.read_text(encoding="utf-8")
    given = (_fields(place, name).get("chat_template") for name in ("chat_template.json", "processor_config.json"))
    return next((template for template in given if isinstance(template, str)), None)


def _image_fields(place: str | os.PathLike) -> dict:
    """What an image processor's configuration says: in a file of its own or, since transformers 5, in the processor's."""
    return _fields(place, "preprocessor_config.json") or _fields(place, "processor_config.json").get(
        "image_processor", {}
    )


def load_image_processor(place: str | os.PathLike | None, side: int) -> CLIPImageProcessor:
    """The vision encoder's image processor.

    Args:
        place: Where it lies; CLIP's defaults where there is none.
        side: Of the images, in pixels.
    """
    fields = {} if place is None or os.path.isfile(place) else _image_fields(place)
    kind = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or "CLIP")
    if not fields:
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    if kind.startswith(("CLIP", "Llava")):  # what is LLaVA's about it is our processor's affair
        own = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
        own += tuple(name for name in fields if name.startswith("do_") and name != "do_pad")
        return CLIPImageProcessor(**{name: fields[name] for name in own if name in fields})
    return AutoImageProcessor.from_pretrained(place)


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
        checkpoint: A folder or Hub id: a release, a LoRA fine-tune, a `llava-hf/*` repository; or a file, such as
            `mm_projector.bin`. A `config.json` beside a file is read.
        vision: The vision encoder: a folder or Hub id, or a file in open_clip's layout. Where it is `None` it is the one
            that the checkpoint names. A vision tower in the checkpoint counts in any case.
        language: The language model that a projector or a LoRA fine-tune belongs to: a folder or Hub id. Where it is
            `None` it is the one that LoRA's files name.
        output: Folder to write to.
        conversation: Name of the conversation format; `None` goes by the checkpoint.
        config: What the checkpoint doesn't tell, as fields of `MLPLlavaConfig`; `vision_config` is a dict of its own.
        verify: Check what was written, see `certify`.

    Returns:
        What was done; its `notes` say what was left aside.

    Raises:
        ConversionError: The parts don't fit together; nothing is written.
    """
    overrides = dict(config or {})
    vision_overrides = overrides.pop("vision_config", {})
    release = open_checkpoint(checkpoint)
    notes = []
    base = None
    if release.has("language"):
        if language is not None:
            notes.append(f"{language} is not used: the checkpoint holds its language model.")
        if "delta" in os.path.basename(os.path.abspath(checkpoint)).lower():
            raise ConversionError(
                f"{checkpoint} holds differences from LLaMA's weights, by its name. Add them up first, with the official "
                "llava.model.apply_delta."
            )
    else:
        base = _open_base(release, language)
    alone = base is not None and not release.lora  # a projector without anything else

    # what the configurations say
    whole = release if release.fields else base
    if whole is None:
        raise ConversionError(f"There is no config.json beside {checkpoint}, which a whole model needs.")
    fields, where = whole.fields, f"{whole.place}/config.json"
    theirs = "text_config" in fields
    if theirs:
        options, ratio = _transformers_options(fields, _image_fields(whole.place), where)
    else:
        options, ratio = _official_options(fields)
        if alone and EMBEDDING in release.files.shapes:
            fields = {**fields, "mm_use_im_start_end": True}  # these tokens' rows are why the table is there
    described = base if alone else whole
    text_config = infer_text_config(described.fields, f"{described.place}/config.json")

    # the vision encoder
    inside = next((part for part in (release, base) if part is not None and part.has("vision")), None)
    if inside is not None and vision is not None:
        notes.append(f"The vision tower is the checkpoint's own: the weights in {vision} are not used.")
    named = None if theirs else fields.get("mm_vision_tower")
    vision_files = None
    if theirs and inside is not None:
        vision, vision_config = whole.place, _transformers_config(fields, where).vision_config
    else:
        vision, vision_files, vision_config = _open_vision(vision, named, inside is None, vision_overrides)

    # the tokenizer
    places = [part.place for part in (release, base) if part is not None and part.place]
    place = next((place for place in places if any(_file(place, name) for name in TOKENIZER_FILES)), None)
    if place is None:
        raise ConversionError(f"There is no tokenizer in {' or '.join(places)}: put the language model's there.")
    rows = text_config.vocab_size
    if EMBEDDING in release.files.shapes:
        rows = dimensions(release.files.shapes, EMBEDDING, 2)[0]
    tokenizer = load_tokenizer(place, fields, text_config, rows)
    borders = IMAGE_BORDERS if fields.get("mm_use_im_start_end") else ()
    wanted = max((tokenizer.convert_tokens_to_ids(token) + 1 for token in borders), default=0)
    if alone:
        text_config.vocab_size = max(text_config.vocab_size, wanted)
    elif wanted > text_config.vocab_size:
        raise ConversionError(
            f"{borders[-1]} is token {wanted - 1}, but the language model has {text_config.vocab_size} rows: the tokenizer "
            f"in {place} is not the one that the checkpoint was trained with."
        )

    # the model
    of_projector = release if release.has("projector") or base is None else base
    declared = None if theirs else fields.get("mm_projector_type")
    projector = infer_projector(of_projector.files.shapes, of_projector.layout, declared)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model_config = MLPLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        **{**options, **projector, "image_token_id": image_token_id, **overrides},
    )
    conversion = plan_conversion(release, vision_files, base, model_config, len(borders))
    conversion.notes = notes
    if theirs:
        conversion.direction = ("transformers", "vlbridge")
        their_class = LlavaForConditionalGeneration
        if model_config.image_grid_pinpoints is not None:
            their_class = LlavaNextForConditionalGeneration
        conversion.run = lambda folder: run_llava(folder, whole.place, their_class)
    files, piece, _ = conversion.pieces[f"language_model.{EMBEDDING}"]
    model_config.dtype = files.dtypes[piece.sources[0]]  # the official code runs all parts in the language model's

    if "image_grid_pinpoints" in overrides:
        ratio = "anyres" if overrides["image_grid_pinpoints"] else "pad"
    chat_template = _chat_template(whole.place) if theirs and conversation is None else None
    if conversation is None and chat_template is None:
        name = f"{checkpoint} {fields.get('_name_or_path', '')}"
        conversation = "plain" if alone else conversation_of(name, model_config, tokenizer)
    processor = MLPLlavaProcessor.from_config(
        model_config,
        load_image_processor(vision, model_config.image_size),
        tokenizer,
        chat_template=chat_template,
        image_aspect_ratio=ratio,
        conversation=conversation,
        mm_use_im_start_end=bool(borders),
        space_after_image=not theirs and starts_anew(tokenizer),
    )
    generation = GenerationConfig(
        bos_token_id=text_config.bos_token_id,
        eos_token_id=_ends(text_config, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=512,
    )
    conversion.write(output, generation, processor, verify)
    return conversion


def _ends(text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | list[int]:
    """Tokens that end an answer: the language model's, and ChatML's end of a turn where the tokenizer knows it."""
    ends = text_config.eos_token_id if text_config.eos_token_id is not None else tokenizer.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if end_of_turn not in (None, tokenizer.unk_token_id, *ends):
        ends.append(end_of_turn)
    return ends if len(ends) > 1 else ends[0]


def _open_base(release: Checkpoint, language: str | os.PathLike | None) -> Checkpoint:
    """The language model that a projector or an adapter belongs to."""
    if not (release.has("projector") or release.lora):
        infer_projector(release.files.shapes, release.layout)  # which says what is missing
    language = language or release.base
    if language is None:
        raise ConversionError("The checkpoint holds no language model: give the one it was trained with (--language).")
    base = open_checkpoint(language)
    if not base.has("language") or not base.fields:
        raise ConversionError(f"There is no language model with its config.json in {language}.")
    return base


def _open_vision(given, named: str | None, weights: bool, overrides: Mapping) -> tuple:
    """The vision encoder's place, its tensors if they are wanted, and its configuration."""
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
            f"The checkpoint names {named!r} as its vision tower, which can't be read: {str(error).splitlines()[0]} Give "
            "the vision encoder's folder or Hub id (--vision)."
        ) from error


__all__ = [
    "Checkpoint",
    "checkpoint_table",
    "conversation_of",
    "convert_llava",
    "infer_projector",
    "infer_text_config",
    "open_checkpoint",
    "plan_conversion",
    "usual_names",
]
