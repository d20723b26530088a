"""Configurations of the three families."""

from .configuration_bridged import BridgedConfig, num_patches
from .configuration_classification import (
    MLPLlavaClassificationConfig,
    PerceiverFlamingoClassificationConfig,
    QFormerBlip2ClassificationConfig,
)
from .configuration_flamingo import PerceiverFlamingoConfig
from .configuration_llava import MLPLlavaConfig
from .configuration_mpt import MosaicGPTConfig
from .configuration_qformer import QFormerBlip2Config, QFormerBlip2PreTrainingConfig, QFormerConfig


__all__ = [
    "BridgedConfig",
    "MLPLlavaClassificationConfig",
    "MLPLlavaConfig",
    "MosaicGPTConfig",
    "PerceiverFlamingoClassificationConfig",
    "PerceiverFlamingoConfig",
    "QFormerBlip2ClassificationConfig",
    "QFormerBlip2Config",
    "QFormerBlip2PreTrainingConfig",
    "QFormerConfig",
    "num_patches",
]
