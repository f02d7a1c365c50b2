"""What every command shares: flags, devices, and the arithmetic that a device is fast at."""

import argparse
import re
import sys

import torch

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
