"""All uses of undocumented or private names of other libraries.

`NAMES` lists them, each with its purpose and its substitute in releases that lack it. Private methods that a subclass
has to override are overridden once, here or in `compat_hooks`, and call a method with a public name. Private attributes
are read and set by functions. `problem_with` checks a name in the installed release. The tests check every name, so
that they report the one that a new release has moved.

All other modules use only what transformers, PEFT, accelerate, huggingface_hub, datasets and torch document. ruff's
banned-API rule and `tests/zoo/test_compat.py` enforce this.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel


class CompatibilityError(ImportError):
    """The installed release of a library lacks something that this package needs."""


# ---------------------------------------------------------------------- releases


# First untested release of each library; setup.cfg excludes untested releases of transformers
UNTESTED = {
    "transformers": "5.25",
    "torch": "2.16",
    "peft": "0.22",
    "accelerate": "2",
    "huggingface_hub": "3",
    "datasets": "6",
}


def version_of(library: str) -> Version | None:
    """The installed release of a library; `None` if it is not installed."""
    try:
        return Version(metadata.version(library))
    except metadata.PackageNotFoundError:
        return None


def warn_of_untested() -> None:
    """Log a warning if a library is newer than the tested releases."""
    found = {library: version_of(library) for library in UNTESTED}
    newer = {
        library: version for library, version in found.items() if version and version >= Version(UNTESTED[library])
    }
    if newer:
        here = ", ".join(f"{library} {version}" for library, version in newer.items())
        tested = " ".join(f'"{library}<{UNTESTED[library]}"' for library in newer)
        logging.getLogger(__name__).warning(
            f"vlbridge has not been tested with {here}. If something fails: pip install {tested}"
        )


# ---------------------------------------------------------------------- names


@dataclass(frozen=True)
class Name:
    """A name that its library may move or remove without notice.

    Args:
        path: Module and attributes, joined by dots.
        why: What the name is used for.
        takes: Parameters that the function or method must accept.
        since: First release of its library that has it, if that is newer than the oldest supported one.
        instead: Substitute in earlier releases.
        set_by: For attributes of instances, the method of the class that sets it.
    """

    path: str
    why: str
    takes: tuple[str, ...] = ()
    since: str | None = None
    instead: str = ""
    set_by: str = ""

    @property
    def library(self) -> str:
        """Name of the library."""
        return self.path.partition(".")[0]

    @property
    def short(self) -> str:
        """The last component of `path`."""
        return self.path.rpartition(".")[2]

    @property
    def expected(self) -> bool:
        """Whether the installed release should have the name; false if its library is not installed."""
        version = version_of(self.library)
        return version is not None and (self.since is None or version >= Version(self.since))


CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # newest first

# Names that other modules import from here
IMPORTED = (
    Name("transformers.activations.ACT2FN", "the Q-Former's activation function by name"),
    Name("transformers.conversion_mapping.get_model_conversion_mapping", "names in older checkpoints", ("model",)),
    Name("transformers.convert_slow_tokenizer.bytes_to_unicode", "byte-level vocabularies, for transplants"),
    Name("transformers.core_model_loading.WeightRenaming", "names in older checkpoints"),
    Name("transformers.image_transforms.to_pil_image", "pictures before they are cut into tiles", ("image",)),
    Name("transformers.image_utils.get_image_size", "height and width of any kind of picture", ("image",)),
    Name("transformers.image_utils.make_flat_list_of_images", "pictures in nested lists", ("images",)),
    Name("transformers.initialization", "initialisation that skips loaded weights"),
    Name("transformers.integrations.is_deepspeed_zero3_enabled", "ZeRO-3 shards parts while loading them"),
    Name("transformers.integrations.set_hf_deepspeed_config", "ZeRO-3: building the model unsharded"),
    Name("transformers.integrations.unset_hf_deepspeed_config", "ZeRO-3: building the model unsharded"),
    Name("transformers.loss.loss_utils.ForCausalLMLoss", "whether a model's loss is the usual one"),
    Name("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", "the Q-Former's attention implementations"),
    Name("transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "transformers serve"),
    Name("transformers.models.auto.modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "transformers serve"),
    Name("transformers.models.auto.processing_auto.PROCESSOR_MAPPING", "a configuration's processor"),
    Name("transformers.processing_utils.MultiModalData", "numbers of visual tokens, for inference servers"),
    Name("transformers.trainer.SCHEDULER_NAME", "the scheduler's file in a checkpoint"),
    Name("transformers.utils.SAFE_WEIGHTS_INDEX_NAME", "the index of a checkpoint's weights"),
    Name("transformers.utils.SAFE_WEIGHTS_NAME", "a checkpoint's weights"),
    Name("transformers.utils.cached_file", "one file of a Hub repository or folder", ("path_or_repo_id", "filename")),
    Name("transformers.utils.torch_compilable_check", "checks of values on the device", ("cond", "msg")),
    Name("transformers.utils.chat_template_utils.render_jinja_template", "conversations without a tokenizer",
         ("conversations", "chat_template")),
    Name("transformers.utils.generic.can_return_tuple", "return_dict=False", ("func",)),
    Name("transformers.utils.generic.is_flash_attention_requested", "the Q-Former's masks", ("config",)),
    Name("transformers.utils.generic.merge_with_config_defaults", "MPT: use_cache and others from the configuration",
         ("func",)),
    Name("transformers.utils.output_capturing.capture_outputs", "MPT: hidden states and attention weights", ("func",)),
    Name("accelerate.data_loader.DataLoaderShard", "streams, which shard themselves over processes",
         ("dataset", "device")),
    Name("accelerate.utils.get_balanced_memory", "device_map='balanced' for a model in memory",
         ("model", "max_memory", "no_split_module_classes", "low_zero")),
    Name("accelerate.utils.save_fsdp_optimizer", "FSDP2: the optimizer's state without the frozen parts",
         ("fsdp_plugin", "accelerator", "optimizer", "model", "output_dir")),
)  # fmt: skip

# Names that only this module and `compat_hooks` use: overridden, or read and set by functions
USED = (
    Name("transformers.GenerationMixin.prepare_inputs_for_generation", "the name of the cache (`CACHE`)"),
    Name("transformers.GenerationMixin._get_logits_processor", "guidance that knows images and beams",
         ("logits_processor",)),
    Name("transformers.GenerationMixin._get_candidate_generator", "prompt lookup in prompts with placeholders",
         ("assistant_model", "logits_processor")),
    Name("transformers.GenerationMixin._prepare_model_inputs", "encoder-decoder assistants",
         ("inputs", "bos_token_id", "model_kwargs")),
    Name("transformers.GenerationMixin._maybe_prepare_encoder_kwargs_for_generation",
         "encoder-decoder assistants; output_hidden_states", ("inputs_tensor", "model_kwargs"), since="5.18",
         instead="_prepare_encoder_decoder_kwargs_for_generation, which leaves output_hidden_states alone"),
    Name("transformers.generation.PromptLookupCandidateGenerator.vocab_size", "prompt lookup", set_by="__init__"),
    Name("transformers.masking_utils.create_causal_mask", "MPT's causal mask",
         ("config", "inputs_embeds", "attention_mask", "position_ids")),
    Name("transformers.masking_utils.create_masks_for_generate", "masks of a static cache", ("config",)),
    Name("transformers.PreTrainedModel._can_set_attn_implementation", "attention is set on the parts"),
    Name("transformers.PreTrainedModel._set_gradient_checkpointing",
         "frozen layers recompute too; the public names changed in 5.23", ("self",)),
    Name("transformers.PreTrainedModel._from_config", "a model without weights", ("config",)),
    Name("transformers.PreTrainedModel._init_weights", "initial weights of bridges", ("module",)),
    Name("transformers.PreTrainedModel._tied_weights_keys", "declared by models: tied weights"),
    Name("transformers.PreTrainedModel._no_split_modules", "declared by models: layers that stay on one device"),
    Name("transformers.PreTrainedModel._skip_keys_device_placement", "declared by models: caches are not moved"),
    Name("transformers.PreTrainedModel._can_compile_fullgraph", "declared by models: generate() may compile"),
    Name("transformers.PreTrainedModel._keep_in_fp32_modules", "the bridge is not quantised, by any quantiser"),
    Name("transformers.PreTrainedModel._can_record_outputs", "declared by models: what capture_outputs records"),
    Name("transformers.PreTrainedModel._input_embed_layer", "declared by MPT: its input embeddings"),
    Name("transformers.PreTrainedModel._supports_sdpa", "declared by models"),
    Name("transformers.PreTrainedModel._supports_flash_attn", "declared by models"),
    Name("transformers.PreTrainedModel._supports_flex_attn", "declared by models"),
    Name("transformers.PreTrainedModel._supports_attention_backend", "declared by models"),
    Name("transformers.PreTrainedModel.all_tied_weights_keys", "weights that are not saved", set_by="post_init"),
    Name("transformers.PreTrainedConfig._attn_implementation", "a part's attention implementation"),
    Name("transformers.PreTrainedConfig._name_or_path", "local paths in saved configurations", set_by="__post_init__"),
    Name("transformers.ProcessorMixin._process_images", "images that are padded or cut into tiles", ("self", "images")),
    Name("transformers.ProcessorMixin.get_text_with_replacements", "placeholders in the text",
         ("self", "text", "images_replacements")),
    Name("transformers.ProcessorMixin.replace_image_token", "placeholders of one image", ("self", "image_idx")),
    Name("transformers.GgufConfig", "dequantised GGUF weights", ("dequantize",), since="5.17",
         instead="nothing: earlier releases always dequantise"),
    Name("transformers.integrations.peft.MIN_PEFT_VERSION", "a clear error if PEFT is too old for load_adapter"),
    Name("transformers.PreTrainedModel._hf_peft_config_loaded", "whether a model carries adapters"),
    Name("transformers.utils.output_capturing.maybe_install_capturing_hooks",
         "hooks that capture attention weights are removed after an inspection", ("model",)),
    Name("transformers.utils.output_capturing.selected_hidden_states", "only the wanted hidden states are kept",
         ("output_hidden_states",), since="5.23", instead="nothing: earlier releases keep all of them"),
    Name("torch.nn.Module._forward_hooks", "the same", set_by="register_forward_hook"),
    Name("transformers.utils.hub.resolve_revision", "all files from one commit",
         ("path_or_repo_id", "revision", "token", "local_files_only", "cache_dir"), since="5.18",
         instead="huggingface_hub's model_info"),
    Name("transformers.PreTrainedTokenizerFast._tokenizer", "tokenizers without some added tokens", set_by="__init__"),
    Name("transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
         "whether Trainer shifts the labels that it smooths: it looks up a model's `_get_name()` there"),
    Name("transformers.Trainer._save_checkpoint",
         "a full disk is survived, and older checkpoints stay until the new one is complete: no callback sees errors "
         "of saving, or runs before older checkpoints are deleted", ("self", "model", "trial")),
    Name("transformers.Trainer._save_optimizer_and_scheduler",
         "FSDP2: without the frozen parts, which transformers always writes too", ("self", "output_dir")),
    Name("transformers.Trainer._load_from_checkpoint",
         "FSDP2: looks for files with the frozen parts; otherwise a warning names every frozen tensor",
         ("self", "resume_from_checkpoint", "model")),
    Name("transformers.Trainer._load_best_model", "the same, of the best checkpoint", ("self",)),
    Name("datasets.IterableDataset._resolve_features", "columns of a stream that does not declare them"),
    Name("torch._subclasses.fake_tensor.FakeTensorMode", "reading a checkpoint's layout without its weights"),
    Name("torch.nn.Module._get_name", "the name that Trainer looks up when it smooths labels", ("self",)),
    Name("torch.nn.Module._apply", "inactive bridges move with the model", ("self", "fn", "recurse")),
    Name("torch.utils.data._utils.worker._worker_info", "streams shard themselves over a loader's workers"),
)  # fmt: skip

NAMES = (*IMPORTED, *USED)
_MISSING = object()


def find(path: str) -> Any:
    """Look up a dotted path, such as `transformers.Trainer._save`; `_MISSING` if it does not exist."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            look = inspect.getattr_static if inspect.isclass(found) else getattr
            found = look(found, part, _MISSING)
            if found is _MISSING:
                return _MISSING
        return found
    return _MISSING


