"""What `run.py` compares: our models with random weights, and the peers' own classes on the same tensors.

A native model of transformers is made by the tables that `vlbridge export` uses, from the tensors in memory, so nothing
is written to disk and nothing lies in memory twice, where the layouts allow it. open-flamingo's own `Flamingo` gets the
tensors through the table that converts its releases.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpu_smoke import spread_weights, tokenizer_of_size
from PIL import Image
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

import vlbridge
from vlbridge.convert.convert_assembly import Conversion
from vlbridge.convert.convert_blip2_transformers import plan_port
from vlbridge.convert.convert_llava_transformers import plan_llava
from vlbridge.convert.convert_openflamingo import BLOCK, RESAMPLER_TABLE
from vlbridge.convert.convert_saved import Saved
from vlbridge.convert.convert_tables import invert, plan
from vlbridge.inference import question_inputs


IMAGE_ARGUMENTS = ("pixel_values", "image_sizes")
SPARE_ROWS = 64  # of the language model's table, beyond the tokenizer: the placeholder's is one of them


@dataclass
class Spec:
    """One model to compare.

    Args:
        family: Name in `vlbridge.FAMILIES`.
        vision: Makes the configuration of the vision encoder.
        language: Makes the configuration of the language model.
        options: Of the bridge, as for `compose`.
        peer: `transformers` or `open-flamingo`.
        batches: Rows per batch.
        shots: Numbers of pictures before the one that is asked about; for the peer open-flamingo.
        new_tokens: Tokens to generate.
        picture: Width and height of the pictures, in pixels.
        folder: Number of pictures in the folder to caption; 0 for none.
        seconds: Time that the case may take.
        compiled: Batches that are also decoded with a static cache and compiled steps.
    """

    family: str
    vision: Callable[[], PreTrainedConfig]
    language: Callable[[], PreTrainedConfig]
    options: dict = field(default_factory=dict)
    peer: str = "transformers"
    batches: tuple[int, ...] = (1,)
    shots: tuple[int, ...] = ()
    new_tokens: int = 16
    picture: tuple[int, int] = (320, 240)
    folder: int = 0
    seconds: float = 120
    compiled: tuple[int, ...] = ()


@dataclass
class Side:
    """One of the two that are compared.

    Args:
        name: `vlbridge`, `transformers` or `open-flamingo`.
        model: What generates.
        vision: The vision encoder in it.
        features: From inputs to visual tokens: encoder and bridge.
        options: Arguments of `generate` that this side needs.
        processor: Makes inputs of pictures; `None` where inputs are made by `flamingo_inputs`.
    """

    name: str
    model: nn.Module
    vision: nn.Module
    features: Callable[[dict], object]
    options: dict = field(default_factory=dict)
    processor: object = None

    @property
    def device(self) -> torch.device:
        return next(self.vision.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vision.parameters()).dtype

    def generate(self, inputs: dict, new_tokens: int, **options) -> torch.Tensor:
        """Greedy tokens behind the prompt, `(rows, new_tokens)`; exactly as many as asked for."""
        options = {**self.options, **options}
        found = self.model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, **options)
        return found if not isinstance(found, torch.Tensor) else found[:, -new_tokens:]


# ---------------------------------------------------------------------- ours


def our_model(spec: Spec, dtype: torch.dtype, device: str):
    """A composed model with random weights, made on the device itself, and its processor."""
    vision, language = spec.vision(), spec.language()
    for config, wanted in ((language, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}), (vision, {})):
        for name, value in wanted.items():
            setattr(config, name, value)
    if spec.family == "qformer" and language.is_encoder_decoder:
        language.decoder_start_token_id = 0
    torch.manual_seed(0)
    with torch.device(device):
        model, processor = vlbridge.compose(
            vision, language, spec.family, tokenizer=tokenizer_of_size(language.vocab_size - SPARE_ROWS), dtype=dtype,
            **copy.deepcopy(spec.options),
        )  # fmt: skip
    model = model.to(device, dtype).eval().requires_grad_(False)
    spread_weights(model)
    head = model.language_model.get_output_embeddings().weight
    if (rows := model.bridge.token_rows) is not None:  # where a peer looks for them
        model.language_model.get_input_embeddings().weight[model.config.special_token_ids] = rows.input_rows
        head[model.config.special_token_ids] = rows.output_rows
    else:
        head[model.config.image_token_id] = 0  # never the best token: ours may not say it, a peer might
    endless(model)
    return model, processor


def endless(model: PreTrainedModel) -> None:
    """Let nothing end generation but its length."""
    for part in (model, getattr(model, "language_model", None), getattr(model, "lang_encoder", None)):
        if isinstance(getattr(part, "generation_config", None), GenerationConfig):
            part.generation_config.eos_token_id = None


def our_side(model, processor) -> Side:
    def features(inputs: dict):
        return model.get_image_features(**{name: inputs[name] for name in IMAGE_ARGUMENTS if name in inputs})

    return Side("vlbridge", model, model.vision_model, features, processor=processor)


# ---------------------------------------------------------------------- transformers


class Memory:
    """The tensors of a model as a checkpoint, for the conversion tables.

    Args:
        model: A model; second names of tied tensors are left out, as in files.
    """

    path = label = "the model in memory"

    def __init__(self, model: PreTrainedModel):
        tied = model.all_tied_weights_keys
        self.tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def with_weights(model_class, config, tensors: dict, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model of transformers that takes tensors as they are."""
    # with a device map, else tensors of a GPU would be copied to the CPU and back
    place = {"": str(device)}
    model = model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, device_map=place)
    return model.eval().requires_grad_(False)


