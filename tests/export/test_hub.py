"""Checkpoints from the Hub: the real library against a Hub of this machine's, its cache, and no Hub at all."""

import hashlib
import json
import os
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
NOBODY = "http://127.0.0.1:9"  # where nothing listens


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    checkpoint.save(small_generator("1x1x4", layers=1), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def address(weights: bytes) -> Iterator[str]:
    """A Hub with three model repositories: of one checkpoint, of two, of none."""
    repositories: Mapping[str, Mapping[str, bytes]] = {
        "org/one": {"README.md": b"read me", "16/a.safetensors": weights},
        "org/two": {"a.ckpt": b"not", "b.pt": b"here"},
        "org/none": {"README.md": b"read me"},
    }

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                revision = parts[5] if len(parts) > 4 else "main"
                self.answer_about("/".join(parts[2:4]), revision)
            else:
                self.answer_with("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

        def do_HEAD(self) -> None:
            self.do_GET()

        def answer_about(self, repo: str, revision: str) -> None:
            if repo not in repositories:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", "v1", SHA):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                files = [{"rfilename": name} for name in repositories[repo]]
                self.answer(200, json.dumps({"id": repo, "sha": SHA, "siblings": files}).encode())

        def answer_with(self, repo: str, revision: str, name: str) -> None:
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
    """What a fresh process says, for the library reads its environment once: the path, or one line of an error."""
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
        ("org/two", "org/two: which file? On the Hub there is: org/two/a.ckpt, org/two/b.pt"),
        ("org/two/c.pt", "org/two/c.pt: which file? On the Hub there is: org/two/a.ckpt, org/two/b.pt"),
        ("org/none", "org/none: which file? On the Hub there is: no checkpoint"),
        ("org/lost", "org/lost: no such file here, and no model on the Hub that you may read"),
        ("org/lost/a.ckpt", "org/lost: no such file here, and no model on the Hub that you may read"),
        ("org/one@v9", "org/one on the Hub has no revision v9"),
        ("o--rg/one/a.ckpt", "o--rg/one: no such file here, and no model on the Hub"),
    ],
)
def test_what_the_hub_has_not_is_told(text: str, message: str, address: str, tmp_path: Path) -> None:
    assert fetched(text, tmp_path, address).startswith(message)


@pytest.mark.parametrize(
    "environment",
    [{}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://hub.invalid"}],
    ids=["refused", "off", "no_name"],
)
def test_offline_is_told_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    began = time.monotonic()
    message = fetched("org/one/a.ckpt", tmp_path, NOBODY, **environment)
    assert message.startswith("org/one/a.ckpt: no such file here, and the Hub cannot be reached (")
    assert message.endswith("it is not in the cache either")
    assert fetched("org/one", tmp_path, NOBODY, **environment).endswith("a cached file is found as ORG/REPO/FILE")
    assert time.monotonic() - began < 20  # the library alone retries for 23 seconds, each time


def test_a_cache_laid_out_by_the_library_will_do(weights: bytes, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--org--one"
    for name, content in {"refs/main": SHA.encode(), f"snapshots/{SHA}/a.ckpt": weights}.items():
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_bytes(content)
    path = fetched("org/one/a.ckpt", tmp_path, NOBODY)
    assert path == str(repository / "snapshots" / SHA / "a.ckpt")
    assert checkpoint.load(Path(path)).generator is not None


def test_a_path_that_is_there_wins(weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/one", "org/two/a.ckpt", "org/two@v1"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(weights)
        assert hub.fetch(Path(name)) == Path(name)


@pytest.mark.parametrize(
    "text",
    ["a.ckpt", "runs/a.ckpt", "/nowhere/a.ckpt", "../org/one/a.ckpt", "org/one@/a.ckpt", "@v1/one/a.ckpt"],
)
def test_a_path_that_is_not_there_and_no_id(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NbpError, match=r"no such file, and no Hub id: those are ORG/REPO or ORG/REPO/FILE"):
        hub.fetch(Path(text))


def test_the_library_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_extras, "find_spec", lambda _: None)
    with pytest.raises(NbpError, match=r"huggingface_hub missing: pip install 'nbp-export\[hub"):
        hub.fetch(Path("org/one/a.ckpt"))


@pytest.mark.parametrize("option", ["--checkpoint", "--tokenizer"])
def test_the_command_takes_an_id(option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: bytes) -> None:
    """Offline, as the real library finds it; the message is one line and the exit status 1."""
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
