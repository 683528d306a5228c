"""The Fréchet video distance between two sets of clips, whatever generated them, under a protocol that is part of it.

Shape legend: N clips, T frames, H×W pixels.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice, pairwise
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nbp_bench import frechet
from nbp_bench.frechet import Interval, Moments
from nbp_errors import NbpError, UsageError
from nbp_reference.errors import VideoError

VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v", ".gif")
ARRAYS = (".npy",)
SIDE = 224  # pixels of the network's input
MOST_GROUPS = 64  # of clips, for the interval
I3D_NAME = "I3D, Kinetics-400"
I3D_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
WEIGHTS_KEY = "i3d_weights_sha256"  # metadata of an ONNX file
FLOOR_DRAWS = 10  # random halves of the real clips, for the floor
Features = Callable[[np.ndarray], np.ndarray]  # float32 [1,3,T,224,224] in [−1,1] → [1,D]


class BadClipError(NbpError):
    """A clip that cannot be part of a distance; the message names its file."""


@dataclass(frozen=True)
class Protocol:
    """Everything that a Fréchet video distance depends on, besides the clips.

    Attributes:
        network, network_sha256: the network, and the hash of its weights' file.
        layer: the features that are compared.
        frames: number of frames at the beginning of a clip that are scored.
        least_frames: number of frames that a clip must have at least; all are scored if it has fewer than `frames`.
        resize, crop, pixels: how frames become the network's input.
        distance: the distance and its arithmetic.
    """

    network: str
    network_sha256: str
    layer: str = "logits"
    frames: int = 16
    least_frames: int = 9  # the last pooling of I3D needs two time steps, after strides of 8 in all
    resize: str = "bilinear, short side 224, long side rounded up, no corner alignment, no antialiasing"
    crop: str = "centre 224x224"
    pixels: str = "uint8 / 255 in fp32, then scaled to [-1, 1]"
    distance: str = "Fréchet, fp64, covariances over n - 1"

    @property
    def sha256(self) -> str:
        """The hash of all fields, by which protocols are told apart."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def require_same(self, other: "Protocol") -> None:
        """Raise UsageError, which names the fields that differ, unless both protocols are the same."""
        mine, theirs = asdict(self), asdict(other)
        if different := [f"{key}: {mine[key]} and {theirs[key]}" for key in mine if mine[key] != theirs[key]]:
            raise UsageError(f"distances of different protocols cannot be compared; {'; '.join(different)}")


class Distance(NamedTuple):
    """A Fréchet video distance with what a reader needs to judge it.

    Attributes:
        fvd: the distance with its interval.
        kvd: the kernel distance of the same features, which has no bias at small N.
        floor: the mean distance between two disjoint random halves of the real clips; None below four clips.
        n_real, n_fake: number of clips.
        n_floor: number of clips in each half.
        skipped: the bad clips that were left out, in words.
        protocol: the protocol.
    """

    fvd: Interval
    kvd: float
    floor: float | None
    n_real: int
    n_fake: int
    n_floor: int
    skipped: Sequence[str]
    protocol: Protocol

    def to_json(self) -> dict[str, Any]:
        """Return the values under the names that `nbp-bench fvd --json` prints."""
        return {
            "fvd": self.fvd.value,
            "interval": None if self.fvd.low is None else [self.fvd.low, self.fvd.high],
            "groups": self.fvd.groups,
            "kvd": self.kvd,
            "floor": self.floor,
            "n_real": self.n_real,
            "n_fake": self.n_fake,
            "n_floor": self.n_floor,
            "skipped": list(self.skipped),
            "protocol": asdict(self.protocol),
            "protocol_sha256": self.protocol.sha256,
        }


def clip_files(source: Path) -> list[Path]:
    """Return the clips of a folder, ordered by name, or those that a text file lists, one path per line.

    Paths in a list are relative to the list. Raises UsageError if there are no clips, or no such folder or list.
    """
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in (*VIDEOS, *ARRAYS))
        if not files:
            raise UsageError(f"{source} holds no clips: put files there that end in {', '.join((*VIDEOS, *ARRAYS))}")
        return files
    try:
        lines = source.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source} is neither a folder of clips nor a list, a text file with a path per line"
        ) from error
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}: name a folder of clips, or a list of their paths") from error
    files = [source.parent / line.strip() for line in lines if line.strip()]
    if not files:
        raise UsageError(f"{source} lists no clips: write a path per line")
    return files


