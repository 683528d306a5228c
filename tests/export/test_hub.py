"""Checkpoints from the Hub: the real library with a local server in place of the Hub, with its cache, and offline."""

import errno
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner

from nbp_errors import NbpError
from nbp_export import _extras, hub
from nbp_export.cli import main
from nbp_reference import checkpoint
from tests.support import small_generator

ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
# What the server answers to a request for a file, instead of sending it: status and headers.
STATUSES: dict[str, tuple[int, dict[str, str]]] = {
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted.\tAsk."}),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "forbidden": (403, {"X-Error-Message": "Forbidden for you."}),
    "moved": (404, {"X-Error-Code": "EntryNotFound"}),
    "unavailable": (501, {}),
}
TROUBLES = (*STATUSES, "reset", "half", "stored")
# What it answers to a request for the list of files: status, content and headers.
LISTINGS: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "list500": (500, b"oops", {}),
    "list429": (429, b"slow down", {}),
    "listpage": (200, b"<html>please log in to this network</html>", {"Content-Type": "text/html"}),
    "listgated": (403, b"", {"X-Error-Code": "GatedRepo"}),
}
NOBODY = "http://127.0.0.1:9"  # an address at which nothing listens


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    checkpoint.save(small_generator("1x1x4", layers=1), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def address(weights: bytes) -> Iterator[str]:
    """The address of a server with repositories of one, two and no checkpoints, and one for each kind of failure."""
    repositories: Mapping[str, Mapping[str, bytes]] = {
        "org/one": {"README.md": b"read me", "16/a.safetensors": weights},
        "org/two": {"a.ckpt": b"not", "b.pt": b"here"},
        "org/none": {"README.md": b"read me"},
        **{f"org/{trouble}": {"a.ckpt": weights} for trouble in TROUBLES},
    }

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                revision = parts[5] if len(parts) > 4 else "main"
                self.answer_about("/".join(parts[2:4]), revision)
            else:
                self.answer_with("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

        def trouble(self, name: str) -> None:
            """Answer as a Hub that refuses or fails, with the headers from which the library reads the reason."""
            if name == "reset" and self.command == "GET":
                self.break_off(b"")
            elif name == "half" and self.command == "GET":
                self.break_off(weights[: len(weights) // 2])
            elif name in STATUSES:
                status, headers = STATUSES[name]
                self.answer(status, b"oops\nand more", headers)
            else:
                self.answer(200, weights, {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha256(weights).hexdigest()}"'})

        def break_off(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(weights)))
            self.end_headers()
            self.wfile.write(content)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def do_HEAD(self) -> None:
            self.do_GET()

        def answer_about(self, repo: str, revision: str) -> None:
            if (name := repo.partition("/")[2]) in LISTINGS:
                self.answer(*LISTINGS[name])
            elif repo not in repositories:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", "v1", SHA):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                files = [{"rfilename": name} for name in repositories[repo]]
                self.answer(200, json.dumps({"id": repo, "sha": SHA, "siblings": files}).encode())

        def answer_with(self, repo: str, revision: str, name: str) -> None:
            if (kind := repo.partition("/")[2]) in TROUBLES:
                self.trouble(kind)
                return
            content = repositories[repo][name]
            digest = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"X-Repo-Commit": SHA, "ETag": f'"{digest}"', "X-Revision": revision})

        def answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetched(text: str, folder: Path, address: str, **environment: str) -> str:
    """Return what `fetch` gives in a new process: the path, or the one line of its error.

    A new process is needed because the library reads its environment variables once.
    """
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from nbp_engines.errors import NbpError\nfrom nbp_export.hub import fetch\n"
        "try: print(fetch(Path(sys.argv[1])))\n"
        "except NbpError as error: print(error.message)"
    )
    path = os.pathsep.join(str(ROOT / home) for home in (".", "engines"))
    settings = {
        "HF_ENDPOINT": address,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder),
        "PYTHONPATH": path,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, text],
        cwd=folder,
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout
    return lines[0]


