"""The content of an exported bundle."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto

from nbp_engines.bundle import Bundle
from nbp_engines.errors import ReceiptWarning
from nbp_export.parity import TOLERANCE
from nbp_export.proof import TOOLS
from nbp_export.weights import weights_sha256
from tests.export.support import Exported

Exporter = Callable[..., Exported]
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["fp32", "fp16"])
def full(request: pytest.FixtureRequest, exported: Exporter) -> Exported:
    """A bundle with a tokenizer; its batch is one that other tests also export."""
    return exported("1x1x4", dtype=request.param, batch=1 if request.param == "fp32" else 2, tokenizer=True)


def graphs(bundle: Bundle) -> Iterator[tuple[str, ModelProto]]:
    """Yield the graphs by name, with their weights."""
    for name in bundle.manifest.graphs:
        yield name, onnx.load(bundle.graph_file(name))


def test_the_files_are_the_documented_ones(full: Exported) -> None:
    found = {path.name for path in full.bundle.path.iterdir()}
    graphs = {"encode.onnx", "prefill.onnx", "step.onnx", "decode.onnx"}
    assert found == graphs | {
        "manifest.json",
        "receipt.json",
        "trace.json",
        "weights.json",
        "generator.data",
        "encode.data",
        "decode.data",
    }


def test_without_a_tokenizer_there_are_only_the_generators_graphs(exported: Exporter) -> None:
    bundle = exported("1x2x2", batch=2).bundle
    found = {path.name for path in bundle.path.iterdir()}
    described = {"manifest.json", "receipt.json", "trace.json", "weights.json"}
    assert found == described | {"prefill.onnx", "step.onnx", "generator.data"}
    assert set(bundle.manifest.graphs) == {"prefill", "step"}
    assert "tokenizer" not in bundle.manifest.model["config"]


def test_prefill_and_step_share_one_copy_of_the_weights(full: Exported) -> None:
    bytes_each = {"fp32": 4, "fp16": 2}[full.bundle.manifest.spec.dtype]
    generator = full.source.generator
    weights = sum(p.numel() for p in generator.parameters()) * bytes_each
    size = (full.bundle.path / "generator.data").stat().st_size
    tensors = len(list(generator.parameters()))
    assert (
        weights * 0.95 < size < weights + tensors * 4096
    )  # each tensor begins on a page; the smallest ones are in the graphs
    external: dict[str, set[tuple[str, ...]]] = {}
    for name in ("prefill", "step"):
        model = onnx.load(full.bundle.graph_file(name), load_external_data=False)
        stored = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
        external[name] = {(e["location"], e["offset"], e["length"]) for e in stored}
        assert sum(int(e["length"]) for e in stored) > 0.9 * weights
        assert {e["location"] for e in stored} == {"generator.data"}
        assert full.bundle.graph_file(name).stat().st_size < 60_000
    # All external tensors of step are also prefill's. The graphs differ only in constants, such as row numbers.
    assert len(external["prefill"] & external["step"]) == len(external["step"])


def test_opset_24_of_the_standard_operators_only(full: Exported) -> None:
    for _, model in graphs(full.bundle):
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
        assert not model.functions
        assert {node.domain for node in model.graph.node} == {""}
        onnx.checker.check_model(model, full_check=True)


def test_names_and_shapes_are_the_manifests(full: Exported) -> None:
    kinds = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "int64": onnx.TensorProto.INT64}
    for name, model in graphs(full.bundle):
        spec = full.bundle.manifest.graph_specs()[name]
        for values, expected in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
            found = [
                (v.name, v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim])
                for v in values
            ]
            assert found == [(t.name, kinds[t.dtype], list(t.shape)) for t in expected]


def test_each_layer_writes_its_caches_once_and_attends_once(full: Exported) -> None:
    layers = full.bundle.manifest.spec.layers
    for name, model in graphs(full.bundle):
        nodes = list(model.graph.node)
        writes = {node.input[0]: node.output[0] for node in nodes if node.op_type == "TensorScatter"}
        attentions = [node for node in nodes if node.op_type == "Attention"]
        if name in ("encode", "decode"):
            assert not writes
            assert not attentions
            continue
        caches = [f"{kv}_cache_{layer}" for layer in range(layers) for kv in "kv"]
        assert writes == {cache: f"{cache}_out" for cache in caches}
        read = [tuple(node.input[1:3]) for node in attentions]
        assert read == [(f"k_cache_{layer}_out", f"v_cache_{layer}_out") for layer in range(layers)]
        assert all(len(node.input) == 4 and node.input[3] for node in attentions)
        # All layers share one mask.
        assert len({node.input[3] for node in attentions}) == 1


def test_no_paths_of_this_machine_and_no_metadata_of_the_exporter(full: Exported) -> None:
    folders = {ROOT, Path.home(), Path(sys.prefix), full.bundle.path.parent} - {Path("/")}
    marks = [f"{folder}/".encode() for folder in folders]
    marks += [b"site-packages", b"Traceback", b"stack_trace", b"pkg.torch", b"nbp_reference/", b".py"]
    files = [path for path in full.bundle.path.iterdir() if path.suffix != ".data"]  # data files hold only numbers
    assert len(files) == 8
    for path in files:
        content = path.read_bytes()
        assert not [mark for mark in marks if mark in content], path.name
    for _, model in graphs(full.bundle):
        assert not model.metadata_props
        assert not model.doc_string
        assert not model.graph.doc_string
        for item in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
            assert not item.doc_string
            assert not item.metadata_props


def test_the_manifest_describes_the_source(full: Exported) -> None:
    manifest = full.bundle.manifest
    assert manifest.model["name"] == "small"
    assert manifest.model["config"]["generator"] == full.source.generator.config.to_json()
    assert full.source.tokenizer is not None
    tokenizer = json.loads(json.dumps(full.source.tokenizer.config.to_json()))
    assert manifest.model["config"]["tokenizer"] == tokenizer
    assert manifest.provenance["note"] == full.source.note
    assert manifest.runtime == "ort-cpu"
    assert set(manifest.versions) == set(TOOLS)
    if manifest.spec.dtype == "fp32":  # the digest is of the weights before they are rounded to fp16
        assert manifest.model["weights_sha256"] == weights_sha256(full.source.generator, full.source.tokenizer)


def test_the_receipt_proves_every_graph(full: Exported) -> None:
    receipt = full.bundle.receipt()
    assert receipt is not None
    assert receipt["files"].keys() == {path.name for path in full.bundle.path.iterdir()} - {"receipt.json"}
    assert {check["graph"] for check in receipt["checks"]} == set(full.bundle.manifest.graphs)
    assert receipt["versions"].keys() == set(TOOLS)
    for check in receipt["checks"]:
        assert 0 <= check["worst"] <= check["tolerance"]
        assert check["where"]
    assert receipt["worst"] == max(receipt["checks"], key=lambda check: float(check["worst"]))
    for check in receipt["checks"]:
        if check["where"].startswith("logits"):
            dtype = "fp32" if check["at"].endswith("in fp32 arithmetic") else full.bundle.manifest.spec.dtype
            assert check["tolerance"] == TOLERANCE[dtype]
    # Steps are checked at the first, a middle and the last position, and there with sharpened caches too.
    steps = (check["at"] for check in receipt["checks"] if check["graph"] == "step")
    places = {at for at in steps if not at.startswith("trace")}
    if full.bundle.manifest.spec.dtype == "fp32":
        assert places == {*(f"cache_pos [{start}]" for start in (32, 52, 72)), "cache_pos [72], sharpened"}
    else:
        random = {f"cache_pos {starts}" for starts in ([32, 28], [52, 48], [72, 68])}
        sharpened = "cache_pos [72, 68], sharpened"
        assert places == {*random, sharpened, f"{sharpened}, in fp32 arithmetic"}
    for place in places:
        outputs = [check["where"].split("[")[0] for check in receipt["checks"] if check["at"] == place]
        assert "logits" in outputs
        for layer in range(2):
            assert {f"k_cache_{layer}_out", f"v_cache_{layer}_out outside the block"} <= set(outputs)


def test_no_temporary_folder_is_left(full: Exported) -> None:
    assert [path.name for path in full.bundle.path.parent.iterdir()] == [full.bundle.path.name]


def test_readable_by_others(full: Exported) -> None:
    assert full.bundle.path.stat().st_mode & 0o777 == 0o755


def test_the_receipt_is_void_once_a_real_bundle_changes(copied: Callable[..., Bundle]) -> None:
    bundle = copied("1x2x2", batch=2)
    assert bundle.receipt() is not None
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    manifest["provenance"]["note"] = "better"
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(ReceiptWarning, match="nbp-export verify"):
        assert Bundle.open(bundle.path).receipt() is None


def test_the_same_model_exports_to_the_same_bytes(exported: Exporter, tmp_path: Path) -> None:
    from nbp_export.onnx_bundle import export
    from tests.export.support import source

    first = exported("1x2x2", batch=2).bundle
    second = export(source("1x2x2"), tmp_path / "again", "fp32", 2)
    assert [asdict(file) for file in second.manifest.files] == [asdict(file) for file in first.manifest.files]
