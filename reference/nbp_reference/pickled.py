"""Unpickles a checkpoint without executing any code that it names.

torch's `weights_only` reader builds tensors and plain data. In addition we allow `argparse.Namespace`, in which the
authors keep their arguments, and stand-ins for the harmless objects that training leaves in a file: numpy scalars and
arrays, paths, dates and the like. A stand-in is called in place of the real constructor and ignores what the file
passes to it, so that not even numpy's own code processes the file's content. A file that names anything else is
refused.
"""

import re
import struct
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self
from zipfile import ZipFile

import torch

from nbp_reference import fit
from nbp_reference.errors import CheckpointError

# The formats of numpy's scalars: numpy's name, and the letter that `struct` has for it.
_FORMATS = {
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}
_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
_SEARCHED_BYTES = 2**20  # how much of a refused pickle is searched for `model_state_dict`

# A Python script of three lines for each kind of file; the user replaces OLD and NEW with file names.
_SAVE_AGAIN = {
    "generator": (
        "import argparse, torch; "
        'old = torch.load("OLD", "cpu", weights_only=False); '
        'torch.save({"state_dict": {k: v for k, v in old["state_dict"].items() if isinstance(v, torch.Tensor)}, '
        '"hyper_parameters": {"args": argparse.Namespace(**{k: v for k, v in '
        'vars(old["hyper_parameters"]["args"]).items() if isinstance(v, int)})}}, "NEW")'
    ),
    "tokenizer": (
        "import torch; "
        'old = torch.load("OLD", "cpu", weights_only=False); '
        'torch.save({"model_state_dict": {k: v for k, v in old["model_state_dict"].items() '
        'if isinstance(v, torch.Tensor)}}, "NEW")'
    ),
}


class UnreadObject:
    """A stand-in for an object that no model needs; it ignores the data that a file has for the object."""

    def __new__(cls, *_: object) -> Self:
        """Accept any arguments and ignore them."""
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        """Accept any arguments and ignore them."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class _Dtype(UnreadObject):
    """A stand-in for `numpy.dtype`, which stores the name and the byte order of a number's format."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        """Store the byte order."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


class Scalar(UnreadObject):
    """A stand-in for a numpy scalar.

    Attributes:
        value: the Python number; this object itself if the scalar is not a number.
    """

    def __init__(self, dtype: object = None, content: object = None, *_: object) -> None:
        self.value: object = self
        name = dtype.name if isinstance(dtype, _Dtype) else None
        if isinstance(dtype, _Dtype) and isinstance(name, str) and name in _FORMATS and isinstance(content, bytes):
            layout = dtype.order + _FORMATS[name]
            if len(content) == struct.calcsize(layout):
                (self.value,) = struct.unpack(layout, content)


class _Dictionary:
    """A stand-in for subclasses of dict, which returns a plain dict."""

    def __new__(cls, *_: object) -> Any:
        return {}


class _List:
    """A stand-in for sequence types, which returns a plain list."""

    def __new__(cls, *_: object) -> Any:
        return []


def _stand_ins() -> dict[str, type]:
    """Return the stand-in for each harmless constructor, by the constructor's full name."""
    unread = [f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in _PATHS]
    unread += [f"datetime.{kind}" for kind in ("date", "datetime", "time", "timedelta", "timezone")]
    unread += ["decimal.Decimal", "fractions.Fraction", "types.SimpleNamespace", "uuid.UUID"]
    unread += [f"builtins.{kind}" for kind in ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "str")]
    unread += ["builtins.range", "builtins.slice", "builtins.tuple"]
    # Files from numpy 1 have `core`, files from numpy 2 have `_core`.
    unread += [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    unread += ["numpy.ndarray", "numpy.bool", "numpy.bool_"]
    unread += [f"numpy.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    unread += [f"numpy.float{bits}" for bits in (16, 32, 64)]
    modules = ["pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing"]
    modules += ["lightning_fabric.utilities.data", "lightning.fabric.utilities.data"]
    return {
        **dict.fromkeys(unread, UnreadObject),
        **{f"numpy.{core}.multiarray.scalar": Scalar for core in ("core", "_core")},
        "numpy.dtype": _Dtype,
        **dict.fromkeys(("collections.defaultdict", *(f"{module}.AttributeDict" for module in modules)), _Dictionary),
        "collections.deque": _List,
    }


_ALLOWED: list[Any] = [Namespace, *((stand_in, name) for name, stand_in in _stand_ins().items())]


def unpickle(path: Path, alias: str) -> Any:
    """Return the content of a zip that `torch.save` wrote, tensors memory-mapped; executes no code that the file names.

    `alias` is a name of the same file that torch accepts. Raises CheckpointError for a damaged file, and for one that
    names anything but tensors, plain data and harmless objects; then the message has a script that saves the weights
    again.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(alias, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {fit.safe_repr(name[1])}" if name else "its pickle has operations that weights never need"
        raise CheckpointError(
            f"cannot be read without running code from it: {reason}. If you trust its source, save its weights again "
            f"with Python: {_SAVE_AGAIN[_kind(path)]}"
        ) from error
    except Exception as error:  # torch raises whatever a broken zip, pickle or storage raises
        reason = f"{type(error).__name__}, {fit.safe_repr(str(error))}"
        raise CheckpointError(f"damaged or incomplete: {reason}. Copy it again") from error


def _kind(path: Path) -> str:
    """Guess what a refused file holds: a tokenizer if its pickle contains the key of a tokenizer's weights."""
    try:
        with ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            with archive.open(name) as pickle:
                return "tokenizer" if b"model_state_dict" in pickle.read(_SEARCHED_BYTES) else "generator"
    except Exception:  # a zip that is also broken can raise anything
        return "generator"
