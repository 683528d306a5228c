"""Access to an NVIDIA GPU through cuda-python: memory, one stream, CUDA graphs and the sampling kernel.

All work is enqueued on one stream of the device, which runs it in the order of enqueuing. Closing the device frees
everything that was allocated on it. Tests run this module against an emulation of CUDA (tests/engines/emulated.py).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from ctypes import c_byte, c_double, c_int, c_void_p
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np

from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling, sample
from nbp_engines.spec import SystemSpec

# The numpy dtype that holds each dtype on the host. numpy has no bf16, so its bits are stored as uint16.
HOST_DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int64": np.int64, "fp64": np.float64}
# Major version of cuda-python, which contains the CUDA runtime. The driver must support this version or a later one.
CUDA_MAJOR = 13
KERNEL = Path(__file__).with_name("sample.cu")
THREADS = 1024  # threads per block of the sampling kernel, which has one block per row
# C types of the kernel's parameters: logits, uniforms, vocab, temperature, top_k, top_p, tokens.
PARAMETER_TYPES = (c_void_p, c_void_p, c_int, c_double, c_int, c_double, c_void_p)


@cache
def bindings(name: str) -> Any:
    """Import cuda-python's module `runtime`, `driver` or `nvrtc`.

    Raises EngineError, with the pip command, if it is not installed.
    """
    try:
        return import_module(f"cuda.bindings.{name}")
    except ModuleNotFoundError:
        raise EngineError(
            f"running on a GPU needs cuda-python {CUDA_MAJOR}: pip install 'cuda-bindings=={CUDA_MAJOR}.*'"
        ) from None


def call(function: Callable[..., tuple[Any, ...]], *arguments: object) -> Any:
    """Call a CUDA function and return its value without the status, or None if it returns a status alone.

    Raises EngineError, with the names of the function and of the status, if the status is an error.
    """
    status, *values = function(*arguments)
    if status.value:
        raise EngineError(f"{function.__name__}: {status.name}")
    return values[0] if len(values) == 1 else None


@dataclass(frozen=True)
class Device:
    """A GPU with one stream, and the resources that were allocated on it.

    Attributes:
        name: the GPU's name, such as `NVIDIA A100-SXM4-40GB`.
        arch: its architecture, such as `sm80`.
        stream: the handle of the stream.
    """

    name: str
    arch: str
    stream: Any
    _resources: ExitStack = field(repr=False)

    @classmethod
    def open(cls, index: int = 0) -> Self:
        """Open the GPU with this number.

        Raises EngineError if cuda-python or the GPU is missing, or if the driver is missing or too old.
        """
        if problem := gpu_problem(index):
            raise EngineError(problem)
        rt = bindings("runtime")
        call(rt.cudaSetDevice, index)
        properties = call(rt.cudaGetDeviceProperties, index)
        # A non-blocking stream does not wait for the default stream, which other libraries use.
        stream = call(rt.cudaStreamCreateWithFlags, rt.cudaStreamNonBlocking)
        resources = ExitStack()
        resources.callback(call, rt.cudaStreamDestroy, stream)
        name = bytes(properties.name).partition(b"\0")[0].decode()
        return cls(name, f"sm{properties.major}{properties.minor}", stream, resources)

    def free_bytes(self) -> int:
        """Return how many bytes of device memory are free now. Raises EngineError if CUDA fails."""
        status, free, _ = bindings("runtime").cudaMemGetInfo()
        if status.value:
            raise EngineError(f"CUDA cannot tell how much memory is free: {status.name}")
        return int(free)

    def allocate(self, shape: Sequence[int], dtype: str, name: str = "a tensor") -> "Buffer":
        """Allocate a zeroed tensor.

        The zeros matter: attention multiplies masked values by 0, and old memory may contain NaN.

        Args:
            shape: the tensor's shape.
            dtype: a key of `HOST_DTYPES`.
            name: what the error's message calls the tensor.

        Raises EngineError, with the bytes that are needed and free, if the memory does not suffice.
        """
        rt, nbytes = bindings("runtime"), prod(shape) * np.dtype(HOST_DTYPES[dtype]).itemsize
        status, pointer = rt.cudaMalloc(nbytes)
        if status == rt.cudaError_t.cudaErrorMemoryAllocation:
            rt.cudaGetLastError()  # this resets the error, which another library would report as its own
            raise EngineError(
                f"no memory for {name} on {self.name}: it needs {nbytes:,} bytes, {self.free_bytes():,} are free"
            )
        if status.value:
            raise EngineError(f"cudaMalloc: {status.name}")
        self.free_on_close(rt.cudaFree, pointer)
        call(rt.cudaMemsetAsync, pointer, 0, nbytes, self.stream)
        return Buffer(self, int(pointer), tuple(shape), dtype)

    def synchronize(self) -> None:
        """Wait for all enqueued work. Raises EngineError if any of it failed."""
        call(bindings("runtime").cudaStreamSynchronize, self.stream)

    def free_on_close(self, function: Callable[..., tuple[Any, ...]], handle: object) -> None:
        """Register a CUDA function that frees a resource. It is called with the handle when the device is closed."""
        self._resources.callback(call, function, handle)

    def close(self) -> None:
        """Free all resources in the reverse order of their allocation."""
        self._resources.close()

    def __enter__(self) -> Self:
        """Return the device."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the device."""
        self.close()


