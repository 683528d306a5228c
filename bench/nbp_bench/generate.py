"""One video that a bundle generates: the continuation of a given video, or a clip of a class.

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

LEAST_HEIGHT = 256  # Smaller pictures are enlarged to at least this many pixels.
CLASS_RATE = Fraction(25)  # frames per second of UCF-101


@dataclass(frozen=True)
class ClipRequest:
    """The options of `nbp-bench generate`.

    Attributes:
        bundle: folder of the bundle.
        out: file to write; an existing file is replaced only with `force`.
        video: file that the given frames are taken from, beginning at `start` seconds.
        class_name: name of a class. It is read through `text_tokenizer` if the bundle has no words of its own.
        text_ids: the text ids of a class, `5,0,0,0,0,0,0,0` for example, instead of its name.
        rate: frames per second. A video is resampled to this rate; a clip of a class plays at it.
        seed: seed of the noise. The clips have the clip indices 0, 1, 2, …
        grid: number of clips, shown beside the filmed frames if the video is long enough; None for one clip alone.
        scale: factor by which pixels are enlarged; None for the smallest factor that reaches `LEAST_HEIGHT`.
        sampling: sampling settings that differ from the bundle's, by name.
        threads: threads per operator; None for the runtime's own choice.
        runtime: name of a runtime; None for the one that the bundle was exported for.
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
    """The condition of a clip.

    Attributes:
        summary: one line that describes it.
        rate: frames per second of the result.
        filmed: the given frames and the frames that follow them in the video, uint8 [F,3,H,W]; F is 0 for a class.
        text: text ids of a class, int64 [P]; None for a video.
    """

    summary: str
    rate: Fraction
    filmed: np.ndarray
    text: np.ndarray | None = None


