"""Settings for every test, and what all tests of a run share."""

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

# Before torch is imported. The models are so small that a second thread only costs: 1 s against 30 s for a golden
# on a busy two-core machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shared machines stall at random, and a property that holds should hold in every run.
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")

Shared = Callable[[str, Callable[[Path], object]], Path]


class Ran(NamedTuple):
    """What a command printed, and the folder that was empty when it ran there."""

    output: str
    folder: Path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """`shared(name, make)`: a path, made once in a run of all workers by `make(path)`. Tests that change it copy it.

    Nothing else lies in the folder that holds it.
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
                shutil.rmtree(making, ignore_errors=True)  # of one that failed
                making.mkdir()
                make(making / name)
                making.rename(made)
        return made / name

    return get


@pytest.fixture(scope="session")
def ran(shared: Shared) -> Callable[[str], Ran]:
    """`ran("onnx --block 16")`: what that command of nbp-export printed and left; it runs once for all tests."""
    from click.testing import CliRunner

    from nbp_export.cli import main

    def run(words: str) -> Ran:
        def make(folder: Path) -> None:
            (folder / "left").mkdir(parents=True)
            with chdir(folder / "left"):
                done = CliRunner().invoke(main, words.split())
            assert done.exit_code == 0, done.output
            (folder / "output").write_text(done.output)

        folder = shared(re.sub("[^a-z0-9]+", "-", words), make)
        return Ran((folder / "output").read_text(), folder / "left")

    return run


@pytest.fixture(scope="session", autouse=True)
def _one_thread_a_session() -> Iterator[None]:
    """ONNX Runtime computes with one thread where it is left to choose: idle ones wait for work at full speed."""
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
    """Torch's table of ONNX functions is made once, and not anew for each graph, in a third of a small one's time.

    Where a version of torch keeps it elsewhere, tests only take longer.
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
