"""What a run shows: metrics, curves, samples, TensorBoard; none of them changes the weights."""

import io
import json

import pytest
import torch

from model import GPT, GPTConfig, flops_per_token
from train import CharDataset, Trainer, TrainerConfig
from train.metrics import History, peak_flops, sample_text

TEXT = "When are you going? I am going to the play.\nAnd you are coming to the play with me.\n" * 20


def trainer(out_dir=None, **settings):
    train_set = CharDataset(TEXT[:1500], block_size=16)
    test_set = CharDataset(TEXT[1500:], block_size=16, tokenizer=train_set.tokenizer)
    config = {"context_length": 16, "window": 8, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "d_model": 16}
    model = GPT(GPTConfig(vocab_size=train_set.vocab_size, **config), seed=0)
    settings = {"max_steps": 6, "batch_size": 4, "eval_every": 3, "sample_tokens": 30, "device": "cpu"} | settings
    return Trainer(model, train_set, test_set, TrainerConfig(out_dir=out_dir, **settings))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def picture(directory, *names):
    """loss.png of a history that has `names` and the steps."""
    made = History(directory)
    made.lines = [
        {name: value for name, value in line.items() if name in ("step", *names)}
        for step in range(1, 21)
        for line in ({"step": step, "loss": 3 / step, "learning_rate": step, "grad_norm": 1 / step},)
    ]
    made.lines.append({"step": 20, "held_out_loss": 0.5} if "held_out_loss" in names else {"step": 20})
    made.plot()
    return (directory / "loss.png").read_bytes()


def test_the_picture_shows_both_losses_the_learning_rate_and_the_gradient_norm(tmp_path):
    names = ("loss", "held_out_loss", "learning_rate", "grad_norm")
    whole = picture(tmp_path, *names)
    assert whole.startswith(b"\x89PNG") and whole == picture(tmp_path, *names)
    without_one = {picture(tmp_path, *names[:i], *names[i + 1 :]) for i in range(4)}
    assert len(without_one) == 4 and whole not in without_one
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png"}


def test_the_picture_of_a_run_that_has_not_begun_can_be_drawn(tmp_path):
    assert picture(tmp_path).startswith(b"\x89PNG")


def test_every_evaluation_after_the_first_prints_and_records_a_sample(tmp_path, capsys):
    made = trainer(tmp_path)
    made.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    samples = {line["step"]: line["sample"] for line in lines if "sample" in line}
    assert list(samples) == [3, 6] and {len(text) for text in samples.values()} == {30}
    assert samples[6] == "".join(sample_text(made.model, made.tokenizer, 30, seed=0))
    said = "".join(line[6:] + "\n" for line in capsys.readouterr().out.splitlines() if line.startswith("    | "))
    assert said == "".join(text.removesuffix("\n") + "\n" for text in samples.values())


def test_samples_and_averages_do_not_change_the_run(tmp_path):
    plain, watched = trainer(sample_tokens=0), trainer(tmp_path, ema_decay=0.5)
    for made in (plain, watched):
        made.train()
    assert not any("sample" in line for line in plain.history.lines)
    assert torch.equal(weights(plain.model), weights(watched.model))


def test_a_sample_leaves_the_random_state_alone():
    made = trainer()
    before = torch.get_rng_state()
    assert len(made._sample()) == 30 and torch.equal(before, torch.get_rng_state())


def test_mfu_is_recorded_if_the_peak_is_known():
    made = trainer(log_every=1)
    made.peak_flops = 1e12
    made.train()
    lines = [line for line in made.history.lines if "loss" in line]
    assert len(lines) == 6
    for line in lines:
        share = line["tokens_per_second"] * flops_per_token(made.model.config) / 1e12
        assert line["mfu"] == pytest.approx(share, rel=1e-2)


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_tensorboard_that_is_missing_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="tensorboard is not installed: pip install tensorboard, or leave it"):
        trainer(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_number_and_sample(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = trainer(tmp_path, tensorboard=True, log_every=1)
    made.train()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "held_out_loss", "learning_rate", "grad_norm", "tokens_per_second"):
        steps, values = made.history.series(name)
        assert [event.step for event in events.Scalars(name)] == steps
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values, rel=1e-6)
    assert [event.step for event in events.Tensors("sample/text_summary")] == made.history.series("sample")[0]


def test_tensorboard_without_a_run_directory_is_refused():
    pytest.importorskip("tensorboard")
    with pytest.raises(ValueError, match="tensorboard needs a run directory to write into: give out_dir"):
        trainer(tensorboard=True)


def test_a_line_is_written_before_followers_see_it(tmp_path):
    made, seen = History(tmp_path), io.StringIO()
    made.followers.append(lambda line: seen.write((tmp_path / "metrics.jsonl").read_text()))
    made.add(step=1, loss=float("nan"))
    assert json.loads(seen.getvalue()) == {"step": 1, "loss": None} == made.lines[0]
