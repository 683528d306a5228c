"""Checks that graphs compute what the reference computes. Every export ends with these checks.

Before each call, the caches hold random keys and values in the valid slots, different in every layer, and large finite
garbage in all other slots. Stale slots that are attended to, swapped caches and wrong masks therefore fail. One check
uses sharpened caches, with which a valid slot that is not attended to fails too.
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

# The largest allowed error, relative to the largest expected magnitude. In fp32, errors come from the order of
# summation (about 1e-6 here). fp16 rounds every activation to 11 bits in each layer (about 2e-3), and bf16 to 8 bits.
# The reference itself in bf16, in PyTorch on a CPU, has errors of 1.1e-2, 1.9e-2 and 1.9e-2 with 2, 16 and 24 layers
# of nbp-xl's width (logits and caches, random weights of standard deviation 0.02 and 0.04, 512 tokens at position 0
# and 16 tokens at positions 512 to 1248); nbp-tiny has 7e-3 and its tokenizer 6e-3. On sharpened caches the reference
# in bf16 has errors of at most 1.2e-2 with 24 layers of that width (blocks of 1, 16 and 256 tokens). A structural
# fault, such as attention to a stale slot, gives an error of about 1.
TOLERANCE = {"fp32": 5e-5, "fp16": 1e-2, "bf16": 5e-2}
GARBAGE = 1000.0  # the largest magnitude in unused slots; the smallest is half of it


class ParityError(NbpError):
    """A graph differs from the reference."""


@runtime_checkable
class Graphs(Protocol):
    """Graphs that can be compared with the reference: they run by name, and their caches can be written and read."""

    spec: SystemSpec

    def run(self, graph: str, **inputs: np.ndarray) -> Any:
        """Run a graph and return its first output, which numpy can convert to an array."""
        ...

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite some caches."""
        ...

    def read_states(self) -> dict[str, np.ndarray]:
        """Return all caches."""
        ...


@runtime_checkable
class OnDevice(Protocol):
    """Graphs whose caches are torch tensors, so that they are written and compared without a copy to the host.

    Attributes:
        caches: the caches by name, in the spec's dtype, on the device on which the reference computes.
    """

    caches: Mapping[str, Tensor]


@dataclass(frozen=True)
class Check:
    """The result of one comparison.

    Attributes:
        graph: the name of the graph.
        at: the inputs of the call, such as its cache positions.
        tolerance: the largest allowed error, relative to the largest expected magnitude.
        worst: the largest error, relative in the same way.
        where: the place of the largest error, and both values.
    """

    graph: str
    at: str
    tolerance: float
    worst: float
    where: str

    @property
    def passed(self) -> bool:
        """Whether the largest error is within the tolerance. A NaN is not."""
        return self.worst <= self.tolerance


