"""The registry of families: whatever is registered here is known to the Auto classes, to `compose` and to the tests."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoProcessor,
)

from .configuration import (
    BridgedConfig,
    MLPLlavaConfig,
    PerceiverFlamingoConfig,
    QFormerBlip2Config,
    QFormerBlip2PreTrainingConfig,
)
from .modeling import (
    BridgedModel,
    MLPLlavaForConditionalGeneration,
    PerceiverFlamingoForConditionalGeneration,
    QFormerBlip2ForConditionalGeneration,
    QFormerBlip2ForPreTraining,
)
from .processing import (
    BridgedProcessor,
    MLPLlavaProcessor,
    PerceiverFlamingoProcessor,
    QFormerBlip2PreTrainingProcessor,
    QFormerBlip2Processor,
)


@dataclass(frozen=True)
class Family:
    """One way of bridging.

    Args:
        name: What `compose(bridge=...)` calls it.
        config_class: Its configuration.
        model_class: Its generating model.
        processor_class: Its processor.
        special_tokens: Tokens that are really read or written, whose rows are trained with the bridge.
    """

    name: str
    config_class: type[BridgedConfig]
    model_class: type[BridgedModel]
    processor_class: type[BridgedProcessor]
    special_tokens: tuple[str, ...] = ()


FAMILIES = {
    family.name: family
    for family in (
        Family("mlp", MLPLlavaConfig, MLPLlavaForConditionalGeneration, MLPLlavaProcessor),
        Family("qformer", QFormerBlip2Config, QFormerBlip2ForConditionalGeneration, QFormerBlip2Processor),
        Family(
            "perceiver",
            PerceiverFlamingoConfig,
            PerceiverFlamingoForConditionalGeneration,
            PerceiverFlamingoProcessor,
            special_tokens=("<image>", "<|endofchunk|>"),
        ),
    )
}


def register() -> None:
    """Make every family known to transformers' Auto classes."""
    for family in FAMILIES.values():
        AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            auto_class.register(family.config_class, family.model_class, exist_ok=True)
        AutoProcessor.register(family.config_class, family.processor_class, exist_ok=True)
    stage1 = QFormerBlip2PreTrainingConfig
    AutoConfig.register(stage1.model_type, stage1, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForPreTraining):
        auto_class.register(stage1, QFormerBlip2ForPreTraining, exist_ok=True)
    AutoProcessor.register(stage1, QFormerBlip2PreTrainingProcessor, exist_ok=True)
