"""An emulated GPU made of host memory. It tests our calls of CUDA and TensorRT, not what these libraries do.

Code that forgets to wait, to zero memory or to copy gets wrong numbers: enqueued work runs only when the stream is
synchronised, new memory is full of NaN, and pinned memory is read when a copy runs and not when it is enqueued. A call
that is captured does not run. A TensorRT engine is an ONNX graph of the bundle, which ONNX Runtime runs on the memory
whose addresses were set in the context.

Every function has the name and parameters of the real one. test_cuda.py compares them.
"""
# ruff: noqa: ARG001, ARG002, N802 - functions have CUDA's names and parameters, even if they do not need them

import ctypes
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tensorrt_rtx
from cuda.bindings import driver, nvrtc, runtime

from nbp_engines import cuda
from nbp_engines.bundle import Bundle
from nbp_engines.manifest import Engine
from nbp_engines.ort import TYPES
from nbp_engines.sampling import Sampling, sample
from nbp_engines.spec import GraphSpec, SystemSpec, TensorSpec
from nbp_export.parity import fp32_twin
from tests.export.support import resealed

Work = Callable[[], None]
OK, ERROR = runtime.cudaError_t.cudaSuccess, runtime.cudaError_t
GIB = 2**30


def at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return the tensor at an address."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.ctypeslib.as_array((ctypes.c_byte * count).from_address(address))
    tensor: np.ndarray = raw.view(dtype).reshape(shape)
    return tensor


def drawn_by_numpy(logits: np.ndarray, uniforms: np.ndarray, settings: Sampling, dtype: str) -> np.ndarray:
    """Draw tokens [rows] from logits [rows,V]."""
    return sample(logits, uniforms, settings)


