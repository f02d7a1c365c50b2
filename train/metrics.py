"""Watching a run: the history (metrics.jsonl) and the progress bar."""

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from model import CharTokenizer, generate
from model.files import replacing

from .checkpoint import writing


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


#


def draw(history, path) -> None:
    """Draws what a `History` holds; without matplotlib, nothing."""
    try:
        from matplotlib.figure import Figure  # no pyplot: it would choose a display, and keep every figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 8), layout="constrained")
    losses, rate, norm = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    losses.plot(*history.series("loss"), color="tab:blue", linewidth=1, alpha=0.6, label="training")
    losses.plot(*history.series("held_out_loss"), color="tab:red", marker="o", markersize=4, label="held out")
    losses.set(ylabel="loss (nats per token)")
    losses.legend()
    rate.plot(*history.series("learning_rate"), color="tab:green", linewidth=1)
    rate.set(ylabel="learning rate")
    norm.plot(*history.series("grad_norm"), color="tab:purple", linewidth=1)
    norm.set(xlabel="step", ylabel="gradient norm")
    if any(history.series("grad_norm")[1]):
        norm.set_yscale("log")  # a spike would press everything else flat
    for axes in (losses, rate, norm):
        axes.grid(alpha=0.3)
    with replacing(path) as (file,):
        figure.savefig(file, format="png", dpi=110)


#


def require_tensorboard() -> None:
    """Raises ModuleNotFoundError, in one line, where the package is missing: it is not one that training needs."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError("tensorboard is not installed: pip install tensorboard, or leave it out") from None


class TensorBoard:
    """Writes the lines of a `History` as they come, into `tensorboard` in the run directory.

    Numbers become curves of their own names, the sample a text. first_step: where a resumed run goes on; what an
    earlier process wrote of later steps is not shown.
    """

    def __init__(self, run_directory: Path, first_step: int = 0):
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_directory / "tensorboard", purge_step=first_step + 1 if first_step else None)

    def __call__(self, line: dict) -> None:
        for name, value in line.items():
            if isinstance(value, str):
                # four spaces: as it is, line breaks included, for what is shown is Markdown
                self._writer.add_text(name, "    " + value.replace("\n", "\n    "), line["step"])
            elif value is not None and name != "step":
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()


#

TEMPERATURE, TOP_K = 0.8, 40


def passage(model, tokenizer, length: int, seed: int) -> Iterator[str]:
    """The text of `length` tokens, piece by piece, that follow a line break (the first token, where there is none).

    The same weights and seed write the same; torch's random state is left alone.
    """
    characters = isinstance(tokenizer, CharTokenizer)
    prompt = [0] if characters and "\n" not in tokenizer.stoi else tokenizer.encode("\n") or [0]
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    written = generate(model, tokens, length, temperature=TEMPERATURE, top_k=TOP_K, seed=seed)
    return tokenizer.stream((int(token) for token in written), prompt)


#


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a card at best; None on a CPU, in fp32 (the table has the 16-bit peaks), and for a card not listed."""
    if device.type != "cuda" or precision == "fp32":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return None if peak is None else peak.tflops * 1e12


#


class Peak(NamedTuple):
    tflops: float
    """bf16 with fp32 accumulation, no sparsity, in 1e12 FLOP/s."""
    gb_per_second: float
    """Memory bandwidth in 1e9 bytes/s."""


# A name matches if it has all the words; the first match counts, so that variants stand before their family.
PEAKS = {
    "MI300X": Peak(1307, 5300),
    "B200": Peak(2250, 8000),
    "H200": Peak(989, 4800),
    "GH200": Peak(989, 4000),
    "H100 PCIe": Peak(756, 2000),
    "H100 NVL": Peak(835, 3900),
    "H100": Peak(989, 3350),
    "H800": Peak(989, 3350),
    "A100 PCIE 40GB": Peak(312, 1555),
    "A100 SXM4 40GB": Peak(312, 1555),
    "A100 PCIe 80GB": Peak(312, 1935),
    "A100": Peak(312, 2039),
    "L40S": Peak(362, 864),
    "L40": Peak(181, 864),
    "L4": Peak(121, 300),
    "A10G": Peak(70, 600),
    "A10": Peak(125, 600),
    "A30": Peak(165, 933),
    "A40": Peak(150, 696),
    "A6000": Peak(155, 768),
    "5090": Peak(209, 1792),
    "4090": Peak(165, 1008),
    "4080": Peak(97, 717),
    "3090": Peak(71, 936),
    "3080": Peak(60, 760),
}


def peak_of(name):
    """The `Peak` of a card by the name its driver gives, as in "NVIDIA A100-SXM4-80GB"; None for one not listed."""
    words = set(re.split(r"[\s-]+", name.lower()))
    for card, peak in PEAKS.items():
        if set(card.lower().split()) <= words:
            return peak
    return None
