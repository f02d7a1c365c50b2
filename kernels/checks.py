"""What the public functions take: for all else a ValueError of one line, which names the argument and the way out.

The checks run at every call, a decoded token's too: what is right passes in a few comparisons, and only what is wrong
is looked at closely. No check reads a tensor's elements: on a GPU that would wait for it.
"""

import math
import operator

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_INT = 2**63 - 1


def check_heads(q, k, v, k_name, v_name, codes=False):
    """Raise ValueError unless q (B, Hq, T, D) and k, v (B, Hkv, S, D) belong together.

    codes: k and v are int8, in place of q's dtype.
    """
    for name, x in (("q", q), (k_name, k), (v_name, v)):
        check_tensor(name, x, q, codes=codes and x is not q)
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"{name} has last stride {x.stride(-1)}, expected 1: call .contiguous() on it")
    (batch, heads, _, head_dim), k_shape, v_shape = q.shape, k.shape, v.shape
    if heads == 0:
        raise ValueError("q has 0 heads, expected at least 1")
    if k_shape != v_shape:
        raise ValueError(f"{v_name} has shape {tuple(v_shape)}, expected {k_name}'s {tuple(k_shape)}")
    if k_shape[0] != batch:
        raise ValueError(f"{k_name} has batch size {k_shape[0]}, expected q's {batch}")
    if k_shape[3] != head_dim:
        raise ValueError(f"{k_name} has head size {k_shape[3]}, expected q's {head_dim}")
    if k_shape[1] == 0 or heads % k_shape[1]:
        raise ValueError(
            f"{k_name} has {k_shape[1]} heads, which do not divide q's {heads} (grouped KV heads need Hq % Hkv == 0)"
        )


