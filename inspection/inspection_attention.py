"""Attention weights of bridges and language models, exactly as the models compute them.

Fused kernels return no weights. While a model is being recorded, hooks ask its own modules for their queries and keys,
the language model uses eager attention, and compiled code runs without its compilation. Afterwards all is as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from ..compat import attention_of, cache_argument, cache_of, set_attention
from ..compat_hooks import without_new_hooks
from ..modeling import BridgedModel
from ..modeling.modeling_flamingo import GatedCrossAttentionLayer, PerceiverAttention, split_heads
from ..modeling.modeling_qformer_layers import QFormerAttention


# ---------------------------------------------------------------------- weights of one module


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax in float32; `mask` is true where attention is allowed."""
    scores = scores.float()
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)


def qformer_weights(module: QFormerAttention, inputs: dict) -> torch.Tensor | None:
    """Weights of the Q-Former's cross-attention, `(num_images, heads, num_queries, num_patches)`.

    Args:
        module: An attention of the Q-Former.
        inputs: Arguments of its `forward`, by name.

    Returns:
        The weights; `None` for its self-attention.
    """
    if inputs.get("key_value_states") is None:
        return None
    query = split_heads(module.query(inputs["hidden_states"]), module.num_heads).float()
    key = split_heads(module.key(inputs["key_value_states"]), module.num_heads).float()
    return _softmax(query @ key.transpose(2, 3) * module.scaling)


def resampler_weights(module: PerceiverAttention, inputs: dict) -> torch.Tensor:
    """Weights of a layer of the resampler, `(num_images, heads, num_latents, num_patches + num_latents)`.

    Args:
        module: An attention of the resampler.
        inputs: Arguments of its `forward`, by name.
    """
    latents = module.norm_latents(inputs["latents"])
    keys = torch.cat((module.norm_media(inputs["patch_features"]), latents), dim=1)
    key, _ = module.key_value(keys).chunk(2, dim=-1)
    query, key = (split_heads(states, module.num_heads).float() for states in (module.query(latents), key))
    return _softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, inputs.get("mask"))


def gated_weights(module: GatedCrossAttentionLayer, inputs: dict) -> torch.Tensor | None:
    """Weights of gated cross-attention, `(rows, heads, tokens, visual_tokens)`.

    Args:
        module: A layer of gated cross-attention.
        inputs: Arguments of its `forward`, by name.

    Returns:
        The weights, zeros for text before any image; `None` without images.
    """
    key = inputs.get("key")
    if key is None:
        return None
    states = inputs["hidden_states"].to(module.attn_gate.weight.dtype)
    query = split_heads(module.query(module.layer_norm(states)), module.num_heads).float()
    key = key.float().repeat_interleave(len(query) // len(key), dim=0)  # beams share their sample's keys
    weights = _softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, inputs["mask"][:, None])
    return weights * inputs["sees_image"][:, None, :, None]


KINDS: dict[type[nn.Module], Callable] = {
    QFormerAttention: qformer_weights,
    PerceiverAttention: resampler_weights,
    GatedCrossAttentionLayer: gated_weights,
}


# ---------------------------------------------------------------------- recording


@contextmanager
def without_compilation() -> Iterator[None]:
    """Run compiled models without their compiled code, which calls no hooks that were added later."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode, so that no dropout changes its attention; then every module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def eager_language_model(model: BridgedModel) -> Iterator[None]:
    """Let the language model use eager attention, which alone returns weights; then restore its implementation.

    Args:
        model: A bridged model with a language model.
    """
    configs = [getattr(part, "config", None) for part in model.language_model.modules()]
    unique = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
    before = [(config, attention_of(config)) for config in unique.values()]
    for config, _ in before:
        set_attention(config, "eager")
    try:
        with without_new_hooks(model.language_model):  # transformers' own, which capture the weights
            yield
    finally:
        for config, implementation in before:
            set_attention(config, implementation)


@contextmanager
def recording(model: BridgedModel, *kinds: type[nn.Module]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record the attention weights of a model's bridge in everything that runs inside the `with` statement.

    Args:
        model: A bridged model; compiled, or with adapters of PEFT, too.
        kinds: Classes of modules of `KINDS` to record; all of them if none is given.

    Yields:
        By the module's name in the bridge the weights of each of its runs, in float32, as for `qformer_weights`,
        `resampler_weights` and `gated_weights`. Families without attention in the bridge have none.
    """
    recorded: dict[str, list[torch.Tensor]] = {}
    kinds = tuple(kinds or KINDS)

    def hook_for(name: str, weights_of: Callable) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            with torch.no_grad():
                weights = weights_of(module, inputs)
            if weights is not None:
                recorded.setdefault(name, []).append(weights.detach())

        return hook

    with ExitStack() as stack:
        stack.enter_context(without_compilation())
        for name, module in model.bridge.named_modules():
            weights_of = next((KINDS[kind] for kind in kinds if isinstance(module, kind)), None)
            if weights_of is not None:
                handle = module.register_forward_pre_hook(hook_for(name, weights_of), with_kwargs=True)
                stack.callback(handle.remove)
        yield recorded


