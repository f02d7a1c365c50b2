"""The trainer: the usage of the README, losses that repeat, what a run leaves behind, and how it is stopped."""

import json
import math
import re
import signal
import threading
from importlib import metadata

import pytest
import torch

from model import GPT, GPTConfig, from_pretrained
from model.sampling import sample
from train import CharDataset, Trainer, TrainerConfig, TrainingFailed
from train.data import training_batches
from train.optim import GradientScaler

TEXT = "When are you going? I am going to the play, and you are coming to the play with me. " * 20
TINY = {"context_length": 16, "window": 8, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32}


def tiny_trainer(seed=0, held_out=True, dataset=None, record=None, **settings):
    train_set = dataset or CharDataset(TEXT[:1500], block_size=16)
    test_set = CharDataset(TEXT[1500:], block_size=16, tokenizer=train_set.tokenizer) if held_out else None
    model = GPT(GPTConfig(vocab_size=train_set.vocab_size, **TINY), seed=seed)
    defaults = {"max_steps": 20, "batch_size": 4, "precision": "fp32", "log_every": 1, "eval_every": 5, "device": "cpu"}
    settings = defaults | {"sample_tokens": 0} | settings
    return Trainer(model, train_set, test_set, TrainerConfig(seed=seed, **settings), record)


def losses(trainer):
    return trainer.history.series("loss")[1]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_usage_example_runs():
    text = TEXT[:300]
    dataset = CharDataset(text, block_size=25)
    model = GPT(
        GPTConfig(
            vocab_size=dataset.vocab_size, context_length=25, window=10, n_layer=4, n_head=4, n_kv_head=2, d_model=128
        )
    )
    Trainer(
        model,
        dataset,
        None,
        TrainerConfig(
            max_epochs=1,
            batch_size=8,
            learning_rate=6e-4,
            lr_decay=True,
            warmup_tokens=512,
            final_tokens=2 * len(dataset) * 25,
            num_workers=0,
        ),
    ).train()
    ids = torch.tensor([[dataset.stoi[c] for c in "When are you going"]])
    written = "".join(dataset.itos[int(i)] for i in sample(model, ids, 200, temperature=1.0, sample=True, top_k=10)[0])
    assert written.startswith("When are you going") and len(written) == 18 + 200


def test_training_lowers_the_held_out_loss():
    trainer = tiny_trainer(max_steps=150, learning_rate=1e-2, eval_every=50)
    trainer.train()
    held_out = trainer.history.series("held_out_loss")[1]
    assert held_out[0] == pytest.approx(math.log(trainer.train_dataset.vocab_size), rel=0.05)
    assert trainer.held_out_loss() == held_out[-1] == trainer.best_held_out_loss < 0.5 * held_out[0]


def test_the_held_out_loss_is_the_mean_over_examples_however_they_are_batched():
    trainers = [tiny_trainer(batch_size=batch_size, eval_examples=10) for batch_size in (1, 4, 10)]
    found = [trainer.held_out_loss() for trainer in trainers]
    assert found == pytest.approx([found[0]] * 3, abs=1e-6)


def test_two_runs_of_one_seed_have_the_same_losses_and_another_seed_has_not():
    first, second, other = tiny_trainer(seed=1), tiny_trainer(seed=1), tiny_trainer(seed=2)
    for trainer in (first, second, other):
        trainer.train()
    assert losses(first) == losses(second) and len(losses(first)) == 20
    assert first.history.series("held_out_loss") == second.history.series("held_out_loss")
    assert losses(first) != losses(other)
    assert torch.equal(weights(first.model), weights(second.model))


@pytest.mark.parametrize("settings", [{"eval_every": 3}, {"log_every": 7}, {"save_every": 2}])
def test_watching_a_run_does_not_change_it(tmp_path, settings):
    plain, watched = tiny_trainer(held_out=False), tiny_trainer(**settings, out_dir=tmp_path)
    plain.train()
    watched.train()
    assert torch.equal(weights(plain.model), weights(watched.model))


def test_a_training_line_holds_the_mean_loss_since_the_line_before():
    every_step, every_fifth = tiny_trainer(held_out=False), tiny_trainer(held_out=False, log_every=5, eval_every=100)
    for trainer in (every_step, every_fifth):
        trainer.train()
    means = [sum(losses(every_step)[i : i + 5]) / 5 for i in range(0, 20, 5)]
    assert losses(every_fifth) == pytest.approx(means, rel=1e-5)


