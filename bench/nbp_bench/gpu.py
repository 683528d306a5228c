"""What a GPU makes of the model, in one go and from a plain checkout: `python -m nbp_bench.gpu`.

Every case, an engine at a block size in a dtype, is held against the reference in fp32 on the same device and then
timed, by a process that starts afresh after a failure; what was measured is written after each. The weights are random.
"""

import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import ZipFile

import click
import numpy as np

from nbp_engines.errors import EngineError, NbpError, UsageError
from nbp_export._extras import need
from nbp_reports import markdown, record, table
from nbp_reports.record import Record

if TYPE_CHECKING:
    import torch

    from nbp_engines.generator import Clip
    from nbp_engines.spec import SystemSpec
    from nbp_export.parity import Check
    from nbp_export.sources import Source
    from nbp_reference.model import NextBlockTransformer
    from nbp_reference.tokenizer import VideoTokenizer

PYTORCH = ("reference", "graphs", "compiled")
ENGINES = ("reference", "graphs", "tensorrt", "cuda", "compiled")  # the last compiles for minutes
DTYPES = ("bf16", "fp16", "fp32")
LEAST_SECONDS = 20  # below which no case begins
CASE_SHARE = 1 / 3  # of the time, that one case may take
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
        notes: lines for the log.
        why: there is no row.
        trace: of a failure that is not one of our own errors; the process is not to be trusted any more.
    """

    record: Record | None = None
    tokens: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    why: str = ""
    trace: str = ""


@click.command()
@click.option("--model", default="nbp-xl", show_default=True, help="A named size, with random weights.")
@click.option("--sizes", default="16,1,256", show_default=True, help="Block sizes or shapes, most wanted first.")
@click.option("--dtype", "dtypes", default="bf16,fp16", show_default=True, help=f"Of {', '.join(DTYPES)}; likewise.")
@click.option("--engines", default=",".join(ENGINES), show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", help="cpu rehearses the script.")
@click.option("--wheels", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Folder of more wheels.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=9.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("nbp-gpu-results"), show_default=True)
@click.option("--quick", is_flag=True, help="Few steps and one clip.")
@click.option("--profile", is_flag=True, help="Then list the kernels of a step and of decode, in profile.txt.")
def main(
    model: str,
    sizes: str,
    dtypes: str,
    engines: str,
    device: str,
    wheels: Path | None,
    minutes: float,
    out: Path,
    quick: bool,
    profile: bool,
) -> None:
    """Hold every engine that this machine has against the reference on its GPU, and time it.

    Needs nothing installed but torch with CUDA, click and numpy; wheels in a folder serve without being installed.
    What cannot be measured is listed with the reason. Leaves records, a table and a log in --out.
    """
    deadline = time.monotonic() + 60 * minutes
    command = shlex.join(["python", "-m", "nbp_bench.gpu", *sys.argv[1:]])
    began = datetime.now(UTC).isoformat(timespec="seconds")
    for asked, known in ((engines, ENGINES), (dtypes, DTYPES)):
        if unknown := set(asked.split(",")) - set(known):
            raise UsageError(f"no {', '.join(sorted(unknown))!r}: there are {', '.join(known)}")
    cases = [
        Case(engine, dtype, block, model, device, out, quick, began, command)
        for dtype in dtypes.split(",")
        for block in sizes.split(",")
        for engine in engines.split(",")
    ]
    cases.sort(key=lambda case: case.engine == "compiled")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked, _Bench(out, deadline, 60 * minutes * CASE_SHARE) as bench:
        if wheels:
            bench.say(f"wheels: {', '.join(unpack(wheels, Path(unpacked))) or f'none in {wheels}'}")
            sys.path.insert(0, unpacked)
        need("export", "torch", "safetensors")
        for case in cases:
            bench.run(case)
        if profile:
            bench.profile(cases[0])
    click.echo(bench.summary())
    if not bench.records:
        raise EngineError(f"nothing could be measured: {out / 'log.txt'} says why")
    if failed := [r for r in bench.records if (r.parity_error or 0) > (r.parity_allowed or 0)]:
        raise EngineError("not the model: " + ", ".join(f"{r.block} {r.dtype} {r.engine}" for r in failed))


def unpack(wheels: Path, folder: Path) -> list[str]:
    """Unpack a folder's wheels into another, as pip would install them but for their scripts; their names."""
    names = sorted(wheels.glob("*.whl"))
    for wheel in names:
        with ZipFile(wheel) as archive:
            archive.extractall(folder)
    for library in (*folder.glob("*.data/purelib"), *folder.glob("*.data/platlib")):
        copytree(library, folder, dirs_exist_ok=True)
    return [wheel.name for wheel in names]


