"""README.md and docs/*.md hold: each block of Python runs, each command runs or at least parses, each file exists.

A page is read from top to bottom, in an empty directory that has README.md:

    python blocks                run; what they print equals the comments behind their prints. A block that imports
                                 starts afresh, a block that does not continues the one before it
    blocks of commands           `python -m ...` of a package runs, with one training step; other commands are parsed.
                                 A block without a language tag is one of commands if its first line is a command
    other blocks, code spans     what starts with `python -m`, `python benchmarks/` or torchrun is parsed; in a code
                                 span required flags and a last flag's value may be absent
    <!-- test: CODE -->          CODE runs first: it makes what the page takes as given, such as a text or a run.
                                 It may use TEXT, make_text(file), make_prompts(file), make_run(directory),
                                 make_model(directory) and make_wheel()
"""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import string
import sys
import textwrap
from pathlib import Path

import pytest
import torch.distributed.run

import dist

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
PACKAGES = ("kernels", "model", "train", "benchmarks")
PARTS = re.compile(
    r"^<!-- test:(?P<setup>.*?)-->"
    r"|^```(?P<language>\w*)\n(?P<block>.*?)^```$"
    r"|(?P<indented>(?:^    [^\n]*\n)+)"
    r"|`(?P<span>[^`]+)`",
    re.MULTILINE | re.DOTALL,
)
OURS = re.compile(r"(\w+=\S* )*(python (-m |benchmarks/|tests/)|torchrun )")
# programs and modules of others, which are not checked
THEIRS = ("cd", "git", "head", "hf", "pip", "pytest", "sha256sum", "tensorboard", "transformers", "venv", "vllm")
COMMAND = re.compile(rf"{OURS.pattern}|(make|{'|'.join(THEIRS)}) ")
FILE = re.compile(r"(?<![\w/.])(?:kernels|model|train|benchmarks|tests|docs)/[\w./-]*\.(?:py|md|json|png)\b")
TEXT = string.printable[:95] + "\n" + 6 * (ROOT / "README.md").read_text(encoding="utf-8")
STEPS = 20  # a training command with more runs one step


class Parsed(BaseException):
    """Raised where a command has parsed its flags, in place of its work."""


def parts(page):
    """(line, kind, text) of everything to check, in order; kind is setup, python, run, parse or mention."""
    for found in PARTS.finditer(page):
        line = page.count("\n", 0, found.start()) + 1
        if found["setup"] is not None:
            yield line, "setup", textwrap.dedent(found["setup"]).strip()
        elif found["language"] == "python":
            yield line + 1, "python", found["block"]
        elif found["span"] is not None:
            if OURS.match(found["span"]):
                yield line, "mention", " ".join(found["span"].split())
        else:
            block, first = (found["block"], line + 1) if found["indented"] is None else (found["indented"], line)
            yield from commands(block, first, found["language"] in ("", None))


def commands(block, first, may_run):
    """The commands of a block: all of its lines if the first is one, else those that name a program of ours."""
    lines = []
    for joined in block.replace("\\\n", "\0").split("\n"):
        line = joined.replace("\0", " ").strip().removeprefix("$ ")
        if line and not line.startswith("#"):
            lines.append((first, line))
        first += 1 + joined.count("\0")
    all_run = may_run and lines and COMMAND.match(lines[0][1] + " ")
    for number, line in lines:
        if all_run or OURS.match(line):
            yield number, "run" if all_run else "parse", line


def problems(page, name, monkeypatch):
    """What is wrong with a page, a line each. The working directory is where its commands run."""
    makers = (make_text, make_prompts, make_run, make_model, make_wheel)
    setup = {"TEXT": TEXT, **{maker.__name__: maker for maker in makers}}
    namespace, found = setup, []
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # interactive commands find its end
    for line, kind, text in parts(page):
        printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                if kind == "setup":
                    exec(text, setup)
                elif kind == "python":
                    namespace = dict(setup) if re.search(r"^(import|from) ", text, re.MULTILINE) else namespace
                    run_python("\n" * (line - 1) + text, name, namespace)
                else:
                    check_command(text, kind, monkeypatch)
        except (Exception, SystemExit) as error:
            said = str(error).partition("\nassert")[0]  # without what pytest adds
            if isinstance(error, SystemExit):
                said = printed.buffer.getvalue().decode()
            if kind != "mention" or "expected one argument" not in said:
                what = text.splitlines()[0] if kind in ("python", "setup") else text.partition("  #")[0].strip()
                found.append(f"{name}:{line}: {what}: {type(error).__name__}: {said.strip().splitlines()[-1]}")
    return found


