"""The parity checks catch planted faults, and report the graph and the place of each."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from nbp_engines.bundle import Bundle
from nbp_export import onnx_bundle, parity
from nbp_export.graphs import TORCH_DTYPES, graph_module, trace
from nbp_export.onnx_bundle import export
from nbp_export.parity import Check, ParityError, Reference, check_bundle, compare, step_positions
from nbp_export.sources import Source
from nbp_reference import model as reference
from nbp_reference.config import ModelConfig
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import FSQ, CausalConv3d, VideoTokenizer
from tests.export.support import Exported, resealed, source
from tests.export.test_sharpened import (
    Hidden,
    all_but_the_last_half,
    hiding,
    one_slot,
    random_model,
    the_oldest_block,
)

Exporter = Callable[..., Exported]


def test_the_worst_element_is_found_and_shown() -> None:
    expected = np.array([[0.5, -2.0], [4.0, 1.0]])
    actual = expected + np.array([[0.0, 0.0], [0.1, -0.2]])
    check = compare("step", "cache_pos [8]", "logits", actual, expected, 0.01)
    assert replace(check, worst=0.0) == Check("step", "cache_pos [8]", 0.01, 0.0, "logits[1, 1]: expected 1, found 0.8")
    assert check.worst == pytest.approx(0.05)
    assert not check.passed
    assert compare("step", "", "logits", actual, expected, 0.06).passed


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_never_pass(odd: float) -> None:
    actual = np.array([0.0, odd, 0.0])
    check = compare("step", "", "logits", actual, np.zeros(3), np.finfo(float).max)
    assert not check.passed
    assert check.worst == np.inf
    assert "logits[1]" in check.where


def test_small_values_are_held_to_an_absolute_tolerance() -> None:
    assert compare("", "", "", np.array([2e-6]), np.array([1e-6]), 1e-5).passed
    assert not compare("", "", "", np.array([2e-2]), np.array([1e-2]), 1e-5).passed


@pytest.mark.parametrize(
    ("block", "latents", "positions"),
    [
        ((1, 1, 1), 5, [32, 55, 79 - 1]),
        ((1, 1, 4), 5, [32, 52, 72]),
        ((1, 4, 4), 5, [32, 48]),
        ((1, 4, 4), 4, [32]),
        ((2, 4, 4), 4, [0]),
    ],
)
def test_steps_are_checked_at_both_ends_and_between(
    block: tuple[int, int, int], latents: int, positions: list[int], exported: Exporter
) -> None:
    spec = exported("1x1x4", tokenizer=True).bundle.manifest.spec
    assert step_positions(replace(spec, block=block, latent=(latents, 4, 4))) == positions


# Faults of a traced graph: changes to the module before tracing, or patches of the code that it calls.


@contextmanager
def mask_with(visible: Callable[[Tensor, Tensor, int, int], Tensor]) -> Iterator[None]:
    """Replace the mask by a rule that maps slots [S], query positions [B,T,1], L and T to what is visible."""

    def mask(query_BT: Tensor, slots: int, config: ModelConfig) -> Tensor:
        return visible(torch.arange(slots), query_BT[..., None], config.block.size, query_BT.shape[1])[:, None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "block_mask", mask)
        yield


def block_of(position: Tensor, size: int) -> Tensor:
    return torch.div(position, size, rounding_mode="trunc")


def one_block_ahead(j: Tensor, q: Tensor, L: int, T: int) -> Tensor:  # noqa: ARG001
    return block_of(j, L) <= block_of(q, L) + 1


def one_block_behind(j: Tensor, q: Tensor, L: int, T: int) -> Tensor:  # noqa: ARG001
    # Slot 0 stays visible, because attention needs at least one slot.
    return (block_of(j, L) < block_of(q, L)) | (j == 0)


def causal(j: Tensor, q: Tensor, L: int, T: int) -> Tensor:  # noqa: ARG001
    return j <= q


def stale_slot(j: Tensor, q: Tensor, L: int, T: int) -> Tensor:  # noqa: ARG001
    return (block_of(j, L) <= block_of(q, L)) | (j == q[:, -1:] + 1)


def prefill_shortcut(j: Tensor, q: Tensor, L: int, T: int) -> Tensor:  # noqa: ARG001
    return (j < q[:, :1] + T).expand(-1, T, -1)


def first_rows_position(j: Tensor, q: Tensor, L: int, T: int) -> Tensor:  # noqa: ARG001
    return (block_of(j, L) <= block_of(q[:1], L)).expand(q.shape[0], -1, -1)


def next_position(module: nn.Module) -> None:
    positions = module.get_parameter("model.pos_emb")
    positions.data = positions.data.roll(-1, dims=1)


def tanh_gelu(module: nn.Module) -> None:
    module.get_submodule("model.blocks.1.mlp").register_module("1", nn.GELU(approximate="tanh"))


def weight_two_percent_off(module: nn.Module) -> None:
    module.get_parameter("model.blocks.1.attn.key.weight").data *= 1.02


def one_weight_off(module: nn.Module) -> None:
    module.get_parameter("model.head.weight").data[17, 3] += 0.05


def no_final_norm(module: nn.Module) -> None:
    module.get_submodule("model").register_module("ln_f", nn.Identity())


def eps_of_another_model(module: nn.Module) -> None:
    norm = module.get_submodule("model.ln_f")
    assert isinstance(norm, nn.LayerNorm)
    norm.eps = 1e-3


def no_clamp(module: nn.Module) -> None:
    tokenizer = module.tokenizer
    assert isinstance(tokenizer, VideoTokenizer)
    fsq, latent = tokenizer.fsq, module.latent
    assert isinstance(latent, tuple)
    module.forward = lambda tokens: tokenizer.reconstruct(fsq.codes(tokens.unflatten(1, latent)))


def codes_one_level_off(module: nn.Module) -> None:
    module.get_submodule("tokenizer.fsq").register_buffer("half_levels", torch.tensor([3, 2, 2]), persistent=False)


def padded_with_zeros(module: nn.Module) -> None:
    layer = module.get_submodule("tokenizer.encoder_layers.0")
    assert isinstance(layer, CausalConv3d)
    layer.forward = lambda x: layer.conv(nn.functional.pad(x, layer.pad))  # type: ignore[method-assign]


@contextmanager
def atanh_for_tan() -> Iterator[None]:
    """The quantiser as it was meant to be, not as every checkpoint was trained; for even levels, of which 8 is one."""

    def bound(self: FSQ, z: Tensor) -> Tensor:
        half_width = (self.levels - 1) * (1 - 1e-3) / 2
        return torch.tanh(z + 0.1) * half_width

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSQ, "bound", bound)
        yield


Fault = Callable[[nn.Module], None]


def keep(module: nn.Module) -> None:
    """No change."""


# The change of the module, the patch while it is traced, the graph, and a pattern for the reported place.
FAULTS: dict[str, tuple[Fault, Callable[[], AbstractContextManager[None]], str, str]] = {
    "mask one block ahead": (keep, lambda: mask_with(one_block_ahead), "step", "logits"),
    "mask one block behind": (keep, lambda: mask_with(one_block_behind), "step", "logits"),
    "mask one block ahead in prefill": (keep, lambda: mask_with(one_block_ahead), "prefill", "logits"),
    "causal mask": (keep, lambda: mask_with(causal), "step", "logits"),
    "a stale slot visible": (keep, lambda: mask_with(stale_slot), "step", "logits"),
    "prefill with the shortcut for one block": (keep, lambda: mask_with(prefill_shortcut), "prefill", "logits"),
    "every row at the first row's position": (keep, lambda: mask_with(first_rows_position), "step", "logits"),
    "position plus one": (next_position, nullcontext, "step", "logits"),
    "tanh GELU in one layer": (tanh_gelu, nullcontext, "step", "logits"),
    "a weight tensor 2% off": (weight_two_percent_off, nullcontext, "step", "logits"),
    "one weight off by 0.05": (one_weight_off, nullcontext, "step", r"logits\[\d, \d, 17\]"),
    "no final norm": (no_final_norm, nullcontext, "step", "logits"),
    "another eps": (eps_of_another_model, nullcontext, "prefill", "logits"),
    "codes one level off": (codes_one_level_off, nullcontext, "decode", "video"),
    "no clamp": (no_clamp, nullcontext, "decode", "video"),
    "zero padding": (padded_with_zeros, nullcontext, "encode", "tokens beyond a rounding edge"),
    "another quantiser": (keep, atanh_for_tan, "encode", "tokens beyond a rounding edge"),
}


def checked(bundle: Bundle, source: Source) -> list[Check]:
    """Return the checks of every graph that the manifest lists."""
    checks = list(check_bundle(bundle, Reference(source.generator)))
    return checks + list(check_bundle(bundle, Reference(None, source.tokenizer)) if source.tokenizer else ())


def caught(bundle: Bundle, made: Exported, graph: str, where: str) -> str:
    """Return the message of the error, which must contain the graph and the place of the fault."""
    with pytest.raises(ParityError) as error:
        checked(bundle, made.source)
    message = error.value.message
    assert str(bundle.graph_file(graph)) in message
    assert re.search(f"differs from the reference at [^:]*: {where}", message), message
    assert "expected" in message
    return message


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_traced_graph_is_caught(name: str, exported: Exporter, copied: Callable[..., Bundle]) -> None:
    change, patched, graph, where = FAULTS[name]
    tokenizer = graph in ("encode", "decode")
    case = {"block": "1x1x4", "tokenizer": True} if tokenizer else {"block": "1x2x2", "batch": 2}
    made, bundle = exported(**case), copied(**case)
    original = made.source.tokenizer if tokenizer else made.source.generator
    assert original is not None
    module = graph_module(bundle.manifest.spec, graph, copy.deepcopy(original))
    change(module)
    with patched(), torch.no_grad():
        traced = trace(module, bundle.manifest.graph_specs()[graph])
    ir.save(traced, bundle.graph_file(graph))
    # Only the broken graph is checked here.
    bundle = resealed(bundle)
    only = replace(bundle, manifest=replace(bundle.manifest, graphs={graph: f"{graph}.onnx"}))
    caught(only, made, graph, where)


def test_retracing_without_a_fault_passes(exported: Exporter, copied: Callable[..., Bundle]) -> None:
    """The control for the faults above."""
    made, bundle = exported("1x2x2", batch=2), copied("1x2x2", batch=2)
    module = graph_module(bundle.manifest.spec, "step", copy.deepcopy(made.source.generator))
    with torch.no_grad():
        ir.save(trace(module, bundle.manifest.graph_specs()["step"]), bundle.graph_file("step"))
    checks = list(check_bundle(resealed(bundle), Reference(made.source.generator)))
    assert {check.graph for check in checks} == {"prefill", "step"}


# Valid slots that a traced step ignores. The weights are such that only sharpened caches make them matter.


def retraced(bundle: Bundle, dtype: str, model: NextBlockTransformer, change: Fault = keep) -> Bundle:
    """Return the bundle with only the step, traced with a change; the model's weights are rounded to the dtype."""
    spec = replace(bundle.manifest.spec, dtype=dtype)
    module = graph_module(spec, "step", copy.deepcopy(model))
    model.to(TORCH_DTYPES[dtype]).float()
    change(module)
    with torch.no_grad():
        ir.save(trace(module, spec.graphs()["step"]), bundle.graph_file("step"))
    return replace(bundle, manifest=replace(bundle.manifest, spec=spec, graphs={"step": "step.onnx"}))


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(all_but_the_last_half, id="sees only the last half of the valid prefix"),
        pytest.param(the_oldest_block, id="does not see the oldest block"),
        pytest.param(one_slot(20), id="does not see one slot"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "at"),
    [
        ("fp32", "cache_pos [32, 28]"),
        ("fp16", "cache_pos [72, 68], sharpened"),
        ("bf16", "cache_pos [32, 28]"),  # computed in fp32 arithmetic on a CPU
    ],
)
def test_a_step_that_overlooks_valid_slots_is_caught(
    dtype: str, at: str, hidden: Hidden, copied: Callable[..., Bundle]
) -> None:
    bundle = copied("1x2x2", batch=2)
    config = ModelConfig.from_json(bundle.manifest.model["config"]["generator"])
    model = random_model("fp32", config)
    with hiding(hidden):
        bundle = retraced(bundle, dtype, model)
    with pytest.raises(ParityError) as error:
        list(check_bundle(bundle, Reference(model)))
    assert f"step.onnx, run by ort-cpu, differs from the reference at {at}: " in error.value.message


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_step_that_sees_all_valid_slots_passes(dtype: str, copied: Callable[..., Bundle]) -> None:
    """The control for the faults above."""
    bundle = copied("1x2x2", batch=2)
    model = random_model("fp32", ModelConfig.from_json(bundle.manifest.model["config"]["generator"]))
    checks = list(check_bundle(retraced(bundle, dtype, model), Reference(model)))
    sharpened = [check for check in checks if "sharpened" in check.at]
    for tolerance in {parity.TOLERANCE["fp16" if dtype == "fp16" else "fp32"], parity.TOLERANCE["fp32"]}:
        assert 0 < max(check.worst for check in sharpened if check.tolerance == tolerance) < tolerance / 5