def test_accumulated_gradients_are_those_of_the_larger_batch(monkeypatch):
    # Muon in bf16 would round gradients apart by more than is compared
    monkeypatch.setattr("train.optim.fast_precision", lambda device: ("fp32", "for this test"))
    large, accumulated = tiny_trainer(batch_size=8), tiny_trainer(batch_size=4, grad_accumulation=2)
    for trainer in (large, accumulated):
        trainer.train()
    assert large.tokens_per_step == accumulated.tokens_per_step == 128
    assert losses(accumulated) == pytest.approx(losses(large), rel=1e-4)
    norms = [trainer.history.series("grad_norm")[1] for trainer in (accumulated, large)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_the_first_step_is_adamw_on_the_clipped_gradient_at_the_scheduled_rate():
    settings = {"optimizer": "adamw", "learning_rate": 0.1, "grad_clip": 0.05, "weight_decay": 0.3}
    trainer = tiny_trainer(max_steps=1, warmup_steps=4, **settings)
    model = GPT(trainer.model.config, seed=0)
    trainer.train()
    model(*next(training_batches(trainer.train_dataset, 4, seed=0)))[1].backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm > 0.05 and trainer.history.series("grad_norm")[1][0] == pytest.approx(norm.item(), rel=1e-5)
    for before, after in zip(model.parameters(), trainer.model.parameters(), strict=True):
        gradient = before.grad * 0.05 / norm
        decayed = before * (1 - 0.025 * 0.3) if before.dim() > 1 else before
        # at Adam's first step both averages are the gradient's own
        torch.testing.assert_close(after, decayed - 0.025 * gradient / (gradient.abs() + 1e-8), atol=2e-5, rtol=1e-4)


def test_a_run_directory_holds_settings_metrics_curves_and_both_checkpoints(tmp_path):
    trainer = tiny_trainer(out_dir=tmp_path / "deep" / "run", record={"command": "python -m train"})
    trainer.train()
    out = tmp_path / "deep" / "run"
    assert {path.name for path in out.iterdir()} == {
        *("run.json", "metrics.jsonl", "loss.png", "best", "checkpoints", "last", ".lock")
    }
    run = json.loads((out / "run.json").read_text())
    assert run["command"] == "python -m train" and run["trainer"]["batch_size"] == 4
    assert run["versions"]["torch"] == metadata.version("torch")
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", run["versions"]["commit"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == trainer.history.lines
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 5, 10, 15, 20]
    assert [line["tokens"] for line in lines if "loss" in line] == [64 * step for step in range(1, 21)]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "last" / "training_state.pt").exists() and not (out / "best" / "training_state.pt").exists()


def test_best_is_the_lowest_held_out_loss_and_last_the_newest_weights(tmp_path):
    # a text that the held-out one does not resemble: the held-out loss falls, then rises
    train_set = CharDataset("abcdefghijklmnopqrstuvwxyz" * 20, block_size=16)
    held_out = CharDataset("qwertyuiopasdfghjklzxcvbnm" * 5, block_size=16, tokenizer=train_set.tokenizer)
    model = GPT(GPTConfig(vocab_size=26, **TINY), seed=0)
    config = TrainerConfig(
        max_steps=40, batch_size=8, learning_rate=1e-2, warmup_steps=0, eval_every=4, out_dir=tmp_path, device="cpu"
    )
    trainer = Trainer(model, train_set, held_out, config)
    trainer.train()
    steps, found = trainer.history.series("held_out_loss")
    best_step, best_loss = min(zip(steps[1:], found[1:], strict=True), key=lambda pair: pair[1])
    assert best_step < 40
    for name, step in [("best", best_step), ("last", 40)]:
        facts = json.loads((tmp_path / name / "training.json").read_text())
        assert (facts["step"], facts["best_held_out_loss"]) == (step, best_loss)
    loaded, tokenizer = from_pretrained(tmp_path / "last")
    assert torch.equal(weights(loaded), weights(trainer.model)) and tokenizer.stoi == train_set.stoi
    trainer.model = from_pretrained(tmp_path / "best")[0]
    assert trainer.held_out_loss() == pytest.approx(best_loss, abs=1e-6)


def test_nothing_is_written_without_a_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_trainer().train()
    assert not list(tmp_path.iterdir())


def stop_at_step(trainer, step):
    """Has the trainer receive Ctrl-C during a step."""
    take_step = trainer._take_step

    def take_step_and_stop(batches):
        take_step(batches)
        if trainer.step == step:
            signal.raise_signal(signal.SIGINT)

    trainer._take_step = take_step_and_stop


