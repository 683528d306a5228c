"""What is measured, in the process of one engine or of all PyTorch engines of a dtype: each function is one call.

The parent calls these functions through a `Worker`; the first argument is what the process holds open between calls.
Torch is imported where it is needed: the memory of an engine that runs a bundle on a CPU must not hold it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from nbp_bench.machine import peak_memory
from nbp_engines.bundle import Bundle
from nbp_engines.cuda import Device
from nbp_engines.generator import Clip, Generator
from nbp_engines.noise import uniforms
from nbp_engines.runtime import OpenOptions, Runtime
from nbp_engines.sampling import Sampling, sample
from nbp_engines.spec import GraphKind, SystemSpec

if TYPE_CHECKING:
    import torch

    from nbp_bench.plan import Case, Subject
    from nbp_export.parity import Check
    from nbp_export.request import Request
    from nbp_export.sources import Source
    from nbp_reference.model import NextBlockTransformer
    from nbp_reference.tokenizer import VideoTokenizer

WARM_UP_BLOCKS = 4
WARM_UP_STEPS = 20


class Identity(NamedTuple):
    """What is known of a model once its weights are let go.

    Attributes:
        name, digest, trained: as in a record.
        note: one line that says what it is.
        spec: in fp32, for one clip at a time.
        parameters: of generator and tokenizer together.
        words: the text word of each id of a class-conditional model that has its own; else empty.
    """

    name: str
    digest: str
    trained: bool
    note: str
    spec: SystemSpec
    parameters: int
    words: tuple[str, ...]


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


@dataclass
class _Models:
    """A generator and its tokenizer in a dtype on a device, and the same weights in fp32."""

    generator: "NextBlockTransformer"
    tokenizer: "VideoTokenizer | None"
    exact_generator: "NextBlockTransformer"
    exact_tokenizer: "VideoTokenizer | None"

    def nbytes(self, session: Any) -> int:
        """Bytes of those that a session computes with; it may have a tokenizer of its own."""
        tokenizer = self.tokenizer if session.tokenizer is self.tokenizer else None
        models = [model for model in (self.generator, tokenizer) if model]
        return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


@dataclass
class _Opened:
    """A session, what it holds on a GPU, and the bytes there before it was opened, with a bundle."""

    session: Any
    buffers: int = 0
    free_before: int = 0


class Host:
    """What a process keeps between calls: models by weights, dtype and device, and open sessions by case."""

    def __init__(self) -> None:
        self.models: dict[object, _Models] = {}
        self.sources: dict[object, Source] = {}
        self.digests: dict[object, str] = {}
        self.sessions: dict[Case, _Opened] = {}
        self.tokenizer_checks: dict[object, list[Check]] = {}

    def session(self, case: "Case") -> Any:
        """The open session of a case."""
        return self.sessions[case].session

    def broken(self) -> bool:
        """Whether CUDA has failed in this process for good."""
        if "torch" not in sys.modules:
            return False
        from nbp_bench.device import broken

        return broken()

    def sound(self) -> bool:
        """Whether CUDA is in use and still answers, so that what the process holds is worth keeping after an error."""
        if "torch" not in sys.modules:
            return False
        import torch

        return torch.cuda.is_initialized() and not self.broken()

    def close(self) -> None:
        """Close all sessions."""
        for case in [*self.sessions]:
            close_case(self, case)


def identify(host: Host, request: "Request") -> Identity:
    """Find a model, and hash its weights."""
    from nbp_export.graphs import system_spec
    from nbp_export.weights import weights_sha256

    source, weights = _source(host, request), _weights(request)
    models = [model for model in (source.generator, source.tokenizer) if model]
    config = source.generator.config
    if weights not in host.digests:
        host.digests[weights] = weights_sha256(source.generator, source.tokenizer)
    return Identity(
        source.name,
        host.digests[weights],
        source.trained,
        source.note,
        system_spec(config, source.tokenizer.config if source.tokenizer else None, "fp32", 1),
        sum(p.numel() for model in models for p in model.parameters()),
        config.text.words if config.text else (),
    )


def export_bundle(host: Host, request: "Request", dtype: str, batch: int, runtime: Runtime, folder: Path) -> None:
    """Export a model and prove the bundle, with engines for the GPU of this machine where the runtime runs engines."""
    from nbp_export.onnx_bundle import export
    from nbp_export.trt_library import Options

    source = _source(host, request)
    host.sources.clear()  # the export uses it up
    options = None
    if runtime.runs_engines:
        with Device.open() as device:
            options = Options(arch=device.arch)
    export(source, folder, dtype, batch, engines=options)


def open_case(host: Host, case: "Case", bundle: Path | None, threads: int | None) -> list[str]:
    """Open the session of a case; what a reader of its times should know."""
    if case.engine.runtime:
        assert bundle
        opened = _Opened(None, free_before=_free_device_memory(case.device))
        opened.session = case.engine.runtime.open(Bundle.open(bundle), OpenOptions(threads))
    else:
        import torch

        if threads:
            torch.set_num_threads(threads)
        device = _torch_device(case.device)
        models, before = _models(host, case.subject, case.dtype, device), _allocated(device)
        spec = _spec(case, models)
        assert case.engine.open
        opened = _Opened(case.engine.open(spec, models.generator, models.tokenizer, case.device))
        opened.buffers = _allocated(device) - before
    host.sessions[case] = opened
    return list(getattr(opened.session, "notes", []))


def close_case(host: Host, case: "Case") -> None:
    """Close the session of a case."""
    if opened := host.sessions.pop(case, None):
        opened.session.close()


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
        return Memory(process, opened.free_before - _free_device_memory(case.device))
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    predict(host, case, condition, 0, sampling, seed)
    passing = torch.cuda.max_memory_allocated() - before
    models = _models(host, case.subject, case.dtype, _torch_device(case.device))
    return Memory(process, models.nbytes(opened.session) + opened.buffers + passing)


def step_times(host: Host, case: "Case", count: int, sampling: Sampling | None) -> StepTimes | None:
    """Time single steps back to back, at cache positions spread over all that a clip uses.

    None where the caches grow, so that a step cannot be repeated, and where a clip has no step after the prefill.
    """
    from nbp_bench.device import spans, step_bytes
    from nbp_export.parity import Graphs

    if not isinstance(host.session(case), Graphs):
        return None
    session, device = host.session(case), _torch_device(case.device)
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

    where = _torch_device(device)
    copied = copy_bandwidth(where)
    _empty_cache(where)  # gigabytes that other libraries could not have
    return copied, peak_bandwidth(where)


def parity(host: Host, case: "Case", bundle: Path | None) -> Parity | None:
    """Compare every graph with the reference in fp32 on the same device, and drawn tokens with numpy's.

    None where an engine has no graphs to compare, as the authors' loop, whose caches grow.
    """
    from nbp_export.parity import Graphs

    device = _torch_device(case.device)
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

    models = _models(host, case.subject, case.dtype, device)
    spec: SystemSpec = session.spec
    _spec(case, models)  # sets the block
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


def _source(host: Host, request: "Request") -> "Source":
    from nbp_export.sources import find, with_block

    weights = _weights(request)
    if weights not in host.sources:
        host.sources.clear()  # one model at a time
        host.sources[weights] = find(request)
    elif weights != request:
        host.sources[weights] = with_block(host.sources[weights], request.block)
    return host.sources[weights]


def _weights(request: "Request") -> "Request":
    """What tells weights apart: random ones fit every block, but for a class-conditional model's vocabulary."""
    if request.weights and not request.checkpoint and "hybrid" not in (request.model or ""):
        return request._replace(block=None)
    return request


