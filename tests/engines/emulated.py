"""A GPU made of host memory, for tests of our side of the calls: what CUDA and TensorRT themselves do, it cannot prove.

Work is kept until a stream is synchronised, memory is full of NaN at first, and pinned memory is read when a copy runs,
not when it is enqueued: whoever forgets to wait, to zero or to copy gets wrong numbers. A captured call does not run.
An engine is a bundle's ONNX graph, run by ONNX Runtime on the addresses that the context was given.
Every function here has the name and parameters of the real one; test_cuda.py holds them together.
"""
# ruff: noqa: ARG001, ARG002, N802 - they have CUDA's names and parameters, needed or not

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
    """The tensor at an address."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found: np.ndarray = np.ctypeslib.as_array((ctypes.c_byte * count).from_address(address)).view(dtype).reshape(shape)
    return found


def drawn_by_numpy(logits: np.ndarray, uniforms: np.ndarray, settings: Sampling, dtype: str) -> np.ndarray:
    """Tokens [rows] of logits [rows,V]."""
    return sample(logits, uniforms, settings)


@dataclass
class Gpu:
    """The device's state, and what it is."""

    major: int = 8
    minor: int = 0
    memory: int = 80 * GIB
    served: int = 13000
    count: int = 1
    draw: Callable[[np.ndarray, np.ndarray, Sampling, str], np.ndarray] = drawn_by_numpy
    device: dict[int, np.ndarray] = field(default_factory=dict)
    pinned: dict[int, np.ndarray] = field(default_factory=dict)
    handles: dict[int, Any] = field(default_factory=dict)
    queue: list[Work] = field(default_factory=list)
    capturing: list[Work] | None = None
    log: list[str] = field(default_factory=list)
    moved: Counter[str] = field(default_factory=Counter)  # bytes, each way
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = field(default_factory=list)  # the real functions'

    def enqueue(self, name: str, work: Work) -> None:
        self.log.append(name)
        (self.queue if self.capturing is None else self.capturing).append(work)

    def run(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def holds(self, address: int, memory: dict[int, np.ndarray]) -> bool:
        return any(start <= address < start + array.nbytes for start, array in memory.items())

    def handle(self, behind: Any = None) -> int:
        made = 1 + max(self.handles, default=0)
        self.handles[made] = behind
        return made


class Module:
    """One of cuda.bindings' modules: functions of ours, and the real one's types and constants."""

    real: Any

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        assert isinstance(found, type | int), f"{name} is not emulated"
        return found

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith(("cuda", "cu", "nvrtc")) or not callable(found):
            return found

        @wraps(found)
        def recorded(*arguments: Any) -> Any:
            self.gpu.calls.append((getattr(self.real, name), arguments))
            return found(*arguments)

        return recorded


class Runtime(Module):
    real = runtime

    def cudaDriverGetVersion(self) -> tuple[Any, int]:
        return OK, self.gpu.served

    def cudaGetDeviceCount(self) -> tuple[Any, int]:
        return (OK, self.gpu.count) if self.gpu.count else (ERROR.cudaErrorNoDevice, 0)

    def cudaSetDevice(self, device: int) -> tuple[Any]:
        return (OK if device < self.gpu.count else ERROR.cudaErrorInvalidDevice,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, Any]:
        known = runtime.cudaDeviceProp()
        known.name = b"Emulated".ljust(256, b"\0")
        known.major, known.minor = self.gpu.major, self.gpu.minor
        return OK, known

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
        host, there = (src, dst) if in_ else (dst, src)
        if not self.gpu.holds(there, self.gpu.device):
            return (ERROR.cudaErrorInvalidValue,)
        given = at(src, (count,), np.uint8)
        if not self.gpu.holds(host, self.gpu.pinned):
            if self.gpu.capturing is not None:
                return (ERROR.cudaErrorStreamCaptureUnsupported,)
            given = given.copy() if in_ else given  # staged at once

        def copy() -> None:
            self.gpu.moved["in" if in_ else "out"] += count
            np.copyto(at(dst, (count,), np.uint8), given)

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
        made, self.gpu.capturing = self.gpu.capturing, None
        return OK, runtime.cudaGraph_t(self.gpu.handle(made))

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
            held = at(logits, (gridDimX, vocab), cuda.HOST_DTYPES[dtype])
            values = (held.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else held
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
        """False if there is no such profile, or another context has it."""
        assert int(stream_handle) in self._engine.gpu.handles
        if profile_index in self._engine.taken or profile_index >= self._engine.num_optimization_profiles:
            return False
        self._engine.taken.add(profile_index)
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """False unless the profile takes it."""
        due = {t.name: t.shape for t in self._graph.inputs}
        self._shapes[name] = shape
        return due.get(name) == shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """False unless it is the start of device memory."""
        self._addresses[name] = memory
        return memory in self._engine.gpu.device

    def infer_shapes(self) -> list[str]:
        """Inputs without a shape."""
        return [t.name for t in self._graph.inputs if t.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """As this profile has it."""
        return next(t.shape for t in (*self._graph.inputs, *self._graph.outputs) if t.name == name)

    def is_stream_capturable(self, stream: Any) -> bool:
        """Always."""
        return int(stream) in self._engine.gpu.handles

    def execute_async_v3(self, stream_handle: Any) -> bool:
        """False if an output does not share its input's memory, or it is captured before it has run once."""
        gpu, graph, addresses = self._engine.gpu, self._graph, dict(self._addresses)
        shared = all(addresses[output] == addresses[given] for output, given in graph.aliases.items())
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
    """tensorrt_rtx.ICudaEngine, on an ONNX graph. `damage` is what a test has wrong with it."""

    def __init__(self, gpu: Gpu, content: bytes) -> None:
        said = json.loads(content)
        self.gpu = gpu
        self._file = Path(said["file"])
        self._damage = said["damage"]
        self._spec = SystemSpec.from_json(said["spec"])
        known = self._spec.graphs()
        self.graphs = [known[name] for name in said["graphs"]]
        self.taken: set[int] = set()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._file.parent))
        model = fp32_twin(self._file) if self._spec.dtype == "bf16" else str(self._file)
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @property
    def num_optimization_profiles(self) -> int:
        """One a graph."""
        return len(self.graphs)

    @property
    def num_io_tensors(self) -> int:
        """Inputs and outputs."""
        return len(self._tensors())

    def _tensors(self) -> dict[str, tuple[Any, TensorSpec]]:
        mode, graph = tensorrt_rtx.TensorIOMode, self.graphs[0]
        inputs = {t.name: (mode.INPUT, t) for t in graph.inputs}
        return inputs | {t.name: (mode.OUTPUT, t) for t in graph.outputs}

    def get_tensor_name(self, index: int) -> str:
        """In any order."""
        return [*self._tensors()][index]

    def get_tensor_mode(self, name: str) -> Any:
        """Input or output."""
        return self._tensors()[name][0]

    def get_tensor_dtype(self, name: str) -> Any:
        """As the library calls it."""
        names = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int64": "INT64"}
        return getattr(tensorrt_rtx.DataType, self._damage.get(f"dtype {name}", names[self._tensors()[name][1].dtype]))

    def get_tensor_shape(self, name: str) -> Any:
        """With -1 for a number of tokens that profiles settle."""
        shape = list(self._damage.get(f"shape {name}", self._tensors()[name][1].shape))
        if len(self.graphs) > 1 and name in ("tokens", "logits"):
            shape[1] = -1
        return tensorrt_rtx.Dims(shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        """The same three times: profiles are pinned."""
        shape = next(t.shape for t in self.graphs[profile_index].inputs if t.name == name)
        return [tensorrt_rtx.Dims(shape)] * 3

    def get_aliased_input_tensor(self, name: str) -> str | None:
        """The cache of a cache output."""
        return None if name in self._damage.get("copied", []) else self.graphs[0].aliases.get(name)

    def create_runtime_config(self) -> Any:
        """Settings."""
        return RuntimeConfig()

    def create_execution_context(self, runtime_config: "RuntimeConfig") -> Context:
        """Compiled at once, and not captured by the library."""
        kernels = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
        assert runtime_config.dynamic_shapes_kernel_specialization_strategy == kernels.EAGER
        assert runtime_config.cuda_graph_strategy == tensorrt_rtx.CudaGraphStrategy.DISABLED
        return Context(self)

    def compute(self, graph: GraphSpec, addresses: dict[str, int]) -> None:
        """Run on memory; bf16 tensors as fp32, rounded at the end."""
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
            held = at(addresses[t.name], t.shape, cuda.HOST_DTYPES[t.dtype])
            feeds[t.name] = (held.astype(np.uint32) << 16).view(np.float32) if t.dtype == "bf16" else held
        found = self._session.run([t.name for t in graph.outputs], feeds)
        for t, value in zip(graph.outputs, found, strict=True):
            rounded = (value.view(np.uint32) + 0x8000 >> 16).astype(np.uint16) if t.dtype == "bf16" else value
            np.copyto(at(addresses[t.name], t.shape, cuda.HOST_DTYPES[t.dtype]), rounded)


@dataclass
class RuntimeConfig:
    """tensorrt_rtx.IRuntimeConfig; the library's own defaults."""

    dynamic_shapes_kernel_specialization_strategy: Any = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.LAZY
    cuda_graph_strategy: Any = tensorrt_rtx.CudaGraphStrategy.DISABLED


class TensorRt:
    """The module tensorrt_rtx, with another Runtime."""

    def __init__(self, gpu: Gpu) -> None:
        class EngineRuntime:
            """tensorrt_rtx.Runtime."""

            def __init__(self, logger: Any) -> None:
                assert isinstance(logger, tensorrt_rtx.ILogger)
                self._logger = logger

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None:
                """None, and a line in the log, for what is no engine."""
                if not serialized_engine.startswith(b"{"):
                    self._logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "magic tag does not match")
                    return None
                return CudaEngine(gpu, serialized_engine)

        self.Runtime = EngineRuntime

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorrt_rtx, name)


