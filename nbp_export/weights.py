"""One copy of the weights on disk for all graphs of a bundle, and the way back from there to the reference.

Equal tensors are written once. An index says where each of the reference's parameters lies, so that a bundle can be
held against the reference again without the checkpoint that it came from.
"""

import hashlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from nbp_engines.bundle import Bundle
from nbp_engines.errors import BundleError
from nbp_engines.spec import BYTES
from nbp_engines.strict import FLAG, TEXT, Rule, check, loads, matching, whole
from nbp_errors import NbpError
from nbp_export.graphs import TORCH_DTYPES
from nbp_reference.config import ModelConfig, TokenizerConfig
from nbp_reference.model import Layer, NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer

if TYPE_CHECKING:
    import onnx_ir as ir

ALIGNMENT = 4096  # bytes, a page: runtimes map the file
INLINE = 1024  # bytes; smaller tensors stay in the graph's own file
INDEX = "weights.json"

# What the weights are while numpy, which has no bf16, handles them.
BITS = {"fp32": torch.int32, "fp16": torch.int16, "bf16": torch.int16}
INDEX_RULES: Rule = {
    ...: {
        "file": TEXT,
        "offset": whole(0, 2**48),
        "shape": [whole(1, 2**31 - 1)],
        "dtype": matching("fp32, fp16 or bf16", "fp32|fp16|bf16"),
        "transposed": FLAG,
    }
}

Index = dict[str, dict[str, Any]]
M = TypeVar("M", bound=nn.Module)


class WeightPool:
    """One of a bundle's data files, open for writing; each holds the weights of one model part once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._written: dict[bytes, int] = {}
        # By memory, so that what one graph has written is neither transposed nor hashed for the next and the index; the
        # array is kept, or its memory might become another's.
        self._seen: dict[tuple[object, ...], tuple[np.ndarray, int]] = {}

    def externalise(self, model: "ir.Model") -> None:
        """Move the graph's large initializers into the file, leaving references to it."""
        import onnx_ir as ir

        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= INLINE:
                continue
            value.const_value = ir.ExternalTensor(
                self._path.name,
                self._offset(tensor.numpy(), append=True),
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=self._path.parent,
            )

    def index(self, state: Mapping[str, Tensor]) -> Index:
        """Where each parameter lies: name → file, offset, shape and dtype as stored, and whether transposed.

        Small ones, which the graphs hold themselves, are written for the purpose. Raises NbpError if the graphs that
        were taken do not hold a large one, as it is or transposed: they would compute with other weights.
        """
        return {name: self._found(name, value.detach()) for name, value in state.items()}

    def _found(self, name: str, value: Tensor) -> dict[str, Any]:
        dtype = next(short for short, dtype in TORCH_DTYPES.items() if dtype == value.dtype)
        # Most matrices are a Linear's, which the exporter transposes.
        forms = [(value.T, True), (value, False)] if value.ndim == 2 else [(value, False)]
        for stored, transposed in forms:
            offset = self._offset(stored.view(BITS[dtype]).numpy(), append=stored.nbytes <= INLINE)
            if offset is not None:
                place = {"file": self._path.name, "offset": offset, "shape": list(stored.shape)}
                return place | {"dtype": dtype, "transposed": transposed}
        raise NbpError(f"{name} {list(value.shape)} is in no exported graph: the exporter changed it")

    def _offset(self, array: np.ndarray, append: bool) -> int | None:
        """Where an array's bytes are in the file; appended if they are new and may be, else None."""
        memory = array.ctypes.data, array.itemsize, array.shape, array.strides
        if memory not in self._seen:
            data = _bytes(array)
            digest = hashlib.sha256(data).digest()
            if append and digest not in self._written:
                self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
                self._written[digest] = self._file.tell()
                self._file.write(data)
            if digest not in self._written:
                return None
            self._seen[memory] = array, self._written[digest]
        return self._seen[memory][1]

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, and let go of the arrays."""
        self._file.close()
        self._seen.clear()


def weights_sha256(*models: nn.Module | None) -> str:
    """One digest over names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for model in models:
        for name, value in sorted(model.state_dict().items()) if model else ():
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(np.ascontiguousarray(value.numpy()).data)
    return digest.hexdigest()


