"""The video tokenizer with channels innermost in memory, the layout that a GPU's tensor cores read directly.

Some of torch's layers lose that layout on a GPU: the results of replicate padding and GroupNorm have their channels
outermost. This module therefore computes every layer that is not a plain convolution on rows of channels.

Shape legend: B batch, C channels, T frames, H×W pixels or tokens, G groups of c = C/G channels.
"""

from copy import deepcopy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbp_reference.tokenizer import (
    CausalConv3d,
    DepthToSpace,
    FrameGroupNorm,
    ResidualUnit,
    Swish,
    VideoTokenizer,
)

LAYOUT = torch.channels_last_3d


class ChannelsLastTokenizer(VideoTokenizer):
    """A copy of a tokenizer that keeps the channels of every activation innermost in memory."""

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        nn.Module.__init__(self)
        self.config = tokenizer.config
        for name, module in tokenizer.named_children():
            self.add_module(name, cast(Any, deepcopy(module)).to(memory_format=LAYOUT))
        self._padding_indices: dict[tuple[object, ...], Tensor] = {}
        self.eval()

    def latents(self, video: Tensor) -> Tensor:
        """Return the latents [B,T,h,w,d] of a video [B,3,F,H,W], before quantisation."""
        return self.apply_layer(self.encoder_layers, video.contiguous(memory_format=LAYOUT)).permute(0, 2, 3, 4, 1)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Return the video [B,3,F,H,W], not clamped, of codes [B,T,h,w,d] in [-1,1]."""
        return self.apply_layer(self.decoder_layers, codes.contiguous().permute(0, 4, 1, 2, 3))

    def apply_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply a layer or a sequence of layers to x [B,C,T,H,W]; x and the result have their channels innermost.

        Raises TypeError for a layer that this module does not know.
        """
        if isinstance(layer, nn.Sequential):
            for part in layer:
                x = self.apply_layer(part, x)
            return x
        if isinstance(layer, ResidualUnit):
            return self.apply_layer(layer.fn, x) + self.apply_layer(layer.residual_fn, x)
        if isinstance(layer, CausalConv3d):
            return self.apply_layer(layer.conv, self._padded(x, layer.pad) if any(layer.pad) else x)
        if isinstance(layer, FrameGroupNorm):
            return frame_group_norm(x, layer)
        if isinstance(layer, DepthToSpace):
            return depth_to_space(x, layer.stride)
        if isinstance(layer, nn.Conv3d) and layer.kernel_size == (1, 1, 1):
            return pointwise_convolution(x, layer)
        if isinstance(layer, Swish | nn.Conv3d | nn.Identity):
            return cast(Tensor, layer(x))
        raise TypeError(f"no channels-last form of {type(layer).__name__}")

    def _padded(self, x: Tensor, pad: tuple[int, ...]) -> Tensor:
        """Return `F.pad(x, pad, mode="replicate")`, computed as one copy of rows of channels."""
        key = (*x.shape, *pad, x.device)
        if key not in self._padding_indices:
            self._padding_indices[key] = padding_indices(tuple(x.shape), pad, x.device)
        indices_BTHW = self._padding_indices[key]
        rows = x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1])
        padded = rows.index_select(0, indices_BTHW.flatten())
        return padded.view(*indices_BTHW.shape, -1).permute(0, 4, 1, 2, 3)


def padding_indices(shape: tuple[int, ...], pad: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the index of the row, of B·T·H·W, that each row of the padded tensor copies: int64 [B,T',H',W'].

    Args:
        shape: [B,C,T,H,W] of the tensor to pad.
        pad: as for `F.pad`: the padding before and after W, then H, then T.
        device: the device of the result.
    """
    batch, _, *sides = shape
    sources = torch.arange(batch, device=device)[:, None, None, None]
    for axis, side in enumerate(sides):
        before, after = pad[4 - 2 * axis], pad[5 - 2 * axis]
        index = torch.arange(-before, side + after, device=device).clamp(0, side - 1)
        sources = sources * side + index.view([-1 if n == axis else 1 for n in range(3)])
    return sources


def pointwise_convolution(x: Tensor, layer: nn.Conv3d) -> Tensor:
    """Return a convolution [B,C',T,H,W] of kernel 1 and stride 1, computed as a matrix product of rows of channels."""
    rows_BTHWC = x.permute(0, 2, 3, 4, 1)
    return F.linear(rows_BTHWC, layer.weight.flatten(1), layer.bias).permute(0, 4, 1, 2, 3)


def frame_group_norm(x: Tensor, norm: FrameGroupNorm) -> Tensor:
    """Return GroupNorm of x [B,C,T,H,W], with statistics per frame, computed in fp32."""
    rows_BTHWC = x.permute(0, 2, 3, 4, 1)
    variance_BTC, mean_BTC = _moments(rows_BTHWC)
    # The moments of a group follow from those of its channels, because every channel has the same number of pixels.
    mean_BTGc, variance_BTGc = (t.unflatten(-1, (norm.num_groups, -1)) for t in (mean_BTC, variance_BTC))
    spread_BTG1 = mean_BTGc.var(-1, correction=0, keepdim=True)
    mean_BTG1, variance_BTG1 = mean_BTGc.mean(-1, keepdim=True), variance_BTGc.mean(-1, keepdim=True) + spread_BTG1
    weight_Gc, bias_Gc = (p.float().view(norm.num_groups, -1) for p in (norm.weight, norm.bias))
    scale_BTGc = weight_Gc * (variance_BTG1 + norm.eps).rsqrt()
    shift_BTGc = bias_Gc - mean_BTG1 * scale_BTGc
    scale, shift = (t.flatten(-2)[:, :, None, None] for t in (scale_BTGc, shift_BTGc))
    normal_BTHWC = torch.empty_like(rows_BTHWC)  # in x's dtype, so that addcmul rounds when it writes
    return torch.addcmul(shift, rows_BTHWC, scale, out=normal_BTHWC).permute(0, 4, 1, 2, 3)


def _moments(rows_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and mean [B,T,C] over the pixels of each frame and channel, in fp32 for every dtype."""
    if rows_BTHWC.dtype == torch.float32:
        variance, mean = torch.var_mean(rows_BTHWC, (2, 3), correction=0)
        return variance, mean
    # `var_mean` would round its results to half precision. These two reductions accumulate in fp32 without a copy of
    # the input in fp32. The error of the difference below is smaller than the rounding error of the input.
    pixels = rows_BTHWC.shape[2] * rows_BTHWC.shape[3]
    mean = rows_BTHWC.mean((2, 3), dtype=torch.float32)
    norm = torch.linalg.vector_norm(rows_BTHWC, dim=(2, 3), dtype=torch.float32)
    return (norm.square() / pixels - mean.square()).clamp(min=0), mean


def depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Return `DepthToSpace` of x [B,t·h·w·C,T,H,W], computed in one copy.

    The result is [B,C,t·T,h·H,w·W] without its first t-1 frames.
    """
    t, h, w = stride
    b, _, frames, rows, columns = x.shape
    parts = x.permute(0, 2, 3, 4, 1).unflatten(-1, (t, h, w, -1))  # [B,T,H,W,t,h,w,C]
    merged: Tensor = parts.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, frames * t, rows * h, columns * w, -1)
    return merged[:, t - 1 :].permute(0, 4, 1, 2, 3)
