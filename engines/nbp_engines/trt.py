"""TensorRT engines: an execution context for each profile, everything on the device, each graph captured once.

Written against TensorRT 11.4 and TensorRT-RTX 1.7, whose interfaces are the same here but for what TensorRT-RTX
compiles on the GPU.
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
from nbp_engines.cuda import Buffer, Device, Graph, Mirror, Sampler, enqueue_copy, gpu_name, no_gpu
from nbp_engines.errors import EngineError
from nbp_engines.manifest import Engine
from nbp_engines.runtime import OpenOptions, Runtime
from nbp_engines.sampling import Sampling
from nbp_engines.session import GraphSession, state_tensors
from nbp_engines.spec import GraphKind, GraphSpec

DTYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int64": "INT64"}  # TensorRT's names
INSTALL = {
    "tensorrt": "pip install 'nbp-export[trt]' tensorrt=={}",
    "tensorrt_rtx": "pip install 'nbp-export[trt-rtx]' tensorrt-rtx=={}",
}


class _Profile:
    """One graph as a profile of an engine, with an execution context of its own.

    Contexts of an engine share its weights; here they also share the states, as no two of them ever run at once. What
    a block step computes stays on the device, what other graphs compute comes to the host.
    """

    def __init__(
        self, trt: Any, engine: Any, index: int, spec: GraphSpec, device: Device, states: Mapping[str, Buffer]
    ) -> None:
        self.spec = spec
        self._device = device
        self._given = {t.name: Mirror(device, t.shape, t.dtype, t.name) for t in spec.arguments()}
        first, *others = spec.results()
        self._result = (
            None if spec.kind is GraphKind.BLOCK_STEP else Mirror(device, first.shape, first.dtype, first.name)
        )
        kept = [first, *others] if self._result is None else others
        outputs = {t.name: device.allocate(t.shape, t.dtype, t.name) for t in kept}
        if self._result:
            outputs[first.name] = self._result.buffer
        memory = {**states, **outputs, **{name: mirror.buffer for name, mirror in self._given.items()}}
        self._first = outputs[first.name]
        self._carried = [(states[s.input], outputs[s.output]) for s in spec.states if not s.in_place]
        self._context = context = _context(trt, engine)
        self._require(context.set_optimization_profile_async(index, device.stream), f"profile {index}")
        device.synchronize()
        for t in spec.inputs:
            self._require(context.set_input_shape(t.name, t.shape), f"{t.name} of {list(t.shape)}")
        for t in (*spec.inputs, *spec.outputs):
            pointer = memory[spec.aliases.get(t.name, t.name)].ptr
            self._require(context.set_tensor_address(t.name, pointer), f"the address of {t.name}")
        self._require(not (missing := context.infer_shapes()), f"{missing} as they are")
        for t in spec.outputs:  # it writes as much as it says, and there is room for as much as the manifest says
            self._require(tuple(context.get_tensor_shape(t.name)) == t.shape, f"{t.name} of {list(t.shape)}")
        self._enqueue()  # once before it is captured: shapes settle, and what is compiled or allocated late is done
        device.synchronize()
        self.captured: Graph | None = None  # one that cannot be captured still runs
        if getattr(context, "is_stream_capturable", lambda _: True)(device.stream):  # TensorRT-RTX can tell
            with suppress(EngineError):
                self.captured = Graph(device, self._enqueue)

    def _require(self, taken: bool, what: str) -> None:
        if not taken:
            raise EngineError(f"TensorRT does not take {what} for {self.spec.name}")

    def _enqueue(self) -> None:
        for mirror in self._given.values():
            mirror.enqueue_write()
        if not self._context.execute_async_v3(self._device.stream):
            raise EngineError(f"TensorRT does not run {self.spec.name}")
        for state, result in self._carried:
            enqueue_copy(self._device, state.ptr, result.ptr, state.nbytes, "DeviceToDevice")
        if self._result:
            self._result.enqueue_read()

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray | Buffer:
        """Run it; the first output, logits still on the device and perhaps still to come."""
        self._device.synchronize()  # the last run may still be reading what is overwritten here
        for name, value in inputs.items():
            self._given[name].host[...] = value
        if self.captured:
            self.captured.launch()
        else:
            self._enqueue()
        if self._result is None:
            return self._first
        self._device.synchronize()
        return self._result.host


def _context(trt: Any, engine: Any) -> Any:
    """An execution context; TensorRT-RTX compiles for its shapes at once, and leaves the capture to us."""
    if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    # The default compiles in the background, and what was captured meanwhile would stay the slower kernels.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
    return engine.create_execution_context(config)


class TrtSession(GraphSession):
    """A bundle's engines on an NVIDIA GPU. Per step, only a block's tokens and its noise travel.

    Attributes:
        notes: what somebody who measures it should know.
    """

    def __init__(self, bundle: Bundle, options: OpenOptions = OpenOptions()) -> None:  # noqa: B008 - it is immutable
        """Load the engines, or only those that hold some graphs. An engine takes no threads, and nothing is lean.

        Raises EngineError, with the command that cures it, if the bundle has no engines, if their library is missing or
        of another version, if there is no GPU, or another than they were built for, or too little memory; and if an
        engine does not have the inputs and outputs that the manifest says, each cache output being its input's memory.
        """
        super().__init__(bundle)
        wanted = self.opened(options.graphs)
        if why := _no_engines(bundle):
            raise EngineError(why)
        engines = [engine for engine in bundle.manifest.engines if wanted.keys() & set(engine.graphs)]
        specs = bundle.manifest.graph_specs()
        libraries = {engine.file: _library(engine, bundle) for engine in engines}
        self.device = device = Device.open()
        with ExitStack() as opening:
            opening.callback(device.close)
            for engine in engines:
                _fits(engine, device, bundle)
            profiles = {engine.file: [specs[name] for name in engine.graphs] for engine in engines}
            states = state_tensors(spec for each in profiles.values() for spec in each)
            self.states = {name: device.allocate(t.shape, t.dtype, name) for name, t in states.items()}
            self._kept: list[Any] = []
            self.graphs: dict[str, _Profile] = {}
            opening.callback(self.graphs.clear)  # contexts go before what they run on
            for engine in engines:
                trt, path = libraries[engine.file], bundle.path / engine.file
                loaded = _load(trt, path, device, self._kept)
                _check(loaded, trt, profiles[engine.file], path)
                for index, spec in enumerate(profiles[engine.file]):
                    self.graphs[spec.name] = _Profile(trt, loaded, index, spec, device, self.states)
            uncaptured = (name for name, profile in self.graphs.items() if not profile.captured)
            self.notes = [f"{name} runs without a CUDA graph: it could not be captured" for name in uncaptured]
            self._sampler = Sampler(device, self.spec)
            self._opened = opening.pop_all()

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,L], drawn on the GPU if the logits lie there."""
        return self._sampler.sample(logits, uniforms, settings)

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite some states, by the names of their inputs."""
        for name, value in values.items():
            self.states[name].write(value)

    def read_states(self) -> dict[str, np.ndarray]:
        """All states by the names of their inputs, bf16 ones as float32."""
        return {name: state.read() for name, state in self.states.items()}

    def close(self) -> None:
        """Give the engines back, then what they ran on."""
        self._opened.close()


def _no_engines(bundle: Bundle) -> str | None:
    """Why a bundle has nothing to run here, or None."""
    if bundle.manifest.engines:
        return None
    return f"{bundle.path} has no engines: {bundle.manifest.made}; `nbp-export trt` with the same options builds them"


def _libraries_and_gpu(bundle: Bundle) -> str:
    libraries = dict.fromkeys(f"{engine.library} {engine.version}" for engine in bundle.manifest.engines)
    return f"{' and '.join(libraries)} on {gpu_name()}"


def _library(engine: Engine, bundle: Bundle) -> Any:
    """The module that built an engine, in the same version."""
    pip = INSTALL[engine.library].format(engine.version)
    built = f"{bundle.path / engine.file} was built by {engine.library} {engine.version}"
    try:
        trt = import_module(engine.library)
    except ModuleNotFoundError:
        raise EngineError(f"{built}, which is not installed: {pip}") from None
    if trt.__version__ != engine.version:
        raise EngineError(
            f"{built}, here is {trt.__version__}: {pip}, or build the engines again: {bundle.manifest.made}"
        )
    return trt


def _fits(engine: Engine, device: Device, bundle: Bundle) -> None:
    """Raise EngineError unless the engine may run on this GPU."""
    later = engine.compatibility == "ampere+" and int(device.arch[2:]) >= 80
    if device.arch != engine.arch and not later:
        raise EngineError(
            f"{bundle.path / engine.file} was built for {engine.arch}, {device.name} is {device.arch}: "
            f"build the engines again with --arch {device.arch}; {bundle.manifest.made}"
        )


def _load(trt: Any, path: Path, device: Device, kept: list[Any]) -> Any:
    """The engine of a file; `kept` takes what has to outlive it."""
    log = log_of(trt)
    log.lines.clear()
    kept.append(runtime := trt.Runtime(log))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        size, said = path.stat().st_size, "; ".join(log.named("ERROR", "INTERNAL_ERROR")[-3:]) or "it does not say why"
        raise EngineError(
            f"{trt.__name__} {trt.__version__} does not load {path} on {device.name}: {said} "
            f"({size:,} bytes asked for, {device.free():,} free)"
        )
    return engine


def _check(engine: Any, trt: Any, profiles: list[GraphSpec], path: Path) -> None:
    """Raise EngineError unless the engine is what the manifest says: TensorRT writes to memory by address."""
    wrong = []
    if engine.num_optimization_profiles != len(profiles):
        wrong.append(f"{engine.num_optimization_profiles} profiles, where {len(profiles)} are due")
    found = {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        mode = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
        found[name] = f"{mode} {_name(engine.get_tensor_dtype(name))} {list(engine.get_tensor_shape(name))}"
    for index, spec in enumerate(profiles):
        for mode, tensors in (("input", spec.inputs), ("output", spec.outputs)):
            for t in tensors:
                shape = list(t.shape)
                if found.get(t.name, "").endswith(str([shape[0], -1, *shape[2:]])):  # a number of tokens left open
                    shape[1] = -1
                due = f"{mode} {DTYPES[t.dtype]} {shape}"
                if found.get(t.name) != due:
                    wrong.append(f"{t.name} is {found.get(t.name, 'missing')}, where {due} is due")
                elif -1 in shape and mode == "input":
                    pinned = [tuple(dims) for dims in engine.get_tensor_profile_shape(t.name, index)]
                    if set(pinned) != {t.shape}:
                        wrong.append(f"profile {index} takes {t.name} {pinned}, {spec.name} takes {list(t.shape)}")
        for output, source in spec.aliases.items():
            if (shared := engine.get_aliased_input_tensor(output)) != source:
                wrong.append(f"{output} is no update of {source} in place, but of {shared or 'no input'}")
    if unknown := found.keys() - {t.name for spec in profiles for t in (*spec.inputs, *spec.outputs)}:
        wrong.append(f"{', '.join(sorted(unknown))} unknown to the manifest")
    if wrong:
        raise EngineError(f"{path}: {wrong[0]}: build it again")


def _name(member: Any) -> str:
    return str(member).rpartition(".")[2]


@dataclass
class Log:
    """What a TensorRT library says: severity and text, in order."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def named(self, *severities: str) -> list[str]:
        """The texts of some severities."""
        return [text for severity, text in self.lines if severity in severities]


@cache
def log_of(trt: Any) -> Any:
    """A library's one logger, a Log, of builder and runtime: it warns of a second one, and may not listen to it."""

    class Listening(Log, trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            Log.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity.name != "VERBOSE":
                self.lines.append((severity.name, message))

    return Listening()


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
    absence=no_gpu,
    refusal=_no_engines,
    description=_libraries_and_gpu,
)
