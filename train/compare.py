"""The architecture study: does the modified GPT-2 earn its keep?

    python -m train.compare                     # half an hour on a quiet CPU core; Ctrl-C, and the same command goes on
    python -m train.compare --quick             # three minutes: shows the way, settles nothing
    python -m train.compare --retime            # measure only the times anew, on a quiet machine
    python -m train.compare --page-only --docs docs     # only write the tables, plots and the page, into docs/

Trains the original GPT-2 and every step to the modified one, and multi-query attention, on the same characters in the
same order with the same optimizer, at equal width and at equal parameter count, with several seeds. Then times them,
apart from the training, and writes --out (or --docs) /architecture-study.md and beside it, in architecture-study/,
compare.csv, compare.json and the plots. The parts are in train/study/.
"""

import dataclasses
import shlex
import sys
import time

import torch

from model.command import Parser, resolve_device

from .config import add_flags, from_flags, option
from .data import load_data
from .study.copying import copy_and_measure, copying_runs
from .study.page import publish, summary
from .study.plan import READINGS, Design, Settings, all_runs, compared
from .study.results import Measured, make_document
from .study.speed import Effort, measure_speed
from .study.store import Store
from .study.training import check_length, train_and_measure
from .trainer import TrainingFailed

WINDOW_FRACTIONS, WINDOW_SEEDS = (0.1, 0.2, 0.4, 1.0), 2
RATE_FACTORS = (0.5, 2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What to compare, how thoroughly, and where the result goes."""

    data: str = option("shakespeare", "a text as python -m train takes it; the last 10 % are held out")
    context_size: int | None = option(None, "characters in a context (none: both 25 and 256; with --quick 25 and 64)")
    steps: int | None = option(None, "steps of a training run (none: 600; with --quick 30)")
    seeds: int | None = option(None, "runs of each model, from other initial weights (none: 3; with --quick 2)")
    tokens_per_step: int = option(512, "characters a step, as nearly as whole contexts allow")
    learning_rate: float = option(4e-3, "peak learning rate of every run but those that try others")
    window_fraction: float = option(0.4, "window of the compared models, as a fraction of the context")
    n_layer: int = option(4, "layers")
    n_head: int = option(4, "query heads of a layer")
    n_kv_head: int = option(2, "key-value heads of the grouped architecture")
    d_model: int = option(64, "width of the original, and of all at equal width")
    copying_steps: int = option(600, "steps of each model on the copying task")
    fused_kernels: bool = option(True, "train with our kernels; otherwise plain PyTorch (times are taken of both)")
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: a CUDA device where there is one)")
    threads: int = option(1, "CPU threads; models as small gain little from more, and the sums depend on their number")
    out: str | None = option(None, "directory of the study (none: runs/architecture-study, with --quick ...-quick)")
    docs: str | None = option(None, "directory for the page and its folder of tables and plots (none: that of --out)")
    quick: bool = option(False, "a small study: few steps, two seeds")
    retime: bool = option(False, "measure the times anew; with a study that has ended nothing else is measured")
    page_only: bool = option(False, "measure nothing: write tables, plots and page from what a study has left")

    def __post_init__(self):
        for name in ("context_size", "steps", "seeds", "tokens_per_step", "copying_steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, wanted at least 1")
        if self.context_size == 1:
            raise ValueError("context_size is 1, wanted at least 2: a window has to be able to differ from the context")
        if not 0 < self.window_fraction <= 1:
            raise ValueError(f"window_fraction is {self.window_fraction}, wanted more than 0 and at most 1")
        if self.retime and self.page_only:
            raise ValueError("retime and page_only are both given: one measures times, the other nothing")

    @property
    def directory(self) -> str:
        """Where the study is kept."""
        return self.out or ("runs/architecture-study-quick" if self.quick else "runs/architecture-study")

    def settings(self) -> Settings:
        """What all runs have in common."""
        return Settings(
            steps=self.steps or (30 if self.quick else 600),
            tokens_per_step=self.tokens_per_step,
            learning_rate=self.learning_rate,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head,
            d_model=self.d_model,
            fused_kernels=self.fused_kernels,
            device=str(resolve_device(self.device)),
            threads=self.threads,
            curve_points=4 if self.quick else 8,
            curve_tokens=6_400 if self.quick else 12_800,
            held_out_tokens=12_800 if self.quick else 102_400,
            position_tokens=12_800 if self.quick else 98_304,
        )

    def design(self) -> Design:
        """What is compared with what."""
        contexts = (25, 64 if self.quick else 256) if self.context_size is None else (self.context_size,)
        return Design(
            contexts=contexts,
            seeds=self.seeds or (2 if self.quick else 3),
            window_fraction=self.window_fraction,
            window_fractions=WINDOW_FRACTIONS,
            window_seeds=1 if self.quick else WINDOW_SEEDS,
            rate_factors=() if self.quick else RATE_FACTORS,
        )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 for a run that failed, 2 for input it cannot use."""
    parser = Parser(prog="python -m train.compare", description=__doc__)
    add_flags(parser, CompareConfig, "flags")
    flags = parser.parse_args(arguments)
    command = command_of(sys.argv[1:] if arguments is None else arguments)
    try:
        config = from_flags(CompareConfig, flags)
        study = Study(config, command)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
    try:
        study.measure()
        study.write()
    except (TrainingFailed, ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: study failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


def command_of(arguments: list[str]) -> str:
    """The command that makes the whole study: without the flags that only repeat a part of it."""
    parts = [part for part in arguments if part.replace("_", "-") not in ("--retime", "--page-only")]
    return shlex.join(["python", "-m", "train.compare", *parts])


class Study:
    """One study: what it will measure, and what it has measured."""

    def __init__(self, config: CompareConfig, command: str):
        self.config, self.command = config, command
        self.settings, self.design = config.settings(), config.design()
        self.data = load_data(config.data)
        check_length(self.data, self.design.contexts)
        self.vocab_size = self.data.tokenizer.vocab_size
        self.runs = all_runs(self.settings, self.design, self.vocab_size)
        about = dataclasses.asdict(self.settings) | {"text": self.data.record["sha256"][:16]}
        self.store = Store(config.directory, about)
        self.copying = Store(config.directory, {"copying_steps": config.copying_steps})
        # a file of another study shall be said now, and not after minutes
        self.missing = [run for run in self.runs if self.store.read(run.name) is None]
        self.missing_copying = [run for run in copying_runs() if self.copying.read(run.name) is None]
        if config.page_only and (self.missing or self.missing_copying or self.store.read("speed") is None):
            raise ValueError(
                f"{config.directory} lacks {len(self.missing) + len(self.missing_copying)} of "
                f"{len(self.runs) + len(copying_runs())} runs or the times: leave out --page-only to measure them"
            )

    def measure(self) -> None:
        """Trains what is not trained yet, then takes the times that are missing, or all with --retime."""
        torch.set_num_threads(self.settings.threads)
        jobs = [(self.store, run, lambda run: train_and_measure(run, self.settings, self.data)) for run in self.missing]
        steps = self.config.copying_steps
        jobs += [
            (self.copying, run, lambda run: copy_and_measure(run, self.settings, steps)) for run in self.missing_copying
        ]
        total = len(self.runs) + len(copying_runs())
        finished = total - len(jobs)
        print(f"{total} runs, {finished} of them done before, in {self.config.directory}", flush=True)
        started = time.perf_counter()
        for count, (store, run, job) in enumerate(jobs, 1):
            measured = job(run)
            store.write(run.name, measured)
            spent = time.perf_counter() - started
            figure = f"loss {measured['loss']:.4f}" if "loss" in measured else f"{measured['accuracy']:.0%} right"
            left = spent / count * (len(jobs) - count) / 60
            print(f"[{finished + count}/{total}] {run.name}: {figure}, {left:.0f} min left", flush=True)
        if self.config.retime or self.store.read("speed") is None:
            self.store.write("speed", self._measure_speed())

    def _measure_speed(self) -> dict:
        """Times of every compared model's steps, and of the tokens of those of equal width."""
        training, sampling = {}, {}
        for context in self.design.contexts:
            runs = compared(self.settings, self.design, self.vocab_size, context)
            training |= dict.fromkeys(runs.values())
            sampling |= {run: None for (reading, _), run in runs.items() if reading == READINGS[0]}
        effort = Effort.quick() if self.config.quick else Effort()
        return measure_speed(list(training), list(sampling), self.settings, self.data, effort)

    def write(self) -> None:
        """The tables, the plots and the page, from the files alone."""
        measured = Measured(self.store, self.copying, self.settings, self.design, self.vocab_size)
        document = make_document(measured, {"command": self.command, "data": self.config.data})
        page = publish(document, self.config.docs or self.config.directory)
        print(f"\n{summary(document)}\n\npage: {page}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\npython -m train.compare: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
