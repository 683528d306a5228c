"""Engines: built for real by TensorRT-RTX, which needs no GPU for that, from graphs that are proven beside them."""

from collections.abc import Callable
from dataclasses import replace
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
from nbp_export.trt_library import RTX, Options
from nbp_reference.config import ModelConfig
from nbp_reference.model import NextBlockTransformer
from tests.export.support import Exported
from tests.support import filled, golden_hybrid

pytest.importorskip("tensorrt_rtx", reason="pip install 'nbp-export[trt-rtx]'")

Exporter = Callable[..., Exported]
SM80 = Options(arch="sm80")


def wide(block: str) -> Source:
    """Two layers with heads of 32, which fused attention takes, on the paper's latent."""
    config = ModelConfig(2, width=128, heads=4, vocab=200).with_block(block)
    return Source("small", filled(NextBlockTransformer(config)), None, True, "a test's model")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("block", ["1x1x1", "1x1x16", "1x16x16"])
def test_an_engine_with_two_profiles(block: str, dtype: str, tmp_path: Path) -> None:
    bundle = export(wide(block), tmp_path / "bundle", dtype, engines=Options(arch="sm80"))
    assert set(bundle.manifest.graphs.values()) == {GENERATOR}
    (engine,), (build,) = bundle.manifest.engines, trt.builds(bundle)
    L = bundle.manifest.spec.block_size
    assert (engine.graphs, build.tokens) == (("prefill", "step"), (512, L))
    assert (engine.arch, engine.compatibility, engine.library) == ("sm80", "none", "tensorrt_rtx")
    assert engine.version == RTX.load().__version__
    assert (build.attention, build.seen_in) == ("fused", "the network")
    assert build.layers["KV_CACHE_UPDATE"] == 4
    assert build.layers["ATTENTION_INPUT"] == build.layers["ATTENTION_OUTPUT"] == 2
    assert (bundle.path / engine.file).stat().st_size > 200_000
    left = {f"generator{end}" for end in (".engine", ".layers.json", ".log")} | {trt.BUILDS}
    assert left <= {file.path for file in bundle.manifest.files}
    proven = {(c["graph"], c["at"]) for c in (bundle.receipt() or {})["checks"]}
    assert ("prefill", "cache_pos [0]") in proven
    assert len({at for graph, at in proven if graph == "step"}) >= (2 if L < 256 else 1)


def test_a_hybrids_third_profile(tmp_path: Path) -> None:
    source = Source("ucf", golden_hybrid(), None, True, "golden")  # heads of 16
    bundle = export(source, tmp_path / "bundle", "fp16", engines=Options(arch="sm89"))
    (engine,), (build,) = bundle.manifest.engines, trt.builds(bundle)
    assert (engine.graphs, build.tokens) == (("prefill", "step", "step_1"), (8, 4, 1))


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = CliRunner().invoke(main, ["trt", "--block", "1x1x16", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "builder: TensorRT-RTX 1." in done.output
    assert "its engines never by us" in done.output
    seen = (
        "prefill of 512 tokens, step of 16 tokens; 10 caches updated in place, 5 attentions masked and fused, no input"
    )
    assert seen in done.output
    assert "not verified: the engines themselves" in done.output
    assert {path.name for path in out.glob("*.engine")} == {"encode.engine", "generator.engine", "decode.engine"}
    assert Bundle.open(out, require_receipt=True).manifest.spec.dtype == "fp16"


def test_an_unknown_architecture_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sm80, sm86, sm89, sm120 here, not for sm90"):
        export(wide("1x1x16"), tmp_path / "bundle", "fp16", engines=Options(arch="sm90"))
    assert list(tmp_path.iterdir()) == []


def test_fp32_attention_is_decomposed_for_want_of_a_fused_kernel(tmp_path: Path) -> None:
    bundle = export(wide("1x1x16"), tmp_path / "bundle", "fp32", engines=SM80)
    assert trt.builds(bundle)[0].attention == "decomposed"
    graph, uses = bundle.path / GENERATOR, [*bundle.manifest.graph_specs().values()]
    with pytest.raises(trt.BuildError, match="--attention decomposed"):
        trt.build(graph, uses, RTX, replace(SM80, decomposed=False))


# What a library cannot honour is refused, not ignored.
REFUSED: dict[str, tuple[list[str], str]] = {
    "another GPU": (["--arch", "sm90"], "TensorRT-RTX builds for sm80, sm86, sm89, sm120 here, not for sm90"),
    "other GPUs besides": (["--hardware-compat", "ampere+"], "with no --hardware-compat ampere+"),
    "a level": (["--level", "5"], "has no optimisation --level"),
    "a timing cache": (["--timing-cache", "here"], "has no --timing-cache"),
    "two at once": (["--level", "0", "--arch", "sm1"], "not for sm1; it has no optimisation --level"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_tensorrt_rtx_cannot_honour(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    done = CliRunner().invoke(main, ["trt", "--builder", "rtx", "--out", str(tmp_path / "bundle"), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert list(tmp_path.iterdir()) == []


def test_too_little_workspace_is_said(exported: Exporter) -> None:
    bundle = exported("1x2x2", dtype="fp16", batch=2, one_graph=True).bundle
    graph, uses = bundle.path / GENERATOR, [bundle.manifest.graph_specs()["step"]]
    with pytest.raises(trt.BuildError, match="give it more --workspace"):
        trt.build(graph, uses, RTX, replace(SM80, workspace=16))
    assert trt.build(graph, uses, RTX, replace(SM80, workspace=2**30)).known.tokens == (4,)


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
        trt.build(tmp_path / "broken.onnx", [bundle.manifest.graph_specs()["step"]], RTX, SM80)


def test_the_control_of_the_faults(exported: Exporter) -> None:
    bundle = exported("1x2x2", dtype="fp16", batch=2, one_graph=True).bundle
    built = trt.build(bundle.path / GENERATOR, [bundle.manifest.graph_specs()["step"]], RTX, SM80)
    assert built.known.tokens == (4,)
