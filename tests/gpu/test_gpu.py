"""What only a GPU can show: `make gpu` runs these after it has measured."""

import numpy as np
import pytest
import torch

from nbp_bench.engines import GraphsSession, OnDevice, ReferenceSession
from nbp_bench.golden import folder, golden_model
from nbp_engines import sampling
from nbp_engines.generator import Generator
from nbp_engines.sampling import GREEDY, Sampling
from nbp_export.graphs import TORCH_DTYPES, system_spec
from nbp_reference.config import ModelConfig
from nbp_reference.model import NextBlockTransformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("kind", [ReferenceSession, GraphsSession])
@pytest.mark.parametrize("size", [1, 16])
def test_the_authors_own_tokens(kind: type[ReferenceSession], size: int) -> None:
    golden, model = np.load(folder() / f"k600_L{size}.npz"), golden_model(size)
    condition = golden["tokens"][:, : model.config.condition_tokens]
    with kind(system_spec(model.config, None, "fp32", 1), model, None, "cuda") as session:
        for clip in Generator(session, GREEDY).blocks(condition):
            tokens = clip
    np.testing.assert_array_equal(tokens[:, condition.shape[1] :], golden["greedy"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("settings", [Sampling(), Sampling(0.7, 50, 0.5), Sampling(1.3, 64_000, 1.0), GREEDY])
def test_the_kernel_draws_as_numpy_does(dtype: str, settings: Sampling) -> None:
    config = ModelConfig(layers=1, width=64, heads=4).with_block("16")
    spec, rng = system_spec(config, None, dtype, 2), np.random.default_rng(0)
    with GraphsSession(spec, NextBlockTransformer(config), None, "cuda") as session:
        assert session._own, session.notes
        for spread in (0.1, 3.0, 30.0):
            there = torch.randn(2, 16, config.vocab, device="cuda", dtype=TORCH_DTYPES[dtype]) * spread
            noise, logits = rng.random((2, 16)), OnDevice(there)
            due = sampling.sample(np.asarray(logits), noise, settings)
            np.testing.assert_array_equal(session.sample(logits, noise, settings), due)
