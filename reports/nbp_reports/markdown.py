"""Records as a Markdown report."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nbp_errors import printable
from nbp_files import write_text
from nbp_reports.record import BASELINE, Record
from nbp_reports.table import Columns, caption, remarks, rows, tables

FIGURE = "fps_by_block.png"
BLOCK = 1  # where the block stands in a row's kind
STEADY = 0.10  # spread above which a machine is called unsteady
SHEET = "clips.png"  # drawn by whoever has the clips, beside the report
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
## How to read it
- FPS counts the predicted frames of a clip over the wall time from the condition to the last predicted frame: encode,
  prefill, steps, sampling, decode. It is the median of a row's clips; every clip is a dot in the figure, and all
  samples are in `records.jsonl`.
- `spread` is the interquartile range of the clips' times over their median{{ "" if steady else
  ": **above 10%, so this machine was not steady**; FPS that differ by less than it do not differ" }}.
- The stages are mean seconds per clip and add up to the wall time. `one step ms` is the median of single steps.
{%- if looped %}
- `loop` is prefill, steps and sampling of an engine whose tokens stay on the device for a whole clip.
{%- endif %}
- `1st frame s` is a separate, streamed run: from the call until the first predicted frames are ready.
- Peak memory is that of the engine: on a CPU of its process, on a GPU what it holds there.
- `tokens`: all engines draw from the same noise, and their tokens are compared with those of the reference, eager
  PyTorch. Engines round logits differently in the last bits, so a draw whose noise falls within that rounding of the
  edge between two tokens may flip; then what follows differs too.
{%- if on_device %}
- `error` is the worst error of all checks against the reference in fp32, relative to the largest value. Shares of a
  bandwidth count what a step has to read: the weights once, and the valid rows of the caches.
{%- endif %}
- {{ interleaved }}
- {{ quality }}
- The paper's curve was measured on another machine with another model: compare the shapes, not the numbers.

## Where
| | |
| --- | --- |
{% for name, value in where.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}"""


def escaped(text: str) -> str:
    """A name or message as plain text in Markdown: on one line, without markup, in a table cell or outside."""
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", printable(text))


def table(columns: Columns, records: Sequence[Record]) -> str:
    """The rows as a Markdown table."""
    cells = [[escaped(cell) for cell in row] for row in rows(columns, records)]
    lines = [list(columns), ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def verdict(records: Sequence[Record]) -> str:
    """One sentence per block size: the fastest engine, its gain over the authors' loop, and whether tokens agree."""
    kinds = list(dict.fromkeys(_kind(r) for r in records))
    lines = []
    for kind in kinds:
        measured = [r for r in records if _kind(r) == kind and r.fps]
        varying = (value for i, value in enumerate(kind) if i != BLOCK and len({other[i] for other in kinds}) > 1)
        name = escaped(", ".join([kind[BLOCK], *varying]))
        if not measured:
            lines.append(f"- **{name}**: nothing could be measured.")
            continue
        best = max(measured, key=lambda r: r.fps or 0.0)
        naive = next((r for r in measured if r.role == BASELINE), None)
        gain = ""
        if naive and naive is not best:
            gain = f", {(best.fps or 0.0) / (naive.fps or 1.0):.1f}× the authors' loop"
        lines.append(f"- **{name}**: {best.engine} is fastest, {best.fps:.2f} FPS{gain}; {_tokens(measured)}.")
    return "\n".join(lines)


def _kind(record: Record) -> tuple[str, ...]:
    """Rows that differ in this do not compete."""
    return record.model, record.block, record.dtype, f"batch {record.batch}", record.device


def _tokens(records: Sequence[Record]) -> str:
    compared = [r.token_agreement for r in records if r.token_agreement is not None]
    if not compared:
        return "tokens were not compared"
    if len(compared) == 1:
        same = "its tokens and the reference's are identical"
    else:
        same = f"{len(compared)} engines and the reference gave identical tokens"
    return same if set(compared) == {1.0} else "engines differ in tokens, see that column"


def _each(records: Sequence[Record], value: Callable[[Record], object]) -> str:
    """All the values that occur, in order."""
    return "; ".join(dict.fromkeys(escaped(str(value(r))) for r in records))


def _code(command: str) -> str:
    """A command line as code, unless it holds the character that would end the code."""
    return escaped(command) if "`" in command else f"`{printable(command)}`".replace("|", "\\|")


def _where(records: Sequence[Record]) -> dict[str, str]:
    machines = dict.fromkeys(
        f"{r.machine}, {r.cores} cores, {r.memory_bytes / 2**30:.0f} GiB"
        + (f"; {r.gpu}, driver {r.driver}" if r.gpu else "")
        for r in records
    )
    return {
        "command": "; ".join(dict.fromkeys(_code(r.command) for r in records)),
        "began": _each(records, lambda r: r.run),
        "machine": escaped("; ".join(machines)),
        "system": _each(records, lambda r: f"{r.system}, Python {r.python}"),
        "versions": _each(records, lambda r: r.versions),
        "device, dtype, batch": _each(records, lambda r: f"{r.device} {r.dtype} {r.batch}"),
        "threads": _each(records, lambda r: r.threads or "each runtime's own choice"),
        "condition": _each(records, lambda r: r.video),
        "sampling": _each(records, lambda r: f"temperature {r.temperature}, top-k {r.top_k}, top-p {r.top_p}"),
        "seed": _each(records, lambda r: r.seed),
    }


def _turns(records: Sequence[Record]) -> str:
    apart = [r for r in records if not r.interleaved]
    if not apart:
        return "The engines of a block took turns, clip by clip."
    if len(apart) == len(records):
        return "The engines ran one after another: together they would not fit in memory."
    return f"The engines of a block took turns where they fit in memory, not for {_each(apart, lambda r: r.block)}."


def _quality(records: Sequence[Record]) -> str:
    random = [r for r in records if not r.trained]
    if not random:
        return "FVD is not measured yet."
    names = _each(random, lambda r: f"{r.model} {r.block}")
    return f"These have random weights, whose speed means something and whose quality is not measured: {names}."


def report(records: Sequence[Record], folder: Path, plain: bool = False) -> Path:
    """Write `report.md` and its figure into the folder; with `plain`, which needs no package, the tables alone.

    Returns the report's path.
    """
    path, chosen = folder / "report.md", tables(records)
    if plain:
        parts = [f"## {title}\n{table(columns, shown)}" for title, (columns, shown) in chosen.items()]
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
        "tables": chosen,
        "table": table,
        "remarks": remarks(records),
        "figure": FIGURE if measured else None,
        "sheet": SHEET if measured and (folder / SHEET).exists() else None,
        "steady": all((r.spread or 0) <= STEADY for r in measured),
        "looped": any(r.loop_ns for r in records),
        "on_device": any(r.device_step_ns for r in records),
        "interleaved": _turns(records),
        "quality": _quality(records),
        "where": _where(records),
    }
    write_text(path, template.render(records=records, **values) + "\n")
    return path
