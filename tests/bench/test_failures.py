"""What goes wrong in a process that engines share, as on a GPU: it costs a row, or a part of it, and no more."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nbp_bench import run as bench_run
from nbp_bench import sweep
from nbp_bench.cli import main
from nbp_bench.engines import engines
from nbp_bench.host import Host, identify
from nbp_bench.plan import Candidate, Plan
from nbp_bench.sweep import Measured, Sweep
from nbp_bench.worker import Worker, WorkerError
from nbp_export import sources, weights
from nbp_export.request import Request
from nbp_reports import record

RANDOM = Request(model="nbp-tiny", weights="random", block="256")
Trouble = Callable[[str, str], None]


class DeathError(Exception):
    """What a trouble raises to end the process."""


class Here(Worker):
    """A worker whose process is this one."""

    log: list[tuple[str, str, float | None]]
    trouble: Trouble

    def __init__(self) -> None:
        super().__init__()
        self.host: Host | None = None

    @property
    def running(self) -> bool:
        return self.host is not None

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
        if self.host is None:
            self.host, self.starts = Host(), self.starts + 1
        name, engine = function.__name__, getattr(getattr(arguments[0], "engine", None), "name", "")
        self.log.append((name, engine, seconds))
        try:
            self.trouble(name, engine)
            return function(self.host, *arguments)
        except DeathError:
            self.host = None
            raise WorkerError("its process died") from None

    def close(self, kill: bool = False) -> None:  # noqa: ARG002
        self.host = None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Measured], Sweep]]:
    """Measure naive and eager in one process, with a trouble before a function is called."""
    monkeypatch.setattr(sweep, "Worker", Here)
    monkeypatch.setattr(Here, "log", [], raising=False)
    monkeypatch.setattr(Sweep, "_process", lambda *_: "shared")

    def measured(
        trouble: Trouble, names: Sequence[str] = ("naive", "eager"), **options: Any
    ) -> tuple[list[Measured], Sweep]:
        monkeypatch.setattr(Here, "trouble", staticmethod(trouble), raising=False)
        plan = Plan([Candidate(RANDOM)], [engines()[name] for name in names], tmp_path, clips=2, **options)
        with Sweep(plan, lambda *_, **__: None) as whole:
            (rows,) = whole.run()
            return rows, whole

    return measured


def test_an_engine_whose_process_died_takes_none_with_it(run: Callable[..., tuple[list[Measured], Sweep]]) -> None:
    def die(function: str, engine: str) -> None:
        if (function, engine) == ("predict", "eager"):
            raise DeathError

    (naive, eager), _ = run(die)
    assert len(naive.record.total_ns) == 2
    assert naive.record.first_frame_ns
    assert not naive.record.notes
    assert eager.record.not_measured == "its process died"
    opened = [engine for name, engine, _ in Here.log if name == "open_case"]
    assert opened == ["naive", "eager", "naive"]
    assert "close_case" in [name for name, engine, _ in Here.log if engine == "naive"]


def test_what_a_row_can_do_without_is_a_note(run: Callable[..., tuple[list[Measured], Sweep]]) -> None:
    def fail(function: str, engine: str) -> None:  # noqa: ARG001
        if function in ("step_times", "parity", "first_frame", "close_case"):
            raise WorkerError(f"no {function}")

    (naive, eager), _ = run(fail, steps=2)
    for row in (naive.record, eager.record):
        assert len(row.total_ns) == 2
        assert not row.not_measured
        assert row.parity_error is None
        assert row.notes[-3:] == [
            "comparison with the reference failed: no parity",
            "timing of single steps failed: no step_times",
            "it stopped after 2 clips: no first_frame",
        ]


def test_an_engine_that_nothing_was_compared_with_is_an_error(
    run: Callable[..., tuple[list[Measured], Sweep]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(function: str, engine: str) -> None:
        if (function, engine) == ("parity", "eager"):
            raise WorkerError("no parity")

    rows, _ = run(fail, names=["eager"], steps=2)
    monkeypatch.setattr(bench_run, "check_golden", lambda: None)
    monkeypatch.setattr(Sweep, "run", lambda _: iter([rows]))
    done = CliRunner().invoke(main, ["--sizes", "256", "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "these could not be compared with the reference: 1x16x16 fp32 eager" in " ".join(done.output.split())
    assert "1x16x16 fp32 eager" in done.output
    assert (tmp_path / "out" / "records.jsonl").exists()


Bench = Callable[..., Result]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Run `nbp-bench` on two blocks with random weights in this process; `trouble` precedes each call of a function."""
    monkeypatch.setattr(bench_run, "check_golden", lambda: None)
    monkeypatch.setattr(sweep, "Worker", Here)
    monkeypatch.setattr(Here, "log", [], raising=False)
    monkeypatch.setattr(Sweep, "_process", lambda *_: "shared")

    def invoke(trouble: Trouble) -> Result:
        monkeypatch.setattr(Here, "trouble", staticmethod(trouble), raising=False)
        options = ["--model", "nbp-tiny", "--weights", "random", "--sizes", "256,16", "--engines", "eager"]
        return CliRunner().invoke(main, [*options, "--clips", "1", "--out", str(tmp_path / "out")])

    return invoke


