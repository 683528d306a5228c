"""Whether what a file holds is the model that it says it holds; checked before any of it is used.

A file may come from anybody: nothing here trusts a size, and no model takes more than four bytes for each of a file's.
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
    """The generator of a config with the tensors of a file of so many bytes, in evaluation mode.

    Raises CheckpointError, naming keys with the shapes expected and found, BlockShapeError for a block that does not
    tile the clip.
    """
    if config.layers > len(state):  # building it could take all the memory there is
        raise CheckpointError(f"{config.layers} layers, expected at most one for each of {len(state)} tensors")
    model = _filled(NextBlockTransformer, config, state, size)
    refuse(_contradictions(config))
    config.with_block(str(config.block))
    return model


def tokenizer(config: TokenizerConfig, state: Mapping[str, object], size: int) -> VideoTokenizer:
    """The tokenizer of a config with the tensors of a file of so many bytes; raises what `generator` does."""
    sizes = (config.groups, *(n for stride in config.strides for n in stride), *(s.channels for s in config.stages))
    layers = sum(1 + stage.units for stage in config.stages)
    if layers > len(state):
        raise CheckpointError(f"{layers} layers, expected at most one for each of {len(state)} tensors")
    if 0 in sizes or min(config.levels) < 2 or config.vocab >= 2**31:
        raise CheckpointError("its config's groups, strides, channels or levels make no tokenizer")
    return _filled(VideoTokenizer, config, state, size)


def refuse(problems: Iterable[str]) -> None:
    """Raise CheckpointError, naming the first three, if there are problems."""
    if found := list(problems):
        more = f" … and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(f"it does not fit its own config. {'; '.join(found[:3])}{more}")


def miscounts(value: Any, name: str = "config") -> Iterator[str]:
    """Every number in parsed JSON that cannot be a count."""
    if isinstance(value, bool | float) or (isinstance(value, int) and not 0 <= value < 2**31):
        yield f"{name} is {shown(value)}, expected a count"
    inner = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for key, part in inner.items():
        yield from miscounts(part, f"{name}[{shown(key)}]")


def shown(value: object) -> str:
    """A value from a file, made fit for a message: short, and nothing in it reaches a terminal as it is."""
    return f"{value!r:.200}" if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def form(value: object) -> str:
    """What lies under a key: of a plain floating-point tensor its shape alone, of anything else what it is."""
    if not isinstance(value, Tensor):
        return "nothing" if value is None else shown(value)
    if value.is_nested:
        return "a nested tensor"
    odd = {
        str(value.dtype): not value.dtype.is_floating_point,
        str(value.layout): value.layout is not torch.strided,
        "without content": value.is_meta,
        "negated": torch.is_neg(value),
    }
    parts = [str(list(value.shape)), *(name for name, is_so in odd.items() if is_so)]
    if len(parts) == 1 and (stored := value.untyped_storage().nbytes()) < value.numel() * value.element_size():
        parts.append(f"in {stored} bytes")
    return " ".join(parts)


def _filled(kind: Callable[[C], M], config: C, state: Mapping[str, object], size: int) -> M:
    """A model that takes the tensors as they are, without a second copy of the weights where they are fp32."""
    with torch.device("meta"):
        model = kind(config)
    expected = {key: str(list(value.shape)) for key, value in model.state_dict().items()}
    found = {key: form(value) for key, value in state.items()}
    refuse(
        f"{key if key in expected else shown(key)}: expected {expected.get(key, 'no such key')}, "
        f"found {found.get(key, 'nothing')}"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    )
    values = sum(value.numel() for value in model.state_dict().values())
    if values > size:  # tensors may share what they are made of, but not all of them
        raise CheckpointError(f"{values} values of weights, expected at most one for each of the file's {size} bytes")
    # `detach` leaves behind whatever else a file hung on a tensor.
    tensors = {key: torch.detach(cast(Tensor, state[key])).float().contiguous() for key in expected}
    broken = {key: _broken(tensor) for key, tensor in tensors.items()}
    refuse(f"{key}: {count} of {expected[key]} values are NaN or infinite" for key, count in broken.items() if count)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _broken(tensor: Tensor) -> int:
    """How many values are NaN or infinite: none where the sum is finite, which takes no memory to find out."""
    return 0 if tensor.sum().isfinite() else int((~tensor.isfinite()).sum())


def _contradictions(config: ModelConfig) -> Iterator[str]:
    """What the numbers in a config cannot be together."""
    if not config.heads or config.width % config.heads:
        yield f"{config.heads} heads do not divide a width of {config.width}"
    if not 0 < config.clip_tokens <= config.positions or config.capacity > config.positions:
        yield f"{config.positions} positions do not hold a clip of {config.latent} tokens"
    given = config.condition_latents
    if bool(given) == bool(config.text) or given >= config.latent.t or config.condition_tokens < 1:
        yield f"{given} of {config.latent.t} latent frames are given, and {'a' if config.text else 'no'} text"
    if config.codes < 1:
        yield f"{config.vocab} token ids leave none for the video"
