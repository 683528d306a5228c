"""From a plan to a finished comparison: the sweep with its progress, records, tables, pictures and report.

Torch, click and numpy are enough: without rich the tables are plain, and what else is missing is left out and named.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from nbp_errors import UsageError
from nbp_reports import markdown, record, table
from nbp_reports.record import Record

RECORDS = "records.jsonl"
OPTIONAL = {"matplotlib": "pictures", "jinja2": "the full report"}


def check_out(folder: Path) -> None:
    """Make the folder of the results, and keep the records of an earlier run under another name.

    Raises UsageError, before anything is measured, if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        earlier = folder / RECORDS
        if earlier.exists():
            modified = datetime.fromtimestamp(earlier.stat().st_mtime, UTC)
            kept = earlier.rename(folder / f"records-{modified:%Y%m%dT%H%M%S}.jsonl")
            click.echo(f"the records of an earlier run are now in {kept}")
    except OSError as error:
        raise UsageError(f"{folder} cannot hold the results ({error.strerror}): choose another --out") from error


def check_golden() -> None:
    """Say whether this machine computes the authors' own tokens, before it measures anything."""
    for size in golden.SIZES:
        share = golden.agreement(size)
        verdict = "equal" if share == 1 else f"NOT EQUAL, only {share:.1%} are: trust nothing below"
        click.echo(f"golden tokens of the authors' implementation, L={size}: {verdict} on this machine")


def run(plan: Plan) -> None:
    """Measure, print the tables, and leave records, report, log and pictures in the plan's folder.

    Raises EngineError if nothing could be measured, or if an engine does not compute the model, or may not.
    """
    measured: list[Measured] = []
    path = plan.out / RECORDS
    with _log(plan.out / "log.txt") as log, _progress(_turns(plan)) as report, Sweep(plan, report, log) as sweep:
        for group in sweep.run():
            measured += group
            record.write([m.record for m in measured], path)
            for m in group:
                log(table.log_line(m.record))
    records = table.sorted_rows([m.record for m in measured])
    if sweep.profile:
        (plan.out / "profile.txt").write_text(sweep.profile + "\n", "utf-8")
    _show(records)
    missing = [package for package in OPTIONAL if find_spec(package) is None]
    if "matplotlib" not in missing:
        contact_sheet(measured, plan.out)
    report_file = markdown.report(records, plan.out, plain=bool(missing))
    if missing:
        click.echo(f"left out: {', '.join(OPTIONAL[p] for p in missing)}; pip install {' '.join(missing)} brings them")
    click.echo(f"report: {report_file}   raw samples: {path}")
    if all(r.not_measured for r in records):
        raise EngineError(f"nothing could be measured; {plan.out / 'log.txt'} has the details")
    if failed := [f"{r.block} {r.dtype} {r.engine}" for r in records if r.failed]:
        raise EngineError(f"these do not compute the model, see parity_where in {path}: {', '.join(failed)}")
    if unknown := [f"{r.block} {r.dtype} {r.engine}" for r in records if any(COMPARISON in note for note in r.notes)]:
        raise EngineError(f"these could not be compared with the reference, see their notes: {', '.join(unknown)}")


def _turns(plan: Plan) -> int:
    """Engine turns in all: each case is made ready, makes its clips, and is done."""
    return sum(len(group) for group in plan.groups()) * (plan.clips + 2)


@contextmanager
def _log(path: Path) -> Iterator[Callable[[str], None]]:
    with path.open("w", encoding="utf-8") as file:

        def log(text: str) -> None:
            file.write(f"{datetime.now(UTC):%H:%M:%S} {text}\n")
            file.flush()

        yield log


@contextmanager
def _progress(turns: int) -> Iterator[Report]:
    """A bar on a terminal where rich is installed, else a line per stage."""

    def lines(stage: str, turns: int = 0) -> None:
        if not turns:
            click.echo(f"  {stage}")

    if find_spec("rich") is None or not sys.stdout.isatty():
        yield lines
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True) as progress:
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
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 160
        shown = table.fitting_columns(columns, rows, console.width)
        console.print(table.terminal_table(caption, shown, rows))
        if missing := columns.keys() - shown.keys():
            click.echo(f"too narrow for {', '.join(name for name in columns if name in missing)}: see the report")
    for line in table.remarks(records):
        click.echo(f"- {line}")


def contact_sheet(measured: Sequence[Measured], folder: Path) -> None:
    """The first clip as filmed and as each model continues it; of a class-conditional model, a clip of each class."""
    from nbp_reports import figure

    shown = [m for m in measured if m.clips]
    if not shown:
        return
    strips: dict[str, np.ndarray] = {}
    given = 0
    for m in shown:
        predicted, filmed = to_uint8(m.clips[0].video[0]), m.conditions.filmed
        names = m.conditions.classes
        if names or not len(filmed):
            for name, result in zip(names or [table.label(m.record)], m.clips, strict=False):
                strips.setdefault(name, to_uint8(result.video[0]))
        else:
            given = m.clip_frames - len(predicted)
            strips.setdefault("filmed", filmed)
            strips.setdefault(table.label(m.record), np.concatenate([filmed[:given], predicted]))
    figure.contact_sheet(strips, given, folder / markdown.SHEET)
