"""What a run shows: metrics.jsonl, the curves, TensorBoard, the progress bar, sample texts, and the cards' peaks."""

import contextlib
import itertools
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
from model.checkpoint import replacing

from .run_directory import CURVES, METRICS, writing


class History:
    """The measurements of a run, one dict each: in memory, and in metrics.jsonl if there is a directory.

    Training lines hold step, tokens, loss (the mean since the line before), learning_rate, grad_norm, tokens_per_second
    and, for a card with a known peak, mfu. Evaluation lines hold step, tokens, held_out_loss and sample, a text by the
    model. All lines hold seconds since the start. The functions in `followers` are called with each new line.
    """

    def __init__(self, directory: Path | None = None):
        self.lines = []
        self.directory = directory
        self.followers = []

    def add(self, **values) -> None:
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None  # JSON has no NaN and no infinity
        self.lines.append(values)
        if self.directory is not None:
            path = self.directory / METRICS
            with writing(path, self.directory):
                _append(path, json.dumps(values) + "\n")
        for follow in self.followers:
            follow(values)

    def go_back_to(self, step: int) -> None:
        """Reads the metrics.jsonl of a run that resumes from `step`, and drops the lines of later steps.

        Raises ValueError, which names the file, for a line that no run wrote. Half a last line is dropped: the run was
        killed while it wrote.
        """
        path = self.directory / METRICS
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
        self.lines = []
        for number, line in enumerate(lines[:-1], start=1):
            values = None
            with contextlib.suppress(ValueError):
                values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise ValueError(f"{path} is damaged in line {number}: mend it, or move it elsewhere")
            self.lines.append(values)
        self.lines = [line for line in self.lines if line["step"] <= step]
        with writing(path, self.directory), replacing(path) as (file,):
            file.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")

    def series(self, name: str) -> tuple[list, list]:
        """(steps, values) of the lines that hold `name`."""
        lines = [line for line in self.lines if name in line]
        return [line["step"] for line in lines], [line[name] for line in lines]

    def plot(self) -> None:
        """Draws loss.png: losses, learning rate and gradient norm. Does nothing without a directory or matplotlib."""
        if self.directory is None:
            return
        try:
            from matplotlib.figure import Figure  # not pyplot, which chooses a display and keeps every figure
            from matplotlib.ticker import LogLocator
        except ImportError:
            return
        figure = Figure(figsize=(8, 8), layout="constrained")
        losses, rate, norm = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
        figure.suptitle(f"{self.directory.resolve().name}: loss, learning rate and gradient norm")
        losses.plot(*self.series("loss"), color="tab:blue", linewidth=1, alpha=0.6, label="training")
        self._plot_held_out(losses)
        losses.set(ylabel="loss (nats per token)")
        losses.legend()
        rate.plot(*self.series("learning_rate"), color="tab:green", linewidth=1)
        rate.set(ylabel="learning rate")
        norm.plot(*self.series("grad_norm"), color="tab:purple", linewidth=1)
        norm.set(xlabel="step", ylabel="gradient norm")
        if any(self.series("grad_norm")[1]):
            norm.set_yscale("log")  # on a linear scale one spike flattens the rest
            norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        for axes in (losses, rate, norm):
            axes.grid(alpha=0.3)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        norm.xaxis.set_major_formatter("{x:,.0f}")
        path = self.directory / CURVES
        with writing(path, self.directory), replacing(path) as (file,):
            figure.savefig(file, format="png", dpi=110)

    def _plot_held_out(self, axes):
        """The held-out loss with its best and its final value. Step 0 is a point: no line leads from it."""
        red = {"color": "tab:red", "marker": "o", "markersize": 4}
        points = [(step, value) for step, value in zip(*self.series("held_out_loss"), strict=True) if value is not None]
        measured = [point for point in points if point[0] > 0]
        for step, value in points[: len(points) - len(measured)]:
            axes.plot(step, value, fillstyle="none", linestyle="none", label="before training", **red)
        if not measured:
            return
        axes.plot(*zip(*measured, strict=True), label="held out", **red)
        (at, best), (end, final) = min(measured, key=lambda point: point[1]), measured[-1]
        text = f"best and final {best:.3f}" if at == end else f"best {best:.3f}\nfinal {final:.3f}"
        axes.plot(at, best, color="tab:red", marker="*", markersize=12, linestyle="none", label="best")
        axes.annotate(text, (end, final), (0, 12), textcoords="offset points", ha="right", va="bottom")


