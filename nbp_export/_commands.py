"""What the two command lines share: errors and warnings as one line each, and the choice of a runtime."""

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


class _Refusal(click.ClickException):
    exit_code = UsageError.exit_code


class Commands(click.Group):
    """A group of commands that print this distribution's errors and warnings as one line, without a traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line; what a terminal or a locale cannot show is printed as an escape."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **options)
        except OSError as error:  # of the help, which is printed before there is a command
            click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exits with the error's own code if it fails."""
        try:
            with plain_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nAborted!", err=True)  # the line before it ends with the terminal's ^C
            sys.exit(128 + signal.SIGINT)  # as shells have it; click's own is 1
        except NbpError as error:
            kind = _Refusal if error.exit_code == _Refusal.exit_code else click.ClickException
            raise kind(error.message) from error


class RuntimeName(click.ParamType[str]):
    """The name of a runtime in the registry, which is read when it is needed: the help lists what is there then."""

    name = "runtime"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002
        """`[ort-cpu|…]`, for the help."""
        return f"[{'|'.join(RUNTIMES)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name; a usage error that lists the names if it is another."""
        if value not in RUNTIMES:
            self.fail(f"{value!r} is not a runtime: choose among {', '.join(RUNTIMES)}.", param, ctx)
        return str(value)


def runtime_help() -> str:
    """The registry in one sentence, with the extra that installs each runtime."""
    return "; ".join(f"{runtime.name}: {runtime.title} (extra {runtime.extra})" for runtime in RUNTIMES.values())


@contextmanager
def plain_warnings() -> Iterator[None]:
    """While it lasts, our warnings are printed as one line on standard error."""
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
