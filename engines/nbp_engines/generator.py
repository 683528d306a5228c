"""The one generation loop: encode the given frames, prefill, then sample and step block by block, decode.

Shape legend: B batch, L tokens in a block, P condition tokens, F video frames.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from nbp_engines.errors import UsageError
from nbp_engines.noise import uniforms
from nbp_engines.sampling import Sampling
from nbp_engines.session import Session


class Timeline:
    """Wall time cut into stages without gaps: every mark ends a span that began at the mark before."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, int]] = []
        self._last = time.perf_counter_ns()

    def mark(self, stage: str) -> None:
        """End the running span, in nanoseconds, under this name."""
        now = time.perf_counter_ns()
        self.spans.append((stage, now - self._last))
        self._last = now

    def skip(self) -> None:
        """Begin the next span now: what passed since the last mark was somebody else's time."""
        self._last = time.perf_counter_ns()

    @property
    def total_ns(self) -> int:
        """Wall time up to the last mark."""
        return sum(ns for _, ns in self.spans)


@dataclass(frozen=True)
class Clip:
    """Predicted frames.

    Attributes:
        video: float32 [B,3,F,H,W] in [0,1], the predicted frames only.
        tokens: int64 [B,T·H·W] so far in raster order, the condition included; later frames hold zeros.
        timeline: where the time went.
    """

    video: np.ndarray
    tokens: np.ndarray
    timeline: Timeline


@dataclass
class Generator:
    """Generates clips on any session.

    Attributes:
        session: the runtime.
        sampling: how tokens are drawn.
        seed: of the noise; clip b of a batch takes the noise of sample `sample + b`.
    """

    session: Session
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0

    def predict(self, frames: np.ndarray, sample: int = 0) -> Clip:
        """Predict the rest of the clip after `frames`, float32 [B,3,F,H,W] in [0,1].

        Raises UsageError if the frames do not have the bundle's batch, count and size.
        """
        timeline = Timeline()
        condition = self._encode(frames, timeline)
        for tokens in self.blocks(condition, sample, timeline):
            clip = tokens
        return self._decode(clip, self.session.spec.condition_frames, self.session.spec.video[0], timeline)

    def stream(self, frames: np.ndarray, sample: int = 0) -> Iterator[Clip]:
        """The same frames as `predict`, each latent frame's as soon as its tokens are there.

        The decoder is causal in time, so frames decoded before the later tokens exist are final.
        """
        spec = self.session.spec
        blocks_a_frame = spec.block[0] * spec.latent[1] * spec.latent[2] // spec.block_size
        frames_a_latent = (spec.video[0] - spec.condition_frames) // (spec.latent[0] - spec.condition_latents)
        timeline = Timeline()
        condition = self._encode(frames, timeline)
        shown = spec.condition_frames
        for done, tokens in enumerate(self.blocks(condition, sample, timeline), start=1):
            if done % blocks_a_frame == 0:
                ready = shown + spec.block[0] * frames_a_latent
                yield self._decode(tokens, shown, ready, timeline)
                timeline.skip()
                shown = ready

    def blocks(self, condition: np.ndarray, sample: int = 0, timeline: Timeline | None = None) -> Iterator[np.ndarray]:
        """Generate block by block after condition tokens [B,P]; after each, the clip so far [B,T·H·W].

        All tokens are in raster order; the array is the same each time and grows more complete.
        """
        spec, timeline = self.session.spec, timeline or Timeline()
        batch, size = spec.batch, spec.block_size
        if condition.shape != (batch, spec.condition_tokens):
            raise UsageError(f"condition tokens are {condition.shape}, expected {(batch, spec.condition_tokens)}")
        order = spec.order()
        clip = np.zeros((batch, spec.clip_tokens), np.int64)
        clip[:, : spec.condition_tokens] = condition
        logits = self.session.prefill(clip[:, order[: spec.condition_tokens]])
        timeline.mark("prefill")
        for block in range(spec.blocks):
            noise = np.stack([uniforms(self.seed, sample + b, block, size) for b in range(batch)])
            tokens = self.session.sample(logits, noise, self.sampling)
            start = spec.condition_tokens + block * size
            clip[:, order[start : start + size]] = tokens
            timeline.mark("sample")
            yield clip
            if block + 1 < spec.blocks:
                logits = self.session.step(tokens, np.full(batch, start, np.int64))
                timeline.mark("step")

    def _encode(self, frames: np.ndarray, timeline: Timeline) -> np.ndarray:
        spec = self.session.spec
        expected = (spec.batch, 3, spec.condition_frames, *spec.video[1:])
        if frames.shape != expected:
            raise UsageError(f"given frames are {frames.shape}, expected {expected} ([B,3,F,H,W], values in [0,1])")
        tokens = self.session.encode(frames)
        timeline.mark("encode")
        return tokens

    def _decode(self, tokens: np.ndarray, first: int, last: int, timeline: Timeline) -> Clip:
        video = self.session.decode(tokens)[:, :, first:last].copy()
        timeline.mark("decode")
        return Clip(video, tokens.copy(), timeline)
