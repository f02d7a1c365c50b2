"""The attention of gpt.py in plain PyTorch: eager rotation, scaled_dot_product_attention (SDPA) with a mask.

`--no-fused-kernels` runs it: the baseline for the kernels, and the path for attention dropout, which the kernels do
not have. It computes all T x T scores, whatever the window.
"""

import torch
import torch.nn.functional as F
from einops import repeat

from kernels.band import visible_mask
from kernels.prefix import as_if_near


def sdpa_attention(
    q, k, v, window, rope=None, masks=None, dropout=0.0, mask=None, prefix=(0, None), starts=None, scale=None,
    softcap=None,
):  # fmt: skip
    """Causal sliding-window attention of q (B, Hq, T, D) over k, v (B, Hkv, T, D): (B, Hq, T, D).

    rope    (cos, sin), each at least T long: rotates q and k first.
    masks   the model's `BandMasks`, needed for a window shorter than T.
    mask    (B, 1, T, T) bool, what each query sees: in place of causal attention through the window.
    prefix  (k, distance): the first k positions are seen by every later query besides its window; the distance is
            `prefix_distance` of the kernels.
    starts, scale, softcap    those of the kernels; the mask of starts is the caller's. SDPA has no softcap: with one,
            all scores are stored.
    """
    T, group, scale = q.shape[2], q.shape[1] // k.shape[1], q.shape[3] ** -0.5 if scale is None else scale
    prefix, distance = prefix
    far = None
    if prefix and distance is not None and T - 1 > distance:
        position = as_if_near(torch.arange(T, device=q.device), distance, starts)
        cos, sin = (table[position] for table in rope)
        far = rotate(q, cos, sin) if starts is None else rotate(q, cos[:, None], sin[:, None])
    if rope is not None:
        cos, sin = (table[:T] for table in rope)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if mask is None and window is not None and window < T:
        mask = masks(T, window, prefix, q.device)
    if far is not None:  # twice as wide, q meets each key in one of the halves: in the second those of a prefix
        first = torch.arange(T, device=q.device) - (0 if starts is None else starts[:, None]) < prefix
        q = torch.cat((q, far), dim=-1)
        k = torch.cat((k.masked_fill(first[..., None], 0), k.masked_fill(~first[..., None], 0)), dim=-1)
    if softcap is not None:
        mask = visible_mask(T, T, None, q.device) if mask is None else mask
        return _softcapped(q, k, v, mask, scale, softcap, dropout)
    if group > 1 and mask is not None and q.is_cuda:
        # no fast kernel of SDPA takes grouped heads and a mask: copying k and v costs less than storing all scores
        k, v = (repeat(x, "b h t d -> b (h group) t d", group=group) for x in (k, v))
        group = 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scale, enable_gqa=group > 1
    )


def _softcapped(q, k, v, mask, scale, softcap, dropout):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    scores = softcap * torch.tanh(scores * (scale / softcap))
    p = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return F.dropout(p, dropout).to(v.dtype) @ v


def rotate(x, cos, sin):
    """x (B, H, T, D) with the pairs (x[i], x[i + R/2]) rotated by the angles of cos, sin (T, R / 2); fp32 inside."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


class BandMasks:
    """Keeps the last `visible_mask`, so that a forward makes one and not one a layer."""

    def __init__(self):
        self.key, self.mask = None, None

    def __call__(self, length, window, prefix, device):
        if self.key != (length, window, prefix, device):
            self.key = length, window, prefix, device
            self.mask = visible_mask(length, length, window, device, prefix=prefix)
        return self.mask
