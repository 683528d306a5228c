"""The caches are updated in place; otherwise ONNX Runtime would print a warning."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nbp_engines.errors import EngineError
from nbp_engines.ort import OrtSession
from nbp_engines.registry import open_session
from nbp_engines.runtime import OpenOptions
from tests.export.support import Exported

Exporter = Callable[..., Exported]
ROOT = Path(__file__).parents[2]
WARNING = "in-place optimization not activated"

OURS = """
import sys
import numpy as np
from nbp_engines.generator import Generator
from nbp_engines.runtime import OpenOptions
from nbp_engines.registry import open_session
with open_session(sys.argv[1]) as session:
    condition = np.zeros((session.spec.batch, session.spec.condition_tokens), np.int64)
    steps = sum(1 for _ in Generator(session).blocks(condition))
    print(steps, "torch" in sys.modules)
"""
# A call with a separate output buffer for every cache.
SEPARATE = """
import sys
import numpy as np
import onnxruntime as ort
from nbp_engines.bundle import Bundle
from pathlib import Path
bundle = Bundle.open(Path(sys.argv[1]))
graph = bundle.manifest.graph_specs()["step"]
session = ort.InferenceSession(bundle.graph_file("step"), providers=["CPUExecutionProvider"])
inputs = {t.name: t.empty() for t in graph.inputs}
session.run(None, inputs)
"""


def run(code: str, bundle: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, in which ONNX Runtime logs with its default settings."""
    paths = f"import sys; sys.path[:0] = {[str(ROOT / 'engines')]}\n"
    return subprocess.run([sys.executable, "-c", paths + code, bundle], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_runtime_warns_about_separate_buffers_and_not_about_ours(dtype: str, exported: Exporter) -> None:
    bundle = exported("1x2x2", dtype=dtype, batch=2 if dtype == "fp32" else 1).bundle
    done = run(OURS, bundle.path)
    assert done.stdout.split() == ["12", "False"]
    assert WARNING not in done.stderr
    # As a control: with separate buffers, the warning appears once for each cache.
    assert run(SEPARATE, bundle.path).stderr.count(WARNING) == 2 * bundle.manifest.spec.layers


def test_a_step_changes_its_rows_of_our_buffers_and_nothing_else(exported: Exporter) -> None:
    with OrtSession(exported("1x2x2", batch=2).bundle, OpenOptions(threads=1)) as session:
        addresses = {name: cache.ctypes.data for name, cache in session.states.items()}
        rng = np.random.default_rng(0)
        for cache in session.states.values():
            cache[...] = rng.standard_normal(cache.shape)
        before = {name: cache.copy() for name, cache in session.states.items()}
        session.step(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([40, 36]))
        for name, cache in session.states.items():
            assert cache.ctypes.data == addresses[name]
            changed = (cache != before[name]).any(axis=(1, 3))
            assert np.flatnonzero(changed[0]).tolist() == [40, 41, 42, 43]
            assert np.flatnonzero(changed[1]).tolist() == [36, 37, 38, 39]


def test_prefill_and_step_share_the_caches(exported: Exporter) -> None:
    with OrtSession(exported("1x2x2", batch=2).bundle, OpenOptions(threads=1)) as session:
        session.prefill(np.arange(64).reshape(2, 32))
        filled = {name: cache.copy() for name, cache in session.states.items()}
        session.step(np.zeros((2, 4), np.int64), np.full(2, 32))
        for name, cache in session.states.items():
            assert filled[name][:, :, :32].any(axis=-1).all()
            assert np.array_equal(cache[:, :, :32], filled[name][:, :, :32])


def test_wrong_shapes_are_refused_by_name(exported: Exporter) -> None:
    with OrtSession(exported("1x2x2", batch=2).bundle, OpenOptions(threads=1)) as session:
        with pytest.raises(EngineError, match=r"step: tokens is int64 \[2, 3\], but the graph takes int64 \[2, 4\]"):
            session.step(np.zeros((2, 3), np.int64), np.full(2, 32))
        with pytest.raises(EngineError, match=r"step: tokens is float32 \[2, 4\], but the graph takes int64"):
            session.step(np.zeros((2, 4), np.float32), np.zeros(2, np.int64))
        with pytest.raises(EngineError, match=r"step: cache_pos is int64 \[1\]"):
            session.step(np.zeros((2, 4), np.int64), np.full(1, 32))


def test_a_bundle_without_a_tokenizer_says_what_is_missing(exported: Exporter) -> None:
    with open_session(exported("1x2x2", batch=2).bundle.path, threads=1) as session:
        with pytest.raises(EngineError, match=r"no encode graph.*--tokenizer"):
            session.encode(np.zeros((2, 3, 5, 16, 16), np.float32))
        with pytest.raises(EngineError, match=r"no decode graph.*--tokenizer"):
            session.decode(np.zeros((2, 80), np.int64))


def test_no_runtime_is_one_line(exported: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported("1x2x2", batch=2).bundle
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"pip install 'nbp-export\[cpu\]'"):
        open_session(bundle)
