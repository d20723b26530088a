"""Processors of the three families."""

from .processing_bridged import BridgedProcessor
from .processing_flamingo import PerceiverFlamingoProcessor
from .processing_llava import MLPLlavaProcessor
from .processing_qformer import QFormerBlip2PreTrainingProcessor, QFormerBlip2Processor


__all__ = [
    "BridgedProcessor",
    "MLPLlavaProcessor",
    "PerceiverFlamingoProcessor",
    "QFormerBlip2PreTrainingProcessor",
    "QFormerBlip2Processor",
]
