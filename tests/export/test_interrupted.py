"""An interrupted export leaves nothing that could be taken for a bundle."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nbp_engines.bundle import MANIFEST, RECEIPT, Bundle
from nbp_engines.errors import BundleError
from nbp_errors import NbpError, UsageError
from nbp_export import onnx_bundle
from nbp_export.cli import main
from nbp_export.onnx_bundle import _working_folder, export
from nbp_files import write_bytes, write_json, write_text
from tests.export.support import source, traced_once

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """All exports of this file are of the same model, so each graph is traced once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_bundle, "trace", traced_once())
        yield


@pytest.mark.parametrize(
    ("stop", "how"),
    [
        ("trace step", KeyboardInterrupt),
        ("record trace.json", KeyboardInterrupt),
        ("lint step", OSError(28, "No space left on device")),
        ("check step at cache_pos [48]", KeyboardInterrupt),
        ("repeat trace.json", KeyboardInterrupt),
    ],
    ids=["trace", "record", "lint", "check", "replay"],
)
def test_stopped_at_a_stage(stop: str, how: BaseException, tmp_path: Path) -> None:
    reached = []

    def report(stage: str) -> None:
        reached.append(stage)
        assert not (tmp_path / "bundle").exists()
        if stage == stop:
            raise how

    with pytest.raises((KeyboardInterrupt, NbpError)):
        export(source("1x4x4"), tmp_path / "bundle", "fp32", report=report)
    assert reached[-1] == stop
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder becomes a bundle only when all other files, with the receipt, exist."""
    listings: list[set[str]] = []
    rename = Path.replace

    def list_and_rename(path: Path, target: Path) -> Path:
        if target.name == MANIFEST:
            listings.append({file.name for file in path.parent.iterdir()} - {path.name})
        with pytest.raises(BundleError, match="is not a bundle"):
            Bundle.open(path.parent)
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", list_and_rename)
    bundle = export(source("1x4x4"), tmp_path / "bundle", "fp32")
    assert listings == [{path.name for path in bundle.path.iterdir()} - {MANIFEST}]
    assert Bundle.open(bundle.path, require_receipt=True) == bundle


def test_an_export_removes_only_the_working_folders_of_killed_exports_to_the_same_name(tmp_path: Path) -> None:
    left, kept = tmp_path / ".bundle.partial-abcd_123", [".other.partial-abcd_123", ".bundle.partial-notes", "bundle-2"]
    for folder in (left, *(tmp_path / name for name in kept)):
        folder.mkdir()
        (folder / "step.onnx").write_text("half")
    (tmp_path / ".bundle.partial-a_file_1").write_text("precious")
    (tmp_path / ".bundle.partial-a_link_1").symlink_to(tmp_path / "bundle-2")
    with _working_folder(tmp_path / "bundle") as first, _working_folder(tmp_path / "bundle-3"):
        with suppress(UsageError), _working_folder(tmp_path / "bundle") as second:
            assert first.is_dir()  # in use, so not abandoned
            (tmp_path / "bundle").touch()
        assert not second.exists()
        (tmp_path / "bundle").unlink()
    untouched = [".bundle.partial-a_file_1", ".bundle.partial-a_link_1", *kept]
    assert {path.name for path in tmp_path.iterdir()} == {*untouched, "bundle", "bundle-3"}
    assert all((tmp_path / name / "step.onnx").read_text() == "half" for name in kept)


@pytest.mark.parametrize("where", ["system", "file system"])
def test_without_locks_everything_is_left_alone(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if where == "system":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", flock)
    (tmp_path / ".bundle.partial-abcd_123").mkdir()
    with _working_folder(tmp_path / "bundle"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".bundle.partial-abcd_123", "bundle"}


def test_the_first_of_two_exports_to_one_name_wins(tmp_path: Path) -> None:
    with ExitStack() as stack:
        slow = stack.enter_context(_working_folder(tmp_path / "bundle"))
        (slow / "file").write_text("second")
        with _working_folder(tmp_path / "bundle") as fast:
            (fast / "file").write_text("first")
        with pytest.raises(UsageError, match="bundle was created by another program"):
            stack.close()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / "file").read_text() == "first"


# A new interpreter that exports in child processes, kills some of them, and reports what they leave.
CHILDREN = """
import json, os, shutil, signal, sys, time, warnings
from pathlib import Path
paths, folder, shares = map(json.loads, sys.argv[1:])
sys.path[:0], folder = paths, Path(folder)
from nbp_engines.bundle import Bundle
from nbp_engines.errors import BundleError
from nbp_files import write_bytes, write_json, write_text
from nbp_export.onnx_bundle import export
from tests.export.support import source

