"""What a bundle's graphs take and give: the only place where the names, dtypes and shapes stand.

Shape legend: B batch, L tokens in a block, P condition tokens (given latent frames, or a hybrid's text), S cache slots,
N heads, D head dim, V vocabulary, F frames, T×H×W latent frames, rows and columns of tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import prod
from typing import Any, Self

import numpy as np

NUMPY_DTYPES: dict[str, type] = {"fp32": np.float32, "fp16": np.float16, "int64": np.int64}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int64": 8}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name, dtype, shape: as in the graph.
        token_axis: the axis that counts tokens, which a graph may leave open, so that one graph serves prefill and
            steps; None where everything is static.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    token_axis: int | None = None

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return prod(self.shape) * BYTES[self.dtype]

    def pinned(self, dims: Sequence[int | str]) -> tuple[int | str, ...]:
        """Dimensions that a graph declares, its token axis pinned to this tensor's size where a name leaves it open."""
        axis = self.token_axis
        if axis is None or len(dims) != len(self.shape) or not isinstance(dims[axis], str):
            return tuple(dims)
        return (*dims[:axis], self.shape[axis], *dims[axis + 1 :])

    def empty(self) -> np.ndarray:
        """A zeroed buffer for it."""
        buffer: np.ndarray = np.zeros(self.shape, NUMPY_DTYPES[self.dtype])
        return buffer


@dataclass(frozen=True)
class State:
    """What a graph carries from one run to the next.

    Attributes:
        input, output: the names of the tensors that hold it before and after a run.
        in_place: whether the output must lie in the input's memory, of which the graph then writes a few rows; else
            the output is copied to the input after the run.
    """

    input: str
    output: str
    in_place: bool


class GraphKind(StrEnum):
    """What a graph does. Rules and checks are chosen by it."""

    ENCODE = "encode"
    BLOCK_STEP = "block_step"
    DECODE = "decode"


@dataclass(frozen=True)
class GraphSpec:
    """One graph.

    Attributes:
        name: unique in its bundle.
        kind: what it does; a prefill is a block step of more tokens.
        inputs, outputs: in the graph's order.
        states: what it carries from run to run. Graphs whose states have the same input share that memory.
    """

    name: str
    kind: GraphKind
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[State, ...] = ()

    @property
    def aliases(self) -> dict[str, str]:
        """Output name → input name, for the states that are updated in place."""
        return {state.output: state.input for state in self.states if state.in_place}

    def state_tensors(self) -> tuple[TensorSpec, ...]:
        """The inputs that hold states, in the graph's order."""
        names = {state.input for state in self.states}
        return tuple(t for t in self.inputs if t.name in names)

    def arguments(self) -> tuple[TensorSpec, ...]:
        """The inputs that a caller gives, which are those that hold no state."""
        names = {state.input for state in self.states}
        return tuple(t for t in self.inputs if t.name not in names)

    def results(self) -> tuple[TensorSpec, ...]:
        """The outputs that need memory of their own: all but those in the memory of an input."""
        return tuple(t for t in self.outputs if t.name not in self.aliases)


