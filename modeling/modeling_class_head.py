"""A bridge that begins as a classifier: its hidden units are the encoder's classes, their outputs the classes' names.

`linear_1` of the projector is the class head of an image classifier, so its pre-activations are the classifier's
logits, minus a threshold. `linear_2` adds up the language model's own embeddings of the names of the classes that are
above it. Such a bridge names what the classifier knows before it has been trained.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration.configuration_bridged import BridgedConfig
from ..extensions import where_to_load
from ..files import read_json
from .modeling_bridge import Bridge, patch_features_of


EVERYDAY = "everyday"  # words of this table for ImageNet's classes
EVERYDAY_WORDS = Path(__file__).parent / "everyday_words.json"  # from WordNet, by examples/everyday_words.py
CONTEXT = "A photo of a"  # names are tokenised as they are behind it
_NAMELESS = re.compile(r"LABEL[ _]\d+")  # what configurations say for classes without names


@dataclass(frozen=True)
class ClassHead:
    """The last layer of an image classifier, and what it reads.

    Args:
        weight: `(num_classes, vision_dim)`.
        bias: `(num_classes,)`.
        pooling: What becomes of the encoder's features in front of it: `"average"` over the patches, or `"cls"`.
        norm_eps: Epsilon of a layer norm between the two, whose weights are multiplied into `weight` and `bias`; `None`
            if there is none.
        names: What each class is called, as the classifier's configuration says.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    pooling: str
    norm_eps: float | None
    names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.weight.shape[0]


# ---------------------------------------------------------------------- the classifier


def load_classifier(source: str | os.PathLike | PreTrainedModel, **kwargs) -> PreTrainedModel:
    """Load an image classifier of transformers or timm, with its class head.

    Args:
        source: Hub id, folder or loaded model.
        kwargs: `dtype`, `revision`, `token` and other arguments of `from_pretrained`.

    Raises:
        ValueError: It is no image classifier, or its checkpoint has no class head.
        TypeError: `source` has another type.
    """
    if isinstance(source, PreTrainedModel):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"The classifier is a {type(source).__name__}; expected a Hub id, a folder or a loaded model, such as a "
            "ViTForImageClassification."
        )
    name = os.fspath(source)
    place = name if kwargs.get("revision") else where_to_load(name)
    try:
        model, info = AutoModelForImageClassification.from_pretrained(place, output_loading_info=True, **kwargs)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is not an image classifier that transformers or timm can load: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} has no trained class head: {', '.join(missing[:4])} not in its checkpoint. Name a checkpoint that "
            "was trained to classify images."
        )
    return model


class _Watch:
    """Keeps the inputs and outputs of linear layers and layer norms while a model runs."""

    def __init__(self, model: nn.Module):
        self.calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        self.model = model

    def __enter__(self) -> _Watch:
        layers = [module for module in self.model.modules() if isinstance(module, (nn.Linear, nn.LayerNorm))]
        self.handles = [layer.register_forward_hook(self._keep) for layer in layers]
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if inputs:
            self.calls.append((layer, inputs[0].detach().float().cpu(), output.detach().float().cpu()))

    def of_kind(self, kind: type) -> list[tuple[nn.Module, torch.Tensor, torch.Tensor]]:
        """The calls of one kind of layer, the last first."""
        return [call for call in reversed(self.calls) if isinstance(call[0], kind)]


def _same(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())