def compare(graph: str, at: str, name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> Check:
    """Return the largest error of `actual`, relative to the largest expected magnitude or, if larger, to 1."""
    if not tolerance and np.array_equal(actual, expected):  # a fast path for the common case
        return Check(graph, at, tolerance, 0.0, f"{name}[...]: all equal")
    scale = max(1.0, float(np.abs(expected).max()))
    error = np.abs(actual.astype(np.float64) - expected) / scale
    error[~np.isfinite(error)] = np.inf
    spot = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
    where = f"{name}{list(spot)}: expected {expected[spot]:.6g}, found {actual[spot]:.6g}"
    return Check(graph, at, tolerance, float(error[spot]), where)


class Reference(NamedTuple):
    """The PyTorch model in fp32 with which graphs are compared. A part that is None is not compared."""

    generator: NextBlockTransformer | None
    tokenizer: VideoTokenizer | None = None


def check_bundle(bundle: Bundle, reference: Reference, runtime: Runtime = DEFAULT, seed: int = 0) -> Iterator[Check]:
    """Compare a bundle's graphs in a runtime with the reference; yield each check that passed.

    The reference computes in fp32 with weights rounded to the bundle's dtype. If the runtime cannot compute in the
    bundle's dtype, the graphs are run as fp32 copies on the same weights. If each graph needs its own copy of the
    weights, one graph is open at a time.

    Raises ParityError with the largest error of the first check that fails.
    """
    for model, kinds in (
        (reference.generator, {GraphKind.BLOCK_STEP}),
        (reference.tokenizer, {GraphKind.ENCODE, GraphKind.DECODE}),
    ):
        names = [name for name, spec in bundle.manifest.graph_specs().items() if model and spec.kind in kinds]
        rng = torch.Generator().manual_seed(seed)
        for group in [names] if runtime.shares_weights and names else [[name] for name in names]:
            with graph_session(bundle, group, runtime) as session:
                yield from _require_passed(bundle, check_graphs(session, group, reference, rng), runtime)
            yield from _require_passed(bundle, _checks_in_fp32(bundle, group, reference, runtime, rng), runtime)


def _checks_in_fp32(
    bundle: Bundle, names: Iterable[str], reference: Reference, runtime: Runtime, rng: torch.Generator
) -> Iterator[Check]:
    """Yield checks of half-precision graphs in fp32 arithmetic, on sharpened caches, with the strict tolerance of fp32.

    There are none if the runtime cannot run the graphs in fp32, or has already done so.
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
    """Compare some graphs of a session with the reference, which is on the rng's device; yield all checks."""
    spec = session.spec
    for name in names:
        kind = spec.graphs()[name].kind
        if kind is GraphKind.BLOCK_STEP:
            if reference.generator:
                yield from check_graph(session, name, reference.generator, rng)
        elif reference.tokenizer:
            yield from (check_encode if kind is GraphKind.ENCODE else check_decode)(session, reference.tokenizer, rng)


def graph_session(bundle: Bundle, names: list[str], runtime: Runtime) -> GraphSession:
    """Open some graphs in a runtime.

    Graphs of the generator are opened with `lean`, because optimising them would take twice the memory and 20 s on a
    CPU. Those of the tokenizer are optimised, because they have few weights and much arithmetic.
    """
    spec = bundle.manifest.spec
    lean = all(spec.graphs()[name].kind is GraphKind.BLOCK_STEP for name in names)
    if spec.dtype in runtime.dtypes or not runtime.takes_models:
        return runtime.open(bundle, OpenOptions(graphs=names, lean=lean))
    return _fp32_session(bundle, names, runtime, lean)


def _fp32_session(bundle: Bundle, names: list[str], runtime: Runtime, lean: bool = True) -> GraphSession:
    """Open some graphs of a half-precision bundle in fp32 arithmetic."""
    manifest = replace(bundle.manifest, spec=replace(bundle.manifest.spec, dtype="fp32"))
    twins = {name: fp32_twin(bundle.graph_file(name)) for name in names}
    return runtime.open(replace(bundle, manifest=manifest), OpenOptions(graphs=names, lean=lean, models=twins))


def _require_passed(bundle: Bundle, checks: Iterator[Check], runtime: Runtime) -> Iterator[Check]:
    """Yield the checks; raises ParityError at the first that did not pass."""
    while True:
        with torch.inference_mode():  # not around the yield, because the mode would also apply to the caller
            check = next(checks, None)
        if check is None:
            return
        if not check.passed:
            raise ParityError(
                f"{bundle.graph_file(check.graph)}, run by {runtime.name}, differs from the reference "
                f"at {check.at}: {check.where} "
                f"(error {check.worst:.3g} of the largest value, allowed {check.tolerance:g}). "
                "Do not use this graph, and please report this with the command and versions"
            )
        yield check


def fp32_twin(path: Path) -> bytes:
    """Return a copy of a graph in which fp16 and bf16 tensors are fp32; it casts the stored weights to fp32.

    It is needed because ONNX Runtime's CPU kernels do not compute in bf16, and because rounding in fp16 hides small
    faults.
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
    casts = {}
    for weight in graph.initializer:
        if weight.data_type in halves:
            stored = f"{weight.name} as stored"
            casts[weight.name] = helper.make_node("Cast", [stored], [weight.name], to=fp32)
            weight.name = stored
    nodes = []
    for node in graph.node:  # each weight is cast just before its first use, so that not all are in memory at once
        nodes += [casts.pop(name) for name in dict.fromkeys(node.input) if name in casts]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def step_positions(spec: SystemSpec, name: str = "step") -> list[int]:
    """Return the first, a middle and the last cache position at which a generation calls a step graph.

    If the whole prediction is one block, a generation has no steps; then the only position is the last one with room.
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
    """Return the cache positions at which a block graph is checked."""
    return [0] if name == "prefill" else step_positions(spec, name)


def check_graph(session: Graphs, name: str, generator: NextBlockTransformer, rng: torch.Generator) -> Iterator[Check]:
    """Compare a block graph with the reference at positions at which a generation calls it.

    The caches hold random numbers at each of these positions, and sharpened contents once more at the last.
    """
    for start in _positions(session.spec, name):
        yield from check_step(session, name, generator, start, rng)
    yield from check_sharpened(session, name, generator, rng)


def check_sharpened(
    session: Graphs, name: str, generator: NextBlockTransformer, rng: torch.Generator
) -> Iterator[Check]:
    """Compare a block graph with the reference on sharpened caches, at its last position, where most slots are valid.

    There is no check if no slot is ever valid before the call. A prefill attends only to its own tokens, whose keys and
    values the model computes.
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
    """Compare one call of a block graph at position `start` with the reference, which is on the rng's device.

    Valid slots hold normal random numbers or, if `sharpened`, `sharpened_caches`; then `start` must not be 0.
    """
    spec, device = session.spec, rng.device
    graph = spec.generator_graphs()[name]
    tokens = torch.randint(spec.vocab, graph.inputs[0].shape, generator=rng, device=device)
    # Rows of the batch are at different positions if there is room, because a graph takes one position per row.
    starts = [0 if name == "prefill" else max(start - b * spec.block_size, 0) for b in range(spec.batch)]
    cache_pos = torch.tensor(starts, device=device)
    contents = sharpened_caches(generator, tokens, cache_pos, rng) if sharpened else None
    device_caches = session.caches if isinstance(session, OnDevice) else None
    before: dict[str, Tensor] = {}
    for tensor in spec.caches():
        value = torch.empty(tensor.shape, device=device).uniform_(-GARBAGE / 2, GARBAGE / 2, generator=rng)
        value += value.sign() * GARBAGE / 2
        content = next(contents) if contents else None
        for row, valid in enumerate(starts):
            valid_slots = value[row, :, :valid]
            if content is None:  # to copy normal numbers is several times as fast as to draw them in place
                valid_slots[:] = torch.randn(valid_slots.shape, generator=rng, device=device)
            else:
                valid_slots[:] = content[row, :, :valid]
        before[tensor.name] = value.to(TORCH_DTYPES[spec.dtype]).float()
        if device_caches is None:
            session.write_states({tensor.name: before[tensor.name].numpy(force=True)})
        else:
            device_caches[tensor.name].copy_(before[tensor.name])
    names = list(before)
    logits, k_out, v_out = generator.block_step(
        tokens, cache_pos, [before[key] for key in names[0::2]], [before[key] for key in names[1::2]]
    )
    actual = session.run(name, tokens=tokens.numpy(force=True), cache_pos=np.array(starts))
    at, tolerance = f"cache_pos {starts}{', sharpened' * sharpened}", TOLERANCE[spec.dtype]
    yield compare(name, at, "logits", np.asarray(actual), logits.numpy(force=True), tolerance)
    expected = dict(zip(names, (c for pair in zip(k_out, v_out, strict=True) for c in pair), strict=True))
    new = [(row, slice(None), slice(starts[row], starts[row] + tokens.shape[1])) for row in range(spec.batch)]
    for key, states in (device_caches or session.read_states()).items():
        cache = torch.as_tensor(states, device=device).float()
        written, wanted = (torch.stack([t[at_row] for at_row in new]) for t in (cache, expected[key]))
        yield compare(name, at, f"{key}_out", written.numpy(force=True), wanted.numpy(force=True), tolerance)
        unchanged = before[key].clone()
        for at_row in new:
            unchanged[at_row] = cache[at_row]
        yield _check_equal(name, at, f"{key}_out outside the block", cache, unchanged)


def _check_equal(graph: str, at: str, name: str, actual: Tensor, expected: Tensor) -> Check:
    """Compare with a tolerance of 0. Equal tensors, the common case, are compared on their device."""
    if torch.equal(actual, expected):
        return Check(graph, at, 0.0, 0.0, f"{name}[...]: all equal")
    return compare(graph, at, name, actual.numpy(force=True), expected.numpy(force=True), 0.0)


def check_encode(session: Graphs, tokenizer: VideoTokenizer, rng: torch.Generator) -> Iterator[Check]:
    """Compare the tokens of a smooth random video. A token may differ only near the edge of two codes."""
    shape = session.spec.tokenizer_graphs()["encode"].inputs[0].shape
    coarse = torch.rand(*shape[:3], shape[3] // 8, shape[4] // 8, generator=rng, device=rng.device)
    video = torch.nn.functional.interpolate(coarse, shape[2:], mode="trilinear")
    actual = torch.from_numpy(np.asarray(session.run("encode", video=video.numpy(force=True)))).to(rng.device)
    bounded = tokenizer.fsq.bound(tokenizer.latents(video)).flatten(1, 3)
    digits = tokenizer.fsq.codes(actual) * tokenizer.fsq.half_levels
    # The distance of the reference's value from the interval that rounds to the digit which the graph chose.
    beyond = ((bounded - digits).abs() - 0.5).clamp(min=0).numpy(force=True)
    tolerance = TOLERANCE[session.spec.dtype] * float(tokenizer.fsq.half_levels.max())
    yield compare("encode", "smooth noise", "tokens beyond a rounding edge", beyond, np.zeros(beyond.shape), tolerance)


def check_decode(session: Graphs, tokenizer: VideoTokenizer, rng: torch.Generator) -> Iterator[Check]:
    """Compare the pixels of random tokens."""
    spec = session.spec
    tokens = torch.randint(tokenizer.config.vocab, (spec.batch, spec.clip_tokens), generator=rng, device=rng.device)
    expected = tokenizer.decode(tokens, spec.latent).numpy(force=True)
    actual = np.asarray(session.run("decode", tokens=tokens.numpy(force=True)))
    yield compare("decode", "random tokens", "video", actual, expected, TOLERANCE[spec.dtype])
