"""In any locale and on any terminal the commands print what they have to say, and write UTF-8."""

import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbp_engines.bundle import MANIFEST
from nbp_engines.shell import is_utf8
from tests.engines.test_bundle import make
from tests.export.support import Exported

Exporter = Callable[..., Exported]
ROOT = Path(__file__).parents[2]
COMMAND = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from nbp_export.cli import main; main()"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PLACES = [ASCII, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}, {"COLUMNS": "0"}]


def command(*words: str) -> list[str]:
    """A command of nbp-export in a fresh interpreter."""
    return [sys.executable, "-c", COMMAND, ":".join(str(ROOT / home) for home in (".", "reference", "engines")), *words]


def on_a_terminal(words: list[str], folder: Path, **environment: str) -> tuple[int, str]:
    """What a command exits with, and what it leaves on its terminal."""
    ours, theirs = pty.openpty()
    started = subprocess.Popen(
        words, cwd=folder, env=os.environ | environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    try:
        while more := os.read(ours, 65536):
            seen += more
    except OSError:  # which is how Linux tells the end
        pass
    os.close(ours)
    return started.wait(), seen.decode("latin-1")


@pytest.fixture
def named(exported: Exporter, tmp_path: Path) -> str:
    """A bundle with a name that neither ASCII nor Latin-1 has."""
    shutil.copytree(exported("1x2x2", batch=2).bundle.path, tmp_path / "ключ")
    return "ключ"


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("words", ["--help", "onnx --help", "inspect --help"])
def test_help(words: str, place: dict[str, str], tmp_path: Path) -> None:
    code, seen = on_a_terminal(command(*words.split()), tmp_path, TERM="dumb", **{"COLUMNS": "40"} | place)
    assert code == 0, seen
    assert "Usage: " in seen


@pytest.mark.parametrize("place", [{}, *PLACES], ids=str)
@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_inspect(term: str, place: dict[str, str], named: str, tmp_path: Path) -> None:
    (tmp_path / named).rename(tmp_path / "bundle")
    code, seen = on_a_terminal(command("inspect", "bundle"), tmp_path, TERM=term, **place)
    assert code == 0, seen
    assert "receipt valid" in seen
    assert "k_cache_0..1" in " ".join(seen.split())


@pytest.mark.parametrize("place", PLACES[1:], ids=str)
def test_verify_prints_its_progress_its_outcome_and_its_path(place: dict[str, str], named: str, tmp_path: Path) -> None:
    code, seen = on_a_terminal(command("verify", named), tmp_path, TERM="xterm", **place)
    assert code == 0, seen
    assert "checks against the reference passed" in seen
    assert "\\u28" not in seen  # which are the dots that turn


@pytest.mark.parametrize("words", ["verify ключ", "inspect ключ", "onnx --out другой"])
def test_a_name_that_the_runtimes_would_read_otherwise_is_refused_with_the_setting_that_cures_it(
    words: str, named: str, tmp_path: Path
) -> None:
    assert named in words or "onnx" in words
    done = subprocess.run(
        command(*words.split()), cwd=tmp_path, env=os.environ | ASCII, capture_output=True, text=True, check=False
    )
    assert done.returncode == (2 if "onnx" in words else 1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert last.endswith("or set PYTHONUTF8=1, since names are read as ascii here")


def test_a_locale_in_which_a_name_has_other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_utf8(Path("caf\xe9"))
    assert not is_utf8(Path("caf\udce9"))
    monkeypatch.setattr(os, "fsencode", lambda path: os.fspath(path).encode("latin-1"))
    assert is_utf8(Path("cafe"))
    assert not is_utf8(Path("caf\xe9"))
    assert not is_utf8(Path("ключ"))


@pytest.mark.parametrize("place", PLACES[:3], ids=str)
@pytest.mark.parametrize("words", ["inspect нет", "onnx --checkpoint нет.ckpt", "onnx --block ключ", "нет"])
def test_an_error_with_a_name_that_cannot_be_shown_is_one_line(
    words: str, place: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        command(*words.split()), cwd=tmp_path, env=os.environ | place, capture_output=True, check=False
    )
    assert done.returncode in (1, 2)
    assert b"Traceback" not in done.stderr
    assert [line[:7] for line in done.stderr.splitlines()].count(b"Error: ") == 1


@pytest.mark.parametrize("place", PLACES[:3], ids=str)
def test_a_models_name_that_cannot_be_shown(place: dict[str, str], tmp_path: Path) -> None:
    toy = make(tmp_path / "toy")
    text = (toy / MANIFEST).read_text("utf-8").replace('"name": "', '"name": "ключ', 1)
    (toy / MANIFEST).write_text(text, "utf-8")
    done = subprocess.run(
        command("inspect", "toy"), cwd=tmp_path, env=os.environ | place, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
