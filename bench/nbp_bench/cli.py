"""The `nbp-bench` command: parse, call, print."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from nbp_export._commands import Commands, RuntimeName, runtime_help
from nbp_export.cli import SIZES


@click.group(cls=Commands, invoke_without_command=True)
@click.version_option(package_name="nbp-export")
@click.option("--sizes", help="Block sizes, such as 1,16,256: each fills rows, then whole rows, then frames.")
@click.option("--blocks", help="Block shapes TxHxW, such as 1x1x16,1x4x4, beside or in place of --sizes.")
@click.option("--model", help=f"A named size: {SIZES}.  [default: the bundled nbp-tiny]")
@click.option("--checkpoint", "checkpoints", multiple=True, metavar="BLOCK=FILE", help="Weights for a size or shape.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Tokenizer for checkpoints without one.")
@click.option("--weights", type=click.Choice(["random"]), help="Random weights of the named model: for timing.")
@click.option("--timing-only", is_flag=True, help="Accept checkpoints that were trained for another block.")
@click.option("--engines", default="naive,reference,onnx", show_default=True, help="Which engines, in table order.")
@click.option("--video", type=click.Path(path_type=Path), help="Predict from this video.  [default: a bundled clip]")
@click.option("--clips", type=click.IntRange(1), default=7, show_default=True, help="Measured clips an engine.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Clips generated at once.")
@click.option("--threads", type=click.IntRange(1), help="Threads inside an operator.  [default: each runtime's own]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sampling noise.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("nbp-bench-results"), show_default=True)
@click.pass_context
def main(
    context: click.Context,
    sizes: str | None,
    blocks: str | None,
    model: str | None,
    checkpoints: tuple[str, ...],
    tokenizer: Path | None,
    weights: str | None,
    timing_only: bool,
    engines: str,
    video: Path | None,
    clips: int,
    batch: int,
    threads: int | None,
    seed: int,
    out: Path,
) -> None:
    """Compare block sizes and engines: frames a second, stages, memory and parity on a real clip.

    With --sizes 1,16,256 and nothing else: the bundled nbp-tiny models on a clip from an installed package.
    """
    if context.invoked_subcommand:
        return
    asked = [block for option in (sizes, blocks) if option for block in option.split(",")]
    if not asked:
        raise click.UsageError("what to compare? nbp-bench --sizes 1,16,256, or --blocks 1x1x16,1x4x4")
    from nbp_export._extras import need

    need("export", "torch", "onnx", "onnxscript", "onnxruntime", "safetensors")
    need("bench", "av", "jinja2", "matplotlib", "rich")
    from rich.console import Console

    from nbp_bench.run import check_golden, run
    from nbp_bench.sweep import Plan
    from nbp_bench.worker import ENGINES
    from nbp_export.sources import Request

    chosen = [e for e in engines.split(",") if e]
    unknown = set(chosen) - set(ENGINES)
    if unknown or not chosen:
        raise click.UsageError(f"no engine {', '.join(sorted(unknown))!r}: there are {', '.join(ENGINES)}")
    files = dict(_pair(text) for text in checkpoints)
    unused = set(files) - set(asked)
    if unused:
        raise click.UsageError(f"--checkpoint for {', '.join(sorted(unused))}, not among the blocks {', '.join(asked)}")
    stand_in = next(iter(files.values()), None)  # a block without a checkpoint is timed with random weights of its kind
    requests = [
        Request(None, files[block], tokenizer, None, block, timing_only)
        if block in files
        else Request(model, stand_in, tokenizer, "random" if stand_in else weights, block, or_random=True)
        for block in asked
    ]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    check_golden(console)
    run(console, Plan(requests, chosen, video, clips, batch, threads, seed, out))


def _number(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:  # noqa: ARG001
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number to work with.")
    return value


def _rate(context: click.Context, parameter: click.Parameter, value: str | None) -> Fraction | None:  # noqa: ARG001
    try:
        rate = None if value is None else Fraction(value).limit_denominator(1001)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate is not None and not 0 < rate <= 1000:
        raise click.BadParameter(f"{value!r} is no number of frames a second, such as 25 or 30000/1001.")
    return rate


@main.command()
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="What nbp-export made.")
@click.option("--video", type=click.Path(path_type=Path), help="Predict from this video.")
@click.option("--start", type=click.FloatRange(0, 1e6), callback=_number, default=0.0, help="Seconds into the video.")
@click.option("--class", "class_name", help="Make a clip of this class, such as ApplyEyeMakeup.")
@click.option("--text-ids", metavar="ID,ID…", help="The class as text ids, in place of its name.")
@click.option("--text-tokenizer", type=click.Path(path_type=Path), help="LLaMA's tokenizer.model or tokenizer.json.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A .mp4, .gif, or .png of all frames.")
@click.option("--force", is_flag=True, help="Replace the --out file if it is there.")
@click.option("--rate", callback=_rate, metavar="FPS", help="Frames a second.  [default: the video's; 25 of a class]")
@click.option("--seed", type=click.IntRange(0, 2**32), default=0, show_default=True, help="Of the sampling noise.")
@click.option("--grid", type=click.IntRange(1, 400), help="Clips of as many seeds in one picture, beside the truth.")
@click.option("--scale", type=click.IntRange(1, 64), help="Enlarge pixels.  [default: to at least 256 rows]")
@click.option("--temperature", type=click.FloatRange(0), callback=_number, help="0 is greedy.  [default: the bundle's]")
@click.option("--top-k", type=click.IntRange(1), help="[default: the bundle's]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), callback=_number, help="[default: the bundle's]")
@click.option("--threads", type=click.IntRange(1), help="Threads inside an operator.  [default: the runtime's own]")
@click.option("--runtime", type=RuntimeName(), help=f"{runtime_help()}.  [default: what the bundle was made for]")
def generate(temperature: float | None, top_k: int | None, top_p: float | None, **order: Any) -> None:
    """Write a video of what a bundle predicts from yours, or makes of a class; the given frames framed in blue.

    A video of any size and rate will do: it is scaled, its middle square taken, and what was done is told.
    """
    from nbp_export._extras import need

    need("bench", "av", "rich")
    from rich.console import Console

    from nbp_bench.generate import Order
    from nbp_bench.generate import generate as make

    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = {name: value for name, value in drawn.items() if value is not None}
    console = Console(stderr=True, highlight=False, markup=False)
    click.echo(make(console, Order(sampling=sampling, **order)))


def _pair(text: str) -> tuple[str, Path]:
    size, _, file = text.partition("=")
    if not file:
        raise click.UsageError(f"--checkpoint {text!r}: expected BLOCK=FILE, such as 16=model.ckpt")
    return size, Path(file)
