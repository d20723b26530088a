"""Configuration of MLP-LLaVA: a linear layer or a small MLP as bridge.

Source: LLaVA (arXiv 2304.08485, section 4.1) and LLaVA-1.5 (arXiv 2310.03744, section 3.2); `llava/model/
multimodal_projector/builder.py` of the official code.
"""

import re

from huggingface_hub.dataclasses import strict

from .configuration_bridged import BridgedConfig


@strict
class MLPLlavaConfig(BridgedConfig):
    """MLP-LLaVA: every patch feature becomes one visual token.

    Args:
        projector_type: `"linear"` (v1), `"mlp2x_gelu"` (v1.5) or `"mlpNx_gelu"` for N layers.
        projector_bias: Whether the linear layers have biases.
        projector_hidden_size: Width between the layers; `None` takes the language model's.

    For the rest see `BridgedConfig`.
    """

    model_type = "mlp_llava"

    projector_type: str = "mlp2x_gelu"
    projector_bias: bool = True
    projector_hidden_size: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.projector_depth  # noqa: B018  refuses a bad projector_type here

    @property
    def projector_depth(self) -> int:
        """Number of linear layers.

        Raises:
            ValueError: `projector_type` is neither `"linear"` nor `"mlpNx_gelu"`.
        """
        if self.projector_type == "linear":
            return 1
        match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.projector_type)
        if match is None:
            raise ValueError(f"projector_type is {self.projector_type!r}; expected 'linear' or 'mlpNx_gelu' (N >= 1).")
        return int(match.group(1))


__all__ = ["MLPLlavaConfig"]
