"""`nbp-export inspect` describes the actual content of a bundle."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from nbp_engines.bundle import MANIFEST, RECEIPT, Bundle
from nbp_engines.errors import EngineError
from nbp_engines.ort import OrtSession
from nbp_engines.runtime import OpenOptions
from nbp_engines.spec import TensorSpec
from nbp_export import inspect
from nbp_export.cli import main
from tests.engines.test_bundle import make
from tests.export.support import Exported

Exporter = Callable[..., Exported]
ROOT = Path(__file__).parents[2]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, args)])


def words(result: Result) -> str:
    """Return the printed words, separated by single spaces."""
    return " ".join(result.stdout.split())


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make(tmp_path / "toy-1x1x4-fp32")


@pytest.fixture
def full(exported: Exporter) -> Bundle:
    return exported("1x1x4", tokenizer=True).bundle


def test_the_buffers_are_those_that_a_session_allocates(full: Bundle) -> None:
    memory = inspect.describe(full)["memory"]
    with OrtSession(full, OpenOptions(threads=1)) as session:
        graphs = session.graphs.values()
        caches = {id(array): array.nbytes for array in session.states.values()}
        inputs = {id(a): a.nbytes for graph in graphs for a in graph.inputs.values()}
        outputs = {id(a): a.nbytes for graph in graphs for a in graph.outputs.values()}
    found = {
        "states": sum(caches.values()),
        "inputs": sum((inputs | caches).values()) - sum(caches.values()),
        "outputs": sum((outputs | caches).values()) - sum(caches.values()),
        "buffers": sum((inputs | outputs | caches).values()),
    }
    assert {key: memory[key] for key in found} == found
    assert found["states"] == 2 * 2 * 80 * 64 * 4 - 2 * 2 * 4 * 64 * 4  # layers, k and v, slots, width, fp32


def test_files_and_the_graphs_that_share_them(full: Bundle) -> None:
    summary = inspect.describe(full)
    files = {file["path"]: file for file in summary["files"]}
    assert set(files) == {p.name for p in full.path.iterdir()} - {MANIFEST, RECEIPT}
    assert all(file["size"] == (full.path / path).stat().st_size for path, file in files.items())
    assert files["generator.data"]["graphs"] == ["prefill", "step"]
    assert {path: file["graphs"] for path, file in files.items() if path.endswith((".onnx", "code.data"))} == {
        **{f"{name}.onnx": [name] for name in ("encode", "prefill", "step", "decode")},
        **{f"{name}.data": [name] for name in ("encode", "decode")},
    }
    data = [path for path in files if path.endswith(".data")]
    assert summary["memory"]["weights_on_disk"] == sum(files[path]["size"] for path in data)


def test_the_page_names_everything(full: Bundle) -> None:
    result = run(full.path)
    assert result.exit_code == 0, result.output
    assert not result.stderr
    page = words(result)
    receipt = full.receipt()
    assert receipt is not None
    for part in (
        "small, trained: block 1x1x4, batch 1, fp32, ort-cpu a test's model",
        "tokens int64 [1, 32] logits fp32 [1, 4, 125]",
        "k_cache_0..1 fp32 [1, 2, 76, 32]",
        "v_cache_0..1_out fp32 [1, 2, 76, 32]",
        "video fp32 [1, 3, 5, 16, 16] tokens int64 [1, 32]",
        "prefill, step",
        f"{inspect.describe(full)['memory']['buffers']:,}",
        f"receipt valid: {len(receipt['checks'])} checks, {receipt['executed']}; largest error: ",
        f"{receipt['worst']['graph']} at",
        "trace.json",
        f"onnxruntime {receipt['versions']['onnxruntime']}",
    ):
        assert part in page, page
    assert "measured" not in page


def test_json_is_the_same(full: Bundle) -> None:
    result = run(full.path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == inspect.describe(full)


def test_tensors_that_differ_in_their_number_are_one_line() -> None:
    tensors = [TensorSpec(f"{kv}_cache_{i}_out", "fp16", (1, 2)) for i in range(12) for kv in "kv"]
    odd = [TensorSpec("k_cache_12_out", "fp16", (1, 3)), TensorSpec("logits", "fp32", (7,))]
    assert list(inspect.tensor_lines([*tensors, *odd])) == [
        "k_cache_0..11_out fp16 [1, 2]",
        "v_cache_0..11_out fp16 [1, 2]",
        "k_cache_12_out fp16 [1, 3]",
        "logits fp32 [7]",
    ]


@pytest.mark.parametrize("state", ["void", "missing"])
def test_a_bundle_without_a_valid_receipt_says_so_in_red_once(toy: Path, state: str) -> None:
    (toy / RECEIPT).unlink()
    if state == "void":
        (toy / RECEIPT).write_text("{}")
    result = run(toy)
    assert result.exit_code == 0, result.output
    assert not result.stderr
    assert words(result).endswith(f"receipt {state}: run `nbp-export verify {toy}` to check the bundle")
    assert json.loads(run(toy, "--json").stdout)["receipt"] == {"state": state}
    console = Console(force_terminal=True, color_system="standard", width=200, markup=False)
    with console.capture() as captured:
        console.print(inspect.render(inspect.describe(inspect.open_unproven(toy))))
    assert f"\x1b[31mreceipt {state}" in captured.get()


def test_names_are_not_taken_for_markup(toy: Path) -> None:
    data = json.loads((toy / MANIFEST).read_text())
    data["model"] |= {"name": "[red]toy[/red]", "trained": False}
    data["provenance"]["note"] = ":smile: [link=https://example.com]here"
    (toy / MANIFEST).write_text(json.dumps(data))
    page = words(run(toy))
    assert "[red]toy[/red], not trained, for timing only: block 1x1x4" in page
    assert ":smile: [link=https://example.com]here" in page


def test_a_damaged_bundle_is_reported_in_one_line(toy: Path) -> None:
    (toy / "step.onnx").write_bytes(b"other")
    result = run(toy)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {toy / 'step.onnx'} is not the file that")
    assert len(result.output.splitlines()) == 1


def test_neither_torch_nor_onnx_is_needed(full: Bundle) -> None:
    path = [str(ROOT / home) for home in (".", "engines")]
    bare = f"import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime'])); sys.path[:0] = {path}"
    code = f"{bare}; from nbp_export.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", full.path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "receipt valid" in done.stdout


def test_memory_is_measured_in_a_separate_process(full: Bundle) -> None:
    here = bytearray(300_000_000)
    here[::4096] = b"x" * len(here[::4096])
    memory = json.loads(run(full.path, "--json", "--measure").stdout)["memory"]
    assert 1e7 < memory["before"] < memory["opened"] <= memory["peak"] < 3e8
    assert "measured: process with an open session" in words(run(full.path, "--measure"))


def test_nothing_is_imported_from_the_current_folder(
    full: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("types", "socket", "struct", "numpy", "json", "runpy", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert inspect.measure(full.path)["opened"] > 1e7


def test_a_process_that_dies_while_it_opens_the_bundle(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "_MEASURE", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(EngineError, match="may have run out of memory"):
        inspect.measure(toy)


def test_measuring_a_bundle_that_no_session_opens_is_an_error(toy: Path) -> None:
    result = run(toy, "--measure")
    assert result.exit_code == 1
    assert "refuses" in result.output
    assert "prefill.onnx" in result.output


def test_a_system_that_does_not_report_memory(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "PROCESS", tmp_path / "nothing")
    with pytest.raises(EngineError, match="leave out --measure"):
        inspect.measure(toy)
