"""Without a GPU, Triton kernels run in its interpreter, chosen when a kernel is decorated: set before any import."""

import os
import signal

import torch

# A shell's background jobs ignore Ctrl-C, and so would the programs that the tests send one to.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cuda" if torch.cuda.is_available() else "cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
