"""ONNX Runtime, on the CPU or an NVIDIA GPU: every input and output is bound to memory that we own.

Each cache's input and output are bound to the same memory, so the runtime writes new rows in place.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nbp_engines.bundle import Bundle
from nbp_engines.cuda import Buffer, Device, Sampler, enqueue_copy, gpu_name, no_gpu
from nbp_engines.errors import EngineError
from nbp_engines.runtime import OpenOptions, Runtime
from nbp_engines.sampling import Sampling
from nbp_engines.session import GraphSession, state_tensors
from nbp_engines.spec import GraphKind, GraphSpec, TensorSpec

# Each dtype's name in ONNX and its number there.
TYPES = {"fp32": ("float", 1), "fp16": ("float16", 10), "bf16": ("bfloat16", 16), "int64": ("int64", 7)}
Memory = np.ndarray | Buffer


class _Graph:
    """One graph with its bindings. `inputs` and `outputs` map tensor names to memory that the runtime reads and writes.

    `place` is what ONNX Runtime calls where the memory lies.
    """

    def __init__(
        self,
        session: Any,
        spec: GraphSpec,
        inputs: Mapping[str, Memory],
        outputs: Mapping[str, Memory],
        place: str,
        options: Any,
    ) -> None:
        self.spec = spec
        self.inputs = inputs
        self.outputs = outputs
        self._carried = [(inputs[s.input], outputs[s.output]) for s in spec.states if not s.in_place]
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
        for source, result in self._carried:
            _copy(source, result)
        return self.outputs[self.spec.outputs[0].name]


def _missing(extra: str) -> str | None:
    if find_spec("onnxruntime"):
        return None
    return f"running ONNX bundles needs ONNX Runtime: pip install 'nbp-export[{extra}]'"


def _library(extra: str) -> Any:
    if why := _missing(extra):
        raise EngineError(why)
    return import_module("onnxruntime")


def _address(memory: Memory) -> int:
    return memory.ptr if isinstance(memory, Buffer) else memory.ctypes.data


def _write(memory: Memory, value: np.ndarray) -> None:
    if isinstance(memory, Buffer):
        memory.write(value)
    else:
        np.copyto(memory, value, casting="same_kind")


def _copy(target: Memory, source: Memory) -> None:
    if isinstance(target, Buffer) and isinstance(source, Buffer):
        enqueue_copy(target.device, target.ptr, source.ptr, target.nbytes, "DeviceToDevice")
    else:
        np.copyto(np.asarray(target), np.asarray(source))


def _check(session: Any, spec: GraphSpec, path: Path) -> None:
    """Raise EngineError unless the graph has the spec's inputs and outputs: the runtime writes to memory by address."""
    for kind, tensors, declared in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        due = {t.name: f"tensor({TYPES[t.dtype][0]}) {list(t.shape)}" for t in tensors}
        known = {t.name: t for t in tensors}
        found = {
            v.name: f"{v.type} {list(known[v.name].pinned(v.shape) if v.name in known else v.shape)}" for v in declared
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

    def __init__(self, bundle: Bundle, options: OpenOptions = OpenOptions()) -> None:  # noqa: B008 - it is immutable
        """Load the graphs.

        A `lean` session runs the graphs as they are written and reads weights from the file as they are used: it takes
        little memory, loads quickly and runs slowly.

        Raises EngineError if ONNX Runtime is missing or refuses a graph, if it cannot compute in the bundle's dtype, or
        if a graph has other inputs and outputs than the manifest says.
        """
        super().__init__(bundle)
        ort = _library(ORT_CPU.extra)
        specs = self.opened(options.graphs)
        provider = self._provider()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads or 0
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
        if options.lean:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # else all weights are widened at the start
            settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False
            settings.add_session_config_entry("session.disable_prepacking", "1")
        opened: dict[Path, Any] = {}  # one file may hold several graphs
        for name, spec in specs.items():
            path = bundle.graph_file(name)
            try:
                opened[path] = opened.get(path) or ort.InferenceSession(
                    (options.models or {}).get(name, path), settings, providers=[provider]
                )
            except Exception as error:  # the runtime's own exceptions share no base but this
                raise EngineError(f"ONNX Runtime {ort.__version__} refuses {path}: {error}") from error
            if (found := opened[path].get_providers()[0]) not in provider:
                raise EngineError(f"{path}: ONNX Runtime took {found} in place of what was asked for: {provider}")
            _check(opened[path], spec, path)
        self.states = {t.name: self._memory(t) for t in state_tensors(specs.values()).values()}
        self.graphs: dict[str, _Graph] = {}
        for number, (name, spec) in enumerate(specs.items(), start=1):
            inputs = {t.name: self.states[t.name] if t.name in self.states else self._memory(t) for t in spec.inputs}
            outputs = {t.name: self._memory(t) for t in spec.results()}
            outputs |= {output: inputs[source] for output, source in spec.aliases.items()}
            run = ort.RunOptions()
            run.add_run_config_entry("gpu_graph_id", str(number))  # a file's graphs are captured one by one
            self.graphs[name] = _Graph(opened[bundle.graph_file(name)], spec, inputs, outputs, self.place, run)

    def _provider(self) -> tuple[str, dict[str, str]]:
        """The execution provider and its settings."""
        if self.spec.dtype not in ORT_CPU.dtypes:
            raise EngineError(
                f"{self.bundle.path} is {self.spec.dtype}, which ONNX Runtime's CPU kernels do not compute in: "
                "export it with --dtype fp16 or fp32"
            )
        return ("CPUExecutionProvider", {})

    def _memory(self, tensor: TensorSpec) -> Any:
        """Zeroed memory where the provider computes."""
        return tensor.empty()

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite some states, by the names of their inputs."""
        for name, value in values.items():
            _write(self.states[name], value)

    def read_states(self) -> dict[str, np.ndarray]:
        """All states by the names of their inputs; the next call may change them."""
        return {name: np.asarray(memory) for name, memory in self.states.items()}

    def close(self) -> None:
        """Free the runtime's sessions and the buffers."""
        self.graphs.clear()
        self.states.clear()


class OrtCudaSession(OrtSession):
    """A bundle in ONNX Runtime's CUDA provider, logits and caches staying on the GPU.

    What the provider of 1.31.1 does with our graphs was seen with a CUDA that computes nothing. It takes every node of
    prefill and step (TensorScatter, Attention-24, LayerNormalization, Gelu, MatMul), bf16 too, and captures them: a
    step copies no cache, and nothing in it waits. encode and decode run in fp32 and fp16, their group norms taken
    apart; Pad has no bf16 kernel. Where a node would need the CPU, and so a Memcpy, `enable_cuda_graph` makes ONNX
    Runtime refuse the graph instead of falling back.
    """

    place = "cuda"

    def __init__(self, bundle: Bundle, options: OpenOptions = OpenOptions()) -> None:  # noqa: B008 - it is immutable
        """Load the graphs; the options' threads serve what little is done on the CPU, and nothing is lean.

        Raises EngineError if ONNX Runtime, its CUDA provider or a GPU is missing, if a graph cannot run there whole,
        if there is too little memory, or if a graph has other inputs and outputs than the manifest says.
        """
        if why := _no_cuda_provider() or _no_pad_in_bf16(bundle, options.graphs):
            raise EngineError(why)
        self.device = Device.open()
        with ExitStack() as opening:
            opening.callback(self.device.close)
            _library(ORT_CUDA.extra).preload_dlls()  # CUDA's libraries, where pip installed them
            super().__init__(bundle, options._replace(lean=False))
            self._sampler = Sampler(self.device, self.spec)
            self._opened = opening.pop_all()

    def _provider(self) -> tuple[str, dict[str, str]]:
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


def _no_cuda_provider() -> str | None:
    """Why ONNX Runtime here cannot use a GPU, or None."""
    if why := _missing(ORT_CUDA.extra):
        return why
    ort = import_module("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        return None
    return (
        f"ONNX Runtime {ort.__version__} here is the CPU's, and only one can be installed: "
        "pip uninstall onnxruntime, then pip install 'nbp-export[gpu]'"
    )


def _no_pad_in_bf16(bundle: Bundle, graphs: Collection[str] | None = None) -> str | None:
    """Why some graphs of a bundle, all if None, cannot run on its CUDA provider, or None."""
    padded = [n for n, g in bundle.manifest.graph_specs().items() if g.kind is not GraphKind.BLOCK_STEP]
    padded = [name for name in padded if graphs is None or name in graphs]
    if bundle.manifest.spec.dtype != "bf16" or not padded:
        return None
    return (
        f"{bundle.path} is bf16, in which ONNX Runtime's CUDA provider has no Pad for {', '.join(padded)}: "
        "export it with --dtype fp16"
    )


def _no_onnx_runtime() -> str | None:
    return _missing(ORT_CPU.extra)


def _no_cuda() -> str | None:
    return _no_cuda_provider() or no_gpu()


def _on_cpu(_: Bundle) -> str:
    return "ONNX Runtime on a CPU"


def _on_cuda(_: Bundle) -> str:
    return f"ONNX Runtime's CUDA provider on {gpu_name()}"


# Named functions throughout: an entry travels to other processes.
ORT_CPU = Runtime(
    name="ort-cpu",
    title="ONNX Runtime on a CPU",
    status=("ort-cpu",),
    extra="cpu",
    packages=("onnxruntime",),
    devices=("cpu",),
    dtypes=("fp32", "fp16"),
    runs_engines=False,
    shares_weights=False,
    takes_models=True,
    open=OrtSession,
    absence=_no_onnx_runtime,
    description=_on_cpu,
)
ORT_CUDA = Runtime(
    name="ort-cuda",
    title="ONNX Runtime's CUDA provider",
    status=("ort-cuda", "sample.cu"),
    extra="gpu",
    packages=("onnxruntime-gpu", "cuda-bindings"),
    devices=("cuda",),
    dtypes=("fp32", "fp16", "bf16"),
    runs_engines=False,
    shares_weights=True,
    takes_models=False,
    open=OrtCudaSession,
    absence=_no_cuda,
    refusal=_no_pad_in_bf16,
    description=_on_cuda,
)
