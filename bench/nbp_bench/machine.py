"""What a measurement ran on."""

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
    """The machine fields of a record."""

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
    """This machine."""
    gpu, gpu_memory, driver = _gpu()
    others = dict.fromkeys(package for runtime in RUNTIMES.values() for package in runtime.packages)
    found = [(name, _version(name)) for name in (*PACKAGES, *others, "triton")]
    return Machine(
        machine=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=", ".join(f"{name} {v or 'not installed'}" for name, v in found if v or name in PACKAGES),
        gpu=gpu,
        gpu_memory_bytes=gpu_memory,
        driver=driver,
    )


def available_memory() -> int:
    """Bytes that new processes can take without swapping; all of the memory where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """Largest resident size of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent had when it forked
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
    """Name, bytes and driver: torch knows which GPU is in use, the driver's own tool knows its version."""
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
        with suppress(RuntimeError):  # a GPU that fails here has failed in the engines' processes, whose rows say so
            used = torch.cuda.get_device_properties(torch.cuda.current_device())
            name, memory = used.name, used.total_memory
    return name, memory, driver
