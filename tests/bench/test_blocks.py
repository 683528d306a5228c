"""Block shapes side by side, and a class-conditional model, through the `nbp-bench` command."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from nbp_bench.cli import main
from nbp_reports import record


def measured(out: Path, *options: str) -> tuple[list[record.Record], str]:
    done = CliRunner().invoke(main, [*options, "--clips", "1", "--threads", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return record.read(out / "records.jsonl"), done.output


def test_shapes_beside_sizes(tmp_path: Path) -> None:
    records, output = measured(tmp_path, "--sizes", "16", "--blocks", "1x4x4", "--engines", "reference,onnx")
    assert [(r.block, r.engine) for r in records] == [
        ("1x1x16", "reference"),
        ("1x1x16", "onnx"),
        ("1x4x4", "reference"),
        ("1x4x4", "onnx"),
    ]
    assert [r.trained for r in records] == [True, True, False, False]  # none is bundled for the square
    assert "no checkpoint" in output
    assert {r.steps for r in records} == {48}
    assert {r.token_agreement for r in records if r.engine == "onnx"} == {1}


def test_a_hybrid_in_every_engine(tmp_path: Path) -> None:
    records, _ = measured(tmp_path, "--model", "nbp-tiny-hybrid", "--sizes", "16")
    assert [r.engine for r in records] == ["naive", "reference", "onnx"]
    for r in records:
        assert r.trained
        assert r.frames == 17
        assert r.steps == 95
        assert len(r.step_ns) == (0 if r.loop_ns else 95)
        assert r.token_agreement in (None, 1)
        assert "carphone" in r.video
    assert (tmp_path / "clips.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "2x4x4"], "block 2x4x4 does not tile the 3x16x16 latent; these do: 1x1x1, 1x1x2"),
        (["--blocks", "1x3x4"], "block 1x3x4 does not tile"),
        (["--blocks", "1x4"], "block '1x4' is neither a size like 16 nor a shape like 1x1x16"),
        (["--blocks", "1x4x4", "--checkpoint", "16=a.ckpt"], "not among the blocks 1x4x4"),
        (["--model", "nbp-tiny-hybrid", "--blocks", "2x1x16"], "block 2x1x16 does not tile the 5x16x16 latent"),
        ([], "what to compare"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_what_cannot_be_compared(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [*options, "--out", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())
