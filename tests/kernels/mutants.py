"""Copies of the Triton kernels with a deliberate fault in them, for tests that show that other tests can fail."""

import importlib
import itertools
import shutil
import sys
from pathlib import Path

from kernels.backends import triton

_numbers = itertools.count()


def copy_of_kernels(directory, modules, fault=None):
    """The named modules of a copy of the kernels, with one fault = (file, text, replacement) in it if given.

    The text has to occur exactly once in the file, so that a kernel that changes takes its faults along.
    """
    name = f"mutant_{next(_numbers)}"
    package = directory / name
    shutil.copytree(Path(triton.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    if fault is not None:
        source, text, replacement = fault
        code = (package / source).read_text()
        assert code.count(text) == 1, f"{source} has {text!r} {code.count(text)} times"
        (package / source).write_text(code.replace(text, replacement))
    sys.path.insert(0, str(directory))
    try:
        return [importlib.import_module(f"{name}.{module}") for module in modules]
    finally:
        sys.path.remove(str(directory))
