"""Sampling, compared with the definition computed token by token in Python floats."""

from math import exp, fsum

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbp_reference.sampling import sample

# Whole numbers, so that ties are common.
logit_lists = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=12)


def kept_probabilities(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """The probability of every token that top-k and then top-p keep, by their definitions."""
    smallest = sorted(logits, reverse=True)[: min(top_k, len(logits))][-1]
    weights = {i: exp((x - max(logits)) / temperature) for i, x in enumerate(logits) if x >= smallest}
    total, kept, reached = fsum(weights.values()), {}, 0.0
    for i in sorted(weights, key=lambda i: (-weights[i], i)):
        if reached >= top_p:
            break
        kept[i] = weights[i] / total
        reached += kept[i]
    return {i: p / fsum(kept.values()) for i, p in kept.items()}


@given(
    logit_lists, st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 14), st.sampled_from([0.05, 0.33, 0.77, 0.91, 1.0])
)
def test_evenly_spread_noise_draws_each_token_in_proportion(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    draws = 2000
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = sample(torch.tensor(logits).expand(draws, -1), uniforms, temperature, top_k, top_p)
    assert (tokens.diff() >= 0).all(), "the inverse of the cumulative distribution is in vocabulary order"
    counts = torch.bincount(tokens, minlength=len(logits)).tolist()
    kept = kept_probabilities(logits, temperature, top_k, top_p)
    for token, drawn in enumerate(counts):
        assert drawn == pytest.approx(draws * kept.get(token, 0.0), abs=1.001)
        if token not in kept:
            assert drawn == 0


@given(logit_lists, st.sampled_from([0.0, 1 - 2**-53]))
def test_the_ends_of_the_noise_draw_kept_tokens(logits: list[float], uniform: float) -> None:
    kept = kept_probabilities(logits, 1.0, 16_000, 0.9)
    token = sample(torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64)).item()
    assert token == (max(kept) if uniform else min(kept))


@given(logit_lists)
def test_temperature_zero_is_greedy_and_takes_the_first_of_equals(logits: list[float]) -> None:
    assert sample(torch.tensor([logits]), torch.tensor([0.99]), temperature=0) == logits.index(max(logits))


def test_a_block_is_drawn_token_by_token() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(2, 3, 50, generator=rng), torch.rand(2, 3, generator=rng)
    together = sample(logits, uniforms)
    assert together.shape == (2, 3)
    assert together.dtype == torch.int64
    alone = [
        [sample(row, u).item() for row, u in zip(*pair, strict=True)] for pair in zip(logits, uniforms, strict=True)
    ]
    assert together.tolist() == alone
