"""Files from the Hugging Face Hub, where that is what a `--checkpoint` or `--tokenizer` names."""

import errno
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbp_errors import NbpError
from nbp_export._extras import need

_SUFFIXES = (".ckpt", ".pt", ".safetensors")
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w.-]+))?(?:/(.+))?")
# What a file system answers; everything else that has a number came over the network.
_NOT_STORED = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EIO,
}


def fetch(path: Path) -> Path:
    """The file that is meant: a path that exists, else `ORG/REPO[@REVISION][/FILE]` on the Hub, downloaded or cached.

    FILE may be left out where the repository holds one checkpoint. Raises NbpError, in one line, where there is no such
    file here and it is no Hub id, the Hub has no such repository or file, refuses it or breaks off, it cannot be
    reached, or the cache cannot hold the file.
    """
    text = path.as_posix()
    try:
        if path.exists():
            return path
    except OSError:
        return path  # reading it fails as well, and then says why
    asked = _ID.fullmatch(text)
    if not asked or (text.endswith(_SUFFIXES) and not asked[2] and not asked[3]):
        raise NbpError(f"{text}: no such file, and no Hub id: those are ORG/REPO or ORG/REPO/FILE")
    need("hub", "huggingface_hub")
    from huggingface_hub import try_to_load_from_cache

    repo, revision, file = asked.groups()
    try:
        files = _files(repo, revision)
    except ConnectionError as error:
        cached = file and try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        hint = "it is not in the cache either" if file else "a cached file is found as ORG/REPO/FILE"
        raise NbpError(f"{text}: no such file here, and {error}; {hint}") from error
    fitting = [file] if file in files else [] if file else [each for each in files if each.endswith(_SUFFIXES)]
    if len(fitting) != 1:
        there = ", ".join(f"{repo}/{each}" for each in files if each.endswith(_SUFFIXES)) or "no checkpoint"
        raise NbpError(f"{text}: which file? On the Hub there is: {there}")
    return _downloaded(repo, revision, fitting[0])


def _files(repo: str, revision: str | None) -> list[str]:
    """What a repository holds; raises NbpError where there is none, ConnectionError where nobody answers."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # One request and no retries, unlike a download's half a minute of them.
        return [file.rfilename for file in model_info(repo, revision=revision, timeout=10).siblings or ()]
    except (DisabledRepoError, GatedRepoError) as error:
        raise NbpError(f"{repo}: {_told(error, repo)}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NbpError(
            f"{repo}: no such file here, and no model on the Hub that you may read; for a private one: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise NbpError(f"{repo} on the Hub has no revision {revision}") from error
    except Exception as error:  # of the transport, which differs between versions of the library
        status = _status(error)
        why = f"the Hub answers {status}" if status else f"the Hub cannot be reached ({_first_line(error)})"
        raise ConnectionError(why) from error


def _downloaded(repo: str, revision: str | None, file: str) -> Path:
    """A file that the Hub lists, in the cache; raises NbpError, in one line, for whatever keeps it from there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with _silence():
            return Path(hf_hub_download(repo, file, revision=revision))
    except LocalEntryNotFoundError as error:  # no more than that it is not cached: the cause is why it has to be
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise NbpError(f"{repo}/{file}: {_told(cause, repo)}") from error
    except Exception as error:  # of the transport and the file system, whichever they are
        raise NbpError(f"{repo}/{file}: {_told(error, repo)}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """The library retries and warns in lines of its own; what comes of it is told in one."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(before)


def _told(error: Exception, repo: str) -> str:
    """What went wrong with a repository's file, and the cure."""
    from huggingface_hub import constants
    from huggingface_hub.errors import DisabledRepoError, EntryNotFoundError, GatedRepoError

    if isinstance(error, GatedRepoError):
        return f"access is restricted: ask for it on {constants.ENDPOINT}/{repo}, then log in with `hf auth login`"
    if isinstance(error, DisabledRepoError):
        return "the Hub has disabled this repository: ask its owner for the file"
    if isinstance(error, OSError) and error.errno in _NOT_STORED:
        return (
            f"the cache {constants.HF_HUB_CACHE} cannot hold it ({error.strerror}): free space there, "
            "or set HF_HUB_CACHE to another folder"
        )
    if isinstance(error, EntryNotFoundError):
        return "the Hub lists this file and does not have it: try another revision, ORG/REPO@REVISION/FILE"
    status = _status(error)
    if status in (401, 403):
        return f"the Hub refuses it ({_first_line(error)}): log in with `hf auth login`"
    if status:
        return f"the Hub answers {status} in place of it: try again later"
    return f"the download broke off ({_first_line(error)}): give the same command again"


def _status(error: Exception) -> int | None:
    """The status of the answer that an error is about, if there was an answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).split("\n")), "").strip() or type(error).__name__
