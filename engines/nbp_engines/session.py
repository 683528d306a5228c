"""What every runtime looks like from outside: five calls on numpy arrays.

Logits may stay where they were made, on a GPU: `sample` of the same session takes them as they are, `np.asarray` brings
them.

Shape legend: B batch, T tokens in the call, L tokens in a block, P condition tokens, V vocabulary, F video frames.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from nbp_engines.bundle import Bundle
from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling, sample
from nbp_engines.spec import NUMPY_DTYPES, GraphSpec, SystemSpec, TensorSpec


class Session(Protocol):
    """One loaded system with its buffers. Arrays that a call returns are valid until the next call of that name."""

    spec: SystemSpec

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Condition tokens int64 [B,P], raster order, of the given frames float32 [B,3,F,H,W] in [0,1]."""
        ...

    def prefill(self, tokens: np.ndarray) -> Any:
        """Start over with the condition [B,P] in block order; logits [B,L,V] of the first block.

        After a hybrid's text the logits mean nothing: begin-of-video is yet to come.
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
    """A session that also makes all tokens of a clip in one call: the host then waits once per clip, not per step."""

    def unroll(self, condition: np.ndarray, noise: np.ndarray, settings: Sampling) -> np.ndarray:
        """Predicted tokens int64 [B,blocks·L], as sampled, in block order: those that prefill, sample and step make.

        Args:
            condition: int64 [B,P], as `prefill` takes it.
            noise: float64 [blocks,B,L] in [0,1).
            settings: how tokens are drawn.
        """
        ...


class Graph(Protocol):
    """One graph with its bindings. `run` is given inputs that fit its spec."""

    spec: GraphSpec

    def run(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """Copy the inputs in and run; the first output."""
        ...


class GraphSession(ABC):
    """A session on a bundle's graphs, whatever runs them.

    Attributes:
        spec: of the bundle.
        graphs: those that are open, by name.
    """

    spec: SystemSpec
    graphs: Mapping[str, Graph]

    def run(self, graph: str, **inputs: np.ndarray) -> Any:
        """Run one graph on named inputs; its first output, an array or logits, valid until the graph's next run.

        Raises EngineError if the bundle has no such graph, or the input has another dtype or shape.
        """
        if graph not in self.graphs:
            raise EngineError(f"the bundle has no {graph} graph: export it with --tokenizer FILE")
        for tensor in self.graphs[graph].spec.inputs:
            if (value := inputs.get(tensor.name)) is not None:
                due = f"{np.dtype(NUMPY_DTYPES[tensor.dtype])} {list(tensor.shape)}"
                if (found := f"{value.dtype} {list(value.shape)}") != due:
                    raise EngineError(f"{graph}: {tensor.name} is {found}, the graph takes {due}")
        return self.graphs[graph].run(inputs)

    @abstractmethod
    def write_caches(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite some caches, by name, [B,N,S,D]: the proof of parity fills them with garbage."""

    @abstractmethod
    def read_caches(self) -> dict[str, np.ndarray]:
        """All caches by name, [B,N,S,D]; the next call may change them. bf16 ones come as float32."""

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


def own(spec: GraphSpec) -> list[TensorSpec]:
    """The inputs and outputs of a graph that are no caches, and so its alone."""
    caches = {*spec.aliases, *spec.aliases.values()}
    return [tensor for tensor in (*spec.inputs, *spec.outputs) if tensor.name not in caches]


RUNTIMES = ("onnx", "cuda", "tensorrt")


def open_session(
    bundle: Bundle | Path | str,
    threads: int | None = None,
    require_receipt: bool = False,
    runtime: str | None = None,
    graphs: Collection[str] | None = None,
) -> GraphSession:
    """Open a bundle, or only some of its graphs, with the runtime it was made for or another one.

    Args:
        bundle: opened, or its folder.
        threads: inside an operator, on a CPU; the runtime's own choice if None.
        require_receipt: refuse a bundle that nothing proves.
        runtime: `onnx`, ONNX Runtime on the CPU; `cuda`, its CUDA provider; `tensorrt`, the bundle's engines. The last
            two have never been executed on a GPU by us.
        graphs: names; all if None.

    Raises BundleError if it is not an intact bundle, or has no valid receipt where one is required, EngineError if the
    runtime is not installed or refuses it.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle), require_receipt)
    if require_receipt:
        opened.prove()
    chosen = runtime or opened.manifest.runtime
    if chosen == "onnx":
        from nbp_engines.ort import OrtSession

        return OrtSession(opened, threads, graphs)
    if chosen == "cuda":
        from nbp_engines.ort import OrtCudaSession

        return OrtCudaSession(opened, threads, graphs)
    if chosen == "tensorrt":
        from nbp_engines.trt import TrtSession

        return TrtSession(opened, graphs)
    raise EngineError(f"{opened.path} is for runtime {chosen!r}, which this version cannot run: {', '.join(RUNTIMES)}")
