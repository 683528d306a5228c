"""The measurement: for each block shape, export once, then let the engines take turns clip by clip."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np

from nbp_bench.machine import available_memory, describe
from nbp_bench.video import to_float, windows
from nbp_bench.worker import Job, Result, Worker, agreement, clip_fields
from nbp_engines.bundle import Bundle
from nbp_engines.errors import BundleError
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec
from nbp_engines.text import class_ids
from nbp_errors import UsageError
from nbp_export.graphs import system_spec
from nbp_export.onnx_bundle import export
from nbp_export.proof import versions
from nbp_export.sources import Request, Source, find
from nbp_export.weights import weights_sha256
from nbp_reports.record import Record


class Report(Protocol):
    """Hears what begins, and how many engine turns ended with what was before."""

    def __call__(self, stage: str, turns: int = 0) -> None:
        """Take notice."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        requests: one model a block shape.
        engines: in the order of the table.
        video: the file to predict from; None for the bundled clip, and of no use to a class-conditional model.
        clips: measured clips an engine and shape.
        batch, threads, seed, sampling: as in the records.
        out: folder for bundles.
    """

    requests: Sequence[Request]
    engines: Sequence[str]
    video: Path | None
    clips: int
    batch: int
    threads: int | None
    seed: int
    out: Path
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def turns(self) -> int:
        """Engine turns in all: load, the measured clips and the first frame, for each engine and shape."""
        return len(self.requests) * len(self.engines) * (self.clips + 2)


@dataclass(frozen=True)
class Measured:
    """A record with the clips behind it.

    Attributes:
        record: the numbers.
        results: every measured clip.
        truth: the first clip as filmed, uint8 [F,3,H,W], as far as the video goes.
        classes: in place of the film, what each clip shows.
        clip_frames: frames of a whole clip, given and predicted.
    """

    record: Record
    results: Sequence[Result]
    truth: np.ndarray
    classes: Sequence[str]
    clip_frames: int


def sweep(plan: Plan, report: Report) -> list[Measured]:
    """Measure every engine at every block shape.

    Raises UsageError for what cannot be measured, EngineError if an engine fails.
    """
    began = datetime.now(UTC).isoformat(timespec="seconds")
    return [row for request in plan.requests for row in _measure(plan, request, began, report)]


@dataclass(frozen=True)
class _Subject:
    """What is left of a model when its weights are freed."""

    name: str
    digest: str
    trained: bool
    spec: SystemSpec
    parameters: int
    words: tuple[str, ...]


def _texts(subject: _Subject) -> tuple[list[np.ndarray], str]:
    """Texts of a class-conditional model, int64 [P], and what they say."""
    if not subject.words:
        return [np.zeros(subject.spec.text_tokens, np.int64)], "text ids 0, for timing"
    classes = subject.words[1:]
    return [class_ids(name, subject.spec, subject.words, None) for name in classes], "class " + ", ".join(classes)


def _measure(plan: Plan, request: Request, began: str, report: Report) -> list[Measured]:
    source = find(request)
    report(source.note)
    if source.tokenizer is None:
        raise UsageError(f"{source.name} has no tokenizer, so no video can be predicted: give --tokenizer FILE")
    subject = _Subject(
        source.name,
        weights_sha256(source.generator, source.tokenizer),
        source.trained,
        system_spec(source.generator.config, source.tokenizer.config, "fp32", plan.batch),
        sum(p.numel() for model in (source.generator, source.tokenizer) for p in model.parameters()),
        source.generator.config.text.words if source.generator.config.text else (),
    )
    bundle = _bundle(plan, source, subject, report).path if "onnx" in plan.engines else None
    del source  # each engine loads its own
    sources = [bundle if bundle and engine == "onnx" else request for engine in plan.engines]
    jobs = [
        Job(engine, what, plan.batch, plan.sampling, plan.seed, plan.threads)
        for engine, what in zip(plan.engines, sources, strict=True)
    ]
    # ONNX Runtime keeps a prepacked copy of the weights for each graph beside the file's.
    copies = len(jobs) + 2 * ("onnx" in plan.engines)
    together = 4 * subject.parameters * copies < 0.7 * available_memory()
    if subject.spec.hybrid:
        conditions, name = _texts(subject)
        truth = np.empty((0, 3, *subject.spec.video[1:]), np.uint8)
    else:
        scenes, name = windows(subject.spec, plan.video, plan.clips)
        conditions, truth = [to_float(scene[: subject.spec.condition_frames]) for scene in scenes], scenes[0]
    groups = [jobs] if together else [[job] for job in jobs]
    runs = [run for group in groups for run in _take_turns(plan, group, subject.spec, conditions, report)]
    reference = next((run.results for job, run in zip(jobs, runs, strict=True) if job.engine == "reference"), None)
    records = [
        _record(plan, subject, job, run, reference, began, together, name) for job, run in zip(jobs, runs, strict=True)
    ]
    frames = subject.spec.video[0]
    return [Measured(r, run.results, truth, subject.words[1:], frames) for r, run in zip(records, runs, strict=True)]


def _bundle(plan: Plan, source: Source, subject: _Subject, report: Report) -> Bundle:
    """The exported model: the one from an earlier run if it is the same, proven and intact, else a new one."""
    name = f"{subject.name}-{subject.spec.block_text}-b{plan.batch}-fp32-{subject.digest[:12]}"
    folder = plan.out / "bundles" / name
    if folder.exists():
        try:
            bundle = Bundle.open(folder, require_receipt=True)
            if bundle.manifest.versions == versions():
                return bundle
            why = "it was made by other versions"
        except BundleError as error:
            why = error.message
        raise UsageError(f"{folder} cannot be used, {why}: remove it, or choose another --out")
    return export(source, folder, "fp32", plan.batch, lambda stage: report(f"export: {stage}"))


@dataclass(frozen=True)
class _Run:
    results: list[Result]
    first_frames: list[Result]
    peak_memory: int


def _take_turns(
    plan: Plan, jobs: Sequence[Job], spec: SystemSpec, conditions: Sequence[np.ndarray], report: Report
) -> list[_Run]:
    """Run the engines A B C, C B A, …, so that a machine that slows down slows them all."""
    # The same condition for all of a batch: their noise differs.
    given = [np.stack([condition] * plan.batch) for condition in conditions]
    runs = [_Run([], [], 0) for _ in jobs]
    with ExitStack() as stack:
        workers = []
        for job in jobs:
            report(f"{spec.block_text} {job.engine}: load and warm up")
            workers.append(stack.enter_context(Worker(job)))
            workers[-1].call("warm_up", given[0])
            report(f"{spec.block_text} {job.engine}: ready", turns=1)
        turn = list(zip(jobs, workers, runs, strict=True))
        for clip in range(plan.clips):
            for job, worker, run in turn if clip % 2 == 0 else turn[::-1]:
                report(f"{spec.block_text} {job.engine}: clip {clip + 1} of {plan.clips}")
                run.results.append(worker.call("predict", given[clip % len(given)], clip * plan.batch))
                report(f"{spec.block_text} {job.engine}: clip {clip + 1} done", turns=1)
        for job, worker, run in turn:
            report(f"{spec.block_text} {job.engine}: first frame")
            run.first_frames.append(worker.call("first_frame", given[0], 0))
            report(f"{spec.block_text} {job.engine}: first frame done", turns=1)
        return [
            _Run(run.results, run.first_frames, worker.call("peak_memory"))
            for run, worker in zip(runs, workers, strict=True)
        ]


def _record(
    plan: Plan,
    subject: _Subject,
    job: Job,
    run: _Run,
    reference: Sequence[Result] | None,
    began: str,
    together: bool,
    video: str,
) -> Record:
    share, divergence = None, None
    if reference and job.engine != "reference":
        ours, theirs = (np.concatenate([result.tokens for result in results]) for results in (run.results, reference))
        share, divergence = agreement(ours, theirs, subject.spec)
    return Record(
        run=began,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **vars(describe()),
        model=subject.name,
        weights_sha256=subject.digest,
        trained=subject.trained,
        engine=job.engine,
        threads=plan.threads,
        device="cpu",
        video=video,
        seed=plan.seed,
        temperature=plan.sampling.temperature,
        top_k=plan.sampling.top_k,
        top_p=plan.sampling.top_p,
        interleaved=together,
        **clip_fields(subject.spec, [result.spans for result in run.results]),
        first_frame_ns=[sum(ns for _, ns in result.spans) for result in run.first_frames],
        peak_memory_bytes=run.peak_memory,
        token_agreement=share,
        first_divergence=divergence,
    )
