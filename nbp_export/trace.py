"""Records and checks a bundle's trace: the first calls of one clip, with the results that the reference computes.

The reference computes in fp32 on the bundle's rounded weights. The trace therefore holds the correct results, not the
results of the bundle's graphs, and any implementation can be checked with it.
Shape legend: B batch, T tokens in the call, L tokens in a block, P condition tokens, V vocabulary.
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
from nbp_engines.strict import FROM_0, TEXT, Kind, Rule, check, loads, number, whole
from nbp_export.parity import TOLERANCE, Check, ParityError, graph_session
from nbp_export.uniform_interval import uniform_interval
from nbp_export.weights import read_generator
from nbp_files import write_json
from nbp_reference.model import NextBlockTransformer, tensor_scatter_
from nbp_reference.sampling import sample

TRACE = "trace.json"
SEED, CLIP_INDEX = 0, 0  # select the noise; the seed also selects the random condition
STEPS = 2  # the number of recorded steps of whole blocks
MAX_CALLS = 24  # nbp-xl on 2 cores takes 7 s to record and repeat the prefill, and 1.6 s for every other call
IDS = 16  # the number of logits that are recorded per row
ABOUT = (
    "The first calls of one clip, made by the PyTorch reference in fp32 arithmetic on the bundle's weights. "
    "docs/bundle.md of nbp-export says how to check an implementation with it."
)


def traced_calls(spec: SystemSpec) -> list[str]:
    """Return the names of the graphs that a trace calls, in order."""
    one_by_one = ["step_1" if spec.block_size > 1 else "step"] * spec.block_size if spec.hybrid else []
    return ["prefill", *one_by_one, *["step"] * min(STEPS, spec.blocks - 1)][:MAX_CALLS]


def traced_ids(spec: SystemSpec) -> list[int]:
    """Return the ids whose logits a trace holds: evenly spaced from the first to the last id of the vocabulary."""
    return sorted({i * (spec.vocab - 1) // (IDS - 1) for i in range(IDS)})


def traced_rows(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return the (clip, row) pairs whose logits a trace holds, for logits [B,T,V]: the first pair and the last."""
    return [*dict.fromkeys([(0, 0), (shape[0] - 1, shape[1] - 1)])]


def record_trace(bundle: Bundle) -> Path:
    """Write the trace into the folder of a bundle that is otherwise complete; return the path of the trace.

    Raises NbpError if the index of the bundle's weights does not fit its config.
    """
    spec = bundle.manifest.spec
    vocab = spec.text_vocab if spec.hybrid else spec.vocab
    condition = np.random.default_rng(SEED).integers(0, vocab, (spec.batch, spec.condition_tokens))
    with torch.inference_mode():
        recorder = _Recorder(bundle, read_generator(bundle))
        recorder.play(condition, SEED, CLIP_INDEX)
    trace = {
        "about": ABOUT,
        "seed": SEED,
        "sample": CLIP_INDEX,
        "sampling": asdict(recorder.sampling),
        "condition": condition.tolist(),
        "vocabulary_ids": traced_ids(spec),
        "calls": recorder.calls,
    }
    write_json(bundle.path / TRACE, trace)
    return bundle.path / TRACE


def read_trace(bundle: Bundle) -> dict[str, Any]:
    """Read the trace of a bundle, and check its structure and the range of every value.

    Raises BundleError if there is no trace, or if it does not fit the bundle's spec.
    """
    path = bundle.path / TRACE
    if TRACE not in {file.path for file in bundle.manifest.files}:
        raise BundleError(
            f"{bundle.path} has no {TRACE}, which a proof needs: export it again; {bundle.manifest.origin}"
        )
    try:
        trace: dict[str, Any] = loads(path.read_bytes())
        check(trace, _rules(bundle.manifest.spec), "trace")
    except BundleError as error:
        raise BundleError(f"{path}: {error.message}") from error
    return trace


