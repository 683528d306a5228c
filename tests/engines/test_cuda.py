"""The GPU module: its errors without a GPU, and its work on an emulated GPU whose functions match the real API."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx

from nbp_engines import cuda
from nbp_engines.cuda import CudaGraph, Device, Mirror, Sampler, enqueue_copy
from nbp_engines.errors import EngineError
from nbp_engines.sampling import GREEDY, Sampling, sample
from nbp_engines.spec import SystemSpec
from tests.engines.emulated import (
    Context,
    CudaEngine,
    Driver,
    Gpu,
    Module,
    Nvrtc,
    Runtime,
    RuntimeConfig,
    TensorRt,
    emulated,
)
from tests.engines.test_bundle import SPEC

no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")


# Missing parts, without any emulation.


@no_gpu
def test_a_missing_driver_has_its_own_error() -> None:
    with pytest.raises(EngineError, match=r"^no NVIDIA driver"):
        Device.open()


@pytest.mark.parametrize("name", ["runtime", "driver", "nvrtc"])
def test_without_cuda_python_the_error_has_the_pip_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"cuda.bindings.{name}", None)
    cuda.bindings.cache_clear()
    with pytest.raises(EngineError, match=r"pip install 'cuda-bindings==13\.\*'"):
        cuda.bindings(name)
    cuda.bindings.cache_clear()


def test_without_nvrtc_the_error_has_the_pip_command(tmp_path: Path) -> None:
    """The error is raised in a process that has cuda-python but not NVRTC."""
    for name in ("cuda", "numpy", "click"):
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.submodule_search_locations
        (tmp_path / name).symlink_to(next(iter(found.submodule_search_locations)))
    for extra in Path(np.__file__).parents[1].glob("numpy.libs"):
        (tmp_path / extra.name).symlink_to(extra)
    engines = Path(cuda.__file__).parents[1]
    code = (
        f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + {[str(tmp_path), str(engines)]}\n"
        "import site; site.getsitepackages = lambda: []; site.ENABLE_USER_SITE = False\n"
        "from nbp_engines import cuda; cuda.compiled(b'', 'sm80')"
    )
    bare = {key: value for key, value in os.environ.items() if key not in ("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=bare)
    assert (
        "EngineError: compiling the sampling kernel needs NVRTC: pip install 'nvidia-cuda-nvrtc==13.*'" in done.stderr
    )


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm120"])
def test_the_kernel_compiles(arch: str) -> None:
    """NVRTC itself compiles it, which needs no GPU. The result is machine code and not PTX."""
    if importlib.util.find_spec("nvidia.cu13") is None:
        pytest.skip("needs NVRTC")
    code = cuda.compiled(cuda.KERNEL.read_bytes(), arch)
    assert code.startswith(b"\x7fELF")
    for dtype in ("fp32", "fp16", "bf16"):
        assert f".text.sample_{dtype}".encode() in code


def test_the_compilers_message_is_part_of_the_error() -> None:
    if importlib.util.find_spec("nvidia.cu13") is None:
        pytest.skip("needs NVRTC")
    with pytest.raises(EngineError, match=r'for sm80: NVRTC_ERROR_COMPILATION: .*"nowhere" is undefined'):
        cuda.compiled(b"__global__ void f() { nowhere(); }", "sm80")


# The emulation and the real API.

EMULATED: list[tuple[type, Any]] = [
    *((module, module.real) for module in (Runtime, Driver, Nvrtc)),
    (Context, tensorrt_rtx.IExecutionContext),
    (CudaEngine, tensorrt_rtx.ICudaEngine),
    (RuntimeConfig, tensorrt_rtx.IRuntimeConfig),
    (type(vars(TensorRt(Gpu()))["Runtime"]), tensorrt_rtx.Runtime),
]
OURS = {"compute", "gpu", "graphs", "used_profiles", "real"}


def public(kind: type) -> list[str]:
    """Return the names that a class offers to a session."""
    return [name for name in dir(kind) if not name.startswith("_") and name not in OURS]


def parameters(function: Any, name: str) -> set[tuple[str, ...]]:
    """Return the parameter names of a function without `self`, one tuple for each overload in its docstring."""
    try:
        found = [[*inspect.signature(function).parameters]]
    except ValueError:
        found = [re.findall(r"(\w+):", text) for text in re.findall(rf"{name}\((self: .*?)\) ->", function.__doc__)]
    return {tuple(p for p in names if p != "self") for names in found}


@pytest.mark.parametrize(("ours", "real"), EMULATED, ids=lambda kind: kind.__name__)
def test_the_emulation_offers_nothing_that_the_real_one_has_not(ours: type, real: Any) -> None:
    if ours is type:
        ours = TensorRt(Gpu()).Runtime
    assert public(ours), "nothing to compare"
    for name in public(ours):
        assert hasattr(real, name), name
        mine = inspect.getattr_static(ours, name)
        if inspect.isfunction(mine):
            assert parameters(mine, name) <= parameters(getattr(real, name), name), name


def test_the_comparison_would_see_a_difference() -> None:
    real = parameters(tensorrt_rtx.IExecutionContext.execute_async_v3, "execute_async_v3")
    assert real == {("stream_handle",)}
    assert (
        parameters(Runtime.cudaMalloc, "cudaMalloc") == parameters(Runtime.real.cudaMalloc, "cudaMalloc") == {("size",)}
    )


def given_to_cuda() -> list[tuple[Any, tuple[Any, ...]]]:
    """Return every CUDA function that we call, with the arguments of its first call.

    The functions of NVRTC are left out, because another test calls the real ones.
    """
    with emulated(Gpu()) as gpu:
        device = Device.open()
        sampler, logits = Sampler(device, SPEC), device.allocate((1, 4, SPEC.vocab), "fp32")
        CudaGraph(device, Mirror(device, [2], "fp32").enqueue_write).launch()
        sampler.sample(logits, np.full((1, 4), 0.5), Sampling())
        logits.read()
        device.free_bytes()
        device.close()
        first = {function.__name__: (function, given) for function, given in reversed(gpu.calls)}
    return [first[name] for name in sorted(first) if not name.startswith("nvrtc")]


@no_gpu
@pytest.mark.parametrize(("function", "given"), given_to_cuda(), ids=lambda part: getattr(part, "__name__", ""))
def test_the_real_functions_accept_our_arguments(function: Any, given: tuple[Any, ...]) -> None:
    """Arguments are converted before the missing driver is noticed, so a wrong type would raise a TypeError."""
    with suppress(RuntimeError):  # cuda-python raises it if there is no driver
        status, *_ = function(*given)
        assert status.name in ("cudaErrorInsufficientDriver", "cudaSuccess", "cudaErrorInvalidValue")


# Our use of the GPU, on the emulation.


@pytest.fixture
def device(gpu: Gpu) -> Iterator[Device]:  # noqa: ARG001 - the fixture has to be active
    device = Device.open()
    yield device
    device.close()


def test_a_device_has_name_architecture_and_free_memory(device: Device) -> None:
    assert (device.name, device.arch) == ("Emulated", "sm80")
    assert device.free_bytes() == 80 * 2**30


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (Gpu(driver_version=0), "no NVIDIA driver"),
        (Gpu(driver_version=12080), r"supports CUDA 12\.8, but 13\.0 is needed: install driver 580"),
        (Gpu(count=0), "no GPU to run on: cudaErrorNoDevice.*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_cannot_be_used(gpu: Gpu, words: str) -> None:
    with emulated(gpu), pytest.raises(EngineError, match=words):
        Device.open()


def test_a_number_that_no_gpu_has() -> None:
    with emulated(Gpu()), pytest.raises(EngineError, match="number 3 does not exist, the number of GPUs is 1"):
        Device.open(3)


def test_allocated_memory_is_zeroed(device: Device) -> None:
    assert not device.allocate((3, 5), "fp32").read().any()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int64", "fp64"])
def test_what_is_written_is_read(device: Device, dtype: str) -> None:
    values = np.arange(-6, 6).reshape(3, 4).astype(cuda.HOST_DTYPES[dtype])
    buffer = device.allocate((3, 4), dtype)
    buffer.write(values)
    assert np.array_equal(buffer.read(), values)
    assert np.array_equal(np.asarray(buffer), values)
    assert buffer.read().dtype == values.dtype


def test_bf16_is_rounded_to_the_nearest_even_as_pytorch_does(device: Device) -> None:
    import torch

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, np.uint32)
    bits[: 2**16] = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000  # every tie
    values = bits.view(np.float32)
    buffer = device.allocate(values.shape, "bf16")
    buffer.write(values)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    assert np.array_equal(buffer.read(), expected, equal_nan=True)
    assert buffer.nbytes == 200_000


@pytest.mark.parametrize(
    ("shape", "dtype", "given"),
    [
        ((2, 3), "fp16", np.zeros((3, 2), np.float16)),
        ((2,), "int64", np.zeros(2)),
        ((1,), "bf16", np.zeros(1, complex)),
    ],
)
def test_what_does_not_fit_is_refused(device: Device, shape: Any, dtype: str, given: np.ndarray) -> None:
    with pytest.raises(EngineError, match=re.escape(f"{given.dtype} {list(given.shape)} to a buffer of {dtype}")):
        device.allocate(shape, dtype).write(given)


def test_the_error_about_too_little_memory_has_the_bytes() -> None:
    with emulated(Gpu(memory=1000)) as gpu:
        device = Device.open()
        device.allocate((10, 10), "fp32")
        with pytest.raises(EngineError, match="no memory for k_cache_3 on Emulated: it needs 640 bytes, 600 are free"):
            device.allocate((8, 10), "fp64", "k_cache_3")
        assert gpu.log[-1] == "cudaGetLastError", "the next library would find the error"
        device.close()


def test_the_error_of_a_call_names_the_status(device: Device) -> None:
    with pytest.raises(EngineError, match="cudaMemcpyAsync: cudaErrorInvalidValue"):
        enqueue_copy(device, 16, 32, 4, "HostToDevice")


def test_a_captured_call_runs_when_it_is_launched_and_not_before(device: Device) -> None:
    given, out = Mirror(device, [4], "int64"), Mirror(device, [4], "int64")

    def double() -> None:
        given.enqueue_write()
        enqueue_copy(device, out.host.ctypes.data, given.buffer.ptr, 32, "DeviceToHost")

    out.host[:] = -1
    graph = CudaGraph(device, double)
    for values in ([1, 2, 3, 4], [5, 6, 7, 8]):
        given.host[:] = values
        device.synchronize()
        assert out.host.tolist() != values
        graph.launch()
        device.synchronize()
        assert out.host.tolist() == values


def test_a_capture_that_fails_leaves_the_stream_usable(gpu: Gpu, device: Device) -> None:
    mirror = Mirror(device, [2], "fp32")

    def waits() -> None:
        mirror.enqueue_write()
        mirror.buffer.read()

    with pytest.raises(EngineError, match="StreamCapture"):
        CudaGraph(device, waits)
    assert gpu.capturing is None
    assert not mirror.buffer.read().any()


settings = [Sampling(), GREEDY, Sampling(0.7, 5, 0.8), Sampling(2.0, 10**12, 1.0)]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("sampling", settings)
@pytest.mark.parametrize("shape", [(1, 4), (1, 1)])
def test_tokens_are_those_of_the_host(device: Device, dtype: str, sampling: Sampling, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    spec = SystemSpec.from_json(SPEC.to_json() | {"dtype": dtype})
    logits, sampler = device.allocate((*shape, spec.vocab), dtype), Sampler(device, spec)
    for _ in range(3):
        logits.write(rng.standard_normal((*shape, spec.vocab)).astype(np.float32))
        noise = rng.uniform(size=shape)
        assert np.array_equal(sampler.sample(logits, noise, sampling), sample(logits.read(), noise, sampling))


def test_the_kernel_without_copies_takes_addresses_and_does_not_wait(gpu: Gpu, device: Device) -> None:
    rng, shape = np.random.default_rng(4), (2, SPEC.vocab)
    logits, noise, tokens = (device.allocate(s, d) for s, d in ((shape, "fp32"), ((2,), "fp64"), ((2,), "int64")))
    logits.write(rng.standard_normal(shape).astype(np.float32))
    noise.write(rng.uniform(size=2))
    sampler, other = Sampler(device, SPEC), Device.open()
    for stream in (None, int(other.stream)):
        sampler.enqueue(logits.ptr, noise.ptr, tokens.ptr, 2, Sampling(top_k=10**12), stream)
        assert gpu.queue, "it has run already"
        assert np.array_equal(tokens.read(), sample(logits.read(), noise.read(), Sampling(top_k=10**12)))
    other.close()


def test_logits_on_the_host_are_drawn_there(gpu: Gpu, device: Device) -> None:
    logits, noise = np.eye(4, SPEC.vocab, dtype=np.float32)[None] * 9, np.full((1, 4), 0.5)
    tokens = Sampler(device, SPEC).sample(logits, noise, Sampling())
    assert np.array_equal(tokens, sample(logits, noise, Sampling()))
    assert not any(name.startswith("sample_") for name in gpu.log)


def test_the_emulation_passes_on_only_types_and_constants() -> None:
    module: Module = Runtime(Gpu())
    assert module.cudaMemcpyKind is Runtime.real.cudaMemcpyKind
    with pytest.raises(AssertionError, match="cudaMallocAsync is not emulated"):
        _ = module.cudaMallocAsync
