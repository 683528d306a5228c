"""Real clips to predict from."""

from pathlib import Path

import numpy as np

from nbp_engines.errors import UsageError
from nbp_engines.spec import SystemSpec
from nbp_reference import clips


def windows(spec: SystemSpec, video: Path | None, count: int) -> tuple[list[np.ndarray], str]:
    """Up to `count` windows, uint8 [F,3,H,W], spread over a video, and the video's name.

    Each begins with the frames that are given; what follows them is the truth, as far as the video goes. A named file
    is used whole; of the bundled clip, the part that no training has seen.

    Raises UsageError for a video with too few frames, ReferenceError for one that cannot be read.
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
