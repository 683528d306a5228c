"""The model that a command line requests. The module `sources` loads it, and imports torch."""

from pathlib import Path
from typing import NamedTuple


class Request(NamedTuple):
    """The options of a command line that choose a model; None for an option that was not given.

    Attributes:
        model: the name of a size.
        checkpoint, tokenizer: local files, or files on the Hugging Face Hub.
        weights: `random` for random weights of the named size or of the checkpoint's size.
        block: block shape, or its number of tokens; None selects the model's default.
        timing_only: accept a checkpoint that was trained for another block.
        or_random: use random weights if no bundled weights exist for the block.
        ema: load the checkpoint's EMA copy of the weights in place of the weights.
    """

    model: str | None = None
    checkpoint: Path | None = None
    tokenizer: Path | None = None
    weights: str | None = None
    block: str | None = None
    timing_only: bool = False
    or_random: bool = False
    ema: bool = False