def problem_with(name: Name) -> str | None:
    """Describe what is wrong with a name in the installed release; `None` if nothing is.

    Args:
        name: One of `NAMES`.
    """
    where = f"{name.path} ({name.library} {version_of(name.library)}; used for: {name.why})"
    if not name.expected:
        return None if name.instead or version_of(name.library) is None else f"{where} has no substitute"
    if name.set_by:
        owner, _, attribute = name.path.rpartition(".")
        setter = find(f"{owner}.{name.set_by}")
        if setter is _MISSING or f"self.{attribute}" not in inspect.getsource(inspect.unwrap(setter)):
            return f"{where} is no longer set by {owner}.{name.set_by}"
        return None
    found = find(name.path)
    if found is _MISSING:
        return f"{where} is gone"
    if name.takes:
        found = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
        parameters = inspect.signature(found).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        lost = [parameter for parameter in name.takes if parameter not in parameters]
        if lost and not anything:
            return f"{where} no longer takes {', '.join(lost)}; it takes {', '.join(parameters)}"
    return None


def __getattr__(short: str) -> Any:
    """Look up a name of `IMPORTED` when it is first used: most are needed for training or conversion only."""
    for name in IMPORTED:
        if name.short == short:
            found = find(name.path)
            if found is _MISSING:
                raise CompatibilityError(
                    f"{problem_with(name) or name.path}. Install a release that this package was tested with: pip "
                    f'install "{name.library}<{UNTESTED.get(name.library, version_of(name.library))}"'
                )
            globals()[short] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {short!r}")


