"""Causal sliding-window attention, forward. FlashAttention-2, arXiv:2307.08691, Alg. 1, in base 2.

    s_ij = scale * q_i . k_j          (softcap: c * tanh(s_ij / c))        over  i - window < j <= i
    lse_i = log(sum_j exp(s_ij) + exp(sink))
    o_i = sum_j exp(s_ij - lse_i) v_j

One program owns BLOCK_M rows (BLOCK_M / PACK queries of PACK heads, see tiles.py) and walks the keys of their band:
first the edges, masked, then the interior, without a mask. acc, row_sum and row_max stay in registers.
"""

import torch
import triton
import triton.language as tl

from . import tile_configs
from .launch import blocks_of, packed_heads, softmax_scales, strides_of
from .rope import rotary_tables, rotate
from .tiles import (
    LN_2,
    LOG2_E,
    attend_tiles,
    head_block,
    head_columns,
    in_elements,
    key_spans,
    limits_of,
    load_rotated,
    of_row,
    packed_rows,
    row_offset,
    row_program,
    wide_dtype,
)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_kv_heads", "window", "later"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sinks_ptr, cos_ptr, sin_ptr, starts_ptr, ends_ptr,
    strides,  # of q, k, v, out: of batch, head, position, in units of UNIT elements; the last stride is 1
    num_queries, num_keys, num_kv_heads, window, later, scale_log2, cap_scale,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, EDGE_N: tl.constexpr, BLOCK_N: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """k is rotated already, q is rotated here. sinks_ptr, starts_ptr and cap_scale are None where there are none.

    later: the keys from a query's own on, this one included; None: its own alone, and no ends_ptr.
    """
    WIDE: tl.constexpr = wide_dtype(q_ptr.dtype.element_ty)
    q_strides = in_elements(strides[0], UNIT)
    k_strides = in_elements(strides[1], UNIT)
    v_strides = in_elements(strides[2], UNIT)
    out_strides = in_elements(strides[3], UNIT)
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    batch, kv_head, first_head, block = row_program(num_queries, num_kv_heads, GROUP, PACK, BLOCK_Q)
    query, head = packed_rows(block * BLOCK_Q, first_head, PACK, BLOCK_M)
    offset = num_keys - num_queries
    q_pos = query + offset
    element, in_head = head_columns(HEAD_DIM)
    in_columns = in_head[None, :] if head_block(HEAD_DIM) != HEAD_DIM else None
    # rows past the last query repeat it, and are not stored: a load without a mask needs no zeros
    row = tl.minimum(query, num_queries - 1)
    q_row = row_offset(batch, head, row, q_strides)[:, None]
    q = load_rotated(q_ptr, q_row, element[None, :], in_columns, (row + offset)[:, None], cos_ptr, sin_ptr, ROTARY_DIM)

    k_ptr += batch.to(tl.int64) * k_strides[0] + kv_head.to(tl.int64) * k_strides[1]
    v_ptr += batch.to(tl.int64) * v_strides[0] + kv_head.to(tl.int64) * v_strides[1]
    first_pos = block * BLOCK_Q + offset
    last_pos = tl.minimum(first_pos + BLOCK_Q, num_keys) - 1
    documents = of_row(starts_ptr, batch, num_keys), of_row(ends_ptr, batch, num_keys)
    limits = None
    if starts_ptr is not None or later is not None:
        limits = limits_of(q_pos, window, 1 if later is None else later, num_keys, *documents)
    edges, interior = key_spans(first_pos, last_pos, window, EDGE_N, BLOCK_N, later, num_keys, *documents)
    acc = tl.zeros((BLOCK_M, head_block(HEAD_DIM)), dtype=WIDE)
    row_sum = tl.zeros((BLOCK_M, SUMS), dtype=WIDE)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=WIDE)
    state = (acc, row_sum, row_max)
    state = attend_tiles(
        state, q, q_pos, k_ptr, v_ptr, k_strides[2], v_strides[2], edges, num_keys, None, None, window, limits,
        scale_log2, cap_scale, HEAD_DIM, EDGE_N, PRECISION, True,
    )  # fmt: skip
    state = attend_tiles(
        state, q, q_pos, k_ptr, v_ptr, k_strides[2], v_strides[2], interior, num_keys, None, None, window, limits,
        scale_log2, cap_scale, HEAD_DIM, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    acc, row_sum, row_max = state
    row_sum = tl.sum(row_sum, 1)

    has_keys = row_sum != 0  # true of NaN, which lse must not hide
    lse_log2 = tl.where(has_keys, row_max * scale_log2 + tl.log2(row_sum), float("-inf"))
    norm = tl.where(has_keys, 1 / row_sum, 0.0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(WIDE) * LOG2_E
        larger = tl.maximum(lse_log2, sink)
        with_sink = larger + tl.log2(tl.exp2(lse_log2 - larger) + tl.exp2(sink - larger))
        norm *= tl.exp2(lse_log2 - with_sink)
        lse_log2 = with_sink

    lse_row = (batch.to(tl.int64) * num_kv_heads * GROUP + head) * num_queries + query
    in_queries = query < num_queries
    tl.store(lse_ptr + lse_row, lse_log2 * LN_2, mask=in_queries)
    out_row = row_offset(batch, head, query, out_strides)
    out = (acc * norm[:, None]).to(out_ptr.dtype.element_ty)
    ok = in_queries[:, None] & in_head[None, :]
    tl.store(out_ptr + element[None, :] + out_row[:, None], out, mask=ok)


def first_key(T, S, window):
    """The first key that any of T queries sees: what lies before it need not be rotated."""
    return 0 if window is None else max(0, S - T - window + 1)


def sides(window, right, S):
    """(window, later): how many keys up to a query's own it sees, and from its own on; None: its own alone."""
    window = S if window is None else min(window, S)
    return window, None if right == 0 else S if right is None else min(right + 1, S)


def document_ends(starts):
    """For each position the end of its document, (B, S) int32, from `starts`. On the device, without waiting for it."""
    position = torch.arange(starts.shape[1], dtype=starts.dtype, device=starts.device)
    # starts do not decrease: those that are not past a position belong to its document or to one before it
    return torch.searchsorted(starts, position.expand_as(starts).contiguous(), right=True, out_int32=True)


def starts_from(starts, first):
    """`starts` of the positions from `first` on, counted from there."""
    return starts if starts is None or first == 0 else (starts[:, first:] - first).clamp_(min=0)


def attend(
    q, k, v, window, *, scale, right=0, starts=None, softcap=None, sinks=None, rope=None, with_lse=True, config=None
):
    """(out, lse) of `sliding_gqa_attention`: out in q's memory layout, lse (B, Hq, T) in fp32, for fp64 in fp64.

    With rope, k is rotated into a temporary first: in the loop it would be done again for every row block. lse costs
    nothing: without with_lse it is only not returned. config: a RowTile in place of the table's.
    """
    B, Hq, T, D = q.shape
    Hkv, S = k.shape[1], k.shape[2]
    group = Hq // Hkv
    out = torch.empty_like(q)
    lse = torch.empty((B, Hq, T), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if out.numel() == 0:
        return out, lse if with_lse else lse.new_empty(0)
    sinks = None if sinks is None else sinks.contiguous()
    cos, sin, rotary_dim = rotary_tables(rope)
    if rotary_dim:
        first = first_key(T, S, window)
        k, v, cos, sin, S = k[:, :, first:], v[:, :, first:], cos[first:], sin[first:], S - first
        k, _ = rotate(k, None, cos, sin)
        starts = starts_from(starts, first)
    starts = None if starts is None else starts.contiguous()
    ends = None if starts is None or right == 0 else document_ends(starts)
    arch = tile_configs.architecture(q.device)
    config = config or tile_configs.tile_config("forward", D, q.dtype, arch)
    pack = packed_heads(group, config.BLOCK_M)
    scale_log2, cap_scale = softmax_scales(scale, softcap)
    unit, strides = strides_of(q, k, v, out)
    with torch.cuda.device_of(q):
        attention_forward_kernel[(B * Hkv * (group // pack) * blocks_of(T, config.BLOCK_M // pack),)](
            q, k, v, out, lse, sinks, cos, sin, starts, ends, strides,
            T, S, Hkv, *sides(window, right, S), scale_log2, cap_scale,
            HEAD_DIM=D, ROTARY_DIM=rotary_dim, GROUP=group, PACK=pack, UNIT=unit,
            SUMS=tile_configs.partial_sums(config, arch), PRECISION=tile_configs.dot_precision(q.dtype, arch),
            **config._asdict(),
        )  # fmt: skip
    return out, lse if with_lse else lse.new_empty(0)
