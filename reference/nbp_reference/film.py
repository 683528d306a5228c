"""A film file as players show it: which track, which way up, how wide its pixels are, and which frames are whole.

Shape legend: H×W pixels, after turning.
"""

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from nbp_reference.errors import VideoError

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

SEEK_MARGIN = 10.0  # seconds: program streams land behind the time that was asked for, by a group of pictures or so
UNKNOWN_RATE = Fraction(25)
WIDEST_PIXEL = 10  # no format has pixels that are wider, or narrower, than this to 1: a file that says so is wrong
PROBED_PACKETS = 64  # enough to tell a picture that is shown all the time from a film beside it
TEXT_CODECS = {"ansi", "bintext", "idf", "xbin"}  # FFmpeg draws text as pictures of a terminal
CURE = "If a player shows it, convert it with ffmpeg; if not, it may be an interrupted download: fetch it again"
LEAST_MISSING = 0.5  # seconds: a file that is shorter by less than it declares is only rounded


class Orientation(NamedTuple):
    """What makes stored frames upright.

    Attributes:
        turned: degrees counterclockwise, one of 0, 90, 180 and -90.
        mirrored: whether left and right are exchanged after that.
    """

    turned: int = 0
    mirrored: bool = False

    def upright(self, image: np.ndarray) -> np.ndarray:
        """An image [H,W,3] as it is to be shown; a view."""
        image = np.rot90(image, self.turned // 90)
        return image[:, ::-1] if self.mirrored else image

    def swapped(self, width: int, height: int) -> tuple[int, int]:
        """A stored width and height as they are shown."""
        return (height, width) if self.turned % 180 else (width, height)

    def __str__(self) -> str:
        if self == (180, True):
            return "flipped upside down"
        turned = [f"turned by {abs(self.turned)}°"] if self.turned else []
        return " and ".join([*turned, *["mirrored"] * self.mirrored])


def orientation(frame: "VideoFrame") -> Orientation:
    """What the display matrix of a frame asks for, to the nearest right angle.

    The matrix maps the stored (x, y) to (a·x + c·y, b·x + d·y), y downwards, and is stored as a, b, u, c, d, v, ….
    """
    try:
        matrix = cast("Mapping[str, Any]", frame.side_data).get("DISPLAYMATRIX")  # PyAV's stubs know few of its keys
    except ValueError:  # PyAV does not know all that FFmpeg attaches to photographs
        return Orientation(_right_angle(math.radians(frame.rotation)))
    if matrix is None:
        return Orientation()
    a, b, _, c, d = (int(n) for n in np.frombuffer(matrix, np.int32)[:5])
    mirrored = a * d - b * c < 0
    return Orientation(_right_angle(math.atan2(-b, -a if mirrored else a)), mirrored)


def _right_angle(radians: float) -> int:
    """The nearest of 0, 90, 180 and -90 degrees."""
    return (0, 90, 180, -90)[round(radians / (math.pi / 2)) % 4]


class Film:
    """An open film file: the video track that players show.

    Attributes:
        reasons: what the decoder said of each thing that it could not read.
    """

    def __init__(self, container: "InputContainer", stream: "VideoStream") -> None:
        self.container = container
        self.stream = stream
        self.reasons: list[str] = []
        self._damaged: set[int] = set()  # when the frames that are left out would be shown, in ticks
        self._last: int | None = None  # when the last frame that was taken is shown
        self._ended = False

    @property
    def size(self) -> tuple[int, int]:
        """Stored width and height."""
        return self.stream.width, self.stream.height

    @property
    def pixel(self) -> Fraction:
        """Width of a stored pixel over its height."""
        ratio = self.stream.sample_aspect_ratio or Fraction(1)
        return ratio if Fraction(1, WIDEST_PIXEL) <= ratio <= WIDEST_PIXEL else Fraction(1)

    @property
    def tick(self) -> Fraction:
        """Seconds of a unit of time."""
        return self.stream.time_base or Fraction(1, 90_000)

    @property
    def origin(self) -> int:
        """When the track begins, in ticks."""
        return self.stream.start_time or 0

    @property
    def rate(self) -> Fraction:
        """Frames a second, as declared."""
        return self.stream.average_rate or self.stream.guessed_rate or UNKNOWN_RATE

    @property
    def seconds(self) -> float | None:
        """How long the file says that it is; None where it does not."""
        if self.stream.duration is not None:
            return float(self.stream.duration * self.tick)
        return self.container.duration / 1e6 if self.container.duration else None

    @property
    def track(self) -> str:
        """Which of several video tracks this is, in words; empty for the only one."""
        videos = list(self.container.streams.video)
        covers = sum(map(_is_attached, videos))
        note = f" ({covers} of them a cover)" if covers else ""
        return f"video track {videos.index(self.stream) + 1} of {len(videos)}{note}" if len(videos) > 1 else ""

    def frames(self, start: float) -> "Iterator[VideoFrame]":
        """The whole frames from `start` seconds on, timed from the track's beginning.

        A damaged frame is left out, and so is what is predicted from it: everything up to the next key frame. The
        frames after such a gap follow at once, so that the film jumps there.
        """
        if start > SEEK_MARGIN and self.stream.start_time is not None:
            from av import FFmpegError

            with suppress(FFmpegError):  # what cannot be sought in is decoded from its beginning
                self.container.seek(self.origin + int((start - SEEK_MARGIN) / self.tick), stream=self.stream)
        first, earlier = math.ceil(start / self.tick - Fraction(1, 2)), 0
        for frame in self._whole():
            assert frame.pts is not None  # `_whole` sets it
            if (shown := frame.pts) < first:
                continue
            last = shown if self._last is None else self._last
            earlier += shown - min((at for at in self._damaged if last < at < shown), default=shown)
            self._last, frame.pts, frame.time_base = shown, shown - earlier, self.tick
            yield frame
        self._ended = True

    def faults(self, start: float) -> tuple[str, ...]:
        """What could not be shown of the part that was read, in words."""
        first = math.ceil(start / self.tick - Fraction(1, 2))
        last = math.inf if self._ended or self._last is None else self._last
        damaged = sorted(at for at in self._damaged if first <= at <= last)
        found = []
        if damaged:
            places = f"at {float(damaged[0] * self.tick):.2f} s"
            if len(damaged) > 1:
                places = f"from {float(damaged[0] * self.tick):.2f} to {float(damaged[-1] * self.tick):.2f} s"
            frames = "1 damaged frame" if len(damaged) == 1 else f"{len(damaged)} damaged frames"
            found.append(f"{frames} left out {places}")
        if self._ended and self._last is not None and self.seconds:
            end = float(max([self._last, *self._damaged]) * self.tick + 1 / self.rate)
            if self.seconds - end > max(LEAST_MISSING, float(2 / self.rate)):
                found.append(f"its frames end at {end:.1f} s of {self.seconds:.1f} s")
        return tuple(found)

    def times(self) -> list[Fraction]:
        """When each frame is shown, in seconds from the track's beginning; nothing is decoded."""
        stamps = [self._time(packet) for packet in self._packets() if packet.size and not packet.is_discard]
        known = sorted(stamp for stamp in stamps if stamp is not None)
        if len(known) < len(stamps):
            return [place / self.rate for place in range(len(stamps))]
        return [stamp * self.tick for stamp in known]

    @property
    def _clocked(self) -> bool:
        """Whether the file says when a frame is shown; an AVI says when it is decoded, and FFmpeg guesses the rest."""
        return self.container.format.name != "avi"

    def _time(self, packet: "Packet[VideoStream]") -> int | None:
        """When what is in a packet is shown, in ticks; else when it is decoded; None where a file says neither."""
        stamp = packet.pts if self._clocked and packet.pts is not None else packet.dts
        return None if stamp is None else stamp - self.origin

    def _packets(self) -> "Iterator[Packet[VideoStream]]":
        """The packets of the track, as far as they can be read; an empty one at the end flushes the decoder."""
        from av import FFmpegError, Packet

        try:
            yield from self.container.demux(self.stream)
        except FFmpegError as error:
            self.reasons.append(str(error.strerror))
            flush = cast("Packet[VideoStream]", Packet())
            flush.stream = self.stream
            yield flush

    def _whole(self) -> "Iterator[VideoFrame]":
        """The frames that nothing says are damaged, timed in ticks from the track's beginning."""
        from av import FFmpegError

        broken = False  # since the last key frame
        sent: list[int] = []  # what was sent to the decoder since then
        waiting: deque[int] = deque()  # times of frames that have none themselves: they come out in this order
        places = (round(place / self.rate / self.tick) for place in count())  # of a raw stream, which has no clock
        for packet in self._packets():
            known, clocked = self._time(packet), self._clocked and packet.pts is not None
            stamp = next(places) if known is None else known
            if packet.size:
                if clocked and packet.is_keyframe:
                    broken, sent = False, []
                (sent if clocked else waiting).append(stamp)
            broken |= packet.is_corrupt
            try:
                frames = packet.decode()
            except FFmpegError as error:
                self.reasons.append(str(error.strerror))
                frames, broken = [], True
                if packet.size and not clocked:
                    self._damaged.add(waiting.pop())
            if broken and packet.size and clocked:
                self._damaged.add(stamp)
            for frame in frames:
                if frame.pts is None or not self._clocked:
                    frame.pts = waiting.popleft() if waiting else next(places)
                    broken = frame.is_corrupt or (broken and not frame.key_frame)
                    if broken:
                        self._damaged.add(frame.pts)
                else:
                    frame.pts -= self.origin
                    if frame.is_corrupt and frame.pts not in self._damaged:
                        after = sent[sent.index(frame.pts) :] if frame.pts in sent else []
                        self._damaged.update([frame.pts, *after])
                        broken |= bool(after)
                if frame.pts not in self._damaged:
                    yield frame


@contextmanager
def opened(path: Path) -> Iterator[Film]:
    """A film file, open while the context lasts.

    Raises VideoError if PyAV is missing, if it cannot read the file, or if that holds no film.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise VideoError("reading video needs PyAV: pip install av") from None
    try:
        with av.open(_address(path)) as container:
            yield Film(container, _track(path, container))
    except av.FFmpegError as error:
        cure = "" if path.is_dir() or not path.exists() else f". {CURE}"
        raise VideoError(f"{path} holds no readable video: {error.strerror}{cure}") from error


def _track(path: Path, container: "InputContainer") -> "VideoStream":
    """The track that players show: the default one, a film before a still, then the one with the most pixels."""
    from av.stream import Disposition

    videos = list(container.streams.video)
    if not videos:
        raise VideoError(f"{path} holds no video")
    films = [video for video in videos if not _is_attached(video)]
    if not films:
        raise VideoError(f"{path} holds no video but a cover")
    known = [film for film in films if film.codec_context and film.width and film.height]
    if not known:
        raise VideoError(f"{path} holds no readable video: its codec or picture size is unknown. {CURE}")
    if all(film.codec_context.name in TEXT_CODECS for film in known):
        raise VideoError(f"{path} holds text, no video")
    stills = _stills(path, known) if len(known) > 1 else set()
    return max(
        known,
        key=lambda film: (
            bool(film.disposition & Disposition.default),
            film.index not in stills,
            film.width * film.height,
        ),
    )


def _address(path: Path) -> str:
    """A path as FFmpeg takes it, so that no part of a name is read as a protocol."""
    return f"file:{path}"


def _stills(path: Path, tracks: "Sequence[VideoStream]") -> set[int]:
    """The tracks that show one picture all the time, such as a cover that is not marked as one."""
    import av

    with av.open(_address(path)) as container:
        packets = container.demux([container.streams[track.index] for track in tracks])
        found = Counter(packet.stream_index for packet in islice(packets, PROBED_PACKETS) if packet.size)
    return {index for index, packets in found.items() if packets == 1} if max(found.values(), default=0) > 1 else set()


def _is_attached(stream: "VideoStream") -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails))
