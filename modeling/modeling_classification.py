"""Image classification on a bridge's visual tokens: a frozen vision encoder, the bridge, and a linear layer on top.

There is no language model. The part of a family's bridge that makes visual tokens (Q-Former, linear layers, Perceiver
Resampler) keeps its names; `bridge.pooler` pools an image's tokens into one vector and `bridge.classifier` scores the
classes. All trained parameters are part of `bridge`, the head included, so a bridge checkpoint is a whole classifier.

Source: labels and losses are those of transformers' `ViTForImageClassification`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from ..compat import can_return_tuple, torch_compilable_check
from ..compat import initialization as init
from ..configuration.configuration_bridged import BridgedConfig
from ..configuration.configuration_classification import (
    MLPLlavaClassificationConfig,
    PerceiverFlamingoClassificationConfig,
    QFormerBlip2ClassificationConfig,
)
from ..processing.processing_parts import load_image_processor
from .modeling_bridge import Bridge
from .modeling_bridged import BridgedModel
from .modeling_flamingo import PerceiverFlamingoForConditionalGeneration, PerceiverResampler
from .modeling_llava import MLPBridge, MLPLlavaForConditionalGeneration, PooledPatchesMixin
from .modeling_parts import Part, resolve_part
from .modeling_pins import summary
from .modeling_qformer import QFormerBlip2ForConditionalGeneration
from .modeling_qformer_layers import QFormer
from .modeling_qformer_pretraining import QFormerBlip2Stage1Model


# Configuration fields that do not change how a bridge makes visual tokens
_NON_BRIDGE_FIELDS = {
    *PreTrainedConfig.__dataclass_fields__, "vision_config", "text_config", "image_token_id", "special_token_ids",
    "freeze_vision_model", "freeze_language_model", "bridge_only", "frozen_parts", "trained_tensors",
    "visual_tokens_in_prompt",
}  # fmt: skip


# ---------------------------------------------------------------------- bridges


class TokenPooling(nn.Module):
    """Pool an image's visual tokens into one vector: their mean, weighted by a learned query.

    The query is initialised with zero, which gives the plain mean. BLIP-2 averages its query tokens in the same way for
    image-text matching, so a Q-Former from stage 1 is used as it was trained. The query then learns which tokens
    matter, with one number per channel: Q-Former queries and latents differ in their content, and most tokens of an
    MLP, one per patch, show background.

    Args:
        width: Channels of a token.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def init_parameters(self, config: BridgedConfig) -> None:
        """Set the query to zero."""
        init.zeros_(self.query)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Map `(num_images, num_image_tokens, width)` to `(num_images, width)`."""
        scores = (image_features @ self.query) * self.query.numel() ** -0.5  # (num_images, num_image_tokens)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(image_features.dtype)
        return torch.einsum("it,itw->iw", weights, image_features)


class ClassificationBridge(Bridge):
    """Base of every family's bridge for classification; its own modules make the visual tokens."""

    adapter_targets = r"(?!classifier|pooler).*"  # the head is trained as it is

    def add_head(self, width: int, num_labels: int) -> None:
        """Add the modules that turn visual tokens of `width` channels into scores of `num_labels` classes."""
        self.pooler = TokenPooling(width)
        self.classifier = nn.Linear(width, num_labels)

    def logits(self, image_features: torch.Tensor) -> torch.Tensor:
        """Scores of the classes, `(num_images, num_labels)`, from visual tokens."""
        return self.classifier(self.pooler(image_features))