def test_fp32_arithmetic_catches_what_fp16_rounds_away(exported: Exporter, copied: Callable[..., Bundle]) -> None:
    model = copy.deepcopy(exported("1x2x2", batch=2).source.generator)

    def slightly_off(module: nn.Module) -> None:
        module.get_parameter("model.blocks.1.attn.key.weight").data *= 1.002

    with pytest.raises(ParityError, match=r"at cache_pos \[72, 68\], sharpened, in fp32 arithmetic: "):
        list(check_bundle(retraced(copied("1x2x2", batch=2), "fp16", model, slightly_off), Reference(model)))


# Faults of the file, such as an exporter or the optimisation of a runtime could cause.


def swap(values: dict[str, str], op: str, *inputs: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == op:
                for index in inputs:
                    node.input[index] = values.get(node.input[index], node.input[index])

    return change


def updates_swapped(model: ModelProto) -> None:
    first, second = (n for n in model.graph.node if n.op_type == "TensorScatter" and "_cache_1" in n.input[0])
    first.input[1], second.input[1] = second.input[1], first.input[1]


def first_rows_of_the_logits(model: ModelProto) -> None:
    """Select the rows of the condition's first block instead of its last."""
    slices = [n for n in model.graph.node if n.op_type == "Slice"]
    assert len(slices) == 1
    for index, value in ((1, 0), (2, 4)):
        name = f"bound_{index}"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
        slices[0].input[index] = name


def no_scale(model: ModelProto) -> None:
    """Do not divide the attention scores by the square root of the head dim."""
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    kept = [a for a in node.attribute if a.name != "scale"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("scale", 1.0)])


