"""The CPU's step of one token as one compiled function: `python -m model.sample --compile`.

Most of a small model's token is the cost of calling operators. So `CPUStep`'s own functions are traced with tensors in
place of positions, weights and rings, and compiled into a library (PyTorch's AOTInductor), which one call runs. It
takes a C++ compiler and up to a minute once: the library stays in the cache directory. Weights are arguments, so the
step sees changes in place, and models of one shape share a library.
"""

import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import kernels

from .command import cache_directory
from .decoding import CPUStep


class CompiledStep:
    """`CPUStep` for one row whose layers all slide: `compiled_step` says where there is one."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        for x in (*cache.k, *cache.v):
            x[:, :, cache.columns :] = 0  # the step reads every slot, and no weight of 0 removes a NaN
        weights = [weight.detach() for weight in model.parameters()]
        self.fixed = [*weights, *cache.k, *cache.v]
        path = _library(model)
        if not path.exists():
            _compile(model, (torch.zeros(1, dtype=torch.long), cache.lengths, weights, cache.k, cache.v), path)
        # torch._inductor.aoti_load_package makes this loader after seconds of imports
        self.run = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).boxed_run

    @torch.inference_mode()
    def __call__(self, tokens):
        """The logits (1, V) after one more token, tokens (1,): model(tokens[:, None], cache=cache)[0][:, -1]."""
        self.cache.advance(1, self.model.config)
        return self.run([tokens, self.cache.lengths, *self.fixed])[0]


def why_not_compiled(model, cache):
    """Why there is no `CompiledStep` where there is a `CPUStep`, in a few words; None if there is one."""
    if len(cache.lengths) > 1 or cache.max_new_tokens_per_call > 1:
        return "it is for one token of one row"
    if cache.bounded or model.config.prefix:
        return "a ring grows with the text, or has a prefix"
    if cache.lengths.item() != cache.columns:
        return "the row is padded"
    return None


def compiled_step(model, cache):
    """A `CompiledStep`; a `CPUStep` where there is none or it cannot be compiled, with a warning that says why."""
    reason = why_not_compiled(model, cache)
    if reason is None:
        try:
            return CompiledStep(model, cache)
        except Exception as error:  # of the exporter, the compiler or the file system
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
    warnings.warn(f"the step is not compiled: {reason}", stacklevel=2)
    return CPUStep(model, cache)


class _Traced(nn.Module):
    """The step as a function of tensors alone, for torch.export: the model is not one of its modules."""

    def __init__(self, model):
        super().__init__()
        self.step = [_OfWeights(model)]
        self.names = [f"model.{name}" for name, _ in model.named_parameters()]

    def forward(self, tokens, lengths, weights, k, v):
        weights = dict(zip(self.names, weights, strict=True))
        return torch.func.functional_call(self.step[0], weights, (tokens, lengths, k, v))


class _OfWeights(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, lengths, k, v):
        step = CPUStep(self.model, SimpleNamespace(k=k, v=v, lengths=lengths, max_new_tokens_per_call=1))
        place = partial(step.kernels.TracedPositions, lengths.long() - 1, self.model.config.head_dim)
        return step._forward(tokens, {rope: place(angles) for rope, angles in step.angles.items()}, last=False)


def _library(model):
    """The file of the compiled step, named by what it depends on: the model's shape, these sources, this machine."""
    parts = json.dumps([asdict(model.config), str(model.wte.weight.dtype), torch.get_num_threads(), torch.__version__])
    # the compiler takes every instruction that this CPU has (-march=native): on another one the library may crash
    units = sorted(name for name, present in torch.cpu.get_capabilities().items() if present is True)
    digest = hashlib.sha256((parts + " ".join(units)).encode())
    for package in (Path(__file__).parent, Path(kernels.__file__).parent):
        for source in sorted(package.rglob("*.py")):
            digest.update(source.read_bytes())
    return cache_directory() / "steps" / f"{digest.hexdigest()[:32]}.pt2"


def _compile(model, arguments, path):
    for rope in {block.attn.rope for block in model.blocks}:
        rope.at(0, arguments[1].device)  # it keeps its frequencies, which must not be made while tracing
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent) as directory:
        warnings.simplefilter("ignore")  # what PyTorch says about its own parts
        exported = torch.export.export(_Traced(model), arguments)
        made = torch._inductor.aoti_compile_and_package(exported, package_path=f"{directory}/step.pt2")
        os.replace(made, path)
