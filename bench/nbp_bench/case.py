"""One engine at a block size in a dtype, on a GPU: held against the reference in fp32 there, then timed.

Torch is all it takes; what an engine needs beside it is imported when its turn comes.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nbp_engines.cuda import bindings
from nbp_engines.errors import EngineError, NbpError, UsageError
from nbp_export._extras import need
from nbp_reports.record import Record

if TYPE_CHECKING:
    import torch

    from nbp_engines.bundle import Bundle
    from nbp_engines.generator import Clip
    from nbp_engines.spec import SystemSpec
    from nbp_export.parity import Check
    from nbp_export.sources import Source
    from nbp_reference.model import NextBlockTransformer
    from nbp_reference.tokenizer import VideoTokenizer

PYTORCH = ("reference", "graphs", "compiled")  # the other engines run bundles
STEPS, CLIPS, CLIP_SECONDS = 200, (3, 20), 8.0  # measured steps; clips at least and at most, and for how long


class Case(NamedTuple):
    """One row to measure.

    Attributes:
        engine, dtype, block: what is asked for.
        model: a named size.
        device: `cuda`, or `cpu` for a rehearsal.
        out: where bundles are kept.
        quick: few steps and one clip.
        began, command: for the record.
    """

    engine: str
    dtype: str
    block: str
    model: str
    device: str
    out: Path
    quick: bool
    began: str
    command: str

    def __str__(self) -> str:
        return f"{self.block} {self.dtype} {self.engine}"


@dataclass
class Result:
    """What a worker's process sends back: the row with its first clip's tokens, or why there is none.

    Attributes:
        record, tokens: the row; tokens [1,T·H·W].
        notes: lines for the log and the summary.
        why: there is no row.
        trace: of a failure after which the process is not to be trusted any more: one that is not an error of ours, or
            that CUDA does not survive.
    """

    record: Record | None = None
    tokens: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    why: str = ""
    trace: str = ""


def measure(case: Case, reference: np.ndarray | None) -> Result:
    """The row of a case; its tokens are compared with those of the reference engine, where that has run.

    The bundle of an engine that runs one is there: `export` sees to it.
    """
    return _told(lambda notes: _measured(case, reference, notes))


def export(case: Case) -> Result:
    """Have the bundle of a case exported and proven where it is not there yet; `why` if that cannot be."""
    return _told(lambda notes: _exported(case, notes))


def _told(work: Callable[[list[str]], Result]) -> Result:
    """What comes of it, given where to leave notes; any failure as a result."""
    notes: list[str] = []
    try:
        return work(notes)
    except NbpError as error:
        from nbp_bench.device import broken

        return Result(notes=notes, why=error.message, trace=traceback.format_exc() if broken() else "")
    except Exception as error:
        return Result(notes=notes, why=f"{type(error).__name__}: {error}"[:300], trace=traceback.format_exc())


def _measured(case: Case, reference: np.ndarray | None, notes: list[str]) -> Result:
    from nbp_bench.device import spans, step_bytes
    from nbp_bench.machine import describe
    from nbp_bench.worker import agreement, clip_fields
    from nbp_engines.generator import Generator
    from nbp_engines.noise import uniforms
    from nbp_engines.sampling import Sampling

    device = _device(case)
    _refuse(case)
    copied, peak = _bandwidths(device)
    models = _models(case.model, case.dtype, device)
    spec = models.at(case.block)
    settings, rng = Sampling(), np.random.default_rng(0)
    with _open(case, models, spec) as session:
        notes += getattr(session, "notes", [])
        checks = [*_checks(session, models, device)]
        worst = max(checks, key=lambda c: c.worst / c.tolerance if c.tolerance else c.worst and np.inf)
        notes.append(f"{len(checks)} checks, worst: {worst}")
        first, size, last = spec.condition_tokens, spec.block_size, spec.capacity - spec.block_size
        positions = range(first, last + 1, size) or [last]
        tokens, noise = rng.integers(spec.vocab, size=(1, size)), uniforms(0, 0, 0, size)[None]

        def step(i: int) -> Any:
            return session.step(tokens, np.array([positions[i % len(positions)]]))

        count = 5 if case.quick else STEPS
        stream = _stream(session, device)
        for _ in range(2):  # the first warms up
            steps = spans(device, step, count, stream)
            passes = spans(device, lambda i: session.sample(step(i), noise, settings), count, stream)
        generator = Generator(session, settings)
        frames = rng.random((1, 3, spec.condition_frames, *spec.video[1:]), np.float32)
        generator.predict(frames)
        least, most = (1, 1) if case.quick else CLIPS
        began, clips = time.monotonic(), list["Clip"]()
        while len(clips) < least or (len(clips) < most and time.monotonic() < began + CLIP_SECONDS):
            clips.append(generator.predict(frames, sample=len(clips)))
        streamed = next(generator.stream(frames)).timeline.total_ns
    share, divergence = None, None
    if reference is not None:
        share, divergence = agreement(clips[0].tokens, reference, spec)
    row = Record(
        run=case.began,
        command=case.command,
        **vars(describe()),
        model=case.model,
        weights_sha256=_master(case.model)[1],
        trained=False,
        engine=case.engine,
        threads=None,
        device=case.device,
        video="noise",
        seed=0,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        interleaved=False,
        **clip_fields(spec, [clip.timeline.spans for clip in clips]),
        first_frame_ns=[streamed],
        peak_memory_bytes=None,
        token_agreement=share,
        first_divergence=divergence,
        device_step_ns=steps,
        device_pass_ns=passes,
        step_bytes=step_bytes(models.generator, case.dtype, 1, [positions[i % len(positions)] for i in range(count)]),
        copy_bandwidth=copied,
        peak_bandwidth=peak,
        parity_error=min(worst.worst, sys.float_info.max),
        parity_allowed=worst.tolerance,
        parity_where=f"{worst.graph} at {worst.at}, {worst.where}",
    )
    return Result(row, clips[0].tokens, notes)


class _Models(NamedTuple):
    """The model in a dtype, and the reference in fp32 with the same weights, both on the device."""

    generator: "NextBlockTransformer"
    tokenizer: "VideoTokenizer"
    exact_generator: "NextBlockTransformer"
    exact_tokenizer: "VideoTokenizer"

    def at(self, block: str) -> "SystemSpec":
        """Set for a block: weights of random models fit any."""
        from nbp_export.graphs import TORCH_DTYPES, system_spec

        for generator in (self.generator, self.exact_generator):
            generator.config = generator.config.with_block(block)
        dtype = next(name for name, dtype in TORCH_DTYPES.items() if dtype == self.generator.pos_emb.dtype)
        return system_spec(self.generator.config, self.tokenizer.config, dtype, 1)


def _device(case: Case) -> "torch.device":
    """The device, fp32 being fp32 on it. Raises EngineError if there is none."""
    import torch

    if case.device == "cuda" and not torch.cuda.is_available():
        raise EngineError("torch finds no CUDA device: --device cpu rehearses the script without one")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # of the ways to convolve, the fastest for these shapes
    return torch.device(case.device)


def _refuse(case: Case) -> None:
    """Raise NbpError for an engine that this machine does not have, before anything is made for it.

    What would run it comes first: without that, what would export it does not matter.
    """
    if case.device == "cpu" and case.engine not in ("reference", "compiled"):
        raise EngineError("it takes a CUDA device")
    if case.engine == "compiled" and case.device == "cuda" and find_spec("triton") is None:
        raise EngineError("torch.compile needs triton for a GPU")
    if case.engine in PYTORCH:
        return
    if case.engine == "tensorrt":
        _engine_options().settle()
    else:
        if find_spec("onnxruntime") is None:
            raise EngineError("onnxruntime-gpu is not installed")
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise EngineError(f"onnxruntime {onnxruntime.__version__} has no CUDA provider: onnxruntime-gpu has")
        if case.dtype == "bf16":
            raise EngineError("ONNX Runtime's CUDA provider has no Pad in bf16, which the tokenizer takes: see fp16")
    bindings("runtime")
    if not folder(case).exists():
        need("export", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


def _engine_options() -> Any:
    import torch

    from nbp_export.trt_library import Options

    major, minor = torch.cuda.get_device_capability()
    return Options(arch=f"sm{major}{minor}")


@lru_cache(1)
def _master(model: str) -> "tuple[Source, str]":
    """The model in fp32 on the CPU, and the hash of its weights: random ones may differ between kinds of CPU."""
    from nbp_export.sources import Request, find
    from nbp_export.weights import weights_sha256

    source = find(Request(model, weights="random"))
    if source.generator.config.text:
        raise UsageError(f"{model} is class-conditional: this script gives frames")
    return source, weights_sha256(source.generator, source.tokenizer)


@lru_cache(1)
def _models(model: str, dtype: str, device: "torch.device") -> _Models:
    from nbp_export.graphs import TORCH_DTYPES

    source, _ = _master(model)
    assert source.tokenizer  # a named model has one
    generator = deepcopy(source.generator).to(device, TORCH_DTYPES[dtype])
    tokenizer = deepcopy(source.tokenizer).to(device, TORCH_DTYPES[dtype])
    return _Models(generator, tokenizer, deepcopy(generator).float(), deepcopy(tokenizer).float())


@lru_cache(1)
def _bandwidths(device: "torch.device") -> tuple[float, float | None]:
    import torch

    from nbp_bench.device import copy_bandwidth, peak_bandwidth

    copied = copy_bandwidth(device)
    torch.cuda.empty_cache()  # gigabytes that other libraries could not have
    return copied, peak_bandwidth(device)


def _open(case: Case, models: _Models, spec: "SystemSpec") -> "AbstractContextManager[Any]":
    import torch

    from nbp_bench.cuda_graphs import CudaGraphSession
    from nbp_bench.torch_sessions import EagerSession
    from nbp_engines.session import open_session

    if case.engine not in PYTORCH:
        torch.cuda.empty_cache()  # what torch keeps for itself, other libraries cannot have
        return open_session(_bundle(case), runtime=case.engine)
    captured = case.device == "cuda" and case.engine != "reference"
    kind = CudaGraphSession if captured else EagerSession
    return kind(spec, models.generator, models.tokenizer, case.device, compiled=case.engine == "compiled")


def folder(case: Case) -> Path:
    """Where the bundle of a case is, or would be."""
    config = _master(case.model)[0].generator.config.with_block(case.block)
    kind = _engine_options().arch if case.engine == "tensorrt" else "onnx"
    return case.out / "bundles" / f"{case.model}-{config.block}-{case.dtype}-{kind}"


def _exported(case: Case, notes: list[str]) -> Result:
    import torch

    from nbp_export import onnx_bundle

    _device(case)
    _refuse(case)
    if not (path := folder(case)).exists():
        master, began = _master(case.model)[0], time.monotonic()
        source = replace(master, generator=deepcopy(master.generator), tokenizer=deepcopy(master.tokenizer))
        source.generator.config = source.generator.config.with_block(case.block)
        torch.cuda.empty_cache()
        onnx_bundle.export(source, path, case.dtype, engines=_engine_options() if case.engine == "tensorrt" else None)
        notes.append(f"exported and proven in {time.monotonic() - began:.0f} s")
    return Result(notes=notes)


def _bundle(case: Case) -> "Bundle":
    """The exported model, its files verified. Raises UsageError if its weights are not those that are measured."""
    from nbp_engines.bundle import Bundle

    bundle = Bundle.open(folder(case))
    if bundle.manifest.model["weights_sha256"] != _master(case.model)[1]:
        raise UsageError(f"{bundle.path} has other weights: remove it, or choose another --out")
    return bundle


def _stream(session: Any, device: "torch.device") -> "torch.cuda.Stream | None":
    """The stream that a session enqueues on, where it is not torch's."""
    import torch

    handle = getattr(getattr(session, "device", None), "stream", None)
    return None if handle is None else torch.cuda.ExternalStream(int(handle), device)


