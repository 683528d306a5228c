"""Finds the model that a command line asks for: a checkpoint, a size with random weights, or the bundled nbp-tiny."""

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

TINY = ("nbp-tiny", "nbp-tiny-hybrid")  # the models that come with their weights


@dataclass(frozen=True)
class Source:
    """A model in evaluation mode.

    Attributes:
        name: for tables and folder names.
        generator: its config's block is the one asked for.
        tokenizer: None where no file brought one.
        trained: whether its output means anything.
        note: one line that says what this is.
        options: the options of the command line that name it, for whoever wants to make it again; none if it was made
            in Python.
    """

    name: str
    generator: NextBlockTransformer
    tokenizer: VideoTokenizer | None
    trained: bool
    note: str
    options: tuple[str, ...] = ()


def find(request: Request) -> Source:
    """The model of a request.

    Raises UsageError for requests that contradict themselves or ask for weights that nobody has, BlockShapeError
    for a block that does not tile, CheckpointError for a file that cannot be loaded.
    """
    return replace(_found(request), options=tuple(_options(request)))


def _options(request: Request) -> Iterator[str]:
    """The options that name a model again; block, dtype and batch are the bundle's."""
    if not request.checkpoint:
        yield from ("--model", request.model or TINY[0])
    for option in ("checkpoint", "tokenizer", "weights"):
        if value := getattr(request, option):
            yield from (f"--{option}", f"./{value}" if str(value).startswith("-") else str(value))
    if request.ema:
        yield "--ema"
    if request.timing_only:
        yield "--timing-only"


def _found(request: Request) -> Source:
    if request.checkpoint:
        if request.model:
            raise UsageError("--checkpoint says what the model is: leave out --model")
        return _from_checkpoint(request, fetch(request.checkpoint))
    if request.ema:
        raise UsageError("--ema takes the EMA copy that a --checkpoint holds; a named model has none: leave it out")
    if request.tokenizer:
        raise UsageError("--tokenizer completes a --checkpoint; a named model brings its own: leave it out")
    name = request.model or TINY[0]
    if name not in MODELS:
        raise UsageError(f"no model {name!r}: there are {', '.join(MODELS)}")
    if request.weights == "random":
        return _random(name, MODELS[name].with_block(request.block or str(MODELS[name].block)))
    if name not in TINY:
        raise UsageError(f"{name} has no bundled weights: give --checkpoint FILE, or --weights random to time it")
    return _bundled(name, request)


def _from_checkpoint(request: Request, path: Path) -> Source:
    loaded = checkpoint.load(path, ema=request.ema and request.weights != "random")
    if loaded.generator is None:
        raise UsageError(f"{path} holds only a tokenizer: give the generator as --checkpoint, this one as --tokenizer")
    tokenizer = loaded.tokenizer
    if request.tokenizer:
        file = fetch(request.tokenizer)
        brought = checkpoint.load(file)
        if request.ema and brought.ema_copies:
            brought = checkpoint.load(file, ema=True)
        tokenizer = brought.tokenizer
        if tokenizer is None:
            raise UsageError(f"{request.tokenizer} holds no tokenizer")
    if tokenizer and tokenizer.config.vocab != loaded.generator.config.codes:
        codes, ids = tokenizer.config.vocab, loaded.generator.config.codes
        raise UsageError(f"the tokenizer has {codes} codes, the generator {ids} for video: they do not belong together")
    name, title = printable(path.stem), printable(path.name)
    generator, trained_for = loaded.generator, loaded.generator.config.block
    config = generator.config.with_block(request.block or str(trained_for))
    if request.weights == "random":
        note = f"no checkpoint for block {config.block}: random weights of {title}'s size, speed means something"
        return Source(name, random_generator(config), tokenizer, False, note)
    fits = config.block == trained_for if loaded.exact_block else config.block.size == trained_for.size
    if generator.config.text and config.block.size != trained_for.size:
        raise UsageError(
            f"{path} is class-conditional: {trained_for.size} of its token ids begin a video and fill its first block, "
            f"which fixes the block size. Use --block {trained_for}"
        )
    if not fits and not request.timing_only:
        raise UsageError(
            f"{path} was trained for block {trained_for}, not {config.block}: its output would be noise. "
            f"Use --block {trained_for}, or --timing-only if only the speed matters"
        )
    generator.config = config
    note = f"{title}, block {config.block}" + ("" if fits else f" (trained for {trained_for}: timing only)")
    if copies := ", ".join(map(printable, loaded.ema_copies)):
        note += (
            f", the EMA copy of its weights ({copies})"
            if request.ema
            else (f"; it also holds an EMA copy of its weights ({copies}), which --ema takes")
        )
    return Source(name, generator, tokenizer, fits, note)


def random_generator(config: ModelConfig) -> NextBlockTransformer:
    """A generator with random weights, allocated once; each parameter has its own seed, so that all cores can draw."""
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
    return f"{name} with random weights, block {config.block}: speed means something, quality is not measured"


def with_block(source: Source, block: str | None) -> Source:
    """A named model with the same random weights for another block, the model's own if None.

    Raises BlockShapeError for a block that does not tile. The given source's generator becomes the new one's.
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
    asked = "" if request.model else " (no --model, no --checkpoint given)"
    return Source(name, generator, tokenizer, True, f"bundled {name} for block {config.block}{asked}")
