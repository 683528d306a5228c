"""Finds a model's tensors in a state dict, under the key names that training leaves there.

Wrappers such as `torch.compile`, data parallelism, DeepSpeed and Lightning modules put prefixes into the keys. The
prefixes are removed if all keys of a module have the same ones. EMA copies of the weights (exponential moving averages)
lie beside the weights under names such as `model_ema.` or `ema_state_dict`, and are kept separate from them.
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
WRAPPER_PREFIXES = ", ".join(f"{name}." for name in WRAPPERS)  # for messages
_EMA_NAME = re.compile(r"(?:.*_)?ema(?:_.*)?", re.IGNORECASE)
# The keys under which an EMA object keeps its tensors, beside its decay and counters.
_EMA_CONTENT = (
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
# The tokenizer inside a generator's file. Its keys are not searched for EMA copies: a quantizer may contain averages.
_TOKENIZER = "first_stage_model"

State = dict[str, object]


class Submodule(NamedTuple):
    """A part of the model, the generator or the tokenizer, as state dicts name it.

    Attributes:
        name: the module's name in the whole model, the first component of its keys; empty if the keys have none.
        known_key: the key of one of its tensors, which identifies the module where its name is missing.
    """

    name: str
    known_key: str

    def tensors(self, state: State) -> State:
        """Return the module's tensors, their keys without the module's name and without prefixes of wrappers.

        The result is empty if the state dict does not contain the module. Raises CheckpointError, with examples, if its
        keys have different prefixes.
        """
        keys = [_Key.parse(key) for key in state]
        own_keys, depth = [key for key in keys if self.name and key.path[0] == self.name], 1
        if not own_keys and (not self.name or self.known_key in {".".join(key.path) for key in keys}):
            own_keys, depth = keys, 0
        originals: dict[str, str] = {}
        for key in own_keys:
            path = ".".join(key.path)
            if path in originals:
                raise CheckpointError(_duplicate_message(path, originals[path], key.original))
            originals[path] = key.original
        _check_prefixes(own_keys)
        return {".".join(key.path[depth:]): state[key.original] for key in own_keys}

    def ema_tensors(self, copy: State, weights: State) -> State:
        """Return the tensors of an EMA copy under the keys of the weights, without the copy's decay and counters."""
        names = {name.replace(".", ""): name for name in weights}
        tensors = {key: value for key, value in copy.items() if not _is_bookkeeping(key, value)}
        if any("." in key for key in tensors):
            return self.tensors(tensors)
        # `register_buffer` refuses dots, so one common implementation removes them from the names.
        prefix = re.compile(f"(?:{'|'.join(filter(None, (self.name, *WRAPPERS)))})*")
        return {names.get(prefix.sub("", key, count=1), key): value for key, value in tensors.items()}

    def ema_copies(self, data: Mapping[str, object], state: State) -> Iterator[tuple[str, State]]:
        """Yield name and tensors of each EMA copy of the module.

        A copy may lie among the keys of the state dict, beside the state dict in `data`, or in the state of a callback.
        """
        copies: dict[str, State] = {}
        for key, value in state.items():
            if name := _ema_prefix(key):
                copies.setdefault(name, {})[key.removeprefix(name)] = value
        callbacks = data.get("callbacks")
        for place in (data, *(callbacks.values() if isinstance(callbacks, Mapping) else ())):
            for key, value in place.items() if isinstance(place, Mapping) else ():
                if isinstance(key, str) and _EMA_NAME.fullmatch(key) and isinstance(value, Mapping):
                    inner = next((value[name] for name in _EMA_CONTENT if isinstance(value.get(name), Mapping)), value)
                    if all(isinstance(name, str) for name in inner):
                        copies[key] = dict(inner)
        yield from ((name, copy) for name, copy in copies.items() if self._is_in(copy))

    def _is_in(self, copy: State) -> bool:
        return any(key.replace(".", "").endswith(self.known_key.replace(".", "")) for key in copy)


GENERATOR = Submodule("transformer", "tok_emb.weight")
TOKENIZER_INSIDE = Submodule(_TOKENIZER, "encoder_layers.0.conv.weight")
TOKENIZER = Submodule("", "encoder_layers.0.conv.weight")  # in a file of its own


def check_state_dict(state: object) -> State:
    """Return the state dict; raises CheckpointError unless it is a dictionary whose keys are strings."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"expected a dictionary of tensors, found {fit.safe_repr(state)}")
    for key in state:
        if not isinstance(key, str):
            raise CheckpointError(f"expected names as keys of the state dict, found {fit.safe_repr(key)}")
    return dict(state)


def remove_ema_copies(state: State) -> State:
    """Return the state dict without the EMA copies among its keys."""
    return {key: value for key, value in state.items() if not _ema_prefix(key)}


def example_keys(keys: Mapping[str, object]) -> str:
    """Return the first three keys and the number of the others, for a message."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(fit.safe_repr(key) for key in [*keys][:3]) + more


class _Key(NamedTuple):
    """A key of a state dict, split at its dots.

    Attributes:
        original: the key as the file has it.
        path: its components, except for those of wrappers.
        prefixes: for each component of `path`, the prefix of wrappers in front of it, which is usually empty.
    """

    original: str
    path: tuple[str, ...]
    prefixes: tuple[str, ...]

    @classmethod
    def parse(cls, original: str) -> "_Key":
        path, prefixes, prefix = [], [], ""
        *inner, last = original.split(".")
        for component in inner:
            if component in WRAPPERS:
                prefix += f"{component}."
            else:
                path.append(component)
                prefixes.append(prefix)
                prefix = ""
        return cls(original, (*path, last), (*prefixes, prefix))


def _check_prefixes(keys: list[_Key]) -> None:
    """Raise CheckpointError unless all keys of a module have the same prefix of wrappers at the module."""
    prefixes_of_module: dict[tuple[str, ...], dict[str, str]] = {}
    for key in keys:
        for depth, prefix in enumerate(key.prefixes):
            prefixes_of_module.setdefault(key.path[:depth], {}).setdefault(prefix, key.original)
    for prefixes in prefixes_of_module.values():
        if len(prefixes) > 1:
            raise CheckpointError(
                f"keys of the same module have different prefixes of wrappers ({WRAPPER_PREFIXES}): "
                f"{example_keys(dict.fromkeys(prefixes.values()))}. Save them all with the same prefix"
            )


def _duplicate_message(path: str, first: str, second: str) -> str:
    longer = max(first, second, key=len)
    if path in (first, second) and longer.endswith(path):
        return f"{fit.safe_repr(path)} occurs twice, with and without `{longer.removesuffix(path)}`: remove one of them"
    return f"{fit.safe_repr(path)} occurs twice, as {fit.safe_repr(first)} and {fit.safe_repr(second)}: remove one"


def _ema_prefix(key: str) -> str | None:
    """Return the prefix of the EMA copy that a key belongs to, or None if it belongs to no copy.

    Only the first two components that are not a wrapper's can name a copy.
    """
    components = key.split(".")
    depth = 0  # components so far that are not a wrapper's
    for number, component in enumerate(components[:-1]):
        if component == _TOKENIZER or depth > 1:
            return None
        if _EMA_NAME.fullmatch(component):
            return "".join(f"{part}." for part in components[: number + 1])
        depth += component not in WRAPPERS
    return None


def _is_bookkeeping(key: str, value: object) -> bool:
    """Whether an entry of an EMA copy is not a weight: its decay, or the number of its updates."""
    if "." in key:
        return False
    return not isinstance(value, Tensor) or (not value.is_nested and value.ndim < 2 and value.numel() == 1)