@dataclass
class Gpu:
    """The properties and the state of the emulated GPU."""

    major: int = 8
    minor: int = 0
    memory: int = 80 * GIB
    driver_version: int = 13000
    count: int = 1
    draw: Callable[[np.ndarray, np.ndarray, Sampling, str], np.ndarray] = drawn_by_numpy
    device: dict[int, np.ndarray] = field(default_factory=dict)
    pinned: dict[int, np.ndarray] = field(default_factory=dict)
    handles: dict[int, Any] = field(default_factory=dict)
    queue: list[Work] = field(default_factory=list)
    capturing: list[Work] | None = None
    log: list[str] = field(default_factory=list)
    moved: Counter[str] = field(default_factory=Counter)  # bytes copied "in" and "out"
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = field(default_factory=list)  # of real functions

    def enqueue(self, name: str, work: Work) -> None:
        self.log.append(name)
        (self.queue if self.capturing is None else self.capturing).append(work)

    def run(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def holds(self, address: int, memory: dict[int, np.ndarray]) -> bool:
        return any(start <= address < start + array.nbytes for start, array in memory.items())

    def handle(self, value: Any = None) -> int:
        number = 1 + max(self.handles, default=0)
        self.handles[number] = value
        return number


class Module:
    """A module of cuda.bindings, with emulated functions and the types and constants of the real module."""

    real: Any

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        assert isinstance(value, type | int), f"{name} is not emulated"
        return value

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith(("cuda", "cu", "nvrtc")) or not callable(value):
            return value

        @wraps(value)
        def recorded(*arguments: Any) -> Any:
            self.gpu.calls.append((getattr(self.real, name), arguments))
            return value(*arguments)

        return recorded


class Runtime(Module):
    real = runtime

    def cudaDriverGetVersion(self) -> tuple[Any, int]:
        return OK, self.gpu.driver_version

    def cudaGetDeviceCount(self) -> tuple[Any, int]:
        return (OK, self.gpu.count) if self.gpu.count else (ERROR.cudaErrorNoDevice, 0)

    def cudaSetDevice(self, device: int) -> tuple[Any]:
        return (OK if device < self.gpu.count else ERROR.cudaErrorInvalidDevice,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, Any]:
        properties = runtime.cudaDeviceProp()
        properties.name = b"Emulated".ljust(256, b"\0")
        properties.major, properties.minor = self.gpu.major, self.gpu.minor
        return OK, properties

    def cudaMemGetInfo(self) -> tuple[Any, int, int]:
        used = sum(array.nbytes for array in self.gpu.device.values())
        return OK, self.gpu.memory - used, self.gpu.memory

    def cudaGetLastError(self) -> tuple[Any]:
        self.gpu.log.append("cudaGetLastError")
        return (OK,)

    def _new(self, size: int, memory: dict[int, np.ndarray]) -> tuple[Any, int]:
        if self.gpu.capturing is not None:
            return ERROR.cudaErrorStreamCaptureUnsupported, 0
        array = np.full(size, 0xFF, np.uint8)
        memory[array.ctypes.data] = array
        return OK, array.ctypes.data

    def cudaMalloc(self, size: int) -> tuple[Any, int]:
        return self._new(size, self.gpu.device) if size <= self.cudaMemGetInfo()[1] else (ERROR(2), 0)

    def cudaMallocHost(self, size: int) -> tuple[Any, int]:
        return self._new(size, self.gpu.pinned)

    def cudaFree(self, devPtr: int) -> tuple[Any]:
        self.gpu.run()
        del self.gpu.device[devPtr]
        return (OK,)

    def cudaFreeHost(self, ptr: int) -> tuple[Any]:
        self.gpu.run()
        del self.gpu.pinned[ptr]
        return (OK,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> tuple[Any]:
        assert int(stream) in self.gpu.handles
        self.gpu.enqueue("memset", lambda: at(devPtr, (count,), np.uint8).fill(value))
        return (OK,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> tuple[Any]:
        assert int(stream) in self.gpu.handles
        in_ = kind == runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        host, device = (src, dst) if in_ else (dst, src)
        if not self.gpu.holds(device, self.gpu.device):
            return (ERROR.cudaErrorInvalidValue,)
        source = at(src, (count,), np.uint8)
        if not self.gpu.holds(host, self.gpu.pinned):
            if self.gpu.capturing is not None:
                return (ERROR.cudaErrorStreamCaptureUnsupported,)
            source = source.copy() if in_ else source  # CUDA reads pageable memory before the call returns

        def copy() -> None:
            self.gpu.moved["in" if in_ else "out"] += count
            np.copyto(at(dst, (count,), np.uint8), source)

        self.gpu.enqueue("copy", copy)
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, Any]:
        assert flags == runtime.cudaStreamNonBlocking
        return OK, runtime.cudaStream_t(self.gpu.handle())

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any]:
        del self.gpu.handles[int(stream)]
        return (OK,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any]:
        assert int(stream) in self.gpu.handles
        if self.gpu.capturing is not None:
            return (ERROR.cudaErrorStreamCaptureUnsupported,)
        self.gpu.run()
        return (OK,)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        assert int(stream) in self.gpu.handles
        assert mode == runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.gpu.capturing = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:
        assert int(stream) in self.gpu.handles
        captured, self.gpu.capturing = self.gpu.capturing, None
        return OK, runtime.cudaGraph_t(self.gpu.handle(captured))

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:
        assert flags == 0
        return OK, runtime.cudaGraphExec_t(self.gpu.handle([*self.gpu.handles[int(graph)]]))

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any]:
        del self.gpu.handles[int(graph)]
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Any]:
        del self.gpu.handles[int(graphExec)]
        return (OK,)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> tuple[Any]:
        assert int(stream) in self.gpu.handles
        for work in self.gpu.handles[int(graphExec)]:
            self.gpu.enqueue("replay", work)
        return (OK,)


