"""Whether anyone listens to operators: compilers, fake tensors, torch.func, modes that count or trace.

Calling a PyTorch operator of our own costs up to 25 us on a CPU beside what its implementation does. That is the price
of PyTorch seeing one operator where there are many; where nobody looks, the implementation may be called by its name.
"""

import torch
from torch.nn import Parameter

try:
    from torch._C import (
        _dispatch_tls_is_dispatch_key_included,
        _get_tracing_state,
        _is_torch_function_mode_enabled,
        _len_torch_dispatch_stack,
    )
    from torch._C._functorch import peek_interpreter_stack
    from torch.autograd import forward_ad

    forward_ad._current_level  # noqa: B018
    CAN_TELL = True
except (ImportError, AttributeError):  # insides of PyTorch, which may change: then operators are always called
    CAN_TELL = False

_PLAIN = {torch.Tensor, Parameter, type(None)}


def nobody_listens(*tensors):
    """Whether an operator without derivatives would do nothing on these tensors but run its implementation.

    They may be None. Whatever is not plain eager execution says no: subclasses (fake tensors, DTensor), torch.compile,
    torch.export, torch.func, torch.jit.trace, modes (FLOP counters, make_fx, `set_default_device`), and forward-mode
    derivatives. A profiler does not count: it is to see what runs without it.
    """
    return (
        not torch.compiler.is_compiling()  # first: torch.compile does not look at what stands behind it
        and CAN_TELL
        and all(type(x) in _PLAIN for x in tensors)
        and not _len_torch_dispatch_stack()
        and not _is_torch_function_mode_enabled()
        and peek_interpreter_stack() is None
        and _get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def gradients_are_batched():
    """Whether a backward pass is that of `torch.autograd.grad(..., is_grads_batched=True)`, a vmap unlike others."""
    return CAN_TELL and _dispatch_tls_is_dispatch_key_included("VmapMode")
