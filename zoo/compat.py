"""Everything of other libraries that they do not promise to keep: the only module that touches it.

Names that other modules import from here are listed in `NAMES`, each with what it is for and what takes its place in
releases that lack it. Private methods that a subclass has to override are overridden here, once, and call a method with a
public name. Private attributes are read and set by functions. `problem_with` says what is wrong with a name in the installed
release; the tests ask it for every name, so that a release that moves one fails there, by name.

Everything else uses what transformers, PEFT, accelerate, huggingface_hub, datasets and torch document; ruff's banned-API
rule and `tests/zoo/test_compat.py` hold that line.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
import mmap
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
from transformers import GenerationMixin


class CompatibilityError(ImportError):
    """The installed release of a library lacks something that this package needs."""


# ---------------------------------------------------------------------- releases


# First releases that the tests have not passed on; setup.cfg admits transformers below its own
UNTESTED = {
    "transformers": "5.25",
    "torch": "2.16",
    "peft": "0.22",
    "accelerate": "2",
    "huggingface_hub": "3",
    "datasets": "6",
}


def version_of(library: str) -> Version | None:
    """The installed release of a library; `None` where it is not installed."""
    try:
        return Version(metadata.version(library))
    except metadata.PackageNotFoundError:
        return None


def warn_of_untested() -> None:
    """Log one line if a library is newer than the tests have seen."""
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
    """A name that its library does not promise to keep.

    Args:
        path: Where it is: module and attributes, joined by dots.
        why: What it is used for here.
        takes: Parameters that it must have, where it is called or overridden.
        since: First release of its library that has it, where that is newer than the oldest supported.
        instead: What takes its place before that.
        set_by: For attributes of instances: the method of the class that sets it.
    """

    path: str
    why: str
    takes: tuple[str, ...] = ()
    since: str | None = None
    instead: str = ""
    set_by: str = ""

    @property
    def library(self) -> str:
        return self.path.partition(".")[0]

    @property
    def short(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def expected(self) -> bool:
        """Whether the installed release should have it; not where its library is not installed."""
        version = version_of(self.library)
        return version is not None and (self.since is None or version >= Version(self.since))


CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # newest first

# Names that other modules import from here
IMPORTED = (
    Name("transformers.activations.ACT2FN", "the Q-Former's activation function, by its name"),
    Name("transformers.conversion_mapping.get_model_conversion_mapping", "names in older checkpoints", ("model",)),
    Name("transformers.convert_slow_tokenizer.bytes_to_unicode", "vocabularies on bytes, for transplants"),
    Name("transformers.core_model_loading.WeightRenaming", "names in older checkpoints"),
    Name("transformers.image_transforms.to_pil_image", "pictures before they are cut into tiles", ("image",)),
    Name("transformers.image_utils.get_image_size", "height and width of any kind of picture", ("image",)),
    Name("transformers.image_utils.make_flat_list_of_images", "pictures in nested lists", ("images",)),
    Name("transformers.initialization", "weights that are drawn only where none were loaded"),
    Name("transformers.integrations.is_deepspeed_zero3_enabled", "ZeRO-3 loads parts empty"),
    Name("transformers.integrations.set_hf_deepspeed_config", "ZeRO-3: building the model whole"),
    Name("transformers.integrations.unset_hf_deepspeed_config", "ZeRO-3: building the model whole"),
    Name("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", "the Q-Former's attention implementations"),
    Name("transformers.models.auto.processing_auto.PROCESSOR_MAPPING", "a configuration's processor"),
    Name("transformers.processing_utils.MultiModalData", "the answer to servers that count visual tokens"),
    Name("transformers.trainer.SCHEDULER_NAME", "the scheduler's file in a checkpoint"),
    Name("transformers.utils.SAFE_WEIGHTS_INDEX_NAME", "the index of a checkpoint's weights"),
    Name("transformers.utils.SAFE_WEIGHTS_NAME", "a checkpoint's weights"),
    Name("transformers.utils.cached_file", "one file of a Hub repository or folder", ("path_or_repo_id", "filename")),
    Name("transformers.utils.torch_compilable_check", "checks of numbers that live on the device", ("cond", "msg")),
    Name("transformers.utils.chat_template_utils.render_jinja_template", "conversations without a tokenizer",
         ("conversations", "chat_template")),
    Name("transformers.utils.generic.can_return_tuple", "return_dict=False", ("func",)),
    Name("transformers.utils.generic.is_flash_attention_requested", "the Q-Former's masks", ("config",)),
    Name("transformers.utils.generic.merge_with_config_defaults", "MPT: use_cache and the like from the configuration",
         ("func",)),
    Name("transformers.utils.output_capturing.capture_outputs", "MPT: hidden states and attention weights", ("func",)),
    Name("accelerate.data_loader.DataLoaderShard", "streams, which share themselves out among processes",
         ("dataset", "device")),
    Name("accelerate.utils.get_balanced_memory", "device_map='balanced' for a model in memory",
         ("model", "max_memory", "no_split_module_classes", "low_zero")),
    Name("accelerate.utils.save_fsdp_optimizer", "FSDP2: the optimizer's state without the frozen parts",
         ("fsdp_plugin", "accelerator", "optimizer", "model", "output_dir")),
)  # fmt: skip

# Names that only this module uses: overridden below, or read and set by functions below
USED = (
    Name("transformers.GenerationMixin.prepare_inputs_for_generation", "how the cache is called (`CACHE`)"),
    Name("transformers.masking_utils.create_causal_mask", "MPT's causal mask",
         ("config", "inputs_embeds", "attention_mask", "position_ids")),
    Name("transformers.masking_utils.create_masks_for_generate", "masks of a static cache", ("config",)),
    Name("transformers.GenerationMixin._update_finished_beams", "stage 1's captions: beams as transformers 4.26 ranks them",
         ("self", "topk_running_sequences", "topk_log_probs", "cur_len", "length_penalty")),
    Name("transformers.PreTrainedModel._can_set_attn_implementation", "attention is the parts' affair"),
    Name("transformers.PreTrainedModel._set_gradient_checkpointing",
         "frozen layers recompute too; the public names changed in 5.23", ("self",)),
    Name("transformers.PreTrainedModel._from_config", "a model without weights", ("config",)),
    Name("transformers.PreTrainedModel._init_weights", "fresh weights of bridges", ("module",)),
    Name("transformers.PreTrainedModel._tied_weights_keys", "declared by models: tied tables"),
    Name("transformers.PreTrainedModel._no_split_modules", "declared by models: layers that stay on one device"),
    Name("transformers.PreTrainedModel._skip_keys_device_placement", "declared by models: caches stay where they are"),
    Name("transformers.PreTrainedModel._can_compile_fullgraph", "declared by models: generate() may compile"),
    Name("transformers.PreTrainedModel._can_record_outputs", "declared by MPT: what capture_outputs records"),
    Name("transformers.PreTrainedModel._input_embed_layer", "declared by MPT: its table of embeddings"),
    Name("transformers.PreTrainedModel._supports_sdpa", "declared by models"),
    Name("transformers.PreTrainedModel._supports_flash_attn", "declared by models"),
    Name("transformers.PreTrainedModel._supports_flex_attn", "declared by models"),
    Name("transformers.PreTrainedModel._supports_attention_backend", "declared by models"),
    Name("transformers.PreTrainedModel.all_tied_weights_keys", "tables that are in no file", set_by="post_init"),
    Name("transformers.PreTrainedConfig._attn_implementation", "a part's attention implementation"),
    Name("transformers.PreTrainedConfig._name_or_path", "what is cut out of saved configurations", set_by="__post_init__"),
    Name("transformers.ProcessorMixin._process_images", "tiles and squares", ("self", "images")),
    Name("transformers.ProcessorMixin.get_text_with_replacements", "placeholders in the text",
         ("self", "text", "images_replacements")),
    Name("transformers.ProcessorMixin.replace_image_token", "placeholders of one image", ("self", "image_idx")),
    Name("transformers.GgufConfig", "GGUF weights that are unpacked", ("dequantize",), since="5.17",
         instead="nothing: before it all are"),
    Name("transformers.integrations.peft.MIN_PEFT_VERSION", "an error in words where PEFT is too old for load_adapter"),
    Name("transformers.PreTrainedModel._hf_peft_config_loaded", "whether a model carries adapters"),
    Name("transformers.utils.hub.resolve_revision", "all files of one commit",
         ("path_or_repo_id", "revision", "token", "local_files_only", "cache_dir"), since="5.18",
         instead="huggingface_hub's model_info"),
    Name("transformers.PreTrainedTokenizerFast._tokenizer", "tokenizers without some added tokens", set_by="__init__"),
    Name("transformers.Trainer._save_checkpoint",
         "a full disk is survived, and older checkpoints stay until the new one is complete: no callback sees errors "
         "of saving, or runs before older checkpoints are deleted", ("self", "model", "trial")),
    Name("transformers.Trainer._save_optimizer_and_scheduler",
         "FSDP2: without the frozen parts, which transformers always writes too", ("self", "output_dir")),
    Name("transformers.Trainer._load_from_checkpoint",
         "FSDP2: looks for files with the frozen parts; otherwise a warning names every frozen tensor",
         ("self", "resume_from_checkpoint", "model")),
    Name("datasets.IterableDataset._resolve_features", "columns of a stream that does not declare them"),
    Name("torch._subclasses.fake_tensor.FakeTensorMode", "reading a checkpoint's layout without its weights"),
    Name("torch.nn.Module._apply", "bridges in waiting move with the model", ("self", "fn", "recurse")),
    Name("torch.utils.data._utils.worker._worker_info", "streams share themselves out among a loader's workers"),
)  # fmt: skip

NAMES = (*IMPORTED, *USED)
_MISSING = object()


def find(path: str) -> Any:
    """What is at a dotted path, such as `transformers.Trainer._save`; `_MISSING` where there is nothing."""
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
    """What is wrong with a name in the installed release; `None` if all is well.

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
    """Names of `IMPORTED`, looked up when they are asked for: most are needed for training or conversion only."""
    for name in IMPORTED:
        if name.short == short:
            found = find(name.path)
            if found is _MISSING:
                raise CompatibilityError(
                    f"{problem_with(name) or name.path}. Install a release that this package was tested with: pip install "
                    f'"{name.library}<{UNTESTED.get(name.library, version_of(name.library))}"'
                )
            globals()[short] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {short!r}")


