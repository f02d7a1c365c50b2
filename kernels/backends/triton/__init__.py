"""The Triton kernels. Importing this package does not load Triton: its functions are loaded at their first use."""

import importlib
import importlib.util
import os

import torch

LARGEST_HEAD = 256  # elements of the largest head that has tiles on every GPU
READS_LENGTHS = False
BACKWARD_READS_LSE = True

_HOME = {
    "attend": "attention_forward",
    "attend_backward": "attention_backward",
    "rotate": "rope",
    "norm_rotate": "qk_norm",
    "norm_rotate_backward": "qk_norm",
    "append": "decode",
    "attend_to_cache": "decode",
}


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, as the tests do on a machine without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(device, dtype=None, head_dim=None) -> str | None:
    """Why the kernels cannot run on `device` or take this dtype or head size, in a line; None if they can."""
    no_tiles = dtype == torch.float64 or (head_dim is not None and head_dim > LARGEST_HEAD)
    if (reason := why_not_on(device)) or not no_tiles or interpreted():
        return reason
    what = "float64" if dtype == torch.float64 else f"head size {head_dim}"
    return f"Triton has no tiles for {what} (dtypes to float32, head sizes to {LARGEST_HEAD})"


def why_not_on(device) -> str | None:
    """Why the kernels cannot run on `device`, whatever their inputs are; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreted():
        return None if device.type in ("cpu", "cuda") else f"Triton's interpreter does not reach {device.type} tensors"
    if device.type != "cuda":
        return f"Triton has no {device.type} backend (TRITON_INTERPRET=1 runs its interpreter, slowly)"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"Triton needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None
