"""Engines: built for real by TensorRT-RTX, which needs no GPU for that, from graphs that are proven beside them."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import ModelProto, NodeProto, helper

from nbp_engines.bundle import Bundle
from nbp_engines.errors import UsageError
from nbp_export import trt
from nbp_export.cli import main
from nbp_export.onnx_bundle import GENERATOR, export
from nbp_export.sources import Source
from nbp_reference.config import ModelConfig
from nbp_reference.model import NextBlockTransformer
from tests.export.support import Exported
from tests.support import filled, golden_hybrid

pytest.importorskip("tensorrt_rtx", reason="pip install 'nbp-export[trt-rtx]'")

Exporter = Callable[..., Exported]


def wide(block: str) -> Source:
    """Two layers with heads of 32, which fused attention takes, on the paper's latent."""
    config = ModelConfig(2, width=128, heads=4, vocab=200).with_block(block)
    return Source("small", filled(NextBlockTransformer(config)), None, True, "a test's model")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("block", ["1x1x1", "1x1x16", "1x16x16"])
def test_an_engine_with_two_profiles(block: str, dtype: str, tmp_path: Path) -> None:
    bundle = export(wide(block), tmp_path / "bundle", dtype, arch="sm80")
    assert set(bundle.manifest.graphs.values()) == {GENERATOR}
    (built,) = json.loads((bundle.path / trt.BUILDS).read_text())
    L = bundle.manifest.spec.block_size
    assert built["tokens"] == [512, L]
    assert built["arch"] == "sm80"
    assert built["library"].startswith("TensorRT-RTX 1.")
    assert built["executed"] == trt.UNTRIED
    assert built["layers"]["KV_CACHE_UPDATE"] == 4
    assert built["layers"]["ATTENTION_INPUT"] == built["layers"]["ATTENTION_OUTPUT"] == 2
    engine = bundle.path / built["file"]
    assert engine.stat().st_size == built["size"] > 200_000
    assert {engine.name, trt.BUILDS} <= {file.path for file in bundle.manifest.files}
    proven = {(c["graph"], c["at"]) for c in (bundle.receipt() or {})["checks"]}
    assert ("prefill", "cache_pos [0]") in proven
    assert len({at for graph, at in proven if graph == "step"}) >= (2 if L < 256 else 1)


def test_a_hybrids_third_profile(tmp_path: Path) -> None:
    source = Source("ucf", golden_hybrid(), None, True, "golden")  # heads of 16
    bundle = export(source, tmp_path / "bundle", "fp16", arch="sm89")
    (built,) = json.loads((bundle.path / trt.BUILDS).read_text())
    assert built["tokens"] == [8, 4, 1]
    assert list(bundle.manifest.graphs) == ["prefill", "step", "step_1"]


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = CliRunner().invoke(main, ["trt", "--block", "1x1x16", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "never executed by us" in done.output
    assert {path.name for path in out.glob("*.engine")} == {"encode.engine", "generator.engine", "decode.engine"}
    assert Bundle.open(out, require_receipt=True).manifest.spec.dtype == "fp16"


def test_an_unknown_architecture_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sm80, sm86, sm89, sm120 here, not for sm90"):
        export(wide("1x1x16"), tmp_path / "bundle", "fp16", arch="sm90")
    assert list(tmp_path.iterdir()) == []


# Faults of a graph that its parser takes without an error.


def of_type(model: ModelProto, op: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def nonpad_lengths(model: ModelProto) -> None:
    """The valid length by the input that TensorRT drops, in place of the mask."""
    for node in of_type(model, "Attention"):
        node.input[3:] = ["", "", "", "cache_pos"]


def unaliased_output(model: ModelProto) -> None:
    """A cache that is written to a copy."""
    write = of_type(model, "TensorScatter")[0]
    model.graph.node.insert(0, helper.make_node("Add", [write.input[0], write.input[0]], ["copied"]))
    write.input[0] = "copied"


def outputs_swapped(model: ModelProto) -> None:
    """Keys into the values' memory."""
    first, second = of_type(model, "TensorScatter")[:2]
    first.input[0], second.input[0] = second.input[0], first.input[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nonpad_lengths, "has no mask"),
        (unaliased_output, "cache"),
        (outputs_swapped, "k_cache_0_out is no update of k_cache_0"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_fault_is_named(
    change: Callable[[ModelProto], None], message: str, exported: Exporter, tmp_path: Path
) -> None:
    bundle = exported("1x2x2", dtype="fp16", batch=2, one_graph=True).bundle
    model = onnx.load(bundle.path / GENERATOR)
    change(model)
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(trt.BuildError, match=message):
        trt.build(tmp_path / "broken.onnx", [bundle.manifest.graph_specs()["step"]], "sm80")


def test_the_control_of_the_faults(exported: Exporter) -> None:
    bundle = exported("1x2x2", dtype="fp16", batch=2, one_graph=True).bundle
    built, content = trt.build(bundle.path / GENERATOR, [bundle.manifest.graph_specs()["step"]], "sm80")
    assert built.size == len(content)
