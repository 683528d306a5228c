"""How every package of this distribution writes files: whole or not at all, in a locked folder, with space for them.

The module stands beside the packages, as `nbp_errors` does, and imports only that.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nbp_errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, of the same suffix; the file written there takes the name `path` at the end.

    If the body of the `with` statement fails, the file that `path` named before stays as it was, and nothing else is
    left. The file's mode follows the umask. Raises OSError if the file cannot be renamed.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            error.filename = str(path)  # the name that the caller knows
        # Whatever stopped the write may stop the removal too; the first error is the one to report.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `replacing` does. Raises OSError if the disk refuses it."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 as `replacing` does. Surrogates, which UTF-8 cannot encode, become escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, data: object) -> None:
    """Write a value as indented JSON as `replacing` does."""
    write_text(path, json.dumps(data, indent=1) + "\n")


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[bool | None]:
    """Lock a folder until the `with` statement or this process ends, however it ends.

    Yields True if this process holds the lock, False if another one does, None if the system or the file system has no
    locks. With `wait`, it waits for the other process. The folder itself is locked, because a library such as filelock
    would leave a lock file beside it.
    """
    with ExitStack() as closing:
        held: bool | None = None
        with suppress(ImportError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            closing.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                held = True
            except BlockingIOError:
                held = False
        yield held


def require_space(folder: Path, nbytes: int) -> None:
    """Raise UsageError if the disk of a folder, which need not exist yet, has less than `nbytes` bytes free."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    with suppress(OSError):  # a disk whose free space is unknown may have enough
        free = shutil.disk_usage(existing).free
        if free < nbytes:
            raise UsageError(
                f"{folder} needs {nbytes / 1e9:,.1f} GB and its disk has {free / 1e9:,.1f} GB free: free space there, "
                "or choose another folder"
            )
