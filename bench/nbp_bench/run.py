"""From parsed options to a finished comparison: clips, sweep, records, table, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nbp_bench.sweep import Plan, sweep
from nbp_engines.errors import UsageError
from nbp_export.sources import Request, Source, find
from nbp_reference import clips as real_clips
from nbp_reports import markdown, record, table

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_CLIP = real_clips.DEFAULT_CLIP


def conditions(source: Source, video: Path | None, count: int) -> tuple[list[np.ndarray], str]:
    """Up to `count` runs of condition frames, uint8 [F,3,H,W], and the video's name.

    From a named file, its beginning on; from the bundled clip, the part that no training has seen.
    """
    assert source.tokenizer is not None  # checked by the caller
    config, latent = source.tokenizer.config, source.generator.config.latent
    side = latent.h * config.compression[1]
    frames, given = config.frames(latent.t), config.frames(source.generator.config.condition_latents)
    path = video or real_clips.find(real_clips.DEFAULT_CLIP)
    decoded = real_clips.centre(real_clips.read(path, side), side)
    part = decoded if video else real_clips.split(decoded)[1]
    if len(part) < given:
        raise UsageError(f"{path} has {len(part)} frames, the model is given {given}")
    stride = max(1, (len(part) - frames) // max(1, count - 1)) if len(part) > frames else len(part)
    name = path.name if video else f"{path.name}, held-out part, of {real_clips.CLIPS[real_clips.DEFAULT_CLIP].package}"
    return real_clips.windows(part, given, stride)[:count], name


def run(
    console: "Console",
    requests: Sequence[Request],
    engines: Sequence[str],
    video: Path | None,
    clips: int,
    batch: int,
    threads: int | None,
    seed: int,
    out: Path,
) -> None:
    """Measure, print the table, and leave `records.jsonl`, `report.md` and its figure in `out`."""
    first = find(requests[0])
    if first.tokenizer is None:
        raise UsageError(f"{first.name} has no tokenizer, so no video can be predicted: give --tokenizer FILE")
    windows, name = conditions(first, video, clips)
    del first
    plan = Plan(requests, engines, windows, name, clips, batch, threads, seed, out)
    with console.status("begin") as status:

        def report(stage: str) -> None:
            status.update(stage)
            if not console.is_terminal:
                console.print(f"  {stage}")

        measured = sweep(plan, report)
    records = [m.record for m in measured]
    out.mkdir(parents=True, exist_ok=True)
    record.write(records, out / "records.jsonl")
    for title, columns in table.TABLES.items():
        console.print(table.terminal(f"{title}: {records[0].model} on {name}", columns, records))
    console.print(f"raw samples: {out / 'records.jsonl'}   report: {markdown.report(records, out)}")
