"""The model's tables of rotary angles: made once a device, and grown for longer sequences."""

import torch

from kernels import rope_tables
from kernels.rope import inverse_frequencies


class RopeTables:
    """cos and sin of every position, one pair of tables a device, shared by the layers of a model.

    The tables are not buffers: `model.half()` would round the angles, and a checkpoint does not need them. They take
    4 * rotary_dim bytes a position, and double when they grow, so that sampling rarely makes new ones.
    """

    def __init__(self, config):
        self.config = config
        self.tables = {}
        self.frequencies = {}
        rope_tables(1, config.rotated, theta=config.rope_theta, scaling=config.rope_scaling, device="cpu")  # checks

    def __call__(self, length, device):
        """(cos, sin), each (at least `length`, rotary_dim / 2) fp32. `length` is an int."""
        tables = self.tables.get(device)
        if tables is None or len(tables[0]) < length:
            have = 0 if tables is None else len(tables[0])
            tables = self.tables[device] = self._make(max(length, 2 * have, self.config.context_length), device)
        return tables

    def at(self, position, device):
        """(cos, sin) of one position, each (rotary_dim / 2,), or of a tensor (B,) of positions, (B, rotary_dim / 2).

        The same numbers as the tables' rows, computed without tables: no memory grows with the text.
        """
        if device not in self.frequencies:
            config = self.config
            with torch.inference_mode(False):
                self.frequencies[device] = inverse_frequencies(
                    config.rotated, config.rope_theta, config.rope_scaling, device
                )
        frequency, temperature = self.frequencies[device]
        angle = position[:, None].float() * frequency if torch.is_tensor(position) else position * frequency
        return angle.cos() * temperature, angle.sin() * temperature

    def _make(self, length, device):
        config = self.config
        # training could not use a table made under inference mode
        with torch.inference_mode(False):
            return rope_tables(
                length, config.rotated, theta=config.rope_theta, scaling=config.rope_scaling, device=device
            )
