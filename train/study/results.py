"""The study as one JSON document: what was measured, summed up over seeds. Tables, plots and page are made of it alone.

models      a row a context, reading and architecture: sizes, losses, times, curves
changes     what each step from the original to the modified architecture does to the loss
windows, rates, copying, sampling, samples
"""

import dataclasses
import math

import torch

from model import KVCache

from .copying import DISTANCES, copying_runs
from .plan import MODIFIED, NAMES, ORIGINAL, READINGS, Design, Run, Settings, compared, model_config, rates, windows
from .store import Store
from .uncertainty import difference, estimate

CACHE_POSITIONS = (100, 4000)
BYTES = 4  # of a parameter and of a cached number: both are fp32
# each step is compared with the one before it, multi-query with the grouped heads that it takes further
STEPS = ((ORIGINAL, "rope"), ("rope", "rope-window"), ("rope-window", MODIFIED), (MODIFIED, "multi-query"))


class Measured:
    """The finished runs of a study, looked up by what was asked."""

    def __init__(self, store: Store, copying: Store, settings: Settings, design: Design, vocab_size: int):
        self.store, self.copying = store, copying
        self.settings, self.design, self.vocab_size = settings, design, vocab_size
        self.speed = store.read("speed")

    def seeds(self, run: Run, count: int | None = None) -> list[dict]:
        """What was measured of a run with each seed."""
        count = self.design.seeds if count is None else count
        return [self.store.read(run._replace(seed=seed).name) for seed in range(count)]

    def losses(self, run: Run, count: int | None = None) -> list[float]:
        """The held-out loss with each seed."""
        return [measured["loss"] for measured in self.seeds(run, count)]

    def config(self, run: Run):
        """The GPTConfig of a run."""
        size = dict(context=run.context, window=run.window, width=run.width)
        return model_config(run.architecture, self.settings, vocab_size=self.vocab_size, **size)

    def step_times(self, run: Run) -> dict[str, dict]:
        """{path: milliseconds of a training step}."""
        return {row["path"]: row for row in self.speed["training"] if _is_of(row, run)}

    def token_times(self, run: Run) -> list[dict]:
        """The rows of the sampled tokens of a model."""
        return [row for row in self.speed["sampling"] if _is_of(row, run)]


def make_document(study: Measured, about: dict) -> dict:
    """The whole study. about: facts for its beginning, such as the command."""
    settings, design = study.settings, study.design
    document = about | {
        "settings": dataclasses.asdict(settings),
        "design": design._asdict(),
        "machine": study.speed["machine"] | {"load_after": study.speed["load_after"]},
        "models": [],
        "changes": [],
        "windows": [],
        "rates": [],
        "copying": copying_rows(study),
    }
    for context in design.contexts:
        runs = compared(settings, design, study.vocab_size, context)
        document["models"] += [model_row(study, reading, run, runs) for (reading, _), run in runs.items()]
        document["changes"] += [
            {
                "context": context,
                "reading": reading,
                "from": before,
                "to": after,
                "difference": difference(
                    study.losses(runs[reading, after]), study.losses(runs[reading, before])
                ).as_dict(),
            }
            for reading in READINGS
            for before, after in STEPS
        ]
        document["windows"] += window_rows(study, context)
        document["rates"] += [
            {
                "context": context,
                "architecture": run.architecture,
                "learning_rate": run.learning_rate,
                "loss": study.losses(run, 1)[0],
            }
            for run in rates(settings, design, context)
        ]
    return document


