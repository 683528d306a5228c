"""The measurement: group after group, the engines of a model take turns clip by clip, each in its own process.

On a GPU all PyTorch engines of a dtype live in one process, so that weights are moved there once. What fails is a row
with the reason, and the rest goes on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Protocol, TypeVar

import numpy as np

from nbp_bench import host, measure
from nbp_bench.bundles import bundle_for
from nbp_bench.conditions import Conditions, conditions_for
from nbp_bench.host import Identity
from nbp_bench.machine import Machine, available_memory, describe
from nbp_bench.measure import Parity, Result
from nbp_bench.plan import Case, Plan, Subject
from nbp_bench.rows import Measurement, Run, identity_of, row
from nbp_bench.worker import Worker, WorkerError
from nbp_engines.bundle import Bundle
from nbp_engines.errors import EngineError
from nbp_engines.status import sentences
from nbp_errors import NbpError
from nbp_reports.record import REFERENCE, Record

R = TypeVar("R")
LEAST_SECONDS = 20.0  # with less time left, no case begins
LEAST_CALL = 3.0  # with less, none goes on: a call that is cut off takes its process, and the models there, with it
CLOSE_SECONDS = 10.0  # that the end of a session may take, whatever time is left
CASE_SHARE = 1 / 3  # of the time limit, that one call may take once the weights are loaded
PROFILE_SECONDS = 40.0  # kept back for the profile
COMPARISON = "comparison with the reference"
MEMORY_SHARE = 0.7  # of what is available, that engines which take turns may fill


class Report(Protocol):
    """Gets each stage as it begins, and how many engine turns were finished before it."""

    def __call__(self, stage: str, turns: int = 0) -> None:
        """Take notice."""


@dataclass(frozen=True)
class Measured:
    """A record with what is behind it.

    Attributes:
        record: the numbers.
        clips: every measured clip.
        conditions: what they were made from.
        clip_frames: frames of a whole clip, given and predicted.
    """

    record: Record
    clips: Sequence[Result]
    conditions: Conditions
    clip_frames: int


class Sweep(AbstractContextManager["Sweep"]):
    """One run of a plan: its processes, its deadline, and what it has measured so far."""

    def __init__(self, plan: Plan, report: Report, log: Callable[[str], None] = lambda _: None) -> None:
        self.plan = plan
        self.began = datetime.now(UTC).isoformat(timespec="seconds")
        self.profile = ""
        self._report = report
        self._log = log
        self._deadline = None if plan.minutes is None else time.monotonic() + 60 * plan.minutes
        self._workers: dict[str, Worker] = {}
        self._identities: dict[Subject, Identity] = {}
        self._references: dict[tuple[Subject, str, int], list[Result]] = {}
        self._bandwidths: tuple[float | None, float | None] = (None, None)
        self._machine: Machine | None = None

    def run(self) -> Iterator[list[Measured]]:
        """Measure group after group; the rows of each as it is done.

        Raises NbpError for a model or a video that cannot be found, before anything is measured.
        """
        groups = [*self.plan.groups()]
        for group in groups:
            self._identify(group[0].subject)
        # What it holds of the last model is memory that the engines need; an export finds its model again.
        self._workers.pop("models", Worker()).close()
        self._measure_bandwidths(groups)
        for group in groups:
            yield self._group(group)
        if self.plan.profile:
            self._profile([case for group in groups for case in group])

    def _left(self, kept: float = PROFILE_SECONDS) -> float | None:
        """Seconds until the deadline, less those that are kept back for a profile; None without a limit."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - kept * self.plan.profile - time.monotonic())

    def _share(self) -> float | None:
        """Seconds that one call may take."""
        left = self._left()
        return None if left is None or self.plan.minutes is None else min(left, 60 * self.plan.minutes * CASE_SHARE)

    def _worker(self, name: str) -> Worker:
        return self._workers.setdefault(name, Worker())

    def _process(self, case: Case) -> str:
        """The name of the process of a case."""
        shared = case.device != "cpu" and case.engine.runtime is None
        return f"PyTorch in {case.dtype}" if shared else case.engine.name

    @cached_property
    def _first_on_gpu(self) -> Case | None:
        """The first case that PyTorch can run on a GPU here."""
        cases = (case for group in self.plan.groups() for case in group)
        return next((c for c in cases if c.device != "cpu" and not c.engine.runtime and not c.refusal()), None)

    def _identify(self, subject: Subject) -> Identity:
        """What the model of a subject is; found, and hashed, once per run.

        On a GPU by the process that measures first: it has to have the weights anyway.
        """
        if subject not in self._identities:
            if subject.request:
                first = self._first_on_gpu
                worker = self._worker(self._process(first) if first else "models")
                identity = worker.call(host.identify, subject.request, seconds=self._left())
                self._report(identity.note)
            else:
                assert subject.bundle
                identity = identity_of(Bundle.open(subject.bundle))
            self._identities[subject] = identity
        return self._identities[subject]

    def _measure_bandwidths(self, groups: Sequence[Sequence[Case]]) -> None:
        if not self.plan.steps:
            return
        case = next((c for group in groups for c in group if c.engine.runtime is None and not c.refusal()), None)
        if case is None:
            return
        try:
            worker = self._worker(self._process(case))
            self._bandwidths = worker.call(measure.bandwidths, case.device, seconds=self._left())
        except WorkerError as error:
            self._log(f"bandwidths: {error.message}\n{error.trace}")

    def _group(self, group: Sequence[Case]) -> list[Measured]:
        """Measure the cases of a group; one row each, in their order."""
        plan, identity = self.plan, self._identify(group[0].subject)
        measurements = [Measurement(case) for case in group]
        conditions = conditions_for(identity, plan)
        together = self._fit_together(measurements, identity)
        for part in [measurements] if together else [[one] for one in measurements]:
            self._take_turns(part, identity, conditions)
            for measurement in part:  # a process on a CPU is one engine's, whose memory must be its own
                if measurement.case.device == "cpu":
                    self._workers.pop(self._process(measurement.case), Worker()).close()
        key = (group[0].subject, group[0].dtype, group[0].batch)
        for one in measurements:
            if one.case.engine.role == REFERENCE and one.clips:
                self._references[key] = one.clips
        reference = self._references.get(key)
        self._machine = self._machine or describe()
        run = Run(plan, self.began, identity, conditions, reference, together, self._bandwidths, self._machine)
        return [Measured(row(run, one), one.clips, conditions, identity.spec.video[0]) for one in measurements]

    def _fit_together(self, measurements: Sequence[Measurement], identity: Identity) -> bool:
        """Whether all engines fit in memory at once. ONNX Runtime keeps a copy of the weights for each graph."""
        on_cpu = [one.case for one in measurements if one.case.device == "cpu"]
        copies = sum(1 if case.engine.runtime is None or case.engine.runtime.shares_weights else 3 for case in on_cpu)
        return 4 * identity.parameters * copies < MEMORY_SHARE * available_memory()

    def _take_turns(self, part: Sequence[Measurement], identity: Identity, conditions: Conditions) -> None:
        """Prepare each engine, then run them A B C, C B A, …, so that a machine that slows down slows them all."""
        plan, batch = self.plan, part[0].case.batch
        # All clips of a batch have the same condition; their noise differs.
        given = [np.stack([condition] * batch) for condition in conditions.arrays]
        settings = (plan.sampling, plan.seed)
        for one in part:
            self._attempt(one, "load and check", partial(self._prepare, one, identity))
            self._attempt(one, "warm up", partial(self._call, one, measure.warm_up, given[0], *settings))
            self._report(f"{one.case}: ready", turns=1)
        for clip in range(plan.clips):
            for one in part if clip % 2 == 0 else part[::-1]:
                make = partial(self._make_clip, one, given[clip % len(given)], clip * batch)
                self._attempt(one, f"clip {clip + 1} of {plan.clips}", make)
                self._report(f"{one.case}: clip {clip + 1} done", turns=1)
        for one in part:
            self._attempt(one, "first frame and memory", partial(self._finish, one, given[0]))
            self._close(one)
            self._report(f"{one.case}: done", turns=1)

    def _close(self, one: Measurement) -> None:
        """Close a case if its process is still there. A failure is logged: it costs nobody a row."""
        worker, life, one.life = self._worker(self._process(one.case)), one.life, 0
        if worker.running and worker.lives == life:
            try:
                worker.call(host.close_case, one.case, seconds=CLOSE_SECONDS)
            except WorkerError as error:
                self._log(f"{one.case}: close: {error.message}\n{error.trace}")

    def _attempt(self, one: Measurement, stage: str, work: Callable[[], object]) -> None:
        """Do the next part of a case's measurement, unless an earlier part failed; a failure is kept as its reason."""
        if one.failure:
            return
        self._report(f"{one.case}: {stage}")
        try:
            left = self._left()
            if left is not None and left < (LEAST_CALL if one.life else LEAST_SECONDS):
                raise EngineError("the time was up")
            work()
        except NbpError as error:
            one.failure = " ".join(error.message.split())
            one.notes += sentences(one.case.engine.status)
            self._log(f"{one.case}: {stage}: {error.message}\n{getattr(error, 'trace', '')}")

    def _prepare(self, one: Measurement, identity: Identity) -> None:
        """Open a case and compare it with the reference. Raises EngineError if this machine cannot run it."""
        case = one.case
        if why := case.refusal():
            raise EngineError(why)
        if not identity.spec.video[0]:
            raise EngineError("it has no tokenizer, so no video can be predicted: give --tokenizer FILE")
        if case.engine.runtime:
            one.bundle = bundle_for(case, identity, self.plan, self._worker("models"), self._left(), self._report)
            if why := case.engine.runtime.refusal(one.bundle):
                raise EngineError(why)
        self._open(one, self._share() if self._worker(self._process(case)).running else self._left())
        self._beside(one, COMPARISON, partial(self._compare, one))
        if self.plan.steps:
            self._beside(one, "timing of single steps", partial(self._time_steps, one))

    def _beside(self, one: Measurement, what: str, work: Callable[[], object]) -> None:
        """What a row can do without: where it fails, the row says so, and its clips are still made."""
        left = self._left()
        try:
            if left is not None and left < LEAST_CALL:
                raise WorkerError("the time was up")
            work()
        except WorkerError as error:
            one.troubles.append(f"{what} failed: {' '.join(error.message.split())}")
            self._log(f"{one.case}: {what}: {error.message}\n{error.trace}")

    def _compare(self, one: Measurement) -> None:
        one.parity = self._parity(one)

    def _time_steps(self, one: Measurement) -> None:
        one.steps = self._call(one, measure.step_times, self.plan.steps, self.plan.sampling)

    def _open(self, one: Measurement, seconds: float | None) -> None:
        """Open a case. In a new process that loads imports and weights, which may take all the time that is left."""
        worker = self._worker(self._process(one.case))
        path = one.bundle.path if one.bundle else None
        one.notes = worker.call(host.open_case, one.case, path, self.plan.threads, seconds=seconds)
        one.life = worker.lives

    def _call(self, one: Measurement, function: Callable[..., R], *arguments: object) -> R:
        """Call a function of measure.py on a case, which is opened again if its process was replaced meanwhile."""
        worker = self._worker(self._process(one.case))
        if one.life != worker.lives or not worker.running:
            self._open(one, self._left())
        return worker.call(function, one.case, *arguments, seconds=self._share())

    def _parity(self, one: Measurement) -> Parity | None:
        """How a case compares with the reference: from the bundle's receipt where this runtime wrote it, else now."""
        case = one.case
        if case.engine.runtime is None:
            # On a CPU the tokens show as much, and every clip is compared.
            return self._call(one, measure.parity, None) if case.device != "cpu" or self.plan.steps else None
        assert one.bundle
        receipt = one.bundle.receipt()
        if receipt and receipt["runtime"] == case.engine.runtime.name:
            worst = receipt["worst"]
            where = f"receipt: {worst['graph']} at {worst['at']}, {worst['where']}"
            return Parity(worst["worst"], worst["tolerance"], where, len(receipt["checks"]))
        if case.device != "cpu":  # the process that has the reference on the device already
            worker = self._worker(f"PyTorch in {case.dtype}")
            return worker.call(measure.parity, case, one.bundle.path, seconds=self._left())
        worker = Worker()
        try:
            return worker.call(measure.parity, case, one.bundle.path, seconds=self._left())
        finally:
            worker.close()

    def _make_clip(self, one: Measurement, condition: np.ndarray, clip_index: int) -> None:
        settings = (self.plan.sampling, self.plan.seed)
        one.clips.append(self._call(one, measure.predict, condition, clip_index, *settings))

    def _finish(self, one: Measurement, condition: np.ndarray) -> None:
        settings = (self.plan.sampling, self.plan.seed)
        one.first_frames.append(self._call(one, measure.first_frame, condition, *settings))
        one.memory = self._call(one, measure.memory, condition, *settings)

    def _profile(self, cases: Sequence[Case]) -> None:
        """List the kernels of the first engine that was measured and is not bound by the host, else of the first."""
        able = [case for case in cases if case.engine.runtime is None and not case.refusal()]
        case = next((case for case in able if case.engine.role is None), able[0] if able else None)
        if case is None:
            self.profile = "not measured: no PyTorch engine can run here"
            return
        one = Measurement(case)
        self._report(f"{case}: profile")
        try:
            self._open(one, self._left(kept=0.0))
            call = self._worker(self._process(case)).call
            self.profile = call(measure.profile, case, seconds=self._left(kept=0.0))
        except NbpError as error:
            self.profile = f"not measured: {error.message}"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End all processes, at once after an error."""
        for worker in self._workers.values():
            worker.close(kill=kind is not None)
