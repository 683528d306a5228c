"""Shell commands for messages, quoted so that a shell reads exactly the same words."""

import os
import shlex
import sys
from pathlib import Path

from nbp_errors import printable


def command_line(*words: object) -> str:
    """Return the words as one shell command. A path that begins with a dash gets `./` in front.

    A word with characters that cannot be printed is written as `$'…'` with escapes, which bash, ksh and zsh understand.
    """
    return " ".join(_quoted(f"./{word}" if isinstance(word, Path) and str(word)[0] == "-" else word) for word in words)


def _quoted(word: object) -> str:
    text = str(word)
    if text == printable(text):
        return shlex.quote(text)
    return f"$'{''.join(map(_escaped, text))}'"


def _escaped(character: str) -> str:
    code = ord(character)
    if character in "\\'":
        return f"\\{character}"
    if character == printable(character):
        return character
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def is_utf8(path: os.PathLike[str]) -> bool:
    """Return whether a path has the same bytes in UTF-8, which libraries use, and in the locale's encoding."""
    try:
        return os.fsencode(path) == os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        return False


def utf8_advice(change: str) -> str:
    """Return the advice for a name that is not UTF-8: a change, and a setting if the locale's encoding is another."""
    encoding = sys.getfilesystemencoding()
    return change if encoding == "utf-8" else f"{change}, or set PYTHONUTF8=1, since names are read as {encoding} here"
