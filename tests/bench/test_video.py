"""Pictures, side by side and marked, and the files that they are written to."""

import os
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np
import pytest
from PIL import Image

from nbp_bench import video
from nbp_engines.spec import SystemSpec
from nbp_errors import UsageError
from nbp_reference import clips
from tests.reference.test_clips import film
from tests.reference.test_film import damage

RATE = Fraction(25)


def tiles(count: int, height: int = 9, width: int = 7, frames: int = 3) -> list[np.ndarray]:
    """Grey pictures [F,H,W,3], each tile and frame lighter than the one before."""
    return [
        np.full((frames, height, width, 3), 20 * tile, np.uint8)
        + np.arange(frames, dtype=np.uint8).reshape(-1, 1, 1, 1) * 5
        for tile in range(count)
    ]


def read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_framing_enlarges_each_pixel_and_leaves_the_picture_whole() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 5), np.uint8)
    found = video.framed(clip, 2, 3)
    border = video.BORDER
    assert found.shape == (3, 12 + 2 * border, 15 + 2 * border, 3)
    for row in range(12):
        for column in range(15):
            assert np.array_equal(found[:, border + row, border + column], clip[:, :, row // 3, column // 3])
    outside = np.ones(found.shape[1:3], bool)
    outside[border:-border, border:-border] = False
    for frame, colour in zip(found, (video.FILMED, video.FILMED, video.PREDICTED), strict=True):
        assert (frame[outside] == colour).all()


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (9, 3, 3), (10, 3, 4)]
)
def test_tiles_stand_nearly_square_with_a_gap(count: int, rows: int, columns: int, tmp_path: Path) -> None:
    made = tiles(count, 10, 12)
    video.write(tmp_path / "a.gif", made, RATE)
    found = read(tmp_path / "a.gif")
    gap = video.GAP
    assert found.shape == (3, rows * (10 + gap) - gap, columns * (12 + gap) - gap, 3)
    for place in range(rows * columns):
        top, left = place // columns * (10 + gap), place % columns * (12 + gap)
        expected = made[place] if place < count else np.full_like(made[0], 255)
        assert np.abs(found[:, top : top + 10, left : left + 12].astype(int) - expected).max() < 9


def durations(path: Path) -> list[int]:
    """Milliseconds that each picture of a GIF is shown."""
    with Image.open(path) as image:
        found = []
        for place in range(getattr(image, "n_frames", 1)):
            image.seek(place)
            found.append(int(image.info["duration"]))
        return found


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        ("25", [40] * 6),
        ("30", [30, 40, 30, 30, 40, 30]),
        ("40", [20, 30, 30, 20, 20, 30]),
        ("50", [20] * 6),
        ("60", [20] * 6),
        ("1000", [20] * 6),
        ("1/1000", [655350] * 6),
    ],
)
def test_a_gif_keeps_time_as_far_as_browsers_do(rate: str, expected: list[int], tmp_path: Path) -> None:
    video.write(tmp_path / "a.gif", tiles(1, frames=6), Fraction(rate))
    assert durations(tmp_path / "a.gif") == expected
    assert len(read(tmp_path / "a.gif")) == 6


def test_a_gif_without_motion_lasts_as_long(tmp_path: Path) -> None:
    video.write(tmp_path / "a.gif", [np.zeros((6, 9, 7, 3), np.uint8)], RATE)
    assert sum(durations(tmp_path / "a.gif")) == 240


class Spec(NamedTuple):
    """What `windows` reads of a spec."""

    video: tuple[int, int, int] = (17, 24, 24)
    condition_frames: int = 5


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """How many frames each decoding was asked for."""
    asked: list[int | None] = []
    footage = clips.footage

    def watched(path: Path, side: int, count: int | None = None, start: float = 0.0) -> clips.Footage:
        asked.append(count)
        return footage(path, side, count, start)

    monkeypatch.setattr(clips, "footage", watched)
    return asked


