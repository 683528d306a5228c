"""The generation loop on a session whose logits are derived from a checksum of all tokens that it was fed.

A token at a wrong place, position or time therefore changes every later token.
"""

import zlib
from itertools import pairwise
from typing import Any, Self

import numpy as np
import pytest

from nbp_engines import generator as module
from nbp_engines.generator import Generator
from nbp_engines.noise import uniforms
from nbp_engines.sampling import GREEDY, Sampling, sample
from nbp_engines.spec import SystemSpec
from nbp_errors import UsageError

V = 40
BLOCKS = [(1, 1, 1), (1, 1, 4), (1, 2, 2), (1, 4, 4), (2, 1, 1), (2, 2, 2), (2, 4, 4)]
NANOSECONDS = {"encode": 7, "prefill": 1_000, "sample": 13, "step": 100_000, "decode": 10_000_000}


def spec_of(block: tuple[int, int, int], batch: int = 1) -> SystemSpec:
    """Return a spec with a 4x4x4 latent, half of it given, which every block tiles. The video has 13 frames of 4×8."""
    return SystemSpec(
        block=block,
        latent=(4, 4, 4),
        condition_latents=2,
        video=(13, 4, 8),
        condition_frames=5,
        batch=batch,
        dtype="fp32",
        layers=1,
        heads=1,
        head_dim=8,
        vocab=V,
    )


def logits_after(history: np.ndarray, size: int) -> np.ndarray:
    """Return logits [L,V] that differ for every sequence of tokens in block order."""
    rng = np.random.default_rng(zlib.crc32(history.astype(np.int64).tobytes()))
    return rng.standard_normal((size, V)).astype(np.float32)


def video_of(tokens: np.ndarray) -> np.ndarray:
    """Return a video [3,13,4,8] of tokens [64] in raster order.

    It is causal in time. The first latent frame gives one video frame, and every other one gives four.
    """
    sums = tokens.reshape(4, 4, 4).cumsum(0) / 1000
    frames = np.concatenate([sums[:1], sums[1:].repeat(4, axis=0) + np.tile(np.arange(4) / 8, 3)[:, None, None]])
    rgb = frames[None] + np.arange(3).reshape(3, 1, 1, 1)
    return rgb.repeat(2, axis=-1).astype(np.float32)


