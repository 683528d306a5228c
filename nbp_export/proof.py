"""The proof that a bundle is the model: lint and parity of every graph, written down as its receipt."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nbp_engines.bundle import RECEIPT, Bundle
from nbp_engines.errors import NbpError
from nbp_engines.strict import write_json
from nbp_export import lint, parity
from nbp_export.inspect import look
from nbp_export.weights import read_generator, read_tokenizer

TOOLS = ("nbp-export", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
NOT_IN_BF16 = "not executed in bf16: checked as the same graphs in fp32 arithmetic, on weights rounded to bf16"
Report = Callable[[str], None]


def prove(bundle: Bundle, report: Report = lambda _: None) -> dict[str, Any]:
    """Hold every graph against the reference with the bundle's own weights; the receipt.

    One graph and one layer of the reference are in memory at a time. `report` is told each stage as it begins.

    Raises LintError or ParityError if a graph would not do what the reference does.
    """
    for name, spec in bundle.manifest.graph_specs().items():
        report(f"lint {name}")
        lint.check(bundle.graph_file(name), spec)
    checks: list[parity.Check] = []
    for check in _checks(bundle):
        if not checks or checks[-1].graph != check.graph or checks[-1].at != check.at:
            report(f"check {check.graph} at {check.at}")
        checks.append(check)
    return {
        "files": bundle.hashes(),
        "reference": "nbp_reference, fp32 arithmetic, weights as the bundle holds them",
        "runtime": "ONNX Runtime, CPU; the generator's graphs as written, the tokenizer's as optimised",
        "executed": bundle.manifest.provenance.get("executed", f"in {bundle.manifest.spec.dtype}"),
        "worst": asdict(max(checks, key=lambda c: c.worst)),
        "checks": [asdict(check) for check in checks],
        "versions": versions(),
    }


def prove_again(path: Path, report: Report = lambda _: None) -> Bundle:
    """Open a bundle, which checks its files, prove it and write its receipt; one that fails is left without.

    Raises BundleError, LintError or ParityError for what is wrong with it.
    """
    bundle = look(path)
    receipt = path / RECEIPT
    try:
        content = prove(bundle, report)
    except NbpError:
        receipt.unlink(missing_ok=True)
        raise
    try:
        write_json(receipt, content)
    except OSError as error:
        raise NbpError(f"{path} passed, but its receipt cannot be written: {error.strerror}") from error
    return bundle


def _checks(bundle: Bundle) -> Iterator[parity.Check]:
    yield from parity.check_generator(bundle, read_generator(bundle))
    if tokenizer := read_tokenizer(bundle):
        yield from parity.check_tokenizer(bundle, tokenizer)


def versions() -> dict[str, str]:
    """Installed versions of the tools that an export depends on."""
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            found[tool] = "not installed"
    return found
