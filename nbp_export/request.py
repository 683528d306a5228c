"""What a command line asks for, apart from `sources`, which finds it and imports torch."""

from pathlib import Path
from typing import NamedTuple


class Request(NamedTuple):
    """What was asked for on the command line; None where nothing was.

    Attributes:
        model: a named size.
        checkpoint, tokenizer: files, here or on the Hub.
        weights: `random`: of the named size, or of the checkpoint's.
        block: shape or size; the model's own if None.
        timing_only: take a checkpoint that was trained for another block.
        or_random: where no bundled weights are for the block, random ones.
        ema: take the EMA copy of the weights that the checkpoint holds beside them.
    """

    model: str | None = None
    checkpoint: Path | None = None
    tokenizer: Path | None = None
    weights: str | None = None
    block: str | None = None
    timing_only: bool = False
    or_random: bool = False
    ema: bool = False
