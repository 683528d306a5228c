"""Compares the noise with the published algorithm, implemented here with Python's integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbp_engines.noise import uniforms

WORD = 2**64
words = st.integers(0, WORD - 1)
Four = tuple[int, int, int, int]


def philox4x64(counter: Four, key: tuple[int, int]) -> Four:
    """Return the four words of a counter and a key after ten rounds, as in Salmon et al., SC 2011."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2E7470EE14C6C93 * c0, WORD)
        hi1, lo1 = divmod(0xCA5A826395121157 * c2, WORD)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return c0, c1, c2, c3


# These are test vectors of Random123, the published implementation of the algorithm.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ((WORD - 1,) * 4, (WORD - 1,) * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_the_independent_philox_gives_the_published_answers(counter: Four, key: tuple[int, int], answer: str) -> None:
    assert " ".join(f"{word:016x}" for word in philox4x64(counter, key)) == answer


@given(words, words, words, st.integers(1, 300))
def test_each_position_takes_its_word_of_philox(seed: int, clip_index: int, block: int, count: int) -> None:
    actual = uniforms(seed, clip_index, block, count)
    assert actual.dtype == np.float64
    assert actual.shape == (count,)
    for position in {0, count // 2, count - 1}:
        word = philox4x64((1 + position // 4, block, 0, 0), (seed, clip_index))[position % 4]
        assert actual[position] == (word >> 11) / 2**53


@given(words, words, words, st.integers(1, 300), st.integers(1, 300))
def test_a_number_does_not_depend_on_the_count(seed: int, clip_index: int, block: int, m: int, n: int) -> None:
    assert uniforms(seed, clip_index, block, m)[:n].tolist() == uniforms(seed, clip_index, block, n)[:m].tolist()


def test_uniforms_fill_the_half_open_unit_interval() -> None:
    drawn = uniforms(0, 0, 0, 100_000)
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    # A chi-square of 99 degrees of freedom has mean 99 and deviation 14. The numbers are the same in every run.
    assert 60 < ((counts - 1000) ** 2 / 1000).sum() < 150


def test_each_seed_clip_index_and_block_has_its_own_stream() -> None:
    keys = [(seed, clip_index, block) for seed in range(4) for clip_index in range(4) for block in range(4)]
    streams = np.stack([uniforms(*key, 1000) for key in keys])
    assert len(np.unique(streams)) == streams.size
    correlation = np.corrcoef(streams) - np.eye(len(keys))
    assert np.abs(correlation).max() < 5 / np.sqrt(1000)
