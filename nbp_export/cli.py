"""The `nbp-export` command: parse, call, print."""

import errno
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from nbp_engines.registry import DEFAULT, RUNTIMES
from nbp_engines.shell import command_line
from nbp_engines.status import sentences
from nbp_errors import NbpError, printable
from nbp_export._commands import Commands, RuntimeName, runtime_help

if TYPE_CHECKING:
    from rich.console import Console

    from nbp_engines.bundle import Bundle
    from nbp_export.trt_library import Options

SIZES = "nbp-xl, nbp-xxl, nbp-3b, nbp-tiny, each also as NAME-hybrid"


class _Ended(BaseException):
    """A signal that ends the process.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _ExportCommands(Commands):
    """Commands that clean up when a signal ends them, and print what the operating system refuses as one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exits with 128 and a signal's number where one ended it, as shells have it."""
        try:
            with _ending_signals():
                return super().invoke(ctx)
        except _Ended as end:
            click.echo(f"Ended by {signal.Signals(end.number).name}.", err=True)
            sys.exit(128 + end.number)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search("allocate memory|overflow", str(error)):
                raise
            raise click.ClickException("the memory is too small for this: choose a smaller --batch or model") from error
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # the first is no refusal of the system's, the other is click's
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(printable(f"{where}{error.strerror}")) from error


@contextmanager
def _ending_signals() -> Iterator[None]:
    """While it lasts, SIGTERM and SIGHUP raise, as Ctrl-C does, so that nothing half-written is left behind."""

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # cleaning up takes a moment, in which it may come again
        raise _Ended(number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # What `nohup` or a program around this one has settled stays.
    before = {number: signal.SIG_DFL for number in numbers if signal.getsignal(number) is signal.SIG_DFL}
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.group(cls=_ExportCommands)
@click.version_option(package_name="nbp-export")
def main() -> None:
    """Take a Next-Block-Prediction video generator from PyTorch to engines, each proven against the reference."""


MODEL_OPTIONS = (
    click.option("--model", help=f"A named size: {SIZES}.  [default: the bundled nbp-tiny]"),
    click.option(
        "--checkpoint",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The authors' .ckpt, or our .safetensors: a path, or ORG/REPO[@REVISION][/FILE] on the Hugging Face Hub.",
    ),
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The authors' .pt, or ours; here or on the Hub.",
    ),
    click.option("--ema", is_flag=True, help="Take the EMA copy of the weights that a checkpoint holds beside them."),
    click.option("--weights", type=click.Choice(["random"]), help="Random weights of the named model: for timing."),
    click.option(
        "--block", help="Block shape TxHxW in latent units, or a size.  [default: the model's own, else 1x1x16]"
    ),
    click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True),
    click.option(
        "--batch", type=click.IntRange(1, 2**20), default=1, show_default=True, help="Clips generated at once."
    ),
    click.option("--timing-only", is_flag=True, help="Accept a checkpoint that was trained for another block."),
    click.option(
        "--out", type=click.Path(path_type=Path), help="The bundle's folder.  [default: ./NAME-BLOCK-DTYPE[-ARCH]]"
    ),
)


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    """What is exported, and where to: the same for every kind of export."""
    for option in reversed(MODEL_OPTIONS):
        command = option(command)
    return command


@main.command()
@_model_options
def onnx(**options: Any) -> None:
    """Export encode, prefill, step and decode as ONNX, opset 24, checked against the reference on this machine.

    A checkpoint without a tokenizer gives prefill and step alone; --tokenizer FILE adds the rest.
    """
    _export(**options)


