"""armor::transport_* in Triton, the only GPU form of the family: one program moves one sample (docs/math.md, 5).

A sample of up to HELD bytes is read once, kept in registers and written once; a larger one is read again, block by
block, as often as its kind needs sums. The formulas are those of csrc/include/armor/transport.h, under the same names.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from armor.library import COSTLY, dense_like, forgiven, real
from armor_kernels.launch import contiguous, device_guard

HELD = 65536  # bytes of the largest sample that one program keeps in registers, in the dtype it computes in
BLOCK = 4096  # elements that it reads at a time of a larger one

LINF, L2, L1, NORM_POWER, SOFT_BALL, BINARY = (tl.constexpr(i) for i in range(6))
GAUSSIAN, CLEAN = tl.constexpr(3), tl.constexpr(4)  # starts; 0 to 2 are uniform in the linf, l2 and l1 ball
NOISE, ROUNDING, EXTRA = (tl.constexpr(i) for i in range(3))  # streams of random numbers
INF = tl.constexpr(float("inf"))
MAX_MU = tl.constexpr(1e30)
MAX_ROUNDS = tl.constexpr(128)  # of the search for theta: twice the bits of a float64


def transport_init(
    x: Tensor,
    seeds: Tensor | None,
    radii: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    start: int,
    radius: float,
    lo: float,
    hi: float,
    feed_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches one program per sample of `x` [B, ...]."""
    x_adv = dense_like(x)
    status, feed = _per_sample(x, torch.int32), _new_feed(x_adv, mean, feed_dtype)
    if x.numel():
        with device_guard(x):
            _init[(x.shape[0],)](
                _in_layout_of(x_adv, x),
                x_adv,
                status,
                feed,
                *_dense(seeds, radii, mean, std),
                radius,
                lo,
                hi,
                START=start,
                **_geometry(x_adv),
            )
    return x_adv, status, x.new_empty(0) if feed is None else feed


def transport_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    mu: Tensor | None,
    radii: Tensor | None,
    active: Tensor | None,
    seeds: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    kind: int,
    radius: float,
    step_size: float,
    weight: float,
    power: float,
    norm: int,
    variant: int,
    lo: float,
    hi: float,
    targeted: bool,
    final: bool,
    feed_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches one program per sample of `x` [B, ...]: ascent, projection, and what the next step needs."""
    x_next = dense_like(x, x_adv, grad)
    status, feed = _per_sample(x, torch.int32), _new_feed(x_next, mean, feed_dtype)
    costs = _per_sample(x, real(x)) if final and kind in COSTLY else None
    if x.numel():
        with device_guard(x):
            _step[(x.shape[0],)](
                *(_in_layout_of(x_next, t) for t in (x_adv, grad, x)),
                x_next,
                status,
                costs,
                feed,
                mu,
                *_dense(radii, active, seeds, mean, std),
                0 if mu is None else mu.expand(x.shape[0]).stride(0),
                radius,
                step_size,
                weight,
                power,
                lo,
                hi,
                KIND=kind,
                NORM=norm,
                VARIANT=variant,
                TARGETED=targeted,
                ROUND=final and kind == 5,
                **_geometry(x_next),
            )
    none = x.new_empty(0)
    return x_next, status, none.to(real(x)) if costs is None else costs, none if feed is None else feed


def transport_cost(
    x_adv: Tensor,
    x: Tensor,
    radii: Tensor | None,
    kind: int,
    radius: float,
    weight: float,
    power: float,
    norm: int,
    lo: float,
    hi: float,
) -> Tensor:
    """Launches one program per sample of `x` [B, ...]."""
    # any order of the elements will do, so that layouts in common need no copy
    layout = dense_like(x, x_adv)
    costs = _per_sample(x, real(x))
    if x.numel():
        with device_guard(x):
            _cost[(x.shape[0],)](
                _in_layout_of(layout, x_adv),
                _in_layout_of(layout, x),
                costs,
                *_dense(radii),
                radius,
                weight,
                power,
                lo,
                hi,
                forgiven(x.dtype),
                KIND=kind,
                NORM={0: 0, 1: 2, 2: 1, 5: 0}.get(kind, norm),
                **_geometry(layout),
            )
    return costs


def _per_sample(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a kernel fills for every sample; zeros where samples have no elements and nothing is launched."""
    return x.new_empty(x.shape[0], dtype=dtype) if x.numel() else x.new_zeros(x.shape[0], dtype=dtype)


