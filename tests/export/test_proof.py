"""The proof of a bundle on its own weights: the index of the weights, bf16, and `nbp-export verify`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto
from torch import nn

from nbp_engines.bundle import RECEIPT, Bundle
from nbp_engines.errors import EngineError
from nbp_engines.ort import OrtSession
from nbp_engines.runtime import OpenOptions
from nbp_engines.status import sentence
from nbp_errors import NbpError
from nbp_export import proof
from nbp_export.cli import main
from nbp_export.graphs import TORCH_DTYPES
from nbp_export.onnx_bundle import export
from nbp_export.parity import ParityError, Reference, check_bundle, fp32_twin
from nbp_export.proof import prove
from nbp_export.sources import Source
from nbp_export.weights import INDEX, WeightPool, read_generator, read_tokenizer
from tests.export.support import Exported, resealed, source

Exporter = Callable[..., Exported]
Copier = Callable[..., Bundle]
FULL: dict[str, Any] = {"block": "1x1x4", "tokenizer": True}


def edited(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> Bundle:
    """Change the index of a bundle's weights, and update its manifest accordingly."""
    index = json.loads((bundle.path / INDEX).read_text())
    change(index)
    (bundle.path / INDEX).write_text(json.dumps(index))
    return resealed(bundle)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_rounded_weights_are_read_back(dtype: str, exported: Exporter) -> None:
    bundle, made = exported(**FULL, dtype=dtype)
    generator, tokenizer = read_generator(bundle), read_tokenizer(bundle)
    assert tokenizer is not None
    assert made.tokenizer is not None
    state = generator.state_dict() | {
        f"blocks.{i}.{key}": value
        for i, layer in enumerate(generator.blocks)
        for key, value in layer.state_dict().items()
    }
    for actual, expected in (
        (state, made.generator.state_dict()),
        (tokenizer.state_dict(), made.tokenizer.state_dict()),
    ):
        assert actual.keys() == expected.keys()
        for key, value in actual.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[key]), key


def test_an_export_frees_the_memory_of_its_source(tmp_path: Path) -> None:
    model = source("1x4x4")
    export(model, tmp_path / "bundle", "fp32")
    assert {p.device.type for p in model.generator.parameters()} == {"meta"}


