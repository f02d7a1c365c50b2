"""q and k normalised and rotated in PyTorch, forward and backward, in pieces that a core's cache holds.

n = x / rms      y = rotate(n weight)      rms = sqrt(mean(x^2) + eps), over a head (RMSNorm, arXiv:1910.07467)
dweight = sum(g n)      dx = (g weight - n mean(g weight n)) / rms      g: the gradient of y, rotated back
"""

import torch

from .rope import double, pieces, rotate_into


def norm_rotate(q, k, norm, cos, sin, *, positions=0, interleaved=False):
    """(q, k) normalised over their heads and rotated, new tensors, rounded once. norm = (q_weight, k_weight, eps)."""
    *weights, eps = norm
    outs = torch.empty_like(q), torch.empty_like(k)
    for c, s, *piece in pieces(cos, sin, positions, q, k, *outs):
        doubled = double(c, q.shape[-1], interleaved)
        for x, out, weight in zip(piece[:2], piece[2:], weights, strict=True):
            n, _ = _normed(x, eps)
            n = n if weight is None else n.mul_(weight)
            out.copy_(rotate_into(n, c, s, interleaved=interleaved, doubled=doubled))
    return outs


def norm_rotate_backward(grad_q, grad_k, q, k, norm, cos, sin, *, positions=0, interleaved=False):
    """(dq, dk, dq_weight, dk_weight), a weight's None without it. Nothing is kept since the forward."""
    *weights, eps = norm
    grads = torch.empty_like(q), torch.empty_like(k)
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = [None if weight is None else weight.new_zeros(weight.shape, dtype=wide) for weight in weights]
    for c, s, *piece in pieces(cos, sin, positions, q, k, grad_q, grad_k, *grads):
        doubled = double(c, q.shape[-1], interleaved)
        for x, grad, out, weight, total in zip(piece[:2], piece[2:4], piece[4:], weights, sums, strict=True):
            g = rotate_into(grad.to(wide), c, -s, interleaved=interleaved, doubled=doubled)
            n, inverse = _normed(x, eps)
            if weight is not None:
                total += (g * n).sum((0, 1, 2))
                g *= weight
            mean = (g * n).mean(-1, keepdim=True)
            out.copy_(g.sub_(n.mul_(mean)).mul_(inverse))
    of_weights = (None if x is None else x.to(weight.dtype) for x, weight in zip(sums, weights, strict=True))
    return *grads, *of_weights


def _normed(x, eps):
    """(x / rms as a new wide tensor, 1 / rms)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse
