"""Unpickles a checkpoint without running any code that it names.

torch's `weights_only` reader builds tensors and plain data. Beside that it gets `argparse.Namespace`, in which the
authors keep their arguments, and stand-ins for the harmless objects that training runs leave in a file: numpy scalars
and arrays, paths, dates and the like. A stand-in takes the place of a constructor and does nothing with what the file
gives it, so that not even numpy's own code sees a file's content. Whatever else a file asks for is refused.
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

# Of numpy's scalars, as `struct` reads them.
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
_MOST_SEARCHED = 2**20  # bytes of a refused pickle

# Three lines of Python each; OLD and NEW are the reader's to fill in.
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
    """A stand-in for an object that no model needs; it ignores what a file would build the object from."""

    def __new__(cls, *_: object) -> Self:
        """Take any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        """Take any arguments."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class _Dtype(UnreadObject):
    """A stand-in for `numpy.dtype`, which remembers the name of a number's format."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        """Remember the order of bytes."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


class Scalar(UnreadObject):
    """A stand-in for a numpy scalar.

    Attributes:
        value: the plain number, or this object itself where it is none.
    """

    def __init__(self, dtype: object = None, content: object = None, *_: object) -> None:
        self.value: object = self
        name = dtype.name if isinstance(dtype, _Dtype) else None
        if isinstance(dtype, _Dtype) and isinstance(name, str) and name in _FORMATS and isinstance(content, bytes):
            form = dtype.order + _FORMATS[name]
            if len(content) == struct.calcsize(form):
                (self.value,) = struct.unpack(form, content)


class _Dictionary:
    """A stand-in for a kind of dictionary, which gives a plain one."""

    def __new__(cls, *_: object) -> Any:
        return {}


class _List:
    """A stand-in for a kind of list, which gives a plain one."""

    def __new__(cls, *_: object) -> Any:
        return []


def _stand_ins() -> dict[str, type]:
    """The full name of each harmless constructor, and what stands in for it."""
    unread = [f"{home}.{kind}" for home in ("pathlib", "pathlib._local") for kind in _PATHS]
    unread += [f"datetime.{kind}" for kind in ("date", "datetime", "time", "timedelta", "timezone")]
    unread += ["decimal.Decimal", "fractions.Fraction", "types.SimpleNamespace", "uuid.UUID"]
    unread += [f"builtins.{kind}" for kind in ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "str")]
    unread += ["builtins.range", "builtins.slice", "builtins.tuple"]
    # Files of numpy 1 and of numpy 2.
    unread += [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    unread += ["numpy.ndarray", "numpy.bool", "numpy.bool_"]
    unread += [f"numpy.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    unread += [f"numpy.float{bits}" for bits in (16, 32, 64)]
    homes = ["pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing"]
    homes += ["lightning_fabric.utilities.data", "lightning.fabric.utilities.data"]
    return {
        **dict.fromkeys(unread, UnreadObject),
        **{f"numpy.{core}.multiarray.scalar": Scalar for core in ("core", "_core")},
        "numpy.dtype": _Dtype,
        **dict.fromkeys(("collections.defaultdict", *(f"{home}.AttributeDict" for home in homes)), _Dictionary),
        "collections.deque": _List,
    }


_ALLOWED: list[Any] = [Namespace, *((stand_in, name) for name, stand_in in _stand_ins().items())]


def unpickled(path: Path, way: str) -> Any:
    """The content of a zip that `torch.save` wrote, tensors mapped into memory; no code that it names runs.

    `way` is the path, or another way to the same file. Raises CheckpointError, with the script that saves the file
    again, where it asks for anything but tensors, plain data and harmless objects.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(way, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {fit.shown(asked[1])}" if asked else "it does what weights and plain data never do"
        raise CheckpointError(
            f"cannot be read without running code from it: {what}. Where you trust whoever made it, save its weights "
            f"again with Python: {_SAVE_AGAIN[_kind(path)]}"
        ) from error
    except Exception as error:  # torch raises whatever a broken zip, pickle or storage raises
        raise CheckpointError(f"damaged or incomplete: {type(error).__name__}, {fit.shown(str(error))}") from error


def _kind(path: Path) -> str:
    """What a file that is not read seems to hold, by the name that a tokenizer's weights have."""
    try:
        with ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            with archive.open(name) as pickle:
                return "tokenizer" if b"model_state_dict" in pickle.read(_MOST_SEARCHED) else "generator"
    except Exception:  # a zip that is broken besides raises anything
        return "generator"
