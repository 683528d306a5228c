"""Checks that the content of a file is the model that the file claims to hold, before any of it is used.

A file may come from anybody, so no size in it is trusted, and a model never takes more than four bytes of memory for
each byte of its file.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from nbp_reference.config import ModelConfig, TokenizerConfig
from nbp_reference.errors import CheckpointError
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)


def generator(config: ModelConfig, state: Mapping[str, object], size: int) -> NextBlockTransformer:
    """Return the generator of a config with the tensors of a file, in evaluation mode.

    Args:
        config: what the file says about its model.
        state: the file's tensors, by the generator's own keys.
        size: of the file, in bytes.

    Raises:
        CheckpointError: for tensors or a config that are not a generator's; names keys with expected and found shapes.
        BlockShapeError: for a block that does not tile the clip.
    """
    if config.layers > len(state):  # building so many layers could exhaust the memory
        raise CheckpointError(f"the config has {config.layers} layers, but the file only {len(state)} tensors")
    model = _load_model(NextBlockTransformer, config, state, size)
    raise_problems(_contradictions(config))
    config.with_block(str(config.block))
    return model


def tokenizer(config: TokenizerConfig, state: Mapping[str, object], size: int) -> VideoTokenizer:
    """Return the tokenizer of a config with the tensors of a file of `size` bytes, in evaluation mode.

    Raises CheckpointError as `generator` does.
    """
    sizes = (config.groups, *(n for stride in config.strides for n in stride), *(s.channels for s in config.stages))
    layers = sum(1 + stage.units for stage in config.stages)
    if layers > len(state):
        raise CheckpointError(f"the config has {layers} layers, but the file only {len(state)} tensors")
    if 0 in sizes or min(config.levels) < 2 or config.vocab >= 2**31:
        raise CheckpointError("no tokenizer has the groups, strides, channels or levels of its config")
    return _load_model(VideoTokenizer, config, state, size)


def raise_problems(problems: Iterable[str]) -> None:
    """Raise CheckpointError with the first three problems, if there are any."""
    if listed := list(problems):
        more = f" … and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise CheckpointError(f"it does not fit its own config. {'; '.join(listed[:3])}{more}")


def invalid_counts(value: Any, name: str = "config") -> Iterator[str]:
    """Yield a message for every number in parsed JSON that cannot be a count: all are counts in our configs."""
    if isinstance(value, bool | float) or (isinstance(value, int) and not 0 <= value < 2**31):
        yield f"{name} is {safe_repr(value)}, expected a count"
    inner = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for key, part in inner.items():
        yield from invalid_counts(part, f"{name}[{safe_repr(key)}]")


def safe_repr(value: object) -> str:
    """Describe a value from a file in a message: in at most 200 characters, and without control characters."""
    return f"{value!r:.200}" if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def describe(value: object) -> str:
    """Describe what a file has under a key, for a message.

    For an ordinary floating-point tensor this is its shape alone. It equals the expected shape only if the tensor can
    be used as a weight, because anything unusual about the tensor is added.
    """
    if not isinstance(value, Tensor):
        return "nothing" if value is None else safe_repr(value)
    if value.is_nested:
        return "a nested tensor"
    oddities = {
        str(value.dtype): not value.dtype.is_floating_point,
        str(value.layout): value.layout is not torch.strided,
        "without content": value.is_meta,
        "negated": torch.is_neg(value),
    }
    parts = [str(list(value.shape)), *(name for name, applies in oddities.items() if applies)]
    if len(parts) == 1 and (stored := value.untyped_storage().nbytes()) < value.numel() * value.element_size():
        parts.append(f"in {stored} bytes")
    return " ".join(parts)


def _load_model(kind: Callable[[C], M], config: C, state: Mapping[str, object], size: int) -> M:
    """Return a model of the config that uses the tensors themselves, so that fp32 weights are not copied."""
    with torch.device("meta"):
        model = kind(config)
    expected = {key: str(list(value.shape)) for key, value in model.state_dict().items()}
    actual = {key: describe(value) for key, value in state.items()}
    raise_problems(
        f"{key if key in expected else safe_repr(key)}: expected {expected.get(key, 'no such key')}, "
        f"found {actual.get(key, 'nothing')}"
        for key in sorted(expected.keys() | actual.keys())
        if expected.get(key) != actual.get(key)
    )
    values = sum(value.numel() for value in model.state_dict().values())
    if values > size:  # several tensors may share one storage, which a copy in fp32 would multiply
        raise CheckpointError(
            f"its tensors have {values} values, but the file has only {size} bytes: save the weights again, "
            "each tensor with memory of its own"
        )
    # `detach` drops the attributes that a file may have attached to a tensor.
    tensors = {key: torch.detach(cast(Tensor, state[key])).float().contiguous() for key in expected}
    counts = {key: _nonfinite_count(tensor) for key, tensor in tensors.items()}
    raise_problems(
        f"{key}: {count} of {expected[key]} values are NaN or infinite" for key, count in counts.items() if count
    )
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _nonfinite_count(tensor: Tensor) -> int:
    """Return how many values are NaN or infinite; the sum comes first, because it needs no memory."""
    return 0 if tensor.sum().isfinite() else int((~tensor.isfinite()).sum())


def _contradictions(config: ModelConfig) -> Iterator[str]:
    """Yield a message for each pair of numbers in a config that contradict each other."""
    if not config.heads or config.width % config.heads:
        yield f"{config.heads} heads do not divide a width of {config.width}"
    if not 0 < config.clip_tokens <= config.positions or config.capacity > config.positions:
        yield f"{config.positions} positions do not hold a clip of {config.latent} tokens"
    given = config.condition_latents
    if bool(given) == bool(config.text) or given >= config.latent.t or config.condition_tokens < 1:
        condition = f"{given} of {config.latent.t} latent frames and {'a' if config.text else 'no'} text"
        yield f"the condition must be a text, or some but not all of the latent frames; found {condition}"
    if config.codes < 1:
        yield f"{config.vocab} token ids leave none for the video"
