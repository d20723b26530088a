"""`transplant`: a trained bridge warm-started on another language model.

What a bridge learned is mostly about pictures. Only its last step speaks one language model's language, and how that model
speaks can be told from its embedding table: the tokens that it shares with another model give pairs of embeddings, these
give a linear map from one model's space to the other's, and the map is multiplied into the bridge's last layer. No picture
and no training are needed; training goes on from there.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
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

from .cards import SUMMARY, card_of_folder
from .compat import bytes_to_unicode
from .compose import Part, compose
from .extensions import where_to_load
from .families import FAMILIES, Family
from .modeling.modeling_bridge import Bridge
from .modeling.modeling_bridged import BridgedModel
from .modeling.modeling_flamingo import FeedForward, GatedCrossAttentionLayer, PerceiverBridge
from .modeling.modeling_llava import MLPBridge
from .modeling.modeling_qformer import QFormerBridge
from .processing import BridgedProcessor


logger = logging.getLogger(__name__)

HELD_OUT = 10  # one of so many shared tokens tells how good the map is
# A vocabulary's merges are listed as they were found, the frequent ones first: those have the better embeddings
MOST_TOKENS = 32768
RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean variance along a direction


# ---------------------------------------------------------------------- shared tokens


def token_strings(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> dict[bytes, int]:
    """What every ordinary token stands for, whichever way its tokenizer writes it down.

    Args:
        tokenizer: Any: GPT-2's bytes written as letters, SentencePiece's `▁` and `<0x0A>`, or plain words.
        num_rows: Rows of the embedding table; tokens beyond it are left out.

    Returns:
        Ids by the bytes of the text; the lower id where two tokens stand for the same. Special tokens are left out.
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
    """An affine map from one language model's space to another's.

    Args:
        matrix: `(new_dim, old_dim)`, in double precision.
        offset: `(new_dim,)`; zeros where there is none.
        num_tokens: Tokens that it was fitted on.
        explained_variance: Share of the variance of the new embeddings that it explains, over tokens that were held out
            while it was fitted: 1 where one model is a change of basis of the other, about 0 where they have nothing to do
            with each other.
        ridge: Penalty that was best for the held-out tokens, in units of the mean variance along a direction.
        scale: Spread of the new embeddings in units of the old ones'.
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
        """The matrix of the way back, `(old_dim, new_dim)`: the pseudo-inverse."""
        return torch.linalg.pinv(self.matrix)


def _ridge_solver(inputs: torch.Tensor, targets: torch.Tensor):
    """A function from a penalty to the least-squares matrix, `(new_dim, old_dim)`; without penalty the smallest one."""
    values, vectors = torch.linalg.eigh(inputs.T @ inputs)
    values = values.clamp(min=0.0)
    projected = vectors.T @ (inputs.T @ targets)
    negligible = values <= values.max() * 1e-12

    def solve(ridge: float) -> torch.Tensor:
        inverse = torch.where(negligible & (ridge == 0.0), 0.0, 1.0 / (values + ridge * values.mean()))
        return (vectors @ (inverse[:, None] * projected)).T

    return solve


def fit_embedding_map(old: torch.Tensor, new: torch.Tensor, intercept: bool = True) -> EmbeddingMap:
    """Ridge regression from one table's rows to another's; the penalty is the best of `RIDGES` for held-out rows.

    Args:
        old: `(tokens, old_dim)`.
        new: `(tokens, new_dim)`, the same tokens.
        intercept: Fit an offset too.

    Raises:
        ValueError: There are fewer tokens than the map has directions to know about.
    """
    old, new = old.double(), new.double()
    count, width = old.shape
    if count - count // HELD_OUT <= width:
        raise ValueError(
            f"The two language models share {count} tokens, too few for a map from {width} dimensions: it takes at least "
            f"{width + width // (HELD_OUT - 1) + 2}. They can't be matched by their vocabularies; train a fresh bridge with "
            "compose()."
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


def _rows(embedding: nn.Module, ids: list[int]) -> torch.Tensor:
    """What the language model's layers get for tokens: some models scale their table's rows."""
    with torch.no_grad():
        return embedding(torch.tensor(ids, device=embedding.weight.device)).double().cpu()


# ---------------------------------------------------------------------- the families


def _fold_behind(linear: nn.Linear, to_new: EmbeddingMap, new: nn.Linear) -> None:
    """Let `new` give what the map makes of what `linear` gives."""
    new.weight.copy_(to_new.matrix @ linear.weight.double())
    if new.bias is not None:
        new.bias.copy_(to_new(linear.bias.double()))


def _copy_rest(old: Bridge, new: Bridge, without: tuple[str, ...]) -> None:
    """Copy every tensor but those of the modules that were adapted."""
    weights = {name: tensor for name, tensor in old.state_dict().items() if not name.startswith(without)}
    expected = {name for name in new.state_dict() if not name.startswith(without)}
    if weights.keys() != expected:
        raise ValueError(f"The two bridges differ in {', '.join(sorted(weights.keys() ^ expected))}.")
    new.load_state_dict({**new.state_dict(), **weights})


def _mlp(old: MLPBridge, new: MLPBridge, to_new: EmbeddingMap, to_new_output: EmbeddingMap | None) -> None:
    last = f"linear_{old.depth}"
    _copy_rest(old, new, without=(last, "image_newline"))
    _fold_behind(getattr(old, last), to_new, getattr(new, last))
    if old.image_newline is not None:
        new.image_newline.copy_(to_new(old.image_newline))


def _qformer(old: QFormerBridge, new: QFormerBridge, to_new: EmbeddingMap, to_new_output: EmbeddingMap | None) -> None:
    _copy_rest(old, new, without=("language_projection",))
    _fold_behind(old.language_projection, to_new, new.language_projection)


def _read_through(
    norm: nn.LayerNorm, linear: nn.Linear, to_new: EmbeddingMap, new_norm, weight: torch.Tensor
) -> torch.Tensor:
    """Let a layer norm and the linear layer behind it read the other space, as nearly as they can.

    The norm's gain moves into the matrix, as it belongs to the old basis. The mean that a layer norm takes off is another
    one in another basis, so this is exact only where the basis stays.

    Args:
        norm: The old norm.
        linear: What reads it.
        to_new: The map.
        new_norm: The new norm; its gain becomes 1.
        weight: The old matrix behind it, `(rows, old_dim)`: rows may have been chosen.

    Returns:
        The new matrix, `(rows, new_dim)`.
    """
    weight = weight.double()
    read = to_new.scale * (weight * norm.weight.double()) @ to_new.back()
    new_norm.weight.fill_(1.0)
    new_norm.bias.copy_(torch.linalg.pinv(read) @ (weight @ norm.bias.double()))
    return read


def _feed_forward(old: FeedForward, new: FeedForward, to_new: EmbeddingMap) -> None:
    """Neurons are kept, where there is less room the strongest; where there is more, the others say nothing yet."""
    room = new.linear_in.weight.shape[0]
    strength = old.linear_in.weight.norm(dim=1) * old.linear_out.weight.norm(dim=0)
    kept = strength.argsort(descending=True)[:room].sort().values
    read = _read_through(old.layer_norm, old.linear_in, to_new, new.layer_norm, old.linear_in.weight[kept])
    new.linear_in.weight[: len(kept)] = read.to(new.linear_in.weight.dtype)
    new.linear_out.weight.zero_()
    written = to_new.matrix @ old.linear_out.weight[:, kept].double()
    new.linear_out.weight[:, : len(kept)] = written.to(new.linear_out.weight.dtype)


def _cross_attention(old: GatedCrossAttentionLayer, new: GatedCrossAttentionLayer, to_new: EmbeddingMap) -> None:
    new.query.weight.copy_(_read_through(old.layer_norm, old.query, to_new, new.layer_norm, old.query.weight))
    new.key_value.load_state_dict(old.key_value.state_dict())
    new.out.weight.copy_(to_new.matrix @ old.out.weight.double())
    _feed_forward(old.feed_forward, new.feed_forward, to_new)
    gates = new.state_dict()
    for name, gate in old.state_dict().items():
        if name.startswith(("attn_gate", "ff_gate")):
            gates[name].copy_(gate)


def _perceiver(old: PerceiverBridge, new: PerceiverBridge, to_new: EmbeddingMap, to_new_output: EmbeddingMap) -> None:
    new.resampler.load_state_dict(old.resampler.state_dict())
    blocks = old.cross_attention_layers
    for index, block in enumerate(new.cross_attention_layers):
        # the old block at the same share of the depth
        nearest = (index + 1) * len(blocks) / len(new.cross_attention_layers)
        _cross_attention(blocks[min(len(blocks), max(1, round(nearest))) - 1], block, to_new)
    new.token_rows.input_rows.copy_(to_new(old.token_rows.input_rows))
    if new.token_rows.output_rows is not None:
        rows = old.token_rows.input_rows if old.token_rows.output_rows is None else old.token_rows.output_rows
        new.token_rows.output_rows.copy_(to_new_output(rows))


ADAPTED_BY = {MLPBridge: _mlp, QFormerBridge: _qformer, PerceiverBridge: _perceiver}


def _spread_blocks(old_config: PreTrainedConfig, new: PreTrainedConfig) -> int:
    """Every how many decoder layers there is cross-attention, so that about as many blocks as before lie as deep as before."""
    before = old_config.text_config.get_text_config().num_hidden_layers
    every, num_layers = old_config.cross_attention_every_n_layers, new.get_text_config().num_hidden_layers
    return min(
        range(1, num_layers + 1),
        key=lambda n: (abs(num_layers // n - before // every), abs(n / num_layers - every / before)),
    )


# ---------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Transplant:
    """A bridge on another language model.

    Args:
        model: In eval mode, both parts frozen.
        processor: Its processor.
        report: Where it comes from and how well the two models' spaces could be matched, as plain data.
    """

    model: BridgedModel
    processor: BridgedProcessor
    report: dict[str, Any]

    def save(self, folder: str | os.PathLike) -> None:
        """Write the bridge, its processor and what is known of its training; all of it or nothing.

        Args:
            folder: Must not exist yet.

        Raises:
            ValueError: It exists, or a part has no source to come back from.
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
    """A report in a sentence or two."""
    text = (
        f"The bridge was made for {report['from']} and put on {report['to']}: {report['shared_tokens']:,} tokens are in both "
        f"vocabularies, and a linear map between their embeddings explains {report['explained_variance']:.1%} of the variance "
        "of tokens that it was not fitted on."
    )
    if "explained_variance_output" in report:
        text += f" Of the output layer's rows it explains {report['explained_variance_output']:.1%}."
    return text


