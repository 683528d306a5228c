"""Resolves the values of `--checkpoint` and `--tokenizer`: local files, or files on the Hugging Face Hub."""

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
# Errors of a file system. An OSError with any other number came from the network.
_STORAGE_ERRORS = {
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
    """Return a local path for a path or an id on the Hub. A file on the Hub is downloaded unless it is in the cache.

    A path that exists is returned unchanged. An id on the Hub has the form `ORG/REPO[@REVISION][/FILE]`. FILE may be
    left out if the repository holds exactly one checkpoint.

    Raises NbpError if the path neither exists nor has this form, if the Hub has no such repository or file, denies
    access, fails or cannot be reached, or if the cache cannot store the file.
    """
    text = path.as_posix()
    try:
        if path.exists():
            return path
    except OSError:
        return path  # reading it will fail too, with a message that says why
    hub_id = _ID.fullmatch(text)
    if not hub_id or (text.endswith(_SUFFIXES) and not hub_id[2] and not hub_id[3]):
        raise NbpError(f"{text} is neither a file nor a Hub id: check the path, or give ORG/REPO or ORG/REPO/FILE")
    need("hub", "huggingface_hub")
    from huggingface_hub import try_to_load_from_cache

    repo, revision, file = hub_id.groups()
    try:
        files = _list_files(repo, revision)
    except ConnectionError as error:
        cached = file and try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        hint = "the cache does not hold the file either" if file else "to use a cached file, give ORG/REPO/FILE"
        raise NbpError(f"{text} is not a local file, and {error}; {hint}") from error
    checkpoints = [name for name in files if name.endswith(_SUFFIXES)]
    matches = [name for name in files if name == file] if file else checkpoints
    if len(matches) != 1:
        choices = ", ".join(f"{repo}/{name}" for name in checkpoints) or "another repository, as it has no checkpoint"
        raise NbpError(f"{text} does not name one checkpoint on the Hub: choose {choices}")
    return _download(repo, revision, matches[0])


def _list_files(repo: str, revision: str | None) -> list[str]:
    """Return the names of a repository's files.

    Raises NbpError if there is no such repository or access is denied, ConnectionError if the request fails otherwise.
    """
    from huggingface_hub import model_info
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # This is one request without retries. A download would retry for half a minute.
        return [file.rfilename for file in model_info(repo, revision=revision, timeout=10).siblings or ()]
    except (DisabledRepoError, GatedRepoError) as error:
        raise NbpError(f"{repo}: {_reason(error, repo)}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NbpError(
            f"{repo} is neither a local file nor a model on the Hub that you can read: "
            "for a private model, run `hf auth login` first"
        ) from error
    except RevisionNotFoundError as error:
        raise NbpError(f"{repo} on the Hub has no revision {revision}: choose another, or leave it out") from error
    except Exception as error:  # a network error, whose class depends on the version of the library
        status = _status(error)
        problem = f"the Hub answered {status}" if status else f"the Hub cannot be reached ({_first_line(error)})"
        raise ConnectionError(problem) from error


def _download(repo: str, revision: str | None, file: str) -> Path:
    """Download a listed file into the cache unless it is there, and return its path; raises NbpError if this fails."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with _silent_library():
            return Path(hf_hub_download(repo, file, revision=revision))
    except LocalEntryNotFoundError as error:  # says only that the file is not cached; its cause is the real error
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise NbpError(f"{repo}/{file}: {_reason(cause, repo)}") from error
    except Exception as error:  # any error of the network or the file system
        raise NbpError(f"{repo}/{file}: {_reason(error, repo)}") from error


@contextmanager
def _silent_library() -> Iterator[None]:
    """Suppress the library's own messages about retries: a failure is reported once, in one line."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(level)


def _reason(error: Exception, repo: str) -> str:
    """Return why a file of a repository is not available, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import DisabledRepoError, EntryNotFoundError, GatedRepoError

    if isinstance(error, GatedRepoError):
        return f"access is restricted: request access on {constants.ENDPOINT}/{repo}, then run `hf auth login`"
    if isinstance(error, DisabledRepoError):
        return "the Hub has disabled this repository: ask its owner for the file"
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        return (
            f"the cache {constants.HF_HUB_CACHE} cannot store the file ({error.strerror}): free space there, "
            "or set HF_HUB_CACHE to another folder"
        )
    if isinstance(error, EntryNotFoundError):
        return "the Hub lists this file but does not have it: try another revision, ORG/REPO@REVISION/FILE"
    status = _status(error)
    if status in (401, 403):
        return f"the Hub denies access ({_first_line(error)}): log in with `hf auth login`"
    if status:
        return f"the Hub answered {status} instead of sending the file: try again later"
    return f"the download was interrupted ({_first_line(error)}): run the same command again"


def _status(error: Exception) -> int | None:
    """Return the HTTP status of the response behind an error, or None if there was no response."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).split("\n")), "").strip() or type(error).__name__
