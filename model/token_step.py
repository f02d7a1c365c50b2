"""One token a row on a CPU: the arithmetic of `GPT.forward`, its torch calls in a row.

A token of a small model is a fraction of a millisecond of arithmetic. Modules, checks and a call of an operator for
each of its parts cost several times that, so the sampler steps through this instead. It is what a CUDA graph is on a
GPU: the same step, with what is known beforehand left out.

    step = TokenStep(model, cache)        # where why_not(model, cache) is None
    logits = step(tokens)                 # (B,) -> (B, V): as model(tokens[:, None], cache=cache)[0][:, -1]
"""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import embedding, gelu

from kernels import resolve_backend
from kernels.backends.banded.token_step import CachedAttention, StepPositions

from . import gpt

KNOWN = {gpt.GPT, gpt.Block, gpt.Attention, gpt.MLP, nn.Linear, nn.LayerNorm, nn.Embedding, nn.ModuleList}


def why_not(model, cache):
    """Why a `TokenStep` would not do what the model does, in a few words; None if it would."""
    device = model.wte.weight.device
    if device.type != "cpu":
        return "the model is not on a CPU"
    if not model.fused_kernels or resolve_backend(model.blocks[0].attn.backend, device)[0] != "banded":
        return "another backend was asked for"
    wide = all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters())
    if not wide or torch.is_autocast_enabled("cpu"):
        return "in 16 bits it would round differently"
    if reason := what_else(model):
        return reason
    if cache.max_new_tokens_per_call > 1:
        return "the cache is one for several tokens a call"
    if cache.lengths.numel() == 0 or cache.lengths.amin() < 0:
        return "a row has no token yet"
    return None


def what_else(model):
    """What a forward does beside what its class and its weights say, such as a hook, in a few words; None if nothing.

    Who writes a step down once, here or as a CUDA graph, would leave it out.
    """
    for name, module in model.named_modules():
        if type(module) not in KNOWN:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has a hook"
    return None


class TokenStep:
    """Steps of a model with the weights that it has now; changes in place are seen, as an optimizer makes them.

    compile: torch.compile the arithmetic, a minute's wait at the first tokens.
    """

    def __init__(self, model, cache, compile=False):
        self.model, self.config, self.cache = model, model.config, cache
        self.forward = torch.compile(self._forward) if compile else self._forward
        rope = model.blocks[0].attn.rope
        self.angles = None if rope is None else partial(rope.at, device=cache.lengths.device)
        self.embedding = model.wte.weight.detach()
        self.positions = model.wpe.weight.detach() if self.config.positions == "learned" else None
        self.head = self.embedding.t() if self.config.tie_weights else model.lm_head.weight.detach().t()
        self.norm = _norm(model.ln_f)
        rotated = 0 if rope is None else self.config.rotated
        self.layers = [
            (
                _norm(block.ln_1),
                _linear(block.attn.qkv),
                CachedAttention(k, v, self.config.n_head, rotated, cache.lengths),
                _linear(block.attn.proj),
                _norm(block.ln_2),
                _linear(block.mlp.fc),
                _linear(block.mlp.proj),
            )
            for block, k, v in zip(model.blocks, cache.k, cache.v, strict=True)
        ]

    @torch.inference_mode()
    def __call__(self, tokens):
        """The logits (B, V) after one more token of each row, tokens (B,)."""
        self.cache.advance(1, self.model.config)
        return self.forward(tokens, StepPositions(self.cache.lengths, self.config.head_dim, self.angles))

    def _forward(self, tokens, place):
        addmm, norm = torch.addmm, torch.layer_norm
        x = embedding(tokens, self.embedding)  # (B, C)
        if self.positions is not None:
            x = x + self.positions[place.position]
        for norm_1, (qkv, qkv_bias), ring, (proj, proj_bias), norm_2, (fc, fc_bias), (out, out_bias) in self.layers:
            x = x + addmm(proj_bias, ring(addmm(qkv_bias, norm(x, *norm_1), qkv), place), proj)
            x = x + addmm(out_bias, gelu(addmm(fc_bias, norm(x, *norm_2), fc), approximate="tanh"), out)
        return torch.mm(norm(x, *self.norm), self.head)


def _linear(module):
    return module.weight.detach().t(), module.bias.detach()


def _norm(module):
    return module.normalized_shape, module.weight.detach(), module.bias.detach(), module.eps
