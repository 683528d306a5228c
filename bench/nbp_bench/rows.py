"""One row of a run: what was measured of a case, as a record."""

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
    """What is known of a case so far.

    Attributes:
        case: which one.
        bundle: what its runtime runs.
        clips, first_frames, steps, parity, memory: results; empty or None where not measured.
        notes: what a reader should know.
        troubles: what could not be compared or timed beside the clips, and why.
        failure: why it could not be measured, or not further.
        life: of the worker in whose process it is open; 0 where it is not open.
    """

    case: Case
    bundle: Bundle | None = None
    clips: list[Result] = field(default_factory=list)
    first_frames: list[Result] = field(default_factory=list)
    steps: StepTimes | None = None
    parity: Parity | None = None
    memory: Memory | None = None
    notes: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    failure: str = ""
    life: int = 0


@dataclass(frozen=True)
class Run:
    """What all rows of a group have in common.

    Attributes:
        plan: what was asked for.
        began: when, in UTC.
        identity: the model.
        conditions: what its clips were made from.
        reference: the reference engine's clips, if it ran.
        interleaved: whether the engines took turns.
        bandwidths: of the device: of a large copy, and by its memory's clock; None where not measured.
        machine: where it ran.
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
    """What a bundle's manifest says of its model."""
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
    """Share of predicted tokens of clips [clips,T·H·W] that are equal, and the earliest generated that is not."""
    equal = (tokens == reference)[:, spec.block_order()[-spec.blocks * spec.block_size :]]
    return float(equal.mean()), None if equal.all() else int((~equal).any(0).argmax())


def row(run: Run, one: Measurement) -> Record:
    """The record of a case; one that was not measured says why."""
    case, plan, identity = one.case, run.plan, run.identity
    spec = replace(identity.spec, dtype=case.dtype, batch=case.batch)
    sampling = plan.sampling or (one.bundle.manifest.sampling if one.bundle else Sampling())
    share, divergence = None, None
    if run.reference and one.clips and case.engine.role != REFERENCE:
        both = min(len(run.reference), len(one.clips))
        ours, theirs = (np.concatenate([r.tokens for r in results[:both]]) for results in (one.clips, run.reference))
        share, divergence = agreement(ours, theirs, spec)
    stopped = [f"it stopped after {len(one.clips)} clips: {one.failure}"] if one.failure and one.clips else []
    steps, parity, memory = one.steps, one.parity, one.memory
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
        **_times(one.clips),
        first_frame_ns=[sum(ns for _, ns in result.spans) for result in one.first_frames],
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
        not_measured=one.failure if one.failure and not one.clips else None,
        bundle_sha256=one.bundle.manifest_sha256 if one.bundle else None,
        notes=[*one.notes, *one.troubles, *stopped],
    )


def _times(clips: Sequence[Result]) -> dict[str, Any]:
    """Nanoseconds of each clip, and of every call of each stage, clip after clip."""

    def stage(wanted: str) -> list[int]:
        return [ns for clip in clips for name, ns in clip.spans if name == wanted]

    total = [sum(ns for _, ns in clip.spans) for clip in clips]
    return {"total_ns": total, **{f"{name}_ns": stage(name) for name in STAGES}}
