"""What every command shares: flags, output, devices, and the arithmetic that a device is fast at."""

import argparse
import contextlib
import os
import re
import signal
import sys
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from kernels import cpu


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts `_` for `-` in a flag's name, no abbreviations, and prints errors in one line."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **settings):
        super().__init__(formatter_class=formatter_class, allow_abbrev=False, **settings)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_hyphens(argument) for argument in args], namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the flags)\n")


class Output:
    """A text stream that ends no run: what cannot be written (a closed pipe, a full disk, no terminal) is dropped.

    ends: such an error ends the command with status 1 instead. A stream of None, which was closed, drops everything.
    """

    def __init__(self, stream, name: str, ends: bool = False):
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self._name, self._ends, self.error = name, ends, None

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        self.flush()
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            self.error = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # Python writes more of it at exit
            if not isinstance(error, BrokenPipeError):
                print(f"{self._name} cannot be written: {error.strerror}", file=sys.stderr)
            if self._ends:
                sys.exit(1)


@contextlib.contextmanager
def command_output(program: str, ends: bool = False):
    """Inside the block stdout and stderr are `Output`s, a warning is one line, shown once, and so is the end by Ctrl-C.

    ends: the command ends if its stdout cannot be written. Yields stdout.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    for number in range(3):  # a file that is opened next would get the number of a closed stream, and its messages
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by a package's __init__, while torch was loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stderr = Output(sys.stderr, f"{program}: standard error")
    sys.stdout = Output(sys.stdout, f"{program}: standard output", ends)
    shown = set()

    def show(message, *where, **more):
        if str(message) not in shown:
            shown.add(str(message))
            tqdm.write(f"{program}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield sys.stdout
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/sliding-gqa, or ~/.cache/sliding-gqa."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sliding-gqa"


def resolve_device(name: str) -> torch.device:
    """The device of this name; "auto" is a CUDA device if there is one. ValueError for a device that is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("no CUDA device is available: use --device cpu")
        torch.empty(1, device=device).item()  # "meta" has no numbers
    except (NotImplementedError, ImportError):
        raise ValueError(f"device {name!r} cannot be used: this PyTorch does not run on it") from None
    except (ValueError, RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this device
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def fast_precision(device: torch.device) -> tuple[str, str]:
    """("bf16" or "fp32", why): bf16 where the device has units for products of bf16 matrices."""
    if device.type == "cuda":
        ampere = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bf16", "this GPU has units for it") if ampere else ("fp32", "this GPU is too old for bf16")
    if device.type == "cpu" and cpu.has_bf16_products():
        return "bf16", "this CPU has units for it"
    return "fp32", f"this {device.type} has no units for bf16"


def use_fast_products(device: torch.device) -> None:
    """Compute fp32 products of this process with the faster library, where that loses nothing (`kernels.cpu`)."""
    if device.type == "cpu":
        cpu.use_onednn()


def _with_hyphens(argument: str) -> str:
    """`--context_size=25` as `--context-size=25`; other arguments unchanged."""
    name = re.match(r"--[A-Za-z0-9_-]+", argument)
    return name[0].replace("_", "-") + argument[name.end() :] if name else argument
