"""Q-Former BLIP-2: learned queries read the image and hand a fixed number of visual tokens to the language model.

Source: BLIP-2 (arXiv 2301.12597, section 3.1), InstructBLIP (arXiv 2305.06500, section 2.3);
`lavis/models/blip2_models/{Qformer,blip2}.py` of the official code.
"""

from __future__ import annotations

import os
import re

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration.configuration_qformer import QFormerBlip2Config
from ..processing.processing_qformer import QFormerBlip2Processor
from .modeling_assembly import assemble
from .modeling_bridge import Bridge, with_image_arguments
from .modeling_bridged import BridgedModel
from .modeling_parts import Part
from .modeling_pins import summary
from .modeling_qformer_layers import QFormer, joint_attention_mask
from .modeling_qformer_pretraining import QFormerBlip2Stage1Model


class QFormerBridge(Bridge):
    """Layer norm on the patch features, Q-Former, linear layer to the language model's width."""

    output_layer = "language_projection"
    adapter_targets = r"qformer\.layers\..*\.(query|key|value|dense)|language_projection"

    def __init__(self, config: QFormerBlip2Config, language_model: PreTrainedModel):
        super().__init__(config, language_model)
        self.vision_layer_norm = nn.LayerNorm(config.vision_feature_size, eps=config.vision_layer_norm_eps)
        self.qformer = QFormer(config.qformer_config, config.vision_feature_size)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, self.text_dim)

    def forward(
        self,
        patch_features: torch.Tensor,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map patch features to visual tokens.

        Args:
            patch_features: `(num_images, num_patches, vision_dim)`.
            qformer_input_ids: `(num_images, text_tokens)`: the instruction that the Q-Former reads with each image.
            qformer_attention_mask: `(num_images, text_tokens)`, 0 for padding.

        Returns:
            `(num_images, num_query_tokens, text_dim)`.

        Raises:
            ValueError: The numbers of instructions and images differ.
        """
        if qformer_input_ids is not None and qformer_input_ids.shape[0] != patch_features.shape[0]:
            raise ValueError(
                f"{qformer_input_ids.shape[0]} instructions in qformer_input_ids, but {patch_features.shape[0]} "
                "images: each image needs its own copy of the instruction. The processor makes them."
            )
        hidden_states = self.qformer(
            self.vision_layer_norm(patch_features), qformer_input_ids, qformer_attention_mask, "itm"
        )
        queries = hidden_states[:, : self.qformer.query_tokens.shape[1]]  # drop the instruction's tokens
        return self.language_projection(queries)


class QFormerBlip2ForConditionalGeneration(BridgedModel):
    """Q-Former BLIP-2: visual tokens replace the placeholders in the prompt. For the arguments see `BridgedModel`."""

    config_class = QFormerBlip2Config
    config: QFormerBlip2Config
    bridge_class = QFormerBridge
    image_arguments = (*BridgedModel.image_arguments, "qformer_input_ids", "qformer_attention_mask")
    forward = with_image_arguments(BridgedModel.forward, image_arguments)
    compose_options = ("qformer_init_from",)
    _no_split_modules = ["QFormerLayer"]

    def init_bridge(self, qformer_init_from: str | os.PathLike | PreTrainedModel, **hub_kwargs) -> None:
        """Initialise the Q-Former with other weights; the projection to the language model is not changed.

        Args:
            qformer_init_from: BERT, as for `QFormer.load_bert`; or a stage-1 model, its folder or Hub id. To use stage
                1's vision encoder and settings too, call `from_stage1`.
            hub_kwargs: `token` and other arguments of `from_pretrained`.

        Raises:
            ValueError: The weights do not fit this model.
        """
        source = qformer_init_from
        if not isinstance(source, PreTrainedModel):
            config = AutoConfig.from_pretrained(source, **hub_kwargs)
            if config.model_type == QFormerBlip2Stage1Model.config_class.model_type:
                source = AutoModel.from_pretrained(source, **hub_kwargs)
        if isinstance(source, QFormerBlip2Stage1Model):
            self.load_stage1(source)
        else:
            self.bridge.qformer.load_bert(source, **hub_kwargs)

    @classmethod
    def from_stage1(
        cls,
        stage1: QFormerBlip2Stage1Model | str | os.PathLike,
        language: Part,
        *,
        instruction_aware: bool = False,
        image_processor: BaseImageProcessor | str | os.PathLike | None = None,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        **options,
    ) -> tuple[QFormerBlip2ForConditionalGeneration, QFormerBlip2Processor]:
        """Build a model for stage 2 (or 3) from a stage-1 model's vision encoder and Q-Former, and a language model.

        Args:
            stage1: A `QFormerBlip2ForPreTraining`, or its folder or Hub id.
            language: Language model: Hub id, folder, configuration (random weights) or loaded model.
            instruction_aware: Keep the Q-Former's text side, so that it can read instructions.
            image_processor: The encoder's image processor: object, Hub id or folder; by default stage 1's, if `stage1`
                is a folder or a Hub id.
            qformer_tokenizer: The Q-Former's tokenizer, for `instruction_aware`; by default stage 1's, if `stage1` is a
                folder or a Hub id.
            options: Other arguments of `compose`, such as `tokenizer`, `dtype` and `device_map`.

        Returns:
            Model (in eval mode) and processor.

        Raises:
            ValueError: `stage1` is not a stage-1 model, or does not fit the model.

        Source: BLIP-2, section 3.3; `lavis/models/blip2_models/blip2_opt.py`.
        """
        place = None
        if not isinstance(stage1, PreTrainedModel):
            place = os.fspath(stage1)
            stage1 = AutoModel.from_pretrained(place)
        if not isinstance(stage1, QFormerBlip2Stage1Model):
            raise ValueError(f"stage1 is a {type(stage1).__name__}; expected a QFormerBlip2ForPreTraining.")
        if image_processor is None and place is not None:
            image_processor = AutoImageProcessor.from_pretrained(place)
        if qformer_tokenizer is None and place is not None and instruction_aware:
            qformer_tokenizer = AutoTokenizer.from_pretrained(place)
        before = stage1.config
        options = {
            "qformer_config": {**before.qformer_config.to_dict(), "use_text": instruction_aware},
            "vision_layer_norm_eps": before.vision_layer_norm_eps,
            "vision_feature_layer": before.vision_feature_layer,
            "vision_feature_select_strategy": before.vision_feature_select_strategy,
            **options,
        }
        vision = stage1.vision_model
        model, processor = assemble(
            cls, QFormerBlip2Processor, vision, language, image_processor=image_processor, **options
        )
        pin = (before.frozen_parts or {}).get("vision_model")
        if pin and pin.get("source"):
            model.config.frozen_parts["vision_model"] = pin
        model.load_stage1(stage1)
        if qformer_tokenizer is not None:
            processor.qformer_tokenizer = qformer_tokenizer
            processor.check(model.config)
        return model, processor

    def load_stage1(self, stage1: PreTrainedModel) -> None:
        """Copy stage 1's Q-Former and layer norm. Its text side is left out if this Q-Former has none.

        Args:
            stage1: A `QFormerBlip2ForPreTraining`.

        Raises:
            ValueError: The names or shapes of the weights differ, apart from the text side, or settings differ.
        """
        parts = ("vision_layer_norm.", "qformer.")
        ours, theirs = (
            {name: tensor for name, tensor in model.bridge.state_dict().items() if name.startswith(parts)}
            for model in (self, stage1)
        )
        text = re.compile(r"qformer\.((word|position)_embeddings|layers\.\d+\.feed_forward_text)\.")
        problems = [f"stage 1 has no {name}" for name in sorted(ours.keys() - theirs.keys())]
        left_out = theirs.keys() - ours.keys()
        problems += [f"there is no room for {name}" for name in sorted(left_out) if not text.match(name)]
        problems += [
            f"{name} has shape {list(theirs[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in ours.items()
            if name in theirs and theirs[name].shape != tensor.shape
        ]
        mine, other = self.config, stage1.config
        compared = [(name, mine, other) for name in ("vision_layer_norm_eps", "vision_feature_select_strategy")]
        names = ("num_attention_heads", "hidden_act", "layer_norm_eps", "cross_attention_frequency")
        compared += [(name, mine.qformer_config, other.qformer_config) for name in names]
        problems += [
            f"{name} is {getattr(here, name)!r}, but stage 1's {getattr(there, name)!r}"
            for name, here, there in compared
            if getattr(here, name) != getattr(there, name)
        ]
        if problems:
            raise ValueError(f"Stage 1 does not fit this model: {summary(problems)}.")
        self.bridge.load_state_dict({**self.bridge.state_dict(), **{name: theirs[name] for name in ours}})


__all__ = ["QFormer", "QFormerBlip2ForConditionalGeneration", "QFormerBridge", "joint_attention_mask"]