def check_tensor(name, x, q, q_name="q", codes=False):
    """Raise ValueError unless x is a tensor (B, H, T, D >= 1) of a floating dtype, on the device and of the dtype of q.

    q is one, or the argument itself. codes: the dtype is int8 instead.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is {kind_of(x)}, expected a tensor (batch, heads, length, head size)")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected 4 dimensions (batch, heads, length, head size)")
    if shape[3] == 0:
        raise ValueError(f"{name} has head size 0, expected at least 1")
    dtype = x.dtype
    if codes:
        if dtype != torch.int8:
            raise ValueError(f"{name} has dtype {dtype}, expected torch.int8 beside scales")
    elif dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {dtype}, expected a floating one: float16, bfloat16, float32 or float64")
    if x is q:
        return
    if not codes and dtype != q.dtype:
        raise ValueError(f"{name} has dtype {dtype}, expected {q_name}'s {q.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, {q_name} is on {q.device}: move it with .to({q_name}.device)")


def check_scales(k_scales, v_scales, k_cache, v_cache):
    """Whether the caches are int8. Raises ValueError unless scales come with int8 caches alone, and fit these."""
    if k_scales is None and v_scales is None:
        for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
            if isinstance(x, torch.Tensor) and x.dtype == torch.int8:
                raise ValueError(f"{name} has dtype torch.int8, which needs its scales: k_scales=..., v_scales=...")
        return False
    expected = tuple(getattr(k_cache, "shape", ()))[:3]
    for name, x in (("k_scales", k_scales), ("v_scales", v_scales)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} is {kind_of(x)}, expected a tensor torch.float32 {expected}, one for each slot")
        if x.dtype != torch.float32 or x.shape != expected:
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, expected torch.float32 {expected}")
        if x.device != k_cache.device:
            raise ValueError(f"{name} is on {x.device}, k_cache is on {k_cache.device}: move it there")
        if x.stride(2) != 1 and x.shape[2] > 1:
            raise ValueError(f"{name} has last stride {x.stride(2)}, expected 1: call .contiguous() on it")
    return True


def check_window(window):
    """(keys up to the query's own, later keys), None for no bound, of a number W, None, or a pair (left, right).

    Raises ValueError for all else.
    """
    if window is None:
        return None, 0
    if isinstance(window, tuple | list):
        if len(window) != 2:
            raise ValueError(f"window has {len(window)} numbers, expected one, or the two of (left, right)")
        left, right = (_side(*named) for named in zip(("left", "right"), window, strict=True))
        return None if left is None else left + 1, right
    if type(window) is not int:
        window = whole_number("window", window)
    if window < 1:
        raise ValueError(
            f"window is {window}, expected None or at least 1, the query's own key included (flash-attn's (W - 1, 0))"
        )
    if window > LARGEST_INT:
        raise ValueError(f"window is {window}, expected less than 2**63: None sees every earlier key")
    return window, 0


def _side(name, keys):
    """A side of the window as a number of keys; None for no bound."""
    if keys is None:
        return None
    keys = whole_number(f"window's {name} side", keys)
    if keys == -1:
        return None
    if not 0 <= keys < LARGEST_INT:
        raise ValueError(f"window's {name} side is {keys}, expected at least 0 keys, or None or -1 for no bound")
    return keys


def check_prefix(prefix, length=None, right=0):
    """prefix as an int. Raises ValueError unless it counts the first of `length` positions, for causal attention."""
    if type(prefix) is not int:
        prefix = whole_number("prefix", prefix)
    if prefix < 0:
        raise ValueError(f"prefix is {prefix}, expected 0 or more positions")
    if prefix and right != 0:
        raise ValueError("prefix is for causal attention, but window's right side is not 0")
    if prefix and length is not None and prefix > length:
        raise ValueError(f"prefix is {prefix}, more than the {length} positions of k")
    return prefix


def check_prefix_distance(distance, prefix, window, rope):
    """The position from which queries count as no farther from the prefix, or None where that changes nothing.

    Raises ValueError unless it is None, or a whole number of at least 0 beside `rope`.
    """
    if distance is None:
        return None
    if (distance := whole_number("prefix_distance", distance)) < 0:
        raise ValueError(f"prefix_distance is {distance}, expected None or 0 or more positions")
    if rope is None:
        raise ValueError("prefix_distance needs rope: without rotation no score depends on a distance")
    # no nearer than the keys that have just left the window
    return max(distance, window + prefix - 1) if prefix and window is not None else None


def check_starts(starts, q, length):
    """Raise ValueError unless starts is None or int32 (B, length), the first position of each position's document."""
    if starts is None:
        return
    if not isinstance(starts, torch.Tensor):
        raise ValueError(f"starts is {kind_of(starts)}, expected a tensor (batch, length): see document_starts")
    expected = q.shape[0], length
    if starts.dtype != torch.int32 or starts.shape != expected:
        raise ValueError(
            f"starts is {starts.dtype} {tuple(starts.shape)}, expected torch.int32 {expected}, one for each key: see "
            "document_starts"
        )
    if starts.device != q.device:
        raise ValueError(f"starts is on {starts.device}, q is on {q.device}: move it with .to(q.device)")


def check_starts_values(starts):
    """Raise ValueError unless each of starts (B, S) is its own position, or what the position before it has.

    It reads them, so that it is for a CPU's tensor only.
    """
    position = torch.arange(starts.shape[1], dtype=starts.dtype, device=starts.device)
    right = starts == position
    right[:, 1:] |= starts[:, 1:] == starts[:, :-1]
    if not right.all():
        row, i = (~right).nonzero()[0].tolist()
        before = f" or {starts[row, i - 1]}, its neighbour's" if i else ""
        raise ValueError(
            f"starts[{row}, {i}] is {starts[row, i]}, expected {i}, a document's begin{before}: see document_starts"
        )


def check_options(q, scale, softcap, sinks):
    """(scale, softcap) as Python's numbers.

    Raises ValueError unless they and sinks mean something for q (B, Hq, T, D). scale None stands for D**-0.5.
    """
    scale = q.shape[3] ** -0.5 if scale is None else positive_number("scale", scale)
    softcap = None if softcap is None else positive_number("softcap", softcap, "None or ")
    if sinks is not None:
        if not isinstance(sinks, torch.Tensor):
            raise ValueError(
                f"sinks is {kind_of(sinks)}, expected a tensor ({q.shape[1]},), one number for each head of q"
            )
        if tuple(sinks.shape) != (q.shape[1],) or sinks.dtype not in FLOATS:
            raise ValueError(
                f"sinks is {sinks.dtype} {tuple(sinks.shape)}, expected one float for each of q's {q.shape[1]} heads"
            )
        if sinks.device != q.device:
            raise ValueError(f"sinks is on {sinks.device}, q is on {q.device}: move it with .to(q.device)")
    return scale, softcap


def check_rope(rope, length, q, q_name="q"):
    """(cos, sin) of the argument `rope`, or (None, None): see `check_tables`."""
    if rope is None:
        return None, None
    if not isinstance(rope, tuple | list) or len(rope) != 2:
        came = f"{len(rope)} of them" if isinstance(rope, tuple | list) else kind_of(rope)
        raise ValueError(f"rope is {came}, expected None or the pair (cos, sin) of rope_tables")
    return check_tables(*rope, length, q, q_name)


def check_tables(cos, sin, length, q, q_name="q"):
    """cos and sin, which are constants: no gradient flows to them, on any backend.

    Raises ValueError unless they are (>= length, R / 2) tables for q (..., D), R <= D, on its device.
    """
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, torch.Tensor):
            raise ValueError(f"rope table {name} is {kind_of(table)}, expected a tensor (length, R/2): see rope_tables")
        if table.dtype not in FLOATS:
            raise ValueError(f"rope table {name} has dtype {table.dtype}, expected a floating one, best torch.float32")
    shape = cos.shape
    if len(shape) != 2 or shape != sin.shape:
        raise ValueError(
            f"rope tables cos {tuple(shape)} and sin {tuple(sin.shape)} must be of one (length, R/2) shape"
        )
    if shape[0] < length:
        raise ValueError(
            f"rope tables hold {shape[0]} positions, which is fewer than the {length} of the sequence: "
            f"rope_tables({length}, ...) makes as many"
        )
    if 2 * shape[1] > q.shape[3]:
        raise ValueError(f"rope tables rotate {2 * shape[1]} elements, more than the head size {q.shape[3]}")
    device = q.device
    if cos.device != device or sin.device != device:
        where = cos.device if cos.device == sin.device else f"{cos.device} and {sin.device}"
        raise ValueError(
            f"rope tables are on {where}, {q_name} is on {device}: rope_tables(..., device={q_name}.device)"
        )
    return (cos.detach(), sin.detach()) if cos.requires_grad or sin.requires_grad else (cos, sin)