def on_the_second_block(error: BaseException, function: str = "predict") -> Trouble:
    """Raise an error when a function is called for the second block."""
    calls = []

    def trouble(name: str, engine: str) -> None:  # noqa: ARG001
        if name == function:
            calls.append(name)
            if len(calls) == 2:
                raise error

    return trouble


def test_an_engine_that_fails_on_the_way_keeps_the_finished_rows_and_exits_with_1(bench: Bench, tmp_path: Path) -> None:
    done = bench(on_the_second_block(DeathError()))
    assert done.exit_code == 1
    assert "these engines failed: 1x1x16 fp32 eager" in done.output
    assert "1x1x16 fp32 eager" in done.output
    good, bad = record.read(tmp_path / "out" / "records.jsonl")
    assert good.fps
    assert bad.not_measured == "its process died"
    assert "its process died" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_ctrl_c_keeps_the_finished_rows(bench: Bench, tmp_path: Path) -> None:
    done = bench(on_the_second_block(KeyboardInterrupt()))
    assert done.exit_code == 130
    assert done.output.endswith("Aborted!\n")
    assert "the run ended early, after 1 rows" in done.output
    (row,) = record.read(tmp_path / "out" / "records.jsonl")
    assert row.block == "1x16x16"
    assert row.fps
    assert "1x16x16" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_a_full_disk_is_one_line_and_the_last_records_stay_whole(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Path.write_bytes, []

    def refuse(path: Path, content: bytes) -> int:
        calls.append(path)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    done = bench(lambda *_: None)
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("Error: ")
    assert "records.jsonl: No space left on device" in done.output.splitlines()[-1]
    assert "Traceback" not in done.output
    assert "1x16x16" in done.output  # the table of what was measured
    (row,) = record.read(tmp_path / "out" / "records.jsonl")
    assert row.block == "1x16x16"
    assert not list((tmp_path / "out").glob(".*.partial*"))


def test_a_disk_without_space_for_the_bundles_is_refused_first(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    options = ["--sizes", "256", "--engines", "eager,ort-cpu", "--clips", "1", "--out", str(tmp_path / "out")]
    assert bench(lambda *_: None).exit_code == 0  # PyTorch engines need no bundle
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 2
    assert "needs 0.0 GB and its disk has 0.0 GB free: free space there" in " ".join(done.output.split())
    assert "predict" not in [name for name, _, _ in Here.log][-2:]


def test_the_deadline_ends_a_row_and_leaves_the_profile_its_time(
    run: Callable[..., tuple[list[Measured], Sweep]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, passed = time.monotonic(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now + passed[0])
    clips = []

    def pass_time(function: str, engine: str) -> None:
        if function == "predict":
            clips.append(engine)
            passed[0] = 60.0 - sweep.PROFILE_SECONDS - 1 if len(clips) == 2 else 0.0

    (naive, eager), whole = run(pass_time, minutes=1, profile=True)
    assert len(naive.record.total_ns) == len(eager.record.total_ns) == 1
    for row in (naive.record, eager.record):
        assert row.notes[-1] == "it stopped after 1 clips: the time limit was reached"
        assert row.fps
        assert not row.not_measured
    assert "aten::" in whole.profile
    limits = {name: seconds for name, _, seconds in Here.log}
    assert limits["close_case"] == sweep.CLOSE_SECONDS
    assert limits["profile"] == limits["open_case"] == pytest.approx(sweep.PROFILE_SECONDS + 1)


def test_random_weights_are_drawn_and_hashed_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    host, drawn = Host(), list[str]()

    def noted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any) -> Any:
            drawn.append(name)
            return real(*arguments)

        monkeypatch.setattr(module, name, call)

    noted(sources, "find")
    noted(weights, "weights_sha256")
    blocks = {"16": "1x1x16", "256": "1x16x16", "1": "1x1x1"}
    found = [identify(host, RANDOM._replace(block=block)) for block in blocks]
    assert drawn == ["find", "weights_sha256"]
    for identity, block in zip(found, blocks, strict=True):
        alone = identify(Host(), RANDOM._replace(block=block))
        assert identity == alone
        assert identity.spec.block_text == blocks[block]
        assert f"block {blocks[block]}:" in identity.note