K_AND_V = {"k_cache_1_out": "v_cache_1_out", "v_cache_1_out": "k_cache_1_out"}
PASTS = {"k_cache_1": "v_cache_1", "v_cache_1": "k_cache_1"}


@pytest.mark.parametrize(
    ("change", "graph", "where"),
    [
        pytest.param(swap(K_AND_V, "Attention", 1, 2), "step", "logits", id="keys and values swapped in one layer"),
        pytest.param(swap(PASTS, "TensorScatter", 0), "step", "logits", id="caches swapped in one layer"),
        pytest.param(swap({"v_cache_1": "k_cache_1"}, "TensorScatter", 0), "step", "logits", id="caches merged"),
        pytest.param(updates_swapped, "step", "logits", id="new keys and values swapped in one layer"),
        pytest.param(first_rows_of_the_logits, "prefill", "logits", id="logits of the first rows"),
        pytest.param(no_scale, "step", "logits", id="attention without its scale"),
    ],
)
def test_a_fault_in_a_file_is_caught(
    change: Callable[[ModelProto], None],
    graph: str,
    where: str,
    exported: Exporter,
    copied: Callable[..., Bundle],
) -> None:
    bundle = copied("1x2x2", batch=2)
    model = onnx.load(bundle.graph_file(graph), load_external_data=False)
    change(model)
    onnx.save(model, bundle.graph_file(graph))
    caught(resealed(bundle), exported("1x2x2", batch=2), graph, where)


