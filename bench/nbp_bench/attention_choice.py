"""Which of torch's attention kernels a session uses: those that take a mask are timed, and the fastest is kept.

Torch's own choice is not used: since 2.11 it is cuDNN's kernel on a Hopper GPU, which raises an error for some masks
that the other kernels accept.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Generic, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nbp_bench.device import broken, spans
from nbp_engines.errors import EngineError

MASKED_ATTENTION = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
TRIALS = 20  # timed steps of each kernel
Step = TypeVar("Step", bound=Callable[[], Any])


@dataclass(frozen=True)
class AttentionChoice(Generic[Step]):
    """The fastest attention kernel.

    Attributes:
        kind: the kernel.
        step: the computation that was timed with it.
        note: the times of all kernels, and why others were refused.
    """

    kind: SDPBackend
    step: Step
    note: str


def fastest_attention(prepare: Callable[[], Step], device: torch.device) -> AttentionChoice[Step]:
    """Time a computation with every attention kernel that takes a mask.

    Args:
        prepare: called once for each kernel, while torch may use that one alone; returns the computation to time.
        device: the device that the computation uses.

    Raises:
        EngineError: no kernel runs the computation.
        RuntimeError: CUDA failed in a way that ends its use in this process.
    """
    steps: dict[SDPBackend, tuple[float, Step]] = {}
    notes = []
    for kind in MASKED_ATTENTION:
        try:
            with sdpa_kernel(kind), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # in them torch tells why it has no such kernel, before it raises
                step = prepare()
                times = spans(device, lambda _, step=step: step(), TRIALS)  # type: ignore[misc]
        except RuntimeError as error:
            if broken():  # every other kernel would fail with the same error
                raise
            notes.append(f"{kind.name} {type(error).__name__}: {error}".splitlines()[0])
            continue
        steps[kind] = (median(times), step)
        notes.append(f"{kind.name} {median(times) / 1e6:.3f} ms")
    note = ", ".join(notes)
    if not steps:
        raise EngineError(f"no attention kernel runs the step: {note}")
    kind = min(steps, key=lambda kind: steps[kind][0])
    return AttentionChoice(kind, steps[kind][1], f"{kind.name} attention: {note}")
