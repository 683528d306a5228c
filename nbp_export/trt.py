"""Builds TensorRT engines from a bundle's ONNX graphs, and inspects them.

A machine without a GPU cannot load an engine, so there the network that TensorRT parses from the graph is inspected
instead. Nothing in this module executes an engine. Here, "engine" always means a TensorRT engine.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from nbp_engines.bundle import Bundle
from nbp_engines.errors import BundleError
from nbp_engines.manifest import NAME, Engine
from nbp_engines.spec import GraphKind, GraphSpec
from nbp_engines.strict import FROM_0, Kind, Rule, loads, matching, whole
from nbp_engines.strict import check as conform
from nbp_engines.trt import Log, log_of
from nbp_errors import NbpError
from nbp_export.trt_library import Library, Options, configure, save_timings
from nbp_files import write_bytes, write_json, write_text

BUILDS = "engines.json"
COUNT = whole(0, 2**63 - 1)
BUILD_RULES: Rule = [
    {
        "file": NAME,
        "tokens": [COUNT],
        "layers": {...: COUNT},
        "attention": matching("fused, decomposed or none", "fused|decomposed|none"),
        "weights": Kind("bytes, or null", lambda v: v is None or COUNT.test(v)),
        "activations": [COUNT],
        "warnings": COUNT,
        "seconds": FROM_0,
        "seen_in": matching("the network or the engine", "the (network|engine)"),
    }
]


class BuiltEngine(NamedTuple):
    """A serialised TensorRT engine, a summary of its build, a list of its layers, and the log of the builder."""

    content: Any
    info: "BuildInfo"
    layers: list[dict[str, Any]]
    log: str


class BuildError(NbpError):
    """TensorRT cannot build a graph, or would not compute what the graph specifies."""


@dataclass(frozen=True)
class BuildInfo:
    """Facts about the build of an engine that the manifest does not hold.

    Attributes:
        file: the name of the engine file. Beside it, `.log` holds the library's messages and `.layers.json` the layers.
        tokens: the number of tokens of each optimisation profile; empty if all shapes are static.
        layers: the number of layers of the network by type.
        attention: `fused`: TensorRT had to build each attention as one kernel. `decomposed`: it could use several.
            `none`: there is no attention.
        weights: bytes of the weights on the GPU; None if the library did not report them.
        activations: additional bytes of each profile on the GPU; empty if the library did not report them.
        warnings: the number of warnings.
        seconds: the duration of the build.
        seen_in: what was inspected to check that caches are updated in place: `the network` or `the engine`.
    """

    file: str
    tokens: tuple[int, ...]
    layers: dict[str, int]
    attention: str
    weights: int | None
    activations: tuple[int, ...]
    warnings: int
    seconds: float
    seen_in: str


def build_engines(
    folder: Path,
    signatures: Mapping[str, GraphSpec],
    graphs: Mapping[str, str],
    options: Options,
    report: Callable[[str], None],
) -> tuple[Engine, ...]:
    """Build an engine from each graph file of a folder, and write engines, logs, layers and BUILDS to this folder.

    Args:
        folder: the folder of the graph files.
        signatures: the specs of the graphs by name.
        graphs: the files of the graphs by name; graphs that share a file become profiles of one engine.
        options: the options of the build.
        report: a function that receives the name of each stage as it begins.

    Raises UsageError for options that the library does not support, BuildError if an engine cannot be built or would
    not compute what its graph specifies.
    """
    library, options, _ = options.resolve()
    engines, infos = [], []
    for file in dict.fromkeys(graphs.values()):
        names = tuple(name for name, graph in graphs.items() if graph == file)
        report(f"build {file} for {options.arch}")
        built = build(folder / file, [signatures[name] for name in names], library, options)
        target = folder / built.info.file
        write_bytes(target, built.content)
        write_json(target.with_suffix(".layers.json"), built.layers)
        write_text(target.with_suffix(".log"), built.log.replace(f"{folder}{os.sep}", ""))
        version = library.load().__version__
        engines.append(Engine(target.name, names, str(options.arch), options.compatibility, library.module, version))
        infos.append(asdict(built.info))
    write_json(folder / BUILDS, infos)
    return tuple(engines)


def build(graph: Path, uses: Sequence[GraphSpec], library: Library, options: Options) -> BuiltEngine:
    """Build one engine from one graph file.

    Args:
        graph: the ONNX file.
        uses: the specs of the graphs in the file; each block step becomes a profile with a fixed number of tokens.
        library: the library that builds.
        options: resolved options.

    Raises BuildError if TensorRT cannot build the engine, or if its network differs from the graph.
    """
    builder, network, parser, log = _parse(graph, library)  # the parser owns the weights, so all of them are kept
    _raise_faults(graph, network, log, uses[0])
    decomposed = uses[0].inputs[-1].dtype == "fp32" if options.decomposed is None else options.decomposed
    attentions = [layer for layer in _layers(network) if _type(layer) == "ATTENTION_INPUT"]
    for layer in attentions:
        layer.__class__ = library.load().IAttentionInputLayer  # the bindings return every layer as the base class
        layer.attention.decomposable = decomposed
    config = builder.create_builder_config()
    configure(config, library, options)
    tokens = tuple(use.inputs[0].shape[1] for use in uses) if uses[0].kind is GraphKind.BLOCK_STEP else ()
    for use in uses if tokens else ():
        profile = builder.create_optimization_profile()
        shape = use.inputs[0].shape
        profile.set_shape("tokens", shape, shape, shape)
        config.add_optimization_profile(profile)
    start = perf_counter()
    content = builder.build_serialized_network(network, config)
    seconds = perf_counter() - start
    if content is None:
        raise BuildError(_failure(graph, library, options, log.messages("ERROR")))
    save_timings(config, library, options)
    layers = [_layer_entry(layer) for layer in _layers(network)]
    del parser, network, config
    messages = "".join(f"{severity}: {text}\n" for severity, text in log.lines)
    engine_layers = _inspect_engine(content, library, uses[0])
    info = BuildInfo(
        file=graph.with_suffix(".engine").name,
        tokens=tokens,
        layers=dict(Counter(layer["type"] for layer in layers)),
        attention=("decomposed" if decomposed else "fused") if attentions else "none",
        weights=next(_memory_bytes(log, "Weights"), None),
        activations=tuple(_memory_bytes(log, "Activation")),
        warnings=len(log.messages("WARNING")),
        seconds=round(seconds, 1),
        seen_in="the network" if engine_layers is None else "the engine",
    )
    return BuiltEngine(content, info, engine_layers or layers, messages)


def read_builds(bundle: Bundle) -> list[BuildInfo]:
    """Read a bundle's BUILDS file; return one entry per engine, in the manifest's order.

    Raises BundleError if the file cannot be read, is malformed, or describes other engines than the manifest.
    """
    if not bundle.manifest.engines:
        return []
    path = bundle.path / BUILDS
    try:
        data = loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): export the bundle again") from error
    conform(data, BUILD_RULES, str(path))
    lists = ("tokens", "activations")
    infos = {entry["file"]: BuildInfo(**entry | {name: tuple(entry[name]) for name in lists}) for entry in data}
    if len(infos) != len(data) or infos.keys() != {engine.file for engine in bundle.manifest.engines}:
        raise BundleError(
            f"{path} lists {sorted(infos)}, which are not the manifest's engines: export the bundle again"
        )
    return [infos[engine.file] for engine in bundle.manifest.engines]


def check(graph: Path, use: GraphSpec, library: Library) -> Counter[str]:
    """Parse a graph without building a TensorRT engine; return how many layers of each type the network has.

    Raises BuildError with a list of all unsupported nodes or, if there are none, of all faults of the network.
    """
    builder, network, parser, log = _parse(graph, library)
    _raise_faults(graph, network, log, use)
    layers = Counter(_type(layer) for layer in _layers(network))
    del parser, builder
    return layers


def faults(network: Any, warnings: Sequence[str], use: GraphSpec) -> Iterator[str]:
    """Yield the faults of a parsed network: ignored inputs, copied caches, and attention without a mask."""
    yield from (line for line in warnings if "nused" in line)  # "Unused input": the parser drops it
    if use.kind is not GraphKind.BLOCK_STEP:
        return
    layers = [*_layers(network)]
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    writes = {layer.get_output(0).name: layer for layer in layers if _type(layer) == "KV_CACHE_UPDATE"}
    for output, cache in use.aliases.items():
        source = writes[output].get_input(0) if output in writes else None
        if output not in outputs or source is None or not source.is_network_input or source.name != cache:
            yield f"{output} does not update {cache} in place: the cache would be copied, or the update lost"
    if len(writes) != len(use.aliases):
        yield f"there are {len(writes)} cache updates for {len(use.aliases)} caches"
    attentions = [layer for layer in layers if _type(layer) == "ATTENTION_INPUT"]
    if len(attentions) != len(use.aliases) // 2:
        yield f"there are {len(attentions)} attentions for {len(use.aliases) // 2} layers"
    # The inputs are queries, keys, values and mask. TensorRT silently drops valid lengths that are given instead.
    yield from (
        f"{layer.name} has no mask: it would attend to unused slots" for layer in attentions if layer.num_inputs < 4
    )


def _raise_faults(graph: Path, network: Any, log: Log, use: GraphSpec) -> None:
    if complaints := [*faults(network, log.messages("WARNING"), use)]:
        raise BuildError(f"TensorRT would not compute what {graph} specifies:\n  " + "\n  ".join(complaints))


def _parse(graph: Path, library: Library) -> tuple[Any, Any, Any, Log]:
    """Return builder, network, parser and log. Raises BuildError with a list of all unsupported nodes."""
    trt, log = library.load(), log_of(library.load())
    log.lines.clear()
    builder = trt.Builder(log)
    network = builder.create_network()
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(graph))
    if not log.lines:
        raise BuildError(
            f"{library.title} sends its messages to a logger that other code of this process has set, so its warnings "
            "cannot be checked: export in a new process"
        )
    if not parsed:
        errors = (parser.get_error(i) for i in range(parser.num_errors))
        reasons = "\n  ".join(f"{e.node_name()} ({e.node_operator()}): {e.code().name}, {e.desc()}" for e in errors)
        raise BuildError(f"{library.title} does not support these nodes of {graph}:\n  {reasons}")
    return builder, network, parser, log


def _inspect_engine(engine: Any, library: Library, use: GraphSpec) -> list[dict[str, Any]] | None:
    """Check that an engine's caches are aliased, and return its layers; None if no GPU is available to load it.

    Raises BuildError if an updated cache does not share the memory of its input.
    """
    trt = library.load()
    loaded = trt.Runtime(log_of(library.load())).deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    for output, cache in use.aliases.items():
        if (aliased := loaded.get_aliased_input_tensor(output)) != cache:
            raise BuildError(f"the engine writes {output} to {aliased or 'separate memory'}, not to {cache} in place")
    description = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        layers = json.loads(description)["Layers"]
    except (ValueError, KeyError, TypeError):  # the library gives plain text instead of JSON
        layers = description.splitlines()
    return [layer if isinstance(layer, dict) else {"name": layer} for layer in layers]


def _failure(graph: Path, library: Library, options: Options, errors: Sequence[str]) -> str:
    """Return the message of a failed build: the library's last error, and what to do about it."""
    reason = errors[-1] if errors else "none was reported"
    if "dedicated kernel" in reason:
        advice = "it has no fused attention of this size: --attention decomposed permits several kernels"
    elif "workspace" in reason:
        advice = "increase --workspace"
    else:
        advice = "please report this with the command and versions"
    return f"{library.title} cannot build {graph} for {options.arch}; {advice}. Its last error: {reason}"


def _memory_bytes(log: Log, kind: str) -> Iterator[int]:
    """Yield the bytes of one kind of memory that the builder logged, one number per profile."""
    matches = (re.fullmatch(rf"Total {kind} Memory: (\d+) bytes", text) for text in log.messages("INFO"))
    return (int(match[1]) for match in matches if match)


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


def _type(layer: Any) -> str:
    return str(layer.type.name)


def _layer_entry(layer: Any) -> dict[str, Any]:
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    tensors = [f"{t.name} {t.dtype.name.lower()} {list(t.shape)}" for t in outputs]
    return {"name": layer.name, "type": _type(layer), "outputs": tensors}