def gpu_problem(index: int = 0) -> str | None:
    """Return why the GPU with this number cannot be used, and what to do about it, or None if it can be used."""
    try:
        rt = bindings("runtime")
    except EngineError as error:
        return error.message
    supported = call(rt.cudaDriverGetVersion)
    if not supported:
        return "no NVIDIA driver is installed: install one, or use the runtime ort-cpu, which needs no GPU"
    if supported < CUDA_MAJOR * 1000:
        version = f"{supported // 1000}.{supported % 1000 // 10}"
        return f"the NVIDIA driver supports CUDA {version}, but {CUDA_MAJOR}.0 is needed: install driver 580 or later"
    status, count = rt.cudaGetDeviceCount()
    if status.value or not index < count:
        reason = status.name if status.value else f"number {index} does not exist, the number of GPUs is {count}"
        return f"there is no GPU to run on: {reason}. CUDA_VISIBLE_DEVICES may hide it"
    return None


def gpu_name() -> str:
    """Return the name of the GPU. Raises EngineError if there is none."""
    with Device.open() as device:
        return device.name


class Buffer:
    """A tensor on the device.

    A bf16 buffer is written from float32, which is rounded to the nearest with ties to even, and read as float32.

    Attributes:
        device: the device.
        ptr: the tensor's address on the device.
        shape: the tensor's shape.
        dtype: a key of `HOST_DTYPES`.
        nbytes: the tensor's size in bytes.
    """

    def __init__(self, device: Device, pointer: int, shape: tuple[int, ...], dtype: str) -> None:
        self.device = device
        self.ptr = pointer
        self.shape = shape
        self.dtype = dtype
        self.nbytes = prod(shape) * np.dtype(HOST_DTYPES[dtype]).itemsize

    def write(self, array: np.ndarray) -> None:
        """Overwrite the tensor. Raises EngineError for an array of another shape or of an incompatible dtype."""
        host_dtype = np.dtype(np.float32 if self.dtype == "bf16" else HOST_DTYPES[self.dtype])
        if array.shape != self.shape or not np.can_cast(array.dtype, host_dtype, "same_kind"):
            raise EngineError(
                f"cannot write {array.dtype} {list(array.shape)} to a buffer of {self.dtype} {list(self.shape)}"
            )
        values = array.astype(host_dtype, copy=False)
        host = np.ascontiguousarray(_to_bf16(values) if self.dtype == "bf16" else values)
        self._copy(self.ptr, host.ctypes.data, "HostToDevice")

    def read(self) -> np.ndarray:
        """Wait for all enqueued work and return a copy of the tensor."""
        host = np.empty(self.shape, HOST_DTYPES[self.dtype])
        self._copy(host.ctypes.data, self.ptr, "DeviceToHost")
        return (host.astype(np.uint32) << 16).view(np.float32) if self.dtype == "bf16" else host

    def _copy(self, destination: int, source: int, direction: str) -> None:
        enqueue_copy(self.device, destination, source, self.nbytes, direction)
        self.device.synchronize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype(np.uint16)


