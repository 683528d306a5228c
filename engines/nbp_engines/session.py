"""The interface of sessions: encode, prefill, step, sample and decode.

The calls take numpy arrays. Logits may stay on the GPU that computed them: `sample` of the same session accepts them
there, and `np.asarray` copies them to the host.

Shape legend: B batch, T tokens in the call, L tokens in a block, P condition tokens, V vocabulary, F video frames. In
tokens [B,T·H·W] of a whole clip, T×H×W are its latent frames, rows and columns.

A hybrid is a class-conditional model, see `spec.py`.
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
    """A loaded model with its buffers. An array that a call returns is valid until the next call of the same name.

    Attributes:
        spec: the static numbers of the model and the batch.
        sampling: the model's default sampling settings.
    """

    spec: SystemSpec
    sampling: Sampling

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Return the condition tokens int64 [B,P], in raster order, of given frames float32 [B,3,F,H,W] in [0,1]."""
        ...

    def prefill(self, tokens: np.ndarray) -> Any:
        """Start a new clip with the condition int64 [B,P] in block order, and return the logits [B,L,V] of block 0.

        The logits of a hybrid's prefill are not used, because its first prediction follows begin-of-video.
        """
        ...

    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> Any:
        """Feed a block, or one token of a hybrid's first block, and return the logits [B,T,V] of the next.

        Args:
            tokens: int64 [B,T].
            cache_pos: int64 [B], the number of tokens that are in each clip's cache already.
        """
        ...

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Draw tokens int64 [B,T].

        Args:
            logits: [B,T,V], as this session returned them or as an array.
            uniforms: float64 [B,T] in [0,1).
            settings: how to draw.
        """
        ...

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Return the video float32 [B,3,F,H,W] in [0,1] of a whole clip's codes [B,T·H·W] in raster order."""
        ...

    def close(self) -> None:
        """Free the buffers."""
        ...

    def __enter__(self) -> Self:
        """Return the session."""
        ...

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        ...


@runtime_checkable
class Unrolling(Protocol):
    """A session that can generate all tokens of a clip in one call. The host then waits once per clip, not per step.

    Attributes:
        unrolls: whether a generator should use that call because it is faster.
    """

    unrolls: bool

    def unroll(self, condition: np.ndarray, noise: np.ndarray, settings: Sampling) -> np.ndarray:
        """Return the predicted token ids int64 [B,blocks·L] in block order, equal to those of single calls.

        Args:
            condition: int64 [B,P], as `prefill` takes it.
            noise: float64 [blocks,B,L] in [0,1).
            settings: how to draw.
        """
        ...


class Graph(Protocol):
    """An opened graph, with its inputs and outputs bound to buffers."""

    spec: GraphSpec

    def run(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """Copy the inputs to the buffers, run, and return the first output.

        The inputs are exactly the arguments of the spec.
        """
        ...


class GraphSession(ABC):
    """The base class of the runtimes' sessions on a bundle.

    Attributes:
        bundle: the bundle.
        spec: its static numbers.
        sampling: its default sampling settings.
        graphs: the open graphs, by name.
    """

    graphs: Mapping[str, Graph]

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.spec: SystemSpec = bundle.manifest.spec
        self.sampling: Sampling = bundle.manifest.sampling

    def requested_graphs(self, names: Collection[str] | None) -> dict[str, GraphSpec]:
        """Return the specs of the graphs with these names, or of all graphs of the bundle if None.

        Raises EngineError for a graph that the bundle does not have.
        """
        specs = self.bundle.manifest.graph_specs()
        for name in names or ():
            if name not in specs:
                raise EngineError(self._absence(name))
        return {name: spec for name, spec in specs.items() if names is None or name in names}

    def _absence(self, graph: str) -> str:
        """Return why a graph cannot be run: it was not opened, the bundle lacks it, or no bundle has such a graph."""
        path, bundle_graphs = self.bundle.path, self.bundle.manifest.graphs
        if graph in bundle_graphs:
            return f"{path}: {graph} is in the bundle but was not opened; this session has {', '.join(self.graphs)}"
        if graph in self.spec.graphs():
            return f"{path} has no {graph} graph: export it with --tokenizer FILE"
        return f"{path}: there is no graph {graph!r}; its graphs are {', '.join(bundle_graphs)}"

    def run(self, graph: str, **inputs: np.ndarray) -> Any:
        """Run one graph on named inputs and return its first output.

        The output is an array, or logits that may be on a GPU. It is valid until the next run of the same graph.

        Raises EngineError if the graph is not open, or if an input is missing, unknown, or of a wrong dtype or shape.
        """
        if graph not in self.graphs:
            raise EngineError(self._absence(graph))
        arguments = {tensor.name: tensor for tensor in self.graphs[graph].spec.arguments()}
        if arguments.keys() != inputs.keys():
            missing, unknown = sorted(arguments.keys() - inputs.keys()), sorted(inputs.keys() - arguments.keys())
            parts = [f"needs {', '.join(missing)}"] * bool(missing) + [f"has no {', '.join(unknown)}"] * bool(unknown)
            raise EngineError(f"{graph} {' and '.join(parts)}: its inputs are {', '.join(arguments)}")
        for name, value in inputs.items():
            tensor = arguments[name]
            expected = f"{np.dtype(NUMPY_DTYPES[tensor.dtype])} {list(tensor.shape)}"
            if (actual := f"{value.dtype} {list(value.shape)}") != expected:
                raise EngineError(f"{graph}: {name} is {actual}, but the graph takes {expected}")
        return self.graphs[graph].run(inputs)

    @abstractmethod
    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite states, which are named by their inputs. The proof uses this to fill unused cache slots."""

    @abstractmethod
    def read_states(self) -> dict[str, np.ndarray]:
        """Return all states by the names of their inputs. The next call may change them.

        States in bf16 are returned as float32.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the graphs and the buffers."""

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Return the tokens int64 [B,P] of given frames float32 [B,3,F,H,W]."""
        return np.asarray(self.run("encode", video=video))

    def prefill(self, tokens: np.ndarray) -> Any:
        """Return the logits [B,min(P,L),V] after the condition int64 [B,P].

        The caches need not be cleared, because a graph never reads the slots after its current tokens.
        """
        return self.run("prefill", tokens=tokens, cache_pos=np.zeros(self.spec.batch, np.int64))

    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> Any:
        """Return the logits [B,T,V] after the tokens int64 [B,T] at cache_pos int64 [B]; T is L or 1."""
        name = "step_1" if tokens.shape[1] == 1 and "step_1" in self.graphs else "step"
        return self.run(name, tokens=tokens, cache_pos=cache_pos)

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Draw tokens int64 [B,T] on the host from logits [B,T,V] and uniforms float64 [B,T]."""
        return sample(np.asarray(logits), uniforms, settings)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Return the video float32 [B,3,F,H,W] of a whole clip's codes int64 [B,T·H·W]."""
        return np.asarray(self.run("decode", tokens=tokens))

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        self.close()


def state_tensors(specs: Iterable[GraphSpec]) -> dict[str, TensorSpec]:
    """Return the tensors of all states of some graphs, by the names of their inputs.

    A session allocates each of them once, because graphs share states of the same name.
    """
    return {tensor.name: tensor for spec in specs for tensor in spec.state_tensors()}
