"""Models of vlbridge in the official layouts of OpenFlamingo, LAVIS and LLaVA."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    PreTrainedTokenizerBase,
)

from ..configuration.configuration_flamingo import PerceiverFlamingoConfig
from ..configuration.configuration_llava import MLPLlavaConfig
from .convert_assembly import Conversion
from .convert_blip import CAPTION_TABLE, MATCHING_TABLE
from .convert_blip2 import checkpoint_table as lavis_table
from .convert_certificate import Checks, certify
from .convert_files import TensorFiles
from .convert_lavis_names import EVA_TABLE, LAVIS_LANGUAGE_MODELS
from .convert_llava_names import LLAVA_LANGUAGE_MODELS
from .convert_llava_names import checkpoint_table as llava_checkpoint_table
from .convert_openflamingo import checkpoint_table as flamingo_table
from .convert_saved import Saved
from .convert_sources import Renamed
from .convert_tables import ConversionError, Drop, Rename, Rule, Twin, dropped, invert, plan
from .convert_vision import OPEN_CLIP_TABLE
from .convert_writing import output_folder, write_tensors


LAVIS = "LAVIS's layout"
LAVIS_EPSILON = 1e-5  # torch's default, which the official code uses
FROZEN = "frozen: official checkpoints have it elsewhere"


def official_flamingo(saved: Saved) -> tuple[list[Rule], re.Pattern]:
    """The table from vlbridge's names to open-flamingo's, and a pattern for the names that released files hold."""
    config = saved.config
    if not config.freeze_vision_model:
        raise ConversionError(
            "This model's vision encoder was trained, which OpenFlamingo's checkpoints have no place for. What can be "
            "done: save_pretrained()."
        )
    rules = flamingo_table(config, saved.tensors.shapes)
    # if two names lead to one tensor, the last is the one that the official code's transformers used
    last = {rule.target: rule for rule in rules if isinstance(rule, Rename)}
    table = invert([rule for rule in rules if not isinstance(rule, Rename) or last[rule.target] is rule])
    table += [Drop(name, FROZEN) for name in saved.tensors.shapes if name.startswith("vision_model.")]
    # the official filter keeps what was trained, and whatever has "embed" in its name; MPT's table is called wte
    return table, re.compile(r"perceiver\..*|.*\.gated_cross_attn_layer\..*|lang_encoder\..*(embed|wte).*")


def official_blip2(saved: Saved) -> tuple[list[Rule], re.Pattern]:
    """The table from vlbridge's names to LAVIS', and a pattern for the names that released files hold."""
    config, model = saved.config, saved.conversion.model
    text_config = config.text_config
    language = None
    if text_config is not None:
        language = next(
            (name for name, kinds in LAVIS_LANGUAGE_MODELS.items() if text_config.model_type in kinds), None
        )
        if language is None:
            raise ConversionError(
                f"LAVIS has no BLIP-2 with a {text_config.model_type}; it has OPT, T5 and LLaMA. What can be done: "
                "--to transformers, or save_pretrained(bridge_only=True)."
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
            "LAVIS's BLIP-2 has EVA ViT-g or CLIP ViT-L; this model's vision encoder is a "
            f"{config.vision_config.model_type}. "
            "What can be done: save_pretrained(bridge_only=True)."
        )
    back = invert(table)
    back += [
        rule.renamed(target=lambda name: "visual_encoder." + name.removeprefix("visual.")) for rule in invert(vision)
    ]
    back += [
        Drop(f"vision_model.post_layernorm.{kind}", "the official encoder ends before it")
        for kind in ("weight", "bias")
        if vision is EVA_TABLE
    ]
    # second copies of frozen tables pass the official filter
    second = [re.escape(rule.source) for rule in table if isinstance(rule, Twin)]
    trained = r"query_tokens|temp|ln_vision\..*|Qformer\..*|(opt|t5|llm|vision|text)_proj\..*|itm_head\..*"
    return back, re.compile("|".join([trained, *second]))


def plan_official(saved: Saved) -> tuple[Conversion, dict[str, str]]:
    """Plan the official checkpoint of a Perceiver-Flamingo or a Q-Former BLIP-2; no tensor is read yet.

    It holds the tensors of the official file that the model was converted from. If there was none, it holds what the
    official code saves. Parts that were trained here are added.

    Args:
        saved: The model.

    Returns:
        The conversion, and the tensors of the model that are left out, with the reason.

    Raises:
        ConversionError: The official layout can't express the model.
    """
    config, tensors = saved.config, saved.tensors
    table, released = (official_flamingo if isinstance(config, PerceiverFlamingoConfig) else official_blip2)(saved)
    if config.special_token_ids:
        raise ConversionError(
            "The rows of this model's special tokens are in its bridge, beside the language model's table; the "
            "official layout has them in the table. Models that were converted from the official layout have them "
            "there too."
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
    if recorded:  # second copies of tables that are left out
        duplicates = {rule.target for rule in table if rule.duplicates}
        kept.update((target, pieces[target]) for target in duplicates & pieces.keys())
    done = Conversion(
        config, {target: (tensors, piece, None) for target, piece in kept.items()}, saved.conversion.model
    )
    used = {source for piece in kept.values() for source in piece.sources}
    left_out = {name: FROZEN for name in tensors.shapes if name not in used}
    left_out.update(dropped(table, left_out))
    return done, left_out


def write_official(saved: Saved, output: str | os.PathLike, verify: bool = True) -> Conversion:
    """Write a model in its official layout: OpenFlamingo's `checkpoint.pt`, LAVIS' `checkpoint.pth` or LLaVA's folder.

    Args:
        saved: The model.
        output: The folder to write: a new one, or an empty one.
        verify: Whether to check what was written; see `certify`.
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
            f"{len(left_out) - len(done.left_out)} tensors of the frozen vision encoder and language model are left "
            "out, as in the official releases."
        )
    write_torch(done, output, "checkpoint.pt" if flamingo else "checkpoint.pth", None if flamingo else "model", verify)
    return done


