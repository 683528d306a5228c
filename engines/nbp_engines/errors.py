"""The one family of errors: each message says what, where, and the command or change that cures it."""

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
