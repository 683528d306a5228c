"""The record of one case, made from its measurements."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nbp_bench.conditions import Conditions
from nbp_bench.host import Identity
from nbp_bench.machine import Machine
from nbp_bench.measure import Memory, Parity, Result, StepTimes
from nbp_bench.plan import Case, Plan
from nbp_engines.bundle import Bundle
from nbp_engines.sampling import Sampling
from nbp_engines.spec import BYTES, SystemSpec
from nbp_reports.record import REFERENCE, STAGES, Record


@dataclass
class Measurement:
    """The results of a case so far.

    Attributes:
        case: the case.
        bundle: the bundle that its runtime runs; None for a PyTorch engine.
        clips, first_frames, steps, parity, memory: results; empty or None if not measured.
        notes: sentences for the record that explain the results.
        optional_failures: sentences that say which comparison or timing beside the clips failed, and why.
        failure: why the measurement failed or stopped; empty if it did not.
        opened_in: the worker's `starts` when the case was opened in its process; 0 if the case is not open.
    """

    case: Case
    bundle: Bundle | None = None
    clips: list[Result] = field(default_factory=list)
    first_frames: list[Result] = field(default_factory=list)
    steps: StepTimes | None = None
    parity: Parity | None = None
    memory: Memory | None = None
    notes: list[str] = field(default_factory=list)
    optional_failures: list[str] = field(default_factory=list)
    failure: str = ""
    opened_in: int = 0


@dataclass(frozen=True)
class Run:
    """The facts that all rows of a group share.

    Attributes:
        plan: the plan of the run.
        began: when the run began, in UTC.
        identity: the model.
        conditions: the conditions of the clips.
        reference: the clips of the reference engine; None if it has made none.
        interleaved: whether the engines took turns.
        bandwidths: bytes per second of a large copy on the device, and of its memory at its peak; None if not measured.
        machine: the machine that the run uses.
    """

    plan: Plan
    began: str
    identity: Identity
    conditions: Conditions
    reference: Sequence[Result] | None
    interleaved: bool
    bandwidths: tuple[float | None, float | None]
    machine: Machine


def identity_of(bundle: Bundle) -> Identity:
    """Return the facts that a bundle's manifest states about its model."""
    manifest = bundle.manifest
    weights = sum(file.size for file in manifest.files if file.path.endswith(".data"))
    return Identity(
        manifest.model["name"],
        manifest.model["weights_sha256"],
        manifest.model["trained"],
        f"{bundle.path}: {manifest.provenance['note']}",
        replace(manifest.spec, dtype="fp32", batch=1),
        weights // BYTES[manifest.spec.dtype],
        manifest.words,
    )


def agreement(tokens: np.ndarray, reference: np.ndarray, spec: SystemSpec) -> tuple[float, int | None]:
    """Compare the predicted tokens of clips [clips,T·H·W] with those of the reference engine.

    Returns the share of equal tokens, and the index in block order of the first predicted token that differs in any
    clip; None if none differs.
    """
    equal = (tokens == reference)[:, spec.block_order()[-spec.blocks * spec.block_size :]]
    return float(equal.mean()), None if equal.all() else int((~equal).any(0).argmax())


def row(run: Run, measurement: Measurement) -> Record:
    """Return the record of a case; if it was not measured, the record's `not_measured` says why."""
    case, plan, identity = measurement.case, run.plan, run.identity
    clips, failure = measurement.clips, measurement.failure
    spec = replace(identity.spec, dtype=case.dtype, batch=case.batch)
    sampling = plan.sampling or (measurement.bundle.manifest.sampling if measurement.bundle else Sampling())
    share, divergence = None, None
    if run.reference and clips and case.engine.role != REFERENCE:
        count = min(len(run.reference), len(clips))
        ours, theirs = (np.concatenate([r.tokens for r in results[:count]]) for results in (clips, run.reference))
        share, divergence = agreement(ours, theirs, spec)
    stopped = [f"it stopped after {len(clips)} clips: {failure}"] if failure and clips else []
    steps, parity, memory = measurement.steps, measurement.parity, measurement.memory
    return Record(
        run=run.began,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **vars(run.machine),
        model=identity.name,
        weights_sha256=identity.digest,
        trained=identity.trained,
        block=spec.block_text,
        block_size=spec.block_size,
        engine=case.engine.name,
        role=case.engine.role,
        dtype=case.dtype,
        batch=case.batch,
        threads=plan.threads,
        device=case.device,
        video=run.conditions.source,
        seed=plan.seed,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        interleaved=run.interleaved,
        frames=spec.video[0] - spec.condition_frames,
        steps=spec.steps,
        **_times(clips),
        first_frame_ns=[sum(ns for _, ns in result.spans) for result in measurement.first_frames],
        peak_memory_bytes=memory.process if memory else None,
        peak_device_bytes=memory.device if memory else None,
        token_agreement=share,
        first_divergence=divergence,
        device_step_ns=steps.steps if steps else [],
        device_pass_ns=steps.passes if steps else [],
        step_bytes=steps.step_bytes if steps else None,
        copy_bandwidth=run.bandwidths[0],
        peak_bandwidth=run.bandwidths[1],
        parity_error=parity.error if parity else None,
        parity_allowed=parity.allowed if parity else None,
        parity_where=parity.where if parity else None,
        not_measured=failure if failure and not clips else None,
        bundle_sha256=measurement.bundle.manifest_sha256 if measurement.bundle else None,
        notes=[*measurement.notes, *measurement.optional_failures, *stopped],
    )


def _times(clips: Sequence[Result]) -> dict[str, Any]:
    """Return the record's times in nanoseconds: of each clip, and of every call of each stage."""

    def stage_ns(stage: str) -> list[int]:
        return [ns for clip in clips for name, ns in clip.spans if name == stage]

    total = [sum(ns for _, ns in clip.spans) for clip in clips]
    return {"total_ns": total, **{f"{name}_ns": stage_ns(name) for name in STAGES}}
