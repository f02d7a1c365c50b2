"""`--random-config`: the sizes of a model drawn from the seed, to see that any of them trains.

    run = random_config(RunConfig(), seed=7, stated={"d_model"})         # d_model stays, the others fit it

Every field is drawn by a generator of its own, so that stating one flag changes no other, unless they must fit.
"""

import dataclasses
import random
import shlex

from model import ARCHITECTURES

from .config import RunConfig

HEADS = (1, 2, 3, 4, 6, 8)
HEAD_SIZES = (16, 32, 64)
WIDTHS = range(48, 129)  # a drawn model trains in minutes on a CPU
FIELDS = ("architecture", "context_size", "n_layer", "n_head", "n_kv_head", "d_model", "window", "window_pattern")


def random_config(run: RunConfig, seed: int, stated: set[str] = frozenset()) -> RunConfig:
    """`run` with its FIELDS drawn, except those in `stated`. Stated values that fit nothing stay as they are."""
    values = {name: getattr(run, name) for name in FIELDS if name in stated}

    def draw(name, candidates):
        candidates = list(candidates)
        if name not in values:
            # a string seeds it the same way in every version of Python, and only random() is promised to stay the same
            chance = random.Random(f"{seed} {name}").random()
            values[name] = candidates[int(chance * len(candidates))] if candidates else getattr(run, name)
        return values[name]

    draw("architecture", ARCHITECTURES)
    context = draw("context_size", (32, 64, 128, 256))
    draw("n_layer", range(2, 6))
    width, kv_heads = values.get("d_model"), values.get("n_kv_head", 1)
    if width is None:
        heads = draw("n_head", (n for n in HEADS if n % kv_heads == 0))
        draw("d_model", [heads * size for size in HEAD_SIZES if heads * size in WIDTHS] or [heads * HEAD_SIZES[0]])
    else:  # heads of equal size, which rotary positions want to be even
        heads = draw("n_head", (n for n in HEADS if n % kv_heads == 0 and width % (2 * n) == 0))
    draw("n_kv_head", [n for n in range(1, heads) if heads % n == 0] or [1])  # fewer than heads, where there are any
    draw("window", sorted({max(1, context // parts) for parts in (8, 4, 2)}))
    draw("window_pattern", ("S", "SL", "SSL", "SSSL"))
    return dataclasses.replace(run, **values)


def as_flags(run: RunConfig) -> str:
    """The flags that state what `random_config` draws, without those that the architecture does not have."""
    unused = set() if "window" in run.architecture else {"window", "window_pattern"}
    unused |= set() if "gqa" in run.architecture else {"n_kv_head"}
    values = {name: getattr(run, name) for name in FIELDS if name not in unused}
    flags = ((f"--{name.replace('_', '-')}", "none" if v is None else str(v)) for name, v in values.items())
    return shlex.join(word for flag in flags for word in flag)
