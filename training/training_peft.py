"""Adapters by what they should reach: configurations for PEFT, with module names read off the model.

Source: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353), IA3 (arXiv 2205.05638), QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from torch import nn
from transformers import Conv1D

from ..modeling.modeling_bridge import TokenRows, num_embeddings
from ..modeling.modeling_bridged import BridgedModel
from ..modeling.modeling_flamingo import TanhGate


if TYPE_CHECKING:
    from peft import IA3Config, LoraConfig


LanguageLayers = Literal["attention", "mlp", "all"]
BridgeTraining = Literal["full", "adapter"]

# Components of the names of layers, as the decoders of transformers have them
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
FEED_FORWARD = re.compile(
    r"(shared_)?mlp|ffn?|feed_?forward(_query|_text)?|fc\d|fc_(in|out)|densereludense|(shared_)?experts?", re.IGNORECASE
)
ROUTERS = ("gate", "router")  # of mixtures of experts
KEYS_AND_VALUES = re.compile(r"(k|v|kv|qkv)(_proj)?|key|value|key_value|query_key_value|Wqkv|c_attn")  # fused or not


def _adapted(module: nn.Module) -> nn.Module | None:
    """The layer that PEFT's wrapper `module` holds; `None` if it is not a wrapper."""
    children = dict(module.named_children())
    return children.get("base_layer", children.get("original_module"))


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules as they are without adapters, whether there are adapters or not."""
    while (inner := _adapted(module)) is not None:
        module = inner
    yield prefix, module
    for name, child in module.named_children():
        yield from walk(child, f"{prefix}.{name}" if prefix else name)


def linear_layers(module: nn.Module, prefix: str) -> list[str]:
    """Full names of a part's linear layers."""
    return [name for name, layer in walk(module, prefix) if isinstance(layer, (nn.Linear, Conv1D))]


def layer_kind(name: str) -> str | None:
    """The block that a linear layer belongs to.

    Args:
        name: Full name of the layer.

    Returns:
        `"attention"` or `"mlp"`; `None` outside lists of layers (heads, embeddings).
    """
    components = re.split(r"\.\d+\.", name, maxsplit=1)[1:]
    components = components[0].split(".") if components else []
    if any(map(FEED_FORWARD.fullmatch, components)) and components[-1] not in ROUTERS:
        return "mlp"
    return "attention" if any(map(ATTENTION.search, components)) else None


def language_targets(model: BridgedModel, layers: LanguageLayers) -> list[str]:
    """Full names of linear layers in the decoder (and encoder) layers of the language model.

    Args:
        model: The model.
        layers: `"attention"` for all projections of the attention, `"mlp"` for the feed-forward, `"all"` for both.

    Raises:
        ValueError: There are none.
    """
    wanted = ("attention", "mlp") if layers == "all" else (layers,)
    chosen = [name for name in linear_layers(model.language_model, "language_model") if layer_kind(name) in wanted]
    if not chosen:
        found = sorted(
            {re.sub(r"\.\d+\.", ".N.", name) for name in linear_layers(model.language_model, "language_model")}
        )
        raise ValueError(
            f"language={layers!r} finds no linear layers in {type(model.language_model).__name__}; it has "
            f"{', '.join(found)}. Name those that you mean: lora_config(model, language=None, ..., target_modules=<a "
            "regular expression>)."
        )
    return chosen


def bridge_targets(model: BridgedModel) -> list[str]:
    """Full names of the bridge's linear layers that adapters are put on.

    In the Q-Former these are the layers of its attention and the second of each feed-forward (`query`, `key`, `value`,
    `dense`), and the projection to the language model.

    Args:
        model: The model.

    Raises:
        ValueError: There are none.
    """
    wanted = re.compile(rf"bridge\.({bridge_of(model).adapter_targets})")
    chosen = [name for name in linear_layers(model.bridge, "bridge") if wanted.fullmatch(name)]
    if not chosen:
        raise ValueError(f"bridge='adapter' finds no linear layers in {type(bridge_of(model)).__name__}; use 'full'.")
    return chosen


