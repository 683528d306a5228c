"""Builds TensorRT engines from a bundle's ONNX graphs, and looks at what TensorRT made of them.

Where there is no GPU, the engine itself cannot be inspected, so the network that it is built from is inspected instead.
Nothing here executes an engine.
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
from nbp_engines.strict import FROM_0, Kind, Rule, loads, matching, whole, write_bytes, write_json, write_text
from nbp_engines.strict import check as conform
from nbp_engines.trt import Log, log_of
from nbp_errors import NbpError
from nbp_export.trt_library import Library, Options, configure, keep_timings

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


class Built(NamedTuple):
    """An engine's content, what is known of it, its layers, and all that the library said."""

    content: Any
    known: "Build"
    layers: list[dict[str, Any]]
    log: str


class BuildError(NbpError):
    """A graph that TensorRT would not run as it is meant, or cannot build."""


@dataclass(frozen=True)
class Build:
    """What is known of an engine beside what the manifest says of it.

    Attributes:
        file: the engine's; all that the library said is beside it in `.log`, each layer in `.layers.json`.
        tokens: the number of tokens of each optimisation profile; empty where everything is static.
        layers: of the network, by type.
        attention: `decomposed`, `none`, or `fused`: TensorRT may not take it apart, so it is one kernel or no engine.
        weights: bytes that they take on the GPU; None where the library did not tell.
        activations: bytes that each profile takes besides; empty where the library did not tell.
        warnings: how many.
        seconds: that it took.
        seen_in: where caches were seen to be updated in place: the network, or the engine itself.
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
    """Build an engine from each graph file of a folder; leave there what was built and what is known of it.

    `graphs` maps names to files; those that share a file become profiles of one engine. Raises UsageError for options
    that the library cannot honour, BuildError if a graph would not run as it is meant.
    """
    library, options, _ = options.settle()
    engines, builds = [], []
    for file in dict.fromkeys(graphs.values()):
        names = tuple(name for name, graph in graphs.items() if graph == file)
        report(f"build {file} for {options.arch}")
        built = build(folder / file, [signatures[name] for name in names], library, options)
        target = folder / built.known.file
        write_bytes(target, built.content)
        write_json(target.with_suffix(".layers.json"), built.layers)
        write_text(target.with_suffix(".log"), built.log.replace(f"{folder}{os.sep}", ""))
        version = library.load().__version__
        engines.append(Engine(target.name, names, str(options.arch), options.compatibility, library.module, version))
        builds.append(asdict(built.known))
    write_json(folder / BUILDS, builds)
    return tuple(engines)


def build(graph: Path, uses: Sequence[GraphSpec], library: Library, options: Options) -> Built:
    """One engine from one graph file, with a profile for each use, pinned to its number of tokens; settled options.

    Raises BuildError if the network is not what the graph says, or cannot be built.
    """
    builder, network, parser, log = _parsed(graph, library)  # the network's weights are the parser's: keep all
    _raise_faults(graph, network, log, uses[0])
    decomposed = uses[0].inputs[-1].dtype == "fp32" if options.decomposed is None else options.decomposed
    attentions = [layer for layer in _layers(network) if _type(layer) == "ATTENTION_INPUT"]
    for layer in attentions:
        layer.__class__ = library.load().IAttentionInputLayer  # the bindings give every layer as their base class
        layer.attention.decomposable = decomposed
    config = builder.create_builder_config()
    configure(config, library, options)
    tokens = tuple(use.inputs[0].shape[1] for use in uses) if uses[0].kind is GraphKind.BLOCK_STEP else ()
    for use in uses if tokens else ():
        profile = builder.create_optimization_profile()
        shape = use.inputs[0].shape
        profile.set_shape("tokens", shape, shape, shape)
        config.add_optimization_profile(profile)
    began = perf_counter()
    content = builder.build_serialized_network(network, config)
    seconds = perf_counter() - began
    if content is None:
        raise BuildError(_why_not(graph, library, options, log.messages("ERROR")))
    keep_timings(config, library, options)
    layers = [_described(layer) for layer in _layers(network)]
    del parser, network, config
    said = "".join(f"{severity}: {text}\n" for severity, text in log.lines)
    inside = _looked_inside(content, library, uses[0])
    known = Build(
        file=graph.with_suffix(".engine").name,
        tokens=tokens,
        layers=dict(Counter(layer["type"] for layer in layers)),
        attention=("decomposed" if decomposed else "fused") if attentions else "none",
        weights=next(_memory(log, "Weights"), None),
        activations=tuple(_memory(log, "Activation")),
        warnings=len(log.messages("WARNING")),
        seconds=round(seconds, 1),
        seen_in="the network" if inside is None else "the engine",
    )
    return Built(content, known, inside or layers, said)


def builds(bundle: Bundle) -> list[Build]:
    """What a bundle tells of its engines, in the manifest's order; raises BundleError if that is not what is due."""
    if not bundle.manifest.engines:
        return []
    path = bundle.path / BUILDS
    try:
        data = loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): export the bundle again") from error
    conform(data, BUILD_RULES, str(path))
    lists = ("tokens", "activations")
    known = {build["file"]: Build(**build | {name: tuple(build[name]) for name in lists}) for build in data}
    if len(known) != len(data) or known.keys() != {engine.file for engine in bundle.manifest.engines}:
        raise BundleError(f"{path} tells of {sorted(known)}, which are not the manifest's engines")
    return [known[engine.file] for engine in bundle.manifest.engines]


