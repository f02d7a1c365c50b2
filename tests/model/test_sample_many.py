"""`python -m model.sample --prompts`: a line of text for each line of prompts, whatever happens on the way."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mixes import FIELDS, lively

from model import GPT, CharTokenizer, GPTConfig, save_pretrained
from model import sample as command

TOKENIZER = CharTokenizer("\n" + "".join(map(chr, range(40, 80))))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_pretrained(lively(GPT(GPTConfig(**FIELDS), seed=0)), directory, TOKENIZER)
    return str(directory)


@pytest.fixture
def files(tmp_path):
    """(prompts, out): a function that writes lines of prompts, and the output's path."""
    path, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"

    def write(*lines):
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        return ["--prompts", str(path), "--out", str(out)]

    return write, out


def run(capsys, checkpoint, *arguments):
    """(exit status, standard error) of the command; standard output must be empty."""
    try:
        status = command.main(["--checkpoint", checkpoint, "--device", "cpu", "--seed", "7", *arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert out == ""
    return status, err


def lines_of(out):
    return {values["index"]: values for values in map(json.loads, out.read_text().splitlines())}


def alone(capsys, checkpoint, prompt, index, *arguments):
    """The continuation that the command prints for one prompt, with the seed of that line."""
    flags = ["--checkpoint", checkpoint, "--device", "cpu", "--prompt", prompt, "--seed", str(7 + index)]
    assert command.main([*flags, *arguments]) == 0
    return capsys.readouterr().out[len(prompt or "\n") : -1]


def test_each_line_gets_the_text_that_the_command_writes_for_it_alone(capsys, checkpoint, files):
    write, out = files
    prompts = ["ABC", "", "A" * 60, "MNO", "ABC"]
    arguments = write(*({"prompt": prompt, "id": f"no. {i}", "more": 1} for i, prompt in enumerate(prompts)))
    options = ("--max-new-tokens", "40", "--temperature", "0.8", "--top-k", "9", "--stop-string", "CB")
    status, err = run(capsys, checkpoint, *arguments, *options, "--batch", "2")
    found = lines_of(out)
    assert status == 0 and sorted(found) == [0, 1, 2, 3, 4] and "5 texts, " in err and "tokens/s" in err
    for i, prompt in enumerate(prompts):
        assert found[i]["text"] == alone(capsys, checkpoint, prompt, i, *options)
        assert (found[i]["prompt"], found[i]["id"]) == (prompt, f"no. {i}")
        assert found[i]["ended_by"] == ("length" if len(found[i]["text"]) == 40 else "stop string")
    assert sum(values["tokens"] for values in found.values()) == int(err.split(" texts, ")[1].split(" tokens")[0])
    assert "backend banded" in err and "5/5" in err


def test_a_text_ends_with_its_document(capsys, checkpoint, files, tmp_path):
    tokenizer = CharTokenizer("\nABCDEFG", end=True)
    directory = tmp_path / "ends"
    save_pretrained(lively(GPT(GPTConfig(**{**FIELDS, "vocab_size": 9}), seed=0)), directory, tokenizer)
    write, out = files
    assert run(capsys, str(directory), *write({"prompt": "AB"}, {"prompt": "C"}), "--temperature", "9")[0] == 0
    for index, values in lines_of(out).items():
        assert values["text"] == alone(capsys, str(directory), values["prompt"], index, "--temperature", "9")
        assert values["ended_by"] == "document" and values["tokens"] == len(values["text"]) + 1


def test_lines_that_are_no_prompts_are_named_and_the_rest_is_written(capsys, checkpoint, files):
    write, out = files
    bad = ['{"prompt": "A"\n', "[1]\n", '{"text": "A"}\n', '{"prompt": 3}\n', '{"prompt": "abc"}\n']
    arguments = write({"prompt": "A"}, "\n", *bad, {"prompt": "B"})
    status, err = run(capsys, checkpoint, *arguments, "--max-new-tokens", "5")
    assert status == 1 and sorted(lines_of(out)) == [0, 7] and "5 lines were no prompts" in err
    reasons = ["it is not JSON (Expecting ',' delimiter", "it is no object", "its fields are 'text'", "its prompt is 3"]
    for number, reason in enumerate([*reasons, "'a'"], start=3):
        assert sum(f"prompts.jsonl, line {number}: " in line and reason in line for line in err.splitlines()) == 1


def test_a_prompt_longer_than_learned_positions_is_named(capsys, files, tmp_path):
    config = GPTConfig.for_architecture("original", **FIELDS)
    save_pretrained(GPT(config, seed=0), tmp_path / "learned", TOKENIZER)
    write, out = files
    arguments = write({"prompt": "A" * 48}, {"prompt": "A" * 49}, {"prompt": "B"})
    status, err = run(capsys, str(tmp_path / "learned"), *arguments, "--max-new-tokens", "5")
    assert status == 1 and sorted(lines_of(out)) == [0, 2]
    assert "line 2: its prompt has 49 tokens, more than the 48 positions" in err


def test_resume_writes_what_is_missing_and_nothing_twice(capsys, checkpoint, files):
    write, out = files
    arguments = write(*({"prompt": character} for character in "ABCDEF"))
    options = (*arguments, "--max-new-tokens", "20", "--batch", "3")
    run(capsys, checkpoint, *options)
    whole, lines = lines_of(out), out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[1:3]) + lines[0][:30])  # stopped in the middle of a line
    status, err = run(capsys, checkpoint, *options, "--resume")
    assert status == 0 and lines_of(out) == whole and len(out.read_text().splitlines()) == 6
    assert out.read_bytes().startswith(b"".join(lines[1:3])) and "4 texts, " in err
    assert run(capsys, checkpoint, *options, "--resume")[0] == 0 and lines_of(out) == whole


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--max-new-tokens", "5"), "exists: add --resume"),
        (("--resume",), "line 1: it is no text of a prompt in"),
    ],
)
def test_an_output_that_exists_is_never_overwritten(capsys, checkpoint, files, flags, message):
    write, out = files
    out.write_text('{"index": 0, "prompt": "another"}\n')
    status, err = run(capsys, checkpoint, *write({"prompt": "A"}), *flags)
    assert status == 2 and message in err and len(err.splitlines()) == 1
    assert out.read_text() == '{"index": 0, "prompt": "another"}\n'


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--prompts missing.jsonl --out x.jsonl", "missing.jsonl: No such file"),
        ("--prompts empty.jsonl --out x.jsonl", "empty.jsonl has no prompts"),
        ("--prompts one.jsonl", "--prompts needs --out"),
        ("--prompts one.jsonl --out .", "exists: add --resume"),
        ("--prompts one.jsonl --out one.jsonl --resume", "it is no text of a prompt"),
        ("--prompts one.jsonl --out x.jsonl --batch 0", "batch=0 is below 1"),
        ("--prompts one.jsonl --out x.jsonl --top-k 0", "top_k=0 is below 1"),
        ("--prompts one.jsonl --out x.jsonl --num-samples 2", "--num-samples does nothing with --prompts"),
        ("--prompts one.jsonl --out x.jsonl --draft ngram", "--draft does nothing with --prompts"),
        ("--prompts one.jsonl --out x.jsonl --log-probabilities", "--log-probabilities does nothing with --prompts"),
        ("--prompts one.jsonl --out x.jsonl --prompt A", "not allowed with argument"),
        ("--resume", "--resume needs --prompts FILE"),
        ("--batch 4", "--batch needs --prompts FILE"),
    ],
)
def test_wrong_flags_are_one_line(capsys, checkpoint, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n\n")
    Path("one.jsonl").write_text('{"prompt": "A"}\n')
    status, err = run(capsys, checkpoint, *flags.split())
    assert status == 2 and message in err and len(err.splitlines()) == 1


def test_ctrl_c_keeps_finished_texts_and_resume_makes_the_others_the_same(capsys, checkpoint, files, tmp_path):
    write, out = files
    arguments = write(*({"prompt": "ABCDEFGH"[i % 8]} for i in range(40)))
    options = (*arguments, "--max-new-tokens", "400", "--batch", "2", "--batch-invariant")
    words = [sys.executable, "-m", "model.sample", "--checkpoint", checkpoint, "--device", "cpu", "--seed", "7"]
    process = subprocess.Popen([*words, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not out.exists() or out.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and not time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    kept = lines_of(out)
    assert process.returncode == 130 and 4 <= len(kept) < 40 and "Traceback" not in err
    assert f"interrupted: {len(kept)} of 40 texts are in {out}" in err
    assert run(capsys, checkpoint, *options, "--resume")[0] == 0
    resumed = lines_of(out)
    assert len(resumed) == 40 == len(out.read_text().splitlines())
    fresh = (*arguments[:3], str(tmp_path / "fresh.jsonl"), *options[4:])
    assert run(capsys, checkpoint, *fresh)[0] == 0
    assert lines_of(tmp_path / "fresh.jsonl") == resumed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_one_line(capsys, checkpoint, files):
    write, _ = files
    status, err = run(capsys, checkpoint, *write({"prompt": "A"})[:3], "/dev/full", "--max-new-tokens", "3")
    assert status == 1 and "/dev/full cannot be written: No space left on device" in err and "Traceback" not in err
