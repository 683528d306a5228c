"""What is measured, in the process of one engine or of all PyTorch engines of a dtype: each function is one call.

The parent calls these functions through a `Worker`; the first argument is what the process holds open between calls.
Torch is imported where it is needed: the memory of an engine that runs a bundle on a CPU must not hold it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from nbp_bench.host import Host, free_device_memory, models_of, spec_of, torch_device
from nbp_bench.machine import peak_memory
from nbp_engines.bundle import Bundle
from nbp_engines.generator import Clip, Generator
from nbp_engines.noise import uniforms
from nbp_engines.runtime import OpenOptions
from nbp_engines.sampling import Sampling, sample
from nbp_engines.spec import GraphKind, SystemSpec

if TYPE_CHECKING:
    import torch

    from nbp_bench.plan import Case
    from nbp_export.parity import Check

WARM_UP_BLOCKS = 4
WARM_UP_STEPS = 20


class Result(NamedTuple):
    """One generated clip: predicted video [B,3,F,H,W], all tokens [B,T·H·W], and the stages in order."""

    video: np.ndarray
    tokens: np.ndarray
    spans: Sequence[tuple[str, int]]

    @classmethod
    def of(cls, clip: Clip) -> Self:
        """What the parent needs of a clip."""
        return cls(clip.video, clip.tokens, clip.timeline.spans)


class Parity(NamedTuple):
    """How an engine compares with the reference in fp32: the worst of so many checks."""

    error: float
    allowed: float
    where: str
    checks: int


class StepTimes(NamedTuple):
    """Nanoseconds of single steps back to back, by the device's own clock.

    Attributes:
        steps: without sampling.
        passes: with sampling, and the tokens' way to the host and back.
        step_bytes: what such a step has to read, in the mean.
    """

    steps: list[int]
    passes: list[int]
    step_bytes: int


class Memory(NamedTuple):
    """Peak bytes of the process, and on a GPU of the engine."""

    process: int
    device: int | None


def warm_up(host: Host, case: "Case", condition: np.ndarray, sampling: Sampling | None, seed: int) -> None:
    """Run every graph once, and a whole clip where steps are unrolled: first calls allocate and choose kernels."""
    session = host.session(case)
    generator, spec = Generator(session, sampling, seed), session.spec
    given = condition if spec.hybrid else session.encode(condition)
    for tokens in islice(generator.blocks(given), WARM_UP_BLOCKS):
        last = tokens
    session.decode(spec.codes(last))
    if getattr(session, "unrolls", False):
        predict(host, case, condition, 0, sampling, seed)


def predict(
    host: Host, case: "Case", condition: np.ndarray, clip_index: int, sampling: Sampling | None, seed: int
) -> Result:
    """A whole clip after given frames, or of a class."""
    session = host.session(case)
    generator = Generator(session, sampling, seed)
    return Result.of((generator.generate if session.spec.hybrid else generator.predict)(condition, clip_index))


def first_frame(host: Host, case: "Case", condition: np.ndarray, sampling: Sampling | None, seed: int) -> Result:
    """A streamed clip, up to its first frames."""
    return Result.of(next(Generator(host.session(case), sampling, seed).stream(condition, 0)))


def memory(host: Host, case: "Case", condition: np.ndarray, sampling: Sampling | None, seed: int) -> Memory:
    """Peak memory of the process so far, and on a GPU of one more clip."""
    opened, process = host.sessions[case], peak_memory()
    if case.device == "cpu":
        return Memory(process, None)
    if case.engine.runtime:
        predict(host, case, condition, 0, sampling, seed)
        return Memory(process, opened.free_before - free_device_memory(case.device))
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    predict(host, case, condition, 0, sampling, seed)
    passing = torch.cuda.max_memory_allocated() - before
    models = models_of(host, case.subject, case.dtype, torch_device(case.device))
    return Memory(process, models.nbytes(opened.session) + opened.buffers + passing)


def step_times(host: Host, case: "Case", count: int, sampling: Sampling | None) -> StepTimes | None:
    """Time single steps back to back, at cache positions spread over all that a clip uses.

    None where the caches grow, so that a step cannot be repeated, and where a clip has no step after the prefill.
    """
    from nbp_bench.device import spans, step_bytes
    from nbp_export.parity import Graphs

    if not isinstance(host.session(case), Graphs):
        return None
    session, device = host.session(case), torch_device(case.device)
    spec, settings = session.spec, sampling or session.sampling
    every = range(spec.condition_tokens, spec.capacity - spec.block_size + 1, spec.block_size)
    if spec.hybrid:
        every = every[1:]
    if not every:
        return None
    positions = [every[i * len(every) // count] for i in range(count)]
    tokens = np.random.default_rng(0).integers(spec.vocab, size=(spec.batch, spec.block_size))
    noise = np.stack([uniforms(0, b, 0, spec.block_size) for b in range(spec.batch)])

    def step(i: int) -> Any:
        return session.step(tokens, np.full(spec.batch, positions[i]))

    stream = _stream(session, device)
    for times in (min(count, WARM_UP_STEPS), count):
        steps = spans(device, step, times, stream)
        passes = spans(device, lambda i: session.sample(step(i), noise, settings), times, stream)
    return StepTimes(steps, passes, step_bytes(spec, positions))


def bandwidths(host: Host, device: str) -> tuple[float, float | None]:  # noqa: ARG001 - every call has a host
    """Bytes per second of a large copy on the device, and of its memory's clock."""
    from nbp_bench.device import copy_bandwidth, peak_bandwidth

    where = torch_device(device)
    copied = copy_bandwidth(where)
    _empty_cache(where)  # gigabytes that other libraries could not have
    return copied, peak_bandwidth(where)