def check(graph: Path, use: GraphSpec, library: Library) -> Counter[str]:
    """Parse a graph without building it; the network's layers by type.

    Raises BuildError, naming every node that does not map, or every fault of a network where all do.
    """
    builder, network, parser, log = _parsed(graph, library)
    _raise_faults(graph, network, log, use)
    layers = Counter(_type(layer) for layer in _layers(network))
    del parser, builder
    return layers


def faults(network: Any, warnings: Sequence[str], use: GraphSpec) -> Iterator[str]:
    """What a parsed network would do otherwise than its graph: ignore inputs, copy caches, attend without a mask."""
    yield from (line for line in warnings if "nused" in line)  # the parser drops inputs that it has no use for
    if use.kind is not GraphKind.BLOCK_STEP:
        return
    layers = [*_layers(network)]
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    writes = {layer.get_output(0).name: layer for layer in layers if _type(layer) == "KV_CACHE_UPDATE"}
    for output, cache in use.aliases.items():
        source = writes[output].get_input(0) if output in writes else None
        if output not in outputs or source is None or not source.is_network_input or source.name != cache:
            yield f"{output} is no update of {cache} in place: it would be copied, or lost"
    if len(writes) != len(use.aliases):
        yield f"{len(writes)} cache updates for {len(use.aliases)} caches"
    attentions = [layer for layer in layers if _type(layer) == "ATTENTION_INPUT"]
    if len(attentions) != len(use.aliases) // 2:
        yield f"{len(attentions)} attentions for {len(use.aliases) // 2} layers"
    # Queries, keys, values, mask; lengths given in its place are dropped without a word.
    yield from (f"{layer.name} has no mask: it would see unused slots" for layer in attentions if layer.num_inputs < 4)


def _raise_faults(graph: Path, network: Any, log: Log, use: GraphSpec) -> None:
    if complaints := [*faults(network, log.messages("WARNING"), use)]:
        raise BuildError(f"TensorRT would not run {graph} as it is meant:\n  " + "\n  ".join(complaints))


def _parsed(graph: Path, library: Library) -> tuple[Any, Any, Any, Log]:
    trt, log = library.load(), log_of(library.load())
    log.lines.clear()
    builder = trt.Builder(log)
    network = builder.create_network()
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(graph))
    if not log.lines:
        raise BuildError(f"{library.title} reports to another logger of this process: its warnings cannot be heard")
    if not parsed:
        errors = (parser.get_error(i) for i in range(parser.num_errors))
        reasons = "\n  ".join(f"{e.node_name()} ({e.node_operator()}): {e.code().name}, {e.desc()}" for e in errors)
        raise BuildError(f"{library.title} has nothing for these nodes of {graph}:\n  {reasons}")
    return builder, network, parser, log


def _looked_inside(engine: Any, library: Library, use: GraphSpec) -> list[dict[str, Any]] | None:
    """The built engine's own layers, its caches having been seen to alias; None where no GPU is there to load it."""
    trt = library.load()
    loaded = trt.Runtime(log_of(library.load())).deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    for output, cache in use.aliases.items():
        if (found := loaded.get_aliased_input_tensor(output)) != cache:
            raise BuildError(f"the built engine's {output} lies in {found or 'memory of its own'}, not in {cache}")
    told = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        layers = json.loads(told)["Layers"]
    except (ValueError, KeyError, TypeError):  # it is its own text, and of no other use than to be read
        layers = told.splitlines()
    return [layer if isinstance(layer, dict) else {"name": layer} for layer in layers]


def _why_not(graph: Path, library: Library, options: Options, errors: Sequence[str]) -> str:
    reason = errors[-1] if errors else "nothing"
    if "dedicated kernel" in reason:
        advice = "it has no fused attention of this size: --attention decomposed lets it be several kernels"
    elif "workspace" in reason:
        advice = "give it more --workspace"
    else:
        advice = "please report this with the command and versions"
    return f"{library.title} cannot build {graph} for {options.arch}; {advice}. It said: {reason}"


def _memory(log: Log, what: str) -> Iterator[int]:
    """Bytes of a kind, a figure for each profile, as the builder tells them."""
    found = (re.fullmatch(rf"Total {what} Memory: (\d+) bytes", text) for text in log.messages("INFO"))
    return (int(match[1]) for match in found if match)


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


def _type(layer: Any) -> str:
    return str(layer.type.name)


def _described(layer: Any) -> dict[str, Any]:
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    tensors = [f"{t.name} {t.dtype.name.lower()} {list(t.shape)}" for t in outputs]
    return {"name": layer.name, "type": _type(layer), "outputs": tensors}