def test_a_weight_that_the_graphs_do_not_hold_fails_the_export(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    held, other = (torch.from_numpy(rng.standard_normal((30, 20)).astype(np.float32)) for _ in range(2))
    graph = ir.Graph([], [], nodes=[], initializers=[ir.Value(name="w", const_value=ir.tensor(held.T.numpy()))])
    with WeightPool(tmp_path / "data") as pool:
        pool.externalise(ir.Model(graph, ir_version=10))
        places = pool.index({"held": held, "small": other[0]})
        assert places["held"]["transposed"]
        assert places["held"]["shape"] == [20, 30]
        with pytest.raises(NbpError, match=r"other \[30, 20\] is not in any exported graph"):
            pool.index({"other": other})


def other_file(index: dict[str, Any]) -> None:
    index["generator.head.weight"]["file"] = "../../../etc/passwd"


def unlisted_file(index: dict[str, Any]) -> None:
    index["generator.head.weight"]["file"] = "receipt.json"


def beyond_the_end(index: dict[str, Any]) -> None:
    index["generator.head.weight"]["offset"] = 10**12


def too_large(index: dict[str, Any]) -> None:
    index["generator.head.weight"]["shape"] = [10**6, 10**6]


def negative(index: dict[str, Any]) -> None:
    index["generator.head.weight"]["shape"] = [-125, 64]


def unknown_dtype(index: dict[str, Any]) -> None:
    index["generator.head.weight"]["dtype"] = "fp8"


def another_shape(index: dict[str, Any]) -> None:
    index["generator.head.weight"]["shape"] = [64, 64]


def missing(index: dict[str, Any]) -> None:
    del index["generator.blocks.1.mlp.0.bias"]


def no_table(index: dict[str, Any]) -> None:
    index["generator.head.weight"] = 3


LIES = [other_file, unlisted_file, beyond_the_end, too_large, negative, unknown_dtype, another_shape, missing, no_table]


@pytest.mark.parametrize("lie", LIES, ids=lambda f: str(f.__name__))
def test_a_wrong_index_is_refused(lie: Callable[[dict[str, Any]], None], copied: Copier) -> None:
    bundle = edited(copied("1x2x2", batch=2), lie)
    with pytest.raises(NbpError, match=r"weights\.json"):
        prove(bundle)


def test_weights_exchanged_in_the_index_do_not_pass(copied: Copier) -> None:
    def exchange(index: dict[str, Any]) -> None:
        key, query = (f"generator.blocks.0.attn.{kind}.weight" for kind in ("key", "query"))
        index[key], index[query] = index[query], index[key]

    with pytest.raises(ParityError):
        prove(edited(copied("1x2x2", batch=2), exchange))


def test_the_fp32_twin_of_a_bf16_graph_has_bf16_only_in_the_stored_weights(exported: Exporter) -> None:
    bundle, _ = exported(**FULL, dtype="bf16")
    for name in bundle.manifest.graphs:
        twin = onnx.load_from_string(fp32_twin(bundle.graph_file(name)))
        stored = [w for w in twin.graph.initializer if w.data_type == TensorProto.BFLOAT16]
        assert stored
        assert {node.input[0] for node in twin.graph.node if node.op_type == "Cast"} >= {w.name for w in stored}
        for value in [*twin.graph.input, *twin.graph.output]:
            assert value.type.tensor_type.elem_type != TensorProto.BFLOAT16
        original = onnx.load(bundle.graph_file(name), load_external_data=False)
        names = {w.name for w in stored}
        computing = [n.op_type for n in twin.graph.node if n.input[0] not in names]
        assert computing == [n.op_type for n in original.graph.node]


def test_the_receipt_of_a_bf16_bundle_names_the_arithmetic(exported: Exporter) -> None:
    bundle, _ = exported(**FULL, dtype="bf16")
    receipt = bundle.receipt()
    assert receipt is not None
    for place in (bundle.manifest.provenance, receipt):
        assert sentence("bf16") in place["status"]
    assert receipt["executed"] == "in fp32 arithmetic, on weights rounded to bf16, by ONNX Runtime on a CPU"
    assert {check["tolerance"] for check in receipt["checks"]} >= {5e-5}
    model = onnx.load(bundle.graph_file("step"), load_external_data=False)
    assert model.graph.input[2].type.tensor_type.elem_type == TensorProto.BFLOAT16
    with pytest.raises(EngineError, match="is bf16, which ONNX Runtime cannot compute on a CPU"):
        OrtSession(bundle)


def test_a_fault_in_a_bf16_graph_is_caught(exported: Exporter, copied: Copier) -> None:
    bundle = copied(**FULL, dtype="bf16")
    model = onnx.load(bundle.graph_file("step"), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.input[1], node.input[2] = node.input[2], node.input[1]
            break
    onnx.save(model, bundle.graph_file("step"))
    with pytest.raises(ParityError, match=r"step\.onnx"):
        list(check_bundle(resealed(bundle), Reference(exported(**FULL, dtype="bf16").source.generator)))


@torch.inference_mode()
def test_a_lean_session_computes_the_same(exported: Exporter) -> None:
    bundle, _ = exported("1x2x2", batch=2)
    spec, rng, logits = bundle.manifest.spec, np.random.default_rng(0), []
    tokens = rng.integers(0, spec.vocab, (2, spec.condition_tokens))
    for lean in (False, True):
        with OrtSession(bundle, OpenOptions(threads=1, lean=lean)) as session:
            logits.append(session.prefill(tokens).copy())
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4, rtol=0)


def verified(path: Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["verify", str(path)])
    return done.exit_code, done.output


@pytest.mark.parametrize("before", ["void", "missing", "valid"])
def test_verify_writes_a_new_receipt(before: str, copied: Copier) -> None:
    bundle = copied(**FULL)
    old = bundle.receipt()
    if before == "void":
        (bundle.path / RECEIPT).write_text(json.dumps({"files": {}}))
    elif before == "missing":
        (bundle.path / RECEIPT).unlink()
    code, output = verified(bundle.path)
    assert code == 0, output
    assert "checks against the reference passed, in fp32" in output
    receipt = Bundle.open(bundle.path, require_receipt=True).receipt()
    assert receipt == old  # the same files, the same arithmetic


def test_verify_removes_the_receipt_of_a_bundle_that_fails(copied: Copier) -> None:
    bundle = copied("1x2x2", batch=2)
    model = onnx.load(bundle.graph_file("step"), load_external_data=False)
    scatter = next(n for n in model.graph.node if n.op_type == "Attention")
    scatter.attribute.append(onnx.helper.make_attribute("softcap", 3.0))
    onnx.save(model, bundle.graph_file("step"))
    receipt = {**(bundle.receipt() or {}), "files": resealed(bundle).hashes()}
    (bundle.path / RECEIPT).write_text(json.dumps(receipt))  # a forged receipt that is valid
    assert Bundle.open(bundle.path).receipt() is not None
    code, output = verified(bundle.path)
    assert code == 1
    assert "softcap" in output
    assert not (bundle.path / RECEIPT).exists()


@pytest.mark.parametrize("fails", [True, False])
def test_verify_gives_its_verdict_where_the_folder_cannot_be_written_to(
    fails: bool, copied: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copied("1x2x2", batch=2)

    def verdict(*_: object) -> dict[str, Any]:
        if fails:
            raise NbpError("it computes something else")
        return {}

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(proof, "prove", verdict)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    code, output = verified(bundle.path)
    assert code == 1
    (line,) = [line for line in output.splitlines() if "Read-only file system" in line]
    if fails:
        assert line.startswith("Error: it computes something else; its old receipt cannot be removed")
    else:
        assert line.startswith(f"Error: {bundle.path} passed, but its receipt cannot be written")
    assert bundle.receipt() is not None


def test_verify_of_a_damaged_file_names_it(copied: Copier) -> None:
    bundle = copied("1x2x2", batch=2)
    with (bundle.path / "generator.data").open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    code, output = verified(bundle.path)
    assert code == 1
    assert "generator.data is not the file" in output


def test_a_bundle_is_verified_where_it_was_moved(copied: Copier, tmp_path: Path) -> None:
    moved = Path(shutil.move(copied("1x2x2", batch=2).path, tmp_path / "moved"))
    assert verified(moved)[0] == 0


def test_the_models_of_these_tests_are_rounded(exported: Exporter) -> None:
    """The control for the first test: the model with which it compares has rounded weights."""
    _, made = exported(**FULL, dtype="bf16")
    weight = source(**FULL).generator.head.weight
    assert isinstance(made, Source)
    assert isinstance(weight, nn.Parameter)
    assert torch.equal(made.generator.head.weight, weight.to(TORCH_DTYPES["bf16"]).float())
    assert not torch.equal(made.generator.head.weight, weight)