@torch.no_grad()
def read_class_head(
    classifier: PreTrainedModel, vision_model: PreTrainedModel, config: BridgedConfig, seed: int = 0
) -> ClassHead:
    """Find a classifier's class head, and what it reads of the encoder's features.

    Both models run on two images of noise. The head is the linear layer whose outputs are the logits; what it reads is
    compared with the features of `vision_model`, averaged over the patches or of the CLS token, with and without the
    layer norms that ran. So nothing depends on the names of an architecture, and what the bridge could not compute is
    refused.

    Args:
        classifier: An image classifier; its logits are `(num_images, num_classes)`.
        vision_model: The encoder of the bridged model, whose weights must be the classifier's.
        config: The bridged model's configuration, with the encoder's geometry filled in.
        seed: Of the noise.

    Raises:
        ValueError: The model is no classifier, its logits are not those of a linear layer, or this layer reads
            something else than said above.
    """
    kind = type(classifier).__name__
    channels = getattr(config.vision_config, "num_channels", 3)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, channels, config.image_size, config.image_size, generator=generator)
    training = {module: module.training for model in (classifier, vision_model) for module in model.modules()}
    classifier.eval()
    vision_model.eval()
    try:
        features = vision_model(pixel_values=noise.to(vision_model.device, vision_model.dtype), return_dict=True)
        with _Watch(classifier) as watch:
            outputs = classifier(pixel_values=noise.to(classifier.device, classifier.dtype), return_dict=True)
    finally:
        for module, mode in training.items():
            module.training = mode
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(f"{kind} is not an image classifier: its output has no logits.")
    logits = logits.float().cpu()
    half = torch.float32 not in (classifier.dtype, vision_model.dtype) or classifier.dtype != vision_model.dtype
    tolerance = 0.03 if half else 1e-3  # of the norm; other ways to pool differ by about 1
    found = [
        call
        for call in watch.of_kind(nn.Linear)
        if call[0].weight.shape == (logits.shape[-1], call[1].shape[-1]) and _same(call[2], logits, 1e-6)
    ]
    if not found:
        raise ValueError(
            f"{kind}: no linear layer gives its logits, so they can't become hidden units. Classifiers that end in one "
            "linear layer can: ResNet, ConvNeXt, ViT, DeiT, most of timm's."
        )
    head, read, _ = found[0]
    patches = patch_features_of(features, None).float().cpu()
    if patches.shape[-1] != read.shape[-1]:
        raise ValueError(
            f"{kind}'s class head reads {read.shape[-1]} channels, but the vision encoder gives {patches.shape[-1]}: "
            "this is not the classifier's encoder, or the head reads several features at once."
        )
    prefix = config.num_prefix_tokens
    pooled = {"average": patches[:, prefix:].mean(dim=1), **({"cls": patches[:, 0]} if prefix else {})}
    weight, bias = head.weight.detach().float().cpu(), torch.zeros(len(head.weight))
    if head.bias is not None:
        bias = head.bias.detach().float().cpu()
    names = tuple(str(classifier.config.id2label.get(index, "")) for index in range(len(weight)))
    for pooling, values in pooled.items():
        if _same(values, read, tolerance):
            return ClassHead(weight, bias, pooling, None, names)
        for norm, _, _ in watch.of_kind(nn.LayerNorm):
            gain, shift = (
                torch.full(read.shape[-1:], neutral) if given is None else given.detach().float().cpu()
                for given, neutral in ((norm.weight, 1.0), (norm.bias, 0.0))
            )
            if gain.shape != read.shape[-1:]:
                continue
            if _same(nn.functional.layer_norm(values, gain.shape, gain, shift, norm.eps), read, tolerance):
                return ClassHead(weight * gain, bias + weight @ shift, pooling, norm.eps, names)
    raise ValueError(
        f"{kind}'s class head reads neither the mean of the vision encoder's patch features nor its CLS feature, as "
        "they are or behind a layer norm. Either this is not the classifier's own encoder, or a bridge can't compute "
        "what the head reads."
    )


# ---------------------------------------------------------------------- the names


def _first_name(name: str) -> str:
    return name.split(",")[0].replace("_", " ").strip()


def everyday_words(names: Sequence[str]) -> list[str]:
    """What people call ImageNet's classes: all breeds are dogs, a tench is a fish.

    Args:
        names: What a classifier calls its classes; they have to be those of ImageNet-1k, in their order.

    Raises:
        ValueError: They are not.
    """
    table = read_json(EVERYDAY_WORDS)
    others = [index for index, (name, (known, _)) in enumerate(zip(names, table)) if _first_name(name) != known]
    if len(names) != len(table) or len(others) > len(table) // 20:  # releases spell a few of them differently
        raise ValueError(
            f"class_names={EVERYDAY!r} has words for ImageNet's 1,000 classes, but this classifier has {len(names)}, "
            f"beginning with {', '.join(map(repr, names[:3]))}. Pass a list or a mapping instead."
        )
    return [word for _, word in table]