def bridge_of(model: BridgedModel) -> nn.Module:
    """The bridge itself, without the wrapper that PEFT may have put around it."""
    return next(walk(model.bridge))[1]


def small_modules(model: BridgedModel) -> list[str]:
    """Full names of the bridge's modules without linear layers that are trained in full beside adapters.

    These are Flamingo's gates and the rows of special tokens.
    """
    return [name for name, module in walk(model.bridge, "bridge") if isinstance(module, (TanhGate, TokenRows))]


def pattern_of(names: Iterable[str]) -> str:
    """A regular expression that matches these names in full, with any number in place of a layer's."""
    leaves: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = re.sub(r"(?<=\.)\d+(?=\.)", "#", name).rpartition(".")
        if leaf not in (known := leaves.setdefault(parent, [])):
            known.append(leaf)
    patterns = [
        re.escape(parent).replace(r"\#", r"\d+") + r"\." + (f"({'|'.join(known)})" if len(known) > 1 else known[0])
        for parent, known in leaves.items()
    ]
    return "|".join(patterns)


def _embedding_rows(model: BridgedModel, tokens: Iterable[int]) -> dict[str, list[int]]:
    """For PEFT's `trainable_token_indices`.

    Raises:
        ValueError: A token has no row in the language model's table, or has one in the bridge.
    """
    tokens = sorted(set(tokens))
    embedding = model.get_input_embeddings()
    rows = num_embeddings(embedding)
    if own := [token for token in tokens if token in (model.config.special_token_ids or [])]:
        raise ValueError(
            f"Tokens {own} have their rows in the bridge (config.special_token_ids), which are read instead of the "
            "language model's: they are trained with the bridge, bridge='full' or 'adapter'."
        )
    wrong = [token for token in tokens if not 0 <= token < rows or token == model.config.image_token_id]
    if wrong:
        raise ValueError(
            f"Tokens {wrong} have no row to train: the language model's table has {rows}, and the image "
            f"token {model.config.image_token_id} is replaced by visual tokens."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            "Single rows of an encoder-decoder's table can't be trained: its encoder and decoder share it."
        )
    if model.config.special_token_ids and model.config.tie_word_embeddings:
        raise ValueError(
            "Rows of this language model's table can't be trained: it is the output layer's too, which PEFT would "
            "compute by itself, without the special tokens whose rows are in the bridge."
        )
    names = [name for name, module in model.named_modules() if module is embedding]
    return {names[0]: tokens}


def _options(model, language, bridge, tokens, options) -> dict:
    """Arguments for PEFT's configurations, with `names` and `extra_patterns` in place of the target modules."""
    model = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(model, BridgedModel):
        raise TypeError(f"model is a {type(model).__name__}; expected a model of this package, or a PeftModel of one.")
    if language not in (None, "attention", "mlp", "all"):
        raise ValueError(f"language is {language!r}; expected 'attention', 'mlp', 'all' or None.")
    if bridge not in (None, "full", "adapter"):
        raise ValueError(f"bridge is {bridge!r}; expected 'full', 'adapter' or None.")
    names = language_targets(model, language) if language is not None else []
    full_modules = ["bridge"] if bridge == "full" else []
    if bridge == "adapter":
        names += bridge_targets(model)
        full_modules += small_modules(model)
    extra = []
    if more := options.pop("target_modules", None):
        if not isinstance(more, str):
            raise TypeError(
                f"target_modules is {more!r}; expected a regular expression for full names, such as "
                r"r'language_model\..*\.(q_proj|v_proj)': names alone reach the vision encoder's layers too."
            )
        extra.append(f"({more})")
    if not names and not extra:
        raise ValueError(
            "There is nothing to adapt: language and bridge are both without adapters. Training the full bridge alone "
            "needs no adapter."
        )
    full_modules += options.pop("modules_to_save", None) or []
    rows = {"trainable_token_indices": _embedding_rows(model, tokens)} if tokens else {}
    return {
        "names": names,
        "extra_patterns": extra,
        "modules_to_save": full_modules or None,
        **rows,
        **options,
    }


