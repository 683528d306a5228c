"""Writes one copy of the weights for all graphs of a bundle, and loads the reference from it.

Equal tensors are written once. The index INDEX holds the place of each parameter of the reference, so that a bundle can
be compared with the reference without its checkpoint.
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

ALIGNMENT = 4096  # bytes: the size of a page, because runtimes map the file into memory
INLINE = 1024  # bytes: tensors up to this size stay in the graph's own file
INDEX = "weights.json"

# The integer dtypes as which numpy handles the weights, because it has no bf16.
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
    """A data file of a bundle, open for writing. It holds each weight of one part of the model once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._offsets: dict[bytes, int] = {}  # by the hash of the content
        # By address and layout, so that an array which several graphs share is transposed and hashed only once. The
        # array is kept alive, because its address could otherwise be used again for another array.
        self._by_memory: dict[tuple[object, ...], tuple[np.ndarray, int]] = {}

    def externalise(self, model: "ir.Model") -> None:
        """Write the graph's large initializers to the file, and replace them with references to it."""
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
        """Return the place of each parameter by name: file, offset, stored shape and dtype, and whether transposed.

        Small parameters, which the graphs hold themselves, are written here.

        Raises NbpError if the externalised graphs hold a large parameter neither as it is nor transposed, because they
        would then compute with other weights.
        """
        return {name: self._place(name, value.detach()) for name, value in state.items()}

    def _place(self, name: str, value: Tensor) -> dict[str, Any]:
        dtype = next(short for short, dtype in TORCH_DTYPES.items() if dtype == value.dtype)
        # Most matrices belong to a Linear, whose weight the exporter transposes.
        layouts = [(value.T, True), (value, False)] if value.ndim == 2 else [(value, False)]
        for stored, transposed in layouts:
            offset = self._offset(stored.view(BITS[dtype]).numpy(), append=stored.nbytes <= INLINE)
            if offset is not None:
                place = {"file": self._path.name, "offset": offset, "shape": list(stored.shape)}
                return place | {"dtype": dtype, "transposed": transposed}
        raise NbpError(
            f"{name} {list(value.shape)} is not in any exported graph, because the exporter changed it: "
            "please report this with the command and versions"
        )

    def _offset(self, array: np.ndarray, append: bool) -> int | None:
        """Return the offset of an array's bytes in the file. New bytes are appended, or give None without `append`."""
        memory = array.ctypes.data, array.itemsize, array.shape, array.strides
        if memory not in self._by_memory:
            data = _bytes(array)
            digest = hashlib.sha256(data).digest()
            if append and digest not in self._offsets:
                self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
                self._offsets[digest] = self._file.tell()
                self._file.write(data)
            if digest not in self._offsets:
                return None
            self._by_memory[memory] = array, self._offsets[digest]
        return self._by_memory[memory][1]

    def __enter__(self) -> Self:
        """Return the pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file and release the arrays."""
        self._file.close()
        self._by_memory.clear()


def weights_sha256(*models: nn.Module | None) -> str:
    """Return one SHA-256 digest of the names, shapes, dtypes and values of all weights."""
    digest = hashlib.sha256()
    for model in models:
        for name, value in sorted(model.state_dict().items()) if model else ():
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(np.ascontiguousarray(value.numpy()).data)
    return digest.hexdigest()


def read_generator(bundle: Bundle) -> NextBlockTransformer:
    """Return the reference with a bundle's weights in fp32. Each use of a layer reads it from the file.

    Raises NbpError if the bundle's index is malformed or does not fit the bundle's config.
    """
    config = ModelConfig.from_json(bundle.manifest.model["config"]["generator"])
    index = _read_index(bundle)
    layers = {name: index.pop(name) for name in [*index] if name.startswith("generator.blocks.")}
    with torch.device("meta"):
        model = NextBlockTransformer(config)
    model.blocks = _LayersOnDemand(bundle, config, layers)
    return _load_parameters(model, bundle, index, "generator.")


