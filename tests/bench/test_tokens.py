"""All engines draw the same tokens from the same noise, which every table relies on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from nbp_bench import golden
from nbp_bench.conditions import conditions_for
from nbp_bench.plan import Plan
from nbp_bench.rows import agreement, identity_of
from nbp_bench.torch_sessions import EagerSession, NaiveSession
from nbp_bench.video import to_uint8
from nbp_engines.bundle import Bundle
from nbp_engines.generator import Generator
from nbp_engines.registry import open_session
from nbp_engines.sampling import GREEDY, Sampling
from nbp_export.request import Request
from nbp_export.sources import find


@contextmanager
def sessions(block: str, bundle: Path) -> Iterator[dict[str, object]]:
    source = find(Request(block=block))
    with open_session(bundle, threads=1) as exported:
        naive, eager = (
            kind(exported.spec, source.generator, source.tokenizer) for kind in (NaiveSession, EagerSession)
        )
        yield {"naive": naive, "eager": eager, "ort-cpu": exported}


def frames(bundle: Path) -> np.ndarray:
    conditions = conditions_for(identity_of(Bundle.open(bundle)), Plan([], [], Path()))
    assert "held-out part" in conditions.source
    return np.asarray(conditions.arrays[0])[None]


@pytest.mark.parametrize(
    ("block", "sampling"),
    [("1", Sampling()), ("16", Sampling()), ("256", Sampling()), ("16", GREEDY)],
    ids=["1", "16", "256", "16-greedy"],
)
def test_tiny_clips_are_identical_in_all_engines(block: str, sampling: Sampling, tiny: Callable[[str], Path]) -> None:
    given = frames(tiny(block))
    with sessions(block, tiny(block)) as opened:
        clips = {name: Generator(session, sampling).predict(given) for name, session in opened.items()}  # type: ignore[arg-type]
    for clip in clips.values():
        np.testing.assert_array_equal(clip.tokens, clips["eager"].tokens)
        # The videos differ only by the rounding of the decoders.
        np.testing.assert_allclose(clip.video, clips["eager"].video, atol=1e-4)
        assert clip.video.shape == (1, 3, 12, 128, 128)


def test_agreement_counts_predicted_tokens_and_finds_the_first_that_differs(tiny: Callable[[str], Path]) -> None:
    spec = Bundle.open(tiny("16")).manifest.spec
    ours = np.zeros((2, spec.clip_tokens), np.int64)
    theirs = ours.copy()
    assert agreement(ours, theirs, spec) == (1.0, None)
    theirs[:, : spec.condition_tokens] = 5  # given tokens do not count
    theirs[1, spec.block_order()[spec.condition_tokens + 3]] = 1
    assert agreement(ours, theirs, spec) == (1 - 1 / (2 * 768), 3)


@pytest.mark.parametrize("size", golden.SIZES)
def test_the_self_check_passes_and_fails_if_a_token_differs(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert golden.agreement(size) == 1
    model = golden.golden_model(size)
    model.pos_emb.data.mul_(1.5)
    monkeypatch.setattr(golden, "golden_model", lambda _: model)
    assert golden.agreement(size) < 1


def test_conditions_start_in_the_held_out_part(tiny: Callable[[str], Path]) -> None:
    identity = identity_of(Bundle.open(tiny("16")))
    conditions = conditions_for(identity, Plan([], [], Path(), clips=3))
    assert [array.shape for array in conditions.arrays] == [(3, 5, 128, 128)] * 3
    assert len({array.tobytes() for array in conditions.arrays}) == 3
    np.testing.assert_array_equal(to_uint8(conditions.arrays[0]), conditions.filmed[:5])
