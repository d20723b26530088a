"""Configurations of the three families."""

from .configuration_bridged import BridgedConfig, num_patches
from .configuration_flamingo import PerceiverFlamingoConfig
from .configuration_llava import MLPLlavaConfig
from .configuration_mpt import MosaicGPTConfig
from .configuration_qformer import QFormerBlip2Config, QFormerBlip2PreTrainingConfig, QFormerConfig


__all__ = [
    "BridgedConfig",
    "MLPLlavaConfig",
    "MosaicGPTConfig",
    "PerceiverFlamingoConfig",
    "QFormerBlip2Config",
    "QFormerBlip2PreTrainingConfig",
    "QFormerConfig",
    "num_patches",
]
