"""Whether the queries of a Q-Former, or the latents of a resampler, differ, and whether each has a part of its own.

Sources: effective rank as in Roy and Vetterli, "The effective rank: A measure of effective dimensionality" (EUSIPCO
2007); the divergence of several distributions as in Lin, "Divergence measures based on the Shannon entropy" (1991).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


def _check(tensor: torch.Tensor, name: str, shape: str, images: int = 1) -> torch.Tensor:
    if tensor.ndim != 3 or len(tensor) < images or tensor.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} of at least {images} images.")
    return tensor.detach().double()


# ---------------------------------------------------------------------- tokens


def similarity_within(tokens: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of the tokens of an image.

    Args:
        tokens: `(num_images, num_queries, width)`, see `inspection_gates.visual_tokens`.

    Returns:
        `(num_images, num_queries, num_queries)`.

    Raises:
        ValueError: The tokens have another shape.
    """
    tokens = nn.functional.normalize(_check(tokens, "tokens", "(num_images, num_queries, width)"), dim=-1)
    return (tokens @ tokens.transpose(1, 2)).float()


def similarity_across(tokens: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of the same query's tokens in different images.

    Args:
        tokens: `(num_images, num_queries, width)`.

    Returns:
        `(num_queries, num_images, num_images)`. All ones: the query says the same about every picture.

    Raises:
        ValueError: The tokens have another shape.
    """
    return similarity_within(_check(tokens, "tokens", "(num_images, num_queries, width)").transpose(0, 1))


def mean_off_diagonal(similarity: torch.Tensor) -> torch.Tensor:
    """Mean of each square matrix without its diagonal.

    Args:
        similarity: `(..., n, n)` with n of at least 2.

    Returns:
        `(...)`.

    Raises:
        ValueError: The matrices are 1 x 1.
    """
    count = similarity.shape[-1]
    if count < 2:
        raise ValueError("A similarity to others needs at least two queries or images; there is one.")
    diagonal = similarity.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (similarity.sum(dim=(-2, -1)) - diagonal) / (count * (count - 1))


def effective_rank(tokens: torch.Tensor) -> torch.Tensor:
    """How many directions the tokens of an image span: the exponential of the entropy of their singular values.

    Args:
        tokens: `(num_images, num_queries, width)`.

    Returns:
        `(num_images,)`: 1 if all tokens are multiples of one, at most the smaller of `num_queries` and `width`.

    Raises:
        ValueError: The tokens have another shape.
    """
    values = torch.linalg.svdvals(_check(tokens, "tokens", "(num_images, num_queries, width)"))
    shares = values / values.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(dim=-1).exp().float()


# ---------------------------------------------------------------------- attention


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy of attention, as a share of the largest possible one.

    Args:
        weights: `(..., num_patches)`; every row sums to one.

    Returns:
        `(...)`: 0 if a query looks at one patch, 1 if at all alike.
    """
    largest = torch.log(torch.tensor(float(max(weights.shape[-1], 2))))
    return torch.special.entr(weights.float()).sum(dim=-1) / largest


def centre_of_mass(weights: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Where attention lies in the mean.

    Args:
        weights: `(..., num_patches)`.
        grid: `(rows, columns)`: number of the patch in each cell, see `inspection_geometry.Grid`.

    Returns:
        `(..., 2)`: from the left and from the top, as shares of the grid's width and height.
    """
    cells = weights.float()[..., grid]  # (..., rows, columns)
    cells = cells / cells.sum(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(cells.dtype).tiny)
    rows, columns = grid.shape
    x = (torch.arange(columns, device=cells.device) + 0.5) / columns
    y = (torch.arange(rows, device=cells.device) + 0.5) / rows
    return torch.stack([(cells.sum(dim=-2) * x).sum(dim=-1), (cells.sum(dim=-1) * y).sum(dim=-1)], dim=-1)


def divergence(weights: torch.Tensor) -> torch.Tensor:
    """How much distributions differ: the entropy of their mean, less the mean of their entropies, in nats.

    Args:
        weights: `(..., count, num_patches)`.

    Returns:
        `(...)`: 0 if they are all the same, at most the logarithm of their number.
    """
    weights = weights.double()
    of_mean = torch.special.entr(weights.mean(dim=-2)).sum(dim=-1)
    return (of_mean - torch.special.entr(weights).sum(dim=-1).mean(dim=-1)).float()


@dataclass
class Specialisation:
    """Whether each query has a place of its own in all pictures.

    Args:
        score: Divergence between the queries' mean maps, in nats: 0 if all look alike.
        null_mean: The mean of that score if it does not matter which query is which.
        null_95: What 95 % of those scores lie below.
        p_value: Share of them that reach the score, the score itself counted.
        by_picture: Divergence of a query's maps between pictures, the mean over queries, in nats: 0 if every query
            looks at the same place in all pictures.
    """

    score: float
    null_mean: float
    null_95: float
    p_value: float
    by_picture: float


def specialisation(weights: torch.Tensor, permutations: int = 199, seed: int = 0) -> Specialisation:
    """Compare queries' places over several pictures.

    In the null hypothesis queries differ within a picture, but not the same way in all pictures: the queries of each
    image are permuted, and the score is computed again.

    Args:
        weights: `(num_images, num_queries, num_patches)`, see `inspection_attention.patch_attention`; every row sums to
            one.
        permutations: How many times.
        seed: Random seed of the permutations.

    Raises:
        ValueError: There are fewer than two pictures or queries.
    """
    weights = _check(weights, "weights", "(num_images, num_queries, num_patches)", images=2).cpu()
    images, queries, _ = weights.shape
    if queries < 2:
        raise ValueError("Specialisation compares queries; there is one.")
    generator = torch.Generator().manual_seed(seed)
    score = float(divergence(weights.mean(dim=0)))
    null = []
    for _ in range(permutations):
        order = torch.rand(images, queries, generator=generator).argsort(dim=1)
        null.append(float(divergence(weights.gather(1, order[..., None].expand_as(weights)).mean(dim=0))))
    drawn = torch.tensor(null)
    return Specialisation(
        score=score,
        null_mean=float(drawn.mean()),
        null_95=float(drawn.quantile(0.95)),
        p_value=(1 + int((drawn >= score).sum())) / (1 + permutations),
        by_picture=float(divergence(weights.transpose(0, 1)).mean()),
    )


def query_table(weights: torch.Tensor, grid: torch.Tensor) -> list[dict]:
    """What each query attends to.

    Args:
        weights: `(num_images, num_queries, num_patches)`.
        grid: As for `centre_of_mass`.

    Returns:
        One row per query: `query`, `entropy` (mean over images), `x` and `y` (centre of its mean map) and `moves`, the
        divergence of its maps between pictures, in nats.
    """
    mean = weights.mean(dim=0)
    centres, spread = centre_of_mass(mean, grid), entropy(weights).mean(dim=0)
    moves = divergence(weights.transpose(0, 1))
    return [
        {
            "query": number,
            "entropy": float(spread[number]),
            "x": float(centres[number, 0]),
            "y": float(centres[number, 1]),
            "moves": float(moves[number]),
        }
        for number in range(weights.shape[1])
    ]


__all__ = [
    "Specialisation",
    "centre_of_mass",
    "divergence",
    "effective_rank",
    "entropy",
    "mean_off_diagonal",
    "query_table",
    "similarity_across",
    "similarity_within",
    "specialisation",
]
