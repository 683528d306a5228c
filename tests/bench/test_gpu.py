"""The GPU script rehearsed on a CPU: what it measures, what it lists as not measured, and what it survives."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from nbp_bench import case, device, gpu, machine
from nbp_bench.case import Case
from nbp_bench.case import Result as Outcome
from nbp_bench.torch_sessions import EagerSession
from nbp_engines import sampling, session
from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling
from nbp_export import sources
from nbp_reports import record
from tests.support import small_generator

CPU = torch.device("cpu")
REHEARSAL = ["--device", "cpu", "--model", "nbp-tiny", "--quick"]


def rehearse(out: Path, *options: str) -> Result:
    return CliRunner().invoke(gpu.main, [*REHEARSAL, "--out", str(out), *options])


def asked(engine: str, out: Path) -> Case:
    return Case(engine, "fp32", "256", "nbp-tiny", "cpu", out, quick=True, began="now", command="")


def wheel(folder: Path) -> Path:
    folder.mkdir()
    with ZipFile(folder / "brought-1-py3-none-any.whl", "w") as archive:
        archive.writestr("brought/__init__.py", "")
        archive.writestr("brought-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1\n")
        archive.writestr("brought-1.data/purelib/brought/pure.py", "")
        archive.writestr("brought-1.data/platlib/brought/plat.py", "")
    return folder


def test_rehearsal_leaves_records_a_table_and_a_reason_for_every_engine(tmp_path: Path) -> None:
    before = list(sys.path)
    options = ["--sizes", "256,1x8x16", "--dtype", "fp32", "--engines", "graphs,reference,tensorrt,cuda"]
    done = rehearse(tmp_path / "out", *options, "--wheels", str(wheel(tmp_path / "wheels")))
    sys.path[:] = before
    assert done.exit_code == 0, done.output
    rows = record.read(tmp_path / "out" / "nbp-tiny-fp32.jsonl")
    assert [(r.block, r.engine, r.dtype, r.device) for r in rows] == [
        ("1x16x16", "reference", "fp32", "cpu"),
        ("1x8x16", "reference", "fp32", "cpu"),
    ]
    for row in rows:
        assert row.parity_error == 0  # the reference against itself
        assert row.parity_allowed == 5e-5
        assert len(row.device_step_ns) == len(row.device_pass_ns) == 5
        assert len(row.loop_ns) == 1
        assert row.step_bytes
        assert row.copy_bandwidth
        assert row.peak_bandwidth is None
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert summary.count("| reference |") == 2
    for block in ("256", "1x8x16"):
        for engine in ("graphs", "tensorrt", "cuda"):
            assert f"{block} fp32 {engine}: not measured: it takes a CUDA device" in summary
    assert summary in done.output
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "wheels: brought-1-py3-none-any.whl" in log
    assert "87 checks, worst" in log
    assert "- 1x8x16 fp32 reference: 87 checks, worst" in summary
    assert gpu.READING in summary


def test_wheels_are_unpacked_as_pip_would(tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    assert gpu.unpack(wheel(tmp_path / "wheels"), tmp_path / "into") == ["brought-1-py3-none-any.whl"]
    assert {p.name for p in (tmp_path / "into" / "brought").iterdir()} == {"__init__.py", "pure.py", "plat.py"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--engines", "magic"], "no 'magic': there are reference, graphs"),
        (["--dtype", "fp8"], "no 'fp8': there are bf16"),
        (["--minutes", "0.1"], "nothing could be measured"),
        (["--engines", "graphs"], "nothing could be measured"),
        (["--model", "nbp-tiny-hybrid", "--engines", "reference", "--sizes", "16"], "nothing could be measured"),
    ],
)
def test_what_cannot_be_measured_is_an_error(options: list[str], why: str, tmp_path: Path) -> None:
    done = rehearse(tmp_path, *options)
    assert done.exit_code in (1, 2)
    assert why in done.output
    assert "Traceback" not in done.output


def test_no_case_begins_when_the_time_is_up(tmp_path: Path) -> None:
    with gpu._Bench(tmp_path, time.monotonic() + gpu.LEAST_SECONDS - 1, 99) as bench:
        bench.run(asked("reference", tmp_path))
    assert bench.missing == ["256 fp32 reference: not measured: the time was up"]


def test_torch_is_enough(tmp_path: Path) -> None:
    absent = ["av", "jinja2", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "pandas", "rich", "scipy"]
    absent.append("safetensors")
    code = f"""
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys({absent}))
from nbp_bench import case
result = case.measure(case.Case(*{tuple(asked("reference", tmp_path))[:5]}, Path(), True, "now", ""), None)
assert result.record, result
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def die(case: Case, reference: np.ndarray | None) -> Outcome:  # noqa: ARG001
    os._exit(3)


