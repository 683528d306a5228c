"""The PyTorch session that replays its steps as CUDA graphs: one launch per step instead of one per kernel.

Shape legend: B batch, L tokens in a block, P condition tokens, T tokens in the call, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from nbp_bench.attention_choice import fastest_attention
from nbp_bench.device import cuda_failed
from nbp_bench.torch_sessions import WARM_UPS, EagerSession
from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer

Result = TypeVar("Result")


@contextmanager
def _capture_into(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Capture into the CUDA graph, and restore the current stream.

    `torch.cuda.graph` alone leaves its own stream current if the capture cannot be ended.
    """
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            yield
    finally:
        torch.cuda.set_stream(before)


class CapturedCall(Generic[Result]):
    """A computation on tensors at fixed addresses, captured as a CUDA graph.

    Attributes:
        result: what the computation returned during the capture; every replay overwrites its tensors.
    """

    def __init__(self, compute: Callable[[], Result], rewind: Callable[[], object] = lambda: None) -> None:
        """Capture `compute`.

        First `rewind` and `compute` are called a few times, because libraries choose kernels, compile and allocate in
        their first calls. Then one more call of `compute` is captured; it does not run before the first replay.
        """
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UPS):
                rewind()
                compute()
        torch.cuda.current_stream().wait_stream(side_stream)
        self._graph = torch.cuda.CUDAGraph()
        with _capture_into(self._graph):
            self.result = compute()

    def __call__(self) -> None:
        """Enqueue the computation."""
        self._graph.replay()


class CapturedStep:
    """A step captured as a CUDA graph, with its input and output tensors."""

    def __init__(
        self, compute: Callable[[Tensor, Tensor], Tensor], batch: int, count: int, device: torch.device
    ) -> None:
        """Capture `compute` for a batch of clips with `count` tokens each."""
        self._tokens_BT = torch.zeros(batch, count, dtype=torch.int64, device=device)
        self._cache_pos_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._replay = CapturedCall(partial(compute, self._tokens_BT, self._cache_pos_B))

    def __call__(self) -> None:
        """Enqueue the step with the tokens and positions of the last call."""
        self._replay()

    def logits(self, tokens: Tensor, cache_pos: Tensor) -> Tensor:
        """Return logits [B,L,V] after tokens [B,T] at cache_pos [B]; the next call overwrites them.

        The arguments may be on the host or on the device.
        """
        self._tokens_BT.copy_(tokens, non_blocking=True)
        self._cache_pos_B.copy_(cache_pos, non_blocking=True)
        self._replay()
        return self._replay.result


class SamplingKernel:
    """The sampling kernel of nbp_engines, launched on torch's current stream with torch's tensors.

    Raises EngineError, or an error of cuda-bindings, if the kernel cannot be loaded.
    """

    def __init__(self, spec: SystemSpec) -> None:
        from nbp_engines.cuda import Device, Sampler

        self._device = Device.open(torch.cuda.current_device())
        try:
            self._sampler = Sampler(self._device, spec)
        except BaseException:
            self._device.close()
            raise

    def draw(self, logits: Tensor, uniforms: Tensor, settings: Sampling) -> Tensor:
        """Enqueue the draw of tokens int64 [B,T] from logits [B,T,V] with uniforms float64 [B,T]."""
        logits, uniforms = logits.contiguous(), uniforms.contiguous()
        tokens = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device)
        pointers = (logits.data_ptr(), uniforms.data_ptr(), tokens.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream  # during a capture, this is the captured stream
        self._sampler.enqueue(*pointers, uniforms.numel(), settings, stream)
        return tokens

    def close(self) -> None:
        """Free the kernel's memory on the device."""
        self._device.close()


class CudaGraphSession(EagerSession):
    """`EagerSession` with its steps captured as CUDA graphs, and with the sampling kernel of nbp_engines.

    There is one CUDA graph for each number of tokens that a step can have. `unroll` captures step and draw together, in
    one more CUDA graph for each number of tokens and each set of sampling settings, when it first uses them.

    The constructor measures the captured step with each attention kernel, before any compilation, and keeps the
    fastest kernel. With `compiled`, only the step with that kernel is compiled. `notes` name the chosen kernel and, if
    the sampling kernel cannot run, the reason why torch draws the tokens.
    """

    def __init__(
        self,
        spec: SystemSpec,
        generator: NextBlockTransformer,
        tokenizer: VideoTokenizer | None,
        device: torch.device | str = "cuda",
        compiled: bool = False,
        channels_last: bool | None = None,
    ) -> None:
        _require_cuda(torch.device(device))
        self._steps: dict[int, CapturedStep] = {}
        self._advances: dict[tuple[int, Sampling], CapturedCall[None] | None] = {}
        self._kernel: SamplingKernel | None = None
        super().__init__(spec, generator, tokenizer, device, compiled, channels_last)
        try:
            self._kernel = SamplingKernel(spec)
        except Exception as error:  # this engine must not fail because of our own kernel
            if cuda_failed():
                raise
            self.notes.append(f"tokens drawn by torch: {error}")

    @torch.inference_mode()
    def _choose_attention(self) -> None:
        for count in self._token_counts:
            choice = fastest_attention(partial(self._captured_step, count), self.device)
            self._attention[count], self._steps[count] = choice.kernel, choice.step
            self.notes.append(f"{count} tokens: {choice.note}")

    def _compile(self) -> None:
        super()._compile()
        for count in (count for count in self._token_counts if count <= self.spec.block_size):
            self._steps[count] = self._captured_step(count)
            self.notes.append(f"step with {count} tokens compiled with {self._attention[count].name}")

    @torch.inference_mode()
    def _captured_step(self, count: int) -> CapturedStep:
        return CapturedStep(self._compute, self.spec.batch, count, self.device)

    def _step(self, tokens: Tensor, cache_pos: Tensor) -> Tensor:
        return self._steps[tokens.shape[1]].logits(tokens, cache_pos)

    def _draw(self, logits: Tensor, uniforms: Tensor, settings: Sampling) -> Tensor:
        return (
            self._kernel.draw(logits, uniforms, settings) if self._kernel else super()._draw(logits, uniforms, settings)
        )

    def unroll(self, condition: np.ndarray, noise: np.ndarray, settings: Sampling) -> np.ndarray:
        """Return the predicted tokens int64 [B,blocks·L] of a whole clip, in block order; see `EagerSession.unroll`."""
        first = 1 if self.spec.hybrid else self.spec.condition_tokens
        for count in {
            first,
            self.spec.block_size,
        }:  # before the clip begins: a capture changes its state
            if (count, settings) not in self._advances:
                self._advances[count, settings] = self._captured_advance(count, settings)
        return super().unroll(condition, noise, settings)

    @torch.inference_mode()
    def _captured_advance(self, count: int, settings: Sampling) -> CapturedCall[None] | None:
        """Capture step and draw in one CUDA graph; return None, and add a note, if that is impossible."""
        try:
            return CapturedCall(partial(self._advance_by, self._compute, count, settings), self._clip.rewind)
        except RuntimeError as error:
            if cuda_failed():
                raise
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            self.notes.append(f"the draw after {count} tokens could not be captured: {first_line}")
            return None

    def _advance(self, count: int, settings: Sampling) -> None:
        if advance := self._advances[count, settings]:
            advance()
        else:
            super()._advance(count, settings)

    def close(self) -> None:
        """Free the CUDA graphs and the sampling kernel."""
        self._steps.clear()
        self._advances.clear()
        if self._kernel:
            self._kernel.close()


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise EngineError("CUDA graphs need a CUDA device: give --device cuda")