# ---------------------------------------------------------------------- the cache, renamed in transformers 5.24


def _cache_name(parameters: Iterable[str]) -> str | None:
    for name in CACHE_NAMES:  # a loop, because every supported torch.compile can trace it
        if name in parameters:
            return name
    return None


# Name of the cache in this release's generate() and outputs
CACHE = _cache_name(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters) or CACHE_NAMES[0]


def cache_argument(cache: Any, parameters: Iterable[str] = (CACHE,)) -> dict[str, Any]:
    """The cache as a keyword argument of a function, or as a field of an output.

    Args:
        cache: The cache, or `None`.
        parameters: Names of the function's parameters: remote code may know only an older name of the cache.
    """
    return {_cache_name(parameters) or CACHE: cache}


def cache_of(outputs: Any) -> Any:
    """The cache in a model's output; `None` if it was not requested.

    Raises:
        CompatibilityError: The output has no field for a cache; decoding without it would be slow or wrong.
    """
    for name in (CACHE, *CACHE_NAMES):
        if hasattr(outputs, name):
            return getattr(outputs, name)
    raise CompatibilityError(
        f"{type(outputs).__name__} has no cache: none of {', '.join(CACHE_NAMES)} is a field of it in transformers "
        f"{version_of('transformers')}. Use a release below {UNTESTED['transformers']}."
    )


