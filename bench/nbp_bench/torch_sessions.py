"""The PyTorch engines that exported ones are compared with, behind the same Session protocol.

`NaiveSession` is the authors' loop, `EagerSession` the same model as one would write it well; cuda_graphs.py captures
the latter. Logits in fp32 on the CPU are numpy arrays; all others stay on their device, and tokens are drawn there.

Shape legend: B batch, L tokens in a block, P condition tokens, T tokens in the call, N heads, S cache slots, D head
dim, C width, V vocabulary, F video frames.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nbp_bench.attention_choice import fastest_attention
from nbp_bench.channels_last import ChannelsLastTokenizer
from nbp_bench.device_clip import DeviceClip
from nbp_bench.fused_step import FusedBlockStep
from nbp_engines import sampling
from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec
from nbp_export.graphs import TORCH_DTYPES
from nbp_reference import sampling as reference_sampling
from nbp_reference.config import Latent
from nbp_reference.model import NextBlockTransformer, block_mask
from nbp_reference.tokenizer import VideoTokenizer

WARM_UPS = 3  # calls before a timing or a capture: libraries allocate memory and choose kernels in their first calls
# Torch may choose among these. cuDNN's attention is missing because it raises an error for some masks.
NAIVE_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class DeviceLogits:
    """Logits on the device that computed them; `np.asarray` copies them to the host, bf16 as float32."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[B,L,V]."""
        return tuple(self.tensor.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(host_array(self.tensor), dtype)


def host_array(tensor: Tensor) -> np.ndarray:
    """A copy on the host, or the CPU tensor's own memory; bf16, which numpy does not have, becomes float32."""
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, for work that is enqueued later; the host does not wait for earlier work."""
    return tensor.to(device, non_blocking=True)  # pageable memory is copied aside before the call returns


def _numpy_reads(tensor: Tensor) -> bool:
    """Whether the tensor is fp32 on the CPU: numpy then works on the same memory."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


class TorchSession:
    """What the PyTorch engines share: the tokenizer, and the way logits and tokens come and go.

    The models are moved to the device and the dtype in place, so that several sessions can share them.

    Attributes:
        spec, device, dtype: of the session.
        sampling: the paper's settings.
        generator, tokenizer: in that dtype, on that device.
        notes: what a reader of the session's times should know.
    """

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
        self.sampling = Sampling()
        self.notes: list[str] = []

    @property
    def _required_tokenizer(self) -> VideoTokenizer:
        if self.tokenizer is None:
            raise EngineError("the checkpoint has no tokenizer: give --tokenizer FILE")
        return self.tokenizer

    @torch.inference_mode()
    def encode(self, video: np.ndarray) -> np.ndarray:
        """Tokens int64 [B,P] of the given frames float32 [B,3,F,H,W]. Raises EngineError without a tokenizer."""
        return host_array(self._required_tokenizer.encode(torch.from_numpy(video).to(self.device, self.dtype)))

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Video float32 [B,3,F,H,W] of tokens int64 [B,T·H·W]. Raises EngineError without a tokenizer."""
        on_device = torch.from_numpy(tokens).to(self.device)
        return host_array(self._required_tokenizer.decode(on_device, Latent(*self.spec.latent)).float())

    def close(self) -> None:
        """Do nothing: the memory goes with the session's last reference."""

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _session_logits(logits: Tensor) -> Any:
    """Logits as a session returns them."""
    return logits.numpy() if _numpy_reads(logits) else DeviceLogits(logits)


class EagerSession(TorchSession):
    """PyTorch as one would write it well: caches allocated once, q, k and v in one product, a block drawn in one go.

    Args:
        spec, generator, tokenizer, device: of the session; the generator's projections are joined in place.
        compiled: have torch.compile compile the block step. The prefill, one call per clip, stays eager.
        channels_last: keep the tokenizer's channels innermost in memory, in a copy of its weights. None means on a GPU
            in half precision, whose tensor cores read that layout.
    """

    def __init__(
        self,
        spec: SystemSpec,
        generator: NextBlockTransformer,
        tokenizer: VideoTokenizer | None,
        device: torch.device | str = "cpu",
        compiled: bool = False,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__(spec, generator, tokenizer, device)
        # On a CPU nothing is gained, and the stages of a clip could not be told apart.
        self.unrolls = self.device.type == "cuda"
        if channels_last is None:
            channels_last = self.device.type == "cuda" and self.dtype != torch.float32
        if channels_last and self.tokenizer:
            self.tokenizer = ChannelsLastTokenizer(self.tokenizer)
        self._block_step = FusedBlockStep(self.generator, spec.batch)
        self._compiled_step: Callable[[Tensor, Tensor], Tensor] | None = None
        self._attention: dict[int, SDPBackend] = {}  # by the number of tokens; torch's own choice where there is none
        with torch.inference_mode():  # as all tensors of a step are: torch.compile would compile for both kinds
            self._clip = DeviceClip(spec, self.device)
        self._choose_attention()
        if compiled:
            self._compile()

    @property
    def _token_counts(self) -> list[int]:
        """How many tokens a call may have, the prefill's number first."""
        return list(dict.fromkeys(graph.inputs[0].shape[1] for graph in self.spec.generator_graphs().values()))

    @torch.inference_mode()
    def _choose_attention(self) -> None:
        if self.device.type != "cuda":
            return
        for count in self._token_counts:
            choice = fastest_attention(partial(self._warm_step, count), self.device)
            self._attention[count] = choice.kind
            self.notes.append(f"{count} tokens: {choice.note}")
        self.notes.append("eager steps: their times are bound by the host, which launches each kernel by itself")

    def _warm_step(self, count: int) -> Callable[[], Tensor]:
        """A step with so many tokens, called a few times already."""
        tokens = torch.zeros(self.spec.batch, count, dtype=torch.int64, device=self.device)
        step = partial(self._compute, tokens, torch.zeros_like(tokens[:, 0]))
        for _ in range(WARM_UPS):
            step()
        return step

    def _compile(self) -> None:
        torch.compiler.reset()  # earlier compilations, for other shapes, count against a limit
        self._compiled_step = torch.compile(self._block_step.__call__, dynamic=False)

    def prefill(self, tokens: np.ndarray) -> Any:
        """Logits [B,L,V] after the condition [B,P]."""
        return self.step(tokens, np.zeros(self.spec.batch, np.int64))

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> Any:
        """Logits [B,L,V] after the block [B,L] at cache_pos [B]."""
        return _session_logits(self._step(torch.from_numpy(tokens), torch.from_numpy(cache_pos)))

    def _step(self, tokens: Tensor, cache_pos: Tensor) -> Tensor:
        """Logits on the device of tensors on the host or the device, by the fastest way that the session has."""
        return self._compute(*(to_device(tensor, self.device) for tensor in (tokens, cache_pos)))

    def _compute(self, tokens: Tensor, cache_pos: Tensor) -> Tensor:
        kind = self._attention.get(tokens.shape[1])
        with sdpa_kernel(kind) if kind else nullcontext():
            if self._compiled_step and tokens.shape[1] <= self.spec.block_size:
                return self._compiled_step(tokens, cache_pos)
            return self._block_step(tokens, cache_pos)

    @torch.inference_mode()
    def sample(self, logits: np.ndarray | DeviceLogits, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,L], all positions at once, by the rule that all engines share."""
        if isinstance(logits, DeviceLogits):
            return host_array(self._draw(logits.tensor, to_device(torch.from_numpy(uniforms), self.device), settings))
        return sampling.sample(logits, uniforms, settings)

    def _draw(self, logits: Tensor, uniforms: Tensor, settings: Sampling) -> Tensor:
        """Tokens int64 [B,L] of logits [B,L,V] and uniforms [B,L], all on the device."""
        if _numpy_reads(logits):  # several times faster than torch at large vocabularies
            return torch.from_numpy(sampling.sample(logits.numpy(), uniforms.numpy(), settings))
        return reference_sampling.sample(logits, uniforms, settings.temperature, settings.top_k, settings.top_p)

    @torch.inference_mode()
    def unroll(self, condition: np.ndarray, noise: np.ndarray, settings: Sampling) -> np.ndarray:
        """Predicted tokens int64 [B,blocks·L] of a whole clip, in block order.

        The host enqueues the whole loop and waits once, at its end.

        Args:
            condition: int64 [B,P], as `prefill` takes it.
            noise: float64 [blocks,B,L] in [0,1).
            settings: how tokens are drawn.
        """
        clip, spec = self._clip, self.spec
        clip.begin(condition, noise)
        if spec.hybrid:
            clip.read(self._step, spec.condition_tokens)  # only begin-of-video has logits of use
            clip.put_begin_of_video()
            for _ in range(spec.block_size):
                self._advance(1, settings)
            clip.put_first_block()
        else:
            self._advance(spec.condition_tokens, settings)
        for _ in range(spec.blocks - 1):
            self._advance(spec.block_size, settings)
        return host_array(clip.predicted_BN).copy()  # the next clip overwrites it

    def _advance(self, count: int, settings: Sampling) -> None:
        """Read the next `count` tokens of the clip and draw those that follow."""
        self._advance_by(self._step, count, settings)

    def _advance_by(self, step: Callable[[Tensor, Tensor], Tensor], count: int, settings: Sampling) -> None:
        logits = self._clip.read(step, count)
        self._clip.draw(partial(self._draw, settings=settings), logits)

    def run(self, graph: str, **inputs: np.ndarray) -> Any:
        """What a bundle's graph of this name would return: the parity proof calls it."""
        if graph in ("encode", "decode"):
            return getattr(self, graph)(*inputs.values())
        return self.step(inputs["tokens"], inputs["cache_pos"])

    @property
    def caches(self) -> dict[str, Tensor]:
        """All caches by name, [B,N,S,D], as they are on the device."""
        pairs = zip(self._block_step.k_caches, self._block_step.v_caches, strict=True)
        return {f"{kv}_cache_{i}": cache for i, pair in enumerate(pairs) for kv, cache in zip("kv", pair, strict=True)}

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite some caches, by name: the parity proof fills them with garbage."""
        for name, value in values.items():
            self.caches[name].copy_(torch.from_numpy(value))

    def read_states(self) -> dict[str, np.ndarray]:
        """All caches by name, [B,N,S,D], bf16 as float32; a later call may change fp32 ones of the CPU."""
        return {name: host_array(cache) for name, cache in self.caches.items()}


class NaiveSession(TorchSession):
    """The authors' way: caches that grow by concatenation, and a Python loop over a block's tokens, a sort for each."""

    def prefill(self, tokens: np.ndarray) -> Any:
        """Logits [B,L,V] after the condition [B,P]; the caches start over."""
        self.past: list[tuple[Tensor, Tensor]] = []
        return self.step(tokens, np.zeros(self.spec.batch, np.int64))

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> Any:
        """Logits [B,L,V] after the block [B,L], which is appended to the caches."""
        model, start = self.generator, int(cache_pos[0])
        query_BT = torch.arange(start, start + tokens.shape[1], device=self.device)[None]
        # In a step every cached token is visible; only the prefill needs the mask.
        mask = block_mask(query_BT, tokens.shape[1], model.config) if start == 0 else None
        x_BTC = (
            model.tok_emb(to_device(torch.from_numpy(tokens), self.device))
            + model.pos_emb[:, start : start + tokens.shape[1]]
        )
        past = []
        with sdpa_kernel(list(NAIVE_ATTENTION)):
            for i, layer in enumerate(cast(Sequence[Any], model.blocks)):
                q, k, v = layer.attn.qkv(layer.ln1(x_BTC))
                if start:
                    k, v = torch.cat([self.past[i][0], k], 2), torch.cat([self.past[i][1], v], 2)
                past.append((k, v))
                x_BTC = x_BTC + layer.attn.attend(q, k, v, mask)
                x_BTC = x_BTC + layer.mlp(layer.ln2(x_BTC))
        self.past = past
        return _session_logits(cast(Tensor, model.head(model.ln_f(x_BTC)))[:, -model.L :])

    @torch.inference_mode()
    def sample(self, logits: np.ndarray | DeviceLogits, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,L], one position after the other."""
        rows = logits.tensor if isinstance(logits, DeviceLogits) else torch.from_numpy(logits)
        noise = to_device(torch.from_numpy(uniforms), rows.device)
        how = (settings.temperature, settings.top_k, settings.top_p)
        pairs = zip(rows.unbind(1), noise.unbind(1), strict=True)
        return host_array(torch.stack([reference_sampling.sample(row, u, *how) for row, u in pairs], 1))
