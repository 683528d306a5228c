"""What a GPU makes of the model, in one go and from a plain checkout: `python -m nbp_bench.gpu`.

Every case, an engine at a block size in a dtype, is held against the reference in fp32 on the same device and then
timed, by a process that starts afresh after a failure; what was measured is written after each. The weights are random.
"""

import os
import shlex
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from shutil import copytree
from typing import Any
from zipfile import ZipFile

import click
import numpy as np

from nbp_bench.case import PYTORCH, Case, Result, export, measure, profiled
from nbp_engines.errors import EngineError
from nbp_errors import UsageError
from nbp_export._extras import need
from nbp_reports import markdown, record, table
from nbp_reports.record import Record

ENGINES = ("reference", "graphs", "tensorrt", "cuda", "compiled")  # the last compiles for minutes
DTYPES = ("bf16", "fp16", "fp32")
LEAST_SECONDS = 20  # below which no case begins
CASE_SHARE = 1 / 3  # of the time, that one case may take, once its bundle is there
READING = (
    "Shares of a bandwidth: as if a step read the weights once and the rows of the caches that are valid. Without "
    "sampling, the steps of cuda and tensorrt wait for the host, PyTorch's do not: compare those with sampling."
)


@click.command()
@click.option("--model", default="nbp-xl", show_default=True, help="A named size, with random weights.")
@click.option("--sizes", default="16,1,256", show_default=True, help="Block sizes or shapes, most wanted first.")
@click.option("--dtype", "dtypes", default="bf16,fp16", show_default=True, help=f"Of {', '.join(DTYPES)}; likewise.")
@click.option("--engines", default=",".join(ENGINES), show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", help="cpu rehearses the script.")
@click.option("--wheels", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Folder of more wheels.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=9.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("nbp-gpu-results"), show_default=True)
@click.option("--quick", is_flag=True, help="Few steps and one clip.")
@click.option("--profile", is_flag=True, help="Then list the kernels of a step and of decode, in profile.txt.")
def main(
    model: str,
    sizes: str,
    dtypes: str,
    engines: str,
    device: str,
    wheels: Path | None,
    minutes: float,
    out: Path,
    quick: bool,
    profile: bool,
) -> None:
    """Hold every engine that this machine has against the reference on its GPU, and time it.

    Needs nothing installed but torch with CUDA, click and numpy; wheels in a folder serve without being installed.
    What cannot be measured is listed with the reason. Leaves records, a table and a log in --out.
    """
    deadline = time.monotonic() + 60 * minutes
    command = shlex.join(["python", "-m", "nbp_bench.gpu", *sys.argv[1:]])
    began = datetime.now(UTC).isoformat(timespec="seconds")
    for asked, known in ((engines, ENGINES), (dtypes, DTYPES)):
        if unknown := set(asked.split(",")) - set(known):
            raise UsageError(f"no {', '.join(sorted(unknown))!r}: there are {', '.join(known)}")
    cases = [
        Case(engine, dtype, block, model, device, out, quick, began, command)
        for dtype in dtypes.split(",")
        for block in sizes.split(",")
        for engine in engines.split(",")
    ]
    # Last what takes minutes before it is measured: exports, then what compiles.
    cases.sort(key=lambda case: (case.engine == "compiled", case.engine not in PYTORCH))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked, _Bench(out, deadline, 60 * minutes * CASE_SHARE) as bench:
        if wheels:
            bench.say(f"wheels: {', '.join(unpack(wheels, Path(unpacked))) or f'none in {wheels}'}")
            sys.path.insert(0, unpacked)
        need("export", "torch")
        for case in cases:
            bench.run(case)
        if profile:
            bench.profile(cases[0])
    click.echo(bench.summary())
    if not bench.records:
        raise EngineError(f"nothing could be measured: {out / 'log.txt'} says why")
    if failed := [r for r in bench.records if (r.parity_error or 0) > (r.parity_allowed or 0)]:
        raise EngineError("not the model: " + ", ".join(f"{r.block} {r.dtype} {r.engine}" for r in failed))


def unpack(wheels: Path, folder: Path) -> list[str]:
    """Unpack a folder's wheels into another, as pip would install them but for their scripts; their names."""
    names = sorted(wheels.glob("*.whl"))
    for wheel in names:
        with ZipFile(wheel) as archive:
            archive.extractall(folder)
    for library in (*folder.glob("*.data/purelib"), *folder.glob("*.data/platlib")):
        copytree(library, folder, dirs_exist_ok=True)
    return [wheel.name for wheel in names]


class _Bench(AbstractContextManager["_Bench"]):
    """Runs cases in one process after another, and keeps what comes of them in a folder."""

    def __init__(self, out: Path, deadline: float, longest: float) -> None:
        self.records: list[Record] = []
        self.missing: list[str] = []
        self.notes: list[str] = []
        self._out = out
        self._deadline = deadline
        self._longest = longest
        self._tokens: dict[tuple[str, str], np.ndarray] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._pid = 0
        self._log = (out / "log.txt").open("w")

    def say(self, line: str) -> None:
        """To the terminal and the log."""
        click.echo(line)
        self._note(line)

    def _note(self, text: str) -> None:
        self._log.write(f"{datetime.now(UTC):%H:%M:%S} {text}\n")
        self._log.flush()

    def run(self, case: Case) -> None:
        """Measure one case, and write what there is by then."""
        if self._left() < LEAST_SECONDS:
            result = Result(why="the time was up")
        else:
            self._note(f"{case}: begins")
            result = self._result(case)
        for note in result.notes:
            self.notes.append(f"{case}: {' '.join(note.split())}")
            self._note(self.notes[-1])
        if result.trace:
            self._note(f"{case}: {result.trace}")
        if result.record and result.tokens is not None:
            self.records.append(result.record)
            if case.engine == "reference":
                self._tokens[case.dtype, case.block] = result.tokens
            shown = zip(table.ON_DEVICE, table.rows(table.ON_DEVICE, [result.record])[0], strict=True)
            self.say(", ".join(f"{name} {cell}" for name, cell in shown))
        else:
            self.missing.append(f"{case}: not measured: {result.why}")
            self.say(self.missing[-1])
        for dtype in {r.dtype for r in self.records}:
            rows = [r for r in self.records if r.dtype == dtype]
            record.write(rows, self._out / f"{rows[0].model}-{dtype}.jsonl")
        (self._out / "summary.md").write_text(self.summary() + "\n")

    def _result(self, case: Case) -> Result:
        notes = []
        if case.engine not in PYTORCH:
            there = self._call(export, case, seconds=self._left())
            if there.why:
                return there
            notes = there.notes
        seconds = min(self._left(), self._longest)
        result = self._call(measure, case, self._tokens.get((case.dtype, case.block)), seconds=seconds)
        return replace(result, notes=notes + result.notes)

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def profile(self, case: Case) -> None:
        """The kernels of a case's step and decode, in a file."""
        result = self._call(profiled, case._replace(engine="reference"), seconds=self._left())
        (self._out / "profile.txt").write_text("\n\n".join(result.notes) or f"not measured: {result.why}\n")

    def _call(self, what: Any, *arguments: object, seconds: float) -> Result:
        """Have the worker's process do something; a fresh one next time if it fails, dies or takes too long."""
        try:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, get_context("spawn"))
                self._pid = self._pool.submit(os.getpid).result()
            result: Result = self._pool.submit(what, *arguments).result(seconds)
        except TimeoutError:
            why = f"it took longer than {seconds:.0f} s"
            if what is export:
                why = f"its export took longer than {seconds:.0f} s: with more --minutes it is kept for the next run"
            result = Result(why=why, trace="stopped")
        except BrokenProcessPool as error:
            result = Result(why="its process died", trace=str(error))
        if result.trace:
            self._stop(kill=True)
        return result

    def _stop(self, kill: bool) -> None:
        if self._pool:
            if kill:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            self._pool.shutdown()
            self._pool = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the process, at once if interrupted, and close the log."""
        self._stop(kill=kind is not None)
        self._log.close()

    def summary(self) -> str:
        """What was measured where, as Markdown, and what was not."""
        order = {engine: i for i, engine in enumerate(ENGINES)}
        rows = sorted(self.records, key=lambda r: (r.block_size, r.dtype, order[r.engine]))
        lines = []
        if rows:
            first = rows[0]
            where = f"{first.gpu}, driver {first.driver}" if first.device == "cuda" else f"CPU: {first.machine}"
            rates = ((first.copy_bandwidth, "copied"), (first.peak_bandwidth, "by its clock"))
            told = [f"{value / 1e9:,.0f} GB/s {how}" for value, how in rates if value]
            lines = [f"{first.model}, random weights; {where}; {', '.join(told)}; {first.versions}", ""]
            lines += [markdown.table(table.ON_DEVICE, rows), READING, ""]
        return "\n".join([*lines, *(f"- {line}" for line in (*self.missing, *self.notes))])


if __name__ == "__main__":
    main()
