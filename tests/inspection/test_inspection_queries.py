"""Queries: similarities, effective rank, entropy, places, and specialisation against chance."""

from __future__ import annotations

import math

import pytest
import torch

from vlbridge.inspection.inspection_queries import (
    centre_of_mass,
    divergence,
    effective_rank,
    entropy,
    mean_off_diagonal,
    query_table,
    similarity_across,
    similarity_within,
    specialisation,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.core
def test_similarities_are_cosines():
    tokens = drawn(3, 4, 5)
    within, across = similarity_within(tokens), similarity_across(tokens)
    assert within.shape == (3, 4, 4) and across.shape == (4, 3, 3)
    cosine = torch.nn.functional.cosine_similarity
    assert float(within[1, 0, 2]) == pytest.approx(float(cosine(tokens[1, 0], tokens[1, 2], dim=0)), abs=1e-6)
    assert float(across[3, 0, 2]) == pytest.approx(float(cosine(tokens[0, 3], tokens[2, 3], dim=0)), abs=1e-6)
    others = [float(within[0, a, b]) for a in range(4) for b in range(4) if a != b]
    assert float(mean_off_diagonal(within)[0]) == pytest.approx(sum(others) / len(others), abs=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        mean_off_diagonal(torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"shape \(4, 5\)"):
        similarity_within(tokens[0])


def test_effective_rank_counts_directions():
    basis = torch.eye(6)[None]
    assert float(effective_rank(basis)) == pytest.approx(6, rel=1e-5)
    assert float(effective_rank(basis[:, :1].expand(1, 6, 6))) == pytest.approx(1, rel=1e-4)
    values = torch.linalg.svdvals(drawn(4, 3).double())
    shares = values / values.sum()
    expected = math.exp(-sum(float(share) * math.log(float(share)) for share in shares))
    assert float(effective_rank(drawn(4, 3)[None])) == pytest.approx(expected, rel=1e-5)


def test_entropy_and_centre():
    one = torch.zeros(12)
    one[5] = 1
    grid = torch.arange(12).unflatten(0, (3, 4))
    assert float(entropy(one)) == 0 and float(entropy(torch.full((12,), 1 / 12))) == pytest.approx(1)
    assert centre_of_mass(one, grid).tolist() == pytest.approx([1.5 / 4, 1.5 / 3])
    assert centre_of_mass(torch.full((12,), 1 / 12), grid).tolist() == pytest.approx([0.5, 0.5])


def test_divergence_is_bounded_by_the_number_of_maps():
    apart = torch.eye(5)
    assert float(divergence(apart)) == pytest.approx(math.log(5))
    assert float(divergence(apart[:1].expand(5, 5))) == pytest.approx(0, abs=1e-6)


def test_queries_with_places_of_their_own_are_told_from_chance():
    places = torch.eye(6)[None].expand(8, 6, 6) * 3 + drawn(8, 6, 6).square()
    found = specialisation(places / places.sum(dim=-1, keepdim=True), permutations=99)
    assert found.score > found.null_95 > 0 and found.p_value == pytest.approx(0.01)
    assert found.null_mean < found.null_95


def test_queries_that_take_turns_are_not_specialised():
    """The same maps, but in every picture another query has each."""
    maps = torch.softmax(3 * drawn(6, 9), dim=-1)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(k)) for k in range(10)])
    found = specialisation(maps[order], permutations=99)
    assert found.p_value > 0.05 and found.by_picture > 0.1


def test_the_null_is_level():
    """Under the null hypothesis p-values below a fifth come up about a fifth of the time."""
    low = 0
    for seed in range(60):
        maps = torch.softmax(drawn(4, 5, 9, seed=seed), dim=-1)
        low += specialisation(maps, permutations=19, seed=seed).p_value <= 0.2
    assert 3 <= low <= 24  # 12 expected, standard deviation 3.1


def test_table_and_refusals():
    maps = torch.softmax(drawn(3, 4, 6), dim=-1)
    rows = query_table(maps, torch.arange(6).unflatten(0, (2, 3)))
    assert [row["query"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["entropy"] == pytest.approx(float(entropy(maps)[:, 2].mean()))
    assert rows[1]["moves"] == pytest.approx(float(divergence(maps[:, 1])), abs=1e-6)
    with pytest.raises(ValueError, match="at least 2 images"):
        specialisation(maps[:1])
    with pytest.raises(ValueError, match="compares queries; there is one"):
        specialisation(maps[:, :1])
