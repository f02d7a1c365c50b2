"""What the attention kernels share: rows and columns of a tile, the tiles of a band, loads, rotation, one softmax step.

A tile's rows are queries. The query heads of one KV head are packed into them, so that each key tile is read once for
PACK heads and a row block spans BLOCK_Q = BLOCK_M / PACK positions, which keeps the band tight:

    row      0        1        2        3        4        5     ...     PACK = 2
    query    t        t        t + 1    t + 1    t + 2    t + 2
    head     h        h + 1    h        h + 1    h        h + 1

Its columns are keys. A row block needs the tiles between the window's edge and the diagonal. Those that all of its rows
see whole are its interior, and need no mask; `e` are its edges. BLOCK_Q = 2, BLOCK_N = 2, window = 5:

    keys        0 1   2 3   4 5   6 7   8 9
    query 6     . .   1 1   1 1   1 .   . .
    query 7     . .   . 1   1 1   1 1   . .
    tiles              e     i     e
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)  # log2(e)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Weights of int8 values are so many times too large until their walk is over: in fp16, a weight times a scale would be
# below the numbers that have all their bits. 128 could overflow: a scale is up to 65504 / 127.
VALUE_UNIT: tl.constexpr = tl.constexpr(64.0)


@triton.constexpr_function
def wide_dtype(dtype):
    """What sums are kept in: fp32, or fp64 for fp64 inputs."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.constexpr_function
