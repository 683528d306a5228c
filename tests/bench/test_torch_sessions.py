"""The PyTorch engines agree with the reference and with each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nbp_bench.fused_step import MASK_ALIGNMENT, additive_mask_rows, fused_projection
from nbp_bench.torch_sessions import DeviceLogits, EagerSession, NaiveSession
from nbp_engines import sampling
from nbp_engines.generator import Generator, Timeline
from nbp_engines.noise import uniforms
from nbp_engines.sampling import GREEDY, Sampling
from nbp_engines.session import Unrolling
from nbp_export.graphs import system_spec
from nbp_export.parity import compare
from nbp_reference.config import BlockShape, Latent, ModelConfig, TextCondition
from nbp_reference.model import NextBlockTransformer, block_mask, tensor_scatter_
from tests.support import filled, small_generator

BLOCKS = ["1x1x1", "1x1x4", "1x4x4", "1x2x2", "2x2x2", "2x4x4"]
SETTINGS = [GREEDY, Sampling(), Sampling(0.7, 10, 0.5)]
IDS = ["greedy", "paper", "narrow"]


def small_hybrid(block: str) -> NextBlockTransformer:
    """A class-conditional generator of a 4x4x4 latent: 8 text tokens of a vocabulary of 10, and 50 video token ids."""
    config = ModelConfig(
        2,
        width=32,
        heads=2,
        vocab=61,
        positions=80,
        latent=Latent(4, 4, 4),
        condition_latents=0,
        block=BlockShape(1, 1, 1),
        text=TextCondition(tokens=8, vocab=10),
    )
    return filled(NextBlockTransformer(config.with_block(block)))


def small_model(block: str, hybrid: bool) -> NextBlockTransformer:
    return small_hybrid(block) if hybrid else small_generator(block)


def condition_of(session: EagerSession | NaiveSession) -> np.ndarray:
    spec = session.spec
    ids = spec.text_vocab if spec.hybrid else spec.vocab
    return np.random.default_rng(0).integers(0, ids, (spec.batch, spec.condition_tokens))


def step_by_step(session: EagerSession | NaiveSession, settings: Sampling) -> np.ndarray:
    for clip in Generator(session, settings, seed=3).blocks(condition_of(session)):
        tokens = clip.copy()
    return tokens


def tokens_of(
    kind: type[EagerSession] | type[NaiveSession], model: NextBlockTransformer, settings: Sampling
) -> np.ndarray:
    with kind(system_spec(model.config, None, "fp32", batch=2), model, None) as session:
        step_by_step(session, settings)  # the first clip must not change the second
        return step_by_step(session, settings)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_naive_and_eager_generate_the_same(block: str, settings: Sampling) -> None:
    model = small_generator(block)
    np.testing.assert_array_equal(tokens_of(NaiveSession, model, settings), tokens_of(EagerSession, model, settings))


@pytest.mark.parametrize("block", BLOCKS)
def test_greedy_tokens_equal_the_argmax_of_the_full_forward(block: str) -> None:
    model = small_generator(block)
    order = model.config.block.order(model.config.latent)
    in_block_order = torch.from_numpy(tokens_of(EagerSession, model, GREEDY)[:, order])
    size = model.config.block.size
    with torch.inference_mode():
        choice = model(in_block_order[:, :-size]).argmax(-1)
    start = model.config.condition_tokens
    assert torch.equal(choice[:, start - size :], in_block_order[:, start:])


def test_the_naive_cache_grows_and_the_eager_one_does_not() -> None:
    model = small_generator("1x1x4")
    spec = system_spec(model.config, None, "fp32", batch=1)
    naive, eager = NaiveSession(spec, model, None), EagerSession(spec, model, None)
    condition, block = np.zeros((1, spec.condition_tokens), np.int64), np.zeros((1, 4), np.int64)
    before = eager.read_states()["k_cache_0"].ctypes.data
    for session in (naive, eager):
        session.prefill(condition)
        session.step(block, np.array([spec.condition_tokens]))
    after = eager.read_states()["k_cache_0"]
    assert naive.past[0][0].shape[2] == spec.condition_tokens + 4
    assert after.ctypes.data == before
    assert after.shape[2] == spec.capacity


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_naive_runs_in_half_precision(dtype: str) -> None:
    model = small_generator("1x1x4")
    spec = system_spec(model.config, None, dtype, batch=2)
    naive, eager = NaiveSession(spec, model, None), EagerSession(spec, model, None)
    tokens = np.random.default_rng(0).integers(0, spec.vocab, (2, spec.condition_tokens + 4))
    P, noise = spec.condition_tokens, np.random.default_rng(0).random((2, 4))
    for given, position in ((tokens[:, :P], 0), (tokens[:, P:], P)):
        ours, others = (s.step(given, np.full(2, position)) for s in (naive, eager))
        assert isinstance(ours, DeviceLogits)
        assert compare("", "", "", np.asarray(ours), np.asarray(others), 2e-2).passed
        drawn = naive.sample(ours, noise, Sampling())
        np.testing.assert_array_equal(drawn, sampling.sample(np.asarray(ours), noise, Sampling()))


def test_torch_draws_from_device_logits_as_numpy_does() -> None:
    model = small_generator("1x1x4")
    spec = system_spec(model.config, None, "bf16", 1)
    with EagerSession(spec, model, None) as eager:
        logits = eager.prefill(np.zeros((1, spec.condition_tokens), np.int64))
        assert isinstance(logits, DeviceLogits)
        assert logits.shape == (1, 4, 50)
        noise = np.random.default_rng(0).random((1, 4))
        drawn = eager.sample(logits, noise, Sampling(top_k=20))
    np.testing.assert_array_equal(drawn, sampling.sample(np.asarray(logits), noise, Sampling(top_k=20)))


def test_caches_are_written_and_read_by_name() -> None:
    model = small_generator("1x1x4")
    eager = EagerSession(system_spec(model.config, None, "bf16", 1), model, None)
    given = {t.name: np.full(t.shape, i / 8, np.float32) for i, t in enumerate(eager.spec.caches())}
    eager.write_states(given)
    actual = eager.read_states()
    assert actual.keys() == given.keys()
    assert all((actual[name] == given[name]).all() for name in given)
    assert (eager.read_states()["v_cache_1"] == 3 / 8).all()


# The fused step.


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("hybrid", [False, True], ids=["frames", "hybrid"])
def test_the_fused_step_equals_the_references_at_every_position(block: str, hybrid: bool) -> None:
    model = small_model(block, hybrid)
    spec = system_spec(model.config, None, "fp32", 2)
    eager, rng = EagerSession(spec, model, None), np.random.default_rng(1)
    garbage = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in spec.caches()}
    for count in {graph.inputs[0].shape[1] for graph in spec.generator_graphs().values()}:
        for position in range(0, spec.capacity - count + 1, count):
            tokens, cache_pos = rng.integers(0, spec.vocab, (2, count)), np.full(2, position)
            eager.write_states(garbage)
            caches = [torch.from_numpy(garbage[t.name].copy()) for t in spec.caches()]
            with torch.inference_mode():
                expected = model.block_step(
                    torch.from_numpy(tokens), torch.from_numpy(cache_pos), caches[::2], caches[1::2], tensor_scatter_
                )[0]
            assert compare("", "", "", eager.step(tokens, cache_pos), expected.numpy(), 5e-5).passed
            for ours, expected in zip(eager.read_states().values(), caches, strict=True):
                assert compare("", "", "", ours, expected.numpy(), 5e-5).passed


def test_clips_of_a_batch_may_be_at_different_positions() -> None:
    model = small_generator("1x1x4")
    together = EagerSession(system_spec(model.config, None, "fp32", 2), model, None)
    alone = EagerSession(system_spec(model.config, None, "fp32", 1), model, None)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 40))
    for session, rows in ((together, tokens), (alone, tokens[1:])):
        session.prefill(rows[:, :32])
    alone.step(tokens[1:, 32:36], np.array([32]))
    together.step(tokens[:, 32:36], np.array([32, 32]))
    expected = alone.step(tokens[1:, 36:], np.array([36]))
    actual = together.step(tokens[:, 36:], np.array([32, 36]))
    assert compare("", "", "", actual[1:], expected, 5e-5).passed


@pytest.mark.parametrize("hybrid", [False, True], ids=["frames", "hybrid"])
def test_mask_rows_are_the_references_mask(hybrid: bool) -> None:
    model = small_model("1x1x4", hybrid)
    slots = model.config.capacity
    rows = additive_mask_rows(model)
    assert rows.shape == (slots, 64 if slots <= 64 else 80)
    assert rows.stride(0) % MASK_ALIGNMENT == 0
    visible = block_mask(torch.arange(slots)[None], slots, model.config)[0, 0]
    assert torch.equal(rows[:, :slots] == 0, visible)
    assert (rows[:, :slots][~visible] == -torch.inf).all()


def test_projections_are_joined_once_in_the_parameters_own_memory() -> None:
    model = small_generator("1x1x4")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = [id(p) for p in model.parameters()]
    spec = system_spec(model.config, None, "fp32", 1)
    EagerSession(spec, model, None)
    attention = model.blocks[0].attn
    weight, bias = fused_projection(attention)  # type: ignore[arg-type]
    EagerSession(spec, model, None)
    assert fused_projection(attention)[0].data_ptr() == weight.data_ptr()  # type: ignore[arg-type]
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert weight.untyped_storage().nbytes() == 3 * 32 * 32 * 4
    assert bias.shape == (96,)
    with torch.no_grad():
        attention.key.weight.fill_(7)  # type: ignore[operator, union-attr]
    assert (weight[32:64] == 7).all()
    assert not (weight[:32] == 7).any()


def test_a_model_that_moved_is_joined_again() -> None:
    model = small_generator("1x1x4")
    spec = system_spec(model.config, None, "fp32", 1)
    expected = EagerSession(spec, model, None).prefill(np.ones((1, 32), np.int64))
    EagerSession(replace(spec, dtype="bf16"), model, None)
    with torch.no_grad():
        for name, value in small_generator("1x1x4").state_dict().items():
            model.get_parameter(name).data = value
    np.testing.assert_array_equal(EagerSession(spec, model, None).prefill(np.ones((1, 32), np.int64)), expected)


# The loop on the device.


@pytest.mark.parametrize("hybrid", [False, True], ids=["frames", "hybrid"])
def test_the_generator_unrolls_sessions_that_can(hybrid: bool) -> None:
    model = small_model("1x2x2", hybrid)
    spec = system_spec(model.config, None, "fp32", 2)
    eager = EagerSession(spec, model, None)
    assert isinstance(eager, Unrolling)
    assert not isinstance(NaiveSession(spec, model, None), Unrolling)
    timeline = Timeline()
    tokens = Generator(eager, seed=3)._unrolled(eager, condition_of(eager), 0, timeline)
    np.testing.assert_array_equal(tokens, step_by_step(eager, Sampling()))
    assert [stage for stage, _ in timeline.spans] == ["loop"]


def unrolled(session: EagerSession, settings: Sampling) -> np.ndarray:
    """Return the tokens of `step_by_step`, made by `unroll`."""
    spec, condition, order = session.spec, condition_of(session), session.spec.block_order()
    noise = np.stack(
        [np.stack([uniforms(3, b, i, spec.block_size) for b in range(spec.batch)]) for i in range(spec.blocks)]
    )
    given = 0 if spec.hybrid else spec.condition_tokens
    clip = np.zeros((spec.batch, spec.clip_tokens), np.int64)
    clip[:, :given] = condition[:, :given]
    prefix = condition + spec.block_size if spec.hybrid else clip[:, order[:given]]
    clip[:, order[given:]] = session.unroll(prefix, noise, settings)
    return clip


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("hybrid", [False, True], ids=["frames", "hybrid"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])  # tokens drawn by numpy, and by torch
def test_unrolled_tokens_equal_those_made_step_by_step(block: str, hybrid: bool, dtype: str) -> None:
    model = small_model(block, hybrid)
    with EagerSession(system_spec(model.config, None, dtype, 2), model, None) as session:
        for settings in SETTINGS:
            expected = step_by_step(session, settings)
            first = unrolled(session, settings)
            np.testing.assert_array_equal(first, expected)
            np.testing.assert_array_equal(unrolled(session, settings), expected)
            np.testing.assert_array_equal(first, expected, "a clip changed when the next was made")


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", [False, True], ids=["frames", "hybrid"])
def test_the_compiled_step_computes_the_same(hybrid: bool) -> None:
    def outputs(compiled: bool, model: NextBlockTransformer) -> list[np.ndarray]:
        spec = system_spec(model.config, None, "fp32", 2)
        engine = EagerSession(spec, model, None, compiled=compiled)
        tokens = np.random.default_rng(0).integers(0, spec.vocab, (2, spec.clip_tokens))
        P, L = spec.condition_tokens, spec.block_size
        steps = [engine.prefill(tokens[:, :P])]
        steps += [engine.step(tokens[:, at : at + L], np.array([at, at])) for at in (P, P + L)]
        return [*(s.copy() for s in steps), *engine.read_states().values(), unrolled(engine, Sampling())]

    model = small_model("1x1x4", hybrid)
    for ours, expected in zip(outputs(True, model), outputs(False, model), strict=True):
        assert compare("", "", "", ours, expected, 5e-5).passed
