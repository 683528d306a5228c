"""Compares drawing in numpy with the reference in PyTorch, which has its own tests."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbp_engines.sampling import GREEDY, Sampling, draw, nucleus, sample
from nbp_errors import UsageError
from nbp_reference import sampling as reference

LAST = 1 - 2**-53  # the largest uniform that Philox's 53 bits can give

# Whole numbers make ties common.
logit_lists = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=12)
settings = st.builds(
    Sampling, st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 14), st.sampled_from([0.05, 0.33, 0.77, 0.9, 1.0])
)


def by_reference(logits: np.ndarray, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
    tokens = reference.sample(
        torch.from_numpy(logits), torch.from_numpy(uniforms), settings.temperature, settings.top_k, settings.top_p
    )
    return tokens.numpy()


def evenly(count: int) -> np.ndarray:
    """Return uniforms over the whole interval, including both ends."""
    return np.linspace(0.0, LAST, count)


@given(logit_lists, settings)
def test_small_cases_agree_ties_at_the_edges_included(logits: list[float], settings: Sampling) -> None:
    uniforms = evenly(101)
    rows = np.tile(np.array(logits, np.float32), (len(uniforms), 1))
    assert sample(rows, uniforms, settings).tolist() == by_reference(rows, uniforms, settings).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("settings", [Sampling(), Sampling(0.7, 50, 0.95), Sampling(1.3, 1, 0.5)])
@pytest.mark.parametrize(("vocab", "rows"), [(1000, 512), (64_000, 32)])
def test_random_logits_agree(vocab: int, rows: int, settings: Sampling, dtype: type) -> None:
    rng = np.random.default_rng(vocab)
    # In half precision thousands of the 64,000 logits are equal, so there are ties at both edges.
    logits: np.ndarray = (3 * rng.standard_normal((2, rows // 2, vocab))).astype(dtype)
    uniforms = rng.uniform(size=(2, rows // 2))
    uniforms[:, 0], uniforms[:, 1] = 0.0, LAST
    tokens = sample(logits, uniforms, settings)
    assert tokens.dtype == np.int64
    assert np.array_equal(tokens, by_reference(logits, uniforms, settings))


def test_ties_with_the_kth_logit_are_kept() -> None:
    logits = np.array([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    kept = nucleus(logits, Sampling(top_k=2, top_p=1.0)) > 0
    assert kept.tolist() == [False, True, True, True, True, False]


def test_the_token_that_crosses_top_p_is_kept_and_ties_are_kept_by_id() -> None:
    logits = np.log([0.1, 0.2, 0.2, 0.2, 0.3])
    kept = nucleus(logits, Sampling(top_p=0.6)) > 0
    assert kept.tolist() == [False, True, True, False, True]


@given(logit_lists, settings, st.floats(0, LAST))
def test_only_tokens_of_the_nucleus_are_drawn(logits: list[float], settings: Sampling, uniform: float) -> None:
    row = np.array(logits)
    probs = nucleus(row, settings)
    token = int(sample(row[None], np.array([uniform]), settings)[0])
    assert probs[token] > 0
    # No dropped token has a larger logit than a kept one.
    assert row[probs == 0].max(initial=-np.inf) <= row[probs > 0].min()


@given(logit_lists, settings)
def test_the_ends_of_the_noise_draw_the_first_and_the_last_kept_token(logits: list[float], settings: Sampling) -> None:
    rows = np.tile(np.array(logits), (2, 1))
    kept = np.flatnonzero(nucleus(rows[0], settings))
    assert sample(rows, np.array([0.0, LAST]), settings).tolist() == [kept[0], kept[-1]]


@pytest.mark.parametrize("uniform", [LAST, 1.0])
def test_a_draw_never_leaves_the_kept_tokens(uniform: float) -> None:
    """Not even if the uniform, or its product with the total, is rounded up to 1."""
    rng = np.random.default_rng(0)
    probs = rng.uniform(size=(500, 37)) * 10.0 ** rng.integers(-300, 0, (500, 1))
    probs[:, -1] = 0.0
    assert (draw(probs, np.full(500, uniform)) == 35).all()


@given(logit_lists)
def test_greedy_takes_the_first_of_the_largest(logits: list[float]) -> None:
    assert sample(np.array([logits]), np.array([LAST]), GREEDY)[0] == logits.index(max(logits))


def test_the_logits_are_not_changed() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 50))
    before = logits.copy()
    sample(logits, np.array([0.2, 0.8]), Sampling(top_k=5))
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 9.9e-7, 0.0])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float) -> None:
    rows = np.array([[-3.0, 5.0, 4.99, 5.0], [1e4, -1e4, 0.0, 1.0]], np.float32)
    assert Sampling(temperature) == GREEDY
    for uniform in (0.0, 0.5, LAST):
        assert sample(rows, np.full(2, uniform), Sampling(temperature)).tolist() == [1, 0]


@given(st.floats(1e-6, 1e300), st.floats(0, LAST))
def test_every_other_temperature_draws_by_the_rule(temperature: float, uniform: float) -> None:
    rows = np.array([[-6e4, 6e4, 5.9e4, 0.0]], np.float32)
    probs = nucleus(rows, Sampling(temperature))
    assert np.isfinite(probs).all()
    assert probs.sum() > 0.89
    assert 0 <= sample(rows, np.array([uniform]), Sampling(temperature))[0] < 4


@pytest.mark.parametrize(
    "changes", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="temperature must be at least 0"):
        Sampling(**changes)
