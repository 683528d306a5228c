"""The two TensorRT libraries, with nearly one API: what tells them apart, and the options that each can honour.

TensorRT-RTX builds for a GPU that need not be there; TensorRT 11 builds on the GPU itself.
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
from nbp_engines.strict import write_bytes
from nbp_errors import UsageError
from nbp_export._extras import need

ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")  # that TensorRT-RTX is asked for here
COMPATIBILITY = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}
try:
    TIMINGS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nbp-export"
except RuntimeError:  # a user without a home: nothing is kept, as where the folder cannot be written to
    TIMINGS = Path(os.devnull, "nbp-export")


@dataclass(frozen=True)
class Library:
    """One of the two libraries.

    Attributes:
        module: its Python module, which also has to run its engines.
        title: its name.
        extra: the extra that installs it.
        builds_for_absent_gpus: whether it takes an architecture by name.
        status: the row of `nbp_engines.status` that says what was built with it and executed so far.
    """

    module: str
    title: str
    extra: str
    builds_for_absent_gpus: bool
    status: str

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return find_spec(self.module) is not None

    def load(self) -> Any:
        """The module. Raises NbpError with the pip command if it is not installed."""
        need(self.extra, self.module)
        return import_module(self.module)


TENSORRT = Library("tensorrt", "TensorRT 11", "trt", False, "tensorrt-11-engines")
RTX = Library("tensorrt_rtx", "TensorRT-RTX", "trt-rtx", True, "tensorrt-rtx-engines")
LIBRARIES = {"tensorrt": TENSORRT, "rtx": RTX}  # as `--builder` calls them


@dataclass(frozen=True)
class Options:
    """How to build.

    Attributes:
        builder: `tensorrt`, `rtx`, or `auto`: TensorRT 11 where it and the GPU are there, else TensorRT-RTX.
        arch: GPU architecture; None is sm80 for TensorRT-RTX, and for TensorRT 11 that of the GPU.
        compatibility: which other GPUs the engines must run on, at some cost in speed: none, ampere+ or same-cc.
        decomposed: let attention be several kernels; None does so in fp32, for which there is no fused one.
        workspace: bytes of GPU memory that a kernel may take for itself; None is all there is.
        level: how long to search for kernels, 0 to 5; None is the library's own choice.
        timing_cache: folder of what earlier builds measured, a file for each GPU and library version; None is TIMINGS.
    """

    builder: str = "auto"
    arch: str | None = None
    compatibility: str = "none"
    decomposed: bool | None = None
    workspace: int | None = None
    level: int | None = None
    timing_cache: Path | None = None

    def words(self) -> list[str]:
        """The options of the command line that ask for these again."""
        given = {
            "--builder": self.builder,
            "--arch": self.arch,
            "--hardware-compat": None if self.compatibility == "none" else self.compatibility,
            "--attention": None if self.decomposed is None else "decomposed" if self.decomposed else "fused",
            "--workspace": None if self.workspace is None else self.workspace // 2**20,
            "--level": self.level,
        }
        return [word for option, value in given.items() if value is not None for word in (option, str(value))]

    def settle(self) -> tuple[Library, "Options", str]:
        """The library, these options with the architecture filled in, and why it is that library.

        Raises UsageError for an option that the library cannot honour, NbpError if it is not installed, EngineError if
        it needs a GPU and none is there.
        """
        library, why = (LIBRARIES[self.builder], "as asked") if self.builder != "auto" else self._found()
        library.load()
        there = None if library.builds_for_absent_gpus else _gpu()[1]
        if refusals := [*self._refusals(there)]:
            raise UsageError(f"{library.title} {'; it '.join(refusals)}")
        return library, replace(self, arch=self.arch or there or ARCHITECTURES[0]), why

    def _found(self) -> tuple[Library, str]:
        if not TENSORRT.installed:
            return RTX, "TensorRT 11 is not installed"
        try:
            there = _gpu()[1]
        except EngineError as error:
            return RTX, f"TensorRT 11 builds on the GPU alone: {error.message}"
        if self.arch not in (None, there):
            return RTX, f"TensorRT 11 would build for the GPU that is there, {there}"
        return TENSORRT, f"the GPU is there, {there}"

    def _refusals(self, there: str | None) -> Iterator[str]:
        """What TensorRT 11 cannot honour, given the GPU that is there, or TensorRT-RTX, which needs none."""
        if there:
            if self.arch not in (None, there):
                yield f"builds for the GPU that is there, {there}, not for {self.arch}: --builder rtx does, or that GPU"
            return
        if self.arch not in (None, *ARCHITECTURES):
            yield f"builds for {', '.join(ARCHITECTURES)} here, not for {self.arch}"
        if self.compatibility != "none":
            yield f"builds for one --arch, with no --hardware-compat {self.compatibility}"
        if self.level is not None:
            yield "has no optimisation --level: it chooses kernels where the engine is loaded"
        if self.timing_cache:
            yield "has no --timing-cache: it measures nothing when it builds"


def configure(config: Any, library: Library, options: Options) -> None:
    """Set a builder config to settled options."""
    trt = library.load()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: fp32 would be multiplied with 10 bits
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if library.builds_for_absent_gpus:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, str(options.arch).upper()), 0)
        return
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, COMPATIBILITY[options.compatibility])
    if options.level is not None:
        config.builder_optimization_level = options.level
    known = _timings(library, options)
    content = b""
    with suppress(OSError):  # there is none yet, or nobody may read it
        content = known.read_bytes()
    before = config.create_timing_cache(content)
    if not config.set_timing_cache(before, False):  # what was measured elsewhere, or is damaged
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep_timings(config: Any, library: Library, options: Options) -> None:
    """Leave what a build has measured to the next one on this GPU."""
    if library.builds_for_absent_gpus:
        return
    known = _timings(library, options)
    with suppress(OSError):  # the build is worth more than the minutes that the next one would save
        known.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(known, bytes(config.get_timing_cache().serialize()))


def _timings(library: Library, options: Options) -> Path:
    gpu = re.sub(r"\W+", "-", _gpu()[0])
    return (options.timing_cache or TIMINGS) / f"{gpu}_{library.module}_{library.load().__version__}.timings"


def _gpu() -> tuple[str, str]:
    """Name and architecture of the GPU; raises EngineError if there is none."""
    from nbp_engines.cuda import Device

    with Device.open() as device:
        return device.name, device.arch
