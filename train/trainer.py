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
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

from model import GPT, flops_per_token
from model.checkpoint import CheckpointError, resolve_checkpoint
from model.command import fast_precision, resolve_device
from model.shared_cores import SharedCores

from .checkpoint import checkpoint_to_resume, note_resumption, point_last_at, read_state, save_checkpoint, versions
from .config import TrainerConfig
from .data import evaluation_batches, training_batches
from .distributed import StopRequest, full_optimizer_state, full_weights, join_processes, load_full, local_device
from .lock import release_lock, take_lock
from .memory import SavedActivations, checkpoint_blocks, parameter_memory
from .metrics import History, ProgressBar, TensorBoard, peak_flops, require_tensorboard, sample_text
from .optim import MAX_SKIPPED, AverageWeights, GradientScaler, learning_rate_at, make_optimizer
from .run_directory import discard_run, finish_replacing, open_run_directory, read_facts


class TrainingFailed(RuntimeError):
    """A run that cannot continue, for example because its gradients are not finite."""


class Trainer:
    """Trains a model on the (x, y) examples of a data set.

    model: forward(x, y) -> (logits, loss); it is moved to the config's device. For items (x, y, starts), as those of
    train/documents.py, forward(x, y, starts=starts); then a step's loss is the mean over the targets of all its
    batches and processes, each counted once, and -1 is no target.
    train_dataset, test_dataset: a length and such items, such as CharDataset. test_dataset is the held-out text; None
    means no evaluation. record: more JSON values for run.json. trained_before: whether the loss at step 0 counts for
    `best`, as it does for a model that is trained on.
    Nothing is written unless config.out_dir names a run directory. With config.resume the newest undamaged checkpoint
    there replaces the weights of `model`. `history.lines` has the measurements; `interrupted` says whether a signal
    ended the run.
    Raises ValueError for settings that this machine cannot run, or that are not those of the run to resume; OSError for
    a run directory that cannot be written.
    """

    def __init__(
        self,
        model,
        train_dataset,
        test_dataset=None,
        config: TrainerConfig | None = None,
        record=None,
        *,
        trained_before: bool = False,
    ):
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
        self.processes = join_processes(config.parallel, self.device, config.context_parallel)
        self.processes.require_equal_parts(config.batch_size, len(train_dataset[0][0]))
        self.train_dataset, self.held_out_dataset = train_dataset, test_dataset
        self.tokenizer = getattr(train_dataset, "tokenizer", None)

        self.model = model.to(self.device)
        self._loss_only = {"with_logits": False} if type(model).forward is GPT.forward else {}
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
        self.trained_before = trained_before
        self.record = {"versions": versions(), "trainer": config.to_dict(), **(record or {})}
        if dataclasses.is_dataclass(getattr(model, "config", None)):
            self.record["model"] = dataclasses.asdict(model.config)
        self.out_dir = None if config.out_dir is None else Path(config.out_dir)
        writes = self.out_dir is not None and self.processes.rank == 0
        self.history = History(self.out_dir if writes else None)
        self.resumed_from = None
        try:  # the lock is held until `train` ends
            if config.resume:
                self._resume()
            elif self.out_dir is not None:
                self.processes.run_on_main(open_run_directory, self.out_dir, self.record)
        except BaseException:
            release_lock(self.out_dir)
            raise
        if config.tensorboard and writes:
            self.history.followers.append(TensorBoard(self.out_dir, self.step))

    def train(self) -> None:
        """Trains to the end, or until SIGINT (Ctrl-C), SIGTERM or SIGHUP, which saves a checkpoint and returns.

        Raises TrainingFailed for a loss or weights that are not finite, and after many steps in a row without a finite
        gradient; earlier checkpoints stay. A new run that fails before it took a step leaves its directory empty.
        """
        if self.out_dir is not None:  # a second call takes the lock again
            self.processes.run_on_main(take_lock, self.out_dir)
        self.model.train()
        self._meter_started, self._metered = time.perf_counter(), 0
        self.started = self._meter_started - self.seconds
        bar = ProgressBar(self.total_steps, self.step, self.processes.rank == 0, self.config.eval_every)
        try:
            with StopRequest() as stop, bar, SharedCores(self.device):
                self._loop(stop, bar)
        except BaseException:
            self.discard()
            raise
        finally:
            if self.out_dir is not None:
                release_lock(self.out_dir)

    def discard(self) -> None:
        """Empties the directory of a new run that has not taken a step, but for its lock."""
        if self.out_dir is not None and self.step == 0 and not self.config.resume and self.processes.rank == 0:
            discard_run(self.out_dir, self.record)

    def _loop(self, stop, bar) -> None:
        config, batches = self.config, self.batches()
        self._saved_at = time.monotonic()
        if self.resumed_from is None:
            self._evaluate(bar)
        while self.step < self.total_steps:
            minutes = (time.monotonic() - self._saved_at) / 60
            stopped, due = self.processes.any(stop.requested, minutes > (config.save_every_minutes or math.inf))
            if stopped:
                break
            began = time.perf_counter()
            self._take_step(batches)
            bar.add_step(time.perf_counter() - began)
            last = self.step == self.total_steps
            log, evaluate, save = (
                last or self.step % every == 0 for every in (config.log_every, config.eval_every, config.save_every)
            )
            if log or evaluate or save:
                self._log(bar)
            if evaluate:
                self._evaluate(bar)
            # not while steps are skipped: if that does not end, the earlier weights are the good ones
            if last or ((save or due) and not self.scaler.skipped_in_a_row):
                self._save_checkpoint()
            bar.forecast(evaluate)
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
            part=self.processes.rows,
        )
        batches = map(self.processes.tokens, batches)
        return itertools.repeat(next(batches)) if config.overfit_one_batch else batches

    def held_out_loss(self) -> float:
        """Mean loss over eval_examples held-out examples, the same at every call; train/evaluate.py takes all."""
        return self._mean_loss(self.held_out_dataset, self.config.eval_examples)

    @torch.no_grad()
    def _mean_loss(self, dataset, examples):
        self.model.eval()
        row, rows_of_processes = self.processes.rows
        total, counted = torch.zeros((), dtype=torch.float64), 0
        for batch in evaluation_batches(dataset, self.config.batch_size, examples):
            # if the processes cannot share a batch equally, such as the last one, each of them takes all of it
            shared = rows_of_processes if len(batch[0]) % rows_of_processes == 0 else 1
            mine = self.processes.tokens([tensor[row % shared :: shared] for tensor in batch])
            with self._autocast():
                loss = self._loss(self.model, mine)
            if targets := _targets(mine):  # the mean over the processes follows
                total += loss.item() * targets * shared * self.processes.context
            counted += _targets(batch)
        self.model.train()
        return self.processes.mean(total).item() / counted

    def estimate(self) -> dict[str, int]:
        """Bytes that the run will take: weights, gradients, optimizer, activations.

        All processes must call it. The activations are measured: those of two examples and of one give those of a
        batch. The run does not change.
        """
        config, found = self.config, []
        one = self.processes.tokens([tensor[None] for tensor in self.train_dataset[0]])
        self.model.train()  # with the masks of dropout
        for examples in (1, 2):
            saved = SavedActivations(self.model)
            with saved, self._autocast():
                # not self.forward: compiled code saves its activations where no hook sees them
                self._loss(self.model, [tensor.repeat_interleave(examples, 0) for tensor in one])
            found.append(saved.bytes())
            if config.activation_checkpointing:  # the blocks' inputs are saved where no hook sees them
                found[-1] += len(self.model.blocks) * examples * one[0].numel() * self.model.config.d_model * 4
        batch_size = self.processes.local_batch_size(config.batch_size)
        shards = self.processes.world_size if self.processes.parallel == "fsdp" else 1
        return {
            **parameter_memory(self.optimizer, averaged=self.average is not None, shards=shards),
            "activations": found[0] + (batch_size - 1) * (found[1] - found[0]),
        }

    def _take_step(self, batches) -> None:
        """One update of the weights, or none if the gradient is not finite."""
        config = self.config
        _seed_step(config.seed, self.step, self.processes.rank, self.device)
        self._learning_rate = learning_rate_at((self.step + 1) * self.tokens_per_step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate
        losses = torch.zeros((), device=self.device)
        mine = [next(batches) for _ in range(config.grad_accumulation)]
        for number, (batch, weight) in enumerate(zip(mine, self._weights(mine), strict=True), start=1):
            losses += self._forward_backward(batch, weight, sync=number == config.grad_accumulation)
        self._metered += config.grad_accumulation
        updated, self._grad_norm = self.scaler.step(config.grad_clip)
        if updated:
            self.loss_sum += losses
            self.losses += config.grad_accumulation
            if self.average is not None:
                self.average.update()
        elif self.scaler.skipped_in_a_row == MAX_SKIPPED:
            loss = f"loss {losses.item():.3g} at step {self.step + 1:,}"
            raise self._diverged(f"the gradients of {MAX_SKIPPED} steps in a row are not finite ({loss})")
        self.step += 1

    def _diverged(self, what):
        """The error that ends a run whose numbers are not finite."""
        advice = f"lower learning_rate (it is {self.config.learning_rate:.2g}), or lengthen the warm-up"
        with contextlib.suppress(CheckpointError):
            checkpoint = None if self.out_dir is None else resolve_checkpoint(self.out_dir)
            if checkpoint is not None:
                advice += f"; {checkpoint} is intact: go on from it with --init-from, into another --out-dir"
        return TrainingFailed(f"{what}: {advice}")

    def _weights(self, batches) -> list[float]:
        """What each of this process's batches of a step counts, 1 on average: documents' batches differ in targets."""
        if len(batches[0]) == 2:
            return [1.0] * len(batches)
        targets = [_targets(batch) for batch in batches]
        average = self.processes.mean(torch.tensor(sum(targets), dtype=torch.float64)).item() / len(batches)
        return [count / average for count in targets]

    def _forward_backward(self, batch, weight: float, sync: bool) -> torch.Tensor:
        """Adds the gradients of a batch, averaged over the processes if `sync`. Returns the loss times its weight."""
        with self.processes.gradient_sync(self.forward, sync):
            with self._autocast():
                loss = self._loss(self.forward, batch)
            if weight != 1:  # without targets, as a part of a sequence may be, the loss is NaN and its gradient 0
                loss = (loss if weight else loss.nan_to_num()) * weight
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
        """Writes held-out loss and a sample into history, bar and curves; saves the best weights so far as `best`.

        Raises TrainingFailed for a loss that is not finite.
        """
        began = time.perf_counter()
        # a moving average is what the run is for: it is evaluated, sampled from, and saved as best
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            seen = {} if self.held_out_dataset is None else {"held_out_loss": self.held_out_loss()}
            if self.step > 0:
                loss = seen["held_out_loss"] if seen else self._mean_loss(self.train_dataset, 1)
                if not math.isfinite(loss):
                    name = "held-out loss" if seen else "loss"
                    raise self._diverged(f"the run diverged: the {name} at step {self.step:,} is {loss}")
                if text := self._sample():
                    seen["sample"] = text
            counts = self.step > 0 or self.trained_before
            best = counts and seen.get("held_out_loss", math.inf) < self.best_held_out_loss
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
        self.history.plot()
        bar.evaluation_seconds = time.perf_counter() - began
        self._meter_started += bar.evaluation_seconds  # tokens/s count training time only

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
        self._saved_at = time.monotonic()

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
        self.processes.run_on_main(self._require_finite, weights)
        self.processes.run_on_main(save_checkpoint, directory, self.model, self.tokenizer, facts, state, weights)

    def _require_finite(self, weights):
        wrong = (name for name, tensor in weights.items() if not torch.isfinite(tensor).all())
        if (name := next(wrong, None)) is not None:
            raise self._diverged(f"the run diverged: {name} is not finite at step {self.step:,}")

    def _resume(self) -> None:
        """Loads the newest undamaged checkpoint in out_dir.

        A run that was killed before its first checkpoint starts from the beginning; only better weights replace `best`.
        """
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
        else:
            best = self.processes.run_on_main(read_facts, self.out_dir / "best").get("best_held_out_loss")
            self.best_held_out_loss = math.inf if best is None else best
        self.processes.run_on_main(self.history.go_back_to, self.step if self.resumed_from is not None else -1)
        self.record = self.processes.run_on_main(note_resumption, self.out_dir, self.record, self.step)

    def _loss(self, model, batch):
        """The mean loss of a batch (x, y) or (x, y, starts)."""
        if self.device.type == "cuda":
            batch = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in batch]
        x, y, *starts = (tensor.to(self.device) for tensor in batch)
        return model(x, y, **({"starts": starts[0]} if starts else {}), **self._loss_only)[1]

    def _autocast(self):
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)


def _targets(batch) -> int:
    """How many targets of a batch count in its mean loss."""
    return int((batch[1] >= 0).sum()) if len(batch) > 2 else batch[1].numel()


def _seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seeds torch for a step, so that dropout depends on seed, step and process only and has no state to save."""
    (state,) = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64).tolist()
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.manual_seed(state)
