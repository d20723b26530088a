"""Models of the three families."""

from .modeling_bridge import Bridge
from .modeling_bridged import BridgedModel, BridgedOutput
from .modeling_classification import (
    BridgedForImageClassification,
    MLPLlavaForImageClassification,
    PerceiverFlamingoForImageClassification,
    QFormerBlip2ForImageClassification,
)
from .modeling_flamingo import PerceiverFlamingoForConditionalGeneration
from .modeling_llava import MLPLlavaForConditionalGeneration
from .modeling_mpt import MosaicGPTForCausalLM, MptForCausalLM
from .modeling_pins import FrozenPartError
from .modeling_qformer import QFormerBlip2ForConditionalGeneration
from .modeling_qformer_pretraining import QFormerBlip2ForPreTraining
from .modeling_qformer_retrieval import QFormerBlip2ForImageTextRetrieval


__all__ = [
    "Bridge",
    "BridgedForImageClassification",
    "BridgedModel",
    "BridgedOutput",
    "FrozenPartError",
    "MLPLlavaForConditionalGeneration",
    "MLPLlavaForImageClassification",
    "MosaicGPTForCausalLM",
    "MptForCausalLM",
    "PerceiverFlamingoForConditionalGeneration",
    "PerceiverFlamingoForImageClassification",
    "QFormerBlip2ForConditionalGeneration",
    "QFormerBlip2ForImageClassification",
    "QFormerBlip2ForImageTextRetrieval",
    "QFormerBlip2ForPreTraining",
]
