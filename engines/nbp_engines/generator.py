"""The generation loop: encode the given frames or take a text, prefill, sample and step block by block, decode.

It is the only implementation of the loop, and it runs on any session. A hybrid is a class-conditional model, see
`spec.py`.

Shape legend: B batch, L tokens in a block, P condition tokens, F video frames, H×W their height and width in pixels. In
tokens [B,T·H·W] of a whole clip, T×H×W are its latent frames, rows and columns.
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
    """Wall time, divided into consecutive spans.

    Attributes:
        spans: stage and duration in nanoseconds of each span, in order. A span begins where the previous one ended,
            unless `skip` was called in between.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[str, int]] = []
        self._last = time.perf_counter_ns()

    def mark(self, stage: str) -> None:
        """End the current span, name it, and begin the next one."""
        now = time.perf_counter_ns()
        self.spans.append((stage, now - self._last))
        self._last = now

    def skip(self) -> None:
        """Begin the current span anew, so that the time since the last mark does not count."""
        self._last = time.perf_counter_ns()

    @property
    def total_ns(self) -> int:
        """The sum of all spans, in nanoseconds."""
        return sum(ns for _, ns in self.spans)


@dataclass(frozen=True)
class Clip:
    """Generated frames, with their tokens and the time that they took.

    Attributes:
        video: float32 [B,3,F,H,W] in [0,1], without the given frames.
        tokens: int64 [B,T·H·W], the video tokenizer's codes of the whole clip in raster order, including those of the
            given frames. In a stream, the codes of tokens that are not generated yet are 0.
        timeline: the time of each stage: encode, prefill, sample and step in turn, decode. If the session generates all
            tokens in one call: encode, loop, decode.
    """

    video: np.ndarray
    tokens: np.ndarray
    timeline: Timeline


