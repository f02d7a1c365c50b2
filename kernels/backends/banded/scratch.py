"""Buffers that outlive a call."""

import math
import threading

import torch


class _Scratch(threading.local):
    """A thread's buffers, shared by all steps of all its calls: the system would map and clear new ones every time."""

    KEPT_BYTES = 2**22  # a thread of PyTorch: larger buffers, which only long windows need, are freed after the call

    def __init__(self):
        self.buffers = {}

    def __call__(self, name, shape, dtype, device):
        """An uninitialized tensor; the next call with this name, dtype and device may share its memory."""
        size = math.prod(shape)
        key = name, dtype, device
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside of it
                buffer = torch.empty(size, dtype=dtype, device=device)
            if device.type == "cpu" and buffer.nbytes <= self.KEPT_BYTES * torch.get_num_threads():
                self.buffers[key] = buffer
        return buffer[:size].view(shape)


scratch = _Scratch()
