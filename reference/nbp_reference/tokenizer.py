"""The video tokenizer: a causal 3D convolutional autoencoder around finite scalar quantisation (FSQ).

Shape legend: B batch, C channels, F video frames, T latent frames, H×W pixels, h×w tokens.
Video is [B,3,F,H,W] in [0,1]. All layers are causal in time: the first frames of a video alone have the same tokens
as in the whole video.
Source: the authors' published checkpoints; FSQ from arXiv 2309.15505.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbp_reference.config import TokenizerConfig


class CausalConv3d(nn.Module):
    """A Conv3d whose outputs do not depend on later frames.

    It repeats the edges: kernel 3 pads 1 on each side of H and W, and 2 before the first frame.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        side = kernel // 2
        self.pad = (side, side, side, side, kernel - 1, 0)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B,C,T,H,W] to [B,C',⌈T/s⌉,⌈H/s⌉,⌈W/s⌉], where s is the stride along each axis."""
        return cast(Tensor, self.conv(F.pad(x, self.pad, mode="replicate")))


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm with the statistics of each frame alone, so that no frame depends on later ones."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B,C,T,H,W]; the shape stays the same."""
        b, _, t, _, _ = x.shape
        frames = x.transpose(1, 2).flatten(0, 1)
        return cast(Tensor, super().forward(frames).unflatten(0, (b, t))).transpose(1, 2)


class Swish(nn.Module):
    """The activation x·σ(βx) with a learned β per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to [B,C,T,H,W]; the shape stays the same."""
        return x * torch.sigmoid(self.beta * x)


class ResidualUnit(nn.Module):
    """Two causal convolutions, each after a norm and an activation, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.fn = nn.Sequential(
            FrameGroupNorm(groups, inputs),
            Swish(inputs),
            CausalConv3d(inputs, outputs),
            FrameGroupNorm(groups, outputs),
            Swish(outputs),
            CausalConv3d(outputs, outputs),
        )
        self.residual_fn = nn.Sequential(CausalConv3d(inputs, outputs, 1)) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B,C,T,H,W] to [B,C',T,H,W]."""
        return cast(Tensor, self.fn(x) + self.residual_fn(x))


class DepthToSpace(nn.Module):
    """Rearranges channels into a higher resolution; the channel index splits into (t, h, w, c) with c innermost."""

    def __init__(self, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map [B,t·h·w·C,T,H,W] to [B,C,t·T-(t-1),h·H,w·W].

        The first t-1 frames are dropped, because the first latent frame covers only one frame.
        """
        t, h, w = self.stride
        b, _, frames, rows, columns = x.shape
        x = x.view(b, t, h, w, -1, frames, rows, columns).permute(0, 4, 5, 1, 6, 2, 7, 3)
        x = x.reshape(b, -1, frames * t, rows * h, columns * w)
        return x[:, :, t - 1 :]


class FSQ(nn.Module):
    """Finite scalar quantisation, which has no parameters: each channel is rounded to one of its levels."""

    levels: Tensor
    half_levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        # The buffers are integers, which stay exact when the model is converted to half precision. They are built on
        # the CPU even if the weights are on `meta`, because a checkpoint does not contain them.
        level = torch.tensor(levels, device="cpu")
        self.register_buffer("levels", level, persistent=False)
        self.register_buffer("half_levels", level // 2, persistent=False)
        basis = torch.tensor([prod(levels[:i]) for i in range(len(levels))], device="cpu")
        self.register_buffer("basis", basis, persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """Map z [..., d] into each channel's range of level numbers; `indices` and `quantize` round the result."""
        half_width = (self.levels - 1) * (1 - 1e-3) / 2
        offset = 0.5 * (self.levels % 2 == 0)
        # The FSQ paper has atanh here; the authors' code has tan, with which every published checkpoint was trained.
        return torch.tanh(z + torch.tan(offset / half_width)) * half_width - offset

    def quantize(self, z: Tensor) -> Tensor:
        """Return the codes [..., d] in [-1,1] of z [..., d]; the gradient ignores the rounding (straight-through)."""
        bounded = self.bound(z)
        return (bounded + (bounded.round() - bounded).detach()) / self.half_levels

    def indices(self, z: Tensor) -> Tensor:
        """Return the token ids int64 [...] of z [..., d].

        After rounding, the computation is in integers, because half precision cannot represent ids such as 63,999.
        """
        digits = self.bound(z.float()).round().long() + self.half_levels
        return (digits * self.basis).sum(-1)

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes [..., d] in [-1,1] of token ids [...]."""
        digits = indices[..., None] // self.basis % self.levels
        return (digits - self.half_levels) / self.half_levels


def _encoder_layers(config: TokenizerConfig) -> Iterator[nn.Module]:
    first, last = config.stages[0], config.stages[-1]
    yield CausalConv3d(3, first.channels)
    channels = first.channels
    for stage, stride in zip(config.stages, (*config.strides, None), strict=True):
        for _ in range(stage.units):
            yield ResidualUnit(channels, stage.channels, config.groups)
            channels = stage.channels
        if stride:
            yield CausalConv3d(channels, channels, stride=stride)
    yield FrameGroupNorm(config.groups, last.channels)
    yield Swish(last.channels)
    yield nn.Conv3d(last.channels, len(config.levels), 1)


def _decoder_layers(config: TokenizerConfig) -> Iterator[nn.Module]:
    stages = config.stages[::-1]
    yield CausalConv3d(len(config.levels), stages[0].channels)
    yield from (ResidualUnit(stages[0].channels, stages[0].channels, config.groups) for _ in range(stages[0].units))
    for (coarse, fine), stride in zip(pairwise(stages), config.strides[::-1], strict=True):
        yield CausalConv3d(coarse.channels, coarse.channels * stride[0] * stride[1] * stride[2])
        yield DepthToSpace(stride)
        for unit in range(fine.units):
            yield ResidualUnit(fine.channels if unit else coarse.channels, fine.channels, config.groups)
    yield FrameGroupNorm(config.groups, stages[-1].channels)
    yield Swish(stages[-1].channels)
    yield CausalConv3d(stages[-1].channels, 3)


class VideoTokenizer(nn.Module):
    """Encodes video to tokens and decodes tokens to video. Parameter names are the authors'."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_layers = nn.Sequential(*_encoder_layers(config))
        self.decoder_layers = nn.Sequential(*_decoder_layers(config))
        self.fsq = FSQ(config.levels)

    def latents(self, video: Tensor) -> Tensor:
        """Return the latents [B,T,h,w,d] of a video [B,3,F,H,W] before quantisation, d of them per token."""
        return cast(Tensor, self.encoder_layers(video)).permute(0, 2, 3, 4, 1)

    def encode(self, video: Tensor) -> Tensor:
        """Return the token ids int64 [B,T·h·w], in raster order, of a video [B,3,F,H,W] in [0,1] with F = 1 + r·n."""
        return self.fsq.indices(self.latents(video)).flatten(1)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Return the video [B,3,F,H,W] of codes [B,T,h,w,d] in [-1,1], before it is clamped to [0,1]."""
        return cast(Tensor, self.decoder_layers(codes.permute(0, 4, 1, 2, 3)))

    def decode(self, tokens: Tensor, latent: tuple[int, int, int]) -> Tensor:
        """Return the video [B,3,F,H,W] in [0,1] of token ids [B,T·h·w] in raster order; `latent` is (T, h, w)."""
        codes = self.fsq.codes(tokens.unflatten(1, latent))
        return self.reconstruct(codes.to(next(self.decoder_layers.parameters()).dtype)).clamp(0, 1)
