"""The training loop: `Trainer(model, train_dataset, test_dataset, config).train()`.

    from train import CharDataset, Trainer, TrainerConfig
    dataset = CharDataset(text, block_size=64)
    model = GPT(GPTConfig(vocab_size=dataset.vocab_size, context_length=64, n_layer=4, n_head=4, d_model=128))
    Trainer(model, dataset, None, TrainerConfig(max_steps=500)).train()

A step is one update of the weights. It depends only on the seed, its number and the weights, so a run that is stopped
and resumed ends in the same weights as one that is not.
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

import numpy as np
import torch

from model import GPT, flops_per_token
from model.command import fast_precision, resolve_device

from .checkpoint import (
    checkpoint_to_resume,
    finish_replacing,
    note_resumption,
    open_run_directory,
    point_last_at,
    read_state,
    save_checkpoint,
    versions,
)
from .config import TrainerConfig
from .data import evaluation_batches, training_batches
from .distributed import full_optimizer_state, full_weights, join_processes, load_full, local_device
from .lock import release_lock, take_lock
from .memory import SavedActivations, checkpoint_blocks, parameter_memory
from .metrics import History, ProgressBar, TensorBoard, peak_flops, require_tensorboard, sample_text
from .optim import MAX_SKIPPED, AverageWeights, GradientScaler, learning_rate_at, make_optimizer

# torchrun sends its processes a second Ctrl-C after the terminal's: two within this many seconds are one
_REPEAT_SECONDS = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class TrainingFailed(RuntimeError):
    """A run that cannot continue, for example because its gradients are not finite."""


class Trainer:
    """Trains a model on the (x, y) examples of a data set.

    model: forward(x, y) -> (logits, loss); it is moved to the config's device.
    train_dataset, test_dataset: a length and items (x, y), such as CharDataset. test_dataset is the held-out text; None
    means no evaluation. record: more JSON values for run.json.
    Nothing is written unless config.out_dir names a run directory. With config.resume the newest undamaged checkpoint
    there replaces the weights of `model`. `history.lines` has the measurements; `interrupted` says whether a signal
    ended the run.
    Raises ValueError for settings that this machine cannot run, or that are not those of the run to resume; OSError for
    a run directory that cannot be written.
    """

    def __init__(self, model, train_dataset, test_dataset=None, config: TrainerConfig | None = None, record=None):
        self.config = config = config or TrainerConfig()
        self.device = resolve_device(local_device(config.parallel, config.device))
        self.precision, self.why_precision = config.precision, "asked for"
        if config.precision == "auto":
            self.precision, self.why_precision = fast_precision(self.device)
        if config.precision == "fp16" and self.device.type != "cuda":
            raise ValueError(f"precision fp16 needs a CUDA device, not {self.device}: take bf16 or fp32")
        if config.tensorboard:
            require_tensorboard()
            if config.out_dir is None:
                raise ValueError("tensorboard needs a run directory to write into: give out_dir")
        self.processes = join_processes(config.parallel, self.device)
        self.processes.local_batch_size(config.batch_size)  # raises if the processes cannot share a batch
        self.train_dataset, self.held_out_dataset = train_dataset, test_dataset
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
        self.scaler = GradientScaler(self.optimizer, self.precision)
        self.peak_flops = peak_flops(self.device, self.precision) if isinstance(model, GPT) else None  # of a device

        self.tokens_per_step = config.batch_size * config.grad_accumulation * len(train_dataset[0][0])
        self.total_steps = config.total_steps(len(train_dataset))
        self.schedule = config.learning_rates(self.total_steps, self.tokens_per_step)

        self.step = 0  # finished steps
        self.best_held_out_loss = math.inf
        self.loss_sum, self.losses = torch.zeros((), device=self.device), 0  # since the last line of metrics.jsonl
        self.seconds = 0.0  # of the run before it was resumed
        self.interrupted = False
        self.record = {"versions": versions(), "trainer": config.to_dict(), **(record or {})}
        if dataclasses.is_dataclass(getattr(model, "config", None)):
            self.record["model"] = dataclasses.asdict(model.config)
        self.out_dir = None if config.out_dir is None else Path(config.out_dir)
        writes = self.out_dir is not None and self.processes.rank == 0
        self.history = History(self.out_dir if writes else None)
        self.resumed_from = None
        if self.out_dir is not None:
            self._open_run_directory()
        if config.tensorboard and writes:
            self.history.followers.append(TensorBoard(self.out_dir, self.step))

    def train(self) -> None:
        """Trains to the end, or until SIGINT (Ctrl-C) or SIGTERM, which saves a checkpoint and returns.

        Raises TrainingFailed after many steps in a row without a finite gradient; earlier checkpoints stay.
        """
        if self.out_dir is not None:  # a second call takes the lock again
            self.processes.run_on_main(take_lock, self.out_dir)
        self.model.train()
        self._meter_started, self._metered = time.perf_counter(), 0
        self.started = self._meter_started - self.seconds
        try:
            with StopRequest() as stop, ProgressBar(self.total_steps, self.step, self.processes.rank == 0) as bar:
                self._loop(stop, bar)
        finally:
            if self.out_dir is not None:
                release_lock(self.out_dir)

    def _loop(self, stop, bar) -> None:
        config, batches = self.config, self.batches()
        if self.resumed_from is None:
            self._evaluate(bar)
        while self.step < self.total_steps and not self.processes.any(stop.requested):
            self._take_step(batches)
            bar.update()
            last = self.step == self.total_steps
            log, evaluate, save = (
                last or self.step % every == 0 for every in (config.log_every, config.eval_every, config.save_every)
            )
            if log or evaluate or save:
                self._log(bar)
            if evaluate:
                self._evaluate(bar)
            # not while steps are skipped: if that does not end, the earlier weights are the good ones
            if last or (save and not self.scaler.skipped_in_a_row):
                self._save_checkpoint()
        self.interrupted = self.step < self.total_steps
        if self.interrupted:
            self._save_checkpoint()
            where = f"saved in {self.out_dir / 'last'}" if self.out_dir else "nothing saved (no out_dir)"
            bar.print(f"stopped at step {self.step:,} of {self.total_steps:,}: {where}")

    def batches(self):
        """This process's parts of the remaining batches."""
        config = self.config
        batches = training_batches(
            self.train_dataset,
            config.batch_size,
            config.seed,
            first_batch=0 if config.overfit_one_batch else self.step * config.grad_accumulation,
            num_workers=config.num_workers,
            part=(self.processes.rank, self.processes.world_size),
        )
        return itertools.repeat(next(batches)) if config.overfit_one_batch else batches

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss over eval_examples held-out examples, the same at every call; train/evaluate.py takes all."""
        self.model.eval()
        rank, world_size = self.processes.rank, self.processes.world_size
        total, examples = torch.zeros((), dtype=torch.float64), 0
        for x, y in evaluation_batches(self.held_out_dataset, self.config.batch_size, self.config.eval_examples):
            # if the processes cannot share a batch equally, such as the last one, each of them takes all of it
            equal = len(x) % world_size == 0
            part = slice(rank * len(x) // world_size, (rank + 1) * len(x) // world_size) if equal else slice(None)
            with self._autocast():
                _, loss = self.model(*self._on_device(x[part], y[part]))
            total, examples = total + loss.item() * len(x), examples + len(x)
        self.model.train()
        return self.processes.mean(total).item() / examples

    def estimate(self) -> dict:
        """What the run will take: bytes of weights, gradients, optimizer and activations; seconds, seconds_per_step.

        All processes must call it. It measures one batch, forward and backward, after one to warm up. An evaluation's
        batch counts as a third of that, the optimizer's time not at all. The run does not change.
        """
        config = self.config
        x, y = self._on_device(*next(self.batches()))
        saved = SavedActivations(self.model)
        if config.compile:  # compiled code saves its activations where no hook sees them
            with saved, self._autocast():
                self.model(x, y)
        for warm_up in (True, False):
            began = time.perf_counter()
            with saved if warm_up and not config.compile else contextlib.nullcontext():
                # with gradient_sync: under fsdp unreduced gradients would remain and count in the first step
                self._forward_backward(x, y, sync=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - began
            self.optimizer.zero_grad(set_to_none=True)
        activations = saved.bytes()
        if config.activation_checkpointing:  # the blocks' inputs are saved where no hook sees them
            activations += len(self.model.blocks) * x.numel() * self.model.config.d_model * 4
        steps = self.total_steps - self.step
        examples = 0 if self.held_out_dataset is None else min(config.eval_examples, len(self.held_out_dataset))
        evaluations = steps // config.eval_every * examples / config.batch_size / 3
        shards = self.processes.world_size if self.processes.parallel == "fsdp" else 1
        return {
            **parameter_memory(self.optimizer, averaged=self.average is not None, shards=shards),
            "activations": activations,
            "seconds": seconds * (steps * config.grad_accumulation + evaluations),
            "seconds_per_step": seconds * config.grad_accumulation,
        }

    def _take_step(self, batches) -> None:
        """One update of the weights, or none if the gradient is not finite."""
        config = self.config
        _seed_step(config.seed, self.step, self.processes.rank, self.device)
        self._learning_rate = learning_rate_at((self.step + 1) * self.tokens_per_step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate
        losses = torch.zeros((), device=self.device)
        for number in range(1, config.grad_accumulation + 1):
            x, y = self._on_device(*next(batches))
            losses += self._forward_backward(x, y, sync=number == config.grad_accumulation)
        self._metered += config.grad_accumulation
        updated, self._grad_norm = self.scaler.step(config.grad_clip)
        if updated:
            self.loss_sum += losses
            self.losses += config.grad_accumulation
            if self.average is not None:
                self.average.update()
        elif self.scaler.skipped_in_a_row == MAX_SKIPPED:
            raise TrainingFailed(
                f"the gradients of {MAX_SKIPPED} steps in a row are not finite (loss {losses.item():.3g} at step "
                f"{self.step + 1:,}): lower learning_rate (it is {self._learning_rate:.2g}), or lengthen the warm-up"
            )
        self.step += 1

    def _forward_backward(self, x, y, sync: bool) -> torch.Tensor:
        """Adds the gradients of a batch, averaged over the processes if `sync`. Returns the loss."""
        with self.processes.gradient_sync(self.forward, sync):
            with self._autocast():
                _, loss = self.forward(x, y)
            self.scaler.scale_loss(loss / self.config.grad_accumulation).backward()
        return loss.detach()

    def _log(self, bar) -> None:
        """Writes the mean loss since the line before into history and bar."""
        loss = self.processes.mean(self.loss_sum).item() / self.losses if self.losses else math.nan
        now = time.perf_counter()
        speed = self._metered * self.tokens_per_step / self.config.grad_accumulation / (now - self._meter_started)
        shown = {"loss": f"{loss:.3f}", "tokens/s": f"{speed:,.0f}"}
        measured = {"skipped_steps": self.scaler.skipped} if self.scaler.skipped else {}
        if self.peak_flops is not None:
            measured["mfu"] = speed * flops_per_token(self.model.config) / (self.peak_flops * self.processes.world_size)
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
        """Writes held-out loss and a sample into history, bar and curves; saves the best weights so far as `best`."""
        began = time.perf_counter()
        # a moving average is what the run is for: it is evaluated, sampled from, and saved as best
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            seen = {} if self.held_out_dataset is None else {"held_out_loss": self.held_out_loss()}
            if self.step > 0 and (text := self._sample()):
                seen["sample"] = text
            best = self.step > 0 and seen.get("held_out_loss", math.inf) < self.best_held_out_loss
            if seen:
                seconds = round(time.perf_counter() - self.started, 3)
                self.history.add(step=self.step, tokens=self.step * self.tokens_per_step, **seen, seconds=seconds)
            if best:
                self.best_held_out_loss = seen["held_out_loss"]
                if self.out_dir is not None:
                    self._write(self.out_dir / "best")
        if "held_out_loss" in seen:
            loss = seen["held_out_loss"]
            bar.show(**{"held out": f"{loss:.3f}"})
            bar.print(f"step {self.step:>6,}  held-out loss {loss:.4f}{'  best so far' if best else ''}")
        if "sample" in seen:
            bar.print(textwrap.indent(seen["sample"], "    | ", lambda line: True))
        self._meter_started += time.perf_counter() - began  # tokens/s count training time only
        self.history.plot()

    def _sample(self) -> str:
        """A short text by the model, the same for the same weights; "" without a tokenizer or if none is wanted."""
        if self.tokenizer is None or not self.config.sample_tokens or not isinstance(self.model, GPT):
            return ""
        if self.processes.rank > 0 or self.processes.parallel == "fsdp":  # fsdp would gather weights for each token
            return ""
        with self._autocast():
            return "".join(sample_text(self.model, self.tokenizer, self.config.sample_tokens, self.config.seed))

    def _save_checkpoint(self) -> None:
        """Writes weights and training state as checkpoints/step-NNNNNN, and makes `last` a link to it."""
        if self.out_dir is None:
            return
        state = {
            "step": self.step,
            "optimizer": full_optimizer_state(self.model, self.optimizer),
            "steps": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "best_held_out_loss": self.best_held_out_loss,
            "loss_sum": self.processes.mean(self.loss_sum).cpu(),
            "losses": self.losses,
            "seconds": time.perf_counter() - self.started,
        }
        directory = self.out_dir / "checkpoints" / f"step-{self.step:06d}"
        self._write(directory, state)
        self.processes.run_on_main(point_last_at, directory, self.config.keep_checkpoints)

    def _write(self, directory: Path, state: dict | None = None) -> None:
        """Writes the weights, and the state if it is given."""
        held_out = self.history.series("held_out_loss")[1]
        facts = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "held_out_loss": held_out[-1] if held_out else None,
            "best_held_out_loss": self.best_held_out_loss if math.isfinite(self.best_held_out_loss) else None,
            "run": self.record,
        }
        weights = full_weights(self.model)  # all processes gather them, rank 0 writes
        self.processes.run_on_main(save_checkpoint, directory, self.model, self.tokenizer, facts, state, weights)

    def _open_run_directory(self) -> None:
        """Starts a run in out_dir or resumes the one there, and holds its lock until `train` ends."""
        try:
            if self.config.resume:
                self._resume()
            else:
                self.processes.run_on_main(open_run_directory, self.out_dir, self.record)
        except BaseException:
            release_lock(self.out_dir)
            raise

    def _resume(self) -> None:
        """Loads the newest undamaged checkpoint in out_dir; without any, the run starts from the beginning."""
        self.resumed_from = self.processes.run_on_main(checkpoint_to_resume, self.out_dir, self.record, True)
        self.processes.run_on_main(finish_replacing, self.out_dir / "best")
        if self.resumed_from is not None:
            weights, state = read_state(self.resumed_from, self.model)
            load_full(self.model, weights, self.optimizer, state["optimizer"])
            self.scaler.load_state_dict(state["steps"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.step, self.best_held_out_loss = state["step"], state["best_held_out_loss"]
            self.loss_sum, self.losses = state["loss_sum"].to(self.device), state["losses"]
            self.seconds = state["seconds"]
        self.record = self.processes.run_on_main(note_resumption, self.out_dir, self.record, self.step)
        if self.history.directory is not None:
            self.history.go_back_to(self.step if self.resumed_from is not None else -1)

    def _on_device(self, *tensors):
        if self.device.type == "cuda":
            return [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        return [tensor.to(self.device) for tensor in tensors]

    def _autocast(self):
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)


def _seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seeds torch for a step, so that dropout depends on seed, step and process only and has no state to save."""
    (state,) = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64).tolist()
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.manual_seed(state)


class StopRequest:
    """Inside the block the first SIGINT (Ctrl-C) or SIGTERM sets `requested`; the second acts as it did before.

    The loop reads `requested` between steps, so it stops with complete weights. Outside the main thread Python takes
    no signals, and `requested` stays False.
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
            if time.monotonic() - self._first > _REPEAT_SECONDS:
                self._restore()
                signal.raise_signal(number)
            return
        self.requested, self._first = True, time.monotonic()
        if not _REPEAT_SECONDS:
            self._restore()
        # not print: the signal may interrupt a print, whose buffered stream cannot be entered twice
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step (again: at once)\n".encode())

    def _restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
