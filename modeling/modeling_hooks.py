"""Hooks on a language model that several bridged models may share; they do not keep the bridged model alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn
from torch.utils.hooks import RemovableHandle


class ModelHook:
    """A hook that calls a method of a model as long as the model exists, and does nothing afterwards.

    The hook looks the method up at every call and holds a weak reference to the model. In a deep copy or a pickle of
    the whole model, the hooks call the copy.

    Args:
        model: The model.
        method: Name of the model's method.
        first: Arguments that are passed before the hook's own.
    """

    def __init__(self, model: nn.Module, method: str, *first):
        self._model, self._method, self._first = weakref.ref(model), method, first

    def __call__(self, *args):
        """Call the method, if the model still exists."""
        model = self._model()
        return None if model is None else getattr(model, self._method)(*self._first, *args)

    def __deepcopy__(self, memo: dict) -> ModelHook:
        model = self._model()
        return ModelHook(memo.get(id(model), model), self._method, *self._first) if model is not None else self

    def __getstate__(self) -> tuple:
        return self._model(), self._method, self._first

    def __setstate__(self, state: tuple) -> None:
        model, self._method, self._first = state
        self._model = weakref.ref(model if model is not None else nn.Identity())


def attach(register: Callable, model: nn.Module, method: str, *first, **options) -> RemovableHandle:
    """Register a hook that calls a model's method; the hook is removed when the model is deleted.

    Args:
        register: A module's `register_forward_hook`, `register_forward_pre_hook`, ...
        model: The model whose method is called.
        method: The method's name.
        first: Arguments that are passed before the hook's own.
        options: Keyword arguments of `register`.

    Returns:
        The handle that removes the hook earlier.
    """
    handle = register(ModelHook(model, method, *first), **options)
    weakref.finalize(model, handle.remove).atexit = False
    return handle


__all__ = ["ModelHook", "attach"]
