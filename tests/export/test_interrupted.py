"""An export that is stopped leaves nothing that looks finished."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from nbp_engines.bundle import Bundle
from nbp_engines.errors import UsageError
from nbp_export.onnx_bundle import export
from tests.export.support import source

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("stop", "how"),
    [
        ("trace step", KeyboardInterrupt),
        ("lint step", OSError(28, "No space left on device")),
        ("check step at cache_pos [48]", KeyboardInterrupt),
    ],
    ids=["trace", "lint", "check"],
)
def test_stopped_at_a_stage(stop: str, how: BaseException, tmp_path: Path) -> None:
    reached = []

    def report(stage: str) -> None:
        reached.append(stage)
        assert not (tmp_path / "bundle").exists()
        if stage == stop:
            raise how

    with pytest.raises((KeyboardInterrupt, OSError)):
        export(source("1x4x4"), tmp_path / "bundle", report=report)
    assert reached[-1] == stop
    assert list(tmp_path.iterdir()) == []


# A fresh interpreter that starts exports as children of its own, which may be killed.
CHILDREN = """
import json, os, signal, sys, time
from pathlib import Path
paths, folder, shares = map(json.loads, sys.argv[1:])
sys.path[:0], folder = paths, Path(folder)
from nbp_export.onnx_bundle import export
from tests.export.support import source

def start(name, last_stage=None):
    def report(stage):
        if stage == last_stage:
            os.kill(os.getpid(), signal.SIGKILL)
    pid = os.fork()
    if pid == 0:
        try:
            export(source("1x4x4"), folder / name, report=report)
        finally:
            os._exit(0)
    return pid
"""
AT_THE_LAST_CHECK = """
assert os.waitstatus_to_exitcode(os.waitpid(start("bundle", "check step at cache_pos [48]"), 0)[1]) == -signal.SIGKILL
assert not (folder / "bundle").exists()
os.waitpid(start("bundle"), 0)
"""
AT_ANY_MOMENT = """
begin = time.monotonic()
os.waitpid(start("whole"), 0)
took = time.monotonic() - begin
for number, share in enumerate(shares):
    pid = start(f"killed-{number}")
    time.sleep(took * share)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def finished(code: str, folder: Path, shares: Iterable[float] = ()) -> set[str]:
    """The bundles that the children leave, all proven sound; the rest of what they leave looks like no bundle."""
    paths = [str(ROOT / home) for home in (".", "reference", "engines")]
    arguments = [json.dumps(argument) for argument in (paths, str(folder), list(shares))]
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN + code, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    leftovers = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert leftovers, "nothing was killed half-way"
    assert all(".partial-" in name for name in leftovers)
    names = {path.name for path in folder.iterdir()} - leftovers
    for name in names:
        assert Bundle.open(folder / name).receipt() is not None
    return names


def test_killed_without_warning_and_exported_again(tmp_path: Path) -> None:
    assert finished(AT_THE_LAST_CHECK, tmp_path) == {"bundle"}


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    assert "whole" in finished(AT_ANY_MOMENT, tmp_path, shares=[0.02 + 0.04 * i for i in range(28)])


@pytest.mark.parametrize("kind", ["empty folder", "folder", "file"])
def test_what_exists_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    if kind == "file":
        out.write_text("precious")
    else:
        out.mkdir()
    if kind == "folder":
        (out / "manifest.json").write_text("precious")
    with pytest.raises(UsageError, match="bundle exists: choose another --out"):
        export(source("1x4x4"), out)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    if kind == "file":
        assert out.read_text() == "precious"
    else:
        assert [path.read_text() for path in out.iterdir()] == ["precious"] * (kind == "folder")


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="file"):
        export(source("1x4x4"), tmp_path / "file" / "bundle")
    assert (tmp_path / "file").read_text() == "precious"


def test_missing_parents_are_made(tmp_path: Path) -> None:
    bundle = export(source("1x4x4"), tmp_path / "a" / "b" / "bundle")
    assert bundle.path == tmp_path / "a" / "b" / "bundle"
    assert bundle.receipt() is not None
