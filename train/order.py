"""Which examples make up which batch: shuffled epochs that can be entered anywhere without a memory of the past.

The training stream is epoch after epoch, each a different permutation of all examples, cut into batches. Position p
of the stream is example `permutation(epoch = p // length)[p % length]`, and the permutation is *computed*: a Feistel
network (Luby and Rackoff, 1988) over the next power of two, walked until it lands below `length`. So the batch of any
step is a function of (seed, step): a run that is stopped goes on with the very next batch, nothing about the order is
stored, and no list of a billion indices is ever shuffled.
"""

import numpy as np

_ROUNDS = 6  # with 4, a test of 400 permutations still finds a trace of the unshuffled order
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: products spread into the high bits


def stream(start: int, count: int, length: int, seed: int) -> np.ndarray:
    """Examples (count,) int64 at positions start .. start + count - 1 of the shuffled stream over `length` examples."""
    positions = np.arange(start, start + count)
    epochs = positions // length
    return np.concatenate(
        [
            permuted(positions[epochs == epoch] % length, length, seed, epoch)
            for epoch in range(start // length, (start + count - 1) // length + 1)
        ]
    )


def permuted(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's permutation of 0 .. length - 1 at `positions`: distinct positions give distinct examples."""
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    bits = max(2, (length - 1).bit_length())
    examples = _feistel(positions.astype(np.uint64), bits, keys)
    # values past the end walk on along their cycle, which comes back below `length`: still one to one
    while (outside := examples >= length).any():
        examples[outside] = _feistel(examples[outside], bits, keys)
    return examples.astype(np.int64)


def _feistel(values, bits, keys):
    """A keyed one-to-one map of [0, 2**bits) onto itself, element by element: each half in turn scrambles the other."""
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    low, high = values & low_mask, values >> np.uint64(low_bits)
    for key in keys:
        # after an even number of rounds the halves are back in their places
        low, high, low_mask, high_mask = high, low ^ (_mix(high, key) & low_mask), high_mask, low_mask
    return high << np.uint64(low_bits) | low


def _mix(values, key):
    """32 well-mixed bits of each value under a 64-bit key."""
    mixed = (values ^ key) * _MULTIPLIER
    return ((mixed ^ mixed >> np.uint64(29)) * _MULTIPLIER) >> np.uint64(32)
