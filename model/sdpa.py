"""The attention of gpt.py in plain PyTorch: eager rotation, scaled_dot_product_attention (SDPA) with a mask.

`--no-fused-kernels` runs it: the baseline for the kernels, and the path for attention dropout, which the kernels do
not have. It computes all T x T scores, whatever the window.
"""

import torch
import torch.nn.functional as F
from einops import repeat

from kernels.band import visible_mask


def sdpa_attention(q, k, v, window, rope=None, masks=None, dropout=0.0, mask=None):
    """Causal sliding-window attention of q (B, Hq, T, D) over k, v (B, Hkv, T, D): (B, Hq, T, D) in q's layout.

    rope    (cos, sin), each at least T long: rotates q and k first.
    masks   the model's `BandMasks`, needed for a window shorter than T.
    mask    (B, 1, T, T) bool, what each query sees: in place of causal attention through the window.
    """
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    if rope is not None:
        cos, sin = (table[:T] for table in rope)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if mask is None and window is not None and window < T:
        mask = masks(T, window, q.device)
    if group > 1 and mask is not None and q.is_cuda:
        # no fast kernel of SDPA takes grouped heads and a mask: copying k and v costs less than storing all scores
        k, v = (repeat(x, "b h t d -> b (h group) t d", group=group) for x in (k, v))
        group = 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=group > 1
    )


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

    def __call__(self, length, window, device):
        if self.key != (length, window, device):
            self.key, self.mask = (length, window, device), visible_mask(length, length, window, device)
        return self.mask
