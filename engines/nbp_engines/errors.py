"""The one family of errors: each message says what, where, and the command or change that cures it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import click


class NbpError(click.ClickException):
    """Root of the family. Being a `ClickException`, any command prints it as one line and exits with 1."""


class UsageError(NbpError):
    """What was asked for cannot be: the commands exit with 2."""

    exit_code = 2


class BundleError(NbpError):
    """A folder that is not a bundle, or not the one that its manifest describes."""


class EngineError(NbpError):
    """A runtime that is missing, or refuses a graph or its inputs."""


class ReceiptWarning(UserWarning):
    """A bundle without a valid receipt: nothing proves that its graphs do what the reference does."""


@contextmanager
def plain_warnings() -> Iterator[None]:
    """While it lasts, our warnings are printed as commands print our errors: one line, on standard error."""
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
