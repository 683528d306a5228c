"""Refuses graphs that a runtime would silently compute wrongly or slowly.

Each rule is a function that yields the problems of a graph, given its spec. `check` applies all rules for a kind of
graph.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from nbp_engines.spec import GraphKind, GraphSpec
from nbp_errors import NbpError

ONNX_DTYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}
SCATTERS = {"ScatterND", "ScatterElements", "Scatter"}
LOOPS = {"Loop", "Scan", "If"}


class LintError(NbpError):
    """A graph breaks a rule."""


Rule = Callable[[ModelProto, GraphSpec], Iterator[str]]


def _attributes(node: NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _named(model: ModelProto, *ops: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type in ops]


def signature(model: ModelProto, spec: GraphSpec) -> Iterator[str]:
    """Inputs and outputs must be those of the spec, and each input must be used.

    An unused input appears when torch.export merges two example inputs that are the same object.
    """
    for kind, values, expected in (
        ("inputs", model.graph.input, spec.inputs),
        ("outputs", model.graph.output, spec.outputs),
    ):
        tensors = {t.name: t for t in expected}
        actual_signature = []
        for value in values:
            dims: tuple[int | str, ...] = tuple(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)
            if value.name in tensors:
                dims = tensors[value.name].pinned(dims)
            actual_signature.append((value.name, value.type.tensor_type.elem_type, dims))
        expected_signature = [(t.name, ONNX_DTYPES[t.dtype], t.shape) for t in expected]
        if actual_signature != expected_signature:
            pairs = zip(actual_signature, expected_signature, strict=False)
            differences = [f"{actual} instead of {wanted}" for actual, wanted in pairs if actual != wanted]
            counts = f"there are {len(actual_signature)} instead of {len(expected_signature)}"
            yield f"{kind} differ from the spec: {'; '.join(differences[:3]) or counts}"
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    for value in model.graph.input:
        if value.name not in used:
            yield f"input {value.name} is never used"


def opset(model: ModelProto, _: GraphSpec) -> Iterator[str]:
    """Only standard operators of opset 24 are allowed."""
    imports = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    if set(imports) != {"ai.onnx"} or imports["ai.onnx"] != 24 or model.functions:
        yield f"the graph has opsets {imports} and {len(model.functions)} functions; only ai.onnx 24 is allowed"


def cache_writes(model: ModelProto, spec: GraphSpec) -> Iterator[str]:
    """One TensorScatter must update each cache from graph input to graph output; no other node may use the input."""
    for node in _named(model, *SCATTERS):
        yield f"{node.op_type} {node.name}: copies the whole cache; write it with TensorScatter"
    for node in _named(model, *LOOPS):
        yield f"{node.op_type} {node.name}: runs a subgraph, which copies the caches each time; move it to the host"
    writes = {node.output[0]: node for node in _named(model, "TensorScatter")}
    for output, cache in spec.aliases.items():
        if output not in writes or writes[output].input[0] != cache:
            yield f"{output} is not the TensorScatter of the graph input {cache}: the cache cannot be updated in place"
            continue
        node = writes[output]
        attributes = _attributes(node)
        if attributes.get("axis", -2) not in (2, -2) or attributes.get("mode", b"linear") != b"linear":
            yield f"{node.name} ({output}) has the attributes {attributes}: it must have axis 2 and mode linear"
        readers = [n for n in model.graph.node if cache in n.input]
        if len(readers) != 1:
            yield f"{cache} is read by {len(readers)} nodes: an update in place may change what the others read"


def attention(model: ModelProto, spec: GraphSpec) -> Iterator[str]:
    """Attention must have an explicit mask, and no input or attribute that a runtime ignores or refuses."""
    layers = len(spec.aliases) // 2
    nodes = _named(model, "Attention")
    if len(nodes) != layers:
        yield f"there are {len(nodes)} Attention nodes for {layers} layers"
    for node in nodes:
        attributes = _attributes(node)
        inputs = [i for i, name in enumerate(node.input) if name]
        if 6 in inputs:
            yield f"{node.name}: TensorRT ignores nonpad_kv_seqlen and attends to stale slots; use the mask"
        if 4 in inputs or 5 in inputs or len(node.output) > 1:
            yield f"{node.name}: past and present make the cache grow; update the caches with TensorScatter"
        if 3 not in inputs:
            yield f"{node.name}: there is no mask, so it attends to unused slots"
        if attributes.get("is_causal", 0):
            yield f"{node.name}: is_causal hides the later tokens of the block"
        if attributes.get("softcap", 0.0):
            yield f"{node.name}: softcap is not part of the model"
        if "TRT_decomposable" in attributes:
            yield f"{node.name}: TRT_decomposable makes ONNX Runtime refuse the graph"
        for index, kv in ((1, "k"), (2, "v")):
            written = spec.aliases.get(node.input[index], "")
            if not written.startswith(f"{kv}_cache_"):
                yield f"{node.name}: its {kv} is {node.input[index]}, not an updated {kv} cache"


RULES: dict[GraphKind, tuple[Rule, ...]] = {
    GraphKind.BLOCK_STEP: (signature, opset, cache_writes, attention),
    GraphKind.ENCODE: (signature, opset),
    GraphKind.DECODE: (signature, opset),
}


def check(path: Path, spec: GraphSpec) -> None:
    """Check a graph file with the rules of its kind, then with onnx.checker, weights included.

    Raises LintError with the file and all problems.
    """
    model = onnx.load(path, load_external_data=False)
    problems = [f"{rule.__name__}: {text}" for rule in RULES[spec.kind] for text in rule(model, spec)]
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, OSError) as error:
        problems.append(f"onnx.checker: {error}")
    if problems:
        raise LintError(f"{path} would not compute what the reference does:\n  " + "\n  ".join(problems))
