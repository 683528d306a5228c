"""Refuses graphs that a runtime would run wrongly or slowly without a word: the traps of exported block steps.

Each rule is a function from the graph and its spec to complaints; `check` runs them all.
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
    """A graph with a known trap in it."""


Rule = Callable[[ModelProto, GraphSpec], Iterator[str]]


def _attributes(node: NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _named(model: ModelProto, *ops: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type in ops]


def signature(model: ModelProto, spec: GraphSpec) -> Iterator[str]:
    """Inputs and outputs are the spec's, and no input is ignored: torch.export merges examples that are one object."""
    for kind, values, expected in (
        ("inputs", model.graph.input, spec.inputs),
        ("outputs", model.graph.output, spec.outputs),
    ):
        due = {t.name: t for t in expected}
        found = []
        for value in values:
            dims: tuple[int | str, ...] = tuple(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)
            if value.name in due:
                dims = due[value.name].pinned(dims)
            found.append((value.name, value.type.tensor_type.elem_type, dims))
        wanted = [(t.name, ONNX_DTYPES[t.dtype], t.shape) for t in expected]
        if found != wanted:
            odd = [f"{f} where {w} is due" for f, w in zip(found, wanted, strict=False) if f != w]
            yield f"{kind} differ from the spec: {'; '.join(odd[:3]) or f'{len(found)} of {len(wanted)}'}"
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    for value in model.graph.input:
        if value.name not in used:
            yield f"input {value.name} is never used"


def opset(model: ModelProto, _: GraphSpec) -> Iterator[str]:
    """Standard operators of one opset only: what every runtime knows."""
    imports = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    if set(imports) != {"ai.onnx"} or imports["ai.onnx"] != 24 or model.functions:
        yield f"opsets {imports} and {len(model.functions)} functions, where only ai.onnx 24 is due"


def cache_writes(model: ModelProto, spec: GraphSpec) -> Iterator[str]:
    """Each cache is written by one TensorScatter from graph input to graph output; nothing else moves the cache."""
    for node in _named(model, *SCATTERS):
        yield f"{node.op_type} {node.name}: copies the whole cache; write it with TensorScatter"
    for node in _named(model, *LOOPS):
        yield f"{node.op_type} {node.name}: copies the caches every iteration; loop on the host"
    writes = {node.output[0]: node for node in _named(model, "TensorScatter")}
    for output, cache in spec.aliases.items():
        if output not in writes or writes[output].input[0] != cache:
            yield f"{output} is not TensorScatter of the graph input {cache}: it cannot be updated in place"
            continue
        node = writes[output]
        attributes = _attributes(node)
        if attributes.get("axis", -2) not in (2, -2) or attributes.get("mode", b"linear") != b"linear":
            yield f"{node.name} ({output}): {attributes}; axis 2 and mode linear are due"
        readers = [n for n in model.graph.node if cache in n.input]
        if len(readers) != 1:
            yield f"{cache} is read by {len(readers)} nodes; a second reader sees the rows change under it"


def attention(model: ModelProto, spec: GraphSpec) -> Iterator[str]:
    """Attention takes an explicit mask and nothing that a runtime drops or refuses."""
    layers = len(spec.aliases) // 2
    nodes = _named(model, "Attention")
    if len(nodes) != layers:
        yield f"{len(nodes)} Attention nodes for {layers} layers"
    for node in nodes:
        attributes = _attributes(node)
        inputs = [i for i, name in enumerate(node.input) if name]
        if 6 in inputs:
            yield f"{node.name}: nonpad_kv_seqlen is dropped by TensorRT, which then sees stale slots; use the mask"
        if 4 in inputs or 5 in inputs or len(node.output) > 1:
            yield f"{node.name}: past and present inputs make the cache grow; the caches are TensorScatter's"
        if 3 not in inputs:
            yield f"{node.name}: no mask; unused slots would be attended to"
        if attributes.get("is_causal", 0):
            yield f"{node.name}: is_causal hides the rest of the block"
        if attributes.get("softcap", 0.0):
            yield f"{node.name}: softcap is no part of the model"
        if "TRT_decomposable" in attributes:
            yield f"{node.name}: TRT_decomposable makes ONNX Runtime refuse the graph"
        for index, kv in ((1, "k"), (2, "v")):
            written = spec.aliases.get(node.input[index], "")
            if not written.startswith(f"{kv}_cache_"):
                yield f"{node.name}: its {kv} is {node.input[index]}, not a written {kv} cache"


RULES: dict[GraphKind, tuple[Rule, ...]] = {
    GraphKind.BLOCK_STEP: (signature, opset, cache_writes, attention),
    GraphKind.ENCODE: (signature, opset),
    GraphKind.DECODE: (signature, opset),
}


def check(path: Path, spec: GraphSpec) -> None:
    """Check a graph file against its spec and every rule, then by ONNX's own checker, weights included.

    Raises LintError naming the file and all complaints.
    """
    model = onnx.load(path, load_external_data=False)
    complaints = [f"{rule.__name__}: {text}" for rule in RULES[spec.kind] for text in rule(model, spec)]
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, OSError) as error:
        complaints.append(f"onnx.checker: {error}")
    if complaints:
        raise LintError(f"{path} would not run as the reference does:\n  " + "\n  ".join(complaints))