def enqueue_copy(device: Device, destination: int, source: int, nbytes: int, direction: str) -> None:
    """Enqueue a copy between two addresses.

    Args:
        device: the device, on whose stream the copy runs.
        destination: address to copy to.
        source: address to copy from.
        nbytes: number of bytes.
        direction: `HostToDevice`, `DeviceToHost` or `DeviceToDevice`.
    """
    rt = bindings("runtime")
    kind = getattr(rt.cudaMemcpyKind, f"cudaMemcpy{direction}")
    call(rt.cudaMemcpyAsync, destination, source, nbytes, kind, device.stream)


class Mirror:
    """A tensor on the device with a copy in pinned host memory. A CUDA graph can copy between the two.

    Attributes:
        host: the copy on the host, an array.
        buffer: the tensor on the device.
    """

    def __init__(self, device: Device, shape: Sequence[int], dtype: str, name: str = "a tensor") -> None:
        rt = bindings("runtime")
        self.buffer = device.allocate(shape, dtype, name)
        self._pinned = int(call(rt.cudaMallocHost, self.buffer.nbytes))
        device.free_on_close(rt.cudaFreeHost, self._pinned)
        raw = (c_byte * self.buffer.nbytes).from_address(self._pinned)
        self.host = np.ctypeslib.as_array(raw).view(HOST_DTYPES[dtype]).reshape(shape)
        self.host[...] = 0  # a graph runs once before it gets its first inputs

    def enqueue_write(self) -> None:
        """Enqueue the copy from the host to the device."""
        enqueue_copy(self.buffer.device, self.buffer.ptr, self._pinned, self.buffer.nbytes, "HostToDevice")

    def enqueue_read(self) -> None:
        """Enqueue the copy from the device to the host."""
        enqueue_copy(self.buffer.device, self._pinned, self.buffer.ptr, self.buffer.nbytes, "DeviceToHost")


