"""The pictures of the report: frames a second by block size, the paper's beside ours, and what was generated."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nbp_errors import printable
from nbp_files import replacing
from nbp_reports.record import Record
from nbp_reports.table import IDENTITY, caption

# Fig. 7 and Table 3 of arXiv 2502.07737: 700M model, one A100, frame prediction.
PAPER_FPS = {1: 0.80, 8: 5.24, 16: 8.89, 32: 10.81, 64: 14.12, 256: 17.14}


def plain(text: str) -> str:
    """A name as matplotlib shows it unchanged: between two dollar signs, it would read mathematics."""
    return printable(text).replace("$", r"\$")


def fps_by_block(records: Sequence[Record], path: Path) -> None:
    """Draw one line per engine, every clip a dot, and the paper's curve in a panel of its own; all rows have clips."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = {id(r): (r.engine, *(cell(r) for cell in IDENTITY.values())) for r in records}
    varies = [len({name[i] for name in names.values()}) > 1 or i == 0 for i in range(len(IDENTITY) + 1)]
    engines: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        shown = (part for part, differs in zip(names[id(record)], varies, strict=True) if differs)
        engines[plain(", ".join(shown))].append(record)
    figure, (ours, paper) = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    for engine, rows in engines.items():
        rows.sort(key=lambda r: r.block_size)
        medians = [r.fps or 0.0 for r in rows]
        (line,) = ours.plot([r.block_size for r in rows], medians, marker="o", label=engine)
        for r in rows:
            fps = [r.frames * r.batch / (ns / 1e9) for ns in r.total_ns]
            ours.plot([r.block_size] * len(fps), fps, ".", color=line.get_color(), alpha=0.4)
    machines = "; ".join(dict.fromkeys(r.gpu if r.device != "cpu" and r.gpu else r.machine for r in records))
    ours.set_title(f"{plain(caption(records))}\n{plain(machines)}", fontsize=8, wrap=True)
    ours.legend()
    paper.plot(list(PAPER_FPS), list(PAPER_FPS.values()), marker="o", color="grey", label="paper, authors' loop")
    paper.set_title("the paper's Fig. 7: another machine and model\n(700M parameters, one A100)", fontsize=9)
    paper.legend()
    for axes in (ours, paper):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({r.block_size for r in records} | set(PAPER_FPS)))
        axes.get_xaxis().set_major_formatter(mpl.ticker.ScalarFormatter())
        axes.set_xlabel("block size L, tokens")
        axes.set_ylabel("predicted frames per second, end to end")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)


def contact_sheet(strips: Mapping[str, np.ndarray], given: int, path: Path) -> None:
    """Draw clips, uint8 [F,3,H,W], one under the other, with a line after the frames that were given, if any were."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    longest = max(len(video) for video in strips.values())
    figure, axes = plt.subplots(len(strips), 1, figsize=(longest * 0.8, len(strips) * 0.95), layout="constrained")
    for (label, video), row in zip(strips.items(), np.atleast_1d(axes), strict=True):
        frames, _, height, width = video.shape
        strip = video.transpose(2, 0, 3, 1).reshape(height, frames * width, 3)
        row.imshow(strip, extent=(0, frames, 0, height / width))
        if given:
            row.axvline(given, color="red", linewidth=2)
        row.set_xlim(0, longest)
        row.set_ylabel("\n".join(map(plain, label.split("\n"))))
        row.set_xticks([])
        row.set_yticks([])
    frames_given = f"Left of the red line: the {given} given frames. Right of it: predicted frames of one clip"
    figure.suptitle(frames_given if given else "One generated clip per row", fontsize=9)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)
