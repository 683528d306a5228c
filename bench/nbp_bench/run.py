"""A run from its plan to the finished comparison: progress, records, tables, pictures and report.

It needs only torch, click and numpy. Without rich the tables are plain Markdown; without matplotlib or jinja2 the
pictures or the full report are left out, and the output says so.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np

from nbp_bench import golden
from nbp_bench.plan import Plan
from nbp_bench.sweep import COMPARISON, Measured, Report, Sweep
from nbp_bench.video import to_uint8
from nbp_engines.errors import EngineError
from nbp_errors import NbpError, UsageError, printable
from nbp_export._commands import plain_console
from nbp_files import locked, write_text
from nbp_reports import markdown, record, table
from nbp_reports.record import Record

RECORDS = "records.jsonl"
OPTIONAL = {"matplotlib": "pictures", "jinja2": "the full report"}


@contextmanager
def results_folder(folder: Path) -> Iterator[None]:
    """Create and lock the folder of the results; rename the records of an earlier run.

    Raises UsageError, before anything is measured, if nothing can be written there or another run is using it.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            locked_elsewhere = stack.enter_context(locked(folder)) is False
            if locked_elsewhere:
                raise UsageError(f"another nbp-bench is writing to {folder}: wait for it, or choose another --out")
            earlier = folder / RECORDS
            if earlier.exists():
                modified = datetime.fromtimestamp(earlier.stat().st_mtime, UTC)
                moved = earlier.rename(folder / f"records-{modified:%Y%m%dT%H%M%S}.jsonl")
                click.echo(f"the records of an earlier run are now in {printable(moved)}")
        except OSError as error:
            raise UsageError(f"{folder} cannot hold the results ({error.strerror}): choose another --out") from error
        yield


def check_golden() -> None:
    """Print whether this machine computes the tokens of the authors' implementation."""
    for size in golden.SIZES:
        share = golden.agreement(size)
        verdict = "equal" if share == 1 else f"NOT EQUAL, only {share:.1%} are: do not trust the results below"
        click.echo(f"golden tokens of the authors' implementation, L={size}: {verdict} on this machine")


def run(plan: Plan) -> None:
    """Measure, print the tables, and write records, report, log and pictures to the plan's folder.

    A run that ends early, by Ctrl-C for example, still writes these for the rows that were finished.

    Raises EngineError if nothing could be measured, if an engine failed on the way, if it does not compute the model,
    or if it could not be compared; OSError if a result cannot be written.
    """
    measured: list[Measured] = []
    path = plan.out / RECORDS
    try:
        log = _log(plan.out / "log.txt")
        with _progress(_turns(plan)) as report, Sweep(plan, report, log) as sweep:
            for group in sweep.run():
                measured += group
                record.write([m.record for m in measured], path)
                for m in group:
                    log(table.log_line(m.record))
    except BaseException:
        if measured:
            with suppress(OSError, NbpError):  # the first error is the one to report
                click.echo(f"the run ended early, after {len(measured)} rows")
                _present(measured, plan.out)
        raise
    if sweep.profile:
        write_text(plan.out / "profile.txt", sweep.profile + "\n")
    records = _present(measured, plan.out)
    if all(r.not_measured for r in records):
        raise EngineError(f"nothing could be measured; {plan.out / 'log.txt'} has the details")
    if failed := [_row(r) for r in records if r.failed]:
        raise EngineError(f"these do not compute the model: {', '.join(failed)}; parity_where in {path} says more")
    if not_compared := [_row(r) for r in records if any(COMPARISON in note for note in r.notes)]:
        rows = ", ".join(not_compared)
        raise EngineError(f"these could not be compared with the reference: {rows}; the notes in {path} say why")
    if sweep.failures:
        raise EngineError(f"these engines failed: {', '.join(sweep.failures)}; {plan.out / 'log.txt'} has the details")


def _row(record: Record) -> str:
    return f"{record.block} {record.dtype} {record.engine}"


def _present(measured: Sequence[Measured], folder: Path) -> list[Record]:
    """Print the tables, write pictures and report, and return the records in the order of the tables."""
    records = table.sorted_rows([m.record for m in measured])
    _show(records)
    missing = [package for package in OPTIONAL if find_spec(package) is None]
    if "matplotlib" not in missing:
        contact_sheet(measured, folder)
    report_file = markdown.report(records, folder, plain=bool(missing))
    if missing:
        click.echo(f"left out: {', '.join(OPTIONAL[p] for p in missing)}; to get them, pip install {' '.join(missing)}")
    click.echo(printable(f"report: {report_file}   raw measurements: {folder / RECORDS}"))
    return records


def _turns(plan: Plan) -> int:
    """Return the number of engine turns: each case is prepared, generates its clips, and is closed."""
    return sum(len(group) for group in plan.groups()) * (plan.clips + 2)


def _log(path: Path) -> Callable[[str], None]:
    """Start a new log and return the function that appends a line to it."""
    path.unlink(missing_ok=True)

    def log(text: str) -> None:
        # A full disk stops the run when its records cannot be written, and not already here.
        with suppress(OSError), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{datetime.now(UTC):%H:%M:%S} {text}\n")

    return log


@contextmanager
def _progress(turns: int) -> Iterator[Report]:
    """Show a progress bar on a terminal if rich is installed, else print a line per stage."""

    def lines(stage: str, turns: int = 0) -> None:
        if not turns:
            click.echo(f"  {stage}")

    if find_spec("rich") is None or not sys.stdout.isatty():
        yield lines
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=plain_console(), transient=True) as progress:
        task = progress.add_task("begin", total=turns)

        def bar(stage: str, turns: int = 0) -> None:
            progress.update(task, description=stage, advance=turns)

        yield bar


def _show(records: Sequence[Record]) -> None:
    for title, (columns, rows) in table.tables(records).items():
        caption = f"{title}: {table.caption(records)}"
        if find_spec("rich") is None:
            click.echo(f"\n{caption}\n{markdown.table(columns, rows)}")
            continue
        console = plain_console()
        if not console.is_terminal:
            console.width = 160
        shown = table.fitting_columns(columns, rows, console.width)
        console.print(table.terminal_table(caption, shown, rows))
        if missing := columns.keys() - shown.keys():
            names = ", ".join(name for name in columns if name in missing)
            click.echo(f"the terminal is too narrow for {names}: see the report")
    for line in table.remarks(records):
        click.echo(f"- {line}")


def contact_sheet(measured: Sequence[Measured], folder: Path) -> None:
    """Draw the first clip as filmed and as each model continues it, or a clip per class."""
    from nbp_reports import figure

    with_clips = [m for m in measured if m.clips]
    if not with_clips:
        return
    strips: dict[str, np.ndarray] = {}
    given_count = 0
    labels = table.labels([m.record for m in with_clips])
    for m, label in zip(with_clips, labels, strict=True):
        predicted, filmed = to_uint8(m.clips[0].video[0]), m.conditions.filmed
        names = m.conditions.classes
        if names or not len(filmed):
            for name, result in zip(names or [label], m.clips, strict=False):
                strips.setdefault(name, to_uint8(result.video[0]))
        else:
            given_count = m.clip_frames - len(predicted)
            strips.setdefault("filmed", filmed)
            strips.setdefault(label, np.concatenate([filmed[:given_count], predicted]))
    figure.contact_sheet(strips, given_count, folder / markdown.SHEET)
