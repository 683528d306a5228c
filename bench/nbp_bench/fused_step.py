"""The reference's block step for a session that owns its caches: one product for q, k and v, one mask for all layers.

Shape legend: B batch, L tokens in a block, T tokens in the call, N heads, S cache slots, D head dim, C width = N·D,
V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nbp_reference.model import Attention, NextBlockTransformer, block_mask

MASK_ALIGNMENT = 16  # elements; torch's efficient attention copies a mask whose rows start at other multiples


def fused_projection(attention: Attention) -> tuple[Tensor, Tensor]:
    """One weight [3C,C] and one bias [3C] of the query, key and value projections.

    The projections keep their parameters, as views of these tensors, so that both forms use the same memory. The
    parameters are moved there once; a further call for the same module returns the same memory.
    """
    layers = (attention.query, attention.key, attention.value)
    return _joined([layer.weight for layer in layers]), _joined([layer.bias for layer in layers])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parameters, all of one shape, as one tensor in whose memory they lie one after the other."""
    first = parts[0].data
    if all(
        part.is_contiguous()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + i * first.numel()
        for i, part in enumerate(parts)
    ):
        return first.as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride())
    whole = torch.cat([part.data for part in parts])
    for part, view in zip(parts, whole.chunk(len(parts)), strict=True):
        part.data = view
    return whole


def additive_mask_rows(model: NextBlockTransformer) -> Tensor:
    """The mask that attention adds for each query position: 0 where a slot is visible, else -inf.

    [S,S'] in the model's dtype, where S' is the next multiple of MASK_ALIGNMENT; the columns from S on are padding.
    """
    slots, device = model.config.capacity, model.pos_emb.device
    visible_SS = block_mask(torch.arange(slots, device=device)[None], slots, model.config)[0, 0]
    padded = -(-slots // MASK_ALIGNMENT) * MASK_ALIGNMENT
    rows = model.pos_emb.new_full((slots, padded), -torch.inf)
    rows[:, :slots].masked_fill_(visible_SS, 0.0)
    return rows


class FusedBlockStep:
    """`NextBlockTransformer.block_step` on caches that are allocated once and written in place.

    Attributes:
        k_caches, v_caches: [B,N,S,D] for each layer.
    """

    def __init__(self, model: NextBlockTransformer, batch: int) -> None:
        self._model = model
        self._block_size, self._heads, self._head_dim = model.L, model.config.heads, model.config.head_dim
        self._projections = [fused_projection(layer.attn) for layer in cast(Sequence[Any], model.blocks)]
        with torch.no_grad():
            self._mask_rows = additive_mask_rows(model)
            self._positions_SC = model.pos_emb.squeeze(0)
            self._offsets = torch.arange(model.config.capacity, device=model.pos_emb.device)
            self.k_caches, self.v_caches = model.empty_caches(batch)

    def __call__(self, tokens_BT: Tensor, cache_pos_B: Tensor) -> Tensor:
        """Append tokens to the caches at cache_pos and predict those that follow.

        Returns logits [B,L,V] of the last L tokens, or of all if there are fewer.
        """
        model, heads = self._model, self._heads
        slots_BT = cache_pos_B[:, None] + self._offsets[: tokens_BT.shape[1]]
        mask_B1TS = F.embedding(slots_BT, self._mask_rows)[:, None, :, : self.k_caches[0].shape[2]]
        x_BTC = model.tok_emb(tokens_BT) + F.embedding(slots_BT, self._positions_SC)
        index_BNTD = slots_BT[:, None, :, None].expand(-1, heads, -1, self._head_dim)
        for i, layer in enumerate(cast(Sequence[Any], model.blocks)):
            qkv_BTC = F.linear(layer.ln1(x_BTC), *self._projections[i])
            q_BNTD, k_BNTD, v_BNTD = (part.transpose(1, 2) for part in qkv_BTC.unflatten(-1, (3, heads, -1)).unbind(2))
            write_(self.k_caches[i], k_BNTD, index_BNTD)
            write_(self.v_caches[i], v_BNTD, index_BNTD)
            x_BTC = x_BTC + layer.attn.attend(q_BNTD, self.k_caches[i], self.v_caches[i], mask_B1TS)
            x_BTC = x_BTC + layer.mlp(layer.ln2(x_BTC))
        return cast(Tensor, model.head(model.ln_f(x_BTC[:, -self._block_size :])))


def write_(cache_BNSD: Tensor, update_BNTD: Tensor, index_BNTD: Tensor) -> None:
    """Write the update to the cache at the slots of the index, in place."""
    if torch.compiler.is_compiling():  # of a scatter, torch.compile makes two copies; of an indexed write, none
        rows_B1 = torch.arange(len(cache_BNSD), device=cache_BNSD.device)[:, None]
        cache_BNSD[rows_B1, :, index_BNTD[:, 0, :, 0]] = update_BNTD.transpose(1, 2)
    else:
        cache_BNSD.scatter_(2, index_BNTD, update_BNTD)