class QFormerClassificationBridge(ClassificationBridge):
    """Layer norm on the patch features, Q-Former, head."""

    adapter_targets = r"qformer\.layers\..*\.(query|key|value|dense)"

    def __init__(self, config: QFormerBlip2ClassificationConfig, language_model: None = None):
        super().__init__(config, None)
        self.vision_layer_norm = nn.LayerNorm(config.vision_feature_size, eps=config.vision_layer_norm_eps)
        self.qformer = QFormer(config.qformer_config, config.vision_feature_size)
        self.add_head(config.qformer_config.hidden_size, config.num_labels)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Map `(num_images, num_patches, vision_dim)` to `(num_images, num_query_tokens, hidden_size)`."""
        return self.qformer(self.vision_layer_norm(patch_features))


class MLPClassificationBridge(ClassificationBridge, MLPBridge):
    """Linear layers, one visual token per patch, and the head."""

    adapter_targets = r"linear_\d+"

    def __init__(self, config: MLPLlavaClassificationConfig, language_model: None = None):
        super().__init__(config, None)
        self.add_head(config.hidden_size, config.num_labels)

    @property
    def text_dim(self) -> int:
        """Width of the visual tokens, which the configuration sets: there is no language model."""
        return self.config.hidden_size


class PerceiverClassificationBridge(ClassificationBridge):
    """Perceiver Resampler and head."""

    adapter_targets = r"resampler\.layers\..*"

    def __init__(self, config: PerceiverFlamingoClassificationConfig, language_model: None = None):
        super().__init__(config, None)
        self.resampler = PerceiverResampler(config.vision_feature_size, config)
        self.add_head(config.vision_feature_size, config.num_labels)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Map `(num_images, num_patches, vision_dim)` to `(num_images, num_latents, vision_dim)`."""
        first = None
        if self.resampler.media_time_embeddings is not None:  # each image is the first of its document
            first = torch.zeros(len(patch_features), dtype=torch.long, device=patch_features.device)
        return self.resampler(patch_features, media_index=first)


# ---------------------------------------------------------------------- models


