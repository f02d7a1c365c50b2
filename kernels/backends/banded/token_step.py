"""New tokens on a CPU: `append_to_cache` and `sliding_gqa_decode` together, in as few PyTorch calls as possible.

A step of a small model is mostly the cost of calling operators. So what its layers share, the angles and the mask, is
made once a step (`StepPositions`). q, k and v come as the projection made them, in one tensor, and q and k are rotated
together:

    qkv (B, (Hq + 2 Hkv) * D)      q q q q q q q q  k k  v v
                                   \\___ rotated ___/  \\_____ into their slot; then all slots are read that are written
"""

import sys

import torch
from torch.nn.functional import pad

from .decode import attend_rows


def _of_whole_heads(cos, sin, head_dim):
    """(cos, sin) (..., D) of tables (..., R / 2): x becomes x * cos + partner(x) * sin; nothing past R is rotated."""
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    rest = head_dim - cos.shape[-1]
    return (pad(cos, (0, rest), value=1.0), pad(sin, (0, rest))) if rest else (cos, sin)


class StepPositions:
    """The position of one new token a row. lengths (B,) int32 on the CPU count it, and are at least 1.

    angles   gives (cos, sin) of a position, (R / 2,), or of a tensor (B,) of them, (B, R / 2): rows of the tables of
             `rope_tables`. None: nothing is rotated.
    distance the largest position that a query shows to the keys of a prefix (`prefix_distance`); None: its own.
             far is (cos, sin) of that, or None where all rows are nearer.
    masks    a dict that keeps what `bias` needs for later steps.
    """

    tokens = 1

    def __init__(self, lengths, head_dim, angles=None, distance=None, masks=None):
        self.masks, self.biases = {} if masks is None else masks, {}
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
        cos, sin = _of_whole_heads(cos, sin, head_dim)
        return (cos, sin) if self.even else (cos[:, None], sin[:, None])  # (D,) or (B, 1, D)

    def unwritten(self, slots):
        """(B, slots) bool: the slots that a row has not reached yet."""
        return torch.arange(slots) >= self.lengths[:, None]

    def bias(self, slots, window, kv_heads, group, dtype):
        """What is added to the scores of a ring of `slots`: 0, and -inf where a token does not look.

        (1, group * tokens, written slots), or 1 in place of group * 1; for rows of different lengths, one token each,
        (B * Hkv, 1, written slots).
        None where every token looks at every slot. All layers with the same ring share it.
        """
        if self.tokens == 1 and (self.shortest >= slots or self.even) and window in (None, slots):
            return None
        key = slots, window
        if key not in self.biases:
            if self.even:
                bias = self._row_bias(slots, window, dtype)
                self.biases[key] = (bias if self.tokens == 1 else bias.repeat(group, 1))[None]
            else:
                bias = _minus_infinity(self.unwritten(min(self.longest, slots)), dtype)
                self.biases[key] = bias.repeat_interleave(kv_heads, dim=0)[:, None]
        return self.biases[key]

    def _row_bias(self, slots, window, dtype):
        """(tokens, written slots): the bias of the newest tokens of a row."""
        if window is None:  # a position is its slot
            bias = torch.full((self.tokens, self.longest), float("-inf"), dtype=dtype)
            return bias.triu_(1 + self.longest - self.tokens)
        bias = self.masks.get((slots, window))
        if bias is None or len(bias) < self.tokens:
            # column j is the slot of age (slots - 1 - j) % slots, 0 for the newest: any ring is a part of two turns
            age = torch.arange(slots - 1, -1, -1).repeat(2)
            own = torch.arange(self.tokens - 1, -1, -1)[:, None]
            bias = self.masks[slots, window] = _minus_infinity((age < own) | (age >= own + window), dtype)
        first = -self.longest % slots
        return bias[-self.tokens :, first : first + min(self.longest, slots)]


def _minus_infinity(where, dtype):
    """-inf there, 0 elsewhere."""
    return torch.zeros(where.shape, dtype=dtype).masked_fill_(where, float("-inf"))


