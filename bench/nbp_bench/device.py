"""What only a device has: its clock, its bandwidth, and the bytes that a block step has to move over it."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from time import perf_counter_ns

import torch

from nbp_engines.spec import BYTES, SystemSpec

COPIES = 10
COPIED_BYTES = {"cpu": 2**26, "cuda": 2**32}  # a GPU's caches must not hold it


def spans(
    device: torch.device, call: Callable[[int], object], count: int, stream: "torch.cuda.Stream | None" = None
) -> list[int]:
    """Nanoseconds of each of `count` calls back to back: by events of the stream they work on, on a CPU by the clock.

    The device works on while the host prepares the next call; where it has to wait for the host, that counts too.
    """
    if device.type != "cuda":
        marks = [perf_counter_ns()]
        for i in range(count):
            call(i)
            marks.append(perf_counter_ns())
        return [after - before for before, after in pairwise(marks)]
    stream = stream or torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record(stream)
    for i, event in enumerate(events[1:]):
        call(i)
        event.record(stream)
    torch.cuda.synchronize(device)
    return [round(before.elapsed_time(after) * 1e6) for before, after in pairwise(events)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, those read and those written, of a copy that no cache can hold: the median of several."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = spans(device, lambda _: target.copy_(source), COPIES)
    return 2 * source.nbytes / (median(times) / 1e9)


def peak_bandwidth(device: torch.device) -> float | None:
    """Bytes a second of the memory's clock, two transfers a cycle, and bus; None where torch does not tell."""
    if device.type != "cuda":
        return None
    known = torch.cuda.get_device_properties(device)
    kilohertz, bits = getattr(known, "memory_clock_rate", 0), getattr(known, "memory_bus_width", 0)
    return 2 * kilohertz * 1e3 * bits / 8 or None


def broken() -> bool:
    """Whether CUDA has failed in this process for good: after some errors it answers every call with the same one."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def step_bytes(spec: SystemSpec, positions: Sequence[int]) -> int:
    """What a step has to read, in the mean over its cache positions: weights once, and every valid row of the caches.

    Rows that are not written yet count for nothing, though an engine may read the caches' whole capacity. Of the two
    embeddings a step reads a row per token. A layer has 12·C² weights and 13·C biases and norms.
    """
    C, tokens = spec.heads * spec.head_dim, spec.batch * spec.block_size
    weights = spec.layers * (12 * C * C + 13 * C) + 2 * C + spec.vocab * C + 2 * tokens * C
    rows = sum(positions) / len(positions) + spec.block_size
    return BYTES[spec.dtype] * round(weights + 2 * spec.layers * C * spec.batch * rows)
