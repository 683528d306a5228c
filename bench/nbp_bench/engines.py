"""The PyTorch engines that exported ones are compared with, behind the same Session protocol.

Shape legend: B batch, L tokens in a block, P condition tokens, T tokens in the call, N heads, D head dim, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from nbp_engines import sampling
from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec
from nbp_reference import sampling as reference_sampling
from nbp_reference.config import Latent
from nbp_reference.model import NextBlockTransformer, block_mask, tensor_scatter_
from nbp_reference.tokenizer import VideoTokenizer


class _TorchSession:
    """What the two PyTorch engines share: the tokenizer and the life cycle."""

    def __init__(self, spec: SystemSpec, generator: NextBlockTransformer, tokenizer: VideoTokenizer | None) -> None:
        self.spec = spec
        self.generator = generator.eval()
        self.tokenizer = tokenizer

    def _eyes(self) -> VideoTokenizer:
        if self.tokenizer is None:
            raise EngineError("the checkpoint has no tokenizer: give --tokenizer FILE")
        return self.tokenizer

    @torch.inference_mode()
    def encode(self, video: np.ndarray) -> np.ndarray:
        """Tokens int64 [B,P] of the given frames float32 [B,3,F,H,W]."""
        return self._eyes().encode(torch.from_numpy(video)).numpy()

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Video float32 [B,3,F,H,W] of tokens [B,T·H·W]."""
        return self._eyes().decode(torch.from_numpy(tokens), Latent(*self.spec.latent)).numpy()

    def close(self) -> None:
        """Nothing to give back before the process ends."""

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class ReferenceSession(_TorchSession):
    """Eager PyTorch as one would write it well: caches allocated once, a block sampled in one go."""

    def __init__(self, spec: SystemSpec, generator: NextBlockTransformer, tokenizer: VideoTokenizer | None) -> None:
        super().__init__(spec, generator, tokenizer)
        self.k_caches, self.v_caches = self.generator.empty_caches(spec.batch)

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [B,L,V] after the condition [B,P]."""
        return self.step(tokens, np.zeros(self.spec.batch, np.int64))

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> np.ndarray:
        """Logits [B,L,V] after the block [B,L] at cache_pos [B]."""
        logits, _, _ = self.generator.block_step(
            torch.from_numpy(tokens), torch.from_numpy(cache_pos), self.k_caches, self.v_caches, tensor_scatter_
        )
        return logits.numpy()

    def sample(self, logits: np.ndarray, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,L], all positions at once, by the same numpy code as the exported engines."""
        return sampling.sample(logits, uniforms, settings)


class NaiveSession(_TorchSession):
    """The authors' way: caches that grow by concatenation, and a Python loop over the block with a sort a token."""

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [B,L,V] after the condition [B,P]; the caches start over."""
        self.past: list[tuple[Tensor, Tensor]] = []
        return self.step(tokens, np.zeros(self.spec.batch, np.int64))

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> np.ndarray:
        """Logits [B,L,V] after the block [B,L], which goes behind what is cached."""
        model, start = self.generator, int(cache_pos[0])
        query_BT = torch.arange(start, start + tokens.shape[1])[None]
        # In a step every cached token is visible; only the prefill needs the mask.
        mask = block_mask(query_BT, tokens.shape[1], model.config) if start == 0 else None
        x_BTC = model.tok_emb(torch.from_numpy(tokens)) + model.pos_emb[:, start : start + tokens.shape[1]]
        past = []
        for i, layer in enumerate(cast(Sequence[Any], model.blocks)):
            q, k, v = layer.attn.qkv(layer.ln1(x_BTC))
            if start:
                k, v = torch.cat([self.past[i][0], k], 2), torch.cat([self.past[i][1], v], 2)
            past.append((k, v))
            x_BTC = x_BTC + layer.attn.attend(q, k, v, mask)
            x_BTC = x_BTC + layer.mlp(layer.ln2(x_BTC))
        self.past = past
        return cast(Tensor, model.head(model.ln_f(x_BTC)))[:, -model.L :].numpy()

    def sample(self, logits: np.ndarray, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,L], one position after the other."""
        pairs = zip(torch.from_numpy(logits).unbind(1), torch.from_numpy(uniforms).unbind(1), strict=True)
        how = (settings.temperature, settings.top_k, settings.top_p)
        return torch.stack([reference_sampling.sample(row, u, *how) for row, u in pairs], 1).numpy()
