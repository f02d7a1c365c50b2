"""The blocks of `GPT`: attention and an MLP, each a residual branch with its norms. `GPTConfig` chooses their parts."""

import torch
import torch.nn.functional as F
from torch import nn

from kernels import append_to_cache, apply_rope, sliding_gqa_attention, sliding_gqa_decode
from kernels.backend import PLAIN_PYTORCH

from .gelu import gelu
from .sdpa import sdpa_attention


class Block(nn.Module):
    """x = x + attention(x), then x = x + mlp(x); the norms of both stand before it, after it or on both sides."""

    def __init__(self, config, layer, rope, masks, fused_kernels, backend):
        super().__init__()
        self.ln_1, self.post_1 = make_norms(config)
        self.attn = Attention(config, layer, rope, masks, fused_kernels, backend)
        self.ln_2, self.post_2 = make_norms(config)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, starts=None, mask=None):
        x = x + self.post_1(self.attn(self.ln_1(x), cache, starts, mask))
        return x + self.post_2(self.mlp(self.ln_2(x)))


class Attention(nn.Module):
    """Causal attention of one layer, over the tokens of the call and, with a cache, over earlier tokens."""

    def __init__(self, config, layer, rope, masks, fused_kernels, backend):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.window, self.prefix = config.layer_window(layer), config.layer_prefix(layer)
        self.prefix_distance = config.prefix_distance
        self.scores = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        self.dropout = config.dropout
        self.fused_kernels, self.backend = fused_kernels, backend
        self.rope, self.masks = rope, masks  # shared by the layers of its kind, and by all layers
        self.attend, self.parts = sliding_gqa_attention, 1  # GPT.split_sequences sets both
        # query, key and value projections of all heads, in one matrix
        self.sizes = [heads * self.head_dim for heads in (self.n_head, self.n_kv_head, self.n_kv_head)]
        self.qkv = nn.Linear(config.d_model, sum(self.sizes), bias=config.qkv_bias)
        self.proj = nn.Linear(self.sizes[0], config.d_model, bias=config.bias)
        self.qk_norm = config.qk_norm
        self.q_norm, self.k_norm = (
            make_norm(config, size if config.qk_norm == "all" else config.head_dim, "rms") if config.qk_norm else None
            for size in self.sizes[:2]
        )

    def forward(self, x, cache=None, starts=None, mask=None):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        rope = None if self.rope is None else self.rope(T * self.parts if cache is None else cache.columns, x.device)
        fused = cache is None and self.fused_kernels and not (self.training and self.dropout)
        # the kernel that normalises and rotates in one pass; elsewhere the keys' rotation is the attention's
        rotates = fused and self.qk_norm is True and rope is not None and self.parts == 1 and not self.prefix
        if self.qk_norm and not rotates:
            q, k = norm_heads(self.q_norm, q), norm_heads(self.k_norm, k)
        q = q.view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, Hq, T, D), a view
        k = k.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, Hkv, T, D)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, Hkv, T, D)
        if rotates:
            norm = gain(self.q_norm), gain(self.k_norm), self.q_norm.eps
            q, k = apply_rope(q, k, *rope, norm=norm, backend=self.backend)
            rope = None
        if cache is not None:
            out = self.attend_to_cache(q, k, v, rope, cache)
        elif fused:
            options = {"prefix": min(self.prefix, T), "prefix_distance": self.prefix_distance} if self.prefix else {}
            options |= self.scores
            out = self.attend(q, k, v, self.window, starts=starts, rope=rope, backend=self.backend, **options)
        else:
            dropout = self.dropout if self.training else 0.0
            prefix = self.prefix, self.prefix_distance
            out = sdpa_attention(q, k, v, self.window, rope, self.masks, dropout, mask, prefix, starts, **self.scores)
        out = out.transpose(1, 2).reshape(B, T, -1)  # a view again: the output has q's memory layout
        return F.dropout(self.proj(out), self.dropout, self.training)

    def attend_to_cache(self, q, k, v, rope, cache):
        """Write the new keys and values into this layer's ring, then attend to it: (B, Hq, T, D)."""
        k_cache, v_cache = cache.k[self.layer], cache.v[self.layer]
        backend = self.backend if self.fused_kernels else PLAIN_PYTORCH
        options = {"prefix": self.prefix, "rope": rope, "backend": backend, **cache.scales(self.layer)}
        append_to_cache(k, v, k_cache, v_cache, cache.lengths, **options)
        options |= {"prefix_distance": self.prefix_distance, **self.scores}
        return sliding_gqa_decode(q, k_cache, v_cache, cache.lengths, self.window, **options)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.act = ACTIVATIONS[config.mlp]
        rows = 2 * config.mlp_width if config.mlp in GATED else config.mlp_width
        self.fc = nn.Linear(config.d_model, rows, bias=config.bias)
        self.proj = nn.Linear(config.mlp_width, config.d_model, bias=config.bias)

    def forward(self, x):
        x = self.act(self.fc(x))
        return F.dropout(self.proj(x), self.dropout, self.training)


def relu2(x):
    """relu(x)^2."""
    return F.relu(x).square()


def swiglu(x):
    """silu(gate) * up of x = (gate, up), one after the other in the last dimension: half as wide as x."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(x):
    """`swiglu` with the tanh formula of GELU in place of silu."""
    gate, up = x.chunk(2, dim=-1)
    return gelu(gate) * up


ACTIVATIONS = {"gelu": gelu, "relu2": relu2, "swiglu": swiglu, "geglu": geglu}  # by GPTConfig.mlp
GATED = ("swiglu", "geglu")


class RMS1Norm(nn.RMSNorm):
    """RMSNorm with a gain of 1 + weight, in fp32 inside: Gemma's."""

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, gain(self).to(wide), self.eps).to(x.dtype)


def make_norm(config, width=None, kind=None):
    """A norm over `width` elements (None: those of the residual stream) of the config's kind.

    kind "rms": an RMSNorm also where the config has LayerNorms.
    """
    width, kind = config.d_model if width is None else width, config.norm if config.norm != "layer" else kind
    if kind is None:
        return nn.LayerNorm(width, eps=config.norm_epsilon, bias=config.bias)
    return (RMS1Norm if kind == "rms1" else nn.RMSNorm)(width, eps=config.norm_epsilon)


def make_norms(config):
    """The norms before and after a sub-layer; where there is none, nn.Identity."""
    before, after = config.norm_position != "after", config.norm_position != "before"
    return [make_norm(config) if wanted else nn.Identity() for wanted in (before, after)]


def gain(norm):
    """What an RMSNorm multiplies by."""
    return 1 + norm.weight if isinstance(norm, RMS1Norm) else norm.weight


def norm_heads(norm, x):
    """x (B, T, H * D) with every `norm.normalized_shape` of its last elements normalised, in x's dtype."""
    heads = x.unflatten(-1, (-1, *norm.normalized_shape)).to(norm.weight.dtype)  # autocast's x has another dtype
    return norm(heads).flatten(-2).to(x.dtype)
