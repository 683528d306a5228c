"""What a run measures: the cartesian product of models, dtypes, batches and engines, in the order of importance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from nbp_bench.engines import Engine
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec
from nbp_export.request import Request


@dataclass(frozen=True)
class Subject:
    """A model at a block shape: what a request names, or what a bundle holds.

    Attributes:
        request: None for a bundle.
        bundle: its folder; None for a request.
        spec: of the bundle.
    """

    request: Request | None = None
    bundle: Path | None = None
    spec: SystemSpec | None = None

    def __str__(self) -> str:
        return str(self.bundle) if self.bundle else str(self.request and self.request.block)


@dataclass(frozen=True)
class Case:
    """One row of the tables: a subject in a dtype and a batch, made by an engine on a device."""

    subject: Subject
    engine: Engine
    dtype: str
    batch: int
    device: str

    def __str__(self) -> str:
        batch = f" batch {self.batch}" if self.batch > 1 else ""
        return f"{self.subject} {self.dtype}{batch} {self.engine.name}"

    def refusal(self) -> str | None:
        """Why this machine cannot measure it, in a sentence, or None."""
        engine, where = self.engine, f"on {self.device}"
        if self.device not in engine.devices:
            return f"{engine.name} runs on {' and '.join(engine.devices)}, not {where}"
        if self.dtype not in engine.dtypes:
            return f"{engine.name} computes in {', '.join(engine.dtypes)}, not in {self.dtype}"
        return engine.absence(self.device)


@dataclass(frozen=True)
class Plan:
    """All that a run was asked for.

    Attributes:
        subjects: models and bundles, the most wanted first.
        engines: in the order of the tables; where time is short, the most wanted first.
        dtypes, batches: of the models; a bundle has its own.
        device: `cpu` or `cuda`; None lets each engine run where it can, on the CPU if it has the choice.
        video: the file to predict from; None for the bundled clip.
        clips: measured clips per case.
        steps: single steps per case that are timed back to back besides; 0 for none.
        threads, seed, sampling: as in the records. No sampling is that of the bundle, or the paper's.
        minutes: when the run ends at the latest; None for no limit.
        profile: whether to list the kernels of a step and of decode.
        out: folder of the results.
        bundles: folder of the bundles that are made for the run; None is `bundles` in the results' folder.
    """

    subjects: Sequence[Subject]
    engines: Sequence[Engine]
    out: Path
    dtypes: Sequence[str] = ("fp32",)
    batches: Sequence[int] = (1,)
    device: str | None = None
    video: Path | None = None
    clips: int = 7
    steps: int = 0
    threads: int | None = None
    seed: int = 0
    sampling: Sampling | None = None
    minutes: float | None = None
    profile: bool = False
    bundles: Path | None = None

    def groups(self) -> Iterator[list[Case]]:
        """The cases whose engines take turns, group after group, the most wanted first.

        Without a time limit all engines of a model take turns. With one, engines that need minutes before their first
        clip come later and by themselves, in the order in which they were named.
        """
        waves = [[*self.engines]]
        if self.minutes is not None:
            quick = [engine for engine in self.engines if not engine.slow_start]
            waves = [wave for wave in (quick, *([engine] for engine in self.engines if engine.slow_start)) if wave]
        for dtype, wave, batch, subject in product(self.dtypes, waves, self.batches, self.subjects):
            yield [self._case(subject, engine, dtype, batch) for engine in wave]

    def _case(self, subject: Subject, engine: Engine, dtype: str, batch: int) -> Case:
        device = self.device or engine.devices[0]
        if subject.spec:
            return Case(subject, engine, subject.spec.dtype, subject.spec.batch, device)
        return Case(subject, engine, dtype, batch, device)
