"""The noise behind every draw: counter-based, so that any runtime finds the same number for the same token."""

import numpy as np


def uniforms(seed: int, sample: int, step: int, count: int) -> np.ndarray:
    """The uniforms of one block of one clip: float64 [count] in [0,1).

    Position p takes word p of the Philox4x64-10 stream with key (seed, sample) and counter (1 + p//4, step, 0, 0),
    its upper 53 bits over 2⁵³; seed, sample and step are 64-bit words. Source: Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3" (SC 2011).
    """
    # As uint64 at once: numpy makes a list that mixes numbers below and above 2⁶³ into floats.
    key, counter = np.array([seed, sample], np.uint64), np.array([0, step, 0, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(count)
    return (np.asarray(words, np.uint64) >> np.uint64(11)) * 2.0**-53
