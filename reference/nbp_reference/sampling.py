"""Draws tokens from logits: top-k, then top-p, then the inverse of the cumulative distribution.

All sums are in fp64 and in vocabulary order, so that equal logits and equal noise give equal tokens in every runtime.
`nbp_engines.sampling` does the same in numpy. The default settings are the paper's.
"""

import torch
from torch import Tensor


def sample(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int = 16_000, top_p: float = 0.9
) -> Tensor:
    """Draw one token per row of logits.

    Args:
        logits: [..., V], of any floating-point dtype.
        uniforms: the noise, [...] in [0,1), one number per row.
        temperature: divides the logits; 0 takes the largest logit, and the lowest id among equal ones.
        top_k: keeps the k largest logits, and any that equal the k-th.
        top_p: renormalises the kept tokens and keeps the most likely ones, lower ids first among equals, until their
            probabilities sum to at least p.

    Returns:
        Token ids, int64 [...].
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
