"""What can be wrong with what a user hands the reference: one family, each message with its cure."""

import click


class ReferenceError(click.ClickException):  # noqa: A001 - the builtin of this name is about weakrefs
    """Root of the family. Being a `ClickException`, any command prints it as one line and exits with 1."""


class BlockShapeError(ReferenceError):
    """A block shape that cannot be read or does not tile its latent."""

    exit_code = 2


class CheckpointError(ReferenceError):
    """A checkpoint that cannot be loaded: the message names the file, the key and the shapes."""
