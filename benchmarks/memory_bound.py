"""A model of the kernels that memory bounds, decoding and the rotation; speed_of_light.py has the one of attention.

Two questions are asked of them. What bounds them at best is answered as for attention: `decode_estimate` and
`rope_estimate`. Which tile comes nearest to that is a matter of latency, since a memory gives its bandwidth to those
who have enough loads under way: `decode_ms` and `rope_ms`, by which tune_tiles.py ranks.
"""

from speed_of_light import (
    CARDS,
    ISSUE_SLOTS,
    LATENCY_CYCLES,
    between,
    estimate_of,
    l2_cycles,
    matrix_cycles,
    overlapped_cycles,
    padded,
    pipe_cycles,
    serial_cycles,
    wave_factor,
)

STARTING_READS = 3  # one after the other: lengths, q, the first tile of keys


def rope_bytes(shape, element_bytes):
    """q and k read and written."""
    return 2 * shape.B * shape.T * (shape.Hq + shape.Hkv) * shape.D * element_bytes


def rope_programs(made, shape):
    heads = -(-shape.Hq // made.tile["BLOCK_H"]) + -(-shape.Hkv // made.tile["BLOCK_H"])
    return shape.B * -(-shape.T // made.tile["BLOCK_T"]) * heads


def rope_cycles(made):
    """Cycles of the issue slots for one program, which runs each of its instructions once."""
    return made.instructions * made.tile["num_warps"] / ISSUE_SLOTS


def rope_estimate(made, shape, element_bytes):
    """The `Estimate` of the rotation: bytes cross the memory's interface once."""
    card, cycles = CARDS[made.target], rope_cycles(made)
    issue_ms = cycles * rope_programs(made, shape) / card.multiprocessors / (card.gigahertz * 1e6)
    return estimate_of({"issue": cycles}, 1.0, 0.0, rope_bytes(shape, element_bytes), issue_ms, issue_ms, card)


def rope_ms(made, shape, element_bytes):
    """A time to rank by. A program loads, turns and stores, in turns; n beside each other leave 1 / n of the gaps."""
    card, resident, programs = CARDS[made.target], made.blocks_per_multiprocessor, rope_programs(made, shape)
    under_way = made.tile["BLOCK_T"] * made.tile["BLOCK_H"] * shape.D * element_bytes
    memory_ms = rope_bytes(shape, element_bytes) / card.bytes_per_second * 1e3
    memory_ms /= bandwidth_share(resident * under_way, card)
    issue_ms = rope_cycles(made) * programs / card.multiprocessors / (card.gigahertz * 1e6)
    serial, overlapped = memory_ms + issue_ms, max(memory_ms, issue_ms)
    return between(serial, overlapped, resident) * wave_factor(programs, resident * card.multiprocessors)


def decode_bytes(shape, element_bytes):
    """The keys and values of the window, for one new token of each row of the batch; q and out."""
    return 2 * shape.B * shape.D * element_bytes * (shape.Hkv * shape.window + shape.Hq)


def decode_cycles(made, shape, element_bytes):
    """{pipe: cycles} of one interior tile of keys. None if its loop was not found."""
    card, interior = CARDS[made.target], next((loop for loop in made.loops if not loop.masked), None)
    if interior is None:
        return None
    rows, keys = made.tile["BLOCK_M"], made.tile["BLOCK_K"]
    cycles = pipe_cycles(interior.pipes, interior.opcodes, made.tile["num_warps"], card)
    cycles["matrix"] = matrix_cycles(rows, keys, padded(shape.D), 2, card, made.target, element_bytes, made.matrix)
    cycles["l2"] = l2_cycles(keys, shape.D, element_bytes, card)
    return cycles


def decode_estimate(made, shape, element_bytes):
    """The `Estimate` of a decode step, one new token a row, every tile of keys once."""
    card, cycles = CARDS[made.target], decode_cycles(made, shape, element_bytes)
    if cycles is None:
        return None
    tiles = shape.B * shape.Hkv * -(-shape.window // made.tile["BLOCK_K"])
    factor = tiles / card.multiprocessors / (card.gigahertz * 1e6)
    moved = decode_bytes(shape, element_bytes)
    overlapped, serial = overlapped_cycles(cycles) * factor, serial_cycles(cycles) * factor
    return estimate_of(cycles, 1.0, 0.0, moved, overlapped, serial, card)


def decode_ms(made, shape, element_bytes):
    """A time to rank by: that of the memory, at the share of its bandwidth that loads under way can draw, or that of
    one program after the other, whichever is longer. The launcher's own rule says into how many parts keys are cut.
    """
    from kernels.decode_kernels import split_count

    card, cycles = CARDS[made.target], decode_cycles(made, shape, element_bytes)
    if cycles is None:
        return float("inf")
    keys, ahead = made.tile["BLOCK_K"], made.tile["num_stages"] - 1
    rows, tiles = shape.B * shape.Hkv, -(-shape.window // keys)
    splits = split_count(rows, tiles, card.multiprocessors)
    places = made.blocks_per_multiprocessor * card.multiprocessors
    beside = -(-min(rows * splits, places) // card.multiprocessors)
    # memory: whole tiles, and the parts of the result written and read in fp32
    tile_bytes = 2 * keys * shape.D * element_bytes
    partial = 8 * shape.B * shape.Hq * splits * shape.D if splits > 1 else 0
    under_way = max(1, ahead) * tile_bytes * min(rows * splits, places) / card.multiprocessors
    moved = rows * tiles * tile_bytes + partial
    memory_ms = moved / (card.bytes_per_second * bandwidth_share(under_way, card)) * 1e3
    # programs: a tile for each turn, which waits for loads that were sent `ahead` turns before
    waiting = LATENCY_CYCLES / ahead if ahead else LATENCY_CYCLES + serial_cycles(cycles)
    turn = max(serial_cycles(cycles), beside * overlapped_cycles(cycles), waiting)
    waves = -(-rows * splits // places)
    chain = waves * (-(-tiles // splits) * turn + STARTING_READS * LATENCY_CYCLES)
    return max(memory_ms, chain / (card.gigahertz * 1e6))


def bandwidth_share(under_way, card):
    """The share of its bandwidth that a memory gives where each multiprocessor has that many bytes under way.

    Little's law: what is under way is bandwidth times latency.
    """
    needed = card.bytes_per_second / (card.gigahertz * 1e9) * LATENCY_CYCLES / card.multiprocessors
    return min(1.0, under_way / needed)
