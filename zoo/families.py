"""The registry of families, which the Auto classes, `compose` and the tests use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoProcessor,
)

from .compat import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from .configuration import (
    BridgedConfig,
    MLPLlavaConfig,
    PerceiverFlamingoConfig,
    QFormerBlip2Config,
)
from .modeling import (
    BridgedForImageClassification,
    BridgedModel,
    MLPLlavaForConditionalGeneration,
    MLPLlavaForImageClassification,
    PerceiverFlamingoForConditionalGeneration,
    PerceiverFlamingoForImageClassification,
    QFormerBlip2ForConditionalGeneration,
    QFormerBlip2ForImageClassification,
    QFormerBlip2ForImageTextRetrieval,
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
    """A family of bridges.

    Args:
        name: Name of the family in `compose(bridge=...)`.
        config_class: The family's configuration.
        model_class: The family's generating model.
        processor_class: The family's processor.
        classifier_class: The family's image classifier.
    """

    name: str
    config_class: type[BridgedConfig]
    model_class: type[BridgedModel]
    processor_class: type[BridgedProcessor]
    classifier_class: type[BridgedForImageClassification]

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens that the language model reads or writes, whose rows are trained with the bridge."""
        return self.model_class.special_tokens


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "mlp",
            MLPLlavaConfig,
            MLPLlavaForConditionalGeneration,
            MLPLlavaProcessor,
            MLPLlavaForImageClassification,
        ),
        Family(
            "qformer",
            QFormerBlip2Config,
            QFormerBlip2ForConditionalGeneration,
            QFormerBlip2Processor,
            QFormerBlip2ForImageClassification,
        ),
        Family(
            "perceiver",
            PerceiverFlamingoConfig,
            PerceiverFlamingoForConditionalGeneration,
            PerceiverFlamingoProcessor,
            PerceiverFlamingoForImageClassification,
        ),
    )
}


def register() -> None:
    """Register every family with transformers' Auto classes."""
    for family in FAMILIES.values():
        _register(
            family.model_class,
            AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM,
            processor_class=family.processor_class,
        )  # fmt: skip
        # `register` keeps the classes in other tables; `transformers serve` looks in these for what takes images
        for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
            names[family.config_class.model_type] = family.model_class.__name__
        _register(family.classifier_class, AutoModel, AutoModelForImageClassification)
    _register(
        QFormerBlip2ForPreTraining,
        AutoModel, AutoModelForPreTraining,
        processor_class=QFormerBlip2PreTrainingProcessor,
    )  # fmt: skip


def _register(model_class: type[BridgedModel], *auto_classes: Any, processor_class: type | None = None) -> None:
    """Register a model, its configuration and its processor with transformers' Auto classes."""
    config_class = model_class.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in auto_classes:
        auto_class.register(config_class, model_class, exist_ok=True)
    if processor_class is not None:
        AutoProcessor.register(config_class, processor_class, exist_ok=True)


def class_named(name: str) -> type[BridgedModel] | None:
    """The model class of a name in a saved configuration's `architectures`; `None` if it is unknown."""
    classes: list[type[BridgedModel]] = [QFormerBlip2ForPreTraining, QFormerBlip2ForImageTextRetrieval]
    for family in FAMILIES.values():
        classes += [family.model_class, family.classifier_class]
    return next((cls for cls in classes if cls.__name__ == name), None)


__all__ = ["FAMILIES", "Family", "class_named", "register"]
