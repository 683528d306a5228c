"""Drawing tokens from logits: top-k, then top-p, then the inverse of the cumulative distribution.

All arithmetic is in fp64 and sums run in vocabulary order, so that equal logits and equal noise give equal tokens in
every runtime. `docs/bundle.md` defines the rules.
"""

from dataclasses import dataclass

import numpy as np

from nbp_errors import UsageError

# Division by a lower temperature could overflow, and only the most likely token would be drawn anyway.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. The defaults are those of the paper.

    Attributes:
        temperature: divides the logits. 0 means greedy: the token with the largest logit, and the lowest id among
            equals. A temperature below LEAST_TEMPERATURE becomes 0.
        top_k: how many of the largest logits to keep. All logits that equal the k-th are kept too.
        top_p: the total probability to keep, counted from the most likely token down.

    Raises UsageError for a setting that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 16_000
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 1 and 0 < self.top_p <= 1):
            raise UsageError(f"{self}: temperature must be at least 0, top_k at least 1, top_p above 0 and up to 1")
        if self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)


# Number of logits to process at once. All 256 rows of 64,000 at once would touch a gigabyte of new memory.
CHUNK = 2**16
GREEDY = Sampling(temperature=0.0)


def nucleus(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return the probabilities after top-k and top-p, 0 for dropped tokens: float64 [..., V] of logits [..., V].

    The result is not normalised again after top-p. Logits that equal the k-th largest are kept, and so is the token
    whose probability crosses top-p. Among equal probabilities, top-p keeps the lower ids.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    drop = scaled.shape[-1] - sampling.top_k
    if drop > 0:
        smallest = np.partition(scaled, drop, axis=-1)[..., drop, None]
        scaled[scaled < smallest] = -np.inf
    probs: np.ndarray = np.exp(scaled - scaled.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    ranked = -np.sort(-probs, axis=-1)  # sorting values is much faster than an argsort of the tokens
    count = (ranked.cumsum(-1) - ranked < sampling.top_p).sum(-1, keepdims=True)  # how many tokens to keep
    threshold = np.take_along_axis(ranked, count - 1, -1)
    ties = probs == threshold
    ties_kept = count - (probs > threshold).sum(-1, keepdims=True)
    probs[(probs < threshold) | (ties & (ties.cumsum(-1) > ties_kept))] = 0.0
    return probs


def sample(logits: np.ndarray, uniforms: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Draw one token per row: int64 [...] from logits [..., V] and uniforms [...] in [0,1)."""
    if sampling.temperature == 0:
        return np.asarray(logits.argmax(-1))
    rows, noise = logits.reshape(-1, logits.shape[-1]), uniforms.reshape(-1)
    rows_per_chunk = max(1, CHUNK // logits.shape[-1])
    chunks = (slice(start, start + rows_per_chunk) for start in range(0, len(rows), rows_per_chunk))
    tokens = np.concatenate([draw(nucleus(rows[chunk], sampling), noise[chunk]) for chunk in chunks])
    return tokens.reshape(uniforms.shape)


def draw(probs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Return the first token whose cumulative probability exceeds u·total: int64 [...].

    Args:
        probs: float64 [..., V]. They need not sum to 1; `total` is their sum.
        uniforms: u, [...] in [0,1).
    """
    cdf = probs.cumsum(-1)
    total = cdf[..., -1:]
    # The product u·total can round up to total, which no cumulative probability exceeds.
    target = np.minimum(uniforms[..., None] * total, np.nextafter(total, 0))
    tokens: np.ndarray = (cdf <= target).sum(-1)
    return tokens
