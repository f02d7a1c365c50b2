"""`python -m train`: its output, its files, any text and vocabulary, and one line for what it cannot use."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model import from_pretrained
from model.command import Parser
from train import Trainer, TrainingFailed
from train.__main__ import main
from train.config import RunConfig, add_flags, from_flags, random_config, random_config_flags
from train.evaluate import main as evaluate_main

ROOT = Path(__file__).parents[2]
TEXT = "When are you going? I am going to the play.\nAnd you are coming to the play with me.\n" * 40
SIZES = {"context-size": 16, "window": 8, "n-layer": 2, "n-head": 2, "n-kv-head": 1, "d-model": 32, "batch-size": 4}
SMALL = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def run(*arguments):
    return main([*SMALL, "--device", "cpu", *map(str, arguments)])


def refused(capsys, *arguments):
    """The one line with which the command refuses its arguments, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def test_a_run_describes_itself_and_prints_a_sample_and_the_commands_for_more(text, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert run("--fused-kernels", "--data", text, "--max-steps", "20", "--eval-every", "10", "--out-dir", out) == 0
    shown = capsys.readouterr().out
    first, passage, last = re.split(r"-{80}", shown)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    for fact in (
        "rope-window-gqa",
        "window 8",
        "2 heads on 1 KV head,",
        "backend banded: ",
        "cpu",
        "20 steps of 64 tokens",
    ):
        assert fact in first
    assert re.search(r"[\d,]+ parameters", first) and out in first
    assert facts["data"]["characters"] == len(TEXT) and facts["command"].startswith("python -m train --context-size 16")
    assert len(passage) == 500 + 2  # and a line break on either side
    assert set(passage) <= set(TEXT)
    assert f"python -m model.sample --checkpoint {out}/best" in last
    assert f"python -m train.evaluate --checkpoint {out}/best" in last


def test_the_commands_it_prints_work(text, tmp_path, capsys):
    run("--data", text, "--max-steps", "4", "--out-dir", str(tmp_path / "run"))
    printed = re.findall(r"^  python (-m .*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(printed) == 2
    for command in printed:
        shown = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout.splitlines()[-1])["targets"] == len(TEXT) // 10 - 1


def test_two_runs_of_one_seed_have_the_same_losses_and_the_same_sample(text, tmp_path, capsys):
    seen = []
    for name in ("first", "second"):
        run("--data", text, "--max-steps", "12", "--seed", "3", "--out-dir", str(tmp_path / name))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line.get("loss", line.get("held_out_loss")) for line in lines]
        seen.append((losses, re.split(r"-{80}", capsys.readouterr().out)[1]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("architecture", ["original", "rope", "rope-window", "rope-window-gqa"])
def test_every_architecture_trains_with_and_without_fused_kernels_alike(architecture, text, tmp_path, capsys):
    losses = []
    for kernels in ("--fused-kernels", "--no-fused-kernels"):
        out = tmp_path / kernels
        run("--architecture", architecture, kernels, "--data", text, "--max-steps", "5", "--precision", "fp32",
            "--out-dir", str(out))  # fmt: skip
        assert f"{architecture}: " in capsys.readouterr().out
        losses.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_without_an_out_dir_each_run_makes_a_directory_named_by_date(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--data", text, "--max-steps", "1")
    (directory,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", directory.name) and (directory / "best" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windo", "8"], "unrecognized arguments: --windo 8"),
        (["--window", "0"], "window=0 is not a whole number of at least 1"),
        (["--n-head", "3"], "n_head=3 does not divide d_model=32"),
        (["--n-head", "4", "--n-kv-head", "3"], "n_kv_head=3 does not divide n_head=4"),
        (["--architecture", "gpt-5"], "argument --architecture: invalid choice: 'gpt-5'"),
        (["--context-size", "500"], "shorter than one context of 500"),
        (["--context-size", "0"], "context_length=0 is not a whole number of at least 1"),
        (["--batch-size", "0"], "batch_size is 0, wanted at least 1"),
        (["--fused-kernels", "--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
        (["--no-fused-kernels", "--backend", "banded"], "leave out --no-fused-kernels"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--precision", "fp16"], "precision fp16 needs a CUDA device"),
        (["--dropout", "1.5"], "dropout=1.5 is not a probability below 1"),
    ],
)
def test_bad_flags_are_refused_in_one_line_and_nothing_is_written(text, tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    assert message in refused(capsys, "--data", text, "--out-dir", str(out), *arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"To be.", "shorter than one context of 16"),
    ],
)
def test_bad_texts_are_refused_in_one_line_and_nothing_is_written(tmp_path, capsys, content, message):
    path, out = tmp_path / "bad.txt", tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    line = refused(capsys, "--data", str(path), "--out-dir", str(out))
    assert message in line and str(path) in line and not out.exists()


def test_a_run_directory_that_cannot_be_used_is_refused_in_one_line(text, tmp_path, capsys):
    assert "cannot be written: Not a directory" in refused(capsys, "--data", text, "--out-dir", f"{text}/run")
    run("--data", text, "--max-steps", "1", "--out-dir", str(tmp_path / "run"))
    capsys.readouterr()
    assert "holds a run already" in refused(capsys, "--data", text, "--out-dir", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("error", "message"),
    [(TrainingFailed("the loss is nan"), "the loss is nan"), (OSError(28, "No space left on device"), "No space left")],
)
def test_a_failed_run_is_one_line_and_status_1(text, tmp_path, capsys, monkeypatch, error, message):
    def fail(trainer):
        raise error

    monkeypatch.setattr(Trainer, "train", fail)
    assert run("--data", text, "--out-dir", str(tmp_path / "run")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("python -m train: run failed: ") and message in shown and shown.count("\n") == 1


def test_diverging_is_a_failed_run(text, tmp_path, capsys):
    status = run("--data", text, "--learning-rate", "1e30", "--warmup-steps", "0", "--out-dir", str(tmp_path / "run"))
    assert status == 1 and "lower learning_rate" in capsys.readouterr().err


def test_ctrl_c_on_the_running_command_saves_prints_where_and_exits_0(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "train", *SMALL, "--data", text, "--max-steps", "1000000", "--out-dir", str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in errors
    step = json.loads((out / "last" / "training.json").read_text())["step"]
    assert f"stopped at step {step:,} of 1,000,000: saved in {out}/last" in shown


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder of texts, in a test whose final samples are short."""
    monkeypatch.setattr("train.__main__.SAMPLE_TOKENS", 5)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.md"):
        (folder / name).write_text(name + TEXT)
    (tmp_path / "other.txt").write_text("Where are they going?\n" * 40)
    return folder


def train_on(tmp_path, *arguments):
    """The last checkpoint of a run of two steps."""
    assert run("--max-steps", "2", "--out-dir", tmp_path / "run", *arguments) == 0
    return tmp_path / "run" / "last"


def evaluated(capsys, checkpoint, *arguments):
    capsys.readouterr()
    assert evaluate_main(["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("embedding_type", "kind"), [("byte", "bytes"), ("bpe", "subwords")])
def test_bytes_and_bpe_are_trained_sampled_and_evaluated(texts, tmp_path, capsys, embedding_type, kind):
    pytest.importorskip("tokenizers")
    vocab_size = ("--vocab-size", 270) if embedding_type == "bpe" else ()
    flags = "--no-documents", "--embedding-type", embedding_type, *vocab_size
    last = train_on(tmp_path, "--data", texts, *flags)
    shown = capsys.readouterr().out
    size = 270 if embedding_type == "bpe" else 256
    assert f"{3 * (len(TEXT) + 5) - 1:,} characters in 3 files, {size} " in shown and "5 tokens by" in shown
    model, tokenizer = from_pretrained(last)
    assert (tokenizer.kind, tokenizer.vocab_size, model.config.vocab_size) == (kind, size, size)
    whole = "".join(name + TEXT for name in ("a.txt", "b.txt", "c.md"))
    held_out = whole[int(len(whole) * 0.9) :]
    result = evaluated(capsys, last)
    assert result["targets"] == len(tokenizer.encode(held_out)) - 1
    assert result["bits_per_byte"] * result["bytes"] == pytest.approx(
        result["loss"] * result["targets"] / 0.693147, 1e-5
    )
    assert result["bits_per_byte"] == result["bits_per_character"]  # of plain English letters


@pytest.mark.parametrize("embedding_type", ["shakespearean", "bpe"])
def test_a_long_text_is_trained_and_evaluated_as_a_short_one(texts, tmp_path, monkeypatch, capsys, embedding_type):
    pytest.importorskip("tokenizers")
    found = []
    for limit in (2**20, -1):
        monkeypatch.setattr("train.tokens.IN_MEMORY", {"characters": limit, "subwords": limit})
        cache = ("--token-cache", tmp_path / "cache")
        last = train_on(tmp_path, "--data", texts, "--embedding-type", embedding_type, *cache)
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = [line.get("loss", line.get("held_out_loss")) for line in lines]
        result = evaluated(capsys, last, *cache)
        found.append((losses, {name: value for name, value in result.items() if name != "seconds"}))
        (tmp_path / "run").rename(tmp_path / f"run{limit}")
        found[-1][1].pop("checkpoint")
    assert found[0] == found[1] and len(found[0][0]) > 1
    assert len(list((tmp_path / "cache").glob("*.tokens"))) == 2  # training and held-out part


def test_bits_per_byte_count_every_byte_of_a_character(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("żółć " * 400)
    result = evaluated(capsys, train_on(tmp_path, "--data", tmp_path / "text.txt"))
    assert result["characters"] == 199 and result["bytes"] == 200 // 5 * 9 - 2
    assert result["bits_per_byte"] < result["bits_per_character"]


def test_a_validation_text_is_evaluated_as_a_whole_and_must_be_unchanged(texts, tmp_path, capsys):
    other = tmp_path / "other.txt"
    last = train_on(tmp_path, "--data", texts, "--val-data", other)
    assert "validation on " in capsys.readouterr().out
    result = evaluated(capsys, last)
    assert result["data"] == str(other) and result["characters"] == len(other.read_text()) - 1
    assert evaluated(capsys, last, "--val-data", other)["loss"] == result["loss"]
    assert evaluated(capsys, last, "--data", other)["characters"] == len(other.read_text()) // 10 - 1
    other.write_text("What are they going to?\n" * 40)
    with pytest.raises(SystemExit):
        evaluate_main(["--checkpoint", str(last), "--device", "cpu"])
    assert "is not the text this checkpoint was validated on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate_main(["--checkpoint", str(last), "--data", str(other), "--val-data", str(other)])
    assert "data and val_data are both given" in capsys.readouterr().err


def test_a_given_tokenizer_is_the_vocabulary(texts, tmp_path, capsys):
    train_on(tmp_path, "--data", texts)
    (tmp_path / "run").rename(tmp_path / "first")
    file = tmp_path / "first" / "last" / "tokenizer.json"
    last = train_on(tmp_path, "--data", tmp_path / "other.txt", "--tokenizer", file)
    assert (last / "tokenizer.json").read_text() == file.read_text()
    (tmp_path / "other.txt").write_text(TEXT + "Z" * 10)
    message = refused(capsys, "--data", tmp_path / "other.txt", "--tokenizer", file.parent)
    assert "'Z' not in the vocabulary of" in message


def test_vocabularies_that_cannot_be_are_refused(texts, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    data, missing = ("--data", texts), tmp_path / "none.json"
    assert "vocab_size is 100, wanted at least 257" in refused(
        capsys, *data, "--embedding-type", "bpe", "--vocab-size", 100
    )
    assert "only --embedding-type bpe can choose its size" in refused(capsys, *data, "--vocab-size", 300)
    assert "none.json does not exist: give a tokenizer.json" in refused(capsys, *data, "--tokenizer", missing)
    assert "leave out --vocab-size and --embedding-type" in refused(
        capsys, *data, "--tokenizer", missing, "--embedding-type", "byte"
    )
    model = train_on(tmp_path, *data)
    for flags in (("--embedding-type", "byte"), ("--tokenizer", model / "tokenizer.json")):
        with pytest.raises(SystemExit):
            main(["--init-from", str(model), *map(str, (*data, *flags))])
        assert f"{flags[0]}: not with --init-from, whose model has its own vocabulary" in capsys.readouterr().err


def test_a_wrong_size_is_refused_before_a_text_is_read(texts, capsys):
    assert "n_head=3 does not divide d_model=32" in refused(capsys, "--data", "nowhere.txt", "--n-head", 3)


def test_the_random_config_example_runs_and_prints_the_flags_it_drew(texts, tmp_path, capsys):
    line = "--context_size 25 --embedding_type shakesperean --random_config"
    rest = ["--data", str(texts), "--max-steps", "2", "--batch-size", "2", "--device", "cpu", "--seed", "7"]
    assert main([*line.split(), *rest, "--out-dir", str(tmp_path / "run")]) == 0
    (flags,) = re.findall(r"^drawn +with seed 7: (.*)$", capsys.readouterr().out, re.MULTILINE)
    config = from_pretrained(tmp_path / "run" / "last")[0].config
    assert config.context_length == 25
    assert flags == random_config_flags(random_config(RunConfig(context_size=25), 7, {"context_size"}))
    parser = Parser(prog="python -m train")
    add_flags(parser, RunConfig)
    assert from_flags(RunConfig, parser.parse_args(flags.split())).model_config(config.vocab_size) == config
