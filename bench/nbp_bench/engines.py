"""The table of engines: what can make the clips that the bench measures.

An engine is one of the PyTorch sessions, or a runtime on a bundle. Everything that differs between engines is read from
their entries.
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
    """One engine. It has either a session of its own or a runtime.

    Attributes:
        name: what the command line and records call it.
        title: what it is, in a few words.
        devices: `cpu` or `cuda`, where it computes.
        dtypes: the dtypes that it computes in.
        slow_start: whether minutes may pass before its first clip, for compiling or exporting.
        role: the part it plays in a comparison, `reference` or `baseline`; None for the others.
        open: opens a PyTorch session on spec, generator, tokenizer and device.
        absence: a sentence that says why it cannot run on a device of this machine, or None.
        runtime: what runs a bundle.
        status: the rows of `nbp_engines.status` that say what was executed of it so far.
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
    def on(cls, runtime: Runtime) -> "Engine":
        """A runtime on a bundle, which is exported first unless it is given."""
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

    def __call__(self, device: str) -> str | None:  # noqa: ARG002 - a runtime has one device
        return self.runtime.absence()


def _no_device(device: str) -> str | None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def _no_compiler(device: str) -> str | None:
    if device == "cuda" and find_spec("triton") is None:
        return "torch.compile needs triton on a GPU: pip install triton"
    if device == "cuda" and not any(map(which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        return "torch.compile needs a C compiler, with which triton builds its launchers: install gcc"
    return _no_device(device)


def _naive(spec: "SystemSpec", generator: Any, tokenizer: Any, device: str) -> Any:
    from nbp_bench.torch_sessions import NaiveSession

    return NaiveSession(spec, generator, tokenizer, device)


def _eager(spec: "SystemSpec", generator: Any, tokenizer: Any, device: str) -> Any:
    from nbp_bench.torch_sessions import EagerSession

    return EagerSession(spec, generator, tokenizer, device)


def _cudagraph(spec: "SystemSpec", generator: Any, tokenizer: Any, device: str) -> Any:
    from nbp_bench.cuda_graphs import CudaGraphSession

    return CudaGraphSession(spec, generator, tokenizer, device)


def _compiled(spec: "SystemSpec", generator: Any, tokenizer: Any, device: str) -> Any:
    from nbp_bench.cuda_graphs import CudaGraphSession
    from nbp_bench.torch_sessions import EagerSession

    captured = device == "cuda"
    return (CudaGraphSession if captured else EagerSession)(spec, generator, tokenizer, device, compiled=True)


BOTH, HALF_TOO = ("cpu", "cuda"), ("fp32", "fp16", "bf16")
PYTORCH = (
    Engine("naive", "the authors' loop", BOTH, HALF_TOO, _no_device, role=BASELINE, open=_naive),
    Engine("eager", "PyTorch with static caches", BOTH, HALF_TOO, _no_device, role=REFERENCE, open=_eager),
    Engine("cudagraph", "the eager step in a CUDA graph", ("cuda",), HALF_TOO, _no_device, open=_cudagraph),
    Engine("compiled", "the step by torch.compile", BOTH, HALF_TOO, _no_compiler, slow_start=True, open=_compiled),
)
# What is compared where nothing else is asked for, in which dtype, and how many steps are timed by themselves.
DEFAULT_ENGINES = {"cpu": "naive,eager,ort-cpu", "cuda": "eager,cudagraph,tensorrt,ort-cuda"}
DEFAULT_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
DEFAULT_STEPS = {"cpu": 0, "cuda": 200}  # on a CPU the steps of the clips say as much


def engines() -> dict[str, Engine]:
    """All engines by name, those of the registry of runtimes included."""
    entries = (*PYTORCH, *(Engine.on(runtime) for runtime in RUNTIMES.values()))
    return {engine.name: engine for engine in entries}
