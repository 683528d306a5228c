"""Work in a process of its own, with a time limit: its memory is its own, and what kills it kills nothing else.

The parent and the child talk in pairs: a function with arguments goes in, its result or an error comes out. The child
keeps a `Host` between calls, which holds what is open there.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
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
        message: one line.
        trace: where it happened, if it is not an error of ours.
        fatal: whether the process cannot be trusted after it.
        exit_code: of the error.
    """

    message: str
    trace: str
    fatal: bool
    exit_code: int = NbpError.exit_code


class WorkerError(EngineError):
    """A call that failed in the child, in its own words; `trace` shows where if it was not an error of ours."""

    def __init__(self, message: str, trace: str = "", exit_code: int = NbpError.exit_code) -> None:
        super().__init__(message)
        self.trace = trace
        self.exit_code = exit_code


class Worker:
    """The parent's end of a process, which starts with the first call and again after a failure that ended it.

    Attributes:
        lives: how many processes there have been: whatever an earlier one had open is gone.
    """

    def __init__(self) -> None:
        self.lives = 0
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable[..., R], *arguments: object, seconds: float | None = None) -> R:
        """Run a module's function on the child's host, for at most so many seconds.

        Raises WorkerError if it fails, dies or takes longer; the next call then finds a fresh process, unless the error
        was one of ours.
        """
        pipe = self._started()
        with suppress(BrokenPipeError):  # a dead child: receiving says more
            pipe.send((function, arguments))
        try:
            if not pipe.poll(seconds):
                self.close(kill=True)
                raise WorkerError(f"it took longer than {seconds:.0f} s")
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
        """Whether the process of the last call is still there, with all that it has open."""
        return self._pipe is not None and self._process is not None and self._process.is_alive()

    def _started(self) -> Connection:
        if self._pipe is None or not self.running:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self.lives += 1
        return self._pipe

    def _death(self) -> WorkerError:
        assert self._process
        self._process.join(timeout=10)
        code = self._process.exitcode
        self.close(kill=True)
        return WorkerError(f"its process died with exit code {code}{' (out of memory?)' * (code == -signal.SIGKILL)}")

    def close(self, kill: bool = False) -> None:
        """End the process, at once if it is to be killed."""
        if self._pipe and not kill:
            with suppress(OSError):
                self._pipe.send(None)
        if self._process:
            if not kill:
                self._process.join(timeout=10)
            self._process.kill()
            self._process.join(timeout=10)  # one that waits for a driver may outlive its death
        self._process = self._pipe = None


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
