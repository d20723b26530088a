"""Overrides of private methods of transformers' models and processors. Each calls a method with a public name.

`vlbridge.compat.USED` lists the private names, which the tests check.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from packaging.version import Version
from torch import nn

from .compat import logits_of_width, version_of


# Before transformers 5.23, gradient checkpointing recomputes a layer's hooks together with the layer
HOOKS_ARE_RECOMPUTED = version_of("transformers") < Version("5.23")


# A class in transformers' table of those that predict the next token
NEXT_TOKEN_CLASS = "LlamaForCausalLM"


class NextTokenName(str):
    """Name of a class that predicts the next token. It equals `NEXT_TOKEN_CLASS` too, so that `Trainer` finds it."""

    __hash__ = str.__hash__

    def __eq__(self, other) -> bool:
        return isinstance(other, str) and (str.__eq__(self, other) or str.__eq__(other, NEXT_TOKEN_CLASS))

    def __ne__(self, other) -> bool:
        return not self == other


class ModelHooks:
    """Mixin before `PreTrainedModel` and `GenerationMixin`."""

    @property
    def predicts_next_token(self) -> bool:
        """Whether the logits of a position are those of the next one's label: not so for encoder-decoders."""
        config = getattr(self, "config", None)
        if config is None or config.is_encoder_decoder:
            return False
        if hasattr(config, "text_config"):  # `None` in classifiers and in stage 1, which have no language model
            return config.text_config is not None
        return self.can_generate()

    def _get_name(self) -> str:
        # `Trainer` shifts the labels that it smooths if this name is in its table. Names of classes in that table would
        # be too few (subclasses) and too many (encoder-decoders are of the same class), and other readers of the table
        # would take the models for models of text alone.
        name = super()._get_name()
        return NextTokenName(name) if self.predicts_next_token else name

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # set on the parts and the Q-Former; the attention of other bridges has one implementation

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        function = kwargs.get("gradient_checkpointing_func", args[1] if len(args) > 1 else None)
        self.check_checkpointing(bool(getattr(function, "keywords", {}).get("use_reentrant", False)))
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.checkpointing_changed()

    def check_checkpointing(self, reentrant: bool) -> None:
        """Check that a kind of gradient checkpointing works with this model.

        Args:
            reentrant: Whether `use_reentrant=True` was requested.

        Raises:
            ValueError: It does not work.
        """

    def checkpointing_changed(self) -> None:
        """Called after gradient checkpointing was enabled or disabled, by any of its public methods."""

    def _apply(self, fn, recurse: bool = True):
        self.apply_elsewhere(fn)  # `.to()`, `.half()`, `.cuda()`
        return super()._apply(fn, recurse)

    def apply_elsewhere(self, fn: Callable) -> None:
        """Apply a function to modules that belong to this model without being its children, see `apply_to`."""


class GenerationHooks:
    """Mixin before `GenerationMixin`."""

    def _get_logits_processor(self, *args, **kwargs):
        with logits_of_width(None):  # watermarks depend on the size of the vocabulary
            processors = super()._get_logits_processor(*args, **kwargs)
        return self.arrange_processors(processors)

    def arrange_processors(self, processors: list) -> list:
        """Change the logits processors of a call of `generate`; returns them."""
        return processors

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        # It removes every argument that `get_image_features` has too: these are for the language model.
        names = ("output_attentions", "output_hidden_states")
        wanted = {name: model_kwargs[name] for name in names if name in model_kwargs}
        prepare = super()._maybe_prepare_encoder_kwargs_for_generation
        return {**prepare(inputs_tensor, model_kwargs, *args, **kwargs), **wanted}

    def _get_candidate_generator(self, *args, **kwargs):
        return self.adapt_candidates(super()._get_candidate_generator(*args, **kwargs))

    def adapt_candidates(self, generator):
        """Change what proposes tokens for assisted decoding; returns it."""
        return generator


class AssistantHooks:
    """What transformers asks of an encoder-decoder assistant, which has its encoder's outputs already."""

    def _prepare_model_inputs(self, inputs=None, bos_token_id=None, model_kwargs=None):
        return inputs, "input_ids", model_kwargs

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        return model_kwargs

    # Its name before transformers 5.18
    _prepare_encoder_decoder_kwargs_for_generation = _maybe_prepare_encoder_kwargs_for_generation


def process_images(processor, images, **kwargs):
    """Process images as `ProcessorMixin` does: returns inputs, and the placeholders of each image."""
    return processor._process_images(images, **kwargs)


# Before transformers 5.18, masks of the assistant's turns refer to the text before images are replaced by placeholders
MASKS_COUNT_BEFORE_IMAGES = version_of("transformers") < Version("5.18")

