"""Tests that need a GPU; `make gpu` runs them after its measurements."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from nbp_bench import measure
from nbp_bench.cuda_graphs import CudaGraphSession
from nbp_bench.engines import engines
from nbp_bench.golden import folder, golden_model
from nbp_bench.host import Host, open_case
from nbp_bench.plan import Candidate, Case
from nbp_bench.torch_sessions import DeviceLogits, EagerSession, NaiveSession
from nbp_bench.worker import Worker, WorkerError
from nbp_engines import sampling
from nbp_engines.generator import Generator
from nbp_engines.noise import uniforms
from nbp_engines.sampling import GREEDY, Sampling
from nbp_export.graphs import TORCH_DTYPES, system_spec
from nbp_export.parity import compare
from nbp_export.request import Request
from nbp_reference.config import MODELS, TINY, TOKENIZERS, ModelConfig
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
Kind = type[NaiveSession] | type[EagerSession]


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """Turn TF32 off, so that fp32 is compared with fp32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize("kind", [NaiveSession, EagerSession, CudaGraphSession])
@pytest.mark.parametrize("size", [1, 16])
def test_greedy_tokens_equal_the_authors_golden_tokens(kind: Kind, size: int) -> None:
    golden, model = np.load(folder() / f"k600_L{size}.npz"), golden_model(size)
    condition = golden["tokens"][:, : model.config.condition_tokens]
    with kind(system_spec(model.config, None, "fp32", 1), model, None, "cuda") as session:
        for clip in Generator(session, GREEDY).blocks(condition):
            tokens = clip
    np.testing.assert_array_equal(tokens[:, condition.shape[1] :], golden["greedy"])


def step_by_step(session: EagerSession, condition: np.ndarray, settings: Sampling) -> np.ndarray:
    """Return the predicted tokens [B,blocks·L] in block order."""
    for clip in Generator(session, settings, seed=3).blocks(condition):
        tokens = clip
    return tokens[:, session.spec.block_order()][:, -session.spec.blocks * session.spec.block_size :]


def unrolled(session: EagerSession, condition: np.ndarray, settings: Sampling) -> np.ndarray:
    """Return the same tokens, made by `unroll`; the condition of these models is already in block order."""
    spec = session.spec
    noise = [[uniforms(3, b, block, spec.block_size) for b in range(spec.batch)] for block in range(spec.blocks)]
    given = condition + spec.block_size if spec.hybrid else condition
    return session.unroll(given, np.array(noise), settings)


@pytest.mark.parametrize("kind", [EagerSession, CudaGraphSession])
@pytest.mark.parametrize("size", [1, 16])
def test_unrolled_tokens_equal_those_made_step_by_step(kind: type[EagerSession], size: int) -> None:
    model = golden_model(size)
    spec = system_spec(model.config, None, "fp32", 2)
    condition = np.random.default_rng(0).integers(0, spec.vocab, (2, spec.condition_tokens))
    with kind(spec, model, None, "cuda") as session:
        for settings in (Sampling(), GREEDY):
            expected = step_by_step(session, condition, settings)
            for _ in range(2):
                np.testing.assert_array_equal(unrolled(session, condition, settings), expected)
        assert not [note for note in session.notes if "not be captured" in note]