def _stacked(recorded: dict[str, list[torch.Tensor]]) -> torch.Tensor | None:
    """The weights of each layer's last run, `(layers, ...)`, or `None` if there are none."""
    return torch.stack([runs[-1] for runs in recorded.values()]) if recorded else None


# ---------------------------------------------------------------------- attention of the bridge


@torch.no_grad()
def bridge_attention(model: BridgedModel, inputs) -> torch.Tensor:
    """Which patches the queries of a Q-Former, or the latents of a resampler, attend to.

    Args:
        model: A bridged model.
        inputs: Model inputs with images, as its processor gives them; others are not read.

    Returns:
        `(layers, num_images, heads, num_queries, keys)`, float32; every row sums to one. The keys are the patch
        features; those of a resampler are followed by the latents themselves. With several frames their patches come
        one frame after the other.

    Raises:
        ValueError: There are no images, or the bridge has no attention, as that of MLP-LLaVA.
    """
    images = {name: inputs[name] for name in model.image_arguments if inputs.get(name) is not None}
    if "pixel_values" not in images and "patch_features" not in images:
        raise ValueError("There are no images in inputs: give what the processor makes of pictures.")
    images = {name: tensor.to(model.device) for name, tensor in images.items()}
    with in_eval_mode(model), recording(model, QFormerAttention, PerceiverAttention) as recorded:
        model.get_image_features(**images, return_dict=True)
    weights = _stacked(recorded)
    if weights is None:
        raise ValueError(
            f"The bridge of a {model.config.model_type!r} model has no attention: each of its visual tokens is made of "
            "one place of the picture. Look at the language model's attention: answer_attention."
        )
    return weights


def patch_attention(weights: torch.Tensor, num_patches: int) -> torch.Tensor:
    """The mean over layers and heads of a bridge's attention to patches.

    Args:
        weights: From `bridge_attention`, `(layers, num_images, heads, num_queries, keys)`.
        num_patches: Number of patch features of an image; latents among the keys come after them.

    Returns:
        `(num_images, num_queries, num_patches)`; every row sums to one, without the attention to latents.
    """
    mean = weights[..., :num_patches].mean(dim=(0, 2))
    return mean / mean.sum(dim=-1, keepdim=True)


# ---------------------------------------------------------------------- attention of words


