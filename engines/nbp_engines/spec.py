"""Inputs, outputs and states of a bundle's graphs. All names, dtypes and shapes are defined here.

A class-conditional model is called a hybrid: it generates its first block token by token and all others as blocks.

Shape legend: B batch, L tokens in a block, P condition tokens (the given latent frames, or a hybrid's text), S cache
slots, N heads, D head dim, V vocabulary, F video frames, T×H×W a clip's latent frames, rows and columns of tokens.
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
        name: the tensor's name in the graph.
        dtype: a key of `BYTES`.
        shape: the static shape that the graph is run with.
        token_axis: the axis that counts tokens. The ONNX file may leave its size open, so that one file serves prefill
            and steps. None if the file has a static shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    token_axis: int | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * BYTES[self.dtype]

    def pinned(self, dims: Sequence[int | str]) -> tuple[int | str, ...]:
        """Return the dimensions that an ONNX file declares, with this tensor's size on the token axis if it is open.

        An open dimension is a name in place of a number. Other open dimensions stay as they are.
        """
        axis = self.token_axis
        if axis is None or len(dims) != len(self.shape) or not isinstance(dims[axis], str):
            return tuple(dims)
        return (*dims[:axis], self.shape[axis], *dims[axis + 1 :])

    def empty(self) -> np.ndarray:
        """Return a zeroed array of this shape and dtype."""
        buffer: np.ndarray = np.zeros(self.shape, NUMPY_DTYPES[self.dtype])
        return buffer


@dataclass(frozen=True)
class State:
    """A value that a graph carries from one run to the next, such as a KV cache.

    Attributes:
        input: the name of the tensor that holds the value before a run.
        output: the name of the tensor that holds the value after a run.
        in_place: if true, the output must share the input's memory, and the graph writes only the new rows. If false,
            the output is copied to the input after each run.
    """

    input: str
    output: str
    in_place: bool


class GraphKind(StrEnum):
    """What a graph computes. Linter rules and parity checks depend on it."""

    ENCODE = "encode"
    BLOCK_STEP = "block_step"
    DECODE = "decode"


@dataclass(frozen=True)
class GraphSpec:
    """One graph.

    Attributes:
        name: unique in its bundle.
        kind: what it computes. A prefill is a block step of more tokens.
        inputs: all input tensors, in the graph's order.
        outputs: all output tensors, in the graph's order.
        states: the values that it carries from run to run. Graphs whose states have the same input share its memory.
    """

    name: str
    kind: GraphKind
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[State, ...] = ()

    @property
    def aliases(self) -> dict[str, str]:
        """Output name → input name of each state that is updated in place."""
        return {state.output: state.input for state in self.states if state.in_place}

    def state_tensors(self) -> tuple[TensorSpec, ...]:
        """Return the inputs that hold states, in the graph's order."""
        names = {state.input for state in self.states}
        return tuple(t for t in self.inputs if t.name in names)

    def arguments(self) -> tuple[TensorSpec, ...]:
        """Return the inputs that a caller has to give, which are all that hold no state."""
        names = {state.input for state in self.states}
        return tuple(t for t in self.inputs if t.name not in names)

    def results(self) -> tuple[TensorSpec, ...]:
        """Return the outputs that need their own memory, which are all that do not share the memory of an input."""
        return tuple(t for t in self.outputs if t.name not in self.aliases)


