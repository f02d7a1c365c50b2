"""What the study trains: every architecture at two sizes, other windows, other learning rates.

    equal width        the same d_model and layers: shows what each change does to the model
    equal parameters   the width whose parameter count is closest to the original's: a smaller model that loses may
                       only lack parameters

A model that belongs to both sizes is trained once.
"""

import dataclasses
from functools import cache
from typing import NamedTuple

import torch

from model import ARCHITECTURES, GPT, GPTConfig
from model.command import resolve_device
from train.config import option

NAMES = (*ARCHITECTURES[:4], "multi-query")
ORIGINAL, MODIFIED = "original", "rope-window-gqa"
SIZES = EQUAL_WIDTH, EQUAL_PARAMETERS = "equal width", "equal parameters"
WINDOW_FRACTIONS = (0.1, 0.2, 0.4, 1.0)
EFFORT = {  # what is trained and measured: (in full, with --quick)
    "contexts": ((25, 256), (25, 64)),
    "steps": (600, 30),
    "seeds": (3, 2),
    "window_seeds": (2, 1),
    "rate_factors": ((0.5, 1.0, 2.0, 4.0), (1.0,)),
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
    steps: int | None = option(None, "steps of a training run (none: 600; with --quick 30)")
    seeds: int | None = option(None, "runs of each model, with different initial weights (none: 3; with --quick 2)")
    tokens_per_step: int = option(512, "characters a step, rounded to whole contexts")
    learning_rate: float = option(4e-3, "peak learning rate of every run except those that try others")
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
    def window_seeds(self) -> int:
        return min(self.seeds, self.effort("window_seeds"))

    def window(self, context: int, fraction: float | None = None) -> int:
        """A window that is a fraction of the context, at least 2 keys: with one key there is no attention."""
        return max(2, round(context * (fraction or self.window_fraction)))

    def of_every_run(self) -> dict:
        """What a run depends on besides its own fields: a run with other values is not used for this study."""
        names = ("steps", "tokens_per_step", "learning_rate", "n_layer", "n_head", "n_kv_head", "d_model")
        return {name: getattr(self, name) for name in (*names, "fused_kernels", "device", "threads", "quick")}


class Run(NamedTuple):
    """One training run. Two runs with the same fields are the same run and end with the same weights."""

    architecture: str
    context: int
    window: int | None
    width: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        window = "full" if self.window is None else self.window
        sizes = f"context{self.context}-{self.architecture}-window{window}-width{self.width}"
        return f"{sizes}-rate{self.learning_rate:g}-seed{self.seed}"


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
    # no architecture has more parameters than the original at the same width
    widths = range(settings.d_model, 2 * settings.d_model, settings.n_head)
    return min(widths, key=lambda width: abs(count(width=width) - wanted))


def compared(settings: Settings, vocab_size: int, context: int) -> dict[tuple[str, str], Run]:
    """{(size, architecture): its run with seed 0} at one context."""
    runs = {}
    for name in NAMES:
        window = settings.window(context) if "window" in name or name == "multi-query" else None
        run = Run(name, context, window, settings.d_model, settings.learning_rate, seed=0)
        runs[EQUAL_WIDTH, name] = runs[EQUAL_PARAMETERS, name] = run
        if name != ORIGINAL:
            runs[EQUAL_PARAMETERS, name] = run._replace(width=matching_width(run, settings, vocab_size))
    return runs


def windows(settings: Settings, context: int) -> list[Run]:
    """The modified architecture with each window, seed 0, the widest last; the window of the comparison is one."""
    sizes = {settings.window(context, fraction) for fraction in (*WINDOW_FRACTIONS, settings.window_fraction)}
    return [Run(MODIFIED, context, size, settings.d_model, settings.learning_rate, 0) for size in sorted(sizes)]


def rates(settings: Settings, context: int) -> list[Run]:
    """The original and the modified architecture with each learning rate, seed 0."""
    return [
        Run(name, context, window, settings.d_model, settings.learning_rate * factor, 0)
        for name, window in ((ORIGINAL, None), (MODIFIED, settings.window(context)))
        for factor in settings.effort("rate_factors")
    ]


def all_runs(settings: Settings, vocab_size: int) -> list[Run]:
    """Every run of the study once, in the order of training: context by context, the comparison first."""
    runs = {}  # a dict keeps the order and each run once
    for context in settings.contexts:
        for some, seeds in (
            (compared(settings, vocab_size, context).values(), settings.seeds),
            (windows(settings, context), settings.window_seeds),
            (rates(settings, context), 1),
        ):
            runs |= {run._replace(seed=seed): None for seed in range(seeds) for run in some}
    return list(runs)
