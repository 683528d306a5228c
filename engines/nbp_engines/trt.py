"""The runtime `tensorrt`, which runs a bundle's TensorRT engines.

Each graph of the bundle is an optimisation profile of a TensorRT engine with an execution context of its own. All
buffers are on the device, and each graph's work is captured once as a CUDA graph.

The code is written for TensorRT 11.4 and TensorRT-RTX 1.7. Their interfaces are the same here, except for the settings
of what TensorRT-RTX compiles on the GPU.
"""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from nbp_engines.bundle import Bundle
from nbp_engines.cuda import Buffer, CudaGraph, Device, Mirror, Sampler, enqueue_copy, gpu_name, gpu_problem
from nbp_engines.errors import EngineError
from nbp_engines.manifest import Engine
from nbp_engines.runtime import OpenOptions, Runtime
from nbp_engines.sampling import Sampling
from nbp_engines.session import GraphSession, state_tensors
from nbp_engines.spec import GraphKind, GraphSpec

DTYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int64": "INT64"}  # TensorRT's names of our dtypes
INSTALL = {
    "tensorrt": "pip install 'nbp-export[trt]' tensorrt=={}",
    "tensorrt_rtx": "pip install 'nbp-export[trt-rtx]' tensorrt-rtx=={}",
}


class _Profile:
    """One graph of the bundle: a profile of a TensorRT engine with an execution context of its own.

    The contexts of one TensorRT engine share its weights. They also share the states, because only one of them runs at
    a time. The results of a block step stay on the device; the results of other graphs are copied to the host.
    """

    def __init__(
        self, trt: Any, engine: Any, index: int, spec: GraphSpec, device: Device, states: Mapping[str, Buffer]
    ) -> None:
        self.spec = spec
        self._device = device
        self._arguments = {t.name: Mirror(device, t.shape, t.dtype, t.name) for t in spec.arguments()}
        first, *others = spec.results()
        self._host_result = (
            None if spec.kind is GraphKind.BLOCK_STEP else Mirror(device, first.shape, first.dtype, first.name)
        )
        device_results = [first, *others] if self._host_result is None else others
        outputs = {t.name: device.allocate(t.shape, t.dtype, t.name) for t in device_results}
        if self._host_result:
            outputs[first.name] = self._host_result.buffer
        memory = {**states, **outputs, **{name: mirror.buffer for name, mirror in self._arguments.items()}}
        self._first_output = outputs[first.name]
        self._copied_states = [(states[s.input], outputs[s.output]) for s in spec.states if not s.in_place]
        self._context = context = _context(trt, engine)
        self._require(context.set_optimization_profile_async(index, device.stream), f"profile {index}")
        device.synchronize()
        for t in spec.inputs:
            self._require(context.set_input_shape(t.name, t.shape), f"{t.name} of {list(t.shape)}")
        for t in (*spec.inputs, *spec.outputs):
            pointer = memory[spec.aliases.get(t.name, t.name)].ptr
            self._require(context.set_tensor_address(t.name, pointer), f"the address of {t.name}")
        unknown = context.infer_shapes()
        self._require(not unknown, f"the shapes of {', '.join(unknown)}")
        # The buffers have the sizes of the manifest, so TensorRT must not write more than that.
        for t in spec.outputs:
            self._require(tuple(context.get_tensor_shape(t.name)) == t.shape, f"{t.name} of {list(t.shape)}")
        # The first run finishes late compilation and allocation, which a capture would not allow.
        self._enqueue()
        device.synchronize()
        self.captured: CudaGraph | None = None  # without it, each run enqueues the work anew
        # Only TensorRT-RTX has this function.
        if getattr(context, "is_stream_capturable", lambda _: True)(device.stream):
            with suppress(EngineError):
                self.captured = CudaGraph(device, self._enqueue)

    def _require(self, accepted: bool, setting: str) -> None:
        if not accepted:
            raise EngineError(f"TensorRT does not accept {setting} for {self.spec.name}")

    def _enqueue(self) -> None:
        for mirror in self._arguments.values():
            mirror.enqueue_write()
        if not self._context.execute_async_v3(self._device.stream):
            raise EngineError(f"TensorRT failed to run {self.spec.name}: build the bundle again on this machine")
        for state, result in self._copied_states:
            enqueue_copy(self._device, state.ptr, result.ptr, state.nbytes, "DeviceToDevice")
        if self._host_result:
            self._host_result.enqueue_read()

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray | Buffer:
        """Run the graph and return its first output.

        Logits are returned as a buffer on the device, which may not be computed yet. Other outputs are host arrays.
        """
        self._device.synchronize()  # the previous run may still be reading the host arrays that are overwritten here
        for name, value in inputs.items():
            self._arguments[name].host[...] = value
        if self.captured:
            self.captured.launch()
        else:
            self._enqueue()
        if self._host_result is None:
            return self._first_output
        self._device.synchronize()
        return self._host_result.host


