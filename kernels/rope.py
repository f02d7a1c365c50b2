"""Rotary position embedding (RoFormer, arXiv:2104.09864): the tables of angles and the rotation of q and k.

    (a, b) -> (a cos - b sin, b cos + a sin)     for pair i at position p, angle p * theta ** (-2i / R)

Pairs are half-split, (x[i], x[i + R/2]), or interleaved, (x[2i], x[2i + 1]). R may be smaller than the head size: the
elements past R are left alone. The backward pass is the same rotation with the opposite sign of sin.
"""

import inspect
import math
from collections.abc import Mapping

import torch
from torch import library

from .backend import backend_module, resolve_backend
from .checks import check_norm, check_tables, check_tensor, kind_of, positive_number, whole_number
from .namespace import NAMESPACE, OPERATORS
from .qk_norm import norm_rotation, positions_in


def rope_tables(length, rotary_dim, *, theta=10000.0, scaling=None, device=None):
    """cos and sin, each (length, rotary_dim / 2) in fp32: row p holds the angles of position p.

    scaling stretches the tables over contexts longer than the trained one, as Hugging Face's tables do:
        ("linear", f)    every angle divided by f (arXiv:2306.15595)
        ("ntk", f)       theta multiplied by f ** (R / (R - 2)): high frequencies stay, low ones stretch by f
        ("yarn", {...})  a blend of both per frequency, and a temperature (arXiv:2309.00071); keys `factor`,
                         `original_max_position_embeddings`, optional `beta_fast` 32, `beta_slow` 1, `truncate` True,
                         `attention_factor`, `mscale`, `mscale_all_dim`
        ("llama3", {...}) keys `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`
    Angles are computed in fp32, like the tables that published models were trained with. Raises ValueError for an odd
    or non-positive rotary_dim, a negative length, a theta or a factor that is not above 0, and an unknown or incomplete
    scaling.
    """
    length, rotary_dim = whole_number("length", length), whole_number("rotary_dim", rotary_dim)
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}, expected a positive even number")
    if length < 0:
        raise ValueError(f"length is {length}, expected 0 or more")
    inv_freq, temperature = inverse_frequencies(rotary_dim, theta, scaling, device)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inv_freq
    return angles.cos() * temperature, angles.sin() * temperature