@pytest.mark.parametrize(("frames", "count"), [(400, 7), (20, 7), (17, 3), (9, 2), (60, 1)])
def test_only_the_windows_are_decoded_and_only_once(
    frames: int, count: int, decoded: list[int | None], tmp_path: Path
) -> None:
    path = film(tmp_path / "a.mp4", frames)
    whole = clips.centre(clips.read(path, 24), 24)
    decoded.clear()
    spec = cast("SystemSpec", Spec())
    found, name = video.windows(spec, path, count)
    assert name == "a.mp4"
    length = min(17, frames)
    expected = clips.windows(whole, length, max(1, (frames - length) // max(1, count - 1)))[:count]
    assert np.array_equal(found, expected)
    assert decoded == [length] * len(found)
    again, _ = video.windows(spec, path, count)
    assert again[0] is found[0]
    assert len(decoded) == len(found)
    film(path, frames + 1)
    assert video.windows(spec, path, count)[0][0] is not found[0], "another file of that name is read anew"


def test_windows_of_a_long_film_take_little_memory(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 1500, size=(64, 24), codec="mpeg4")
    tracemalloc.start()
    found, _ = video.windows(cast("SystemSpec", Spec()), path, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 3
    assert peak < 1500 * 3 * 24 * 64 / 4


def test_windows_of_a_damaged_film(tmp_path: Path) -> None:
    spec = cast("SystemSpec", Spec())
    path = damage(film(tmp_path / "a.avi", 60, codec="mjpeg"), 30, 31)
    found, name = video.windows(spec, path, 7)
    assert {len(window) for window in found} == {17}
    assert name.startswith("a.avi; 2 damaged frames left out from 3.00 to 3.10 s")
    damage(path, *range(20, 60))
    found, name = video.windows(spec, path, 7)
    assert 1 < len(found) < 7
    short = r"a\.avi has 60 frames, and the model needs 5 given frames; "
    damage(path, *range(4, 60))
    with pytest.raises(UsageError, match=short + r"56 damaged frames left out from 0\.40 to 5\.90 s"):
        video.windows(spec, path, 7)
    damage(path, *range(60))
    with pytest.raises(UsageError, match=short + r".* holds no video frames: it lasts 6\.0 s; 60 damaged frames"):
        video.windows(spec, path, 7)


@pytest.mark.parametrize("codecs", [{"libx264", "mpeg4"}, {"mpeg4"}])
def test_a_video_plays_anywhere(codecs: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", codecs)
    made = tiles(3, 31, 33, frames=10)[1:]
    video.write(tmp_path / "a.mp4", made, Fraction(30000, 1001))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == ("h264" if "libx264" in codecs else "mpeg4")
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == Fraction(30000, 1001)
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert found.shape == (10, 32, 70, 3), "odd sizes are filled up with white"
    assert found[:, 31].mean() > 200
    for tile, left in zip(made, (0, 33 + video.GAP), strict=True):
        assert np.abs(found[:, :28, left + 2 : left + 31].astype(int) - tile[:, :28, 2:31]).max() < 12


def test_a_sheet_has_a_row_a_tile_and_a_column_a_frame(tmp_path: Path) -> None:
    video.write(tmp_path / "a.png", tiles(2), RATE)
    (found,) = read(tmp_path / "a.png")
    assert found.shape == (2 * 9 + video.GAP, 3 * 7 + 2 * video.GAP, 3)
    assert found[:: 9 + video.GAP, :: 7 + video.GAP, 0].tolist() == [[0, 5, 10], [20, 25, 30]]
    assert (found[9 : 9 + video.GAP] == 255).all()
    assert (found[:, 7 : 7 + video.GAP] == 255).all()


def test_what_the_encoder_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, tiles: Sequence[np.ndarray], rate: Fraction) -> None:  # noqa: ARG001
        raise av.FFmpegError(28, "No space left on device")

    monkeypatch.setitem(video.WRITERS, ".mp4", refuse)
    with pytest.raises(UsageError, match=r"2 clips of 7x9 pixels cannot be written as \.mp4: No space left on device"):
        video.write(tmp_path / "a.mp4", tiles(2), RATE)


def test_a_file_system_without_chmod_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    for name in ("chmod", "fchmod", "lchmod"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    mask = os.umask(0o027)
    try:
        with video.output_file(tmp_path / "a.png", force=False) as partial:
            video.write(partial, [np.zeros((2, 9, 9, 3), np.uint8)], Fraction(5))
    finally:
        os.umask(mask)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.mp4"
    with video.output_file(out, force=False) as partial:
        assert partial.parent == out.parent
        assert partial.suffix == ".mp4"
        partial.write_bytes(b"whole")
        assert not out.exists()
    assert out.read_bytes() == b"whole"
    assert out.stat().st_mode & 0o777 == 0o644
    with suppress(ZeroDivisionError), video.output_file(out, force=True) as partial:
        partial.write_bytes(b"half")
        raise ZeroDivisionError
    assert out.read_bytes() == b"whole"
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(UsageError, match="exists"), video.output_file(out, force=False):
        pass
