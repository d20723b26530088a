"""BLIP-2 and InstructBLIP in transformers' own classes, converted in both directions with one table.

Source: `models/blip_2` and `models/instructblip` of transformers 5.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    GenerationConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..compat import optional_file, replace_backend
from ..configuration.configuration_bridged import BridgedConfig
from ..configuration.configuration_qformer import QFormerBlip2Config, QFormerBlip2PreTrainingConfig, QFormerConfig
from ..modeling.modeling_bridge import fill_vision_geometry
from ..modeling.modeling_qformer_retrieval import QFormerBlip2ForImageTextRetrieval
from .convert_assembly import Conversion, assemble, expected_tensors
from .convert_files import TensorFiles
from .convert_language import language_table
from .convert_lavis_names import transformers_bridge_table
from .convert_qformer import build_processor, model_class
from .convert_runs import PILLOW_NOTE, load_processors, run_generation, run_retrieval
from .convert_sources import Constants, resized
from .convert_tables import ConversionError, Missing, Rename, Rule, dropped, invert, plan


@dataclass(frozen=True)
class Port:
    """One of transformers' classes for BLIP-2, with the classes of its configuration.

    Args:
        model_class: The class of the model.
        config_class: The class of its configuration.
        vision_config_class: The class of the vision encoder's configuration.
        qformer_config_class: The class of the Q-Former's configuration.
    """

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    vision_config_class: type[PreTrainedConfig]
    qformer_config_class: type[PreTrainedConfig]


_BLIP2 = (Blip2Config, Blip2VisionConfig, Blip2QFormerConfig)
PORTS = {
    "generation": Port(Blip2ForConditionalGeneration, *_BLIP2),
    "retrieval": Port(Blip2ForImageTextRetrieval, *_BLIP2),
    "instructed": Port(
        InstructBlipForConditionalGeneration, InstructBlipConfig, InstructBlipVisionConfig, InstructBlipQFormerConfig
    ),
}  # fmt: skip
MODEL_TYPES = ("blip-2", "instructblip")
# tensors that transformers' classes lack, and the values that fill them
ONLY_OURS = (
    (r"vision_model\.post_layernorm\.weight", "a norm after the encoder, whose output is not read", 1.0),
    (r"vision_model\.post_layernorm\.bias", "a norm after the encoder, whose output is not read", 0.0),
    (r"bridge\.lm_head\.transform_layer_norm\.weight", "transformers' class for retrieval has no captions", 1.0),
    (r"bridge\.lm_head\..*", "transformers' class for retrieval has no captions", 0.0),
    (r"bridge\.temperature", "transformers' class for retrieval has no temperature", 0.07),
)


def port_of(config: BridgedConfig) -> str:
    """The key in `PORTS` of the class for a model of vlbridge.

    Args:
        config: The model's configuration.
    """
    if isinstance(config, QFormerBlip2PreTrainingConfig):
        return "retrieval"
    return "instructed" if config.qformer_config.use_text else "generation"


def port_table(config: BridgedConfig, tensors: Iterable[str], tied: Iterable[str] = ()) -> list[Rule]:
    """The conversion table of a checkpoint of transformers' class.

    Args:
        config: The configuration of the model of vlbridge.
        tensors: Names of its tensors.
        tied: Names of its tensors that are second names of others.
    """
    tensors = list(tensors)
    table = transformers_bridge_table(port_of(config) == "instructed")
    for name in tensors:
        if (found := next((entry for entry in ONLY_OURS if re.fullmatch(entry[0], name)), None)) is not None:
            table.append(Missing(name, *found[1:]))
        elif name.startswith("vision_model."):
            table.append(Rename(name, name))
    if config.text_config is not None:
        table += language_table(config.text_config, tensors, tied, source="language_model.")
    return table


def _shared(fields: Mapping, config_class: type[PreTrainedConfig], **more) -> PreTrainedConfig:
    """A configuration of the given class, from those of the fields that the class has."""
    own = set(config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    own |= {"pad_token_id"} & set(config_class.__dataclass_fields__)
    return config_class(**{name: fields[name] for name in own if fields.get(name) is not None}, **more)


def refuse_port(config: BridgedConfig) -> None:
    """Refuse a model that transformers' classes for BLIP-2 can't express.

    Args:
        config: The model's configuration.

    Raises:
        ConversionError: They can't; the reasons are named.
    """
    vision = config.vision_config.model_type
    problems = []
    if vision not in ("blip_2_vision_model", "instructblip_vision_model"):
        problems.append(f"their vision encoder is EVA ViT-g's architecture, this one is a {vision}")
    elif config.vision_feature_layer != -1:
        problems.append(
            "they read the encoder's last layer before the norm (-1), this one "
            f"vision_feature_layer={config.vision_feature_layer}"
        )
    if config.vision_feature_select_strategy != "full":
        problems.append("their Q-Former reads the class token too, this one patches alone")
    if config.special_token_ids:
        problems.append("they have no rows of special tokens beside the language model's table")
    if config.text_config is not None and config.text_config.model_type == "mosaic_gpt":
        problems.append("transformers has no MPT-1B (mosaic_gpt)")
    if problems:
        raise ConversionError(
            f"{PORTS[port_of(config)].model_class.__name__} can't express this model: {'; '.join(problems)}. What can "
            "be done: --to official writes LAVIS's layout; save_pretrained(bridge_only=True) makes a repository that "
            "AutoModel loads where vlbridge is installed."
        )


def port_config(config: BridgedConfig, rows: int | None, generation: GenerationConfig | None) -> PreTrainedConfig:
    """The configuration of transformers' class.

    Args:
        config: The configuration of the model of vlbridge.
        rows: Rows of the language model's tables after the conversion; `None` without a language model.
        generation: The model's generation defaults. Their special tokens are written to the language model's
            configuration, where `generate` of these classes looks for them.
    """
    kind = port_of(config)
    port, qformer = PORTS[kind], config.qformer_config
    fields = {}
    if kind == "retrieval":
        fields["image_text_hidden_size"] = config.embed_dim
    else:
        text_config = copy.deepcopy(config.text_config)
        text_config.vocab_size, text_config.dtype = rows, None  # the dtype stands in the outer configuration
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            if getattr(generation, name, None) is not None:
                setattr(text_config, name, getattr(generation, name))
        fields.update(text_config=text_config, image_token_index=config.image_token_id)
    more = {"use_qformer_text_input": kind == "retrieval"} if kind != "instructed" else {}
    return port.config_class(
        vision_config=_shared(config.vision_config.to_dict(), port.vision_config_class),
        qformer_config=_shared(
            qformer.to_dict(), port.qformer_config_class, initializer_range=config.initializer_range, **more
        ),
        num_query_tokens=qformer.num_query_tokens,
        **fields,
    )


def port_tokenizer(processor: ProcessorMixin, decoder_only: bool) -> PreTrainedTokenizerBase:
    """The language model's tokenizer as transformers' processors expect it.

    It adds the token that begins a text itself: these processors put the image's tokens before that.

    Args:
        processor: The processor of vlbridge.
        decoder_only: Whether the language model is a decoder.
    """
    tokenizer = copy.deepcopy(processor.tokenizer)
    begin = tokenizer.bos_token
    if decoder_only and begin and processor.text_start.strip() == begin:
        tokenizer.add_bos_token = tokenizer.init_kwargs["add_bos_token"] = True
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, tokenizer.bos_token_id)]
        )
    return tokenizer


def port_processor(config: BridgedConfig, processor: ProcessorMixin) -> ProcessorMixin:
    """The processor of transformers' class.

    Args:
        config: The configuration of the model of vlbridge.
        processor: Its processor.
    """
    ours = processor.image_processor
    names = ("size", "resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    if getattr(ours, "do_center_crop", False):
        images = ours  # BLIP's has no crop
    else:
        images = BlipImageProcessor(**{name: getattr(ours, name) for name in names if hasattr(ours, name)})
    if port_of(config) == "retrieval":
        return Blip2Processor(images, copy.deepcopy(processor.tokenizer))
    tokenizer = port_tokenizer(processor, not config.is_encoder_decoder)
    tokenizer.chat_template = port_template(processor, tokenizer)  # these processors don't keep one of their own
    queries = config.qformer_config.num_query_tokens
    if processor.qformer_tokenizer is None:
        return Blip2Processor(images, tokenizer, num_query_tokens=queries)
    return InstructBlipProcessor(images, tokenizer, processor.qformer_tokenizer, num_query_tokens=queries)


def port_template(processor: ProcessorMixin, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template without the placeholder: transformers' processors and vLLM put the image before everything.

    It writes the token that begins a text, where the tokenizer would: servers tokenise what it writes without that.

    Args:
        processor: The processor of vlbridge.
        tokenizer: The tokenizer of transformers' processor, see `port_tokenizer`.
    """
    template = processor.chat_template.replace(processor.image_token, "")
    begin = tokenizer.bos_token
    asked = [{"role": "user", "content": "a"}]
    try:
        text = tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False)
    except TemplateError:  # it needs other messages, and stays as it is
        return template
    begins = begin and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{- bos_token -}}" + template if begins and not text.startswith(begin) else template


