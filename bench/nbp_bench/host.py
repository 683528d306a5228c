"""The models and sessions that a worker process keeps open: for one engine, or for all PyTorch engines of a dtype.

The parent calls the functions here and in measure.py through a `Worker`. Their first argument is the `Host` of the
process. Torch is imported inside the functions that need it, so that it does not count in the memory of an engine that
runs a bundle on a CPU.
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

    from nbp_bench.plan import Candidate, Case
    from nbp_export.parity import Check
    from nbp_export.request import Request
    from nbp_export.sources import Source
    from nbp_reference.model import NextBlockTransformer
    from nbp_reference.tokenizer import VideoTokenizer


class Identity(NamedTuple):
    """The facts about a model that remain known after its weights are freed.

    Attributes:
        name, trained: the record's `model` and `trained`.
        digest: the record's `weights_sha256`.
        note: one line that describes the model.
        spec: the model's spec in fp32 for a batch of one clip.
        parameters: the number of parameters of the generator and the tokenizer together.
        words: the word of each text id, if the model is class-conditional and has a vocabulary of its own; else empty.
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
    """A generator and its tokenizer in a dtype on a device, and the same weights in fp32.

    In fp32 `exact_generator` and `exact_tokenizer` are the same objects as `generator` and `tokenizer`.
    """

    generator: "NextBlockTransformer"
    tokenizer: "VideoTokenizer | None"
    exact_generator: "NextBlockTransformer"
    exact_tokenizer: "VideoTokenizer | None"

    def nbytes(self, session: Any) -> int:
        """Return the bytes of the parameters that a session shares with these models.

        The tokenizer does not count if the session has made a copy of it.
        """
        tokenizer = self.tokenizer if session.tokenizer is self.tokenizer else None
        models = [model for model in (self.generator, tokenizer) if model]
        return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


@dataclass
class OpenSession:
    """An open session and its memory on the GPU.

    Attributes:
        session: the session.
        buffers: bytes that torch allocated on the GPU while a PyTorch session was opened.
        free_before: free bytes on the GPU before the session of a bundle was opened.
    """

    session: Any
    buffers: int = 0
    free_before: int = 0


class Host:
    """The state that a worker process keeps between calls.

    Attributes:
        models: the loaded models, by weights, dtype and device; at most one entry.
        sources: the model that was found last, by its request; at most one entry.
        digests: SHA-256 of the weights, by the part of the request that determines them.
        sessions: open sessions by case.
        tokenizer_checks: results of comparing a tokenizer with the reference, which the engines of `models` share.
    """

    def __init__(self) -> None:
        self.models: dict[object, Models] = {}
        self.sources: dict[object, Source] = {}
        self.digests: dict[object, str] = {}
        self.sessions: dict[Case, OpenSession] = {}
        self.tokenizer_checks: dict[object, list[Check]] = {}

    def session(self, case: "Case") -> Any:
        """Return the open session of a case."""
        return self.sessions[case].session

    def cuda_failed(self) -> bool:
        """Return whether CUDA has failed in this process, so that every later call to it fails too."""
        if "torch" not in sys.modules:
            return False
        from nbp_bench.device import cuda_failed

        return cuda_failed()

    def cuda_works(self) -> bool:
        """Return whether CUDA is in use and still works, so that the models on the GPU can be kept after an error."""
        if "torch" not in sys.modules:
            return False
        import torch

        return torch.cuda.is_initialized() and not self.cuda_failed()

    def close(self) -> None:
        """Close all sessions."""
        for case in [*self.sessions]:
            close_case(self, case)


def identify(host: Host, request: "Request") -> Identity:
    """Find a model and hash its weights.

    Raises NbpError if the model cannot be found or read.
    """
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


def gpu_architecture(host: Host) -> str:  # noqa: ARG001 - every call has a host
    """Return the architecture of the GPU, such as `sm80`. Raises EngineError without one."""
    with Device.open() as device:
        return device.arch


def export_bundle(host: Host, request: "Request", dtype: str, batch: int, runtime: Runtime, folder: Path) -> None:
    """Export a model to a bundle in `folder` and prove it.

    If the runtime runs TensorRT engines, they are built for this machine's GPU. Raises NbpError if the export fails.
    """
    from nbp_export.onnx_bundle import export
    from nbp_export.trt_library import Options

    source = _source(host, request)
    host.sources.clear()  # the export frees the models of the source
    options = None
    if runtime.runs_engines:
        with Device.open() as device:
            options = Options(arch=device.arch)
    export(source, folder, dtype, batch, engines=options)


