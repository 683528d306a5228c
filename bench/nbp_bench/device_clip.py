"""A clip that stays on the device while it is generated: its tokens, its noise and its position.

Every operation works on tensors at fixed addresses and does not wait for the device, so that a CUDA graph can capture
it.

Shape legend: B batch, L tokens in a block, P condition tokens, T tokens in the call, N predicted tokens, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nbp_engines.spec import SystemSpec


class DeviceClip:
    """The state of the generation loop as tensors on the device.

    Attributes:
        predicted_BN: the predicted tokens so far, int64, in block order.
    """

    def __init__(self, spec: SystemSpec, device: torch.device) -> None:
        """Allocate the tensors, which all clips of a session use."""
        batch, count = spec.batch, spec.blocks * spec.block_size
        self.predicted_BN = torch.zeros(batch, count, dtype=torch.int64, device=device)
        self._noise_BN = torch.zeros(batch, count, dtype=torch.float64, device=device)
        self._offsets = torch.arange(spec.block_size, device=device)
        self._drawn_count_1 = torch.zeros(1, dtype=torch.int64, device=device)  # number of drawn tokens
        self._cache_pos_B = torch.zeros(batch, dtype=torch.int64, device=device)
        # The input tokens of the next step: one tensor for each number of tokens that a step can take.
        counts = {graph.inputs[0].shape[1] for graph in spec.generator_graphs().values()}
        self._inputs = {n: torch.zeros(batch, n, dtype=torch.int64, device=device) for n in counts | {spec.block_size}}

    def begin(self, condition: np.ndarray, noise: np.ndarray) -> None:
        """Start a new clip. Its first step takes the condition int64 [B,P]; its noise is float64 [blocks,B,L]."""
        self.rewind()
        self._inputs[condition.shape[1]].copy_(torch.from_numpy(condition))
        self._noise_BN.copy_(torch.from_numpy(noise).transpose(0, 1).flatten(1))

    def rewind(self) -> None:
        """Go back to the first position, and leave the tokens and the noise unchanged."""
        self._drawn_count_1.zero_()
        self._cache_pos_B.zero_()

    def queue_begin_of_video(self) -> None:
        """Make the begin-of-video token, whose id is 0, the only input of the next step."""
        self._inputs[1].zero_()

    def queue_first_block(self) -> None:
        """Make the first input of a whole block of a hybrid model the input of the next step.

        It consists of the last token that was predicted one by one, and of the L-1 middle-of-video tokens.
        """
        first_BL = self._inputs[len(self._offsets)]
        first_BL[:, 1:] = self._offsets[1:]
        first_BL[:, :1] = self.predicted_BN[:, first_BL.shape[1] - 1 : first_BL.shape[1]]

    def run_step(self, step: Callable[[Tensor, Tensor], Tensor], count: int) -> Tensor:
        """Call `step` with the next `count` tokens [B,T] and the cache position [B] of the first; return its logits."""
        logits = step(self._inputs[count], self._cache_pos_B)
        self._cache_pos_B += count
        return logits

    def draw(self, sample: Callable[[Tensor, Tensor], Tensor], logits_BTV: Tensor) -> None:
        """Append the tokens [B,T] that `sample` draws from the logits with their noise [B,T].

        They also become the input of the next step.
        """
        indices_T = self._drawn_count_1 + self._offsets[: logits_BTV.shape[1]]
        tokens_BT = sample(logits_BTV, self._noise_BN.index_select(1, indices_T))
        self.predicted_BN.index_copy_(1, indices_T, tokens_BT)
        self._inputs[logits_BTV.shape[1]].copy_(tokens_BT)
        self._drawn_count_1 += logits_BTV.shape[1]
