"""Means over seeds, and differences of models that were trained with the same seeds.

Two models of one seed read the same examples in the same order, so their losses move together and the difference of a
pair is known better than either loss. With a handful of seeds the 95 % interval is Student's t times the standard
error: 4.3 times for three seeds, not 2.
"""

import math
from typing import NamedTuple

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Estimate(NamedTuple):
    """A mean over seeds, its standard error, and of how many (with one seed the error is not known: NaN)."""

    mean: float
    standard_error: float
    count: int

    @property
    def margin(self) -> float:
        """Half of the 95 % interval; infinite for one seed."""
        if self.count < 2:
            return math.inf
        t = T_975[self.count - 2] if self.count - 2 < len(T_975) else 1.96
        return t * self.standard_error

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole 95 % interval lies below or above 0, else 0."""
        if abs(self.mean) <= self.margin:
            return 0
        return -1 if self.mean < 0 else 1

    def as_dict(self) -> dict:
        """JSON values: what is not known is None."""
        return {
            "mean": self.mean,
            "standard_error": None if math.isnan(self.standard_error) else self.standard_error,
            "margin": None if math.isinf(self.margin) else self.margin,
            "sign": self.sign,
            "seeds": self.count,
        }


def estimate(values: list[float]) -> Estimate:
    """The mean of values, one a seed."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def difference(ours: list[float], theirs: list[float]) -> Estimate:
    """ours - theirs, seed by seed: the same seeds in the same order."""
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])
