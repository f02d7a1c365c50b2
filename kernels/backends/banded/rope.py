"""Rotary positions in PyTorch: what `apply_rope` runs on a CPU, and what attention and decoding use inside.

    (a, b) -> (a cos - b sin, b cos + a sin)

Each PyTorch product costs by how often it begins a new row, and half a head is a row. So `rotate_into` multiplies whole
heads by (cos, cos) first, then adds to the halves. A long tensor is rotated in pieces that fit a core's cache.

Attention may keep the elements of a pair next to each other, where one complex product rotates them: `rotate_pairs`.
"""

import torch
from torch.nn.functional import pad

PIECE = 1 << 20  # bytes of q and k that a thread rotates at once: with the result they are the L2 cache of most cores


def rotate(q, k, cos, sin, *, positions=0, interleaved=False, inverse=False):
    """(q, k) rotated by the rows `positions` of the tables, an offset or integers (T,) or (B, T): new tensors.

    inverse rotates by the negative angles. NaN for positions that the tables lack.
    """
    outs = torch.empty_like(q), torch.empty_like(k)
    for c, s, *piece in pieces(cos, sin, positions, q, k, *outs):
        s = -s if inverse else s
        doubled = double(c, q.shape[-1], interleaved)
        for x, out in zip(piece[:2], piece[2:], strict=True):
            rotate_into(x, c, s, out, interleaved=interleaved, doubled=doubled)
    return outs


def pieces(cos, sin, positions, q, k, *others):
    """The rows `positions` of cos and sin, and q, k and others (..., T, D), cut along T to a cache.s size."""
    T = q.shape[-2]
    if isinstance(positions, torch.Tensor):
        cos, sin = rows_of(cos, sin, positions)  # (T, R/2) or (B, T, R/2)
        cos, sin = (cos[:, None], sin[:, None]) if positions.dim() == 2 else (cos, sin)
    else:
        cos, sin = cos[positions : positions + T], sin[positions : positions + T]
    wide = torch.promote_types(q.dtype, cos.dtype)
    row = (q.numel() + k.numel()) // max(1, T) * wide.itemsize
    step = max(1, PIECE * torch.get_num_threads() // max(1, row))
    tensors = cos, sin, q, k, *others
    return [tensors] if T <= step else zip(*(x.split(step, dim=-2) for x in tensors), strict=True)


def rotate_into(x, cos, sin, out=None, *, interleaved=False, doubled=None):
    """x (..., T, D) rotated by tables that broadcast against (..., T, R / 2), into `out`. Returns out.

    out: None for a new tensor of x's dtype and layout; it must not share memory with x. Products are made in the wider
    dtype of x and the tables, and rounded once. doubled: `double` of cos, where it is known.
    """
    wide = torch.promote_types(x.dtype, cos.dtype)
    out = torch.empty_like(x) if out is None else out
    if out.dtype != wide:
        return out.copy_(rotate_into(x.to(wide), cos, sin, interleaved=interleaved, doubled=doubled))
    a, b = _halves(x, cos.shape[-1], interleaved)
    out_a, out_b = _halves(out, cos.shape[-1], interleaved)
    torch.mul(x, double(cos, x.shape[-1], interleaved) if doubled is None else doubled, out=out)
    out_a.addcmul_(b, sin, value=-1)
    out_b.addcmul_(a, sin)
    return out


def _halves(x, half, interleaved):
    """The first and the second elements of the pairs, as views."""
    x = x if x.shape[-1] == 2 * half else x[..., : 2 * half]
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def double(cos, head_dim, interleaved):
    """(..., T, D): the cosine that each element of a head is multiplied with, 1 for those that are not rotated."""
    doubled = cos.repeat_interleave(2, dim=-1) if interleaved else torch.cat((cos, cos), dim=-1)
    rest = head_dim - doubled.shape[-1]
    return pad(doubled, (0, rest), value=1.0) if rest else doubled


def rows_of(cos, sin, positions):
    """cos and sin (*positions.shape, R / 2) of an integer tensor; NaN for positions that they lack.

    On a CPU the caller has refused those.
    """
    if positions.is_cpu:
        return cos[positions], sin[positions]
    near = positions.clamp(0, cos.shape[0] - 1)
    lacking = (near != positions)[..., None]
    return cos[near].masked_fill(lacking, float("nan")), sin[near].masked_fill(lacking, float("nan"))


def rotation_of(rope, length, dtype):
    """cos + i sin of the first positions: (length, R / 2)."""
    cos, sin = (table[:length].to(dtype) for table in rope)
    return torch.complex(cos, sin)


def rotate_pairs(x, rotation, out):
    """x (..., D) rotated into `out`, pairs next to each other; out must not share memory with x. Returns out.

    (x[i], x[i + R/2]) is a complex number; (out[2i], out[2i + 1]) is its product with the rotation. Heads of an odd
    size have no complex view: there halves stay halves.
    """
    half = rotation.shape[-1]
    if x.shape[-1] % 2:
        return rotate_into(x, rotation.real, rotation.imag, out)
    pairs = torch.view_as_complex(out[..., : 2 * half].unflatten(-1, (half, 2)))
    torch.complex(x[..., :half], x[..., half : 2 * half], out=pairs).mul_(rotation)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :].copy_(x[..., 2 * half :])
    return out


def rotate_pairs_back(grad, rotation, out):
    """The transpose of `rotate_pairs`: a wide gradient of its result, which is overwritten, into `out` of any dtype."""
    half = rotation.shape[-1]
    if grad.shape[-1] % 2:
        return out.copy_(rotate_into(grad, rotation.real, -rotation.imag, torch.empty_like(grad)))
    pairs = grad[..., : 2 * half].unflatten(-1, (half, 2))
    torch.view_as_complex(pairs).mul_(rotation.conj().resolve_conj())
    out[..., :half].copy_(pairs[..., 0])
    out[..., half : 2 * half].copy_(pairs[..., 1])
    if 2 * half < grad.shape[-1]:
        out[..., 2 * half :].copy_(grad[..., 2 * half :])
    return out
