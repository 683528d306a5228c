"""Bundles with TensorRT engines, which TensorRT-RTX builds in these tests. It needs no GPU for that."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from onnx import ModelProto, NodeProto, helper

from nbp_engines.bundle import Bundle
from nbp_engines.errors import BundleError
from nbp_engines.status import sentence
from nbp_errors import UsageError
from nbp_export import onnx_bundle, trt
from nbp_export.cli import main
from nbp_export.graphs import trace
from nbp_export.onnx_bundle import GENERATOR, export
from nbp_export.parity import ParityError
from nbp_export.request import Request
from nbp_export.sources import Source, find, random_generator
from nbp_export.trt_library import RTX, Options
from nbp_reference.config import MODELS, TOKENIZERS, ModelConfig
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer
from tests.conftest import CommandResult
from tests.export.support import Exported
from tests.export.test_parity import mask_with, prefill_shortcut
from tests.support import filled, golden_hybrid

pytest.importorskip("tensorrt_rtx", reason="pip install 'nbp-export[trt-rtx]'")

Exporter = Callable[..., Exported]
SM80 = Options(arch="sm80")


def wide(block: str) -> Source:
    """Return a model of two layers with the paper's latent and a head dim of 32, which fused attention supports."""
    config = ModelConfig(2, width=128, heads=4, vocab=200).with_block(block)
    return Source("small", filled(NextBlockTransformer(config)), None, True, "a test's model")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """A function of block and dtype that returns a bundle with engines for sm80."""

    @cache
    def make(block: str, dtype: str) -> Bundle:
        return export(wide(block), tmp_path_factory.mktemp("built") / "bundle", dtype, engines=SM80)

    return make


@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        ("1x1x1", "bf16"),
        ("1x1x16", "fp16"),
        ("1x16x16", "fp16"),
        pytest.param("1x1x1", "fp16", marks=pytest.mark.slow),
        pytest.param("1x1x16", "bf16", marks=pytest.mark.slow),
        pytest.param("1x16x16", "bf16", marks=pytest.mark.slow),
    ],
)
def test_an_engine_with_two_profiles(block: str, dtype: str, built: Callable[[str, str], Bundle]) -> None:
    bundle = built(block, dtype)
    assert set(bundle.manifest.graphs.values()) == {GENERATOR}
    (engine,), (build,) = bundle.manifest.engines, trt.read_builds(bundle)
    L = bundle.manifest.spec.block_size
    assert (engine.graphs, build.tokens) == (("prefill", "step"), (512, L))
    assert (engine.arch, engine.compatibility, engine.library) == ("sm80", "none", "tensorrt_rtx")
    assert engine.version == RTX.load().__version__
    assert (build.attention, build.seen_in) == ("fused", "the network")
    assert build.layers["KV_CACHE_UPDATE"] == 4
    assert build.layers["ATTENTION_INPUT"] == build.layers["ATTENTION_OUTPUT"] == 2
    assert (bundle.path / engine.file).stat().st_size > 200_000
    assert sentence("tensorrt-rtx-engines") in bundle.manifest.provenance["status"]
    left = {f"generator{end}" for end in (".engine", ".layers.json", ".log")} | {trt.BUILDS}
    assert left <= {file.path for file in bundle.manifest.files}
    proven = {(c["graph"], c["at"]) for c in (bundle.receipt() or {})["checks"]}
    assert ("prefill", "cache_pos [0]") in proven
    assert len({at for graph, at in proven if graph == "step"}) >= (2 if L < 256 else 1)


def test_a_hybrids_third_profile(tmp_path: Path) -> None:
    source = Source("ucf", golden_hybrid(), None, True, "golden")  # heads of 16
    bundle = export(source, tmp_path / "bundle", "fp16", engines=Options(arch="sm89"))
    (engine,), (build,) = bundle.manifest.engines, trt.read_builds(bundle)
    assert (engine.graphs, build.tokens) == (("prefill", "step", "step_1"), (8, 4, 1))


def test_the_command(ran: Callable[[str], CommandResult]) -> None:
    output, folder = ran("trt --block 1x1x16 --out tiny-16-sm80")
    out = folder / "tiny-16-sm80"
    assert "builder: TensorRT-RTX 1." in output
    assert sentence("tensorrt-rtx-engines") in output
    assert "prefill of 512 tokens, step of 16 tokens; 10 caches updated in place, 5 attentions with a mask" in output
    assert "The engines were not executed, because that needs a GPU" in output
    assert {path.name for path in out.glob("*.engine")} == {"encode.engine", "generator.engine", "decode.engine"}
    assert Bundle.open(out, require_receipt=True).manifest.spec.dtype == "fp16"


