"""Reads weights: the authors' generator `.ckpt` and tokenizer `.pt`, and our own safetensors; writes the last.

No code in a file runs: `pickled` says how pickles are opened, and `state` how tensors are found by their names. Tensors
stay memory-mapped where they are fp32 already, and are widened where they are not.
"""

import json
import os
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from torch import Tensor

from nbp_reference import fit
from nbp_reference.config import TOKENIZERS, BlockShape, ModelConfig, TextCondition, TokenizerConfig
from nbp_reference.errors import BlockShapeError, CheckpointError
from nbp_reference.model import NextBlockTransformer
from nbp_reference.pickled import Scalar, UnreadObject, unpickled
from nbp_reference.state import (
    GENERATOR,
    TOKENIZER,
    TOKENIZER_INSIDE,
    WRAPPERS,
    Part,
    State,
    checked,
    some,
    without_averages,
)
from nbp_reference.tokenizer import VideoTokenizer

WEIGHTS = Path(__file__).parent / "weights"  # of the bundled nbp-tiny

# A file's content can have any form; these are what using it as a model raises where it is another.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_NO_AVERAGE = "it holds no EMA copy of the weights: leave out --ema"
_ZIP = b"PK\x03\x04"
# What is taken for a checkpoint by mistake, by its first bytes.
_MISTAKEN = {
    b"\x80": "saved in torch's old format; where you trust it, save it again: "
    "torch.save(torch.load(OLD, weights_only=False), NEW)",
    b"version https://git-lfs": "a Git LFS pointer, not yet the file itself: run `git lfs pull`",
    b"\x1f\x8b": "compressed: run `gunzip` on it first",
    b"\x89PNG": "a PNG picture, no checkpoint",
    b"<": "a web page or other XML, no checkpoint: the download went wrong",
    b"\x08": "perhaps an ONNX graph, no checkpoint: what it was made from is needed",
    b"": "neither a PyTorch checkpoint nor safetensors",
}


class Checkpoint(NamedTuple):
    """What a file held, in evaluation mode.

    Attributes:
        generator, tokenizer: None where the file has none.
        exact_block: whether the file told the shape of the generator's block; the authors' tell its size alone.
        averages: what the EMA copies of the weights are called that the file holds beside them.
    """

    generator: NextBlockTransformer | None
    tokenizer: VideoTokenizer | None
    exact_block: bool
    averages: tuple[str, ...] = ()


