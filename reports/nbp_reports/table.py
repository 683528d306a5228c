"""Records as rows that people read: the same two tables for the terminal and for Markdown."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nbp_reports.record import STAGES, Record

if TYPE_CHECKING:
    from rich.table import Table

NOT_MEASURED = "not measured"
Columns = dict[str, Callable[[Record], str]]


def parity(record: Record) -> str:
    """How the engine's tokens compare with the reference's, drawn from the same noise."""
    if record.engine == "reference":
        return "the reference"
    if record.token_agreement is None:
        return NOT_MEASURED
    if record.token_agreement == 1:
        return "identical"
    return f"{record.token_agreement:.2%}, from token {record.first_divergence}"


def _number(value: float | None, digits: int) -> str:
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}"


def _stage(stage: str) -> Callable[[Record], str]:
    return lambda record: _number(record.stage_seconds(stage), 3)


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.0%}"


def _error(record: Record) -> str:
    """The worst error of the checks against the reference in fp32, and whether it is allowed."""
    if record.parity_error is None or record.parity_allowed is None:
        return NOT_MEASURED
    passed = record.parity_error <= record.parity_allowed
    return f"{record.parity_error:.1e}{'' if passed else ' FAILED'}"


def _megabytes(record: Record) -> str:
    return _number(None if record.peak_memory_bytes is None else record.peak_memory_bytes / 1e6, 0)


RESULTS: Columns = {
    "block": lambda r: r.block,
    "engine": lambda r: r.engine,
    "steps": lambda r: str(r.steps),
    "FPS": lambda r: _number(r.fps, 2),
    "spread": lambda r: "n < 4" if r.spread is None else f"{r.spread:.0%}",
    "1st frame s": lambda r: _number(r.first_frame_seconds, 2),
    "peak MB": _megabytes,
    "tokens": parity,
    "FVD": lambda r: _number(r.fvd, 1) if r.trained else "no checkpoint",
}
STAGE_TIMES: Columns = {
    "block": lambda r: r.block,
    "engine": lambda r: r.engine,
    **{f"{stage} s": _stage(stage) for stage in STAGES},
    "sum s": lambda r: _number(sum(r.total_ns) / len(r.total_ns) / 1e9, 3),
    "one step ms": lambda r: _number(r.step_ms, 2),
}
TABLES: dict[str, Columns] = {
    "Speed, memory and parity": RESULTS,
    "Where a clip's time goes (mean)": STAGE_TIMES,
}

ON_DEVICE: Columns = {
    "block": lambda r: r.block,
    "engine": lambda r: r.engine,
    "dtype": lambda r: r.dtype,
    "error": _error,
    "step ms": lambda r: _number(r.device_step_ms, 3),
    "with sampling": lambda r: _number(r.device_pass_ms, 3),
    "of copy": lambda r: _share(r.share_of(r.copy_bandwidth)),
    "of peak": lambda r: _share(r.share_of(r.peak_bandwidth)),
    "FPS": lambda r: _number(r.fps, 1),
    "encode ms": lambda r: _number(r.stage_seconds("encode") * 1e3, 1),
    "decode ms": lambda r: _number(r.stage_seconds("decode") * 1e3, 1),
}


def rows(columns: Columns, records: Sequence[Record]) -> list[list[str]]:
    """One row of cells a record."""
    return [[cell(record) for cell in columns.values()] for record in records]


def terminal(title: str, columns: Columns, records: Sequence[Record]) -> "Table":
    """The rows as a rich table, a line between block sizes."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("block", "engine", "tokens", "FVD") else "right")
    for record, cells, after in zip(records, rows(columns, records), [*records[1:], None], strict=True):
        table.add_row(*cells, end_section=after is not None and after.block != record.block)
    return table
