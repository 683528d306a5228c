"""The linter reports each fault that is planted in a real graph, and nothing in graphs as they are exported."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nbp_engines.bundle import Bundle
from nbp_export import lint
from nbp_export.lint import LintError
from tests.export.support import Exported

Exporter = Callable[..., Exported]
Change = Callable[[ModelProto], None]


def nodes(model: ModelProto, op: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def attribute(name: str, value: object, op: str = "Attention") -> Change:
    def change(model: ModelProto) -> None:
        node = nodes(model, op)[0]
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def attention_input(index: int, name: str) -> Change:
    def change(model: ModelProto) -> None:
        node = nodes(model, "Attention")[1]
        node.input.extend([""] * (index + 1 - len(node.input)))
        node.input[index] = name

    return change


def present_outputs(model: ModelProto) -> None:
    nodes(model, "Attention")[0].output.extend(["present_k", "present_v"])


def scatter_nd(model: ModelProto) -> None:
    node = nodes(model, "TensorScatter")[0]
    node.op_type = "ScatterND"
    del node.attribute[:]


def a_copy_before_the_write(model: ModelProto) -> None:
    node = nodes(model, "TensorScatter")[2]
    model.graph.node.insert(0, helper.make_node("Identity", [node.input[0]], ["copied"]))
    node.input[0] = "copied"


def a_copy_after_the_write(model: ModelProto) -> None:
    node = nodes(model, "TensorScatter")[0]
    output = node.output[0]
    node.output[0] = "written"
    model.graph.node.append(helper.make_node("Identity", ["written"], [output]))


def second_reader(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["v_cache_0"], ["peek"]))


def loop(model: ModelProto) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, [])],
    )
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))


def unused_input(model: ModelProto) -> None:
    constant = numpy_helper.from_array(np.zeros((2, 4), np.int64), "always_these")
    model.graph.initializer.append(constant)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "tokens":
                node.input[index] = constant.name


def merged_examples(model: ModelProto) -> None:
    """The result of torch.export if both caches share one example tensor."""
    for node in nodes(model, "TensorScatter"):
        if node.input[0] == "v_cache_1":
            node.input[0] = "k_cache_1"


def renamed_output(model: ModelProto) -> None:
    model.graph.output[0].name = "scores"
    model.graph.node.append(helper.make_node("Identity", ["logits"], ["scores"]))


def missing_output(model: ModelProto) -> None:
    del model.graph.output[-1]


def another_dtype(model: ModelProto) -> None:
    model.graph.input[2].type.tensor_type.elem_type = TensorProto.FLOAT16


def a_symbolic_batch(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def opset_23(model: ModelProto) -> None:
    model.opset_import[0].version = 23


def another_domain(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    nodes(model, "Gelu")[0].domain = "com.microsoft"


def local_function(model: ModelProto) -> None:
    model.functions.append(
        helper.make_function(
            "", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 24)]
        )
    )


def no_attention_in_one_layer(model: ModelProto) -> None:
    node = nodes(model, "Attention")[1]
    node.op_type = "Identity"
    del node.input[1:]


TRAPS: list[tuple[Change, str, str]] = [
    (attention_input(6, "cache_pos"), "attention", "TensorRT ignores nonpad_kv_seqlen"),
    (attention_input(4, "k_cache_1"), "attention", "past and present"),
    (present_outputs, "attention", "past and present"),
    (attention_input(3, ""), "attention", "there is no mask"),
    (attention_input(1, "v_cache_1_out"), "attention", "its k is v_cache_1_out"),
    (attention_input(2, "k_cache_1_out"), "attention", "its v is k_cache_1_out"),
    (attention_input(1, "k_cache_1"), "attention", "its k is k_cache_1, not an updated"),
    (no_attention_in_one_layer, "attention", "1 Attention nodes for 2 layers"),
    (attribute("is_causal", 1), "attention", "is_causal"),
    (attribute("softcap", 30.0), "attention", "softcap"),
    (attribute("TRT_decomposable", 1), "attention", "TRT_decomposable makes ONNX Runtime refuse"),
    (scatter_nd, "cache_writes", "ScatterND"),
    (a_copy_before_the_write, "cache_writes", "k_cache_1_out is not the TensorScatter of the graph input k_cache_1"),
    (a_copy_after_the_write, "cache_writes", "k_cache_0_out is not the TensorScatter of the graph input k_cache_0"),
    (second_reader, "cache_writes", "v_cache_0 is read by 2 nodes"),
    (attribute("axis", 1, "TensorScatter"), "cache_writes", "it must have axis 2 and mode linear"),
    (attribute("mode", "circular", "TensorScatter"), "cache_writes", "it must have axis 2 and mode linear"),
    (loop, "cache_writes", "Loop"),
    (merged_examples, "cache_writes", "v_cache_1_out is not the TensorScatter of the graph input v_cache_1"),
    (merged_examples, "signature", "input v_cache_1 is never used"),
    (unused_input, "signature", "input tokens is never used"),
    (renamed_output, "signature", "scores"),
    (missing_output, "signature", "there are 4 instead of 5"),
    (another_dtype, "signature", "k_cache_0"),
    (a_symbolic_batch, "signature", "tokens"),
    (opset_23, "opset", "'ai.onnx': 23"),
    (another_domain, "opset", "com.microsoft"),
    (local_function, "opset", "1 functions"),
]


def complaints(folder: Path, bundle: Bundle, name: str = "step") -> list[str]:
    """Return the problems that the linter reports for a graph in the folder."""
    path = folder / f"{name}.onnx"
    with pytest.raises(LintError) as caught:
        lint.check(path, bundle.manifest.graph_specs()[name])
    first, *rest = caught.value.message.split("\n  ")
    assert str(path) in first
    return rest


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_graphs_as_exported_are_clean(dtype: str, exported: Exporter) -> None:
    bundle = exported("1x1x4", dtype=dtype, batch=1 if dtype == "fp32" else 2, tokenizer=True).bundle
    for name, spec in bundle.manifest.graph_specs().items():
        lint.check(bundle.graph_file(name), spec)


@pytest.mark.parametrize(("change", "rule", "phrase"), TRAPS, ids=[phrase for _, _, phrase in TRAPS])
def test_each_trap_is_named(change: Change, rule: str, phrase: str, copied: Callable[..., Bundle]) -> None:
    bundle = copied("1x2x2", batch=2)
    model = onnx.load(bundle.graph_file("step"), load_external_data=False)
    change(model)
    onnx.save(model, bundle.graph_file("step"))
    problems = complaints(bundle.path, bundle)
    assert [text for text in problems if text.startswith(f"{rule}: ") and phrase in text], problems


@pytest.mark.parametrize(("change", "phrase"), [(opset_23, "'ai.onnx': 23"), (renamed_output, "scores")])
def test_tokenizer_graphs_are_checked_too(change: Change, phrase: str, copied: Callable[..., Bundle]) -> None:
    bundle = copied("1x1x4", tokenizer=True)
    model = onnx.load(bundle.graph_file("decode"), load_external_data=False)
    if change is renamed_output:
        model.graph.output[0].name = "scores"
        model.graph.node.append(helper.make_node("Identity", ["video"], ["scores"]))
    else:
        change(model)
    onnx.save(model, bundle.graph_file("decode"))
    assert [text for text in complaints(bundle.path, bundle, "decode") if phrase in text]


def test_another_graphs_spec(exported: Exporter) -> None:
    bundle = exported("1x2x2", batch=2).bundle
    with pytest.raises(LintError, match=r"step\.onnx[\s\S]*inputs differ from the spec[\s\S]*tokens"):
        lint.check(bundle.graph_file("step"), bundle.manifest.graph_specs()["prefill"])


def test_missing_weights(copied: Callable[..., Bundle]) -> None:
    bundle = copied("1x2x2", batch=2)
    (bundle.path / "generator.data").unlink()
    assert [text for text in complaints(bundle.path, bundle) if "onnx.checker" in text and "generator.data" in text]