class OnnxRuntime:
    """onnxruntime with a CUDA provider: its CPU provider, on the stream and in the memory that it is told.

    `took` is what it takes in place of what it is asked for.
    """

    def __init__(self, gpu: Gpu, took: str = "CUDAExecutionProvider") -> None:
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
                """What it runs on."""
                return [took]

            def io_binding(self) -> Any:
                """Addresses on the device, which is host memory."""
                return Binding(gpu, self._real.io_binding())

            def run_with_iobinding(self, iobinding: Any, run_options: Any) -> None:
                """Enqueue it, one captured graph each."""
                assert int(run_options.get_run_config_entry("gpu_graph_id")) > 0
                gpu.enqueue("onnxruntime", lambda: self._real.run_with_iobinding(iobinding.real))

        def session(path_or_bytes: Any, sess_options: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:
            if providers == [("CPUExecutionProvider", {})]:
                return ort.InferenceSession(path_or_bytes, sess_options, providers=providers)
            return Session(path_or_bytes, sess_options, providers)

        self.InferenceSession = session

    def get_available_providers(self) -> list[str]:
        """As the GPU's wheel has them."""
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        """Nothing to load."""

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
        """Device memory alone."""
        assert (device_type, device_id) == ("cuda", 0)
        assert buffer_ptr in self.gpu.device
        self.real.bind_input(name, "cpu", 0, element_type, shape, buffer_ptr)

    def bind_output(
        self, name: str, device_type: str, device_id: int, element_type: int, shape: Any, buffer_ptr: int
    ) -> None:
        """Device memory alone."""
        assert (device_type, device_id) == ("cuda", 0)
        assert buffer_ptr in self.gpu.device
        self.real.bind_output(name, "cpu", 0, element_type, shape, buffer_ptr)


@contextmanager
def emulated(gpu: Gpu, took: str = "CUDAExecutionProvider") -> Iterator[Gpu]:
    """While it lasts, this is the machine's GPU, and the libraries are for it."""
    from nbp_engines import ort as ort_session
    from nbp_engines import trt

    modules: dict[str, Module] = {"runtime": Runtime(gpu), "driver": Driver(gpu), "nvrtc": Nvrtc(gpu)}
    libraries = {"tensorrt_rtx": TensorRt(gpu)}
    cuda.compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "bindings", modules.__getitem__)
        patch.setattr(trt, "import_module", libraries.__getitem__)
        patch.setattr(ort_session, "import_module", {"onnxruntime": OnnxRuntime(gpu, took)}.__getitem__)
        yield gpu
    cuda.compiled.cache_clear()


