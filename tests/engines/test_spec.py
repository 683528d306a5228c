"""The static numbers of a bundle, and the inputs and outputs of its graphs that follow from them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbp_engines.spec import GraphKind, State, SystemSpec, TensorSpec
from nbp_reference.config import MODELS, BlockShape, Latent

# K600 with nbp-xl: 17 frames of 128×128, 5 given.
K600 = SystemSpec(
    block=(1, 1, 16),
    latent=(5, 16, 16),
    condition_latents=2,
    video=(17, 128, 128),
    condition_frames=5,
    batch=3,
    dtype="fp16",
    layers=2,
    heads=16,
    head_dim=96,
    vocab=64_000,
)
SHAPES = {1: (1, 1, 1), 8: (1, 1, 8), 16: (1, 1, 16), 32: (1, 2, 16), 64: (1, 4, 16), 256: (1, 16, 16)}


@st.composite
def tiled(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a block and a latent that it tiles."""
    block = draw(st.tuples(*[st.integers(1, 4)] * 3))
    counts = draw(st.tuples(*[st.integers(1, 4)] * 3))
    return block, tuple(b * n for b, n in zip(block, counts, strict=True))


@given(tiled())
def test_the_order_is_the_reference_blocks(case: tuple[tuple[int, int, int], tuple[int, int, int]]) -> None:
    block, latent = case
    order = replace(K600, block=block, latent=latent).block_order()
    assert order.tolist() == BlockShape(*block).order(Latent(*latent)).tolist()


def test_the_order_of_a_small_block_by_hand() -> None:
    spec = replace(K600, block=(1, 2, 2), latent=(1, 2, 6), condition_latents=0)
    assert spec.block_order().tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


# The paper counts the prefill as the first step.
@pytest.mark.parametrize(("size", "steps"), [(1, 768), (16, 48), (256, 3)])
def test_steps_are_the_papers(size: int, steps: int) -> None:
    spec = replace(K600, block=SHAPES[size])
    assert spec.blocks == steps
    assert spec.block_size == size


@pytest.mark.parametrize("size", SHAPES)
def test_the_last_step_fills_the_last_slot(size: int) -> None:
    spec = replace(K600, block=SHAPES[size])
    assert (spec.condition_tokens, spec.clip_tokens) == (512, 1280)
    assert spec.capacity == 1280 - size
    assert spec.condition_tokens + (spec.blocks - 1) * size == spec.capacity


@pytest.mark.parametrize("size", SHAPES)
def test_the_numbers_are_the_reference_configs(size: int) -> None:
    config = MODELS["nbp-xl"].with_block(str(size))
    spec = replace(K600, block=SHAPES[size])
    assert spec.block_text == str(config.block)
    for name in ("capacity", "condition_tokens", "clip_tokens"):
        assert getattr(spec, name) == getattr(config, name)


@given(tiled(), st.sampled_from(["fp32", "fp16"]), st.integers(1, 4))
def test_json_round_trip(case: tuple[tuple[int, int, int], tuple[int, int, int]], dtype: str, batch: int) -> None:
    spec = replace(K600, block=case[0], latent=case[1], dtype=dtype, batch=batch)
    assert SystemSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_json_with_unknown_or_missing_names_is_refused() -> None:
    data = K600.to_json()
    with pytest.raises(TypeError, match="capacity"):
        SystemSpec.from_json(data | {"capacity": 5})
    del data["heads"]
    with pytest.raises(TypeError, match="heads"):
        SystemSpec.from_json(data)


@pytest.mark.parametrize(("name", "tokens"), [("prefill", 512), ("step", 16)])
def test_generator_graphs_as_documented(name: str, tokens: int) -> None:
    graph = K600.generator_graphs()[name]
    caches = ["k_cache_0", "v_cache_0", "k_cache_1", "v_cache_1"]
    shape = (3, 16, 1264, 96)
    assert graph.name == name
    assert graph.inputs == (
        TensorSpec("tokens", "int64", (3, tokens), 1),
        TensorSpec("cache_pos", "int64", (3,)),
        *(TensorSpec(cache, "fp16", shape) for cache in caches),
    )
    assert graph.outputs == (
        TensorSpec("logits", "fp16", (3, 16, 64_000), 1),
        *(TensorSpec(f"{cache}_out", "fp16", shape) for cache in caches),
    )
    assert graph.kind is GraphKind.BLOCK_STEP
    assert graph.states == tuple(State(cache, f"{cache}_out", in_place=True) for cache in caches)
    assert graph.aliases == {f"{cache}_out": cache for cache in caches}
    assert [t.name for t in graph.arguments()] == ["tokens", "cache_pos"]
    assert [t.name for t in graph.results()] == ["logits"]
    assert K600.caches() == graph.inputs[2:]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_tokenizer_graphs_speak_float_video_and_raster_tokens(dtype: str) -> None:
    graphs = replace(K600, dtype=dtype).tokenizer_graphs()
    assert set(graphs) == {"encode", "decode"}
    assert graphs["encode"].inputs == (TensorSpec("video", "fp32", (3, 3, 5, 128, 128)),)
    assert graphs["encode"].outputs == (TensorSpec("tokens", "int64", (3, 512)),)
    assert graphs["decode"].inputs == (TensorSpec("tokens", "int64", (3, 1280)),)
    assert graphs["decode"].outputs == (TensorSpec("video", "fp32", (3, 3, 17, 128, 128)),)
    assert not graphs["encode"].aliases
    assert not graphs["decode"].aliases


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", np.float32), ("fp16", np.float16), ("int64", np.int64)])
def test_buffers_are_zeroed_contiguous_and_of_the_named_dtype(dtype: str, expected: type) -> None:
    buffer = TensorSpec("x", dtype, (2, 3)).empty()
    assert buffer.dtype == expected
    assert buffer.shape == (2, 3)
    assert buffer.flags.c_contiguous
    assert not buffer.any()
