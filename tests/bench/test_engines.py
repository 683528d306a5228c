"""The PyTorch engines, ours and the authors' way, agree with the reference and with each other."""

import numpy as np
import pytest
import torch

from nbp_bench.engines import NaiveSession, ReferenceSession
from nbp_engines.generator import Generator
from nbp_engines.sampling import GREEDY, Sampling
from nbp_export.graphs import system_spec
from nbp_reference.model import NextBlockTransformer
from tests.support import small_generator

BLOCKS = ["1x1x1", "1x1x4", "1x4x4", "1x2x2", "2x2x2"]


def _tokens(
    kind: type[ReferenceSession] | type[NaiveSession], model: NextBlockTransformer, sampling: Sampling
) -> np.ndarray:
    spec = system_spec(model.config, None, "fp32", batch=2)
    condition = np.random.default_rng(0).integers(0, spec.vocab, (2, spec.condition_tokens))
    with kind(spec, model, None) as session:
        for _ in range(2):  # a session starts over with every clip
            for clip in Generator(session, sampling, seed=3).blocks(condition):
                tokens = clip.copy()
    return tokens


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(0.7, 10, 0.5)], ids=["greedy", "paper", "narrow"])
def test_naive_and_reference_generate_the_same(block: str, sampling: Sampling) -> None:
    model = small_generator(block)
    np.testing.assert_array_equal(_tokens(NaiveSession, model, sampling), _tokens(ReferenceSession, model, sampling))


@pytest.mark.parametrize("block", BLOCKS)
def test_greedy_tokens_are_the_full_forwards_own_choice(block: str) -> None:
    model = small_generator(block)
    order = model.config.block.order(model.config.latent)
    in_block_order = torch.from_numpy(_tokens(ReferenceSession, model, GREEDY)[:, order])
    size = model.config.block.size
    with torch.inference_mode():
        choice = model(in_block_order[:, :-size]).argmax(-1)
    start = model.config.condition_tokens
    assert torch.equal(choice[:, start - size :], in_block_order[:, start:])


def test_naive_cache_grows_and_the_reference_cache_does_not() -> None:
    model = small_generator("1x1x4")
    spec = system_spec(model.config, None, "fp32", batch=1)
    naive, reference = NaiveSession(spec, model, None), ReferenceSession(spec, model, None)
    condition, block = np.zeros((1, spec.condition_tokens), np.int64), np.zeros((1, 4), np.int64)
    before = reference.k_caches[0].data_ptr()
    for session in (naive, reference):
        session.prefill(condition)
        session.step(block, np.array([spec.condition_tokens]))
    assert naive.past[0][0].shape[2] == spec.condition_tokens + 4
    assert reference.k_caches[0].data_ptr() == before
    assert reference.k_caches[0].shape[2] == spec.capacity