class TracedPositions(StepPositions):
    """The position of one new token of one row as a tensor (1,), for a compiler; each ring is as long as its window."""

    def __init__(self, position, head_dim, angles=None):
        self.position, self.even, self.far = position, False, None
        self.shortest = self.longest = sys.maxsize  # so that all slots are read
        self.cos = self.sin = None
        if angles is not None:
            self.cos, self.sin = self._multipliers(*angles(position), head_dim)

    def bias(self, slots, window, kv_heads, group, dtype):
        """(slots,): -inf for a slot that has not been written."""
        return _minus_infinity(torch.arange(slots) > self.position, dtype)


class CachedAttention:
    """Attention of one layer to its ring, one token a row; the ring's memory is k_cache, v_cache (B, Hkv, C, D).

    C is prefix + window, so that all written slots are seen, or without a window any number that no row reaches. The
    first `prefix` slots keep their positions, the others are the ring. Without a prefix and for rows of one length, C
    may be larger than the window.
    lengths (B,) are the tokens so far. norms: functions of q's and of k's heads (N, H, D), before they are rotated;
    none or two. scale and softcap are those of `sliding_gqa_decode`; sinks are not offered.
    """

    def __init__(
        self, k_cache, v_cache, num_heads, rotary_dim, lengths, window=None, prefix=0, norms=(), scale=None,
        softcap=None,
    ):  # fmt: skip
        B, Hkv, self.slots, D = k_cache.shape
        self.k_cache, self.v_cache, self.window, self.prefix = k_cache, v_cache, window, prefix
        self.keys, self.values = k_cache.view(B * Hkv, -1, D), v_cache.view(B * Hkv, -1, D)
        self.batch, self.rows = B, torch.arange(B)
        self.num_heads, self.grouped = num_heads, (B * Hkv, num_heads // Hkv, D)
        self.queries = B, num_heads, 1
        self.rotated = num_heads + Hkv
        self.scale, self.softcap = D**-0.5 if scale is None else scale, softcap
        self.norms = norms
        self.partner, self.nothing = _partner(rotary_dim, D), k_cache.new_zeros(1)
        if B > 1 and lengths.amin() < self.slots:
            # rows of different lengths: an unwritten slot may hold NaN, which no weight of 0 removes
            unwritten = StepPositions(lengths, D).unwritten(self.slots)[:, None, :, None]
            k_cache.masked_fill_(unwritten, 0)
            v_cache.masked_fill_(unwritten, 0)

    def __call__(self, qkv, positions):
        """Write the new keys and values and attend to the ring: (B, Hq * D) of qkv (B, (Hq + 2 Hkv) * D)."""
        Hq, D = self.num_heads, self.grouped[2]
        rotated, v = self.heads_of(qkv, self.batch)  # (B, Hq + Hkv, D), (B, Hkv, D)
        first = None
        if self.prefix and positions.far is not None:
            first = self.rotate(rotated[:, :Hq], *positions.far).reshape(self.grouped), self.prefix
        if positions.cos is not None:
            rotated = self.rotate(rotated, positions.cos, positions.sin)
        k = rotated[:, Hq:]
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
        rows = rotated[:, :Hq].reshape(self.grouped)
        if first is None:
            out = self._attend(rows, keys, values, positions)
        else:
            written = positions.even or positions.shortest >= self.slots
            unwritten = None if written else positions.unwritten(keys.shape[1])[:, None]
            options = {"softcap": self.softcap, "first": first}
            out = attend_rows(rows, keys, values, self.queries, self.scale, unwritten, **options)
        return out.view(self.batch, Hq * D)

    def heads_of(self, qkv, tokens):
        """(heads of q and k, normalised; heads of v) of qkv: (tokens, H, D)."""
        heads = qkv.view(tokens, -1, self.grouped[2])
        rotated = heads[:, : self.rotated]
        if self.norms:
            q_norm, k_norm = self.norms
            rotated = torch.cat((q_norm(heads[:, : self.num_heads]), k_norm(rotated[:, self.num_heads :])), dim=1)
        return rotated, heads[:, self.rotated :]

    def rotate(self, x, cos, sin):
        partner = x.roll(x.shape[-1] // 2, -1) if self.partner is None else x[..., self.partner]
        return torch.addcmul(x * cos, partner, sin)

    def slot_of(self, position, even):
        """The slot of a position: its own number until all are written, then the next one of the ring."""
        ring = (position - self.prefix) % (self.slots - self.prefix) + self.prefix
        if even:
            return position if position < self.slots else ring
        return torch.where(position < self.slots, position, ring) if self.prefix else ring

    def _attend(self, rows, keys, values, positions):
        """(B * Hkv, G * T, D): rows of this shape attend to keys and values (B * Hkv, N, D)."""
        window = self.slots if self.prefix else self.window  # beside a prefix, a token sees every slot that is written
        bias = positions.bias(self.slots, window, self.grouped[0] // self.batch, self.grouped[1], rows.dtype)
        if self.softcap is not None:
            scores = torch.baddbmm(self.nothing, rows, keys.mT, beta=0, alpha=self.scale / self.softcap)
            scores = scores.tanh_().mul_(self.softcap)
            scores = scores if bias is None else scores.add_(bias)
        elif bias is None:
            scores = torch.baddbmm(self.nothing, rows, keys.mT, beta=0, alpha=self.scale)
        elif positions.even:
            scores = torch.baddbmm(bias, rows, keys.mT, alpha=self.scale)
        else:  # many small products: `baddbmm` is slower
            scores = torch.add(bias, torch.bmm(rows, keys.mT), alpha=self.scale)
        return torch.bmm(torch.softmax(scores, dim=-1), values)


class RowPositions(StepPositions):
    """The positions of the `tokens` newest tokens, at least two, of a single row."""

    def __init__(self, lengths, tokens, head_dim, angles, masks):
        self.shortest = self.longest = int(lengths)
        self.tokens, self.even, self.masks, self.biases = tokens, True, masks, {}
        self.position = torch.arange(self.longest - tokens, self.longest)
        self.cos = self.sin = None
        if angles is not None:
            self.cos, self.sin = _of_whole_heads(*angles(self.position), head_dim)  # (T, D)


class RowAttention(CachedAttention):
    """`CachedAttention` of a single row, of several tokens a call, as `RowPositions` says."""

    def __call__(self, qkv, positions):
        """Write the new keys and values and attend to the ring: (T, Hq * D) of qkv (T, (Hq + 2 Hkv) * D)."""
        T = positions.tokens
        if T == 1:
            return super().__call__(qkv, positions)
        Hkv, _, D = self.grouped
        rotated, values = (heads.transpose(0, 1) for heads in self.heads_of(qkv, T))
        if positions.cos is not None:
            rotated = self.rotate(rotated, positions.cos, positions.sin)
        first = (positions.longest - T) % self.slots
        before_end = min(T, self.slots - first)  # the others begin the ring again
        for ring, new in ((self.keys, rotated[self.num_heads :]), (self.values, values)):
            ring[:, first : first + before_end] = new[:, :before_end]
            if before_end < T:
                ring[:, : T - before_end] = new[:, before_end:]
        written = min(positions.longest, self.slots)
        rows = rotated[: self.num_heads].reshape(Hkv, -1, D)
        out = self._attend(rows, self.keys[:, :written], self.values[:, :written], positions)
        return out.view(-1, T, D).transpose(0, 1).reshape(T, -1)


def _partner(rotary_dim, head_dim):
    """For each element of a head the index of the other one in its pair; None where all are half a head apart."""
    if rotary_dim == head_dim:
        return None
    half, partner = rotary_dim // 2, torch.arange(head_dim)
    partner[: 2 * half] = partner[: 2 * half].roll(half)
    return partner
