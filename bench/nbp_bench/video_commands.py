"""The subcommands of `nbp-bench` that write or compare videos: parse, call, print."""

import json
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import numpy as np

from nbp_engines.sampling import LEAST_TEMPERATURE
from nbp_errors import UsageError
from nbp_export._commands import MOST_THREADS, RuntimeName, plain_console, runtime_help
from nbp_export._extras import need

GREEDY_HELP = f"Values below {LEAST_TEMPERATURE:g} mean greedy sampling."


def _number(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:  # noqa: ARG001
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


def _rate(context: click.Context, parameter: click.Parameter, value: str | None) -> Fraction | None:  # noqa: ARG001
    try:
        rate = None if value is None else Fraction(value).limit_denominator(1001)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate is not None and not 0 < rate <= 1000:
        raise click.BadParameter(f"{value!r} is not a frame rate up to 1000 per second, such as 25 or 30000/1001.")
    return rate


@click.command(short_help="Write a video of a generated clip.")
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="A bundle that nbp-export wrote.")
@click.option("--video", type=click.Path(path_type=Path), help="Take the given frames from this video.")
@click.option(
    "--start",
    type=click.FloatRange(0, 1e6),
    callback=_number,
    default=0.0,
    help="Time of the first given frame, in seconds.",
)
@click.option("--class", "class_name", help="Generate a clip of this class, such as ApplyEyeMakeup.")
@click.option("--text-ids", metavar="ID,ID...", help="Text ids of the class, instead of its name.")
@click.option(
    "--text-tokenizer", type=click.Path(path_type=Path), help="The file tokenizer.model or tokenizer.json of LLaMA."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The .mp4 or .gif to write, or a .png that shows all frames.",
)
@click.option("--force", is_flag=True, help="Replace an existing --out file.")
@click.option(
    "--rate", callback=_rate, metavar="FPS", help="Frames per second.  [default: the rate of the video; 25 for a class]"
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "--grid",
    type=click.IntRange(1, 400),
    help="Show this many clips, which differ in their noise, beside the filmed frames.",
)
@click.option(
    "--scale", type=click.IntRange(1, 64), help="Enlarge each pixel by this factor.  [default: enough for 256 rows]"
)
@click.option(
    "--temperature", type=click.FloatRange(0), callback=_number, help=f"{GREEDY_HELP}  [default: the bundle's]"
)
@click.option("--top-k", type=click.IntRange(1), help="[default: the bundle's]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), callback=_number, help="[default: the bundle's]")
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="Threads per operator.  [default: the runtime's own]"
)
@click.option(
    "--runtime", type=RuntimeName(), help=f"{runtime_help()}.  [default: the one the bundle was exported for]"
)
def generate(temperature: float | None, top_k: int | None, top_p: float | None, **request: Any) -> None:
    """Continue your video with a bundle, or generate a clip of a class, and write the result as a video.

    Given frames get a blue border, predicted frames an orange one. A video may have any size and rate: the command cuts
    out the middle square, scales it, and prints any scaling, cropping and resampling.
    """
    need("bench", "av", "PIL", "rich")
    from nbp_bench.generate import ClipRequest
    from nbp_bench.generate import generate as write_clip

    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = {name: value for name, value in options.items() if value is not None}
    console = plain_console(stderr=True)
    click.echo(write_clip(console, ClipRequest(sampling=sampling, **request)))


@click.command(short_help="Compute the Fréchet video distance.")
@click.option("--real", type=click.Path(path_type=Path), required=True, help="Folder or list of the real clips.")
@click.option("--fake", type=click.Path(path_type=Path), required=True, help="Folder or list of the generated clips.")
@click.option("--i3d", "network", type=click.Path(path_type=Path), help="A network as ONNX.  [default: I3D in PyTorch]")
@click.option("--sha256", help="The hash of the --i3d file.")
@click.option("--skip-bad", is_flag=True, help="Leave out clips that cannot be read, and count them.")
@click.option("--json", "as_json", is_flag=True, help="Print the result and its protocol as JSON.")
def fvd(real: Path, fake: Path, network: Path | None, sha256: str | None, skip_bad: bool, as_json: bool) -> None:
    """Compute the Fréchet video distance between two sets of clips, from any generator.

    Clips are video files or arrays (.npy, uint8 [T,H,W,3]), in a folder or in a list, a text file with a path per line.
    The first 16 frames of each clip are scored; a clip with 9 to 15 frames is scored whole.
    """
    from nbp_bench import fvd as module

    need("bench", "scipy")
    if network:
        need("cpu", "onnxruntime")
    if (network is None) != (sha256 is None):
        raise UsageError("--i3d and --sha256 belong together: give both, or neither")
    sets = {"real": module.clip_files(real), "fake": module.clip_files(fake)}
    if network and sha256:
        compute, protocol = module.onnx_network(network, sha256)
    else:
        compute, protocol = module.default_network(), module.default_protocol()
    skipped: list[str] | None = [] if skip_bad else None
    values = {}
    for name, files in sets.items():
        with click.progressbar(files, label=f"{name} clips", file=sys.stderr) as bar:
            rows = list(module.features(bar, protocol, compute, skipped))
        values[name] = np.array(rows).reshape(len(rows), -1) if rows else np.empty((0, 1))
    result = module.distance(values["real"], values["fake"], protocol, skipped or ())
    click.echo(json.dumps(result.to_json(), indent=1) if as_json else module.describe(result))


@click.command(short_help="Write I3D as an ONNX file.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("i3d.onnx"), show_default=True)
def i3d(out: Path) -> None:
    """Write I3D as an ONNX file, with which `nbp-bench fvd` needs no torch, and print the file's hash."""
    need("bench", "torch", "onnx")
    from nbp_bench.i3d import write_onnx

    click.echo(write_onnx(out))
