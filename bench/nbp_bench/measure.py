"""Measurements on the sessions that a worker process has open.

The parent calls each public function through a `Worker`. The first argument is the `Host` of the process, in which
host.py opened the session. Torch is imported inside the functions that need it, so that it does not count in the memory
of an engine that runs a bundle on a CPU.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
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
    """The clips of one batch.

    Attributes:
        video: predicted frames, float32 [B,3,F,H,W] in [0,1].
        tokens: given and predicted tokens, int64 [B,T·H·W] in raster order.
        spans: name and nanoseconds of each stage, in the order in which they ran.
    """

    video: np.ndarray
    tokens: np.ndarray
    spans: Sequence[tuple[str, int]]

    @classmethod
    def of(cls, clip: Clip) -> Self:
        """Return the parts of a clip that are sent to the parent."""
        return cls(clip.video, clip.tokens, clip.timeline.spans)


class Parity(NamedTuple):
    """The worst of all checks that compare an engine with the reference in fp32.

    Attributes:
        error: the largest error of that check, relative to the largest expected magnitude.
        allowed: the tolerance of that check.
        where: the graph, position and element of the largest error.
        checks: the number of checks.
    """

    error: float
    allowed: float
    where: str
    checks: int


class StepTimes(NamedTuple):
    """Times of single steps that run back to back, in nanoseconds by the device's clock.

    Attributes:
        steps: time of each step without sampling.
        passes: time of each step with sampling and the copies of the tokens to the host and back.
        step_bytes: bytes that a step has to read, averaged over the steps.
    """

    steps: list[int]
    passes: list[int]
    step_bytes: int


class Memory(NamedTuple):
    """Peak memory in bytes.

    Attributes:
        process: peak resident size of the process.
        device: peak memory of the engine on the GPU; None on a CPU.
    """

    process: int
    device: int | None


def warm_up(host: Host, case: "Case", condition: np.ndarray, sampling: Sampling | None, seed: int) -> None:
    """Run every graph once, because first calls allocate memory and choose kernels.

    A session that unrolls its steps also generates a whole clip, because it captures the loop in its first clip.
    """
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
    """Generate a whole clip from given frames float32 [B,3,F,H,W] or from the text ids int64 [B,P] of a class."""
    session = host.session(case)
    generator = Generator(session, sampling, seed)
    return Result.of((generator.generate if session.spec.hybrid else generator.predict)(condition, clip_index))


def first_frame(host: Host, case: "Case", condition: np.ndarray, sampling: Sampling | None, seed: int) -> Result:
    """Stream a clip up to its first predicted frames."""
    return Result.of(next(Generator(host.session(case), sampling, seed).stream(condition, 0)))


def memory(host: Host, case: "Case", condition: np.ndarray, sampling: Sampling | None, seed: int) -> Memory:
    """Return the peak memory of the process so far and, on a GPU, the engine's peak while it makes one more clip.

    For a PyTorch engine the GPU's peak is the sum of weights, buffers and what torch allocates during the clip. For a
    runtime it is the free memory before the bundle was opened less the free memory after the clip.
    """
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
    transient = torch.cuda.max_memory_allocated() - before
    models = models_of(host, case.candidate, case.dtype, torch_device(case.device))
    return Memory(process, models.nbytes(opened.session) + opened.buffers + transient)


def step_times(host: Host, case: "Case", count: int, sampling: Sampling | None) -> StepTimes | None:
    """Time `count` single steps back to back, at cache positions spread over those of a clip.

    Returns None for an engine whose caches grow, because its steps cannot be repeated, and for a block shape with which
    a clip has no step after the prefill.
    """
    from nbp_bench.device import step_bytes, time_calls
    from nbp_export.parity import Graphs

    if not isinstance(host.session(case), Graphs):
        return None
    session, device = host.session(case), torch_device(case.device)
    spec, settings = session.spec, sampling or session.sampling
    step_positions = range(spec.condition_tokens, spec.capacity - spec.block_size + 1, spec.block_size)
    if spec.hybrid:  # the first block is generated token by token
        step_positions = step_positions[1:]
    if not step_positions:
        return None
    positions = [step_positions[i * len(step_positions) // count] for i in range(count)]
    tokens = np.random.default_rng(0).integers(spec.vocab, size=(spec.batch, spec.block_size))
    noise = np.stack([uniforms(0, b, 0, spec.block_size) for b in range(spec.batch)])

    def step(i: int) -> Any:
        return session.step(tokens, np.full(spec.batch, positions[i]))

    stream = _stream(session, device)
    for calls in (min(count, WARM_UP_STEPS), count):
        steps = time_calls(device, step, calls, stream)
        passes = time_calls(device, lambda i: session.sample(step(i), noise, settings), calls, stream)
    return StepTimes(steps, passes, step_bytes(spec, positions))


def bandwidths(host: Host, device: str) -> tuple[float, float | None]:  # noqa: ARG001 - every function takes a host
    """Return the bandwidth of a large copy on the device, and the peak bandwidth of its memory, in bytes per second.

    The peak is None on a CPU and where torch does not report it.
    """
    from nbp_bench.device import copy_bandwidth, peak_bandwidth

    target = torch_device(device)
    copied = copy_bandwidth(target)
    _empty_cache(target)  # torch would keep gigabytes that other libraries need
    return copied, peak_bandwidth(target)


def parity(host: Host, case: "Case", bundle: Path | None) -> Parity | None:
    """Compare every graph with the reference in fp32 on the same device, and the drawn tokens with numpy's.

    A case that is not open in this process is opened from `bundle` for the comparison. Returns None for an engine
    without graphs to compare, such as the authors' loop, whose caches grow.
    """
    from nbp_export.parity import Graphs

    device = torch_device(case.device)
    opened = host.sessions.get(case)
    if opened is None:  # the engine is measured in a process without torch, so this process compares it
        assert case.engine.runtime
        assert bundle
        with case.engine.runtime.open(Bundle.open(bundle), OpenOptions()) as session:
            return _worst_of(_parity_checks(host, case, session, device))
    if not isinstance(opened.session, Graphs):
        return None
    return _worst_of(_parity_checks(host, case, opened.session, device))


def profile(host: Host, case: "Case") -> str:
    """Return tables of the kernels of one step and of decode, the slowest kernel first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    session, on_gpu = host.session(case), case.device == "cuda"
    spec = session.spec
    tokens, clip = (np.zeros((spec.batch, n), np.int64) for n in (spec.block_size, spec.clip_tokens))
    cache_pos = np.full(spec.batch, spec.condition_tokens + spec.hybrid * spec.block_size)
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: session.step(tokens, cache_pos),
        "decode": lambda: session.decode(clip),
    }
    session.prefill(np.zeros((spec.batch, spec.condition_tokens), np.int64))
    tables = []
    for name, call in calls.items():
        call()
        with profiling(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            call()
            _wait(case.device)
        column = f"self_{'device' if on_gpu else 'cpu'}_time_total"
        table = profiler.key_averages().table(sort_by=column, row_limit=30, max_name_column_width=90)
        tables.append(f"{case}: {name}\n{table}")
    return "\n\n".join(tables)


def _parity_checks(host: Host, case: "Case", session: Any, device: "torch.device") -> "list[Check]":
    """Compare the session's graphs and its sampling with the reference, and return all checks."""
    import torch

    from nbp_export.parity import Reference, check_graphs, compare

    models = models_of(host, case.candidate, case.dtype, device)
    spec: SystemSpec = session.spec
    spec_of(case, models)  # sets the models to the block of the case
    reference, rng = Reference(models.exact_generator, models.exact_tokenizer), torch.Generator(device).manual_seed(0)
    kinds = {name: graph.kind for name, graph in spec.graphs().items()}
    if device.type == "cuda" and case.engine.runtime is None and reference.tokenizer:
        _tune_convolutions(session)
    with torch.inference_mode(), _no_convolution_tuning():
        steps = [name for name, kind in kinds.items() if kind is GraphKind.BLOCK_STEP]
        checks = [*check_graphs(session, steps, reference, rng), _check_sampling(session, compare)]
        if reference.tokenizer:
            # The PyTorch engines of a dtype share one tokenizer, so it is compared only once.
            key = (type(getattr(session, "tokenizer", session)), case.candidate.bundle, case.dtype, device)
            if key not in host.tokenizer_checks:
                names = [name for name, kind in kinds.items() if kind is not GraphKind.BLOCK_STEP]
                host.tokenizer_checks[key] = [*check_graphs(session, names, reference, rng)]
            checks += host.tokenizer_checks[key]
    return checks


def _check_sampling(session: Any, compare: Any) -> "Check":
    """Compare the tokens that the session draws from its logits with those that numpy draws from them."""
    spec, last = session.spec, session.spec.capacity - session.spec.block_size
    tokens = np.zeros((spec.batch, spec.block_size), np.int64)
    logits = session.step(tokens, np.full(spec.batch, last))
    noise = np.stack([uniforms(0, b, 0, spec.block_size) for b in range(spec.batch)])
    actual, expected = session.sample(logits, noise, Sampling()), sample(np.asarray(logits), noise, Sampling())
    return compare("sample", f"cache_pos {last}", "tokens", actual, expected, 0.0)  # type: ignore[no-any-return]


def _worst_of(checks: "list[Check]") -> Parity:
    """Return the check whose error is the largest share of its tolerance."""
    worst = max(checks, key=lambda c: c.worst / c.tolerance if c.tolerance else (np.inf if c.worst else 0.0))
    # Records are JSON, which has no infinity.
    error = min(worst.worst, sys.float_info.max)
    return Parity(error, worst.tolerance, f"{worst.graph} at {worst.at}, {worst.where}", len(checks))


@contextmanager
def _no_convolution_tuning() -> Iterator[None]:
    """Turn off cuDNN's search for the fastest convolutions inside the context.

    The reference tokenizer in fp32 has dozens of shapes and uses each of them once, so a search would not pay off.
    """
    import torch

    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _tune_convolutions(session: Any) -> None:
    """Run the session's tokenizer so that cuDNN searches for its fastest convolutions now.

    Torch keeps the convolution that a shape used first, whether or not it was searched for.
    """
    spec = session.spec
    session.encode(np.zeros((spec.batch, 3, spec.condition_frames, *spec.video[1:]), np.float32))
    session.decode(np.zeros((spec.batch, spec.clip_tokens), np.int64))


def _stream(session: Any, device: "torch.device") -> "torch.cuda.Stream | None":
    """Return the CUDA stream that a session enqueues on, or None if it uses torch's current stream."""
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
