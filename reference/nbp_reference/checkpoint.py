"""Reads the authors' generator files (`.ckpt`) and tokenizer files (`.pt`), and reads and writes our own safetensors.

No code in a file is executed: `pickled` opens pickles safely, and `state` finds tensors by their keys. Tensors in fp32
stay memory-mapped, and all others are converted to fp32.
"""

import json
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from torch import Tensor

from nbp_files import write_bytes
from nbp_reference import fit
from nbp_reference.config import TOKENIZERS, BlockShape, ModelConfig, TextCondition, TokenizerConfig
from nbp_reference.errors import BlockShapeError, CheckpointError
from nbp_reference.model import NextBlockTransformer
from nbp_reference.pickled import Scalar, UnreadObject, unpickle
from nbp_reference.state import (
    GENERATOR,
    TOKENIZER,
    TOKENIZER_INSIDE,
    WRAPPER_PREFIXES,
    State,
    Submodule,
    check_state_dict,
    example_keys,
    remove_ema_copies,
)
from nbp_reference.tokenizer import VideoTokenizer

WEIGHTS = Path(__file__).parent / "weights"  # of the bundled nbp-tiny

# A file may contain anything; content that is not a model raises one of these when it is used as a model.
_CONTENT_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_NO_EMA = "it holds no EMA copy of the weights: leave out --ema"
_ZIP = b"PK\x03\x04"
# Messages for files that are not checkpoints, by their first bytes; the last one matches every file.
_UNSUPPORTED = {
    b"\x80": "saved in torch's old format; if you trust the file, save it again: "
    "torch.save(torch.load(OLD, weights_only=False), NEW)",
    b"version https://git-lfs": "a Git LFS pointer instead of the file itself: run `git lfs pull`",
    b"\x1f\x8b": "compressed: run `gunzip` on it first",
    b"\x89PNG": "a PNG picture and not a checkpoint",
    b"<": "a web page or other XML and not a checkpoint: the download went wrong, so repeat it",
    b"\x08": "probably an ONNX graph and not a checkpoint: give the checkpoint that it was exported from",
    b"": "neither a PyTorch checkpoint nor safetensors",
}


class Checkpoint(NamedTuple):
    """The models of a file, in evaluation mode.

    Attributes:
        generator, tokenizer: the models; None for one that the file does not contain.
        exact_block: whether the file specifies the shape of the generator's block; the authors' files only specify its
            size.
        ema_copies: the names of the EMA copies of the weights in the file.
    """

    generator: NextBlockTransformer | None
    tokenizer: VideoTokenizer | None
    exact_block: bool
    ema_copies: tuple[str, ...] = ()


