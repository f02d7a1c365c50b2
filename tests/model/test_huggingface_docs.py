"""docs/huggingface.md runs as it stands: every block of Python, every command, and what they say is printed."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run_python(code):
    """Run a block on its own, and compare what it prints with the comments behind its prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "docs/huggingface.md", "exec"), {"__name__": "__main__"})
    assert printed.getvalue().splitlines() == re.findall(r"^print\(.*\)\s+# (.*)$", code, re.MULTILINE)


def run_command(line):
    """Run `python -m MODULE ...` in this process: it must end with status 0."""
    python, flag, module, *arguments = shlex.split(line)
    assert (python, flag) == ("python", "-m")
    name = f"{module}.__main__" if module in ("train", "model.huggingface") else module
    assert importlib.import_module(name).main(arguments) == 0


def test_every_example_of_the_page_runs_in_the_order_of_the_page(tmp_path, monkeypatch):
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    for language, block in BLOCKS:
        if language == "python":
            run_python(block)
        else:
            for line in block.splitlines():
                run_command(line)
    assert len(BLOCKS) > 12
    assert (tmp_path / "models" / "exported" / "tokenizer_config.json").exists()


def test_every_architecture_that_passes_its_window_has_an_example():
    from model.huggingface.attention import PASS_THEIR_WINDOW

    classes = {"mistral": "Mistral", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "gpt_oss": "GptOss",
               "starcoder2": "Starcoder2", "phi3": "Phi3", "qwen2": "Qwen2"}  # fmt: skip
    assert set(classes) == PASS_THEIR_WINDOW
    for name in classes.values():
        assert f"model = {name}ForCausalLM(config)" in PAGE