def plan_port(
    saved: Conversion, tensors, processor: ProcessorMixin, generation: GenerationConfig | None
) -> tuple[Conversion, ProcessorMixin]:
    """Plan the conversion of a model of vlbridge to transformers' class; no tensor is read yet.

    Args:
        saved: The model.
        tensors: Its tensors, as a checkpoint.
        processor: Its processor.
        generation: Its generation defaults.

    Returns:
        The conversion, and the processor of transformers' class.

    Raises:
        ConversionError: Transformers' class can't express it.
    """
    config = saved.config
    refuse_port(config)
    rows = None
    if config.text_config is not None:  # the placeholder is looked up before it is replaced
        rows = max(config.text_config.vocab_size, config.image_token_id + 1)
    new_config = port_config(config, rows, generation)
    with torch.device("meta"):
        model = PORTS[port_of(config)].model_class(new_config)
    expected = expected_tensors(model, tensors.shapes)
    table = invert(port_table(config, tensors.shapes))
    pieces = plan(table, tensors.shapes)
    changes = {}
    if rows is not None and rows != config.text_config.vocab_size:
        tables = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
        of_model = dict(model.named_parameters(remove_duplicate=False))
        changes = {name: resized(rows) for name in expected if id(of_model.get(name)) in tables}
    conversion = assemble(new_config, model, expected, [(tensors, pieces, changes)], tensors.path)
    conversion.left_out = dropped(table, tensors.shapes)
    new_config.dtype = next(iter({conversion.dtype(name) for name in changes} or {conversion.dtype("query_tokens")}))
    conversion.notes = list(_notes(config, processor, rows))
    return conversion, port_processor(config, processor)


