"""Fréchet and kernel distances: closed forms, scipy's square root, parts that are merged, and intervals."""

from collections.abc import Sequence

import click
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from nbp_bench.frechet import LEAST_GROUPS, Moments, frechet_distance, jackknife, kernel_distance, merge


def normal(seed: int, count: int, dimensions: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (count, dimensions))


def by_square_root(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula."""
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(sigma_a @ sigma_b))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sigma_a + sigma_b - 2 * root))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(Moments.of(a), Moments.of(b))


@pytest.mark.parametrize(("count", "dimensions"), [(200, 5), (1000, 60)])
def test_it_equals_the_square_root_where_that_is_stable(count: int, dimensions: int) -> None:
    a, b = normal(0, count, dimensions), normal(1, count + 7, dimensions, 1.5, 0.3)
    assert distance(a, b) == pytest.approx(by_square_root(a, b), rel=1e-9)


def test_closed_forms() -> None:
    a = normal(0, 50, 8)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
    assert distance(a, a + 3) == pytest.approx(8 * 9)
    # Σb = 4 Σa, so that the trace term is tr Σa · (1 + 4 − 2·2).
    centred = a - a.mean(0)
    assert distance(centred, 2 * centred) == pytest.approx(np.trace(np.cov(centred, rowvar=False)))
    # Fewer features than dimensions, on orthogonal lines: nothing is shared.
    line = np.array([[1.0, 0], [-1, 0]])
    assert distance(line, line[:, ::-1]) == pytest.approx(4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 99))
def test_parts_merge_to_the_whole(sizes: list[int], dimensions: int, seed: int) -> None:
    parts = [normal(seed + i, size, dimensions, 1 + i, 100 * i) for i, size in enumerate(sizes)]
    merged, whole = merge([Moments.of(part) for part in parts]), Moments.of(np.concatenate(parts))
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.factor.T @ merged.factor, whole.factor.T @ whole.factor, atol=1e-6)
    assert len(merged.factor) <= dimensions


def test_the_kernel_distance_has_no_bias_and_sees_a_shift() -> None:
    same = [kernel_distance(normal(2 * i, 40, 6), normal(2 * i + 1, 40, 6)) for i in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0 < max(same)
    assert kernel_distance(normal(0, 40, 6), normal(1, 40, 6, shift=1.0)) > 5 * np.std(same)


def test_the_interval_of_a_mean_is_students() -> None:
    values = list(normal(0, 20, 1)[:, 0])
    found = jackknife(values, lambda group: float(np.mean(group)))
    assert found.low is not None
    assert found.high is not None
    error = np.std(values, ddof=1) / np.sqrt(20)
    assert found.high - found.value == pytest.approx(2.093024 * error, rel=1e-6)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert jackknife(values[: LEAST_GROUPS - 1], lambda group: float(np.mean(group))).low is None


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((0, 3)), "at least one row"),
        (np.zeros(3), "must be a matrix"),
        (np.array([[1.0, 2], [np.nan, 0]]), "feature 1 is not finite"),
        (np.array([[np.inf, 2.0]]), "feature 0 is not finite"),
    ],
)
def test_bad_features_are_refused(features: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moments.of(features)


def test_a_single_feature_has_no_distance() -> None:
    one, many = normal(0, 1, 3), normal(1, 5, 3)
    with pytest.raises(ValueError, match="at least 2 features"):
        distance(one, many)
    with pytest.raises(ValueError, match="at least 2 features"):
        kernel_distance(many, one)
    with pytest.raises(ValueError, match="no moments"):
        merge([])


@pytest.mark.slow
def test_the_interval_covers_the_expected_distance(capsys: pytest.CaptureFixture[str]) -> None:
    """A simulation: 32 source windows with 4 correlated clips each, real, fake by a reference, and fake by an engine.

    The engine differs from the reference in a tenth of the windows. The truth is the mean over all repetitions, which
    is the expected distance at this N, bias included.
    """
    repetitions, windows, clips, dimensions = 300, 32, 4, 24
    rng = np.random.default_rng(0)
    fvds, deltas = [], []
    for _ in range(repetitions):
        scene = rng.normal(size=(3, windows, 1, dimensions))
        real, reference, other = scene * 0.7 + rng.normal(size=(3, windows, clips, dimensions)) * 0.7
        reference = reference * 1.2 + 0.2
        diverged = rng.random((windows, 1, 1)) < 0.1
        engine = np.where(diverged, other * 1.2 + 0.2, reference)
        groups = [tuple(map(Moments.of, window)) for window in zip(real, reference, engine, strict=True)]

        def fvd(chosen: Sequence[tuple[Moments, ...]], fake: int) -> float:
            return frechet_distance(*(merge([window[i] for window in chosen]) for i in (fake, 0)))

        fvds.append(jackknife(groups, lambda chosen: fvd(chosen, 1)))
        deltas.append(jackknife(groups, lambda chosen: fvd(chosen, 2) - fvd(chosen, 1)))
    for name, intervals in (("FVD", fvds), ("paired difference of FVDs", deltas)):
        truth = np.mean([interval.value for interval in intervals])
        covered = np.mean([(i.low or 0) <= truth <= (i.high or 0) for i in intervals])
        with capsys.disabled():
            click.echo(f"\n{name}: the 95% intervals of {repetitions} repetitions cover {covered:.1%}")
        assert 0.9 <= covered <= 0.995
