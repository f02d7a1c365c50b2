"""The model's tables of rotary angles: made once a device, and grown for longer sequences."""

import torch

from kernels import rope_tables
from kernels.rope import inverse_frequencies


def ropes_of_layers(config):
    """The `RopeTables` of each layer, shared by those with the same angles; None for a layer that rotates nothing."""
    shared = {}
    return [
        None if angles is None else shared.setdefault(str(angles), RopeTables(config, *angles))
        for angles in map(config.layer_rope, range(config.n_layer))
    ]


class RopeTables:
    """cos and sin of every position, by theta and scaling of `kernels.rope_tables`: one pair of tables a device.

    The tables are not buffers: `model.half()` would round the angles, and a checkpoint does not need them. They take
    4 * rotary_dim bytes a position, and double when they grow, so that sampling rarely makes new ones.
    """

    def __init__(self, config, theta, scaling):
        self.rotated, self.context_length = config.rotated, config.context_length
        self.theta, self.scaling = theta, scaling
        self.tables = {}
        self.frequencies = {}
        rope_tables(1, self.rotated, theta=theta, scaling=scaling, device="cpu")  # checks

    def __call__(self, length, device):
        """(cos, sin), each (at least `length`, rotary_dim / 2) fp32. `length` is an int."""
        tables = self.tables.get(device)
        if tables is None or len(tables[0]) < length:
            have = 0 if tables is None else len(tables[0])
            tables = self.tables[device] = self._make(max(length, 2 * have, self.context_length), device)
        return tables

    def at(self, position, device):
        """(cos, sin) of one position, each (rotary_dim / 2,), or of a tensor (B,) of positions, (B, rotary_dim / 2).

        The same numbers as the tables' rows, computed without tables: no memory grows with the text.
        """
        if device not in self.frequencies:
            with torch.inference_mode(False):
                self.frequencies[device] = inverse_frequencies(self.rotated, self.theta, self.scaling, device)
        frequency, temperature = self.frequencies[device]
        angle = position[:, None].float() * frequency if torch.is_tensor(position) else position * frequency
        return angle.cos() * temperature, angle.sin() * temperature

    def _make(self, length, device):
        # training could not use a table made under inference mode
        with torch.inference_mode(False):
            return rope_tables(length, self.rotated, theta=self.theta, scaling=self.scaling, device=device)
