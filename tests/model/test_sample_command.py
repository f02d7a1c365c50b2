import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from mixes import FIELDS, lively

from model import GPT, CharTokenizer, GPTConfig, from_pretrained, generate, save_pretrained
from model import sample as command
from model.checkpoint import checksums
from model.sampling import sample

ROOT = Path(__file__).parents[2]
without_mps = pytest.mark.skipif(torch.backends.mps.is_available(), reason="asks for MPS where there is none")
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


def test_a_draft_changes_nothing_but_the_time(capsys, checkpoint):
    settings = ["--checkpoint", checkpoint, "--prompt", "ABCABCABC", "--max-new-tokens", "60", "--greedy"]
    texts = {run(capsys, *settings, *draft)[:2] for draft in ([], ["--draft", "ngram"], ["--draft", checkpoint])}
    assert len(texts) == 1 and texts.pop()[0] == 0


def test_window_and_prefix_replace_the_models(capsys, checkpoint):
    """What the model does with them set, and not what it does without."""
    arguments = ("--checkpoint", checkpoint, "--max-new-tokens", "60", "--greedy", "--prompt", "ABC", "--device", "cpu")
    _, without, _ = run(capsys, *arguments)
    status, out, _ = run(capsys, *arguments, "--window", "4", "--prefix", "2")
    loaded, _ = from_pretrained(checkpoint)
    loaded.set_window(4, prefix=2)
    expected = sample(loaded, torch.tensor([TOKENIZER.encode("ABC")]), 60)
    assert (status, out) == (0, TOKENIZER.decode(expected[0]) + "\n") and out != without
    status, _, err = run(capsys, *arguments, "--prefix", "-2")
    assert status == 2 and "prefix=-2 is not a whole number of at least 0" in err


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
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--prompt-file", sys.executable], "is no text in UTF-8"),
        (["--prompt", "A", "--prompt-file", "-"], "argument --prompt-file: not allowed with argument --prompt"),
        (["-i", "--num-samples", "2"], "--num-samples does nothing with --interactive"),
        (["--seed", "-1"], "seed=-1 is not a whole number from 0 to 2**63 - 1"),
        (["--seed", str(2**64)], f"seed={2**64} is not a whole number from 0 to 2**63 - 1"),
        (["--seed", str(2**63 - 1), "--num-samples", "2"], f"seed={2**63} is not a whole number"),
        (["--no-fused-kernels", "--backend", "banded"], "'banded' is one of the fused kernels: leave out either it or"),
        (["--temperature", "-1"], "temperature=-1.0 is not a number of at least 0"),
        (["--top-p", "1.5"], "top_p=1.5 is not in (0, 1]"),
        (["--top-k", "0"], "top_k=0 is below 1"),
        (["--min-p", "-0.1"], "min_p=-0.1 is not in [0, 1]"),
        (["--repetition-penalty", "0"], "repetition_penalty=0.0 is not a number above 0"),
        (["--stop-string", ""], "stop_strings=[''] has an empty string"),
        (["--max-new-tokens", "ten"], "argument --max-new-tokens: invalid int value: 'ten'"),
        (["--num-samples", "0"], "--num-samples is 0, expected at least 1"),
        (["--device", "toaster"], "toaster"),
        (["--device", "meta"], "device 'meta' cannot be used: Tensor.item() cannot be called on meta tensors"),
        pytest.param(["--device", "mps"], "'mps' cannot be used: this PyTorch does not run on it", marks=without_mps),
        (["--backend", "cutlass"], "backend is 'cutlass', expected one of"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--max", "5"], "unrecognized arguments: --max 5"),
        (["--checkpoint", "nowhere"], "nowhere is not a directory"),
        (["--checkpoint", ""], "the checkpoint's path is empty"),
        (["--draft", "nowhere"], "nowhere is not a directory"),
        (["--draft", "ngram", "--compile"], "draft with batch_invariant or compile"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, checkpoint, arguments, message):
    status, out, err = run(capsys, "--checkpoint", checkpoint, *arguments)
    assert (status, out) == (2, "")
    assert message in err and err.startswith("python -m model.sample: error: ")
    assert err.count("\n") == 1 and len(err) < 350


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((), ("--prompt", "")),
        (("--prompt", "A\nB"), ("--prompt", "A\\nB")),
        (("--prompt", "A\nB"), ("--prompt-file", "A\nB")),
        (("--prompt", "A\nB"), ("--prompt-file", "-")),
    ],
)
def test_two_ways_to_give_one_prompt_write_the_same(capsys, checkpoint, tmp_path, monkeypatch, one, other):
    file = tmp_path / "prompt.txt"
    file.write_text("A\nB")
    monkeypatch.setattr(sys, "stdin", io.StringIO("A\nB"))
    other = [str(file) if flag == "A\nB" and other[0] == "--prompt-file" else flag for flag in other]
    texts = [run(capsys, "--checkpoint", checkpoint, "--seed", "1", *flags) for flags in (one, other)]
    assert texts[0][:2] == texts[1][:2] and texts[0][1].startswith("A\nB" if one else "\n")


