"""Draws the pictures of the report: frames per second by block size, beside the paper's, and the generated clips."""

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
    """Return a text with its dollar signs escaped, because matplotlib reads text between two of them as mathematics."""
    return printable(text).replace("$", r"\$")


def fps_by_block(records: Sequence[Record], path: Path) -> None:
    """Draw frames per second by block size into the image file `path`.

    Each engine has a line through its medians and a dot for every clip. The paper's curve has its own panel. Every
    record must have clips.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = {id(r): (r.engine, *(cell(r) for cell in IDENTITY.values())) for r in records}
    in_label = [len({name[i] for name in names.values()}) > 1 or i == 0 for i in range(len(IDENTITY) + 1)]
    lines: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        parts = (part for part, included in zip(names[id(record)], in_label, strict=True) if included)
        lines[plain(", ".join(parts))].append(record)
    figure, (ours, paper) = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    for label, rows in lines.items():
        rows.sort(key=lambda r: r.block_size)
        medians = [r.fps or 0.0 for r in rows]
        (line,) = ours.plot([r.block_size for r in rows], medians, marker="o", label=label)
        for r in rows:
            fps = [r.frames * r.batch / (ns / 1e9) for ns in r.total_ns]
            ours.plot([r.block_size] * len(fps), fps, ".", color=line.get_color(), alpha=0.4)
    machines = "; ".join(dict.fromkeys(r.gpu if r.device != "cpu" and r.gpu else r.machine for r in records))
    ours.set_title(f"{plain(caption(records))}\n{plain(machines)}", fontsize=8, wrap=True)
    ours.legend()
    paper.plot(list(PAPER_FPS), list(PAPER_FPS.values()), marker="o", color="grey", label="paper, authors' loop")
    paper.set_title("the paper's Fig. 7, from another machine and model\n(700M parameters, one A100)", fontsize=9)
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
    """Draw clips one below the other into the image file `path`.

    Args:
        strips: the clips, uint8 [F,3,H,W], by their labels.
        given: the number of given frames at the start of each clip, after which a red line is drawn; 0 for none.
        path: the image file.
    """
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
    title = f"Left of the red line are the {given} given frames, right of it the predicted frames of one clip"
    figure.suptitle(title if given else "One generated clip per row", fontsize=9)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)
