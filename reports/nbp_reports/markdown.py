"""Writes records as a Markdown report."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nbp_errors import printable
from nbp_files import write_text
from nbp_reports.record import BASELINE, Record
from nbp_reports.table import Columns, caption, remarks, rows, tables

FIGURE = "fps_by_block.png"
BLOCK = 1  # the index of the block in a comparison key
STEADY = 0.10  # the largest spread of a machine that counts as steady
SHEET = "clips.png"  # the caller draws it into the report's folder, because records do not contain clips
TEMPLATE = """\
# Block sizes compared

{{ caption | escaped }}

{{ verdict }}

{% for title, (columns, rows) in tables.items() -%}
## {{ title }}
{{ table(columns, rows) }}
{% endfor -%}
{% for line in remarks -%}
- {{ line | escaped }}
{% endfor -%}
{% if figure %}
![Frames per second by block size]({{ figure }})
{% endif -%}
{% if sheet %}
![The first clip as filmed and as generated]({{ sheet }})
{% endif %}
## How to read the results
- FPS counts the predicted frames of a clip over the wall time from the condition to the last predicted frame, which
  includes encode, prefill, steps, sampling and decode. It is the median of a row's clips. The figure has a dot for
  every clip, and `records.jsonl` holds every time.
- `spread` is the interquartile range of the clips' times over their median.{{ "" if steady else
  " **It exceeds 10%, so this machine was not steady**: smaller differences in FPS mean nothing." }}
- The stages are mean seconds per clip, and they add up to the wall time. `one step ms` is the median of single steps.
{%- if looped %}
- `loop` is prefill, steps and sampling together, where an engine keeps a clip's tokens on the device until it is
  complete.
{%- endif %}
- `1st frame s` is the time from the call until the first predicted frames exist, in a separate run that streams.
- `peak MB` is the peak memory of the engine's own process, and on a GPU the most GPU memory that the engine holds.
- `tokens` compares the tokens of all engines, which draw from the same noise, with those of the reference, eager
  PyTorch. Engines round logits differently in the last bits. If the noise of a draw is that close to the edge between
  two tokens, engines may draw different tokens, and everything after that differs too.
{%- if on_device %}
- `error` is the largest error of all checks against the reference in fp32, relative to the largest expected value.
- `% copy BW` and `% peak BW` are shares of the memory bandwidth that a large copy reached and of the device's peak.
  They count what a step has to read: the weights once, and the valid rows of the caches.
{%- endif %}
- {{ interleaved }}
- {{ quality }}
- The paper's curve was measured on another machine with another model, so compare the shapes of the curves and not the
  numbers.

## Machine and settings
| | |
| --- | --- |
{% for name, value in settings.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}"""


def escaped(text: str) -> str:
    """Return a text as Markdown that shows it unchanged on one line, also in a cell of a table."""
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", printable(text))


def table(columns: Columns, records: Sequence[Record]) -> str:
    """Return the records as a Markdown table with these columns."""
    cells = [[escaped(cell) for cell in row] for row in rows(columns, records)]
    lines = [list(columns), ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def verdict(records: Sequence[Record]) -> str:
    """Return one line per block size: the fastest engine, its gain over the authors' loop, and whether tokens agree."""
    keys = list(dict.fromkeys(_comparison_key(r) for r in records))
    lines = []
    for key in keys:
        measured = [r for r in records if _comparison_key(r) == key and r.fps]
        varying = (value for i, value in enumerate(key) if i != BLOCK and len({other[i] for other in keys}) > 1)
        name = escaped(", ".join([key[BLOCK], *varying]))
        if not measured:
            lines.append(f"- **{name}**: nothing could be measured.")
            continue
        best = max(measured, key=lambda r: r.fps or 0.0)
        naive = next((r for r in measured if r.role == BASELINE), None)
        gain = ""
        if naive and naive is not best:
            gain = f", {(best.fps or 0.0) / (naive.fps or 1.0):.1f}× the authors' loop"
        agreement = _token_agreement(measured)
        lines.append(f"- **{name}**: {best.engine} is fastest with {best.fps:.2f} FPS{gain}; {agreement}.")
    return "\n".join(lines)


def _comparison_key(record: Record) -> tuple[str, ...]:
    """Return what must be equal for two records to be compared."""
    return record.model, record.block, record.dtype, f"batch {record.batch}", record.device


