"""A recipe for data of one's own: what is there, a bridge of a size that fits it, and batches that fit the device.

    found = look_at("pictures")                     # layout, kind and number of records, by the loaders themselves
    text = new_recipe(found, bridge="mlp")          # YAML with comments, which `read_recipe` reads

Hyper-parameters are those of the shipped recipes: up to `LARGE` records those of `small_*` and `classification`, beyond
it those of the papers' recipes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig

from ..compat import build_from_config
from ..configuration.configuration_bridged import patch_grid
from ..demo import LANGUAGE, VISION
from ..extensions import where_to_load
from ..families import FAMILIES
from ..modeling.modeling_bridge import fill_vision_geometry
from ..modeling.modeling_parts import vision_config_of
from .training_data import hold_out, load
from .training_recipes import SPLITS, Recipe, RecipeError, read_recipe
from .training_rows import as_object, read_json, read_rows


KINDS = {"captions": "caption", "questions": "messages", "classes": "label", "interleaved": "document"}
SIZES = ("small", "medium", "large")
MEDIUM, LARGE = 2_000, 200_000  # records from which on a bridge is of the next size
HELD_OUT = 500  # pictures at most that are held out, of many
SEEN = 6_000  # records that a run of few data sees: no more than TIMES times each
TIMES = 12
CPU_ROWS, GPU_ROWS = 8, 64  # largest batches
CACHE_BYTES = 20_000_000_000
PAPERS = {"mlp": "llava_stage1", "qformer": "blip2_stage2", "perceiver": "flamingo"}
OPTIMIZER = (
    "learning_rate", "adam_beta1", "adam_beta2", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay",
    "max_grad_norm",
)  # fmt: skip
TEXT_TOKENS = 128  # of a record, roughly
IMAGE_FILES = (".json", ".jsonl", ".jsonl.gz", ".parquet")

# What stands above or behind a key of the YAML
COMMENTS = {
    "vision": "both parts stay as they are: folders, or ids on the Hub",
    "bridge": "mlp, qformer or perceiver",
    "dtype": "of the frozen parts; what is trained is kept in float32",
    "learning_rates": "of parts of the bridge that differ",
    "text": "how records become text",
    "cache_features": "the vision encoder sees each picture once; its features are kept on disk",
    "packing": "several short texts in one row; a picture's questions share it",
    "evaluation": "what is not trained on",
    "samples": "every so many steps, what the model says about a few pictures: samples.md",
}


@dataclass
class OwnData:
    """What was found in one's data.

    Args:
        path: Where it is.
        source: Its layout, a key of `training_data.SOURCES`.
        kind: One of `KINDS`.
        records: Number of records to train on.
        held_out: Number of records to evaluate on.
        evaluation: Keys of the data set to evaluate on, beside `source` and `path`; `None` if there is none.
        num_labels: Number of classes, of `classes`.
        options: For the source.
    """

    path: str
    source: str
    kind: str
    records: int
    held_out: int = 0
    evaluation: dict | None = None
    num_labels: int | None = None
    options: dict | None = None


@dataclass
class Device:
    """What is trained on.

    Args:
        name: `"cpu"` or `"cuda"`.
        memory: Of the GPU, in GB (10^9 bytes).
        bfloat16: Whether it computes in bfloat16: NVIDIA's do since Ampere (2020).
    """

    name: str
    memory: float | None = None
    bfloat16: bool = True

    @classmethod
    def here(cls, name: str | None = None, memory: float | None = None) -> Device:
        """The device of this machine, where it isn't said.

        Args:
            name: `"cpu"` or `"cuda"`; `None` takes a GPU if there is one.
            memory: Of the GPU, in GB; `None` asks it.

        Raises:
            ValueError: There is no such device, or the memory of a GPU elsewhere isn't given.
        """
        has_gpu = torch.cuda.is_available()
        name = name or ("cuda" if has_gpu or memory is not None else "cpu")
        if name not in ("cpu", "cuda"):
            raise ValueError(f"device is {name!r}; expected cpu or cuda.")
        if name == "cpu":
            return cls("cpu")
        if memory is None and not has_gpu:
            raise ValueError("there is no GPU here: say how much memory the GPU has, in GB (--memory 24).")
        if memory is None:
            memory = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        return cls("cuda", memory, torch.cuda.is_bf16_supported() if has_gpu else True)


# ---------------------------------------------------------------------- the data


def look_at(path: str | os.PathLike, kind: str | None = None, options: dict | None = None) -> OwnData:
    """Find out what data is: its layout, of which kind, and how much.

    Args:
        path: A folder or a file.
        kind: One of `KINDS`, where records are of several.
        options: For the source, such as `{"caption": "title"}`.

    Raises:
        ValueError: There is no such data, its layout is unknown, or it is of several kinds or of another one.
        OSError: It can't be read.
    """
    path, options = os.fspath(path), dict(options or {})
    source = layout_of(path)
    splits = splits_of(path) if source == "imagefolder" else []
    records = load(source, path, split="train" if "train" in splits else None, **options)
    found = [name for name, column in KINDS.items() if column in records.column_names]
    if "label" in records.column_names and not any(label is not None for label in records["label"]):
        found.remove("classes")
    if kind is not None and kind not in found:
        raise ValueError(f"{path} has no {kind}; it has {' and '.join(found) or 'nothing to train on'}.")
    if kind is None and len(found) != 1:
        raise SeveralKinds(path, found)
    kind = kind or found[0]
    held_out, count = evaluation_of(source, path, records, splits, options)
    labels = _num_labels(records) if kind == "classes" else None
    return OwnData(path, source, kind, len(records) - count, count or len(held_out or ()), held_out, labels, options)


class SeveralKinds(ValueError):
    """Records are of several kinds.

    Args:
        path: Where they are.
        kinds: Which.
    """

    def __init__(self, path: str, kinds: list[str]):
        self.kinds = kinds
        super().__init__(f"{path} has {' and '.join(kinds)}: say which to train on (--kind {kinds[0]}).")


def layout_of(path: str) -> str:
    """The name of the layout that a folder or file is in, a key of `training_data.SOURCES`.

    Args:
        path: The folder or file.

    Raises:
        ValueError: There is nothing, or its layout is unknown.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        names = sorted(os.listdir(place))
        if {"state.json", "dataset_dict.json"} & set(names):
            return "hub"
        if any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in names):
            return "webdataset"
        rows = [name for name in names if name.endswith(IMAGE_FILES) and not name.startswith("metadata.")]
        return _layout_of_file(place / rows[0]) if rows else "imagefolder"
    if not place.is_file():
        raise ValueError(f"{path}: there is no such file or folder.")
    return "webdataset" if place.name.endswith((".tar", ".tar.gz", ".tgz")) else _layout_of_file(place)