def check_trace(bundle: Bundle, trace: Mapping[str, Any], runtime: Runtime) -> Iterator[Check]:
    """Repeat the trace with a bundle's graphs in a runtime; yield the checks of its calls, all of which passed.

    Each call gets the tokens of the trace as its input, even if the runtime drew others. Its logits must agree within
    the tolerance of all parity checks. The tokens that the runtime draws from its own logits must equal those of the
    trace. A different token is accepted only if the uniform is so close to an edge of the token's interval in the
    cumulative distribution that an allowed error of the logits can move the edge past it.

    Raises ParityError with the call and the row of the first value that differs, EngineError if the runtime cannot run
    the graphs.
    """
    with _Replay(bundle, runtime, trace) as replay:
        replay.play(np.array(trace["condition"]), trace["seed"], trace["sample"])
    yield from replay.checks


class _TraceEnd(Exception):  # noqa: N818 - it is not an error
    """Raised to end the generation loop after the last call of a trace."""


@dataclass
class _Graph:
    """A graph whose runs call a function with the graph's name and inputs."""

    spec: GraphSpec
    answer: Callable[[str, Mapping[str, np.ndarray]], Any]

    def run(self, inputs: Mapping[str, np.ndarray]) -> Any:
        return self.answer(self.spec.name, inputs)