def _append(path, line):
    """Appends the whole line or nothing."""
    size = path.stat().st_size if path.exists() else 0
    try:
        # opened for each line: a stopped run loses none, and programs that follow the file see each at once
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def require_tensorboard() -> None:
    """Raises ModuleNotFoundError, in one line, if the optional package is missing."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError("tensorboard is not installed: pip install tensorboard, or leave it out") from None


class TensorBoard:
    """Writes each line of a `History` into `tensorboard` in the run directory: numbers as curves, the sample as text.

    first_step: the step that a resumed run starts from. Later steps of an earlier process are hidden.
    """

    def __init__(self, run_directory: Path, first_step: int = 0):
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_directory / "tensorboard", purge_step=first_step + 1 if first_step else None)

    def __call__(self, line: dict) -> None:
        for name, value in line.items():
            if isinstance(value, str):
                # TensorBoard shows Markdown: four spaces keep the text and its line breaks as they are
                self._writer.add_text(name, "    " + value.replace("\n", "\n    "), line["step"])
            elif value is not None and name != "step":
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()


class ProgressBar(tqdm):
    """A bar on stderr with steps, time left and the values of `show`. In a file, one line every ten seconds.

    The time left is that of the remaining steps and evaluations, by those measured so far.
    """

    def __init__(self, total: int, done: int = 0, shown: bool = True, eval_every: int = 1):
        self._values, self._eval_every = {}, eval_every
        # the first step does not count: it also prepares or compiles
        self._seconds, self._steps, self.evaluation_seconds, self._forecasts = 0.0, -1, 0.0, 0
        interval = 0.2 if sys.stderr.isatty() else 10
        super().__init__(
            total=total, initial=done, unit="step", dynamic_ncols=True, mininterval=interval, disable=not shown
        )

    def add_step(self, seconds: float) -> None:
        """Counts a step that took this time."""
        self._steps += 1
        self._seconds += seconds if self._steps else 0
        self.update()

    @property
    def seconds_left(self) -> float:
        """0 while no time is known."""
        steps = self.total - self.n
        if self._steps < 1:
            return 0.0
        return steps * self._seconds / self._steps + -(-steps // self._eval_every) * self.evaluation_seconds

    @property
    def format_dict(self):
        found = super().format_dict
        if left := self.seconds_left:  # tqdm shows (total - n) / rate
            found["rate"] = (self.total - self.n) / left
        return found

    def forecast(self, evaluated: bool) -> None:
        """Prints the time that is left: after two seconds of steps, and once more when an evaluation was measured.

        Nothing is printed in the last ten seconds of a run.
        """
        if self._seconds < 2 or self._forecasts > evaluated:
            return
        self._forecasts, left = self._forecasts + 1, round(self.seconds_left)
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        length = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        step = self._seconds / self._steps * 1000
        if left > 10:
            self.print(f"about {length} left: {step:,.0f} ms a step, {self.evaluation_seconds:.1f} s an evaluation")

    def show(self, **values: str) -> None:
        """Sets values after the bar; each stays until it is set again."""
        self._values |= values
        self.set_postfix_str(", ".join(f"{name} {value}" for name, value in self._values.items()), refresh=False)

    def print(self, line: str) -> None:
        """Prints a line on stdout, above the bar."""
        if not self.disable:
            self.write(line)


SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 40


def sample_text(model, tokenizer, length: int, seed: int) -> Iterator[str]:
    """The text of `length` sampled tokens, in pieces. The prompt is a line break, or token 0 if there is none.

    It ends before the token that ends a document, if the vocabulary has one. The same weights and seed give the same
    text. torch's random state does not change.
    """
    characters = isinstance(tokenizer, CharTokenizer)
    prompt = [0] if characters and "\n" not in tokenizer.stoi else tokenizer.encode("\n") or [0]
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    chosen = {"temperature": SAMPLE_TEMPERATURE, "top_k": SAMPLE_TOP_K, "seed": seed}
    sampled = map(int, generate(model, tokens, length, tokenizer=tokenizer, **chosen))
    return tokenizer.stream(itertools.takewhile(lambda token: token != tokenizer.end_of_text, sampled), prompt)


class Peak(NamedTuple):
    """The most that a card can do, by its data sheet: dense bf16 matrix products and memory bandwidth."""

    tflops: float
    """bf16 with fp32 accumulation, no sparsity, in 1e12 FLOP/s."""
    gb_per_second: float
    """Memory bandwidth in 1e9 bytes/s."""


# A name matches if it has all the words. The first match counts, so variants stand before their family.
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


def peak_of(name: str) -> Peak | None:
    """The `Peak` of a card by the name its driver gives, as in "NVIDIA A100-SXM4-80GB"; None for one not listed."""
    words = set(re.split(r"[\s-]+", name.lower()))
    for card, peak in PEAKS.items():
        if set(card.lower().split()) <= words:
            return peak
    return None


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The peak FLOP/s that MFU (arXiv:2204.02311) is a share of.

    None on a CPU, for a card not listed, and in fp32, since the table has the 16-bit peaks.
    """
    if device.type != "cuda" or precision == "fp32":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return None if peak is None else peak.tflops * 1e12