def with_engines(bundle: Bundle, damage: dict[str, Any] | None = None, **changes: Any) -> Bundle:
    """A bundle with an emulated engine beside each graph file; `changes` of what its manifest says of them."""
    spec, engines = bundle.manifest.spec, []
    kinds = {"encode": ["encode"], "decode": ["decode"], "generator": [*spec.generator_graphs()]}
    for kind, names in kinds.items():
        present = [name for name in names if name in bundle.manifest.graphs]
        if not present:
            continue
        said = {"file": str(bundle.graph_file(present[0])), "graphs": present, "spec": spec.to_json()}
        file = bundle.path / f"{kind}.engine"
        file.write_text(json.dumps(said | {"damage": damage or {}}))
        made = Engine(file.name, tuple(present), "sm80", "none", "tensorrt_rtx", tensorrt_rtx.__version__)
        engines.append(replace(made, **changes))
    files = {file.path for file in bundle.manifest.files} | {engine.file for engine in engines}
    listed = tuple(sorted(bundle.manifest.files, key=lambda file: file.path))
    extra = tuple(replace(listed[0], path=name) for name in sorted(files - {file.path for file in listed}))
    manifest = replace(bundle.manifest, runtime="tensorrt", engines=tuple(engines), files=listed + extra)
    return resealed(replace(bundle, manifest=manifest))
