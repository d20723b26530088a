"""Configurations for image classification on a bridge's visual tokens: those of a family, without a language model.

`num_labels`, `id2label`, `label2id` and `problem_type` are inherited from `PreTrainedConfig`.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from .configuration_flamingo import PerceiverFlamingoConfig
from .configuration_llava import MLPLlavaConfig
from .configuration_qformer import QFormerBlip2Config, QFormerConfig


class ClassificationConfigMixin:
    """Base of the families' classification configurations. Fields about a language model are ignored."""

    visual_tokens_in_prompt: ClassVar[bool] = False

    def __post_init__(self, **kwargs):
        if self.text_config is not None:
            raise ValueError("Image classification has no language model: text_config must be None.")
        super().__post_init__(**kwargs)
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"id2label has the keys {sorted(self.id2label)}; expected 0 to {len(self.id2label) - 1}.")
        inverse = {label: number for number, label in self.id2label.items()}
        if len(inverse) < len(self.id2label):
            raise ValueError(f"id2label names a class twice: {list(self.id2label.values())}.")
        if self.label2id is None:
            self.label2id = inverse
        elif {label: int(number) for label, number in self.label2id.items()} != inverse:
            raise ValueError(
                f"label2id is {self.label2id}, but id2label says {inverse}. Leave label2id out: it is made of id2label."
            )


@strict
class QFormerBlip2ClassificationConfig(ClassificationConfigMixin, QFormerBlip2Config):
    """Image classification on the query tokens of a Q-Former, which reads images only.

    The fields are those of `QFormerBlip2Config`; `qformer_config.use_text` is always `False`.
    """

    model_type = "qformer_blip2_classification"
    sub_configs = {"vision_config": AutoConfig, "qformer_config": QFormerConfig}

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.qformer_config.use_text = False


@strict
class MLPLlavaClassificationConfig(ClassificationConfigMixin, MLPLlavaConfig):
    """Image classification on the visual tokens of MLP-LLaVA: one per patch, of one tile per image.

    Args:
        hidden_size: Width of the visual tokens; the language model's width if they were trained for one.

    The other fields are those of `MLPLlavaConfig`; `image_grid_pinpoints` must be `None`.
    """

    model_type = "mlp_llava_classification"
    sub_configs = {"vision_config": AutoConfig}

    hidden_size: int = 768

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.image_grid_pinpoints is not None:
            raise ValueError("Image classification reads one tile per image: image_grid_pinpoints must be None.")


@strict
class PerceiverFlamingoClassificationConfig(ClassificationConfigMixin, PerceiverFlamingoConfig):
    """Image classification on the latents of a Perceiver Resampler.

    The fields are those of `PerceiverFlamingoConfig`; those about cross-attention are ignored.
    """

    model_type = "perceiver_flamingo_classification"
    sub_configs = {"vision_config": AutoConfig}


__all__ = [
    "MLPLlavaClassificationConfig",
    "PerceiverFlamingoClassificationConfig",
    "QFormerBlip2ClassificationConfig",
]
