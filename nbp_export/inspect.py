"""Describes a bundle's contents, memory and receipt from its files. Neither torch nor onnx is imported."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbp_engines.bundle import RECEIPT, Bundle
from nbp_engines.errors import EngineError, ReceiptWarning
from nbp_engines.registry import DEFAULT, RUNTIMES, open_session
from nbp_engines.shell import command_line
from nbp_engines.spec import TensorSpec
from nbp_engines.status import sentences
from nbp_errors import NbpError
from nbp_export.trt import read_builds
from nbp_export.trt_library import LIBRARIES

if TYPE_CHECKING:
    from rich.console import RenderableType

PROCESS = Path("/proc/self/status")
MEMORY = {
    "states": "KV caches of a session",
    "inputs": "other inputs of its graphs",
    "outputs": "other outputs of its graphs",
    "buffers": "sum of the above",
    "weights_on_disk": "weights on disk (a runtime's own copies are not included)",
    "before": "measured: process before it opens the bundle",
    "peak": "measured: peak while it opens the bundle",
    "opened": "measured: process with an open session",
}
NUMERIC_COLUMNS = ("bytes", "weights", "activations", "warnings")
# The argument is a list of folders to import from.
_MEASURE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pathlib import Path; "
    "from nbp_export.inspect import print_opened; print_opened(Path(sys.argv[2]))"
)
GPU_BYTES = "Weights and activations are bytes on the GPU, as the builder reported them."
LOGS = "Each engine has a list of its layers (.layers.json) and the log of its build (.log) beside it."


def open_unproven(path: Path) -> Bundle:
    """Open a bundle without a warning if its receipt is missing or void. Raises BundleError if it is not intact."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReceiptWarning)
        return Bundle.open(path)


def describe(bundle: Bundle) -> dict[str, Any]:
    """Return all that `render` shows as a dictionary that JSON can hold; sizes are in bytes."""
    manifest, spec, receipt = bundle.manifest, bundle.manifest.spec, bundle.receipt()
    sizes = {file.path: file.size for file in manifest.files}
    graphs, buffers = manifest.graph_specs(), manifest.buffers()
    weights = {name: _weight_files(bundle, name) for name in graphs}
    invalid = "void" if (bundle.path / RECEIPT).exists() else "missing"
    return {
        "bundle": str(bundle.path),
        "model": manifest.model["name"],
        "trained": manifest.model["trained"],
        "block": spec.block_text,
        "batch": spec.batch,
        "dtype": spec.dtype,
        "runtime": manifest.runtime,
        "note": manifest.provenance["note"],
        "status": status_of(manifest.runtime, spec.dtype, [engine.library for engine in manifest.engines]),
        "graphs": [
            {
                "name": name,
                "file": manifest.graphs[name],
                "inputs": list(tensor_lines(graph.inputs)),
                "outputs": list(tensor_lines(graph.outputs)),
            }
            for name, graph in graphs.items()
        ],
        "engines": [
            asdict(engine) | asdict(build) for engine, build in zip(manifest.engines, read_builds(bundle), strict=True)
        ],
        "files": [
            {"path": path, "size": size, "graphs": [g for g in graphs if path in {manifest.graphs[g], *weights[g]}]}
            for path, size in sizes.items()
        ],
        "memory": buffers
        | {"buffers": sum(buffers.values()), "weights_on_disk": sum(sizes[w] for w in set().union(*weights.values()))},
        "receipt": {"state": "valid", "checks": len(receipt["checks"])}
        | {key: receipt[key] for key in ("executed", "worst", "versions")}
        if receipt
        else {"state": invalid},
    }


def status_of(runtime: str, dtype: str, libraries: Iterable[str]) -> list[str]:
    """Return sentences that say what was built and executed so far of a kind of bundle.

    Args:
        runtime: the name of the bundle's runtime.
        dtype: the dtype of the bundle.
        libraries: the Python modules that built its TensorRT engines.
    """
    keys = [*RUNTIMES[runtime].status] if runtime in RUNTIMES else []
    keys += [library.status for library in LIBRARIES.values() if library.module in libraries]
    return sentences([*keys, "bf16"] if dtype == "bf16" else keys)


