import importlib
import io
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from mixes import FIELDS, lively

from model import GPT, CharTokenizer, GPTConfig, from_pretrained, generate, save_pretrained
from model import sample as command
from model.sampling import sample

ROOT = Path(__file__).parents[2]
TOKENIZER = CharTokenizer("\n" + "".join(map(chr, range(40, 80))))
COMMAND = [sys.executable, "-m", "model.sample"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_pretrained(lively(GPT(GPTConfig(**FIELDS), seed=0)), directory, TOKENIZER)
    return str(directory)


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of the command with these arguments."""
    try:
        status = command.main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


def test_the_command_prints_what_the_library_samples(capsys, checkpoint):
    arguments = (
        "--prompt",
        "ABC",
        "--max-new-tokens",
        "70",
        "--temperature",
        "0.8",
        "--top-k",
        "9",
        "--seed",
        "4",
        "--device",
        "cpu",
    )
    status, out, err = run(capsys, "--checkpoint", checkpoint, *arguments)
    loaded, _ = from_pretrained(checkpoint)
    prompt = torch.tensor([TOKENIZER.encode("ABC")])
    expected = sample(loaded, prompt, 70, temperature=0.8, sample=True, top_k=9, seed=4)
    assert (status, out) == (0, TOKENIZER.decode(expected[0]) + "\n")
    assert "rope-window-gqa" in err and "backend banded (Triton has no cpu backend) on cpu" in err
    assert "70 tokens in" in err


def test_a_run_directory_writes_with_its_best_checkpoint(capsys, checkpoint, tmp_path):
    (tmp_path / "best").symlink_to(checkpoint)
    arguments = ("--max-new-tokens", "20", "--seed", "4", "--device", "cpu")
    status, out, err = run(capsys, "--checkpoint", str(tmp_path), *arguments)
    assert (status, out) == run(capsys, "--checkpoint", checkpoint, *arguments)[:2]
    assert f"{tmp_path}/best: rope-window-gqa" in err


def test_every_sampling_parameter_has_its_flag(capsys, checkpoint):
    flags = ("--min-p", "0.05", "--repetition-penalty", "1.4", "--top-p", "0.9", "--temperature", "2", "--seed", "4")
    flags += ("--device", "cpu")
    status, out, _ = run(capsys, "--checkpoint", checkpoint, "--prompt", "ABC", "--max-new-tokens", "60", *flags)
    loaded, _ = from_pretrained(checkpoint)
    options = dict(min_p=0.05, repetition_penalty=1.4, top_p=0.9, temperature=2.0, seed=4)
    expected = generate(loaded, [TOKENIZER.encode("ABC")], 60, **options)
    assert (status, out) == (0, "ABC" + TOKENIZER.decode(int(token) for token in expected) + "\n")


def test_the_text_ends_before_the_first_stop_string(capsys, checkpoint):
    arguments = ("--checkpoint", checkpoint, "--prompt", "A", "--max-new-tokens", "80", "--temperature", "9")
    whole = run(capsys, *arguments, "--seed", "2")[1][1:-1]
    string, later = whole[30:33], whole[50:53]
    end = whole.index(string)
    _, out, err = run(capsys, *arguments, "--seed", "2", "--stop-string", later, "--stop-string", string)
    assert out == "A" + whole[:end] + "\n"
    assert f"{end + 3} tokens in" in err  # and no more were made
    found = whole.index("\n") if "\n" in whole else len(whole)
    assert run(capsys, *arguments, "--seed", "2", "--stop-string", "\\n")[1] == "A" + whole[:found] + "\n"


def test_log_probabilities_are_one_line_a_token(capsys, checkpoint):
    arguments = (
        "--checkpoint",
        checkpoint,
        "--prompt",
        "A",
        "--max-new-tokens",
        "20",
        "--seed",
        "2",
        "--device",
        "cpu",
    )
    text = run(capsys, *arguments)[1][1:-1]
    lines = run(capsys, *arguments, "--log-probabilities")[1].splitlines()
    loaded, _ = from_pretrained(checkpoint)
    pairs = generate(loaded, [TOKENIZER.encode("A")], 20, seed=2, log_probabilities=True)
    expected = [f"{found.item():.4f}\t{character!r}" for (_, found), character in zip(pairs, text, strict=True)]
    assert lines == expected


def test_underscores_and_hyphens_are_the_same_in_a_flags_name(capsys, checkpoint):
    first = run(capsys, "--checkpoint", checkpoint, "--max-new-tokens", "20", "--top-p", "0.9", "--seed", "1")
    second = run(capsys, "--checkpoint", checkpoint, "--max_new_tokens=20", "--top_p", "0.9", "--seed", "1")
    assert first[:2] == second[:2]
    assert len(first[1]) == 22  # the newline that is the default prompt, 20 characters, and a newline


def test_the_value_of_a_flag_keeps_its_underscores(capsys, checkpoint):
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--prompt=A_B")
    assert status == 2 and "'_' not in the vocabulary" in err


def test_plain_pytorch_and_every_named_backend_give_the_same_text(capsys, checkpoint):
    arguments = ("--checkpoint", checkpoint, "--prompt", "ABC", "--max-new-tokens", "40", "--greedy", "--device", "cpu")
    texts = [
        run(capsys, *arguments, *choice)[1]
        for choice in ((), ("--no-fused-kernels",), ("--backend", "reference"), ("--backend", "banded"))
    ]
    assert len(texts[0]) == 44 and texts == [texts[0]] * 4


def test_several_samples_follow_each_other_with_consecutive_seeds(capsys, checkpoint):
    arguments = ("--checkpoint", checkpoint, "--prompt", "A", "--max-new-tokens", "10")
    together = run(capsys, *arguments, "--num-samples", "3", "--seed", "7")
    alone = [run(capsys, *arguments, "--seed", str(seed))[1] for seed in (7, 8, 9)]
    assert together[1] == "".join(alone) and len(set(alone)) == 3
    assert "--- sample 2 of 3" in together[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "A!"], "'!' not in the vocabulary of 41 characters: leave them out"),
        (["--prompt", ""], "a prompt needs at least one token"),
        (["--temperature", "-1"], "temperature=-1.0 is not a number of at least 0"),
        (["--top-p", "1.5"], "top_p=1.5 is not in (0, 1]"),
        (["--top-k", "0"], "top_k=0 is below 1"),
        (["--min-p", "-0.1"], "min_p=-0.1 is not in [0, 1]"),
        (["--repetition-penalty", "0"], "repetition_penalty=0.0 is not a number above 0"),
        (["--stop-string", ""], "stop_strings=[''] has an empty string"),
        (["--max-new-tokens", "ten"], "argument --max-new-tokens: invalid int value: 'ten'"),
        (["--num-samples", "0"], "--num-samples is 0, expected at least 1"),
        (["--device", "toaster"], "toaster"),
        (["--backend", "cutlass"], "backend is 'cutlass', expected one of"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--max", "5"], "unrecognized arguments: --max 5"),
        (["--checkpoint", "nowhere"], "nowhere is not a directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, checkpoint, arguments, message):
    status, out, err = run(capsys, "--checkpoint", checkpoint, *arguments)
    assert (status, out) == (2, "")
    assert message in err and err.startswith("python -m model.sample: error: ")
    assert err.count("\n") == 1


def test_a_checkpoint_is_required_and_needs_a_tokenizer(capsys, tmp_path):
    status, _, err = run(capsys)
    assert status == 2 and "the following arguments are required: --checkpoint" in err
    save_pretrained(GPT(GPTConfig(**FIELDS)), tmp_path)
    status, _, err = run(capsys, "--checkpoint", str(tmp_path))
    assert status == 2 and "has no tokenizer.json" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_missing_gpu_is_one_line(capsys, checkpoint):
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--device", "cuda")
    assert status == 2 and "no CUDA device is available: use --device cpu" in err


def test_the_text_is_printed_as_it_is_made(checkpoint, monkeypatch):
    received = []

    class Terminal(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            received.append(bytes(data).decode())
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Terminal())))
    assert command.main(["--checkpoint", checkpoint, "--prompt", "ABC", "--max-new-tokens", "9"]) == 0
    assert [len(piece) for piece in received] == [3, *[1] * 9, 1]


def test_ctrl_c_keeps_the_text_so_far(checkpoint):
    process = subprocess.Popen(
        [*COMMAND, "--checkpoint", checkpoint, "--prompt", "ABC", "--max-new-tokens", "100000000", "--seed", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        start = os.read(process.stdout.fileno(), 20)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert start.startswith(b"ABC") and rest.endswith(b"\n")
    assert b"Traceback" not in err and b"interrupted after" in err


def test_ctrl_c_prints_text_that_was_held_for_a_stop_string(capsys, checkpoint, monkeypatch):
    def interrupted(*arguments, **options):
        yield from torch.tensor([[TOKENIZER.stoi["B"]], [TOKENIZER.stoi["C"]]])
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "generate", interrupted)
    status, out, err = run(capsys, "--checkpoint", checkpoint, "--prompt", "A", "--stop-string", "CD")
    assert (status, out) == (130, "ABC\n")
    assert "interrupted after 2 tokens" in err


def test_a_closed_pipe_prints_no_error(checkpoint):
    arguments = [*COMMAND, "--checkpoint", checkpoint, "--max-new-tokens", "100000000", "--seed", "1"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    try:
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert b"Traceback" not in err and b"Exception" not in err


def test_model_sample_is_a_plain_module_and_the_function_is_in_model_sampling():
    assert type(command) is types.ModuleType and command.make_parser().prog == "python -m model.sample"
    assert callable(sample) and sample is importlib.import_module("model.sampling").sample
