"""Which models and sessions are open in the process of one engine, or of all PyTorch engines of a dtype.

The parent calls the functions here and in measure.py through a `Worker`; their first argument is the process's `Host`.
Torch is imported where it is needed: the memory of an engine that runs a bundle on a CPU must not hold it.
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nbp_engines.bundle import Bundle
from nbp_engines.cuda import Device
from nbp_engines.runtime import OpenOptions, Runtime
from nbp_engines.spec import SystemSpec

if TYPE_CHECKING:
    import torch

    from nbp_bench.plan import Case, Subject
    from nbp_export.parity import Check
    from nbp_export.request import Request
    from nbp_export.sources import Source
    from nbp_reference.model import NextBlockTransformer
    from nbp_reference.tokenizer import VideoTokenizer


class Identity(NamedTuple):
    """What is known of a model once its weights are let go.

    Attributes:
        name, digest, trained: as in a record.
        note: one line that says what it is.
        spec: in fp32, for one clip at a time.
        parameters: of generator and tokenizer together.
        words: the text word of each id of a class-conditional model that has its own; else empty.
    """

    name: str
    digest: str
    trained: bool
    note: str
    spec: SystemSpec
    parameters: int
    words: tuple[str, ...]


@dataclass
class Models:
    """A generator and its tokenizer in a dtype on a device, and the same weights in fp32."""

    generator: "NextBlockTransformer"
    tokenizer: "VideoTokenizer | None"
    exact_generator: "NextBlockTransformer"
    exact_tokenizer: "VideoTokenizer | None"

    def nbytes(self, session: Any) -> int:
        """Bytes of those that a session computes with; it may have a tokenizer of its own."""
        tokenizer = self.tokenizer if session.tokenizer is self.tokenizer else None
        models = [model for model in (self.generator, tokenizer) if model]
        return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


@dataclass
class OpenSession:
    """A session, what it holds on a GPU, and the bytes there before it was opened, with a bundle."""

    session: Any
    buffers: int = 0
    free_before: int = 0


class Host:
    """What a process keeps between calls: models by weights, dtype and device, and open sessions by case."""

    def __init__(self) -> None:
        self.models: dict[object, Models] = {}
        self.sources: dict[object, Source] = {}
        self.digests: dict[object, str] = {}
        self.sessions: dict[Case, OpenSession] = {}
        self.tokenizer_checks: dict[object, list[Check]] = {}

    def session(self, case: "Case") -> Any:
        """The open session of a case."""
        return self.sessions[case].session

    def broken(self) -> bool:
        """Whether CUDA has failed in this process for good."""
        if "torch" not in sys.modules:
            return False
        from nbp_bench.device import broken

        return broken()

    def sound(self) -> bool:
        """Whether CUDA is in use and still answers, so that what the process holds is worth keeping after an error."""
        if "torch" not in sys.modules:
            return False
        import torch

        return torch.cuda.is_initialized() and not self.broken()

    def close(self) -> None:
        """Close all sessions."""
        for case in [*self.sessions]:
            close_case(self, case)


def identify(host: Host, request: "Request") -> Identity:
    """Find a model, and hash its weights."""
    from nbp_export.graphs import system_spec
    from nbp_export.weights import weights_sha256

    source, weights = _source(host, request), _weights(request)
    models = [model for model in (source.generator, source.tokenizer) if model]
    config = source.generator.config
    if weights not in host.digests:
        host.digests[weights] = weights_sha256(source.generator, source.tokenizer)
    return Identity(
        source.name,
        host.digests[weights],
        source.trained,
        source.note,
        system_spec(config, source.tokenizer.config if source.tokenizer else None, "fp32", 1),
        sum(p.numel() for model in models for p in model.parameters()),
        config.text.words if config.text else (),
    )


def export_bundle(host: Host, request: "Request", dtype: str, batch: int, runtime: Runtime, folder: Path) -> None:
    """Export a model and prove the bundle, with engines for the GPU of this machine where the runtime runs engines."""
    from nbp_export.onnx_bundle import export
    from nbp_export.trt_library import Options

    source = _source(host, request)
    host.sources.clear()  # the export uses it up
    options = None
    if runtime.runs_engines:
        with Device.open() as device:
            options = Options(arch=device.arch)
    export(source, folder, dtype, batch, engines=options)


def open_case(host: Host, case: "Case", bundle: Path | None, threads: int | None) -> list[str]:
    """Open the session of a case; what a reader of its times should know."""
    if case.engine.runtime:
        assert bundle
        opened = OpenSession(None, free_before=free_device_memory(case.device))
        opened.session = case.engine.runtime.open(Bundle.open(bundle), OpenOptions(threads))
    else:
        import torch

        if threads:
            torch.set_num_threads(threads)
        device = torch_device(case.device)
        models, before = models_of(host, case.subject, case.dtype, device), _allocated(device)
        spec = spec_of(case, models)
        assert case.engine.open
        opened = OpenSession(case.engine.open(spec, models.generator, models.tokenizer, case.device))
        opened.buffers = _allocated(device) - before
    host.sessions[case] = opened
    return list(getattr(opened.session, "notes", []))


def close_case(host: Host, case: "Case") -> None:
    """Close the session of a case."""
    if opened := host.sessions.pop(case, None):
        opened.session.close()


def _source(host: Host, request: "Request") -> "Source":
    from nbp_export.sources import find, with_block

    weights = _weights(request)
    if weights not in host.sources:
        host.sources.clear()  # one model at a time
        host.sources[weights] = find(request)
    elif weights != request:
        host.sources[weights] = with_block(host.sources[weights], request.block)
    return host.sources[weights]


def _weights(request: "Request") -> "Request":
    """What tells weights apart: random ones fit every block, but for a class-conditional model's vocabulary."""
    if request.weights and not request.checkpoint and "hybrid" not in (request.model or ""):
        return request._replace(block=None)
    return request


