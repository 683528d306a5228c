"""The choice of torch's attention kernel for a session: the kernels that accept a mask are timed, the fastest is used.

Torch's own choice is not used. Since version 2.11 it is cuDNN's kernel on a Hopper GPU, and that kernel raises an error
for some masks that the other kernels accept.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Generic, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nbp_bench.device import cuda_failed, time_calls
from nbp_engines.errors import EngineError

MASKED_ATTENTION = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
TRIALS = 20  # timed steps of each kernel
Step = TypeVar("Step", bound=Callable[[], Any])


@dataclass(frozen=True)
class AttentionChoice(Generic[Step]):
    """The fastest attention kernel.

    Attributes:
        kernel: the kernel.
        step: the computation that was timed with it.
        note: the times of the kernels, and the errors of those that failed.
    """

    kernel: SDPBackend
    step: Step
    note: str


def fastest_attention(prepare: Callable[[], Step], device: torch.device) -> AttentionChoice[Step]:
    """Time a computation with every attention kernel that accepts a mask, and return the fastest.

    Args:
        prepare: returns the computation to time. It is called once per kernel, while torch may use only that kernel.
        device: the device that the computation uses.

    Raises:
        EngineError: no kernel runs the computation.
        RuntimeError: CUDA has failed in this process for good.
    """
    steps: dict[SDPBackend, tuple[float, Step]] = {}
    notes = []
    for kernel in MASKED_ATTENTION:
        try:
            with sdpa_kernel(kernel), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns why a kernel is unavailable, then raises an error
                step = prepare()
                times = time_calls(device, lambda _, step=step: step(), TRIALS)  # type: ignore[misc]
        except RuntimeError as error:
            if cuda_failed():  # every other kernel would fail with the same error
                raise
            notes.append(f"{kernel.name} {type(error).__name__}: {error}".splitlines()[0])
            continue
        steps[kernel] = (median(times), step)
        notes.append(f"{kernel.name} {median(times) / 1e6:.3f} ms")
    note = ", ".join(notes)
    if not steps:
        raise EngineError(f"no attention kernel can run the step: {note}")
    fastest = min(steps, key=lambda kernel: steps[kernel][0])
    return AttentionChoice(fastest, steps[fastest][1], f"{fastest.name} attention: {note}")
