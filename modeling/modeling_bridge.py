"""Base of every family's bridge, and the geometry of the vision encoder that a bridge depends on."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..configuration.configuration_bridged import BridgedConfig
from .modeling_parts import build_part


def with_image_arguments(forward: Callable, names: Iterable[str]) -> Callable:
    """Name a family's image arguments in the signature of `forward`, where `Trainer` and `generate` look for them.

    Args:
        forward: A `forward` that takes them among its keyword arguments.
        names: The family's `image_arguments`.

    Returns:
        The same function under a longer signature.
    """

    @functools.wraps(forward)
    def forward_with_names(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    *parameters, rest = signature.parameters.values()  # the last one is **kwargs
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="torch.Tensor | None")
            for name in names if name not in signature.parameters]  # fmt: skip
    forward_with_names.__signature__ = signature.replace(parameters=[*parameters, *more, rest])
    return forward_with_names


class TokenRows(nn.Module):
    """Trained embedding rows of special tokens; the language model's own tables are not changed.

    Args:
        token_ids: Ids of the rows' tokens; they may lie beyond the language model's tables.
        input_size: Width of the input embeddings.
        output_size: Width of the output layer's input; `None` if its table is tied to the input embeddings.
    """

    def __init__(self, token_ids: list[int], input_size: int, output_size: int | None):
        super().__init__()
        self.token_ids = list(token_ids)
        self.input_rows = nn.Parameter(torch.zeros(len(self.token_ids), input_size))
        self.output_rows = None if output_size is None else nn.Parameter(torch.zeros(len(self.token_ids), output_size))

    def fill(self, inputs_embeds: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Replace the embeddings of the special tokens.

        Args:
            inputs_embeds: `(batch, tokens, text_dim)`.
            input_ids: `(batch, tokens)`.

        Returns:
            `(batch, tokens, text_dim)`.
        """
        for row, token_id in zip(self.input_rows, self.token_ids):
            inputs_embeds = torch.where((input_ids == token_id)[..., None], row.to(inputs_embeds), inputs_embeds)
        return inputs_embeds

    @property
    def scored_rows(self) -> torch.Tensor:
        """Rows of the output layer, `(len(token_ids), width)`."""
        return self.input_rows if self.output_rows is None else self.output_rows

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of the special tokens, `(..., len(token_ids))`, from the output layer's input."""
        return hidden_states @ self.scored_rows.to(hidden_states).T


def num_embeddings(embedding: nn.Module) -> int:
    """Number of rows of an embedding table, which PEFT may have wrapped."""
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings
    return next(module.num_embeddings for module in embedding.modules() if hasattr(module, "num_embeddings"))


class Bridge(nn.Module):
    """Base of every family's bridge, which holds all trained parameters and nothing else.

    Args:
        config: The family's configuration.
        language_model: Only its widths are read; no reference is kept. `None` for a family without a language model.
    """

    output_layer: ClassVar[str | None] = None  # name of the linear layer whose outputs are the visual tokens
    adapter_targets: ClassVar[str] = r".*"  # regular expression for the names of the linear layers that get adapters

    def __init__(self, config: BridgedConfig, language_model: PreTrainedModel | None):
        super().__init__()
        self.token_rows = None
        if language_model is None:
            return
        embedding = language_model.get_input_embeddings()
        self.text_dim = embedding.embedding_dim
        if config.special_token_ids:
            head = language_model.get_output_embeddings()
            tied = bool(getattr(language_model.config, "tie_word_embeddings", False))
            output_size = None
            if not tied and head is not None:  # some heads are not nn.Linear; the weight of others is packed in 4 bits
                output_size = getattr(head, "in_features", None) or head.weight.shape[-1]
            self.token_rows = TokenRows(config.special_token_ids, self.text_dim, output_size)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters; torch's default for a bridge without parameters."""
        parameter = next((weight for weight in self.parameters() if weight.is_floating_point()), None)
        return torch.get_default_dtype() if parameter is None else parameter.dtype

    def init_parameters(self, config: BridgedConfig) -> None:
        """Initialise this module's own parameters (sub-modules are initialised by the model)."""


def patch_features_of(vision_outputs: ModelOutput, layer: int | list[int] | None) -> torch.Tensor:
    """Read the encoder's features as a sequence, prefix tokens included.

    Args:
        vision_outputs: Output of the vision encoder.
        layer: The configuration's `vision_feature_layer`.

    Returns:
        `(num_images, tokens, channels)`.

    Raises:
        ValueError: The layers differ in their number of tokens.
    """
    if layer is None:
        chosen = [vision_outputs.last_hidden_state]
    else:
        chosen = [vision_outputs.hidden_states[index] for index in (layer if isinstance(layer, list) else [layer])]
    # a CNN's (num_images, channels, rows, columns) becomes (num_images, rows * columns, channels)
    sequences = [states.flatten(2).transpose(1, 2) if states.ndim == 4 else states for states in chosen]
    lengths = {states.shape[1] for states in sequences}
    if len(lengths) > 1:
        raise ValueError(
            f"vision_feature_layer={layer} picks layers with {sorted(lengths)} tokens; only layers of one length can "
            "be concatenated."
        )
    return torch.cat(sequences, dim=-1)


