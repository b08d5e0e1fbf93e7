"""armor::rowloss in Triton: the per-sample losses of docs/math.md, section 4 (cross-entropy, TRADES, MART, KL), from
logits, and their gradients, one launch each. `torch.ops.armor.rowloss*` comes here on GPUs without the CUDA module.

It is the twin of csrc/include/armor/rowloss.h. z are the logits, q = softmax(z); w the natural logits, p = softmax(w).
KIND is 0 for cross-entropy, 1 for TRADES, 2 for MART, 3 for KL. A program owns ROWS rows and walks along them in blocks
of BLOCK classes. CLASSES is known to the compiler: where one block holds a row it removes the loops and loads a logit
once, and where it is a multiple of 8 the loads are of 128 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from armor.library import IGNORE_NOTHING, ROWLOSS_STATS, real
from armor_kernels.dual import _expm1, _log1p, dual
from armor_kernels.launch import contiguous, device_guard

INF = tl.constexpr(float("inf"))
FLOOR = tl.constexpr(1e-12)  # what MART adds to a probability before its logarithm,
LOG_FLOOR = tl.constexpr(-27.631021115928547)


def rowloss(
    logits: Tensor, target: Tensor, natural: Tensor | None, kind: int, beta: float, smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Losses [...] and stats [..., columns] of `logits` [..., classes]; float64 for float64 logits, else float32.

    The columns, as far as the kind has them: max z, log sum exp(z - max z), the same two of w, KL, the strongest wrong
    class, S.
    """
    logits, target, natural = logits.contiguous(), target.contiguous(), contiguous(natural)
    losses = logits.new_empty(logits.shape[:-1], dtype=real(logits))
    stats = logits.new_empty((*logits.shape[:-1], ROWLOSS_STATS[kind]), dtype=real(logits))
    classes = logits.shape[-1]
    rows, block, warps = tile_of(classes, losses.element_size())
    if losses.numel():
        with device_guard(logits):
            _rowloss[(triton.cdiv(losses.numel(), rows),)](
                logits,
                target,
                logits if natural is None else natural,
                losses,
                stats,
                losses.numel(),
                beta,
                smoothing,
                ignore_index,
                KIND=kind,
                SMOOTH=smoothing != 0.0,
                CLASSES=classes,
                COLUMNS=ROWLOSS_STATS[kind],
                ROWS=rows,
                BLOCK=block,
                num_warps=warps,
            )
    return losses, stats


