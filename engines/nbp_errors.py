"""The errors that every package of this distribution raises on purpose.

Each message says what is wrong, where, and how to fix it, and the command lines print it as one line. The module stands
beside the packages and imports nothing, so that each of them can raise its errors.
"""

# White space that `str.isprintable` rejects although terminals print it. It occurs in file names.
_SPACES = {"\xa0", "\u1680", "\u202f", "\u205f", "\u3000", *map(chr, range(0x2000, 0x200B))}


class NbpError(Exception):
    """The base class of our errors.

    Attributes:
        message: what is wrong, where, and the command or change that fixes it. Control characters are escaped, because
            a message may quote file names and the messages of other libraries.
        exit_code: the exit status of a command that fails with this error.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        # Our own messages may contain lists: one line per item, indented by two spaces. These line breaks stay.
        self.message = "\n  ".join(printable(line) for line in message.split("\n  "))
        super().__init__(self.message)


class UsageError(NbpError):
    """A request that cannot be met, such as a wrong option or argument. Commands exit with status 2."""

    exit_code = 2


def printable(text: object) -> str:
    """Return the text with an escape in place of every character that a terminal would interpret or could not print.

    These are control characters including line breaks, marks that change the direction of writing, and the surrogates
    that Python uses for bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() or c in _SPACES else ascii(c)[1:-1] for c in str(text))
