"""Every command of docs/training.md runs, on small texts, for two steps."""

import re
import shlex
from pathlib import Path

import pytest
from kill_and_resume import TEXT

from model import GPT, CharTokenizer, GPTConfig, save_pretrained
from train.__main__ import main
from train.evaluate import main as evaluate

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
COMMANDS = re.findall(r"^ *((?:python|torchrun) .*)$", PAGE, re.MULTILINE)
SMALL = "--batch-size 2 --eval-examples 2 --sample-tokens 2 --device cpu --parallel none"
NEW = "--max-steps 2 --context-size 16 --n-layer 1 --window 8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The texts, the imported model and the run of two steps that the page speaks of."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("my.txt", "train.txt", "validation.txt", "books/a.txt", "books/b.md", "logs/deep/a.log"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(TEXT)
    sizes = {"context_length": 16, "n_layer": 1, "n_head": 1, "d_model": 8}
    tokenizer = CharTokenizer.from_text(TEXT)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))
    save_pretrained(model, folder / "models" / "imported", tokenizer)
    new = [*NEW.split(), *SMALL.split(), "--data", str(folder / "my.txt")]
    assert main([*new, "--out-dir", str(folder / "runs" / "mine")]) == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_of_the_page_runs(command, folder, tmp_path, monkeypatch):
    if "bpe" in command:
        pytest.importorskip("tokenizers")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("train.__main__.SAMPLE_TOKENS", 5)
    command = command.partition(" || ")[0].replace("--context-size 256", "--context-size 16")
    program, arguments = re.split(r"(?<=-m train\.evaluate)\s|(?<=-m train)\s|(?<=\.py)\s", command, maxsplit=1)
    arguments = shlex.split(arguments, comments=True)
    if "train.evaluate" in program:
        arguments = [
            "16" if flag == "--stride" else word for flag, word in zip(["", *arguments], arguments, strict=False)
        ]
        assert evaluate([*arguments, "--device", "cpu"]) == 0
    elif program.endswith("-m train"):
        new = [] if "--resume" in arguments else [*NEW.split(), "--out-dir", str(tmp_path / "run")]
        new += ["--context-size", "25"] if "--context_size" in arguments else []
        small = [] if "--resume" in arguments else SMALL.split()
        assert main([*arguments, *new, *small]) == 0
    else:
        assert program.endswith("tests/train/kill_and_resume.py")  # test_resume.py runs it


def test_the_page_names_flags_that_exist(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    known = capsys.readouterr().out
    others = {
        "--checkpoint",
        "--stride",
        "--nproc-per-node",
        "--kills",
        "--steps",
        "--help",
        "--check",
        "--logdir",
        "--n-embd",
    }
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", PAGE.replace("_", "-"))) - others:
        assert f"{flag} " in known or f"{flag}," in known or f"{flag}\n" in known, flag
