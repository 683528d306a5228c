"""Times by a device's clock, its memory bandwidth, and the bytes that a step has to read from its memory."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from time import perf_counter_ns

import torch

from nbp_engines.spec import BYTES, SystemSpec

COPIES = 10
COPIED_BYTES = {"cpu": 2**26, "cuda": 2**32}  # more than a GPU's caches hold


def time_calls(
    device: torch.device, call: Callable[[int], object], count: int, stream: "torch.cuda.Stream | None" = None
) -> list[int]:
    """Time `count` calls that run back to back, and return the nanoseconds of each.

    On a GPU the times come from CUDA events on `stream`, or on torch's current stream if it is None; on a CPU they come
    from the host's clock. The host prepares the next call while the GPU works. If the GPU has to wait for the host, the
    wait is part of the time.

    Args:
        device: the device that the calls use.
        call: called with 0, 1, … `count` - 1.
        count: the number of calls.
        stream: the stream that the calls enqueue on.
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
    """Return the bandwidth of a copy that is too large for the caches, in bytes per second.

    Bytes that are read and bytes that are written both count. The result is the median of several copies.
    """
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_calls(device, lambda _: target.copy_(source), COPIES)
    return 2 * source.nbytes / (median(times) / 1e9)


def peak_bandwidth(device: torch.device) -> float | None:
    """Return a GPU's peak memory bandwidth in bytes per second: two transfers per clock cycle times the bus width.

    Returns None on a CPU, and if torch does not report the clock rate and the bus width.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    kilohertz, bits = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    return 2 * kilohertz * 1e3 * bits / 8 or None


def cuda_failed() -> bool:
    """Return whether CUDA has failed in this process for good: after some errors every later call fails too."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def step_bytes(spec: SystemSpec, positions: Sequence[int]) -> int:
    """Return the bytes that a step has to read, averaged over the given cache positions.

    They are the weights, once, and the valid rows of the caches. Rows that are not written yet do not count, although
    an engine may read the whole capacity of the caches. A step reads one row per token of each of the two embeddings.
    A layer has 12·C² weights, and 13·C values in biases and norms, where C is the width.
    """
    C, tokens = spec.heads * spec.head_dim, spec.batch * spec.block_size
    weights = spec.layers * (12 * C * C + 13 * C) + 2 * C + spec.vocab * C + 2 * tokens * C
    rows = sum(positions) / len(positions) + spec.block_size
    return BYTES[spec.dtype] * round(weights + 2 * spec.layers * C * spec.batch * rows)