def field_of(outputs: Any, name: str, wanted: bool = True) -> Any:
    """A field of a model's output; `None` if it was not requested.

    Args:
        outputs: The output.
        name: Name of the field.
        wanted: Whether the field was requested, so that it is an error if the output does not have it.

    Raises:
        CompatibilityError: The field was requested, and the output does not have it.
    """
    if hasattr(outputs, name):
        return getattr(outputs, name)
    if wanted:
        raise CompatibilityError(
            f"{type(outputs).__name__} has no {name}: it has {', '.join(outputs.keys())} in transformers "
            f"{version_of('transformers')}."
        )
    return None


def accepts_cache(function: Callable) -> Callable:
    """Let a function with a parameter `cache` accept `past_key_values` too, in every release of transformers.

    The function's signature has the name that this release's `generate` looks for.

    Args:
        function: The function. The result raises a `ValueError` if it is called with both names.
    """

    @functools.wraps(function)
    def with_either_name(*args, **kwargs):
        for old in CACHE_NAMES[1:]:
            given = kwargs.pop(old, None)
            if given is not None:
                if kwargs.get("cache") is not None:
                    raise ValueError(f"Give cache or {old}, not both: they are one thing under two names.")
                kwargs["cache"] = given
                if CACHE == "cache" and not torch.compiler.is_compiling():
                    warnings.warn(f"`{old}` is deprecated, as in transformers. Use `cache` instead.", FutureWarning, 2)
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    with_either_name.__signature__ = signature.replace(
        parameters=[
            parameter.replace(name=CACHE) if parameter.name == "cache" else parameter
            for parameter in signature.parameters.values()
        ]
    )
    return with_either_name


