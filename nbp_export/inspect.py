"""What a bundle holds, needs and proves, told from its manifest and receipt: no torch, no onnx."""

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
from nbp_export.trt import builds
from nbp_export.trt_library import LIBRARIES

if TYPE_CHECKING:
    from rich.console import RenderableType

PROCESS = Path("/proc/self/status")
MEMORY = {
    "states": "a session's states, the KV caches",
    "inputs": "its graphs' other inputs",
    "outputs": "their other outputs",
    "buffers": "all of these",
    "weights_on_disk": "weights on disk; what the runtime makes of them is not counted",
    "before": "measured: a process with the libraries alone",
    "peak": "measured: its peak while it opened the bundle",
    "opened": "measured: with the session open",
}
NUMBERS = ("bytes", "weights", "activations", "warnings")
_MEASURE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pathlib import Path; "
    "from nbp_export.inspect import tell_opened; tell_opened(Path(sys.argv[2]))"
)
GPU_BYTES = "Bytes on the GPU are what the builder reported."
LOGS = "Each layer stands in .layers.json beside its engine, all that the builder said in .log."


def look(path: Path) -> Bundle:
    """Open a bundle, whatever its receipt is. Raises BundleError if it is not an intact one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReceiptWarning)
        return Bundle.open(path)


def describe(bundle: Bundle) -> dict[str, Any]:
    """All that `render` shows, as plain values; sizes in bytes."""
    manifest, spec, receipt = bundle.manifest, bundle.manifest.spec, bundle.receipt()
    sizes = {file.path: file.size for file in manifest.files}
    graphs, buffers = manifest.graph_specs(), manifest.buffers()
    weights = {name: _weights(bundle, name) for name in graphs}
    without = "void" if (bundle.path / RECEIPT).exists() else "missing"
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
                "inputs": list(condensed(graph.inputs)),
                "outputs": list(condensed(graph.outputs)),
            }
            for name, graph in graphs.items()
        ],
        "engines": [
            asdict(engine) | asdict(build) for engine, build in zip(manifest.engines, builds(bundle), strict=True)
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
        else {"state": without},
    }


def status_of(runtime: str, dtype: str, libraries: Iterable[str]) -> list[str]:
    """What was built and executed so far of a kind of bundle, in sentences.

    Args:
        runtime: the name of the runtime that the bundle is made for.
        dtype: the dtype of the bundle.
        libraries: the Python modules that built its engines.
    """
    keys = [*RUNTIMES[runtime].status] if runtime in RUNTIMES else []
    keys += [library.status for library in LIBRARIES.values() if library.module in libraries]
    return sentences([*keys, "bf16"] if dtype == "bf16" else keys)


def condensed(tensors: Iterable[TensorSpec]) -> Iterator[str]:
    """Names, dtypes and shapes; those that differ in a number alone together: `k_cache_0..4 fp16 [1, 4, 1264, 32]`."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for tensor in tensors:
        name, number, rest = re.split(r"(\d+|$)", tensor.name, maxsplit=1)
        alike.setdefault((name, rest, f"{tensor.dtype} {list(tensor.shape)}"), []).append(number)
    for (name, rest, what), numbers in alike.items():
        yield f"{name}{'..'.join(dict.fromkeys([numbers[0], numbers[-1]]))}{rest} {what}"


def _weights(bundle: Bundle, graph: str) -> set[str]:
    """The files that a graph names as the location of its weights."""
    content = bundle.graph_file(graph).read_bytes()
    # As a protobuf has the entry: key 1, length and text, value 2 likewise. Names have at most 100 characters.
    return {
        file.path
        for file in bundle.manifest.files
        if b"\x0a\x08location\x12" + bytes([len(file.path)]) + file.path.encode() in content
    }