def lora_config(
    model: BridgedModel,
    language: LanguageLayers | None = "attention",
    bridge: BridgeTraining | None = "full",
    tokens: Iterable[int] | None = None,
    **options,
) -> LoraConfig:
    """A LoRA configuration that reaches what is named and nothing else.

    It is for `peft.get_peft_model` or `model.add_adapter`. Names are read from the model, so every language model of
    transformers works, quantised ones (QLoRA) too. The vision encoder is left alone. The rows of Flamingo's special
    tokens are in the bridge and are trained with it.

    Args:
        model: The model, or a `PeftModel` of it.
        language: Layers of the language model to adapt: `"attention"`, `"mlp"`, `"all"`, or `None`.
        bridge: `"full"` trains all of it, as a copy that is saved with the adapter (`modules_to_save`); `"adapter"`
            adapts its linear layers and trains Flamingo's gates and token rows in full, while its other parameters
            (norms, query tokens, latents, `image_newline`) stay as they are; `None` leaves it alone.
        tokens: Ids of further tokens whose rows in the language model's own table are trained
            (`trainable_token_indices`); if the table is the output layer's too, so are their output rows.
        options: Arguments of PEFT's `LoraConfig`: `r`, `lora_alpha`, `lora_dropout`, `use_dora=True` and so on.
            `target_modules` is a regular expression for further modules to adapt, `modules_to_save` names further
            modules to train.

    Returns:
        A `peft.LoraConfig`.

    Raises:
        ValueError: Nothing matches, or a token can't be trained.
        TypeError: `model` is not a bridged model, or `target_modules` is not a regular expression.
    """
    from peft import LoraConfig

    arguments = _options(model, language, bridge, tokens, options)
    names, extra = arguments.pop("names"), arguments.pop("extra_patterns")
    return LoraConfig(target_modules="|".join([*filter(None, [pattern_of(names)]), *extra]), **arguments)


def ia3_config(
    model: BridgedModel,
    language: LanguageLayers | None = "all",
    bridge: BridgeTraining | None = "full",
    **options,
) -> IA3Config:
    """An IA3 configuration: keys and values are scaled, and what the last layer of each feed-forward receives.

    PEFT (0.21) loads, but can't merge an IA3 adapter that brings complete modules: the bridge, or rows of special
    tokens.

    Args:
        model: The model, or a `PeftModel` of it.
        language: Layers of the language model to adapt: `"attention"`, `"mlp"`, `"all"`, or `None`.
        bridge: `"full"` trains all of it, `"adapter"` scales its layers, `None` leaves it alone. In a bridge without
            attention (MLP), the outputs of all layers are scaled.
        options: Arguments of PEFT's `IA3Config`.

    Returns:
        A `peft.IA3Config`.

    Raises:
        ValueError: Nothing matches.
        TypeError: `model` is not a bridged model, or `target_modules` is not a regular expression.
    """
    from peft import IA3Config

    arguments = _options(model, language, bridge, None, options)
    feed_forward, scaled, plain = {}, [], []
    for name in arguments.pop("names"):
        parent, _, leaf = name.rpartition(".")
        if layer_kind(name) == "mlp":
            feed_forward[parent] = name  # the last one of each stays
        elif KEYS_AND_VALUES.fullmatch(leaf):
            scaled.append(name)
        elif re.fullmatch(r"bridge\.linear_\d+", name):
            plain.append(name)
    inputs = pattern_of(feed_forward.values())
    patterns = [pattern_of([*scaled, *plain]), inputs, *arguments.pop("extra_patterns")]
    arguments["target_modules"] = "|".join(filter(None, patterns))
    return IA3Config(feedforward_modules=inputs or [], **arguments)


__all__ = ["ia3_config", "lora_config"]