def read_whole_generator(bundle: Bundle) -> NextBlockTransformer:
    """Return the generator with a bundle's weights in fp32 and all layers in memory, for repeated use.

    Raises NbpError as `read_generator` does.
    """
    model = read_generator(bundle)
    model.blocks = nn.ModuleList([*model.blocks])
    return model


def read_tokenizer(bundle: Bundle) -> VideoTokenizer | None:
    """Return the tokenizer with a bundle's weights in fp32, without an encoder if the bundle has no encode graph.

    Returns None for a bundle without a tokenizer.

    Raises NbpError if the bundle's index is malformed or does not fit the bundle's config.
    """
    config = bundle.manifest.model["config"].get("tokenizer")
    if config is None:
        return None
    with torch.device("meta"):
        model = VideoTokenizer(TokenizerConfig.from_json(config))
    if "encode" not in bundle.manifest.graphs:
        model.encoder_layers = nn.Sequential()
    return _load_parameters(model, bundle, _read_index(bundle), "tokenizer.")


class _LayersOnDemand(nn.ModuleList):
    """Transformer layers that iteration reads from the file, so that one layer is in memory at a time."""

    def __init__(self, bundle: Bundle, config: ModelConfig, index: Index) -> None:
        super().__init__()
        self._bundle = bundle
        self._config = config
        self._index = index

    def __iter__(self) -> Iterator[nn.Module]:
        for i in range(self._config.layers):
            with torch.device("meta"):
                layer = Layer(self._config.width, self._config.heads)
            yield _load_parameters(layer, self._bundle, self._index, f"generator.blocks.{i}.")


def _load_parameters(model: M, bundle: Bundle, index: Index, prefix: str) -> M:
    """Load the parameters that the index lists under a prefix into a model, in fp32, and return it."""
    places = {name.removeprefix(prefix): place for name, place in index.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(
            {name: _read_tensor(bundle.path, place).float() for name, place in places.items()}, assign=True
        )
    except RuntimeError as error:
        raise NbpError(f"{INDEX} does not fit the manifest's config: export the bundle again ({error})") from error
    return model.eval()


def _read_index(bundle: Bundle) -> Index:
    """Read the index, and check that every place is inside a file that the manifest lists."""
    path, files = bundle.path / INDEX, {file.path: file.size for file in bundle.manifest.files}
    if INDEX not in files:
        raise NbpError(f"{bundle.path} has no {INDEX}, so its weights cannot be located: export it again")
    try:
        index: Index = loads(path.read_bytes())
        check(index, INDEX_RULES, INDEX)
    except BundleError as error:
        raise NbpError(f"{path}: {error.message}") from error
    for name, place in index.items():
        end = place["offset"] + prod(place["shape"]) * BYTES[place["dtype"]]
        if end > files.get(place["file"], 0):
            raise NbpError(
                f"{path}: {name} ends at byte {end}, which is beyond the end of {place['file']} in the bundle: "
                "export it again"
            )
    return index


def _read_tensor(folder: Path, place: Mapping[str, Any]) -> Tensor:
    bits = f"i{BYTES[place['dtype']]}"  # numpy has no bf16
    # Mode c (copy on write) makes the array writable, as torch requires.
    data = np.memmap(folder / place["file"], bits, "c", place["offset"], tuple(place["shape"]))
    stored = torch.from_numpy(data).view(TORCH_DTYPES[place["dtype"]])
    return stored.T if place["transposed"] else stored


def _bytes(array: np.ndarray) -> memoryview:
    """Return an array's memory as bytes. One that is not contiguous is copied by torch, which is faster than numpy."""
    if not array.flags.c_contiguous:
        array = torch.from_numpy(array.view(f"i{array.itemsize}")).contiguous().numpy()
    return array.reshape(-1).view(np.uint8).data
