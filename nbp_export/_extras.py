"""One line for a missing optional dependency, instead of a traceback."""

from importlib.util import find_spec

from nbp_engines.registry import DEFAULT
from nbp_errors import NbpError


def need(extra: str, *modules: str) -> None:
    """Raise NbpError, with the pip command, unless all modules can be imported."""
    missing = [m for m in modules if find_spec(m) is None]
    if missing:
        # Where a runtime is installed it may be the GPU's, which the CPU's would overwrite.
        extras = f"{extra},{DEFAULT.extra}" if find_spec("onnxruntime") is None else extra
        raise NbpError(f"{', '.join(missing)} missing: pip install 'nbp-export[{extras}]'")