def write_torch(done: Conversion, output: str | os.PathLike, name: str, wrapper: str | None, verify: bool) -> None:
    """Write a checkpoint with `torch.save`, and its certificate.

    Args:
        done: The conversion.
        output: The folder to write: a new one, or an empty one.
        name: Name of the file.
        wrapper: Key of the dictionary that holds the tensors; `None` writes them at the top.
        verify: Whether to check what was written; see `certify`.
    """
    with output_folder(output) as folder, Checks(done, verify) as checks:
        state = {key: done.load(key) for key in done.pieces}
        torch.save(state if wrapper is None else {wrapper: state}, folder / name)
        del state
        checks.file(folder / name)
        certify(done, folder, checks)


def write_official_blip(place: str | os.PathLike, output: str | os.PathLike, verify: bool = True) -> Conversion:
    """Write LAVIS' checkpoint of a captioner or an image-text matcher of BLIP in transformers' class.

    Args:
        place: Folder or Hub id.
        output: The folder to write: a new one, or an empty one.
        verify: Whether to check what was written; see `certify`.
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
    """Write a model in LLaVA's own layout: a folder that the official code loads.

    Args:
        saved: The model.
        output: The folder to write: a new one, or an empty one.
        verify: Whether to check what was written; see `certify`.

    Raises:
        ConversionError: The official layout can't express the model.
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
            "The vision tower is left out, as in the official releases: config.json names it, "
            f"{fields['mm_vision_tower']!r}."
        )
    with output_folder(output, done.fingerprint()) as folder, Checks(done, verify) as checks:
        write_tensors(folder, done.entries(), when_written=checks.file)
        (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        if saved.generation is not None:
            saved.generation.save_pretrained(folder)
        _save_tokenizer(processor.tokenizer, folder)
        certify(done, folder, checks)
    return done


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer under the class name that the official code's transformers 4 knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def llava_fields(saved: Saved) -> tuple[dict, list[str]]:
    """The fields of LLaVA's `config.json`, and reasons why it can't describe the model."""
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
    if config.global_context:
        problems.append("its projector sees one feature at a time, this one the image's mean too (global_context)")
    if config.projector_norm_eps is not None:
        problems.append("its projector has no layer norm in front")
    if config.projector_hidden_size not in (None, config.text_config.hidden_size) or not config.projector_bias:
        problems.append("its projector has biases and the language model's width between its layers")
    tower = config.vision_config.name_or_path or ((config.frozen_parts or {}).get("vision_model") or {}).get("source")
    if not tower or os.path.isabs(tower):  # a folder of this machine means nothing on others
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


__all__ = ["plan_official", "write_official", "write_official_blip", "write_official_llava"]
