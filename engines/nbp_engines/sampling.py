"""How a token is drawn from logits: top-k, then top-p, then the inverse of the cumulative distribution.

Everything in fp64 and in vocabulary order, so that equal logits and equal noise give equal tokens in every runtime.
"""

from dataclasses import dataclass

import numpy as np

from nbp_errors import UsageError

# Below it, dividing by the temperature would end in infinities, and no other token than the likeliest is ever drawn.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """The paper's settings. Temperature 0 means greedy, the first of the largest logits.

    A temperature below LEAST_TEMPERATURE becomes 0.

    Raises UsageError for a setting that means nothing.
    """

    temperature: float = 1.0
    top_k: int = 16_000
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 1 and 0 < self.top_p <= 1):
            raise UsageError(f"{self}: temperature must be at least 0, top_k at least 1, top_p above 0 and up to 1")
        if self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)


# Probabilities worked on at once: 256 rows of 64,000 would touch a gigabyte of fresh memory.
IN_CACHE = 2**16
GREEDY = Sampling(temperature=0.0)


def nucleus(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities after top-k and top-p, not renormalised: float64 [..., V] of logits [..., V].

    Ties with the k-th logit stay in; the token that crosses top-p stays in; among equals lower ids come first.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    drop = scaled.shape[-1] - sampling.top_k
    if drop > 0:
        smallest = np.partition(scaled, drop, axis=-1)[..., drop, None]
        scaled[scaled < smallest] = -np.inf
    probs: np.ndarray = np.exp(scaled - scaled.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    ranked = -np.sort(-probs, axis=-1)  # values alone: far cheaper than ranking the tokens
    kept = (ranked.cumsum(-1) - ranked < sampling.top_p).sum(-1, keepdims=True)
    least = np.take_along_axis(ranked, kept - 1, -1)
    ties = probs == least
    room = kept - (probs > least).sum(-1, keepdims=True)
    probs[(probs < least) | (ties & (ties.cumsum(-1) > room))] = 0.0
    return probs


def sample(logits: np.ndarray, uniforms: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Draw one token a row: int64 [...] of logits [..., V] and uniforms [...] in [0,1)."""
    if sampling.temperature == 0:
        return np.asarray(logits.argmax(-1))
    rows, noise = logits.reshape(-1, logits.shape[-1]), uniforms.reshape(-1)
    few = max(1, IN_CACHE // logits.shape[-1])
    parts = (slice(start, start + few) for start in range(0, len(rows), few))
    tokens = np.concatenate([draw(nucleus(rows[part], sampling), noise[part]) for part in parts])
    return tokens.reshape(uniforms.shape)


def draw(probs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """The first token whose cumulative probability exceeds its share u of the total: int64 [...]."""
    cdf = probs.cumsum(-1)
    total = cdf[..., -1:]
    # u·total can round up to the total itself, beyond the last token.
    target = np.minimum(uniforms[..., None] * total, np.nextafter(total, 0))
    tokens: np.ndarray = (cdf <= target).sum(-1)
    return tokens