def class_words(
    names: Sequence[str], class_names: Sequence[str] | Mapping[int | str, str] | str | None = None
) -> tuple[str, ...]:
    """What the language model shall call each class.

    Args:
        names: What the classifier calls them, such as ImageNet's `"tench, Tinca tinca"`: what stands before the first
            comma is taken, and underscores are read as spaces.
        class_names: Other words: one for every class; or a mapping from some classes, by their number or their name as
            above (in full or up to the comma), to words; or `"everyday"`, see `everyday_words`. Several classes may
            have the same word.

    Raises:
        ValueError: The number of words is not that of the classes, a class of the mapping does not exist, or a class
            has no name.
        TypeError: `class_names` has another type.
    """
    words = [_first_name(name) for name in names]
    if class_names == EVERYDAY:
        words = everyday_words(names)
    elif isinstance(class_names, Mapping):
        places: dict[Any, list[int]] = {}
        for index, (name, word) in enumerate(zip(names, words)):
            for key in {index, name, word}:
                places.setdefault(key, []).append(index)
        if unknown := [key for key in class_names if key not in places]:
            raise ValueError(
                f"class_names has {', '.join(map(repr, unknown[:4]))}, which no class is called: the classes are 0 to "
                f"{len(names) - 1}, {', '.join(map(repr, names[:3]))}, ..."
            )
        for key, word in class_names.items():
            for index in places[key]:
                words[index] = word
    elif class_names is not None:
        if isinstance(class_names, str) or not isinstance(class_names, Sequence):
            raise TypeError(
                f"class_names is a {type(class_names).__name__}; expected a list with a word for every class, a "
                f"mapping from classes to words, or {EVERYDAY!r} for ImageNet's."
            )
        if len(class_names) != len(names):
            raise ValueError(f"class_names has {len(class_names)} words, but the classifier has {len(names)} classes.")
        words = list(class_names)
    for index, word in enumerate(words):
        if not isinstance(word, str) or not word.strip() or _NAMELESS.fullmatch(word):
            raise ValueError(
                f"Class {index} of the classifier has no name (it is {word!r}). Pass class_names=, a list with a word "
                "for every class, in the order of the classes."
            )
    return tuple(word.strip() for word in words)


def class_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[list[int]]:
    """Token ids of words in the middle of a sentence, without special tokens.

    Args:
        tokenizer: The language model's tokenizer.
        words: What the classes are called.

    Raises:
        ValueError: The tokenizer does not know a word.
    """
    before = tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    texts = [f"{CONTEXT} {word}" for word in words]
    found = []
    for word, ids in zip(words, tokenizer(texts, add_special_tokens=False)["input_ids"]):
        if ids[: len(before)] != before:
            ids = before + tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        ids = ids[len(before) :]
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"The language model's tokenizer does not know the word {word!r}; pass class_names=.")
        found.append(ids)
    return found


# ---------------------------------------------------------------------- the bridge


