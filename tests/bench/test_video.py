"""Pictures, side by side and marked, and the files that they are written to."""

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from nbp_bench import video
from nbp_errors import UsageError

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
    with pytest.raises(UsageError, match=r"2 pictures of 7x9 in a \.mp4: No space left on device"):
        video.write(tmp_path / "a.mp4", tiles(2), RATE)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.mp4"
    with video.appearing(out, force=False) as partial:
        assert partial.parent == out.parent
        assert partial.suffix == ".mp4"
        partial.write_bytes(b"whole")
        assert not out.exists()
    assert out.read_bytes() == b"whole"
    assert out.stat().st_mode & 0o777 == 0o644
    with suppress(ZeroDivisionError), video.appearing(out, force=True) as partial:
        partial.write_bytes(b"half")
        raise ZeroDivisionError
    assert out.read_bytes() == b"whole"
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(UsageError, match="exists"), video.appearing(out, force=False):
        pass
