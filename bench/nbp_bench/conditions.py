"""What clips are made from: windows of a video, the names of classes, or noise where no video can be read.

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
        arrays: the given frames of each clip, float32 [3,F,H,W] in [0,1], or the text ids int64 [P] of a class.
        source: one line that says where they come from.
        filmed: the first clip as filmed, uint8 [F,3,H,W], as far as the video goes; empty where nothing was.
        classes: what each clip shows, for a class-conditional model that knows words.
    """

    arrays: Sequence[np.ndarray]
    source: str
    filmed: np.ndarray
    classes: Sequence[str] = ()


def conditions_for(identity: Identity, plan: Plan) -> Conditions:
    """As many conditions as there are clips, or as the video and the classes give.

    Raises UsageError for a video with a class-conditional model and for one that is too short, VideoError for one that
    cannot be read.
    """
    spec = identity.spec
    nothing = np.empty((0, 3, *spec.video[1:]), np.uint8)
    if spec.hybrid:
        if plan.video:
            raise UsageError(f"{identity.name} makes clips of a class and takes no frames: leave out --video")
        return _texts(identity, nothing)
    if not spec.video[0]:  # without a tokenizer nothing is predicted, which each row then says
        return Conditions([np.empty(0, np.float32)], "no video", nothing)
    if plan.video is None and find_spec("av") is None:
        return _noise(spec, plan.clips, nothing)
    scenes, name = windows(spec, plan.video, plan.clips)
    return Conditions([to_float(scene[: spec.condition_frames]) for scene in scenes], name, scenes[0])


def _texts(identity: Identity, nothing: np.ndarray) -> Conditions:
    spec, classes = identity.spec, identity.words[1:]
    if not classes:
        return Conditions([np.zeros(spec.text_tokens, np.int64)], "text ids 0, for timing", nothing)
    texts = [class_ids(name, spec, identity.words, None) for name in classes]
    return Conditions(texts, "class " + ", ".join(classes), nothing, classes)


def _noise(spec: SystemSpec, count: int, nothing: np.ndarray) -> Conditions:
    rng = np.random.default_rng(0)
    shape = (3, spec.condition_frames, *spec.video[1:])
    frames = [rng.random(shape, np.float32) for _ in range(count)]
    return Conditions(frames, "noise frames, because PyAV is not installed", nothing)
