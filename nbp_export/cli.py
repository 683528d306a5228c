"""The command `nbp-export`: parses options, calls the package and prints results."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import click

from nbp_engines.registry import DEFAULT, RUNTIMES
from nbp_engines.shell import command_line
from nbp_engines.status import sentences
from nbp_errors import NbpError, printable
from nbp_export._commands import Commands, RuntimeName, plain_console, runtime_help

if TYPE_CHECKING:
    from nbp_engines.bundle import Bundle
    from nbp_export.trt_library import Options

SIZES = "nbp-xl, nbp-xxl, nbp-3b, nbp-tiny, each also as NAME-hybrid"


@click.group(cls=Commands)
@click.version_option(package_name="nbp-export")
def main() -> None:
    """Export a Next-Block-Prediction video generator from PyTorch to ONNX or TensorRT, checked against PyTorch."""


MODEL_OPTIONS = (
    click.option("--model", help=f"Name of a model size: {SIZES}.  [default: the bundled nbp-tiny]"),
    click.option(
        "--checkpoint",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The authors' .ckpt or our .safetensors: a path, or ORG/REPO[@REVISION][/FILE] on the Hugging Face Hub.",
    ),
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The authors' .pt or our .safetensors: a path, or a file on the Hub as for --checkpoint.",
    ),
    click.option("--ema", is_flag=True, help="Load the EMA copy of the weights that the checkpoint also holds."),
    click.option(
        "--weights", type=click.Choice(["random"]), help="Use random weights of the model's size, for timing."
    ),
    click.option(
        "--block", help="Block shape TxHxW in tokens, or the number of tokens.  [default: the model's own, else 1x1x16]"
    ),
    click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True),
    click.option(
        "--batch",
        type=click.IntRange(1, 2**20),
        default=1,
        show_default=True,
        help="Number of clips that are generated together.",
    ),
    click.option(
        "--timing-only",
        is_flag=True,
        help="Accept a checkpoint that was trained for another block; its output is not meaningful.",
    ),
    click.option(
        "--out", type=click.Path(path_type=Path), help="Folder of the bundle.  [default: ./NAME-BLOCK-DTYPE[-ARCH]]"
    ),
)


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every kind of export has: the model, the arithmetic and the output folder."""
    for option in reversed(MODEL_OPTIONS):
        command = option(command)
    return command


@main.command()
@_model_options
def onnx(**options: Any) -> None:
    """Export a bundle of ONNX graphs (opset 24), and check each graph against the PyTorch reference on this machine.

    The graphs are encode, prefill, step and decode. A checkpoint without a tokenizer gives only prefill and step;
    --tokenizer FILE adds the others.
    """
    _export(**options)


