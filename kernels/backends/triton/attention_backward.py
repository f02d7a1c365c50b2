"""Causal sliding-window attention, backward. FlashAttention-2, arXiv:2307.08691, Alg. 2, without atomics.

    p_ij = exp(s_ij - lse_i)          dp_ij = do_i . v_j          delta_i = do_i . o_i - dlse_i
    ds_ij = p_ij (dp_ij - delta_i)                          (softcap: times 1 - tanh^2)
    dq_i = scale * sum_j ds_ij k_j     dk_j = scale * sum_i ds_ij q_i     dv_j = sum_i p_ij do_i
    dsink = -sum_i exp(sink - lse_i) delta_i

The dq kernel owns rows and walks keys, like the forward. Since it loads do and q anyway, it also writes delta and, with
rope, the rotated q: no pass of their own reads them. It writes -log2(e) lse too, as dk/dv adds it to every score. The
dk/dv kernel owns keys and walks the rows that see them, all heads of the group within one program, so that nothing is
summed afterwards and nothing is added atomically. Both turn their fp32 accumulators back by the angles before the
store: RoPE's backward has no pass of its own.
"""

import functools

import torch
import triton
import triton.language as tl

from . import tile_configs
from .attention_forward import document_ends, first_key, sides, starts_from
from .launch import blocks_of, packed_heads, softmax_scales, strides_of
from .rope import rotary_tables, rotate
from .tiles import (
    LOG2_E,
    dot,
    head_block,
    head_columns,
    in_elements,
    key_spans,
    limits_of,
    load_rotated,
    load_tile,
    of_row,
    packed_rows,
    query_spans,
    recomputed,
    rotate_back,
    row_offset,
    row_program,
    tanh,
    visible,
    walk_start,
    walk_step,
    wide_dtype,
    wide_stride,
)


