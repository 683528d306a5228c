"""Finding, reading and splitting video."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbp_reference import clips
from nbp_reference.errors import ReferenceError

COLOURS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)


def write(path: Path, width: int, height: int) -> Path:
    """A video of three frames, each with an upper half in its colour and a black lower half."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for colour in COLOURS:
            image = np.zeros((height, width, 3), np.uint8)
            image[: height // 2] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("width", "height", "shape"), [(64, 48, (24, 32)), (48, 64, (32, 24)), (24, 24, (24, 24))])
def test_read_scales_the_shorter_side(width: int, height: int, shape: tuple[int, int], tmp_path: Path) -> None:
    video = clips.read(write(tmp_path / "a.mkv", width, height), side=24)
    assert video.dtype == np.uint8
    assert video.shape == (3, 3, *shape)
    upper, lower = video[:, :, : shape[0] // 2 - 1], video[:, :, shape[0] // 2 + 1 :]
    assert np.abs(upper.mean((2, 3)) - COLOURS).max() < 2
    assert lower.max() < 3


def test_read_refuses_what_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"not a video" * 100)
    with pytest.raises(ReferenceError, match=r"a\.mp4 holds no readable video"):
        clips.read(path, side=24)


def test_read_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ReferenceError, match="pip install av"):
        clips.read(tmp_path / "a.mp4", side=24)


def test_the_default_clip_is_real_video_from_an_installed_package() -> None:
    video = clips.read(clips.find(clips.DEFAULT_CLIP), side=36)
    assert video.shape == (120, 3, 36, 44)
    assert video.std() > 20
    steps = np.abs(np.diff(video.astype(float), axis=0)).mean((1, 2, 3))
    assert 0 < steps.max() < 30, "consecutive frames of one shot look alike"


def test_find_looks_in_the_folder_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = clips.Clip("mine", "no-such-distribution", "mine.avi", "get-it now")
    monkeypatch.setitem(clips.CLIPS, "mine", clip)
    monkeypatch.delenv("NBP_CLIPS", raising=False)
    with pytest.raises(ReferenceError, match="get-it now, or set NBP_CLIPS"):
        clips.find("mine")
    monkeypatch.setenv("NBP_CLIPS", str(tmp_path))
    with pytest.raises(ReferenceError, match="'mine'"):
        clips.find("mine")
    (tmp_path / "mine.avi").touch()
    assert clips.find("mine") == tmp_path / "mine.avi"


@given(st.integers(0, 900))
def test_the_parts_of_a_video_are_a_whole_clip_apart(frames: int) -> None:
    train, held = clips.split(np.arange(frames))
    assert len(train) == int(frames * 0.65)
    if len(held):
        assert held[0] - train[-1] > 17
        assert held[-1] == frames - 1


def test_centre_and_windows() -> None:
    video = np.zeros((10, 3, 8, 12), np.uint8)
    video[:, :, 2:6, 4:8] = 1
    middle = clips.centre(video, 4)
    assert middle.shape == (10, 3, 4, 4)
    assert middle.all()
    assert [w.tolist() for w in clips.windows(np.arange(10), 4, 3)] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert clips.windows(np.arange(3), 4, 1) == []
