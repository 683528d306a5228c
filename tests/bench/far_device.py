"""A fake CUDA device: its tensors claim to be on CUDA, but store their values on the CPU.

A tensor on the fake device is *far*, a plain CPU tensor is *near*. As with real CUDA tensors, an operation on far and
near tensors raises an error, and so does a conversion to numpy without `.cpu()`. Whole sessions run on far tensors, so
that a test finds a tensor on the wrong device without a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nbp_bench import attention_choice, device, fused_step

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
COPIES = (aten._to_copy.default, aten.copy_.default)  # between devices
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Far(Tensor):
    """A tensor that claims to be on CUDA; `near` is the CPU tensor with its values."""

    near: Tensor

    @staticmethod
    def __new__(cls: type["Far"], near: Tensor) -> "Far":
        # Torch's C++ code must see a CPU tensor, because a build without CUDA has no device guard for CUDA.
        strides, offset = near.stride(), near.storage_offset()
        far: Far = Tensor._make_wrapper_subclass(
            cls, near.size(), strides, offset, dtype=near.dtype, device=near.device
        )
        far.near = near
        return far

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The fake CUDA device."""
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """True, as for a CUDA tensor."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Far":
        copy = Far(self.near.clone())
        copy._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copy
        return copy

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Raise TypeError as a CUDA tensor does, unless `force` copies it to the host first."""
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        array: np.ndarray = self.detach().cpu().numpy()
        return array

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return computed(function, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Handles operations without tensor arguments, whose device is given by name."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """Handles copies from one device to the other."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if function is Tensor.cpu:
            return moved(args[0], "cpu")
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Far):
            where = named.pop("device", None)
            made = function(*args, **named)
            return made if where is None else moved(made, torch.device(where).type)
        if function is Tensor.to and not any(isinstance(argument, Tensor) for argument in args[1:]):
            to, dtype, _, layout = torch._C._nn._parse_to(*args[1:], **named)
            kept = torch.preserve_format if layout is None else layout
            return moved(args[0], to.type if to else None, dtype=dtype, memory_format=kept)
        return function(*args, **named)


def moved(tensor: Tensor, to: str | None, **how: Any) -> Tensor:
    """Return the tensor on a device, on its own if None; the same tensor if nothing changes, else a copy."""
    far = isinstance(tensor, Far)
    near = tensor.near if isinstance(tensor, Far) else tensor
    there = far if to is None else to == "cuda"
    changed = near.to(**how)
    if there == far and changed is near:
        return tensor
    changed = near.clone() if changed is near else changed
    return Far(changed) if there else changed


def computed(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Run the operation on the near tensors; raise RuntimeError if it mixes devices."""
    tensors = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    where = named.get("device")
    asked = None if where is None else torch.device(where).type
    if far and function not in COPIES:
        held = tensors if function not in INDEXED else [arguments[0], *arguments[2:3]]
        if any(not isinstance(tensor, Far) and tensor.dim() for tensor in held if isinstance(tensor, Tensor)):
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found cuda:0 and cpu")
    goes_far = asked == "cuda" or (isinstance(arguments[0], Far) if function in COPIES else bool(far))
    originals = {id(tensor.near): tensor for tensor in far}

    def near(value: Any) -> Any:
        return value.near if isinstance(value, Far) else value

    if asked:
        named = {**named, "device": torch.device("cpu")}
    result = function(*tree_map(near, arguments), **tree_map(near, named))

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, Far) or not goes_far:
            return value
        return originals[id(value)] if id(value) in originals else Far(value)

    return tree_map(wrapped, result)


class FarGenerator(torch.Generator):
    """A random generator of the CPU that claims to be on CUDA."""

    device = CUDA

    def __new__(cls, device: object = None) -> Self:  # noqa: ARG004
        return super().__new__(cls)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Return scaled dot-product attention from single operations, because torch would look for CUDA's fused kernels."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    out: Tensor = scores.softmax(-1) @ value
    return out


def join_parameters(parts: Any) -> Tensor:
    """Return a copy of the joined parameters; a wrapper has no memory of which they could become views."""
    return torch.cat([part.detach() for part in parts])


def time_calls(_: torch.device, call: Callable[[int], object], count: int, stream: object = None) -> list[int]:  # noqa: ARG001
    for i in range(count):
        call(i)
    return [1000] * count


@contextmanager
def far_device() -> Iterator[None]:
    """Make the fake CUDA device available inside the context."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), _Factories(), _Moves():  # type: ignore[no-untyped-call]
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        for way in ("__enter__", "__exit__"):  # views in inference mode need a version counter, which wrappers lack
            patch.setattr(torch.inference_mode, way, lambda *_: None)
        for name in ("memory_allocated", "max_memory_allocated"):
            patch.setattr(torch.cuda, name, lambda _=None: 0)
        for name in ("reset_peak_memory_stats", "empty_cache", "synchronize"):
            patch.setattr(torch.cuda, name, lambda _=None: None)
        patch.setattr(torch, "Generator", FarGenerator)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        patch.setattr(fused_step, "_join_parameters", join_parameters)
        patch.setattr(attention_choice, "TRIALS", 1)
        patch.setattr(device, "time_calls", time_calls)
        patch.setitem(device.COPIED_BYTES, "cuda", 2**20)
        patch.setattr(device, "peak_bandwidth", lambda _: 3.35e12)
        patch.setattr(attention_choice, "time_calls", time_calls)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
