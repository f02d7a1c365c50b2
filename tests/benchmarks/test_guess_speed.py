"""What guessing ahead gains: every draft writes the text of plain writing, or is not timed."""

import json

import guess_speed
import pytest

from model import GPT, CharTokenizer, GPTConfig


@pytest.fixture
def checkpoint(tmp_path):
    tokenizer = CharTokenizer.from_text("\nabcdefgh")
    sizes = dict(vocab_size=tokenizer.vocab_size, context_length=32, window=8, n_layer=1, n_head=2, d_model=16)
    GPT(GPTConfig(**sizes), seed=0).save_pretrained(tmp_path / "model", tokenizer)
    return str(tmp_path / "model")


def test_the_model_guesses_all_of_its_own_text(checkpoint, tmp_path):
    file = tmp_path / "document.json"
    flags = ["--checkpoint", checkpoint, "--draft", checkpoint, "--tokens", "40", "--seconds", "0.2", "--device", "cpu"]
    assert guess_speed.main([*flags, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["not_timed"] for row in rows] == [None] * 6
    for row in rows:
        assert (row["tokens_a_call"] > 1) == (row["contestant"] != "nobody") or row["contestant"] == "ngram"
        if row["contestant"] == "a model":
            assert row["right"] == 1


def test_a_missing_checkpoint_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        guess_speed.main(["--checkpoint", "nowhere"])
    assert capsys.readouterr().err.count("\n") == 1
