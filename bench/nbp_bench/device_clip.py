"""A clip that is generated on the device: its tokens, its noise and its position never leave until it is complete.

Every operation works on tensors at fixed addresses and waits for nothing, so that a CUDA graph can hold any of them.

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
        predicted_BN: tokens so far, int64, in block order.
    """

    def __init__(self, spec: SystemSpec, device: torch.device) -> None:
        """Allocate the state for a session's clips."""
        batch, count = spec.batch, spec.blocks * spec.block_size
        self.predicted_BN = torch.zeros(batch, count, dtype=torch.int64, device=device)
        self._noise_BN = torch.zeros(batch, count, dtype=torch.float64, device=device)
        self._offsets = torch.arange(spec.block_size, device=device)
        self._drawn_1 = torch.zeros(1, dtype=torch.int64, device=device)  # how many of the N tokens are drawn
        self._cache_pos_B = torch.zeros(batch, dtype=torch.int64, device=device)
        # The tokens that are read next, one tensor for each number of tokens that a call reads.
        counts = {graph.inputs[0].shape[1] for graph in spec.generator_graphs().values()}
        self._next = {n: torch.zeros(batch, n, dtype=torch.int64, device=device) for n in counts | {spec.block_size}}

    def begin(self, condition: np.ndarray, noise: np.ndarray) -> None:
        """Start over with a condition int64 [B,P], to be read next, and noise float64 [blocks,B,L]."""
        self.rewind()
        self._next[condition.shape[1]].copy_(torch.from_numpy(condition))
        self._noise_BN.copy_(torch.from_numpy(noise).transpose(0, 1).flatten(1))

    def rewind(self) -> None:
        """Go back to the first position; the tokens and the noise stay as they are."""
        self._drawn_1.zero_()
        self._cache_pos_B.zero_()

    def put_begin_of_video(self) -> None:
        """Make begin-of-video, which is id 0, the one token that is read next."""
        self._next[1].zero_()

    def put_first_block(self) -> None:
        """Make the first block that a hybrid reads the next one: its last token, then its middle-of-video tokens."""
        first_BL = self._next[len(self._offsets)]
        first_BL[:, 1:] = self._offsets[1:]
        first_BL[:, :1] = self.predicted_BN[:, first_BL.shape[1] - 1 : first_BL.shape[1]]

    def read(self, step: Callable[[Tensor, Tensor], Tensor], count: int) -> Tensor:
        """Logits of a step, called with the next `count` tokens [B,T] and their cache positions [B]."""
        logits = step(self._next[count], self._cache_pos_B)
        self._cache_pos_B += count
        return logits

    def draw(self, sample: Callable[[Tensor, Tensor], Tensor], logits_BTV: Tensor) -> None:
        """Append the tokens [B,T] that `sample` draws from the logits and their noise [B,T]; they are read next."""
        places_T = self._drawn_1 + self._offsets[: logits_BTV.shape[1]]
        tokens_BT = sample(logits_BTV, self._noise_BN.index_select(1, places_T))
        self.predicted_BN.index_copy_(1, places_T, tokens_BT)
        self._next[logits_BTV.shape[1]].copy_(tokens_BT)
        self._drawn_1 += logits_BTV.shape[1]
