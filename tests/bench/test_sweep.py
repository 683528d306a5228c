"""The `nbp-bench` command from end to end: rows, reports, what fails, and what a bare machine still measures."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from nbp_bench import measure, run, worker
from nbp_bench.cli import main
from nbp_bench.engines import PYTORCH, engines
from nbp_bench.host import Host, identify, open_case
from nbp_bench.plan import Candidate, Case, Plan
from nbp_bench.sweep import Sweep
from nbp_bench.torch_sessions import EagerSession
from nbp_engines import sampling
from nbp_engines.registry import RUNTIMES
from nbp_engines.sampling import Sampling
from nbp_engines.status import sentences
from nbp_export.cli import main as nbp_export
from nbp_export.request import Request
from nbp_reports import record
from nbp_reports.record import STAGES, Record
from tests.bench.fake_runtime import DYING, FAKE

RANDOM = Request(model="nbp-tiny", weights="random", block="256")


def silent(stage: str, turns: int = 0) -> None:
    """Take no notice of a stage."""


@pytest.fixture(scope="module")
def forks() -> Iterator[object]:
    """Processes that begin with torch imported; it takes most of the time of those that begin with nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    yield SimpleNamespace(get_context=lambda _: context)
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def quick(forks: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test does as users do is left out: the golden self-check, and processes that begin with nothing."""
    monkeypatch.setattr(run, "check_golden", lambda: None)
    monkeypatch.setattr(worker, "multiprocessing", forks)


def bench(out: Path, *options: str, code: int = 0) -> tuple[list[Record], str]:
    done = CliRunner().invoke(main, [*options, "--clips", "1", "--threads", "1", "--out", str(out)])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return record.read(out / "records.jsonl"), " ".join(done.output.split())


def test_the_bundled_models_in_every_engine_of_a_cpu(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    records, output = bench(tmp_path, "--sizes", "256")
    assert [(r.engine, r.role) for r in records] == [("naive", "baseline"), ("eager", "reference"), ("ort-cpu", None)]
    assert "golden tokens of the authors' implementation, L=1: equal on this machine" in output
    for row in records:
        assert row.trained
        assert row.token_agreement == (None if row.role == "reference" else 1)
        assert sum(sum(getattr(row, f"{stage}_ns")) for stage in STAGES) == sum(row.total_ns)
        assert len(row.step_ns) == row.steps - 1 == 2
        assert len(row.sample_ns) == row.steps
        assert row.first_frame_ns[0] > 0
        assert row.peak_memory_bytes
        assert row.peak_memory_bytes > 50e6
    assert records[2].parity_error
    assert (records[2].parity_where or "").startswith("receipt: ")
    assert "2 engines and the reference gave identical tokens" in (tmp_path / "report.md").read_text()
    for name in ("fps_by_block.png", "clips.png", "log.txt"):
        assert (tmp_path / name).stat().st_size > 100

    request.getfixturevalue("quick")
    # Again without the reference: the bundle is still there, and nothing was compared.
    (row,), output = bench(tmp_path, "--sizes", "256", "--engines", "ort-cpu")
    assert "export" not in output
    assert row.token_agreement is None
    assert "tokens were not compared" in (tmp_path / "report.md").read_text()

    # A bundle that was changed is a row with the reason.
    (step,) = tmp_path.glob("bundles/*/step.onnx")
    step.write_bytes(step.read_bytes() + b"\0")
    (row,), output = bench(tmp_path, "--sizes", "256", "--engines", "ort-cpu", code=1)
    assert re.search(r"step.onnx is not the file.*remove the folder", row.not_measured or "")
    assert row.fps is None
    assert "nothing could be measured" in output


@pytest.mark.usefixtures("quick")
def test_a_bundle_is_measured_as_it_is(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = tiny("16")
    records, output = bench(tmp_path, "--bundle", str(bundle), "--engines", "tensorrt,ort-cpu,eager")
    missing, exported, eager = records
    assert [r.engine for r in records] == ["tensorrt", "ort-cpu", "eager"]
    assert [r.device for r in records] == ["cuda", "cpu", "cpu"]
    assert (missing.not_measured or "").startswith("no NVIDIA driver")
    assert "tensorrt: not measured: no NVIDIA driver" in output
    assert all(line in output for line in sentences(RUNTIMES["tensorrt"].status))
    assert exported.token_agreement == 1
    assert exported.weights_sha256 == eager.weights_sha256
    assert exported.bundle_sha256
    assert not (tmp_path / "bundles").exists()


@pytest.mark.usefixtures("quick")
def test_a_class_conditional_model(tmp_path: Path) -> None:
    (row,), _ = bench(tmp_path, "--model", "nbp-tiny-hybrid", "--sizes", "16", "--engines", "eager", "--batch", "2")
    assert row.trained
    assert row.frames == 17
    assert row.batch == 2
    assert row.steps == len(row.step_ns) == 95
    assert "carphone" in row.video
    assert (tmp_path / "clips.png").exists()


@pytest.mark.usefixtures("quick")
def test_one_entry_makes_a_runtime(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It proves, is measured and is listed; and an engine whose process dies costs its own row alone."""
    monkeypatch.setitem(RUNTIMES, FAKE.name, FAKE)
    monkeypatch.setattr("nbp_bench.engines.PYTORCH", (*PYTORCH, DYING))
    assert "fake" in CliRunner().invoke(nbp_export, ["verify", "--help"]).output
    assert "a runtime of the tests" in CliRunner().invoke(main, ["--help"]).output
    assert "fake" in CliRunner().invoke(main, ["generate", "--help"]).output
    bundle = Path(shutil.copytree(tiny("256"), tmp_path / "bundle"))
    done = CliRunner().invoke(nbp_export, ["verify", str(bundle), "--runtime", "fake"])
    assert done.exit_code == 0, done.output
    receipt = json.loads((bundle / "receipt.json").read_text())
    assert receipt["runtime"] == "fake"
    assert receipt["executed"] == "in fp32 by a fake of version 7"
    assert "pytest" in receipt["versions"]
    CliRunner().invoke(nbp_export, ["verify", str(bundle)])  # by ONNX Runtime again
    records, _ = bench(tmp_path / "out", "--bundle", str(bundle), "--engines", "dying,fake", code=1)
    died, fake = records
    assert died.not_measured == "its process died with exit code 3"
    assert fake.fps
    assert fake.parity_error
    assert "receipt" not in (fake.parity_where or "receipt")  # compared anew, through this runtime


def test_torch_is_enough(tmp_path: Path) -> None:
    """From a plain checkout: noise in place of a clip, plain tables, and a line about what was left out."""
    absent = ["av", "jinja2", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "pandas", "rich", "scipy"]
    absent += ["safetensors", "cuda"]
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({absent}))")
    command = "-m nbp_bench --model nbp-tiny --weights random --device cpu --sizes 256 --dtype bf16 --steps 3 --clips 1"
    options = f"--engines eager,cudagraph,tensorrt --minutes 5 --profile --out {tmp_path / 'out'}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, *command.split(), *options.split()],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row, *missing = record.read(tmp_path / "out" / "records.jsonl")
    assert row.video == "random frames, because PyAV is not installed"
    assert len(row.device_step_ns) == len(row.device_pass_ns) == 3
    assert row.step_bytes
    assert row.copy_bandwidth
    assert 0 < (row.parity_error or 0) < (row.parity_allowed or 0) == 5e-2
    assert [r.not_measured for r in missing] == [
        "cudagraph runs on cuda, not on cpu",
        "tensorrt runs on cuda, not on cpu",
    ]
    assert "left out: pictures, the full report; to get them, pip install matplotlib jinja2" in done.stdout
    assert "| 1x16x16 | eager |" in done.stdout
    assert "1x16x16" in (tmp_path / "out" / "report.md").read_text()
    assert "aten::" in (tmp_path / "out" / "profile.txt").read_text()
    assert len([*(tmp_path / "out").iterdir()]) <= 8