def _notes(config: BridgedConfig, processor: ProcessorMixin, rows: int | None) -> Iterable[str]:
    theirs, ours = config.vision_config.layer_norm_eps, config.vision_layer_norm_eps
    if theirs != ours:
        yield (
            f"The norm on the patch features has epsilon {theirs:g} here: transformers' classes give it the vision "
            "encoder's. "
            f"In the original it is {ours:g}."
        )
    if getattr(processor.image_processor, "backend", None) == "pil":
        yield PILLOW_NOTE
    if rows is None:
        yield "The captioning head and the contrastive temperature are left out: transformers' class has neither."
        return
    if rows != config.text_config.vocab_size:
        yield (
            f"The language model's tables have {rows} rows instead of {config.text_config.vocab_size}, so that the "
            "placeholder can be looked up. New rows are the mean of the others: greedily they are never chosen, and "
            "all together they take less probability than one average token."
        )
    tokenizer = processor.tokenizer
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not config.is_encoder_decoder and begins and not processor.text_start:
        yield (
            f"The order differs: here {tokenizer.bos_token} stands after the image's tokens, in the original before "
            "them. Transformers' processor has no other order."
        )
    yield (
        "Prompts have one image each, and its tokens stand before everything, a system message too: transformers' "
        f"processor and vLLM put them there. So the chat template writes no {processor.image_token}; in the original "
        "the image stands in its turn, and a model that was trained on conversations may answer otherwise here."
    )
    yield (
        "generate() without arguments asks the language model's own defaults, which are greedy here; pass num_beams "
        "and the like, or pipeline(), which reads generation_config.json."
    )


