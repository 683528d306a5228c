"""Real clips to predict from, and files of what was made of them.

Shape legend: F frames, H×W pixels. Video is uint8 [F,3,H,W], pictures to be written are uint8 [F,H,W,3].
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

from nbp_engines.spec import SystemSpec
from nbp_errors import UsageError
from nbp_reference import clips

# Told apart by any eye: Okabe and Ito's blue and orange.
FILMED = (0, 114, 178)
PREDICTED = (230, 159, 0)
BORDER = 4  # pixels
GAP = 4


def windows(spec: SystemSpec, video: Path | None, count: int) -> tuple[list[np.ndarray], str]:
    """Up to `count` windows, uint8 [F,3,H,W], spread over a video, and the video's name.

    Each begins with the frames that are given; what follows them is the truth, as far as the video goes. A named file
    is used whole; of the bundled clip, the part that no training has seen.

    Raises UsageError for a video with too few frames, VideoError for one that cannot be read.
    """
    frames, height, _ = spec.video
    path = video or clips.find(clips.DEFAULT_CLIP)
    part = clips.centre(clips.read(path, height), height)
    name = path.name
    if not video:
        part = clips.split(part)[1]
        name = f"{path.name} of {clips.CLIPS[clips.DEFAULT_CLIP].package}, held-out part"
    if len(part) < spec.condition_frames:
        raise UsageError(f"{path} has {len(part)} frames, the model is given {spec.condition_frames}")
    length = min(frames, len(part))
    stride = max(1, (len(part) - length) // max(1, count - 1))
    return clips.windows(part, length, stride)[:count], name


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
    import av

    pictures = _square(tiles)
    height, width = pictures.shape[1:3]
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
    split, palette, use, sink = (graph.add(n) for n in ("split", "palettegen", "paletteuse", "buffersink"))
    source.link_to(split)
    split.link_to(palette, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for i, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = i, 1 / rate
        graph.vpush(frame)
    graph.vpush(None)
    with av.open(str(path), "w", format="gif") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        for _ in pictures:
            container.mux(stream.encode(graph.vpull()))
        container.mux(stream.encode())


def _write_png(path: Path, tiles: Sequence[np.ndarray], _: Fraction) -> None:
    import av

    one_by_one = [frame[None] for tile in tiles for frame in tile]
    (picture,) = _grid(one_by_one, len(tiles[0]))
    codec = av.CodecContext.create("png", "w")
    assert isinstance(codec, av.VideoCodecContext)
    codec.height, codec.width = picture.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    packets = [*codec.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")), *codec.encode(None)]
    path.write_bytes(b"".join(map(bytes, packets)))


WRITERS: dict[str, Callable[[Path, Sequence[np.ndarray], Fraction], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".png": _write_png,
}


def write(path: Path, tiles: Sequence[np.ndarray], rate: Fraction) -> None:
    """Write pictures [F,H,W,3] of equal shape side by side, at `rate` frames a second: a video, or by suffix another.

    A `.gif` repeats itself; a `.png` has a row for each of the tiles and a column for each frame.

    Raises UsageError if PyAV cannot write them.
    """
    import av

    try:
        WRITERS[path.suffix.lower()](path, tiles, rate)
    except av.FFmpegError as error:
        height, width = tiles[0].shape[1:3]
        raise UsageError(f"{len(tiles)} pictures of {width}x{height} in a {path.suffix}: {error.strerror}") from error


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
        handle, name = tempfile.mkstemp(prefix=f".{out.stem}.partial-", suffix=out.suffix, dir=out.parent)
    except OSError as error:
        raise UsageError(f"{out.parent} cannot hold {out.name} ({error.strerror}): choose another --out") from error
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
