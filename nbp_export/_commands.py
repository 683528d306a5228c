"""Code that `nbp-export` and `nbp-bench` share: one-line errors and warnings, and the option `--runtime`."""

import errno
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import click

from nbp_engines.errors import ReceiptWarning
from nbp_engines.registry import RUNTIMES
from nbp_errors import NbpError, UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console


MOST_THREADS = 1024  # a larger number is a typing error


class _UsageFailure(click.ClickException):
    exit_code = UsageError.exit_code


class _Terminated(BaseException):
    """Raised in the main thread when a signal asks the process to end.

    Attributes:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Commands(click.Group):
    """A group of commands that end in one line, without a traceback, on errors, warnings and signals.

    They clean up when a signal ends them, and exit with 128 plus the signal's number, as shells do.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line, and print an escape for each character that the locale's encoding lacks."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **options)
        except OSError as error:  # from printing the help, which happens before a command is invoked
            click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. If it fails with an NbpError or an OSError, print its message and exit with its code."""
        try:
            _require_current_folder()
            with plain_warnings(), _signals_raise():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nAborted!", err=True)  # the terminal has printed ^C without a line break
            sys.exit(128 + signal.SIGINT)
        except _Terminated as end:
            click.echo(f"Ended by {signal.Signals(end.number).name}.", err=True)
            sys.exit(128 + end.number)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search("allocate memory|overflow", str(error)):
                raise
            raise click.ClickException("there is too little memory: choose a smaller --batch or model") from error
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # not from the operating system; a closed pipe, which click handles
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(printable(f"{where}{error.strerror}")) from error
        except NbpError as error:
            kind = _UsageFailure if error.exit_code == _UsageFailure.exit_code else click.ClickException
            raise kind(error.message) from error


def _require_current_folder() -> None:
    """Raise UsageError if the current folder was deleted; libraries would fail in worse ways."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError("the current folder was deleted: change to another folder") from error


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Inside this context, let SIGTERM and SIGHUP raise as Ctrl-C does, so that partial files are removed."""

    def terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for other in defaults:
            signal.signal(other, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        raise _Terminated(number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # Handlers that `nohup` or a calling program installed are kept.
    defaults = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in defaults:
            signal.signal(number, terminate)
        yield
    finally:
        for number in defaults:
            signal.signal(number, signal.SIG_DFL)


class RuntimeName(click.ParamType[str]):
    """The name of a registered runtime. The registry is read at each use, so that the help lists all of its entries."""

    name = "runtime"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002
        """Return the names for the help, as in `[ort-cpu|…]`."""
        return f"[{'|'.join(RUNTIMES)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name. Fails with a usage error that lists all names if there is no such runtime."""
        if value not in RUNTIMES:
            self.fail(f"{value!r} is not a runtime: choose one of {', '.join(RUNTIMES)}.", param, ctx)
        return str(value)


def runtime_help() -> str:
    """Return one line of help that names each registered runtime and the extra that installs it."""
    return "; ".join(f"{runtime.name}: {runtime.title} (extra {runtime.extra})" for runtime in RUNTIMES.values())


def plain_console(stderr: bool = False) -> "Console":
    """Return a console that prints names unchanged, even those that look like markup or like the code of an emoji."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if console.width < 1:  # COLUMNS=0 would make rich print nothing
        console.width = 80
    return console


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print every ReceiptWarning as one line on standard error inside this context."""
    with warnings.catch_warnings():
        standard = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, ReceiptWarning):
                click.echo(f"Warning: {message}", err=True)
            else:
                standard(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield
