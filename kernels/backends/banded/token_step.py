"""One token a row on a CPU: `append_to_cache` and `sliding_gqa_decode` together, in as few PyTorch calls as possible.

A step of a small model is mostly the cost of calling operators. So what its layers share, the angles and the mask, is
made once a step (`StepPositions`). q, k and v come as the projection made them, in one tensor, and q and k are rotated
together:

    qkv (B, (Hq + 2 Hkv) * D)      q q q q q q q q  k k  v v
                                   \\___ rotated ___/  \\_____ into their slot; then all slots are read that are written
"""

import torch
from torch.nn.functional import pad

from .decode import attend_rows


class StepPositions:
    """The position of one new token a row. lengths (B,) int32 on the CPU count it, and are at least 1.

    angles   gives (cos, sin) of a position, (R / 2,), or of a tensor (B,) of them, (B, R / 2): rows of the tables of
             `rope_tables`. None: nothing is rotated.
    distance the largest position that a query shows to the keys of a prefix (`prefix_distance`); None: its own.
             far is (cos, sin) of that, or None where all rows are nearer.
    """

    def __init__(self, lengths, head_dim, angles=None, distance=None):
        rows = lengths.tolist()
        self.lengths, self.shortest, self.longest = lengths, min(rows), max(rows)
        self.even = self.shortest == self.longest  # then a slot is a number and the angles are of one position
        self.position = self.longest - 1 if self.even else lengths.long() - 1
        self.cos = self.sin = self.far = None
        if angles is not None:
            self.cos, self.sin = self._multipliers(*angles(self.position), head_dim)
            if distance is not None and self.longest - 1 > distance:
                near = distance if self.even else self.position.clamp(max=distance)
                self.far = self._multipliers(*angles(near), head_dim)

    def _multipliers(self, cos, sin, head_dim):
        """x becomes x * cos + other(x) * sin, other(x) being the partner in the pair; nothing past R is rotated."""
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        if rest := head_dim - cos.shape[-1]:
            cos, sin = pad(cos, (0, rest), value=1.0), pad(sin, (0, rest))
        return (cos, sin) if self.even else (cos[:, None], sin[:, None])  # (D,) or (B, 1, D)

    def unwritten(self, slots):
        """(B, slots) bool: the slots that a row has not reached yet."""
        return torch.arange(slots) >= self.lengths[:, None]


class CachedAttention:
    """Attention of one layer to its ring, one token a row; the ring's memory is k_cache, v_cache (B, Hkv, C, D).

    C is prefix + window, so that all written slots are seen, or without a window any number that no row reaches. The
    first `prefix` slots keep their positions, the others are the ring.
    lengths (B,) are the tokens so far. softcap and sinks are not offered.
    """

    def __init__(self, k_cache, v_cache, num_heads, rotary_dim, lengths, prefix=0):
        B, Hkv, self.slots, D = k_cache.shape
        self.k_cache, self.v_cache, self.prefix = k_cache, v_cache, prefix
        self.keys, self.values = k_cache.view(B * Hkv, -1, D), v_cache.view(B * Hkv, -1, D)
        self.batch, self.rows = B, torch.arange(B)
        self.num_heads, self.grouped = num_heads, (B * Hkv, num_heads // Hkv, D)
        self.queries = B, num_heads, 1
        self.rotated = num_heads + Hkv
        self.scale = D**-0.5
        half = rotary_dim // 2
        self.partner = torch.arange(D)
        self.partner[: 2 * half] = self.partner[: 2 * half].roll(half)
        if lengths.amin() < self.slots:
            # rows of different lengths: an unwritten slot may hold NaN, which no weight of 0 removes
            v_cache.masked_fill_(StepPositions(lengths, D).unwritten(self.slots)[:, None, :, None], 0)

    def __call__(self, qkv, positions):
        """Write the new keys and values and attend to the ring: (B, Hq * D) of qkv (B, (Hq + 2 Hkv) * D)."""
        Hq, D = self.num_heads, self.grouped[2]
        heads = qkv.view(self.batch, -1, D)
        rotated = heads[:, : self.rotated]
        first = None
        if self.prefix and positions.far is not None:
            first = self.rotate(heads[:, :Hq], *positions.far).reshape(self.grouped), self.prefix
        if positions.cos is not None:
            rotated = self.rotate(rotated, positions.cos, positions.sin)
        k, v = rotated[:, Hq:], heads[:, self.rotated :]  # (B, Hkv, D)
        slot = self.slot_of(positions.position, positions.even)
        if positions.even:
            self.k_cache.select(2, slot).copy_(k)
            self.v_cache.select(2, slot).copy_(v)
        else:
            self.k_cache[self.rows, :, slot] = k
            self.v_cache[self.rows, :, slot] = v
        keys, values = self.keys, self.values
        if positions.longest < self.slots:
            keys, values = keys[:, : positions.longest], values[:, : positions.longest]
        unwritten = None
        if not positions.even and positions.shortest < self.slots:
            unwritten = positions.unwritten(keys.shape[1])[:, None]
        rows = rotated[:, :Hq].reshape(self.grouped)
        out = attend_rows(rows, keys, values, self.queries, self.scale, unwritten, first=first)
        return out.view(self.batch, Hq * D)

    def rotate(self, x, cos, sin):
        return torch.addcmul(x * cos, x[..., self.partner], sin)

    def slot_of(self, position, even):
        """The slot of a position: its own number until all are written, then the next one of the ring."""
        ring = (position - self.prefix) % (self.slots - self.prefix) + self.prefix
        if even:
            return position if position < self.slots else ring
        return torch.where(position < self.slots, position, ring) if self.prefix else ring
