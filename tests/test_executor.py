"""The PTX executor of tests/kernelcheck itself: its arithmetic against exact fractions, control flow, what the threads
of a warp do together, and kernels with one bug each, which it must refuse, and must run once the bug is repaired.
"""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from kernelcheck import executor, scheduler, toolchain
from kernelcheck.executor import (
    Deadlock,
    Divergence,
    ExecutionError,
    Misaligned,
    Module,
    OutOfBounds,
    Race,
    Uninitialised,
    Unsupported,
)

try:
    import triton
    import triton.language as tl
    from kernelcheck import cases_gpu, launches, on_device
except ImportError:
    triton = None

inf, nan = math.inf, math.nan
TYPES = {torch.float32: "f32", torch.float64: "f64", torch.int32: "b32", torch.int64: "b64", torch.int16: "b16"}

# ---- kernels of a few lines ------------------------------------------------------------------------------------------


def kernel(body, pointers, shared=0):
    """A module with one kernel `k`, whose parameters are %p0, %p1, ...; %tid and %ctaid are in %t and %c, and %o0, ...
    are the pointers at 4 bytes a thread of the grid further."""
    load = "".join(
        f"ld.param.u64 %p{i}, [k_{i}];\ncvta.to.global.u64 %p{i}, %p{i};\nadd.s64 %o{i}, %p{i}, %byte;\n"
        for i in range(pointers)
    )
    return Module(f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry k({", ".join(f".param .u64 k_{i}" for i in range(pointers))})
{{
.reg .pred %q<20>;
.reg .b16 %h<20>;
.reg .b32 %r<20>, %t, %c, %n, %i;
.reg .b64 %d<20>, %p<9>, %o<9>, %byte;
.shared .align 16 .b8 memory[{max(shared, 16)}];
mov.u32 %t, %tid.x;
mov.u32 %c, %ctaid.x;
mov.u32 %n, %ntid.x;
mad.lo.s32 %i, %c, %n, %t;
mul.wide.u32 %byte, %i, 4;
{load}
{body}
ret;
}}
""")


def launch(body, *tensors, threads=32, blocks=1, shared=0, **options):
    return executor.launch(kernel(body, len(tensors), shared), "k", (blocks,), threads, list(tensors), **options)


def computed(instruction, result, *sources):
    """What an instruction makes of tensors, element by element. `instruction` may name extra operands after the
    sources; `result` is a dtype, or bool for predicates."""
    opcode, _, extra = instruction.partition(" ")
    dtype = torch.int32 if result is bool else result
    letters = {2: "h", 4: "r", 8: "d"}
    size = {2: 1, 4: 2, 8: 3}
    lines, names = [], []
    for i, source in enumerate(sources):
        width = source.element_size()
        name = f"%{letters[width]}{i + 1}"
        lines += [f"shl.b64 %d10, %d9, {size[width]}", f"add.s64 %d10, %p{i + 1}, %d10"]
        lines.append(f"ld.global.b{8 * width} {name}, [%d10]")
        names.append(name)
    target = "%q1" if result is bool else f"%{letters[dtype.itemsize]}0"
    lines.append(f"{opcode} {', '.join([target, *names, *([extra] if extra else [])])}")
    if result is bool:
        lines.append("selp.b32 %r0, 1, 0, %q1")
    lines += [f"shl.b64 %d10, %d9, {size[dtype.itemsize]}", "add.s64 %d10, %p0, %d10"]
    lines.append(f"st.global.b{8 * dtype.itemsize} [%d10], %{letters[dtype.itemsize]}0")
    out = torch.zeros(sources[0].shape, dtype=dtype)
    sources = [source.contiguous() for source in sources]
    body = "cvt.u64.u32 %d9, %i;\n" + ";\n".join(lines) + ";"
    launch(body, out, *sources, threads=len(out))
    return out.bool() if result is bool else out


def of(dtype, *values):
    if dtype.is_floating_point:
        return torch.tensor(values, dtype=dtype)
    bits = 8 * dtype.itemsize  # unsigned literals, too
    return torch.tensor([(v + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for v in values], dtype=dtype)


def bits_of(x):
    """Bits, any NaN being like another."""
    canonical = torch.where(x.isnan(), torch.full_like(x, nan), x) if x.is_floating_point() else x
    return canonical.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_bits(got, expected):
    assert bits_of(got).tolist() == bits_of(expected).tolist(), (got, expected)


# ---- floating point --------------------------------------------------------------------------------------------------


def nearest(exact, mode, dtype):
    """A fraction rounded to float32 or float64: the candidates around it, compared exactly."""
    near = dtype(float(exact))
    around = sorted({dtype(np.nextafter(near, dtype(-inf))), near, dtype(np.nextafter(near, dtype(inf)))})
    finite = [x for x in around if np.isfinite(x)]
    below = max((x for x in finite if Fraction(float(x)) <= exact), default=finite[0])
    above = min((x for x in finite if Fraction(float(x)) >= exact), default=finite[-1])
    if mode in ("rm", "rp"):
        return below if mode == "rm" else above
    if mode == "rz":
        return below if exact > 0 else above
    to_below, to_above = exact - Fraction(float(below)), Fraction(float(above)) - exact
    if to_below == to_above:
        even = below.view(f"u{below.itemsize}") % 2 == 0
        return below if even else above
    return below if to_below < to_above else above


def numbers(dtype, count, seed, spread):
    """Floats whose exponents differ, and sums of which cancel."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(count) * 2.0 ** generator.integers(-spread, spread, count)
    return torch.from_numpy(values).to(dtype)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("spread", [2, 40])
def test_fma_f32_rounds_once(mode, spread):
    a, b, c = (numbers(torch.float32, 512, seed, spread) for seed in range(3))
    a, b = torch.cat([a, a]), torch.cat([b, b])
    c = torch.cat([c, -(a[:512] * b[:512]).nextafter(c)])  # all but cancels
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    expected = torch.tensor([nearest(x, mode, np.float32) for x in exact])
    assert_bits(computed(f"fma.{mode}.f32", torch.float32, a, b, c), expected)


# 1 + 2^-24 + 2^-60 lies just above the middle of two float32; rounded to float64 first, it would lie in the middle.
def test_fma_f32_does_not_round_twice():
    a, b, c = (
        of(torch.float32, *values)
        for values in (
            [1 + 2**-12],
            [
                2**-12,
            ],
            [1 + 2**-23],
        )
    )
    exact = Fraction(a.item()) * Fraction(b.item()) + Fraction(c.item())
    assert computed("fma.rn.f32", torch.float32, a, b, c).item() == float(nearest(exact, "rn", np.float32))
    tie = of(torch.float32, 1.0), of(torch.float32, 2.0**-24), of(torch.float32, 1.0)
    above = of(torch.float32, 1 + 2.0**-20), of(torch.float32, 2.0**-24), of(torch.float32, 1.0)
    hidden = of(torch.float32, 2.0**-24), of(torch.float32, 1.0), of(torch.float32, 1.0)
    assert computed("fma.rn.f32", torch.float32, *tie).item() == 1.0
    assert computed("fma.rn.f32", torch.float32, *above).item() == 1.0 + 2.0**-23
    assert computed("fma.rn.f32", torch.float32, *hidden).item() == 1.0
    odd = 1 + 2.0**-23  # c; the product is half a last place of it less 2^-70, which float64 cannot hold beside c
    product = of(torch.float32, 2.0**-12 * (1 - 2.0**-23)), of(torch.float32, 2.0**-12 * (1 + 2.0**-23))
    assert computed("fma.rn.f32", torch.float32, *product, of(torch.float32, odd)).item() == odd


@pytest.mark.parametrize("count", [8, 600], ids=["few lanes", "many lanes"])
@pytest.mark.parametrize("spread", [2, 60])
def test_fma_f64_rounds_once(count, spread):
    a, b, c = (numbers(torch.float64, count, seed, spread) for seed in range(3))
    a, b = torch.cat([a, a]), torch.cat([b, b])
    c = torch.cat([c, -(a[:count] * b[:count])])
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    expected = of(torch.float64, *(float(x) for x in exact))  # Python rounds fractions correctly
    assert_bits(computed("fma.rn.f64", torch.float64, a, b, c), expected)


# Overflow on the way but not in the end, subnormal products, exact zeros and what is not finite; among other lanes.
def test_fma_f64_at_the_ends_of_the_range():
    cases = [
        (1e300, 1e300, -inf, -inf),
        (1e200, 1e200, 0.0, inf),
        (2.0**1023, 2.0, -(2.0**1023), 2.0**1023),
        (2.0**-600, 2.0**-500, 0.0, 0.0),
        (2.0**-600, 2.0**-470, 2.0**-1074, 2.0**-1070 + 2.0**-1074),
        (1e-200, 1e-120, -1e-320, float(Fraction(1e-200) * Fraction(1e-120) - Fraction(1e-320))),
        (0.0, 5.0, -0.0, 0.0),
        (-0.0, 5.0, -0.0, -0.0),
        (3.0, 5.0, -15.0, 0.0),
        (inf, 0.0, 1.0, nan),
        (nan, 1.0, 1.0, nan),
        (inf, 1.0, -inf, nan),
        (2.0, 3.0, inf, inf),
        # just below the middle of two numbers, by less than what the sum of the two rests can hold
        (2.0**-53 * (1 + 2.0**-29), 1 - 2.0**-29, 1 + 2.0**-52, 1 + 2.0**-52),
        # the same where that rest is too small for a float64
        (
            2.0**-530 * (1 + 2.0**-29),
            2.0**-523 * (1 - 2.0**-29),
            2.0**-1000 * (1 + 2.0**-52),
            2.0**-1000 * (1 + 2.0**-52),
        ),
    ]
    columns = [of(torch.float64, *column) for column in zip(*(cases * 4), strict=True)]
    assert_bits(computed("fma.rn.f64", torch.float64, *columns[:3]), columns[3])


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div.rn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_arithmetic(name, dtype):
    a, b = numbers(dtype, 400, 0, 30), numbers(dtype, 400, 1, 30)
    edges = of(dtype, 0.0, -0.0, 1.0, inf, -inf, nan, 1e-310, 3e38, -3e38)
    grid = torch.cartesian_prod(edges, edges)
    a, b = torch.cat([a, grid[:, 0]]), torch.cat([b, grid[:, 1]])
    expected = {"add": a + b, "sub": a - b, "mul": a * b, "div.rn": a / b}[name]
    assert_bits(computed(f"{name}.{TYPES[dtype]}", dtype, a, b), expected)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "mul"])
