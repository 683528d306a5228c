"""The channels-last tokenizer computes what the reference computes, and keeps its layout in every layer."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbp_bench.channels_last import LAYOUT, ChannelsLastTokenizer, frame_group_norm, padding_indices
from nbp_bench.torch_sessions import EagerSession
from nbp_export.graphs import system_spec
from nbp_export.parity import compare
from nbp_reference.config import TINY, TOKENIZERS, Latent, Stage, TokenizerConfig
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import FrameGroupNorm, VideoTokenizer

# Like the official tokenizer, this one has groups of several channels and a stride of 2 in time.
GROUPED = TokenizerConfig(stages=(Stage(16, 1), Stage(16, 1), Stage(32, 1), Stage(32, 1)), levels=(8, 5, 5), groups=4)


def tokenizer_of(config: TokenizerConfig) -> VideoTokenizer:
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(config).eval()
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if "beta" in name or parameter.ndim == 1:  # initially they are all ones or zeros
                parameter.uniform_(0.5, 1.5)
    return tokenizer


@pytest.mark.parametrize("config", [GROUPED, TOKENIZERS["nbp-tiny"]], ids=["grouped", "nbp-tiny"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_videos_and_tokens_equal_the_references(config: TokenizerConfig, batch: int) -> None:
    reference = tokenizer_of(config)
    ours = ChannelsLastTokenizer(reference)
    video = torch.rand(batch, 3, 9, 16, 24)
    latents = reference.latents(video)
    assert compare("", "", "", ours.latents(video).numpy(), latents.numpy(), 5e-5).passed
    assert (ours.encode(video) == reference.encode(video)).float().mean() > 0.999  # rounding may decide between codes
    tokens = torch.randint(config.vocab, (batch, 18))
    codes = reference.fsq.codes(tokens.unflatten(1, (3, 2, 3)))
    assert compare("", "", "", ours.reconstruct(codes).numpy(), reference.reconstruct(codes).numpy(), 5e-5).passed
    actual, expected = (model.decode(tokens, Latent(3, 2, 3)).numpy() for model in (ours, reference))
    assert compare("", "", "", actual, expected, 1e-4).passed


@torch.inference_mode()
def test_every_layer_keeps_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = []
    apply = ChannelsLastTokenizer.apply_layer

    def apply_and_record(self: ChannelsLastTokenizer, layer: nn.Module, x: Tensor) -> Tensor:
        out = apply(self, layer, x)
        rows = out.permute(0, 2, 3, 4, 1)
        layouts.append((type(layer).__name__, rows.stride(-1) == 1 and rows[0].is_contiguous()))
        return out

    monkeypatch.setattr(ChannelsLastTokenizer, "apply_layer", apply_and_record)
    ours = ChannelsLastTokenizer(tokenizer_of(GROUPED))
    ours.encode(torch.rand(2, 3, 9, 16, 24))
    ours.decode(torch.randint(GROUPED.vocab, (2, 18)), Latent(3, 2, 3))
    assert {name for name, _ in layouts} >= {"CausalConv3d", "FrameGroupNorm", "Swish", "DepthToSpace", "Conv3d"}
    assert not [name for name, is_innermost in layouts if not is_innermost]
    for name, weight in ours.named_parameters():
        assert weight.ndim < 5 or weight.is_contiguous(memory_format=LAYOUT), name


def test_padding_equals_torchs() -> None:
    x, pad = torch.rand(2, 3, 4, 5, 6), (1, 1, 2, 0, 3, 1)
    rows = x.permute(0, 2, 3, 4, 1).reshape(-1, 3)
    padded = rows[padding_indices(tuple(x.shape), pad, x.device)].permute(0, 4, 1, 2, 3)
    assert torch.equal(padded, F.pad(x, pad, mode="replicate"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@torch.inference_mode()
def test_group_norm_has_statistics_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    norm = FrameGroupNorm(4, 16)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias)
    x = (torch.randn(2, 16, 3, 20, 20) * 2 + 5).to(dtype).contiguous(memory_format=LAYOUT)
    actual = frame_group_norm(x, norm.to(dtype))
    assert actual.dtype == dtype
    assert compare("", "", "", actual.float().numpy(), norm.float()(x.float()).numpy(), tolerance).passed


def test_a_session_takes_either_layout() -> None:
    tokenizer = tokenizer_of(TOKENIZERS["nbp-tiny"])
    config = replace(TINY, layers=1).with_block("16")
    spec = system_spec(config, tokenizer.config, "fp32", 1)
    session = partial(EagerSession, spec, NextBlockTransformer(config), tokenizer)
    assert session().tokenizer is tokenizer, "on a CPU the plain layout is the faster one"
    tokens = np.random.default_rng(0).integers(0, spec.vocab, (1, spec.clip_tokens))
    ours, expected = (session(channels_last=on).decode(tokens) for on in (True, False))
    assert compare("", "", "", ours, expected, 5e-5).passed
