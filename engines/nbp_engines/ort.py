"""The runtimes `ort-cpu` and `ort-cuda`, which run a bundle's ONNX graphs in ONNX Runtime on a CPU or an NVIDIA GPU.

Every input and output is bound to a buffer of the session. The input and the output of each cache are bound to the same
buffer, so that ONNX Runtime writes new rows in place.
"""

import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nbp_engines.bundle import Bundle
from nbp_engines.cuda import Buffer, Device, Sampler, enqueue_copy, gpu_name, gpu_problem
from nbp_engines.errors import EngineError
from nbp_engines.runtime import OpenOptions, Runtime
from nbp_engines.sampling import Sampling
from nbp_engines.session import GraphSession, state_tensors
from nbp_engines.spec import GraphKind, GraphSpec, TensorSpec

# ONNX Runtime collects usage data unless this is set when it is imported. A user who wants that can set it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# The name and the number that ONNX gives to each dtype.
TYPES = {"fp32": ("float", 1), "fp16": ("float16", 10), "bf16": ("bfloat16", 16), "int64": ("int64", 7)}
Memory = np.ndarray | Buffer


class _Graph:
    """One graph with its buffers.

    Args:
        session: the `InferenceSession` of the graph's file.
        spec: the graph.
        inputs: the buffer of each input, by name.
        outputs: the buffer of each output, by name.
        device_type: ONNX Runtime's name of the device that has the buffers, `cpu` or `cuda`.
        options: the `RunOptions`.
    """

    def __init__(
        self,
        session: Any,
        spec: GraphSpec,
        inputs: Mapping[str, Memory],
        outputs: Mapping[str, Memory],
        device_type: str,
        options: Any,
    ) -> None:
        self.spec = spec
        self.inputs = inputs
        self.outputs = outputs
        self._copied_states = [(inputs[s.input], outputs[s.output]) for s in spec.states if not s.in_place]
        self._session = session
        self._options = options
        self._binding = session.io_binding()
        for bind, tensors, buffers in (
            (self._binding.bind_input, spec.inputs, self.inputs),
            (self._binding.bind_output, spec.outputs, self.outputs),
        ):
            for tensor in tensors:
                address = _address(buffers[tensor.name])
                bind(tensor.name, device_type, 0, TYPES[tensor.dtype][1], tensor.shape, address)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Memory:
        """Copy the inputs to their buffers, run, and return the buffer of the first output."""
        for name, value in inputs.items():
            _write(self.inputs[name], value)
        self._session.run_with_iobinding(self._binding, self._options)
        for state, result in self._copied_states:
            _copy(state, result)
        return self.outputs[self.spec.outputs[0].name]


def _library_problem(extra: str) -> str | None:
    """Return how to install ONNX Runtime if it is missing, else None."""
    if find_spec("onnxruntime"):
        return None
    return f"running ONNX bundles needs ONNX Runtime: pip install 'nbp-export[{extra}]'"


def _library(extra: str) -> Any:
    if problem := _library_problem(extra):
        raise EngineError(problem)
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
    """Raise EngineError unless a graph has the inputs and outputs of the spec.

    ONNX Runtime writes to memory by address, so a difference could make it overwrite other memory.
    """
    for kind, tensors, declared in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        expected = {t.name: f"tensor({TYPES[t.dtype][0]}) {list(t.shape)}" for t in tensors}
        specs = {t.name: t for t in tensors}
        actual = {
            v.name: f"{v.type} {list(specs[v.name].pinned(v.shape) if v.name in specs else v.shape)}" for v in declared
        }
        for name in expected | actual:
            if actual.get(name) != expected.get(name):
                raise EngineError(
                    f"{path}: {kind} {name} is {actual.get(name, 'missing')}, but the manifest has "
                    f"{expected.get(name, 'none')}: export the bundle again"
                )


