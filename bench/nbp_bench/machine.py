"""The machine that a measurement runs on: its description for the records, and its memory."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nbp_engines.registry import RUNTIMES

PACKAGES = ("nbp-export", "torch", "numpy")


@dataclass(frozen=True)
class Machine:
    """The fields of a record that describe the machine; their meanings are those of `Record`."""

    machine: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    versions: str
    gpu: str | None
    gpu_memory_bytes: int | None
    driver: str | None


def describe() -> Machine:
    """Return the description of this machine; a fact about the GPU that cannot be read is None."""
    gpu, gpu_memory, driver = _gpu()
    runtime_packages = dict.fromkeys(package for runtime in RUNTIMES.values() for package in runtime.packages)
    versions = [(name, _version(name)) for name in (*PACKAGES, *runtime_packages, "triton")]
    return Machine(
        machine=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=", ".join(f"{name} {v or 'not installed'}" for name, v in versions if v or name in PACKAGES),
        gpu=gpu,
        gpu_memory_bytes=gpu_memory,
        driver=driver,
    )


def available_memory() -> int:
    """Return the bytes that new processes can use without swapping.

    Without /proc/meminfo, as on macOS, returns the size of the whole memory.
    """
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """Return the peak resident size of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike it, ru_maxrss also counts the parent's memory at the fork
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> tuple[str | None, int | None, str | None]:
    """Return the GPU's name, its memory in bytes and the driver's version, each None if it cannot be read.

    nvidia-smi reports all three, for the first GPU. Name and memory are replaced by those of torch, which knows the GPU
    in use.
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    name, memory, driver = None, None, None
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
        name, mebibytes, driver = line.split(", ")
        memory = int(mebibytes) * 2**20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        pass
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with suppress(RuntimeError):  # a GPU that fails here failed in the engines too, whose rows say so
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            name, memory = properties.name, properties.total_memory
    return name, memory, driver
