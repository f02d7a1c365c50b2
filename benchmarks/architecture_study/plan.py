"""What the study trains: every architecture with its own learning rate, at two sizes and two lengths; other windows.

    equal width        the same d_model and layers: shows what each change does to the model
    equal parameters   the width whose parameter count is closest to the original's: a smaller model that loses may
                       only lack parameters

A model that belongs to both sizes is trained once. The rate is searched at equal width, for every architecture, context
and length anew: it doubles from run to run, and the search goes on while the best is at an edge. The two best rates are
tried with a second seed, and the lower mean wins. Other seeds are compared: a rate can win its search by luck, and the
runs that it won with would look too good. Long runs are trained at the largest context and equal width only, equal
parameters at the largest context with short runs only.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from model import ARCHITECTURES, GPT, GPTConfig
from model.command import resolve_device
from train.config import option

NAMES = (*ARCHITECTURES, "multi-query")
ORIGINAL, MODIFIED = "original", "rope-window-gqa"
SIZES = EQUAL_WIDTH, EQUAL_PARAMETERS = "equal width", "equal parameters"
WINDOW_FRACTIONS = (0.1, 0.2, 0.4, 1.0)
LONG = 4  # a long run has so many times the steps of a short one
EFFORT = {  # what is trained and measured: (in full, with --quick)
    "contexts": ((25, 256), (25, 64)),
    "steps": (600, 30),
    "seeds": (3, 2),
    "window_seeds": (2, 1),
    # learning rates of a search: factors of --learning-rate, or for long runs of the best of the short ones; how many
    # rates may follow at an edge
    "rate_factors": ((0.5, 1.0, 2.0, 4.0), (1.0, 2.0)),
    "long_rate_factors": ((0.25, 0.5, 1.0, 2.0), (1.0,)),
    "more_rates": (5, 0),
    "search_seeds": ((0, 1), (0,)),
    # points of a loss curve; characters for a point, for the final loss, for the loss by position
    "curve_points": (8, 4),
    "curve_tokens": (12_800, 6_400),
    "held_out_tokens": (102_400, 12_800),
    "position_tokens": (98_304, 12_800),
    # rounds of timing, training steps in a round; rounds, tokens in a round, the positions at which they are timed
    "step_rounds": (5, 2),
    "timed_steps": (12, 5),
    "token_rounds": (9, 3),
    "timed_tokens": (16, 16),
    "positions": ((25, 100, 400, 1000, 4000), (100, 4000)),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of the command. Where None means a default, that default is filled in."""

    data: str = option("shakespeare", "a text as python -m train takes it; the last 10 % are held out")
    context_size: int | None = option(None, "characters in a context (none: both 25 and 256; with --quick 25 and 64)")
    steps: int | None = option(None, "steps of a short run; a long one has 4 times as many (none: 600, --quick 30)")
    seeds: int | None = option(None, "compared runs of each model, from different initial weights (none: 3, --quick 2)")
    tokens_per_step: int = option(512, "characters a step, rounded to whole contexts")
    learning_rate: float = option(4e-3, "each search begins with half, once, 2 and 4 times this peak learning rate")
    window_fraction: float = option(0.4, "window of the compared models, as a fraction of the context")
    n_layer: int = option(4, "layers")
    n_head: int = option(4, "query heads of a layer")
    n_kv_head: int = option(2, "key-value heads of the grouped architecture")
    d_model: int = option(64, "width of the original, and of all models at equal width")
    copying_steps: int = option(600, "steps of each model on the copying task")
    fused_kernels: bool = option(True, "train with our kernels, otherwise with plain PyTorch (both are timed)")
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: a CUDA device where there is one)")
    threads: int = option(1, "CPU threads; small models gain little from more, and the sums depend on their number")
    out: str | None = option(None, "directory of the study (none: runs/architecture-study, with --quick ...-quick)")
    docs: str | None = option(None, "directory of the page and its tables and plots (none: that of --out)")
    quick: bool = option(False, "a small study: few steps, two seeds")
    retime: bool = option(False, "measure the times again; train only what is missing")
    only_tables: bool = option(False, "measure nothing: write the page, csv and plots again from compare.json")

    def __post_init__(self):
        for name in ("context_size", "steps", "seeds", "tokens_per_step", "copying_steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, wanted at least 1")
        if self.context_size == 1:
            raise ValueError("context_size is 1, wanted at least 2: a window must be able to differ from the context")
        if not 0 < self.window_fraction <= 1:
            raise ValueError(f"window_fraction is {self.window_fraction}, wanted more than 0 and at most 1")
        if self.retime and self.only_tables:
            raise ValueError("retime and only_tables are both given: one measures times, the other nothing")
        out = self.out or "runs/architecture-study" + "-quick" * self.quick
        filled = {
            "steps": self.steps or self.effort("steps"),
            "seeds": self.seeds or self.effort("seeds"),
            "device": str(resolve_device(self.device)),
            "out": out,
            "docs": self.docs or out,
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)

    def effort(self, name: str):
        """A value of EFFORT."""
        return EFFORT[name][self.quick]

    @property
    def contexts(self) -> tuple[int, ...]:
        return (self.context_size,) if self.context_size else self.effort("contexts")

    @property
    def places(self) -> list["Place"]:
        """Where architectures are compared: each context with short runs, the largest with long ones too."""
        short = [Place(context, self.steps) for context in self.contexts]
        return [*short, Place(max(self.contexts), LONG * self.steps)]

    @property
    def compared_seeds(self) -> range:
        """The seeds of the compared runs, behind those of the searches."""
        first = len(self.effort("search_seeds"))
        return range(first, first + self.seeds)

    @property
    def window_seeds(self) -> range:
        return self.compared_seeds[: self.effort("window_seeds")]

    def window(self, context: int, fraction: float | None = None) -> int:
        """A window that is a fraction of the context, at least 2 keys: with one key there is no attention."""
        return max(2, round(context * (fraction or self.window_fraction)))

    def of_every_run(self) -> dict:
        """What a run depends on besides its own fields: a run with other values is not used for this study."""
        names = ("tokens_per_step", "n_layer", "n_head", "n_kv_head", "d_model")
        return {name: getattr(self, name) for name in (*names, "fused_kernels", "device", "threads", "quick")}


