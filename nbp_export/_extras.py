"""One line for a missing optional dependency, instead of a traceback."""

from importlib.util import find_spec

from nbp_engines.errors import NbpError


def need(extra: str, *modules: str) -> None:
    """Raise NbpError, with the pip command, unless all modules can be imported."""
    missing = [m for m in modules if find_spec(m) is None]
    if missing:
        raise NbpError(f"{', '.join(missing)} missing: pip install 'nbp-export[{extra},cpu]'")
