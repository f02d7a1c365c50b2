"""Watching a run: the history (metrics.jsonl) and the progress bar."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from model.checkpoint import replacing

from .checkpoint import writing
from .curves import draw


class History:
    """What was measured, a dict at a time: kept in memory, and written to metrics.jsonl where there is a directory.

    Training lines hold step, tokens, loss (the mean since the line before), learning_rate, grad_norm, tokens_per_second
    and, where it is known, mfu, the share of the card's peak; evaluation lines step, tokens, held_out_loss and sample,
    a text by the model. Both hold seconds since the start. `followers` are called with every line as it comes.
    """

    def __init__(self, directory: Path | None = None):
        self.lines = []
        self.directory = directory
        self.followers = []

    def add(self, **values) -> None:
        # JSON has no NaN and no infinity
        values = {name: None if _is_no_number(value) else value for name, value in values.items()}
        self.lines.append(values)
        if self.directory is not None:
            path = self.directory / "metrics.jsonl"
            with writing(path, self.directory):
                _append(path, json.dumps(values) + "\n")
        for follow in self.followers:
            follow(values)

    def go_back_to(self, step: int) -> None:
        """Takes up the metrics.jsonl of a run that goes on from `step`; what it holds of later steps comes again."""
        path = self.directory / "metrics.jsonl"
        self.lines = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # half a line: the run was killed as it wrote it
                self.lines.append(json.loads(line))
        self.lines = [line for line in self.lines if line["step"] <= step]
        with writing(path, self.directory), replacing(path) as (file,):
            file.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")

    def series(self, name: str) -> tuple[list, list]:
        """(steps, values) of the lines that hold `name`."""
        lines = [line for line in self.lines if name in line]
        return [line["step"] for line in lines], [line[name] for line in lines]

    def plot(self) -> None:
        """Draws loss.png anew; without a directory, nothing."""
        if self.directory is not None:
            path = self.directory / "loss.png"
            with writing(path, self.directory):
                draw(self, path)


def _append(path, line):
    """Adds the line, or nothing of it."""
    size = path.stat().st_size if path.exists() else 0
    try:
        # opened for each line: a stopped run loses none, and whoever follows the file sees them at once
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def _is_no_number(value):
    return isinstance(value, float) and not math.isfinite(value)


class ProgressBar:
    """A bar on stderr: steps, time left, loss, tokens/s, MFU on CUDA. In a file, a line every ten seconds."""

    def __init__(self, total: int, done: int = 0, shown: bool = True):
        interval = 0.2 if sys.stderr.isatty() else 10
        self._says = shown
        self._bar = tqdm(
            total=total, initial=done, unit="step", dynamic_ncols=True, mininterval=interval, disable=not shown
        )
        self._shown = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._bar.close()

    def step(self) -> None:
        self._bar.update(1)

    def show(self, **values: str) -> None:
        """Values after the bar; they stay until shown anew."""
        self._shown |= values
        self._bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in self._shown.items()), refresh=False)

    def say(self, line: str) -> None:
        """A line on stdout, above the bar."""
        if self._says:
            tqdm.write(line)
