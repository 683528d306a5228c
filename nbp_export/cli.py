"""The `nbp-export` command: parse, call, print."""

from pathlib import Path

import click


@click.group()
@click.version_option(package_name="nbp-export")
def main() -> None:
    """Take a Next-Block-Prediction video generator from PyTorch to engines, each proven against the reference."""


@main.command()
@click.option("--model", help="A named size: nbp-xl, nbp-xxl, nbp-3b, nbp-tiny.  [default: the bundled nbp-tiny]")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The authors' .ckpt, or our .safetensors.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="The authors' tokenizer .pt, or our .safetensors.")
@click.option("--weights", type=click.Choice(["random"]), help="Random weights of the named model: for timing.")
@click.option("--block", help="Block shape TxHxW in latent units, or a size.  [default: the model's own, else 1x1x16]")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), default="fp16", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Clips generated at once.")
@click.option("--timing-only", is_flag=True, help="Accept a checkpoint that was trained for another block.")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle's folder.  [default: ./NAME-BLOCK-DTYPE]")
def onnx(
    model: str | None,
    checkpoint: Path | None,
    tokenizer: Path | None,
    weights: str | None,
    block: str | None,
    dtype: str,
    batch: int,
    timing_only: bool,
    out: Path | None,
) -> None:
    """Export encode, prefill, step and decode as ONNX, opset 24, checked against the reference on this machine.

    A checkpoint without a tokenizer gives prefill and step alone; --tokenizer FILE adds the rest.
    """
    from nbp_export._extras import need

    need("export", "torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "rich")
    from rich.console import Console

    from nbp_export.onnx_bundle import export
    from nbp_export.sources import Request, find

    console = Console(stderr=True, highlight=False)
    with console.status("load") as status:
        source = find(Request(model, checkpoint, tokenizer, weights, block, timing_only))
        console.print(source.note)
        folder = out or Path(f"{source.name}-{source.generator.config.block}-{dtype}")

        def report(stage: str) -> None:
            status.update(stage)
            if not console.is_terminal:
                console.print(f"  {stage}")

        bundle = export(source, folder, dtype, batch, report)
    receipt = bundle.receipt()
    assert receipt is not None  # it was written a moment ago, by the same process
    worst = receipt["worst"]
    if source.tokenizer is None:
        console.print("no tokenizer in the checkpoint: generator graphs alone; --tokenizer FILE adds encode and decode")
    console.print(
        f"{len(receipt['checks'])} checks against the reference passed; worst: {worst['graph']} at {worst['at']}, "
        f"{worst['worst']:.2g} of the largest value (allowed {worst['tolerance']:g})"
    )
    click.echo(bundle.path)
