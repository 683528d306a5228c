"""Records as rows that people read: the same tables for the terminal and for Markdown, with the columns that vary."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nbp_errors import printable
from nbp_reports.record import REFERENCE, STAGES, Record

if TYPE_CHECKING:
    from rich.table import Table

NOT_MEASURED = "not measured"
Columns = dict[str, Callable[[Record], str]]


def parity(record: Record) -> str:
    """How the engine's tokens compare with the reference's, drawn from the same noise."""
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
    def cell(record: Record) -> str:
        seconds = record.stage_seconds(stage)
        return _number(None if seconds is None else seconds * scale, digits)

    return cell


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.0%}"


def _error(record: Record) -> str:
    """The worst error of the checks against the reference in fp32, and whether it is allowed."""
    if record.parity_error is None or record.parity_allowed is None:
        return NOT_MEASURED
    return f"{record.parity_error:.1e}{' FAILED' if record.failed else ''}"


def _spread(record: Record) -> str:
    if not record.total_ns:
        return NOT_MEASURED
    return "n < 4" if record.spread is None else f"{record.spread:.0%}"


def _megabytes(nbytes: int | None) -> str:
    return _number(None if nbytes is None else nbytes / 1e6, 0)


def _total(record: Record) -> float | None:
    return sum(record.total_ns) / len(record.total_ns) / 1e9 if record.total_ns else None


# What a row is of. A column whose value is the same in all rows is left out, and the caption says it.
IDENTITY: Columns = {
    "model": lambda r: r.model if r.trained else f"{r.model}, random weights",
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
    "sum s": lambda r: _number(_total(r), 3),
    "one step ms": lambda r: _number(r.step_ms, 2),
}
ON_DEVICE: Columns = {
    "block": lambda r: r.block,
    "engine": lambda r: r.engine,
    "error": _error,
    "step ms": lambda r: _number(r.device_step_ms, 3),
    "with sampling": lambda r: _number(r.device_pass_ms, 3),
    "of copy": lambda r: _share(r.share_of(r.copy_bandwidth)),
    "of peak": lambda r: _share(r.share_of(r.peak_bandwidth)),
    "FPS": lambda r: _number(r.fps, 1),
    "encode ms": _stage("encode", 1e3, 1),
    "decode ms": _stage("decode", 1e3, 1),
}


# Columns that a narrow terminal does without, the first of them first.
EXPENDABLE = [
    *("FVD", "spread", "steps", "encode s", "prefill s", "peak MB", "of peak", "encode ms", "decode ms", "sum s"),
    *("1st frame s", "one step ms", "sample s", "loop s", "of copy", "error", "tokens", "step s", "decode s"),
    *("with sampling", "step ms", "device", "batch", "dtype", "model"),
]


def tables(records: Sequence[Record]) -> dict[str, tuple[Columns, Sequence[Record]]]:
    """The tables that the records fill, by title: their columns and rows. Only the first has rows without a clip."""
    chosen = {"Speed, memory and parity": RESULTS, "Where a clip's time goes (mean)": STAGE_TIMES}
    if any(r.device_step_ns for r in records):
        chosen["Single steps back to back, by the device's clock"] = ON_DEVICE
    identity = {name: cell for name, cell in IDENTITY.items() if len({cell(r) for r in records}) > 1}
    looped = any(r.loop_ns for r in records)
    measured = [r for r in records if r.total_ns]
    return {
        title: (
            identity | {name: cell for name, cell in columns.items() if looped or name != "loop s"},
            records if columns is RESULTS else measured,
        )
        for title, columns in chosen.items()
        if columns is RESULTS or measured
    }


def caption(records: Sequence[Record]) -> str:
    """What all rows have in common, and what their clips were made from."""
    parts = []
    for name, cell in IDENTITY.items():
        if len(values := {cell(r) for r in records}) == 1:
            parts.append(values.pop() if name == "model" else f"{name} {values.pop()}")
    parts += dict.fromkeys(r.video for r in records)
    return printable("; ".join(parts))


def label(record: Record) -> str:
    """The name of a model's strip in a picture of clips."""
    return record.block if record.trained else f"{record.block}\nrandom weights"


def line(record: Record) -> str:
    """A row in one line, for a log."""
    cells = {**IDENTITY, **RESULTS}
    if record.not_measured:
        return f"{_what(record)}: not measured: {record.not_measured}"
    return ", ".join(f"{name} {cell(record)}" for name, cell in cells.items())


def remarks(records: Sequence[Record]) -> list[str]:
    """Why rows were not measured, and what a reader of the others should know."""
    missing = [f"{_what(r)}: not measured: {r.not_measured}" for r in records if r.not_measured]
    return [printable(line) for line in (*missing, *(f"{_what(r)}: {note}" for r in records for note in r.notes))]


def _what(record: Record) -> str:
    batch = f" batch {record.batch}" if record.batch > 1 else ""
    return f"{record.model} {record.block} {record.dtype}{batch} {record.engine}"


def sorted_rows(records: Sequence[Record]) -> list[Record]:
    """The records with those of one model, block, dtype and batch together, in the order of their first."""
    kinds = list(dict.fromkeys((r.model, r.block, r.dtype, r.batch) for r in records))
    return sorted(records, key=lambda r: kinds.index((r.model, r.block, r.dtype, r.batch)))


def rows(columns: Columns, records: Sequence[Record]) -> list[list[str]]:
    """One row of cells per record; where nothing was measured, of FPS that alone is said."""
    kept = {*IDENTITY, "block", "engine", "FPS"}
    return [
        [printable(cell(record)) if record.total_ns or name in kept else "" for name, cell in columns.items()]
        for record in records
    ]


def fitting(columns: Columns, records: Sequence[Record], width: int) -> Columns:
    """The columns that fit in so many characters without a cut; block, engine and FPS always stay."""
    cells = [list(columns), *rows(columns, records)]
    widths = dict(zip(columns, (max(map(len, column)) + 3 for column in zip(*cells, strict=True)), strict=True))
    shown = dict(columns)
    for name in [name for name in EXPENDABLE if name in columns]:
        if sum(widths[kept] for kept in shown) + 1 <= width:
            break
        del shown[name]
    return shown


def terminal(title: str, columns: Columns, records: Sequence[Record]) -> "Table":
    """The rows as a rich table, a line between block sizes."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        left = name in ("block", "engine", "tokens", "FVD", *IDENTITY)
        table.add_column(name, justify="left" if left else "right")
    for record, cells, after in zip(records, rows(columns, records), [*records[1:], None], strict=True):
        table.add_row(*cells, end_section=after is not None and after.block != record.block)
    return table
