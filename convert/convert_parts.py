"""What the conversions share: frozen parts in other layouts, and writing the whole.

Vision encoders: open_clip's and OpenAI's CLIP, LAVIS's EVA ViT-g and CLIP ViT-L, and any folder in transformers' layout.
Language models: any folder in transformers' layout, as old as it may be.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from transformers import (
    AutoConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..version import __version__
from .convert_certificate import Checks, certify
from .convert_files import (
    Entry,
    ShapeTable,
    Stored,
    TensorFiles,
    dimensions,
    require_finite,
    write_tensors,
    written_whole,
)
from .convert_tables import ConversionError, Drop, Piece, Rename, Rule, Shapes, Split, ZeroKeyBias, check, plan, twins


_UNKNOWN_HEADS = (
    "Shapes don't tell how many attention heads a vision encoder of width {} has: give it in --config, as "
    '{{"vision_config": {{"num_attention_heads": ...}}}}.'
)
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BUFFER = "a buffer that the model computes by itself"
OFFICIAL = "the official layout"
# open_clip's vision tower, as transformers' CLIPVisionModel calls it
_CLIP_LAYER = ("visual.transformer.resblocks.{}", "vision_model.encoder.layers.{}")
OPEN_CLIP_TABLE: list[Rule] = [
    Rename("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    Rename("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Rename("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    Drop("visual.proj", "the projection into CLIP's space shared with text is not used"),
    *(
        Rename(f"visual.{official}.{kind}", f"vision_model.{ours}.{kind}")
        for official, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"))
        for kind in ("weight", "bias")
    ),
    *(
        Split(
            f"{_CLIP_LAYER[0]}.attn.in_proj_{kind}",
            tuple(f"{_CLIP_LAYER[1]}.self_attn.{name}_proj.{kind}" for name in "qkv"),
        )
        for kind in ("weight", "bias")
    ),
    *(
        Rename(f"{_CLIP_LAYER[0]}.{official}.{kind}", f"{_CLIP_LAYER[1]}.{ours}.{kind}")
        for official, ours in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        )
        for kind in ("weight", "bias")
    ),
]
# of the other tower
CLIP_TEXT = re.compile(r"(transformer|token_embedding|ln_final|text|text_model)\..*|positional_embedding|logit_scale|"
                       r"logit_bias|(text|visual)_projection(\.weight)?|.*\.?position_ids")  # fmt: skip
# LAVIS's EVA ViT-g, as transformers' Blip2VisionModel calls it
_EVA_LAYER = ("blocks.{}", "vision_model.encoder.layers.{}")
_NOT_REACHED = "the official encoder ends before it"
EVA_TABLE: list[Rule] = [
    Rename("cls_token", "vision_model.embeddings.class_embedding"),
    Rename("pos_embed", "vision_model.embeddings.position_embedding"),
    *(
        Rename(f"patch_embed.proj.{kind}", f"vision_model.embeddings.patch_embedding.{kind}")
        for kind in ("weight", "bias")
    ),
    Rename(f"{_EVA_LAYER[0]}.attn.qkv.weight", f"{_EVA_LAYER[1]}.self_attn.qkv.weight"),
    ZeroKeyBias(
        (f"{_EVA_LAYER[0]}.attn.q_bias", f"{_EVA_LAYER[0]}.attn.v_bias"), f"{_EVA_LAYER[1]}.self_attn.qkv.bias"
    ),
    *(
        Rename(f"{_EVA_LAYER[0]}.{official}.{kind}", f"{_EVA_LAYER[1]}.{ours}.{kind}")
        for official, ours in (
            ("attn.proj", "self_attn.projection"),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        )
        for kind in ("weight", "bias")
    ),
    *(Drop(f"{name}.{kind}", _NOT_REACHED) for name in ("norm", "fc_norm", "head") for kind in ("weight", "bias")),
    Drop("mask_token", "used in pretraining only"),
]
# where today's transformers calls things differently than the checkpoints do
LANGUAGE_TABLES: dict[str, list[Rule]] = {
    "gpt_neox": [
        Rename("embed_out.weight", "lm_head.weight"),
        Drop("gpt_neox.layers.{}.attention.bias", BUFFER),
        Drop("gpt_neox.layers.{}.attention.masked_bias", BUFFER),
        Drop("gpt_neox.layers.{}.attention.rotary_emb.inv_freq", BUFFER),
    ],
    "llama": [Drop("model.layers.{}.self_attn.rotary_emb.inv_freq", BUFFER)],
    "t5": [
        Drop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "cross-attention has none"),
    ],
}
# what shapes can't tell about LAVIS's encoders, by layout and width; its encoders end one block before their files do
LAVIS_ENCODERS: dict[tuple[str, int], dict] = {
    ("eva", 1408): {"num_hidden_layers": 39, "num_attention_heads": 16},
    ("clip", 1024): {"num_hidden_layers": 23, "num_attention_heads": 16},
}


# ---------------------------------------------------------------------- language models


def read_text_config(language: str | os.PathLike) -> PreTrainedConfig:
    """A language model's configuration, as old as it may be.

    Args:
        language: Folder or Hub id.

    Raises:
        ConversionError: Its `config.json` does not say what it is.
    """
    fields, _ = PreTrainedConfig.get_config_dict(language)
    return text_config_of(fields, f"{language}/config.json")


def text_config_of(fields: Mapping, where: str) -> PreTrainedConfig:
    """A language model's configuration from what its `config.json` says.

    Args:
        fields: What it says.
        where: Names it in the error.

    Raises:
        ConversionError: It does not say what kind of model it is.
    """
    fields = dict(fields)
    attention = fields.get("attn_config")
    if isinstance(attention, dict):  # MPT's: transformers takes probabilities for integers there, and bounds for floats
        for name, kind in (("attn_pdrop", int), ("clip_qkv", float), ("softmax_scale", float)):
            if isinstance(attention.get(name), (int, float)) and kind(attention[name]) == attention[name]:
                attention[name] = kind(attention[name])
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConversionError(f"{where} does not say its model_type.")
    fields.pop("auto_map", None)  # code beside the weights is not run: the class is transformers' or ours
    config = AutoConfig.for_model(model_type, **fields)
    config.use_cache = True  # the official files say false, for training
    return config


def language_table(config: PreTrainedConfig, tensors: Iterable[str], tied: Iterable[str] = ()) -> list[Rule]:
    """What a language model's own checkpoint becomes.

    Args:
        config: The language model's configuration.
        tensors: Names of its tensors in today's transformers, without `language_model.` in front.
        tied: Names of its tensors that are second names of others.
    """
    tensors = list(tensors)
    changed = LANGUAGE_TABLES.get(config.model_type, [])
    renamed = {rule.target for rule in changed if isinstance(rule, Rename)}
    tied = set(tied) | ({"lm_head.weight", "embed_out.weight"} if config.tie_word_embeddings else set())
    return [
        *(Rename(name, name) for name in tensors),
        *(rule for rule in changed if not (isinstance(rule, Rename) and rule.target not in set(tensors))),
        *(Drop(name, "tied to the input embeddings") for name in sorted(tied - set(tensors) - renamed)),
    ]


def with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Cut an embedding table, or fill it up with its mean: what an unknown token is, on average."""
    if rows == table.shape[0]:
        return table
    if rows < table.shape[0]:
        return table[:rows].clone()
    mean = table.float().mean(dim=0).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])


