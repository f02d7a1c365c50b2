"""Rules of the house: what may import what, and living beside Hugging Face's package of the name `kernels`."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE = {  # package -> what it must not import
    "kernels": {"model", "train", "benchmarks", "tests", "torch.distributed"},
    "model": {"train", "benchmarks", "tests", "torch.distributed"},
    "train": {"kernels", "benchmarks", "tests"},  # kernels through model
}


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", ABOVE)
def test_packages_import_only_what_lies_below_them(package):
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imported_names(path)
        if any(within(name, above) for above in ABOVE[package])
        and (path.name, name) != ("context_parallel.py", "torch.distributed")
    ]
    assert not found


def test_no_kernel_imports_the_reference():
    """The specification must stay independent: only the functions that choose a backend may call it."""
    for path in (ROOT / "kernels").rglob("*.py"):
        if path.name not in ("rope.py", "reference.py") or path.parent.name != "kernels":
            assert "reference import" not in path.read_text() and "import reference" not in path.read_text(), path


def test_a_backend_imports_no_other_and_nothing_that_chooses_among_them():
    """Of `kernels` it may use what is in `shared`. Only compiled/ imports its tools."""
    shared = "band", "cpu", "int8", "namesake", "namespace"
    for path in (ROOT / "kernels").rglob("*.py"):
        room = path.relative_to(ROOT / "kernels").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = (*room[: len(room) - node.level], *(node.module or "").split("."))
                assert module[0] != "compiled" or room[0] == "compiled", path
                if room[0] == "backends":
                    allowed = module[0] in shared or module == ("backends", "triton")
                    assert allowed or module[:2] == room[:2], path


def run_python(code, path=(), cwd=ROOT):
    # `python -c` puts the working directory first on the path, as `python -m` does
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_kernels_is_cheap():
    assert run_python("import sys, kernels; print('torch' in sys.modules, 'triton' in sys.modules)") == "False False"


def test_the_first_function_costs_little_more_than_torch():
    """torch._dynamo takes 0.9 s: the first torch.compile loads it."""
    functions = "append_to_cache, apply_rope, rope_tables, sliding_gqa_attention, sliding_gqa_decode"
    assert run_python(f"import sys; from kernels import {functions}; print('torch._dynamo' in sys.modules)") == "False"


@pytest.mark.parametrize("imports", [("kernels", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "kernels")])
def test_flops_are_counted_from_the_first_call_whatever_is_imported_first(imports):
    names = {"kernels": "sliding_gqa_attention", "torch.utils.flop_counter": "FlopCounterMode"}
    code = f"""
import importlib.util
import torch
from {imports[0]} import {names[imports[0]]}
importlib.util.find_spec("torch.utils.flop_counter")  # as some ask whether it is there
from {imports[1]} import {names[imports[1]]}
q = torch.randn(1, 2, 8, 16, requires_grad=True)
with FlopCounterMode(display=False) as counter:
    sliding_gqa_attention(q, q, q, 3)
print(counter.get_total_flops())
"""
    assert run_python(code) == str(4 * 16 * 2 * 21)


def test_kernels_has_a_version_that_transformers_accepts():
    from packaging.version import Version

    assert Version(run_python("import kernels; print(kernels.__version__)")) < Version("0.9")


@pytest.fixture
def other_kernels(tmp_path):
    """A package as Hugging Face's: its own `__init__`, a submodule that we lack, and one of a name that we have."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from kernels.layer import Device\nfrom .layer import use_kernel\n__version__ = '0.10.3'\n"
    )
    (package / "layer.py").write_text("class Device: pass\ndef use_kernel(): return 'theirs'\n")
    (package / "backends.py").write_text("from kernels.layer import Device\ndef _backend(): return Device\n")
    return package.parent


def test_ours_wins_and_the_other_package_still_serves_its_names(other_kernels):
    code = """
import kernels
from kernels import use_kernel, rope_tables
from kernels.layer import Device
assert kernels.Device is Device and use_kernel() == 'theirs'
from kernels.backends import _backend, reference
assert _backend() is Device and reference.attend
try:
    kernels.no_such_name
    raise SystemExit('no AttributeError')
except AttributeError as error:
    assert "no attribute 'no_such_name'" in str(error)
print(kernels.__version__, rope_tables(2, 4)[0].shape[0])
"""
    assert run_python(code, path=[other_kernels]) == "0.1.0 2"


def test_another_package_that_cannot_be_imported_does_not_break_ours(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('broken')")
    code = """
import torch
from kernels import sliding_gqa_attention
q = torch.randn(1, 2, 3, 8)
print(sliding_gqa_attention(q, q, q, 2).shape[2], sliding_gqa_attention(q, q, q, 2, backend="reference").shape[2])
"""
    assert run_python(code, path=[tmp_path]) == "3 3"


def test_unknown_names_are_attribute_errors_with_nothing_else_installed():
    assert run_python("import kernels; print(hasattr(kernels, 'use_kernel_forward_from_hub'))") == "False"