def parity(host: Host, case: "Case", bundle: Path | None) -> Parity | None:
    """Compare every graph with the reference in fp32 on the same device, and drawn tokens with numpy's.

    None where an engine has no graphs to compare, as the authors' loop, whose caches grow.
    """
    from nbp_export.parity import Graphs

    device = torch_device(case.device)
    opened = host.sessions.get(case)
    if opened is None:  # an engine that is measured in a process without torch is checked in another
        assert case.engine.runtime
        assert bundle
        with case.engine.runtime.open(Bundle.open(bundle), OpenOptions()) as session:
            return _worst(_checks(host, case, session, device))
    if not isinstance(opened.session, Graphs):
        return None
    return _worst(_checks(host, case, opened.session, device))


def profile(host: Host, case: "Case") -> str:
    """Tables of the kernels of a step and of decode, the slowest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    session, on_gpu = host.session(case), case.device == "cuda"
    spec = session.spec
    tokens, clip = (np.zeros((spec.batch, n), np.int64) for n in (spec.block_size, spec.clip_tokens))
    at = np.full(spec.batch, spec.condition_tokens + spec.hybrid * spec.block_size)
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: session.step(tokens, at),
        "decode": lambda: session.decode(clip),
    }
    session.prefill(np.zeros((spec.batch, spec.condition_tokens), np.int64))
    tables = []
    for name, call in calls.items():
        call()
        with profiling(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
            call()
            _wait(case.device)
        column = f"self_{'device' if on_gpu else 'cpu'}_time_total"
        table = seen.key_averages().table(sort_by=column, row_limit=30, max_name_column_width=90)
        tables.append(f"{case}: {name}\n{table}")
    return "\n\n".join(tables)


def _checks(host: Host, case: "Case", session: Any, device: "torch.device") -> "list[Check]":
    import torch

    from nbp_export.parity import Reference, check_graphs, compare

    models = models_of(host, case.subject, case.dtype, device)
    spec: SystemSpec = session.spec
    spec_of(case, models)  # sets the block
    reference, rng = Reference(models.exact_generator, models.exact_tokenizer), torch.Generator(device).manual_seed(0)
    kinds = {name: graph.kind for name, graph in spec.graphs().items()}
    if device.type == "cuda" and case.engine.runtime is None and reference.tokenizer:
        _find_convolutions(session)
    with torch.inference_mode(), _steady_convolutions():
        steps = [name for name, kind in kinds.items() if kind is GraphKind.BLOCK_STEP]
        checks = [*check_graphs(session, steps, reference, rng), _drawn(session, compare)]
        if reference.tokenizer:
            # PyTorch engines of a dtype share one tokenizer, which is compared once.
            key = (type(getattr(session, "tokenizer", session)), case.subject.bundle, case.dtype, device)
            if key not in host.tokenizer_checks:
                names = [name for name, kind in kinds.items() if kind is not GraphKind.BLOCK_STEP]
                host.tokenizer_checks[key] = [*check_graphs(session, names, reference, rng)]
            checks += host.tokenizer_checks[key]
    return checks


def _drawn(session: Any, compare: Any) -> "Check":
    """Tokens that the session draws from its own logits, against those that numpy draws."""
    spec, last = session.spec, session.spec.capacity - session.spec.block_size
    tokens = np.zeros((spec.batch, spec.block_size), np.int64)
    logits = session.step(tokens, np.full(spec.batch, last))
    noise = np.stack([uniforms(0, b, 0, spec.block_size) for b in range(spec.batch)])
    found, expected = session.sample(logits, noise, Sampling()), sample(np.asarray(logits), noise, Sampling())
    return compare("sample", f"cache_pos {last}", "tokens", found, expected, 0.0)  # type: ignore[no-any-return]


def _worst(checks: "Iterable[Check]") -> Parity:
    made = [*checks]
    worst = max(made, key=lambda c: c.worst / c.tolerance if c.tolerance else (np.inf if c.worst else 0.0))
    # JSON has no infinity.
    error = min(worst.worst, sys.float_info.max)
    return Parity(error, worst.tolerance, f"{worst.graph} at {worst.at}, {worst.where}", len(made))


@contextmanager
def _steady_convolutions() -> Iterator[None]:
    """No search for the fastest convolutions: the reference tokenizer in fp32 has dozens of shapes, each used once."""
    import torch

    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _find_convolutions(session: Any) -> None:
    """Search for the session's fastest convolutions now: torch keeps what it uses first, searched for or not."""
    spec = session.spec
    session.encode(np.zeros((spec.batch, 3, spec.condition_frames, *spec.video[1:]), np.float32))
    session.decode(np.zeros((spec.batch, spec.clip_tokens), np.int64))


def _stream(session: Any, device: "torch.device") -> "torch.cuda.Stream | None":
    """The stream that a session enqueues on, where it is not torch's."""
    handle = getattr(getattr(session, "device", None), "stream", None)
    if handle is None:
        return None
    import torch

    return torch.cuda.ExternalStream(int(handle), device)


def _empty_cache(device: "torch.device") -> None:
    if device.type != "cpu":
        import torch

        torch.cuda.empty_cache()


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