def test_swapped_cache_contents_are_caught_where_the_logits_cannot_tell(
    exported: Exporter, copied: Callable[..., Bundle]
) -> None:
    """Updates and attention are both swapped: the logits of prefill are correct, but keys are in the value caches."""
    bundle = copied("1x2x2", batch=2)
    model = onnx.load(bundle.graph_file("prefill"), load_external_data=False)
    updates_swapped(model)
    swap(K_AND_V, "Attention", 1, 2)(model)
    onnx.save(model, bundle.graph_file("prefill"))
    caught(resealed(bundle), exported("1x2x2", batch=2), "prefill", "k_cache_1_out")


def test_reading_the_checks_does_not_change_the_callers_inference_mode(exported: Exporter) -> None:
    made = exported("1x2x2", batch=2)
    checks = check_bundle(made.bundle, Reference(made.source.generator))
    next(checks)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    checks.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_weights_are_caught_in_either_dtype(
    dtype: str, exported: Exporter, copied: Callable[..., Bundle]
) -> None:
    case = {"dtype": dtype, "batch": 2 if dtype == "fp32" else 1}
    made, bundle = exported("1x2x2", **case), copied("1x2x2", **case)
    generator = copy.deepcopy(made.source.generator)
    generator.get_parameter("blocks.0.mlp.2.weight").data *= 1.1
    with pytest.raises(ParityError, match=r"prefill\.onnx, run by ort-cpu, differs from the reference at cache_pos"):
        list(check_bundle(bundle, Reference(generator)))


