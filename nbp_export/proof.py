"""The proof that a bundle is the model: lint and parity of every graph, written down as its receipt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nbp_engines.bundle import RECEIPT, Bundle
from nbp_engines.cuda import Device
from nbp_engines.errors import EngineError, NbpError
from nbp_engines.strict import write_json
from nbp_export import lint, parity
from nbp_export.inspect import look
from nbp_export.weights import read_generator, read_tokenizer

TOOLS = ("nbp-export", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
ON_A_GPU = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings")
NOT_IN_BF16 = "not executed in bf16: checked as the same graphs in fp32 arithmetic, on weights rounded to bf16"
Report = Callable[[str], None]


def prove(bundle: Bundle, report: Report = lambda _: None, runtime: str = "onnx") -> dict[str, Any]:
    """Hold every graph, run by a runtime, against the reference with the bundle's own weights; the receipt.

    On a CPU one graph and one layer of the reference are in memory at a time. `report` is told each stage as it begins.

    Raises LintError or ParityError if a graph would not do what the reference does, EngineError if the runtime is not
    there.
    """
    ran, executed = _by(bundle, runtime)
    for name, spec in bundle.manifest.graph_specs().items():
        report(f"lint {name}")
        lint.check(bundle.graph_file(name), spec)
    checks: list[parity.Check] = []
    for check in _checks(bundle, runtime):
        if not checks or checks[-1].graph != check.graph or checks[-1].at != check.at:
            report(f"check {check.graph} at {check.at}")
        checks.append(check)
    return {
        "files": bundle.hashes(),
        "reference": "nbp_reference, fp32 arithmetic, weights as the bundle holds them",
        "runtime": ran,
        "executed": executed,
        "worst": asdict(max(checks, key=lambda c: c.worst)),
        "checks": [asdict(check) for check in checks],
        "versions": versions(() if runtime == "onnx" else ON_A_GPU),
    }


def _by(bundle: Bundle, runtime: str) -> tuple[str, str]:
    """What runs the graphs, and in which dtype that is. Raises EngineError if it takes a GPU and there is none."""
    dtype = bundle.manifest.spec.dtype
    if runtime == "onnx":
        ran = "ONNX Runtime, CPU; the generator's graphs as written, the tokenizer's as optimised"
        return ran, bundle.manifest.provenance.get("executed", f"in {dtype}")
    with Device.open() as device:
        name = device.name
    libraries = dict.fromkeys(f"{engine.library} {engine.version}" for engine in bundle.manifest.engines)
    ran = "ONNX Runtime, CUDA provider" if runtime == "cuda" else " and ".join(libraries)
    return ran, f"in {dtype} by {ran} on {name}"


def prove_again(path: Path, report: Report = lambda _: None, runtime: str = "onnx") -> Bundle:
    """Open a bundle, which checks its files, prove it and write its receipt; one that fails is left without.

    One that a GPU's runtime could not run keeps the receipt that it has.

    Raises BundleError, LintError or ParityError for what is wrong with it, EngineError if the runtime is not there.
    """
    bundle = look(path)
    receipt = path / RECEIPT
    try:
        content = prove(bundle, report, runtime)
    except NbpError as error:
        if runtime == "onnx" or not isinstance(error, EngineError):
            receipt.unlink(missing_ok=True)
        raise
    try:
        write_json(receipt, content)
    except OSError as error:
        raise NbpError(f"{path} passed, but its receipt cannot be written: {error.strerror}") from error
    return bundle


def _checks(bundle: Bundle, runtime: str) -> Iterator[parity.Check]:
    yield from parity.check_generator(bundle, read_generator(bundle), runtime=runtime)
    if tokenizer := read_tokenizer(bundle):
        yield from parity.check_tokenizer(bundle, tokenizer, runtime=runtime)


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Installed versions of the tools that an export depends on, and of more."""
    found = {}
    for tool in (*TOOLS, *more):
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            found[tool] = "not installed"
    return found