class BridgedForImageClassification(BridgedModel):
    """A frozen vision encoder, a bridge and a classifier.

    Args:
        config: The family's configuration for classification.
        vision_model: A loaded encoder, which is used without a copy; by default it is built from the configuration.
    """

    auto_classes = ("AutoModel", "AutoModelForImageClassification")
    bridge_class: ClassVar[type[ClassificationBridge]] = ClassificationBridge
    begins_as: ClassVar[tuple[type[BridgedModel], ...]] = ()  # models whose bridge this one can be initialised with
    takes_over: ClassVar[tuple[str, ...]] = ()  # prefixes of the names of the weights that are copied from that bridge
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # losses are means over the images of a batch

    @classmethod
    def can_generate(cls) -> bool:
        """Classifiers can't generate."""
        return False

    def _inherit_generation_config(self) -> None:
        return None

    def get_input_embeddings(self) -> nn.Module:
        """Input embeddings of the vision encoder."""
        return self.vision_model.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """A classifier has no output embeddings."""
        return None

    # ------------------------------------------------------------------ initialisation

    @classmethod
    def from_vision(
        cls,
        vision: Part,
        *,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        image_processor: BaseImageProcessor | str | os.PathLike | None = None,
        dtype: torch.dtype | str | None = None,
        **options,
    ) -> tuple[BridgedForImageClassification, BaseImageProcessor]:
        """Put a new bridge and classifier on top of a vision encoder, which is frozen.

        Args:
            vision: Vision encoder: Hub id, folder, configuration (random weights) or loaded model.
            num_labels: Number of classes, or of values to predict; it can be left out if `id2label` is given.
            id2label: Names of the classes, by number from 0.
            image_processor: The encoder's image processor: object, Hub id or folder; by default it is loaded from the
                encoder's repository.
            dtype: Data type of the vision encoder; the bridge is in float32.
            options: Fields of the configuration, such as `problem_type` or `qformer_config={...}`.

        Returns:
            Model (in eval mode) and image processor.

        Raises:
            ValueError: Neither `num_labels` nor `id2label` is given, they contradict each other, or an option is
                unknown.
        """
        options |= cls._label_fields(num_labels, id2label)
        known = {*cls.config_class.__dataclass_fields__, "num_labels"}
        known -= {"vision_config", "text_config", "frozen_parts", "bridge_only", "trained_tensors"}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; see {cls.config_class.__name__}.")
        vision_model, name, pin = resolve_part("vision_model", vision, dtype)
        config = cls.config_class(vision_config=vision_model.config, frozen_parts={"vision_model": pin}, **options)
        model = cls(config, vision_model=vision_model)
        return model.eval(), load_image_processor(image_processor, name, config.vision_config)

    @classmethod
    def from_bridge(
        cls,
        source: BridgedModel | str | os.PathLike,
        *,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        image_processor: BaseImageProcessor | str | os.PathLike | None = None,
        **options,
    ) -> tuple[BridgedForImageClassification, BaseImageProcessor]:
        """Initialise a classifier with the vision encoder and the visual tokens of another model of the family.

        Args:
            source: A model of the family, or its folder or Hub id. The whole model is loaded, including its language
                model if it has one, which is freed afterwards.
            num_labels: Number of classes, or of values to predict; it can be left out if `id2label` is given.
            id2label: Names of the classes, by number from 0.
            image_processor: The encoder's image processor: object, Hub id or folder; by default the one of `source` if
                that is a folder or a Hub id.
            options: `label2id` and `problem_type`.

        Returns:
            Model (in eval mode) and image processor. The vision encoder is shared with a model that was passed in, the
            bridge's weights are copied.

        Raises:
            ValueError: `source` is not a model of this family, neither `num_labels` nor `id2label` is given, they
                contradict each other, or an option is unknown.
        """
        options |= cls._label_fields(num_labels, id2label)
        if unknown := sorted(set(options) - {"num_labels", "id2label", "label2id", "problem_type"}):
            raise ValueError(
                f"{', '.join(unknown)} can't be chosen here: the bridge brings all but labels and problem_type with it."
            )
        place = None
        if not isinstance(source, PreTrainedModel):
            place = os.fspath(source)
            kind = AutoConfig.from_pretrained(place).model_type
            if kind not in [model.config_class.model_type for model in cls.begins_as]:
                cls._raise_wrong_source(f"{place} holds a {kind!r} model")
            source = AutoModel.from_pretrained(place)
        if not isinstance(source, cls.begins_as):
            cls._raise_wrong_source(f"the source is a {type(source).__name__}")
        before = source.config
        fields = set(cls.config_class.__dataclass_fields__) & set(type(before).__dataclass_fields__)
        fields -= _NON_BRIDGE_FIELDS
        kept = {name: getattr(before, name) for name in sorted(fields)}
        config = cls.config_class(
            vision_config=source.vision_model.config, **{**kept, **cls.fields_of(source)}, **options
        )
        pin, trained = (before.frozen_parts or {}).get("vision_model"), before.trained_tensors or []
        config.frozen_parts = None if pin is None else {"vision_model": pin}
        config.trained_tensors = [name for name in trained if name.startswith("vision_model.")] or None
        model = cls(config, vision_model=source.vision_model)
        model.load_tokens(source)
        if image_processor is None and place is not None:
            image_processor = AutoImageProcessor.from_pretrained(place)
        name = source.vision_model.name_or_path or None
        return model.eval(), load_image_processor(image_processor, name, config.vision_config)

    @classmethod
    def _raise_wrong_source(cls, found: str) -> None:
        expected = " or ".join(sorted({model.config_class.model_type for model in cls.begins_as}))
        raise ValueError(f"{found}; {cls.__name__} can be initialised from {expected}.")

    @staticmethod
    def _label_fields(num_labels: int | None, id2label: dict[int, str] | None) -> dict:
        """Configuration fields that define the classes.

        Raises:
            ValueError: Neither is given, or they contradict each other.
        """
        if id2label is None:
            if num_labels is None:
                raise ValueError("How many classes? Give num_labels, or their names: id2label={0: 'cat', 1: 'dog'}.")
            if num_labels < 1:
                raise ValueError(f"num_labels is {num_labels}; expected at least 1.")
            return {"num_labels": num_labels}
        if num_labels is not None and num_labels != len(id2label):
            raise ValueError(f"num_labels is {num_labels}, but id2label names {len(id2label)} classes.")
        return {"id2label": dict(id2label)}

    @classmethod
    def fields_of(cls, source: BridgedModel) -> dict:
        """Configuration fields that can't be copied from another model's configuration under the same name."""
        return {}

    def load_tokens(self, source: BridgedModel) -> None:
        """Copy the weights that make visual tokens from another model's bridge.

        Args:
            source: A model of this family.

        Raises:
            ValueError: The bridge of `source` has other shapes.
        """
        ours = {name: value for name, value in self.bridge.state_dict().items() if name.startswith(self.takes_over)}
        theirs = source.bridge.state_dict()
        problems = [f"there is no {name}" for name in sorted(ours.keys() - theirs.keys())]
        problems += [
            f"{name} has shape {list(theirs[name].shape)}, expected {list(value.shape)}"
            for name, value in ours.items()
            if name in theirs and theirs[name].shape != value.shape
        ]
        if problems:
            raise ValueError(f"The bridge of this {type(source).__name__} does not fit: {summary(problems)}.")
        self.bridge.load_state_dict({**self.bridge.state_dict(), **{name: theirs[name] for name in ours}})

    # ------------------------------------------------------------------ forward

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput:
        """Score the classes.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            labels: For one class per image, integers `(batch,)`, with -100 for images to ignore. For several classes
                per image, floats `(batch, num_labels)`, 0 or 1. For regression, floats `(batch, num_labels)`, or
                `(batch,)` if `num_labels` is 1. The configuration's `problem_type` selects one of these; if it is
                `None`, it is set from the first labels, as in transformers.
            patch_features: `(batch, num_patches, vision_dim)`, the result of `get_patch_features`, instead of
                `pixel_values`: the encoder does not run again.
            output_hidden_states: Return the vision encoder's hidden states too.
            output_attentions: Return the vision encoder's attention weights too.

        Returns:
            An output with `logits`, `(batch, num_labels)`, and `loss` if labels are given.

        Raises:
            ValueError: Not exactly one of `pixel_values` and `patch_features` is given, or the labels do not fit.
        """
        if (pixel_values is None) == (patch_features is None):
            raise ValueError("Give exactly one of pixel_values and patch_features.")
        images = self.get_image_features(
            pixel_values,
            patch_features,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.bridge.logits(images.pooler_output)  # (batch, num_labels)
        loss = None
        if labels is not None:
            self._check_labels(labels, logits)
            # With one class per image: the mean over the images that are not ignored, or 0 if all are
            counted = (labels != -100).sum().clamp(min=1)
            loss = self.loss_function(labels, logits.float(), self.config, num_items_in_batch=counted)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=images.hidden_states, attentions=images.attentions
        )

    def _check_labels(self, labels: torch.Tensor, logits: torch.Tensor) -> None:
        """Check that the labels fit `problem_type`.

        Raises:
            ValueError: The labels have the wrong dtype, shape or values.
        """
        (batch, num_labels), problem = logits.shape, self.config.problem_type
        integers = not labels.is_floating_point()
        if problem is None:
            single = num_labels > 1 and labels.dtype in (torch.long, torch.int)
        else:
            single = problem == "single_label_classification"
        if single:
            if not integers or labels.shape.numel() != batch:
                raise ValueError(
                    f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected one number of a class per "
                    f"image, integers of shape {(batch,)}. Several classes at once: "
                    "problem_type='multi_label_classification'."
                )
            torch_compilable_check(
                ((labels == -100) | (labels >= 0) & (labels < num_labels)).all(),
                lambda: (
                    f"labels are {sorted(set(labels.flatten().tolist()))}; expected 0 to {num_labels - 1}, or -100."
                ),
            )
            return
        expected = [(batch, num_labels)] + (
            [(batch,)] if num_labels == 1 and problem != "multi_label_classification" else []
        )
        if integers or tuple(labels.shape) not in expected:
            kind = problem or ("regression" if num_labels == 1 else "multi_label_classification")
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; {kind} expects floats of shape "
                f"{' or '.join(map(str, expected))}."
            )

    # ------------------------------------------------------------------ saving

    def _save_beside_weights(self, folder: Path, processor, with_code: bool) -> None:
        if processor is not None:  # an image processor, which has no `check`
            processor.save_pretrained(folder)
        super()._save_beside_weights(folder, None, with_code)