# ---------------------------------------------------------------------- the cache, renamed in transformers 5.24


def _cache_name(parameters: Iterable[str]) -> str | None:
    for name in CACHE_NAMES:  # a loop, which every release of torch.compile can follow
        if name in parameters:
            return name
    return None


# How this release's generate() calls the cache, and its outputs
CACHE = _cache_name(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters) or CACHE_NAMES[0]


def cache_argument(cache, parameters: Iterable[str] = (CACHE,)) -> dict[str, Any]:
    """The cache as a keyword argument, or as a field of an output.

    Args:
        cache: The cache, or `None`.
        parameters: What the function takes that it is for: code from elsewhere may know an older name only.
    """
    return {_cache_name(parameters) or CACHE: cache}


def cache_of(outputs) -> Any:
    """The cache in a model's output; `None` where it was not asked for.

    Raises:
        CompatibilityError: The output has no field for one: decoding would go on without, and wrong or slow.
    """
    for name in (CACHE, *CACHE_NAMES):
        if hasattr(outputs, name):
            return getattr(outputs, name)
    raise CompatibilityError(
        f"{type(outputs).__name__} has no cache: none of {', '.join(CACHE_NAMES)} is a field of it in transformers "
        f"{version_of('transformers')}. Use a release below {UNTESTED['transformers']}."
    )


