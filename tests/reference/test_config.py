"""Block shapes, and the configs of generators and tokenizers."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbp_reference.config import (
    MODELS,
    TOKENIZERS,
    BlockShape,
    Latent,
    ModelConfig,
    Stage,
    TokenizerConfig,
    tiling_shapes,
)
from nbp_reference.errors import BlockShapeError

LATENT = Latent(5, 16, 16)
sides = st.integers(1, 6)
blocks = st.builds(BlockShape, sides, sides, sides)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[BlockShape, Latent]:
    """A block and a latent that it tiles."""
    block = draw(blocks)
    t, h, w = (draw(st.integers(1, 4)) for _ in range(3))
    return block, Latent(block.t * t, block.h * h, block.w * w)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ("1", "1x1x1"),
        ("8", "1x1x8"),
        ("16", "1x1x16"),
        ("32", "1x2x16"),
        ("64", "1x4x16"),
        ("256", "1x16x16"),
        ("512", "2x16x16"),
    ],
)
def test_a_bare_size_maps_as_in_the_paper(size: str, shape: str) -> None:
    assert str(BlockShape.parse(size, LATENT)) == shape


@given(blocks)
def test_a_shape_reads_back_from_its_text(block: BlockShape) -> None:
    assert BlockShape.parse(str(block), LATENT) == block
    assert BlockShape.parse(str(block).upper(), LATENT) == block


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "x", "1x16", "1x1x0", "1x1x1x1", "1xax1", "²", " 16", "16x"])
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(BlockShapeError, match="neither a size like 16 nor a shape like 1x1x16"):
        BlockShape.parse(text, LATENT)


@pytest.mark.parametrize("size", ["17", "24", "40", "300"])
def test_a_size_that_does_not_fill_whole_rows_or_frames_is_refused(size: str) -> None:
    with pytest.raises(BlockShapeError, match="does not fill whole rows or frames of a 5x16x16 latent"):
        BlockShape.parse(size, LATENT)


@given(tilings())
def test_order_visits_every_token_once_and_each_block_is_one_box_in_raster_order(
    tiling: tuple[BlockShape, Latent],
) -> None:
    block, latent = tiling
    order = block.order(latent)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(prod(latent)))
    for tokens in order.reshape(-1, block.size):
        assert (np.diff(tokens) > 0).all()
        extents = [axis.max() - axis.min() + 1 for axis in np.unravel_index(tokens, latent)]
        assert extents == [block.t, block.h, block.w]
    firsts = order.reshape(-1, block.size)[:, 0]
    assert (np.diff(firsts) > 0).all()


@given(tilings())
def test_tiling_shapes_are_exactly_the_blocks_that_tile(tiling: tuple[BlockShape, Latent]) -> None:
    block, latent = tiling
    shapes = tiling_shapes(latent)
    assert block in shapes
    block.check_tiles(latent)
    assert len(shapes) == prod(sum(side % d == 0 for d in range(1, side + 1)) for side in latent)
    assert [s.size for s in shapes] == sorted(s.size for s in shapes)


def test_a_block_must_tile_the_condition_and_the_prediction() -> None:
    model = MODELS["nbp-xl"]
    for text in ("2x1x8", "1x3x16", "5x16x16"):
        with pytest.raises(BlockShapeError, match=r"these do: 1x1x1, 1x1x2, 1x2x1, .*1x16x16$"):
            model.with_block(text)
    even = ModelConfig(1, 8, 1, latent=Latent(4, 4, 4))
    assert even.with_block("2x2x2").block.size == 8


def test_a_block_shape_error_exits_with_2() -> None:
    assert BlockShapeError("").exit_code == 2


@pytest.mark.parametrize(("block", "steps"), [("1", 768), ("16", 48), ("256", 3)])
def test_capacity_leaves_out_the_block_that_is_never_fed_back(block: str, steps: int) -> None:
    config = MODELS["nbp-xl"].with_block(block)
    assert (config.clip_tokens, config.condition_tokens, config.frame_tokens) == (1280, 512, 256)
    assert config.condition_tokens + (steps - 1) * config.block.size == config.capacity


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_model_config_reads_back_from_json(config: ModelConfig) -> None:
    other = config.with_block("256")
    assert ModelConfig.from_json(other.to_json()) == other


@pytest.mark.parametrize("config", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizer_config_reads_back_from_json(config: TokenizerConfig) -> None:
    assert TokenizerConfig.from_json(config.to_json()) == config


def test_the_generators_vocabulary_is_the_tokenizers() -> None:
    assert TOKENIZERS["official"].vocab == MODELS["nbp-xl"].vocab == 64_000
    assert TOKENIZERS["nbp-tiny"].vocab == MODELS["nbp-tiny"].vocab


def test_tokenizer_sizes() -> None:
    config = TokenizerConfig()
    assert config.compression == (4, 8, 8)
    assert config.latent(17, 128, 128) == LATENT
    assert config.latent(5, 128, 128) == Latent(2, 16, 16)
    assert [config.frames(t) for t in (1, 2, 5)] == [1, 5, 17]
    for size in ((16, 128, 128), (17, 100, 128), (17, 128, 100)):
        with pytest.raises(ValueError, match=r"1 \+ 4n frames, a height divisible by 8 and a width divisible by 8"):
            config.latent(*size)


def test_compression_follows_the_strides() -> None:
    config = TokenizerConfig(stages=(Stage(4, 1), Stage(4, 1)), strides=((2, 4, 2),))
    assert config.compression == (2, 4, 2)