def test_ctrl_c_saves_the_last_checkpoint_and_prints_where(tmp_path, capsys):
    trainer = tiny_trainer(out_dir=tmp_path / "run")
    stop_at_step(trainer, 7)
    before = signal.getsignal(signal.SIGINT)
    trainer.train()
    assert trainer.interrupted and trainer.step == 7
    assert f"stopped at step 7 of 20: saved in {tmp_path / 'run' / 'last'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "last" / "training.json").read_text())["step"] == 7
    assert torch.equal(weights(from_pretrained(tmp_path / "run" / "last")[0]), weights(trainer.model))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_at_once():
    trainer = tiny_trainer()
    take_step = trainer._take_step

    def two_signals(batches):
        take_step(batches)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer._take_step = two_signals
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 1


def test_training_works_outside_the_main_thread():
    trainer = tiny_trainer(max_steps=2)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.step == 2


def test_many_non_finite_gradients_fail_the_run_and_keep_the_checkpoint_before(tmp_path):
    trainer = tiny_trainer(out_dir=tmp_path / "run", save_every=5, eval_every=100, max_steps=100)
    take_step = trainer._take_step

    def break_weights(batches):
        if trainer.step == 12:
            with torch.no_grad():
                trainer.model.ln_f.weight.fill_(float("nan"))
        take_step(batches)

    trainer._take_step = break_weights
    message = r"gradients of 20 steps in a row are not finite \(loss nan at step 32\): lower learning_rate"
    with pytest.raises(TrainingFailed, match=message):
        trainer.train()
    assert json.loads((tmp_path / "run" / "last" / "training.json").read_text())["step"] == 10
    assert torch.isfinite(weights(from_pretrained(tmp_path / "run" / "last")[0])).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_non_finite_gradient_is_skipped_and_counted(bad):
    trainer = tiny_trainer(max_steps=6, ema_decay=0.9, held_out=False, lr_decay=False)
    take_step, seen = trainer._take_step, []

    def one_bad_step(batches):
        hook = trainer.model.ln_f.bias.register_hook(lambda gradient: gradient * bad) if trainer.step == 3 else None
        before = weights(trainer.model)
        take_step(batches)
        seen.append(torch.equal(before, weights(trainer.model)))
        if hook is not None:
            hook.remove()

    trainer._take_step = one_bad_step
    trainer.train()
    assert seen == [False, False, False, True, False, False] and trainer.average.steps == 5
    assert torch.isfinite(weights(trainer.model)).all()
    assert [line.get("skipped_steps") for line in trainer.history.lines] == [None, None, None, 1, 1, 1]
    assert [loss is None for loss in losses(trainer)] == [False, False, False, True, False, False]


def test_the_loss_scale_changes_no_step_halves_at_an_overflow_and_grows_again(monkeypatch):
    plain, scaled = tiny_trainer(held_out=False, max_steps=8), tiny_trainer(held_out=False, max_steps=8)
    scaled.scaler = GradientScaler(scaled.optimizer, "fp16")
    for trainer in (plain, scaled):
        trainer.train()
    assert losses(plain) == pytest.approx(losses(scaled), rel=1e-5) and scaled.scaler.scale == 2.0**16
    monkeypatch.setattr("train.optim.GROW_AFTER", 3)
    parameter = torch.nn.Parameter(torch.ones(2))
    steps, scales = GradientScaler(torch.optim.SGD([parameter], lr=1.0), "fp16"), []
    for gradient in (math.inf, 1.0, 1.0, 1.0, 1.0):
        parameter.grad = torch.full((2,), gradient) * steps.scale
        assert steps.step(None)[0] == math.isfinite(gradient)
        scales.append(steps.scale / 2**16)
    assert scales == [0.5, 0.5, 0.5, 1.0, 1.0] and parameter.tolist() == [-3.0, -3.0] and steps.skipped == 1


def test_activation_checkpointing_changes_nothing_but_what_is_kept():
    kept, again = tiny_trainer(max_steps=5), tiny_trainer(max_steps=5, activation_checkpointing=True)
    found = [trainer.estimate()["activations"] for trainer in (kept, again)]
    for trainer in (kept, again):
        trainer.train()
    assert torch.equal(weights(kept.model), weights(again.model)) and losses(kept) == losses(again)
    assert kept.model.state_dict().keys() == again.model.state_dict().keys()
    assert found[1] < 0.5 * found[0]


