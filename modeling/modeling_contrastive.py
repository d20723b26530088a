"""Contrastive learning of images and texts: similarities, hard negatives, and gathering from all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def num_processes() -> int:
    """Number of processes of the distributed run; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Concatenate the tensors of all processes; each process receives the gradient of its own tensor."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, tensor.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Gather the tensors of all processes, with gradients.

    Args:
        tensor: `(batch, ...)`, of the same shape in every process.

    Returns:
        `(processes * batch, ...)`; the tensor itself if there is one process.
    """
    return tensor if num_processes() == 1 else _Gather.apply(tensor)


def gather_texts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the texts of all processes, padded to the longest.

    Args:
        input_ids: `(batch, tokens)`.
        attention_mask: `(batch, tokens)`.
        pad_token_id: Id of the padding token.

    Returns:
        Ids and mask, both `(processes * batch, longest)`.

    Raises:
        ValueError: The processes have batches of different sizes.
    """
    if num_processes() == 1:
        return input_ids, attention_mask
    shapes = gather(torch.tensor([input_ids.shape], device=input_ids.device))  # (processes, 2)
    if shapes[:, 0].min() != shapes[:, 0].max():
        raise ValueError(
            f"The processes have batches of {shapes[:, 0].tolist()} pairs; stage 1 compares all with all and needs "
            "equal ones. Drop the last, smaller batch (dataloader_drop_last=True)."
        )
    missing = int(shapes[:, 1].max()) - input_ids.shape[1]
    input_ids = nn.functional.pad(input_ids, (0, missing), value=pad_token_id)
    return gather(input_ids), gather(nn.functional.pad(attention_mask, (0, missing)))


def similarities_of(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every image and every text, taken from the query token that is closest to the text.

    Args:
        image_features: `(num_images, num_query_tokens, embed_dim)`, unit vectors.
        text_features: `(num_texts, embed_dim)`, unit vectors.

    Returns:
        `(num_images, num_texts)`.
    """
    return torch.einsum("iqd,td->itq", image_features, text_features).amax(dim=-1)


def draw_negatives(
    logits: torch.Tensor, positives: torch.Tensor, floor: float = 0.0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw one hard negative per row, with a probability that grows with the similarity.

    Args:
        logits: `(rows, candidates)`, similarities divided by the temperature.
        positives: Boolean, `(rows, candidates)`, true for candidates that must not be drawn.
        floor: Added to every candidate's probability, so that dissimilar ones are drawn at times.
        generator: Random number generator; `None` takes the device's default one.

    Returns:
        Indices of candidates, `(rows,)`.

    Raises:
        ValueError: A row has no negatives.
    """
    if bool(positives.all(dim=1).any()):
        raise ValueError(
            "No negatives to draw from: image-text matching needs at least two pairs in the batch, of different "
            "images. Use a larger batch, or itm_weight=0."
        )
    logits = logits.detach().float()
    if floor:
        weights = (logits.softmax(dim=1) + floor).masked_fill(positives, 0.0)
    else:
        weights = logits.masked_fill(positives, -torch.inf).softmax(dim=1)
    if generator is not None:
        weights = weights.to(generator.device)
    return torch.multinomial(weights, 1, generator=generator)[:, 0].to(logits.device)


__all__ = ["draw_negatives", "gather", "gather_texts", "num_processes", "similarities_of"]
