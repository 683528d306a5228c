"""The noise that decides each draw. It is counter-based, so any runtime computes the same number for the same token."""

import numpy as np


def uniforms(seed: int, clip_index: int, block: int, count: int) -> np.ndarray:
    """Return the uniform random numbers of one block of one clip: float64 [count] in [0,1).

    Position p takes word p mod 4 of Philox4x64-10 with key (seed, clip_index) and counter (1 + p div 4, block, 0, 0).
    The upper 53 bits of the word, divided by 2⁵³, are the number. Seed, clip index and block are unsigned 64-bit
    integers. Blocks count from 0, which is the first predicted block. Source: Salmon et al., "Parallel random numbers:
    as easy as 1, 2, 3" (SC 2011).
    """
    # The dtype is explicit because numpy turns a list with numbers both below and above 2⁶³ into floats.
    key, counter = np.array([seed, clip_index], np.uint64), np.array([0, block, 0, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(count)
    return (np.asarray(words, np.uint64) >> np.uint64(11)) * 2.0**-53
