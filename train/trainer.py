"""The training loop: `Trainer(model, train_dataset, test_dataset, config).train()`.

    from train import CharDataset, Trainer, TrainerConfig
    dataset = CharDataset(text, block_size=64)
    model = GPT(GPTConfig(vocab_size=dataset.vocab_size, context_length=64, n_layer=4, n_head=4, d_model=128))
    Trainer(model, dataset, None, TrainerConfig(max_steps=500)).train()

A step is one update of the weights; what a run does at step n depends on the seed, n and the weights, nothing else.
So a run that is stopped, however, and resumed ends in the same weights as one that was not (train/resume.py).
"""

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import textwrap
import threading
import time
from pathlib import Path

import torch

from model import GPT, flops_a_token
from model.command import resolve_device

from .checkpoint import (
    checkpoint_directory,
    finish_replacing,
    load_state,
    note_resumption,
    open_run_directory,
    point_last_at,
    save_checkpoint,
    seed_step,
    state_of,
    take_up,
    versions,
)
from .config import TrainerConfig
from .data import evaluation_batches, training_batches
from .distributed import join_processes, local_device, whole_weights
from .lock import release_lock, released_after, take_lock
from .memory import checkpoint_blocks
from .metrics import History, ProgressBar, TensorBoard, passage, peak_flops, require_tensorboard
from .optim import MOST_SKIPPED, AverageWeights, SafeSteps, learning_rate_at, make_optimizer


class TrainingFailed(RuntimeError):
    """A run that cannot go on, such as one whose loss is no longer a number."""