def test_a_hybrid_unrolls() -> None:
    config = replace(MODELS["nbp-tiny-hybrid"], layers=2).with_block("16")
    model = NextBlockTransformer(config)
    model.reset(0)
    spec = system_spec(config, None, "fp32", 1)
    text = np.arange(8)[None] % spec.text_vocab
    with CudaGraphSession(spec, model, None, "cuda") as session:
        expected = step_by_step(session, text, Sampling())
        np.testing.assert_array_equal(unrolled(session, text, Sampling()), expected)
        assert not [note for note in session.notes if "not be captured" in note]


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_captured_logits_equal_the_eager_ones(compiled: bool, dtype: str) -> None:
    if compiled:
        pytest.importorskip("triton")
        if not any(map(shutil.which, ("cc", "gcc", "clang"))):
            pytest.skip("triton needs a C compiler")
    model = golden_model(16)
    spec = system_spec(model.config, None, dtype, 1)
    tokens = np.random.default_rng(0).integers(0, spec.vocab, (1, spec.clip_tokens))
    P = spec.condition_tokens
    eager = EagerSession(spec, model, None, "cuda")
    with CudaGraphSession(spec, model, None, "cuda", compiled=compiled) as session:
        for given, position in ((tokens[:, :P], 0), (tokens[:, P : P + 16], P), (tokens[:, P + 16 : P + 32], P + 16)):
            actual, expected = (np.asarray(s.step(given, np.array([position]))) for s in (session, eager))
            assert compare("", "", "", actual, expected, 5e-5 if dtype == "fp32" else 3e-2).passed


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 5e-5), ("fp16", 1e-2), ("bf16", 5e-2)])
def test_a_tokenizer_with_channels_last_computes_the_same(dtype: str, tolerance: float) -> None:
    torch.manual_seed(0)
    tokenizer, config = VideoTokenizer(TOKENIZERS["nbp-tiny"]), replace(TINY, layers=1).with_block("16")
    spec, model = system_spec(config, tokenizer.config, dtype, 2), NextBlockTransformer(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tokenizer.config.vocab, (2, spec.clip_tokens))
    video = rng.random((2, 3, spec.condition_frames, *spec.video[1:]), np.float32)
    plain, ours = (EagerSession(spec, model, tokenizer, "cuda", channels_last=on) for on in (False, True))
    assert compare("", "", "", ours.decode(tokens), plain.decode(tokens), tolerance).passed
    # A code may differ if rounding decides between two codes, which is frequent in half precision.
    assert (ours.encode(video) == plain.encode(video)).mean() > (0.99 if dtype == "fp32" else 0.8)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("settings", [Sampling(), Sampling(0.7, 50, 0.5), Sampling(1.3, 64_000, 1.0), GREEDY])
def test_the_kernel_draws_as_numpy_does(dtype: str, settings: Sampling) -> None:
    config = ModelConfig(layers=1, width=64, heads=4).with_block("16")
    spec, rng = system_spec(config, None, dtype, 2), np.random.default_rng(0)
    with CudaGraphSession(spec, NextBlockTransformer(config), None, "cuda") as session:
        assert not [note for note in session.notes if "drawn by torch" in note], session.notes
        for spread in (0.1, 3.0, 30.0):
            on_device = torch.randn(2, 16, config.vocab, device="cuda", dtype=TORCH_DTYPES[dtype]) * spread
            noise, logits = rng.random((2, 16)), DeviceLogits(on_device)
            expected = sampling.sample(np.asarray(logits), noise, settings)
            np.testing.assert_array_equal(session.sample(logits, noise, settings), expected)


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [("eager", "fp32"), ("cudagraph", "fp32"), ("cudagraph", "fp16"), ("cudagraph", "bf16"), ("compiled", "bf16")],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_bundled_model_passes_every_check(engine: str, dtype: str, batch: int) -> None:
    """Compare engines with the reference as the bench does, also in fp32, which has the strictest tolerance."""
    case = Case(Candidate(Request(block="16")), engines()[engine], dtype, batch, "cuda")
    if why := case.refusal():
        pytest.skip(why)
    host = Host()
    open_case(host, case, None, None)
    parity = measure.parity(host, case, None)
    host.close()
    assert parity
    assert parity.error <= parity.allowed, parity


# Errors in a worker process.


def pid(host: Host) -> int:  # noqa: ARG001 - every function takes a host
    return os.getpid()


def ask_for_too_much(host: Host) -> None:  # noqa: ARG001
    torch.empty(2**50, device="cuda")


def read_beyond_the_end(host: Host) -> None:  # noqa: ARG001
    torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")].cpu()


def test_a_process_is_replaced_only_if_cuda_has_failed_in_it() -> None:
    worker = Worker()
    try:
        first = worker.call(pid)
        with pytest.raises(WorkerError, match="OutOfMemoryError"):
            worker.call(ask_for_too_much)
        assert worker.call(pid) == first, "the process must keep its models"
        with pytest.raises(WorkerError, match="assert"):
            worker.call(read_beyond_the_end)
        assert worker.call(pid) != first
    finally:
        worker.close()