def load(path: Path, ema: bool = False) -> Checkpoint:
    """Load any supported file; what kind it is, its content says, not its name.

    With `ema`, the EMA copy of the weights is taken that the file holds beside them. Raises CheckpointError, naming the
    file and what does not fit.
    """
    try:
        if not path.is_file():
            raise CheckpointError("not a file" if path.exists() else "no such file")
        with path.open("rb") as file:
            start = file.read(24)
            # The libraries take no name but UTF-8, and torch hands one that ends in .safetensors to another reader.
            odd = not _is_utf8(path) or (path.suffix == ".safetensors" and start.startswith(_ZIP))
            way = f"/dev/fd/{file.fileno()}" if odd else str(path)
            if start.startswith(_ZIP):
                return _load_zip(path, way, ema)
            if start[8:9] == b"{":
                if ema:
                    raise CheckpointError(_NO_AVERAGE)
                return _load_safetensors(path, way)
        raise CheckpointError(next(what for begin, what in _MISTAKEN.items() if start.startswith(begin)))
    except (BlockShapeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except _MALFORMED as error:
        what = f"{type(error).__name__}: {fit.shown(str(error))}"
        raise CheckpointError(f"{path} does not describe a model: {what}") from error


def bundled(block: BlockShape, hybrid: bool = False) -> tuple[NextBlockTransformer, VideoTokenizer]:
    """The nbp-tiny generator for a block shape, or its hybrid, and their tokenizer, which come with this package.

    Raises CheckpointError, listing the shapes that there are, for any other.
    """
    name = "hybrid" if hybrid else "generator"
    found = {str(load_config(path).block): path for path in WEIGHTS.glob(f"{name}-*.safetensors")}
    if str(block) not in found:
        there = ", ".join(sorted(found, key=len)) or "none"
        raise CheckpointError(
            f"no bundled nbp-tiny {name} for block {block}; there are: {there}. --weights random times any other block"
        )
    generator, tokenizer = load(found[str(block)]).generator, load(WEIGHTS / "tokenizer.safetensors").tokenizer
    assert generator is not None  # the files are ours
    assert tokenizer is not None
    return generator, tokenizer


def load_config(path: Path) -> ModelConfig:
    """The generator config in one of our own files, without its weights."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return ModelConfig.from_json(json.loads(file.metadata()["generator"]))


def save(model: NextBlockTransformer | VideoTokenizer, path: Path) -> None:
    """Write weights in fp16 and their config as safetensors; an interrupted write leaves the old file."""
    from safetensors.torch import save as serialized

    kind = "generator" if isinstance(model, NextBlockTransformer) else "tokenizer"
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        # The library's own `save_file` leaves a file that nobody else may read, whatever the umask is.
        partial.write_bytes(serialized(state, {kind: json.dumps(model.config.to_json())}))
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _load_safetensors(path: Path, way: str) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(way, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(f"damaged or incomplete: {fit.shown(str(error))}") from error
    size = path.stat().st_size
    for kind in ("generator", "tokenizer"):
        if kind in metadata:
            described = json.loads(metadata[kind])
            fit.refuse(fit.miscounts(described))
            if kind == "generator":
                return Checkpoint(fit.generator(ModelConfig.from_json(described), state, size), None, exact_block=True)
            return Checkpoint(None, fit.tokenizer(TokenizerConfig.from_json(described), state, size), exact_block=True)
    raise CheckpointError("its metadata names neither a generator nor a tokenizer; was it written by `save`?")


def _load_zip(path: Path, way: str, ema: bool) -> Checkpoint:
    """Read what `torch.save` wrote; `way` is the path, or another way to the same file."""
    try:
        with ZipFile(path) as archive:
            entries = archive.infolist()
    except (BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"damaged or incomplete: {fit.shown(str(error))}. Copy it again") from error
    names = {PurePosixPath(entry.filename).name for entry in entries}
    if "data.pkl" not in names or "constants.pkl" in names:  # the latter is TorchScript's: code
        raise CheckpointError("a zip, but none that torch.save wrote")
    # Mapped into memory as they are, compressed numbers would pass for weights.
    if packed := [entry.filename for entry in entries if entry.compress_type != ZIP_STORED]:
        raise CheckpointError(f"{fit.shown(packed[0])} in it is compressed: was it zipped again? Get the original")
    data = unpickled(path, way)
    if isinstance(data, dict) and "state_dict" in data:
        return _from_lightning(data, path.stat().st_size, ema)
    if isinstance(data, dict) and "model_state_dict" in data:
        state = checked(data["model_state_dict"])
        weights, averages = _weights(TOKENIZER, data, state, ema)
        tokenizer = fit.tokenizer(TOKENIZERS["official"], weights, path.stat().st_size)
        return Checkpoint(None, tokenizer, exact_block=False, averages=averages)
    raise CheckpointError("no `state_dict` (generator) and no `model_state_dict` (tokenizer) in it")


def _weights(part: Part, data: Mapping[str, Any], state: State, ema: bool) -> tuple[State, tuple[str, ...]]:
    """The tensors of a part of the model, those of its EMA copy if asked for, and what the copies are called."""
    copies = dict(part.averages(data, state))
    weights = part.members(without_averages(state))
    if not ema:
        if copies and not weights:
            raise CheckpointError(f"all weights in it are an EMA copy, {some(copies)}: --ema takes it")
        return weights, (*copies,)
    if len(copies) != 1:
        several = (
            f"it holds several EMA copies of the weights, {some(copies)}, and --ema takes the only one: save one alone"
        )
        raise CheckpointError(several if copies else _NO_AVERAGE)
    ((_, copy),) = copies.items()
    return part.average(copy, weights), (*copies,)


def _from_lightning(data: Mapping[str, Any], size: int, ema: bool) -> Checkpoint:
    held = data.get("hyper_parameters")
    args = held.get("args") if isinstance(held, Mapping) else None
    if not isinstance(args, Namespace):
        raise CheckpointError("hyper_parameters.args is missing: the file does not say what model it holds")
    hybrid = _given(args, "hybrid", None)
    if not hybrid and not _given(args, "unconditional", True):
        raise CheckpointError(
            "class-conditional without being hybrid (args.unconditional and args.hybrid are false): "
            "no such model was published, and none is supported"
        )
    keys = checked(data["state_dict"])
    weights, averages = _weights(GENERATOR, data, keys, ema)
    if keys and not weights:
        raise CheckpointError(
            f"no weights of a generator in it: its keys begin with `transformer.`, in front of which there may be "
            f"prefixes of wrappers ({', '.join(f'{name}.' for name in WRAPPERS)}); found {some(keys)}"
        )
    state = {key: value for key, value in weights.items() if "mask" not in key}
    state.pop("uncond_embedding", None)  # for classifier-free guidance, which no published result uses
    vocab, width = _axes(state, "tok_emb.weight", "V, C")
    _, positions, _ = _axes(state, "pos_emb", "1, P, C")
    config = ModelConfig(_argument(args, "n_layer"), width, _argument(args, "n_head"), vocab, positions)
    config = config.with_block(str(_argument(args, "token_number_per_step", 1)))
    if hybrid:
        config = _hybrid(config, _argument(args, "cond_token_num"))
    if width != (stated := _argument(args, "n_embd")):
        raise CheckpointError(f"tok_emb is {width} wide, its own arguments say n_embd={stated}")
    tokens = TOKENIZER_INSIDE.members(without_averages(keys))
    tokenizer = fit.tokenizer(TOKENIZERS["official"], tokens, size) if tokens else None
    return Checkpoint(fit.generator(config, state, size), tokenizer, exact_block=False, averages=averages)


def _hybrid(config: ModelConfig, text_tokens: int) -> ModelConfig:
    """The class-conditional model of that size: L special token ids, then text, then video."""
    special, codes = config.block.size, TOKENIZERS["official"].vocab
    text = TextCondition(text_tokens, config.vocab - special - codes)
    if text.vocab < 1:
        raise CheckpointError(
            f"tok_emb.weight has {config.vocab} rows, a hybrid has more: {special} special token ids, "
            f"its text's (32000 with LLaMA's tokenizer) and {codes} of the video tokenizer"
        )
    return replace(config, condition_latents=0, text=text)


def _argument(args: Namespace, name: str, default: int | None = None) -> int:
    """A number that the training was started with, or what the authors' code takes where it is missing."""
    value = _given(args, name, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"hyper_parameters.args.{name} is {fit.shown(value)}, expected a positive integer")
    return value


def _given(args: Namespace, name: str, default: object) -> object:
    """What an argument was, a number of numpy's as a plain one; raises CheckpointError for what was not read."""
    value = getattr(args, name, default)
    if isinstance(value, Scalar):
        value = value.value
    if isinstance(value, UnreadObject):
        raise CheckpointError(f"hyper_parameters.args.{name} is an object, expected a number or true or false")
    return value


def _axes(state: Mapping[str, object], key: str, axes: str) -> list[int]:
    """The shape of a tensor that the config is read from, which must have these axes."""
    tensor = state.get(key)
    if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.ndim != len(axes.split()):
        raise CheckpointError(f"{key}: expected [{axes}], found {fit.form(tensor)}")
    return list(tensor.shape)


def _is_utf8(path: Path) -> bool:
    """Whether the libraries, which read a name as UTF-8, find the file that Python finds, which asks the locale."""
    try:
        return os.fsencode(path) == str(path).encode()
    except UnicodeEncodeError:
        return False