def run_python(code, name, namespace):
    """Run a block, and compare what it prints with the comments behind its prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), namespace)
    wanted = re.findall(r"^print\(.*\)\s+# (.*)$", code, re.MULTILINE)
    assert not wanted or printed.getvalue().splitlines() == wanted, f"it prints {printed.getvalue()!r}"


def check_command(line, kind, monkeypatch):
    """Parse a line of commands; if kind is run, also run `python -m`. What follows a `||` is only parsed."""
    words = shlex.split(line, comments=True)
    while words:
        end = next((i for i, word in enumerate(words) if word in ("||", "&&", "|")), len(words))
        command = [word for i, word in enumerate(words[:end]) if word != "..."]
        while "=" in command[0]:  # a variable of the environment
            command.pop(0)
        check_one(command, kind, monkeypatch)
        kind = "parse" if words[end : end + 1] == ["||"] else kind
        words = words[end + 1 :]


def check_one(command, kind, monkeypatch):
    program, *arguments = command
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), f"the Makefile has no target {' or '.join(arguments)}"
    elif program == "torchrun":
        flags = torch.distributed.run.get_args_parser().parse_args(arguments)
        module = ["-m"] * flags.module + [flags.training_script]
        parse([*module, *flags.training_script_args], monkeypatch)
    elif program == "python" and not (arguments[0] == "-m" and arguments[1] in THEIRS):
        options = parse(arguments, monkeypatch, complete=kind != "mention")
        if kind == "run" and options is not None and arguments[0] == "-m":
            module, flags = arguments[1], arguments[2:]
            flags += fewer_steps(options) if module == "train" else []
            assert main_of(module)(flags) == 0
    else:
        assert program in ("python", *THEIRS), f"{program} is no program that this test knows"


def fewer_steps(options):
    """Flags that make a training command short."""
    short = ["--sample-tokens", "0", "--eval-examples", "2"]
    if (options.max_steps or STEPS + 1) > STEPS:
        short += ["--max-steps", "1"]
    if options.out_dir is None:  # its name would be the time in seconds, and the next command may be as fast
        short += ["--out-dir", f"runs/{len(list(Path('runs').glob('*')))}"]
    return short


def parse(arguments, monkeypatch, complete=True):
    """The flags of `python ARGUMENTS`, by the command's own parser; None for --help. SystemExit for wrong flags.

    complete: whether required arguments must be there.
    """
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, *given):
        for action in parser._actions:
            action.required &= complete
        raise Parsed(parse_args(parser, *given))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            if arguments[0] == "-m":
                main_of(arguments[1])(arguments[2:])
            else:
                script = ROOT / arguments[0]
                assert script.exists(), f"there is no {arguments[0]}"
                patch.setattr(sys, "argv", [str(script), *arguments[1:]])
                patch.syspath_prepend(script.parent)
                runpy.run_path(str(script), run_name="__main__")
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as end:
            if end.code == 0:
                return None
            raise
    raise AssertionError("it parsed no flags")


def main_of(module):
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    return importlib.import_module(module + ".__main__" * bool(spec.submodule_search_locations)).main


def make_text(file):
    """A text with all of ASCII."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(TEXT, encoding="utf-8")


def make_prompts(file):
    """Three prompts, a line each."""
    lines = [json.dumps({"prompt": prompt}) for prompt in ("A", "To be", "")]
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_run(directory):
    """A run directory: a small model after one step."""
    make_text(f"{directory}.txt")
    sizes = "--context-size 32 --window 16 --n-layer 1 --d-model 32 --max-steps 1 --sample-tokens 0"
    assert main_of("train")([*sizes.split(), "--data", f"{directory}.txt", "--out-dir", directory]) == 0


def make_model(directory):
    """A model directory, from a run beside it."""
    make_run(f"{directory}-run")
    shutil.copytree(f"{directory}-run/best", directory)