class Driver(Module):
    real = driver

    def cuModuleLoadData(self, image: int) -> tuple[Any, int]:
        assert ctypes.string_at(image, 8) == b"emulated"
        return driver.CUresult.CUDA_SUCCESS, driver.CUmodule(self.gpu.handle({}))

    def cuModuleUnload(self, hmod: Any) -> tuple[Any]:
        del self.gpu.handles[int(hmod)]
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuModuleGetFunction(self, hmod: Any, name: bytes) -> tuple[Any, Any]:
        functions = self.gpu.handles[int(hmod)]
        functions[len(functions) + 1] = self.kernel = name.decode()
        return driver.CUresult.CUDA_SUCCESS, driver.CUfunction(len(functions))

    def cuLaunchKernel(
        self,
        f: Any,
        gridDimX: int,
        gridDimY: int,
        gridDimZ: int,
        blockDimX: int,
        blockDimY: int,
        blockDimZ: int,
        sharedMemBytes: int,
        hStream: Any,
        kernelParams: tuple[tuple[Any, ...], tuple[Any, ...]],
        extra: int,
    ) -> tuple[Any]:
        assert (gridDimY, gridDimZ, blockDimY, blockDimZ, sharedMemBytes, extra) == (1, 1, 1, 1, 0, 0)
        assert blockDimX == cuda.THREADS
        assert int(hStream) in self.gpu.handles
        logits, noise, vocab, temperature, top_k, top_p, tokens = (
            kind(value).value for value, kind in zip(*kernelParams, strict=True)
        )
        assert int(f) == 1
        dtype = self.kernel.removeprefix("sample_")

        def run() -> None:
            stored = at(logits, (gridDimX, vocab), cuda.HOST_DTYPES[dtype])
            values = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else stored
            settings = Sampling(temperature, top_k, top_p)
            at(tokens, (gridDimX,), np.int64)[:] = self.gpu.draw(
                values, at(noise, (gridDimX,), np.float64), settings, dtype
            )

        self.gpu.enqueue(self.kernel, run)
        return (driver.CUresult.CUDA_SUCCESS,)


class Nvrtc(Module):
    real = nvrtc

    def nvrtcCreateProgram(
        self,
        src: bytes,
        name: bytes,
        numHeaders: int,
        headers: list[bytes],
        includeNames: list[bytes],
    ) -> tuple[Any, bytes]:
        assert src == cuda.KERNEL.read_bytes()
        assert numHeaders == 0
        return nvrtc.nvrtcResult.NVRTC_SUCCESS, src

    def nvrtcCompileProgram(self, prog: bytes, numOptions: int, options: list[bytes]) -> tuple[Any]:
        assert f"--gpu-architecture=sm_{self.gpu.major}{self.gpu.minor}".encode() in options
        assert numOptions == len(options)
        return (nvrtc.nvrtcResult.NVRTC_SUCCESS,)

    def nvrtcGetCUBINSize(self, prog: bytes) -> tuple[Any, int]:
        return nvrtc.nvrtcResult.NVRTC_SUCCESS, 8

    def nvrtcGetCUBIN(self, prog: bytes, cubin: bytes) -> tuple[Any]:
        ctypes.memmove(ctypes.c_char_p(cubin), b"emulated", 8)
        return (nvrtc.nvrtcResult.NVRTC_SUCCESS,)

    def nvrtcDestroyProgram(self, prog: bytes) -> tuple[Any]:
        return (nvrtc.nvrtcResult.NVRTC_SUCCESS,)


