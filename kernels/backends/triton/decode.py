"""Decoding with a ring-buffer cache on a GPU: append, and split-KV attention. Flash-Decoding, in base 2.

    o = sum_j 2^(s_j - m) v_j / sum_j 2^(s_j - m),   s_j = scale * log2(e) * q . k_j,   m = max_j s_j

The rows of a tile are all heads of a group and all new tokens, so that a key is read once for all of them, and a
group of any size fits; at least the 16 rows that a matrix product needs. A token's heads are neighbours. GROUP = 3,
T_new = 2:

    row      0        1        2        3        4        5        6 ...
    token    0        0        0        1        1        1        none
    head     h        h + 1    h + 2    h        h + 1    h + 2

Keys count from the oldest that a row block needs, so a walk over them is one piece wherever it lies in the ring, and
only its slots are read. Tiles that every row sees whole need no mask: at T_new = 1, all but a last one that is not
full.

    C = 8, window = 8, length 11      slot   0  1  2  3  4  5  6  7
                                      key    5  6  7  0  1  2  3  4

One program owns BLOCK_M rows and one of num_splits parts of their keys; acc, row_sum and row_max stay in registers. The
number of parts is known on the host, from window (or C), batch and GPU; where they begin follows from `lengths`, on the
device. So a part may be empty, which leaves maximum -inf and sum 0. A second kernel adds the parts up; if there is one
part, it is not needed.

q is rotated in the load: 16 rows, read anyway, in front of thousands of keys. To rotate it beside k in the append
kernel would cost what it avoids, a write and a read of q. A q that is rotated already needs no rope here.
"""

import functools

import torch
import triton
import triton.language as tl

from . import tile_configs
from .launch import blocks_of, softmax_scales, strides_of
from .rope import rotary_tables
from .tiles import (
    LN_2,
    LOG2_E,
    VALUE_UNIT,
    attend_tiles,
    head_block,
    head_columns,
    in_elements,
    key_spans,
    load_rotated,
    row_offset,
    wide_dtype,
)

APPEND_ROWS = 4  # a program's; one warp moves them 128 bits a thread from 64 elements a head on
COMBINE_SPLITS = 16  # of a tile: 8 elements a thread at 128 elements a head
# What `split_count` weighs, in the time of one tile of keys where memory is the limit. Estimates: not measured yet.
START = 1  # until a program's first tile is there: lengths, q and the tile are three reads, one after the other
COMBINE = 2  # the launch of the second kernel, and its reads
LARGEST_CODE: tl.constexpr = tl.constexpr(127)
SMALLEST: tl.constexpr = tl.constexpr(127 * 2.0**-126)  # below it, 127 / x is infinite: kernels/int8.py
ROUNDING: tl.constexpr = tl.constexpr(1.5 * 2**23)  # a sum with it has no bits behind the point
RESIDENT = 2  # programs that a multiprocessor runs at a time: the tiles of more would not fit its shared memory


@triton.jit
def quantized(x):
    """(codes, scales) of the rows of a tile: kernels/int8.py."""
    x = x.to(tl.float32)
    # as an integer NaN is larger than any number, so that it is not lost
    largest = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    inverse = tl.where(largest > SMALLEST, LARGEST_CODE / tl.maximum(largest, SMALLEST), 0.0)
    rounded = x * inverse[:, None] + ROUNDING
    # the lowest byte of such a float is the integer
    return rounded.to(tl.int32, bitcast=True).to(tl.int8), largest / LARGEST_CODE


@triton.jit(do_not_specialize=["num_rows", "num_new", "num_heads", "num_slots", "num_positions"])
def append_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr, cos_ptr, sin_ptr, k_scales_ptr, v_scales_ptr,
    strides,  # of k, v and the caches: of batch, head, position or slot, in units of UNIT elements; the last is 1
    scale_strides,  # of both scales: of batch, head and slot; None where rings are not int8
    num_rows, num_new, num_heads, num_slots, num_positions,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rotate k, then write k and v into the slots of their positions. A row is one head of one token.

    Into rings of int8, both are quantised in registers, and the scales are written beside them.

    num_positions: rows of the tables. The key of a position past them is NaN.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = row % num_heads
    token = row // num_heads % num_new
    batch = row // (num_heads * num_new)
    in_rows = row < num_rows
    position = tl.load(lengths_ptr + batch, mask=in_rows, other=0) - num_new + token
    slot = position % num_slots
    element, in_head = head_columns(HEAD_DIM)
    # positions below 0 are padding
    row_ok = in_rows & (position >= 0)
    ok = row_ok[:, None] & in_head[None, :]
    k_row = row_offset(batch, head, token, in_elements(strides[0], UNIT))[:, None]
    v_rows = v_ptr + row_offset(batch, head, token, in_elements(strides[1], UNIT))[:, None]
    k_slots = k_cache_ptr + row_offset(batch, head, slot, in_elements(strides[2], UNIT))[:, None]
    v_slots = v_cache_ptr + row_offset(batch, head, slot, in_elements(strides[3], UNIT))[:, None]
    k = load_rotated(k_ptr, k_row, element[None, :], ok, position[:, None], cos_ptr, sin_ptr, ROTARY_DIM, num_positions)
    v = tl.load(v_rows + element[None, :], mask=ok, other=0.0)
    if k_scales_ptr is not None:
        k, k_scale = quantized(k)
        v, v_scale = quantized(v)
        tl.store(k_scales_ptr + row_offset(batch, head, slot, scale_strides[0]), k_scale, mask=row_ok)
        tl.store(v_scales_ptr + row_offset(batch, head, slot, scale_strides[1]), v_scale, mask=row_ok)
    tl.store(k_slots + element[None, :], k, mask=ok)
    tl.store(v_slots + element[None, :], v, mask=ok)


