"""The plan of a command line: the cartesian product, its order, and what is refused before anything runs."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from nbp_bench.cli import main
from nbp_bench.engines import engines
from nbp_bench.plan import Candidate, Case, Plan
from nbp_bench.run import results_folder
from nbp_export.request import Request

ENGINES = engines()


def plan(*names: str, minutes: float | None = None, device: str | None = "cuda") -> Plan:
    return Plan(
        candidates=[Candidate(Request(block=block)) for block in ("16", "256")],
        engines=[ENGINES[name] for name in names],
        out=Path("out"),
        dtypes=("bf16", "fp16"),
        batches=(1, 4),
        device=device,
        minutes=minutes,
    )


def test_what_torch_compile_needs_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nbp_bench.engines.find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    absence = ENGINES["compiled"].absence
    assert "C compiler" in (absence("cuda") or "")
    assert absence("cpu") is None
    compiler = tmp_path / "clang"
    compiler.touch(mode=0o755)
    assert "C compiler" not in (absence("cuda") or "")


def test_without_a_time_limit_all_engines_of_a_model_take_turns() -> None:
    groups = [[str(case) for case in group] for group in plan("eager", "compiled", "tensorrt").groups()]
    assert groups[0] == ["16 bf16 eager", "16 bf16 compiled", "16 bf16 tensorrt"]
    assert len(groups) == 2 * 2 * 2
    assert groups[-1][0] == "256 fp16 batch 4 eager"


def test_with_one_the_most_wanted_comes_first_and_what_starts_slowly_later() -> None:
    groups = plan("eager", "compiled", "cudagraph", "tensorrt", minutes=9).groups()
    order = [" ".join(str(case) for case in group) for group in groups]
    assert order[:2] == ["16 bf16 eager 16 bf16 cudagraph", "256 bf16 eager 256 bf16 cudagraph"]
    assert order[4:6] == ["16 bf16 compiled", "256 bf16 compiled"]
    assert order[8] == "16 bf16 tensorrt"
    assert order[12] == "16 fp16 eager 16 fp16 cudagraph"


def test_an_engine_runs_where_it_can_unless_a_device_is_named() -> None:
    (group, *_) = plan("eager", "tensorrt", device=None).groups()
    assert [case.device for case in group] == ["cpu", "cuda"]
    (group, *_) = plan("eager", "tensorrt", device="cpu").groups()
    assert [case.device for case in group] == ["cpu", "cpu"]
    assert group[1].refusal() == "tensorrt runs on cuda, not on cpu"


@pytest.mark.parametrize(
    ("engine", "dtype", "device", "why"),
    [
        ("ort-cpu", "bf16", "cpu", "ort-cpu computes in fp32, fp16, not in bf16"),
        ("cudagraph", "bf16", "cpu", "cudagraph runs on cuda, not on cpu"),
        ("tensorrt", "bf16", "cuda", "no NVIDIA driver"),
        ("ort-cuda", "fp16", "cuda", r"pip install 'nbp-export\[gpu\]'"),
        ("eager", "bf16", "cuda", "torch finds no CUDA device"),
    ],
)
def test_a_refusal_is_a_sentence(engine: str, dtype: str, device: str, why: str) -> None:
    case = Case(Candidate(Request(block="16")), ENGINES[engine], dtype, 1, device)
    found = case.refusal()
    assert found
    assert re.search(why, found), found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to compare: give --sizes, --blocks or --bundle"),
        (["--sizes", "16", "--engines", "trt"], "--engines does not know trt: choose among naive, eager, cudagraph"),
        (["--sizes", "16", "--dtype", "fp8"], "--dtype does not know fp8: choose among"),
        (["--sizes", "16", "--batch", "1,many"], "--batch 'many' is not a number of clips from 1 to 1024"),
        (["--sizes", "16", "--batch", "1000000"], "--batch '1000000' is not a number of clips from 1 to 1024"),
        (["--sizes", "256,"], "--sizes '256,' has an empty item: separate the items with single commas"),
        (["--sizes", "1,,16"], "has an empty item"),
        (["--sizes", "16", "--engines", "eager,"], "--engines 'eager,' has an empty item"),
        (["--sizes", "16", "--seed", "1" + "0" * 20], "is not in the range"),
        (["--sizes", "16", "--threads", "100000000000"], "is not in the range"),
        (["--sizes", "16", "--checkpoint", "16=a", "--checkpoint", "1x1x16=b"], "block 1x1x16 has two checkpoints"),
        (["--sizes", "16", "--checkpoint", "16=a", "--weights", "random"], "leave out --model and --weights"),
        (["--seed", "5", "generate", "--bundle", "b", "--out", "c.mp4"], "--seed has no effect before generate"),
        (["--sizes", "16", "--checkpoint", "model.ckpt"], "is not BLOCK=FILE"),
        (["--blocks", "1x4x4", "--checkpoint", "16=a.ckpt"], "which is not measured: choose among 1x4x4"),
        (["--bundle", "tiny", "--dtype", "fp16"], "the dtype and the batch of a bundle are fixed: leave out --dtype"),
        (["--bundle", "tiny", "--ema"], "a bundle already holds its model: leave out --ema"),
        (["--bundle", "tiny", "--model", "nbp-xl"], "a bundle already holds its model: leave out --model"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_usage_errors_say_the_cure_and_exit_with_2(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.output.split())


@pytest.mark.parametrize("text", ["16,256", " 16 , 256", "16,1x1x16,256", "16,16,256"])
def test_spaces_do_not_count_and_a_repeated_block_counts_once(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr("nbp_bench.run.check_golden", lambda: None)
    monkeypatch.setattr("nbp_bench.run.run", plans.append)
    options = ["--engines", "eager, ort-cpu", "--batch", "1, 1,2", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, ["--sizes", text, *options])
    assert done.exit_code == 0, done.output
    assert [str(candidate) for candidate in plans[0].candidates] == ["1x1x16", "1x16x16"]
    assert [engine.name for engine in plans[0].engines] == ["eager", "ort-cpu"]
    assert plans[0].batches == [1, 2]


def test_the_ema_copy_is_taken_from_every_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr("nbp_bench.run.check_golden", lambda: None)
    monkeypatch.setattr("nbp_bench.run.run", plans.append)
    options = ["--sizes", "16,256", "--checkpoint", "16=a.ckpt", "--ema", "--out", str(tmp_path)]
    assert CliRunner().invoke(main, options).exit_code == 0
    assert [candidate.request.ema for candidate in plans[0].candidates if candidate.request] == [True, True]


def test_a_folder_that_cannot_hold_results_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbp_bench.run.check_golden", lambda: pytest.fail("it began"))
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(main, ["--sizes", "16", "--out", str(tmp_path / "file")])
    assert done.exit_code == 2
    assert "cannot hold the results (File exists): choose another --out" in " ".join(done.output.split())


def test_the_records_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("earlier")
    with results_folder(tmp_path):
        (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("records-2")
    assert kept.read_text() == "earlier"


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with results_folder(tmp_path):
        done = CliRunner().invoke(main, ["--sizes", "16", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "another nbp-bench is writing to" in " ".join(done.output.split())
    with results_folder(tmp_path):
        pass


def test_the_help_lists_the_engines() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    assert all(f"\n  {name}" in output for name in ENGINES)
