"""Which implementation runs: "triton" on a GPU, "banded" (PyTorch, linear cost) elsewhere, "reference" by name."""

import contextlib
import functools
import importlib

import torch

from .backends import triton

MODULES = {"triton": "triton", "banded": "banded", "reference": "reference"}  # name: module in kernels/backends
BACKENDS = ("auto", *MODULES)
PLAIN_PYTORCH = "banded"  # runs on every device and needs nothing else


@functools.cache
def backend_module(name: str):
    """The module of a backend; kernels/backends/__init__.py says what it holds."""
    return importlib.import_module(f"{__package__}.backends.{MODULES[name]}")


def _constant(function):
    """torch.compile calls the function once and takes its answer for a constant.

    torch.compiler.assume_constant_result sets the same mark, but imports torch._dynamo for it, which takes 0.9 s.
    """
    function._dynamo_marked_constant = True
    return function


@_constant
def backward_reads_lse(name: str) -> bool:
    """Whether the backward pass of a backend reads the lse of its forward pass."""
    return backend_module(name).BACKWARD_READS_LSE


def why_not_triton(device=None) -> str | None:
    """Why Triton kernels cannot run on `device` (default: the current CUDA device), in a line; None if they can."""
    return triton.why_not(torch.device("cuda" if device is None else device))


def check_backend(backend: str) -> None:
    """Raise ValueError, in one line, for an unknown name. Whether the backend can run is resolve_backend's answer."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")


def resolve_backend(backend: str, device, dtype=None, head_dim=None) -> tuple[str, str]:
    """The implementation that `backend` means on `device`, and why: ("banded", "Triton has no cpu backend").

    "auto" takes Triton where it runs, else banded; it never picks Triton's interpreter. dtype and head_dim are those of
    attention's q, if they are to count: Triton has no tiles for fp64 and for heads of more than 256 elements.
    Raises ValueError for an unknown name, and for a named backend that cannot run there: it never falls back.
    """
    # torch.compile takes the first answer as a constant; head_dim may be a symbol, so it gets a small one
    large = head_dim is not None and head_dim > triton.LARGEST_HEAD
    return _resolve(backend, device, dtype, head_dim if large else None)


@_constant
def _resolve(backend, device, dtype, large_head):
    check_backend(backend)
    device = torch.device(device)
    if backend != "auto":
        reason = backend_module(backend).why_not(device, dtype, large_head)
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot run on {device}: {reason}; use backend='auto' or 'banded'")
        return backend, "named by the caller"
    if device.type != "cuda":
        return PLAIN_PYTORCH, f"Triton has no {device.type} backend"
    reason = "TRITON_INTERPRET=1 is set" if triton.interpreted() else triton.why_not(device, dtype, large_head)
    return ("triton", "it runs on this GPU") if reason is None else (PLAIN_PYTORCH, reason)


def autocast_dtype(device_type: str):
    """The dtype of an autocast that is under way on devices of this type; None without one, as on "meta"."""
    # torch.compile of PyTorch 2.11 cannot trace is_autocast_available
    if device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type):
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return None


def without_autocast(device_type: str):
    """A context without autocast; where none is under way, one that costs the host nothing."""
    under_way = autocast_dtype(device_type) is not None
    return torch.autocast(device_type, enabled=False) if under_way else contextlib.nullcontext()
