"""One video of what a bundle makes: of a film it predicts on from, or of a class.

Shape legend: B batch, F frames, H×W pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nbp_bench import video
from nbp_engines.bundle import Bundle
from nbp_engines.generator import Clip, Generator, Timeline
from nbp_engines.registry import open_session
from nbp_engines.sampling import Sampling
from nbp_engines.session import Session
from nbp_engines.spec import SystemSpec
from nbp_engines.text import class_ids, listed_ids
from nbp_errors import UsageError
from nbp_reference import clips
from nbp_reference.clips import Footage

if TYPE_CHECKING:
    from rich.console import Console

LEAST_HEIGHT = 256  # pixels of a picture that is enlarged for being small
CLASS_RATE = Fraction(25)  # UCF-101's


@dataclass(frozen=True)
class Order:
    """What to make.

    Attributes:
        bundle: that makes it.
        out: file to write; an existing one only if `force`.
        video: file to predict from, from `start` seconds on.
        class_name: class to make a clip of, read through `text_tokenizer` where the bundle has no words of its own.
        text_ids: the class as ids, `5,0,0,0,0,0,0,0`, instead.
        rate: frames a second that the video is resampled to, or that a class's clip plays at.
        seed: of the first clip; each further one has the next.
        grid: clips; None for one alone, else with the filmed truth beside them where the video goes on.
        scale: pixels that each becomes, squared; None to reach a fair size.
        sampling: what differs from the bundle's defaults, by name.
        threads: inside an operator; None for the runtime's own choice.
        runtime: a name of the registry; None for the one that the bundle was made for.
    """

    bundle: Path
    out: Path
    force: bool = False
    video: Path | None = None
    start: float = 0.0
    class_name: str | None = None
    text_ids: str | None = None
    text_tokenizer: Path | None = None
    rate: Fraction | None = None
    seed: int = 0
    grid: int | None = None
    scale: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    runtime: str | None = None


class _Condition(NamedTuple):
    """What a clip is made from.

    Attributes:
        told: a line about it.
        rate: frames a second to play at.
        filmed: uint8 [F,3,H,W], the given frames and as many of the next as there are; none for a class.
        text: ids int64 [P] of a class.
    """

    told: str
    rate: Fraction
    filmed: np.ndarray
    text: np.ndarray | None = None


class _WatchedGenerator(Generator):
    """A generator that reports every block."""

    def __init__(self, session: Session, sampling: Sampling, report: Callable[[], None]) -> None:
        super().__init__(session, sampling)
        self._report = report

    def blocks(self, condition: np.ndarray, sample: int = 0, timeline: Timeline | None = None) -> Iterator[np.ndarray]:
        """The same blocks."""
        for clip in super().blocks(condition, sample, timeline):
            self._report()
            yield clip


def generate(console: "Console", order: Order) -> str:
    """Make the video and return a line about it; what it is made from is printed before.

    Raises UsageError for what the bundle cannot make and for a file that cannot be written, VideoError for a video
    that cannot be read.
    """
    with video.appearing(order.out, order.force) as partial:
        bundle = Bundle.open(order.bundle)
        spec = bundle.manifest.spec
        if "decode" not in bundle.manifest.graphs:
            raise UsageError(f"{bundle.path} has no decode graph: export it with --tokenizer FILE")
        condition = _from_class(order, bundle) if spec.hybrid else _from_video(order, spec)
        scale = order.scale or -(-LEAST_HEIGHT // spec.video[1])
        truth = bool(order.grid) and len(condition.filmed) == spec.video[0]
        edges = [n * scale + 2 * video.BORDER for n in spec.video[1:]]
        video.check_size(order.out, (order.grid or 1) + truth, spec.video[0], *edges)
        for line in (condition.told, *_warnings(order, bundle, condition.rate)):
            console.print(line, soft_wrap=True)
        made = _make(console, order, bundle, condition)
        predicted = [video.to_uint8(one) for clip in made for one in clip.video][: order.grid or 1]
        given = condition.filmed[: spec.condition_frames]
        tiles = [video.framed(np.concatenate([given, frames]), len(given), scale) for frames in predicted]
        if truth:
            tiles.insert(0, video.framed(condition.filmed, len(condition.filmed), scale))
        video.write(partial, tiles, condition.rate)
    seconds = sum(clip.timeline.total_ns for clip in made) / 1e9
    total = sum(map(len, predicted))
    before = f"{len(given)} frames given (blue) + " if len(given) else ""
    each = f" in each of {len(predicted)} clips" if len(predicted) > 1 else ""
    return (
        f"{order.out}: {before}{total // len(predicted)} predicted (orange){each}, "
        f"made in {seconds:.2f} s: {total / seconds:.2f} frames/s"
    )


def _warnings(order: Order, bundle: Bundle, rate: Fraction) -> Iterator[str]:
    """What is to be known of the clip before it is made."""
    if not bundle.manifest.model["trained"]:
        note = bundle.manifest.provenance["note"]
        yield f"{bundle.path} holds weights that were not trained for its blocks: expect noise ({note})"
    written = video.settled_rate(order.out, rate)
    if written != rate:
        speed = f"{float(rate / written):.3g} times slower" if rate > written else "faster"
        yield (
            f"{order.out.name}: a .gif cannot play at {_fps(rate)} everywhere, so it is written at {_fps(written)}, "
            f"{speed}: for the right speed choose --rate {float(written):.3g} or a .mp4"
        )


def _make(console: "Console", order: Order, bundle: Bundle, condition: _Condition) -> list[Clip]:
    """As many batches as the clips need."""
    spec = bundle.manifest.spec
    batches = -(-(order.grid or 1) // spec.batch)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        open_session(bundle, order.threads, runtime=order.runtime) as session,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("blocks", total=batches * spec.blocks)
        sampling = replace(bundle.manifest.sampling, **order.sampling)
        generator = _WatchedGenerator(session, sampling, lambda: progress.advance(task))
        # A clip's noise is that of its own seed, whatever batch it is made in.
        samples = [order.seed + batch * spec.batch for batch in range(batches)]
        if condition.text is not None:
            text = np.tile(condition.text, (spec.batch, 1))
            return [generator.generate(text, sample) for sample in samples]
        given = video.to_float(condition.filmed[: spec.condition_frames])
        return [generator.predict(np.stack([given] * spec.batch), sample) for sample in samples]


def _from_video(order: Order, spec: SystemSpec) -> _Condition:
    for option, value in (
        ("--class", order.class_name),
        ("--text-ids", order.text_ids),
        ("--text-tokenizer", order.text_tokenizer),
    ):
        if value is not None:
            raise UsageError(f"{order.bundle} predicts from frames: give --video FILE, not {option}")
    if order.video is None:
        raise UsageError(f"{order.bundle} predicts from frames: which? --video FILE")
    frames, side, _ = spec.video
    footage = clips.footage(order.video, side, frames, order.start, order.rate)
    count, needed = len(footage.frames), spec.condition_frames
    if count == 1 and not footage.start and not footage.faults:
        raise UsageError(f"{order.video} holds a single picture, the model is given {needed} frames: take a video")
    if count < needed:
        whole = "".join(f", {fault}" for fault in footage.faults)
        raise UsageError(
            f"{order.video} has {count} {'whole ' * bool(whole)}frames from {footage.start:.1f} s on at "
            f"{_fps(footage.rate)}{whole}, the model is given {needed}, {float(needed / footage.rate):.2f} s: take a "
            f"longer video, {'another' if whole else 'an earlier'} --start or a higher --rate"
        )
    return _Condition(_tell(footage, order.video, side, needed), footage.rate, clips.centre(footage.frames, side))


def _tell(footage: Footage, path: Path, side: int, given: int) -> str:
    """What was filmed, and what became of it."""
    height, width = footage.frames.shape[2:]
    lasts = f", {footage.seconds:.1f} s" if footage.seconds else ""
    track = f"{footage.track}, " if footage.track else ""
    pixels = "" if footage.pixel == 1 else f" of {footage.pixel.numerator}:{footage.pixel.denominator} pixels"
    done = [str(footage.orientation)] if any(footage.orientation) else []
    if footage.resampled:
        done.append(f"resampled to a constant {_fps(footage.rate)}")
    if (width, height) != footage.size:
        square = " of square pixels" if pixels else ""
        done.append(f"{'enlarged' if height > footage.size[1] else 'scaled'} to {width}x{height}{square}")
    if (width, height) != (side, side):
        done.append(f"centre {side}x{side} kept")
    done.append(f"frames 0-{given - 1} given from {footage.start:.1f} s")
    size = f"{'x'.join(map(str, footage.size))}{pixels}"
    return f"{path.name}: {track}{size} at {_fps(footage.filmed_rate)}{lasts}; {', '.join([*footage.faults, *done])}"


def _fps(rate: Fraction) -> str:
    return f"{float(rate):.4g} fps"


def _from_class(order: Order, bundle: Bundle) -> _Condition:
    spec, words = bundle.manifest.spec, bundle.manifest.words
    for option, value in (("--video", order.video), ("--start", order.start or None)):
        if value is not None:
            raise UsageError(f"{order.bundle} makes clips of a class: give --class NAME or --text-ids, not {option}")
    match order.class_name, order.text_ids:
        case str(name), None:
            told, ids = f"class {name}: ", class_ids(name, spec, words, order.text_tokenizer)
        case None, str(listed) if order.text_tokenizer is None:
            told, ids = "", listed_ids(listed, spec)
        case None, None:
            raise UsageError(f"{order.bundle} makes clips of a class: which? --class NAME, or --text-ids")
        case _:
            raise UsageError("--text-ids say it all: leave out --class and --text-tokenizer")
    nothing = np.zeros((0, 3, *spec.video[1:]), np.uint8)
    return _Condition(f"{told}text ids {','.join(map(str, ids))}", order.rate or CLASS_RATE, nothing, ids)
