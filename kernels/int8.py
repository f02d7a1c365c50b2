"""Keys and values of a cache as int8, with one scale for each token and head.

    scale = max_i |x_i| / 127        code_i = round(x_i / scale), from -127 to 127        x_i is about code_i * scale

The scale is in fp32, and 0 for a token of zeros. The largest error of an element is half a scale. A token with NaN has
the scale NaN, so that it reads as NaN. Symmetric, so that a score is one product more, q . codes * scale, and a value
one more weight: attention needs no copy of the cache in floats.
"""

import torch

LARGEST = 127


def quantized(x):
    """(codes, scales) of x (..., D): int8 (..., D) and fp32 (...)."""
    x = x.float()
    largest = x.abs().amax(-1)
    # below 2**-121 the quotient is infinite, and the codes of so small a token are 0
    inverse = torch.where(largest > LARGEST * torch.finfo(torch.float32).tiny, LARGEST / largest, 0.0)
    codes = (x * inverse[..., None]).round_().nan_to_num_(0.0)
    return codes.to(torch.int8), largest / LARGEST


def dequantized(codes, scales, dtype):
    """About what `quantized` was given, in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scales[..., None]).to(dtype)
