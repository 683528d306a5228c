"""The generator: a pre-LayerNorm transformer that predicts the next block of video tokens.

Shape legend: B batch, T tokens in the call, L tokens in a block, P tokens of the condition, S cache slots, N heads,
D head dim, C width = N·D, V vocabulary. Source: arXiv 2502.07737, App. A.2, and the authors' published checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbp_reference.config import ModelConfig

CacheWrite = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensor_scatter_(cache_BNSD: Tensor, update_BNTD: Tensor, cache_pos_B: Tensor) -> Tensor:
    """Write the update into slots cache_pos .. cache_pos+T-1 of each row, in place, and return the cache."""
    slots_BT = cache_pos_B[:, None] + torch.arange(update_BNTD.shape[2], device=update_BNTD.device)
    return cache_BNSD.scatter_(2, slots_BT[:, None, :, None].expand_as(update_BNTD), update_BNTD)


@torch.library.custom_op("nbp::tensor_scatter", mutates_args=())
def tensor_scatter(cache: Tensor, update: Tensor, cache_pos: Tensor) -> Tensor:
    """Return a copy of the cache with the update written as by `tensor_scatter_`.

    It is a custom operator so that a traced graph has one node for it, ONNX TensorScatter (axis 2, linear). An
    indexed write would become a ScatterND between two transpositions of the whole cache.
    """
    return tensor_scatter_(cache.clone(), update, cache_pos)


@tensor_scatter.register_fake
def _(cache: Tensor, update: Tensor, cache_pos: Tensor) -> Tensor:  # noqa: ARG001 - the operator's signature
    return torch.empty_like(cache)


def visibility_order(position: Tensor, config: ModelConfig) -> Tensor:
    """Return the rank of each position in the order of generation, int64 in the shape of `position`.

    A token attends to all tokens whose rank is not higher than its own. In frame prediction the rank is the block's
    number, ⌊position/L⌋. In a hybrid, all text tokens have rank 0, the next L tokens (begin-of-video and the first L-1
    of the video) have a rank each, and every later block has one rank. Source: the authors' attention masks.
    """
    L = config.block.size
    if not config.text:
        return position // L
    after_text = (position - config.text.tokens + 1).clamp(min=0)
    return after_text.clamp(max=L) + (after_text - 1).clamp(min=0) // L


def block_mask(query_BT: Tensor, slots: int, config: ModelConfig) -> Tensor:
    """Return which cache slots each query position attends to: bool [B,1,T,S].

    Attention is bidirectional inside a block and causal between blocks. Slots after the query's block are masked: they
    are unused or hold values of an earlier clip.
    """
    order_S = visibility_order(torch.arange(slots, device=query_BT.device), config)
    # The ranks of the queries are looked up: in a graph this is one node and a constant, the formula a dozen nodes.
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
        """Return queries, keys and values, split into heads: three tensors [B,N,T,D]."""
        heads = (layer(x_BTC).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        q, k, v = (x.transpose(1, 2) for x in heads)
        return q, k, v

    def attend(self, q_BNTD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to the slots where the mask is true, or to all if it is None; returns the projected output [B,T,C]."""
        out_BNTD = F.scaled_dot_product_attention(q_BNTD, k_BNSD, v_BNSD, attn_mask=mask)
        return cast(Tensor, self.proj(out_BNTD.transpose(1, 2).flatten(2)))


class Layer(nn.Module):
    """One pre-LayerNorm transformer layer; its parameter names are the authors'."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class NextBlockTransformer(nn.Module):
    """The generator.

    Parameter names are the authors' without the prefix `transformer.`, so the layers are called `blocks`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab, config.width)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.positions, config.width))
        self.blocks = nn.ModuleList(Layer(config.width, config.heads) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)

    def reset(self, seed: int) -> None:
        """Fill all parameters with random weights that depend only on the seed."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            init_parameter(name, p, rng)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits [B,T,V] of a whole sequence under the block mask.

        `tokens_BT` are int64 token ids, as `training_pair` returns them first. The logits at a position predict the
        token that is L positions later; for the single tokens of a hybrid, the next token.
        """
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
        """Append tokens to the KV caches and return the logits of the tokens that follow.

        Args:
            tokens_BT: int64; the condition in a prefill, one block in a step. A hybrid takes the L tokens after its
                text one by one.
            cache_pos_B: int64; how many tokens the caches hold already, per row of the batch.
            k_caches: one tensor [B,N,S,D] per layer; slots from cache_pos on may hold any finite values.
            v_caches: the same for the values.
            write: writes new rows into a cache. The default returns a copy; `tensor_scatter_` writes in place.

        Returns:
            The logits [B,L,V] at the last L tokens, or at all tokens if there are fewer, and the extended caches.
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
        """The number of tokens in a block."""
        return self.config.block.size

    def empty_caches(self, batch: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        """Return key and value caches of zeros, one [B,N,S,D] per layer, where S is the config's capacity."""
        shape = (batch, self.config.heads, self.config.capacity, self.config.head_dim)
        k, v = ([self.pos_emb.new_zeros(shape) for _ in self.blocks] for _ in "kv")
        return k, v


def init_parameter(name: str, parameter: nn.Parameter, rng: torch.Generator) -> None:
    """Initialise a parameter as GPT-2 does.

    Matrices are normal with standard deviation 0.02, biases are zero, and the weights of norms are one.
    """
    if parameter.ndim > 1:
        nn.init.normal_(parameter, std=0.02, generator=rng)
    else:
        nn.init.constant_(parameter, float(name.endswith("weight")))


def training_pair(tokens_BT: Tensor, config: ModelConfig, text_BP: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the model's input and the token ids that its last logits should predict.

    In frame prediction, the input z[:-L] predicts z[L:]. A hybrid's input is its text, begin-of-video, z1..zL, the L-1
    middle-of-video tokens and z(L+1).. without the last block; from begin-of-video on, its logits predict z1, z2, …

    Args:
        tokens_BT: the video tokenizer's tokens of whole clips, int64, in block order.
        config: the model's config.
        text_BP: a hybrid's text tokens, int64.

    Returns:
        The input [B,S] and the targets: [B,T-L] for frame prediction, [B,T] for a hybrid.
    """
    L = config.block.size
    if text_BP is None or not config.text:
        return tokens_BT[:, :-L], tokens_BT[:, L:]
    z_BT = tokens_BT + config.code_shift
    special_BL = torch.arange(L, device=tokens_BT.device).expand(len(tokens_BT), L)
    parts = (text_BP + L, special_BL[:, :1], z_BT[:, :L], special_BL[:, 1:], z_BT[:, L:-L])
    return torch.cat(parts, 1)[:, : config.capacity], z_BT
