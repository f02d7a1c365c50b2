"""Training on documents: the loss counts each target once, runs resume bit for bit, writing ends where documents do."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_resume import assert_same_end, stop_at

from model import GPT, GPTConfig, from_pretrained
from train import Trainer, TrainerConfig
from train.__main__ import main
from train.data import load_data, training_batches
from train.documents import PackedDataset
from train.evaluate import evaluate
from train.evaluate import main as evaluate_main

LENGTH = 16
SIZES = {"context_length": LENGTH, "window": 8, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32}
FAST = "--context-size 16 --window 8 --n-layer 1 --n-head 2 --n-kv-head 1 --d-model 32 --batch-size 4 --device cpu"
FAST = [*FAST.split(), "--precision", "fp32", "--eval-examples", "4", "--sample-tokens", "4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    documents = [{"prompt": f"{i} and {j} are ", "completion": str(i + j)} for i in range(12) for j in range(9)]
    documents[5::10] = [{"text": "To be, or not to be: that is the question." * (i % 3 + 1)} for i in range(11)]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


def make_trainer(source, out_dir=None, seed=0, **settings):
    data = load_data(source)
    rows = [PackedDataset(part, LENGTH, data.tokenizer) for part in (data.training, data.held_out)]
    model = GPT(GPTConfig(vocab_size=data.tokenizer.vocab_size, **SIZES), seed=seed)
    settings = {"batch_size": 4, "max_steps": 12, "device": "cpu", "precision": "fp32", "sample_tokens": 4} | settings
    settings |= {"log_every": 1, "eval_every": 6, "save_every": 4, "out_dir": out_dir}
    return Trainer(model, *rows, TrainerConfig(**settings))


def loss_alone(model, tokens, documents, stride=LENGTH):
    """(sum of the losses, targets) by the definition: each document alone, its contexts `stride` apart, a target in the
    first context that reaches it.
    """
    total, count = 0.0, 0
    for begin, end, after_prompt in documents.tolist():
        document = tokens[begin:end].long()
        for target in range(max(1, after_prompt - begin), end - begin):
            first = max(0, -(-(target - LENGTH) // stride)) * stride
            logits = model(document[None, first:target])[0][0, -1]
            total, count = total + F.cross_entropy(logits, document[target]).item(), count + 1
    return total, count


@pytest.mark.parametrize("stride", [LENGTH, 5, 1])
def test_evaluation_is_the_mean_over_every_target_of_each_document_alone(source, stride):
    trainer = make_trainer(source, eval_examples=10**6, batch_size=3)
    held_out, model = load_data(source).held_out, trainer.model
    rows = PackedDataset(held_out, LENGTH, trainer.tokenizer, stride)
    found = evaluate(model, rows, batch_size=3)
    with torch.no_grad():
        total, count = loss_alone(model, held_out.tokens, rows.documents, stride)
    assert found["targets"] == count and found["loss"] == pytest.approx(total / count, rel=1e-5)
    if stride == LENGTH:  # the trainer's over all rows, in batches that hold different numbers of targets
        assert trainer.held_out_loss() == pytest.approx(total / count, rel=1e-5)


def weights_after_two_steps(source, **settings):
    trainer = make_trainer(source, max_steps=2, optimizer="adamw", **settings)
    trainer.train()
    return trainer


def test_accumulated_batches_make_the_step_of_one_batch(source):
    """They hold different numbers of targets, each of which counts once."""
    whole, parts = (weights_after_two_steps(source, **s) for s in ({}, {"batch_size": 2, "grad_accumulation": 2}))
    x, y, starts = next(training_batches(whole.train_dataset, 4, seed=0))
    assert (y[:2] >= 0).sum() != (y[2:] >= 0).sum()
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    logged = [[line["loss"] for line in trainer.history.lines if "loss" in line] for trainer in (whole, parts)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_prompts_are_read_and_not_trained_on(source):
    trainer = make_trainer(source)
    x, y, starts = trainer.train_dataset.batch(range(len(trainer.train_dataset)))
    decode = trainer.tokenizer.decode
    sums = 0
    for row in range(len(x)):
        for start in starts[row].unique().tolist():
            inside = starts[row] == start
            text, targets = decode(x[row, inside]), y[row, inside]
            if " are " in text:
                answer = decode(targets[targets >= 0])
                assert answer.removesuffix("<|endoftext|>").isdigit() and answer.endswith("<|endoftext|>")
                sums += 1
    assert sums > 50


def test_resume_is_bit_exact_with_documents(source, tmp_path):
    settings = {"grad_accumulation": 2}
    make_trainer(source, tmp_path / "whole", **settings).train()
    for step, seed in ((5, 0), (9, 7)):
        stop_at(make_trainer(source, tmp_path / "run", seed, resume=step > 5, **settings), step)
    make_trainer(source, tmp_path / "run", resume=True, **settings).train()
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def run_command(*arguments):
    assert main([*map(str, arguments)]) == 0


def evaluated(capsys, *arguments):
    assert evaluate_main([*map(str, arguments), "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_trains_on_documents_evaluates_them_and_resumes(source, tmp_path, capsys):
    run = tmp_path / "run"
    run_command("--data", source, *FAST, "--max-steps", 6, "--save-every", 3, "--out-dir", run)
    shown = capsys.readouterr().out
    model, tokenizer = from_pretrained(run / "last")
    data = load_data(source, tokenizer=tokenizer)
    held_out, rows = (PackedDataset(part, LENGTH, tokenizer) for part in (data.held_out, data.training))
    share = len(data.held_out.tokens) / (len(data.held_out.tokens) + len(data.training.tokens))
    assert f"characters in 108 documents, {tokenizer.vocab_size} different; the last" in shown
    assert f"the last {len(held_out.documents)} documents held out, {100 * share:.1f} % of the tokens" in shown
    assert f"packed into {len(rows)} rows of 16; {100 * rows.padding:.1f} % is padding" in shown
    record = json.loads((run / "run.json").read_text())
    assert record["run"]["documents"] is True and record["data"]["documents"] == 108

    found = evaluated(capsys, "--checkpoint", run / "last")
    with torch.no_grad():
        total, count = loss_alone(model, held_out.tokens, held_out.documents)
    assert found["targets"] == count and found["loss"] == pytest.approx(total / count, rel=1e-4)
    given = sum(max(1, after - begin) for begin, _, after in held_out.documents.tolist())
    assert found["characters"] == count - len(held_out.documents) == data.held_out.characters - given
    assert found["bits_per_character"] == pytest.approx(total / math.log(2) / found["characters"], rel=1e-4)

    run_command("--resume", "--out-dir", run, "--max-steps", 8)
    with pytest.raises(SystemExit):
        main(["--resume", "--out-dir", str(run), "--no-documents"])
    assert "was trained with documents True, not False" in capsys.readouterr().err


def test_files_of_a_folder_are_documents_or_a_stream(tmp_path, capsys):
    for i in range(10):
        path = tmp_path / "books" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"Chapter {i} of the book about the number {i * 7}.\n" * (i + 1))
    for name, flags in (("apart", []), ("stream", ["--no-documents"])):
        run_command("--data", tmp_path / "books", *FAST, "--max-steps", 2, "--out-dir", tmp_path / name, *flags)
    shown = capsys.readouterr().out
    assert shown.count("in 10 documents") == shown.count("in 10 files") == 1
    assert from_pretrained(tmp_path / "apart")[1].end_of_text is not None
    assert from_pretrained(tmp_path / "stream")[1].end_of_text is None
    # a model of documents reads the same held-out text as a stream, the ends of documents included
    apart, stream = (
        evaluated(capsys, "--checkpoint", tmp_path / "apart", *flags) for flags in ([], ["--no-documents"])
    )
    assert apart["targets"] == apart["characters"] + 1 and stream["targets"] == stream["characters"]
    assert stream["characters"] == apart["characters"]
    # a run from before there were documents has no such record, and goes on as a stream
    file = tmp_path / "stream" / "run.json"
    old = json.loads(file.read_text())
    assert old["run"].pop("documents") is False
    file.write_text(json.dumps(old))
    run_command("--resume", "--out-dir", tmp_path / "stream", "--max-steps", 3)


@pytest.mark.parametrize("kind", ["shakespearean", "byte"])
def test_writing_ends_where_the_model_ends_a_document(tmp_path, capsys, kind):
    from model.sample import main as sample_main

    path = tmp_path / "ab.jsonl"
    path.write_text('{"text": "\\nabc"}\n' * 200)
    run = tmp_path / "run"
    flags = ["--embedding-type", kind, "--learning-rate", "0.03", "--max-steps", "60", "--sample-tokens", "50"]
    run_command("--data", path, *FAST, *flags, "--out-dir", run)
    shown = capsys.readouterr().out
    assert "    | abc\n" in shown and "endoftext" not in shown
    for extra in ([], ["--log-probabilities"]):
        assert sample_main(["--checkpoint", str(run), "--greedy", "--device", "cpu", *extra]) == 0
        written = capsys.readouterr()
        assert "4 tokens in" in written.err and "endoftext" not in written.out
        assert written.out.strip() == "abc" if not extra else written.out.count("\n") == 3


@pytest.mark.parametrize("architecture", ["original", "rope-window-gqa"])
def test_plain_pytorch_trains_on_documents_to_the_same_losses(source, tmp_path, architecture):
    losses = []
    steps = ["--max-steps", 5, "--log-every", 1]
    plain = ["--no-fused-kernels", "--activation-checkpointing"]
    for name, flags in (("kernels", []), ("plain", plain)):
        run_command(
            "--data", source, *FAST, *flags, "--architecture", architecture, *steps, "--out-dir", tmp_path / name
        )
        lines = [json.loads(line) for line in Path(tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], rel=1e-3)