@triton.jit
def _add_dq(
    dq, q, do, pivot, delta, q_pos, k_ptr, v_ptr, k_stride, v_stride, span, num_keys, window, limits, scale_log2,
    cap_scale,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The walk of one row block over the key tiles of `span`."""
    K_PADDED: tl.constexpr = head_block(HEAD_DIM, ROTARY_DIM) != HEAD_DIM
    V_PADDED: tl.constexpr = head_block(HEAD_DIM) != HEAD_DIM
    k_element, k_in_head = head_columns(HEAD_DIM, ROTARY_DIM)
    v_element, v_in_head = head_columns(HEAD_DIM)
    start = walk_start(span, MASKED)
    key = start.to(tl.int64) + tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + k_element[None, :] + key[:, None] * k_stride
    v_ptrs = v_ptr + v_element[:, None] + key[None, :] * v_stride
    for _ in range(span[3]):
        k_pos = start + tl.arange(0, BLOCK_N)
        in_keys = k_pos < num_keys
        k = load_tile(k_ptrs, in_keys[:, None], k_in_head[None, :], MASKED, K_PADDED)
        v = load_tile(v_ptrs, in_keys[None, :], v_in_head[:, None], MASKED, V_PADDED)
        scores = dot(q, tl.trans(k), None, PRECISION)
        if cap_scale is not None:
            scores = tanh(scores * cap_scale, q.dtype.primitive_bitwidth > 16)
        p = tl.exp2(scores * scale_log2 + pivot[:, None])
        if MASKED:
            p = tl.where(visible(q_pos[:, None], k_pos[None, :], window, limits), p, 0.0)
        ds = p * (dot(do, v, None, PRECISION) - delta[:, None])
        if cap_scale is not None:
            ds *= 1 - scores * scores
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)
        step = walk_step(start, span, BLOCK_N, MASKED)
        start += step
        k_ptrs += step * wide_stride(k_stride)
        v_ptrs += step * wide_stride(v_stride)
    return dq


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_kv_heads", "window", "later"])
def attention_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dlse_ptr, cos_ptr, sin_ptr, starts_ptr, ends_ptr, dq_ptr,
    pivot_ptr, delta_ptr, rotated_ptr,
    strides,  # of do, q, k, v, out, dq, rotated: of batch, head, position, in units of UNIT elements
    num_queries, num_keys, num_kv_heads, window, later, scale, scale_log2, cap_scale,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, EDGE_N: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and what dk/dv takes of each row: pivot = -log2(e) lse, delta and, with rope, the rotated q.

    k is rotated already; see `attention_forward_kernel`.
    """
    WIDE: tl.constexpr = wide_dtype(q_ptr.dtype.element_ty)
    do_strides = in_elements(strides[0], UNIT)
    q_strides = in_elements(strides[1], UNIT)
    k_strides = in_elements(strides[2], UNIT)
    v_strides = in_elements(strides[3], UNIT)
    out_strides = in_elements(strides[4], UNIT)
    dq_strides = in_elements(strides[5], UNIT)
    rotated_strides = in_elements(strides[6], UNIT)
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    batch, kv_head, first_head, block = row_program(num_queries, num_kv_heads, GROUP, PACK, BLOCK_Q)
    query, head = packed_rows(block * BLOCK_Q, first_head, PACK, BLOCK_M)
    offset = num_keys - num_queries
    q_pos = query + offset
    in_queries = query < num_queries

    # rows past the last query repeat it, and are not stored: a load without a mask needs no zeros
    row = tl.minimum(query, num_queries - 1)
    element, in_head = head_columns(HEAD_DIM)
    PADDED: tl.constexpr = head_block(HEAD_DIM) != HEAD_DIM
    do_ptrs = do_ptr + element[None, :] + row_offset(batch, head, row, do_strides)[:, None]
    out_ptrs = out_ptr + element[None, :] + row_offset(batch, head, row, out_strides)[:, None]
    lse_row = (batch.to(tl.int64) * num_kv_heads * GROUP + head) * num_queries + row
    do = load_tile(do_ptrs, None, in_head[None, :], False, PADDED)
    out = load_tile(out_ptrs, None, in_head[None, :], False, PADDED)
    pivot = tl.load(lse_ptr + lse_row) * -LOG2_E
    tl.store(pivot_ptr + lse_row, pivot, mask=in_queries)
    delta = tl.sum(out.to(WIDE) * do.to(WIDE), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + lse_row)
    tl.store(delta_ptr + lse_row, delta, mask=in_queries)

    element, in_head = head_columns(HEAD_DIM, ROTARY_DIM)
    in_columns = in_head[None, :] if head_block(HEAD_DIM, ROTARY_DIM) != HEAD_DIM else None
    q_row = row_offset(batch, head, row, q_strides)[:, None]
    q = load_rotated(q_ptr, q_row, element[None, :], in_columns, (row + offset)[:, None], cos_ptr, sin_ptr, ROTARY_DIM)
    if ROTARY_DIM > 0:
        rotated_row = row_offset(batch, head, row, rotated_strides)
        ok = in_queries[:, None] & in_head[None, :]
        tl.store(rotated_ptr + element[None, :] + rotated_row[:, None], q, mask=ok)

    k_ptr += batch.to(tl.int64) * k_strides[0] + kv_head.to(tl.int64) * k_strides[1]
    v_ptr += batch.to(tl.int64) * v_strides[0] + kv_head.to(tl.int64) * v_strides[1]
    first_pos = block * BLOCK_Q + offset
    last_pos = tl.minimum(first_pos + BLOCK_Q, num_keys) - 1
    documents = of_row(starts_ptr, batch, num_keys), of_row(ends_ptr, batch, num_keys)
    limits = None
    if starts_ptr is not None or later is not None:
        limits = limits_of(q_pos, window, 1 if later is None else later, num_keys, *documents)
    edges, interior = key_spans(first_pos, last_pos, window, EDGE_N, BLOCK_N, later, num_keys, *documents)
    dq = tl.zeros((BLOCK_M, head_block(HEAD_DIM, ROTARY_DIM)), dtype=WIDE)
    dq = _add_dq(
        dq, q, do, pivot, delta, q_pos, k_ptr, v_ptr, k_strides[2], v_strides[2], edges, num_keys, window,
        limits, scale_log2, cap_scale, HEAD_DIM, ROTARY_DIM, EDGE_N, PRECISION, True,
    )  # fmt: skip
    dq = _add_dq(
        dq, q, do, pivot, delta, q_pos, k_ptr, v_ptr, k_strides[2], v_strides[2], interior, num_keys, window,
        limits, scale_log2, cap_scale, HEAD_DIM, ROTARY_DIM, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    dq *= scale
    query, head = packed_rows(recomputed(block, num_queries) * BLOCK_Q, first_head, PACK, BLOCK_M)
    q_pos = query + offset
    in_queries = query < num_queries
    ok = in_queries[:, None] & in_head[None, :]
    if ROTARY_DIM > 0:
        dq = rotate_back(dq, q_pos, in_queries, cos_ptr, sin_ptr, ROTARY_DIM)
    dq_row = row_offset(batch, head, query, dq_strides)
    tl.store(dq_ptr + element[None, :] + dq_row[:, None], dq.to(dq_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _add_dkdv(
    state, k, v, k_pos, do_ptr, q_ptr, pivot_ptr, delta_ptr, do_strides, q_strides, batch, first_head, span,
    num_queries, offset, window, limits, scale_log2, cap_scale,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The walk of one key block over the row tiles of `span`, BLOCK_Q queries of PACK heads each."""
    Q_PADDED: tl.constexpr = head_block(HEAD_DIM, ROTARY_DIM) != HEAD_DIM
    DO_PADDED: tl.constexpr = head_block(HEAD_DIM) != HEAD_DIM
    dk, dv = state
    q_element, q_in_head = head_columns(HEAD_DIM, ROTARY_DIM)
    do_element, do_in_head = head_columns(HEAD_DIM)
    start = walk_start(span, MASKED)
    query, head = packed_rows(start, first_head, PACK, BLOCK_Q * PACK)
    do_ptrs = do_ptr + do_element[None, :] + row_offset(batch, head, query, do_strides)[:, None]
    q_ptrs = q_ptr + q_element[None, :] + row_offset(batch, head, query, q_strides)[:, None]
    row = head.to(tl.int64) * num_queries + query
    pivot_ptrs = pivot_ptr + row
    delta_ptrs = delta_ptr + row
    for _ in range(span[3]):
        row_query = start + tl.arange(0, BLOCK_Q * PACK) // PACK
        in_queries = row_query < num_queries
        q = load_tile(q_ptrs, in_queries[:, None], q_in_head[None, :], MASKED, Q_PADDED)
        do = load_tile(do_ptrs, in_queries[:, None], do_in_head[None, :], MASKED, DO_PADDED)
        pivot = load_tile(pivot_ptrs, in_queries, None, MASKED, False)
        delta = load_tile(delta_ptrs, in_queries, None, MASKED, False)
        scores = dot(k, tl.trans(q), None, PRECISION)
        if cap_scale is not None:
            scores = tanh(scores * cap_scale, q.dtype.primitive_bitwidth > 16)
        p = tl.exp2(scores * scale_log2 + pivot[None, :])
        if MASKED:
            seen = visible((row_query + offset)[None, :], k_pos[:, None], window, limits, OF_KEYS=True)
            p = tl.where(seen, p, 0.0)
        dv = dot(p.to(do.dtype), do, dv, PRECISION)
        ds = p * (dot(v, tl.trans(do), None, PRECISION) - delta[None, :])
        if cap_scale is not None:
            ds *= 1 - scores * scores
        dk = dot(ds.to(q.dtype), q, dk, PRECISION)
        step = walk_step(start, span, BLOCK_Q, MASKED)
        start += step
        do_ptrs += step * wide_stride(do_strides[2])
        q_ptrs += step * wide_stride(q_strides[2])
        pivot_ptrs += step
        delta_ptrs += step
    return dk, dv


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_kv_heads", "window", "later"])
def attention_dkdv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, pivot_ptr, delta_ptr, cos_ptr, sin_ptr, starts_ptr, ends_ptr, dk_ptr, dv_ptr,
    strides,  # of do, q, k, v, dk, dv: of batch, head, position, in units of UNIT elements
    part_stride,  # of the parts of dk and dv, in elements
    num_queries, num_keys, num_kv_heads, window, later, scale, scale_log2, cap_scale,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, UNIT: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_M: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, summed over GROUP / PARTS query heads of each KV head. q and k are rotated already.

    Without later keys (later is None) no key is seen from before itself, so that starts_ptr is not needed.
    """
    WIDE: tl.constexpr = wide_dtype(q_ptr.dtype.element_ty)
    do_strides = in_elements(strides[0], UNIT)
    q_strides = in_elements(strides[1], UNIT)
    k_strides = in_elements(strides[2], UNIT)
    v_strides = in_elements(strides[3], UNIT)
    dk_strides = in_elements(strides[4], UNIT)
    dv_strides = in_elements(strides[5], UNIT)
    EDGE_Q: tl.constexpr = EDGE_M // PACK
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    num_blocks = tl.cdiv(num_keys, BLOCK_N)
    pair = tl.program_id(0) // (num_blocks * PARTS)
    part = tl.program_id(0) // num_blocks % PARTS
    block = tl.program_id(0) % num_blocks
    batch = pair // num_kv_heads
    kv_head = pair % num_kv_heads

    k_pos = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows past the last key repeat it, as those of the dq kernel do
    row = tl.minimum(k_pos, num_keys - 1)
    k_element, k_in_head = head_columns(HEAD_DIM, ROTARY_DIM)
    v_element, v_in_head = head_columns(HEAD_DIM)
    k_ptrs = k_ptr + k_element[None, :] + row_offset(batch, kv_head, row, k_strides)[:, None]
    v_ptrs = v_ptr + v_element[None, :] + row_offset(batch, kv_head, row, v_strides)[:, None]
    k = load_tile(k_ptrs, None, k_in_head[None, :], False, head_block(HEAD_DIM, ROTARY_DIM) != HEAD_DIM)
    v = load_tile(v_ptrs, None, v_in_head[None, :], False, head_block(HEAD_DIM) != HEAD_DIM)

    offset = num_keys - num_queries
    last_key = tl.minimum(block * BLOCK_N + BLOCK_N, num_keys) - 1
    documents = of_row(starts_ptr, batch, num_keys), of_row(ends_ptr, batch, num_keys)
    earlier = 1 if later is None else later
    edges, interior = query_spans(
        block * BLOCK_N, last_key, window, offset, num_queries, EDGE_Q, BLOCK_Q, earlier, num_keys, *documents
    )
    limits = None
    if ends_ptr is not None or later is not None:
        first, end = limits_of(k_pos, earlier, window, num_keys, *documents)
        # they count queries: with an addition in the loop, all features at once would spill on sm_90
        limits = first - offset, end - offset
        offset = 0
    pivot_ptr += batch.to(tl.int64) * num_kv_heads * GROUP * num_queries
    delta_ptr += batch.to(tl.int64) * num_kv_heads * GROUP * num_queries
    dk = tl.zeros((BLOCK_N, head_block(HEAD_DIM, ROTARY_DIM)), dtype=WIDE)
    dv = tl.zeros((BLOCK_N, head_block(HEAD_DIM)), dtype=WIDE)
    state = (dk, dv)
    for pack in range(GROUP // PACK // PARTS):
        first_head = kv_head * GROUP + (part * (GROUP // PACK // PARTS) + pack) * PACK
        state = _add_dkdv(
            state, k, v, k_pos, do_ptr, q_ptr, pivot_ptr, delta_ptr, do_strides, q_strides, batch, first_head, edges,
            num_queries, offset, window, limits, scale_log2, cap_scale, HEAD_DIM, ROTARY_DIM, PACK, EDGE_Q, PRECISION,
            True,
        )  # fmt: skip
        state = _add_dkdv(
            state, k, v, k_pos, do_ptr, q_ptr, pivot_ptr, delta_ptr, do_strides, q_strides, batch, first_head, interior,
            num_queries, offset, window, limits, scale_log2, cap_scale, HEAD_DIM, ROTARY_DIM, PACK, BLOCK_Q, PRECISION,
            False,
        )  # fmt: skip
    dk, dv = state
    dk *= scale
    k_pos = recomputed(block, num_keys) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_keys = k_pos < num_keys
    k_ok = in_keys[:, None] & k_in_head[None, :]
    v_ok = in_keys[:, None] & v_in_head[None, :]
    if ROTARY_DIM > 0:
        dk = rotate_back(dk, k_pos, in_keys, cos_ptr, sin_ptr, ROTARY_DIM)
    if PARTS > 1:
        dk_ptr += part.to(tl.int64) * part_stride
        dv_ptr += part.to(tl.int64) * part_stride
    dk_row = row_offset(batch, kv_head, k_pos, dk_strides)
    dv_row = row_offset(batch, kv_head, k_pos, dv_strides)
    tl.store(dk_ptr + k_element[None, :] + dk_row[:, None], dk.to(dk_ptr.dtype.element_ty), mask=k_ok)
    tl.store(dv_ptr + v_element[None, :] + dv_row[:, None], dv.to(dv_ptr.dtype.element_ty), mask=v_ok)


def attend_backward(
    grad_out, grad_lse, q, k, v, out, lse, window, *, scale, right=0, starts=None, softcap=None, sinks=None, rope=None,
    configs=(None, None), parts=None,
):  # fmt: skip
    """(dq, dk, dv, dsinks) of `attention_forward`, each in the memory layout of what it is the gradient of.

    grad_lse (B, Hq, T) may be None; dsinks is None without sinks. k is rotated again, not kept since the forward.
    configs: a RowTile and a KeyTile in place of the table's; parts: in place of what `head_parts` says.
    """
    B, Hq, T, D = q.shape
    Hkv, S = k.shape[1], k.shape[2]
    group = Hq // Hkv
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), None if sinks is None else torch.zeros_like(sinks)
    if grad_out.stride(3) != 1:  # that of an expanded sum, or of a transpose
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.to(lse.dtype).contiguous()
    pivot, delta = torch.empty_like(lse), torch.empty_like(lse)
    cos, sin, rotary_dim = rotary_tables(rope)
    to_dq, to_dk, to_dv, separate = dq, dk, dv, False
    q_rotated = q
    if rotary_dim:
        first = first_key(T, S, window)
        dk[:, :, :first] = 0
        dv[:, :, :first] = 0
        k, v, to_dk, to_dv = (x[:, :, first:] for x in (k, v, dk, dv))
        cos, sin, S = cos[first:], sin[first:], S - first
        k, _ = rotate(k, None, cos, sin)
        starts = starts_from(starts, first)
        separate = pads_wider(D, rotary_dim)
        if separate:
            q, _ = rotate(q, None, cos, sin, positions=S - T)
            q_rotated, tables, cos, sin, rotary_dim = q, (cos, sin), None, None, 0
        else:
            q_rotated = torch.empty_like(q)
    starts = None if starts is None else starts.contiguous()
    ends = None if starts is None else document_ends(starts)
    arch = tile_configs.architecture(q.device)
    by_row = configs[0] or tile_configs.tile_config("dq", D, q.dtype, arch)
    by_key = configs[1] or tile_configs.tile_config("dkdv", D, q.dtype, arch)
    pack, key_pack = packed_heads(group, by_row.BLOCK_M), packed_heads(group, by_key.EDGE_M)
    key_programs = B * Hkv * blocks_of(S, by_key.BLOCK_N)
    if parts is None:
        parts = head_parts(key_programs, group // key_pack, tile_configs.processors(q.device))
    if parts > 1:
        wide = torch.empty((2, parts, *to_dk.shape), dtype=lse.dtype, device=q.device)
        dk_part, dv_part = wide[0, 0], wide[1, 0]
    else:
        dk_part, dv_part = to_dk, to_dv
    scalars = (T, S, Hkv, *sides(window, right, S), scale, *softmax_scales(scale, softcap))
    of_rows, of_keys = (starts, None if right == 0 else ends), (None if right == 0 else starts, ends)
    shape = dict(HEAD_DIM=D, ROTARY_DIM=rotary_dim, GROUP=group, PRECISION=tile_configs.dot_precision(q.dtype, arch))
    row_unit, row_strides = strides_of(grad_out, q, k, v, out, to_dq, q_rotated)
    key_unit, key_strides = strides_of(grad_out, q_rotated, k, v, dk_part, dv_part)
    with torch.cuda.device_of(q):
        attention_dq_kernel[(B * Hkv * (group // pack) * blocks_of(T, by_row.BLOCK_M // pack),)](
            grad_out, q, k, v, out, lse, grad_lse, cos, sin, *of_rows, to_dq, pivot, delta, q_rotated, row_strides,
            *scalars, **shape, PACK=pack, UNIT=row_unit, **by_row._asdict(),
        )  # fmt: skip
        attention_dkdv_kernel[(key_programs * parts,)](
            grad_out, q_rotated, k, v, pivot, delta, cos, sin, *of_keys, dk_part, dv_part, key_strides, to_dk.numel(),
            *scalars, **shape, PACK=key_pack, UNIT=key_unit, PARTS=parts, **by_key._asdict(),
        )  # fmt: skip
    if parts > 1:
        to_dk.copy_(wide[0].sum(0))
        to_dv.copy_(wide[1].sum(0))
    if separate:
        dq, _ = rotate(dq, None, *tables, positions=S - T, inverse=True)
        to_dk.copy_(rotate(to_dk, None, *tables, inverse=True)[0])
    dsinks = None
    if sinks is not None:
        weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse)  # what the sink takes of each row
        dsinks = (weight * delta).sum((0, 2)).neg().to(sinks.dtype)
    return dq, dk, dv, dsinks


@functools.cache  # constexpr_functions are slow on the host
def pads_wider(head_dim, rotary_dim):
    """Whether the halves pad to a wider tile, 48 of 128 elements to 64: a rotation before and one after cost less."""
    return head_block(head_dim, rotary_dim) > head_block(head_dim)


def head_parts(programs, packs, processors):
    """Over how many programs to spread the `packs` packs of heads that read the same keys, a power of two.

    The dk/dv kernel owns keys, so that a short sequence with few KV heads has few programs: of 4,096 tokens and one KV
    head 64, each of which would walk all query heads. Parts are summed afterwards, in fp32. Taken to be worth it until
    every multiprocessor has two programs: an estimate, not measured yet.
    """
    parts = 1
    while packs % (2 * parts) == 0 and programs * parts < 2 * processors:
        parts *= 2
    return parts