def tensor_lines(tensors: Iterable[TensorSpec]) -> Iterator[str]:
    """Yield names, dtypes and shapes as text.

    Tensors that differ only in the number in their names share a line: `k_cache_0..4 fp16 [1, 4, 1264, 32]`.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for tensor in tensors:
        name, number, rest = re.split(r"(\d+|$)", tensor.name, maxsplit=1)
        groups.setdefault((name, rest, f"{tensor.dtype} {list(tensor.shape)}"), []).append(number)
    for (name, rest, kind), numbers in groups.items():
        yield f"{name}{'..'.join(dict.fromkeys([numbers[0], numbers[-1]]))}{rest} {kind}"


def _weight_files(bundle: Bundle, graph: str) -> set[str]:
    """Return the names of the files that a graph refers to for its weights."""
    content = bundle.graph_file(graph).read_bytes()
    # This is the protobuf encoding of the entry: field 1 (the key), its length and text, then field 2 (the value)
    # likewise. A length fits in one byte because names have at most 100 characters.
    return {
        file.path
        for file in bundle.manifest.files
        if b"\x0a\x08location\x12" + bytes([len(file.path)]) + file.path.encode() in content
    }


def render(summary: Mapping[str, Any]) -> "RenderableType":
    """Return tables for a terminal that show the result of `describe`."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(*columns: str) -> Table:
        result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            result.add_column(column, justify="right" if column in NUMERIC_COLUMNS else "left", overflow="fold")
        return result

    graphs, files, memory = (
        table("graph", "file", "inputs", "outputs"),
        table("file", "bytes", "graphs"),
        table("memory", "bytes"),
    )
    engines, layers = (
        table("engine", "graphs (tokens)", "GPU", "library", "attention", "weights", "activations", "checked in"),
        table("engine", "layers of the network", "warnings"),
    )
    for engine in summary["engines"]:
        profiles = zip_longest(engine["graphs"], engine["tokens"])
        compatibility = "" if engine["compatibility"] == "none" else f", {engine['compatibility']}"
        engines.add_row(
            engine["file"],
            "\n".join(graph if tokens is None else f"{graph} ({tokens})" for graph, tokens in profiles),
            engine["arch"] + compatibility,
            f"{engine['library']} {engine['version']}",
            engine["attention"],
            "not reported" if engine["weights"] is None else f"{engine['weights']:,}",
            "\n".join(f"{size:,}" for size in engine["activations"]) or "not reported",
            engine["seen_in"],
        )
        layers.add_row(engine["file"], layer_counts(engine["layers"]), str(engine["warnings"]))
    for graph in summary["graphs"]:
        graphs.add_row(graph["name"], graph["file"], "\n".join(graph["inputs"]), "\n".join(graph["outputs"]))
    for file in summary["files"]:
        files.add_row(file["path"], f"{file['size']:,}", ", ".join(file["graphs"]))
    for key, label in MEMORY.items():
        if key in summary["memory"]:
            memory.add_row(label, f"{summary['memory'][key]:,}")
    receipt = summary["receipt"]
    if receipt["state"] == "valid":
        worst, tools = receipt["worst"], receipt["versions"].items()
        proof = Text(
            f"receipt valid: {receipt['checks']} checks, {receipt['executed']}; largest error: {worst['graph']} at "
            f"{worst['at']}, {worst['worst']:.2g} of the largest value (allowed {worst['tolerance']:g}); "
            f"{', '.join(f'{tool} {version}' for tool, version in tools)}",
            "green",
        )
    else:
        command = command_line("nbp-export", "verify", Path(summary["bundle"]))
        proof = Text(f"receipt {receipt['state']}: run `{command}` to check the bundle", "red")
    kind = "trained" if summary["trained"] else "not trained, for timing only"
    return Group(
        f"{summary['model']}, {kind}: block {summary['block']}, batch {summary['batch']}, {summary['dtype']}, "
        f"{summary['runtime']}",
        summary["note"],
        *summary["status"],
        graphs,
        *((engines, GPU_BYTES, layers, LOGS) if summary["engines"] else ()),
        files,
        memory,
        proof,
    )


def layer_counts(layers: Mapping[str, int]) -> str:
    """Return the numbers of layers by type as text, the most frequent type first."""
    return ", ".join(f"{layers[name]} {name.lower()}" for name in sorted(layers, key=lambda n: -layers[n]))


def measure(path: Path) -> dict[str, int]:
    """Return the resident bytes of a new process that opens a bundle: `before` that, at its `peak`, and once `opened`.

    Raises EngineError if the process dies, or if the system has no such information.
    """
    if not PROCESS.exists():
        raise EngineError(f"memory cannot be measured, because this system has no {PROCESS}: leave out --measure")
    # With -P, the process imports nothing from the current folder. Ctrl-C does not reach a session of its own: this
    # process receives it and kills the other one.
    command = [sys.executable, "-P", "-c", _MEASURE, json.dumps([folder for folder in sys.path if folder])]
    done = subprocess.run([*command, str(path)], stdout=subprocess.PIPE, start_new_session=True, check=False)
    if done.returncode:
        raise EngineError(f"the process that opened {path} died: it may have run out of memory")
    answer: dict[str, int] | str = json.loads(done.stdout.splitlines()[-1])
    if isinstance(answer, str):
        raise EngineError(answer)
    return answer


def print_opened(path: Path) -> None:
    """Print as JSON the memory that this process needs to open a bundle, or the message of the error."""
    try:
        answer: dict[str, int] | str = _measure_here(path)
    except NbpError as error:
        answer = error.message
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


def _measure_here(path: Path) -> dict[str, int]:
    bundle = open_unproven(path)
    with suppress(ModuleNotFoundError):  # the session reports this with a better message
        import onnxruntime  # noqa: F401
    before = _resident_bytes("VmRSS")
    with open_session(bundle, runtime=DEFAULT.name):
        opened = _resident_bytes("VmRSS")
        # The kernel updates the peak with a delay, so it may be below the current value.
        return {"before": before, "peak": max(opened, _resident_bytes("VmHWM")), "opened": opened}


def _resident_bytes(field: str) -> int:
    return int(dict(line.split(":", 1) for line in PROCESS.read_text().splitlines())[field].split()[0]) * 1024