def resized(rows: int) -> Change:
    """The change to an embedding table that has another number of rows."""
    return Change(partial(with_rows, rows=rows), lambda shape: (rows, *shape[1:]))


LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


def lora_changes(files, settings: Mapping) -> dict[str, Change]:
    """What merging PEFT's LoRA adapter does to the weights that it is for: `weight + alpha / r * B @ A`.

    Args:
        files: The adapter's tensors; those that are not LoRA's are not looked at.
        settings: Its `adapter_config.json`.

    Returns:
        From names of weights, as the adapter has them, to their changes.

    Raises:
        ConversionError: It is another kind of adapter, or half of a pair is missing.

    Source: LoRA (arXiv 2106.09685, section 4.1), rank-stabilised LoRA (arXiv 2312.03732); `peft/tuners/lora/layer.py`.
    """
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA" or settings.get("use_dora"):
        raise ConversionError(
            f"The adapter is one of {'DoRA' if settings.get('use_dora') else kind}; only LoRA's are merged here. Merge it "
            "with PEFT's merge_and_unload first."
        )
    pairs: dict[str, dict[str, str]] = {}
    for key in files.shapes:
        if "lora_" not in key:
            continue
        if (match := LORA_KEY.fullmatch(key)) is None:
            raise ConversionError(f"{key} is none of LoRA's matrices for linear layers, which are what is merged here.")
        pairs.setdefault(match["module"], {})[match["part"]] = key
    changes = {}
    for module, keys in pairs.items():
        if len(keys) < 2:
            raise ConversionError(f"The adapter has only one of LoRA's two matrices for {module}.")
        (rank, taken), (gives, _) = (dimensions(files.shapes, keys[part], 2) for part in "AB")
        alpha = settings["lora_alpha"]
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        transposed = bool(settings.get("fan_in_fan_out"))
        shape = (taken, gives) if transposed else (gives, taken)

        def apply(weight, keys=keys, scale=scale, transposed=transposed):
            update = scale * files.read(keys["B"]).float() @ files.read(keys["A"]).float()
            return (weight.float() + (update.T if transposed else update)).to(weight.dtype)

        def checked(given, module=module, shape=shape):
            if tuple(given) != shape:
                raise ConversionError(
                    f"The adapter is for a {module} of {list(shape)}, but the language model's is {list(given)}: it was "
                    "trained with another language model."
                )
            return tuple(given)

        changes[f"{module}.weight"] = Change(apply, checked, (files,))
    return changes