def _family_of(model: PreTrainedModel) -> Family:
    for family in FAMILIES.values():
        if type(model) is family.model_class:
            return family
    raise ValueError(
        f"{type(model).__name__} can't be transplanted; expected one of "
        f"{', '.join(family.model_class.__name__ for family in FAMILIES.values())}."
    )


def _options_of(config: PreTrainedConfig, processor: BridgedProcessor) -> dict[str, Any]:
    """What `compose` has to be told to make the same bridge again."""
    names = set(type(config).__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    names -= {"vision_config", "text_config", "image_token_id", "special_token_ids", "frozen_parts", "bridge_only"}
    names -= {"freeze_language_model", "tie_word_embeddings", "trained_tensors"}
    options = {}
    for name in names:
        value = getattr(config, name)
        options[name] = value.to_dict() if isinstance(value, PreTrainedConfig) else copy.deepcopy(value)
    for name in set(processor.compose_options) - {"conversation"}:  # conversations are the language model's own
        if getattr(processor, name, None) is not None:
            options[name] = getattr(processor, name)
    return options


def _name_of(config: PreTrainedConfig, pin: Mapping | None) -> str:
    """A part's Hub id; of a folder the last part of its path, which is true on other machines too."""
    source = (pin or {}).get("source") or getattr(config, "_name_or_path", None) or f"a {config.model_type}"
    return Path(source).name if os.path.isabs(source) else source


def _config_of(language: Part) -> PreTrainedConfig:
    if isinstance(language, (PreTrainedModel, PreTrainedConfig)):
        return language if isinstance(language, PreTrainedConfig) else language.config
    return AutoConfig.from_pretrained(where_to_load(os.fspath(language)))


def _options_for(family: Family, old: BridgedModel, language: Part) -> dict[str, Any]:
    """What of the family's configuration follows from the old bridge's shape.

    Raises:
        ValueError: The bridge can't be moved.
    """
    if family.model_class.bridge_class is MLPBridge:
        if old.bridge.depth == 0:
            raise ValueError(
                "This bridge has projector_type='identity': there is no linear layer to multiply a map between language models "
                "into."
            )
        return {"projector_hidden_size": old.bridge.linear_1.out_features} if old.bridge.depth > 1 else {}
    if family.model_class.bridge_class is not PerceiverBridge:
        return {}
    return {"cross_attention_every_n_layers": _spread_blocks(old.config, _config_of(language))}


def _check_stream(model: BridgedModel) -> None:
    """Cross-attention reads hidden states, which have to be of the same space as the embeddings.

    Raises:
        ValueError: They have another width.
    """
    width, hidden = model.bridge.text_dim, model.config.text_config.get_text_config().hidden_size
    if width != hidden:
        raise ValueError(
            f"{type(model.language_model).__name__} has embeddings of {width} and hidden states of {hidden} channels: a map "
            "between embeddings says nothing about what cross-attention reads. Train a fresh perceiver with compose()."
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

    Bridges that speak in tokens (`mlp`, `qformer`) keep everything but their last linear layer, into which the map between
    the two embedding spaces is multiplied: exact where the new model is a change of basis of the old one. Widths may differ;
    encoder-decoders and decoders may follow each other.

    Of a `perceiver` the resampler, keys, values and gates are kept. Its cross-attention blocks go to the same share of the
    new model's depth; what they read and write is taken through the map, which was fitted on embeddings and is an
    approximation deeper down. In a narrower model the weaker neurons of their feed-forwards are left out.

    Args:
        bridge: Folder or Hub id of a bridge; or a model and its processor.
        language: The new language model, as for `compose`.
        tokenizer: Its tokenizer, likewise.
        options: For `compose`: `dtype`, `device_map`, `chat_template`; or fields of the configuration to change.

    Returns:
        Model, processor and report. Neither language model is changed; the vision encoder is shared.

    Raises:
        ValueError: The bridge has no linear layer to multiply the map into, the vocabularies share too little, or the family
            does not work with the new language model.
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
        **{**_options_of(old.config, old_processor), **_options_for(family, old, language), **options},
    )
    if pins.get("vision_model"):
        model.config.frozen_parts["vision_model"] = pins["vision_model"]
    # what was trained in the encoder travels on; what was trained in the old language model stays there
    overlay = [name for name in old.config.trained_tensors or [] if name.startswith("vision_model.")]
    model.config.trained_tensors = overlay or None
    for name in ("qformer_tokenizer", "qformer_max_length"):
        if hasattr(old_processor, name):
            setattr(processor, name, getattr(old_processor, name))
    processor.check(model.config)
    if isinstance(model.bridge, PerceiverBridge):
        for each in (old, model):
            _check_stream(each)

    to_new, to_new_output, report = _maps_between(old, old_processor, model, processor)
    ADAPTED_BY[type(old.bridge)](copy.deepcopy(old.bridge).cpu(), model.bridge, to_new, to_new_output)
    if device_map is not None:
        model.dispatch(device_map)
    logger.info(describe(report))
    return Transplant(model, processor, report)


def _maps_between(
    old: BridgedModel, old_processor: BridgedProcessor, model: BridgedModel, processor: BridgedProcessor
) -> tuple[EmbeddingMap, EmbeddingMap | None, dict[str, Any]]:
    """Fit the maps from one language model's embeddings to another's, on the tokens that both vocabularies have.

    Returns:
        The map between input embeddings; between output embeddings, where the bridge has rows there; and the report.
    """
    tables = [each.get_input_embeddings() for each in (old, model)]
    tokens = [
        token_strings(each.tokenizer, table.num_embeddings)
        for each, table in zip((old_processor, processor), tables, strict=True)
    ]
    shared = sorted(tokens[0].keys() & tokens[1].keys(), key=tokens[0].get)
    ids = [[each[text] for text in shared[:MOST_TOKENS]] for each in tokens]
    intercept = getattr(old.config, "projector_bias", True)
    to_new = fit_embedding_map(*(_rows(table, rows) for table, rows in zip(tables, ids, strict=True)), intercept)
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