def field_of(outputs, name: str, wanted: bool = True) -> Any:
    """A field of a model's output; `None` where it was not asked for.

    Args:
        outputs: The output.
        name: Of the field.
        wanted: Whether it was asked for: an output that has no such field is an error then.

    Raises:
        CompatibilityError: It was asked for, and the output has no such field.
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
    """Let a function with a parameter `cache` be called with `past_key_values=` as well, whatever the release.

    Its signature shows the name that this release's `generate` uses, which looks it up there.

    Raises:
        ValueError: When it is called with both.
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


# Before transformers 5.18 beam search reads the width of the logits off the language model's configuration
BEAMS_READ_VOCAB_SIZE = version_of("transformers") < Version("5.18")
_beams = threading.local()


@contextmanager
def logits_of_width(width: int) -> Iterator[None]:
    """Tell beam search in this thread how many columns the logits have; see `as_wide_as_logits`."""
    before = getattr(_beams, "width", None)
    _beams.width = width if BEAMS_READ_VOCAB_SIZE else None
    try:
        yield
    finally:
        _beams.width = before


def as_wide_as_logits(text_config):
    """A language model's configuration; inside `logits_of_width` a copy that has the logits' width as `vocab_size`."""
    width = getattr(_beams, "width", None)
    if width is None or getattr(text_config, "vocab_size", None) == width:
        return text_config
    text_config = copy.copy(text_config)
    text_config.vocab_size = width
    return text_config


