"""A bundle's trace: the first calls of one clip as the reference makes them, for any implementation to repeat.

The reference computes in fp32 on the bundle's rounded weights, so the trace says what the graphs have to give, not what
they gave. Shape legend: B batch, T tokens in the call, L tokens in a block, P condition tokens, V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbp_engines.bundle import Bundle
from nbp_engines.errors import BundleError
from nbp_engines.generator import Generator
from nbp_engines.manifest import SAMPLING_RULES
from nbp_engines.runtime import Runtime
from nbp_engines.sampling import Sampling
from nbp_engines.session import GraphSession
from nbp_engines.spec import GraphSpec, SystemSpec
from nbp_engines.strict import FROM_0, TEXT, Kind, Rule, check, loads, number, whole, write_json
from nbp_export.parity import TOLERANCE, Check, ParityError, graph_session
from nbp_export.reach import reach
from nbp_export.weights import read_generator
from nbp_reference.model import NextBlockTransformer, tensor_scatter_
from nbp_reference.sampling import sample

TRACE = "trace.json"
SEED, SAMPLE = 0, 0  # of the noise; the seed is the condition's too
STEPS = 2  # of whole blocks
MOST_CALLS = 24  # of nbp-xl, where prefill takes 7 s and every other call 1.6 s, both sides together, on 2 cores
IDS = 16  # logits that are written of a row
ABOUT = (
    "The first calls of one clip, made by the PyTorch reference in fp32 arithmetic on the bundle's weights. "
    "docs/bundle.md of nbp-export says how to check an implementation with it."
)


def traced_calls(spec: SystemSpec) -> list[str]:
    """The graphs that a trace calls, in their order."""
    one_by_one = ["step_1" if spec.block_size > 1 else "step"] * spec.block_size if spec.hybrid else []
    return ["prefill", *one_by_one, *["step"] * min(STEPS, spec.blocks - 1)][:MOST_CALLS]


def traced_ids(spec: SystemSpec) -> list[int]:
    """The ids whose logits a trace has: spread evenly over the vocabulary, its first and last id included."""
    return sorted({i * (spec.vocab - 1) // (IDS - 1) for i in range(IDS)})


def traced_rows(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Clip and row whose logits a trace has, of logits of shape [B,T,V]: the first and the last."""
    return [*dict.fromkeys([(0, 0), (shape[0] - 1, shape[1] - 1)])]


def record_trace(bundle: Bundle) -> Path:
    """Write the trace into a bundle's folder, where all other files are; returns its path.

    Raises NbpError if the index of the bundle's weights does not fit its config.
    """
    spec = bundle.manifest.spec
    known = spec.text_vocab if spec.hybrid else spec.vocab
    condition = np.random.default_rng(SEED).integers(0, known, (spec.batch, spec.condition_tokens))
    with torch.inference_mode():
        recorder = _Recorder(bundle, read_generator(bundle))
        recorder.play(condition, SEED, SAMPLE)
    trace = {
        "about": ABOUT,
        "seed": SEED,
        "sample": SAMPLE,
        "sampling": asdict(recorder.sampling),
        "condition": condition.tolist(),
        "vocabulary_ids": traced_ids(spec),
        "calls": recorder.calls,
    }
    write_json(bundle.path / TRACE, trace)
    return bundle.path / TRACE


def read_trace(bundle: Bundle) -> dict[str, Any]:
    """The trace of a bundle, in which every value is possible.

    Raises BundleError if there is none, or if it is one of another spec.
    """
    path = bundle.path / TRACE
    if TRACE not in {file.path for file in bundle.manifest.files}:
        raise BundleError(f"{bundle.path} has no {TRACE} to check it with: export it again; {bundle.manifest.origin}")
    try:
        trace: dict[str, Any] = loads(path.read_bytes())
        check(trace, _rules(bundle.manifest.spec), "trace")
    except BundleError as error:
        raise BundleError(f"{path}: {error.message}") from error
    return trace


def check_trace(bundle: Bundle, trace: Mapping[str, Any], runtime: Runtime) -> Iterator[Check]:
    """Repeat the trace with a bundle's graphs, run by a runtime; yields the checks of its calls, all passed.

    What is fed are the trace's tokens, whatever the runtime would have drawn. Its logits may be as far off as in any
    other check of parity. The tokens that it draws from its own logits have to be the trace's, except where the
    uniform lies so near an edge of the token's interval that an allowed error of the logits moves the edge across it.

    Raises ParityError, which names call and row, for the first value that differs, and EngineError if the runtime
    cannot run the graphs.
    """
    with _Replay(bundle, runtime, trace) as replay:
        replay.play(np.array(trace["condition"]), trace["seed"], trace["sample"])
    yield from replay.checks


class _Complete(Exception):  # noqa: N818 - it is not an error
    """All calls of a trace have been made."""