def test_no_case_begins_when_the_time_is_up(tmp_path: Path) -> None:
    plan = Plan([Candidate(RANDOM)], [engines()["eager"]], tmp_path, clips=1, minutes=0.2)
    with Sweep(plan, silent) as sweep:
        sweep._deadline = 0.0
        sweep._identities[plan.candidates[0]] = identify(Host(), RANDOM)
        ((measured,),) = sweep.run()
    assert measured.record.not_measured == "the time limit was reached"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--blocks", "2x4x4"], 2, "block 2x4x4 does not tile the 3x16x16 latent; these do: 1x1x1, 1x1x2"),
        (["--sizes", "16", "--model", "nbp-xl"], 2, "--weights random for timing"),
        (["--model", "nbp-tiny-hybrid", "--sizes", "16", "--video", "my.mp4"], 2, "leave out --video"),
        (["--sizes", "256", "--video", "not.mp4"], 1, "holds no readable video"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_what_cannot_be_found_ends_before_it_begins(
    options: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("not.mp4").write_text("no video")
    done = CliRunner().invoke(main, [*options, "--engines", "eager"])
    assert done.exit_code == code, done.output
    assert says in " ".join(done.output.split())
    assert "Traceback" not in done.output


# What the process of an engine does, in this one.


def case(dtype: str = "fp32") -> Case:
    return Case(Candidate(RANDOM), engines()["eager"], dtype, 1, "cpu")


def checked(dtype: str = "fp32") -> measure.Parity:
    host = Host()
    open_case(host, case(dtype), None, None)
    found = measure.parity(host, case(dtype), None)
    host.close()
    assert found
    return found


def test_the_reference_against_itself() -> None:
    assert 0 <= checked().error < 5e-5


def test_an_engine_that_draws_otherwise_is_not_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def sabotage(_: EagerSession, logits: object, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        return sampling.sample(np.asarray(logits), uniforms, settings) ^ 1

    monkeypatch.setattr(EagerSession, "sample", sabotage)
    found = checked()
    assert found.error > found.allowed == 0
    assert "sample at cache_pos" in found.where


@pytest.mark.usefixtures("quick")
def test_an_error_without_bounds_is_a_number_of_json_and_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(session: EagerSession, tokens: np.ndarray) -> np.ndarray:
        return np.full((len(tokens), 3, *session.spec.video), np.nan, np.float32)

    monkeypatch.setattr(EagerSession, "decode", spoiled)
    found = checked()
    assert found.error == sys.float_info.max
    plan = Plan([Candidate(RANDOM)], [engines()["eager"]], tmp_path, clips=1)
    monkeypatch.setattr(Sweep, "_take_turns", lambda *_: None)
    with Sweep(plan, silent) as sweep:
        ((measured,),) = sweep.run()
        assert "models" not in sweep._workers  # no process keeps a model that it does not measure
    failed = replace(measured.record, total_ns=[1], parity_error=found.error, parity_allowed=found.allowed)
    record.write([failed], tmp_path / "rows.jsonl")
    assert not re.search("NaN|Infinity", (tmp_path / "rows.jsonl").read_text())
    monkeypatch.setattr(Sweep, "run", lambda _: iter([[replace(measured, record=failed)]]))
    done = CliRunner().invoke(main, ["--sizes", "256", "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "these do not compute the model" in " ".join(done.output.split())
    assert "1x16x16 fp32 eager" in done.output