class Place(NamedTuple):
    """One comparison: the context and the length of its runs."""

    context: int
    steps: int


class Run(NamedTuple):
    """One training run. Two runs with the same fields are the same run and end with the same weights."""

    architecture: str
    context: int
    window: int | None
    width: int
    steps: int
    learning_rate: float
    seed: int

    @property
    def model_name(self) -> str:
        """The name of its model, which fixes the times of a step and of a token."""
        window = "full" if self.window is None else self.window
        return f"context{self.context}-{self.architecture}-window{window}-width{self.width}"

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.model_name}-steps{self.steps}-rate{self.learning_rate:g}-seed{self.seed}"


def model_config(run: Run, settings: Settings, vocab_size: int) -> GPTConfig:
    """The model of a run. If the size of a head is odd, its last element is not rotated."""
    multi_query = run.architecture == "multi-query"
    head_dim = run.width // settings.n_head
    return GPTConfig.for_architecture(
        MODIFIED if multi_query else run.architecture,
        vocab_size=vocab_size,
        context_length=run.context,
        window=run.window,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_kv_head=1 if multi_query else settings.n_kv_head,
        d_model=run.width,
        rotary_dim=head_dim - head_dim % 2,
    )


@cache
def count_parameters(config: GPTConfig) -> int:
    """Parameters of a model, counted without allocating them."""
    with torch.device("meta"):
        return GPT(config).num_parameters()


