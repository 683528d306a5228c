"""Records as a Markdown report."""

from collections.abc import Sequence
from pathlib import Path

from nbp_reports.figure import fps_by_block
from nbp_reports.record import Record
from nbp_reports.table import TABLES, Columns, rows

FIGURE = "fps_by_block.png"
STEADY = 0.10  # spread above which a machine is called unsteady
SHEET = "clips.png"  # drawn by whoever has the clips, beside the report
TEMPLATE = """\
# Block sizes compared: {{ first.model }}

{{ verdict }}

{% for title, columns in tables.items() -%}
## {{ title }}
{{ table(columns, records) }}
{% endfor -%}
![Frames a second by block size]({{ figure }})
{% if sheet %}
![The first clip as filmed and as generated]({{ sheet }})
{% endif %}
## How to read it
- FPS counts the {{ first.frames }} predicted frames of a clip over the wall time from the given frames to the predicted
  ones: encode, prefill, steps, sampling, decode. It is the median of {{ first.total_ns | length }} clips; every clip is
  a dot in the figure, and all samples are in `records.jsonl`.
- `spread` is the interquartile range of the clips' times over their median{{ "" if steady else
  ": **above 10%, so this machine was not steady**; FPS that differ by less than it do not differ" }}.
- The stages are mean seconds a clip and add up to the wall time. `one step ms` is the median of single steps.
- `1st frame s` is a separate, streamed run: from the call until the first predicted frames are there.
- Peak memory is that of the engine's own process{{ "" if first.interleaved else ", each engine running alone" }}.
- `tokens`: all engines draw from the same noise, and their tokens are compared with those of the eager PyTorch
  reference. Engines round logits differently in the last bits, so a draw whose noise falls within that rounding of the
  edge between two tokens may flip; then what follows differs too.
- {{ "The engines took turns, clip by clip, in processes of their own." if first.interleaved
     else "The engines ran one after another: together they would not fit in memory." }}
- {{ "FVD is not measured yet." if first.trained
     else "The weights are random: speed means something, quality does not and is not measured." }}
- The paper's curve was measured on another machine with another model: compare the shapes, not the numbers.

## Where
| | |
| --- | --- |
| command | `{{ first.command }}` |
| began | {{ first.run }} |
| machine | {{ first.machine }}, {{ first.cores }} cores, {{ "%.0f" | format(first.memory_bytes / 2**30) }} GiB |
| system | {{ first.system }}, Python {{ first.python }} |
| versions | {{ first.versions }} |
| device, dtype, batch | {{ first.device }}, {{ first.dtype }}, {{ first.batch }} |
| threads | {{ first.threads or "each runtime's own choice" }} |
| video | {{ first.video }} |
| sampling | temperature {{ first.temperature }}, top-k {{ first.top_k }}, top-p {{ first.top_p }} |
| seed | {{ first.seed }} |
"""


def table(columns: Columns, records: Sequence[Record]) -> str:
    """The rows as a Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *rows(columns, records)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def verdict(records: Sequence[Record]) -> str:
    """One sentence a block size: the fastest engine, its gain over the authors' loop, and whether tokens agree."""
    lines = []
    for block in dict.fromkeys(r.block for r in records):
        there = [r for r in records if r.block == block]
        best = max(there, key=lambda r: r.fps)
        naive = next((r for r in there if r.engine == "naive"), None)
        gain = f", {best.fps / naive.fps:.1f}× the authors' loop" if naive and naive is not best else ""
        same = all(r.token_agreement in (None, 1) for r in there)
        lines.append(
            f"- **{block}**: {best.engine} is fastest, {best.fps:.2f} FPS{gain}; "
            + ("all engines gave identical tokens." if same else "engines differ in tokens, see that column.")
        )
    return "\n".join(lines)


def report(records: Sequence[Record], folder: Path) -> Path:
    """Write `report.md` and its figure into the folder; returns the report's path."""
    from jinja2 import Environment, StrictUndefined

    fps_by_block(records, folder / FIGURE)
    template = Environment(undefined=StrictUndefined, autoescape=False).from_string(TEMPLATE)
    path = folder / "report.md"
    sheet = SHEET if (folder / SHEET).exists() else None
    steady = all((r.spread or 0) <= STEADY for r in records)
    values = {"steady": steady, "tables": TABLES, "table": table, "figure": FIGURE, "sheet": sheet}
    path.write_text(template.render(first=records[0], records=records, verdict=verdict(records), **values) + "\n")
    return path