def read_clip(path: Path, frames: int, least: int) -> np.ndarray:
    """Return the first `frames` frames of a clip, uint8 [T,H,W,3], or all if it has fewer, but at least `least`.

    Raises BadClipError for a file that cannot be read, is damaged, too short, or varies its frame rate.
    """
    try:
        clip = _read_array(path) if path.suffix.lower() in ARRAYS else _read_video(path, frames)
    except (VideoError, OSError, ValueError) as error:
        reason = getattr(error, "message", None) or getattr(error, "strerror", None) or str(error)
        raise BadClipError(f"{path} cannot be read ({reason}): repair it, or leave it out with --skip-bad") from error
    if len(clip) < least:
        raise BadClipError(f"{path} has {len(clip)} frames and needs {least}: leave it out with --skip-bad")
    return clip[:frames]


def _read_array(path: Path) -> np.ndarray:
    clip = np.load(path, mmap_mode="r", allow_pickle=False)
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(f"it is {clip.dtype} {list(clip.shape)}, not a non-empty uint8 [T,H,W,3]")
    return np.asarray(clip)


def _read_video(path: Path, count: int) -> np.ndarray:
    from nbp_reference.clips import frame_time
    from nbp_reference.film import open_film, orientation

    with open_film(path) as film:
        frames = list(islice(film.frames(0.0), count))
        if faults := film.faults(0.0):
            raise VideoError(", ".join(faults))
        if not frames:
            raise VideoError("it holds no video frames")
        gaps = [after - before for before, after in pairwise(map(frame_time, frames))]
        if gaps and max(gaps) > Fraction(3, 2) * min(gaps) + Fraction(1, 500):
            raise VideoError("its frame rate varies, so its first frames say nothing about motion")
        images = [orientation(frame).apply(frame.to_ndarray(format="rgb24")) for frame in frames]
    return np.stack(images)


