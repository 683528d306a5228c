"""Loads the model that a command line requests: a checkpoint, a size with random weights, or the bundled nbp-tiny."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nbp_errors import UsageError, printable
from nbp_export.hub import fetch
from nbp_export.request import Request
from nbp_reference import checkpoint
from nbp_reference.config import MODELS, TOKENIZERS, ModelConfig
from nbp_reference.errors import CheckpointError
from nbp_reference.model import NextBlockTransformer, init_parameter
from nbp_reference.tokenizer import VideoTokenizer

TINY = ("nbp-tiny", "nbp-tiny-hybrid")  # the models whose weights are bundled


@dataclass(frozen=True)
class Source:
    """A model in evaluation mode.

    Attributes:
        name: the name of the model in tables and folder names.
        generator: the generator, whose config has the requested block.
        tokenizer: the tokenizer; None if no file contains one.
        trained: whether the weights were trained for this block.
        note: one line that describes the model.
        options: the command-line options that select the model; empty if it was created in Python.
    """

    name: str
    generator: NextBlockTransformer
    tokenizer: VideoTokenizer | None
    trained: bool
    note: str
    options: tuple[str, ...] = ()


def find(request: Request) -> Source:
    """Load the model of a request.

    Raises UsageError if options contradict each other or if there are no weights for the model, BlockShapeError for a
    block that does not tile the latent video, CheckpointError for a file that cannot be loaded.
    """
    return replace(_load(request), options=tuple(_options(request)))


def _options(request: Request) -> Iterator[str]:
    """Yield the options that select the model again. The bundle's manifest has its block, dtype and batch."""
    if not request.checkpoint:
        yield from ("--model", request.model or TINY[0])
    for option in ("checkpoint", "tokenizer", "weights"):
        if value := getattr(request, option):
            yield from (f"--{option}", f"./{value}" if str(value).startswith("-") else str(value))
    if request.ema:
        yield "--ema"
    if request.timing_only:
        yield "--timing-only"


def _load(request: Request) -> Source:
    if request.checkpoint:
        if request.model:
            raise UsageError("--checkpoint already selects the model: leave out --model")
        return _from_checkpoint(request, fetch(request.checkpoint))
    if request.ema:
        raise UsageError("--ema needs a --checkpoint, because a named model has no EMA copy: leave out --ema")
    if request.tokenizer:
        raise UsageError("--tokenizer needs a --checkpoint, because a named model has its own: leave out --tokenizer")
    name = request.model or TINY[0]
    if name not in MODELS:
        raise UsageError(f"--model {name!r} does not exist: choose one of {', '.join(MODELS)}")
    if request.weights == "random":
        return _random(name, MODELS[name].with_block(request.block or str(MODELS[name].block)))
    if name not in TINY:
        raise UsageError(f"{name} has no bundled weights: give --checkpoint FILE, or --weights random for timing")
    return _bundled(name, request)


def _from_checkpoint(request: Request, path: Path) -> Source:
    loaded = checkpoint.load(path, ema=request.ema and request.weights != "random")
    if loaded.generator is None:
        raise UsageError(
            f"{path} holds only a tokenizer: give the generator as --checkpoint, and this file as --tokenizer"
        )
    tokenizer = loaded.tokenizer
    if request.tokenizer:
        file = fetch(request.tokenizer)
        second = checkpoint.load(file)
        if request.ema and second.ema_copies:
            second = checkpoint.load(file, ema=True)
        tokenizer = second.tokenizer
        if tokenizer is None:
            raise UsageError(f"{request.tokenizer} holds no tokenizer: give a file with one as --tokenizer")
    if tokenizer and tokenizer.config.vocab != loaded.generator.config.codes:
        codes, ids = tokenizer.config.vocab, loaded.generator.config.codes
        raise UsageError(
            f"the tokenizer has {codes} codes but the generator has {ids} video ids: give the matching --tokenizer"
        )
    name, title = printable(path.stem), printable(path.name)
    generator, trained_for = loaded.generator, loaded.generator.config.block
    config = generator.config.with_block(request.block or str(trained_for))
    if request.weights == "random":
        note = f"random weights of {title}'s size, block {config.block}: for timing only"
        return Source(name, random_generator(config), tokenizer, False, note)
    fits = config.block == trained_for if loaded.exact_block else config.block.size == trained_for.size
    if generator.config.text and config.block.size != trained_for.size:
        raise UsageError(
            f"{path} is class-conditional: its vocabulary has {trained_for.size} special tokens that begin a video, "
            f"one per token of a block, so the block size is fixed. Use --block {trained_for}"
        )
    if not fits and not request.timing_only:
        raise UsageError(
            f"{path} was trained for block {trained_for}, not {config.block}: its output would be meaningless. "
            f"Use --block {trained_for}, or --timing-only to measure speed"
        )
    generator.config = config
    note = f"{title}, block {config.block}" + ("" if fits else f" (trained for {trained_for}: timing only)")
    if copies := ", ".join(map(printable, loaded.ema_copies)):
        note += (
            f", the EMA copy of its weights ({copies})"
            if request.ema
            else (f"; it also holds an EMA copy of its weights ({copies}), which --ema selects")
        )
    return Source(name, generator, tokenizer, fits, note)


def random_generator(config: ModelConfig) -> NextBlockTransformer:
    """Return a generator with random weights. Each parameter has its own seed, so that all cores can draw at once."""
    with torch.device("meta"):
        generator = NextBlockTransformer(config)
    names, parameters = zip(*generator.to_empty(device="cpu").named_parameters(), strict=True)
    seeded = (torch.Generator().manual_seed(i) for i in range(len(names)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(init_parameter, names, parameters, seeded))
    return generator.eval()


def _random(name: str, config: ModelConfig) -> Source:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = VideoTokenizer(TOKENIZERS["nbp-tiny" if name in TINY else "official"])
    return Source(name, random_generator(config), tokenizer.eval(), False, _random_note(name, config))


def _random_note(name: str, config: ModelConfig) -> str:
    return f"{name} with random weights, block {config.block}: for timing only, quality is not measured"


def with_block(source: Source, block: str | None) -> Source:
    """Return a named model with the same random weights for another block; None selects the model's default block.

    The new source shares the generator of the given one, which must not be used afterwards.

    Raises BlockShapeError for a block that does not tile the latent video.
    """
    config = source.generator.config.with_block(block or str(MODELS[source.name].block))
    source.generator.config = config
    return replace(source, note=_random_note(source.name, config))


def _bundled(name: str, request: Request) -> Source:
    config = MODELS[name].with_block(request.block or str(MODELS[name].block))
    try:
        generator, tokenizer = checkpoint.bundled(config.block, hybrid=config.text is not None)
    except CheckpointError:
        if request.or_random:
            return _random(name, config)
        raise
    reason = "" if request.model else " (the default, without --model and --checkpoint)"
    return Source(name, generator, tokenizer, True, f"bundled {name} for block {config.block}{reason}")
