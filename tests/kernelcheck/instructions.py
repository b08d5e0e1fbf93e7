"""What the arithmetic instructions of PTX compute: `operation` gives the numpy function of an opcode and the types of
its operands. Only what the kernels of armor come to is here; anything else is None, which the executor refuses.

Arithmetic is correctly rounded, with one rounding for fma. Of the instructions that PTX leaves some freedom, `.approx`
and `.full` are taken correctly rounded, too, except that rcp.approx.ftz.f64 keeps only 20 bits of a mantissa: whoever
calls it must refine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from kernelcheck.floats import (
    add_f32,
    flushed,
    fma_f32,
    fma_f64,
    larger,
    narrowed,
    smaller,
    widened,
)

_INTEGERS = {
    f"{letter}{bits}": f"{kind}{bits}"
    for letter, kind in (("u", "uint"), ("s", "int"), ("b", "uint"))
    for bits in (8, 16, 32, 64)
}
_PACKED = {"bf16": "uint16", "f16": "uint16", "bf16x2": "uint32", "f16x2": "uint32", "f32x2": "uint64"}
DTYPES = {
    name: np.dtype(kind)
    for name, kind in {**_INTEGERS, **_PACKED, "f32": "float32", "f64": "float64", "pred": "bool"}.items()
}
ROUNDINGS = ("rn", "rz", "rm", "rp")


class Operation(NamedTuple):
    """`function` of the sources gives one result, or a tuple of two for `%p|%q`."""

    function: Callable
    result: str
    sources: tuple[str, ...]


@functools.cache
def operation(opcode: tuple[str, ...], sources: int) -> Operation | None:
    """What an opcode computes of that many sources, or None."""
    name, *modifiers = opcode
    kinds = [part for part in modifiers if part in DTYPES]
    decode = _DECODERS.get(name)
    found = decode(name, modifiers, kinds) if decode and kinds else None
    if found and name in ("min", "max") and sources == 3 and kinds == ["f32"]:
        two = found.function
        return Operation(lambda a, b, c: two(two(a, b), c), "f32", ("f32",) * 3)
    return found if found and len(found.sources) == sources else None


# ---- floating point -------------------------------------------------------------------------------------------------

_FLOAT = {  # of any width
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "min": smaller,
    "max": larger,
    "copysign": lambda sign, size: np.copysign(size, sign),
}
_THROUGH_F64 = {"ex2": np.exp2, "lg2": np.log2, "rsqrt": lambda x: 1.0 / np.sqrt(x)}
_SOURCES = {"neg": 1, "abs": 1, "sqrt": 1, "rcp": 1, "ex2": 1, "lg2": 1, "rsqrt": 1, "fma": 3}


def _of_floats(name, modifiers, kinds):
    kind = kinds[-1]
    count = _SOURCES.get(name, 2)
    if len(kinds) == 2:
        return _mixed(name, kinds, count)
    function = (_packed if kind in _PACKED else _float_function)(name, modifiers, kind)
    return Operation(function, kind, (kind,) * count) if function else None


def _float_function(name, modifiers, kind):
    mode = next((part for part in modifiers if part in ROUNDINGS), "rn")
    if kind == "f64":
        return _f64_function(name, modifiers) if mode == "rn" else None
    if name in ("add", "sub", "mul", "fma") and mode != "rn":
        function = _directed(name, mode)
    elif name == "fma":
        function = fma_f32
    elif name in _THROUGH_F64:
        through = _THROUGH_F64[name]
        function = lambda x: through(x.astype(np.float64)).astype(np.float32)  # noqa: E731
    elif mode == "rn":
        function = _propagating(name) if "NaN" in modifiers else _FLOAT.get(name)
    else:
        function = None
    if function and "ftz" in modifiers:
        function = _flushing(function)
    if function and "sat" in modifiers:
        function = _saturating(function)
    return function


def _f64_function(name, modifiers):
    if name == "rcp" and "approx" in modifiers:
        return _rough_reciprocal
    if "approx" in modifiers or {"ftz", "sat", "NaN"} & set(modifiers):
        return None
    return fma_f64 if name == "fma" else _FLOAT.get(name)


def _rough_reciprocal(x):
    """rcp.approx.ftz.f64: of the upper halves of x, and only the upper half of the result."""
    coarse = (x.view(np.int64) & ~0xFFFFFFFF).view(np.float64)
    coarse = np.where(np.abs(coarse) < np.finfo(np.float64).tiny, np.copysign(0.0, coarse), coarse)
    result = (np.reciprocal(coarse).view(np.int64) & ~0xFFFFFFFF).view(np.float64)
    result = np.where(np.abs(result) < np.finfo(np.float64).tiny, np.copysign(0.0, result), result)
    return np.where(np.isnan(x), x, result)


def _directed(name, mode):
    zero = np.float32(-0.0)
    return {
        "add": lambda a, b: add_f32(a, b, mode),
        "sub": lambda a, b: add_f32(a, -b, mode),
        "mul": lambda a, b: fma_f32(a, b, np.full_like(a, zero), mode),
        "fma": lambda a, b, c: fma_f32(a, b, c, mode),
    }[name]


def _propagating(name):
    """min.NaN and max.NaN."""
    choose = {"min": smaller, "max": larger}[name]
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), choose(a, b))


def _flushing(function):
    return lambda *x: flushed(function(*(flushed(part) for part in x)))


def _saturating(function):
    return lambda *x: np.clip(np.nan_to_num(function(*x), nan=0.0), np.float32(0), np.float32(1))


def _packed(name, modifiers, kind):
    """Pairs of f32, and f16 and bf16 alone or in pairs, whose every operation is that of float32, rounded."""
    wide = _float_function(name, modifiers, "f32")
    if wide is None or (kind != "f32x2" and name not in ("neg", "abs", "min", "max", "add", "sub", "mul")):
        return None
    if kind == "f32x2":
        return lambda *x: wide(*(part.view(np.float32) for part in x)).view(np.uint64)
    narrow = kind.removesuffix("x2")
    dtype = DTYPES[kind]
    return lambda *x: narrowed(wide(*(widened(part.view(np.uint16), narrow) for part in x)), narrow).view(dtype)


def _mixed(name, kinds, count):
    """add.f32.bf16 and its like: all sources but the last are narrow, the last one and the result are float32."""
    wide, narrow = kinds
    if wide != "f32" or narrow not in ("f16", "bf16") or name not in ("add", "sub", "fma"):
        return None
    function = fma_f32 if name == "fma" else _FLOAT[name]
    return Operation(
        lambda *x: function(*(widened(part, narrow) for part in x[:-1]), x[-1]),
        "f32",
        (narrow,) * (count - 1) + ("f32",),
    )


# ---- integers -------------------------------------------------------------------------------------------------------


def _quotient(a, b):
    """Rounded to zero; by zero it is all ones."""
    whole = np.where(b == 0, 1, b).astype(b.dtype)
    result = a // whole
    if a.dtype.kind == "i":
        result += ((a % whole) != 0) & ((a < 0) != (whole < 0))
    return np.where(b == 0, np.array(-1).astype(a.dtype), result)


_INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
}
_INTEGER_SOURCES = {"neg": 1, "abs": 1, "not": 1}


def _of_integers(name, modifiers, kinds):
    (kind,) = kinds
    if kind not in _INTEGERS and kind != "pred":
        return None
    function = _INTEGER[name]
    if "relu" in modifiers:
        return Operation(lambda a, b: np.maximum(function(a, b), 0), kind, (kind, kind))
    if set(modifiers) - {kind}:
        return None
    if kind == "pred":
        function = {"not": np.logical_not}.get(name, function)
    return Operation(function, kind, (kind,) * _INTEGER_SOURCES.get(name, 2))


def _of_either(name, modifiers, kinds):
    return (_of_integers if kinds[-1] in _INTEGERS else _of_floats)(name, modifiers, kinds)


def _high(a, b):
    """The upper half of the product."""
    wide = {4: np.int64, 2: np.int32}.get(a.itemsize)
    if wide:
        wide = np.dtype(wide if a.dtype.kind == "i" else f"u{np.dtype(wide).name}")
        return (np.multiply(a, b, dtype=wide) >> (8 * a.itemsize)).astype(a.dtype)
    mask = 2**64 - 1
    products = [(int(x) * int(y) >> 64) & mask for x, y in zip(a, b, strict=True)]
    return np.array(products, dtype=np.uint64).view(a.dtype)


def _of_products(name, modifiers, kinds):
    kind = kinds[-1]
    if kind not in _INTEGERS:
        return _of_floats(name, modifiers, kinds) if name == "mul" else None
    if len(modifiers) != 2:
        return None
    form, result = modifiers[0], kind
    if form == "wide":
        result = f"{kind[0]}{2 * int(kind[1:])}"
        dtype = DTYPES[result]
        product = lambda a, b: np.multiply(a, b, dtype=dtype)  # noqa: E731
    else:
        product = {"lo": np.multiply, "hi": _high}[form]
    if name == "mul":
        return Operation(product, result, (kind, kind))
    return Operation(lambda a, b, c: product(a, b) + c, result, (kind, kind, result))


def _of_shifts(name, modifiers, kinds):
    (kind,) = kinds
    bits = 8 * DTYPES[kind].itemsize
    dtype = DTYPES[kind]

    def shift(a, by):
        held = np.minimum(by, bits - 1).astype(dtype)
        if name == "shl":
            return np.where(by < bits, a << held, dtype.type(0))
        moved = a >> held
        return moved if kind[0] == "s" else np.where(by < bits, moved, dtype.type(0))

    return Operation(shift, kind, (kind, "u32"))


def _funnel(name, modifiers, kinds):
    side, rule, _ = modifiers

    def shift(low, high, by):
        by = by & 31 if rule == "wrap" else np.minimum(by, 32)
        both = high.astype(np.uint64) << np.uint64(32) | low
        by = by.astype(np.uint64)
        return ((both << by) >> np.uint64(32) if side == "l" else both >> by).astype(np.uint32)

    return Operation(shift, "b32", ("u32", "u32", "u32"))


def _extract(name, modifiers, kinds):
    (kind,) = kinds
    dtype, bits = DTYPES[kind], 8 * DTYPES[kind].itemsize

    def field(a, start, length):
        start, length = np.minimum(start & 255, 64).astype(np.int64), (length & 255).astype(np.int64)
        wide = a.astype(np.int64 if dtype.kind == "i" else np.uint64)
        if dtype.kind == "u":
            taken = np.where(start < 64, wide >> np.minimum(start, 63).astype(np.uint64), 0)
            return (taken & _ones(length.astype(np.uint64))).astype(dtype)
        # the highest bit that is taken, or that there is, is the sign
        end = np.minimum(start + length, bits)
        kept = np.where(end > start, wide << (64 - np.maximum(end, 1)) >> (64 - np.maximum(end - start, 1)), 0)
        beyond = np.where(length > 0, wide >> 63, 0)
        return np.where(start < bits, kept, beyond).astype(dtype)

    return Operation(field, kind, (kind, "u32", "u32")) if kind[0] in "us" and bits in (32, 64) else None


def _insert(name, modifiers, kinds):
    (kind,) = kinds
    dtype, bits = DTYPES[kind], 8 * DTYPES[kind].itemsize

    def field(new, old, start, length):
        start, length = (start & 255).astype(np.uint64), (length & 255).astype(np.uint64)
        mask = np.where(start < bits, _ones(length) << np.minimum(start, 63), np.uint64(0))
        placed = new.astype(np.uint64) << np.minimum(start, 63)
        return ((old.astype(np.uint64) & ~mask) | (placed & mask)).astype(dtype)

    return Operation(field, kind, (kind, kind, "u32", "u32"))


def _ones(length):
    """That many low bits."""
    return np.where(length < 64, (np.uint64(1) << np.minimum(length, 63)) - np.uint64(1), np.uint64(2**64 - 1))


def _bit_lengths(a):
    """How many bits each number takes, without leading zeros."""
    length = np.zeros(a.shape, np.uint32)
    rest = a.astype(np.uint64)
    for step in (32, 16, 8, 4, 2, 1):
        large = rest >> np.uint64(step) != 0
        length += np.where(large, np.uint32(step), np.uint32(0))
        rest = np.where(large, rest >> np.uint64(step), rest)
    return length + (rest != 0)


def _count_bits(name, modifiers, kinds):
    (kind,) = kinds
    bits = 8 * DTYPES[kind].itemsize
    count = {
        "popc": lambda a: sum(((a >> a.dtype.type(i)) & a.dtype.type(1)).astype(np.uint32) for i in range(bits)),
        "clz": lambda a: bits - _bit_lengths(a),
        "bfind": lambda a: _bit_lengths(a) - np.uint32(1),  # of none: all ones
    }[name]
    return Operation(count, "u32", (kind,)) if kind[0] in "bu" and modifiers == [kind] else None


def _permute(name, modifiers, kinds):
    if modifiers != ["b32"]:
        return None

    def chosen(a, b, selector):
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.zeros(a.shape, np.uint32)
        for place in range(4):
            choice = selector >> np.uint32(4 * place)
            byte = (both >> ((choice & 7).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & 255
            sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
            result |= np.where(choice & 8, sign, byte) << np.uint32(8 * place)
        return result

    return Operation(chosen, "b32", ("b32", "b32", "b32"))


def _by_table(name, modifiers, kinds):
    def looked_up(a, b, c, table):
        result = np.zeros(a.shape, np.uint32)
        for place in range(8):
            row = (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
            result |= np.where(table >> np.uint32(place) & 1, row, np.uint32(0))
        return result

    return Operation(looked_up, "b32", ("b32",) * 4)


# ---- comparisons, choices, conversions ------------------------------------------------------------------------------


def _unordered(compare):
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_COMPARE = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARE_FLOATS = {
    **_COMPARE,
    **{f"{name}u": _unordered(compare) for name, compare in _COMPARE.items()},
    "ne": lambda a, b: (a < b) | (a > b),
    "neu": np.not_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMPARE_INTEGERS = {
    **_COMPARE,
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _set_predicate(name, modifiers, kinds):
    kind = kinds[-1]
    compare = (_COMPARE_INTEGERS if kind in _INTEGERS else _COMPARE_FLOATS).get(modifiers[0])
    combine = [_COMBINE[part] for part in modifiers if part in _COMBINE]
    if compare is None or set(modifiers[1:]) - {kind, "ftz", *_COMBINE}:
        return None
    if kind in ("f16", "bf16"):
        compare = _on_wide(compare, kind)
    elif kind in ("f16x2", "bf16x2"):
        return None if combine else Operation(_of_pairs(compare, kind.removesuffix("x2")), "pred", (kind, kind))
    elif "ftz" in modifiers:
        compare = _on_flushed(compare)
    if combine:
        return Operation(lambda a, b, p: combine[0](compare(a, b), p), "pred", (kind, kind, "pred"))
    return Operation(compare, "pred", (kind, kind))


def _on_wide(compare, kind):
    return lambda a, b: compare(widened(a, kind), widened(b, kind))


def _on_flushed(compare):
    return lambda a, b: compare(flushed(a), flushed(b))


def _of_pairs(compare, kind):
    def both(a, b):
        result = compare(widened(a.view(np.uint16), kind), widened(b.view(np.uint16), kind))
        return result[0::2], result[1::2]

    return both


def _select(name, modifiers, kinds):
    (kind,) = kinds
    return Operation(lambda a, b, p: np.where(p, a, b), kind, (kind, kind, "pred"))


def _convert(name, modifiers, kinds):
    options = set(modifiers) - set(kinds)
    if len(kinds) != 2:
        return None
    to, start = kinds
    if to in ("f16x2", "bf16x2"):
        narrow = to.removesuffix("x2")
        if start != "f32" or options != {"rn"}:
            return None
        join = lambda high, low: (  # noqa: E731
            narrowed(high, narrow).astype(np.uint32) << np.uint32(16) | narrowed(low, narrow)
        )
        return Operation(join, to, ("f32", "f32"))
    function = _conversion(to, start, options)
    return Operation(function, to, (start,)) if function else None


_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _conversion(to, start, options):
    narrow = ("f16", "bf16")
    if to in narrow and start == "f32" and options == {"rn"}:
        return lambda x: narrowed(x, to)
    if start in narrow and to == "f32" and not options:
        return lambda x: widened(x, start)
    if to in narrow or start in narrow:
        return None
    dtype = DTYPES[to]
    if to[0] != "f" and start[0] != "f":
        return None if options else lambda x: x.astype(dtype)
    if to[0] != "f":
        return _whole_numbers(to, start, options)
    if start[0] != "f":
        return (lambda x: x.astype(dtype)) if options == {"rn"} else None
    return _between_floats(to, options)


def _whole_numbers(to, start, options):
    rounding = next((_TO_WHOLE[part] for part in options if part in _TO_WHOLE), None)
    if rounding is None or options - {*_TO_WHOLE, "ftz"}:
        return None
    dtype = DTYPES[to]
    limits = np.iinfo(dtype)
    highest = float(limits.max) if dtype.itemsize < 8 else np.nextafter(float(limits.max), 0.0)
    of_nan = 0 if start != "f64" and dtype.itemsize < 8 else 1 << (8 * dtype.itemsize - 1)

    def whole(x):
        if "ftz" in options:
            x = flushed(x)
        exact = rounding(x.astype(np.float64))
        result = np.clip(np.nan_to_num(exact, nan=0.0), float(limits.min), highest).astype(dtype)
        result = np.where(exact > highest, dtype.type(limits.max), result)
        return np.where(np.isnan(exact), np.array(of_nan, np.uint64).astype(dtype), result)

    return whole


def _between_floats(to, options):
    dtype = DTYPES[to]
    if options - {"rn", "ftz", "sat", *_TO_WHOLE}:
        return None
    rounding = next((_TO_WHOLE[part] for part in options if part in _TO_WHOLE), None)
    function = lambda x: (rounding(x) if rounding else x).astype(dtype)  # noqa: E731
    if "ftz" in options:
        plain = function
        function = lambda x: flushed(plain(flushed(x)))  # noqa: E731
    return _saturating(function) if "sat" in options else function


_DECODERS: dict[str, Callable] = {
    **dict.fromkeys(("add", "sub", "div", "min", "max", "neg", "abs"), _of_either),
    **dict.fromkeys(("fma", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "copysign"), _of_floats),
    **dict.fromkeys(("rem", "and", "or", "xor", "not"), _of_integers),
    **dict.fromkeys(("mul", "mad"), _of_products),
    **dict.fromkeys(("shl", "shr"), _of_shifts),
    **dict.fromkeys(("popc", "clz", "bfind"), _count_bits),
    "shf": _funnel,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _by_table,
    "setp": _set_predicate,
    "selp": _select,
    "cvt": _convert,
}
