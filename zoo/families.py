"""The registry of families, which the Auto classes, `compose` and the tests use."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
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
        AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            auto_class.register(family.config_class, family.model_class, exist_ok=True)
        AutoProcessor.register(family.config_class, family.processor_class, exist_ok=True)
        classifier = family.classifier_class
        AutoConfig.register(classifier.config_class.model_type, classifier.config_class, exist_ok=True)
        for auto_class in (AutoModel, AutoModelForImageClassification):
            auto_class.register(classifier.config_class, classifier, exist_ok=True)
    stage1 = QFormerBlip2PreTrainingConfig
    AutoConfig.register(stage1.model_type, stage1, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForPreTraining):
        auto_class.register(stage1, QFormerBlip2ForPreTraining, exist_ok=True)
    AutoProcessor.register(stage1, QFormerBlip2PreTrainingProcessor, exist_ok=True)


def class_named(name: str) -> type[BridgedModel] | None:
    """The model class of a name in a saved configuration's `architectures`; `None` if it is unknown."""
    classes = [QFormerBlip2ForPreTraining, QFormerBlip2ForImageTextRetrieval]
    for family in FAMILIES.values():
        classes += [family.model_class, family.classifier_class]
    return {cls.__name__: cls for cls in classes}.get(name)


__all__ = ["FAMILIES", "Family", "class_named", "register"]
