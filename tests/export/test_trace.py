"""The trace of a bundle: its content, its repetition by `verify`, and the traces that are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nbp_engines.bundle import RECEIPT, Bundle
from nbp_engines.errors import BundleError
from nbp_engines.ort import ORT_CPU
from nbp_engines.sampling import GREEDY, Sampling, sample
from nbp_errors import NbpError
from nbp_export.parity import TOLERANCE, ParityError
from nbp_export.proof import verify
from nbp_export.trace import TRACE, check_trace, read_trace, traced_calls
from nbp_export.uniform_interval import uniform_interval
from tests.export.support import Exported, resealed

Exporter = Callable[..., Exported]
Copier = Callable[..., Bundle]
Json = dict[str, Any]


def edited(bundle: Bundle, change: Callable[[Json], object]) -> Bundle:
    """Change the trace of a bundle, and update its manifest accordingly."""
    trace = json.loads((bundle.path / TRACE).read_text())
    change(trace)
    (bundle.path / TRACE).write_text(json.dumps(trace))
    return resealed(bundle)


def checked(bundle: Bundle) -> list[str]:
    """Return the description of the largest error of each check of the trace."""
    return [check.where for check in check_trace(bundle, read_trace(bundle), ORT_CPU)]


@pytest.mark.parametrize(("block", "dtype", "batch"), [("1x2x2", "fp32", 2), ("1x1x4", "bf16", 1)])
def test_every_call_is_in_the_receipt(block: str, dtype: str, batch: int, exported: Exporter) -> None:
    bundle = exported(block, dtype=dtype, batch=batch).bundle
    checks = [c for c in (bundle.receipt() or {})["checks"] if c["at"].startswith("trace")]
    places = [("prefill", "trace, call 0"), *(("step", f"trace, call {n}") for n in (1, 2))]
    assert [(c["graph"], c["at"]) for c in checks] == [place for place in places for _ in range(2)]
    assert [c["where"] for c in checks[1::2]] == [f"tokens: all {4 * batch} equal"] * 3
    assert {c["tolerance"] for c in checks[0::2]} == {5e-5}
    assert {c["tolerance"] for c in checks[1::2]} == {0.0}


@torch.inference_mode()
def test_the_logits_are_those_of_the_references_full_forward(exported: Exporter) -> None:
    """The full forward computes the same logits in one pass over the whole sequence, without caches."""
    made = exported("1x2x2", batch=2)
    trace, L = read_trace(made.bundle), 4
    order = made.bundle.manifest.spec.block_order()
    condition = np.array(trace["condition"])[:, order[:32]]
    tokens = np.concatenate([condition, *(np.array(call["drawn"]) for call in trace["calls"])], 1)
    for number, call in enumerate(trace["calls"]):
        length = 32 + L * number
        assert call["tokens"] == tokens[:, slice(length - L if number else 0, length)].tolist()
        logits = made.source.generator(torch.from_numpy(tokens[:, :length]))[:, -L:].numpy()
        assert abs(np.abs(logits).max() - call["largest"]) < 1e-4
        assert [(row["clip"], row["row"]) for row in call["logits"]] == [(0, 0), (1, 3)]
        for row in call["logits"]:
            values = logits[row["clip"], row["row"], trace["vocabulary_ids"]]
            np.testing.assert_allclose(values, row["values"], atol=1e-4, rtol=0)
        settings = Sampling(**trace["sampling"])
        assert np.array_equal(sample(logits, np.array(call["uniforms"]), settings), call["drawn"])


def test_the_trace_is_short_whatever_the_model(exported: Exporter) -> None:
    spec = exported("1x2x2", batch=2).bundle.manifest.spec
    hybrid = replace(spec, condition_latents=0, condition_frames=0, text_tokens=3, text_vocab=5)
    whole = (5, 16, 16)
    for case, calls in (
        (replace(spec, block=(1, 1, 1)), ["prefill", "step", "step"]),
        (replace(spec, latent=(3, 4, 4), block=(1, 4, 4)), ["prefill"]),
        (hybrid, ["prefill", *["step_1"] * 4, "step", "step"]),
        (replace(hybrid, block=(1, 1, 1)), ["prefill", "step", "step", "step"]),
        (replace(hybrid, latent=whole, block=(1, 1, 16)), ["prefill", *["step_1"] * 16, "step", "step"]),
        (replace(hybrid, latent=whole, block=(1, 16, 16)), ["prefill", *["step_1"] * 23]),
    ):
        assert traced_calls(case) == calls


def other_token(trace: Json) -> None:
    trace["calls"][1]["drawn"][0][2] = (trace["calls"][1]["drawn"][0][2] + 60) % 125


def other_condition(trace: Json) -> None:
    trace["condition"][0][5] ^= 1


def other_logit(trace: Json) -> None:
    trace["calls"][2]["logits"][1]["values"][3] += 0.01


def other_largest(trace: Json) -> None:
    trace["calls"][2]["largest"] *= 1.01


def other_uniform(trace: Json) -> None:
    trace["calls"][1]["uniforms"][1][0] = 0.5


def other_seed(trace: Json) -> None:
    trace["seed"] = 1


def other_settings(trace: Json) -> None:
    trace["sampling"]["temperature"] = 0.1


def other_input(trace: Json) -> None:
    trace["calls"][1]["tokens"] = trace["calls"][0]["drawn"][::-1]


def other_position(trace: Json) -> None:
    trace["calls"][1]["cache_pos"][1] = 36


LIES: list[tuple[Callable[[Json], None], str]] = [
    (
        other_token,
        r"step\.onnx, run by ort-cpu, does not repeat trace\.json in call 1: 1 of 8 tokens differ; clip 0, row 2",
    ),
    (other_condition, r"trace\.json: tokens of call 0 are not those that follow from"),
    (other_logit, r"step\.onnx.* in call 2: logit \d+ of clip 1, row 3: expected"),
    (other_largest, r"step\.onnx.* in call 2: largest magnitude of the 1000 logits: expected"),
    (other_uniform, r"trace\.json: uniforms of call 1 are not those"),
    (other_seed, r"trace\.json: uniforms of call 0 are not those"),
    (other_settings, r"prefill\.onnx.* in call 0: \d of 8 tokens differ; clip"),
    (other_input, r"trace\.json: tokens of call 1 are not those"),
    (other_position, r"trace\.json: cache_pos of call 1 are not those"),
]


@pytest.mark.parametrize(("lie", "message"), LIES, ids=lambda part: getattr(part, "__name__", ""))
def test_a_trace_of_something_else_is_refused_by_call_and_row(
    lie: Callable[[Json], None], message: str, copied: Copier
) -> None:
    bundle = edited(copied("1x2x2", batch=2), lie)
    with pytest.raises(ParityError, match=message):
        checked(bundle)


def put(place: str, value: object) -> Callable[[Json], None]:
    def change(trace: Json) -> None:
        *way, last = [int(key) if key.isdigit() else key for key in place.split(".")]
        target: Any = trace
        for key in way:
            target = target[key]
        target[last] = value

    return change


IMPOSSIBLE: list[tuple[str, object, str]] = [
    ("calls", [], r"trace\.calls is \[\], not a list of 3"),
    ("calls.1.graph", "prefill", r"trace\.calls\[1\]\.graph is 'prefill', not 'step'"),
    ("calls.1.tokens.0.0", 125, r"trace\.calls\[1\]\.tokens\[0\]\[0\] is 125"),
    ("calls.1.drawn", None, r"trace\.calls\[1\]\.drawn is None"),
    ("calls.1.drawn.0", [1, 2, 3], r"not a list of 4"),
    ("calls.0.uniforms.0.0", 1.0, r"not a number from 0 to below 1"),
    ("calls.0.logits.1.row", 7, r"row is 7, not 3"),
    ("calls.0.largest", -1, r"largest is -1"),
    ("vocabulary_ids.3", 0, r"vocabulary_ids\[3\] is 0"),
    ("seed", -1, r"seed is -1"),
    ("sampling.top_k", 0, r"top_k is 0"),
    ("extra", 0, r"unknown name 'extra'"),
]


@pytest.mark.parametrize(("place", "value", "message"), IMPOSSIBLE, ids=[place for place, _, _ in IMPOSSIBLE])
def test_an_impossible_trace_is_refused_by_its_place(place: str, value: object, message: str, copied: Copier) -> None:
    bundle = edited(copied("1x2x2", batch=2), put(place, value))
    with pytest.raises(BundleError, match=message) as caught:
        read_trace(bundle)
    assert str(bundle.path / TRACE) in caught.value.message


def test_verify_refuses_a_bundle_without_a_trace(copied: Copier) -> None:
    bundle = copied("1x2x2", batch=2)
    files = tuple(file for file in bundle.manifest.files if file.path != TRACE)
    without = resealed(replace(bundle, manifest=replace(bundle.manifest, files=files)))
    with pytest.raises(NbpError, match=r"has no trace\.json, which a proof needs: export it again; it was made by"):
        verify(without.path)
    assert not (bundle.path / RECEIPT).exists()


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_tokens_neighbour_is_refused_unless_an_allowed_error_could_give_it(
    shift: int, copied: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def neighbour(trace: Json) -> None:
        trace["calls"][-1]["drawn"][0][1] += shift

    bundle = edited(copied("1x2x2", batch=2), neighbour)
    with pytest.raises(ParityError, match=r"call 2: 1 of 8 tokens differ; clip 0, row 1: expected"):
        checked(bundle)
    monkeypatch.setitem(TOLERANCE, "fp32", 0.5)
    assert "within the allowed error of the logits, uniforms from" in checked(bundle)[-1]


SETTINGS = [Sampling(), Sampling(0.7, 9, 0.8), Sampling(1.3, 20, 1.0), Sampling(1, 4, 0.4)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_without_an_error_it_is_the_interval_of_the_cumulative_distribution(settings: Sampling) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=24) * 2
    noise = np.linspace(0, 1, 4001)[:-1]
    drawn = sample(np.tile(logits, (noise.size, 1)), noise, settings)
    for token in range(24):
        lower, upper = uniform_interval(logits, token, settings, 0.0)
        uniforms = noise[drawn == token]
        if not uniforms.size:
            assert lower == np.inf or upper - lower < 1e-3
            continue
        assert lower - 1e-9 <= uniforms.min() < lower + 2.6e-4
        assert upper - 2.6e-4 < uniforms.max() <= upper + 1e-9


@pytest.mark.parametrize("settings", [*SETTINGS, GREEDY])
@pytest.mark.parametrize("error", [1e-3, 0.05, 0.5])
def test_no_allowed_error_moves_a_uniform_out_of_the_interval(settings: Sampling, error: float) -> None:
    rng = np.random.default_rng(1)
    for trial in range(40):
        logits = np.round(
            rng.normal(size=24) * 1.5, trial % 3
        )  # rounding makes many logits equal in some trials and none in others
        off = rng.choice([-1, 0, 1], (60, 24)) * error if trial % 2 else rng.uniform(-error, error, (60, 24))
        noise = rng.uniform(size=60)
        for token, u in zip(sample(logits + off, noise, settings), noise, strict=True):
            lower, upper = uniform_interval(logits, int(token), settings, error)
            assert lower - 1e-12 <= u <= upper + 1e-12


def test_the_interval_is_narrow() -> None:
    """For a small error the interval grows by only about twice the error."""
    logits = np.random.default_rng(2).normal(size=125) * 2
    for token in np.argsort(logits)[-20:]:
        exact, wide = (uniform_interval(logits, int(token), Sampling(), error) for error in (0.0, 1e-4))
        assert exact[0] - 3e-4 < wide[0] <= exact[0]
        assert exact[1] <= wide[1] < exact[1] + 3e-4


def test_a_trace_of_another_bundle_is_refused(exported: Exporter) -> None:
    one, other = exported("1x2x2", batch=2).bundle, exported("1x1x4", dtype="bf16").bundle
    with pytest.raises(BundleError, match="not a list of 2"):
        read_trace(replace(other, manifest=one.manifest))
