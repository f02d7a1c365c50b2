"""Which token comes next: `Choice` narrows a model's distribution and picks from it, `Dice` are the random numbers.

choice, dice = Choice(temperature=0.8, top_k=20), Dice([1, 2], device)      # a seed for each of two rows
tokens = choice(logits, dice)                                               # (B, V) -> (B,)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK = 256  # random numbers that a row's generator makes at a time


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a token is chosen. The steps are taken in the order of the fields, as Hugging Face's generate takes them.

    Raises ValueError for a value that makes no sense.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens that the row has already: divided by it where positive, multiplied where negative; 1 is none."""
    temperature: float = 1.0
    """Divides the logits: above 1 more daring, below 1 safer; 0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens, and those as likely as the k-th, are drawn from; None = all."""
    top_p: float | None = None
    """Only the fewest tokens that hold this probability together, in (0, 1], are drawn from; None = all."""
    min_p: float | None = None
    """Only tokens with this share, in [0, 1], of the likeliest token's probability are drawn from; None = all."""
    greedy: bool = False
    """Take the likeliest token every time."""

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature={self.temperature} is not a number of at least 0 (0 takes the likeliest token)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k={self.top_k} is below 1: it is how many tokens are left to draw from, or None for all"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} is not in (0, 1]: it is the probability that is kept, 1 or None for all"
            )
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(
                f"min_p={self.min_p} is not in [0, 1]: it is a share of the largest probability, 0 or None for all"
            )
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} is not a number above 0 (1 is none)")

    @property
    def draws(self) -> bool:
        """Whether a choice needs random numbers."""
        return not self.greedy and self.temperature > 0

    def __call__(self, logits, dice=None, seen=None):
        """Tokens (B,) for logits (B, V). seen: (B, V) bool, the tokens of each row so far, for the penalty."""
        if self.repetition_penalty != 1:
            logits = penalized_logits(logits, seen, self.repetition_penalty)
        if not self.draws:
            return logits.argmax(dim=-1)
        # a draw by inversion: a row needs one random number, whatever its neighbours do
        # In fp64, because a parallel sum of fp32 goes down here and there, and tokens of probability 0 would be met
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        cumulated = F.softmax(self.narrowed(logits), dim=-1).cumsum(dim=-1, dtype=wide)
        return torch.searchsorted(cumulated, dice.throw() * cumulated[:, -1:]).squeeze(1)

    def narrowed(self, logits):
        """The logits that are drawn from, -inf for what is left out; without the penalty."""
        # the largest logit becomes 0 first: a tiny temperature must not divide two of them to infinity
        logits = logits.float()
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        logits = logits if self.top_k is None else top_k_logits(logits, self.top_k)
        logits = logits if self.top_p is None else top_p_logits(logits, self.top_p)
        return logits if self.min_p is None else min_p_logits(logits, self.min_p)


class Dice:
    """Random numbers for rows that know nothing of each other: row i has a generator with seed seeds[i].

    seeds: a whole number a row, or None for a row that is different every time.
    """

    def __init__(self, seeds, device):
        self.generators = [torch.Generator(device) for _ in seeds]
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.seed() if seed is None else generator.manual_seed(seed)
        self.device, self.next = device, BLOCK

    def throw(self):
        """(B, 1) numbers in (0, 1]. Above 0, so that a token of probability 0 is never drawn."""
        if self.next == BLOCK:
            rows = [torch.rand(BLOCK, generator=generator, device=self.device) for generator in self.generators]
            self.numbers, self.next = 1 - torch.stack(rows), 0
        self.next += 1
        return self.numbers[:, self.next - 1 : self.next]


def top_k_logits(logits, k):
    """logits (..., V) with all but the k largest of each row set to -inf; those equal to the k-th stay."""
    if k < 1:
        raise ValueError(f"k={k} is below 1")
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def top_p_logits(logits, p):
    """logits (..., V) with all but the fewest tokens that hold probability p together set to -inf.

    Nucleus sampling, arXiv:1904.09751. The token that crosses p stays, so that at least one does.
    """
    if not 0 < p <= 1:
        raise ValueError(f"p={p} is not in (0, 1]")
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = F.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier tokens hold
    ordered = ordered.masked_fill(before >= p, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def min_p_logits(logits, p):
    """logits (..., V) with the tokens set to -inf that have less than p times the largest probability of their row.

    Min-p sampling, arXiv:2407.01082: few tokens stay where the model is sure, many where it is not.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} is not in [0, 1]")
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), float("-inf"))


def penalized_logits(logits, seen, penalty):
    """logits (..., V) with those of the tokens `seen` (bool, the same shape) made smaller by penalty > 1.

    CTRL, arXiv:1909.05858: divided where they are positive, multiplied where they are negative.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
