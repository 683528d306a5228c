"""One measurement as one flat row: raw samples inside, every statistic derived from them.

None means not measured, never zero. What could not be measured at all is a row too, with the reason.
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
REFERENCE, BASELINE = "reference", "baseline"  # the roles that an engine may play


@dataclass(frozen=True)
class Record:
    """One engine at one block shape. Times are nanoseconds, memory bytes.

    Attributes:
        schema: version of this layout.
        run: when the command that measured it began, UTC; one value for all rows of a run.
        command: what was typed.
        machine, cores, memory_bytes, system, python, versions: where it ran.
        gpu, gpu_memory_bytes, driver: the machine's GPU, if it has one; `device` says whether it was used.
        model, weights_sha256, trained: what ran; quality means something only where `trained`.
        block, block_size, engine, dtype, batch, threads, device: how it ran.
        video: what gave the condition: a clip, a class, or noise.
        seed, temperature, top_k, top_p: of the sampling.
        interleaved: whether the engines took turns, clip by clip, in processes kept alive together.
        frames: predicted frames a clip.
        steps: forward passes a clip as the paper counts them, the prefill being the first.
        total_ns: wall time of each clip, end to end; the stages add up to it. Empty if it was not measured.
        encode_ns, prefill_ns, step_ns, sample_ns, decode_ns: every call of a stage, clip after clip. A GPU goes on
            after a call has returned: there a sample's time holds most of its step's.
        loop_ns: in place of prefill, step and sample, where an engine does all of a clip's steps in one go.
        first_frame_ns: from the call to the first predicted frames, when streaming.
        peak_memory_bytes: largest resident size of the engine's own process.
        peak_device_bytes: on a GPU, the most that the engine holds there while it makes a clip: weights, buffers and
            what it allocates meanwhile.
        token_agreement: share of predicted tokens equal to the reference engine's, same noise.
        first_divergence: the first predicted token, in generation order, that differs; None if none does.
        fvd: Fréchet video distance.
        device_step_ns: single steps back to back by the device's own clock, positions as in a clip, without sampling.
        device_pass_ns: the same with sampling, and the tokens' way to the host and back.
        step_bytes: what such a step has to read, in the mean: weights once, and the valid rows of the caches, not their
            whole capacity.
        copy_bandwidth: bytes a second, read and written, of a large copy on the device in the same run.
        peak_bandwidth: the same by the device's clock and bus width.
        parity_error: worst element of all checks against the fp32 reference, in units of the largest expected; the
            largest float where it is not finite, which JSON does not have.
        parity_allowed: what that check allowed.
        parity_where: the check and its element.
        role: `reference`, whose tokens the others' are compared with, or `baseline`, the authors' own loop.
        not_measured: why there are no samples; None where there are.
        bundle_sha256: of the bundle's manifest, for an engine that runs one.
        notes: what a reader should know, such as which attention kernel was chosen.
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
        """Median wall time of a clip."""
        return median(self.total_ns) / 1e9 if self.total_ns else None

    @property
    def fps(self) -> float | None:
        """Predicted frames per second, end to end, of the median clip; all clips of a batch count."""
        return self.frames * self.batch / self.seconds if self.seconds else None

    @property
    def failed(self) -> bool:
        """Whether a check against the reference failed: the engine does not compute the model."""
        return (self.parity_error or 0) > (self.parity_allowed or 0)

    @property
    def spread(self) -> float | None:
        """Interquartile range of the clips' wall times over their median; None below four clips."""
        if len(self.total_ns) < 4:
            return None
        low, _, high = quantiles(self.total_ns, n=4)
        return (high - low) / median(self.total_ns)

    @property
    def first_frame_seconds(self) -> float | None:
        """Median time to the first predicted frames."""
        return median(self.first_frame_ns) / 1e9 if self.first_frame_ns else None

    def stage_seconds(self, stage: str) -> float | None:
        """Mean time that a clip spends in a stage, all its calls together."""
        return float(sum(getattr(self, f"{stage}_ns"))) / len(self.total_ns) / 1e9 if self.total_ns else None

    @property
    def step_ms(self) -> float | None:
        """Median time of one step, sampling not included; None where a clip has no step after the prefill."""
        return median(self.step_ns) / 1e6 if self.step_ns else None

    @property
    def device_step_ms(self) -> float | None:
        """Median time of one step on the device."""
        return median(self.device_step_ns) / 1e6 if self.device_step_ns else None

    @property
    def device_pass_ms(self) -> float | None:
        """Median time of one step with sampling, back to back."""
        return median(self.device_pass_ns) / 1e6 if self.device_pass_ns else None

    def share_of(self, bandwidth: float | None) -> float | None:
        """How much of a bandwidth the median step uses, if it reads no byte more than it has to."""
        if bandwidth is None or self.step_bytes is None or self.device_step_ms is None:
            return None
        return self.step_bytes / (self.device_step_ms / 1e3) / bandwidth

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read one line; raises RecordError for another schema, for an unknown name and for a missing one.

        A name that has a default may be missing: a column that was added later orphans no record.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise RecordError(f"record schema {data['schema']!r}, this version reads {SCHEMA}")
            needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
            missing = needed - set(data)
            if missing:
                raise RecordError(f"record lacks {', '.join(sorted(missing))}")
            return cls(**data)
        except (ValueError, TypeError, KeyError) as error:
            raise RecordError(f"not a record: {error}") from error


def write(records: Iterable[Record], path: Path) -> None:
    """One JSON object per line; an interrupted write leaves the old file. Raises ValueError for NaN and infinity."""
    text = "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in records)
    write_text(path, text)


def read(path: Path) -> list[Record]:
    """The records of a file; raises RecordError naming the file and line."""
    records = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            records.append(Record.from_json(line))
        except RecordError as error:
            raise RecordError(f"{path}:{number}: {error.message}") from error
    return records
