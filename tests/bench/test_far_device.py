"""Everything that the worker process of a GPU does, on the fake device of far_device.py, without a GPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nbp_bench import cuda_graphs, measure, sweep
from nbp_bench.engines import engines
from nbp_bench.host import Host, close_case, identify, open_case
from nbp_bench.plan import Candidate, Case, Plan
from nbp_bench.sweep import Sweep
from nbp_export import sources
from nbp_export.request import Request
from nbp_export.sources import Source, random_generator
from nbp_reference.config import TOKENIZERS, BlockShape, Latent, ModelConfig
from nbp_reference.tokenizer import VideoTokenizer
from tests.bench.far_device import Far, far_device
from tests.bench.test_cuda_graphs import EmulatedCapture
from tests.bench.test_failures import Here


def small(request: Request) -> Source:
    """Return a model that is small enough for the slow tensors of the fake device."""
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(TOKENIZERS["nbp-tiny"]).eval()
    vocab, latent, block = tokenizer.config.vocab, Latent(3, 4, 4), BlockShape(1, 1, 1)
    config = ModelConfig(2, width=32, heads=2, vocab=vocab, positions=64, latent=latent, block=block)
    return Source("small", random_generator(config.with_block(request.block or "1")), tokenizer, False, "small")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(sources, "find", small)
    monkeypatch.setattr(cuda_graphs, "CapturedCall", EmulatedCapture)
    monkeypatch.setattr(EmulatedCapture, "log", [], raising=False)
    with far_device():
        yield Host()


def case(engine: str, dtype: str, block: str = "4", batch: int = 1) -> Case:
    request = Request("nbp-tiny", weights="random", block=block)
    return Case(Candidate(request), engines()[engine], dtype, batch, "cuda")


def test_operations_on_far_and_near_tensors_are_refused() -> None:
    with far_device():
        far = torch.arange(6, device="cuda").view(2, 3)
        assert isinstance(far, Far)
        assert far.device.type == "cuda"
        near = torch.ones(3, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="same device"):
            far + near
        with pytest.raises(RuntimeError, match="same device"):
            far.index_select(0, torch.zeros(1, dtype=torch.int64))
        with pytest.raises(TypeError, match="cpu"):
            far.numpy()
        far[0] += near.to("cuda")
        assert far.cpu().tolist() == far.numpy(force=True).tolist() == [[1, 2, 3], [3, 4, 5]]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["naive", "eager", "cudagraph"])
def test_an_engine_from_weights_to_clips(engine: str, dtype: str, host: Host) -> None:
    one = case(engine, dtype, batch=2)
    identify(host, one.candidate.request)  # type: ignore[arg-type]
    open_case(host, one, None, None)
    session = host.session(one)
    assert session.generator.pos_emb.device.type == "cuda"
    parity = measure.parity(host, one, None)
    assert (parity is None) == (engine == "naive")
    if parity:
        assert parity.error <= parity.allowed
        assert parity.checks > 8
        assert measure.step_times(host, one, 3, None)
    condition = np.random.default_rng(0).random((2, 3, session.spec.condition_frames, *session.spec.video[1:]))
    settings = (condition.astype(np.float32), None, 0)
    measure.warm_up(host, one, *settings)
    clip = measure.predict(host, one, settings[0], 0, None, 0)
    assert clip.video.dtype == np.float32
    measure.first_frame(host, one, *settings)
    close_case(host, one)


def test_sessions_of_other_blocks_share_the_weights(host: Host) -> None:
    """Engines of a dtype share weights on a GPU, one after another and two at once."""
    for block in ("4", "16", "1"):
        pair = [case("eager", "bf16", block), case("cudagraph", "bf16", block)]
        for one in pair:
            open_case(host, one, None, None)
        generators = {id(host.session(one).generator) for one in pair}
        assert len(host.models) == len(generators) == 1
        for one in pair:
            parity = measure.parity(host, one, None)
            assert parity
            assert parity.error <= parity.allowed
            close_case(host, one)


def present(device: str) -> None:
    """Return None: the engine can run on the fake device."""


@pytest.mark.usefixtures("host")
def test_a_run_as_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that need no further library are measured completely; the others are rows with a reason."""
    monkeypatch.setattr(sweep, "Worker", Here)
    monkeypatch.setattr(Here, "log", [], raising=False)
    monkeypatch.setattr(Here, "trouble", staticmethod(lambda *_: None), raising=False)
    chosen = [replace(engines()[name], absence=present) for name in ("eager", "cudagraph")]
    candidates = [case("eager", "bf16", block).candidate for block in ("4", "16")]
    plan = Plan(
        candidates,
        [*chosen, engines()["compiled"], engines()["tensorrt"]],
        tmp_path,
        ("bf16", "fp16"),
        device="cuda",
        clips=1,
        steps=2,
        minutes=10,
    )
    with Sweep(plan, lambda *_, **__: None) as whole:
        rows = [m.record for group in whole.run() for m in group]
    assert [(r.dtype, r.engine, r.block_size) for r in rows if not r.not_measured] == [
        (dtype, engine, size) for dtype in ("bf16", "fp16") for size in (4, 16) for engine in ("eager", "cudagraph")
    ]
    for row in rows:
        if row.not_measured:
            assert row.engine in ("compiled", "tensorrt")
            continue
        assert not row.failed
        assert row.parity_error
        assert row.total_ns
        assert row.loop_ns
        assert row.first_frame_ns
        assert len(row.device_step_ns) == len(row.device_pass_ns) == (2 if row.steps > 1 else 0)
        assert row.copy_bandwidth
        assert row.peak_device_bytes
        assert not [note for note in row.notes if "failed" in note or "not measured" in note]
    assert [name for name, _, _ in Here.log].count("identify") == len(candidates)