def render(told: Mapping[str, Any]) -> "RenderableType":
    """What `describe` tells, for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(*columns: str) -> Table:
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            made.add_column(column, justify="right" if column in NUMBERS else "left", overflow="fold")
        return made

    graphs, files, memory = (
        table("graph", "file", "inputs", "outputs"),
        table("file", "bytes", "graphs"),
        table("memory", "bytes"),
    )
    engines, layers = (
        table("engine", "graphs (tokens)", "for", "library", "attention", "weights", "activations", "checked in"),
        table("engine", "layers of its network", "warnings"),
    )
    for engine in told["engines"]:
        uses = zip_longest(engine["graphs"], engine["tokens"])
        reach = "" if engine["compatibility"] == "none" else f", {engine['compatibility']}"
        engines.add_row(
            engine["file"],
            "\n".join(graph if tokens is None else f"{graph} ({tokens})" for graph, tokens in uses),
            engine["arch"] + reach,
            f"{engine['library']} {engine['version']}",
            engine["attention"],
            "not told" if engine["weights"] is None else f"{engine['weights']:,}",
            "\n".join(f"{size:,}" for size in engine["activations"]) or "not told",
            engine["seen_in"],
        )
        layers.add_row(engine["file"], counted(engine["layers"]), str(engine["warnings"]))
    for graph in told["graphs"]:
        graphs.add_row(graph["name"], graph["file"], "\n".join(graph["inputs"]), "\n".join(graph["outputs"]))
    for file in told["files"]:
        files.add_row(file["path"], f"{file['size']:,}", ", ".join(file["graphs"]))
    for key, what in MEMORY.items():
        if key in told["memory"]:
            memory.add_row(what, f"{told['memory'][key]:,}")
    receipt = told["receipt"]
    if receipt["state"] == "valid":
        worst, tools = receipt["worst"], receipt["versions"].items()
        proof = Text(
            f"receipt valid: {receipt['checks']} checks, {receipt['executed']}; worst: {worst['graph']} at "
            f"{worst['at']}, {worst['worst']:.2g} of the largest value (allowed {worst['tolerance']:g}); "
            f"{', '.join(f'{tool} {version}' for tool, version in tools)}",
            "green",
        )
    else:
        again = command_line("nbp-export", "verify", Path(told["bundle"]))
        proof = Text(f"receipt {receipt['state']}: `{again}` proves it again", "red")
    kind = "trained" if told["trained"] else "not trained: for timing only"
    return Group(
        f"{told['model']}, {kind}: block {told['block']}, batch {told['batch']}, {told['dtype']}, {told['runtime']}",
        told["note"],
        *told["status"],
        graphs,
        *((engines, GPU_BYTES, layers, LOGS) if told["engines"] else ()),
        files,
        memory,
        proof,
    )


def counted(layers: Mapping[str, int]) -> str:
    """Layers by type, the most frequent first."""
    return ", ".join(f"{layers[name]} {name.lower()}" for name in sorted(layers, key=lambda n: -layers[n]))


def measure(path: Path) -> dict[str, int]:
    """Resident bytes of a fresh process before it opens the bundle, at its peak, and once its session is open.

    Raises EngineError if the process dies, or where the system does not tell.
    """
    if not PROCESS.exists():
        raise EngineError(f"memory is measured by {PROCESS}, which this system does not have: leave out --measure")
    # -P keeps the current folder out of its imports. A session of its own keeps Ctrl-C to this process, which kills it.
    command = [sys.executable, "-P", "-c", _MEASURE, json.dumps([folder for folder in sys.path if folder])]
    done = subprocess.run([*command, str(path)], stdout=subprocess.PIPE, start_new_session=True, check=False)
    if done.returncode:
        raise EngineError(f"opening {path} killed the process that did it (out of memory?)")
    told: dict[str, int] | str = json.loads(done.stdout.splitlines()[-1])
    if isinstance(told, str):
        raise EngineError(told)
    return told


def tell_opened(path: Path) -> None:
    """Print as JSON what opening a bundle takes in this process, or else the message of the error."""
    try:
        told: dict[str, int] | str = _opened(path)
    except NbpError as error:
        told = error.message
    sys.stdout.write(f"\n{json.dumps(told)}\n")


def _opened(path: Path) -> dict[str, int]:
    bundle = look(path)
    with suppress(ModuleNotFoundError):  # which the session says better
        import onnxruntime  # noqa: F401
    before = _resident("VmRSS")
    with open_session(bundle, runtime=DEFAULT.name):
        opened = _resident("VmRSS")
        # The kernel writes the peak down late.
        return {"before": before, "peak": max(opened, _resident("VmHWM")), "opened": opened}


def _resident(field: str) -> int:
    return int(dict(line.split(":", 1) for line in PROCESS.read_text().splitlines())[field].split()[0]) * 1024
