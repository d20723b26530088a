"""The language model's output layer, which scores special tokens too; a hook follows it when it is replaced."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from .modeling_hooks import attach


_running = threading.local()  # its `model` runs the language model in this thread; several models may share one


@dataclass
class Unscored:
    """What an output layer was to score, and what it made of the last position.

    Args:
        hidden_states: `(batch, tokens, width)`; `None` if the layer was not called.
        logits: Of the last position, `(batch, 1, vocabulary)`.
    """

    hidden_states: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class OutputLayerMixin:
    """Runs the language model with an output layer that scores the bridge's special tokens, if there are any."""

    _hooked_head: nn.Module | None = None
    _head_hook: torch.utils.hooks.RemovableHandle | None = None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the language model's output layer."""
        self.language_model.set_output_embeddings(new_embeddings)
        self._follow_output_layer()

    def train(self, mode: bool = True) -> nn.Module:
        """Set the training mode, see `torch.nn.Module.train`."""
        self._follow_output_layer()
        return super().train(mode)

    def _follow_output_layer(self) -> None:
        """Move the hook to the output layer, which may have been resized, set or wrapped by an adapter since."""
        if self.language_model is None or self.bridge.token_rows is None:
            return
        head = self.language_model.get_output_embeddings()
        if head is self._hooked_head:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "The output layer was replaced after the model was loaded, and a compiled graph can't attach its hook: "
                "call model.eval() or model.train() before the compiled model runs."
            )
        if self._head_hook is not None:
            self._head_hook.remove()
        # `__dict__` bypasses nn.Module, which would register the layer as a second child.
        self.__dict__["_hooked_head"] = head
        self._head_hook = None if head is None else attach(head.register_forward_hook, self, "_score_special_tokens")

    def _score_special_tokens(self, head: nn.Module, args: tuple, logits: torch.Tensor) -> torch.Tensor:
        """Forward hook that adds the special tokens' logits, before the language model caps or scales its logits."""
        token_rows = self.bridge.token_rows  # read at every call: PEFT may have replaced the bridge by a copy
        if token_rows is None or getattr(_running, "model", None) is not self:
            return logits
        if head is not self._hooked_head:  # PEFT's copy of the layer has a copy of the hook
            return logits
        scores = token_rows.logits(args[0]).to(logits.dtype)
        missing = max(token_rows.token_ids) + 1 - logits.shape[-1]
        if missing > 0:
            logits = nn.functional.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)
        index = torch.tensor(token_rows.token_ids, device=logits.device)
        return logits.index_copy(-1, index, scores)

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Score hidden states that reach the output layer, with the special tokens' rows.

        Args:
            hidden_states: `(..., width)`.

        Returns:
            Logits `(..., vocabulary)`, before the language model caps or scales them.
        """
        before, _running.model = getattr(_running, "model", None), self
        try:
            return self.language_model.get_output_embeddings()(hidden_states)
        finally:
            _running.model = before

    @contextmanager
    def unscored(self) -> Iterator[Unscored]:
        """While this lasts, this thread's runs of the language model score the last position alone.

        Yields:
            What the output layer was to score in the last run.
        """
        self._follow_output_layer()  # its hook adds the special tokens' scores before ours sees them
        found, head = Unscored(), self.language_model.get_output_embeddings()

        def cut(layer: nn.Module, args: tuple) -> tuple | None:
            if getattr(_running, "unscored", None) is not found or not args:
                return None  # another thread runs the same language model
            found.hidden_states = args[0]
            return (args[0][:, -1:], *args[1:])

        def keep(layer: nn.Module, args: tuple, logits: torch.Tensor) -> None:
            if getattr(_running, "unscored", None) is found:
                found.logits = logits

        before, _running.unscored = getattr(_running, "unscored", None), found
        handles = [] if head is None else [head.register_forward_pre_hook(cut), head.register_forward_hook(keep)]
        try:
            yield found
        finally:
            _running.unscored = before
            for handle in handles:
                handle.remove()

    def _run_language_model(self, **kwargs) -> ModelOutput:
        self._follow_output_layer()
        before, _running.model = getattr(_running, "model", None), self
        try:
            return self.language_model(**kwargs)
        finally:
            _running.model = before


__all__ = ["OutputLayerMixin", "Unscored"]