def run_port(ours: str | os.PathLike, theirs: str | os.PathLike, config: BridgedConfig) -> list[dict]:
    """Compare a model of vlbridge with transformers' class on the same input, in float32.

    Args:
        ours: Folder or Hub id of the model of vlbridge.
        theirs: Folder or Hub id of transformers' model.
        config: The configuration of the model of vlbridge.

    Returns:
        What was compared, with the largest differences.

    Raises:
        ConversionError: Their outputs differ by more than rounding explains, or weights are missing.
    """
    kind = port_of(config)
    other, info = PORTS[kind].model_class.from_pretrained(theirs, dtype=torch.float32, output_loading_info=True)
    if any(info.values()):
        raise ConversionError(f"Transformers' class does not find all of its tensors: {info}.")
    processors = load_processors(ours, theirs)
    if kind == "retrieval":
        model = QFormerBlip2ForImageTextRetrieval.from_pretrained(ours, dtype=torch.float32)
        texts = ("a red and green gradient", "a dog")
        return run_retrieval(model.eval(), processors[0], other.eval(), processors[1], texts)
    model = AutoModel.from_pretrained(ours, dtype=torch.float32)
    prompt = processors[0].caption_prompt
    return run_generation(
        model.eval(), processors[0], other.eval(), processors[1], (processors[0].image_token + prompt, prompt)
    )


def is_port(place: str | os.PathLike) -> bool:
    """Whether a folder or Hub id holds a model of transformers' classes for BLIP-2."""
    if os.path.isfile(place):
        return False
    try:
        found = optional_file(place, "config.json")
    except (OSError, ValueError):  # reading the weights will raise the error
        return False
    return found is not None and json.loads(Path(found).read_text(encoding="utf-8")).get("model_type") in MODEL_TYPES