class Generator:
    """Generates clips with a session.

    Clip b of a batch has the noise of the clip index `clip_index + b`.

    Attributes:
        session: the session that runs the model.
        sampling: how tokens are drawn; the model's default settings if None is given.
        seed: the seed of the noise.
    """

    def __init__(self, session: Session, sampling: Sampling | None = None, seed: int = 0) -> None:
        self.session = session
        self.sampling = sampling or session.sampling
        self.seed = seed

    def predict(self, frames: np.ndarray, clip_index: int = 0) -> Clip:
        """Predict the frames that follow the given `frames`, float32 [B,3,F,H,W] in [0,1].

        Raises UsageError for frames of another shape than the session's, and if the model is class-conditional.
        """
        timeline = Timeline()
        return self._clip(self._encode(frames, timeline), clip_index, timeline)

    def generate(self, text: np.ndarray, clip_index: int = 0) -> Clip:
        """Generate a whole clip of the class that `text` names, text ids int64 [B,P] for a class-conditional model.

        Raises UsageError for wrong shapes or ids, and if the model is not class-conditional.
        """
        if not self.session.spec.hybrid:
            raise UsageError("the model is not class-conditional: call predict(frames) with the given frames")
        return self._clip(text, clip_index, Timeline())

    def _clip(self, condition: np.ndarray, clip_index: int, timeline: Timeline) -> Clip:
        """Generate all tokens after a condition [B,P], as `blocks` takes it, and decode the predicted frames."""
        if isinstance(self.session, Unrolling) and self.session.unrolls:
            clip = self._unrolled(self.session, condition, clip_index, timeline)
        else:
            for tokens in self.blocks(condition, clip_index, timeline):
                clip = tokens
        return self._decode(clip, self.session.spec.condition_frames, self.session.spec.video[0], timeline)

    def _unrolled(self, session: Unrolling, condition: np.ndarray, clip_index: int, timeline: Timeline) -> np.ndarray:
        """Return the token ids [B,T·H·W] with which `blocks` ends, generated in one call and timed as one stage."""
        spec = self.session.spec
        clip, prefix = self._begin(condition)
        noise = np.stack([self._noise(clip_index, block) for block in range(spec.blocks)])
        clip[:, spec.block_order()[-spec.blocks * spec.block_size :]] = session.unroll(prefix, noise, self.sampling)
        timeline.mark("loop")
        return clip

    def _begin(self, condition: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a clip [B,T·H·W] with only the given tokens set, and the condition [B,P] as `prefill` takes it."""
        self._check(condition)
        spec = self.session.spec
        clip = np.zeros((spec.batch, spec.clip_tokens), np.int64)
        if spec.hybrid:
            return clip, condition + spec.block_size
        clip[:, : spec.condition_tokens] = condition
        return clip, clip[:, spec.block_order()[: spec.condition_tokens]]

    def _noise(self, clip_index: int, block: int) -> np.ndarray:
        """Return the uniforms [B,L] of a block, for each clip of the batch."""
        spec = self.session.spec
        return np.stack([uniforms(self.seed, clip_index + b, block, spec.block_size) for b in range(spec.batch)])

    def stream(self, condition: np.ndarray, clip_index: int = 0) -> Iterator[Clip]:
        """Generate the clip of `predict` or `generate`, and yield its frames as soon as their tokens are complete.

        Each yielded `Clip` has the new frames only, those of as many latent frames as a block spans. The decoder is
        causal in time, so frames that are decoded before the later tokens exist are final.

        Args:
            condition: the given frames as `predict` takes them, or for a hybrid the text as `generate` takes it.
            clip_index: the clip index of the first clip of the batch.
        """
        spec = self.session.spec
        # The number of blocks that fill block[0] latent frames.
        blocks_per_part = spec.block[0] * spec.latent[1] * spec.latent[2] // spec.block_size
        timeline = Timeline()
        condition_tokens = condition if spec.hybrid else self._encode(condition, timeline)
        first = spec.condition_frames
        for count, tokens in enumerate(self.blocks(condition_tokens, clip_index, timeline), start=1):
            if count % blocks_per_part == 0:
                last = spec.frames(spec.condition_latents + count // blocks_per_part * spec.block[0])
                yield self._decode(tokens, first, last, timeline)
                timeline.skip()
                first = last

    def blocks(
        self, condition: np.ndarray, clip_index: int = 0, timeline: Timeline | None = None
    ) -> Iterator[np.ndarray]:
        """Generate block by block, and yield the token ids [B,T·H·W] of the clip after each block.

        The ids are in raster order and include those of the given frames. `SystemSpec.codes` turns them into the video
        tokenizer's codes. The same array is yielded each time, with one more block filled in.

        Args:
            condition: int64 [B,P], the codes of the given frames in raster order, or a hybrid's text ids.
            clip_index: the clip index of the first clip of the batch.
            timeline: where to record the time of prefill, samples and steps.

        Raises UsageError if the condition has a wrong shape or ids that the model does not have.
        """
        spec, timeline = self.session.spec, timeline or Timeline()
        clip, prefix = self._begin(condition)
        batch, size, P = spec.batch, spec.block_size, spec.condition_tokens
        order, given_tokens = spec.block_order(), spec.clip_tokens - spec.blocks * size
        logits = self.session.prefill(prefix)
        timeline.mark("prefill")
        for block in range(spec.blocks):
            noise = self._noise(clip_index, block)
            if spec.hybrid and block == 0:
                tokens = self._first_block(noise, timeline)
            else:
                tokens = self.session.sample(logits, noise, self.sampling)
            start = given_tokens + block * size
            clip[:, order[start : start + size]] = tokens
            timeline.mark("sample")
            yield clip
            if block + 1 < spec.blocks:
                # Only the last token of a hybrid's first block is not in the cache yet. The middle-of-video ids 1 to
                # L-1 follow it, so that the step takes a whole block.
                if spec.hybrid and block == 0:
                    tokens = np.concatenate([tokens[:, -1:], np.arange(1, size)[None].repeat(batch, 0)], 1)
                logits = self.session.step(tokens, np.full(batch, P + (block + spec.hybrid) * size, np.int64))
                timeline.mark("step")

    def _first_block(self, noise: np.ndarray, timeline: Timeline) -> np.ndarray:
        """Generate the first block [B,L] of a hybrid token by token, after begin-of-video, which is id 0."""
        spec = self.session.spec
        tokens = [np.zeros((spec.batch, 1), np.int64)]
        for i in range(spec.block_size):
            logits = self.session.step(tokens[-1], np.full(spec.batch, spec.condition_tokens + i, np.int64))
            timeline.mark("step")
            tokens.append(self.session.sample(logits, noise[:, i : i + 1], self.sampling).copy())
            timeline.mark("sample")
        return np.concatenate(tokens[1:], 1)

    def _check(self, condition: np.ndarray) -> None:
        """Raise UsageError unless a condition has the session's shape and only ids that the model has."""
        spec = self.session.spec
        name, ids = ("text", spec.text_vocab) if spec.hybrid else ("condition", spec.vocab)
        expected = (spec.batch, spec.condition_tokens)
        if condition.shape != expected:
            raise UsageError(f"the {name} tokens have shape {condition.shape}, expected {expected}")
        low, high = condition.min(), condition.max()
        if low < 0 or high >= ids:
            raise UsageError(f"the {name} tokens range from {low} to {high}, but the model's ids are 0 to {ids - 1}")

    def _encode(self, frames: np.ndarray, timeline: Timeline) -> np.ndarray:
        """Return the condition tokens [B,P] of the given frames. Raises UsageError as `predict` does."""
        spec = self.session.spec
        if spec.hybrid:
            raise UsageError("the model is class-conditional: call generate(text) with a text, not with frames")
        expected = (spec.batch, 3, spec.condition_frames, *spec.video[1:])
        if frames.shape != expected:
            raise UsageError(f"the frames have shape {frames.shape}, expected {expected} ([B,3,F,H,W] in [0,1])")
        tokens = self.session.encode(frames)
        timeline.mark("encode")
        return tokens

    def _decode(self, tokens: np.ndarray, first: int, last: int, timeline: Timeline) -> Clip:
        """Decode token ids [B,T·H·W], and return the video frames from `first` up to but not including `last`."""
        codes = self.session.spec.codes(tokens)
        video = self.session.decode(codes)[:, :, first:last].copy()
        timeline.mark("decode")
        return Clip(video, codes, timeline)
