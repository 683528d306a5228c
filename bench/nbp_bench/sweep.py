"""The measurement of a plan: in each group, the engines of a model take turns clip by clip, each in its own process.

On a GPU, all PyTorch engines of a dtype share one process, so that weights are moved to the GPU once. If an engine
fails, its row gives the reason, and the measurement of the others continues.
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
from nbp_bench.bundles import bundle_for, check_space
from nbp_bench.conditions import Conditions, conditions_for
from nbp_bench.host import Identity
from nbp_bench.machine import Machine, available_memory, describe
from nbp_bench.measure import Parity, Result
from nbp_bench.plan import Candidate, Case, Plan
from nbp_bench.rows import Measurement, Run, identity_of, row
from nbp_bench.worker import OverdueError, Worker, WorkerError
from nbp_engines.bundle import Bundle
from nbp_engines.errors import EngineError
from nbp_engines.status import sentences
from nbp_errors import NbpError
from nbp_reports.record import REFERENCE, Record

R = TypeVar("R")
# All times are seconds.
LEAST_SECONDS = 20.0  # A case needs this much time left to begin,
LEAST_CALL = 3.0  # and this much to continue: a call that overruns ends its process, and its models are lost.
CLOSE_SECONDS = 10.0  # Closing a session may take this long, whatever time is left.
CASE_SHARE = 1 / 3  # One call may take this share of the time limit, once the weights are loaded.
PROFILE_SECONDS = 40.0  # This much of the time limit is reserved for the profile.
COMPARISON = "comparison with the reference"
MEMORY_SHARE = 0.7  # Engines that take turns may fill this share of the available memory.


class Report(Protocol):
    """A function that shows the progress of the run."""

    def __call__(self, stage: str, turns: int = 0) -> None:
        """Show the stage that begins, and advance by the turns of engines that have just finished."""


class _NotRunError(EngineError):
    """A case that this machine or the time limit rules out. It is not a failure of the run."""


@dataclass(frozen=True)
class Measured:
    """A record together with the clips that it describes.

    Attributes:
        record: the record.
        clips: every measured clip.
        conditions: the conditions of the clips.
        clip_frames: number of frames in a whole clip, given and predicted.
    """

    record: Record
    clips: Sequence[Result]
    conditions: Conditions
    clip_frames: int


class Sweep(AbstractContextManager["Sweep"]):
    """One run of a plan.

    Attributes:
        plan: the plan.
        began: when the run began, in UTC.
        profile: the table of kernels, or the reason why there is none; empty if it was not requested.
        failures: the cases that failed on the way, as text.
    """

    def __init__(self, plan: Plan, report: Report, log: Callable[[str], None] = lambda _: None) -> None:
        self.plan = plan
        self.began = datetime.now(UTC).isoformat(timespec="seconds")
        self.profile = ""
        self.failures: list[str] = []
        self._report = report
        self._log = log
        self._deadline = None if plan.minutes is None else time.monotonic() + 60 * plan.minutes
        self._workers: dict[str, Worker] = {}
        self._identities: dict[Candidate, Identity] = {}
        self._references: dict[tuple[Candidate, str, int], list[Result]] = {}
        self._bandwidths: tuple[float | None, float | None] = (None, None)
        self._machine: Machine | None = None

    def run(self) -> Iterator[list[Measured]]:
        """Measure group after group, and yield the rows of each group when it is finished.

        Raises NbpError, before anything is measured, for a model or a video that cannot be read, or if the disk is too
        small for the bundles.
        """
        groups = [*self.plan.groups()]
        for group in groups:
            conditions_for(self._identify(group[0].candidate), self.plan)  # checks the video and caches its windows
        check_space(
            [(case, self._identify(case.candidate)) for group in groups for case in group],
            self.plan,
            self._worker("models"),
        )
        # The worker that identified the models still holds the last one. The engines need that memory, and an export
        # loads its model again.
        self._workers.pop("models", Worker()).close()
        self._measure_bandwidths(groups)
        for group in groups:
            yield self._group(group)
        if self.plan.profile:
            self._profile([case for group in groups for case in group])

    def _left(self, reserved: float = PROFILE_SECONDS) -> float | None:
        """Return the seconds until the deadline, minus the reserve for a profile; None without a time limit."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - reserved * self.plan.profile - time.monotonic())

    def _share(self) -> float | None:
        """Return the seconds that one call may take; None without a time limit."""
        left = self._left()
        return None if left is None or self.plan.minutes is None else min(left, 60 * self.plan.minutes * CASE_SHARE)

    def _worker(self, name: str) -> Worker:
        return self._workers.setdefault(name, Worker())

    def _process(self, case: Case) -> str:
        """Return the name of the process in which a case runs."""
        shared = case.device != "cpu" and case.engine.runtime is None
        return f"PyTorch in {case.dtype}" if shared else case.engine.name

    @cached_property
    def _first_on_gpu(self) -> Case | None:
        """The first case that PyTorch can run on this machine's GPU."""
        cases = (case for group in self.plan.groups() for case in group)
        return next((c for c in cases if c.device != "cpu" and not c.engine.runtime and not c.refusal()), None)

    def _identify(self, candidate: Candidate) -> Identity:
        """Return the identity of a candidate's model, which is loaded and hashed once per run.

        On a GPU, the process that measures first does it, because it needs the weights anyway.
        """
        if candidate not in self._identities:
            if candidate.request:
                first = self._first_on_gpu
                worker = self._worker(self._process(first) if first else "models")
                identity = worker.call(host.identify, candidate.request, seconds=self._left())
                self._report(identity.note)
            else:
                assert candidate.bundle
                identity = identity_of(Bundle.open(candidate.bundle))
            self._identities[candidate] = identity
        return self._identities[candidate]

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
        """Measure the cases of a group and return a row for each, in their order."""
        plan, identity = self.plan, self._identify(group[0].candidate)
        measurements = [Measurement(case) for case in group]
        conditions = conditions_for(identity, plan)
        together = self._fit_together(measurements, identity)
        for part in [measurements] if together else [[measurement] for measurement in measurements]:
            self._take_turns(part, identity, conditions)
            for measurement in part:  # on a CPU each engine has its own process, so that its memory can be measured
                if measurement.case.device == "cpu":
                    self._workers.pop(self._process(measurement.case), Worker()).close()
        key = (group[0].candidate, group[0].dtype, group[0].batch)
        for measurement in measurements:
            if measurement.case.engine.role == REFERENCE and measurement.clips:
                self._references[key] = measurement.clips
        reference = self._references.get(key)
        self._machine = self._machine or describe()
        run = Run(plan, self.began, identity, conditions, reference, together, self._bandwidths, self._machine)
        return [
            Measured(row(run, measurement), measurement.clips, conditions, identity.spec.video[0])
            for measurement in measurements
        ]

    def _fit_together(self, measurements: Sequence[Measurement], identity: Identity) -> bool:
        """Return whether all engines fit in memory at once. ONNX Runtime holds a copy of the weights per graph."""
        on_cpu = [measurement.case for measurement in measurements if measurement.case.device == "cpu"]
        copies = sum(1 if case.engine.runtime is None or case.engine.runtime.shares_weights else 3 for case in on_cpu)
        return 4 * identity.parameters * copies < MEMORY_SHARE * available_memory()

    def _take_turns(self, part: Sequence[Measurement], identity: Identity, conditions: Conditions) -> None:
        """Prepare each engine, then run them in turns A B C, C B A, …, so that a change of speed affects all alike."""
        plan, batch = self.plan, part[0].case.batch
        # All clips of a batch have the same condition and different noise.
        batches = [np.stack([condition] * batch) for condition in conditions.arrays]
        settings = (plan.sampling, plan.seed)
        for measurement in part:
            self._attempt(measurement, "load and check", partial(self._prepare, measurement, identity))
            self._attempt(
                measurement, "warm up", partial(self._call, measurement, measure.warm_up, batches[0], *settings)
            )
            self._report(f"{measurement.case}: ready", turns=1)
        for clip in range(plan.clips):
            for measurement in part if clip % 2 == 0 else part[::-1]:
                make = partial(self._make_clip, measurement, batches[clip % len(batches)], clip * batch)
                self._attempt(measurement, f"clip {clip + 1} of {plan.clips}", make)
                self._report(f"{measurement.case}: clip {clip + 1} done", turns=1)
        for measurement in part:
            self._attempt(measurement, "first frame and memory", partial(self._finish, measurement, batches[0]))
            self._close(measurement)
            self._report(f"{measurement.case}: done", turns=1)

    def _close(self, measurement: Measurement) -> None:
        """Close a case if its process is still running. A failure is only logged, because the row is complete."""
        worker, opened_in, measurement.opened_in = (
            self._worker(self._process(measurement.case)),
            measurement.opened_in,
            0,
        )
        if worker.running and worker.starts == opened_in:
            try:
                worker.call(host.close_case, measurement.case, seconds=CLOSE_SECONDS)
            except WorkerError as error:
                self._log(f"{measurement.case}: close: {error.message}\n{error.trace}")

    def _attempt(self, measurement: Measurement, stage: str, work: Callable[[], object]) -> None:
        """Do the next part of a measurement unless an earlier part failed; record a failure and its reason."""
        if measurement.failure:
            return
        self._report(f"{measurement.case}: {stage}")
        try:
            left = self._left()
            if left is not None and left < (LEAST_CALL if measurement.opened_in else LEAST_SECONDS):
                raise _NotRunError("the time limit was reached")
            work()
        except NbpError as error:
            if not isinstance(error, _NotRunError | OverdueError):
                self.failures.append(str(measurement.case))
            measurement.failure = " ".join(error.message.split())
            measurement.notes += sentences(measurement.case.engine.status)
            self._log(f"{measurement.case}: {stage}: {error.message}\n{getattr(error, 'trace', '')}")

    def _prepare(self, measurement: Measurement, identity: Identity) -> None:
        """Open a case and compare it with the reference. Raises EngineError if this machine cannot run the case."""
        case = measurement.case
        if reason := case.refusal():
            raise _NotRunError(reason)
        if not identity.spec.video[0]:
            raise _NotRunError("the model has no tokenizer, so it cannot predict video: give --tokenizer FILE")
        if case.engine.runtime:
            measurement.bundle = bundle_for(
                case, identity, self.plan, self._worker("models"), self._left(), self._report
            )
            if reason := case.engine.runtime.refusal(measurement.bundle):
                raise _NotRunError(reason)
        self._open(measurement, self._share() if self._worker(self._process(case)).running else self._left())
        self._optional(measurement, COMPARISON, partial(self._compare, measurement))
        if self.plan.steps:
            self._optional(measurement, "timing of single steps", partial(self._time_steps, measurement))

    def _optional(self, measurement: Measurement, what: str, work: Callable[[], object]) -> None:
        """Do a part that the clips do not depend on. If it fails, the row says so, and its clips are still measured."""
        left = self._left()
        try:
            if left is not None and left < LEAST_CALL:
                raise OverdueError("the time limit was reached")
            work()
        except WorkerError as error:
            measurement.optional_failures.append(f"{what} failed: {' '.join(error.message.split())}")
            self._log(f"{measurement.case}: {what}: {error.message}\n{error.trace}")

    def _compare(self, measurement: Measurement) -> None:
        measurement.parity = self._parity(measurement)

    def _time_steps(self, measurement: Measurement) -> None:
        measurement.steps = self._call(measurement, measure.step_times, self.plan.steps, self.plan.sampling)

    def _open(self, measurement: Measurement, seconds: float | None) -> None:
        """Open a case. A new process first imports packages and loads weights, which may take all of the time left."""
        worker = self._worker(self._process(measurement.case))
        path = measurement.bundle.path if measurement.bundle else None
        measurement.notes = worker.call(host.open_case, measurement.case, path, self.plan.threads, seconds=seconds)
        measurement.opened_in = worker.starts

    def _call(self, measurement: Measurement, function: Callable[..., R], *arguments: object) -> R:
        """Call a function of the worker on a case, and open the case again if its process was replaced meanwhile."""
        worker = self._worker(self._process(measurement.case))
        if measurement.opened_in != worker.starts or not worker.running:
            self._open(measurement, self._left())
        return worker.call(function, measurement.case, *arguments, seconds=self._share())

    def _parity(self, measurement: Measurement) -> Parity | None:
        """Return how a case compares with the reference: by its runtime's receipt, or by checks now."""
        case = measurement.case
        if case.engine.runtime is None:
            # On a CPU, the comparison of all tokens of all clips shows the same.
            return self._call(measurement, measure.parity, None) if case.device != "cpu" or self.plan.steps else None
        assert measurement.bundle
        receipt = measurement.bundle.receipt()
        if receipt and receipt["runtime"] == case.engine.runtime.name:
            worst = receipt["worst"]
            where = f"receipt: {worst['graph']} at {worst['at']}, {worst['where']}"
            return Parity(worst["worst"], worst["tolerance"], where, len(receipt["checks"]))
        if case.device != "cpu":  # the worker of the PyTorch engines may already hold the reference on the device
            worker = self._worker(f"PyTorch in {case.dtype}")
            return worker.call(measure.parity, case, measurement.bundle.path, seconds=self._left())
        worker = Worker()
        try:
            return worker.call(measure.parity, case, measurement.bundle.path, seconds=self._left())
        finally:
            worker.close()

    def _make_clip(self, measurement: Measurement, condition: np.ndarray, clip_index: int) -> None:
        settings = (self.plan.sampling, self.plan.seed)
        measurement.clips.append(self._call(measurement, measure.predict, condition, clip_index, *settings))

    def _finish(self, measurement: Measurement, condition: np.ndarray) -> None:
        settings = (self.plan.sampling, self.plan.seed)
        measurement.first_frames.append(self._call(measurement, measure.first_frame, condition, *settings))
        measurement.memory = self._call(measurement, measure.memory, condition, *settings)

    def _profile(self, cases: Sequence[Case]) -> None:
        """List the kernels of the first engine that is neither the reference nor the baseline, else of the first."""
        runnable = [case for case in cases if case.engine.runtime is None and not case.refusal()]
        case = next((case for case in runnable if case.engine.role is None), runnable[0] if runnable else None)
        if case is None:
            self.profile = "not measured: no PyTorch engine can run on this machine"
            return
        measurement = Measurement(case)
        self._report(f"{case}: profile")
        try:
            self._open(measurement, self._left(reserved=0.0))
            call = self._worker(self._process(case)).call
            self.profile = call(measure.profile, case, seconds=self._left(reserved=0.0))
        except NbpError as error:
            self.profile = f"not measured: {error.message}"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End all processes; after an error, kill them."""
        for worker in self._workers.values():
            worker.close(kill=kind is not None)