def test_an_export_that_fails_parity_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(module: nn.Module, spec: object, **options: bool) -> ir.Model:
        if getattr(spec, "name", "") == "step":
            module = copy.deepcopy(module)
            next_position(module)
        return trace(module, spec, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx_bundle, "trace", faulty)
    with pytest.raises(ParityError) as error:
        export(source("1x4x4"), tmp_path / "bundle", "fp32")
    message = error.value.message
    assert "step.onnx, run by ort-cpu, differs from the reference at cache_pos [32]: logits[" in message
    assert "allowed 5e-05" in message
    assert list(tmp_path.iterdir()) == []


def test_garbage_enlarges_the_error_of_a_stale_slot(
    exported: Exporter, copied: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale slot that is attended to gives a much larger error if unused slots hold large numbers."""
    made, bundle = exported("1x2x2", batch=2), copied("1x2x2", batch=2)
    module = graph_module(bundle.manifest.spec, "step", copy.deepcopy(made.source.generator))
    with mask_with(stale_slot), torch.no_grad():
        ir.save(trace(module, bundle.manifest.graph_specs()["step"]), bundle.graph_file("step"))
    bundle = resealed(bundle)
    with_garbage = float(caught(bundle, made, "step", "logits").split("(error ")[1].split()[0])
    monkeypatch.setattr(parity, "GARBAGE", 1e-3)
    without_garbage = float(caught(bundle, made, "step", "logits").split("(error ")[1].split()[0])
    assert with_garbage > 3 * without_garbage
