"""The PyTorch session whose steps are replayed as CUDA graphs: one launch per step in place of one per kernel.

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
from nbp_bench.device import broken
from nbp_bench.torch_sessions import WARM_UPS, EagerSession
from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer

Result = TypeVar("Result")


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """`torch.cuda.graph`, which leaves its own stream current where a capture cannot be ended."""
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            yield
    finally:
        torch.cuda.set_stream(before)


class CapturedCall(Generic[Result]):
    """A computation on tensors at fixed addresses, captured in a CUDA graph.

    Attributes:
        result: of the computation; a replay overwrites its tensors.
    """

    def __init__(self, compute: Callable[[], Result], rewind: Callable[[], object] = lambda: None) -> None:
        """Call `compute` a few times, `rewind` before each call, then capture one more call, which does not run."""
        side_stream = torch.cuda.Stream()  # in their first calls libraries choose kernels, compile and allocate
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UPS):
                rewind()
                compute()
        torch.cuda.current_stream().wait_stream(side_stream)
        self._graph = torch.cuda.CUDAGraph()
        with _capturing(self._graph):
            self.result = compute()

    def __call__(self) -> None:
        """Enqueue the computation."""
        self._graph.replay()


class CapturedStep:
    """A block step in a CUDA graph, with the tensors that it reads and writes."""

    def __init__(
        self, compute: Callable[[Tensor, Tensor], Tensor], batch: int, count: int, device: torch.device
    ) -> None:
        """Capture `compute` for `count` tokens of each clip of a batch."""
        self._tokens_BT = torch.zeros(batch, count, dtype=torch.int64, device=device)
        self._cache_pos_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._replay = CapturedCall(partial(compute, self._tokens_BT, self._cache_pos_B))

    def __call__(self) -> None:
        """Enqueue the step once more, on the same tokens at the same positions."""
        self._replay()

    def logits(self, tokens: Tensor, cache_pos: Tensor) -> Tensor:
        """Logits [B,L,V] after tokens [B,T] at cache_pos [B]; the next call overwrites them."""
        self._tokens_BT.copy_(tokens, non_blocking=True)  # from the host or the device
        self._cache_pos_B.copy_(cache_pos, non_blocking=True)
        self._replay()
        return self._replay.result


class SamplingKernel:
    """Our own engines' sampling kernel, launched on torch's current stream with torch's tensors.

    Raises EngineError, or whatever the driver's binding raises, where it does not run.
    """

    def __init__(self, spec: SystemSpec) -> None:
        from nbp_engines.cuda import Device, Sampler

        self._device = Device.open(torch.cuda.current_device())
        self._sampler = Sampler(self._device, spec)

    def draw(self, logits: Tensor, uniforms: Tensor, settings: Sampling) -> Tensor:
        """Tokens int64 [B,T] of logits [B,T,V] and uniforms float64 [B,T]; waits for nothing."""
        logits, uniforms = logits.contiguous(), uniforms.contiguous()
        tokens = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device)
        pointers = (logits.data_ptr(), uniforms.data_ptr(), tokens.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream  # during a capture, the stream that is captured
        self._sampler.enqueue(*pointers, uniforms.numel(), settings, stream)
        return tokens

    def close(self) -> None:
        """Give back what the kernel holds on the device."""
        self._device.close()


class CudaGraphSession(EagerSession):
    """`EagerSession` with its steps in CUDA graphs, one for each number of tokens, and tokens drawn by our own kernel.

    `unroll` captures reading, drawing and advancing as one graph for each sampling setting, when it first meets it.
    Of the attention kernels the one is kept whose captured step was fastest when the session was opened, not yet
    compiled; with `compiled`, the block step is compiled with that one alone. `notes` tell the choice, and why torch
    draws the tokens where the kernel does not run.
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
        except Exception as error:  # a baseline must not fail for what is ours
            if broken():
                raise
            self.notes.append(f"tokens drawn by torch: {error}")

    @torch.inference_mode()
    def _choose_attention(self) -> None:
        for count in self._token_counts:
            choice = fastest_attention(partial(self._captured_step, count), self.device)
            self._attention[count], self._steps[count] = choice.kind, choice.step
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
        """Predicted tokens int64 [B,blocks·L] of a whole clip, in block order, as `EagerSession.unroll`."""
        first = 1 if self.spec.hybrid else self.spec.condition_tokens
        for count in {first, self.spec.block_size}:  # before the clip begins: a warm-up moves its position
            if (count, settings) not in self._advances:
                self._advances[count, settings] = self._captured_advance(count, settings)
        return super().unroll(condition, noise, settings)

    @torch.inference_mode()
    def _captured_advance(self, count: int, settings: Sampling) -> CapturedCall[None] | None:
        """Reading, drawing and advancing in one graph; None, and a note, where that cannot be captured."""
        try:
            return CapturedCall(partial(self._advance_by, self._compute, count, settings), self._clip.rewind)
        except RuntimeError as error:
            if broken():
                raise
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            self.notes.append(f"drawing after {count} tokens is not captured: {first_line}")
            return None

    def _advance(self, count: int, settings: Sampling) -> None:
        if advance := self._advances[count, settings]:
            advance()
        else:
            super()._advance(count, settings)

    def close(self) -> None:
        """Give back the graphs and the kernel."""
        self._steps.clear()
        self._advances.clear()
        if self._kernel:
            self._kernel.close()


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise EngineError("CUDA graphs take a CUDA device")
