"""Reports a missing optional dependency in one line instead of a traceback."""

from importlib.util import find_spec

from nbp_engines.registry import DEFAULT
from nbp_errors import NbpError


def need(extra: str, *modules: str) -> None:
    """Raise NbpError with the pip command of an extra if one of its modules is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        # An ONNX Runtime that is already installed may be the GPU build, which the CPU build would overwrite.
        extras = f"{extra},{DEFAULT.extra}" if find_spec("onnxruntime") is None else extra
        verb = "is" if len(missing) == 1 else "are"
        raise NbpError(f"{', '.join(missing)} {verb} not installed: pip install 'nbp-export[{extras}]'")
