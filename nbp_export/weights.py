"""One copy of the weights on disk for all graphs of a bundle: equal tensors are written once."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir
from torch import nn

ALIGNMENT = 4096  # bytes, a page: runtimes map the file
INLINE = 1024  # bytes; smaller tensors stay in the graph's own file


class WeightPool:
    """The bundle's data file, open for appending."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._written: dict[bytes, int] = {}

    def take(self, model: ir.Model) -> None:
        """Move the graph's large initializers into the file, leaving references to it."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= INLINE:
                continue
            data = tensor.tobytes()
            digest = hashlib.sha256(data).digest()
            if digest not in self._written:
                self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
                self._written[digest] = self._file.tell()
                self._file.write(data)
            value.const_value = ir.ExternalTensor(
                self._path.name,
                self._written[digest],
                len(data),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=self._path.parent,
            )

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()


def weights_sha256(*models: nn.Module | None) -> str:
    """One digest over names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for model in models:
        for name, value in sorted(model.state_dict().items()) if model else ():
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(np.ascontiguousarray(value.numpy()).data)
    return digest.hexdigest()
