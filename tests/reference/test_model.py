"""The generator: sizes, mask, caches."""

import pytest
import torch
from torch import Tensor

from nbp_reference.config import MODELS
from nbp_reference.model import CacheWrite, NextBlockTransformer, block_mask, tensor_scatter, tensor_scatter_
from tests.support import small_generator

# One token, part of a row, a row, a square, a frame, and blocks two frames deep.
BLOCKS = ["1x1x1", "1x1x2", "1x1x4", "1x2x2", "1x4x4", "2x1x2", "2x2x2", "2x4x4"]


@pytest.mark.parametrize(
    ("name", "vocab", "parameters"),
    [
        ("nbp-xl", 64_000, 884_431_872),
        ("nbp-xl", 96_016, 982_785_024),
        ("nbp-xxl", 64_000, 1_481_232_384),
        ("nbp-xxl", 96_016, 1_612_369_920),
        ("nbp-3b", 64_000, 4_034_107_392),
        ("nbp-3b", 96_016, 4_230_813_696),
    ],
)
def test_parameter_counts_are_the_published_models(name: str, vocab: int, parameters: int) -> None:
    config = MODELS[name]
    with torch.device("meta"):
        model = NextBlockTransformer(type(config)(config.layers, config.width, config.heads, vocab))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("size", [1, 3, 4])
def test_block_mask_is_the_papers_formula(size: int) -> None:
    mask = block_mask(torch.tensor([[0, 1, 5, 8], [3, 4, 11, 2]]), 12, size)
    assert mask.shape == (2, 1, 4, 12)
    expected = [[[[j // size <= i // size for j in range(12)] for i in row]] for row in ([0, 1, 5, 8], [3, 4, 11, 2])]
    assert mask.tolist() == expected


@pytest.mark.parametrize("block", ["1x1x1", "1x1x4", "2x2x2"])
@torch.inference_mode()
def test_a_token_reaches_its_own_block_and_later_ones_only(block: str) -> None:
    model = small_generator(block)
    tokens = torch.arange(48)[None] % 50
    changed = tokens.clone()
    changed[0, 20] += 1
    moved = (model(tokens) != model(changed)).any(-1)[0]
    assert moved.tolist() == [i // model.L >= 20 // model.L for i in range(48)]


def garbage_caches(model: NextBlockTransformer, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Caches that hold large finite numbers, other ones in every slot and in K and V."""
    rng = torch.Generator().manual_seed(0)
    k, v = ([torch.randn(x.shape, generator=rng) * 1e4 for x in caches] for caches in model.empty_caches(batch))
    return k, v


@pytest.mark.parametrize("write", [tensor_scatter, tensor_scatter_], ids=["pure", "in_place"])
@pytest.mark.parametrize("block", BLOCKS)
@torch.inference_mode()
def test_cached_steps_equal_the_full_forward_whatever_unused_slots_hold(block: str, write: CacheWrite) -> None:
    model = small_generator(block)
    config, step = model.config, model.L
    tokens = torch.randint(config.vocab, (2, config.clip_tokens), generator=torch.Generator().manual_seed(1))
    full = model(tokens)
    k, v = garbage_caches(model, batch=2)
    start, position = 0, config.condition_tokens
    while position <= config.capacity:
        logits, k, v = model.block_step(tokens[:, start:position], torch.tensor([start, start]), k, v, write=write)
        torch.testing.assert_close(logits, full[:, position - step : position], atol=1e-4, rtol=1e-4)
        start, position = position, position + step
    assert start == config.capacity


@pytest.mark.parametrize("block", ["1x1x1", "1x1x4", "2x2x2"])
@torch.inference_mode()
def test_rows_of_a_batch_keep_their_own_positions(block: str) -> None:
    model = small_generator(block)
    step = model.L
    tokens = torch.randint(50, (2, 48), generator=torch.Generator().manual_seed(2))
    full = model(tokens)
    k, v = garbage_caches(model, batch=2)
    lengths = [step, 3 * step]
    for row, n in enumerate(lengths):
        k_row, v_row = ([cache[row : row + 1] for cache in caches] for caches in (k, v))
        model.block_step(tokens[row : row + 1, :n], torch.tensor([0]), k_row, v_row, write=tensor_scatter_)
    next_blocks = torch.stack([tokens[row, n : n + step] for row, n in enumerate(lengths)])
    logits, _, _ = model.block_step(next_blocks, torch.tensor(lengths), k, v)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(logits[row], full[row, n : n + step], atol=1e-4, rtol=1e-4)


def test_tensor_scatter_is_pure_and_its_twin_writes_in_place() -> None:
    rng = torch.Generator().manual_seed(0)
    cache, update = torch.randn(2, 3, 8, 4, generator=rng), torch.randn(2, 3, 2, 4, generator=rng)
    before, positions = cache.clone(), torch.tensor([1, 6])
    expected = cache.clone()
    expected[0, :, 1:3], expected[1, :, 6:8] = update
    assert torch.equal(tensor_scatter(cache, update, positions), expected)
    assert torch.equal(cache, before)
    assert tensor_scatter_(cache, update, positions) is cache
    assert torch.equal(cache, expected)


def test_tensor_scatter_keeps_the_rules_for_operators() -> None:
    torch.library.opcheck(tensor_scatter, (torch.zeros(2, 3, 8, 4), torch.ones(2, 3, 2, 4), torch.tensor([1, 6])))


def test_reset_is_reproducible_and_fills_everything() -> None:
    config = MODELS["nbp-tiny"]
    first, same, other = (NextBlockTransformer(config) for _ in range(3))
    for model, seed in ((first, 0), (same, 0), (other, 1)):
        model.reset(seed)
    for (name, a), b, c in zip(first.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.ndim > 1:
            assert not torch.equal(a, c)
            assert a.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert (a == float(name.endswith("weight"))).all()
