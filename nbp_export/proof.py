"""The proof of a bundle: lint and parity of every graph, and its trace. The receipt is the result."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nbp_engines.bundle import RECEIPT, Bundle
from nbp_engines.errors import EngineError
from nbp_engines.registry import DEFAULT, runtime_of
from nbp_engines.runtime import Runtime
from nbp_errors import NbpError
from nbp_export import lint, parity
from nbp_export.inspect import open_unproven, status_of
from nbp_export.trace import TRACE, check_trace, read_trace
from nbp_export.weights import read_generator, read_tokenizer
from nbp_files import write_json

TOOLS = ("nbp-export", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
Report = Callable[[str], None]


def prove(bundle: Bundle, report: Report = lambda _: None, runtime: Runtime = DEFAULT) -> dict[str, Any]:
    """Compare every graph with the reference on the bundle's weights, repeat the trace, and return the receipt.

    On a CPU, one graph and one layer of the reference are in memory at a time.

    Args:
        bundle: the bundle.
        report: a function that receives the name of each stage as it begins.
        runtime: the runtime that executes the graphs.

    Raises LintError or ParityError if a graph differs from the reference, BundleError if the bundle has no trace,
    EngineError if the runtime is not available on this machine or cannot run this bundle.
    """
    if reason := runtime.absence() or runtime.refusal(bundle):
        raise EngineError(reason)
    description, dtype, trace = runtime.description(bundle), bundle.manifest.spec.dtype, read_trace(bundle)
    arithmetic = dtype if dtype in runtime.dtypes else f"fp32 arithmetic, on weights rounded to {dtype},"
    for name, spec in bundle.manifest.graph_specs().items():
        report(f"lint {name}")
        lint.check(bundle.graph_file(name), spec)
    checks: list[parity.Check] = []
    reference = parity.Reference(read_generator(bundle), read_tokenizer(bundle))

    def collect(passed: Iterator[parity.Check]) -> None:
        for check in passed:
            if not checks or checks[-1].graph != check.graph or checks[-1].at != check.at:
                report(f"check {check.graph} at {check.at}")
            checks.append(check)

    collect(parity.check_bundle(bundle, reference, runtime))
    report(f"repeat {TRACE}")
    collect(check_trace(bundle, trace, runtime))
    return {
        "files": bundle.hashes(),
        "reference": "nbp_reference, fp32 arithmetic, weights as the bundle holds them",
        "runtime": runtime.name,
        "executed": f"in {arithmetic} by {description}",
        "status": status_of(runtime.name, dtype, [e.library for e in bundle.manifest.engines if runtime.runs_engines]),
        "worst": asdict(max(checks, key=lambda c: c.worst)),
        "checks": [asdict(check) for check in checks],
        "versions": versions(runtime.packages),
    }


def verify(path: Path, report: Report = lambda _: None, runtime: str = DEFAULT.name) -> Bundle:
    """Check the files of a bundle, prove it and write its receipt. A bundle that fails loses its receipt.

    If a runtime for GPUs cannot run the bundle, the receipt is kept.

    Raises BundleError, LintError or ParityError if the bundle fails, EngineError if the runtime cannot run it, and
    NbpError if the receipt cannot be written or removed.
    """
    bundle = open_unproven(path)
    chosen = runtime_of(bundle, runtime)
    receipt = path / RECEIPT
    try:
        content = prove(bundle, report, chosen)
    except NbpError as error:
        if "cpu" in chosen.devices or not isinstance(error, EngineError):
            try:
                receipt.unlink(missing_ok=True)
            except OSError as removal:
                raise NbpError(
                    f"{error.message}; its old receipt cannot be removed ({removal.strerror}): remove {receipt}, which "
                    "is no longer true"
                ) from error
        raise
    try:
        write_json(receipt, content)
    except OSError as error:
        raise NbpError(
            f"{path} passed, but its receipt cannot be written ({error.strerror}): free space there, or verify a "
            "copy in another folder"
        ) from error
    return bundle


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Return the installed versions of TOOLS and of further distributions."""
    installed = {}
    for tool in (*TOOLS, *more):
        try:
            installed[tool] = version(tool)
        except PackageNotFoundError:
            installed[tool] = "not installed"
    return installed