def hang(case: Case, reference: np.ndarray | None) -> Outcome:  # noqa: ARG001
    time.sleep(600)
    return Outcome()


def refuse(case: Case, reference: np.ndarray | None) -> Outcome:  # noqa: ARG001
    return Outcome(why=f"process {os.getpid()}")


def test_after_a_death_a_hang_or_a_failure_the_next_case_has_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpu._Bench(tmp_path, time.monotonic() + 600, longest=20) as bench:
        for what in (refuse, refuse, die, refuse, hang, refuse):
            if what is hang:
                bench._longest = 2
            monkeypatch.setattr(gpu, "measure", what)
            bench.run(asked("reference", tmp_path))
            bench._longest = 20
    first, second, died, third, hung, fourth = (line.rpartition(": ")[2] for line in bench.missing)
    assert first == second
    assert len({first, third, fourth}) == 3
    assert died == "its process died"
    assert hung == "it took longer than 2 s"


def test_a_failure_comes_back_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(case, "_bandwidths", fail)
    result = case.measure(asked("reference", tmp_path), None)
    assert result.why == "RuntimeError: illegal memory access"
    assert "in fail" in result.trace
    with gpu._Bench(tmp_path, time.monotonic() + 600, 60) as bench:
        monkeypatch.setattr(bench, "_call", lambda *_, **__: result)
        bench.run(asked("reference", tmp_path))
    assert "in fail" in (tmp_path / "log.txt").read_text()
    assert "RuntimeError: illegal memory access" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("broken", [True, False])
def test_an_error_of_ours_that_cuda_does_not_survive_ends_the_process(
    broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise EngineError("cudaStreamSynchronize: cudaErrorIllegalAddress")

    def synchronize() -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(case, "_bandwidths", fail)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    result = case.measure(asked("reference", tmp_path), None)
    assert result.why == "cudaStreamSynchronize: cudaErrorIllegalAddress"
    assert ("in fail" in result.trace) == broken


def test_an_export_has_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "export", slow)
    monkeypatch.setattr(gpu, "measure", refuse)
    with gpu._Bench(tmp_path, time.monotonic() + 600, longest=60) as bench:
        bench.run(asked("reference", tmp_path))  # its process has begun
        bench._longest = 2
        bench.run(asked("cuda", tmp_path))
        monkeypatch.setattr(bench, "_left", lambda: 1.0)
        assert "more --minutes" in bench._result(asked("cuda", tmp_path)).why
    assert "cuda: not measured: process" in bench.missing[1]
    assert bench.notes == ["256 fp32 cuda: exported"]


def slow(case: Case) -> Outcome:  # noqa: ARG001
    time.sleep(3)
    return Outcome(notes=["exported"])


def test_what_would_run_an_engine_is_looked_for_before_what_would_export_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settle() -> None:
        if lacking:
            raise EngineError("TensorRT-RTX builds for others")

    lacking = True
    monkeypatch.setattr(case, "bindings", lambda _: None)
    monkeypatch.setattr(case, "_engine_options", lambda: SimpleNamespace(settle=settle, arch="sm90"))
    monkeypatch.setattr(case, "need", lambda *_: pytest.fail("asked for what exports"))
    ours = asked("tensorrt", tmp_path)._replace(device="cuda")
    with pytest.raises(EngineError, match="for others"):
        case._refuse(ours)
    with pytest.raises(EngineError, match="no CUDA provider"):
        case._refuse(ours._replace(engine="cuda"))
    lacking = False
    with pytest.raises(pytest.fail.Exception, match="asked for"):
        case._refuse(ours)
    assert case.folder(ours).name == "nbp-tiny-1x16x16-fp32-sm90"
    case.folder(ours).mkdir(parents=True)
    case._refuse(ours)


