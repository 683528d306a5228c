"""Windows of real videos as conditions, and video files of generated clips.

Shape legend: F frames, H×W pixels. Videos are uint8 [F,3,H,W], pictures for a file are uint8 [F,H,W,3].
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from nbp_engines.spec import SystemSpec
from nbp_errors import UsageError
from nbp_files import replacing
from nbp_reference import clips
from nbp_reference.errors import VideoError

# Blue and orange of Okabe and Ito's palette, which people with any colour vision can tell apart.
FILMED = (0, 114, 178)
PREDICTED = (230, 159, 0)
BORDER = 4  # pixels around a picture
GAP = 4  # pixels between pictures

# A .gif counts hundredths of a second in 16 bits. Browsers stretch delays below two hundredths to ten hundredths.
FASTEST_GIF, SLOWEST_GIF = Fraction(50), Fraction(100, 2**16 - 1)
WIDEST = {".mp4": 2**14, ".gif": 2**16 - 1}  # pixels; H.264 encoders and the GIF format allow no more
MOST_BYTES = 2**32  # for all pictures in memory


def windows(spec: SystemSpec, video: Path | None, count: int) -> tuple[list[np.ndarray], str]:
    """Return up to `count` windows, uint8 [F,3,H,W], spread over a video, and the video's name with any damage.

    A window begins with the given frames; the frames that the video has after them follow. A named file is used whole;
    of the bundled clip, only the part that was held out from training. Only the windows are decoded, and the result is
    cached, so callers must not write to it.

    Raises UsageError if the video has too few undamaged frames, VideoError if it cannot be read.
    """
    path = video or clips.find(clips.DEFAULT_CLIP)
    frames, side, _ = spec.video
    with suppress(OSError):  # reading the file will give the reason
        version = path.stat().st_mtime_ns, path.stat().st_size
        return _windows(path, version, video is None, frames, spec.condition_frames, side, count)
    return _windows(path, (), video is None, frames, spec.condition_frames, side, count)


@lru_cache(maxsize=4)
def _windows(
    path: Path,
    version: tuple[int, ...],  # noqa: ARG001  a changed file must not be taken from the cache
    bundled: bool,
    frames: int,
    needed: int,
    side: int,
    count: int,
) -> tuple[list[np.ndarray], str]:
    times = np.array(clips.times(path))
    name = path.name
    if bundled:
        times = clips.split(times)[1]
        name = f"{path.name} of {clips.CLIPS[clips.DEFAULT_CLIP].package}, held-out part"
    length = min(frames, len(times))
    stride = max(1, (len(times) - length) // max(1, count - 1))
    by_start: dict[float, np.ndarray] = {}
    faults: dict[str, None] = {}
    refusals: list[str] = []
    for window in clips.windows(times, length, stride)[:count] if length >= needed else ():
        try:
            footage = clips.footage(path, side, length, window[0])
        except VideoError as error:  # everything from there on is damaged
            refusals.append(error.message)
            continue
        faults.update(dict.fromkeys(footage.faults))
        if len(footage.frames) >= needed:
            # A copy, so that the memory of the whole frames is freed.
            by_start[footage.start] = np.ascontiguousarray(clips.centre(footage.frames, side))
    if not by_start:
        damage = "".join(f"; {fault}" for fault in faults or refusals[:1])
        raise UsageError(
            f"{path} has {len(times)} frames, and the model needs {needed} given frames{damage}: use another video"
        )
    return list(by_start.values()), "; ".join([name, *faults])


def to_float(window: np.ndarray) -> np.ndarray:
    """Convert uint8 [F,3,H,W] to float32 [3,F,H,W] in [0,1]."""
    return np.ascontiguousarray(window.swapaxes(0, 1), np.float32) / np.float32(255)


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Convert float [3,F,H,W] in [0,1] to uint8 [F,3,H,W]."""
    levels = np.rint(video.swapaxes(0, 1) * 255).clip(0, 255)
    return np.asarray(levels, np.uint8)


def framed(video: np.ndarray, filmed: int, scale: int) -> np.ndarray:
    """Enlarge the pixels of [F,3,H,W] by `scale` and add a border, which gives pictures [F,H',W',3].

    The border of the first `filmed` frames is blue, that of the others orange.
    """
    enlarged = video.transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    frames, height, width, _ = enlarged.shape
    pictures = np.empty((frames, height + 2 * BORDER, width + 2 * BORDER, 3), np.uint8)
    pictures[:filmed], pictures[filmed:] = FILMED, PREDICTED
    pictures[:, BORDER:-BORDER, BORDER:-BORDER] = enlarged
    return pictures