def network_input(clip: np.ndarray) -> np.ndarray:
    """Return a clip, uint8 [T,H,W,3], as the network's input, float32 [3,T,224,224] in [−1,1]."""
    height, width = clip.shape[1:3]
    short = min(height, width)
    sizes = [SIDE if edge == short else ceil(edge * SIDE / short) for edge in (height, width)]
    pixels = clip.astype(np.float32) / np.float32(255)
    for axis, size in zip((1, 2), sizes, strict=True):
        pixels = _resized(pixels, axis, size)
    top, left = ((size - SIDE) // 2 for size in sizes)
    square = pixels[:, top : top + SIDE, left : left + SIDE]
    return np.ascontiguousarray(square.transpose(3, 0, 1, 2)) * np.float32(2) - np.float32(1)


def _resized(pixels: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Interpolate linearly along an axis. Pixel i of the result lies at (i + ½) · old/new − ½ of the original."""
    old = pixels.shape[axis]
    if old == size:
        return pixels
    place = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, None)
    low = np.minimum(place.astype(np.int64), old - 1)
    high = np.minimum(low + 1, old - 1)
    shape = [1] * pixels.ndim
    shape[axis] = size
    weight = (place - low).astype(np.float32).reshape(shape)
    below = np.take(pixels, low, axis)
    return np.asarray(below + (np.take(pixels, high, axis) - below) * weight)


def features(
    files: Iterable[Path], protocol: Protocol, network: Features, skipped: list[str] | None = None
) -> Iterator[np.ndarray]:
    """Yield the features [D] of each clip. Bad clips are appended to `skipped`, as text, if it is given.

    Raises BadClipError for a bad clip if `skipped` is None, and for features that are not finite.
    """
    for file in files:
        try:
            clip = read_clip(file, protocol.frames, protocol.least_frames)
        except BadClipError as error:
            if skipped is None:
                raise
            skipped.append(error.message)
            continue
        (values,) = network(network_input(clip)[None])
        if not np.isfinite(values).all():
            raise BadClipError(f"{file}: the network's output is not finite: check the clip and the network")
        yield np.asarray(values, np.float64)


def distance(real: np.ndarray, fake: np.ndarray, protocol: Protocol, skipped: Sequence[str] = ()) -> Distance:
    """Return the distance between features [N,D] and [M,D]. Consecutive rows may come from one source video.

    The interval leaves out the g-th group of consecutive clips from both sets. Raises UsageError for fewer than two
    clips per set.
    """
    if min(len(real), len(fake)) < 2:
        raise UsageError(f"a distance needs at least 2 clips per set, not {len(real)} real and {len(fake)} fake ones")
    count = min(len(real), len(fake), MOST_GROUPS)
    parts = [
        [Moments.of(part) for part in np.array_split(values, count)] for values in (real, fake)
    ]  # moments, so that no feature is visited again
    groups = list(zip(*parts, strict=True))

    def fvd(chosen: Sequence[tuple[Moments, Moments]]) -> float:
        both = (frechet.merge(side) for side in zip(*chosen, strict=True))
        return frechet.frechet_distance(*both)

    half = len(real) // 2
    return Distance(
        fvd=frechet.jackknife(groups, fvd),
        kvd=frechet.kernel_distance(real, fake),
        floor=_floor(real) if half >= 2 else None,
        n_real=len(real),
        n_fake=len(fake),
        n_floor=half,
        skipped=skipped,
        protocol=protocol,
    )


def _floor(real: np.ndarray) -> float:
    """Return the mean distance between disjoint random halves, as two equal distributions have it at that number."""
    rng, half = np.random.default_rng(0), len(real) // 2
    values = []
    for _ in range(FLOOR_DRAWS):
        order = rng.permutation(len(real))
        halves = (Moments.of(real[order[:half]]), Moments.of(real[order[half : 2 * half]]))
        values.append(frechet.frechet_distance(*halves))
    return float(np.mean(values))


def describe(result: Distance) -> str:
    """Return a distance in words, with everything that a reader needs to judge it."""
    interval = result.fvd
    interval_text = "" if interval.low is None else f", 95% interval {interval.low:.1f} to {interval.high:.1f}"
    missing_interval = f" (an interval needs {frechet.LEAST_GROUPS} clips per set)" if interval.low is None else ""
    floor = (
        "not measured: it needs four real clips"
        if result.floor is None
        else f"{result.floor:.1f} between random halves of the real clips, {result.n_floor} each"
    )
    protocol, scaling = result.protocol, f"{result.protocol.resize}, {result.protocol.crop}"
    numbers = f"{result.n_real} real and {result.n_fake} fake clips"
    lines = [
        f"FVD {interval.value:.1f}{interval_text}{missing_interval}, {numbers}",
        f"floor {floor}",
        f"KVD {result.kvd:.3g}",
        f"protocol {protocol.sha256[:12]}: {protocol.network}, {protocol.layer}, {protocol.frames} frames, {scaling}",
    ]
    return "\n".join(lines + [f"left out: {text}" for text in result.skipped])


def default_protocol() -> Protocol:
    """Return the protocol of the 400 logits of I3D."""
    return Protocol(I3D_NAME, I3D_SHA256)


def default_network() -> Features:
    """Return I3D in PyTorch. Raises UsageError without torch, NbpError without the weights."""
    try:
        from nbp_bench import i3d
    except ImportError as error:
        raise UsageError(
            "I3D needs torch here: pip install torch, or give --i3d FILE --sha256 HASH with the file and the hash of "
            "`nbp-bench i3d` from a machine that has it"
        ) from error
    i3d.installed_weights()
    return i3d.run


def onnx_network(path: Path, sha256: str, threads: int | None = None) -> tuple[Features, Protocol]:
    """Return a network from an ONNX file, [B,3,T,224,224] in [−1,1] → [B,D], and the protocol that names it.

    Raises UsageError if the file is missing, has another hash, or is not such a network.
    """
    import onnxruntime as ort

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: name the network's ONNX file with --i3d") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256.lower():
        raise UsageError(f"{path} has the hash {actual}, not {sha256}: check the file, or give its hash with --sha256")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has many kinds of errors
        raise UsageError(f"{path} is not a network that ONNX Runtime opens: {' '.join(str(error).split())}") from error
    if len(session.get_inputs()) != 1 or len(session.get_outputs()) != 1:
        raise UsageError(f"{path} must have one input and one output: video [B,3,T,224,224] and features [B,D]")
    name = session.get_inputs()[0].name
    # The file that `nbp-bench i3d` writes holds the weights of the default network, so its protocol is the same.
    weights = session.get_modelmeta().custom_metadata_map.get(WEIGHTS_KEY)
    protocol = Protocol(I3D_NAME, weights) if weights else Protocol(path.name, actual)
    return lambda video: session.run(None, {name: video})[0], protocol
