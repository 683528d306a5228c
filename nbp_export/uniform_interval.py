"""Bounds on the uniforms that can draw a token if the logits have an error, for the comparison of drawn tokens."""

import numpy as np

from nbp_engines.sampling import Sampling


def uniform_interval(logits: np.ndarray, token: int, settings: Sampling, error: float) -> tuple[float, float]:
    """Return bounds on the uniforms that can draw a token if each logit may be wrong by up to `error`.

    At temperature τ, a token's weight exp(logit/τ) is then known up to a factor of exp(±error/τ). The share of some
    tokens in the total is smallest if their weights are small and all others are large. A token certainly stays in
    top-k if it exceeds the k-th largest logit by twice the error, and possibly stays if it is less by at most twice the
    error. The same margin decides whether a token precedes another in top-p. The interval covers all possible cases, so
    it may be too wide but never too narrow. Without an error and without equal logits, it is the token's interval in
    the cumulative distribution.

    Args:
        logits: float64 [V].
        token: the id of the token.
        settings: the settings of sampling.
        error: the largest absolute error of a logit.

    Returns:
        The lower and the upper bound; both are infinite if the token cannot be drawn.
    """
    never = (np.inf, np.inf)
    if settings.temperature == 0:
        return (0.0, 1.0) if logits[token] >= logits.max() - 2 * error else never
    scaled, delta = logits / settings.temperature, error / settings.temperature
    drop = max(0, scaled.size - settings.top_k)
    smallest = np.partition(scaled, drop)[drop] if drop else -np.inf
    certain, possible = scaled >= smallest + 2 * delta, scaled >= smallest - 2 * delta
    weights = np.exp(scaled - scaled.max())
    small, large = weights * np.exp(-delta) * certain, weights * np.exp(delta) * possible

    ranked = np.argsort(-scaled, kind="stable")
    descending = -scaled[ranked]
    small_sums, large_sums = (np.append(0.0, each[ranked].cumsum()) for each in (small, large))
    # The number of tokens that certainly precede each token, and the number that possibly do, the token included.
    first = np.searchsorted(descending, -scaled - 2 * delta, side="left")
    last = np.searchsorted(descending, -scaled + 2 * delta, side="right")
    before, after = small_sums[first], large_sums[-1] - large_sums[first]
    possible &= before < settings.top_p * (before + after)
    before, after = large_sums[last] - large, small_sums[-1] - small_sums[last] + small
    certain &= before < settings.top_p * (before + after)
    if not possible[token]:
        return never
    small, large = small * certain, large * possible
    lower = _share(small[:token].sum(), large[token:].sum())
    return lower, _share(large[: token + 1].sum(), small[token + 1 :].sum())


def _share(part: float, rest: float) -> float:
    return float(part / (part + rest))
