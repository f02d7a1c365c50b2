"""A model written against flash-attention's two functions, as nanochat is, trains and writes the same on ours.

The module is handed in, so that the model runs on SDPA through the same two names.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import flash_attn
from kernels.band import visible_mask

V, C, HEADS, KV_HEADS, LAYERS, WINDOWS = 23, 32, 4, 2, 3, ((4, 0), (-1, 0), (4, 0))
D = C // HEADS


def sdpa(q, k, v, window_size):
    T, S = q.shape[1], k.shape[1]
    window = None if window_size[0] < 0 else window_size[0] + 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, visible_mask(T, S, window), enable_gqa=True)
    return out.transpose(1, 2)


def sdpa_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, causal, window_size):
    first = int(cache_seqlens[0])
    end = first + q.shape[1]
    k_cache[:, first:end], v_cache[:, first:end] = k, v
    return sdpa(q, k_cache[:, :end], v_cache[:, :end], window_size)


SDPA = SimpleNamespace(
    flash_attn_func=lambda q, k, v, causal, window_size: sdpa(q, k, v, window_size),
    flash_attn_with_kvcache=sdpa_with_kvcache,
)


class Cache:
    """Linear caches for 40 tokens, longer than the windows."""

    def __init__(self, rows):
        self.k, self.v = torch.zeros(2, LAYERS, rows, 40, KV_HEADS, D).unbind(0)
        self.seqlens = torch.zeros(rows, dtype=torch.int32)


class Layer(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index, self.window_size = index, WINDOWS[index]
        self.qkv = nn.Linear(C, (HEADS + 2 * KV_HEADS) * D, bias=False)
        self.proj, self.fc, self.out = nn.Linear(C, C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x, attention, cache):
        B, T, _ = x.shape
        q, k, v = self.qkv(F.rms_norm(x, (C,))).view(B, T, -1, D).split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        if cache is None:
            y = attention.flash_attn_func(q, k, v, causal=True, window_size=self.window_size)
        else:
            y = attention.flash_attn_with_kvcache(
                q, cache.k[self.index], cache.v[self.index], k=k, v=v, cache_seqlens=cache.seqlens, causal=True,
                window_size=self.window_size,
            )  # fmt: skip
            if self.index == LAYERS - 1:
                cache.seqlens += T
        x = x + self.proj(y.contiguous().view(B, T, C))
        return x + self.out(F.relu(self.fc(F.rms_norm(x, (C,)))).square())


class Model(nn.Module):
    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(0)
        self.attention = attention
        self.embedding, self.head = nn.Embedding(V, C), nn.Linear(C, V)
        self.places = nn.Parameter(torch.randn(40, C))
        self.layers = nn.ModuleList(Layer(index) for index in range(LAYERS))

    def forward(self, tokens, cache=None):
        first = 0 if cache is None else int(cache.seqlens[0])
        x = self.embedding(tokens) + self.places[first : first + tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, self.attention, cache)
        return self.head(x)


def train(model, steps=20):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        tokens = torch.randint(V, (4, 25), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def write(model, prompt, count):
    cache = Cache(len(prompt))
    new, text = prompt, [prompt]
    for _ in range(count):
        new = model(new, cache)[:, -1].argmax(-1, keepdim=True)
        text.append(new)
    return torch.cat(text, 1)


@pytest.fixture(scope="module")
def models():
    ours, theirs = Model(flash_attn), Model(SDPA)
    return ours, theirs, train(ours), train(theirs)


def test_it_trains_as_on_sdpa(models):
    torch.testing.assert_close(models[2], models[3], atol=1e-4, rtol=1e-4)
    assert models[2][-1] < models[2][0]


def test_it_writes_as_on_sdpa(models):
    ours, theirs = models[:2]
    prompt = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(1))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(write(ours, prompt, 30), write(theirs, prompt, 30))
    with torch.no_grad():  # and as without a cache
        text = write(ours, prompt, 30)
        assert torch.equal(ours(text[:, :-1])[:, 6:].argmax(-1), text[:, 7:])
