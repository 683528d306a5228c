"""Cache contents in which every valid slot counts, so that a graph that overlooks one of them differs visibly.

With random contents, attention averages a thousand values to almost nothing, and the model hardly depends on any of
them: half precision hides that a graph does not attend to a slot, or to half of them. Sharpened contents are needles.
Each valid slot is a needle in one layer, where its values all have one large magnitude. What attention adds to the
residual stream there comes from that layer's needles alone. In nbp-xl's last step a layer has 52 needles, and a missing
one changes what attention adds by 1/√52.

The weights of attention stay nearly equal. If attention picked single slots, it would pass over the slots that no query
picks, and it would multiply rounding errors layer after layer. With needles, half precision is as accurate as with
random contents.

How many slots show in half precision depends on the number of layers. With 24 layers of nbp-xl's width, 1000 tokens in
the vocabulary, random weights and blocks of 1 and 16 tokens, each of the 100 slots that were tried moves some element
by 5.5e-2 or more when it is hidden, half of them by more than 7.4e-2, where bf16 allows 5e-2 and fp16 1e-2. The
reference itself in bf16 is off by 1.0e-2 there and in fp16 by 1.2e-3. With the five layers of nbp-tiny, each slot that
was tried shows in fp16 but only 47% (blocks of 1) and 63% (of 16) in bf16; a hidden block of 16 moves some element by
1.3e-1. All of these are hundreds of times what fp32 allows.
Shape legend: B batch, N heads, T tokens in the call, S cache slots, D head dim, C width.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nbp_reference.model import NextBlockTransformer, block_mask, tensor_scatter

# Deviation of the scores q·k/√D. A key changes the weight of its slot by a factor of e^±0.5, so that keys count too.
# From 1 on, errors grow from layer to layer: at 24 layers of nbp-xl's width and random weights, the reference in bf16
# is off by 1.0e-2, 1.3e-2 and 2.0e-2 at deviations of 0.5, 0.7 and 1.
SCORE = 0.5
# How much larger the residual stream is after all attention layers. Each adds the same share of what is there already,
# or the needles of late layers would be lost in what early layers added. More would not show much more, and fp16
# overflows at 65504.
GROWTH = 50.0
LARGEST = 16384.0  # of a value in a cache, for the same reason


def sharpened_caches(
    generator: NextBlockTransformer, tokens_BT: Tensor, cache_pos_B: Tensor, rng: torch.Generator
) -> Iterator[Tensor]:
    """Contents [B,N,S,D] of k_cache_0, v_cache_0, k_cache_1 …, made to measure for these tokens.

    They depend on the queries and the residual stream of the reference, which computes where the rng is. Only slots
    before `cache_pos` mean anything; one row at least must have some.
    """
    config, device = generator.config, rng.device
    shape = (len(tokens_BT), config.heads, config.capacity, config.head_dim)
    groups = min(config.layers, int(cache_pos_B.max()))  # a layer without a slot of its own shares another's
    slots_S1 = torch.arange(config.capacity, device=device)[:, None]
    valid_BNSD = (slots_S1 < cache_pos_B[:, None, None, None]).expand(shape)
    share = (GROWTH ** (2 / config.layers) - 1) ** 0.5
    query_BT = cache_pos_B[:, None] + torch.arange(tokens_BT.shape[1], device=device)
    mask = block_mask(query_BT, config.capacity, config)
    x_BTC = generator.tok_emb(tokens_BT) + F.embedding(query_BT, generator.pos_emb.squeeze(0))
    for number, layer in enumerate(cast(Sequence[Any], generator.blocks)):
        q, k, v = layer.attn.qkv(layer.ln1(x_BTC))
        spread_N11 = q.square().mean((0, 2, 3)).sqrt()[:, None, None]
        keys = torch.randn(shape, generator=rng, device=device) * (SCORE / spread_N11.clamp(min=1e-6))
        keys_out = tensor_scatter(keys, k, cache_pos_B)
        signs = torch.randint(2, shape, generator=rng, device=device) * 2.0 - 1
        needles = (slots_S1 % groups == number % groups) & valid_BNSD
        # What needles of magnitude 1 add to the stream: attention is linear in the values.
        added_BTC = layer.attn.attend(q, keys_out, signs * needles, mask) - layer.attn.proj.bias
        wanted = share * x_BTC.square().mean().sqrt() / added_BTC.square().mean().sqrt()
        values = torch.randn(shape, generator=rng, device=device)
        values = torch.where(needles, signs * wanted.clamp(max=LARGEST), values)
        yield keys
        yield values
        x_BTC = x_BTC + layer.attn.attend(q, keys_out, tensor_scatter(values, v, cache_pos_B), mask)
        x_BTC = x_BTC + layer.mlp(layer.ln2(x_BTC))
