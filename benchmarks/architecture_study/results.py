"""What a study has measured: the store of its runs, the statistics of a few seeds, and the document compare.json.

The document is all that the tables and plots need, in plain JSON with a line for each row:

    settings, machine
    models     context, steps, sizes, losses (one for each seed), step_ms {path: time}, curve [[tokens, loss, standard
               error]], at equal width also positions [[first, last, loss, standard error]], token_ms {sampler:
               {position: time}} and a sample
    windows    losses of the modified architecture with each window
    rates      of each context, length and architecture, {learning rate: losses, one for each seed of the search}
    copying    {architecture: {distance: accuracy on the copying task}}
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from model import KVCache
from model.checkpoint import replacing

from .plan import EQUAL_WIDTH, NAMES, Plan, Run, model_config
from .training import copying_runs

CACHE_POSITIONS = (100, 4000)
BYTES = 4  # of a parameter and of a cached number: fp32
# 97.5 % points of Student's t for 1, 2, ... degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Store:
    """The runs that a study has finished, a file runs/NAME.json for each, so that it can be resumed.

    about: what every run depends on besides its own fields. A file with other values is an error.
    """

    def __init__(self, directory: str | Path, about: dict):
        self.directory = Path(directory)
        self.about = about

    def read(self, name: str) -> dict | None:
        """What was measured under a name, or None. Raises ValueError for a file of another study or a damaged one."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            about, measured = content["about"], content["measured"]
            differing = [key for key in {**about, **self.about} if about.get(key) != self.about.get(key)]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged: remove it, and it is measured again") from None
        if differing:
            named = ", ".join(f"{key} {about.get(key)} and not {self.about.get(key)}" for key in differing)
            raise ValueError(f"{self.directory} holds a study with {named}: choose another --out, or remove it")
        return measured

    def write(self, name: str, measured: dict) -> None:
        """Keeps what was measured; after a crash the file is complete or not there."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as (file,):
            file.write_text(json.dumps({"about": self.about, "measured": measured}, indent=1) + "\n", encoding="utf-8")

    def _path(self, name):
        return self.directory / "runs" / f"{name}.json"


class Estimate(NamedTuple):
    """A mean over seeds, its standard error (None for one seed) and half of its 95 % interval (infinite for one)."""

    mean: float
    standard_error: float | None
    margin: float

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole 95 % interval lies below or above 0, else 0."""
        return (self.mean > self.margin) - (self.mean < -self.margin)


def estimate(values: list[float]) -> Estimate:
    """The mean of values, one for each seed. The interval is Student's: 4.3 standard errors for three seeds, not 2."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, None, math.inf)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Estimate(mean, error, error * (T_975[count - 2] if count - 2 < len(T_975) else 1.96))


def difference(ours: list[float], theirs: list[float]) -> Estimate:
    """ours - theirs, seed by seed, both in the order of the seeds.

    Two models of one seed read the same examples in the same order, so their losses move together: the difference is
    known better than either loss.
    """
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def make_document(store: Store, plan: Plan) -> dict:
    """The document of a finished study."""
    settings, speed = plan.settings, store.read("speed")
    document = {"models": [], "windows": [], "rates": [], "copying": {}}

    def read(run, seeds):
        return [store.read(run._replace(seed=seed).name) for seed in seeds]

    for place in settings.places:
        compared = plan.compared(place)
        for run in dict.fromkeys(compared.values()):
            sizes = [size for (size, _), other in compared.items() if other == run]
            document["models"].append(model_row(run, sizes, read(run, settings.compared_seeds), speed, plan))
        for name in NAMES:
            losses = {}
            for run in plan.search(name, place):
                losses.setdefault(f"{run.learning_rate:g}", []).append(plan.loss_of(run))
            best = f"{plan.best(name, place).learning_rate:g}"
            document["rates"].append({**place._asdict(), "architecture": name, "best": best, "losses": losses})
    for context in settings.contexts:
        for run in plan.windows(context):
            losses = [measured["loss"] for measured in read(run, settings.window_seeds)]
            document["windows"].append({"context": context, "window": run.window, "losses": losses})
    for run in copying_runs(settings):
        accuracies = document["copying"].setdefault(run.architecture, {})
        accuracies[str(run.distance)] = store.read(run.name)["accuracy"]
    names = ("data", "contexts", "steps", "places", "seeds", "learning_rate", "window_fraction", "copying_steps")
    return {
        "settings": settings.of_every_run() | {name: getattr(settings, name) for name in names},
        "machine": speed["machine"] | {"load_after": speed["load_after"]},
        **document,
    }


def model_row(run: Run, sizes: list[str], seeds: list[dict], speed: dict, plan: Plan) -> dict:
    """One model at one context and length: what was measured of it with each seed, and its times."""
    config, first = model_config(run, plan.settings, plan.vocab_size), seeds[0]
    names = ("context", "steps", "architecture", "window", "width", "learning_rate")
    row = {
        **{name: getattr(run, name) for name in names},
        "sizes": sizes,
        "n_kv_head": config.n_kv_head,
        "parameters": first["parameters"],
        "kv_bytes_per_token": config.n_layer * 2 * config.n_kv_head * config.head_dim * BYTES,
        "cache_bytes": {str(position): cache_bytes(config, position) for position in CACHE_POSITIONS},
        "tokens": run.steps * first["tokens_per_step"],
        "losses": [measured["loss"] for measured in seeds],
        "step_ms": speed["training"][run.model_name],
        "curve": over_seeds(seeds, "curve"),
    }
    for point in row["curve"]:
        point[0] *= first["tokens_per_step"]
    if EQUAL_WIDTH in sizes:
        row["positions"] = over_seeds(seeds, "loss_by_position")
        row["token_ms"] = speed["sampling"][run.model_name]
        row["sample"] = first["sample"]
    return row


def over_seeds(seeds: list[dict], name: str) -> list[list]:
    """[[*place, mean loss, standard error]] of a list [[*place, loss]] that every seed has."""
    points = []
    for same in zip(*(measured[name] for measured in seeds), strict=True):
        mean, error, _ = estimate([loss for *_, loss in same])
        points.append([*same[0][:-1], round(mean, 6), None if error is None else round(error, 6)])
    return points


def cache_bytes(config, position: int) -> int:
    """Bytes of the cache after `position` tokens."""
    if config.positions == "learned":
        position = min(position, config.context_length)
    return KVCache(config, 1, max_length=position, device=torch.device("meta")).num_bytes


def as_json(document: dict) -> str:
    """The document as JSON, each row of its lists on one line."""
    parts = []
    for key, value in document.items():
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
        text = f"[\n{rows}\n ]" if isinstance(value, list) else json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