@main.command(epilog="\n\n".join(sentences(["tensorrt", "tensorrt-rtx-engines", "tensorrt-11-engines"])))
@_model_options
@click.option(
    "--builder",
    type=click.Choice(["auto", "tensorrt", "rtx"]),
    default="auto",
    show_default=True,
    help="TensorRT 11 builds on the target GPU; TensorRT-RTX anywhere. auto: the first where it and the GPU are there.",
)
@click.option("--arch", help="GPU architecture: sm80 (A100), sm86, sm89 or sm120.  [default: sm80; TensorRT 11: yours]")
@click.option(
    "--hardware-compat",
    "compatibility",
    type=click.Choice(["none", "ampere+", "same-cc"]),
    default="none",
    show_default=True,
    help="Other GPUs that TensorRT 11's engines must run on, at some cost in speed.",
)
@click.option(
    "--attention",
    type=click.Choice(["fused", "decomposed"]),
    help="One kernel, or else no engine; or several.  [default: fused; decomposed in fp32, which has no such kernel]",
)
@click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="GPU memory that a kernel may use for itself.")
@click.option("--level", type=click.IntRange(0, 5), help="How long TensorRT 11 searches for kernels.")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of what TensorRT 11 measured in earlier builds.  [default: ~/.cache/nbp-export]",
)
@click.option("--check", is_flag=True, help="Only parse: list every node that does not map. Builds and leaves nothing.")
def trt(
    builder: str,
    arch: str | None,
    compatibility: str,
    attention: str | None,
    workspace: int | None,
    level: int | None,
    timing_cache: Path | None,
    check: bool,
    **options: Any,
) -> None:
    """Build TensorRT engines beside the ONNX graphs that they are built from; with TensorRT-RTX no GPU is needed.

    The graphs are checked against the reference on this machine, prefill and steps being one graph; the network that
    TensorRT makes of them is checked for ignored inputs, copied caches and attention without its mask.
    """
    from nbp_export.trt_library import Options

    how = Options(
        builder=builder,
        arch=arch,
        compatibility=compatibility,
        decomposed=None if attention is None else attention == "decomposed",
        workspace=None if workspace is None else workspace * 2**20,
        level=level,
        timing_cache=timing_cache,
    )
    _export(engines=how, check=check, **options)


def _refuse_deleted_folder() -> None:
    """Raise NbpError if the current folder is gone: torch's libraries would end the process as they are loaded."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise NbpError("the current folder was deleted: change to one that exists") from error


def _export(
    model: str | None,
    checkpoint: Path | None,
    tokenizer: Path | None,
    ema: bool,
    weights: str | None,
    block: str | None,
    dtype: str,
    batch: int,
    timing_only: bool,
    out: Path | None,
    engines: "Options | None" = None,
    check: bool = False,
) -> None:
    from nbp_export._extras import need

    _refuse_deleted_folder()
    need("export", "torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "rich")
    from nbp_export.inspect import counted
    from nbp_export.onnx_bundle import export, refuse_out, rehearse
    from nbp_export.request import Request
    from nbp_export.sources import find

    # Before anything that takes time.
    try:
        gettempdir()  # torch's exporter needs one
    except FileNotFoundError as error:
        raise NbpError(f"{error.strerror}: free space there, or set TMPDIR to another folder") from error
    if out and not check:
        refuse_out(out)
    library, settled, why = engines.settle() if engines else (None, None, "")
    with _stages() as (say, report):
        report("load")
        source = find(Request(model, checkpoint, tokenizer, weights, block, timing_only, ema=ema))
        say(source.note)
        if library and settled:
            version = library.load().__version__
            say(f"builder: {library.title} {version} for {settled.arch} ({why})")
        if engines and check:
            for file, layers in rehearse(source, engines, dtype, batch, report).items():
                say(f"{file}: every node maps, {layers.total()} layers: {counted(layers)}")
            say("parsed, not built and not compared with the reference: without --check it is")
            return
        name = f"{_folder_name(source.name)}-{source.generator.config.block}-{dtype}"
        folder = out or Path(f"{name}-{settled.arch}" if settled else name)
        if source.tokenizer is None:
            say("no tokenizer in the checkpoint: generator graphs alone; --tokenizer FILE adds encode and decode")
        bundle = export(source, folder, dtype, batch, report, engines=engines)
        say(_outcome(bundle))
        for line in (*_engine_lines(bundle), *_status_lines(bundle)):
            say(line)
    _echo_path(bundle.path)


@main.command(epilog="\n\n".join(sentences(row for runtime in RUNTIMES.values() for row in runtime.status)))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--runtime", type=RuntimeName(), default=DEFAULT.name, show_default=True, help=runtime_help())
def verify(bundle: Path, runtime: str) -> None:
    """Prove a bundle again: hashes, schema, lint, and parity with the reference on the weights that it holds.

    Needs no checkpoint. Writes a new receipt; a bundle that fails is left without one.
    """
    from nbp_export._extras import need

    _refuse_deleted_folder()
    need("export", "torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "rich")
    from nbp_export.proof import prove_again

    with _stages() as (say, report):
        proven = prove_again(bundle, report, runtime)
        say(_outcome(proven))
        if not RUNTIMES[runtime].runs_engines:  # else the engines have just run
            for line in (*_engine_lines(proven), *_status_lines(proven)):
                say(line)
    _echo_path(bundle)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--measure", "measured", is_flag=True, help="Open it in a fresh process and tell the memory that it took."
)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def inspect(bundle: Path, measured: bool, as_json: bool) -> None:
    """Tell what a bundle holds, what memory it needs, and what its receipt proves. Needs no torch."""
    from nbp_export._extras import need
    from nbp_export.inspect import describe, look, measure, render

    told = describe(look(bundle))
    if measured:
        told["memory"] |= measure(bundle)
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return
    need("export", "rich")

    console = _console()
    if not console.is_terminal:
        console.width = 120
    console.print(render(told))


def _console(stderr: bool = False) -> "Console":
    """Where names stay as they are, which may hold what looks like markup or an emoji's code."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if console.width < 1:  # as COLUMNS=0 has it, in which nothing would be printed
        console.width = 80
    return console


