"""What can be wrong with records."""

import click


class RecordError(click.ClickException):
    """A file that does not hold records of this version; any command prints it as one line and exits with 1."""
