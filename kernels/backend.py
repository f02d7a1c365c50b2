"""Which implementation runs: "triton" on a GPU, "banded" (PyTorch, linear cost) elsewhere, "reference" on request."""

import importlib.util
import os

import torch

from . import tuning

BACKENDS = ("auto", "triton", "banded", "reference")

# elements of the largest head that attention has tiles for on every GPU
LARGEST_HEAD = min(max(max(sizes) for sizes in by_family.values()) for (name, _), by_family in tuning.CONFIGS.items()
                   if name != "rotary")  # fmt: skip


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton kernels are run by its interpreter, as the tests do on a machine without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(device=None) -> str | None:
    """Why Triton kernels cannot run on `device` (default: the current CUDA device), in a line; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    device = torch.device("cuda" if device is None else device)
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


def check_backend(backend: str) -> None:
    """Raises ValueError, in one line, for an unknown name. Whether the backend can run is resolve_backend's answer."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")


def resolve_backend(backend: str, device, dtype=None, head_dim=None) -> tuple[str, str]:
    """The implementation that `backend` means on `device`, and why: ("banded", "Triton has no cpu backend ...").

    "auto" takes Triton where it compiles for the device, else banded; it never picks Triton's interpreter. A named
    backend is taken as it is. dtype and head_dim are those of attention's q, if the answer is to count them: on a GPU,
    Triton has no tiles for fp64 and for heads of more than LARGEST_HEAD elements.
    Raises ValueError for an unknown name, and for "triton" where it cannot run.
    """
    name, why = _resolve_on_device(backend, device)
    # apart from the look at the device, whose answer torch.compile takes for a constant: head_dim may be symbolic there
    no_tiles = dtype == torch.float64 or (head_dim is not None and head_dim > LARGEST_HEAD)
    if name == "triton" and no_tiles and not interpreted():
        what = "float64" if dtype == torch.float64 else f"head size {head_dim}"
        reason = f"Triton has no tiles for {what} (dtypes to float32, head sizes to {LARGEST_HEAD})"
        if backend == "auto":
            return "banded", reason
        raise ValueError(f"backend 'triton' cannot run on {device}: {reason}; use backend='auto' or 'banded'")
    return name, why


@torch.compiler.assume_constant_result
def _resolve_on_device(backend, device):
    check_backend(backend)
    device = torch.device(device)
    if backend == "auto":
        if device.type != "cuda":
            return "banded", f"Triton has no {device.type} backend"
        reason = "TRITON_INTERPRET=1 is set" if interpreted() else why_not_triton(device)
        return ("triton", "it runs on this GPU") if reason is None else ("banded", reason)
    if backend == "triton":
        reason = why_not_triton(device)
        if reason is not None:
            raise ValueError(f"backend 'triton' cannot run on {device}: {reason}; use backend='auto' or 'banded'")
    return backend, "named by the caller"


def autocast_dtype(device_type: str):
    """The dtype of an autocast that is under way on devices of this type; None without one, as on "meta"."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