def make_wheel():
    """The wheel of `make dist`, on the path."""
    assert dist.main(["--out", "dist"]) == 0
    (wheel,) = Path("dist").glob("*.whl")
    sys.path.insert(0, str(wheel.absolute()))


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """An empty working directory with README.md in it."""
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("train.__main__.SAMPLE_TOKENS", 20)
    monkeypatch.setattr("train.metrics.History.plot", lambda history: None)  # it takes longer than the training
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_every_example_of_a_page_runs_in_the_order_of_the_page(name, directory, monkeypatch):
    page = (ROOT / name).read_text(encoding="utf-8")
    if "from transformers import" in page:
        pytest.importorskip("transformers")
    found = problems(page, name, monkeypatch)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_commands_of_docstrings_parse(package, monkeypatch):
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines = [line for line in docstring.splitlines() if OURS.match(line.strip())]
        page = "```text\n" + "\n".join(lines) + "\n```\n"
        found += problems(page, str(path.relative_to(ROOT)), monkeypatch)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", PAGES)
def test_the_files_that_a_page_names_exist(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", page) if not (ROOT / name).parent.joinpath(link).exists()]
    assert not links + [file for file in FILE.findall(page) if not (ROOT / file).exists()]


MISTAKES = {
    "an unknown flag": ("```\npython -m train --fused-kernel\n```\n", "unrecognized arguments: --fused-kernel"),
    "an unknown flag of a command whose required flags are left out": ("`python -m model.sample --hot`", "--hot"),
    "an unknown flag of a benchmark": ("`python benchmarks/attn_speed.py --fast`", "unrecognized arguments: --fast"),
    "an unknown flag in an indented block": ("\n    python -m model.sample --checkpoint x --hot\n", "--hot"),
    "an unknown flag under torchrun": ("    torchrun --nproc-per-node 2 -m train --parallels ddp\n", "--parallels"),
    "an unknown flag after another command": ("    make train && python -m train --fast\n", "--fast"),
    "a wrong value": ("`python -m train --schedule steep`", "invalid choice: 'steep'"),
    "a missing text": ("```\npython -m train --data missing.txt --max-steps 1\n```\n", "missing.txt"),
    "a missing run": ("```\npython -m train.evaluate --checkpoint runs/missing\n```\n", "runs/missing"),
    "a missing script": ("`python benchmarks/missing.py`", "there is no benchmarks/missing.py"),
    "a missing module": ("`python -m train.missing`", "there is no module train.missing"),
    "an unknown target": ("    make trian\n", "no target trian"),
    "an unknown program": ("```\nmake train\nmack test\n```\n", "mack is no program"),
    "Python that fails": ("```python\nimport kernels\nkernels.attention_of_all()\n```\n", "attention_of_all"),
    "Python that prints another result": ("```python\nprint(1 + 1)  # 3\n```\n", "it prints '2\\n'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_a_page_is_found(mistake, directory, monkeypatch):
    page, said = MISTAKES[mistake]
    (found,) = problems(page, "page.md", monkeypatch)
    assert said in found


def test_a_page_makes_what_it_takes_for_given(directory, monkeypatch):
    page = """<!-- test: make_run("runs/mine"); make_model("models/imported"); make_text("my.txt") -->
```
python -m train --data my.txt --tokenizer models/imported/tokenizer.json
python -m train.evaluate --checkpoint runs/mine --val-data my.txt    # a comment
OMP_NUM_THREADS=1 python -m model.sample --checkpoint runs/mine \\
    --prompt "ROMEO:" --max-new-tokens 5 && make test
python -m train --resume --out-dir runs/mine || python -m train --out-dir runs/mine --data my.txt ...
```
"""
    assert [kind for _, kind, _ in parts(page)] == ["setup", "run", "run", "run", "run"]
    assert not problems(page, "page.md", monkeypatch)


def test_architectures_of_transformers_have_an_example():
    page = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
    assert sum(kind in ("python", "run") for _, kind, _ in parts(page)) > 12
    for name in ("Mistral", "Gemma2", "Gemma3", "GptOss", "Starcoder2", "Phi3", "Qwen2"):
        assert f"model = {name}ForCausalLM(config)" in page
