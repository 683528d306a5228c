"""Files are read as players show them: their track, orientation, pixel shape and damaged frames."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given
from hypothesis import strategies as st

from nbp_reference import clips, film
from nbp_reference.errors import VideoError
from tests.reference.test_clips import film as grey_film
from tests.reference.test_clips import frame_numbers

QUADRANTS = np.array([[220, 40, 40], [40, 200, 40], [40, 60, 220], [235, 235, 235]], np.uint8)
ONE = 2**16
# For each orientation: where the file's matrix maps (1, 0) and (0, 1), y downwards, and the quadrants as shown.
ORIENTATIONS = {
    "as stored": ((1, 0), (0, 1), [0, 1, 2, 3]),
    "mirrored": ((-1, 0), (0, 1), [1, 0, 3, 2]),
    "flipped upside down": ((1, 0), (0, -1), [2, 3, 0, 1]),
    "turned by 180°": ((-1, 0), (0, -1), [3, 2, 1, 0]),
    "turned clockwise": ((0, 1), (-1, 0), [2, 0, 3, 1]),
    "turned counterclockwise": ((0, -1), (1, 0), [1, 3, 0, 2]),
    "transposed": ((0, 1), (1, 0), [0, 2, 1, 3]),
    "transversed": ((0, -1), (-1, 0), [3, 1, 2, 0]),
}


def picture(width: int, height: int) -> np.ndarray:
    """A picture [H,W,3] of four quadrants, each in its colour, and a black circle in the middle."""
    y, x = np.mgrid[:height, :width]
    image: np.ndarray = QUADRANTS[2 * (2 * y >= height) + (2 * x >= width)]
    image[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2] = 0
    return image


def quadrants(frame: np.ndarray) -> list[int]:
    """The numbers of the quadrants that a frame [3,H,W] shows, row by row."""
    _, height, width = frame.shape
    points = [frame[:, y, x].astype(int) for y in (2, height - 3) for x in (2, width - 3)]
    return [int(np.abs(QUADRANTS - point).sum(1).argmin()) for point in points]


def add_track(
    container: "av.container.OutputContainer",
    size: tuple[int, int],
    codec: str = "libx264",
    disposition: Disposition = Disposition.default,
) -> av.VideoStream:
    stream = container.add_stream(codec, rate=10)
    assert isinstance(stream, av.VideoStream)
    (stream.width, stream.height), stream.disposition = size, disposition
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    return stream


def tracks(path: Path, *described: tuple[tuple[int, int], str, Disposition, int]) -> Path:
    """A file with a track for each tuple of size, codec, disposition and number of frames."""
    with av.open(str(path), "w") as container:
        streams = [(add_track(container, size, codec, kind), count) for size, codec, kind, count in described]
        packets = [
            packet
            for stream, count in streams
            for last in [*[False] * count, True]
            for packet in stream.encode(
                None if last else av.VideoFrame.from_ndarray(picture(stream.width, stream.height))
            )
        ]
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * (packet.time_base or 1)):
            container.mux(packet)
    return path


@pytest.mark.parametrize("name", ORIENTATIONS)
@pytest.mark.parametrize("scale", [1, 3])
def test_all_eight_orientations(name: str, scale: int, tmp_path: Path) -> None:
    (a, b), (c, d), expected = ORIENTATIONS[name]
    matrix = [a * scale * ONE, b * scale * ONE, 0, c * scale * ONE, d * scale * ONE, 0, 0, 0, 2**30]
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = add_track(container, (64, 32))
        stream.set_display_matrix(matrix)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(64, 32))))
        container.mux(stream.encode())
    footage = clips.footage(tmp_path / "a.mp4", 32, 1)
    assert quadrants(footage.frames[0]) == expected
    assert footage.size == ((32, 64) if b else (64, 32))
    assert footage.frames.shape[2:] == footage.size[::-1]
    description = "" if name == "as stored" else name
    if b:
        description = "turned by 90° and mirrored" if name.startswith("trans") else "turned by 90°"
    assert str(footage.orientation) == description


@given(st.floats(-180, 180), st.booleans())
def test_other_angles_become_the_nearest_right_angle(degrees: float, mirrored: bool) -> None:
    class Frame:
        side_data: dict[str, bytes]

    frame, angle = Frame(), math.radians(degrees)
    a, b = round(math.cos(angle) * ONE), -round(math.sin(angle) * ONE)
    sign = -1 if mirrored else 1
    frame.side_data = {"DISPLAYMATRIX": np.array([a * sign, b, 0, -b * sign, a, 0, 0, 0, 2**30], np.int32).tobytes()}
    oriented = film.orientation(frame)  # type: ignore[arg-type]
    assert abs((oriented.rotation - degrees + 180) % 360 - 180) <= 45.01
    assert oriented.mirrored == mirrored
    frame.side_data = {"DISPLAYMATRIX": bytes(36)}
    assert film.orientation(frame) == (0, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("turned", [0, 90])
@pytest.mark.parametrize("pixel", [Fraction(64, 45), Fraction(128, 117), Fraction(1, 2)])
def test_a_circle_stays_round(pixel: Fraction, turned: int, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = add_track(container, (144, 120))
        stream.codec_context.sample_aspect_ratio = pixel
        if turned:
            stream.set_display_rotation(turned)
        square_pixels = picture(round(144 * pixel), 120)
        image = av.VideoFrame.from_ndarray(square_pixels).reformat(144, 120, interpolation="AREA")
        container.mux(stream.encode(image))
        container.mux(stream.encode())
    footage = clips.footage(tmp_path / "a.mp4", 60, 1)
    rows, columns = np.nonzero(footage.frames[0].max(0) < 60)
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=1)
    assert footage.pixel == (1 / pixel if turned else pixel)
    assert footage.size == ((120, 144) if turned else (144, 120))
    assert min(footage.frames.shape[2:]) == 60


def test_an_impossible_pixel_shape_is_ignored(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = add_track(container, (32, 24), "ffv1")
        stream.codec_context.sample_aspect_ratio = Fraction(1, 50)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(32, 24))))
        container.mux(stream.encode())
    assert clips.footage(tmp_path / "a.mkv", 24, 1).frames.shape == (1, 3, 24, 32)


NONE, DEFAULT, COVER = Disposition(0), Disposition.default, Disposition.attached_pic
SMALL, FULL, LARGE = (32, 24), (64, 48), (96, 96)


@pytest.mark.parametrize(
    ("name", "described", "size"),
    [
        ("a.mkv", [(SMALL, "libx264", NONE, 20), (FULL, "libx264", DEFAULT, 20)], FULL),
        ("a.mkv", [(SMALL, "libx264", DEFAULT, 20), (FULL, "libx264", NONE, 20)], SMALL),
        ("a.mp4", [(SMALL, "libx264", DEFAULT, 20), (FULL, "libx264", DEFAULT, 20)], FULL),
        ("a.mkv", [(FULL, "libx264", NONE, 20), (SMALL, "libx264", NONE, 20)], FULL),
        ("a.mp4", [(LARGE, "mjpeg", COVER, 1), (FULL, "libx264", DEFAULT, 20)], FULL),
        ("a.mkv", [(LARGE, "mjpeg", DEFAULT, 1), (FULL, "libx264", DEFAULT, 20)], FULL),
    ],
)
def test_the_track_that_players_show(
    name: str, described: Sequence[tuple[tuple[int, int], str, Disposition, int]], size: tuple[int, int], tmp_path: Path
) -> None:
    footage = clips.footage(tracks(tmp_path / name, *described), 24, 17)
    assert len(footage.frames) == 17
    assert footage.size == size
    assert "video track" in footage.track
    assert "of 2" in footage.track
    assert ("a cover" in footage.track) == (described[0][2] == COVER)


def test_a_file_with_only_a_cover_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp3"), "w") as container:
        sound = container.add_stream("libmp3lame", rate=44100, layout="mono")
        assert isinstance(sound, av.AudioStream)
        cover = add_track(container, (64, 64), "mjpeg", Disposition.attached_pic)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(picture(64, 64))))
        container.mux(cover.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), "s16", "mono")
        silence.rate = 44100
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    with pytest.raises(VideoError, match=r"a\.mp3 holds no video but a cover"):
        clips.footage(tmp_path / "a.mp3", 24, 5)


@pytest.mark.parametrize("name", ["a.txt", "a.nfo", "a.asc", "a.ans", "a.bin", "a.idf", "a.srt", "a.csv", "a.py"])
def test_text_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("Once upon a time, in a land far away;\n" * 400)
    with pytest.raises(VideoError, match=rf"{name} holds (text|no)"):
        clips.footage(tmp_path / name, 24, 5)


@pytest.mark.parametrize("name", ["12:30.mp4", "data:x.mp4", "concat:a|b.mp4", "50%d.mp4", "a?b#c.mp4"])
def test_no_part_of_a_name_is_read_as_a_protocol(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey_film(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert frame_numbers(clips.footage(Path(name), 24, 5).frames) == [0, 1, 2, 3, 4]


def damage(path: Path, *broken: int) -> Path:
    """Overwrite the packets with these numbers, and return the path."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for number in broken:
        start, size = places[number]
        assert start is not None
        content[start : start + size] = bytes(size)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "broken", "expected", "fault"),
    [
        ("a.avi", "mjpeg", 3, [*range(3), *range(4, 20)], "1 damaged frame left out at 0.30 s"),
        ("a.avi", "mjpeg", 19, [*range(19)], "1 damaged frame left out at 1.90 s"),
        ("a.avi", "mpeg4", 3, [*range(3), *range(8, 20)], "5 damaged frames left out from 0.30 to 0.70 s"),
        ("a.mp4", "mpeg4", 8, [*range(8), *range(16, 20)], "8 damaged frames left out from 0.80 to 1.50 s"),
        ("a.mov", "mjpeg", 0, [*range(1, 20)], "1 damaged frame left out at 0.00 s"),
    ],
)
def test_a_damaged_frame_and_the_frames_predicted_from_it_are_left_out(
    name: str, codec: str, broken: int, expected: list[int], fault: str, tmp_path: Path
) -> None:
    path = damage(grey_film(tmp_path / name, codec=codec), broken)
    footage = clips.footage(path, 24)
    assert frame_numbers(footage.frames) == expected
    assert (footage.rate, footage.resampled) == (Fraction(10), False)
    assert footage.faults == (fault,)
    part = clips.footage(path, 24, 4)
    assert (frame_numbers(part.frames), part.rate, part.resampled) == (expected[:4], Fraction(10), False)