def _new_feed(x: Tensor, mean: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if mean is None and dtype is None else torch.empty_like(x, dtype=dtype or x.dtype)


def _dense(*given: Tensor | None) -> list[Tensor | None]:
    return [contiguous(t) for t in given]


def _in_layout_of(layout: Tensor, t: Tensor) -> Tensor:
    """`t` in the memory order of the outputs; a copy only where the inputs disagree (then that order is contiguous)."""
    return t.contiguous() if layout.is_contiguous() else t


def _geometry(x: Tensor) -> dict[str, object]:
    """The arguments that say how the elements of a sample lie in memory and who holds them."""
    n = x.numel() // x.shape[0]
    channels = x.shape[1] if x.dim() > 1 else 1
    unit = math.gcd(n, 16)
    single = n * real(x).itemsize <= HELD
    block = max(32, triton.next_power_of_2(n)) if single else BLOCK
    return {
        "units": n // unit,
        "channels": channels,
        "spatial": n // channels,
        "UNIT": unit,  # vector loads need to know by what n can be divided
        "LAST": not x.is_contiguous(),
        "SINGLE": single,
        "BLOCK": block,
        # a thread holds 16 elements of a whole sample, and few enough of a block to need no more than its registers
        "num_warps": min(16, max(1, block // 512)) if single else 16,
        # x + (2u - 1) r must be rounded twice, as on every other backend
        "enable_fp_fusion": False,
    }


# ---- formulas of one element -----------------------------------------------------------------------------------------


@triton.jit
def _like(zero, number):
    """A number that is an argument, in the dtype of `zero`; Triton's interpreter hands it over as a Python float."""
    return (zero + number).to(zero.dtype)


@triton.jit
def _sign(v):
    return tl.where(v > 0.0, 1.0, tl.where(v < 0.0, -1.0, 0.0)).to(v.dtype)


@triton.jit
def _clamp(v, lo, hi):
    """NaN stays NaN, as in torch."""
    v = tl.maximum(v, lo, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, hi, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _finite(v):
    """The product of inf and 0 is NaN, that of the largest number and 0 is not."""
    return tl.minimum(v, 1.7976931348623157e308 if v.dtype == tl.float64 else 3.4028234663852886e38)


@triton.jit
def _bits(v):
    """The bit pattern of |v|: orders the numbers as they are, with inf above all and NaN above inf."""
    return tl.abs(v).to(tl.int64 if v.dtype == tl.float64 else tl.int32, bitcast=True)


@triton.jit
def _beyond(d, r):
    """The part of d that leaves the linf ball."""
    return tl.where(tl.abs(d) > r, d - r * _sign(d), 0.0)


@triton.jit
def _power(base, exponent):
    """base ** exponent for base >= 0. Whole exponents are common, and float64 is slow on many devices."""
    if exponent == 0.0:
        result = (base * 0.0 + 1.0).to(tl.float64)
    elif exponent == 1.0:
        result = base.to(tl.float64)
    elif exponent == 2.0:
        result = (base * base).to(tl.float64)
    elif exponent == -1.0:
        result = (1.0 / base).to(tl.float64)
    else:
        result = tl.exp2(tl.log2(base.to(tl.float64)) * exponent)
    return result.to(base.dtype)


@triton.jit
def _pulled(g, d, pull, length, NORM: tl.constexpr):
    """The gradient of the loss less that of mu weight ||d||^power."""
    if NORM == 2:
        cost = pull * d
    elif NORM == 1:
        cost = pull * _sign(d)
    else:
        cost = tl.where(tl.abs(d) == length, pull * _sign(d), 0.0)
    return g - tl.where(length > 0.0, cost, 0.0)


@triton.jit
def _feasible(a, g, lo, hi):
    return ((g > 0.0) & (a < hi)) | ((g < 0.0) & (a > lo))


@triton.jit
def _shrunk(d, x, theta, lo, hi):
    """What the l1 projection with multiplier theta leaves of |d| in the box."""
    return tl.minimum(tl.maximum(tl.abs(d) - theta, 0.0), tl.where(d > 0.0, hi - x, x - lo))


# ---- random numbers ------------------------------------------------------------------------------------------------


@triton.jit
def _words(seed, j, STREAM: tl.constexpr):
    """The four words of Philox among which that of element j is. Often the compiler shares them among the neighbours
    that a thread holds."""
    zero = (j * 0).to(tl.int32)
    # no sample has 2^34 elements, hence 0 for the upper half of the counter
    return tl.philox(seed, (j >> 2).to(tl.int32), zero, zero + STREAM, zero)


@triton.jit
def _word(seed, j, STREAM: tl.constexpr):
    w0, w1, w2, w3 = _words(seed, j, STREAM)
    return tl.where((j & 2) == 0, tl.where((j & 1) == 0, w0, w1), tl.where((j & 1) == 0, w2, w3))


@triton.jit
def _uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _exponential(u):
    """-log u (Cephes' logf)."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - exponent * 8388608).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    poly = 7.0376836292e-2 * x - 1.1514610310e-1
    poly = poly * x + 1.1676998740e-1
    poly = poly * x - 1.2420140846e-1
    poly = poly * x + 1.4249322787e-1
    poly = poly * x - 1.6668057665e-1
    poly = poly * x + 2.0000714765e-1
    poly = poly * x - 2.4999993993e-1
    poly = poly * x + 3.3333331174e-1
    tail = poly * x * x * x - 2.12194440e-4 * e - 0.5 * x * x
    return -(x + tail + 0.693359375 * e)


@triton.jit
def _on_circle(u, sine):
    """sin(2 pi u) where `sine` is 1 and cos(2 pi u) where it is 0 (polynomials of Cephes)."""
    quarter = (4.0 * u + 0.5).to(tl.int32)
    t = (u - 0.25 * quarter.to(tl.float32)) * 6.283185307179586
    t2 = t * t
    s = ((-1.9515295891e-4 * t2 + 8.3321608736e-3) * t2 - 1.6666654611e-1) * t2 * t + t
    c = ((2.443315711809948e-5 * t2 - 1.388731625493765e-3) * t2 + 4.166664568298827e-2) * t2 * t2 - 0.5 * t2 + 1.0
    v = tl.where(((quarter + sine) & 1) == 1, s, c)
    return tl.where(((quarter + 1 - sine) & 2) == 2, -v, v)


@triton.jit
def _gaussian(seed, j):
    """Element j of Box and Muller's pairs."""
    w0, w1, w2, w3 = _words(seed, j, NOISE)
    length = _sqrt(2.0 * _exponential(_uniform(tl.where((j & 2) == 0, w0, w2))))
    return length * _on_circle(_uniform(tl.where((j & 2) == 0, w1, w3)), (j & 1).to(tl.int32))


@triton.jit
def _sqrt(v):
    if v.dtype == tl.float64:
        return tl.sqrt(v)
    else:
        return tl.sqrt_rn(v)


# ---- sums over a sample: a length is (max |v| or sum |v|, squares or ties) -------------------------------------------


@triton.jit
def _largest(v):
    """max |v|, and NaN where there is one."""
    return tl.max(_bits(v), 0).to(v.dtype, bitcast=True)


@triton.jit
def _usable(top):
    """A divisor by which no square of v / top leaves the range."""
    return tl.where((top > 0.0) & (top < INF), top, 1.0)


@triton.jit
def _lengthen(length, v, NORM: tl.constexpr):
    """The length of a vector that goes on with v."""
    if NORM == 1:
        return length[0] + tl.sum(tl.abs(v), 0), length[1]
    else:
        top = tl.maximum(length[0], _largest(v), propagate_nan=tl.PropagateNan.ALL)
        if NORM == 2:
            unit = v / _usable(top)
            shrink = length[0] / _usable(top)
            return top, length[1] * (shrink * shrink) + tl.sum(unit * unit, 0)
        else:
            ties = tl.sum(tl.where(tl.abs(v) == top, 1.0, 0.0).to(v.dtype), 0)
            return top, ties + tl.where(length[0] == top, length[1], 0.0)


@triton.jit
def _norm(length, NORM: tl.constexpr):
    if NORM == 2:
        return _usable(length[0]) * _sqrt(length[1])
    else:
        return length[0]


@triton.jit
def _add_cost(sums, d, r, KIND: tl.constexpr, NORM: tl.constexpr):
    """What the cost needs to know of a displacement that goes on with d: its length, or its excess of the soft ball."""
    if KIND == SOFT_BALL:
        excess = tl.maximum(tl.abs(d) - r, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return sums[0] + tl.sum(excess * excess, 0), sums[1]
    else:
        return _lengthen(sums, d, NORM)


@triton.jit
def _cost_of(sums, weight, power, KIND: tl.constexpr, NORM: tl.constexpr):
    if KIND == SOFT_BALL:
        return sums[0] / (2.0 * weight)
    else:
        return weight * _power(_norm(sums, NORM), power)


# ---- blocks of a sample ----------------------------------------------------------------------------------------------


@triton.jit
def _read(sample, start, R: tl.constexpr, TARGETED: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """(here, x_adv, g, x) of a block, 0 beyond the sample; g is the gradient by x_adv along which to ascend. Of it the
    first `followed` entries are read, all or none: to a mask Triton's interpreter cannot add the flag of a sample."""
    a_ptr, grad_ptr, x_ptr, scale_ptr, n, channels, spatial, followed = sample
    i = start + tl.arange(0, BLOCK)
    here = i < n
    a = tl.load(a_ptr + i, mask=here, other=0.0).to(R)
    g = tl.load(grad_ptr + i, mask=i < followed, other=0.0).to(R)
    x = tl.load(x_ptr + i, mask=here, other=0.0).to(R)
    if scale_ptr is not None:
        g = tl.div_rn(g, tl.load(scale_ptr + _channel(i, channels, spatial, LAST), mask=here, other=1.0))
    if TARGETED:
        g = -g
    return here, a, g, x


@triton.jit
def _block(
    sample,
    held,
    start,
    R: tl.constexpr,
    TARGETED: tl.constexpr,
    LAST: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What _read gives: out of registers where they hold the whole sample."""
    if SINGLE:
        return held
    else:
        return _read(sample, start, R, TARGETED, LAST, BLOCK)


@triton.jit
def _channel(i, channels, spatial, LAST: tl.constexpr):
    if LAST:
        return i % channels
    else:
        return i // spatial


@triton.jit
def _logical(i, channels, spatial, LAST: tl.constexpr):
    """The contiguous index of element i in memory."""
    if LAST:
        return i % channels * spatial + i // channels
    else:
        return i


@triton.jit
def _put(rounded, feed_ptr, mean_ptr, std_ptr, i, here, channels, spatial, R: tl.constexpr, LAST: tl.constexpr):
    """Writes what the model is fed."""
    fed = rounded.to(R)
    if mean_ptr is not None:
        channel = _channel(i, channels, spatial, LAST)
        mean = tl.load(mean_ptr + channel, mask=here, other=0.0)
        fed = tl.div_rn(fed - mean, tl.load(std_ptr + channel, mask=here, other=1.0))
    tl.store(feed_ptr + i, fed.to(feed_ptr.dtype.element_ty), mask=here)


# ---- kernels ---------------------------------------------------------------------------------------------------------
# A `plan` holds the numbers of a sample that its elements move by:
#   l2          divisor of g, its factor, factor of the displacement
#   l1          least bit pattern of |g| that moves, share of the step, theta
#   norm_power  pull of the cost, length of the displacement, divisor and factor of the normalised ascent
#   soft_ball   rate of the penalty


@triton.jit
def _ascended(a, g, plan, step_size, lo, hi, KIND: tl.constexpr):
    """x_adv after the ascent and before any projection."""
    if KIND == L2:
        return a + (g / plan[0]) * plan[1]
    elif KIND == L1:
        chosen = _feasible(a, g, lo, hi) & (_bits(g) >= plan[0])
        return tl.where(chosen, a + plan[1] * _sign(g), a)
    else:
        return a + step_size * _sign(g)


@triton.jit
def _moved(a, g, x, plan, r, step_size, lo, hi, KIND: tl.constexpr, NORM: tl.constexpr, VARIANT: tl.constexpr):
    y = _ascended(a, g, plan, step_size, lo, hi, KIND)
    if KIND == LINF:
        y = _clamp(y, x - r, x + r)
    elif KIND == L2:
        y = x + (y - x) * plan[2]
    elif KIND == L1:
        y = x + _sign(y - x) * _shrunk(y - x, x, plan[2], lo, hi)
    elif KIND == NORM_POWER:
        v = _pulled(g, a - x, plan[0], plan[1], NORM)
        y = a + (step_size * _sign(v) if VARIANT == 0 else (v / plan[2]) * plan[3])
    elif KIND == SOFT_BALL:
        d = a - x
        ascended = d + step_size * _sign(g)
        y = x + (ascended - plan[0] * _beyond(ascended if VARIANT == 0 else d, r))
    return _clamp(y, lo, hi)


@triton.jit
def _selected(
    sample,
    held,
    wanted,
    feasible,
    highest,
    lo,
    hi,
    R: tl.constexpr,
    TARGETED: tl.constexpr,
    LAST: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(least bit pattern, number) of the `wanted` largest |g| that can move, with their ties: the bracket of the
    pattern shrinks to a quarter in each round, until it separates the wanted number."""
    n = sample[4]
    low = highest * 0 + 1
    high = highest
    number = feasible
    while (number > wanted) & (low < high):
        stride = (high - low) // 4 + 1
        first, second, third = number * 0, number * 0, number * 0
        for start in range(0, BLOCK if SINGLE else n, BLOCK):
            _, a, g, _ = _block(sample, held, start, R, TARGETED, LAST, SINGLE, BLOCK)
            size = tl.where(_feasible(a, g, lo, hi), _bits(g), 0)
            # three counts in one sum: a block has fewer than 2^21 elements
            counts = (size >= low + stride).to(tl.int64)
            counts += (size >= low + 2 * stride).to(tl.int64) << 21
            counts += (size >= low + 3 * stride).to(tl.int64) << 42
            counts = tl.sum(counts, 0)
            first += counts & 0x1FFFFF
            second += (counts >> 21) & 0x1FFFFF
            third += counts >> 42
        quarters = tl.where(third >= wanted, 3, tl.where(second >= wanted, 2, tl.where(first >= wanted, 1, 0)))
        number = tl.where(first >= wanted, first, number)
        number = tl.where(second >= wanted, second, number)
        number = tl.where(third >= wanted, third, number)
        low += quarters.to(low.dtype) * stride
        high = tl.minimum(high, low + stride - 1)
    return low, number


@triton.jit
def _theta(
    sample,
    held,
    plan,
    searching,
    r,
    lo,
    hi,
    R: tl.constexpr,
    TARGETED: tl.constexpr,
    LAST: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The multiplier of the projection on the l1 ball and the box: Newton's root of a falling, piecewise linear
    function, held in a bracket that is halved where Newton's step does not halve the residual."""
    n = sample[4]
    zero = r * 0.0
    tolerance = (1e-14 if r.dtype == tl.float64 else 1e-6) * r
    low, high, theta, at, last = zero, zero, zero, zero, zero + INF
    rounds = 0
    while searching & (rounds < MAX_ROUNDS):
        left, slope, largest = zero, zero, zero
        for start in range(0, BLOCK if SINGLE else n, BLOCK):
            here, a, g, x = _block(sample, held, start, R, TARGETED, LAST, SINGLE, BLOCK)
            d = _ascended(a, g, plan, zero, lo, hi, L1) - x
            size = tl.where(here, _shrunk(d, x, at, lo, hi), 0.0)
            left += tl.sum(size, 0)
            slope += tl.sum(tl.where((size > 0.0) & (size == tl.abs(d) - at), 1.0, 0.0).to(R), 0)
            if rounds == 0:
                largest = tl.maximum(largest, _largest(d))
        excess = left - r
        low = tl.where(excess > 0.0, at, low)
        high = tl.where(rounds == 0, largest, tl.where(excess > 0.0, high, at))
        newton = at + excess / tl.maximum(slope, 1.0)
        halving = ((low < newton) & (newton <= high) & (slope > 0.0) & (2.0 * tl.abs(excess) <= last)) == 0
        following = tl.where(halving, 0.5 * (low + high), newton)
        # the ball is not left at theta = 0, or met
        searching = (excess > tolerance) | ((excess < -tolerance) & (rounds > 0))
        theta = tl.where(searching, high, at)
        searching = searching & (low < following) & ((following < high) | (halving == 0))
        at = following
        last = tl.abs(excess)
        rounds += 1
    return theta


@triton.jit
def _write(
    sample,
    held,
    outputs,
    plan,
    moving,
    seeds_ptr,
    row,
    r,
    step_size,
    lo,
    hi,
    R: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    VARIANT: tl.constexpr,
    TARGETED: tl.constexpr,
    ROUND: tl.constexpr,
    SURVEYED: tl.constexpr,
    LAST: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moves the sample. Returns the largest |g| unless it is known, whether x leaves the box, and sums of the cost."""
    x_next_ptr, costs_ptr, feed_ptr, mean_ptr, std_ptr = outputs
    n, channels, spatial = sample[4], sample[5], sample[6]
    steepest = r * 0.0
    outside = moving.to(tl.int32) * 0
    sums = (r * 0.0, r * 0.0)
    for start in range(0, BLOCK if SINGLE else n, BLOCK):
        here, a, g, x = _block(sample, held, start, R, TARGETED, LAST, SINGLE, BLOCK)
        y = tl.where(moving, _moved(a, g, x, plan, r, step_size, lo, hi, KIND, NORM, VARIANT), a)
        i = start + tl.arange(0, BLOCK)
        if ROUND:
            u = tl.zeros_like(y) + 0.5
            if seeds_ptr is not None:
                u = _uniform(_word(tl.load(seeds_ptr + row), _logical(i, channels, spatial, LAST), ROUNDING)).to(R)
            y = tl.maximum(x, tl.where(y > u, 1.0, 0.0).to(R), propagate_nan=tl.PropagateNan.ALL)
        rounded = y.to(x_next_ptr.dtype.element_ty)
        tl.store(x_next_ptr + i, rounded, mask=here)
        if feed_ptr is not None:
            _put(rounded, feed_ptr, mean_ptr, std_ptr, i, here, channels, spatial, R, LAST)
        if costs_ptr is not None:
            sums = _add_cost(sums, tl.where(here, rounded.to(R) - x, 0.0), r, KIND, NORM)
        if not SURVEYED:
            steepest = tl.maximum(steepest, _largest(g), propagate_nan=tl.PropagateNan.ALL)
        outside = tl.maximum(outside, tl.max((here & (((x >= lo) & (x <= hi)) == 0)).to(tl.int32), 0))
    return steepest, outside, sums


@triton.jit(do_not_specialize=["units"])
def _step(
    x_adv_ptr,
    grad_ptr,
    x_ptr,
    x_next_ptr,
    status_ptr,
    costs_ptr,
    feed_ptr,
    mu_ptr,
    radii_ptr,
    active_ptr,
    seeds_ptr,
    mean_ptr,
    std_ptr,
    mu_stride,
    radius: tl.float64,
    step_size: tl.float64,
    weight: tl.float64,
    power: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    units,
    channels,
    spatial,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    VARIANT: tl.constexpr,
    TARGETED: tl.constexpr,
    ROUND: tl.constexpr,
    UNIT: tl.constexpr,
    LAST: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    R: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    # without sums there is no reason to read a large gradient before the step: a bad one is repaired below
    SURVEYED: tl.constexpr = SINGLE or (KIND != LINF and KIND < SOFT_BALL)
    row = tl.program_id(0).to(tl.int64)
    n = units * UNIT if SINGLE else units.to(tl.int64) * UNIT
    first = row * n
    active = row >= 0
    if active_ptr is not None:
        active = tl.load(active_ptr + row) != 0
    zero = row.to(R) * 0.0
    r, step_size, lo, hi = _like(zero, radius), _like(zero, step_size), _like(zero, lo), _like(zero, hi)
    if radii_ptr is not None:
        r = tl.load(radii_ptr + row)
    mu = zero + 1.0
    if mu_ptr is not None:
        mu = tl.load(mu_ptr + row * mu_stride)
    sample = (
        x_adv_ptr + first,
        grad_ptr + first,
        x_ptr + first,
        None if KIND == LINF or KIND >= SOFT_BALL else std_ptr,  # signs do not depend on the scale of a gradient
        n,
        channels,
        spatial,
        tl.where(active, n, 0),
    )
    held = _read(sample, 0, R, TARGETED, LAST, BLOCK) if SINGLE else None

    steepest = zero
    length = (zero, zero)
    feasible = row * 0
    if SURVEYED:
        for start in range(0, BLOCK if SINGLE else n, BLOCK):
            _, a, g, x = _block(sample, held, start, R, TARGETED, LAST, SINGLE, BLOCK)
            if KIND == L2:
                length = _lengthen(length, g, 2)
            else:
                steepest = tl.maximum(steepest, _largest(g), propagate_nan=tl.PropagateNan.ALL)
            if KIND == L1:
                feasible += tl.sum(_feasible(a, g, lo, hi).to(tl.int32), 0)
            if KIND == NORM_POWER:
                length = _lengthen(length, a - x, NORM)
    if KIND == L2:
        steepest = length[0]
    priced = mu == mu
    finite = (steepest < INF) & priced
    moving = active & finite
    mu = tl.minimum(mu, MAX_MU)

    plan = (zero, zero, zero, zero)
    if KIND == L2:
        pace = tl.where(length[1] > 0.0, step_size / _sqrt(length[1]), 0.0)
        plan = (_usable(length[0]), pace, zero, zero)
        length = (zero, zero)
        for start in range(0, BLOCK if SINGLE else n, BLOCK):
            _, a, g, x = _block(sample, held, start, R, TARGETED, LAST, SINGLE, BLOCK)
            length = _lengthen(length, _ascended(a, g, plan, step_size, lo, hi, KIND) - x, 2)
        norm = _norm(length, 2)
        plan = (plan[0], pace, tl.where(norm > r, r / norm, 1.0), zero)
    elif KIND == L1:
        wanted = tl.maximum((n.to(tl.float64) * weight).to(tl.int64), 1)
        least, chosen = _selected(
            sample, held, wanted, feasible, _bits(steepest), lo, hi, R, TARGETED, LAST, SINGLE, BLOCK
        )
        plan = (least, step_size / tl.maximum(chosen, 1).to(R), zero, zero)
        theta = _theta(sample, held, plan, moving, r, lo, hi, R, TARGETED, LAST, SINGLE, BLOCK)
        plan = (least, plan[1], theta, zero)
    elif KIND == NORM_POWER:
        norm = _norm(length, NORM)
        pull = mu * _like(zero, weight) * _like(zero, power) * _power(norm, power - (2.0 if NORM == 2 else 1.0))
        plan = (_finite(pull / length[1] if NORM == 0 else pull), norm, zero, zero)
        if VARIANT == 1:
            length = (zero, zero)
            for start in range(0, BLOCK if SINGLE else n, BLOCK):
                _, a, g, x = _block(sample, held, start, R, TARGETED, LAST, SINGLE, BLOCK)
                length = _lengthen(length, _pulled(g, a - x, plan[0], norm, NORM), 2)
            pace = tl.where(length[1] > 0.0, step_size / _sqrt(length[1]), 0.0)
            plan = (plan[0], norm, _usable(length[0]), pace)
    elif KIND == SOFT_BALL:
        plan = (_finite(step_size * mu / _like(zero, weight)), zero, zero, zero)

    outputs = (x_next_ptr + first, costs_ptr, None if feed_ptr is None else feed_ptr + first, mean_ptr, std_ptr)
    steepest, outside, sums = _write(
        sample,
        held,
        outputs,
        plan,
        moving,
        seeds_ptr,
        row,
        r,
        step_size,
        lo,
        hi,
        R,
        KIND,
        NORM,
        VARIANT,
        TARGETED,
        ROUND,
        SURVEYED,
        LAST,
        SINGLE,
        BLOCK,
    )
    if not SURVEYED:
        finite = (steepest < INF) & priced
        if active & (finite == 0):
            tl.debug_barrier()
            _, outside, sums = _write(
                sample,
                held,
                outputs,
                plan,
                finite,
                seeds_ptr,
                row,
                r,
                step_size,
                lo,
                hi,
                R,
                KIND,
                NORM,
                VARIANT,
                TARGETED,
                ROUND,
                SURVEYED,
                LAST,
                SINGLE,
                BLOCK,
            )
    tl.store(status_ptr + row, tl.where(active & (finite == 0), 1, 0) + 2 * outside)
    if costs_ptr is not None:
        tl.store(costs_ptr + row, _cost_of(sums, _like(zero, weight), power, KIND, NORM))


@triton.jit
def _noise(seed, j, START: tl.constexpr):
    """Element j of what a start scales: in the linf ball already, or normal, or a two-sided exponential."""
    if START == LINF:
        return 2.0 * _uniform(_word(seed, j, NOISE)) - 1.0
    elif START == L1:
        word = _word(seed, j, NOISE)
        size = _exponential(_uniform(word))
        return tl.where((word & 1) == 1, -size, size)
    else:
        return _gaussian(seed, j)


@triton.jit(do_not_specialize=["units"])
def _init(
    x_ptr,
    x_adv_ptr,
    status_ptr,
    feed_ptr,
    seeds_ptr,
    radii_ptr,
    mean_ptr,
    std_ptr,
    radius: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    units,
    channels,
    spatial,
    START: tl.constexpr,
    UNIT: tl.constexpr,
    LAST: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    R: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    n = units * UNIT if SINGLE else units.to(tl.int64) * UNIT
    first = row * n
    zero = row.to(R) * 0.0
    scale, lo, hi = _like(zero, radius), _like(zero, lo), _like(zero, hi)
    if radii_ptr is not None:
        scale = tl.load(radii_ptr + row)
    seed = row
    if START != CLEAN:
        seed = tl.load(seeds_ptr + row)
    if START != LINF and START < GAUSSIAN:
        # uniform in the ball: the sum of n powers and one exponential variable (Barthe et al., 2005)
        total = _exponential(_uniform(_word(seed, row * 0, EXTRA))).to(R) * (1.0 if START == L1 else 2.0)
        for start in range(0, BLOCK if SINGLE else n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            held = _noise(seed, _logical(i, channels, spatial, LAST), START).to(R)
            size = tl.abs(held) if START == L1 else held * held
            total += tl.sum(tl.where(i < n, size, 0.0), 0)
        scale = scale / (total if START == L1 else _sqrt(total))
    outside = row.to(tl.int32) * 0
    for start in range(0, BLOCK if SINGLE else n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < n
        x = tl.load(x_ptr + first + i, mask=here, other=0.0).to(R)
        y = x
        if START != CLEAN:
            y = _clamp(x + _noise(seed, _logical(i, channels, spatial, LAST), START).to(R) * scale, lo, hi)
        rounded = y.to(x_adv_ptr.dtype.element_ty)
        tl.store(x_adv_ptr + first + i, rounded, mask=here)
        if feed_ptr is not None:
            _put(rounded, feed_ptr + first, mean_ptr, std_ptr, i, here, channels, spatial, R, LAST)
        outside = tl.maximum(outside, tl.max((here & (((x >= lo) & (x <= hi)) == 0)).to(tl.int32), 0))
    tl.store(status_ptr + row, 2 * outside)


@triton.jit(do_not_specialize=["units"])
def _cost(
    x_adv_ptr,
    x_ptr,
    costs_ptr,
    radii_ptr,
    radius: tl.float64,
    weight: tl.float64,
    power: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    eps: tl.float64,
    units,
    channels,
    spatial,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    UNIT: tl.constexpr,
    LAST: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    R: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    n = units * UNIT if SINGLE else units.to(tl.int64) * UNIT
    first = row * n
    zero = row.to(R) * 0.0
    r, lo, hi = _like(zero, radius), _like(zero, lo), _like(zero, hi)
    if radii_ptr is not None:
        r = tl.load(radii_ptr + row)
    largest = zero
    sums = (zero, zero)
    outside = row.to(tl.int32) * 0
    for start in range(0, BLOCK if SINGLE else n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < n
        a = tl.load(x_adv_ptr + first + i, mask=here, other=0.0).to(R)
        x = tl.load(x_ptr + first + i, mask=here, other=0.0).to(R)
        sums = _add_cost(sums, a - x, r, KIND, NORM)
        if KIND == BINARY:
            outside = tl.maximum(outside, tl.max((((a != 0.0) & (a != 1.0)) | (a < x)).to(tl.int32), 0))
        elif KIND < NORM_POWER:
            outside = tl.maximum(outside, tl.max((here & ((a < lo) | (a > hi))).to(tl.int32), 0))
            largest = tl.maximum(largest, tl.maximum(_largest(a), _largest(x)))
    if KIND >= NORM_POWER and KIND != BINARY:
        cost = _cost_of(sums, _like(zero, weight), power, KIND, NORM)
    else:
        norm = _norm(sums, NORM)
        if KIND != BINARY:
            share = _sqrt(n.to(R)) if KIND == L2 else (n.to(R) if KIND == L1 else 1.0)
            outside += (norm > r + _like(zero, eps) * largest * share).to(tl.int32)
        cost = tl.where(norm != norm, norm, tl.where(outside > 0, INF, 0.0))
    tl.store(costs_ptr + row, cost.to(R))
