"""Builds TensorRT engines from a bundle's ONNX graphs, for a GPU that need not be there, and looks at what it built.

The builder is TensorRT-RTX's: it takes an architecture by name. What cannot be looked at without a GPU is the engine
itself; so the network that it is built from is checked, and nothing here says that an engine has run.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nbp_engines.errors import NbpError, UsageError
from nbp_engines.spec import GraphSpec, SystemSpec
from nbp_export._extras import need
from nbp_export.proof import Report, write_json

ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")
BUILDS = "engines.json"
UNTRIED = "built, never executed by us: no GPU was there"


class BuildError(NbpError):
    """A graph that TensorRT would not run as it is meant."""


@dataclass(frozen=True)
class Engine:
    """What was built.

    Attributes:
        file, graph: names in the bundle.
        tokens: the number of tokens of each optimisation profile, in order; empty where everything is static.
        arch: the GPU architecture.
        library: that built it, and that has to run it.
        layers: of the network, by type.
        size: bytes.
        seconds: to build it.
        log: the builder's warnings and figures.
        executed: by whom.
    """

    file: str
    graph: str
    tokens: tuple[int, ...]
    arch: str
    library: str
    layers: dict[str, int]
    size: int
    seconds: float
    log: tuple[str, ...]
    executed: str = UNTRIED


def build_engines(folder: Path, spec: SystemSpec, graphs: dict[str, str], arch: str, report: Report) -> None:
    """Build an engine from each graph file in a folder, and write them and what is known of them there.

    Prefill and steps, one graph, become profiles of one engine. Raises UsageError for an architecture that the library
    does not know, BuildError if a graph would not run as it is meant.
    """
    signatures = spec.generator_graphs() | spec.tokenizer_graphs()
    engines = []
    for graph in dict.fromkeys(graphs.values()):
        uses = [signatures[name] for name, file in graphs.items() if file == graph]
        report(f"build {graph} for {arch}")
        built, content = build(folder / graph, uses, arch)
        (folder / built.file).write_bytes(content)
        engines.append(asdict(built))
    write_json(folder / BUILDS, engines)


def build(graph: Path, uses: Sequence[GraphSpec], arch: str) -> tuple[Engine, bytes]:
    """An engine for one graph file, with a profile for each use, pinned to its number of tokens.

    Raises UsageError for an unknown architecture, BuildError if the network is not what the graph says or cannot be
    built.
    """
    trt = library()
    if arch not in ARCHITECTURES:
        raise UsageError(f"TensorRT-RTX builds for {', '.join(ARCHITECTURES)} here, not for {arch}")
    logger = _logger()
    builder = trt.Builder(logger)
    network, parser = _parsed(builder, logger, graph)  # the network's weights are the parser's: keep both
    if complaints := [*faults(network, logger.lines, uses[0])]:
        raise BuildError(f"TensorRT would not run {graph} as it is meant:\n  " + "\n  ".join(complaints))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, arch.upper()), 0)
    tokens = tuple(use.inputs[0].shape[1] for use in uses) if uses[0].aliases else ()
    for use in uses if tokens else ():
        profile = builder.create_optimization_profile()
        shape = use.inputs[0].shape
        profile.set_shape("tokens", shape, shape, shape)
        config.add_optimization_profile(profile)
    began = time.perf_counter()
    content = builder.build_serialized_network(network, config)
    del parser
    if content is None:
        raise BuildError(f"TensorRT-RTX cannot build {graph} for {arch}: {'; '.join(logger.lines['ERROR'][-3:])}")
    figures = [line for line in logger.lines["INFO"] if "Memory" in line]
    engine = Engine(
        file=graph.with_suffix(".engine").name,
        graph=graph.name,
        tokens=tokens,
        arch=arch,
        library=f"TensorRT-RTX {trt.__version__}",
        layers=dict(Counter(_type(network.get_layer(i)) for i in range(network.num_layers))),
        size=content.nbytes,
        seconds=round(time.perf_counter() - began, 1),
        log=(*logger.lines["WARNING"], *figures),
    )
    return engine, bytes(content)


def faults(network: Any, log: dict[str, list[str]], use: GraphSpec) -> Iterator[str]:
    """What a parsed network would do otherwise than the graph: inputs ignored, caches copied, attention unfused."""
    yield from (line for line in log["WARNING"] if "nused" in line)  # the parser drops inputs that it has no use for
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    writes = {layer.get_output(0).name: layer for layer in layers if _type(layer) == "KV_CACHE_UPDATE"}
    for output, cache_name in use.aliases.items():
        source = writes[output].get_input(0) if output in writes else None
        if output not in outputs or source is None or not source.is_network_input or source.name != cache_name:
            yield f"{output} is no update of {cache_name} in place: it would be copied, or lost"
    if len(writes) != len(use.aliases):
        yield f"{len(writes)} cache updates for {len(use.aliases)} caches"
    attentions = [layer for layer in layers if _type(layer) == "ATTENTION_INPUT"]
    if len(attentions) != len(use.aliases) // 2:
        yield f"{len(attentions)} fused attentions for {len(use.aliases) // 2} layers"
    # Queries, keys, values, mask; lengths given in its place are dropped without a word.
    yield from (f"{layer.name} has no mask: it would see unused slots" for layer in attentions if layer.num_inputs < 4)


@cache
def library() -> Any:
    """TensorRT-RTX's module. Raises NbpError with the pip command if it is not installed."""
    need("trt-rtx", "tensorrt_rtx")
    import tensorrt_rtx

    return tensorrt_rtx


def _parsed(builder: Any, logger: Any, graph: Path) -> tuple[Any, Any]:
    trt = library()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = (parser.get_error(i) for i in range(parser.num_errors))
        reasons = "\n  ".join(f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors)
        raise BuildError(f"TensorRT-RTX's parser refuses {graph}:\n  {reasons}")
    return network, parser


def _type(layer: Any) -> str:
    return str(layer.type).rpartition(".")[2]


def _logger() -> Any:
    trt = library()

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps what the library says, by severity."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: dict[str, list[str]] = {name: [] for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")}

        def log(self, severity: Any, message: str) -> None:
            """Keep a line."""
            name = str(severity).rpartition(".")[2]
            if name in self.lines:
                self.lines[name].append(message)

    return Logger()
