"""The shapes of a Next-Block-Prediction system: block, generator, tokenizer, and the named pairs of both.

Latent: a video of F = 1 + r·n frames becomes T = 1 + n latent frames of H×W tokens. A block is t×h×w of
them, L = t·h·w tokens. Source of every number: arXiv 2502.07737 and the authors' published checkpoints.
"""

from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple, Self

import numpy as np

from nbp_reference.errors import BlockShapeError


class Latent(NamedTuple):
    """The token grid of one clip: frames, rows, columns."""

    t: int
    h: int
    w: int

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"


@dataclass(frozen=True)
class BlockShape:
    """The t×h×w tokens that are predicted together."""

    t: int
    h: int
    w: int

    @classmethod
    def parse(cls, text: str, latent: Latent) -> Self:
        """Read `1x1x16`, or a bare size, which fills rows first, then whole rows, then frames (Table 3).

        The latent only gives a bare size its row and frame. Raises BlockShapeError if the text is neither.
        """
        parts = text.lower().split("x")
        if not all(p.isdecimal() and int(p) > 0 for p in parts) or len(parts) not in (1, 3):
            raise BlockShapeError(f"block {text!r} is neither a size like 16 nor a shape like 1x1x16")
        if len(parts) == 3:
            return cls(*map(int, parts))
        size = int(parts[0])
        w = min(size, latent.w)
        h = min(size // w, latent.h)
        block = cls(size // (w * h), h, w)
        if block.size != size:
            raise BlockShapeError(f"block size {size} does not fill whole rows or frames of a {latent} latent")
        return block

    @property
    def size(self) -> int:
        """L, the tokens in a block."""
        return self.t * self.h * self.w

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"

    def check_tiles(self, *latents: Latent) -> None:
        """Raise BlockShapeError, listing the shapes that do tile, unless copies of the block fill every latent."""
        for latent in latents:
            if latent.t % self.t or latent.h % self.h or latent.w % self.w:
                fits = ", ".join(str(s) for s in tiling_shapes(*latents))
                raise BlockShapeError(f"block {self} does not tile the {latent} latent; these do: {fits}")

    def order(self, latent: Latent) -> np.ndarray:
        """Raster index of every token in block order: int64 [T·H·W], blocks raster, raster inside a block."""
        t, h, w = latent.t // self.t, latent.h // self.h, latent.w // self.w
        raster = np.arange(prod(latent)).reshape(t, self.t, h, self.h, w, self.w)
        return raster.transpose(0, 2, 4, 1, 3, 5).reshape(-1)


def tiling_shapes(*latents: Latent) -> list[BlockShape]:
    """Every block shape that tiles all the latents, small to large."""
    sides = zip(*latents, strict=True)
    choices = ([d for d in range(1, min(side) + 1) if all(s % d == 0 for s in side)] for side in sides)
    return sorted((BlockShape(*shape) for shape in product(*choices)), key=lambda b: (b.size, b.t, b.h, b.w))


@dataclass(frozen=True)
class TextCondition:
    """How a class-conditional (hybrid) model is told its class: as text, before the video.

    Attributes:
        tokens: text tokens before every clip.
        vocab: text token ids.
        words: the word of each id, the first of them the end token; empty where a tokenizer file is needed.
    """

    tokens: int = 8
    vocab: int = 32_000
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The generator's transformer, and the task that it was trained for.

    Attributes:
        layers: transformer blocks, n.
        width: embedding width, C.
        heads: attention heads; the head dimension is width / heads.
        vocab: token ids, V; a hybrid's are L special tokens, then text, then video.
        positions: rows of the learned absolute position table.
        latent: the whole clip in tokens.
        condition_latents: latent frames that are given, the rest is predicted; 0 for a hybrid.
        block: the block shape that the weights were trained for (16 for every published checkpoint).
        text: what a hybrid's class is told in; None for frame prediction.
    """

    layers: int
    width: int
    heads: int
    vocab: int = 64_000
    positions: int = 5120
    latent: Latent = Latent(5, 16, 16)
    condition_latents: int = 2
    block: BlockShape = BlockShape(1, 1, 16)
    text: TextCondition | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def frame_tokens(self) -> int:
        """Tokens in one latent frame."""
        return self.latent.h * self.latent.w

    @property
    def clip_tokens(self) -> int:
        """Tokens in a whole clip."""
        return prod(self.latent)

    @property
    def condition_tokens(self) -> int:
        """P, the tokens that are given, and that the prefill reads: latent frames, or a hybrid's text."""
        return self.text.tokens if self.text else self.condition_latents * self.frame_tokens

    @property
    def codes(self) -> int:
        """Tokens of the video tokenizer."""
        return self.vocab - self.code_shift

    @property
    def code_shift(self) -> int:
        """The token id of the video tokenizer's token 0: a hybrid's special tokens and text come before it."""
        return self.block.size + self.text.vocab if self.text else 0

    @property
    def capacity(self) -> int:
        """Cache slots that a generation fills: all tokens but the last block, which is never fed back.

        A hybrid feeds begin-of-video and L-1 middle-of-video tokens too, as many as it leaves out.
        """
        return self.clip_tokens + self.text.tokens if self.text else self.clip_tokens - self.block.size

    def with_block(self, text: str) -> Self:
        """The same model for another block, `1x1x16` or a bare size; a hybrid's vocabulary changes with it.

        Raises BlockShapeError, listing the shapes that fit, unless it tiles the condition and the prediction.
        """
        block = BlockShape.parse(text, self.latent)
        given, rest = self.condition_latents, self.latent.t - self.condition_latents
        block.check_tiles(*(self.latent._replace(t=t) for t in (given, rest) if t))
        special = block.size - self.block.size if self.text else 0
        return replace(self, block=block, vocab=self.vocab + special)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_json`."""
        return asdict(self) | {"latent": list(self.latent), "block": str(self.block)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Build from `to_json`'s values; raises TypeError for unknown or missing names."""
        latent, text = Latent(*data["latent"]), data.get("text")
        return cls(
            **data
            | {
                "latent": latent,
                "block": BlockShape.parse(data["block"], latent),
                "text": TextCondition(**text | {"words": tuple(text["words"])}) if text else None,
            }
        )


class Stage(NamedTuple):
    """Residual units at one resolution."""

    channels: int
    units: int


@dataclass(frozen=True)
class TokenizerConfig:
    """The causal video tokenizer: encoder, finite scalar quantisation (FSQ), decoder.

    Attributes:
        stages: encoder stages from fine to coarse; the decoder mirrors them.
        strides: (t, h, w) between consecutive encoder stages.
        levels: FSQ levels of each latent channel; their product is the vocabulary.
        groups: GroupNorm groups.
    """

    stages: tuple[Stage, ...] = (Stage(128, 4), Stage(256, 4), Stage(256, 4), Stage(512, 8))
    strides: tuple[tuple[int, int, int], ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    groups: int = 32

    @property
    def vocab(self) -> int:
        """Number of codes."""
        return prod(self.levels)

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixels per token along (t, h, w)."""
        t, h, w = (prod(s) for s in zip(*self.strides, strict=True))
        return t, h, w

    def frames(self, latent_frames: int) -> int:
        """Video frames of so many latent frames: the first stands alone."""
        return 1 + self.compression[0] * (latent_frames - 1)

    def latent(self, frames: int, height: int, width: int) -> Latent:
        """The token grid of a video; raises ValueError for sizes that the strides do not divide."""
        t, h, w = self.compression
        if (frames - 1) % t or height % h or width % w:
            raise ValueError(f"{frames}x{height}x{width} video: needs 1 + {t}n frames, sides in multiples of {h}, {w}")
        return Latent(1 + (frames - 1) // t, height // h, width // w)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Build from `to_json`'s values; raises TypeError for unknown or missing names."""
        return cls(
            stages=tuple(Stage(*s) for s in data["stages"]),
            strides=tuple((t, h, w) for t, h, w in data["strides"]),
            levels=tuple(data["levels"]),
            groups=data["groups"],
        )


TINY = ModelConfig(layers=5, width=128, heads=4, vocab=1000, positions=1280)
TINY_TEXT = TextCondition(vocab=8, words=("", "carphone", "bikes", "bunny", "city", "ball", "pedestrians", "tree"))
MODELS = {
    "nbp-xl": ModelConfig(layers=24, width=1536, heads=16),
    "nbp-xxl": ModelConfig(layers=24, width=2048, heads=32),
    "nbp-3b": ModelConfig(layers=32, width=3072, heads=32),
    "nbp-tiny": TINY,
}
# Each size also as a class-conditional hybrid, which is told a text and no frames.
MODELS |= {
    f"{name}-hybrid": replace(
        model,
        vocab=model.vocab + model.block.size + text.vocab,
        positions=max(model.positions, model.clip_tokens + text.tokens),
        condition_latents=0,
        text=text,
    )
    for name, model in MODELS.items()
    for text in [TINY_TEXT if model is TINY else TextCondition()]
}
TOKENIZERS = {
    "official": TokenizerConfig(),
    "nbp-tiny": TokenizerConfig(
        stages=(Stage(24, 0), Stage(24, 1), Stage(48, 1), Stage(48, 1)),
        levels=(8, 5, 5, 5),
        groups=1,
    ),
}