# Its `replaced` holds the spans of the images in the conversations that this thread makes masks for
_conversation = threading.local()


def _before_images(position: int, replaced: list[dict]) -> int:
    """Position of a character in the text before images are replaced by placeholders."""
    moved = 0
    for image in replaced:
        if position < image["new_span"][0]:
            break
        if position < image["new_span"][1]:
            return image["span"][0]
        moved = image["new_span"][1] - image["span"][1]
    return position - moved


def _spans_before_images(spans: Iterable, replaced: list[dict]) -> list[tuple[int, int]]:
    """Spans of tokens in the text before images are replaced by placeholders, in ascending order, padding included."""
    found, end = [], -1
    for first, last in spans:
        if int(first) == int(last):  # padding, and special tokens around the text
            found.append((end, end))
        else:
            first, end = (_before_images(int(position), replaced) for position in (first, last))
            found.append((first, end))
    return found


class ProcessorHooks:
    """Mixin before `ProcessorMixin`."""

    def apply_chat_template(self, *args, **kwargs):
        """See `ProcessorMixin.apply_chat_template`."""
        _conversation.replaced = [] if MASKS_COUNT_BEFORE_IMAGES else None
        try:
            return super().apply_chat_template(*args, **kwargs)
        finally:
            _conversation.replaced = None

    def get_text_with_replacements(self, *args, **kwargs):
        """See `ProcessorMixin.get_text_with_replacements`."""
        text, replaced = super().get_text_with_replacements(*args, **kwargs)
        if getattr(_conversation, "replaced", None) is not None:
            _conversation.replaced = replaced
        return text, replaced

    def __call__(self, images=None, text=None, **kwargs):
        """See `ProcessorMixin.__call__`."""
        inputs = super().__call__(images=images, text=text, **kwargs)
        replaced = getattr(_conversation, "replaced", None)
        if replaced and "offset_mapping" in inputs:
            rows = zip(inputs["offset_mapping"], replaced)
            inputs["offset_mapping"] = [_spans_before_images(spans, images) for spans, images in rows]
        return inputs

    def _process_images(self, images, **kwargs):
        return self.process_images(super()._process_images, images, **kwargs)

    def process_images(self, default: Callable, images, **kwargs):
        """Process images: returns inputs and the placeholders of each image; `default` is transformers' method."""
        return default(images, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):  # called by inference servers
        return self.num_multimodal_tokens(image_sizes, **kwargs)


@contextmanager
def without_new_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the forward hooks that were added inside the `with` statement, those of transformers that capture too.

    Args:
        model: A model, whose modules are looked at.
    """
    installed = "_output_capturing_hooks_installed"  # set by transformers' `maybe_install_capturing_hooks`
    before = [(module, set(module._forward_hooks), installed in vars(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, hooks, was_installed in before:
            for number in set(module._forward_hooks) - hooks:
                del module._forward_hooks[number]
            if installed in vars(module) and not was_installed:
                delattr(module, installed)


# Since transformers 5.23, `output_hidden_states` may be a list of the layers to keep
SELECTS_HIDDEN_STATES = version_of("transformers") >= Version("5.23")


def hidden_states_to_keep(model: nn.Module, layers: int | list[int]) -> bool | list[int]:
    """The argument `output_hidden_states` that gives some hidden states, and keeps no others where that is possible.

    Args:
        model: A vision encoder.
        layers: Indices of the hidden states that are read; negative ones count from the end.
    """
    config = getattr(model, "config", None)
    records = "hidden_states" in (getattr(model, "_can_record_outputs", None) or {})
    counted = isinstance(getattr(config, "num_hidden_layers", None), int)
    if not (SELECTS_HIDDEN_STATES and records and counted) or config.output_hidden_states:
        return True
    return layers if isinstance(layers, list) else [layers]


class TrainerHooks:
    """Mixin before `Trainer`: each private method calls one with a public name, and hands it transformers' own way."""

    def _save_checkpoint(self, model, trial):
        return self.save_checkpoint(functools.partial(super()._save_checkpoint, model, trial))

    def _save_optimizer_and_scheduler(self, output_dir):
        return self.save_optimizer(functools.partial(super()._save_optimizer_and_scheduler, output_dir), output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        own = functools.partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        return self.load_trained(own, resume_from_checkpoint)

    def _load_best_model(self):
        return self.load_best(super()._load_best_model)


__all__ = [
    "AssistantHooks",
    "GenerationHooks",
    "ModelHooks",
    "ProcessorHooks",
    "TrainerHooks",
    "hidden_states_to_keep",
    "process_images",
    "without_new_hooks",
]
