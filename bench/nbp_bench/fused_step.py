"""The reference's block step on caches that are updated in place, with fused projections and one mask for all layers.

One matrix product computes the queries, keys and values of a layer.

Shape legend: B batch, L tokens in a block, T tokens in the call, N heads, S cache slots, D head dim, C width = N·D,
V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nbp_reference.model import Attention, NextBlockTransformer, block_mask

MASK_ALIGNMENT = 16  # elements; torch's efficient attention copies a mask unless its row stride is a multiple of this


def fused_projection(attention: Attention) -> tuple[Tensor, Tensor]:
    """Return one weight [3C,C] and one bias [3C] for the query, key and value projections together.

    The projections' own parameters become views of these tensors, so that both forms use the same memory. The first
    call for a module moves the parameters; later calls return the same memory.
    """
    layers = (attention.query, attention.key, attention.value)
    return _join_parameters([layer.weight for layer in layers]), _join_parameters([layer.bias for layer in layers])


def _join_parameters(parts: Sequence[Tensor]) -> Tensor:
    """Return one tensor that holds parameters of equal shape one after the other, and make them views of it."""
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
    """Return the mask that attention adds to the scores of each query position: 0 for a visible slot, else -inf.

    The mask is [S,S'] in the model's dtype, where S' is S rounded up to a multiple of MASK_ALIGNMENT. The columns from
    S on are padding.
    """
    slots, device = model.config.capacity, model.pos_emb.device
    visible_SS = block_mask(torch.arange(slots, device=device)[None], slots, model.config)[0, 0]
    padded = -(-slots // MASK_ALIGNMENT) * MASK_ALIGNMENT
    rows = model.pos_emb.new_full((slots, padded), -torch.inf)
    rows[:, :slots].masked_fill_(visible_SS, 0.0)
    return rows


class FusedBlockStep:
    """`NextBlockTransformer.block_step` on caches that are allocated once and updated in place.

    Attributes:
        k_caches, v_caches: the caches [B,N,S,D] of each layer.
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
        """Write the tokens' keys and values to the caches from slot cache_pos on, and predict the next tokens.

        Returns logits [B,L,V] after the last L tokens, or [B,T,V] if there are fewer than L.
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
    """Write the update into the cache in place, at the slots that the index gives."""
    # torch.compile copies the cache twice for a scatter, but not for an indexed write.
    if torch.compiler.is_compiling():
        rows_B1 = torch.arange(len(cache_BNSD), device=cache_BNSD.device)[:, None]
        cache_BNSD[rows_B1, :, index_BNTD[:, 0, :, 0]] = update_BNTD.transpose(1, 2)
    else:
        cache_BNSD.scatter_(2, index_BNTD, update_BNTD)
