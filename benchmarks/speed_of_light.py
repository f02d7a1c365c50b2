"""A model of how fast a compiled kernel can run: bounds from its instructions, its bytes and a card's data sheet.

Nothing here was measured on a GPU. Each formula is one function. Attention has two bounds:

    overlapped   the busiest pipe is never idle:  max over all pipes, and memory
    serial       a tile's products wait for its softmax, and its softmax for the products:
                 max(matrix unit, shared memory) + max(issue, ALU, FMA, MUFU); or L2 or memory if that takes longer

Triton's code has no warp specialisation and should lie between them. The model assumes boost clocks, latencies that
other warps hide (wrong for short loops and for one program a multiprocessor), the full bandwidth of the memory, inputs
that are read once from memory and then from L2, no bank conflicts, and full waves of programs except for the last one.

Memory bounds the rotation and decoding. tune_tiles.py ranks the tiles of decoding by `decode_ms`, a model of latency: a
memory reaches its bandwidth only with enough loads in flight.
"""

import functools
import re
from typing import NamedTuple

import harness  # noqa: F401  # first: it puts the root of the repository on the path, so that `kernels` is ours
from measure import peak_of

from kernels import compiled
from kernels.backends.triton.decode import split_count
from kernels.band import visible_pairs

ISSUE_SLOTS = 4  # warp instructions that a multiprocessor issues in a cycle
SHARED_BYTES = 128  # that shared memory moves in a cycle
# Time of a product over that of 16-bit inputs: three TF32 products, each at half the rate; plain fp32 on an MI300X
PRODUCTS = {2: 1, 4: 6}
AMD_PRODUCTS = {2: 1, 4: 8}
# Of a load in a busy memory: about twice the 470 to 540 cycles of an idle A100, H100 or 4090 (arXiv:2402.13499)
LATENCY_CYCLES = 1000
STARTING_READS = 3  # of a decode program, one after the other: lengths, q, the first tile of keys
# Share of the full rate that HMMA reaches where only warp-group instructions reach all of it: 63 % on an H100
# (arXiv:2402.13499); a quarter on a B200 is a guess
HMMA_RATE = {"sm_90": 0.63, "sm_100": 0.25}


class Card(compiled.Card):
    """A card of kernels.compiled, with the rates that follow from its data sheet."""

    __slots__ = ()

    @property
    def l2_bytes(self):
        """Bytes that a multiprocessor gets from L2 in a cycle: its share of all, at most what its port takes."""
        return min(64, self.l2 / self.multiprocessors)

    @property
    def flops(self):
        """FLOP/s of the matrix unit, 16-bit inputs, fp32 sums."""
        return peak_of(self.name).tflops * 1e12

    @property
    def flops_per_cycle(self):
        """Of one multiprocessor."""
        return self.flops / (self.multiprocessors * self.gigahertz * 1e9)

    @property
    def bytes_per_second(self):
        """Of the memory."""
        return peak_of(self.name).gb_per_second * 1e9


CARDS = {target: Card(*card) for target, card in compiled.CARDS.items()}


class Shape(NamedTuple):
    B: int
    Hq: int
    Hkv: int
    T: int
    D: int
    W: int | None  # None: causal without a window

    @property
    def window(self):
        return self.T if self.W is None else min(self.W, self.T)


class Estimate(NamedTuple):
    """The model's figures for one kernel at one shape. Cycles are those of one program, all its loops together."""

    cycles: dict  # {pipe: cycles}
    efficiency: float  # visible pairs over computed pairs
    useful_flops: float
    bytes: float
    memory_ms: float
    overlapped_ms: float
    serial_ms: float
    bound_by: str  # the pipe, or "memory"
    runner_up: str  # what would bound next
    margin: float  # the time of the runner-up over that of bound_by