def _probed(config: BridgedConfig, size: int, device: str) -> torch.Tensor:
    """The patch features that an untrained copy of the vision encoder makes of a black image on a device."""
    vision_config, layer = config.vision_config, config.vision_feature_layer
    with torch.device(device), torch.no_grad():
        probe = build_part("vision_model", copy.deepcopy(vision_config)).eval()
        channels = getattr(vision_config, "num_channels", 3)
        outputs = probe(
            pixel_values=torch.zeros(1, channels, size, size, dtype=probe.dtype),
            output_hidden_states=layer is not None,
            return_dict=True,
        )
    if layer is None:
        return outputs.last_hidden_state
    return outputs.hidden_states[layer[0] if isinstance(layer, list) else layer]


def fill_vision_geometry(config: BridgedConfig) -> None:
    """Run the vision encoder on the meta device, and write the shape of its features into `config`.

    Args:
        config: Its `vision_layout`, `vision_hidden_size`, `patch_size`, `num_prefix_tokens` and `image_size` are filled
            in if they are `None`.

    Raises:
        ValueError: The encoder does not turn `pixel_values` into patch features.
    """
    names = ("vision_layout", "vision_hidden_size", "patch_size", "num_prefix_tokens", "image_size")
    if all(getattr(config, name) is not None for name in names):
        return
    vision_config = config.vision_config
    size = config.image_size or getattr(vision_config, "image_size", None)
    if size is None:  # timm's description; otherwise 224, the training size of nearly every CNN
        size = (getattr(vision_config, "pretrained_cfg", None) or {}).get("input_size", [3, 224, 224])[-1]
    if isinstance(size, (list, tuple)):
        if len(set(size)) > 1:
            raise ValueError(f"The vision encoder takes {size} pixels; only square images are supported so far.")
        size = size[0]
    kind = type(vision_config).__name__
    try:
        try:
            states = _probed(config, size, "meta")
        except RuntimeError:  # encoders that compute while they are built, such as early timm's ViTs
            states = _probed(config, size, "cpu")
    except (AttributeError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{kind} can't serve as vision encoder: it does not turn `pixel_values` of {size}x{size} pixels into patch "
            f"features ({error}). Encoders that do: CLIP, SigLIP, ViT, DINOv2, BLIP-2's ViT, ResNet, any timm model."
        ) from error
    if states.ndim == 4:
        found = {"vision_layout": "grid", "vision_hidden_size": states.shape[1], "num_prefix_tokens": 0}
        found["patch_size"] = round(size / states.shape[-1])
    elif states.ndim == 3:
        patch_size = getattr(vision_config, "patch_size", None)
        if patch_size is None:  # the patches are the largest square number of tokens; the rest is the prefix
            patch_size = size // int(states.shape[1] ** 0.5)
        patch_size = patch_size if isinstance(patch_size, int) else patch_size[0]
        prefix = states.shape[1] - (size // patch_size) ** 2
        if prefix < 0:
            raise ValueError(
                f"{kind} gives {states.shape[1]} tokens for {size}x{size} pixels, fewer than its "
                f"{(size // patch_size) ** 2} patches of {patch_size} pixels: it pools them, and can't serve as is."
            )
        found = {"vision_layout": "sequence", "vision_hidden_size": states.shape[2], "num_prefix_tokens": prefix}
        found["patch_size"] = patch_size
    else:
        raise ValueError(f"{kind} gives features of shape {tuple(states.shape)}; expected 3 or 4 dimensions.")
    found["image_size"] = size
    for name, value in found.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def additive_mask(
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None, hidden_states: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor] | None:
    """Make a boolean 4-d mask one that is added to the scores of attention; other masks stay as they are.

    `"eager"` attention adds whatever it is given. PyTorch's SDPA takes boolean masks, but makes a copy of them in every
    layer, and keeps all copies for `backward`.

    Args:
        attention_mask: `(batch, 1, tokens, keys)`, true where attention is allowed; or such masks by kind of layer.
        hidden_states: What the language model is given; the mask has the dtype in which it computes.

    Returns:
        `(batch, 1, tokens, keys)`: 0 where attention is allowed, else the lowest finite number.
    """
    if isinstance(attention_mask, dict):
        return {kind: additive_mask(mask, hidden_states) for kind, mask in attention_mask.items()}
    if attention_mask is None or attention_mask.ndim != 4 or attention_mask.dtype != torch.bool:
        return attention_mask
    device, dtype = hidden_states.device, hidden_states.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    attention_mask = attention_mask.to(device)
    mask = torch.zeros(attention_mask.shape, dtype=dtype, device=device)
    return mask.masked_fill(~attention_mask, torch.finfo(dtype).min)


__all__ = [
    "additive_mask",
    "Bridge",
    "TokenRows",
    "fill_vision_geometry",
    "num_embeddings",
    "patch_features_of",
    "with_image_arguments",
]
