"""Settings of all tests, and the files that they share."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from copy import copy
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

# This has to happen before torch is imported. The models are so small that a second thread only costs time: on a busy
# machine with two cores, a golden took 30 s with it and 1 s without.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Machines that are shared stall at random, so there is no deadline, and every run tests the same examples.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

Shared = Callable[[str, Callable[[Path], object]], Path]


class CommandResult(NamedTuple):
    """The output of a command, and the folder in which it ran, which was empty before."""

    output: str
    folder: Path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """`shared(name, make)` returns a path that `make(path)` writes once for all tests. Tests copy it to change it.

    The folder that contains the path contains nothing else.
    """
    from filelock import FileLock

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    (folder / "shared").mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        made = folder / "shared" / name
        with FileLock(f"{made}.lock"):
            if not made.is_dir():
                making = Path(f"{made}.making")
                shutil.rmtree(making, ignore_errors=True)  # an earlier attempt may have failed
                making.mkdir()
                make(making / name)
                making.rename(made)
        return made / name

    return get


@pytest.fixture(scope="session")
def ran(shared: Shared) -> Callable[[str], CommandResult]:
    """`ran("onnx --block 16")` returns the result of that command of nbp-export, which runs once for all tests."""
    from click.testing import CliRunner

    from nbp_export.cli import main

    def run(words: str) -> CommandResult:
        def make(folder: Path) -> None:
            (folder / "left").mkdir(parents=True)
            with chdir(folder / "left"):
                done = CliRunner().invoke(main, words.split())
            assert done.exit_code == 0, done.output
            (folder / "output").write_text(done.output)

        folder = shared(re.sub("[^a-z0-9]+", "-", words), make)
        return CommandResult((folder / "output").read_text(), folder / "left")

    return run


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_session() -> Iterator[None]:
    """Let ONNX Runtime use one thread by default, because its idle threads keep a core busy while they wait."""
    try:
        ort = import_module("onnxruntime")
    except ImportError:
        yield
        return
    session = ort.InferenceSession
    init = session.__init__

    @wraps(init)
    def init_with_one(self: Any, model: Any, sess_options: Any = None, *rest: Any, **others: Any) -> None:
        sess_options = sess_options or ort.SessionOptions()
        sess_options.intra_op_num_threads = sess_options.intra_op_num_threads or 1
        init(self, model, sess_options, *rest, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "__init__", init_with_one)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_functions() -> Iterator[None]:
    """Build torch's table of ONNX functions once; it takes a third of the time in which a small graph is exported.

    If a version of torch keeps the table elsewhere, the tests only take longer.
    """
    try:
        registration = import_module("torch.onnx._internal.exporter._registration")
        made = cache(registration.ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):
        yield
        return

    def from_torchlib(opset_version: int) -> Any:
        registry = copy(made(opset_version))
        registry.functions = {target: [*functions] for target, functions in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration.ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield
