"""The rotation of q and k in one launch; its backward is the same kernel, INVERSE. RoFormer, arXiv:2104.09864.

    (a, b) -> (a cos - b sin, b cos + a sin)          INVERSE: sin -> -sin

One program rotates BLOCK_H heads of BLOCK_T tokens: the angles are read once and used for all heads, in fp32. A tile is
(heads, tokens, pairs), so that rows of either memory layout, (B, H, T, D) or (B, T, H, D), are read 128 bits a thread.
"""

import torch
import triton
import triton.language as tl

from . import tile_configs
from .launch import blocks_of, strides_of
from .tiles import in_elements, wide_dtype


@triton.jit
def heads_of_program(num_tokens, num_q_heads, num_k_heads, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """What this program rotates: (batch, chunk of heads, chunks that are of q, block of tokens, token, in_seq).

    The chunks of heads of one block of tokens are neighbours: they share its angles.
    """
    q_chunks = tl.cdiv(num_q_heads, BLOCK_H)
    chunks = q_chunks + tl.cdiv(num_k_heads, BLOCK_H)
    chunk = tl.program_id(0) % chunks
    block = tl.program_id(0) // chunks
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    batch = (block // num_blocks).to(tl.int64)
    token = (block % num_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    return batch, chunk, q_chunks, block, token, token < num_tokens


@triton.jit
def angles_of(
    cos_ptr, sin_ptr, positions_ptr, positions_stride, batch, token, in_seq, offset, num_positions,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """cos and sin (1, tokens, pairs). Position of token t: positions[b, t], or offset + t where positions_ptr is None.

    cos is NaN at a position that the tables, of num_positions rows, do not have.
    """
    if positions_ptr is None:
        position = token + offset
    else:
        position = tl.load(positions_ptr + batch * positions_stride + token, mask=in_seq, other=0).to(tl.int64)
    pair = tl.arange(0, HALF_BLOCK)
    angle = position[:, None] * HALF + pair[None, :]
    in_table = ((position >= 0) & (position < num_positions))[:, None]
    angle_ok = in_table & (pair < HALF)[None, :]
    cos = tl.load(cos_ptr + angle, mask=angle_ok, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=angle_ok, other=0.0)[None, :, :]
    cos = tl.where(in_table, cos, float("nan"))[None, :, :]
    return cos, sin


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, x_strides, out_strides, batch, first_head, num_heads, token, in_seq, cos, sin,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.arange(0, BLOCK_H)
    x_row = batch * x_strides[0] + head[:, None].to(tl.int64) * x_strides[1] + token[None, :] * x_strides[2]
    out_row = batch * out_strides[0] + head[:, None].to(tl.int64) * out_strides[1] + token[None, :] * out_strides[2]
    x_rows = x_ptr + x_row[:, :, None]
    out_rows = out_ptr + out_row[:, :, None]
    row_ok = ((head < num_heads)[:, None] & in_seq[None, :])[:, :, None]
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF_BLOCK)[None, None, :]
        ok = row_ok & (column < 2 * HALF)
        x = tl.load(x_rows + column, mask=ok, other=0.0)
        pairs: tl.constexpr = (x.shape[0], x.shape[1], HALF_BLOCK, 2)
        a, b = tl.split(tl.reshape(x.to(wide_dtype(x.dtype)), pairs))
        rotated = tl.join(a * cos - b * sin, b * cos + a * sin)
        tl.store(out_rows + column, tl.reshape(rotated, x.shape).to(x.dtype), mask=ok)
    else:
        column = tl.arange(0, HALF_BLOCK)[None, None, :]
        ok = row_ok & (column < HALF)
        first = tl.load(x_rows + column, mask=ok, other=0.0)
        second = tl.load(x_rows + HALF + column, mask=ok, other=0.0)
        a = first.to(wide_dtype(first.dtype))
        b = second.to(wide_dtype(first.dtype))
        tl.store(out_rows + column, (a * cos - b * sin).to(first.dtype), mask=ok)
        tl.store(out_rows + HALF + column, (b * cos + a * sin).to(first.dtype), mask=ok)
    if HEAD_DIM > 2 * HALF:  # what is not rotated is copied
        column = 2 * HALF + tl.arange(0, triton.next_power_of_2(HEAD_DIM - 2 * HALF))[None, None, :]
        ok = row_ok & (column < HEAD_DIM)
        tl.store(out_rows + column, tl.load(x_rows + column, mask=ok, other=0.0), mask=ok)


@triton.jit(
    do_not_specialize=["num_tokens", "offset", "num_positions", "num_q_heads", "num_k_heads", "positions_stride"]
)
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr,
    strides,  # of q, k and what they become: of batch, head, token, in units of UNIT elements; the last stride is 1
    positions_stride,
    num_tokens, offset, num_positions, num_q_heads, num_k_heads,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """k_ptr may be None. A token at a position that the tables do not have becomes NaN."""
    HALF_BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    batch, chunk, q_chunks, _, token, in_seq = heads_of_program(num_tokens, num_q_heads, num_k_heads, BLOCK_T, BLOCK_H)
    cos, sin = angles_of(
        cos_ptr, sin_ptr, positions_ptr, positions_stride, batch, token, in_seq, offset, num_positions, HALF, HALF_BLOCK
    )
    if INVERSE:
        sin = -sin
    if chunk < q_chunks:
        _rotate_heads(
            q_ptr, q_out_ptr, in_elements(strides[0], UNIT), in_elements(strides[2], UNIT), batch, chunk * BLOCK_H,
            num_q_heads, token, in_seq, cos, sin,
            HEAD_DIM, HALF, HALF_BLOCK, BLOCK_H, INTERLEAVED,
        )  # fmt: skip
    elif k_ptr is not None:
        _rotate_heads(
            k_ptr, k_out_ptr, in_elements(strides[1], UNIT), in_elements(strides[3], UNIT), batch,
            (chunk - q_chunks) * BLOCK_H, num_k_heads, token, in_seq, cos, sin,
            HEAD_DIM, HALF, HALF_BLOCK, BLOCK_H, INTERLEAVED,
        )  # fmt: skip


def rotate(q, k, cos, sin, *, positions=0, interleaved=False, inverse=False):
    """(q, k) rotated, as new tensors in their memory layouts. q, k (B, H, T, D); k may be None.

    positions: an offset, or integers (T,) or (B, T); NaN for those that cos, sin (positions, R / 2) lack.
    inverse rotates by the negative angles.
    """
    given = q, k
    q, k = rows(q), rows(k)
    q_out, k_out = torch.empty_like(q), None if k is None else torch.empty_like(k)
    B, Hq, T, D = q.shape
    Hk = 0 if k is None else k.shape[1]
    half = cos.shape[1]
    tile = tile_configs.rotary_tile(2 * half)
    heads = blocks_of(Hq, tile.BLOCK_H) + blocks_of(Hk, tile.BLOCK_H)
    programs = B * blocks_of(T, tile.BLOCK_T) * heads
    if programs == 0:
        return q_out, k_out
    unit, strides = strides_of(q, k, q_out, k_out)
    positions, positions_stride, offset = positions_of(positions, T)
    with torch.cuda.device_of(q):
        rope_kernel[(programs,)](
            q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), positions,
            strides, positions_stride, T, offset, cos.shape[0], Hq, Hk,
            HEAD_DIM=D, HALF=half, UNIT=unit,
            INTERLEAVED=interleaved, INVERSE=inverse, **tile._asdict(),
        )  # fmt: skip
    return as_given(q_out, given[0]), as_given(k_out, given[1])


def rows(x):
    """x (B, H, T, D) or None with a last stride of 1: a gradient may come transposed."""
    return x if x is None or x.stride(3) == 1 else x.contiguous()


def as_given(out, x):
    """A result `out` for rows(x), in the memory layout of x."""
    return out if x is None or x.stride(3) == 1 else torch.empty_like(x).copy_(out)


def positions_of(positions, T):
    """(tensor or None, its stride between rows of the batch, offset) for a kernel."""
    if isinstance(positions, torch.Tensor):
        return positions.contiguous(), T if positions.dim() == 2 else 0, 0
    return None, 0, positions


def rotary_tables(rope):
    """(cos, sin, R) for an attention kernel, from a pair of tables or None."""
    if rope is None:
        return None, None, 0
    cos, sin = (table.contiguous() for table in rope)
    return cos, sin, 2 * cos.shape[1]