def read_generator(bundle: Bundle) -> NextBlockTransformer:
    """The reference with a bundle's weights in fp32, whose layers are read one by one as they are used.

    Raises NbpError if the bundle's index lies or does not fit the bundle's config.
    """
    config = ModelConfig.from_json(bundle.manifest.model["config"]["generator"])
    index = _index(bundle)
    layers = {name: index.pop(name) for name in [*index] if name.startswith("generator.blocks.")}
    with torch.device("meta"):
        model = NextBlockTransformer(config)
    model.blocks = _LayersOnDemand(bundle, config, layers)
    return _filled(model, bundle, index, "generator.")


def read_whole_generator(bundle: Bundle) -> NextBlockTransformer:
    """The same with all layers in memory, for whoever runs it more than once."""
    model = read_generator(bundle)
    model.blocks = nn.ModuleList([*model.blocks])
    return model


def read_tokenizer(bundle: Bundle) -> VideoTokenizer | None:
    """The tokenizer with a bundle's weights in fp32, as far as its graphs go; None if it has none.

    Raises NbpError if the bundle's index lies or does not fit the bundle's config.
    """
    config = bundle.manifest.model["config"].get("tokenizer")
    if config is None:
        return None
    with torch.device("meta"):
        model = VideoTokenizer(TokenizerConfig.from_json(config))
    if "encode" not in bundle.manifest.graphs:
        model.encoder_layers = nn.Sequential()
    return _filled(model, bundle, _index(bundle), "tokenizer.")


class _LayersOnDemand(nn.ModuleList):
    """Transformer layers that are built from the file when their turn comes: one is in memory at a time."""

    def __init__(self, bundle: Bundle, config: ModelConfig, index: Index) -> None:
        super().__init__()
        self._bundle = bundle
        self._config = config
        self._index = index

    def __iter__(self) -> Iterator[nn.Module]:
        for i in range(self._config.layers):
            with torch.device("meta"):
                layer = Layer(self._config.width, self._config.heads)
            yield _filled(layer, self._bundle, self._index, f"generator.blocks.{i}.")


def _filled(model: M, bundle: Bundle, index: Index, prefix: str) -> M:
    """The model with its parameters, those in the index under that prefix, in fp32."""
    own = {name.removeprefix(prefix): place for name, place in index.items() if name.startswith(prefix)}
    try:
        model.load_state_dict({name: _mapped(bundle.path, place).float() for name, place in own.items()}, assign=True)
    except RuntimeError as error:
        raise NbpError(f"{INDEX} does not fit the manifest's config: {error}") from error
    return model.eval()


def _index(bundle: Bundle) -> Index:
    """The index, checked: every place lies inside a file that the manifest lists."""
    path, files = bundle.path / INDEX, {file.path: file.size for file in bundle.manifest.files}
    if INDEX not in files:
        raise NbpError(f"{bundle.path} has no {INDEX}, so its weights cannot be found: export it again")
    try:
        index: Index = loads(path.read_bytes())
        check(index, INDEX_RULES, INDEX)
    except BundleError as error:
        raise NbpError(f"{path}: {error.message}") from error
    for name, place in index.items():
        end = place["offset"] + prod(place["shape"]) * BYTES[place["dtype"]]
        if end > files.get(place["file"], 0):
            raise NbpError(f"{path}: {name} ends at byte {end} of {place['file']}, of which the bundle has fewer")
    return index


def _mapped(folder: Path, place: Mapping[str, Any]) -> Tensor:
    bits = f"i{BYTES[place['dtype']]}"  # numpy has no bf16; and mode c, because torch wants to be able to write
    data = np.memmap(folder / place["file"], bits, "c", place["offset"], tuple(place["shape"]))
    stored = torch.from_numpy(data).view(TORCH_DTYPES[place["dtype"]])
    return stored.T if place["transposed"] else stored


def _bytes(array: np.ndarray) -> memoryview:
    """The same memory as bytes; a copy only where it is not contiguous, by torch, which transposes faster."""
    if not array.flags.c_contiguous:
        array = torch.from_numpy(array.view(f"i{array.itemsize}")).contiguous().numpy()
    return array.reshape(-1).view(np.uint8).data