def _models(host: Host, subject: "Subject", dtype: str, device: "torch.device") -> _Models:
    from nbp_export.graphs import TORCH_DTYPES
    from nbp_export.weights import read_tokenizer, read_whole_generator

    key = (_weights(subject.request) if subject.request else subject.bundle, dtype, device)
    if key not in host.models:
        host.models.clear()
        host.tokenizer_checks.clear()
        if subject.bundle:
            bundle = Bundle.open(subject.bundle)
            generator, tokenizer = read_whole_generator(bundle), read_tokenizer(bundle)
        else:
            assert subject.request
            source = _source(host, subject.request)
            generator, tokenizer = source.generator, source.tokenizer
            host.sources.clear()  # its models are converted in place
        generator = generator.to(device, TORCH_DTYPES[dtype])
        tokenizer = tokenizer.to(device, TORCH_DTYPES[dtype]) if tokenizer else None
        if dtype == "fp32":
            host.models[key] = _Models(generator, tokenizer, generator, tokenizer)
        else:
            exact = deepcopy(tokenizer).float() if tokenizer else None
            host.models[key] = _Models(generator, tokenizer, deepcopy(generator).float(), exact)
    return host.models[key]


def _spec(case: "Case", models: _Models) -> SystemSpec:
    """The spec of a case, for which the models are set."""
    from nbp_export.graphs import system_spec

    config = models.generator.config
    if case.subject.request and case.subject.request.block:
        config = config.with_block(case.subject.request.block)
    models.generator.config = models.exact_generator.config = config
    tokenizer = models.tokenizer.config if models.tokenizer else None
    return system_spec(config, tokenizer, case.dtype, case.batch)


def _torch_device(device: str) -> "torch.device":
    """The device, on which fp32 is fp32 and convolutions are those that were fastest for their shapes."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return torch.device(device)


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


def _allocated(device: "torch.device") -> int:
    if device.type == "cpu":
        return 0
    import torch

    return torch.cuda.memory_allocated(device)


def _free_device_memory(device: str) -> int:
    if device == "cpu":
        return 0
    with Device.open() as opened:
        return opened.free()


def _empty_cache(device: "torch.device") -> None:
    if device.type != "cpu":
        import torch

        torch.cuda.empty_cache()


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