def summaries(bundle: Bundle) -> list[tuple[object, ...]]:
    """Return the file, profiles, cache updates, attentions and kind of attention of each engine."""
    counts = ("KV_CACHE_UPDATE", "ATTENTION_INPUT")
    return [
        (b.file, b.tokens, *(b.layers.get(name, 0) for name in counts), b.attention) for b in trt.read_builds(bundle)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("size", [1, 16, 256])
def test_all_engines_of_the_bundled_models(size: int, dtype: str, tmp_path: Path) -> None:
    bundle = export(find(Request(block=str(size))), tmp_path / "bundle", dtype, engines=SM80)
    assert summaries(bundle) == [
        ("generator.engine", (512, size), 10, 5, "fused"),
        ("encode.engine", (), 0, 0, "none"),
        ("decode.engine", (), 0, 0, "none"),
    ]
    assert Bundle.open(bundle.path, require_receipt=True) == bundle


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("size", [1, 16, 256])
def test_all_engines_of_two_layers_at_the_papers_width(size: int, dtype: str, tmp_path: Path) -> None:
    config = replace(MODELS["nbp-xl"], layers=2).with_block(str(size))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # The tokenizer is the same at every block size and takes a minute to prove, so it is exported once.
        tokenizer = VideoTokenizer(TOKENIZERS["official"]).eval() if size == 16 else None
    source = Source("wide", random_generator(config), tokenizer, False, "a test's model")
    bundle = export(source, tmp_path / "bundle", dtype, engines=SM80)
    generated, *others = summaries(bundle)
    assert generated == ("generator.engine", (512, size), 4, 2, "fused")
    assert [file for file, *_ in others] == (["encode.engine", "decode.engine"] if size == 16 else [])
    assert bundle.receipt()


def test_an_unknown_architecture_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot build for sm90: choose --arch sm80, sm86, sm89, sm120"):
        export(wide("1x1x16"), tmp_path / "bundle", "fp16", engines=Options(arch="sm90"))
    assert list(tmp_path.iterdir()) == []


def test_fp32_attention_is_decomposed_because_there_is_no_fused_kernel(tmp_path: Path) -> None:
    bundle = export(wide("1x1x16"), tmp_path / "bundle", "fp32", engines=SM80)
    assert trt.read_builds(bundle)[0].attention == "decomposed"
    graph, uses = bundle.path / GENERATOR, [*bundle.manifest.graph_specs().values()]
    with pytest.raises(trt.BuildError, match="--attention decomposed"):
        trt.build(graph, uses, RTX, replace(SM80, decomposed=False))


# Options that a library does not support are errors.
REFUSED: dict[str, tuple[list[str], str]] = {
    "another GPU": (["--arch", "sm90"], "TensorRT-RTX cannot build for sm90: choose --arch sm80, sm86, sm89, sm120"),
    "other GPUs besides": (["--hardware-compat", "ampere+"], "leave out --hardware-compat ampere+"),
    "a level": (["--level", "5"], "leave out --level"),
    "a timing cache": (["--timing-cache", "here"], "leave out --timing-cache"),
    "two at once": (["--level", "0", "--arch", "sm1"], "sm120; it has no optimisation levels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_tensorrt_rtx_does_not_support(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    done = CliRunner().invoke(main, ["trt", "--builder", "rtx", "--out", str(tmp_path / "bundle"), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert list(tmp_path.iterdir()) == []


def test_too_little_workspace_is_reported(exported: Exporter) -> None:
    bundle = exported("1x2x2", dtype="fp16", batch=2, one_graph=True).bundle
    graph, uses = bundle.path / GENERATOR, [bundle.manifest.graph_specs()["step"]]
    with pytest.raises(trt.BuildError, match="increase --workspace"):
        trt.build(graph, uses, RTX, replace(SM80, workspace=16))
    assert trt.build(graph, uses, RTX, replace(SM80, workspace=2**30)).info.tokens == (4,)


# Faults of a graph that TensorRT's parser accepts.


def of_type(model: ModelProto, op: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def nonpad_lengths(model: ModelProto) -> None:
    """Replace the mask by an input for the valid length, which TensorRT ignores."""
    for node in of_type(model, "Attention"):
        node.input[3:] = ["", "", "", "cache_pos"]


def unaliased_output(model: ModelProto) -> None:
    """Write the update to a copy of the cache."""
    write = of_type(model, "TensorScatter")[0]
    model.graph.node.insert(0, helper.make_node("Add", [write.input[0], write.input[0]], ["copied"]))
    write.input[0] = "copied"


def transposed_cache(model: ModelProto) -> None:
    """Store a cache with slots before heads, so that the rows of a head are not contiguous."""
    write = of_type(model, "TensorScatter")[0]
    cache, output = write.input[0], write.output[0]
    for value in (*model.graph.input, *model.graph.output):
        if value.name in (cache, output):
            heads, slots = value.type.tensor_type.shape.dim[1:3]
            heads.dim_value, slots.dim_value = slots.dim_value, heads.dim_value
    write.input[0], write.output[0] = "turned", "written"
    for node in of_type(model, "Attention"):
        node.input[:] = ["written" if name == output else name for name in node.input]
    at = list(model.graph.node).index(write)
    model.graph.node.insert(at + 1, helper.make_node("Transpose", ["written"], [output], perm=[0, 2, 1, 3]))
    model.graph.node.insert(at, helper.make_node("Transpose", [cache], ["turned"], perm=[0, 2, 1, 3]))


def outputs_swapped(model: ModelProto) -> None:
    """Write keys to the value cache."""
    first, second = of_type(model, "TensorScatter")[:2]
    first.input[0], second.input[0] = second.input[0], first.input[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nonpad_lengths, "has no mask"),
        (unaliased_output, "k_cache_0_out does not update k_cache_0 in place"),
        (transposed_cache, "k_cache_0_out does not update k_cache_0 in place"),
        (outputs_swapped, "v_cache_0_out does not update v_cache_0 in place"),
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


def test_the_prefill_shortcut_is_caught_by_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is correct for one block but wrong for the condition makes the export fail."""

    def traced(*arguments: Any, **options: Any) -> ir.Model:
        with mask_with(prefill_shortcut):
            return trace(*arguments, **options)

    monkeypatch.setattr(onnx_bundle, "trace", traced)
    with pytest.raises(
        ParityError, match=r"generator\.onnx, run by ort-cpu, differs from the reference at cache_pos \[0\]: logits"
    ):
        export(wide("1x1x16"), tmp_path / "bundle", "fp16", engines=SM80)
    assert list(tmp_path.iterdir()) == []


# A bundle's engines.json may have been changed.
WRONG_BUILDS: dict[str, tuple[Callable[[Any], object], str]] = {
    "no list": (lambda _: {}, "not a list"),
    "another file": (lambda builds: [builds[0] | {"file": "other.engine"}], "not the manifest's engines"),
    "one twice": (lambda builds: builds * 2, "not the manifest's engines"),
    "none": (lambda _: [], "not the manifest's engines"),
    "a path": (lambda builds: [builds[0] | {"file": "../x"}], "not a plain file name"),
    "no bytes": (lambda builds: [builds[0] | {"weights": -1}], "not bytes, or null"),
    "layers of text": (lambda builds: [builds[0] | {"layers": {"SHUFFLE": "many"}}], "not a whole number"),
    "a terminal's commands": (lambda builds: [builds[0] | {"layers": {"\x1b[31m": 1}}], "not printable"),
    "more": (lambda builds: [builds[0] | {"speed": 9}], "unknown name 'speed'"),
}


@pytest.fixture
def one(built: Callable[[str, str], Bundle], tmp_path: Path) -> Bundle:
    """A copy of a bundle with engines, which a test may change."""
    bundle = built("1x1x16", "fp16")
    return replace(bundle, path=Path(shutil.copytree(bundle.path, tmp_path / "copy")))


@pytest.mark.parametrize("name", WRONG_BUILDS)
def test_a_wrong_list_of_builds(name: str, one: Bundle) -> None:
    change, message = WRONG_BUILDS[name]
    path = one.path / trt.BUILDS
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BundleError, match=message):
        trt.read_builds(one)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        trt.read_builds(one)


def test_inspect_and_verify_describe_the_engines(one: Bundle) -> None:
    path = one.path
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "generator.engine prefill (512) sm80 tensorrt_rtx 1." in words
    assert "fused" in words
    assert "4 kv_cache_update" in words
    assert sentence("tensorrt-rtx-engines") in words
    data = json.loads(CliRunner().invoke(main, ["inspect", "--json", str(path)]).output)
    assert data["engines"][0]["activations"] == [*trt.read_builds(one)[0].activations]
    proven = CliRunner().invoke(main, ["verify", str(path)])
    assert proven.exit_code == 0, proven.output
    assert "The engines were not executed, because that needs a GPU" in proven.output


# The option --check.


def test_check_counts_layers_and_leaves_nothing(ran: Callable[[str], CommandResult]) -> None:
    output, folder = ran("trt --block 1x1x16 --check")
    assert re.search(
        r"generator\.onnx: every node is supported; \d+ layers: .*10 kv_cache_update, 5 attention_input", output
    )
    assert "decode.onnx: every node is supported" in output
    assert "The graphs were only parsed." in output
    assert list(folder.iterdir()) == []


def test_check_lists_every_unsupported_node(exported: Exporter, tmp_path: Path) -> None:
    bundle = exported("1x2x2", dtype="fp16", batch=2, one_graph=True).bundle
    model = onnx.load(bundle.path / GENERATOR)
    for name, op, domain in (("first", "Det", ""), ("second", "Foo", "acme")):
        node = of_type(model, "Gelu" if op == "Det" else "Attention")[0]
        between = f"before_{name}"
        model.graph.node.insert(
            list(model.graph.node).index(node) + 1,
            helper.make_node(op, [between], [node.output[0]], name=name, domain=domain),
        )
        node.output[0] = between
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(trt.BuildError) as error:
        trt.check(tmp_path / "odd.onnx", bundle.manifest.graph_specs()["step"], RTX)
    assert "first (Det): UNSUPPORTED_NODE" in error.value.message
    assert "second (Foo): INVALID_NODE" in error.value.message


def test_a_graph_without_faults_is_built(exported: Exporter) -> None:
    bundle = exported("1x2x2", dtype="fp16", batch=2, one_graph=True).bundle
    built = trt.build(bundle.path / GENERATOR, [bundle.manifest.graph_specs()["step"]], RTX, SM80)
    assert built.info.tokens == (4,)