def infer_config(port: PreTrainedConfig, keys: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> BridgedConfig:
    """Infer the configuration of vlbridge for a model of transformers' classes.

    Args:
        port: The configuration of transformers' class.
        keys: The checkpoint's keys.
        tokenizer: Its tokenizer, for special tokens that the configuration does not name.
    """
    vision, qformer = port.vision_config.to_dict(), port.qformer_config.to_dict()
    retrieval = "itm_head.weight" in set(keys)
    fields = {
        "vision_config": _shared(vision, Blip2VisionConfig),
        "qformer_config": _shared(
            qformer, QFormerConfig, num_query_tokens=port.num_query_tokens,
            use_text=retrieval or port.model_type == "instructblip",
        ),
        "vision_layer_norm_eps": vision["layer_norm_eps"],
        "vision_feature_layer": -1,
        "initializer_range": port.initializer_range,
    }  # fmt: skip
    if retrieval:
        tokens = {
            "bos_token_id": fields["qformer_config"].vocab_size - 1,  # [DEC], the last of BERT's
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return QFormerBlip2PreTrainingConfig(embed_dim=port.image_text_hidden_size, **tokens, **fields)
    token = port.image_token_index
    if token is None:  # older repositories
        token = tokenizer.convert_tokens_to_ids("<image>")
    return QFormerBlip2Config(text_config=copy.deepcopy(port.text_config), image_token_id=token, **fields)


def without_placeholder(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> PreTrainedTokenizerBase:
    """BERT's tokenizer without the `<image>` that transformers' processor has added to it."""
    if len(tokenizer) <= vocab_size:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocab_size]
    return replace_backend(copy.deepcopy(tokenizer), Tokenizer.from_str(json.dumps(state)))


def convert_port(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    config: Mapping | None = None,
    verify: bool = True,
) -> Conversion:
    """Convert a model of transformers' classes for BLIP-2 and InstructBLIP into a folder that vlbridge loads.

    Args:
        checkpoint: Folder or Hub id.
        output: Folder to write to.
        config: Fields of the converted configuration that should have other values.
        verify: Whether to check what was written; see `certify`.

    Returns:
        The conversion.

    Raises:
        ConversionError: A tensor is unknown or missing; nothing is written.
    """
    port = AutoConfig.from_pretrained(checkpoint)
    files = TensorFiles(checkpoint)
    if (
        port.model_type not in MODEL_TYPES
        or not {"itm_head.weight", "language_projection.weight"} & files.shapes.keys()
    ):
        raise ConversionError(
            f"{checkpoint} holds a {port.model_type} without a projection to a language model or a head for retrieval; "
            "expected a model of transformers' classes for BLIP-2 or InstructBLIP."
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    retrieval = "itm_head.weight" in files.shapes
    if not retrieval and "<image>" not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    model_config = infer_config(port, files.shapes, tokenizer)
    for name, value in (config or {}).items():
        setattr(model_config, name, value)
    fill_vision_geometry(model_config)
    with torch.device("meta"):
        model = model_class(model_config)(model_config)
    expected = expected_tensors(model, files.shapes)
    tied = model.all_tied_weights_keys.keys() - files.shapes.keys()
    table = port_table(model_config, expected, tied)
    dtype = files.dtypes["vision_model.post_layernorm.weight"]
    values = {rule.target: (expected[rule.target], dtype, rule.value) for rule in table if isinstance(rule, Missing)}
    constants = Constants(values)
    sources = [(files, plan(table, files.shapes), {}), (constants, plan([Rename(n, n) for n in values], values), {})]
    conversion = assemble(model_config, model, expected, sources, files.path)
    conversion.left_out = dropped(table, files.shapes)
    conversion.direction = ("transformers", "vlbridge")
    model_config.dtype = port.dtype
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")  # as in the original
    generation = None
    if retrieval:
        conversion.notes.append(
            "The captioning head and the contrastive temperature are not in the checkpoint: retrieval works, captions "
            "don't."
        )
        bert = without_placeholder(tokenizer, model_config.qformer_config.vocab_size)
        bert.add_special_tokens({"bos_token": "[DEC]"})
        processor = build_processor(model_config, None, image_processor, None, bert)
    else:
        bert = None
        if model_config.qformer_config.use_text:
            bert = AutoTokenizer.from_pretrained(checkpoint, subfolder="qformer_tokenizer")
        kinds = {"t5": "t5", "llama": "llm"}
        kind = kinds.get(port.text_config.model_type, "opt")
        processor = build_processor(model_config, kind, image_processor, tokenizer, bert)
        try:
            generation = GenerationConfig.from_pretrained(checkpoint)
        except OSError:
            generation = GenerationConfig.from_model_config(port.text_config)
    conversion.run = lambda folder: run_port(folder, checkpoint, model_config)
    conversion.write(output, generation, processor, verify)
    return conversion


__all__ = [
    "PORTS",
    "convert_port",
    "infer_config",
    "is_port",
    "plan_port",
    "port_config",
    "port_of",
    "port_processor",
    "port_table",
    "run_port",
]
