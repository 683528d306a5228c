"""A record is one flat row with all raw measurements of a case; every statistic is derived from them.

None means that a value was not measured, and it never stands for zero. An engine that could not be measured has a
record, too, which gives the reason.
"""

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Self

from nbp_files import write_text
from nbp_reports.errors import RecordError

SCHEMA = 2
STAGES = ("encode", "prefill", "step", "sample", "loop", "decode")
REFERENCE, BASELINE = "reference", "baseline"  # the roles that an engine may have in the comparison


@dataclass(frozen=True)
class Record:
    """All measurements of one engine on one model. Times are in nanoseconds, memory is in bytes.

    Attributes:
        schema: the version of this layout.
        run: the start of the command, in UTC; all records of a run have the same value.
        command: the command line.
        machine, cores, memory_bytes, system, python, versions: the machine and the software.
        gpu, gpu_memory_bytes, driver: the machine's GPU; None if it has none. `device` says whether it was used.
        model, weights_sha256, trained: the model, and whether its weights were trained for the block; if not, only
            speed and memory are meaningful.
        block, block_size, engine, dtype, batch, threads, device: the settings of the engine.
        video: the source of the condition: a video, classes, text ids, or random frames.
        seed, temperature, top_k, top_p: the settings of the sampling.
        interleaved: whether the engines took turns, clip by clip, instead of running one after another.
        frames: predicted frames per clip.
        steps: forward passes per clip as the paper counts them, in which the prefill is the first step.
        total_ns: the wall time of each clip, or of each batch of clips, to which its stages add up; empty if nothing
            was measured.
        encode_ns, prefill_ns, step_ns, sample_ns, decode_ns: the time of every call of a stage, clip after clip. On a
            GPU, calls return before the work is done, so the time of a sample includes most of its step.
        loop_ns: the time of prefill, steps and sampling together, for an engine that does not return between them.
        first_frame_ns: the time from the call to the first predicted frames, when streaming.
        peak_memory_bytes: the largest resident size of the engine's own process.
        peak_device_bytes: the largest memory that the engine holds on a GPU while it makes a clip: weights, buffers and
            temporary allocations.
        token_agreement: the share of predicted tokens that equal the reference engine's with the same noise.
        first_divergence: the index, in generation order, of the first predicted token that differs; None if none does.
        fvd: the Fréchet video distance.
        device_step_ns: the times of single steps back to back by the device's clock, without sampling, at cache
            positions spread over a clip.
        device_pass_ns: the same with sampling and the copies of the tokens to the host and back.
        step_bytes: the mean number of bytes that such a step has to read: the weights once, and the valid rows of the
            caches instead of their whole capacity.
        copy_bandwidth: the bandwidth of a large copy on the device in the same run, in bytes read and written per
            second.
        peak_bandwidth: the bandwidth in bytes per second that follows from the device's memory clock and bus width.
        parity_error: the largest error of all checks against the fp32 reference, relative to the largest expected
            magnitude or to 1, whichever is larger; the largest float if the error is not finite, because JSON has no
            infinity.
        parity_allowed: the tolerance of the check with that error.
        parity_where: that check, and the element with the error.
        role: `reference` for the engine whose tokens the others are compared with, `baseline` for the authors' loop.
        not_measured: the reason why there are no samples; None if there are.
        bundle_sha256: the hash of the bundle's manifest, for an engine that runs a bundle.
        notes: remarks for the reader, such as the chosen attention kernel.
    """

    run: str
    command: str
    machine: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    versions: str
    gpu: str | None
    gpu_memory_bytes: int | None
    driver: str | None
    model: str
    weights_sha256: str
    trained: bool
    block: str
    block_size: int
    engine: str
    dtype: str
    batch: int
    threads: int | None
    device: str
    video: str
    seed: int
    temperature: float
    top_k: int
    top_p: float
    interleaved: bool
    frames: int
    steps: int
    total_ns: list[int]
    encode_ns: list[int]
    prefill_ns: list[int]
    step_ns: list[int]
    sample_ns: list[int]
    decode_ns: list[int]
    first_frame_ns: list[int]
    peak_memory_bytes: int | None
    token_agreement: float | None
    first_divergence: int | None
    loop_ns: list[int] = field(default_factory=list)
    peak_device_bytes: int | None = None
    fvd: float | None = None
    device_step_ns: list[int] = field(default_factory=list)
    device_pass_ns: list[int] = field(default_factory=list)
    step_bytes: int | None = None
    copy_bandwidth: float | None = None
    peak_bandwidth: float | None = None
    parity_error: float | None = None
    parity_allowed: float | None = None
    parity_where: str | None = None
    role: str | None = None
    not_measured: str | None = None
    bundle_sha256: str | None = None
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def seconds(self) -> float | None:
        """The median wall time of a clip."""
        return median(self.total_ns) / 1e9 if self.total_ns else None

    @property
    def fps(self) -> float | None:
        """Predicted frames per second of the median clip, end to end; in a batch, the frames of all its clips count."""
        return self.frames * self.batch / self.seconds if self.seconds else None

    @property
    def failed(self) -> bool:
        """Whether a check against the reference failed, so that the engine does not compute the model."""
        return (self.parity_error or 0) > (self.parity_allowed or 0)

    @property
    def spread(self) -> float | None:
        """The interquartile range of the clips' wall times over their median; None for fewer than four clips."""
        if len(self.total_ns) < 4:
            return None
        low, _, high = quantiles(self.total_ns, n=4)
        return (high - low) / median(self.total_ns)

    @property
    def first_frame_seconds(self) -> float | None:
        """The median time to the first predicted frames."""
        return median(self.first_frame_ns) / 1e9 if self.first_frame_ns else None

    def stage_seconds(self, stage: str) -> float | None:
        """Return the mean time per clip of all calls of a stage."""
        return float(sum(getattr(self, f"{stage}_ns"))) / len(self.total_ns) / 1e9 if self.total_ns else None

    @property
    def step_ms(self) -> float | None:
        """The median time of one step without sampling; None if a clip has no step after the prefill."""
        return median(self.step_ns) / 1e6 if self.step_ns else None

    @property
    def device_step_ms(self) -> float | None:
        """The median time of one step without sampling, by the device's clock."""
        return median(self.device_step_ns) / 1e6 if self.device_step_ns else None

    @property
    def device_pass_ms(self) -> float | None:
        """The median time of one step with sampling, by the device's clock."""
        return median(self.device_pass_ns) / 1e6 if self.device_pass_ns else None

    def bandwidth_share(self, bandwidth: float | None) -> float | None:
        """Return the share of a bandwidth that the median step uses if it only reads `step_bytes`."""
        if bandwidth is None or self.step_bytes is None or self.device_step_ms is None:
            return None
        return self.step_bytes / (self.device_step_ms / 1e3) / bandwidth

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse one line of a file of records.

        Fields with a default may be missing, so that records from before these fields were added can be read. Raises
        RecordError for another schema, and for unknown or missing fields.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise RecordError(f"the record has schema {data['schema']!r}, but this version reads schema {SCHEMA}")
            required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
            missing = required - set(data)
            if missing:
                raise RecordError(f"the record lacks {', '.join(sorted(missing))}")
            return cls(**data)
        except (ValueError, TypeError, KeyError) as error:
            raise RecordError(f"not a record: {error}") from error


def write(records: Iterable[Record], path: Path) -> None:
    """Write the records to a file, one JSON object per line.

    An older file stays as it was until all records are written. Raises ValueError for NaN and infinity.
    """
    text = "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in records)
    write_text(path, text)


def read(path: Path) -> list[Record]:
    """Read the records of a file; raises RecordError, which names the file and the line."""
    records = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            records.append(Record.from_json(line))
        except RecordError as error:
            raise RecordError(f"{path}:{number}: {error.message}") from error
    return records
