"""Language models in transformers' layout, old ones included, and LoRA adapters merged into them; tokenizers."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, normalizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)

from ..compat import optional_file
from .convert_files import dimensions
from .convert_sources import Change
from .convert_tables import BUFFER, ConversionError, Drop, Rename, Rule


PREFIX = "language_model."  # of its names in a converted model
# names in checkpoints that differ from those of transformers 5
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


def read_text_config(language: str | os.PathLike) -> PreTrainedConfig:
    """Read a language model's configuration, including files of old versions.

    Args:
        language: Folder or Hub id.

    Raises:
        ConversionError: Its `config.json` has no `model_type`.
    """
    fields, _ = PreTrainedConfig.get_config_dict(language)
    return text_config_of(fields, f"{language}/config.json")


def text_config_of(fields: Mapping, where: str) -> PreTrainedConfig:
    """Make a language model's configuration from the fields of its `config.json`.

    Args:
        fields: The fields.
        where: Name of the file, for errors.

    Raises:
        ConversionError: There is no `model_type`.
    """
    fields = dict(fields)
    attention = fields.get("attn_config")
    if isinstance(attention, dict):  # MPT's: transformers wants an integer probability there, and float bounds
        for name, kind in (("attn_pdrop", int), ("clip_qkv", float), ("softmax_scale", float)):
            if isinstance(attention.get(name), (int, float)) and kind(attention[name]) == attention[name]:
                attention[name] = kind(attention[name])
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConversionError(f"{where} does not say its model_type.")
    fields.pop("auto_map", None)  # code beside the weights is never run
    config = AutoConfig.for_model(model_type, **fields)
    config.use_cache = True  # the official files say false, for training
    return config


def language_table(
    config: PreTrainedConfig, tensors: Iterable[str], tied: Iterable[str] = (), source: str = ""
) -> list[Rule]:
    """The conversion table of a language model.

    Args:
        config: The language model's configuration.
        tensors: Names of the converted model's tensors; those of its language model begin with `language_model.`.
        tied: Names of its tensors that are second names of others.
        source: What the language model's names begin with in the checkpoint.
    """
    names = {name.removeprefix(PREFIX) for name in tensors if name.startswith(PREFIX)}
    tied = {name.removeprefix(PREFIX) for name in tied}
    if config.tie_word_embeddings:
        tied |= {"lm_head.weight", "embed_out.weight"}
    changed = LANGUAGE_TABLES.get(config.model_type, [])
    renamed = {rule.target for rule in changed if isinstance(rule, Rename)}
    table: list[Rule] = [
        *(Rename(name, name) for name in sorted(names)),
        *(rule for rule in changed if isinstance(rule, Drop) or rule.target in names),
        *(Drop(name, "tied to the input embeddings") for name in sorted(tied - names - renamed)),
    ]
    return [rule.renamed(lambda name: source + name, lambda name: PREFIX + name) for rule in table]


LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


def lora_changes(files, settings: Mapping) -> dict[str, Change]:
    """The changes that merge a LoRA adapter of PEFT into weights: `weight + alpha / r * B @ A`.

    Args:
        files: The adapter's tensors; those that are not LoRA's are ignored.
        settings: The fields of its `adapter_config.json`.

    Returns:
        From names of weights, as the adapter spells them, to their changes.

    Raises:
        ConversionError: It is another kind of adapter, or one matrix of a pair is missing.

    Source: LoRA (arXiv 2106.09685, section 4.1), rank-stabilised LoRA (arXiv 2312.03732); `peft/tuners/lora/layer.py`.
    """
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA" or settings.get("use_dora"):
        raise ConversionError(
            f"The adapter is one of {'DoRA' if settings.get('use_dora') else kind}; only LoRA's are merged here. Merge "
            "it with PEFT's merge_and_unload first."
        )
    pairs: dict[str, dict[str, str]] = {}
    for key in files.shapes:
        if "lora_" not in key:
            continue
        if (match := LORA_KEY.fullmatch(key)) is None:
            raise ConversionError(
                f"{key} is not one of LoRA's matrices for linear layers, which are the ones merged here."
            )
        pairs.setdefault(match["module"], {})[match["part"]] = key
    changes = {}
    for module, keys in pairs.items():
        if len(keys) < 2:
            raise ConversionError(f"The adapter has only one of LoRA's two matrices for {module}.")
        (rank, inputs), (outputs, _) = (dimensions(files.shapes, keys[part], 2) for part in "AB")
        alpha = settings["lora_alpha"]
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        transposed = bool(settings.get("fan_in_fan_out"))
        shape = (inputs, outputs) if transposed else (outputs, inputs)

        def apply(weight, keys=keys, scale=scale, transposed=transposed):
            update = scale * files.read(keys["B"]).float() @ files.read(keys["A"]).float()
            return (weight.float() + (update.T if transposed else update)).to(weight.dtype)

        def checked(given, module=module, shape=shape):
            if tuple(given) != shape:
                raise ConversionError(
                    f"The adapter is for a {module} of {list(shape)}, but the language model's is {list(given)}: it "
                    "was trained with another language model."
                )
            return tuple(given)

        changes[f"{module}.weight"] = Change(apply, checked, (files,))
    return changes


def load_language_tokenizer(
    source: str | os.PathLike, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """Load a language model's tokenizer so that it splits text as the official code does.

    transformers 5 chooses a tokenizer's class by the model's kind, and takes a file that does not say `legacy` for
    one with `legacy=False`. The official code was written for transformers 4, where LLaMA's class read
    `tokenizer.model` for every kind of model, and was legacy by default: each text between special tokens is split
    exactly as sentencepiece splits it alone.

    Args:
        source: Folder or Hub id.
        config: The language model's configuration, if the one in `source` is not transformers'.

    Raises:
        ConversionError: transformers can't split texts as the tokenizer's own file does.
    """
    files = {name: optional_file(source, name) for name in ("tokenizer_config.json", "tokenizer.model")}
    path = files["tokenizer_config.json"]
    fields = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    kind = (fields.get("tokenizer_class") or "").removesuffix("Fast")
    if kind != "LlamaTokenizer":
        return AutoTokenizer.from_pretrained(source, **({} if config is None else {"config": config}))
    if files["tokenizer.model"] is None:  # tokenizer.json is complete
        return TokenizersBackend.from_pretrained(source)
    legacy = fields.get("legacy")
    tokenizer = LlamaTokenizer.from_pretrained(source, legacy=True if legacy is None else legacy)
    return tokenizer if legacy is False else _like_sentencepiece(tokenizer, files["tokenizer.model"])


# spaces in all places, line breaks, what the vocabulary does not have
_PROBES = (
    "a",
    "[INST] What is it? [/INST]",
    " x",
    "  two  spaces ",
    "\nUSER: hello",
    "x\n\n y\t",
    "\u00e9\u4f60\U0001f600 1234.5",
)


def _like_sentencepiece(tokenizer: LlamaTokenizer, path: str | os.PathLike) -> TokenizersBackend:
    """The same tokenizer, in a class that keeps its steps, with sentencepiece's for each text between special tokens.

    Args:
        tokenizer: LLaMA's tokenizer. It is changed.
        path: Its `tokenizer.model`.
    """
    official = SentencePieceProcessor(model_file=os.fspath(path))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    for begin in ("\u2581", ""):
        prepend = [normalizers.Prepend(begin)] if begin else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
        if all(tokenizer.encode(text, add_special_tokens=False) == official.encode(text) for text in _PROBES):
            break
    else:
        raise ConversionError(
            f"{path} splits texts in a way that transformers' LlamaTokenizer can't follow, such as {_PROBES[2]!r} into "
            f"{official.encode(_PROBES[2])}; expected a byte pair encoding that neither normalises texts nor removes "
            "spaces. Give a folder with the tokenizer.json that belongs to the checkpoint, without tokenizer.model."
        )
    strip = [decoders.Strip(" ", 1, 0)] if begin else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        kept = TokenizersBackend.from_pretrained(folder)  # LLaMA's class would build steps of its own
    kept.name_or_path = kept.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return kept


def needs_space_after(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether text after a special token needs a space to be tokenised like separate text, as the official code does.

    LLaMA's class of transformers 5 puts its space only before a whole text, and takes one that is there for it.

    Args:
        tokenizer: The language model's tokenizer.
        token: The special token.

    Source: `tokenizer_image_token` in `llava/mm_utils.py`; `generate` of `Blip2VicunaInstruct` in LAVIS.
    """
    alone, after, spaced = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("\nWhat", f"{token}\nWhat", f"{token} \nWhat")
    )
    return after[1:] != alone and spaced[1:] == alone


__all__ = [
    "language_table",
    "load_language_tokenizer",
    "lora_changes",
    "needs_space_after",
    "read_text_config",
    "text_config_of",
]
