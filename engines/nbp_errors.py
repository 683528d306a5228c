"""The one family of errors of this distribution: each message says what is wrong, where, and what cures it.

It stands beside the packages and imports nothing, so that each of them can raise from it. The command lines print the
message as one line.
"""

# Spaces that `str.isprintable` refuses and that a terminal prints: file names hold them.
_SPACES = {"\xa0", "\u1680", "\u202f", "\u205f", "\u3000", *map(chr, range(0x2000, 0x200B))}


class NbpError(Exception):
    """The root of the family.

    Attributes:
        message: what is wrong, where, and the command or change that cures it. Whatever a terminal would obey is
            escaped: file names and other people's messages stand in it.
        exit_code: what a command exits with.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        # Our own lists have a line for each item, indented by two spaces.
        self.message = "\n  ".join(printable(line) for line in message.split("\n  "))
        super().__init__(self.message)


class UsageError(NbpError):
    """A request that cannot be met as it is; the commands exit with 2."""

    exit_code = 2


def printable(text: object) -> str:
    """The text as it is, but with an escape for each character that a terminal would obey or refuse.

    Those are control characters, line breaks among them, marks that turn the direction of writing, and the half
    characters that stand for bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() or c in _SPACES else ascii(c)[1:-1] for c in str(text))
