"""The bench: its self-check, its child processes, its command, and the claim that engines generate the same."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nbp_bench import golden
from nbp_bench.cli import main
from nbp_bench.sweep import Plan, sweep
from nbp_bench.video import to_float, to_uint8, windows
from nbp_bench.worker import ENGINES, Job, Worker
from nbp_engines.errors import EngineError
from nbp_engines.sampling import GREEDY, Sampling
from nbp_errors import UsageError
from nbp_export.graphs import system_spec
from nbp_export.request import Request
from nbp_reference.config import MODELS, TOKENIZERS
from nbp_reports import record
from nbp_reports.record import STAGES

PAPER = Sampling()
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
RANDOM = Request(model="nbp-tiny", weights="random", block="256")
SPEC = system_spec(MODELS["nbp-tiny"].with_block("256"), TOKENIZERS["nbp-tiny"], "fp32", 1)


def _plan(out: Path, *requests: Request, engines: Sequence[str] = ENGINES, sampling: Sampling = PAPER) -> Plan:
    return Plan(requests, engines, None, clips=1, batch=1, threads=None, seed=0, out=out, sampling=sampling)


def _silent(stage: str, turns: int = 0) -> None:
    pass


class _Stages(list[str]):
    """What a sweep reported."""

    def __call__(self, stage: str, turns: int = 0) -> None:  # noqa: ARG002 - the protocol's
        self.append(stage)


@pytest.mark.parametrize("size", golden.SIZES)
def test_self_check_passes_here_and_fails_where_a_token_differs(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert golden.agreement(size) == 1
    model = golden.golden_model(size)
    model.pos_emb.data.mul_(1.5)
    monkeypatch.setattr(golden, "golden_model", lambda _: model)
    assert golden.agreement(size) < 1


def test_sampled_tiny_clips_are_identical_in_all_engines(tmp_path: Path) -> None:
    requests = [Request(block=size) for size in ("1", "16", "256")]
    measured = sweep(_plan(tmp_path, *requests), _silent)
    assert len(measured) == 9
    for m in measured:
        row = m.record
        assert row.trained
        assert row.token_agreement == (None if row.engine == "reference" else 1)
        assert sum(sum(getattr(row, f"{stage}_ns")) for stage in STAGES) == sum(row.total_ns)
        unrolled = row.engine == "reference"  # whose steps are one stage
        assert len(row.loop_ns) == unrolled
        assert len(row.step_ns) == (0 if unrolled else row.steps - 1)
        assert len(row.sample_ns) == (0 if unrolled else row.steps)
        assert row.first_frame_ns[0] > 0
        assert row.peak_memory_bytes
        assert row.peak_memory_bytes > 50e6
        assert m.results[0].video.shape == (1, 3, 12, 128, 128)
    assert [m.record.steps for m in measured[::3]] == [768, 48, 3]
    for first in (0, 3, 6):  # same noise, same condition: the videos differ by the decoders' rounding at most
        for other in (1, 2):
            np.testing.assert_allclose(
                measured[first].results[0].video, measured[first + other].results[0].video, atol=1e-4
            )


def test_greedy_tiny_clips_are_identical_in_all_engines(tmp_path: Path) -> None:
    plan = _plan(tmp_path, Request(block="16"), sampling=GREEDY)
    assert [m.record.token_agreement for m in sweep(plan, _silent)] == [1.0, None, 1.0]


def test_a_second_run_uses_the_first_ones_bundle_unless_it_changed(tmp_path: Path) -> None:
    plan = _plan(tmp_path, RANDOM, engines=("onnx",))
    stages = _Stages()
    sweep(plan, stages)
    assert any(stage.startswith("export") for stage in stages)
    stages.clear()
    sweep(plan, stages)
    assert not any(stage.startswith("export") for stage in stages)
    (step,) = tmp_path.glob("bundles/*/step.onnx")
    step.write_bytes(step.read_bytes() + b"\0")
    with pytest.raises(UsageError, match=r"step.onnx is not the file.*remove it"):
        sweep(plan, _silent)


def _job(engine: str = "reference", request: Request = RANDOM) -> Job:
    return Job(engine, request, 1, Sampling(), 0, None)


def test_an_error_in_the_child_arrives_in_its_own_words() -> None:
    with pytest.raises(EngineError, match=r"engine reference: .*no model 'nbp-huge'"):
        Worker(_job(request=Request(model="nbp-huge")))
    with Worker(_job()) as worker, pytest.raises(EngineError, match=r"given frames are \(1, 3, 4, 128, 128\)"):
        worker.call("predict", np.zeros((1, 3, 4, 128, 128), np.float32), 0)


def test_an_exported_engines_memory_holds_no_torch() -> None:
    code = "import sys, nbp_bench.cli, nbp_bench.worker; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout == "False\n"


def test_a_killed_child_is_reported() -> None:
    with Worker(_job()) as worker:
        assert worker._process.pid
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"died with exit code -9 \(out of memory\?\)"):
            worker.call("peak_memory")


def test_windows_start_with_the_given_frames_and_stay_in_the_held_out_part() -> None:
    scenes, name = windows(SPEC, None, 3)
    assert [s.shape for s in scenes] == [(17, 3, 128, 128)] * 3
    assert "held-out" in name
    assert len({s.tobytes() for s in scenes}) == 3
    np.testing.assert_array_equal(to_uint8(to_float(scenes[0])), scenes[0])


def test_a_video_that_is_too_short_or_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "not.mp4").write_text("no video")
    result = CliRunner().invoke(
        main, ["--sizes", "256", "--engines", "reference", "--video", str(tmp_path / "not.mp4")]
    )
    assert result.exit_code == 1
    assert "holds no readable video" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nbp-bench --sizes 1,16,256"),
        (["--sizes", "16", "--engines", "trt"], "there are naive, reference, onnx"),
        (["--sizes", "16", "--checkpoint", "model.ckpt"], "expected BLOCK=FILE"),
        (["--sizes", "24"], "24"),
        (["--sizes", "16", "--model", "nbp-xl"], "--weights random"),
    ],
)
def test_usage_errors_say_the_cure_and_exit_with_2(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert says in result.output


def test_command_leaves_records_report_and_pictures(tmp_path: Path) -> None:
    arguments = ["--sizes", "256", "--model", "nbp-tiny", "--weights", "random", "--clips", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("golden tokens of the authors' implementation, L=1: equal on this machine\n")
    assert "random weights" in result.output
    records = record.read(tmp_path / "records.jsonl")
    assert [r.engine for r in records] == ["naive", "reference", "onnx"]
    assert not any(r.trained for r in records)
    for name in ("report.md", "fps_by_block.png", "clips.png"):
        assert (tmp_path / name).stat().st_size > 500