@pytest.mark.parametrize(
    "text", ["org/one", "org/one/16/a.safetensors", "org/one@v1", f"org/one@{SHA}/16/a.safetensors"]
)
def test_a_file_is_downloaded_and_then_cached(text: str, address: str, weights: bytes, tmp_path: Path) -> None:
    path = Path(fetched(text, tmp_path, address))
    assert path.parts[-3:] == (SHA, "16", "a.safetensors")
    assert path.read_bytes() == weights
    assert checkpoint.load(path).generator is not None
    if text.endswith("a.safetensors"):
        assert fetched(text, tmp_path, NOBODY) == str(path)
        assert fetched(text, tmp_path, address, HF_HUB_OFFLINE="1") == str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("org/two", "org/two does not name one checkpoint on the Hub: choose org/two/a.ckpt, org/two/b.pt"),
        ("org/two/c.pt", "org/two/c.pt does not name one checkpoint on the Hub: choose org/two/a.ckpt, org/two/b.pt"),
        ("org/none", "org/none does not name one checkpoint on the Hub: choose another repository"),
        ("org/lost", "org/lost is neither a local file nor a model on the Hub that you can read"),
        ("org/lost/a.ckpt", "org/lost is neither a local file nor a model on the Hub that you can read"),
        ("org/one@v9", "org/one on the Hub has no revision v9"),
        ("o--rg/one/a.ckpt", "o--rg/one is neither a local file nor a model on the Hub"),
    ],
)
def test_what_the_hub_does_not_have_is_reported(text: str, message: str, address: str, tmp_path: Path) -> None:
    assert fetched(text, tmp_path, address).startswith(message)