class OrtSession(GraphSession):
    """A session on a bundle in ONNX Runtime's CPU provider.

    Attributes:
        device_type: ONNX Runtime's name of the device that has the buffers.
        states: the buffers of all states, by the names of their inputs.
    """

    device_type = "cpu"

    def __init__(self, bundle: Bundle, options: OpenOptions = OpenOptions()) -> None:  # noqa: B008 - it is immutable
        """Load the graphs.

        With `lean`, ONNX Runtime does not optimise the graphs, and it reads weights from their file when it uses them.
        The session then needs little memory and loads quickly, but runs slowly.

        Raises EngineError if ONNX Runtime is missing or refuses a graph, if it cannot compute in the bundle's dtype, or
        if the inputs and outputs of a graph are not those of the manifest.
        """
        super().__init__(bundle)
        ort = _library(ORT_CPU.extra)
        specs = self.requested_graphs(options.graphs)
        provider = self._provider()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads or 0
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
        if options.lean:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            # In the default order, fp16 weights are all converted to fp32 before the first use of any.
            settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False
            settings.add_session_config_entry("session.disable_prepacking", "1")
        sessions: dict[Path, Any] = {}  # by file, because one file may hold several graphs
        for name, spec in specs.items():
            path = bundle.graph_file(name)
            try:
                sessions[path] = sessions.get(path) or ort.InferenceSession(
                    (options.models or {}).get(name, path), settings, providers=[provider]
                )
            except Exception as error:  # ONNX Runtime's exceptions have no common base class except Exception
                raise EngineError(f"ONNX Runtime {ort.__version__} refuses {path}: {error}") from error
            if (actual := sessions[path].get_providers()[0]) != provider[0]:
                raise EngineError(f"{path}: ONNX Runtime chose {actual}, not the requested provider {provider[0]}")
            _check(sessions[path], spec, path)
        self.states = {t.name: self._memory(t) for t in state_tensors(specs.values()).values()}
        self.graphs: dict[str, _Graph] = {}
        for number, (name, spec) in enumerate(specs.items(), start=1):
            inputs = {t.name: self.states[t.name] if t.name in self.states else self._memory(t) for t in spec.inputs}
            outputs = {t.name: self._memory(t) for t in spec.results()}
            outputs |= {output: inputs[source] for output, source in spec.aliases.items()}
            run_options = ort.RunOptions()
            # Each graph gets its own CUDA graph, even if several graphs share a file.
            run_options.add_run_config_entry("gpu_graph_id", str(number))
            session = sessions[bundle.graph_file(name)]
            self.graphs[name] = _Graph(session, spec, inputs, outputs, self.device_type, run_options)

    def _provider(self) -> tuple[str, dict[str, str]]:
        """Return the name of the execution provider and its settings."""
        if self.spec.dtype not in ORT_CPU.dtypes:
            raise EngineError(
                f"{self.bundle.path} is {self.spec.dtype}, which ONNX Runtime cannot compute on a CPU: "
                "export it with --dtype fp16 or fp32"
            )
        return ("CPUExecutionProvider", {})

    def _memory(self, tensor: TensorSpec) -> Any:
        """Return a zeroed buffer on the provider's device."""
        return tensor.empty()

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite states, which are named by their inputs."""
        for name, value in values.items():
            _write(self.states[name], value)

    def read_states(self) -> dict[str, np.ndarray]:
        """Return all states by the names of their inputs. The next call may change them."""
        return {name: np.asarray(memory) for name, memory in self.states.items()}

    def close(self) -> None:
        """Free ONNX Runtime's sessions and the buffers."""
        self.graphs.clear()
        self.states.clear()


