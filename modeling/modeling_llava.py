"""MLP-LLaVA: every patch feature becomes a visual token through a linear layer or a small MLP.

Source: LLaVA (arXiv 2304.08485, section 4.1), LLaVA-1.5 (arXiv 2310.03744, section 3.2); `llava/model/
multimodal_projector/builder.py` of the official code.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration.configuration_llava import MLPLlavaConfig
from .modeling_bridged import Bridge, BridgedModel


class MLPBridge(Bridge):
    """`linear_1`, GELU, `linear_2`, ...: as many linear layers as `projector_type` says."""

    def __init__(self, config: MLPLlavaConfig, language_model: PreTrainedModel):
        super().__init__(config, language_model)
        self.depth = config.projector_depth
        widths = [config.projector_hidden_size or self.text_dim] * (self.depth - 1)
        widths = [config.vision_feature_size, *widths, self.text_dim]
        for index, (width_in, width_out) in enumerate(zip(widths[:-1], widths[1:]), start=1):
            self.add_module(f"linear_{index}", nn.Linear(width_in, width_out, bias=config.projector_bias))

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Map patch features `(num_images, num_patches, vision_dim)` to `(num_images, num_patches, text_dim)`."""
        hidden = self.linear_1(patch_features)
        for index in range(2, self.depth + 1):
            hidden = getattr(self, f"linear_{index}")(nn.functional.gelu(hidden))
        return hidden


class MLPLlavaForConditionalGeneration(BridgedModel):
    config_class = MLPLlavaConfig
    config: MLPLlavaConfig
    bridge_class = MLPBridge


__all__ = ["MLPBridge", "MLPLlavaForConditionalGeneration"]