def test_rounding_in_a_direction(name, mode):
    a, b = numbers(torch.float32, 400, 0, 20), numbers(torch.float32, 400, 1, 20)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    exact = [Fraction(x) + Fraction(y) if name == "add" else Fraction(x) * Fraction(y) for x, y in pairs]
    expected = torch.tensor([nearest(x, mode, np.float32) for x in exact])
    assert_bits(computed(f"{name}.{mode}.f32", torch.float32, a, b), expected)


LEAST = 2.0**-149  # of subnormal float32


@pytest.mark.parametrize(
    ("instruction", "sources", "expected"),
    [
        ("min.f32", ([1.0, nan, 0.0, -0.0, nan], [2.0, 3.0, -0.0, 0.0, nan]), [1.0, 3.0, -0.0, -0.0, nan]),
        ("max.f32", ([1.0, nan, 0.0, -0.0, nan], [2.0, 3.0, -0.0, 0.0, nan]), [2.0, 3.0, 0.0, 0.0, nan]),
        ("min.NaN.f32", ([1.0, nan, 3.0], [2.0, 3.0, nan]), [1.0, nan, nan]),
        ("max.NaN.f32", ([1.0, nan, 3.0], [2.0, 3.0, nan]), [2.0, nan, nan]),
        ("max.f32", ([1.0, nan], [5.0, 1.0], [3.0, 7.0]), [5.0, 7.0]),
        ("abs.f32", ([-1.0, -0.0, -inf, LEAST],), [1.0, 0.0, inf, LEAST]),
        ("abs.ftz.f32", ([-1.0, -0.0, -inf, LEAST],), [1.0, 0.0, inf, 0.0]),
        ("neg.f32", ([1.0, 0.0, inf],), [-1.0, -0.0, -inf]),
        ("sqrt.rn.f32", ([4.0, 2.0, -1.0, 0.0],), [2.0, 2.0**0.5, nan, 0.0]),
        ("rcp.rn.f32", ([4.0, 0.0, -inf],), [0.25, inf, -0.0]),
        ("ex2.approx.f32", ([1.0, 0.5, -inf, -149.0],), [2.0, 2.0**0.5, 0.0, LEAST]),
        ("ex2.approx.ftz.f32", ([1.0, -149.0, LEAST],), [2.0, 0.0, 1.0]),
        ("lg2.approx.f32", ([8.0, 0.0, -1.0],), [3.0, -inf, nan]),
        ("mul.ftz.f32", ([LEAST, 2.0**-100, -(2.0**-100)], [2.0, 2.0**-40, 2.0**-40]), [0.0, 0.0, -0.0]),
        ("mul.f32", ([LEAST, 2.0**-100], [2.0, 2.0**-40]), [2 * LEAST, 2.0**-140]),
        ("fma.rn.ftz.f32", ([LEAST, 3.0], [1e30, 2.0], [1.0, 0.5]), [1.0, 6.5]),
        ("cvt.sat.f32.f32", ([-1.0, 0.25, 7.0, nan],), [0.0, 0.25, 1.0, 0.0]),
        ("cvt.rni.f32.f32", ([0.5, 1.5, -2.5],), [0.0, 2.0, -2.0]),
        ("cvt.rmi.f32.f32", ([0.5, -1.5],), [0.0, -2.0]),
        ("copysign.f32", ([-1.0, 1.0], [3.0, -4.0]), [-3.0, 4.0]),
    ],
    ids=str,
)
def test_float32(instruction, sources, expected):
    given = [of(torch.float32, *source) for source in sources]
    assert_bits(computed(instruction, torch.float32, *given), of(torch.float32, *expected))


