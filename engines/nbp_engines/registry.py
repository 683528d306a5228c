"""The table of runtimes, and the function that opens a session on a bundle."""

from collections.abc import Collection
from pathlib import Path

from nbp_engines.bundle import Bundle
from nbp_engines.errors import EngineError
from nbp_engines.ort import ORT_CPU, ORT_CUDA
from nbp_engines.runtime import OpenOptions, Runtime
from nbp_engines.session import GraphSession
from nbp_engines.trt import TENSORRT

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (ORT_CPU, ORT_CUDA, TENSORRT)}
DEFAULT = ORT_CPU  # it needs no GPU


def runtime_of(bundle: Bundle, name: str | None = None) -> Runtime:
    """Return the runtime of this name or, if the name is None, the runtime that the bundle was made for.

    Raises EngineError if there is no runtime of that name.
    """
    runtime_name = name or bundle.manifest.runtime
    if runtime_name not in RUNTIMES:
        raise EngineError(f"{bundle.path}: there is no runtime {runtime_name!r}; choose one of {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime_name]


def open_session(
    bundle: Bundle | Path | str,
    threads: int | None = None,
    require_receipt: bool = False,
    runtime: str | None = None,
    graphs: Collection[str] | None = None,
) -> GraphSession:
    """Open a bundle, or only some of its graphs, with a runtime.

    Args:
        bundle: an opened bundle, or the path of its folder.
        threads: number of CPU threads per operator; None leaves it to the runtime.
        require_receipt: whether a bundle without a valid receipt is an error. Otherwise opening a folder gives a
            ReceiptWarning.
        runtime: `ort-cpu`, `ort-cuda` or `tensorrt`; None means the runtime that the bundle was made for.
        graphs: names of the graphs to open; None opens all.

    Raises BundleError if the bundle is damaged or lacks a required receipt, and EngineError if the runtime is missing
    or refuses the bundle.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle), require_receipt)
    if require_receipt:
        opened.check_receipt()
    return runtime_of(opened, runtime).open(opened, OpenOptions(threads, graphs))