def open_case(host: Host, case: "Case", bundle: Path | None, threads: int | None) -> list[str]:
    """Open the session of a case and return notes that explain its times.

    Args:
        host: the state of this process.
        case: the case; its engine is either a PyTorch engine or a runtime.
        bundle: the folder that the runtime opens; None for a PyTorch engine.
        threads: CPU threads inside an operator; None leaves the number to torch or the runtime.

    Raises NbpError if the session cannot be opened.
    """
    if case.engine.runtime:
        assert bundle
        opened = OpenSession(None, free_before=free_device_memory(case.device))
        opened.session = case.engine.runtime.open(Bundle.open(bundle), OpenOptions(threads))
    else:
        import torch

        if threads:
            torch.set_num_threads(threads)
        device = torch_device(case.device)
        models, before = models_of(host, case.candidate, case.dtype, device), _allocated(device)
        spec = spec_of(case, models)
        assert case.engine.open
        opened = OpenSession(case.engine.open(spec, models.generator, models.tokenizer, case.device))
        opened.buffers = _allocated(device) - before
    host.sessions[case] = opened
    return list(getattr(opened.session, "notes", []))


def close_case(host: Host, case: "Case") -> None:
    """Close the session of a case, if it is open."""
    if opened := host.sessions.pop(case, None):
        opened.session.close()


def _source(host: Host, request: "Request") -> "Source":
    """Return the model that a request names, set to its block; random weights of the last call are used again."""
    from nbp_export.sources import find, with_block

    weights = _weights(request)
    if weights not in host.sources:
        host.sources.clear()  # so that only one model is in memory
        host.sources[weights] = find(request)
    elif weights != request:
        host.sources[weights] = with_block(host.sources[weights], request.block)
    return host.sources[weights]


def _weights(request: "Request") -> "Request":
    """Return the request without what does not change the weights, as a key for them.

    Random weights fit every block, except in a class-conditional model, whose vocabulary depends on the block.
    """
    if request.weights and not request.checkpoint and "hybrid" not in (request.model or ""):
        return request._replace(block=None)
    return request


def models_of(host: Host, candidate: "Candidate", dtype: str, device: "torch.device") -> Models:
    """Return the models of a candidate in a dtype on a device; load them first if the host holds others."""
    from nbp_export.graphs import TORCH_DTYPES
    from nbp_export.weights import read_tokenizer, read_whole_generator

    key = (_weights(candidate.request) if candidate.request else candidate.bundle, dtype, device)
    if key not in host.models:
        host.models.clear()
        host.tokenizer_checks.clear()
        if candidate.bundle:
            bundle = Bundle.open(candidate.bundle)
            generator, tokenizer = read_whole_generator(bundle), read_tokenizer(bundle)
        else:
            assert candidate.request
            source = _source(host, candidate.request)
            generator, tokenizer = source.generator, source.tokenizer
            host.sources.clear()  # the models of the source are converted in place below
        generator = generator.to(device, TORCH_DTYPES[dtype])
        tokenizer = tokenizer.to(device, TORCH_DTYPES[dtype]) if tokenizer else None
        if dtype == "fp32":
            host.models[key] = Models(generator, tokenizer, generator, tokenizer)
        else:
            exact = deepcopy(tokenizer).float() if tokenizer else None
            host.models[key] = Models(generator, tokenizer, deepcopy(generator).float(), exact)
    return host.models[key]


def spec_of(case: "Case", models: Models) -> SystemSpec:
    """Set the models to the block of a case and return the case's spec."""
    from nbp_export.graphs import system_spec

    config = models.generator.config
    if case.candidate.request and case.candidate.request.block:
        config = config.with_block(case.candidate.request.block)
    models.generator.config = models.exact_generator.config = config
    tokenizer = models.tokenizer.config if models.tokenizer else None
    return system_spec(config, tokenizer, case.dtype, case.batch)


def torch_device(device: str) -> "torch.device":
    """Return the torch device of this name.

    Turns off TF32 in this process, and turns on cuDNN's search for the fastest convolution of each shape.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return torch.device(device)


def _allocated(device: "torch.device") -> int:
    """Return the bytes that torch has allocated on a GPU; 0 on the CPU."""
    if device.type == "cpu":
        return 0
    import torch

    return torch.cuda.memory_allocated(device)


def free_device_memory(device: str) -> int:
    """Return the free bytes on the GPU; 0 if the device is `cpu`."""
    if device == "cpu":
        return 0
    with Device.open() as opened:
        return opened.free_bytes()
