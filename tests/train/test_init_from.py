"""`python -m train --init-from DIR`: training starts from an imported or a trained model."""

import json

import pytest
import torch

from model import GPT, CharTokenizer, GPTConfig, from_pretrained, save_pretrained
from model.sample import main as sample_main
from train.__main__ import main
from train.evaluate import evaluate
from train.evaluate import main as evaluate_main

TEXT = "When are you going? I am going to the play.\nAnd you are coming to the play with me.\n" * 40
SIZES = dict(context_length=24, window=9, n_layer=3, n_head=4, n_kv_head=2, d_model=32, dropout=0.3)
TOKENIZER = CharTokenizer([*sorted(set(TEXT), reverse=True), "\u00e9"])  # neither the text's own order nor its size


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def imported(tmp_path):
    save_pretrained(GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, **SIZES), seed=3), tmp_path / "model", TOKENIZER)
    return str(tmp_path / "model")


def train(imported, text, tmp_path, *flags):
    flags = ("--batch-size", "4", "--max-steps", "3", "--device", "cpu", "--out-dir", str(tmp_path / "run"), *flags)
    assert main(["--fused-kernels", "--init-from", imported, "--data", text, *flags]) == 0
    return from_pretrained(tmp_path / "run" / "last")


def test_the_run_begins_with_the_models_weights_sizes_and_vocabulary(imported, text, tmp_path, capsys):
    model, tokenizer = train(imported, text, tmp_path, "--learning-rate", "1e-20")
    before, _ = from_pretrained(imported)
    assert tokenizer.itos == TOKENIZER.itos
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before.state_dict()[name], atol=1e-12, rtol=1e-6)
    assert model.config == GPTConfig(vocab_size=TOKENIZER.vocab_size, **{**SIZES, "dropout": 0.0})
    shown = capsys.readouterr().out
    assert f"those of {imported}, and its vocabulary" in shown and "3 layers, width 32, 4 heads on 2 KV heads" in shown
    assert "3 steps of 96 tokens" in shown  # contexts of 24: the model's, which are shorter than the default


def test_training_lowers_its_loss(imported, text, tmp_path):
    train(imported, text, tmp_path, "--max-steps", "60", "--eval-every", "60", "--context-size", "16")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert held_out[-1] < held_out[0] - 0.5
    model, _ = from_pretrained(tmp_path / "run" / "last")
    assert model.config.context_length == 24  # what it was trained for before, it still is


def test_window_dropout_and_context_are_the_runs(imported, text, tmp_path, capsys):
    flags = ("--window", "5", "--window-pattern", "SL", "--prefix", "3", "--dropout", "0.1", "--context-size", "40")
    model, _ = train(imported, text, tmp_path, *flags)
    shown = capsys.readouterr()
    assert ", window 5 in layers SL and the first 3\n" in shown.out
    assert "attention  plain PyTorch in training, which --dropout needs" in shown.out and "warning" not in shown.err
    config = model.config
    assert (config.window, config.window_pattern, config.prefix) == (5, "SL", 3)
    assert (config.dropout, config.context_length) == (0.1, 40)


def test_weights_in_bf16_are_trained_in_fp32(imported, text, tmp_path):
    model, tokenizer = from_pretrained(imported)
    save_pretrained(model.to(torch.bfloat16), imported, tokenizer)
    assert train(imported, text, tmp_path)[0].wte.weight.dtype == torch.float32