def native_side(model, processor, dtype: torch.dtype, device: str) -> Side:
    """Transformers' own class, with the tensors of `model`."""
    tensors, ours = Memory(model), Conversion(model.config, {}, model)
    if model.config.model_type == "mlp_llava":
        conversion, theirs = plan_llava(Saved("memory", ours, tensors, processor, model.generation_config, {}))
    else:
        conversion, theirs = plan_port(ours, tensors, processor, model.generation_config)
    state = {name: conversion.load(name) for name in conversion.pieces}
    native = with_weights(type(conversion.model), conversion.config, state, dtype, device)
    native.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, decoder_start_token_id=model.generation_config.decoder_start_token_id
    )
    endless(native)
    vision = native.model.vision_tower if hasattr(native, "model") else native.vision_model

    def features(inputs: dict):
        more = {}
        if hasattr(native, "model"):
            names = ("vision_feature_layer", "vision_feature_select_strategy")
            more = {name: getattr(native.config, name) for name in names}
        return native.get_image_features(**{k: inputs[k] for k in IMAGE_ARGUMENTS if k in inputs}, **more)

    return Side("transformers", native, vision, features, processor=theirs)


def shared_bytes(one: nn.Module, other: nn.Module) -> float:
    """Which part of the second model's weights, in bytes, are the first one's tensors."""
    known = {tensor.data_ptr() for tensor in one.parameters()}
    sizes = [(tensor.data_ptr() in known, tensor.nbytes) for tensor in other.parameters()]
    return sum(size for shared, size in sizes if shared) / max(sum(size for _, size in sizes), 1)


def asked(side: Side, images: list[Image.Image], prompt: str) -> dict:
    """A side's inputs for a question about each picture, as its documentation makes them; on the CPU."""
    if getattr(side.processor, "chat_template", None):
        return dict(question_inputs(side.processor, images, prompt))
    turn = [{"role": "user", "content": prompt}]  # transformers' BLIP-2 has its template in the tokenizer
    text = side.processor.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return dict(side.processor(images=images, text=[text] * len(images), padding=True, return_tensors="pt"))


# ---------------------------------------------------------------------- open-flamingo


def find_open_flamingo(folder: Path | None) -> str | None:
    """The installed release of open-flamingo.

    Args:
        folder: Where it was installed with `pip install --target`; `None` looks in this environment.

    Returns:
        Its release, or `None` if it can't be imported.
    """
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    needed = ("open_flamingo", "einops", "einops_exts")
    if any(importlib.util.find_spec(name) is None for name in needed):
        return None
    return importlib.metadata.version("open-flamingo")