def test_an_h264_film_goes_on_at_the_next_key_frame(tmp_path: Path) -> None:
    path = damage(grey_film(tmp_path / "a.mp4", 40), 10)
    footage = clips.footage(path, 24)
    assert 16 <= len(footage.frames) <= 38
    indices = frame_numbers(footage.frames)
    left_out = 40 - len(indices)
    gap = next(i for i in range(39) if indices[i] != i % 20)
    assert 8 <= gap <= 12
    assert indices == [i % 20 for i in [*range(gap), *range(gap + left_out, 40)]]
    assert f"{left_out} damaged frames left out from {gap / 10:.2f} to " in footage.faults[0]


def test_an_interrupted_download_plays_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = add_track(container, (64, 48), "mjpeg")
        for i in range(40):
            image = np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    whole = clips.read(path, 48)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    footage = clips.footage(path, 48)
    assert 15 < len(footage.frames) < 25
    assert np.array_equal(footage.frames, whole[: len(footage.frames)])
    assert footage.faults[-1].startswith("its frames end at ")
    assert footage.faults[-1].endswith(" s of 4.0 s")
    assert clips.footage(path, 48, 5).faults == ()


def test_a_part_without_undamaged_frames_is_refused(tmp_path: Path) -> None:
    path = damage(grey_film(tmp_path / "a.avi", codec="mjpeg"), *range(1, 20))
    assert len(clips.read(path, 24)) == 1
    with pytest.raises(VideoError, match=r"from 1 s on: it lasts 2\.0 s; 10 damaged frames left out from 1\.00 to"):
        clips.footage(path, 24, 5, start=1.0)


def test_b_frames_in_an_avi_keep_their_order_and_rate(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1", "bf": "3"})
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for i in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((24, 32, 3), 30 + 11 * i, np.uint8))))
        container.mux(stream.encode())
    footage = clips.footage(path, 24, 17)
    assert (footage.rate, footage.resampled, len(footage.frames)) == (Fraction(10), False, 17)
    assert (np.diff(footage.frames.mean((1, 2, 3))) > 5).all()


def test_a_photograph_with_metadata_that_pyav_does_not_support(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image.fromarray(picture(64, 32)).save(tmp_path / "a.jpg", exif=exif)
    footage = clips.footage(tmp_path / "a.jpg", 32, 1)
    assert quadrants(footage.frames[0]) == ORIENTATIONS["turned clockwise"][2]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.h264", "a.ts"])
def test_the_times_of_frames_are_known_without_decoding(name: str, tmp_path: Path) -> None:
    path = grey_film(tmp_path / name, rate=25, codec="mpeg4" if name == "a.avi" else "libx264")
    assert clips.times(path) == pytest.approx([i / 25 for i in range(20)], abs=2e-3)