@pytest.mark.parametrize(
    "environment",
    [{}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://hub.invalid"}],
    ids=["refused", "off", "no_name"],
)
def test_an_unreachable_hub_is_reported_without_delay(environment: dict[str, str], tmp_path: Path) -> None:
    start = time.monotonic()
    message = fetched("org/one/a.ckpt", tmp_path, NOBODY, **environment)
    assert message.startswith("org/one/a.ckpt is not a local file, and the Hub cannot be reached (")
    assert message.endswith("the cache does not hold the file either")
    assert fetched("org/one", tmp_path, NOBODY, **environment).endswith("to use a cached file, give ORG/REPO/FILE")
    assert time.monotonic() - start < 20  # the library by itself retries for 23 seconds at each call


def test_a_cache_that_the_library_wrote_is_used(weights: bytes, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--org--one"
    for name, content in {"refs/main": SHA.encode(), f"snapshots/{SHA}/a.ckpt": weights}.items():
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_bytes(content)
    path = fetched("org/one/a.ckpt", tmp_path, NOBODY)
    assert path == str(repository / "snapshots" / SHA / "a.ckpt")
    assert checkpoint.load(Path(path)).generator is not None


def test_an_existing_path_is_preferred_to_the_hub(
    weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/one", "org/two/a.ckpt", "org/two@v1"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(weights)
        assert hub.fetch(Path(name)) == Path(name)


@pytest.mark.parametrize(
    "text",
    ["a.ckpt", "runs/a.ckpt", "/nowhere/a.ckpt", "../org/one/a.ckpt", "org/one@/a.ckpt", "@v1/one/a.ckpt"],
)
def test_what_is_neither_a_path_nor_an_id_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NbpError, match=r"is neither a file nor a Hub id: check the path, or give ORG/REPO"):
        hub.fetch(Path(text))


def test_a_missing_library_is_reported_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_extras, "find_spec", lambda _: None)
    with pytest.raises(NbpError, match=r"huggingface_hub is not installed: pip install 'nbp-export\[hub"):
        hub.fetch(Path("org/one/a.ckpt"))


@pytest.mark.parametrize("option", ["--checkpoint", "--tokenizer"])
def test_the_command_takes_an_id(option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: bytes) -> None:
    """The real library is offline here, so the command fails with one line and exit status 1."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here.safetensors").write_bytes(weights)
    files = {"--checkpoint": "here.safetensors"} | {option: "org/one/a.ckpt"}
    result = CliRunner().invoke(main, ["onnx", *(word for pair in files.items() for word in pair)])
    assert result.exit_code == 1
    assert "the Hub cannot be reached" in " ".join(result.output.split())
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gated",
            "org/gated/a.ckpt: access is restricted: request access on {address}/org/gated, then run `hf auth",
        ),
        ("disabled", "org/disabled/a.ckpt: the Hub has disabled this repository"),
        ("forbidden", "org/forbidden/a.ckpt: the Hub denies access (403 Forbidden"),
        ("moved", "org/moved/a.ckpt: the Hub lists this file but does not have it: try another revision"),
        ("unavailable", "org/unavailable/a.ckpt: the Hub answered 501 instead of sending the file: try again later"),
        ("reset", "org/reset/a.ckpt: the download was interrupted ("),
        ("half", "org/half/a.ckpt: the download was interrupted ("),
        ("list500", "org/list500 is not a local file, and the Hub answered 500; to use a cached file"),
        ("list429", "org/list429 is not a local file, and the Hub answered 429; to use a cached file"),
        ("listpage", "org/listpage is not a local file, and the Hub cannot be reached ("),
        ("listgated", "org/listgated: access is restricted: request access on {address}/org/listgated, then run"),
    ],
)
def test_a_hub_that_refuses_or_fails_is_reported_in_one_line(
    name: str, message: str, address: str, weights: bytes, tmp_path: Path
) -> None:
    assert fetched(f"org/{name}", tmp_path, address).startswith(message.format(address=address))
    assert not list(tmp_path.rglob("*.ckpt")), "a part of the file would be taken for the whole file"
    assert len(weights) > 2


@pytest.mark.parametrize(
    ("cache", "reason"), [("/dev/null/cache", "Not a directory"), ("/proc/cache", "No such file or directory")]
)
def test_a_cache_that_cannot_hold_the_file(cache: str, reason: str, address: str, tmp_path: Path) -> None:
    message = fetched("org/stored", tmp_path, address, HF_HUB_CACHE=cache)
    assert message.startswith(f"org/stored/a.ckpt: the cache {cache} cannot store the file ({reason}): free space")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_full_or_read_only_cache(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number), "/cache/blobs/0.incomplete")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(
        NbpError, match=re.escape(f"cannot store the file ({os.strerror(number)}): free space there")
    ) as error:
        hub._download("org/one", None, "a.ckpt")
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "error", [RuntimeError(), RuntimeError("\n"), ValueError("first\nsecond"), ConnectionResetError()]
)
def test_errors_with_no_message_or_with_several_lines(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.chdir(tmp_path)
    for name in ("model_info", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    with pytest.raises(NbpError) as listing:
        hub.fetch(Path("org/one"))
    with pytest.raises(NbpError) as download:
        hub._download("org/one", None, "a.ckpt")
    for caught in (listing, download):
        assert "\n" not in caught.value.message
        assert "second" not in caught.value.message


def test_the_librarys_own_messages_are_suppressed(address: str, tmp_path: Path) -> None:
    """Nothing but our message is printed, and the level of its logger is restored afterwards."""
    code = (
        "import logging, sys, huggingface_hub.file_download, nbp_export.hub as hub\nfrom pathlib import Path\n"
        "log = logging.getLogger('huggingface_hub'); before = log.level\n"
        "try: hub.fetch(Path('org/unavailable'))\nexcept Exception as error: print(type(error).__name__)\n"
        "assert log.level == before"
    )
    path = os.pathsep.join(str(ROOT / home) for home in (".", "engines"))
    environment = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "NbpError\n"
    assert done.stderr == ""