@dataclass
class AnswerAttention:
    """What the language model attends to when it says each token of its answers.

    Args:
        language: `(layers, batch, heads, answer_tokens, keys)`: attention of the position that predicts the token. The
            keys are the tokens of the prompt and of the answer so far; for an encoder-decoder the cross-attention to
            the encoder's tokens.
        gated: `(layers, batch, heads, answer_tokens, max_images * num_latents)`: gated cross-attention, for families
            that have it, else `None`.
        bridge: As from `bridge_attention`; `None` for a bridge without attention.
        image_of_key: `(batch, keys)`: number of the image in its row, from 0, whose visual token a key is; -1 for
            others.
        is_token: `(batch, answer_tokens)`: false for padding of shorter answers.
        num_images: `(batch,)`: number of images of each row; those of all rows are concatenated in `bridge`.
    """

    language: torch.Tensor
    gated: torch.Tensor | None
    bridge: torch.Tensor | None
    image_of_key: torch.Tensor
    is_token: torch.Tensor
    num_images: torch.Tensor

    def to_image(self, row: int = 0, image: int = 0) -> torch.Tensor:
        """Attention of a row's answer tokens to the visual tokens of one image: the mean over layers and heads.

        Args:
            row: Number of the row.
            image: Number of the image in its row.

        Returns:
            `(answer_tokens, num_image_tokens)`, without padding; every row of it sums to one, or is zero if the model
            does not look at this image, such as an earlier one of Perceiver-Flamingo.

        Raises:
            ValueError: There is no such image.
        """
        if not 0 <= image < int(self.num_images[row]):
            raise ValueError(f"Row {row} has {int(self.num_images[row])} images; there is no image {image}.")
        if self.gated is None:
            weights = self.language[:, row].float()[..., self.image_of_key[row] == image]
        else:
            slots = self.gated.shape[-1] // int(self.num_images.max())
            weights = self.gated[:, row, ..., image * slots : (image + 1) * slots]
        mean = weights.mean(dim=(0, 1))[self.is_token[row]]
        return mean / mean.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)

    def share_on_images(self, row: int = 0) -> torch.Tensor:
        """How much of the language model's attention lies on visual tokens, `(answer_tokens, num_images)`.

        With gated cross-attention it is the share of each image among all images.

        Args:
            row: Number of the row.
        """
        count = int(self.num_images[row])
        if self.gated is None:
            weights = self.language[:, row].float().mean(dim=(0, 1))[self.is_token[row]]
            shares = [weights[:, self.image_of_key[row] == image].sum(dim=-1) for image in range(count)]
        else:
            weights = self.gated[:, row].mean(dim=(0, 1))[self.is_token[row]]
            slots = self.gated.shape[-1] // int(self.num_images.max())
            shares = [weights[:, image * slots : (image + 1) * slots].sum(dim=-1) for image in range(count)]
        return torch.stack(shares, dim=-1) if shares else weights.new_zeros(len(weights), 0)

    def to_patches(self, row: int = 0, image: int = 0) -> torch.Tensor:
        """Attention of a row's answer tokens to the patches of one image, through the bridge.

        Attention to visual tokens is multiplied by what those attend to: an estimate, because the layers between them
        mix what they read. Without attention in the bridge a visual token is one place already.

        Args:
            row: Number of the row.
            image: Number of the image in its row.

        Returns:
            `(answer_tokens, num_patches)`, prefix tokens among the patches if the bridge reads them; rows are as those
            of `to_image`.
        """
        to_image = self.to_image(row, image)
        if self.bridge is None:
            return to_image
        maps = self.bridge_to_patches()
        return to_image @ maps[int(self.num_images[:row].sum()) + image].to(to_image)

    def bridge_to_patches(self) -> torch.Tensor:
        """What the queries or latents of all images attend to, `(num_images, num_queries, num_patches)`.

        Raises:
            ValueError: The bridge has no attention.
        """
        if self.bridge is None:
            raise ValueError("The bridge has no attention: its visual tokens are made of one place each.")
        *_, queries, keys = self.bridge.shape  # a resampler's latents are keys too
        return patch_attention(self.bridge, keys - queries * (self.gated is not None))


@torch.no_grad()
def answer_attention(
    model: BridgedModel, inputs, answer_ids: torch.Tensor, is_token: torch.Tensor | None = None
) -> AnswerAttention:
    """What the language model attends to when it says given answers.

    The prompt runs once with the model's own attention; the answers run behind it, with eager attention.

    Args:
        model: A bridged model with a language model, decoder or encoder-decoder.
        inputs: Model inputs of a batch of prompts, padded on the left, as the processor gives them; they end with text.
        answer_ids: `(batch, answer_tokens)`: what was answered, padded on the right.
        is_token: `(batch, answer_tokens)`, false for padding; by default nothing is.

    Returns:
        The weights, on the model's device.

    Raises:
        ValueError: There are no answers, the model has no language model, or a prompt ends with an image.
    """
    if model.language_model is None:
        raise ValueError(f"A {model.config.model_type!r} model has no language model, whose attention could be read.")
    if answer_ids.ndim != 2 or answer_ids.shape[1] == 0 or len(answer_ids) != len(inputs["input_ids"]):
        raise ValueError(
            f"answer_ids has shape {tuple(answer_ids.shape)}; expected ({len(inputs['input_ids'])}, answer_tokens), "
            "with at least one token."
        )
    answer_ids = answer_ids.to(model.device)
    is_token = torch.ones_like(answer_ids, dtype=torch.bool) if is_token is None else is_token.to(model.device).bool()
    with in_eval_mode(model):
        run = _attend_from_decoder if model.config.is_encoder_decoder else _attend_behind_prompt
        language, gated, bridge, visual_tokens = run(model, on_device(inputs, model), answer_ids, is_token)
    image_of_token, num_images = _images_of_tokens(model, inputs["input_ids"].to(model.device), visual_tokens)
    missing = language.shape[-1] - image_of_token.shape[1]  # the answers' own tokens among the keys
    image_of_key = nn.functional.pad(image_of_token, (0, missing), value=-1)
    return AnswerAttention(language, _stacked(gated), _stacked(bridge), image_of_key, is_token, num_images)


