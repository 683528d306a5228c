"""CUDA graphs emulated on a CPU: what is captured when, with which attention kernel, and how failures are handled."""

import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from nbp_bench import attention_choice, cuda_graphs
from nbp_bench.attention_choice import MASKED_ATTENTION, fastest_attention
from nbp_bench.cuda_graphs import CudaGraphSession, SamplingKernel
from nbp_bench.torch_sessions import WARM_UPS, EagerSession
from nbp_engines import sampling
from nbp_engines.errors import EngineError
from nbp_engines.sampling import GREEDY, Sampling
from nbp_export.graphs import system_spec
from tests.bench.test_torch_sessions import BLOCKS, SETTINGS, small_model, step_by_step, unrolled
from tests.engines.emulated import Gpu, emulated
from tests.support import small_generator

CPU = torch.device("cpu")


class EmulatedCapture:
    """Stands in for `CapturedCall`: a replay computes again and writes into the result of the capture."""

    log: list[str]
    refuses_draws = False

    def __init__(self, compute: Callable[[], Any], rewind: Callable[[], object] | None = None) -> None:
        if rewind and self.refuses_draws:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.name = "loop" if rewind else "step"
        self.log.append(f"capture {self.name}")
        self.compute = compute
        for _ in range(WARM_UPS):
            if rewind:
                rewind()
            self.result = compute()

    def __call__(self) -> None:
        self.log.append(f"replay {self.name}")
        result = self.compute()
        if isinstance(self.result, Tensor):
            self.result.copy_(result)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of the captures and replays of CudaGraphSession, which runs on the CPU and draws tokens with torch."""
    monkeypatch.setattr(cuda_graphs, "_require_cuda", lambda _: None)
    monkeypatch.setattr(cuda_graphs, "CapturedCall", EmulatedCapture)
    monkeypatch.setattr(attention_choice, "TRIALS", 2)
    entries: list[str] = []
    monkeypatch.setattr(EmulatedCapture, "log", entries, raising=False)
    return entries


def captured_session(block: str, hybrid: bool = False, dtype: str = "fp32") -> CudaGraphSession:
    model = small_model(block, hybrid)
    return CudaGraphSession(system_spec(model.config, None, dtype, 2), model, None, "cpu")


def test_cuda_graphs_need_a_cuda_device() -> None:
    model = small_generator("1x1x4")
    with pytest.raises(EngineError, match="need a CUDA device"):
        CudaGraphSession(system_spec(model.config, None, "fp32", 1), model, None, "cpu")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("hybrid", [False, True], ids=["frames", "hybrid"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_replayed_tokens_equal_the_eager_ones(block: str, hybrid: bool, dtype: str, log: list[str]) -> None:  # noqa: ARG001
    model = small_model(block, hybrid)
    eager = EagerSession(system_spec(model.config, None, dtype, 2), model, None)
    eager._attention = dict.fromkeys(eager._token_counts, SDPBackend.MATH)  # the only one that both have on a CPU
    with captured_session(block, hybrid, dtype) as session:
        for settings in SETTINGS:
            expected = step_by_step(eager, settings)
            np.testing.assert_array_equal(step_by_step(session, settings), expected)
            for _ in range(2):
                np.testing.assert_array_equal(unrolled(session, settings), expected)


def test_a_loop_is_captured_once_for_each_setting_and_then_replayed(log: list[str]) -> None:
    session = captured_session("1x1x4")
    log.clear()
    for settings, captures in ((GREEDY, 2), (GREEDY, 0), (Sampling(), 2), (GREEDY, 0)):
        unrolled(session, settings)
        assert log == ["capture loop"] * captures + ["replay loop"] * 8
        log.clear()


def test_a_hybrid_runs_its_text_through_the_prefill(log: list[str]) -> None:
    session = captured_session("1x1x4", hybrid=True)
    log.clear()
    unrolled(session, GREEDY)
    assert log == ["capture loop"] * 2 + ["replay step"] + ["replay loop"] * (4 + 15)


def test_a_loop_that_cannot_be_captured_replays_its_steps(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedCapture, "refuses_draws", True)
    with captured_session("1x1x4") as session:
        expected = step_by_step(session, Sampling())
        log.clear()
        np.testing.assert_array_equal(unrolled(session, Sampling()), expected)
        assert log == ["replay step"] * 8
        assert session.notes[-1] == (
            "the draw after 4 tokens could not be captured: "
            "RuntimeError: operation not permitted when stream is capturing"
        )
        monkeypatch.setattr(cuda_graphs, "cuda_failed", lambda: True)
        with pytest.raises(RuntimeError, match="not permitted"):
            unrolled(session, GREEDY)


def test_notes_name_the_attention_kernel_and_why_torch_draws(log: list[str]) -> None:  # noqa: ARG001
    attention, _, drawing = captured_session("1x1x4").notes
    assert attention.startswith("32 tokens: MATH attention: EFFICIENT_ATTENTION RuntimeError: No viable backend")
    assert "MATH " in attention
    assert drawing.startswith("tokens drawn by torch: ")


def test_a_compiled_step_is_captured_with_the_attention_that_was_fastest(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compiled(step: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:  # noqa: ARG001
        def call(*tensors: Tensor) -> Any:
            allowed = [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()]
            calls.append((tensors[0].shape[1], allowed))
            return step(*tensors)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    model = small_generator("1x1x4")
    session = CudaGraphSession(system_spec(model.config, None, "fp32", 1), model, None, "cpu", compiled=True)
    assert calls == [(4, [False, True])] * WARM_UPS
    assert log[-1] == "capture step"
    assert session.notes[2] == "step with 4 tokens compiled with MATH"


def test_the_kernel_is_launched_on_torchs_stream_with_torchs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = system_spec(small_generator("1x1x4").config, None, "bf16", 2)
    with emulated(Gpu()):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        kernel = SamplingKernel(spec)
        stream = SimpleNamespace(cuda_stream=int(kernel._device.stream))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        logits, noise = torch.randn(2, 4, spec.vocab).bfloat16(), torch.rand(2, 4, dtype=torch.float64)
        tokens = kernel.draw(logits, noise, Sampling(top_k=20))
        kernel._device.synchronize()
        expected = sampling.sample(logits.float().numpy(), noise.numpy(), Sampling(top_k=20))
        np.testing.assert_array_equal(tokens.numpy(), expected)
        kernel.close()


# The choice of an attention kernel.


def test_the_fastest_attention_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = iter(["slow", "fast", "slower"])
    times = {"slow": [2e6], "fast": [1e6], "slower": [3e6]}
    monkeypatch.setattr(attention_choice, "time_calls", lambda _, call, count: times[call(0)])  # noqa: ARG005

    def prepare() -> Callable[[], str]:
        name = next(prepared)
        return lambda: name

    choice = fastest_attention(prepare, CPU)
    assert choice.kernel == MASKED_ATTENTION[1]
    assert choice.step() == "fast"
    assert choice.note == (
        "CUDNN_ATTENTION attention: EFFICIENT_ATTENTION 2.000 ms, CUDNN_ATTENTION 1.000 ms, MATH 3.000 ms"
    )


def test_warnings_of_torch_do_not_stop_the_choice() -> None:
    def prepare() -> Callable[[], None]:
        warnings.warn("cuDNN attention kernel not used because:", stacklevel=1)
        raise RuntimeError("No available kernel")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(EngineError, match="MATH RuntimeError: No available kernel"):
            fastest_attention(prepare, CPU)


def test_a_kernels_error_is_noted_only_while_cuda_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Callable[[], None]:
        raise RuntimeError("no plan\nfor this mask")

    with pytest.raises(EngineError, match=r"no attention kernel.*CUDNN_ATTENTION RuntimeError: no plan, MATH"):
        fastest_attention(refuse, CPU)
    monkeypatch.setattr(attention_choice, "cuda_failed", lambda: True)
    with pytest.raises(RuntimeError, match="no plan"):
        fastest_attention(refuse, CPU)


def test_an_eager_session_uses_the_chosen_attention_kernel() -> None:
    model = small_generator("1x1x4")
    eager = EagerSession(system_spec(model.config, None, "fp32", 1), model, None)
    with torch.inference_mode():
        choice = fastest_attention(partial(eager._warmed_up_step, 4), CPU)
    assert choice.kernel == SDPBackend.MATH, "the CPU has only this one of the kernels that accept a mask on a GPU"
    eager._attention[4] = SDPBackend.EFFICIENT_ATTENTION
    eager.prefill(np.zeros((1, 32), np.int64))
    with pytest.raises(RuntimeError, match="No viable backend"):
        eager.step(np.zeros((1, 4), np.int64), np.array([32]))