def _context(trt: Any, engine: Any) -> Any:
    """Return a new execution context.

    TensorRT-RTX compiles its kernels for the context's shapes at once, and does not capture CUDA graphs itself.
    """
    if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    # By default it compiles in the background, and a CUDA graph that is captured meanwhile keeps the slower kernels.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
    return engine.create_execution_context(config)


class TrtSession(GraphSession):
    """A session on the TensorRT engines of a bundle, on an NVIDIA GPU.

    Per step, only the tokens of a block, its cache_pos and its noise are copied between host and device.

    Attributes:
        device: the GPU.
        states: the buffers of all states, by the names of their inputs.
        notes: sentences for the reader of a measurement, such as that a graph could not be captured.
    """

    def __init__(self, bundle: Bundle, options: OpenOptions = OpenOptions()) -> None:  # noqa: B008 - it is immutable
        """Load the TensorRT engines that have the requested graphs. The options `threads` and `lean` have no effect.

        Raises EngineError, with the command or change that fixes it, if

        - the bundle has no TensorRT engines, or their library is missing or has another version;
        - there is no GPU, or not the kind that the TensorRT engines were built for, or too little memory;
        - the inputs and outputs of a TensorRT engine are not those of the manifest, or it does not update a cache in
          place.
        """
        super().__init__(bundle)
        requested = self.requested_graphs(options.graphs)
        if problem := _engine_problem(bundle):
            raise EngineError(problem)
        engines = [engine for engine in bundle.manifest.engines if requested.keys() & set(engine.graphs)]
        specs = bundle.manifest.graph_specs()
        libraries = {engine.file: _library(engine, bundle) for engine in engines}
        self.device = device = Device.open()
        with ExitStack() as opening:
            opening.callback(device.close)
            for engine in engines:
                _check_architecture(engine, device, bundle)
            profiles = {engine.file: [specs[name] for name in engine.graphs] for engine in engines}
            states = state_tensors(spec for graphs in profiles.values() for spec in graphs)
            self.states = {name: device.allocate(t.shape, t.dtype, name) for name, t in states.items()}
            self._runtimes: list[Any] = []
            self.graphs: dict[str, _Profile] = {}
            opening.callback(self.graphs.clear)  # the contexts have to be freed before the device
            for engine in engines:
                trt, path = libraries[engine.file], bundle.path / engine.file
                loaded = _load(trt, path, device, self._runtimes)
                _check(loaded, trt, profiles[engine.file], path)
                for index, spec in enumerate(profiles[engine.file]):
                    self.graphs[spec.name] = _Profile(trt, loaded, index, spec, device, self.states)
            uncaptured = (name for name, profile in self.graphs.items() if not profile.captured)
            self.notes = [f"{name} runs without a CUDA graph because it could not be captured" for name in uncaptured]
            self._sampler = Sampler(device, self.spec)
            self._opened = opening.pop_all()

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Return drawn tokens int64 [B,n]. Logits that are on the GPU are sampled on the GPU."""
        return self._sampler.sample(logits, uniforms, settings)

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite states, which are named by their inputs."""
        for name, value in values.items():
            self.states[name].write(value)

    def read_states(self) -> dict[str, np.ndarray]:
        """Return all states by the names of their inputs. States in bf16 are returned as float32."""
        return {name: state.read() for name, state in self.states.items()}

    def close(self) -> None:
        """Free the TensorRT engines, then the device's memory."""
        self._opened.close()


def _engine_problem(bundle: Bundle) -> str | None:
    """Return a message if the bundle has no TensorRT engines, else None."""
    if bundle.manifest.engines:
        return None
    return (
        f"{bundle.path} has no TensorRT engines: {bundle.manifest.origin}; "
        "`nbp-export trt` with the same options builds them"
    )


def _description(bundle: Bundle) -> str:
    libraries = dict.fromkeys(f"{engine.library} {engine.version}" for engine in bundle.manifest.engines)
    return f"{' and '.join(libraries)} on {gpu_name()}"


def _library(engine: Engine, bundle: Bundle) -> Any:
    """Import the library that built a TensorRT engine. Raises EngineError unless that same version is installed."""
    install = INSTALL[engine.library].format(engine.version)
    built = f"{bundle.path / engine.file} was built by {engine.library} {engine.version}"
    try:
        trt = import_module(engine.library)
    except ModuleNotFoundError:
        raise EngineError(f"{built}, which is not installed: {install}") from None
    if trt.__version__ != engine.version:
        raise EngineError(
            f"{built}, but {trt.__version__} is installed: {install}, or build the TensorRT engines again; "
            f"{bundle.manifest.origin}"
        )
    return trt