class FakeSession:
    """A session that records its calls, advances a clock in each, and reuses its output buffers as a runtime does."""

    def __init__(self, spec: SystemSpec) -> None:
        self.spec = spec
        self.sampling = Sampling()
        self.cache = np.full((spec.batch, spec.capacity), -1)
        self.calls: list[tuple[str, Any]] = []
        self.now = 0
        self._buffers: dict[str, np.ndarray] = {}

    def _returned(self, name: str, value: np.ndarray) -> np.ndarray:
        self.now += NANOSECONDS[name]
        buffer = self._buffers.setdefault(name, np.empty_like(value))
        buffer[...] = value
        return buffer

    def encode(self, video: np.ndarray) -> np.ndarray:
        self.calls.append(("encode", None))
        pixels = video[:, 0, ::4, :, ::2]
        return self._returned("encode", (pixels * V).astype(np.int64).reshape(len(video), -1))

    def _logits(self, name: str, tokens: np.ndarray, cache_pos: np.ndarray) -> np.ndarray:
        rows = []
        for cache, new, pos in zip(self.cache, tokens, cache_pos, strict=True):
            cache[pos : pos + len(new)] = new
            rows.append(logits_after(cache[: pos + len(new)], self.spec.block_size))
        return self._returned(name, np.stack(rows))

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self.calls.append(("prefill", tokens.tolist()))
        return self._logits("prefill", tokens, np.zeros(self.spec.batch, np.int64))

    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> np.ndarray:
        self.calls.append(("step", cache_pos.tolist()))
        return self._logits("step", tokens, cache_pos)

    def sample(self, logits: np.ndarray, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        self.calls.append(("sample", uniforms.tolist()))
        return self._returned("sample", sample(logits, uniforms, settings))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        self.calls.append(("decode", None))
        return self._returned("decode", np.stack([video_of(row) for row in tokens]))

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def frames_for(spec: SystemSpec, seed: int = 0) -> np.ndarray:
    shape = (spec.batch, 3, spec.condition_frames, *spec.video[1:])
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def block_order(block: tuple[int, int, int]) -> list[int]:
    """Return the raster index of each token of the 4x4x4 latent in block order, computed by plain loops."""
    return [
        ((T + t) * 4 + H + h) * 4 + W + w
        for T in range(0, 4, block[0])
        for H in range(0, 4, block[1])
        for W in range(0, 4, block[2])
        for t in range(block[0])
        for h in range(block[1])
        for w in range(block[2])
    ]


def generated_by_hand(condition: np.ndarray, block: tuple[int, int, int], seed: int, clip_index: int) -> list[int]:
    """Return the tokens of one clip from those of its condition [32], both in raster order."""
    order = block_order(block)
    size = block[0] * block[1] * block[2]
    history = [int(condition[raster]) for raster in order[:32]]
    for step in range(32 // size):
        logits = logits_after(np.array(history), size)
        history += sample(logits, uniforms(seed, clip_index, step, size), Sampling()).tolist()
    raster = [0] * 64
    for place, token in zip(order, history, strict=True):
        raster[place] = token
    return raster


@pytest.mark.parametrize("block", BLOCKS)
def test_tokens_are_those_worked_out_by_hand(block: tuple[int, int, int]) -> None:
    session = FakeSession(spec_of(block, batch=2))
    frames = frames_for(session.spec)
    clip = Generator(session, seed=5).predict(frames, clip_index=3)
    condition = FakeSession(session.spec).encode(frames)
    assert clip.tokens.tolist() == [generated_by_hand(condition[b], block, 5, 3 + b) for b in range(2)]
    assert np.array_equal(clip.video, np.stack([video_of(row) for row in clip.tokens])[:, :, 5:])


@pytest.mark.parametrize("block", BLOCKS)
def test_the_calls_and_their_positions(block: tuple[int, int, int]) -> None:
    session = FakeSession(spec_of(block))
    Generator(session, GREEDY).predict(frames_for(session.spec))
    size, steps = session.spec.block_size, 32 // session.spec.block_size - 1
    assert [name for name, _ in session.calls] == ["encode", "prefill", "sample", *["step", "sample"] * steps, "decode"]
    assert [pos for name, pos in session.calls if name == "step"] == [[32 + size * i] for i in range(steps)]
    # The last block is never fed back, so the cache has no slots for it and all others are filled.
    assert (session.cache >= 0).all()


def test_the_session_sees_block_order_and_the_caller_raster_order() -> None:
    session = FakeSession(spec_of((1, 2, 2)))
    condition = np.arange(32)[None] % V
    for clip in Generator(session, GREEDY).blocks(condition):
        assert clip[:, :32].tolist() == condition.tolist()
    prefilled = dict(session.calls)["prefill"]
    assert prefilled[0][:8] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert prefilled != condition.tolist()


def test_blocks_appear_one_by_one() -> None:
    session = FakeSession(spec_of((1, 2, 2)))
    order = block_order((1, 2, 2))
    prefixes = []
    for count, clip in enumerate(Generator(session).blocks(np.ones((1, 32), np.int64)), start=1):
        later = order[32 + 4 * count :]
        assert not clip[0, later].any()
        prefixes.append(clip[0, order[32 : 32 + 4 * count]].tolist())
    assert len(prefixes) == 8
    assert all(after[: len(before)] == before for before, after in pairwise(prefixes))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_stream_is_the_prediction_in_pieces(block: tuple[int, int, int]) -> None:
    spec = spec_of(block, batch=2)
    whole = Generator(FakeSession(spec), seed=1).predict(frames_for(spec))
    pieces = list(Generator(FakeSession(spec), seed=1).stream(frames_for(spec)))
    assert [piece.video.shape[2] for piece in pieces] == [4 * block[0]] * (2 // block[0])
    assert np.array_equal(np.concatenate([piece.video for piece in pieces], axis=2), whole.video)
    assert np.array_equal(pieces[-1].tokens, whole.tokens)


def test_streamed_frames_come_before_later_tokens_are_made_and_stay_as_they_were() -> None:
    session = FakeSession(spec_of((1, 1, 4)))
    stream = Generator(session).stream(frames_for(session.spec))
    first = next(stream)
    assert [name for name, _ in session.calls].count("sample") == 4
    assert not first.tokens[0, 48:].any()
    copies = (first.video.copy(), first.tokens.copy())
    next(stream)
    assert np.array_equal(first.video, copies[0])
    assert np.array_equal(first.tokens, copies[1])


def test_a_clip_stays_as_it_was_when_the_session_makes_another() -> None:
    session = FakeSession(spec_of((1, 1, 4)))
    first = Generator(session, seed=1).predict(frames_for(session.spec))
    copies = (first.video.copy(), first.tokens.copy())
    Generator(session, seed=2).predict(frames_for(session.spec, seed=8))
    assert np.array_equal(first.video, copies[0])
    assert np.array_equal(first.tokens, copies[1])


def test_clips_of_a_batch_have_the_noise_of_successive_clip_indices() -> None:
    batch = FakeSession(spec_of((1, 2, 2), batch=3))
    frames = frames_for(batch.spec)
    together = Generator(batch, seed=9).predict(frames, clip_index=4)
    for b in range(3):
        alone = Generator(FakeSession(spec_of((1, 2, 2))), seed=9).predict(frames[b : b + 1], clip_index=4 + b)
        assert np.array_equal(alone.tokens[0], together.tokens[b])
        assert np.array_equal(alone.video[0], together.video[b])


def test_the_clip_depends_on_seed_and_clip_index_alone() -> None:
    session = FakeSession(spec_of((1, 1, 4)))
    frames = frames_for(session.spec)
    first = Generator(session, seed=1).predict(frames)
    assert np.array_equal(Generator(session, seed=1).predict(frames).tokens, first.tokens)
    assert not np.array_equal(Generator(session, seed=2).predict(frames).tokens, first.tokens)
    assert not np.array_equal(Generator(session, seed=1).predict(frames, clip_index=1).tokens, first.tokens)


def test_sampling_settings_reach_the_session() -> None:
    session = FakeSession(spec_of((1, 1, 4)))
    frames = frames_for(session.spec)
    greedy = Generator(session, GREEDY, seed=1).predict(frames)
    assert np.array_equal(greedy.tokens, Generator(session, GREEDY, seed=2).predict(frames).tokens)
    assert np.array_equal(greedy.tokens, Generator(session, Sampling(top_k=1), seed=3).predict(frames).tokens)
    assert not np.array_equal(greedy.tokens, Generator(session, seed=2).predict(frames).tokens)


class Clock:
    """A clock that advances in the session's calls, by one nanosecond in each reading, and when a test advances it."""

    def __init__(self, session: FakeSession) -> None:
        self.session = session

    def perf_counter_ns(self) -> int:
        self.session.now += 1
        return self.session.now


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    session = FakeSession(spec_of((1, 2, 2)))
    monkeypatch.setattr(module, "time", Clock(session))
    return session


def test_spans_add_up_to_the_wall_time_without_a_gap(timed: FakeSession) -> None:
    clip = Generator(timed).predict(frames_for(timed.spec))
    assert clip.timeline.total_ns == timed.now - 1  # without the first reading
    assert clip.timeline.spans == [
        (stage, NANOSECONDS[stage] + 1) for stage in ["encode", "prefill", "sample", *["step", "sample"] * 7, "decode"]
    ]


def test_a_streams_timeline_leaves_out_what_the_caller_does_between_frames(timed: FakeSession) -> None:
    started = timed.now
    idle = 0
    for piece in Generator(timed).stream(frames_for(timed.spec)):
        timed.now += 123_456
        idle += 123_456
        timeline = piece.timeline
    assert timeline.total_ns == timed.now - started - idle - 1 - 2  # each resumption reads the clock once more
    assert [stage for stage, _ in timeline.spans].count("decode") == 2
    assert {ns - NANOSECONDS[stage] for stage, ns in timeline.spans} == {1}


class UnrollingSession(FakeSession):
    """A session that generates the tokens of a clip in one call, from the same logits."""

    unrolls = True

    def unroll(self, condition: np.ndarray, noise: np.ndarray, settings: Sampling) -> np.ndarray:
        self.calls.append(("unroll", noise.tolist()))
        self.now += 1_000_000
        history = condition
        for row in noise:
            logits = np.stack([logits_after(clip, self.spec.block_size) for clip in history])
            history = np.concatenate([history, sample(logits, row, settings)], 1)
        return history[:, condition.shape[1] :]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_session_may_make_all_tokens_in_one_call(
    block: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(block, batch=2)
    expected = Generator(FakeSession(spec), seed=5).predict(frames_for(spec), clip_index=3)
    session = UnrollingSession(spec)
    monkeypatch.setattr(module, "time", Clock(session))
    clip = Generator(session, seed=5).predict(frames_for(spec), clip_index=3)
    assert np.array_equal(clip.tokens, expected.tokens)
    assert np.array_equal(clip.video, expected.video)
    assert [name for name, _ in session.calls] == ["encode", "unroll", "decode"]
    assert clip.timeline.spans == [("encode", 8), ("loop", 1_000_001), ("decode", 10_000_001)]


def test_a_session_that_does_not_unroll_is_run_step_by_step() -> None:
    session = UnrollingSession(spec_of((1, 1, 4)))
    session.unrolls = False
    Generator(session).predict(frames_for(session.spec))
    assert "unroll" not in {name for name, _ in session.calls}


def test_a_stream_is_always_generated_step_by_step() -> None:
    session = UnrollingSession(spec_of((1, 1, 4)))
    list(Generator(session).stream(frames_for(session.spec)))
    assert "unroll" not in dict(session.calls)


@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 4, 8), (2, 3, 4, 4, 8), (2, 3, 5, 8, 4), (2, 1, 5, 4, 8), (2, 3, 13, 4, 8), (3, 5, 4, 8)]
)
@pytest.mark.parametrize("way", ["predict", "stream"])
def test_wrong_frames_are_refused_before_any_work(shape: tuple[int, ...], way: str) -> None:
    session = FakeSession(spec_of((1, 1, 4), batch=2))
    with pytest.raises(UsageError) as caught:
        list(getattr(Generator(session), way)(np.zeros(shape, np.float32)))
    assert str(shape) in caught.value.message
    assert "(2, 3, 5, 4, 8)" in caught.value.message
    assert not session.calls


@pytest.mark.parametrize("shape", [(2, 64), (1, 32), (32,)])
def test_a_wrong_condition_is_refused_before_any_work(shape: tuple[int, ...]) -> None:
    session = FakeSession(spec_of((1, 1, 4), batch=2))
    with pytest.raises(UsageError) as caught:
        next(Generator(session).blocks(np.zeros(shape, np.int64)))
    assert str(shape) in caught.value.message
    assert "(2, 32)" in caught.value.message
    assert not session.calls