@functools.cache
def row_tiles(T, W, queries, edge, step):
    """(edge tiles, interior tiles) of all row blocks of `queries` queries; `tiles.key_spans` in closed form."""
    edges = interior = 0
    for first in range(0, T, queries):
        last = min(first + queries, T) - 1
        begin = max(first - W + 1, 0) // edge * edge
        end = (last // edge + 1) * edge
        full_begin = min(-(-max(last - W + 1, 0) // edge) * edge, end)
        full_end = max((first + 1) // edge * edge, full_begin)
        counted = _tiles(begin, full_begin, full_end, end, edge, step)
        edges, interior = edges + counted[0], interior + counted[1]
    return edges, interior


@functools.cache
def key_tiles(T, W, keys, edge, step):
    """(edge tiles, interior tiles) of all blocks of `keys` keys, tiles of queries: `tiles.query_spans`."""
    edges = interior = 0
    for first in range(0, T, keys):
        last = min(first + keys, T) - 1
        begin = first // edge * edge
        end = max(-(-min(last + W, T) // edge) * edge, begin)
        full_begin = min(-(-last // edge) * edge, end)
        full_end = max(min(first + W, T) // edge * edge, full_begin)
        counted = _tiles(begin, full_begin, full_end, end, edge, step)
        edges, interior = edges + counted[0], interior + counted[1]
    return edges, interior


def _tiles(begin, full_begin, full_end, end, edge, step):
    full_end -= (full_end - full_begin) % step
    return (full_begin - begin + end - full_end) // edge, (full_end - full_begin) // step


def work_efficiency(T, W, own, edge, step, pack, tiles=row_tiles):
    """Visible pairs over computed pairs of a head; own, edge, step in rows (queries x pack heads) or keys.

    With row_tiles own counts rows, edge and step keys; with key_tiles own counts keys, edge and step rows.
    """
    if tiles is row_tiles:
        edges, interior = row_tiles(T, W, own // pack, edge, step)
        computed = own // pack * (edges * edge + interior * step)
    else:
        edges, interior = key_tiles(T, W, own, edge // pack, step // pack)
        computed = own * (edges * edge + interior * step) // pack
    return visible_pairs(T, T, W) / computed


def products_of(target):
    """{bytes an element: time of a product over that of 16-bit inputs}."""
    return AMD_PRODUCTS if target.startswith("gfx") else PRODUCTS


def matrix_cycles(rows, columns, depth, products, card, target, element_bytes, instructions):
    """Cycles of the matrix unit for `products` products of rows x columns x depth: 2 FLOP each, over its rate."""
    rate = card.flops_per_cycle / products_of(target)[element_bytes]
    if not any(name.startswith(("HGMMA", "UTC")) for name in instructions):
        rate *= HMMA_RATE.get(target, 1)
    return products * 2 * rows * columns * depth / rate


def pipe_cycles(pipes, opcodes, warps, card):
    """{pipe: cycles} for one step of a loop: instructions x warps x lanes of a warp, over the lanes of the pipe."""

    def lanes(count, width):
        return count * warps * card.warp_size / width

    packed = sum(count for name, count in opcodes.items() if re.match(r"F(FMA|MUL|ADD)2\b", name))  # two in one
    multiplying = pipes.get("fma", 0) + packed
    return {
        "issue": sum(opcodes.values()) * warps / ISSUE_SLOTS,
        "alu": lanes(pipes.get("alu", 0) + card.fma_in_alu * multiplying, card.alu),
        "fma": lanes(multiplying, card.fma),
        "mufu": lanes(pipes.get("mufu", 0), card.mufu),
        "shared": sum(_shared_bytes(name) * count for name, count in opcodes.items()) * warps / SHARED_BYTES,
    }


@functools.cache
def _shared_bytes(name):
    """Bytes of shared memory that one warp's instruction moves; a shuffle takes as long as 4 bytes a lane."""
    if matrices := re.match(r"(?:LDSM|STSM)\.16\.MT?88(?:\.(\d))?", name):
        return 128 * int(matrices.group(1) or 1)  # of 8 x 8 16-bit elements
    if plain := re.match(r"(?:LDS|STS)(?:\.U?S?(\d+))?", name):
        return 32 * max(4, int(plain.group(1) or 32) // 8)
    if name.startswith("LDGSTS"):
        return 32 * (int(found.group(1)) // 8 if (found := re.search(r"\.(\d+)", name)) else 4)
    if amd := re.match(r"ds_(?:read|write)(2)?(?:st64)?_(?:[bui])(\d+)", name):
        return 64 * max(4, int(amd.group(2)) // 8) * (2 if amd.group(1) else 1)
    if re.match(r"ds_(bpermute|permute|swizzle)", name):
        return 64 * 4
    if group := re.match(r"HGMMA\.64x(\d+)x(\d+)", name):
        return int(group.group(1)) * 32 / 4  # its (columns x 32 bytes) operand, once for the 4 warps of a group
    return 128 if name.startswith("SHFL") else 0


def l2_cycles(rows, head_dim, element_bytes, card):
    """Two tiles of `rows` rows (k and v, or q and do); each program fetches its own."""
    return 2 * rows * head_dim * element_bytes / card.l2_bytes


def serial_cycles(cycles):
    """A tile's products, during which operands are read, then its softmax; copies overlap with both."""
    softmax = max(cycles[pipe] for pipe in ("issue", "alu", "fma", "mufu"))
    return max(max(cycles["matrix"], cycles["shared"]) + softmax, cycles["l2"])


def overlapped_cycles(cycles):
    """The busiest pipe alone."""
    return max(cycles.values())


def between(serial, overlapped, resident):
    """A time to rank by: serial for one program a multiprocessor, nearer to overlapped for several.

    Programs on one multiprocessor fill each other's gaps. We guess that n of them leave 1 / n of the gaps.
    """
    return overlapped + (serial - overlapped) / resident


def exposed_latency(num_stages):
    """Cycles that a step waits for its own loads: none with a second buffer, which receives the next tile early."""
    return LATENCY_CYCLES if num_stages < 2 else 0


def padded(head_dim):
    """Elements of a head in a product: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def wave_factor(programs, multiprocessors):
    """Time with the last, partly filled wave over the time without. A wave is one program a multiprocessor."""
    return -(-programs // multiprocessors) * multiprocessors / programs


def attention_bytes(kernel, shape, element_bytes, rope):
    """Bytes of inputs and outputs, which cross the memory's interface once (docs/kernels.md has the table)."""
    queries = shape.B * shape.Hq * shape.T * shape.D * element_bytes
    keys = shape.B * shape.Hkv * shape.T * shape.D * element_bytes
    rows = 4 * shape.B * shape.Hq * shape.T
    return {
        "attention_forward": 2 * queries + 2 * keys + rows,
        "attention_dq": (5 if rope else 4) * queries + 2 * keys + 3 * rows,
        "attention_dkdv": 2 * queries + 4 * keys + 2 * rows,
    }[kernel]


PRODUCTS_A_TILE = {"attention_forward": 2, "attention_dq": 3, "attention_dkdv": 4}  # FlashAttention-2, Alg. 1 and 2


def attention_estimate(made, shape, element_bytes, rope):
    """The `Estimate` of an attention kernel: forward, dq or dk/dv. None if its two loops were not found."""
    card, tile = CARDS[made.target], made.tile
    pack = tile["PACK"]
    loops = {loop.masked: loop for loop in made.loops}
    if set(loops) != {True, False}:
        return None
    T, W = shape.T, shape.window
    if made.kernel == "attention_dkdv":
        own, edge, step, tiles = tile["BLOCK_N"], tile["EDGE_M"], tile["BLOCK_M"], key_tiles
        counts = key_tiles(T, W, own, edge // pack, step // pack)
        programs = shape.B * shape.Hkv * -(-T // own)
        turns = shape.Hq // shape.Hkv // pack  # each program walks all packs of its group
    else:
        own, edge, step, tiles = tile["BLOCK_M"], tile["EDGE_N"], tile["BLOCK_N"], row_tiles
        counts = row_tiles(T, W, own // pack, edge, step)
        programs = shape.B * shape.Hq // pack * -(-T // (own // pack))
        turns = 1
    blocks = programs // (shape.B * (shape.Hkv if tiles is key_tiles else shape.Hq // pack))
    products = PRODUCTS_A_TILE[made.kernel]
    total = dict.fromkeys(("matrix", "issue", "alu", "fma", "mufu", "shared", "l2"), 0.0)
    serial = overlapped = 0.0
    for masked, count, width in ((True, counts[0], edge), (False, counts[1], step)):
        loop, times = loops[masked], turns * count / blocks  # a program's average
        cycles = pipe_cycles(loop.pipes, loop.opcodes, tile["num_warps"], card)
        cycles["matrix"] = matrix_cycles(
            own, width, padded(shape.D), products, card, made.target, element_bytes, made.matrix
        )
        cycles["l2"] = l2_cycles(width, shape.D, element_bytes, card)
        total = {pipe: total[pipe] + times * cycles[pipe] for pipe in total}
        serial += times * (serial_cycles(cycles) + exposed_latency(tile["num_stages"]))
        overlapped += times * overlapped_cycles(cycles)
    # the code before, between and after the loops runs once and overlaps with nothing
    outside = (made.instructions - sum(loop.instructions for loop in made.loops)) * tile["num_warps"] / ISSUE_SLOTS
    flops = products * 2 * shape.B * shape.Hq * visible_pairs(T, T, W) * shape.D
    efficiency = work_efficiency(T, W, own, edge, step, pack, tiles)
    moved = attention_bytes(made.kernel, shape, element_bytes, rope)
    factor = programs / card.multiprocessors * wave_factor(programs, card.multiprocessors) / (card.gigahertz * 1e6)
    return estimate_of(total, efficiency, flops, moved, overlapped * factor, (serial + outside) * factor, card)


def estimate_of(cycles, efficiency, flops, moved, overlapped_ms, serial_ms, card):
    memory_ms = moved / card.bytes_per_second * 1e3
    busiest = max(cycles, key=cycles.get)
    ms = {pipe: overlapped_ms * cycles[pipe] / cycles[busiest] for pipe in cycles} | {"memory": memory_ms}
    ranked = sorted(ms, key=ms.get, reverse=True)
    return Estimate(
        cycles,
        efficiency,
        flops,
        moved,
        memory_ms,
        max(overlapped_ms, memory_ms),
        max(serial_ms, memory_ms),
        bound_by=ranked[0],
        runner_up=ranked[1],
        margin=ms[ranked[1]] / ms[ranked[0]] if ms[ranked[0]] else 1.0,
    )


# of the size of q and k together, read or written: with a norm, the backward reads q and k as well as their gradients
TENSORS_ROTATED = {"rope": 2, "norm_rope": 2, "norm_rope_backward": 3}


def rope_bytes(shape, element_bytes, kernel="rope", programs=0):
    """q and k, read and written; for the weights' gradients a row of fp32 sums a program, written and read again."""
    moved = TENSORS_ROTATED[kernel] * shape.B * shape.T * (shape.Hq + shape.Hkv) * shape.D * element_bytes
    return moved + (8 * programs * shape.D if kernel == "norm_rope_backward" else 0)


def rope_estimate(made, shape, element_bytes):
    """The `Estimate` of the rotation: every byte crosses the memory's interface once, every instruction runs once."""
    card, cycles = CARDS[made.target], made.instructions * made.tile["num_warps"] / ISSUE_SLOTS
    heads = -(-shape.Hq // made.tile["BLOCK_H"]) + -(-shape.Hkv // made.tile["BLOCK_H"])
    programs = shape.B * -(-shape.T // made.tile["BLOCK_T"]) * heads
    issue_ms = cycles * programs / card.multiprocessors / (card.gigahertz * 1e6)
    moved = rope_bytes(shape, element_bytes, made.kernel, programs)
    return estimate_of({"issue": cycles}, 1.0, 0.0, moved, issue_ms, issue_ms, card)


def ring_bytes(head_dim, element_bytes, int8=False):
    """What the key and the value of one token and KV head take in a cache; of int8, with a scale in fp32 each."""
    return 2 * (head_dim + 4 if int8 else head_dim * element_bytes)


def decode_bytes(shape, element_bytes, int8=False):
    """The keys and values of the window, for one new token of each row of the batch; q and out."""
    keys = shape.Hkv * shape.window * ring_bytes(shape.D, element_bytes, int8)
    return shape.B * (keys + 2 * shape.Hq * shape.D * element_bytes)


def decode_cycles(made, shape, element_bytes, int8=False):
    """{pipe: cycles} of one interior tile of keys. None if its loop was not found."""
    card, interior = CARDS[made.target], next((loop for loop in made.loops if not loop.masked), None)
    if interior is None:
        return None
    rows, keys = made.tile["BLOCK_M"], made.tile["BLOCK_N"]
    cycles = pipe_cycles(interior.pipes, interior.opcodes, made.tile["num_warps"], card)
    cycles["matrix"] = matrix_cycles(rows, keys, padded(shape.D), 2, card, made.target, element_bytes, made.matrix)
    cycles["l2"] = l2_cycles(keys, shape.D, 1 if int8 else element_bytes, card)
    return cycles


def decode_estimate(made, shape, element_bytes, int8=False):
    """The `Estimate` of a decode step, one new token a row, every tile of keys once."""
    card, cycles = CARDS[made.target], decode_cycles(made, shape, element_bytes, int8)
    if cycles is None:
        return None
    tiles = shape.B * shape.Hkv * -(-shape.window // made.tile["BLOCK_N"])
    factor = tiles / card.multiprocessors / (card.gigahertz * 1e6)
    moved = decode_bytes(shape, element_bytes, int8)
    overlapped, serial = overlapped_cycles(cycles) * factor, serial_cycles(cycles) * factor
    return estimate_of(cycles, 1.0, 0.0, moved, overlapped, serial, card)


def decode_ms(made, shape, element_bytes):
    """A time to rank by: the longer of two. The first is the memory's, at the bandwidth that the loads in flight reach.
    The second is the chain of tiles in one program. `split_count`, the launcher's rule, gives the number of parts.
    """
    card, cycles = CARDS[made.target], decode_cycles(made, shape, element_bytes)
    if cycles is None:
        return float("inf")
    keys, ahead = made.tile["BLOCK_N"], made.tile["num_stages"] - 1
    rows, tiles = shape.B * shape.Hkv, -(-shape.window // keys)
    splits = split_count(rows, tiles, card.multiprocessors)
    places = made.blocks_per_multiprocessor * card.multiprocessors
    resident = -(-min(rows * splits, places) // card.multiprocessors)
    # memory: whole tiles, and the parts of the result written and read in fp32
    tile_bytes = 2 * keys * shape.D * element_bytes
    partial = 8 * shape.B * shape.Hq * splits * shape.D if splits > 1 else 0
    in_flight = max(1, ahead) * tile_bytes * min(rows * splits, places) / card.multiprocessors
    moved = rows * tiles * tile_bytes + partial
    memory_ms = moved / (card.bytes_per_second * bandwidth_share(in_flight, card)) * 1e3
    # programs: a tile a step, which waits for loads that were sent `ahead` steps before
    waiting = LATENCY_CYCLES / ahead if ahead else LATENCY_CYCLES + serial_cycles(cycles)
    step = max(serial_cycles(cycles), resident * overlapped_cycles(cycles), waiting)
    waves = -(-rows * splits // places)
    chain = waves * (-(-tiles // splits) * step + STARTING_READS * LATENCY_CYCLES)
    return max(memory_ms, chain / (card.gigahertz * 1e6))


def bandwidth_share(in_flight, card):
    """The share of the memory's bandwidth that is reached with so many bytes in flight for each multiprocessor.

    Little's law: bytes in flight = bandwidth x latency.
    """
    needed = card.bytes_per_second / (card.gigahertz * 1e9) * LATENCY_CYCLES / card.multiprocessors
    return min(1.0, in_flight / needed)


REMEDIES = {
    "matrix": "fewer masked pairs (narrower edges and row blocks) or fewer products; else a faster card",
    "issue": "fewer instructions a score: a taller tile for each warp, wider interior tiles",
    "alu": "fewer maxima, conversions and pointer steps a score",
    "fma": "fewer multiplications a score: rescale less often (wider tiles), scale folded into the exponent",
    "mufu": "part of the exponentials as polynomials on the FMA pipe",
    "shared": "more rows for each warp, so that a key tile is read by fewer warps",
    "l2": "taller tiles, or the same keys for neighbouring programs (clusters), so that fewer copies are fetched",
    "memory": "fewer bytes: fuse with the producer or the consumer, or use a narrower dtype",
}
