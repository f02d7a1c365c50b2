"""What the arithmetic instructions of PTX compute: one table from opcode to `Operation`, on NumPy arrays.

PTX ISA 8.7, sections 9.7.1 to 9.7.9: integer, floating point, half precision, comparison and selection, logic and
shift, data movement and conversion. An opcode that the table lacks is not guessed at.

Registers hold bits. bf16, which NumPy lacks, is kept as uint16 and computed in fp32; a pair such as f32x2 or bf16x2
is an array whose last axis is twice as long. Two things differ from the hardware: approximate functions (ex2.approx,
rsqrt.approx, div.full ...) are exact to their last bit or two, and fma rounds to fp64 before it rounds to fp32.
"""

from typing import NamedTuple

import numpy as np

NUMPY = {
    "pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "tf32": np.uint32,
    "f32x2": np.float32, "f16x2": np.float16, "bf16x2": np.uint16,
}  # fmt: skip
NUMPY = {name: np.dtype(value) for name, value in NUMPY.items()}
PAIRS = ("f32x2", "f16x2", "bf16x2")
UNSIGNED = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}


class Operation(NamedTuple):
    function: object  # of arrays of the sources' types
    sources: tuple  # types by PTX's names
    result: str


def bf16_to_f32(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x):
    """Rounds to the nearest, ties to even; every NaN becomes 0x7fff (9.7.9.21, cvt)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f32_to_tf32(x):
    """cvt.rna.tf32.f32: 10 bits of mantissa stay, ties away from zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def _ftz(x):
    """Subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _flushed(function):
    return lambda *sources: _ftz(function(*map(_ftz, sources)))


def _fma(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _fma_f16(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float16)


def _in_f32(function):
    """An operation on bf16: computed in fp32 (an fma in fp64), then rounded once."""
    return lambda *sources: f32_to_bf16(function(*map(bf16_to_f32, sources)))


def _approximately(function, *modifiers):
    def computed(*sources):
        return function(*(x.astype(np.float64) for x in sources)).astype(np.float32)

    return _flushed(computed) if "ftz" in modifiers else computed


def _divided(a, b):
    """Integer division towards zero."""
    quotient = np.abs(a) // np.where(b == 0, 1, np.abs(b)).astype(a.dtype)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def _wide(a, b):
    double = {np.dtype(np.int32): np.int64, np.dtype(np.uint32): np.uint64,
              np.dtype(np.int16): np.int32, np.dtype(np.uint16): np.uint32}[a.dtype]  # fmt: skip
    return a.astype(double) * b.astype(double)


def _high(a, b):
    """The upper half of a product."""
    bits = a.itemsize * 8
    if bits < 64:
        return (_wide(a, b) >> _wide(a, b).dtype.type(bits)).astype(a.dtype)
    return ((a.astype(object) * b.astype(object)) >> bits).astype(a.dtype)


def _funnel(a, b, amount, left):
    """shf (9.7.8.7): the upper (or lower) word of {b, a}, shifted left (or right) by the amount modulo 32."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    amount = (amount & np.uint32(31)).astype(np.uint64)
    return ((both << amount >> np.uint64(32)) if left else both >> amount).astype(np.uint32)


def _shift(function):
    """Amounts of the width or more count as the width (9.7.8.8)."""
    return lambda a, amount: function(a, np.minimum(amount, np.uint32(a.itemsize * 8)).astype(a.dtype))


def _bfe(a, position, length):
    """Bits position .. position + length - 1 of a, with the sign of the last of them if a is signed (9.7.1.19)."""
    position, length = (np.minimum(x & np.uint32(0xFF), np.uint32(64)).astype(np.int64) for x in (position, length))
    wide = a.astype(np.int64)
    signed = a.dtype.kind == "i"
    field = np.where(position >= 32, np.where(signed & (wide < 0), -1, 0), wide >> np.minimum(position, 63))
    mask = np.left_shift(np.int64(1), np.minimum(length, 33)) - 1
    inside = np.minimum(length, np.maximum(32 - position, 0))
    sign = (field >> np.maximum(inside - 1, 0)) & 1 if signed else np.int64(0)
    extended = np.where((sign == 1) & (length > 0), field | ~mask, field & mask)
    return np.where(length == 0, 0, extended).astype(a.dtype)


def _bfi(a, b, position, length):
    """The lowest `length` bits of a in b from `position` on (9.7.1.20)."""
    position, length = (np.minimum(x & np.uint32(0xFF), np.uint32(32)).astype(np.uint64) for x in (position, length))
    mask = (np.left_shift(np.uint64(1), length) - np.uint64(1)) << position & np.uint64(0xFFFFFFFF)
    return (b & ~mask | (a.astype(np.uint64) << position) & mask).astype(np.uint32)


