"""Serving: vLLM's plugin, and an OpenAI-compatible endpoint for every family on `transformers serve`."""

from .serving_plugin import refuse_for_vllm, register, vllm_problem


__all__ = ["refuse_for_vllm", "register", "vllm_problem"]
