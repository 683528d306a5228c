"""Calls in a separate process with a time limit, so that its memory can be measured and its death harms no other.

For each call, the parent sends a function with arguments, and the child sends back its result or an error. Between
calls the child keeps a `Host`, which holds the open models and sessions.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

from nbp_bench.host import Host
from nbp_engines.errors import EngineError
from nbp_errors import NbpError

R = TypeVar("R")


class _Failure(NamedTuple):
    """An error of the child.

    Attributes:
        message: the error message, one line.
        trace: the traceback, unless the error is an NbpError.
        fatal: whether the process can no longer be trusted.
        exit_code: the exit code of the error.
    """

    message: str
    trace: str
    fatal: bool
    exit_code: int = NbpError.exit_code


class WorkerError(EngineError):
    """A call that failed in the child, with the child's message.

    Attributes:
        trace: the child's traceback, unless its error was an NbpError.
    """

    def __init__(self, message: str, trace: str = "", exit_code: int = NbpError.exit_code) -> None:
        super().__init__(message)
        self.trace = trace
        self.exit_code = exit_code


class OverdueError(WorkerError):
    """A call that took longer than it was allowed to."""


class Worker:
    """The parent's end of a process, which starts with the first call, and again after a failure that ended it.

    Attributes:
        starts: number of processes started so far. What an earlier process had open is lost.
    """

    def __init__(self) -> None:
        self.starts = 0
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable[..., R], *arguments: object, seconds: float | None = None) -> R:
        """Call a module-level function with the child's host, for at most `seconds`, and return its result.

        Raises WorkerError if the call fails or the process dies, OverdueError if it takes longer. The next call then
        starts a fresh process, unless the call ended with an error after which CUDA still works.
        """
        pipe = self._started()
        with suppress(BrokenPipeError):  # the child has died, which receiving reports below
            pipe.send((function, arguments))
        try:
            if not pipe.poll(seconds):
                self.close(kill=True)
                raise OverdueError(f"it took longer than {seconds:.0f} s")
            answer = pipe.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        if isinstance(answer, _Failure):
            if answer.fatal:
                self.close(kill=True)
            raise WorkerError(answer.message, answer.trace, answer.exit_code)
        return answer  # type: ignore[no-any-return]

    @property
    def running(self) -> bool:
        """Whether the process of the last call is still running, with everything that it has open."""
        return self._pipe is not None and self._process is not None and self._process.is_alive()

    def _started(self) -> Connection:
        if self._pipe is None or not self.running:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with _shielded():
                self._process.start()
            theirs.close()
            self.starts += 1
        return self._pipe

    def _death(self) -> WorkerError:
        assert self._process
        self._process.join(timeout=10)
        code = self._process.exitcode
        self.close(kill=True)
        return WorkerError(f"its process died with exit code {code}{' (out of memory?)' * (code == -signal.SIGKILL)}")

    def close(self, kill: bool = False) -> None:
        """End the process: wait until it has closed everything, or kill it."""
        if self._pipe and not kill:
            with suppress(OSError):
                self._pipe.send(None)
        if self._process:
            if not kill:
                self._process.join(timeout=10)
            self._process.kill()
            self._process.join(timeout=10)  # a process that waits for a driver may take longer to die
        self._process = self._pipe = None


@contextmanager
def _shielded() -> Iterator[None]:
    """Shield processes that start in this context from Ctrl-C and from modules in the current folder.

    The child inherits a blocked SIGINT, so that only the parent receives Ctrl-C and then ends the child. In safe path
    mode, Python does not import a `types.py` or `socket.py` that happens to lie in the current folder. The process that
    tracks semaphores for multiprocessing starts here too; it need not warn about those of a child that was killed.
    """
    warnings = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]))
    changes = {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": warnings}
    before = {name: os.environ.get(name) for name in changes}
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ |= changes
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _serve(pipe: Connection) -> None:
    host = Host()
    try:
        while (message := pipe.recv()) is not None:
            pipe.send(_answer(host, *message))
        host.close()
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        pass


def _answer(host: Host, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(host, *arguments)
    except NbpError as error:
        return _Failure(error.message, "", host.cuda_failed(), error.exit_code)
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return _Failure(line[:300], traceback.format_exc(), fatal=not host.cuda_works())
