"""Rotary positions in PyTorch, for machines without Triton: what `apply_rope` runs there, and what attention does.

    (a, b) -> (a cos - b sin, b cos + a sin)

torch.compile makes one loop of this formula, `rotate_pairs`. Called one by one, its products cost by how often they
begin a new row, which a half of a head is, and by memory that the system has to map and clear. So `turn` multiplies
whole heads by (cos, cos) first, then adds to the halves, and a long tensor is turned in pieces that fit a core's cache.

Inside attention the two elements of a pair may lie side by side, where one complex product turns them: `turn_pairs`.
"""

import torch
from torch.nn.functional import pad

from .listeners import gradients_are_batched, nobody_listens

PIECE = 1 << 20  # bytes of q and k that a thread turns at once: with the result they are the L2 cache of most cores


def rotate_pairs(x, cos, sin, interleaved=False):
    """x (..., T, D) rotated in PyTorch by tables that broadcast against (..., T, R / 2); differentiable, x's dtype."""
    a, b = _partners(x, cos.shape[-1], interleaved)
    # fp16 and bf16 promote to the tables' fp32 here and are rounded once, in the last line
    pair = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    out = out.to(x.dtype)
    return torch.cat([out, x[..., out.shape[-1] :]], dim=-1) if out.shape[-1] < x.shape[-1] else out


def turn(x, cos, sin, out=None, *, interleaved=False, doubled=None):
    """`rotate_pairs` without gradients, into `out`, which x must not share memory with. Returns out.

    out: None for a new tensor of x's dtype and layout; doubled: `_double` of cos, where it is known.
    """
    wide = torch.promote_types(x.dtype, cos.dtype)
    out = torch.empty_like(x) if out is None else out
    if out.dtype != wide:
        return out.copy_(turn(x.to(wide), cos, sin, interleaved=interleaved, doubled=doubled))
    a, b = _partners(x, cos.shape[-1], interleaved)
    turned_a, turned_b = _partners(out, cos.shape[-1], interleaved)
    torch.mul(x, _double(cos, x.shape[-1], interleaved) if doubled is None else doubled, out=out)
    turned_a.addcmul_(b, sin, value=-1)
    turned_b.addcmul_(a, sin)
    return out


def _partners(x, half, interleaved):
    """The first and the second elements of the pairs, as views."""
    x = x if x.shape[-1] == 2 * half else x[..., : 2 * half]
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def _double(cos, head_dim, interleaved):
    """(..., T, D): the cosine that each element of a head is multiplied with, 1 for those that do not turn."""
    doubled = cos.repeat_interleave(2, dim=-1) if interleaved else torch.cat((cos, cos), dim=-1)
    rest = head_dim - doubled.shape[-1]
    return pad(doubled, (0, rest), value=1.0) if rest else doubled


def turn_in_pieces(xs, cos, sin, interleaved=False):
    """`turn` of each of xs (B, H, T, D), of one dtype, T and D, as many positions at a time as fit: new tensors."""
    outs = tuple(torch.empty_like(x) for x in xs)
    T, D = xs[0].shape[-2:]
    wide = torch.promote_types(xs[0].dtype, cos.dtype)
    row = sum(x.numel() for x in xs) // max(1, T) * wide.itemsize
    step = max(1, PIECE * torch.get_num_threads() // max(1, row))
    tensors = cos, sin, *xs, *outs
    for cos, sin, *both in [tensors] if T <= step else zip(*(x.split(step, dim=-2) for x in tensors), strict=True):
        doubled = _double(cos, D, interleaved)
        for x, out in zip(both[: len(xs)], both[len(xs) :], strict=True):
            turn(x, cos, sin, out, interleaved=interleaved, doubled=doubled)
    return outs


def rows_of(cos, sin, positions, checked):
    """cos and sin (*positions.shape, R / 2) of an integer tensor. Not checked: NaN for positions that they lack."""
    if checked:
        return cos[positions], sin[positions]
    near = positions.clamp(0, cos.shape[0] - 1)
    lacking = (near != positions)[..., None]
    return cos[near].masked_fill(lacking, float("nan")), sin[near].masked_fill(lacking, float("nan"))


def rotate_both(q, k, cos, sin, interleaved=False):
    """(q, k) rotated by tables that broadcast against (B, H, T, R / 2), differentiable, each in its own dtype.

    The tables are constants, which have no gradients."""
    if q.device.type != "cpu" or not nobody_listens(q, k, cos, sin):
        return _products(q, k, cos, sin, interleaved)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Turn.apply(q, k, cos, sin, interleaved)
    return turn_in_pieces((q, k), cos, sin, interleaved)


def _products(q, k, cos, sin, interleaved):
    return rotate_pairs(q, cos, sin, interleaved), rotate_pairs(k, cos, sin, interleaved)


class _Turn(torch.autograd.Function):
    # forward takes ctx: with a setup_context beside it, PyTorch inspects its signature at every call, 0.1 ms on a CPU
    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return turn_in_pieces((q, k), cos, sin, interleaved)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        cos, sin = ctx.saved_tensors
        rotate = _products if gradients_are_batched() else rotate_both
        return *rotate(grad_q, grad_k, cos, -sin, ctx.interleaved), None, None, None


def rotation_of(rope, length, dtype):
    """cos + i sin of the first positions: (length, R / 2)."""
    cos, sin = (table[:length].to(dtype) for table in rope)
    return torch.complex(cos, sin)


def turn_pairs(x, rotation, out):
    """x (..., D) turned into `out`, which x must not share memory with, partners side by side. Returns out.

    (x[i], x[i + R/2]) is a complex number; (out[2i], out[2i + 1]) is its product with the rotation. Heads of an odd
    size have no complex view: there halves stay halves.
    """
    half = rotation.shape[-1]
    if x.shape[-1] % 2:
        return turn(x, rotation.real, rotation.imag, out)
    pairs = torch.view_as_complex(out[..., : 2 * half].unflatten(-1, (half, 2)))
    torch.complex(x[..., :half], x[..., half : 2 * half], out=pairs).mul_(rotation)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :].copy_(x[..., 2 * half :])
    return out


def turn_pairs_back(grad, rotation, out):
    """The transpose of `turn_pairs`: a wide gradient of its result, which is overwritten, into `out` of any dtype."""
    half = rotation.shape[-1]
    if grad.shape[-1] % 2:
        return out.copy_(turn(grad, rotation.real, -rotation.imag, torch.empty_like(grad)))
    pairs = grad[..., : 2 * half].unflatten(-1, (half, 2))
    torch.view_as_complex(pairs).mul_(rotation.conj().resolve_conj())
    out[..., :half].copy_(pairs[..., 0])
    out[..., half : 2 * half].copy_(pairs[..., 1])
    if 2 * half < grad.shape[-1]:
        out[..., 2 * half :].copy_(grad[..., 2 * half :])
    return out