def _check_architecture(engine: Engine, device: Device, bundle: Bundle) -> None:
    """Raise EngineError unless the TensorRT engine may run on this GPU."""
    compatible = engine.compatibility == "ampere+" and int(device.arch[2:]) >= 80
    if device.arch != engine.arch and not compatible:
        raise EngineError(
            f"{bundle.path / engine.file} was built for {engine.arch}, but {device.name} is {device.arch}: "
            f"build the TensorRT engines again with --arch {device.arch}; {bundle.manifest.origin}"
        )


def _load(trt: Any, path: Path, device: Device, runtimes: list[Any]) -> Any:
    """Load a TensorRT engine from a file, and append its TensorRT runtime, which has to outlive it, to `runtimes`."""
    log = log_of(trt)
    log.lines.clear()
    runtimes.append(runtime := trt.Runtime(log))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        reason = "; ".join(log.messages("ERROR", "INTERNAL_ERROR")[-3:]) or "it gives no reason"
        raise EngineError(
            f"{trt.__name__} {trt.__version__} cannot load {path} on {device.name}: {reason} "
            f"(the file has {path.stat().st_size:,} bytes, the GPU has {device.free_bytes():,} bytes free)"
        )
    return engine


def _check(engine: Any, trt: Any, profiles: list[GraphSpec], path: Path) -> None:
    """Raise EngineError unless a TensorRT engine has the inputs and outputs of the manifest.

    TensorRT writes to memory by address, so a difference could make it overwrite other memory.
    """
    differences = []
    if engine.num_optimization_profiles != len(profiles):
        differences.append(f"it has {engine.num_optimization_profiles} profiles, but the manifest has {len(profiles)}")
    actual = {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        mode = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
        actual[name] = f"{mode} {_name(engine.get_tensor_dtype(name))} {list(engine.get_tensor_shape(name))}"
    for index, spec in enumerate(profiles):
        for mode, tensors in (("input", spec.inputs), ("output", spec.outputs)):
            for t in tensors:
                shape = list(t.shape)
                if actual.get(t.name, "").endswith(str([shape[0], -1, *shape[2:]])):  # the token axis is open
                    shape[1] = -1
                expected = f"{mode} {DTYPES[t.dtype]} {shape}"
                if actual.get(t.name) != expected:
                    differences.append(f"{t.name} is {actual.get(t.name, 'missing')}, but the manifest has {expected}")
                elif -1 in shape and mode == "input":
                    pinned = [tuple(dims) for dims in engine.get_tensor_profile_shape(t.name, index)]
                    if set(pinned) != {t.shape}:
                        differences.append(
                            f"profile {index} takes {t.name} {pinned}, but {spec.name} takes {list(t.shape)}"
                        )
        for output, source in spec.aliases.items():
            if (shared := engine.get_aliased_input_tensor(output)) != source:
                differences.append(f"{output} must update {source} in place, but it updates {shared or 'no input'}")
    if unknown := actual.keys() - {t.name for spec in profiles for t in (*spec.inputs, *spec.outputs)}:
        differences.append(f"{', '.join(sorted(unknown))} is not in the manifest")
    if differences:
        raise EngineError(f"{path}: {differences[0]}: build it again")


def _name(member: Any) -> str:
    return str(member).rpartition(".")[2]


@dataclass
class Log:
    """The messages of a TensorRT library.

    Attributes:
        lines: severity and text of each message, in order.
    """

    lines: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, *severities: str) -> list[str]:
        """Return the texts of the messages with these severities, in order."""
        return [text for severity, text in self.lines if severity in severities]


@cache
def log_of(trt: Any) -> Any:
    """Return the logger of a TensorRT library, which is also a `Log`.

    Builder and runtime of a library share one logger. The library warns about a second one and may ignore it.
    """

    class CollectingLogger(Log, trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            Log.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity.name != "VERBOSE":
                self.lines.append((severity.name, message))

    return CollectingLogger()


TENSORRT = Runtime(
    name="tensorrt",
    title="the bundle's TensorRT engines",
    status=("tensorrt", "sample.cu"),
    extra="trt-rtx",
    packages=("tensorrt", "tensorrt-rtx", "cuda-bindings"),
    devices=("cuda",),
    dtypes=("fp32", "fp16", "bf16"),
    runs_engines=True,
    shares_weights=True,
    takes_models=False,
    open=TrtSession,
    absence=gpu_problem,
    refusal=_engine_problem,
    description=_description,
)