@triton.jit(
    do_not_specialize=["num_new", "num_kv_heads", "num_slots", "window", "max_length", "num_positions", "num_splits"]
)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, sinks_ptr, cos_ptr, sin_ptr, k_scales_ptr, v_scales_ptr,
    out_ptr, lse_ptr, acc_ptr, max_ptr, sum_ptr,
    strides,  # of q, k, v, out: of batch, head, position or slot, in units of UNIT elements; the last stride is 1
    scale_strides,  # of the scales of k and v: of batch, head and slot; None where k and v are not int8
    num_new, num_kv_heads, num_slots, window, max_length, num_positions, num_splits, scale_log2, cap_scale,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one row block, into out, or if acc_ptr is not None, into (rows, num_splits, HEAD_DIM).

    lse_ptr is None where nobody needs lse.

    NaN, since the host has not seen lengths: for rows longer than max_length, whose ring has overwritten what they see,
    and for queries whose position is past the num_positions rows of the tables.
    """
    WIDE: tl.constexpr = wide_dtype(q_ptr.dtype.element_ty)
    k_strides = in_elements(strides[1], UNIT)
    v_strides = in_elements(strides[2], UNIT)
    num_rows = num_new * GROUP
    num_blocks = tl.cdiv(num_rows, BLOCK_M)
    # the row blocks of one part are neighbours: they read the same keys
    first_row = tl.program_id(0) % num_blocks * BLOCK_M
    split = tl.program_id(0) // num_blocks % num_splits
    pair = tl.program_id(0) // (num_blocks * num_splits)
    batch = pair // num_kv_heads
    kv_head = pair % num_kv_heads

    row = first_row + tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    in_rows = row < num_rows
    length = tl.load(lengths_ptr + batch)
    offset = length - num_new
    q_pos = offset + token
    element, in_head = head_columns(HEAD_DIM)
    ok = in_rows[:, None] & in_head[None, :]
    q_row = row_offset(batch, head, token, in_elements(strides[0], UNIT))[:, None]
    # positions below 0 are padding, and have no angles
    q_ok = ok & (q_pos >= 0)[:, None]
    q = load_rotated(q_ptr, q_row, element[None, :], q_ok, q_pos[:, None], cos_ptr, sin_ptr, ROTARY_DIM, num_positions)

    first_pos = offset + first_row // GROUP
    last_pos = offset + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // GROUP
    oldest = tl.maximum(first_pos - window + 1, 0)
    num_keys = tl.maximum(last_pos + 1 - oldest, 0)
    # this part's keys, and among them those that every row sees
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    part = tl.cdiv(num_tiles, num_splits)
    begin = tl.minimum(split * part, num_tiles) * BLOCK_N
    end = tl.minimum(split * part + part, num_tiles) * BLOCK_N
    edges, _ = key_spans(first_pos - oldest, last_pos - oldest, window, BLOCK_N, BLOCK_N)
    full_begin = tl.minimum(tl.maximum(edges[1], begin), end)
    full_end = tl.minimum(tl.maximum(edges[2], full_begin), end)
    edges = (begin, full_begin, full_end, (full_begin - begin + end - full_end) // BLOCK_N)
    interior = (full_begin, full_end, full_end, (full_end - full_begin) // BLOCK_N)

    acc = tl.zeros((BLOCK_M, head_block(HEAD_DIM)), dtype=WIDE)
    row_sum = tl.zeros((BLOCK_M, 1), dtype=WIDE)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=WIDE)
    if sinks_ptr is not None:
        # the sink is a key without a value, which the first part has seen before all others
        sink = tl.load(sinks_ptr + head, mask=in_rows, other=0.0).to(WIDE) * (LOG2_E / scale_log2)
        row_max = tl.where(split == 0, sink, row_max)
        row_sum = tl.where(split == 0, 1.0, row_sum)
    row_sum = tl.where(length <= max_length, row_sum, float("nan"))  # which no later sum removes
    state = (acc, row_sum, row_max)
    k_ptr += batch.to(tl.int64) * k_strides[0] + kv_head.to(tl.int64) * k_strides[1]
    v_ptr += batch.to(tl.int64) * v_strides[0] + kv_head.to(tl.int64) * v_strides[1]
    scales = None
    if k_scales_ptr is not None:
        of_pair = batch.to(tl.int64), kv_head.to(tl.int64)
        scales = (
            k_scales_ptr + of_pair[0] * scale_strides[0][0] + of_pair[1] * scale_strides[0][1],
            v_scales_ptr + of_pair[0] * scale_strides[1][0] + of_pair[1] * scale_strides[1][1],
        )
    state = attend_tiles(
        state, q, q_pos - oldest, k_ptr, v_ptr, k_strides[2], v_strides[2], edges, num_keys, oldest % num_slots,
        num_slots, window, None, scale_log2, cap_scale, HEAD_DIM, BLOCK_N, PRECISION, True, scales,
    )  # fmt: skip
    state = attend_tiles(
        state, q, q_pos - oldest, k_ptr, v_ptr, k_strides[2], v_strides[2], interior, num_keys, oldest % num_slots,
        num_slots, window, None, scale_log2, cap_scale, HEAD_DIM, BLOCK_N, PRECISION, False, scales,
    )  # fmt: skip
    acc, row_sum, row_max = state
    if scales is not None:
        acc = acc / VALUE_UNIT
    row_sum = tl.sum(row_sum, 1)

    out_row = (batch.to(tl.int64) * num_kv_heads * GROUP + head) * num_new + token
    if acc_ptr is None:
        # a row that saw nothing has acc = 0; NaN is a sum, too
        out = acc / tl.where(row_sum != 0, row_sum, 1.0)[:, None]
        out_rows = out_ptr + row_offset(batch, head, token, in_elements(strides[3], UNIT))[:, None]
        tl.store(out_rows + element[None, :], out.to(out_ptr.dtype.element_ty), mask=ok)
        if lse_ptr is not None:
            lse_log2 = tl.where(row_sum != 0, row_max * scale_log2 + tl.log2(row_sum), float("-inf"))
            tl.store(lse_ptr + out_row, lse_log2 * LN_2, mask=in_rows)
    else:
        partial = out_row * num_splits + split
        tl.store(max_ptr + partial, row_max * scale_log2, mask=in_rows)
        tl.store(sum_ptr + partial, row_sum, mask=in_rows)
        tl.store(acc_ptr + partial[:, None] * HEAD_DIM + element[None, :], acc, mask=ok)


@triton.jit(do_not_specialize=["num_new", "num_heads", "num_splits"])
def combine_kernel(
    acc_ptr, max_ptr, sum_ptr, out_ptr, lse_ptr, out_strides, num_new, num_heads, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one row, BLOCK_S at a time: the online softmax again, with a part in the place of a key."""
    WIDE: tl.constexpr = acc_ptr.dtype.element_ty
    row = tl.program_id(0)
    element, in_head = head_columns(HEAD_DIM)
    acc = tl.zeros((head_block(HEAD_DIM),), dtype=WIDE)
    row_sum = tl.zeros((1,), dtype=WIDE)
    row_max = tl.full((1,), float("-inf"), dtype=WIDE)
    for first in range(0, num_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        in_splits = split < num_splits
        partial = row.to(tl.int64) * num_splits + split
        part_max = tl.load(max_ptr + partial, mask=in_splits, other=float("-inf"))
        part_sum = tl.load(sum_ptr + partial, mask=in_splits, other=0.0)
        ok = in_splits[:, None] & in_head[None, :]
        part = tl.load(acc_ptr + partial[:, None] * HEAD_DIM + element[None, :], mask=ok, other=0.0)
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(part_max - pivot)
        rescale = tl.exp2(row_max - pivot)
        acc = acc * rescale + tl.sum(part * weight[:, None], 0)
        row_sum = row_sum * rescale + tl.sum(part_sum * weight, 0)
        row_max = new_max
    out = acc / tl.where(row_sum != 0, row_sum, 1.0)
    token = row % num_new
    head = row // num_new % num_heads
    out_row = row_offset(row // (num_new * num_heads), head, token, out_strides)
    tl.store(out_ptr + out_row + element, out.to(out_ptr.dtype.element_ty), mask=in_head)
    if lse_ptr is not None:
        lse_log2 = tl.where(row_sum != 0, row_max + tl.log2(row_sum), float("-inf"))
        tl.store(lse_ptr + row + tl.arange(0, 1), lse_log2 * LN_2)


def append(k, v, k_cache, v_cache, lengths, *, rope=None, scales=None):
    """`append_to_cache`: one launch. scales: (k_scales, v_scales) of rings of int8."""
    B, H, T, D = k.shape
    rows = B * H * T
    if rows * D == 0:
        return
    v = v if v.stride(3) == 1 else v.contiguous()
    cos, sin, rotary_dim = rotary_tables(rope)
    num_positions = 0 if cos is None else cos.shape[0]
    unit, strides = strides_of(k, v, k_cache, v_cache)
    with torch.cuda.device_of(k):
        append_kernel[(blocks_of(rows, APPEND_ROWS),)](
            k, v, k_cache, v_cache, lengths.contiguous(), cos, sin, *(scales or (None, None)),
            strides, _strides_of_scales(scales), rows, T, H, k_cache.shape[2], num_positions,
            HEAD_DIM=D, ROTARY_DIM=rotary_dim, UNIT=unit, BLOCK_M=APPEND_ROWS, num_warps=1,
        )  # fmt: skip


def attend_to_cache(
    q, k_cache, v_cache, lengths, window=None, *, scale, softcap=None, sinks=None, rope=None,
    scales=None, config=None, num_splits=None, lse=None,
):  # fmt: skip
    """`sliding_gqa_decode`: one launch, or two if the keys are split.

    config, num_splits: in place of the table's DecodeTile and of what `split_count` says. lse (B, Hq, T) is written to.
    """
    B, Hq, T, D = q.shape
    Hkv, C = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    group, rows = Hq // Hkv, Hq // Hkv * T
    arch = tile_configs.architecture(q.device)
    config = config or tile_configs.tile_config("decode", D, q.dtype, arch)
    block_m = min(config.BLOCK_M, max(16, 1 << (rows - 1).bit_length()))  # a power of two
    programs = B * Hkv * blocks_of(rows, block_m)
    if num_splits is None:
        keys = C if window is None else min(C, window + T - 1)
        num_splits = split_count(programs, blocks_of(keys, config.BLOCK_N), tile_configs.processors(q.device))
    acc = maxima = sums = None
    if num_splits > 1:
        wide = torch.promote_types(q.dtype, torch.float32)
        acc = q.new_empty((B * Hq * T, num_splits, D), dtype=wide)
        maxima, sums = (q.new_empty((B * Hq * T, num_splits), dtype=wide) for _ in range(2))
    sinks = None if sinks is None else sinks.contiguous()
    cos, sin, rotary_dim = rotary_tables(rope)
    num_positions = 0 if cos is None else cos.shape[0]
    scale_log2, cap_scale = softmax_scales(scale, softcap)
    unit, strides = strides_of(q, k_cache, v_cache, out)
    with torch.cuda.device_of(q):
        decode_kernel[(programs * num_splits,)](
            q, k_cache, v_cache, lengths.contiguous(), sinks, cos, sin, *(scales or (None, None)),
            out, lse, acc, maxima, sums,
            strides, _strides_of_scales(scales),
            T, Hkv, C, C if window is None else window, C if window is None else 2**31 - 1, num_positions, num_splits,
            scale_log2, cap_scale,
            HEAD_DIM=D, ROTARY_DIM=rotary_dim, GROUP=group, UNIT=unit, BLOCK_M=block_m, BLOCK_N=config.BLOCK_N,
            PRECISION=tile_configs.dot_precision(q.dtype, arch),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if num_splits > 1:
            combine_kernel[(B * Hq * T,)](
                acc, maxima, sums, out, lse, out.stride()[:3], T, Hq, num_splits, HEAD_DIM=D, BLOCK_S=COMBINE_SPLITS,
                num_warps=8, num_stages=1,
            )  # fmt: skip
    return out


def _strides_of_scales(scales):
    return None if scales is None else tuple([x.stride() for x in scales])


@functools.lru_cache(maxsize=1024)  # batches that grow and shrink ask for many, the layers of a step for the same
def split_count(programs, tiles, processors):
    """Into how many parts to cut the `tiles` tiles of keys of each of `programs` row blocks.

    RESIDENT x processors programs run at a time. A cut shortens each, but each has to start, and the parts have to be
    combined: the fewest parts that come within 5 % of the shortest time. Nothing here depends on lengths, so that one
    CUDA graph serves every step. More parts of which the longest has as many tiles only make more waves, so the fewest
    parts for each length are weighed: at most 2 sqrt(tiles) numbers.
    """
    times, splits = {}, 1
    while True:
        longest = -(-tiles // splits)
        waves = -(-programs * splits // (RESIDENT * processors))
        times[splits] = waves * (longest + START) + (COMBINE if splits > 1 else 0)
        if longest <= 1:
            break
        splits = -(-tiles // (longest - 1))
    shortest = min(times.values())
    return next(splits for splits, time in times.items() if time <= 1.05 * shortest)
