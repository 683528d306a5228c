"""Reads weights: the authors' generator `.ckpt` and tokenizer `.pt`, and our own safetensors; writes the last.

Pickles are opened with `weights_only=True` and `argparse.Namespace` allowed, nothing more: no code in a file runs.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from nbp_reference.config import TOKENIZERS, BlockShape, ModelConfig, TextCondition, TokenizerConfig
from nbp_reference.errors import BlockShapeError, CheckpointError
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

WEIGHTS = Path(__file__).parent / "weights"  # of the bundled nbp-tiny

# A file's content can have any form; these are what using it as a model raises where it is another.
_MALFORMED = (ArithmeticError, AttributeError, BlockShapeError, LookupError, RuntimeError, TypeError, ValueError)


class Checkpoint(NamedTuple):
    """What a file held, in evaluation mode."""

    generator: NextBlockTransformer | None
    tokenizer: VideoTokenizer | None


def load(path: Path) -> Checkpoint:
    """Load any supported file; what kind it is, the file itself says.

    Raises CheckpointError, naming the file and what does not fit.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    read = _load_safetensors if path.suffix == ".safetensors" else _load_pickle
    try:
        return read(path)
    except _MALFORMED as error:
        raise CheckpointError(f"{path} does not describe a model: {type(error).__name__}: {error}") from error


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
    from safetensors.torch import save_file

    kind = "generator" if isinstance(model, NextBlockTransformer) else "tokenizer"
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(state, partial, {kind: json.dumps(model.config.to_json())})
    partial.replace(path)


def _load_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    if "generator" in metadata:
        model_config = ModelConfig.from_json(json.loads(metadata["generator"]))
        return Checkpoint(_filled(NextBlockTransformer, model_config, state, path), None)
    if "tokenizer" in metadata:
        tokenizer_config = TokenizerConfig.from_json(json.loads(metadata["tokenizer"]))
        return Checkpoint(None, _filled(VideoTokenizer, tokenizer_config, state, path))
    raise CheckpointError(f"{path}: its metadata names neither a generator nor a tokenizer; was it written by `save`?")


def _load_pickle(path: Path) -> Checkpoint:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever a broken zip, pickle or storage raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read without running code from it: {reason}") from error
    if isinstance(data, dict) and "state_dict" in data:
        return _from_lightning(data, path)
    if isinstance(data, dict) and "model_state_dict" in data:
        state = _stripped(data["model_state_dict"], "module.")
        return Checkpoint(None, _filled(VideoTokenizer, TOKENIZERS["official"], state, path))
    raise CheckpointError(f"{path}: no `state_dict` (generator) and no `model_state_dict` (tokenizer) in it")


def _from_lightning(data: Mapping[str, Any], path: Path) -> Checkpoint:
    args = data.get("hyper_parameters", {}).get("args")
    if args is None:
        raise CheckpointError(f"{path}: hyper_parameters.args is missing: the file does not say what model it holds")
    keys = _stripped(data["state_dict"], "module.")
    state = {k: v for k, v in _stripped(keys, "transformer.", only=True).items() if "mask" not in k}
    state.pop("uncond_embedding", None)  # for classifier-free guidance, which no published result uses
    vocab, width = state["tok_emb.weight"].shape
    positions = state["pos_emb"].shape[1]
    config = ModelConfig(args.n_layer, width, args.n_head, vocab, positions).with_block(str(args.token_number_per_step))
    if getattr(args, "hybrid", False):
        config = _hybrid(config, args.cond_token_num, path)
    if width != args.n_embd:
        raise CheckpointError(f"{path}: tok_emb is {width} wide, its own arguments say n_embd={args.n_embd}")
    tokens = _stripped(_stripped(keys, "first_stage_model.", only=True), "module.")
    tokenizer = _filled(VideoTokenizer, TOKENIZERS["official"], tokens, path) if tokens else None
    return Checkpoint(_filled(NextBlockTransformer, config, state, path), tokenizer)


def _hybrid(config: ModelConfig, text_tokens: int, path: Path) -> ModelConfig:
    """The class-conditional model of that size: L special token ids, then text, then video."""
    special, codes = config.block.size, TOKENIZERS["official"].vocab
    text = TextCondition(text_tokens, config.vocab - special - codes)
    if text.vocab < 1:
        raise CheckpointError(
            f"{path}: tok_emb.weight has {config.vocab} rows, a hybrid has more: {special} special token ids, "
            f"its text's (32000 with LLaMA's tokenizer) and {codes} of the video tokenizer"
        )
    if text_tokens < 1:
        raise CheckpointError(f"{path}: a hybrid without text: cond_token_num is {text_tokens}")
    return replace(config, condition_latents=0, text=text)


def _stripped(state: Mapping[str, Tensor], prefix: str, only: bool = False) -> dict[str, Tensor]:
    """Keys without the prefix; with `only`, just those that had it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if not only or k.startswith(prefix)}


def _filled(kind: Callable[[C], M], config: C, state: Mapping[str, Tensor], path: Path) -> M:
    """A model that takes the tensors as they are, without a second copy of the weights."""
    with torch.device("meta"):
        model = kind(config)
    expected = model.state_dict()
    problems = [
        f"{key}: expected {list(expected[key].shape) if key in expected else 'no such key'}, "
        f"found {list(state[key].shape) if key in state else 'nothing'}"
        for key in sorted(expected.keys() | state.keys())
        if key not in expected or key not in state or expected[key].shape != state[key].shape
    ]
    if problems:
        more = f" … and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} does not fit its own config. {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state, assign=True)
    return model.eval()
