"""Block shapes, the configs of generators and tokenizers, and the named models.

A video of F = 1 + r·n frames becomes T = 1 + n latent frames of H×W tokens. A block has t×h×w of these tokens,
L = t·h·w. The numbers come from arXiv 2502.07737 and the authors' published checkpoints, except nbp-tiny's.
"""

from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple, Self

import numpy as np

from nbp_reference.errors import BlockShapeError


class Latent(NamedTuple):
    """The size of a clip's token grid: latent frames, rows, columns."""

    t: int
    h: int
    w: int

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"


@dataclass(frozen=True)
class BlockShape:
    """The shape of a block: t latent frames, h rows and w columns of tokens, which one step predicts together."""

    t: int
    h: int
    w: int

    @classmethod
    def parse(cls, text: str, latent: Latent) -> Self:
        """Parse a shape such as `1x1x16`, or a bare size such as `16`.

        A bare size becomes part of a row of the latent, or whole rows, or whole frames (Table 3 of the paper). The
        latent is only used for that. Raises BlockShapeError if the text is neither a shape nor a size, or if the size
        does not fill whole rows or frames.
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
            raise BlockShapeError(
                f"block size {size} does not fill whole rows or frames of a {latent} latent video: choose a divisor of "
                f"{latent.w}, or a multiple of it that fills whole rows or frames"
            )
        return block

    @property
    def size(self) -> int:
        """L, the number of tokens in a block."""
        return self.t * self.h * self.w

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"

    def check_tiles(self, *latents: Latent) -> None:
        """Raise BlockShapeError unless the block tiles every latent; the message lists the shapes that do."""
        for latent in latents:
            if latent.t % self.t or latent.h % self.h or latent.w % self.w:
                fits = ", ".join(str(s) for s in tiling_shapes(*latents))
                raise BlockShapeError(f"block {self} does not tile the {latent} latent; these do: {fits}")

    def order(self, latent: Latent) -> np.ndarray:
        """Return the raster index of every token in block order, int64 [T·H·W].

        In block order, the blocks follow one another in raster order, and so do the tokens inside a block.
        """
        t, h, w = latent.t // self.t, latent.h // self.h, latent.w // self.w
        raster = np.arange(prod(latent)).reshape(t, self.t, h, self.h, w, self.w)
        return raster.transpose(0, 2, 4, 1, 3, 5).reshape(-1)


def tiling_shapes(*latents: Latent) -> list[BlockShape]:
    """Return every block shape that tiles all the latents, in ascending size."""
    sides = zip(*latents, strict=True)
    choices = ([d for d in range(1, min(side) + 1) if all(s % d == 0 for s in side)] for side in sides)
    return sorted((BlockShape(*shape) for shape in product(*choices)), key=lambda b: (b.size, b.t, b.h, b.w))


@dataclass(frozen=True)
class TextCondition:
    """The text that gives a class-conditional (hybrid) model its class; it precedes the video.

    Attributes:
        tokens: the number of text tokens before every clip.
        vocab: the number of text token ids.
        words: the word of each id, of which the first is the end token; empty if the model needs a text tokenizer.
    """

    tokens: int = 8
    vocab: int = 32_000
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The size of the generator, and the task that it was trained for.

    Attributes:
        layers: the number of transformer layers.
        width: the embedding width, C.
        heads: the number of attention heads; the head dimension is width / heads.
        vocab: the number of token ids, V; a hybrid has L special ids, then those of its text, then those of the video.
        positions: the number of rows of the learned absolute position table.
        latent: the token grid of a whole clip.
        condition_latents: how many latent frames are given; the others are predicted. A hybrid has 0.
        block: the block shape that the weights were trained for; L is 16 in every published checkpoint.
        text: the text that gives a hybrid its class; None for frame prediction.
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
        """The width of one attention head, D."""
        return self.width // self.heads

    @property
    def frame_tokens(self) -> int:
        """The number of tokens in one latent frame."""
        return self.latent.h * self.latent.w

    @property
    def clip_tokens(self) -> int:
        """The number of tokens in a whole clip."""
        return prod(self.latent)

    @property
    def condition_tokens(self) -> int:
        """P, the number of tokens that the prefill reads: those of the given latent frames, or of a hybrid's text."""
        return self.text.tokens if self.text else self.condition_latents * self.frame_tokens

    @property
    def codes(self) -> int:
        """The number of codes of the video tokenizer."""
        return self.vocab - self.code_shift

    @property
    def code_shift(self) -> int:
        """The token id of the video tokenizer's code 0; in a hybrid, special tokens and text have the ids before it."""
        return self.block.size + self.text.vocab if self.text else 0

    @property
    def capacity(self) -> int:
        """S, the number of cache slots that a clip fills: one per token, without the last block, which is never read.

        A hybrid also reads its text and, as many as its last block has, begin-of-video and middle-of-video tokens.
        """
        return self.clip_tokens + self.text.tokens if self.text else self.clip_tokens - self.block.size

    def with_block(self, text: str) -> Self:
        """Return the config for another block, given as `1x1x16` or as a bare size; a hybrid's vocabulary changes too.

        Raises BlockShapeError unless the block tiles both the given and the predicted latent frames; the message lists
        the shapes that do.
        """
        block = BlockShape.parse(text, self.latent)
        given, predicted = self.condition_latents, self.latent.t - self.condition_latents
        block.check_tiles(*(self.latent._replace(t=t) for t in (given, predicted) if t))
        more_special_ids = block.size - self.block.size if self.text else 0
        return replace(self, block=block, vocab=self.vocab + more_special_ids)

    def to_json(self) -> dict[str, Any]:
        """Return the config as values that JSON has; `from_json` is the inverse."""
        return asdict(self) | {"latent": list(self.latent), "block": str(self.block)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Build a config from the values of `to_json`; raises TypeError for unknown or missing names."""
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
    """The part of the tokenizer that works at one resolution: its channels and its number of residual units."""

    channels: int
    units: int


@dataclass(frozen=True)
class TokenizerConfig:
    """The size of the causal video tokenizer: encoder, finite scalar quantisation (FSQ), decoder.

    Attributes:
        stages: the encoder's stages from fine to coarse; the decoder has them in reverse.
        strides: the stride (t, h, w) between each pair of consecutive encoder stages.
        levels: the number of FSQ levels of each latent channel; their product is the vocabulary.
        groups: the number of groups of each GroupNorm.
    """

    stages: tuple[Stage, ...] = (Stage(128, 4), Stage(256, 4), Stage(256, 4), Stage(512, 8))
    strides: tuple[tuple[int, int, int], ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    groups: int = 32

    @property
    def vocab(self) -> int:
        """The number of codes."""
        return prod(self.levels)

    @property
    def compression(self) -> tuple[int, int, int]:
        """Video frames, pixel rows and pixel columns per token: the product of the strides along (t, h, w)."""
        t, h, w = (prod(s) for s in zip(*self.strides, strict=True))
        return t, h, w

    def frames(self, latent_frames: int) -> int:
        """Return the number of video frames for a number of latent frames, of which the first covers one frame."""
        return 1 + self.compression[0] * (latent_frames - 1)

    def latent(self, frames: int, height: int, width: int) -> Latent:
        """Return the token grid of a video; raises ValueError for sizes that the strides do not divide."""
        t, h, w = self.compression
        if (frames - 1) % t or height % h or width % w:
            raise ValueError(
                f"a video of {frames}x{height}x{width} does not fit the tokenizer: "
                f"it must have 1 + {t}n frames, a height divisible by {h} and a width divisible by {w}"
            )
        return Latent(1 + (frames - 1) // t, height // h, width // w)

    def to_json(self) -> dict[str, Any]:
        """Return the config as values that JSON has; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Build a config from the values of `to_json`; raises KeyError or TypeError if they are not a config's."""
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
# Each size is also a class-conditional hybrid, whose condition is a text in place of frames.
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
