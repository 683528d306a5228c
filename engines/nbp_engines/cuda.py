"""An NVIDIA GPU through cuda-python alone: memory, one stream, captured graphs, and the sampling kernel.

Everything is enqueued on the device's one stream, and so happens in the order in which it is written; everything is
given back when the device is closed. Tests run it against an emulation of CUDA (tests/engines/emulated.py).
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

# What a tensor's elements are on the host: numpy has no bf16, so its bits are moved as whole numbers.
HOST = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int64": np.int64, "fp64": np.float64}
CUDA = 13  # of cuda-python; the runtime is inside it, the driver has to be for this version or a later one
KERNEL = Path(__file__).with_name("sample.cu")
THREADS = 1024  # of the kernel, a row
# Its parameters: logits, uniforms, vocab, temperature, top_k, top_p, tokens.
ARGUMENTS = (c_void_p, c_void_p, c_int, c_double, c_int, c_double, c_void_p)


@cache
def bindings(name: str) -> Any:
    """cuda-python's module `runtime`, `driver` or `nvrtc`. Raises EngineError with the pip command if it is missing."""
    try:
        return import_module(f"cuda.bindings.{name}")
    except ModuleNotFoundError:
        raise EngineError(f"running on a GPU needs cuda-python {CUDA}: pip install 'cuda-bindings=={CUDA}.*'") from None


def call(function: Callable[..., tuple[Any, ...]], *arguments: object) -> Any:
    """What a CUDA function returns beside its status. Raises EngineError, naming both, if that is an error."""
    status, *values = function(*arguments)
    if status.value:
        raise EngineError(f"{function.__name__}: {status.name}")
    return values[0] if len(values) == 1 else None


