"""The attention of gpt.py in plain PyTorch: rotation op by op, scaled_dot_product_attention with a mask.

It is what `--no-fused-kernels` runs: the baseline that the kernels are compared with, and the path for attention
dropout, which they do not have. It computes all T x T scores, whatever the window.
"""

import torch
import torch.nn.functional as F


def plain_attention(q, k, v, window, rope=None, masks=None, dropout=0.0):
    """Causal sliding-window attention of q (B, Hq, T, D) over k, v (B, Hkv, T, D): (B, Hq, T, D) in q's layout.

    rope = (cos, sin), at least T long, rotates q and k first. masks is the model's `BandMasks`.
    """
    T = q.shape[2]
    if rope is not None:
        cos, sin = (table[:T] for table in rope)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    grouped = k.shape[1] < q.shape[1]
    mask = None if window is None or window >= T else masks(T, window, q.device)
    if grouped and mask is not None and q.is_cuda:
        # no fast kernel of SDPA takes grouped heads with a mask: copies of k and v cost less than storing all scores
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=grouped
    )


def rotate(x, cos, sin):
    """x (B, H, T, D) with the pairs (x[i], x[i + R/2]) turned by the tables' (T, R / 2) angles; fp32 inside."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class BandMasks:
    """The mask of the window that was asked for last, kept so that a forward makes one and not one a layer.

    T=4, window=2:      1 . . .        row: query, column: key
                        1 1 . .
                        . 1 1 .
                        . . 1 1
    """

    def __init__(self):
        self.key, self.mask = None, None

    def __call__(self, length, window, device):
        """(length, length) of bools, True where the query of the row sees the key of the column."""
        if self.key != (length, window, device):
            ones = torch.ones(length, length, dtype=torch.bool, device=device)
            self.mask = ones.tril() & ones.triu(1 - window)
            self.key = (length, window, device)
        return self.mask