def model_row(study: Measured, reading: str, run: Run, runs: dict) -> dict:
    """Everything about one architecture in one reading at one context."""
    measured, config = study.seeds(run), study.config(run)
    loss = estimate([result["loss"] for result in measured])
    times = study.step_times(run)
    path = min(times, key=lambda name: times[name]["median_ms"])
    step_ms = times[path]["median_ms"]
    row = {
        "context": run.context,
        "reading": reading,
        "architecture": run.architecture,
        "window": run.window,
        "width": run.width,
        "n_kv_head": config.n_kv_head,
        "parameters": measured[0]["parameters"],
        "bytes": measured[0]["parameters"] * BYTES,
        "kv_bytes_per_token": config.n_layer * 2 * config.n_kv_head * config.head_dim * BYTES,
        "cache_bytes": {str(position): cache_bytes(config, position) for position in CACHE_POSITIONS},
        "tokens": measured[0]["tokens"],
        "loss": loss.as_dict(),
        "loss_by_seed": [result["loss"] for result in measured],
        "perplexity": math.exp(loss.mean),
        "bits_per_character": estimate([result["bits_per_character"] for result in measured]).as_dict(),
        "minus_original": difference(
            [result["loss"] for result in measured], study.losses(runs[reading, ORIGINAL])
        ).as_dict(),
        "step_ms": {name: {key: row[key] for key in ("median_ms", "p20_ms", "p80_ms")} for name, row in times.items()},
        "path": path,
        "tokens_per_second": measured[0]["tokens_per_step"] / step_ms * 1e3,
        "seconds": study.settings.steps * step_ms / 1e3,
        "curve": curve(measured, step_ms),
        "loss_by_position": by_position(measured),
        "sample": measured[0]["sample"],
    }
    row["token_ms"] = [
        {key: time[key] for key in ("sampler", "position", "median_ms", "p20_ms", "p80_ms")}
        for time in study.token_times(run)
    ]
    return row


def cache_bytes(config, position: int) -> int:
    """Bytes of the cache with which the token after `position` others is sampled."""
    if config.positions == "learned":
        position = min(position, config.context_length)
    return KVCache(config, 1, max_length=position, device=torch.device("meta")).num_bytes


def curve(measured: list[dict], step_ms: float) -> list[dict]:
    """The held-out loss during training, over seeds; seconds are steps times the median time of a step."""
    points = []
    for same_step in zip(*(result["curve"] for result in measured), strict=True):
        step, loss = same_step[0][0], estimate([loss for _, loss in same_step])
        tokens = step * measured[0]["tokens_per_step"]
        points.append({"step": step, "tokens": tokens, "seconds": step * step_ms / 1e3, "loss": loss.as_dict()})
    return points


def by_position(measured: list[dict]) -> list[dict]:
    """The held-out loss by how many characters the model had to look back on, over seeds."""
    return [
        {"first": bins[0][0], "last": bins[0][1], "loss": estimate([loss for _, _, loss in bins]).as_dict()}
        for bins in zip(*(result["loss_by_position"] for result in measured), strict=True)
    ]


def window_rows(study: Measured, context: int) -> list[dict]:
    """The modified architecture with each window, and how it differs from that with a window of the whole context."""
    runs = windows(study.settings, study.design, context)
    count = min(study.design.seeds, study.design.window_seeds)
    widest = study.losses(runs[-1], count)
    return [
        {
            "context": context,
            "window": run.window,
            "fraction": run.window / context,
            "reach": (run.window - 1) * study.settings.n_layer + 1,
            "loss": estimate(study.losses(run, count)).as_dict(),
            "minus_widest": difference(study.losses(run, count), widest).as_dict(),
        }
        for run in runs
    ]


def copying_rows(study: Measured) -> list[dict]:
    """How often each model answers right, at each distance."""
    kinds = {distance: kind for kind, distance in DISTANCES.items()}
    return [
        {
            "architecture": run.architecture,
            "distance": run.distance,
            "kind": kinds[run.distance],
            "accuracy": study.copying.read(run.name)["accuracy"],
        }
        for run in copying_runs()
    ]


def find_model(document: dict, context: int, reading: str, architecture: str) -> dict:
    """The row of `models`."""
    wanted = (context, reading, architecture)
    return next(row for row in document["models"] if _place(row) == wanted)


def token_time(row: dict, position: int, sampler: str = "cached") -> dict | None:
    """The time of a sampled token of a row of `models` at a position; None where it was not taken."""
    rows = (time for time in row["token_ms"] if (time["position"], time["sampler"]) == (position, sampler))
    return next(rows, None)


def ranking(document: dict, context: int, reading: str) -> list[dict]:
    """The rows of `models`, the lowest loss first."""
    rows = [find_model(document, context, reading, name) for name in NAMES]
    return sorted(rows, key=lambda row: row["loss"]["mean"])


def _place(row):
    return row["context"], row["reading"], row["architecture"]


def _is_of(row, run):
    return all(row[name] == getattr(run, name) for name in ("architecture", "context", "window", "width"))
