"""Formats records as tables: the same columns and cells for the terminal and for Markdown."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nbp_errors import printable
from nbp_reports.record import REFERENCE, STAGES, Record

if TYPE_CHECKING:
    from rich.table import Table

NOT_MEASURED = "not measured"
Columns = dict[str, Callable[[Record], str]]


def parity(record: Record) -> str:
    """Return how the engine's tokens compare with the reference's, which are drawn from the same noise."""
    if record.role == REFERENCE:
        return "the reference"
    if record.token_agreement is None:
        return "not compared"
    if record.token_agreement == 1:
        return "identical"
    return f"{record.token_agreement:.2%}, from token {record.first_divergence}"


def _number(value: float | None, digits: int) -> str:
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}"


def _stage(stage: str, scale: float, digits: int) -> Callable[[Record], str]:
    """Return a column: the mean time per clip in a stage, in seconds times `scale`."""

    def cell(record: Record) -> str:
        seconds = record.stage_seconds(stage)
        return _number(None if seconds is None else seconds * scale, digits)

    return cell


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.0%}"


def _error(record: Record) -> str:
    """Return the largest error of the checks against the reference in fp32, marked if it exceeds the tolerance."""
    if record.parity_error is None or record.parity_allowed is None:
        return NOT_MEASURED
    return f"{record.parity_error:.1e}{' FAILED' if record.failed else ''}"


def _spread(record: Record) -> str:
    if not record.total_ns:
        return NOT_MEASURED
    return "n < 4" if record.spread is None else f"{record.spread:.0%}"


def _megabytes(nbytes: int | None) -> str:
    return _number(None if nbytes is None else nbytes / 1e6, 0)


def _mean_seconds(record: Record) -> float | None:
    return sum(record.total_ns) / len(record.total_ns) / 1e9 if record.total_ns else None


# The columns that tell models and settings apart. If all rows have the same value, the caption has it and not a column.
IDENTITY: Columns = {
    "model": lambda r: r.model if r.trained else f"{r.model}, untrained",
    "device": lambda r: r.device,
    "dtype": lambda r: r.dtype,
    "batch": lambda r: str(r.batch),
}
RESULTS: Columns = {
    "block": lambda r: r.block,
    "engine": lambda r: r.engine,
    "steps": lambda r: str(r.steps),
    "FPS": lambda r: _number(r.fps, 2),
    "spread": _spread,
    "1st frame s": lambda r: _number(r.first_frame_seconds, 2),
    "peak MB": lambda r: _megabytes(r.peak_device_bytes or r.peak_memory_bytes),
    "tokens": parity,
    "FVD": lambda r: _number(r.fvd, 1) if r.trained else "no checkpoint",
}
STAGE_TIMES: Columns = {
    "block": lambda r: r.block,
    "engine": lambda r: r.engine,
    **{f"{stage} s": _stage(stage, 1, 3) for stage in STAGES},
    "sum s": lambda r: _number(_mean_seconds(r), 3),
    "one step ms": lambda r: _number(r.step_ms, 2),
}
ON_DEVICE: Columns = {
    "block": lambda r: r.block,
    "engine": lambda r: r.engine,
    "error": _error,
    "step ms": lambda r: _number(r.device_step_ms, 3),
    "with sampling": lambda r: _number(r.device_pass_ms, 3),
    "% copy BW": lambda r: _share(r.bandwidth_share(r.copy_bandwidth)),
    "% peak BW": lambda r: _share(r.bandwidth_share(r.peak_bandwidth)),
    "FPS": lambda r: _number(r.fps, 1),
    "encode ms": _stage("encode", 1e3, 1),
    "decode ms": _stage("decode", 1e3, 1),
}


# The columns that a narrow terminal leaves out, in this order.
EXPENDABLE = [
    *("FVD", "spread", "steps", "encode s", "prefill s", "peak MB", "% peak BW", "encode ms", "decode ms", "sum s"),
    *("1st frame s", "one step ms", "sample s", "loop s", "% copy BW", "error", "tokens", "step s", "decode s"),
    *("with sampling", "step ms", "device", "batch", "dtype", "model"),
]


def tables(records: Sequence[Record]) -> dict[str, tuple[Columns, Sequence[Record]]]:
    """Return columns and records of each table that is not empty, by its title.

    Records that were not measured are only in the first table.
    """
    titled_columns = {"Speed, memory and tokens": RESULTS, "Mean time per clip in each stage": STAGE_TIMES}
    if any(r.device_step_ns for r in records):
        titled_columns["Single steps back to back, by the device's clock"] = ON_DEVICE
    identity = {name: cell for name, cell in IDENTITY.items() if len({cell(r) for r in records}) > 1}
    looped = any(r.loop_ns for r in records)
    measured = [r for r in records if r.total_ns]
    return {
        title: (
            identity | {name: cell for name, cell in columns.items() if looped or name != "loop s"},
            records if columns is RESULTS else measured,
        )
        for title, columns in titled_columns.items()
        if columns is RESULTS or measured
    }


def caption(records: Sequence[Record]) -> str:
    """Return the model and settings that all records have in common, and the sources of their conditions."""
    parts = []
    for name, cell in IDENTITY.items():
        if len(values := {cell(r) for r in records}) == 1:
            parts.append(values.pop() if name == "model" else f"{name} {values.pop()}")
    parts += dict.fromkeys(r.video for r in records)
    return printable("; ".join(parts))


def labels(records: Sequence[Record]) -> list[str]:
    """Return the name of each record's clips in a picture: its block, and whatever else differs among the records."""
    varying = [cell for cell in IDENTITY.values() if len({cell(record) for record in records}) > 1]
    untrained = any(not record.trained for record in records) and not varying
    return [
        "\n".join([record.block, *(cell(record) for cell in varying), *(["untrained"] if untrained else [])])
        for record in records
    ]


