"""The generator's size, its mask and its caches."""

from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nbp_reference.config import MODELS, BlockShape, Latent, ModelConfig, TextCondition
from nbp_reference.model import (
    CacheWrite,
    NextBlockTransformer,
    block_mask,
    tensor_scatter,
    tensor_scatter_,
    training_pair,
)
from tests.support import filled, golden_hybrid, small_generator

# A token, part of a row, a row, a square, a frame, and blocks of two frames.
BLOCKS = ["1x1x1", "1x1x2", "1x1x4", "1x2x2", "1x4x4", "2x1x2", "2x2x2", "2x4x4"]


@pytest.mark.parametrize(
    ("name", "vocab", "parameters"),
    [
        ("nbp-xl", 64_000, 884_431_872),
        ("nbp-xl-hybrid", 96_016, 982_785_024),
        ("nbp-xxl", 64_000, 1_481_232_384),
        ("nbp-xxl-hybrid", 96_016, 1_612_369_920),
        ("nbp-3b", 64_000, 4_034_107_392),
        ("nbp-3b-hybrid", 96_016, 4_230_813_696),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(name: str, vocab: int, parameters: int) -> None:
    assert MODELS[name].vocab == vocab
    with torch.device("meta"):
        model = NextBlockTransformer(MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("size", [1, 3, 4])
def test_block_mask_follows_the_papers_formula(size: int) -> None:
    config = ModelConfig(1, 8, 1, latent=Latent(2, 2, 12), block=BlockShape(1, 1, size))
    mask = block_mask(torch.tensor([[0, 1, 5, 8], [3, 4, 11, 2]]), 12, config)
    assert mask.shape == (2, 1, 4, 12)
    expected = [[[[j // size <= i // size for j in range(12)] for i in row]] for row in ([0, 1, 5, 8], [3, 4, 11, 2])]
    assert mask.tolist() == expected


@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_hybrids_mask_follows_the_papers_formula(size: int) -> None:
    P, L = 8, size
    config = ModelConfig(1, 8, 1, condition_latents=0, block=BlockShape(1, 1, size), text=TextCondition(P, 9))

    def block_of(i: int) -> int:
        return (i - P - L) // L

    def is_visible(i: int, j: int) -> bool:
        return j < P or j <= i or (i >= P + L and j >= P + L and block_of(j) <= block_of(i))

    mask = block_mask(torch.arange(40)[None], 40, config)
    assert mask[0, 0].tolist() == [[is_visible(i, j) for j in range(40)] for i in range(40)]


@pytest.mark.parametrize("block", ["1x1x1", "1x1x4", "2x2x2"])
@torch.inference_mode()
def test_a_token_affects_only_its_own_block_and_later_ones(block: str) -> None:
    model = small_generator(block)
    tokens = torch.arange(48)[None] % 50
    changed = tokens.clone()
    changed[0, 20] += 1
    moved = (model(tokens) != model(changed)).any(-1)[0]
    assert moved.tolist() == [i // model.L >= 20 // model.L for i in range(48)]


def garbage_caches(model: NextBlockTransformer, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Caches that hold large finite numbers, which differ in every slot and between K and V."""
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


SIDES = st.integers(1, 3)


@given(st.tuples(SIDES, SIDES, SIDES), st.tuples(SIDES, SIDES, SIDES), st.booleans(), st.integers(1, 3))
@settings(max_examples=60)
@torch.inference_mode()
def test_cached_steps_equal_the_full_forward_for_every_shape_that_tiles(
    block: tuple[int, int, int], counts: tuple[int, int, int], hybrid: bool, prefix: int
) -> None:
    """The training pass and the cached steps agree for latents of up to 9x9x9 and blocks of any shape."""
    latent = Latent(*(b * n for b, n in zip(block, counts, strict=True)))
    given_latents = 0 if hybrid else block[0] * (counts[0] // 2)
    assume(hybrid or given_latents)
    text = TextCondition(prefix, 5) if hybrid else None
    shape = BlockShape(*block)
    vocab = 11 + (shape.size + 5 if hybrid else 0)
    config = ModelConfig(2, 16, 2, vocab, prod(latent) + prefix, latent, given_latents, shape, text)
    assert config.with_block(str(shape)) == config
    model = filled(NextBlockTransformer(config))
    rng = torch.Generator().manual_seed(3)
    tokens = torch.randint(config.codes, (2, config.clip_tokens), generator=rng)
    ids = torch.randint(5, (2, prefix), generator=rng) if hybrid else None
    read, target = training_pair(tokens, config, ids)
    full = model(read)
    k, v = garbage_caches(model, batch=2)
    first = config.condition_tokens
    lengths = [first] + [1] * shape.size * hybrid
    lengths += [shape.size] * ((read.shape[1] - sum(lengths)) // shape.size)
    assert read.shape[1] == sum(lengths) == config.capacity
    assert target.shape[1] == (config.clip_tokens if hybrid else config.clip_tokens - shape.size)
    start, logits = 0, []
    for n in lengths:
        out, k, v = model.block_step(read[:, start : start + n], torch.full((2,), start), k, v, write=tensor_scatter_)
        logits.append(out)
        start += n
    expected = full[:, first:] if hybrid else full[:, first - shape.size :]
    torch.testing.assert_close(torch.cat(logits[1:] if hybrid else logits, 1), expected, atol=1e-4, rtol=1e-4)


def test_a_hybrid_reads_its_text_special_tokens_and_all_but_the_last_block() -> None:
    config = golden_hybrid().config
    tokens = torch.arange(1280)[None] % 200
    read, target = training_pair(tokens, config, torch.arange(8)[None])
    z = [64 + t % 200 for t in range(1280)]
    assert read[0].tolist() == [4 + i for i in range(8)] + [0, *z[:4], 1, 2, 3, *z[4:-4]]
    assert target[0].tolist() == z
    assert read.shape[1] == config.capacity == 1288


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


def test_tensor_scatter_is_pure_and_tensor_scatter__writes_in_place() -> None:
    rng = torch.Generator().manual_seed(0)
    cache, update = torch.randn(2, 3, 8, 4, generator=rng), torch.randn(2, 3, 2, 4, generator=rng)
    before, positions = cache.clone(), torch.tensor([1, 6])
    expected = cache.clone()
    expected[0, :, 1:3], expected[1, :, 6:8] = update
    assert torch.equal(tensor_scatter(cache, update, positions), expected)
    assert torch.equal(cache, before)
    assert tensor_scatter_(cache, update, positions) is cache
    assert torch.equal(cache, expected)


def test_tensor_scatter_passes_the_checks_for_custom_operators() -> None:
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
