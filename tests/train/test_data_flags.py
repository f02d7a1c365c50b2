"""`python -m train` on any text and vocabulary, and with a model that is drawn: what it makes, and what it refuses."""

import json
import re
import shlex

import pytest

from model import ARCHITECTURES, from_pretrained
from model.command import Parser
from train.__main__ import main
from train.config import RANDOM_FIELDS, RunConfig, add_flags, from_flags, random_config, random_config_flags
from train.evaluate import main as evaluate_main

TEXT = "When are you going? I am going to the play.\nAnd you are coming to the play with me.\n" * 40
SMALL = shlex.split("--context-size 16 --window 8 --n-layer 1 --n-head 2 --n-kv-head 1 --d-model 32 --batch-size 4")


@pytest.fixture(autouse=True)
def short_passages(monkeypatch):
    monkeypatch.setattr("train.__main__.SAMPLE_TOKENS", 5)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.md"):
        (folder / name).write_text(name + TEXT)
    (tmp_path / "other.txt").write_text("Where are they going?\n" * 40)
    return folder


def run(tmp_path, *arguments, steps=2):
    common = ("--device", "cpu", "--max-steps", str(steps), "--out-dir", str(tmp_path / "run"))
    assert main([*SMALL, *common, *map(str, arguments)]) == 0
    return tmp_path / "run" / "last"


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, "--device", "cpu", *map(str, arguments)])
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def evaluated(capsys, checkpoint, *arguments):
    capsys.readouterr()
    assert evaluate_main(["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("embedding_type", "kind"), [("byte", "bytes"), ("bpe", "subwords")])
def test_bytes_and_bpe_train_write_and_are_evaluated(texts, tmp_path, capsys, embedding_type, kind):
    pytest.importorskip("tokenizers")
    vocab_size = ("--vocab-size", 270) if embedding_type == "bpe" else ()
    last = run(tmp_path, "--data", texts, "--embedding-type", embedding_type, *vocab_size)
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
        last = run(tmp_path, "--data", texts, "--embedding-type", embedding_type, *cache)
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
    result = evaluated(capsys, run(tmp_path, "--data", tmp_path / "text.txt"))
    assert result["characters"] == 199 and result["bytes"] == 200 // 5 * 9 - 2
    assert result["bits_per_byte"] < result["bits_per_character"]


def test_a_validation_text_is_evaluated_as_a_whole_and_must_be_unchanged(texts, tmp_path, capsys):
    other = tmp_path / "other.txt"
    last = run(tmp_path, "--data", texts, "--val-data", other)
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
    run(tmp_path, "--data", texts)
    (tmp_path / "run").rename(tmp_path / "first")
    file = tmp_path / "first" / "last" / "tokenizer.json"
    last = run(tmp_path, "--data", tmp_path / "other.txt", "--tokenizer", file)
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
    model = run(tmp_path, *data)
    for flags in (("--embedding-type", "byte"), ("--tokenizer", model / "tokenizer.json")):
        with pytest.raises(SystemExit):
            main(["--init-from", str(model), *map(str, (*data, *flags))])
        assert f"{flags[0]}: not with --init-from, whose model has its own vocabulary" in capsys.readouterr().err


def test_a_wrong_size_is_refused_before_a_text_is_read(texts, capsys):
    assert "n_head=3 does not divide d_model=32" in refused(capsys, "--data", "nowhere.txt", "--n-head", 3)


def test_a_drawn_model_is_valid_and_the_same_for_the_same_seed():
    drawn = [random_config(RunConfig(), seed) for seed in range(300)]
    assert drawn == [random_config(RunConfig(), seed) for seed in range(300)]
    assert {run.model_config(65).architecture for run in drawn} >= set(ARCHITECTURES)
    for name in RANDOM_FIELDS:
        assert len({getattr(run, name) for run in drawn}) > 2
    assert max(run.n_layer * 12 * run.d_model**2 for run in drawn) < 10**6  # parameters: minutes on a CPU


@pytest.mark.parametrize(
    "stated",
    [
        {"n_head": 12},
        {"d_model": 100},
        {"n_kv_head": 3},
        {"context_size": 25, "window": 3},
        {"n_kv_head": 4, "d_model": 256},
    ],
)
def test_stated_flags_stay_and_the_others_fit_them(stated):
    for seed in range(100):
        run = random_config(RunConfig(**stated), seed, set(stated))
        assert {name: getattr(run, name) for name in stated} == stated
        run.model_config(65)


def test_stating_a_flag_changes_no_other_that_need_not_fit():
    drawn = random_config(RunConfig(), 7)
    again = random_config(RunConfig(n_layer=9, window=5), 7, {"n_layer", "window"})
    assert {name for name in RANDOM_FIELDS if getattr(drawn, name) != getattr(again, name)} == {"n_layer", "window"}


def test_stated_sizes_that_fit_nothing_are_refused_as_ever():
    with pytest.raises(ValueError, match="does not divide d_model=97"):
        random_config(RunConfig(d_model=97), 1, {"d_model"}).model_config(65)
    with pytest.raises(ValueError, match="random_config draws the sizes of a new model: not with --init-from"):
        RunConfig(random_config=True, init_from="somewhere")


def test_the_originals_own_line_runs_and_says_what_it_drew(texts, tmp_path, capsys):
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