def test_an_error_without_bounds_is_a_number_of_json_and_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(session: EagerSession, tokens: np.ndarray) -> np.ndarray:
        return np.full((len(tokens), 3, *session.spec.video), np.nan, np.float32)

    monkeypatch.setattr(EagerSession, "decode", spoiled)
    result = case.measure(asked("reference", tmp_path), None)
    assert result.record
    assert result.record.parity_error == sys.float_info.max
    record.write([result.record], tmp_path / "rows.jsonl")
    assert not re.search("NaN|Infinity", (tmp_path / "rows.jsonl").read_text())
    monkeypatch.setattr(gpu._Bench, "_call", lambda *_, **__: result)
    done = rehearse(tmp_path, "--engines", "reference", "--sizes", "256", "--dtype", "fp32")
    assert done.exit_code == 1
    assert "not the model: 1x16x16 fp32 reference" in done.output
    with pytest.raises(ValueError, match="JSON"):
        record.write([replace(result.record, fvd=float("nan"))], tmp_path / "rows.jsonl")


def test_an_engine_that_is_not_the_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sabotage(_: EagerSession, logits: object, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        return sampling.sample(np.asarray(logits), uniforms, settings) ^ 1

    monkeypatch.setattr(EagerSession, "sample", sabotage)
    result = case.measure(asked("reference", tmp_path), None)
    assert result.record
    assert result.record.parity_error
    assert result.record.parity_allowed == 0
    assert "sample at cache_pos" in (result.record.parity_where or "")


@pytest.mark.parametrize("block", ["1x1x1", "1x1x4", "2x4x4"])
def test_a_step_reads_weights_once_and_valid_rows(block: str) -> None:
    model = small_generator(block)
    C, V, n, L = 32, 50, 2, model.config.block.size
    weights = n * (4 * (C * C + C) + 4 * C * C + 4 * C + 4 * C * C + C + 4 * C) + 2 * C + V * C
    rows = 2 * n * C * 3 * (40 + L)  # keys and values of each of three clips
    assert device.step_bytes(model, "bf16", 3, [30, 50]) == 2 * (weights + rows + 2 * 3 * L * C)


def test_spans_and_bandwidth_on_the_hosts_clock() -> None:
    times = device.spans(CPU, lambda i: time.sleep(0.01 * (i + 1)), 2)
    assert 10e6 <= times[0] < times[1]
    assert times[1] >= 20e6
    assert 1e8 < device.copy_bandwidth(CPU) < 1e13
    assert device.peak_bandwidth(CPU) is None


@pytest.mark.slow
def test_an_exported_engine_is_measured_from_a_bundle_of_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = session.open_session
    monkeypatch.setattr(session, "open_session", lambda path, **_: opened(path, runtime="onnx"))
    monkeypatch.setattr(case, "_refuse", lambda _: None)
    ours = asked("cuda", tmp_path)
    assert "is not a bundle" in case.measure(ours, None).why
    assert case.export(ours).notes[0].startswith("exported and proven")
    assert case.export(ours) == Outcome()  # it is there
    result = case.measure(ours, None)
    assert result.record, result.trace
    assert result.record.engine == "cuda"
    assert 0 < (result.record.parity_error or 0) < 5e-5
    other = sources.find(sources.Request("nbp-tiny", weights="random")), "0" * 64
    monkeypatch.setattr(case, "_master", lambda _: other)
    assert "other weights" in case.measure(ours, None).why


def test_a_gpu_is_described_by_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.describe().gpu is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Some GPU, 81559, 580.1.2'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = machine.describe()
    assert (found.gpu, found.gpu_memory_bytes, found.driver) == ("NVIDIA Some GPU", 81559 * 2**20, "580.1.2")
