"""ONNX Runtime, on the CPU or an NVIDIA GPU: every input and output is bound to memory that we own.

Each cache's input and output are bound to the same memory, so the runtime writes new rows in place.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from nbp_engines.bundle import Bundle
from nbp_engines.cuda import Buffer, Device, Sampler
from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling
from nbp_engines.session import GraphSession, own
from nbp_engines.spec import NUMPY_DTYPES, GraphSpec, TensorSpec

# Each dtype's name in ONNX and its number there.
TYPES = {"fp32": ("float", 1), "fp16": ("float16", 10), "bf16": ("bfloat16", 16), "int64": ("int64", 7)}
Memory = np.ndarray | Buffer


class _Graph:
    """One graph with its bindings. `inputs` and `outputs` map tensor names to memory that the runtime reads and writes.

    `memory` has it all by the names of tensors; `place` is what ONNX Runtime calls where it lies.
    """

    def __init__(self, session: Any, spec: GraphSpec, memory: Mapping[str, Memory], place: str, options: Any) -> None:
        self.spec = spec
        self.inputs = {t.name: memory[t.name] for t in spec.inputs}
        self.outputs = {t.name: memory[spec.aliases.get(t.name, t.name)] for t in spec.outputs}
        self._session = session
        self._options = options
        self._binding = session.io_binding()
        for bind, tensors, ends in (
            (self._binding.bind_input, spec.inputs, self.inputs),
            (self._binding.bind_output, spec.outputs, self.outputs),
        ):
            for tensor in tensors:
                bind(tensor.name, place, 0, TYPES[tensor.dtype][1], tensor.shape, _address(ends[tensor.name]))

    def run(self, inputs: Mapping[str, np.ndarray]) -> Memory:
        """Copy the inputs in, run, and return the first output's memory."""
        for name, value in inputs.items():
            _write(self.inputs[name], value)
        self._session.run_with_iobinding(self._binding, self._options)
        return self.outputs[self.spec.outputs[0].name]


def _library(extra: str) -> Any:
    try:
        return import_module("onnxruntime")
    except ModuleNotFoundError:
        pip = f"pip install 'nbp-export[{extra}]'"
        raise EngineError(f"running ONNX bundles needs ONNX Runtime: {pip}") from None


def _address(memory: Memory) -> int:
    return memory.ptr if isinstance(memory, Buffer) else memory.ctypes.data


def _write(memory: Memory, value: np.ndarray) -> None:
    if isinstance(memory, Buffer):
        memory.write(value)
    else:
        np.copyto(memory, value, casting="same_kind")


def _check(session: Any, spec: GraphSpec, path: Path) -> None:
    """Raise EngineError unless the graph has the spec's inputs and outputs: the runtime writes to memory by address."""
    for kind, tensors, declared in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        due = {t.name: f"tensor({TYPES[t.dtype][0]}) {list(t.shape)}" for t in tensors}
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


