"""One engine in a process of its own, so that its peak memory is its own and nothing else runs in its threads.

The parent and the child talk in pairs: a method name with arguments goes in, its result or an error comes out.
"""

import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import click
import numpy as np

from nbp_bench.machine import peak_memory
from nbp_engines.errors import EngineError
from nbp_engines.generator import Clip, Generator
from nbp_engines.sampling import Sampling
from nbp_engines.session import Session, open_session
from nbp_engines.spec import SystemSpec
from nbp_reports.record import STAGES

if TYPE_CHECKING:
    from nbp_export.sources import Request

ENGINES = ("naive", "reference", "onnx")
WARM_UP_BLOCKS = 4


class Job(NamedTuple):
    """What a worker loads."""

    engine: str
    source: "Request | Path"  # the model of a PyTorch engine, or the bundle of an exported one
    batch: int
    sampling: Sampling
    seed: int
    threads: int | None


class Result(NamedTuple):
    """One generated clip: predicted video, all tokens, and the stages in order."""

    video: np.ndarray
    tokens: np.ndarray
    spans: Sequence[tuple[str, int]]

    @classmethod
    def of(cls, clip: Clip) -> Self:
        """What the parent needs of a clip."""
        return cls(clip.video, clip.tokens, clip.timeline.spans)


def clip_fields(spec: SystemSpec, clips: Sequence[Sequence[tuple[str, int]]]) -> dict[str, Any]:
    """The fields of a record that follow from the spec and from the stages of the clips."""

    def spans(stage: str) -> list[int]:
        return [ns for clip in clips for name, ns in clip if name == stage]

    return {
        "block": spec.block_text,
        "block_size": spec.block_size,
        "dtype": spec.dtype,
        "batch": spec.batch,
        "frames": spec.video[0] - spec.condition_frames,
        "steps": spec.steps,
        "total_ns": [sum(ns for _, ns in clip) for clip in clips],
        **{f"{stage}_ns": spans(stage) for stage in STAGES},
    }


def agreement(tokens: np.ndarray, reference: np.ndarray, spec: SystemSpec) -> tuple[float, int | None]:
    """Share of predicted tokens of clips [clips,T·H·W] that are equal, and the earliest generated that is not."""
    equal = (tokens == reference)[:, spec.order()[-spec.blocks * spec.block_size :]]
    return float(equal.mean()), None if equal.all() else int((~equal).any(0).argmax())


def open_engine(job: Job) -> Session:
    """The session of a job, in this process."""
    if isinstance(job.source, Path):
        return open_session(job.source, job.threads)
    # Not at the top: an exported engine's memory must not hold torch.
    import torch

    from nbp_bench.torch_sessions import EagerSession, NaiveSession
    from nbp_export.graphs import system_spec
    from nbp_export.sources import find

    if job.threads:
        torch.set_num_threads(job.threads)
    source = find(job.source)
    tokenizer = source.tokenizer.config if source.tokenizer else None
    spec = system_spec(source.generator.config, tokenizer, "fp32", job.batch)
    kind = NaiveSession if job.engine == "naive" else EagerSession
    return kind(spec, source.generator, source.tokenizer)


class _Calls:
    """What the parent may ask for."""

    def __init__(self, job: Job) -> None:
        self.session = open_engine(job)
        self.generator = Generator(self.session, job.sampling, job.seed)

    def warm_up(self, condition: np.ndarray) -> None:
        """Every graph once, a few steps: first calls allocate and choose kernels."""
        spec = self.session.spec
        given = condition if spec.hybrid else self.session.encode(condition)
        for tokens in islice(self.generator.blocks(given), WARM_UP_BLOCKS):
            last = tokens
        self.session.decode(spec.codes(last))

    def predict(self, condition: np.ndarray, sample: int) -> Result:
        """A whole clip after given frames, or of a class."""
        make = self.generator.generate if self.session.spec.hybrid else self.generator.predict
        return Result.of(make(condition, sample))

    def first_frame(self, condition: np.ndarray, sample: int) -> Result:
        """A streamed clip, up to its first frames."""
        return Result.of(next(self.generator.stream(condition, sample)))

    def peak_memory(self) -> int:
        """Bytes, of the whole life of this process."""
        return peak_memory()


def _serve(pipe: Connection, job: Job) -> None:
    try:
        calls = _Calls(job)
        pipe.send((True, None))
        while (message := pipe.recv()) is not None:
            name, arguments = message
            pipe.send((True, getattr(calls, name)(*arguments)))
    except click.ClickException as error:
        pipe.send((False, error.message))
    except (KeyboardInterrupt, EOFError):
        pass
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))


class Worker:
    """The parent's end of one engine's process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def call(self, name: str, *arguments: object) -> Any:
        """Run a method of the child; raises EngineError with the child's own words if it fails or dies."""
        with suppress(BrokenPipeError):  # a dead child: receiving tells more
            self._pipe.send((name, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            ok, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            why = " (out of memory?)" if code == -signal.SIGKILL else ""
            raise EngineError(f"engine {self.job.engine} died with exit code {code}{why}") from None
        if not ok:
            raise EngineError(f"engine {self.job.engine}: {result}")
        return result

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self._pipe.send(None)
            self._process.join(timeout=10)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        """The worker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()
