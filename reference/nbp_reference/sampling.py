"""How a token is drawn from logits: top-k, then top-p, then the inverse of the cumulative distribution.

Everything in fp64 and in vocabulary order, so that equal logits and equal noise give equal tokens in every runtime.
Source: the paper's settings, nbp_engines.sampling is the same in numpy.
"""

import torch
from torch import Tensor


def sample(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int = 16_000, top_p: float = 0.9
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: [..., V], any float type.
        uniforms: [...], in [0,1), one a row.
        temperature: divides the logits; 0 means greedy, the first of the largest.
        top_k: keeps the k largest logits, and all that equal the k-th.
        top_p: of those, renormalised, keeps the most likely until their sum reaches p, the crossing one included;
            among equals, lower ids first.

    Returns:
        Token ids int64 [...].
    """
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.double() / temperature
    smallest = scaled.topk(min(top_k, scaled.shape[-1])).values[..., -1:]
    probs = scaled.masked_fill(scaled < smallest, -torch.inf).softmax(-1)
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    count = (ranked.cumsum(-1) - ranked < top_p).sum(-1, keepdim=True)
    kept = torch.arange(ranked.shape[-1], device=ranked.device) < count
    cdf = probs.where(torch.zeros_like(kept).scatter(-1, order, kept), 0.0).cumsum(-1)
    total = cdf[..., -1:]
    target = torch.minimum(uniforms.double()[..., None] * total, total.nextafter(total.new_zeros(())))
    return torch.searchsorted(cdf, target, right=True)[..., 0]
