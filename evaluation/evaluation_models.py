"""What is evaluated: a bridged model of any kind, with its processor, its family and its pins."""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import dataclass
from importlib import metadata
from types import MethodType
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoProcessor, PreTrainedModel

from ..configuration.configuration_classification import ClassificationConfigMixin
from ..configuration.configuration_qformer import QFormerBlip2PreTrainingConfig
from ..families import FAMILIES
from ..inference import bridged_config, device_and_dtype, load, model_source
from ..modeling import BridgedForImageClassification, QFormerBlip2ForImageTextRetrieval
from ..modeling.modeling_pins import frozen_parts_of, tensor_digest
from ..processing import BridgedProcessor
from .evaluation_tasks import Task


PACKAGES = ("vlbridge", "torch", "transformers", "accelerate", "tokenizers", "numpy", "pillow", "pycocoevalcap")


@dataclass
class Subject:
    """A model that is evaluated.

    Args:
        model: The model, in eval mode.
        processor: Its processor; of a classifier the image processor.
        name: Folder or Hub id.
        family: Its name in `FAMILIES`; `None` for stage 1.
    """

    model: Any
    processor: Any
    name: str
    family: str | None

    @property
    def is_classifier(self) -> bool:
        """Whether it scores classes instead of generating text."""
        return isinstance(self.model, BridgedForImageClassification)

    def describe(self) -> dict:
        """What results say about it: its pins, and the hash of what was trained."""
        config = self.model.config
        pins = {}
        for part in frozen_parts_of(config):
            pin = (config.frozen_parts or {}).get(part) or {}
            pins[part] = {key: pin.get(key) for key in ("source", "revision", "sha256")}
        return {
            "name": self.name,
            "family": self.family,
            "class": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "trained_sha256": trained_sha256(self.model),
            "frozen_parts": pins,
        }


def trained_sha256(model) -> str:
    """Hash of the bridge's weights and of what else is trained with it, by names, shapes and values."""
    tensors = {f"bridge.{name}": tensor for name, tensor in model.bridge.state_dict().items()}
    others = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if others := others.union(model.config.trained_tensors or ()) - set(tensors):
        weights = model.state_dict()
        tensors |= {name: weights[name] for name in others if name in weights}
    return hashlib.sha256(b"".join(tensor_digest(name, tensors[name]) for name in sorted(tensors))).hexdigest()


def load_subject(
    model: PreTrainedModel | str | os.PathLike | None,
    processor,
    task: Task,
    device: str | torch.device | None = None,
    dtype: str | None = None,
) -> Subject:
    """Load what a task evaluates.

    Args:
        model: A loaded model, folder or Hub id; `None` takes the embedded bridge.
        processor: Of a loaded model.
        task: What it will be asked.
        device: Where to put it; `None` takes cuda if there is one, else mps, else cpu.
        dtype: One of `vlbridge.inference.DTYPES`; `None` takes float32 on the cpu and bfloat16 on other devices.

    Raises:
        ValueError: It can't do the task, a loaded model has no processor, or there is no such device or dtype.
        RuntimeError: This machine does not have the device.
        OSError: There is no such model.
    """
    if isinstance(model, PreTrainedModel):
        if processor is None:
            raise ValueError("a loaded model needs its processor: evaluate(model, processor, ...).")
        name, loaded = model.name_or_path or type(model).__name__, model.eval()
    else:
        name = model_source(model)
        loaded, processor = _load(name, task, device, dtype)
    subject = Subject(loaded, processor, name, _family_of(loaded))
    config = loaded.config
    if task.kind == "retrieval" and not isinstance(loaded, QFormerBlip2ForImageTextRetrieval):
        raise ValueError(f"{task.name} is for models of stage 1 (QFormerBlip2ForImageTextRetrieval); this is a "
                         f"{type(loaded).__name__}.")  # fmt: skip
    if subject.is_classifier and task.kind != "class":
        raise ValueError(f"{name} is a classifier, which answers no questions; it can do the task 'classification'.")
    if task.kind != "retrieval" and not subject.is_classifier and config.text_config is None:
        raise ValueError(f"{name} is a {config.model_type!r} model, which has no language model to answer with.")
    return subject


def _load(source: str, task: Task, device, dtype):
    config = bridged_config(source)
    if isinstance(config, ClassificationConfigMixin):
        cls, processors = AutoModelForImageClassification, AutoImageProcessor
    elif isinstance(config, QFormerBlip2PreTrainingConfig) and task.kind == "retrieval":
        cls, processors = QFormerBlip2ForImageTextRetrieval, AutoProcessor
    else:
        return load(source, device, dtype)
    device, dtype = device_and_dtype(None if device is None else str(device), dtype)
    return cls.from_pretrained(source, dtype=dtype).to(device).eval(), processors.from_pretrained(source)


def _family_of(model) -> str | None:
    for name, family in FAMILIES.items():
        if isinstance(model, (family.model_class, family.classifier_class)):
            return name
    return None


def in_chat_form(processor: BridgedProcessor) -> BridgedProcessor:
    """A copy of a processor whose few-shot prompts are conversations, for families whose own are none."""
    copied = copy.copy(processor)
    copied.few_shot_text = MethodType(BridgedProcessor.few_shot_text, copied)
    return copied


def versions() -> dict[str, str]:
    """Releases of the packages that figures depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


__all__ = ["Subject", "in_chat_form", "load_subject", "trained_sha256", "versions"]
