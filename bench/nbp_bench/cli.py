"""The `nbp-bench` command: parse, call, print."""

from pathlib import Path

import click


@click.group(invoke_without_command=True)
@click.version_option(package_name="nbp-export")
@click.option("--sizes", help="Block sizes, such as 1,16,256: each fills rows, then whole rows, then frames.")
@click.option("--model", help="A named size: nbp-xl, nbp-xxl, nbp-3b, nbp-tiny.  [default: the bundled nbp-tiny]")
@click.option("--checkpoint", "checkpoints", multiple=True, metavar="SIZE=FILE", help="Weights for a size; repeats.")
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
    if not sizes:
        raise click.UsageError("what to compare? nbp-bench --sizes 1,16,256")
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
    unused = set(files) - set(sizes.split(","))
    if unused:
        raise click.UsageError(f"--checkpoint for {', '.join(sorted(unused))}, which --sizes {sizes} does not name")
    stand_in = next(iter(files.values()), None)  # a size without a checkpoint is timed with random weights of its kind
    requests = [
        Request(None, files[size], tokenizer, None, size, timing_only)
        if size in files
        else Request(model, stand_in, tokenizer, "random" if stand_in else weights, size)
        for size in sizes.split(",")
    ]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    check_golden(console)
    run(console, Plan(requests, chosen, video, clips, batch, threads, seed, out))


def _pair(text: str) -> tuple[str, Path]:
    size, _, file = text.partition("=")
    if not file:
        raise click.UsageError(f"--checkpoint {text!r}: expected SIZE=FILE, such as 16=model.ckpt")
    return size, Path(file)
