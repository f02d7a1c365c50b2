"""The streaming benchmark: what it reads through a cache is what a whole forward says, and the document it writes."""

import json

import pytest
import streaming
import torch
import torch.nn.functional as F

from model import GPT, CharTokenizer, GPTConfig, save_pretrained

CONFIG = GPTConfig(vocab_size=4, context_length=40, n_layer=2, n_head=2, d_model=16)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    save_pretrained(GPT(CONFIG, seed=0), tmp_path / "model", CharTokenizer("abc\n"))
    (tmp_path / "text").write_text("abcb\n" * 4000)
    return tmp_path


def test_losses_by_position_are_those_of_a_whole_forward():
    model = GPT(CONFIG, seed=0).eval()
    tokens = torch.randint(4, (2, 101))
    for window, prefix, bounded in ((None, 0, True), (12, 0, True), (12, 3, True), (12, 3, False)):
        reading = streaming.reader(model, window, prefix, bounded, 100)
        assert (reading.config.prefix_distance, prefix) in ((None, 0), (39 if bounded else 99, 3))
        logits = reading(tokens[:, :-1])[0]
        expected = F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(0)
        torch.testing.assert_close(streaming.stream_losses(reading, tokens), expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_looks_nowhere_in_particular_gives_the_first_keys_their_share():
    model = GPT(CONFIG, seed=0).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
    largest, mean = streaming.share_of_first(model, torch.randint(4, (2, 60)), 4)
    expected = sum(4 / n for n in range(21, 41)) / 20
    assert largest == pytest.approx(expected, rel=1e-4) and mean == pytest.approx(expected, rel=1e-4)


def test_the_command_writes_its_document(checkpoint, capsys):
    file = checkpoint / "document.json"
    arguments = ["--checkpoint", str(checkpoint / "model"), "--keys", "16", "--length", "150", "--rows", "2"]
    arguments += ["--val-data", str(checkpoint / "text")]
    assert streaming.main([*arguments, "--plot", "none", "--json", str(file), "--device", "cpu"]) == 0
    document = json.loads(file.read_text())
    assert {row["position"] for row in document["rows"]} == {32, 64, 128, 150}
    assert len({row["contestant"] for row in document["rows"]}) == 6
    losses = {row["contestant"]: row["loss"] for row in document["rows"] if row["position"] == 150}
    assert 0 < abs(losses["window 16, int8"] / losses["window 16"] - 1) < 0.005
    assert "ours: prefix 4 + window 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefix", "0"], "--prefix is 0 of --keys 128"),
        (["--checkpoint", "nowhere"], "nowhere is not a directory"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        streaming.main(["--plot", "none", *arguments])
    assert error.value.code == 2 and message in capsys.readouterr().err
