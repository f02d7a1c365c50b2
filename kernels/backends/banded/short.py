"""Attention of a few dozen tokens on a CPU: PyTorch's own kernel with the band as its mask.

For short sequences the many calls of the banded backend cost more than its products. This is one call.
"""

from functools import lru_cache

import torch

from ...band import visible_mask
from ...cpu import through_mkl
from .rope import rotate_pairs, rotate_pairs_back, rotation_of

SHORT = 64  # tokens; from there on the band is faster


def is_short(q, k):
    """Whether q and k are of one short sequence on a CPU, in a dtype that needs no wider sums."""
    return q.is_cpu and 0 < q.shape[2] == k.shape[2] <= SHORT and q.shape[0] > 0 and q.dtype.itemsize >= 4


@lru_cache(maxsize=32)
def _band_mask(T, window, dtype):
    """(T, T): 0 where a query sees a key, -inf elsewhere."""
    unseen = ~visible_mask(T, T, window)
    return torch.zeros(T, T, dtype=dtype).masked_fill_(unseen, float("-inf"))


def _short_options(q, window, scale):
    """The dropout, mask and scale that PyTorch's kernel is given."""
    T = q.shape[2]
    # PyTorch's own causal mask would be a microsecond faster, but it gives zeros for rows of NaN
    mask = _band_mask(T, T if window is None else min(window, T), q.dtype)
    return (0.0, False), {"attn_mask": mask, "scale": scale}


@through_mkl  # PyTorch's kernel makes small products, which take three times as long by oneDNN
def short_forward(q, k, v, window, scale, rope, with_lse, threads):
    """The forward pass without softcap and sinks; it keeps lse, and q and k if they are rotated."""
    plain, options = _short_options(q, window, scale)
    like, rotated = q, []
    if rope is not None:
        rotation = rotation_of(rope, q.shape[2], q.dtype)
        q, k = rotated = [rotate_pairs(x, rotation, torch.empty(x.shape, dtype=x.dtype)) for x in (q, k)]
    result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, *plain, **options)
    out = result if result.stride() == like.stride() else torch.empty_like(like).copy_(result)
    lse = lse.contiguous()
    # the backward pass needs lse; where it is a result too, a copy, since an operator's results share no memory
    kept = [lse.clone() if with_lse else lse, *rotated] if threads else []
    return out, lse if with_lse else lse.new_empty(0), kept


@through_mkl
def short_backward(grad_out, q, k, v, out, kept, window, scale, rope):
    """(dq, dk, dv) from what the forward pass kept."""
    plain, options = _short_options(q, window, scale)
    lse, *rotated = kept
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, *(rotated or (q, k)), v, out, lse, *plain, **options
    )
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    if rope is None:
        dq.copy_(grads[0]), dk.copy_(grads[1])
    else:
        rotation = rotation_of(rope, q.shape[2], q.dtype)
        rotate_pairs_back(grads[0], rotation, dq), rotate_pairs_back(grads[1], rotation, dk)
    return dq, dk, dv.copy_(grads[2])