class _TracedSession(GraphSession):
    """A session in which the generation loop makes only the calls of a trace.

    Attributes:
        number: the number of the current call, from 0.
    """

    def __init__(self, bundle: Bundle, sampling: Sampling) -> None:
        super().__init__(bundle)
        self.sampling = sampling
        self.number = -1
        self.graphs = {name: _Graph(spec, self._next) for name, spec in self.spec.generator_graphs().items()}

    def play(self, condition: np.ndarray, seed: int, clip_index: int) -> None:
        """Run the generation loop to the trace's end. The condition [B,P] is tokens in raster order or text ids."""
        with suppress(_TraceEnd):
            for _ in Generator(self, seed=seed).blocks(condition, clip_index):
                pass

    def _next(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Any:
        if self.number + 1 == len(traced_calls(self.spec)):
            raise _TraceEnd
        self.number += 1
        return self.answer(graph, inputs)

    @abstractmethod
    def answer(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Any:
        """Return the logits of one call."""

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        """Do nothing: only the calls of the loop change the states."""

    def read_states(self) -> dict[str, np.ndarray]:
        """Return nothing, because the loop does not read the states."""
        return {}

    def close(self) -> None:
        """Do nothing: the session holds no resources."""


class _Recorder(_TracedSession):
    """The reference, which records each call.

    Attributes:
        calls: the calls so far, in the format of the file.
    """

    def __init__(self, bundle: Bundle, generator: NextBlockTransformer) -> None:
        super().__init__(bundle, bundle.manifest.sampling)
        self.calls: list[dict[str, Any]] = []
        self._generator = generator
        self._caches = [torch.zeros(tensor.shape) for tensor in self.spec.caches()]

    def answer(self, graph: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the reference's logits and record the call."""
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
            "uniforms": None,  # a hybrid draws no token from the logits of its prefill
            "drawn": None,
        }
        self.calls.append(call)
        return logits_BTV.numpy()

    def sample(self, logits: Any, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Draw tokens with the reference's sampling, row by row: a large block at once would take a gigabyte."""
        rows_NV, noise_N = torch.from_numpy(logits).flatten(0, 1), torch.from_numpy(uniforms).flatten()
        drawn = [
            sample(row, u, settings.temperature, settings.top_k, settings.top_p)
            for row, u in zip(rows_NV, noise_N, strict=True)
        ]
        tokens = torch.stack(drawn).reshape(uniforms.shape).numpy()
        self.calls[-1] |= {"uniforms": uniforms.tolist(), "drawn": tokens.tolist()}
        return tokens


class _Replay(_TracedSession):
    """A bundle's graphs in a runtime, each call of which is compared with the trace.

    If each graph needs its own copy of the weights, one graph is open at a time, and the caches are copied to the next.

    Attributes:
        checks: the checks of the calls so far, all of which passed.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, trace: Mapping[str, Any]) -> None:
        super().__init__(bundle, Sampling(**trace["sampling"]))
        self.checks: list[Check] = []
        self._runtime = runtime
        self._trace = trace
        self._session: GraphSession | None = None

    def answer(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Any:
        """Return the runtime's logits. Raises ParityError if they differ from the trace by more than the tolerance."""
        for name, value in inputs.items():
            self._expect(name, value.tolist())
        logits = self._session_with(graph).run(graph, **inputs)
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
        """Return the trace's tokens. Raises ParityError if the runtime draws others that no allowed error explains."""
        self._expect("uniforms", uniforms.tolist())
        call, expected = self._call, np.array(self._call["drawn"])
        drawn = self._session_with(call["graph"]).sample(logits, uniforms, settings)
        allowed = self._tolerance * max(1.0, call["largest"])
        beyond, where = 0.0, f"tokens: all {expected.size} equal"
        differing = np.argwhere(drawn != expected)
        for clip, row in differing:
            token, u = expected[clip, row], uniforms[clip, row]
            row_logits = np.asarray(logits)[clip, row].astype(np.float64)
            lower, upper = uniform_interval(row_logits, token, settings, allowed)
            distance = max(lower - u, u - upper, 0.0)
            if distance >= beyond:
                beyond = distance
                where = (
                    f"{len(differing)} of {expected.size} tokens differ; clip {clip}, row {row}: expected {token}, "
                    f"drawn {drawn[clip, row]} with the uniform {u}; within the allowed error of the logits, "
                    f"uniforms from {lower:.6g} to {upper:.6g} can give {token}"
                )
        self._add(Check(call["graph"], self._at, 0.0, float(beyond), where))
        return expected

    def close(self) -> None:
        """Close the runtime's session."""
        if self._session:
            self._session.close()

    @property
    def _call(self) -> dict[str, Any]:
        call: dict[str, Any] = self._trace["calls"][self.number]
        return call

    @property
    def _at(self) -> str:
        return f"trace, call {self.number}"

    @property
    def _tolerance(self) -> float:
        """The tolerance of the dtype in which the runtime computes."""
        assert self._session is not None
        return TOLERANCE[self._session.spec.dtype]

    def _session_with(self, graph: str) -> GraphSession:
        """Return a session with the graph that holds the states of the previous calls; open it if necessary."""
        if self._session is None or graph not in self._session.graphs:
            states = self._session.read_states() if self._session else {}
            self.close()
            names = [*self.graphs] if self._runtime.shares_weights else [graph]
            self._session = graph_session(self.bundle, names, self._runtime)
            self._session.write_states(states)
        return self._session

    def _expect(self, name: str, value: object) -> None:
        """Raise ParityError unless the trace has the value that the loop passes to the current call."""
        if self._call[name] != value:
            raise ParityError(
                f"{self.bundle.path / TRACE}: {name} of call {self.number} are not those that follow from the previous "
                f"calls, so the trace is not of this bundle. Export the bundle again; {self.bundle.manifest.origin}"
            )

    def _add(self, check: Check) -> None:
        if not check.passed:
            raise ParityError(
                f"{self.bundle.graph_file(check.graph)}, run by {self._runtime.name}, does not repeat {TRACE} in call "
                f"{self.number}: {check.where} (error {check.worst:.3g}, allowed {check.tolerance:g}). "
                "Either the graph or the trace is not of the model, so do not use the bundle. "
                f"Export it again; {self.bundle.manifest.origin}"
            )
        self.checks.append(check)


def _shortened(value: Any) -> float:
    """Round a logit to six digits, a hundredth of the smallest tolerance, so that most machines write the same file."""
    return float(f"{float(value):.6g}")


def _rules(spec: SystemSpec) -> Rule:
    """Return the rules for a trace of this spec, which determines all lengths."""

    def array(element: Rule, *shape: int) -> Rule:
        for size in reversed(shape):
            element = (element,) * size
        return element

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
    uniform = number("a number from 0 to below 1", lambda v: 0 <= v < 1)
    condition_vocab = spec.text_vocab if spec.hybrid else spec.vocab
    return {
        "about": TEXT,
        "seed": whole(0, 2**64 - 1),
        "sample": whole(0, 2**63 - 1),
        "sampling": SAMPLING_RULES,
        "condition": array(whole(0, condition_vocab - 1), spec.batch, spec.condition_tokens),
        "vocabulary_ids": tuple(exactly(i) for i in traced_ids(spec)),
        "calls": tuple(call(number, name) for number, name in enumerate(traced_calls(spec))),
    }
