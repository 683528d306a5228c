"""The proof that exported graphs compute what the reference does: the postcondition of every export.

The caches hold random keys and values, different in every layer and never equal to each other, and large finite
garbage in every slot that is not valid: a stale slot that leaks, swapped caches or a wrong mask cannot pass. Once they
are sharpened, so that a valid slot that is overlooked shows as well.
Shape legend: B batch, N heads, S cache slots, D head dim, L tokens in a block.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from nbp_engines.bundle import Bundle
from nbp_engines.registry import DEFAULT
from nbp_engines.runtime import OpenOptions, Runtime
from nbp_engines.session import GraphSession
from nbp_engines.spec import GraphKind, SystemSpec
from nbp_errors import NbpError
from nbp_export.graphs import TORCH_DTYPES
from nbp_export.sharpened import sharpened_caches
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer

# Largest error over the largest expected magnitude. fp32 differs by summation order (about 1e-6 here); fp16 rounds
# every activation to 11 bits, layer after layer (about 2e-3), bf16 to 8. The reference itself in bf16, by PyTorch on a
# CPU, is off by 1.1e-2, 1.9e-2 and 1.9e-2 at 2, 16 and 24 layers of nbp-xl's width (logits and caches, random weights
# of deviation 0.02 and 0.04, 512 tokens at 0 and 16 at 512 to 1248), nbp-tiny by 7e-3 and its tokenizer by 6e-3. A
# fault of structure, such as a stale slot that is seen, is off by about 1. On sharpened caches the reference in bf16 is
# off by 1.2e-2 at most at 24 layers of that width (blocks of 1, 16 and 256).
TOLERANCE = {"fp32": 5e-5, "fp16": 1e-2, "bf16": 5e-2}
GARBAGE = 1000.0


class ParityError(NbpError):
    """A graph that differs from the reference."""


@runtime_checkable
class Graphs(Protocol):
    """What is held against the reference: graphs by name, and caches that can be set and read."""

    spec: SystemSpec

    def run(self, graph: str, **inputs: np.ndarray) -> Any:
        """The first output of a graph, which numpy can make an array of."""
        ...

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite some caches."""
        ...

    def read_states(self) -> dict[str, np.ndarray]:
        """All caches."""
        ...


