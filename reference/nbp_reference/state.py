"""Finds a model's tensors among the names that training leaves in a state dict.

Wrappers put prefixes into names: `torch.compile`, data parallelism, DeepSpeed and Lightning modules. They are taken out
where all keys of a module agree about them. Averages of the weights (EMA) stand beside the weights, under names such as
`model_ema.` or `ema_state_dict`, and are told apart from them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from nbp_reference import fit
from nbp_reference.errors import CheckpointError

WRAPPERS = (
    "module",
    "model",
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
_AVERAGE = re.compile(r"(?:.*_)?ema(?:_.*)?", re.IGNORECASE)
_INNER = (
    "state_dict",
    "model_state_dict",
    "module",
    "model",
    "shadow",
    "params",
    "weights",
    "ema_weights",
    "ema_model",
)
_TOKENIZER = "first_stage_model"  # its keys are not told apart: quantizers have averages of their own

State = dict[str, object]


class Part(NamedTuple):
    """A module of a model, as state dicts name it.

    Attributes:
        name: of the module in a whole model.
        anchor: one of its tensors, by which its weights are known without that name.
    """

    name: str
    anchor: str

    def members(self, state: State) -> State:
        """Its tensors, without the module's name and the prefixes of wrappers; empty where there are none.

        Raises CheckpointError, showing the keys, where they do not agree about a prefix.
        """
        keys = [_Key.of(key) for key in state]
        own, depth = [key for key in keys if self.name and key.bare[0] == self.name], 1
        if not own and (not self.name or self.anchor in {".".join(key.bare) for key in keys}):
            own, depth = keys, 0
        full: dict[str, str] = {}
        for key in own:
            bare = ".".join(key.bare)
            if bare in full:
                raise CheckpointError(_twice(bare, full[bare], key.full))
            full[bare] = key.full
        _agree(own)
        return {".".join(key.bare[depth:]): state[key.full] for key in own}

    def average(self, copy: State, weights: State) -> State:
        """The tensors of an EMA copy under the names of the weights; what only counts updates is left out."""
        names = {name.replace(".", ""): name for name in weights}
        tensors = {key: value for key, value in copy.items() if not _counts(key, value)}
        if any("." in key for key in tensors):
            return self.members(tensors)
        # `register_buffer` takes no dots, so one common implementation leaves them out of names.
        prefix = re.compile(f"(?:{'|'.join(filter(None, (self.name, *WRAPPERS)))})*")
        return {names.get(prefix.sub("", key, count=1), key): value for key, value in tensors.items()}

    def averages(self, data: Mapping[str, object], state: State) -> Iterator[tuple[str, State]]:
        """Name and tensors of each EMA copy: among the keys of the state dict, beside it, or kept by a callback."""
        inside: dict[str, State] = {}
        for key, value in state.items():
            if name := _average_of(key):
                inside.setdefault(name, {})[key.removeprefix(name)] = value
        callbacks = data.get("callbacks")
        for place in (data, *(callbacks.values() if isinstance(callbacks, Mapping) else ())):
            for key, value in place.items() if isinstance(place, Mapping) else ():
                if isinstance(key, str) and _AVERAGE.fullmatch(key) and isinstance(value, Mapping):
                    inner = next((value[name] for name in _INNER if isinstance(value.get(name), Mapping)), value)
                    if all(isinstance(name, str) for name in inner):
                        inside[key] = dict(inner)
        yield from ((name, copy) for name, copy in inside.items() if self._in(copy))

    def _in(self, copy: State) -> bool:
        """Whether a copy is one of this part."""
        return any(key.replace(".", "").endswith(self.anchor.replace(".", "")) for key in copy)


GENERATOR = Part("transformer", "tok_emb.weight")
TOKENIZER_INSIDE = Part(_TOKENIZER, "encoder_layers.0.conv.weight")
TOKENIZER = Part("", "encoder_layers.0.conv.weight")  # of a file of its own


def checked(state: object) -> State:
    """The state dict; raises CheckpointError unless it is a dictionary with names as keys."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"expected a dictionary of tensors, found {fit.shown(state)}")
    for key in state:
        if not isinstance(key, str):
            raise CheckpointError(f"expected names as keys, found {fit.shown(key)}")
    return dict(state)


def without_averages(state: State) -> State:
    """The state dict without the EMA copies among its keys."""
    return {key: value for key, value in state.items() if not _average_of(key)}


def some(keys: Mapping[str, object]) -> str:
    """A few keys, for a message."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(fit.shown(key) for key in [*keys][:3]) + more


class _Key(NamedTuple):
    """A key of a state dict, taken apart.

    Attributes:
        full: as it stands in the file.
        bare: its components without those of wrappers.
        wraps: the prefix of wrappers in front of each of them, mostly empty.
    """

    full: str
    bare: tuple[str, ...]
    wraps: tuple[str, ...]

    @classmethod
    def of(cls, full: str) -> "_Key":
        """Take a key apart."""
        bare, wraps, prefix = [], [], ""
        *inner, last = full.split(".")
        for component in inner:
            if component in WRAPPERS:
                prefix += f"{component}."
            else:
                bare.append(component)
                wraps.append(prefix)
                prefix = ""
        return cls(full, (*bare, last), (*wraps, prefix))


def _agree(keys: list[_Key]) -> None:
    """Raise CheckpointError unless all keys of a module have the same prefix of wrappers there."""
    seen: dict[tuple[str, ...], dict[str, str]] = {}
    for key in keys:
        for depth, prefix in enumerate(key.wraps):
            seen.setdefault(key.bare[:depth], {}).setdefault(prefix, key.full)
    for prefixes in seen.values():
        if len(prefixes) > 1:
            raise CheckpointError(
                f"its keys do not agree about the prefixes of wrappers ({', '.join(f'{name}.' for name in WRAPPERS)}): "
                f"found {some(dict.fromkeys(prefixes.values()))}"
            )


def _twice(bare: str, first: str, second: str) -> str:
    longer = max(first, second, key=len)
    if bare in (first, second) and longer.endswith(bare):
        return f"{fit.shown(bare)} is in it twice, with and without `{longer.removesuffix(bare)}`"
    return f"{fit.shown(bare)} is in it twice, as {fit.shown(first)} and as {fit.shown(second)}"


def _average_of(key: str) -> str | None:
    """The prefix of the EMA copy that a key belongs to, if it belongs to one."""
    components = key.split(".")
    seen = 0  # that are no wrapper's
    for number, component in enumerate(components[:-1]):
        if component == _TOKENIZER or seen > 1:
            return None
        if _AVERAGE.fullmatch(component):
            return "".join(f"{part}." for part in components[: number + 1])
        seen += component not in WRAPPERS
    return None


def _counts(key: str, value: object) -> bool:
    """Whether it is what an average keeps beside the weights: its decay, or how many updates it has seen."""
    if "." in key:
        return False
    return not isinstance(value, Tensor) or (not value.is_nested and value.ndim < 2 and value.numel() == 1)