class _ReportingGenerator(Generator):
    """A generator that reports each block, for a progress bar."""

    def __init__(self, session: Session, sampling: Sampling, seed: int, report: Callable[[], None]) -> None:
        super().__init__(session, sampling, seed)
        self._report = report

    def blocks(
        self, condition: np.ndarray, clip_index: int = 0, timeline: Timeline | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the blocks of `Generator.blocks`."""
        for clip in super().blocks(condition, clip_index, timeline):
            self._report()
            yield clip


def generate(console: "Console", request: ClipRequest) -> str:
    """Generate the clips, write the video, and return one line about it. The condition is printed first.

    Raises UsageError if the bundle cannot do what is requested or the file cannot be written, VideoError if the given
    video cannot be read.
    """
    with video.output_file(request.out, request.force) as partial:
        bundle = Bundle.open(request.bundle)
        spec = bundle.manifest.spec
        if "decode" not in bundle.manifest.graphs:
            raise UsageError(f"{bundle.path} has no decode graph: export it with --tokenizer FILE")
        condition = _from_class(request, bundle) if spec.hybrid else _from_video(request, spec)
        scale = request.scale or -(-LEAST_HEIGHT // spec.video[1])
        truth = bool(request.grid) and len(condition.filmed) == spec.video[0]
        edges = [n * scale + 2 * video.BORDER for n in spec.video[1:]]
        video.check_size(request.out, (request.grid or 1) + truth, spec.video[0], *edges)
        for line in (condition.summary, *_warnings(request, bundle, condition.rate)):
            console.print(line, soft_wrap=True)
        batches = _generate(console, request, bundle, condition)
        predicted = [video.to_uint8(clip) for batch in batches for clip in batch.video][: request.grid or 1]
        given_frames = condition.filmed[: spec.condition_frames]
        tiles = [video.framed(np.concatenate([given_frames, frames]), len(given_frames), scale) for frames in predicted]
        if truth:
            tiles.insert(0, video.framed(condition.filmed, len(condition.filmed), scale))
        video.write(partial, tiles, condition.rate)
    seconds = sum(batch.timeline.total_ns for batch in batches) / 1e9
    total = sum(map(len, predicted))
    before = f"{len(given_frames)} given frames (blue) and " if len(given_frames) else ""
    each = f" in each of {len(predicted)} clips" if len(predicted) > 1 else ""
    return (
        f"{request.out}: {before}{total // len(predicted)} predicted frames (orange){each}, "
        f"generated in {seconds:.2f} s ({total / seconds:.2f} frames per second)"
    )


def _warnings(request: ClipRequest, bundle: Bundle, rate: Fraction) -> Iterator[str]:
    """Yield warnings about the clip, before it is generated."""
    if not bundle.manifest.model["trained"]:
        note = bundle.manifest.provenance["note"]
        yield f"the weights of {bundle.path} were not trained for its blocks, so the clip will mean nothing ({note})"
    written = video.playable_rate(request.out, rate)
    if written != rate:
        speed = f"{float(rate / written):.3g} times too slow" if rate > written else "too fast"
        yield (
            f"{request.out.name}: browsers cannot play a .gif at {_fps(rate)}, so it plays at {_fps(written)}, which "
            f"is {speed}: choose --rate {float(written):.3g} or a .mp4 to keep the speed"
        )


def _generate(console: "Console", request: ClipRequest, bundle: Bundle, condition: _Condition) -> list[Clip]:
    """Generate as many batches as the requested clips need, and show a progress bar on a terminal."""
    spec = bundle.manifest.spec
    batches = -(-(request.grid or 1) // spec.batch)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        open_session(bundle, request.threads, runtime=request.runtime) as session,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("blocks", total=batches * spec.blocks)
        sampling = replace(bundle.manifest.sampling, **request.sampling)
        generator = _ReportingGenerator(session, sampling, request.seed, lambda: progress.advance(task))
        clip_indices = [batch * spec.batch for batch in range(batches)]
        if condition.text is not None:
            text = np.tile(condition.text, (spec.batch, 1))
            return [generator.generate(text, index) for index in clip_indices]
        frames = video.to_float(condition.filmed[: spec.condition_frames])
        return [generator.predict(np.stack([frames] * spec.batch), index) for index in clip_indices]


def _from_video(request: ClipRequest, spec: SystemSpec) -> _Condition:
    for option, value in (
        ("--class", request.class_name),
        ("--text-ids", request.text_ids),
        ("--text-tokenizer", request.text_tokenizer),
    ):
        if value is not None:
            raise UsageError(f"{request.bundle} predicts from given frames: use --video FILE instead of {option}")
    if request.video is None:
        raise UsageError(f"{request.bundle} predicts from given frames: name a video with --video FILE")
    frames, side, _ = spec.video
    footage = clips.footage(request.video, side, frames, request.start, request.rate)
    count, needed = len(footage.frames), spec.condition_frames
    if count == 1 and not footage.start and not footage.faults:
        raise UsageError(f"{request.video} is a single picture, and the model needs {needed} given frames: use a video")
    if count < needed:
        whole = "".join(f", {fault}" for fault in footage.faults)
        raise UsageError(
            f"{request.video} has {count} {'undamaged ' * bool(whole)}frames from {footage.start:.1f} s on at "
            f"{_fps(footage.rate)}{whole}, and the model needs {needed} given frames, which are "
            f"{float(needed / footage.rate):.2f} s: use a longer video, {'another' if whole else 'an earlier'} --start "
            "or a higher --rate"
        )
    return _Condition(_summary(footage, request.video, side, needed), footage.rate, clips.centre(footage.frames, side))


def _summary(footage: Footage, path: Path, side: int, count: int) -> str:
    """Describe the video, and any scaling, cropping and resampling, in one line."""
    height, width = footage.frames.shape[2:]
    lasts = f", {footage.seconds:.1f} s" if footage.seconds else ""
    track = f"{footage.track}, " if footage.track else ""
    pixels = "" if footage.pixel == 1 else f" of {footage.pixel.numerator}:{footage.pixel.denominator} pixels"
    changes = [str(footage.orientation)] if any(footage.orientation) else []
    if footage.resampled:
        changes.append(f"resampled to a constant {_fps(footage.rate)}")
    if (width, height) != footage.size:
        square = " of square pixels" if pixels else ""
        changes.append(f"{'enlarged' if height > footage.size[1] else 'scaled'} to {width}x{height}{square}")
    if (width, height) != (side, side):
        changes.append(f"cropped to the central {side}x{side}")
    changes.append(f"given frames 0-{count - 1} begin at {footage.start:.1f} s")
    size = f"{'x'.join(map(str, footage.size))}{pixels}"
    return f"{path.name}: {track}{size} at {_fps(footage.filmed_rate)}{lasts}; {', '.join([*footage.faults, *changes])}"


def _fps(rate: Fraction) -> str:
    return f"{float(rate):.4g} fps"


def _from_class(request: ClipRequest, bundle: Bundle) -> _Condition:
    spec, words = bundle.manifest.spec, bundle.manifest.words
    for option, value in (("--video", request.video), ("--start", request.start or None)):
        if value is not None:
            raise UsageError(
                f"{request.bundle} generates clips of a class: use --class NAME or --text-ids instead of {option}"
            )
    match request.class_name, request.text_ids:
        case str(name), None:
            name_text, ids = f"class {name}: ", class_ids(name, spec, words, request.text_tokenizer)
        case None, str(listed) if request.text_tokenizer is None:
            name_text, ids = "", listed_ids(listed, spec)
        case None, None:
            raise UsageError(f"{request.bundle} generates clips of a class: name one with --class NAME or --text-ids")
        case _:
            raise UsageError("--text-ids already give the class: leave out --class and --text-tokenizer")
    no_frames = np.zeros((0, 3, *spec.video[1:]), np.uint8)
    summary = f"{name_text}text ids {','.join(map(str, ids))}"
    return _Condition(summary, request.rate or CLASS_RATE, no_frames, ids)