def start(name, last_stage=None):
    def report(stage):
        if stage == last_stage:
            os.kill(os.getpid(), signal.SIGKILL)
    pid = os.fork()
    if pid == 0:
        try:
            export(source("1x4x4"), folder / name, "fp32", report=report)
        finally:
            os._exit(0)
    return pid

# Return "nothing", "whole" for a complete bundle, or the files of a folder that is not a bundle.
def found():
    warnings.simplefilter("error")  # a bundle that opens without its receipt
    others = [path for path in folder.iterdir() if path.name != "whole"]
    assert len(others) <= 1, others
    for path in others:
        try:
            assert Bundle.open(path).manifest == Bundle.open(folder / "whole").manifest
            return "whole"
        except BundleError:
            assert path.name.startswith(".bundle.partial-"), path
            return sorted(file.name for file in path.iterdir())
    return "nothing"

"""
AT_THE_LAST_CHECK = """
from nbp_export import onnx_bundle
from nbp_export.graphs import graph_module, system_spec
from tests.export.support import traced_once
onnx_bundle.trace = traced_once()
model = source("1x4x4").generator
spec = system_spec(model.config, None, "fp32", 1)
for name, graph in spec.generator_graphs().items():  # trace here once for all children
    onnx_bundle.trace(graph_module(spec, name, model), graph)

os.waitpid(start("whole"), 0)
pid, status = os.waitpid(start("bundle", "check step at cache_pos [48]"), 0)
assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
print(json.dumps([found()]))
"""
AT_ANY_MOMENT = """
from nbp_export.graphs import graph_module, system_spec, trace
model = source("1x4x4").generator
spec = system_spec(model.config, None, "fp32", 1)
trace(graph_module(spec, "step", model), spec.generator_graphs()["step"])  # import here once for all children

begin = time.monotonic()
os.waitpid(start("whole"), 0)
took = time.monotonic() - begin
left = []
for share in shares:
    pid = start("bundle")
    time.sleep(took * share)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    left.append(found())
    shutil.rmtree(folder / "bundle", ignore_errors=True)
print(json.dumps(left))
"""
TO_THE_END = """
os.waitpid(start("bundle"), 0)
assert (folder / "bundle").is_dir()
assert found() == "whole"
"""


def what_is_left(code: str, folder: Path, shares: Iterable[float] = ()) -> list[str | list[str]]:
    """Return what each killed child leaves: nothing, a whole bundle, or the files of a folder that is not a bundle."""
    paths = [str(ROOT / home) for home in (".", "reference", "engines")]
    arguments = [json.dumps(argument) for argument in (paths, str(folder), list(shares))]
    command = [sys.executable, "-c", CHILDREN + code + TO_THE_END, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    left: list[str | list[str]] = json.loads(done.stdout)
    return left


def test_killed_without_warning_and_exported_again(tmp_path: Path) -> None:
    (left,) = what_is_left(AT_THE_LAST_CHECK, tmp_path)
    assert "step.onnx" in left
    assert not {MANIFEST, RECEIPT} & {*left}


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(502)
    left = what_is_left(AT_ANY_MOMENT, tmp_path, shares=[chance.uniform(0, 1.1) for _ in range(50)])
    assert len(left) == 50
    halves = [files for files in left if isinstance(files, list)]
    assert len(halves) >= 25, left
    assert len({len(files) for files in halves}) > 1, left


@pytest.mark.parametrize("kind", ["empty folder", "folder", "file"])
def test_an_existing_path_is_refused_and_left_unchanged(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    if kind == "file":
        out.write_text("precious")
    else:
        out.mkdir()
    if kind == "folder":
        (out / "manifest.json").write_text("precious")
    with pytest.raises(UsageError, match="bundle exists: choose another --out"):
        export(source("1x4x4"), out, "fp32")
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
    bundle = export(source("1x4x4"), tmp_path / "a" / "b" / "bundle", "fp32")
    assert bundle.path == tmp_path / "a" / "b" / "bundle"
    assert bundle.receipt() is not None


# The command in a new process, after some code that prepares it.
COMMAND = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
{before}
from nbp_export.cli import main
sys.argv[1:] = ["onnx", "--model", "nbp-tiny", "--dtype", "fp32", "--out", "bundle"]
main()
"""
SIGNALLED = """
from nbp_export import proof
def stop(path, spec):
    os.kill(os.getpid(), signal.{name})
    {then}
proof.lint.check = stop
"""