class CudaGraph:
    """A CUDA graph of the work that a function enqueues on the device's stream. One launch runs all of it.

    Raises EngineError if the work cannot be captured.
    """

    def __init__(self, device: Device, enqueue: Callable[[], None]) -> None:
        rt = bindings("runtime")
        self._device = device
        # The capture is limited to this thread, because a library may compile in a thread of its own meanwhile.
        call(rt.cudaStreamBeginCapture, device.stream, rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        except BaseException:
            status, partial = rt.cudaStreamEndCapture(device.stream)  # otherwise the stream would stay unusable
            if not status.value:
                call(rt.cudaGraphDestroy, partial)
            raise
        captured = call(rt.cudaStreamEndCapture, device.stream)
        self._executable = call(rt.cudaGraphInstantiate, captured, 0)
        device.free_on_close(rt.cudaGraphExecDestroy, self._executable)
        call(rt.cudaGraphDestroy, captured)

    def launch(self) -> None:
        """Enqueue one run of the whole CUDA graph."""
        call(bindings("runtime").cudaGraphLaunch, self._executable, self._device.stream)


class Sampler:
    """Draws tokens on the device as `nbp_engines.sampling.sample` does on the host.

    Per draw, only the uniforms are copied to the device, and only the tokens are copied back.
    """

    def __init__(self, device: Device, spec: SystemSpec) -> None:
        """Compile the kernel, and allocate buffers for one block per clip and for one token per clip.

        Raises EngineError if the kernel does not compile.
        """
        self._device = device
        self._vocab = spec.vocab
        rows = {spec.batch, spec.batch * spec.block_size}
        self._mirrors = {n: (Mirror(device, [n], "fp64"), Mirror(device, [n], "int64")) for n in rows}
        driver = bindings("driver")
        code = np.frombuffer(compiled(KERNEL.read_bytes(), device.arch), np.uint8)
        module = call(driver.cuModuleLoadData, code.ctypes.data)
        device.free_on_close(driver.cuModuleUnload, module)
        self._kernel = call(driver.cuModuleGetFunction, module, f"sample_{spec.dtype}".encode())

    def sample(self, logits: Buffer | np.ndarray, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Draw tokens int64 [...], which are valid until the next draw of the same number of tokens.

        Args:
            logits: [...,V]. If they are a numpy array, the tokens are drawn on the host.
            uniforms: float64 [...] in [0,1): one number for each clip, or for each token of a block of each clip.
            settings: how to draw.
        """
        if not isinstance(logits, Buffer):
            return sample(logits, uniforms, settings)
        noise, tokens = self._mirrors[uniforms.size]
        noise.host[:] = uniforms.reshape(-1)
        noise.enqueue_write()
        self.enqueue(logits.ptr, noise.buffer.ptr, tokens.buffer.ptr, uniforms.size, settings)
        tokens.enqueue_read()
        self._device.synchronize()
        drawn: np.ndarray = tokens.host.reshape(uniforms.shape)
        return drawn

    def enqueue(
        self, logits: int, uniforms: int, tokens: int, rows: int, settings: Sampling, stream: Any = None
    ) -> None:
        """Enqueue the kernel without any copies. This also works while the stream is being captured.

        Args:
            logits: device address of [rows,V] in the spec's dtype.
            uniforms: device address of fp64 [rows].
            tokens: device address of int64 [rows], to which the kernel writes.
            rows: number of tokens to draw.
            settings: how to draw.
            stream: handle of the stream; None means the device's own.
        """
        top_k = min(settings.top_k, self._vocab)
        values = (logits, uniforms, self._vocab, settings.temperature, top_k, settings.top_p, tokens)
        stream = self._device.stream if stream is None else stream
        launch = bindings("driver").cuLaunchKernel
        call(launch, self._kernel, rows, 1, 1, THREADS, 1, 1, 0, stream, (values, PARAMETER_TYPES), 0)


@cache
def compiled(source: bytes, arch: str) -> bytes:
    """Return the machine code of a CUDA source for an architecture such as `sm80`.

    It is not PTX, because a driver that is older than NVRTC refuses PTX even within one CUDA major version.

    Raises EngineError, with the pip command if NVRTC is missing, or with its log if it rejects the source.
    """
    nvrtc = bindings("nvrtc")
    settings = (
        f"--gpu-architecture={arch.replace('sm', 'sm_')}",
        "--std=c++17",
        "--fmad=false",  # without fused multiply-adds the arithmetic is that of the tests on a CPU
        f"--define-macro=SAMPLE_THREADS={THREADS}",
    )
    options = [setting.encode() for setting in settings]
    try:
        program = call(nvrtc.nvrtcCreateProgram, source, b"sample.cu", 0, [], [])
    except RuntimeError as error:  # cuda-python raises it if it cannot load NVRTC's library
        raise EngineError(
            f"compiling the sampling kernel needs NVRTC: pip install 'nvidia-cuda-nvrtc=={CUDA_MAJOR}.*'"
        ) from error
    status, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status.value:
        log = _output(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().strip("\0\n")
        raise EngineError(f"NVRTC cannot compile sample.cu for {arch}: {status.name}: {log}")
    code = _output(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    call(nvrtc.nvrtcDestroyProgram, program)
    return code


def _output(size_of: Callable[..., Any], write: Callable[..., Any], program: object) -> bytes:
    """Return the bytes that an NVRTC function writes.

    NVRTC overwrites a `bytes` object. It must have at least two bytes, because Python shares objects of a single byte.
    """
    size = call(size_of, program)
    buffer = bytes(size + 1)
    call(write, program, buffer)
    return buffer[:size]
