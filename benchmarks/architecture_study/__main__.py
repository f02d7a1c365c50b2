"""Is the modified GPT-2 (rotary positions, sliding window, grouped KV heads) better than the original?

    python benchmarks/architecture_study                    # an hour on a quiet CPU core; resumes after Ctrl-C
    python benchmarks/architecture_study --quick            # three minutes: shows how it works, decides nothing
    python benchmarks/architecture_study --retime           # measure only the times again, on a quiet machine
    python benchmarks/architecture_study --only-tables --docs docs      # from compare.json: tables, csv and plots

Trains the original GPT-2, every step towards the modified one, `modern` and multi-query attention, on the same
characters in the same order with the same optimizer, each with its own best learning rate, at equal width and at equal
parameter count, for two lengths of run, with several seeds. Then measures the times of training steps and sampled
tokens. Writes architecture-study.md into --docs, and architecture-study/ beside it: compare.csv, compare.json and the
plots. On a page that exists, only the tables between comments are replaced.
"""

import csv
import json
import sys
import time
from pathlib import Path

if not __package__:  # run as a folder, which Python puts first on the path: its place is for benchmarks/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import harness  # it puts the root of the repository on the path
import torch
from architecture_study.plan import Plan, Run, Settings, model_config
from architecture_study.plots import PLOTS, draw_all
from architecture_study.results import Store, as_json, make_document
from architecture_study.speed import measure_speed
from architecture_study.tables import all_tables, csv_rows, empty_page, fill, markdown
from architecture_study.training import LONGEST, CopyRun, copy_and_measure, copying_runs, train_and_measure

from model.checkpoint import replacing
from model.command import Parser
from train.config import add_flags, from_flags
from train.data import load_data
from train.trainer import TrainingFailed

FOLDER, NO_PLOT = "architecture-study", "No plot: matplotlib is not installed.\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 for a run that failed, 2 for input it cannot use."""
    parser = Parser(prog="python benchmarks/architecture_study", description=__doc__)
    add_flags(parser, Settings, "flags")
    flags = parser.parse_args(arguments)
    try:
        settings = from_flags(Settings, flags)
        file = Path(settings.docs) / FOLDER / "compare.json"
        study = None if settings.only_tables else Study(settings)
        if study is None and not file.exists():
            raise ValueError(f"{file} is missing: leave out --only-tables to measure first")
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
    try:
        if study is not None:
            study.measure()
            document = make_document(study.store, study.plan)
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as (new,):
                new.write_text(as_json(document), encoding="utf-8")
        publish(json.loads(file.read_text(encoding="utf-8")), Path(settings.docs))
    except (TrainingFailed, ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: study failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


class Study:
    """What a study will measure, and what it has measured. Raises ValueError for settings that cannot be used."""

    def __init__(self, settings: Settings):
        self.settings, self.data = settings, load_data(settings.data, documents=False)
        characters, needed = len(self.data.held_out.tokens), LONGEST * max(settings.contexts) + 1
        if characters < needed:
            raise ValueError(
                f"data has a held-out part of {characters:,} characters, and context {max(settings.contexts)} needs "
                f"{needed:,}: give a longer text or a smaller --context-size"
            )
        self.store = Store(settings.out, settings.of_every_run() | {"text": self.data.record["sha256"][:16]})
        self.losses = {}
        self.plan = Plan(settings, self.data.tokenizer.vocab_size, self.loss_of)
        # sizes that fit no model and a file of another study are reported here, before minutes of training
        for run in self.plan.runs():
            model_config(run, settings, self.plan.vocab_size)
        self.missing()

    def loss_of(self, run: Run) -> float | None:
        """The final loss of a finished run, else None."""
        if run not in self.losses and (measured := self.store.read(run.name)):
            self.losses[run] = measured["loss"]
        return self.losses.get(run)

    def runs(self) -> list[Run | CopyRun]:
        """Every run that is known by now."""
        return [*self.plan.runs(), *copying_runs(self.settings)]

    def missing(self) -> list[Run | CopyRun]:
        """Those that are not finished, in the order of training."""
        return [run for run in self.runs() if self.store.read(run.name) is None]

    def measure(self) -> None:
        """Trains what is missing, then measures the times that are missing, or all of them with --retime."""
        settings, started, steps = self.settings, time.perf_counter(), 0
        torch.set_num_threads(settings.threads)
        print(f"{len(self.runs()) - len(self.missing())} runs are finished, in {settings.out}", flush=True)
        while missing := self.missing():  # a finished run can make others known
            run = missing[0]
            if isinstance(run, CopyRun):
                measured = copy_and_measure(run, settings)
                figure = f"{measured['accuracy']:.0%} right"
            else:
                measured = train_and_measure(run, settings, self.data)
                figure = f"loss {measured['loss']:.4f}"
            self.store.write(run.name, measured)
            steps += run.steps
            missing = self.missing()
            left = (time.perf_counter() - started) / steps * sum(run.steps for run in missing) / 60
            finished, total = len(self.runs()) - len(missing), len(self.runs())
            print(f"[{finished}/{total}] {run.name}: {figure}, at least {left:.0f} min left", flush=True)
        speed = self.store.read("speed") or {"training": {}}
        runs = [run for place in settings.places for run in self.plan.compared(place).values()]
        models = {run.model_name: run for run in runs}  # neither the rate nor the length changes a time
        if settings.retime or not speed["training"].keys() >= models.keys():
            self.store.write("speed", measure_speed(list(models.values()), settings, self.data))


def publish(document: dict, directory: Path) -> None:
    """Writes compare.csv, the plots and the tables of the page; prints the ranking."""
    rows = list(csv_rows(document))
    with replacing(directory / FOLDER / "compare.csv") as (file,), open(file, "w", newline="", encoding="utf-8") as new:
        writer = csv.DictWriter(new, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    tables = all_tables(document)
    parts = {name: "\n".join(map(markdown, some)) for name, some in tables.items()}
    drawn = draw_all(document, directory / FOLDER)
    parts |= {name: f"![{title}]({FOLDER}/{name})\n" if drawn else NO_PLOT for name, (title, *_) in PLOTS.items()}
    page = directory / "architecture-study.md"
    text = page.read_text(encoding="utf-8") if page.exists() else empty_page(parts)
    with replacing(page) as (file,):
        file.write_text(fill(text, parts), encoding="utf-8")
    print("\n" + "\n\n".join(map(harness.as_text, tables["ranking"])) + f"\n\npage: {page}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\npython benchmarks/architecture_study: interrupted; the same command resumes it", file=sys.stderr)
        sys.exit(130)
