"""The two TensorRT libraries: how they differ, and which build options each of them supports.

Their APIs are nearly equal. TensorRT-RTX builds engines without a GPU; TensorRT 11 builds them on the target GPU.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nbp_engines.errors import EngineError
from nbp_errors import UsageError
from nbp_export._extras import need
from nbp_files import write_bytes

ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")  # that we build for with TensorRT-RTX
COMPATIBILITY = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}
try:
    TIMINGS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nbp-export"
except RuntimeError:  # the user has no home directory, so that timings cannot be kept
    TIMINGS = Path(os.devnull, "nbp-export")


@dataclass(frozen=True)
class Library:
    """One of the two libraries.

    Attributes:
        module: the name of its Python module, which must also run the engines that it builds.
        title: the name of the library in messages.
        extra: the extra of nbp-export that installs it.
        builds_for_absent_gpus: whether it can build for a named architecture without a GPU.
        status: the row of `nbp_engines.status` that says what was built with it and executed so far.
    """

    module: str
    title: str
    extra: str
    builds_for_absent_gpus: bool
    status: str

    @property
    def installed(self) -> bool:
        """Whether the module is installed."""
        return find_spec(self.module) is not None

    def load(self) -> Any:
        """Import and return the module. Raises NbpError with the pip command if it is not installed."""
        need(self.extra, self.module)
        return import_module(self.module)


TENSORRT = Library("tensorrt", "TensorRT 11", "trt", False, "tensorrt-11-engines")
RTX = Library("tensorrt_rtx", "TensorRT-RTX", "trt-rtx", True, "tensorrt-rtx-engines")
LIBRARIES = {"tensorrt": TENSORRT, "rtx": RTX}  # by the values of --builder


@dataclass(frozen=True)
class Options:
    """Options of a build.

    Attributes:
        builder: `tensorrt`, `rtx` or `auto`. `auto` is TensorRT 11 if it is installed and the machine has the target
            GPU, else TensorRT-RTX.
        arch: GPU architecture; None means sm80 with TensorRT-RTX, and this machine's GPU with TensorRT 11.
        compatibility: other GPUs that the engines must also run on, which may make them slower: `none`, `ampere+` or
            `same-cc`.
        decomposed: whether attention may be several kernels; None permits it only in fp32, for which there is no fused
            kernel.
        workspace: bytes of GPU memory that a kernel may use as workspace; None sets no limit.
        level: optimisation level, from 0 to 5: how long TensorRT 11 searches for fast kernels; None is its default.
        timing_cache: folder of timing caches, with one file per GPU and library version; None means TIMINGS.
    """

    builder: str = "auto"
    arch: str | None = None
    compatibility: str = "none"
    decomposed: bool | None = None
    workspace: int | None = None
    level: int | None = None
    timing_cache: Path | None = None

    def arguments(self) -> list[str]:
        """Return the command-line arguments for these options, without the timing cache."""
        values = {
            "--builder": self.builder,
            "--arch": self.arch,
            "--hardware-compat": None if self.compatibility == "none" else self.compatibility,
            "--attention": None if self.decomposed is None else "decomposed" if self.decomposed else "fused",
            "--workspace": None if self.workspace is None else self.workspace // 2**20,
            "--level": self.level,
        }
        return [word for option, value in values.items() if value is not None for word in (option, str(value))]

    def resolve(self) -> tuple[Library, "Options", str]:
        """Choose the library; return it, these options with the architecture filled in, and the reason for the choice.

        Raises UsageError for an option that the library does not support, NbpError if the library is not installed,
        EngineError if it needs a GPU and the machine has none.
        """
        library, reason = (
            (LIBRARIES[self.builder], "chosen by --builder") if self.builder != "auto" else self._choose_library()
        )
        library.load()
        gpu_arch = None if library.builds_for_absent_gpus else _gpu()[1]
        if problems := [*self._unsupported(gpu_arch)]:
            raise UsageError(f"{library.title} {'; it '.join(problems)}")
        return library, replace(self, arch=self.arch or gpu_arch or ARCHITECTURES[0]), reason

    def _choose_library(self) -> tuple[Library, str]:
        """Return the library that `auto` stands for, and the reason."""
        if not TENSORRT.installed:
            return RTX, "TensorRT 11 is not installed"
        try:
            gpu_arch = _gpu()[1]
        except EngineError as error:
            return RTX, f"TensorRT 11 needs the target GPU: {error.message}"
        if self.arch not in (None, gpu_arch):
            return RTX, f"TensorRT 11 builds only for this machine's GPU, which is {gpu_arch}"
        return TENSORRT, f"this machine's GPU is {gpu_arch}"

    def _unsupported(self, gpu_arch: str | None) -> Iterator[str]:
        """Yield a message for each option that the library does not support.

        `gpu_arch` is the architecture of this machine's GPU for TensorRT 11, and None for TensorRT-RTX.
        """
        if gpu_arch:
            if self.arch not in (None, gpu_arch):
                yield (
                    f"builds only for this machine's GPU, which is {gpu_arch}, not for {self.arch}: "
                    f"use --builder rtx, or a machine with that GPU"
                )
            return
        if self.arch not in (None, *ARCHITECTURES):
            yield f"cannot build for {self.arch}: choose --arch {', '.join(ARCHITECTURES)}"
        if self.compatibility != "none":
            yield f"builds for one --arch only: leave out --hardware-compat {self.compatibility}"
        if self.level is not None:
            yield "has no optimisation levels, because it chooses kernels when an engine is loaded: leave out --level"
        if self.timing_cache:
            yield "has no timing cache, because it measures nothing during a build: leave out --timing-cache"


def configure(config: Any, library: Library, options: Options) -> None:
    """Apply resolved options to a builder config."""
    trt = library.load()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; TF32 keeps only 10 bits of the mantissa in fp32 products
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if library.builds_for_absent_gpus:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, str(options.arch).upper()), 0)
        return
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, COMPATIBILITY[options.compatibility])
    if options.level is not None:
        config.builder_optimization_level = options.level
    content = b""
    with suppress(OSError):  # the file does not exist yet or cannot be read
        content = _timing_file(library, options).read_bytes()
    timings = config.create_timing_cache(content)
    if not config.set_timing_cache(timings, False):  # the file is damaged, or comes from another GPU or version
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save_timings(config: Any, library: Library, options: Options) -> None:
    """Save the timing cache of a finished build for later builds on this GPU."""
    if library.builds_for_absent_gpus:
        return
    path = _timing_file(library, options)
    with suppress(OSError):  # a cache that cannot be written only makes the next build slower
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, bytes(config.get_timing_cache().serialize()))


def _timing_file(library: Library, options: Options) -> Path:
    gpu = re.sub(r"\W+", "-", _gpu()[0])
    return (options.timing_cache or TIMINGS) / f"{gpu}_{library.module}_{library.load().__version__}.timings"


def _gpu() -> tuple[str, str]:
    """Return the name and the architecture of this machine's GPU. Raises EngineError if there is none."""
    from nbp_engines.cuda import Device

    with Device.open() as device:
        return device.name, device.arch