@dataclass(frozen=True)
class Device:
    """A GPU, the stream that it is used by, and what it was given to hold.

    Attributes:
        name: such as `NVIDIA A100-SXM4-40GB`.
        arch: such as `sm80`.
        stream: the handle.
    """

    name: str
    arch: str
    stream: Any
    _held: ExitStack = field(repr=False)

    @classmethod
    def open(cls, index: int = 0) -> Self:
        """The GPU of this number. Raises EngineError if there is none, no cuda-python, no driver or too old a one."""
        if why := no_gpu(index):
            raise EngineError(why)
        rt = bindings("runtime")
        call(rt.cudaSetDevice, index)
        known = call(rt.cudaGetDeviceProperties, index)
        # One that does not wait for the default stream, where other libraries work.
        stream = call(rt.cudaStreamCreateWithFlags, rt.cudaStreamNonBlocking)
        held = ExitStack()
        held.callback(call, rt.cudaStreamDestroy, stream)
        name = bytes(known.name).partition(b"\0")[0].decode()
        return cls(name, f"sm{known.major}{known.minor}", stream, held)

    def free(self) -> int:
        """Bytes that are free on it now."""
        _, free, _ = bindings("runtime").cudaMemGetInfo()
        return int(free)

    def allocate(self, shape: Sequence[int], dtype: str, what: str = "a tensor") -> "Buffer":
        """Memory for a tensor, zeroed: what is masked is multiplied by 0, and what lay there before may be NaN.

        Raises EngineError, telling what was asked for and what is free, if it does not fit.
        """
        rt, nbytes = bindings("runtime"), prod(shape) * np.dtype(HOST[dtype]).itemsize
        status, pointer = rt.cudaMalloc(nbytes)
        if status == rt.cudaError_t.cudaErrorMemoryAllocation:
            rt.cudaGetLastError()  # it would be the next library's error
            raise EngineError(f"no room for {what} on {self.name}: asked for {nbytes:,} bytes, {self.free():,} free")
        if status.value:
            raise EngineError(f"cudaMalloc: {status.name}")
        self.hold(rt.cudaFree, pointer)
        call(rt.cudaMemsetAsync, pointer, 0, nbytes, self.stream)
        return Buffer(self, int(pointer), tuple(shape), dtype)

    def synchronize(self) -> None:
        """Wait for all that is enqueued. Raises EngineError if any of it failed."""
        call(bindings("runtime").cudaStreamSynchronize, self.stream)

    def hold(self, give_back: Callable[..., tuple[Any, ...]], handle: object) -> None:
        """Have a CUDA function called on a handle when the device is closed."""
        self._held.callback(call, give_back, handle)

    def close(self) -> None:
        """Give back everything, the last first."""
        self._held.close()

    def __enter__(self) -> Self:
        """The device itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def no_gpu(index: int = 0) -> str | None:
    """Why the GPU of this number cannot be used, with the cure; None if it can."""
    try:
        rt = bindings("runtime")
    except EngineError as error:
        return error.message
    served = call(rt.cudaDriverGetVersion)
    if not served:
        return "no NVIDIA driver: it runs on a GPU; the runtime ort-cpu runs the same graphs on a CPU"
    if served < CUDA * 1000:
        driver = f"{served // 1000}.{served % 1000 // 10}"
        return f"the NVIDIA driver serves CUDA {driver}, {CUDA}.0 is needed: install driver 580 or later"
    status, count = rt.cudaGetDeviceCount()
    if status.value or not index < count:
        found = status.name if status.value else f"{count} found, number {index} asked for"
        return f"there is no GPU to run on: {found}. CUDA_VISIBLE_DEVICES may hide it"
    return None


def gpu_name() -> str:
    """The name of the GPU. Raises EngineError if there is none."""
    with Device.open() as device:
        return device.name


class Buffer:
    """A tensor on the device. bf16 comes and goes as float32, rounded to the nearest even on the way in."""

    def __init__(self, device: Device, pointer: int, shape: tuple[int, ...], dtype: str) -> None:
        self.device = device
        self.ptr = pointer
        self.shape = shape
        self.dtype = dtype
        self.nbytes = prod(shape) * np.dtype(HOST[dtype]).itemsize

    def write(self, array: np.ndarray) -> None:
        """Fill it. Raises EngineError for another shape, or a dtype that this one cannot hold."""
        due = np.dtype(np.float32 if self.dtype == "bf16" else HOST[self.dtype])
        if array.shape != self.shape or not np.can_cast(array.dtype, due, "same_kind"):
            raise EngineError(f"{array.dtype} {list(array.shape)} for a buffer of {self.dtype} {list(self.shape)}")
        given = array.astype(due, copy=False)
        host = np.ascontiguousarray(_to_bf16(given) if self.dtype == "bf16" else given)
        self._copy(self.ptr, host.ctypes.data, "HostToDevice")

    def read(self) -> np.ndarray:
        """What it holds, once all that is enqueued has run."""
        host = np.empty(self.shape, HOST[self.dtype])
        self._copy(host.ctypes.data, self.ptr, "DeviceToHost")
        return (host.astype(np.uint32) << 16).view(np.float32) if self.dtype == "bf16" else host

    def _copy(self, to: int, source: int, way: str) -> None:
        enqueue_copy(self.device, to, source, self.nbytes, way)
        self.device.synchronize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype(np.uint16)


def enqueue_copy(device: Device, to: int, source: int, nbytes: int, way: str) -> None:
    """Enqueue a copy between addresses; `way` is `HostToDevice`, `DeviceToHost` or `DeviceToDevice`."""
    rt = bindings("runtime")
    kind = getattr(rt.cudaMemcpyKind, f"cudaMemcpy{way}")
    call(rt.cudaMemcpyAsync, to, source, nbytes, kind, device.stream)


class Mirror:
    """A tensor on the device and its copy in pinned memory, which a captured graph can copy from and to.

    Attributes:
        host: the copy, an array.
        buffer: on the device.
    """

    def __init__(self, device: Device, shape: Sequence[int], dtype: str, what: str = "a tensor") -> None:
        rt = bindings("runtime")
        self.buffer = device.allocate(shape, dtype, what)
        self._pinned = int(call(rt.cudaMallocHost, self.buffer.nbytes))
        device.hold(rt.cudaFreeHost, self._pinned)
        raw = (c_byte * self.buffer.nbytes).from_address(self._pinned)
        self.host = np.ctypeslib.as_array(raw).view(HOST[dtype]).reshape(shape)
        self.host[...] = 0  # it is run once before anybody gives it tokens

    def enqueue_write(self) -> None:
        """Enqueue the copy to the device."""
        enqueue_copy(self.buffer.device, self.buffer.ptr, self._pinned, self.buffer.nbytes, "HostToDevice")

    def enqueue_read(self) -> None:
        """Enqueue the copy to the host."""
        enqueue_copy(self.buffer.device, self._pinned, self.buffer.ptr, self.buffer.nbytes, "DeviceToHost")


class Graph:
    """What a callable enqueues on a device's stream, captured: one launch in place of as many as there are kernels."""

    def __init__(self, device: Device, enqueue: Callable[[], None]) -> None:
        rt = bindings("runtime")
        self._device = device
        # Of this thread alone: a library may compile in a thread of its own meanwhile.
        call(rt.cudaStreamBeginCapture, device.stream, rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        except BaseException:
            status, part = rt.cudaStreamEndCapture(device.stream)  # else the stream would stay unusable
            if not status.value:
                call(rt.cudaGraphDestroy, part)
            raise
        captured = call(rt.cudaStreamEndCapture, device.stream)
        self._executable = call(rt.cudaGraphInstantiate, captured, 0)
        device.hold(rt.cudaGraphExecDestroy, self._executable)
        call(rt.cudaGraphDestroy, captured)

    def launch(self) -> None:
        """Enqueue it all."""
        call(bindings("runtime").cudaGraphLaunch, self._executable, self._device.stream)


class Sampler:
    """Draws tokens on the device, as `nbp_engines.sampling.sample` does on the host; compiled where it runs.

    Only the uniforms go there and the tokens come back. Raises EngineError if the kernel does not compile.
    """

    def __init__(self, device: Device, spec: SystemSpec) -> None:
        """For a block of each clip of a batch, and for one token of each."""
        self._device = device
        self._vocab = spec.vocab
        rows = {spec.batch, spec.batch * spec.block_size}
        self._mirrors = {n: (Mirror(device, [n], "fp64"), Mirror(device, [n], "int64")) for n in rows}
        driver = bindings("driver")
        code = np.frombuffer(compiled(KERNEL.read_bytes(), device.arch), np.uint8)
        module = call(driver.cuModuleLoadData, code.ctypes.data)
        device.hold(driver.cuModuleUnload, module)
        self._kernel = call(driver.cuModuleGetFunction, module, f"sample_{spec.dtype}".encode())

    def sample(self, logits: Buffer | np.ndarray, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [...] of logits [...,V], an array too, and uniforms [...]; valid until the next for as many."""
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
        """Enqueue the kernel alone, which a stream that is being captured takes too.

        Args:
            logits: address on the device of [rows,V] in the spec's dtype.
            uniforms: address of fp64 [rows].
            tokens: address of int64 [rows], which are written.
            rows: tokens to draw.
            settings: how they are drawn.
            stream: handle of the stream; the device's own if None.
        """
        top_k = min(settings.top_k, self._vocab)
        values = (logits, uniforms, self._vocab, settings.temperature, top_k, settings.top_p, tokens)
        stream = self._device.stream if stream is None else stream
        launch = bindings("driver").cuLaunchKernel
        call(launch, self._kernel, rows, 1, 1, THREADS, 1, 1, 0, stream, (values, ARGUMENTS), 0)


@cache
def compiled(source: bytes, arch: str) -> bytes:
    """Machine code of a CUDA source for an architecture: no PTX, which an older driver of the same CUDA would refuse.

    Raises EngineError with the pip command if NVRTC is missing, with its log if it refuses the source.
    """
    nvrtc = bindings("nvrtc")
    settings = (
        f"--gpu-architecture={arch.replace('sm', 'sm_')}",
        "--std=c++17",
        "--fmad=false",  # multiplied, rounded, added: the arithmetic that was tested on a CPU
        f"--define-macro=SAMPLE_THREADS={THREADS}",
    )
    options = [setting.encode() for setting in settings]
    try:
        program = call(nvrtc.nvrtcCreateProgram, source, b"sample.cu", 0, [], [])
    except RuntimeError as error:  # of the loader, in place of a status
        raise EngineError(
            f"compiling the sampling kernel needs NVRTC: pip install 'nvidia-cuda-nvrtc=={CUDA}.*'"
        ) from error
    status, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status.value:
        log = _written(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().strip("\0\n")
        raise EngineError(f"NVRTC does not compile sample.cu for {arch}: {status.name}: {log}")
    code = _written(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    call(nvrtc.nvrtcDestroyProgram, program)
    return code


def _written(size_of: Callable[..., Any], write: Callable[..., Any], program: object) -> bytes:
    """What NVRTC writes over bytes of ours. It takes at least two: Python shares a single one with all who have it."""
    size = call(size_of, program)
    room = bytes(size + 1)
    call(write, program, room)
    return room[:size]