class QFormerBlip2ForImageClassification(BridgedForImageClassification):
    """Q-Former BLIP-2 for image classification, see `BridgedForImageClassification`."""

    config_class = QFormerBlip2ClassificationConfig
    config: QFormerBlip2ClassificationConfig
    bridge_class = QFormerClassificationBridge
    begins_as = (QFormerBlip2Stage1Model, QFormerBlip2ForConditionalGeneration)
    takes_over = ("vision_layer_norm.", "qformer.")
    _no_split_modules = ["QFormerLayer"]

    @classmethod
    def fields_of(cls, source: BridgedModel) -> dict:
        """The Q-Former's configuration, without its text side."""
        return {"qformer_config": {**source.config.qformer_config.to_dict(), "use_text": False}}

    @classmethod
    def from_stage1(
        cls, stage1: QFormerBlip2Stage1Model | str | os.PathLike, **options
    ) -> tuple[QFormerBlip2ForImageClassification, BaseImageProcessor]:
        """Initialise a classifier with the Q-Former of a stage-1 model, `QFormerBlip2ForPreTraining`.

        Args:
            stage1: A stage-1 model, or its folder or Hub id.
            options: Arguments of `from_bridge`.

        Returns:
            Model (in eval mode) and image processor.

        Raises:
            ValueError: `stage1` is not a stage-1 model, or `from_bridge` raises it.
        """
        is_model = isinstance(stage1, PreTrainedModel)
        found = (stage1.config if is_model else AutoConfig.from_pretrained(os.fspath(stage1))).model_type
        if found != QFormerBlip2Stage1Model.config_class.model_type:
            raise ValueError(
                f"stage1 is a {found!r} model; expected a QFormerBlip2ForPreTraining. Other bridges: from_bridge."
            )
        return cls.from_bridge(stage1, **options)