def _grid(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange pictures [F,H,W,3] of equal shape row by row on a white ground."""
    frames, height, width, _ = tiles[0].shape
    rows = math.ceil(len(tiles) / columns)
    ground = np.full((frames, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        ground[:, top : top + height, left : left + width] = tile
    return ground


def _square(tiles: Sequence[np.ndarray]) -> np.ndarray:
    return _grid(tiles, math.ceil(math.sqrt(len(tiles))))


def _write_mp4(path: Path, tiles: Sequence[np.ndarray], rate: Fraction) -> None:
    import av
    from av.video.reformatter import Colorspace

    # The format stores colour for 2×2 pixels at once, so height and width must be even.
    pictures = _square(tiles)
    pictures = np.pad(pictures, [(0, 0), *[(0, n % 2) for n in pictures.shape[1:3]], (0, 0)], constant_values=255)
    with av.open(str(path), "w", format="mp4") as container:
        if "libx264" in av.codecs_available:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "15"})
        else:
            stream = container.add_stream("mpeg4", rate=rate, options={"qmin": "1", "qmax": "3"})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = (
            Colorspace.ITU601
        )  # without a tag, players would decode large pictures as BT.709
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: Path, tiles: Sequence[np.ndarray], rate: Fraction) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(picture).quantize() for picture in _square(tiles))
    ends = [10 * round(100 * (place + 1) / rate) for place in range(len(others) + 1)]  # rounding errors do not add up
    delays = [end - begin for begin, end in pairwise([0, *ends])]
    first.save(path, "GIF", save_all=True, append_images=others, duration=delays, loop=0)


def _write_png(path: Path, tiles: Sequence[np.ndarray], _: Fraction) -> None:
    from PIL import Image

    one_by_one = [frame[None] for tile in tiles for frame in tile]
    (picture,) = _grid(one_by_one, len(tiles[0]))
    Image.fromarray(picture).save(path, "PNG")


WRITERS: dict[str, Callable[[Path, Sequence[np.ndarray], Fraction], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".png": _write_png,
}


def playable_rate(path: Path, rate: Fraction) -> Fraction:
    """Return the rate nearest to `rate`, in frames per second, at which files of this suffix play."""
    return min(max(rate, SLOWEST_GIF), FASTEST_GIF) if path.suffix.lower() == ".gif" else rate


def check_size(path: Path, tiles: int, frames: int, height: int, width: int) -> None:
    """Raise UsageError if the clips are too large for a file of this suffix, or for memory."""
    suffix = path.suffix.lower()
    columns = frames if suffix == ".png" else math.ceil(math.sqrt(tiles))
    rows = tiles if suffix == ".png" else math.ceil(tiles / columns)
    whole = [n * (edge + GAP) - GAP for n, edge in ((columns, width), (rows, height))]
    largest = WIDEST.get(suffix, 2**31 - 1)
    if max(whole) > largest or 3 * frames * tiles * height * width > MOST_BYTES:
        raise UsageError(
            f"{path} would have {whole[0]}x{whole[1]} pixels, too many to write: use a smaller --scale or --grid"
        )


def write(path: Path, tiles: Sequence[np.ndarray], rate: Fraction) -> None:
    """Write clips, pictures [F,H,W,3] of equal shape, side by side into a file of the format that its suffix names.

    A `.mp4` plays at `rate` frames per second, and a `.gif` repeats at `playable_rate`. A `.png` has a row per clip and
    a column per frame.

    Raises UsageError if PyAV or Pillow cannot write the file.
    """
    import av

    try:
        WRITERS[path.suffix.lower()](path, tiles, playable_rate(path, rate))
    except (av.FFmpegError, OSError, ValueError) as error:
        height, width = tiles[0].shape[1:3]
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{len(tiles)} clips of {width}x{height} pixels cannot be written as {path.suffix}: {reason}"
        ) from error


@contextmanager
def output_file(out: Path, force: bool) -> Iterator[Path]:
    """Check `out` first, and yield a path beside it whose file takes the name `out` if the `with` statement succeeds.

    Raises UsageError for a suffix that `write` does not know, if `out` exists and `force` is not set, and if its folder
    cannot be written to.
    """
    if out.suffix.lower() not in WRITERS:
        raise UsageError(f"{out} cannot be written: choose an --out that ends in {', '.join(WRITERS)}")
    if out.is_dir() or (out.exists() and not force):
        raise UsageError(f"{out} exists: choose another --out, or use --force to replace a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"{out.parent} cannot hold {out.name} ({error.strerror}): choose another --out") from error
    with replacing(out) as partial:
        yield partial
