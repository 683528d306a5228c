"""Reads a video file as players show it: chooses the track, applies its orientation, and skips damaged frames.

A tick is the unit in which the track counts time. Shape legend: H×W pixels.
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

SEEK_MARGIN = 10.0  # seconds to seek earlier, because seeking in program streams lands after the requested time
UNKNOWN_RATE = Fraction(25)  # frames per second if a file declares no rate
WIDEST_PIXEL = 10  # no format has pixels with a wider or narrower aspect ratio; a file that declares one is wrong
PROBED_PACKETS = 64  # enough to distinguish a track with a single picture from a film
TEXT_CODECS = {"ansi", "bintext", "idf", "xbin"}  # with these, FFmpeg draws text as pictures of a terminal
REMEDY = "If a player shows it, convert it with ffmpeg; if not, the download may be incomplete: fetch it again"
LEAST_MISSING = 0.5  # seconds: a smaller difference from the declared duration is due to rounding


class Orientation(NamedTuple):
    """The rotation and mirroring that make stored frames upright.

    Attributes:
        rotation: in degrees counterclockwise, one of 0, 90, 180 and -90.
        mirrored: whether left and right are exchanged after the rotation.
    """

    rotation: int = 0
    mirrored: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return the upright image of a stored image [H,W,3], as a view."""
        image = np.rot90(image, self.rotation // 90)
        return image[:, ::-1] if self.mirrored else image

    def shown_size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height of the upright image for the stored width and height."""
        return (height, width) if self.rotation % 180 else (width, height)

    def __str__(self) -> str:
        if self == (180, True):
            return "flipped upside down"
        rotation = [f"turned by {abs(self.rotation)}°"] if self.rotation else []
        return " and ".join([*rotation, *["mirrored"] * self.mirrored])


def orientation(frame: "VideoFrame") -> Orientation:
    """Return the orientation that the display matrix of a frame describes, to the nearest right angle.

    The matrix maps the stored (x, y) to (a·x + c·y, b·x + d·y), y downwards, and is stored as a, b, u, c, d, v, ….
    """
    try:
        matrix = cast("Mapping[str, Any]", frame.side_data).get("DISPLAYMATRIX")  # PyAV's stubs lack most of its keys
    except ValueError:  # PyAV does not support all metadata that FFmpeg attaches to photographs
        return Orientation(_right_angle(math.radians(frame.rotation)))
    if matrix is None:
        return Orientation()
    a, b, _, c, d = (int(n) for n in np.frombuffer(matrix, np.int32)[:5])
    mirrored = a * d - b * c < 0
    return Orientation(_right_angle(math.atan2(-b, -a if mirrored else a)), mirrored)


def _right_angle(radians: float) -> int:
    """Return the nearest of 0, 90, 180 and -90 degrees."""
    return (0, 90, 180, -90)[round(radians / (math.pi / 2)) % 4]


class Film:
    """The video track of an open file that players show.

    Attributes:
        container: the file.
        stream: the track.
        decoder_errors: the decoder's message for each part of the track that it could not read.
    """

    def __init__(self, container: "InputContainer", stream: "VideoStream") -> None:
        self.container = container
        self.stream = stream
        self.decoder_errors: list[str] = []
        self._damaged: set[int] = set()  # the times of the frames that are left out, in ticks
        self._last: int | None = None  # the time of the last frame that was yielded, in ticks
        self._ended = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the stored frames."""
        return self.stream.width, self.stream.height

    @property
    def pixel(self) -> Fraction:
        """The width of a stored pixel over its height."""
        ratio = self.stream.sample_aspect_ratio or Fraction(1)
        return ratio if Fraction(1, WIDEST_PIXEL) <= ratio <= WIDEST_PIXEL else Fraction(1)

    @property
    def tick(self) -> Fraction:
        """The length of a tick, in seconds."""
        return self.stream.time_base or Fraction(1, 90_000)

    @property
    def origin(self) -> int:
        """The time at which the track begins, in ticks."""
        return self.stream.start_time or 0

    @property
    def rate(self) -> Fraction:
        """The frames per second that the file declares."""
        return self.stream.average_rate or self.stream.guessed_rate or UNKNOWN_RATE

    @property
    def seconds(self) -> float | None:
        """The duration that the file declares; None if it declares none."""
        if self.stream.duration is not None:
            return float(self.stream.duration * self.tick)
        return self.container.duration / 1e6 if self.container.duration else None

    @property
    def track(self) -> str:
        """Which of several video tracks this is, in words; empty if it is the only one."""
        videos = list(self.container.streams.video)
        covers = sum(map(_is_attached, videos))
        note = f" ({covers} of them a cover)" if covers else ""
        return f"video track {videos.index(self.stream) + 1} of {len(videos)}{note}" if len(videos) > 1 else ""

    def frames(self, start: float) -> "Iterator[VideoFrame]":
        """Yield the undamaged frames from `start` seconds on; their times count from the track's beginning.

        A damaged frame is left out, and so are the frames that are predicted from it, up to the next key frame. The
        frames after such a gap are moved forward in time to close it.
        """
        if start > SEEK_MARGIN and self.stream.start_time is not None:
            from av import FFmpegError

            with suppress(FFmpegError):  # a file without seeking is decoded from its beginning
                self.container.seek(self.origin + int((start - SEEK_MARGIN) / self.tick), stream=self.stream)
        first, shift = math.ceil(start / self.tick - Fraction(1, 2)), 0
        for frame in self._undamaged_frames():
            assert frame.pts is not None  # `_undamaged_frames` sets it
            if (time := frame.pts) < first:
                continue
            last = time if self._last is None else self._last
            shift += time - min((damaged for damaged in self._damaged if last < damaged < time), default=time)
            self._last, frame.pts, frame.time_base = time, time - shift, self.tick
            yield frame
        self._ended = True

    def faults(self, start: float) -> tuple[str, ...]:
        """Describe what could not be shown of the part from `start` seconds to the last frame that was read."""
        first = math.ceil(start / self.tick - Fraction(1, 2))
        last = math.inf if self._ended or self._last is None else self._last
        damaged = sorted(time for time in self._damaged if first <= time <= last)
        messages = []
        if damaged:
            times = f"at {float(damaged[0] * self.tick):.2f} s"
            if len(damaged) > 1:
                times = f"from {float(damaged[0] * self.tick):.2f} to {float(damaged[-1] * self.tick):.2f} s"
            frames = "1 damaged frame" if len(damaged) == 1 else f"{len(damaged)} damaged frames"
            messages.append(f"{frames} left out {times}")
        if self._ended and self._last is not None and self.seconds:
            end = float(max([self._last, *self._damaged]) * self.tick + 1 / self.rate)
            if self.seconds - end > max(LEAST_MISSING, float(2 / self.rate)):
                messages.append(f"its frames end at {end:.1f} s of {self.seconds:.1f} s")
        return tuple(messages)

    def times(self) -> list[Fraction]:
        """Return when each frame is shown, in seconds from the track's beginning, without decoding the track."""
        stamps = [self._packet_time(packet) for packet in self._packets() if packet.size and not packet.is_discard]
        present = sorted(stamp for stamp in stamps if stamp is not None)
        if len(present) < len(stamps):
            return [index / self.rate for index in range(len(stamps))]
        return [stamp * self.tick for stamp in present]

    @property
    def _has_display_times(self) -> bool:
        """Whether the file stores when each frame is shown; an AVI stores when it is decoded, and FFmpeg guesses."""
        return self.container.format.name != "avi"

    def _packet_time(self, packet: "Packet[VideoStream]") -> int | None:
        """Return when the frame in a packet is shown, in ticks.

        This is the time of decoding if the file has no display times, and None if the packet has neither.
        """
        stamp = packet.pts if self._has_display_times and packet.pts is not None else packet.dts
        return None if stamp is None else stamp - self.origin

    def _packets(self) -> "Iterator[Packet[VideoStream]]":
        """Yield the packets of the track as far as they can be read; the last is empty and flushes the decoder."""
        from av import FFmpegError, Packet

        try:
            yield from self.container.demux(self.stream)
        except FFmpegError as error:
            self.decoder_errors.append(str(error.strerror))
            flush = cast("Packet[VideoStream]", Packet())
            flush.stream = self.stream
            yield flush

    def _undamaged_frames(self) -> "Iterator[VideoFrame]":
        """Yield the frames in which no damage was detected; their times are ticks from the track's beginning.

        The times of damaged frames are collected in `_damaged`.
        """
        from av import FFmpegError

        broken = False  # whether there was damage since the last key frame
        sent: list[int] = []  # times of the packets sent to the decoder since the last key frame
        pending: deque[int] = deque()  # times for frames without display times, in the order of decoding
        indexed_times = (round(index / self.rate / self.tick) for index in count())  # for raw streams
        for packet in self._packets():
            time, timed = self._packet_time(packet), self._has_display_times and packet.pts is not None
            stamp = next(indexed_times) if time is None else time
            if packet.size:
                if timed and packet.is_keyframe:
                    broken, sent = False, []
                (sent if timed else pending).append(stamp)
            broken |= packet.is_corrupt
            try:
                frames = packet.decode()
            except FFmpegError as error:
                self.decoder_errors.append(str(error.strerror))
                frames, broken = [], True
                if packet.size and not timed:
                    self._damaged.add(pending.pop())
            if broken and packet.size and timed:
                self._damaged.add(stamp)
            for frame in frames:
                if frame.pts is None or not self._has_display_times:
                    frame.pts = pending.popleft() if pending else next(indexed_times)
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
def open_film(path: Path) -> Iterator[Film]:
    """Open the video track that players show; it is closed at the end of the `with` block.

    Raises VideoError if PyAV is missing, if it cannot read the file, or if the file has no video track.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise VideoError("reading video needs PyAV: pip install av") from None
    try:
        with av.open(_url(path)) as container:
            yield Film(container, _shown_track(path, container))
    except av.FFmpegError as error:
        remedy = "" if path.is_dir() or not path.exists() else f". {REMEDY}"
        raise VideoError(f"{path} holds no readable video: {error.strerror}{remedy}") from error


def _shown_track(path: Path, container: "InputContainer") -> "VideoStream":
    """Return the track that players show.

    A default track comes before the others, then a film before a still picture, then the one with the most pixels.
    """
    from av.stream import Disposition

    videos = list(container.streams.video)
    if not videos:
        raise VideoError(f"{path} holds no video")
    films = [video for video in videos if not _is_attached(video)]
    if not films:
        raise VideoError(f"{path} holds no video but a cover")
    readable = [film for film in films if film.codec_context and film.width and film.height]
    if not readable:
        raise VideoError(f"{path} holds no readable video: its codec or picture size is unknown. {REMEDY}")
    if all(film.codec_context.name in TEXT_CODECS for film in readable):
        raise VideoError(f"{path} holds text and no video")
    stills = _still_tracks(path, readable) if len(readable) > 1 else set()
    return max(
        readable,
        key=lambda film: (
            bool(film.disposition & Disposition.default),
            film.index not in stills,
            film.width * film.height,
        ),
    )


def _url(path: Path) -> str:
    """Return the path as a URL, so that FFmpeg takes no part of the name for a protocol."""
    return f"file:{path}"


def _still_tracks(path: Path, tracks: "Sequence[VideoStream]") -> set[int]:
    """Return the indices of the tracks with a single picture, such as a cover that is not marked as one."""
    import av

    with av.open(_url(path)) as container:
        packets = container.demux([container.streams[track.index] for track in tracks])
        counts = Counter(packet.stream_index for packet in islice(packets, PROBED_PACKETS) if packet.size)
    if max(counts.values(), default=0) <= 1:
        return set()
    return {index for index, packets in counts.items() if packets == 1}


def _is_attached(stream: "VideoStream") -> bool:
    """Whether the track is a cover or a thumbnail."""
    from av.stream import Disposition

    return bool(stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails))