# ---------------------------------------------------------------------- vision encoders


def layer_numbers(keys: Iterable[str], pattern: str) -> list[int]:
    """The numbers that a pattern's first group finds at the beginning of keys, sorted."""
    return sorted({int(match.group(1)) for key in keys if (match := re.match(pattern, key))})


def vision_layout(keys: Iterable[str]) -> str:
    """Whose names these are: `"clip"` (open_clip and OpenAI), `"eva"` (LAVIS) or `"transformers"`."""
    keys = set(keys)
    if "visual.conv1.weight" in keys:
        return "clip"
    return "eva" if {"cls_token", "patch_embed.proj.weight"} <= keys else "transformers"


def open_clip_config(shapes: Shapes, **overrides) -> CLIPVisionConfig:
    """Configuration of open_clip's vision tower.

    Args:
        shapes: Of its checkpoint.
        overrides: What shapes can't tell: `num_attention_heads` (64 channels each in CLIP) and `hidden_act` (OpenAI's
            models have `"quick_gelu"`, the default).

    Raises:
        ConversionError: There is no vision transformer in the checkpoint.
    """
    if "visual.conv1.weight" not in shapes or "visual.class_embedding" not in shapes:
        raise ConversionError(
            "There is no vision transformer of open_clip in the vision checkpoint (visual.conv1.weight)."
        )
    width, channels, patch_size, _ = dimensions(shapes, "visual.conv1.weight", 4)
    patches = dimensions(shapes, "visual.positional_embedding", 2)[0] - 1
    if "num_attention_heads" not in overrides and width % 64:
        raise ConversionError(_UNKNOWN_HEADS.format(width))
    found = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": round(patches**0.5) * patch_size,
        "num_hidden_layers": len(layer_numbers(shapes, r"visual\.transformer\.resblocks\.(\d+)\.")),
        "num_attention_heads": width // 64,
        "intermediate_size": dimensions(shapes, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    return CLIPVisionConfig(**{**found, **overrides})


def eva_config(shapes: Shapes, **overrides) -> Blip2VisionConfig:
    """Configuration of LAVIS's EVA ViT-g.

    Args:
        shapes: Of its checkpoint.
        overrides: What shapes can't tell: `num_attention_heads`.

    Raises:
        ConversionError: The number of attention heads is not known for an encoder of this width.
    """
    width, _, patch_size, _ = dimensions(shapes, "patch_embed.proj.weight", 4)
    known = LAVIS_ENCODERS.get(("eva", width), {})
    if "num_attention_heads" not in {**known, **overrides}:
        raise ConversionError(_UNKNOWN_HEADS.format(width))
    found = {
        "hidden_size": width,
        "patch_size": patch_size,
        "image_size": round((dimensions(shapes, "pos_embed", 3)[1] - 1) ** 0.5) * patch_size,
        "num_hidden_layers": len(layer_numbers(shapes, r"blocks\.(\d+)\.")),
        "intermediate_size": dimensions(shapes, "blocks.0.mlp.fc1.weight", 2)[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "initializer_range": 0.02,
    }
    return Blip2VisionConfig(**{**found, **known, **overrides})


def read_vision_config(files, vision: str | os.PathLike | None, overrides: Mapping) -> PreTrainedConfig:
    """A vision encoder's configuration: from its files' shapes, or from its folder.

    Args:
        files: Its tensors.
        vision: Where they lie.
        overrides: What shapes can't tell, as fields of the configuration.

    Raises:
        ConversionError: It is none of the known layouts.
    """
    layout = vision_layout(files.shapes)
    if layout == "eva":
        return eva_config(files.shapes, **overrides)
    if layout == "clip" or vision is None or os.path.isfile(vision):
        return open_clip_config(files.shapes, **overrides)
    config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", None) or config
    if config.model_type == "instructblip_vision_model":  # BLIP-2's, under another name
        fields = config.to_dict()
        config = Blip2VisionConfig(
            **{name: fields[name] for name in Blip2VisionConfig.__dataclass_fields__ if name in fields}
        )
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def vision_pieces(files, expected: Iterable[str], num_layers: int | None = None) -> dict[str, Piece]:
    """Where the tensors of the vision encoder come from.

    Args:
        files: The encoder's tensors.
        expected: Names of the tensors that are wanted, with `vision_model.` in front.
        num_layers: Layers beyond these are left out; `None` takes all.

    Raises:
        ConversionError: A key is unknown.
    """
    keys = [key for key in files.shapes if not CLIP_TEXT.fullmatch(key)]
    if num_layers is not None:
        surplus = re.compile(r"(?:.*\.)?(?:blocks|resblocks|layers)\.(\d+)\..*")
        keys = [key for key in keys if not ((match := surplus.fullmatch(key)) and int(match.group(1)) >= num_layers)]
    layout = vision_layout(keys)
    if layout != "transformers":
        return plan(OPEN_CLIP_TABLE if layout == "clip" else EVA_TABLE, keys)
    # a whole vision-language model: the rest of it is not meant
    if any(key.startswith(("language_model.", "qformer.")) for key in keys):
        keys = [key for key in keys if key.startswith("vision_model.")]
    # until transformers 5 the names of CLIP's vision tower began with `vision_model.`
    table: list[Rule] = []
    for target in expected:
        name = target.removeprefix("vision_model.")
        table.append(Rename(name if name in files.shapes else f"vision_model.{name}", target))
    return plan(table, keys)


def interpolated(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings, `(..., 1 + patches, channels)` with CLS in front, for a grid of `side` x `side` patches."""
    table = positions.reshape(-1, positions.shape[-1]).float()
    old = round((table.shape[0] - 1) ** 0.5)
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    table = torch.cat([table[:1], grid.flatten(2)[0].T])  # (1 + side * side, channels)
    return table.reshape(*positions.shape[:-2], *table.shape).to(positions.dtype)


def for_grid(side: int) -> Change:
    """The change to position embeddings for images of another size."""
    return Change(partial(interpolated, side=side), lambda shape: (*shape[:-2], 1 + side * side, shape[-1]))


# ---------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Change:
    """What is done to a tensor on its way.

    Args:
        apply: From the tensor to the changed one.
        shape: From its shape to the changed one's.
        reads: Other files that it takes something from.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    reads: tuple[TensorFiles, ...] = ()


class Renamed:
    """A checkpoint under other names.

    Args:
        files: The checkpoint.
        names: From its keys to the names; other keys are left out.
    """

    def __init__(self, files, names: Mapping[str, str]):
        self.path = getattr(files, "path", "the checkpoint")
        self.files, self.keys = files, {name: key for key, name in names.items()}
        self.shapes = ShapeTable(self.path, {name: tuple(files.shapes[key]) for key, name in names.items()})
        self.dtypes = {name: files.dtypes[key] for key, name in names.items()}

    def stored(self, name: str) -> Stored | torch.Tensor:
        return self.files.stored(self.keys[name])

    def read(self, name: str) -> torch.Tensor:
        return self.files.read(self.keys[name])

    def origin(self, name: str):
        return self.files.origin(self.keys[name])


class Merged:
    """Two checkpoints as one; where both have a tensor, the first one's counts."""

    def __init__(self, first, second):
        self.path, self.first, self.second = first.path, first, second
        self.shapes = ShapeTable(self.path, {**second.shapes, **first.shapes})
        self.dtypes = {**second.dtypes, **first.dtypes}

    def _has(self, name: str):
        return self.first if name in self.first.shapes else self.second

    def stored(self, name: str) -> Stored | torch.Tensor:
        return self._has(name).stored(name)

    def read(self, name: str) -> torch.Tensor:
        return self._has(name).read(name)

    def origin(self, name: str):
        return self._has(name).origin(name)


class Constants:
    """Tensors that are in no file: norms that the official model does not have and nobody reads.

    Args:
        values: From names to shape, dtype and the value everywhere.
    """

    path = label = "constants"
    files: ClassVar[dict] = {}

    def __init__(self, values: Mapping[str, tuple[tuple[int, ...], torch.dtype, float]]):
        self.values = dict(values)
        self.shapes = {name: shape for name, (shape, _, _) in self.values.items()}
        self.dtypes = {name: dtype for name, (_, dtype, _) in self.values.items()}

    def read(self, name: str) -> torch.Tensor:
        shape, dtype, value = self.values[name]
        return torch.full(shape, value, dtype=dtype)

    stored = read

    def origin(self, name: str) -> Constants:
        return self


@dataclass
class Conversion:
    """A conversion that has been worked out, and can be written.

    Args:
        config: Of the converted model.
        pieces: For each of its tensors: the files it comes from, how, and what is changed (`None`: nothing).
        model: The converted model on the meta device.
        notes: What the user should know about it.
        left_out: Tensors of the checkpoint that were not taken over, and why.
        direction: Whose layout it was and is.
        checkpoint: The files that count most: what was trained, beside frozen parts from elsewhere.
        run: Lets both sides answer fixed inputs, given the folder that was written; `None` where one of them can't run here.
    """

    config: PreTrainedConfig
    pieces: dict[str, tuple[TensorFiles, Piece, Change | None]]
    model: PreTrainedModel = field(repr=False)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    direction: tuple[str, str] = (OFFICIAL, "vlbridge")
    checkpoint: TensorFiles | None = None
    run: Callable[[Path], list[dict]] | None = field(default=None, repr=False)

    def load(self, name: str) -> torch.Tensor:
        """One tensor of the converted model.

        Raises:
            ConversionError: There is NaN or infinity in it or in what it is made from.
        """
        files, piece, change = self.pieces[name]
        tensor = piece.load(files.read)
        require_finite(tensor, " and ".join(piece.sources))
        if change is not None:
            tensor = change.apply(tensor)
            require_finite(tensor, name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape in the written file."""
        files, piece, change = self.pieces[name]
        shape = piece.shape(files.shapes)
        return shape if change is None else change.shape(shape)

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, likewise."""
        files, piece, _ = self.pieces[name]
        return files.dtypes[piece.sources[0]]

    def entries(self) -> Iterator[Entry]:
        """What `write_tensors` takes."""
        for name in self.pieces:
            yield name, self.shape(name), self.dtype(name), partial(self.load, name)

    def leaves(self) -> list[TensorFiles]:
        """Everything that something is read from."""
        found = {}
        for files, piece, change in self.pieces.values():
            read = [(files, piece.sources), *((other, other.shapes) for other in (change.reads if change else ()))]
            found.update((id(leaf), leaf) for files, names in read for leaf in map(files.origin, names))
        return list(found.values())

    def fingerprint(self) -> str:
        """SHA-256 of what goes in, as far as names, sizes and times of files tell, and of what is done with it."""
        files = {path.resolve() for leaf in self.leaves() for path in leaf.files.values()}
        # what says how they are to be read: settings of adapters, for one
        files |= {path.resolve() for file in files for path in file.parent.glob("*.json")}
        about = {
            "version": __version__,
            "config": self.config.to_dict(),
            "files": sorted([str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files),
            "tensors": [
                [name, repr(piece), list(self.shape(name)), str(self.dtype(name)), change is not None]
                for name, (_, piece, change) in self.pieces.items()
            ],
        }
        return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()

    def write(
        self,
        output: str | os.PathLike,
        generation: GenerationConfig | None,
        processor: ProcessorMixin,
        verify: bool = True,
        card: str | None = None,
    ) -> None:
        """Write the model with its processor and a certificate, all of it or nothing.

        After an interruption the same call goes on where the last one stopped, see `written_whole`.

        Args:
            output: Empty folder, or one that is made.
            generation: Generation defaults.
            processor: Processor that belongs to the model.
            verify: Check what was written, see `certify`.
            card: What its README.md begins with; `None` writes none.

        Raises:
            ConversionError: The folder is not empty, or a tensor is not what it should be.
        """
        self.config.architectures = [type(self.model).__name__]
        with written_whole(output, self.fingerprint()) as folder, Checks(self, verify) as checks:
            write_tensors(folder, self.entries(), when_written=checks.file)
            self.config.save_pretrained(folder)
            if generation is not None:
                generation.save_pretrained(folder)
            processor.save_pretrained(folder)
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")
            certify(self, folder, checks)


def expected_tensors(model: PreTrainedModel, separate: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a model's files hold: second names of one tensor are left out.

    Args:
        model: On the meta device.
        separate: Names that the class ties, although this model's weights differ.
    """
    tied = model.all_tied_weights_keys.keys() - set(separate)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def assemble(
    config: PreTrainedConfig,
    model: PreTrainedModel,
    expected: Mapping[str, tuple[int, ...]],
    sources: Iterable[tuple[TensorFiles, Mapping[str, Piece], Mapping[str, Change]]],
    what: str,
) -> Conversion:
    """Put a conversion together.

    Args:
        config: Of the converted model.
        model: On the meta device.
        expected: What it consists of.
        sources: Files, where their tensors go, and what is changed; the first that gives a tensor counts.
        what: Names the checkpoint in errors.

    Raises:
        ConversionError: A tensor is missing or left over, has another shape, or is none of floats.
    """
    pieces: dict[str, tuple] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    sources = list(sources)
    wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for files, found, changes in sources:
        for target, piece in found.items():
            if target in pieces:
                continue
            pieces[target] = (files, piece, changes.get(target))
            shape = piece.shape(files.shapes)
            shapes[target] = changes[target].shape(shape) if target in changes else shape
    check(shapes, expected, what)
    for name in expected:
        files, piece, _ = pieces[name]
        _check_dtypes(files, piece, wanted.get(name))
    return Conversion(config, {name: pieces[name] for name in expected}, model, checkpoint=sources[0][0])


def _check_dtypes(files: TensorFiles, piece: Piece, wanted: torch.dtype | None) -> None:
    """Weights are floats that can be calculated with: integers and 8-bit floats need scales, which are not known here."""
    for source in piece.sources:
        dtype = files.dtypes[source]
        if wanted is not None and wanted.is_floating_point and dtype not in WEIGHT_DTYPES:
            raise ConversionError(
                f"{source} is {dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}: quantised weights are not "
                "converted, give the original ones."
            )
        if dtype != files.dtypes[piece.sources[0]]:
            raise ConversionError(f"{source} is {dtype}, but {piece.sources[0]} is {files.dtypes[piece.sources[0]]}.")


def compare_twins(files, table: Iterable[Rule], conversion: Conversion) -> None:
    """Second copies of tensors must be what they are copies of: else they belong to another language model.

    Args:
        files: The checkpoint.
        table: Its table.
        conversion: What it becomes.

    Raises:
        ConversionError: They differ by more than a rounding to half precision.
    """
    for key, of in twins(table, files.shapes).items():
        one, other = files.read(key), conversion.load(of)
        if one.shape != other.shape or not torch.allclose(one.float(), other.float(), rtol=2**-7, atol=1e-4):
            raise ConversionError(
                f"{key} is a second copy of {of}, but differs from it: the parts are not those that the checkpoint was "
                "trained with."
            )


__all__ = [
    "Change",
    "Constants",
    "Conversion",
    "Merged",
    "Renamed",
    "assemble",
    "compare_twins",
    "eva_config",
    "expected_tensors",
    "for_grid",
    "interpolated",
    "language_table",
    "layer_numbers",
    "lora_changes",
    "open_clip_config",
    "resized",
    "read_text_config",
    "read_vision_config",
    "text_config_of",
    "vision_layout",
    "vision_pieces",
    "with_rows",
]
