"""The table of the engines that the bench compares.

An engine is one of the PyTorch sessions, or a runtime that runs a bundle. The rest of the bench reads everything that
differs between engines from their entries here.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import TYPE_CHECKING, Any

from nbp_engines.registry import RUNTIMES
from nbp_engines.runtime import Runtime
from nbp_reports.record import BASELINE, REFERENCE

if TYPE_CHECKING:
    from nbp_engines.spec import SystemSpec
    from nbp_reference.model import NextBlockTransformer
    from nbp_reference.tokenizer import VideoTokenizer

    Opener = Callable[[SystemSpec, NextBlockTransformer, VideoTokenizer | None, str], Any]


@dataclass(frozen=True)
class Engine:
    """One engine. It has either `open` or `runtime`.

    Attributes:
        name: the name on the command line and in records.
        title: a short description for the help text.
        devices: the devices that it can use, of `cpu` and `cuda`; the first is its default.
        dtypes: the dtypes that it can compute in.
        absence: called with a device; returns a sentence that says why the engine cannot run on it on this machine, or
            None if it can.
        slow_start: whether it compiles or exports before its first clip, which may take minutes.
        role: its role in a comparison, `reference` or `baseline`; None for the other engines.
        open: opens a PyTorch session from spec, generator, tokenizer and device; None for a runtime.
        runtime: the runtime that runs a bundle; None for a PyTorch engine.
        status: the names of the rows of `nbp_engines.status` that say where it was executed.
    """

    name: str
    title: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    absence: Callable[[str], str | None]
    slow_start: bool = False
    role: str | None = None
    open: "Opener | None" = None
    runtime: Runtime | None = None
    status: tuple[str, ...] = ("torch-cpu", "torch-cuda")

    @classmethod
    def from_runtime(cls, runtime: Runtime) -> "Engine":
        """Return the engine of a runtime. The bench exports a bundle for it unless the user gives one."""
        return cls(
            name=runtime.name,
            title=runtime.title,
            devices=runtime.devices,
            dtypes=runtime.dtypes,
            absence=_RuntimeAbsence(runtime),
            slow_start=True,
            runtime=runtime,
            status=runtime.status,
        )


@dataclass(frozen=True)
class _RuntimeAbsence:
    runtime: Runtime

    def __call__(self, device: str) -> str | None:  # noqa: ARG002 - a runtime has only one device
        return self.runtime.absence()


def _device_absence(device: str) -> str | None:
    """Return a sentence if torch has no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device: use --device cpu, or install torch with CUDA"
    return None


def _compiler_absence(device: str) -> str | None:
    """Return a sentence if torch.compile cannot compile for the device."""
    if device == "cuda" and find_spec("triton") is None:
        return "torch.compile needs triton on a GPU: pip install triton"
    if device == "cuda" and not any(map(which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        return "torch.compile needs a C compiler, with which triton builds its launchers: install gcc"
    return _device_absence(device)


def _open_naive(spec: "SystemSpec", generator: Any, tokenizer: Any, device: str) -> Any:
    from nbp_bench.torch_sessions import NaiveSession

    return NaiveSession(spec, generator, tokenizer, device)


def _open_eager(spec: "SystemSpec", generator: Any, tokenizer: Any, device: str) -> Any:
    from nbp_bench.torch_sessions import EagerSession

    return EagerSession(spec, generator, tokenizer, device)


def _open_cudagraph(spec: "SystemSpec", generator: Any, tokenizer: Any, device: str) -> Any:
    from nbp_bench.cuda_graphs import CudaGraphSession

    return CudaGraphSession(spec, generator, tokenizer, device)


def _open_compiled(spec: "SystemSpec", generator: Any, tokenizer: Any, device: str) -> Any:
    from nbp_bench.cuda_graphs import CudaGraphSession
    from nbp_bench.torch_sessions import EagerSession

    captured = device == "cuda"
    return (CudaGraphSession if captured else EagerSession)(spec, generator, tokenizer, device, compiled=True)


ALL_DEVICES, ALL_DTYPES = ("cpu", "cuda"), ("fp32", "fp16", "bf16")
NAIVE = Engine("naive", "the authors' loop", ALL_DEVICES, ALL_DTYPES, _device_absence, role=BASELINE, open=_open_naive)
EAGER = Engine(
    "eager",
    "PyTorch with static caches",
    ALL_DEVICES,
    ALL_DTYPES,
    _device_absence,
    role=REFERENCE,
    open=_open_eager,
)
CUDAGRAPH = Engine(
    "cudagraph",
    "eager, its steps captured as CUDA graphs",
    ("cuda",),
    ALL_DTYPES,
    _device_absence,
    open=_open_cudagraph,
)
COMPILED = Engine(
    "compiled",
    "eager, its step compiled by torch.compile",
    ALL_DEVICES,
    ALL_DTYPES,
    _compiler_absence,
    slow_start=True,
    open=_open_compiled,
)
PYTORCH = (NAIVE, EAGER, CUDAGRAPH, COMPILED)
# The defaults of --engines, --dtype and --steps for each device.
DEFAULT_ENGINES = {"cpu": "naive,eager,ort-cpu", "cuda": "eager,cudagraph,tensorrt,ort-cuda"}
DEFAULT_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
DEFAULT_STEPS = {"cpu": 0, "cuda": 200}  # on a CPU, the steps of the clips are timed as exactly


def engines() -> dict[str, Engine]:
    """Return all engines by name: the PyTorch engines, and one for each registered runtime."""
    entries = (*PYTORCH, *(Engine.from_runtime(runtime) for runtime in RUNTIMES.values()))
    return {engine.name: engine for engine in entries}