def _token_agreement(records: Sequence[Record]) -> str:
    compared = [r.token_agreement for r in records if r.token_agreement is not None]
    if not compared:
        return "tokens were not compared"
    if len(compared) == 1:
        identical = "the tokens of the compared engine and of the reference are identical"
    else:
        identical = f"{len(compared)} engines and the reference gave identical tokens"
    return identical if set(compared) == {1.0} else "the engines' tokens differ, see the column `tokens`"


def _distinct(records: Sequence[Record], value: Callable[[Record], object]) -> str:
    """Return the different values that the records have, in order of occurrence."""
    return "; ".join(dict.fromkeys(escaped(str(value(r))) for r in records))


def _code(command: str) -> str:
    """Return a command line as code in Markdown, or as plain text if it contains the character that would end code."""
    return escaped(command) if "`" in command else f"`{printable(command)}`".replace("|", "\\|")


def _settings(records: Sequence[Record]) -> dict[str, str]:
    """Return the machine and the settings of the measurements, by name."""
    machines = dict.fromkeys(
        f"{r.machine}, {r.cores} cores, {r.memory_bytes / 2**30:.0f} GiB"
        + (f"; {r.gpu}, driver {r.driver}" if r.gpu else "")
        for r in records
    )
    return {
        "command": "; ".join(dict.fromkeys(_code(r.command) for r in records)),
        "start": _distinct(records, lambda r: r.run),
        "machine": escaped("; ".join(machines)),
        "system": _distinct(records, lambda r: f"{r.system}, Python {r.python}"),
        "versions": _distinct(records, lambda r: r.versions),
        "device, dtype, batch": _distinct(records, lambda r: f"{r.device} {r.dtype} {r.batch}"),
        "threads": _distinct(records, lambda r: r.threads or "the default of each runtime"),
        "condition": _distinct(records, lambda r: r.video),
        "sampling": _distinct(records, lambda r: f"temperature {r.temperature}, top-k {r.top_k}, top-p {r.top_p}"),
        "seed": _distinct(records, lambda r: r.seed),
    }


def _interleaving(records: Sequence[Record]) -> str:
    """Return a sentence on whether the engines took turns."""
    sequential = [r for r in records if not r.interleaved]
    if not sequential:
        return "The engines of a block took turns, clip by clip."
    if len(sequential) == len(records):
        return "The engines ran one after another, because together they would not fit in memory."
    blocks = _distinct(sequential, lambda r: r.block)
    return f"The engines of a block took turns, except for {blocks}, where they would not fit in memory together."


def _quality(records: Sequence[Record]) -> str:
    """Return a sentence on what is known about the quality of the clips."""
    untrained = [r for r in records if not r.trained]
    if not untrained:
        return "FVD is not measured yet."
    names = _distinct(untrained, lambda r: f"{r.model} {r.block}")
    return f"These models were not trained for their block, so only their speed and memory are meaningful: {names}."


def report(records: Sequence[Record], folder: Path, plain: bool = False) -> Path:
    """Write `report.md` and its figure into a folder, and return the report's path.

    With `plain`, the report only has the verdict, the tables and the remarks. It then needs neither jinja2 nor
    matplotlib.
    """
    path, titled_tables = folder / "report.md", tables(records)
    if plain:
        parts = [f"## {title}\n{table(columns, shown)}" for title, (columns, shown) in titled_tables.items()]
        lines = "\n".join(f"- {escaped(line)}" for line in remarks(records))
        write_text(path, "\n".join([escaped(caption(records)), "", verdict(records), "", *parts, lines, ""]))
        return path
    from jinja2 import Environment, StrictUndefined

    from nbp_reports.figure import fps_by_block

    measured = [r for r in records if r.total_ns]
    if measured:
        fps_by_block(measured, folder / FIGURE)
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    environment.filters["escaped"] = escaped
    template = environment.from_string(TEMPLATE)
    values = {
        "caption": caption(records),
        "verdict": verdict(records),
        "tables": titled_tables,
        "table": table,
        "remarks": remarks(records),
        "figure": FIGURE if measured else None,
        "sheet": SHEET if measured and (folder / SHEET).exists() else None,
        "steady": all((r.spread or 0) <= STEADY for r in measured),
        "looped": any(r.loop_ns for r in records),
        "on_device": any(r.device_step_ns for r in records),
        "interleaved": _interleaving(records),
        "quality": _quality(records),
        "settings": _settings(records),
    }
    write_text(path, template.render(records=records, **values) + "\n")
    return path
