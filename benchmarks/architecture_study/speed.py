"""How long a training step and a sampled token take.

Times are measured apart from the training. Contestants take turns, in a new random order every round, because the
speed of a shared machine changes with time. A time is a median with the 20th and 80th percentile.
"""

import itertools
import os
import random
import sys
import time
from functools import partial

import harness
import torch
from measure import spread
from tqdm import tqdm

from model import generate
from train.data import TextData

from .plan import ORIGINAL, Run, Settings
from .training import make_model, train_on_text

PATHS = {"fused": True, "plain": False}  # our kernels, and plain PyTorch (python -m train --no-fused-kernels)
UNTIMED_STEPS = 3


def measure_speed(runs: list[Run], settings: Settings, data: TextData) -> dict:
    """Times of a training step of every model and of a token of those at equal width; JSON values."""
    return {
        "machine": harness.machine(settings.device),
        "training": time_steps(runs, settings, data),
        "sampling": time_tokens(runs, settings, data.tokenizer.vocab_size),
        "load_after": round(os.getloadavg()[0], 1),
    }


def time_steps(runs: list[Run], settings: Settings, data: TextData) -> dict:
    """{name of a model: {path: time of a step of the trainer}}."""

    def turn(run, path):
        """Seconds of each of a few steps of a new model."""
        model = make_model(run, settings, data.tokenizer.vocab_size, fused_kernels=PATHS[path])
        steps = UNTIMED_STEPS + settings.effort("timed_steps")
        trainer = train_on_text(model, run, settings, data, None, max_steps=steps, log_every=1)
        speeds = trainer.history.series("tokens_per_second")[1][UNTIMED_STEPS:]
        return [trainer.tokens_per_step / speed for speed in speeds]

    contestants = {(run, path): partial(turn, run, path) for run in runs for path in PATHS}
    times = take_turns(contestants, settings.effort("step_rounds"), "training steps")
    return {run.model_name: {path: times[run, path] for path in PATHS} for run in runs}


def time_tokens(runs: list[Run], settings: Settings, vocab_size: int) -> dict:
    """{name of a model: {sampler: {position: time of the next token}}}, at equal width.

    The samplers are `generate` with its cache ("cached") and, for the original only, the original's own.
    """
    runs = [run for run in runs if run.width == settings.d_model]
    positions, count = settings.effort("positions"), settings.effort("timed_tokens") + 1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (1, max(positions)), generator=generator).to(settings.device)
    samplers = {"cached": partial(generate, temperature=0), "recomputing": recomputing}
    contestants = {}
    for run in runs:
        model = make_model(run, settings, vocab_size).eval()
        for sampler, position in itertools.product(samplers, positions):
            if sampler == "cached" or run.architecture == ORIGINAL:
                sample = partial(samplers[sampler], model, tokens[:, :position], count)
                contestants[run, sampler, position] = lambda sample=sample: seconds_of_tokens(sample())
    rows = {run.model_name: {} for run in runs}
    times = take_turns(contestants, settings.effort("token_rounds"), "sampled tokens")
    for (run, sampler, position), measured in times.items():
        rows[run.model_name].setdefault(sampler, {})[str(position)] = measured
    return rows


@torch.no_grad()
def recomputing(model, prompt, count):
    """The original sampler: it reads the last context_length tokens again for every token."""
    tokens = prompt
    for _ in range(count):
        logits, _ = model(tokens[:, -model.config.context_length :])
        tokens = torch.cat([tokens, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
        yield tokens[:, -1]


def seconds_of_tokens(stream) -> list[float]:
    """Seconds of each token except the first, which includes the prompt."""
    int(next(stream))
    seconds, before = [], time.perf_counter()
    for token in stream:
        int(token)  # waits for a GPU
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return seconds


def take_turns(contestants: dict, rounds: int, label: str) -> dict:
    """{name: the spread of all seconds that its function returned}; a round calls each once, in a new order."""
    names, seconds, shuffler = list(contestants), {name: [] for name in contestants}, random.Random(0)
    interval = 0.2 if sys.stderr.isatty() else 10  # in a file one line every ten seconds
    with tqdm(total=rounds * len(names), unit="turn", desc=label, mininterval=interval) as bar:
        for _ in range(rounds):
            shuffler.shuffle(names)
            for name in names:
                seconds[name] += contestants[name]()
                bar.update(1)
    spreads = {name: spread(values).as_dict() for name, values in seconds.items()}
    return {name: {key: round(value, 4) for key, value in times.items()} for name, times in spreads.items()}
