"""One row of a run: measurements before a failure are kept, and the failure is recorded."""

from pathlib import Path

import numpy as np

from nbp_bench.conditions import Conditions
from nbp_bench.engines import engines
from nbp_bench.host import Identity
from nbp_bench.machine import describe
from nbp_bench.measure import Result
from nbp_bench.plan import Candidate, Case, Plan
from nbp_bench.rows import Measurement, Run, row
from nbp_export.graphs import system_spec
from nbp_export.request import Request
from nbp_reference.config import MODELS, TOKENIZERS
from nbp_reports.record import Record

SPEC = system_spec(MODELS["nbp-tiny"].with_block("256"), TOKENIZERS["nbp-tiny"], "fp32", 1)


def clip() -> Result:
    tokens = np.zeros((1, SPEC.clip_tokens), np.int64)
    return Result(np.zeros((1, 3, 12, 128, 128), np.float32), tokens, [("loop", 5), ("decode", 2)])


def recorded(engine: str, clips: list[Result], failure: str = "", reference: list[Result] | None = None) -> Record:
    case = Case(Candidate(Request(block="256")), engines()[engine], "bf16", 1, "cpu")
    identity = Identity("nbp-tiny", "ab", True, "a note", SPEC, 1, ())
    conditions = Conditions([], "a clip", np.empty(0))
    run = Run(Plan([], [], Path()), "now", identity, conditions, reference, True, (None, None), describe())
    return row(run, Measurement(case, clips=clips, failure=failure))


def test_a_failure_before_the_first_clip_is_the_reason() -> None:
    record = recorded("eager", [], "its process died")
    assert record.not_measured == "its process died"
    assert record.fps is None
    assert record.role == "reference"


def test_a_failure_after_some_clips_is_a_note() -> None:
    record = recorded("cudagraph", [clip(), clip()], "the time limit was reached", [clip()])
    assert record.not_measured is None
    assert record.total_ns == [7, 7]
    assert record.loop_ns == [5, 5]
    assert record.notes == ["it stopped after 2 clips: the time limit was reached"]
    assert record.token_agreement == 1  # compares the one clip that both have


def test_a_row_is_in_the_dtype_of_its_case_and_names_its_machine() -> None:
    record = recorded("compiled", [clip()])
    assert (record.dtype, record.block, record.steps, record.token_agreement) == ("bf16", "1x16x16", 3, None)
    assert record.machine == describe().machine
