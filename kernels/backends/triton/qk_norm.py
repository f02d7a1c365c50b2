"""q and k normalised and rotated in one launch, forward and backward. RMSNorm, arXiv:1910.07467; RoFormer, 2104.09864.

    n = x / rms      y = rotate(n weight)      rms = sqrt(mean(x^2) + eps), over a head
    g: the gradient of y, rotated back         dx = (g weight - n mean(g weight n)) / rms      dweight = sum(g n)

One program has BLOCK_H heads of BLOCK_T tokens, as in rope.py, and whole heads: mean and sums need no other program. It
reads x once, in the backward also the gradient, and writes once. The backward normalises x again; nothing is kept. The
sum of dweight over a program's heads and tokens is a row of fp32 sums, which PyTorch adds: always the same bits.

A head is a (first elements of the pairs, second elements, what is not rotated), each (heads, tokens, elements).
"""

import torch
import triton
import triton.language as tl

from . import tile_configs
from .launch import strides_of
from .rope import angles_of, as_given, heads_of_program, positions_of, rows
from .tiles import in_elements, wide_dtype


@triton.jit
def _load_head(
    row, ok, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """(first, second, rest) of the head at each pointer of row (heads, tokens, 1), in fp32 or fp64; 0 where not ok."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF_BLOCK)[None, None, :]
        x = tl.load(row + column, mask=ok & (column < 2 * HALF), other=0.0)
        x = x.to(wide_dtype(x.dtype))
        pairs: tl.constexpr = (x.shape[0], x.shape[1], HALF_BLOCK, 2)
        first, second = tl.split(tl.reshape(x, pairs))
    else:
        column = tl.arange(0, HALF_BLOCK)[None, None, :]
        first = tl.load(row + column, mask=ok & (column < HALF), other=0.0)
        second = tl.load(row + HALF + column, mask=ok & (column < HALF), other=0.0)
        first = first.to(wide_dtype(first.dtype))
        second = second.to(wide_dtype(second.dtype))
    if HEAD_DIM > 2 * HALF:
        column = 2 * HALF + tl.arange(0, triton.next_power_of_2(HEAD_DIM - 2 * HALF))[None, None, :]
        rest = tl.load(row + column, mask=ok & (column < HEAD_DIM), other=0.0)
        rest = rest.to(wide_dtype(rest.dtype))
    else:
        rest = 0.0
    return first, second, rest


@triton.jit
def _store_head(
    row, ok, head,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Write (first, second, rest) to the pointers of row, where ok."""
    first, second, rest = head
    dtype: tl.constexpr = row.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF_BLOCK)[None, None, :]
        whole: tl.constexpr = (first.shape[0], first.shape[1], 2 * HALF_BLOCK)
        x = tl.reshape(tl.join(first, second), whole)
        tl.store(row + column, x.to(dtype), mask=ok & (column < 2 * HALF))
    else:
        column = tl.arange(0, HALF_BLOCK)[None, None, :]
        tl.store(row + column, first.to(dtype), mask=ok & (column < HALF))
        tl.store(row + HALF + column, second.to(dtype), mask=ok & (column < HALF))
    if HEAD_DIM > 2 * HALF:
        column = 2 * HALF + tl.arange(0, triton.next_power_of_2(HEAD_DIM - 2 * HALF))[None, None, :]
        tl.store(row + column, rest.to(dtype), mask=ok & (column < HEAD_DIM))


