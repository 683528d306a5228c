"""Code that `nbp-export` and `nbp-bench` share: one-line errors and warnings, and the option `--runtime`."""

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, TextIO

import click

from nbp_engines.errors import ReceiptWarning
from nbp_engines.registry import RUNTIMES
from nbp_errors import NbpError, UsageError


class _UsageFailure(click.ClickException):
    exit_code = UsageError.exit_code


class Commands(click.Group):
    """A group of commands that print this distribution's errors and warnings as one line, without a traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line, and print an escape for each character that the locale's encoding lacks."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. If it fails with an NbpError, print its message and exit with its code."""
        try:
            with plain_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nAborted!", err=True)  # the line before it ends with the terminal's ^C
            sys.exit(128 + signal.SIGINT)  # as shells have it; click's own is 1
        except NbpError as error:
            kind = _UsageFailure if error.exit_code == _UsageFailure.exit_code else click.ClickException
            raise kind(error.message) from error


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