def _prmt(a, b, selector):
    """Four bytes of the eight of {b, a}; bit 3 of a selector takes the sign of its byte instead (9.7.9.7)."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        chosen = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((chosen & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result |= np.where(chosen & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result


def _lop3(a, b, c, table):
    """Any logical function of three bits: bit 4 a + 2 b + c of the table (9.7.8.6)."""
    result = np.zeros_like(a | b | c)
    for case in range(8):
        terms = [x if case & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
        chosen = np.where(table >> np.uint32(case) & np.uint32(1), np.uint32(0xFFFFFFFF), np.uint32(0))
        result |= terms[0] & terms[1] & terms[2] & chosen
    return result


def _paired(high, low):
    """cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half."""
    low, high = np.broadcast_arrays(low, high)
    return np.stack([low, high], -1).reshape(*low.shape[:-1], -1)


def _compared(a, b, comparison):
    ordered = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
               "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
               "hs": np.greater_equal}  # fmt: skip
    if a.dtype.kind != "f":
        return ordered[comparison](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if comparison in ("num", "nan"):
        return unordered if comparison == "nan" else ~unordered
    if comparison.endswith("u") and comparison != "u":
        return ordered[comparison[:-1]](a, b) | unordered
    return ordered[comparison](a, b) & ~unordered


def _table():
    table = {}

    def add(opcode, function, sources, result):
        table[opcode] = Operation(function, tuple(sources.split()), result)

    for t in ("s16", "u16", "s32", "u32", "s64", "u64"):
        add(f"add.{t}", np.add, f"{t} {t}", t)
        add(f"sub.{t}", np.subtract, f"{t} {t}", t)
        add(f"mul.lo.{t}", np.multiply, f"{t} {t}", t)
        add(f"mad.lo.{t}", lambda a, b, c: a * b + c, f"{t} {t} {t}", t)
        add(f"div.{t}", _divided, f"{t} {t}", t)
        add(f"rem.{t}", lambda a, b: a - _divided(a, b) * b, f"{t} {t}", t)
        add(f"min.{t}", np.minimum, f"{t} {t}", t)
        add(f"max.{t}", np.maximum, f"{t} {t}", t)
        add(f"shr.{t}", _shift(np.right_shift), f"{t} u32", t)
        if t[0] == "s":
            add(f"neg.{t}", np.negative, t, t)
            add(f"abs.{t}", np.abs, t, t)
    add("min.relu.s32", lambda a, b: np.maximum(np.minimum(a, b), np.int32(0)), "s32 s32", "s32")
    add("max.relu.s32", lambda a, b: np.maximum(np.maximum(a, b), np.int32(0)), "s32 s32", "s32")
    for t, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
        add(f"mul.wide.{t}", _wide, f"{t} {t}", wide)
        add(f"mad.wide.{t}", lambda a, b, c: _wide(a, b) + c, f"{t} {t} {wide}", wide)
    for t in ("s16", "u16", "s32", "u32", "s64", "u64"):
        add(f"mul.hi.{t}", _high, f"{t} {t}", t)
    add("shf.l.wrap.b32", lambda a, b, c: _funnel(a, b, c, True), "b32 b32 u32", "b32")
    add("shf.r.wrap.b32", lambda a, b, c: _funnel(a, b, c, False), "b32 b32 u32", "b32")
    for t in ("s32", "u32"):
        add(f"bfe.{t}", _bfe, f"{t} u32 u32", t)
    add("bfi.b32", _bfi, "b32 b32 u32 u32", "b32")
    add("prmt.b32", _prmt, "b32 b32 u32", "b32")
    add("lop3.b32", _lop3, "b32 b32 b32 u32", "b32")
    for t in ("pred", "b16", "b32", "b64"):
        add(f"and.{t}", np.bitwise_and, f"{t} {t}", t)
        add(f"or.{t}", np.bitwise_or, f"{t} {t}", t)
        add(f"xor.{t}", np.bitwise_xor, f"{t} {t}", t)
        add(f"not.{t}", np.invert, t, t)
        if t != "pred":
            add(f"shl.{t}", _shift(np.left_shift), f"{t} u32", t)
    for t in ("b16", "b32", "b64", "s32", "u32", "s64", "u64", "f32", "f64", "f16"):
        add(f"selp.{t}", lambda a, b, p: np.where(p, a, b), f"{t} {t} pred", t)

    binary = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    for rounding in ("", ".rn"):
        for name, function in binary.items():
            add(f"{name}{rounding}.f32", function, "f32 f32", "f32")
            add(f"{name}{rounding}.ftz.f32", _flushed(function), "f32 f32", "f32")
            add(f"{name}{rounding}.f32x2", function, "f32x2 f32x2", "f32x2")
            add(f"{name}{rounding}.f64", function, "f64 f64", "f64")
            for t in ("f16", "f16x2"):
                add(f"{name}{rounding}.{t}", function, f"{t} {t}", t)
            for t in ("bf16", "bf16x2"):
                add(f"{name}{rounding}.{t}", _in_f32(function), f"{t} {t}", t)
    add("fma.rn.f32", _fma, "f32 f32 f32", "f32")
    add("fma.rn.ftz.f32", _flushed(_fma), "f32 f32 f32", "f32")
    add("fma.rn.f32x2", _fma, "f32x2 f32x2 f32x2", "f32x2")
    for t in ("f16", "f16x2"):
        add(f"fma.rn.{t}", _fma_f16, f"{t} {t} {t}", t)
    for t in ("bf16", "bf16x2"):
        add(f"fma.rn.{t}", _in_f32(_fma), f"{t} {t} {t}", t)
    # 9.7.5: fp32 with one (add, sub) or two (fma) operands of half the width
    for t, widened in (("bf16", bf16_to_f32), ("f16", lambda x: x.astype(np.float32))):
        for rounding in ("", ".rn"):
            add(f"add{rounding}.f32.{t}", lambda a, c, f=widened: f(a) + c, f"{t} f32", "f32")
            add(f"sub{rounding}.f32.{t}", lambda a, c, f=widened: f(a) - c, f"{t} f32", "f32")
        add(f"fma.rn.f32.{t}", lambda a, b, c, f=widened: _fma(f(a), f(b), c), f"{t} {t} f32", "f32")
    for t in ("f32", "f16", "f64"):
        add(f"neg.{t}", np.negative, t, t)
        add(f"abs.{t}", np.abs, t, t)
        add(f"min.{t}", np.fmin, f"{t} {t}", t)
        add(f"max.{t}", np.fmax, f"{t} {t}", t)
        add(f"min.NaN.{t}", np.minimum, f"{t} {t}", t)
        add(f"max.NaN.{t}", np.maximum, f"{t} {t}", t)
    for name, two in (("min", np.fmin), ("max", np.fmax), ("min.NaN", np.minimum), ("max.NaN", np.maximum)):
        add(f"{name}.f32 of 3", lambda a, b, c, two=two: two(two(a, b), c), "f32 f32 f32", "f32")  # from sm_100 on
    for ftz in ((), ("ftz",)):
        dots = ".".join(("", *ftz))
        add(f"ex2.approx{dots}.f32", _approximately(np.exp2, *ftz), "f32", "f32")
        add(f"lg2.approx{dots}.f32", _approximately(np.log2, *ftz), "f32", "f32")
        add(f"rcp.approx{dots}.f32", _approximately(np.reciprocal, *ftz), "f32", "f32")
        add(f"rsqrt.approx{dots}.f32", _approximately(lambda x: 1 / np.sqrt(x), *ftz), "f32", "f32")
        add(f"sqrt.approx{dots}.f32", _approximately(np.sqrt, *ftz), "f32", "f32")
        for accuracy in ("full", "approx", "rn"):
            add(f"div.{accuracy}{dots}.f32", _approximately(np.divide, *ftz), "f32 f32", "f32")
    add("tanh.approx.f32", _approximately(np.tanh), "f32", "f32")

    numbers = ("s16", "u16", "b16", "s32", "u32", "b32", "s64", "u64", "b64", "f32", "f64", "f16")
    for t in numbers:
        orders = ["eq", "ne"] if t[0] == "b" else ["eq", "ne", "lt", "le", "gt", "ge"]
        orders += {"u": ["lo", "ls", "hi", "hs"], "f": ["equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]}.get(
            t[0], []
        )
        for order in orders:
            add(f"setp.{order}.{t}", lambda a, b, order=order: _compared(a, b, order), f"{t} {t}", "pred")

    integers = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
    for a in integers:
        for b in integers:
            add(f"cvt.{a}.{b}", lambda x, t=NUMPY[a]: x.astype(t), b, a)
        for b in ("f16", "f32"):
            add(f"cvt.rn.{b}.{a}", lambda x, t=NUMPY[b]: x.astype(t), a, b)
        for rounding, function in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
            add(f"cvt.{rounding}.{a}.f32", lambda x, f=function, t=NUMPY[a]: _saturated(f(x), t), "f32", a)
    add("cvt.f32.bf16", bf16_to_f32, "bf16", "f32")
    add("cvt.f32.f16", lambda x: x.astype(np.float32), "f16", "f32")
    add("cvt.rn.bf16.f32", f32_to_bf16, "f32", "bf16")
    add("cvt.rn.f16.f32", lambda x: x.astype(np.float16), "f32", "f16")
    add("cvt.rn.bf16x2.f32", lambda a, b: _paired(f32_to_bf16(a), f32_to_bf16(b)), "f32 f32", "bf16x2")
    add("cvt.rn.f16x2.f32", lambda a, b: _paired(a.astype(np.float16), b.astype(np.float16)), "f32 f32", "f16x2")
    add("cvt.rna.tf32.f32", f32_to_tf32, "f32", "tf32")
    return table


def _saturated(x, dtype):
    """A rounded number as an integer: NaN is 0, what is too large is the largest (9.7.9.21)."""
    limits = np.iinfo(dtype)
    inside = (x > limits.min) & (x < limits.max)
    clipped = np.where(x >= limits.max, limits.max, np.where(x <= limits.min, limits.min, 0)).astype(dtype)
    return np.where(inside, np.where(inside, x, 0).astype(dtype), clipped)


OPERATIONS = _table()


def operation(opcode, sources):
    """The `Operation` of an opcode with so many sources; None for one that is no arithmetic or not known."""
    found = OPERATIONS.get(opcode)
    return found if found is None or len(found.sources) == sources else OPERATIONS.get(f"{opcode} of {sources}")
