"""A worker's process: its errors come back in words, it has a time limit, and a fresh one follows a dead one."""

import os
import signal
import subprocess
import sys
import time

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
        assert worker.lives == 4
    finally:
        worker.close()


def test_an_exported_engines_memory_holds_no_torch() -> None:
    code = "import sys, nbp_bench.cli, nbp_bench.worker, nbp_bench.plan; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False\n"