def commanded(before: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(ROOT / home) for home in (".", "reference", "engines"))
    command = [sys.executable, "-c", COMMAND.format(before=before), paths]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300, **options)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_the_command_cleans_up(name: str, tmp_path: Path) -> None:
    again = f"os.kill(os.getpid(), signal.{name})"  # a second signal arrives during the clean-up
    done = commanded(SIGNALLED.format(name=name, then=again), tmp_path)
    assert done.returncode == 128 + signal.Signals[name]
    assert done.stderr.splitlines()[-1] == f"Ended by {name}."
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    done = commanded(SIGNALLED.format(name="SIGINT", then=""), tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "Aborted!"
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    path = os.pathsep.join([str(tmp_path), *(str(ROOT / home) for home in (".", "reference", "engines"))])
    command = [sys.executable, "-m", "nbp_export", "inspect", "bundle"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "\nAborted!\n")


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under `nohup`."""
    before = "signal.signal(signal.SIGHUP, signal.SIG_IGN)" + SIGNALLED.format(name="SIGHUP", then="os._exit(7)")
    assert commanded(before, tmp_path).returncode == 7


def test_the_handlers_of_the_program_around_the_command_are_left_as_they_were() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]
    CliRunner().invoke(main, ["onnx", "--model", "nbp-xl"])
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0, "No usable temporary directory found in "),
        (0.01, "the bundle cannot be written to . (File too large): free space there"),
        (0.9, "the bundle cannot be written to . (File too large): free space there"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(share: float, message: str, tmp_path: Path) -> None:
    """A limit on the size of files replaces a full disk: the kernel refuses in the middle of a write."""
    whole = 1_500_000  # at most the bytes of nbp-tiny's weights in fp32

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(whole * share), resource.RLIM_INFINITY))

    done = commanded("sys.dont_write_bytecode = True", tmp_path, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"Error: {message}")
    assert list(tmp_path.iterdir()) == []


REFUSALS: dict[str, str] = {
    "chmod": "chmod fchmod lchmod",  # CIFS, FUSE, object stores
    "folders_keep_their_names": "rename",
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_an_export_succeeds_on_file_systems_without_chmod_or_rename(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in REFUSALS[refused].split():
        if hasattr(os, name):
            monkeypatch.setattr(os, name, refuse)
        if hasattr(Path, name):
            monkeypatch.setattr(Path, name, refuse)
    bundle = export(source("1x4x4"), tmp_path / "bundle", "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert Bundle.open(tmp_path / "bundle", require_receipt=True) == bundle


def test_a_name_that_was_created_meanwhile_on_a_file_system_without_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UsageError, match="was created by another program"), _working_folder(tmp_path / "bundle"):
        (tmp_path / "bundle").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o002, 0o775, 0o664)]
)
def test_the_umask_is_respected(umask: int, folder: int, file: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        bundle = export(source("1x4x4"), tmp_path / "bundle", "fp32")
    finally:
        os.umask(before)
    assert bundle.path.stat().st_mode & 0o777 == folder
    assert {path.stat().st_mode & 0o777 for path in bundle.path.iterdir()} == {file}


WRITERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda path: write_bytes(path, b"new"),
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, {"new": 1}),
}


@pytest.mark.parametrize("name", ["a.json", "a", "x" * 200])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_fails_leaves_the_old_file_alone(
    writer: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, opened = WRITERS[writer], Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        opened(path, content[:1])
        raise OSError(28, "No space left on device")

    (tmp_path / name).write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / name)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "old"}
    monkeypatch.undo()
    write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert "new" in (tmp_path / name).read_text()


def test_text_is_written_in_utf_8_in_every_locale(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\nfrom pathlib import Path\n"
        "from nbp_files import write_json, write_text\n"
        "write_text(Path(sys.argv[1], 'a'), 'caf\\xe9 \\u043a \\udce9'); write_json(Path(sys.argv[1], 'b'), '\\xe9')"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path, ROOT / "engines"], env=environment, check=True)
    assert (tmp_path / "a").read_bytes() == "caf\xe9 \u043a \\udce9".encode()
    assert json.loads((tmp_path / "b").read_bytes()) == "\xe9"
