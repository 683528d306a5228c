"""Real clips to predict from, and files of what was made of them.

Shape legend: F frames, H×W pixels. Video is uint8 [F,3,H,W], pictures to be written are uint8 [F,H,W,3].
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

# Told apart by any eye: Okabe and Ito's blue and orange.
FILMED = (0, 114, 178)
PREDICTED = (230, 159, 0)
BORDER = 4  # pixels
GAP = 4

# A .gif counts hundredths of a second in 16 bits, and browsers show for a tenth what is to be seen for less than two.
FASTEST_GIF, SLOWEST_GIF = Fraction(50), Fraction(100, 2**16 - 1)
WIDEST = {".mp4": 2**14, ".gif": 2**16 - 1}  # pixels: of H.264's encoders, and of the format
MOST_BYTES = 2**32  # of all pictures in memory


def windows(spec: SystemSpec, video: Path | None, count: int) -> tuple[list[np.ndarray], str]:
    """Up to `count` windows, uint8 [F,3,H,W], spread over a video, and the video's name with what is wrong with it.

    Each begins with the frames that are given; what follows them is the truth, as far as the video goes. A named file
    is used whole; of the bundled clip, the part that no training has seen. Only the windows are decoded, and only once
    however often they are asked for: they are not to be written to.

    Raises UsageError for a video with too few whole frames, VideoError for one that cannot be read.
    """
    path = video or clips.find(clips.DEFAULT_CLIP)
    frames, side, _ = spec.video
    with suppress(OSError):  # reading it says why
        changed = path.stat().st_mtime_ns, path.stat().st_size
        return _windows(path, changed, video is None, frames, spec.condition_frames, side, count)
    return _windows(path, (), video is None, frames, spec.condition_frames, side, count)


@lru_cache(maxsize=4)
def _windows(
    path: Path,
    changed: tuple[int, ...],  # noqa: ARG001  it tells a file from what was there before
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
    found: dict[float, np.ndarray] = {}
    faults: dict[str, None] = {}
    refusals: list[str] = []
    for window in clips.windows(times, length, stride)[:count] if length >= needed else ():
        try:
            footage = clips.footage(path, side, length, window[0])
        except VideoError as error:  # nothing is whole from there on
            refusals.append(error.message)
            continue
        faults.update(dict.fromkeys(footage.faults))
        if len(footage.frames) >= needed:
            found[footage.start] = np.ascontiguousarray(clips.centre(footage.frames, side))  # lets the rest go
    if not found:
        told = "".join(f"; {fault}" for fault in faults or refusals[:1])
        raise UsageError(f"{path} has {len(times)} frames, the model is given {needed}{told}")
    return list(found.values()), "; ".join([name, *faults])


def to_float(window: np.ndarray) -> np.ndarray:
    """uint8 [F,3,H,W] as float32 [3,F,H,W] in [0,1]."""
    return np.ascontiguousarray(window.swapaxes(0, 1), np.float32) / np.float32(255)


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Float [3,F,H,W] in [0,1] as uint8 [F,3,H,W]."""
    levels = np.rint(video.swapaxes(0, 1) * 255).clip(0, 255)
    return np.asarray(levels, np.uint8)


def framed(video: np.ndarray, filmed: int, scale: int) -> np.ndarray:
    """Enlarge each pixel of [F,3,H,W] `scale` times and put a border around: blue for the first `filmed` frames.

    The others' is orange. Returns pictures [F,H',W',3].
    """
    enlarged = video.transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    frames, height, width, _ = enlarged.shape
    pictures = np.empty((frames, height + 2 * BORDER, width + 2 * BORDER, 3), np.uint8)
    pictures[:filmed], pictures[filmed:] = FILMED, PREDICTED
    pictures[:, BORDER:-BORDER, BORDER:-BORDER] = enlarged
    return pictures


def _grid(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures [F,H,W,3] of equal shape, row by row on a white ground."""
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

    # Colour is stored for 2×2 pixels at once.
    pictures = _square(tiles)
    pictures = np.pad(pictures, [(0, 0), *[(0, n % 2) for n in pictures.shape[1:3]], (0, 0)], constant_values=255)
    with av.open(str(path), "w", format="mp4") as container:
        if "libx264" in av.codecs_available:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "15"})
        else:
            stream = container.add_stream("mpeg4", rate=rate, options={"qmin": "1", "qmax": "3"})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU601  # players take large untagged pictures for BT.709
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: Path, tiles: Sequence[np.ndarray], rate: Fraction) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(picture).quantize() for picture in _square(tiles))
    ends = [10 * round(100 * (place + 1) / rate) for place in range(len(others) + 1)]  # no delay drifts
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


def settled_rate(path: Path, rate: Fraction) -> Fraction:
    """The rate nearest to `rate`, frames a second, at which a file of this suffix plays."""
    return min(max(rate, SLOWEST_GIF), FASTEST_GIF) if path.suffix.lower() == ".gif" else rate


def check_size(path: Path, tiles: int, frames: int, height: int, width: int) -> None:
    """Raise UsageError if so many clips of framed pictures are too large for a file of this suffix, or for memory."""
    suffix = path.suffix.lower()
    columns = frames if suffix == ".png" else math.ceil(math.sqrt(tiles))
    rows = tiles if suffix == ".png" else math.ceil(tiles / columns)
    whole = [n * (edge + GAP) - GAP for n, edge in ((columns, width), (rows, height))]
    largest = WIDEST.get(suffix, 2**31 - 1)
    if max(whole) > largest or 3 * frames * tiles * height * width > MOST_BYTES:
        raise UsageError(
            f"{path} would be {whole[0]}x{whole[1]} pixels large, which is more than can be written: take a smaller "
            "--scale or --grid"
        )


def write(path: Path, tiles: Sequence[np.ndarray], rate: Fraction) -> None:
    """Write pictures [F,H,W,3] of equal shape side by side, at `rate` frames a second: a video, or by suffix another.

    A `.gif` repeats itself, at `settled_rate`; a `.png` has a row for each of the tiles and a column for each frame.

    Raises UsageError if PyAV or Pillow cannot write them.
    """
    import av

    try:
        WRITERS[path.suffix.lower()](path, tiles, settled_rate(path, rate))
    except (av.FFmpegError, OSError, ValueError) as error:
        height, width = tiles[0].shape[1:3]
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{len(tiles)} pictures of {width}x{height} in a {path.suffix}: {why}") from error


@contextmanager
def appearing(out: Path, force: bool) -> Iterator[Path]:
    """A file beside `out`, of the same suffix, that takes its name only if all went well, and is gone otherwise.

    Raises UsageError for a suffix that `write` does not know, and if `out` exists, unless forced, or cannot be made.
    """
    if out.suffix.lower() not in WRITERS:
        raise UsageError(f"{out} cannot be written: choose an --out that ends in {', '.join(WRITERS)}")
    if out.is_dir() or (out.exists() and not force):
        raise UsageError(f"{out} exists: choose another --out, or replace a file with --force")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"{out.parent} cannot hold {out.name} ({error.strerror}): choose another --out") from error
    with replacing(out) as partial:
        yield partial
