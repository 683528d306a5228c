"""The proof that a bundle is the model: lint and parity of every graph, written down as its receipt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nbp_engines.bundle import RECEIPT, Bundle
from nbp_engines.errors import EngineError
from nbp_engines.registry import DEFAULT, runtime_of
from nbp_engines.runtime import Runtime
from nbp_engines.strict import write_json
from nbp_errors import NbpError
from nbp_export import lint, parity
from nbp_export.inspect import look, status_of
from nbp_export.trace import TRACE, check_trace, read_trace
from nbp_export.weights import read_generator, read_tokenizer

TOOLS = ("nbp-export", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
Report = Callable[[str], None]


def prove(bundle: Bundle, report: Report = lambda _: None, runtime: Runtime = DEFAULT) -> dict[str, Any]:
    """Compare every graph, run by a runtime, with the reference on the bundle's own weights; returns the receipt.

    Then the generation loop has to repeat the bundle's trace. On a CPU one graph and one layer of the reference are in
    memory at a time. `report` gets each stage as it begins.

    Raises LintError or ParityError if a graph would not do what the reference does, BundleError if the bundle has no
    trace, EngineError if the runtime cannot run here, or cannot run this bundle.
    """
    if why := runtime.absence() or runtime.refusal(bundle):
        raise EngineError(why)
    ran, dtype, trace = runtime.description(bundle), bundle.manifest.spec.dtype, read_trace(bundle)
    arithmetic = dtype if dtype in runtime.dtypes else f"fp32 arithmetic, on weights rounded to {dtype},"
    for name, spec in bundle.manifest.graph_specs().items():
        report(f"lint {name}")
        lint.check(bundle.graph_file(name), spec)
    checks: list[parity.Check] = []
    reference = parity.Reference(read_generator(bundle), read_tokenizer(bundle))

    def take(passed: Iterator[parity.Check]) -> None:
        for check in passed:
            if not checks or checks[-1].graph != check.graph or checks[-1].at != check.at:
                report(f"check {check.graph} at {check.at}")
            checks.append(check)

    take(parity.check_bundle(bundle, reference, runtime))
    report(f"repeat {TRACE}")
    take(check_trace(bundle, trace, runtime))
    return {
        "files": bundle.hashes(),
        "reference": "nbp_reference, fp32 arithmetic, weights as the bundle holds them",
        "runtime": runtime.name,
        "executed": f"in {arithmetic} by {ran}",
        "status": status_of(runtime.name, dtype, [e.library for e in bundle.manifest.engines if runtime.runs_engines]),
        "worst": asdict(max(checks, key=lambda c: c.worst)),
        "checks": [asdict(check) for check in checks],
        "versions": versions(runtime.packages),
    }


def prove_again(path: Path, report: Report = lambda _: None, runtime: str = DEFAULT.name) -> Bundle:
    """Open a bundle, which checks its files, prove it and write its receipt; one that fails is left without.

    One that a GPU's runtime could not run keeps the receipt that it has.

    Raises BundleError, LintError or ParityError for what is wrong with it, EngineError if the runtime cannot run it.
    """
    bundle = look(path)
    runs = runtime_of(bundle, runtime)
    receipt = path / RECEIPT
    try:
        content = prove(bundle, report, runs)
    except NbpError as error:
        if "cpu" in runs.devices or not isinstance(error, EngineError):
            try:
                receipt.unlink(missing_ok=True)
            except OSError as kept:  # the failure is the news; what could not be done about it follows
                why = f"remove {receipt}, which cannot be removed here ({kept.strerror})"
                raise NbpError(f"{error.message}; {why}, since it vouches for a bundle that fails") from error
        raise
    try:
        write_json(receipt, content)
    except OSError as error:
        raise NbpError(
            f"{path} passed, but its receipt cannot be written ({error.strerror}): free space there, "
            "or verify a copy in another folder"
        ) from error
    return bundle


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Installed versions of the tools that an export depends on, and of more."""
    found = {}
    for tool in (*TOOLS, *more):
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            found[tool] = "not installed"
    return found