def _layout_of_file(file: Path) -> str:
    first: dict = {}
    if file.name.endswith(IMAGE_FILES):
        content = read_json(file) if file.suffix == ".json" else None
        if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
            return "coco_captions"
        place, first = next(iter(read_rows(file, checked=False)), (str(file), {}))
        first = as_object(first, place)
    for layout, keys in (("llava", {"conversations"}), ("interleaved", {"text_list"}), ("interleaved", {"texts"})):
        if keys <= first.keys():
            return layout
    raise ValueError(
        f"{file} is in none of the layouts that are known: a folder of pictures with metadata.jsonl (file_name and "
        "caption, question and answer, or label) or with a subfolder per class; JSON of LLaVA (conversations), COCO "
        "(annotations), MMC4 (text_list) or OBELICS (texts); tars of WebDataset."
    )


def splits_of(path: str) -> list[str]:
    """The splits of a folder of pictures, as `datasets` finds them.

    Args:
        path: The folder.

    Raises:
        ValueError: There are no pictures in it.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    folder = os.path.abspath(os.path.expanduser(path))
    try:
        files = load_dataset_builder("imagefolder", data_dir=folder).config.data_files
    except (DatasetsError, FileNotFoundError) as error:
        raise ValueError(f"{path}: there are no pictures in it.") from error
    return [str(name) for name in files or {}]


def evaluation_of(source: str, path: str, records, splits: Iterable[str], options: dict) -> tuple[dict | None, int]:
    """What to evaluate on: a split of the folder, or a part of the pictures.

    Args:
        source: The layout.
        path: Where the data is.
        records: All records but those of other splits.
        splits: The folder's splits.
        options: For the source.

    Returns:
        Keys of the data set, and how many of `records` it takes away.
    """
    others = [name for name in splits if name in SPLITS and name != "train"]
    if others:
        return {"split": "test" if "test" in others else others[0]}, 0
    every = max(10, len(records) // HELD_OUT)
    count = len(hold_out(records, every, held_out=True)) if len(records) >= 20 else 0
    return ({"hold_out": every}, count) if count else (None, 0)


def _num_labels(records) -> int:
    names = getattr(records.features["label"], "names", None)
    return len(names) if names else max(label for label in records["label"] if label is not None) + 1


# ---------------------------------------------------------------------- the bridge


def size_for(records: int) -> str:
    """The size of a bridge for so many records, one of `SIZES`."""
    return "small" if records < MEDIUM else "medium" if records < LARGE else "large"


def default_bridge(kind: str) -> str:
    """The family for a kind of data, where none is named."""
    return {"classes": "qformer", "interleaved": "perceiver"}.get(kind, "mlp")


def options_for(bridge: str, size: str, layers: int | None = None) -> dict:
    """Options of a bridge of a size.

    Args:
        bridge: A family.
        size: One of `SIZES`; `"large"` is the papers' size.
        layers: Number of layers of the language model; `None` for classes, which need none.
    """
    classifies = layers is None
    if size == "large":
        return {}
    options = dict(read_recipe(f"small_{bridge}").bridge_options)
    if size == "small" and bridge == "qformer":
        options["qformer_config"] = dict(read_recipe("classification_warm_up").bridge_options["qformer_config"])
        del options["qformer_config"]["max_position_embeddings"]  # of notes, which it does not read here
    elif size == "small" and bridge == "mlp":
        options["projector_type"] = "linear"  # as in LLaVA (arXiv 2304.08485)
    elif size == "small" and bridge == "perceiver":
        options |= {"num_latents": 8, "resampler_depth": 1, "resampler_num_heads": 2, "feed_forward_multiplier": 1}
        options |= {"cross_attention_every_n_layers": 10, "cross_attention_num_heads": 4}
    if "cross_attention_every_n_layers" in options and layers is not None:
        options["cross_attention_every_n_layers"] = min(options["cross_attention_every_n_layers"], max(1, layers // 3))
    if classifies:
        options = {name: value for name, value in options.items() if not name.startswith(("cross_attention", "gate"))}
        if bridge == "mlp":
            options["hidden_size"] = 128 if size == "small" else 512
    return options


def built_without_weights(found: OwnData, bridge: str, vision: str, language: str, options: dict):
    """The model of a recipe on the meta device: its sizes, without its weights.

    Args:
        found: The data.
        bridge: A family.
        vision: The vision encoder.
        language: The language model; classifiers have none.
        options: Of the bridge.

    Raises:
        ValueError: The parts or the options don't fit together.
        OSError: A part's configuration can't be loaded.
    """
    family = FAMILIES[bridge]
    model_class = family.classifier_class if found.kind == "classes" else family.model_class
    given = {"vision_config": vision_config_of(AutoConfig.from_pretrained(where_to_load(vision))), **options}
    if found.kind == "classes":
        given["num_labels"] = found.num_labels
    else:
        given["text_config"] = AutoConfig.from_pretrained(where_to_load(language))
        given["image_token_id"] = 0
        given["special_token_ids"] = list(range(len(model_class.special_tokens))) or None
    config = model_class.config_class(**given)
    fill_vision_geometry(config)
    with torch.device("meta"):
        return build_from_config(model_class, config)


def _count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------------- the device


def rows_that_fit(model, device: Device) -> int:
    """The largest batch, a power of two, whose training fits into the memory of a device.

    Weights and activations take 2 bytes per number, what is trained 16 per parameter: weights, gradients and Adam's two
    moments in float32. A layer keeps 34 numbers of a byte per token and channel.

    Args:
        model: The model, on the meta device.
        device: The device.

    Returns:
        Rows; 0 if not even one fits.

    Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198),
    equation 2, without attention scores, which are not kept.
    """
    if device.name == "cpu":
        return CPU_ROWS
    trained = _count(model.bridge)
    free = 0.9 * device.memory * 1e9 - 2 * (_count(model) - trained) - 16 * trained - 1e9
    if model.config.text_config is None:
        return GPU_ROWS if free > 0 else 0
    text = model.config.text_config.get_text_config()
    in_prompt = model.config.image_token_range()[1] if model.config.visual_tokens_in_prompt else 1
    row = 34 * text.num_hidden_layers * text.hidden_size * (in_prompt + TEXT_TOKENS)
    row += 10 * text.vocab_size * TEXT_TOKENS  # logits, their gradients and a copy in float32
    fit = int(free // row)
    return 0 if fit < 1 else min(GPU_ROWS, 1 << (fit.bit_length() - 1))


def _features_cache(model, pictures: int) -> dict | None:
    """How to keep the encoder's features; `None` if they are too many."""
    side = model.config.image_size
    width = model.config.vision_feature_size
    numbers = pictures * math.prod(patch_grid(model.config, side, side)) * width
    for dtype, size in (("float32", 4), ("float16", 2)):
        if size * numbers <= CACHE_BYTES:
            return {"dtype": dtype}
    return None


