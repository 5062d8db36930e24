"""Estimates and optimisers that several packages share, against closed forms, torch and each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatcompress.knapsack import allocate, best_choice
from flatcompress.numerics import hutchinson, kl


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_that_of_torchs_distributions(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, target = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    distribution = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(
        distribution(logits=target / temperature), distribution(logits=logits / temperature)
    )
    assert torch.allclose(kl(logits, target, temperature).sum(-1), expected)


def test_the_trace_of_a_diagonal_matrix_needs_one_draw_and_a_block_without_part_counts_nothing():
    diagonal = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]]), torch.tensor([4.0])]

    def draw(j: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(j)
        return [torch.randint(0, 2, d.shape, generator=generator) * 2.0 - 1 for d in diagonal]

    found = hutchinson(draw, lambda v: [d * s for d, s in zip(diagonal[:2], v)] + [None], draws=1)
    assert found == [3.0, 3.0, 0.0]


@given(st.integers(0, 10_000))
def test_both_knapsacks_find_the_best_total_at_every_budget(seed):
    rng = np.random.default_rng(seed)
    costs = {str(row): {c: float(rng.integers(0, 6)) for c in range(3)} for row in range(3)}
    prices = {str(row): {c: int(rng.integers(0, 6)) for c in range(3)} for row in range(3)}
    least = sum(min(row.values()) for row in prices.values())
    chosen = best_choice(
        [-np.array(list(row.values())) for row in costs.values()],
        [np.array(list(row.values())) for row in prices.values()],
        capacity=least + 5,
    )
    for budget in range(least, least + 6):
        one = allocate(costs, prices, float(budget))
        every = {name: int(options[budget]) for name, options in zip(costs, chosen)}
        best = min(
            sum(costs[n][c] for n, c in zip(costs, picks))
            for picks in itertools.product(range(3), repeat=3)
            if sum(prices[n][c] for n, c in zip(costs, picks)) <= budget
        )
        for picks in (one, every):
            assert sum(costs[n][c] for n, c in picks.items()) == best
            assert sum(prices[n][c] for n, c in picks.items()) <= budget
