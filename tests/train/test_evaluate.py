"""Evaluation: every held-out character exactly once, whatever the stride, and one JSON object at the end."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, CharTokenizer, GPTConfig, save_pretrained
from train.data import CharDataset, split
from train.evaluate import evaluate, main
from train.tokens import fingerprint

LENGTH = 8
TEXT = "".join(" etaoinshrdlu\n"[(i * i + i // 7) % 14] for i in range(1500))


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=14, context_length=LENGTH, window=5, n_layer=2, n_head=2, d_model=16), seed=0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # an opinionated model: losses far from uniform
    return model


def one_by_one(model, tokens, stride):
    """The definition: contexts at 0, stride, 2 stride, ...; a character is predicted in the first that reaches it."""
    total, last = 0.0, 0
    for start in range(0, len(tokens), stride):
        for target in range(last + 1, min(start + LENGTH, len(tokens) - 1) + 1):
            logits, _ = model(tokens[None, start:target].long())
            total += F.cross_entropy(logits[0, -1], tokens[target].long()).item()
            last = target
    assert last == len(tokens) - 1
    return total / last


@pytest.mark.parametrize("count", [2, 3, LENGTH, LENGTH + 1, LENGTH + 2, 3 * LENGTH + 1, 50])
@pytest.mark.parametrize("stride", [1, 3, LENGTH - 1, LENGTH])
def test_every_character_is_predicted_exactly_once(model, count, stride):
    tokens = torch.randint(14, (count,), dtype=torch.uint8)
    result = evaluate(model, tokens, stride=stride, batch_size=3)
    assert result["targets"] == count - 1
    with torch.no_grad():
        assert result["loss"] == pytest.approx(one_by_one(model, tokens, stride), rel=1e-5)


def test_contexts_do_not_overlap_by_default(model):
    tokens = torch.randint(14, (50,))
    assert evaluate(model, tokens) == evaluate(model, tokens, stride=LENGTH)


def test_perplexity_and_bits_are_those_of_the_loss(model):
    result = evaluate(model, torch.randint(14, (50,)))
    assert result["perplexity"] == math.exp(result["loss"])
    assert result["bits_per_token"] == pytest.approx(math.log2(result["perplexity"]))


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary():
    model = GPT(GPTConfig(vocab_size=16, context_length=LENGTH, n_layer=1, n_head=2, d_model=16))
    torch.nn.init.zeros_(model.wte.weight)
    assert evaluate(model, torch.randint(16, (100,)))["bits_per_token"] == pytest.approx(4)


def test_the_model_keeps_its_mode(model):
    for mode in (True, False):
        model.train(mode)
        evaluate(model, torch.randint(14, (20,)))
        assert model.training is mode


@pytest.mark.parametrize("stride", [0, LENGTH + 1])
def test_a_stride_beyond_the_context_is_refused(model, stride):
    with pytest.raises(ValueError, match=f"stride is {stride}, wanted 1 to the context length, 8"):
        evaluate(model, torch.randint(14, (20,)), stride=stride)


def test_a_text_without_a_pair_is_refused(model):
    with pytest.raises(ValueError, match="text has 1 tokens, at least 2"):
        evaluate(model, torch.tensor([1]))


@pytest.fixture
def checkpoint(model, tmp_path):
    save_pretrained(model, tmp_path / "model", CharTokenizer.from_text(TEXT))
    (tmp_path / "text.txt").write_text(TEXT, newline="")
    return str(tmp_path / "model")


def test_the_last_line_is_one_json_object_about_the_held_out_text(checkpoint, model, tmp_path, capsys):
    text = str(tmp_path / "text.txt")
    assert main(["--checkpoint", checkpoint, "--data", text, "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokens = torch.tensor(CharTokenizer.from_text(TEXT).encode(split(TEXT)[1]))
    assert result["loss"] == pytest.approx(evaluate(model, tokens)["loss"], rel=1e-6)
    assert result["targets"] == 149 and result["stride"] == LENGTH and result["data"] == text
    assert result["bits_per_character"] == pytest.approx(result["loss"] / math.log(2))


def test_fused_and_plain_attention_evaluate_alike(checkpoint, tmp_path, capsys):
    losses = []
    for kernels in ("--fused-kernels", "--no-fused-kernels"):
        main(["--checkpoint", checkpoint, "--data", str(tmp_path / "text.txt"), kernels, "--device", "cpu"])
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def refused(capsys, *arguments):
    """The one line with which the command refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def test_bad_arguments_are_refused_in_one_line(checkpoint, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(TEXT + "Z" * 10)
    assert "--checkpoint is missing" in refused(capsys)
    assert "is not a directory" in refused(capsys, "--checkpoint", str(tmp_path / "nowhere"))
    assert "name one with --data" in refused(capsys, "--checkpoint", checkpoint)
    assert "'Z' not in the vocabulary" in refused(capsys, "--checkpoint", checkpoint, "--data", str(other))
    assert "does not exist" in refused(capsys, "--checkpoint", checkpoint, "--data", str(tmp_path / "none.txt"))
    assert "stride is 9" in refused(
        capsys, "--checkpoint", checkpoint, "--data", str(tmp_path / "text.txt"), "--stride", "9"
    )


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_truncated_checkpoint_is_refused_in_one_line(checkpoint, tmp_path, capsys, file):
    path = tmp_path / "model" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert file in refused(capsys, "--checkpoint", checkpoint, "--data", str(tmp_path / "text.txt"))


def test_a_run_directory_means_its_best_checkpoint_else_its_last(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT, newline="")

    def evaluated():
        assert (
            main(["--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "text.txt"), "--device", "cpu"]) == 0
        )
        return json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoint"]

    for name in ("last", "best"):
        save_pretrained(model, tmp_path / "run" / name, CharTokenizer.from_text(TEXT))
        assert evaluated() == str(tmp_path / "run" / name)


def test_the_training_text_is_found_again_and_must_be_unchanged(checkpoint, tmp_path, capsys):
    data = {"source": str(tmp_path / "text.txt"), "sha256": fingerprint(TEXT)}
    (tmp_path / "model" / "training.json").write_text(json.dumps({"run": {"data": data}}))
    assert main(["--checkpoint", checkpoint, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["targets"] == 149
    (tmp_path / "text.txt").write_text(TEXT[5:])
    assert "is not the text this checkpoint was trained on" in refused(capsys, "--checkpoint", checkpoint)


def test_the_data_set_and_the_tokens_agree():
    dataset = CharDataset(TEXT, block_size=LENGTH)
    assert dataset.tokens.tolist() == CharTokenizer.from_text(TEXT).encode(TEXT)