@dataclass
class _Graph:
    """A graph whose runs are answered by a function of its name and its inputs."""

    spec: GraphSpec
    answer: Callable[[str, Mapping[str, np.ndarray]], Any]

    def run(self, inputs: Mapping[str, np.ndarray]) -> Any:
        return self.answer(self.spec.name, inputs)


class _Script(GraphSession):
    """A session on which the generation loop makes the calls of a trace, and no more.

    Attributes:
        number: of the call under way, from 0.
    """

    def __init__(self, bundle: Bundle, sampling: Sampling) -> None:
        super().__init__(bundle)
        self.sampling = sampling
        self.number = -1
        self.graphs = {name: _Graph(spec, self._next) for name, spec in self.spec.generator_graphs().items()}

    def play(self, condition: np.ndarray, seed: int, sample: int) -> None:
        """Generate from a condition [B,P], tokens in raster order or text ids, as far as the trace goes."""
        with suppress(_Complete):
            for _ in Generator(self, seed=seed).blocks(condition, sample):
                pass

    def _next(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Any:
        if self.number + 1 == len(traced_calls(self.spec)):
            raise _Complete
        self.number += 1
        return self.answer(graph, inputs)

    @abstractmethod
    def answer(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Any:
        """The logits of one call."""

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Nothing: the loop alone sets the states."""

    def read_states(self) -> dict[str, np.ndarray]:
        """Nothing, likewise."""
        return {}

    def close(self) -> None:
        """Nothing is held."""


class _Recorder(_Script):
    """The reference, with a note of each call.

    Attributes:
        calls: as they stand in the file.
    """

    def __init__(self, bundle: Bundle, generator: NextBlockTransformer) -> None:
        super().__init__(bundle, bundle.manifest.sampling)
        self.calls: list[dict[str, Any]] = []
        self._generator = generator
        self._caches = [torch.zeros(tensor.shape) for tensor in self.spec.caches()]

    def answer(self, graph: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The reference's logits."""
        tokens, cache_pos = (torch.from_numpy(inputs[name]) for name in ("tokens", "cache_pos"))
        logits_BTV, _, _ = self._generator.block_step(
            tokens, cache_pos, self._caches[0::2], self._caches[1::2], write=tensor_scatter_
        )
        ids = traced_ids(self.spec)
        call = {
            "graph": graph,
            "tokens": tokens.tolist(),
            "cache_pos": cache_pos.tolist(),
            "largest": _shortened(logits_BTV.abs().max()),
            "logits": [
                {"clip": clip, "row": row, "values": [_shortened(value) for value in logits_BTV[clip, row, ids]]}
                for clip, row in traced_rows(logits_BTV.shape)
            ],
            "uniforms": None,  # nothing is drawn from the logits of a hybrid's text
            "drawn": None,
        }
        self.calls.append(call)
        return logits_BTV.numpy()

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens as the reference draws them, row by row: all rows of a large block at once would take a gigabyte."""
        rows_NV, noise_N = torch.from_numpy(logits).flatten(0, 1), torch.from_numpy(uniforms).flatten()
        drawn = [
            sample(row, u, settings.temperature, settings.top_k, settings.top_p)
            for row, u in zip(rows_NV, noise_N, strict=True)
        ]
        tokens = torch.stack(drawn).reshape(uniforms.shape).numpy()
        self.calls[-1] |= {"uniforms": uniforms.tolist(), "drawn": tokens.tolist()}
        return tokens


class _Replay(_Script):
    """A bundle's graphs in a runtime, each call held against the trace.

    Where each graph has its own copy of the weights, one is open at a time, and hands its caches to the next.

    Attributes:
        checks: of the calls so far, all passed.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, trace: Mapping[str, Any]) -> None:
        super().__init__(bundle, Sampling(**trace["sampling"]))
        self.checks: list[Check] = []
        self._runtime = runtime
        self._trace = trace
        self._running: GraphSession | None = None

    def answer(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Any:
        """The runtime's logits, which are the trace's within the tolerance."""
        for name, value in inputs.items():
            self._expect(name, value.tolist())
        logits = self._opened(graph).run(graph, **inputs)
        call, values_BTV = self._call, np.asarray(logits)
        pairs = [(f"largest magnitude of the {values_BTV.size} logits", np.abs(values_BTV).max(), call["largest"])]
        for row in call["logits"]:
            values = values_BTV[row["clip"], row["row"]][self._trace["vocabulary_ids"]]
            for i, value, expected in zip(self._trace["vocabulary_ids"], values, row["values"], strict=True):
                pairs.append((f"logit {i} of clip {row['clip']}, row {row['row']}", value, expected))
        errors = np.array([abs(float(value) - expected) for _, value, expected in pairs]) / max(1.0, call["largest"])
        errors[~np.isfinite(errors)] = np.inf
        name, value, expected = pairs[errors.argmax()]
        where = f"{name}: expected {expected:.6g}, computed {value:.6g}"
        self._add(Check(graph, self._at, self._tolerance, float(errors.max()), where))
        return logits

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """The trace's tokens, which the runtime draws too, but for those that an allowed error of its logits moves."""
        self._expect("uniforms", uniforms.tolist())
        call, expected = self._call, np.array(self._call["drawn"])
        drawn = self._opened(call["graph"]).sample(logits, uniforms, settings)
        allowed = self._tolerance * max(1.0, call["largest"])
        beyond, where = 0.0, f"tokens: all {expected.size} equal"
        differing = np.argwhere(drawn != expected)
        for clip, row in differing:
            token, u = expected[clip, row], uniforms[clip, row]
            least, most = reach(np.asarray(logits)[clip, row].astype(np.float64), token, settings, allowed)
            distance = max(least - u, u - most, 0.0)
            if distance >= beyond:
                beyond = distance
                where = (
                    f"{len(differing)} of {expected.size} tokens differ; clip {clip}, row {row}: expected {token}, "
                    f"drawn {drawn[clip, row]} with {u}, where an allowed error of the logits lets uniforms from "
                    f"{least:.6g} to {most:.6g} give {token}"
                )
        self._add(Check(call["graph"], self._at, 0.0, float(beyond), where))
        return expected

    def close(self) -> None:
        """Close the runtime's session."""
        if self._running:
            self._running.close()

    @property
    def _call(self) -> dict[str, Any]:
        call: dict[str, Any] = self._trace["calls"][self.number]
        return call

    @property
    def _at(self) -> str:
        return f"trace, call {self.number}"

    @property
    def _tolerance(self) -> float:
        """Of the dtype that the runtime computes in."""
        assert self._running is not None
        return TOLERANCE[self._running.spec.dtype]

    def _opened(self, graph: str) -> GraphSession:
        """The session that has the graph, and the states of the calls before."""
        if self._running is None or graph not in self._running.graphs:
            states = self._running.read_states() if self._running else {}
            self.close()
            names = [*self.graphs] if self._runtime.shares_weights else [graph]
            self._running = graph_session(self.bundle, names, self._runtime)
            self._running.write_states(states)
        return self._running

    def _expect(self, name: str, value: object) -> None:
        """Raise ParityError unless the trace has what the loop feeds."""
        if self._call[name] != value:
            raise ParityError(
                f"{self.bundle.path / TRACE}: {name} of call {self.number} are not those that the loop feeds after the "
                f"calls before it: the trace is not this bundle's. Export it again; {self.bundle.manifest.origin}"
            )

    def _add(self, check: Check) -> None:
        if not check.passed:
            raise ParityError(
                f"{self.bundle.graph_file(check.graph)}, run by {self._runtime.name}, does not repeat {TRACE} in call "
                f"{self.number}: {check.where} (error {check.worst:.3g}, allowed {check.tolerance:g}). Graph or "
                f"trace is not the model's: do not use the bundle, export it again; {self.bundle.manifest.origin}"
            )
        self.checks.append(check)


def _shortened(value: Any) -> float:
    """A logit in six digits, a hundredth of the closest tolerance: the file is shorter, and alike on more machines."""
    return float(f"{float(value):.6g}")


def _rules(spec: SystemSpec) -> Rule:
    """What a trace of a bundle is: every length follows from the spec."""

    def array(each: Rule, *shape: int) -> Rule:
        for size in reversed(shape):
            each = (each,) * size
        return each

    def exactly(value: object) -> Kind:
        return Kind(repr(value), lambda v: type(v) is type(value) and v == value)

    def call(number: int, name: str) -> Rule:
        graph = spec.generator_graphs()[name]
        logits = graph.outputs[0].shape
        draws = number > 0 or not spec.hybrid
        return {
            "graph": exactly(name),
            "tokens": array(token, *graph.inputs[0].shape),
            "cache_pos": array(whole(0, spec.capacity), spec.batch),
            "largest": FROM_0,
            "logits": tuple(
                {"clip": exactly(clip), "row": exactly(row), "values": array(finite, len(traced_ids(spec)))}
                for clip, row in traced_rows(logits)
            ),
            "uniforms": array(uniform, *logits[:2]) if draws else exactly(None),
            "drawn": array(token, *logits[:2]) if draws else exactly(None),
        }

    token, finite = whole(0, spec.vocab - 1), number("a number", lambda _: True)
    uniform = number("a number from 0 up and below 1", lambda v: 0 <= v < 1)
    known = spec.text_vocab if spec.hybrid else spec.vocab
    return {
        "about": TEXT,
        "seed": whole(0, 2**64 - 1),
        "sample": whole(0, 2**63 - 1),
        "sampling": SAMPLING_RULES,
        "condition": array(whole(0, known - 1), spec.batch, spec.condition_tokens),
        "vocabulary_ids": tuple(exactly(i) for i in traced_ids(spec)),
        "calls": tuple(call(number, name) for number, name in enumerate(traced_calls(spec))),
    }