def test_one_batch_can_be_overfitted():
    trainer = tiny_trainer(max_steps=120, overfit_one_batch=True, learning_rate=1e-2, held_out=False)
    trainer.train()
    assert losses(trainer)[-1] < 0.1 < losses(trainer)[0]


def test_the_estimate_counts_bytes_and_leaves_the_run_as_it_is():
    plain, estimated = tiny_trainer(max_steps=5), tiny_trainer(max_steps=5)
    found = estimated.estimate()
    size = 4 * estimated.model.num_parameters()
    assert found["weights"] == found["gradients"] == size and 0 < found["optimizer"] <= 2 * size
    # each of the 64 tokens keeps at least the MLP's two widths of 128 in two layers
    assert 64 * 2 * 2 * 128 * 4 < found["activations"] < 20 * 64 * 2 * 2 * 128 * 4
    for trainer in (plain, estimated):
        trainer.train()
    assert torch.equal(weights(plain.model), weights(estimated.model))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    trainer = tiny_trainer(out_dir=tmp_path / "run", save_every=5, held_out=False)
    save, calls = torch.save, []

    def disk_full(state, file):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(
        OSError,
        match=r"step-000010 cannot be written: the disk is full; make room, and --resume continues from .*step-000005,",
    ):
        trainer.train()
    assert json.loads((tmp_path / "run" / "last" / "training.json").read_text())["step"] == 5
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("run.json", "metrics.jsonl", "loss.png", "checkpoints", "last", ".lock")
    }
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000005"]


def test_a_directory_with_a_run_in_it_is_not_overwritten(tmp_path):
    tiny_trainer(out_dir=tmp_path / "run").train()
    saved = (tmp_path / "run" / "last" / "training.json").read_bytes()
    with pytest.raises(
        FileExistsError, match="holds a run already: choose another --out-dir, or continue it with --resume"
    ):
        tiny_trainer(out_dir=tmp_path / "run")
    assert (tmp_path / "run" / "last" / "training.json").read_bytes() == saved


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"run directory .* cannot be written: Not a directory"):
        tiny_trainer(out_dir=tmp_path / "file" / "run")


def test_bf16_trains_the_fp32_weights():
    trainer = tiny_trainer(max_steps=60, precision="bf16", learning_rate=1e-2)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    full = tiny_trainer(max_steps=1)
    full.train()
    assert losses(trainer)[0] != losses(full)[0] and losses(trainer)[0] == pytest.approx(losses(full)[0], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_a_gpu_follows_the_cpu(precision):
    on_gpu, on_cpu = tiny_trainer(device="cuda", precision=precision), tiny_trainer()
    for trainer in (on_gpu, on_cpu):
        trainer.train()
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-3 if precision == "fp32" else 0.05)


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="precision fp16 needs a CUDA device, not cpu: take bf16 or fp32"):
        tiny_trainer(precision="fp16")


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_here_is_named(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
        tiny_trainer(device=device)


def test_dropout_is_off_in_evaluation_and_on_in_training():
    train_set = CharDataset(TEXT, block_size=16)
    with pytest.warns(UserWarning, match="dropout"):
        model = GPT(GPTConfig(vocab_size=train_set.vocab_size, dropout=0.5, **TINY), seed=0)
        trainer = Trainer(model, train_set, train_set, TrainerConfig(max_steps=1, batch_size=4, device="cpu"))
        trainer.train()
    assert trainer.model.training
    assert trainer.held_out_loss() == trainer.held_out_loss()


@pytest.mark.filterwarnings("ignore:dropout")
def test_dropout_repeats_with_the_seed_whatever_was_drawn_before():
    train_set = CharDataset(TEXT, block_size=16)
    found = []
    for _ in range(2):
        model = GPT(GPTConfig(vocab_size=train_set.vocab_size, dropout=0.5, **TINY), seed=0)
        config = TrainerConfig(max_steps=3, batch_size=4, log_every=1, device="cpu")
        trainer = Trainer(model, train_set, None, config)
        torch.rand(17)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]


def test_auto_precision_is_bf16_where_the_cpu_has_units_for_it(monkeypatch):
    for has_units, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("kernels.cpu.has_bf16_products", lambda has_units=has_units: has_units)
        trainer = tiny_trainer(precision="auto", max_steps=2)
        assert trainer.precision == precision and "units" in trainer.why_precision
        trainer.train()
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())