def rowloss_backward(
    grad: Tensor,
    weights: Tensor | None,
    logits: Tensor,
    target: Tensor,
    natural: Tensor | None,
    stats: Tensor,
    kind: int,
    beta: float,
    smoothing: float,
    ignore_index: int,
    natural_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `rowloss` in one launch. With weights [..., n], `grad` [...] is that of the dual's value."""
    logits, target, natural = logits.contiguous(), target.contiguous(), contiguous(natural)
    to_logits = torch.empty_like(logits)
    to_natural = torch.empty_like(logits) if natural_grad else logits.new_empty(0)
    classes = logits.shape[-1]
    rows, block, warps = tile_of(classes, stats.element_size())
    n = target.numel() if weights is None else target.shape[-1]
    tiles = triton.cdiv(n, rows)
    if logits.numel():
        with device_guard(logits):
            _rowloss_backward[(target.numel() // n * tiles, triton.cdiv(classes, block))](
                grad.contiguous(),
                grad if weights is None else weights.contiguous(),
                logits,
                target,
                logits if natural is None else natural,
                stats.contiguous(),
                to_logits,
                to_natural if natural_grad else to_logits,
                n,
                tiles,
                beta,
                smoothing,
                ignore_index,
                KIND=kind,
                WEIGHTED=weights is not None,
                NATURAL_GRAD=natural_grad,
                CLASSES=classes,
                COLUMNS=ROWLOSS_STATS[kind],
                ROWS=rows,
                BLOCK=block,
                num_warps=warps,
            )
    return to_logits, to_natural


def rowloss_dual(
    logits: Tensor,
    target: Tensor,
    natural: Tensor | None,
    costs: Tensor | None,
    kind: int,
    beta: float,
    smoothing: float,
    divergence: int,
    alpha: float,
    radius: float,
    kappa: float,
    max_dual: float,
) -> tuple[Tensor, ...]:
    """`rowloss` on logits [..., n, classes], then `dual` on the losses [..., n]: two launches."""
    losses, stats = rowloss(logits, target, natural, kind, beta, smoothing, IGNORE_NOTHING)
    value, lam, nu, weights, status, passes = dual(losses, costs, None, divergence, alpha, radius, kappa, max_dual)
    return value, losses, stats, lam, nu, weights, status, passes


def tile_of(classes: int, itemsize: int) -> tuple[int, int, int]:
    """(rows, lanes along a row, warps) of a program; itemsize is that of the dtype it computes in.

    Several short rows, one of up to 16 KiB, or a longer one in blocks of 8 KiB. A thread holds at most 32 bytes
    of them: with more it spills.
    """
    block = triton.next_power_of_2(classes)
    if block * itemsize > 16384:
        block = 8192 // itemsize
    rows = max(1, 256 // block)
    return rows, block, max(2, rows * block * itemsize // 1024)


# ---- rowloss.h -----------------------------------------------------------------------------------------------------


@triton.jit
def _logits(ptr, row, exists, cols, CLASSES: tl.constexpr, REAL: tl.constexpr):
    """A block of logits, [rows, cols]; absent ones are -inf, which has probability zero."""
    here = exists[:, None] & (cols < CLASSES)[None, :]
    return tl.load(ptr + row[:, None] * CLASSES + cols[None, :], mask=here, other=-INF).to(REAL)


@triton.jit
def _log_sum(ptr, row, exists, CLASSES: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr):
    """(max, log sum exp(z - max)) of every row.

    The maxima are summed apart from what is below them, so that the logarithm is that of 1 + x and keeps its digits
    where one logit dominates. NaN or +inf makes it NaN.
    """
    z_max = tl.full((row.shape[0],), -INF, REAL)
    ones = tl.zeros((row.shape[0],), REAL)
    below = tl.zeros((row.shape[0],), REAL)
    for start in range(0, CLASSES, BLOCK):
        z = _logits(ptr, row, exists, start + tl.arange(0, BLOCK), CLASSES, REAL)
        highest = tl.maximum(z_max, tl.max(z, 1))
        anchor = tl.where(highest > -INF, highest, 0.0)  # -inf - -inf would be NaN
        risen = highest > z_max
        below = tl.where(risen, (below + ones) * tl.exp(z_max - anchor), below)
        ones = tl.where(risen, 0.0, ones)
        e = tl.exp(z - anchor[:, None])
        on_top = z == highest[:, None]
        ones += tl.sum(tl.where(on_top, e, 0.0), 1)
        below += tl.sum(tl.where(on_top, 0.0, e), 1)
        z_max = highest
    return z_max, _log1p(below + (ones - 1.0))


@triton.jit
def _mean_depth(ptr, row, exists, z_max, CLASSES: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr):
    """max z - mean z of every row."""
    depth = tl.zeros_like(z_max)
    for start in range(0, CLASSES, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = _logits(ptr, row, exists, cols, CLASSES, REAL)
        # the mean of each term: their sum could overflow
        depth += tl.sum(tl.where((cols < CLASSES)[None, :], (z_max[:, None] - z) * (1.0 / CLASSES), 0.0), 1)
    return depth


@triton.jit
def _log_with_floor(q, log_q):
    """log(q + 1e-12), which loses no digits of log q where q is close to 1."""
    above = q > FLOOR
    return tl.where(above, log_q, LOG_FLOOR) + _log1p(tl.where(above, FLOOR, q) / tl.where(above, q, FLOOR))


@triton.jit
def _softmax(b, z_log):
    """q from b = z - max z; exp(b - log sum) would round the difference first."""
    return tl.exp(b) * tl.exp(-z_log)[:, None]


@triton.jit
def _log_ratio(a, b, z_log, w_log, KIND: tl.constexpr):
    """log(p / q), and for MART log(p / (q + 1e-12)), from a = w - max w and b = z - max z."""
    if KIND == 2:
        return (a - w_log[:, None]) - _log_with_floor(_softmax(b, z_log), b - z_log[:, None])
    else:
        return (a - b) - (w_log - z_log)[:, None]


@triton.jit
def _kl(
    z_ptr,
    w_ptr,
    row,
    exists,
    z_max,
    z_log,
    w_max,
    w_log,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """KL(p || q) of every row, and for MART KL(p || q + 1e-12)."""
    kl = tl.zeros_like(z_max)
    for start in range(0, CLASSES, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        b = _logits(z_ptr, row, exists, cols, CLASSES, REAL) - z_max[:, None]
        a = _logits(w_ptr, row, exists, cols, CLASSES, REAL) - w_max[:, None]
        p = _softmax(a, w_log)
        kl += tl.sum(tl.where(p == 0.0, 0.0, p * _log_ratio(a, b, z_log, w_log, KIND)), 1)
    return kl


@triton.jit
def _rival(ptr, row, exists, y, CLASSES: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr):
    """The largest logit that is not the target's, and the first class that has it."""
    rival_z = tl.full((row.shape[0],), -INF, REAL)
    rival = tl.full((row.shape[0],), CLASSES, tl.int32)
    for start in range(0, CLASSES, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = _logits(ptr, row, exists, cols, CLASSES, REAL)
        others = (cols[None, :] != y[:, None]) & (cols < CLASSES)[None, :]
        best = tl.max(tl.where(others, z, -INF), 1)
        first = tl.min(tl.where(others & (z == best[:, None]), cols[None, :], CLASSES), 1)
        rival = tl.where((best > rival_z) | (rival == CLASSES), first, rival)
        rival_z = tl.maximum(rival_z, best)
    return rival_z, rival


@triton.jit
def _shared(p, q):
    return p * (q / (q + FLOOR))


@triton.jit
def _overlap(
    z_ptr,
    w_ptr,
    row,
    exists,
    z_max,
    z_log,
    w_max,
    w_log,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """S = sum p q / (q + 1e-12) of every row."""
    overlap = tl.zeros_like(z_max)
    for start in range(0, CLASSES, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        b = _logits(z_ptr, row, exists, cols, CLASSES, REAL) - z_max[:, None]
        a = _logits(w_ptr, row, exists, cols, CLASSES, REAL) - w_max[:, None]
        overlap += tl.sum(_shared(_softmax(a, w_log), _softmax(b, z_log)), 1)
    return overlap


@triton.jit
def _complement(log_q):
    """1 - q without cancellation."""
    return -_expm1(log_q)


@triton.jit
def _slope(cols, k, log_q_k, q):
    """d log q_k / dz = [j = k] - q_j of class k of every row, without cancellation."""
    return tl.where(cols[None, :] == k[:, None], _complement(log_q_k)[:, None], -q)


@triton.jit
def _margin(log_q_rival):
    """1.0001 - q_m + 1e-12 of the strongest wrong class m."""
    return (1e-4 + _complement(log_q_rival)) + FLOOR


@triton.jit
def _log_margin(log_q_rival):
    q = tl.exp(log_q_rival)
    return tl.where(q < 0.5, _log1p((1e-4 - q) + FLOOR), tl.log(_margin(log_q_rival)))


@triton.jit
def _doubt(log_p_y):
    """1.0000001 - p_y."""
    return 1e-7 + _complement(log_p_y)


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _rowloss(
    logits_ptr,
    target_ptr,
    natural_ptr,
    losses_ptr,
    stats_ptr,
    rows,
    beta: tl.float64,
    smoothing: tl.float64,
    ignore_index: tl.int64,
    KIND: tl.constexpr,
    SMOOTH: tl.constexpr,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    y = tl.load(target_ptr + row, mask=exists, other=0)
    valid = (y >= 0) & (y < CLASSES)
    z_max, z_log = _log_sum(logits_ptr, row, exists, CLASSES, BLOCK, REAL)
    z_y = tl.load(logits_ptr + row * CLASSES + y, mask=exists & valid, other=0.0).to(REAL)
    loss = (z_max - z_y) + z_log
    if KIND == 0:
        if SMOOTH:
            smoothing = tl.full((1,), smoothing, REAL)
            depth = _mean_depth(logits_ptr, row, exists, z_max, CLASSES, BLOCK, REAL)
            loss = (1.0 - smoothing) * loss + smoothing * (depth + z_log)
    else:
        beta = tl.full((1,), 1.0 if KIND == 3 else beta, REAL)
        w_max, w_log = _log_sum(natural_ptr, row, exists, CLASSES, BLOCK, REAL)
        w_y = tl.load(natural_ptr + row * CLASSES + y, mask=exists & valid, other=0.0).to(REAL)
        kl = _kl(logits_ptr, natural_ptr, row, exists, z_max, z_log, w_max, w_log, KIND, CLASSES, BLOCK, REAL)
        if KIND == 2:
            overlap = _overlap(logits_ptr, natural_ptr, row, exists, z_max, z_log, w_max, w_log, CLASSES, BLOCK, REAL)
            rival_z, rival = _rival(logits_ptr, row, exists, y, CLASSES, BLOCK, REAL)
            loss -= _log_margin((rival_z - z_max) - z_log)
            loss += beta * kl * _doubt((w_y - w_max) - w_log)
        else:
            loss = beta * kl
            if KIND == 1:
                loss += (w_max - w_y) + w_log
    loss = tl.where(valid, loss, float("nan"))
    if KIND == 0:
        loss = tl.where(y == ignore_index, 0.0, loss)

    # all stores come last: behind one, the compiler would load the logits again
    tl.store(losses_ptr + row, loss, mask=exists)
    stats = stats_ptr + row * COLUMNS
    tl.store(stats, z_max, mask=exists)
    tl.store(stats + 1, z_log, mask=exists)
    if KIND != 0:
        tl.store(stats + 2, w_max, mask=exists)
        tl.store(stats + 3, w_log, mask=exists)
        tl.store(stats + 4, kl, mask=exists)
    if KIND == 2:
        tl.store(stats + 5, rival.to(REAL), mask=exists)
        tl.store(stats + 6, overlap, mask=exists)


@triton.jit
def _rowloss_backward(
    grad_ptr,
    weights_ptr,
    logits_ptr,
    target_ptr,
    natural_ptr,
    stats_ptr,
    to_logits_ptr,
    to_natural_ptr,
    n,
    tiles,
    beta: tl.float64,
    smoothing: tl.float64,
    ignore_index: tl.int64,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NATURAL_GRAD: tl.constexpr,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = stats_ptr.dtype.element_ty
    # the rows of a program share the dual that weighs them: grad has n rows for each of its entries
    owner = tl.program_id(0) // tiles
    sample = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = sample < n
    row = owner.to(tl.int64) * n + sample
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(target_ptr + row, mask=exists, other=0)
    usable = (y >= 0) & (y < CLASSES)
    stats = stats_ptr + row * COLUMNS
    z_max = tl.load(stats, mask=exists, other=0.0)
    z_log = tl.load(stats + 1, mask=exists, other=0.0)
    b = _logits(logits_ptr, row, exists, cols, CLASSES, REAL) - z_max[:, None]
    q = _softmax(b, z_log)
    z_y = tl.load(logits_ptr + row * CLASSES + y, mask=exists & usable, other=0.0).to(REAL)
    slope_q = _slope(cols, y, (z_y - z_max) - z_log, q)

    if KIND == 0:
        smoothing = tl.full((1, 1), smoothing, REAL)
        to_logits = (smoothing - 1.0) * slope_q - smoothing * (1.0 / CLASSES - q)
    else:
        w_max = tl.load(stats + 2, mask=exists, other=0.0)
        w_log = tl.load(stats + 3, mask=exists, other=0.0)
        kl = tl.load(stats + 4, mask=exists, other=0.0)
        usable &= kl == kl
        a = _logits(natural_ptr, row, exists, cols, CLASSES, REAL) - w_max[:, None]
        p = _softmax(a, w_log)
        beta = tl.full((1, 1), 1.0 if KIND == 3 else beta, REAL)
        w_y = tl.load(natural_ptr + row * CLASSES + y, mask=exists & usable, other=0.0).to(REAL)
        log_p_y = (w_y - w_max) - w_log
        slope_p = _slope(cols, y, log_p_y, p)
        to_natural = beta * tl.where(p == 0.0, 0.0, p * (_log_ratio(a, b, z_log, w_log, KIND) - kl[:, None]))
        if KIND == 2:
            rival = tl.load(stats + 5, mask=exists, other=0.0).to(tl.int32)
            overlap = tl.load(stats + 6, mask=exists, other=0.0)[:, None]
            known = exists & (rival < CLASSES)
            z_rival = tl.load(logits_ptr + row * CLASSES + rival, mask=known, other=0.0).to(REAL)
            log_q_rival = (z_rival - z_max) - z_log
            pull = (tl.exp(log_q_rival) / _margin(log_q_rival))[:, None]
            doubt = _doubt(log_p_y)[:, None]
            to_logits = pull * _slope(cols, rival, log_q_rival, q) - slope_q
            to_logits += beta * doubt * (q * overlap - _shared(p, q))
            to_natural = doubt * to_natural - beta * (kl * tl.exp(log_p_y))[:, None] * slope_p
        else:
            to_logits = beta * (q - p)
        if KIND == 1:
            to_natural -= slope_p

    if WEIGHTED:
        up = tl.load(grad_ptr + owner).to(REAL) * tl.load(weights_ptr + row, mask=exists, other=0.0).to(REAL)
    else:
        up = tl.load(grad_ptr + row, mask=exists, other=0.0).to(REAL)
    ignored = (KIND == 0) & (y == ignore_index)
    up = tl.where((up == 0.0) | ignored, 0.0, tl.where(usable, up, float("nan")))[:, None]
    here = exists[:, None] & (cols < CLASSES)[None, :]
    at = row[:, None] * CLASSES + cols[None, :]
    to_logits = tl.where(up == 0.0, 0.0, up * to_logits)
    tl.store(to_logits_ptr + at, to_logits.to(to_logits_ptr.dtype.element_ty), mask=here)
    if NATURAL_GRAD:
        to_natural = tl.where(up == 0.0, 0.0, up * to_natural)
        tl.store(to_natural_ptr + at, to_natural.to(to_natural_ptr.dtype.element_ty), mask=here)
