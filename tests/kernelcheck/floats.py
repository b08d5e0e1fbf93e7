"""Floating-point arithmetic as a GPU rounds it, on numpy arrays: fused multiply-add with one rounding, rounding in a
direction, flushed subnormals, 16-bit types. Every result is the correctly rounded one; where PTX promises less
(`.approx`, `.full`), instructions.py says what it takes instead.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np

TINY = np.finfo(np.float32).tiny
FEW = 24  # lanes up to which a call of the C library per lane is quicker than numpy


def _library_fma():
    """fma of Python 3.13, else of the C library that Python itself is linked with."""
    if hasattr(math, "fma"):
        return math.fma
    function = ctypes.CDLL(None).fma
    function.restype, function.argtypes = ctypes.c_double, (ctypes.c_double,) * 3
    return function


_fma = _library_fma()


def _one_by_one(a, b, c):
    if not np.ndim(a):
        return np.float64(_scalar_fma(float(a), float(b), float(c)))
    return np.array([_scalar_fma(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)])


def _scalar_fma(a: float, b: float, c: float) -> float:
    try:
        return _fma(a, b, c)
    except OverflowError:  # math.fma raises what the library returns
        return math.copysign(math.inf, a) * math.copysign(1.0, b)
    except ValueError:
        return math.nan


def two_sum(a, b):
    """The rounded sum and what the rounding left out, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _halves(a):
    """a as a sum of two numbers of 26 bits (Veltkamp)."""
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def two_product(a, b):
    """The rounded product and what the rounding left out, exactly (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _to_odd(total, error):
    """The sum of both, rounded to the neighbour with an odd last bit where it is inexact: rounding that once more, to
    fewer bits, is then the same as rounding the exact sum (Boldo and Melquiond)."""
    bits = total.view(np.int64)
    inexact_and_even = (np.abs(error) > 0) & ((bits & 1) == 0)
    outward = (error > 0) == (total > 0)
    return (bits + np.where(inexact_and_even, np.where(outward, 1, -1), 0)).view(np.float64)


def fma_f64(a, b, c):
    """a b + c, rounded once. Where the product is close to the ends of the range, the C library is asked."""
    if a.size <= FEW:
        return _one_by_one(a, b, c)
    product, low = two_product(a, b)
    low_sum, low_error = two_sum(c, low)
    high_sum, high_error = two_sum(product, low_sum)
    result = high_sum + _to_odd(*two_sum(low_error, high_error))
    # Whatever overflowed on the way has made the result NaN; the sign of a zero is that of the plain sum.
    plain = (np.abs(product) > 1e-280) & (np.abs(result) > 0.0)
    if plain.all():
        return result
    result = np.where(plain, result, product + c)
    hard = ~plain & (a != 0.0) & (b != 0.0) & np.isfinite(a) & np.isfinite(b)
    if hard.any():
        result[hard] = _one_by_one(a[hard], b[hard], c[hard])
    return result


def _rounded_f32(total, error, mode):
    """The float64 sum of both in float32, rounded once, in a mode of PTX."""
    result = total.astype(np.float32)
    if mode == "rn":
        between = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
        if between.any() or (np.abs(result) < TINY).any():
            return _to_odd(total, error).astype(np.float32)
        return result
    beyond = result - total  # exact, and larger than `error` unless it is 0
    beyond = np.where(beyond == 0.0, -error, beyond)
    below, above = np.nextafter(result, np.float32(-np.inf)), np.nextafter(result, np.float32(np.inf))
    down = np.where(beyond > 0.0, below, result)
    up = np.where(beyond < 0.0, above, result)
    return {"rm": down, "rp": up, "rz": np.where(total > 0.0, down, up)}[mode]


def fma_f32(a, b, c, mode="rn"):
    product = np.multiply(a, b, dtype=np.float64)  # exact
    if mode == "rn":
        total = product + c
        result = total.astype(np.float32)
        unclear = ((total.view(np.int64) & 0x1FFFFFFF) == 0x10000000) | (np.abs(result) < TINY)
        if not unclear.any():
            return result
    return _rounded_f32(*two_sum(product, c.astype(np.float64)), mode)


def add_f32(a, b, mode="rn"):
    if mode == "rn":
        return a + b
    return _rounded_f32(*two_sum(a.astype(np.float64), b.astype(np.float64)), mode)


def flushed(x):
    """Subnormal float32 numbers as zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def smaller(a, b):
    """The smaller one, or the one that is a number; -0 is less than 0."""
    result = np.fmin(a, b)
    zeros = (result == 0) & (a == b)
    return np.where(zeros, np.where(np.signbit(a), a, b), result) if zeros.any() else result


def larger(a, b):
    return -smaller(-a, -b)


def widened(bits, kind):
    """Numbers of a 16-bit type, given as bits, in float32."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x, kind):
    """The bits of float32 numbers in a 16-bit type, rounded to nearest even."""
    if kind == "f16":
        return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)