def open_flamingo_modules():
    """Its modules `src.flamingo` and `src.flamingo_lm`, without its `__init__`, which wants open_clip."""
    if "open_flamingo" not in sys.modules:
        place = Path(importlib.util.find_spec("open_flamingo").origin).parent
        package = sys.modules["open_flamingo"] = types.ModuleType("open_flamingo")
        package.__path__ = [str(place)]
    return tuple(importlib.import_module(f"open_flamingo.src.{name}") for name in ("flamingo", "flamingo_lm", "utils"))


class Visual(nn.Module):
    """An encoder as open_clip's, which gives a pooled output and tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]  # not a child: its parameters are counted once

    def forward(self, pixel_values: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, self.model[0].get_patch_features(pixel_values)


def open_flamingo_side(model) -> Side:
    """open-flamingo's own `Flamingo` in front of the same language model, with the tensors of `model`."""
    flamingo, flamingo_lm, utils = open_flamingo_modules()
    config = model.config

    class Mixin(flamingo_lm.FlamingoLMMixin):
        def forward(self, input_ids, attention_mask=None, **kwargs):  # transformers 5 drops masks that mask nothing
            return super().forward(input_ids, attention_mask, **kwargs)

    ours = model.language_model
    language_model = with_weights(type(ours), ours.config, ours.state_dict(), ours.dtype, model.device)
    endless(language_model)
    utils.extend_instance(language_model, Mixin)
    language_model.set_decoder_layers_attr_name("model.layers")
    image, end = config.special_token_ids
    with torch.device("meta"):
        theirs = flamingo.Flamingo(
            types.SimpleNamespace(visual=None), language_model, end, image, config.vision_feature_size,
            cross_attn_every_n_layers=config.cross_attention_every_n_layers,
        )  # fmt: skip
    theirs.vision_encoder = Visual(model)
    tensors = Memory(model)
    depth, latents = len(theirs.perceiver.layers), theirs.perceiver.latents.shape[0]
    if (config.resampler_depth, config.num_latents) != (depth, latents):
        raise ValueError(f"open-flamingo's resampler has {depth} layers and {latents} latents, and no other sizes")
    names = [name for name in tensors.shapes if name.startswith("bridge.resampler.")]
    pieces = plan(invert(RESAMPLER_TABLE), names)
    theirs.perceiver.load_state_dict(
        {name.removeprefix("perceiver."): piece.load(tensors.read) for name, piece in pieces.items()}, assign=True
    )
    blocks = [block for block in language_model.gated_cross_attn_layers if block is not None]
    for block, layer in zip(blocks, model.bridge.cross_attention_layers, strict=True):
        ours = layer.state_dict()
        block.load_state_dict({name: ours[our_name] for name, our_name in BLOCK}, assign=True)
    theirs.eval().requires_grad_(False)

    def features(inputs: dict):
        pixels = inputs["vision_x"]
        patches = theirs.vision_encoder(pixels.flatten(0, 2))[1]
        return theirs.perceiver(patches.unflatten(0, pixels.shape[:3]))

    return Side("open-flamingo", theirs, model.vision_model, features, {"eos_token_id": None, "pad_token_id": 0})


def flamingo_inputs(model, shots: int, rows: int, text_per_image: int = 16, seed: int = 0) -> tuple[dict, dict]:
    """The same random prompt of so many shots for both sides: ours, open-flamingo's.

    A prompt has a picture more than shots; each is one token and `text_per_image` tokens of text.
    """
    config, device, dtype = model.config, model.device, model.bridge.dtype
    generator = torch.Generator().manual_seed(seed)
    image, end = config.special_token_ids
    words = min(config.text_config.vocab_size, image) - 1
    ids = torch.randint(3, words, (rows, (shots + 1) * (text_per_image + 1)), generator=generator)
    ids[:, :: text_per_image + 1] = image
    ids[:, text_per_image :: text_per_image + 1][:, :-1] = end
    ids = ids.to(device)
    size = config.image_size
    pixels = torch.randn(rows, shots + 1, 1, 3, size, size, generator=generator).to(device, dtype)
    mask = torch.ones_like(ids)
    ours = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels.flatten(0, 2)}
    return ours, {"lang_x": ids, "attention_mask": mask, "vision_x": pixels}