@dataclass(frozen=True)
class SystemSpec:
    """Every number that is static in a bundle: from these, all graphs' inputs and outputs follow.

    Attributes:
        block: (t, h, w) tokens predicted together.
        latent: (T, H, W) tokens of a whole clip.
        condition_latents: latent frames that are given; 0 for a hybrid, which is told its class as text.
        video: (F, height, width) in pixels of a whole clip.
        condition_frames: video frames that are given.
        batch: clips generated at once, B.
        dtype: fp32, fp16 or bf16, of weights, caches and logits; tokens are int64 and video fp32 always.
        layers, heads, head_dim, vocab: of the generator.
        text_tokens: of a hybrid's condition; 0 for frame prediction.
        text_vocab: text token ids of a hybrid.
    """

    block: tuple[int, int, int]
    latent: tuple[int, int, int]
    condition_latents: int
    video: tuple[int, int, int]
    condition_frames: int
    batch: int
    dtype: str
    layers: int
    heads: int
    head_dim: int
    vocab: int
    text_tokens: int = 0
    text_vocab: int = 0

    @property
    def block_size(self) -> int:
        """L."""
        return prod(self.block)

    @property
    def clip_tokens(self) -> int:
        """Tokens of a whole clip."""
        return prod(self.latent)

    @property
    def condition_tokens(self) -> int:
        """P."""
        return self.text_tokens or self.condition_latents * prod(self.latent[1:])

    @property
    def capacity(self) -> int:
        """S: all tokens but the last block, which is never fed back.

        A hybrid feeds begin-of-video and L-1 middle-of-video tokens too, as many as it leaves out.
        """
        return self.clip_tokens + self.text_tokens if self.hybrid else self.clip_tokens - self.block_size

    @property
    def blocks(self) -> int:
        """Blocks to predict."""
        return (self.clip_tokens - self.condition_latents * prod(self.latent[1:])) // self.block_size

    @property
    def steps(self) -> int:
        """Forward passes that predict, as the paper counts them: one a block, a hybrid's first block one a token."""
        return self.blocks + (self.block_size - 1) * self.hybrid

    @property
    def hybrid(self) -> bool:
        """Whether the model is class-conditional: told a text, and begun token by token."""
        return self.text_tokens > 0

    @property
    def code_shift(self) -> int:
        """The token id of the video tokenizer's token 0: a hybrid's L special tokens and its text come before it."""
        return self.block_size + self.text_vocab if self.hybrid else 0

    def frames(self, latents: int) -> int:
        """Video frames of the first so many latent frames: the very first stands alone."""
        frames, total = self.video[0], self.latent[0]
        return 1 + (latents - 1) * (frames - 1) // max(1, total - 1)

    def codes(self, tokens: np.ndarray) -> np.ndarray:
        """The video tokenizer's tokens behind sampled ones; ids that are no video become the nearest that is."""
        return np.asarray((tokens - self.code_shift).clip(0, self.vocab - self.code_shift - 1))

    @property
    def block_text(self) -> str:
        """`1x1x16`."""
        return "x".join(map(str, self.block))

    def order(self) -> np.ndarray:
        """Raster index of each token of a whole clip in block order: int64 [T·H·W]."""
        (t, h, w), (frames, rows, columns) = self.block, self.latent
        raster = np.arange(self.clip_tokens).reshape(frames // t, t, rows // h, h, columns // w, w)
        return raster.transpose(0, 2, 4, 1, 3, 5).reshape(-1)

    def caches(self) -> tuple[TensorSpec, ...]:
        """k_cache_0, v_cache_0, k_cache_1 … [B,N,S,D]."""
        shape = (self.batch, self.heads, self.capacity, self.head_dim)
        return tuple(TensorSpec(f"{kv}_cache_{i}", self.dtype, shape) for i in range(self.layers) for kv in "kv")

    def _block_step(self, name: str, tokens: int) -> GraphSpec:
        caches = self.caches()
        states = tuple(State(cache.name, f"{cache.name}_out", in_place=True) for cache in caches)
        logits = (self.batch, min(tokens, self.block_size), self.vocab)
        return GraphSpec(
            name,
            GraphKind.BLOCK_STEP,
            (
                TensorSpec("tokens", "int64", (self.batch, tokens), token_axis=1),
                TensorSpec("cache_pos", "int64", (self.batch,)),
                *caches,
            ),
            (
                TensorSpec("logits", self.dtype, logits, token_axis=1),
                *(
                    TensorSpec(state.output, cache.dtype, cache.shape)
                    for state, cache in zip(states, caches, strict=True)
                ),
            ),
            states,
        )

    def generator_graphs(self) -> dict[str, GraphSpec]:
        """`prefill` and `step`, and `step_1`, of one token, with which a hybrid begins."""
        sizes = {"prefill": self.condition_tokens, "step": self.block_size}
        if self.hybrid and self.block_size > 1:
            sizes["step_1"] = 1
        return {name: self._block_step(name, size) for name, size in sizes.items()}

    def tokenizer_graphs(self) -> dict[str, GraphSpec]:
        """`encode`, of the given frames if there are any, and `decode`, to the whole clip; tokens in raster order."""
        frames, height, width = self.video
        given = TensorSpec("video", "fp32", (self.batch, 3, self.condition_frames, height, width))
        whole = TensorSpec("video", "fp32", (self.batch, 3, frames, height, width))
        condition = TensorSpec("tokens", "int64", (self.batch, self.condition_tokens))
        clip = TensorSpec("tokens", "int64", (self.batch, self.clip_tokens))
        encode = {} if self.hybrid else {"encode": GraphSpec("encode", GraphKind.ENCODE, (given,), (condition,))}
        return encode | {"decode": GraphSpec("decode", GraphKind.DECODE, (clip,), (whole,))}

    def graphs(self) -> dict[str, GraphSpec]:
        """All that a bundle may hold, by name."""
        return self.generator_graphs() | self.tokenizer_graphs()

    def to_json(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Build from `to_json`'s values; raises TypeError for unknown or missing names."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)
