"""The video tokenizer's size, causality and quantisation."""

from math import atanh, prod, tan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nbp_reference.config import TOKENIZERS, Latent
from nbp_reference.tokenizer import FSQ, DepthToSpace, VideoTokenizer
from tests.support import filled


@pytest.fixture(scope="module")
def tiny() -> VideoTokenizer:
    return filled(VideoTokenizer(TOKENIZERS["nbp-tiny"]))


@pytest.fixture(scope="module")
def video() -> Tensor:
    return torch.rand(2, 3, 17, 32, 48, generator=torch.Generator().manual_seed(0))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_those_of_the_published_tokenizer() -> None:
    with torch.device("meta"):
        model = VideoTokenizer(TOKENIZERS["official"])
    assert count(model.encoder_layers) == 144_886_790
    assert count(model.decoder_layers) == 225_485_315
    assert count(model) == 370_372_105


@torch.inference_mode()
def test_shapes_and_ranges(tiny: VideoTokenizer, video: Tensor) -> None:
    tokens = tiny.encode(video)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, 5 * 4 * 6)
    assert tokens.min() >= 0
    assert tokens.max() < tiny.config.vocab
    assert len(tokens.unique()) > 20, "the tests below need weights that use many codes"
    again = tiny.decode(tokens, Latent(5, 4, 6))
    assert again.shape == video.shape
    assert again.min() == 0
    assert again.max() == 1


@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.inference_mode()
def test_encoding_the_first_frames_gives_a_prefix(tiny: VideoTokenizer, video: Tensor, frames: int) -> None:
    head = tiny.latents(video[:, :, :frames])
    torch.testing.assert_close(head, tiny.latents(video)[:, : head.shape[1]], atol=1e-4, rtol=0)
    tokens = tiny.encode(video[:, :, :frames])
    torch.testing.assert_close(tokens, tiny.encode(video)[:, : tokens.shape[1]])


@pytest.mark.parametrize("frames", [1, 2, 4])
@torch.inference_mode()
def test_decoding_the_first_latent_frames_gives_a_prefix(tiny: VideoTokenizer, video: Tensor, frames: int) -> None:
    codes = tiny.fsq.quantize(tiny.latents(video))
    head = tiny.reconstruct(codes[:, :frames])
    assert head.shape[2] == tiny.config.frames(frames)
    torch.testing.assert_close(head, tiny.reconstruct(codes)[:, :, : head.shape[2]], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_every_frame_matters(tiny: VideoTokenizer, video: Tensor) -> None:
    latents = tiny.latents(video)
    for frame in range(17):
        changed = video.clone()
        changed[:, :, frame] = 1 - changed[:, :, frame]
        moved = (tiny.latents(changed) != latents).any(-1).any(-1).any(-1).any(0)
        first = (frame + 3) // 4
        assert moved.tolist() == [t >= first for t in range(5)], f"frame {frame}"


def test_depth_to_space_splits_channels_as_t_h_w_c() -> None:
    t, h, w, channels = 2, 3, 2, 4
    x = torch.arange(t * h * w * channels * 2 * 2 * 2).view(1, -1, 2, 2, 2)
    out = DepthToSpace((t, h, w))(x)
    assert out.shape == (1, channels, 2 * t - 1, 2 * h, 2 * w)
    for c, f, row, column in ((0, 0, 0, 0), (3, 2, 5, 3), (1, 1, 4, 2)):
        frame = f + 1  # the first is dropped
        channel = ((frame % t * h + row % h) * w + column % w) * channels + c
        assert out[0, c, f, row, column] == x[0, channel, frame // t, row // h, column // w]


levels_of_a_code = st.lists(st.integers(2, 9), min_size=1, max_size=6).map(tuple)


def _shift(levels: tuple[int, ...]) -> list[float]:
    return [tan(1 / ((level - 1) * (1 - 1e-3))) if level % 2 == 0 else 0.0 for level in levels]


@given(levels_of_a_code, st.data())
def test_fsq_indices_and_codes_are_inverse(levels: tuple[int, ...], data: st.DataObject) -> None:
    fsq = FSQ(levels)
    index = data.draw(st.integers(0, prod(levels) - 1))
    codes, z, rest = fsq.codes(torch.tensor([index]))[0], [], index
    for level, code, shift in zip(levels, codes.tolist(), _shift(levels), strict=True):
        digit, rest = rest % level, rest // level
        number = digit - level // 2
        assert code == pytest.approx(number / (level // 2))
        # A latent that the paper's bound, tanh(z+s)·h − o, maps to this level, or just inside an outermost one.
        height = (level - 1) * (1 - 1e-3) / 2
        offset = 0.5 * (level % 2 == 0)
        z.append(atanh(max(-0.9999, min(0.9999, (number + offset) / height))) - shift)
    latent = torch.tensor(z)
    assert fsq.indices(latent).item() == index
    torch.testing.assert_close(fsq.quantize(latent), codes)


@given(st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=6))
def test_any_latent_has_a_token_and_quantises_to_its_code(z: list[float]) -> None:
    fsq, latent = FSQ(TOKENIZERS["official"].levels), torch.tensor(z)
    index = fsq.indices(latent)
    assert 0 <= index < 64_000
    torch.testing.assert_close(fsq.codes(index), fsq.quantize(latent))


def test_fsq_shift_is_the_originals_tan() -> None:
    half_width = 7 * (1 - 1e-3) / 2
    middle = FSQ((8, 5)).bound(-torch.tensor([0.5 / half_width, 0.0]).tan())  # where the shift cancels z
    torch.testing.assert_close(middle, torch.tensor([-0.5, 0.0]))


def test_indices_are_exact_from_half_precision() -> None:
    fsq = FSQ(TOKENIZERS["official"].levels)
    latent = torch.full((6,), 20.0)
    assert fsq.indices(latent.half()) == fsq.indices(latent.bfloat16()) == 63_999


def test_the_gradient_passes_through_the_rounding() -> None:
    z = torch.linspace(-1, 1, 6).requires_grad_()
    fsq = FSQ(TOKENIZERS["official"].levels)
    fsq.quantize(z).sum().backward()
    rounded = z.grad
    smooth = torch.autograd.grad((fsq.bound(z) / fsq.half_levels).sum(), z)[0]
    assert rounded is not None
    torch.testing.assert_close(rounded, smooth)


@torch.inference_mode()
def test_a_half_precision_tokenizer_keeps_its_dtype(video: Tensor) -> None:
    model = filled(VideoTokenizer(TOKENIZERS["nbp-tiny"])).bfloat16()
    tokens = model.encode(video[:, :, :5].bfloat16())
    assert tokens.max() < model.config.vocab
    assert model.decode(tokens, Latent(2, 4, 6)).dtype == torch.bfloat16