def load(path: Path, ema: bool = False) -> Checkpoint:
    """Load a file of any supported format, which is recognised by its content and not by its name.

    With `ema`, the models get the EMA copy of the weights in place of the weights. Raises CheckpointError, which names
    the file and what is wrong with it.
    """
    try:
        if not path.is_file():
            raise CheckpointError("not a regular file" if path.exists() else "no such file")
        with path.open("rb") as file:
            start = file.read(24)
            # The libraries only accept names in UTF-8, and torch reads files named .safetensors as safetensors.
            unusable = not _is_utf8(path) or (path.suffix == ".safetensors" and start.startswith(_ZIP))
            alias = f"/dev/fd/{file.fileno()}" if unusable else str(path)
            if start.startswith(_ZIP):
                return _load_zip(path, alias, ema)
            if start[8:9] == b"{":
                if ema:
                    raise CheckpointError(_NO_EMA)
                return _load_safetensors(path, alias)
        raise CheckpointError(next(message for first, message in _UNSUPPORTED.items() if start.startswith(first)))
    except (BlockShapeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except _CONTENT_ERRORS as error:
        reason = f"{type(error).__name__}: {fit.safe_repr(str(error))}"
        raise CheckpointError(f"{path} does not describe a model: {reason}") from error


def bundled(block: BlockShape, hybrid: bool = False) -> tuple[NextBlockTransformer, VideoTokenizer]:
    """Load the bundled nbp-tiny generator for a block shape, or the bundled hybrid, and the tokenizer.

    Raises CheckpointError, listing the bundled shapes, if there is no generator for the shape.
    """
    name = "hybrid" if hybrid else "generator"
    paths = {str(load_config(path).block): path for path in WEIGHTS.glob(f"{name}-*.safetensors")}
    if str(block) not in paths:
        shapes = ", ".join(sorted(paths, key=len)) or "none"
        raise CheckpointError(
            f"no nbp-tiny {name} is bundled for block {block}; bundled shapes: {shapes}. "
            "With --weights random, any other shape can be timed"
        )
    generator, tokenizer = load(paths[str(block)]).generator, load(WEIGHTS / "tokenizer.safetensors").tokenizer
    assert generator is not None  # the files are ours
    assert tokenizer is not None
    return generator, tokenizer


def load_config(path: Path) -> ModelConfig:
    """Read the generator config from one of our own files, without the weights."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return ModelConfig.from_json(json.loads(file.metadata()["generator"]))


def save(model: NextBlockTransformer | VideoTokenizer, path: Path) -> None:
    """Write a model's weights in fp16, and its config, to a safetensors file.

    If writing fails or is interrupted, an older file at `path` stays as it was.
    """
    from safetensors.torch import save as serialized

    kind = "generator" if isinstance(model, NextBlockTransformer) else "tokenizer"
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # The library's own `save_file` ignores the umask and writes a file that only its owner may read.
    write_bytes(path, serialized(state, {kind: json.dumps(model.config.to_json())}))


def _load_safetensors(path: Path, alias: str) -> Checkpoint:
    """Read one of our own files; `alias` is a name of the same file that the library accepts."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(alias, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(f"damaged or incomplete: {fit.safe_repr(str(error))}. Copy it again") from error
    size = path.stat().st_size
    for kind in ("generator", "tokenizer"):
        if kind in metadata:
            config = json.loads(metadata[kind])
            fit.raise_problems(fit.invalid_counts(config))
            if kind == "generator":
                return Checkpoint(fit.generator(ModelConfig.from_json(config), state, size), None, exact_block=True)
            return Checkpoint(None, fit.tokenizer(TokenizerConfig.from_json(config), state, size), exact_block=True)
    raise CheckpointError(
        "its metadata names neither a generator nor a tokenizer: "
        "only safetensors files that nbp_reference.checkpoint.save wrote are supported"
    )


def _load_zip(path: Path, alias: str, ema: bool) -> Checkpoint:
    """Read a file that `torch.save` wrote; `alias` is a name of the same file that torch accepts."""
    try:
        with ZipFile(path) as archive:
            entries = archive.infolist()
    except (BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"damaged or incomplete: {fit.safe_repr(str(error))}. Copy it again") from error
    names = {PurePosixPath(entry.filename).name for entry in entries}
    if "data.pkl" not in names or "constants.pkl" in names:  # a TorchScript file, which contains code, has the latter
        raise CheckpointError("a zip file that torch.save did not write")
    # Tensors are mapped into memory from the file, so compressed bytes would be taken for weights.
    if compressed := [entry.filename for entry in entries if entry.compress_type != ZIP_STORED]:
        raise CheckpointError(
            f"{fit.safe_repr(compressed[0])} in it is compressed, which torch.save never does: get the original file"
        )
    data = unpickle(path, alias)
    if isinstance(data, dict) and "state_dict" in data:
        return _from_lightning(data, path.stat().st_size, ema)
    if isinstance(data, dict) and "model_state_dict" in data:
        state = check_state_dict(data["model_state_dict"])
        weights, ema_copies = _weights(TOKENIZER, data, state, ema)
        tokenizer = fit.tokenizer(TOKENIZERS["official"], weights, path.stat().st_size)
        return Checkpoint(None, tokenizer, exact_block=False, ema_copies=ema_copies)
    raise CheckpointError("it holds neither a `state_dict` (of a generator) nor a `model_state_dict` (of a tokenizer)")


def _weights(module: Submodule, data: Mapping[str, Any], state: State, ema: bool) -> tuple[State, tuple[str, ...]]:
    """Return the weights of a module, or with `ema` those of its EMA copy, and the names of all its EMA copies."""
    copies = dict(module.ema_copies(data, state))
    weights = module.tensors(remove_ema_copies(state))
    if not ema:
        if copies and not weights:
            raise CheckpointError(f"all weights in it belong to an EMA copy, {example_keys(copies)}: give --ema")
        return weights, (*copies,)
    if len(copies) != 1:
        several = (
            f"it holds several EMA copies of the weights, {example_keys(copies)}, but --ema needs exactly one: "
            "save the file with only one of them"
        )
        raise CheckpointError(several if copies else _NO_EMA)
    ((_, copy),) = copies.items()
    return module.ema_tensors(copy, weights), (*copies,)


def _from_lightning(data: Mapping[str, Any], size: int, ema: bool) -> Checkpoint:
    """Build the models from a file that the authors' training wrote; `size` is the file's, in bytes."""
    hyper_parameters = data.get("hyper_parameters")
    args = hyper_parameters.get("args") if isinstance(hyper_parameters, Mapping) else None
    if not isinstance(args, Namespace):
        raise CheckpointError("hyper_parameters.args is missing: without it, the model's size is unknown")
    hybrid = _argument(args, "hybrid", None)
    if not hybrid and not _argument(args, "unconditional", True):
        raise CheckpointError(
            "a class-conditional model that is not a hybrid (args.unconditional and args.hybrid are false): "
            "no such model was published, and none is supported"
        )
    keys = check_state_dict(data["state_dict"])
    weights, ema_copies = _weights(GENERATOR, data, keys, ema)
    if keys and not weights:
        raise CheckpointError(
            "it holds no weights of a generator: expected keys that begin with `transformer.`, after any prefixes of "
            f"wrappers ({WRAPPER_PREFIXES}); found {example_keys(keys)}"
        )
    state = {key: value for key, value in weights.items() if "mask" not in key}
    state.pop("uncond_embedding", None)  # for classifier-free guidance, which no published result uses
    vocab, width = _shape(state, "tok_emb.weight", "V, C")
    _, positions, _ = _shape(state, "pos_emb", "1, P, C")
    config = ModelConfig(_count(args, "n_layer"), width, _count(args, "n_head"), vocab, positions)
    config = config.with_block(str(_count(args, "token_number_per_step", 1)))
    if hybrid:
        config = _hybrid(config, _count(args, "cond_token_num"))
    if width != (n_embd := _count(args, "n_embd")):
        raise CheckpointError(f"tok_emb.weight is {width} wide, but hyper_parameters.args.n_embd is {n_embd}")
    tokenizer_state = TOKENIZER_INSIDE.tensors(remove_ema_copies(keys))
    tokenizer = fit.tokenizer(TOKENIZERS["official"], tokenizer_state, size) if tokenizer_state else None
    return Checkpoint(fit.generator(config, state, size), tokenizer, exact_block=False, ema_copies=ema_copies)


def _hybrid(config: ModelConfig, text_tokens: int) -> ModelConfig:
    """Return the config of a class-conditional model, whose token ids are L special ones, then text, then video."""
    special, codes = config.block.size, TOKENIZERS["official"].vocab
    text = TextCondition(text_tokens, config.vocab - special - codes)
    if text.vocab < 1:
        raise CheckpointError(
            f"tok_emb.weight has {config.vocab} rows, but a hybrid needs {special} for special tokens, "
            f"{codes} for the video tokenizer, and more for its text (32000 with LLaMA's tokenizer)"
        )
    return replace(config, condition_latents=0, text=text)


def _count(args: Namespace, name: str, default: int | None = None) -> int:
    """Return a positive integer among the training's arguments; `default` is the authors' own for a missing one.

    Raises CheckpointError for any other value.
    """
    value = _argument(args, name, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"hyper_parameters.args.{name} is {fit.safe_repr(value)}, expected a positive integer")
    return value


def _argument(args: Namespace, name: str, default: object) -> object:
    """Return the value of an argument of the training, a numpy scalar as a Python number.

    Raises CheckpointError for an object that was not read from the file.
    """
    value = getattr(args, name, default)
    if isinstance(value, Scalar):
        value = value.value
    if isinstance(value, UnreadObject):
        raise CheckpointError(f"hyper_parameters.args.{name} is an object, expected a number or a boolean")
    return value


def _shape(state: Mapping[str, object], key: str, axes: str) -> list[int]:
    """Return a tensor's shape, from which the config is derived; raises CheckpointError unless it has these axes."""
    tensor = state.get(key)
    if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.ndim != len(axes.split()):
        raise CheckpointError(f"{key}: expected [{axes}], found {fit.describe(tensor)}")
    return list(tensor.shape)


def _is_utf8(path: Path) -> bool:
    """Whether the libraries, which read a name as UTF-8, find the file that Python finds, which asks the locale."""
    try:
        return os.fsencode(path) == str(path).encode()
    except UnicodeEncodeError:
        return False