class MLPLlavaForImageClassification(PooledPatchesMixin, BridgedForImageClassification):
    """MLP-LLaVA for image classification, see `BridgedForImageClassification`."""

    config_class = MLPLlavaClassificationConfig
    config: MLPLlavaClassificationConfig
    bridge_class = MLPClassificationBridge
    begins_as = (MLPLlavaForConditionalGeneration,)
    takes_over = ("linear_",)

    @classmethod
    def fields_of(cls, source: BridgedModel) -> dict:
        """The width of the visual tokens; images are not cut into tiles."""
        return {"hidden_size": source.bridge.text_dim, "image_grid_pinpoints": None}


class PerceiverFlamingoForImageClassification(BridgedForImageClassification):
    """Perceiver-Flamingo for image classification, see `BridgedForImageClassification`."""

    config_class = PerceiverFlamingoClassificationConfig
    config: PerceiverFlamingoClassificationConfig
    bridge_class = PerceiverClassificationBridge
    begins_as = (PerceiverFlamingoForConditionalGeneration,)
    takes_over = ("resampler.",)


__all__ = [
    "BridgedForImageClassification",
    "ClassificationBridge",
    "MLPLlavaForImageClassification",
    "PerceiverFlamingoForImageClassification",
    "QFormerBlip2ForImageClassification",
    "TokenPooling",
]
