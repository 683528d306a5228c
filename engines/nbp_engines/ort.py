"""ONNX Runtime on the CPU: one session a graph, every input and output bound to memory that we own.

Each cache's input and output are bound to the same buffer, so the runtime writes new rows in place.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from nbp_engines import sampling
from nbp_engines.bundle import Bundle
from nbp_engines.errors import EngineError
from nbp_engines.spec import NUMPY_DTYPES, GraphSpec

ONNX_TYPES = {"fp32": "tensor(float)", "fp16": "tensor(float16)", "int64": "tensor(int64)"}


class _Graph:
    """One graph with its bindings. `buffers` maps tensor names to the arrays that the runtime reads and writes."""

    def __init__(self, session: Any, spec: GraphSpec, shared: dict[str, np.ndarray]) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._spec = spec
        self.inputs = {t.name: shared[t.name] if t.name in shared else t.empty() for t in spec.inputs}
        self.outputs = {
            t.name: self.inputs[spec.aliases[t.name]] if t.name in spec.aliases else t.empty() for t in spec.outputs
        }
        for bind, arrays in ((self._binding.bind_input, self.inputs), (self._binding.bind_output, self.outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self, **inputs: np.ndarray) -> np.ndarray:
        """Copy the inputs in, run, and return the first output's buffer."""
        for name, value in inputs.items():
            buffer = self.inputs[name]
            if (value.dtype, value.shape) != (buffer.dtype, buffer.shape):
                found, due = (f"{array.dtype} {list(array.shape)}" for array in (value, buffer))
                raise EngineError(f"{self._spec.name}: {name} is {found}, the graph takes {due}")
            np.copyto(buffer, value)
        self._session.run_with_iobinding(self._binding)
        return self.outputs[self._spec.outputs[0].name]


def _check(session: Any, spec: GraphSpec, path: Path) -> None:
    """Raise EngineError unless the graph has the spec's inputs and outputs: the runtime writes to memory by address."""
    for kind, tensors, declared in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        due = {t.name: f"{ONNX_TYPES[t.dtype]} {list(t.shape)}" for t in tensors}
        known = {t.name: t for t in tensors}
        found = {
            v.name: f"{v.type} {list(known[v.name].settled(v.shape) if v.name in known else v.shape)}" for v in declared
        }
        for name in due | found:
            if found.get(name) != due.get(name):
                raise EngineError(
                    f"{path}: {kind} {name} is {found.get(name, 'missing')}, where the manifest has "
                    f"{due.get(name, 'none')}: export the bundle again"
                )


class OrtSession:
    """A bundle in ONNX Runtime's CPU provider. See `nbp_engines.session.Session`."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        graphs: Collection[str] | None = None,
        lean: bool = False,
        models: Mapping[str, bytes] | None = None,
    ) -> None:
        """Load the graphs, or only some; `threads` inside an operator, the runtime's own choice if None.

        `lean` runs the graphs as they are written, weights read from the file as they are used: little memory, quick
        to load, slow to run. `models` are graphs to run in place of the bundle's files, on the same weights.

        Raises EngineError if ONNX Runtime is missing or refuses a graph, if it cannot compute in the bundle's dtype, or
        if a graph has other inputs and outputs than the manifest says.
        """
        try:
            import onnxruntime as ort
        except ModuleNotFoundError:
            raise EngineError("running ONNX bundles needs ONNX Runtime: pip install 'nbp-export[cpu]'") from None
        self.spec = bundle.manifest.spec
        if self.spec.dtype not in NUMPY_DTYPES:
            raise EngineError(
                f"{bundle.path} is {self.spec.dtype}, which ONNX Runtime's CPU kernels do not compute in: "
                "export it with --dtype fp16 or fp32"
            )
        self._bundle = bundle
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
        if lean:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # else all weights are widened at the start
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        specs = bundle.manifest.graph_specs()
        opened: dict[Path, Any] = {}  # one file may hold several graphs
        wanted = [name for name in specs if graphs is None or name in graphs]
        for name in wanted:
            path = bundle.graph_file(name)
            try:
                opened[path] = opened.get(path) or ort.InferenceSession(
                    (models or {}).get(name, path), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # the runtime's own exceptions share no base but this
                raise EngineError(f"ONNX Runtime {ort.__version__} refuses {path}: {error}") from error
            _check(opened[path], specs[name], path)
        self.caches = {t.name: t.empty() for t in self.spec.caches()}
        self._graphs = {name: _Graph(opened[bundle.graph_file(name)], specs[name], self.caches) for name in wanted}

    def run(self, graph: str, **inputs: np.ndarray) -> np.ndarray:
        """Run one graph on named inputs; the first output's buffer, valid until the graph's next run."""
        if graph not in self._graphs:
            raise EngineError(f"{self._bundle.path} has no {graph} graph: export it with --tokenizer FILE")
        return self._graphs[graph].run(**inputs)

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Tokens int64 [B,P] of the given frames float32 [B,3,F,H,W]."""
        return self.run("encode", video=video)

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [B,L,V] after the condition [B,P]. The caches are not cleared: no later slot is ever seen."""
        return self.run("prefill", tokens=tokens, cache_pos=np.zeros(self.spec.batch, np.int64))

    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> np.ndarray:
        """Logits [B,T,V] after the block, or the one token, [B,T] at cache_pos [B]."""
        name = "step_1" if tokens.shape[1] == 1 and "step_1" in self._graphs else "step"
        return self.run(name, tokens=tokens, cache_pos=cache_pos)

    def sample(self, logits: np.ndarray, uniforms: np.ndarray, settings: sampling.Sampling) -> np.ndarray:
        """Tokens int64 [B,L]."""
        return sampling.sample(logits, uniforms, settings)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Video float32 [B,3,F,H,W] of tokens [B,T·H·W]."""
        return self.run("decode", tokens=tokens)

    def write_caches(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite some caches, by name."""
        for name, value in values.items():
            np.copyto(self.caches[name], value, casting="same_kind")

    def read_caches(self) -> dict[str, np.ndarray]:
        """All caches by name, [B,N,S,D]; the next call may change them."""
        return dict(self.caches)

    def close(self) -> None:
        """Free the runtime's sessions and the buffers."""
        self._graphs.clear()
        self.caches.clear()

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()
