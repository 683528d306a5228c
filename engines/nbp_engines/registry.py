"""The table of runtimes, and the way to a session on a bundle."""

from collections.abc import Collection
from pathlib import Path

from nbp_engines.bundle import Bundle
from nbp_engines.errors import EngineError
from nbp_engines.ort import ORT_CPU, ORT_CUDA
from nbp_engines.runtime import OpenOptions, Runtime
from nbp_engines.session import GraphSession
from nbp_engines.trt import TENSORRT

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (ORT_CPU, ORT_CUDA, TENSORRT)}
DEFAULT = ORT_CPU  # runs everywhere


def runtime_of(bundle: Bundle, name: str | None = None) -> Runtime:
    """The runtime of this name, or the one that the bundle was made for.

    Raises EngineError if there is none of that name.
    """
    chosen = name or bundle.manifest.runtime
    if chosen not in RUNTIMES:
        raise EngineError(f"{bundle.path}: there is no runtime {chosen!r}; this version has {', '.join(RUNTIMES)}")
    return RUNTIMES[chosen]


def open_session(
    bundle: Bundle | Path | str,
    threads: int | None = None,
    require_receipt: bool = False,
    runtime: str | None = None,
    graphs: Collection[str] | None = None,
) -> GraphSession:
    """Open a bundle, or only some of its graphs, with the runtime it was made for or another one.

    Args:
        bundle: an opened bundle, or its folder.
        threads: inside an operator, on a CPU; the runtime's own choice if None.
        require_receipt: refuse a bundle that nothing proves.
        runtime: a name of the registry: `ort-cpu`, `ort-cuda` or `tensorrt`.
        graphs: names; all if None.

    Raises BundleError if it is not an intact bundle, or has no valid receipt where one is required; EngineError if the
    runtime is missing or refuses the bundle.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle), require_receipt)
    if require_receipt:
        opened.prove()
    return runtime_of(opened, runtime).open(opened, OpenOptions(threads, graphs))
