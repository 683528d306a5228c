"""The uniforms that can draw a token from logits known up to an error: how strictly drawn tokens can be compared."""

import numpy as np

from nbp_engines.sampling import Sampling


def reach(logits: np.ndarray, token: int, settings: Sampling, error: float) -> tuple[float, float]:
    """The uniforms with which a token can be drawn, from the least to the most, if every logit may be off by `error`.

    With temperature τ a token's weight exp(logit/τ) is then known up to a factor exp(±error/τ). A share of the total is
    least where its own weights are small and all others are large. A token surely stays in top-k if it exceeds the k-th
    largest logit by twice the error, and may stay if it falls short by no more than that; likewise it comes before
    another in top-p. The interval takes in every case, so it can only be too wide; without an error, and without equal
    logits, it is the token's interval of the cumulative distribution.

    Args:
        logits: float64 [V].
        token: whose interval it is.
        settings: of the draw.
        error: largest absolute error of a logit.

    Returns:
        The bounds; infinity for both if the token cannot be drawn at all.
    """
    never = (np.inf, np.inf)
    if settings.temperature == 0:
        return (0.0, 1.0) if logits[token] >= logits.max() - 2 * error else never
    scaled, delta = logits / settings.temperature, error / settings.temperature
    drop = max(0, scaled.size - settings.top_k)
    smallest = np.partition(scaled, drop)[drop] if drop else -np.inf
    sure, possible = scaled >= smallest + 2 * delta, scaled >= smallest - 2 * delta
    weights = np.exp(scaled - scaled.max())
    small, large = weights * np.exp(-delta) * sure, weights * np.exp(delta) * possible

    ranked = np.argsort(-scaled, kind="stable")
    descending = -scaled[ranked]
    small_sums, large_sums = (np.append(0.0, each[ranked].cumsum()) for each in (small, large))
    # How many tokens come before each one for sure, and how many may, itself included.
    first = np.searchsorted(descending, -scaled - 2 * delta, side="left")
    last = np.searchsorted(descending, -scaled + 2 * delta, side="right")
    before, after = small_sums[first], large_sums[-1] - large_sums[first]
    possible &= before < settings.top_p * (before + after)
    before, after = large_sums[last] - large, small_sums[-1] - small_sums[last] + small
    sure &= before < settings.top_p * (before + after)
    if not possible[token]:
        return never
    small, large = small * sure, large * possible
    least = _share(small[:token].sum(), large[token:].sum())
    return least, _share(large[: token + 1].sum(), small[token + 1 :].sum())


def _share(part: float, rest: float) -> float:
    return float(part / (part + rest))