def refused(capsys, message, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", *arguments])
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    assert message in shown.err, shown.err


def test_flags_that_contradict_the_model_are_refused(imported, text, tmp_path, capsys):
    start = ("--init-from", imported, "--data", text)
    refused(capsys, "--d-model, --n-layer: not with --init-from, whose model has its own sizes", *start,
            "--n_layer", "4", "--d-model=128")  # fmt: skip
    refused(capsys, "--architecture: not with --init-from", *start, "--architecture", "rope-window-gqa")
    save_pretrained(GPT(GPTConfig(vocab_size=26, positions="learned", **{**SIZES, "window": None, "n_kv_head": 4})),
                    tmp_path / "learned", TOKENIZER)  # fmt: skip
    refused(capsys, "context_size is 25, but ", "--init-from", str(tmp_path / "learned"), "--data", text,
            "--context-size", "25")  # fmt: skip


def test_models_that_cannot_begin_are_refused(imported, text, tmp_path, capsys):
    refused(capsys, "nowhere is not a directory", "--init-from", str(tmp_path / "nowhere"), "--data", text)
    (tmp_path / "other.txt").write_text(TEXT.replace("play", "\u00fcber"))
    message = "'\u00fc' not in the vocabulary of"
    refused(capsys, message, "--init-from", imported, "--data", str(tmp_path / "other.txt"))
    (tmp_path / "model" / "tokenizer.json").unlink()
    refused(capsys, "has no tokenizer.json, which turns text into", "--init-from", imported, "--data", text)


@pytest.fixture
def subwords(tmp_path):
    """A model directory whose tokens are pieces of words."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=290, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    directory = tmp_path / "subwords"
    save_pretrained(GPT(GPTConfig(vocab_size=tokenizer.get_vocab_size(), **SIZES), seed=0), directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


def test_a_model_of_subwords_trains_writes_and_is_measured(subwords, text, tmp_path, capsys):
    model, tokenizer = train(subwords, text, tmp_path, "--max-steps", "40", "--learning-rate", "1e-2")
    shown = capsys.readouterr().out
    assert "vocabulary" in shown and f"{len(TEXT):,} characters, 290 tokens" in shown and "500 tokens by" in shown
    assert evaluate_main(["--checkpoint", str(tmp_path / "run" / "last"), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    tokens = tokenizer.encode(TEXT[int(len(TEXT) * 0.9) :])
    assert result["targets"] == len(tokens) - 1
    bits = result["loss"] * result["targets"] / 0.6931471805599453
    characters = len(tokenizer.decode(tokens[1:]))
    assert result["bits_per_character"] == pytest.approx(bits / characters, rel=1e-6)
    assert f"{len(tokens) - 1:,} tokens ({characters:,} characters), each once" in shown
    assert result["loss"] == pytest.approx(evaluate(model, torch.tensor(tokens))["loss"], rel=1e-5)


def test_evaluate_takes_another_context_size(imported, text, capsys):
    def measured(*flags):
        assert evaluate_main(["--checkpoint", imported, "--data", text, "--device", "cpu", *flags]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    longer, usual = measured("--context-size", "48"), measured()
    assert (longer["context_length"], longer["stride"], usual["context_length"]) == (48, 48, 24)
    assert longer["targets"] == usual["targets"] and longer["loss"] != usual["loss"]
    with pytest.raises(SystemExit):
        measured("--context-size", "0")
    assert "context_size is 0, wanted at least 1" in capsys.readouterr().err


def test_a_directory_of_transformers_is_trained_on_sampled_from_and_evaluated(text, tmp_path, capsys):
    """A Qwen 3 in bf16 and shards, whose tokenizer ends documents with </s>, on two documents of .jsonl."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    directory, data = tmp_path / "downloaded", tmp_path / "data.jsonl"
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=280, special_tokens=["</s>"], show_progress=False)
    config = transformers.Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=24,
    )  # fmt: skip
    theirs = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(directory, max_shard_size="20KB")
    trained.save(str(directory / "tokenizer.json"))
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    data.write_text("".join(json.dumps({"text": TEXT[first : first + 200]}) + "\n" for first in range(0, 3000, 200)))

    model, tokenizer = train(str(directory), str(data), tmp_path, "--learning-rate", "1e-20")
    assert tokenizer.end_of_text == trained.token_to_id("</s>")
    assert model.config.qk_norm is True and model.config.mlp == "swiglu"
    before, _ = from_pretrained(directory)
    assert before.wte.weight.dtype == torch.bfloat16 and model.wte.weight.dtype == torch.float32
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor.float(), atol=1e-12, rtol=1e-6)
    assert "15 documents" in capsys.readouterr().out
    sample_main(["--checkpoint", str(directory), "--prompt", "When", "--max-new-tokens", "3"])
    evaluate_main(["--checkpoint", str(directory), "--val-data", text])
    assert "bits per character" in capsys.readouterr().out
