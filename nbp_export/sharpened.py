"""Generates "sharpened" cache contents, with which a graph that does not attend to a valid slot fails its check.

With random contents, attention averages a thousand values to almost zero, and the output hardly depends on any of
them. Half precision then hides that a graph ignores a slot, or even half of them. Sharpened contents contain
needles: each valid slot is a needle in one layer, where its values all have one large magnitude. What attention adds to
the residual stream in a layer comes almost only from the needles of this layer. In nbp-xl's last step a layer has 52
needles, and a missing one changes what attention adds by 1/√52.

The weights of attention stay nearly equal. If attention selected single slots, it would skip the slots that no query
selects, and it would amplify rounding errors from layer to layer. With needles, half precision is as accurate as with
random contents.

The number of slots whose absence is detected in half precision depends on the number of layers. With 24 layers of
nbp-xl's width, a vocabulary of 1000 tokens, random weights and blocks of 1 and 16 tokens, 100 slots were hidden one at
a time. Each of them changed some element by 5.5e-2 or more, and half of them by more than 7.4e-2. The tolerance is
5e-2 in bf16 and 1e-2 in fp16, and the reference itself has errors of 1.0e-2 in bf16 and 1.2e-3 in fp16. With the five
layers of nbp-tiny, every tested slot is detected in fp16, but in bf16 only 47% (blocks of 1 token) and 63% (16 tokens)
are; a hidden block of 16 tokens changes some element by 1.3e-1. All of these changes are hundreds of times the
tolerance of fp32.
Shape legend: B batch, N heads, T tokens in the call, S cache slots, D head dim, C width.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nbp_reference.model import NextBlockTransformer, block_mask, tensor_scatter

# The standard deviation of the scores q·k/√D. A key changes the weight of its slot by a factor of about e^±0.5, so
# that wrong keys are detected too. From a deviation of 1 on, errors grow from layer to layer: with 24 layers of
# nbp-xl's width and random weights, the reference in bf16 has errors of 1.0e-2, 1.3e-2 and 2.0e-2 at deviations of
# 0.5, 0.7 and 1.
SCORE = 0.5
# The factor by which all attention layers together enlarge the residual stream. Each layer adds the same share of its
# input, because the needles of late layers would otherwise vanish beside what early layers added. A larger factor would
# detect little more, and fp16 overflows at 65504.
GROWTH = 50.0
LARGEST = 16384.0  # the largest value in a cache, because fp16 overflows at 65504


def sharpened_caches(
    generator: NextBlockTransformer, tokens_BT: Tensor, cache_pos_B: Tensor, rng: torch.Generator
) -> Iterator[Tensor]:
    """Yield contents [B,N,S,D] of k_cache_0, v_cache_0, k_cache_1 … for a call of the generator with these tokens.

    They depend on the reference's queries and residual stream, which are computed on the rng's device. Only the slots
    before `cache_pos` are meaningful, and at least one row must have such slots.
    """
    config, device = generator.config, rng.device
    shape = (len(tokens_BT), config.heads, config.capacity, config.head_dim)
    groups = min(
        config.layers, int(cache_pos_B.max())
    )  # with fewer valid slots than layers, several layers share a slot
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
        # What needles of magnitude 1 add to the stream. Attention is linear in the values, so this can be scaled.
        added_BTC = layer.attn.attend(q, keys_out, signs * needles, mask) - layer.attn.proj.bias
        magnitude = share * x_BTC.square().mean().sqrt() / added_BTC.square().mean().sqrt()
        values = torch.randn(shape, generator=rng, device=device)
        values = torch.where(needles, signs * magnitude.clamp(max=LARGEST), values)
        yield keys
        yield values
        x_BTC = x_BTC + layer.attn.attend(q, keys_out, tensor_scatter(values, v, cache_pos_B), mask)
        x_BTC = x_BTC + layer.mlp(layer.ln2(x_BTC))