# Before transformers 5.18, beam search reads the width of the logits from the language model's configuration
BEAMS_READ_VOCAB_SIZE = version_of("transformers") < Version("5.18")
_beams = threading.local()


@contextmanager
def logits_of_width(width: int | None) -> Iterator[None]:
    """Set the number of columns of the logits for beam search in this thread, see `as_wide_as_logits`.

    Args:
        width: Number of columns; `None` leaves the configuration as it is.
    """
    before = getattr(_beams, "width", None)
    _beams.width = width if BEAMS_READ_VOCAB_SIZE else None
    try:
        yield
    finally:
        _beams.width = before


def as_wide_as_logits(text_config: PreTrainedConfig) -> PreTrainedConfig:
    """A language model's configuration; inside `logits_of_width` a copy with the logits' width as `vocab_size`."""
    width = getattr(_beams, "width", None)
    if width is None or getattr(text_config, "vocab_size", None) == width:
        return text_config
    text_config = copy.copy(text_config)
    text_config.vocab_size = width
    return text_config


def create_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    position_ids: torch.Tensor | None,
) -> torch.Tensor | None:
    """The causal mask of transformers, which supports caches, padding and packed rows."""
    from transformers.masking_utils import create_causal_mask as create

    return create(config, inputs_embeds, attention_mask, position_ids=position_ids, **cache_argument(cache))


def masks_for_generate(model: PreTrainedModel, *args, **kwargs) -> Any:
    """The masks that `generate` creates for a language model, by its own method or transformers' common function."""
    from transformers.masking_utils import create_masks_for_generate

    return getattr(model, "create_masks_for_generate", create_masks_for_generate)(*args, **kwargs)


# ---------------------------------------------------------------------- private attributes


def attention_of(config: PreTrainedConfig) -> str | None:
    """The attention implementation of a configuration."""
    return config._attn_implementation


def set_attention(config: PreTrainedConfig, implementation: str | dict | None) -> None:
    """Set the attention implementation of a configuration; a dict sets those of its sub-configurations."""
    config._attn_implementation = implementation


def mark_initialized(model: nn.Module) -> None:
    """Keep a larger model that a model becomes part of from initialising its weights again."""
    for module in model.modules():
        module._is_hf_initialized = True


def keep_unquantized(model: PreTrainedModel, name: str) -> None:
    """Keep a module from being quantised while its model is loaded, whatever the configuration of the quantisation.

    Args:
        model: A model under construction.
        name: Name of the module. It is loaded in float32 if the model is loaded in float16.
    """
    model._keep_in_fp32_modules = {*(model._keep_in_fp32_modules or ()), name}


def layers_not_to_split(model: PreTrainedModel) -> list[str]:
    """Names of the classes of layers that must stay on one device."""
    return sorted(model._no_split_modules or ())


def arguments_that_stay(model: PreTrainedModel) -> list[str]:
    """Names of the arguments that are not moved between devices: caches."""
    return sorted(model._skip_keys_device_placement or ())


