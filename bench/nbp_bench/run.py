"""From a plan to a finished comparison: sweep with progress, records, tables, pictures, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nbp_bench import golden
from nbp_bench.sweep import Measured, Plan, sweep
from nbp_bench.video import to_uint8
from nbp_reports import figure, markdown, record, table

if TYPE_CHECKING:
    from rich.console import Console


def check_golden(console: "Console") -> None:
    """Say whether this machine computes the authors' own tokens, before it measures anything."""
    for size in golden.SIZES:
        share = golden.agreement(size)
        verdict = "equal" if share == 1 else f"NOT EQUAL, only {share:.1%} are: trust nothing below"
        console.print(f"golden tokens of the authors' implementation, L={size}: {verdict} on this machine")


def run(console: "Console", plan: Plan) -> None:
    """Measure, print the tables, and leave records, report and pictures in the plan's folder."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("begin", total=plan.turns)

        def report(stage: str, turns: int = 0) -> None:
            progress.update(task, description=stage, advance=turns)
            if not turns and not console.is_terminal:
                console.print(f"  {stage}")

        measured = sweep(plan, report)
    records = [m.record for m in measured]
    plan.out.mkdir(parents=True, exist_ok=True)
    record.write(records, plan.out / "records.jsonl")
    contact_sheet(measured, plan.out)
    report_file = markdown.report(records, plan.out)
    for title, cells in table.TABLES.items():
        console.print(table.terminal(f"{title}: {records[0].model} on {records[0].video}", cells, records))
    console.print(f"report: {report_file}   raw samples: {plan.out / 'records.jsonl'}", soft_wrap=True)


def contact_sheet(measured: Sequence[Measured], folder: Path) -> None:
    """The first clip as filmed and as each block shape continues it; of a class-conditional model, a clip a class."""
    strips, given = ({} if measured[0].classes else {"filmed": measured[0].truth}), 0
    for name, result in zip(measured[0].classes, measured[0].results, strict=False):
        strips[name] = to_uint8(result.video[0])
    for m in () if measured[0].classes else measured:
        predicted = to_uint8(m.results[0].video[0])
        given = m.clip_frames - len(predicted)
        strips.setdefault(m.record.block, np.concatenate([m.truth[:given], predicted]))
    figure.contact_sheet(strips, given, folder / markdown.SHEET)
