"""Files from the Hugging Face Hub, where that is what a `--checkpoint` or `--tokenizer` names."""

import re
from pathlib import Path

from nbp_errors import NbpError
from nbp_export._extras import need

_SUFFIXES = (".ckpt", ".pt", ".safetensors")
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w.-]+))?(?:/(.+))?")


def fetch(path: Path) -> Path:
    """The file that is meant: a path that exists, else `ORG/REPO[@REVISION][/FILE]` on the Hub, downloaded or cached.

    FILE may be left out where the repository holds one checkpoint. Raises NbpError, in one line, where there is no such
    file here and it is no Hub id, the Hub has no such repository or file, or it cannot be reached.
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
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo, revision, file = asked.groups()
    try:
        files = _files(repo, revision)
    except ConnectionError as error:
        cached = file and try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        hint = "it is not in the cache either" if file else "a cached file is found as ORG/REPO/FILE"
        raise NbpError(f"{text}: no such file here, and the Hub cannot be reached ({error}); {hint}") from error
    fitting = [file] if file in files else [] if file else [each for each in files if each.endswith(_SUFFIXES)]
    if len(fitting) != 1:
        there = ", ".join(f"{repo}/{each}" for each in files if each.endswith(_SUFFIXES)) or "no checkpoint"
        raise NbpError(f"{text}: which file? On the Hub there is: {there}")
    return Path(hf_hub_download(repo, fitting[0], revision=revision))


def _files(repo: str, revision: str | None) -> list[str]:
    """What a repository holds; raises NbpError where there is none, ConnectionError where nobody answers."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # One request and no retries, unlike a download's half a minute of them.
        return [file.rfilename for file in model_info(repo, revision=revision, timeout=10).siblings or ()]
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NbpError(
            f"{repo}: no such file here, and no model on the Hub that you may read; for a private one: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise NbpError(f"{repo} on the Hub has no revision {revision}") from error
    except Exception as error:  # of the transport, which differs between versions of the library
        raise ConnectionError(str(error).splitlines()[0]) from error
