"""A worker's process: its errors come back in words, it has a time limit, and a fresh one follows a dead one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbp_bench.host import Host
from nbp_bench.worker import Worker, WorkerError
from nbp_errors import UsageError


def pid(host: Host) -> int:  # noqa: ARG001 - every call has a host
    return os.getpid()


def die(host: Host) -> None:  # noqa: ARG001
    os.kill(os.getpid(), signal.SIGKILL)


def hang(host: Host) -> None:  # noqa: ARG001
    time.sleep(600)


def refuse(host: Host) -> None:  # noqa: ARG001
    raise UsageError("no such thing: take another")


def fail(host: Host) -> None:  # noqa: ARG001
    raise RuntimeError("illegal memory access")


def test_errors_come_back_in_words_and_only_broken_processes_are_replaced() -> None:
    worker = Worker()
    try:
        first = worker.call(pid)
        with pytest.raises(WorkerError, match=r"^no such thing: take another$"):
            worker.call(refuse)
        assert worker.call(pid, seconds=60) == first
        with pytest.raises(WorkerError, match=r"^RuntimeError: illegal memory access$") as error:
            worker.call(fail)
        assert "in fail" in error.value.trace
        second = worker.call(pid)
        with pytest.raises(WorkerError, match=r"^its process died with exit code -9 \(out of memory\?\)$"):
            worker.call(die)
        third = worker.call(pid)
        with pytest.raises(WorkerError, match=r"^it took longer than 1 s$"):
            worker.call(hang, seconds=1)
        assert len({first, second, third, worker.call(pid)}) == 4
        assert worker.starts == 4
    finally:
        worker.close()


def test_an_exported_engines_memory_holds_no_torch() -> None:
    code = "import sys, nbp_bench.cli, nbp_bench.worker, nbp_bench.plan; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False\n"


SCRIPT = """
from nbp_bench.worker import Worker
from tests.bench import test_worker

if __name__ == "__main__":
    worker = Worker()
    print(worker.call(test_worker.pid))
    worker.close()
"""


def test_a_worker_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    script, current = tmp_path / "bin" / "script.py", tmp_path / "current"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    current.mkdir()
    for name in ("types", "socket", "struct", "json", "numpy", "click"):
        (current / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    root = Path(__file__).parents[2]
    packages = [root, *(root / each for each in ("engines", "bench", "reports", "reference"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, packages))}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=current, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_ctrl_c_reaches_the_parent_alone_from_the_start() -> None:
    worker = Worker()
    try:
        assert worker.call(hears_ctrl_c) is False
        assert hears_ctrl_c(Host())
    finally:
        worker.close()


def hears_ctrl_c(host: Host) -> bool:  # noqa: ARG001
    return signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