# What its callers refine: close, and no more than 20 bits of it.
def test_rough_reciprocal():
    x = torch.cat([numbers(torch.float64, 200, 0, 300), of(torch.float64, 0.0, -inf, 1e-310, 2.0**1023)])
    rough = computed("rcp.approx.ftz.f64", torch.float64, x)
    torch.testing.assert_close(rough[:200], 1 / x[:200], rtol=2.0**-19, atol=0)
    assert rough[200:].tolist() == [inf, -0.0, inf, 0.0]
    assert (rough[:200].view(torch.int64) & 0xFFFFFFFF).eq(0).all()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types(dtype, pairs):
    every = torch.arange(-(2**15), 2**15, 61).to(torch.int16).view(dtype)
    wide = every.float()
    between = (wide[:-1] + wide[1:]) / 2  # ties, if the two are neighbours
    ties = wide.nextafter(torch.full_like(wide, inf))
    step = torch.linspace(-3, 3, 501)
    given = torch.cat([wide, between, ties, step, 1e-6 * step, 1e5 * step, of(torch.float32, inf, nan, 3e38)])[:1024]
    kind = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    if pairs:
        both = computed(f"cvt.rn.{kind}x2.f32", torch.int32, given, given.flip(0))
        high, low = (both >> 16).to(torch.int16), both.to(torch.int16)
        assert_bits(high.view(dtype), given.to(dtype))
        assert_bits(low.view(dtype), given.flip(0).to(dtype))
    else:
        assert_bits(computed(f"cvt.rn.{kind}.f32", torch.int16, given).view(dtype), given.to(dtype))
        bits = every[:1024].view(torch.int16)
        assert_bits(computed(f"cvt.f32.{kind}", torch.float32, bits), every[:1024].float())
        mixed = computed(f"sub.rn.f32.{kind}", torch.float32, bits, given[: len(bits)])
        assert_bits(mixed, every[:1024].float() - given[: len(bits)])


def test_pairs_of_float32():
    a, b, c = (numbers(torch.float32, 64, seed, 4) for seed in range(3))
    packed = [x.view(torch.int64) for x in (a, b, c)]
    assert_bits(computed("mul.rn.f32x2", torch.int64, *packed[:2]).view(torch.float32), a * b)
    assert_bits(computed("add.f32x2", torch.int64, *packed[:2]).view(torch.float32), a + b)


@pytest.mark.parametrize(
    ("to", "start", "values", "expected"),
    [
        ("rzi.s32", torch.float32, [1.9, -1.9, nan, inf, -inf, 3e9], [1, -1, 0, 2**31 - 1, -(2**31), 2**31 - 1]),
        ("rni.s32", torch.float32, [0.5, 1.5, -2.5], [0, 2, -2]),
        ("rzi.u32", torch.float32, [3e9, -1.0, inf], [3_000_000_000, 0, 2**32 - 1]),
        ("rzi.s64", torch.float64, [1e15 + 0.5, -1.9, nan, 1e19], [10**15, -1, -(2**63), 2**63 - 1]),
    ],
)
def test_floats_to_integers(to, start, values, expected):
    dtype = torch.int64 if to.endswith("64") else torch.int32
    got = computed(f"cvt.{to}.{TYPES[start]}", dtype, of(start, *values))
    assert got.tolist() == of(dtype, *expected).tolist()


