"""The PyTorch engines that exported ones are compared with, behind the same Session protocol.

What is in fp32 on the CPU speaks numpy; elsewhere logits stay where they are, and tokens are drawn there.
Shape legend: B batch, L tokens in a block, P condition tokens, T tokens in the call, N heads, S cache slots, D head
dim, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nbp_bench.device import broken, spans
from nbp_engines import sampling
from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec
from nbp_export.graphs import TORCH_DTYPES
from nbp_reference import sampling as reference_sampling
from nbp_reference.config import Latent
from nbp_reference.model import NextBlockTransformer, block_mask, tensor_scatter_
from nbp_reference.tokenizer import VideoTokenizer

WARM_UPS = 3  # before a capture: libraries allocate and choose kernels in their first calls
TRIALS = 20  # of each kind of attention


@dataclass(frozen=True)
class OnDevice:
    """Logits where they were computed; `np.asarray` brings them, bf16 as float32."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[B,L,V]."""
        return tuple(self.tensor.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(_host(self.tensor), dtype)


def _host(tensor: Tensor) -> np.ndarray:
    """As numpy, which has no bf16."""
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array


class _TorchSession:
    """What the PyTorch engines share: the tokenizer and the life cycle. Models are moved to the device in place."""

    def __init__(
        self,
        spec: SystemSpec,
        generator: NextBlockTransformer,
        tokenizer: VideoTokenizer | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.dtype = TORCH_DTYPES[spec.dtype]
        self.generator = generator.to(self.device, self.dtype).eval()
        self.tokenizer = tokenizer.to(self.device, self.dtype).eval() if tokenizer else None

    def _eyes(self) -> VideoTokenizer:
        if self.tokenizer is None:
            raise EngineError("the checkpoint has no tokenizer: give --tokenizer FILE")
        return self.tokenizer

    @torch.inference_mode()
    def encode(self, video: np.ndarray) -> np.ndarray:
        """Tokens int64 [B,P] of the given frames float32 [B,3,F,H,W]."""
        return _host(self._eyes().encode(torch.from_numpy(video).to(self.device, self.dtype)))

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Video float32 [B,3,F,H,W] of tokens [B,T·H·W]."""
        there = torch.from_numpy(tokens).to(self.device)
        return _host(self._eyes().decode(there, Latent(*self.spec.latent)).float())

    def close(self) -> None:
        """Nothing to give back before the process ends."""

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class ReferenceSession(_TorchSession):
    """PyTorch as one would write it well: caches allocated once, a block sampled in one go.

    Eager, or with `compiled` the block step as torch compiles it. Tokens are drawn by numpy from numpy's logits, else
    by torch.
    """

    def __init__(
        self,
        spec: SystemSpec,
        generator: NextBlockTransformer,
        tokenizer: VideoTokenizer | None,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        super().__init__(spec, generator, tokenizer, device)
        self.k_caches, self.v_caches = self.generator.empty_caches(spec.batch)
        self._compiled = self._compile() if compiled else None

    def _compile(self) -> Callable[..., tuple[Tensor, list[Tensor], list[Tensor]]]:
        torch.compiler.reset()  # what was compiled for other shapes counts against a limit
        return torch.compile(self.generator.block_step, dynamic=False)

    def prefill(self, tokens: np.ndarray) -> Any:
        """Logits [B,L,V] after the condition [B,P]."""
        return self.step(tokens, np.zeros(self.spec.batch, np.int64))

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> Any:
        """Logits [B,L,V] after the block [B,L] at cache_pos [B]."""
        logits = self._logits(torch.from_numpy(tokens), torch.from_numpy(cache_pos))
        return logits.numpy() if (logits.device.type, logits.dtype) == ("cpu", torch.float32) else OnDevice(logits)

    def _logits(self, tokens: Tensor, cache_pos: Tensor) -> Tensor:
        """Of tokens and positions on the host."""
        # Without waiting for the steps before: what is pageable is copied aside before the call returns.
        return self._compute(*(t.to(self.device, non_blocking=True) for t in (tokens, cache_pos)))

    def _compute(self, tokens: Tensor, cache_pos: Tensor) -> Tensor:
        if self._compiled and tokens.shape[1] <= self.spec.block_size:  # a prefill is one call a clip
            return self._compiled(tokens, cache_pos, self.k_caches, self.v_caches, _put_)[0]
        return self.generator.block_step(tokens, cache_pos, self.k_caches, self.v_caches, tensor_scatter_)[0]

    @torch.inference_mode()
    def sample(self, logits: np.ndarray | OnDevice, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,L], all positions at once, by the rule of all engines."""
        if isinstance(logits, OnDevice):
            return self._draw(logits.tensor, uniforms, settings)
        return sampling.sample(logits, uniforms, settings)

    def _draw(self, logits: Tensor, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        noise = torch.from_numpy(uniforms).to(self.device, non_blocking=True)
        how = (settings.temperature, settings.top_k, settings.top_p)
        return _host(reference_sampling.sample(logits, noise, *how))

    def run(self, graph: str, **inputs: np.ndarray) -> Any:
        """What a bundle's graph of this name would give: for the proof."""
        if graph in ("encode", "decode"):
            return getattr(self, graph)(*inputs.values())
        return self.step(inputs["tokens"], inputs["cache_pos"])

    def _caches(self) -> dict[str, Tensor]:
        layers = enumerate(zip(self.k_caches, self.v_caches, strict=True))
        return {f"{kv}_cache_{i}": cache for i, pair in layers for kv, cache in zip("kv", pair, strict=True)}

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite some caches, by name: for the proof."""
        for name, value in values.items():
            self._caches()[name].copy_(torch.from_numpy(value))

    def read_states(self) -> dict[str, np.ndarray]:
        """All caches by name, [B,N,S,D], bf16 as float32: for the proof."""
        return {name: _host(cache) for name, cache in self._caches().items()}


def _put_(cache_BNSD: Tensor, update_BNTD: Tensor, cache_pos_B: Tensor) -> Tensor:
    """`tensor_scatter_` as the indexed write that torch compiles in place: of a scatter it makes two copies."""
    slots_BT = cache_pos_B[:, None] + torch.arange(update_BNTD.shape[2], device=update_BNTD.device)
    rows_B1 = torch.arange(len(slots_BT), device=update_BNTD.device)[:, None]
    cache_BNSD[rows_B1, :, slots_BT] = update_BNTD.transpose(1, 2)
    return cache_BNSD


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """`torch.cuda.graph`, which leaves its own stream current where a capture cannot be ended."""
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            yield
    finally:
        torch.cuda.set_stream(before)


class _Captured:
    """One computation of a session in a CUDA graph, with the memory that it reads and writes."""

    def __init__(self, session: "GraphsSession", tokens: int) -> None:
        batch = session.spec.batch
        self.tokens = torch.zeros(batch, tokens, dtype=torch.int64, device=session.device)
        self.cache_pos = torch.zeros(batch, dtype=torch.int64, device=session.device)
        aside = torch.cuda.Stream()  # kernels are chosen, and compiled, where nothing is captured
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                session._compute(self.tokens, self.cache_pos)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with _capturing(self.graph):
            self.logits = session._compute(self.tokens, self.cache_pos)


class GraphsSession(ReferenceSession):
    """The same step captured in a CUDA graph for each number of tokens, and tokens drawn by our own kernel.

    Of the kinds of attention that take a mask the one is kept that was fastest when the session was opened, not yet
    compiled; a compiled step is compiled with that one alone. `notes` say which, and if torch draws the tokens after
    all, why.
    """

    kinds: ClassVar = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)

    def __init__(
        self,
        spec: SystemSpec,
        generator: NextBlockTransformer,
        tokenizer: VideoTokenizer | None,
        device: torch.device | str = "cuda",
        compiled: bool = False,
    ) -> None:
        super().__init__(spec, generator, tokenizer, device)
        if self.device.type != "cuda":
            raise EngineError("CUDA graphs take a CUDA device")
        self.notes: list[str] = []
        counts = {graph.inputs[0].shape[1] for graph in spec.generator_graphs().values()}
        found = {count: self._fastest(count) for count in counts}
        self._steps = {count: captured for count, (_, captured) in found.items()}
        if compiled:
            self._compiled = self._compile()
            for count in (count for count in counts if count <= spec.block_size):
                self._steps[count] = self._captured(count, found[count][0])
                self.notes.append(f"step with {count} tokens compiled with {found[count][0].name}")
        self._own: _Kernel | None = None
        try:
            self._own = _Kernel(spec)
        except Exception as error:  # a baseline must not fail for what is ours
            if broken():
                raise
            self.notes.append(f"tokens drawn by torch: {error}")

    @torch.inference_mode()
    def _captured(self, tokens: int, kind: SDPBackend) -> _Captured:
        with sdpa_kernel(kind):
            return _Captured(self, tokens)

    @torch.inference_mode()
    def _fastest(self, tokens: int) -> tuple[SDPBackend, _Captured]:
        captured, refused = {}, {}
        for kind in self.kinds:
            try:
                candidate = self._captured(tokens, kind)
            except RuntimeError as error:
                if broken():  # nothing was refused: no kind would run any more
                    raise
                refused[kind] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            times = spans(self.device, lambda _, graph=candidate.graph: graph.replay(), TRIALS)  # type: ignore[misc]
            captured[kind] = (sorted(times)[TRIALS // 2], candidate)
        told = [f"{kind.name} {ns / 1e6:.3f} ms" for kind, (ns, _) in captured.items()]
        told += [f"{kind.name} {why}" for kind, why in refused.items()]
        self.notes.append(f"attention with {tokens} tokens: {', '.join(told)}")
        if not captured:
            raise EngineError(f"no kind of attention could be captured: {self.notes[-1]}")
        kind = min(captured, key=lambda kind: captured[kind][0])
        return kind, captured[kind][1]

    def _logits(self, tokens: Tensor, cache_pos: Tensor) -> Tensor:
        step = self._steps[tokens.shape[1]]
        step.tokens.copy_(tokens, non_blocking=True)
        step.cache_pos.copy_(cache_pos, non_blocking=True)
        step.graph.replay()
        return step.logits

    def _draw(self, logits: Tensor, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        if self._own:
            return self._own.draw(logits, uniforms, settings)
        return super()._draw(logits, uniforms, settings)

    def close(self) -> None:
        """Give the kernel back; the graphs go with the session."""
        if self._own:
            self._own.device.close()


class _Kernel:
    """Sampling by our own engines' kernel, on torch's stream. Raises EngineError where it does not run."""

    def __init__(self, spec: SystemSpec) -> None:
        from nbp_engines.cuda import Device, Sampler

        device = Device.open(torch.cuda.current_device())
        self.device = replace(device, stream=torch.cuda.current_stream().cuda_stream)
        self._dtype = spec.dtype
        self._sampler = Sampler(self.device, spec)

    def draw(self, logits: Tensor, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,L] of logits [B,L,V]."""
        from nbp_engines.cuda import Buffer

        buffer = Buffer(self.device, logits.data_ptr(), tuple(logits.shape), self._dtype)
        return self._sampler.sample(buffer, uniforms, settings)


class NaiveSession(_TorchSession):
    """The authors' way: caches that grow by concatenation, and a Python loop over the block with a sort a token."""

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [B,L,V] after the condition [B,P]; the caches start over."""
        self.past: list[tuple[Tensor, Tensor]] = []
        return self.step(tokens, np.zeros(self.spec.batch, np.int64))

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> np.ndarray:
        """Logits [B,L,V] after the block [B,L], which goes behind what is cached."""
        model, start = self.generator, int(cache_pos[0])
        query_BT = torch.arange(start, start + tokens.shape[1])[None]
        # In a step every cached token is visible; only the prefill needs the mask.
        mask = block_mask(query_BT, tokens.shape[1], model.config) if start == 0 else None
        x_BTC = model.tok_emb(torch.from_numpy(tokens)) + model.pos_emb[:, start : start + tokens.shape[1]]
        past = []
        for i, layer in enumerate(cast(Sequence[Any], model.blocks)):
            q, k, v = layer.attn.qkv(layer.ln1(x_BTC))
            if start:
                k, v = torch.cat([self.past[i][0], k], 2), torch.cat([self.past[i][1], v], 2)
            past.append((k, v))
            x_BTC = x_BTC + layer.attn.attend(q, k, v, mask)
            x_BTC = x_BTC + layer.mlp(layer.ln2(x_BTC))
        self.past = past
        return cast(Tensor, model.head(model.ln_f(x_BTC)))[:, -model.L :].numpy()

    def sample(self, logits: np.ndarray, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,L], one position after the other."""
        pairs = zip(torch.from_numpy(logits).unbind(1), torch.from_numpy(uniforms).unbind(1), strict=True)
        how = (settings.temperature, settings.top_k, settings.top_p)
        return torch.stack([reference_sampling.sample(row, u, *how) for row, u in pairs], 1).numpy()