def create_causal_mask(config, inputs_embeds, attention_mask, cache, position_ids) -> torch.Tensor | None:
    """transformers' causal mask, which knows caches, padding and packed rows."""
    from transformers.masking_utils import create_causal_mask as create

    return create(config, inputs_embeds, attention_mask, position_ids=position_ids, **cache_argument(cache))


def masks_for_generate(model, *args, **kwargs):
    """The masks that a language model wants from `generate`, its own way or transformers' common one."""
    from transformers.masking_utils import create_masks_for_generate

    return getattr(model, "create_masks_for_generate", create_masks_for_generate)(*args, **kwargs)


# ---------------------------------------------------------------------- private attributes


def attention_of(config) -> str | None:
    """The attention implementation that a configuration has chosen."""
    return config._attn_implementation


def set_attention(config, implementation: str | dict | None) -> None:
    """Choose a configuration's attention implementation; of one with parts, a dict by part."""
    config._attn_implementation = implementation


def mark_initialized(model: nn.Module) -> None:
    """Keep a model's weights as they are when it becomes part of another, which would draw fresh ones."""
    for module in model.modules():
        module._is_hf_initialized = True


def layers_not_to_split(model) -> list[str]:
    """Names of the classes of layers that have to stay on one device."""
    return sorted(model._no_split_modules or ())


def arguments_that_stay(model) -> list[str]:
    """Names of arguments that are not moved between devices with everything else: caches."""
    return sorted(model._skip_keys_device_placement or ())


def build_from_config(model_class: type, config) -> nn.Module:
    """A model of a class, with fresh weights, as `AutoModel.from_config` would build it."""
    return model_class._from_config(config)


def optional_file(source, name: str, gated_is_missing: bool = False, **hub_kwargs) -> str | None:
    """Local path of a file of a Hub repository or folder; `None` where it has no such file.

    Args:
        source: Hub id or folder.
        name: Of the file.
        gated_is_missing: `None` also where the repository does not let this user in, instead of an error.
        hub_kwargs: `revision`, `token`, `cache_dir` and the like.
    """
    from transformers.utils import cached_file

    gated = {"_raise_exceptions_for_gated_repo": False} if gated_is_missing else {}
    return cached_file(source, name, **hub_kwargs, **gated, _raise_exceptions_for_missing_entries=False)


def resolve_revision(source, revision: str | None = None, **hub_kwargs) -> str | None:
    """The commit that a revision means now, so that all files of a model are of one commit.

    Args:
        source: Hub id or folder.
        revision: Branch, tag or commit; `None` for the main branch.
        hub_kwargs: `token`, `local_files_only`, `cache_dir`.

    Returns:
        The commit; `revision` where it can't be found out.
    """
    resolve = find("transformers.utils.hub.resolve_revision")
    if resolve is not _MISSING:
        return resolve(source, revision, **hub_kwargs)
    import os

    from huggingface_hub import HfApi, is_offline_mode

    if source is None or os.path.exists(source) or hub_kwargs.get("local_files_only") or is_offline_mode():
        return revision
    try:
        return HfApi(token=hub_kwargs.get("token")).model_info(str(source), revision=revision).sha or revision
    except Exception:  # what can't be asked now is asked again, and answered in words, by what loads the files
        return revision


def replace_backend(tokenizer, backend):
    """A fast tokenizer on another `tokenizers.Tokenizer`; the same object."""
    tokenizer._tokenizer = backend
    return tokenizer


def unpack_gguf() -> dict[str, Any]:
    """Arguments of `from_pretrained` that have a GGUF's weights unpacked, also where kernels for packed ones are installed."""
    config = find("transformers.GgufConfig")
    return {} if config is _MISSING else {"quantization_config": config(dequantize=True)}


# From torch 2.7 on, a storage that is loaded without its bytes knows where they begin in the file
_PLACES_ARE_KNOWN = version_of("torch") >= Version("2.7")


