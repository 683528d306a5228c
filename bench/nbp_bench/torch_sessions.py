"""The PyTorch engines that the exported graphs are compared with; they implement the same `Session` protocol.

`NaiveSession` is the authors' loop. `EagerSession` has static caches and fused projections; cuda_graphs.py captures
its steps. fp32 logits on the CPU are numpy arrays. Other logits stay on their device, where the tokens are drawn too.

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

WARM_UPS = 3  # calls before a timing or a capture, because libraries allocate memory and choose kernels in first calls
# The kernels that torch may choose from. cuDNN's attention is excluded because it raises an error for some masks.
NAIVE_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class DeviceLogits:
    """Logits on the device that computed them; `np.asarray` copies them to the host, bf16 as float32."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [B,L,V] of the logits."""
        return tuple(self.tensor.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(host_array(self.tensor), dtype)


def host_array(tensor: Tensor) -> np.ndarray:
    """Return the tensor as a numpy array: a copy of a GPU tensor, the same memory as a CPU tensor.

    bf16 is converted to float32, because numpy has no bf16.
    """
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device, for work that is enqueued later; the host does not wait for earlier work."""
    return tensor.to(device, non_blocking=True)  # CUDA has read pageable host memory when the call returns


def _is_numpy_compatible(tensor: Tensor) -> bool:
    """Return whether the tensor is fp32 on the CPU, so that numpy can work on its memory."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


class TorchSession:
    """Base class of the PyTorch engines, with encode and decode.

    It moves the models to the device and the dtype in place, so that several sessions can share them.

    Attributes:
        spec: the shapes of the session.
        device, dtype: the device and the torch dtype of the models.
        sampling: the paper's settings.
        generator, tokenizer: the models; the tokenizer is None if the checkpoint has none.
        notes: sentences for the record that explain the session's times.
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
        """Return tokens int64 [B,P] of given frames float32 [B,3,F,H,W]; raise EngineError without a tokenizer."""
        return host_array(self._required_tokenizer.encode(torch.from_numpy(video).to(self.device, self.dtype)))

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Return video float32 [B,3,F,H,W] of tokens int64 [B,T·H·W]; raise EngineError without a tokenizer."""
        on_device = torch.from_numpy(tokens).to(self.device)
        return host_array(self._required_tokenizer.decode(on_device, Latent(*self.spec.latent)).float())

    def close(self) -> None:
        """Do nothing: the memory is freed with the last reference to the session."""

    def __enter__(self) -> Self:
        """Return the session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        self.close()


def _session_logits(logits: Tensor) -> Any:
    """Return logits in the form in which a session returns them: numpy, or `DeviceLogits`."""
    return logits.numpy() if _is_numpy_compatible(logits) else DeviceLogits(logits)


class EagerSession(TorchSession):
    """The model in well-written PyTorch.

    The caches are allocated once, one product computes queries, keys and values, and all tokens of a block are drawn
    together.

    Args:
        spec: the shapes of the session.
        generator, tokenizer: the models; the generator's query, key and value projections are joined in place.
        device: the device to compute on.
        compiled: whether torch.compile compiles the step. The prefill, which runs once per clip, stays eager.
        channels_last: whether the tokenizer, with a copy of its weights, keeps channels innermost in memory. None means
            only on a GPU in half precision, because tensor cores read that layout.
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
        # On a CPU unrolling gains nothing, and it would hide the times of the stages of a clip.
        self.unrolls = self.device.type == "cuda"
        if channels_last is None:
            channels_last = self.device.type == "cuda" and self.dtype != torch.float32
        if channels_last and self.tokenizer:
            self.tokenizer = ChannelsLastTokenizer(self.tokenizer)
        self._block_step = FusedBlockStep(self.generator, spec.batch)
        self._compiled_step: Callable[[Tensor, Tensor], Tensor] | None = None
        self._attention: dict[int, SDPBackend] = {}  # by number of tokens; torch chooses for a number without an entry
        # All tensors of a step must be inference tensors: torch.compile would compile once for each kind.
        with torch.inference_mode():
            self._clip = DeviceClip(spec, self.device)
        self._choose_attention()
        if compiled:
            self._compile()

    @property
    def _token_counts(self) -> list[int]:
        """The numbers of tokens that a call of the generator can have, beginning with the prefill's."""
        return list(dict.fromkeys(graph.inputs[0].shape[1] for graph in self.spec.generator_graphs().values()))

    @torch.inference_mode()
    def _choose_attention(self) -> None:
        if self.device.type != "cuda":
            return
        for count in self._token_counts:
            choice = fastest_attention(partial(self._warmed_up_step, count), self.device)
            self._attention[count] = choice.kernel
            self.notes.append(f"{count} tokens: {choice.note}")
        self.notes.append("eager steps: the host launches every kernel separately, and that limits their speed")

    def _warmed_up_step(self, count: int) -> Callable[[], Tensor]:
        """Return a step with `count` tokens that has already been called a few times."""
        tokens = torch.zeros(self.spec.batch, count, dtype=torch.int64, device=self.device)
        step = partial(self._compute, tokens, torch.zeros_like(tokens[:, 0]))
        for _ in range(WARM_UPS):
            step()
        return step

    def _compile(self) -> None:
        torch.compiler.reset()  # compilations for earlier sessions' shapes count toward torch's limit
        self._compiled_step = torch.compile(self._block_step.__call__, dynamic=False)

    def prefill(self, tokens: np.ndarray) -> Any:
        """Return logits [B,L,V] after the condition [B,P]."""
        return self.step(tokens, np.zeros(self.spec.batch, np.int64))

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> Any:
        """Return logits [B,L,V] after the block [B,L] at cache_pos [B]."""
        return _session_logits(self._step(torch.from_numpy(tokens), torch.from_numpy(cache_pos)))

    def _step(self, tokens: Tensor, cache_pos: Tensor) -> Tensor:
        """Return logits on the device, for tensors on the host or the device; subclasses replay CUDA graphs here."""
        return self._compute(*(to_device(tensor, self.device) for tensor in (tokens, cache_pos)))

    def _compute(self, tokens: Tensor, cache_pos: Tensor) -> Tensor:
        """Return the logits of tensors on the device, with the chosen attention kernel."""
        kernel = self._attention.get(tokens.shape[1])
        with sdpa_kernel(kernel) if kernel else nullcontext():
            if self._compiled_step and tokens.shape[1] <= self.spec.block_size:
                return self._compiled_step(tokens, cache_pos)
            return self._block_step(tokens, cache_pos)

    @torch.inference_mode()
    def sample(self, logits: np.ndarray | DeviceLogits, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Draw tokens int64 [B,L], all positions at once, by the rule that all engines share."""
        if isinstance(logits, DeviceLogits):
            return host_array(self._draw(logits.tensor, to_device(torch.from_numpy(uniforms), self.device), settings))
        return sampling.sample(logits, uniforms, settings)

    def _draw(self, logits: Tensor, uniforms: Tensor, settings: Sampling) -> Tensor:
        """Draw tokens int64 [B,L] from logits [B,L,V] with uniforms [B,L], all on the device."""
        if _is_numpy_compatible(logits):  # numpy is several times faster than torch for large vocabularies
            return torch.from_numpy(sampling.sample(logits.numpy(), uniforms.numpy(), settings))
        return reference_sampling.sample(logits, uniforms, settings.temperature, settings.top_k, settings.top_p)

    @torch.inference_mode()
    def unroll(self, condition: np.ndarray, noise: np.ndarray, settings: Sampling) -> np.ndarray:
        """Return the predicted tokens int64 [B,blocks·L] of a whole clip, in block order.

        The host enqueues the whole loop and waits only at its end.

        Args:
            condition: int64 [B,P], as `prefill` takes it.
            noise: float64 [blocks,B,L] in [0,1).
            settings: how tokens are drawn.
        """
        clip, spec = self._clip, self.spec
        clip.begin(condition, noise)
        if spec.hybrid:
            clip.run_step(self._step, spec.condition_tokens)  # fills the caches; the logits are not used
            clip.queue_begin_of_video()
            for _ in range(spec.block_size):
                self._advance(1, settings)
            clip.queue_first_block()
        else:
            self._advance(spec.condition_tokens, settings)
        for _ in range(spec.blocks - 1):
            self._advance(spec.block_size, settings)
        return host_array(clip.predicted_BN).copy()  # the next clip overwrites it

    def _advance(self, count: int, settings: Sampling) -> None:
        """Run the step on the clip's next `count` tokens and draw the tokens that follow."""
        self._advance_by(self._step, count, settings)

    def _advance_by(self, step: Callable[[Tensor, Tensor], Tensor], count: int, settings: Sampling) -> None:
        logits = self._clip.run_step(step, count)
        self._clip.draw(partial(self._draw, settings=settings), logits)

    def run(self, graph: str, **inputs: np.ndarray) -> Any:
        """Return what a bundle's graph of this name would return; the parity checks call it."""
        if graph in ("encode", "decode"):
            return getattr(self, graph)(*inputs.values())
        return self.step(inputs["tokens"], inputs["cache_pos"])

    @property
    def caches(self) -> dict[str, Tensor]:
        """All caches [B,N,S,D] by name, on the device."""
        pairs = zip(self._block_step.k_caches, self._block_step.v_caches, strict=True)
        return {f"{kv}_cache_{i}": cache for i, pair in enumerate(pairs) for kv, cache in zip("kv", pair, strict=True)}

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite caches by name; the parity checks fill them with garbage."""
        for name, value in values.items():
            self.caches[name].copy_(torch.from_numpy(value))

    def read_states(self) -> dict[str, np.ndarray]:
        """Return all caches [B,N,S,D] by name, bf16 as float32; a later step changes the arrays of fp32 on a CPU."""
        return {name: host_array(cache) for name, cache in self.caches.items()}


class NaiveSession(TorchSession):
    """The authors' loop: caches that grow by concatenation, and a Python loop that sorts once per token of a block."""

    def prefill(self, tokens: np.ndarray) -> Any:
        """Return logits [B,L,V] after the condition [B,P]; the caches start empty."""
        self.past: list[tuple[Tensor, Tensor]] = []
        return self.step(tokens, np.zeros(self.spec.batch, np.int64))

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> Any:
        """Return logits [B,L,V] after the block [B,L], and append its keys and values to the caches."""
        model, start = self.generator, int(cache_pos[0])
        query_BT = torch.arange(start, start + tokens.shape[1], device=self.device)[None]
        # A step sees every cached token, so only the prefill needs a mask.
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
        """Draw tokens int64 [B,L], one position after the other."""
        logits_BLV = logits.tensor if isinstance(logits, DeviceLogits) else torch.from_numpy(logits)
        noise = to_device(torch.from_numpy(uniforms), logits_BLV.device)
        arguments = (settings.temperature, settings.top_k, settings.top_p)
        pairs = zip(logits_BLV.unbind(1), noise.unbind(1), strict=True)
        return host_array(torch.stack([reference_sampling.sample(row, u, *arguments) for row, u in pairs], 1))