@triton.jit
def _mean_product(a, b, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Mean of the products of two heads' elements, (heads, tokens, 1)."""
    total = tl.sum(a[0] * b[0] + a[1] * b[1], 2, keep_dims=True)
    if HEAD_DIM > 2 * HALF:
        total += tl.sum(a[2] * b[2], 2, keep_dims=True)
    return total / HEAD_DIM


@triton.jit
def _scaled(head, scale):
    """A head times a number a row."""
    return head[0] * scale, head[1] * scale, head[2] * scale


@triton.jit
def _product(a, b):
    """Two heads, or a head and a weight, element by element."""
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


@triton.jit
def _rotated(head, cos, sin):
    a, b, rest = head
    return a * cos - b * sin, b * cos + a * sin, rest


@triton.jit
def _sum_of_rows(x):
    """(1, 1, elements) of (heads, tokens, elements)."""
    return tl.sum(tl.sum(x, 0, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _head_rows(x_ptr, strides, batch, head, token):
    row = batch * strides[0] + head[:, None].to(tl.int64) * strides[1] + token[None, :] * strides[2]
    return x_ptr + row[:, :, None]


@triton.jit
def _one_row(ptr, row):
    """Pointers (1, 1, 1) to a row of weights or of their sums."""
    return ptr + row + tl.zeros((1, 1, 1), tl.int64)


@triton.jit
def _heads_forward(
    x_ptr, out_ptr, weight_ptr, x_strides, out_strides, eps, batch, first_head, num_heads, token, in_seq, cos, sin,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.arange(0, BLOCK_H)
    ok = ((head < num_heads)[:, None] & in_seq[None, :])[:, :, None]
    x = _load_head(_head_rows(x_ptr, x_strides, batch, head, token), ok, HEAD_DIM, HALF, HALF_BLOCK, INTERLEAVED)
    n = _scaled(x, tl.rsqrt(_mean_product(x, x, HEAD_DIM, HALF) + eps))
    if weight_ptr is not None:
        every = tl.full((1, 1, 1), 1, tl.int1)
        n = _product(n, _load_head(_one_row(weight_ptr, 0), every, HEAD_DIM, HALF, HALF_BLOCK, INTERLEAVED))
    out = _head_rows(out_ptr, out_strides, batch, head, token)
    _store_head(out, ok, _rotated(n, cos, sin), HEAD_DIM, HALF, HALF_BLOCK, INTERLEAVED)


@triton.jit
def _heads_backward(
    grad_ptr, x_ptr, dx_ptr, weight_ptr, sums_ptr, grad_strides, x_strides, dx_strides, eps, batch, first_head,
    num_heads, program, token, in_seq, cos, sin,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.arange(0, BLOCK_H)
    ok = ((head < num_heads)[:, None] & in_seq[None, :])[:, :, None]
    grad = _head_rows(grad_ptr, grad_strides, batch, head, token)
    g = _rotated(_load_head(grad, ok, HEAD_DIM, HALF, HALF_BLOCK, INTERLEAVED), cos, -sin)
    x = _load_head(_head_rows(x_ptr, x_strides, batch, head, token), ok, HEAD_DIM, HALF, HALF_BLOCK, INTERLEAVED)
    inverse = tl.rsqrt(_mean_product(x, x, HEAD_DIM, HALF) + eps)
    n = _scaled(x, inverse)
    if weight_ptr is not None:
        every = tl.full((1, 1, 1), 1, tl.int1)
        first, second, rest = _product(g, n)
        if HEAD_DIM > 2 * HALF:
            rest = _sum_of_rows(rest)
        sums = _sum_of_rows(first), _sum_of_rows(second), rest
        to = _one_row(sums_ptr, program.to(tl.int64) * HEAD_DIM)
        _store_head(to, every, sums, HEAD_DIM, HALF, HALF_BLOCK, INTERLEAVED)
        g = _product(g, _load_head(_one_row(weight_ptr, 0), every, HEAD_DIM, HALF, HALF_BLOCK, INTERLEAVED))
    mean = _mean_product(g, n, HEAD_DIM, HALF)
    dx = (g[0] - n[0] * mean) * inverse, (g[1] - n[1] * mean) * inverse, (g[2] - n[2] * mean) * inverse
    to = _head_rows(dx_ptr, dx_strides, batch, head, token)
    _store_head(to, ok, dx, HEAD_DIM, HALF, HALF_BLOCK, INTERLEAVED)


RUN_TIME = ["num_tokens", "offset", "num_positions", "num_q_heads", "num_k_heads", "positions_stride"]


@triton.jit(do_not_specialize=RUN_TIME)
def norm_rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr,
    strides,  # of q, k and what they become, as in rope_kernel
    positions_stride, eps,
    num_tokens, offset, num_positions, num_q_heads, num_k_heads,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """q_out = rotate(q / rms * q_weight), k_out likewise. A weight pointer is None for ones."""
    HALF_BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    batch, chunk, q_chunks, _, token, in_seq = heads_of_program(num_tokens, num_q_heads, num_k_heads, BLOCK_T, BLOCK_H)
    cos, sin = angles_of(
        cos_ptr, sin_ptr, positions_ptr, positions_stride, batch, token, in_seq, offset, num_positions, HALF, HALF_BLOCK
    )
    if chunk < q_chunks:
        _heads_forward(
            q_ptr, q_out_ptr, q_weight_ptr, in_elements(strides[0], UNIT), in_elements(strides[2], UNIT), eps,
            batch, chunk * BLOCK_H, num_q_heads, token, in_seq, cos, sin,
            HEAD_DIM, HALF, HALF_BLOCK, BLOCK_H, INTERLEAVED,
        )  # fmt: skip
    else:
        _heads_forward(
            k_ptr, k_out_ptr, k_weight_ptr, in_elements(strides[1], UNIT), in_elements(strides[3], UNIT), eps,
            batch, (chunk - q_chunks) * BLOCK_H, num_k_heads, token, in_seq, cos, sin,
            HEAD_DIM, HALF, HALF_BLOCK, BLOCK_H, INTERLEAVED,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def norm_rope_backward_kernel(
    q_grad_ptr, k_grad_ptr, q_ptr, k_ptr, dq_ptr, dk_ptr, q_weight_ptr, k_weight_ptr,
    q_sums_ptr, k_sums_ptr,  # (programs of q, D) and (programs of k, D)
    cos_ptr, sin_ptr, positions_ptr,
    strides,  # of the gradients, of q and k, and of dq and dk
    positions_stride, eps,
    num_tokens, offset, num_positions, num_q_heads, num_k_heads,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    HALF_BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    batch, chunk, q_chunks, block, token, in_seq = heads_of_program(
        num_tokens, num_q_heads, num_k_heads, BLOCK_T, BLOCK_H
    )
    cos, sin = angles_of(
        cos_ptr, sin_ptr, positions_ptr, positions_stride, batch, token, in_seq, offset, num_positions, HALF, HALF_BLOCK
    )
    # a token past the end may have no row in the tables; its NaN must not reach the sums
    cos = tl.where(in_seq[None, :, None], cos, 0.0)
    if chunk < q_chunks:
        _heads_backward(
            q_grad_ptr, q_ptr, dq_ptr, q_weight_ptr, q_sums_ptr, in_elements(strides[0], UNIT),
            in_elements(strides[2], UNIT), in_elements(strides[4], UNIT), eps,
            batch, chunk * BLOCK_H, num_q_heads, block * q_chunks + chunk, token, in_seq, cos, sin,
            HEAD_DIM, HALF, HALF_BLOCK, BLOCK_H, INTERLEAVED,
        )  # fmt: skip
    else:
        k_chunk = chunk - q_chunks
        _heads_backward(
            k_grad_ptr, k_ptr, dk_ptr, k_weight_ptr, k_sums_ptr, in_elements(strides[1], UNIT),
            in_elements(strides[3], UNIT), in_elements(strides[5], UNIT), eps,
            batch, k_chunk * BLOCK_H, num_k_heads, block * tl.cdiv(num_k_heads, BLOCK_H) + k_chunk, token, in_seq,
            cos, sin,
            HEAD_DIM, HALF, HALF_BLOCK, BLOCK_H, INTERLEAVED,
        )  # fmt: skip


def norm_rotate(q, k, norm, cos, sin, *, positions=0, interleaved=False):
    """(q, k) normalised over their heads and rotated, new tensors. norm = (q_weight, k_weight, eps).

    positions: an offset, or integers (T,) or (B, T); NaN for those that cos, sin (positions, R / 2) lack.
    """
    given, (q_weight, k_weight, eps) = (q, k), norm
    q, k = rows(q), rows(k)
    outs = torch.empty_like(q), torch.empty_like(k)
    tile = tile_configs.norm_tile(q.shape[3])
    blocks, q_chunks, k_chunks = _programs(q, k, tile)
    if blocks * (q_chunks + k_chunks) == 0:
        return outs
    unit, strides = strides_of(q, k, *outs)
    with torch.cuda.device_of(q):
        norm_rope_kernel[(blocks * (q_chunks + k_chunks),)](
            q, k, *outs, _dense(q_weight), _dense(k_weight), cos.contiguous(), sin.contiguous(),
            *_shape(q, k, cos, positions, strides, eps),
            HEAD_DIM=q.shape[3], HALF=cos.shape[1], UNIT=unit, INTERLEAVED=interleaved, **tile._asdict(),
        )  # fmt: skip
    return tuple(as_given(*pair) for pair in zip(outs, given, strict=True))


def norm_rotate_backward(grad_q, grad_k, q, k, norm, cos, sin, *, positions=0, interleaved=False):
    """(dq, dk, dq_weight, dk_weight), a weight's None without it."""
    given, (q_weight, k_weight, eps) = (q, k), norm
    grad_q, grad_k, q, k = rows(grad_q), rows(grad_k), rows(q), rows(k)
    grads, D = (torch.empty_like(q), torch.empty_like(k)), q.shape[3]
    tile = tile_configs.norm_tile(D, backward=True)
    blocks, q_chunks, k_chunks = _programs(q, k, tile)
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = [
        None if weight is None else torch.empty(blocks * chunks, D, dtype=wide, device=q.device)
        for weight, chunks in ((q_weight, q_chunks), (k_weight, k_chunks))
    ]
    if blocks * (q_chunks + k_chunks):
        unit, strides = strides_of(grad_q, grad_k, q, k, *grads)
        with torch.cuda.device_of(q):
            norm_rope_backward_kernel[(blocks * (q_chunks + k_chunks),)](
                grad_q, grad_k, q, k, *grads, _dense(q_weight), _dense(k_weight), *sums,
                cos.contiguous(), sin.contiguous(), *_shape(q, k, cos, positions, strides, eps),
                HEAD_DIM=D, HALF=cos.shape[1], UNIT=unit, INTERLEAVED=interleaved, **tile._asdict(),
            )  # fmt: skip
    of_weights = (
        None if weight is None else rows_of_sums.sum(0).to(weight.dtype)
        for rows_of_sums, weight in zip(sums, (q_weight, k_weight), strict=True)
    )
    return *(as_given(*pair) for pair in zip(grads, given, strict=True)), *of_weights


def _programs(q, k, tile):
    """(blocks of tokens of the whole batch, chunks of q's heads, chunks of k's heads)."""
    blocks = q.shape[0] * triton.cdiv(q.shape[2], tile.BLOCK_T)
    return blocks, triton.cdiv(q.shape[1], tile.BLOCK_H), triton.cdiv(k.shape[1], tile.BLOCK_H)


def _shape(q, k, cos, positions, strides, eps):
    """The kernels' arguments from positions_ptr to num_k_heads."""
    positions, stride, offset = positions_of(positions, q.shape[2])
    return positions, strides, stride, eps, q.shape[2], offset, cos.shape[0], q.shape[1], k.shape[1]


def _dense(weight):
    return None if weight is None else weight.contiguous()