def load_without_weights(file) -> Any:
    """What a file of `torch.save` (of the zip format) holds, its tensors without their bytes.

    Args:
        file: Its path.

    Raises:
        Exception: As `torch.load(weights_only=True)`.
    """
    if _PLACES_ARE_KNOWN:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def places_in_file(tensors: Iterable[torch.Tensor], sizes: dict[int, int]) -> list[int | None]:
    """First byte, in their file, of tensors that `load_without_weights` gave; `None` where it can't be told.

    Args:
        tensors: All of one file.
        sizes: The file's records: bytes by first byte.
    """
    storages = [tensor.untyped_storage() for tensor in tensors]
    if _PLACES_ARE_KNOWN:
        return [getattr(storage, "_checkpoint_offset", None) for storage in storages]
    # The file is mapped into memory from a page's beginning on: the one page from which every storage is where a record is.
    begins, bases = {}, None
    for start, size in sizes.items():
        begins.setdefault(size, []).append(start)
    for storage in storages:
        if storage.nbytes():
            found = {storage.data_ptr() - start for start in begins.get(storage.nbytes(), ())}
            bases = {base for base in found if base % mmap.PAGESIZE == 0} if bases is None else bases & found
    base = next(iter(bases)) if bases is not None and len(bases) == 1 else None
    empty = begins.get(0, [None])[0]
    return [
        (None if base is None else storage.data_ptr() - base) if storage.nbytes() else empty for storage in storages
    ]


def renamed(key: str, renamings: Iterable) -> str:
    """A tensor's name after a model's renamings (`WeightRenaming`), one after the other."""
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


def resolve_features(dataset):
    """A streamed data set that knows its columns."""
    return dataset._resolve_features() if dataset.features is None else dataset


@functools.cache
def load_to_numbered_cpus() -> None:
    """Let `torch.load` put tensors on `cpu:0`, as a process of several on CPUs calls its device; torch 2.6 refuses to."""
    if version_of("torch") < Version("2.7"):
        torch.serialization.register_package(
            99, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
        )


def take(dataset, count: int):
    """The first records of a data set, all of them where there are fewer; `datasets` 4.3 refuses to take more than there are."""
    return dataset.take(min(count, len(dataset)) if hasattr(dataset, "__len__") else count)


# Arguments of `TrainingArguments` that transformers 5.23 renamed: their name since, and before
RENAMED_ARGUMENTS = (
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)


def training_argument(name: str) -> str:
    """How this release of transformers calls an argument of `TrainingArguments`, given by its new or its old name."""
    for names in RENAMED_ARGUMENTS:
        if name in names:
            return names[0] if version_of("transformers") >= Version("5.23") else names[1]
    return name


def forget_loader_workers() -> None:
    """Have `datasets` believe that this worker of a loader is the only one: the stream shares itself out already."""
    torch.utils.data._utils.worker._worker_info = None


# ---------------------------------------------------------------------- adapters


def carries_adapters(model) -> bool:
    """Whether `add_adapter` or `load_adapter` gave a model adapters; those of a `PeftModel` are not meant."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate brings a module's inputs to its device."""
    return hasattr(module, "_hf_hook")


def lacking_peft() -> str | None:
    """What transformers' `add_adapter` and `load_adapter` lack, in words; `None` where they work."""
    wanted, found = find("transformers.integrations.peft.MIN_PEFT_VERSION"), version_of("peft")
    if found is not None and (wanted is _MISSING or found >= Version(wanted)):
        return None
    return (
        f"add_adapter and load_adapter of transformers {version_of('transformers')} need PEFT {wanted} or later; "
        + (f"{found} is installed" if found else "it is not installed")
        + ". Use PEFT's own peft.get_peft_model(model, ...) and peft.PeftModel.from_pretrained(model, ...) instead, a later "
        "PEFT, or an earlier transformers."
    )


# ---------------------------------------------------------------------- private methods that have to be overridden


def apply_to(module: nn.Module, fn: Callable) -> None:
    """Do to all tensors of a module what `.to()`, `.half()` or `.cuda()` do to another's."""
    module._apply(fn)


# Before transformers 5.23 hooks of checkpointed layers are recomputed with them
HOOKS_ARE_RECOMPUTED = version_of("transformers") < Version("5.23")


