"""The keys and values of each layer during generation.

A sliding layer needs the last `window` positions only. It has a ring: position p is in slot p % slots, and a new token
overwrites the one that has left the window. A layer that sees all earlier keys has a slot for every position.

    window=4, after 6 tokens        slot       0  1  2  3
                                    position   4  5  2  3

A `prefix` of the config has slots of its own in front of the ring, which later positions share:

    window=4, prefix=2, 9 tokens    slot       0  1  2  3  4  5
                                    position   0  1  6  7  8  5
"""

import copy

import torch
import torch.nn.functional as F


class KVCache:
    """Empty caches for `batch_size` rows of a model with this config; `GPT.forward(tokens, cache=...)` fills them.

    max_new_tokens_per_call   the most tokens of one forward. Rings have window + this - 1 slots, because the first new
                              query still needs its whole window after the last new key has been written.
    max_length                slots of layers that see all earlier keys, so the most tokens. Default: context_length.
    dtype                     that of the model's keys and values; torch.int8 quantises them, with a scale in fp32 for
                              each token and head: 2 (D + 4) bytes a token and KV head in place of 4 D of 16 bits.
    padding                   (B,) padding columns at the start of each row, for prompts of different lengths. Positions
                              count from -padding, so that the first token of the prompt has position 0.

    lengths    (B,) int32 on the device: tokens of each row so far, without its padding
    columns    tokens so far on the host, padding included: an upper bound that needs no wait for the device
    k, v       a tensor (B, Hkv, slots, D) for each layer
    k_scales, v_scales
               of int8, a tensor (B, Hkv, slots) for each layer; else empty
    bounded    whether the sequence ends at max_length: with learned positions, or a layer without a window
    """

    def __init__(
        self,
        config,
        batch_size,
        *,
        max_new_tokens_per_call=1,
        max_length=None,
        device=None,
        dtype=torch.float32,
        padding=None,
    ):
        if max_new_tokens_per_call < 1:
            raise ValueError(f"max_new_tokens_per_call={max_new_tokens_per_call} is below 1")
        self.config = config
        self.max_new_tokens_per_call = max_new_tokens_per_call
        self.max_length = config.context_length if max_length is None else max_length
        if config.positions == "learned" and self.max_length > config.context_length:
            raise ValueError(
                f"max_length={self.max_length} is more than the {config.context_length} positions that the model "
                "learned (context_length)"
            )
        self.bounded = config.positions == "learned" or None in map(config.layer_window, range(config.n_layer))
        self.k, self.v, self.k_scales, self.v_scales = [], [], [], []
        for layer in range(config.n_layer):
            shape = (batch_size, config.n_kv_head, self._slots(layer), config.head_dim)
            # never read before it is written, so it need not be cleared
            self.k.append(torch.empty(shape, device=device, dtype=dtype))
            self.v.append(torch.empty(shape, device=device, dtype=dtype))
            if dtype == torch.int8:
                self.k_scales.append(torch.empty(shape[:3], device=device))
                self.v_scales.append(torch.empty(shape[:3], device=device))
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int32)
        self.columns = 0
        self._taken_back = 0  # tokens from the newest back to the longest that the rows have been
        if padding is not None:
            self.lengths -= torch.as_tensor(padding, device=device, dtype=torch.int32)

    def _slots(self, layer):
        window = self.config.layer_window(layer)
        if window is None:
            return self.max_length
        return self.config.layer_prefix(layer) + window + self.max_new_tokens_per_call - 1

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return sum(x.nbytes for rings in self._rings() for x in rings)

    def _rings(self):
        """The lists that hold a tensor for each layer, (B, Hkv, slots) or with more dimensions."""
        return [self.k, self.v] + ([self.k_scales, self.v_scales] if self.k_scales else [])

    def scales(self, layer):
        """The scales of a layer, as the kernels' arguments: none but of int8."""
        return {"k_scales": self.k_scales[layer], "v_scales": self.v_scales[layer]} if self.k_scales else {}

    def advance(self, new_tokens, config):
        """Count `new_tokens` more columns. The model calls it before its layers write them.

        Raises ValueError, and changes nothing, if the cache is of another config or has no room.
        """
        self.check_room(new_tokens, config)
        self.columns += new_tokens
        self._taken_back = max(0, self._taken_back - new_tokens)
        self.lengths += new_tokens

    def check_room(self, new_tokens, config):
        """Raise ValueError unless the cache is of this config and has room for `new_tokens` more columns."""
        if config is not self.config and config != self.config:
            raise ValueError(
                f"the cache was made for another config ({self.config.differences(config)}): make a new one"
            )
        if new_tokens > self.max_new_tokens_per_call:
            raise ValueError(
                f"tokens has {new_tokens} columns, more than the cache's max_new_tokens_per_call="
                f"{self.max_new_tokens_per_call}: feed them in parts, or make a cache for more"
            )
        if self.bounded and self.columns + new_tokens > self.max_length:
            raise ValueError(
                f"the cache holds max_length={self.max_length} positions, too few for {self.columns} and {new_tokens} "
                "more: make a longer one, or extend it"
            )

    def extend(self, max_length):
        """Give the layers that see all earlier keys room for `max_length` positions; written slots stay in place."""
        for layer in range(self.config.n_layer):
            more = max_length - self.max_length
            if self.config.layer_window(layer) is None:  # a position is its slot, so new slots go to the end
                for rings in self._rings():
                    rings[layer] = F.pad(rings[layer], (*(0, 0) * (rings[layer].dim() - 3), 0, more))
        self.max_length = max_length

    def positions(self, new_tokens):
        """The positions (B, new_tokens) of the newest tokens; negative for padding."""
        return self.lengths[:, None] + torch.arange(-new_tokens, 0, device=self.lengths.device)

    def fit(self, new_tokens=1):
        """Make the rings as long as calls of up to `new_tokens` tokens need.

        Reading a prompt in chunks needs longer rings, which would make every later step slower.
        """
        for layer in range(self.config.n_layer):
            window = self.config.layer_window(layer)
            if window is not None and self.max_new_tokens_per_call != new_tokens:
                # slot s of the new ring holds the newest position p with p % slots == s, counted from the prefix's end
                prefix, slots = self.config.layer_prefix(layer), window + new_tokens - 1
                newest = self.lengths[:, None] - prefix - 1
                position = newest - (newest - torch.arange(slots, device=newest.device)) % slots  # (B, slots)
                slot = prefix + position % (self.k[layer].shape[2] - prefix)
                if prefix:
                    kept = torch.arange(prefix, device=newest.device, dtype=slot.dtype)
                    slot = torch.cat([kept.expand(len(slot), -1), slot], dim=1)
                slot = slot.long()[:, None, :, None].expand(-1, self.config.n_kv_head, -1, self.config.head_dim)
                for rings in self._rings():
                    rings[layer] = rings[layer].gather(2, slot if rings[layer].dim() == 4 else slot[..., 0])
        # a longer ring does not bring back what the shorter one has overwritten
        self._taken_back = max(0, self._taken_back + new_tokens - self.max_new_tokens_per_call)
        self.max_new_tokens_per_call = new_tokens

    def rollback(self, count):
        """Take back the newest `count` tokens, as if they had never been written: a number, or a list of one a row.

        Exact for up to max_new_tokens_per_call tokens below the longest that a row has been: a ring has as many slots
        more than a query sees, and what they held before is gone. Raises ValueError, and changes nothing, for more.
        On a GPU a number waits for nothing; a captured step goes on from there.
        """
        counts = [count] if isinstance(count, int) else [int(n) for n in count]
        if not isinstance(count, int) and len(counts) != len(self.lengths):
            raise ValueError(
                f"rollback takes one number, or one for each of {len(self.lengths)} rows: got {len(counts)}"
            )
        least, most = min(counts, default=0), max(counts, default=0)
        if least < 0 or most > self.columns:
            raise ValueError(f"rollback of {least if least < 0 else most} tokens: the cache holds {self.columns}")
        if self.lengths.is_cpu and most and (self.lengths < torch.tensor(counts)).any():
            raise ValueError(f"rollback of {counts if least < most else most} tokens: a row holds fewer")
        slides = any(self.config.layer_window(layer) is not None for layer in range(self.config.n_layer))
        if slides and self._taken_back + most > self.max_new_tokens_per_call:
            before = f" after {self._taken_back}" if self._taken_back else ""
            raise ValueError(
                f"rollback of {most} tokens{before}: a ring keeps what the newest max_new_tokens_per_call="
                f"{self.max_new_tokens_per_call} replaced, and nothing older"
            )
        self._taken_back += most
        self.columns -= least
        self.lengths -= count if isinstance(count, int) else torch.tensor(counts).to(self.lengths)

    def first_rows(self, count):
        """The cache of the first `count` rows: it shares memory and lengths with this one, and has its own columns."""
        rows = copy.copy(self)
        for name in ("k", "v", "k_scales", "v_scales"):
            setattr(rows, name, [x[:count] for x in getattr(self, name)])
        rows.lengths = self.lengths[:count]
        return rows

    def copy_row(self, row, other, other_row, length):
        """Make `row` what row `other_row` of another cache (or of this one) is; length is that row's, on the host.

        Both must be for single tokens. What the row held before is gone.
        """
        for rings, of_other in zip(self._rings(), other._rings(), strict=True):
            for mine, theirs in zip(rings, of_other, strict=True):
                written = min(length, theirs.shape[2])  # slots of a row are written from the first one on
                mine[row, :, :written] = theirs[other_row, :, :written]
                mine[row, :, length:] = 0  # a step multiplies unwritten slots by 0, which leaves NaN what was NaN
        self.lengths[row] = length