class Context:
    """tensorrt_rtx.IExecutionContext."""

    def __init__(self, engine: "CudaEngine") -> None:
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._warm = False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Any) -> bool:
        """Return False if there is no such profile, or if another context uses it."""
        assert int(stream_handle) in self._engine.gpu.handles
        if profile_index in self._engine.used_profiles or profile_index >= self._engine.num_optimization_profiles:
            return False
        self._engine.used_profiles.add(profile_index)
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether the profile accepts the shape."""
        shapes = {t.name: t.shape for t in self._graph.inputs}
        self._shapes[name] = shape
        return shapes.get(name) == shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Return whether the address is the start of an allocation on the device."""
        self._addresses[name] = memory
        return memory in self._engine.gpu.device

    def infer_shapes(self) -> list[str]:
        """Return the inputs that have no shape yet."""
        return [t.name for t in self._graph.inputs if t.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a tensor has in this profile."""
        return next(t.shape for t in (*self._graph.inputs, *self._graph.outputs) if t.name == name)

    def is_stream_capturable(self, stream: Any) -> bool:
        """Return True for a stream that exists."""
        return int(stream) in self._engine.gpu.handles

    def execute_async_v3(self, stream_handle: Any) -> bool:
        """Return False if an output does not share its input's memory, or if the first run is captured."""
        gpu, graph, addresses = self._engine.gpu, self._graph, dict(self._addresses)
        shared = all(addresses[output] == addresses[source] for output, source in graph.aliases.items())
        if not shared or int(stream_handle) not in gpu.handles or (gpu.capturing is not None and not self._warm):
            return False
        self._warm = True
        gpu.enqueue(graph.name, lambda: self._engine.compute(graph, addresses))
        return True

    @property
    def _graph(self) -> GraphSpec:
        assert self._profile is not None
        return self._engine.graphs[self._profile]


class CudaEngine:
    """tensorrt_rtx.ICudaEngine, which runs an ONNX graph. `damage` has the faults that a test gives it."""

    def __init__(self, gpu: Gpu, content: bytes) -> None:
        description = json.loads(content)
        self.gpu = gpu
        self._file = Path(description["file"])
        self._damage = description["damage"]
        self._spec = SystemSpec.from_json(description["spec"])
        specs = self._spec.graphs()
        self.graphs = [specs[name] for name in description["graphs"]]
        self.used_profiles: set[int] = set()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._file.parent))
        model = fp32_twin(self._file) if self._spec.dtype == "bf16" else str(self._file)
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @property
    def num_optimization_profiles(self) -> int:
        """One profile per graph."""
        return len(self.graphs)

    @property
    def num_io_tensors(self) -> int:
        """The number of inputs and outputs."""
        return len(self._tensors())

    def _tensors(self) -> dict[str, tuple[Any, TensorSpec]]:
        mode, graph = tensorrt_rtx.TensorIOMode, self.graphs[0]
        inputs = {t.name: (mode.INPUT, t) for t in graph.inputs}
        return inputs | {t.name: (mode.OUTPUT, t) for t in graph.outputs}

    def get_tensor_name(self, index: int) -> str:
        """Return the name of a tensor. The order does not matter."""
        return [*self._tensors()][index]

    def get_tensor_mode(self, name: str) -> Any:
        """Return whether a tensor is an input or an output."""
        return self._tensors()[name][0]

    def get_tensor_dtype(self, name: str) -> Any:
        """Return the library's name of a tensor's dtype."""
        names = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int64": "INT64"}
        return getattr(tensorrt_rtx.DataType, self._damage.get(f"dtype {name}", names[self._tensors()[name][1].dtype]))

    def get_tensor_shape(self, name: str) -> Any:
        """Return a tensor's shape, with -1 for a number of tokens that differs between profiles."""
        shape = list(self._damage.get(f"shape {name}", self._tensors()[name][1].shape))
        if len(self.graphs) > 1 and name in ("tokens", "logits"):
            shape[1] = -1
        return tensorrt_rtx.Dims(shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        """Return minimum, optimum and maximum, which are equal."""
        shape = next(t.shape for t in self.graphs[profile_index].inputs if t.name == name)
        return [tensorrt_rtx.Dims(shape)] * 3

    def get_aliased_input_tensor(self, name: str) -> str | None:
        """Return the input whose memory an output shares."""
        return None if name in self._damage.get("copied", []) else self.graphs[0].aliases.get(name)

    def create_runtime_config(self) -> Any:
        """Return the default settings."""
        return RuntimeConfig()

    def create_execution_context(self, runtime_config: "RuntimeConfig") -> Context:
        """Check that kernels are compiled at once and that the library captures no CUDA graphs."""
        kernels = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
        assert runtime_config.dynamic_shapes_kernel_specialization_strategy == kernels.EAGER
        assert runtime_config.cuda_graph_strategy == tensorrt_rtx.CudaGraphStrategy.DISABLED
        return Context(self)

    def compute(self, graph: GraphSpec, addresses: dict[str, int]) -> None:
        """Run the graph on memory. A bf16 graph is computed in fp32, and its outputs are rounded to bf16."""
        if self._spec.dtype == "bf16":
            self._compute_widened(graph, addresses)
            return
        binding = self._session.io_binding()
        for bind, tensors in ((binding.bind_input, graph.inputs), (binding.bind_output, graph.outputs)):
            for t in tensors:
                bind(t.name, "cpu", 0, TYPES[t.dtype][1], t.shape, addresses[t.name])
        self._session.run_with_iobinding(binding)

    def _compute_widened(self, graph: GraphSpec, addresses: dict[str, int]) -> None:
        feeds = {}
        for t in graph.inputs:
            stored = at(addresses[t.name], t.shape, cuda.HOST_DTYPES[t.dtype])
            feeds[t.name] = (stored.astype(np.uint32) << 16).view(np.float32) if t.dtype == "bf16" else stored
        results = self._session.run([t.name for t in graph.outputs], feeds)
        for t, value in zip(graph.outputs, results, strict=True):
            rounded = (value.view(np.uint32) + 0x8000 >> 16).astype(np.uint16) if t.dtype == "bf16" else value
            np.copyto(at(addresses[t.name], t.shape, cuda.HOST_DTYPES[t.dtype]), rounded)


@dataclass
class RuntimeConfig:
    """tensorrt_rtx.IRuntimeConfig, with the library's defaults."""

    dynamic_shapes_kernel_specialization_strategy: Any = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.LAZY
    cuda_graph_strategy: Any = tensorrt_rtx.CudaGraphStrategy.DISABLED


class TensorRt:
    """The module tensorrt_rtx, with an emulated Runtime."""

    def __init__(self, gpu: Gpu) -> None:
        class EngineRuntime:
            """tensorrt_rtx.Runtime."""

            def __init__(self, logger: Any) -> None:
                assert isinstance(logger, tensorrt_rtx.ILogger)
                self._logger = logger

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None:
                """Return an engine. For content that is not one, log an error and return None."""
                if not serialized_engine.startswith(b"{"):
                    self._logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "magic tag does not match")
                    return None
                return CudaEngine(gpu, serialized_engine)

        self.Runtime = EngineRuntime

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorrt_rtx, name)


