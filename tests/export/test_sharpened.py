"""Sharpened caches: a step that ignores valid slots fails in every dtype, and a correct one passes with a margin.

The steps run in PyTorch, because ONNX Runtime's CPU kernels do not compute in bf16.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nbp_engines.spec import SystemSpec
from nbp_export.graphs import TORCH_DTYPES, graph_module, system_spec
from nbp_export.parity import TOLERANCE, Check, check_graph, check_sharpened, check_step, step_positions
from nbp_export.sharpened import LARGEST, sharpened_caches
from nbp_reference import model as reference
from nbp_reference.config import BlockShape, Latent, ModelConfig, TextCondition
from nbp_reference.model import NextBlockTransformer

Hidden = Callable[
    [Tensor, Tensor], Tensor
]  # maps slots [S] and the number of valid slots [B,1,1,1] to the hidden slots


@contextmanager
def hiding(hidden: Hidden) -> Iterator[None]:
    """Patch the mask so that it hides some valid slots."""
    whole = reference.block_mask

    def mask(query_BT: Tensor, slots: int, config: ModelConfig) -> Tensor:
        return whole(query_BT, slots, config) & ~hidden(torch.arange(slots), query_BT[:, :1, None, None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "block_mask", mask)
        yield


def one_slot(slot: int) -> Hidden:
    return lambda j, valid: (j == slot) & (j < valid)


def nothing(j: Tensor, valid: Tensor) -> Tensor:
    return (j < 0) & (j < valid)


def all_but_the_last_half(j: Tensor, valid: Tensor) -> Tensor:
    return j < valid // 2


def all_but_the_first_half(j: Tensor, valid: Tensor) -> Tensor:
    return (j >= valid // 2) & (j < valid)


def the_oldest_block(j: Tensor, valid: Tensor) -> Tensor:
    return (j < 4) & (j < valid)


def a_block_in_the_middle(j: Tensor, valid: Tensor) -> Tensor:
    return (j // 4 == valid // 8) & (j < valid)


def the_newest_block(j: Tensor, valid: Tensor) -> Tensor:
    return (j >= valid - 4) & (j < valid)


OVERLOOKED = [
    all_but_the_last_half,
    all_but_the_first_half,
    the_oldest_block,
    a_block_in_the_middle,
    the_newest_block,
    one_slot(0),
    one_slot(37),
]
NAMES = [getattr(hidden, "__name__", "") for hidden in OVERLOOKED[:5]] + ["the first slot", "a slot in the middle"]


class TorchGraphs:
    """Block graphs in PyTorch, in their own dtype, that do not attend to some valid slots."""

    def __init__(self, model: NextBlockTransformer, dtype: str, hidden: Hidden, batch: int = 1) -> None:
        self.spec: SystemSpec = system_spec(model.config, None, dtype, batch)
        copy = NextBlockTransformer(model.config)
        copy.load_state_dict(model.state_dict())
        self._module = graph_module(self.spec, "step", copy)
        self._hidden = hidden
        self._caches: dict[str, Tensor] = {}

    def run(self, graph: str, **inputs: np.ndarray) -> Any:  # noqa: ARG002 - one module serves as all graphs
        tokens, cache_pos = (torch.from_numpy(inputs[name]) for name in ("tokens", "cache_pos"))
        with hiding(self._hidden):
            logits, *caches = self._module(tokens, cache_pos, *self._caches.values())
        self._caches = dict(zip(self._caches, caches, strict=True))
        return logits.float().numpy()

    def write_states(self, values: Mapping[str, np.ndarray]) -> None:
        self._caches |= {name: torch.tensor(value).to(TORCH_DTYPES[self.spec.dtype]) for name, value in values.items()}

    def read_states(self) -> dict[str, np.ndarray]:
        return {name: cache.float().numpy().copy() for name, cache in self._caches.items()}


FRAMES = ModelConfig(4, 128, 4, 125, 80, Latent(5, 4, 4), block=BlockShape(1, 1, 4))
# A hybrid with a text of three tokens.
HYBRID = replace(FRAMES, vocab=4 + 3 + 125, positions=83, condition_latents=0, text=TextCondition(3, 3))


def random_model(dtype: str, config: ModelConfig = FRAMES, embeddings: float = 4.0) -> NextBlockTransformer:
    """A model with near-uniform attention, weights rounded to a dtype.

    The weights are normal with a standard deviation of 0.02, as in GPT-2 before training; `embeddings` is the deviation
    of the embeddings. The larger the embeddings are, the less the averages of attention matter beside them.
    """
    model = NextBlockTransformer(config)
    model.reset(0)
    model.tok_emb.weight.data *= embeddings / 0.02
    model.pos_emb.data *= embeddings / 0.02
    return model.to(TORCH_DTYPES[dtype]).float().eval()


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def failed(checks: Iterator[Check]) -> list[Check]:
    with torch.inference_mode():
        return [check for check in checks if not check.passed]


HALVES = ["fp16", "bf16"]
DTYPES = ["fp32", *HALVES]
each_fault = pytest.mark.parametrize("hidden", OVERLOOKED, ids=NAMES)


@each_fault
@pytest.mark.parametrize("dtype", HALVES)
def test_in_half_precision_only_sharpened_caches_reveal_ignored_slots(dtype: str, hidden: Hidden) -> None:
    """All comparisons on random caches pass."""
    model = random_model(dtype)
    checks = failed(check_graph(TorchGraphs(model, dtype, hidden), "step", model, rng()))
    assert {(check.graph, check.at) for check in checks} == {("step", "cache_pos [72], sharpened")}


@pytest.mark.parametrize("dtype", HALVES)
def test_with_small_embeddings_random_caches_also_reveal_a_missing_half(dtype: str) -> None:
    """If embeddings are as small as the other weights, even the averages of attention matter."""
    model = random_model(dtype, embeddings=0.02)
    assert failed(check_step(TorchGraphs(model, dtype, all_but_the_last_half), "step", model, 72, rng()))


@each_fault
def test_in_fp32_the_error_is_a_thousand_times_the_tolerance(hidden: Hidden) -> None:
    model = random_model("fp32")
    checks = failed(check_sharpened(TorchGraphs(model, "fp32", hidden), "step", model, rng()))
    assert max(check.worst for check in checks) > 1000 * TOLERANCE["fp32"]


@pytest.mark.parametrize("block", ["1x1x1", "1x1x4", "1x4x4"])
def test_bf16_reveals_every_single_slot(block: str) -> None:
    model = random_model("bf16", FRAMES.with_block(block))
    last = step_positions(system_spec(model.config, None, "bf16", 1))[-1]
    for slot in range(last):
        assert failed(check_sharpened(TorchGraphs(model, "bf16", one_slot(slot)), "step", model, rng())), slot


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_correct_step_passes_with_a_margin(dtype: str, batch: int) -> None:
    model = random_model(dtype)
    checks = [*check_sharpened(TorchGraphs(model, dtype, nothing, batch), "step", model, rng())]
    assert checks
    assert max(check.worst for check in checks) < TOLERANCE[dtype] / 5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("graph", "last"), [("step", 79), ("step_1", 6)])
def test_ignored_text_of_a_hybrid_is_revealed(graph: str, last: int, dtype: str) -> None:
    model = random_model(dtype, HYBRID)
    assert not failed(check_graph(TorchGraphs(model, dtype, nothing), graph, model, rng()))
    for hidden in (one_slot(1), all_but_the_last_half):
        checks = failed(check_graph(TorchGraphs(model, dtype, hidden), graph, model, rng()))
        assert (graph, f"cache_pos [{last}], sharpened") in {(check.graph, check.at) for check in checks}


@torch.inference_mode()
def test_where_no_slot_is_valid_nothing_is_sharpened() -> None:
    model = random_model("fp32")
    assert not [*check_sharpened(TorchGraphs(model, "fp32", nothing), "prefill", model, rng())]
    whole = random_model("fp32", replace(FRAMES, latent=Latent(4, 4, 4)).with_block("2x4x4"))
    checks = [*check_graph(TorchGraphs(whole, "fp32", nothing), "step", whole, rng())]
    assert {check.at for check in checks} == {"cache_pos [0]"}


@torch.inference_mode()
def test_each_valid_slot_is_a_needle_in_one_layer() -> None:
    model = random_model("fp32", replace(FRAMES, layers=5))
    contents = [*sharpened_caches(model, torch.zeros(2, 4, dtype=torch.int64), torch.tensor([72, 68]), rng())]
    least = torch.stack([values.abs().amin((1, 3)) for values in contents[1::2]])  # by layer, row and slot
    needles = least > 5
    assert torch.equal(needles.sum(0), (torch.arange(76) < torch.tensor([[72], [68]])).long())
    assert needles.sum(2).unique().tolist() == [13, 14, 15]


@torch.inference_mode()
def test_every_layer_has_a_needle_where_fewer_slots_are_valid() -> None:
    model = random_model("fp32")
    contents = [*sharpened_caches(model, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([1]), rng())]
    assert all((values[:, :, 0].abs() > 5).all() for values in contents[1::2])


@torch.inference_mode()
def test_no_needle_is_too_large_for_fp16() -> None:
    model = random_model("fp32", embeddings=1e5)
    contents = [*sharpened_caches(model, torch.zeros(1, 4, dtype=torch.int64), torch.tensor([72]), rng())]
    assert all(values.abs().max() == LARGEST for values in contents[1::2])