class OrtSession(GraphSession):
    """A bundle in ONNX Runtime's CPU provider."""

    place = "cpu"

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
        ort = _library("cpu")
        specs, self.spec = bundle.manifest.graph_specs(), bundle.manifest.spec
        wanted = [name for name in specs if graphs is None or name in graphs]
        provider = self._provider(bundle)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
        if lean:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # else all weights are widened at the start
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        opened: dict[Path, Any] = {}  # one file may hold several graphs
        for name in wanted:
            path = bundle.graph_file(name)
            try:
                opened[path] = opened.get(path) or ort.InferenceSession(
                    (models or {}).get(name, path), options, providers=[provider]
                )
            except Exception as error:  # the runtime's own exceptions share no base but this
                raise EngineError(f"ONNX Runtime {ort.__version__} refuses {path}: {error}") from error
            if (found := opened[path].get_providers()[0]) not in provider:
                raise EngineError(f"{path}: ONNX Runtime took {found} in place of what was asked for: {provider}")
            _check(opened[path], specs[name], path)
        self.caches = {t.name: self._memory(t) for t in self.spec.caches()}
        self.graphs: dict[str, _Graph] = {}
        for number, name in enumerate(wanted, start=1):
            memory = self.caches | {t.name: self._memory(t) for t in own(specs[name])}
            run = ort.RunOptions()
            run.add_run_config_entry("gpu_graph_id", str(number))  # a file's graphs are captured one by one
            self.graphs[name] = _Graph(opened[bundle.graph_file(name)], specs[name], memory, self.place, run)

    def _provider(self, bundle: Bundle) -> tuple[str, dict[str, str]]:
        """The execution provider and its settings."""
        if self.spec.dtype not in NUMPY_DTYPES:
            raise EngineError(
                f"{bundle.path} is {self.spec.dtype}, which ONNX Runtime's CPU kernels do not compute in: "
                "export it with --dtype fp16 or fp32"
            )
        return ("CPUExecutionProvider", {})

    def _memory(self, tensor: TensorSpec) -> Any:
        """Zeroed memory where the provider computes."""
        return tensor.empty()

    def write_caches(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite some caches, by name."""
        for name, value in values.items():
            _write(self.caches[name], value)

    def read_caches(self) -> dict[str, np.ndarray]:
        """All caches by name, [B,N,S,D]; the next call may change them."""
        return {name: np.asarray(memory) for name, memory in self.caches.items()}

    def close(self) -> None:
        """Free the runtime's sessions and the buffers."""
        self.graphs.clear()
        self.caches.clear()


class OrtCudaSession(OrtSession):
    """A bundle in ONNX Runtime's CUDA provider, logits and caches staying on the GPU. Never executed on one by us.

    What the provider of 1.31.1 does with our graphs was seen with a CUDA that computes nothing. It takes every node of
    prefill and step (TensorScatter, Attention-24, LayerNormalization, Gelu, MatMul), bf16 too, and captures them: a
    step copies no cache, and nothing in it waits. encode and decode run in fp32 and fp16, their group norms taken
    apart; Pad has no bf16 kernel. Where a node would need the CPU, and so a Memcpy, `enable_cuda_graph` makes ONNX
    Runtime refuse the graph instead of falling back.
    """

    place = "cuda"

    def __init__(self, bundle: Bundle, threads: int | None = None, graphs: Collection[str] | None = None) -> None:
        """Load the graphs, or only some; `threads` for what little is done on the CPU.

        Raises EngineError if ONNX Runtime, its CUDA provider or a GPU is missing, if a graph cannot run there whole,
        if there is too little memory, or if a graph has other inputs and outputs than the manifest says.
        """
        ort, spec = _library("gpu"), bundle.manifest.spec
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise EngineError(
                f"ONNX Runtime {ort.__version__} here is the CPU's, and only one can be installed: "
                "pip uninstall onnxruntime, then pip install 'nbp-export[gpu]'"
            )
        tokenizer = bundle.manifest.graphs.keys() & spec.tokenizer_graphs().keys() & set(graphs or spec.graphs())
        if spec.dtype == "bf16" and tokenizer:
            raise EngineError(
                f"{bundle.path} is bf16, in which ONNX Runtime's CUDA provider has no Pad for {', '.join(tokenizer)}: "
                "export it with --dtype fp16"
            )
        self.device = Device.open()
        with ExitStack() as opening:
            opening.callback(self.device.close)
            ort.preload_dlls()  # CUDA's libraries, where pip installed them
            super().__init__(bundle, threads, graphs)
            self._sampler = Sampler(self.device, spec)
            self._opened = opening.pop_all()

    def _provider(self, bundle: Bundle) -> tuple[str, dict[str, str]]:  # noqa: ARG002 - for the CPU's message
        return "CUDAExecutionProvider", {
            "device_id": "0",
            "user_compute_stream": str(int(self.device.stream)),  # copies and sampling stay in order with it
            "enable_cuda_graph": "1",
            "use_tf32": "0",  # fp32 is fp32
        }

    def _memory(self, tensor: TensorSpec) -> Buffer:
        return self.device.allocate(tensor.shape, tensor.dtype, tensor.name)

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,L], drawn on the GPU if the logits lie there."""
        return self._sampler.sample(logits, uniforms, settings)

    def close(self) -> None:
        """Free the runtime's sessions, then what they were bound to."""
        super().close()
        self._opened.close()