def matching_width(run: Run, settings: Settings, vocab_size: int) -> int:
    """The multiple of n_head at which a run's architecture has about as many parameters as the original at d_model.

    With 4 heads near width 64 the next multiple has 13 % more parameters, so the counts differ by at most 6 %.
    """

    def count(**changes):
        return count_parameters(model_config(run._replace(**changes), settings, vocab_size))

    wanted = count(architecture=ORIGINAL, width=settings.d_model)
    head, heads = settings.d_model // settings.n_head, settings.n_head
    widths = [heads * size for size in range(max(2, head // 2), head + max(2, head // 2))]
    return min(widths, key=lambda width: abs(count(width=width) - wanted))


class Plan:
    """Every run of a study. Runs that need the result of a search are there once the search is over.

    loss_of(run) is the final loss of a run, None while it is not trained.
    """

    def __init__(self, settings: Settings, vocab_size: int, loss_of: Callable[[Run], float | None]):
        self.settings, self.vocab_size, self.loss_of = settings, vocab_size, loss_of

    def search(self, name: str, place: Place) -> list[Run]:
        """The runs that look for an architecture's learning rate, those known by now.

        First the rates with one seed, the smallest first; then the two best of them with the next seed.
        """
        settings, start, factors = self.settings, self.settings.learning_rate, "rate_factors"
        if place.steps != settings.steps:
            short = self.best(name, place._replace(steps=settings.steps))
            if short is None:
                return []
            start, factors = short.learning_rate, "long_rate_factors"
        window = None if name in (ORIGINAL, "rope") else settings.window(place.context)
        first, *more_seeds = settings.effort("search_seeds")
        runs = [
            Run(name, place.context, window, settings.d_model, place.steps, start * factor, first)
            for factor in settings.effort(factors)
        ]
        most = len(runs) + settings.effort("more_rates")
        while None not in (losses := [self.loss_of(run) for run in runs]):
            best = losses.index(min(losses))
            if len(runs) == most or 0 < best < len(runs) - 1:
                two = sorted(runs, key=self.loss_of)[:2]
                return runs + [run._replace(seed=seed) for seed in more_seeds for run in two]
            if best == 0:
                runs.insert(0, runs[0]._replace(learning_rate=runs[0].learning_rate / 2))
            else:
                runs.append(runs[-1]._replace(learning_rate=runs[-1].learning_rate * 2))
        return runs

    def best(self, name: str, place: Place) -> Run | None:
        """A run of the search with the lowest mean loss of those tried with every seed; None while it goes on."""
        runs, losses = self.search(name, place), {}
        for run in runs:
            losses.setdefault(run.learning_rate, []).append(self.loss_of(run))
        if not runs or any(None in of_rate for of_rate in losses.values()):
            return None
        seeds = max(map(len, losses.values()))
        rates = [rate for rate in losses if len(losses[rate]) == seeds]
        return runs[0]._replace(learning_rate=min(rates, key=lambda rate: sum(losses[rate])))

    def compared(self, place: Place) -> dict[tuple[str, str], Run]:
        """{(size, architecture): its run with the best learning rate, first seed}, where the search is over."""
        runs = {}
        for name in NAMES:
            if (run := self.best(name, place)) is None:
                continue
            runs[EQUAL_WIDTH, name] = run = run._replace(seed=self.settings.compared_seeds[0])
            if place == Place(max(self.settings.contexts), self.settings.steps):
                width = run.width if name == ORIGINAL else matching_width(run, self.settings, self.vocab_size)
                runs[EQUAL_PARAMETERS, name] = run._replace(width=width)
        return runs

    def windows(self, context: int) -> list[Run]:
        """The modified architecture with each window at the rate of the compared one, the widest last; first seed."""
        settings, run = self.settings, self.best(MODIFIED, Place(context, self.settings.steps))
        sizes = {settings.window(context, fraction) for fraction in (*WINDOW_FRACTIONS, settings.window_fraction)}
        first = settings.window_seeds[0]
        return [] if run is None else [run._replace(window=size, seed=first) for size in sorted(sizes)]

    def runs(self) -> list[Run]:
        """Every run that is known by now, once, in the order of training: the largest context and equal width first."""
        settings, runs = self.settings, {}  # a dict keeps the order and each run once
        places = sorted(settings.places, key=lambda place: (-place.context, place.steps))
        for size in SIZES:
            for place in places:
                runs |= {run: None for name in NAMES for run in self.search(name, place)}
                same_size = [run for (its_size, _), run in self.compared(place).items() if its_size == size]
                runs |= {run._replace(seed=seed): None for seed in settings.compared_seeds for run in same_size}
        for context in settings.contexts:
            some = self.windows(context)
            runs |= {run._replace(seed=seed): None for seed in settings.window_seeds for run in some}
        return list(runs)