@pytest.mark.parametrize(
    ("instruction", "source", "to", "expected"),
    [
        ("cvt.rn.f32.s32", of(torch.int32, 2**24 + 1, 2**24 + 3, -1), torch.float32, [2.0**24, 2.0**24 + 4, -1.0]),
        ("cvt.rn.f32.u32", of(torch.int32, -1), torch.float32, [2.0**32]),
        ("cvt.rn.f64.u64", of(torch.int64, -1, 2**53 + 1), torch.float64, [2.0**64, 2.0**53]),
        ("cvt.rn.f32.f64", of(torch.float64, 1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50), torch.float32, [1, 1 + 2.0**-23]),
        ("cvt.f64.f32", of(torch.float32, 0.1, LEAST), torch.float64, [float(np.float32(0.1)), LEAST]),
        ("cvt.s64.s32", of(torch.int32, -5), torch.int64, [-5]),
        ("cvt.u64.u32", of(torch.int32, -5), torch.int64, [2**32 - 5]),
        ("cvt.u32.u64", of(torch.int64, 2**40 + 7), torch.int32, [7]),
        ("cvt.s32.s16", of(torch.int16, -7), torch.int32, [-7]),
        ("cvt.u32.u16", of(torch.int16, -7), torch.int32, [2**16 - 7]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_conversions(instruction, source, to, expected):
    assert_bits(computed(instruction, to, source), of(to, *expected))


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("unordered", [False, True])
def test_comparisons_of_floats(name, unordered):
    values = of(torch.float64, 0.0, -0.0, 1.0, inf, nan)
    a, b = torch.cartesian_prod(values, values).unbind(1)
    ordered = ~(a.isnan() | b.isnan())
    expected = getattr(torch, name)(a, b) & ordered if not unordered else getattr(torch, name)(a, b) | ~ordered
    assert computed(f"setp.{name}{'u' * unordered}.f64", bool, a, b).tolist() == expected.tolist()


def test_whether_numbers():
    values = of(torch.float32, 1.0, nan)
    a, b = torch.cartesian_prod(values, values).unbind(1)
    assert computed("setp.num.f32", bool, a, b).tolist() == [True, False, False, False]
    assert computed("setp.nan.f32", bool, a, b).tolist() == [False, True, True, True]


# ---- integers --------------------------------------------------------------------------------------------------------

INTEGERS = [0, 1, 2, 7, 31, 32, 33, 255, 2**31 - 1, 2**31, 2**32 - 1, 0x80000001, 0x12345678]


def signed(x, bits):
    return x - 2**bits if x >> (bits - 1) else x


def quotient(x, y, bits):
    x, y = signed(x, bits), signed(y, bits)
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) if y else -1


@pytest.mark.parametrize(
    ("instruction", "formula"),
    [
        ("add.s32", lambda x, y: x + y),
        ("sub.s32", lambda x, y: x - y),
        ("mul.lo.s32", lambda x, y: x * y),
        ("mul.hi.u32", lambda x, y: x * y >> 32),
        ("mul.hi.s32", lambda x, y: signed(x, 32) * signed(y, 32) >> 32),
        ("mul.wide.u32", lambda x, y: x * y),
        ("mul.wide.s32", lambda x, y: signed(x, 32) * signed(y, 32)),
        ("mad.lo.s32 5", lambda x, y: x * y + 5),
        ("div.s32", lambda x, y: quotient(x, y, 32)),
        ("div.u32", lambda x, y: x // y if y else -1),
        ("rem.u32", lambda x, y: x % y if y else x),
        ("min.s32", lambda x, y: min(signed(x, 32), signed(y, 32))),
        ("max.u32", max),
        ("max.relu.s32", lambda x, y: max(signed(x, 32), signed(y, 32), 0)),
        ("and.b32", lambda x, y: x & y),
        ("or.b32", lambda x, y: x | y),
        ("xor.b32", lambda x, y: x ^ y),
        ("shl.b32", lambda x, y: x << min(y, 32)),
        ("shr.u32", lambda x, y: x >> min(y, 32)),
        ("shr.s32", lambda x, y: signed(x, 32) >> min(y, 32)),
        ("shf.l.wrap.b32 3", lambda low, high: (high << 32 | low) << 3 >> 32),
        ("shf.r.clamp.b32 40", lambda low, high: high),
        ("shf.r.wrap.b32 40", lambda low, high: (high << 32 | low) >> 8),
        ("bfe.u32 5", lambda x, start: x >> (start & 255) & 31 if start & 255 < 32 else 0),
        ("bfe.s32 1", lambda x, start: -(x >> min(start & 255, 31) & 1)),
        ("bfi.b32 4, 8", lambda new, old: old & ~0xFF0 | (new & 255) << 4),
        ("prmt.b32 0x0123", lambda x, y: int.from_bytes(x.to_bytes(4, "little"), "big")),
        ("prmt.b32 0x7610", lambda x, y: x & 0xFFFF | (y >> 16) << 16),
        ("prmt.b32 0xBBBB", lambda x, y: 0xFFFFFFFF if x >> 31 else 0),
        ("lop3.b32 7, 0x96", lambda x, y: x ^ y ^ 7),
        ("lop3.b32 7, 0xEA", lambda x, y: x & y | 7),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_integers(instruction, formula):
    pairs = [(x, y) for x in INTEGERS for y in INTEGERS]
    a, b = (of(torch.int32, *column) for column in zip(*pairs, strict=True))
    dtype = torch.int64 if ".wide" in instruction else torch.int32
    expected = of(dtype, *(formula(x, y) for x, y in pairs))
    assert computed(instruction, dtype, a, b).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("instruction", "formula"),
    [
        ("mul.hi.u64", lambda x, y: x * y >> 64),
        ("mul.hi.s64", lambda x, y: signed(x, 64) * signed(y, 64) >> 64),
        ("mul.lo.s64", lambda x, y: x * y),
        ("div.s64", lambda x, y: quotient(x, y, 64)),
        ("max.s64", lambda x, y: max(signed(x, 64), signed(y, 64))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_integers_of_64_bits(instruction, formula):
    pairs = [(x << i, y << j) for x in INTEGERS[:9] for y in INTEGERS[:9] for i in (0, 32) for j in (0, 32)]
    a, b = (of(torch.int64, *column) for column in zip(*pairs, strict=True))
    expected = of(torch.int64, *(formula(x % 2**64, y % 2**64) for x, y in pairs))
    assert computed(instruction, torch.int64, a, b).tolist() == expected.tolist()


def test_counting_bits():
    x = of(torch.int32, *INTEGERS)
    assert computed("popc.b32", torch.int32, x).tolist() == [bin(v).count("1") for v in INTEGERS]
    assert computed("clz.b32", torch.int32, x).tolist() == [32 - v.bit_length() for v in INTEGERS]
    assert computed("bfind.u32", torch.int32, x).tolist() == [v.bit_length() - 1 for v in INTEGERS]


def test_vectors_of_registers():
    out = torch.zeros(32, dtype=torch.int64)
    body = """
cvt.u64.u32 %d1, %t;
shl.b64 %d2, %d1, 3;
add.s64 %d2, %p0, %d2;
mov.b64 %d3, {%t, 7};
mov.b64 {_, %r1}, %d3;
mov.b64 {%r2, %r3}, %d3;
add.s32 %r1, %r1, %r3;
mov.b64 %d4, {%r1, %r2};
st.global.v2.b32 [%d2], {%r1, %r2};
"""
    launch(body, out)
    assert out.tolist() == [t << 32 | 14 for t in range(32)]


# ---- control flow ----------------------------------------------------------------------------------------------------


# Every thread sums its own number of terms; then all meet at a shuffle, whatever way they came.
def test_loops_diverge_and_meet_again():
    out = torch.zeros(64, dtype=torch.int32)
    body = """
mov.b32 %r1, 0;
mov.b32 %r2, 0;
$loop:
setp.ge.u32 %q1, %r1, %t;
@%q1 bra $done;
add.s32 %r2, %r2, %r1;
add.s32 %r1, %r1, 1;
bra.uni $loop;
$done:
and.b32 %r3, %t, 1;
setp.eq.s32 %q2, %r3, 0;
@!%q2 bra $odd;
mul.lo.s32 %r2, %r2, 2;
bra.uni $meet;
$odd:
@%q1 neg.s32 %r2, %r2;
$meet:
shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
st.global.b32 [%o0], %r4;
"""
    launch(body, out, threads=64)
    sums = [t * (t - 1) // 2 * (-1 if t % 2 else 2) for t in range(64)]
    assert out.tolist() == [sums[t ^ 1] for t in range(64)]


def test_threads_may_end_early():
    out = torch.zeros(64, dtype=torch.int32)
    launch("setp.gt.u32 %q1, %t, 40;\n@%q1 ret;\nst.global.b32 [%o0], 1;", out, threads=64)
    assert out.tolist() == [1] * 41 + [0] * 23


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_blocks_and_their_order(order):
    tickets, counter = torch.zeros(40, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    body = """
setp.ne.s32 %q1, %t, 0;
@%q1 bra $end;
atom.global.add.u32 %r1, [%p1], 1;
mul.wide.u32 %d1, %c, 4;
add.s64 %d1, %p0, %d1;
st.global.b32 [%d1], %r1;
$end:
"""
    launch(body, tickets, counter, blocks=40, order=order, seed=3)
    drawn = tickets.tolist()
    assert counter.item() == 40
    assert sorted(drawn) == list(range(40))
    assert (drawn == sorted(drawn)) == (order == "forward")
    assert (drawn == sorted(drawn, reverse=True)) == (order == "reverse")


def test_grids_and_blocks_of_three_dimensions():
    out = torch.zeros(2 * 3 * 2 * 8 * 2 * 4, dtype=torch.int32)
    module = Module("""
.entry k(.param .u64 p) {
.reg .b32 %r<20>; .reg .b64 %d<4>;
mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z; mov.u32 %r4, %ntid.x; mov.u32 %r5, %ntid.y;
mov.u32 %r6, %ctaid.x; mov.u32 %r7, %ctaid.y; mov.u32 %r8, %ctaid.z; mov.u32 %r9, %nctaid.x; mov.u32 %r10, %nctaid.y;
mad.lo.s32 %r11, %r3, %r5, %r2; mad.lo.s32 %r11, %r11, %r4, %r1;
mad.lo.s32 %r12, %r8, %r10, %r7; mad.lo.s32 %r12, %r12, %r9, %r6;
mad.lo.s32 %r13, %r12, 64, %r11;
ld.param.u64 %d1, [p]; mul.wide.u32 %d2, %r13, 4; add.s64 %d1, %d1, %d2;
st.global.u32 [%d1], %r13; ret; }
""")
    executor.launch(module, "k", (2, 3, 2), (8, 2, 4), [out])
    assert out.tolist() == list(range(out.numel()))


# ---- warps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("down", 3, 31, lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("idx", 9, 31, lambda lane: 9),
        ("down", 1, 0x181F, lambda lane: lane + 1 if lane % 8 < 7 else lane),  # segments of 8
        ("idx", 2, 0x181F, lambda lane: lane // 8 * 8 + 2),
    ],
)
def test_shuffles(mode, by, clamp, source):
    out, inside = torch.zeros(2, 64, dtype=torch.int32)
    body = f"""
mul.lo.s32 %r1, %t, 10;
shfl.sync.{mode}.b32 %r2|%q1, %r1, {by}, {clamp}, -1;
selp.b32 %r3, 1, 0, %q1;
st.global.b32 [%o0], %r2;
st.global.b32 [%o1], %r3;
"""
    launch(body, out, inside, threads=64)
    assert out.tolist() == [10 * (t // 32 * 32 + source(t % 32)) for t in range(64)]
    moved = [source(t % 32) != t % 32 or mode in ("idx", "bfly") for t in range(64)]
    assert inside.bool().tolist() == moved


def test_votes_and_reductions():
    ballot, any_, all_, top, total = torch.zeros(5, 64, dtype=torch.int32)
    body = """
setp.gt.u32 %q1, %t, 36;
setp.lt.u32 %q2, %t, 32;
vote.sync.ballot.b32 %r1, %q1, -1;
st.global.b32 [%o0], %r1;
vote.sync.any.pred %q3, %q1, -1;
selp.b32 %r2, 1, 0, %q3;
st.global.b32 [%o1], %r2;
vote.sync.all.pred %q4, %q2, -1;
selp.b32 %r3, 1, 0, %q4;
st.global.b32 [%o2], %r3;
redux.sync.max.s32 %r4, %t, -1;
st.global.b32 [%o3], %r4;
redux.sync.add.s32 %r5, %t, -1;
st.global.b32 [%o4], %r5;
"""
    launch(body, ballot, any_, all_, top, total, threads=64)
    assert ballot.tolist() == of(torch.int32, *([0] * 32 + [0xFFFFFFE0] * 32)).tolist()
    assert any_.tolist() == [0] * 32 + [1] * 32
    assert all_.tolist() == [1] * 32 + [0] * 32
    assert top.tolist() == [31] * 32 + [63] * 32
    assert total.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


# Rows of eight 16-bit numbers at the addresses of eight threads; every thread has two neighbours of a row.
def test_matrices_in_shared_memory():
    out = torch.zeros(32, dtype=torch.int32)
    body = """
mul.lo.s32 %r1, %t, 16;
mov.b32 %r2, memory;
add.s32 %r2, %r2, %r1;
stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r2], {%t, 7};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];
mad.lo.s32 %r4, %t, 4, 0;
ld.shared.b32 %r5, [%r4+128];
mad.lo.s32 %r5, %r5, 100, %r3;
st.global.b32 [%o0], %r5;
"""
    launch(body, out, shared=1024)
    assert out.tolist() == [700 + t for t in range(32)]


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "start", "expected", "last"),
    [
        ("add.u32", 5, [5, 8, 11, 14], 17),
        ("min.s32", 5, [5, 3, 3, 3], 3),
        ("max.s32", -5, [-5, 3, 3, 3], 3),
        ("exch.b32", 5, [5, 3, 3, 3], 3),
        ("and.b32", 6, [6, 2, 2, 2], 2),
        ("or.b32", 4, [4, 7, 7, 7], 7),
        ("inc.u32", 2, [2, 3, 0, 1], 2),
    ],
)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(operation, start, expected, last, space):
    old, memory = torch.zeros(4, dtype=torch.int32), of(torch.int32, start)
    place = "%p1" if space == "global" else "memory"
    body = f"""
setp.eq.s32 %q1, %t, 0;
ld.global.b32 %r2, [%p1];
@%q1 st.shared.b32 [memory], %r2;
bar.sync 0;
atom.{space}.{operation} %r1, [{place}], 3;
st.global.b32 [%o0], %r1;
bar.sync 0;
ld.{space}.b32 %r3, [{place}];
bar.sync 0;
@%q1 st.global.b32 [%p1], %r3;
"""
    launch(body, old, memory, threads=4)
    assert old.tolist() == expected
    assert memory.item() == last


def test_compare_and_swap():
    old, memory = torch.zeros(4, dtype=torch.int32), of(torch.int32, 1)
    launch("atom.global.cas.b32 %r1, [%p1], %t, 9;\nst.global.b32 [%o0], %r1;", old, memory, threads=4)
    assert old.tolist() == [1, 1, 9, 9]


def test_arguments():
    module = Module("""
.entry k(.param .u64 out, .param .f32 x, .param .f64 y, .param .u32 n, .param .align 8 .b8 s[16], .param .u64 none) {
.reg .f32 %f<3>; .reg .f64 %fd<9>; .reg .b32 %r<3>; .reg .b64 %rd<4>;
ld.param.u64 %rd1, [out]; ld.param.f32 %f1, [x]; ld.param.f64 %fd1, [y]; ld.param.u32 %r1, [n];
mov.b64 %rd2, s; ld.param.f64 %fd2, [%rd2+8]; ld.param.u32 %r2, [s]; ld.param.u64 %rd3, [none];
cvt.f64.f32 %fd3, %f1; cvt.rn.f64.s32 %fd4, %r1; cvt.rn.f64.u32 %fd5, %r2; cvt.rn.f64.u64 %fd6, %rd3;
st.global.v2.f64 [%rd1], {%fd3, %fd1}; st.global.v2.f64 [%rd1+16], {%fd4, %fd2};
st.global.v2.f64 [%rd1+32], {%fd5, %fd6}; ret; }
""")
    out = torch.zeros(6, dtype=torch.float64)
    executor.launch(module, "k", (1,), 1, [out, 1.5, 0.1, -3, struct.pack("<Ixxxxd", 7, 0.25), None])
    assert out.tolist() == [1.5, 0.1, -3.0, 0.25, 7.0, 0.0]


def test_counters():
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    counted = launch(
        "ld.global.b32 %r1, [%o0];\nld.global.b32 %r2, [%p0];\nst.global.b32 [%o1], %r1;", x, y, threads=64
    )
    # two warps read 128 bytes each in four sectors, then one sector each of the first; both tensors are 256 bytes
    assert counted[1:] == (4, 10, 2, 8, 256, 256)
    assert counted.warp_instructions == 2 * (5 + 6 + 3 + 1)


# ---- bugs in PTX -----------------------------------------------------------------------------------------------------

# Lines that are left out, or put in, between the right and the broken form of a kernel of two warps and two blocks.
BUGS = {
    "missing barrier": (
        "st.shared.b32 [%r1], %t;\n{right}xor.b32 %r2, %r1, 128;\nld.shared.b32 %r3, [%r2];",
        "bar.sync 0;\n",
        "",
        Race,
    ),
    "write after read": (
        "st.shared.b32 [%r1], %t;\nbar.sync 0;\nxor.b32 %r2, %r1, 128;\nld.shared.b32 %r3, [%r2];\n{right}"
        "st.shared.b32 [%r1], 0;",
        "bar.sync 0;\n",
        "",
        Race,
    ),
    "missing warp barrier": (
        "st.shared.b32 [%r1], %t;\n{right}xor.b32 %r2, %r1, 4;\nld.shared.b32 %r3, [%r2];",
        "bar.warp.sync -1;\n",
        "",
        Race,
    ),
    "different values": ("and.b32 %r2, %t, 1;\nst.shared.b32 [memory], {right};", "7", "%r2", Race),
    # the upper half is NaN of either sign
    "different halves": (
        "and.b32 %r2, %t, 1;\nshl.b32 %r3, %r2, 31;\nor.b32 %r3, %r3, 0x7fc00000;\nmov.b64 %d1, {{{right}, %r3}};\n"
        "st.shared.b64 [memory], %d1;",
        "%c",
        "%r2",
        Race,
    ),
    "beyond shared": ("st.shared.b32 [%r1+{right}], 0;", "256", "260", OutOfBounds),
    "before shared": ("st.shared.b32 [%r1+{right}], 0;", "0", "-4", OutOfBounds),
    "beyond global": ("st.global.b32 [%o0+{right}], 0;", "0", "4", OutOfBounds),
    "before global": ("ld.global.b32 %r2, [%o0+{right}];", "0", "-4", OutOfBounds),
    "misaligned": ("ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%p0+{right}];", "16", "8", Misaligned),
    "misaligned shared": (
        "st.shared.b32 [%r1], 0;\nbar.sync 0;\nld.shared.v2.b32 {{%r2, %r3}}, [memory+{right}];",
        "8",
        "4",
        Misaligned,
    ),
    "unwritten shared": (
        "setp.lt.u32 %q1, %t, {right};\n@%q1 st.shared.b32 [%r1], 1;\nbar.sync 0;\nld.shared.b32 %r2, [memory+252];",
        "64",
        "63",
        Uninitialised,
    ),
    "partial barrier": ("setp.lt.u32 %q1, %t, {right};\n@!%q1 bra $end;\nbar.sync 0;\n$end:", "64", "32", Divergence),
    "two barriers": (
        "setp.lt.u32 %q1, %t, {right};\n@%q1 bra $there;\nbar.sync 0;\nbra $end;\n$there:\nbar.sync 0;\n$end:",
        "64",
        "32",
        Divergence,
    ),
    "absent lanes": (
        "setp.lt.u32 %q1, %t, {right};\n@!%q1 bra $end;\nshfl.sync.bfly.b32 %r2, %t, 1, 31, -1;\n$end:",
        "64",
        "48",
        Divergence,
    ),
    "lanes that have ended": (
        "setp.lt.u32 %q1, %t, {right};\n@!%q1 ret;\nshfl.sync.bfly.b32 %r2, %t, 1, 31, -1;",
        "32",
        "31",
        Divergence,
    ),
    "lane outside of the mask": (
        "setp.lt.u32 %q1, %t, 16;\n@!%q1 bra $end;\nshfl.sync.bfly.b32 %r2, %t, {right}, 31, 0xFFFF;\n$end:",
        "8",
        "16",
        Divergence,
    ),
    "thread outside of the mask": ("vote.sync.any.pred %q1, %q2, {right};", "-1", "0xFFFF", Divergence),
    "increment": (
        "{right}",
        "red.global.add.u32 [%p0], 1;",
        "ld.global.b32 %r2, [%p0];\nadd.s32 %r2, %r2, 1;\nst.global.b32 [%p0], %r2;",
        Race,
    ),
    "plain read of a counter": ("red.global.add.u32 [%p0], 1;\n{right}", "", "ld.global.b32 %r2, [%p0];", Race),
    "overlap of blocks": (
        "shl.b32 %r2, %c, {right};\nadd.s32 %r2, %r2, %t;\nmul.wide.u32 %d1, %r2, 4;\n"
        "add.s64 %d1, %p0, %d1;\nst.global.b32 [%d1], %c;",
        "6",
        "5",
        Race,
    ),
    "message without release": (
        "setp.ne.s32 %q1, %t, 0;\n@%q1 bra $end;\nsetp.ne.s32 %q2, %c, 0;\n@%q2 bra $read;\nst.global.b32 [%p0+8], 7;\n"
        "red.{right}.gpu.global.add.u32 [%p0+4], 1;\nbra $end;\n$read:\nld.acquire.gpu.global.u32 %r2, [%p0+4];\n"
        "setp.eq.s32 %q3, %r2, 0;\n@%q3 bra $read;\nld.global.b32 %r3, [%p0+8];\n$end:",
        "release",
        "relaxed",
        Race,
    ),
    "fence after the message": (
        "setp.ne.s32 %q1, %t, 0;\n@%q1 bra $end;\nsetp.ne.s32 %q2, %c, 0;\n@%q2 bra $read;\nst.global.b32 [%p0+8], 7;\n"
        "{right}\nbra $end;\n$read:\nld.volatile.global.u32 %r2, [%p0+4];\nsetp.eq.s32 %q3, %r2, 0;\n@%q3 bra $read;\n"
        "fence.acq_rel.gpu;\nld.global.b32 %r3, [%p0+8];\n$end:",
        "membar.gl;\nred.global.add.u32 [%p0+4], 1;",
        "red.global.add.u32 [%p0+4], 1;\nmembar.gl;",
        Race,
    ),
    "endless loop": (
        "$again:\nld.volatile.global.b32 %r2, [%p0];\nsetp.ne.s32 %q1, %r2, {right};\n@%q1 bra $again;",
        "0",
        "1",
        Deadlock,
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs(bug):
    text, right, broken, error = BUGS[bug]
    start = "mov.b32 %r1, memory;\nshl.b32 %r2, %t, 2;\nadd.s32 %r1, %r1, %r2;\n"
    for part in (right, broken):
        out = torch.zeros(128, dtype=torch.int32)
        body = start + text.format(right=part)
        size = 512 if bug == "beyond shared" else 256
        if part == broken:
            with pytest.raises(error, match=r"^k[,:].*block \d+ thread \d+"):
                launch(body, out, threads=64, blocks=2, shared=size)
        else:
            launch(body, out, threads=64, blocks=2, shared=size)


# A message names the thread, the instruction and the tensor.
def test_messages():
    with pytest.raises(
        OutOfBounds, match=r"k, block 1 thread 63, `st\.global\.b32 \[%o0\+4\], 0`: .* byte 512 of k_0 "
    ):
        launch("st.global.b32 [%o0+4], 0;", torch.zeros(128, dtype=torch.int32), threads=64, blocks=2)
    with pytest.raises(Race, match=r"block 0 thread 0 at `st.* and block 1 thread 0 at `st.* race for byte 8 of k_0"):
        launch("st.global.b32 [%p0+8], 0;", torch.zeros(128, dtype=torch.int32), threads=1, blocks=2)


def test_endless_loops_of_plain_code(monkeypatch):
    monkeypatch.setattr(scheduler, "STEPS", 1000)
    with pytest.raises(Deadlock, match="no end"):
        launch("$again:\nadd.s32 %r1, %r1, 1;\nbra $again;", torch.zeros(32))


# Waiting blocks see what a block writes that is not resident with them only if all are.
def test_waiting_for_a_block_that_is_not_resident(monkeypatch):
    monkeypatch.setattr(executor, "RESIDENT", 32)
    body = """
setp.ne.s32 %q1, %t, 0;
@%q1 bra $end;
red.release.gpu.global.add.u32 [%p0], 1;
$again:
ld.acquire.gpu.global.u32 %r2, [%p0];
setp.lt.u32 %q2, %r2, 3;
@%q2 bra $again;
$end:
"""
    counter = torch.zeros(1, dtype=torch.int32)
    launch(body, counter, blocks=3, cooperative=True)
    assert counter.item() == 3
    with pytest.raises(Deadlock):
        launch(body, counter.zero_(), blocks=3)


@pytest.mark.parametrize(
    "body",
    [
        "tanh.approx.f32 %r1, %r2;",
        "add.rn.bf16x9 %r1, %r2, %r3;",
        "add.rm.f64 %d1, %d2, %d3;",
        "cvt.rz.f32.f64 %r1, %d1;",
        "ld.global.v8.f32 %r1, [%p0];",
        "ld.const.b32 %r1, [%p0];",
        "mov.u32 %r1, %clock;",
        "mov.u32 %r1, unknown;",
        "bar.sync 1;",
        "bar.sync 0, 16;",
        "cp.async.ca.shared.global [%r1], [%p0], 4;",
        "call.uni f, ();",
        "add.s32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "atom.global.add.noftz.f16 %h1, [%p0], %h2;",
        "shfl.sync.bfly.b64 %d1, %d2, 1, 31;",
        "brx.idx %r1, table;",
    ],
)
def test_unknown_instructions_are_refused(body):
    with pytest.raises(Unsupported, match="k: "):
        launch(body, torch.zeros(64))


@pytest.mark.parametrize(
    ("grid", "threads", "arguments", "error", "match"),
    [
        ((1,), 32, [], ValueError, "takes 1 arguments, got 0"),
        ((1,), 32, [b"1234"], ValueError, "takes 8 bytes, got 4"),
        ((0,), 32, [None], ValueError, "grid"),
        ((1,), 32, [torch.empty(3, device="meta")], ValueError, "must be a CPU tensor"),
        ((1,), 64, [None], ExecutionError, "with .32. threads"),
    ],
)
def test_launches_that_cannot_be(grid, threads, arguments, error, match):
    module = Module(".entry k(.param .u64 p) .reqntid 32 { ret; }")
    with pytest.raises(error, match=match):
        executor.launch(module, "k", grid, threads, arguments)


def test_a_null_pointer_is_outside_of_everything():
    with pytest.raises(OutOfBounds, match="memory"):
        executor.launch(kernel("ld.global.b32 %r1, [%p0];", 1), "k", (1,), 1, [None], memory=[torch.zeros(1)])


# ---- bugs in CUDA ----------------------------------------------------------------------------------------------------

CUDA_BUGS = {
    "missing_barrier": Race,
    "reused_too_early": Race,
    "missing_warp_barrier": Race,
    "missing_barrier_of_global_memory": Race,
    "unwritten_shared": Uninitialised,
    "beyond_shared": OutOfBounds,
    "beyond_global": OutOfBounds,
    "misaligned": Misaligned,
    "divergent_barrier": Divergence,
    "partial_barrier": Divergence,
    "partial_shuffle": Divergence,
    "shuffle_from_an_absent_lane": Divergence,
    "missing_grid_barrier": Race,
    "plain_increment": Race,
    "early_ticket": Race,
    "unfenced_ticket": Race,
    "unfenced_sum": Race,
    "plain_ticket": Race,
    "waits_for_ever": Deadlock,
}


def launch_bug(arch, name, broken, order, blocks=4):
    module = Module(toolchain.ptx("executor_bugs.cu", arch))
    out = torch.full((64 * blocks,), nan, dtype=torch.float64)
    partials, ticket = torch.zeros(blocks, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    memory = [out, partials, ticket]
    pointers = struct.pack("<QQQ", *(tensor.data_ptr() for tensor in memory))
    options = {"cooperative": name in ("missing_grid_barrier", "waits_for_ever"), "order": order, "seed": 1}
    executor.launch(module, name, (blocks,), 64, [pointers, broken], memory=memory, **options)
    return out


@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize("bug", CUDA_BUGS)
def test_bugs_of_cuda(bug, arch):
    for order in ("forward", "reverse", "random"):
        assert launch_bug(arch, bug, False, order).eq(1).all()
        with pytest.raises(CUDA_BUGS[bug], match=bug):
            launch_bug(arch, bug, True, order)


# cooperative_groups traps where the host has not set up a grid barrier.
def test_a_grid_barrier_needs_a_cooperative_launch():
    module = Module(toolchain.ptx("executor_bugs.cu", 80))
    memory = [torch.zeros(256, dtype=torch.float64) for _ in range(3)]
    pointers = struct.pack("<QQQ", *(tensor.data_ptr() for tensor in memory))
    with pytest.raises(ExecutionError, match="grid barrier"):
        executor.launch(module, "missing_grid_barrier", (4,), 64, [pointers, False], memory=memory)


# ---- Triton ----------------------------------------------------------------------------------------------------------

if triton:
    compiles = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets in this process")

    @triton.jit
    def _scaled(x_ptr, out_ptr, total_ptr, n, MASKED: tl.constexpr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
        if MASKED:
            tl.store(out_ptr + i, 2 * x, mask=i < n)
        else:
            tl.store(out_ptr + i, 2 * x)
        if ATOMIC:
            tl.atomic_add(total_ptr, tl.sum(x))
        else:
            tl.store(total_ptr, tl.load(total_ptr) + tl.sum(x))

    @compiles
    @pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
    def test_bugs_of_triton(arch):
        def scaled(**constants):
            x, out, total = torch.randn(1000), torch.zeros(1000), torch.zeros(1)
            with launches.executed(launches.TARGETS[arch]):
                _scaled[(4,)](x, out, total, 1000, BLOCK=256, **constants)
            torch.testing.assert_close(out, 2 * x, rtol=0, atol=0)
            torch.testing.assert_close(total, x.sum()[None], rtol=0, atol=1e-3)

        scaled(MASKED=True, ATOMIC=True)
        with pytest.raises(OutOfBounds, match=r"_scaled, block 3 .* byte 4000 of _scaled_param_1 "):
            scaled(MASKED=False, ATOMIC=True)
        with pytest.raises(Race, match="_scaled_param_2"):
            scaled(MASKED=True, ATOMIC=False)

    # One kernel of each family; `make audit` has the others.
    @compiles
    @pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
    @pytest.mark.parametrize("name", ["dual kl", "transport_step linf", "rowloss trades bfloat16"])
    def test_our_kernels(name, arch):
        case = next(case for case in cases_gpu.cases(core=True) if case.name.startswith(name))
        with launches.executed(launches.TARGETS[arch]) as launched:
            case.run(on_device.operators("triton"))
        assert len(launched) == 1
        assert launched[0][1].bytes_written > 0