@runtime_checkable
class OnDevice(Protocol):
    """Graphs whose caches are torch's: they are set and compared where they lie, not by way of the host.

    Attributes:
        caches: by name, in the spec's dtype, on the device that the reference computes on.
    """

    caches: Mapping[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One comparison: how far it may be off, how far it is, and where."""

    graph: str
    at: str
    tolerance: float
    worst: float
    where: str

    @property
    def passed(self) -> bool:
        """Whether the worst element is within the tolerance; a NaN is not."""
        return self.worst <= self.tolerance


def compare(graph: str, at: str, name: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> Check:
    """Worst element of `found` against `expected`, relative to the largest expected magnitude."""
    if not tolerance and np.array_equal(found, expected):  # most of a check's elements, and at once
        return Check(graph, at, tolerance, 0.0, f"{name}[...]: all equal")
    scale = max(1.0, float(np.abs(expected).max()))
    error = np.abs(found.astype(np.float64) - expected) / scale
    error[~np.isfinite(error)] = np.inf
    spot = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
    where = f"{name}{list(spot)}: expected {expected[spot]:.6g}, found {found[spot]:.6g}"
    return Check(graph, at, tolerance, float(error[spot]), where)


class Reference(NamedTuple):
    """What graphs are compared with: the PyTorch model in fp32. A part that is None is not compared."""

    generator: NextBlockTransformer | None
    tokenizer: VideoTokenizer | None = None


def check_bundle(bundle: Bundle, reference: Reference, runtime: Runtime = DEFAULT, seed: int = 0) -> Iterator[Check]:
    """Compare a bundle's graphs, run by a runtime, with the reference; yields each passed check.

    The reference computes in fp32 with weights rounded to the bundle's dtype, and so do the graphs of a bundle in a
    dtype that the runtime cannot compute in. Where each graph has its own copy of the weights, one is open at a time.

    Raises ParityError at the first graph that differs, with its worst element.
    """
    for model, kinds in (
        (reference.generator, {GraphKind.BLOCK_STEP}),
        (reference.tokenizer, {GraphKind.ENCODE, GraphKind.DECODE}),
    ):
        names = [name for name, spec in bundle.manifest.graph_specs().items() if model and spec.kind in kinds]
        rng = torch.Generator().manual_seed(seed)
        for group in [names] if runtime.shares_weights and names else [[name] for name in names]:
            with graph_session(bundle, group, runtime) as session:
                yield from _passed(bundle, check_graphs(session, group, reference, rng), runtime)
            yield from _passed(bundle, _checks_in_fp32(bundle, group, reference, runtime, rng), runtime)


def _checks_in_fp32(
    bundle: Bundle, names: Iterable[str], reference: Reference, runtime: Runtime, rng: torch.Generator
) -> Iterator[Check]:
    """The checks of half-precision steps with sharpened caches, which fp32's tolerance makes far stricter.

    Only where the runtime can run the graphs in fp32 and has not done so already.
    """
    spec = bundle.manifest.spec
    if spec.dtype == "fp32" or spec.dtype not in runtime.dtypes or not runtime.takes_models or not reference.generator:
        return
    steps = [name for name in names if spec.graphs()[name].kind is GraphKind.BLOCK_STEP]
    for name in (name for name in steps if _positions(spec, name)[-1]):
        with _fp32_session(bundle, [name], runtime) as session:
            for check in check_sharpened(session, name, reference.generator, rng):
                yield replace(check, at=f"{check.at}, in fp32 arithmetic")


def check_graphs(session: Graphs, names: Iterable[str], reference: Reference, rng: torch.Generator) -> Iterator[Check]:
    """Compare some graphs of a session with the reference, which is on the rng's device; passed or not."""
    spec = session.spec
    for name in names:
        kind = spec.graphs()[name].kind
        if kind is GraphKind.BLOCK_STEP and reference.generator:
            yield from check_graph(session, name, reference.generator, rng)
        elif reference.tokenizer:
            yield from (check_encode if kind is GraphKind.ENCODE else check_decode)(session, reference.tokenizer, rng)


def graph_session(bundle: Bundle, names: list[str], runtime: Runtime) -> GraphSession:
    """Some graphs in a runtime.

    The generator's are opened lean: rewriting them first would take twice the memory and 20 s on a CPU. The tokenizer's
    weights are few, its arithmetic is what takes time.
    """
    spec = bundle.manifest.spec
    lean = all(spec.graphs()[name].kind is GraphKind.BLOCK_STEP for name in names)
    if spec.dtype in runtime.dtypes or not runtime.takes_models:
        return runtime.open(bundle, OpenOptions(graphs=names, lean=lean))
    return _fp32_session(bundle, names, runtime, lean)


def _fp32_session(bundle: Bundle, names: list[str], runtime: Runtime, lean: bool = True) -> GraphSession:
    """Some graphs of a half-precision bundle in fp32 arithmetic."""
    manifest = replace(bundle.manifest, spec=replace(bundle.manifest.spec, dtype="fp32"))
    twins = {name: fp32_twin(bundle.graph_file(name)) for name in names}
    return runtime.open(replace(bundle, manifest=manifest), OpenOptions(graphs=names, lean=lean, models=twins))


def _passed(bundle: Bundle, checks: Iterator[Check], runtime: Runtime) -> Iterator[Check]:
    while True:
        with torch.inference_mode():  # for one check at a time: whoever reads them must not be left in this mode
            check = next(checks, None)
        if check is None:
            return
        if not check.passed:
            raise ParityError(
                f"{bundle.graph_file(check.graph)}, run by {runtime.name}, differs from the reference "
                f"at {check.at}: {check.where} "
                f"(error {check.worst:.3g} of the largest value, allowed {check.tolerance:g}). "
                "It is not the model: do not use it, and please report this with the command and versions"
            )
        yield check


def fp32_twin(path: Path) -> bytes:
    """The same graph with every fp16 or bf16 tensor in fp32, the weights of the same file widened on the way in.

    ONNX Runtime's CPU kernels know no bf16 arithmetic, and fp16 rounds faults away.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path, load_external_data=False)
    graph, fp32, halves = model.graph, TensorProto.FLOAT, (TensorProto.BFLOAT16, TensorProto.FLOAT16)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type in halves:
            value.type.tensor_type.elem_type = fp32
    for attribute in (a for node in graph.node for a in node.attribute):
        if attribute.name == "to" and attribute.i in halves:
            attribute.i = fp32
        if attribute.HasField("t") and attribute.t.data_type in halves:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
    waiting = {}
    for weight in graph.initializer:
        if weight.data_type in halves:
            stored = f"{weight.name} as stored"
            waiting[weight.name] = helper.make_node("Cast", [stored], [weight.name], to=fp32)
            weight.name = stored
    nodes = []
    for node in graph.node:  # each weight is widened where it is first used, or all would be in memory at once
        nodes += [waiting.pop(name) for name in dict.fromkeys(node.input) if name in waiting]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def step_positions(spec: SystemSpec, name: str = "step") -> list[int]:
    """The first, a middle and the last position that a generation uses the step graph at.

    Where the prediction is one block, no generation steps: then the last position that has room.
    """
    first, size, last = spec.condition_tokens, spec.block_size, spec.capacity - spec.block_size
    if name == "step_1":
        size, last = 1, first + spec.block_size - 1
    elif spec.hybrid:
        first += size
    first = min(first, last)
    steps = (last - first) // size
    return sorted({first + size * s for s in (0, steps // 2, steps)})


def _positions(spec: SystemSpec, name: str) -> list[int]:
    """Where a block graph is checked."""
    return [0] if name == "prefill" else step_positions(spec, name)


def check_graph(session: Graphs, name: str, generator: NextBlockTransformer, rng: torch.Generator) -> Iterator[Check]:
    """Compare a block graph with the reference at the positions that a generation uses it at.

    The caches hold random numbers at each of them, and are sharpened at the last.
    """
    for start in _positions(session.spec, name):
        yield from check_step(session, name, generator, start, rng)
    yield from check_sharpened(session, name, generator, rng)


def check_sharpened(
    session: Graphs, name: str, generator: NextBlockTransformer, rng: torch.Generator
) -> Iterator[Check]:
    """Compare a block graph with the reference at its last position, where most slots are valid, on sharpened caches.

    Where no slot is ever valid there is no such check: in a prefill the call itself holds all that it attends to, and
    those keys and values are the model's own.
    """
    if start := _positions(session.spec, name)[-1]:
        yield from check_step(session, name, generator, start, rng, sharpened=True)


def check_step(
    session: Graphs,
    name: str,
    generator: NextBlockTransformer,
    start: int,
    rng: torch.Generator,
    sharpened: bool = False,
) -> Iterator[Check]:
    """Compare one run of a block graph from `start` on with the reference, which computes where the rng is.

    Valid slots hold normal random numbers, or `sharpened_caches`, for which `start` must not be 0.
    """
    spec, device = session.spec, rng.device
    graph = spec.generator_graphs()[name]
    tokens = torch.randint(spec.vocab, graph.inputs[0].shape, generator=rng, device=device)
    # Rows of a batch at different positions, where there is room: the graph promises one position a row.
    starts = [0 if name == "prefill" else max(start - b * spec.block_size, 0) for b in range(spec.batch)]
    cache_pos = torch.tensor(starts, device=device)
    contents = sharpened_caches(generator, tokens, cache_pos, rng) if sharpened else None
    own = session.caches if isinstance(session, OnDevice) else None
    before: dict[str, Tensor] = {}
    for tensor in spec.caches():
        value = torch.empty(tensor.shape, device=device).uniform_(-GARBAGE / 2, GARBAGE / 2, generator=rng)
        value += value.sign() * GARBAGE / 2
        content = next(contents) if contents else None
        for row, valid in enumerate(starts):
            shown = value[row, :, :valid]
            if content is None:  # a copy is several times as fast as normal numbers in place
                shown[:] = torch.randn(shown.shape, generator=rng, device=device)
            else:
                shown[:] = content[row, :, :valid]
        before[tensor.name] = value.to(TORCH_DTYPES[spec.dtype]).float()
        if own is None:
            session.write_states({tensor.name: before[tensor.name].numpy(force=True)})
        else:
            own[tensor.name].copy_(before[tensor.name])
    names = list(before)
    logits, k_out, v_out = generator.block_step(
        tokens, cache_pos, [before[key] for key in names[0::2]], [before[key] for key in names[1::2]]
    )
    found = session.run(name, tokens=tokens.numpy(force=True), cache_pos=np.array(starts))
    at, tolerance = f"cache_pos {starts}{', sharpened' * sharpened}", TOLERANCE[spec.dtype]
    yield compare(name, at, "logits", np.asarray(found), logits.numpy(force=True), tolerance)
    expected = dict(zip(names, (c for pair in zip(k_out, v_out, strict=True) for c in pair), strict=True))
    new = [(row, slice(None), slice(starts[row], starts[row] + tokens.shape[1])) for row in range(spec.batch)]
    for key, states in (own or session.read_states()).items():
        cache = torch.as_tensor(states, device=device).float()
        written, wanted = (torch.stack([t[at_row] for at_row in new]) for t in (cache, expected[key]))
        yield compare(name, at, f"{key}_out", written.numpy(force=True), wanted.numpy(force=True), tolerance)
        held = before[key].clone()
        for at_row in new:
            held[at_row] = cache[at_row]
        yield _unchanged(name, at, f"{key}_out outside the block", cache, held)


def _unchanged(graph: str, at: str, name: str, found: Tensor, expected: Tensor) -> Check:
    """Whether all elements are equal: nearly always, which is then found out where they lie."""
    if torch.equal(found, expected):
        return Check(graph, at, 0.0, 0.0, f"{name}[...]: all equal")
    return compare(graph, at, name, found.numpy(force=True), expected.numpy(force=True), 0.0)


def check_encode(session: Graphs, tokenizer: VideoTokenizer, rng: torch.Generator) -> Iterator[Check]:
    """Codes may differ only where the reference itself stands within the tolerance of a rounding edge."""
    shape = session.spec.tokenizer_graphs()["encode"].inputs[0].shape
    coarse = torch.rand(*shape[:3], shape[3] // 8, shape[4] // 8, generator=rng, device=rng.device)
    video = torch.nn.functional.interpolate(coarse, shape[2:], mode="trilinear")
    found = torch.from_numpy(np.asarray(session.run("encode", video=video.numpy(force=True)))).to(rng.device)
    bounded = tokenizer.fsq.bound(tokenizer.latents(video)).flatten(1, 3)
    digits = tokenizer.fsq.codes(found) * tokenizer.fsq.half_levels
    # How far beyond its rounding interval the reference's value lies from the digit that the graph chose.
    beyond = ((bounded - digits).abs() - 0.5).clamp(min=0).numpy(force=True)
    tolerance = TOLERANCE[session.spec.dtype] * float(tokenizer.fsq.half_levels.max())
    yield compare("encode", "smooth noise", "tokens beyond a rounding edge", beyond, np.zeros(beyond.shape), tolerance)


def check_decode(session: Graphs, tokenizer: VideoTokenizer, rng: torch.Generator) -> Iterator[Check]:
    """Pixels of random tokens."""
    spec = session.spec
    tokens = torch.randint(tokenizer.config.vocab, (spec.batch, spec.clip_tokens), generator=rng, device=rng.device)
    expected = tokenizer.decode(tokens, spec.latent).numpy(force=True)
    found = np.asarray(session.run("decode", tokens=tokens.numpy(force=True)))
    yield compare("decode", "random tokens", "video", found, expected, TOLERANCE[spec.dtype])