def _checks(session: Any, models: _Models, device: "torch.device") -> "Iterator[Check]":
    """Every graph against the reference, and the tokens drawn from the session's logits against numpy's."""
    import torch

    from nbp_engines.noise import uniforms
    from nbp_engines.sampling import Sampling, sample
    from nbp_export.parity import check_decode, check_encode, check_step, compare, step_positions

    spec, rng, settings = session.spec, torch.Generator(device).manual_seed(0), Sampling()
    with torch.inference_mode():
        for name in spec.generator_graphs():
            for start in [0] if name == "prefill" else step_positions(spec, name):
                yield from check_step(session, name, models.exact_generator, start, rng)
        tokens, last = np.zeros((1, spec.block_size), np.int64), spec.capacity - spec.block_size
        logits, noise = session.step(tokens, np.array([last])), uniforms(0, 0, 0, spec.block_size)[None]
        drawn, due = session.sample(logits, noise, settings), sample(np.asarray(logits), noise, settings)
        yield compare("sample", f"cache_pos {last}", "tokens", drawn, due, 0.0)
        yield from check_encode(session, models.exact_tokenizer, rng)
        yield from check_decode(session, models.exact_tokenizer, rng)


def profiled(case: Case) -> Result:
    """Tables of the kernels that a step and decode take, as notes."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    try:
        device = _device(case)
        models = _models(case.model, case.dtype, device)
        spec = models.at(case.block)
        notes = []
        with _open(case, models, spec) as session:
            tokens, clip = np.zeros((1, spec.block_size), np.int64), np.zeros((1, spec.clip_tokens), np.int64)
            calls: dict[str, Callable[[], object]] = {
                "step": lambda: session.step(tokens, np.array([0])),
                "decode": lambda: session.decode(clip),
            }
            on = ProfilerActivity.CUDA if case.device == "cuda" else ProfilerActivity.CPU
            slowest = f"self_{'device' if case.device == 'cuda' else 'cpu'}_time_total"
            for name, call in calls.items():
                call()
                with profile(activities=[on]) as seen:
                    call()
                    if case.device == "cuda":
                        torch.cuda.synchronize()
                table = seen.key_averages().table(sort_by=slowest, row_limit=30, max_name_column_width=90)
                notes.append(f"{name}\n{table}")
        return Result(notes=notes)
    except Exception as error:
        return Result(why=str(error), trace=traceback.format_exc())