@contextmanager
def _stages() -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """How to say a line that stays, and how to report what begins."""
    from rich.text import Text

    console = _console(stderr=True)
    with console.status("", spinner="dots" if console.encoding.startswith("utf") else "line") as status:

        def report(stage: str) -> None:
            status.update(Text(stage))
            if not console.is_terminal:
                console.print(f"  {stage}")

        yield partial(console.print, soft_wrap=True), report


def _engine_lines(bundle: "Bundle") -> Iterator[str]:
    """What was checked of a bundle's engines, and what was not."""
    from nbp_export.trt import builds

    if not bundle.manifest.engines:
        return
    yield "engines, built from the very graphs that were checked:"
    for engine, build in zip(bundle.manifest.engines, builds(bundle), strict=True):
        uses = ", ".join(f"{graph} of {n} tokens" for graph, n in zip(engine.graphs, build.tokens, strict=False))
        caches, attentions = (build.layers.get(name, 0) for name in ("KV_CACHE_UPDATE", "ATTENTION_INPUT"))
        seen = f"{caches} caches updated in place, {attentions} attentions masked and {build.attention}, "
        yield f"  {engine.file}: {uses}{'; ' + seen if uses else ''}no input ignored (seen in {build.seen_in})"
    verify = command_line("nbp-export", "verify", bundle.path, "--runtime", bundle.manifest.runtime)
    yield f"not verified: the engines themselves, which only a GPU executes; `{verify}` verifies them there"


def _status_lines(bundle: "Bundle") -> list[str]:
    """What was executed so far of a bundle's kind, unless the default runtime executes it as it is."""
    from nbp_export.inspect import status_of

    manifest = bundle.manifest
    if manifest.runtime == DEFAULT.name and manifest.spec.dtype in DEFAULT.dtypes:
        return []
    return status_of(manifest.runtime, manifest.spec.dtype, [engine.library for engine in manifest.engines])


def _folder_name(model: str) -> str:
    """The name of a model as the beginning of a folder's: no longer than fits, and fit to be typed."""
    name = re.sub(r"[\\/\s]", "_", model).lstrip("-").encode()[:150].decode("utf-8", "ignore")
    return name or "model"


def _echo_path(path: Path) -> None:
    """Print a path alone: as it is into a pipe, and on a terminal without what that would obey."""
    click.echo(printable(path) if sys.stdout and sys.stdout.isatty() else os.fsencode(path))


def _outcome(bundle: "Bundle") -> str:
    receipt = bundle.receipt()
    assert receipt is not None  # it was written a moment ago, by the same process
    worst = receipt["worst"]
    return (
        f"{len(receipt['checks'])} checks against the reference passed, {receipt['executed']}; worst: {worst['graph']} "
        f"at {worst['at']}, {worst['worst']:.2g} of the largest value (allowed {worst['tolerance']:g})"
    )
