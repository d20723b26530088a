"""`transplant` warm-starts a trained bridge on another language model.

Most of what a bridge has learned is about pictures. Only its last step depends on the language model, through the space
of its embeddings. The tokens that two language models share give pairs of embeddings; a linear map from one space to
the other is fitted to these pairs and multiplied into the bridge's last layer. This needs neither pictures nor
training, and the result can be trained further.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .cards import card_of_folder
from .compat import bytes_to_unicode
from .compose import Part, compose
from .extensions import where_to_load
from .families import FAMILIES, Family
from .modeling.modeling_bridge import Bridge
from .modeling.modeling_bridged import BridgedModel
from .modeling.modeling_flamingo import FeedForward, GatedCrossAttentionLayer, PerceiverBridge
from .modeling.modeling_llava import MLPBridge
from .processing import BridgedProcessor
from .training_summary import SUMMARY


logger = logging.getLogger(__name__)

HELD_OUT = 10  # one in ten shared tokens is held out to evaluate the map
# Vocabularies list frequent tokens first, which have the better embeddings
MOST_TOKENS = 32768
RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # penalties, in units of the mean variance along a direction


# ---------------------------------------------------------------------- shared tokens


def token_strings(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> dict[bytes, int]:
    """Map the text of every ordinary token to its id, independent of the tokenizer's notation.

    Args:
        tokenizer: A tokenizer with GPT-2's bytes written as letters, SentencePiece's `▁` and `<0x0A>`, or plain words.
        num_rows: Rows of the embedding table; tokens beyond it are left out.

    Returns:
        Ids by the bytes of the text; the lower id if two tokens have the same text. Special tokens are left out.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    of_letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    in_letters = "ByteLevel" in repr(getattr(backend, "decoder", "")) or hasattr(tokenizer, "byte_decoder")
    found: dict[bytes, int] = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index >= num_rows or index in special:
            continue
        if in_letters and all(letter in of_letters for letter in token):
            text = bytes(of_letters[letter] for letter in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            text = bytes([int(token[3:5], 16)])
        else:
            text = token.replace("▁", " ").encode()
        found.setdefault(text, index)
    return found


# ---------------------------------------------------------------------- the map


@dataclass(frozen=True)
class EmbeddingMap:
    """An affine map from one language model's embedding space to another's.

    Args:
        matrix: `(new_dim, old_dim)`, in double precision.
        offset: `(new_dim,)`; zeros without an intercept.
        num_tokens: Number of tokens that the map was fitted to.
        explained_variance: Share of the variance of the new embeddings that the map explains, for held-out tokens: 1 if
            one model is a change of basis of the other, about 0 if the two are unrelated.
        ridge: Penalty that was best for the held-out tokens, in units of the mean variance along a direction.
        scale: Standard deviation of the new embeddings, divided by that of the old ones.
    """

    matrix: torch.Tensor
    offset: torch.Tensor
    num_tokens: int
    explained_variance: float
    ridge: float
    scale: float

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map `(..., old_dim)` to `(..., new_dim)`."""
        return (vectors.double() @ self.matrix.T + self.offset).to(vectors.dtype)

    def back(self) -> torch.Tensor:
        """Pseudo-inverse of the matrix, `(old_dim, new_dim)`."""
        return torch.linalg.pinv(self.matrix)


def _ridge_solver(inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """A function from a penalty to the least-squares matrix, `(new_dim, old_dim)`, of least norm without a penalty."""
    values, vectors = torch.linalg.eigh(inputs.T @ inputs)
    values = values.clamp(min=0.0)
    projected = vectors.T @ (inputs.T @ targets)
    negligible = values <= values.max() * 1e-12

    def solve(ridge: float) -> torch.Tensor:
        inverse = torch.where(negligible & (ridge == 0.0), 0.0, 1.0 / (values + ridge * values.mean()))
        return (vectors @ (inverse[:, None] * projected)).T

    return solve


def fit_embedding_map(old: torch.Tensor, new: torch.Tensor, intercept: bool = True) -> EmbeddingMap:
    """Fit a ridge regression from one table's rows to another's, with the best of `RIDGES` for held-out rows.

    Args:
        old: `(tokens, old_dim)`.
        new: `(tokens, new_dim)`, for the same tokens.
        intercept: Whether to fit an offset too.

    Raises:
        ValueError: There are fewer tokens than old dimensions.
    """
    old, new = old.double(), new.double()
    count, width = old.shape
    if count - count // HELD_OUT <= width:
        raise ValueError(
            f"The two language models share {count} tokens, too few for a map from {width} dimensions: it takes at "
            f"least {width + width // (HELD_OUT - 1) + 2}. They can't be matched by their vocabularies; train a new "
            "bridge with compose()."
        )
    zero = torch.zeros((), dtype=old.dtype)
    old_mean, new_mean = (old.mean(dim=0), new.mean(dim=0)) if intercept else (zero, zero)
    inputs, targets = old - old_mean, new - new_mean
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(old.device)
    held_out, rest = order[: max(1, count // HELD_OUT)], order[max(1, count // HELD_OUT) :]
    solve = _ridge_solver(inputs[rest], targets[rest])
    errors = {ridge: (targets[held_out] - inputs[held_out] @ solve(ridge).T).square().sum().item() for ridge in RIDGES}
    best = min(errors, key=errors.get)
    matrix = _ridge_solver(inputs, targets)(best)
    variance = (new[held_out] - new[held_out].mean(dim=0)).square().sum().item()
    return EmbeddingMap(
        matrix=matrix,
        offset=new_mean - matrix @ old_mean if intercept else torch.zeros(new.shape[1], dtype=new.dtype),
        num_tokens=count,
        explained_variance=1.0 - errors[best] / variance if variance else 0.0,
        ridge=best,
        scale=(new.std() / old.std()).item(),
    )


def _embed(embedding: nn.Module, ids: list[int]) -> torch.Tensor:
    """Embeddings as the language model's layers receive them: some models scale the rows of their table."""
    with torch.no_grad():
        return embedding(torch.tensor(ids, device=embedding.weight.device)).double().cpu()


# ---------------------------------------------------------------------- the families


def _map_output(linear: nn.Linear, to_new: EmbeddingMap, new: nn.Linear) -> None:
    """Set `new` to `linear` followed by the map."""
    new.weight.copy_(to_new.matrix @ linear.weight.double())
    if new.bias is not None:
        new.bias.copy_(to_new(linear.bias.double()))


def _copy_unchanged(old: Bridge, new: Bridge, without: tuple[str, ...]) -> None:
    """Copy every tensor, except those of the modules that are adapted."""
    weights = {name: tensor for name, tensor in old.state_dict().items() if not name.startswith(without)}
    expected = {name for name in new.state_dict() if not name.startswith(without)}
    if weights.keys() != expected:
        raise ValueError(f"The two bridges differ in {', '.join(sorted(weights.keys() ^ expected))}.")
    new.load_state_dict({**new.state_dict(), **weights})


def _adapt_mlp(old: MLPBridge, new: MLPBridge, to_new: EmbeddingMap, to_new_output: EmbeddingMap | None) -> None:
    last = f"linear_{old.depth}"
    _copy_unchanged(old, new, without=(last, "image_newline"))
    _map_output(getattr(old, last), to_new, getattr(new, last))
    if old.image_newline is not None:
        new.image_newline.copy_(to_new(old.image_newline))


def _adapt_output_layer(old: Bridge, new: Bridge, to_new: EmbeddingMap, to_new_output: EmbeddingMap | None) -> None:
    last = old.output_layer
    if last is None:
        raise ValueError(f"{type(old).__name__} has no linear layer at its end that the map could be multiplied into.")
    _copy_unchanged(old, new, without=(last,))
    _map_output(getattr(old, last), to_new, getattr(new, last))


def _map_input(norm: nn.LayerNorm, to_new: EmbeddingMap, new_norm: nn.LayerNorm, weight: torch.Tensor) -> torch.Tensor:
    """Approximate a layer norm and the linear layer after it in the other space.

    The norm's gain belongs to the old basis, so it is multiplied into the matrix. The result is exact only if the basis
    does not change, because a layer norm subtracts a different mean in another basis.

    Args:
        norm: The old norm.
        to_new: The map.
        new_norm: The new norm; its gain becomes 1.
        weight: Rows of the old linear layer's matrix, `(rows, old_dim)`.

    Returns:
        The new matrix, `(rows, new_dim)`.
    """
    weight = weight.double()
    read = to_new.scale * (weight * norm.weight.double()) @ to_new.back()
    new_norm.weight.fill_(1.0)
    new_norm.bias.copy_(torch.linalg.pinv(read) @ (weight @ norm.bias.double()))
    return read


def _adapt_feed_forward(old: FeedForward, new: FeedForward, to_new: EmbeddingMap) -> None:
    """Keep the strongest neurons that fit; additional neurons of a wider layer contribute nothing at first."""
    room = new.linear_in.weight.shape[0]
    strength = old.linear_in.weight.norm(dim=1) * old.linear_out.weight.norm(dim=0)
    kept = strength.argsort(descending=True)[:room].sort().values
    read = _map_input(old.layer_norm, to_new, new.layer_norm, old.linear_in.weight[kept])
    new.linear_in.weight[: len(kept)] = read.to(new.linear_in.weight.dtype)
    new.linear_out.weight.zero_()
    written = to_new.matrix @ old.linear_out.weight[:, kept].double()
    new.linear_out.weight[:, : len(kept)] = written.to(new.linear_out.weight.dtype)


def _adapt_cross_attention(old: GatedCrossAttentionLayer, new: GatedCrossAttentionLayer, to_new: EmbeddingMap) -> None:
    new.query.weight.copy_(_map_input(old.layer_norm, to_new, new.layer_norm, old.query.weight))
    new.key_value.load_state_dict(old.key_value.state_dict())
    new.out.weight.copy_(to_new.matrix @ old.out.weight.double())
    _adapt_feed_forward(old.feed_forward, new.feed_forward, to_new)
    gates = new.state_dict()
    for name, gate in old.state_dict().items():
        if name.startswith(("attn_gate", "ff_gate")):
            gates[name].copy_(gate)


def _adapt_perceiver(
    old: PerceiverBridge, new: PerceiverBridge, to_new: EmbeddingMap, to_new_output: EmbeddingMap
) -> None:
    new.resampler.load_state_dict(old.resampler.state_dict())
    blocks = old.cross_attention_layers
    for index, block in enumerate(new.cross_attention_layers):
        # The old block at the same relative depth
        nearest = (index + 1) * len(blocks) / len(new.cross_attention_layers)
        _adapt_cross_attention(blocks[min(len(blocks), max(1, round(nearest))) - 1], block, to_new)
    new.token_rows.input_rows.copy_(to_new(old.token_rows.input_rows))
    if new.token_rows.output_rows is not None:
        rows = old.token_rows.input_rows if old.token_rows.output_rows is None else old.token_rows.output_rows
        new.token_rows.output_rows.copy_(to_new_output(rows))


# The rest have an `output_layer`
_ADAPTERS = {MLPBridge: _adapt_mlp, PerceiverBridge: _adapt_perceiver}


def _cross_attention_interval(old_config: PreTrainedConfig, new: PreTrainedConfig) -> int:
    """Decoder layers per cross-attention block that best keep the number of blocks and their relative depths."""
    before = old_config.text_config.get_text_config().num_hidden_layers
    every, num_layers = old_config.cross_attention_every_n_layers, new.get_text_config().num_hidden_layers
    return min(
        range(1, num_layers + 1),
        key=lambda n: (abs(num_layers // n - before // every), abs(n / num_layers - every / before)),
    )


# ---------------------------------------------------------------------- transplant


@dataclass(frozen=True)
class Transplant:
    """A bridge that was transplanted to another language model.

    Args:
        model: The model, in eval mode and with both parts frozen.
        processor: The model's processor.
        report: The bridge's origin and the quality of the map between the embedding spaces, as plain data.
    """

    model: BridgedModel
    processor: BridgedProcessor
    report: dict[str, Any]

    def save(self, folder: str | os.PathLike) -> None:
        """Save the bridge, its processor and a summary of its origin: all files, or none.

        Args:
            folder: Folder to create.

        Raises:
            ValueError: The folder exists, or a part has no source to load it from again.
        """
        target = Path(folder)
        if target.exists():
            raise ValueError(f"{target} exists already; give another folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            self.processor.save_pretrained(temporary)
            summary = {
                "recipe": "transplanted from another language model, not trained since",
                "notes": describe(self.report),
                "transplant": self.report,
            }
            (temporary / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            self.model.save_pretrained(temporary, bridge_only=True)
            card_of_folder(temporary, target.name).save(temporary / "README.md")
            temporary.chmod(0o755)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def describe(report: Mapping[str, Any]) -> str:
    """Summarise a report in one or two sentences."""
    text = (
        f"The bridge was trained for {report['from']} and transplanted to {report['to']}: "
        f"{report['shared_tokens']:,} tokens are in both vocabularies, and a linear map between their embeddings "
        f"explains {report['explained_variance']:.1%} of the variance of held-out tokens."
    )
    if "explained_variance_output" in report:
        text += f" For the output layer's rows it is {report['explained_variance_output']:.1%}."
    return text


def _family_of(model: PreTrainedModel) -> Family:
    for family in FAMILIES.values():
        if type(model) is family.model_class:
            return family
    raise ValueError(
        f"{type(model).__name__} can't be transplanted; expected one of "
        f"{', '.join(family.model_class.__name__ for family in FAMILIES.values())}."
    )


def _compose_options_of(config: PreTrainedConfig, processor: BridgedProcessor) -> dict[str, Any]:
    """Options of `compose` that build the same bridge again."""
    names = set(type(config).__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    names -= {"vision_config", "text_config", "image_token_id", "special_token_ids", "frozen_parts", "bridge_only"}
    names -= {"freeze_language_model", "tie_word_embeddings", "trained_tensors"}
    options = {}
    for name in names:
        value = getattr(config, name)
        options[name] = value.to_dict() if isinstance(value, PreTrainedConfig) else copy.deepcopy(value)
    for name in set(processor.compose_options) - {"conversation"}:  # conversations belong to the language model
        if getattr(processor, name, None) is not None:
            options[name] = getattr(processor, name)
    return options


def _name_of(config: PreTrainedConfig, pin: Mapping | None) -> str:
    """A part's Hub id, or the name of its folder without the local path."""
    source = (pin or {}).get("source") or getattr(config, "_name_or_path", None) or f"a {config.model_type}"
    return Path(source).name if os.path.isabs(source) else source


def _config_of(language: Part) -> PreTrainedConfig:
    if isinstance(language, (PreTrainedModel, PreTrainedConfig)):
        return language if isinstance(language, PreTrainedConfig) else language.config
    return AutoConfig.from_pretrained(where_to_load(os.fspath(language)))


def _shape_options(family: Family, old: BridgedModel, language: Part) -> dict[str, Any]:
    """Configuration fields that follow from the old bridge's shape.

    Raises:
        ValueError: The bridge can't be transplanted.
    """
    if family.model_class.bridge_class is MLPBridge:
        if old.bridge.depth == 0:
            raise ValueError(
                "This bridge has projector_type='identity': there is no linear layer to multiply a map between "
                "language models into."
            )
        return {"projector_hidden_size": old.bridge.linear_1.out_features} if old.bridge.depth > 1 else {}
    if family.model_class.bridge_class is not PerceiverBridge:
        return {}
    return {"cross_attention_every_n_layers": _cross_attention_interval(old.config, _config_of(language))}


def _check_widths(model: BridgedModel) -> None:
    """Check that hidden states, which cross-attention reads, are in the same space as the embeddings.

    Raises:
        ValueError: Their widths differ.
    """
    width, hidden = model.bridge.text_dim, model.config.text_config.get_text_config().hidden_size
    if width != hidden:
        raise ValueError(
            f"{type(model.language_model).__name__} has embeddings of {width} and hidden states of {hidden} channels: "
            "a map between embeddings says nothing about the hidden states that cross-attention reads. Train a new "
            "perceiver with compose()."
        )


@torch.no_grad()
def transplant(
    bridge: str | os.PathLike | tuple[BridgedModel, BridgedProcessor],
    language: Part,
    *,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    **options,
) -> Transplant:
    """Warm-start a bridge on another language model.

    Bridges whose visual tokens stand in the prompt (`mlp`, `qformer`) keep everything except their last linear layer,
    into which the map between the two embedding spaces is multiplied. This is exact if the new model is a change of
    basis of the old one. Widths may differ, and encoder-decoders and decoders may replace each other.

    A `perceiver` keeps its resampler, keys, values and gates. Its cross-attention blocks are placed at the same
    relative depth of the new model. Their inputs and outputs are mapped; since the map was fitted to embeddings, it is
    an approximation in deeper layers. In a narrower model the weakest neurons of their feed-forwards are dropped.

    Args:
        bridge: Folder or Hub id of a bridge; or a model and its processor.
        language: The new language model: Hub id, folder, configuration or loaded model.
        tokenizer: The new language model's tokenizer: object, Hub id or folder; by default it is loaded from the
            language model's repository.
        options: `dtype`, `device_map` and `chat_template` of `compose`, or configuration fields to change.

    Returns:
        Model, processor and report. Neither language model is changed; the vision encoder is shared.

    Raises:
        ValueError: The bridge has no linear layer to multiply the map into, the vocabularies share too few tokens, or
            the family does not work with the new language model.
    """
    if isinstance(bridge, tuple):
        old, old_processor = bridge
    else:
        old, old_processor = AutoModel.from_pretrained(bridge), AutoProcessor.from_pretrained(bridge)
    family = _family_of(old)
    pins = old.config.frozen_parts or {}
    device_map = options.pop("device_map", None)
    model, processor = compose(
        old.vision_model,
        language,
        family.name,
        tokenizer=tokenizer,
        image_processor=old_processor.image_processor,
        **{**_compose_options_of(old.config, old_processor), **_shape_options(family, old, language), **options},
    )
    if pins.get("vision_model"):
        model.config.frozen_parts["vision_model"] = pins["vision_model"]
    # Trained tensors of the vision encoder are kept, those of the old language model are not.
    overlay = [name for name in old.config.trained_tensors or [] if name.startswith("vision_model.")]
    model.config.trained_tensors = overlay or None
    for name in ("qformer_tokenizer", "qformer_max_length"):
        if hasattr(old_processor, name):
            setattr(processor, name, getattr(old_processor, name))
    processor.check(model.config)
    if isinstance(model.bridge, PerceiverBridge):
        for each in (old, model):
            _check_widths(each)

    to_new, to_new_output, report = _maps_between(old, old_processor, model, processor)
    adapt = _ADAPTERS.get(type(old.bridge), _adapt_output_layer)
    adapt(copy.deepcopy(old.bridge).cpu(), model.bridge, to_new, to_new_output)
    if device_map is not None:
        model.dispatch(device_map)
    logger.info(describe(report))
    return Transplant(model, processor, report)


def _maps_between(
    old: BridgedModel, old_processor: BridgedProcessor, model: BridgedModel, processor: BridgedProcessor
) -> tuple[EmbeddingMap, EmbeddingMap | None, dict[str, Any]]:
    """Fit maps from one language model's embeddings to another's, to the tokens that both vocabularies have.

    Returns:
        The map between input embeddings, the one between output embeddings if the bridge has such rows, and the report.
    """
    tables = [each.get_input_embeddings() for each in (old, model)]
    tokens = [
        token_strings(each.tokenizer, table.num_embeddings)
        for each, table in zip((old_processor, processor), tables, strict=True)
    ]
    shared = sorted(tokens[0].keys() & tokens[1].keys(), key=tokens[0].get)
    ids = [[each[text] for text in shared[:MOST_TOKENS]] for each in tokens]
    intercept = getattr(old.config, "projector_bias", True)
    to_new = fit_embedding_map(*(_embed(table, rows) for table, rows in zip(tables, ids, strict=True)), intercept)
    report = {
        "from": _name_of(old.config.text_config, (old.config.frozen_parts or {}).get("language_model")),
        "to": _name_of(model.config.text_config, model.config.frozen_parts["language_model"]),
        "shared_tokens": len(shared),
        "fitted_on": to_new.num_tokens,
        "explained_variance": round(to_new.explained_variance, 6),
        "ridge": to_new.ridge,
    }
    to_new_output = None
    if model.bridge.token_rows is not None and model.bridge.token_rows.output_rows is not None:
        heads = [each.get_output_embeddings().weight.cpu() for each in (old, model)]
        to_new_output = fit_embedding_map(*(head[rows] for head, rows in zip(heads, ids, strict=True)))
        report["explained_variance_output"] = round(to_new_output.explained_variance, 6)
    return to_new, to_new_output, report


__all__ = ["EmbeddingMap", "Transplant", "describe", "fit_embedding_map", "token_strings", "transplant"]