class OrtCudaSession(OrtSession):
    """A session on a bundle in ONNX Runtime's CUDA provider. Logits and caches stay on the GPU.

    Version 1.31.1, tested with a stand-in for CUDA that computes nothing, accepts every node of our prefill and step
    (TensorScatter, Attention-24, LayerNormalization, Gelu, MatMul), also in bf16, and captures a CUDA graph of them. A
    step copies no cache and waits for nothing. encode and decode run in fp32 and fp16, with each group norm split into
    simpler operators; Pad has no bf16 kernel. If a node had to run on the CPU, which needs a Memcpy,
    `enable_cuda_graph` makes ONNX Runtime refuse the graph instead of falling back.
    """

    device_type = "cuda"

    def __init__(self, bundle: Bundle, options: OpenOptions = OpenOptions()) -> None:  # noqa: B008 - it is immutable
        """Load the graphs. `threads` concerns only the little work on the CPU, and `lean` has no effect.

        Raises EngineError if ONNX Runtime, its CUDA provider or a GPU is missing, if a part of a graph cannot run on
        the GPU, if the GPU has too little memory, or if the inputs and outputs of a graph are not those of the
        manifest.
        """
        if problem := _provider_problem() or _bf16_pad_problem(bundle, options.graphs):
            raise EngineError(problem)
        self.device = Device.open()
        with ExitStack() as opening:
            opening.callback(self.device.close)
            _library(ORT_CUDA.extra).preload_dlls()  # this finds CUDA's libraries if pip installed them
            super().__init__(bundle, options._replace(lean=False))
            self._sampler = Sampler(self.device, self.spec)
            self._opened = opening.pop_all()

    def _provider(self) -> tuple[str, dict[str, str]]:
        return "CUDAExecutionProvider", {
            "device_id": "0",
            "user_compute_stream": str(int(self.device.stream)),  # our copies and draws run on the same stream
            "enable_cuda_graph": "1",
            "use_tf32": "0",  # matrix products in fp32 are not rounded to TF32
        }

    def _memory(self, tensor: TensorSpec) -> Buffer:
        return self.device.allocate(tensor.shape, tensor.dtype, tensor.name)

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Draw tokens int64 [B,T], on the GPU if the logits are there."""
        return self._sampler.sample(logits, uniforms, settings)

    def close(self) -> None:
        """Free ONNX Runtime's sessions, then the device's memory."""
        super().close()
        self._opened.close()


def _provider_problem() -> str | None:
    """Return why the installed ONNX Runtime has no CUDA provider, or None if it has one."""
    if problem := _library_problem(ORT_CUDA.extra):
        return problem
    ort = import_module("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        return None
    return (
        f"the installed ONNX Runtime {ort.__version__} is the package for CPUs, which excludes the one for GPUs: "
        "pip uninstall onnxruntime, then pip install 'nbp-export[gpu]'"
    )


def _bf16_pad_problem(bundle: Bundle, graphs: Collection[str] | None = None) -> str | None:
    """Return why the CUDA provider cannot run these graphs of a bundle, or all if None; None if it can run them.

    encode and decode need the operator Pad, for which the provider has no bf16 kernel.
    """
    padded = [n for n, g in bundle.manifest.graph_specs().items() if g.kind is not GraphKind.BLOCK_STEP]
    padded = [name for name in padded if graphs is None or name in graphs]
    if bundle.manifest.spec.dtype != "bf16" or not padded:
        return None
    return (
        f"{bundle.path} is bf16, and ONNX Runtime's CUDA provider has no Pad for {', '.join(padded)} in bf16: "
        "export it with --dtype fp16"
    )


def _cpu_problem() -> str | None:
    return _library_problem(ORT_CPU.extra)


def _cuda_problem() -> str | None:
    return _provider_problem() or gpu_problem()


def _cpu_description(_: Bundle) -> str:
    return "ONNX Runtime on a CPU"


def _cuda_description(_: Bundle) -> str:
    return f"ONNX Runtime's CUDA provider on {gpu_name()}"


# These are named functions and not lambdas because the entries are sent to other processes.
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
    absence=_cpu_problem,
    description=_cpu_description,
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
    absence=_cuda_problem,
    refusal=_bf16_pad_problem,
    description=_cuda_description,
)
