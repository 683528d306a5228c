"""The `nbp-bench` command: parse, call, print."""

import math
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbp_bench.engines import DEFAULT_DTYPE, DEFAULT_ENGINES, DEFAULT_STEPS
from nbp_bench.engines import engines as table_of_engines
from nbp_engines.sampling import LEAST_TEMPERATURE
from nbp_engines.spec import BYTES
from nbp_errors import UsageError
from nbp_export._commands import Commands, RuntimeName, runtime_help
from nbp_export.cli import SIZES

MOST_CLIPS = 1024  # in a batch; more would be a slip
MOST_THREADS = 1024

if TYPE_CHECKING:
    from nbp_bench.plan import Plan, Subject


GREEDY_HELP = f"Greedy if 0, or below {LEAST_TEMPERATURE:g}."


class BenchCommands(Commands):
    """The group, whose help lists the engines that there are when it is printed."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The table of engines."""
        with formatter.section("Engines"):
            formatter.write_dl([(engine.name, engine.title) for engine in table_of_engines().values()])


@click.group(cls=BenchCommands, invoke_without_command=True)
@click.version_option(package_name="nbp-export")
@click.option("--sizes", help="Block sizes, such as 1,16,256: each fills rows, then whole rows, then frames.")
@click.option("--blocks", help="Block shapes TxHxW, such as 1x1x16,1x4x4, beside or in place of --sizes.")
@click.option("--model", help=f"A named size: {SIZES}.  [default: the bundled nbp-tiny]")
@click.option("--checkpoint", multiple=True, metavar="BLOCK=FILE", help="Weights for a size or shape.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Tokenizer for checkpoints without one.")
@click.option("--weights", type=click.Choice(["random"]), help="Random weights of the named model: for timing.")
@click.option("--timing-only", is_flag=True, help="Accept checkpoints that were trained for another block.")
@click.option("--bundle", "bundles", multiple=True, type=click.Path(path_type=Path), help="A bundle as it is.")
@click.option("--engines", metavar="NAME,NAME…", help="See below; in the order of the tables.")
@click.option("--dtype", "dtypes", help="Of fp32, fp16, bf16.  [default: fp32 on a CPU, bf16 on cuda]")
@click.option("--batch", "batches", help="Clips generated at once, such as 1,4.  [default: 1]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: where each engine runs; cpu if it can]")
@click.option("--video", type=click.Path(path_type=Path), help="Predict from this video.  [default: a bundled clip]")
@click.option("--clips", type=click.IntRange(1, 10**6), default=7, show_default=True, help="Measured clips per row.")
@click.option(
    "--steps", type=click.IntRange(0), help="Single steps timed back to back.  [default: 200 on cuda, else 0]"
)
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="Inside an operator.  [default: each runtime's own]"
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the sampling noise.")
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="End by then; what is named first comes first."
)
@click.option("--profile", is_flag=True, help="Then list the kernels of a step and of decode, in profile.txt.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("nbp-bench-results"), show_default=True)
@click.option("--bundles", "kept", type=click.Path(path_type=Path), help="Keep exports here.  [default: OUT/bundles]")
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Compare block sizes and engines: frames per second, stages, memory and parity on a real clip.

    With --sizes 1,16,256 and nothing else: the bundled nbp-tiny models on a clip from an installed package. Every
    model, or every --bundle, is measured with every engine, dtype and batch. What cannot be measured is a row with the
    reason.
    """
    if context.invoked_subcommand:
        _refuse_options_before(context)
        return
    from nbp_export._extras import need

    plan = _plan(**options)
    need("bench", "torch")
    if plan.video:
        need("bench", "av")
    from nbp_bench.run import check_golden, check_out, run

    check_out(plan.out)
    check_golden()
    run(plan)


def _refuse_options_before(context: click.Context) -> None:
    """Raise UsageError for options that stand before a subcommand, where they would have no effect."""
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name)) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        name = context.invoked_subcommand
        raise UsageError(f"{', '.join(given)} before {name} would have no effect: write its options behind {name}")


def _plan(
    engines: str | None,
    dtypes: str | None,
    batches: str | None,
    device: str | None,
    steps: int | None,
    kept: Path | None,
    bundles: tuple[Path, ...],
    video: Path | None,
    clips: int,
    threads: int | None,
    seed: int,
    minutes: float | None,
    profile: bool,
    out: Path,
    **model: Any,
) -> "Plan":
    """The plan of a command line. Raises UsageError for options that contradict each other."""
    from nbp_bench.plan import Plan

    where = device or "cpu"
    if bundles and (dtypes or batches):
        raise UsageError("a bundle has its own dtype and batch: leave out --dtype and --batch")
    known = table_of_engines()
    chosen = _listed("--engines", engines or DEFAULT_ENGINES[where], known)
    return Plan(
        subjects=_bundles(bundles, model) if bundles else _models(**model),
        engines=[known[name] for name in chosen],
        dtypes=_listed("--dtype", dtypes or DEFAULT_DTYPE[where], [name for name in BYTES if name != "int64"]),
        batches=[_batch(text) for text in _items("--batch", batches or "1")],
        device=device,
        video=video,
        clips=clips,
        steps=DEFAULT_STEPS[where] if steps is None else steps,
        threads=threads,
        seed=seed,
        minutes=minutes,
        profile=profile,
        out=out,
        bundles=kept,
    )


def _listed(option: str, text: str, known: Collection[str]) -> list[str]:
    """The names in a list with commas. Raises UsageError, with the names that there are, for another."""
    names = _items(option, text)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{option} has no {', '.join(unknown)}: there are {', '.join(known)}")
    return names


def _items(option: str, text: str) -> list[str]:
    """The items of a list with commas: spaces around them do not count, and a repeated item counts once.

    Raises UsageError for an empty item.
    """
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UsageError(f"{option} {text!r} has an empty item: write the items with one comma between them")
    return list(dict.fromkeys(items))


def _batch(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= MOST_CLIPS:
        raise UsageError(f"--batch {text!r} is not a number of clips from 1 to {MOST_CLIPS}, such as 4")
    return int(text)


def _bundles(folders: Sequence[Path], model: dict[str, Any]) -> "list[Subject]":
    """The bundles as they are. Raises UsageError for an option that would say again what they are."""
    from nbp_bench.plan import Subject
    from nbp_export.inspect import open_unproven

    if given := [f"--{name.replace('_', '-')}" for name, value in model.items() if value]:
        raise UsageError(f"a bundle says what its model is: leave out {', '.join(given)}")
    return [Subject(bundle=folder, spec=open_unproven(folder).manifest.spec) for folder in folders]


def _models(
    sizes: str | None,
    blocks: str | None,
    model: str | None,
    checkpoint: tuple[str, ...],
    tokenizer: Path | None,
    weights: str | None,
    timing_only: bool,
) -> "list[Subject]":
    """A model for each block. Raises UsageError if there is no block, or a checkpoint for none of them."""
    from nbp_bench.plan import Subject
    from nbp_export.request import Request

    lists = {"--sizes": sizes, "--blocks": blocks}
    items = [item for option, text in lists.items() if text is not None for item in _items(option, text)]
    asked = list(dict.fromkeys(map(_shape, items)))  # 16 and 1x1x16 are one block
    if not asked:
        raise UsageError("nothing to compare: give --sizes 1,16,256, --blocks 1x1x16,1x4x4 or --bundle DIR")
    files: dict[str, Path] = {}
    for block, file in map(_pair, checkpoint):
        if block in files:
            raise UsageError(f"two checkpoints for block {block}, {files[block]} and {file}: give one per block")
        files[block] = file
    if files and (model or weights):
        raise UsageError("a checkpoint says what the model is: leave out --model and --weights")
    if unused := set(files) - set(asked):
        raise UsageError(f"--checkpoint for {', '.join(sorted(unused))}, not among the blocks {', '.join(asked)}")
    stand_in = next(iter(files.values()), None)  # a block without a checkpoint is timed with random weights of its kind
    requests = [
        Request(None, files[block], tokenizer, None, block, timing_only)
        if block in files
        else Request(model, stand_in, tokenizer, "random" if stand_in else weights, block, or_random=True)
        for block in asked
    ]
    return [Subject(request) for request in requests]


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
@click.option(
    "--temperature", type=click.FloatRange(0), callback=_number, help=f"{GREEDY_HELP}  [default: the bundle's]"
)
@click.option("--top-k", type=click.IntRange(1), help="[default: the bundle's]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), callback=_number, help="[default: the bundle's]")
@click.option("--threads", type=click.IntRange(1), help="Threads inside an operator.  [default: the runtime's own]")
@click.option("--runtime", type=RuntimeName(), help=f"{runtime_help()}.  [default: what the bundle was made for]")
def generate(temperature: float | None, top_k: int | None, top_p: float | None, **order: Any) -> None:
    """Write a video of what a bundle predicts from yours, or makes of a class; the given frames framed in blue.

    A video of any size and rate will do: it is scaled, its middle square taken, and what was done is told.
    """
    from nbp_export._extras import need

    need("bench", "av", "PIL", "rich")
    from rich.console import Console

    from nbp_bench.generate import Order
    from nbp_bench.generate import generate as make

    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = {name: value for name, value in drawn.items() if value is not None}
    console = Console(stderr=True, highlight=False, markup=False)
    click.echo(make(console, Order(sampling=sampling, **order)))


def _shape(text: str) -> str:
    """A block's shape, `1x1x16` also for 16, where it is one; what cannot be read is refused with the model at hand."""
    from nbp_reference.config import BlockShape, Latent, ModelConfig
    from nbp_reference.errors import BlockShapeError

    latent: Latent = ModelConfig(1, 1, 1).latent  # of every published model
    try:
        return str(BlockShape.parse(text, latent))
    except BlockShapeError:
        return text


def _pair(text: str) -> tuple[str, Path]:
    """Block and file of a --checkpoint. Raises UsageError if one is missing."""
    size, _, file = text.partition("=")
    if not file or not size:
        raise UsageError(f"--checkpoint {text!r}: expected BLOCK=FILE, such as 16=model.ckpt")
    return _shape(size.strip()), Path(file)