def test_a_backslash_before_n_is_written_as_two_in_prompts_and_stop_strings():
    assert command._unescaped(r"a\nb\\nc\d\\") == "a\nb\\nc\\d\\"


def test_without_a_line_break_in_the_vocabulary_a_text_starts_with_its_first_token(capsys, tmp_path):
    save_pretrained(GPT(GPTConfig(**FIELDS)), tmp_path, CharTokenizer("xy"))
    status, out, _ = run(capsys, "--checkpoint", str(tmp_path), "--max-new-tokens", "30")
    assert status == 0 and len(out) == 32 and out[0] == "x" and set(out) <= set("xy\n")


def test_a_damaged_model_is_not_sampled(capsys, checkpoint, tmp_path):
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    files = {name: damaged / name for name in ("config.json", "model.safetensors", "tokenizer.json")}
    (damaged / "SHA256SUMS").write_text(checksums(files))
    assert run(capsys, "--checkpoint", str(damaged), "--max-new-tokens", "1")[0] == 0
    (damaged / "model.safetensors").write_bytes(files["model.safetensors"].read_bytes()[:-1] + b"!")
    status, out, err = run(capsys, "--checkpoint", str(damaged))
    assert (status, out) == (2, "") and "damaged/model.safetensors is not what was written" in err


def interactive(checkpoint, lines):
    """(standard output, standard error) of interactive mode, which reads these lines."""
    arguments = [*COMMAND, "--checkpoint", checkpoint, "-i", "--max-new-tokens", "20", "--seed", "4"]
    done = subprocess.run(arguments, input="\n".join(lines), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_interactive_mode_answers_each_line_with_the_settings_of_the_commands(capsys, checkpoint):
    out, err = interactive(
        checkpoint,
        [
            "AB",
            "/temperature 0",
            "AB",
            "/temperature 1",
            "/seed 5",
            "A\\nB",
            "/top-k 0",
            "/tempo",
            "a!",
            "/help",
            "/quit",
            "X",
        ],
    )
    flags = [("AB", "--seed", "4"), ("AB", "--greedy"), ("A\nB", "--seed", "5")]
    texts = [run(capsys, "--checkpoint", checkpoint, "--max-new-tokens", "20", "--prompt", *flag)[1] for flag in flags]
    assert out == "".join(text.removeprefix(flag[0]) for text, flag in zip(texts, flags, strict=True))
    said = err.splitlines()
    assert said[1] == command.INTERACTIVE and said[2:5] == ["/temperature 0.0", "/temperature 1.0", "/seed 5"]
    assert said[5].startswith("/top-k 0: top_k=0 is below 1") and "'!', 'a' not in the vocabulary" in said[7]
    assert said[6].startswith("there is no /tempo: /temperature 1.0  /top-k none  ") and said[6].endswith(
        "/help  /quit"
    )
    assert said[8:] == [said[6].removeprefix("there is no /tempo: ")]
    assert interactive(checkpoint, ["/seed none", "/top-k 3", "/top-k none", "/seed x"])[1].splitlines()[2:] == [
        "/seed none",
        "/top-k 3",
        "/top-k none",
        "/seed x: expected a number, or none for the default",
    ]


def test_ctrl_c_stops_the_answer_and_not_the_interactive_program(checkpoint):
    arguments = [*COMMAND, "--checkpoint", checkpoint, "-i", "--max-new-tokens", "100000000", "--seed", "1"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(arguments, **pipes, cwd=ROOT)
    try:
        process.stdin.write(b"ABC\n")
        process.stdin.flush()
        os.read(process.stdout.fileno(), 20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/max_new_tokens 0\nABC\n", timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and out.endswith(b"\n\n\n") and b"/max-new-tokens 0" in err
    assert b"Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_output_is_one_line(checkpoint):
    arguments = [*COMMAND, "--checkpoint", checkpoint, "--max-new-tokens", "5"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    error = "python -m model.sample: standard output cannot be written: No space left on device"
    assert done.stderr.splitlines()[1:] == [error]


@pytest.mark.parametrize("ending", ["2> /dev/full", "2>&-", ">&- 2>&-", "<&-"])
def test_a_closed_or_full_stream_loses_nothing_that_is_read(checkpoint, ending):
    command = f'exec "$0" -m model.sample --checkpoint "$1" --max-new-tokens 5 --seed 1 {ending}'
    done = subprocess.run(["bash", "-c", command, sys.executable, checkpoint], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert len(done.stdout) == (0 if ">&- " in ending else 7)
    command = command.replace("--max-new-tokens", "--interactive --max-new-tokens")
    assert subprocess.run(["bash", "-c", f"{command} <&-", sys.executable, checkpoint], cwd=ROOT).returncode == 0


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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what a process has loaded")
def test_ctrl_c_while_torch_is_loaded_is_quiet(checkpoint):
    process = subprocess.Popen([*COMMAND, "--checkpoint", checkpoint], stderr=subprocess.PIPE, cwd=ROOT)
    try:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT and err == b""


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