class OnnxRuntime:
    """The module onnxruntime with an emulated CUDA provider, which runs the CPU provider as work of the stream.

    `provider` is the provider that its sessions report.
    """

    def __init__(self, gpu: Gpu, provider: str = "CUDAExecutionProvider") -> None:
        class Session:
            """onnxruntime.InferenceSession."""

            def __init__(
                self, path_or_bytes: Any, sess_options: Any, providers: list[tuple[str, dict[str, str]]]
            ) -> None:
                ((name, settings),) = providers
                assert name == "CUDAExecutionProvider"
                assert {**settings, "user_compute_stream": ""} == {
                    "device_id": "0",
                    "enable_cuda_graph": "1",
                    "use_tf32": "0",
                    "user_compute_stream": "",
                }
                assert int(settings["user_compute_stream"]) in gpu.handles
                self._real = ort.InferenceSession(path_or_bytes, sess_options, providers=["CPUExecutionProvider"])
                self.get_inputs, self.get_outputs = self._real.get_inputs, self._real.get_outputs

            def get_providers(self) -> list[str]:
                """Return the provider in use."""
                return [provider]

            def io_binding(self) -> Any:
                """Return a binding that accepts only device memory."""
                return Binding(gpu, self._real.io_binding())

            def run_with_iobinding(self, iobinding: Any, run_options: Any) -> None:
                """Enqueue a run, and check that the graph has its own CUDA graph."""
                assert int(run_options.get_run_config_entry("gpu_graph_id")) > 0
                gpu.enqueue("onnxruntime", lambda: self._real.run_with_iobinding(iobinding.real))

        def session(path_or_bytes: Any, sess_options: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:
            if providers == [("CPUExecutionProvider", {})]:
                return ort.InferenceSession(path_or_bytes, sess_options, providers=providers)
            return Session(path_or_bytes, sess_options, providers)

        self.InferenceSession = session

    def get_available_providers(self) -> list[str]:
        """Return the providers of the package for GPUs."""
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        """Load nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ort, name)


class Binding:
    """onnxruntime.IOBinding."""

    def __init__(self, gpu: Gpu, real: Any) -> None:
        self.gpu = gpu
        self.real = real

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: int, shape: Any, buffer_ptr: int
    ) -> None:
        """Bind memory, which must be on the device."""
        assert (device_type, device_id) == ("cuda", 0)
        assert buffer_ptr in self.gpu.device
        self.real.bind_input(name, "cpu", 0, element_type, shape, buffer_ptr)

    def bind_output(
        self, name: str, device_type: str, device_id: int, element_type: int, shape: Any, buffer_ptr: int
    ) -> None:
        """Bind memory, which must be on the device."""
        assert (device_type, device_id) == ("cuda", 0)
        assert buffer_ptr in self.gpu.device
        self.real.bind_output(name, "cpu", 0, element_type, shape, buffer_ptr)


@contextmanager
def emulated(gpu: Gpu, provider: str = "CUDAExecutionProvider") -> Iterator[Gpu]:
    """Let our modules use an emulated GPU and libraries that run on it."""
    from nbp_engines import ort as ort_session
    from nbp_engines import trt

    modules: dict[str, Module] = {"runtime": Runtime(gpu), "driver": Driver(gpu), "nvrtc": Nvrtc(gpu)}
    libraries = {"tensorrt_rtx": TensorRt(gpu)}
    cuda.compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "bindings", modules.__getitem__)
        patch.setattr(trt, "import_module", libraries.__getitem__)
        patch.setattr(ort_session, "import_module", {"onnxruntime": OnnxRuntime(gpu, provider)}.__getitem__)
        yield gpu
    cuda.compiled.cache_clear()


def with_engines(bundle: Bundle, damage: dict[str, Any] | None = None, **changes: Any) -> Bundle:
    """Return the bundle with an emulated TensorRT engine for each graph file.

    `changes` replace fields of the TensorRT engines in its manifest.
    """
    spec, engines = bundle.manifest.spec, []
    kinds = {"encode": ["encode"], "decode": ["decode"], "generator": [*spec.generator_graphs()]}
    for kind, names in kinds.items():
        present = [name for name in names if name in bundle.manifest.graphs]
        if not present:
            continue
        description = {"file": str(bundle.graph_file(present[0])), "graphs": present, "spec": spec.to_json()}
        file = bundle.path / f"{kind}.engine"
        file.write_text(json.dumps(description | {"damage": damage or {}}))
        engine = Engine(file.name, tuple(present), "sm80", "none", "tensorrt_rtx", tensorrt_rtx.__version__)
        engines.append(replace(engine, **changes))
    files = {file.path for file in bundle.manifest.files} | {engine.file for engine in engines}
    listed = tuple(sorted(bundle.manifest.files, key=lambda file: file.path))
    extra = tuple(replace(listed[0], path=name) for name in sorted(files - {file.path for file in listed}))
    manifest = replace(bundle.manifest, runtime="tensorrt", engines=tuple(engines), files=listed + extra)
    return resealed(replace(bundle, manifest=manifest))