def check_norm(norm, q):
    """(q_weight, k_weight, eps) of the argument `norm`: weights (D,) or None, eps as a float.

    Raises ValueError unless they fit q (..., D).
    """
    if not isinstance(norm, tuple | list) or len(norm) != 3:
        came = f"{len(norm)} values" if isinstance(norm, tuple | list) else kind_of(norm)
        raise ValueError(f"norm is {came}, expected None or (q_weight, k_weight, eps)")
    *weights, eps = norm
    for name, weight in zip(("q_weight", "k_weight"), weights, strict=True):
        if weight is None:
            continue
        if not isinstance(weight, torch.Tensor):
            raise ValueError(f"norm's {name} is {kind_of(weight)}, expected None or a tensor ({q.shape[3]},)")
        if tuple(weight.shape) != (q.shape[3],) or weight.dtype not in FLOATS:
            raise ValueError(
                f"norm's {name} is {weight.dtype} {tuple(weight.shape)}, expected one float for each of a head's "
                f"{q.shape[3]} elements"
            )
        if weight.device != q.device:
            raise ValueError(f"norm's {name} is on {weight.device}, q is on {q.device}: move it with .to(q.device)")
    return *weights, positive_number("norm's eps", eps)


def check_reach(rows, position):
    """Raise ValueError unless tables of `rows` rows have one for this position."""
    if not 0 <= position < rows:
        way_out = f"rope_tables({position + 1}, ...) reaches it" if position >= 0 else "they begin at 0"
        raise ValueError(f"rope tables hold {rows} positions, but position {position} was asked for: {way_out}")


def whole_number(name, value):
    """value as an int, of whatever PyTorch takes for one but tensors, which may be on a device; no bool, no float."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a tensor, expected a whole number: {name}.item() (on a GPU, that waits for it)")
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} is {value!r}, expected a whole number")


def positive_number(name, value, or_else=""):
    """value as a float that is finite and above 0."""
    if type(value) is not float and not isinstance(value, torch.SymFloat | torch.SymInt):
        if isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is a tensor, expected a number: {name}.item() (on a GPU, that waits for it)")
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise ValueError(f"{name} is {value!r}, expected {or_else}a positive number")
        value = float(value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected {or_else}a positive number that is finite")
    return value


def kind_of(x):
    """What x is, in two words."""
    if x is None or isinstance(x, bool):
        return repr(x)
    if isinstance(x, torch.Tensor):
        return f"a tensor {tuple(x.shape)}"
    return f"a {type(x).__module__}.{type(x).__qualname__}".replace("a builtins.", "a ")
