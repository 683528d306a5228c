"""The one family of errors of this distribution: each message says what is wrong, where, and what cures it.

It stands beside the packages and imports nothing, so that each of them can raise from it. The command lines print the
message as one line.
"""


class NbpError(Exception):
    """The root of the family.

    Attributes:
        message: what is wrong, where, and the command or change that cures it.
        exit_code: what a command exits with.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UsageError(NbpError):
    """A request that cannot be met as it is; the commands exit with 2."""

    exit_code = 2