# ---------------------------------------------------------------------- the recipe


def new_recipe(
    found: OwnData,
    bridge: str | None = None,
    size: str | None = None,
    vision: str = VISION,
    language: str = LANGUAGE,
    device: Device | None = None,
) -> str:
    """Write a recipe for data of one's own.

    Args:
        found: The data, from `look_at`.
        bridge: A family; by default `default_bridge`.
        size: One of `SIZES`; by default it follows the number of records.
        vision: Vision encoder: Hub id or folder.
        language: Language model: Hub id or folder; classes need none.
        device: What is trained on; by default this machine's.

    Returns:
        YAML with comments.

    Raises:
        ValueError: Something is unknown, or does not fit the device.
        OSError: A part's configuration can't be loaded.
    """
    device = device or Device.here()
    bridge = bridge or default_bridge(found.kind)
    size = size or size_for(found.records)
    for name, value, known in (("bridge", bridge, tuple(FAMILIES)), ("size", size, SIZES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
    layers = None
    if found.kind != "classes":
        layers = AutoConfig.from_pretrained(where_to_load(language)).get_text_config().num_hidden_layers
    options = options_for(bridge, size, layers)
    model = built_without_weights(found, bridge, vision, language, options)
    fit = rows_that_fit(model, device)
    if not fit:
        raise ValueError(
            f"{vision} and {language} with a {size} {bridge} bridge do not fit into {device.memory:g} GB: take smaller "
            "parts, or a larger GPU."
        )
    fields = _fields(found, bridge, size, vision, language, device, options, model, fit)
    Recipe.from_dict(fields)  # raises RecipeError
    return _as_yaml(fields, found, model, device)


def _fields(found, bridge, size, vision, language, device, options, model, fit) -> dict:
    """The recipe as `Recipe.from_dict` takes it."""
    classifies = found.kind == "classes"
    base = read_recipe("classification" if classifies else PAPERS[bridge] if size == "large" else f"small_{bridge}")
    fields: dict = {"description": f"{found.records:,} {found.kind} of {Path(found.path).name}"}
    fields |= {"stage": "classification"} if classifies else {}
    fields |= {"vision": vision} if classifies else {"vision": vision, "language": language}
    fields |= {
        "bridge": bridge,
        "bridge_options": {**({"num_labels": found.num_labels} if classifies else {}), **options},
    }
    half = device.name == "cuda" and device.bfloat16
    fields["dtype"] = "bfloat16" if half else "float32"
    if base.learning_rates:
        fields["learning_rates"] = base.learning_rates
    if base.no_weight_decay:
        fields["no_weight_decay"] = base.no_weight_decay
    if found.kind == "captions":
        fields["text"] = {"ask_for_captions": True}
    elif found.kind == "interleaved":
        fields["text"] = {"max_images": 6, "max_length": 512}
    if found.kind != "interleaved" and (cache := _features_cache(model, found.records + found.held_out)):
        fields["cache_features"] = cache
    if language == LANGUAGE and found.kind in ("captions", "questions"):
        fields["packing"] = dict(vars(read_recipe(f"small_{bridge}").packing))
    here = {"source": found.source, "path": found.path, **({"options": found.options} if found.options else {})}
    held_out = found.evaluation or {}
    fields["data"] = [{**here, **{name: value for name, value in held_out.items() if name == "hold_out"}}]
    if found.evaluation is not None:
        answers = {"generate": -1} if classifies else {"generate": 50, "max_new_tokens": 30}
        fields["evaluation"] = [{**here, **held_out, **({} if found.kind == "interleaved" else answers)}]
    fields["arguments"] = _arguments(found, base, device, half, fit, classifies)
    steps = fields["arguments"]["max_steps"]
    fields["samples"] = {"every": max(1, steps // 6), "count": 6, **({} if classifies else {"max_new_tokens": 30})}
    return fields


def _arguments(found: OwnData, base: Recipe, device: Device, half: bool, fit: int, classifies: bool) -> dict:
    own = base.arguments
    most = min(fit, GPU_ROWS) if device.name == "cuda" else own["per_device_train_batch_size"] if classifies else fit
    few = 1 << max(2, (found.records // (8 if classifies else 20)).bit_length() - 1)  # so that there are enough steps
    rows = min(most, few)
    seen = own["max_steps"] * own["per_device_train_batch_size"] if classifies else SEEN
    times = 3 * TIMES if classifies else TIMES
    steps = max(1, math.ceil(max(found.records, min(seen, times * found.records)) / rows))
    arguments = {"max_steps": steps, "per_device_train_batch_size": rows, "per_device_eval_batch_size": 2 * rows}
    arguments |= {name: own[name] for name in OPTIMIZER if name in own}
    arguments |= {"warmup_steps": max(1, steps // 20)}
    if device.name == "cuda":
        arguments |= {"bf16": True} if half else {"fp16": True}
    elif torch.cuda.is_available():
        arguments["use_cpu"] = True
    return arguments | {"logging_steps": max(1, steps // 50), "save_steps": max(1, steps // 3), "save_total_limit": 2}


def _as_yaml(fields: dict, found: OwnData, model, device: Device) -> str:
    """The recipe as YAML, with a comment where a reader has a question."""
    trained = _count(model.bridge)
    rows = fields["arguments"]["per_device_train_batch_size"]
    where = "a CPU" if device.name == "cpu" else f"a GPU with {device.memory:g} GB"
    times = fields["arguments"]["max_steps"] * rows / max(found.records, 1)
    behind = {
        "max_steps": f"each of the {found.records:,} records {times:.1f} times",
        "per_device_train_batch_size": f"for {where}; less if memory runs out",
        "save_steps": "what a run that was stopped goes on from (--resume)",
    }
    notes = COMMENTS | {"bridge_options": f"{trained / 1e6:,.2f} M parameters are trained"}
    if found.evaluation and "hold_out" in found.evaluation:
        notes["data"] = f"one picture in {found.evaluation['hold_out']} is held out, to evaluate on"
    if found.kind == "captions":
        notes["text"] = "captions answer the question that vlbridge caption asks"
    lines = [
        f"# Made by vlbridge new-recipe for {where}. Check the data, try three steps, then train:",
        f"#   vlbridge data check {found.source} {found.path}",
        "#   vlbridge train THIS_FILE --smoke",
        "#   vlbridge train THIS_FILE --output my-bridge",
    ]
    if found.evaluation is None:
        lines.append("# There are too few pictures to hold some out: name others in evaluation, as in data.")
    for name, value in fields.items():
        if name in ("arguments", "data", "evaluation"):
            lines.append(f"{name}:" + (f"  # {notes[name]}" if name in notes else ""))
            lines += _block(value, behind)
            continue
        line = _line({name: value})
        if name not in notes:
            lines.append(line)
        else:
            lines += [f"# {notes[name]}", line] if len(line) > 60 else [f"{line}  # {notes[name]}"]
    return "\n".join(lines) + "\n"


def _block(value, behind: dict) -> list[str]:
    if isinstance(value, list):
        return [f"  - {_flow(entry)}" for entry in value]
    return [
        f"  {_line({name: each})}" + (f"  # {behind[name]}" if name in behind else "") for name, each in value.items()
    ]


def _flow(value) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000).strip()


def _line(entry: dict) -> str:
    ((name, value),) = entry.items()
    return f"{name}: {_flow(value).removesuffix('...').strip()}"


__all__ = [
    "Device",
    "KINDS",
    "OwnData",
    "RecipeError",
    "SIZES",
    "SeveralKinds",
    "built_without_weights",
    "default_bridge",
    "layout_of",
    "look_at",
    "new_recipe",
    "options_for",
    "rows_that_fit",
    "size_for",
    "splits_of",
]