class Trainer:
    """Trains a model on the (x, y) examples of a data set.

    model: forward(x, y) -> (logits, loss); train_dataset, test_dataset: a length and items (x, y), such as CharDataset
    (test_dataset None: no evaluation); config: TrainerConfig; record: what else run.json shall hold, JSON values.
    The model is moved to the config's device. Nothing is written unless config.out_dir names a run directory.
    With config.resume its newest whole checkpoint is loaded, whatever the weights of `model` were.
    `history.lines` has what was measured, `interrupted` whether a signal ended the run early.
    Raises ValueError for settings that this machine cannot run, or other ones than those of the run to resume, OSError
    for a run directory it cannot write.
    """

    def __init__(self, model, train_dataset, test_dataset=None, config: TrainerConfig | None = None, record=None):
        self.config = config = config or TrainerConfig()
        self.device = resolve_device(local_device(config.parallel, config.device))
        if config.precision == "fp16" and self.device.type != "cuda":
            raise ValueError(f"precision fp16 needs a CUDA device, not {self.device}: take bf16 or fp32")
        if config.tensorboard:
            require_tensorboard()
            if config.out_dir is None:
                raise ValueError("tensorboard needs a run directory to write into: give out_dir")
        self.processes = join_processes(config.parallel, self.device)
        self.processes.part_of(config.batch_size)
        self.train_dataset, self.test_dataset = train_dataset, test_dataset
        self.tokenizer = getattr(train_dataset, "tokenizer", None)

        self.model = model.to(self.device)
        if config.activation_checkpointing:
            checkpoint_blocks(self.model)
        self.forward = self.processes.distribute(self.model, self.device, config.compile)
        self.optimizer = make_optimizer(
            self.model,
            optimizer=config.optimizer,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=config.betas,
        )
        self.average = None if config.ema_decay is None else AverageWeights(self.model, config.ema_decay)
        self.steps = SafeSteps(self.optimizer, config.precision)

        self.tokens_per_step = config.batch_size * config.grad_accumulation * len(train_dataset[0][0])
        self.total_steps = config.total_steps(len(train_dataset))
        self.schedule = config.learning_rates(self.total_steps, self.tokens_per_step)

        self.step = 0  # steps taken: with the seed it fixes the data still to come
        self.best_held_out_loss = math.inf
        self.loss_sum, self.losses = torch.zeros((), device=self.device), 0  # since the last line of metrics.jsonl
        self.seconds = 0.0  # that the run took before it was resumed
        self.interrupted = False
        self.record = {"versions": versions(), "trainer": config.to_dict(), **(record or {})}
        if dataclasses.is_dataclass(getattr(model, "config", None)):
            self.record["model"] = dataclasses.asdict(model.config)
        self.out_dir = None if config.out_dir is None else Path(config.out_dir)
        self.writes = self.out_dir is not None and self.processes.rank == 0
        self.history = History(self.out_dir if self.writes else None)
        self.resumed_from = None
        if self.out_dir is not None:
            self._begin()
        if config.tensorboard and self.writes:
            self.history.followers.append(TensorBoard(self.out_dir, self.step))
        self.peak_flops = peak_flops(self.device, config.precision) if isinstance(model, GPT) else None  # of a device

    def train(self) -> None:
        """Trains to the end, or until SIGINT (Ctrl-C) or SIGTERM, which saves a checkpoint and returns.

        Raises TrainingFailed after many gradients that are no numbers: the checkpoints of before stay.
        """
        config, batches = self.config, self.batches()
        if self.out_dir is not None:  # a second call has to take the lock again
            self.processes.first_does(take_lock, self.out_dir)
        self.model.train()
        self._meter_started, self._metered = time.perf_counter(), 0
        self.started = self._meter_started - self.seconds

        with (
            released_after(self.out_dir),
            StopRequest() as stop,
            ProgressBar(self.total_steps, self.step, self.processes.rank == 0) as bar,
        ):
            if self.resumed_from is None:
                self._evaluate(bar)
            while self.step < self.total_steps and not self.processes.any(stop.requested):
                self._take_step(batches)
                bar.step()
                last = self.step == self.total_steps
                if last or self._due(config.log_every) or self._due(config.eval_every) or self._due(config.save_every):
                    self._log(bar)
                if last or self._due(config.eval_every):
                    self._evaluate(bar)
                # not while gradients are no numbers: if that does not end, the weights of before are the good ones
                if last or (self._due(config.save_every) and not self.steps.skipped_in_a_row):
                    self._save_checkpoint()
            self.interrupted = self.step < self.total_steps
            if self.interrupted:
                self._save_checkpoint()
                where = f"saved in {self.out_dir / 'last'}" if self.out_dir else "nothing saved (no out_dir)"
                bar.say(f"stopped at step {self.step:,} of {self.total_steps:,}: {where}")

    def batches(self):
        """This process's parts of the batches still to come."""
        config = self.config
        batches = training_batches(
            self.train_dataset,
            config.batch_size,
            config.seed,
            first_batch=0 if config.overfit_one_batch else self.step * config.grad_accumulation,
            num_workers=config.num_workers,
            part=(self.processes.rank, self.processes.count),
        )
        return itertools.repeat(next(batches)) if config.overfit_one_batch else batches

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss over the same held-out examples at every call: an estimate, train/evaluate.py takes them all."""
        self.model.eval()
        rank, count = self.processes.rank, self.processes.count
        total, examples = torch.zeros((), dtype=torch.float64), 0
        for x, y in evaluation_batches(self.test_dataset, self.config.batch_size, self.config.eval_examples):
            # where the processes cannot share a batch equally, as it may be with the last, each of them takes all of it
            shared = slice(rank * len(x) // count, (rank + 1) * len(x) // count) if len(x) % count == 0 else slice(None)
            with self.autocast():
                _, loss = self.model(*self.on_device(x[shared], y[shared]))
            total, examples = total + loss.item() * len(x), examples + len(x)
        self.model.train()
        return self.processes.mean(total).item() / examples

    def _take_step(self, batches) -> None:
        """One update of the weights, or none where the gradient is no number."""
        config = self.config
        seed_step(config.seed, self.step, self.processes.rank, self.device)
        rate = learning_rate_at((self.step + 1) * self.tokens_per_step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = torch.zeros((), device=self.device)
        for number in range(1, config.grad_accumulation + 1):
            x, y = self.on_device(*next(batches))
            with self.processes.averaging(self.forward, last=number == config.grad_accumulation):
                with self.autocast():
                    _, loss = self.forward(x, y)
                self.steps.scaled(loss / config.grad_accumulation).backward()
            losses += loss.detach()
        self._metered += config.grad_accumulation
        updated, self._grad_norm = self.steps.step(config.grad_clip)
        if updated:
            self.loss_sum += losses
            self.losses += config.grad_accumulation
            if self.average is not None:
                self.average.update()
        elif self.steps.skipped_in_a_row == MOST_SKIPPED:
            raise TrainingFailed(
                f"the gradients of {MOST_SKIPPED} steps in a row are no numbers (loss {losses.item():.3g} at step "
                f"{self.step + 1:,}): lower learning_rate (it is {rate:.2g}), or lengthen the warm-up"
            )
        self.step += 1
        self._learning_rate = rate

    def _log(self, bar) -> None:
        """The mean loss since the line before, into history and bar."""
        loss = self.processes.mean(self.loss_sum).item() / self.losses if self.losses else math.nan
        now = time.perf_counter()
        speed = self._metered * self.tokens_per_step / self.config.grad_accumulation / (now - self._meter_started)
        shown = {"loss": f"{loss:.3f}", "tokens/s": f"{speed:,.0f}"}
        measured = {"skipped_steps": self.steps.skipped} if self.steps.skipped else {}
        if self.peak_flops is not None:
            measured["mfu"] = speed * flops_a_token(self.model.config) / (self.peak_flops * self.processes.count)
            shown["MFU"] = f"{measured['mfu']:.1%}"
        self.history.add(
            step=self.step,
            tokens=self.step * self.tokens_per_step,
            loss=loss,
            learning_rate=self._learning_rate,
            grad_norm=self._grad_norm.item(),
            tokens_per_second=round(speed),
            **measured,
            seconds=round(now - self.started, 3),
        )
        bar.show(**shown)
        self.loss_sum.zero_()
        self.losses, self._metered, self._meter_started = 0, 0, now

    def _evaluate(self, bar) -> None:
        """Held-out loss and a sample into history, bar and curves; the best weights so far into `best`."""
        began = time.perf_counter()
        # the average is what the run is for, if there is one: it is evaluated, it writes, and it is the best
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            seen = {} if self.test_dataset is None else {"held_out_loss": self.held_out_loss()}
            if self.step > 0 and (text := self._sample()):
                seen["sample"] = text
            best = self.step > 0 and seen.get("held_out_loss", math.inf) < self.best_held_out_loss
            if seen:
                seconds = round(time.perf_counter() - self.started, 3)
                self.history.add(step=self.step, tokens=self.step * self.tokens_per_step, **seen, seconds=seconds)
            if best:
                self.best_held_out_loss = seen["held_out_loss"]
                self._save_best()
        if self.test_dataset is not None:
            loss = seen["held_out_loss"]
            bar.show(**{"held out": f"{loss:.3f}"})
            bar.say(f"step {self.step:>6,}  held-out loss {loss:.4f}{'  best so far' if best else ''}")
        if "sample" in seen:
            bar.say(textwrap.indent(seen["sample"], "    | ", lambda line: True))
        self._meter_started += time.perf_counter() - began  # tokens/s are those of training
        self.history.plot()

    def _sample(self) -> str:
        """A short text by the model, the same for the same weights; "" if there is no tokenizer or none is wanted."""
        if self.tokenizer is None or not self.config.sample_tokens or not isinstance(self.model, GPT):
            return ""
        if self.processes.rank > 0 or self.processes.parallel == "fsdp":  # whose processes would gather every token
            return ""
        with self.autocast():
            return "".join(passage(self.model, self.tokenizer, self.config.sample_tokens, self.config.seed))

    def _save_best(self) -> None:
        """Writes the weights alone, as `best`."""
        if self.out_dir is not None:
            self._write(self.out_dir / "best")

    def _save_checkpoint(self) -> None:
        """Writes all that going on needs, as checkpoints/step-NNNNNN and `last`."""
        if self.out_dir is not None:
            place = checkpoint_directory(self.out_dir, self.step)
            self._write(place, state_of(self))
            self.processes.first_does(point_last_at, place, self.config.keep_checkpoints)

    def _write(self, place: Path, state: dict | None = None) -> None:
        # every process has a part in gathering the weights, the first one writes them
        weights = whole_weights(self.model)
        self.processes.first_does(save_checkpoint, place, self.model, self.tokenizer, self._facts(), state, weights)

    def _facts(self) -> dict:
        held_out = self.history.series("held_out_loss")[1]
        return {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "held_out_loss": held_out[-1] if held_out else None,
            "best_held_out_loss": self.best_held_out_loss if math.isfinite(self.best_held_out_loss) else None,
            "run": self.record,
        }

    def _begin(self) -> None:
        """Begins a run in out_dir, or goes on with the one there; no other process writes there until `train` ends."""
        try:
            if self.config.resume:
                self._resume()
            else:
                self.processes.first_does(open_run_directory, self.out_dir, self.record)
        except BaseException:
            release_lock(self.out_dir)
            raise

    def _resume(self) -> None:
        """Takes up the run in out_dir where its newest whole checkpoint left it, or at its beginning."""
        self.resumed_from = self.processes.first_does(take_up, self.out_dir, self.record)
        self.processes.first_does(finish_replacing, self.out_dir / "best")
        if self.resumed_from is not None:
            load_state(self, self.resumed_from)
        self.record = self.processes.first_does(note_resumption, self.out_dir, self.record, self.step)
        if self.writes:
            self.history.go_back_to(self.step if self.resumed_from is not None else -1)

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    def on_device(self, *tensors):
        if self.device.type == "cuda":
            return [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        return [tensor.to(self.device) for tensor in tensors]

    def autocast(self):
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)


#

# torchrun passes on to its processes the Ctrl-C that the terminal has given them already: these two are one
_SAME = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0  # seconds


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; the second acts as it did before.

    The loop looks at `requested` between steps, so it always stops with whole weights. Outside the main thread,
    where Python takes no signals, nothing is caught and `requested` stays False.
    """

    def __init__(self):
        self.requested = False
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception):
        self._restore()

    def _request(self, number, frame):
        if self.requested:
            if time.monotonic() - self._first > _SAME:
                self._restore()
                signal.raise_signal(number)
            return
        self.requested, self._first = True, time.monotonic()
        if not _SAME:
            self._restore()
        # not print: the signal may have come in the middle of one, and a buffered stream cannot be entered twice
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step (again: at once)\n".encode())

    def _restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