class ModelHooks:
    """Mixin before `PreTrainedModel` and `GenerationMixin`."""

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # it is the parts' to set, the Q-Former's too; other bridges' attention has one implementation

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        function = kwargs.get("gradient_checkpointing_func", args[1] if len(args) > 1 else None)
        self.check_checkpointing(bool(getattr(function, "keywords", {}).get("use_reentrant", False)))
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.checkpointing_changed()

    def check_checkpointing(self, reentrant: bool) -> None:
        """Refuse a way of gradient checkpointing that does not work.

        Raises:
            ValueError: It does not.
        """

    def checkpointing_changed(self) -> None:
        """Called when gradient checkpointing was switched on or off, by whichever of its public names."""

    def _apply(self, fn, recurse: bool = True):
        self.apply_elsewhere(fn)  # `.to()`, `.half()`, `.cuda()`
        return super()._apply(fn, recurse)

    def apply_elsewhere(self, fn: Callable) -> None:
        """Do to modules that belong to this one, but are not in it, what is done to it: see `apply_to`."""


class BeamHooks:
    """Mixin before `GenerationMixin`: how beams that end are ranked."""

    def _update_finished_beams(self, *, topk_running_sequences, topk_log_probs, cur_len, length_penalty, **kwargs):
        return super()._update_finished_beams(
            topk_running_sequences=topk_running_sequences,
            topk_log_probs=self.scores_of_ended_beams(topk_running_sequences, topk_log_probs, cur_len, length_penalty),
            cur_len=cur_len,
            length_penalty=length_penalty,
            **kwargs,
        )

    def scores_of_ended_beams(self, sequences, log_probs, length: int, length_penalty: float) -> torch.Tensor:
        """Sums of log-probabilities of beams that may end now, `(batch, beams)`, before they are divided by length."""
        return log_probs


def process_images(processor, images, **kwargs):
    """What transformers' `ProcessorMixin` makes of images: inputs, and the placeholders of each."""
    return processor._process_images(images, **kwargs)


# Before transformers 5.18 masks on the assistant's words are counted in the text before images became placeholders
MASKS_COUNT_BEFORE_IMAGES = version_of("transformers") < Version("5.18")
_conversation = (
    threading.local()
)  # `replaced`: where images stand in the conversations that this thread makes masks for


def _before_images(position: int, replaced: list[dict]) -> int:
    """Where a character of a text stood before images became placeholders."""
    moved = 0
    for image in replaced:
        if position < image["new_span"][0]:
            break
        if position < image["new_span"][1]:
            return image["span"][0]
        moved = image["new_span"][1] - image["span"][1]
    return position - moved


def _spans_before_images(spans: Iterable, replaced: list[dict]) -> list[tuple[int, int]]:
    """Tokens' places in a text before images became placeholders, rising from left to right: padding is beyond its ends."""
    found, end = [], -1
    for first, last in spans:
        if int(first) == int(last):  # padding, tokens that begin or end every text
            found.append((end, end))
        else:
            first, end = (_before_images(int(position), replaced) for position in (first, last))
            found.append((first, end))
    return found


class ProcessorHooks:
    """Mixin before `ProcessorMixin`."""

    def apply_chat_template(self, *args, **kwargs):
        _conversation.replaced = [] if MASKS_COUNT_BEFORE_IMAGES else None
        try:
            return super().apply_chat_template(*args, **kwargs)
        finally:
            _conversation.replaced = None

    def get_text_with_replacements(self, *args, **kwargs):
        text, replaced = super().get_text_with_replacements(*args, **kwargs)
        if getattr(_conversation, "replaced", None) is not None:
            _conversation.replaced = replaced
        return text, replaced

    def __call__(self, images=None, text=None, **kwargs):
        inputs = super().__call__(images=images, text=text, **kwargs)
        replaced = getattr(_conversation, "replaced", None)
        if replaced and "offset_mapping" in inputs:
            rows = zip(inputs["offset_mapping"], replaced)
            inputs["offset_mapping"] = [_spans_before_images(spans, images) for spans, images in rows]
        return inputs

    def _process_images(self, images, **kwargs):
        return self.process_images(super()._process_images, images, **kwargs)

    def process_images(self, default: Callable, images, **kwargs):
        """Inputs of images and the placeholders of each; `default` is transformers' own way."""
        return default(images, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):  # servers ask for it
        return self.num_multimodal_tokens(image_sizes, **kwargs)


class TrainerHooks:
    """Mixin before `Trainer`: each private method calls one with a public name, and hands it transformers' own way."""

    def _save_checkpoint(self, model, trial):
        return self.save_checkpoint(functools.partial(super()._save_checkpoint, model, trial))

    def _save_optimizer_and_scheduler(self, output_dir):
        return self.save_optimizer(functools.partial(super()._save_optimizer_and_scheduler, output_dir), output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        own = functools.partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        return self.load_trained(own, resume_from_checkpoint)
