"""Records are written, read and checked, and reports show what they contain."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from nbp_reports import figure, markdown, record, table
from nbp_reports.errors import RecordError
from nbp_reports.record import STAGES, Record


def _record(**changes: object) -> Record:
    plain = Record(
        run="2026-01-01T00:00:00+00:00",
        command="nbp-bench --sizes 16",
        machine="Some Processor",
        cores=2,
        memory_bytes=2**34,
        system="Linux x86_64",
        python="3.12.0",
        versions="torch 2.13.0",
        gpu=None,
        gpu_memory_bytes=None,
        driver=None,
        model="nbp-tiny",
        weights_sha256="ab",
        trained=True,
        block="1x1x16",
        block_size=16,
        engine="ort-cpu",
        dtype="fp32",
        batch=1,
        threads=None,
        device="cpu",
        video="clip.mp4",
        seed=0,
        temperature=1.0,
        top_k=16_000,
        top_p=0.9,
        interleaved=True,
        frames=12,
        steps=48,
        total_ns=[2_000_000_000, 3_000_000_000, 7_000_000_000],
        encode_ns=[0, 0, 3_000_000_000],
        prefill_ns=[0, 0, 0],
        step_ns=[1_000_000] * 141,
        sample_ns=[0] * 144,
        decode_ns=[0, 0, 0],
        first_frame_ns=[],
        peak_memory_bytes=None,
        token_agreement=1.0,
        first_divergence=None,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_written_records_read_back(tmp_path: Path) -> None:
    records = [_record(), _record(engine="naive", token_agreement=0.5, first_divergence=7)]
    record.write(records, tmp_path / "r.jsonl")
    assert record.read(tmp_path / "r.jsonl") == records


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not a record"),
        ("[]", "not a record"),
        (json.dumps(asdict(_record()) | {"schema": 99}), "schema 99"),
        (json.dumps(asdict(_record()) | {"colour": 1}), "colour"),
        (json.dumps({k: v for k, v in asdict(_record()).items() if k != "steps"}), "lacks steps"),
    ],
)
def test_invalid_lines_are_refused_with_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(asdict(_record())) + "\n" + line + "\n")
    with pytest.raises(RecordError, match=f"r.jsonl:2: .*{reason}"):
        record.read(path)


def test_statistics_come_from_the_samples() -> None:
    row = _record(batch=2)
    assert row.fps == pytest.approx(2 * 12 / 3)  # the median clip, both of the batch
    assert row.stage_seconds("encode") == pytest.approx(1)
    assert row.step_ms == pytest.approx(1)
    assert row.first_frame_seconds is None
    assert _record(step_ns=[]).step_ms is None
    on_device = _record(device_step_ns=[2_000_000, 1_000_000, 500_000], step_bytes=1_500_000)
    assert on_device.device_step_ms == pytest.approx(1)
    assert on_device.bandwidth_share(3e9) == pytest.approx(0.5)  # 1.5 MB in a millisecond
    assert on_device.bandwidth_share(None) is None
    assert row.bandwidth_share(3e9) is None


def test_spread_needs_samples_and_marks_an_unsteady_machine(tmp_path: Path) -> None:
    assert _record().spread is None
    assert _record(total_ns=[10, 10, 10, 10, 10]).spread == 0
    wild = _record(total_ns=[10, 20, 30, 40, 50])
    assert wild.spread == pytest.approx(1)  # quartiles 15 and 45
    assert "not steady" in markdown.report([wild], tmp_path).read_text()
    assert "not steady" not in markdown.report([_record()], tmp_path).read_text()


def test_a_missing_measurement_is_shown_as_such_and_not_as_zero() -> None:
    (cells,) = table.rows(table.RESULTS, [_record(token_agreement=None)])
    shown = dict(zip(table.RESULTS, cells, strict=True))
    assert {shown[name] for name in ("1st frame s", "peak MB", "FVD")} == {"not measured"}
    assert shown["tokens"] == "not compared"
    (cells,) = table.rows(table.RESULTS, [_record(trained=False)])
    assert cells[-1] == "no checkpoint"
    (cells,) = table.rows(table.ON_DEVICE, [_record()])
    shown = dict(zip(table.ON_DEVICE, cells, strict=True))
    assert {shown[name] for name in ("error", "step ms", "with sampling", "% copy BW", "% peak BW")} == {"not measured"}


def test_an_error_beyond_the_tolerance_is_marked() -> None:
    assert table.ON_DEVICE["error"](_record(parity_error=0.02, parity_allowed=0.08)) == "2.0e-02"
    assert table.ON_DEVICE["error"](_record(parity_error=0.2, parity_allowed=0.08)) == "2.0e-01 FAILED"


def test_every_stage_has_a_field_and_a_column() -> None:
    assert {f"{stage}_ns" for stage in STAGES} <= {f.name for f in fields(Record)}
    assert {f"{stage} s" for stage in STAGES} <= set(table.STAGE_TIMES)


def test_parity_shows_the_first_different_token() -> None:
    assert table.parity(_record()) == "identical"
    assert table.parity(_record(role="reference", token_agreement=None)) == "the reference"
    assert table.parity(_record(token_agreement=0.875, first_divergence=9)) == "87.50%, from token 9"


def test_terminal_tables_fit_120_columns_with_the_longest_cells() -> None:
    measured: dict[str, Any] = {"device_step_ns": [10**9], "device_pass_ns": [10**9], "step_bytes": 2 * 10**9}
    measured |= {"copy_bandwidth": 3e9, "peak_bandwidth": 4e9, "parity_error": 0.1, "parity_allowed": 0.01}
    rows = [
        _record(block="1x16x16", engine="cudagraph", role="reference", **measured),
        _record(token_agreement=0.12345, first_divergence=1279, **measured),
    ]
    console = Console(width=120)
    with console.capture() as capture:
        for title, (columns, shown) in table.tables(rows).items():
            console.print(table.terminal_table(title, columns, shown))
    assert "…" not in capture.get()
    assert "12.35%, from token 1279" in capture.get()


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_a_narrow_terminal_shows_fewer_columns_and_whole_numbers(width: int) -> None:
    rows = [_record(block="1x16x16", engine="cudagraph", total_ns=[12_345_678] * 4, peak_memory_bytes=10**11)]
    console = Console(width=width)
    for title, (columns, shown) in table.tables(rows).items():
        remaining = table.fitting_columns(columns, shown, width)
        with console.capture() as capture:
            console.print(table.terminal_table(title, remaining, shown))
        assert "…" not in capture.get()
        assert "1x16x16 │ cudagraph" in capture.get()
        if "FPS" in columns:
            assert "972.00" in capture.get()
    assert table.fitting_columns(table.RESULTS, rows, 1000) == table.RESULTS


def test_report_has_verdict_tables_figure_and_caveats(tmp_path: Path) -> None:
    rows = [
        _record(),
        _record(engine="naive", role="baseline", total_ns=[6_000_000_000] * 3),
        _record(engine="eager", role="reference", token_agreement=None),
    ]
    text = markdown.report(rows, tmp_path).read_text()
    assert "ort-cpu is fastest with 4.00 FPS, 2.0× the authors' loop" in text
    assert "2 engines and the reference gave identical tokens" in text
    assert "another machine with another model" in text
    assert "FVD is not measured yet" in text
    assert markdown.SHEET not in text  # nobody drew one
    assert (tmp_path / markdown.FIGURE).stat().st_size > 10_000
    assert text.count("| 1x1x16 |") == 2 * len(rows)
    random = markdown.report([_record(trained=False, token_agreement=0.5)], tmp_path).read_text()
    assert "These models were not trained for their block" in random
    assert "nbp-tiny 1x1x16" in random
    assert "the engines' tokens differ" in random


def test_without_a_reference_no_tokens_were_compared(tmp_path: Path) -> None:
    rows = [_record(token_agreement=None), _record(engine="naive", role="baseline", token_agreement=None)]
    text = markdown.report(rows, tmp_path).read_text()
    assert "tokens were not compared" in text
    assert "identical" not in text.split("## How to read the results")[0]
    one = markdown.report([_record(), _record(engine="eager", role="reference", token_agreement=None)], tmp_path)
    assert "the tokens of the compared engine and of the reference are identical" in one.read_text()


def test_rows_with_different_settings_show_them_all(tmp_path: Path) -> None:
    rows = [
        _record(),
        _record(dtype="bf16", device="cuda", gpu="Some GPU", batch=4, video="noise frames", interleaved=False),
        _record(model="nbp-xl", trained=False, block="1x16x16", video="clip.mp4"),
    ]
    text = markdown.report(rows, tmp_path).read_text()
    header = text.split("| model |")[1].splitlines()[0]
    for column in ("device", "dtype", "batch"):
        assert column in header
    assert "| nbp-xl, untrained | cpu | fp32 | 1 | 1x16x16 |" in text
    assert "| nbp-tiny | cuda | bf16 | 4 | 1x1x16 |" in text
    assert "clip.mp4; noise frames" in text
    assert "Some GPU" in text
    assert "took turns, except for 1x1x16" in text
    assert "not trained for their block, so only their speed and memory are meaningful: nbp-xl 1x16x16" in text


def test_a_row_that_was_not_measured_has_the_reason(tmp_path: Path) -> None:
    missing = _record(engine="tensorrt", total_ns=[], step_ns=[], sample_ns=[], not_measured="no NVIDIA driver")
    assert missing.fps is None
    assert missing.stage_seconds("decode") is None
    for rows in ([_record(), missing], [missing]):
        text = markdown.report(rows, tmp_path).read_text()
        assert "- nbp-tiny 1x1x16 fp32 tensorrt: not measured: no NVIDIA driver" in text
        assert text.count("| 1x1x16 | tensorrt |  | not measured |") == text.count("| 1x1x16 | tensorrt |") == 1
    assert "nothing could be measured" in text
    plain = markdown.report([_record(), missing], tmp_path, plain=True).read_text()
    assert "| 1x1x16 | ort-cpu | 48 | 4.00 |" in plain
    assert "no NVIDIA driver" in plain


def test_records_from_before_a_field_was_added_can_be_read(tmp_path: Path) -> None:
    old = {k: v for k, v in asdict(_record()).items() if k not in ("role", "not_measured", "loop_ns", "notes")}
    (tmp_path / "r.jsonl").write_text(json.dumps(old) + "\n")
    (row,) = record.read(tmp_path / "r.jsonl")
    assert (row.role, row.not_measured, row.loop_ns) == (None, None, [])


def test_an_interrupted_write_leaves_the_old_records(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    record.write([_record()], path)
    with pytest.raises(ValueError, match="JSON"):
        record.write([_record(fvd=float("nan"))], path)
    assert record.read(path) == [_record()]


def test_labels_of_clips_differ_where_the_records_do() -> None:
    rows = [_record(), _record(engine="eager"), _record(model="other"), _record(block="1x1x1")]
    assert table.labels(rows[:2]) == ["1x1x16", "1x1x16"]  # one model, whose engines make one clip
    assert table.labels(rows) == ["1x1x16\nnbp-tiny", "1x1x16\nnbp-tiny", "1x1x16\nother", "1x1x1\nnbp-tiny"]
    assert table.labels([_record(trained=False)]) == ["1x1x16\nuntrained"]


def test_contact_sheet_goes_into_the_report(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 256, (17, 3, 32, 32), np.uint8)
    figure.contact_sheet({"filmed": video[:9], "L = 16": video}, 5, tmp_path / markdown.SHEET)
    assert f"({markdown.SHEET})" in markdown.report([_record()], tmp_path).read_text()


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    name = "[bold]a|b`c$x_$<i>*d*\n\x1b[31m"
    rows = [_record(model=name, command=f"nbp-bench --bundle '{name}'", video=name, engine=e) for e in ("eager", "x")]
    figure.fps_by_block(rows, tmp_path / "fps.png")  # a pair of dollar signs would be mathematics
    rows.append(_record(model="other", not_measured=f"{name} is missing", total_ns=[]))
    text = markdown.report(rows, tmp_path).read_text("utf-8")
    shown = r"\[bold\]a\|b\`c$x_$\<i>\*d\*\\n\\x1b\[31m"
    assert f"| {shown} | 1x1x16 | eager |" in text
    assert f"{shown} is missing" in text
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ") and "eager" in line]
    assert len({line.replace("\\|", "").count("|") for line in lines[:1]}) == 1
    console = Console(width=200, record=True, markup=False, emoji=False)
    ((_, (columns, table_rows)), *_) = table.tables(rows).items()
    console.print(table.terminal_table("title", columns, table_rows))
    assert "[bold]a|b`c$x_$<i>*d*" in console.export_text()
