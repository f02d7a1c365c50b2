"""docs/huggingface.md and docs/sampling.md run as they stand: every block of Python, every command, what they print."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from model import GPT, CharTokenizer, GPTConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")


def blocks(page):
    return re.findall(r"^```(python|)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def run_python(code):
    """Run a block on its own, and compare what it prints with the comments behind its prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "docs", "exec"), {"__name__": "__main__"})
    assert printed.getvalue().splitlines() == re.findall(r"^print\(.*\)\s+# (.*)$", code, re.MULTILINE)


def run_command(line):
    """Run `python -m MODULE ...` in this process: it must end with status 0."""
    python, flag, module, *arguments = shlex.split(line, comments=True)
    assert (python, flag) == ("python", "-m")
    name = f"{module}.__main__" if module in ("train", "model.huggingface") else module
    assert importlib.import_module(name).main(arguments) == 0


def run_blocks(page):
    for language, block in page:
        if language == "python":
            run_python(block)
        else:
            for line in block.splitlines():
                run_command(line)


def test_every_example_of_the_page_runs_in_the_order_of_the_page(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    run_blocks(blocks(PAGE))
    assert len(blocks(PAGE)) > 12
    assert (tmp_path / "models" / "exported" / "tokenizer_config.json").exists()


def test_every_example_of_sampling_runs_on_a_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("KING"))  # of interactive mode
    tokenizer = CharTokenizer.from_text("ROMEO: Enter the KING\n")
    config = GPTConfig(vocab_size=tokenizer.vocab_size, context_length=8, n_layer=1, n_head=1, d_model=8)
    GPT(config).save_pretrained("runs/shakespeare/best", tokenizer)
    Path("letter.txt").write_text("the KING\n")
    *usage, measuring = blocks((ROOT / "docs" / "sampling.md").read_text(encoding="utf-8"))
    assert len(usage) == 2 and "benchmarks/" in measuring[1]
    run_blocks(usage)
    assert GPT.from_pretrained("models/mine").tokenizer.itos == tokenizer.itos


def test_every_architecture_that_passes_its_window_has_an_example():
    from model.huggingface.attention import PASS_THEIR_WINDOW

    classes = {"mistral": "Mistral", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "gpt_oss": "GptOss",
               "starcoder2": "Starcoder2", "phi3": "Phi3", "qwen2": "Qwen2"}  # fmt: skip
    assert set(classes) == PASS_THEIR_WINDOW
    for name in classes.values():
        assert f"model = {name}ForCausalLM(config)" in PAGE