def models_of(host: Host, subject: "Subject", dtype: str, device: "torch.device") -> Models:
    """Return the models of a subject in a dtype on a device, and load them if they are not the ones that are open."""
    from nbp_export.graphs import TORCH_DTYPES
    from nbp_export.weights import read_tokenizer, read_whole_generator

    key = (_weights(subject.request) if subject.request else subject.bundle, dtype, device)
    if key not in host.models:
        host.models.clear()
        host.tokenizer_checks.clear()
        if subject.bundle:
            bundle = Bundle.open(subject.bundle)
            generator, tokenizer = read_whole_generator(bundle), read_tokenizer(bundle)
        else:
            assert subject.request
            source = _source(host, subject.request)
            generator, tokenizer = source.generator, source.tokenizer
            host.sources.clear()  # its models are converted in place
        generator = generator.to(device, TORCH_DTYPES[dtype])
        tokenizer = tokenizer.to(device, TORCH_DTYPES[dtype]) if tokenizer else None
        if dtype == "fp32":
            host.models[key] = Models(generator, tokenizer, generator, tokenizer)
        else:
            exact = deepcopy(tokenizer).float() if tokenizer else None
            host.models[key] = Models(generator, tokenizer, deepcopy(generator).float(), exact)
    return host.models[key]


def spec_of(case: "Case", models: Models) -> SystemSpec:
    """The spec of a case, for which the models are set."""
    from nbp_export.graphs import system_spec

    config = models.generator.config
    if case.subject.request and case.subject.request.block:
        config = config.with_block(case.subject.request.block)
    models.generator.config = models.exact_generator.config = config
    tokenizer = models.tokenizer.config if models.tokenizer else None
    return system_spec(config, tokenizer, case.dtype, case.batch)


def torch_device(device: str) -> "torch.device":
    """The device, on which fp32 is fp32 and convolutions are those that were fastest for their shapes."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return torch.device(device)


def _allocated(device: "torch.device") -> int:
    if device.type == "cpu":
        return 0
    import torch

    return torch.cuda.memory_allocated(device)


def free_device_memory(device: str) -> int:
    """Return the free bytes on the GPU; 0 for `cpu`."""
    if device == "cpu":
        return 0
    with Device.open() as opened:
        return opened.free()
