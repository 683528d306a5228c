"""The conditions of the clips: windows of a video, names of classes, or random frames where PyAV is missing.

Shape legend: F frames, H×W pixels, P text tokens.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from nbp_bench.host import Identity
from nbp_bench.plan import Plan
from nbp_bench.video import to_float, windows
from nbp_engines.spec import SystemSpec
from nbp_engines.text import class_ids
from nbp_errors import UsageError


class Conditions(NamedTuple):
    """The conditions of a model's clips.

    Attributes:
        arrays: per clip, the given frames, float32 [3,F,H,W] in [0,1], or the text ids of a class, int64 [P].
        source: one line that names the video or the classes.
        filmed: the frames of the first window, given and following, uint8 [F,3,H,W]; F is 0 without a video.
        classes: the class of each clip, if the model knows its classes by name.
    """

    arrays: Sequence[np.ndarray]
    source: str
    filmed: np.ndarray
    classes: Sequence[str] = ()


def conditions_for(identity: Identity, plan: Plan) -> Conditions:
    """Return a condition per clip, or fewer if the video is short or the model has fewer classes.

    Raises UsageError if a class-conditional model gets a video or the video is too short, VideoError if it cannot be
    read.
    """
    spec = identity.spec
    no_frames = np.empty((0, 3, *spec.video[1:]), np.uint8)
    if spec.hybrid:
        if plan.video:
            raise UsageError(f"{identity.name} generates clips of a class and takes no frames: leave out --video")
        return _texts(identity, no_frames)
    if not spec.video[0]:  # there is no tokenizer, so each row will say that no video can be predicted
        return Conditions([np.empty(0, np.float32)], "no video", no_frames)
    if plan.video is None and find_spec("av") is None:
        return _random_frames(spec, plan.clips, no_frames)
    scenes, name = windows(spec, plan.video, plan.clips)
    return Conditions([to_float(scene[: spec.condition_frames]) for scene in scenes], name, scenes[0])


def _texts(identity: Identity, no_frames: np.ndarray) -> Conditions:
    spec, classes = identity.spec, identity.words[1:]
    if not classes:
        return Conditions([np.zeros(spec.text_tokens, np.int64)], "text ids 0, for timing", no_frames)
    texts = [class_ids(name, spec, identity.words, None) for name in classes]
    return Conditions(texts, "class " + ", ".join(classes), no_frames, classes)


def _random_frames(spec: SystemSpec, count: int, no_frames: np.ndarray) -> Conditions:
    rng = np.random.default_rng(0)
    shape = (3, spec.condition_frames, *spec.video[1:])
    frames = [rng.random(shape, np.float32) for _ in range(count)]
    return Conditions(frames, "random frames, because PyAV is not installed", no_frames)
