"""The row losses on the installed CPU kernel and on the float64 reference: the published formulas of section 4 of
docs/math.md written out literally, every edge of them, the public functions around them, and those fused with the dual.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import func, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from armor import library, reference
from armor.ops import (
    Status,
    cross_entropy,
    dc_cross_entropy,
    dc_loss,
    dc_mart,
    dc_trades,
    kl_loss,
    mart_loss,
    trades_loss,
)

inf, nan = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CODES = {"ce": 0, "trades": 1, "mart": 2, "kl": 3}
kinds = pytest.mark.parametrize("kind", CODES)
paired = pytest.mark.parametrize("kind", ["trades", "mart", "kl"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BETA, SMOOTHING = 6.0, 0.1


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(kind, shape, classes, dtype=torch.float64, *, seed=0, scale=3.0):
    """Logits, target and, for the kinds that compare two predictions, natural logits."""
    generator = torch.Generator().manual_seed(seed)
    logits, natural = (
        (scale * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)
    )
    return logits, torch.randint(classes, shape, generator=generator), None if kind == "ce" else natural


def public(kind, logits, target, natural):
    if kind == "ce":
        return cross_entropy(logits, target, label_smoothing=SMOOTHING)
    if kind == "kl":
        return kl_loss(natural, logits)
    return {"trades": trades_loss, "mart": mart_loss}[kind](natural, logits, target, beta=BETA)


def published(kind, logits, target, natural, log_space=False):
    """The losses of [rows, classes] as their authors publish them; of several strongest wrong classes the first.

    In log space KLDivLoss is given the logarithm of p, and has finite gradients where p underflows.
    """
    if kind == "ce":
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=SMOOTHING)
    p = F.softmax(natural, 1)
    divergence = nn.KLDivLoss(reduction="none", log_target=log_space)
    second = F.log_softmax(natural, 1) if log_space else p
    if kind != "mart":
        kl = divergence(F.log_softmax(logits, 1), second).sum(1)
        return kl if kind == "kl" else F.cross_entropy(natural, target, reduction="none") + BETA * kl
    q = F.softmax(logits, 1)
    wrong = q.scatter(1, target[:, None], -1.0).argmax(1)
    boosted = F.cross_entropy(logits, target, reduction="none")
    boosted = boosted + F.nll_loss(torch.log(1.0001 - q + 1e-12), wrong, reduction="none")
    kl = divergence(torch.log(q + 1e-12), second).sum(1)
    return boosted + BETA * kl * (1.0000001 - p.gather(1, target[:, None]).squeeze(1))


def differentiated(losses, upstream, *inputs):
    """Losses and their gradients in the inputs that there are."""
    given = [t for t in inputs if t is not None]
    return losses.detach(), *torch.autograd.grad(losses, given, upstream.to(losses.dtype).reshape(losses.shape))


def leaves(*tensors, dtype=None):
    return [None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def literal(kind, logits, target, natural, upstream, dtype=torch.float64, log_space=False):
    """Losses and gradients of the published formulas by autograd in `dtype`, shaped like those of ours."""
    z, w = leaves(logits, natural, dtype=dtype)
    rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (z, w)]
    losses = published(kind, rows[0], target.reshape(-1), rows[1], log_space=log_space).reshape(target.shape)
    return differentiated(losses, upstream, z, w)


def ours(kind, logits, target, natural, upstream):
    z, w = leaves(logits, natural)
    return differentiated(public(kind, z, target, w), upstream, z, w)


class Row(NamedTuple):
    losses: torch.Tensor
    to_logits: torch.Tensor
    to_natural: torch.Tensor
    stats: torch.Tensor


def evaluate(backend, kind, logits, target, natural=None, *, upstream=None, smoothing=0.0, ignore_index=-100):
    """The two raw operators, one after the other."""
    numbers = (CODES[kind], BETA, smoothing, ignore_index)
    losses, stats = backend.rowloss(logits, target, natural, *numbers)
    upstream = torch.ones_like(losses) if upstream is None else upstream
    arguments = (upstream, None, logits, target, natural, stats, *numbers, natural is not None)
    return Row(losses, *backend.rowloss_backward(*arguments), stats)


@pytest.fixture(params=["installed", "reference"])
def backend(request):
    """The raw operators that serve CPU tensors here, and the oracle."""
    if request.param == "reference":
        return reference
    if library.backends()["rowloss"][0]["cpu"] == "reference":
        pytest.skip("the reference serves the CPU here")
    return torch.ops.armor


# ----------------------------------------------------------------------------------------------------
# values and gradients


def assert_near(got, truth, tolerance):
    """Relative to the entry or, where that is a difference of larger ones, to the largest of the tensor; and as far as
    the dtype of `got` can tell."""
    info = torch.finfo(got.dtype)
    smallest = info.smallest_normal * info.eps + torch.finfo(wide(got.dtype)).eps
    torch.testing.assert_close(
        got.double(),
        truth.double(),
        rtol=max(tolerance, 0.51 * info.eps),
        atol=smallest + tolerance * truth.abs().max().item(),
    )


# Fewer classes than a vector register, an odd number, the common ones, and more than any block of a kernel. The
# hundred thousand come last, in float64 too, where float32 sums would lose digits.
SHAPES = [(), (4,), (2, 3, 4)]
SIZES = [(kind, classes) for kind in CODES for classes in (1, 2, 3, 10, 33, 100, 1000) if classes > 1 or kind == "ce"]
LONG = [(kind, 100_000) for kind in CODES]


@dtypes
@pytest.mark.parametrize(
    ("shape", "kind", "classes"),
    [(shape, *size) for shape in SHAPES for size in SIZES]
    + [(shape, *size) for shape in [(), (2,), (2, 1, 1)] for size in LONG],
    ids=str,
)
def test_published_formulas(kind, classes, shape, dtype):
    logits, target, natural = draw(kind, shape, classes, dtype)
    upstream = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    losses, *gradients = ours(kind, logits, target, natural, upstream.to(wide(dtype)))
    truth, *true_gradients = literal(kind, logits, target, natural, upstream.to(wide(dtype)))
    assert losses.dtype == wide(dtype)
    assert losses.shape == shape
    assert_near(losses, truth, 1e-12 if dtype == torch.float64 else 2e-6)
    for one, other in zip(gradients, true_gradients, strict=True):
        assert one.dtype == dtype
        assert_near(one, other, 1e-12 if dtype == torch.float64 else 1e-5)


@kinds
@pytest.mark.parametrize("classes", [2, 10, 33, 1000])
def test_reference(kind, classes):
    logits, target, natural = draw(kind, (6,), classes)
    upstream = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    row = evaluate(reference, kind, logits, target, natural, upstream=upstream, smoothing=SMOOTHING)
    expected = literal(kind, logits, target, natural, upstream)
    for one, other in zip(row, expected, strict=False):
        assert_near(one, other, 1e-13)
    if kind == "ce":
        assert row.to_natural.shape == (0,)


# A kernel may be at most twice as far from the truth as torch's own expression, computed in the dtype of the kernel.
@kinds
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
@pytest.mark.parametrize(("rows", "classes"), [(256, 2), (256, 10), (128, 100), (32, 1000), (2, 100_000)])
def test_no_further_from_the_truth_than_torch(kind, dtype, scale, rows, classes):
    logits, target, natural = draw(kind, (rows,), classes, dtype, scale=scale, seed=2)
    upstream = torch.ones(rows)
    got = ours(kind, logits, target, natural, upstream)
    truth = literal(kind, logits, target, natural, upstream)
    naive = literal(kind, logits, target, natural, upstream, torch.float32, log_space=True)
    for i, (one, exact, other) in enumerate(zip(got, truth, naive, strict=True)):
        error, allowed = ((t.to(one.dtype).double() - exact).abs().max().item() for t in (one, other))
        unit = torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert error <= 2 * allowed + unit, ("losses", "logits", "natural")[i]


def official_trades(natural, logits, target):
    """trades.py of yaodongyu/TRADES: the sum of the divergences over the batch size."""
    divergence = nn.KLDivLoss(reduction="sum")(F.log_softmax(logits, 1), F.softmax(natural, 1)) / len(target)
    return F.cross_entropy(natural, target) + BETA * divergence


def official_mart(natural, logits, target):
    """mart.py of YisenWang/MART, which finds the strongest wrong class by sorting."""
    q, p = F.softmax(logits, 1), F.softmax(natural, 1)
    second, first = torch.argsort(q, 1)[:, -2:].unbind(1)
    wrong = torch.where(first == target, second, first)
    boosted = F.cross_entropy(logits, target) + F.nll_loss(torch.log(1.0001 - q + 1e-12), wrong)
    divergences = nn.KLDivLoss(reduction="none")(torch.log(q + 1e-12), p).sum(1)
    return boosted + BETA * (divergences * (1.0000001 - p[torch.arange(len(target)), target])).sum() / len(target)


@pytest.mark.parametrize(
    ("loss", "official"), [(trades_loss, official_trades), (mart_loss, official_mart)], ids=["trades", "mart"]
)
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_means_are_the_official_batch_losses(loss, official, scale):
    logits, target, natural = draw("mart", (128,), 10, seed=3, scale=scale)
    z, w = leaves(logits, natural)
    mean, expected = loss(w, z, target, beta=BETA).mean(), official(w, z, target)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-14)
    for one, other in zip(torch.autograd.grad(mean, (z, w)), torch.autograd.grad(expected, (z, w)), strict=True):
        assert_near(one, other, 1e-12)


def test_beta_scales_what_it_should():
    logits, target, natural = draw("trades", (5,), 7)
    plain, divergence = cross_entropy(natural, target), kl_loss(natural, logits)
    torch.testing.assert_close(trades_loss(natural, logits, target, beta=0.0), plain, rtol=1e-14, atol=0)
    expected = plain + 2.5 * divergence
    torch.testing.assert_close(trades_loss(natural, logits, target, beta=2.5), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(trades_loss(natural, logits, target), plain + 6.0 * divergence, rtol=1e-14, atol=0)
    none, one, two, default = (
        mart_loss(natural, logits, target, **b) for b in ({"beta": 0}, {"beta": 1}, {"beta": 2}, {})
    )
    torch.testing.assert_close(two - one, one - none, rtol=1e-12, atol=0)
    torch.testing.assert_close(default - none, 6.0 * (one - none), rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("ignored", [-100, 2])
def test_smoothing_and_ignored_targets(backend, smoothing, ignored):
    logits, target, _ = draw("ce", (40,), 5, seed=4)
    target[::7] = ignored
    z = logits.clone().requires_grad_()
    losses = F.cross_entropy(z, target, reduction="none", label_smoothing=smoothing, ignore_index=ignored)
    upstream = torch.linspace(-1.0, 2.0, 40, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(losses, z, upstream)
    row = evaluate(backend, "ce", logits, target, upstream=upstream, smoothing=smoothing, ignore_index=ignored)
    torch.testing.assert_close(row.losses, losses.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(row.to_logits, gradient, rtol=1e-13, atol=1e-15)
    assert (row.losses[target == ignored] == 0).all()
    assert (row.to_logits[target == ignored] == 0).all()
    value = cross_entropy(logits, target, label_smoothing=smoothing, ignore_index=ignored)
    assert torch.equal(value, torch.ops.armor.rowloss(logits, target, None, 0, 0.0, smoothing, ignored)[0])


def test_an_ignored_row_is_not_looked_at(backend):
    logits = torch.tensor([[nan, 1.0, 2.0], [inf, 0.0, -inf], [0.0, 1.0, 2.0]])
    row = evaluate(backend, "ce", logits, torch.tensor([-100, -100, 2]))
    assert row.losses[:2].tolist() == [0, 0]
    assert row.to_logits[:2].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert row.losses[2].item() == pytest.approx(0.4076059644, rel=1e-6)


def test_one_class(backend):
    row = evaluate(backend, "ce", torch.tensor([[3.5], [-1e30]]), torch.tensor([0, 0]), smoothing=0.1)
    assert row.losses.tolist() == [0, 0]
    assert row.to_logits.flatten().tolist() == pytest.approx([0, 0], abs=1e-7)


LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "row-stride": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "leading": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@kinds
@dtypes
def test_strides(kind, dtype, layout):
    logits, target, natural = draw(kind, (3, 4), 7, dtype)
    upstream = torch.linspace(0.5, 2.0, 12).reshape(3, 4)
    strided = [None if t is None else LAYOUTS[layout](t).requires_grad_() for t in (logits, natural)]
    assert not strided[0].is_contiguous()
    labels = torch.stack([target, -target - 1], -1)[..., 0]
    losses = public(kind, strided[0], labels, strided[1])
    got = differentiated(losses, upstream.t().contiguous().t(), *strided)
    # The reference sums in the order of the strides.
    for one, other in zip(got, ours(kind, logits, target, natural, upstream), strict=True):
        assert_near(one, other, 1e-15 if dtype == torch.float64 else 1e-7)


@kinds
def test_expanded_rows(kind):
    logits, target, natural = draw(kind, (1,), 9)
    row, natural_row = leaves(logits, natural)
    wider = [None if t is None else t.expand(5, 9) for t in (row, natural_row)]
    losses = public(kind, wider[0], target.expand(5), wider[1])
    alone = ours(kind, logits, target, natural, torch.ones(1))
    assert torch.equal(losses.detach(), alone[0].expand(5))
    losses.sum().backward()
    for leaf, gradient in zip((row, natural_row), alone[1:], strict=False):
        torch.testing.assert_close(leaf.grad, 5 * gradient, rtol=1e-14, atol=0)


# ----------------------------------------------------------------------------------------------------
# extreme logits


GAPS = [(dtype, gap) for dtype in DTYPES for gap in (110.0, 1e4, 1e30) if gap < torch.finfo(dtype).max]
gaps = pytest.mark.parametrize(("dtype", "gap"), GAPS, ids=str)
BOOST = -math.log(1e-4 + 1e-12)  # MART's margin term where all mass is on a wrong class
CAP = -math.log(1e-12)  # its log p - log(q + 1e-12) where q = 0


@gaps
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("natural_class", [0, 2])
def test_logit_gaps(backend, kind, dtype, gap, natural_class):
    # Adversarial mass on class 1, natural mass on the true class 0 or on the third one.
    logits, natural = torch.zeros(2, 1, 3, dtype=dtype)
    logits[0, 1] = natural[0, natural_class] = gap
    gap = logits[0, 1].item()
    row = evaluate(backend, kind, logits, torch.tensor([0]), None if kind == "ce" else natural)
    q, p, y = ([float(k == where) for k in range(3)] for where in (1, natural_class, 0))
    doubt = 1e-7 if natural_class == 0 else 1.0000001
    wrong = 0.0 if natural_class == 0 else gap
    expected = {
        "ce": (gap, [-1, 1, 0], []),
        "trades": (
            wrong + BETA * gap,
            [BETA * (a - b) for a, b in zip(q, p, strict=True)],
            [b - c for b, c in zip(p, y, strict=True)],
        ),
        "mart": (gap + BOOST + BETA * CAP * doubt, [-1, 1, 0], [0, 0, 0]),
        "kl": (gap, [a - b for a, b in zip(q, p, strict=True)], [0, 0, 0]),
    }
    losses, to_logits, to_natural = expected[kind]
    assert row.losses.item() == pytest.approx(losses, rel=1e-6)
    assert row.to_logits[0].tolist() == pytest.approx(to_logits, abs=1e-12)
    if kind != "ce":
        assert row.to_natural[0].tolist() == pytest.approx(to_natural, abs=1e-12)


# yaodongyu/TRADES issue 30: from a gap of 104 on, softmax has a zero whose logarithm KLDivLoss differentiates.
@paired
@pytest.mark.parametrize("gap", [110.0, 1e4, 1e30])
def test_gradients_are_finite_where_those_of_kldivloss_are_nan(kind, gap):
    logits = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 2.0]])
    natural = torch.tensor([[gap, 0.0, 0.5], [0.0, gap, -1.0]])
    target, upstream = torch.tensor([0, 0]), torch.ones(2)
    _, _, to_natural = literal(kind, logits, target, natural, upstream, torch.float32)
    assert to_natural.isnan().any()
    losses, to_logits, to_natural = ours(kind, logits, target, natural, upstream)
    # The same limit at a gap that float64 can still represent.
    limit = literal(kind, logits, target, natural.clamp(max=700.0), upstream)
    onset = torch.tensor([0.0, gap - min(gap, 700.0)]) if kind == "trades" else torch.zeros(2)
    torch.testing.assert_close(losses, (limit[0] + onset).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(to_logits, limit[1].float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(to_natural, limit[2].float(), rtol=1e-6, atol=1e-6)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_largest_finite_logits(backend, kind, dtype):
    top = torch.finfo(dtype).max / 16
    logits = torch.tensor([[-top, top, 0.0], [top, top, top], [-top, -top, -top]], dtype=dtype)
    natural = None if kind == "ce" else torch.tensor([[0.0, 0.0, top], [top, top, top], [0.0, 0.0, 0.0]], dtype=dtype)
    row = evaluate(backend, kind, logits, torch.tensor([1, 1, 2]), natural)
    for tensor in row[: 2 if kind == "ce" else 3]:
        assert tensor.isfinite().all()
    flat = {"ce": math.log(3), "trades": math.log(3), "kl": 0.0}
    flat["mart"] = math.log(3) - math.log(1.0001 - 1 / 3 + 1e-12) + BETA * (-math.log1p(3e-12)) * (1.0000001 - 1 / 3)
    assert row.losses[1:].tolist() == pytest.approx([flat[kind]] * 2, rel=1e-6, abs=1e-6)


@kinds
def test_a_class_without_mass_is_no_class(backend, kind):
    logits, target, natural = draw(kind, (6,), 5, seed=5)
    full = evaluate(backend, kind, logits, target, natural)
    bars = torch.full((6, 1), -inf, dtype=torch.float64)
    # In front, so that every index moves; MART must not take it for the strongest wrong class.
    longer = [None if t is None else torch.cat([bars, t], 1) for t in (logits, natural)]
    row = evaluate(backend, kind, longer[0], target + 1, longer[1])
    torch.testing.assert_close(row.losses, full.losses, rtol=1e-13, atol=0)
    for name in ("to_logits", "to_natural") if natural is not None else ("to_logits",):
        masked, plain = getattr(row, name), getattr(full, name)
        assert (masked[:, 0] == 0).all()
        torch.testing.assert_close(masked[:, 1:], plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_minus_infinity(backend, smoothing):
    logits = torch.tensor([[0.0, 1.0, -inf], [0.0, -inf, 2.0], [-inf, -inf, 0.5]], requires_grad=True)
    target = torch.tensor([0, 1, 2])
    expected = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    row = evaluate(backend, "ce", logits.detach(), target, smoothing=smoothing)
    assert row.losses[1] == inf
    assert row.losses[2] == (inf if smoothing else 0)
    torch.testing.assert_close(row.losses, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(row.to_logits, gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["trades", "kl"])
def test_natural_mass_where_the_adversarial_has_none(backend, kind):
    logits, target, natural = draw(kind, (3,), 4, seed=6)
    logits[1, 2] = -inf
    row = evaluate(backend, kind, logits, target, natural)
    assert row.losses[1] == inf
    assert row.losses[[0, 2]].isfinite().all()
    difference = torch.softmax(logits, 1) - torch.softmax(natural, 1)
    expected = difference * (BETA if kind == "trades" else 1.0)
    torch.testing.assert_close(row.to_logits, expected, rtol=1e-12, atol=1e-15)


@paired
def test_adversarial_mass_where_the_natural_has_none(backend, kind):
    logits, _, natural = draw(kind, (4,), 5, seed=7)
    target = torch.tensor([0, 1, 1, 4])
    natural[:, 2] = -inf
    row = evaluate(backend, kind, logits, target, natural)
    # p = exp(-60) instead of 0 is a difference of 1e-24, which the formulas differentiate without trouble.
    expected = literal(kind, logits, target, natural.clamp(min=-60.0), torch.ones(4))
    torch.testing.assert_close(row.losses, expected[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(row.to_logits, expected[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(row.to_natural, expected[2], rtol=1e-12, atol=1e-14)
    assert (row.to_natural[:, 2] == 0).all()


def test_mart_where_the_adversarial_has_no_mass(backend):
    logits, target, natural = draw("mart", (3,), 4, seed=6)
    target[1] = 0
    logits[1, 2] = -inf
    row = evaluate(backend, "mart", logits, target, natural)
    expected = literal("mart", logits.clamp(min=-80.0), target, natural, torch.ones(3))  # exp(-80) << 1e-12
    torch.testing.assert_close(row.losses, expected[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(row.to_logits, expected[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(row.to_natural, expected[2], rtol=1e-12, atol=1e-14)


@kinds
@pytest.mark.parametrize("where", ["logits", "natural"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_nan_stays_in_its_row(backend, kind, where, dtype):
    logits, target, natural = draw(kind, (4,), 19, dtype, seed=8, scale=1.0)
    clean = evaluate(backend, kind, logits, target, natural)
    broken = natural if where == "natural" and natural is not None else logits
    broken[1, 0] = broken[3, 18] = nan
    row = evaluate(backend, kind, logits, target, natural)
    for got, expected in zip(row[: 2 if natural is None else 3], clean, strict=False):
        assert got[[1, 3]].isnan().all()
        assert torch.equal(got[[0, 2]], expected[[0, 2]])


# ----------------------------------------------------------------------------------------------------
# MART


@pytest.mark.parametrize(
    ("logits", "target", "wrong"),
    [
        ([1.0, 2.0, 2.0, 2.0, 0.0], 0, 1),
        ([1.0, 2.0, 2.0, 2.0, 0.0], 1, 2),
        ([1.0, 2.0, 2.0, 2.0, 0.0], 3, 1),
        ([2.0, 2.0, 0.0, 0.0, 1.0], 0, 1),
        ([2.0, 2.0, 0.0, 0.0, 1.0], 1, 0),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0, 1),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 4, 0),
        ([3.0, 0.0, 1.0, 0.0, 1.0], 0, 2),
    ],
)
@pytest.mark.parametrize("padding", [0, 60], ids=["short", "long"])
def test_of_tied_classes_the_first_is_the_strongest(backend, logits, target, wrong, padding):
    z = torch.tensor([logits + [-4.0] * padding], dtype=torch.float64)
    w = torch.linspace(-1.0, 1.0, z.shape[1], dtype=torch.float64)[None]
    row = evaluate(backend, "mart", z, torch.tensor([target]), w)
    assert row.stats[0, 5] == wrong

    def chosen(z):
        q, p = torch.softmax(z, 1)[0], torch.softmax(w, 1)[0]
        kl = (p * (p.log() - (q + 1e-12).log())).sum()
        return -q[target].log() - (1.0001 - q[wrong] + 1e-12).log() + BETA * kl * (1.0000001 - p[target])

    expected = chosen(leaf := z.clone().requires_grad_())
    assert row.losses.item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(row.to_logits, torch.autograd.grad(expected, leaf)[0], rtol=1e-12, atol=1e-14)


def in_many_digits(kind, logits, natural, target):
    """Value and both gradients, by central differences in 60 digits of the formulas as they are published."""

    def softmax(values):
        powers = [mpmath.exp(v) for v in values]
        return [power / mpmath.fsum(powers) for power in powers]

    def loss(values):
        q, p = softmax(values[: len(logits)]), softmax(values[len(logits) :])
        if kind == "ce":
            smooth = mpmath.fsum(mpmath.log(a) for a in q) / len(q)
            return -(1 - mpmath.mpf(SMOOTHING)) * mpmath.log(q[target]) - mpmath.mpf(SMOOTHING) * smooth
        tiny = mpmath.mpf("1e-12") if kind == "mart" else 0
        kl = mpmath.fsum(b * (mpmath.log(b) - mpmath.log(a + tiny)) for a, b in zip(q, p, strict=True))
        if kind != "mart":
            return kl if kind == "kl" else BETA * kl - mpmath.log(p[target])
        strongest = max(q[k] for k in range(len(q)) if k != target)
        margin = mpmath.mpf("1.0001") - strongest + tiny
        return -mpmath.log(q[target]) - mpmath.log(margin) + BETA * kl * (mpmath.mpf("1.0000001") - p[target])

    with mpmath.workdps(60):
        point, step = [mpmath.mpf(v) for v in (*logits, *natural)], mpmath.mpf("1e-20")
        slopes = []
        for i in range(len(point)):
            up, down = (loss([*point[:i], point[i] + move, *point[i + 1 :]]) for move in (step, -step))
            slopes.append(float((up - down) / (2 * step)))
        return float(loss(point)), slopes[: len(logits)], slopes[len(logits) :]


# Where MART's 1.0001 - q_m is mostly the 0.0001, its 1.0000001 - p_y mostly the 0.0000001, and KL next to nothing.
CONFIDENT = {
    "wrong": ([0.0, 12.0, -1.0, 0.5], [0.5, 0.25, -1.0, 2.0], 0),
    "very wrong": ([0.0, 16.5, -1.0, 0.5], [2.0, 0.25, -1.0, 0.5], 0),
    "extremely wrong": ([0.0, 1.5, 40.0, -3.0], [0.0, 0.25, -1.0, 0.5], 1),
    "wrong only when attacked": ([0.0, 12.0, 0.0, 1.0], [16.0, 0.0, 1.0, -1.0], 0),
    "right": ([9.0, 1.0, 0.0, -1.0], [16.5, 0.0, 1.0, -1.0], 0),
    "very right": ([40.0, 1.0, 0.0, -1.0], [40.0, 0.0, 1.0, -1.0], 0),
    "wrong twice": ([0.0, 14.0, 1.0, -1.0], [1.0, 15.0, 0.0, -1.0], 0),
    "undecided": ([0.5, 0.25, 0.75, 0.0], [0.5, 0.375, 0.75, 0.0], 2),
}


@kinds
@pytest.mark.parametrize("case", CONFIDENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_confident_predictions_in_many_digits(backend, kind, case, dtype):
    logits, natural, target = CONFIDENT[case]
    exact = in_many_digits(kind, logits, natural, target)
    z, w = (torch.tensor([t], dtype=dtype) for t in (logits, natural))
    if kind == "ce":
        exact, w = exact[:2], None
    y = torch.tensor([target])
    row = evaluate(backend, kind, z, y, w, smoothing=SMOOTHING if kind == "ce" else 0.0)
    naive = literal(kind, z, y, w, torch.ones(1), dtype, log_space=True)
    for got, other, truth in zip(row, naive, exact, strict=False):
        truth = torch.tensor([truth], dtype=torch.float64)
        error, allowed = ((t.double() - truth).abs().max().item() for t in (got, other))
        # A single row: the naive form may be right to the last bit by chance.
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * truth.abs().max().item()
    if kind == "mart":  # the naive form of which has lost half of the digits by now
        assert row.losses.item() == pytest.approx(exact[0], rel=1e-6 if dtype == torch.float32 else 1e-13)


# ----------------------------------------------------------------------------------------------------
# gradients


@kinds
@pytest.mark.parametrize("classes", [2, 5])
def test_gradcheck(kind, classes):
    logits, target, natural = draw(kind, (2, 2), classes, scale=1.0)
    z, w = leaves(logits, natural)
    if natural is None:
        assert torch.autograd.gradcheck(lambda z: public(kind, z, target, None), [z])
    else:
        assert torch.autograd.gradcheck(lambda z, w: public(kind, z, target, w), [z, w])


@paired
@pytest.mark.parametrize("wanted", ["logits", "natural"])
def test_gradient_of_one_prediction_alone(kind, wanted):
    logits, target, natural = draw(kind, (4,), 6)
    both = ours(kind, logits, target, natural, torch.ones(4))
    leaf = (logits if wanted == "logits" else natural).requires_grad_()
    (gradient,) = torch.autograd.grad(public(kind, logits, target, natural).sum(), leaf)
    torch.testing.assert_close(gradient, both[1 if wanted == "logits" else 2], rtol=1e-14, atol=1e-15)


def test_the_same_logits_twice():
    logits = draw("kl", (4,), 6)[0]
    leaf = logits.requires_grad_()
    losses = kl_loss(leaf, leaf)
    assert losses.tolist() == pytest.approx([0] * 4, abs=1e-14)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@kinds
def test_no_gradient_comes_from_no_upstream(backend, kind):
    # Rows whose loss is NaN, infinite, without a class, and finite; the last one shows that they do get gradients.
    logits, _, natural = draw(kind, (5,), 4, seed=9)
    logits[0, 1], logits[1, 2] = nan, -inf
    target = torch.tensor([0, 2, 7, 1, 1])
    upstream = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    row = evaluate(backend, kind, logits, target, natural, upstream=upstream)
    assert not row.losses[:3].isfinite().all()
    gradients = (row.to_logits,) if natural is None else (row.to_logits, row.to_natural)
    for gradient in gradients:
        assert (gradient[:4] == 0).all()
        assert gradient[4].isfinite().all()
        assert gradient[4].abs().max() > 1e-3
    # The same by weights: the upstream of the dual times the weight of the sample.
    numbers = (CODES[kind], BETA, 0.0, -100)
    arguments = (logits, target, natural, row.stats, *numbers, natural is not None)
    weighted = backend.rowloss_backward(torch.tensor(4.0).double(), upstream / 4, *arguments)
    none = backend.rowloss_backward(torch.tensor(0.0).double(), torch.ones(5).double(), *arguments)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(weighted[i], gradient, rtol=1e-15, atol=0)
        assert (none[i] == 0).all()


@kinds
def test_raw_targets_outside_the_classes_give_nan(backend, kind):
    logits, target, natural = draw(kind, (4,), 5)
    clean = evaluate(backend, kind, logits, target, natural)
    target[1], target[3] = -1, 5
    row = evaluate(backend, kind, logits, target, natural)
    for got, expected in zip(row[: 2 if natural is None else 3], clean, strict=False):
        assert got[[1, 3]].isnan().all()
        assert torch.equal(got[[0, 2]], expected[[0, 2]])


# ----------------------------------------------------------------------------------------------------
# fused with the dual


FUSED = {"ce": dc_cross_entropy, "trades": dc_trades, "mart": dc_mart}
fused_kinds = pytest.mark.parametrize("kind", FUSED)
OPTIONS = [
    {"divergence": "kl", "radius": 0.1},
    {"divergence": "alpha", "alpha": 2.0, "radius": 0.1, "kappa": 0.2},
    {"divergence": "renyi", "alpha": 1.25, "radius": 0.05},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda option: option["divergence"])


def fused(kind, logits, target, natural, costs=None, **options):
    if kind == "ce":
        return dc_cross_entropy(logits, target, costs, label_smoothing=SMOOTHING, **options)
    return FUSED[kind](natural, logits, target, costs, beta=BETA, **options)


def composed(kind, logits, target, natural, costs=None, **options):
    return dc_loss(public(kind, logits, target, natural), costs, **options)


def assert_same_robust_loss(kind, logits, target, natural, costs=None, **options):
    """Value, duals and every gradient; returns those of the fused function."""
    results = []
    for function in (fused, composed):
        inputs = leaves(logits, natural, costs)
        value, dual = function(kind, inputs[0], target, *inputs[1:], **options, return_dual=True)
        upstream = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
        given = [t for t in inputs if t is not None]
        results.append((value, dual, torch.autograd.grad(value, given, upstream)))
    (value, dual, gradients), (other_value, other_dual, other_gradients) = results
    tolerance = {"rtol": 1e-13 if logits.dtype == torch.float64 else 1e-6, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(value, other_value, **tolerance)
    for name in ("lam", "nu", "weights", "status", "passes"):
        torch.testing.assert_close(getattr(dual, name), getattr(other_dual, name), **tolerance, msg=name)
    rounding = max(tolerance["rtol"], 1.01 * torch.finfo(logits.dtype).eps)
    for one, other in zip(gradients, other_gradients, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=rounding, atol=1e-12, equal_nan=True)
    return value, dual, gradients


@fused_kinds
@options
@pytest.mark.parametrize("with_costs", [False, True], ids=["plain", "costs"])
@pytest.mark.parametrize("shape", [(9,), (2, 3, 17), (1,), (4, 1)], ids=str)
@dtypes
def test_fused_is_the_composition(kind, options, with_costs, shape, dtype):
    logits, target, natural = draw(kind, shape, 7, dtype, seed=10)
    costs = 0.05 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) if with_costs else None
    costs = costs if costs is None else costs.to(dtype)
    value, dual, gradients = assert_same_robust_loss(kind, logits, target, natural, costs, **options)
    assert value.shape == shape[:-1]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].abs().max() > 0
    if shape[-1] > 1 and with_costs:
        assert (gradients[-1] <= 0).all()
        assert gradients[-1].min() < 0
    if shape[-1] == 1 and not with_costs:
        expected = public(kind, logits, target, natural)[..., 0]
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)
        assert (dual.weights == 1).all()


@fused_kinds
def test_long_rows_and_many_samples(kind):
    for shape, classes in [((3, 5), 4099), ((1, 3000), 10)]:
        logits, target, natural = draw(kind, shape, classes, torch.float32, seed=11)
        _, dual, _ = assert_same_robust_loss(kind, logits, target, natural, radius=0.1)
        assert (dual.status == Status.CONVERGED).all()


@fused_kinds
def test_a_saturated_row_trains_its_worst_sample(kind):
    logits, target, natural = draw(kind, (2, 4), 6, seed=12)
    value, dual, gradients = assert_same_robust_loss(kind, logits, target, natural, radius=5.0)
    losses = public(kind, logits, target, natural)
    torch.testing.assert_close(value.detach(), losses.amax(1), rtol=1e-14, atol=0)
    assert (dual.status == Status.SATURATED).all()
    worst = F.one_hot(losses.argmax(1), 4).bool()
    for gradient in gradients:
        assert (gradient[~worst] == 0).all()
        assert (gradient[worst].abs().amax(1) > 1e-4).all()


@fused_kinds
@options
@pytest.mark.parametrize("with_costs", [False, True], ids=["plain", "costs"])
def test_fused_rows_that_are_not_finite(kind, options, with_costs):
    logits, target, natural = draw(kind, (4, 5), 4, seed=13)
    logits[0, 1, 2] = nan
    (logits if kind != "trades" else natural)[1, 3, target[1, 3]] = -inf
    (logits if kind != "trades" else natural)[2, 0, target[2, 0]] = -inf
    costs = torch.zeros(4, 5, dtype=torch.float64) if with_costs else None
    if with_costs:
        costs[2, 0] = inf  # bars the infinite loss
    value, dual, gradients = assert_same_robust_loss(kind, logits, target, natural, costs, **options)
    assert value[0].isnan()
    assert value[1] == inf
    assert dual.status[:2].tolist() == [Status.NONFINITE] * 2
    assert value[3].isfinite()
    to_logits = gradients[0]
    assert to_logits[0].isnan().all()
    # All weight is on the sample of infinite loss, and the finite losses of its row keep no gradient.
    assert dual.weights[1].tolist() == [0, 0, 0, 1, 0]
    assert (to_logits[1, [0, 1, 2, 4]] == 0).all()
    assert to_logits[3].isfinite().all()
    if with_costs and options["divergence"] != "renyi":  # at whose orders above 1 no budget bars a sample
        assert value[2].isfinite()
        assert dual.weights[2, 0] == 0
        assert (to_logits[2, 0] == 0).all()


@fused_kinds
def test_no_fused_gradient_comes_from_no_upstream(kind):
    logits, target, natural = draw(kind, (2, 5), 4, seed=13)
    (logits if kind != "trades" else natural)[0, 3, target[0, 3]] = -inf
    z, w, costs = leaves(logits, natural, torch.full((2, 5), 0.01, dtype=torch.float64))
    value = fused(kind, z, target, w, costs, radius=0.1)
    assert value[0] == inf
    given = [t for t in (z, w, costs) if t is not None]
    for gradient in torch.autograd.grad(value, given, torch.tensor([0.0, 1.0], dtype=torch.float64)):
        assert (gradient[0] == 0).all()
        assert gradient[1].isfinite().all()
        assert gradient[1].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "wanted"), [("ce", 0), ("ce", 2), *((kind, i) for kind in ("trades", "mart") for i in range(3))]
)
@options
def test_fused_gradient_of_one_input_alone(kind, options, wanted):
    logits, target, natural = draw(kind, (3, 8), 5, seed=14)
    costs = 0.05 * torch.rand(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = [logits, natural, costs]
    inputs[wanted].requires_grad_()
    gradients = [
        torch.autograd.grad(function(kind, inputs[0], target, *inputs[1:], **options).sum(), inputs[wanted])[0]
        for function in (fused, composed)
    ]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-16)


@fused_kinds
@options
def test_fused_gradcheck(kind, options):
    logits, target, natural = draw(kind, (2, 4), 3, scale=1.0)
    costs = 0.05 * torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = leaves(logits, natural, costs)
    given = [t for t in inputs if t is not None]

    def value(*tensors):
        return fused(kind, tensors[0], target, tensors[1] if kind != "ce" else None, tensors[-1], **options)

    assert torch.autograd.gradcheck(value, given, eps=1e-5, atol=1e-6, rtol=1e-5)


def test_max_dual_reaches_the_solver():
    logits, target, _ = draw("ce", (4,), 5)
    costs = torch.ones(4, dtype=torch.float64)  # a frozen transport that overspends the radius
    _, dual = dc_cross_entropy(logits, target, costs, radius=0.1, max_dual=50.0, return_dual=True)
    assert dual.status == Status.MAX_DUAL
    assert dual.lam.item() == pytest.approx(50, rel=1e-12)


# ----------------------------------------------------------------------------------------------------
# composition with PyTorch


ALL = [*CODES, "dc_ce", "dc_trades", "dc_mart"]
names = pytest.mark.parametrize("name", ALL)


def call(name, logits, target, natural):
    if name.startswith("dc_"):
        return fused(name[3:], logits, target, natural, divergence="alpha", alpha=2.0, radius=0.1)
    return public(name, logits, target, natural)


def inputs(name, shape=(3, 8), classes=5, dtype=torch.float32, *, seed=0, requires_grad=False):
    logits, target, natural = draw(name.removeprefix("dc_"), shape, classes, dtype, seed=seed)
    logits.requires_grad_(requires_grad)
    return logits, target, natural if natural is None else natural.requires_grad_(requires_grad)


def gradients_of(value, logits, natural):
    return torch.autograd.grad(value.sum(), [t for t in (logits, natural) if t is not None])


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@kinds
def test_opcheck(kind, layout, dtype):
    logits, target, natural = draw(kind, (2, 3), 5, dtype)
    if layout == "transposed":
        logits, natural = (None if t is None else LAYOUTS["transposed"](t) for t in (logits, natural))
    numbers = (CODES[kind], BETA, SMOOTHING if kind == "ce" else 0.0, -100)
    torch.library.opcheck(torch.ops.armor.rowloss.default, (logits, target, natural, *numbers))
    losses, stats = torch.ops.armor.rowloss(logits, target, natural, *numbers)
    weights = torch.softmax(losses, -1)
    for grad, share in (
        (torch.ones(()).to(losses.dtype).expand(2, 3), None),
        (torch.rand(2).to(losses.dtype), weights),
    ):
        for natural_grad in {False, natural is not None}:
            arguments = (grad, share, logits, target, natural, stats, *numbers, natural_grad)
            torch.library.opcheck(torch.ops.armor.rowloss_backward.default, arguments)
    if kind != "kl":
        costs = torch.full((2, 3), 0.01, dtype=losses.dtype)
        for price in (None, costs):
            arguments = (logits, target, natural, price, *numbers[:3], 1, 2.0, 0.1, 0.0, 1e6)
            torch.library.opcheck(torch.ops.armor.rowloss_dual.default, arguments)


@names
def test_meta_tensors(name):
    given = inputs(name, requires_grad=True)
    on_meta = [None if t is None else t.detach().to("meta").requires_grad_(t.requires_grad) for t in given]
    value, expected = call(name, *on_meta), call(name, *given)
    assert value.device.type == "meta"
    assert (value.shape, value.dtype, value.stride()) == (expected.shape, expected.dtype, expected.stride())
    for gradient in gradients_of(value, on_meta[0], on_meta[2]):
        assert (gradient.shape, gradient.dtype) == (given[0].shape, given[0].dtype)


def test_fake_tensors_of_both_devices():
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            logits, target = torch.empty(4, 7, 3, device=device), torch.zeros(4, 7, device=device, dtype=torch.int64)
            value, dual = dc_mart(logits, logits, target, radius=0.1, return_dual=True)
            assert value.device.type == dual.weights.device.type == device
            assert value.shape == (4,)
            assert cross_entropy(logits, target).shape == dual.weights.shape == (4, 7)


@names
def test_compiled(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape, classes in [((3, 8), 5), ((5, 31), 10), ((2, 128), 7)]:
        given = inputs(name, shape, classes, requires_grad=True)
        value, expected = compiled(name, *given), call(name, *given)
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        pairs = zip(gradients_of(value, *given[::2]), gradients_of(expected, *given[::2]), strict=True)
        for one, other in pairs:
            assert torch.equal(one, other)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3
    with torch.no_grad():
        assert torch.equal(compiled(name, *given), expected)


@names
def test_vmap(name):
    logits, target, natural = inputs(name, (4, 3, 8))
    dims = (0, 0, None if natural is None else 0)
    direct = call(name, logits, target, natural)
    mapped = func.vmap(lambda *one: call(name, *one), in_dims=dims)
    assert torch.equal(mapped(logits, target, natural), direct)
    assert torch.equal(func.vmap(mapped, in_dims=dims)(logits, target, natural), direct)
    # One target, and for the pairs one natural prediction, for every member of the batch; classes not last.
    shared = func.vmap(lambda z: call(name, z, target[0], None if natural is None else natural[0]), in_dims=3)
    rows = torch.stack([call(name, z, target[0], None if natural is None else natural[0]) for z in logits])
    assert torch.equal(shared(logits.movedim(0, 3)), rows)


@names
def test_func_grad(name):
    given = inputs(name, (8,), dtype=torch.float64)
    places = (0,) if given[2] is None else (0, 2)
    transformed = func.grad(lambda *one: call(name, *one).sum(), argnums=places)(*given)
    z, w = leaves(*given[::2])
    for one, other in zip(transformed, gradients_of(call(name, z, given[1], w), z, w), strict=True):
        assert torch.equal(one, other)


@names
def test_vmap_of_grad(name):
    given = inputs(name, (5, 8), dtype=torch.float64)
    places, dims = ((0,), (0, 0, None)) if given[2] is None else ((0, 2), 0)
    mapped = func.vmap(func.grad(lambda *one: call(name, *one).sum(), argnums=places), in_dims=dims)(*given)
    z, w = leaves(*given[::2])
    for one, other in zip(mapped, gradients_of(call(name, z, given[1], w), z, w), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-16)


@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_nothing(name, dtype):
    given = inputs(name, dtype=dtype, requires_grad=True)
    expected = call(name, *given)
    gradients = gradients_of(expected, *given[::2])
    with torch.autocast("cpu", torch.bfloat16):
        value = call(name, *given)
        cast = gradients_of(value, *given[::2])
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert all(torch.equal(one, other) for one, other in zip(cast, gradients, strict=True))


def test_autocast_logits_of_a_model():
    model = nn.Linear(6, 4)
    x, target = torch.randn(32, 6), torch.randint(4, (32,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        assert logits.dtype == torch.bfloat16
        value = dc_trades(logits, model(x + 0.1), target, radius=0.1)
    value.backward()
    assert value.dtype == torch.float32
    assert model.weight.grad.abs().sum() > 0


@names
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name, reentrant):
    given = inputs(name, requires_grad=True)
    saved = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in given]
    call(name, *given).sum().backward()
    checkpoint(lambda *t: call(name, *t), *saved, use_reentrant=reentrant).sum().backward()
    for one, other in zip(saved[::2], given[::2], strict=True):
        assert one is None or torch.equal(one.grad, other.grad)


@names
def test_second_derivatives_are_refused(name):
    logits, target, natural = inputs(name, requires_grad=True)
    gradients = torch.autograd.grad(call(name, logits, target, natural).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradients[0].square().sum().backward()


@names
def test_without_gradients(name):
    given = inputs(name, requires_grad=True)
    before = [None if t is None else t.detach().clone() for t in given]
    expected = call(name, *given)
    with torch.no_grad():
        assert torch.equal(call(name, *given), expected)
    with torch.inference_mode():
        assert torch.equal(call(name, *given), expected)
    assert all(one is None or torch.equal(one, other) for one, other in zip(given, before, strict=True))


@fused_kinds
def test_duals_carry_no_gradient(kind):
    logits, target, natural = inputs(kind, requires_grad=True)
    value, dual = fused(kind, logits, target, natural, radius=0.1, return_dual=True)
    assert value.requires_grad
    assert not any(entry.requires_grad for entry in dual)


# More rows than threads, and rows so long that threads might share them.
@kinds
@pytest.mark.parametrize(("rows", "classes"), [(2001, 10), (3, 100_001)])
def test_bit_equal_for_any_number_of_threads(kind, rows, classes):
    logits, target, natural = draw(kind, (rows,), classes, torch.float32)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        row = evaluate(torch.ops.armor, kind, logits, target, natural)
        numbers = (CODES[kind], BETA, 0.0, 0, 0.0, 0.1, 0.0, 1e6)
        results.append((*row, *torch.ops.armor.rowloss_dual(logits, target, natural, None, *numbers)))
    for first, second in pairwise(results):
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# ----------------------------------------------------------------------------------------------------
# shapes and arguments


@kinds
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows(kind, shape):
    logits, target, natural = draw(kind, shape, 4)
    for result, expected in zip(
        ours(kind, logits, target, natural, torch.ones(shape)), (shape, (*shape, 4), (*shape, 4)), strict=False
    ):
        assert result.shape == expected


@fused_kinds
def test_no_samples(kind):
    logits, target, natural = draw(kind, (0, 3), 4)
    z, w = leaves(logits, natural)
    value = fused(kind, z, target, w, radius=0.1)
    assert value.shape == (0,)
    assert gradients_of(value, z, w)[0].shape == (0, 3, 4)
    for shape in [(0,), (2, 0)]:
        with pytest.raises(ValueError, match=r"logits.*at least one sample.*0"):
            fused(kind, *draw(kind, shape, 4), radius=0.1)


PAIR = {"natural_logits": torch.zeros(3, 4), "adv_logits": torch.ones(3, 4), "target": torch.tensor([0, 1, 3])}
ONE = {"logits": torch.ones(3, 4), "target": torch.tensor([0, 1, 3])}
ROBUST = {"radius": 0.1}
# The functions that take it, what is wrong with it, and the words that say so.
BAD_LOGITS = {
    "integers": (TypeError, ["int64"], torch.ones(3, 4, dtype=torch.int64)),
    "complex": (TypeError, ["complex64"], torch.ones(3, 4, dtype=torch.complex64)),
    "list": (TypeError, ["list"], [[1.0, 2.0]]),
    "scalar": (ValueError, ["()"], torch.tensor(1.0)),
    "no classes": (ValueError, ["(3, 0)"], torch.ones(3, 0)),
}
BAD_TARGETS = {
    "int32": (TypeError, ["int32"], torch.zeros(3, dtype=torch.int32)),
    "floats": (TypeError, ["float32"], torch.zeros(3)),
    "list": (TypeError, ["list"], [0, 1, 2]),
    "probabilities": (TypeError, ["float32"], torch.full((3, 4), 0.25)),
    "too short": (ValueError, ["(3,)", "(2,)"], torch.zeros(2, dtype=torch.int64)),
    "column": (ValueError, ["(3,)", "(3, 1)"], torch.zeros(3, 1, dtype=torch.int64)),
    "elsewhere": (ValueError, ["meta", "cpu"], torch.zeros(3, dtype=torch.int64, device="meta")),
    "the number of classes": (ValueError, ["4", "[0, 3]"], torch.tensor([0, 4, 1])),
    "negative": (ValueError, ["-1"], torch.tensor([0, -1, 1])),
    "far away": (ValueError, ["1099511627776"], torch.tensor([2**40, 0, 1])),
}
BAD_ADVERSARIAL = {
    "shape": (ValueError, ["(3, 4)", "(3, 5)"], torch.zeros(3, 5)),
    "batch": (ValueError, ["(3, 4)", "(1, 4)"], torch.zeros(1, 4)),
    "dtype": (TypeError, ["float32", "float64"], torch.zeros(3, 4, dtype=torch.float64)),
    "half": (TypeError, ["float32", "float16"], torch.zeros(3, 4, dtype=torch.float16)),
    "device": (ValueError, ["meta", "cpu"], torch.zeros(3, 4, device="meta")),
    "integers": (TypeError, ["int64"], torch.zeros(3, 4, dtype=torch.int64)),
    "number": (TypeError, ["float"], 0.5),
}
BAD_NUMBERS = {
    "negative": (ValueError, ["-0.5"], -0.5),
    "nan": (ValueError, ["nan"], nan),
    "infinite": (ValueError, ["inf"], inf),
    "text": (TypeError, ["0.1"], "0.1"),
    "boolean": (TypeError, ["True"], True),
    "none": (TypeError, ["None"], None),
}
BAD_COSTS = {
    "shape": (ValueError, ["(3,)", "(4,)"], torch.zeros(4)),
    "integers": (TypeError, ["int64"], torch.zeros(3, dtype=torch.int64)),
    "number": (TypeError, ["float"], 0.5),
    "device": (ValueError, ["meta", "cpu"], torch.zeros(3, device="meta")),
}
ONES = {"cross_entropy": (cross_entropy, ONE), "dc_cross_entropy": (dc_cross_entropy, {**ONE, **ROBUST})}
PAIRS = {
    "trades_loss": (trades_loss, PAIR),
    "mart_loss": (mart_loss, PAIR),
    "dc_trades": (dc_trades, {**PAIR, **ROBUST}),
    "dc_mart": (dc_mart, {**PAIR, **ROBUST}),
}
KL = {"kl_loss": (kl_loss, {name: PAIR[name] for name in ("natural_logits", "adv_logits")})}
ROBUSTS = {name: entry for name, entry in (ONES | PAIRS).items() if name.startswith("dc_")}


def refused(functions, argument, bad):
    return [
        pytest.param(function, {**good, argument: value}, error, [argument, *words], id=f"{name}-{argument}-{what}")
        for name, (function, good) in functions.items()
        for what, (error, words, value) in bad.items()
    ]


@pytest.mark.parametrize(
    ("function", "arguments", "error", "words"),
    [
        *refused(ONES, "logits", BAD_LOGITS),
        *refused(PAIRS | KL, "natural_logits", BAD_LOGITS),
        *refused(PAIRS | KL, "adv_logits", BAD_ADVERSARIAL),
        *refused(ONES | PAIRS, "target", BAD_TARGETS),
        *refused(PAIRS, "beta", BAD_NUMBERS),
        *refused(ONES, "label_smoothing", {**BAD_NUMBERS, "above one": (ValueError, ["1.5"], 1.5)}),
        *refused(ROBUSTS, "costs", BAD_COSTS),
        *refused(ROBUSTS, "radius", BAD_NUMBERS),
        *refused(ROBUSTS, "kappa", BAD_NUMBERS),
        *refused(ROBUSTS, "max_dual", {**BAD_NUMBERS, "zero": (ValueError, ["0.0"], 0.0)}),
        *refused(ROBUSTS, "divergence", {"unknown": (ValueError, ["chi2"], "chi2")}),
        *refused(ROBUSTS, "alpha", {"without use": (ValueError, ["2.0"], 2.0)}),
        *refused({"cross_entropy": ONES["cross_entropy"]}, "ignore_index", {"text": (TypeError, ["x"], "x")}),
    ],
)
def test_bad_arguments(function, arguments, error, words):
    with pytest.raises(error) as caught:
        function(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_good_arguments_of_the_table_are_good():
    for function, good in (ONES | PAIRS | KL).values():
        assert function(**good).isfinite().all()


@pytest.mark.parametrize("function", [mart_loss, dc_mart])
def test_mart_needs_a_wrong_class(function):
    one = torch.zeros(3, 1)
    number = {"radius": 0.1} if function is dc_mart else {}
    with pytest.raises(ValueError, match=r"natural_logits.*2 classes.*\(3, 1\)"):
        function(one, one, torch.zeros(3, dtype=torch.int64), **number)


@fused_kinds
def test_the_fused_losses_need_samples(kind):
    logits, target, natural = draw(kind, (), 4)
    with pytest.raises(ValueError, match=r"logits.*\(4,\)"):
        fused(kind, logits, target, natural, radius=0.1)


def test_only_cross_entropy_ignores():
    logits, natural, target = torch.zeros(3, 4), torch.ones(3, 4), torch.tensor([0, -100, 1])
    assert cross_entropy(logits, target)[1] == 0
    for function in (trades_loss, mart_loss):
        with pytest.raises(ValueError, match=r"target.*-100"):
            function(natural, logits, target)
    with pytest.raises(ValueError, match=r"target.*-100"):
        dc_cross_entropy(logits, target, radius=0.1)
    with pytest.raises(ValueError, match=r"target.*-7"):
        cross_entropy(logits, torch.tensor([0, -100, -7]))