def inverse_frequencies(dim, theta, scaling, device):
    """(R / 2,) angle per position of each pair, and the factor that cos and sin are multiplied with: `rope_tables`."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    theta = positive_number("theta", theta)
    if scaling is None:
        return 1.0 / theta**exponents, 1.0
    if not (isinstance(scaling, tuple | list) and len(scaling) == 2):
        raise ValueError(f"scaling is {scaling!r}, expected None or a pair such as ('linear', 2.0)")
    kind, value = scaling
    if kind not in ("linear", "ntk", "yarn", "llama3"):
        raise ValueError(f"scaling is of kind {kind!r}, expected 'linear', 'ntk', 'yarn' or 'llama3'")
    if kind in ("linear", "ntk"):
        factor = positive_number(f"the factor of scaling {kind!r}", value)
        if kind == "linear":
            return 1.0 / theta**exponents / factor, 1.0
        if dim == 2:
            raise ValueError("rotary_dim is 2, expected at least 4 for scaling 'ntk', which divides by R - 2")
        return 1.0 / (theta * factor ** (dim / (dim - 2))) ** exponents, 1.0
    if not isinstance(value, Mapping):
        raise ValueError(f"scaling {kind!r} comes with {value!r}, expected a dict with its factor and more")
    needed = {"factor", "original_max_position_embeddings"}
    needed |= {"low_freq_factor", "high_freq_factor"} if kind == "llama3" else set()
    missing = sorted(needed - set(value))
    if missing:
        raise ValueError(f"scaling {kind!r} lacks {', '.join(missing)}")
    for name in sorted(needed):
        positive_number(f"{name} of scaling {kind!r}", value[name])
    if kind == "yarn" and theta == 1:
        raise ValueError("theta is 1.0, expected another for scaling 'yarn', which divides by its logarithm")
    if kind == "llama3" and value["low_freq_factor"] == value["high_freq_factor"]:
        raise ValueError("low_freq_factor and high_freq_factor of scaling 'llama3' are equal, expected different ones")
    blend = _yarn if kind == "yarn" else _llama3
    return blend(1.0 / theta**exponents, dim, theta, value)


def _yarn(inv_freq, dim, theta, options):
    factor, trained = options["factor"], options["original_max_position_embeddings"]

    def pair_of(rotations):  # the (fractional) pair that rotates so often within the trained context
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(options.get("beta_fast") or 32), pair_of(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    stretched = ((torch.arange(dim // 2, dtype=torch.float32, device=inv_freq.device) - low) / (high - low)).clamp(0, 1)

    def temperature(mscale=1.0):
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = options.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = options.get("mscale"), options.get("mscale_all_dim")
        attention_factor = temperature(mscale) / temperature(all_dim) if mscale and all_dim else temperature()
    return inv_freq / factor * stretched + inv_freq * (1 - stretched), attention_factor


def _llama3(inv_freq, dim, theta, options):
    factor, trained = options["factor"], options["original_max_position_embeddings"]
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    rotations = trained / (2 * math.pi / inv_freq)  # within the trained context
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / factor + kept * inv_freq, 1.0


def apply_rope(q, k, cos, sin, *, positions=None, interleaved=False, norm=None, backend="auto"):
    """q (B, Hq, T, D) and k (B, Hkv, T, D), each token's pairs rotated by the angles of its position.

    cos, sin: the tables of `rope_tables`, (positions, R / 2) with R <= D; they are constants. positions: None for
    0 .. T-1, a whole number for an offset, or a tensor (T,) or (B, T) of int64 or int32.
    interleaved: pairs are (x[2i], x[2i + 1]) instead of (x[i], x[i + R/2]).
    norm: (q_weight, k_weight, eps) normalises each head before it is rotated, to x / sqrt(mean(x^2) + eps) * weight
    (RMSNorm, arXiv:1910.07467; of q and k: arXiv:2302.05442). Mean and weights are of all D elements, also those that
    are not rotated. Weights are (D,) or None for ones; for Gemma's, give 1 + weight.

    Returns new tensors (q, k) in their dtypes, computed in fp32 and rounded once, differentiable in q, k and the
    weights (with norm: once, in reverse mode). Raises ValueError for shapes, dtypes or devices that do not fit, for an
    eps that is not above 0, and for positions that the tables do not have. Where reading a tensor of positions would
    wait (on a GPU), and inside torch.compile, a token at such a position is NaN instead.
    """
    for name, x in (("q", q), ("k", k)):
        check_tensor(name, x, q)
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, H, T, D) and differ only in their heads"
        )
    B, T = q.shape[0], q.shape[2]
    by_token, offset = None, 0
    if isinstance(positions, torch.Tensor):
        by_token = positions
        cos, sin = check_tables(cos, sin, 0 if positions.numel() == 0 else 1, q)
        _check_positions(positions, B, T, cos)
    else:
        offset = _offset(positions)
        cos, sin = check_tables(cos, sin, offset + T, q)
    norm = None if norm is None else check_norm(norm, q)
    name, _ = resolve_backend(backend, q.device)
    if name != "triton" and torch.compiler.is_compiling():
        # the compiler makes one loop of the definition; an operator would hide it
        from .backends import reference

        options = {"positions": positions if by_token is not None else offset, "interleaved": interleaved}
        if norm is not None:
            return reference.norm_rotate(q, k, norm, cos, sin, **options)
        return reference.rotate(q, k, cos, sin, **options)
    if norm is not None:
        return norm_rotation(q, k, *norm, cos, sin, by_token, offset, interleaved, name)
    rotation = _Rotation if torch.compiler.is_compiling() else _EagerRotation
    return rotation.apply(q, k, cos, sin, by_token, offset, interleaved, False, name)


def rotate_alone(x, cos, sin, **options):
    """`apply_rope` of one tensor x (B, H, T, D), with its options."""
    return apply_rope(x, x[:, :0], cos, sin, **options)[0]


def _offset(positions):
    if positions is None:
        return 0
    if type(positions) is not int:
        if isinstance(positions, list | tuple):
            raise ValueError(
                f"positions is {kind_of(positions)}, expected None, an offset or a tensor: torch.tensor(...)"
            )
        positions = whole_number("positions", positions)
    if positions < 0:
        raise ValueError(f"positions is {positions}, expected an offset of 0 or more")
    return positions


def _check_positions(positions, B, T, cos):
    """Raise ValueError unless the tensor is one of positions."""
    if positions.dtype not in (torch.int64, torch.int32) or tuple(positions.shape) not in ((T,), (B, T)):
        raise ValueError(
            f"positions is {positions.dtype} {tuple(positions.shape)}, expected int64 or int32 ({T},) or ({B}, {T})"
        )
    if positions.device != cos.device:
        raise ValueError(f"positions is on {positions.device}, q is on {cos.device}: move it with .to(q.device)")


library.define(
    f"{NAMESPACE}::rotate",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, SymInt offset, bool interleaved, bool inverse, "
    "str backend) -> (Tensor q, Tensor k)",
)


@library.impl(f"{NAMESPACE}::rotate", "default")
def _rotate(q, k, cos, sin, positions, offset, interleaved, inverse, backend):
    positions = positions_in(cos, positions, offset)
    return backend_module(backend).rotate(q, k, cos, sin, positions=positions, interleaved=interleaved, inverse=inverse)


@library.register_fake(f"{NAMESPACE}::rotate")
def _rotate_fake(q, k, cos, sin, positions, offset, interleaved, inverse, backend):
    return torch.empty_like(q), torch.empty_like(k)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(q, k, cos, sin, positions, offset, interleaved, inverse, backend):
        return OPERATORS.rotate(q, k, cos, sin, positions, offset, interleaved, inverse, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, *tables, offset, interleaved, inverse, backend = inputs
        ctx.options, ctx.opposite = (offset, interleaved, inverse, backend), (offset, interleaved, not inverse, backend)
        ctx.save_for_backward(*tables)
        ctx.save_for_forward(*tables)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        return *_Rotation.apply(grad_q, grad_k, *ctx.saved_tensors, *ctx.opposite), *[None] * 7


# PyTorch asks for the signature at every call, which takes 0.1 ms to make
_Rotation.forward.__signature__ = inspect.signature(_Rotation.forward)


class _EagerRotation(_Rotation):
    """With what torch.compile does not take: derivatives forward, and torch.func.vmap."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, q, k, *_):
        return _EagerRotation.apply(q, k, *ctx.saved_tensors, *ctx.options)
