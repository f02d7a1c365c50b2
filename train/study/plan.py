"""Which models the study trains: every architecture, in two readings of "the same size", and the runs around them.

    equal width        the same d_model and layers: what each change does to the model as it stands
    equal parameters   the width that brings the parameters closest to those of the original at equal width, since a
                       smaller model that loses may only have lost for want of parameters

A model that both readings ask for is trained once. The contexts come one after the other, in each
first the comparison with all its seeds, then the windows and the learning rates.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from model import ARCHITECTURES, GPT, GPTConfig

NAMES = (*ARCHITECTURES, "multi-query")
ORIGINAL, MODIFIED = "original", "rope-window-gqa"
READINGS = ("equal width", "equal parameters")


@dataclass(frozen=True)
class Settings:
    """What the whole study has in common; a finished run of other settings is not taken for one of these."""

    steps: int
    tokens_per_step: int
    learning_rate: float
    n_layer: int
    n_head: int
    n_kv_head: int
    d_model: int
    fused_kernels: bool
    device: str
    threads: int
    curve_points: int
    curve_tokens: int
    held_out_tokens: int
    position_tokens: int

    def batch_size(self, context: int) -> int:
        """Examples a step, so that contexts of any length read about the same number of tokens."""
        return max(1, round(self.tokens_per_step / context))


class Run(NamedTuple):
    """One training run. Two of the same fields are the same run, and end with the same weights."""

    architecture: str
    context: int
    window: int | None
    width: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        window = "" if self.window is None else f"-window{self.window}"
        return (
            f"context{self.context}-{self.architecture}{window}-width{self.width}-rate{self.learning_rate:g}"
            f"-seed{self.seed}"
        )


class Design(NamedTuple):
    """What is compared with what: the parts of the study that are lists."""

    contexts: tuple[int, ...]
    seeds: int
    window_fraction: float
    window_fractions: tuple[float, ...]
    window_seeds: int
    rate_factors: tuple[float, ...]


def model_config(name: str, settings: Settings, *, vocab_size: int, context: int, window: int | None, width: int):
    """The GPTConfig of an architecture of NAMES. A head of odd size has one element that is not rotated."""
    head_dim = width // settings.n_head
    return GPTConfig.for_architecture(
        MODIFIED if name == "multi-query" else name,
        vocab_size=vocab_size,
        context_length=context,
        window=window,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_kv_head=1 if name == "multi-query" else settings.n_kv_head,
        d_model=width,
        rotary_dim=head_dim - head_dim % 2,
    )


@cache  # a study asks for the same few models again and again
def count_parameters(config: GPTConfig) -> int:
    """Parameters of a model, counted on one that has no memory."""
    with torch.device("meta"):
        return GPT(config).num_parameters()


def matching_width(name: str, settings: Settings, *, vocab_size: int, context: int, window: int | None) -> int:
    """The width at which an architecture has the parameters of the original at settings.d_model, as nearly as can be.

    Widths are multiples of n_head: with 4 heads near width 64 the next one has 13 % more parameters, so that no match
    is further off than 6 %.
    """
    size = dict(vocab_size=vocab_size, context=context, window=window)
    wanted = count_parameters(model_config(ORIGINAL, settings, width=settings.d_model, **size))
    # none has more parameters than the original at the same width
    widths = range(settings.d_model, 2 * settings.d_model, settings.n_head)
    return min(widths, key=lambda w: abs(count_parameters(model_config(name, settings, width=w, **size)) - wanted))


def window_of(context: int, fraction: float) -> int:
    """A window that is a fraction of the context, two keys at least: one alone would be no attention."""
    return max(2, round(context * fraction))


def compared(settings: Settings, design: Design, vocab_size: int, context: int) -> dict[tuple[str, str], Run]:
    """{(reading, architecture): its run with seed 0} at one context."""
    runs = {}
    for reading in READINGS:
        for name in NAMES:
            window = window_of(context, design.window_fraction) if "window" in name or name == "multi-query" else None
            width = settings.d_model
            if reading == "equal parameters" and name != ORIGINAL:
                # the window changes no parameter, but these architectures ask for one
                some_window = window_of(context, design.window_fraction)
                width = matching_width(name, settings, vocab_size=vocab_size, context=context, window=some_window)
            runs[reading, name] = Run(name, context, window, width, settings.learning_rate, seed=0)
    return runs


def windows(settings: Settings, design: Design, context: int) -> list[Run]:
    """The modified architecture with each window, as runs with seed 0; that of the comparison is one of them."""
    sizes = {window_of(context, fraction) for fraction in (*design.window_fractions, design.window_fraction)}
    return [Run(MODIFIED, context, size, settings.d_model, settings.learning_rate, 0) for size in sorted(sizes)]


def rates(settings: Settings, design: Design, context: int) -> list[Run]:
    """The first and the modified architecture with each learning rate, as runs with seed 0."""
    window = window_of(context, design.window_fraction)
    return [
        Run(name, context, window if name == MODIFIED else None, settings.d_model, settings.learning_rate * factor, 0)
        for name in (ORIGINAL, MODIFIED)
        for factor in sorted({1.0, *design.rate_factors})
    ]


def all_runs(settings: Settings, design: Design, vocab_size: int) -> list[Run]:
    """Every run of the study once, in the order in which they are made."""
    runs = {}  # a dict keeps the order, and each run once
    for context in design.contexts:
        main = compared(settings, design, vocab_size, context).values()
        for some, seeds in (
            (main, design.seeds),
            (windows(settings, design, context), min(design.seeds, design.window_seeds)),
            (rates(settings, design, context), 1),
        ):
            runs |= {run._replace(seed=seed): None for seed in range(seeds) for run in some}
    return list(runs)
