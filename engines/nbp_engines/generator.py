"""The one generation loop: encode the given frames or take a text, prefill, then sample and step by blocks, decode.

Shape legend: B batch, L tokens in a block, P condition tokens, F video frames.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nbp_engines.noise import uniforms
from nbp_engines.sampling import Sampling
from nbp_engines.session import Session, Unrolling
from nbp_errors import UsageError


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
        tokens: the video tokenizer's, int64 [B,T·H·W] so far in raster order, given ones included; later frames
            hold zeros.
        timeline: where the time went: encode, prefill, sample and step by turns, decode; where the session makes all
            tokens in one call, encode, loop, decode.
    """

    video: np.ndarray
    tokens: np.ndarray
    timeline: Timeline


class Generator:
    """Generates clips on any session.

    Attributes:
        session: what computes.
        sampling: how tokens are drawn; the settings that the session's model comes with if None is given.
        seed: of the noise; clip b of a batch takes the noise of sample `sample + b`.
    """

    def __init__(self, session: Session, sampling: Sampling | None = None, seed: int = 0) -> None:
        self.session = session
        self.sampling = sampling or session.sampling
        self.seed = seed

    def predict(self, frames: np.ndarray, sample: int = 0) -> Clip:
        """Predict the rest of the clip after `frames`, float32 [B,3,F,H,W] in [0,1].

        Raises UsageError if the frames do not have the bundle's batch, count and size.
        """
        timeline = Timeline()
        return self._whole(self._encode(frames, timeline), sample, timeline)

    def generate(self, text: np.ndarray, sample: int = 0) -> Clip:
        """Generate a whole clip of the class that a hybrid model is told by `text`, text token ids int64 [B,P].

        Raises UsageError for other shapes or ids, and if the model is not class-conditional.
        """
        if not self.session.spec.hybrid:
            raise UsageError("the model predicts frames: it takes those that are given, `predict(frames)`, and no text")
        return self._whole(text, sample, Timeline())

    def _whole(self, condition: np.ndarray, sample: int, timeline: Timeline) -> Clip:
        if isinstance(self.session, Unrolling) and self.session.unrolls:
            clip = self._unrolled(self.session, condition, sample, timeline)
        else:
            for tokens in self.blocks(condition, sample, timeline):
                clip = tokens
        return self._decode(clip, self.session.spec.condition_frames, self.session.spec.video[0], timeline)

    def _unrolled(self, session: Unrolling, condition: np.ndarray, sample: int, timeline: Timeline) -> np.ndarray:
        """The clip that `blocks` ends with, in one call and one stage."""
        spec = self.session.spec
        clip, prefix = self._begin(condition)
        noise = np.stack([self._noise(sample, block) for block in range(spec.blocks)])
        clip[:, spec.block_order()[-spec.blocks * spec.block_size :]] = session.unroll(prefix, noise, self.sampling)
        timeline.mark("loop")
        return clip

    def _begin(self, condition: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The clip [B,T·H·W] with the given tokens alone, and the condition [B,P] as `prefill` takes it."""
        self._check(condition)
        spec = self.session.spec
        clip = np.zeros((spec.batch, spec.clip_tokens), np.int64)
        if spec.hybrid:
            return clip, condition + spec.block_size
        clip[:, : spec.condition_tokens] = condition
        return clip, clip[:, spec.block_order()[: spec.condition_tokens]]

    def _noise(self, sample: int, block: int) -> np.ndarray:
        """Uniforms [B,L] of a block of each clip."""
        spec = self.session.spec
        return np.stack([uniforms(self.seed, sample + b, block, spec.block_size) for b in range(spec.batch)])

    def stream(self, condition: np.ndarray, sample: int = 0) -> Iterator[Clip]:
        """What `predict` makes of given frames, or `generate` of a text, each latent frame as soon as it is there.

        The decoder is causal in time, so frames decoded before the later tokens exist are final.
        """
        spec = self.session.spec
        blocks_a_frame = spec.block[0] * spec.latent[1] * spec.latent[2] // spec.block_size
        timeline = Timeline()
        tokens_given = condition if spec.hybrid else self._encode(condition, timeline)
        shown = spec.condition_frames
        for done, tokens in enumerate(self.blocks(tokens_given, sample, timeline), start=1):
            if done % blocks_a_frame == 0:
                ready = spec.frames(spec.condition_latents + done // blocks_a_frame * spec.block[0])
                yield self._decode(tokens, shown, ready, timeline)
                timeline.skip()
                shown = ready

    def blocks(self, condition: np.ndarray, sample: int = 0, timeline: Timeline | None = None) -> Iterator[np.ndarray]:
        """Generate block by block after a condition [B,P], tokens or text; after each, the clip so far [B,T·H·W].

        The clip's tokens are as sampled, `SystemSpec.codes` makes them the video tokenizer's. Given and generated
        tokens are in raster order; the array is the same each time and grows more complete.
        """
        spec, timeline = self.session.spec, timeline or Timeline()
        clip, prefix = self._begin(condition)
        batch, size, P = spec.batch, spec.block_size, spec.condition_tokens
        order, given = spec.block_order(), spec.clip_tokens - spec.blocks * size
        logits = self.session.prefill(prefix)
        timeline.mark("prefill")
        for block in range(spec.blocks):
            noise = self._noise(sample, block)
            if spec.hybrid and block == 0:
                tokens = self._one_by_one(noise, timeline)
            else:
                tokens = self.session.sample(logits, noise, self.sampling)
            start = given + block * size
            clip[:, order[start : start + size]] = tokens
            timeline.mark("sample")
            yield clip
            if block + 1 < spec.blocks:
                if spec.hybrid and block == 0:  # the first block to be read: its last token, then middle-of-video
                    tokens = np.concatenate([tokens[:, -1:], np.arange(1, size)[None].repeat(batch, 0)], 1)
                logits = self.session.step(tokens, np.full(batch, P + (block + spec.hybrid) * size, np.int64))
                timeline.mark("step")

    def _one_by_one(self, noise: np.ndarray, timeline: Timeline) -> np.ndarray:
        """The first block [B,L] of a hybrid, token by token after begin-of-video, which is id 0."""
        spec = self.session.spec
        tokens = [np.zeros((spec.batch, 1), np.int64)]
        for i in range(spec.block_size):
            logits = self.session.step(tokens[-1], np.full(spec.batch, spec.condition_tokens + i, np.int64))
            timeline.mark("step")
            tokens.append(self.session.sample(logits, noise[:, i : i + 1], self.sampling).copy())
            timeline.mark("sample")
        return np.concatenate(tokens[1:], 1)

    def _check(self, condition: np.ndarray) -> None:
        spec = self.session.spec
        name, ids = ("text", spec.text_vocab) if spec.hybrid else ("condition", spec.vocab)
        expected = (spec.batch, spec.condition_tokens)
        if condition.shape != expected:
            raise UsageError(f"{name} tokens are {condition.shape}, expected {expected}")
        if condition.min() < 0 or condition.max() >= ids:
            raise UsageError(f"{name} tokens reach from {condition.min()} to {condition.max()}; ids are 0 to {ids - 1}")

    def _encode(self, frames: np.ndarray, timeline: Timeline) -> np.ndarray:
        spec = self.session.spec
        if spec.hybrid:
            raise UsageError("the model is class-conditional: it takes a text, `generate(text)`, and no frames")
        expected = (spec.batch, 3, spec.condition_frames, *spec.video[1:])
        if frames.shape != expected:
            raise UsageError(f"given frames are {frames.shape}, expected {expected} ([B,3,F,H,W], values in [0,1])")
        tokens = self.session.encode(frames)
        timeline.mark("encode")
        return tokens

    def _decode(self, tokens: np.ndarray, first: int, last: int, timeline: Timeline) -> Clip:
        codes = self.session.spec.codes(tokens)
        video = self.session.decode(codes)[:, :, first:last].copy()
        timeline.mark("decode")
        return Clip(video, codes, timeline)