@main.command(epilog="\n\n".join(sentences(["tensorrt", "tensorrt-rtx-engines", "tensorrt-11-engines"])))
@_model_options
@click.option(
    "--builder",
    type=click.Choice(["auto", "tensorrt", "rtx"]),
    default="auto",
    show_default=True,
    help="tensorrt: TensorRT 11, which builds on the target GPU. rtx: TensorRT-RTX, which needs no GPU. "
    "auto: TensorRT 11 if it is installed and the machine has the target GPU, else TensorRT-RTX.",
)
@click.option(
    "--arch",
    help="GPU architecture: sm80 (A100), sm86, sm89 or sm120.  [default: sm80; with TensorRT 11, this machine's GPU]",
)
@click.option(
    "--hardware-compat",
    "compatibility",
    type=click.Choice(["none", "ampere+", "same-cc"]),
    default="none",
    show_default=True,
    help="Other GPUs that the engines of TensorRT 11 must also run on, which may make them slower.",
)
@click.option(
    "--attention",
    type=click.Choice(["fused", "decomposed"]),
    help="fused: one kernel, or the build fails. decomposed: TensorRT may use several kernels.  "
    "[default: fused; in fp32, for which there is no fused kernel, decomposed]",
)
@click.option(
    "--workspace", type=click.IntRange(1), metavar="MIB", help="GPU memory that a kernel may use as workspace."
)
@click.option(
    "--level",
    type=click.IntRange(0, 5),
    help="Optimisation level of TensorRT 11: a higher level searches longer for fast kernels.",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder in which TensorRT 11 keeps its timing caches between builds.  [default: ~/.cache/nbp-export]",
)
@click.option(
    "--check", is_flag=True, help="Only parse the graphs and list unsupported nodes; build and write nothing."
)
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
    """Export a bundle of ONNX graphs, and build TensorRT engines from them. TensorRT-RTX needs no GPU for this.

    Each graph is checked against the PyTorch reference on this machine; prefill and step are one graph. The networks
    that TensorRT parses from the graphs are checked for ignored inputs, copied caches and attention without a mask.
    """
    from nbp_export.trt_library import Options

    build_options = Options(
        builder=builder,
        arch=arch,
        compatibility=compatibility,
        decomposed=None if attention is None else attention == "decomposed",
        workspace=None if workspace is None else workspace * 2**20,
        level=level,
        timing_cache=timing_cache,
    )
    _export(engines=build_options, check=check, **options)


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

    need("export", "torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "rich")
    from nbp_export.inspect import layer_counts
    from nbp_export.onnx_bundle import export, parse_only, refuse_out
    from nbp_export.request import Request
    from nbp_export.sources import find

    # Fail before anything that takes time.
    try:
        gettempdir()  # torch's exporter needs a temporary folder
    except FileNotFoundError as error:
        raise NbpError(f"{error.strerror}: free space there, or set TMPDIR to another folder") from error
    if out and not check:
        refuse_out(out)
    library, resolved, reason = engines.resolve() if engines else (None, None, "")
    with _stages() as (say, report):
        report("load")
        source = find(Request(model, checkpoint, tokenizer, weights, block, timing_only, ema=ema))
        say(source.note)
        if library and resolved:
            version = library.load().__version__
            say(f"builder: {library.title} {version} for {resolved.arch} ({reason})")
        if engines and check:
            for file, layers in parse_only(source, engines, dtype, batch, report).items():
                say(f"{file}: every node is supported; {layers.total()} layers: {layer_counts(layers)}")
            say(
                "The graphs were only parsed. To build engines and compare the graphs with the reference, omit --check."
            )
            return
        name = f"{_folder_name(source.name)}-{source.generator.config.block}-{dtype}"
        folder = out or Path(f"{name}-{resolved.arch}" if resolved else name)
        if source.tokenizer is None:
            say("The checkpoint has no tokenizer, so encode and decode are not exported: --tokenizer FILE adds them.")
        bundle = export(source, folder, dtype, batch, report, engines=engines)
        say(_outcome(bundle))
        for line in (*_engine_lines(bundle), *_status_lines(bundle)):
            say(line)
    _echo_path(bundle.path)


@main.command(epilog="\n\n".join(sentences(row for runtime in RUNTIMES.values() for row in runtime.status)))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--runtime", type=RuntimeName(), default=DEFAULT.name, show_default=True, help=runtime_help())
def verify(bundle: Path, runtime: str) -> None:
    """Check a bundle: hashes, schema, lint rules, and agreement with the PyTorch reference on the bundle's weights.

    No checkpoint is needed. The command writes a new receipt, or removes the receipt of a bundle that fails.
    """
    from nbp_export._extras import need

    need("export", "torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "rich")
    from nbp_export import proof

    with _stages() as (say, report):
        verified = proof.verify(bundle, report, runtime)
        say(_outcome(verified))
        if not RUNTIMES[runtime].runs_engines:  # otherwise the engines have just been executed
            for line in (*_engine_lines(verified), *_status_lines(verified)):
                say(line)
    _echo_path(bundle)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--measure", "with_memory", is_flag=True, help="Also open the bundle in a new process and measure its memory."
)
@click.option("--json", "as_json", is_flag=True, help="Print the same values as JSON.")
def inspect(bundle: Path, with_memory: bool, as_json: bool) -> None:
    """Print the contents of a bundle, the memory that it needs, and its receipt. PyTorch is not needed."""
    from nbp_export._extras import need
    from nbp_export.inspect import describe, measure, open_unproven, render

    summary = describe(open_unproven(bundle))
    if with_memory:
        summary["memory"] |= measure(bundle)
    if as_json:
        click.echo(json.dumps(summary, indent=1))
        return
    need("export", "rich")

    console = plain_console()
    if not console.is_terminal:
        console.width = 120
    console.print(render(summary))


@contextmanager
def _stages() -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Yield two functions: one prints a line to standard error, the other shows the stage that begins."""
    from rich.text import Text

    console = plain_console(stderr=True)
    with console.status("", spinner="dots" if console.encoding.startswith("utf") else "line") as status:

        def report(stage: str) -> None:
            status.update(Text(stage))
            if not console.is_terminal:
                console.print(f"  {stage}")

        yield partial(console.print, soft_wrap=True), report


def _engine_lines(bundle: "Bundle") -> Iterator[str]:
    """Return lines that say what was checked about the TensorRT engines of a bundle, and what was not."""
    from nbp_export.trt import read_builds

    if not bundle.manifest.engines:
        return
    yield "TensorRT engines, built from the ONNX files that were checked:"
    for engine, build in zip(bundle.manifest.engines, read_builds(bundle), strict=True):
        profiles = ", ".join(f"{graph} of {n} tokens" for graph, n in zip(engine.graphs, build.tokens, strict=False))
        caches, attentions = (build.layers.get(name, 0) for name in ("KV_CACHE_UPDATE", "ATTENTION_INPUT"))
        checks = f"; {caches} caches updated in place, {attentions} attentions with a mask ({build.attention})"
        details = f"{profiles}{checks}, " if profiles else ""
        yield f"  {engine.file}: {details}no input ignored (checked in {build.seen_in})"
    command = command_line("nbp-export", "verify", bundle.path, "--runtime", bundle.manifest.runtime)
    yield f"The engines were not executed, because that needs a GPU: `{command}` verifies them on one."


def _status_lines(bundle: "Bundle") -> list[str]:
    """Return what was executed so far of this kind of bundle; empty if the default runtime executes it."""
    from nbp_export.inspect import status_of

    manifest = bundle.manifest
    if manifest.runtime == DEFAULT.name and manifest.spec.dtype in DEFAULT.dtypes:
        return []
    return status_of(manifest.runtime, manifest.spec.dtype, [engine.library for engine in manifest.engines])


def _folder_name(model: str) -> str:
    """Return a model's name as the start of a folder's name: short, without spaces and without a leading dash."""
    name = re.sub(r"[\\/\s]", "_", model).lstrip("-").encode()[:150].decode("utf-8", "ignore")
    return name or "model"


def _echo_path(path: Path) -> None:
    """Print a path on a line of its own: unchanged into a pipe, and with control characters escaped on a terminal."""
    click.echo(printable(path) if sys.stdout and sys.stdout.isatty() else os.fsencode(path))


def _outcome(bundle: "Bundle") -> str:
    receipt = bundle.receipt()
    assert receipt is not None  # this process has just written it
    worst = receipt["worst"]
    return (
        f"{len(receipt['checks'])} checks against the reference passed, {receipt['executed']}; "
        f"largest error: {worst['graph']} at {worst['at']}, {worst['worst']:.2g} of the largest value "
        f"(allowed {worst['tolerance']:g})"
    )