@dataclass(frozen=True)
class SystemSpec:
    """The static numbers of a bundle, which determine the inputs and outputs of all its graphs.

    Attributes:
        block: (t, h, w), the shape of a block in tokens: frames, rows, columns.
        latent: (T, H, W), the shape of a whole clip in tokens.
        condition_latents: number of given latent frames; 0 for a hybrid, whose condition is a text.
        video: (F, height, width) of a whole clip, in frames and pixels.
        condition_frames: number of given video frames.
        batch: B, the number of clips that are generated at once.
        dtype: fp32, fp16 or bf16, the dtype of weights, caches and logits. Tokens are always int64, video always fp32.
        layers: number of transformer layers of the generator.
        heads: number of attention heads.
        head_dim: numbers per attention head.
        vocab: number of token ids, including a hybrid's special and text ids.
        text_tokens: length of a hybrid's text; 0 for frame prediction.
        text_vocab: number of a hybrid's text ids; 0 for frame prediction.
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
        """L, the number of tokens in a block."""
        return prod(self.block)

    @property
    def clip_tokens(self) -> int:
        """T·H·W, the number of tokens in a whole clip."""
        return prod(self.latent)

    @property
    def condition_tokens(self) -> int:
        """P, the number of condition tokens."""
        return self.text_tokens or self.condition_latents * prod(self.latent[1:])

    @property
    def capacity(self) -> int:
        """S, the number of cache slots: one per token that is fed to the generator.

        These are all tokens of the condition and the clip except the last block, which is never fed back. A hybrid also
        feeds one begin-of-video and L-1 middle-of-video tokens, which are as many as its last block has.
        """
        return self.clip_tokens + self.text_tokens if self.hybrid else self.clip_tokens - self.block_size

    @property
    def blocks(self) -> int:
        """Number of blocks to predict."""
        return (self.clip_tokens - self.condition_latents * prod(self.latent[1:])) // self.block_size

    @property
    def steps(self) -> int:
        """Number of forward passes that predict tokens, as the paper counts them.

        There is one pass per block, except that a hybrid's first block takes one pass per token. The prefill of a frame
        prediction counts, because it predicts the first block.
        """
        return self.blocks + (self.block_size - 1) * self.hybrid

    @property
    def hybrid(self) -> bool:
        """Whether the model is class-conditional: its condition is a text, and it generates block 0 token by token."""
        return self.text_tokens > 0

    @property
    def code_shift(self) -> int:
        """The token id of the video tokenizer's code 0. In a hybrid, L special ids and the text ids precede it."""
        return self.block_size + self.text_vocab if self.hybrid else 0

    def frames(self, latents: int) -> int:
        """Return how many video frames the first `latents` latent frames cover. The first one covers one frame."""
        frames, total = self.video[0], self.latent[0]
        return 1 + (latents - 1) * (frames - 1) // max(1, total - 1)

    def codes(self, tokens: np.ndarray) -> np.ndarray:
        """Return the video tokenizer's codes of token ids, in the same shape.

        An id that stands for no code becomes the code with the nearest id.
        """
        return np.asarray((tokens - self.code_shift).clip(0, self.vocab - self.code_shift - 1))

    @property
    def block_text(self) -> str:
        """The block shape as text, such as `1x1x16`."""
        return "x".join(map(str, self.block))

    def block_order(self) -> np.ndarray:
        """Return the raster index of each token of a whole clip, listed in block order: int64 [T·H·W]."""
        (t, h, w), (frames, rows, columns) = self.block, self.latent
        raster = np.arange(self.clip_tokens).reshape(frames // t, t, rows // h, h, columns // w, w)
        return raster.transpose(0, 2, 4, 1, 3, 5).reshape(-1)

    def caches(self) -> tuple[TensorSpec, ...]:
        """Return the KV caches k_cache_0, v_cache_0, k_cache_1 and so on, each [B,N,S,D]."""
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
        """Return `prefill`, `step` and, for a hybrid with L > 1, `step_1`.

        `step_1` processes a single token. A hybrid generates its first block with it.
        """
        sizes = {"prefill": self.condition_tokens, "step": self.block_size}
        if self.hybrid and self.block_size > 1:
            sizes["step_1"] = 1
        return {name: self._block_step(name, size) for name, size in sizes.items()}

    def tokenizer_graphs(self) -> dict[str, GraphSpec]:
        """Return `encode`, except for a hybrid, and `decode`. Their tokens are in raster order.

        `encode` takes the given frames, and `decode` returns the video of the whole clip.
        """
        frames, height, width = self.video
        given = TensorSpec("video", "fp32", (self.batch, 3, self.condition_frames, height, width))
        whole = TensorSpec("video", "fp32", (self.batch, 3, frames, height, width))
        condition = TensorSpec("tokens", "int64", (self.batch, self.condition_tokens))
        clip = TensorSpec("tokens", "int64", (self.batch, self.clip_tokens))
        encode = {} if self.hybrid else {"encode": GraphSpec("encode", GraphKind.ENCODE, (given,), (condition,))}
        return encode | {"decode": GraphSpec("decode", GraphKind.DECODE, (clip,), (whole,))}

    def graphs(self) -> dict[str, GraphSpec]:
        """Return all graphs that a bundle may hold, by name."""
        return self.generator_graphs() | self.tokenizer_graphs()

    def to_json(self) -> dict[str, Any]:
        """Return plain values, from which `from_json` builds the same spec."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Build a spec from the values of `to_json`. Raises TypeError for unknown or missing names."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)