def pair_block(rotary_dim):
    """Columns that one half of the rotary pairs takes in a tile: a power of two, 0 without rotation."""
    return triton.next_power_of_2(rotary_dim // 2) if rotary_dim else 0


@triton.constexpr_function
def head_block(head_dim, rotary_dim=0):
    """Columns of a tile that holds q or k: a power of two, at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(2 * pair_block(rotary_dim) + head_dim - rotary_dim))


@triton.jit
def head_columns(HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr = 0):
    """The element of the head that each column of a q or k tile holds, and whether it holds one.

    Both halves of the rotary pairs are padded to a power of two, so that partners lie that far apart. D = R = 6:
        column   0  1  2  3  4  5  6  7
        element  0  1  2  .  3  4  5  .
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    HALF_BLOCK: tl.constexpr = pair_block(ROTARY_DIM)
    column = tl.arange(0, head_block(HEAD_DIM, ROTARY_DIM))
    if HALF == HALF_BLOCK:
        element = column
        in_head = column < HEAD_DIM
    else:
        in_first = column < HALF_BLOCK
        in_second = column < 2 * HALF_BLOCK
        past_first = column - (HALF_BLOCK - HALF)
        past_pairs = column - (2 * HALF_BLOCK - ROTARY_DIM)
        element = tl.where(in_first, column, tl.where(in_second, past_first, past_pairs))
        in_head = tl.where(in_first, element < HALF, tl.where(in_second, element < ROTARY_DIM, element < HEAD_DIM))
    return element, in_head


@triton.jit
def row_program(num_queries, num_kv_heads, GROUP: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr):
    """What this program owns: (batch, KV head, first of PACK query heads, block of BLOCK_Q queries).

    The programs of one (batch, KV head) are neighbours, so the keys of overlapping bands are found in L2. Without a
    window the last rows cost most: they start first.
    """
    PACKS: tl.constexpr = GROUP // PACK
    num_blocks = tl.cdiv(num_queries, BLOCK_Q)
    pair = tl.program_id(0) // (num_blocks * PACKS)
    rest = tl.program_id(0) % (num_blocks * PACKS)
    kv_head = pair % num_kv_heads
    first_head = kv_head * GROUP + rest % PACKS * PACK
    return pair // num_kv_heads, kv_head, first_head, num_blocks - 1 - rest // PACKS


@triton.jit
def packed_rows(first_query, first_head, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """(query, head) of each row of a tile."""
    row = tl.arange(0, BLOCK_M)
    return first_query + row // PACK, first_head + row % PACK


@triton.jit
def recomputed(index, length):
    """index, hidden from the compiler by a term that is 0 for any length: what follows from it is recomputed.

    Without it, positions, masks and addresses of the prologue would wait in registers for the epilogue, over the loops.
    """
    return index + tl.where(length < 0, 1, 0)


@triton.jit
def in_elements(strides, UNIT: tl.constexpr):
    """Strides of `strides_of` in elements: products that the compiler sees to be multiples of UNIT."""
    if UNIT == 1:
        return strides
    else:
        unit = tl.full((), UNIT, tl.int64)
        return strides[0] * unit, strides[1] * unit, strides[2] * unit


@triton.jit
def wide_stride(stride):
    """A stride in 64 bits; one of 1 comes as a constant, which has no type to cast."""
    return tl.full((), 0, tl.int64) + stride


@triton.jit
def row_offset(batch, head, position, strides):
    """Elements before a row, in 64 bits: each product with a stride may pass 2**31."""
    batch, head, position = batch.to(tl.int64), head.to(tl.int64), position.to(tl.int64)
    return batch * strides[0] + head * strides[1] + position * strides[2]


@triton.jit
def of_row(ptr, batch, num_positions):
    """A pointer to starts or ends (B, num_positions) at one row; None stays None."""
    if ptr is None:
        return None
    else:
        return ptr + batch.to(tl.int64) * num_positions


@triton.jit
def first_of(position, left, num_positions=None, starts_ptr=None):
    """The first of the `left` positions up to `position`, as far as they are in its document.

    starts_ptr: where the document of each of num_positions begins; None where there are none.
    """
    first = position - left + 1
    if starts_ptr is not None:
        # a position is in its own document: no value of starts may lead a walk out of the tensors
        start = tl.load(starts_ptr + tl.minimum(position, num_positions - 1))
        first = tl.maximum(first, tl.minimum(start, position))
    return first


@triton.jit
def end_of(position, right, num_positions=None, ends_ptr=None):
    """Where the `right` positions from `position` on end, as far as they are in its document; see `first_of`."""
    end = position + right
    if ends_ptr is not None:
        past = tl.load(ends_ptr + tl.minimum(position, num_positions - 1))
        end = tl.minimum(end, tl.maximum(past, position + 1))
    return end


@triton.jit
def limits_of(position, left, right, num_positions, starts_ptr, ends_ptr):
    """(first, end) of the positions that each of `position` sees, or that see it, as columns: see `visible`."""
    first = first_of(position, left, num_positions, starts_ptr)
    end = tl.minimum(end_of(position, right, num_positions, ends_ptr), num_positions)
    return first[:, None], end[:, None]


@triton.jit
def key_spans(
    first_pos, last_pos, window, EDGE_N: tl.constexpr, BLOCK_N: tl.constexpr, later=None, num_keys=None,
    starts_ptr=None, ends_ptr=None,
):  # fmt: skip
    """The keys that queries first_pos .. last_pos need, as two walks: (edges, interior). See `walk_start`.

    The interior is whole tiles of BLOCK_N that every query sees, the edges are tiles of EDGE_N to the left and to the
    right of it. Needed is the union over the queries, unmasked their intersection. What a query sees begins and ends
    no earlier than for the query before it, also with documents: so the first and the last query say both.

    later: the keys from a query's own on, this one included, as `window` counts those up to it; None: its own alone.
    """
    begin = tl.maximum(first_of(first_pos, window, num_keys, starts_ptr), 0) // EDGE_N * EDGE_N
    if later is None:
        end = (last_pos // EDGE_N + 1) * EDGE_N
    else:
        end = tl.cdiv(tl.minimum(end_of(last_pos, later, num_keys, ends_ptr), num_keys), EDGE_N) * EDGE_N
    past_begin = tl.maximum(first_of(last_pos, window, num_keys, starts_ptr), 0)
    full_begin = tl.minimum(tl.cdiv(past_begin, EDGE_N) * EDGE_N, end)
    past_full = first_pos + 1
    if later is not None:
        past_full = tl.minimum(end_of(first_pos, later, num_keys, ends_ptr), num_keys)
    full_end = tl.maximum(past_full // EDGE_N * EDGE_N, full_begin)
    return _spans(begin, full_begin, full_end, end, EDGE_N, BLOCK_N)


@triton.jit
def query_spans(
    first_key, last_key, window, offset, num_queries, EDGE_Q: tl.constexpr, BLOCK_Q: tl.constexpr, later=1,
    num_keys=None, starts_ptr=None, ends_ptr=None,
):  # fmt: skip
    """The transpose of `key_spans`: the queries that see keys first_key .. last_key. offset: the position of query 0.

    A tile that runs past the last query is an edge, so that the interior's loads need no mask either.
    """
    begin = tl.maximum(first_of(first_key, later, num_keys, starts_ptr) - offset, 0) // EDGE_Q * EDGE_Q
    past_last = tl.maximum(tl.minimum(end_of(last_key, window, num_keys, ends_ptr) - offset, num_queries), 0)
    end = tl.maximum(tl.cdiv(past_last, EDGE_Q) * EDGE_Q, begin)
    past_begin = tl.maximum(first_of(last_key, later, num_keys, starts_ptr) - offset, 0)
    full_begin = tl.minimum(tl.cdiv(past_begin, EDGE_Q) * EDGE_Q, end)
    past_full = tl.maximum(tl.minimum(end_of(first_key, window, num_keys, ends_ptr) - offset, num_queries), 0)
    full_end = tl.maximum(past_full // EDGE_Q * EDGE_Q, full_begin)
    return _spans(begin, full_begin, full_end, end, EDGE_Q, BLOCK_Q)


@triton.jit
def _spans(begin, full_begin, full_end, end, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    full_end -= (full_end - full_begin) % BLOCK
    edges = (begin, full_begin, full_end, (full_begin - begin + end - full_end) // EDGE)
    interior = (full_begin, full_end, full_end, (full_end - full_begin) // BLOCK)
    return edges, interior


@triton.jit
def walk_start(span, MASKED: tl.constexpr):
    """Where a walk over span = (first, end_first, second, number of tiles) begins.

    It goes from `first` on, and where it comes to end_first, from `second` on: both edges are one loop. The interior
    (not MASKED) is in one piece.
    """
    first, end_first, second, _ = span
    if MASKED:
        first = tl.where(first == end_first, second, first)
    return first


@triton.jit
def walk_step(start, span, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """How far the tile after the one at `start` is."""
    _, end_first, second, _ = span
    step = BLOCK
    if MASKED:
        step += tl.where(start + BLOCK == end_first, second - end_first, 0)
    return step


@triton.jit
def visible(q_pos, k_pos, window, limits=None, OF_KEYS: tl.constexpr = False):
    """Causal sliding window: a query sees the `window` newest keys, its own included.

    limits: what documents leave of that, as (first, end) of the keys that each query sees, or OF_KEYS of the queries
    that see each key. They are made before the loop, so that they cost no instruction in it.
    """
    if limits is None:
        return (k_pos <= q_pos) & (k_pos > q_pos - window)
    else:
        position = q_pos if OF_KEYS else k_pos
        return (position >= limits[0]) & (position < limits[1])


@triton.jit
def load_tile(ptrs, row_ok, column_ok, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile with zeros outside of it. ROWS, COLUMNS: whether that mask is needed; without, it costs nothing."""
    if ROWS and COLUMNS:
        return tl.load(ptrs, mask=row_ok & column_ok, other=0.0)
    elif ROWS:
        return tl.load(ptrs, mask=row_ok, other=0.0)
    elif COLUMNS:
        return tl.load(ptrs, mask=column_ok, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_rotated(ptr, row, element, ok, position, cos_ptr, sin_ptr, ROTARY_DIM: tl.constexpr, num_positions=None):
    """Load the elements (1, columns) of rows that begin at `row` (rows, 1), rotated by the angle of a row's position.

    (a, b) -> (a cos - b sin, b cos + a sin) in wide precision, rounded once. The partner of every element is loaded
    beside it: a second read of lines that are in L1 by then, instead of moving elements between threads.

    ok: which of them there are, None for all. num_positions: rows of the tables, for positions that the host has not
    seen: where a table ends, the row is NaN.
    """
    x = load_tile(ptr + element + row, ok, None, ok is not None, False)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        is_first = element < HALF
        in_pairs = element < ROTARY_DIM
        if ok is not None:
            in_pairs &= ok
        partner = tl.load(ptr + tl.where(is_first, element + HALF, element - HALF) + row, mask=in_pairs, other=0.0)
        angle = position.to(tl.int64) * HALF + element % HALF
        if num_positions is not None:
            in_table = (position >= 0) & (position < num_positions)
            in_pairs &= in_table
        cos = tl.load(cos_ptr + angle, mask=in_pairs, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=in_pairs, other=0.0)
        if num_positions is not None:
            cos = tl.where(in_table, cos, float("nan"))
        wide = wide_dtype(x.dtype)
        x = (x.to(wide) * cos + partner.to(wide) * tl.where(is_first, -sin, sin)).to(x.dtype)
    # No select on x here, though it makes Hopper's loop 15 instructions shorter: a plain load stays in shared memory,
    # where products address it by descriptors. On an H200 that is 2 to 9 % of the forward (docs/kernels.md).
    if num_positions is not None:
        x = tl.where(ok, x, 0.0)  # no NaN where there is no element
    return x


@triton.jit
def rotate_back(tile, position, row_ok, cos_ptr, sin_ptr, ROTARY_DIM: tl.constexpr):
    """The transpose of the rotation, for a wide gradient tile (rows, columns of `head_columns`) of given positions.

    (a, b) -> (a cos + b sin, b cos - a sin). Columns past the pairs are rotated by the angle 0.
    """
    BLOCK_M: tl.constexpr = tile.shape[0]
    BLOCK_D: tl.constexpr = tile.shape[1]
    HALF: tl.constexpr = ROTARY_DIM // 2
    HALF_BLOCK: tl.constexpr = pair_block(ROTARY_DIM)
    PAIRS: tl.constexpr = BLOCK_D // (2 * HALF_BLOCK)
    pair = tl.arange(0, BLOCK_D // 2)
    angle = position.to(tl.int64)[:, None] * HALF + pair[None, :]
    in_pairs = row_ok[:, None] & (pair < HALF)[None, :]
    cos = tl.load(cos_ptr + angle, mask=in_pairs, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=in_pairs, other=0.0)
    # (rows, PAIRS, 2, half): bring the 2 to the end, where split and join work
    halves = tl.permute(tl.reshape(tile, (BLOCK_M, PAIRS, 2, HALF_BLOCK)), (0, 1, 3, 2))
    a, b = tl.split(tl.reshape(halves, (BLOCK_M, BLOCK_D // 2, 2)))
    halves = tl.reshape(tl.join(a * cos + b * sin, b * cos - a * sin), (BLOCK_M, PAIRS, HALF_BLOCK, 2))
    return tl.reshape(tl.permute(halves, (0, 1, 3, 2)), (BLOCK_M, BLOCK_D))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in wide precision; acc may be None."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=wide_dtype(a.dtype))


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """tanh(x) = 1 - 2 / (1 + e^2x), in 6 instructions; ACCURATE, for fp32 inputs and wider, takes 20."""
    denominator = 1 + tl.exp2(x * (2 * LOG2_E))
    if ACCURATE:
        x2 = x * x
        # near 0 the difference cancels: Taylor series to x^13, within an ulp of fp32 below 0.45
        tail = 62 / 2835 + x2 * (-1382 / 155925 + x2 * (21844 / 6081075))
        series = x + x * x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * tail)))
        near = 0.45 if x.dtype == tl.float32 else 0.01
        return tl.where(tl.abs(x) < near, series, 1 - 2 / denominator)
    else:
        root = tl.rsqrt(denominator)  # its square is the quotient without a division's range checks
        return 1 - 2 * (root * root)


@triton.jit
def softmax_step(state, scores, v, scale_log2, PRECISION: tl.constexpr, MASKED: tl.constexpr, v_scale=None):
    """Fold one tile of scores and its values into state = (acc, row_sum, row_max) of the online softmax.

    v_scale (keys,): what the values are to be multiplied by, times VALUE_UNIT; the weights are instead.
    row_sum (rows, n) is the sums over every n-th column, see `tile_configs.partial_sums`.
    Weights are 2^(scale_log2 * (score - row_max)): the scale costs nothing, since it rides on the subtraction's FMA.
    """
    acc, row_sum, row_max = state
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    finite_max = new_max
    if MASKED:
        # a row that has seen no key yet has the maximum -inf, and -inf - -inf is NaN: subtract 0 instead
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores * scale_log2 - (finite_max * scale_log2)[:, None])
    # Maxima are subtracted before they are scaled, so that the factor is 1 where none has risen. The difference of two
    # products would become one FMA and give the rounding error of the pivot, again and again with every tile
    rescale = tl.exp2((row_max - finite_max) * scale_log2)
    SUMS: tl.constexpr = row_sum.shape[1]
    partial = tl.reshape(p, (p.shape[0], p.shape[1] // SUMS, SUMS))
    row_sum = row_sum * rescale[:, None] + tl.sum(partial, 1)
    if v_scale is not None:
        p = p * v_scale[None, :]
    acc = dot(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)
    return acc, row_sum, new_max


@triton.jit
def ring_slot(oldest_slot, key, num_slots):
    """The slot of each key; they go over the end of the ring once at most, in any tile."""
    slot = oldest_slot + key
    return tl.where(slot < num_slots, slot, slot - num_slots)


@triton.jit
def attend_tiles(
    state, q, q_pos, k_ptr, v_ptr, k_stride, v_stride, span, num_keys, oldest_slot, num_slots, window, limits,
    scale_log2, cap_scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, scales=None,
):  # fmt: skip
    """The walk of one row block over the key tiles of `span`; q_pos is the position of each row's query among the keys.

    num_slots: keys lie in a ring, from oldest_slot on; None where they lie in order.
    scales: of a ring of int8, pointers to those of the keys and of the values. They multiply scores and weights.
    """
    PADDED: tl.constexpr = head_block(HEAD_DIM) != HEAD_DIM
    element, in_head = head_columns(HEAD_DIM)
    start = walk_start(span, MASKED)
    if num_slots is None:
        key = start.to(tl.int64) + tl.arange(0, BLOCK_N)
        # pointers are carried, not computed: a 64-bit product a tile costs 10 to 20 instructions
        k_ptrs = k_ptr + element[:, None] + key[None, :] * k_stride
        v_ptrs = v_ptr + element[None, :] + key[:, None] * v_stride
    for _ in range(span[3]):
        k_pos = start + tl.arange(0, BLOCK_N)
        in_keys = k_pos < num_keys
        if num_slots is not None:
            slot = ring_slot(oldest_slot, k_pos, num_slots).to(tl.int64)
            k_ptrs = k_ptr + element[:, None] + slot[None, :] * k_stride
            v_ptrs = v_ptr + element[None, :] + slot[:, None] * v_stride
        k = load_tile(k_ptrs, in_keys[None, :], in_head[:, None], MASKED, PADDED)
        v_scale = None
        if scales is not None:
            k = k.to(q.dtype)
            v_scale = load_tile(scales[1] + slot, in_keys, None, MASKED, False) * VALUE_UNIT
        scores = dot(q, k, None, PRECISION)
        if scales is not None:
            scores *= load_tile(scales[0] + slot, in_keys, None, MASKED, False)[None, :]
        if cap_scale is not None:
            scores = tanh(scores * cap_scale, q.dtype.primitive_bitwidth > 16)
        if MASKED:
            scores = tl.where(visible(q_pos[:, None], k_pos[None, :], window, limits), scores, float("-inf"))
        if scales is None:
            v = load_tile(v_ptrs, in_keys[:, None], in_head[None, :], MASKED, PADDED)
        else:
            # as the transpose of a tile like k's: otherwise bytes of a row-major operand are copied 8 at a time, not 16
            v_ptrs = v_ptr + element[:, None] + slot[None, :] * v_stride
            v = tl.trans(load_tile(v_ptrs, in_keys[None, :], in_head[:, None], MASKED, PADDED)).to(q.dtype)
        state = softmax_step(state, scores, v, scale_log2, PRECISION, MASKED, v_scale)
        step = walk_step(start, span, BLOCK_N, MASKED)
        start += step
        if num_slots is None:
            k_ptrs += step * wide_stride(k_stride)
            v_ptrs += step * wide_stride(v_stride)
    return state
