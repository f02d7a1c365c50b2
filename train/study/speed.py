"""How long a training step and a sampled token take: measured apart from the training, the models in turns.

A machine that does other things as well gets slower and faster while one looks at it. Contestants that take turns, in
an order that is drawn anew every round, meet the same machine; medians are compared, with the 20th and the 80th
percentile beside them. Loss against seconds is made of these medians and not of the clock during training.
"""

import dataclasses
import os
import platform
import random
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model import generate

from ..checkpoint import versions
from ..data import TextData, TokenDataset
from .plan import ORIGINAL, Run, Settings
from .training import make_model, quiet_trainer, trainer_config

PATHS = {"fused": True, "plain": False}  # our kernels, and plain PyTorch (python -m train --no-fused-kernels)
UNTIMED_STEPS = 3


class Effort(NamedTuple):
    """How much is measured."""

    training_rounds: int = 5
    steps: int = 12
    sampling_rounds: int = 9
    tokens: int = 16
    positions: tuple[int, ...] = (25, 100, 400, 1000, 4000)

    @classmethod
    def quick(cls):
        return cls(training_rounds=2, steps=5, sampling_rounds=3, positions=(100, 4000))


def measure_speed(training: list[Run], sampling: list[Run], settings: Settings, data: TextData, effort: Effort) -> dict:
    """Times of a step of the models `training` on both paths, and of a token of the models `sampling`; JSON values."""
    torch.set_num_threads(settings.threads)
    machine = describe_machine(settings)
    return {
        "machine": machine,
        "training": time_steps(training, settings, data, effort),
        "sampling": time_tokens(sampling, settings, data, effort),
        "load_after": round(os.getloadavg()[0], 1),
    }


def time_steps(runs: list[Run], settings: Settings, data: TextData, effort: Effort) -> list[dict]:
    """A row a model and path: milliseconds of a step of the trainer."""
    datasets = {run.context: TokenDataset(data.training.tokens, run.context, data.tokenizer) for run in runs}

    def turn(run, path):
        """Seconds of each of a few steps of a new model."""
        dataset = datasets[run.context]
        model = make_model(run, settings, dataset.vocab_size, fused_kernels=PATHS[path])
        config = trainer_config(run, settings)
        config = dataclasses.replace(config, max_steps=UNTIMED_STEPS + effort.steps, log_every=1)
        trainer = quiet_trainer(model, dataset, None, config)
        speeds = trainer.history.series("tokens_per_second")[1][UNTIMED_STEPS:]
        return [trainer.tokens_per_step / speed for speed in speeds]

    contestants = {(run, path): (lambda run=run, path=path: turn(run, path)) for run in runs for path in PATHS}
    times = take_turns(contestants, effort.training_rounds, "training steps")
    return [{**_model(run), "path": path, **spread} for (run, path), spread in times.items()]


def time_tokens(runs: list[Run], settings: Settings, data: TextData, effort: Effort) -> list[dict]:
    """A row a model, sampler and position: milliseconds of the next token of a text of so many.

    The sampler is `generate`, with its cache, and for the original also its own, which reads the whole context for
    every token. Where learned positions have ended there is no other way.
    """
    device = settings.device
    vocab_size = data.tokenizer.vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (1, max(effort.positions)), generator=generator).to(device)
    contestants = {}
    for run in runs:
        model = make_model(run, settings, vocab_size).eval()
        samplers = {"cached": cached, **({"recomputing": recomputing} if run.architecture == ORIGINAL else {})}
        for sampler, function in samplers.items():
            for position in effort.positions:
                contestants[run, sampler, position] = lambda model=model, function=function, position=position: (
                    seconds_of_tokens(function(model, tokens[:, :position], effort.tokens + 1))
                )
    times = take_turns(contestants, effort.sampling_rounds, "sampled tokens")
    return [
        {**_model(run), "sampler": sampler, "position": position, **spread}
        for (run, sampler, position), spread in times.items()
    ]


def cached(model, prompt, count):
    """The sampler of this package."""
    return generate(model, prompt, count, temperature=0)


@torch.no_grad()
def recomputing(model, prompt, count):
    """No cache: the last context_length tokens are read anew for every token, as the original sampler does."""
    tokens = prompt
    for _ in range(count):
        logits, _ = model(tokens[:, -model.config.context_length :])
        tokens = torch.cat([tokens, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
        yield tokens[:, -1]


def seconds_of_tokens(stream) -> list[float]:
    """Seconds of each token but the first, which comes with the reading of the prompt."""
    int(next(stream))
    seconds, before = [], time.perf_counter()
    for token in stream:
        int(token)  # waits for a GPU
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return seconds


def take_turns(contestants: dict, rounds: int, what: str) -> dict:
    """{name: the spread of all seconds that its function returned}; a round calls each once, in a new order."""
    names, seconds, dice = list(contestants), {name: [] for name in contestants}, random.Random(0)
    interval = 0.2 if sys.stderr.isatty() else 10  # in a file a line every ten seconds
    with tqdm(total=rounds * len(names), unit="turn", desc=what, mininterval=interval) as bar:
        for _ in range(rounds):
            dice.shuffle(names)
            for name in names:
                seconds[name] += contestants[name]()
                bar.update(1)
    return {name: spread(values) for name, values in seconds.items()}


def spread(seconds: list[float]) -> dict:
    """Median, 20th and 80th percentile in milliseconds, and of how many."""
    p20, median, p80 = (round(float(value) * 1e3, 4) for value in np.percentile(seconds, [20, 50, 80]))
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "count": len(seconds)}


def describe_machine(settings: Settings) -> dict:
    """What a time depends on, beside the code."""
    device = torch.device(settings.device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor_name(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "load": round(os.getloadavg()[0], 1),  # processes that wanted a core in the minute before: others' noise
        **{name: value for name, value in versions().items() if name in ("python", "torch", "platform")},
    }


def processor_name() -> str:
    """The CPU's name where the system says it, else its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _model(run):
    """The fields of a run that its speed depends on."""
    return {name: getattr(run, name) for name in ("architecture", "context", "window", "width")}