def build_from_config(model_class: type, config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model of a class with random weights, as `AutoModel.from_config` would."""
    return model_class._from_config(config)


def optional_file(source: str | os.PathLike, name: str, gated_is_missing: bool = False, **hub_kwargs) -> str | None:
    """Local path of a file of a Hub repository or folder; `None` if it has no such file.

    Args:
        source: Hub id or folder.
        name: Name of the file.
        gated_is_missing: Return `None`, instead of raising an error, if the user has no access to a gated repository.
        hub_kwargs: `revision`, `token`, `cache_dir` and other arguments of `cached_file`.
    """
    from transformers.utils import cached_file

    gated = {"_raise_exceptions_for_gated_repo": False} if gated_is_missing else {}
    return cached_file(source, name, **hub_kwargs, **gated, _raise_exceptions_for_missing_entries=False)


def resolve_revision(source: str | os.PathLike | None, revision: str | None = None, **hub_kwargs) -> str | None:
    """The commit that a revision points to, so that all files of a model come from one commit.

    Args:
        source: Hub id or folder.
        revision: Branch, tag or commit; `None` for the main branch.
        hub_kwargs: `token`, `local_files_only`, `cache_dir`.

    Returns:
        The commit, or `revision` if it can't be resolved.
    """
    resolve = find("transformers.utils.hub.resolve_revision")
    if resolve is not _MISSING:
        return resolve(source, revision, **hub_kwargs)
    from huggingface_hub import HfApi, is_offline_mode

    if source is None or os.path.exists(source) or hub_kwargs.get("local_files_only") or is_offline_mode():
        return revision
    try:
        return HfApi(token=hub_kwargs.get("token")).model_info(str(source), revision=revision).sha or revision
    except Exception:  # loading the files raises the error with a better message
        return revision


def replace_backend(tokenizer, backend):
    """Replace the `tokenizers.Tokenizer` of a fast tokenizer, and return the tokenizer."""
    tokenizer._tokenizer = backend
    return tokenizer


def unpack_gguf() -> dict[str, Any]:
    """Arguments of `from_pretrained` that dequantise a GGUF, even if kernels for quantised weights are installed.

    On Python 3.10 the standard library does not find the package `gguf` among the installed ones, and transformers then
    reads its version off the module, which has none: it gets one here.
    """
    import gguf

    if not hasattr(gguf, "__version__"):
        gguf.__version__ = metadata.version("gguf")
    config = find("transformers.GgufConfig")
    return {} if config is _MISSING else {"quantization_config": config(dequantize=True)}


def renamed(key: str, renamings: Iterable) -> str:
    """Apply a model's renamings (`WeightRenaming`) to a tensor's name, in order."""
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


def resolve_features(dataset):
    """Resolve the columns of a streamed data set, if they are not known."""
    return dataset._resolve_features() if dataset.features is None else dataset


def take(dataset, count: int):
    """The first `count` records of a data set, or all if there are fewer, which is an error in `datasets` 4.3."""
    return dataset.take(min(count, len(dataset)) if hasattr(dataset, "__len__") else count)


# Arguments of `TrainingArguments` that transformers 5.23 renamed: new and old name
RENAMED_ARGUMENTS = (
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)


def training_argument(name: str) -> str:
    """The name of an argument of `TrainingArguments` in this release of transformers, from its new or its old name."""
    for names in RENAMED_ARGUMENTS:
        if name in names:
            return names[0] if version_of("transformers") >= Version("5.23") else names[1]
    return name


# ---------------------------------------------------------------------- adapters


def carries_adapters(model: PreTrainedModel) -> bool:
    """Whether a model has adapters from `add_adapter` or `load_adapter`; those of a `PeftModel` do not count."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate moves a module's inputs to its device."""
    return hasattr(module, "_hf_hook")


def lacking_peft() -> str | None:
    """Explain why transformers' `add_adapter` and `load_adapter` can't work; `None` if they can."""
    wanted, found = find("transformers.integrations.peft.MIN_PEFT_VERSION"), version_of("peft")
    if found is not None and (wanted is _MISSING or found >= Version(wanted)):
        return None
    return (
        f"add_adapter and load_adapter of transformers {version_of('transformers')} need PEFT {wanted} or later; "
        + (f"{found} is installed" if found else "it is not installed")
        + ". Use PEFT's own peft.get_peft_model(model, ...) and peft.PeftModel.from_pretrained(model, ...) instead, a "
        "later PEFT, or an earlier transformers."
    )


# ---------------------------------------------------------------------- private methods


def apply_to(module: nn.Module, fn: Callable) -> None:
    """Apply a function to all tensors of a module, as `.to()`, `.half()` and `.cuda()` do."""
    module._apply(fn)