def on_device(inputs, model: BridgedModel) -> dict:
    """Model inputs as a dict, its tensors on the model's device.

    Args:
        inputs: What the processor gives.
        model: The model.
    """
    return {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


def check_prompts(model: BridgedModel, inputs: dict) -> torch.Tensor:
    """Check that prompts end with text and are padded on the left; returns their mask, `(batch, tokens)`.

    Args:
        model: A bridged model with a decoder-only language model.
        inputs: Model inputs.

    Raises:
        ValueError: A prompt ends with an image, is padded on the right, or has one token.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if bool((ids[:, -1] == model.config.image_token_id).any()) or not bool(mask[:, -1].all()) or ids.shape[1] < 2:
        raise ValueError(
            "A prompt ends with an image, is padded on the right, or is empty; expected text at the end of each: the "
            "position before the answer is the one that predicts it."
        )
    return mask


def _attend_behind_prompt(model, inputs: dict, answer_ids: torch.Tensor, is_token: torch.Tensor) -> tuple:
    """A decoder's attention `(layers, batch, heads, answer_tokens, keys)`, that of the bridge, and visual tokens."""
    ids, mask = inputs["input_ids"], check_prompts(model, inputs)
    before = {**inputs, "input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
    with recording(model, QFormerAttention, PerceiverAttention) as bridge:
        prompt = model(**before, use_cache=True, logits_to_keep=1)
    # the position that predicts a token is the one before it
    step_ids = torch.cat([ids[:, -1:], answer_ids[:, :-1]], dim=1)
    whole = torch.cat([mask, is_token[:, :-1].to(mask)], dim=1)
    with recording(model, GatedCrossAttentionLayer) as gated, eager_language_model(model):
        outputs = model(
            input_ids=step_ids,
            attention_mask=whole,
            visual_states=prompt.visual_states,
            use_cache=True,
            output_attentions=True,
            **cache_argument(cache_of(prompt)),
        )
    keys = whole.shape[1]  # layers with a sliding window have the last keys only
    language = torch.stack([nn.functional.pad(part, (keys - part.shape[-1], 0)) for part in outputs.attentions])
    return language, gated, bridge, prompt.image_hidden_states


def _attend_from_decoder(model, inputs: dict, answer_ids: torch.Tensor, is_token: torch.Tensor) -> tuple:
    """The same of an encoder-decoder: cross-attention of its decoder; the encoder runs with its own attention."""
    labels = answer_ids.masked_fill(~is_token, -100)
    with recording(model) as bridge:
        prompt = model(**inputs, labels=labels[:, :1])
    with without_compilation(), eager_language_model(model):
        outputs = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=prompt.encoder_last_hidden_state),
            attention_mask=inputs.get("attention_mask"),
            labels=labels,
            output_attentions=True,
        )
    return torch.stack(list(outputs.cross_attentions)), {}, bridge, prompt.image_hidden_states


def _images_of_tokens(model, input_ids: torch.Tensor, visual_tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The image in its row that each token is a visual token of, `(batch, tokens)`, -1 for others; images per row."""
    is_image = input_ids == model.config.image_token_id
    in_prompt = model.config.visual_tokens_in_prompt
    counts = [len(tokens) if in_prompt else 1 for tokens in ([] if visual_tokens is None else visual_tokens)]
    counts = torch.tensor(counts, dtype=torch.long, device=input_ids.device)
    found = torch.full_like(input_ids, -1)
    found[is_image] = torch.arange(len(counts), device=input_ids.device).repeat_interleave(counts)
    last = found.amax(dim=1)
    first = torch.where(is_image, found, len(counts)).amin(dim=1)
    num_images = torch.where(is_image.any(dim=1), last - first + 1, 0)
    found = torch.where(is_image & in_prompt, found - first[:, None], -1)
    return found, num_images


__all__ = [
    "AnswerAttention",
    "answer_attention",
    "bridge_attention",
    "check_prompts",
    "eager_language_model",
    "gated_weights",
    "in_eval_mode",
    "on_device",
    "patch_attention",
    "qformer_weights",
    "recording",
    "resampler_weights",
    "without_compilation",
]