def log_line(record: Record) -> str:
    """Return the record in one line, for a log."""
    cells = {**IDENTITY, **RESULTS}
    if record.not_measured:
        return f"{_row_name(record)}: not measured: {record.not_measured}"
    return ", ".join(f"{name} {cell(record)}" for name, cell in cells.items())


def remarks(records: Sequence[Record]) -> list[str]:
    """Return the reasons why records were not measured, and the notes of the others."""
    missing = [f"{_row_name(r)}: not measured: {r.not_measured}" for r in records if r.not_measured]
    notes = [f"{_row_name(r)}: {note}" for r in records for note in r.notes]
    return list(map(printable, missing + notes))


def _row_name(record: Record) -> str:
    batch = f" batch {record.batch}" if record.batch > 1 else ""
    return f"{record.model} {record.block} {record.dtype}{batch} {record.engine}"


def sorted_rows(records: Sequence[Record]) -> list[Record]:
    """Return the records grouped by model, block, dtype and batch; groups are in the order of their first record."""
    groups = list(dict.fromkeys((r.model, r.block, r.dtype, r.batch) for r in records))
    return sorted(records, key=lambda r: groups.index((r.model, r.block, r.dtype, r.batch)))


def rows(columns: Columns, records: Sequence[Record]) -> list[list[str]]:
    """Return one row of cells per record.

    If a record was not measured, its FPS cell says so and the cells of other results are empty.
    """
    always_filled = {*IDENTITY, "block", "engine", "FPS"}
    return [
        [printable(cell(record)) if record.total_ns or name in always_filled else "" for name, cell in columns.items()]
        for record in records
    ]


def fitting_columns(columns: Columns, records: Sequence[Record], width: int) -> Columns:
    """Return the columns of a table that is at most `width` characters wide; block, engine and FPS always stay."""
    cells = [list(columns), *rows(columns, records)]
    widths = dict(zip(columns, (max(map(len, column)) + 3 for column in zip(*cells, strict=True)), strict=True))
    remaining = dict(columns)
    for name in [name for name in EXPENDABLE if name in columns]:
        if sum(widths[column] for column in remaining) + 1 <= width:
            break
        del remaining[name]
    return remaining


def terminal_table(title: str, columns: Columns, records: Sequence[Record]) -> "Table":
    """Return the records as a table for rich, with a line between different blocks."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        left = name in ("block", "engine", "tokens", "FVD", *IDENTITY)
        table.add_column(name, justify="left" if left else "right")
    for record, cells, after in zip(records, rows(columns, records), [*records[1:], None], strict=True):
        table.add_row(*cells, end_section=after is not None and after.block != record.block)
    return table
