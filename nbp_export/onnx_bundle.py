"""Exports a model to an ONNX bundle: trace, share the weights, lint, prove parity, and only then give it its name."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from nbp_engines.bundle import MANIFEST, RECEIPT, SCHEMA, Bundle, File, Manifest
from nbp_engines.errors import UsageError
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec
from nbp_export import lint, parity
from nbp_export.graphs import graph_module, system_spec, trace
from nbp_export.sources import Source
from nbp_export.weights import WeightPool, weights_sha256

WEIGHTS = {
    "prefill": "generator.data",
    "step": "generator.data",
    "step_1": "generator.data",
    "encode": "encode.data",
    "decode": "decode.data",
}
TOOLS = ("nbp-export", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
Report = Callable[[str], None]


def export(source: Source, out: Path, dtype: str = "fp32", batch: int = 1, report: Report = lambda _: None) -> Bundle:
    """Write the bundle of a model to a folder that does not exist yet; the source's weights are rounded to `dtype`.

    Every graph is checked against the reference before the folder appears: an interrupted or failed export leaves
    nothing there. `report` is told each stage as it begins.

    Raises UsageError if the folder exists or cannot be made, LintError or ParityError if a graph would not do what
    the reference does.
    """
    if out.exists():
        raise UsageError(f"{out} exists: choose another --out, or remove it first")
    spec = system_spec(source.generator.config, source.tokenizer.config if source.tokenizer else None, dtype, batch)
    with _appearing(out) as folder, torch.no_grad():
        digest = weights_sha256(source.generator, source.tokenizer)
        _write_graphs(source, spec, folder, report)
        content = _manifest(source, spec, digest, folder).to_bytes()
        bundle = Bundle.of(folder, content)
        checks: list[parity.Check] = []
        for check in parity.check_bundle(bundle, source.generator, source.tokenizer):
            if not checks or checks[-1].graph != check.graph or checks[-1].at != check.at:
                report(f"check {check.graph} at {check.at}")
            checks.append(check)
        _write_json(folder / RECEIPT, receipt(bundle, checks))
        (folder / MANIFEST).write_bytes(content)  # last, so that whatever a killed export leaves is no bundle
    return replace(bundle, path=out)  # the same files under their name; no need to hash them all again


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A working folder beside `out` that takes its name only if all went well, and is gone otherwise.

    It is locked while in use, so that the next export to the same name can tell what a killed one left, and remove it.
    """
    prefix = f".{out.name}.partial-"
    with ExitStack() as locks:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with _locked(out.parent, wait=True) as alone:  # a folder that has just been made is not locked yet
                for left in out.parent.glob(f"{glob.escape(prefix)}????????") if alone else ():
                    with _locked(left) as abandoned:
                        if abandoned:
                            shutil.rmtree(left, ignore_errors=True)
                folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
                locks.enter_context(_locked(folder))
        except OSError as error:
            raise UsageError(f"{out.parent} cannot hold the bundle ({error.strerror}): choose another --out") from error
        try:
            yield folder
            folder.chmod(0o755)
            try:
                folder.rename(out)
            except OSError as error:
                raise UsageError(f"{out} appeared meanwhile ({error.strerror}): choose another --out") from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a folder's lock, which ends with this process at the latest; False where it is held or there are none."""
    with ExitStack() as closing:
        try:
            import fcntl

            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            closing.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except (ImportError, OSError):  # a system or a file system without locks
            locked = False
        yield locked


def _write_graphs(source: Source, spec: SystemSpec, folder: Path, report: Report) -> None:
    parts: list[tuple[nn.Module, dict[str, str]]] = [
        (source.generator, {name: WEIGHTS[name] for name in spec.generator_graphs()})
    ]
    if source.tokenizer:
        parts += [(source.tokenizer, {name: WEIGHTS[name]}) for name in spec.tokenizer_graphs()]
    known = spec.generator_graphs() | spec.tokenizer_graphs()
    for model, files in parts:
        with WeightPool(folder / next(iter(files.values()))) as pool:
            for name in files:
                report(f"trace {name}")
                graph = trace(graph_module(spec, name, model), known[name])
                pool.take(graph)
                ir.save(graph, folder / f"{name}.onnx")
        model.float()  # from here on the reference: fp32 arithmetic on the rounded weights
        for name in files:
            report(f"lint {name}")
            lint.check(folder / f"{name}.onnx", known[name])


def _manifest(source: Source, spec: SystemSpec, digest: str, folder: Path) -> Manifest:
    config = {"generator": source.generator.config.to_json()}
    if source.tokenizer:
        config["tokenizer"] = source.tokenizer.config.to_json()
    text = source.generator.config.text
    return Manifest(
        schema=SCHEMA,
        runtime="onnx",
        spec=spec,
        graphs={name: f"{name}.onnx" for name in WEIGHTS if (folder / f"{name}.onnx").exists()},
        files=tuple(File.of(path) for path in sorted(folder.iterdir())),
        model={"name": source.name, "config": config, "weights_sha256": digest, "trained": source.trained},
        sampling=Sampling(),
        words=text.words if text else (),
        versions=versions(),
        provenance={"note": source.note},
    )


def receipt(bundle: Bundle, checks: list[parity.Check]) -> dict[str, object]:
    """The proof: the files it is about, by hash, and every check with its tolerance and worst element."""
    worst = max(checks, key=lambda c: c.worst)
    return {
        "files": bundle.hashes(),
        "reference": "nbp_reference, fp32 arithmetic, weights rounded to the bundle's dtype",
        "runtime": "ONNX Runtime, CPU",
        "worst": asdict(worst),
        "checks": [asdict(check) for check in checks],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the tools that an export depends on."""
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            found[tool] = "not installed"
    return found


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")
