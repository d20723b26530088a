"""Private methods of transformers' models and processors that have to be overridden: each calls one with a public name.

`vlbridge.compat` lists them in `USED`, each with its tripwire.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from packaging.version import Version

from .compat import version_of


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


__all__ = ["ModelHooks", "ProcessorHooks", "process_images"]
