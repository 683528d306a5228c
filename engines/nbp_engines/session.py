"""What every runtime looks like from outside: five calls.

They take numpy arrays. Logits may stay where they were made, on a GPU: `sample` of the same session takes them as they
are, and `np.asarray` brings them to the host.

Shape legend: B batch, T tokens in the call, L tokens in a block, P condition tokens, V vocabulary, F video frames.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from nbp_engines.bundle import Bundle
from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling, sample
from nbp_engines.spec import NUMPY_DTYPES, GraphSpec, SystemSpec, TensorSpec


class Session(Protocol):
    """One loaded system with its buffers. Arrays that a call returns are valid until the next call of that name."""

    spec: SystemSpec
    sampling: Sampling  # the settings that its model comes with

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Condition tokens int64 [B,P], raster order, of the given frames float32 [B,3,F,H,W] in [0,1]."""
        ...

    def prefill(self, tokens: np.ndarray) -> Any:
        """Start over with the condition [B,P] in block order; logits [B,L,V] of the first block.

        A hybrid's prefill predicts nothing: its logits follow the text, before begin-of-video.
        """
        ...

    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> Any:
        """Read a block, or one token of a hybrid's start, [B,T] at cache_pos int64 [B]; logits [B,T,V] of the next."""
        ...

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,T] from logits [B,T,V], this session's or an array, and uniforms float64 [B,T]."""
        ...

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Video float32 [B,3,F,H,W] in [0,1] of a clip's tokens [B,T·H·W], raster order."""
        ...

    def close(self) -> None:
        """Give the buffers back."""
        ...

    def __enter__(self) -> Self:
        """The session itself."""
        ...

    def __exit__(self, *_: object) -> None:
        """Close it."""
        ...


@runtime_checkable
class Unrolling(Protocol):
    """A session that can make all tokens of a clip in one call: the host then waits once per clip, not per step.

    Attributes:
        unrolls: whether that is the faster way, so that a generator takes it.
    """

    unrolls: bool

    def unroll(self, condition: np.ndarray, noise: np.ndarray, settings: Sampling) -> np.ndarray:
        """Predicted tokens int64 [B,blocks·L], as sampled, in block order: those that prefill, sample and step make.

        Args:
            condition: int64 [B,P], as `prefill` takes it.
            noise: float64 [blocks,B,L] in [0,1).
            settings: how tokens are drawn.
        """
        ...


class Graph(Protocol):
    """One graph with its bindings. `run` gets all arguments of its spec, and no others."""

    spec: GraphSpec

    def run(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """Copy the inputs in and run; the first output."""
        ...


class GraphSession(ABC):
    """A session on a bundle's graphs, whatever runs them.

    Attributes:
        bundle: which one.
        graphs: those that are open, by name.
    """

    graphs: Mapping[str, Graph]

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.spec: SystemSpec = bundle.manifest.spec
        self.sampling: Sampling = bundle.manifest.sampling

    def opened(self, graphs: Collection[str] | None) -> dict[str, GraphSpec]:
        """The specs of the graphs to open, all of the bundle's if None. Raises EngineError for one it does not have."""
        specs = self.bundle.manifest.graph_specs()
        for name in graphs or ():
            if name not in specs:
                raise EngineError(self._absence(name))
        return {name: spec for name, spec in specs.items() if graphs is None or name in graphs}

    def _absence(self, graph: str) -> str:
        """Why a graph cannot be run: there is no such name, the bundle has none, or it was not opened."""
        path, known, present = self.bundle.path, self.spec.graphs(), self.bundle.manifest.graphs
        if graph in present:
            return f"{path}: {graph} is in the bundle but was not opened; this session has {', '.join(self.graphs)}"
        if graph in known:
            return f"{path} has no {graph} graph: export it with --tokenizer FILE"
        return f"{path}: there is no graph {graph!r}; its graphs are {', '.join(present)}"

    def run(self, graph: str, **inputs: np.ndarray) -> Any:
        """Run one graph on named inputs; its first output, an array or logits, valid until the graph's next run.

        Raises EngineError if the graph is not open, if an input is missing or unknown, or has another dtype or shape.
        """
        if graph not in self.graphs:
            raise EngineError(self._absence(graph))
        arguments = {tensor.name: tensor for tensor in self.graphs[graph].spec.arguments()}
        if odd := arguments.keys() ^ inputs.keys():
            missing, unknown = sorted(odd - inputs.keys()), sorted(odd - arguments.keys())
            parts = [f"misses {', '.join(missing)}"] * bool(missing) + [f"has no {', '.join(unknown)}"] * bool(unknown)
            raise EngineError(f"{graph} {' and '.join(parts)}: its inputs are {', '.join(arguments)}")
        for name, value in inputs.items():
            tensor = arguments[name]
            expected = f"{np.dtype(NUMPY_DTYPES[tensor.dtype])} {list(tensor.shape)}"
            if (given := f"{value.dtype} {list(value.shape)}") != expected:
                raise EngineError(f"{graph}: {name} is {given}, the graph takes {expected}")
        return self.graphs[graph].run(inputs)

    @abstractmethod
    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite some states, by the names of their inputs: the proof of parity fills caches with garbage."""

    @abstractmethod
    def read_states(self) -> dict[str, np.ndarray]:
        """All states by the names of their inputs; the next call may change them. bf16 ones come as float32."""

    @abstractmethod
    def close(self) -> None:
        """Give the runtime's sessions and the buffers back."""

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Tokens int64 [B,P] of the given frames float32 [B,3,F,H,W]."""
        return np.asarray(self.run("encode", video=video))

    def prefill(self, tokens: np.ndarray) -> Any:
        """Logits [B,L,V] after the condition [B,P]. The caches are not cleared: no later slot is ever seen."""
        return self.run("prefill", tokens=tokens, cache_pos=np.zeros(self.spec.batch, np.int64))

    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> Any:
        """Logits [B,T,V] after the block, or the one token, [B,T] at cache_pos [B]."""
        name = "step_1" if tokens.shape[1] == 1 and "step_1" in self.graphs else "step"
        return self.run(name, tokens=tokens, cache_pos=cache_pos)

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,L]."""
        return sample(np.asarray(logits), uniforms, settings)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Video float32 [B,3,F,H,W] of tokens [B,T·H·W]."""
        return np.asarray(self.run("decode", tokens=tokens))

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def state_tensors(specs: Iterable[GraphSpec]) -> dict[str, TensorSpec]:
    """What a session allocates once for all of its graphs: each state's tensor, by the name of its input."""
    return {tensor.name: tensor for spec in specs for tensor in spec.state_tensors()}