class _Bench(AbstractContextManager["_Bench"]):
    """Runs cases in one process after another, and keeps what comes of them in a folder."""

    def __init__(self, out: Path, deadline: float, longest: float) -> None:
        self.records: list[Record] = []
        self.missing: list[str] = []
        self._out = out
        self._deadline = deadline
        self._longest = longest
        self._tokens: dict[tuple[str, str], np.ndarray] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._pid = 0
        self._log = (out / "log.txt").open("w")

    def say(self, line: str) -> None:
        """To the terminal and the log."""
        click.echo(line)
        self._note(line)

    def _note(self, text: str) -> None:
        self._log.write(f"{datetime.now(UTC):%H:%M:%S} {text}\n")
        self._log.flush()

    def run(self, case: Case) -> None:
        """Measure one case, and write what there is by then."""
        left = self._deadline - time.monotonic()
        if left < LEAST_SECONDS:
            result = Result(why="the time was up")
        else:
            self._note(f"{case}: begins")
            result = self._call(_measure, case, self._tokens.get((case.dtype, case.block)), seconds=left)
        for note in result.notes:
            self._note(f"{case}: {note}")
        if result.trace:
            self._note(f"{case}: {result.trace}")
        if result.record and result.tokens is not None:
            self.records.append(result.record)
            if case.engine == "reference":
                self._tokens[case.dtype, case.block] = result.tokens
            shown = zip(table.ON_DEVICE, table.rows(table.ON_DEVICE, [result.record])[0], strict=True)
            self.say(", ".join(f"{name} {cell}" for name, cell in shown))
        else:
            self.missing.append(f"{case}: not measured: {result.why}")
            self.say(self.missing[-1])
        for dtype in {r.dtype for r in self.records}:
            rows = [r for r in self.records if r.dtype == dtype]
            record.write(rows, self._out / f"{rows[0].model}-{dtype}.jsonl")
        (self._out / "summary.md").write_text(self.summary() + "\n")

    def profile(self, case: Case) -> None:
        """The kernels of a case's step and decode, in a file."""
        result = self._call(_profile, case._replace(engine="reference"), seconds=self._deadline - time.monotonic())
        (self._out / "profile.txt").write_text("\n\n".join(result.notes) or f"not measured: {result.why}\n")

    def _call(self, what: Any, *arguments: object, seconds: float) -> Result:
        """Have the worker's process do something; a fresh one next time if it fails, dies or takes too long."""
        seconds = min(seconds, self._longest)
        try:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, get_context("spawn"))
                self._pid = self._pool.submit(os.getpid).result()
            result: Result = self._pool.submit(what, *arguments).result(max(0.0, seconds))
        except TimeoutError:
            result = Result(why=f"it took longer than {seconds:.0f} s", trace="stopped")
        except BrokenProcessPool as error:
            result = Result(why="its process died", trace=str(error))
        if result.trace:
            self._stop(kill=True)
        return result

    def _stop(self, kill: bool) -> None:
        if self._pool:
            if kill:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            self._pool.shutdown()
            self._pool = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the process, at once if interrupted, and close the log."""
        self._stop(kill=kind is not None)
        self._log.close()

    def summary(self) -> str:
        """What was measured where, as Markdown, and what was not."""
        order = {engine: i for i, engine in enumerate(ENGINES)}
        rows = sorted(self.records, key=lambda r: (r.block_size, r.dtype, order[r.engine]))
        lines = []
        if rows:
            first = rows[0]
            where = f"{first.gpu}, driver {first.driver}" if first.device == "cuda" else f"CPU: {first.machine}"
            rates = ((first.copy_bandwidth, "copied"), (first.peak_bandwidth, "by its clock"))
            told = [f"{value / 1e9:,.0f} GB/s {how}" for value, how in rates if value]
            lines = [f"{first.model}, random weights; {where}; {', '.join(told)}; {first.versions}", ""]
            lines.append(markdown.table(table.ON_DEVICE, rows))
        return "\n".join([*lines, *(f"- {line}" for line in self.missing)])


# What follows runs in the worker's process.


def _measure(case: Case, reference: np.ndarray | None) -> Result:
    notes: list[str] = []
    try:
        return _measured(case, reference, notes)
    except NbpError as error:
        return Result(notes=notes, why=error.message)
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
        parity_error=worst.worst,
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
    """Raise NbpError for an engine that this machine does not have, before anything is made for it."""
    if case.device == "cpu" and case.engine not in ("reference", "compiled"):
        raise EngineError("it takes a CUDA device")
    if case.engine == "compiled" and case.device == "cuda" and find_spec("triton") is None:
        raise EngineError("torch.compile needs triton for a GPU")
    if case.engine in PYTORCH:
        return
    need("export", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    if case.engine == "tensorrt":
        _engine_options().settle()
        return
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise EngineError(f"onnxruntime {onnxruntime.__version__} has no CUDA provider: onnxruntime-gpu has")
    if case.dtype == "bf16":
        raise EngineError("ONNX Runtime's CUDA provider has no Pad in bf16, which the tokenizer takes: see fp16")


def _engine_options() -> Any:
    import torch

    from nbp_export.trt_library import Options

    major, minor = torch.cuda.get_device_capability()
    return Options(arch=f"sm{major}{minor}")


@lru_cache(1)
def _master(model: str) -> "tuple[Source, str]":
    """The model in fp32 on the CPU, and the hash of its weights: the same on every machine."""
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
    from nbp_bench.device import copy_bandwidth, peak_bandwidth

    return copy_bandwidth(device), peak_bandwidth(device)


def _open(case: Case, models: _Models, spec: "SystemSpec") -> "AbstractContextManager[Any]":
    from nbp_bench.engines import GraphsSession, ReferenceSession
    from nbp_engines.session import open_session

    if case.engine not in PYTORCH:
        return open_session(_bundle(case), runtime=case.engine)
    captured = case.device == "cuda" and case.engine != "reference"
    kind = GraphsSession if captured else ReferenceSession
    return kind(spec, models.generator, models.tokenizer, case.device, compiled=case.engine == "compiled")


def _bundle(case: Case) -> Path:
    """The exported model: one that is there already, if it has the same weights."""
    from nbp_engines.bundle import Bundle
    from nbp_export.onnx_bundle import export

    master, digest = _master(case.model)
    options = _engine_options() if case.engine == "tensorrt" else None
    config = master.generator.config.with_block(case.block)
    kind = options.arch if options else "onnx"
    folder = case.out / "bundles" / f"{case.model}-{config.block}-{case.dtype}-{kind}"
    if not folder.exists():
        source = replace(master, generator=deepcopy(master.generator), tokenizer=deepcopy(master.tokenizer))
        source.generator.config = config
        export(source, folder, case.dtype, engines=options)
    elif Bundle.open(folder).manifest.model["weights_sha256"] != digest:
        raise UsageError(f"{folder} has other weights: remove it, or choose another --out")
    return folder


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


def _profile(case: Case) -> Result:
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
            for name, call in calls.items():
                call()
                with profile(activities=[on]) as seen:
                    call()
                    if case.device == "cuda":
                        torch.cuda.synchronize()
                notes.append(f"{name}\n{seen.key_averages().table(row_limit=30, max_name_column_width=90)}")
        return Result(notes=notes)
    except Exception as error:
        return Result(why=str(error), trace=traceback.format_exc())


if __name__ == "__main__":
    main()
