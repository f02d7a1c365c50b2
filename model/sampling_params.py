"""How the next token is chosen: `SamplingParams` filters a model's logits and draws from what is left.

params, generators = SamplingParams(temperature=0.8, top_k=20), RowGenerators([1, 2], device)     # one seed a row
tokens = params.choose(logits, generators)                                                        # (B, V) -> (B,)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK = 256  # random numbers that a row's generator makes at a time


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The settings of sampling. They apply in the order of the fields, the order of Hugging Face's generate.

    Raises ValueError for a value out of range.
    """

    repetition_penalty: float = 1.0
    """For tokens that the row already has: divides positive logits and multiplies negative ones. 1 = no penalty."""
    temperature: float = 1.0
    """Divides the logits: above 1 is more varied, below 1 less; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw from the k most likely tokens, and from those as likely as the k-th. None = all."""
    top_p: float | None = None
    """Draw from the fewest tokens that together have this probability, in (0, 1]. None = all."""
    min_p: float | None = None
    """Draw from tokens with at least this share, in [0, 1], of the largest probability. None = all."""
    greedy: bool = False
    """Take the most likely token every time."""

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature={self.temperature} is not a number of at least 0 (0 takes the most likely token)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} is below 1: it is how many tokens to draw from, or None for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} is not in (0, 1]: it is the probability to draw from, 1 or None for all"
            )
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(
                f"min_p={self.min_p} is not in [0, 1]: it is a share of the largest probability, 0 or None for all"
            )
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} is not a number above 0 (1 is no penalty)")

    @property
    def is_random(self) -> bool:
        """Whether a choice needs random numbers."""
        return not self.greedy and self.temperature > 0

    def choose(self, logits, generators=None, seen=None):
        """Tokens (B,) for logits (B, V).

        generators   `RowGenerators`, needed if `is_random`.
        seen         (B, V) bool: the tokens that each row already has, for the penalty.
        """
        if self.repetition_penalty != 1:
            logits = penalized_logits(logits, seen, self.repetition_penalty)
        if not self.is_random:
            return logits.argmax(dim=-1)
        # Inversion of the cumulative distribution: one random number a row, whatever the other rows do.
        # In fp64: a parallel sum in fp32 may decrease in places, and would then draw tokens of probability 0.
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        cumulative = F.softmax(self.filter_logits(logits), dim=-1).cumsum(dim=-1, dtype=wide)
        return torch.searchsorted(cumulative, generators.uniform() * cumulative[:, -1:]).squeeze(1)

    def filter_logits(self, logits):
        """The logits to draw from, divided by the temperature; -inf for excluded tokens. The penalty is not applied."""
        logits = logits.float()
        if self.temperature != 1:
            # subtract the largest first: a tiny temperature must not take two logits to infinity
            logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        logits = logits if self.top_k is None else top_k_logits(logits, self.top_k)
        logits = logits if self.top_p is None else top_p_logits(logits, self.top_p)
        return logits if self.min_p is None else min_p_logits(logits, self.min_p)


class RowGenerators:
    """One random generator a row, so that the rows of a batch are independent.

    seeds   an integer for each row; None gives the row different numbers every time.
    """

    def __init__(self, seeds, device):
        self.generators = [torch.Generator(device) for _ in seeds]
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.seed() if seed is None else generator.manual_seed(seed)
        self.device, self.next = device, 0
        self.numbers = torch.empty(len(self.generators), 0, device=device)

    def uniform(self):
        """(B, 1) random numbers in (0, 1]. Never 0, so that a token of probability 0 is never drawn."""
        numbers = self.ahead(1)
        self.next += 1
        return numbers

    def ahead(self, count):
        """The next `count` numbers (B, count), up to BLOCK of them; `uniform` gives them all the same."""
        if self.next + count > self.numbers.shape[1]:
            rows = [torch.rand(BLOCK, generator=generator, device=self.device) for generator in self.generators]
            self.numbers = torch.cat([self.numbers[:, self.next :], 1 - torch.stack(rows)], dim=1)
            self.next = 0
        return self.numbers[:, self.next : self.next + count]

    def skip(self, count):
        """Go on after the next `count` numbers, which `ahead` has given."""
        self.next += count


def top_k_logits(logits, k):
    """logits (..., V) with -inf for all but the k largest of each row; those equal to the k-th stay."""
    if k < 1:
        raise ValueError(f"k={k} is below 1")
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def top_p_logits(logits, p):
    """logits (..., V) with -inf for all but the fewest tokens that together have probability p.

    Nucleus sampling, arXiv:1904.09751. The token that reaches p stays, so at least one stays.
    """
    if not 0 < p <= 1:
        raise ValueError(f"p={p} is not in (0, 1]")
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = F.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the sum over more likely tokens
    ordered = ordered.masked_fill(before >= p, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def min_p_logits(logits, p):
    """logits (..., V) with -inf for tokens that have less than p times the largest probability of their row.

    Min-p sampling, arXiv:2407.01082: few tokens stay where the model is sure, many where it is not.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} is not in [0, 1]")
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), float("-inf"))


def penalized_logits(logits, seen, penalty):
    """logits (..., V) in which tokens that are `seen` (bool, same shape) are less likely, for a penalty above 1.

    CTRL, arXiv:1909.05858: positive logits are divided, negative ones multiplied.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
