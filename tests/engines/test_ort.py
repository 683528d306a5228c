"""A session checks the inputs and outputs of a graph before the runtime may write to memory of the manifest's sizes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from nbp_engines.errors import EngineError
from nbp_engines.registry import open_session
from nbp_engines.spec import GraphSpec, SystemSpec, TensorSpec
from tests.engines.test_bundle import SPEC, make

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
Change = Callable[[ModelProto], None]


def graph(spec: GraphSpec) -> ModelProto:
    """Return a graph with these inputs and outputs. Its logits are zeros, and it does not change the caches."""
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, TYPES[t.dtype], t.shape) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    )
    logits = spec.outputs[0]
    zero = helper.make_tensor("zero", TYPES[logits.dtype], [1], [0])
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["logits"], value=zero)]
    nodes += [helper.make_node("Identity", [given], [name]) for name, given in spec.aliases.items()]
    shape = helper.make_tensor("shape", TensorProto.INT64, [3], logits.shape)
    built = helper.make_graph(nodes, spec.name, inputs, outputs, [shape])
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def bundle(path: Path, spec: SystemSpec, change: Change = lambda _: None) -> Path:
    """Make a bundle whose manifest has `SPEC`, but whose graphs have another spec and a change."""
    models = {name: graph(of) for name, of in spec.generator_graphs().items()}
    for model in models.values():
        change(model)
    return make(path, **{name: model.SerializeToString() for name, model in models.items()})


def test_graphs_that_are_the_manifests_run(tmp_path: Path) -> None:
    with open_session(bundle(tmp_path / "toy", SPEC), threads=1) as session:
        assert not session.prefill(np.zeros((1, 16), np.int64)).any()
        assert session.step(np.zeros((1, 4), np.int64), np.array([16])).shape == (1, 4, 30)


def renamed(model: ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[0].output[0] = "scores"


def one_more_output(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("tokens_out", TensorProto.INT64, None))
    model.graph.node.append(helper.make_node("Identity", ["tokens"], ["tokens_out"]))


def any_batch(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "B"


def declared_smaller(model: ModelProto) -> None:
    """Declare fewer logits than the graph computes. ONNX Runtime infers the true shape."""
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = SPEC.vocab


def keep(_: ModelProto) -> None:
    """Change nothing."""


DIFFERENCES: dict[str, tuple[SystemSpec, Change, str]] = {
    "more logits": (replace(SPEC, vocab=31), keep, r"output logits is tensor\(float\) \[1, 4, 31\], .*\[1, 4, 30\]"),
    "fewer logits": (replace(SPEC, vocab=29), keep, r"output logits is .*\[1, 4, 29\], .*\[1, 4, 30\]"),
    "more logits, declared as fewer": (replace(SPEC, vocab=64), declared_smaller, r"output logits is .*\[1, 4, 64\]"),
    "a larger batch": (replace(SPEC, batch=2), keep, r"input tokens is .*\[2, 16\], .*\[1, 16\]"),
    "another block": (replace(SPEC, block=(1, 1, 2)), keep, r"input k_cache_0 is .*\[1, 2, 46, 8\], .*\[1, 2, 44, 8\]"),
    "wider heads": (replace(SPEC, head_dim=16), keep, r"input k_cache_0 is .*\[1, 2, 44, 16\]"),
    "a layer more": (replace(SPEC, layers=3), keep, "input k_cache_2 is .*, but the manifest has none"),
    "a layer fewer": (replace(SPEC, layers=1), keep, "input k_cache_1 is missing, but the manifest has tensor"),
    "half precision": (replace(SPEC, dtype="fp16"), keep, r"input k_cache_0 is tensor\(float16\) .*tensor\(float\)"),
    "another name": (SPEC, renamed, "output logits is missing"),
    "an output more": (SPEC, one_more_output, "output tokens_out is tensor.*, but the manifest has none"),
    "any batch": (SPEC, any_batch, r"input tokens is tensor\(int64\) \['B', 16\]"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_graph_that_is_not_the_manifests_is_refused_before_memory_is_bound(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, change, words = DIFFERENCES[name]
    path = bundle(tmp_path / "toy", spec, change)

    def bound(tensor: TensorSpec) -> np.ndarray:
        raise AssertionError(f"memory for {tensor.name}")

    monkeypatch.setattr(TensorSpec, "empty", bound)
    with pytest.raises(EngineError, match=rf"prefill\.onnx: {words}"):
        open_session(path, threads=1)


def test_a_graph_that_hides_its_output_shape_is_stopped_by_the_runtime(tmp_path: Path) -> None:
    def hidden(model: ModelProto) -> None:
        """Compute the shape from an input, so that nothing contradicts the declared shape before the graph runs."""
        node = model.graph.node[0]
        model.graph.node.insert(0, helper.make_node("Add", [node.input[0], "nothing"], ["computed"]))
        model.graph.node.insert(0, helper.make_node("Sub", ["cache_pos", "cache_pos"], ["nothing"]))
        node.input[0] = "computed"
        declared_smaller(model)

    session = open_session(bundle(tmp_path / "toy", replace(SPEC, vocab=64), hidden), threads=1)
    with pytest.raises(Exception, match=r"has shape \{1,4,30\} but the computed output shape .* \{1,4,64\}"):
        session.prefill(np.zeros((1, 16), np.int64))