def complete_for_classifier(config: PreTrainedConfig, head: ClassHead, free_units: int) -> None:
    """Set the fields of an MLP-LLaVA's configuration that a class head decides.

    Args:
        config: A new model's configuration, with the encoder's geometry filled in.
        head: The class head.
        free_units: Hidden units beside those of the classes.

    Raises:
        ValueError: A field has a value that does not go with it.
    """
    if isinstance(free_units, bool) or not isinstance(free_units, int) or free_units < 0:
        raise ValueError(f"free_units is {free_units!r}; expected a number of hidden units, 0 or more.")
    expected = {
        "projector_type": "mlp2x_gelu",
        "projector_bias": True,
        "projector_hidden_size": None,
        "projector_norm_eps": None,
        "image_grid_pinpoints": None,
        "vision_feature_layer": None,
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}; a bridge that begins as a classifier is an 'mlp2x_gelu' "
                "projector behind the classifier's own pooling. Leave this option out."
            )
    if config.pooling not in (None, head.pooling) or (config.pooling and head.norm_eps is not None):
        raise ValueError(
            f"pooling is {config.pooling!r}, but the class head reads "
            + ("the CLS feature" if head.pooling == "cls" else "the average over all patches")
            + (" behind a layer norm" if head.norm_eps is not None else "")
            + ". Leave this option out. (A head that reads the plain average also reads averages over a part of the "
            "patches: pooling='average' with pooling_factor.)"
        )
    if config.global_context and (head.pooling != "average" or head.norm_eps is not None):
        raise ValueError(
            "global_context gives every token the average over all patches, but the class head reads "
            + ("the CLS feature" if head.pooling == "cls" else "it behind a layer norm")
            + ". Leave this option out."
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"The language model is a {config.text_config.model_type}, an encoder-decoder; a bridge can begin as a "
            "classifier in front of a decoder, which goes on from the class's name."
        )
    config.projector_hidden_size = head.num_classes + free_units
    config.projector_norm_eps = head.norm_eps
    if head.pooling == "average" and config.pooling is None and not config.global_context:
        # one neighbourhood: the whole grid
        config.pooling_factor = -(-config.image_size // config.patch_size)
    config.pooling = head.pooling


@torch.no_grad()
def begin_as_classifier(
    bridge: Bridge,
    embedding: nn.Module,
    head: ClassHead,
    tokens: Sequence[Sequence[int]],
    threshold: float = 4.5,
    scale: float = 0.25,
) -> None:
    """Set a two-layer projector to name the classes of a classifier.

    Its pre-activations are the logits minus `threshold`, of the whole image with `global_context` and else of the
    token's patches, followed by those of the free units, which are left as they are and whose outputs begin at zero.
    Its output is, for every class, GELU of this, times `scale`, times the sum of the embeddings of the class's name.

    Args:
        bridge: An `MLPBridge` with `linear_1` and `linear_2`.
        embedding: The language model's input embeddings.
        head: The class head.
        tokens: Token ids of each class's name.
        threshold: Logit from which a class is heard. Behind the threshold GELU lets nothing through, so the many
            classes that are not shown stay silent.
        scale: Length of a name in the visual token for a logit of one above the threshold, in lengths of its
            embedding.

    Raises:
        ValueError: The sizes do not fit, or the threshold or scale is not a number that makes sense.
    """
    if not torch.isfinite(torch.tensor(float(threshold))):
        raise ValueError(f"class_threshold is {threshold}; expected a logit, such as 4.5.")
    if not 0.0 < float(scale) < float("inf"):
        raise ValueError(f"class_name_scale is {scale}; expected a number above 0, such as 0.25.")
    count, first, second = head.num_classes, bridge.linear_1, bridge.linear_2
    weight = head.weight
    if bridge.config.global_context:  # the classes read what follows the token's own features
        weight = nn.functional.pad(weight, (weight.shape[1], 0))
    if len(tokens) != count or first.out_features < count or first.in_features != weight.shape[1]:
        raise ValueError(
            f"The class head has {count} classes of {head.weight.shape[1]} channels and {len(tokens)} names; the "
            f"projector has {first.out_features} hidden units of {first.in_features} channels."
        )
    device = next(embedding.parameters()).device
    names = torch.stack([embedding(torch.tensor(ids, device=device)).float().sum(dim=0).cpu() for ids in tokens])
    first.weight[:count] = weight.to(first.weight)
    first.bias[:count] = (head.bias - threshold).to(first.bias)
    second.weight.zero_()
    second.weight[:, :count] = (scale * names.T).to(second.weight)
    second.bias.zero_()


__all__ = [
    "ClassHead",
    "begin_as_classifier",
    "class_tokens",
    "class_words",
    "everyday_words",
    "complete_for_classifier",
    "load_classifier",
    "read_class_head",
]
