"""The states of a session. A graph declares the values that it carries from run to run; they need not be KV caches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from nbp_engines.bundle import Bundle
from nbp_engines.errors import EngineError
from nbp_engines.manifest import Manifest
from nbp_engines.ort import OrtSession
from nbp_engines.registry import open_session
from nbp_engines.runtime import OpenOptions
from nbp_engines.spec import GraphKind, GraphSpec, State, TensorSpec
from tests.engines.test_bundle import SPEC, make
from tests.engines.test_ort import bundle

SUM = TensorSpec("sum", "fp32", (2,))
COUNTING = GraphSpec(
    "decode_next",
    GraphKind.DECODE,
    (TensorSpec("x", "fp32", (2,)), SUM),
    (TensorSpec("mean", "fp32", (2,)), TensorSpec("sum_after", "fp32", (2,))),
    (State("sum", "sum_after", in_place=False),),
)


class _CountingManifest(Manifest):
    """A manifest whose only graph adds its input to a running sum, which is a state that is not updated in place."""

    def graph_specs(self) -> dict[str, GraphSpec]:
        return {COUNTING.name: COUNTING}


def counting(folder: Path) -> Bundle:
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in tensors]
        for tensors in (COUNTING.inputs, COUNTING.outputs)
    )
    half = helper.make_tensor("half", TensorProto.FLOAT, [1], [0.5])
    nodes = [
        helper.make_node("Add", ["sum", "x"], ["sum_after"]),
        helper.make_node("Mul", ["sum_after", "half"], ["mean"]),
    ]
    graph = helper.make_graph(nodes, COUNTING.name, inputs, outputs, [half])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    opened = Bundle.open(make(folder / "toy", step=model.SerializeToString()))
    manifest = replace(opened.manifest, graphs={COUNTING.name: "step.onnx"})
    return replace(opened, manifest=_CountingManifest(**vars(manifest)))


def test_a_state_that_is_no_kv_cache_is_carried_from_run_to_run(tmp_path: Path) -> None:
    with OrtSession(counting(tmp_path), OpenOptions(threads=1)) as session:
        assert session.states.keys() == {"sum"}
        for total in (1.0, 2.0, 3.0):
            mean = session.run("decode_next", x=np.ones(2, np.float32))
            assert mean.tolist() == [total / 2, total / 2]
        session.write_states({"sum": np.array([10, 20], np.float32)})
        session.run("decode_next", x=np.ones(2, np.float32))
        assert session.read_states()["sum"].tolist() == [11, 21]


def test_missing_and_unknown_arguments_of_a_graph_are_refused(tmp_path: Path) -> None:
    tokens, cache_pos = np.zeros((1, 4), np.int64), np.array([16])
    with open_session(bundle(tmp_path / "toy", SPEC), threads=1) as session:
        session.run("step", tokens=tokens, cache_pos=cache_pos)
        with pytest.raises(EngineError, match="step needs cache_pos: its inputs are tokens, cache_pos"):
            session.run("step", tokens=tokens)
        with pytest.raises(EngineError, match="step needs tokens and has no token: its inputs are"):
            session.run("step", token=tokens, cache_pos=cache_pos)
        with pytest.raises(EngineError, match="step has no k_cache_0: its inputs are tokens, cache_pos"):
            session.run("step", tokens=tokens, cache_pos=cache_pos, k_cache_0=np.zeros((1, 2, 44, 8), np.float32))


def test_a_missing_a_misspelt_and_an_unopened_graph_have_different_errors(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "toy", SPEC)
    with open_session(folder, threads=1, graphs=["prefill"]) as session:
        with pytest.raises(EngineError, match=r"toy has no decode graph: export it with --tokenizer FILE"):
            session.run("decode", tokens=np.zeros((1, 48), np.int64))
        with pytest.raises(EngineError, match=r"there is no graph 'stepp'; its graphs are prefill, step"):
            session.run("stepp")
        with pytest.raises(EngineError, match=r"step is in the bundle but was not opened; this session has prefill"):
            session.step(np.zeros((1, 4), np.int64), np.array([16]))
    with pytest.raises(EngineError, match="there is no graph 'prefil'"):
        open_session(folder, graphs=["prefil"])


def test_a_session_brings_the_sampling_of_its_bundle(tmp_path: Path) -> None:
    from nbp_engines.generator import Generator

    with open_session(bundle(tmp_path / "toy", SPEC), threads=1) as session:
        assert session.sampling.top_k == 20
        assert Generator(session).sampling == session.sampling
