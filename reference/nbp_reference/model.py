"""The generator: a pre-LayerNorm transformer that predicts the next block of video tokens.

Shape legend: B batch, T tokens in the call, L tokens in a block, S cache slots, N heads, D head dim,
C width = N·D, V vocabulary. Source: arXiv 2502.07737, App. A.2, and the authors' published checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbp_reference.config import ModelConfig

CacheWrite = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensor_scatter_(cache_BNSD: Tensor, update_BNTD: Tensor, cache_pos_B: Tensor) -> Tensor:
    """Write the update at slots cache_pos .. cache_pos+T-1 of each row, in place; returns the cache."""
    slots_BT = cache_pos_B[:, None] + torch.arange(update_BNTD.shape[2], device=update_BNTD.device)
    return cache_BNSD.scatter_(2, slots_BT[:, None, :, None].expand_as(update_BNTD), update_BNTD)


@torch.library.custom_op("nbp::tensor_scatter", mutates_args=())
def tensor_scatter(cache: Tensor, update: Tensor, cache_pos: Tensor) -> Tensor:
    """The same as a pure function, and one node in a traced graph: ONNX TensorScatter (axis 2, linear).

    A custom operator because the exporter turns every indexed write into ScatterND and full-cache transposes.
    """
    return tensor_scatter_(cache.clone(), update, cache_pos)


@tensor_scatter.register_fake
def _(cache: Tensor, update: Tensor, cache_pos: Tensor) -> Tensor:  # noqa: ARG001 - the operator's signature
    return torch.empty_like(cache)


def order_of_sight(position: Tensor, config: ModelConfig) -> Tensor:
    """Where each position stands in the order of generation: a token sees all that stand no later than itself.

    Frame prediction counts blocks, ⌊position/L⌋. A hybrid has all of its text first, then L single tokens
    (begin-of-video and the first L-1 of the video), then blocks again. Source: the authors' attention masks.
    """
    L = config.block.size
    if not config.text:
        return position // L
    after_text = (position - config.text.tokens + 1).clamp(min=0)
    return after_text.clamp(max=L) + (after_text - 1).clamp(min=0) // L


def block_mask(query_BT: Tensor, slots: int, config: ModelConfig) -> Tensor:
    """Which cache slots each query position may see: bool [B,1,T,S].

    Bidirectional inside a block, causal between blocks; slots after the query's block are stale or unused.
    """
    order_S = order_of_sight(torch.arange(slots, device=query_BT.device), config)
    # A look-up, because in a graph the order is a constant and this one node, where its formula would be a dozen.
    return (order_S <= F.embedding(query_BT, order_S[:, None]))[:, None]


class Attention(nn.Module):
    """Multi-head attention with separate, biased q, k, v and output projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def qkv(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projections split into heads: three [B,N,T,D]."""
        heads = (layer(x_BTC).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        q, k, v = (x.transpose(1, 2) for x in heads)
        return q, k, v

    def attend(self, q_BNTD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over the slots that the mask shows, all if None, merged and projected: [B,T,C]."""
        out_BNTD = F.scaled_dot_product_attention(q_BNTD, k_BNSD, v_BNSD, attn_mask=mask)
        return cast(Tensor, self.proj(out_BNTD.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """One pre-LayerNorm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class NextBlockTransformer(nn.Module):
    """The generator. Parameter names are the authors' without their `transformer.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab, config.width)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.positions, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)

    def reset(self, seed: int) -> None:
        """Random weights, all from one seed."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            draw(name, p, rng)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B,T,V] of a whole sequence, as `training_pair` makes it, under the block mask."""
        query_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        mask = block_mask(query_1T, tokens_BT.shape[1], self.config)
        x_BTC = self.tok_emb(tokens_BT) + self.pos_emb[:, : tokens_BT.shape[1]]
        for layer in cast(Sequence[Any], self.blocks):
            x_BTC = x_BTC + layer.attn.attend(*layer.attn.qkv(layer.ln1(x_BTC)), mask)
            x_BTC = x_BTC + layer.mlp(layer.ln2(x_BTC))
        return cast(Tensor, self.head(self.ln_f(x_BTC)))

    def block_step(
        self,
        tokens_BT: Tensor,
        cache_pos_B: Tensor,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        write: CacheWrite = tensor_scatter,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Append tokens to the caches and predict those that follow.

        Args:
            tokens_BT: int64, a block in a step, the condition in a prefill; a hybrid's first L after its text singly.
            cache_pos_B: int64, tokens already in the cache.
            k_caches: one [B,N,S,D] a layer; slots from cache_pos on may hold anything finite.
            v_caches: likewise.
            write: how a cache takes new rows; pure by default, `tensor_scatter_` where the caller owns the buffers.

        Returns:
            Logits [B,L,V] of the last L tokens, or of all if there are fewer, and the caches with T more rows.
        """
        query_BT = cache_pos_B[:, None] + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        mask = block_mask(query_BT, k_caches[0].shape[2], self.config)
        x_BTC = self.tok_emb(tokens_BT) + F.embedding(query_BT, self.pos_emb.squeeze(0))
        k_out, v_out = [], []
        for layer, k_cache, v_cache in zip(cast(Sequence[Any], self.blocks), k_caches, v_caches, strict=True):
            q, k, v = layer.attn.qkv(layer.ln1(x_BTC))
            k_out.append(write(k_cache, k, cache_pos_B))
            v_out.append(write(v_cache, v, cache_pos_B))
            x_BTC = x_BTC + layer.attn.attend(q, k_out[-1], v_out[-1], mask)
            x_BTC = x_BTC + layer.mlp(layer.ln2(x_BTC))
        return self.head(self.ln_f(x_BTC[:, -self.L :])), k_out, v_out

    @property
    def L(self) -> int:  # noqa: N802 - the paper's letter
        """Tokens in a block."""
        return self.config.block.size

    def empty_caches(self, batch: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        """Zeroed key and value caches, [B,N,S,D] a layer, S the config's capacity."""
        shape = (batch, self.config.heads, self.config.capacity, self.config.head_dim)
        k, v = ([self.pos_emb.new_zeros(shape) for _ in self.blocks] for _ in "kv")
        return k, v


def draw(name: str, parameter: nn.Parameter, rng: torch.Generator) -> None:
    """Fill a generator's parameter: normal with deviation 0.02 as GPT-2 has them; zero biases, unit norms."""
    if parameter.ndim > 1:
        nn.init.normal_(parameter, std=0.02, generator=rng)
    else:
        nn.init.constant_(parameter, float(name.endswith("weight")))


def training_pair(tokens_BT: Tensor, config: ModelConfig, text_BP: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the model reads and what the last of its logits should predict.

    Frame prediction reads z[:-L] for z[L:]. A hybrid reads its text, begin-of-video, z1..zL, the middle-of-video
    tokens and z(L+1).. but for the last block; from begin-of-video on its logits are those of z1, z2, ..

    Args:
        tokens_BT: tokens of whole clips from the video tokenizer, int64, in block order.
        config: of the model.
        text_BP: a hybrid's text tokens, int64.

    Returns:
        Token ids [B,S], and [B,T-L] or a hybrid's [B,T].
    """
    L = config.block.size
    if text_BP is None or not config.text:
        return tokens_BT[:, :-L], tokens_BT[:, L:]
    z_BT = tokens_BT + config.code_shift
    special_BL = torch.arange(L, device=tokens_BT.device).expand(len(tokens_BT), L)
    parts = (text_BP + L, special_BL[:, :1], z_BT[:, :L], special_BL[:, 1:], z_BT[:, L:-L])
    return torch.cat(parts, 1)[:, : config.capacity], z_BT
